"""The draft's files: training checkpoints, and the exported folder that a server loads.

run folder    step-000500/{weights.safetensors, state/, position.json, recipe.yaml}   (a checkpoint)
              draft.json       the draft's config: method, dimensions, layers, mask token, target, store
              best.json        the checkpoint with the longest predicted acceptance on held-out conversations
              metrics.jsonl    one line every few steps; curves.png and tensorboard/ show them
export        config.json, model.safetensors    what a server loads
              draftline.json   the descriptor, the same for all methods, which `serve`, `bench`, `distributed` read
              certificate.json where the draft comes from, and its figures (contracts/certificate.py)
              README.md        the model card, made from the certificate
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from common.errors import UserError
from common.files import read_json, write_json
from common.section import Section

STEP_FOLDER = re.compile(r"step-(\d{6,})")
DESCRIPTOR_FILE = "draftline.json"
CARD_FILE = "README.md"


class Yarn(Section):
    """YaRN: `factor * original_max_position_embeddings` positions (arXiv 2309.00071, as transformers computes it)."""

    factor: float = Field(gt=1, description="served context length over the training length")
    original_max_position_embeddings: int = Field(gt=0, description="the training length")

    @property
    def window(self) -> float:
        """Positions that the scaled rope covers."""
        return self.factor * self.original_max_position_embeddings


class DraftConfig(BaseModel):
    """The config of a trained draft, draft.json; each method adds its own fields.

    `layer_ids` are 0-based outputs of the target's layers. `mask_token_id` is None if the method has no mask token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    hidden_size: int
    vocab_size: int
    num_target_layers: int
    layer_ids: list[int]
    mask_token_id: int | None = None
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    yarn: Yarn | None
    target_fingerprint: str
    store: str

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that the draft proposes in one step, K."""
        raise NotImplementedError

    @property
    def reach(self) -> int | None:
        """How many tokens before an anchor the draft sees at most; None: all."""
        return None


class Descriptor(BaseModel):
    """The description of an exported or published draft for the other stages, draftline.json.

    `speculative` is vLLM's speculative config without the model's path and the number of draft tokens. `calibration`:
    scale and shift of the confidences' logits that the weights hold. Fields that only `train export` writes are None
    for a published draft.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int = 2
    method: str
    speculative: dict[str, Any]
    num_speculative_tokens: int | None
    hidden_size: int
    vocab_size: int
    layer_ids: list[int]
    num_target_layers: int | None = None
    mask_token_id: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    yarn_factor: float | None = None
    max_position_embeddings: int | None = None
    target_fingerprint: str | None = None
    store: str | None = None
    weights: str | None = None
    sha256: str | None = None
    dtype: str | None = None
    layout: str | None = None
    evaluation: str | None = None
    calibration: tuple[float, float] | None = None
    recipe: dict[str, Any] | None = None


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
        """Return the steps with a complete checkpoint, ascending; incomplete ones have a temporary name."""
        found = (STEP_FOLDER.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def write_config(self, config: DraftConfig) -> None:
        write_json(self.config_path, config.model_dump(mode="json"))

    def write_best(self, step: int, acceptance_length: float) -> None:
        """Record the checkpoint with the longest predicted acceptance so far."""
        write_json(self.folder / "best.json", {"step": step, "acceptance_length": acceptance_length})

    def best_step(self) -> int | None:
        """Return the best checkpoint's step; None without held-out conversations."""
        path = self.folder / "best.json"
        return int(read_json(path, "a best checkpoint")["step"]) if path.exists() else None

    def best_length(self) -> float:
        """Return the best checkpoint's predicted acceptance length; 0 without one."""
        path = self.folder / "best.json"
        return float(read_json(path, "a best checkpoint")["acceptance_length"]) if path.exists() else 0.0

    def chosen_weights(self) -> Path:
        """Return the weights of the best checkpoint, else of the last. Raises UserError without a checkpoint."""
        steps, best = self.steps(), self.best_step()
        if not steps:
            raise UserError(
                self.folder, found="no checkpoint", expected="a step-* folder", fix="Run `train offline` first."
            )
        return self.step_folder(best if best in steps else steps[-1]) / "weights.safetensors"
