"""Methods at equal cost: as many steps each as take the same number of operations."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from metapl.apps.experiments.methods import compared, rehearse
from metapl.apps.recipes.base import Recipe, Task
from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.apps.recipes.methods.noisy_student import FINETUNED, FIRST, first_teacher
from metapl.apps.recipes.self_training import SelfTraining
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
        if phase.endswith(FINETUNED):
            return FitResult(None, 0, {})
        batches = [None if source is None else _on(source[0], trainer.device) for source in (labeled, unlabeled)]
        steps, wait = over.get("steps", recipe.steps), over.get("wait", 0)
        waits = min(wait, steps) if trainer.teacher is not None else 0
        begins = [min(start, steps) for start in trainer.late_starts]
        # Steps differ while a student waits, and before a loss such as UDA begins: one of each kind is counted.
        for first, last in pairwise(sorted({0, waits, *begins, steps})):
            trainer.steps_done = first
            step = trainer.teacher_step if first < waits else trainer.step
            spent[phase] += (last - first) * flops(partial(step, *batches))
        return FitResult(None, 0, {})

    own = compared(recipe, method, recipe.seed)
    rehearse(own, task, count, recipe.torch_device())
    return spent


def _on(batch: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map(lambda t: to_device(t, device) if isinstance(t, torch.Tensor) else t, batch)


def at_equal_cost(recipe: Recipe, methods: Sequence[str], task: Task) -> dict[str, Recipe]:
    """For each method the recipe with which it costs what the first one costs with the recipe as it is.

    The first teacher, of methods that have one, is trained alike in all of them, by
    :class:`~metapl.apps.recipes.self_training.FirstTeacher`: as in the first of these methods. What is left of the cost
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
    whole = totals[methods[0]]
    own = {method: compared(recipe, method, recipe.seed) for method in methods}
    sized = {method: with_steps(own[method], _steps(recipe, whole / total)) for method, total in totals.items()}
    teaching = [method for method in methods if EVERY_METHOD[method].selects]
    for method in teaching:
        shared = first_teacher(sized[teaching[0]])[1]
        on_it = costs[method][FIRST] * shared.steps / recipe.steps
        of_rest = with_steps(own[method], _steps(recipe, (whole - on_it) / (totals[method] - costs[method][FIRST])))
        rounds = of_rest.method.selection
        assert rounds is not None  # they select
        sized[method] = of_rest.with_method(self_training=dataclasses.replace(rounds, first=shared))
    return sized


def _steps(recipe: Recipe, share: float) -> int:
    """So many times the recipe's steps."""
    return max(1, round(share * recipe.steps))


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps, and its phases and validations in proportion."""
    share = steps / recipe.steps
    of_recipe, method = (
        {name: round(share * value) for name in SHARES if (value := getattr(one, name, None))}
        for one in (recipe, recipe.method)
    )
    if "wait" in method:
        method["wait"] = min(method["wait"], steps - 1)
    changed: dict[str, Any] = {**method}
    rounds = recipe.method.selection
    if isinstance(rounds, SelfTraining) and rounds.warm_steps is not None:
        warm = max(1, round(share * rounds.warm_steps))
        changed["self_training"] = dataclasses.replace(rounds, warm_steps=warm)
    every, own = max(1, round(share * recipe.validate_every)), dataclasses.replace(recipe.method, **changed)
    fields: dict[str, Any] = {**of_recipe, "steps": steps, "validate_every": every, "method": own}
    return dataclasses.replace(recipe, **fields)
