r"""The student's update θ′ = U(θ, g, s) as a pure function of weights, gradient and optimizer state.

Estimators need an update that can be differentiated, and computed without moving the weights;
optimizers offer neither. The adjoint of one step maps the cotangents of θ′ and s′ to the cotangents
of g, θ and s:

.. math:: (w, \bar\theta, \bar s) = \Big(\frac{\partial (U, s')}{\partial (g, \theta, s)}\Big)^{\!\top}
          (\bar\theta', \bar s')

For a look-ahead of one step, w = (∂U/∂g)ᵀ v with v = ∇L(θ′) is enough.

Both roads use the same rules. On the pure road the settings of the param groups come in as
``options``, whose numbers are 0-D tensors, and the step counter is a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.numerics import WHOLE, Space, Tree

Parameters = Mapping[str, nn.Parameter]
Options = Sequence[Mapping[str, Any]]  # of each param group


class Cotangents(NamedTuple):
    """The result of :meth:`Update.vjp`."""

    gradient: Tree  # w, that of g, for the parameters that have one
    params: Tree  # that of θ
    state: Any  # that of s, as s is; None in the place of what has none


def cotangents_of(state: Mapping[str, Mapping[str, Any]], of_next: Any) -> tuple[Any, Any]:
    """Of a state by parameters, as ``torch.optim`` has it: the cotangents of the next one, and of
    this one where no step changes it; None where there is none."""
    given = of_next or {name: {} for name in state}
    return given, {
        name: {key: given[name].get(key) for key in held} for name, held in state.items()
    }


class Update(ABC):
    """The update of one optimizer; trees are dictionaries by parameter name.

    Parameters that the inner loss does not depend on are missing in ``grads``, and do not move.
    """

    numbers: tuple[
        str, ...
    ] = ()  # the options of a param group that are numbers, which the pure road takes as tensors
    parameters: dict[
        str, nn.Parameter
    ]  # the student's trainable ones, as last given to :meth:`follow`
    # whether the optimizer's own step rounds its products to a shorter type than the rule
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
    def read_state(self) -> Any:
        """The current state, for :meth:`update`; reading it changes nothing."""

    def state_bytes(self) -> int:
        """The memory of the state after a step."""
        return sum(t.nbytes for t in pytree.tree_leaves(self.read_state()) if isinstance(t, Tensor))

    @abstractmethod
    def update(
        self, params: Tree, grads: Tree, state: Any, options: Options | None = None
    ) -> tuple[Tree, Any]:
        """θ′ and s′, differentiable in all arguments.

        ``options`` take the place of those of the param groups.
        """

    def stepped(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        """θ′ and s′ to the last bit as :meth:`commit` would have them, without a graph."""
        return self.update(params, grads, state)

    def with_options(self, options: Options) -> Update:
        """The same update with these options of its param groups, such as the learning rates of a later step."""
        raise MetaplError(
            "schedule was given with a TorchOpt transform; expected torchopt.schedule in the "
            "transform."
        )

    def pullback(
        self, params: Tree, grads: Tree, state: Any, v: Tree, options: Options | None = None
    ) -> Tree:
        """w = (∂U/∂g)ᵀ v. Cost: the update and its backward pass, a few operations per weight."""

        def moved(grads: Tree) -> Tree:
            theta, _ = self.update(params, grads, state, options)
            return {name: theta[name] for name in v}

        vjp: Any = torch.func.vjp
        _, pull = vjp(moved, {name: g.detach() for name, g in grads.items()})
        w: Tree = pull(v)[0]
        return w

    def vjp(
        self, params: Tree, grads: Tree, state: Any, v: Tree, state_cotangent: Any = None
    ) -> Cotangents:
        """The adjoint of the whole step, from the cotangents v of θ′ and ``state_cotangent`` of s′ (None: zero)."""
        leaves, structure = pytree.tree_flatten(state)
        numbers = {
            i: t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()
        }
        given: tuple[dict[Any, Tensor], ...] = grads, params, numbers
        trees = [{name: t.detach().requires_grad_() for name, t in tree.items()} for tree in given]
        at_grads, at_params, at_state = trees
        with torch.enable_grad():
            before = pytree.tree_unflatten(
                [at_state.get(i, t) for i, t in enumerate(leaves)], structure
            )
            moved, new_state = self.update(at_params, at_grads, before)
        pairs: list[Any] = [(moved[name], bar) for name, bar in v.items()]
        if state_cotangent is not None:
            pairs += zip(
                pytree.tree_leaves(new_state), pytree.tree_leaves(state_cotangent), strict=True
            )
        reached = [(t, bar) for t, bar in pairs if bar is not None and t.requires_grad]
        flat = [t for tree in trees for t in tree.values()]
        ends, bars = zip(*reached, strict=True)
        cotangents = iter(torch.autograd.grad(ends, flat, bars, materialize_grads=True))
        of_grads, of_params, found = ({name: next(cotangents) for name in tree} for tree in trees)
        of_state = pytree.tree_unflatten([found.get(i) for i in range(len(leaves))], structure)
        return Cotangents(of_grads, of_params, of_state)

    def settings_in(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each param group, the settings of these names that it has, as they are."""
        return []

    def setting_cotangents(
        self,
        names: Sequence[str],
        params: Tree,
        grads: Tree,
        state: Any,
        v: Tree,
        state_cotangent: Any = None,
    ) -> list[dict[str, Any]]:
        """The cotangents of settings, by param group, from those of θ′ and s′, as :meth:`vjp` takes them."""

        def double(number: Any) -> Tensor:
            return torch.as_tensor(
                number, dtype=torch.float64, device=next(iter(params.values())).device
            )

        def moved(own: Any) -> Any:
            theta, after = self.update(
                params, grads, state, [{**a, **b} for a, b in zip(groups, own, strict=True)]
            )
            leaves = pytree.tree_leaves(after)
            return {name: theta[name] for name in v}, {number: leaves[number] for number in bars}

        vjp: Any = torch.func.vjp
        of_state = [] if state_cotangent is None else pytree.tree_leaves(state_cotangent)
        bars, groups = {i: bar for i, bar in enumerate(of_state) if bar is not None}, self.options
        _, pull = vjp(moved, pytree.tree_map(double, self.settings_in(names)))
        found: list[dict[str, Any]] = pull((v, bars))[0]
        return found

    def commit(
        self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]
    ) -> None:
        """Move parameters and state.

        By the optimizer's own step on g, or to the θ′ and s′ that ``moved`` returns.
        """
        self.write(parameters, *moved())

    def take_differentiated_step(self, parameters: Parameters, grads: Tree) -> None:
        """Take the step that is differentiated.

        The optimizer's own, and the rule's where that one is rounded.
        """
        moved = partial(
            self.update,
            {name: p.detach() for name, p in parameters.items()},
            grads,
            self.read_state(),
        )
        if self.is_rounded:
            self.write(parameters, *moved())
        else:
            self.commit(parameters, grads, moved)

    @abstractmethod
    def write(self, parameters: Parameters, params: Tree, state: Any) -> None:
        """Set the parameters and the optimizer's state to these values, such as those after several steps."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, as plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _inner(name: str) -> Any:
    return property(lambda self: getattr(self.inner, name))


class Clipped(Update):
    r"""θ′ = U(θ, c(g)·g), c = min(1, m/(‖g‖ + 1e-6)), the rule of ``torch.nn.utils.clip_grad_norm_``.

    .. math:: w = c\,\tilde w - [c < 1]\, \frac{c}{\|g\| + 10^{-6}} \Big\langle \tilde w, \tfrac{g}{\|g\|} \Big\rangle g
              , \qquad \tilde w = (\partial U/\partial g)^\top v \text{ at } c\,g
    """

    parameters, learning_rate, group_of = (
        _inner("parameters"),
        _inner("learning_rate"),
        _inner("group_of"),
    )
    numbers: Any = _inner("numbers")
    options, settings_in = _inner("options"), _inner("settings_in")
    follow, read_state, write = _inner("follow"), _inner("read_state"), _inner("write")
    state_bytes = _inner("state_bytes")
    is_rounded: bool = _inner("is_rounded")
    state_dict, load_state_dict = _inner("state_dict"), _inner("load_state_dict")

    def __init__(self, inner: Update, max_norm: float, space: Space = WHOLE) -> None:
        self.inner, self.max_norm, self.space = inner, max_norm, space

    def update(
        self, params: Tree, grads: Tree, state: Any, options: Options | None = None
    ) -> tuple[Tree, Any]:
        return self.inner.update(params, self._clip(grads), state, options)

    def stepped(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        return self.inner.stepped(params, self._clip(grads), state)

    def with_options(self, options: Options) -> Clipped:
        return Clipped(self.inner.with_options(options), self.max_norm, self.space)

    def pullback(
        self, params: Tree, grads: Tree, state: Any, v: Tree, options: Options | None = None
    ) -> Tree:
        return self._through_clip(
            self.inner.pullback(params, self._clip(grads), state, v, options), grads
        )

    def vjp(
        self, params: Tree, grads: Tree, state: Any, v: Tree, state_cotangent: Any = None
    ) -> Cotangents:
        bar = self.inner.vjp(params, self._clip(grads), state, v, state_cotangent)
        return Cotangents(self._through_clip(bar.gradient, grads), bar.params, bar.state)

    def setting_cotangents(
        self,
        names: Sequence[str],
        params: Tree,
        grads: Tree,
        state: Any,
        v: Tree,
        state_cotangent: Any = None,
    ) -> list[dict[str, Any]]:
        return self.inner.setting_cotangents(
            names, params, self._clip(grads), state, v, state_cotangent
        )

    def commit(
        self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]
    ) -> None:
        self.inner.commit(parameters, self._clip(grads), moved)

    def _scale(self, grads: Tree) -> tuple[Tensor, Tensor]:
        length = self.space.norm(grads)
        return (self.max_norm / (length + 1e-6)).clamp(max=1.0), length

    def _clip(self, grads: Tree) -> Tree:
        scale, _ = self._scale(grads)
        return {name: g * scale.to(g.dtype) for name, g in grads.items()}

    def _through_clip(self, w: Tree, grads: Tree) -> Tree:
        scale, length = self._scale(grads)
        along = torch.where(
            scale < 1, scale / (length + 1e-6) * self.space.dot(w, grads) / length, 0.0
        )
        clipped = {name: scale.to(t.dtype) * t for name, t in w.items()}
        return {
            n: t - along.to(t.dtype) * grads[n] if n in grads else t for n, t in clipped.items()
        }
