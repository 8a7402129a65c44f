"""Noisy Student: a teacher labels, students learn from its labels with noise, and each labels for the next one.

The phases are fits of their own, ``round-0``, ``round-1``, ..., and between them the run stores labels and selects.
Each is a function of what was before it and of the seed, and each goes on where it was stopped, so a run that is
resumed goes through them from the first one and ends bit for bit as one that was not stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from metapl.apps.digits import Digits
from metapl.apps.digits import fitting as of_digits
from metapl.apps.images import Images
from metapl.apps.label import Read, ToLabel, write_labels
from metapl.apps.labels import LabelStore, select, statistics
from metapl.apps.methods import Data, Method, Trained, Training
from metapl.apps.model_noise import NoisyStudentLoss, with_model_noise
from metapl.apps.networks import begin_as
from metapl.apps.pictures import LabeledBatches, UnlabeledBatches
from metapl.apps.pictures.batches import Fetched
from metapl.apps.pictures.views.base import Identity, View
from metapl.apps.settings import Batch, Fitting, Flat, Hidden, Share, Steps, Switch, replaced, require, unset
from metapl.apps.train import evaluated, measured
from metapl.data.draws import fold_in
from metapl.data.steps import StepSampler
from metapl.errors import MetaplError, few
from metapl.execution.batch import digest
from metapl.execution.shards import weights_of
from metapl.problems.losses import CrossEntropy
from metapl.runs.fields import Range, check_fields
from metapl.training import FitResult
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import DECAY, decay_interval

# The phase of the first teacher, the end of the name of one that finetunes a student, and the phase that finetunes the
# last student on larger pictures.
FIRST, FINETUNED, LARGER = "round-0", "-finetune", "resolution"

FOLDER = "rounds"  # where a run keeps the stores of its rounds: of all unlabeled examples, and of the selected ones
LABELS, SELECTED = "labels", "selected"
MOST_ROUNDS, MOST_RATIO = 1000, 2**12


@dataclass(frozen=True, kw_only=True)
class NoisyStudent(Method):
    """Noisy Student: a teacher labels, a student learns its labels with noise, and becomes the teacher.

    Args:
        networks: one a round; the last serves on.
        rounds: students, each on the last one's labels.
        allow_smaller: let students be smaller.
        labels: soft, or hard: the likeliest class.
        threshold: keep what the teacher is surer of.
        balance: repeat examples of smaller classes.
        per_class: the most examples of a class.
        ratio: unlabeled examples for each labeled one.
        loss: mean over the batch, or two_means added.
        training: joint, pretrain_finetune or pretrain.
        warm_start: begin with the teacher's weights.
        warm_steps: steps of a student that does.
        noisy_teacher: label augmented, with dropout.
        unlabeled_noise: all, model or none.
        finetune_size: larger side, at the end (FixRes).
        frozen: share of the layers that are then.
        label_smoothing: on labeled examples.
    """

    name: ClassVar[str] = "noisy_student"
    title: ClassVar[str] = "Noisy Student"

    networks: Annotated[tuple[str, ...], unset("NAME ...")] = ()
    rounds: Annotated[int, Range(1, most=MOST_ROUNDS)] = 3
    allow_smaller: Switch = False
    labels: Annotated[Literal["soft", "hard"], tyro.conf.arg(metavar="KIND")] = "soft"
    threshold: Share = 0.3
    balance: tyro.conf.FlagConversionOff[bool] = True
    per_class: Annotated[Steps | None, unset()] = None
    ratio: Annotated[int, Range(1, most=MOST_RATIO)] = 3
    loss: Annotated[Literal["mean", "two_means"], tyro.conf.arg(metavar="KIND")] = "mean"
    training: Annotated[Literal["joint", "pretrain_finetune", "pretrain"], tyro.conf.arg(metavar="HOW")] = "joint"
    warm_start: Switch = False
    warm_steps: Annotated[Steps | None, unset()] = None
    noisy_teacher: Switch = False
    unlabeled_noise: Annotated[Literal["all", "model", "none"], tyro.conf.arg(metavar="KIND")] = "all"
    finetune_size: Annotated[Steps | None, unset("PIXELS")] = None
    frozen: Share = 0.5
    label_smoothing: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, self.warm_steps is None or self.warm_start, "warm_steps", "--warm-start beside it")
        means = self.training == "joint" or self.loss == "mean"
        require(self, means, "loss", f"mean with training={self.training}, which has no sum")
        require(self, self.finetune_size is not None or self.frozen == 0.5, "frozen", "--finetune-size beside it")
        most = f"{self.rounds + 1} names at most: the first teacher's, then one a round"
        require(self, len(self.networks) <= self.rounds + 1, "networks", most)

    def scheduled(self, steps: int) -> Self:
        if self.warm_steps is not None and self.warm_steps > steps:
            raise MetaplError(f"--warm-steps {self.warm_steps:,}: expected 1 to {steps:,}, or more --steps.")
        return self

    def train(self, t: Training) -> Trained:
        config, data, seed = t.config, t.data, t.config.fitting.seed
        first, *others = configs_of(config, self)
        hard, model_noise = self.labels == "hard", self.unlabeled_noise != "none"
        place, source, records = t.place, data.unlabeled, list[dict[str, Any]]()

        def drawn(source: LabeledBatches, number: int, **own: Any) -> LabeledBatches:
            """Labeled batches as a round draws them: each its own."""
            sampler = dataclasses.replace(source.sampler, seed=fold_in(source.sampler.seed, number))
            return dataclasses.replace(source, sampler=sampler, seed=fold_in(source.seed, number), **own)

        def finetuned(sized: Any, network: nn.Module, labeled: Any, phase: str, **own: Any) -> tuple[Any, FitResult]:
            trainer = LossTrainer(network, optimizer=sized.finetuner(network), **t.options)
            options = {**sized.finetuning(), "schedule": "cosine", **own}
            return trainer, t.fit(trainer, labeled, None, phase=phase, **options)

        def reaches(network: nn.Module) -> dict[str, Any]:
            """The weights of the network of a round, and what it reaches; nothing is measured where a step is timed."""
            parts = {"validation_accuracy": data.validation, "test_accuracy": data.test} if t.folder else {}
            found = {name: evaluated(network, on).accuracy for name, on in parts.items() if on is not None}
            return {"weights_fingerprint": int(digest(weights_of(network))), **found}

        # Round 0, on labeled examples alone, with noise.
        noisy = noisy_view(data)
        torch.manual_seed(fold_in(seed, 0))
        teacher = first.network().to(place)
        begin_as(t.student, teacher)
        losses: Any = (CrossEntropy(self.label_smoothing),)
        trainer = LossTrainer(teacher, losses, optimizer=optimizer(first, teacher), **t.options)
        usual, warmup = config.fitting.steps, config.fitting.warmup or 0
        decay = {"decay_every": decay_interval(usual)} if config.fitting.schedule == "exponential" else {}
        options = {"steps": usual, "warmup": min(warmup, usual), **decay}
        result = t.fit(trainer, drawn(data.labeled, 0, view=noisy), None, phase=FIRST, **options)
        teacher = trainer.student
        reached, before = reaches(teacher), None
        for number, sized in enumerate(others, 1):
            own_seed, images = fold_in(seed, number), source.images
            if t.folder is None:  # a step is timed: on even labels of all
                every = torch.arange(len(images))
                chosen = Chosen(every, every, lambda rows: torch.ones(len(rows), len(data.classes)) / len(data.classes))
            else:
                # The last network labels all unlabeled examples, and the surest are selected, as the settings say.
                stores = t.folder / FOLDER / str(number)
                how: Any = {"images": images, "ids": range(len(images)), "name": "unlabeled", "input": config.input}
                labeler, examples, about = teacher, ToLabel(**how), dict[str, str]()
                if self.noisy_teacher:
                    labeler, examples = Noised(teacher, own_seed), Augmented(**how, view=noisy, seed=own_seed)
                    about = {"views": f"augmented by {noisy!r}, seed {own_seed}, with dropout and stochastic depth"}
                labels = write_labels(labeler, examples, stores / LABELS, data.classes, t.say, about=about)
                threshold = threshold_of(labels, self.threshold)
                how = {"per_class": self.per_class, "threshold": threshold, "balance": self.balance}
                selection = select(labels, stores / SELECTED, **how)
                kept, changed = LabelStore(stores / SELECTED), None
                of_all, of_kept = statistics(labels), statistics(kept)
                if before is not None:  # a file that became unreadable is in one store alone
                    ids = (before.column("id"), labels.column("id"))
                    _, old, new = np.intersect1d(*ids, assume_unique=True, return_indices=True)
                    changed = int((before.column("label")[old] != labels.column("label")[new]).sum())
                before = labels
                record: dict[str, Any] = {
                    "round": number,
                    "teacher": {"round": number - 1, **reached},
                    "store": labels.folder.relative_to(t.folder).as_posix(),
                    "store_sha256": labels.sha256,
                    "threshold": threshold,
                    "unlabeled": selection.rows,
                    "unsure": selection.unsure,
                    "kept": selection.kept,
                    "copies": selection.copies,
                    "labeled_per_class": dict(zip(data.classes, of_all.class_copies, strict=True)),
                    "kept_per_class": dict(zip(data.classes, of_kept.counts, strict=True)),
                    "copies_per_class": dict(zip(data.classes, of_kept.class_copies, strict=True)),
                    "changed_labels": changed,
                }
                copies = f", {selection.copies:,} with copies" if selection.copies != selection.kept else ""
                tested = "" if data.test is None else f", whose test accuracy is {reached['test_accuracy']:.1%}"
                t.say(
                    f"round {number}: {selection.kept:,} of {selection.rows:,} unlabeled examples are learned from"
                    f"{copies}, by labels of the network of round {number - 1}{tested}"
                )
                if threshold != self.threshold:
                    t.say(f"note: of no example is that network more confident than {self.threshold:g}; all are kept")
                if selection.missing:
                    without = f"no unlabeled example is kept: {few(selection.missing)}"
                    t.say(f"note: of these classes {without}; a lower --threshold keeps more")
                rows = torch.from_numpy(kept.rows_with_copies())
                chosen = Chosen(torch.from_numpy(kept.column("id"))[rows], rows, kept.at)

            # A new network learns from both.
            augmented, size = self.unlabeled_noise == "all", self.ratio * config.fitting.labeled_batch
            positions = chosen.positions
            pairs = PseudoLabeledBatches(
                images=images[positions] if isinstance(images, Tensor) else images.select(positions),
                sampler=StepSampler(len(positions), size, seed=own_seed, stream=1),
                weak=noisy if augmented else Identity(),
                strong=None,
                seed=own_seed,
                crop=source.crop if augmented else None,
                chosen=chosen,
            )
            torch.manual_seed(own_seed)  # whatever was drawn before
            network, steps, rate = sized.network().to(place), usual, 1.0
            begin_as(t.student, network)
            if self.warm_start:
                network.load_state_dict(weights_of(teacher))
                steps = self.warm_steps or usual
                rate = end_matched(steps, usual)
            losses = (NoisyStudentLoss(self.loss, hard, model_noise, self.label_smoothing),)
            trainer = LossTrainer(network, losses, optimizer=optimizer(sized, network, rate), **t.options)
            options = {"steps": steps, "warmup": min(warmup, steps), **decay}
            joint = (drawn(data.labeled, number, view=noisy), pairs)
            sources: Any = joint if self.training == "joint" else (pairs, None)
            result = t.fit(trainer, *sources, phase=f"round-{number}", **options)
            if self.training == "pretrain_finetune":
                torch.manual_seed(fold_in(seed + 1, number))  # whatever was drawn before
                labeled = drawn(data.finetuning, number)
                trainer, result = finetuned(sized, network, labeled, f"round-{number}{FINETUNED}")
            last, teacher, reached = teacher, network, reaches(network)
            if t.folder is not None:
                record |= {
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "best_step": result.step,
                    **reached,
                }
                records.append(record)
        configs = {"student": others[-1], "teacher": first if len(others) == 1 else others[-2]}
        own: Any = {"teacher": (last, weights_of(last)), "rounds": records, "configs": configs}
        if self.finetune_size is None:
            return Trained(trainer, result, finetunes=False, **own)

        # The last student is finetuned where it is, at a larger size: its first layers are frozen, with the statistics
        # of their norms, and pictures are as they are. The paper ("Fixing the train-test resolution discrepancy") does
        # not tell which layers are frozen.
        larger = configs["finetuned"] = others[-1].at_size(self.finetune_size)
        student = trainer.as_given

        def finetunes() -> Any:
            seen = larger.data(lambda text: None, t.progress, t.folder / "skipped.jsonl")
            torch.manual_seed(fold_in(seed, self.rounds + 1))
            layers = [part for part in student.modules() if any(True for _ in part.parameters(recurse=False))]
            for layer in layers[: int(self.frozen * len(layers))]:
                layer.eval()
                for p in layer.parameters(recurse=False):
                    p.requires_grad_(False)
            plain = dataclasses.replace(seen.finetuning, view=Identity(), crop=None)
            _, tuned = finetuned(larger, student, plain, LARGER, validation=seen.validation, truth=seen.truth)
            return measured(seen, trainer.student, tuned.validation_accuracy, tuned.weights)

        return Trained(trainer, result, finetunes=finetunes, **own)


@dataclass(frozen=True, kw_only=True)
class DigitsOfRounds(Digits):
    """The digits, with the schedule of the paper; a batch has --ratio unlabeled ones for each labeled one."""

    unlabeled_batch: Hidden[Batch] = 64
    hidden: tuple[int, ...] = (64, 64)
    fitting: Flat[Fitting] = field(default_factory=lambda: of_digits(steps=1000, schedule="exponential", lr=0.2))


@dataclass(frozen=True, kw_only=True)
class ImagesOfRounds(Images):
    """Pictures, likewise."""

    unlabeled_batch: Hidden[Batch] = 32
    fitting: Flat[Fitting] = field(default_factory=lambda: Fitting(ema_decay=0.99, schedule="exponential"))


# ----------------------------------------------------------------------------------------------- networks and phases


def configs_of(config: Any, settings: NoisyStudent) -> list[Any]:
    """The settings with the network of each round, the first teacher's first; refused if they do not go on."""
    given = settings.networks or (None,)  # the usual one; the last of several serves on
    names = [given[min(number, len(given) - 1)] for number in range(settings.rounds + 1)]
    configs = [config if name is None else config.with_network(name) for name in names]
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in replaced(sized, weights=None).network().parameters())
            for name, sized in dict(zip(names, configs, strict=True)).items()
        }
    for number, (teacher, student) in enumerate(pairwise(names), 1):
        if sizes[student] < sizes[teacher] and not settings.allow_smaller:
            raise MetaplError(
                f"--networks: the student of round {number}, {student}, has {sizes[student]:,} parameters, and its "
                f"teacher {teacher} {sizes[teacher]:,}; expected equal or larger ones, or --allow-smaller."
            )
    if settings.warm_start and (len(set(names)) > 1 or config.fitting.schedule != "exponential"):
        # It begins with the teacher's weights, and ends at the rate where a student from scratch ends.
        raise MetaplError("--warm-start: expected one network in --networks, and --schedule exponential.")
    if settings.finetune_size is not None:
        configs[-1].at_size(settings.finetune_size)
    return configs


