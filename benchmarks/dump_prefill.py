"""Compare `dump run` with plain prefill in the same vLLM: the cost of extraction, checks and a durable store.

    python benchmarks/dump_prefill.py [--target FOLDER] [--rounds 5] [--profile | --memory]

Prints tokens/s of both and their ratio, for 200 prompts of 256 tokens and 64 of 1024. The two engines run in separate
processes and alternate. Plain prefill: `max_tokens=1`, no extraction, nothing written. Exits with an error if a side
does not prefill every token of every prompt.

The default target is random: 12 layers, hidden size 384, 21M parameters without its embedding. The ratio depends on the
floating-point operations per captured byte: about 5,400 here, 1,500 for the tiny recipe's target (the worst case),
600,000 for MiniMax-M3.

With --memory: compares the peak memory of `dump run`'s processes for 2000 samples with that for 200.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contracts.store import Store

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/Tiny-DFlash/recipe.yaml"
SHAPES = ((200, 256), (64, 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="default: a random one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where the dump's main thread spends its time")
    parser.add_argument("--memory", action="store_true", help="compare peak memory at 1x and 10x samples instead")
    parser.add_argument("--side", choices=("dump", "prefill"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve_rounds(args.side, args.target, args.profile)
        return
    with tempfile.TemporaryDirectory() as folder:
        target = make_random_target(Path(folder)) if args.target is None else lengthen(args.target, Path(folder))
        if args.memory:
            compare_memory(target)
            return
        sides = {side: start_side(side, target, args.profile) for side in ("dump", "prefill")}
        compare(sides, args.rounds)


def make_random_target(folder: Path) -> Path:
    """Write a Qwen3 with random weights to `folder`; return the folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=384, num_hidden_layers=12, intermediate_size=1152, num_attention_heads=6, num_key_value_heads=2,
        head_dim=64, vocab_size=4096, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def lengthen(target: Path, folder: Path) -> Path:
    """Link the target into `folder` with positions for over 1024 tokens; its weights do not limit them."""
    for file in target.absolute().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((target / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compare(sides: dict[str, subprocess.Popen[str]], rounds: int) -> None:
    """Alternate the sides and print their ratios."""
    for count, length in SHAPES:
        ratios = []
        for number in range(rounds + 1):  # the first only warms up
            rates = {side: ask(side, process, count, length, number) for side, process in sides.items()}
            if number:
                ratios.append(rates["dump"] / rates["prefill"])
                print(
                    f"{count} x {length}: dump {rates['dump']:.0f} tokens/s, prefill {rates['prefill']:.0f}: "
                    f"{ratios[-1]:.3f}",
                    flush=True,
                )
        print(f"{count} x {length}: ratio {sorted(ratios)[len(ratios) // 2]:.3f} (median of {rounds}; limit 0.95)")
    for process in sides.values():
        process.communicate("\n")


def compare_memory(target: Path) -> None:
    """Print the peak memory of all processes of a dump, for two sizes in separate processes."""
    peaks = []
    for count in (200, 2000):
        process = start_side("dump", target, False)
        ask("dump", process, count, 256, 0)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        peaks.append(sum(read_peak(pid) for pid in (str(process.pid), *children)))
        print(f"{count} samples of 256 tokens: {peaks[-1] / 2**20:.0f} MiB at its peak, writers included", flush=True)
        process.communicate("\n")
    print(f"peak memory at 10x the samples: {peaks[1] / peaks[0]:.3f} of that at 1x")


def read_peak(pid: str) -> int:
    """Return a process's peak resident size in bytes (proc(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def start_side(side: str, target: Path, profile: bool) -> subprocess.Popen[str]:
    """Start one side's process and wait until its engine is loaded."""
    command = [sys.executable, str(Path(__file__)), "--side", side, "--target", str(target)]
    command += ["--profile"] if profile else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        if process.poll() is not None:
            raise SystemExit(f"the {side} side ended with exit code {process.returncode} before its engine was loaded")
    return process


def ask(side: str, process: subprocess.Popen[str], count: int, length: int, seed: int) -> float:
    """Run one round; return its tokens/s. Exits if the side ends, or does not prefill every token of every prompt."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([count, length, seed]) + "\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("result "):
        if process.poll() is not None:
            raise SystemExit(f"the {side} side ended with exit code {process.returncode} in a round")
    seconds, samples, tokens = json.loads(line.removeprefix("result "))
    if (samples, tokens) != (count, count * length):
        raise SystemExit(
            f"the {side} side did other work: found {tokens} tokens of {samples} samples, expected {count * length} "
            f"of {count}"
        )
    return tokens / float(seconds)


def serve_rounds(side: str, target_folder: Path, profile: bool) -> None:
    """Load one side's engine and answer rounds until standard input ends."""
    from contracts.store import Store
    from dump.capture import Staging
    from recipe.load import load_recipe
    from serve.engine import engine_env
    from target.layers import captured_layers
    from target.target import Target

    changes = [f"target.path={target_folder}", "target.max_model_len=1026", "serve.args.skip-tokenizer-init=true"]
    recipe = load_recipe(RECIPE, changes)
    target = Target.read(target_folder)
    work = Path(tempfile.mkdtemp(prefix="dump-benchmark-"))
    stack = ExitStack()
    if side == "dump":
        from dump.backends import make_backend
        from dump.fill import Filler
        from dump.writer import StoreJob, open_writers

        memory = Path("/dev/shm")  # noqa: S108 (the choice of `dump run`)
        staging = Staging(Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else work)), 8 << 30)
        layer_ids = captured_layers(recipe.target, target)
        backend = make_backend(recipe, target, layer_ids, staging)
        job = StoreJob(Store(work / "store"), recipe.dump.dtype, len(layer_ids), target.hidden_size)
        writers = stack.enter_context(open_writers(recipe.dump.writers))
        make_filler = partial(Filler, backend, staging, writers, job)
    else:
        os.environ.update({"VLLM_LOGGING_LEVEL": "ERROR", **engine_env(recipe.serve.env)})
        from vllm import LLM, SamplingParams

        values = {key.replace("-", "_"): value for key, value in recipe.serve.args.items()}
        llm = LLM(model=str(target_folder), max_model_len=1026, enable_prefix_caching=False, **values)
        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    print("ready", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        count, length, seed = json.loads(line)
        prompts = make_prompts(count, length, seed, target.vocab_size)
        if side == "dump":
            result = time_dump(make_filler, job.store, prompts, profile)
        else:
            started = time.monotonic()
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
            seconds = time.monotonic() - started
            prefilled = [len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs]
            result = seconds, len(prefilled), sum(prefilled)
        print(f"result {json.dumps(result)}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    stack.close()
    if side == "dump":
        shutil.rmtree(staging.folder, ignore_errors=True)


def make_prompts(count: int, length: int, seed: int, vocab_size: int) -> list[list[int]]:
    rng = random.Random(f"{count}/{length}/{seed}")
    return [[rng.randrange(min(1000, vocab_size)) for _ in range(length)] for _ in range(count)]


def time_dump(make_filler: Any, store: Store, prompts: list[list[int]], profile: bool) -> tuple[float, int, int]:
    """Return the seconds from the first sample to the last ledger line, and what is durable: samples and tokens."""
    from contracts.conversation import Conversation, Sample
    from dump.ledger import DumpLedger
    from dump.samples import Row

    shutil.rmtree(store.folder, ignore_errors=True)
    store.folder.mkdir()

    def rows() -> Iterator[Row]:
        for number, token_ids in enumerate(prompts):
            sample = Sample(token_ids=token_ids, loss_spans=[(1, len(token_ids))])
            conversation = Conversation(
                id=f"{number:032x}", source_id="", index=number, samples=[sample], finish_reason="stop",
                sampling={"temperature": 0.0}, target={}, template="", usage={},
            )  # fmt: skip
            yield Row(f"{conversation.id}-0", conversation, sample)

    ledger = DumpLedger(store.ledger_path)
    started = time.monotonic()
    fill = partial(make_filler(ledger).run, rows(), len(prompts))
    if profile:
        import cProfile
        import pstats

        profiler = cProfile.Profile()
        profiler.runcall(fill)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    else:
        fill()
    seconds = time.monotonic() - started
    ledger.close()
    lengths = store.lengths()
    stored = [length for sample_id, length in lengths.items() if store.sample_path(sample_id).exists()]
    return seconds, len(stored), sum(stored)


if __name__ == "__main__":
    main()
