"""Train the tiny recipe's target, a small Qwen3 that explains the standard library, and write its prompts.

Reads:  the running Python's standard library (see stdlib_corpus.py) and chat_template.jinja.
Writes: OUTPUT/target/ (config, weights in fp32, tokenizer, chat template),
        OUTPUT/prompts/train.jsonl and held_out.jsonl (disjoint by subject),
        OUTPUT/target/summary.json (seconds, parameters, loss).

Deterministic for a given Python and CPU: fixed seeds and number of steps, no clock in the loop. A stopped run resumes
from its last checkpoint; a finished one is kept.

    python recipes/Tiny-DFlash/make_target.py --output runs/tiny-dflash
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

# Spinning threads would take cores from the working ones. torch reads this variable when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from stdlib_corpus import (
    FOLLOW_UPS,
    MODES,
    SYSTEM_PROMPT,
    Subject,
    read_subjects,
    write_question,
    write_reply,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common.vml import settle_vector_functions

HERE = Path(__file__).resolve().parent
BEGIN, END, ROLE = "]~!b[", "[e~[", "]~b]"
THINK, END_THINK = "<mm:think>", "</mm:think>"
EMBEDDING_ROWS = 1024
NUM_TOKENS = EMBEDDING_ROWS - 8  # the rows above are free; the first one is the mask token
SEED = 7


def main() -> None:
    args = parse_args()
    target = args.output / "target"
    if (target / "summary.json").exists():
        print(f"target: {target} is finished, skipped")
        return
    started = time.time()
    settle_vector_functions()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    subjects = read_subjects()
    num_prompts = write_prompts(subjects, args.output / "prompts", args.num_train, args.num_held_out)

    partial = args.output / "target.partial"
    partial.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(subjects)
    tokenizer.save_pretrained(partial)
    model, loss, earlier_seconds = train(subjects, tokenizer, partial, args.steps, args.checkpoint_every)
    model.save_pretrained(partial)
    (partial / "checkpoint.pt").unlink(missing_ok=True)
    summary = {
        "seconds": round(earlier_seconds + time.time() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "loss": round(loss, 4),
        "subjects": len(subjects),
        "prompts": num_prompts,
    }
    (partial / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    partial.rename(target)
    print(f"target: {summary['parameters'] / 1e6:.1f}M parameters, loss {loss:.3f}, {summary['seconds']:.0f} s")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--steps", type=int, default=560, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--num-train", type=int, default=1024, help="training prompts (default: %(default)s)")
    parser.add_argument("--num-held-out", type=int, default=96, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(arguments)


def write_prompts(subjects: list[Subject], folder: Path, num_train: int, num_held_out: int) -> dict[str, int]:
    """Write the prompts of two splits with disjoint subjects; one conversation in four has a second turn."""
    rng = random.Random(SEED)
    chosen = rng.sample(subjects, num_train + num_held_out)
    splits = {"held_out": chosen[:num_held_out], "train": chosen[num_held_out:]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        rows = []
        for number, subject in enumerate(members):
            topic = rng.choice(("what", "call"))
            messages = [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": write_question(subject, topic, rng)},
            ]
            if number % 4 == 3:
                other = "call" if topic == "what" else "what"
                messages.append({"role": "user", "content": FOLLOW_UPS[other]})
            rows.append({"id": f"{split}/{subject.name}", "category": subject.kind, "messages": messages})
        temporary = folder / f"{split}.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.rename(folder / f"{split}.jsonl")
    return {split: len(members) for split, members in splits.items()}


def make_tokenizer(subjects: list[Subject]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with MiniMax-M3's special tokens; as with M3, decoded text has thinking tags."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    markers = [BEGIN, END, ROLE, THINK, END_THINK]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - len(markers),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(SEED)
    texts = []
    for subject in subjects:
        for topic in ("what", "call"):
            thought, answer = write_reply(subject, topic, "enabled")
            texts.append(f"{write_question(subject, topic, rng)}\n{thought}\n{answer}")
    tokenizer.train_from_iterator(texts, trainer)
    special = [AddedToken(text, special=text in (BEGIN, END, ROLE), normalized=False) for text in markers]
    tokenizer.add_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        chat_template=(HERE / "chat_template.jinja").read_text(),
        model_max_length=1024,
    )


def make_conversation(subject: Subject, rng: random.Random) -> tuple[list[dict[str, Any]], str]:
    """Return a training conversation and its mode; a quarter of them have a second turn."""
    mode = rng.choice(MODES)
    topic = rng.choice(("what", "call"))
    turns = [(topic, write_question(subject, topic, rng))]
    if rng.random() < 0.25:
        other = "call" if topic == "what" else "what"
        turns.append((other, FOLLOW_UPS[other]))
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM_PROMPT}]
    for topic, question in turns:
        thought, answer = write_reply(subject, topic, mode)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    return messages, mode


def encode_conversation(subject: Subject, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> torch.Tensor:
    """Return `(T, 2)`: token ids, and labels, -1 outside the assistant's turns (the generation tags)."""
    messages, mode = make_conversation(subject, rng)
    encoded = tokenizer.apply_chat_template(
        messages, thinking_mode=mode, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, spoken = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
    return torch.stack([ids, ids.masked_fill(~spoken, -1)], dim=1)


def make_batches(
    subjects: list[Subject], tokenizer: PreTrainedTokenizerFast, num_steps: int, batch_tokens: int = 1280
) -> list[torch.Tensor]:
    """Return batches `(B, T, 2)` of conversations of similar length: token ids and labels, -1 as padding."""
    rng = random.Random(SEED)
    batches: list[torch.Tensor] = []
    while len(batches) < num_steps:
        rows = [encode_conversation(subject, tokenizer, rng) for subject in subjects]
        rows.sort(key=len)
        epoch = []
        while rows:
            # Few different shapes, because each new one sets up the CPU's matrix products again.
            width = math.ceil(len(rows[-1]) / 16) * 16
            group = [rows.pop() for _ in range(min(len(rows), batch_tokens // width))]
            padded = torch.full((len(group), width, 2), -1)
            for place, member in enumerate(group):
                padded[place, : len(member)] = member
            epoch.append(padded)
        rng.shuffle(epoch)
        batches += epoch
    return batches[:num_steps]


def train(
    subjects: list[Subject],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    num_steps: int,
    checkpoint_every: int,
) -> tuple[Qwen3ForCausalLM, float, float]:
    """Train the target, resuming from folder/checkpoint.pt; return `(model, last loss, seconds of earlier runs)`."""
    config = Qwen3Config(
        vocab_size=EMBEDDING_ROWS,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
        use_cache=False,
        initializer_range=0.03,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    batches = make_batches(subjects, tokenizer, num_steps)
    fingerprint = hashlib.sha256(b"".join(batch.numpy().tobytes() for batch in batches)).hexdigest()
    checkpoint = folder / "checkpoint.pt"
    first, seconds, loss_value, started = 0, 0.0, math.nan, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["fingerprint"] == fingerprint:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, seconds = state["step"], state["seconds"]
            print(f"target: going on from step {first}")
    model.train()
    for step in tqdm(range(first, num_steps), initial=first, total=num_steps, desc="target", mininterval=5):
        warmup, left = (step + 1) / 40, (num_steps - step) / num_steps
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, warmup) * max(0.02, left)
        ids, labels = batches[step].unbind(-1)
        logits = model(input_ids=ids.clamp(min=0)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_value = loss.item()
        if (step + 1) % checkpoint_every == 0 and step + 1 < num_steps:
            spent = seconds + time.time() - started
            save_checkpoint(checkpoint, model, optimizer, step + 1, fingerprint, spent)
    model.config.use_cache = True
    model.generation_config.do_sample = False
    return model.eval(), loss_value, seconds


def save_checkpoint(
    path: Path,
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    step: int,
    fingerprint: str,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "fingerprint": fingerprint,
        "seconds": seconds,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.rename(path)


if __name__ == "__main__":
    main()
