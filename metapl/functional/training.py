r"""A whole training, and its gradient, as two pure functions in a loop: one step, and that step's adjoint.

With the carry c_k = (θ_k, s_k, buffers), the settings η_k of the optimizer and the teacher's weights φ, a step is

.. math:: c_{k+1} = f(c_k, \mathrm{signal}_k(\phi), \eta_k), \qquad k = 0, ..., K-1

and the adjoint takes the cotangents of c_{k+1} to those of c_k, signal_k, η_k and φ, from v = ∇L(θ_K) on. It is *one*
pullback of f, in which the Hessian product, the feedback h_k = −dL/d(signal_k) and the gradient in the settings are
found together. Each of the two is compiled once; the loop is Python's, and K is in no graph. The adjoint runs its step
again from c_k, under the same dropout masks; c_k was kept, or is computed again (:mod:`metapl.feedback.keeping`). As on
the eager road, a signal reads the student's outputs as constants.

Source: Metagradient descent (Engstrom et al., 2025), REPLAY; MAGIC (Ilyas and Engstrom, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import digest
from metapl.execution.layout import layouts
from metapl.execution.numerics import HALF, Tree, no_fast_path
from metapl.execution.state import RandomState, branching_to, replayed, trainable
from metapl.feedback import Forward
from metapl.feedback.hypergradient import hypergradient
from metapl.feedback.keeping import Keeping, States, folder_of, keeping
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.path import LOSS_NOT_FINITE, NOT_FINITE, OTHER_BATCH
from metapl.feedback.resuming import Folder, known_by
from metapl.functional.compiled import captured, capturing, refuse_gap
from metapl.functional.network import Function, tensors_of
from metapl.functional.state import dot, held, norm, on_value, settings_of
from metapl.problems.base import Problem, Signal, enters_input, has_own, sum_and_weight
from metapl.runs.progress import counted
from metapl.updates import Clipped, Options, Update, options_of, parts_of, update_of

vjp: Any = torch.func.vjp
grad_and_value, vmap = torch.func.grad_and_value, torch.func.vmap
Settings = list[dict[str, Any]]  # of each param group, as 0-D tensors


class Carry(NamedTuple):
    """What a step hands to the next."""

    params: Tree  # θ
    optimizer: Any  # s
    state: Tree  # the student's buffers and frozen parameters
    teacher_state: Tree


class Cotangents(NamedTuple):
    """dL/dθ and dL/ds of a carry, and dL/dφ by the steps from there on; of M outer losses, with a first dimension M."""

    params: Tree
    optimizer: Any
    teacher: Tree


def make_training(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    update: Update,  # U of the student, perhaps behind a clip
    kept: Sequence[dict[str, Any]],  # what its param groups hold besides the settings
    *,
    in_settings: bool = False,  # whether the gradient in these is asked for
    several: bool = False,  # whether the cotangents are of M outer losses
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``step(φ, carry, batch, settings) -> (carry, loss, signal)``, and ``adjoint(φ, carry, batch, settings, bars,
    nudge) -> (bars, dL/d(signal), dL/d(settings), ‖dL/dθ‖)``; ``nudge`` has zeros, as the signal's fields."""
    T, S, enters = Function(teacher), Function(student), enters_input(problem)

    def moved(
        theta: Tree, s: Any, phi: Tree, nudge: Tree, settings: Settings, carry: Carry, batch: Any
    ) -> tuple[tuple[Tree, Any], Any]:
        """(θ′, s′) as a function of all that a gradient may be in; and the buffers, the loss and the signal."""

        def run(theta: Tree, *entering: Signal) -> tuple[Tensor, Tree]:
            return S.outputs(theta, carry.state, problem.student_input(batch, *entering))

        def asked(z: Tensor | None) -> tuple[Signal, Tree]:
            found: tuple[Signal, Tree] = T.at(
                phi, carry.teacher_state, lambda network: problem.signal(network, batch, z, generator=None)
            )
            fields = {name: t + nudge[name] for name, t in found[0].differentiable().items() if name in nudge}
            return found[0].having(fields), found[1]

        def mean_loss(z: Tensor, theta: Tree) -> Tensor:
            return problem.inner_loss(z, signal, batch, theta).mean()  # of (B,)

        if enters:
            signal, teacher_left = asked(None)
            z, pull, left = vjp(lambda theta: run(theta, signal), theta, has_aux=True)
        else:
            z, pull, left = vjp(run, theta, has_aux=True)
            signal, teacher_left = asked(z.detach())
        (c, direct), loss = grad_and_value(mean_loss, (0, 1))(z, theta)
        g = {name: t + direct[name] for name, t in pull(c)[0].items()}  # ∇_θ (1/B) Σ ℓ_i
        rates = [{**group, **now} for group, now in zip(kept, settings, strict=True)]
        return update.update(theta, g, s, rates), (left, teacher_left, loss.detach(), held(signal.detached()))

    def step(phi: Tree, carry: Carry, batch: Any, settings: Settings) -> tuple[Carry, Tensor, dict[str, Any]]:
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            (theta, s), (left, of_teacher, loss, signal) = moved(
                carry.params, carry.optimizer, phi, {}, settings, carry, batch
            )
        return Carry(theta, s, left, of_teacher), loss, signal

    def adjoint(phi: Tree, carry: Carry, batch: Any, settings: Settings, bars: Cotangents, nudge: Tree) -> Any:
        def of(theta: Tree, s: Any, phi: Tree, nudge: Tree, *rates: Settings) -> Any:
            return moved(theta, s, phi, nudge, rates[0] if rates else settings, carry, batch)

        given = carry.params, carry.optimizer, phi, nudge, *([settings] if in_settings else [])
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            _, pull, _ = vjp(of, *given, has_aux=True)
            found = (vmap(pull) if several else pull)((bars.params, bars.optimizer))
        before = Cotangents(found[0], found[1], {name: t + found[2][name] for name, t in bars.teacher.items()})
        return before, found[3], found[4] if in_settings else None, norm(before.params)

    return step, adjoint


