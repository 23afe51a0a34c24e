"""Conversations that a random target really wrote, greedily, without a server: for dumps that are to be proven."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from contracts.conversation import CONVERSATIONS_FILE, Conversation, Sample
from contracts.run import Run
from contracts.target import Target

REPLY_TOKENS = 10


@torch.inference_mode()
def write_conversations(target_folder: Path, folder: Path, count: int, shared: int = 0) -> Path:
    """A finished synthesis of `count` conversations: `shared` equal tokens, 8 to 40 more, a greedy reply."""
    model = AutoModelForCausalLM.from_pretrained(target_folder).eval()
    target = Target.read(target_folder)
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
