"""Updates of ``torch.optim`` optimizers.

Their rules as functions, their state as the optimizer holds it.
"""

from __future__ import annotations

import copy
import math
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

Settings = Mapping[str, Tensor | Sequence[Tensor]]  # (K, groups), or (K, ...) of each param group
Schedule = (
    LRScheduler | Callable[[int], float] | Sequence[LRScheduler | Callable[[int], float]] | Settings
)
"""Of a learning rate, by a scheduler or by factors.

Of several optimizers, also one for each; or settings by name.
"""

# Numbers of weights that an update, or its adjoint, is computed of together: more are no faster,
# and what is held in between, ten times as much in the adjoint of Adam, would be of the whole
# network.
AT_ONCE = 2**25


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [*chain.from_iterable(group["params"] for group in optimizer.param_groups)]


def parts_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers of :class:`metapl.updates.several.Several`; any other one alone."""
    parts: tuple[torch.optim.Optimizer, ...] = getattr(optimizer, "optimizers", (optimizer,))
    return parts


def refuse_missing(
    name: str, optimizer: torch.optim.Optimizer, parameters: Parameters, network: str
) -> None:
    """Refuse an optimizer that does not hold all trainable parameters of a network.

    ``name`` is its argument's.
    """
    held = set(map(id, parameters_of(optimizer)))
    if not parameters or not held.issuperset(map(id, parameters.values())):
        missing = [path for path, p in parameters.items() if id(p) not in held]
        expected = f"{network}.parameters(), and new ones by add_param_group"
        if network == "student" and missing:
            expected += as_group_at_rest(name, optimizer)
        raise MetaplError(
            f"{name} holds {len(held)} tensors, without {few(missing, 3) or 'any'} of the "
            f"{len(parameters)} trainable parameters of the {network}; expected {expected}."
        )
    of_muon = [group["params"] for group in optimizer.param_groups if "ns_steps" in group]
    if any(
        p.ndim != 2 or p.is_complex() for params in of_muon for p in params
    ):  # which torch may see in a step only
        raise MetaplError(
            f"{name} has Muon over tensors that are no real matrices; give them to another "
            "optimizer."
        )


def as_group_at_rest(name: str, optimizer: torch.optim.Optimizer) -> str:
    """Return the end of an error: how the student's other weights stay as they are in the inner
    steps, as in ANIL, and have a gradient of the outer loss."""
    parts = parts_of(optimizer)
    taking = [number for number, part in enumerate(parts) if not isinstance(part, torch.optim.Muon)]
    if not taking:
        return ""
    groups, owner = f"{name}.param_groups", name
    if hasattr(optimizer, "optimizers"):  # several, which were given as a tuple
        groups, owner = f"[g for one in {name} for g in one.param_groups]", f"{name}[{taking[0]}]"
    rest = (
        '[p for p in student.parameters() if all(p is not q for g in groups for q in g["params"])]'
    )
    return (
        "; those that the inner steps leave as they are go into a group with lr=0: groups = "
        f"{groups}; "
        f'{owner}.add_param_group({{"params": {rest}, "lr": 0.0}})'
    )


def options_by_step(
    optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int
) -> list[list[dict[str, Any]]]:
    """The options of the param groups in each of so many steps of a schedule, which stays where it stands."""
    if isinstance(schedule, tuple | list) and len(schedule) == len(parts := parts_of(optimizer)):
        each = [options_by_step(one, own, steps) for one, own in zip(parts, schedule, strict=True)]
        return [[*chain(*of_step)] for of_step in zip(*each, strict=True)]
    groups = options_of(optimizer)
    if isinstance(schedule, Mapping):
        return options_by_settings(groups, schedule, steps)
    if isinstance(schedule, ReduceLROnPlateau | type) or not (
        isinstance(schedule, LRScheduler) or callable(schedule)
    ):
        raise MetaplError(
            f"schedule is {schedule!r:.80}; expected a torch.optim.lr_scheduler of the step alone, "
            "a function from the step's number to a factor; of several optimizers a tuple; or a "
            "dict of settings, (K, param groups)."
        )
    if not isinstance(schedule, LRScheduler):
        return [
            [{**group, "lr": group["lr"] * schedule(number)} for group in groups]
            for number in range(steps)
        ]
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


def options_by_settings(
    groups: Sequence[Mapping[str, Any]], settings: Settings, steps: int
) -> list[list[dict[str, Any]]]:
    """Return the options of the param groups in each step, with these settings in the place of their own."""
    options = [[dict(group) for group in groups] for _ in range(steps)]
    for name, values in settings.items():
        shape = (steps, len(groups), *([2] * (name == "betas")))
        is_known = any(name in group for group in groups)
        if isinstance(values, Tensor):
            if values.shape[1:] != shape[1:] or len(values) < steps or not is_known:
                given = f"schedule has {name!r} of shape {tuple(values.shape)}"
                raise MetaplError(f"{given}; expected settings of inner_optimizer, {shape}.")
            columns: Sequence[Sequence[Any]] = [
                list(column) for column in zip(*values.tolist(), strict=True)
            ]
        else:
            # A setting with a value for each entry of a group's weights, beside groups that have
            # one number.
            shapes = [(steps, *entry_shape(group.get(name))) for group in groups]
            if (
                [(steps, *t.shape[1:]) for t in values] != shapes
                or min(map(len, values)) < steps
                or not is_known
            ):
                given = (
                    f"schedule has {name!r} of shapes "
                    f"{few([str(tuple(t.shape)) for t in values], 3)}"
                )
                raise MetaplError(
                    f"{given}; expected settings of inner_optimizer, for each param group "
                    f"{few(map(str, shapes), 3)}."
                )
            columns = [t.tolist() if t.ndim == 1 else list(t.detach().unbind()) for t in values]
        for number, of_step in enumerate(options):
            for group, column in zip(of_step, columns, strict=True):
                if name in group:
                    group[name] = column[number]
    return options


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copies of the options of the param groups.

    A scheduler writes into a learning rate that is a tensor.
    """
    return [
        copy.deepcopy({n: v for n, v in group.items() if n != "params"})
        for group in optimizer.param_groups
    ]


