"""Compare `synth generate` with `vllm bench serve`, alternating with equal prompts, lengths, concurrency and server.

    python benchmarks/synth_server.py --run runs/tiny-dflash [--rows 512] [--concurrency 32] [--rounds 3]

Prints generated tokens/s of both and their ratio. Needs the tiny recipe's target and prompts (`make demo`). Decoding is
greedy, so both generate the same tokens; exits with an error if they do not. The first round warms the server's prefix
cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from recipe.load import load_recipe
from serve.command import MODEL_NAME, build_command
from serve.server import find_port, run_server
from target.target import Target

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/Tiny-DFlash/recipe.yaml"
MAX_TOKENS = 128
MAX_DIFFERENCE = 0.01
"""Largest relative difference of generated tokens: batches round differently, and a near tie may end a reply early."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/tiny-dflash", help="a run of the tiny recipe")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    target = args.run / "target"
    recipe = load_recipe(RECIPE, [f"target.path={target}", "serve.args.max-num-seqs=64"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_prompts(args.run / "prompts/train.jsonl", work, args.rows)
        command = build_command(recipe, Target.read(target), port=find_port("127.0.0.1", None))
        with run_server(command, log_path=work / "server.log", startup_timeout_s=600) as server:
            ratios = []
            for number in range(args.rounds + 1):
                peer, *theirs = run_vllm_bench(work, server.url, target, args.rows, args.concurrency)
                ours, *own = run_synth(work, number, server.url, target, args.concurrency)
                check_work(own, theirs, args.rows)
                label = f"round {number}" if number else "warm-up"
                print(
                    f"{label}: synth generate {ours:.0f} tokens/s ({own[1]} tokens), "
                    f"vllm bench serve {peer:.0f} ({theirs[1]}): {ours / peer:.2f}",
                    flush=True,
                )
                if number:
                    ratios.append(ours / peer)
    print(f"ratio {sorted(ratios)[len(ratios) // 2]:.2f} (median of {args.rounds}; limit 0.95)")


def check_work(ours: Sequence[int], peer: Sequence[int], num_rows: int) -> None:
    """Exit unless both sides answered all rows with the same number of tokens. `ours`, `peer`: rows and tokens."""
    if (ours[0], peer[0]) != (num_rows, num_rows):
        raise SystemExit(
            f"synth generate answered {ours[0]} rows, vllm bench serve {peer[0]}: expected {num_rows} of both"
        )
    if abs(ours[1] - peer[1]) > MAX_DIFFERENCE * peer[1]:
        raise SystemExit(
            f"synth generate generated {ours[1]} tokens, vllm bench serve {peer[1]}: expected the same number within "
            f"{MAX_DIFFERENCE:.0%}"
        )


def write_prompts(source: Path, work: Path, num_rows: int) -> None:
    """Write `num_rows` different questions of the run to work/prompts.jsonl, which both sides read."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    questions = sorted({row["messages"][-1]["content"]: None for row in rows})[:num_rows]
    if len(questions) < num_rows:
        raise SystemExit(f"{source}: found {len(questions)} different questions, expected at least --rows {num_rows}")
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))


def run_vllm_bench(work: Path, url: str, target: Path, num_rows: int, concurrency: int) -> tuple[float, int, int]:
    """Run `vllm bench serve`; return generated tokens/s and the numbers of answered rows and of tokens."""
    command = [sys.executable, "-m", "serve.vllm_main", "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", url, "--endpoint", "/v1/chat/completions", "--model", MODEL_NAME]
    command += ["--tokenizer", str(target), "--dataset-name", "custom", "--dataset-path", str(work / "prompts.jsonl")]
    command += ["--skip-chat-template", "--disable-shuffle", "--num-prompts", str(num_rows), "--temperature", "0"]
    command += ["--custom-output-len", str(MAX_TOKENS), "--max-concurrency", str(concurrency), "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(work), "--result-filename", "bench.json"]
    run_quietly(command)
    found = json.loads((work / "bench.json").read_text())
    return found["output_throughput"], found["completed"], found["total_output_tokens"]


def run_synth(work: Path, number: int, url: str, target: Path, concurrency: int) -> tuple[float, int, int]:
    """Run `synth generate`; return generated tokens/s and the numbers of answered rows and of tokens."""
    output = work / f"synth-{number}"
    command = [str(Path(sys.executable).with_name("synth")), "generate", "-r", str(RECIPE), "--thinking-modes", ""]
    command += ["--set", f"target.path={target}", "--set", f"synth.max_tokens={MAX_TOKENS}", "--endpoint", f"{url}/v1"]
    command += ["--prompts", str(work / "prompts.jsonl"), "--output", str(output), "--concurrency", str(concurrency)]
    run_quietly(command)
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    summary = json.loads((output / "run.json").read_text())["summary"]
    return last["tokens"] / last["seconds"], summary["done"] + summary["truncated"], last["tokens"]


def run_quietly(command: list[str]) -> None:
    """Run a command; exit with the end of what it printed if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with exit code {result.returncode}:\n{result.stderr[-3000:]}")


if __name__ == "__main__":
    main()
