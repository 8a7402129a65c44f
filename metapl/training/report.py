"""What a step saw, and what is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from metapl import checks
from metapl.numerics import wide
from metapl.problem import Signal


@dataclass(frozen=True)
class StepReport:
    """What one step saw. Numbers stay on the device until they are read: an attribute or ``as_dict`` gives floats.

    Args:
        step: the step's number, from 0.
        feedback: h, minus the gradient of the labelled loss in the signal, as the mode shapes it; a tensor.
        scalars: ``inner_loss`` (ℓ at θ), ``outer_loss`` (L(θ′), where the mode computes it), ``teacher_loss`` (the sum
            of its own losses) and a ``teacher_<name>`` for each of these, ``feedback_ratio`` (the norm of the weighted
            feedback's gradient at the teacher's outputs over that of its own losses; NaN without these).
        signal: what the teacher said, without its graph.
        student_outputs: S(x_u; θ).
        fault: what was found wrong with the batch on the device; raised when the report is read.
    """

    step: int
    feedback: Tensor
    scalars: dict[str, Tensor]
    signal: Signal = field(repr=False)
    student_outputs: Tensor = field(repr=False)
    fault: checks.Fault = field(default_factory=checks.Fault, repr=False)

    def as_dict(self) -> dict[str, float]:
        """Every scalar, by one transfer: the ``scalars``, ``feedback_mean`` and ``feedback_std`` of h over its entries,
        and for class labels ``pseudo_label_confidence``, ``pseudo_label_entropy`` (nats) and ``agreement`` (of the
        student's first class with the teacher's)."""
        self.fault.raise_if_found()
        h = self.feedback.double()
        tensors = {**self.scalars, "feedback_mean": h.mean(), "feedback_std": h.std(correction=0)}
        tensors |= self._of_classes()
        return _read(tensors)

    def counts(self) -> dict[str, list[int]]:
        """For class labels, ``pseudo_label_classes``: how many of the batch the teacher gave each class, drawn or most
        probable."""
        logits = self.signal.outputs
        if logits is None or logits.shape != self.student_outputs.shape:
            return {}
        chosen = self.signal.value if self.signal.sampled else logits.argmax(-1)
        return {"pseudo_label_classes": torch.bincount(chosen.flatten(), minlength=logits.shape[-1]).tolist()}

    def _of_classes(self) -> dict[str, Tensor]:
        logits = self.signal.outputs
        if logits is None or logits.shape != self.student_outputs.shape:
            return {}
        q = self.signal.probs if self.signal.sampled else self.signal.value
        q = wide(logits).softmax(-1) if q is None else q
        agree = logits.argmax(-1) == self.student_outputs.argmax(-1)
        return {
            "pseudo_label_confidence": q.amax(-1).mean(),
            "pseudo_label_entropy": torch.special.entr(q).sum(-1).mean(),
            "agreement": agree.double().mean(),
        }

    def __getattr__(self, name: str) -> float:
        values = self.as_dict() if "scalars" in self.__dict__ and not name.startswith("_") else {}
        if name not in values:
            raise AttributeError(f"StepReport has no {name!r}; it has feedback and {', '.join(values)}")
        return values[name]


@dataclass(frozen=True)
class TeacherReport:
    """What one step of the teacher alone saw; numbers stay on the device until they are read.

    Args:
        step: the step's number, from 0.
        scalars: ``teacher_loss`` (the sum of its own losses) and a ``teacher_<name>`` for each of them.
        fault: as in :class:`StepReport`.
    """

    step: int
    scalars: dict[str, Tensor]
    fault: checks.Fault = field(default_factory=checks.Fault, repr=False)

    def as_dict(self) -> dict[str, float]:
        """Every scalar, by one transfer."""
        self.fault.raise_if_found()
        return _read(self.scalars)

    def counts(self) -> dict[str, list[int]]:
        """Nothing is counted."""
        return {}


def _read(scalars: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([t.detach().double().reshape(()) for t in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))
