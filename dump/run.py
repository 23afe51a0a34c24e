"""Fill a hidden-state store from conversations.

Reads:  the output folder of `synth generate`.
Writes: a store (contracts/store.py). Every sample of every conversation ends in its ledger: done, truncated (a reply
        was cut: kept out), filtered (too long, nothing supervised) or failed (the engine's answer did not hold).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from contracts.conversation import CONVERSATIONS_FILE, Conversation, Sample, check_written_by, read_conversations
from contracts.errors import IncompleteError
from contracts.files import hash_file
from contracts.ledger import Ledger, check_counts
from contracts.recipe import Recipe
from contracts.run import Run
from contracts.store import DTYPES, Manifest, Store, StoredSample
from contracts.target import Target, default_dflash_layers
from dump.engine import CaptureEngine, CaptureError, longest_sample
from serve.engine import engine_name


def dump(recipe: Recipe, conversations: Path, output: Path) -> dict[str, Any]:
    """Capture every sample that the store still lacks; its summary (counts by status, tokens, bytes).

    Raises UserError for conversations of another target, IncompleteError when too many samples were rejected.
    """
    target = Target.read(recipe.target.path)
    check_written_by(conversations, target)
    layer_ids = recipe.target.aux_layers or default_dflash_layers(target.num_layers, recipe.target.num_aux_layers)
    checksum = hash_file(conversations / CONVERSATIONS_FILE)
    run = Run.open(
        output,
        "dump run",
        settings={"dump": recipe.dump.settings(), "layer_ids": layer_ids, "serve": recipe.serve.settings()},
        inputs={"conversations": checksum, "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    store = Store(output)
    if run.complete:
        print(f"dump: {output} is finished, skipped ({_describe(run.state['summary'])})")
        return dict(run.state["summary"])
    engine, engine_version = engine_name()
    store.write_manifest(
        Manifest(
            target=str(target.path),
            target_fingerprint=target.fingerprint,
            quantization=str((target.config.get("quantization_config") or {}).get("quant_method", "none")),
            layer_ids=layer_ids,
            num_layers=target.num_layers,
            hidden_size=target.hidden_size,
            final_norm=target.final_norm,
            tokenizer=target.tokenizer_checksum,
            template=target.template_checksum,
            engine=engine,
            engine_version=engine_version,
            dtype=recipe.dump.dtype,
            conversations=checksum,
        )
    )
    ledger = Ledger(store.ledger_path)
    rows = list(_read_samples(conversations))
    todo = [row for row in rows if row[0] not in ledger]
    if len(todo) < len(rows):
        print(f"dump: {len(rows) - len(todo)} of {len(rows)} samples are there already, going on with {len(todo)}")
    captured = [row for row in todo if _accept(recipe, ledger, row, longest_sample(recipe, target))]
    if captured:
        _capture_all(recipe, target, layer_ids, captured, store, ledger, run)
    counts = ledger.counts()
    summary = {**counts, "samples": counts["done"], "tokens": ledger.total("tokens"), "bytes": ledger.total("size")}
    ledger.close()
    check_counts(store.ledger_path, counts, len(rows))
    print(f"dump: {_describe(summary)} in {run.seconds:.0f} s -> {output}")
    rejected = counts["failed"] / max(1, len(rows))
    if rejected > recipe.dump.max_reject_fraction:
        reason = ledger.entries[ledger.ids("failed")[0]]["reason"]
        raise IncompleteError(
            f"{store.ledger_path}: found {counts['failed']} of {len(rows)} samples rejected (the first: {reason}), "
            f"expected at most {recipe.dump.max_reject_fraction:.0%}. Look at the engine; delete the store; dump again."
        )
    run.finish(summary)
    return summary


Row = tuple[str, Conversation, Sample]


def _read_samples(conversations: Path) -> Iterator[Row]:
    for conversation in read_conversations(conversations):
        for number, sample in enumerate(conversation.samples):
            yield f"{conversation.id}-{number}", conversation, sample


def _accept(recipe: Recipe, ledger: Ledger, row: Row, max_tokens: int) -> bool:
    """Whether a sample is to be captured; if not, its ledger line says why."""
    sample_id, conversation, sample = row
    if conversation.finish_reason == "length" and not recipe.dump.include_truncated:
        ledger.append(sample_id, "truncated", "a reply reached max_tokens")
    elif conversation.loop is not None and not recipe.dump.include_loops:
        ledger.append(sample_id, "filtered", "a reply fell into a loop")
    elif not sample.loss_spans:
        ledger.append(sample_id, "filtered", "no supervised token")
    elif len(sample.token_ids) > max_tokens:
        ledger.append(sample_id, "filtered", f"{len(sample.token_ids)} tokens, more than {max_tokens}")
    else:
        return True
    return False


def _capture_all(
    recipe: Recipe, target: Target, layer_ids: list[int], rows: list[Row], store: Store, ledger: Ledger, run: Run
) -> None:
    staging = store.folder / "staging"
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left there is captured again
    staging.mkdir(parents=True)
    engine = CaptureEngine(recipe, target, layer_ids, staging)
    dtype = DTYPES[recipe.dump.dtype]
    waiting = iter(rows)
    tokens = 0
    with tqdm(total=len(rows), desc="dump", unit="sample", mininterval=2) as bar:
        while batch := list(islice(waiting, recipe.dump.batch_samples)):
            by_id = {row[0]: row for row in batch}
            for sample_id, captured in engine.capture({row[0]: row[2].token_ids for row in batch}):
                if isinstance(captured, CaptureError):
                    ledger.append(sample_id, "failed", str(captured))
                else:
                    _, conversation, sample = by_id[sample_id]
                    stored = make_stored(conversation, sample, captured.layers.to(dtype), captured.final.to(dtype))
                    fields = store.write_sample(sample_id, stored)
                    ledger.append(sample_id, "done", tokens=stored.num_tokens, **fields)
                    tokens += stored.num_tokens
                bar.update()
                run.tick()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-3):.0f} tok/s", refresh=False)
    shutil.rmtree(staging, ignore_errors=True)


def make_stored(conversation: Conversation, sample: Sample, layers: torch.Tensor, final: torch.Tensor) -> StoredSample:
    """A sample's tensors for the store. Shapes: layers (T, n, H); final (T, H)."""
    mask = torch.zeros(len(sample.token_ids), dtype=torch.bool)
    for start, end in sample.loss_spans:
        mask[start:end] = True
    metadata = {
        "conversation_id": conversation.id,
        "category": conversation.category,
        "thinking_mode": conversation.thinking_mode,
        "finish_reason": conversation.finish_reason,
        "temperature": str(conversation.sampling.get("temperature", "")),
    }
    ids = torch.tensor(sample.token_ids, dtype=torch.int32)
    return StoredSample(ids, mask, final, layers.flatten(1), metadata)


def _describe(summary: dict[str, Any]) -> str:
    dropped = (
        ", ".join(f"{summary[s]} {s}" for s in ("truncated", "filtered", "failed") if summary[s]) or "none dropped"
    )
    return f"{summary['samples']} samples, {summary['tokens']} tokens, {summary['bytes'] / 1e6:.0f} MB; {dropped}"
