"""Claims about `bench watch`: windows, restarts, faults of the server, exit codes, and what it writes."""

from __future__ import annotations

import errno
import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from counting import STEPS, Metrics, Server, make_card, make_row, settings
from prometheus_client.parser import text_string_to_metric_families

import bench.watch
import bench.watch_report
from bench.card import Card
from bench.counters import CannotSayError, Read
from bench.watch import watch
from bench.watch_report import Report, parse_address
from bench.windows import Watcher
from common.errors import UserError


def read(metrics: Metrics) -> Read:
    return Read.parse(metrics.text(), "here")


def watcher(card: Card | None = None, **changes: Any) -> Watcher:
    return Watcher("http://here/v1", card or make_card(), 0.001, 1000, **changes)


@pytest.mark.parametrize(
    ("served", "code", "said"),
    [
        ({}, 0, "watch: as the card in 1 window; by chance at most 0.001"),
        ({"scale": 0.7}, 1, "watch: drifted: 1 of 1 window, the first at "),
        ({"scale": 1.3}, 1, "length 2.950 is ABOVE"),
        ({"steps": 600}, 3, "watch: cannot say: 600 of 1000 drafts"),
    ],
)
def test_one_window_ends_with_a_line_and_an_exit_code(
    server: Server, card: Card, capsys: pytest.CaptureFixture[str], served: dict[str, Any], code: int, said: str
) -> None:
    server.script = [server.good(), server.good(**served)]
    assert watch(settings(server), Report()) == code
    assert said in capsys.readouterr().out


