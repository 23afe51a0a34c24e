"""Print the peak memory of a real training step on this CPU and the planned one, in bytes, as JSON.

A program of its own: the peak of a process that ran other tests would be theirs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from drafts import METHODS
from drafts.batch import Batch
from drafts.draft import init_weights
from target.head import TargetHead
from train.footprint import Work, measure_step


def run_steps(work: Work) -> int:
    """Train three steps; return the peak of memory above that before the draft was built."""
    generator, hidden = torch.Generator().manual_seed(0), work.config.hidden_size
    before = _read_status("VmRSS")
    draft = METHODS[work.config.method].build(work.config, work.section).train()
    init_weights(draft, 0)
    optimizer = torch.optim.AdamW(draft.parameters(), fused=True)
    rows = torch.randn(work.config.vocab_size, hidden, generator=generator)
    head = TargetHead(rows, rows.clone(), torch.ones(hidden), "rms", 1e-6)
    batch = Batch(
        token_ids=torch.randint(0, work.config.vocab_size - 8, (work.num_tokens,), generator=generator),
        loss_mask=torch.cat(list(work.loss_masks)),
        aux_hidden_states=torch.randn(work.num_tokens, len(work.config.layer_ids) * hidden, generator=generator),
        hidden_states=torch.randn(work.num_tokens, hidden, generator=generator),
        lengths=[len(mask) for mask in work.loss_masks],
        sample_ids=["a"] * len(work.loss_masks),
        seeds=[0] * len(work.loss_masks),
    )
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
    for _ in range(3):
        plan = draft.plan(batch)
        optimizer.zero_grad()
        (draft(batch, plan, head).loss_sum / plan.num_slots).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
    return _read_status("VmHWM") - before


def _read_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def make_work(values: dict[str, Any], shared: dict[str, Any], lengths: list[int]) -> Work:
    method = METHODS[values["method"]]
    section = method.section.model_validate(values)
    masks = [torch.arange(length) >= length // 8 for length in lengths]
    return Work(method.make_config(section, shared), section, masks, on_gpu=False)


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    values, shared, lengths = json.loads(sys.argv[1])
    small = {"hidden_size": 64, "vocab_size": 100}
    run_steps(make_work(values, {**shared, **small}, [64]))  # loads the libraries and starts the threads
    work = make_work(values, shared, lengths)
    measured = run_steps(work)
    print(json.dumps({"measured": measured, "planned": sum(measure_step(work).peak().values())}))
