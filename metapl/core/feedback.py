"""The feedback on the signal of one student step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metapl.core.step import InnerStep
from metapl.errors import MetaplError
from metapl.execution.checks import unexpected
from metapl.problems.base import Signal, field_name


@dataclass(frozen=True)
class Feedback:
    """The feedback h on a part of the signal.

    Args:
        h: without a graph: in the shape of that part, or a scalar for the whole batch.
        part: ``"value"`` for a differentiable signal, or the first of its
            :meth:`~metapl.Signal.fields` where it is a dict; ``"log_prob"`` for sampled labels, by
            their score; ``"probs"`` for sampled labels whose expectation is taken; None: no
            feedback.
        others: the feedback on the other fields of a differentiable signal, by name: of its dict,
            and those besides the value that the inner loss depends on.
        used: whether the inner loss of this step depends on the signal. Where that was not looked
            at, as without feedback, it is True, so that no step is refused for it.
        mean_over: the number of examples by which the sum over the signal is divided: B in all
            processes for the mean of Algorithm 1, 1 for a sum.
        numbers: what reports and results have of the estimator besides h, scalars by name.
    """

    h: Tensor
    part: str | None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    used: bool = True
    mean_over: int = 1
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    def by_field(self) -> dict[str, Tensor]:
        """Return h on each field of the signal by the field's name; empty for no feedback."""
        if self.part is None:
            return {}
        return {self.part: self.h, **self.others}

    def on_value(self, value: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Return h as the signal's value is: a tensor, or a dict of its floating-point tensors."""
        if self.part is None or not isinstance(value, dict):
            return self.h
        by_field = self.by_field()
        on_keys = {}
        for key in value:
            if field_name(key) in by_field:
                on_keys[key] = by_field[field_name(key)]
        return on_keys

    def teacher_loss(self, signal: Signal) -> Tensor:
        """Return −Σ h·signal, or with ``mean_over`` its mean, a scalar with the signal's graph.

        The gradient of the sum is the hypergradient dL(θ′)/dθ_T, because h already contains the 1/B
        of the inner loss.

        Raises: :class:`metapl.MetaplError` for a signal without the teacher's graph.
        """
        if self.part is None:
            return self.h.new_zeros(())
        fields = signal.fields()
        terms = []
        for name, h in self.by_field().items():
            field = fields[name]
            if h.ndim and h.shape != field.shape:
                raise unexpected(f"h of the signal's {name!r} is", h, f"{tuple(field.shape)}")
            terms.append((-h * field).sum())
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        if not total.requires_grad and torch.is_grad_enabled():
            raise MetaplError(
                f"the signal ({self.part}) has no graph; expected one; or mode 'none'."
            )
        return total if self.mean_over == 1 else total / self.mean_over

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Feedback:
        """Return the same with h, and that on other fields, changed.

        Args:
            change: of a field's name, and of h on that field.
        """
        others = {name: change(name, h) for name, h in self.others.items()}
        return replace(self, h=change(self.part or "", self.h), others=others)

    def divided_by(self, divisor: Tensor | float) -> Feedback:
        """Return the same over a number, such as that of :func:`divisor`."""
        if isinstance(divisor, float) and divisor == 1.0:
            return self
        return self.mapped(lambda name, h: h / divisor)

    def chunks(self, parts: int) -> list[Feedback]:
        """Return the feedback on each of so many micro-batches."""
        if self.h.ndim == 0 or parts == 1:
            return [self] * parts
        h_by_part = self.h.chunk(parts)
        others_by_part = {name: h.chunk(parts) for name, h in self.others.items()}
        pieces = []
        for i in range(parts):
            others = {name: chunks[i] for name, chunks in others_by_part.items()}
            pieces.append(replace(self, h=h_by_part[i], others=others))
        return pieces

    def of_batch(self, step: InnerStep) -> Tensor | dict[str, Tensor]:
        """Return h on the whole batch, as the signal's value is.

        On a field without rows it is the sum over micro-batches, each of which has a signal of its
        own.
        """
        parts = step.descent.parts
        if parts == 1:
            return self.on_value(step.signal.value)

        def joined(name: str, h: Tensor) -> Tensor:
            if h.ndim == 0 or step.has_rows(name):
                return h
            # The h of the micro-batches stand one after the other along dimension 0.
            h_by_part = h.reshape(parts, -1, *h.shape[1:])
            return h_by_part.sum(0)

        return self.mapped(joined).on_value(step.signal.value)
