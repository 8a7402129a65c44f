"""A mode's gradient beside plain double backward, on copies of one's own networks, problem and optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, either, few, reason_of
from metapl.execution.layout import layouts
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import Altered, Estimator, Implicit, Mode, estimator
from metapl.feedback.compatible import prepare
from metapl.feedback.hypergradient import Hypergradient, hypergradient
from metapl.feedback.inner_step import read_batch
from metapl.feedback.path import inner_batches
from metapl.problems.base import BilevelProblem, Problem, Signal, enters_input, kind_of
from metapl.runs.fields import Range, check_arguments
from metapl.runs.generators import rng_state, set_rng_state
from metapl.training.trainer import BilevelTrainer
from metapl.updates import Clipped, unwrapped, update_of
from metapl.words import short, summary, wrapped

Tree = dict[str, Tensor]

ROUNDING, APPROXIMATION = 1e-6, 1e-2
"""How far an exact mode may be from double backward in float64, and any other that draws nothing; relative errors."""

MOVES, OFF_BY_MOVE = (1e-5, 1e-6, 1e-7), 1e-2
"""Moves of weights for a difference of real losses, over their root mean square, and how far the gradient may be from
it: ReLUs that switch within the move stay far below. What is further off is moved by less: a first step of Adam is the
sign of a gradient, whatever its size, and some of these change theirs within a long move."""

SEED = 0  # of dropout masks, the same in every pass, and of the first draw of labels


@dataclass(frozen=True)
class Agreement:
    """A gradient a beside the exact one, b.

    Args:
        relative_error: ‖a − b‖ / ‖b‖; of one parameter, over 1e-6 of the whole gradient's norm where that is greater.
        cosine: of the angle between them; NaN where one is zero.
        scale: ‖a‖ / ‖b‖; of a mean over draws ⟨a, b⟩ / ‖b‖², into which noise does not enter.
    """

    relative_error: float
    cosine: float
    scale: float

    @staticmethod
    def between(a: Tensor, b: Tensor, least: float = 0.0) -> Agreement:
        a, b = _flat(a), _flat(b)
        of_a, of_b, error = float(a.norm()), float(b.norm()), float((a - b).norm())
        relative = error / max(of_b, least, 1e-300) if error else 0.0
        angle = float(torch.dot(a / of_a, b / of_b)) if of_a and of_b else math.nan
        return Agreement(relative, angle, of_a / of_b if of_b else math.nan)

    def __str__(self) -> str:
        return f"error {self.relative_error:8.2g}   cosine {self.cosine:9.6f}   length {self.scale:7.4g}"


@dataclass(frozen=True, repr=False)
class GradientCheck:
    """The result of :func:`check_gradient`; ``print`` says it in words.

    Args:
        mode: its name.
        exact: whether the mode is to give the whole gradient, but for rounding.
        dtype: of the student's weights, or of its passes under autocast.
        overall: the mode's gradient in all of the teacher's weights (of a problem without a teacher, in the signal)
            beside double backward by hand, both in float64. Of a mode that draws labels, the mean over the draws.
        parameters: the same for each parameter of the teacher.
        rounded_by_hand: double backward by hand in ``dtype``: what rounding alone does.
        rounded, rounded_parameters: as ``overall`` and ``parameters``, of the mode in ``dtype``.
        feedback: as ``overall``, of h, minus the gradient in the signal's value.
        by_difference: how far the gradient by hand is from differences of the labeled loss after real steps, along
            random moves of the teacher's weights, relative to what such moves change and beyond what rounding leaves of
            them; None where steps are truncated or there is no teacher.
        inner_by_difference: the same of ``inner_loss`` and its gradient in the student's weights: what is detached on
            purpose is there too, so it is told and not judged.
        unreached: the teacher's parameters that no gradient reaches although the loss moves with them.
        draws: of labels; 1 where none are drawn. Where they are, what is about one gradient above is None or empty.
        standard_error: of the cosine of the mean over the draws.
        expected: what is expected of the mode, in words.
        passed: whether that holds in float64; None where ``draws`` are too few to tell.
        verdict: in words, why.
    """

    mode: str
    exact: bool
    dtype: torch.dtype
    overall: Agreement
    parameters: dict[str, Agreement]
    rounded_by_hand: Agreement
    rounded: Agreement | None = None
    rounded_parameters: dict[str, Agreement] = field(default_factory=dict)
    feedback: Agreement | None = None
    by_difference: float | None = None
    inner_by_difference: float | None = None
    unreached: tuple[str, ...] = ()
    draws: int = 1
    standard_error: float | None = None
    expected: str = ""
    passed: bool | None = None
    verdict: str = ""

    def __repr__(self) -> str:
        error, cosine = self.overall.relative_error, self.overall.cosine
        return summary("GradientCheck", mode=repr(self.mode), passed=self.passed, relative_error=error, cosine=cosine)

    def __str__(self) -> str:
        own = _name(self.dtype)
        rows = {f"mean of {self.draws} draws" if self.draws > 1 else f"{self.mode}, float64": self.overall}
        rows |= {"its feedback, float64": self.feedback} if self.feedback else {}
        if self.parameters:
            worst = max(self.parameters, key=lambda name: self.parameters[name].relative_error)
            rows[f"worst: {short(worst, 20)}"] = self.parameters[worst]
        rows |= {f"{self.mode}, {own}": self.rounded} if self.rounded else {}
        rows[f"by hand, {own}"] = self.rounded_by_hand
        said = {True: "passed", False: "FAILED", None: "not known"}[self.passed]
        of_draws = f", ± {self.standard_error:.2g} in the cosine" if self.standard_error is not None else ""
        head = f"{self.mode}: {said}. {self.verdict}\nBeside double backward by hand in float64{of_draws}:"
        return wrapped("\n".join([head, *(f"  {name:<27} {row}" for name, row in rows.items())]))


def check_gradient(
    teacher: BilevelTrainer | nn.Module | None,
    student: nn.Module | None = None,
    *,
    labeled: Any = None,
    unlabeled: Any = None,
    outer: Any = None,
    inner: Any = None,
    mode: Mode | None = None,
    problem: BilevelProblem | None = None,
    inner_optimizer: Any = None,
    inner_state: Any = None,
    draws: Annotated[int, Range(2, of="a number of draws")] = 100,
) -> GradientCheck:
    r"""Compare a mode's gradient with the same one by plain double backward, for one's own problem or estimator.

    .. math:: \theta_S' = U\big(\theta_S, \nabla_{\theta_S} \tfrac1B \textstyle\sum_i \ell_i\big), \qquad
              a = \text{the mode's},\ b = \text{autograd's}\ \ \frac{dL(\theta_S')}{d\theta_T}, \qquad
              \frac{\|a - b\|}{\|b\|}

    What is compared with is written out in this file with plain torch: the student's steps through
    ``torch.func.functional_call``, the update rules of SGD, Adam and AdamW from their formulas, TorchOpt transforms by
    their own updates, and one graph from the labeled loss to the teacher's weights. That graph goes through the
    problem's own code, so it is compared in turn with differences of the labeled loss after real steps, which see a
    signal that is detached from a part of the teacher, and an operation whose backward is not that of its forward.

    Everything runs on copies on the CPU, in float64 and in the type that the networks have, with dropout masks of one
    seed: weights, buffers, gradients, optimizers, random number generators stay as they are. Of a trainer, its
    ``clip_norm`` and ``precision`` count; micro-batches are taken as one batch.

    Args:
        teacher, student: as for :func:`metapl.hypergradient`; or a :class:`metapl.BilevelTrainer` alone, with its
            problem and its inner optimizer in their present state.
        labeled, unlabeled: the batches of one step, as for :meth:`metapl.BilevelTrainer.step`; also ``outer``,
            ``inner``. A :class:`metapl.Lookahead` of several for several student steps.
        mode: default: the trainer's own, and ``"forward"`` without one.
        problem, inner_optimizer, inner_state: as for :func:`metapl.hypergradient`.
        draws: of labels, where the mode samples them: their mean is compared with the gradient of the problem's
            differentiable form (:meth:`metapl.problems.Problem.exact`).

    Returns: a :class:`GradientCheck`; its ``passed`` is for a test.

    Cost: two passes of the mode, two double backward passes and twelve plain steps on the CPU; for drawn labels
    ``draws`` passes of the mode.

    Raises: :class:`metapl.MetaplError` before anything moves: for what :func:`metapl.hypergradient` refuses; for modes
    that have another gradient on purpose (``none``, ``implicit``, altered feedback); for what cannot be copied, or not
    to float64, by name; in several processes.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="forward")
    >>> check_gradient(trainer, labeled=(torch.randn(5, 4), torch.arange(5) % 3), unlabeled=torch.randn(6, 4)).passed
    True
    """
    labeled, unlabeled = either(labeled=labeled, outer=outer), either(unlabeled=unlabeled, inner=inner)
    clip, bfloat16 = None, False
    if isinstance(teacher, BilevelTrainer):
        trainer, own = teacher, (student, problem, inner_optimizer, inner_state)
        if any(thing is not None for thing in own):
            raise MetaplError(
                "check_gradient was given a trainer, and a student, problem, inner_optimizer or inner_state beside it; "
                "expected the trainer alone, whose own ones are checked, with the batches and a mode."
            )
        teacher, student, problem = *trainer.given, trainer.given_problem
        inner_optimizer, clip, bfloat16 = trainer.inner_optimizer, trainer.clip_norm, trainer.precision == "bfloat16"
        if inner_optimizer not in trainer.schedulable:  # a transform, whose state the trainer holds
            inner_state = trainer.update.read_state()
        mode = trainer.mode if mode is None else mode
    estimate = estimator("forward" if mode is None else mode)
    check_arguments(check_gradient, locals())
    if student is None or labeled is None or unlabeled is None or inner_optimizer is None:
        raise MetaplError(
            "check_gradient takes a trainer, or teacher, student and inner_optimizer; and the batches of one step: "
            "check_gradient(trainer, labeled=(x, y), unlabeled=x_u)."
        )
    if estimate.credits == "nothing" or isinstance(estimate, Implicit | Altered):
        raise MetaplError(
            f"mode {estimate.name!r} is not meant to give the gradient through the student's step: it gives none, an "
            "altered one, or that of an optimum; expected another mode, such as 'forward'."
        )
    of_teacher, of_student, _ = layouts(teacher, student)
    if of_student.is_sharded or not of_student.ranks.alone:
        raise MetaplError("check_gradient runs in one process; expected networks that are neither sharded nor in DDP.")
    networks = None if of_teacher is None else of_teacher.network, of_student.network
    update = unwrapped(inner_optimizer), inner_state
    before = rng_state()
    try:
        case = _Case(*networks, prepare(problem, estimate), *update, labeled, unlabeled, clip)
        return _checked(case, estimate, draws, bfloat16)
    finally:
        set_rng_state(before)


# ---------------------------------------------------------------------------------------------- double backward by hand


@dataclass(frozen=True)
class _Run:
    """L(θ′), what was met on the way to it, and its gradients in the teacher's weights and in the signals' values."""

    loss: Tensor
    signals: list[Signal]
    outputs: list[Tensor]  # of the student in each step, and on the labeled batch
    inner_loss: Tensor  # of the first step, and its gradient in the student's weights
    inner_grads: Tree
    grads: Tree = field(default_factory=dict)
    feedback: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Case:
    """What a gradient is computed from: as it was given, or copies of it, each of which serves one computation."""

    teacher: nn.Module | None
    student: nn.Module
    problem: Problem
    inner_optimizer: Any
    inner_state: Any
    labeled_batch: Any
    unlabeled_batch: Any
    clip_norm: float | None

    def copied(self, dtype: torch.dtype | None = None) -> _Case:
        """Copies on the CPU that share what the originals share, with all floating-point tensors in ``dtype``, also
        those that modules and problems hold as attributes; None: each in its own type."""
        transform = self.inner_optimizer  # of functions, if it is one of TorchOpt's
        memo: dict[int, Any] = {id(transform): transform} if isinstance(transform, tuple) else {}
        copies: dict[str, Any] = {}
        for name, thing in vars(self).items():
            try:
                copies[name] = copy.deepcopy(thing, memo)
            except Exception as error:
                raise MetaplError(
                    f"check_gradient computes on copies, and the {name.replace('_', ' ')} cannot be copied: "
                    f"{reason_of(error)}. Expected objects that copy.deepcopy takes: without tensors that have a "
                    "graph, generators, locks or files."
                ) from error
        # The memo has every tensor that was copied, wherever it was found.
        for t in [t for t in memo.values() if isinstance(t, Tensor)]:
            t.grad = None
            t.data = t.data.to("cpu", dtype if t.is_floating_point() else None)
        return _Case(**copies)

    def by_mode(self, estimate: Estimator, seed: int = SEED) -> Hypergradient:
        update = update_of(self.inner_optimizer, _trained(self.student), self.inner_state)
        torch.default_generator.manual_seed(SEED)
        return hypergradient(
            self.teacher,
            self.student,
            labeled=self.labeled_batch,
            unlabeled=self.unlabeled_batch,
            mode=estimate,
            problem=self.problem,
            inner_optimizer=update if self.clip_norm is None else Clipped(update, self.clip_norm),
            generator=torch.Generator().manual_seed(seed),
        )

    def labeled_loss(self, truncate: int | None = None, seen: Sequence[Tensor] = ()) -> _Run:
        """L(θ′) with its graph to the teacher's weights: the inner pass, the teacher, the step, the labeled pass.

        Args:
            truncate: steps, from the last, whose signals keep their graph.
            seen: what the signals read in the place of the student's outputs.
        """
        torch.default_generator.manual_seed(SEED)
        generator = torch.Generator().manual_seed(SEED)
        problem, signals, outputs, inner = self.problem, list[Signal](), list[Tensor](), list[tuple[Tensor, Tree]]()
        labeled, batches = read_batch(problem, "outer_batch", self.labeled_batch), inner_batches(self.unlabeled_batch)
        theta: Tree = {**_trained(self.student)}
        step, state = self._update()

        def told(batch: Any, outputs: Any) -> Signal:
            with _named("the problem's signal"):
                teacher = nn.Module() if self.teacher is None else self.teacher
                signal = problem.signal(teacher, batch, outputs, generator=generator)
                signals.append(replace(signal, **pytree.tree_map_only(Tensor, _node, dict(vars(signal)))))
            cut = truncate is not None and len(signals) <= len(batches) - truncate
            return signal.detached() if cut else signals[-1]

        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            for number, batch in enumerate(batches):
                entering = (told(batch, None),) if enters_input(problem) else ()
                with _named("the student"):
                    z = functional_call(self.student, theta, (problem.student_input(batch, *entering),))
                branch = RandomState.now(torch.device("cpu")).branch()  # where L(θ′) draws its masks
                outputs.append(z.detach())
                (signal,) = entering or (told(batch, seen[number] if seen else z.detach()),)
                with _named("the problem's inner_loss"):
                    loss = problem.inner_loss(z, signal, batch, theta).mean()
                    found = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
                g = {name: t for name, t in zip(theta, found, strict=True) if t is not None}
                inner.append((loss.detach(), {name: t.detach() for name, t in g.items()}))
                theta, state = step(theta, _clipped(g, self.clip_norm), state)
            with replayed(branch):
                with _named("the student"):
                    z = functional_call(self.student, theta, (problem.outer_input(labeled),))
                with _named("the problem's outer_loss"):
                    outer: Any = problem.outer_loss(z, labeled)
        loss = outer[0] / outer[1] if isinstance(outer, tuple | list) else outer
        return _Run(loss, signals, [*outputs, z.detach()], *inner[0])

    def by_hand(self, truncate: int | None = None) -> _Run:
        """The same with the gradients of L(θ′)."""
        run, taught = self.labeled_loss(truncate), _trained(self.teacher)
        values = [t for t in pytree.tree_leaves([s.value for s in run.signals]) if t.is_floating_point()]
        with _named("a backward pass"), sdpa_kernel(SDPBackend.MATH):
            found = torch.autograd.grad(run.loss, [*taught.values(), *values], materialize_grads=True)
        return replace(run, grads=dict(zip(taught, found, strict=False)), feedback=[-g for g in found[len(taught) :]])

    def _update(self) -> tuple[Callable[[Tree, Tree, Any], tuple[Tree, Any]], Any]:
        """The student's update by hand, and the optimizer's present state."""
        optimizer, theta = self.inner_optimizer, _trained(self.student)
        if not isinstance(optimizer, torch.optim.Optimizer):
            transform = update_of(optimizer, theta, self.inner_state)
            return transform.update, transform.read_state()
        of_group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        groups = {name: of_group[id(p)] for name, p in theta.items()}
        rule = _sgd if isinstance(optimizer, torch.optim.SGD) else _adam

        def stepped(theta: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
            moved = {name: rule(theta[name], g, state[name], groups[name]) for name, g in grads.items()}
            return theta | {n: p for n, (p, _) in moved.items()}, state | {n: s for n, (_, s) in moved.items()}

        return stepped, {name: dict(optimizer.state.get(p, {})) for name, p in theta.items()}

    def off_by_moves(self, network: str, grads: Tree, run: _Run, move: float = MOVES[0]) -> tuple[float, float, float]:
        r"""How far (f(p + δ) − f(p − δ)) / 2 is from ⟨∇f, δ⟩ along three moves δ of random signs, what rounding leaves
        of it, and the length of ∇f ⊙ δ; f is L(θ′) of the ``"teacher"``'s parameters p, or ℓ of the ``"student"``'s."""
        draw, weights, gaps = torch.Generator().manual_seed(SEED), _trained(getattr(self, network)), []

        def f(delta: Tree, side: int) -> float:
            case = self.copied(torch.float64)
            named = _trained(getattr(case, network))
            with torch.no_grad():
                for name, d in delta.items():
                    named[name].add_(side * d)
            there = case.labeled_loss(seen=run.outputs)
            return float(there.loss.detach() if network == "teacher" else there.inner_loss)

        sizes = {n: move * max(float(weights[n].detach().double().square().mean().sqrt()), 1e-3) for n in grads}
        for _ in range(3):
            signs = {n: torch.randint(0, 2, g.shape, generator=draw).double() * 2 - 1 for n, g in grads.items()}
            delta = {n: sizes[n] * t for n, t in signs.items()}
            terms = torch.cat([(d * grads[n]).flatten() for n, d in delta.items()])
            gaps.append((f(delta, 1) - f(delta, -1)) / 2 - float(terms.sum()))
        loss = run.loss.detach() if network == "teacher" else run.inner_loss
        return math.sqrt(sum(gap**2 for gap in gaps) / 3), 1e-14 * abs(float(loss)), float(terms.norm())


def _trained(network: nn.Module | None) -> dict[str, nn.Parameter]:
    return {} if network is None else {name: p for name, p in network.named_parameters() if p.requires_grad}


def _node(t: Tensor) -> Tensor:
    """A tensor of a signal as a node of its own, whose gradient is not that through other fields."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_(t.is_floating_point())


def _clipped(grads: Tree, most: float | None) -> Tree:
    if most is None:
        return grads
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    return {name: g * (most / (norm + 1e-6)).clamp(max=1.0) for name, g in grads.items()}


def _sgd(p: Tensor, g: Tensor, state: Any, group: Any) -> tuple[Tensor, Any]:
    d = (-g if group["maximize"] else g) + group["weight_decay"] * p
    if group["momentum"]:
        before = state.get("momentum_buffer")
        velocity = d if before is None else group["momentum"] * before + (1 - group["dampening"]) * d
        d, state = d + group["momentum"] * velocity if group["nesterov"] else velocity, {"momentum_buffer": velocity}
    return p - group["lr"] * d, state


def _adam(p: Tensor, g: Tensor, state: Any, group: Any) -> tuple[Tensor, Any]:
    (beta1, beta2), lr, decay, t = group["betas"], group["lr"], group["weight_decay"], float(state.get("step", 0)) + 1
    decoupled = group.get("decoupled_weight_decay", False)
    d = (-g if group["maximize"] else g) + (0 if decoupled else decay * p)
    m = beta1 * state.get("exp_avg", 0) + (1 - beta1) * d
    n = top = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * d.square()
    if group["amsgrad"]:
        before = state.get("max_exp_avg_sq", torch.zeros_like(n))
        top = torch.where(n >= before, n, before)
    root = (top / (1 - beta2**t)).clamp_min(torch.finfo(p.dtype).tiny).sqrt()  # the update is smooth at 0, this is not
    moved = p * (1 - lr * decay if decoupled else 1) - lr * (m / (1 - beta1**t)) / (root + group["eps"])
    return moved, {"step": t, "exp_avg": m, "exp_avg_sq": n, "max_exp_avg_sq": top}


@contextmanager
def _named(who: str) -> Iterator[None]:
    """Say whose code fails in a block: most often it makes tensors of one type, or for one device."""
    try:
        yield
    except MetaplError:
        raise
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise MetaplError(
            f"check_gradient computes on the CPU, in float64 too, by double backward, and {who} fails there: "
            f"{reason_of(error)}. Expected code that takes its types and devices from its inputs (x.new_zeros(...), "
            "t.to(x)) and operations with a second derivative."
        ) from error


# ------------------------------------------------------------------------------------------------------- the comparison


def _checked(case: _Case, estimate: Estimator, draws: int, bfloat16: bool) -> GradientCheck:
    as_given = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16)
    with as_given():
        rounded = case.copied().by_mode(estimate)  # which refuses what is wrong
    truncate = getattr(estimate, "truncate", None)
    truncate = truncate if truncate and truncate < len(inner_batches(case.unlabeled_batch)) else None
    by_hand, exact = case, case.copied(torch.float64).by_hand(truncate)
    sampled = any(signal.sampled for signal in exact.signals)
    if sampled:
        problem = case.problem.exact()
        if problem is None:
            raise MetaplError(
                f"mode {estimate.name!r} on {kind_of(case.problem)} draws its labels, and the problem has no "
                "differentiable form to compare their mean with; give it a method exact() that returns one, or check "
                "it by 'forward' with a differentiable signal (without log_prob)."
            )
        by_hand = replace(case, problem=problem)
        exact = by_hand.copied(torch.float64).by_hand(truncate)
    _refuse_short(exact)
    with as_given():
        short_by_hand = by_hand.copied().by_hand(truncate)
    b = _whole(exact)
    if not float(b.norm()) > 0 or not bool(b.isfinite().all()):
        raise MetaplError(
            f"the exact gradient is {'zero' if bool(b.isfinite().all()) else 'not finite'}, so there is nothing to "
            "compare with: expected batches and weights at which the teacher's signal changes the student's labeled "
            "loss, an inner learning rate above 0, and an optimizer that has not diverged."
        )
    drawn = [case.copied(torch.float64).by_mode(estimate, SEED + n) for n in range(draws if sampled else 1)]
    mean = {name: torch.stack([a.grads[name] for a in drawn]).mean(0) for name in exact.grads}
    check = GradientCheck(
        mode=estimate.name,
        exact=(estimate.exact or truncate is not None) and not sampled,
        dtype=torch.bfloat16 if bfloat16 else next(iter(_trained(case.student).values())).dtype,
        overall=Agreement.between(_flat(mean or drawn[0].feedback), b),
        parameters=_each(mean, exact.grads),
        rounded_by_hand=Agreement.between(_whole(short_by_hand), b),
    )
    if sampled:
        sgd = isinstance(case.inner_optimizer, torch.optim.SGD) and case.clip_norm is None
        return _judged_draws(
            check, torch.stack([_whole(a) for a in drawn]), b, _is_scaled(estimate), 0.15 if sgd else 0.5
        )
    h = pytree.tree_leaves(drawn[0].feedback)
    same = [t.numel() for t in h] == [t.numel() for t in exact.feedback]
    off, unreached = _by_difference(case, exact) if truncate is None and exact.grads else (None, ())
    inner_off, blind, size = case.off_by_moves("student", exact.inner_grads, exact)
    check = replace(
        check,
        rounded=Agreement.between(_whole(rounded), b),
        rounded_parameters=_each(rounded.grads, exact.grads),
        feedback=Agreement.between(_flat(h), _flat(exact.feedback)) if same else None,
        by_difference=off,
        inner_by_difference=max(inner_off - blind, 0.0) / max(size, 1e-300),
        unreached=unreached,
    )
    adam = isinstance(case.inner_optimizer, torch.optim.Adam | torch.optim.AdamW)
    young = adam and all(float(state.get("step", 0)) < 10 for state in case.inner_optimizer.state.values())
    return _judged(check, _is_scaled(estimate), young)


