r"""One step of a training as a function of tensors, and that step's adjoint.

With the carry c_k = (θ_k, s_k, buffers), the settings η_k of the optimizer and the teacher's
weights φ, a step is

.. math:: c_{k+1} = f(c_k, \mathrm{signal}_k(\phi), \eta_k), \qquad k = 0, ..., K-1

and the adjoint takes the cotangents of c_{k+1} to those of c_k, signal_k, η_k and φ, from v =
∇L(θ_K) on. It is *one* backward pass of f, in which the Hessian product, the feedback h_k =
−dL/d(signal_k) and the gradient in the settings are found together. As on the eager road, a signal
reads the student's outputs as constants.

Both are the eager step (:class:`metapl.core.step.InnerStep`) on networks that hold these tensors in
the meantime, and are recorded. :mod:`metapl.functional.training` has the loop over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.core.lesson import Lesson
from metapl.core.step import InnerStep
from metapl.engines.recorded import RecordedEngine, UpdateOfState
from metapl.execution import checks
from metapl.execution.batch import Batch
from metapl.execution.layout import Layout
from metapl.execution.numerics import Tree, no_fast_path
from metapl.execution.state import Slots
from metapl.functional.capture import Captured
from metapl.functional.state import Network, as_dict, norm
from metapl.functional.step import Places, with_settings, without_values
from metapl.functional.transforms import is_transformed
from metapl.problems.base import BilevelProblem, Signal
from metapl.updates import Update
from metapl.updates.base import OptimizerState

# The numbers of each param group that are 0-D tensors in the graphs, by name.
Settings = list[dict[str, Any]]


class Carry(NamedTuple):
    """What a step hands to the next.

    Attributes:
        params: θ, the student's trainable parameters.
        optimizer: s, the state of its optimizer by parameter.
        state: the student's buffers and frozen parameters.
        teacher_state: the teacher's.
    """

    params: Tree
    optimizer: OptimizerState
    state: Tree
    teacher_state: Tree


class Cotangents(NamedTuple):
    """dL/dθ and dL/ds of a carry, and dL/dφ by the steps from there on.

    Of M outer losses, with a first dimension M.
    """

    params: Tree
    optimizer: OptimizerState
    teacher: Tree


class StepInputs(NamedTuple):
    """What a step is given besides the carry.

    Attributes:
        batch: the inner batch.
        outer: a row of the outer batch, as the outer loss reads it, which the problem checks
            outputs with.
        settings: η.
        weights: by which the signal's value is multiplied, one for each example of the batch, (B,);
            None: 1 each.
    """

    batch: Batch
    outer: Batch
    settings: Settings
    weights: Tensor | None = None


class Taken(NamedTuple):
    """What a step leaves.

    Attributes:
        carry: after the step, a :class:`Carry`; as a graph's result it is held
            (:class:`metapl.functional.kinds.Held`).
        loss: the mean inner loss.
        signal: the fields of the signal by name.
        findings: what checks have found, boolean scalars by the texts of their errors.
    """

    carry: Any
    loss: Tensor
    signal: dict[str, Any]
    findings: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class TrainingRules:
    """What all steps of a training have in common: networks, losses and the rule, but no tensor.

    Args:
        teacher: None: the problem has none.
        update: U of the student, perhaps behind a clip.
        constants: what its param groups hold besides the settings.
        device: where the tensors are.
        in_settings: whether the gradient in the settings is asked for.
        several: whether the cotangents are those of M outer losses, with a first dimension M.
        autocast: makes the context of the networks' passes.
    """

    teacher: nn.Module | None
    student: nn.Module
    problem: BilevelProblem
    update: Update
    constants: Sequence[dict[str, Any]]
    device: torch.device
    in_settings: bool = False
    several: bool = False
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


class TrainingStep:
    """The step of a training and its adjoint, as functions of tensors.

    The modules' own tensors are not read. Under ``torch.func.vmap`` a recording of the step is
    mapped.
    """

    def __init__(self, rules: TrainingRules, sources: Sequence[object] = ()) -> None:
        self.rules = rules
        self.teacher = Places(rules.teacher, "teacher")
        self.student = Places(rules.student, "student")
        self.recorded = Captured(
            self.taken, rules.device, sources, is_compiled=False, looks_at_modes=True
        )

    def __call__(self, phi: Tree, carry: Carry, inputs: StepInputs) -> Taken:
        """Take the step."""
        if is_transformed():
            return self.recorded.compared(phi, carry, inputs)
        return self.taken(phi, carry, inputs)

    def taken(self, phi: Tree, carry: Carry, inputs: StepInputs) -> Taken:
        """Take the step, outside of any transform."""
        with self._begun(phi, carry, inputs) as begun:
            theta, s = pytree.tree_map_only(Tensor, Tensor.detach, begun.step.updated)
            after = Carry(theta, s, begun.left_of_student(), begun.left_of_teacher())
            signal = as_dict(begun.signal.detached())
            return Taken(after, begun.step.inner_loss, signal, begun.findings())

    def adjoint(
        self, phi: Tree, carry: Carry, inputs: StepInputs, bars: Cotangents
    ) -> tuple[Cotangents, Tree, Settings, Tensor]:
        """Return the cotangents before the step, h = −dL/d(signal), dL/d(settings) and ‖dL/dθ‖.

        Args:
            carry: before the step.
            bars: the cotangents after it.
        """
        settings = inputs.settings
        if self.rules.in_settings:
            settings = as_leaves(settings)
        carry = carry._replace(optimizer=as_leaves(carry.optimizer))
        with self._begun(phi, carry, inputs._replace(settings=settings)) as begun:
            fields = begun.step.signal.differentiable()
            before = (begun.step.params, carry.optimizer, fields, settings)
            pull: Callable[[Any], Any] = partial(
                pulled_back, begun.step.updated, before, begun.signal.differentiable(), begun.phi
            )
            if self.rules.several:
                pull = torch.func.vmap(pull)
            (theta_bar, s_bar, signal_bar, settings_bar), phi_bar = pull(
                (bars.params, bars.optimizer)
            )
        teacher_bar = {name: t + phi_bar[name] for name, t in bars.teacher.items()}
        cotangents = Cotangents(theta_bar, s_bar, teacher=teacher_bar)
        in_settings = settings_bar if self.rules.in_settings else []
        h = {name: -t for name, t in signal_bar.items()}
        return cotangents, h, in_settings, norm(theta_bar)

    @contextmanager
    def _begun(self, phi: Tree, carry: Carry, inputs: StepInputs) -> Iterator[BegunStep]:
        """Take the student's pass up to g, with its graph, while the networks hold the tensors."""
        rules = self.rules
        with (
            without_values() as fault,
            self.teacher.holding(Network(phi, carry.teacher_state)) as left_of_teacher,
            self.student.holding(Network(carry.params, carry.state)) as left_of_student,
            rules.autocast(),
            no_fast_path(math=True),
        ):
            options = with_settings(rules.constants, inputs.settings)
            update = UpdateOfState(rules.update, options, carry.optimizer)
            student = RecordedEngine(
                Layout(rules.student), Slots(rules.student), double_backward=True
            )
            # A problem without a teacher never asks it.
            teacher: Any = rules.teacher
            asked: list[Signal] = []

            def ask(batch: Batch, outputs: Tensor | None) -> Signal:
                signal = rules.problem.signal(teacher, batch, outputs, generator=None)
                if inputs.weights is not None:
                    signal = times(signal, inputs.weights)
                asked.append(signal)
                return signal.detached()

            lesson = Lesson(rules.problem, inputs.batch, inputs.outer, graph="path")
            # θ is what the module holds, so that checkpoints run again at the same leaves.
            student.params = {**student.parameters}
            descent = student.descend(student.params, lesson, ask)
            yield BegunStep(
                step=InnerStep(update, descent, carry.optimizer),
                signal=asked[-1],
                phi={name: p for name, p in self.teacher.parameters() if name in phi},
                left_of_student=left_of_student,
                left_of_teacher=left_of_teacher,
                fault=fault,
            )


