"""The parts of a batch, inputs, labels and views, and its way to a device.

The inputs of a network are a tensor, or a dict or tuple of tensors, and are passed to it as one
argument (:class:`metapl.models.Logits` spreads them over several).

A batch may be a dataclass, and hold others. PyTorch's pytrees take an object of such a class for
one leaf, unless the class is registered with them, which would change what ``torch.compile`` and
``torch.func`` do with it elsewhere. So batches are taken apart here, by :func:`flatten` and
:func:`map_tensors`, and no class of a user is registered.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.checks import described

LABEL_KEYS = ("labels", "label")  # in a batch that is a dict


def either(**spellings: object) -> Any:
    """The value of an argument that has two spellings, of which None is one that was not given."""
    given = {name: value for name, value in spellings.items() if value is not None}
    if len(given) > 1:
        raise MetaplError(
            f"{'= and '.join(given)}= were both given; they are two names of one argument: "
            "expected one."
        )
    return next(iter(given.values()), None)


def both_batches(labeled: Any, unlabeled: Any, outer: Any, inner: Any) -> tuple[Any, Any]:
    """The outer and the inner batch, each by either of its names.

    One that is missing is refused.
    """
    if outer is not None or inner is not None:
        labeled, unlabeled = (
            either(labeled=labeled, outer=outer),
            either(unlabeled=unlabeled, inner=inner),
        )
    if labeled is None or unlabeled is None:
        raise MetaplError(
            "a batch is missing; expected labeled= (or outer=) and unlabeled= (or inner=)."
        )
    return labeled, unlabeled


# --------------------------------------------------------------------- a batch as a tree of tensors


def is_record(value: Any) -> bool:
    """Whether a value is an object of a dataclass that batches are made of."""
    if isinstance(value, Tensor | Mapping | Sequence | nn.Module | type):
        return False
    return hasattr(value, "__dataclass_fields__")


def is_record_of_rows(data: Any) -> bool:
    """Whether data is an object of a dataclass with tensors or arrays, and no source that batches are taken from."""
    if not is_record(data) or hasattr(data, "__iter__") or hasattr(data, "__getitem__"):
        return False
    return any(map(is_array, leaves_of(data)))


def fields_of(record: Any, *, only_fields: bool = False) -> dict[str, Any]:
    """Return what an object of a dataclass holds, by name: its fields, and its other attributes.

    Values that a ``cached_property`` has kept are left out, since an object with other fields
    computes them anew.
    """
    names = [field.name for field in dataclasses.fields(record)]
    if not only_fields:
        names += [name for name in getattr(record, "__dict__", ()) if name not in names]
    kind = type(record)
    held = [
        name
        for name in names
        if not isinstance(getattr(kind, name, None), functools.cached_property)
    ]
    return {name: getattr(record, name) for name in held if hasattr(record, name)}


def with_fields_of(record: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of an object of a dataclass that holds other values; the object itself if they are all its own.

    Its ``__init__`` and ``__post_init__`` are not called: they may have changed what they were
    given, and would do so once more. Frozen classes and those with slots are copied alike.
    """
    before = fields_of(record)
    if all(values[name] is value for name, value in before.items()):
        return record
    made = copy.copy(record)
    for name in [*getattr(made, "__dict__", ())]:
        if name not in before:
            del made.__dict__[name]
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Which dataclass an opened object is of, and what it holds.

    Two objects that hold other values are alike.
    """

    kind: type
    names: tuple[str, ...]
    record: Any = dataclasses.field(compare=False, repr=False)


class _Opened:
    """An object of a dataclass, as a node of a tree."""

    def __init__(self, kind: _Kind, values: Sequence[Any]) -> None:
        self.kind, self.values = kind, values


def _close(values: Any, kind: _Kind) -> Any:
    return with_fields_of(kind.record, dict(zip(kind.names, values, strict=True)))


def _with_keys(node: _Opened) -> tuple[list[tuple[Any, Any]], _Kind]:
    keys = map(pytree.GetAttrKey, node.kind.names)
    return [*zip(keys, node.values, strict=True)], node.kind


pytree.register_pytree_node(
    _Opened, lambda node: ([*node.values], node.kind), _close, flatten_with_keys_fn=_with_keys
)


def _opened(batch: Any, only_fields: bool) -> Any:
    """Return a batch in which objects of dataclasses are nodes of the tree, at any depth."""

    def open_leaf(leaf: Any) -> Any:
        if not is_record(leaf):
            return leaf
        held = fields_of(leaf, only_fields=only_fields)
        values = [_opened(value, only_fields) for value in held.values()]
        return _Opened(_Kind(type(leaf), tuple(held), leaf), values)

    return pytree.tree_map(open_leaf, batch)


def flatten(batch: Any, *, only_fields: bool = False) -> tuple[list[Any], Any]:
    """Return the leaves of a batch and its structure, for ``pytree.tree_unflatten``; dataclasses are nodes too.

    ``only_fields``: what an object of one holds besides its fields is no part of it.
    """
    leaves, structure = pytree.tree_flatten(batch)
    if any(map(is_record, leaves)):
        leaves, structure = pytree.tree_flatten(_opened(batch, only_fields))
    return leaves, structure


def leaves_of(batch: Any) -> list[Any]:
    return flatten(batch)[0]


def named_leaves_of(batch: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a batch, each with its place, such as ``[0]``, ``['input_ids']`` or ``.x``."""
    found, _ = pytree.tree_flatten_with_path(_opened(plain(batch), only_fields=False))
    return [(pytree.keystr(path), leaf) for path, leaf in found]


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return a batch with ``function`` of each of its tensors, whatever they are nested in."""
    leaves, structure = flatten(batch)
    return pytree.tree_unflatten(
        [function(t) if isinstance(t, Tensor) else t for t in leaves], structure
    )


def plain(batch: Any) -> Any:
    """The batch with its dict-like parts, such as the output of a tokenizer, as dicts."""
    if isinstance(batch, Tensor):
        return batch
    if type(batch) in (tuple, list):
        return type(batch)([part if isinstance(part, Tensor) else plain(part) for part in batch])
    if isinstance(batch, Mapping):
        return {name: plain(value) for name, value in batch.items()}
    if is_record(batch):
        return with_fields_of(
            batch, {name: plain(value) for name, value in fields_of(batch).items()}
        )
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        parts = [plain(part) for part in batch]
        same = all(part is before for part, before in zip(parts, batch, strict=True))
        return batch if same else type(batch)(*parts)
    return batch


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move every tensor of a batch, of any nesting, to a device; to CUDA, the copy is queued and not waited for.

    >>> batch = {"x": torch.ones(2), "names": ["a", "b"]}
    >>> to_device(batch, "meta")["x"].device, to_device(batch, "cpu")["x"] is batch["x"]
    (device(type='meta'), True)
    """
    device = torch.device(device)

    def moved(t: Tensor) -> Tensor:
        # Towards the CPU, a copy that is not waited for could be read before it is there.
        queued = device.type == "cuda" and t.device.type == "cpu" and t.layout == torch.strided
        if queued and not t.is_pinned():  # not Tensor.pin_memory, which refuses what expand() makes
            t = torch.empty_like(t, pin_memory=True).copy_(t)
        return t.to(device, non_blocking=queued)

    return map_tensors(moved, plain(batch))


