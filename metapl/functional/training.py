r"""A whole training, and its gradient, as two pure functions in a loop: one step, and that step's adjoint.

With the carry c_k = (θ_k, s_k, buffers), the settings η_k of the optimizer and the teacher's
weights φ, a step is

.. math:: c_{k+1} = f(c_k, \mathrm{signal}_k(\phi), \eta_k), \qquad k = 0, ..., K-1

and the adjoint takes the cotangents of c_{k+1} to those of c_k, signal_k, η_k and φ, from v =
∇L(θ_K) on. It is *one* pullback of f, in which the Hessian product, the feedback h_k =
−dL/d(signal_k) and the gradient in the settings are found together. Each of the two is compiled
once; the loop is Python's, and K is in no graph. The adjoint runs its step again from c_k, under
the same dropout masks; c_k was kept, or is computed again (:mod:`metapl.feedback.keeping`). As on
the eager road, a signal reads the student's outputs as constants.

Source: Metagradient descent (Engstrom et al., 2025), REPLAY; MAGIC (Ilyas and Engstrom, 2025).
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import digest, flatten
from metapl.execution.layout import layouts
from metapl.execution.numerics import HALF, Tree, deterministic, float32_products, no_fast_path
from metapl.execution.state import RandomState, branching_to, replayed, trainable
from metapl.feedback import Forward
from metapl.feedback.hypergradient import Hypergradient, Request, stacked_settings, through_steps
from metapl.feedback.keeping import FolderStates, States, folder_of, keeping, known_by
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.path import LOSS_NOT_FINITE, NOT_FINITE, OTHER_BATCH, OuterLosses
from metapl.feedback.replays import REPLAY_TOLERANCE, ReplayCheck
from metapl.functional.architecture import (
    EVERYWHERE,
    PASS_HOOKS,
    Undescribed,
    bare_copies,
    description_of,
    description_of_networks,
    description_of_object,
)
from metapl.functional.compiled import captured, capturing, refuse_gap
from metapl.functional.state import (
    Function,
    as_dict,
    clipped,
    constants_of,
    norm,
    on_value,
    settings_of,
    tensors_of,
    with_fields,
)
from metapl.problems.base import Problem, Signal, enters_input, overrides, sum_and_weight
from metapl.runs.terminal import step_bar
from metapl.updates import Update, entry_shape, is_nonzero, options_of, parts_of, update_of

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
    """dL/dθ and dL/ds of a carry, and dL/dφ by the steps from there on.

    Of M outer losses, with a first dimension M.
    """

    params: Tree
    optimizer: Any
    teacher: Tree


def make_training(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    update: Update,  # U of the student, perhaps behind a clip
    constants: Sequence[dict[str, Any]],  # what its param groups hold besides the settings
    *,
    in_settings: bool = False,  # whether the gradient in these is asked for
    several: bool = False,  # whether the cotangents are of M outer losses
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``step(φ, carry, batch, settings) -> (carry, loss, signal)``, and ``adjoint(φ, carry, batch,
    settings, bars, nudge) -> (bars, dL/d(signal), dL/d(settings), ‖dL/dθ‖)``; ``nudge`` has zeros,
    as the signal's fields."""
    T, S, enters = Function(teacher, "teacher"), Function(student), enters_input(problem)

    def moved(
        carry: Carry, batch: Any, theta: Tree, s: Any, phi: Tree, nudge: Tree, settings: Settings
    ) -> tuple[tuple[Tree, Any], Any]:
        """(θ′, s′) as a function of all that a gradient may be in.

        And the buffers, the loss and the signal.
        """

        def run(theta: Tree, *entering: Signal) -> tuple[Tensor, Tree]:
            return S.outputs(theta, carry.state, problem.student_input(batch, *entering))

        def asked(z: Tensor | None) -> tuple[Signal, Tree]:
            found: tuple[Signal, Tree] = T.at(
                phi,
                carry.teacher_state,
                lambda network: problem.signal(network, batch, z, generator=None),
            )
            fields = {
                name: t + nudge[name]
                for name, t in found[0].differentiable().items()
                if name in nudge
            }
            return found[0].having(fields), found[1]

        def mean_loss(z: Tensor, theta: Tree) -> Tensor:
            # A loss may read ``student.parameters()``, so it is called while these weights are in
            # the student.
            losses, _ = S.at(
                theta, left, lambda network: problem.inner_loss(z, signal, batch, theta)
            )
            mean: Tensor = losses.mean()  # of (B,)
            return mean

        if enters:
            signal, teacher_left = asked(None)
            z, pull, left = vjp(lambda theta: run(theta, signal), theta, has_aux=True)
        else:
            z, pull, left = vjp(run, theta, has_aux=True)
            signal, teacher_left = asked(z.detach())
        (c, direct), loss = grad_and_value(mean_loss, (0, 1))(z, theta)
        g = {name: t + direct[name] for name, t in pull(c)[0].items()}  # ∇_θ (1/B) Σ ℓ_i
        rates = [{**group, **now} for group, now in zip(constants, settings, strict=True)]
        return update.update(theta, g, s, rates), (
            left,
            teacher_left,
            loss.detach(),
            as_dict(signal.detached()),
        )

    def step(
        phi: Tree, carry: Carry, batch: Any, settings: Settings
    ) -> tuple[Carry, Tensor, dict[str, Any]]:
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            after, seen = moved(carry, batch, carry.params, carry.optimizer, phi, {}, settings)
        left, teacher_left, loss, signal = seen
        return Carry(*after, left, teacher_left), loss, signal

    def adjoint(
        phi: Tree, carry: Carry, batch: Any, settings: Settings, bars: Cotangents, nudge: Tree
    ) -> Any:
        given: Any = carry.params, carry.optimizer, phi, nudge, *([settings] if in_settings else [])
        constant = () if in_settings else (settings,)
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            _, pull, _ = vjp(lambda *at: moved(carry, batch, *at, *constant), *given, has_aux=True)
            theta, s, of_phi, h, *of_settings = (vmap(pull) if several else pull)(
                (bars.params, bars.optimizer)
            )
        before = Cotangents(theta, s, {name: t + of_phi[name] for name, t in bars.teacher.items()})
        return before, h, of_settings[0] if in_settings else None, norm(theta)

    return step, adjoint


