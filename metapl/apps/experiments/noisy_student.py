"""Training by Noisy Student: a teacher labels, students learn from its labels with noise, and each labels for the next.

The phases of a run are fits of their own, ``round-0``, ``round-1``, …, and between them the stores of
:mod:`metapl.apps.experiments.rounds`. Each is a function of what was before it and of the seed, and each goes on where
it was stopped, so a run that is resumed goes through them from the first one and ends bit for bit as one that was not
stopped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.experiments.fits import ALONE, Fit, finetune_by_cosine
from metapl.apps.experiments.larger import at_larger_size
from metapl.apps.experiments.noisy_teacher import noisy_view
from metapl.apps.experiments.rounds import Chosen
from metapl.apps.pictures import LabeledBatches, UnlabeledBatches
from metapl.apps.pictures.batches import Fetched
from metapl.apps.pictures.views.base import Identity
from metapl.apps.recipes.base import Recipe, Task
from metapl.apps.recipes.methods import Method
from metapl.apps.recipes.self_training import FirstTeacher, SelfTraining
from metapl.data.draws import fold_in
from metapl.data.sampler import StepSampler
from metapl.errors import MetaplError
from metapl.problems.losses import CrossEntropy, TeacherLoss
from metapl.problems.self_training import NoisyStudentLoss, StoredLabelLoss
from metapl.training import FitResult, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import DECAY, decay_interval

FIRST = "round-0"
"""The phase that trains the first teacher."""

FINETUNED = "-finetune"
"""Ends the name of the phase that finetunes a student, after the name of its round."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PseudoLabeledBatches(UnlabeledBatches):
    """Batches (x, stored) of selected examples; the stored distributions are read from the store as they are needed.

    Args:
        chosen: the examples.
    """

    chosen: Chosen

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"rows": self.chosen.rows}

    def fetch(self, step: int) -> Fetched:
        *images, rows = super().fetch(step)
        return (*images, self.chosen.labels(rows))


def networks_of(recipe: Recipe, settings: SelfTraining) -> list[Recipe]:
    """The recipe with the network of each round, beginning with the first teacher's.

    Raises:
        MetaplError: a student has fewer parameters than its teacher, and that was not asked for; or is to begin with
            weights of another network.
    """
    names = [settings.network(number) for number in range(settings.rounds + 1)]
    recipes = [recipe if name is None else recipe.with_network(name) for name in names]
    sizes = {name: _parameters(sized) for name, sized in zip(names, recipes, strict=True)}
    smaller = settings.smaller([sizes[name] for name in names])
    if smaller is not None and not settings.allow_smaller:
        raise MetaplError(
            f"the student of round {smaller} is {names[smaller]} with {sizes[names[smaller]]:,} parameters, and its "
            f"teacher {names[smaller - 1]} has {sizes[names[smaller - 1]]:,}: Noisy Student's students are equal or "
            "larger. Give --networks in the order of their sizes, or --allow-smaller to distill into a smaller one."
        )
    if settings.warm_start and len(set(names)) > 1:
        raise MetaplError(
            f"--warm-start begins with the weights of the teacher, and --networks {' '.join(settings.networks)} are "
            "not the same; expected one network, or students from scratch."
        )
    if settings.warm_start and recipe.schedule != "exponential":
        raise MetaplError(
            f"--warm-start takes a learning rate that ends where that of a student from scratch would end, and "
            f"--schedule {recipe.schedule} ends where it does whatever it begins with; expected --schedule exponential."
        )
    steps = getattr(recipe, "steps", None)
    if settings.warm_steps is not None and steps is not None and settings.warm_steps > steps:
        raise MetaplError(
            f"--warm-steps {settings.warm_steps:,}: a student that begins with the weights of its teacher takes at "
            f"most as many steps as one from scratch, {steps:,}; expected 1 to {steps:,}, or more --steps."
        )
    if settings.finetune_size is not None:
        at_larger_size(recipes[-1], settings)
    return recipes