def check(mode: Any, problem: Problem, student: Any, teacher: Any, optimizer: Any, accumulate: int) -> None:
    """Refuse what the two graphs do not take, in one line; the networks are given as their layouts."""
    own = mode.name not in ("forward", "unrolled") or getattr(mode, "normalization", "gradient") != "gradient"
    spread = [role for role in (student, teacher) if role is not None and role.kind != "plain"]
    short = [t.dtype for t in student.parameters().values() if t.dtype in HALF]
    refused = {
        f"{mode!r}; expected Forward() or Unrolled(), in the gradient's own units": own,
        "accumulate": accumulate > 1,
        "several processes": spread or not student.ranks.alone,
        "a TorchOpt transform; expected torch.optim's": not isinstance(optimizer, torch.optim.Optimizer),
        "a problem that revises its signal": has_own(problem, "revised_signal"),
        "weights in half precision": short,
    }
    for what in (what for what, is_so in refused.items() if is_so):
        raise MetaplError(f"compile=True was given with {what}; leave compile out.")


class Compiled(NamedTuple):
    """The two functions of one training."""

    step: Callable[..., Any]
    adjoint: Callable[..., Any]
    update: Any  # of torch.optim
    of: Any  # what they are known by may not be freed
    compared: dict[Any, Any]  # with the eager step, by kinds of batches: the weights that their losses do not reach


_KNOWN: dict[Any, Compiled] = {}  # those of the last training: a second call compiles nothing


def compiled_training(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    in_settings: bool,
    several: bool,
) -> Compiled:
    """The functions of :func:`make_training`, compiled where the last ones were of anything else."""
    modules = [part for network in (teacher, student) if network is not None for part in network.modules()]
    weights = [p for network in (teacher, student) if network is not None for p in network.parameters()]
    device = next(student.parameters()).device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    update: Any = update_of(optimizer, trainable(student))
    groups = [group | dict.fromkeys(update.numbers, 0.0) for group in options_of(optimizer)]
    of = teacher, student, problem, *parts_of(optimizer), *modules, *weights
    flags = [part.training for part in modules], [p.requires_grad for p in weights]
    key = (*map(id, of), str((flags, groups, clip_norm, in_settings, several, dtype)))
    if key not in _KNOWN:
        _KNOWN.clear()
        space: Any = SimpleNamespace(dot=dot, norm=norm)
        rule = update if clip_norm is None else Clipped(update, clip_norm, space)
        # Without the cache, which would keep casts of tensors inside a transform.
        cast = nullcontext if dtype is None else partial(torch.autocast, device.type, dtype, cache_enabled=False)
        how: dict[str, Any] = {"in_settings": in_settings, "several": several, "autocast": cast}
        both = make_training(teacher, student, problem, rule, groups, **how)
        step, adjoint = (captured(function, device) for function in both)
        _KNOWN[key] = Compiled(step, adjoint, update, of, {})
    return _KNOWN[key]


