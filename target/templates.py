"""Training templates, which render the text of a target's chat template and tag the assistant's turns.

Reads: the target's chat template, `target.training_template`. Loss masks of rendered rows come from `{% generation %}`
tags. Few targets' templates have them, so a recipe may name another template (chat_templates/).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from target.section import TargetSection
from target.target import Target
from target.thinking import template_arguments

if TYPE_CHECKING:
    from jinja2.nodes import Template as TemplateTree

TAG = re.compile(r"{%[-+]?\s*generation\s*-?%}")

_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": {"x": [1, True, "y"]}}}}
_USER, _REPLY = {"role": "user", "content": "How many? ¿Sí?"}, {"role": "assistant", "content": "Four."}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [_USER]},
    {"messages": [_USER, _REPLY, _USER, _REPLY]},
    {"messages": [{"role": "system", "content": "Be terse."}, _USER, _REPLY]},
    {"messages": [_USER, {**_REPLY, "reasoning_content": "Two and two."}, _USER, _REPLY]},
    {
        "messages": [_USER, {**_REPLY, "tool_calls": [_CALL]}, {"role": "tool", "content": "5"}, _REPLY],
        "tools": [_TOOL],
    },
]
MODES = (None, "enabled", "disabled", "adaptive")


def tagged_template(section: TargetSection, target: Target) -> str | None:
    """Return the template with generation tags, the target's or the recipe's; None without one."""
    own = target.find_chat_template()
    if own and TAG.search(own):
        return own
    return section.training_template.read_text(encoding="utf-8") if section.training_template else None


def rendering_template(section: TargetSection, target: Target) -> str:
    """Return the template that renders rows: the target's own, or the recipe's if the target has none."""
    own = target.find_chat_template()
    if own is None and section.training_template:
        return section.training_template.read_text(encoding="utf-8")
    return own if own is not None else target.chat_template  # raises the UserError


def check_training_template(section: TargetSection, target: Target) -> None:
    """Raise UserError if the recipe's template renders other text than the target's in any thinking mode.

    Probes that the target's template cannot render are skipped: not every target has tools.
    """
    own = target.find_chat_template()
    if section.training_template is None or own is None:
        return
    ours = section.training_template.read_text(encoding="utf-8")
    for probe in _probes(section, own):
        expected, found = probe.render(own), probe.render(ours)
        if expected is not None and found != expected:
            raise UserError(
                f"target.training_template ({section.training_template})",
                found=f"for {probe.name}: {_from_difference(found or '', expected)}",
                expected=f"{_from_difference(expected, found or '')}, as the template of {target.path} renders",
                fix="Bring the template up to date with the target's.",
            )


def render_probes(section: TargetSection, template: str) -> Iterator[str]:
    """Yield what a template renders for conversations of every kind in every thinking mode."""
    for probe in _probes(section, template):
        if (text := probe.render(template)) is not None:
            yield text


def variables_of(template: str) -> set[str]:
    """Return the names of a template's arguments."""
    from jinja2 import meta

    return meta.find_undeclared_variables(_parse(template))


def values_of(template: str, variable: str) -> list[str]:
    """Return the strings that a template compares an argument with, or takes for its default, in their order.

    Names that are set from the argument count as the argument: `set mode = thinking_mode | default('adaptive')`.
    """
    from jinja2 import nodes

    tree, names = _parse(template), {variable}

    def mentions(node: nodes.Node) -> bool:
        return any(name.name in names for name in [node, *node.find_all(nodes.Name)] if isinstance(name, nodes.Name))

    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and mentions(assignment.node):
            names.add(assignment.target.name)
    compared = [node for node in tree.find_all(nodes.Compare) if mentions(node.expr)]
    defaults = [node for node in tree.find_all(nodes.Filter) if node.name == "default" and node.node]
    places = [*compared, *(node for node in defaults if node.node and mentions(node.node))]
    constants = [constant.value for place in places for constant in place.find_all(nodes.Const)]
    return list(dict.fromkeys(value for value in constants if isinstance(value, str) and value))


def _parse(template: str) -> TemplateTree:
    """Return a template's syntax tree; `{% generation %}` and loop controls are known. Raises UserError if broken."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])  # noqa: S701 (text, not HTML)
    try:
        return environment.parse(template)
    except TemplateSyntaxError as error:
        raise UserError(
            "the chat template",
            found=f"{error.message} in line {error.lineno}",
            expected="a jinja template as transformers renders it",
            fix="Correct the target's chat_template.jinja.",
        ) from None


@dataclass(frozen=True)
class _Probe:
    """A conversation to render. `arguments`: those of the chat template for a thinking mode."""

    name: str
    conversation: dict[str, Any]
    add_generation_prompt: bool
    arguments: dict[str, Any]

    def render(self, template: str) -> str | None:
        """Return the text; None if the template refuses such a conversation."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                conversations=[self.conversation["messages"]],
                tools=self.conversation.get("tools"),
                chat_template=template,
                add_generation_prompt=self.add_generation_prompt,
                **self.arguments,
            )
        except (TemplateError, TypeError):
            return None
        return str(texts[0])


def _probes(section: TargetSection, template: str) -> Iterator[_Probe]:
    """Yield every kind of conversation in every mode: usual ones, the recipe's, and those that the template names."""
    modes = dict.fromkeys((*MODES, *section.thinking_mode_values, *values_of(template, section.thinking_mode_name)))
    for number, conversation in enumerate(CONVERSATIONS):
        for mode in modes:
            arguments = template_arguments(section, mode)
            for add_generation_prompt in (False, True):
                name = f"probe {number}, mode {mode or 'unset'}"
                yield _Probe(name, conversation, add_generation_prompt, arguments)


def _from_difference(text: str, other: str) -> str:
    """Return the excerpt where a text begins to differ from another, quoted."""
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, place - 20) : place + 20])
