"""Claims about masks of rendered rows: the template's tags say what was generated, the row's own mode renders it."""

from __future__ import annotations

import shutil

import pytest
from transformers import AutoTokenizer

from contracts.conversation import Conversation, Sample
from dump.rendered import TemplateMasks
from recipe.load import load_recipe
from recipe.recipe import Recipe
from target.target import Target

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]


def make(recipe: Recipe, mode: str, reply: dict[str, str], rendered: bool = True) -> tuple[Conversation, int, int]:
    """A rendered row whose recorded span is wrong, and where its reply really starts and ends."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.target.path)
    messages = [*PROMPT, reply]
    prompt = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True, thinking_mode=mode)
    whole = tokenizer.apply_chat_template(messages, tokenize=False, thinking_mode=mode)
    ids = tokenizer.encode(whole.rstrip("\n"), add_special_tokens=False)
    start = len(tokenizer.encode(prompt, add_special_tokens=False))
    conversation = Conversation(
        id="0" * 32, source_id="", index=0, messages=messages, thinking_mode=mode, finish_reason="stop",
        samples=[Sample(token_ids=ids, loss_spans=[(0, 1)])], rendered=rendered, sampling={}, target={}, template="",
        usage={},
    )  # fmt: skip
    return conversation, start, len(ids)


@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive"])
def test_a_rendered_rows_spans_are_the_tags_less_the_generation_prompt(recipe_path, mode: str) -> None:  # type: ignore[no-untyped-def]
    recipe = load_recipe(recipe_path)
    masks = TemplateMasks(recipe.target, Target.read(recipe.target.path))
    thought = {"reasoning_content": "think"} if mode == "enabled" else {}
    conversation, start, end = make(recipe, mode, {"role": "assistant", "content": "A row of things.", **thought})
    (sample,) = masks.apply(conversation)
    # Disabled: the generation prompt ends with the mark that the tag begins with.
    assert sample.loss_spans == [(start, end)]
    assert (masks.tagged, masks.recorded) == (1, 0)


def test_a_row_of_other_ids_and_one_that_is_not_rendered_keep_their_recorded_spans(recipe_path) -> None:  # type: ignore[no-untyped-def]
    recipe = load_recipe(recipe_path)
    masks = TemplateMasks(recipe.target, Target.read(recipe.target.path))
    exact, _, _ = make(recipe, "adaptive", {"role": "assistant", "content": "Yes."}, rendered=False)
    assert masks.apply(exact)[0].loss_spans == [(0, 1)]
    other, _, _ = make(recipe, "adaptive", {"role": "assistant", "content": "Yes."})
    other.samples[0].token_ids[3] += 1
    assert masks.apply(other)[0].loss_spans == [(0, 1)]
    assert (masks.tagged, masks.recorded) == (0, 1)


def test_a_target_without_tags_takes_those_of_the_recipes_template(recipe_path, target_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    tagged = (target_folder / "chat_template.jinja").read_text()
    bare = tagged.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    shutil.copytree(target_folder, tmp_path / "target")
    (tmp_path / "target/chat_template.jinja").write_text(bare)
    (tmp_path / "ours.jinja").write_text(tagged)
    path = f"target.path={tmp_path / 'target'}"
    recipe = load_recipe(recipe_path, [path, f"target.training_template={tmp_path / 'ours.jinja'}"])
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    reply = {"role": "assistant", "content": "Yes.", "tool_calls": [call]}
    for wanted, other in ((recipe, 1), (load_recipe(recipe_path, [path]), 0)):
        masks = TemplateMasks(wanted.target, Target.read(wanted.target.path))
        conversation, start, end = make(wanted, "enabled", reply)  # type: ignore[arg-type]
        assert masks.apply(conversation)[0].loss_spans == ([(start, end)] if other else [(0, 1)])
        assert masks.tagged == other
