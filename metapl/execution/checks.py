"""Refusals of tensors and batches, in one line each before a step moves anything; its flag.

On the CPU, values are checked at once. On an accelerator that would make the host wait, so the
result of a check stays on the device in a :class:`Fault`, and the error is raised when the report
is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metapl.errors import MetaplError, few


@dataclass
class Fault:
    """Results of checks that are still on the device, with the texts of their errors.

    A result may be a function that computes it: then nothing is computed before it is read.
    """

    findings: list[tuple[Tensor | Callable[[], Tensor], str]] = field(default_factory=list)

    @property
    def flag(self) -> Tensor:
        """Whether any check has failed, a boolean scalar that is still on the device."""
        if not self.findings:
            return torch.zeros((), dtype=torch.bool)
        return torch.stack([result_of(bad) for bad, _ in self.findings]).any()

    def found(self) -> str:
        """Return the text of the first check that has failed; "" for none."""
        for bad, text in self.findings:
            if bool(result_of(bad)):
                return text
        return ""

    def raise_if_found(self, where: str = "") -> None:
        """Raise the first error that a check has found; ``where`` is the beginning of its text."""
        if text := self.found():
            mend = "found after the step: go on from the last good checkpoint"
            raise MetaplError(f"{where}{text} ({mend})")


def result_of(bad: Tensor | Callable[[], Tensor]) -> Tensor:
    """Return the result of a check, computed now where it was left for later."""
    return bad if isinstance(bad, Tensor) else bad()


_interpreters = torch._C._functorch.peek_interpreter_stack
# Whether values of tensors can be read, as they cannot where operations are recorded.
has_values: ContextVar[bool] = ContextVar("has_values", default=True)


def transformed() -> bool:
    """Return whether this runs inside a transform of ``torch.func``, or is compiled or recorded.

    No value can be read then.
    """
    return not has_values.get() or torch.compiler.is_compiling() or _interpreters() is not None


@contextmanager
def having(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Let a variable of the context have this value in this block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def no_values() -> AbstractContextManager[None]:
    """Let no value of a tensor be read in this block, whose operations are to be recorded."""
    return having(has_values, value=False)


# The indices of classes that are known by their names.
INDICES_OF_NAMES = "numpy.unique(labels, return_inverse=True)[1]"
OTHER_OUTPUTS = "or a problem or a loss for other outputs (docs/write-a-problem.md)"
NO_GRADIENT = (
    "has no gradient: its outputs are detached, what they depend on is frozen, or "
    "torch.inference_mode() is on."
)
NO_WEIGHT = (
    "the weights of the problem's outer_loss sum to zero or less; expected more: are all labels "
    "left out?"
)
READS_OTHER_WEIGHTS = (
    "reaches no weight in a module of the student: its forward reads layers from a plain list or "
    "dict, or tensors that it has kept; expected nn.ModuleList or nn.ModuleDict, whose weights "
    "are read in each pass."
)

# What collects the checks that would have to wait for a device; None: the host waits.
deferred: ContextVar[Fault | None] = ContextVar("deferred", default=None)


def waits(t: Tensor) -> bool:
    """Return whether the host would have to wait for the values of a tensor, or has none."""
    return not (t.is_cpu and has_values.get())


def refuse(bad: Tensor, text: str) -> None:
    """Raise ``text`` where the boolean scalar ``bad`` holds.

    Now, or on a device when the next report is read.
    """
    fault = deferred.get()
    if fault is not None and waits(bad):
        fault.findings.append((bad, text))
    elif not transformed() and bool(bad):
        raise MetaplError(text)


def refuse_not_finite(text: str, *numbers: Tensor) -> None:
    """Raise ``text`` if one of these scalars is NaN or infinite.

    Now, or when the next report is read.
    """
    if waits(numbers[0]):
        refuse(~torch.stack(numbers).isfinite().all(), text)
    # On a CPU, numbers of Python take a tenth of the time.
    elif not all(map(math.isfinite, numbers)):
        raise MetaplError(text)


def described(value: Any) -> str:
    """Return a value in words: its type, and the shape, dtype and device of a tensor."""
    if isinstance(value, Tensor) and not value.is_nested:
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a tensor of shape {tuple(value.shape)}, {dtype}, on {value.device}"
    kind = type(value).__name__
    if isinstance(value, tuple | list):
        # What its elements are, each kind once.
        kinds = few(dict.fromkeys(type(part).__name__ for part in value))
        return f"a {kind} of {len(value)}{kinds and f' ({kinds})'}"
    if isinstance(value, dict):
        return f"a {kind} of {len(value)}"
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        return f"of type {kind}, shape {value.shape}, {value.dtype}"
    return f"of type {kind}"


def unexpected(subject: str, value: Any, expected: str) -> MetaplError:
    """Return the error of a value that is not what is expected.

    Args:
        subject: what the value is, with a verb.

    >>> print(unexpected("inner is", torch.zeros(2), "a pair"))
    inner is a tensor of shape (2,), float32, on cpu; expected a pair.
    """
    return MetaplError(f"{subject} {described(value)}; expected {expected}.")


def generator_of(generator: torch.Generator | None, device: torch.device, subject: str) -> None:
    """Refuse a generator of another device than the one on which it is to draw.

    Args:
        subject: whose device that is, for the error, such as "the networks are on".
    """
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise unexpected("generator is", generator, f"torch.Generator({str(device)!r}), or none")
    # A device without a number is the current one, and may be any.
    numbers = {generator.device.index, device.index} - {None}
    if generator.device.type != device.type or len(numbers) > 1:
        given = f"generator is on {generator.device}, and {subject} {device}"
        raise MetaplError(f"{given}; expected torch.Generator({str(device)!r}), or none.")


def tensor_in(outputs: Any) -> Tensor | None:
    """Return the tensor in what a network returned, or None without one.

    It is the outputs themselves, their ``logits`` (an entry or an attribute), or the first tensor
    of a tuple or list, such as (prediction, hidden state).
    """
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    else:
        outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, tuple | list):
        outputs = next((part for part in outputs if isinstance(part, Tensor)), None)
    return outputs if isinstance(outputs, Tensor) else None


def logits(outputs: Any, role: str) -> Tensor:
    """Return the outputs of a network; refuse what is no plain tensor of real numbers.

    Args:
        role: of the network, for the error.
    """
    # The type is asked first, since nearly all outputs are plain.
    is_sharded = type(outputs) is not Tensor and hasattr(outputs, "device_mesh")
    is_plain = isinstance(outputs, Tensor) and not is_sharded
    if is_plain and not outputs.is_complex():
        plain_outputs: Tensor = outputs
        return plain_outputs
    if is_sharded:
        mend = "use_local_output=True in the plan of parallelize_module"
    elif is_plain:
        mend = "torch.view_as_real of it, or its abs()"
    elif tensor_in(outputs) is not None:
        mend = (
            f"give metapl.models.Logits({role}), which takes the first tensor in it, or its logits"
        )
    else:
        mend = f"return one from the {role}'s forward"
    expected = f"a plain tensor of real numbers: {mend}"
    raise unexpected(f"the {role} returned", outputs, expected)


def class_outputs(outputs: Tensor, role: str) -> None:
    """Refuse outputs that are no logits of two or more classes."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        expected = f"logits (batch, 2 or more classes), {OTHER_OUTPUTS}"
        raise unexpected(f"the {role}'s outputs are", outputs, expected)


