r"""The inner step: the student moves θ → θ′ = U(θ, g) on the signal, and answers what an estimator may ask of it.

.. math:: g = \nabla_\theta \tfrac1B \sum_i \ell_i(S(x_u;\theta), \mathrm{signal}), \quad
          v = \nabla L(\theta'), \quad w = (\partial U/\partial g)^\top v, \quad
          \dot z = \tfrac{d}{d\varepsilon} S(x_u;\theta + \varepsilon w)

Estimators use this facade and nothing else, so where the student runs is this file's affair alone. While an estimate is
under way the student stays at θ: θ′, θ + εw and dual numbers go in through ``functional_call``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from metapl import checks
from metapl.compiled import uncompiled
from metapl.errors import MetaplError
from metapl.numerics import Tree, full_float32, reduced_float32, wide, wide_tree
from metapl.optimizers import InnerOptimizer
from metapl.problem import BilevelProblem, Signal, first_input, student_input
from metapl.replay import RandomState, call_at, frozen_statistics, loose_buffers, replayed


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module learns, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class InnerStep:
    """One step of the student, from its forward pass to θ′.

    Building it runs S(x_u; θ), the one pass that updates running statistics and advances the random number generators;
    :meth:`learn` then takes the gradient on the signal. Nothing moves before :meth:`commit`.

    Args:
        student: in the mode (train or eval) that its owner left it in.
        optimizer: the functional view of its optimiser.
        problem: the losses.
        labeled, unlabeled: the batches of the outer and of the inner loss.
        keep_graph: keep g differentiable in the signal, for :meth:`outer_loss_of_signal`.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: InnerOptimizer,
        problem: BilevelProblem,
        *,
        labeled: Any,
        unlabeled: Any,
        keep_graph: bool = False,
    ) -> None:
        self.student, self.optimizer, self.problem = student, optimizer, problem
        self.labeled, self.unlabeled = labeled, unlabeled
        self.input = student_input(problem, unlabeled)
        self.parameters = trainable(student)
        self.device = next(iter(self.parameters.values())).device
        self.params: Tree = {name: p.detach() for name, p in self.parameters.items()}
        self.random_before = RandomState.now(self.device)
        self.keep_graph = keep_graph
        with torch.enable_grad(), only_math_attention() if keep_graph else nullcontext():
            self._graph: Tensor | None = wide(checks.logits(student(self.input), "student"))
        self.random_after = RandomState.now(self.device)
        self.outputs = self._graph.detach()
        checks.fits(problem, self.outputs, labeled, unlabeled)
        self._outer_losses: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------------------ the step itself

    def learn(self, signal: Signal) -> None:
        """g = ∇_θ mean_i ℓ_i(S(x_u; θ), signal); the student's graph is gone afterwards."""
        self.signal = signal.detached()
        if self.keep_graph:
            self.signal.value.requires_grad_()
        if self._graph is None:
            raise RuntimeError("an inner step learns once")
        with torch.enable_grad():
            losses = self.problem.inner_loss(self._graph, self.signal, self.unlabeled, self.parameters)
            if losses.shape != self.outputs.shape[:1]:
                raise MetaplError(
                    f"inner_loss returned shape {tuple(losses.shape)} for a batch of {len(self.outputs)}; expected one "
                    f"loss per example, ({len(self.outputs)},): leave the mean to metapl."
                )
            loss = losses.mean()
        grads = torch.autograd.grad(
            loss, list(self.parameters.values()), create_graph=self.keep_graph, allow_unused=True
        )
        self.inner_loss = loss.detach()
        self._graph = None
        self._grads = {n: g for n, g in zip(self.parameters, grads, strict=True) if g is not None}
        self.gradient: Tree = {name: g.detach() for name, g in self._grads.items()}
        self.state = self.optimizer.read_state()

    @cached_property
    def _moved(self) -> tuple[Tree, Any]:
        return self.optimizer.update(self.params, self.gradient, self.state)

    @property
    def new_params(self) -> Tree:
        """θ′ = U(θ, g)."""
        return self._moved[0]

    @property
    def new_state(self) -> Any:
        """The optimiser's state after the step."""
        return self._moved[1]

    def commit(self) -> None:
        """Move the student to θ′, by the real optimiser."""
        self.optimizer.commit(self.parameters, self.gradient, self.new_params, self.new_state)

    # ------------------------------------------------------------------------------- what estimators may ask for

    @property
    def learning_rate(self) -> float | None:
        """η, where the optimiser tells it."""
        return self.optimizer.learning_rate

    @property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph; one forward pass if no estimator asked before."""
        return self._outer_loss("after", self.new_params)

    @property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass."""
        return self._outer_loss("before", self.params)

    def known_outer_loss(self) -> dict[str, Tensor]:
        """``{"outer_loss": L(θ′)}`` where an estimator has computed it, else nothing."""
        return {"outer_loss": self._outer_losses["after"]} if "after" in self._outer_losses else {}

    def outer_gradient(self) -> Tree:
        """v = ∇L(θ′), one forward and backward pass on the labelled batch (with its own batch statistics)."""
        at = {name: p.detach().requires_grad_() for name, p in self.new_params.items()}
        loss = self._loss_at(at)
        self._outer_losses["after"] = loss.detach()
        v = torch.autograd.grad(loss, list(at.values()), materialize_grads=True)
        return dict(zip(at, v, strict=True))

    def pullback(self, v: Tree) -> Tree:
        """w = (∂U/∂g)ᵀ v through the optimiser's update at its state before the step."""
        return self.optimizer.pullback(self.params, self.gradient, self.state, v)

    def directional_derivative(self, w: Tree) -> Tensor:
        """ż = d/dε S(x_u; θ + εw) by forward-mode AD, (B, C): exact, one pass of about three plain ones, no graph."""
        _load_forward_mode()
        with (
            self._again(),
            torch.no_grad(),
            uncompiled(),
            forward_ad.dual_level(),
            only_math_attention(),
            explained("forward"),
        ):
            duals = {name: forward_ad.make_dual(p, w[name]) for name, p in self.params.items() if name in w}
            outputs = wide(self._call({**self.params, **duals}, self.input))
            tangent = forward_ad.unpack_dual(outputs).tangent
            return torch.zeros_like(self.outputs) if tangent is None else tangent.clone()

    def outputs_at(self, step: Tensor, direction: Tree) -> Tensor:
        """S(x_u; θ + step·direction), (B, C), in float32 or wider, without autocast and TF32; the weights stay at θ."""
        moved = {n: wide(p) + step * wide(direction[n]) if n in direction else wide(p) for n, p in self.params.items()}
        autocast = torch.autocast(self.device.type, enabled=False)
        with self._again(), torch.no_grad(), autocast, full_float32(self.device):
            return self._call(moved, wide_tree(self.input), upcast=True)

    def ran_in_full_precision(self) -> bool:
        """Whether the inner pass computed in float32 or wider throughout, as far as weights and settings tell."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.params.values())
        rounded = any(p.dtype == torch.float32 for p in self.params.values()) and reduced_float32(self.device)
        return not (half or rounded or torch.is_autocast_enabled(self.device.type))

    def outer_loss_of_signal(self) -> Tensor:
        """L(θ′) with its graph through g back to the signal: what double backward differentiates."""
        with torch.enable_grad(), only_math_attention():
            new_params, _ = self.optimizer.update(self.params, self._grads, self.state)
            loss = self._loss_at(new_params)
        self._outer_losses["after"] = loss.detach()
        return loss

    def signal_feedback(self, z_dot: Tensor, w: Tree, value: Tensor | None = None) -> Tensor:
        """h = −∂/∂signal d/dε mean ℓ(z + εż, signal, θ + εw), of the shape of the signal; touches the head alone.

        ``value`` stands in for the signal's own, e.g. one-hot rows for sampled classes.
        """
        value = (self.signal.value if value is None else value).detach().requires_grad_()
        losses, at = self._head(replace(self.signal, value=value))
        tangent = _along(losses.mean(), at, self._tangents(z_dot, w))
        if not tangent.requires_grad:
            return torch.zeros_like(value)
        return -torch.autograd.grad(tangent, value, materialize_grads=True)[0]

    def example_feedback(self, z_dot: Tensor, w: Tree) -> Tensor:
        """h_i = −(1/B) d/dε ℓ_i(z + εż, signal, θ + εw), (B,); touches the head alone."""
        losses, at = self._head(self.signal)
        # ⟨u, d/dε ℓ⟩ is linear in u, so its gradient is d/dε ℓ itself: forward mode by two reverse passes.
        u = torch.ones_like(losses, requires_grad=True)
        tangent = _along((u * losses).sum(), at, self._tangents(z_dot, w))
        return -torch.autograd.grad(tangent, u, materialize_grads=True)[0] / len(losses)

    # ---------------------------------------------------------------------------------------------------- plumbing

    def _call(self, params: Tree, inputs: Any, *, upcast: bool = False) -> Tensor:
        """The student at other weights; running statistics are left alone."""
        tensors = {**params, **loose_buffers(self.student)}
        if upcast:
            frozen = {n: p.detach() for n, p in self.student.named_parameters() if n not in params}
            guarded = {n: b for n, b in self.student.named_buffers() if n not in tensors}
            tensors = {n: wide_tree(t) for n, t in {**frozen, **guarded, **tensors}.items()}
        with frozen_statistics(self.student):
            outputs: Tensor = call_at(self.student, tensors, inputs)
        return outputs

    @contextmanager
    def _again(self) -> Iterator[None]:
        """The inner pass once more: the same dropout masks."""
        with replayed(self.random_before):
            yield

    def _loss_at(self, params: Tree) -> Tensor:
        """L at other weights, on draws of its own that leave the generators where they were."""
        with replayed(self.random_after), torch.enable_grad():
            outputs = wide(self._call(params, first_input(self.labeled)))
            loss = self.problem.outer_loss(outputs, self.labeled)
            checks.scalar_loss(loss, "the problem's outer_loss")
            return loss

    def _outer_loss(self, when: str, params: Tree) -> Tensor:
        if when not in self._outer_losses:
            with torch.no_grad():
                self._outer_losses[when] = self._loss_at({n: p.detach() for n, p in params.items()}).detach()
        return self._outer_losses[when]

    def _head(self, signal: Signal) -> tuple[Tensor, list[Tensor]]:
        """ℓ (B,) as a function of z and θ, both leaves."""
        z = self.outputs.clone().requires_grad_()
        theta = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        with torch.enable_grad():
            return self.problem.inner_loss(z, signal, self.unlabeled, theta), [z, *theta.values()]

    def _tangents(self, z_dot: Tensor, w: Tree) -> list[Tensor]:
        return [z_dot, *(w[name] if name in w else torch.zeros_like(p) for name, p in self.params.items())]


def _along(scalar: Tensor, at: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """⟨∂scalar/∂at, tangents⟩, differentiable."""
    grads = torch.autograd.grad(scalar, at, create_graph=True, allow_unused=True)
    terms = [(g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None]
    return torch.stack(terms).sum()


@cache
def _load_forward_mode() -> None:
    """Make the first dual number here, where PyTorch's own deprecation warning on loading its rules is silenced."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):  # the second from older releases
            warnings.simplefilter("ignore", category)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def only_math_attention() -> Iterator[None]:
    """Attention by plain products: the fused kernels know neither forward mode nor a second derivative."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


_NO_DERIVATIVE = re.compile(
    r"forward[- ](mode )?AD|jvp function|differentiate twice|double backward|derivative for",
    re.IGNORECASE,
)
_OPERATION = re.compile(r"(?:forward AD with|derivative for) '?([\w:.]+)'?")


@contextmanager
def explained(mode: str) -> Iterator[None]:
    """Turn autograd's refusal of an operation into an error that names it and the mode that can."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not _NO_DERIVATIVE.search(str(error)):
            raise
        found = _OPERATION.search(str(error))
        operation = found.group(1) if found else "one of its operations"
        raise MetaplError(
            f"mode '{mode}' cannot run on this student: {operation} has no derivative of the kind it needs "
            f'({str(error).splitlines()[0]}). Use mode="difference" or one of the sampled modes "reinforce" and '
            '"loss_difference", which need plain passes only.'
        ) from error
