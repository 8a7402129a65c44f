"""What is refused at the door, in one line, and the flag of a step.

On the CPU, values are checked at once. On an accelerator that would make the host wait, so the result of a check stays
on the device in a :class:`Fault`, and the error is raised when the report is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few


@dataclass
class Fault:
    """Results of checks that are still on the device, with the texts of their errors."""

    findings: list[tuple[Tensor, str]] = field(default_factory=list)

    @property
    def flag(self) -> Tensor:
        """Whether any check has failed, a boolean scalar that is still on the device."""
        return (
            torch.stack([bad for bad, _ in self.findings]).any() if self.findings else torch.zeros((), dtype=torch.bool)
        )

    def raise_if_found(self, where: str = "") -> None:
        """Wait for the device and raise the first error, with ``where`` before its text."""
        for bad, text in self.findings:
            if bool(bad):
                raise MetaplError(
                    f"{where}{text} (found after the step was taken: go on from the last good checkpoint)"
                )


def transformed() -> bool:
    """Whether this runs inside a transform of ``torch.func``, or is being compiled: no value can be read then."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


# What collects the checks that would have to wait for a device; None: the host waits.
deferred: ContextVar[Fault | None] = ContextVar("deferred", default=None)


def waits(t: Tensor) -> bool:
    """Whether reading a value would make the host wait for its device."""
    return t.device.type != "cpu"


def refuse(bad: Tensor, text: str) -> None:
    """Raise ``text`` where the boolean scalar ``bad`` holds, now or when the next report is read."""
    if transformed():
        return
    fault = deferred.get()
    if fault is not None and waits(bad):
        fault.findings.append((bad, text))
    elif bool(bad):
        raise MetaplError(text)


def refuse_not_finite(t: Tensor, text: str) -> None:
    """Raise ``text`` if a tensor has NaN or infinite values, now or when the next report is read."""
    if transformed():
        return
    if waits(t):
        refuse(~torch.isfinite(t).all(), text)
    elif not math.isfinite(t) if t.ndim == 0 else not bool(torch.isfinite(t).all()):
        raise MetaplError(text)


def described(value: Any) -> str:
    """A value in words: its type, and the shape, dtype and device of a tensor."""
    if isinstance(value, Tensor):
        kind = "tensor" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} tensor"
        shape = "of uneven rows" if value.is_nested else f"of shape {tuple(value.shape)}"
        return f"a {kind} {shape}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    if isinstance(value, dict):
        return f"a dict of {len(value)} ({few(map(repr, value), 20)})"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({few([type(t).__name__ for t in value], 20)})"
    return f"of type {type(value).__name__}"


def whole_number(value: Any, given: str, expected: str) -> None:
    """Refuse what is not a whole number of 1 or more; ``given`` is how it was given, such as ``accumulate=0``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MetaplError(f"{given}: expected {expected}, 1 or more.")


def is_generator(value: Any) -> None:
    if not isinstance(value, torch.Generator | None):
        raise MetaplError(f"generator is {described(value)}; expected torch.Generator().manual_seed(0), or None.")


def no_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise MetaplError("a step was called inside torch.inference_mode(), where no gradient can be taken.")


def leaves_of(tree: Any) -> Iterable[Any]:
    """The leaves of a tree as pytree finds them, several times as fast for the usual batches."""
    if isinstance(tree, Tensor):
        return (tree,)
    if type(tree) in (tuple, list, dict):
        return [leaf for part in (tree.values() if type(tree) is dict else tree) for leaf in leaves_of(part)]
    return pytree.tree_leaves(tree)


def dense(batch: Any, which: str) -> None:
    """Refuse sparse tensors, where rows are taken or values compared; ``which`` begins the sentence."""
    for t in leaves_of(batch):
        if isinstance(t, Tensor) and t.layout not in (torch.strided, torch.jagged):
            raise MetaplError(f"{which} {described(t)}; expected dense tensors: x.to_dense().")


def finite_on_host(batch: Any) -> None:
    """Refuse a batch on the host with NaN or infinite values; tensors on an accelerator are not checked."""
    for t in leaves_of(batch):
        if isinstance(t, Tensor) and t.is_floating_point() and not waits(t) and not t.isfinite().all():
            raise MetaplError("a batch holds NaN or infinite values; clean the inputs first.")


# ------------------------------------------------------------------------------------------------------------- outputs


def logits(outputs: Any, who: str) -> Tensor:
    """The outputs of a network, refused if they are not a plain tensor of real numbers."""
    if type(outputs) is Tensor and not outputs.is_complex():
        return outputs
    if not isinstance(outputs, Tensor):
        raise MetaplError(
            f"the {who} returned {described(outputs)}; expected a tensor of logits: metapl.models.Logits({who}) takes "
            "them out of what Hugging Face's networks with a head return."
        )
    if outputs.is_complex():
        raise MetaplError(f"the {who} returned {described(outputs)}; expected real outputs, such as outputs.abs().")
    if hasattr(outputs, "device_mesh"):
        raise MetaplError(
            f"the {who} returned a DTensor; expected a plain tensor with the logits of this process's rows: give the "
            "last layer output_layouts=Replicate() and use_local_output=True."
        )
    return outputs


def logits_in(outputs: Any) -> Any:
    """The logits of an object, such as those of Hugging Face, or of a dict; None where it has none."""
    return outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)


def class_outputs(outputs: Tensor, who: str) -> None:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise MetaplError(
            f"the {who}'s outputs are {described(outputs)}; expected logits of shape (batch, classes), two classes or "
            "more. For other outputs, write a problem of your own (metapl.BilevelProblem)."
        )


def same_classes(teacher_outputs: Tensor, student_outputs: Tensor) -> None:
    """Refuse a teacher whose outputs do not match the student's."""
    class_outputs(teacher_outputs, "teacher")
    if teacher_outputs.shape != student_outputs.shape:
        raise MetaplError(
            f"the teacher's outputs have shape {tuple(teacher_outputs.shape)}, the student's "
            f"{tuple(student_outputs.shape)}; expected the same batch and the same number of classes."
        )