def _refuse_short(run: _Run) -> None:
    """Refuse what is not in float64 where everything that it was made from is."""
    signals = [signal.differentiable() for signal in run.signals]
    parts = {"student's outputs are": run.outputs, "teacher's signal is": signals, "outer loss is": run.loss}
    for name, part in parts.items():
        other = [t.dtype for t in pytree.tree_leaves(part) if t.dtype != torch.float64]
        if other:
            raise MetaplError(
                f"check_gradient computes in float64, and the {name} in {other[0]} there: a cast, or a type that is "
                "written out (x.float(), dtype=torch.float32), rounds on the way; expected code that keeps the type "
                "of its inputs, such as x.to(self.weight.dtype)."
            )


def _by_difference(case: _Case, exact: _Run) -> tuple[float, tuple[str, ...]]:
    """How far the gradient by hand is from differences of real losses, and the parameters that only these reach."""
    for move in MOVES:
        off, blind, size = case.off_by_moves("teacher", exact.grads, exact, move)
        if off <= OFF_BY_MOVE * size + blind or 10 * blind > OFF_BY_MOVE * size:
            break
    zero = {name: g for name, g in exact.grads.items() if not bool(g.any())}
    is_off = off > OFF_BY_MOVE * size + blind
    alone = case.off_by_moves("teacher", zero, exact, move)[0] if is_off and zero else 0.0
    return max(off - blind, 0.0) / size, tuple(zero) if alone > OFF_BY_MOVE * size + blind else ()


