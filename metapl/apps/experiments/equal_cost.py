"""Methods at equal cost: as many steps each as take the same number of operations."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from metapl.apps.recipes.base import Recipe, Task, rehearse
from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.apps.recipes.methods.noisy_student import FINETUNED, FIRST, first_teacher
from metapl.apps.recipes.settings import SelfTraining
from metapl.errors import MetaplError
from metapl.execution.device import to_device
from metapl.metrics.cost import flops
from metapl.training import FitResult, Trainer

SHARES = ("wait", "warmup", "uda_ramp", "uda_start")
"""Fields of recipes that count steps, and become more or fewer with them; :func:`with_steps` scales the steps of a
warm start likewise."""


def operations(recipe: Recipe, method: str, task: Task) -> float:
    """Floating-point operations of products and convolutions in all steps of a method, its earlier phases included.

    Cost: a step of each kind in each phase; the default generator is put back. Passes that label, validate and test are
    not counted, and neither are finetunings: their steps are :attr:`~metapl.apps.recipes.Recipe.finetune_steps`,
    whatever the steps of the method are.
    """
    return sum(_by_phase(recipe, method, task).values())


def _by_phase(recipe: Recipe, method: str, task: Task) -> dict[str, float]:
    """:func:`operations` of each phase by its name."""
    spent: defaultdict[str, float] = defaultdict(float)

    def count(
        trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, *, phase: str = "fit", **over: Any
    ) -> FitResult:
        if not phase.endswith(FINETUNED):
            batches = [
                torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: to_device(t, trainer.device), source[0])
                if source is not None
                else None
                for source in (labeled, unlabeled)
            ]
            steps = over.get("steps", recipe.steps)
            for first, last, step in kinds_of_steps(trainer, steps, over.get("wait", 0)):
                trainer.steps_done = first
                spent[phase] += (last - first) * flops(partial(step, *batches))
        return FitResult(None, 0, {})

    rehearse(recipe.compared(method, recipe.seed), task, count, recipe.torch_device())
    return spent


def kinds_of_steps(trainer: Trainer, steps: int, wait: int) -> list[tuple[int, int, Any]]:
    """The first and the last step of each kind, and what does it: they differ while a student waits, and before a loss
    such as UDA begins."""
    waits = min(wait, steps) if trainer.teacher is not None else 0
    ends = sorted({0, waits, steps, *(min(start, steps) for start in trainer.late_starts)})
    return [(a, b, trainer.teacher_step if a < waits else trainer.step) for a, b in pairwise(ends)]


def at_equal_cost(recipe: Recipe, methods: Sequence[str], task: Task) -> dict[str, Recipe]:
    """For each method the recipe with which it costs what the first one costs with the recipe as it is.

    The first teacher, of methods that have one, is trained alike in all of them, by
    :class:`~metapl.apps.recipes.settings.FirstTeacher`: as in the first of these methods. What is left of the cost
    decides the steps of the rest. So for the same seed all of them learn from the same labels.

    Raises:
        MetaplError: a method cannot be trained on the recipe's data.
    """
    costs: dict[str, dict[str, float]] = {}
    for method in methods:
        try:
            costs[method] = _by_phase(recipe, method, task)
        except MetaplError as error:
            raise MetaplError(f"{method}: {error}") from error
    totals = {method: sum(cost.values()) for method, cost in costs.items()}

    def sized(method: str, cost: float, own: float) -> Recipe:
        return with_steps(recipe.compared(method, recipe.seed), max(1, round(cost / own * recipe.steps)))

    whole = totals[methods[0]]
    found = {method: sized(method, whole, total) for method, total in totals.items()}
    teaching = [method for method in methods if EVERY_METHOD[method].selects]
    for method in teaching:
        shared, taught = first_teacher(found[teaching[0]])[1], costs[method][FIRST]
        rest = sized(method, whole - taught * shared.steps / recipe.steps, totals[method] - taught)
        rounds: Any = rest.method.selection
        found[method] = rest.with_method(self_training=dataclasses.replace(rounds, first=shared))
    return found


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps, and its phases and validations in proportion."""
    share, rounds = steps / recipe.steps, recipe.method.selection
    fields, own = (
        {name: round(share * value) for name in SHARES if (value := getattr(one, name, None))}
        for one in (recipe, recipe.method)
    )
    of_method: dict[str, Any] = {**own}
    if "wait" in own:
        of_method["wait"] = min(own["wait"], steps - 1)
    if isinstance(rounds, SelfTraining) and rounds.warm_steps is not None:
        warm = max(1, round(share * rounds.warm_steps))
        of_method["self_training"] = dataclasses.replace(rounds, warm_steps=warm)
    every, method = max(1, round(share * recipe.validate_every)), dataclasses.replace(recipe.method, **of_method)
    changed: dict[str, Any] = {**fields, "steps": steps, "validate_every": every, "method": method}
    return dataclasses.replace(recipe, **changed)
