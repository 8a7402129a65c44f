"""What a network is called with, read as a batch of examples, and the numbers of its examples.

A hook on the network sees the arguments of a call: a tensor, or a dict of columns with or without
labels. Each row of it is an example. Its number is its place in the data set where that is known
(:class:`NumbersInData`), or else the order in which it was first seen (:class:`NumbersBySight`).
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metapl.attribution.examples import Examples
from metapl.errors import MetaplError, few, reason_of, warn
from metapl.execution.batch import (
    LABEL_KEYS,
    Batch,
    inputs_of,
    leaves_of,
    length,
    map_tensors,
    plain,
    row_digests,
)
from metapl.problems.doubtful import EqualWeights

# What transformers.Trainer gives to a model beside a batch, for the loss alone.
LEFT_OUT = ("num_items_in_batch",)

# The types of what else a network may be called with by name.
CONSTANTS = (bool, int, float, str)

# So many examples of a data set are read at a time where all of them are.
READ_AT_ONCE = 256


class MissingColumns(MetaplError):
    """A data set lacks columns that the network is called with, such as those of a collator.

    Args:
        what: is missing where.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; expected the data set that the loop reads, or a DataLoader with its "
            "collate_fn."
        )
        self.what = what


@dataclass(frozen=True)
class CallForm:
    """What the calls of a network have in common.

    Args:
        keys: the names of its inputs where they are a dict; None for a tensor or a tuple.
        has_labels: whether a call has the labels too.
        constants: what else the network is called with by name, such as ``use_cache=False``.
    """

    keys: tuple[str, ...] | None
    has_labels: bool
    constants: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch) -> CallForm:
        """Return the form of a call that :func:`batch_of_call` has read."""
        if not isinstance(batch, dict):
            return CallForm(keys=None, has_labels=False)
        columns = inputs_of(batch)
        constants = {key: value for key, value in columns.items() if type(value) in CONSTANTS}
        return CallForm(
            keys=tuple(key for key in columns if key not in constants),
            has_labels=any(key in batch for key in LABEL_KEYS),
            constants=constants,
        )

    def selected(self, batch: Batch) -> Batch:
        """Return a batch of data with those columns alone that the network is called with.

        Labels stay. A data set may have more columns, which a Trainer leaves out, and has no
        constants.
        """
        if self.keys is None:
            return batch
        if isinstance(batch, dict):
            columns = [*self.keys, *LABEL_KEYS]
            selected = {key: t for key, t in batch.items() if key in columns}
            return {**selected, **self.constants}
        if isinstance(batch, tuple) and batch and isinstance(batch[0], dict):
            return (self.selected(batch[0]), *batch[1:])
        return batch


def batch_of_call(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Batch:
    """Return the arguments of a call of a network as a batch.

    One argument is the batch itself, and several are a tuple. Named ones are a dict by name, as are
    those of which one is named as labels are. What is None, or for the loss alone, is left out.
    """
    if len(args) == 1 and not kwargs:
        return plain(args[0])
    names = [*inspect.signature(network.forward).parameters]
    arguments = dict(zip(names, args, strict=False))
    arguments.update(kwargs)
    if not kwargs and not any(key in arguments for key in LABEL_KEYS):
        return plain(tuple(args))
    columns: dict[str, Any] = {}
    for name, value in plain(arguments).items():
        if value is not None and name not in LEFT_OUT:
            columns[name] = value
    return columns


def refuse_other_rows(batch: Batch) -> None:
    """Refuse a batch with a tensor that has no row for each example."""
    rows = length(batch)
    for t in leaves_of(batch):
        if isinstance(t, Tensor) and (t.ndim == 0 or len(t) != rows):
            raise MetaplError(
                f"the network is called with a tensor {tuple(t.shape)} in a batch of {rows} "
                "examples; expected tensors with a row for each example."
            )


class Data:
    """The examples of a training, read as the network is called with them.

    Args:
        examples: by number.
        problem: reads batches of them.
        form: of the network's calls.
    """

    def __init__(self, examples: Examples, problem: EqualWeights, form: CallForm) -> None:
        self.examples = examples
        self.problem = problem
        self.form = form

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, numbers: Tensor) -> Batch:
        """Return the examples with these numbers as the problem reads them."""
        batch = self.form.selected(self.examples[numbers])
        return self.problem.labeled_batch(batch, self.examples.name)

    def digests(self, at_once: int = READ_AT_ONCE) -> tuple[Tensor, Tensor]:
        """Return two numbers of each example, both (N,): of its inputs, and of all of it.

        Args:
            at_once: how many examples are read together.

        Cost: each example is read once.
        """
        of_inputs: list[Tensor] = []
        of_all: list[Tensor] = []
        for numbers in self.examples.groups(at_once):
            batch = self.batch(numbers)
            inputs = self.problem.student_input(batch)
            if self.form.keys is not None and isinstance(inputs, dict):
                missing = [key for key in self.form.keys if key not in inputs]
                if missing:
                    raise MissingColumns(
                        f"{self.examples.name} has no column {few(missing)}, which the network is "
                        "called with"
                    )
                # In the order of the call, by which tensors are told from each other.
                inputs = {key: inputs[key] for key in self.form.keys}
            digests = row_digests(inputs, ignores_padding=True)
            of_inputs.append(digests)
            labels = labels_of(batch, digests)
            if isinstance(inputs, dict) and "attention_mask" in inputs:
                # They are padded as the inputs are.
                labels = {"labels": labels, "attention_mask": inputs["attention_mask"]}
            of_all.append(digests + 3 * row_digests(labels, ignores_padding=True))
        return torch.cat(of_inputs), torch.cat(of_all)


