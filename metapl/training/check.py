"""A mode's gradient beside plain double backward, on copies of one's own networks, problem and optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from metapl.problems.base import BilevelProblem, Problem, enters_input, kind_of
from metapl.runs.fields import Range, check_arguments
from metapl.runs.generators import rng_state, set_rng_state
from metapl.training.trainer import BilevelTrainer
from metapl.updates import Clipped, update_of
from metapl.words import short, wrapped

Tree = dict[str, Tensor]

ROUNDING, APPROXIMATION = 1e-6, 1e-2
"""How far an exact mode may be from double backward in float64, and any other that draws nothing; relative errors."""

MOVES, OFF_BY_MOVE = (1e-5, 1e-6, 1e-7), 1e-2
"""Moves of the teacher's weights for a difference of real losses, over their root mean square, and how far the gradient
may be from it: ReLUs that switch within the move stay far below. What is further off is moved by less: a first step of
Adam is the sign of a gradient, whatever its size, and some of these change theirs within a long move."""

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
        a, b = a.detach().double().flatten(), b.detach().double().flatten()
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
        expected: what is expected of the mode, in words.
        passed: whether that holds in float64; None where ``draws`` are too few to tell.
        verdict: in words, why.
        overall: the mode's gradient in all of the teacher's weights (of a problem without a teacher, in the signal)
            beside double backward by hand, both in float64. Of a mode that draws labels, the mean over the draws.
        feedback: the same of h, minus the gradient in the signal's value; None where labels are drawn.
        parameters: the same for each parameter of the teacher.
        dtype: of the student's weights, or of its passes under autocast.
        rounded: as ``overall``, of the mode in that type and with that precision; None where labels are drawn.
        rounded_parameters: the same for each parameter of the teacher.
        rounded_by_hand: as ``rounded``, of double backward by hand in that type: what rounding alone does.
        by_difference: how far the gradient by hand is from differences of the labeled loss after real steps, along
            random moves of the teacher's weights, relative to what such moves change; None where labels are drawn,
            steps are truncated or there is no teacher.
        unreached: the teacher's parameters that no gradient reaches although the loss moves with them.
        draws: of labels; 1 where none are drawn.
        standard_error: of the cosine of the mean over the draws.
        inner_by_difference: how far the gradient of ``inner_loss`` in the student's weights is from differences of it,
            relative to what such moves change: what is detached on purpose is there too, so it is told and not judged.
    """

    mode: str
    exact: bool
    expected: str
    passed: bool | None
    verdict: str
    overall: Agreement
    feedback: Agreement | None
    parameters: dict[str, Agreement]
    dtype: torch.dtype
    rounded: Agreement | None
    rounded_parameters: dict[str, Agreement]
    rounded_by_hand: Agreement
    by_difference: float | None
    unreached: tuple[str, ...] = ()
    draws: int = 1
    standard_error: float | None = None
    inner_by_difference: float | None = None

    def __repr__(self) -> str:
        error, cosine = self.overall.relative_error, self.overall.cosine
        return (
            f"GradientCheck(mode={self.mode!r}, passed={self.passed}, relative_error={error:.2g}, cosine={cosine:.6f})"
        )

    def __str__(self) -> str:
        own = str(self.dtype).removeprefix("torch.")
        of_draws = f", ± {self.standard_error:.2g} in the cosine" if self.standard_error is not None else ""
        rows = {f"mean of {self.draws} draws" if self.draws > 1 else f"{self.mode}, float64": self.overall}
        rows |= {"its feedback, float64": self.feedback} if self.feedback else {}
        if self.parameters:
            worst = max(self.parameters, key=lambda name: self.parameters[name].relative_error)
            rows[f"worst: {short(worst, 20)}"] = self.parameters[worst]
        rows |= {f"{self.mode}, {own}": self.rounded} if self.rounded else {}
        rows[f"by hand, {own}"] = self.rounded_by_hand
        lines = [f"  {name:<27} {row}" for name, row in rows.items()]
        said = {True: "passed", False: "FAILED", None: "not known"}[self.passed]
        head = f"{self.mode}: {said}. {self.verdict}\nBeside double backward by hand in float64{of_draws}:"
        return wrapped("\n".join([head, *lines]))


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

    Cost: two passes of the mode, two double backward passes and eight plain steps on the CPU; for drawn labels
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
    clip, precision, state = None, "float32", inner_state
    if isinstance(teacher, BilevelTrainer):
        trainer, own = teacher, (student, problem, inner_optimizer, inner_state)
        if any(thing is not None for thing in own):
            raise MetaplError(
                "check_gradient was given a trainer, and a student, problem, inner_optimizer or inner_state beside it; "
                "expected the trainer alone, whose own ones are checked, with the batches and a mode."
            )
        teacher, student, problem = *trainer.given, trainer.given_problem
        inner_optimizer, clip, precision = trainer.inner_optimizer, trainer.clip_norm, trainer.precision
        if inner_optimizer not in trainer.schedulable:  # a transform, whose state the trainer holds
            state = trainer.update.read_state()
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
    update_of(inner_optimizer, of_student.parameters(), state)  # refuses what has no derivative
    things = {
        "the teacher": None if of_teacher is None else of_teacher.network,
        "the student": of_student.network,
        "the problem": problem,
        "inner_optimizer": inner_optimizer,
        "inner_state": state,
        "the labeled batch": labeled,
        "the unlabeled batch": unlabeled,
    }
    made = partial(_Copies.of, things, estimate, clip)
    before = rng_state()
    try:
        return _Check(estimate, draws, made, precision == "bfloat16").result()
    finally:
        set_rng_state(before)


