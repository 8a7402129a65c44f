"""Updates of ``torch.optim`` optimizers: their rules as functions, their state as the optimizer holds it."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from metapl.errors import MetaplError, called, few
from metapl.execution import checks
from metapl.execution.layout import NOTHING_TO_LEARN
from metapl.execution.numerics import Tree, wide
from metapl.execution.shards import as_sharded, is_sharded, local
from metapl.updates.base import Cotangents, Parameters, Update

State = dict[str, Any]  # of one parameter, as in ``torch.optim.Optimizer.state``
States = dict[str, State]
Tensors = list[Tensor] | tuple[Tensor, ...]

# Numbers of weights that an update, or its adjoint, is computed of together: more are no faster, and what is held in
# between, ten times as much in the adjoint of Adam, would be of the whole network.
AT_ONCE = 2**25

_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors in an optimizer's param groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def unwrapped(optimizer: Any, *, plain: bool = False) -> Any:
    """What accelerate and Lightning have put into an optimizer of theirs, whose class theirs imitates, whose step may
    be skipped, and whose ``load_state_dict`` may load into the wrapper; any other optimizer as it is.

    Raises: :class:`metapl.MetaplError` for gradients that are scaled or accumulated by accelerate; and in several
        processes for a network that is ``plain``, of which each would train a copy of its own.
    """
    while any(f"{kind.__module__}.{kind.__qualname__}" in _WRAPPERS for kind in type(optimizer).__mro__):
        parts = getattr(getattr(optimizer, "gradient_state", None), "num_steps", 1)
        if plain and dist.is_available() and dist.is_initialized() and (processes := dist.get_world_size()) > 1:
            raise MetaplError(
                f"an optimizer was prepared for {processes} processes, and its network is a plain module, of which "
                "each would train a copy on its own share of the batches; expected both networks as "
                "accelerator.prepare(network) returned them; under Lightning, which wraps the whole LightningModule, "
                "devices=1."
            )
        if getattr(optimizer, "scaler", None) is not None:
            raise MetaplError(
                "an optimizer was prepared with mixed_precision='fp16', which scales the loss, and the losses are not "
                'those of accelerate; expected Accelerator(mixed_precision="bf16"), or "no".'
            )
        if parts > 1:
            raise MetaplError(
                f"an optimizer was prepared with gradient_accumulation_steps={parts}, and a step of metapl takes whole "
                f"batches; expected Accelerator(gradient_accumulation_steps=1), and accumulate={parts} for metapl."
            )
        optimizer = optimizer.optimizer
    return optimizer


def refuse_missing(name: str, optimizer: torch.optim.Optimizer, parameters: Parameters, network: str) -> None:
    """Refuse an optimizer that does not hold all trainable parameters of a network, ``"teacher"`` or ``"student"``;
    ``name`` is that of its argument."""
    held = [p for group in optimizer.param_groups if group.get("amsgrad") for p in group["params"]]
    if any(
        "exp_avg_sq" in state and "max_exp_avg_sq" not in state for state in map(optimizer.state.get, held) if state
    ):
        raise MetaplError(
            f"amsgrad of {called(name)} was switched on after its first step, whose greatest second moments it has not "
            f"kept; build a new {type(optimizer).__name__}(..., amsgrad=True)."
        )
    if not parameters:
        raise MetaplError(NOTHING_TO_LEARN.format(network))
    known = {id(p) for p in parameters_of(optimizer)}
    missing = [path for path, p in parameters.items() if id(p) not in known]
    if len(missing) == len(parameters):
        raise MetaplError(
            f"{called(name)} holds {len(known)} tensors, none of which is one of the {len(parameters)} trainable "
            f"parameters of the {network}, so that it would not be trained; build it from {network}.parameters(): it "
            "may be the other network's, or of one that was built before."
        )
    if missing:
        raise MetaplError(
            f"{called(name)} holds {len(known)} tensors, the {network} has {len(parameters)} trainable parameters, of "
            f"which {few(missing, 3)} are not held, so they would not be trained; build it from "
            f"{network}.parameters(), and add new ones, such as a head put in later, by {called(name)}.add_param_group."
        )
    for lr in (group["lr"] for group in optimizer.param_groups):
        if isinstance(lr, Tensor) and lr.ndim:
            raise MetaplError(
                f"{called(name)} has lr={lr}, a tensor of shape {tuple(lr.shape)}; expected a number, or a tensor "
                "without dimensions, such as torch.tensor(0.1)."
            )


def described(optimizer: Any) -> str:
    """An optimizer in words, by its class."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return f"{'the class ' if isinstance(optimizer, type) else ''}{kind.__module__}.{kind.__qualname__}"