def test_a_server_that_does_not_answer_gives_no_verdict_and_no_traceback(
    server: Server, card: Card, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server.script = [lambda: (503, "starting")]
    report = Report(prometheus=tmp_path / "draft.prom")
    assert watch(settings(server), report) == 3
    assert "found no answer (HTTP 503), expected vLLM's metrics" in capsys.readouterr().out
    assert "draftline_watch_server_up 0.0" in (tmp_path / "draft.prom").read_text()
    server.script = [lambda: (200, 'vllm:spec_decode_num_drafts_total{engine="0" 1')]
    assert watch(settings(server), Report()) == 3
    assert "metrics that cannot be parsed" in capsys.readouterr().out


def test_a_window_goes_on_over_reads_that_fail_until_ctrl_c(
    server: Server, card: Card, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    naps = iter(range(4))

    def sleep(seconds: float) -> None:
        if next(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench.watch, "time", SimpleNamespace(sleep=sleep))
    server.script = [server.good(), server.good(steps=600), lambda: (500, ""), server.good(steps=600)]
    assert watch(settings(server, once=False), Report()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "too little yet: 600 of 1000 drafts" in lines[1]
    assert "HTTP 500" in lines[2]
    assert "1200 drafts of 60 requests" in lines[3]


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (200, "vllm:num_requests_running 1\n", "a vLLM server without speculative decoding"),
        (200, "sglang:spec_accept_length 2\n", "no metrics of vLLM"),
        (404, "", "found HTTP 404, expected vLLM's metrics"),
    ],
)
def test_a_server_that_never_will_have_the_counters_is_a_mistake_of_the_call(
    server: Server, card: Card, status: int, text: str, said: str
) -> None:
    server.script = [lambda: (status, text)]
    with pytest.raises(UserError, match=said):
        watch(settings(server), Report())


def test_a_restart_loses_nothing_that_was_read_and_is_told() -> None:
    metrics = Metrics()
    metrics.serve(9000)
    found = watcher()
    found.observe(read(metrics))
    metrics.serve(600)
    found.observe(read(metrics))
    metrics.restart()
    metrics.serve(500)
    window = found.observe(read(metrics))
    assert window is not None
    assert (window.counts.steps, window.counts.requests) == (1100, 55)
    assert not window.is_outside
    assert "restarted" in found.notes[0]


def test_a_restart_is_found_though_the_new_process_has_counted_more() -> None:
    before = Metrics()
    before.serve(1000)
    after = Metrics(created=before.created + 60)
    after.serve(2000)
    assert read(after).restarted_since(read(before))
    without = [Read.parse("".join(line for line in m.text().splitlines(True) if "_created" not in line), "here")
               for m in (before, after)]  # fmt: skip
    assert not without[1].restarted_since(without[0])
    assert without[0].restarted_since(without[1])


def test_a_server_that_restarts_with_other_draft_tokens_begins_a_new_window_of_the_shared_positions() -> None:
    metrics = Metrics()
    found = watcher()
    found.observe(read(metrics))
    metrics.serve(600)
    found.observe(read(metrics))
    metrics.restart(num_draft_tokens=2)
    metrics.serve()
    window = found.observe(read(metrics))
    assert window is not None
    assert window.comparison is not None
    assert window.counts.steps == STEPS
    assert len(window.comparison.positions) == 2
    assert not window.is_outside
    assert "only positions 1 to 2 are compared" in found.notes[1]


def test_a_schedule_of_draft_tokens_is_no_drift_and_a_drop_at_position_1_still_is(
    server: Server, card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [server.good(), server.good(steps=2500, draft_tokens=1), server.good(steps=2500, draft_tokens=1)]
    assert watch(settings(server), Report()) == 0
    assert "1.00 of 3 tokens drafted a step, so only position 1 is compared" in capsys.readouterr().out
    server.script = [server.good(), server.good(draft_tokens=1, scale=0.7)]
    assert watch(settings(server), Report()) == 1
    assert "position 1 0.490 is BELOW" in capsys.readouterr().out


def test_the_report_of_a_drift_ends_with_the_drift() -> None:
    metrics, found = Metrics(), watcher()
    found.observe(read(metrics))
    for scale in (1.0, 0.6, 0.6, 1.0):
        metrics.serve(scale=scale)
        found.observe(read(metrics))
    assert [window.is_outside for window in found.windows] == [False, True, True, False]
    assert (found.verdict, found.last_verdict) == ("drifted", "as the card")


def test_no_drop_can_be_told_against_a_card_of_fewer_draft_tokens_and_it_does_not_say_as_the_card() -> None:
    metrics, found = (
        Metrics(),
        watcher(make_card(make_row(num_draft_tokens=1, per_position=[0.7], interval=(1.6, 1.8)))),
    )
    found.observe(read(metrics))
    metrics.serve(scale=0.5)
    window = found.observe(read(metrics))
    assert window is not None
    assert not window.is_outside
    assert "only a rise is reported" in found.notes[0]
    assert (found.verdict, "no drop can be told" in found.why_not) == ("cannot say", True)


def test_requests_that_were_running_count_once_as_requests_of_the_window() -> None:
    metrics, found = Metrics(running=7), watcher()
    for _ in range(3):
        found.observe(read(metrics))
        metrics.serve(400)
    window = found.observe(read(metrics))
    assert window is not None
    assert (window.counts.steps, window.counts.requests, window.counts.beyond) == (1200, 67, 0)


def test_a_small_drift_that_lasts_is_found_in_several_windows_together() -> None:
    metrics, found = Metrics(), watcher(make_card(make_row(n=2000, steps=40_000, interval=(2.47, 2.53))))
    found.observe(read(metrics))
    for _ in range(12):
        metrics.serve(1500, scale=0.92)
        found.observe(read(metrics))
    alone = [bool(window.comparison and window.comparison.outside) for window in found.windows]
    together = [bool(window.recent and window.recent.outside) for window in found.windows]
    assert not any(alone)
    assert together[-1]
    assert found.verdict == "drifted"


def test_a_card_without_intervals_is_compared_after_enough_windows() -> None:
    metrics, found = Metrics(), watcher(make_card(make_row(interval=None)))
    found.observe(read(metrics))
    for number in range(9):
        metrics.serve(scale=1 + 0.02 * (-1) ** number)
        found.observe(read(metrics))
    assert [window.comparison is not None for window in found.windows] == [False] * 8 + [True]
    assert found.verdict == "as the card"


def test_a_later_call_goes_on_from_the_json_file(server: Server, card: Card, tmp_path: Path) -> None:
    path = tmp_path / "watch.json"
    server.script = [server.good(), server.good()]
    assert watch(settings(server), Report(json=path)) == 0
    server.script = [server.good(scale=0.7)]
    assert watch(settings(server), Report(json=path)) == 1  # one read, no wait
    found = json.loads(path.read_text())
    assert (found["verdict"], found["tested_windows"]) == ("drifted", 1)
    assert [window["outside"] for window in found["windows"]] == [False, True]
    assert found["windows"][1]["card"]["length"]["side"] == "below"
    server.script = [server.good(steps=700)]
    assert watch(settings(server), Report(json=path)) == 3
    assert watch(settings(server), Report(json=path)) == 0  # both halves make a window
    with pytest.raises(UserError, match="found no watch of this server"):
        watch(replace(settings(server), endpoint="http://127.0.0.1:1/v1"), Report(json=path))
    path.write_text("[]")
    with pytest.raises(UserError, match="found no watch of this server"):
        watch(settings(server), Report(json=path))


def test_another_card_begins_anew(server: Server, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "watch.json"
    server.script = [server.good(), server.good(), server.good(scale=0.7), server.good()]
    assert watch(settings(server), Report(json=path)) == 0
    swapped = Card("other-draft", "e" * 64, "served", card.rows)
    monkeypatch.setattr(bench.watch, "read_card", lambda folder, filters: swapped)
    assert watch(settings(server), Report(json=path)) == 0
    assert len(json.loads(path.read_text())["windows"]) == 1


def test_the_metrics_are_read_back_by_prometheus_own_parser(tmp_path: Path) -> None:
    metrics, found = Metrics(), watcher()
    found.observe(read(metrics))
    metrics.serve(scale=0.7)
    window = found.observe(read(metrics))
    Report(prometheus=tmp_path / "draft.prom").write(found)
    samples = {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families((tmp_path / "draft.prom").read_text())
        for sample in family.samples
    }
    assert window is not None
    assert window.comparison is not None
    assert samples["draftline_watch_verdict", "drifted"] == 1
    assert samples["draftline_watch_verdict", "as_the_card"] == 0
    assert samples["draftline_watch_acceptance_length", "window"] == pytest.approx(2.05)
    assert samples["draftline_watch_acceptance_length", "low"] == pytest.approx(window.comparison.length.low)
    assert samples["draftline_watch_acceptance_share", "window", "1"] == pytest.approx(0.49)
    assert samples["draftline_watch_windows_outside_total",] == 1
    assert samples["draftline_watch_card_info", "d" * 64, "tiny-draft", "served"] == 1


def test_the_metrics_are_served_as_they_are_at_the_time() -> None:
    metrics, found = Metrics(), watcher()

    def scrape(port: int | None) -> str:
        return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())

    with Report(listen=("127.0.0.1", 0)).open(found) as port:
        found.observe(read(metrics))
        assert "draftline_watch_drafts" not in scrape(port)
        metrics.serve()
        found.observe(read(metrics))
        assert f"draftline_watch_drafts {float(STEPS)}" in scrape(port)


def test_a_full_disk_does_not_end_like_a_drift(
    server: Server, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(bench.watch_report, "write_json", fail)
    server.script = [server.good()]
    with pytest.raises(CannotSayError, match="found no space left on device") as caught:
        watch(settings(server), Report(json=tmp_path / "watch.json"))
    assert caught.value.exit_code == 3


def test_a_port_that_is_taken_is_a_mistake_of_the_call(server: Server, card: Card) -> None:
    with pytest.raises(UserError, match="found address already in use"):
        watch(settings(server), Report(listen=("127.0.0.1", server.server_port)))
    with pytest.raises(UserError, match="expected HOST:PORT"):
        parse_address("9109")
