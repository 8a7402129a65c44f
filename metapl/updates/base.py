r"""The student's update θ′ = U(θ, g, s): a pure function of weights, gradient, optimizer state.

Estimators need an update that can be differentiated, and computed without moving the weights;
optimizers offer neither. The adjoint of one step maps the cotangents of θ′ and s′ to the cotangents
of g, θ and s:

.. math:: (w, \bar\theta, \bar s)
          = \Big(\frac{\partial (U, s')}{\partial (g, \theta, s)}\Big)^{\!\top}
          (\bar\theta', \bar s')

For a look-ahead of one step, w = (∂U/∂g)ᵀ v with v = ∇L(θ′) is enough.

The rules are recorded too. Then the settings of the param groups come in as ``options``, whose
numbers are 0-D tensors, and the step counter is a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.numerics import WHOLE, Space, Tree

Parameters = Mapping[str, nn.Parameter]

OptimizerState = Any
"""The state of an optimizer, as a pytree of tensors.

That of ``torch.optim`` is a dict by parameter and entry, that of a transform has the transform's
own structure. A cotangent of it has the same structure, with None for entries that have none.
"""

# The options of every param group, in the optimizer's order, without the parameters.
Options = Sequence[Mapping[str, Any]]


class Cotangents(NamedTuple):
    """The result of :meth:`Update.vjp`.

    Attributes:
        gradient: w, the cotangent of g, for the parameters that have a gradient.
        params: the cotangent of θ.
        state: the cotangent of s, in the structure of s, with None for entries that have none.
    """

    gradient: Tree
    params: Tree
    state: OptimizerState


def cotangents_of(
    state: Mapping[str, Mapping[str, Any]], of_next: OptimizerState
) -> tuple[OptimizerState, OptimizerState]:
    """Return the cotangents of the next state, and those of this state before the step's own terms.

    Both are by parameter and entry, as the state of ``torch.optim`` is, with None for missing ones.
    The second is right as it is for every entry that the step leaves unchanged.

    Args:
        of_next: the cotangents of the next state; None where there are none at all.
    """
    next_cotangents = of_next or {name: {} for name in state}
    cotangents: dict[str, dict[str, Any]] = {}
    for name, entries in state.items():
        cotangents[name] = {key: next_cotangents[name].get(key) for key in entries}
    return next_cotangents, cotangents


class Update(ABC):
    """The update of one optimizer; trees are dictionaries by parameter name.

    Parameters that the inner loss does not depend on are missing in ``grads``, and do not move.

    Attributes:
        numbers: names of the options of a param group that are numbers. A recorded step takes these
            as tensors.
        parameters: the student's trainable parameters, as :meth:`follow` was last given them.
        is_rounded: whether the optimizer's own step rounds its products to a shorter type than the
            rule, which is what is differentiated.
    """

    numbers: tuple[str, ...] = ()
    parameters: dict[str, nn.Parameter]
    is_rounded: bool = False

    @property
    def options(self) -> Options:
        """The param groups' options, without their parameters."""
        return []

    @property
    def learning_rate(self) -> float | None:
        """η of the first param group, for feedback in units of it.

        None if the optimizer does not expose it.
        """
        return None

    @abstractmethod
    def follow(self, parameters: Parameters) -> None:
        """Update the set of the student's trainable parameters.

        Refuse parameters that the optimizer does not hold.
        """

    @abstractmethod
    def read_state(self) -> OptimizerState:
        """Return the current state, for :meth:`update`; reading it changes nothing."""

    def state_bytes(self) -> int:
        """Return the memory in bytes that the state takes after a step."""
        leaves = pytree.tree_leaves(self.read_state())
        return sum(t.nbytes for t in leaves if isinstance(t, Tensor))

    @abstractmethod
    def update(
        self, params: Tree, grads: Tree, state: OptimizerState, options: Options | None = None
    ) -> tuple[Tree, OptimizerState]:
        """Return θ′ and s′, differentiable in all arguments.

        Args:
            options: take the place of the options of the param groups.
        """

    def stepped(
        self, params: Tree, grads: Tree, state: OptimizerState
    ) -> tuple[Tree, OptimizerState]:
        """Return θ′ and s′ to the last bit as :meth:`commit` would have them, without a graph."""
        return self.update(params, grads, state=state)

    def with_options(self, options: Options) -> Update:
        """Return the same update with other options, such as the learning rates of a later step."""
        raise MetaplError("settings was given with a TorchOpt transform; expected torch.optim's.")

    def pullback(
        self,
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        v: Tree,
        options: Options | None = None,
    ) -> Tree:
        """Return w = (∂U/∂g)ᵀ v.

        Cost: the update and its backward pass, a few operations per weight.
        """

        def stepped_along_v(gradients: Tree) -> Tree:
            theta, _ = self.update(params, gradients, state=state, options=options)
            return {name: theta[name] for name in v}

        vjp: Any = torch.func.vjp
        detached = {name: g.detach() for name, g in grads.items()}
        _, pull = vjp(stepped_along_v, detached)
        w: Tree = pull(v)[0]
        return w

    def vjp(
        self,
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        v: Tree,
        state_cotangent: OptimizerState = None,
    ) -> Cotangents:
        """Return the adjoint of the whole step, by autograd.

        Args:
            v: the cotangent of θ′.
            state_cotangent: the cotangent of s′; None: zero.
        """
        leaves, structure = pytree.tree_flatten(state)
        float_leaves: dict[int, Tensor] = {}
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                float_leaves[index] = leaf

        grads_in = _with_graph(grads)
        params_in = _with_graph(params)
        floats_in = _with_graph(float_leaves)
        with torch.enable_grad():
            state_leaves = [floats_in.get(index, leaf) for index, leaf in enumerate(leaves)]
            state_in = pytree.tree_unflatten(state_leaves, structure)
            new_params, new_state = self.update(params_in, grads_in, state=state_in)

        # What the step returns, each with its cotangent. Only what depends on an input counts.
        results: list[Any] = [(new_params[name], cotangent) for name, cotangent in v.items()]
        if state_cotangent is not None:
            new_leaves = pytree.tree_leaves(new_state)
            results += zip(new_leaves, pytree.tree_leaves(state_cotangent), strict=True)
        results = [(t, bar) for t, bar in results if bar is not None and t.requires_grad]
        outputs, output_cotangents = zip(*results, strict=True)

        inputs = [*grads_in.values(), *params_in.values(), *floats_in.values()]
        cotangents = iter(
            torch.autograd.grad(outputs, inputs, output_cotangents, materialize_grads=True)
        )
        of_grads = {name: next(cotangents) for name in grads_in}
        of_params = {name: next(cotangents) for name in params_in}
        of_floats = {index: next(cotangents) for index in floats_in}
        of_leaves = [of_floats.get(index) for index in range(len(leaves))]
        return Cotangents(of_grads, of_params, state=pytree.tree_unflatten(of_leaves, structure))

    def settings_in(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the settings of these names that each param group has, as they are."""
        return [{name: group[name] for name in names if name in group} for group in self.options]

    def setting_cotangents(
        self,
        names: Sequence[str],
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        v: Tree,
        state_cotangent: OptimizerState = None,
    ) -> list[dict[str, Any]]:
        """Return the cotangents of settings, by param group, from those of θ′ and s′.

        Args:
            names: of the settings, such as ``"lr"``.
            v: the cotangent of θ′.
            state_cotangent: the cotangent of s′; None: zero.
        """
        groups = self.options
        state_bars: dict[int, Any] = {}
        if state_cotangent is not None:
            for index, bar in enumerate(pytree.tree_leaves(state_cotangent)):
                if bar is not None:
                    state_bars[index] = bar
        device = next(iter(params.values())).device

        def as_double(number: Any) -> Tensor:
            return torch.as_tensor(number, dtype=torch.float64, device=device)

        def step_by_settings(settings: Any) -> tuple[Tree, dict[int, Any]]:
            options = [{**group, **new} for group, new in zip(groups, settings, strict=True)]
            theta, new_state = self.update(params, grads, state=state, options=options)
            state_leaves = pytree.tree_leaves(new_state)
            return (
                {name: theta[name] for name in v},
                {index: state_leaves[index] for index in state_bars},
            )

        vjp: Any = torch.func.vjp
        _, pull = vjp(step_by_settings, pytree.tree_map(as_double, self.settings_in(names)))
        cotangents: list[dict[str, Any]] = pull((v, state_bars))[0]
        return cotangents

    def commit(
        self,
        parameters: Parameters,
        grads: Tree,
        compute_step: Callable[[], tuple[Tree, Any]],
    ) -> None:
        """Move parameters and state.

        By the optimizer's own step on g, or to the θ′ and s′ that ``compute_step`` returns.
        """
        params, state = compute_step()
        self.write(parameters, params, state=state)

    def take_differentiated_step(self, parameters: Parameters, grads: Tree) -> None:
        """Move parameters and state by the step that is differentiated.

        That is the optimizer's own step, and the rule's where the optimizer's is rounded.
        """
        theta = {name: p.detach() for name, p in parameters.items()}
        state_before = self.read_state()

        def compute_step() -> tuple[Tree, OptimizerState]:
            return self.update(theta, grads, state=state_before)

        if self.is_rounded:
            params, state = compute_step()
            self.write(parameters, params, state=state)
        else:
            self.commit(parameters, grads, compute_step)

    @abstractmethod
    def write(self, parameters: Parameters, params: Tree, state: OptimizerState) -> None:
        """Set parameters and the optimizer's state to values, such as those after several steps."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, as plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a copy of what :meth:`state_dict` has returned."""


def _with_graph(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return the tensors as new leaves that require a gradient."""
    return {key: t.detach().requires_grad_() for key, t in tensors.items()}


def _of_inner(name: str) -> Any:
    """Return a property that reads an attribute, or a method, of :attr:`Clipped.inner`."""
    return property(lambda self: getattr(self.inner, name))


class Clipped(Update):
    r"""θ′ = U(θ, c(g)·g), c = min(1, m/(‖g‖ + 1e-6)): ``torch.nn.utils.clip_grad_norm_``'s rule.

    .. math:: w = c\,\tilde w - [c < 1]\, \frac{c}{\|g\| + 10^{-6}}
              \Big\langle \tilde w, \tfrac{g}{\|g\|} \Big\rangle g, \qquad
              \tilde w = (\partial U/\partial g)^\top v \text{ at } c\,g

    Args:
        inner: U, the update that takes the clipped gradient.
        max_norm: m.
        space: in which the norm is taken, over the parts of all processes where g is sharded.
    """

    parameters = _of_inner("parameters")
    group_of = _of_inner("group_of")
    numbers: Any = _of_inner("numbers")
    is_rounded: bool = _of_inner("is_rounded")
    options = _of_inner("options")
    learning_rate = _of_inner("learning_rate")
    follow = _of_inner("follow")
    read_state = _of_inner("read_state")
    state_bytes = _of_inner("state_bytes")
    write = _of_inner("write")
    state_dict = _of_inner("state_dict")
    load_state_dict = _of_inner("load_state_dict")

    def __init__(self, inner: Update, max_norm: float, space: Space = WHOLE) -> None:
        self.inner = inner
        self.max_norm = max_norm
        self.space = space

    def update(
        self, params: Tree, grads: Tree, state: OptimizerState, options: Options | None = None
    ) -> tuple[Tree, OptimizerState]:
        return self.inner.update(params, self._clip(grads), state=state, options=options)

    def stepped(
        self, params: Tree, grads: Tree, state: OptimizerState
    ) -> tuple[Tree, OptimizerState]:
        return self.inner.stepped(params, self._clip(grads), state=state)

    def with_options(self, options: Options) -> Clipped:
        return Clipped(self.inner.with_options(options), self.max_norm, space=self.space)

    def pullback(
        self,
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        v: Tree,
        options: Options | None = None,
    ) -> Tree:
        clipped = self._clip(grads)
        w = self.inner.pullback(params, clipped, state=state, v=v, options=options)
        return self._through_clip(w, grads)

    def vjp(
        self,
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        v: Tree,
        state_cotangent: OptimizerState = None,
    ) -> Cotangents:
        clipped = self._clip(grads)
        bar = self.inner.vjp(params, clipped, state=state, v=v, state_cotangent=state_cotangent)
        return Cotangents(self._through_clip(bar.gradient, grads), bar.params, state=bar.state)

    def setting_cotangents(
        self,
        names: Sequence[str],
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        v: Tree,
        state_cotangent: OptimizerState = None,
    ) -> list[dict[str, Any]]:
        return self.inner.setting_cotangents(
            names,
            params,
            grads=self._clip(grads),
            state=state,
            v=v,
            state_cotangent=state_cotangent,
        )

    def commit(
        self,
        parameters: Parameters,
        grads: Tree,
        compute_step: Callable[[], tuple[Tree, Any]],
    ) -> None:
        self.inner.commit(parameters, self._clip(grads), compute_step=compute_step)

    def _scale(self, grads: Tree) -> tuple[Tensor, Tensor]:
        """Return c and ‖g‖, both 0-D tensors."""
        length = self.space.norm(grads)
        scale = (self.max_norm / (length + 1e-6)).clamp(max=1.0)
        return scale, length

    def _clip(self, grads: Tree) -> Tree:
        """Return c·g."""
        scale, _ = self._scale(grads)
        return {name: g * scale.to(g.dtype) for name, g in grads.items()}

    def _through_clip(self, w: Tree, grads: Tree) -> Tree:
        """Return the cotangent of g from w̃, the cotangent of c·g."""
        scale, length = self._scale(grads)
        along_g = scale / (length + 1e-6) * self.space.dot(w, grads) / length
        along_g = torch.where(scale < 1, along_g, 0.0)
        pulled: Tree = {}
        for name, t in w.items():
            pulled[name] = scale.to(t.dtype) * t
            if name in grads:
                pulled[name] = pulled[name] - along_g.to(t.dtype) * grads[name]
        return pulled
