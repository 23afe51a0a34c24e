"""Check and measure training on a GPU with one command. Needs no vLLM and no network.

    python benchmarks/gpu/check.py --output runs/gpu-check              # on a GPU: under 8 minutes on one H100
    python benchmarks/gpu/check.py --device cpu --small --output DIR    # a dry run of the same code

Needs torch, transformers, safetensors, pydantic, PyYAML, typer and tqdm. Each check prints a line and goes on if it
fails; the exit code is 1 if one failed.

losses      `train offline` of DFlash and EAGLE3 on the device and on the CPU: the recorded losses agree
gradients   one step's gradients on the device against those on the CPU
resume      a run that lost its last checkpoint ends with the same losses
processes   DDP and FSDP2 on two GPUs follow the loss of one (where there are two)
reading     seconds to read a batch against seconds of a step
step        a DFlash step at MiniMax-M3's dimensions: tokens/s, MFU, peak memory, recompilations after the warm-up
evaluation  drafting after every token of a 6,144-token reply at a vocabulary of 200,064: peak memory

Writes: OUTPUT/gpu-check.json, with the device's name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from benchmarks.gpu.inputs import LARGE, SMALL, write_recipe, write_store, write_target  # noqa: E402
from contracts.store import Store, StoredSample  # noqa: E402
from drafts import METHODS  # noqa: E402
from drafts.batch import Batch  # noqa: E402
from drafts.draft import Draft, init_weights  # noqa: E402
from drafts.moving import to_device  # noqa: E402
from recipe.hardware import NODES  # noqa: E402
from recipe.load import load_recipe  # noqa: E402
from target.head import TargetHead, read_head  # noqa: E402
from target.target import Target  # noqa: E402
from train import footprint  # noqa: E402
from train.data import Samples, open_states  # noqa: E402
from train.draft import make_config  # noqa: E402
from train.processes import Processes  # noqa: E402

TOLERANCE = {"cpu": 1e-6, "cuda": 2e-2}
"""Relative difference of losses that rounding explains: bf16 products on GPUs."""
GRADIENT_TOLERANCE = {"cpu": 1e-5, "cuda": 5e-2}
M3 = {
    "hidden_size": 6144, "vocab_size": 200_064, "num_target_layers": 60, "layer_ids": [1, 15, 29, 43, 57],
    "mask_token_id": 200_061, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "max_position_embeddings": 8192, "yarn": None,
    "target_fingerprint": "", "store": "",
}  # fmt: skip
M3_DRAFT = {
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "num_layers": 5,
    "num_anchors": 512, "block_size": 8,
}  # fmt: skip
SMALL_DRAFT = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}


@dataclass(frozen=True)
class Work:
    """The folder, the device, and the sizes of this run."""

    folder: Path
    device: torch.device
    small: bool

    @property
    def target(self) -> Target:
        return Target.read(self.folder / "target")

    @property
    def processes(self) -> Processes:
        return Processes(0, 1, self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def recipe(self, method: str) -> Path:
        return self.folder / f"{method}.yaml"

    def peak_gib(self) -> float:
        """Peak memory of the device since the last reset, in GiB; 0 on CPUs."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0


def prepare(work: Work) -> dict[str, Any]:
    sizes = SMALL if work.small else LARGE
    target = write_target(work.folder / "target", sizes)
    write_store(work.folder / "store", target, sizes)
    for method in METHODS:
        write_recipe(work.recipe(method), target, sizes, method)
    return {"samples": sizes.samples, "tokens of a sample": sizes.tokens, "hidden size": sizes.hidden}


def train(work: Work, method: str, output: str, *, device: str, launcher: tuple[str, ...] = ()) -> list[float]:
    """Run `train offline` and return the recorded losses."""
    folder = work.folder / output
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }
    command = [sys.executable, *(launcher or ()), "-m", "train.cli", "offline", "-r", str(work.recipe(method))]
    command += ["--store", str(work.folder / "store"), "--output", str(folder)]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-1500:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_losses(work: Work) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for method in METHODS:
        ours = train(work, method, f"{method}-device", device=work.device.type)
        reference = train(work, method, f"{method}-cpu", device="cpu")
        apart = max(abs(a - b) / b for a, b in zip(ours, reference, strict=True))
        figures[method] = {"losses": ours, "largest relative difference": apart}
        assert apart <= TOLERANCE[work.device.type], figures
    return figures


def check_gradients(work: Work) -> dict[str, Any]:
    return {method: _compare_gradients(work, method) for method in METHODS}


