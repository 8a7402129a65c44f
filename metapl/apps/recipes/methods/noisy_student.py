"""Noisy Student: a teacher labels, students learn from its labels with noise, and each labels for the next one.

The phases are fits of their own, ``round-0``, ``round-1``, …, and between them the run stores labels and selects. Each
is a function of what was before it and of the seed, and each goes on where it was stopped, so a run that is resumed
goes through them from the first one and ends bit for bit as one that was not stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.apps.pictures import LabeledBatches, UnlabeledBatches
from metapl.apps.pictures.batches import Fetched
from metapl.apps.pictures.views.base import Identity, View
from metapl.apps.recipes.base import Chosen, Method, Phase, Phases, Recipe, Run, Task
from metapl.apps.recipes.methods.alone import Alone, Losses, Smoothed
from metapl.apps.recipes.settings import SelfTraining
from metapl.data.draws import fold_in
from metapl.data.sampler import StepSampler
from metapl.errors import MetaplError
from metapl.execution.numerics import wide
from metapl.problems.losses import CrossEntropy
from metapl.problems.stored import NoisyStudentLoss, check_stored, stored_pair, with_model_noise
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import DECAY, DECAY_EPOCHS, EPOCHS
from metapl.training.selection import weights_of

# The phase of the first teacher, the end of the name of one that finetunes a student, and the phase that finetunes the
# last student on larger pictures.
FIRST, FINETUNED, LARGER = "round-0", "-finetune", "resolution"


@dataclass(frozen=True, kw_only=True)
class NoisyStudent(Smoothed, Alone):
    """A teacher labels, a student learns its labels with noise, and becomes the teacher.

    Args:
        teacher: the optimizer of all networks.
        label_smoothing: label smoothing of the labels of labeled examples.
        self_training: what happens in the rounds.
    """

    name = "noisy_student"
    title = "Noisy Student"
    delivers = "student"
    networks: ClassVar[Mapping[str, str]] = Method.networks
    one_network = False
    is_noisy_student = True
    idle = ("unlabeled_batch",)

    self_training: Annotated[SelfTraining, tyro.conf.arg(name="")] = field(default_factory=SelfTraining)

    @property
    def kept(self) -> tuple[str, ...]:
        larger = self.self_training.finetune_size is not None
        return ("student", "teacher", "finetuned") if larger else ("student", "teacher")

    @classmethod
    def hidden(cls, words: Sequence[str]) -> tuple[str, ...]:
        finetunes = "pretrain_finetune" in " ".join(words) or any("finetune-size" in word for word in words)
        return cls.idle if finetunes else (*cls.idle, "finetune_steps", "finetune_batch", "finetune")

    @classmethod
    def delivered(cls, accuracies: Mapping[str, float | None], select: bool) -> str:
        """The last student, finetuned or not, of equals finetuned, and never its teacher."""
        students = {name: accuracies[name] for name in reversed([*accuracies]) if name != "teacher"}
        return super().delivered(students, True) if select else next(iter(students))

    def losses(self) -> Losses:
        return self.supervised()

    def check_networks(self, recipe: Recipe) -> None:
        networks_of(recipe, self.self_training)

    def phases(self, run: Run) -> Phases:
        recipe, task, settings = run.recipe, run.task, self.self_training
        first, *others = networks_of(recipe, settings)
        hard, model_noise = settings.labels == "hard", settings.unlabeled_noise != "none"
        phase = _first_teacher(run, first)
        yield phase
        teacher = phase.trainer.student
        for number, sized in enumerate(others, 1):
            chosen = run.select(number, teacher)
            torch.manual_seed(fold_in(recipe.seed, number))  # whatever was drawn before
            own: Any = sized.method
            network, optimizer, steps = _network(sized), own.teacher, recipe.steps
            if settings.warm_start:
                network.load_state_dict(weights_of(teacher))
                steps = settings.warm_steps or steps
                optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * end_matched(steps, recipe.steps))
            labeled, pairs = _with_noise(recipe, task, number), _pseudo_labeled(settings, recipe, task, number, chosen)
            losses: Losses = (NoisyStudentLoss(settings.loss, hard, model_noise, self.label_smoothing),)
            sources: tuple[Any, Any] = (labeled, pairs)
            if settings.training != "joint":
                losses, sources = (StoredLabelLoss(hard, model_noise),), (pairs, None)
            given = run.laid_out(network)
            trainer = LossTrainer(given, losses, optimizer=optimizer.build(given), **recipe.trainer_options())
            options = {"steps": steps, "warmup": min(recipe.warmup, steps), **_decay(recipe, recipe.steps)}
            result = yield Phase(trainer, *sources, task, f"round-{number}", options)
            if settings.training == "pretrain_finetune":
                result = yield _finetuned(sized, given, task, number)
            run.trained(number, network, result)
            teacher = network


@dataclass(frozen=True)
class StoredLabelLoss:
    """Cross-entropy on pseudo-labeled examples alone, (1/B) Σ_i CE(stored_i, S(x_i)), of labeled batches (x, stored);
    ``hard`` and ``model_noise`` as for :class:`NoisyStudentLoss`."""

    hard: bool = False
    model_noise: bool = True

    name: ClassVar[str] = "pseudo_labeled"
    of_classes: ClassVar[bool] = True

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Any, step: int) -> Tensor:
        inputs, stored = stored_pair(labeled)
        with nullcontext() if self.model_noise else with_model_noise(teacher, on=False):
            logits = wide(teacher(inputs))
        check_stored(stored, logits, "unlabeled")
        return F.cross_entropy(logits, stored.argmax(1) if self.hard else wide(stored))


# ----------------------------------------------------------------------------------------------- networks and phases


def networks_of(recipe: Recipe, settings: SelfTraining) -> list[Recipe]:
    """The recipe with the network of each round, beginning with the first teacher's; refused if they do not go on."""
    names = [settings.network(number) for number in range(settings.rounds + 1)]
    recipes = [recipe if name is None else recipe.with_network(name) for name in names]
    _ = recipe.classes  # some recipes read their data for them, which must not be done on the meta device
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in sized.network("teacher").parameters())
            for name, sized in dict(zip(names, recipes, strict=True)).items()
        }
    for number, (teacher, student) in enumerate(pairwise(names), 1):
        if sizes[student] < sizes[teacher] and not settings.allow_smaller:
            raise MetaplError(
                f"the student of round {number} is {student} with {sizes[student]:,} parameters, and its teacher "
                f"{teacher} has {sizes[teacher]:,}: Noisy Student's students are equal or larger. Give --networks in "
                "the order of their sizes, or --allow-smaller to distill into a smaller one."
            )
    steps, warm_steps = recipe.steps, settings.warm_steps
    if settings.warm_start and len(set(names)) > 1:
        raise MetaplError(
            f"--warm-start begins with the weights of the teacher, and --networks {' '.join(settings.networks)} are "
            "not the same; expected one network, or students from scratch."
        )
    if settings.warm_start and recipe.schedule != "exponential":
        raise MetaplError(
            f"--warm-start ends at the learning rate where a student from scratch ends, and --schedule "
            f"{recipe.schedule} has the same end whatever it begins with; expected --schedule exponential."
        )
    if warm_steps is not None and steps is not None and warm_steps > steps:
        raise MetaplError(
            f"--warm-steps {warm_steps:,}: a student that begins with the weights of its teacher takes at most as many "
            f"steps as one from scratch; expected 1 to {steps:,}, or more --steps."
        )
    if settings.finetune_size is not None:
        recipes[-1].at_size(settings.finetune_size)
    return recipes