def labels_of(batch: Batch, like: Tensor) -> Any:
    """Return what a batch has besides its inputs, with a row for each example.

    That is ``like`` itself where it has nothing besides them.
    """
    if isinstance(batch, tuple) and len(batch) > 1:
        return batch[1:]
    return like


class DigestIndex:
    """Finds digests among others, (N,), by their places."""

    def __init__(self, digests: Tensor) -> None:
        self._ordered, self._places = digests.sort(stable=True)

    def find(self, digests: Tensor) -> Tensor:
        """Return the first place of each of these digests, and −1 for those that are not there."""
        candidates = torch.searchsorted(self._ordered, digests).clamp_max(len(self._ordered) - 1)
        is_there = self._ordered[candidates] == digests
        return torch.where(is_there, self._places[candidates], -1)


class NumbersInData:
    """The numbers of examples in a data set, found by the bits of their inputs.

    Examples with equal inputs have the number of the first of them, and are refused where their
    labels differ.

    Attributes:
        of_all: a number of each example, by which the data set is known again, (N,).
    """

    def __init__(self, data: Data) -> None:
        self._name = data.examples.name
        of_inputs, self.of_all = data.digests()
        index = DigestIndex(of_inputs)
        self.find = index.find
        # Where the first example with the same inputs is.
        self._firsts = index.find(of_inputs)
        is_other = self.of_all != self.of_all[self._firsts]
        if bool(is_other.any()):
            number = int(is_other.nonzero()[0])
            raise MetaplError(
                f"{data.examples.name} has equal inputs with different labels, examples "
                f"{int(self._firsts[number])} and {number}, which the network's inputs do not tell "
                "apart; expected each input once, as without one of these two in the loop's data, "
                "or a network that is called with the labels, without train=."
            )

    def warn_of_equal_examples(self) -> None:
        """Warn where several examples are one to the recording."""
        numbers = torch.arange(len(self._firsts), device=self._firsts.device)
        copies = (self._firsts != numbers).nonzero()[:, 0]
        if not len(copies):
            return
        number = int(copies[0])
        warn(
            f"{len(copies):,} of the {len(self.of_all):,} examples of {self._name} equal an "
            f"earlier one, such as example {number} example {int(self._firsts[number])}. Which of "
            "them the network is called with is not seen: the first has the score of all of them, "
            "and the others have 0.",
        )


@dataclass(frozen=True)
class SeenRows:
    """The rows of a call, which have numbers once the call counts.

    Attributes:
        rows: by their bits and shapes.
        examples: the same without padding.
        new: those that had no number when the network was called, each once.
        copies: of the new ones, as a part of a batch; None where there are none.
    """

    rows: Sequence[Hashable]
    examples: Sequence[Hashable]
    new: Sequence[Hashable]
    copies: Batch


