"""Serve a draft in real vLLM and keep the logits it computes: `logits_probe.py TARGET DRAFT PROMPT_LENGTH OUTPUT`.

Writes a dictionary: `logits`, one tensor of K rows for each time the draft was asked, and `token_ids`, the reply.
"""

from __future__ import annotations

import os
import sys

import torch

from serve.engine import engine_env

K = 3


def main(target: str, draft: str, prompt_length: str, output: str) -> None:
    os.environ.update(engine_env({}))
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import qwen3_dflash

    recorded: list[torch.Tensor] = []
    compute = qwen3_dflash.DFlashQwen3ForCausalLM.compute_logits

    def record(self, hidden):  # type: ignore[no-untyped-def]
        logits = compute(self, hidden)
        recorded.append(logits.detach().float().clone())
        return logits

    qwen3_dflash.DFlashQwen3ForCausalLM.compute_logits = record
    speculation = {"method": "dflash", "model": draft, "num_speculative_tokens": K}
    llm = LLM(model=target, dtype="float32", enforce_eager=True, max_model_len=256, speculative_config=speculation)
    recorded.clear()
    prompt = {"prompt_token_ids": list(range(10, 10 + int(prompt_length)))}
    parameters = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    (answer,) = llm.generate([prompt], parameters, use_tqdm=False)
    torch.save({"logits": recorded, "token_ids": list(answer.outputs[0].token_ids)}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
