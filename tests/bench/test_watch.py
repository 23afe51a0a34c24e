"""Claims about `bench watch`: windows, restarts, faults of the server, exit codes, and what it writes."""

from __future__ import annotations

import errno
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_here
from prometheus_client.parser import text_string_to_metric_families

import bench.watch
import bench.watch_report
from bench.card import Card, Filters, read_card
from bench.counters import CannotSayError, Read
from bench.probe import Requests, send_requests, summarize
from bench.requests import Served
from bench.watch import Settings, watch
from bench.watch_report import Report, parse_address
from bench.windows import Watcher
from common.errors import UserError
from contracts.certificate import (
    AcceptanceRow,
    Certificate,
    Commands,
    DataFacts,
    DraftFacts,
    Predicted,
    TargetFacts,
    TrainingFacts,
)
from contracts.certificate import Served as ServedFigures
from contracts.conversation import CONVERSATIONS_FILE, Conversation, Sample

PER_POSITION = [0.7, 0.5, 0.3]
STEPS = 5000
KEY = "sk-secret-of-the-server"


@dataclass
class Metrics:
    """The counters of a vLLM server; each of its requests has 20 steps."""

    steps: int = 0
    drafted: int = 0
    accepted: list[int] = field(default_factory=lambda: [0] * len(PER_POSITION))
    created: float = 1.7e9
    running: int = 0

    def serve(self, steps: int = STEPS, scale: float = 1.0, draft_tokens: int | None = None) -> None:
        """Count the steps of finished requests with the card's shares times `scale`, of so many draft tokens."""
        draft_tokens = draft_tokens or len(self.accepted)
        self.steps += steps
        self.drafted += steps * draft_tokens
        for place, share in enumerate(PER_POSITION[:draft_tokens]):
            self.accepted[place] += round(share * scale * steps)

    def restart(self, num_draft_tokens: int = len(PER_POSITION)) -> None:
        self.steps, self.drafted, self.accepted = 0, 0, [0] * num_draft_tokens
        self.created += 60

    def text(self) -> str:
        def counter(name: str, value: float, label: str = "") -> list[str]:
            return [
                f"# TYPE vllm:{name}_total counter",
                f'vllm:{name}_total{{engine="0"{label}}} {float(value)}',
                f"# TYPE vllm:{name}_created gauge",
                f'vllm:{name}_created{{engine="0"{label}}} {self.created}',
            ]

        requests = self.steps // 20
        lines = [
            f'vllm:num_requests_running{{engine="0"}} {self.running}',
            f'vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1"}} {requests}',
            f'vllm:time_to_first_token_seconds_count{{engine="0"}} {requests}',
            *counter("generation_tokens", requests + self.steps + sum(self.accepted)),
            *counter("spec_decode_num_drafts", self.steps),
            *counter("spec_decode_num_draft_tokens", self.drafted),
            *counter("spec_decode_num_accepted_tokens", sum(self.accepted)),
        ]
        for place, count in enumerate(self.accepted):
            lines += counter("spec_decode_num_accepted_tokens_per_pos", count, f',position="{place}"')
        return "\n".join(lines) + "\n"


