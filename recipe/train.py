"""The recipe's `train` section (draft, optimizer, training loop) and `export` section (rope and dtype in serving).

`train.draft.method` names the draft method; the other keys of `train.draft` are that method's
(drafts/<method>/config.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from common.errors import UserError
from common.section import Section, operational
from contracts.draft import Yarn
from drafts import METHODS
from drafts.method import DraftSection


def parse_draft(value: Any) -> Any:
    """Validate `train.draft` with the section of its method (a union discriminated by `method`)."""
    if not isinstance(value, Mapping):
        return value
    method = METHODS.get(str(value.get("method")))
    if method is None:
        raise ValueError(f"method is {value.get('method')!r}; known methods: {', '.join(METHODS)}")
    return method.section.model_validate(value)  # its errors keep their place below train.draft


class TrainSection(Section):
    draft: Annotated[SerializeAsAny[DraftSection], BeforeValidator(parse_draft)] = Field(
        description="method, and that method's keys: docs/draft-methods.md"
    )
    num_steps: int = Field(gt=0, description="optimizer steps")
    global_batch_size: int = Field(
        default=2, gt=0, description="samples per optimizer step, over all processes and accumulated batches"
    )
    gradient_accumulation_steps: int = Field(
        default=1, gt=0, description="batches per optimizer step; divides global_batch_size"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: for the hidden matrices, with AdamW for norms and an own lm_head; one rate for both",
    )
    learning_rate: float = Field(default=1.2e-3, gt=0, description="at the end of the warm-up")
    lr_schedule: Literal["cosine", "linear", "wsd"] = Field(
        default="cosine", description="after the warm-up; wsd: constant, then linear over the last fifth"
    )
    warmup_steps: int = Field(default=100, ge=0, description="steps in which the learning rate rises linearly")
    weight_decay: float = Field(default=0.01, ge=0, description="of all weights, decoupled from the gradient")
    max_grad_norm: float = Field(default=1.0, gt=0, description="norm that gradients are clipped to")
    seed: int = Field(default=0, description="of the weights, the order of the samples and the anchors")
    max_samples: int | None = Field(default=None, gt=0, description="train on the store's first N samples only")
    held_out_fraction: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of conversations held out to choose the best checkpoint"
    )
    yarn: bool = Field(default=True, description="train with the rope scaling that export writes")
    bf16: bool | None = Field(
        default=None,
        description="products in bf16, weights in fp32; default: on GPUs. CPUs gain with avx512_bf16 or AMX",
    )
    init_from: Path | None = operational(
        default=None,
        description="start from a run, a checkpoint or a published draft's folder, whose weights must not change, or "
        "from org/name@revision of the hub; default: at random",
    )
    evaluate_every: int = operational(
        default=0, ge=0, description="steps between evaluations on held-out rows; 0: never"
    )
    evaluate_samples: int = operational(default=256, gt=0, description="most held-out samples of such an evaluation")
    checkpoint_every: int = operational(default=100, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = operational(default=2, gt=0, description="latest checkpoints kept, besides the best")
    gradient_checkpointing: bool = operational(default=False, description="recompute activations: slower, less memory")
    compile: bool | None = operational(default=None, description="torch.compile, layer by layer; default: on GPUs")
    parallel: Literal["ddp", "fsdp2"] = operational(default="ddp", description="under torchrun with several processes")
    num_readers: int | None = operational(
        default=None, gt=0, description="threads that read the store ahead; default: 4 on a GPU, 1 on a CPU"
    )
    read_ahead_gib: float | None = operational(
        default=None, gt=0, description="most GiB of states read ahead by a process; default: 4 on a GPU, 1 on a CPU"
    )
    num_threads: int | None = operational(default=None, gt=0, description="CPU threads; default: all cores")

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainSection:
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError("global_batch_size must be a multiple of gradient_accumulation_steps")
        return self

    def check_processes(self, number: int) -> None:
        """Raise UserError when some of `number` processes would have no sample of a batch."""
        if self.batch_size < number:
            raise UserError(
                "train.global_batch_size",
                found=f"{self.global_batch_size} in {self.gradient_accumulation_steps} accumulated batches",
                expected=f"a sample of each batch for each of the {number} processes",
                fix="Raise it, accumulate less, or start fewer processes.",
            )

    def order(self, max_tokens: int) -> dict[str, Any]:
        """Return what decides which sample is read at which place (drafts/order.py), by key of the recipe."""
        return {
            "target.max_model_len": max_tokens,
            "train.seed": self.seed,
            "train.max_samples": self.max_samples,
            "train.held_out_fraction": self.held_out_fraction,
            "train.evaluate_samples": self.evaluate_samples if self.held_out_fraction else 0,
            "train.num_steps": self.num_steps,
            "train.global_batch_size": self.global_batch_size,
        }

    @property
    def batch_size(self) -> int:
        """Samples of one accumulated batch, over all processes."""
        return self.global_batch_size // self.gradient_accumulation_steps


class ExportSection(Section):
    yarn: Yarn | None = Field(
        default=None, description="stretch the draft's rope over longer contexts; default: plain rope"
    )
    max_position_embeddings: int | None = Field(
        default=None, gt=0, description="the served context length (YaRN's full window); default: target.max_model_len"
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="of the exported weights")
