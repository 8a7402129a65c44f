"""Which examples of a data set are labeled, unlabeled, held out: drawn from a seed, and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metapl.data import draws
from metapl.errors import MetaplError
from metapl.runs.atomic import write_whole
from metapl.runs.sealed import read_json

_PARTS = ("labeled", "unlabeled", "validation", "test")
_VALIDATION, _LABELED = 0x5B17, 0x5B18  # keep these draws apart from every other use of a seed


@dataclass(frozen=True, eq=False)
class Split:
    """The parts of a data set, as indices.

    Args:
        name: of the protocol, such as "cifar10-4k".
        seed: that it was drawn from.
        labeled, unlabeled, validation: indices into the training data, disjoint, sorted, int64.
        test: indices into the test data.
        labels_hash: of the labels of the training and of the test data, see :func:`labels_hash`; the order counts.
    """

    name: str
    seed: int
    labeled: Tensor
    unlabeled: Tensor
    validation: Tensor
    test: Tensor
    labels_hash: str

    @property
    def hash(self) -> str:
        """SHA-256 of all fields, in hexadecimal."""
        return _hash(self._fields())

    def counts(self) -> dict[str, int]:
        """Number of examples in each part."""
        return {part: len(getattr(self, part)) for part in _PARTS}

    def save(self, path: str | Path) -> None:
        """Write the split as JSON.

        Raises:
            MetaplError: the file cannot be written.
        """
        text = json.dumps({"version": 1, **self._fields(), "hash": self.hash}, separators=(",", ":"))
        write_whole(Path(path), text.encode(), "expected a folder with room.")

    @classmethod
    def load(cls, path: str | Path, train_labels: Tensor, test_labels: Tensor) -> Split:
        """Read a split, for the data set that it was made for.

        Args:
            path: what :meth:`save` wrote.
            train_labels, test_labels: of the data set as it is now, int64 (n,).

        Raises:
            MetaplError: the file cannot be read, was changed, or is of a data set with other labels, or the same in
                another order.
        """
        parts = dict.fromkeys(_PARTS, list[int])
        hints = {"version": Literal[1], "hash": str, "name": str, "seed": int, "labels_hash": str, **parts}
        content = read_json(path, hints, hints, mend="Expected what Split.save wrote: draw the split anew.")
        if content.pop("hash") != _hash({name: value for name, value in content.items() if name != "version"}):
            raise MetaplError(f"{path} was changed after it was written: its hash does not match; draw the split anew.")
        indices = {part: torch.tensor(content[part], dtype=torch.int64) for part in _PARTS}
        split = cls(name=content["name"], seed=content["seed"], labels_hash=content["labels_hash"], **indices)
        if split.labels_hash != labels_hash(train_labels, test_labels):
            raise MetaplError(
                f"{path} is the split {split.name!r} of other data: its parts have {sum(split.counts().values())} "
                f"examples; there are {len(train_labels)} to train on and {len(test_labels)} to test on, or their "
                "labels are in another order; expected the data set that the split was drawn for, with all its files"
            )
        return split

    def _fields(self) -> dict[str, Any]:
        parts = {part: getattr(self, part).tolist() for part in _PARTS}
        return {"name": self.name, "seed": self.seed, "labels_hash": self.labels_hash, **parts}


def _hash(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def labels_hash(train_labels: Tensor, test_labels: Tensor) -> str:
    """SHA-256 of two vectors of labels, in hexadecimal: the same for the same data set in the same order."""
    digest = hashlib.sha256()
    for labels in (train_labels, test_labels):
        digest.update(f"{len(labels)}:".encode())
        digest.update(labels.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def draw_split(
    train_labels: Tensor,
    test_labels: Tensor,
    *,
    name: str,
    seed: int,
    labels_per_class: int,
    validation: int,
    labeled_from: int | None = None,
) -> Split:
    """Draw which training examples are held out, and which of the rest keep their labels.

    Validation is drawn first, with the classes in proportion (largest remainders), then ``labels_per_class`` of each
    class; the rest is unlabeled. So with one seed, the labeled examples for fewer labels lie within those for more.

    Args:
        train_labels, test_labels: int64 (n,), classes 0, …, C − 1; every test example is in the test part.
        name: of the protocol.
        seed: any integer.
        labels_per_class: 1 or more.
        validation: number of training examples that are not trained on, 0 or more.
        labeled_from: labels are kept among the first so many examples only; None: among all.

    Raises:
        MetaplError: a number out of its range, or a class has too few examples.

    >>> labels = torch.arange(10).repeat(50)
    >>> draw_split(labels, labels[:100], name="tiny", seed=0, labels_per_class=4, validation=50).counts()
    {'labeled': 40, 'unlabeled': 410, 'validation': 50, 'test': 100}
    """
    count = len(train_labels)
    if labels_per_class < 1 or not 0 <= validation < count:
        raise MetaplError(
            f"split {name!r} got labels_per_class {labels_per_class} and validation {validation} for "
            f"{count} training examples; expected 1 or more labels, and fewer held out than there are"
        )
    classes, of, sizes = train_labels.unique(return_inverse=True, return_counts=True)
    # Whole numbers: a quotient in floating point could rank equal remainders differently elsewhere.
    share, remainder = sizes * validation // count, sizes * validation % count
    share[remainder.argsort(descending=True, stable=True)[: validation - int(share.sum())]] += 1
    held_out = _first_of_each(_shuffled(count, seed, _VALIDATION), of, share)
    free = torch.ones(count, dtype=torch.bool)
    free[held_out] = False
    order = _shuffled(count, seed, _LABELED)
    able = order[free[order] & (order < (count if labeled_from is None else labeled_from))]
    counts = of[able].bincount(minlength=len(classes))
    if int(counts.min()) < labels_per_class:
        fewest = int(counts.argmin())
        raise MetaplError(
            f"split {name!r} needs {labels_per_class} labels of class {int(classes[fewest])}, which has "
            f"{int(counts[fewest])} examples outside validation; ask for fewer labels or a smaller validation part"
        )
    labeled = _first_of_each(able, of, torch.full_like(classes, labels_per_class))
    free[labeled] = False
    unlabeled, test = free.nonzero()[:, 0], torch.arange(len(test_labels))
    return Split(name, seed, labeled, unlabeled, held_out, test, labels_hash(train_labels, test_labels))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Set a part of each class aside for validation.

    Of n examples of a class, round(fraction · n) are set aside, but at least 1 and at most n − 1; a class with one
    example is trained on.

    Args:
        labels: int64 (n,).
        fraction: of each class, in (0, 1).
        seed: any integer.

    Returns:
        (train, validation): indices, int64, disjoint, sorted, and together all.

    Raises:
        MetaplError: a fraction out of its range; no class has two examples.

    >>> train, validation = stratified_split(torch.tensor([0] * 8 + [1] * 4 + [2]), 0.25, seed=0)
    >>> len(train), len(validation)
    (10, 3)
    """
    if not 0 < fraction < 1:
        raise MetaplError(f"stratified_split got fraction {fraction}; expected a number between 0 and 1, such as 0.1.")
    _, of, sizes = labels.unique(return_inverse=True, return_counts=True)
    share = (fraction * sizes.double()).round().long().clamp(min=1).minimum(sizes - 1)
    validation = _first_of_each(_shuffled(len(labels), seed, _VALIDATION), of, share)
    if not len(validation):
        raise MetaplError(f"no class of the {len(labels)} labeled pictures has two; expected more, or --val FOLDER.")
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[validation] = False
    return rest.nonzero()[:, 0], validation


def _first_of_each(order: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """The first ``counts[c]`` examples of each class c in an order of examples, sorted by their number."""
    in_order = classes[order]
    return order[rank_in_class(in_order) < counts[in_order]].sort().values


def rank_in_class(classes: Tensor) -> Tensor:
    """For each entry of (n,) int64, how many entries before it are equal to it.

    >>> rank_in_class(torch.tensor([3, 0, 3, 3, 0]))
    tensor([0, 0, 1, 2, 1])
    """
    by_class = classes.argsort(stable=True)
    counts = classes.bincount()
    rank = torch.empty_like(classes)
    rank[by_class] = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes[by_class]]
    return rank


def _shuffled(size: int, seed: int, stream: int) -> Tensor:
    """A random order of range(size)."""
    return torch.argsort(draws.bits(seed, 0, torch.arange(size), 1, stream)[:, 0], stable=True)