def _parameters(recipe: Recipe) -> int:
    _ = recipe.classes  # some recipes read their data for them, which must not be done on the meta device
    with torch.device("meta"):
        return sum(p.numel() for p in recipe.network("teacher").parameters())


def train_noisy_student(method: Method, recipe: Recipe, task: Task, fit: Fit) -> tuple[Trainer, FitResult]:
    """Train a teacher, and students one after another.

    Args:
        recipe: its networks, the teacher's optimizer, which all of them use, and the steps of each round.
        task: its batches, and the rounds, which label and select.

    Returns: the trainer of the last student, and what its fit ended with.
    """
    settings, rounds = method.settings(recipe), task.rounds
    _, *others = networks_of(recipe, settings)
    trainer, result = _first_teacher(recipe, task, fit)
    for number, sized in enumerate(others, 1):
        chosen, teacher = rounds.choose(number, trainer.student), trainer.student
        torch.manual_seed(fold_in(recipe.seed, number))  # whatever was drawn before
        network = sized.network("teacher").to(recipe.torch_device())
        optimizer, steps = sized.teacher, recipe.steps
        if settings.warm_start:
            network.load_state_dict(teacher.state_dict())
            steps = settings.warm_steps or steps
            optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * end_matched(steps, recipe.steps))
        over = {"phase": f"round-{number}", "steps": steps} | _of_steps(recipe, steps)
        losses, labeled, unlabeled = _sources(settings, recipe, task, number, chosen)
        trainer = LossTrainer(network, losses, optimizer=optimizer.build(network), **recipe.trainer_options())
        result = fit(trainer, labeled, unlabeled, task, **ALONE | over)
        if settings.training == "pretrain_finetune":
            trainer, result = _finetuned(sized, network, task, number, fit)
        rounds.trained(number, network, result)
    return trainer, result


def _first_teacher(recipe: Recipe, task: Task, fit: Fit) -> tuple[Trainer, FitResult]:
    """The network of round 0, which learns from the labeled examples alone, with noise.

    It is a function of the task, the seed and what :func:`first_teacher` gives, whatever method the run is by.
    """
    own, settings = first_teacher(recipe)
    torch.manual_seed(fold_in(own.seed, 0))
    network = own.network("teacher").to(own.torch_device())
    optimizer, losses = own.teacher.build(network), (CrossEntropy(own.label_smoothing),)
    trainer = LossTrainer(network, losses, optimizer=optimizer, **own.trainer_options())
    over: dict[str, Any] = {name: getattr(settings, name) for name in ("steps", "warmup", "validate_every")}
    over |= {"phase": FIRST} | _decay(own, settings.steps)
    return trainer, fit(trainer, _with_noise(own, task, 0), None, task, **ALONE | over)


def first_teacher(recipe: Recipe) -> tuple[Recipe, FirstTeacher]:
    """The recipe with the network and the optimizer of the first teacher, and how it is trained."""
    # Some recipes warm up over fewer steps where a student waits, and this teacher has none.
    own, name = recipe.by("noisy_student", recipe.seed), recipe.self_training.network(0)
    own = own if name is None else own.with_network(name)
    given = recipe.self_training.first
    if given is None:
        warmup = min(own.fit_options().get("warmup", 0), own.steps)
        beside = {name: getattr(own, name, None) for name in ("clip_norm", "weights")}
        return own, FirstTeacher(
            steps=own.steps, warmup=warmup, validate_every=own.validate_every, lr=own.teacher.lr, **beside
        )
    changed = {name: getattr(given, name) for name in ("clip_norm", "weights") if hasattr(own, name)}
    changed["teacher"] = dataclasses.replace(own.teacher, lr=given.lr)
    return dataclasses.replace(own, **changed), given