class Gradient(NamedTuple):
    """What :func:`differentiate` returns."""

    outer_loss: Tensor  # L(θ_K); of M outer losses, here and below, with a first dimension M
    feedback: list[Any]  # h_k = −dL/d(signal_k), as the value of the signal is
    teacher: Tree  # dL/dφ
    start: Tree  # dL/dθ_0
    settings: list[Any]  # dL/dη_k, as the settings are
    params: Tree  # θ_K
    inner_loss: Tensor  # the mean over the steps
    keeping: Keeping


@dataclass
class Walk:
    """The steps of a training, and the way back: which states are kept, and what was seen of each step."""

    made: Compiled
    phi: Tree
    start: Carry
    ahead: Lookahead
    rates: Sequence[Settings]  # of each step, or of all of them
    chosen: Keeping
    compare: Callable[[Any], None]  # of each batch, whose kind may be new
    device: torch.device
    digests: dict[int, Tensor] = field(default_factory=dict)  # of each step
    losses: list[Tensor] = field(default_factory=list)
    kinds: dict[int, Any] = field(default_factory=dict)
    zeros: dict[Any, Tree] = field(default_factory=dict)  # in the shapes of a signal, by those of its batch
    value: Any = None  # of the last signal
    tell: Callable[[int], None] = lambda number: None

    def __post_init__(self) -> None:
        self.spacings = *self.chosen.spacings, 1
        self.in_folder = folder_of(self.chosen.on) is not None
        self.states = States(self.chosen.on)
        self.block = States(None if self.in_folder else self.chosen.on)  # of the finest

    def batch(self, number: int) -> Any:
        """A batch; one that a function returns is refused where it is not the same when it is read again."""
        if not self.in_folder and not callable(self.ahead.batches):
            return self.ahead[number]
        with replayed(RandomState.now(self.device)):  # a function may seed the default generator
            batch = self.ahead[number]
        if bool(self.digests.setdefault(number, found := digest(batch)) != found):
            raise MetaplError(OTHER_BATCH.format(number))
        return batch

    def step(self, number: int, carry: Carry) -> tuple[Carry, Tensor]:
        batch = self.batch(number)
        self.compare(batch)
        after, loss, signal = self.made.step(self.phi, carry, batch, self.rates[number % len(self.rates)])
        self.value, shapes = signal["value"], shapes_of(batch)
        self.kinds[number] = shapes
        if shapes not in self.zeros:
            if "log_prob" in signal:
                raise MetaplError("compile=True was given with a signal that is drawn; leave compile out.")
            self.zeros[shapes] = {n: torch.zeros_like(t) for n, t in Signal(**signal).differentiable().items()}
        return after, loss

    def adjoint(self, number: int, carry: Carry, bars: Cotangents) -> tuple[Cotangents, Any, Any]:
        """The cotangents before a step, the feedback on its signal, and dL/dη of it."""
        batch = self.batch(number)
        now = self.phi, carry, batch, self.rates[number % len(self.rates)], bars, self.zeros[shapes_of(batch)]
        bars, of_signal, of_rates, size = self.made.adjoint(*now)
        checks.refuse_not_finite(NOT_FINITE.format(number), size)
        return bars, on_value({name: -t for name, t in of_signal.items()}, self.value), of_rates

    def forward(self, begin: int, end: int, carry: Carry, spacing: int, again: bool = False) -> Carry:
        """The carry after some steps, of which every ``spacing``-th is kept; ``again``: it is not needed at the end."""
        for number in range(begin, end):
            if number % spacing == 0:
                self.keep(number, carry, again and spacing == 1)
            if not again or number < end - 1:
                carry, loss = self.step(number, carry)
            if not again:
                self.losses.append(loss)
                checks.refuse_not_finite(LOSS_NOT_FINITE.format(number), loss)
                self.tell(number)
        return carry

    def backward(self, begin: int, end: int, first: int, spacing: int, *finer: int) -> Iterator[tuple[int, Carry]]:
        """The steps from the last to the ``first``, with their carries, each under the draws that it had: a block
        between kept ones is walked again."""
        for begun_at in reversed(range(begin, end, spacing)):
            stop = min(begun_at + spacing, end)
            if stop <= first:
                return
            carry = self.taken(begun_at, in_block=not finer and bool(self.chosen.spacings))
            if spacing == 1:
                yield begun_at, carry
                continue
            self.forward(begun_at, stop, carry, finer[0], again=True)
            yield from self.backward(begun_at, stop, first, *finer)

    def keep(self, number: int, carry: Carry, in_block: bool = False) -> None:
        """Keep the state before a step; in a folder with what is known of the steps before it, to go on there."""
        where = self.block if in_block else self.states
        pairs = zip(carry[2:], self.start[2:], strict=True)  # what has not moved, such as frozen weights, is held once
        moved = [{n: t for n, t in now.items() if not torch.equal(t, before[n])} for now, before in pairs]
        where.keep(number, [carry.params, carry.optimizer, *moved, RandomState.now(self.device).values()])
        if isinstance(where, Folder) and number > where.done:
            taken = range(where.done, number)
            known = {"losses": [self.losses[k] for k in taken], "digests": [self.digests[k] for k in taken]}
            known |= {"kinds": [self.kinds[k] for k in taken]}
            where.came_to(number, **known, zeros=self.zeros, value=self.value)

    def taken(self, number: int, in_block: bool = False) -> Carry:
        """The state before a step, which is no longer kept, with the generators as they were then."""
        params, state, *moved, random = (self.block if in_block else self.states).take(number)
        RandomState(self.device, **random).restore()
        return Carry(params, state, *(was | now for was, now in zip(self.start[2:], moved, strict=True)))

    def go_on(self, folder: Folder) -> None:
        """Take over what a killed process has left."""
        self.states = folder
        for known in folder.known():
            self.digests |= enumerate(known["digests"], len(self.digests))
            self.kinds |= enumerate(known["kinds"], len(self.kinds))
            self.losses += known["losses"]
            self.zeros, self.value = known["zeros"], known["value"]


