"""Fixtures: a tiny random target with a real tokenizer and template, a recipe for it, and runs of our commands."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from warm import Warm

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LONGEST = ("test_runners.py", "test_families.py", "test_pipeline.py", "test_offline.py")
"""Files of four to twenty minutes with their long tests."""

# The checkout, too: a process that finds tests/drafts/ but no checkout on its path takes it for our package `drafts`.
RECIPES = [str(ROOT / "recipes" / name) for name in ("Tiny-DFlash", "SmolLM2-135M")]
sys.path[:0] = [str(Path(__file__).parent), *RECIPES, str(ROOT)]

RECIPE_TEXT = """
target:
  path: {target}
  max_model_len: 256
  num_aux_layers: 2
serve:
  args: {{dtype: float32, enforce-eager: true, max-num-seqs: 16, max-num-batched-tokens: 512}}
synth:
  thinking_modes: [enabled, disabled, adaptive]
  temperature: 0.0
  max_tokens: 24
  concurrency: 8
  backoff_s: 0.05
dump:
  dtype: float32
  writers: 1
train:
  draft:
    method: dflash
    block_size: 4
    num_layers: 1
    num_attention_heads: 2
    num_key_value_heads: 1
    head_dim: 32
    intermediate_size: 64
    num_anchors: 8
  global_batch_size: 4
  num_steps: 12
  warmup_steps: 2
  checkpoint_every: 4
export:
  dtype: float32
  max_position_embeddings: 256
  yarn: {{factor: 2.0, original_max_position_embeddings: 128}}
bench:
  concurrency: [1, 4]
  num_prompts: {{1: 4}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then others that start engines: a run should end with short ones.

    A report names what a test proves of a vLLM release (release_table.py).
    """
    slow = {item.path for item in items if item.get_closest_marker("vllm")}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))
    for item in items:
        item.user_properties += [("proves", part) for mark in item.iter_markers("proves") for part in mark.args]


def build_target(folder: Path, seed: int, max_position_embeddings: int = 512) -> Path:
    """A Qwen3 of random weights under the tiny recipe's own tokenizer and chat template."""
    import make_target
    import torch
    from stdlib_corpus import read_subjects
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_target.make_tokenizer(read_subjects()[:300])
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=make_target.EMBEDDING_ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,  # far from uniform, so that no two logits are near
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data[len(tokenizer) :] = 0.0  # never the likeliest: free rows stay free
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_target(tmp_path_factory.mktemp("target"), seed=1)


@pytest.fixture(scope="session")
def other_target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_target(tmp_path_factory.mktemp("other-target"), seed=2)


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, the same for all test processes, and for later runs of the same code and packages."""
    sources = [ROOT / "constraints.txt", Path(__file__), Path(__file__).with_name("tiny_pipeline.py")]
    for package in ("common", "contracts", "target", "drafts", "recipe", "serve", "synth", "dump", "train", "bench"):
        sources += [path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".j2")]
    sources += [path for path in (ROOT / "recipes/Tiny-DFlash").rglob("*") if path.is_file()]
    sources += (ROOT / "chat_templates").iterdir()
    digest = hashlib.sha256(f"{sys.prefix} {sorted((d.name, d.version) for d in distributions())}".encode())
    for path in sorted(path for path in sources if path.suffix != ".pyc"):
        digest.update(path.read_bytes())
    kept = ROOT / ".pytest_cache/made"
    kept.mkdir(parents=True, exist_ok=True)
    folder = kept / f"{name}-{digest.hexdigest()[:16]}"
    with (kept / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            for other in kept.glob(f"{name}-*"):
                shutil.rmtree(other)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def trained_target() -> Path:
    """What the tiny recipe begins with: a target, trained briefly, and 60 prompts. Tests leave it as it is."""

    def make(folder: Path) -> None:
        script = [sys.executable, str(ROOT / "recipes/Tiny-DFlash/make_target.py"), "--output", str(folder)]
        sizes = ["--steps", "130", "--num-train", "60", "--num-held-out", "12"]
        subprocess.run([*script, *sizes], check=True, cwd=ROOT)

    return make_once("trained", make)


@pytest.fixture(scope="session")
def pipeline(trained_target: Path) -> Path:
    """The run folder of the tiny recipe, every stage done. Tests leave it as it is."""
    from tiny_pipeline import run_script

    def make(folder: Path) -> None:
        shutil.copytree(trained_target, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("made"))
        run_script(folder)

    return make_once("pipeline", make)


@pytest.fixture(scope="session")
def recipe_path(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE_TEXT.format(target=target_folder))
    return path


@pytest.fixture(scope="session")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompts; every fourth has two user turns."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = []
    for number in range(24):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Explain item {number}."}]
        if number % 4 == 3:
            messages.append({"role": "user", "content": "And why?"})
        rows.append({"id": f"row-{number}", "category": f"kind{number % 2}", "messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*args: object) -> list[str]:
    """Our console command, as a person in this environment would start it."""
    name, *rest = map(str, args)
    return [str(Path(sys.executable).with_name(name)), *rest]


def run(*args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end."""
    result = subprocess.run(command(*args), capture_output=True, text=True, cwd=ROOT, check=False)
    return raise_failed(result) if check else result


class Captured(io.StringIO):
    """A standard stream kept as text. vLLM before 0.32 silences the file descriptor of sys.stdout at its start."""

    def fileno(self) -> int:
        return 1


def run_here(*args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported torch and transformers already: half of a short command's time.

    A script, too, by its path. Not for commands that start an engine or a server (see warm.py for the engine), nor for
    what a process of its own prints.
    """
    name, *rest = map(str, args)
    out, err = Captured(), Captured()
    argv, on_sigterm, code = sys.argv, signal.getsignal(signal.SIGTERM), 0
    sys.argv = [name, *rest]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if name.endswith(".py"):
                    runpy.run_path(name, run_name="__main__")
                else:
                    importlib.import_module(f"{name}.cli").main()
            except SystemExit as end:
                code = int(end.code or 0)
            except Exception:
                traceback.print_exc()
                code = 1
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, on_sigterm)
    result = subprocess.CompletedProcess([name, *rest], code, out.getvalue(), err.getvalue())
    return raise_failed(result) if check else result


def raise_failed(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if result.returncode != 0:
        said = f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        raise AssertionError(f"{result.args} exited {result.returncode}\n{said}")
    return result


def kill_when(condition: Callable[[], bool], *args: object, timeout_s: float = 240.0) -> int:
    """Start one of our commands and SIGKILL it once `condition` holds; its exit code (-9 if it was killed)."""
    process = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            if condition():
                process.send_signal(signal.SIGKILL)
                break
            if time.monotonic() > deadline:
                raise AssertionError(f"{args}: the moment to kill it never came")
            time.sleep(0.005)
    finally:
        process.kill()
    return process.wait()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process that has imported vLLM when a second command needs it."""
    from warm import start_warm

    with start_warm(tmp_path_factory.mktemp("engine") / "log") as warm:
        yield warm


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, parsed."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[str]:
    """The URL of a server with the answers' form of vLLM's and an instant, deterministic reply (see scripted.py)."""
    import scripted

    with scripted.serve() as server:
        yield server.url


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB in memory, where we may mount one; tests change its size with `mount -o remount`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")  # for longer, its event loop would disturb other tests
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Debian's chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
