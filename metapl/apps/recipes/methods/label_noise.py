"""Labels that may be wrong, with a few that are right: what is learned about them, or which are learned from.

Where something is learned about the given labels, they are learned from as they are first: while the network knows
nothing yet, whatever it learns from helps it, and all weights would grow. A task's ``labeled`` batches are clean, its
``unlabeled`` ones have the given labels, and ``everything`` has both.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from metapl.apps.recipes.base import Method, Phase, Phases, Recipe, Run, Task, variant
from metapl.apps.recipes.methods.alone import ONE, alone
from metapl.apps.recipes.methods.beside import altered, bilevel
from metapl.apps.recipes.settings import OpenOptimizer, Optimizer, SomeSteps, require
from metapl.feedback import estimator
from metapl.models import Corrector
from metapl.problems import (
    ExampleWeights,
    LabelCorrection,
    MetaWeightNet,
    NoiseTransition,
    Problem,
    Table,
    WeightNet,
)
from metapl.problems.losses import CrossEntropy

TRUSTED = 4.0  # logit of "no noise" in a matrix of label noise, and of the given label in a corrector, at first
PLAIN = (CrossEntropy(),)


@dataclass(frozen=True, kw_only=True)
class LabelOptimizer(OpenOptimizer):
    """The optimizer of what is learned about labels.

    Args:
        lr: learning rate; by default 0.1 for example_weights, 0.05 for noise_transition, and 0.001 for the others.
    """

    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Doubting(Method):
    """A network, some of whose labels may be wrong.

    Args:
        student: the network's optimizer.
    """

    doubting = True
    place = "compared"

    student: Optimizer = field(default_factory=OpenOptimizer)


class Plain(
    Doubting, name="plain", title="plain, given and clean labels", networks=ONE, one_network=True, idle=("clean_batch",)
):
    """All labels as they are."""

    def source(self, task: Task) -> Any:
        return task.everything

    def phases(self, run: Run) -> Phases:
        yield alone(run.recipe, run.task, run.student, self.student, PLAIN, labeled=self.source(run.task))


class Clean(Plain, name="clean", title="plain, clean labels alone", idle=("labeled_batch",)):
    """The clean labels alone."""

    def source(self, task: Task) -> Any:
        return task.labeled


@dataclass(frozen=True, kw_only=True)
class LearnedLabels(Doubting):
    """Something about labels is learned from what helps on the clean ones.

    Args:
        teacher: the optimizer of what is learned about labels.
        mode: how the gradient of what is learned about labels is found: forward is exact; difference is for networks
            that forward-mode differentiation does not know.
        warm_steps: steps on all labels as they are, before anything is learned about them; by default 20 % of all.
    """

    control = "plain"
    rate: ClassVar[float] = 1e-3  # the learning rate of what is learned, where that is left open
    problem: ClassVar[type[Problem]]  # the losses
    alteration: ClassVar[str | None] = None  # how a control changes the feedback

    teacher: Optimizer = field(default_factory=LabelOptimizer)
    mode: Literal["forward", "difference"] = "forward"
    warm_steps: SomeSteps | None = None

    def optimizer(self) -> Optimizer:
        return dataclasses.replace(self.teacher, lr=self.teacher.lr or self.rate)

    @abstractmethod
    def learned(self, run: Run) -> nn.Module:
        """What is learned, as it is at first."""

    def check(self, recipe: Recipe) -> None:
        fits = self.warm_steps is None or recipe.steps is None or self.warm_steps < recipe.steps
        require(self, fits, "warm_steps", f"0 or more, and fewer than steps={recipe.steps}")

    def for_rate(self, rate: float) -> LearnedLabels:
        return dataclasses.replace(self, student=self.student.with_rate(rate))

    def phases(self, run: Run) -> Phases:
        recipe, task, student = run.recipe, run.task, run.student
        problem, warm = self.problem(), self.warm_steps or 0
        device = next(student.parameters()).device
        plain = alone(recipe, task, student, self.student, PLAIN, labeled=task.everything)
        teacher = run.beside(self.learned(run).to(device), problem.teacher_reads_inputs)
        if warm:
            first = {"steps": warm, "schedule": "constant", "select": False, "warmup": min(recipe.warmup, warm)}
            yield dataclasses.replace(plain, name="warm", options=first)
        mode = altered(estimator(self.mode), self.alteration, recipe)
        rated = dataclasses.replace(self, teacher=self.optimizer())
        trainer = bilevel(recipe, teacher, student, rated, mode, problem, teacher_losses=())
        rest = {"steps": recipe.steps - warm, "warmup": 0 if warm else recipe.warmup}
        yield Phase(trainer, task.labeled, task.unlabeled, task, options=rest)


class LearnedWeights(
    LearnedLabels,
    name="example_weights",
    title="learned weights of examples",
    indexed=True,
    rate=0.1,
    problem=ExampleWeights,
):
    """A weight for each picture."""

    def learned(self, run: Run) -> nn.Module:
        assert run.task.doubtful is not None
        return Table(torch.zeros(len(run.task.doubtful.given)))


class WeightsOfLosses(
    LearnedLabels, name="meta_weight_net", title="weights learned from losses", problem=MetaWeightNet
):
    """A weight for each picture, as a function of the network's loss."""

    def learned(self, run: Run) -> nn.Module:
        return WeightNet()


class Corrected(LearnedLabels, name="label_correction", title="learned corrections of labels", problem=LabelCorrection):
    """Another network that corrects labels."""

    def learned(self, run: Run) -> nn.Module:
        return Corrector(run.recipe.network("teacher"), len(run.task.classes), TRUSTED)


class NoiseMatrix(
    LearnedLabels, name="noise_transition", title="a learned matrix of label noise", rate=0.05, problem=NoiseTransition
):
    """How often each class is taken for each other one."""

    def learned(self, run: Run) -> nn.Module:
        return Table(TRUSTED * torch.eye(len(run.task.classes)))


LEARNED: tuple[type[LearnedLabels], ...] = (LearnedWeights, WeightsOfLosses, Corrected, NoiseMatrix)

ALTERED = tuple(  # the same with altered feedback
    variant(
        *(kind, __name__, f"{kind.__name__}_{how}", f"{kind.name}_{how}", f"{kind.title}, feedback {words}"),
        place="control",
        delivers="student",
        alteration=how,
    )
    for kind in LEARNED
    for how, words in (("permuted", "permuted"), ("random_sign", "with random signs"))
)
globals().update({kind.__name__: kind for kind in ALTERED})  # a worker process finds them by name