class TorchUpdate(Update):
    """The update of a ``torch.optim`` optimizer, from its current state and param groups.

    A subclass gives the rule of one param group, by PyTorch's fused operations on lists: a few
    kernels for all parameters. Of sharded ones, the trees and states hold this process's parts; the
    optimizer holds DTensors.
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
            raise MetaplError(
                f"inner_optimizer holds {foreign} other tensors; expected student.parameters() "
                "alone."
            )

    @staticmethod
    @abstractmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        """θ′ and s′ of the parameters of one group, differentiable in θ, g and s."""

    @staticmethod
    @abstractmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        """An equal state with all tensors that later ones have.

        The pure road's first step has the shapes of others.
        """

    def follow(self, parameters: Parameters) -> None:
        groups, held = self.optimizer.param_groups, [*parameters, *map(id, parameters.values())]
        for group in groups:
            if group.get("differentiable") or group.get("capturable"):
                raise MetaplError(
                    "inner_optimizer has differentiable or capturable=True; expected them left out."
                )
            self.refuse_entries(group)
            held += [len(group["params"]), *map(id, group["params"])]
        if held == self._held:
            return
        refuse_missing("inner_optimizer", self.optimizer, parameters, "student")
        group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        owners = {id(p): one for one in parts_of(self.optimizer) for p in parameters_of(one)}
        self.owner = {name: owners[id(p)] for name, p in parameters.items()}
        self.group_of = {name: group_of[id(p)] for name, p in parameters.items()}
        self.parameters, self._held, self._own = (
            dict(parameters),
            held,
            parameters_of(self.optimizer),
        )
        self._sharded = any(is_sharded(p) for p in parameters.values())

    def takes_entries(self, group: Mapping[str, Any]) -> bool:
        """Return whether the learning rate of a param group may have a value for each entry of its weights."""
        return False

    def refuse_entries(self, group: Mapping[str, Any]) -> None:
        """Refuse settings with several values, but for a learning rate that fits every weight of the group."""
        for name, value in group.items():
            if name == "params" or not entry_shape(value):
                continue
            given = f"inner_optimizer has {name!r} of shape {tuple(value.shape)} in a param group"
            if name != "lr" or not self.takes_entries(group):
                raise MetaplError(
                    f"{given}, and torch.optim takes no such step; expected a number, or lr of "
                    "torch.optim.SGD, whose shape may be that of a weight."
                )
            for p in group["params"]:
                # torch takes a tensor of one entry as a number, whatever its shape.
                fits = value.numel() == 1 or value.shape == p.shape
                if (
                    not fits
                    or is_sharded(p)
                    or p.is_complex()
                    or value.dtype != p.dtype
                    or value.device != p.device
                ):
                    raise MetaplError(
                        f"{given} with a weight of shape {tuple(p.shape)}, {p.dtype}, on "
                        f"{p.device}; expected a group "
                        'for each weight, {"params": [p], "lr": torch.full_like(p, 0.1)}, of real '
                        "numbers, not sharded."
                    )

    @property
    def options(self) -> Options:
        return self._options or self.optimizer.param_groups

    @property
    def learning_rate(self) -> float | None:
        rate = self.options[0]["lr"]
        return None if entry_shape(rate) else float(rate)

    def settings_in(self, names: Sequence[str]) -> list[dict[str, Any]]:
        return [{name: group[name] for name in names if name in group} for group in self.options]

    def read_state(self) -> States:
        states = {
            name: dict(self.owner[name].state.get(p, ())) for name, p in self.parameters.items()
        }
        if self._sharded:
            return {
                name: {key: local(value) for key, value in state.items()}
                for name, state in states.items()
            }
        return states

    def complete_state(self) -> States:
        state, groups = self.read_state(), self.options
        return {
            n: self.completed(p.detach(), state[n], groups[self.group_of[n]])
            for n, p in self.parameters.items()
        }

    def state_bytes(self) -> int:
        state, groups = self.read_state(), self.optimizer.param_groups
        found = [
            self.completed(
                local(p).detach().to("meta"),
                state[name],
                {**groups[self.group_of[name]], "dampening": 0},
            )
            for name, p in self.parameters.items()
        ]
        return sum(t.nbytes for t in pytree.tree_leaves(found) if isinstance(t, Tensor))

    def settings(self) -> list[dict[str, Any]]:
        """The rates, and other numbers in the param groups that are not 0, which leaves a part of the rule out."""
        groups = self.optimizer.param_groups
        numbers = [
            {n: group[n] for n in self.numbers if n == "lr" or is_set(group.get(n, 0))}
            for group in groups
        ]
        return [
            {n: float(v) if isinstance(v, Tensor) and not v.ndim else v for n, v in group.items()}
            for group in numbers
        ]

    def update(
        self, params: Tree, grads: Tree, state: States, options: Options | None = None
    ) -> tuple[Tree, States]:
        new_params, new_state = dict(params), dict(state)
        for group, names in self.groups(grads, options):
            given: Any = [[*map(tree.__getitem__, names)] for tree in (params, grads, state)]
            moved, states = self.rule(given[0], given[1], given[2], group)
            new_params.update(zip(names, moved, strict=True))
            new_state.update(zip(names, states, strict=True))
        return new_params, new_state

    def stepped(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        if self.is_rounded:
            return self.update(params, grads, state)
        new_params, new_state = dict(params), dict(state)
        for group, names in self.groups(grads):
            if has_entries(group):
                for name in names:
                    new_params[name], new_state[name] = self._stepped_flat(
                        name, params[name], grads, state, group
                    )
                continue
            held = {name: nn.Parameter(params[name].clone()) for name in names}
            kind: Any = type(self.owner[names[0]])
            optimizer = kind([{**group, "params": [*held.values()]}])
            for name, p in held.items():
                p.grad = grads[name].detach()
                if state[name]:
                    kept = {
                        key: t.clone() if isinstance(t, Tensor) else t
                        for key, t in state[name].items()
                    }
                    optimizer.state[p] = kept
            optimizer.step()
            new_params.update({name: p.detach() for name, p in held.items()})
            new_state.update({name: dict(optimizer.state[p]) for name, p in held.items()})
        return new_params, new_state

    def _stepped_flat(
        self, name: str, weight: Tensor, grads: Tree, state: States, group: Mapping[str, Any]
    ) -> tuple[Tensor, State]:
        """Return θ′ and s′ of one weight with a rate for each entry, by torch's own step on the flat weight."""
        held = nn.Parameter(weight.detach().flatten().clone())
        held.grad = grads[name].detach().flatten()
        kind: Any = type(self.owner[name])
        optimizer = kind([{**with_flat_rate(group), "params": [held]}])
        kept = {
            key: t.flatten().clone() if isinstance(t, Tensor) else t
            for key, t in state[name].items()
        }
        if kept:
            optimizer.state[held] = kept
        optimizer.step()
        after = {
            key: t.view(weight.shape) if isinstance(t, Tensor) else t
            for key, t in optimizer.state[held].items()
        }
        return held.detach().view(weight.shape), after

    def without_optimizer(self) -> TorchUpdate:
        """Return the rule alone, which holds no tensors.

        :meth:`update` of it, with options, is the same function.
        """
        rule = copy.copy(self)
        del rule.optimizer
        rule.parameters, rule.owner = {}, {}
        rule._held, rule._own = [], []
        return rule

    def with_options(self, options: Options) -> TorchUpdate:
        later = copy.copy(self)
        later._options = options
        return later

    def groups(
        self, grads: Tree, options: Options | None = None
    ) -> list[tuple[Mapping[str, Any], list[str]]]:
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
                    for (
                        key,
                        t,
                    ) in (
                        kept.items()
                    ):  # what has an entry for each weight is laid out as the weights are
                        if isinstance(t, Tensor) and t.shape == shape:
                            kept[key] = as_sharded(t, weight)
                    held[weight] = kept

    def commit(
        self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]
    ) -> None:
        for p in self._own:  # a leftover gradient of a frozen parameter must not move it
            p.grad = None
        if any(map(has_entries, self.optimizer.param_groups)):
            theta = {name: p.detach() for name, p in parameters.items()}
            self.write(parameters, *self.stepped(theta, grads, self.read_state()))
            return
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
        refuse_state_of_another(state, self.optimizer, "inner_optimizer")
        self.optimizer.load_state_dict(state)


