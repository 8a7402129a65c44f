"""The examples whose given labels are most likely wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from metapl.apps.pictures.csv_files import written_csv
from metapl.apps.recipes.base import Doubtful, Task
from metapl.apps.reports import Gallery, draw_grid
from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.problems import Table
from metapl.training import Trainer
from metapl.training.trainer import BilevelTrainer

SUSPECTS, GRID = "suspects.csv", "suspects.png"

SHOWN = 48
"""Pictures of the grid."""


@dataclass(frozen=True)
class Suspect:
    """An example, and what the network takes it for.

    Args:
        name: such as its file.
        position: in the data set.
        given: its label.
        probably: the most probable class.
        p_given, p_probably: the network's probabilities of the two.
        weight: that was learned for it; None where no weights of examples were.
    """

    name: str
    position: int
    given: int
    probably: int
    p_given: float
    p_probably: float
    weight: float | None = None


def find_suspects(doubtful: Doubtful, trained: Trainer) -> list[Suspect]:
    """All the examples, the most suspicious first: those whose given label the network finds least probable.

    The trainer's student looks at each of them without augmentation: one forward pass per example.
    """
    teacher, weights = trained.teacher, None
    if isinstance(trained, BilevelTrainer) and isinstance(teacher, Table) and teacher.values.ndim == 1:  # one each
        weights = teacher.values.detach().cpu().sigmoid()
    found: list[tuple[float, int, int, int, float]] = []
    for inputs, positions in batches_of(doubtful.examples, torch.device("cpu")):
        given = doubtful.given[positions]
        logits, _ = predict_logits(trained.student, [(inputs, given)])
        log_p = logits.double().log_softmax(dim=1)
        best = log_p.max(dim=1)
        of_given = log_p.gather(1, given[:, None])[:, 0]
        found += zip(*(c.tolist() for c in (of_given, positions, given, best.indices, best.values)), strict=True)
    suspects = []
    for log_p_given, position, label, probably, log_p_best in sorted(found):
        learned = None if weights is None else float(weights[position])
        name, p_given, p_probably = doubtful.names[position], math.exp(log_p_given), math.exp(log_p_best)
        suspects.append(Suspect(name, position, label, probably, p_given, p_probably, learned))
    return suspects


def taken_for_others(suspects: Sequence[Suspect]) -> int:
    """Of how many the network finds another class more probable than the given one."""
    return sum(one.probably != one.given for one in suspects)


def write_suspects(folder: Path, suspects: Sequence[Suspect], task: Task) -> None:
    """``suspects.csv`` with all of them, and ``suspects.png`` with the first."""
    names, weighed = task.classes, any(one.weight is not None for one in suspects)
    with written_csv(folder / SUSPECTS) as writer:
        writer.writerow(["file", "given", "probably", "p_given", "p_probably", *(["weight"] if weighed else [])])
        for one in suspects:
            cells = [one.name, names[one.given], names[one.probably], f"{one.p_given:.3g}", f"{one.p_probably:.3g}"]
            writer.writerow([*cells, *([f"{one.weight:.3g}"] if weighed else [])])
    note = "Beneath each: the given label, what the network takes it for and how surely, and its file."
    draw_grid(folder / GRID, "Labels that may be wrong", note, [suspects_gallery(suspects, task)])


def suspects_gallery(suspects: Sequence[Suspect], task: Task) -> Gallery:
    """Pictures of the most suspicious."""
    assert task.doubtful is not None
    names, shown = task.classes, suspects[:SHOWN]
    pictures, _ = task.doubtful.examples.images.fetch(torch.tensor([one.position for one in shown]))
    captions = tuple(
        f"{names[one.given]}\n{names[one.probably]}, {one.p_probably:.0%}\n{Path(one.name).name}" for one in shown
    )
    note = (
        f"of {len(suspects):,} labels that may be wrong, the most suspicious first; of {taken_for_others(suspects):,} "
        "the network finds another class more probable; beneath each, the given label first"
    )
    return Gallery("Suspects", note, pictures, captions, (None,) * len(shown))
