"""Record vLLM's tensors on the way to the draft's logits for a few samples, for `bench parity`.

The engine runs in this process with the exported draft, on any number of GPUs. An extension of its workers records
inputs and outputs of the draft model's methods.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from contracts.schedule import SCHEDULE_KEY
from contracts.trace import Trace
from drafts import METHODS
from drafts.published import read_descriptor
from recipe.recipe import Recipe
from serve.captures import check_captures
from serve.command import speculative_config
from serve.engine import engine_env
from serve.releases import check_release, find_draft_model
from target.target import Target


class TraceExtension:
    """Methods that vLLM mixes into its workers (`worker_extension_cls`)."""

    model_runner: Any
    rank: int

    def start_trace(self, method: str) -> None:
        """Record inputs and outputs of the draft model's methods from now on. `method`: the draft's."""
        self.trace_noted: dict[str, list[torch.Tensor]] = {}
        if hasattr(self, "trace_draft"):
            return
        model = find_draft_model(self.model_runner)
        self.trace_draft = model
        combine, compute, forward = model.combine_hidden_states, model.compute_logits, model.forward

        def note(name: str, tensor: torch.Tensor) -> None:
            self.trace_noted.setdefault(name, []).append(tensor.detach().float().cpu().clone())

        def combine_hidden_states(hidden_states: torch.Tensor) -> torch.Tensor:
            note("layers", hidden_states)
            return combine(hidden_states)

        def compute_logits(hidden_states: torch.Tensor) -> torch.Tensor:
            logits = compute(hidden_states)
            if logits is not None:  # None on ranks that do not hold the logits
                note("draft_logits", logits)
            return logits

        def forward_noting(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if "slots" not in self.trace_noted:
                note("slots", input_ids.double())
                note("embeddings", model.embed_input_ids(input_ids))
            return forward(input_ids, *args, **kwargs)

        def note_calls(name: str) -> None:
            path, _, last = name.rpartition(".")
            owner = attrgetter(path)(model) if path else model
            original = getattr(owner, last)

            def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                result = original(first, *args, **kwargs)
                note(f"{name}.input", first)
                note(name, result[0] if isinstance(result, tuple) else result)
                return result

            setattr(owner, last, call)

        model.combine_hidden_states = combine_hidden_states
        model.compute_logits = compute_logits
        model.forward = forward_noting
        for name in METHODS[method].engine_methods:
            note_calls(name)

    def take_trace(self, start: int, num_draft_tokens: int, method: str, path: str) -> None:
        """Write one request's tensors since `start_trace` as safetensors; its prompt has `start` tokens."""
        noted = self.trace_noted
        found = METHODS[method].engine_taps(noted, self.trace_draft)  # on all ranks: it may compute logits
        if self.rank != 0:
            return
        found["layers"] = torch.cat(noted["layers"])[:start]
        if "draft_logits" in noted and "draft_logits" not in found:
            found["draft_logits"] = torch.cat(noted["draft_logits"])[:num_draft_tokens]
        offsets = getattr(self.trace_draft, "draft_id_to_target_id", None)
        if offsets is not None:
            found["vocabulary"] = (torch.arange(len(offsets), device=offsets.device) + offsets).cpu()
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


def trace_args(recipe: Recipe, speculative: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine arguments (with underscores): the trace's own over `serve.args`."""
    return {
        "max_model_len": recipe.target.max_model_len,
        **{key.replace("-", "_"): value for key, value in recipe.serve.args.items()},
        "enforce_eager": True,
        "enable_prefix_caching": False,  # the draft must read the whole prompt's states
        "speculative_config": dict(speculative),
        "worker_extension_cls": "serve.trace.TraceExtension",
    }


def trace_engine(
    recipe: Recipe, target: Target, draft: Path, samples: Sequence[tuple[str, int, list[int]]], reply_tokens: int
) -> list[Trace]:
    """Trace samples `(id, reply start, token ids)` with the recipe's engine arguments, in eager mode.

    Raises UserError if the draft was made for another target, or the installed vLLM does not work or cannot hand out
    the target's states.
    """
    check_release()
    speculative = {**speculative_config(draft, target), **recipe.serve.speculative}
    speculative.pop(SCHEDULE_KEY, None)  # the trainer's side has one number of draft tokens
    method = read_descriptor(draft).method
    os.environ.update(engine_env(recipe.serve.env))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    args = trace_args(recipe, speculative)
    check_captures(target, args, method)
    llm = LLM(model=str(target.path), **args)
    parameters = SamplingParams(max_tokens=reply_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    traces = []
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace.safetensors")
        for sample_id, start, token_ids in samples:
            llm.collective_rpc("start_trace", args=(method,))
            (answer,) = llm.generate([{"prompt_token_ids": token_ids[:start]}], parameters, use_tqdm=False)
            llm.collective_rpc("take_trace", args=(start, int(speculative["num_speculative_tokens"]), method, path))
            found = load_file(path)
            found["layers"] = found["layers"].unflatten(-1, (-1, target.hidden_size))
            found["teacher"] = torch.tensor(answer.outputs[0].token_ids)
            traces.append(Trace(sample_id, start, found))
    return traces
