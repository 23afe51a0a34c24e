"""The files of a prompt set that `synth prepare` wrote."""

from __future__ import annotations

PROMPTS_FILE = "prompts.jsonl"
REMOVED_FILE = "removed.jsonl"
MANIFEST_FILE = "manifest.json"