def differentiate(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    mode: Any,  # Forward or Unrolled
    outer: Any,
    ahead: Lookahead,
    *,
    clip_norm: float | None = None,
    wrt: Sequence[str] = (),  # names of settings
    judging: Sequence[Problem] = (),  # for the outer losses of M examples, in the place of the problem's
    accumulate: int = 1,
    progress: bool = False,
) -> Gradient:
    """The gradient of L(θ_K) through K compiled steps, which move nothing but generators. The first call compares both
    graphs with the eager road, over one step."""
    of_teacher, of_student, device = layouts(teacher, student)
    check(mode, problem, of_student, of_teacher, optimizer, accumulate)
    steps, judged = len(ahead), problem.outer_batch(outer)
    made = compiled_training(teacher, student, problem, optimizer, clip_norm, bool(wrt), bool(judging))
    options = ahead.options(optimizer) or [options_of(optimizer)] * steps
    update, first = made.update, steps - (getattr(mode, "truncate", None) or steps)
    rates = rates_of(update, options if ahead.schedule else options[:1], options, wrt, device)
    (theta, state), (phi, teacher_state) = tensors_of(student), tensors_of(teacher)
    # A first step with dampening is not the one from a buffer of zeros, nor is its derivative in the dampening.
    by_group = [*zip(*options, strict=True)]
    dampened = ["dampening" in wrt or any(now.get("dampening") for now in groups) for groups in by_group]
    first_groups = [{**group, "dampening": is_so} for group, is_so in zip(options[0], dampened, strict=True)]
    start = carry = Carry(theta, update.at(first_groups).complete_state(), state, teacher_state)
    buffers = [b for network in (student, teacher) if network is not None for b in network.buffers()]
    size = update.state_bytes() + sum(t.nbytes for t in (*theta.values(), *buffers))
    how, on = getattr(mode, "keep", None) or getattr(mode, "keep_every", None), mode.keep_on
    chosen, folder = keeping(steps, size, device, how, on), folder_of(on)
    # The first step that moves: a schedule may begin with a rate of 0.
    moves = next((k for k, groups in enumerate(options) if any(now["lr"] != 0 for now in groups)), 0)
    own: dict[str, Any] = {"clip_norm": clip_norm, "judging": judging, "wrt": wrt}
    graphs = partial(differentiate, teacher, student, problem, optimizer, Forward(), outer, **own)
    own = {"labeled": outer, "problem": [*judging, problem][0], "inner_optimizer": optimizer, "clip_norm": clip_norm}
    eager = partial(hypergradient, teacher, student, **own)
    schedule = row_of(update, options, moves) if ahead.schedule else None
    compare = partial(refuse_other, made, theta, graphs, eager, schedule)
    walk = Walk(made, phi, start, ahead, rates, chosen, compare, device)

    def outer_losses(theta: Tree) -> Tensor:
        z, _ = Function(student).outputs(theta, carry.state, problem.outer_input(judged))
        found = [sum_and_weight(one.outer_loss(z, judged)) for one in judging or [problem]]
        L = torch.stack([total / weight for total, weight in found])
        return L if judging else L[0]

    compare(ahead[moves])
    begun = RandomState.now(device)
    going_on: Any = nullcontext()
    if folder is not None:
        asked = student, teacher or nn.Module(), problem, mode, update, optimizer
        of = known_by(*asked, options, wrt, clip_norm, outer, ahead[0], steps)
        going_on = Folder(folder, of, steps, device).opened()
    feedback, in_settings, end, done = list[Any](), list[Any](), steps, 0
    try:
        with torch.no_grad(), no_fast_path(math=True), capturing(), going_on as opened:
            if opened is not None:
                walk.go_on(opened)
                done = opened.done
            if done:
                carry = walk.taken(done)
                walk.batch(done - 1)  # of a path that is truncated, no other is read again
            else:
                walk.batch(0)  # a function that always returns another batch is refused here, not after the path
            with counted(progress, steps, "steps", done) as walk.tell:
                carry = walk.forward(done, steps, carry, walk.spacings[0])
            if done < steps and folder is not None:
                walk.keep(steps, carry)
            ended = RandomState.now(device)
            if (left := walk.states.adjoint) is None:
                with replayed(ended.branch()):
                    L, pull = vjp(outer_losses, carry.params)
                    v = vmap(pull)(torch.eye(len(L)).to(L))[0] if judging else pull(torch.ones_like(L))[0]
                nothing = pytree.tree_map(lambda t: t.new_zeros((*L.shape, *t.shape)), (carry.optimizer, phi))
                bars = Cotangents(v, *nothing)
            else:
                end, L, feedback, in_settings = (left[n] for n in ("at", "L", "feedback", "in_settings"))
                bars = Cotangents(*left["bars"])
            with counted(progress, steps - first, "steps back", steps - end) as tell:
                for number, held in walk.backward(0, end, first, *walk.spacings):
                    if number < first:
                        break
                    bars, h, of_rates = walk.adjoint(number, held, bars)
                    feedback.append(h)
                    in_settings.append(of_rates)
                    tell(number)
                    if isinstance(walk.states, Folder) and number > first and number % chosen.spacings[-1] == 0:
                        found = {"feedback": feedback, "in_settings": in_settings, "L": L}
                        walk.states.came_back_to(number, bars=[*bars], **found)
    except BaseException:
        begun.restore()
        raise
    ended.restore()
    for number in reversed(range(first)):
        nothing = {name: t.new_zeros((*L.shape, *t.shape)) for name, t in walk.zeros[walk.kinds[number]].items()}
        feedback.append(on_value(nothing, walk.value))
    mean = torch.stack(walk.losses).mean()
    return Gradient(L, feedback[::-1], bars.teacher, bars.params, in_settings[::-1], carry.params, mean, chosen)


