"""The examples whose given labels are most likely wrong."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from metapl.apps import web
from metapl.apps.methods import Doubtful
from metapl.apps.pictures.input import Input
from metapl.apps.words import written_csv
from metapl.errors import MetaplError
from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.problems import Table
from metapl.training import Trainer
from metapl.training.trainer import BilevelTrainer

SUSPECTS, SHOWN = "suspects.csv", 48  # the list of a run, and how many the page shows


class Suspect(NamedTuple):
    """An example, and what the network takes it for."""

    name: str  # such as its file
    given: int  # its label
    probably: int  # the most probable class
    p_given: float
    p_probably: float
    weight: float | None = None  # that was learned for it, where weights of examples were


def find_suspects(doubtful: Doubtful, trained: Trainer) -> list[Suspect]:
    """All the examples, first those whose given label the network finds least probable, without augmentation."""
    teacher, weights = trained.teacher, None
    if isinstance(trained, BilevelTrainer) and isinstance(teacher, Table) and teacher.values.ndim == 1:  # one each
        weights = teacher.values.detach().cpu().sigmoid().tolist()
    found: list[tuple[float, int, int, int, float]] = []
    for inputs, positions in batches_of(doubtful.examples, torch.device("cpu")):
        given = doubtful.given[positions]
        logits, _ = predict_logits(trained.student, [(inputs, given)])
        log_p = logits.double().log_softmax(dim=1)
        best = log_p.max(dim=1)
        of_given = log_p.gather(1, given[:, None])[:, 0]
        found += zip(*(c.tolist() for c in (of_given, positions, given, best.indices, best.values)), strict=True)
    suspects = []
    for log_p_given, i, label, taken, log_p_best in sorted(found):
        learned = None if weights is None else weights[i]
        p = math.exp(log_p_given), math.exp(log_p_best)
        suspects.append(Suspect(doubtful.names[i], label, taken, *p, learned))
    return suspects


def what_they_are(suspects: Sequence[Suspect]) -> str:
    """What the list says as a whole, which is little where the network agrees with few of the labels."""
    others = sum(one.probably != one.given for one in suspects)
    more = ": it has not learned enough for this list; train it longer (--minutes)" * (2 * others > len(suspects))
    return f"of {others:,} of {len(suspects):,} the network finds another class more probable{more}"


def write_suspects(folder: Path, suspects: Sequence[Suspect], names: Sequence[str]) -> None:
    """``suspects.csv`` with all of them."""
    weighed = any(one.weight is not None for one in suspects)
    with written_csv(folder / SUSPECTS) as writer:
        writer.writerow(["file", "given", "probably", "p_given", "p_probably", *(["weight"] if weighed else [])])
        for one in suspects:
            cells = [one.name, names[one.given], names[one.probably], f"{one.p_given:.3g}", f"{one.p_probably:.3g}"]
            writer.writerow([*cells, *([f"{one.weight:.3g}"] if weighed else [])])


def suspects_shown(folder: Path, given: Input) -> str:
    """The first of the list for the page, as far as their pictures are there."""
    if not (folder / SUSPECTS).is_file():
        return ""
    with (folder / SUSPECTS).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    shown = []
    for row in rows[:SHOWN]:
        caption = f"{row['given']}\n{row['probably']}, {float(row['p_probably']):.0%}\n{Path(row['file']).name}"
        try:
            x = given.read(Path(row["file"]))
        except (MetaplError, OSError):
            continue
        shown.append(web.Picture(x, caption))
    note = (
        f"of {len(rows):,} labels, the most suspicious first; beneath each, the given label, what the network takes it "
        f"for and how surely, and its file. {SUSPECTS} has all of them."
    )
    return web.pictures("Labels that may be wrong", note, shown)