def check(
    mode: Any, problem: Problem, student: Any, teacher: Any, optimizer: Any, accumulate: int
) -> None:
    """Refuse what the two graphs do not take, in one line.

    The networks are given as their layouts.
    """
    own = (
        mode.name not in ("forward", "unrolled")
        or getattr(mode, "normalization", "gradient") != "gradient"
    )
    spread = [role for role in (student, teacher) if role is not None and role.kind != "plain"]
    short = [t.dtype for t in student.parameters().values() if t.dtype in HALF]
    refused = {
        f"{mode!r}; expected Forward() or Unrolled(), in the gradient's own units": own,
        "accumulate": accumulate > 1,
        "several processes": spread or not student.ranks.alone,
        "a TorchOpt transform; expected torch.optim's": not isinstance(
            optimizer, torch.optim.Optimizer
        ),
        "a problem that revises its signal": overrides(problem, "revised_signal"),
        "weights in half precision": short,
    }
    for what in (what for what, is_so in refused.items() if is_so):
        raise MetaplError(f"compile=True was given with {what}; leave compile out.")


@dataclass(eq=False)
class Compiled:
    """The two functions of one training.

    Attributes:
        held: what they are known by, where that is identities: it may not be freed.
        compared: the kinds of batches for which they were compared with the eager step, each with
            the weights that its losses do not reach.
        asked_by: the networks for which they were compared.
    """

    step: Callable[..., Any]
    adjoint: Callable[..., Any]
    held: tuple[Any, ...]
    compared: dict[Any, Any] = field(default_factory=dict)
    asked_by: list[Any] = field(default_factory=list)

    def serve(self, *networks: nn.Module | None) -> None:
        """Forget what was compared where other networks ask.

        A graph is compared once for each that it serves.
        """
        asking = [None if network is None else weakref.ref(network) for network in networks]
        if asking != self.asked_by:
            self.compared = {}
            self.asked_by = asking


