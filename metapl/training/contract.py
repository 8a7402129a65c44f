"""What the loop requires of a trainer, and the report of a step: its numbers, on the device until they are read."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.ranks import ALONE, Ranks
from metapl.feedback.teacher import Means, figures
from metapl.metrics.metric import Term
from metapl.problems.base import Problem, Signal, field_of, has_rows
from metapl.words import summary

Say = Callable[[str], None]

SLOPES = 0.1  # the greatest report.flag, to which the curvature along a finite difference contributes


@dataclass(frozen=True)
class Report:
    """The numbers of a step. They stay on the device until they are read: ``as_dict`` gives floats.

    Args:
        step: the step's number, from 0.
        scalars: by name.
        fault: errors detected on the device; raised when the report is read.
    """

    step: int
    scalars: dict[str, Tensor]
    fault: checks.Fault = field(default_factory=checks.Fault)

    def __repr__(self) -> str:
        feedback = {"feedback": self.feedback} if "feedback" in vars(self) else {}
        return summary(type(self).__name__, step=self.step, **self.scalars, **feedback)

    def as_dict(self) -> dict[str, float]:
        """Every scalar, in one transfer from the device."""
        self.fault.raise_if_found()
        tensors = self._tensors()
        values = torch.stack([t.detach().double().reshape(()) for t in tensors.values()]).tolist()
        return dict(zip(tensors, values, strict=True))

    def counts(self) -> dict[str, list[int]]:
        """Whole numbers, a list for each name, such as the pseudo-labels of each class."""
        return {}

    def _tensors(self) -> dict[str, Tensor]:
        return self.scalars

    def __getattr__(self, name: str) -> float:
        values = self.as_dict() if "scalars" in self.__dict__ and not name.startswith("_") else {}
        if name not in values:
            fields = "feedback and " if "feedback" in self.__dict__ else ""
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {fields}{', '.join(values)}")
        return values[name]


@dataclass(frozen=True, kw_only=True, repr=False)
class StepReport(Report):
    """The numbers of one step of the bilevel trainer; an attribute or ``as_dict`` gives floats.

    Args:
        feedback: h, minus the gradient of the labeled loss in the signal, as the mode shapes it; a tensor, or a dict of
            them where the signal is one. A tuple of these for a :class:`metapl.Lookahead`.
        scalars: ``inner_loss`` (ℓ at θ), ``outer_loss`` (L(θ′), where the mode computes it), ``teacher_loss`` (the sum
            of its own losses) and a ``teacher_<name>`` for each of these, ``feedback_ratio`` (the norm of the weighted
            feedback's gradient at the teacher's outputs over that of its own losses; NaN without these, and for a
            signal without rows whose feedback comes from several processes or micro-batches).
        signal: the teacher's signal about the last inner batch, without its graph.
        student_outputs: S(x_u; θ) on that batch.
        problem: it gives the report its columns.
        recent: means over the last steps, whose :func:`metapl.feedback.teacher.figures` are reported.
        ranks: the processes that share the batch: the scalars are means over them, on whichever rank they are read;
            ``feedback``, ``signal``, ``student_outputs`` and ``counts`` are of this rank's rows.
    """

    feedback: Any
    signal: Signal
    student_outputs: Tensor
    problem: Problem
    recent: Means = field(default_factory=dict)
    ranks: Ranks = field(default=ALONE)

    @classmethod
    def of_pure(cls, trainer: Any, report: Any, ahead: bool) -> StepReport:
        """The report of a pure step (:class:`metapl.functional.Report`); ``ahead``: of a look-ahead."""
        several = isinstance(report.signal, list)
        scalars = {"inner_loss": report.inner_loss} | {f"teacher_{n}": t for n, t in report.teacher_losses.items()}
        scalars |= {} if trainer.mode.name == "none" else {"outer_loss": report.outer_loss}
        scalars |= {} if trainer.teacher is None else {"teacher_loss": report.teacher_loss}
        text = "the step is not finite, or the student's outputs do not follow its weights (the slopes differ)."
        return cls(
            trainer.steps_done,
            scalars,
            checks.Fault([(~(report.flag < SLOPES), text)]),
            feedback=tuple(report.feedback) if several else (report.feedback,) if ahead else report.feedback,
            signal=Signal(**(report.signal[-1] if several else report.signal)),
            student_outputs=report.student_outputs,
            problem=trainer.problem,
        )

    def exchanged(self) -> StepReport:
        """The same, when all ranks are here: later one may read the report alone."""
        self.__dict__["_exchanged"] = self._columns()
        return self

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.scalars, **(self._columns() if self.ranks.alone else self.__dict__["_exchanged"])}

    def _columns(self) -> dict[str, Tensor]:
        """``feedback_mean`` and ``feedback_std`` of h over its entries, the problem's columns and the recent means'."""
        steps = self.feedback if isinstance(self.feedback, tuple) else (self.feedback,)
        rows = has_rows(self.problem, self.signal, len(self.student_outputs))
        parts, weights = [], []
        for found in steps:
            of_field = {field_of(key): h for key, h in found.items()} if isinstance(found, dict) else {"value": found}
            for name, h in sorted(of_field.items()):
                # Of the feedback on a field without rows, such as a matrix, each rank has a share.
                shared = not rows.get(name, True)
                parts.append((self.ranks.sum(h) if shared else h).double().flatten())
                weights.append(torch.full_like(parts[-1], 1 / self.ranks.size if shared else 1.0))
        h, weight = torch.cat(parts), torch.cat(weights)
        columns = self.problem.columns(self.signal, self.student_outputs) | figures(self.recent)
        if self.ranks.alone:
            return {"feedback_mean": h.mean(), "feedback_std": h.std(correction=0), **columns}
        weight = weight / weight.sum()  # an entry of every rank's counts once
        means = self.ranks.mean_scalars({"feedback_mean": (weight * h).sum(), **columns})
        spread = self.ranks.mean((weight * (h - means["feedback_mean"]).square()).sum()).sqrt()
        return {"feedback_mean": means.pop("feedback_mean"), "feedback_std": spread, **means}

    def counts(self) -> dict[str, list[int]]:
        return self.problem.counts(self.signal, self.student_outputs)


class Stepwise(ABC):
    """A trainer that goes step by step, and whose state can be saved between any two.

    Attributes:
        student: the network that is trained, evaluated and kept.
        teacher: the network that makes the labels, where there is one.
        teacher_classifies: whether the teacher gives class logits, so that its accuracy can be measured.
        as_given: the student as it was handed over, perhaps in ``DistributedDataParallel``.
        device: where the networks are.
        ranks: the processes that share its batches.
        lookahead: unlabeled batches that the loop draws for a step; several are given as a :class:`metapl.Lookahead`.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    as_given: nn.Module
    device: torch.device
    ranks: Ranks = ALONE
    lookahead: int = 1

    @property
    def teacher_classifies(self) -> bool:
        return self.teacher is not None

    @property
    def late_starts(self) -> Sequence[int]:
        """How many steps from now a loss begins that costs nothing before, such as UDA's."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the student's weights, which arrays of floating point are given."""
        return next((p.dtype for p in self.student.parameters() if p.is_floating_point()), torch.float32)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    @property
    @abstractmethod
    def schedulable(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose learning rates the schedule moves: the student's, then the teacher's."""

    @abstractmethod
    def step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step."""

    def teacher_step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step of the teacher alone, while the student waits; called only where there is a :attr:`teacher`."""
        raise MetaplError(f"{type(self).__name__} has no teacher that could learn while the student waits; use wait=0.")

    @abstractmethod
    def read_outer(self, batch: Any, name: str) -> tuple[Any, Any]:
        """The student's inputs in a labeled batch, which errors call ``name``, and the batch as its loss reads it."""

    @abstractmethod
    def outer_terms(self) -> Sequence[Term]:
        """What the student is validated by, where its metric is the loss: the sum of these."""

    @property
    def classifies(self) -> bool:
        """Whether the losses are known to be of classes, without being asked
        (:func:`metapl.metrics.metric.of_classes`)."""
        return False

    @abstractmethod
    def live_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the copies: the next step changes its tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, except the data and the default generators.

        A snapshot: later steps do not change it, unlike the ``state_dict`` of a PyTorch module or optimizer, which
        shares its tensors. Cost: a copy of the weights and of the optimizers' states on their device.
        """
        return copy.deepcopy(self.live_state())

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def settings(self) -> dict[str, Any]:
        """What else decides a step, as plain values: losses and their weights, precision, clipping. A resumed fit has
        the same."""
        return {}

    def exact_cosine(self, labeled: Any, unlabeled: Any) -> float | None:
        """The cosine between this trainer's teacher gradient and the exact one; None where it has none."""
        return None
