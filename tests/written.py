"""Inputs of stages, made without the stages before: conversations that a random target really wrote, and stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from contracts.conversation import CONVERSATIONS_FILE, Conversation, Sample, hash_conversations
from contracts.ledger import LedgerWriter
from contracts.run import Run
from contracts.store import Manifest, Store
from dump.capture import Captured
from dump.hf import load_model
from dump.samples import Row
from dump.writer import make_stored
from target.target import Target

REPLY_TOKENS = 10


@torch.inference_mode()
def write_conversations(target_folder: Path, folder: Path, count: int, shared: int = 0) -> Path:
    """A finished synthesis of `count` conversations: `shared` equal tokens, 8 to 40 more, a greedy reply."""
    target = Target.read(target_folder)
    model = load_model(target, torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {"prompts": "none", "target": target.fingerprint}
    run = Run.open(folder, "synth generate", settings={}, inputs=inputs, recipe_yaml="")
    lines = []
    for length in range(8, 41, 4):
        prompts = torch.randint(0, 900, (-(-count // 9), length), generator=generator)
        tokens = torch.cat([torch.arange(100, 100 + shared).expand(len(prompts), -1), prompts], dim=1)
        for _ in range(REPLY_TOKENS):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        for row in tokens.tolist():
            conversation = Conversation(
                id=f"{len(lines) * 7919:032x}", source_id=f"row-{len(lines)}", index=len(lines), messages=[],
                samples=[Sample(token_ids=row, loss_spans=[(shared + length, len(row))])], finish_reason="stop",
                thinking_mode=("enabled", "disabled")[len(lines) % 2], sampling={"temperature": 0.0},
                target={"path": str(target_folder)}, template="", usage={"completion_tokens": REPLY_TOKENS},
            )  # fmt: skip
            lines.append(conversation.model_dump_json())
    lines = lines[:count]
    (folder / CONVERSATIONS_FILE).write_text("\n".join(lines) + "\n")
    run.finish({"done": len(lines)})
    return folder


def write_store(
    folder: Path,
    target: Target,
    num_samples: int = 10,
    layer_ids: Sequence[int] = (1, 2),
    conversations: Path | None = None,
    seed: int = 4,
) -> Path:
    """A finished store of random states, made with the store's own writer. A layer's states are the same in all.

    Its manifest names `conversations`, whatever is in them. Another `seed` gives the same ids other tokens.
    """
    checksum = hash_conversations([conversations]) if conversations else "c" * 64
    opened = Run.open(
        folder,
        "dump run",
        settings={},
        inputs={"conversations": checksum, "target": target.fingerprint},
        recipe_yaml="",
    )
    store = Store(folder)
    store.write_manifest(
        Manifest(
            target=str(target.path),
            target_fingerprint=target.fingerprint,
            quantization="none",
            layer_ids=list(layer_ids),
            num_layers=target.num_layers,
            hidden_size=target.hidden_size,
            final_norm="rms",
            tokenizer="",
            template="",
            engine="none",
            engine_version="",
            dtype="float32",
            conversations=checksum,
            conversations_folder=str(conversations or ""),
        )
    )
    ledger = LedgerWriter(store.ledger_path)
    generator = torch.Generator().manual_seed(seed)
    of_layer = {layer_id: torch.Generator().manual_seed(100 + layer_id) for layer_id in layer_ids}
    for number in range(num_samples):
        ids = torch.randint(0, 500, (60,), generator=generator).tolist()
        conversation = Conversation(
            id=f"{number:032x}",
            source_id="",
            index=number,
            messages=[],
            samples=[Sample(token_ids=ids, loss_spans=[(10, 30), (40, 60)])],
            finish_reason="stop",
            sampling={"temperature": 0.0},
            target={},
            template="",
            usage={},
        )
        states = dict(zip((1, 2), torch.randn(60, 2, target.hidden_size, generator=generator).unbind(1), strict=True))
        for layer_id in set(layer_ids) - {1, 2}:
            states[layer_id] = torch.randn(60, target.hidden_size, generator=of_layer[layer_id])
        layers = torch.stack([states[layer_id] for layer_id in layer_ids], dim=1)
        final = torch.randn(60, target.hidden_size, generator=generator)
        row = Row(f"{conversation.id}-0", conversation, conversation.samples[0])
        fields = store.write_sample(row.sample_id, make_stored(row, Captured(layers, final)))
        ledger.append([{"id": row.sample_id, "status": "done", "tokens": 60, **fields}])
    ledger.close()
    opened.finish({"samples": num_samples})
    opened._lock.close()
    return folder