def class_labels(
    labels: Any,
    classes: int,
    subject: str = "the labels",
    reason: str = "",
    rows: int | None = None,
    *,
    or_distributions: bool = False,
) -> Tensor:
    """Return labels as :func:`safe_labels`; refuse what is not integers in [0, classes).

    Args:
        subject: whose labels they are, for the error.
        reason: where the number of classes comes from, for the error.
        rows: how many labels there have to be; None: any number.
        or_distributions: take distributions over the classes, (B, C), too.
    """
    is_index = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 1
    if not is_index or rows not in (None, len(labels)):
        is_table = isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 2
        if or_distributions and is_table:
            return class_distributions(labels, (rows or len(labels), classes), subject)
        expected = f"int64, one class index per example, ({rows or 'batch'},)"
        raise unexpected(f"{subject} are", labels, f"{expected}{way_to_labels(labels)}")
    is_read_later = waits(labels)
    # Where operations are recorded, the check is one of them.
    if labels.numel() and _interpreters() is None and not torch.compiler.is_compiling():
        low, high = labels.aminmax()
        # On a device the two are not read here, and the check is kept for the report.
        if is_read_later or int(low) < 0 or int(high) >= classes:
            reason = reason or f"the networks have {classes} classes"
            if is_read_later:
                range_found = f"reach outside 0..{classes - 1}"
            else:
                range_found = f"are {int(low)}..{int(high)}"
            # Classes that are counted from 1.
            mend = ", so subtract 1" if range_found == f"are 1..{classes}" else ""
            text = f"{subject} {range_found}; {reason}: expected 0..{classes - 1}{mend}."
            if classes == 1:
                text = f"{subject} {range_found}, of one output; expected more, {OTHER_OUTPUTS}."
            refuse((low < 0) | (high >= classes), text)
    return safe_labels(labels, classes) if is_read_later else labels


