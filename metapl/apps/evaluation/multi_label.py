"""Accuracy where an example has several right labels or none, and files that say which, ReaL's among them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from metapl.apps.machine.sealed import read_plain
from metapl.errors import MetaplError, few

Label = int | str
_few = partial(few, most=3, longest=60)


@dataclass(frozen=True)
class MultiLabelAccuracy:
    """What :func:`multi_label_accuracy` found: a fraction in [0, 1], of n examples with a label; those
    ``without_label`` do not count."""

    accuracy: float
    n: int
    without_label: int


def multi_label_accuracy(predicted_N: Tensor, label_sets: Sequence[Set[int]]) -> MultiLabelAccuracy:
    """How often the class that was predicted is one of the right ones.

        accuracy = Σ_i [ŷ_i ∈ S_i] / Σ_i [S_i ≠ ∅]

    Args:
        predicted_N: (N,) integers, the class ŷ_i of each example.
        label_sets: N sets S_i of right classes; an example whose set is empty is left out.

    Raises:
        MetaplError: other than N sets, or all of them are empty.

    >>> import torch
    >>> multi_label_accuracy(torch.tensor([0, 1, 2, 2]), [{0, 5}, {0}, {1, 2}, set()])
    MultiLabelAccuracy(accuracy=0.6666666666666666, n=3, without_label=1)

    Beyer et al. 2020, "Are we done with ImageNet?", section 3.1: ReaL accuracy.
    """
    if predicted_N.shape != (len(label_sets),) or not any(label_sets):
        raise MetaplError(
            f"there are label sets for {len(label_sets):,} examples, {sum(map(bool, label_sets)):,} of them with a "
            f"label, and predictions of shape {tuple(predicted_N.shape)}; expected as many predictions as sets, in the "
            "same order, and at least one label."
        )
    hits = [label in labels for label, labels in zip(predicted_N.tolist(), label_sets, strict=True) if labels]
    return MultiLabelAccuracy(sum(hits) / len(hits), len(hits), len(label_sets) - len(hits))


def read_label_sets(
    path: Path, classes: Sequence[str], names: Sequence[str] | None = None
) -> tuple[frozenset[int], ...]:
    """The right labels of each test example, from a file in one of three forms.

    - JSON, a list of lists of classes: in the order of the test set. Where all test examples are called
      ``ILSVRC2012_val_`` and 8 digits, entry k is that of number k, as in ReaL's own ``real.json``.
    - JSON, an object of lists of classes by file name.
    - CSV with the columns ``file`` and ``labels``, the latter with ``;`` between them, or empty.

    Classes are given by name or by index, all in a file alike; text is names where all of it is names of classes. A
    file is given by its name below the test folder (``cat/1.png``), or by the last part of that where no other test
    file has the same; names of other files are passed over.

    Args:
        path: the file.
        classes: the names of the classes, in the order of their indices.
        names: of the N test examples, in their order, with slashes; None where they have none.

    Returns:
        N sets of indices; where the test examples have no names, as many as the file has.

    Raises:
        MetaplError: a file in no such form, test examples without an entry or with two, a name that several have, or
            classes that are unknown or can be read in two ways.
    """
    try:
        text = read_plain(path).decode("utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            entries = json.loads(text, object_pairs_hook=_once_each)
        else:
            entries = _once_each(_rows(text))
        keyed = entries if isinstance(entries, dict) else dict(enumerate(entries))
        for where, labels in keyed.items():
            if not isinstance(labels, list) or any(type(label) not in (int, str) for label in labels):
                raise ValueError(f"the entry of {where} is {_few([json.dumps(labels)])}; expected a list of classes")
        index = _indices({label for labels in keyed.values() for label in labels}, classes)
        in_order = _by_name(entries, names) if isinstance(entries, dict) else _by_position(entries, names)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise MetaplError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return tuple(frozenset(index[label] for label in labels) for labels in in_order)


def _rows(text: str) -> Iterator[tuple[str, list[Label]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"file", "labels"} <= set(reader.fieldnames or ()):
        first = text.partition("\n")[0]
        raise ValueError(f"it begins with {_few([first])!r}; expected JSON, or CSV with the columns file and labels")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many cells as the first; labels are separated by ;")
        yield row["file"].strip(), [part.strip() for part in row["labels"].split(";") if part.strip()]


def _once_each(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    if repeated := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"it has more than one entry of {_few(repeated)}; expected one, with all the labels")
    return dict(pairs)


def _indices(labels: Set[Label], classes: Sequence[str]) -> dict[Label, int]:
    by_name: dict[Label, int] = {name: index for index, name in enumerate(classes)}
    if labels <= by_name.keys():
        return by_name
    numbers = {label: int(label) for label in labels if isinstance(label, int) or re.fullmatch("[0-9]{1,9}", label)}
    unknown = {label for label, number in numbers.items() if not 0 <= number < len(classes)}
    if unknown := unknown if len(numbers) == len(labels) else labels - by_name.keys():
        raise ValueError(
            f"{len(unknown):,} of the {len(labels):,} classes in it are not among the run's: "
            f"{_few(sorted(unknown, key=str))}; expected their names, such as {_few(classes)}, or 0 to "
            f"{len(classes) - 1}, all alike"
        )
    if two := sorted((x for x, number in numbers.items() if by_name.get(str(x), number) != number), key=str):
        raise ValueError(
            f"{len(two):,} of the {len(numbers):,} classes can be read in two ways: {two[0]} is the index of "
            f"{classes[numbers[two[0]]]!r} and the name of another class; expected names alone"
        )
    return numbers


def _by_position(entries: list[list[Label]], names: Sequence[str] | None) -> list[list[Label]]:
    matches = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", PurePosixPath(name).stem) for name in names or ()]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers or len(numbers) < len(matches) or min(numbers) < 1:
        numbers = list(range(1, 1 + len(entries if names is None else names)))
        if len(numbers) != len(entries):
            raise ValueError(f"it is a list of {len(entries):,} entries, and there are {len(numbers):,} test examples")
    if max(numbers, default=0) > len(entries):
        raise ValueError(f"it is a list of {len(entries):,} entries, and a test file has the number {max(numbers)}")
    return [entries[number - 1] for number in numbers]


def _by_name(entries: dict[str, list[Label]], names: Sequence[str] | None) -> list[list[Label]]:
    """The entry of each test file, by its whole name, or by its last part where that is not another's whole name."""
    if names is None:
        raise ValueError("its labels are by file name, and the test examples have no names; expected a JSON list")
    known, lasts = set(names), Counter(PurePosixPath(name).name for name in names)
    found, faults = [], []
    for name in names:
        last = PurePosixPath(name).name
        own = [key for key in {name: 0, last: 0} if key in entries and (key == name or key not in known)]
        shared = name not in own and lasts[last] > 1
        if len(own) != 1 or shared:
            faults.append(f"{name} has {_few(own) if own else 'no entry'}{', as others have' * (shared and bool(own))}")
        found.append(own[0] if own else "")
    if faults:
        raise ValueError(
            f"{len(faults):,} of the {len(names):,} test files do not have an entry each of their own: {_few(faults)}; "
            "expected one by the name with its folder, and an empty list where no label is right; the names in it: "
            f"{_few(entries)}"
        )
    return [entries[name] for name in found]
