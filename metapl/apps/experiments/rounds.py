"""The rounds of Noisy Student: the last network labels the unlabeled examples, of which some are selected.

The stores of a round are a function of what was before it and of the seed, and each is gone on with where it was
stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metapl.apps.experiments.labeling import Labeled, Read, SourcePictures, provenance, store_labels
from metapl.apps.labels import LabelStore
from metapl.apps.labels.queries import Selection, select, statistics
from metapl.apps.pictures.views.base import View
from metapl.apps.recipes.base import Chosen, Recipe, Task
from metapl.apps.recipes.methods.noisy_student import noisy_view
from metapl.data.draws import fold_in
from metapl.errors import few
from metapl.execution.ranks import ALONE, Ranks
from metapl.problems.stored import with_model_noise
from metapl.training import FitResult, Say
from metapl.training.resuming import digest
from metapl.training.selection import weights_of

FOLDER = "rounds"  # where a run keeps the stores of its rounds: of all unlabeled examples, and of the selected ones
LABELS, SELECTED = "labels", "selected"


@dataclass(frozen=True, eq=False, kw_only=True)
class Augmented(SourcePictures):
    """The examples of a source, in order and augmented by a view, whose draws have a seed."""

    view: View
    seed: int

    def batch(self, step: int) -> Read:
        x, numbers, digests, skipped = super().batch(step)
        return self.view(x, seed=self.seed, step=self.number(step), examples=numbers), numbers, digests, skipped


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


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run: they label, select, and keep what was found."""

    recipe: Recipe
    folder: Path
    task: Task
    settings: Any  # SelfTraining: how labels are made and selected
    measure: Callable[[nn.Module], dict[str, float]]  # what a network reaches, by the names of result.json
    say: Say
    ranks: Ranks = ALONE  # the processes that train together; the first of them writes
    records: list[dict[str, Any]] = field(default_factory=list)  # of each round for result.json, from the first student
    reached: dict[int, dict[str, float]] = field(default_factory=dict)  # by the network of each round, by its number
    teachers: list[nn.Module] = field(default_factory=list)  # the network that labeled last

    def choose(self, number: int, teacher: nn.Module) -> Chosen:
        """Store the labels by the network of the round before, and select from them for round ``number``, from 1."""
        self.teachers[:] = [teacher]
        settings, names, place = self.settings, self.task.classes, self._place(number, SELECTED)
        labels = self._labeled(number, teacher)
        threshold = self.threshold(labels)
        how = {"per_class": settings.per_class, "threshold": threshold, "balance": settings.balance}
        selected = select(labels, place, resume=place.exists(), **how) if self.ranks.first else None
        selection: Selection = self.ranks.gathered(selected)[0]
        chosen = LabelStore(place)
        before, after = statistics(labels), statistics(chosen)
        reached = self._measured(number - 1, teacher)
        weights = digest(weights_of(teacher))
        record: dict[str, Any] = {
            "round": number,
            "teacher": {"round": number - 1, "weights_fingerprint": weights, **reached},
            "store": labels.folder.relative_to(self.folder).as_posix(),
            "store_sha256": labels.sha256,
            "threshold": threshold,
            "unlabeled": selection.rows,
            "unsure": selection.unsure,
            "kept": selection.kept,
            "copies": selection.copies,
            "labeled_per_class": dict(zip(names, before.class_copies, strict=True)),
            "kept_per_class": dict(zip(names, after.counts, strict=True)),
            "copies_per_class": dict(zip(names, after.class_copies, strict=True)),
            "changed_labels": None if number == 1 else self.changed(number),
        }
        self.records.append(record)
        self._tell(record, selection.missing)
        rows = torch.from_numpy(chosen.rows_with_copies())
        ids = torch.from_numpy(np.fromiter(chosen, dtype=np.int64, count=len(chosen)))
        return Chosen(ids[rows], rows, len(names), chosen)

    def trained(self, number: int, network: nn.Module, result: FitResult) -> None:
        self.records[number - 1] |= {
            "parameters": sum(p.numel() for p in network.parameters()),
            "best_step": result.step,
            "weights_fingerprint": digest(weights_of(network)),
            **self._measured(number, network),
        }

    def changed(self, number: int) -> int:
        """Of how many examples the label is another than in the round before."""
        before, after = (_stored_labels(LabelStore(self._place(each, LABELS))) for each in (number - 1, number))
        # A file that became unreadable is in one of them alone.
        _, old, new = np.intersect1d(before[0], after[0], assume_unique=True, return_indices=True)
        return int((before[1][old] != after[1][new]).sum())

    def threshold(self, labels: LabelStore) -> float:
        """The confidence above which examples are kept; 0 where no example reaches the one in the settings."""
        # Compared in float32, as confidences are stored and select compares them: there, 0.1 is more than in float64.
        confidences = _stored_labels(labels)[2]
        above = confidences > torch.tensor(self.settings.threshold, dtype=confidences.dtype)
        return self.settings.threshold if bool(above.any()) else 0.0

    def _place(self, number: int, store: str) -> Path:
        return self.folder / FOLDER / str(number) / store

    def _measured(self, number: int, network: nn.Module) -> dict[str, float]:
        if number not in self.reached:
            self.reached[number] = self.measure(network)
        return self.reached[number]

    def _labeled(self, number: int, teacher: nn.Module) -> LabelStore:
        images, view = self.task.unlabeled.images, noisy_view(self.task)
        seed, noisy = fold_in(self.recipe.seed, number), self.settings.noisy_teacher
        pictures = Augmented(images, view=view, seed=seed) if noisy else SourcePictures(images)
        labeled = Labeled(pictures, range(len(images)), "unlabeled")
        about = provenance(teacher, labeled, self.recipe.input)
        if noisy:
            about["views"] = f"augmented by {view!r}, seed {seed}, with dropout and stochastic depth"
        labeler = Noised(teacher, seed) if noisy else teacher
        place = self._place(number, LABELS)
        return store_labels(labeler, labeled, place, self.task.classes, about, self.say, self.ranks)

    def _tell(self, record: dict[str, Any], missing: Sequence[str]) -> None:
        copies = f", {record['copies']:,} with copies" if record["copies"] != record["kept"] else ""
        reached = record["teacher"].get("test_accuracy")
        tested = "" if reached is None else f", whose test accuracy is {reached:.1%}"
        self.say(
            f"round {record['round']}: {record['kept']:,} of {record['unlabeled']:,} unlabeled examples are learned "
            f"from{copies}, by labels of the network of round {record['round'] - 1}{tested}"
        )
        if record["threshold"] != self.settings.threshold:
            self.say(
                f"note: of no example is that network more confident than {self.settings.threshold:g}, so all are "
                "kept; it may need more --steps"
            )
        if missing:
            self.say(
                f"note: of these classes no unlabeled example is kept: {few(missing)}. The student sees them in "
                "labeled examples alone; more --steps make a better teacher, and a lower --threshold keeps more"
            )


def _stored_labels(store: LabelStore) -> tuple[Tensor, Tensor, Tensor]:
    """The ids, the most probable classes and the confidences of all rows, (n,) each."""
    names = ["id", "label", "confidence"]
    parts = [store.table(number, names) for number in range(len(store.parts))]
    ids, labels, confidences = (
        torch.from_numpy(np.concatenate([np.asarray(part.column(name).to_numpy()) for part in parts])) for name in names
    )
    return ids, labels, confidences