def _network(recipe: Recipe) -> nn.Module:
    return recipe.network("teacher").to(recipe.torch_device())


def _first_teacher(run: Run, recipe: Recipe) -> Phase:
    """Round 0, on labeled examples alone, with noise; a function of task, seed and recipe."""
    torch.manual_seed(fold_in(recipe.seed, 0))
    network, method = run.laid_out(_network(recipe)), recipe.method
    assert isinstance(method, Smoothed)
    optimizer = method.optimizers()["teacher"].build(network)
    trainer = LossTrainer(network, method.supervised(), optimizer=optimizer, **recipe.trainer_options())
    options = {"steps": recipe.steps, "warmup": min(recipe.warmup, recipe.steps), **_decay(recipe, recipe.steps)}
    return Phase(trainer, _with_noise(recipe, run.task, 0), None, run.task, FIRST, options)


def _decay(recipe: Recipe, steps: int) -> dict[str, float]:
    """The interval of the exponential schedule of so many steps, where the recipe has this schedule."""
    return {"decay_every": decay_interval(steps)} if recipe.schedule == "exponential" else {}


def end_matched(steps: int, usual: int) -> float:
    """The factor of the first learning rate with which ``steps`` end at the rate where ``usual`` steps end.

    Both follow the exponential schedule of the usual number.

    >>> [f"{0.128 * end_matched(epochs, 350):.3g}" for epochs in (35, 70, 140, 280, 350)]  # study 8
    ['0.00235', '0.00366', '0.00891', '0.0526', '0.128']
    """
    return float(DECAY ** ((usual - steps) / decay_interval(usual)))