def rates_of(
    update: Any, scheduled: Sequence[Options], options: Sequence[Options], wrt: Sequence[str], device: torch.device
) -> list[Settings]:
    """The settings that are tensors in the graphs, of each of the ``scheduled`` steps; ``options``: of all."""
    # A number that is 0 in all steps leaves a part of the rule out, and a momentum of 0 leaves the buffer as it is.
    names = [
        {n for n in update.numbers if n in groups[0] and (n in wrt or any(now[n] != 0 for now in groups))}
        for groups in zip(*options, strict=True)
    ]

    def values(own: set[str], now: Mapping[str, Any]) -> dict[str, Any]:
        return {n: now[n] for n in own if n in wrt or n != "momentum" or now[n] != 0}

    return [settings_of([*map(values, names, groups)], device) for groups in scheduled]


def row_of(update: Any, options: Sequence[Options], number: int) -> dict[str, Tensor]:
    """A schedule of one step: that of a number, with all of the decay that there will be, which moves what no loss
    reaches."""
    empty = dict.fromkeys(update.numbers, 0.0) | {"betas": (0.0, 0.0)}
    row = {n: [now.get(n, empty[n]) for now in options[number]] for n in update.numbers}
    row["weight_decay"] = [max(now["weight_decay"] for now in groups) for groups in zip(*options, strict=True)]
    return {n: torch.tensor([own], dtype=torch.float64) for n, own in row.items()}


