"""The recipe's `dump` section: capture backend, dtype of the stored states, filters, staging."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from common.section import operational
from recipe.retries import Retries
from recipe.serve import Args


class DumpSection(Retries):
    backend: Literal["vllm", "server", "hf"] = Field(
        default="vllm", description="vLLM on this machine, vLLM servers (dump.endpoints), or transformers"
    )
    dtype: Literal["bfloat16", "float32", "fp8_e4m3", "int4"] = Field(
        default="bfloat16",
        description="of the stored states; fp8: a scale per token and layer; int4: one per 32 values (4.5 bits each), "
        "final states fp8",
    )
    final_states: Literal["keep", "top-k", "drop"] = Field(
        default="keep",
        description="top-k: store the target's dump.top_k most likely next tokens instead; drop: neither, which is all "
        "that objectives on tokens need",
    )
    top_k: int = Field(default=64, gt=0, description="tokens of each position with final_states top-k")
    unseen_states: Literal["keep", "drop"] = Field(
        default="keep", description="drop: leave out states that no block of train.draft can see or learn from"
    )
    include_truncated: bool = Field(default=False, description="whether conversations with a cut reply are dumped")
    include_loops: bool = Field(default=False, description="whether conversations that fell into a loop are dumped")
    truncate: bool = Field(default=False, description="cut over-length samples instead of leaving them out")
    preflight: bool = operational(
        default=True, description="prove the engine on a few samples before the first one is stored"
    )
    verify_samples: int | None = operational(
        default=None, gt=0, description="samples that `dump verify` draws and checks; default: all"
    )
    args: Args = Field(default={}, description="vLLM's engine arguments, over serve.args")
    env: dict[str, str] = operational(default={}, description="environment of the engine, over serve.env")
    engines: int = operational(
        default=1, ge=0, description="vLLM engines of `dump run`, each on its own GPUs; 0: as many as its GPUs allow"
    )
    endpoints: list[str] = operational(default=[], description="servers with extraction on (`serve command --extract`)")
    concurrency: int = operational(default=64, gt=0, description="requests in flight to each server")
    server_staging_dir: Path | None = operational(
        default=None, description="folder that the servers write states to; default: staging_dir"
    )
    staging_dir: Path | None = operational(
        default=None, description="where states wait to be stored; default: /dev/shm if it exists, else the store"
    )
    staging_gib: float = operational(default=8.0, gt=0, description="most GiB of states that wait to be stored")
    writers: int = operational(default=2, gt=0, description="processes that store samples")
    max_reject_fraction: float = operational(default=0.01, ge=0, le=1, description="above it the stage exits 1")

    @property
    def final_state(self) -> str:
        """The manifest's `final_state`."""
        return {"keep": "pre-norm", "drop": "none", "top-k": "top-k"}[self.final_states]
