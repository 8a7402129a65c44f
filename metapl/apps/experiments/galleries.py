"""Pictures that say more than figures: what the teacher is sure of, what it is not, what the student gets wrong, and
the examples whose given labels are most likely wrong."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metapl.apps.experiments.folder import ANOTHER
from metapl.apps.machine.sealed import read_sealed, replacing
from metapl.apps.pictures.csv_files import written_csv
from metapl.apps.recipes.base import Doubtful, Task
from metapl.apps.reports import Gallery, draw_grid
from metapl.errors import MetaplError
from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.problems import Table
from metapl.training import Trainer
from metapl.training.trainer import BilevelTrainer

FILE, SUSPECTS, GRID = "pictures.safetensors", "suspects.csv", "suspects.png"
SHOWN, SUSPECTS_SHOWN = 12, 48  # pictures in a gallery, and in the one of suspects


def draw_galleries(task: Task, labeler: nn.Module, student: nn.Module, name: str = "student") -> list[Gallery]:
    """The labeler's most and least confident pseudo-labels, and the student's most confident mistakes on validation."""
    found, names = [], task.classes
    if task.sample is not None:
        seen = _look(labeler, task.sample)
        note = f"of {len(seen):,} unlabeled pictures, without augmentation, after training"
        of_classes: dict[int, list[Any]] = {}
        for one in seen:
            of_classes.setdefault(one[2], []).append(one)
        in_turn = [one for row in zip_longest(*of_classes.values()) for one in row if one is not None]
        for title, shown in (("Most", in_turn[:SHOWN]), ("Least", seen[: -SHOWN - 1 : -1])):
            captions = [f"{names[taken_for]}\n{100 * sure:.0f} %" for _, sure, taken_for, _ in shown]
            marks = [taken_for == label if task.truth is not None else None for *_, taken_for, label in shown]
            pictures = [picture for picture, *_ in shown]
            found.append(gallery_of(f"{title} confident pseudo-labels", note, pictures, captions, marks))
    if task.validation is not None:
        found.append(mistakes(student, task.validation, names, f"{name} on validation"))
    return [gallery for gallery in found if gallery is not None]


def mistakes(
    model: nn.Module, data: Any, classes: Sequence[str], whose: str, files: Sequence[str] = ()
) -> Gallery | None:
    """The model's most confident mistakes on labeled examples, beneath each what it is taken for, what it is, and of
    ``files`` its own; None where there are none."""
    kept: list[tuple[float, Tensor, list[str]]] = []
    n = wrong = 0
    for inputs, labels in batches_of(data, torch.device("cpu")):
        logits, _ = predict_logits(model, [(inputs, labels)])
        best = logits.double().softmax(dim=1).max(dim=1)
        for x, sure, taken, label in zip(
            inputs, best.values.tolist(), best.indices.tolist(), labels.tolist(), strict=True
        ):
            if taken != label:
                wrong += 1
                words = [f"{classes[taken]} {100 * sure:.0f} %", f"is {classes[label]}", *files[n : n + 1]]
                kept.append((sure, x, words))
            n += 1
        kept = sorted(kept, key=lambda each: -each[0])[:SHOWN]  # the others need no memory
    note = f"of the {whose}: {wrong:,} of {n:,} are wrong"
    captions = ["\n".join(words) for *_, words in kept]
    return gallery_of("Most confident mistakes", note, [x for _, x, _ in kept], captions)


def _look(model: nn.Module, data: Any) -> list[tuple[Tensor, float, int, int]]:
    """Each example with the model's confidence, what it is taken for and its label, the most confident first."""
    seen: list[tuple[Tensor, float, int, int]] = []
    for inputs, labels in batches_of(data, torch.device("cpu")):
        logits, _ = predict_logits(model, [(inputs, labels)])
        best = logits.double().softmax(dim=1).max(dim=1)
        seen += zip(inputs, best.values.tolist(), best.indices.tolist(), labels.tolist(), strict=True)
    return sorted(seen, key=lambda each: -each[1])


