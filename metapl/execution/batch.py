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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.checks import INDICES_OF_NAMES, described, unexpected

Batch = Any
"""A batch of a user: a tensor, or a tuple, list, dict, dataclass or mapping of tensors and batches.

No type says more, for the problem is what reads it. Where a call looks ahead, a
:class:`metapl.Lookahead` holds the batches of several steps.
"""

Inputs = Any
"""What a network is given as its one argument: a tensor, or a dict or tuple of tensors."""

# The names under which a batch that is a dict has its labels.
LABEL_KEYS = ("labels", "label")


# --------------------------------------------------------------------- a batch as a tree of tensors


def is_record(value: Any) -> bool:
    """Return whether a value is an object of a dataclass that batches are made of."""
    if isinstance(value, Tensor | Mapping | Sequence | nn.Module | type):
        return False
    return hasattr(value, "__dataclass_fields__")


def is_record_of_rows(data: Any) -> bool:
    """Return whether data is an object of a dataclass with tensors or arrays.

    A source that batches are taken from is none.
    """
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
    values: dict[str, Any] = {}
    for name in names:
        in_class = getattr(type(record), name, None)
        if hasattr(record, name) and not isinstance(in_class, functools.cached_property):
            values[name] = getattr(record, name)
    return values


def with_fields_of(record: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of an object of a dataclass that holds other values.

    The object itself if the values are all its own. Its ``__init__`` and ``__post_init__`` are not
    called: they may have changed what they were given, and would do so once more. Frozen classes
    and those with slots are copied alike.
    """
    own_values = fields_of(record)
    if all(values[name] is value for name, value in own_values.items()):
        return record
    copied = copy.copy(record)
    # What a cached_property has kept is of the other values.
    for name in [*getattr(copied, "__dict__", ())]:
        if name not in own_values:
            del copied.__dict__[name]
    for name, value in values.items():
        object.__setattr__(copied, name, value)
    return copied


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Which dataclass an opened object is of, and the names of what it holds.

    Two kinds are equal where the objects differ in their values alone.
    """

    kind: type
    names: tuple[str, ...]
    record: Any = dataclasses.field(compare=False, repr=False)


class _Opened:
    """An object of a dataclass, as a node of a tree."""

    def __init__(self, kind: _Kind, values: Sequence[Any]) -> None:
        self.kind = kind
        self.values = values


def _taken_apart(node: _Opened) -> tuple[list[Any], _Kind]:
    return [*node.values], node.kind


def _taken_apart_with_keys(node: _Opened) -> tuple[list[tuple[Any, Any]], _Kind]:
    keys = map(pytree.GetAttrKey, node.kind.names)
    return [*zip(keys, node.values, strict=True)], node.kind


def _put_together(values: Any, kind: _Kind) -> Any:
    """Return an object of the dataclass, which is no opened one any more."""
    return with_fields_of(kind.record, dict(zip(kind.names, values, strict=True)))


pytree.register_pytree_node(
    _Opened, _taken_apart, _put_together, flatten_with_keys_fn=_taken_apart_with_keys
)


def _opened(batch: Batch, *, only_fields: bool) -> Any:
    """Return a batch in which objects of dataclasses are nodes of the tree, at any depth."""

    def open_leaf(leaf: Any) -> Any:
        if not is_record(leaf):
            return leaf
        fields = fields_of(leaf, only_fields=only_fields)
        values = [_opened(value, only_fields=only_fields) for value in fields.values()]
        return _Opened(_Kind(type(leaf), names=tuple(fields), record=leaf), values)

    return pytree.tree_map(open_leaf, batch)


def flatten(
    batch: Batch, *, only_fields: bool = False, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Any]:
    """Return the leaves of a batch and its structure, for ``pytree.tree_unflatten``.

    Objects of dataclasses are nodes too.

    Args:
        only_fields: whether what such an object holds besides its fields is no part of it.
        is_leaf: says of a part whether it is a leaf as a whole.
    """
    leaves, structure = pytree.tree_flatten(batch, is_leaf)
    if any(map(is_record, leaves)):
        opened = _opened(batch, only_fields=only_fields)
        leaves, structure = pytree.tree_flatten(opened, is_leaf)
    return leaves, structure


def leaves_of(batch: Batch) -> list[Any]:
    """Return the leaves of a batch."""
    leaves, _ = flatten(batch)
    return leaves


def named_leaves_of(batch: Batch) -> list[tuple[str, Any]]:
    """Return the leaves of a batch, each with its place.

    A place is such as ``[0]``, ``['input_ids']`` or ``.x``.
    """
    # The usual batches, in a tenth of the time that PyTorch's trees take.
    if isinstance(batch, Tensor):
        return [("", batch)]
    if type(batch) in (tuple, list, dict):
        parts: Iterable[Any] = batch.items() if type(batch) is dict else enumerate(batch)
        return [
            (f"[{key!r}]{place}", leaf)
            for key, part in parts
            for place, leaf in named_leaves_of(part)
        ]
    opened = _opened(plain(batch), only_fields=False)
    paths_and_leaves, _ = pytree.tree_flatten_with_path(opened)
    return [(pytree.keystr(path), leaf) for path, leaf in paths_and_leaves]


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Any:
    """Return a batch with ``function`` of each of its tensors, whatever they are nested in."""
    # The usual batches, in a tenth of the time that PyTorch's trees take.
    if isinstance(batch, Tensor):
        return function(batch)
    if type(batch) in (tuple, list):
        return type(batch)([map_tensors(function, part) for part in batch])
    leaves, structure = flatten(batch)
    mapped = [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(mapped, structure)


def plain(batch: Batch) -> Any:
    """Return a batch with its dict-like parts, such as the output of a tokenizer, as dicts."""
    if isinstance(batch, Tensor):
        return batch
    if type(batch) in (tuple, list):
        return type(batch)([plain(part) for part in batch])
    if isinstance(batch, Mapping):
        return {name: plain(value) for name, value in batch.items()}
    if is_record(batch):
        values = {name: plain(value) for name, value in fields_of(batch).items()}
        return with_fields_of(batch, values)
    if is_named_tuple(batch):
        parts = [plain(part) for part in batch]
        if all(part is original for part, original in zip(parts, batch, strict=True)):
            return batch
        return type(batch)(*parts)
    return batch


def is_named_tuple(value: Any) -> bool:
    """Return whether a value is an object of a NamedTuple, which takes its parts one by one."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def to_device(batch: Batch, device: torch.device | str) -> Any:
    """Move every tensor of a batch, of any nesting, to a device.

    To CUDA, the copy is queued and not waited for.

    >>> batch = {"x": torch.ones(2), "names": ["a", "b"]}
    >>> to_device(batch, "meta")["x"].device, to_device(batch, "cpu")["x"] is batch["x"]
    (device(type='meta'), True)
    """
    device = torch.device(device)

    def moved(t: Tensor) -> Tensor:
        # Towards the CPU, a copy that is not waited for could be read before it is there.
        is_to_cuda = device.type == "cuda" and t.device.type == "cpu"
        is_queued = is_to_cuda and t.layout == torch.strided
        if is_queued and not t.is_pinned():
            # Not Tensor.pin_memory, which refuses what expand() makes.
            t = torch.empty_like(t, pin_memory=True).copy_(t)
        return t.to(device, non_blocking=is_queued)

    if isinstance(batch, Tensor):
        return moved(batch)
    return map_tensors(moved, plain(batch))


def labeled_pair(batch: Batch, name: str = "outer", mend: str = "") -> Any:
    """Return a labeled batch as (inputs, labels), or as a longer tuple that begins with them.

    Args:
        name: of the batch, for the error.
        mend: the end of the error.
    """
    batch = plain(batch)
    if isinstance(batch, dict):
        label_keys = [key for key in LABEL_KEYS if key in batch]
        if len(label_keys) == 1 and holds_tensors(inputs_of(batch)):
            return inputs_of(batch), batch[label_keys[0]]
    if isinstance(batch, tuple | list) and len(batch) > 1 and holds_tensors(batch[0]):
        return batch
    raise MetaplError(
        f"{name} is {described(batch)}; expected (inputs, labels) of tensors, or dicts or tuples "
        f"of them, or one dict with the labels under 'labels'.{mend}{_way_of_arrays(batch)}"
    )


def _way_of_arrays(batch: Batch) -> str:
    """Return the end of an error about a batch with arrays; "" for none."""
    if any(is_array(leaf) and not isinstance(leaf, Tensor) for leaf in leaves_of(batch)):
        return " Of arrays, fit makes tensors; give a step torch.as_tensor(x) of each."
    return ""


def returned_by(network: nn.Module, inputs: Inputs, role: str) -> Any:
    """Return what a network returns for its inputs, which it is given as one argument.

    Args:
        role: of the network, and which batch it reads, for an error.

    Raises: :class:`metapl.MetaplError` where it fails, and takes their parts as arguments, or
        numbers of another type. Any other error of the network has a note of the inputs.
    """
    try:
        return network(inputs)
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        from metapl.execution.failed_calls import explain_call

        explain_call(network, inputs, error, role)
        raise


def first_input(batch: Batch) -> Any:
    """Return a network's input in a batch.

    A tensor or a dict itself, the first element of a tuple.
    """
    if isinstance(batch, tuple | list) and batch:
        return batch[0]
    if isinstance(batch, Tensor | Mapping):
        return batch
    expected = "a tensor, a dict, a tuple (input, ...), or student_input and outer_input of the"
    raise unexpected("the batch is", batch, f"{expected} problem, which return what is read")


def inputs_of(batch: Batch) -> Any:
    """Return the inputs of a batch, with its labels left out if it has any."""
    batch = plain(batch)
    if isinstance(batch, dict):
        return {name: value for name, value in batch.items() if name not in LABEL_KEYS}
    if isinstance(batch, tuple | list) and batch:
        return batch[0]
    return batch


def is_whole(data: Any) -> bool:
    """Return whether labeled data is a single pair (inputs, labels), dict or dataclass.

    Otherwise it is an iterable of such batches.
    """
    is_pair = isinstance(data, tuple | list) and len(data) > 1 and isinstance(data[1], Tensor)
    return is_pair or isinstance(data, Mapping) or is_record_of_rows(data)


def is_array(data: Any) -> bool:
    """Return whether data is a tensor, or an array of NumPy or of a library that it can read."""
    return isinstance(data, Tensor) or hasattr(data, "__array__")


def as_tensors(data: Any, dtype: torch.dtype, subject: str = "") -> Any:
    """Return data whose arrays are tensors.

    Those of floating point have the type ``dtype``, and one whole number an example is int64.
    Tensors stay as they are.

    Args:
        subject: refuse what is no array in a text that begins with this; empty: leave it as it is.
    """
    if type(data) is dict:
        return {name: as_tensors(value, dtype, subject=subject) for name, value in data.items()}
    if type(data) in (tuple, list):
        return type(data)(as_tensors(value, dtype, subject=subject) for value in data)
    if is_record(data):
        values = {name: as_tensors(value, dtype) for name, value in fields_of(data).items()}
        return with_fields_of(data, values)
    if is_named_tuple(data) and not isinstance(data, PackedSequence):
        return type(data)(*(as_tensors(value, dtype, subject=subject) for value in data))
    if isinstance(data, Tensor) or not (subject or is_array(data)):
        return data
    array = np.asarray(data)
    # Booleans, whole numbers with a sign or without, and numbers of floating point.
    if array.dtype.kind not in "biuf":
        held = f"{subject or 'it holds data'} of {type(data).__name__} ({array.dtype})"
        names = f", such as {INDICES_OF_NAMES} of the names of classes"
        raise MetaplError(f"{held}; expected numbers{names if array.dtype.kind in 'US' else ''}.")
    # A copy: torch can neither share what is read-only nor what runs backwards.
    tensor = torch.tensor(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if tensor.is_floating_point():
        return tensor.to(dtype)
    if tensor.ndim == 1 and tensor.dtype != torch.bool:
        return tensor.long()
    return tensor


def rows(batch: Batch, start: int, stop: int) -> Any:
    """Return the rows from ``start`` to before ``stop`` of a batch."""
    leaves, structure = flatten_to_rows(batch)
    cut = [leaf[start:stop] if is_by_row(leaf) else leaf for leaf in leaves]
    return pytree.tree_unflatten(cut, structure)


def flatten_to_rows(batch: Batch) -> tuple[list[Any], Any]:
    """Return the leaves of a batch and its structure; a column of numbers or texts is one leaf."""
    return flatten(batch, is_leaf=functools.partial(is_column, count=length(batch)))


def is_column(part: Any, count: int) -> bool:
    """Return whether a part of a batch is a list or a tuple with an entry for each of its rows.

    A loader makes such of texts.
    """
    is_list = type(part) in (list, tuple) and len(part) == count
    return is_list and not any(map(is_by_row, leaves_of(part)))


def is_by_row(leaf: Any) -> bool:
    """Return whether a leaf is cut with the rows of a batch: a tensor, an array or a column."""
    if isinstance(leaf, Tensor | np.ndarray):
        return leaf.ndim > 0
    return isinstance(leaf, list | tuple)


def length(batch: Batch) -> int:
    """Return the number of rows of a batch, which is that of its longest tensor or array."""
    return max((len(leaf) for leaf in leaves_of(batch) if is_by_row(leaf)), default=0)


# Whole numbers as wide as the entries of a tensor, by their bytes.
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Leaves of these types count in a digest by their values, others by their types.
_PLAIN_TYPES = (bool, int, float, str, bytes, type(None))


def digest(batch: Batch) -> Tensor:
    """Return a whole number by which a batch is known, bit for bit, () int64.

    It is the same in every process, and is computed where the tensors are: on a CPU by SHA-256,
    elsewhere by a mix of the bits.
    """
    # A pass may leave attributes in a batch, which one that is read again does not have.
    leaves, structure = flatten(batch, only_fields=True)
    tensors: list[Tensor] = []
    descriptions: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            leaf = torch.as_tensor(leaf)
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            descriptions.append((leaf.shape, leaf.dtype))
        else:
            descriptions.append(repr(leaf) if type(leaf) in _PLAIN_TYPES else type(leaf))
    # Not Python's hash, which is another one in every process.
    described_batch = repr((_as_text(structure), *descriptions)).encode()
    of_structure = hashlib.blake2b(described_batch, digest_size=8).digest()
    total = torch.tensor(int.from_bytes(of_structure, "little", signed=True))
    for number, t in enumerate(tensors):
        bits = t.detach().to_dense().contiguous().flatten()
        bits = bits.view(_WHOLE_NUMBERS[min(t.element_size(), 8)])
        if t.device.type == "cpu":
            # In a quarter of the time that the mix takes there.
            of_tensor = hashlib.sha256(number.to_bytes(8) + bits.numpy().tobytes()).digest()
            total = total + int.from_bytes(of_tensor[:8], "little", signed=True)
        else:
            total = total.to(t.device) + _mixed(bits, number).sum()
    return total


@functools.lru_cache(maxsize=16)
def _as_text(structure: pytree.TreeSpec) -> str:
    """Return a structure as text, which PyTorch makes in the time of a digest."""
    return str(structure)


def row_digests(inputs: Inputs, *, ignores_padding: bool = False) -> Tensor:
    """Return a whole number for each row of a network's inputs, (B,) int64.

    Rows with equal bits have equal numbers, wherever they stand in a batch and on any device.

    Args:
        ignores_padding: whether what the ``attention_mask`` of a dict masks does not count, so that
            a row is known again however far it is padded on its right.

    Cost: six operations on every 8 bytes.
    """
    mask = None
    if ignores_padding and isinstance(inputs, dict):
        mask = inputs.get("attention_mask")
    total: Tensor | None = None
    # Most networks are called with one tensor, whose tree takes longer than its digest.
    leaves = [inputs] if isinstance(inputs, Tensor) else leaves_of(inputs)
    for number, t in enumerate(leaves):
        if not isinstance(t, Tensor) or t.ndim == 0:
            continue
        entries = t.detach().contiguous().reshape(len(t), -1)
        is_masked = mask is not None and t.shape == mask.shape
        fills_words = entries.shape[1] * t.element_size() % 8 == 0
        if fills_words and not is_masked:
            if entries.storage_offset() * t.element_size() % 8:
                # A part of a larger tensor may begin within a word.
                entries = entries.clone()
            # As few and as wide numbers as possible: several entries are one of them.
            bits = entries.view(torch.int64)
        else:
            bits = entries.view(_WHOLE_NUMBERS[min(t.element_size(), 8)]).to(torch.int64)
        # Entries that differ in their leading bits alone, as small whole numbers in floating point
        # do, would differ in the leading bits of the products.
        mixed = (bits >> 21).bitwise_xor_(bits >> 42).bitwise_xor_(bits)
        products = mixed.mul_(_multipliers(bits.shape[1], number, t.device))
        if is_masked:
            products = products * (mask != 0)
        of_tensor = products.sum(1)
        total = of_tensor if total is None else total + of_tensor
    if total is None:
        expected = "tensors with a row for each example"
        raise unexpected("the network's inputs are", inputs, expected)
    return total


@functools.lru_cache(maxsize=64)
def _multipliers(entries: int, number: int, device: torch.device) -> Tensor:
    """Return an odd number for each place in a row; those of a shorter row are the first ones.

    Args:
        number: which of a batch's tensors it is.
    """
    return _mixed(torch.zeros(entries, dtype=torch.int64, device=device), number) | 1


def _mixed(bits: Tensor, number: int) -> Tensor:
    """Return a number for each entry of a tensor, by its bits and its place, on its device.

    Each place with its value is mixed into a number of its own: a sum of multiples would know small
    labels badly.

    Args:
        number: which of a batch's tensors it is.
    """
    places = torch.arange(len(bits), device=bits.device) + (number << 40)
    mixed = bits.to(torch.int64) + places * 0x1E3779B97F4A7C15
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        mixed = (mixed ^ (mixed >> 30)) * factor
    return mixed ^ (mixed >> 31)


def micro_batches(batch: Batch, parts: int, name: str) -> list[Any]:
    """Return a batch (any nesting of tensors with a row per example) in parts of equal size.

    Arrays are cut as tensors are, and so are lists and tuples of as many numbers or texts as there
    are rows. What else is no tensor, or one number, is in each of the parts.

    Args:
        parts: how many.
        name: of the batch, for errors.
    """
    if parts == 1:
        return [batch]
    # Loaded where it is used.
    from metapl.execution.micro_batches import pieces_of

    leaves, structure = flatten_to_rows(plain(batch))
    pieces_of_leaves = pieces_of(leaves, [*map(is_by_row, leaves)], parts, name)
    return [
        pytree.tree_unflatten(list(pieces), structure)
        for pieces in zip(*pieces_of_leaves, strict=True)
    ]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of micro-batches, concatenated; those of a single one as they are."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts))


def views(batch: Batch) -> tuple[Any, ...]:
    """Return an unlabeled batch as (x,) or (weak, strong).

    A view is a tensor or a dict without labels; two views are of one structure. A pair (inputs,
    labels) is refused.
    """
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping) and not any(key in batch for key in LABEL_KEYS):
        return (batch,)
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return (first_input(batch),)
    if isinstance(batch, tuple | list) and len(batch) == 2 and holds_tensors(batch[0]):
        weak, strong = batch
        are_labels = (
            isinstance(strong, Tensor) and strong.ndim == 1 and not strong.is_floating_point()
        )
        if _kinds_of_leaves(weak) == _kinds_of_leaves(strong) and not are_labels:
            return tuple(batch)
    raise MetaplError(
        f"inner is {described(batch)}; expected a tensor or dict, (inputs,), or (weak, strong) of "
        "one type, without labels (metapl.data.without_labels), or a metapl.Lookahead of these."
        f"{_way_of_arrays(batch)}"
    )


def _kinds_of_leaves(batch: Batch) -> tuple[Any, list[Any]]:
    """Return the structure of a batch, and the types and dimensions of its leaves."""
    leaves, structure = flatten(batch)
    kinds = [(t.dtype, t.ndim) if isinstance(t, Tensor) else type(t) for t in leaves]
    return structure, kinds


def holds_tensors(inputs: Inputs) -> bool:
    """Return whether there is a tensor in the inputs of a batch."""
    return isinstance(inputs, Tensor) or any(isinstance(leaf, Tensor) for leaf in leaves_of(inputs))
