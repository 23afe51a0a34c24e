"""What the trainer computes on the way to the draft's logits, for a few samples: one side of `bench parity`.

Reads:  a training run's chosen checkpoint, with the rope that it is exported with; a store.
Writes: OUTPUT (contracts/trace.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

from contracts.draft import DraftRun
from contracts.errors import UserError
from contracts.recipe import Recipe
from contracts.store import StoredSample
from contracts.target import Target
from contracts.target_weights import TargetHead, read_head
from contracts.trace import Trace, write_traces
from train.data import open_states
from train.dflash import DFlash
from train.drafts import Draft, make_draft, served_config
from train.evaluate import spans_of

REPLY_TOKENS = 8


def trace(recipe: Recipe, run_folder: Path, store_folder: Path, output: Path, num_samples: int) -> list[Trace]:
    """Trace the first samples that can be drafted from. Raises UserError when there is none."""
    target = Target.read(recipe.target.path)
    store, manifest = open_states(recipe, store_folder, target)
    run = DraftRun(run_folder)
    config = served_config(run.read_config(), recipe)
    draft = make_draft(config)
    draft.load_state_dict(load_file(run.chosen_weights()))
    draft.eval()
    head = read_head(target)
    traces: list[Trace] = []
    for sample_id in store.sample_ids():
        sample = store.read_sample(sample_id)
        start, end = next(iter(spans_of(sample.loss_mask)), (0, 0))
        if start < 1 or end - start <= config.block_size:
            continue
        traces.append(trace_sample(draft, head, sample, sample_id, start, len(manifest.layer_ids)))
        if len(traces) == num_samples:
            break
    if not traces:
        raise UserError(
            store_folder,
            found=f"no reply of more than {config.block_size} tokens",
            expected="one to draft from",
            fix="Give a store with longer replies.",
        )
    write_traces(output, traces)
    print(f"trace: {len(traces)} samples of {store_folder} -> {output}")
    return traces


@torch.inference_mode()
def trace_sample(
    draft: Draft, head: TargetHead, sample: StoredSample, sample_id: str, start: int, num_layers: int
) -> Trace:
    """One sample's trace; its first reply begins at `start`."""
    found = Trace(sample_id, start)
    tensors = found.tensors
    tensors["token_ids"] = sample.input_ids[: start + REPLY_TOKENS].long()
    tensors["layers"] = sample.aux_hidden_states[:start].float().unflatten(-1, (num_layers, -1))
    rows = slice(start - 1, start - 1 + REPLY_TOKENS)
    tensors["teacher"] = head.logits(sample.hidden_states[rows]).argmax(-1)
    if isinstance(draft, DFlash):
        mask = draft.config.mask_token_id or 0
        tensors["mask_token"], tensors["mask_embedding"] = torch.tensor(mask), head.embedding[mask]
        ids, aux = sample.input_ids.long(), sample.aux_hidden_states.float()
        blocks = draft.lay_out(ids, sample.loss_mask, [len(ids)], [torch.tensor([start])])
        tensors["draft_logits"] = functional.linear(draft.hidden(ids, aux, blocks, head.embedding)[0], head.lm_head)
        return found
    logits = torch.stack([step[0] for step in draft.draft_logits(sample, head)[1]])  # the chain of the first place
    if draft.lm_head is not None:
        known = torch.arange(len(draft.d2t)) + draft.d2t
        tensors["vocabulary"] = known
        logits = logits.new_full((len(logits), head.lm_head.shape[0]), float("-inf")).index_copy(1, known, logits)
    tensors["draft_logits"] = logits
    return found
