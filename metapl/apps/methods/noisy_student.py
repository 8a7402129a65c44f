"""Noisy Student: a teacher labels, and noisy students learn and label one after another.

The phases are fits of their own, ``round-0``, ``round-1``, ..., and between them the run stores
labels and selects. Each is a function of what was before it and of the seed, and each goes on where
it was stopped, so a run that is resumed goes through them from the first one and ends bit for bit
as one that was not stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from metapl.apps.data import Data
from metapl.apps.labeling import Read, ToLabel, write_labels
from metapl.apps.measured import evaluated
from metapl.apps.methods.base import Method, Trained, Training, TrainingConfig
from metapl.apps.printing import tell, wrapped
from metapl.apps.settings import (
    USUAL_FINETUNING,
    Share,
    Steps,
    require,
)
from metapl.data.draws import fold_in
from metapl.data.steps import StepSampler
from metapl.errors import MetaplError, few
from metapl.execution.batch import digest
from metapl.execution.shards import weights_of
from metapl.labels.selection import check_interval, select, statistics
from metapl.labels.store import LabelStore, Values
from metapl.networks.tuned import begin_as
from metapl.noisy_student import (
    Chosen,
    LossesApart,
    Noised,
    PseudoLabeledBatches,
    end_matched,
)
from metapl.pictures.batches import LabeledBatches
from metapl.pictures.views.base import Identity, View
from metapl.pictures.views.transforms import ShiftNoiseCutout
from metapl.problems.losses import CrossEntropy
from metapl.problems.model_noise import NoisyStudentLoss
from metapl.runs.fields import Range, check_fields
from metapl.training import FitResult
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import decay_interval

# The phase of the first teacher, and the end of the name of one that finetunes a student.
FIRST = "round-0"
FINETUNED = "-finetune"

# Where a run keeps the stores of its rounds: of the examples that were labeled, and of the selected
# ones.
FOLDER = "rounds"
LABELS = "labels"
SELECTED = "selected"

MOST_ROUNDS = 1000
MOST_RATIO = 2**12

# Of examples of which the teacher is less confident nothing is learned.
THRESHOLD = 0.3

# Unlabeled examples in a batch for each labeled one: the paper's for most networks.
USUAL_RATIO = 3


@dataclass(frozen=True, kw_only=True)
class NoisyStudent(Method):
    """Noisy Student: a teacher labels, a noisy student learns its labels, and labels next.

    Args:
        networks: network of each round, that of the first teacher first. The last one that is named
            is also the network of all later rounds. What fits a network is chosen for the first,
            but for optimizers and learning rates, which are those of each.
        rounds: number of students. Each learns from the labels of the network before it.
        labels: labels that a student learns: soft are its teacher's probabilities, hard is the most
            probable class of each example.
        select_by: when unlabeled examples are selected: in each round, or once in the first round.
        threshold: keep unlabeled examples of which the teacher is more confident than this.
        at_most: leave out unlabeled examples of which the teacher is more confident than this.
        balance: whether to repeat examples of classes that have fewer, so that all have as many.
        per_class: largest number of unlabeled examples of a class.
        share: share of the selected examples to keep, drawn at random.
        ratio: number of unlabeled examples in a batch for each labeled one. By default it is 1, and
            3 for digits.
        loss: how the losses of labeled and unlabeled examples are joined: mean is the mean over the
            batch, two_means the sum of a mean over each kind.
        training: order in which a student learns: joint learns from labeled and unlabeled examples
            in each step, pretrain from unlabeled ones alone, and pretrain_finetune from labeled
            ones after that.
        warm_start: let each student begin with its teacher's weights.
        warm_steps: number of steps of a student that begins with its teacher's weights.
        noisy_teacher: let the teacher label augmented examples, with dropout.
        unlabeled_noise: noise with which a student learns unlabeled examples: all is strong
            augmentation with dropout and stochastic depth, standard has weak augmentation, model
            has none, and none has no noise at all.
        label_smoothing: label smoothing of the loss on labeled examples, from 0 to 1. By default it
            fits the network.
    """

    name: ClassVar[str] = "noisy_student"
    title: ClassVar[str] = "Noisy Student"
    delivers_last: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("pyarrow",)

    networks: tuple[str, ...] = ()
    rounds: Annotated[int, Range(1, most=MOST_ROUNDS)] = 3
    labels: Literal["soft", "hard"] = "soft"
    select_by: Literal["each", "once"] = "each"
    threshold: Share = THRESHOLD
    at_most: Annotated[float, Range(above=0, most=1)] | None = None
    balance: tyro.conf.FlagConversionOff[bool] = True
    per_class: Steps | None = None
    share: Annotated[float, Range(above=0, most=1)] | None = None
    ratio: Annotated[int, Range(1, most=MOST_RATIO)] | None = None
    loss: Literal["mean", "two_means"] = "mean"
    training: Literal["joint", "pretrain_finetune", "pretrain"] = "joint"
    warm_start: bool = False
    warm_steps: Steps | None = None
    noisy_teacher: bool = False
    unlabeled_noise: Literal["all", "standard", "model", "none"] = "all"
    label_smoothing: Share | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_interval(self.threshold, self.at_most)
        starts_warm = self.warm_steps is None or self.warm_start
        require(self, starts_warm, "warm_steps", "--warm-start beside it")
        has_means = self.training == "joint" or self.loss == "mean"
        require(self, has_means, "loss", f"mean with training={self.training}, which has no sum")
        most_names = f"{self.rounds + 1} names at most: the first teacher's, then one a round"
        require(self, len(self.networks) <= self.rounds + 1, "networks", most_names)

    @property
    def trainings(self) -> int:
        """Return the number of networks: the first teacher, then one a round."""
        return self.rounds + 1

    @property
    def finetunes(self) -> bool:
        """Return whether a flag asks for finetuning."""
        return self.training == "pretrain_finetune"

    @property
    def named_networks(self) -> tuple[str, ...]:
        """Return the networks of the rounds, as far as they are named."""
        return self.networks

    def check_chosen(self, config: TrainingConfig) -> None:
        """Refuse networks that do not go on from one another, and finetuning without steps."""
        configs_of(config, self)
        steps = config.fitting.chosen_finetuning
        if self.finetunes and not steps:
            raise MetaplError("--finetune-steps 0: expected 1 or more, or --training pretrain.")
        if not self.finetunes and steps not in (0, USUAL_FINETUNING):
            text = (
                f"note: --finetune-steps {steps:,} is not read: finetuning is of --training "
                "pretrain_finetune"
            )
            tell(wrapped(text))

    def scheduled(self, steps: int) -> Self:
        """Return the method with a ratio; refuse more warm steps than steps."""
        if self.warm_steps is not None and self.warm_steps > steps:
            raise MetaplError(
                f"--warm-steps {self.warm_steps:,}: expected 1 to {steps:,}, or more --steps."
            )
        return dataclasses.replace(self, ratio=self.ratio or USUAL_RATIO)

    def train(self, t: Training) -> Trained:
        """Train the first teacher, and then the student of each round."""
        rounds = Rounds(self, t)
        rounds.train_first_teacher()
        for number in range(1, self.rounds + 1):
            rounds.train_student(number)
        return rounds.ended()


# --------------------------------------------------------------------------------------- the rounds


class Rounds:
    """The rounds of a training: the last network, what it reached, and the record of each round.

    Args:
        settings: of the method.
        training: what is trained, on what, and how a phase of it is run.
    """

    def __init__(self, settings: NoisyStudent, training: Training) -> None:
        self.settings = settings
        self.training = training
        self.config = training.config
        self.data = training.data
        self.seed: int = self.config.fitting.seed
        self.configs = configs_of(self.config, settings)
        self.noisy = noisy_view(self.data)
        # The last network, which labels in the next round, and the one that labeled for it.
        self.teacher: nn.Module = nn.Module()
        self.teacher_of_last: nn.Module = nn.Module()
        self.trainer: LossTrainer | None = None
        self.result: FitResult | None = None
        self.reached: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        # What was selected once, and the labels of the last round.
        self.selection: Selected | None = None
        self.labels_of_last: LabelStore | None = None

    # -- the phases

    def train_first_teacher(self) -> None:
        """Train round 0: on labeled examples alone, with noise."""
        first = self.configs[0]
        torch.manual_seed(fold_in(self.seed, 0))
        network = first.network().to(self.training.place)
        begin_as(self.training.student, network)
        losses: Any = (CrossEntropy(self.settings.label_smoothing or 0.0),)
        self.trainer = LossTrainer(
            network, losses, optimizer=optimizer(first, network), **self.training.options
        )
        self.result = self.training.fit(
            self.trainer, self.labeled(0), None, phase=FIRST, **self.schedule(self.usual_steps)
        )
        self.teacher = self.trainer.student
        self.reached = self.measure(self.teacher)

    def train_student(self, number: int) -> None:
        """Train one round, on labels of the last network and on labeled examples."""
        settings = self.settings
        config = self.configs[number]
        chosen, record = self.choose(number)
        pairs = self.pairs(number, chosen)
        # Whatever was drawn before, so that a resumed run draws the same.
        torch.manual_seed(self.seed_of(number))
        network = config.network().to(self.training.place)
        begin_as(self.training.student, network)
        steps = self.usual_steps
        rate = 1.0
        if settings.warm_start:
            network.load_state_dict(weights_of(self.teacher))
            steps = settings.warm_steps or self.usual_steps
            rate = end_matched(steps, self.usual_steps)
        has_model_noise = settings.unlabeled_noise != "none"
        loss = NoisyStudentLoss(
            settings.loss,
            settings.labels == "hard",
            has_model_noise,
            settings.label_smoothing or 0.0,
        )
        self.trainer = LossTrainer(
            network, (loss,), optimizer=optimizer(config, network, rate), **self.training.options
        )
        labeled = self.labeled(number)
        sources: Any = (labeled, pairs) if settings.training == "joint" else (pairs, None)
        self.result = self.training.fit(
            self.trainer,
            *sources,
            phase=f"round-{number}",
            callbacks=[
                LossesApart(
                    labeled, pairs, loss, every=config.fitting.validate_every or steps, steps=steps
                )
            ],
            **self.schedule(steps),
        )
        if settings.training == "pretrain_finetune":
            torch.manual_seed(fold_in(self.seed + 1, number))
            source = self.data.finetuning
            drawn = dataclasses.replace(
                source,
                sampler=dataclasses.replace(
                    source.sampler, seed=fold_in(source.sampler.seed, number)
                ),
                seed=fold_in(source.seed, number),
            )
            self.trainer, self.result = self.finetune(
                config, network, drawn, phase=f"round-{number}{FINETUNED}"
            )
        self.teacher_of_last = self.teacher
        self.teacher = network
        self.reached = self.measure(network)
        if self.training.folder is not None:
            record["parameters"] = sum(p.numel() for p in network.parameters())
            record["best_step"] = self.result.step
            record |= self.reached
            self.records.append(record)

    def ended(self) -> Trained:
        """Return what the run keeps.

        That is the last student and its teacher.
        """
        assert self.trainer is not None
        assert self.result is not None
        last = len(self.configs) - 1
        configs = {"student": self.configs[last], "teacher": self.configs[last - 1]}
        return Trained(
            self.trainer,
            self.result,
            teacher=(self.teacher_of_last, weights_of(self.teacher_of_last)),
            finetunes=False,
            rounds=self.records,
            configs=configs,
        )

    def finetune(
        self,
        config: TrainingConfig,
        network: nn.Module,
        labeled: Any,
        *,
        phase: str,
        **options: Any,
    ) -> tuple[LossTrainer, FitResult]:
        trainer = LossTrainer(network, optimizer=config.finetuner(network), **self.training.options)
        fit_options = {**config.finetuning(), "schedule": "cosine", **options}
        return trainer, self.training.fit(trainer, labeled, None, phase=phase, **fit_options)

    # -- what a phase draws from, and how long it is

    @property
    def usual_steps(self) -> int:
        """Return the steps of a round that does not begin with its teacher's weights."""
        steps: int = self.config.fitting.chosen_steps
        return steps

    def seed_of(self, number: int) -> int:
        """Return the seed of a round."""
        return fold_in(self.seed, number)

    def schedule(self, steps: int) -> dict[str, Any]:
        """Return options of a fit of so many steps; the rate falls as fast in a shorter one."""
        options: dict[str, Any] = {
            "steps": steps,
            "warmup": min(self.config.fitting.warmup or 0, steps),
        }
        if self.config.fitting.schedule == "exponential":
            options["decay_every"] = decay_interval(self.usual_steps)
        return options

    def labeled(self, number: int) -> LabeledBatches:
        """Return the labeled batches of a round, with noise; each round draws its own."""
        source = self.data.labeled
        sampler = dataclasses.replace(source.sampler, seed=fold_in(source.sampler.seed, number))
        batches: LabeledBatches = dataclasses.replace(
            source, sampler=sampler, seed=fold_in(source.seed, number), view=self.noisy
        )
        return batches

    def pairs(self, number: int, chosen: Chosen) -> PseudoLabeledBatches:
        """Return batches of chosen examples with their labels, and the noise of unlabeled ones."""
        source = self.data.unlabeled
        noise = self.settings.unlabeled_noise
        view: View = Identity()
        if noise == "all":
            view = self.noisy
        elif noise == "standard":
            view = standard_view(self.data)
        return PseudoLabeledBatches(
            images=picked(source.images, chosen.positions),
            sampler=StepSampler(
                len(chosen.positions),
                (self.settings.ratio or USUAL_RATIO) * self.config.fitting.chosen_batch,
                seed=self.seed_of(number),
                stream=1,
            ),
            weak=view,
            strong=None,
            seed=self.seed_of(number),
            crop=source.crop if noise in ("all", "standard") else None,
            chosen=chosen,
        )

    def measure(self, network: nn.Module) -> dict[str, Any]:
        """Return the digest of the weights of a round's network, and what it reaches.

        Nothing is measured where a step is timed.
        """
        reached: dict[str, Any] = {"weights_fingerprint": int(digest(weights_of(network)))}
        if self.training.folder is not None:
            parts = {"validation_accuracy": self.data.validation, "test_accuracy": self.data.test}
            for name, part in parts.items():
                if part is not None:
                    reached[name] = evaluated(network, part).accuracy
        return reached

    # -- labels and selections

    def choose(self, number: int) -> tuple[Chosen, dict[str, Any]]:
        """Let the last network label, select as the settings say, and return a record of it."""
        if self.training.folder is None:
            self.training.label(self.teacher)
            return self.evenly_labeled(), {}
        if self.selection is not None:
            return self.relabel(number, self.selection)
        labels = self.write_labels(number, None)
        threshold = self.settings.threshold
        if self.settings.at_most is None:
            threshold = threshold_of(labels, threshold)
        place = self.training.folder / FOLDER / str(number) / SELECTED
        selection = select(
            labels,
            place,
            per_class=self.settings.per_class,
            threshold=threshold,
            at_most=self.settings.at_most,
            balance=self.settings.balance,
            share=self.settings.share,
            seed=self.seed,
        )
        selected_labels = LabelStore(place)
        counted = statistics(selected_labels)
        if threshold != self.settings.threshold:
            asked = f"{self.settings.threshold:g}"
            self.training.say(
                f"note: of no example is that network more confident than {asked}; all are kept"
            )
        if selection.missing:
            without = f"no unlabeled example is kept: {few(selection.missing)}"
            self.training.say(f"note: of these classes {without}; a lower --threshold keeps more")
        selected = Selected(
            positions=selected_labels.column("id"),
            copies=selected_labels.column("copies"),
            rows=selection.rows,
            unsure=selection.unsure,
            threshold=threshold,
            store=place.relative_to(self.training.folder).as_posix(),
        )
        if self.settings.select_by == "once":
            self.selection = selected
        record = self.record(
            number,
            labels,
            selected,
            kept_per_class=counted.counts,
            copies_per_class=counted.class_copies,
            copies=selection.copies,
        )
        rows = torch.from_numpy(selected_labels.rows_with_copies())
        positions = torch.from_numpy(selected_labels.column("id"))[rows]
        return Chosen(positions, rows, selected_labels.at), record

    def relabel(self, number: int, selected: Selected) -> tuple[Chosen, dict[str, Any]]:
        """Let the last network label what was selected before, each as often as it counted then."""
        labels = self.write_labels(number, selected.positions)
        positions = labels.column("id")
        # A file that became unreadable has no label; the others are in the order of the selection.
        copies = selected.copies[np.searchsorted(selected.positions, positions)]
        label = labels.column("label")
        classes = len(labels.classes)
        record = self.record(
            number,
            labels,
            selected,
            kept_per_class=np.bincount(label, minlength=classes).tolist(),
            copies_per_class=np.bincount(label, copies, minlength=classes)
            .astype(np.int64)
            .tolist(),
            copies=int(copies.sum(dtype=np.int64)),
        )
        rows = torch.from_numpy(np.repeat(np.arange(len(labels)), copies))
        return Chosen(torch.from_numpy(positions)[rows], rows, labels.at), record

    def write_labels(self, number: int, positions: Values | None) -> LabelStore:
        """Return the store of the last network's labels of these unlabeled examples, or of all."""
        images: Any = self.data.unlabeled.images
        ids: Any = range(len(images))
        if positions is not None:
            ids = positions.tolist()
            images = picked(images, torch.from_numpy(positions))
        labeler: nn.Module = self.teacher
        examples = ToLabel(images=images, ids=ids, name="unlabeled", input=self.config.input)
        about: dict[str, str] = {}
        if self.settings.noisy_teacher:
            seed = self.seed_of(number)
            labeler = Noised(self.teacher, seed)
            examples = Augmented(
                images=images,
                ids=ids,
                name="unlabeled",
                input=self.config.input,
                view=self.noisy,
                seed=seed,
            )
            about["views"] = (
                f"augmented by {self.noisy!r}, seed {seed}, with dropout and stochastic depth"
            )
        place = self.training.folder / FOLDER / str(number) / LABELS
        return write_labels(
            labeler, examples, place, self.data.classes, self.training.say, about=about
        )

    def record(
        self,
        number: int,
        labels: LabelStore,
        selected: Selected,
        *,
        kept_per_class: Sequence[int],
        copies_per_class: Sequence[int],
        copies: int,
    ) -> dict[str, Any]:
        """Return what result.json says of a round's labels, and say it in a line."""
        classes = self.data.classes
        folder = self.training.folder
        changed_labels = None
        if self.labels_of_last is not None:
            # A file that became unreadable is in one store alone.
            last = self.labels_of_last
            _, rows_of_last, rows = np.intersect1d(
                last.column("id"), labels.column("id"), assume_unique=True, return_indices=True
            )
            is_changed = last.column("label")[rows_of_last] != labels.column("label")[rows]
            changed_labels = int(is_changed.sum())
        self.labels_of_last = labels
        kept_pictures = int(sum(kept_per_class))
        tested = ""
        if self.data.test is not None:
            tested = f", whose test accuracy is {self.reached['test_accuracy']:.1%}"
        with_copies = f", {copies:,} with copies" if copies != kept_pictures else ""
        self.training.say(
            f"round {number}: {kept_pictures:,} of {selected.rows:,} unlabeled examples are "
            f"learned from{with_copies}, by labels of the network of round {number - 1}{tested}"
        )
        return {
            "round": number,
            "teacher": {"round": number - 1, **self.reached},
            "store": labels.folder.relative_to(folder).as_posix(),
            "store_sha256": labels.sha256,
            "selection": selected.store,
            "threshold": selected.threshold,
            "unlabeled": selected.rows,
            "unsure": selected.unsure,
            "kept": kept_pictures,
            "copies": copies,
            "labeled_per_class": dict(zip(classes, statistics(labels).class_copies, strict=True)),
            "kept_per_class": dict(zip(classes, kept_per_class, strict=True)),
            "copies_per_class": dict(zip(classes, copies_per_class, strict=True)),
            "changed_labels": changed_labels,
        }

    def evenly_labeled(self) -> Chosen:
        """Return all unlabeled examples with even labels, for timing a step without networks."""
        every = torch.arange(len(self.data.unlabeled.images))
        classes = len(self.data.classes)
        return Chosen(every, every, lambda rows: torch.ones(len(rows), classes) / classes)


