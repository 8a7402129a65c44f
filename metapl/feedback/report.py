"""The report of a step: its numbers, on the device until they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution import checks
from metapl.execution.numerics import float32_products
from metapl.problems.base import Signal
from metapl.words import summary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """The numbers of a step.

    They stay on the device until they are read: ``as_dict``, or an attribute, gives floats.

    Args:
        step: the step's number, from 0.
        scalars: by name; means over the processes that share the batch.
        fault: what was checked on the device; raised when the report is read.
    """

    step: int
    scalars: dict[str, Tensor]
    fault: checks.Fault = field(default_factory=checks.Fault)

    @classmethod
    def later(cls, fields: Callable[[], dict[str, Any]], **known: Any) -> Self:
        """Return a report of which some fields are known, and the others made when one is read."""
        report = cls.__new__(cls)
        vars(report).update(known, _later=fields)
        return report

    def __repr__(self) -> str:
        # A report of a step without a teacher has no feedback.
        feedback = {"feedback": self.feedback} if hasattr(self, "feedback") else {}
        return summary(type(self).__name__, step=self.step, **self.scalars, **feedback)

    @property
    def flag(self) -> Tensor:
        """Whether a check of the step has failed.

        A boolean scalar on the device. On a CPU such a step is refused.
        """
        return self.fault.flag

    def as_dict(self) -> dict[str, float]:
        """Return every scalar, in one transfer from the device."""
        self.fault.raise_if_found()
        columns = self._columns()
        scalars = [t.detach().double().reshape(()) for t in columns.values()]
        values = torch.stack(scalars).tolist()
        return dict(zip(columns, values, strict=True))

    def _columns(self) -> dict[str, Tensor]:
        """Return the scalars that are read as floats, by name."""
        return self.scalars

    def __getattr__(self, name: str) -> float:
        if "_later" in self.__dict__ and not name.startswith("_"):
            fields = self.__dict__.pop("_later")
            self.__dict__.update(fields())
            value: float = getattr(self, name)
            return value
        # A report that is being copied has no scalars yet.
        columns: dict[str, Tensor] = {}
        if "scalars" in self.__dict__ and not name.startswith("_"):
            columns = self._columns()
        if name not in columns:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}; it has {', '.join(columns)}"
            )
        return self.as_dict()[name]


@dataclass(frozen=True, kw_only=True, repr=False)
class StepReport(Report):
    """The numbers of one step of the bilevel trainer.

    Args:
        feedback: h, minus the gradient of the outer loss in the signal, as the mode shapes it; a
            tensor, or a dict of them where the signal is one. A tuple of these for a
            :class:`metapl.Lookahead`.
        scalars: ``inner_loss`` (ℓ at θ), ``outer_loss`` (L(θ′), where the mode computes it),
            ``teacher_loss`` (the sum of its own losses) and a ``teacher_<name>`` for each of these;
            ``feedback_weight`` (λ) and ``feedback_ratio`` (‖λ G_h‖ / ‖G_own‖, the size of the
            feedback's gradient beside that of the own losses), where the rule of the size needs
            both gradients, and in the rows that a fit records; of a student that Muon moves,
            ``step_rounding``, how far its products in bfloat16 lead from the θ′ that is
            differentiated, over ‖θ′ − θ‖. Read with these: ``feedback_mean`` and ``feedback_std``,
            of the entries of this rank's h.
        signal: the teacher's signal about the last inner batch, without its graph, of this rank's
            rows.
        student_outputs: S(x_u; θ) on that batch, of this rank's rows.
        direct_term: where the outer loss reads the teacher, whether its gradient at fixed θ′ is
            ``"included"`` in the teacher's, or ``"left out"``, as in ``none`` and the sampled
            modes; empty where it reads the student alone.
        order: in which order the second derivative was taken (:mod:`metapl.core.order`), as the
            first step chose it; empty in modes that take none, and in compiled steps.
    """

    feedback: Any
    signal: Signal
    student_outputs: Tensor
    order: str = ""
    direct_term: str = ""

    @property
    def float32_products(self) -> dict[str, str]:
        """In what precision products of float32 are taken on the step's device.

        Of matrices and of convolutions, by these names: ``"ieee"``, ``"tf32"`` or ``"bf16"``, as
        torch's switches stand when this is read.
        """
        return float32_products(self.student_outputs.device)

    def _columns(self) -> dict[str, Tensor]:
        entries = [t.detach().double().flatten() for t in pytree.tree_leaves(self.feedback)]
        h = torch.cat(entries)
        return {**self.scalars, "feedback_mean": h.mean(), "feedback_std": h.std(correction=0)}
