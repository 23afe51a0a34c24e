"""Claims about the mask token: a row or token that never occurs, whatever rows the tokenizer leaves free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, run_here
from safetensors.torch import load_file, save_file

from common.errors import UserError
from recipe.check import check_recipe
from recipe.init import init_recipe
from recipe.load import load_recipe
from target.free_rows import note_free_rows
from target.mask_token import Tokens, choose_mask_token, explain_mask_token, find_mask_token
from target.section import TargetSection
from target.target import Target

TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n"
    "{{ m.content }}{{ '<|' + 'eot' + '_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
LLAMA = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]  # fmt: skip
SMOLLM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<jupyter_script>"]
BASE = 50


def write_target(
    folder: Path,
    added: Sequence[str | dict[str, Any]],
    *,
    rows: int | None = None,
    template: str = TEMPLATE,
    tokenizer_config: dict[str, Any] | None = None,
    **config: Any,
) -> Target:
    """A target without weights: 50 tokens and then `added` ones, special unless they say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [token if isinstance(token, dict) else {"content": token} for token in added]
    numbered = [{"id": BASE + i, "special": True, **token} for i, token in enumerate(tokens)]
    tokenizer = {"model": {"vocab": {f"t{i}": i for i in range(BASE)}}, "added_tokens": numbered}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}))
    (folder / "chat_template.jinja").write_text(template)
    values = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 5, "rope_theta": 10000.0,
        "vocab_size": rows or BASE + len(added), **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return Target.read(folder)


def write_llama(folder: Path, **more: Any) -> Target:
    """As Llama 3: every row has a token, 256 of them special; one end token is named in generation_config.json only."""
    target = write_target(folder, LLAMA, bos_token_id=BASE, eos_token_id=BASE + 1, **more)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [BASE + 1, BASE + 8]}))
    return target


def section_of(target: Target, **values: Any) -> TargetSection:
    return TargetSection(path=target.path, **values)


def write_recipe(target: Target, **values: Any) -> Path:
    path = target.path.parent / "recipe.yaml"
    draft = {
        "method": "dflash", "block_size": 4, "num_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64,
    }  # fmt: skip
    section = {"path": str(target.path), "num_aux_layers": 2, **values}
    path.write_text(json.dumps({"target": section, "train": {"num_steps": 1, "draft": draft}}))
    return path


def test_a_recipe_for_a_llama_3_like_target_passes_with_its_last_reserved_token(tmp_path: Path) -> None:
    target = write_llama(tmp_path / "target")
    last = BASE + len(LLAMA) - 1
    assert len(LLAMA) == 256
    assert choose_mask_token(section_of(target), target) == last
    printed = run_here("recipe", "check", "--recipe", write_recipe(target)).stdout
    assert (
        f"mask token: {last}, '<|reserved_special_token_247|>', a reserved token that the chat template never renders; "
        "every row of the embedding has a token\n"
    ) in printed
    check_recipe(load_recipe(write_recipe(target, mask_token_id=BASE + 2)))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("<|start_header_id|>", "'<|start_header_id|>', which the chat template renders"),
        ("<|eot_id|>", "'<|eot_id|>', which the chat template renders"),  # put together of parts
        ("<|end_of_text|>", "the target's eos_token_id"),
        ("<|eom_id|>", "the target's eos_token_id"),  # of generation_config.json
        ("<|begin_of_text|>", "the target's bos_token_id"),
        ("<|finetune_right_pad_id|>", "the target's pad_token"),
        ("<|reserved_special_token_0|>", "the target's image_token"),
        ("<|reserved_special_token_7|>", "part of target.thinking_tags"),
    ],
)
def test_a_special_token_that_the_target_uses_is_refused_with_its_use(tmp_path: Path, content: str, found: str) -> None:
    roles = {"pad_token": {"content": "<|finetune_right_pad_id|>"}, "image_token": "<|reserved_special_token_0|>"}
    target = write_llama(tmp_path / "target", tokenizer_config=roles)
    tags = ["<|reserved_special_token_7|>\n", "</think>"]
    recipe = load_recipe(write_recipe(target, mask_token_id=BASE + LLAMA.index(content), thinking_tags=tags))
    with pytest.raises(UserError) as error:
        check_recipe(recipe)
    assert found in str(error.value)
    without = load_recipe(write_recipe(target, thinking_tags=tags), ["train=null"])
    check_recipe(without)
    with pytest.raises(UserError):  # synthesis filters it, whatever the method
        check_recipe(load_recipe(tmp_path / "recipe.yaml", ["train=null", f"target.mask_token_id={BASE + 1}"]))