def _judged(check: GradientCheck, scaled: bool, young: bool) -> GradientCheck:
    """The same with what is expected, whether it holds, and why; of Adam's first steps, a word on rounding."""
    own, limit = _name(check.dtype), ROUNDING if check.exact else APPROXIMATION
    expected = "the whole gradient, but for rounding" if check.exact else f"the gradient to {APPROXIMATION:.0%}"
    if scaled:
        expected = "the direction of the gradient; its length is normalized on purpose"
    both = [one for one in (check.overall, check.feedback) if one is not None]
    right = all((1 - one.cosine if scaled else one.relative_error) <= limit for one in both)
    felt = (check.by_difference or 0.0) <= OFF_BY_MOVE
    words = [f"It gives {expected}." if right and felt else f"Expected: {expected}."]
    if not right:
        one = max(both, key=lambda one: one.relative_error)
        turned = f"its cosine to the exact gradient is {one.cosine:.3f}"
        if abs(one.cosine) > 1 - 1e-6:
            turned = "it points the right way" if one.cosine > 0 else "its SIGN is wrong"
        words.append(f"In float64 {turned}, and it is {one.scale:.4g} times as long.")
    detached = "a part of the signal is detached, or the backward of an operation is not that of its forward."
    if not felt:
        words.append(
            "The labeled loss after real steps moves otherwise than autograd says of it, by "
            f"{check.by_difference:.2g} of the gradient: {detached}"
        )
    if check.unreached:
        words.append(f"No gradient reaches {few(check.unreached, 3)}, although the loss depends on them.")
    if (check.inner_by_difference or 0.0) > OFF_BY_MOVE:
        words.append(
            "But inner_loss moves otherwise with the student's weights than its own gradient says, by "
            f"{check.inner_by_difference:.2g} of it, and the student steps along that gradient: {detached} If that is "
            "meant, all is well."
        )
    of_mode, by_hand = check.rounded.relative_error if check.rounded else 0.0, check.rounded_by_hand.relative_error
    if right and felt and not scaled and of_mode >= 1e-3:
        by_type = check.exact or of_mode < 3 * by_hand or by_hand > 0.1  # an exact mode is off by nothing but rounding
        words.append(
            f"In {own} it is {100 * of_mode:.2g} % off, double backward by hand in {own} {100 * by_hand:.2g} %: "
            + (f"{own} is the reason, not the mode." if by_type else f"this mode loses digits in {own}; take forward.")
        )
        words += ["An Adam of few steps divides each gradient by its own size, which leaves little of it."] * young
    return replace(check, expected=expected, passed=right and felt, verdict=" ".join(words))


