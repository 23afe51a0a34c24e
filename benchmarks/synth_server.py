"""Compare `synth generate` with `vllm bench serve`, alternating with equal prompts, lengths, concurrency and server.

    python benchmarks/synth_server.py --run runs/tiny-dflash [--rows 512] [--concurrency 32] [--rounds 3]

Prints generated tokens/s of both and their ratio. Needs the tiny recipe's target and prompts (`make demo`). Decoding is
greedy, so both generate the same tokens. The first round warms the server's prefix cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from recipe.load import load_recipe
from serve.command import MODEL_NAME, build_command
from serve.server import find_port, run_server
from target.target import Target

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/Tiny-DFlash/recipe.yaml"
MAX_TOKENS = 128


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
                peer, peer_tokens = run_vllm_bench(work, server.url, target, args.rows, args.concurrency)
                ours, our_tokens = run_synth(work, number, server.url, target, args.concurrency)
                assert abs(our_tokens - peer_tokens) <= 0.01 * peer_tokens, (our_tokens, peer_tokens)
                label = f"round {number}" if number else "warm-up"
                print(
                    f"{label}: synth generate {ours:.0f} tokens/s ({our_tokens} tokens), "
                    f"vllm bench serve {peer:.0f} ({peer_tokens}): {ours / peer:.2f}",
                    flush=True,
                )
                if number:
                    ratios.append(ours / peer)
    print(f"ratio {sorted(ratios)[len(ratios) // 2]:.2f} (median of {args.rounds}; limit 0.95)")


def write_prompts(source: Path, work: Path, num_rows: int) -> None:
    """Write `num_rows` different questions of the run to work/prompts.jsonl, which both sides read."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    questions = sorted({row["messages"][-1]["content"]: None for row in rows})[:num_rows]
    assert len(questions) == num_rows, f"{source} has {len(questions)} different questions, fewer than --rows"
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))


def run_vllm_bench(work: Path, url: str, target: Path, num_rows: int, concurrency: int) -> tuple[float, int]:
    """Run `vllm bench serve`; return generated tokens/s and the number of tokens."""
    command = [sys.executable, "-m", "serve.vllm_main", "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", url, "--endpoint", "/v1/chat/completions", "--model", MODEL_NAME]
    command += ["--tokenizer", str(target), "--dataset-name", "custom", "--dataset-path", str(work / "prompts.jsonl")]
    command += ["--skip-chat-template", "--disable-shuffle", "--num-prompts", str(num_rows), "--temperature", "0"]
    command += ["--custom-output-len", str(MAX_TOKENS), "--max-concurrency", str(concurrency), "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(work), "--result-filename", "bench.json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((work / "bench.json").read_text())
    assert found["completed"] == num_rows, found
    return found["output_throughput"], found["total_output_tokens"]


def run_synth(work: Path, number: int, url: str, target: Path, concurrency: int) -> tuple[float, int]:
    """Run `synth generate`; return generated tokens/s and the number of tokens."""
    output = work / f"synth-{number}"
    command = [str(Path(sys.executable).with_name("synth")), "generate", "-r", str(RECIPE), "--thinking-modes", ""]
    command += ["--set", f"target.path={target}", "--set", f"synth.max_tokens={MAX_TOKENS}", "--endpoint", f"{url}/v1"]
    command += ["--prompts", str(work / "prompts.jsonl"), "--output", str(output), "--concurrency", str(concurrency)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    return last["tokens"] / last["seconds"], last["tokens"]


if __name__ == "__main__":
    main()
