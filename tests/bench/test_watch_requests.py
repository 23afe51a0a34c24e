"""Claims about the requests that `bench watch` sends, and about the card that it compares with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from counting import Server, make_card, make_row, settings

from bench.card import Card, Filters, read_card
from bench.probe import Requests, send_requests, summarize
from bench.requests import Served
from bench.watch import watch
from bench.watch_report import Report
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

KEY = "sk-secret-of-the-server"


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