def _compare_gradients(work: Work, method: str) -> float:
    """Return the largest relative distance between a parameter's gradients on the device and on the CPU."""
    recipe = load_recipe(work.recipe(method))
    store, manifest = open_states(recipe, work.folder / "store", work.target)
    samples = Samples(store, recipe.training(), recipe.target.max_model_len)
    config = make_config(recipe, work.target, manifest)
    found = []
    for device in (torch.device("cpu"), work.device):
        draft = METHODS[method].build(config, recipe.training().draft)
        init_weights(draft, 0)
        draft.to(device).train()
        batch = samples.batch(0)
        batch, plan = to_device((batch, draft.plan(batch)), device)
        with Processes(0, 1, device).autocast():
            result = draft(batch, plan, read_head(work.target).to(device))
        result.loss_sum.backward()
        found.append({name: p.grad.float().cpu() for name, p in draft.named_parameters() if p.grad is not None})
    apart = max(float((found[1][name] - grad).norm() / grad.norm()) for name, grad in found[0].items())
    assert apart <= GRADIENT_TOLERANCE[work.device.type], apart
    return apart


def check_resume(work: Work) -> dict[str, Any]:
    method = next(iter(METHODS))
    whole, folder = work.folder / f"{method}-device", work.folder / "resumed"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "step-000020")
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "complete": False}))
    again = train(work, method, "resumed", device=work.device.type)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    apart = max(abs(a - line["loss"]) / line["loss"] for a, line in zip(again, lines, strict=True))
    assert apart <= TOLERANCE[work.device.type], (again, lines)
    return {"largest relative difference": apart}


def check_processes(work: Work) -> dict[str, Any]:
    if not work.on_gpu or torch.cuda.device_count() < 2:
        return {"skipped": "fewer than two GPUs"}
    method, figures = next(iter(METHODS)), {}
    one = json.loads((work.folder / f"{method}-device/metrics.jsonl").read_text().splitlines()[-1])["loss"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for parallel in ("ddp", "fsdp2"):
        recipe = work.recipe(method)
        recipe.write_text(recipe.read_text() + f"  parallel: {parallel}\n")
        figures[parallel] = train(work, method, parallel, device="cuda", launcher=launcher)[-1]
        assert abs(figures[parallel] - one) / one <= TOLERANCE["cuda"], (figures, one)
    return figures


def check_reading(work: Work) -> dict[str, Any]:
    recipe = load_recipe(work.recipe(next(iter(METHODS))))
    store = Store(work.folder / "store")
    samples = Samples(store, recipe.training(), recipe.target.max_model_len, cache_bytes=0, on_gpu=work.on_gpu)
    started, num_bytes = time.perf_counter(), 0
    for number in range(8):
        batch = samples.batch(number)
        num_bytes += batch.aux_hidden_states.nbytes + batch.hidden_states.nbytes
    seconds = time.perf_counter() - started
    return {"seconds of a batch": round(seconds / 8, 4), "GB/s": round(num_bytes / seconds / 1e9, 2)}


def check_step(work: Work) -> dict[str, Any]:
    """Time a step at MiniMax-M3's dimensions, in batches of three lengths."""
    lengths = [96, 80, 88] if work.small else [8192, 7168, 8000]
    draft, head = _make_draft(work)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4, fused=True)
    if work.on_gpu:
        draft.compile_layers()
        torch.cuda.reset_peak_memory_stats()

    def step(length: int, seed: int) -> None:
        batch = _make_batch(draft.config.hidden_size, draft.config.vocab_size, length, seed)
        batch, plan = to_device((batch, draft.plan(batch)), work.device)
        with work.processes.autocast():
            result = draft(batch, plan, head)
        (result.loss_sum / plan.num_slots).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for number, length in enumerate(lengths):
        step(length, number)
    graphs = _num_graphs()
    num_steps = 2 if work.small else 8
    _wait(work)
    started = time.perf_counter()
    for number in range(num_steps):
        step(lengths[0], 10 + number)
    _wait(work)
    seconds = (time.perf_counter() - started) / num_steps
    for number, length in enumerate(lengths):
        step(length, 30 + number)
    figures = {
        "seconds": round(seconds, 4),
        "tokens/s": round(lengths[0] / seconds),
        "peak GiB": round(work.peak_gib(), 2),
        "recompilations": _num_graphs() - graphs,
    }
    planned = footprint.measure_step(_work_of_step(work, lengths[0])).peak()
    figures["planned GiB"] = round(sum(planned.values()) / 2**30, 2)
    name = torch.cuda.get_device_name().lower() if work.on_gpu else ""
    if node := next((node for part, node in NODES.items() if part in name), None):
        flops = footprint.count_flops(_work_of_step(work, lengths[0]))
        figures["MFU"] = round(flops / seconds / (node.gpu_tflops * 1e12), 3)
    assert figures["recompilations"] == 0, figures
    assert not work.on_gpu or abs(figures["planned GiB"] / figures["peak GiB"] - 1) < 0.1, figures
    return figures