def test_a_token_of_the_vocabulary_is_refused_though_the_template_never_renders_it(tmp_path: Path) -> None:
    target = write_target(tmp_path, [*LLAMA, {"content": "<common>", "special": False}])
    for token in (7, BASE + len(LLAMA)):
        with pytest.raises(UserError, match="a token of the tokenizer that is not special"):
            choose_mask_token(section_of(target, mask_token_id=token), target)


def test_of_a_real_tokenizer_every_row_above_its_ids_is_free_and_no_other(target_folder: Path) -> None:
    target = Target.read(target_folder)
    free = choose_mask_token(section_of(target), target)
    assert choose_mask_token(section_of(target, mask_token_id=free + 1), target) == free + 1
    with pytest.raises(UserError, match="a token of the tokenizer"):
        choose_mask_token(section_of(target, mask_token_id=free - 1), target)
    for token in (target.vocab_size, -1):
        with pytest.raises(UserError, match="no row in"):
            choose_mask_token(section_of(target, mask_token_id=token), target)


def test_a_rendering_in_one_thinking_mode_alone_counts(tmp_path: Path) -> None:
    template = TEMPLATE + "{% if depth == 'deep' %}{{ '<|reserved' + '_special_token_247|>' }}{% endif %}"
    target = write_llama(tmp_path, template=template)
    last = BASE + len(LLAMA) - 1
    assert choose_mask_token(section_of(target), target) == last
    deep = section_of(target, thinking_mode_name="depth", thinking_mode_values={"high": "deep"})
    assert choose_mask_token(deep, target) == last - 1
    named = section_of(target, thinking_mode_name="depth")  # "deep" is in the template alone
    assert choose_mask_token(named, target) == last - 1


