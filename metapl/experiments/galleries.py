"""Pictures that say more than figures: what the teacher is sure of, what it is not, and what the student gets wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.recipes.base import Task
from metapl.report import Gallery
from metapl.runs.atomic import replacing

SHOWN = 12
"""Pictures in a gallery."""

FILE = "pictures.safetensors"


@dataclass(frozen=True)
class _Seen:
    """One example as a network sees it."""

    picture: Tensor
    confidence: float
    taken_for: int
    label: int


def draw_galleries(task: Task, labeler: nn.Module, student: nn.Module) -> list[Gallery]:
    """The most and the least confident pseudo-labels, and the most confident mistakes on validation.

    Args:
        task: ``sample`` and ``validation``, where there are any, are looked at as they are, without augmentation.
        labeler: who makes the pseudo-labels.
        student: who is validated.

    Returns: galleries of at most ``SHOWN`` pictures; none of what is no picture, with 1 or 3 channels.

    Cost: one forward pass per example.
    """
    found = []
    if task.sample is not None:
        seen = _look(labeler, task.sample)
        known = task.truth is not None
        looked = f"of {len(seen):,} unlabelled pictures, without augmentation, after training"
        ranked = sorted(seen, key=lambda one: -one.confidence)
        for title, some in (("Most", ranked[:SHOWN]), ("Least", ranked[: -SHOWN - 1 : -1])):
            found.append(_pseudo_labels(f"{title} confident pseudo-labels", looked, some, task.classes, known))
    if task.validation is None:
        return [one for one in found if one is not None]
    seen = _look(student, task.validation)
    wrong = sorted((one for one in seen if one.taken_for != one.label), key=lambda one: -one.confidence)
    note = f"of the student on validation: {len(wrong):,} of {len(seen):,} are wrong"
    found.append(_mistakes("Most confident mistakes", note, wrong[:SHOWN], task.classes))
    return [one for one in found if one is not None]


def _look(model: nn.Module, data: Any) -> list[_Seen]:
    seen = []
    for inputs, labels in batches_of(data, torch.device("cpu")):
        logits, _ = predict_logits(model, [(inputs, labels)])
        best = logits.double().softmax(dim=1).max(dim=1)
        columns = (inputs, best.values.tolist(), best.indices.tolist(), labels.tolist())
        seen += [_Seen(*row) for row in zip(*columns, strict=True)]
    return seen


def _pseudo_labels(title: str, note: str, seen: Sequence[_Seen], classes: Sequence[str], known: bool) -> Gallery | None:
    captions = [f"{classes[one.taken_for]}\n{_percent(one)}" for one in seen]
    marks = tuple(one.taken_for == one.label if known else None for one in seen)
    return _gallery(title, note, seen, captions, marks)


def _mistakes(title: str, note: str, seen: Sequence[_Seen], classes: Sequence[str]) -> Gallery | None:
    captions = [f"{classes[one.taken_for]} {_percent(one)}\nis {classes[one.label]}" for one in seen]
    return _gallery(title, note, seen, captions, (None,) * len(seen))


def _percent(one: _Seen) -> str:
    return f"{100 * one.confidence:.0f} %"


def _gallery(
    title: str, note: str, seen: Sequence[_Seen], captions: Iterable[str], marks: tuple[bool | None, ...]
) -> Gallery | None:
    pictures = [one.picture for one in seen]
    if not pictures or pictures[0].ndim != 3 or pictures[0].shape[0] not in (1, 3):
        return None
    levels = (torch.stack(pictures).clamp(0, 1) * 255).round().to(torch.uint8)
    return Gallery(title, note, levels, tuple(captions), marks)


def write_galleries(folder: Path, galleries: Sequence[Gallery]) -> None:
    """Keep galleries in a run folder, for when its report is drawn again."""
    from safetensors.torch import save

    words = [{"title": g.title, "note": g.note, "captions": g.captions, "marks": g.marks} for g in galleries]
    tensors = {str(number): gallery.pictures.contiguous() for number, gallery in enumerate(galleries)}
    with replacing(folder / FILE) as file:
        file.write(save(tensors, {"galleries": json.dumps(words)}))


def read_galleries(folder: Path) -> list[Gallery]:
    """What :func:`write_galleries` kept; nothing where there is no such file."""
    from safetensors import safe_open

    if not (folder / FILE).exists():
        return []
    with safe_open(folder / FILE, "pt") as file:
        words = json.loads(file.metadata()["galleries"])
        return [
            Gallery(one["title"], one["note"], file.get_tensor(str(i)), tuple(one["captions"]), tuple(one["marks"]))
            for i, one in enumerate(words)
        ]