@dataclass(frozen=True, eq=False, kw_only=True)
class Selected:
    """Unlabeled examples that were selected.

    Args:
        positions: int64 (n,), ascending, their numbers among all unlabeled examples.
        copies: how often each counts, int64 (n,).
        rows: how many examples there were to select from.
        unsure: how many were dropped because the teacher was not confident of them.
        threshold: the confidence above which they were kept.
        store: where the selection is.
    """

    positions: Values
    copies: Values
    rows: int
    unsure: int
    threshold: float
    store: str


def picked(images: Any, positions: Tensor) -> Any:
    """Return the examples at these positions, of numbers in memory or of files."""
    return images[positions] if isinstance(images, Tensor) else images.select(positions)


# ------------------------------------------------------------------------------- networks and rates


def configs_of(config: TrainingConfig, settings: NoisyStudent) -> list[TrainingConfig]:
    """Return the settings with the network of each round, the first teacher's first.

    Networks that do not go on from one another are refused.
    """
    # Without names it is the usual one; the last of several serves on.
    asked = settings.networks or (None,)
    names = [asked[min(number, len(asked) - 1)] for number in range(settings.rounds + 1)]
    configs = [config if name is None else config.with_network(name) for name in names]
    if settings.warm_start and len(set(names)) > 1:
        raise MetaplError(
            "--warm-start: expected one network in --networks, whose weights students begin with."
        )
    if settings.warm_steps is not None and config.fitting.schedule != "exponential":
        raise MetaplError(
            f"--warm-steps {settings.warm_steps:,}: expected --schedule exponential beside it, by "
            "which a shorter training ends at the usual rate."
        )
    return configs


