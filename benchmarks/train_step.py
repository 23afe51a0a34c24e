"""Compare a DFlash training step with speculators' on the same work: forward, backward, clipping, AdamW; fp32, CPU.

    python -m venv peer && peer/bin/pip install torch==2.13.0 speculators==0.9.0 pydantic pyyaml
    peer/bin/python benchmarks/train_step.py [--seq 2048 --anchors 256 [--vocab 65536]]

Prints the ratio of steps/s (both sides alternate in one process), the first losses, the largest difference of gradients
on the same anchors, the ratio of peak memory (each side in its own process), and the limit: the matrix products of our
step alone. Both sides start from the same random weights and compute labels, the target's greedy tokens, from its final
states.

Other programs can time our step with `build(ctx)` and `NAME`: ctx has dims, batch, state, layer_config, mask_token_id.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

# Spinning threads would take cores from the working ones. torch reads these variables when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

NAME = "draftline"
MAX_DISTANCE = 1e-4
"""Largest relative difference of losses and gradients at which both sides count as doing the same work."""
Step = Callable[[], float]


def build(ctx: dict[str, Any]) -> Step:
    """Return our step on `ctx["batch"]`, from `ctx["state"]`. Draws speculators' anchors unless `there` is false."""
    from drafts.batch import Batch
    from drafts.dflash.config import DFlashConfig, DFlashSection
    from drafts.dflash.model import DFlash
    from drafts.objective import teacher_argmax
    from target.head import TargetHead

    there = ctx.get("there", True)
    if there:
        from speculators.models.dflash.utils import select_anchors
    dims, state, batch = ctx["dims"], ctx["state"], ctx["batch"]
    config = DFlashConfig(
        hidden_size=dims.hidden, vocab_size=dims.vocab, num_target_layers=16, layer_ids=list(range(dims.n_aux)),
        block_size=dims.block, mask_token_id=ctx["mask_token_id"], num_layers=dims.draft_layers,
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, head_dim=dims.head_dim,
        intermediate_size=dims.inter, rms_norm_eps=1e-6, max_position_embeddings=4096, yarn=None,
        rope_theta=ctx["layer_config"].rope_parameters["rope_theta"], target_fingerprint="", store="",
    )  # fmt: skip
    section = DFlashSection(
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, intermediate_size=dims.inter,
        slot_weights="decay", loss_decay=dims.gamma, num_anchors=dims.anchors,  # as build_peer sets it
    )  # fmt: skip
    model = DFlash(config, section)
    model.load_state_dict({name: state[name] for name, _ in model.named_parameters()})
    head = TargetHead(
        state["embed_tokens.weight"], state["lm_head.weight"], state["verifier_norm.weight"], "rms", config.rms_norm_eps
    )
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=dims.lr, weight_decay=0.01, fused=True)
    token_ids, mask = batch["input_ids"][0], batch["loss_mask"][0].bool()
    packed = Batch(
        token_ids, mask, batch["hidden_states"][0].float(), batch["verifier_last_hidden_states"][0].float(),
        [len(token_ids)], [""], [0],
    )  # fmt: skip

    def step(update: bool = True) -> float:
        if there:
            anchors, valid = select_anchors(batch["loss_mask"], dims.anchors, dims.block)
            anchors = anchors.flatten()[valid.flatten()].sort().values
        else:
            anchors = torch.randperm(dims.seq - dims.prompt - dims.block)[: dims.anchors].sort().values + dims.prompt
        blocks = model.lay_out(token_ids, mask, [len(token_ids)], [anchors])
        places = anchors[:, None] + torch.arange(dims.block - 1)
        labels = teacher_argmax(head, packed.hidden_states, places.flatten()).view(places.shape)
        found = model(packed, replace(blocks, labels=labels), head)
        loss = found.loss_sum / (found.num_slots + 1e-5)
        optimizer.zero_grad()
        loss.backward()
        if update:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return float(loss.item())

    step.model = model  # type: ignore[attr-defined]
    return step


def build_peer(ctx: dict[str, Any], model: Any) -> Step:
    """Return speculators' step, as its trainer runs it."""
    from speculators.losses import resolve_loss_config

    dims = ctx["dims"]
    call = {
        "loss_config": resolve_loss_config("ce", "eager"), "gamma": dims.gamma, "max_anchors": dims.anchors,
        "per_position_loss_weight": "fixed-exp-decay",
    }  # fmt: skip
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=dims.lr, weight_decay=0.01)

    def step(update: bool = True) -> float:
        _, loss, _ = model(**ctx["batch"], **call)
        optimizer.zero_grad()
        loss.backward()
        if update:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return float(loss.item())

    step.model = model  # type: ignore[attr-defined]
    return step