def _work_of_step(work: Work, length: int) -> footprint.Work:
    """Return what `train plan` would compute for the step."""
    values, shared = _draft_values(work)
    section = METHODS["dflash"].section.model_validate(values)
    masks = [torch.arange(length) >= length // 8]
    config = METHODS["dflash"].make_config(section, shared)
    return footprint.Work(config, section, masks, work.on_gpu, tied=True)


def _draft_values(work: Work) -> tuple[dict[str, Any], dict[str, Any]]:
    values = {"method": "dflash", **(SMALL_DRAFT if work.small else M3_DRAFT)}
    return values, {**M3, **({"hidden_size": 64, "vocab_size": 320, "mask_token_id": 319} if work.small else {})}


def check_evaluation(work: Work) -> dict[str, Any]:
    """Draft after every token of a long reply: the memory must not grow with its length."""
    tokens = 96 if work.small else 6144
    draft, head = _make_draft(work)
    draft.eval()
    batch = _make_batch(draft.config.hidden_size, draft.config.vocab_size, tokens, 0)
    sample = StoredSample(
        batch.token_ids.int(), batch.loss_mask, batch.hidden_states, batch.aux_hidden_states, {"temperature": "0.0"}
    )
    if work.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before, started = work.peak_gib(), time.perf_counter()
    with work.processes.autocast():
        drafted = draft.draft(sample, head).tokens
    _wait(work)
    figures = {"seconds": round(time.perf_counter() - started, 3), "GiB": round(work.peak_gib() - before, 2)}
    assert drafted.shape == (tokens, 7)
    assert figures["GiB"] < 16, figures
    return figures


def _make_draft(work: Work) -> tuple[Draft, TargetHead]:
    values, shared = _draft_values(work)
    section = METHODS["dflash"].section.model_validate(values)
    with work.device:
        draft = METHODS["dflash"].build(METHODS["dflash"].make_config(section, shared), section)
        rows = torch.empty(shared["vocab_size"], shared["hidden_size"]).normal_(0, 0.02)
        norm = torch.ones(shared["hidden_size"])
    return draft.train(), TargetHead(rows, rows, norm, "gemma", 1e-6).to(work.device)


def _make_batch(hidden: int, vocabulary: int, length: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        token_ids=torch.randint(0, vocabulary - 8, (length,), generator=generator),
        loss_mask=torch.arange(length) >= length // 8,
        aux_hidden_states=torch.zeros(length, 5 * hidden, dtype=torch.bfloat16).normal_(generator=generator),
        hidden_states=torch.zeros(length, hidden, dtype=torch.bfloat16),
        lengths=[length],
        sample_ids=["random"],
        seeds=[seed],
    )


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _wait(work: Work) -> None:
    if work.on_gpu:
        torch.cuda.synchronize()


CHECKS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "inputs": prepare,
    "losses": check_losses,
    "gradients": check_gradients,
    "resume": check_resume,
    "reading": check_reading,
    "step": check_step,
    "evaluation": check_evaluation,
    "processes": check_processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small dimensions, for a dry run")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --device cpu --small makes a dry run")
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    work = Work(args.output.resolve(), torch.device(args.device), args.small)
    name = torch.cuda.get_device_name() if work.on_gpu else "CPU"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "checks": {}, "failed": []}
    print(f"{name}, torch {torch.__version__}")
    for check, run in CHECKS.items():
        started = time.perf_counter()
        try:
            figures, verdict = run(work), "ok"
        except Exception as error:  # the other checks go on
            figures, verdict = {"error": f"{type(error).__name__}: {error}"[:2000]}, "FAILED"
            report["failed"].append(check)
        report["checks"][check] = figures
        print(
            f"{check:<12}{verdict:<8}{time.perf_counter() - started:>7.1f} s  {json.dumps(figures)[:300]}", flush=True
        )
    (args.output / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
    if report["failed"]:
        raise SystemExit(f"failed first: {report['failed'][0]}; all figures in {args.output / 'gpu-check.json'}")


if __name__ == "__main__":
    main()