def class_distributions(values: Tensor, shape: Sequence[int], subject: str) -> Tensor:
    """Return distributions over the classes, (B, C, ...), and refuse other values.

    It may sum to 0.98 or to 1.02, as one does that was stored in half precision.

    Args:
        shape: that is expected.
        subject: whose they are, for the error.
    """
    expected = f"class distributions {tuple(shape)}, which sum to 1: the softmax of logits"
    if shape[1] < 2:
        expected = f"two or more outputs of the network, {OTHER_OUTPUTS}"
    error = unexpected(f"{subject} are", values, expected)
    if tuple(values.shape) != tuple(shape) or not values.is_floating_point():
        raise error
    sums_are_off = (values.float().sum(1) - 1).abs().amax() > 0.02
    refuse(sums_are_off | (values.amin() < 0), str(error))
    return values


def way_to_labels(labels: Any) -> str:
    """Return how one class index per example is made of labels, as the end of an error."""
    if isinstance(labels, np.ndarray | list | tuple):
        if isinstance(labels, np.ndarray):
            are_names = labels.dtype.kind in "US"
        else:
            are_names = any(isinstance(label, str) for label in labels)
        if are_names:
            return f", such as torch.as_tensor({INDICES_OF_NAMES})"
        return ", such as torch.as_tensor(labels).long()"
    if not isinstance(labels, Tensor):
        return ""
    if labels.is_floating_point() and not waits(labels) and (labels != labels.round()).any():
        # NaN, or numbers between classes.
        return ""
    calls = ""
    if labels.ndim == 2:
        calls = ".squeeze(1)" if labels.shape[1] == 1 else ".argmax(1)"
    if labels.dtype != torch.int64 and calls != ".argmax(1)":
        calls += ".long()"
    return f", such as torch.as_tensor(labels){calls}" if calls else ""


def safe_labels(labels: Tensor, classes: int) -> Tensor:
    """Return labels within the range of classes.

    On a device, a wrong label would abort the process before it is reported. On a CPU they are
    returned as they are.
    """
    if waits(labels):
        return labels.clamp(0, classes - 1)
    return labels


def scalar_loss(loss: Any, name: str, mend: str = "take the mean") -> None:
    """Refuse a loss that is no real tensor without dimensions.

    Args:
        name: of the loss, for the error.
        mend: what to do, for the error.
    """
    if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
        raise unexpected(f"{name} is", loss, f"a real tensor without dimensions: {mend}")


def learns(loss: Tensor, role: str) -> None:
    """Refuse a loss without a gradient, except a constant 0, such as UDA before its start."""
    if not loss.requires_grad:
        refuse(loss != 0, f"the {role}'s loss {NO_GRADIENT}")