def _others_code(optimizer: torch.optim.Optimizer) -> str:
    """What runs in an optimizer's step besides that of its class, and how to do without; nothing: an empty text."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)):
        return (
            "a hook of register_step_pre_hook or register_step_post_hook, or of register_optimizer_step_pre_hook or "
            "_post_hook for all optimizers: remove it (clip_norm= clips gradients)"
        )
    step = vars(optimizer).get("step", type(optimizer).step)
    while getattr(step, "_wrapped_by_lr_sched", False):  # the wrapper of PyTorch's schedulers
        step = step.__wrapped__
    if getattr(step, "__func__", step) is not type(optimizer).step:
        return (
            "a step of its own (its method was replaced: optimizer.step = ...): del optimizer.step (clip_norm= clips "
            "gradients)"
        )
    return ""


def runs_others_code(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step is more than that of a class of PyTorch's."""
    return bool(_others_code(optimizer)) or not type(optimizer).__module__.startswith("torch.optim")


def options_by_step(
    optimizer: torch.optim.Optimizer, schedule: LRScheduler | Callable[[int], float], steps: int
) -> list[list[dict[str, Any]]]:
    """The options of the param groups in each of so many steps of a schedule, which stays where it stands."""
    groups = _options(optimizer)
    function = callable(schedule) and not isinstance(schedule, type)
    if isinstance(schedule, ReduceLROnPlateau) or not (isinstance(schedule, LRScheduler) or function):
        given = schedule.__name__ if isinstance(schedule, type) else type(schedule).__name__
        raise MetaplError(
            f"schedule is {given}; expected a torch.optim.lr_scheduler whose rates depend on the "
            "step alone, or a function from the step's number to a factor of the learning rate."
        )
    if not isinstance(schedule, LRScheduler):
        factors = [schedule(number) for number in range(steps)]
        for number, factor in enumerate(factors):
            if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
                raise MetaplError(
                    f"schedule({number}) returned {factor!r}; expected a factor of the learning rate, a number of 0 or "
                    "more."
                )
        return [[{**group, "lr": group["lr"] * factor} for group in groups] for factor in factors]
    if schedule.optimizer is not optimizer:
        raise MetaplError(
            f"schedule is of another optimizer than {called('inner_optimizer')}; expected one that was built with "
            f"that: {type(schedule).__name__}({called('inner_optimizer')}, ...)."
        )
    # A copy of the schedule, on an optimizer with the same options and nothing to move.
    kind: Any = type(optimizer)
    alike = kind([{**group, "params": [nn.Parameter(torch.zeros(()))]} for group in groups])
    ahead, found = copy.deepcopy(schedule, {id(optimizer): alike}), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that runs ahead of its optimizer
        for number in range(steps):
            try:
                ahead.step() if number else None
            except ValueError as error:
                raise MetaplError(
                    f"schedule is {type(schedule).__name__}, which ends before step {number} of {steps} ({error}); "
                    f"expected one of {steps} steps or more, from where it stands."
                ) from error
            found.append(_options(alike))
    return found


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copies of the options of the param groups: a scheduler writes into a learning rate that is a tensor."""
    return [copy.deepcopy({n: v for n, v in group.items() if n != "params"}) for group in optimizer.param_groups]


class TorchUpdate(Update):
    """The update of a ``torch.optim`` optimizer, from its current state and param groups.

    A subclass gives the rule of one param group. Lists go through PyTorch's fused operations on lists: a few kernels
    for all parameters, where their number would keep a GPU waiting for the host. Of sharded parameters, the trees and
    states hold this process's parts; the optimizer holds DTensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
        self.optimizer = optimizer
        self._compared: Any = None  # the step that was found to be as predicted
        self._options: Sequence[Mapping[str, Any]] = ()  # of the param groups; none: those that they have
        self.parameters: dict[str, nn.Parameter] = {}
        self._held: list[list[int]] = []
        self.follow(parameters)
        own, held = {id(p) for p in parameters.values()}, parameters_of(optimizer)
        foreign = sum(p.requires_grad and id(p) not in own for p in held)
        if foreign:
            raise MetaplError(
                f"{called('inner_optimizer')} holds {len(held)} tensors, the student has {len(parameters)} trainable "
                f"parameters; {foreign} of the tensors are not the student's. Build it from student.parameters()."
            )

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch patches the class for each optimizer that is built, and an earlier function has no name any more.
        return {**vars(self), "_compared": None}

    @staticmethod
    @abstractmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        """θ′ and s′ of the parameters of one group, differentiable in θ, g and s."""

    def follow(self, parameters: Parameters) -> None:
        groups = self.optimizer.param_groups
        options = [name for name in ("differentiable", "capturable") if any(group.get(name) for group in groups)]
        what = f"{options[0]}=True: leave it out" if options else _others_code(self.optimizer)
        if what:
            raise MetaplError(f"{called('inner_optimizer')} has {what}; metapl does not differentiate through that.")
        held = [[id(p) for p in group["params"]] for group in groups]
        own = self.parameters
        known = own.keys() == parameters.keys() and all(own[name] is p for name, p in parameters.items())
        asked = any(isinstance(group["lr"], Tensor) or group.get("amsgrad") for group in groups)
        if known and held == self._held and not asked:
            return
        refuse_missing("inner_optimizer", self.optimizer, parameters, "student")
        group_of = {i: number for number, ids in enumerate(held) for i in ids}
        self.group_of = {name: group_of[id(p)] for name, p in parameters.items()}
        self.parameters, self._held = dict(parameters), held
        self._sharded = any(is_sharded(p) for p in parameters.values())

    @property
    def learning_rate(self) -> float | None:
        return float((self._options or self.optimizer.param_groups)[0]["lr"])

    def read_state(self) -> States:
        states = {name: dict(self.optimizer.state.get(p, {})) for name, p in self.parameters.items()}
        if self._sharded:
            return {name: {key: local(value) for key, value in state.items()} for name, state in states.items()}
        return states

    def update(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        new_params, new_state = dict(params), dict(state)
        for group, names in self.groups(grads):
            given = [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]
            moved, states = self.rule(*given, group)
            new_params.update(zip(names, moved, strict=True))
            new_state.update(zip(names, states, strict=True))
        return new_params, new_state

    def stepped(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        new_params, new_state = dict(params), dict(state)
        held = {name: nn.Parameter(params[name].clone()) for name in grads}
        for name, g in grads.items():
            held[name].grad = g.detach()
        groups = [{**group, "params": [held[name] for name in names]} for group, names in self.groups(grads)]
        kind: Any = type(self.optimizer)
        optimizer = kind(groups)
        for name, p in held.items():
            if state[name]:
                kept = {key: t.clone() if isinstance(t, Tensor) else t for key, t in state[name].items()}
                optimizer.state[p] = kept
        optimizer.step()
        new_params.update({name: p.detach() for name, p in held.items()})
        new_state.update({name: dict(optimizer.state[p]) for name, p in held.items()})
        return new_params, new_state

    def at(self, options: Sequence[Mapping[str, Any]]) -> TorchUpdate:
        later = copy.copy(self)
        later._options = options
        return later

    def groups(self, grads: Tree) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """The param groups, each with the names of its parameters that have a gradient, in shares of ``AT_ONCE``."""
        for number, group in enumerate(self._options or self.optimizer.param_groups):
            names, size = list[str](), 0
            for name in grads:
                if self.group_of[name] == number:
                    names.append(name)
                    size += grads[name].numel()
                if size >= AT_ONCE:
                    yield dict(group), names
                    names, size = [], 0
            if names:
                yield dict(group), names

    def write(self, parameters: Parameters, params: Tree, state: Any) -> None:
        with torch.no_grad():
            for name, weight in parameters.items():
                local(weight).copy_(params[name])
                self.optimizer.state.pop(weight, None)
                if state[name]:
                    self.optimizer.state[weight] = {key: _held(t, weight) for key, t in state[name].items()}

    def commit(self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]) -> None:
        own = parameters_of(self.optimizer)
        for p in own:  # a leftover gradient of a frozen parameter must not move it
            p.grad = None
        try:
            for name, p in parameters.items():
                g = grads.get(name)
                p.grad = as_sharded(g, p) if self._sharded and g is not None else g
            step = type(self.optimizer).step  # another, where its class was patched
            with nullcontext() if self._compared is step else self._as_predicted(parameters, grads):
                self.optimizer.step()
            self._compared = step
        finally:
            for p in own:
                p.grad = None

    @contextmanager
    def _as_predicted(self, parameters: Parameters, grads: Tree) -> Iterator[None]:
        """Refuse a step in this block that moves the first values of a parameter elsewhere than the rule does."""
        state = {name: {key: _some(t) for key, t in held.items()} for name, held in self.read_state().items()}
        before = {name: _some(local(p)) for name, p in parameters.items()}
        predicted, _ = self.update(before, {name: _some(g) for name, g in grads.items()}, state)
        yield
        for name, was in before.items():
            there, now = predicted[name], _some(local(parameters[name]))
            gap, moved, size = (torch.linalg.vector_norm(wide(t)) for t in (now - there, there - was, was))
            checks.refuse(
                gap > max(1e-3, 4 * torch.finfo(was.dtype).eps) * moved + 4 * torch.finfo(was.dtype).eps * size,
                f"inner_optimizer moved the student's {name} elsewhere than the step of {described(self.optimizer)} "
                "does, by whose rule the feedback is found. Usual causes: a step that was replaced or wrapped, or does "
                "more, such as clipping (use clip_norm) or projecting weights. The weights have moved by it.",
            )

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _held(value: Any, like: Tensor) -> Any:
    """A value of an optimizer's state, laid out as its parameter is where it has an entry for each of its weights."""
    return as_sharded(value, like) if isinstance(value, Tensor) and value.shape == local(like).shape else value


def _some(value: Any) -> Any:
    """A copy of the first values of a tensor, by which an elementwise rule is compared without its memory."""
    return value.detach().flatten()[:64].clone() if isinstance(value, Tensor) and value.ndim else value


class SGD(TorchUpdate):
    r"""d = ±g + λθ; b′ = μb + (1−τ)d (the first time: b′ = d); θ′ = θ − η·(d + μb′ | b′ | d).

    The three cases are Nesterov momentum, momentum, and none. The update is linear, so its pullback does not depend on
    the values. With c = 1 the first time and 1−τ later:

    .. math:: w = \mp\eta\,(1 + \mu c \mid c \mid 1)\, v
    """

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        d: Tensors = torch._foreach_neg(grads) if group["maximize"] else grads
        d = torch._foreach_add(d, params, alpha=group["weight_decay"]) if group["weight_decay"] != 0 else d
        mu, damped = group["momentum"], 1 - group["dampening"]
        if mu != 0:
            old = [state.get("momentum_buffer") for state in states]
            held = [b for b in old if b is not None]
            if len(held) == len(old):
                new: Tensors = torch._foreach_add(torch._foreach_mul(held, mu), d, alpha=damped)
            else:
                new = [d_i if b is None else mu * b + damped * d_i for d_i, b in zip(d, old, strict=True)]
            states = [{**state, "momentum_buffer": b} for state, b in zip(states, new, strict=True)]
            d = torch._foreach_add(d, new, alpha=mu) if group["nesterov"] else new
        return torch._foreach_sub(params, torch._foreach_mul(d, group["lr"])), list(states)

    def pullback(self, params: Tree, grads: Tree, state: States, v: Tree) -> Tree:
        w: Tree = {}
        for group, names in self.groups(grads):
            mu, lr, sign = group["momentum"], group["lr"], -1.0 if group["maximize"] else 1.0
            slopes = []
            for name in names:
                c = 1.0 if state[name].get("momentum_buffer") is None else 1.0 - float(group["dampening"])
                slope = sign * -(1.0 if mu == 0 else 1.0 + mu * c if group["nesterov"] else c)
                slopes.append((lr * slope).to(v[name]) if isinstance(lr, Tensor) else lr * slope)
            w.update(zip(names, torch._foreach_mul([v[name] for name in names], slopes), strict=True))
        return {name: w[name] for name in grads}

    def vjp(
        self, params: Tree, grads: Tree, state: States, v: Tree, state_cotangent: dict[int, Tensor] | None = None
    ) -> Cotangents:
        r"""In closed form too, with :math:`\bar\theta` for v, and μ = 1 in the first product without Nesterov:

        .. math:: \bar b' \mathrel{+}= -\eta\mu\bar\theta, \quad \bar d = c\,\bar b' (- \eta\bar\theta), \quad
                  \bar b = \mu\bar b', \quad \bar\theta \mathrel{+}= \lambda\bar d
        """
        place, moved = "momentum_buffer", {n for group, names in self.groups(grads) if group["momentum"] for n in names}
        after = {n: {**held, place: None} if n in moved else held for n, held in state.items()}
        given, before = state_cotangent or {}, _numbers(state)
        bars = {at: given[number] for at, number in _numbers(after).items() if number in given}
        w, theta = dict[str, Tensor](), dict(v)
        for group, names in self.groups(grads):
            mu, damping, decay = group["momentum"], group["dampening"], group["weight_decay"]
            of_d: Tensors = torch._foreach_mul([v[n] for n in names], -group["lr"])
            if mu != 0:
                of_b = torch._foreach_mul(of_d, mu) if group["nesterov"] else of_d
                for n, bar in zip(names, of_b, strict=True):
                    if (n, place) in bars:
                        bar += bars[n, place]
                fresh = [state[n].get(place) is None for n in names]
                kept = [b if new or not damping else b * (1 - damping) for b, new in zip(of_b, fresh, strict=True)]
                of_d = torch._foreach_add(kept, of_d) if group["nesterov"] else kept
                bars |= {(n, place): bar for n, bar in zip(names, torch._foreach_mul(of_b, mu), strict=True)}
            if decay != 0:
                theta.update(zip(names, torch._foreach_add([v[n] for n in names], of_d, alpha=decay), strict=True))
            w.update(zip(names, torch._foreach_neg(of_d) if group["maximize"] else of_d, strict=True))
        held = {at for at in before if isinstance(state[at[0]][at[1]], Tensor)}
        of_state = {before[at]: bar for at, bar in bars.items() if at in held}
        return Cotangents({name: w[name] for name in grads}, theta, of_state)


class Adam(TorchUpdate):
    r"""m′ = β₁m + (1−β₁)d; n′ = β₂n + (1−β₂)d²; θ′ = θ(1−ηλ) − η m̂/(√n̂ + ε), with d = ±g (+ λθ where λ is coupled).

    m̂ = m′/(1−β₁ᵗ) and n̂ = n′/(1−β₂ᵗ), or the greatest n′ so far with ``amsgrad``. Where n̂ = 0 the update is smooth
    in d, because m̂ vanishes with it, and the square root is not: there n̂ counts as the smallest normal number, a
    constant. In float16 that is above many a real n̂, and such weights are refused.
    """

    def follow(self, parameters: Parameters) -> None:
        half = [name for name, p in parameters.items() if p.dtype == torch.float16]
        if half:
            raise MetaplError(
                f"the student's {half[0]} is in float16, whose smallest normal number, 6e-5, is above many of Adam's "
                'second moments; expected weights in float32, with precision="bfloat16" where passes are to be short.'
            )
        super().follow(parameters)

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        eta, kept = group["lr"], tuple(params)
        if group["weight_decay"] != 0 and group.get("decoupled_weight_decay", False):
            kept = torch._foreach_mul(params, 1 - eta * group["weight_decay"])
        _, m_hat, root, _, new = _moments(params, grads, states, group)
        step = torch._foreach_div(m_hat, torch._foreach_add(root, group["eps"]))
        return torch._foreach_sub(kept, torch._foreach_mul(step, eta)), new

    def pullback(self, params: Tree, grads: Tree, state: States, v: Tree) -> Tree:
        r"""In closed form, with a few fused operations instead of autograd's many:

        .. math:: \frac{\partial\theta'}{\partial d} = \frac{-\eta}{\sqrt{\hat n} + \epsilon} \Big[
                  \frac{1-\beta_1}{1-\beta_1^t} - \frac{\hat m}{\sqrt{\hat n} + \epsilon}
                  \frac{1-\beta_2}{1-\beta_2^t} \frac{d}{\sqrt{\hat n}} \Big]
        """
        w: Tree = {}
        for group, names in self.groups(grads):
            (beta1, beta2), sign = group["betas"], -1.0 if group["maximize"] else 1.0
            given = [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]
            d, m_hat, root, steps, new = _moments(*given, group)
            size = torch._foreach_add(root, group["eps"])
            of_root = torch._foreach_div(d, root)
            torch._foreach_mul_(of_root, [(1 - beta2) / (1 - beta2**t) for t in steps])
            if group["amsgrad"]:  # where an older maximum rules, n̂ does not depend on d
                pairs = [(s["exp_avg_sq"], s["max_exp_avg_sq"]) for s in new]
                of_root = tuple(torch.where(n >= top, t, 0.0) for t, (n, top) in zip(of_root, pairs, strict=True))
            slopes = torch._foreach_neg(torch._foreach_div(torch._foreach_mul(m_hat, of_root), size))
            torch._foreach_add_(slopes, [(1 - beta1) / (1 - beta1**t) for t in steps])
            slopes = torch._foreach_div(torch._foreach_mul(slopes, -sign * group["lr"]), size)
            w.update(zip(names, torch._foreach_mul([v[n] for n in names], slopes), strict=True))
        return {name: w[name] for name in grads}

    def vjp(
        self, params: Tree, grads: Tree, state: States, v: Tree, state_cotangent: dict[int, Tensor] | None = None
    ) -> Cotangents:
        r"""In closed form too, but with ``amsgrad``; with :math:`\bar\theta` for v, :math:`\rho = \sqrt{\hat n}`:

        .. math:: \bar m' \mathrel{+}= \frac{-\eta\bar\theta}{(1-\beta_1^t)(\rho + \epsilon)}, \quad
                  \bar n' \mathrel{+}= \frac{\eta\bar\theta\,\hat m}{2 (1-\beta_2^t)\rho (\rho + \epsilon)^2}, \quad
                  \bar d = (1-\beta_1)\bar m' + 2(1-\beta_2)\, d\, \bar n'
        """
        if any(group["amsgrad"] for group, _ in self.groups(grads)):
            return super().vjp(params, grads, state, v, state_cotangent)
        moments = ("exp_avg", "exp_avg_sq")
        after = {n: {**s, **dict.fromkeys(("step", *moments))} if n in grads else s for n, s in state.items()}
        given, before = state_cotangent or {}, _numbers(state)
        bars = {place: given[number] for place, number in _numbers(after).items() if number in given}
        w: Tree = {}
        theta = dict(v)
        for group, names in self.groups(grads):
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            held = [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]
            d, m_hat, root, steps, _ = _moments(*held, group)
            size = torch._foreach_add(root, group["eps"])
            of_m = torch._foreach_div(torch._foreach_mul([v[n] for n in names], -lr), size)  # of m̂
            of_n = torch._foreach_mul(of_m, m_hat)
            for divisor in (size, root):
                torch._foreach_div_(of_n, divisor)
            torch._foreach_mul_(of_n, [-0.5 / (1 - beta2**t) for t in steps])
            torch._foreach_div_(of_m, [1 - beta1**t for t in steps])
            for bar, r in zip(of_n, root, strict=True):
                bar.masked_fill_(r * r <= torch.finfo(r.dtype).tiny, 0.0)  # where n̂ counts as a constant
            for key, found in zip(moments, (of_m, of_n), strict=True):
                for n, bar in zip(names, found, strict=True):
                    if (n, key) in bars:
                        bar += bars[n, key]
            of_d = torch._foreach_mul(d, of_n)
            torch._foreach_mul_(of_d, 2 * (1 - beta2))
            torch._foreach_add_(of_d, of_m, alpha=1 - beta1)
            if decay != 0 and group.get("decoupled_weight_decay", False):
                theta.update(zip(names, torch._foreach_mul([v[n] for n in names], 1 - lr * decay), strict=True))
            elif decay != 0:
                theta.update(zip(names, torch._foreach_add([v[n] for n in names], of_d, alpha=decay), strict=True))
            for key, found, beta in zip(moments, (of_m, of_n), (beta1, beta2), strict=True):
                torch._foreach_mul_(found, beta)
                bars |= {(n, key): bar for n, bar in zip(names, found, strict=True)}
            w.update(zip(names, torch._foreach_neg(of_d) if group["maximize"] else of_d, strict=True))
        of_state = {before[place]: bar for place, bar in bars.items() if place in before}
        return Cotangents({name: w[name] for name in grads}, theta, of_state)


def _numbers(state: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    """The places of a state by the numbers of their leaves."""
    return {place: number for number, place in enumerate((n, key) for n, held in state.items() for key in held)}


def _moments(
    params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
) -> tuple[Tensors, Tensors, Tensors, list[float], list[State]]:
    """d, m̂, √n̂ and the steps t of the parameters of a group, and their new states."""
    beta1, beta2 = group["betas"]
    d: Tensors = torch._foreach_neg(grads) if group["maximize"] else grads
    if group["weight_decay"] != 0 and not group.get("decoupled_weight_decay", False):
        d = torch._foreach_add(d, params, alpha=group["weight_decay"])
    counts = [state.get("step", 0.0) for state in states]  # tensors on the host
    steps = [float(n.detach() if isinstance(n, Tensor) else n) + 1.0 for n in counts]
    m = _average("exp_avg", d, beta1, states)
    n = _average("exp_avg_sq", torch._foreach_mul(d, d), beta2, states)
    new = [
        {**state, "step": torch.tensor(t), "exp_avg": m_i, "exp_avg_sq": n_i}
        for state, t, m_i, n_i in zip(states, steps, m, n, strict=True)
    ]
    if group["amsgrad"]:
        for state in new:  # where they are equal, the derivative is that of n
            n_i, top = state["exp_avg_sq"], state.get("max_exp_avg_sq")
            state["max_exp_avg_sq"] = n_i if top is None else torch.where(n_i >= top, n_i, top)
        n = [state["max_exp_avg_sq"] for state in new]
    m_hat = torch._foreach_div(m, [1 - beta1**t for t in steps])
    n_hat = torch._foreach_div(n, [1 - beta2**t for t in steps])
    root = torch._foreach_sqrt([n_i.clamp_min(torch.finfo(n_i.dtype).tiny) for n_i in n_hat])
    return d, m_hat, root, steps, new


def _average(name: str, new: Tensors, beta: float, states: Sequence[State]) -> Tensors:
    """β·old + (1−β)·new; old is 0 in the first step."""
    fresh = torch._foreach_mul(new, 1 - beta)
    if any(name not in state for state in states):
        return [t + beta * state[name] if name in state else t for t, state in zip(fresh, states, strict=True)]
    return torch._foreach_add(torch._foreach_mul([state[name] for state in states], beta), fresh)