def finite(logits_NC: Tensor) -> None:
    bad_N = ~logits_NC.isfinite().all(dim=1)
    if bad_N.any():
        raise MetaplError(
            f"the logits of {int(bad_N.sum())} of {len(bad_N)} examples are not finite; the model diverged."
        )


# -------------------------------------------------------------------------------------------------------------- labels


def class_labels(labels: Any, classes: int, what: str = "the labels", why: str = "") -> None:
    """Refuse labels that are not integers in [0, classes); ``what`` and ``why`` are the error's words."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise MetaplError(
            f"{what} are {described(labels)}; expected integers (int64), one class index per example, (batch,): "
            "labels.long(), labels.argmax(1) of one-hot rows, labels.squeeze(1) of (batch, 1)."
        )
    _in_range(labels, classes, what, why or f"the networks have {classes} classes")


def safe_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels within the range of classes: on a device, a wrong label would abort the process before it is reported."""
    return labels.clamp(0, classes - 1) if waits(labels) else labels


def row_indices(index: Any, rows: int, who: str) -> Tensor:
    """Indices of rows, refused outside 0..rows - 1 (Python counts -1 from the end, PyTorch takes uint8 for a mask)."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise MetaplError(f"the index of {who} is {described(index)}; expected integers, int64 or int32: index.long().")
    if index.numel():
        _in_range(index, rows, "the index", f"{who} has {rows:,} rows")
    return safe_labels(index, rows)


def _in_range(numbers: Tensor, count: int, what: str, why: str) -> None:
    if transformed():
        return
    low, high = numbers.aminmax()
    if waits(numbers) or int(low) < 0 or int(high) >= count:
        refuse((low < 0) | (high >= count), f"{what} reach outside 0..{count - 1}; {why}: expected 0..{count - 1}.")


def safe_probabilities(probabilities: Tensor) -> Tensor:
    """Probabilities without NaN, for ``torch.multinomial``: as :func:`safe_labels`."""
    return probabilities.nan_to_num(nan=1.0) if waits(probabilities) else probabilities


# -------------------------------------------------------------------------------------------------------------- losses


def scalar_loss(loss: Any, name: str, mend: str = "take the mean") -> None:
    if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
        raise MetaplError(f"{name} is {described(loss)}; expected a real tensor without dimensions: {mend}.")


def learns(loss: Tensor, who: str) -> None:
    """Refuse a loss without a gradient, except a constant 0, such as UDA before its start."""
    if not loss.requires_grad:
        refuse(loss != 0, str(without_gradient(who)))


def without_gradient(who: str) -> MetaplError:
    return MetaplError(
        f"the {who}'s loss has no gradient, so nothing would be learned: its outputs are detached, or what they depend "
        "on has requires_grad=False."
    )


def moves(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that holds none of a network's trainable parameters."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters() if p.requires_grad):
        raise MetaplError(
            "the optimizer holds none of the network's parameters that have requires_grad=True, so nothing would be "
            "learned; expected an optimizer over model.parameters()."
        )
