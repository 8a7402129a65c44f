"""Micro-batches: a pass as the mean of passes on equal parts of its batch.

It is a :class:`metapl.core.engine.Descent` on the whole batch, in the memory of one part at a time.
Who asks it need not know of parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from metapl.core.engine import Derivatives, Descent, Engine
from metapl.core.lesson import Ask, Lesson
from metapl.execution.batch import Batch, joined, micro_batches
from metapl.execution.numerics import Tree, TreeSum, mean_of_scalars
from metapl.problems.base import Signal, joined_signals


class Part(Descent, Protocol):
    """A pass on one micro-batch, whose loss is taken when it has run."""

    def learn(self, signal: Signal) -> None:
        """Take the loss on a signal, and its gradient."""

    def again(self, signal: Signal) -> Part:
        """Return the same pass on another signal."""


# Runs the student on a lesson at given weights; the signal is given where it was asked for first.
Run = Callable[[Tree, Lesson, Signal | None], Part]


class AccumulatedDescent:
    """The passes on the micro-batches of a lesson.

    Args:
        student: whose passes they are.
        params: θ.
        lesson: what the student is taught.
        ask: asks the teacher about a micro-batch.
        run: runs the student on the lesson of a micro-batch.

    Attributes:
        passes: one for each micro-batch.
    """

    def __init__(
        self, student: Engine, params: Tree, lesson: Lesson, *, ask: Ask, run: Run
    ) -> None:
        self.student = student
        self.lesson = lesson
        self.parts = student.parts
        self.passes: list[Part] = []
        lessons = lesson.chunks(self.parts)
        signals: list[Signal] = []
        if lesson.asks_first:
            asked = [lesson] if lesson.problem.signal_of_batch else lessons
            answers = [ask(part.batch, None) for part in asked]
            self.signal = lesson.heard(joined_signals(answers))
            signals = self.signal.chunks(self.parts)
        gradients = TreeSum()
        is_path = lesson.graph == "path"
        for i, part in enumerate(lessons):
            inner_pass = run(params, part, signals[i] if lesson.asks_first else None)
            self.passes.append(inner_pass)
            if not lesson.asks_first:
                signals.append(ask(part.batch, inner_pass.outputs))
            if not is_path:
                # At once, so that there is one graph at a time.
                inner_pass.learn(signals[i])
                gradients.add(inner_pass.gradient)
                inner_pass.gradient = {}
        if not lesson.asks_first:
            self.signal = lesson.heard(joined_signals(signals))
        if is_path:
            # By parts of the leaf that the path is differentiated in.
            for inner_pass, signal in zip(self.passes, self.signal.chunks(self.parts), strict=True):
                inner_pass.learn(signal)
                gradients.add(inner_pass.gradient)
        self.params = params
        self.gradient = gradients.mean()
        self.inner_loss = mean_of_scalars([part.inner_loss for part in self.passes])
        self.random_state_after = self.passes[-1].random_state_after

    @property
    def outputs(self) -> Tensor:
        """z, (B, ...), of all micro-batches."""
        return joined([inner_pass.outputs for inner_pass in self.passes])

    @property
    def rounded_to(self) -> torch.dtype:
        return self.passes[0].rounded_to

    def mean_loss(self, outputs: Tensor, params: Tree, leaves: Tree) -> Tensor:
        # A loss may look at the batch as a whole, so it is given the micro-batches of the passes.
        leaves_of_parts = self._chunks(leaves)
        losses = []
        for part, z, leaves_of_part in zip(
            self.passes, outputs.chunk(self.parts), leaves_of_parts, strict=True
        ):
            losses.append(part.mean_loss(z, params, leaves_of_part))
        return mean_of_scalars(losses)

    def _chunks(self, fields: Mapping[str, Tensor]) -> list[Tree]:
        """Return the parts of fields of the signal for each micro-batch."""
        chunks = {name: t.chunk(self.parts) for name, t in fields.items()}
        return [{name: pieces[i] for name, pieces in chunks.items()} for i in range(self.parts)]

    def again(self, signal: Signal) -> AccumulatedDescent:
        again = copy.copy(self)
        again.signal = signal
        signals = signal.chunks(self.parts)
        again.passes = [part.again(s) for part, s in zip(self.passes, signals, strict=True)]
        again.inner_loss = mean_of_scalars([part.inner_loss for part in again.passes])
        again.gradient = TreeSum([part.gradient for part in again.passes]).mean()
        return again

    def along_kept_graph(self, w: Tree, *, curved: bool = False) -> tuple[Tree, Derivatives] | None:
        products = TreeSum()
        derivatives: list[Derivatives] = []
        for part in self.passes:
            by_kept_graph = part.along_kept_graph(w, curved=curved)
            if by_kept_graph is None:
                return None
            product, of_part = by_kept_graph
            products.add(product)
            derivatives.append(of_part)
        return products.mean(), self._joined_derivatives(derivatives)

    def _joined_derivatives(self, by_part: list[Derivatives]) -> Derivatives:
        """Return the derivatives of the mean over all rows, from those of the micro-batches'."""
        derivatives: Derivatives = {}
        for name in by_part[0]:
            pieces = [of_part[name] for of_part in by_part]
            present = [t / self.parts for t in pieces if t is not None]
            derivatives[name] = joined(present) if present else None
        return derivatives

    def forget(self, *, batch_too: bool) -> None:
        self.params = {}
        self.gradient = {}
        for part in self.passes:
            part.forget(batch_too=batch_too)
        if self.passes[0].lesson.batch is None:
            self.lesson = replace(self.lesson, batch=None)

    def recompute(self, params: Tree, batch: Batch = None) -> None:
        self.params = params
        batches = [None] * self.parts
        if batch is not None:
            self.lesson = replace(self.lesson, batch=batch)
            batches = micro_batches(batch, self.parts, "inner")
        gradients = TreeSum()
        for part, batch_of_part in zip(self.passes, batches, strict=True):
            part.recompute(params, batch_of_part)
            gradients.add(part.gradient)
            part.gradient = {}
        self.gradient = gradients.mean()

    def tangent(self, w: Tree) -> Tensor:
        return joined([part.tangent(w) for part in self.passes])

    def shifted(self, step: Tensor, direction: Tree) -> Tensor:
        return joined([part.shifted(step, direction) for part in self.passes])

    def check_shifted(self, ahead: Tensor, behind: Tensor) -> None:
        for part, one, other in zip(
            self.passes, ahead.chunk(self.parts), behind.chunk(self.parts), strict=True
        ):
            part.check_shifted(one, other)

    @contextmanager
    def hessian(self) -> Iterator[Callable[[Tree], Tree]]:
        with ExitStack() as stack:
            products = [stack.enter_context(part.hessian()) for part in self.passes]

            def hessian_product(w: Tree) -> Tree:
                in_weights = TreeSum()
                for product in products:
                    in_weights.add(product(w))
                return in_weights.mean()

            yield hessian_product

    def second_derivatives(
        self, w: Tree, fields: Mapping[str, Tensor], *, curved: bool, with_slope: bool = False
    ) -> tuple[Tree, Derivatives, Tensor | None]:
        products = TreeSum()
        derivatives: list[Derivatives] = []
        slopes: list[Tensor] = []
        for part, fields_of_part in zip(self.passes, self._chunks(fields), strict=True):
            product, of_part, slope = part.second_derivatives(
                w, fields_of_part, curved=curved, with_slope=with_slope
            )
            products.add(product)
            derivatives.append(of_part)
            if slope is not None:
                slopes.append(slope)
        slope = mean_of_scalars(slopes) if slopes else None
        return products.mean(), self._joined_derivatives(derivatives), slope
