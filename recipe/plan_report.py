"""Answer `recipe plan`: ask `train plan`, plan all stages, and print the page or its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.errors import UserError
from common.files import read_json
from common.stages import ask_stage
from recipe.budget import Budget, Change, find_changes
from recipe.figures import Figure
from recipe.hardware import find_node
from recipe.plan import MFU, Case, Page, make_page, training_gpus
from recipe.rates import Fleet, Measured
from recipe.recipe import Recipe
from target.target import Target

MARKS = {"measured": "m", "stated": "s", "estimated": "e"}


@dataclass(frozen=True)
class Request:
    """The options of `recipe plan`. `train_plan`: JSON of `train plan`, instead of asking it."""

    hardware: str | None
    nodes: int
    measured: Path | None
    window_gib: float | None
    train_plan: Path | None
    budget: Budget


def answer(recipe: Recipe, request: Request, *, as_json: bool) -> Page:
    """Plan what the options ask for, and print it. Raises UserError for a target that the nodes cannot hold."""
    hardware = request.hardware or recipe.serve.hardware or "h100"
    node = find_node(hardware)
    target = Target.of(recipe.target)
    fleet = Fleet.of(recipe, target, hardware, node, request.nodes)
    measured = Measured.of(request.measured) if request.measured else Measured()
    gpus = training_gpus(recipe, fleet.nodes * node.num_gpus)

    def ask_train(changed: Recipe) -> Mapping[str, Any]:
        return _ask_train(changed, hardware, gpus, measured.run)

    train = _read_train(request.train_plan, gpus) if request.train_plan else ask_train(recipe)
    window = request.window_gib * 2**30 / 1e9 if request.window_gib else None
    page = make_page(Case(recipe, target, fleet, measured, train, window))
    budget, changes = request.budget, list[Change]()
    _check_prices(page, budget)
    if budget != Budget() and not budget.holds(page):
        changes = find_changes(page.case, budget, ask_train)
    if as_json:
        asked = {"hours": budget.hours, "disk_gb": budget.disk_gb, "money": budget.money, "holds": budget.holds(page)}
        print(json.dumps({**page.to_json(), "budget": asked, "changes": [c.to_json() for c in changes]}, indent=1))
    else:
        show_page(page)
        show_budget(page, budget, changes)
    return page


def _ask_train(recipe: Recipe, hardware: str, gpus: int, run: Path | None) -> Mapping[str, Any]:
    """Return the JSON of `train plan` for a recipe; it builds the draft, which the recipe cannot import."""
    plan = recipe.plan
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        words = ["--gpu", hardware, "--gpus", gpus, "--mean-tokens", plan.mean_tokens, "--json"]
        words += ["--prompt-share", plan.prompt_share, "--mfu", plan.mfu or MFU, *(["--run", run] if run else [])]
        found: Mapping[str, Any] = json.loads(ask_stage("train", "plan", "--recipe", path, *words))
    return found


def _read_train(path: Path, gpus: int) -> Mapping[str, Any]:
    train: Mapping[str, Any] = read_json(path, "the output of `train plan --json`")
    if train.get("gpus") != gpus:
        raise UserError(
            path,
            found=f"a plan for {train.get('gpus')} GPUs",
            expected=f"one for {gpus}, as many as can train here",
            fix=f"Run `train plan --json --gpus {gpus}`, or leave out --train-plan.",
        )
    return train


def _check_prices(page: Page, budget: Budget) -> None:
    if budget.money is not None and page.money is None:
        raise UserError(
            "--budget-money", found="no price", expected="one of a GPU", fix="Add --set plan.gpu_hour_price=... ."
        )


def show_page(page: Page) -> None:
    """Print a plan; each figure has m (measured), s (stated) or e (estimated), and below what it is made from."""
    case, fleet = page.case, page.case.fleet
    section, plan = case.recipe.training(), case.recipe.plan
    print(f"pipeline   {case.recipe.target.path}, {section.draft.method}, K = {section.draft.num_draft_tokens}")
    epochs = case.epoch / case.conversations
    print(
        f"data       {case.conversations:,} conversations of {plan.mean_tokens} tokens, "
        f"{plan.prompt_share:.0%} of them in prompts; {epochs:.1f} epochs"
    )
    print(
        f"hardware   {fleet.nodes} x {fleet.node.num_gpus} {fleet.hardware}; {fleet.replica_gpus} GPUs hold the target"
    )
    print(f"\n{'stage':<8}{'nodes':>6}{'hours':>12}{'disk, GB':>14}{'GB of a GPU':>14}{'money':>14}")
    for stage in page.stages:
        figures = (_cell(stage.hours, 12, 2), _cell(stage.disk_gb, 14, 1), _cell(stage.gpu_gb, 14, 1))
        print(f"{stage.name:<8}{stage.nodes:>6}{''.join(figures)}{_cell(stage.money, 14, 0)}")
    if page.disk_money:
        print(f"{'disks':<8}{'':>46}{_cell(page.disk_money, 14, 0)}")
    print(f"{'all':<8}{'':>6}{_cell(page.hours, 12, 2)}{_cell(page.disk_gb, 14, 1)}{'':>14}{_cell(page.money, 14, 0)}")
    print("         m: measured, s: stated, e: estimated\n")
    for stage in page.stages:
        lines = {"tokens/s": stage.rate, "hours": stage.hours, "disk": stage.disk_gb, "memory": stage.gpu_gb}
        for name, figure in {**lines, "money": stage.money}.items():
            if figure is not None:
                print(f"{stage.name:<6} {name:<9} {figure.how}")
    for name, figure in {"disk": page.disk_gb, "disks": page.disk_money}.items():
        if figure is not None:
            print(f"{'all':<6} {name:<9} {figure.how}")
    if page.money is None:
        print("money: give --set plan.gpu_hour_price=PRICE, and --set plan.disk_tb_month_price=PRICE")
    for note in page.notes:
        print(f"note: {note}")


def show_budget(page: Page, budget: Budget, changes: list[Change]) -> None:
    """Print whether a plan is within the budget, and what to change."""
    if budget == Budget():
        return
    if not changes:
        print("budget     fits" if budget.holds(page) else "budget     fits with no change known here")
        return
    has_money = page.money is not None
    print(f"\n{'to fit the budget':<60}{'hours':>10}{'disk, GB':>12}" + (f"{'money':>12}" if has_money else ""))
    for change in changes:
        verdict = "fits: " if change.fits else "no:   "
        after = change.page
        money = f"{after.money.value:>12.0f}" if after.money else ""
        line = f"{verdict + change.words:<60}"
        line = line if len(line) == 60 else f"{line}\n{'':<60}"
        print(f"{line}{after.hours.value:>10.2f}{after.disk_gb.value:>12.1f}{money}  {change.cost}")


def _cell(figure: Figure | None, width: int, digits: int) -> str:
    if figure is None:
        return f"{'-':>{width}}"
    return f"{figure.value:>{width - 2},.{digits}f} {MARKS[figure.kind]}"