# ---------------------------------------------------------------------------------------------- double backward by hand


@dataclass
class _Copies:
    """Everything that a gradient is computed from, on the CPU and in one type; each is used for one computation."""

    clip: float | None
    teacher: nn.Module | None
    student: nn.Module
    problem: Problem
    optimizer: Any
    state: Any
    labeled: Any
    unlabeled: Any

    @staticmethod
    def of(things: dict[str, Any], estimate: Estimator, clip: float | None, dtype: torch.dtype | None) -> _Copies:
        """Copies that share what the originals share, with all floating-point tensors in ``dtype``, also those that
        modules and problems hold as attributes; None: each in its own type."""
        memo: dict[int, Any] = {}
        copies: list[Any] = []
        for name, thing in things.items():
            try:
                is_function = isinstance(thing, tuple) and name == "inner_optimizer"  # a TorchOpt transform
                copies.append(thing if is_function else copy.deepcopy(thing, memo))
            except Exception as error:
                raise MetaplError(
                    f"check_gradient computes on copies, and {name} cannot be copied: {reason_of(error)}. Expected "
                    "objects that copy.deepcopy takes: without tensors that have a graph, generators, locks or files."
                ) from error
        # The memo has every tensor that was copied, wherever it was found.
        for t in [t for t in memo.values() if isinstance(t, Tensor)]:
            t.grad = None
            t.data = t.data.to("cpu", dtype if t.is_floating_point() else None)
        copies[2] = prepare(copies[2], estimate)
        return _Copies(clip, *copies)

    def taught(self) -> dict[str, nn.Parameter]:
        return {} if self.teacher is None else {n: p for n, p in self.teacher.named_parameters() if p.requires_grad}

    def by_mode(self, estimate: Estimator, seed: int = SEED) -> Hypergradient:
        learned = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        update = update_of(self.optimizer, learned, self.state)
        torch.default_generator.manual_seed(SEED)
        return hypergradient(
            self.teacher,
            self.student,
            labeled=self.labeled,
            unlabeled=self.unlabeled,
            mode=estimate,
            problem=self.problem,
            inner_optimizer=update if self.clip is None else Clipped(update, self.clip),
            generator=torch.Generator().manual_seed(seed),
        )

    def outer_loss(self, truncate: int | None = None, seen: Sequence[Tensor] = ()) -> _Run:
        """L(θ′) with its graph to the teacher's weights: the inner pass, the teacher, the step, the labeled pass.

        Args:
            truncate: steps, from the last, whose signals keep their graph.
            seen: what the signals read in the place of the student's outputs.
        """
        torch.default_generator.manual_seed(SEED)
        problem, entering = self.problem, enters_input(self.problem)
        labeled, batches = read_batch(problem, "outer_batch", self.labeled), inner_batches(self.unlabeled)
        generator = torch.Generator().manual_seed(SEED)
        theta: Tree = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        step, state = self._rule(theta)
        run = _Run()
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            for number, batch in enumerate(batches):
                cut = truncate is not None and number < len(batches) - truncate
                told = partial(self._signal, run, batch, generator, cut)
                signal = told(None) if entering else None
                with _named("the student"):
                    x = problem.student_input(batch, signal) if entering else problem.student_input(batch)  # type: ignore[call-arg]
                    z = functional_call(self.student, theta, (x,))
                branch = RandomState.now(torch.device("cpu")).branch()  # where L(θ′) draws its masks
                run.outputs.append(z.detach())
                signal = told(seen[number] if seen else z.detach()) if signal is None else signal
                with _named("the problem's inner_loss"):
                    loss = problem.inner_loss(z, signal, batch, theta).mean()
                    g = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
                if not number:
                    run.inner_loss = float(loss.detach())
                    run.inner_grads = {n: t.detach() for n, t in zip(theta, g, strict=True) if t is not None}
                theta, state = step(theta, {n: t for n, t in zip(theta, g, strict=True) if t is not None}, state)
            with replayed(branch):
                with _named("the student"):
                    z = functional_call(self.student, theta, (problem.outer_input(labeled),))
                with _named("the problem's outer_loss"):
                    found: Any = problem.outer_loss(z, labeled)
        run.loss = found[0] / found[1] if isinstance(found, tuple | list) else found
        run.outputs.append(z.detach())
        return run

    def _signal(self, run: _Run, batch: Any, generator: torch.Generator, cut: bool, outputs: Any) -> Any:
        """The problem's signal, each tensor of it a node of its own: its gradient is not that through other fields."""

        def apart(t: Tensor) -> Tensor:
            return t.view_as(t) if t.requires_grad else t.detach().requires_grad_(t.is_floating_point())

        with _named("the problem's signal"):
            teacher = nn.Module() if self.teacher is None else self.teacher
            signal = self.problem.signal(teacher, batch, outputs, generator=generator)
            run.signals.append(replace(signal, **pytree.tree_map_only(Tensor, apart, dict(vars(signal)))))
        return signal.detached() if cut else run.signals[-1]

    def by_hand(self, truncate: int | None = None) -> _Run:
        """The same with the gradients of L(θ′) in the teacher's weights and in the signals' values."""
        run, taught = self.outer_loss(truncate), self.taught()
        values = [t for t in pytree.tree_leaves([s.value for s in run.signals]) if t.is_floating_point()]
        ends = [*taught.values(), *values]
        with _named("a backward pass"), sdpa_kernel(SDPBackend.MATH):
            found = torch.autograd.grad(run.loss, ends, materialize_grads=True)
        run.grads = dict(zip(taught, found, strict=False))
        run.feedback = [-g for g in found[len(taught) :]]
        return run

    def _rule(self, theta: Tree) -> tuple[Callable[[Tree, Tree, Any], tuple[Tree, Any]], Any]:
        """The student's update by hand, with its clip, and the optimizer's present state."""

        def clipped(grads: Tree) -> Tree:
            if self.clip is None:
                return grads
            norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            return {name: g * (self.clip / (norm + 1e-6)).clamp(max=1.0) for name, g in grads.items()}

        if not isinstance(self.optimizer, torch.optim.Optimizer):
            still = {name: p.detach() for name, p in theta.items()}
            fresh = self.optimizer.init(still)
            zeros = {name: torch.zeros_like(p) for name, p in still.items()}
            self.optimizer.update(zeros, fresh, params=still, inplace=False)  # clears a flag of TorchOpt's momentum

            def transformed(theta: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
                grads = {name: clipped(grads).get(name, zeros[name]) for name in theta}
                # The square root in TorchOpt's Adam has no derivative at zero.
                least = {n: 1e-60 if g.dtype == torch.float64 else 1e-15 for n, g in grads.items()}
                grads = {n: torch.where(g == 0, g + least[n], g) for n, g in grads.items()}
                moves, state = self.optimizer.update(grads, state, params=theta, inplace=False)
                return {name: p + moves[name] for name, p in theta.items()}, state

            return transformed, fresh if self.state is None else self.state

        of_group = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        groups = {name: of_group[id(p)] for name, p in theta.items()}
        rule = _sgd if isinstance(self.optimizer, torch.optim.SGD) else _adam
        decoupled = isinstance(self.optimizer, torch.optim.AdamW)

        def stepped(theta: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
            theta, state = dict(theta), dict(state)
            for name, g in clipped(grads).items():
                theta[name], state[name] = rule(theta[name], g, state[name], groups[name], decoupled)
            return theta, state

        return stepped, {name: dict(self.optimizer.state.get(p, {})) for name, p in theta.items()}


class _Run:
    """L(θ′), the signals and the student's outputs on the way to it, and its gradients."""

    loss: Tensor
    grads: Tree
    feedback: list[Tensor]
    inner_loss: float  # of the first step, and its gradient in the student's weights
    inner_grads: Tree

    def __init__(self) -> None:
        self.signals: list[Any] = []
        self.outputs: list[Tensor] = []


def _sgd(p: Tensor, g: Tensor, state: Any, group: Any, _: bool) -> tuple[Tensor, Any]:
    d = (-g if group["maximize"] else g) + group["weight_decay"] * p
    if group["momentum"]:
        before = state.get("momentum_buffer")
        velocity = d if before is None else group["momentum"] * before + (1 - group["dampening"]) * d
        d, state = d + group["momentum"] * velocity if group["nesterov"] else velocity, {"momentum_buffer": velocity}
    return p - group["lr"] * d, state


def _adam(p: Tensor, g: Tensor, state: Any, group: Any, decoupled: bool) -> tuple[Tensor, Any]:
    (beta1, beta2), lr, decay, t = group["betas"], group["lr"], group["weight_decay"], float(state.get("step", 0)) + 1
    decoupled = group.get("decoupled_weight_decay", decoupled)
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


@dataclass
class _Check:
    estimate: Estimator
    draws: int
    made: Callable[[torch.dtype | None], _Copies]
    bfloat16: bool
    sampled: bool = False

    def result(self) -> GradientCheck:
        with self._as_given():
            own = self.made(None)
            found = own.by_mode(self.estimate)  # which refuses what is wrong
        weights = next(p.dtype for p in own.student.parameters() if p.requires_grad)
        truncate = getattr(self.estimate, "truncate", None)
        truncate = truncate if truncate and truncate < len(inner_batches(own.unlabeled)) else None
        exact = self._for_hand(torch.float64).by_hand(truncate)
        self.sampled = any(signal.sampled for signal in exact.signals)
        if self.sampled:
            exact = self._for_hand(torch.float64).by_hand(truncate)
        self._refuse_short(exact)
        with self._as_given():
            rounded = self._for_hand(None).by_hand(truncate)
        b = _flat(exact)
        if not float(b.norm()) > 0 or not bool(b.isfinite().all()):
            raise MetaplError(
                f"the exact gradient is {'zero' if bool(b.isfinite().all()) else 'not finite'}, so there is nothing to "
                "compare with: expected batches and weights at which the teacher's signal changes the student's "
                "labeled loss, an inner learning rate above 0, and an optimizer that has not diverged."
            )
        compared: dict[str, Any] = {
            "mode": self.estimate.name,
            "exact": (self.estimate.exact or truncate is not None) and not self.sampled,
            "dtype": torch.bfloat16 if self.bfloat16 else weights,
            "rounded_by_hand": Agreement.between(_flat(rounded), b),
        }
        if self.sampled:
            return self._of_draws(exact, b, compared)
        a = self.made(torch.float64).by_mode(self.estimate)
        told = [t.flatten() for t in pytree.tree_leaves(a.feedback)]
        same = [t.shape for t in told] == [t.flatten().shape for t in exact.feedback]
        off, blind, unreached = self._by_difference(exact) if truncate is None else (None, 0.0, ())
        check = GradientCheck(
            **compared,
            expected="",
            passed=None,
            verdict="",
            overall=Agreement.between(_flat(a), b),
            feedback=Agreement.between(torch.cat(told), _flat(exact.feedback)) if same else None,
            parameters=_each(a.grads, exact.grads, b),
            rounded=Agreement.between(_flat(found), b),
            rounded_parameters=_each(found.grads, exact.grads, b),
            by_difference=off,
            unreached=unreached,
            inner_by_difference=self._inner_by_difference(exact),
        )
        adam = isinstance(own.optimizer, torch.optim.Adam | torch.optim.AdamW)
        few_steps = adam and all(float(state.get("step", 0)) < 10 for state in own.optimizer.state.values())
        return self._judged(check, blind, few_steps)

    def _as_given(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.bfloat16 else nullcontext()

    def _for_hand(self, dtype: torch.dtype | None) -> _Copies:
        """Copies to compute with by hand: where labels are drawn, of the problem's differentiable form."""
        copies = self.made(dtype)
        if not self.sampled:
            return copies
        problem = copies.problem.exact()
        if problem is None:
            raise MetaplError(
                f"mode {self.estimate.name!r} on {kind_of(copies.problem)} draws its labels, and the problem has no "
                "differentiable form to compare their mean with; give it a method exact() that returns one, or check "
                "it by 'forward' with a differentiable signal (without log_prob)."
            )
        return replace(copies, problem=problem)

    def _refuse_short(self, run: _Run) -> None:
        """Refuse what is not in float64 where everything that it was made from is."""
        signals = [signal.differentiable() for signal in run.signals]
        parts = {"student's outputs are": run.outputs, "teacher's signal is": signals, "outer loss is": run.loss}
        for name, part in parts.items():
            other = [t.dtype for t in pytree.tree_leaves(part) if t.dtype != torch.float64]
            if other:
                raise MetaplError(
                    f"check_gradient computes in float64, and the {name} in {other[0]} there: a cast, or a type that "
                    "is written out (x.float(), dtype=torch.float32), rounds on the way; expected code that keeps the "
                    "type of its inputs, such as x.to(self.weight.dtype)."
                )

    def _by_difference(self, exact: _Run) -> tuple[float | None, float, tuple[str, ...]]:
        """How far the gradient by hand is from differences of real losses, what rounding leaves of these, and the
        parameters that only these reach."""
        if not exact.grads:
            return None, 0.0, ()
        taught, seen = self.made(torch.float64).taught(), exact.outputs
        for move in MOVES:
            draw = torch.Generator().manual_seed(SEED)
            sizes = {n: move * max(float(p.detach().norm()) / math.sqrt(p.numel()), 1e-3) for n, p in taught.items()}

            def slope(signs: Tree, sizes: dict[str, float] = sizes) -> float:
                ends = []
                for side in (1, -1):
                    copies = self.made(torch.float64)
                    with torch.no_grad():
                        for name, p in copies.taught().items():
                            p.add_(side * sizes[name] * signs[name])
                    ends.append(float(copies.outer_loss(seen=seen).loss.detach()))
                return (ends[0] - ends[1]) / 2

            def signs(draw: torch.Generator = draw) -> Tree:
                return {n: torch.randint(0, 2, p.shape, generator=draw).double() * 2 - 1 for n, p in taught.items()}

            size = math.sqrt(sum(float((sizes[n] * g).square().sum()) for n, g in exact.grads.items()))
            errors = []
            for moves in (signs() for _ in range(3)):
                by_hand = [float((sizes[n] * moves[n] * g).sum()) for n, g in exact.grads.items()]
                errors.append((slope(moves) - sum(by_hand)) / size)
            off = math.sqrt(sum(error**2 for error in errors) / len(errors))
            blind = 1e-14 * abs(float(exact.loss.detach())) / size
            if off <= OFF_BY_MOVE + blind or 10 * blind > OFF_BY_MOVE:
                break
        zero = [name for name, g in exact.grads.items() if not bool(g.any())]
        if not zero or off <= OFF_BY_MOVE + blind:
            return off, blind, ()
        alone = {n: t * (n in zero) for n, t in signs().items()}
        return off, blind, tuple(zero) if abs(slope(alone)) > (OFF_BY_MOVE + blind) * size else ()

    def _inner_by_difference(self, exact: _Run) -> float:
        """How far the gradient that the student steps along is from differences of its inner loss."""
        draw, grads = torch.Generator().manual_seed(SEED), exact.inner_grads
        student = dict(self.made(torch.float64).student.named_parameters())
        sizes = {
            n: MOVES[0] * max(float(student[n].detach().norm()) / math.sqrt(g.numel()), 1e-3) for n, g in grads.items()
        }
        moves = {
            n: sizes[n] * (torch.randint(0, 2, g.shape, generator=draw).double() * 2 - 1) for n, g in grads.items()
        }
        ends = []
        for side in (1, -1):
            copies = self.made(torch.float64)
            moved = dict(copies.student.named_parameters())
            with torch.no_grad():
                for name, move in moves.items():
                    moved[name].add_(side * move)
            ends.append(copies.outer_loss(seen=exact.outputs).inner_loss)
        size = math.sqrt(sum(float((sizes[n] * g).square().sum()) for n, g in grads.items()))
        by_hand = sum(float((moves[n] * g).sum()) for n, g in grads.items())
        off = abs((ends[0] - ends[1]) / 2 - by_hand)
        return off / size if off > 1e-14 * abs(exact.inner_loss) else 0.0

    def _judged(self, check: GradientCheck, blind: float, few_steps: bool) -> GradientCheck:
        """The same with what is expected, whether it holds, and why."""
        exact, own = check.exact, str(check.dtype).removeprefix("torch.")
        limit, scaled = ROUNDING if exact else APPROXIMATION, _is_scaled(self.estimate)
        expected = "the whole gradient, but for rounding" if exact else f"the gradient to {APPROXIMATION:.0%}"
        both = [one for one in (check.overall, check.feedback) if one is not None]
        right = all((1 - one.cosine if scaled else one.relative_error) <= limit for one in both)
        felt = check.by_difference is None or check.by_difference <= OFF_BY_MOVE + blind
        if scaled:
            expected = "the direction of the gradient; its length is normalized on purpose"
        words = [f"Expected: {expected}."]
        if right and felt:
            words = [f"It gives {expected}."]
        elif not right:
            one = max(both, key=lambda one: one.relative_error)
            turned = f"its cosine to the exact gradient is {one.cosine:.3f}"
            if abs(one.cosine) > 1 - 1e-6:
                turned = "it points the right way" if one.cosine > 0 else "its SIGN is wrong"
            words.append(f"In float64 {turned}, and it is {one.scale:.4g} times as long.")
        if not felt:
            words.append(
                "The labeled loss after real steps moves otherwise than autograd says of it, by "
                f"{check.by_difference:.2g} of the gradient: a part of the signal is detached, or the backward of an "
                "operation is not that of its forward."
            )
        if check.unreached:
            words.append(f"No gradient reaches {few(check.unreached, 3)}, although the loss depends on them.")
        if (check.inner_by_difference or 0.0) > OFF_BY_MOVE:
            words.append(
                "But inner_loss moves otherwise with the student's weights than its own gradient says, by "
                f"{check.inner_by_difference:.2g} of it, and the student steps along that gradient: a part is "
                "detached, or the backward of an operation is not that of its forward. If that is meant, all is well."
            )
        if right and felt and not scaled and check.rounded is not None:
            off = check.rounded.relative_error, check.rounded_by_hand.relative_error
            words += _of_rounding(exact, *off, own, few_steps)
        return replace(check, expected=expected, passed=right and felt, verdict=" ".join(words))

    def _of_draws(self, exact: _Run, b: Tensor, compared: dict[str, Any]) -> GradientCheck:
        """Of the mean over draws of the labels."""
        found, trees = [], []
        for seed in range(SEED, SEED + self.draws):
            trees.append(self.made(torch.float64).by_mode(self.estimate, seed).grads)
            found.append(_flat(trees[-1]))
        drawn = torch.stack(found)
        mean, n, scaled = drawn.mean(0), len(found), _is_scaled(self.estimate)
        along = drawn @ b / b.square().sum()
        scale, error = float(along.mean()), float(along.std()) / math.sqrt(n)
        without = (n * mean - drawn) / (n - 1)  # the jackknife
        cosines = torch.nn.functional.cosine_similarity(without, b[None], dim=1)
        spread = math.sqrt((n - 1) * float(cosines.var(correction=0)))
        copies = self.made(None)
        allowed = 0.15 if isinstance(copies.optimizer, torch.optim.SGD) and copies.clip is None else 0.5
        expected = (
            f"the direction of the soft labels' gradient{' (normalized on purpose)' if scaled else ', at its length'}, "
            f"in the mean over labels, up to the learning rate's order"
        )
        passed: bool | None = scale > 3 * error or (False if scale < -3 * error else None)
        if not scaled and abs(scale - 1) > 3 * error + allowed:
            passed = False
        words = [f"Expected: {expected}. The mean of {n} draws is {scale:.3g} ± {error:.2g} of it along its direction."]
        if passed is None:
            words.append(f"Too noisy to tell: give draws={max(2 * n, math.ceil(n * (5 * error) ** 2)):,}.")
        means = {name: torch.stack([tree[name] for tree in trees]).mean(0) for name in exact.grads}
        return GradientCheck(
            **compared,
            expected=expected,
            passed=passed,
            verdict=" ".join(words),
            overall=replace(Agreement.between(mean, b), scale=scale),
            feedback=None,
            parameters=_each(means, exact.grads, b),
            rounded=None,
            rounded_parameters={},
            by_difference=None,
            draws=n,
            standard_error=spread,
        )


def _of_rounding(exact: bool, of_mode: float, by_hand: float, own: str, few_steps: bool) -> list[str]:
    """What rounding in the networks' own type does to the mode, and to any exact gradient."""
    if of_mode < 1e-3:
        return []
    words = [f"In {own} it is {100 * of_mode:.2g} % off, double backward by hand in {own} {100 * by_hand:.2g} %:"]
    by_type = exact or of_mode < 3 * by_hand or by_hand > 0.1  # an exact mode has nothing but rounding to be off by
    words += [f"{own} is the reason, not the mode." if by_type else f"this mode loses digits in {own}; take forward."]
    if few_steps:
        words.append("An Adam of few steps divides each gradient by its own size, which leaves little of it.")
    return words


def _is_scaled(estimate: Estimator) -> bool:
    """Whether an estimator normalizes its feedback."""
    return getattr(estimate, "normalization", "gradient") != "gradient" or (
        getattr(estimate, "similarity", "dot") != "dot"
    )


def _each(found: Tree, exact: Tree, b: Tensor) -> dict[str, Agreement]:
    least = 1e-6 * float(b.norm())
    return {name: Agreement.between(found[name], g, least) for name, g in exact.items()}


def _flat(found: Any) -> Tensor:
    """A gradient in the teacher's weights as one vector in float64; without a teacher, in the signals."""
    if isinstance(found, _Run | Hypergradient):
        signal = [-h for h in pytree.tree_leaves(found.feedback)]
        found = found.grads or signal
    return torch.cat([t.detach().double().flatten() for t in pytree.tree_leaves(found)])
