"""Accuracy where an example has several right labels or none, and files that say which, ReaL's among them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from metapl.errors import MetaplError, few
from metapl.runs.sealed import read_plain

Label = int | str
LabelSets = tuple[frozenset[int], ...]

COLUMNS = ("file", "labels")
"""Of label sets in CSV."""

BETWEEN_LABELS = ";"

_few = partial(few, most=3, longest=60)


@dataclass(frozen=True)
class MultiLabelAccuracy:
    """What :func:`multi_label_accuracy` found.

    Args:
        accuracy: a fraction between 0 and 1.
        n: examples with a label.
        without_label: examples that have none, and do not count.
    """

    accuracy: float
    n: int
    without_label: int

    def to_json(self) -> dict[str, Any]:
        """The same figures, ready for ``json.dumps``."""
        return asdict(self)


def multi_label_accuracy(predicted_N: Tensor, label_sets: Sequence[Set[int]]) -> MultiLabelAccuracy:
    """How often the class that was predicted is one of the right ones.

        accuracy = Σ_i [ŷ_i ∈ S_i] / Σ_i [S_i ≠ ∅]

    Args:
        predicted_N: (N,) integers, the class ŷ_i of each example.
        label_sets: N sets S_i of right classes; an example whose set is empty is left out.

    Returns:
        the accuracy, and of how many.

    Raises:
        MetaplError: other than N sets, or all of them are empty.

    >>> import torch
    >>> multi_label_accuracy(torch.tensor([0, 1, 2, 2]), [{0, 5}, {0}, {1, 2}, set()])
    MultiLabelAccuracy(accuracy=0.6666666666666666, n=3, without_label=1)

    Beyer et al. 2020, "Are we done with ImageNet?", section 3.1: ReaL accuracy.
    """
    if predicted_N.shape != (len(label_sets),):
        raise MetaplError(
            f"there are label sets for {len(label_sets):,} examples, and predictions of shape "
            f"{tuple(predicted_N.shape)}; expected as many of one as of the other, in the same order."
        )
    hits = [label in labels for label, labels in zip(predicted_N.tolist(), label_sets, strict=True) if labels]
    if not hits:
        raise MetaplError(f"none of the {len(label_sets):,} examples has a label; expected at least one.")
    return MultiLabelAccuracy(sum(hits) / len(hits), len(hits), len(label_sets) - len(hits))


def read_label_sets(path: Path, classes: Sequence[str], names: Sequence[str] | None = None) -> LabelSets:
    """The right labels of each test example, from a file in one of three forms.

    - JSON, a list of lists of classes: in the order of the test set. Where all test examples are called
      ``ILSVRC2012_val_`` and 8 digits, entry k is that of number k, as in ReaL's own ``real.json``.
    - JSON, an object of lists of classes by file name.
    - CSV with the columns ``file`` and ``labels``, the latter with ``;`` between them, or empty.

    Classes are given by name or by index, all in a file alike. Numbers in JSON are indices; text is names where all of
    it is names of classes, and indices otherwise. A file is given by its name below the test folder (``cat/1.png``), or
    by the last part of that where no other test file has the same; names of other files are passed over.

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
    entries = _parsed(path)
    lists = entries.values() if isinstance(entries, dict) else entries
    index = _indices(path, {label for labels in lists for label in labels}, classes)
    in_order = _by_name(path, entries, names) if isinstance(entries, dict) else _by_position(path, entries, names)
    return tuple(frozenset(index[label] for label in labels) for labels in in_order)


# ---------------------------------------------------------------------------------------------------------- the forms