class NumbersBySight:
    """The numbers of rows and of examples in the order in which they were first seen.

    Both are known by their bits. The same sequence may be padded to other lengths in other batches.
    It is then another row, which a replay needs as it was, and the same example.

    Attributes:
        new_rows: the rows that were seen first since :meth:`take_new_rows`, as parts of batches.
        bytes: of all rows that were seen first.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._example_numbers: dict[Hashable, int] = {}
        self.new_rows: list[Batch] = []
        self._new_examples: list[int] = []
        # Those that have a number, and whose copies are not among the new rows yet.
        self._unkept: set[Hashable] = set()
        self.bytes = 0

    @classmethod
    def of(cls, parts: Sequence[Batch]) -> NumbersBySight:
        """Return the numbers that rows and examples have got which are in these parts."""
        numbers = cls()
        for part in parts:
            numbers.number(numbers.look_at(part))
        numbers.take_new_rows()
        return numbers

    def look_at(self, batch: Batch) -> SeenRows:
        """Return the rows of a call, with copies of those that have no number yet."""
        shapes = tuple(t.shape[1:] for t in leaves_of(batch) if isinstance(t, Tensor))
        digests = row_digests(batch).tolist()
        rows: list[Hashable] = [(digest, shapes) for digest in digests]
        examples = rows
        if isinstance(batch, dict) and isinstance(batch.get("attention_mask"), Tensor):
            examples = row_digests(batch, ignores_padding=True).tolist()
        new_places: dict[Hashable, int] = {}
        for place, row in enumerate(rows):
            if row not in self._numbers:
                new_places.setdefault(row, place)
        copies = batch
        if isinstance(batch, dict):
            copies = {key: t for key, t in batch.items() if isinstance(t, Tensor)}
        # A list as an index makes a copy.
        places = [*new_places.values()]
        copies = map_tensors(lambda t: t[places].detach(), copies) if places else None
        return SeenRows(rows, examples, [*new_places], copies)

    def number(self, seen: SeenRows) -> Tensor:
        """Return the number of each row, (B,); new rows get the next ones, and are kept."""
        for row, example in zip(seen.rows, seen.examples, strict=True):
            if row not in self._numbers:
                self._numbers[row] = len(self._numbers)
                number = self._example_numbers.setdefault(example, len(self._example_numbers))
                self._new_examples.append(number)
                self._unkept.add(row)
        # Another micro-batch of the step may have brought the same rows.
        places = [place for place, row in enumerate(seen.new) if row in self._unkept]
        if places:
            self._unkept.clear()
            new_rows = map_tensors(lambda t: t[places], seen.copies)
            self.new_rows.append(new_rows)
            self.bytes += sum(t.nbytes for t in leaves_of(new_rows) if isinstance(t, Tensor))
        return torch.tensor([self._numbers[row] for row in seen.rows])

    def take_new_rows(self) -> tuple[list[Batch], list[int]]:
        """Return the rows that are new since the last call, and the numbers of their examples."""
        new_rows = self.new_rows
        new_examples = self._new_examples
        self.new_rows = []
        self._new_examples = []
        return new_rows, new_examples


class RecordedRows(Examples):
    """Examples that a recording has itself, by their number.

    Args:
        parts: of batches, with the rows in the order of their numbers.
    """

    def __init__(self, parts: Sequence[Batch], device: torch.device) -> None:
        super().__init__("the recording", device)
        self._parts = parts
        self._place: list[tuple[int, int]] = []
        for part_number, part in enumerate(parts):
            self._place += [(part_number, row) for row in range(length(part))]

    def __len__(self) -> int:
        return len(self._place)

    def groups(self, size: int) -> Sequence[Tensor]:
        # Rows of different batches may be padded to different lengths.
        return [*torch.arange(len(self)).split([length(part) for part in self._parts])]

    def read(self, numbers: Tensor) -> Any:
        rows: list[Any] = []
        for number in numbers.tolist():
            part_number, row = self._place[number]
            rows.append(row_of(self._parts[part_number], row))
        try:
            return torch.utils.data.default_collate(rows)
        except RuntimeError as error:
            # Rows of different batches may be padded to different lengths.
            raise MetaplError(
                f"recorded rows do not go together into a batch ({reason_of(error)})."
            ) from error


def row_of(part: Batch, row: int) -> Any:
    """Return one row of a part of a batch."""
    return map_tensors(lambda t: t[row], part)


def refuse_unknown(numbers: Tensor) -> None:
    """Refuse rows that are none of the examples of the data set."""
    unknown = int((numbers < 0).sum())
    if unknown:
        raise MetaplError(
            f"record: {unknown} of {len(numbers)} rows that the network is called with are none "
            "of the examples of train; expected the examples as the network gets them, always the "
            "same: scaled, and without random augmentation."
        )