def make_context(dims: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Make the shared inputs, random tokens and states in one sequence, and speculators' random model."""
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

    torch.manual_seed(0)
    layer_config = Qwen3Config(
        vocab_size=dims.vocab, hidden_size=dims.hidden, intermediate_size=dims.inter,
        num_hidden_layers=dims.draft_layers, num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads,
        head_dim=dims.head_dim, max_position_embeddings=4096, tie_word_embeddings=False, use_sliding_window=False,
        layer_types=["full_attention"] * dims.draft_layers,
    )  # fmt: skip
    layer_config._attn_implementation = "sdpa"
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layer_config, draft_vocab_size=dims.vocab, block_size=dims.block,
        aux_hidden_state_layer_ids=list(range(2, 2 + dims.n_aux)), mask_token_id=dims.vocab - 1,
    )  # fmt: skip
    model = DFlashDraftModel(config)
    with torch.no_grad():  # the weights that it would load from the target
        model.embed_tokens.weight.normal_(0, 0.02)
        model.lm_head.weight.normal_(0, 0.02)
        model.verifier_lm_head.weight.copy_(model.lm_head.weight)
        model.verifier_norm.weight.fill_(1.0)
    model.float().train()
    context = {
        "dims": dims, "batch": make_batch(dims), "state": {k: v.clone() for k, v in model.state_dict().items()},
        "layer_config": layer_config, "mask_token_id": dims.vocab - 1, "dtype": torch.float32,
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


def make_own_context(dims: argparse.Namespace) -> dict[str, Any]:
    """Make the context of our step without importing speculators, to measure our memory alone."""
    from types import SimpleNamespace

    hidden, queries, pairs = dims.hidden, dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    sizes = {"fc.weight": (hidden, dims.n_aux * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for layer in range(dims.draft_layers):
        parts = {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (pairs, hidden),
            "self_attn.v_proj": (pairs, hidden), "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (dims.head_dim,), "self_attn.k_norm": (dims.head_dim,),
            "mlp.gate_proj": (dims.inter, hidden), "mlp.up_proj": (dims.inter, hidden),
            "mlp.down_proj": (hidden, dims.inter), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        sizes |= {f"layers.{layer}.{name}.weight": size for name, size in parts.items()}
    sizes |= {"embed_tokens.weight": (dims.vocab, hidden), "lm_head.weight": (dims.vocab, hidden)}
    state = {name: torch.randn(size) * 0.02 if len(size) > 1 else torch.ones(size) for name, size in sizes.items()}
    state["verifier_norm.weight"] = torch.ones(hidden)
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
    distances = [
        float((parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm())
        for name, parameter in ours.model.named_parameters()  # type: ignore[attr-defined]
    ]
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


def time_products(dims: argparse.Namespace) -> float:
    """Return the seconds of a step's matrix products alone, forward and backward, blocks with their prefix."""
    queries, slots, hidden = dims.anchors * dims.block, dims.anchors * (dims.block - 1), dims.hidden
    q_size, kv_size = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    shapes = [(dims.seq, dims.n_aux * hidden, hidden, 2)]  # rows, in, out, times; fc has no gradient of its input
    for layer in range(dims.draft_layers):
        asked = slots if layer == dims.draft_layers - 1 else queries
        shapes += [(queries, hidden, kv_size, 6), (dims.seq, hidden, kv_size, 6), (asked, hidden, q_size, 3)]
        shapes += [(asked, q_size, hidden, 3), (asked, hidden, dims.inter, 9)]
        prefix = (dims.seq + dims.prompt) // 2 + dims.block
        shapes += [(asked, dims.head_dim, prefix, 5 * dims.heads)]
    shapes += [(slots, hidden, dims.vocab, 2), (min(slots, dims.seq - dims.prompt), hidden, dims.vocab, 1)]
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


def find_peak(dims: argparse.Namespace) -> float:
    """Return the peak memory of three steps of one side in MiB, not counting its construction."""
    if dims.side == "ours":
        step = build(make_own_context(dims))
    else:
        context, model = make_context(dims)
        del context["state"]
        step = build_peer(context, model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage includes the parent's peak
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure_memory() -> dict[str, float]:
    """Return the peak memory in MiB of three steps of each side, each in its own process."""
    peaks = {}
    for side in ("ours", "peer"):
        command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[side] = float(json.loads(output.splitlines()[-1])["peak_mib"])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 256, "inter": 768, "heads": 8, "kv-heads": 4, "head-dim": 32, "vocab": 4096, "draft-layers": 2,
        "n-aux": 3, "seq": 512, "prompt": 64, "block": 8, "anchors": 64, "threads": 2, "rounds": 5, "steps": 6,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gamma", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    dims = parser.parse_args()
    torch.set_num_threads(dims.threads)
    torch.set_flush_denormal(True)
    if dims.side:
        print(json.dumps({"peak_mib": find_peak(dims)}))
        return
    context, model = make_context(dims)
    ours, peer = build(context), build_peer(context, model)
    loss, peer_loss, distance = compare_gradients(ours, peer)
    print(f"first loss {loss:.6f}, speculators {peer_loss:.6f}; gradients at most {distance:.1e} apart", flush=True)
    if abs(loss - peer_loss) > MAX_DISTANCE * peer_loss or distance > MAX_DISTANCE:
        raise SystemExit(f"the two steps do other work: expected losses and gradients within {MAX_DISTANCE:g}")
    seconds = time_turns({"ours": ours, "peer": peer}, dims.rounds, dims.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"seq {dims.seq}, {dims.anchors} anchors, vocabulary {dims.vocab}: {medians['peer'] / medians['ours']:.2f}x "
        f"speculators' steps/s (medians of {len(seconds['ours'])}; best against best "
        f"{min(seconds['peer']) / min(seconds['ours']):.2f}x)"
    )
    print(f"the bare matrix products take {time_products(dims) / medians['ours']:.2f} of our step", flush=True)
    peaks = measure_memory()
    print(f"peak memory {peaks['ours'] / peaks['peer']:.2f} of theirs ({peaks['ours']:.0f}, {peaks['peer']:.0f} MiB)")


if __name__ == "__main__":
    main()
