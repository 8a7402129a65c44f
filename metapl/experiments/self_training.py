"""Noisy Student: a teacher labels, students learn from its labels with noise, and each labels for the next one.

The phases of a run are fits of their own, ``round-0``, ``round-1``, …, and the stores of labels between them. Each is a
function of what was before it and of the seed, and each goes on where it was stopped, so a run that is resumed goes
through them from the first one and ends bit for bit as one that was not stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metapl.data import LabeledBatches, UnlabeledBatches
from metapl.data.batches import Fetched
from metapl.data.draws import fold_in
from metapl.data.images.store import Images
from metapl.data.sampler import StepSampler
from metapl.data.views.base import Identity, View
from metapl.errors import MetaplError
from metapl.experiments.galleries import SHOWN, gallery_of
from metapl.experiments.labeling import BATCH, Labeled, Read, provenance, rows_per_part, write_labels
from metapl.experiments.larger import at_larger_size
from metapl.experiments.noisy_labels import ALONE, Fit
from metapl.experiments.reducing import AsTheyAre
from metapl.fingerprints import fingerprint
from metapl.labels import LabelStore, LabelWriter
from metapl.labels.queries import Selection, select, statistics
from metapl.problems.losses import CrossEntropy, TeacherLoss
from metapl.problems.self_training import NoisyStudentLoss, StoredLabelLoss, with_model_noise
from metapl.recipes.base import Recipe, Task
from metapl.recipes.methods import Method
from metapl.recipes.self_training import FirstTeacher, SelfTraining
from metapl.report import Gallery
from metapl.training import FitResult, Say, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import DECAY, decay_interval

FOLDER = "rounds"
"""Where a run keeps the stores of its rounds, in its folder."""

LABELS, SELECTED = "labels", "selected"
"""The stores of a round: of all unlabeled examples, and of the selected ones."""

FIRST = "round-0"
"""The phase that trains the first teacher."""

FINETUNED = "-finetune"
"""Ends the name of the phase that finetunes a student, after the name of its round."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Unlabeled examples that were selected, with their labels.

    Args:
        positions: int64 (n,), their numbers among all unlabeled examples, each as often as it counts.
        store: their labels; None in a rehearsal.
        rows: int64 (n,), the row of each in the store.
        classes: the number of classes.
        about: where the labels are and how many were kept, for ``result.json``.
    """

    positions: Tensor
    store: LabelStore | None
    rows: Tensor
    classes: int
    about: dict[str, Any]

    def labels(self, rows: Tensor) -> Tensor:
        """The distributions of rows of the store, float32 (B, C)."""
        if self.store is None:
            return torch.full((len(rows), self.classes), 1 / self.classes)
        return self.store.at(rows)

    def of(self, images: Tensor | Images) -> Tensor | Images:
        """The selected ones of all unlabeled examples."""
        return images[self.positions] if isinstance(images, Tensor) else images.select(self.positions)


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


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run: they label, select, and keep what was found.

    Args:
        recipe: of the run.
        folder: of the run.
        task: its data.
        settings: how labels are made and selected.
        any_class: select as Meta Pseudo Labels does: for each class, the examples that are most probably of it.
        measure: what a network reaches, by the names of ``result.json``.
        say: takes what a user should know.
        records: what ``result.json`` says of each round, from the first student on.
        reached: what the network of each round reaches, by its number.
        teachers: the network that labeled last.
    """

    recipe: Recipe
    folder: Path
    task: Task
    settings: SelfTraining
    any_class: bool
    measure: Callable[[nn.Module], dict[str, float]]
    say: Say
    records: list[dict[str, Any]] = field(default_factory=list)
    reached: dict[int, dict[str, float]] = field(default_factory=dict)
    teachers: list[nn.Module] = field(default_factory=list)

    def choose(self, number: int, teacher: nn.Module) -> Chosen:
        """Store the labels that a network gives the unlabeled examples, and select from them.

        Args:
            number: of the round that learns from them, from 1.
            teacher: the network of the round before.
        """
        self.teachers[:] = [teacher]
        place = self.folder / FOLDER / str(number)
        labels = self._labeled(teacher, place / LABELS)
        selection = self._selected(labels, place / SELECTED)
        chosen = LabelStore(place / SELECTED)
        rows = torch.from_numpy(chosen.rows_with_copies())
        ids = torch.from_numpy(np.fromiter(chosen, dtype=np.int64, count=len(chosen)))
        before, after = statistics(labels), statistics(chosen)
        names, changed = self.task.classes, None if number == 1 else len(self.changed(number)[0])
        self.records.append(
            {
                "round": number,
                "teacher": {
                    "round": number - 1,
                    "weights_fingerprint": fingerprint(dict(teacher.state_dict())),
                    **self._measured(number - 1, teacher),
                },
                "store": (place / LABELS).relative_to(self.folder).as_posix(),
                "store_sha256": _content(labels),
                "threshold": None if self.any_class else self.threshold(labels),
                "unlabeled": selection.rows,
                "unsure": selection.unsure,
                "kept": selection.kept,
                "copies": selection.copies,
                "labeled_per_class": dict(zip(names, before.class_copies, strict=True)),
                "kept_per_class": dict(zip(names, after.counts, strict=True)),
                "copies_per_class": dict(zip(names, after.class_copies, strict=True)),
                "changed_labels": changed,
            }
        )
        self._tell(number, selection)
        return Chosen(ids[rows], chosen, rows, len(names), self.records[-1])

    def trained(self, number: int, network: nn.Module, result: FitResult) -> None:
        """Keep what the network of a round reaches."""
        self.records[number - 1] |= {
            "parameters": sum(p.numel() for p in network.parameters()),
            "best_step": result.step,
            "weights_fingerprint": fingerprint(dict(network.state_dict())),
            **self._measured(number, network),
        }

    def _measured(self, number: int, network: nn.Module) -> dict[str, float]:
        if number not in self.reached:
            self.reached[number] = self.measure(network)
        return self.reached[number]

    def galleries(self) -> list[Gallery]:
        """Pictures whose label changed from the round before to the last one."""
        last = len(self.records)
        if last < 2:
            return []
        which, before, after = self.changed(last)
        note = f"{len(which):,} of {self.records[-1]['unlabeled']:,}; the most confident of them, by the later label"
        shown, names = which[:SHOWN], self.task.classes
        captions = [f"{names[b]} → {names[a]}" for b, a in zip(before.tolist(), after.tolist(), strict=True)]
        pictures = AsTheyAre(self._some(shown), max(1, len(shown))).batch(0)[0] if len(shown) else torch.empty(0)
        title = f"Pseudo-labels that changed from round {last - 1} to round {last}"
        gallery = gallery_of(title, note, pictures, captions[: len(shown)], [None] * len(shown))
        return [] if gallery is None else [gallery]

    def _some(self, which: Tensor) -> Tensor | Images:
        images = self.task.unlabeled.images
        return images[which] if isinstance(images, Tensor) else images.select(which)

    def changed(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The examples whose label changed from the round before: their numbers, the earlier labels and the later ones.

        The most confident ones, by the later labels, come first.
        """
        before, after = self._both(number)
        # A file that became unreadable is in one of them alone.
        _, old, new = np.intersect1d(before[0], after[0], assume_unique=True, return_indices=True)
        which, labels, labels_now, confidence = after[0][new], before[1][old], after[1][new], after[2][new]
        order = confidence.argsort(descending=True, stable=True)
        order = order[labels[order] != labels_now[order]]
        return which[order], labels[order], labels_now[order]

    def _both(self, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the stores of the round before and of this one hold."""
        folder = self.folder / FOLDER
        return [_stored_labels(LabelStore(folder / str(each) / LABELS)) for each in (number - 1, number)]

    def _labeled(self, teacher: nn.Module, place: Path) -> LabelStore:
        """The labels of all unlabeled examples."""
        images = self.task.unlabeled.images
        noisy = self.settings.noisy_teacher
        view, seed = noisy_view(self.task), fold_in(self.recipe.seed, int(place.parent.name))
        pictures = Augmented(images, BATCH, view=view, seed=seed) if noisy else AsTheyAre(images, BATCH)
        labeled = Labeled(pictures, range(len(images)), "unlabeled")
        about = provenance(teacher, labeled, self.recipe)
        if noisy:
            about["views"] = f"augmented by {view!r}, seed {seed}, with dropout and stochastic depth"
        writer = LabelWriter(
            place,
            self.task.classes,
            provenance=about,
            rows_per_part=rows_per_part(len(images)),
            resume=place.exists(),
        )
        with writer:
            write_labels(Noised(teacher, seed) if noisy else teacher, labeled, writer, skip=self.say)
        return LabelStore(place)

    def _selected(self, labels: LabelStore, place: Path) -> Selection:
        """Write the store of the examples that the student learns from."""
        settings = self.settings
        if self.any_class:
            most = settings.per_class or -(-len(labels) // len(labels.classes))
            return select(labels, place, per_class=most, any_class=True, resume=place.exists())
        return select(
            labels,
            place,
            threshold=self.threshold(labels),
            per_class=settings.per_class,
            balance=settings.balance,
            resume=place.exists(),
        )

    def threshold(self, labels: LabelStore) -> float:
        """The confidence above which examples are kept; 0 where no example reaches the one in the settings."""
        # Compared in float32, as confidences are stored and select compares them: there, 0.1 is more than in float64.
        confidences = _stored_labels(labels)[2]
        above = confidences > torch.tensor(self.settings.threshold, dtype=confidences.dtype)
        return self.settings.threshold if bool(above.any()) else 0.0

    def _tell(self, number: int, selection: Selection) -> None:
        copies = f", {selection.copies:,} with copies" if selection.copies != selection.kept else ""
        reached = self.records[-1]["teacher"].get("test_accuracy")
        tested = "" if reached is None else f", whose test accuracy is {reached:.1%}"
        self.say(
            f"round {number}: {selection.kept:,} of {selection.rows:,} unlabeled examples are learned from{copies}, by "
            f"labels of the network of round {number - 1}{tested}"
        )
        if self.records[-1]["threshold"] not in (None, self.settings.threshold):
            self.say(
                f"note: of no example is that network more confident than {self.settings.threshold:g}, so all are "
                "kept; it may need more --steps"
            )
        if selection.missing:
            missing = ", ".join(selection.missing[:5]) + (" ..." if len(selection.missing) > 5 else "")
            self.say(
                f"note: of these classes no unlabeled example is kept: {missing}. The student sees them in labeled "
                "examples alone; more --steps make a better teacher, and a lower --threshold keeps more"
            )


def _content(store: LabelStore) -> str:
    """SHA-256 of a store's labels, from the checksums of its parts; its description holds a time and is left out."""
    return hashlib.sha256("".join(part.sha256 for part in store.parts).encode()).hexdigest()


def spoken_rounds(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the rounds reached and kept, in sentences.

    >>> counts = {"round": 1, "kept": 90, "copies": 90, "unlabeled": 100}
    >>> spoken_rounds([{"teacher": {"test_accuracy": 0.8}, **counts}])[0]  # of another method than Noisy Student
    'Test accuracy of the first teacher, whose labels they are: 80.0 %.'
    """
    last, lines = rounds[-1], []
    taught = rounds[0]["teacher"].get("test_accuracy")
    if "weights_fingerprint" in last and "test_accuracy" in last:
        reached = [taught, *(each["test_accuracy"] for each in rounds)]
        lines.append(f"Test accuracy by round: {', '.join(f'{100 * each:.1f} %' for each in reached)}.")
    elif taught is not None:
        lines.append(f"Test accuracy of the first teacher, whose labels they are: {100 * taught:.1f} %.")
    kept = f"{last['kept']:,} of {last['unlabeled']:,}"
    copies = f", which count as {last['copies']:,}" if last["copies"] != last["kept"] else ""
    lines.append(f"In round {last['round']}, {kept} unlabeled examples were learned from{copies}.")
    return lines


def better_before(rounds: Sequence[Mapping[str, Any]], delivered: float) -> list[str]:
    """A sentence where an earlier network did better on the test set than the one that is delivered.

    Args:
        rounds: as ``result.json`` has them.
        delivered: the test accuracy of the network that is delivered.

    >>> better_before([{"test_accuracy": 0.8, "teacher": {"test_accuracy": 0.7}}, {"test_accuracy": 0.75}], 0.75)
    ['Round 1 reached 80.0 % on test, more than the last, which is delivered by rule: the test set chooses nothing.']
    """
    reached = [rounds[0]["teacher"].get("test_accuracy"), *(each.get("test_accuracy") for each in rounds[:-1])]
    best = max(range(len(reached)), key=lambda number: reached[number] or 0.0)
    if (reached[best] or 0.0) <= delivered:
        return []
    return [
        f"Round {best} reached {100 * reached[best]:.1f} % on test, more than the last, which is delivered by rule: "
        "the test set chooses nothing."
    ]


def _stored_labels(store: LabelStore) -> tuple[Tensor, Tensor, Tensor]:
    """The ids, the most probable classes and the confidences of all rows, (n,) each."""
    columns: list[list[Any]] = [[], [], []]
    for number in range(len(store.parts)):
        part = store.table(number, ["id", "label", "confidence"])
        for column, name in zip(columns, ("id", "label", "confidence"), strict=True):
            column.append(np.asarray(part.column(name).to_numpy()))
    ids, labels, confidences = (torch.from_numpy(np.concatenate(column)) for column in columns)
    return ids, labels, confidences


@dataclass(frozen=True)
class Rehearsed:
    """Rounds without a teacher's labels, for a rehearsal of the training: each keeps all examples, with even labels."""

    task: Task

    def choose(self, number: int, teacher: nn.Module) -> Chosen:
        every = torch.arange(len(self.task.unlabeled.images))
        return Chosen(every, None, every, len(self.task.classes), {})

    def trained(self, number: int, network: nn.Module, result: FitResult) -> None:
        """Nothing is kept."""


# ---------------------------------------------------------------------------------------------------- the noisy teacher


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmented(AsTheyAre):
    """The examples of a source, in order and augmented.

    Args:
        view: augments.
        seed: of its draws.
    """

    view: View
    seed: int

    def batch(self, step: int) -> Read:
        x, numbers, digests, skipped = super().batch(step)
        return self.view(x, seed=self.seed, step=self.first + step, examples=numbers), numbers, digests, skipped


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


# --------------------------------------------------------------------------------------------------------- the training


def noisy_view(task: Task) -> View:
    """The augmentation that a student meets."""
    view: View = task.unlabeled.weak if task.unlabeled.strong is None else task.unlabeled.strong
    return view


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
        method: one of Noisy Student's.
        recipe: its networks, the teacher's optimizer, which all of them use, and the steps of each round.
        task: its batches, and the rounds, which label and select.
        fit: see :data:`metapl.experiments.noisy_labels.Fit`.

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
    optimizer = recipe.finetune.build(network)
    trainer = LossTrainer(network, (CrossEntropy(),), optimizer=optimizer, **recipe.trainer_options())
    steps = recipe.finetune_steps
    over = {"phase": f"round-{number}{FINETUNED}", "steps": steps, "ema_decay": None, "warmup": 0}
    every = max(1, steps // 10)
    options = ALONE | over | {"validate_every": every, "schedule": "cosine"} | recipe.finetune_options()
    return trainer, fit(trainer, labeled, None, task, **options)


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