class Server(ThreadingHTTPServer):
    """Serves `script`, the status and body of each GET of /metrics in turn; the last one stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.metrics = Metrics()
        self.script: list[Callable[[], tuple[int, str]]] = []
        self.keys: list[str | None] = []
        self.accepted: list[int] | None = [3, 1, 0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def good(self, **served: Any) -> Callable[[], tuple[int, str]]:
        """An answer after the server has served so much more."""

        def answer() -> tuple[int, str]:
            self.metrics.serve(**served)
            return 200, self.metrics.text()

        return answer


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/metrics":
            step = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
            return self._answer(*step())
        self.server.keys.append(self.headers["Authorization"])
        return self._answer(200, json.dumps({"data": [{"id": "target"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            mode = str((body.get("chat_template_kwargs") or {}).get("thinking_mode"))
            return self._answer(200, json.dumps({"tokens": list(f"{mode} {body['messages'][-1]['content']}".encode())}))
        found = self.server.accepted
        token_ids = [1] * (1 + sum(a + 1 for a in found or [0]))
        choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": token_ids}
        metrics = {"speculative_decoding": {"per_step_accepted": found}} if found else None
        return self._answer(200, json.dumps({"choices": [choice], "metrics": metrics}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def make_row(**changes: Any) -> AcceptanceRow:
    values = {
        "set": "held_out", "thinking_mode": "enabled", "temperature": 0.0, "num_draft_tokens": 3,
        "acceptance_length": 2.5, "interval": (2.4, 2.6), "per_position": PER_POSITION, "steps": 4000, "n": 200,
    }  # fmt: skip
    return AcceptanceRow(**{**values, **changes})


def make_card(*rows: AcceptanceRow, **recipe: Any) -> Card:
    return Card("tiny-draft", "d" * 64, "served", list(rows or (make_row(),)), recipe)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    found = make_card()
    monkeypatch.setattr(bench.watch, "read_card", lambda folder, filters: found)
    return found


def settings(server: Server, **changes: Any) -> Settings:
    values = {"every_s": 0.01, "once": True, "rate": 0.001, "min_drafts": 1000}
    return Settings(server.url, Path("card"), Filters(), **{**values, **changes})


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


def write_records(folder: Path, count: int) -> Path:
    """A synthesis of `count` conversations in two modes and two categories; every fifth has two turns."""
    folder.mkdir()
    lines = []
    for number in range(count):
        spans = [(2, 8)] if number % 5 else [(2, 8), (10, 16)]
        lines.append(
            Conversation(
                id=f"{number * 7919:032x}", source_id="s", index=number, category=("math", "code")[number % 2],
                samples=[Sample(token_ids=[1] * 16, loss_spans=spans)], finish_reason="stop",
                thinking_mode=("enabled", "disabled")[number % 2], sampling={"temperature": 0.0}, target={},
                template="", usage={},
            ).model_dump_json()
        )  # fmt: skip
    (folder / CONVERSATIONS_FILE).write_text("\n".join(lines) + "\n")
    return folder


def test_sent_conversations_are_compared_by_mode_and_told_by_category(server: Server, tmp_path: Path) -> None:
    card = make_card(make_row(), make_row(thinking_mode="disabled", per_position=[0.9, 0.8, 0.8], interval=(3.4, 3.6)))
    requests = Requests(str(write_records(tmp_path / "synth", 60)), 50)
    answered = send_requests(Served(server.url.removesuffix("/v1"), "target"), requests, card)
    probe = summarize(answered, card, (3, 3), 0.001)
    by_mode = {group.name: group for group in probe.by_mode}
    assert [group.n for group in probe.by_mode] == [25, 25]
    enabled, disabled = by_mode["thinking enabled, temperature 0"], by_mode["thinking disabled, temperature 0"]
    assert enabled.acceptance.acceptance_length == pytest.approx(1 + 4 / 3)
    assert enabled.tested is not None
    assert disabled.tested is not None
    assert (enabled.tested.side, disabled.tested.side) == ("", "below")
    assert [group.name for group in probe.by_category] == ["code", "math"]
    assert [group["card"]["side"] for group in probe.to_json()["by_mode"]] == ["below", ""]


def test_what_it_sends_itself_is_in_no_window(
    server: Server, card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = Requests(str(write_records(tmp_path / "synth", 30)), 30)
    server.accepted = [3, 3, 2, 1, 1, 0, 2, 0]  # as the card
    server.script = [server.good(), server.good(steps=90_000, scale=0.5), server.good(steps=1100)]
    report = Report(json=tmp_path / "watch.json")
    assert watch(settings(server, requests=requests), report) == 3  # only the requests, without a wait
    out = capsys.readouterr().out
    assert "requests: thinking enabled, temperature 0: 15 conversations" in out
    assert "not compared: too few conversations" in out
    assert "cannot say: the requests sent tell no drop" in out
    assert watch(settings(server), report) == 0
    assert "1100 drafts of 55 requests" in capsys.readouterr().out


def test_requests_on_a_server_with_a_schedule_are_compared_at_position_1(server: Server, tmp_path: Path) -> None:
    card = make_card(make_row())
    server.accepted = [1] * 14 + [0] * 6  # 0.7, of steps that draft one token
    requests = Requests(str(write_records(tmp_path / "synth", 60)), 60)
    answered = send_requests(Served(server.url.removesuffix("/v1"), "target"), requests, card)
    sides = {}
    for draft_tokens in ((1, 3), (3, 3)):
        enabled = {group.name: group for group in summarize(answered, card, draft_tokens, 0.001).by_mode}[
            "thinking enabled, temperature 0"
        ]
        assert enabled.tested is not None
        sides[draft_tokens] = enabled.tested.side
    assert sides == {(1, 3): "", (3, 3): "below"}


def test_prompts_are_rendered_by_the_server_in_the_modes_of_the_cards_recipe(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {n}", "category": "math"}) + "\n" for n in range(6)))
    card = make_card(
        synth={"thinking_modes": ["enabled", "disabled"], "temperature": 0.5, "top_p": 0.9, "max_tokens": 9},
        target={"path": "t", "thinking_mode_values": {"disabled": None}},
    )
    turns = Requests(str(path), 3).read(Served(server.url.removesuffix("/v1"), "target"), card)
    assert [bytes(turn.prompt).decode() for turn in turns] == [
        "enabled Question 0",
        "None Question 2",
        "enabled Question 4",
    ]
    assert [turn.thinking_mode for turn in turns] == ["enabled", "disabled", "enabled"]
    assert turns[0].sampling == {"temperature": 0.5, "top_p": 0.9}
    assert len({turn.conversation for turn in turns}) == 3


def test_a_server_that_tells_no_acceptance_per_request_is_told_which_flag_it_lacks(
    server: Server, tmp_path: Path
) -> None:
    server.accepted = None
    requests = Requests(str(write_records(tmp_path / "synth", 3)), 3)
    with pytest.raises(UserError, match="--per-request-spec-decode-metrics detailed"):
        send_requests(Served(server.url.removesuffix("/v1"), "target"), requests, make_card())


def test_a_key_is_sent_and_written_nowhere(
    server: Server, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script = [server.good()]
    requests = Requests(str(write_records(tmp_path / "synth", 3)), 3)
    watch(settings(server, requests=requests), Report(tmp_path / "watch.json", tmp_path / "draft.prom"))
    assert f"Bearer {KEY}" in server.keys
    written = "".join(path.read_text() for path in (tmp_path / "watch.json", tmp_path / "draft.prom"))
    assert KEY not in written + "".join(capsys.readouterr())


def write_certificate(folder: Path, **figures: Any) -> Path:
    """A certificate with these figures; its other sections are what the format asks for."""
    names = {"architecture": "A", "repository": None, "revision": None, "tokenizer": "t", "template": "t"}
    certificate = Certificate(
        draft=DraftFacts(
            method="m", layout="native", dtype="float32", parameters=1, hidden_size=1, layer_ids=[1],
            num_draft_tokens=3, mask_token_id=None, max_position_embeddings=9, calibration=None,
        ),
        target=TargetFacts(name="tiny", fingerprint="f", **names),
        data=DataFacts(conversations="c", store="s", samples=1, held_out=0),
        training=TrainingFacts(
            checkpoint="c", weights="w", objective="o", steps=1, loss=0.0, seconds=1.0, init_from={}, trackers={},
            environment={},
        ),
        recipe={}, commands=Commands(vllm="", sglang="", has_sglang=False), environment={}, files={},
        **{"predicted": [], "served": [], "lossless": [], **figures},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    certificate.sealed("card").write(folder)
    return folder


def predicted(*rows: AcceptanceRow) -> Predicted:
    return Predicted(
        set="x", report="r", store="s", acceptance_length=2.0, interval=(1.9, 2.1), confidence=None, rows=list(rows)
    )


def served(*rows: AcceptanceRow) -> ServedFigures:
    return ServedFigures(
        sets=["held_out"], report="r", settings={}, environment={}, rows=list(rows), equality=[], overruns=0, speeds=[],
        overlap=None,
    )  # fmt: skip


def test_served_figures_are_compared_with_before_predicted_ones_and_those_of_the_servers_draft_tokens(
    tmp_path: Path,
) -> None:
    rows = [make_row(), make_row(num_draft_tokens=1, per_position=[0.6]), make_row(thinking_mode="disabled")]
    folder = write_certificate(tmp_path / "export", predicted=[predicted(make_row(set="own"))], served=[served(*rows)])
    card = read_card(folder, Filters())
    assert (card.name, card.source, len(card.rows)) == ("tiny-m", "served", 3)
    assert [row.num_draft_tokens for row in card.rows_for(1)] == [1]
    assert {row.num_draft_tokens for row in card.rows_for(2)} == {3}
    assert {row.num_draft_tokens for row in card.rows_for(9)} == {3}
    (row,) = read_card(folder, Filters(thinking_mode="disabled")).rows
    assert row.thinking_mode == "disabled"
    only = write_certificate(tmp_path / "predicted", predicted=[predicted(make_row())])
    assert read_card(only, Filters()).source == "predicted"


def test_a_card_without_figures_or_with_changed_ones_is_refused(tmp_path: Path) -> None:
    folder = write_certificate(tmp_path / "export")
    with pytest.raises(UserError, match="found no acceptance"):
        read_card(folder, Filters())
    write_certificate(folder, served=[served(make_row())])
    with pytest.raises(UserError, match="expected one of held_out, thinking enabled, temperature 0"):
        read_card(folder, Filters(set="mt_bench"))
    path = folder / "certificate.json"
    path.write_text(path.read_text().replace("0.7", "0.6"))
    with pytest.raises(UserError, match="found figures that differ from their digests"):
        read_card(folder, Filters())


def test_the_command_says_it_all_with_its_exit_code(server: Server, tmp_path: Path) -> None:
    folder = write_certificate(tmp_path / "export", served=[served(make_row())])
    server.script = [server.good(), server.good(scale=0.7)]
    words = ["bench", "watch", "--endpoint", server.url, "--card", folder, "--every", "0.1", "--once"]
    result = run_here(*words, check=False)
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("watch: tiny-m (")
    assert "watch: drifted: 1 of 1 window" in result.stdout
    assert run_here(*words[:4], "--card", tmp_path / "none", check=False).returncode == 2