def optimizer(
    config: TrainingConfig, network: nn.Module, rate: float = 1.0
) -> torch.optim.Optimizer:
    """Return the optimizer of a round's network, with ``rate`` times the usual learning rate."""
    usual: torch.optim.Optimizer = config.optimizer("teacher", network)
    for group in usual.param_groups:
        group["lr"] *= rate
    return usual


def noisy_view(data: Data) -> View:
    """Return the strong view, which labeled and unlabeled examples are learned with."""
    view: View = data.unlabeled.weak if data.unlabeled.strong is None else data.unlabeled.strong
    return view


def standard_view(data: Data) -> View:
    """Return the augmentation that the paper calls standard.

    Pictures are moved, and mirrored where that is asked for. The teacher of the digits sees them as
    they are; for them it is the move by a pixel alone. Where random parts of pictures are learned
    from, that is the standard augmentation, and the view leaves them as they are.
    """
    view: View = data.unlabeled.weak
    if isinstance(view, Identity) and data.unlabeled.crop is None:
        return ShiftNoiseCutout(noise=0.0, cutout=0)
    return view


# -------------------------------------------------------------------------------- labels of a round


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmented(ToLabel):
    """The examples of a source, in order and augmented by a view, whose draws have a seed."""

    view: View
    seed: int

    def batch(self, step: int) -> Read:
        """Return the batch of a step, augmented."""
        x, numbers, digests, skipped = super().batch(step)
        return self.view(x, seed=self.seed, step=step, examples=numbers), numbers, digests, skipped


def threshold_of(labels: LabelStore, asked: float) -> float:
    """Return the confidence above which examples are kept: 0 where none reaches what was asked for.

    It is compared in float32, as confidences are stored and select compares them: there, 0.1 is
    more than in float64.
    """
    is_reached = (labels.column("confidence") > np.float32(asked)).any()
    return asked if is_reached else 0.0
