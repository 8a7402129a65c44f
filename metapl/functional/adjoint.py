r"""One step of a training as a pure function, and that step's adjoint.

With the carry c_k = (θ_k, s_k, buffers), the settings η_k of the optimizer and the teacher's
weights φ, a step is

.. math:: c_{k+1} = f(c_k, \mathrm{signal}_k(\phi), \eta_k), \qquad k = 0, ..., K-1

and the adjoint takes the cotangents of c_{k+1} to those of c_k, signal_k, η_k and φ, from v =
∇L(θ_K) on. It is *one* pullback of f, in which the Hessian product, the feedback h_k =
−dL/d(signal_k) and the gradient in the settings are found together. As on the eager road, a signal
reads the student's outputs as constants.

:mod:`metapl.functional.training` has the loop over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metapl.execution.batch import Batch
from metapl.execution.numerics import Tree
from metapl.functional.state import Function, as_dict, norm
from metapl.problems.base import BilevelProblem, Signal, enters_input
from metapl.updates import Update
from metapl.updates.base import OptimizerState

vjp: Any = torch.func.vjp
grad_and_value = torch.func.grad_and_value
vmap = torch.func.vmap
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


class StepFunction(Protocol):
    """A step of a training, c_{k+1} = f(c_k, signal_k(φ), η_k)."""

    def __call__(
        self, phi: Tree, carry: Carry, batch: Batch, settings: Settings, /
    ) -> tuple[Carry, Tensor, dict[str, Any]]:
        """Return the carry after the step, the mean loss, and the fields of the signal by name."""


class AdjointFunction(Protocol):
    """The adjoint of a step."""

    def __call__(
        self,
        phi: Tree,
        carry: Carry,
        batch: Batch,
        settings: Settings,
        bars: Cotangents,
        nudge: Tree,
        /,
    ) -> tuple[Cotangents, Tree, Settings | None, Tensor]:
        """Return the cotangents before the step, dL/d(signal), dL/d(settings) and ‖dL/dθ‖.

        Args:
            carry: before the step.
            bars: the cotangents after it.
            nudge: zeros, by the names of the signal's differentiable fields.
        """


def make_training(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: BilevelProblem,
    update: Update,
    constants: Sequence[dict[str, Any]],
    *,
    in_settings: bool = False,
    several: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[StepFunction, AdjointFunction]:
    """Return the step of a training and its adjoint.

    Args:
        update: U of the student, perhaps behind a clip.
        constants: what its param groups hold besides the settings.
        in_settings: whether the gradient in the settings is asked for.
        several: whether the cotangents are those of M outer losses, with a first dimension M.
        autocast: the context in which the passes are taken.
    """
    T = Function(teacher, "teacher")
    S = Function(student)
    signal_enters_input = enters_input(problem)

    def next_step(
        carry: Carry,
        batch: Batch,
        theta: Tree,
        s: OptimizerState,
        phi: Tree,
        nudge: Tree,
        settings: Settings,
    ) -> tuple[tuple[Tree, OptimizerState], Any]:
        """Return (θ′, s′) as a function of all that a gradient may be in.

        Beside it: the student's state, the teacher's, the loss and the signal.
        """

        def student_outputs(theta: Tree, *entering: Signal) -> tuple[Tensor, Tree]:
            return S.outputs(theta, carry.state, problem.student_input(batch, *entering))

        def mean_loss(z: Tensor, theta: Tree) -> Tensor:
            # A loss may read ``student.parameters()``, so it is called while these weights are in
            # the student.
            losses_B, _ = S.at(
                theta, state, lambda network: problem.inner_loss(z, signal, batch, theta)
            )
            mean: Tensor = losses_B.mean()
            return mean

        if signal_enters_input:
            signal, teacher_state = signal_of(
                T, problem, phi=phi, carry=carry, batch=batch, z=None, nudge=nudge
            )
            z, pull, state = vjp(lambda theta: student_outputs(theta, signal), theta, has_aux=True)
        else:
            z, pull, state = vjp(student_outputs, theta, has_aux=True)
            signal, teacher_state = signal_of(
                T, problem, phi=phi, carry=carry, batch=batch, z=z.detach(), nudge=nudge
            )
        # g = ∇_θ (1/B) Σ ℓ_i, through the outputs and in what the loss reads of θ itself.
        (in_outputs, in_weights), loss = grad_and_value(mean_loss, (0, 1))(z, theta)
        (through_outputs,) = pull(in_outputs)
        g = {name: t + in_weights[name] for name, t in through_outputs.items()}
        pairs = zip(constants, settings, strict=True)
        options = [{**constant_options, **numbers} for constant_options, numbers in pairs]
        after = update.update(theta, g, s, options)
        return after, (state, teacher_state, loss.detach(), as_dict(signal.detached()))

    def step(
        phi: Tree, carry: Carry, batch: Batch, settings: Settings
    ) -> tuple[Carry, Tensor, dict[str, Any]]:
        # Fused attention has no second derivative, and the adjoint has to take the same steps.
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            after, others = next_step(
                carry, batch, carry.params, carry.optimizer, phi, {}, settings
            )
        state, teacher_state, loss, signal = others
        return Carry(*after, state, teacher_state), loss, signal

    def adjoint(
        phi: Tree, carry: Carry, batch: Batch, settings: Settings, bars: Cotangents, nudge: Tree
    ) -> tuple[Cotangents, Tree, Settings | None, Tensor]:
        variables = (settings,) if in_settings else ()
        constant = () if in_settings else (settings,)

        def after_step(*point: Any) -> Any:
            return next_step(carry, batch, *point, *constant)

        with autocast(), sdpa_kernel(SDPBackend.MATH):
            _, pull, _ = vjp(
                after_step, carry.params, carry.optimizer, phi, nudge, *variables, has_aux=True
            )
            if several:
                pull = vmap(pull)
            theta_bar, s_bar, phi_bar, signal_bar, *settings_bar = pull(
                (bars.params, bars.optimizer)
            )
        teacher_bar = {name: t + phi_bar[name] for name, t in bars.teacher.items()}
        cotangents = Cotangents(theta_bar, s_bar, teacher=teacher_bar)
        return cotangents, signal_bar, settings_bar[0] if in_settings else None, norm(theta_bar)

    return step, adjoint


def signal_of(
    T: Function,
    problem: BilevelProblem,
    *,
    phi: Tree,
    carry: Carry,
    batch: Batch,
    z: Tensor | None,
    nudge: Tree,
) -> tuple[Signal, Tree]:
    """Return the signal about a batch with ``nudge`` added to its fields, and the teacher's state.

    The nudge is 0. It is where the adjoint takes the derivative in the signal.

    Args:
        z: the student's outputs, (B, ...), as constants; None where the signal enters its input.
    """
    signal: Signal
    signal, teacher_state = T.at(
        phi,
        carry.teacher_state,
        lambda network: problem.signal(network, batch, z, generator=None),
    )
    fields = {name: t + nudge[name] for name, t in signal.differentiable().items() if name in nudge}
    return signal.having(fields), teacher_state