def _finetuned(recipe: Recipe, network: nn.Module, task: Task, number: int) -> Phase:
    """A student that learned from pseudo-labels alone, finetuned on labeled examples; each round draws its own."""
    torch.manual_seed(fold_in(recipe.seed + 1, number))  # whatever was drawn before
    labeled: LabeledBatches = task.finetuning
    sampler = dataclasses.replace(labeled.sampler, seed=fold_in(labeled.sampler.seed, number))
    labeled = dataclasses.replace(labeled, sampler=sampler, seed=fold_in(labeled.seed, number))
    return _finetuning(recipe, network, labeled, task, f"round-{number}{FINETUNED}")


def finetuned_larger(recipe: Recipe, settings: SelfTraining, student: nn.Module, task: Task) -> Phase:
    """The phase that finetunes the last student where it is, by a recipe at a larger size and the data of that.

    The first layers are frozen, with the statistics of their norms, and pictures are as they are.
    Source: Noisy Student, "Fixing the train-test resolution discrepancy"; it does not tell which layers are frozen.
    """
    torch.manual_seed(fold_in(recipe.seed, settings.rounds + 1))
    layers = [part for part in student.modules() if any(True for _ in part.parameters(recurse=False))]
    for layer in layers[: int(settings.frozen * len(layers))]:
        layer.eval()
        for p in layer.parameters(recurse=False):
            p.requires_grad_(False)
    return _finetuning(recipe, student, dataclasses.replace(task.finetuning, view=Identity(), crop=None), task, LARGER)


def _finetuning(recipe: Recipe, network: nn.Module, labeled: Any, task: Task, name: str) -> Phase:
    optimizer = recipe.finetune.build(network)
    trainer = LossTrainer(network, (CrossEntropy(),), optimizer=optimizer, **recipe.trainer_options())
    return Phase(trainer, labeled, None, task, name, {"schedule": "cosine", **recipe.finetune_options()})


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True, eq=False, kw_only=True)
class PseudoLabeledBatches(UnlabeledBatches):
    """Batches (x, stored) of chosen examples; the stored distributions are read from the store as they are needed."""

    chosen: Chosen

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"rows": self.chosen.rows}

    def fetch(self, step: int) -> Fetched:
        *images, rows = super().fetch(step)
        return (*images, self.chosen.labels(rows))


def noisy_view(task: Task) -> View:
    view: View = task.unlabeled.weak if task.unlabeled.strong is None else task.unlabeled.strong
    return view


def _with_noise(recipe: Recipe, task: Task, number: int) -> LabeledBatches:
    labeled, seed = task.labeled, fold_in(recipe.seed, number)
    sampler = dataclasses.replace(labeled.sampler, seed=seed)
    noisy: LabeledBatches = dataclasses.replace(labeled, view=noisy_view(task), sampler=sampler, seed=seed)
    return noisy


def _pseudo_labeled(
    settings: SelfTraining, recipe: Recipe, task: Task, number: int, chosen: Chosen
) -> PseudoLabeledBatches:
    """Batches (x, stored) of selected examples as the student meets them."""
    source, seed, augmented = task.unlabeled, fold_in(recipe.seed, number), settings.unlabeled_noise == "all"
    images, view = chosen.of(source.images), noisy_view(task) if augmented else Identity()
    sampler = StepSampler(len(chosen.positions), settings.ratio * recipe.labeled_batch, seed=seed, stream=1)
    crop = source.crop if augmented else None
    return PseudoLabeledBatches(images, sampler, view, None, seed, crop=crop, chosen=chosen)


def decay_interval(steps: int) -> float:
    """Steps after which the exponential schedule multiplies the rate by 0.97, where that is not given.

    >>> decay_interval(700)
    4.8
    """
    return steps * DECAY_EPOCHS / EPOCHS