# The functions of the last trainings, by what was compiled: a call for another network of the same
# description, as metapl.functional.architecture has it, compiles nothing.
_KNOWN: dict[Any, Compiled] = {}
MOST_KNOWN = 4


def compiled_training(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    update: Any,  # of torch.optim
    clip_norm: float | None,
    in_settings: bool,
    several: bool,
) -> Compiled:
    """Return the functions of :func:`make_training`, compiled where none are known for what is asked."""
    device = next(student.parameters()).device
    dtype = (
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    )
    constants = constants_of(update)
    # A scheduler's note, which no rule reads.
    noted = [
        {name: value for name, value in group.items() if name != "initial_lr"}
        for group in constants
    ]
    kinds = [type(update), *map(type, parts_of(update.optimizer))]
    held: tuple[Any, ...] = ()
    try:
        rule = description_of(
            (kinds, noted, update.group_of, clip_norm, in_settings, several, dtype)
        )
        key: Any = rule, description_of_object(problem), description_of_networks([teacher, student])
        teacher, student, problem = *bare_copies([teacher, student]), copy.deepcopy(problem)
    except Undescribed:
        modules = [
            part
            for network in (teacher, student)
            if network is not None
            for part in network.modules()
        ]
        weights = [
            p for network in (teacher, student) if network is not None for p in network.parameters()
        ]
        hooks = [
            hook for part in modules for name in PASS_HOOKS for hook in vars(part)[name].values()
        ]
        hooks += [hook for table in EVERYWHERE for hook in table.values()]
        held = teacher, student, problem, *modules, *weights, *hooks
        flags = [part.training for part in modules], [p.requires_grad for p in weights]
        key = (
            *map(id, held),
            str((flags, kinds, noted, update.group_of, clip_norm, in_settings, several, dtype)),
        )
    if key in _KNOWN:
        _KNOWN[key] = _KNOWN.pop(key)  # the last one that was asked for
        return _KNOWN[key]
    # Without the cache, which would keep casts of tensors inside a transform.
    cast = (
        nullcontext
        if dtype is None
        else partial(torch.autocast, device.type, dtype, cache_enabled=False)
    )
    rule_alone = clipped(update.without_optimizer(), clip_norm)
    step, adjoint = make_training(
        teacher,
        student,
        problem,
        rule_alone,
        constants,
        in_settings=in_settings,
        several=several,
        autocast=cast,
    )
    # Of those that are known by identity, which hold networks of the user's, the last one is kept.
    dropped = [known for known, one in _KNOWN.items() if one.held] or [*_KNOWN][: 1 - MOST_KNOWN]
    for known in dropped:
        del _KNOWN[known]
    _KNOWN[key] = Compiled(captured(step, device), captured(adjoint, device), held)
    return _KNOWN[key]


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
    wrt: Sequence[str] = (),
    judging: Sequence[
        Problem
    ] = (),  # for the outer losses of M examples, in the place of the problem's
    outer_losses: OuterLosses
    | None = None,  # of each step; ``outer`` is then the batch of the last
    accumulate: int = 1,
    progress: bool = False,
    replay_tolerance: float = REPLAY_TOLERANCE,
) -> Hypergradient:
    """:func:`metapl.hypergradient` through K compiled steps, which move nothing but generators; of
    M outer losses, with a first dimension M. The first call compares both graphs with the eager
    road, over one step."""
    of_teacher, of_student, device = layouts(teacher, student)
    check(mode, problem, of_student, of_teacher, optimizer, accumulate)
    if outer_losses is not None and folder_of(mode.keep_on):
        raise MetaplError(
            f"keep_on={mode.keep_on!r} was given with an outer loss for each step; expected one "
            "outer batch."
        )
    steps, judged, settings = (
        len(ahead),
        problem.outer_batch(outer),
        [n for n in wrt if n not in ("teacher", "start")],
    )
    update: Any = update_of(optimizer, trainable(student))
    made = compiled_training(
        teacher, student, problem, update, clip_norm, bool(settings), bool(judging)
    )
    made.serve(teacher, student)
    first = max(0, steps - (steps if mode.truncate is None else mode.truncate))
    # Where each step has an outer loss, those of the steps that are left out count too.
    first_seen = first if outer_losses is None else 0
    options = ahead.options(optimizer) or [options_of(optimizer)] * steps
    by_group = [*zip(*options, strict=True)]  # of each, step by step
    # The settings that are tensors in the graphs. A number that is 0 in all steps leaves a part of
    # the rule out, and a momentum of 0 leaves the buffer as it is.
    names = [
        [
            n
            for n in update.numbers
            if n in groups[0] and (n in wrt or any(is_nonzero(now[n]) for now in groups))
        ]
        for groups in by_group
    ]
    pairs = [
        zip(names, groups, strict=True) for groups in (options if ahead.schedule else options[:1])
    ]
    kept = [
        [{n: now[n] for n in own if n in wrt or n != "momentum" or now[n]} for own, now in of]
        for of in pairs
    ]
    rates = settings_of(kept, device)
    (theta, state), (phi, teacher_state) = tensors_of(student), tensors_of(teacher)
    # A first step with dampening is not the one from a buffer of zeros, nor is its derivative in
    # the dampening.
    dampened = [
        "dampening" in wrt or any(now.get("dampening") for now in groups) for groups in by_group
    ]
    first_groups = [
        {**group, "dampening": is_so} for group, is_so in zip(options[0], dampened, strict=True)
    ]
    start = carry = Carry(
        theta, update.with_options(first_groups).complete_state(), state, teacher_state
    )

    buffers = [
        b for network in (student, teacher) if network is not None for b in network.buffers()
    ]
    size = update.state_bytes() + sum(t.nbytes for t in (*theta.values(), *buffers))
    how = getattr(mode, "keep", None) or getattr(mode, "keep_every", None)
    chosen = keeping(steps, size, device, how, mode.keep_on)

    # What is compared is the first step that moves, for a schedule may begin with a rate of 0; with
    # all of the decay that there will be, which moves what no loss reaches.
    moves = next(
        (k for k, groups in enumerate(options) if any(is_nonzero(now["lr"]) for now in groups)), 0
    )
    empty, row = dict.fromkeys(update.numbers, 0.0) | {"betas": (0.0, 0.0)}, dict[str, Any]()
    for name in update.numbers if ahead.schedule else ():
        own = [now.get(name, empty[name]) for now in options[moves]]
        own = (
            [max(now[name] for now in groups) for groups in by_group]
            if name == "weight_decay"
            else own
        )
        if any(entry_shape(number) for number in own):
            row[name] = [settings_of(number, device)[None] for number in own]
        else:
            row[name] = torch.tensor([own], dtype=torch.float64)
    given: dict[str, Any] = {"clip_norm": clip_norm, "wrt": ("teacher", *settings)}
    graphs = partial(
        differentiate,
        teacher,
        student,
        problem,
        optimizer,
        Forward(),
        outer,
        judging=judging,
        **given,
    )

    def eager(one_step: Lookahead) -> Hypergradient:
        """Return the gradient of one step on the eager road."""
        request = Request(
            teacher=teacher,
            student=student,
            outer=outer,
            inner=one_step,
            mode="forward",
            problem=judging[0] if judging else problem,
            inner_optimizer=optimizer,
            clip_norm=clip_norm,
        )
        return through_steps(request)

    compare = partial(refuse_other, made, theta, graphs, eager, row or None)
    compare(ahead[moves])

    folder, states, spacings = folder_of(mode.keep_on), States(mode.keep_on), (*chosen.spacings, 1)
    going_on: AbstractContextManager[Any] = nullcontext()
    if folder is not None:
        asked = student, teacher or nn.Module(), problem, mode, update, optimizer
        states = FolderStates(
            folder, known_by(*asked, options, wrt, clip_norm, outer, ahead[0], steps), device
        )
        going_on = states.opened()

    # Digests of the states at the ends of blocks, which replays reach, and of every √K-th state
    # where all are kept.
    replays = ReplayCheck(replay_tolerance)
    noted_every = spacings[0] if spacings[0] > 1 else math.isqrt(steps)

    # What is known of the steps: the losses, the digests of batches that are read again, and which
    # shapes each has; by those of a batch, zeros in the shapes of its signal, and a value of that.
    losses, digests, kinds, signals = (
        list[Tensor](),
        list[Tensor](),
        list[int](),
        dict[Any, tuple[Tree, Any]](),
    )
    feedback, in_settings, end = list[Any](), list[Any](), steps
    draws_outside = (
        True  # from Python's or NumPy's generators, as far as is known before the first step
    )

    def signal_of(number: int) -> tuple[Tree, Any]:
        return [*signals.values()][kinds[number]]

    def store(**back: Any) -> None:
        """In a folder, store what is known of the steps so far, and of the way ``back``."""
        if isinstance(states, FolderStates):
            known = {"losses": torch.stack(losses), "digests": torch.stack(digests), "kinds": kinds}
            states.came_to(**known, signals=signals, replays=replays.digests, back=back)

    def keep(number: int, carry: Carry, finest: bool = False) -> None:
        is_inside = finest or (spacings[0] == 1 and number % noted_every)
        if steps > 1 and not is_inside:
            replays.note(number, carry.params, carry.optimizer)
        pairs = zip(
            carry[2:], start[2:], strict=True
        )  # what has not moved, such as frozen weights, is held once
        moved = [
            {n: t for n, t in now.items() if not torch.equal(t, before[n])} for now, before in pairs
        ]
        drawn = RandomState.now(device, outside=draws_outside).values()
        states.keep(number, [carry.params, carry.optimizer, *moved, drawn], finest)
        if number == len(losses) > 0:
            store()

    def taken(number: int) -> Carry:
        """The state before a step, which is no longer kept, with the generators as they were then."""
        params, state, *moved, random = states.take(number)
        RandomState(device, **random).restore()
        return Carry(params, state, *(was | now for was, now in zip(start[2:], moved, strict=True)))

    def read(number: int) -> Any:
        """A batch; one that a function returns is refused where it is not the same when it is read again."""
        if folder is None and not callable(ahead.batches):
            return ahead[number]
        with replayed(RandomState.now(device)):  # a function may seed the default generator
            batch = ahead[number]
        found = digest(batch)
        if number == len(digests):
            digests.append(found)
        if bool(digests[number] != found):
            raise MetaplError(OTHER_BATCH.format(number))
        return batch

    def take_step(number: int, carry: Carry) -> tuple[Carry, Tensor]:
        compare(batch := read(number))
        after, loss, signal = made.step(phi, carry, batch, rates[number % len(rates)])
        if (shapes := shapes_of(batch)) not in signals:
            if "log_prob" in signal:
                raise MetaplError(
                    "compile=True was given with a signal that is drawn; leave compile out."
                )
            zeros = {n: torch.zeros_like(t) for n, t in Signal(**signal).differentiable().items()}
            signals[shapes] = zeros, signal["value"]
        if number == len(kinds):
            kinds.append([*signals].index(shapes))
        return after, loss

    def backward(begin: int, end: int, spacing: int, *finer: int) -> Iterator[tuple[int, Carry]]:
        """The steps from the last to the ``first``, with their carries, each under the draws that
        it had: a block between kept ones is walked again."""
        for begun_at in reversed(range(begin, end, spacing)):
            stop = min(begun_at + spacing, end)
            if stop <= first_seen:
                return
            carry = taken(begun_at)
            if not finer:
                yield begun_at, carry
                continue
            for number in range(begun_at, stop):
                if number % finer[0] == 0:
                    keep(number, carry, finest=finer[0] == 1)
                if number < stop - 1:
                    carry, _ = take_step(number, carry)
            yield from backward(begun_at, stop, *finer)

    def compare_replay(number: int, held: Carry) -> None:
        """Take a step again whose end was noted, and compare; it is taken by the graph that took it
        first, for the adjoint may round otherwise."""
        if number + 1 in replays.digests:
            before = RandomState.now(device)
            after, _ = take_step(number, held)
            replays.compare(number + 1, after.params, after.optimizer)
            before.restore()

    def losses_at(state: Tree, judged: Any, theta: Tree) -> Tensor:
        S = Function(student)
        z, left = S.outputs(theta, state, problem.outer_input(judged))

        def ask(network: Any) -> list[tuple[Tensor, Tensor | float]]:
            return [sum_and_weight(one.outer_loss(z, judged)) for one in judging or [problem]]

        # As the inner loss, they are called while these weights are in the student.
        found, _ = S.at(theta, left, ask)
        L = torch.stack([total / weight for total, weight in found])
        return L if judging else L[0]

    losses_before = dict[int, Tensor]()  # L_k(θ_k) by k, of all steps but the last

    def with_loss_before(
        number: int, held: Carry, start: RandomState | None, bars: Cotangents
    ) -> Cotangents:
        """Return the cotangents before a step with the gradient of the outer loss that the step before it has."""
        if outer_losses is None or start is None or number == 0:
            return bars
        judged_then = problem.outer_batch(outer_losses.batches[number - 1])
        with replayed(start.branch()):
            L, pull = vjp(partial(losses_at, held.state, judged_then), held.params)
            (gradient,) = pull(torch.ones_like(L))
        losses_before[number] = L
        weight = outer_losses.weights[number - 1]
        return with_fields(
            bars, params={name: t + weight * gradient[name] for name, t in bars.params.items()}
        )

    begun = RandomState.now(device)
    try:
        with (
            torch.no_grad(),
            no_fast_path(math=True),
            deterministic(device),
            capturing(),
            going_on as known,
        ):
            if known is None:
                read(
                    0
                )  # a function that always returns another batch is refused here, not after the path
            else:  # of a process that was killed
                losses, digests = ([*known[name].unbind()] for name in ("losses", "digests"))
                kinds, signals, replays.digests = (
                    known["kinds"],
                    known["signals"],
                    known.get("replays", {}),
                )
                carry = taken(len(losses))
                read(len(losses) - 1)  # of a path that is truncated, no other is read again
            with step_bar(progress, steps, "steps", done := len(losses)) as tell:
                for number in range(done, steps):
                    if number % spacings[0] == 0:
                        keep(number, carry)
                    before = RandomState.now(device) if number == done else None
                    carry, loss = take_step(number, carry)
                    if before is not None:
                        draws_outside = RandomState.now(device).has_drawn_outside(before)
                    losses.append(loss)
                    checks.refuse_not_finite(LOSS_NOT_FINITE.format(number), loss)
                    tell()
            if done < steps and folder is not None:
                keep(steps, carry)
            elif done < steps and steps > 1:
                replays.note(steps, carry.params, carry.optimizer)
            ended = RandomState.now(device)
            if known and known["back"]:
                end, L, feedback, in_settings, found = known["back"].values()
                bars = Cotangents(*found)
            else:
                with replayed(ended.branch()):
                    L, pull = vjp(partial(losses_at, carry.state, judged), carry.params)
                    v = (
                        vmap(pull)(torch.eye(len(L)).to(L))[0]
                        if judging
                        else pull(torch.ones_like(L))[0]
                    )
                nothing = pytree.tree_map(
                    lambda t: t.new_zeros((*L.shape, *t.shape)), (carry.optimizer, phi)
                )
                if outer_losses is not None:
                    v = {name: outer_losses.weights[-1] * t for name, t in v.items()}
                bars = Cotangents(v, *nothing)
            with step_bar(progress, steps - first, "steps back", steps - end) as tell:
                for number, held in backward(0, end, *spacings):
                    # It takes a while to read, in steps of a fraction of a millisecond.
                    before_step = None if outer_losses is None else RandomState.now(device)
                    if number < first_seen:
                        break
                    if number < first:
                        bars = with_loss_before(number, held, before_step, bars)
                        continue
                    compare_replay(number, held)
                    (zeros, value), of_step = (
                        signal_of(number),
                        (read(number), rates[number % len(rates)]),
                    )
                    bars, of_signal, of_rates, size = made.adjoint(phi, held, *of_step, bars, zeros)
                    checks.refuse_not_finite(NOT_FINITE.format(number), size)
                    feedback.append(on_value({name: -t for name, t in of_signal.items()}, value))
                    in_settings.append(of_rates)
                    bars = with_loss_before(number, held, before_step, bars)
                    tell()
                    if (
                        isinstance(states, FolderStates)
                        and number > first
                        and number % spacings[-2] == 0
                    ):
                        store(
                            at=number, L=L, feedback=feedback, in_settings=in_settings, bars=[*bars]
                        )
                        states.forget(number, end)
                        end = number
    except BaseException:
        begun.restore()
        raise
    ended.restore()
    for zeros, value in map(signal_of, reversed(range(first))):
        feedback.append(
            on_value({name: t.new_zeros((*L.shape, *t.shape)) for name, t in zeros.items()}, value)
        )
    all_losses = None
    if outer_losses is not None:
        all_losses = torch.stack([*(losses_before[number] for number in range(1, steps)), L])
    return Hypergradient(
        grads=bars.teacher if "teacher" in wrt else {},
        feedback=tuple(feedback[::-1]),
        inner_loss=torch.stack(losses).mean(),
        outer_loss=L
        if outer_losses is None or all_losses is None
        else outer_losses.total(all_losses),
        student_params=carry.params,
        inner_state=None,
        kept=chosen.words(steps),
        start=bars.params if "start" in wrt else {},
        settings=stacked_settings(in_settings[::-1], settings, options[0]),
        outer_losses=all_losses,
        replay_error=replays.error,
        float32_products=float32_products(device),
    )


