"""What is refused at the door, in one line, and the flag of a step.

On the CPU, values are checked at once. On an accelerator that would make the host wait, so the
result of a check stays on the device in a :class:`Fault`, and the error is raised when the report
is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError


@dataclass
class Fault:
    """Results of checks that are still on the device, with the texts of their errors."""

    findings: list[tuple[Tensor, str]] = field(default_factory=list)

    @property
    def flag(self) -> Tensor:
        """Whether any check has failed, a boolean scalar that is still on the device."""
        found = [bad for bad, _ in self.findings]
        return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool)

    def raise_if_found(self, where: str = "") -> None:
        for bad, text in self.findings:
            if bool(bad):
                raise MetaplError(
                    f"{where}{text} (found after the step: go on from the last good checkpoint)"
                )


_interpreters = torch._C._functorch.peek_interpreter_stack


def transformed() -> bool:
    """Whether this runs inside a transform of ``torch.func``, or is being compiled.

    No value can be read then.
    """
    return torch.compiler.is_compiling() or _interpreters() is not None


NO_GRADIENT = "has no gradient: its outputs are detached, or what they depend on is frozen."
READS_OTHER_WEIGHTS = (
    "reaches no weight in a module of the student: its forward reads layers from a plain list or "
    "dict, or tensors that it has kept; expected nn.ModuleList or nn.ModuleDict, whose weights "
    "are read in each pass."
)
# What collects the checks that would have to wait for a device; None: the host waits.
deferred: ContextVar[Fault | None] = ContextVar("deferred", default=None)


def waits(t: Tensor) -> bool:
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


def refuse_not_finite(text: str, *numbers: Tensor) -> None:
    """Raise ``text`` if one of these scalars is NaN or infinite, now or when the next report is read."""
    if waits(numbers[0]):
        refuse(~torch.stack(numbers).isfinite().all(), text)
    elif not all(map(math.isfinite, numbers)):  # in a tenth of the time
        raise MetaplError(text)


def described(value: Any) -> str:
    """A value in words: its type, and the shape, dtype and device of a tensor."""
    if isinstance(value, Tensor) and not value.is_nested:
        return (
            f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, "
            f"on {value.device}"
        )
    if isinstance(value, dict | tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"


def generator_of(generator: torch.Generator | None, device: torch.device, what: str) -> None:
    """Refuse a generator of another device than the one on which it is to draw, which ``what`` says."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise MetaplError(
            f"generator is {described(generator)}; expected "
            f"torch.Generator({str(device)!r}).manual_seed(0), or none."
        )
    same_number = (
        None in (generator.device.index, device.index) or generator.device.index == device.index
    )
    if generator.device.type != device.type or not same_number:
        raise MetaplError(
            f"generator is on {generator.device}, and {what} {device}; expected "
            f"torch.Generator({str(device)!r}), or none."
        )


def tensor_in(outputs: Any) -> Tensor | None:
    """Return the tensor in what a network returned, or None without one: the outputs themselves,
    their ``logits`` (an entry or an attribute), or the first tensor of a tuple or list, such as
    (prediction, hidden state)."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    else:
        outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, tuple | list):
        outputs = next((part for part in outputs if isinstance(part, Tensor)), None)
    return outputs if isinstance(outputs, Tensor) else None


def logits(outputs: Any, who: str) -> Tensor:
    """The outputs of a network, refused if they are not a plain tensor of real numbers."""
    is_sharded = hasattr(outputs, "device_mesh")
    plain = type(outputs) is Tensor or (isinstance(outputs, Tensor) and not is_sharded)
    if plain and not outputs.is_complex():
        found: Tensor = outputs
        return found
    if is_sharded:
        mend = "use_local_output=True in the plan of parallelize_module"
    elif plain:
        mend = "torch.view_as_real of it, or its abs()"
    elif tensor_in(outputs) is not None:
        mend = (
            f"give metapl.models.Logits({who}), which takes the first tensor in it, or its logits"
        )
    else:
        mend = f"return one from the {who}'s forward"
    given = described(outputs)
    raise MetaplError(
        f"the {who} returned {given}; expected a plain tensor of real numbers: {mend}."
    )


def class_outputs(outputs: Tensor, who: str) -> None:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise MetaplError(
            f"the {who}'s outputs are {described(outputs)}; expected logits (batch, classes), two "
            "or more."
        )


def finite(logits_NC: Tensor) -> None:
    if not logits_NC.isfinite().all():
        raise MetaplError("the logits of some examples are not finite; the model diverged.")


def class_labels(labels: Any, classes: int, what: str = "the labels", why: str = "") -> Tensor:
    """Labels, refused if they are not integers in [0, classes), as :func:`safe_labels`."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise MetaplError(
            f"{what} are {described(labels)}; expected int64, one class index per example, "
            "(batch,)."
        )
    waiting = waits(labels)
    if labels.numel() and not transformed():
        low, high = labels.aminmax()
        if waiting or int(low) < 0 or int(high) >= classes:
            why = why or f"the networks have {classes} classes"
            text = f"{what} reach outside 0..{classes - 1}; {why}: expected 0..{classes - 1}."
            refuse((low < 0) | (high >= classes), text)
    return labels.clamp(0, classes - 1) if waiting else labels


def safe_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels within the range of classes.

    On a device, a wrong label would abort the process before it is reported.
    """
    return labels.clamp(0, classes - 1) if waits(labels) else labels


def scalar_loss(loss: Any, name: str, mend: str = "take the mean") -> None:
    if not isinstance(loss, Tensor) or loss.ndim or loss.is_complex():
        raise MetaplError(
            f"{name} is {described(loss)}; expected a real tensor without dimensions: {mend}."
        )


def learns(loss: Tensor, who: str) -> None:
    """Refuse a loss without a gradient, except a constant 0, such as UDA before its start."""
    if not loss.requires_grad:
        refuse(loss != 0, f"the {who}'s loss {NO_GRADIENT}")
