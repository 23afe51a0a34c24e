"""The draft's files: training checkpoints and the exported directory that a server loads.

run folder    step-000500/{weights.safetensors, state.pt, position.json}   (a checkpoint; two are kept)
              draft.json       what was trained: dimensions, layers, mask token, target, store
              best.json        which checkpoint predicts the longest acceptance on what was held out
              metrics.jsonl    one line every few steps; curves.png and tensorboard/ show them
export        config.json, model.safetensors, draftline.json               (nothing but what a server loads)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from contracts.errors import UserError
from contracts.files import read_json, write_json
from contracts.recipe import YarnSection

STEP_FOLDER = re.compile(r"step-(\d{6,})")


class DraftConfig(BaseModel):
    """Everything that a draft's weights mean; all sizes are counts of elements.

    `layer_ids` are 0-based outputs of the target's layers. DFlash: `block_size` includes the anchor. EAGLE3: drafts
    `block_size - 1` tokens one after another, trained over `ttt_steps`; it may know only `draft_vocab_size` tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["dflash", "eagle3"] = "dflash"
    hidden_size: int
    vocab_size: int
    num_target_layers: int
    layer_ids: list[int]
    block_size: int
    mask_token_id: int | None = None
    ttt_steps: int | None = None
    draft_vocab_size: int | None = None
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    yarn: YarnSection | None
    target_fingerprint: str
    store: str


class DraftRun:
    """Paths of a training run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def config_path(self) -> Path:
        return self.folder / "draft.json"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending (a checkpoint is renamed into place when it is whole)."""
        found = (STEP_FOLDER.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def write_config(self, config: DraftConfig) -> None:
        write_json(self.config_path, config.model_dump(mode="json"))

    def read_config(self) -> DraftConfig:
        return DraftConfig.model_validate(read_json(self.config_path, "a training run's draft.json"))

    def write_best(self, step: int, acceptance_length: float) -> None:
        """Note the checkpoint with the best predicted acceptance length so far."""
        write_json(self.folder / "best.json", {"step": step, "acceptance_length": acceptance_length})

    def best_step(self) -> int | None:
        """The best checkpoint's step, where a part of the conversations was held out."""
        path = self.folder / "best.json"
        return int(read_json(path, "a best checkpoint")["step"]) if path.exists() else None

    def best_length(self) -> float:
        """The best checkpoint's predicted acceptance length; 0 without one."""
        path = self.folder / "best.json"
        return float(read_json(path, "a best checkpoint")["acceptance_length"]) if path.exists() else 0.0

    def chosen_weights(self) -> Path:
        """Weights of the best checkpoint, or of the last. Raises UserError when there is none."""
        steps, best = self.steps(), self.best_step()
        if not steps:
            raise UserError(
                self.folder, found="no checkpoint", expected="a step-* folder", fix="Run `train offline` first."
            )
        return self.step_folder(best if best in steps else steps[-1]) / "weights.safetensors"
