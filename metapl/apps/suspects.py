"""The examples whose given labels are most likely wrong."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

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


def write_suspects(folder: Path, doubtful: Doubtful, trained: Trainer, classes: Sequence[str]) -> str:
    """All the examples, first those whose given label the network finds least probable, without augmentation; with the
    weight that was learned for each, where weights of examples were. What it says as a whole."""
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
    with written_csv(folder / SUSPECTS) as writer:
        writer.writerow(["file", "given", "probably", "p_given", "p_probably", *(["weight"] if weights else [])])
        for log_p_given, number, label, taken, log_p_taken in sorted(found):
            shares = [f"{math.exp(each):.3g}" for each in (log_p_given, log_p_taken)]
            cells = [doubtful.names[number], classes[label], classes[taken], *shares]
            writer.writerow([*cells, *([f"{weights[number]:.3g}"] if weights else [])])
    # That is little where the network agrees with few of the labels.
    others = sum(taken != label for _, _, label, taken, _ in found)
    more = ": it has not learned enough for this list; train it longer (--minutes)" * (2 * others > len(found))
    return f"of {others:,} of {len(found):,} the network finds another class more probable{more}"


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
