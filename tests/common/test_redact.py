"""Claims about secrets: their values are removed from what is written, and nothing else is."""

from __future__ import annotations

import pytest

from common.redact import redact, redact_override, redact_words

SECRET = "hf_secret"


def test_values_of_environments_and_keys_are_removed_and_names_stay() -> None:
    recipe = {
        "serve": {
            "env": {"HF_TOKEN": SECRET},
            "args": {"api-key": SECRET, "hf_token": SECRET, "max-num-batched-tokens": 8},
            "variants": {"fp8": {"path": "x", "env": {"A": SECRET}}},
            "purposes": {"production": {"args": {"api_key": [SECRET, SECRET]}, "env": {}}},
        },
        "dump": {"env": {"B": SECRET}},
        "target": {"mask_token_id": 3},
    }
    redacted = redact(recipe)
    assert SECRET not in str(redacted)
    assert redacted["serve"]["env"] == {"HF_TOKEN": "<redacted>"}
    assert redacted["serve"]["args"]["max-num-batched-tokens"] == 8
    assert redacted["serve"]["variants"]["fp8"] == {"path": "x", "env": {"A": "<redacted>"}}
    assert redacted["target"] == {"mask_token_id": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"serve.env.HF_TOKEN={SECRET}", "serve.env.HF_TOKEN=<redacted>"),
        (f"serve.env={{HF_TOKEN: {SECRET}}}", "serve.env={HF_TOKEN: <redacted>}"),
        (f"serve={{env: {{A: {SECRET}}}, port: 80}}", "serve={env: {A: <redacted>}, port: 80}"),
        (f"serve.args.api-key={SECRET}", "serve.args.api-key=<redacted>"),
        (f"serve.variants.fp8.env.A={SECRET}", "serve.variants.fp8.env.A=<redacted>"),
        (f"serve.variants.fp8={{path: x, env: {{A: {SECRET}}}}}", "serve.variants.fp8={path: x, env: {A: <redacted>}}"),
        ("synth.max_tokens=8", "synth.max_tokens=8"),
        ("target.mask_token_id=8", "target.mask_token_id=8"),
        ("synth.thinking_modes=[enabled,  disabled]", "synth.thinking_modes=[enabled,  disabled]"),
        ("no-value", "no-value"),
    ],
)
def test_an_override_keeps_its_key_and_loses_a_secret_value(text: str, expected: str) -> None:
    assert redact_override(text) == expected


def test_a_command_line_loses_its_secrets() -> None:
    words = ["generate", "--set", f"serve.env.A={SECRET}", f"--set=dump.env.B={SECRET}", "--output", "x", "--seed=3"]
    more = ["--", "--api-key", SECRET, SECRET, f"--hf-token={SECRET}", "--max-num-seqs", "4"]
    assert redact_words([*words, *more]) == [
        "generate", "--set", "serve.env.A=<redacted>", "--set=dump.env.B=<redacted>", "--output", "x", "--seed=3",
        "--", "--api-key", "<redacted>", "<redacted>", "--hf-token=<redacted>", "--max-num-seqs", "4",
    ]  # fmt: skip


def test_redacting_twice_changes_nothing() -> None:
    once = redact_override(f"serve={{env: {{A: {SECRET}}}}}")
    assert redact_override(once) == once