def _parsed(path: Path) -> list[list[Label]] | dict[str, list[Label]]:
    try:
        text = read_plain(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise MetaplError(f"{path} cannot be read: {reason}.") from error
    if text.lstrip()[:1] in ("[", "{"):
        return _from_json(path, text)
    try:
        return _from_csv(path, text)
    except csv.Error as error:  # a cell of more than 128 KiB, which a quote that is not closed makes
        raise MetaplError(
            f"{path} cannot be read as CSV: {error}; expected the columns {' and '.join(COLUMNS)}, and each quote "
            "closed."
        ) from error


def _from_json(path: Path, text: str) -> list[list[Label]] | dict[str, list[Label]]:
    try:
        entries = json.loads(text, object_pairs_hook=lambda pairs: _once_each(path, pairs))
    except (ValueError, RecursionError) as error:  # whole numbers of 5,000 digits are not read
        raise MetaplError(f"{path} cannot be read as JSON: {error}.") from error
    for where, labels in entries.items() if isinstance(entries, dict) else enumerate(entries):
        if not isinstance(labels, list) or any(type(label) not in (int, str) for label in labels):
            raise MetaplError(
                f"{path}: the entry of {where} is {_few([json.dumps(labels)])}; expected a list of classes, such as "
                "[3, 7], and [] for none."
            )
    return entries  # type: ignore[no-any-return]  # just checked


def _from_csv(path: Path, text: str) -> dict[str, list[Label]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise MetaplError(
            f"{path} begins with {_few([text.partition(chr(10))[0]])!r}; expected CSV with the columns "
            f"{' and '.join(COLUMNS)}, or JSON."
        )
    pairs = []
    for row in reader:
        if None in row or None in row.values():
            raise MetaplError(
                f"{path}:{reader.line_num}: the row has not as many cells as the first; labels are separated by "
                f"{BETWEEN_LABELS}, and what has a comma in it stands in quotes."
            )
        labels: list[Label] = [part.strip() for part in row["labels"].split(BETWEEN_LABELS) if part.strip()]
        pairs.append((row["file"].strip(), labels))
    return _once_each(path, pairs)


def _once_each(path: Path, pairs: Sequence[tuple[str, list[Label]]]) -> dict[str, list[Label]]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise MetaplError(f"{path} has more than one entry of {_few(repeated)}; expected one, with all the labels.")
    return entries


# ---------------------------------------------------------------------------------------------------- which class it is


def _indices(path: Path, labels: Set[Label], classes: Sequence[str]) -> dict[Label, int]:
    """The index of each class that occurs in a file."""
    by_name: dict[Label, int] = {name: index for index, name in enumerate(classes)}
    if labels <= by_name.keys():
        return {label: by_name[label] for label in labels}
    numbers = {label: int(label) for label in labels if isinstance(label, int) or re.fullmatch("[0-9]{1,9}", label)}
    if len(numbers) < len(labels):
        unknown, expected = labels - by_name.keys(), f"their names, such as {_few(classes)}"
    else:
        unknown = {label for label, number in numbers.items() if not 0 <= number < len(classes)}
        expected = f"their names, or 0 to {len(classes) - 1}"
    if unknown:
        raise MetaplError(
            f"{path}: {len(unknown):,} of the {len(labels):,} classes in it are not among the run's: "
            f"{_few(sorted(unknown, key=str))}; expected {expected}."
        )
    two = sorted((x for x, number in numbers.items() if by_name.get(str(x), number) != number), key=str)
    if two:
        label, index = two[0], numbers[two[0]]
        raise MetaplError(
            f"{path}: {len(two):,} of the {len(numbers):,} classes can be read in two ways: {label} is the index of "
            f'{classes[index]!r} and the name of another class; expected names alone, in JSON in quotes: "{label}".'
        )
    return numbers


# ------------------------------------------------------------------------------------------------ whose labels they are


def _by_position(path: Path, labels: list[list[Label]], names: Sequence[str] | None) -> list[list[Label]]:
    numbers = _ilsvrc_numbers(names or ())
    if numbers is None:
        if names is not None and len(names) != len(labels):
            raise MetaplError(
                f"{path} is a list of {len(labels):,} entries, and there are {len(names):,} test examples; expected "
                "one entry for each, in their order, or an object by file name."
            )
        return labels
    beyond = [name for name, number in zip(names or (), numbers, strict=True) if number > len(labels)]
    if beyond:
        raise MetaplError(
            f"{path} is a list of {len(labels):,} entries, and the numbers of {len(beyond):,} test files are greater: "
            f"{_few(beyond)}; expected ReaL's own list of 50,000, or an object by file name."
        )
    return [labels[number - 1] for number in numbers]


def _ilsvrc_numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers in the names, where each is called as a validation picture of ILSVRC 2012; they begin with 1.

    >>> _ilsvrc_numbers(["n01440764/ILSVRC2012_val_00000293.JPEG"]), _ilsvrc_numbers(["cat/1.png"])
    ([293], None)
    """
    matches = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", PurePosixPath(name).stem) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if names and len(numbers) == len(names) and min(numbers) > 0 else None


def _by_name(path: Path, labels: dict[str, list[Label]], names: Sequence[str] | None) -> list[list[Label]]:
    if names is None:
        raise MetaplError(
            f"{path} has labels by file name, and the test examples of this run have no names; expected a JSON list "
            "of lists, in the order of the test set."
        )
    positions: defaultdict[str, list[int]] = defaultdict(list)
    by_last_part: defaultdict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        positions[name].append(position)
        by_last_part[PurePosixPath(name).name].append(position)
    at = {name: positions.get(name) or by_last_part.get(name, []) for name in labels}
    shared = [name for name, several in at.items() if len(several) > 1]
    if shared:
        ours = _few(names[position] for position in at[shared[0]])
        raise MetaplError(
            f"{path}: {len(shared):,} of its {len(labels):,} names are those of several test files: {shared[0]} of "
            f"{ours}; write them with their folder."
        )
    entries: list[list[str]] = [[] for _ in names]
    for name, single in at.items():
        for position in single:
            entries[position].append(name)
    repeated = [entry for entry in entries if len(entry) > 1]
    if repeated:
        raise MetaplError(
            f"{path}: {len(repeated):,} of the {len(names):,} test files have two entries: "
            f"{' and '.join(repeated[0])} are one; expected one, with all the labels."
        )
    missing = [name for name, entry in zip(names, entries, strict=True) if not entry]
    if missing:
        raise MetaplError(
            f"{path} has no entry for {len(missing):,} of the {len(names):,} test files: {_few(missing)}; expected "
            f"these names, with an empty list of labels where none is right. The names in it: {_few(labels)}."
        )
    return [labels[name] for (name,) in entries]