def gallery_of(
    title: str,
    note: str,
    pictures: Sequence[Tensor],
    captions: Sequence[str],
    marks: Sequence[bool | None] | None = None,
) -> Gallery | None:
    """Examples (C, H, W) in [0, 1] as a gallery; None where there are none, or not pictures of 1 or 3 channels."""
    if not len(pictures) or pictures[0].ndim != 3 or pictures[0].shape[0] not in (1, 3):
        return None
    levels = (torch.stack(tuple(pictures)).clamp(0, 1) * 255).round().to(torch.uint8)
    return Gallery(title, note, levels, tuple(captions), (None,) * len(levels) if marks is None else tuple(marks))


def write_galleries(folder: Path, galleries: Sequence[Gallery]) -> str:
    """Keep galleries in a run folder, for when its report is drawn again; the SHA-256 of their file."""
    from safetensors.torch import save

    words = [{"title": g.title, "note": g.note, "captions": g.captions, "marks": g.marks} for g in galleries]
    tensors = {str(number): gallery.pictures.contiguous() for number, gallery in enumerate(galleries)}
    content = save(tensors, {"galleries": json.dumps(words)})
    with replacing(folder / FILE) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def read_galleries(folder: Path, sha256: str | None = None) -> list[Gallery]:
    """What :func:`write_galleries` kept, of this SHA-256 where that is known; nothing where there is no such file."""
    from safetensors.torch import load

    path = folder / FILE
    if not path.is_file():
        return []
    content = read_sealed(path, sha256, mend=ANOTHER)
    try:
        pictures = load(content)
        length = int.from_bytes(content[:8], "little")
        words = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["galleries"])
        return [
            Gallery(of["title"], of["note"], pictures[str(number)], tuple(of["captions"]), tuple(of["marks"]))
            for number, of in enumerate(words)
        ]
    except Exception as error:  # safetensors raises its own types; without a checksum anything may stand there
        raise MetaplError(f"{path} cannot be read: {type(error).__name__}, {error}; remove it to go on.") from error


# ------------------------------------------------------------------------------------------------------------- suspects


class Suspect(NamedTuple):
    """An example, and what the network takes it for."""

    name: str  # such as its file
    position: int  # in the data set
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
        suspects.append(Suspect(doubtful.names[i], i, label, taken, *p, learned))
    return suspects


def what_they_are(suspects: Sequence[Suspect]) -> str:
    """What the list says as a whole, which is little where the network agrees with few of the labels."""
    others = sum(one.probably != one.given for one in suspects)
    text = f"of {others:,} of {len(suspects):,} the network finds another class more probable"
    if 2 * others <= len(suspects):
        return text
    return (
        f"{text}: where fewer than half of the labels are wrong, it has not learned enough for this list, and should "
        "be trained longer (--minutes)"
    )


def write_suspects(folder: Path, suspects: Sequence[Suspect], task: Task) -> None:
    """``suspects.csv`` with all of them, and ``suspects.png`` with the first."""
    text, names, weighed = what_they_are(suspects), task.classes, any(one.weight is not None for one in suspects)
    with written_csv(folder / SUSPECTS) as writer:
        writer.writerow(["file", "given", "probably", "p_given", "p_probably", *(["weight"] if weighed else [])])
        for one in suspects:
            cells = [one.name, names[one.given], names[one.probably], f"{one.p_given:.3g}", f"{one.p_probably:.3g}"]
            writer.writerow([*cells, *([f"{one.weight:.3g}"] if weighed else [])])
    draw_grid(
        folder / GRID, "Labels that may be wrong", f"{text[0].upper()}{text[1:]}.", [suspects_gallery(suspects, task)]
    )


def suspects_gallery(suspects: Sequence[Suspect], task: Task) -> Gallery:
    assert task.doubtful is not None
    names, shown = task.classes, suspects[:SUSPECTS_SHOWN]
    pictures, _ = task.doubtful.examples.images.fetch(torch.tensor([one.position for one in shown]))
    captions = tuple(
        f"{names[one.given]}\n{names[one.probably]}, {one.p_probably:.0%}\n{Path(one.name).name}" for one in shown
    )
    note = (
        f"of {len(suspects):,} labels, the most suspicious first; beneath each, the given label, what the network "
        "takes it for and how surely, and its file"
    )
    return Gallery("Suspects", note, pictures, captions, (None,) * len(shown))