@pytest.mark.parametrize(
    "hidden", ["", "{% if enable_thinking %}{{ '<|reserved' + '_special_token_247|>' }}{% endif %}"]
)
def test_recipe_init_proposes_the_token_that_these_rules_choose_and_tells_why(tmp_path: Path, hidden: str) -> None:
    target = write_llama(tmp_path / "target", template=TEMPLATE + hidden)
    text = init_recipe(target.path, "dflash", 1).text
    number = 246 if hidden else 247
    assert yaml.safe_load(text)["target"]["mask_token_id"] == BASE + LLAMA.index(f"<|reserved_special_token_{number}|>")
    assert f"# '<|reserved_special_token_{number}|>', a reserved token that the chat template never renders" in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_reserved_tokens_the_last_special_one_without_a_use_is_chosen(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    target = write_target(tmp_path / "a", SMOLLM, template=template, pad_token_id=BASE + 2)
    assert explain_mask_token(section_of(target), target) == (
        BASE + 5,
        "'<jupyter_script>', a special token that the chat template never renders; every row of the embedding has a "
        "token",
    )
    used = template + "".join(SMOLLM)
    none = write_target(tmp_path / "b", SMOLLM, template=used)
    assert find_mask_token(section_of(none), none) is None
    with pytest.raises(UserError, match="no special token without a use"):
        choose_mask_token(section_of(none), none)


def test_a_reserved_token_comes_before_a_later_one_that_has_a_meaning(tmp_path: Path) -> None:
    target = write_target(tmp_path, [*LLAMA, "<|fim_hole|>"])
    assert choose_mask_token(section_of(target), target) == BASE + len(LLAMA) - 1


def test_a_free_row_comes_before_any_special_token(tmp_path: Path) -> None:
    above = write_target(tmp_path / "a", LLAMA, rows=BASE + 300)
    assert choose_mask_token(section_of(above), above) == BASE + 256
    assert explain_mask_token(section_of(above), above)[1] == "a free row: no token of the tokenizer has it"
    assert choose_mask_token(section_of(above, mask_token_id=BASE + 40), above) == BASE + 40
    gap = write_target(tmp_path / "b", [*LLAMA, {"content": "<last>", "id": BASE + 257}], rows=BASE + 258)
    assert choose_mask_token(section_of(gap), gap) == BASE + 256


def test_reserved_names_count_though_they_are_not_marked_as_special(tmp_path: Path) -> None:
    names = ["<unused0>", "<unused98>", "<|reserved_246|>", "<extra_id_3>", "[unused7]", "<SPECIAL_12>", "<extra_0>"]
    plain = ["unusual", "<image>", "<|placeholder|>", "<special>"]
    added = [{"content": name, "special": False} for name in (*names, *plain)]
    target = write_target(tmp_path, added)
    assert sorted((Tokens.of(target).special or {}).values()) == sorted(names)


def test_tokens_that_tokenizer_config_alone_has_are_no_free_rows(tmp_path: Path) -> None:
    decoder = {str(BASE + 256): {"content": "<late>", "special": False}}
    target = write_target(tmp_path, LLAMA, rows=BASE + 260, tokenizer_config={"added_tokens_decoder": decoder})
    assert choose_mask_token(section_of(target), target) == BASE + 257


def test_without_the_tokenizer_a_full_embedding_takes_the_recipes_token_and_needs_one(tmp_path: Path) -> None:
    facts = {
        "architecture": "LlamaForCausalLM", "hidden_size": 64, "num_hidden_layers": 5, "vocab_size": 306,
        "rope_theta": 10000.0, "highest_token_id": 305,
    }  # fmt: skip
    target = Target.of(TargetSection(path=tmp_path / "away", facts=facts))
    recipe = write_recipe(target, facts=facts)
    with pytest.raises(UserError, match="choosing one needs the target's tokenizer"):
        check_recipe(load_recipe(recipe))
    check_recipe(load_recipe(recipe, ["target.mask_token_id=305"]))
    with pytest.raises(UserError, match="a token of the tokenizer"):
        check_recipe(load_recipe(recipe, ["target.mask_token_id=305", "target.facts.vocab_size=307"]))


def test_a_token_in_the_recipes_thinking_tags_is_not_chosen(tmp_path: Path) -> None:
    target = write_llama(tmp_path)
    tags = ("<|reserved_special_token_247|>", "</think>")
    assert choose_mask_token(section_of(target, thinking_tags=tags), target) == BASE + len(LLAMA) - 2


def test_free_rows_longer_than_the_median_token_are_noted(
    target_folder: Path, recipe_path: Path, tmp_path: Path
) -> None:
    assert note_free_rows(Target.read(target_folder)) == ""
    for path in target_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    first = max(Tokens.of(Target.read(tmp_path)).ids) + 1
    tensors["lm_head.weight"][first + 2 : first + 4] = 1.0
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    norms = tensors["lm_head.weight"].norm(dim=1)
    assert norms[first + 2] > torch.median(norms[:first])
    printed = run_here("recipe", "check", "-r", recipe_path, "--set", f"target.path={tmp_path}").stdout
    num_free = len(norms) - first
    assert f"note: 2 of the {num_free} rows from {first} on, which no token has, are longer in the lm_head" in printed


def test_m3s_recipe_tells_its_free_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = run_here("recipe", "check", "-r", "recipes/MiniMax-M3-DFlash/recipe.yaml").stdout
    assert "mask token: 200061, a free row: target.facts.highest_token_id is 200060\n" in printed
