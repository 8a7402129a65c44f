r"""Verification by definition: a mode's gradient beside differences of the loss after real steps, on float64 copies.

.. math:: F(\theta_T) = L\big(\text{the student after its real optimizer's steps on the teacher's signal}\big), \qquad
          \frac{F(\theta_T + \delta d) - F(\theta_T - \delta d)}{2\delta} \approx \langle a, d \rangle

a is the mode's gradient, and d is a itself, then a random direction. Labels that are drawn cannot be moved: each inner
loss is taken (1 + ε_i) times, for h_i = −dL/dε_i. Without a teacher, the signal's values are moved. Nothing here knows
how a mode finds its h.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, either, few, reason_of
from metapl.execution.batch import micro_batches, plain
from metapl.execution.layout import layouts
from metapl.execution.modules import trainable
from metapl.execution.rng import RandomState
from metapl.feedback import Estimator, Implicit, Lookahead, LossDifference, Mode, estimator
from metapl.feedback.compatible import prepare
from metapl.feedback.hypergradient import hypergradient
from metapl.feedback.implicit import conjugate_gradient, neumann
from metapl.problems.base import Problem, Signal, enters_input, field_of, joined_signals, sum_and_weight
from metapl.runs.generators import rng_state, set_rng_state
from metapl.updates import update_of

Tree = dict[Any, Tensor]
Errors = dict[str, float | None]  # None: rounding drowns the difference
Status = Literal["right", "allowed", "refused", "cannot tell", "nothing to verify"]
Setting = bool | int | Literal["warn"]

MOST_WEIGHTS = 50_000_000  # of both networks; larger ones are verified by check_gradient, or verify=N
STEPS = 3  # of a look-ahead
EXACT, APPROXIMATE = 1e-5, 1e-2  # relative errors of exact modes, and of those that take differences themselves
EPS, EPS32 = 2e-16, 1e-7  # rounding of F, and of one that runs in float32 somewhere
LOG = logging.getLogger("metapl")


class VerificationWarning(UserWarning):
    """A gradient that is off the derivative of the loss for a good reason, or that could not be verified."""


@dataclass(frozen=True)
class GradientCheck:
    """The result of :func:`check_gradient`.

    Args:
        status: ``"right"``; ``"allowed"``: off the definition for a good reason; ``"refused"``; ``"cannot tell"``:
            rounding drowns the differences, or a part cannot be copied; ``"nothing to verify"``: mode ``none``.
        verdict: in words, with the likely causes of a refusal.
        errors: |difference − ⟨a, d⟩| over the size of these, by what was moved and in which direction.
    """

    status: Status
    verdict: str
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """For a test; None where it cannot be told."""
        return None if self.status == "cannot tell" else self.status != "refused"

    def __str__(self) -> str:
        return "\n".join([f"{self.status}: {self.verdict}", *(f"  {k:<56} {e:.1e}" for k, e in self.errors.items())])

    def taken(self, setting: Setting) -> None:
        """Refuse, or warn of, a gradient that is not right."""
        if self.status == "refused" and setting != "warn":
            raise MetaplError(f"{self.verdict} verify='warn' goes on, with a warning.")
        if self.status not in ("right", "nothing to verify"):
            warnings.warn(f"{self.status}: {self.verdict}", VerificationWarning, stacklevel=4)


def check_gradient(
    teacher: Any,
    student: nn.Module | None = None,
    *,
    labeled: Any = None,
    unlabeled: Any = None,
    outer: Any = None,
    inner: Any = None,
    mode: Mode | None = None,
    problem: Any = None,
    inner_optimizer: Any = None,
    inner_state: Any = None,
    generator: torch.Generator | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> GradientCheck:
    r"""Compare a mode's gradient with its definition: differences of the outer loss after the student's real steps.

    .. math:: \frac{F(\theta_T + \delta d) - F(\theta_T - \delta d)}{2\delta} \approx \langle a, d \rangle, \qquad
              F(\theta_T) = L(\theta'(\theta_T))

    On copies in float64, with the same masks and labels in every evaluation: weights, buffers, gradients, optimizers
    and generators stay as they are. h is taken before a baseline or a normalization shapes it.

    Args:
        teacher, student: as for :func:`metapl.hypergradient`; or a :class:`metapl.BilevelTrainer` alone, as it stands.
        labeled, unlabeled, outer, inner: the batches of a step; of a :class:`metapl.Lookahead` the first three.
        mode: default the trainer's own, and ``"forward"`` without one.
        problem, inner_optimizer, inner_state, generator, accumulate, clip_norm: as for :func:`metapl.hypergradient`.

    Returns: a :class:`GradientCheck`; its ``passed`` is for a test.
    Cost: the mode once and some five real steps; about thirty where they disagree.
    Raises: :class:`metapl.MetaplError` for what :func:`metapl.hypergradient` refuses, and in several processes.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="forward")
    >>> check_gradient(trainer, labeled=(torch.randn(5, 4), torch.arange(5) % 3), unlabeled=torch.randn(6, 4)).passed
    True
    """
    labeled, unlabeled = either(labeled=labeled, outer=outer), either(unlabeled=unlabeled, inner=inner)
    if labeled is None or unlabeled is None:
        raise MetaplError("check_gradient was given no batches of a step; expected labeled= and unlabeled=.")
    if isinstance(getattr(teacher, "verification", None), Verification):
        if any(t is not None for t in (student, problem, inner_optimizer, inner_state, generator, clip_norm)):
            raise MetaplError("check_gradient was given a trainer and other parts beside it; expected the trainer.")
        return verified(*_of_trainer(teacher, labeled, unlabeled, mode))
    if student is None or inner_optimizer is None:
        raise MetaplError("check_gradient takes a trainer, or teacher, student and inner_optimizer, and the batches.")
    (of_teacher, of_student, device), estimate = layouts(teacher, student), estimator(mode or "forward")
    if of_student.is_sharded or not of_student.ranks.alone:
        raise MetaplError("check_gradient was given networks of several processes; expected those of one, not sharded.")
    networks = None if of_teacher is None else of_teacher.network, of_student.network, prepare(problem, estimate)
    given = *networks, inner_optimizer, inner_state, *_batches(labeled, unlabeled), clip_norm, accumulate
    return verified(Step(*given, generator, RandomState.now(device)), estimate)


class Verification:
    """When the steps of a trainer are verified, and what was found.

    Args:
        setting: True: at the first step, and where the fingerprint of the networks is a new one; ``"warn"``: the same,
            with warnings in the place of errors; False: never; a number N: also every N steps.
    """

    def __init__(self, setting: Setting = True) -> None:
        if setting != "warn" and (not isinstance(setting, int) or setting < 0):
            raise MetaplError(f"verify={setting!r} was given; expected True, False, 'warn' or a number of steps.")
        self.setting, self.verdict = setting, ""
        self.known: set[int] = set()  # fingerprints of networks that were verified

    def before(self, trainer: Any, labeled: Any, unlabeled: Any) -> None:
        """Verify where it is due, before anything of a step runs; :class:`metapl.MetaplError` for a wrong gradient."""
        if not self.setting:
            return
        mark, every = (
            fingerprint(trainer.teacher, trainer.student),
            0 if self.setting in (True, "warn") else self.setting,
        )
        if mark in self.known and not (every and trainer.steps_done % int(every) == 0):
            return
        weights = sum(p.numel() for network in trainer.networks.values() for p in network.parameters())
        spread = any(layout.is_sharded or not layout.ranks.alone for layout in trainer.layouts)
        if spread or (weights > MOST_WEIGHTS and not every):
            what = "networks of several processes" if spread else f"networks of {weights:,} weights"
            mend = "smaller ones in one process" if spread else "this trainer, or take verify=N"
            if trainer.ranks.first:
                LOG.warning("%s are not verified: give metapl.check_gradient %s.", what, mend)
        else:
            found = verified(*_of_trainer(trainer, labeled, unlabeled))
            self.verdict = f"{found.status}: {found.verdict}"
            found.taken(self.setting)
        self.known.add(mark)

    def state_dict(self) -> dict[str, str]:
        return {"known": " ".join(map(str, sorted(self.known))), "verdict": self.verdict}

    def load_state_dict(self, state: Any) -> None:
        self.known, self.verdict = set(map(int, state["known"].split())), state["verdict"]


def fingerprint(*networks: nn.Module | None) -> int:
    """A number that changes with the modes, frozen parts and hooks of networks; the same in every process."""
    marks: list[int] = []
    for part in (part for network in networks if network is not None for part in network.modules()):
        hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
        marks += (
            part.training,
            *map(len, hooks),
            *[p is not None and p.requires_grad for p in part._parameters.values()],
        )
    return hash(tuple(marks))  # whole numbers have the same hash in every process


def refuse_hooks(student: nn.Module) -> None:
    """Refuse hooks on the student's parameters: they change its gradients, and copies do not have them."""
    hooked = [n for n, p in student.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked:
        raise MetaplError(f"the student's parameters {few(hooked, 3)} have hooks; expected none (see clip_norm).")


def _of_trainer(trainer: Any, labeled: Any, unlabeled: Any, mode: Mode | None = None) -> tuple[Step, Estimator]:
    estimate, optimizer = estimator(trainer.mode if mode is None else mode), trainer.inner_optimizer
    state = None if _of_torch(optimizer) else trainer.update.read_state()
    networks = trainer.teacher, trainer.student, prepare(trainer.problem, estimate)
    options = trainer.clip_norm, trainer.accumulate, trainer.generator, RandomState.now(trainer.device)
    given: tuple[Any, ...] = (*networks, optimizer, state, *_batches(labeled, unlabeled), *options)
    return Step(*given), estimate


def _batches(labeled: Any, unlabeled: Any) -> tuple[Any, list[Any]]:
    """Copies: a slice would be copied with all of the tensor that it is one of."""
    ahead = unlabeled if isinstance(unlabeled, Lookahead) else [unlabeled]
    given = [plain(labeled), *(plain(ahead[i]) for i in range(min(len(ahead), STEPS)))]
    labeled, *batches = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given)
    return labeled, batches


