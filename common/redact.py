"""Remove secrets from what is written to disk: values of environment variables, API keys, hub tokens.

Names are kept, so that a reader sees what was set. `env: {HF_TOKEN: hf_abc}` becomes `env: {HF_TOKEN: <redacted>}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

REDACTED = "<redacted>"
SECRET_NAME = re.compile(r"(^|_)(api_key|api_keys|hf_token|password|secret)$")
"""Keys of a recipe and flags of vLLM and SGLang whose value is a secret, with `_` for `-`."""
CREDENTIALS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]*@", re.IGNORECASE)


def redact(value: Any) -> Any:
    """Return plain values (as read from JSON or YAML) without the secrets in their mappings."""
    if isinstance(value, Mapping):
        return {key: _drop(part) if _is_secret(str(key)) else redact(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact(part) for part in value]
    return value


def redact_words(words: Sequence[str]) -> list[str]:
    """Return a command line's words without secrets: `--set serve.env.X=...`, `--api-key ...`."""
    redacted: list[str] = []
    flag = ""  # the option that the word belongs to
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = "" if equals else name
            if equals and name == "--set":
                word = f"--set={redact_override(value)}"
            elif equals and _is_secret(name):
                word = f"{name}={REDACTED}"
        elif flag == "--set":
            word, flag = redact_override(word), ""
        elif _is_secret(flag):
            word = REDACTED
        redacted.append(word)
    return redacted


def redact_override(text: str) -> str:
    """Return the "a.b=value" of a `--set` without secrets; the value may be a YAML mapping."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if equals and any(map(_is_secret, parts[:-1])):
        return f"{key}={REDACTED}"
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"{key}={REDACTED}" if equals else text
    redacted = redact({parts[-1]: parsed})[parts[-1]]
    if redacted == parsed:
        return text
    flow = yaml.safe_dump(redacted, default_flow_style=True, width=1_000_000, allow_unicode=True, sort_keys=False)
    return f"{key}={flow.split(chr(10) + '...')[0].strip()}"


def redact_url(text: str) -> str:
    """Return a text without the user and password of its URLs."""
    return CREDENTIALS.sub(r"\1", text)


def redact_urls(value: Any) -> Any:
    """Return plain values without the user and password of their URLs, at any depth."""
    if isinstance(value, Mapping):
        return {key: redact_urls(part) for key, part in value.items()}
    if isinstance(value, list):
        return [redact_urls(part) for part in value]
    return redact_url(value) if isinstance(value, str) else value


def _is_secret(name: str) -> bool:
    name = name.lstrip("-").replace("-", "_").lower()
    return name == "env" or SECRET_NAME.search(name) is not None


def _drop(value: Any) -> Any:
    """Return the value with every leaf replaced; names in a mapping stay."""
    if isinstance(value, Mapping):
        return {key: _drop(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_drop(part) for part in value]
    return None if value is None else REDACTED
