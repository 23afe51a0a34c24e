"""Serve a draft in real vLLM and keep the logits it computes: `logits_probe.py METHOD TARGET DRAFT LENGTH OUTPUT`.

Writes a dictionary: `logits` of every call in turn (DFlash: K rows; EAGLE3: K calls of a row), `token_ids`, the reply.
"""

from __future__ import annotations

import os
import sys

import torch

from serve.engine import engine_env

K = 3


def main(method: str, target: str, draft: str, prompt_length: str, output: str) -> None:
    os.environ.update(engine_env({}))
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM

    recorded: list[torch.Tensor] = []
    served = DFlashQwen3ForCausalLM if method == "dflash" else Eagle3LlamaForCausalLM
    compute = served.compute_logits

    def record(self, hidden):  # type: ignore[no-untyped-def]
        logits = compute(self, hidden)
        recorded.append(logits.detach().float().clone())
        return logits

    served.compute_logits = record
    speculation = {"method": method, "model": draft, "num_speculative_tokens": K}
    llm = LLM(model=target, dtype="float32", enforce_eager=True, max_model_len=256, speculative_config=speculation)
    recorded.clear()
    prompt = {"prompt_token_ids": list(range(10, 10 + int(prompt_length)))}
    parameters = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    (answer,) = llm.generate([prompt], parameters, use_tqdm=False)
    torch.save({"logits": recorded, "token_ids": list(answer.outputs[0].token_ids)}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
