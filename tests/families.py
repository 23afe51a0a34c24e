"""Targets of random weights, one for each model family of docs/families.md, small enough for vLLM on CPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tiny_m3 import build_tiny_m3

PAGE = Path(__file__).resolve().parent.parent / "docs/families.md"
BEGIN, END = "<!-- table: python tests/families.py -->", "<!-- end -->"

SOFT_CAP = 3.0
"""Below many logits, so that the cap is felt; Gemma's is 30."""

LAYERS = 5
ALTERNATING = [*["sliding_attention", "full_attention"] * 2, "full_attention"]
WINDOW = 16
"""Below the length of a conversation, so that the window is felt."""

VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "norm_topk_prob": True, "num_experts_per_tok": 2}
GROUPED = {
    **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
}  # fmt: skip

GEMMA3 = {
    "layer_types": ALTERNATING, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
    "final_logit_softcapping": SOFT_CAP,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A transformers model class, what is peculiar to it, and what its config has beside the sizes below.

    `settings`: recipe keys that it needs; `in_dump` and `in_parity`: those with vLLM. `refused`: "" if vLLM's CPU build
    runs it, else the reason that the commands print; `no_dflash` likewise, of DFlash drafts. `rope_theta`: the base, if
    the config leaves it out.
    """

    model: str
    name: str
    peculiar: str
    config: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    in_dump: tuple[str, ...] = ()
    in_parity: tuple[str, ...] = ()
    refused: str = ""
    no_dflash: str = ""
    rope_theta: float = 10000.0


FROM_TRANSFORMERS = dict.fromkeys(("in_dump", "in_parity"), ("serve.args.model-impl=transformers",))

FAMILIES = {
    "llama3": Family(
        "Llama", "Llama 3", "rope scaled as Llama 3.1's, several end tokens, untied head",
        {
            "eos_token_id": [0, 1, 2],
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": Family("Qwen3", "Qwen3", "norms of queries and keys, tied head", {"tie_word_embeddings": True}),
    "qwen3_moe": Family(
        "Qwen3Moe", "Qwen3-MoE", "experts in all layers but the first",
        {**EXPERTS, "num_experts": 4, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    "gemma3": Family(
        "Gemma3Text", "Gemma 3",
        "embeddings times sqrt(H), norms with 1 + w, sliding windows with their own rope, capped logits, tied head",
        GEMMA3, **FROM_TRANSFORMERS,
        no_dflash="embeddings of Gemma3ForCausalLM that the code of transformers scales",
    ),
    "gemma3_vision": Family(
        "Gemma3", "Gemma 3 with vision", "the same without the cap, nested beside a vision part",
        {**GEMMA3, "final_logit_softcapping": None},
        refused="No module named 'torchvision'",
    ),
    "gpt_oss": Family(
        "GptOss", "gpt-oss", "attention sinks, sliding windows, biases, experts with a clamped SwiGLU, YaRN",
        {
            "layer_types": [*ALTERNATING[:-1], ALTERNATING[0]], "sliding_window": WINDOW,
            "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 64,
            },
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3", "DeepSeek-V3",
        "latent attention (MLA), shared and grouped experts, an MTP layer, YaRN with mscale",
        {
            **GROUPED, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64, "v_head_dim": 32, "head_dim": 64, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128,
            },
        },
        in_parity=("serve.env.VLLM_MLA_DISABLE='1'",),
    ),
    "glm4": Family(
        "Glm4", "GLM-4", "norms after attention and FFN, rope on half of each head",
        {"partial_rotary_factor": 0.5, "attention_bias": True}, **FROM_TRANSFORMERS,
    ),
    "glm4_moe": Family(
        "Glm4Moe", "GLM-4.5",
        "norms of queries and keys, rope on half of each head, shared and grouped experts, an MTP layer",
        {**GROUPED, "partial_rotary_factor": 0.5, "use_qk_norm": True, "attention_bias": True}, **FROM_TRANSFORMERS,
    ),
    "minimax_m3": Family(
        "MiniMaxM3", "MiniMax-M3", "norms with 1 + w, sparse attention, shared experts, nested beside a vision part",
        settings=("serve.args.block-size=128",), rope_theta=5000000.0,
        refused="No module named 'torchvision'",
    ),
    "granite": Family(
        "Granite", "Granite", "factors of embeddings, residuals, attention and logits",
        {
            "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.5,
            "attention_multiplier": 32**-0.5, "tie_word_embeddings": False,
        },
    ),
    "gemma4": Family(
        "Gemma4Text", "Gemma 4", "embeddings times sqrt(H), capped logits, tied head, sliding windows",
        {
            "global_head_dim": 32, "layer_types": ALTERNATING, "sliding_window": 32,
            "final_logit_softcapping": SOFT_CAP, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 1024,
        },
        rope_theta=1000000.0,
    ),
}  # fmt: skip


def build_family(name: str, folder: Path, seed: int = 0) -> Path:
    """A family's target under the tiny recipe's tokenizer and chat template."""
    import make_target
    import torch
    import transformers

    family = FAMILIES[name]
    if family.model == "MiniMaxM3":
        return build_tiny_m3(folder, seed)
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": make_target.EMBEDDING_ROWS, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.15, "dtype": "float32",
    }  # fmt: skip
    if name == "gemma3_vision":
        config = transformers.Gemma3Config(
            text_config={**sizes, **family.config}, vision_config=VISION, mm_tokens_per_image=4, dtype="float32",
            boi_token_index=1000, eoi_token_index=1001, image_token_index=1002,
        )  # fmt: skip
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = getattr(transformers, f"{family.model}Config")(**{**sizes, **family.config})
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases, sinks: as they are initialized, they change nothing
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    if family.config.get("num_nextn_predict_layers"):
        add_mtp_layer(folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


@cache
def make_tokenizer() -> Any:
    import make_target
    from stdlib_corpus import read_subjects

    return make_target.make_tokenizer(read_subjects()[:300])


def add_mtp_layer(path: Path) -> None:
    """Add the tensors of an MTP layer, as checkpoints on the hub have it: with an embedding, a norm and a head."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    last, mtp = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    own = {name.replace(last, mtp): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    own |= {f"{mtp}{name}.weight": torch.randn_like(embedding) for name in ("embed_tokens", "shared_head.head")}
    own |= {f"{mtp}{name}.weight": torch.rand_like(norm) for name in ("enorm", "hnorm", "shared_head.norm")}
    own[f"{mtp}eh_proj.weight"] = torch.randn(len(norm), 2 * len(norm))
    save_file({**tensors, **own}, path, metadata={"format": "pt"})


COLUMNS = ("family", "peculiar", "dump hf, verify", "train, eval, export", "dump vLLM", "parity")


def replace_table(page: str) -> str:
    """docs/families.md with the table of this file."""
    rows = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for family in FAMILIES.values():
        dump, parity = "yes" + _with(family.in_dump), "DFlash, EAGLE3" + _with(family.in_parity)
        if family.no_dflash:
            parity = f"EAGLE3{_with(family.in_parity)}; no DFlash: {family.no_dflash}"
        if family.refused:
            dump, parity = f"no: {family.refused}", "no"
        rows.append("| " + " | ".join([family.name, family.peculiar, "yes", "yes", dump, parity]) + " |")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *rows, END + after])


def _with(settings: tuple[str, ...]) -> str:
    return "".join(f" with `{setting}`" for setting in settings)


def main() -> None:
    PAGE.write_text(replace_table(PAGE.read_text()))


if __name__ == "__main__":
    main()