def _of_torch(optimizer: Any) -> list[Any]:
    """The optimizers of ``torch.optim``; none of a transform."""
    parts = [*optimizer] if isinstance(optimizer, tuple | list) else [optimizer]
    return parts if all(isinstance(part, torch.optim.Optimizer) for part in parts) else []


# ------------------------------------------------------------------------------------------------- F, by real steps


@dataclass
class Run:
    """One evaluation of F, and what was met on the way."""

    copies: Step
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    inner: float = 0.0  # the first step's loss
    signals: list[Signal] = field(default_factory=list)  # of each micro-batch of each step, with the teacher's graph
    outputs: list[Tensor] = field(default_factory=list)
    labeled: list[Tensor] = field(default_factory=list)  # the student's outputs on the outer batch
    gradients: dict[str, Tree] = field(default_factory=dict)  # of the first inner loss and of the outer loss
    states: list[Tree] = field(default_factory=list)  # buffers and frozen parameters before each pass
    written: set[str] = field(default_factory=set)  # weights of the student that a pass or a loss has moved


@dataclass(frozen=True)
class Step:
    """What a step is computed from: as it was given, or copies of it, each of which serves one evaluation."""

    teacher: nn.Module | None
    student: nn.Module
    problem: Problem
    optimizer: Any
    state: Any
    labeled: Any
    batches: list[Any]
    clip_norm: float | None
    accumulate: int
    generator: torch.Generator | None
    random: RandomState
    own: tuple[Tensor, ...] = ()  # what the problem holds that requires a gradient

    def copied(self, dtype: torch.dtype | None = None) -> Step:
        """Copies that share what the originals share, with all tensors of floating point in ``dtype``."""
        memo: dict[int, Any] = {}
        for network in (self.teacher, self.student, self.problem):
            for part in network.modules() if isinstance(network, nn.Module) else ():
                # Results in attributes, such as the old weight_norm's, which deepcopy refuses.
                memo |= {id(t): t.detach().clone() for t in vars(part).values() if isinstance(t, Tensor) and t.grad_fn}
        teacher, student = copy.deepcopy((self.teacher, self.student), memo)
        before = set(memo)
        problem = copy.deepcopy(self.problem, memo)
        own = [t for i, t in memo.items() if i not in before and isinstance(t, Tensor) and t.requires_grad]
        state, labeled, batches = copy.deepcopy((self.state, self.labeled, self.batches), memo)
        for t in memo.values() if dtype is not None else ():
            if isinstance(t, Tensor) and t.is_floating_point():
                t.grad, t.data = None, t.data.to(dtype)
        memory = {p.untyped_storage().data_ptr(): p for p in trainable(self.student).values()}
        for t in memo.get(id(memo), ()):  # tensors in the memory of a parameter, whose copy has memory of its own
            if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and t.untyped_storage().data_ptr() in memory:
                p = memory[t.untyped_storage().data_ptr()]
                begin = t.storage_offset() - p.storage_offset()
                memo[id(t)].data = memo[id(p)].data.as_strided(t.shape, t.stride(), begin)
        # Built anew: a copy of an optimizer may hold a step() that is bound to the first one.
        rebuilt = tuple(_rebuilt(one, memo) for one in _of_torch(self.optimizer)) or (self.optimizer,)
        optimizer = rebuilt if len(rebuilt) > 1 else rebuilt[0]
        options = self.clip_norm, self.accumulate, self.generator and self.generator.clone_state(), self.random
        return Step(teacher, student, problem, optimizer, state, labeled, batches, *options, tuple(own))

    def learned(self) -> Tree:
        """All parameters of the teacher and of the problem."""
        taught = {} if self.teacher is None else trainable(self.teacher)
        return {**taught, **{f"the problem's parameter {i}": t for i, t in enumerate(self.own)}}

    def by_mode(self, mode: Mode) -> Any:
        """The mode's own gradient."""
        case = self.copied()
        case.random.restore()
        inner = Lookahead(case.batches) if len(case.batches) > 1 else case.batches[0]
        given = {"labeled": case.labeled, "unlabeled": inner, "mode": mode, "problem": case.problem}
        given |= {"inner_optimizer": case.optimizer, "inner_state": case.state, "generator": case.generator}
        options = {"accumulate": case.accumulate, "clip_norm": case.clip_norm}
        return hypergradient(case.teacher, case.student, **given, **options)  # type: ignore[arg-type]

    def taken(
        self,
        moved: str = "",
        by: Tree | None = None,
        side: float = 0.0,
        *,
        told: list[Signal] | None = None,
        seen: list[Tensor] | None = None,
        held: list[Tree] | None = None,
        steps: bool = True,
    ) -> Run:
        """Take the steps on fresh copies.

        Args:
            moved, by, side: the ``"teacher"`` with the problem's parameters, fields of the ``"signal"``, or the
                student's weights at the ``"start"`` or the ``"end"`` by ``side`` times ``by``; ``"weights"``: these
                are ε, and the inner losses count 1 + ε times.
            told: signals in the place of the teacher's.
            seen: the student's outputs as the teacher is given them, constants to every mode.
            held: buffers and frozen parameters with which passes begin.
            steps: False: for L(θ).
        """
        case, device, parts = self.copied(), self.random.device, self.accumulate
        problem, student, teacher, theta, run = (
            case.problem,
            case.student,
            case.teacher,
            trainable(case.student),
            Run(case),
        )
        advance, by = _stepper(case, theta), by or {}
        first = problem.signal_of_batch or enters_input(problem)  # the teacher is asked before the student runs

        def move(what: str, tree: Any) -> None:
            with torch.no_grad():
                for name, d in by.items() if what == moved else ():
                    tree[name].add_(d, alpha=side)

        def begin(network: nn.Module | None) -> None:
            named = [] if network is None else [*network.named_buffers(), *network.named_parameters()]
            still = {name: t for name, t in named if not t.requires_grad}
            for name, t in ({} if held is None else held[len(run.states)]).items():
                if name in still:
                    still[name].copy_(t)
            run.states.append({name: t.detach().clone() for name, t in still.items()})

        def ask(x: Any, z: Any) -> Signal:
            begin(teacher)
            z = z if z is None or seen is None else seen[len(run.signals)]
            return problem.signal(teacher or nn.Module(), x, z, generator=case.generator)

        def heard(given: Signal) -> Signal:
            """What the student learns from, of what the teacher says about a micro-batch."""
            k, i = divmod(len(run.signals), parts)
            run.signals.append(given)
            signal = given if told is None else told[len(run.signals) - 1]
            shift = {name: side * d for (step, name), d in by.items() if step == k} if moved == "signal" else {}
            whole = signal.fields()
            rows = {n: d if d.shape == whole[n].shape else d.chunk(parts)[i] for n, d in shift.items()}
            return signal.having({name: whole[name] + d for name, d in rows.items()})

        def compare(before: Tree) -> None:
            run.written.update(name for name, p in theta.items() if not _same(p, before[name]))

        move("teacher", case.learned())
        move("start", theta)
        case.random.restore()
        for number, batch in enumerate(case.batches):
            pieces, before = micro_batches(batch, parts, "unlabeled"), {n: p.detach().clone() for n, p in theta.items()}
            said = ask(batch, None).chunks(parts) if problem.signal_of_batch else []
            answers = [heard(said[i] if said else ask(x, None)) for i, x in enumerate(pieces)] if first else []
            for i, x in enumerate(pieces):
                begin(student)
                z = student(problem.student_input(x, *answers[i : i + 1] if enters_input(problem) else ()))
                after = RandomState.now(device)
                run.outputs.append(z.detach())
                signal = answers[i] if first else heard(ask(x, z.detach()))
                losses = problem.inner_loss(z, signal.detached(), x, theta)
                if moved == "weights":
                    eps = side * by[moved]
                    losses = losses * (1 + (eps.chunk(parts)[i] if eps.ndim else eps))
                (losses.mean() / parts).backward()
                run.inner += 0.0 if number else float(losses.detach().mean()) / parts
            compare(before)
            grads = {name: p.grad for name, p in theta.items() if p.grad is not None}
            run.gradients.setdefault("start", {name: g.clone() for name, g in grads.items()})
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_([p for name, p in theta.items() if name in grads], case.clip_norm)
            if steps:
                advance(grads)
            student.zero_grad()
        move("end", theta)
        before, pairs = {n: p.detach().clone() for n, p in theta.items()}, []
        after.branch().restore()  # the labeled pass draws from a stream of its own
        for part in micro_batches(problem.outer_batch(case.labeled), parts, "labeled"):
            begin(student)
            run.labeled.append(student(problem.outer_input(part)))
            pairs.append(sum_and_weight(problem.outer_loss(run.labeled[-1], part)))
        compare(before)
        run.loss = torch.stack([total for total, _ in pairs]).sum() / sum(weight for _, weight in pairs)
        if not moved and run.loss.requires_grad:
            run.loss.backward()
            run.gradients["end"] = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theta.items()}
        run.loss = run.loss.detach()
        return run


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _rebuilt(optimizer: Any, memo: dict[int, Any]) -> Any:
    """An optimizer over the copies of its parameters."""
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise MetaplError("step() of the inner optimizer was replaced on the object; expected that of its class.")
    groups = [{**group, "params": [memo.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups]
    built = type(optimizer)(groups)
    built.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        getattr(built, name).update(getattr(optimizer, name))
    return built


def _stepper(case: Step, theta: Any) -> Callable[[Tree], None]:
    """The real optimizer's step; of a transform, and of Muon, whose own step rounds to bfloat16, metapl's update."""
    many = _of_torch(case.optimizer)
    update = None if many and not any(type(one).__name__ == "Muon" for one in many) else case
    functional: Any = None if update is None else update_of(case.optimizer, theta, case.state)
    state = None if functional is None else functional.read_state()

    def advance(grads: Tree) -> None:
        nonlocal state
        if functional is None:
            for one in many:
                one.step()
            return
        with torch.no_grad():
            new, state = functional.update({name: p.detach() for name, p in theta.items()}, grads, state)
            for name, p in theta.items():
                p.copy_(new[name])

    return advance


# ----------------------------------------------------------------------------------------- gradients and differences


def _error(at: Callable[[Tree, float], float], gradient: Tree, direction: Tree, level: float, eps: float,
           tolerance: float) -> float | None:  # fmt: skip
    """How far ⟨gradient, direction⟩ is from the differences of a function, whose value is ``level``."""
    terms = _flat([gradient[n] * d for n, d in direction.items()])
    predicted, noise, tried = float(terms.sum()), 50 * eps * max(abs(level), 1e-3), list[tuple[float, float, float]]()
    size = max(abs(predicted), float(terms.norm()))
    moves = (1e-5, 1e-6, 1e-4, 1e-7, 1e-3, 1e-8) if eps < EPS32 else (1e-3, 1e-2, 3e-2)
    ladder = [move for move in moves if noise / move <= tolerance * size]  # on which rounding leaves the tolerance
    for move in ladder + sorted(set(moves) - {*ladder}, reverse=True):
        blind = noise / move
        if tried and blind > 0.1 * size:
            continue
        found = (at(direction, move) - at(direction, -move)) / (2 * move)
        gap, reach = abs(found - predicted), max(size, abs(found))
        if max(gap, reach) <= blind:  # both are zero, or what is not drowns
            return 0.0 if abs(predicted) <= noise else None
        if blind > 0.1 * reach or not math.isfinite(found):
            continue
        if gap <= tolerance * reach + blind:
            return max(gap - blind, 0.0) / reach
        # The errors of kinks, and of a fresh Adam's signs, shrink with the move: two that agree are no such error.
        if any(abs(found - one) + 10 * blind <= 0.2 * min(gap, other) for one, other, _ in tried):
            return max(gap / reach, 2 * tolerance)
        tried.append((found, gap, gap / reach))
    best = min((error for *_, error in tried), default=None)
    return best if best is None or best > APPROXIMATE else min(best, tolerance)


def _flat(tree: Any) -> Tensor:
    leaves = [t.detach() for t in pytree.tree_leaves(tree)]  # sparse ones of embeddings
    return torch.cat([(t.to_dense() if t.is_sparse else t).double().flatten() for t in leaves])


def _size(t: Tensor) -> float:
    return max(float(t.detach().double().square().mean().sqrt()), 1e-2)


# -------------------------------------------------------------------------------------------------------- the verdict


def verified(given: Step, estimate: Any) -> GradientCheck:
    """A mode's gradient of a step beside its definition; nothing of the process is moved."""
    estimate = getattr(estimate, "base", estimate)  # whose feedback a control alters
    plainly = {"normalization": "gradient", "similarity": "dot", "baseline": None, "truncate": None}
    names = {one.name for one in fields(estimate)} if is_dataclass(estimate) else set()
    estimate = replace(estimate, **{name: value for name, value in plainly.items() if name in names})
    if estimate.credits == "nothing":
        return GradientCheck("nothing to verify", f"mode {estimate.name!r} gives no feedback.")
    before = rng_state()
    try:
        with torch.enable_grad(), torch.autocast(given.random.device.type, enabled=False):
            try:
                base = given.copied(torch.float64)
            except (RuntimeError, TypeError, copy.Error) as error:  # locks, files, tensors with a graph
                return GradientCheck("cannot tell", f"the step was not verified: no copies of it ({reason_of(error)}).")
            try:
                return _Verified(base, estimate).judged()
            except (RuntimeError, TypeError):  # of code that runs in its own type alone
                return _Verified(given.copied(), estimate, EPS32).judged()
    finally:
        set_rng_state(before)


class _Verified:
    """The gradient of a mode at one point, beside differences; and what is found where they disagree."""

    def __init__(self, base: Step, estimate: Estimator, eps: float = EPS) -> None:
        self.base, self.estimate, self.learned = base, estimate, base.learned()
        self.found, self.run = base.by_mode(estimate), base.taken()
        self.eps = eps if self.run.loss.dtype == torch.float64 else EPS32
        h, self.told = self.found.feedback, [signal.detached() for signal in self.run.signals]
        named = [t if isinstance(t, dict) else {"": t} for t in (h if isinstance(h, tuple) else (h,))]
        self.h = {(k, field_of(key) if key else "value"): t for k, tree in enumerate(named) for key, t in tree.items()}
        self.sampled = self.told[0].sampled
        self.expected = self.sampled and estimate.credits == "signal"  # the expectation over labels is taken
        if self.expected:
            onehot = [F.one_hot(s.value, s.probs.shape[-1]).to(s.probs) for s in self.told]  # type: ignore[union-attr]
            self.told = [replace(s, value=value) for s, value in zip(self.told, onehot, strict=True)]

    def judged(self) -> GradientCheck:
        name = f"mode {self.estimate.name!r}"
        if fault := self._fault():
            return GradientCheck("refused", f"{name}: {fault} See docs/contract.md.")
        at, errors = self, self.errors()
        if at.off(errors):  # a ReLU at exactly 0 has two slopes; a thousandth of the weights' size away it has one
            base, draw = self.base.copied(), torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in (*base.learned().values(), *trainable(base.student).values()):
                    p.add_(1e-3 * _size(p) * torch.randn(p.shape, generator=draw).to(p))
            at = _Verified(base, self.estimate, self.eps)
            errors = at.errors()
        if at.off(errors) and at._in_float32():
            at.eps = EPS32
            errors = at.errors()
        known, off = {what: error for what, error in errors.items() if error is not None}, at.off(errors)
        if off:
            status, why = at._reason(off)
            why = f"{name} is {known[off[0]]:.2g} off the loss after real steps ({off[0]}): {why} See docs/contract.md."
            return GradientCheck(status, why, known)
        if len(known) < len(errors):
            return GradientCheck("cannot tell", f"{name} was not verified: rounding drowns the loss's change.", known)
        return GradientCheck("right", f"{name} gives the derivative of the loss after real steps.", known)

    @property
    def _tolerance(self) -> float:
        exact = self.estimate.exact or self.sampled or isinstance(self.estimate, Implicit)
        by_difference = "difference" in (self.estimate.name, getattr(self.estimate, "tangent", ""))
        return EXACT if exact and not by_difference and self.eps < EPS32 else APPROXIMATE

    def off(self, errors: Errors) -> list[str]:
        return [what for what, error in errors.items() if error is not None and error > self._tolerance]

    def errors(self, held: list[Tree] | None = None) -> Errors:
        """Of the mode; ``held``: with these states before each pass."""
        errors: Errors = {}
        if type(self.base.problem).revised_signal is Problem.revised_signal:  # else the mode's is that of a later step
            gap = abs(float(self.found.outer_loss) - float(self.run.loss))
            gap /= max(abs(float(self.run.loss)), 1e-3)
            errors["the mode's own L(θ′)"] = max(gap, 2 * APPROXIMATE) if gap > 1000 * self.eps else gap
        if isinstance(self.estimate, Implicit):
            errors |= self._of_implicit(self.estimate)
        elif isinstance(self.estimate, LossDifference):
            before, after, h = float(self.base.taken(steps=False).loss), float(self.run.loss), float(self.h[0, "value"])
            errors["L(θ) − L(θ′)"] = abs(before - after - h) / max(abs(h), 1e-9 * abs(before), 1e-300)
        elif self.sampled and not self.expected:
            errors |= self._of("weights", {"weights": -self.h[0, "value"]}, told=self.told, held=held)
        elif self.expected or not self.learned:
            errors |= self._of_signal(held)
        else:
            errors |= self._of("teacher", self._gradient(), held=held)
        if self.learned and (self.sampled or isinstance(self.estimate, Implicit)):
            errors |= self._of_score(self._gradient()) | self._past_the_signal()
        return errors

    def _of(self, moved: str, gradient: Tree, what: str = "", *, score: bool = False, **options: Any) -> Errors:
        """Of a gradient of F, or of the score, in what is moved: along itself, and in a random direction."""

        def value(run: Run) -> float:
            pairs = zip(run.signals, self.run.signals, strict=True)
            if self.sampled and not all(torch.equal(a.value, b.value) for a, b in pairs):
                return math.nan  # other labels were drawn there
            return run.inner if moved == "start" else float(self._score(run.signals).detach() if score else run.loss)

        def at(direction: Tree, side: float) -> float:
            return value(self.base.taken(moved, direction, side, seen=self.run.outputs, **options))

        draw, given = torch.Generator().manual_seed(0), (value(self.run), self.eps, self._tolerance)
        theta: Tree = {**trainable(self.base.student)} if moved in ("start", "end") else self.learned
        signs = {n: torch.randint(0, 2, g.shape, generator=draw).to(g) * 2 - 1 for n, g in gradient.items()}
        direction = {n: t * (_size(theta[n]) if n in theta else 1.0) for n, t in signs.items()}
        what, length = what or f"the {moved}", float(_flat(gradient).norm())
        errors: Errors = {}
        if length > 0 and len(_flat(gradient)) > 1:
            along = {n: g * float(_flat(direction).norm()) / length for n, g in gradient.items()}
            errors[f"{what}, along the gradient"] = _error(at, gradient, along, *given)
        return errors | {f"{what}, in a random direction": _error(at, gradient, direction, *given)}

    def _past_the_signal(self) -> Errors:
        """That F does not move with the teacher while its signal is held."""
        zero = {name: torch.zeros_like(t) for name, t in self.learned.items()}
        return self._of("teacher", zero, "the teacher with its signal held", told=self.told)

    def _of_signal(self, held: list[Tree] | None = None) -> Errors:
        """Of h, in the signal's values."""
        return self._of("signal", {name: -h for name, h in self.h.items()}, told=self.told, held=held)

    def _of_score(self, gradient: Tree) -> Errors:
        """Of a gradient of −Σ h·signal in the teacher."""
        return self._of("teacher", gradient, "the signal in the teacher", score=True, told=self.told)

    def _score(self, signals: list[Signal]) -> Tensor:
        """−Σ h·signal, whose gradient is the teacher's."""
        parts, terms = self.base.accumulate, []
        for number, signal in enumerate(signals):
            for (k, name), h in self.h.items():
                t = signal.fields()["probs" if self.expected else "log_prob" if self.sampled else name]
                rows = h if not h.ndim or h.shape == t.shape else h.chunk(parts)[number % parts]
                terms += [-(rows * t).sum()] if number // parts == k else []
        return torch.stack(terms).sum()

    def _gradient(self, own: bool = False) -> Tree:
        """The mode's gradient in the teacher, and in the problem's parameters that of its h; ``own``: in both."""
        if not own and not self.base.own:
            return dict(self.found.grads)
        score, learned = self._score(self.run.signals), self.run.copies.learned()
        g = torch.autograd.grad(
            score, [*learned.values()], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(learned, g, strict=True)) | ({} if own else self.found.grads)

    def _of_implicit(self, mode: Implicit) -> Errors:
        """h beside double backward, with w by its solver from Hessian products of double backward."""
        case, signal = self.base.copied(), joined_signals(self.told)  # of the micro-batches of one step
        at = {n: t.requires_grad_() for n, t in signal.fields().items() if (0, n) in self.h}
        theta, batch = trainable(case.student), case.batches[0]
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            v = self.base.taken(steps=False).gradients["end"]
            case.random.restore()
            z = case.student(case.problem.student_input(batch))
            loss = case.problem.inner_loss(z, signal.having(at), batch, theta).mean()
            g = torch.autograd.grad(loss, [*theta.values()], create_graph=True, materialize_grads=True)

            def mixed(w: Tree, leaves: Any) -> Any:  # ∂⟨g, w⟩
                along = torch.stack([(a * w[name]).sum() for name, a in zip(theta, g, strict=True)]).sum()
                return torch.autograd.grad(along, leaves, retain_graph=True, materialize_grads=True, allow_unused=True)

            def hessian(w: Tree) -> Tree:
                return dict(zip(theta, mixed(w, [*theta.values()]), strict=True))

            rate = mode.step_size or update_of(case.optimizer, theta, case.state).learning_rate or 0.0
            w = {name: float(mode.step_size or 1.0) * t for name, t in v.items()}
            if mode.solver == "cg":
                w = conjugate_gradient(hessian, v, mode.iterations, float(mode.damping))
            elif mode.solver == "neumann":
                w = neumann(hessian, v, mode.iterations, float(rate), float(mode.damping))
            left = _flat([t + mode.damping * w[name] - v[name] for name, t in hessian(w).items()]).norm()
            exact, h = _flat(mixed(w, [*at.values()])), _flat([*self.h.values()])
        LOG.info("(H + damping) w = -v is solved up to %.2g of v.", float(left / _flat(v).norm()))
        return {"h beside double backward": float((h - exact).norm() / exact.norm().clamp_min(1e-300))}

    # ------------------------------------------------------------------------------------- what is wrong, and why

    def _fault(self) -> str:
        """What is against the contract whatever the differences say."""
        run, parts = self.run, self.base.accumulate
        if run.written:
            return f"a pass of the student, or a loss, writes to its weights ({few(sorted(run.written), 3)})."
        for signal in self.run.signals if self.sampled else ():
            log_prob, probs, value = signal.log_prob, signal.probs, signal.value
            if log_prob is None or value.is_floating_point() or value.shape != log_prob.shape:
                continue
            if probs is not None and probs.shape[:-1] == value.shape:
                right = probs.gather(-1, value[..., None])[..., 0].log()
                if not torch.allclose(log_prob, right, 1e-6, max(1e-6, 10 * self.eps)):
                    return "log_prob is not the logarithm of probs at the value that was drawn."
            if bool((log_prob > 1e-6).any()):
                return "log_prob is above 0, so it is no logarithm of a probability."
        if parts > 1 and len(self.base.batches) == 1:
            case, signal, z = self.base.copied(), joined_signals(self.told), torch.cat(run.outputs)
            inner = case.problem.inner_loss(z, signal, case.batches[0], trainable(case.student)).mean()
            whole = case.problem.outer_loss(torch.cat(run.labeled), case.problem.outer_batch(case.labeled))
            total, weight = sum_and_weight(whole)
            pairs = {"inner_loss": (float(inner.detach()), run.inner)}
            pairs["outer_loss"] = float((total / weight).detach()), float(run.loss)
            for name, (a, b) in pairs.items():
                if abs(a - b) > max(1e-6, 100 * self.eps) * max(abs(a), abs(b)):
                    return f"{name} is {a:.6g}, and {b:.6g} by micro-batches: no mean over examples, nor (sum, weight)."
        return ""

    def _in_float32(self) -> bool:
        """Whether F, which is the same twice, is less smooth than in float64."""
        tiny = {name: torch.ones_like(t) for name, t in self.learned.items()}
        at = [float(self.base.taken("teacher", tiny, n * 1e-13, seen=self.run.outputs).loss) for n in (1, 2, 3)]
        rough = max(abs(loss - float(self.run.loss)) for loss in at) > 1e-11 * max(abs(float(self.run.loss)), 1e-3)
        return bool(tiny) and rough and self.base.taken().loss.equal(self.run.loss)

    def _reason(self, off: list[str]) -> tuple[Status, str]:
        """Whether it is off for a good reason; else the likely causes."""
        if any(not self.base.taken().loss.equal(self.run.loss) for _ in range(3)):
            return (
                "refused",
                "two equal steps differ: random numbers that are not torch's default generator's, or state.",
            )
        if not self.off(self.errors(held=self.run.states)):
            return "allowed", "state that passes carry on (buffers, frozen parameters) depends on the weights."
        if self.learned and self.off(self._past_the_signal()):
            return "refused", (
                "the loss moves with the teacher, or a tensor of the problem that requires a gradient, while the "
                "signal is held: there is a way past the signal."
            )
        if off[0].startswith("the signal in the teacher") and not self.expected:
            return "refused", "the gradient of log_prob in the teacher is not its derivative: is it detached in part?"
        if off[0] == "the mode's own L(θ′)":
            return "refused", f"likely {'; '.join(self._causes()) or 'a tensor in the memory of a weight'}."
        scored = self.learned and (self.expected or not self.sampled)
        if scored and not self.off(self._of_signal()):
            if not self.off(self._of_score(self._gradient(own=True))):
                return "refused", "h is right, and the mode's gradient in the teacher is not that of h."
            if names := _functions(self._score(self.run.signals)):
                return "refused", f"the backward of {few(names)} in the signal is not the derivative of its forward."
            return "allowed", "the signal is detached in part (detach, no_grad, argmax), which leaves out that part."
        at = {"inner": "start", "outer": "end"}
        bent = [n for n, w in at.items() if self.off(self._of(w, self.run.gradients[w], told=self.told))]
        which = f"the gradient of the {' and '.join(bent)} loss in the student's weights is not its derivative"
        if bent and self._as_another():
            return "allowed", f"{which} (straight-through, detached, a backward of its own), and the mode follows it."
        return "refused", f"likely {'; '.join([which] * bool(bent) + self._causes()) or 'the mode itself'}."

    def _as_another(self) -> bool:
        """Whether h is that of double backward on the same copies; of ``unrolled`` itself, that of forward mode."""
        base, other = self.base, estimator("forward" if self.estimate.name == "unrolled" else "unrolled")
        if self.expected:
            return True  # no other mode differentiates at labels that were drawn
        if self.sampled:
            weighted = _Weighted(base.problem, joined_signals(self.told))
            base = replace(base, teacher=None, problem=weighted, accumulate=1)
        try:
            h, reference = _flat([*self.h.values()]), _flat(base.by_mode(other).feedback)
        except (RuntimeError, MetaplError):  # of an operation without that derivative
            return other.name == "forward"
        reference = reference.sum()[None] if self.sampled and len(h) == 1 else reference
        return float((h - reference).norm()) <= self._tolerance * float(reference.norm())

    def _causes(self) -> list[str]:
        after, causes = self.run.copies, list[str]()
        pairs = (("student", self.base.student, after.student), ("teacher", self.base.teacher, after.teacher))
        for who, one, other in pairs:
            parts = {} if one is None else dict(one.named_modules())
            now = {} if other is None else dict(other.named_modules())
            hooked = [name or who for name, m in parts.items() if m._forward_hooks or m._backward_hooks]
            moved = [f"{name}.{key}" for name in parts for key in _changed(vars(parts[name]), vars(now.get(name, one)))]
            causes += [f"hooks of the {who} ({few(hooked, 3)})"] * bool(hooked)
            causes += [f"attributes of the {who} that a pass changes ({few(moved, 3)})"] * bool(moved)
        leaves = [pytree.tree_leaves([case.batches, case.labeled]) for case in (self.base, after)]
        written = any(isinstance(a, Tensor) and not _same(a, b) for a, b in zip(*leaves, strict=True))
        names, agree = _functions(self.run.labeled[0]), list[str]()
        causes += ["a batch that is changed in place"] * written
        causes += [f"autograd functions of the student's own ({few(names, 3)})"] * bool(names)
        for mode in map(estimator, ("unrolled", "forward", "difference") if not self.sampled else ()):
            try:
                other_mode = _Verified(self.base, mode)
                agree += (
                    [mode.name] if mode.name != self.estimate.name and not other_mode.off(other_mode.errors()) else []
                )
            except (RuntimeError, MetaplError):  # no error of the mode that is verified
                continue
        return causes + [f"a derivative that {few(agree)}, which is right here, does not take"] * bool(agree)


class _Weighted(Problem):
    """The inner losses times weights of 1 on a signal that is given, whose h is −dL/d(weights)."""

    has_teacher = False

    def __init__(self, problem: Problem, told: Signal) -> None:
        self.problem, self.told = problem, told
        self.outer_batch, self.outer_input = problem.outer_batch, problem.outer_input  # type: ignore[method-assign]

    def student_input(self, batch: Any) -> Any:
        return self.problem.student_input(batch, *(self.told,) if enters_input(self.problem) else ())

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(student_outputs.new_ones(len(student_outputs)))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        losses: Tensor = signal.value * self.problem.inner_loss(outputs, self.told, batch, params)
        return losses

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return self.problem.outer_loss(outputs, batch)


def _changed(before: Any, after: Any) -> list[str]:
    """The attributes that differ: numbers, texts and tensors, and the lengths of containers."""
    names = []
    for name in sorted({*before, *after} - {"_parameters", "_buffers", "_modules"}):
        a, b = before.get(name), after.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            differ = not _same(a, b)
        elif isinstance(b, Tensor | bool | int | float | str | None):
            differ = type(a) is not type(b) or bool(a != b)
        else:
            differ = isinstance(a, list | dict | set) and isinstance(b, list | dict | set) and len(a) != len(b)
        names += [name] * differ
    return names


def _functions(t: Tensor) -> list[str]:
    """The names of autograd functions of one's own in a graph."""
    nodes, seen, found = [t.grad_fn], set[Any](), set[str]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {type(node).__name__.removesuffix("Backward")} if hasattr(node, "_forward_cls") else set()
            nodes += [other for other, _ in node.next_functions]
    return sorted(found)