def _of_steps(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Options of a fit with its own number of steps: the warmup fits into it, the decay keeps the recipe's interval."""
    return {"warmup": min(recipe.fit_options().get("warmup", 0), steps)} | _decay(recipe, recipe.steps)


def _decay(recipe: Recipe, steps: int) -> dict[str, float]:
    """The interval of the exponential schedule of so many steps, where the recipe has this schedule."""
    return {"decay_every": decay_interval(steps)} if recipe.schedule == "exponential" else {}


def end_matched(steps: int, usual: int) -> float:
    """The factor of the first learning rate with which a fit of ``steps`` ends at the rate where ``usual`` steps end.

    Both follow the exponential schedule of the usual number.

    >>> [f"{0.128 * end_matched(epochs, 350):.3g}" for epochs in (35, 70, 140, 280, 350)]  # study 8
    ['0.00235', '0.00366', '0.00891', '0.0526', '0.128']
    """
    return float(DECAY ** ((usual - steps) / decay_interval(usual)))


def _with_noise(recipe: Recipe, task: Task, number: int) -> LabeledBatches:
    """The labeled batches of a round, augmented as the unlabeled ones are."""
    labeled, seed = task.labeled, fold_in(recipe.seed, number)
    assert isinstance(labeled, LabeledBatches)
    sampler = dataclasses.replace(labeled.sampler, seed=seed)
    return dataclasses.replace(labeled, view=noisy_view(task), sampler=sampler, seed=seed)


def _sources(
    settings: SelfTraining, recipe: Recipe, task: Task, number: int, chosen: Chosen
) -> tuple[tuple[TeacherLoss, ...], Any, Any]:
    """The losses of a student, and its sources of labeled and of unlabeled batches."""
    pairs = _pseudo_labeled(settings, recipe, task, number, chosen)
    hard, model_noise = settings.labels == "hard", settings.unlabeled_noise != "none"
    if settings.training == "joint":
        loss = NoisyStudentLoss(settings.loss, hard, model_noise, recipe.label_smoothing)
        return (loss,), _with_noise(recipe, task, number), pairs
    return (StoredLabelLoss(hard, model_noise),), pairs, None


def _pseudo_labeled(
    settings: SelfTraining, recipe: Recipe, task: Task, number: int, chosen: Chosen
) -> PseudoLabeledBatches:
    """Batches (x, stored) of selected examples as the student meets them."""
    source, seed = task.unlabeled, fold_in(recipe.seed, number)
    assert isinstance(source, UnlabeledBatches)
    augmented = settings.unlabeled_noise == "all"
    return PseudoLabeledBatches(
        chosen.of(source.images),
        StepSampler(len(chosen.positions), settings.ratio * recipe.labeled_batch, seed=seed, stream=1),
        noisy_view(task) if augmented else Identity(),
        None,
        seed,
        crop=source.crop if augmented else None,
        chosen=chosen,
    )


def _finetuned(recipe: Recipe, network: nn.Module, task: Task, number: int, fit: Fit) -> tuple[Trainer, FitResult]:
    """A student that learned from pseudo-labels alone, finetuned on labeled examples; each round draws its own."""
    torch.manual_seed(fold_in(recipe.seed + 1, number))  # whatever was drawn before
    labeled = task.finetuning
    assert isinstance(labeled, LabeledBatches)
    sampler = dataclasses.replace(labeled.sampler, seed=fold_in(labeled.sampler.seed, number))
    labeled = dataclasses.replace(labeled, sampler=sampler, seed=fold_in(labeled.seed, number))
    return finetune_by_cosine(network, recipe, labeled, task, fit, f"round-{number}{FINETUNED}")


def filtered(recipe: Recipe, task: Task, fit: Fit) -> Task:
    """The task with the unlabeled examples alone that are most probably of each class, by the labels of a network.

    The network is the first teacher of Noisy Student by the same recipe, so both have the same labels.

    Source: Meta Pseudo Labels, section 3.3.
    """
    trainer, _ = _first_teacher(recipe, task, fit)
    chosen, source = task.rounds.choose(1, trainer.student), task.unlabeled
    sampler = dataclasses.replace(source.sampler, size=len(chosen.positions))
    unlabeled = dataclasses.replace(source, images=chosen.of(source.images), sampler=sampler)
    return dataclasses.replace(task, unlabeled=unlabeled, truth=None)
