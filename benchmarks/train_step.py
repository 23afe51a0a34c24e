"""Compare a training step with speculators' on the same work: forward, backward, clipping, AdamW; fp32, CPU.

    python -m venv peer && peer/bin/pip install torch==2.13.0 speculators==0.9.0 pydantic pyyaml
    peer/bin/python benchmarks/train_step.py [--seq 2048 --anchors 256 [--vocab 65536]]
    peer/bin/python benchmarks/train_step.py --method dspark [--seq 2048 --anchors 256 [--vocab 65536]]
    peer/bin/python benchmarks/train_step.py --method eagle3 [--loss ce] [--seq 1024 --vocab 32768]
    peer/bin/python benchmarks/train_step.py --method peagle [--seq 1024 --vocab 32768]

Prints the ratio of steps/s (both sides alternate in one process), the first losses, the largest difference of gradients
(DFlash: on the same anchors), the ratio of peak memory (each side in its own process; once of all it holds, once of
what its steps add to libraries, weights and inputs), and the limit: the matrix products of our step alone. Both sides
start from the same random weights and compute labels, the target's greedy tokens or its distribution, from its final
states.

Other programs can time our DFlash step with `build(ctx)` and `NAME`: ctx has dims, batch, state, layer_config,
mask_token_id.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# Spinning threads would take cores from the working ones. torch reads these variables when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import train_step_dflash, train_step_dspark, train_step_eagle3, train_step_peagle  # noqa: E402

NAME = "draftline"
MAX_DISTANCE = 1e-4
"""Largest relative difference of losses and gradients at which both sides count as doing the same work."""
METHODS: dict[str, ModuleType] = {
    "dflash": train_step_dflash, "dspark": train_step_dspark, "eagle3": train_step_eagle3, "peagle": train_step_peagle,
}  # fmt: skip
Step = Callable[[], float]


def build(ctx: dict[str, Any], method: ModuleType = train_step_dflash) -> Step:
    """Return our step on `ctx["batch"]`, from `ctx["state"]`, as our trainer runs it."""
    from train.optimizer import AdamW

    model, compute_loss = method.build_ours(ctx)
    optimizer = AdamW(list_trained(model), lr=ctx["dims"].lr, weight_decay=0.01, fused=True)

    def compute() -> torch.Tensor:
        optimizer.zero_grad()
        return compute_loss()

    return make_step(model, optimizer, compute)


def build_peer(ctx: dict[str, Any], model: Any, method: ModuleType) -> Step:
    """Return speculators' step, as its trainer runs it."""
    compute_loss = method.build_peer(ctx, model)
    optimizer = torch.optim.AdamW(list_trained(model), lr=ctx["dims"].lr, weight_decay=0.01)

    def compute() -> torch.Tensor:
        loss = compute_loss()
        optimizer.zero_grad()
        return loss

    return make_step(model, optimizer, compute)