def _judged_draws(check: GradientCheck, drawn: Tensor, b: Tensor, scaled: bool, allowed: float) -> GradientCheck:
    """The same of the mean over draws a of the labels, by ⟨a, b⟩ / ‖b‖², ``allowed`` to be so far from 1."""
    n, along = len(drawn), drawn @ b / b.square().sum()
    scale, error = float(along.mean()), float(along.std()) / math.sqrt(n)
    without = (n * drawn.mean(0) - drawn) / (n - 1)  # the jackknife
    cosines = torch.nn.functional.cosine_similarity(without, b[None], dim=1)
    passed: bool | None = scale > 3 * error or (False if scale < -3 * error else None)
    if not scaled and abs(scale - 1) > 3 * error + allowed:
        passed = False
    expected = (
        f"the direction of the soft labels' gradient{' (normalized on purpose)' if scaled else ', at its length'}, "
        "in the mean over labels, up to the learning rate's order"
    )
    words = [f"Expected: {expected}. The mean of {n} draws is {scale:.3g} ± {error:.2g} of it along its direction."]
    if passed is None:
        words.append(f"Too noisy to tell: give draws={max(2 * n, math.ceil(n * (5 * error) ** 2)):,}.")
    return replace(
        check,
        overall=replace(check.overall, scale=scale),
        draws=n,
        standard_error=math.sqrt((n - 1) * float(cosines.var(correction=0))),
        expected=expected,
        passed=passed,
        verdict=" ".join(words),
    )


def _is_scaled(estimate: Estimator) -> bool:
    """Whether an estimator normalizes its feedback."""
    return (getattr(estimate, "normalization", "gradient"), getattr(estimate, "similarity", "dot")) != (
        "gradient",
        "dot",
    )


def _each(found: Tree, exact: Tree) -> dict[str, Agreement]:
    least = 1e-6 * float(_flat(exact).norm()) if exact else 0.0
    return {name: Agreement.between(found[name], g, least) for name, g in exact.items()}


def _whole(found: _Run | Hypergradient) -> Tensor:
    """A gradient in the teacher's weights as one vector; without a teacher, the feedback."""
    return _flat(found.grads or found.feedback)


def _flat(found: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in pytree.tree_leaves(found)])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
