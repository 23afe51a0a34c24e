"""Write the trainer's tensors on the way to the draft's logits for a few samples, for `bench parity`.

Reads:  a training run's chosen checkpoint, with the rope of its export; a store.
Writes: OUTPUT (contracts/trace.py).
"""

from __future__ import annotations

from pathlib import Path

import torch

from common.errors import UserError
from contracts.draft import DraftRun
from contracts.store import StoredSample, require_all_states
from contracts.trace import Trace, write_traces
from drafts.draft import Draft
from drafts.places import spans_of
from recipe.recipe import Recipe
from target.head import TargetHead, read_head
from target.target import Target
from train.data import open_states
from train.draft import load_served

REPLY_TOKENS = 8


def trace(recipe: Recipe, run_folder: Path, store_folder: Path, output: Path, num_samples: int) -> list[Trace]:
    """Trace the first samples whose first reply has over K+1 tokens. Raises UserError if there is none."""
    target = Target.here(recipe.target)
    store, manifest = open_states(recipe, store_folder, target)
    require_all_states(store_folder, manifest)
    draft = load_served(DraftRun(run_folder), recipe)
    num_tokens = draft.config.num_draft_tokens
    head = read_head(target)
    traces: list[Trace] = []
    for sample_id in store.sample_ids():
        sample = store.read_sample(sample_id)
        start, end = next(iter(spans_of(sample.loss_mask)), (0, 0))
        if start < 1 or end - start <= num_tokens + 1:
            continue
        found = Trace(sample_id, start)
        found.tensors.update(trace_sample(draft, head, sample, start, len(manifest.layer_ids)))
        traces.append(found)
        if len(traces) == num_samples:
            break
    if not traces:
        raise UserError(
            store_folder,
            found=f"no reply of more than {num_tokens + 1} tokens",
            expected="one to draft from",
            fix="Give a store with longer replies.",
        )
    write_traces(output, traces)
    print(f"trace: {len(traces)} samples of {store_folder} -> {output}")
    return traces


@torch.inference_mode()
def trace_sample(
    draft: Draft, head: TargetHead, sample: StoredSample, start: int, num_layers: int
) -> dict[str, torch.Tensor]:
    """Return one sample's tensors by name; its first reply begins at `start`."""
    rows = slice(start - 1, start - 1 + REPLY_TOKENS)
    return {
        "token_ids": sample.input_ids[: start + REPLY_TOKENS].long(),
        "layers": sample.aux_hidden_states[:start].float().unflatten(-1, (num_layers, -1)),
        "teacher": head.logits(sample.hidden_states[rows]).argmax(-1),
        **draft.taps(sample, head, start),
    }