def refuse_other(
    made: Compiled,
    theta: Tree,
    graphs: Callable[..., Gradient],  # of a look-ahead
    eager: Callable[..., Any],
    schedule: dict[str, Tensor] | None,
    batch: Any,
) -> None:
    """Refuse graphs whose gradient through one step on such a batch is not that of the eager road."""
    if (kind := shapes_of(batch)) in made.compared:
        return
    device = next(iter(theta.values())).device
    one, begun = Lookahead([batch], schedule=schedule), RandomState.now(device)
    made.compared[kind] = None  # the step that is compared is none to compare
    try:
        with replayed(begun):
            ours = graphs(one)
            after = RandomState.now(device)
        with replayed(begun), branching_to(after.branch()):
            expected = eager(unlabeled=one)
        moved = {n: t - theta[n] for n, t in expected.student_params.items()}
        least, eps = 1e3 * float(norm(moved)), torch.finfo(expected.inner_loss.dtype).eps
        rounding = {n: eps * (least + 8 * float(t.norm())) for n, t in theta.items()}  # as of a bias before a norm
        still = frozenset(n for n, t in moved.items() if float(t.norm()) <= rounding[n])
        for name in (n for n in still if float((ours.params[n] - theta[n]).norm()) > rounding[n]):
            raise MetaplError(f"no loss reaches the student's {name}; expected requires_grad=False.")
        for other in (own for own in made.compared.values() if own is not None and own != still):
            names = few(sorted(other ^ still), 3)
            raise MetaplError(f"no loss of some batches reaches {names}; leave compile out.")
        h, L = ours.feedback[0], ours.outer_loss
        if L.ndim:  # of several outer losses, by the first
            h, L = pytree.tree_map(lambda t: t[0], (h, L))
        pairs = {"h": (h, expected.feedback[0]), "the outer loss": (L, expected.outer_loss)}
        for name, pair in (pairs | {"the teacher's gradient": (ours.teacher, expected.grads)}).items():
            a, b = (dict(enumerate(pytree.tree_leaves(tree))) for tree in pair)
            refuse_gap(name, a, b, expected.inner_loss, rounding=name == "h")
    except BaseException:
        del made.compared[kind]
        raise
    made.compared[kind] = still


def shapes_of(batch: Any) -> tuple[Any, ...]:
    leaves, structure = pytree.tree_flatten(batch)
    return str(structure), *(tuple(t.shape) if isinstance(t, Tensor) else str(t) for t in leaves)
