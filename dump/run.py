"""Fill a hidden-state store from conversations.

Reads:  the output folder of `synth generate`.
Writes: a store (contracts/store.py). Every sample of every conversation gets a ledger entry: done, truncated (a reply
        was cut), filtered (too long, nothing supervised, a loop, the mask token) or failed (its capture failed).

Samples are streamed: they are read as the engine takes them, and other processes store them as the engine captures
them. A shard keeps its ledger in shards/<i>-of-<n>/; the shard that finishes last joins the ledgers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file
from contracts.conversation import check_written_by, find_part, hash_conversations
from contracts.ledger import check_counts
from contracts.rolling import is_rolling
from contracts.run import Run
from contracts.sample_file import INT4_BLOCK
from contracts.store import Manifest, Store
from dump.fill import open_filler
from dump.kept import Kept
from dump.ledger import DumpLedger
from dump.plan import Plan, make_plan, refuse_full_disk
from dump.preflight import prove_engines
from dump.rendered import TemplateMasks
from dump.samples import Filter, Row, read_rows
from dump.shards import count_open, ids_elsewhere, join_shards
from recipe.mask import mask_token_of
from recipe.recipe import Recipe
from serve.engine import engine_name
from serve.extraction import longest_sample
from serve.flags import layer_flags, normalize
from serve.settings import engine_settings, output_settings
from target.layers import captured_layers
from target.target import Target

STAGE = "dump run"


def dump(
    recipe: Recipe,
    conversations: Path,
    output: Path,
    *,
    shard: tuple[int, int] | None = None,
    force: bool = False,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Capture every sample that the store lacks; return the summary (counts by status, tokens, bytes).

    `shard` (i, n) takes the conversations whose id is i modulo n. Of a synthesis in n shards only its shard i must be
    finished. `force` starts even if the disk seems too small. `retry_failed` captures failed samples again. Raises
    UserError for conversations of another target and for a full disk, IncompleteError for too many rejected samples.
    """
    target = Target.here(recipe.target)
    folders = find_part(conversations, shard)
    check_written_by(folders[0], target)
    checksum = hash_conversations(folders, shard)
    store = _open_whole(output)
    folder = output if shard is None else store.shard_folder(*shard)
    elsewhere = ids_elsewhere(store, shard[1]) if shard else frozenset[str]()
    run = Run.open(
        folder,
        STAGE,
        settings=dump_settings(recipe, target, shard),
        inputs={"conversations": checksum, "target": target.fingerprint},
        recipe_yaml=recipe.to_yaml(),
    )
    if run.complete and not (retry_failed and run.state["summary"]["failed"]):
        print(f"dump: {folder} is finished, skipped ({_describe(run.state['summary'])})")
    else:
        store.claim(make_manifest(recipe, target, conversations, checksum if shard is None else ""))
        ledger = DumpLedger(folder / "ledger.jsonl")
        if retry_failed:
            ledger.retry_failed(done_elsewhere=elsewhere)
        if run.complete:
            run.reopen()
        plan = make_plan(recipe, target, _read(recipe, target, folders, shard), ledger.has, elsewhere)
        if ledger.num_finished:
            print(f"dump: {ledger.num_finished} of {plan.rows} samples are there already, going on")
        if not force:
            # Shards are of about the same size, and others may be filling the same disk.
            refuse_full_disk(output, plan.bytes * (count_open(store, shard[1]) if shard else 1))
        masks = TemplateMasks(recipe.target, target)
        rows = _take_rows(Filter.of(recipe, target), ledger, read_rows(folders, masks, shard), elsewhere)
        ledger.max_failed = recipe.dump.max_reject_fraction * plan.rows
        if plan.samples:
            with open_filler(recipe, target, store, ledger) as filler:
                if recipe.dump.preflight:
                    samples = _read(recipe, target, folders, shard)
                    prove_engines(recipe, target, filler.backend, filler.staging, samples, folder)
                filler.run(rows, plan.samples, run.tick)
        else:
            assert next(rows, None) is None  # reading it adds the entries of the rows that are left out
        masks.print_counts()
        _finish(run, ledger, plan)
    if shard is not None:
        return join_shards(store, shard[1], recipe)
    return dict(run.state["summary"])


def _open_whole(folder: Path) -> Store:
    """Return the store in `folder`. Raises UserError for a rolling one."""
    if is_rolling(folder):
        raise UserError(folder, found="a rolling store", expected="a new folder", fix="Give --window, or another one.")
    return Store(folder)


