"""Labels that may be wrong: a run's list, ``suspects.csv``, and its first ones for the page."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from metapl.apps import web
from metapl.apps.methods import Doubtful
from metapl.apps.printing import written_csv
from metapl.errors import MetaplError
from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.networks.card import Input
from metapl.problems import Table
from metapl.training import Trainer
from metapl.training.trainer import BilevelTrainer

# The list of a run's suspects, and how many of them the page shows.
SUSPECTS = "suspects.csv"
SUSPECTS_SHOWN = 48


@dataclass(frozen=True, order=True)
class Suspect:
    """What the network says of the given label of an example.

    Suspects are in the order of these fields: the least probable given label comes first.

    Args:
        log_p_given: the log-probability of the given label.
        number: of the example.
        given_label: the given label.
        probable: the most probable class.
        log_p_probable: its log-probability.
    """

    log_p_given: float
    number: int
    given_label: int
    probable: int
    log_p_probable: float


def write_suspects(
    folder: Path, doubtful: Doubtful, trained: Trainer, classes: Sequence[str]
) -> str:
    """Write a list of all examples, those with the least probable given label first.

    The network sees them without augmentation. Beside each stands its learned weight, where weights
    of examples were learned.

    Returns: what the list says as a whole.
    """
    suspects = judged(doubtful, trained)
    weights = weights_of_examples(trained)
    with written_csv(folder / SUSPECTS) as writer:
        head = ["file", "given", "probably", "p_given", "p_probably"]
        if weights is not None:
            head.append("weight")
        writer.writerow(head)
        for suspect in sorted(suspects):
            cells = [
                doubtful.names[suspect.number],
                classes[suspect.given_label],
                classes[suspect.probable],
                f"{math.exp(suspect.log_p_given):.3g}",
                f"{math.exp(suspect.log_p_probable):.3g}",
            ]
            if weights is not None:
                cells.append(f"{weights[suspect.number]:.3g}")
            writer.writerow(cells)
    others = sum(suspect.probable != suspect.given_label for suspect in suspects)
    text = f"of {others:,} of {len(suspects):,} the network finds another class more probable"
    # A network that agrees with few of the labels says little of them.
    if 2 * others > len(suspects):
        text += ": it has not learned enough for this list; train it longer (--minutes)"
    return text


def judged(doubtful: Doubtful, trained: Trainer) -> list[Suspect]:
    """Return what the student says of the given label of each example."""
    suspects: list[Suspect] = []
    for inputs, positions in batches_of(doubtful.examples, torch.device("cpu")):
        given_labels = doubtful.given_labels[positions]
        logits, _ = predict_logits(trained.student, [(inputs, given_labels)])
        log_p = logits.double().log_softmax(dim=1)
        best = log_p.max(dim=1)
        log_p_given = log_p.gather(1, given_labels[:, None])[:, 0]
        for row in range(len(given_labels)):
            suspect = Suspect(
                log_p_given=float(log_p_given[row]),
                number=int(positions[row]),
                given_label=int(given_labels[row]),
                probable=int(best.indices[row]),
                log_p_probable=float(best.values[row]),
            )
            suspects.append(suspect)
    return suspects


def weights_of_examples(trained: Trainer) -> list[float] | None:
    """Return the learned weights of the examples; None where none were learned."""
    teacher = trained.teacher
    if not isinstance(trained, BilevelTrainer) or not isinstance(teacher, Table):
        return None
    # A table with one number for each example holds their weights; one of label noise is square.
    if teacher.values.ndim != 1:
        return None
    weights: list[float] = teacher.values.detach().cpu().sigmoid().tolist()
    return weights


def suspects_shown(folder: Path, network_input: Input) -> str:
    """Return the first suspects for the page, as far as their pictures are there."""
    if not (folder / SUSPECTS).is_file():
        return ""
    with (folder / SUSPECTS).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    pictures = []
    for row in rows[:SUSPECTS_SHOWN]:
        probably = f"{row['probably']}, {float(row['p_probably']):.0%}"
        caption = f"{row['given']}\n{probably}\n{Path(row['file']).name}"
        try:
            x = network_input.read(Path(row["file"]))
        except (MetaplError, OSError):
            continue
        pictures.append(web.Picture(x, caption))
    note = (
        f"of {len(rows):,} labels, the most suspicious first; beneath each, the given label, what "
        f"the network takes it for and how surely, and its file. {SUSPECTS} has all of them."
    )
    return web.pictures("Labels that may be wrong", note, pictures)
