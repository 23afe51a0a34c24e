"""What to change so that a plan fits a budget of hours, disk or money, with the figures that each change gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recipe.plan import Case, Page, make_page
from recipe.recipe import Recipe
from recipe.sizes import form_of

WINDOW_SHARE = 0.02
"""Of the whole store: the window that is planned. `docs/distributed.md` has what a smaller one costs."""
STEPS_OF_SHARE = 40
"""Halvings of the interval in which the largest share of the conversations within the budget lies."""

AskTrain = Callable[[Recipe], Mapping[str, Any]]
"""Asks `train plan` about another draft than the recipe's."""


@dataclass(frozen=True)
class Budget:
    """Most hours, GB on disk and money; None: no limit."""

    hours: float | None = None
    disk_gb: float | None = None
    money: float | None = None

    def holds(self, page: Page) -> bool:
        """Return whether a plan is within all limits. A limit of money needs prices."""
        limits = ((self.hours, page.hours), (self.disk_gb, page.disk_gb), (self.money, page.money))
        return all(limit is None or (figure is not None and figure.value <= limit) for limit, figure in limits)


@dataclass(frozen=True)
class Change:
    """A change of the recipe or of the commands, the plan with it, and what it costs besides."""

    words: str
    page: Page
    fits: bool
    cost: str

    def to_json(self) -> dict[str, Any]:
        totals = {"hours": self.page.hours, "disk_gb": self.page.disk_gb, "money": self.page.money}
        values = {name: figure.value for name, figure in totals.items() if figure is not None}
        return {"change": self.words, "fits": self.fits, **values, "cost": self.cost}


def find_changes(case: Case, budget: Budget, ask_train: AskTrain) -> list[Change]:
    """Return single changes with their figures, those that fit first; then the cheapest store with fewer tokens."""
    singles = [Change(words, page, budget.holds(page), cost) for words, page, cost in _singles(case, ask_train)]
    fewer = _fewer_tokens(case, budget, "")
    if fewer is not None:
        singles.append(fewer)
    if not any(change.fits for change in singles):
        smallest = min(singles, key=lambda change: change.page.disk_gb.value)
        both = _fewer_tokens(smallest.page.case, budget, f"{smallest.words}, and ")
        singles += [both] if both is not None else []
    return sorted(singles, key=lambda change: not change.fits)


def _singles(case: Case, ask_train: AskTrain) -> Iterator[tuple[str, Page, str]]:
    """Yield a change, the plan with it, and its cost."""
    store = case.recipe.dump
    for dtype in ("fp8_e4m3", "int4"):
        if dtype != store.dtype and not (store.dtype == "int4" and dtype == "fp8_e4m3"):
            yield f"dump.dtype: {dtype}", make_page(_with_store(case, dtype=dtype)), "docs/measured.md has the effect"
    needs = case.recipe.training().draft.needs_final_states
    if store.final_states == "keep" and not needs:
        dropped = _with_store(case, final_states="drop")
        yield "dump.final_states: drop", make_page(dropped), "another store is needed for objectives that distill"
    fleet = case.fleet
    if case.window_gb is None and fleet.nodes * fleet.node.num_gpus > fleet.replica_gpus:
        whole = next(stage for stage in make_page(case).stages if stage.name == "dump").disk_gb.value
        rolling = replace(case, window_gb=WINDOW_SHARE * whole)
        words = f"dump run --window {WINDOW_SHARE * whole * 1e9 / 2**30:.0f} with train offline --follow"
        yield words, make_page(rolling), "a capture for each epoch, beside the training"
    for words, recipe in _smaller_drafts(case.recipe):
        yield words, make_page(replace(case, recipe=recipe, train=ask_train(recipe))), "accepts less: `recipe forecast`"


def _with_store(case: Case, **changes: str) -> Case:
    """Return the case with other values of `dump`; the bytes that a step reads are those of the new states."""
    recipe = case.recipe.model_copy(update={"dump": case.recipe.dump.model_copy(update=changes)})
    read = {name: _read_bytes(case, one) for name, one in (("old", case.recipe), ("new", recipe))}
    train = {**case.train, "bytes_read_per_step": case.train["bytes_read_per_step"] * read["new"] / read["old"]}
    return replace(case, recipe=recipe, train=train)


def _read_bytes(case: Case, recipe: Recipe) -> int:
    form = form_of(recipe, case.target)
    if not recipe.training().draft.needs_final_states:
        form = replace(form, final_state="none")
    return form.num_bytes(recipe.plan.mean_tokens)


def _smaller_drafts(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield the recipe with half the draft's layers, or, for one layer, half the width of its MLP."""
    draft = recipe.training().draft
    for key in ("num_layers", "intermediate_size"):
        value = getattr(draft, key, None)
        if isinstance(value, int) and value > 1:
            smaller = draft.model_copy(update={key: value // 2})
            section = recipe.training().model_copy(update={"draft": smaller})
            yield f"train.draft.{key}: {value // 2}", recipe.model_copy(update={"train": section})
            return


def _fewer_tokens(case: Case, budget: Budget, before: str) -> Change | None:
    """Return the change to as many conversations as the budget allows; None if even few are too many."""
    low, high = 0.0, 1.0
    for _ in range(STEPS_OF_SHARE):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.holds(make_page(case.with_share(middle))) else (low, middle)
    smaller = case.with_share(low)
    page = make_page(smaller)
    if not budget.holds(page) or smaller.conversations * 1000 < case.conversations:
        return None
    words = (
        f"{before}{smaller.conversations} conversations, {low:.1%} (plan.conversations, train.num_steps: "
        f"{smaller.recipe.training().num_steps})"
    )
    return Change(words, page, True, "`recipe forecast` tells what they give")
