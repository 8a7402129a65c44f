"""Pictures that say more than figures: what the teacher is sure of, what it is not, and what the student gets wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.experiments.folder import ANOTHER
from metapl.apps.recipes.base import Task
from metapl.apps.reports import Gallery
from metapl.errors import MetaplError
from metapl.metrics import predict_logits
from metapl.metrics.predictions import batches_of
from metapl.runs.atomic import replacing
from metapl.runs.sealed import read_sealed

SHOWN = 12
"""Pictures in a gallery."""

FILE = "pictures.safetensors"


def draw_galleries(task: Task, labeler: nn.Module, student: nn.Module, name: str = "student") -> list[Gallery]:
    """The most and the least confident pseudo-labels, and the most confident mistakes on validation.

    Args:
        task: ``sample`` and ``validation``, where there are any, are looked at as they are, without augmentation.
        labeler: who makes the pseudo-labels.
        student: who is validated.
        name: of the one who is validated, in words.

    Returns: galleries of at most ``SHOWN`` pictures; none of examples that are not pictures of 1 or 3 channels.

    Cost: one forward pass per example.
    """
    found, names = [], task.classes
    if task.sample is not None:
        seen = _look(labeler, task.sample)
        note = f"of {len(seen):,} unlabeled pictures, without augmentation, after training"
        for title, shown in (("Most", seen[:SHOWN]), ("Least", seen[: -SHOWN - 1 : -1])):
            captions = [f"{names[taken_for]}\n{100 * sure:.0f} %" for _, sure, taken_for, _ in shown]
            marks = [taken_for == label if task.truth is not None else None for *_, taken_for, label in shown]
            pictures = [picture for picture, *_ in shown]
            found.append(gallery_of(f"{title} confident pseudo-labels", note, pictures, captions, marks))
    if task.validation is not None:
        seen = _look(student, task.validation)
        wrong = [each for each in seen if each[2] != each[3]]
        note = f"of the {name} on validation: {len(wrong):,} of {len(seen):,} are wrong"
        shown = wrong[:SHOWN]
        captions = [f"{names[taken]} {100 * sure:.0f} %\nis {names[label]}" for _, sure, taken, label in shown]
        found.append(gallery_of("Most confident mistakes", note, [picture for picture, *_ in shown], captions))
    return [gallery for gallery in found if gallery is not None]


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
    """Examples (C, H, W) in [0, 1] as a gallery; None where there are none, or they are not pictures of 1 or 3
    channels."""
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
    """What :func:`write_galleries` kept; nothing where there is no such file.

    Raises:
        MetaplError: the file is not the one of this SHA-256, where that is known, or cannot be read.
    """
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
            Gallery(
                entry["title"], entry["note"], pictures[str(number)], tuple(entry["captions"]), tuple(entry["marks"])
            )
            for number, entry in enumerate(words)
        ]
    except Exception as error:  # safetensors raises its own types; without a checksum anything may stand there
        raise MetaplError(f"{path} cannot be read: {type(error).__name__}, {error}; remove it to go on.") from error