def make_manifest(recipe: Recipe, target: Target, conversations: Path, checksum: str) -> Manifest:
    """Return the manifest of this dump. `checksum`: of all conversations; "" in a shard."""
    if recipe.dump.dtype == "int4" and target.hidden_size % INT4_BLOCK:
        raise UserError(
            "dump.dtype",
            found=f"int4 for states {target.hidden_size} wide",
            expected=f"a width that blocks of {INT4_BLOCK} divide",
            fix="Use fp8_e4m3.",
        )
    kept = Kept.of(recipe, target)
    engine = engine_name() if recipe.dump.backend != "hf" else _transformers_version()
    return Manifest(
        target=str(target.path),
        target_fingerprint=target.fingerprint,
        quantization=str((target.config.get("quantization_config") or {}).get("quant_method", "none")),
        layer_ids=captured_layers(recipe.target, target),
        num_layers=target.num_layers,
        hidden_size=target.hidden_size,
        final_norm=target.final_norm,
        final_state=kept.final_state,
        tokenizer=target.tokenizer_checksum,
        template=target.template_checksum,
        engine=engine[0],
        engine_version=engine[1],
        tensor_parallel_size=int(_engine_flags(recipe).get("tensor-parallel-size", 1)),
        dtype=recipe.dump.dtype,
        conversations=checksum,
        conversations_folder=str(conversations.absolute()),
        top_k=kept.top_k or None,
        unseen_states=None if kept.unseen else "dropped",
        seen_reach=kept.reach,
    )


def _engine_flags(recipe: Recipe) -> dict[str, Any]:
    """Return the flags of the engines as far as the recipe knows them; servers may have been started with others."""
    if recipe.dump.backend == "server":
        return layer_flags(recipe, "dump")
    return {**normalize(recipe.serve.args), **normalize(recipe.dump.args)} if recipe.dump.backend == "vllm" else {}


def _transformers_version() -> tuple[str, str]:
    from importlib.metadata import version

    return "transformers", version("transformers")


def dump_settings(recipe: Recipe, target: Target, shard: tuple[int, int] | None) -> dict[str, Any]:
    """Return the settings that change the output; a resume refuses other values."""
    section = recipe.dump.settings()
    del section["args"]  # "serve" has them, without flags that do not change the states
    kept = Kept.of(recipe, target)
    if kept.final_state == "pre-norm":
        del section["final_states"]  # stores of earlier versions have no such keys
    if not kept.top_k:
        del section["top_k"]
    if kept.unseen:
        del section["unseen_states"]
    else:
        section["reach"] = kept.reach
    template = recipe.target.training_template
    return {
        "dump": section,
        "layer_ids": captured_layers(recipe.target, target),
        "max_tokens": longest_sample(recipe, target),
        "mask_token": mask_token_of(recipe, target),
        "training_template": hash_file(template) if template else None,
        "serve": output_settings(recipe, "dump") if recipe.dump.backend == "server" else engine_settings(recipe),
        **({} if shard is None else {"shard": f"{shard[0]}/{shard[1]}"}),
    }


def _read(recipe: Recipe, target: Target, folders: list[Path], shard: tuple[int, int] | None) -> Iterator[Row]:
    return read_rows(folders, TemplateMasks(recipe.target, target), shard)


def _take_rows(row_filter: Filter, ledger: DumpLedger, rows: Iterable[Row], elsewhere: Container[str]) -> Iterator[Row]:
    """Yield the rows to capture; add ledger entries for the rows that are left out."""
    for row in rows:
        if ledger.has(row.sample_id) or row.sample_id in elsewhere:
            continue
        verdict = row_filter.judge(row)
        if verdict.row is None:
            ledger.add({"id": row.sample_id, "status": verdict.status, "reason": verdict.reason})
        else:
            yield verdict.row


def _finish(run: Run, ledger: DumpLedger, plan: Plan) -> None:
    """Check that every row is accounted for, print the counts and mark the run complete.

    Raises IncompleteError if rows are missing or too many samples were rejected.
    """
    ledger.close()
    counts = ledger.counts
    check_counts(ledger.path, counts, plan.rows)
    summary = {**counts, "samples": counts["done"], "tokens": ledger.tokens, "bytes": ledger.bytes}
    summary["rows"] = plan.rows + plan.elsewhere
    print(f"dump: {_describe(summary)} in {run.seconds:.0f} s -> {run.folder}")
    ledger.refuse_failures()
    if counts["failed"]:
        print("dump: --retry-failed captures the failed samples again")
    run.finish(summary)


def _describe(summary: dict[str, Any]) -> str:
    dropped = (
        ", ".join(f"{summary[s]} {s}" for s in ("truncated", "filtered", "failed") if summary[s]) or "none dropped"
    )
    return f"{summary['samples']} samples, {summary['tokens']} tokens, {summary['bytes'] / 1e6:.0f} MB; {dropped}"
