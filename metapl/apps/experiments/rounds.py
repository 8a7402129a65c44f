"""The rounds of Noisy Student: the last network labels the unlabeled examples, of which some are selected.

The stores of a round are a function of what was before it and of the seed, and each is gone on with where it was
stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metapl.apps.experiments.galleries import SHOWN, gallery_of
from metapl.apps.experiments.labeling import Labeled, SourcePictures, provenance, store_labels
from metapl.apps.experiments.noisy_teacher import Augmented, Noised
from metapl.apps.labels import LabelStore
from metapl.apps.labels.queries import Selection, select, statistics
from metapl.apps.pictures.store import Images
from metapl.apps.recipes.base import Recipe, Task
from metapl.apps.recipes.methods.noisy_student import noisy_view
from metapl.apps.reports import Gallery
from metapl.data.draws import fold_in
from metapl.runs.fingerprints import fingerprint
from metapl.training import FitResult, Say

FOLDER = "rounds"
"""Where a run keeps the stores of its rounds, in its folder."""

LABELS, SELECTED = "labels", "selected"
"""The stores of a round: of all unlabeled examples, and of the selected ones."""


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
        return _picked(images, self.positions)


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run: they label, select, and keep what was found.

    Args:
        recipe: of the run.
        folder: of the run.
        task: its data.
        settings: how labels are made and selected, a :class:`~metapl.apps.recipes.self_training.SelfTraining`, or with
            ``any_class`` a :class:`~metapl.apps.recipes.self_training.Selection`.
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
    settings: Any
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
                "store_sha256": labels.sha256,
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
        some = SourcePictures(_picked(self.task.unlabeled.images, shown))
        pictures = some.batch(0)[0] if len(shown) else torch.empty(0)
        title = f"Pseudo-labels that changed from round {last - 1} to round {last}"
        gallery = gallery_of(title, note, list(pictures), captions[: len(shown)])
        return [] if gallery is None else [gallery]

    def changed(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The examples whose label changed from the round before: their numbers, the earlier labels and the later ones.

        The most confident ones, by the later labels, come first.
        """
        folder = self.folder / FOLDER
        before, after = (_stored_labels(LabelStore(folder / str(each) / LABELS)) for each in (number - 1, number))
        # A file that became unreadable is in one of them alone.
        _, old, new = np.intersect1d(before[0], after[0], assume_unique=True, return_indices=True)
        which, labels, labels_now, confidence = after[0][new], before[1][old], after[1][new], after[2][new]
        order = confidence.argsort(descending=True, stable=True)
        order = order[labels[order] != labels_now[order]]
        return which[order], labels[order], labels_now[order]

    def _labeled(self, teacher: nn.Module, place: Path) -> LabelStore:
        """The labels of all unlabeled examples."""
        images = self.task.unlabeled.images
        noisy = self.settings.noisy_teacher
        view, seed = noisy_view(self.task), fold_in(self.recipe.seed, int(place.parent.name))
        pictures = Augmented(images, view=view, seed=seed) if noisy else SourcePictures(images)
        labeled = Labeled(pictures, range(len(images)), "unlabeled")
        about = provenance(teacher, labeled, self.recipe)
        if noisy:
            about["views"] = f"augmented by {view!r}, seed {seed}, with dropout and stochastic depth"
        labeler = Noised(teacher, seed) if noisy else teacher
        return store_labels(labeler, labeled, place, self.task.classes, about, self.say)

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
        if self.records[-1]["threshold"] not in (None, getattr(self.settings, "threshold", None)):
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


def _picked(images: Tensor | Images, positions: Tensor) -> Tensor | Images:
    return images[positions] if isinstance(images, Tensor) else images.select(positions)


def _stored_labels(store: LabelStore) -> tuple[Tensor, Tensor, Tensor]:
    """The ids, the most probable classes and the confidences of all rows, (n,) each."""
    columns: list[list[Any]] = [[], [], []]
    for number in range(len(store.parts)):
        part = store.table(number, ["id", "label", "confidence"])
        for column, name in zip(columns, ("id", "label", "confidence"), strict=True):
            column.append(np.asarray(part.column(name).to_numpy()))
    ids, labels, confidences = (torch.from_numpy(np.concatenate(column)) for column in columns)
    return ids, labels, confidences


def even_rows(task: Task) -> Chosen:
    """All examples, with even labels, for a rehearsal of the training."""
    every = torch.arange(len(task.unlabeled.images))
    return Chosen(every, None, every, len(task.classes), {})