def list_trained(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_step(model: Any, optimizer: torch.optim.Optimizer, compute: Callable[[], torch.Tensor]) -> Step:
    """Return a step that minimizes a loss of the model. `compute` also resets the gradients."""
    parameters = list_trained(model)

    def step(update: bool = True) -> float:
        loss = compute()
        loss.backward()
        if update:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return float(loss.item())

    step.model = model  # type: ignore[attr-defined]
    return step


def make_context(dims: argparse.Namespace, method: ModuleType) -> tuple[dict[str, Any], Any]:
    """Make the shared inputs, random tokens and states in one sequence, and speculators' random model."""
    torch.manual_seed(0)
    model = method.make_peer_model(dims)
    with torch.no_grad():  # the weights that it would load from the target
        model.embed_tokens.weight.normal_(0, 0.02)
        model.lm_head.weight.normal_(0, 0.02)
        model.verifier_lm_head.weight.copy_(model.lm_head.weight)
        model.verifier_norm.weight.fill_(1.0)
    model.float().train()
    context = {
        "dims": dims, "batch": make_batch(dims), "state": {k: v.clone() for k, v in model.state_dict().items()},
        "layer_config": model.config.transformer_layer_config, "mask_token_id": dims.vocab - 1,
    }  # fmt: skip
    return context, model


def make_batch(dims: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Make one packed sequence of random tokens and states, in the format of speculators' model."""
    length, hidden = dims.seq, dims.hidden
    return {
        "hidden_states": torch.randn(1, length, dims.n_aux * hidden),
        "verifier_last_hidden_states": torch.randn(1, length, hidden),
        "input_ids": torch.randint(0, dims.vocab - 1, (1, length)),
        "loss_mask": (torch.arange(length) >= dims.prompt).long()[None],
        "document_ids": torch.zeros(1, length, dtype=torch.long),
        "position_ids": torch.arange(length)[None],
    }


def make_own_context(dims: argparse.Namespace, method: ModuleType) -> dict[str, Any]:
    """Make the context of our step without importing speculators, to measure our memory alone."""
    sizes = method.list_sizes(dims)
    sizes |= {"embed_tokens.weight": (dims.vocab, dims.hidden), "lm_head.weight": (dims.vocab, dims.hidden)}
    state = {name: torch.randn(size) * 0.02 if len(size) > 1 else torch.ones(size) for name, size in sizes.items()}
    state["verifier_norm.weight"] = torch.ones(dims.hidden)
    rope = SimpleNamespace(rope_parameters={"rope_theta": 10000.0})
    return {
        "dims": dims, "batch": make_batch(dims), "state": state, "layer_config": rope, "mask_token_id": dims.vocab - 1,
        "there": False,
    }  # fmt: skip


def compare_gradients(ours: Step, peer: Step) -> tuple[float, float, float]:
    """Return the first losses of both, and the largest relative difference of a parameter's gradients."""
    losses = []
    for step in (ours, peer):
        torch.manual_seed(123)
        losses.append(step(update=False))  # type: ignore[call-arg]
    theirs = dict(peer.model.named_parameters())  # type: ignore[attr-defined]
    distances = []
    for name, parameter in ours.model.named_parameters():  # type: ignore[attr-defined]
        expected = theirs[name.replace("midlayer.", "layers.0.")].grad  # the name of EAGLE3's only layer
        distances.append(float((parameter.grad - expected).norm() / expected.norm()))
    return losses[0], losses[1], max(distances)


def time_turns(steps: dict[str, Step], rounds: int, per_round: int) -> dict[str, list[float]]:
    """Return the seconds of each step; the sides alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first round only warms up
        for name, step in steps.items():
            for _ in range(per_round):
                started = time.perf_counter()
                step()
                if number:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def time_products(shapes: list[tuple[int, int, int, int]]) -> float:
    """Return the seconds of some matrix products, each given as (rows, in, out, times)."""
    total = 0.0
    for rows, inner, outer, times in shapes:
        a, b = torch.randn(rows, inner), torch.randn(inner, outer)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - started)
        total += times * best
    return total


def find_peak(dims: argparse.Namespace, method: ModuleType) -> tuple[float, float]:
    """Return the peak memory of one side over three steps in MiB, and what was there before them.

    What its construction took at its peak does not count.
    """
    if dims.side == "ours":
        context = make_own_context(dims, method)
        step = build(context, method)
        context["state"].clear()  # the model has its own copy
    else:
        context, model = make_context(dims, method)
        del context["state"]
        step = build_peer(context, model, method)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    before = read_peak()
    for _ in range(3):
        step()
    return read_peak(), before


def read_peak() -> float:
    """Return this process's peak memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage includes the parent's peak
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure_memory() -> dict[str, tuple[float, float]]:
    """Return the results of `find_peak` of each side, each in its own process."""
    peaks = {}
    for side in ("ours", "peer"):
        command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(output.splitlines()[-1])
        peaks[side] = (float(found["peak_mib"]), float(found["before_mib"]))
    return peaks


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 256, "inter": 768, "heads": 8, "kv-heads": 4, "head-dim": 32, "vocab": 4096, "draft-layers": 2,
        "n-aux": 3, "seq": 512, "prompt": 64, "block": 8, "anchors": 64, "ttt-length": 7, "threads": 2, "rounds": 5,
        "steps": 6,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gamma", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--method", choices=METHODS, default="dflash")
    parser.add_argument("--loss", choices=("ce", "kl_div"), default="kl_div", help="EAGLE3's loss")
    parser.add_argument("--peer-attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    dims = read_arguments()
    method = METHODS[dims.method]
    torch.set_num_threads(dims.threads)
    torch.set_flush_denormal(True)
    if dims.side:
        print(json.dumps(dict(zip(("peak_mib", "before_mib"), find_peak(dims, method), strict=True))))
        return
    context, model = make_context(dims, method)
    ours, peer = build(context, method), build_peer(context, model, method)
    loss, peer_loss, distance = compare_gradients(ours, peer)
    print(f"first loss {loss:.6f}, speculators {peer_loss:.6f}; gradients at most {distance:.1e} apart", flush=True)
    if abs(loss - peer_loss) > MAX_DISTANCE * peer_loss or distance > MAX_DISTANCE:
        raise SystemExit(f"the two steps do other work: expected losses and gradients within {MAX_DISTANCE:g}")
    seconds = time_turns({"ours": ours, "peer": peer}, dims.rounds, dims.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{method.describe(dims)}: {medians['peer'] / medians['ours']:.2f}x "
        f"speculators' steps/s (medians of {len(seconds['ours'])}; best against best "
        f"{min(seconds['peer']) / min(seconds['ours']):.2f}x)"
    )
    share = time_products(method.list_products(dims)) / medians["ours"]
    print(f"the bare matrix products take {share:.2f} of our step", flush=True)
    peaks = measure_memory()
    (peak, before), (peer_peak, peer_before) = peaks["ours"], peaks["peer"]
    print(f"peak memory {peak / peer_peak:.2f} of theirs ({peak:.0f}, {peer_peak:.0f} MiB)")
    added, peer_added = peak - before, peer_peak - peer_before
    print(f"added by the steps {added / peer_added:.2f} of theirs ({added:.0f}, {peer_added:.0f} MiB)")


if __name__ == "__main__":
    main()