def labeled_pair(batch: Any, name: str = "labeled", mend: str = "") -> Any:
    """A labeled batch as (inputs, labels), or a longer tuple that begins with them."""
    batch = plain(batch)
    keys = [key for key in LABEL_KEYS if key in batch] if isinstance(batch, dict) else []
    if len(keys) == 1 and holds_tensors(inputs_of(batch)):
        return inputs_of(batch), batch[keys[0]]
    if isinstance(batch, tuple | list) and len(batch) > 1 and holds_tensors(batch[0]):
        return batch
    raise MetaplError(
        f"{name} is {described(batch)}; expected (inputs, labels), the inputs a tensor, or a dict "
        f"or tuple of tensors, or one dict with the labels under 'labels'.{mend}"
    )


def first_input(batch: Any) -> Any:
    """A network's input in a batch: a tensor or a dict itself, the first element of a tuple."""
    if isinstance(batch, tuple | list) and batch:
        return batch[0]
    if isinstance(batch, Tensor | Mapping):
        return batch
    raise MetaplError(
        f"the batch is {described(batch)}; expected a tensor, a dict, or a tuple (input, ...). For "
        "other batches, give the problem the methods student_input(batch) and outer_input(batch), "
        "which return what the student reads."
    )


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch, with its labels left out if it has any."""
    batch = plain(batch)
    if isinstance(batch, dict):
        return {name: value for name, value in batch.items() if name not in LABEL_KEYS}
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def is_whole(data: Any) -> bool:
    """Whether labeled data is a single pair (inputs, labels), dict or dataclass, not an iterable of such batches."""
    pair = isinstance(data, tuple | list) and len(data) > 1 and isinstance(data[1], Tensor)
    return pair or isinstance(data, Mapping) or is_record_of_rows(data)


def is_array(data: Any) -> bool:
    return isinstance(data, Tensor) or hasattr(data, "__array__")


def as_tensors(data: Any, dtype: torch.dtype, what: str = "") -> Any:
    """Data whose arrays are tensors: those of floating point of type ``dtype``, and one whole
    number an example int64. What is no array stays as it is, or is refused in a text that begins
    with ``what``."""
    if type(data) is dict:
        return {name: as_tensors(value, dtype, what) for name, value in data.items()}
    if type(data) in (tuple, list):
        return type(data)(as_tensors(value, dtype, what) for value in data)
    if is_record(data):
        fields = fields_of(data)
        return with_fields_of(
            data, {name: as_tensors(value, dtype) for name, value in fields.items()}
        )
    if (
        isinstance(data, tuple)
        and hasattr(data, "_fields")
        and not isinstance(data, PackedSequence)
    ):
        return type(data)(*(as_tensors(value, dtype, what) for value in data))
    if isinstance(data, Tensor) or not (what or is_array(data)):
        return data
    array = np.asarray(data)
    if array.dtype.kind not in "biuf":
        raise MetaplError(
            f"{what or 'the data hold'} of {type(data).__name__} ({array.dtype}); expected numbers."
        )
    # A copy: torch can neither share what is read-only nor what runs backwards.
    tensor = torch.tensor(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor.long() if tensor.ndim == 1 and tensor.dtype != torch.bool else tensor


def rows(batch: Any, start: int, stop: int) -> Any:
    return map_tensors(lambda t: t[start:stop] if t.ndim else t, batch)


def length(batch: Any) -> int:
    return max((len(t) for t in leaves_of(batch) if isinstance(t, Tensor) and t.ndim), default=0)


def digest(batch: Any) -> Tensor:
    """A whole number by which a batch is known, bit for bit; the same in every process, computed
    where the tensors are."""
    # A pass may leave attributes in a batch, which one that is read again does not have.
    leaves, structure = flatten(batch, only_fields=True)
    leaves = [
        torch.as_tensor(t) if isinstance(t, np.ndarray) and t.dtype.kind in "biuf" else t
        for t in leaves
    ]
    known = [
        (t.shape, t.dtype) if isinstance(t, Tensor) else repr(t) if type(t) in _PLAIN else type(t)
        for t in leaves
    ]
    # Not Python's hash, which is another one in every process.
    named = hashlib.blake2b(repr((str(structure), *known)).encode(), digest_size=8).digest()
    total = torch.tensor(int.from_bytes(named, "little", signed=True))
    for number, t in enumerate(t for t in leaves if isinstance(t, Tensor)):
        bits = t.detach().to_dense().contiguous().flatten().view(_BITS[min(t.element_size(), 8)])
        if t.device.type == "cpu":  # in a quarter of the time
            found = hashlib.sha256(number.to_bytes(8) + bits.numpy().tobytes()).digest()[:8]
            total = total + int.from_bytes(found, "little", signed=True)
            continue
        bits = bits.to(torch.int64)
        # Each place with its value is mixed into a number of its own: a sum of multiples would know
        # small labels badly.
        mixed = (
            bits + (torch.arange(len(bits), device=t.device) + (number << 40)) * 0x1E3779B97F4A7C15
        )
        for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
            mixed = (mixed ^ (mixed >> 30)) * factor
        total = total.to(t.device) + (mixed ^ (mixed >> 31)).sum()
    return total


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (bool, int, float, str, bytes, type(None))


def micro_batches(batch: Any, parts: int, name: str) -> list[Any]:
    """A batch (any nesting of tensors with a row per example) split into ``parts`` of equal size;
    what is no tensor, or one number, is in each of them."""
    if parts == 1:
        return [batch]
    leaves, structure = flatten(plain(batch))
    refuse_hidden_tensors(leaves, name)
    has_rows = [isinstance(t, Tensor) and t.ndim > 0 for t in leaves]
    lengths = {len(t) for t, has in zip(leaves, has_rows, strict=True) if has}
    if any(n % parts for n in lengths):
        raise MetaplError(
            f"the {name} batch has {max(lengths)} examples; expected a multiple of "
            f"accumulate={parts}."
        )
    pieces = [
        t.chunk(parts) if has else [t] * parts for t, has in zip(leaves, has_rows, strict=True)
    ]
    return [pytree.tree_unflatten(list(piece), structure) for piece in zip(*pieces, strict=True)]


def refuse_hidden_tensors(leaves: Sequence[Any], name: str) -> None:
    """Refuse tensors in the attributes of an object that is no dataclass.

    It would be in each micro-batch whole.
    """
    for leaf in leaves:
        if isinstance(leaf, Tensor | nn.Module):
            continue
        if any(isinstance(value, Tensor) for value in getattr(leaf, "__dict__", {}).values()):
            raise MetaplError(
                f"the {name} batch holds tensors in an object of type {type(leaf).__name__}, which "
                "cannot be split into micro-batches; expected a tuple, a dict or a dataclass of "
                "them, or accumulate=1."
            )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of micro-batches, concatenated; a single one is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def views(unlabeled: Any) -> tuple[Any, ...]:
    """(x,) or (weak, strong).

    A tensor, a dict without labels, or two of one structure; no (inputs, labels).
    """
    if isinstance(unlabeled, Tensor) or (
        isinstance(unlabeled, Mapping) and not {*unlabeled} & {*LABEL_KEYS}
    ):
        return (unlabeled,)
    if isinstance(unlabeled, tuple | list) and len(unlabeled) == 1:
        return (first_input(unlabeled),)
    if isinstance(unlabeled, tuple | list) and len(unlabeled) == 2 and holds_tensors(unlabeled[0]):
        (first, one), (second, other) = map(flatten, unlabeled)
        kinds = (
            [(t.dtype, t.ndim) if isinstance(t, Tensor) else type(t) for t in own]
            for own in (first, second)
        )
        labels = (
            isinstance(unlabeled[1], Tensor)
            and unlabeled[1].ndim == 1
            and not unlabeled[1].is_floating_point()
        )
        if one == other and next(kinds) == next(kinds) and not labels:
            return tuple(unlabeled)
    raise MetaplError(
        f"unlabeled is {described(unlabeled)}; expected a tensor or a dict of tensors, (inputs,), "
        "or a pair (weak, strong) of one type, without labels (metapl.data.without_labels), or a "
        "metapl.Lookahead([...]) of these."
    )


def holds_tensors(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) or any(isinstance(leaf, Tensor) for leaf in leaves_of(inputs))
