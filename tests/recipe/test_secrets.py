"""Claims about secrets of a recipe and a command line: no stage writes them into its folder."""

from __future__ import annotations

from pathlib import Path

import yaml
from conftest import run_here
from written import write_store

from recipe.load import load_recipe
from target.target import Target

IN_FILE, IN_WORD = "hf_in_the_recipe_file", "hf_in_a_command"
SECTIONS = """
  env: {{HF_TOKEN: {secret}}}
  variants:
    fp8: {{path: x, memory_gb: 1, env: {{A_KEY: {secret}}}}}
  purposes:
    production: {{args: {{api-key: {secret}}}, env: {{B_KEY: {secret}}}}}
"""


def with_secrets(recipe_path: Path, folder: Path) -> Path:
    text = recipe_path.read_text().replace("\nsynth:", SECTIONS.format(secret=IN_FILE) + "synth:")
    text = text.replace("\ndump:\n", f"\ndump:\n  env: {{C_KEY: {IN_FILE}}}\n")
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def files_with_secrets(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    secrets = (IN_FILE.encode(), IN_WORD.encode())
    return [path.name for path in files if any(secret in path.read_bytes() for secret in secrets)]


def test_a_synthesis_and_a_training_keep_the_names_of_secrets_and_not_their_values(
    recipe_path: Path, prompts_path: Path, target_folder: Path, scripted_server: str, tmp_path: Path
) -> None:
    recipe = with_secrets(recipe_path, tmp_path)
    args = ("--recipe", recipe, "--set", f"serve.env.D_KEY={IN_WORD}", "--set", f"dump.env={{E_KEY: {IN_WORD}}}")
    store = write_store(tmp_path / "store", Target.read(target_folder))
    run_here("synth", "generate", *args, "--prompts", prompts_path, "--output", tmp_path / "synth",
             "--endpoint", scripted_server)  # fmt: skip
    run_here("train", "offline", *args, "--store", store, "--output", tmp_path / "draft")
    run_here("train", "export", *args, "--run", tmp_path / "draft", "--output", tmp_path / "export")
    for folder in ("synth", "draft", "export"):
        assert files_with_secrets(tmp_path / folder) == []
    resolved = yaml.safe_load((tmp_path / "synth/resolved.yaml").read_text())
    assert resolved["serve"]["env"] == {"HF_TOKEN": "<redacted>", "D_KEY": "<redacted>"}
    assert resolved["dump"]["env"] == {"E_KEY": "<redacted>"}
    assert "serve.env.D_KEY=<redacted>" in (tmp_path / "synth/command.txt").read_text()


def test_environments_are_not_settings_at_any_depth(recipe_path: Path, tmp_path: Path) -> None:
    settings = load_recipe(with_secrets(recipe_path, tmp_path)).serve.settings()
    assert "env" not in settings
    assert settings["variants"]["fp8"]["path"] == "x"
    assert "env" not in settings["variants"]["fp8"]
    assert "env" not in settings["purposes"]["production"]