def refuse_other(
    made: Compiled,
    theta: Tree,
    graphs: Callable[..., Hypergradient],  # of a look-ahead
    eager: Callable[[Lookahead], Hypergradient],
    schedule: dict[str, Any] | None,
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
            expected = eager(one)
        moved = {n: t - theta[n] for n, t in expected.student_params.items()}
        least, eps = 1e3 * float(norm(moved)), torch.finfo(expected.inner_loss.dtype).eps
        rounding = {
            n: eps * (least + 8 * float(t.norm())) for n, t in theta.items()
        }  # as of a bias before a norm
        still = frozenset(n for n, t in moved.items() if float(t.norm()) <= rounding[n])
        for name in (
            n for n in still if float((ours.student_params[n] - theta[n]).norm()) > rounding[n]
        ):
            raise MetaplError(
                f"no loss reaches the student's {name}; expected requires_grad=False."
            )
        for other in (own for own in made.compared.values() if own is not None and own != still):
            names = few(sorted(other ^ still), 3)
            raise MetaplError(f"no loss of some batches reaches {names}; leave compile out.")
        h, L = ours.feedback[0], ours.outer_loss
        if L.ndim:  # of several outer losses, by the first
            h, L = pytree.tree_map(lambda t: t[0], (h, L))
        pairs = {"h": (h, expected.feedback[0]), "the outer loss": (L, expected.outer_loss)}
        for name, pair in (
            pairs | {"the teacher's gradient": (ours.grads, expected.grads)}
        ).items():
            a, b = (dict(enumerate(pytree.tree_leaves(tree))) for tree in pair)
            refuse_gap(name, a, b, expected.inner_loss, rounding=name == "h")
    except BaseException:
        del made.compared[kind]
        raise
    made.compared[kind] = still


def shapes_of(batch: Any) -> tuple[Any, ...]:
    leaves, structure = flatten(batch)
    return str(structure), *(tuple(t.shape) if isinstance(t, Tensor) else str(t) for t in leaves)