def optimizer(config: Any, network: nn.Module, rate: float = 1.0) -> torch.optim.Optimizer:
    """Of a network of a round, with ``rate`` times the usual learning rate."""
    found: torch.optim.Optimizer = config.optimizer("teacher", network)
    for group in found.param_groups:
        group["lr"] *= rate
    return found


def end_matched(steps: int, usual: int) -> float:
    """The factor of the first learning rate with which ``steps`` end at the rate where ``usual`` steps end.

    Both follow the exponential schedule of the usual number.

    >>> [f"{0.128 * end_matched(epochs, 350):.3g}" for epochs in (35, 70, 140, 280, 350)]  # study 8
    ['0.00235', '0.00366', '0.00891', '0.0526', '0.128']
    """
    return float(DECAY ** ((usual - steps) / decay_interval(usual)))


# ------------------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True, eq=False)
class Chosen:
    """Unlabeled examples that were selected, with their labels."""

    positions: Tensor  # int64 (n,), their numbers among all unlabeled examples, each as often as it counts
    rows: Tensor  # int64 (n,), the row of each in the store
    labels: Callable[[Tensor], Tensor]  # the distributions of rows of the store, float32 (B, C)


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


def noisy_view(data: Data) -> View:
    view: View = data.unlabeled.weak if data.unlabeled.strong is None else data.unlabeled.strong
    return view


# ------------------------------------------------------------------------------------------------- labels of a round


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmented(ToLabel):
    """The examples of a source, in order and augmented by a view, whose draws have a seed."""

    view: View
    seed: int

    def batch(self, step: int) -> Read:
        x, numbers, digests, skipped = super().batch(step)
        return self.view(x, seed=self.seed, step=step, examples=numbers), numbers, digests, skipped


class Noised(nn.Module):
    """A network with dropout and stochastic depth even in eval mode; each batch has masks of its own.

    The masks follow from the batch, so labels are the same when they are gone on with.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        super().__init__()
        self.network, self.seed = network, seed

    def forward(self, x: Tensor) -> Tensor:
        content = hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).digest()
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), with_model_noise(self.network, on=True):
            torch.manual_seed(fold_in(self.seed, int.from_bytes(content[:8], "little")))
            logits: Tensor = self.network(x)
            return logits


def threshold_of(labels: LabelStore, asked: float) -> float:
    """The confidence above which examples are kept: the one that was asked for, or 0 where no example reaches it.

    It is compared in float32, as confidences are stored and select compares them: there, 0.1 is more than in float64.
    """
    return asked if (labels.column("confidence") > np.float32(asked)).any() else 0.0