def refuse_rates_by_entry(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse an optimizer whose own ``step()`` fails on a learning rate with a value for each entry of a weight.

    PyTorch's SGD takes one that requires a gradient, and reads any other as a number.
    """
    for group in optimizer.param_groups:
        if has_entries(group) and not group["lr"].requires_grad:
            raise MetaplError(
                f"{name} has 'lr' of shape {tuple(group['lr'].shape)} in a param group, and "
                "torch.optim takes no such step; expected a number. A rate for each entry is for "
                "the inner optimizer, torch.optim.SGD."
            )


def refuse_state_of_another(state: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse the state of an optimizer of another kind, whose settings torch would take over in part, or miss.

    A state of another version of torch may lack settings, or have more; one of another kind does
    both.
    """
    if not isinstance(state, Mapping) or "param_groups" not in state:
        raise MetaplError(f"its {name} has no param_groups: it is no state of torch.optim")
    own_settings = {key for group in optimizer.param_groups for key in group}
    saved_settings = {key for group in state["param_groups"] for key in group}
    # Schedulers add the first of these.
    without = {"initial_lr", "params", "param_names"}
    only_saved, only_own = (
        sorted(saved_settings - own_settings - without),
        sorted(own_settings - saved_settings - without),
    )
    if only_saved and only_own:
        raise MetaplError(
            f"its {name} has {', '.join(only_saved)}, and the trainer's {type(optimizer).__name__} "
            f"has {', '.join(only_own)}"
        )


def entry_shape(setting: Any) -> tuple[int, ...]:
    """Return the shape of a setting with a value for each entry of a weight.

    () for a number, also one in a tensor.
    """
    return tuple(setting.shape) if isinstance(setting, Tensor) else ()


def has_entries(group: Mapping[str, Any]) -> bool:
    """Return whether a param group has a learning rate of several values, which torch does not read as a number."""
    return math.prod(entry_shape(group["lr"])) > 1


def is_nonzero(setting: Any) -> bool:
    """Return whether a setting, or any entry of it, is not 0."""
    return bool(setting.ne(0).any()) if entry_shape(setting) else bool(setting != 0)


def with_flat_rate(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group by which ``torch.optim.SGD`` takes a step on flat weights, with a rate for each entry.

    SGD multiplies by such a rate where the rate requires a gradient, and only in its loop over
    single tensors; it reads any other tensor as a number. It drops dimensions of size 1 of the
    rate, but not of the weight.
    """
    # A copy: SGD squeezes the rate without a graph, and a view of a tensor that needs none would
    # need none then.
    rate = group["lr"].detach().flatten().clone().requires_grad_()
    return {**group, "lr": rate, "foreach": False, "fused": False}


def is_set(setting: Any) -> bool:
    """Whether a number of a param group is not 0; those that are tensors are not."""
    return isinstance(setting, Tensor) or setting != 0


class SGD(TorchUpdate):
    r"""d = ±g + λθ; b′ = μb + (1−τ)d (the first time: b′ = d); θ′ = θ − η·(d + μb′ | b′ | d).

    The three cases are Nesterov momentum, momentum, and none. The update is linear, so its pullback
    does not depend on the values. With c = 1 the first time and 1−τ later:

    .. math:: w = \mp\eta\,(1 + \mu c \mid c \mid 1)\, v
    """

    numbers = ("lr", "momentum", "dampening", "weight_decay")

    def takes_entries(self, group: Mapping[str, Any]) -> bool:
        return True

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        mu, damped, decay, lr = (
            group["momentum"],
            1 - group["dampening"],
            group["weight_decay"],
            rate_of(group, params),
        )
        plus_times, times = of_lists(mu, damped, decay, lr)
        d: Tensors = times(grads, -1.0) if group["maximize"] else grads
        d = plus_times(d, params, alpha=decay) if is_set(decay) else d
        if is_set(mu):
            old: Any = [state.get("momentum_buffer") for state in states]
            if True in [b is None for b in old]:
                new: Tensors = [
                    d_i if b is None else mu * b + damped * d_i
                    for d_i, b in zip(d, old, strict=True)
                ]
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

    def pullback(
        self, params: Tree, grads: Tree, state: States, v: Tree, options: Options | None = None
    ) -> Tree:
        w: Tree = {}
        for group, names in self.groups(grads, options):
            rate = rate_of(group, [v[name] for name in names])
            mu, lr, damping = (
                group["momentum"],
                rate * (1.0 if group["maximize"] else -1.0),
                group["dampening"],
            )
            by = later = lr
            if is_set(mu):
                damped = 1.0 - damping
                by, later = (
                    (lr * (1.0 + mu), lr * (1.0 + mu * damped))
                    if group["nesterov"]
                    else (lr, lr * damped)
                )
            if is_set(damping):
                fresh = [state[name].get("momentum_buffer") is None for name in names]
                by = by if all(fresh) else [by if new else later for new in fresh]
            w.update(zip(names, of_lists(by)[1]([*map(v.__getitem__, names)], by), strict=True))
        return {name: w[name] for name in grads}

    def vjp(
        self, params: Tree, grads: Tree, state: States, v: Tree, state_cotangent: Any = None
    ) -> Cotangents:
        r"""In closed form too, with :math:`\bar\theta` for v, and μ = 1 in the first product without Nesterov:

        .. math:: \bar b' \mathrel{+}= -\eta\mu\bar\theta, \quad \bar d = c\,\bar b' (- \eta\bar\theta), \quad
                  \bar b = \mu\bar b', \quad \bar\theta \mathrel{+}= \lambda\bar d
        """
        w: Tree = {}
        theta, (given, of_state) = dict(v), cotangents_of(state, state_cotangent)
        for group, names in self.groups(grads):
            mu, damping, decay = group["momentum"], group["dampening"], group["weight_decay"]
            of_theta = [v[n] for n in names]
            of_d: Tensors = mul(of_theta, -rate_of(group, of_theta))
            if mu != 0:
                of_b = mul(of_d, mu) if group["nesterov"] else of_d
                for n, bar in zip(names, of_b, strict=True):
                    if (later := given[n].get("momentum_buffer")) is not None:
                        bar += later
                fresh = [state[n].get("momentum_buffer") is None for n in names]
                kept = [
                    b if new or not damping else b * (1 - damping)
                    for b, new in zip(of_b, fresh, strict=True)
                ]
                of_d = plus(kept, of_d) if group["nesterov"] else kept
                for n, bar, new in zip(names, mul(of_b, mu), fresh, strict=True):
                    of_state[n] |= (
                        {"momentum_buffer": None if new else bar}
                        if "momentum_buffer" in state[n]
                        else {}
                    )
            if decay != 0:
                theta.update(zip(names, add([v[n] for n in names], of_d, decay), strict=True))
            w.update(zip(names, mul(of_d, -1.0) if group["maximize"] else of_d, strict=True))
        return Cotangents({name: w[name] for name in grads}, theta, of_state)


def rate_of(group: Mapping[str, Any], weights: Sequence[Tensor]) -> Any:
    """Return the learning rate of a param group; one with a value for each entry in the type of the
    weights, which a wider one would change."""
    rate = group["lr"]
    return rate.to(weights[0].dtype) if entry_shape(rate) and weights else rate


def _lifted(
    operation: Callable[[Any, Any], Tensor], fused: Callable[..., Any]
) -> Callable[[Tensors, Factors], Any]:
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
    """:func:`add` and :func:`mul` by these factors, asked for once.

    PyTorch's own where none is a tensor.
    """
    if transformed() or True in [isinstance(factor, Tensor) for factor in factors]:
        return add, mul
    return torch._foreach_add, torch._foreach_mul
