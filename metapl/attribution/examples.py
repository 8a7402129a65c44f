"""Training examples by number: of columns, of a data set, or of the data set of a DataLoader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import (
    as_tensors,
    is_array,
    is_record_of_rows,
    length,
    map_tensors,
    named_leaves_of,
    plain,
)
from metapl.execution.checks import described

EXPECTED = (
    "expected (inputs, labels), a dict, a tuple or a dataclass of tensors with a row for each "
    "example, a data set of examples by number, or a DataLoader over one"
)


class Examples(ABC):
    """Examples by number, read in batches on a device.

    Attributes:
        are_constant: whether an example is the same whenever it is read, as a row of tensors in
            memory is.
    """

    are_constant: ClassVar[bool] = False

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, numbers: Tensor) -> Any:
        """Return a batch of the examples with these numbers, wherever it is."""

    def __getitem__(self, numbers: Tensor) -> Any:
        return map_tensors(lambda t: t.to(self.device), self.read(numbers))

    def groups(self, size: int) -> Sequence[Tensor]:
        """Return the numbers of all examples, in groups that are read together."""
        return [*torch.arange(len(self)).split(size)]


class Columns(Examples):
    """Tensors that have a row for each example."""

    are_constant = True

    def __init__(self, rows: Any, name: str, device: torch.device) -> None:
        super().__init__(name, device)
        self.rows = rows
        counts: dict[str, int] = {}
        for place, leaf in named_leaves_of(rows):
            if isinstance(leaf, Tensor):
                counts[place] = len(leaf) if leaf.ndim else 0
        if len({*counts.values()}) == 1 and 0 not in counts.values():
            return
        listed = ", ".join(f"{place.lstrip('.')} {count}" for place, count in counts.items())
        raise MetaplError(
            f"{name} has columns of different numbers of rows, or of none ({listed}); expected a "
            "row for each example in each. Of one whole, such as a graph, the weights inside it "
            "(of nodes) are scored by metapl.hypergradient(None, student, outer=graph, "
            "inner=metapl.Lookahead([graph] * steps), problem=problem, "
            "inner_optimizer=optimizer).feedback."
        )

    def __len__(self) -> int:
        return length(self.rows)

    def read(self, numbers: Tensor) -> Any:
        return map_tensors(lambda t: t.index_select(0, numbers.to(t.device)), self.rows)


class Numbered(Examples):
    """A data set of examples by number, and what makes a batch of some of them."""

    def __init__(
        self, source: Any, name: str, like: Tensor, collate: Callable[[list[Any]], Any]
    ) -> None:
        super().__init__(name, like.device)
        self.source = source
        self.dtype = like.dtype
        self.collate = collate
        if len(source) == 0:
            raise MetaplError(f"{name} has no examples; expected one or more.")

    def __len__(self) -> int:
        return len(self.source)

    def read(self, numbers: Tensor) -> Any:
        examples = [self.source[i] for i in numbers.tolist()]
        if self.collate is default_collate:
            # A list of two numbers is an input and its label.
            examples = [
                example if is_pair_of_numbers(example) else with_tensors(example, self.dtype)
                for example in examples
            ]
        try:
            batch = self.collate(examples)
        except (RuntimeError, TypeError) as error:
            if self.collate is not default_collate:
                raise
            raise MetaplError(
                f"examples of {self.name} do not go together ({reason_of(error)}); expected "
                "tensors of one shape, or a DataLoader with a collate_fn."
            ) from error
        batch = plain(batch)
        return tuple(batch) if type(batch) is list else batch


def with_tensors(value: Any, dtype: torch.dtype) -> Any:
    """Return an example, or columns of examples, with tensors in the place of lists of numbers.

    PyTorch's own collate function would take such a list for a column of several numbers, where
    those of Trainers make one tensor of all rows. A list of lists of different lengths stays one.

    Args:
        dtype: of those with a fraction.
    """
    if isinstance(value, Mapping):
        return {name: with_tensors(entry, dtype) for name, entry in value.items()}
    if type(value) is tuple:
        return tuple(with_tensors(entry, dtype) for entry in value)
    if not isinstance(value, list) or not value:
        return value
    numbers = pytree.tree_leaves(value)
    if all(isinstance(number, int | float) for number in numbers):
        has_fractions = any(isinstance(number, float) for number in numbers)
        # Of lists of different lengths there is no tensor.
        with suppress(ValueError, TypeError):
            return torch.tensor(value, dtype=dtype if has_fractions else None)
    return [with_tensors(entry, dtype) for entry in value]


def examples_of(data: Any, name: str, like: Tensor, *, each_once: bool = True) -> Examples:
    """Return data as examples by number.

    Args:
        data: what a call was given as the argument ``name``.
        like: a weight, on whose device and in whose type the examples are.
        each_once: refuse a DataLoader that does not draw each example once. A recording has the
            draws of its loop itself.
    """
    columns = columns_of(data)
    if columns is not None:
        if isinstance(columns, tuple):
            columns = with_tensors(columns, like.dtype)
        refuse_lists(columns, name)
        return Columns(as_tensors(columns, like.dtype, f"{name} holds data"), name, like.device)
    collate: Callable[[list[Any]], Any] = default_collate
    if isinstance(data, DataLoader):
        refuse_loader(data, name, each_once=each_once)
        collate = data.collate_fn
        data = data.dataset
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise MetaplError(
            f"{name} is {described(data)}; {EXPECTED} ({name}=list(...) of an iterable)."
        )
    return Numbered(data, name, like, collate)


def columns_of(data: Any) -> Any:
    """Return data that are columns, dict-like ones as dicts; None for examples by number."""
    if is_array(data):
        return data
    if isinstance(data, Mapping) or is_record_of_rows(data):
        return plain(data)
    if not isinstance(data, tuple | list):
        return None
    if hasattr(data, "_fields"):
        return plain(data)
    if len(data) == 2:
        # Two dicts or two pairs in a list are two examples.
        are_alike = type(data[0]) is type(data[1])
        are_examples = isinstance(data, list) and are_alike and not is_array(data[1])
        return None if are_examples else plain(tuple(data))
    if isinstance(data, tuple) and len(data) > 2 and all(map(is_array, data)):
        return data
    return None


def is_pair_of_numbers(example: Any) -> bool:
    """Return whether an example is a list of two numbers."""
    is_pair = isinstance(example, list) and len(example) == 2
    return is_pair and all(isinstance(number, int | float) for number in example)


def refuse_lists(columns: Any, name: str) -> None:
    """Refuse a list among columns: in a dict, as tokenizers give them, or of other than numbers."""
    columns_by_place: dict[Any, Any] = {}
    if isinstance(columns, dict):
        columns_by_place = columns
    elif isinstance(columns, tuple):
        columns_by_place = dict(enumerate(columns))
    for place, value in columns_by_place.items():
        if isinstance(value, list):
            raise MetaplError(
                f"{name} holds a list in [{place!r}]; expected tensors or arrays with rows of one "
                "length (return_tensors='pt' of a tokenizer), or in a tuple lists of such numbers."
            )


def refuse_loader(loader: DataLoader[Any], name: str, *, each_once: bool) -> None:
    """Refuse a DataLoader whose batches are not made of its data set's examples, each once."""
    if isinstance(loader.dataset, IterableDataset):
        reason = "over an IterableDataset"
    elif loader.batch_size is None and loader.batch_sampler is None:
        reason = "with batch_size=None"
    else:
        reason = why_not_each_once(loader) if each_once else ""
    if reason:
        raise MetaplError(
            f"{name} is a DataLoader {reason}, and its examples are read by number; expected "
            f"{name}=list(dataset), or DataLoader(loader.dataset, collate_fn=loader.collate_fn), "
            "over torch.utils.data.Subset(dataset, numbers) for some of the examples."
        )


def why_not_each_once(loader: DataLoader[Any]) -> str:
    """Return what a DataLoader does that its data set and collate_fn do not tell; "" for nothing.

    A drop_last that shuffles drops other examples in each pass, and those count.
    """
    # The loaders of accelerate move batches to a device, and change nothing else.
    iterates = type(loader).__iter__
    if iterates is not DataLoader.__iter__ and not iterates.__module__.startswith("accelerate."):
        return f"with an __iter__ of its own ({type(loader).__name__})"
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return f"that draws by a {type(batches).__name__}"
    sampler: Any = batches.sampler
    is_shuffled = type(sampler) is RandomSampler and not sampler.replacement
    if not is_shuffled and type(sampler) is not SequentialSampler:
        return f"that draws by a {type(sampler).__name__}"
    if len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
        return f"that draws {len(sampler)} examples by a {type(sampler).__name__}"
    if batches.drop_last and not is_shuffled and len(sampler) % batches.batch_size:
        return "that drops its last examples (drop_last=True)"
    return ""
