"""Updates of ``torch.optim`` optimizers: their rules as functions, their state as the optimizer holds it."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.checks import transformed
from metapl.execution.numerics import Tree
from metapl.execution.shards import as_sharded, is_sharded, local
from metapl.updates.base import Cotangents, Options, Parameters, Update, cotangents_of

State = dict[str, Any]  # of one parameter, as in ``torch.optim.Optimizer.state``
States = dict[str, State]
Tensors = Sequence[Tensor]
Factors = Sequence[Any] | Tensor | float  # one for all, or one for each

Schedule = LRScheduler | Callable[[int], float] | Sequence[LRScheduler | Callable[[int], float]] | Mapping[str, Tensor]
"""Of a learning rate, by a scheduler or by factors; of several optimizers, also one for each; or settings by name."""

# Numbers of weights that an update, or its adjoint, is computed of together: more are no faster, and what is held in
# between, ten times as much in the adjoint of Adam, would be of the whole network.
AT_ONCE = 2**25


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [*chain.from_iterable(group["params"] for group in optimizer.param_groups)]


def parts_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers of :class:`metapl.updates.several.Several`; any other one alone."""
    parts: tuple[torch.optim.Optimizer, ...] = getattr(optimizer, "optimizers", (optimizer,))
    return parts


def refuse_missing(name: str, optimizer: torch.optim.Optimizer, parameters: Parameters, network: str) -> None:
    """Refuse an optimizer that does not hold all trainable parameters of a network; ``name`` is its argument's."""
    held = set(map(id, parameters_of(optimizer)))
    if not parameters or not held.issuperset(map(id, parameters.values())):
        missing = [path for path, p in parameters.items() if id(p) not in held]
        raise MetaplError(
            f"{name} holds {len(held)} tensors, without {few(missing, 3) or 'any'} of the {len(parameters)} trainable "
            f"parameters of the {network}; expected {network}.parameters(), and new ones by add_param_group."
        )
    of_muon = [group["params"] for group in optimizer.param_groups if "ns_steps" in group]
    if any(p.ndim != 2 or p.is_complex() for params in of_muon for p in params):  # which torch may see in a step only
        raise MetaplError(f"{name} has Muon over tensors that are no real matrices; give them to another optimizer.")


