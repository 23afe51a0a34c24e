"""The recipe's `plan` section: what `recipe plan` is told of data, rates and prices. No stage reads it."""

from __future__ import annotations

from common.section import Section, operational

OF_NODE = "of a node; default: estimated from the hardware"


class PlanSection(Section):
    conversations: int | None = operational(
        default=None, gt=0, description="conversations to train on; default: one epoch of train.num_steps"
    )
    mean_tokens: int = operational(default=2000, ge=2, description="mean tokens of a conversation, prompt and reply")
    prompt_share: float = operational(default=0.25, ge=0, le=0.99, description="share of the prompts in them")
    synth_tokens_per_s: float | None = operational(default=None, gt=0, description=f"generated tokens/s {OF_NODE}")
    dump_tokens_per_s: float | None = operational(default=None, gt=0, description=f"captured tokens/s {OF_NODE}")
    mfu: float | None = operational(
        default=None, gt=0, le=1, description="share of the GPUs' peak that training reaches; default: 0.4, assumed"
    )
    read_gb_per_s: float | None = operational(
        default=None, gt=0, description="GB/s that a node reads from the store; default: it does not limit training"
    )
    start_minutes: float = operational(default=10.0, ge=0, description="of an engine, until it answers")
    bench_conversations: int = operational(default=200, gt=0, description="held-out conversations that bench sends")
    gpu_hour_price: float | None = operational(default=None, ge=0, description="price of an hour of one GPU")
    disk_tb_month_price: float | None = operational(default=None, ge=0, description="price of a TB for 730 hours")