class BegunStep(NamedTuple):
    """A step whose gradient g is known.

    Attributes:
        step: U and the pass, whose signal's fields, and whose weights, are leaves.
        signal: with its graph in φ.
        phi: φ as the teacher's leaves.
        left_of_student, left_of_teacher: return what passes have left of buffers.
        fault: what checks have found.
    """

    step: InnerStep
    signal: Signal
    phi: Tree
    left_of_student: Callable[[], Tree]
    left_of_teacher: Callable[[], Tree]
    fault: checks.Fault

    def findings(self) -> dict[str, Tensor]:
        """Return what checks have found, by the texts of their errors."""
        found: dict[str, Tensor] = {}
        for bad, text in self.fault.findings:
            result = checks.result_of(bad)
            found[text] = found[text] | result if text in found else result
        return found


def times(signal: Signal, weights: Tensor) -> Signal:
    """Return a signal whose value about each example is multiplied by a weight of it, (B,)."""
    further_dimensions = [1] * (signal.value.ndim - 1)
    weights = weights.to(signal.value).reshape(-1, *further_dimensions)
    return signal.having({"value": weights * signal.value})


def as_leaves(tensors: Any) -> Any:
    """Return nested tensors as leaves of a graph."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.is_floating_point() or t.is_complex())

    return pytree.tree_map_only(Tensor, leaf, tensors)


def pulled_back(after: Any, before: Any, signal: Tree, phi: Tree, bars: Any) -> tuple[Any, Tree]:
    """Return the cotangents of what a step depends on from those of (θ′, s′), zeros for no graph.

    Args:
        after: θ′ and s′, with their graph.
        before: what they depend on, the third part the signal's fields as leaves.
        signal: these fields with their graph in φ.
        phi: the teacher's leaves.
        bars: the cotangents of ``after``.

    Returns: those of ``before``, and those of φ.
    """
    in_before = gradients(after, before, bars)
    _, _, signal_bar, *_ = in_before
    return in_before, gradients(signal, phi, signal_bar)


def gradients(ends: Any, leaves: Any, cotangents: Any) -> Any:
    """Return the gradient in nested leaves, from the cotangents of ends; zeros without a graph."""
    tensors, structure = pytree.tree_flatten(leaves)
    ends, structure_of_ends = pytree.tree_flatten(ends)
    cotangents = structure_of_ends.flatten_up_to(cotangents)
    pairs = [pair for pair in zip(ends, cotangents, strict=True) if pair[0].requires_grad]
    asked = [t for t in tensors if t.requires_grad]
    found: Iterator[Tensor | None] = iter([None] * len(asked))
    if pairs and asked:
        with_graph, bars = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(with_graph, asked, bars, retain_graph=True, allow_unused=True)
        )
    filled = []
    for t in tensors:
        gradient = next(found) if t.requires_grad else None
        filled.append(torch.zeros_like(t) if gradient is None else gradient)
    return pytree.tree_unflatten(filled, structure)