def options_by_step(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> list[list[dict[str, Any]]]:
    """The options of the param groups in each of so many steps of a schedule, which stays where it stands."""
    if isinstance(schedule, tuple | list) and len(schedule) == len(parts := parts_of(optimizer)):
        each = [options_by_step(one, own, steps) for one, own in zip(parts, schedule, strict=True)]
        return [[*chain(*of_step)] for of_step in zip(*each, strict=True)]
    groups = options_of(optimizer)
    if isinstance(schedule, Mapping):
        for name, t in schedule.items():
            shape = (steps, len(groups), *([2] * (name == "betas")))
            if t.shape[1:] != shape[1:] or len(t) < steps or not any(name in group for group in groups):
                given = f"schedule has {name!r} of shape {tuple(t.shape)}"
                raise MetaplError(f"{given}; expected settings of inner_optimizer, {shape}.")
        rows = {name: t.tolist() for name, t in schedule.items()}
        return [
            [group | {name: of[k][i] for name, of in rows.items() if name in group} for i, group in enumerate(groups)]
            for k in range(steps)
        ]
    if isinstance(schedule, ReduceLROnPlateau | type) or not (isinstance(schedule, LRScheduler) or callable(schedule)):
        raise MetaplError(
            f"schedule is {schedule!r:.80}; expected a torch.optim.lr_scheduler of the step alone, a function from the "
            "step's number to a factor; of several optimizers a tuple; or a dict of settings, (K, param groups)."
        )
    if not isinstance(schedule, LRScheduler):
        return [[{**group, "lr": group["lr"] * schedule(number)} for group in groups] for number in range(steps)]
    if schedule.optimizer is not optimizer:
        raise MetaplError("schedule is of another optimizer than inner_optimizer.")
    # A copy of the schedule, on an optimizer with the same options and nothing to move.
    kind: Any = type(optimizer)
    alike = kind([{**group, "params": [nn.Parameter(torch.zeros(1, 1))]} for group in groups])
    ahead, options = copy.deepcopy(schedule, {id(optimizer): alike}), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that runs ahead of its optimizer
        for number in range(steps):
            if number:
                ahead.step()
            options.append(options_of(alike))
    return options


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copies of the options of the param groups: a scheduler writes into a learning rate that is a tensor."""
    return [copy.deepcopy({n: v for n, v in group.items() if n != "params"}) for group in optimizer.param_groups]


class TorchUpdate(Update):
    """The update of a ``torch.optim`` optimizer, from its current state and param groups.

    A subclass gives the rule of one param group, by PyTorch's fused operations on lists: a few kernels for all
    parameters. Of sharded ones, the trees and states hold this process's parts; the optimizer holds DTensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        self.optimizer = optimizer
        self._options: Options = ()  # of the param groups; none: those that they have
        self.parameters: dict[str, nn.Parameter] = {}
        self._held: list[Any] = []  # names and identities, as last followed
        self.follow(parameters)
        own = {id(p) for p in parameters.values()}
        foreign = sum(p.requires_grad and id(p) not in own for p in parameters_of(optimizer))
        if foreign:
            raise MetaplError(f"inner_optimizer holds {foreign} other tensors; expected student.parameters() alone.")

    @staticmethod
    @abstractmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        """θ′ and s′ of the parameters of one group, differentiable in θ, g and s."""

    @staticmethod
    @abstractmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        """An equal state with all tensors that later ones have: the pure road's first step has the shapes of others."""

    def follow(self, parameters: Parameters) -> None:
        groups, held = self.optimizer.param_groups, [*parameters, *map(id, parameters.values())]
        for group in groups:
            if group.get("differentiable") or group.get("capturable"):
                raise MetaplError("inner_optimizer has differentiable or capturable=True; expected them left out.")
            held += [len(group["params"]), *map(id, group["params"])]
        if held == self._held:
            return
        refuse_missing("inner_optimizer", self.optimizer, parameters, "student")
        group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        owners = {id(p): one for one in parts_of(self.optimizer) for p in parameters_of(one)}
        self.owner = {name: owners[id(p)] for name, p in parameters.items()}
        self.group_of = {name: group_of[id(p)] for name, p in parameters.items()}
        self.parameters, self._held, self._own = dict(parameters), held, parameters_of(self.optimizer)
        self._sharded = any(is_sharded(p) for p in parameters.values())

    @property
    def options(self) -> Options:
        return self._options or self.optimizer.param_groups

    @property
    def learning_rate(self) -> float | None:
        return float(self.options[0]["lr"])

    def settings_in(self, names: Sequence[str]) -> list[dict[str, Any]]:
        return [{name: group[name] for name in names if name in group} for group in self.options]

    def read_state(self) -> States:
        states = {name: dict(self.owner[name].state.get(p, ())) for name, p in self.parameters.items()}
        if self._sharded:
            return {name: {key: local(value) for key, value in state.items()} for name, state in states.items()}
        return states

    def complete_state(self) -> States:
        state, groups = self.read_state(), self.options
        return {n: self.completed(p.detach(), state[n], groups[self.group_of[n]]) for n, p in self.parameters.items()}

    def state_bytes(self) -> int:
        state, groups = self.read_state(), self.optimizer.param_groups
        found = [
            self.completed(local(p).detach().to("meta"), state[name], {**groups[self.group_of[name]], "dampening": 0})
            for name, p in self.parameters.items()
        ]
        return sum(t.nbytes for t in pytree.tree_leaves(found) if isinstance(t, Tensor))

    def settings(self) -> list[dict[str, Any]]:
        """The rates, and other numbers in the param groups that are not 0, which leaves a part of the rule out."""
        groups = self.optimizer.param_groups
        numbers = [{n: group[n] for n in self.numbers if n == "lr" or is_set(group.get(n, 0))} for group in groups]
        return [{n: float(v) if isinstance(v, Tensor) else v for n, v in group.items()} for group in numbers]

    def update(self, params: Tree, grads: Tree, state: States, options: Options | None = None) -> tuple[Tree, States]:
        new_params, new_state = dict(params), dict(state)
        for group, names in self.groups(grads, options):
            given: Any = [[*map(tree.__getitem__, names)] for tree in (params, grads, state)]
            moved, states = self.rule(given[0], given[1], given[2], group)
            new_params.update(zip(names, moved, strict=True))
            new_state.update(zip(names, states, strict=True))
        return new_params, new_state

    def stepped(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        if self.rounded:
            return self.update(params, grads, state)
        new_params, new_state = dict(params), dict(state)
        for group, names in self.groups(grads):
            held = {name: nn.Parameter(params[name].clone()) for name in names}
            kind: Any = type(self.owner[names[0]])
            optimizer = kind([{**group, "params": [*held.values()]}])
            for name, p in held.items():
                p.grad = grads[name].detach()
                if state[name]:
                    kept = {key: t.clone() if isinstance(t, Tensor) else t for key, t in state[name].items()}
                    optimizer.state[p] = kept
            optimizer.step()
            new_params.update({name: p.detach() for name, p in held.items()})
            new_state.update({name: dict(optimizer.state[p]) for name, p in held.items()})
        return new_params, new_state

    def without_optimizer(self) -> TorchUpdate:
        """Return the rule alone, which holds no tensors: :meth:`update` of it, with options, is the same function."""
        rule = copy.copy(self)
        del rule.optimizer
        rule.parameters, rule.owner = {}, {}
        rule._held, rule._own = [], []
        return rule

    def at(self, options: Options) -> TorchUpdate:
        later = copy.copy(self)
        later._options = options
        return later

    def groups(self, grads: Tree, options: Options | None = None) -> list[tuple[Mapping[str, Any], list[str]]]:
        """The param groups, each with the names of its parameters that have a gradient, in shares of ``AT_ONCE``."""
        groups = options or self._options or self.optimizer.param_groups
        if len(groups) == 1 and sum(map(Tensor.numel, grads.values())) <= AT_ONCE:
            return [(groups[0], [*grads])]
        shares: list[tuple[Mapping[str, Any], list[str]]] = []
        for number, group in enumerate(groups):
            size = AT_ONCE
            for name in (name for name in grads if self.group_of[name] == number):
                if size >= AT_ONCE:
                    shares.append((group, []))
                    size = 0
                shares[-1][1].append(name)
                size += grads[name].numel()
        return shares

    def write(self, parameters: Parameters, params: Tree, state: Any) -> None:
        with torch.no_grad():
            for name, weight in parameters.items():
                local(weight).copy_(params[name])
                held = self.owner[name].state
                held.pop(weight, None)
                if state[name]:
                    shape, kept = local(weight).shape, dict(state[name])
                    for key, t in kept.items():  # what has an entry for each weight is laid out as the weights are
                        if isinstance(t, Tensor) and t.shape == shape:
                            kept[key] = as_sharded(t, weight)
                    held[weight] = kept

    def commit(self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]) -> None:
        for p in self._own:  # a leftover gradient of a frozen parameter must not move it
            p.grad = None
        try:
            for name, g in grads.items():
                parameters[name].grad = as_sharded(g, parameters[name]) if self._sharded else g
            self.optimizer.step()
        finally:
            for p in self._own:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def is_set(setting: Any) -> bool:
    """Whether a number of a param group is not 0; those that are tensors are not."""
    return isinstance(setting, Tensor) or setting != 0


class SGD(TorchUpdate):
    r"""d = ±g + λθ; b′ = μb + (1−τ)d (the first time: b′ = d); θ′ = θ − η·(d + μb′ | b′ | d).

    The three cases are Nesterov momentum, momentum, and none. The update is linear, so its pullback does not depend on
    the values. With c = 1 the first time and 1−τ later:

    .. math:: w = \mp\eta\,(1 + \mu c \mid c \mid 1)\, v
    """

    numbers = ("lr", "momentum", "dampening", "weight_decay")

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        mu, damped, decay, lr = group["momentum"], 1 - group["dampening"], group["weight_decay"], group["lr"]
        plus_times, times = of_lists(mu, damped, decay, lr)
        d: Tensors = times(grads, -1.0) if group["maximize"] else grads
        d = plus_times(d, params, alpha=decay) if is_set(decay) else d
        if is_set(mu):
            old: Any = [state.get("momentum_buffer") for state in states]
            if True in [b is None for b in old]:
                new: Tensors = [d_i if b is None else mu * b + damped * d_i for d_i, b in zip(d, old, strict=True)]
            else:
                new = plus_times(times(old, mu), d, alpha=damped)
            states = [{**state, "momentum_buffer": b} for state, b in zip(states, new, strict=True)]
            d = plus_times(d, new, alpha=mu) if group["nesterov"] else new
        return plus_times(params, d, alpha=-lr), list(states)

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        # A first step with dampening is not the one from a buffer of zeros.
        if not group["momentum"] or group["dampening"] or state.get("momentum_buffer") is not None:
            return {name: t for name, t in state.items() if t is not None}
        return {**state, "momentum_buffer": torch.zeros_like(p)}

    def pullback(self, params: Tree, grads: Tree, state: States, v: Tree, options: Options | None = None) -> Tree:
        w: Tree = {}
        for group, names in self.groups(grads, options):
            mu, lr, damping = group["momentum"], group["lr"] * (1.0 if group["maximize"] else -1.0), group["dampening"]
            by = later = lr
            if is_set(mu):
                damped = 1.0 - damping
                by, later = (lr * (1.0 + mu), lr * (1.0 + mu * damped)) if group["nesterov"] else (lr, lr * damped)
            if is_set(damping):
                fresh = [state[name].get("momentum_buffer") is None for name in names]
                by = by if all(fresh) else [by if new else later for new in fresh]
            w.update(zip(names, of_lists(by)[1]([*map(v.__getitem__, names)], by), strict=True))
        return {name: w[name] for name in grads}

    def vjp(self, params: Tree, grads: Tree, state: States, v: Tree, state_cotangent: Any = None) -> Cotangents:
        r"""In closed form too, with :math:`\bar\theta` for v, and μ = 1 in the first product without Nesterov:

        .. math:: \bar b' \mathrel{+}= -\eta\mu\bar\theta, \quad \bar d = c\,\bar b' (- \eta\bar\theta), \quad
                  \bar b = \mu\bar b', \quad \bar\theta \mathrel{+}= \lambda\bar d
        """
        w: Tree = {}
        theta, (given, of_state) = dict(v), cotangents_of(state, state_cotangent)
        for group, names in self.groups(grads):
            mu, damping, decay = group["momentum"], group["dampening"], group["weight_decay"]
            of_d: Tensors = mul([v[n] for n in names], -group["lr"])
            if mu != 0:
                of_b = mul(of_d, mu) if group["nesterov"] else of_d
                for n, bar in zip(names, of_b, strict=True):
                    if (later := given[n].get("momentum_buffer")) is not None:
                        bar += later
                fresh = [state[n].get("momentum_buffer") is None for n in names]
                kept = [b if new or not damping else b * (1 - damping) for b, new in zip(of_b, fresh, strict=True)]
                of_d = plus(kept, of_d) if group["nesterov"] else kept
                for n, bar, new in zip(names, mul(of_b, mu), fresh, strict=True):
                    of_state[n] |= {"momentum_buffer": None if new else bar} if "momentum_buffer" in state[n] else {}
            if decay != 0:
                theta.update(zip(names, add([v[n] for n in names], of_d, decay), strict=True))
            w.update(zip(names, mul(of_d, -1.0) if group["maximize"] else of_d, strict=True))
        return Cotangents({name: w[name] for name in grads}, theta, of_state)


def _lifted(operation: Callable[[Any, Any], Tensor], fused: Callable[..., Any]) -> Callable[[Tensors, Factors], Any]:
    def apply(a: Tensors, b: Factors) -> Any:
        if not (transformed() or isinstance(b, Tensor)):
            return fused(a, b)
        several = b if isinstance(b, list | tuple) else [b] * len(a)
        return [operation(x, y) for x, y in zip(a, several, strict=True)]

    return apply


mul = _lifted(torch.mul, torch._foreach_mul)
div = _lifted(torch.div, torch._foreach_div)
sub = _lifted(torch.sub, torch._foreach_sub)
plus = _lifted(torch.add, torch._foreach_add)


def add(a: Tensors, b: Tensors, alpha: Any = 1.0) -> Any:
    if transformed() or isinstance(alpha, Tensor):
        return plus(a, mul(b, alpha))
    fused: Any = torch._foreach_add
    return fused(a, b, alpha=alpha)


def of_lists(*factors: Any) -> tuple[Any, Any]:
    """:func:`add` and :func:`mul` by these factors, asked for once: PyTorch's own where none is a tensor."""
    if transformed() or True in [isinstance(factor, Tensor) for factor in factors]:
        return add, mul
    return torch._foreach_add, torch._foreach_mul
