"""Verification by definition: a mode's gradient beside differences of the loss after real steps, on float64 copies.

In the formula of :func:`check_gradient`, d is the mode's gradient a itself, then a random direction. Labels that are
drawn cannot be moved: each inner loss is taken (1 + ε_i) times, for h_i = −dL/dε_i, and the teacher is moved under
−Σ h·log_prob. Without a teacher, the signal's values are moved. Nothing here knows how a mode finds its h.

:class:`Step` holds what a step reads; ``taken`` runs it on fresh copies, with the same dropout masks and labels, the
buffers, the clip and the optimizer's own ``step()``.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.batch import both_batches, micro_batches, plain, rows
from metapl.execution.checks import generator_of
from metapl.execution.layout import layouts
from metapl.execution.numerics import as_real, no_fast_path
from metapl.execution.state import RandomState, trainable
from metapl.feedback import Estimator, Implicit, Lookahead, LossDifference, Mode, estimator, prepare
from metapl.feedback.hypergradient import Hypergradient, hypergradient
from metapl.problems.base import Problem, Signal, enters_input, field_of, has_own, has_rows, sum_and_weight
from metapl.runs.checkpoint import rng_state, set_rng_state
from metapl.updates import Clipped, TorchUpdate, Update, parts_of, update_of

Tree = dict[Any, Tensor]
Errors = dict[str, float | None]  # None: rounding drowns the difference
Status = Literal["right", "allowed", "refused", "cannot tell", "nothing to verify"]
Setting = bool | int | Literal["warn"]

MOST_WEIGHTS = 50_000_000  # of both networks; larger ones are verified by check_gradient, or verify=N
STEPS = 3  # of a look-ahead
EXACT, APPROXIMATE = 1e-5, 1e-2  # the relative errors that modes may have, beyond rounding: the second by differences
EPS, EPS32 = 2e-16, 1e-7  # rounding of F, and of one that runs in float32 somewhere
HOOKS = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
LOG = logging.getLogger("metapl")


class VerificationWarning(UserWarning):
    """A gradient that is off the derivative of the loss for a good reason, or that could not be verified."""


@dataclass(frozen=True)
class GradientCheck:
    """The result of :func:`check_gradient`; ``print`` says it in words."""

    status: Status  # "allowed": off the definition for a good reason; "cannot tell": rounding drowns the differences
    verdict: str  # with the likely causes of a refusal
    errors: dict[str, float] = field(default_factory=dict)  # by what was moved and how, over the size of the derivative

    @property
    def passed(self) -> bool | None:
        """For a test; None where it cannot be told."""
        return None if self.status == "cannot tell" else self.status != "refused"

    def __str__(self) -> str:
        return "\n".join([f"{self.status}: {self.verdict}", *(f"  {k:<56} {e:.1e}" for k, e in self.errors.items())])

    def refuse_or_warn(self, setting: Setting) -> None:
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
        labeled, unlabeled, outer, inner: the batches of a step; of a :class:`metapl.Lookahead` the first three, and of
            micro-batches (``accumulate``) the first, by whose halves both losses must be means over examples.
        mode: default the trainer's own, and ``"forward"`` without one. The others are :func:`metapl.hypergradient`'s.

    Returns: a :class:`GradientCheck`; 1e-5 is right, of differences and of weights that stay in float32 1 %.
    Cost: the mode once and some six real steps, in float64; about thirty where they disagree.
    Raises: :class:`metapl.MetaplError` in several processes.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="forward")
    >>> check_gradient(trainer, labeled=(torch.randn(5, 4), torch.arange(5) % 3), unlabeled=torch.randn(6, 4)).passed
    True
    """
    labeled, unlabeled = both_batches(labeled, unlabeled, outer, inner)
    alone = all(part is None for part in (student, inner_optimizer, problem, inner_state, generator, clip_norm))
    if alone and isinstance(getattr(teacher, "verification", None), Verification):
        one, mode = teacher, teacher.mode if mode is None else mode
        problem, generator, accumulate, clip_norm = one.problem, one.generator, one.accumulate, one.clip_norm
        teacher, student, inner_optimizer = one.teacher, one.student, one.update
    (of_teacher, of_student, device), estimate = layouts(teacher, student), estimator(mode or "forward")  # type: ignore[arg-type]
    generator_of(generator, device, "the networks are on")
    if of_student.is_sharded or not of_student.ranks.alone:
        raise MetaplError("check_gradient was given networks of several processes; expected those of one, not sharded.")
    gives_feedback = estimate.credits != "nothing"
    parameters = of_student.parameters()
    update = update_of(inner_optimizer, parameters, inner_state, is_differentiated=gives_feedback)
    update = update.inner if isinstance(update, Clipped) else update
    update.follow(of_student.parameters())
    steps = [vars(one).get("step") for one in parts_of(vars(update).get("optimizer", update))]
    if any(own is not None and not hasattr(own, "_wrapped_by_lr_sched") for own in steps):  # which no copy has
        raise MetaplError("step() of the inner optimizer was replaced on the object; expected that of its class.")
    ahead = unlabeled if isinstance(unlabeled, Lookahead) else [unlabeled]
    given = [plain(labeled), *(plain(ahead[k]) for k in range(min(len(ahead), STEPS)))]
    given = [micro_batches(one, accumulate, "given")[0] for one in given]
    # Copies: a slice would be copied with all of the tensor that it is one of.
    labeled, *batches = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given)
    networks = None if of_teacher is None else of_teacher.network, of_student.network, prepare(problem, estimate)
    step = Step(*networks, update, labeled, batches, clip_norm, generator, RandomState.now(device), accumulate)
    return verified(step, estimate)


class Verification:
    """When the steps of a trainer are verified, and what was found; ``setting`` is its ``verify=``."""

    def __init__(self, setting: Setting = True) -> None:
        self.setting, self.verdict = setting, ""
        self.every = 0 if isinstance(setting, bool | str) else setting
        self.known: set[int] = set()  # fingerprints of networks that were verified

    def before(self, trainer: Any, labeled: Any, unlabeled: Any, mark: int) -> None:
        """Verify networks with a mark where it is due; :class:`metapl.MetaplError` for a wrong gradient."""
        if mark in self.known and trainer.steps_done % self.every:
            return
        weights = sum(p.numel() for network in trainer.networks.values() for p in network.parameters())
        spread = any(layout.is_sharded or not layout.ranks.alone for layout in trainer.layouts)
        if spread or (weights > MOST_WEIGHTS and not self.every):
            what = "several processes" if spread else f"{weights:,} weights"
            if trainer.ranks.first:
                LOG.warning("Networks of %s are not verified: give metapl.check_gradient small ones of one.", what)
        else:
            found = check_gradient(trainer, labeled=labeled, unlabeled=unlabeled)
            self.verdict = f"{found.status}: {found.verdict}"
            found.refuse_or_warn(self.setting)
        self.known.add(mark)

    def state_dict(self) -> dict[str, str]:
        return {"known": " ".join(map(str, sorted(self.known))), "verdict": self.verdict}

    def load_state_dict(self, state: Any) -> None:
        self.known, self.verdict = set(map(int, state["known"].split())), state["verdict"]


def refuse_hooks(student: nn.Module) -> None:
    """Refuse hooks on the student's parameters: they change its gradients, and copies do not have them."""
    hooked = [n for n, p in student.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked:
        raise MetaplError(f"the student's parameters {few(hooked, 3)} have hooks; expected none (see clip_norm).")


# -------------------------------------------------------------------------------------------------------- the verdict


def verified(given: Step, estimate: Any) -> GradientCheck:
    """A mode's gradient of a step beside its definition; nothing of the process is moved."""
    estimate = getattr(estimate, "base", estimate)  # whose feedback a control alters
    plainly = {"normalization": "gradient", "similarity": "dot", "baseline": None, "truncate": None, "keep_on": None}
    plainly["reduction"] = "sum"  # the mean is 1/B of it, and no derivative
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
                return judged(base, estimate)
            except (RuntimeError, TypeError):  # of code that runs in its own type alone
                return judged(given.copied(), estimate, EPS32)
    finally:
        set_rng_state(before)


def judged(base: Step, estimate: Estimator, eps: float = EPS) -> GradientCheck:
    """The verdict at a point and, where it is a refusal, the likely causes."""
    groups = getattr(vars(base.update).get("optimizer"), "param_groups", [])
    if not any(group["lr"] for group in groups):  # the first step of a warm-up, in which nothing would move
        for group in groups:
            group["lr"] = group.get("initial_lr") or 1e-2
    at, name = Point(base, estimate, eps), f"mode {estimate.name!r}"
    fault = at.fault()
    errors = {} if fault else at.errors()
    if (fault or at.off(errors)) and (rounding := rounding_of(at.run)) > at.eps:
        at = Point(base, estimate, rounding)
        fault = at.fault()
        errors = {} if fault else at.errors()
    if at.off(errors):  # perhaps at a kink
        at = Point(base.perturbed(), estimate, at.eps)
        errors = at.errors()
    if (fault or at.off(errors)) and any(not at.base.taken().loss.equal(at.run.loss) for _ in range(3)):
        fault = "two equal steps differ: random numbers that are not torch's own, or other state."
    if fault:
        return GradientCheck("refused", f"{name}: {fault} See docs/contract.md.")
    known, off = {what: error for what, error in errors.items() if error is not None}, at.off(errors)
    if off:
        status, why = at.reason(off)
        why = f"{name} is {known[off[0]]:.2g} off the loss after real steps ({off[0]}): {why} See docs/contract.md."
        return GradientCheck(status, why, known)
    if len(known) < len(errors):
        return GradientCheck("cannot tell", f"{name} was not verified: rounding drowns the loss's change.", known)
    return GradientCheck("right", f"{name} gives the derivative of the loss after real steps.", known)


class Point:
    """The gradient of a mode at one point, beside differences there."""

    def __init__(self, base: Step, estimate: Estimator, eps: float) -> None:
        self.base, self.estimate, self.found, self.run = base, estimate, base.by_mode(estimate), base.taken()
        self.held: list[Tree] | None = None
        self.eps = eps if self.run.loss.dtype == torch.float64 else max(eps, EPS32)
        self.signals = [signal.detached() for signal in self.run.signals]
        sampled = self.signals[0].sampled
        self.expected = sampled and estimate.credits == "signal"  # over the labels, at those that were drawn
        if self.expected:
            onehot = [F.one_hot(s.value, s.probs.shape[-1]).to(s.probs) for s in self.signals]  # type: ignore[union-attr]
            self.signals = [replace(s, value=value) for s, value in zip(self.signals, onehot, strict=True)]
        self.moved, name = ("weights", "log_prob") if sampled and not self.expected else ("signal", "value")
        trees = [t if isinstance(t, dict) else {"": t} for t in self.found.feedback]
        self.h = {(k, field_of(key) if key else name): t for k, tree in enumerate(trees) for key, t in tree.items()}
        self.w = self._implicit(estimate) if isinstance(estimate, Implicit) else {}
        score = self.score(self.run)
        learned = self.run.copies.learned() if score.requires_grad else {}
        how: Any = {"materialize_grads": True, "allow_unused": True}
        g = torch.autograd.grad(score, [*learned.values()], **how) if learned else ()
        # Of the score; none without a teacher. Those of embeddings may be sparse.
        self.gradient: Tree = {name: t.to_dense() for name, t in zip(learned, g, strict=True)}

    def score(self, run: Run) -> Tensor:
        """−Σ h·signal, whose gradient is the teacher's."""
        fields = [signal.fields() for signal in run.signals]
        terms = [-(h * fields[k]["probs" if self.expected else name]).sum() for (k, name), h in self.h.items()]
        return torch.stack(terms).sum()

    def value(self, run: Run) -> Tensor:
        """F; of an implicit gradient ⟨g, w⟩, of which h is minus the derivative."""
        terms = [(run.gradients["inner"][name] * t).sum() for name, t in self.w.items()]
        return torch.stack(terms).sum() if terms else run.loss

    @property
    def tolerance(self) -> float:
        exact = self.estimate.exact or self.moved == "weights" or self.expected or self.w
        by_difference = "difference" in (self.estimate.name, getattr(self.estimate, "tangent", ""))
        return EXACT if exact and not by_difference and self.eps < EPS32 else APPROXIMATE

    def off(self, errors: Errors) -> list[str]:
        return [what for what, error in errors.items() if error is not None and error > self.tolerance]

    def errors(self) -> Errors:
        if self.gradient and self.moved == "signal" and not self.expected:
            return self.compared("teacher", self.gradient)
        # And of the teacher's gradient alone, while the student's step is held.
        how: Any = {"value": self.score, "what": "the signal in the teacher", "signals": self.signals}
        return self.of_h() | (self.compared("teacher", self.gradient, **how) if self.gradient else {})

    def of_h(self) -> Errors:
        """Of h alone: in the weights of the inner losses, or in the signal's values."""
        if isinstance(self.estimate, LossDifference):
            return {}  # which is no derivative
        errors = self.compared(self.moved, {key: -h for key, h in self.h.items()}, signals=self.signals)
        # What drowns of a factor of the whole loss is zero: such as of a clip, which takes all lengths for one. In
        # float64; the rounding of a shorter type hides much more.
        drowned = 0.0 if self.moved == "weights" and self.eps < EPS32 else None
        return {what: drowned if error is None else error for what, error in errors.items()}

    def compared(
        self, moved: str, gradient: Tree, value: Callable[[Run], Tensor] | None = None, what: str = "", **options: Any
    ) -> Errors:
        """How far a gradient is from differences, along itself and in a random direction; None: it drowns in rounding,
        which grows as the move shrinks, while the errors of kinks and of a fresh Adam's eps shrink with it."""
        value, draw, theta = value or self.value, torch.Generator().manual_seed(0), self.base.learned()
        theta |= trainable(self.base.student) if moved in ("inner", "outer") else {}
        signs = {n: torch.randint(0, 2, g.shape, generator=draw).to(g) * 2 - 1 for n, g in gradient.items()}
        d = {n: t * (size_of(theta[n]) if n in theta else 1.0) for n, t in signs.items()}
        directions, length = {"in a random direction": d}, float(flat(gradient).norm())
        if length > 0 and len(flat(gradient)) > 1:
            along = {n: g * float(flat(d).norm()) / length for n, g in gradient.items()}
            directions = {"along the gradient": along, **directions}

        def at(side: float, direction: Tree) -> float:
            run = self.base.taken(moved, direction, side, seen=self.run.outputs, held=self.held, **options)
            pairs = zip(run.signals, self.run.signals, strict=True)
            others = any(a.sampled and not a.value.equal(b.value) for a, b in pairs)  # labels that were drawn there
            return math.nan if others else float(value(run).detach())

        given = float(value(self.run).detach()), self.eps, self.tolerance
        return {
            f"{what or f'the {moved}'}, {name}": off_by(
                partial(at, direction=d), flat([gradient[n] * t for n, t in d.items()]), *given
            )
            for name, d in directions.items()
        }

    def _implicit(self, mode: Implicit) -> Tree:
        """w of the implicit gradient, by its solver from Hessian products of double backward."""
        how: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        with no_fast_path(math=True):
            run = self.base.taken(steps=False)
            theta = trainable(run.copies.student)
            g = torch.autograd.grad(run.inner, [*theta.values()], create_graph=True, **how)

            def hessian(w: Tree) -> Tree:
                along = torch.stack([(a * w[name]).sum() for name, a in zip(theta, g, strict=True)]).sum()
                return dict(zip(theta, torch.autograd.grad(along, [*theta.values()], **how), strict=True))

            w = mode.solved(hessian, run.gradients["outer"], self.base.update.learning_rate)
        return {name: -t for name, t in w.items()}

    def fault(self) -> str:
        """What is against the contract whatever the differences say."""
        run, loss, rounding = self.run, float(self.run.loss), max(1e-6, 1000 * self.eps)
        if run.written:
            return f"a pass of the student, or a loss, writes to its weights ({few(sorted(run.written), 3)})."
        mode = float(self.found.outer_loss)  # where the problem revises its signal, of a later step
        if abs(mode - loss) > rounding * max(abs(loss), 1e-3) and not has_own(self.base.problem, "revised_signal"):
            likely = "; ".join(causes(self.base, run)) or "state or random numbers of its own, or a shared memory"
            return f"its L(θ′) is {mode:.6g}, and {loss:.6g} after real steps: likely {likely}."
        if isinstance(self.estimate, LossDifference):
            before, h = float(self.base.taken(steps=False).loss), float(flat(self.h))
            if abs(before - loss - h) > EXACT * abs(h) + rounding * 1e-3 * abs(loss):
                return f"h is {h:.6g}, and L(θ) − L(θ′) is {before - loss:.6g}."
        for signal in run.signals:
            log_prob, probs, value = signal.log_prob, signal.probs, signal.value
            if log_prob is None or value.is_floating_point() or value.shape != log_prob.shape:
                continue  # no classes
            right = log_prob.clamp(max=0) if probs is None else probs.gather(-1, value[..., None])[..., 0].log()
            if not torch.allclose(log_prob, right, 1e-6, max(1e-6, 10 * self.eps)):
                return "log_prob is not the logarithm of a probability, that of the value that was drawn."
        draw = torch.Generator().manual_seed(2)
        learned = {name: torch.randn(t.shape, generator=draw).to(t) for name, t in self.gradient.items()}
        held = self.base.taken("teacher", learned, 1e-2, signals=self.signals) if learned else run
        # And the gradient, which a small rate or a fresh Adam hides from the loss.
        g, other = (flat(one.gradients["inner"]) for one in (run, held))
        moved = float(torch.dist(g, other)) > 1000 * self.eps * float(g.norm())
        if moved or abs(float(held.loss) - loss) > 1000 * self.eps * max(abs(loss), 1e-3):
            return "the student's step moves while the signal is held: there is a way past the signal to it."
        own = {name: self.gradient[name] for name in self.found.grads}
        if own and torch.dist(flat(self.found.grads), flat(own)) > self.tolerance * flat(own).norm():
            return "the mode's gradient in the teacher is not that of its h."
        if self.base.parts == 1:
            return ""

        # Micro-batches need losses that are means over examples, or (sum, weight): here by halves of the rows.
        case, signal, theta = self.base.copied(), self.signals[0], trainable(self.base.student)
        x, judged, outputs = case.batches[0], case.problem.outer_batch(case.labeled), run.outputs
        has = has_rows(case.problem, signal, len(outputs[0]))

        def inner(z: Tensor, i: int, j: int) -> Any:
            of = {n: t[i:j] if has.get(n, True) else t for n, t in signal.fields().items()}
            return case.problem.inner_loss(z[i:j], signal.having(of), rows(x, i, j), theta).mean()

        def outer(z: Tensor, i: int, j: int) -> Any:
            return case.problem.outer_loss(z[i:j], rows(judged, i, j))

        pairs = ("inner_loss", inner, outputs[0]), ("outer_loss", outer, outputs[-1].detach())
        for name, of_rows, z, n in ((*pair, len(pair[-1]) // 2) for pair in pairs if len(pair[-1]) > 1):
            both, *halves = (sum_and_weight(of_rows(z, *at)) for at in ((0, 2 * n), (0, n), (n, 2 * n)))
            a, b = (float(sum(t for t, _ in some) / sum(w for _, w in some)) for some in ([both], halves))
            if abs(a - b) > max(1e-6, 100 * self.eps) * max(abs(a), abs(b)):
                return f"{name} is {a:.6g}, and {b:.6g} by halves of the batch: no mean over examples."
        return ""

    def reason(self, off: list[str]) -> tuple[Status, str]:
        """Whether it is off for a good reason; else the likely causes."""
        self.held = self.run.states
        carried, self.held = not self.off(self.errors()), None
        if carried:
            return "allowed", "state that passes carry on (buffers, frozen parameters) depends on the weights."
        if self.gradient and not self.off(self.of_h()):
            if self.moved == "weights":
                return "refused", "the gradient of log_prob in the teacher is not its derivative: is it detached?"
            if names := functions_in(self.score(self.run)):
                return "refused", f"the backward of {few(names)} in the signal is not the derivative of its forward."
            return "allowed", "the signal is detached in part (detach, no_grad, argmax), which leaves out that part."
        at: Any = {"inner": lambda run: run.inner, "outer": lambda run: run.loss}
        bent = [n for n in at if self.off(self.compared(n, self.run.gradients[n], at[n], signals=self.signals))]
        which = f"the gradient of the {' and '.join(bent)} loss in the student's weights is not its derivative"
        if bent:
            # h is then that of double backward on the same copies, or of a mode alike.
            alike = {"unrolled": "forward", "reinforce": "reinforce_per_example", "reinforce_per_example": "reinforce"}
            other: Any = alike.get(self.estimate.name, "unrolled")
            try:
                h, reference = flat(self.h), flat(self.base.by_mode(other).feedback)
                if self.moved == "weights":  # the batch's scalar
                    h, reference = h.sum(), reference.sum()
                follows = bool(torch.dist(h, reference) <= self.tolerance * reference.norm())
            except (RuntimeError, MetaplError):  # of an operation without that derivative, or of labels that were drawn
                follows = self.expected or bool(other == "forward")
            if follows:
                which += " (straight-through, detached, a backward of its own), and the mode follows it."
                return "allowed", which
        likely = "; ".join([which] * bool(bent) + causes(self.base, self.run))
        return "refused", f"likely {likely or 'the mode, or a derivative of torch that it takes'}."


def off_by(at: Callable[[float], float], terms: Tensor, level: float, eps: float, tolerance: float) -> float | None:
    """How far the sum of ``terms``, a slope, is from the differences of a function, whose value is ``level``."""
    predicted, noise = float(terms.sum()), 50 * eps * max(abs(level), 1e-3)
    size, errors, small = max(abs(predicted), float(terms.norm())), list[float](), list[tuple[float, float]]()
    moves = [10.0**-n for n in range(12, 2, -1)] if eps < EPS32 else [1e-3, 1e-2, 3e-2]
    clear = [move for move in moves if noise / move <= tolerance * size]  # of rounding; the smallest first
    found = 0.0
    for move in sorted(moves, key=lambda m: (m not in clear, m != 1e-5, m if m in clear else -m)):
        blind = noise / move
        if errors and blind > 0.1 * (size if eps < EPS32 else max(size, abs(found))):
            continue
        found = (at(move) - at(-move)) / (2 * move)
        gap, reach = abs(found - predicted), max(size, abs(found))
        if max(gap, reach) <= blind:  # both are zero, to the rounding of float64, or what is not drowns
            return 0.0 if abs(predicted) <= min(noise, 50 * EPS * max(abs(level), 1e-3)) else None
        if blind > 0.1 * reach or not math.isfinite(found):
            continue
        if gap <= tolerance * reach + blind:
            return max(gap - blind, 0.0) / reach
        errors.append(gap / reach)
        small += [(found, gap)] if move in clear[:2] or eps >= EPS32 else []
        if len(small) == 2 and abs(small[0][0] - small[1][0]) + 10 * blind <= 0.2 * min(small[0][1], small[1][1]):
            return max(min(errors), 2 * tolerance)  # the smallest moves agree with each other
    if eps >= EPS32:  # no two moves agree on another slope
        return None
    best = min(errors, default=None)
    return best if best is None or best > APPROXIMATE else min(best, tolerance)


# ------------------------------------------------------------------------------------------------------ the real step


@dataclass
class Run:
    """One evaluation of F, and what was met on the way."""

    copies: Step
    loss: Any = None  # the outer loss
    inner: Any = None  # the first step's loss
    signals: list[Signal] = field(default_factory=list)  # of each step, with the teacher's graph
    outputs: list[Tensor] = field(default_factory=list)  # of each step; at last, with their graph, on the outer batch
    gradients: dict[str, Tree] = field(default_factory=dict)  # of the first inner loss and of the outer loss
    states: list[Tree] = field(default_factory=list)  # buffers and frozen parameters before each pass
    written: set[str] = field(default_factory=set)  # weights of the student that a pass or a loss has moved


@dataclass(frozen=True)
class Step:
    """What a step is computed from: as it was given, or copies of it, each of which serves one evaluation."""

    teacher: nn.Module | None
    student: nn.Module
    problem: Problem
    update: Update  # of the optimizer, without a clip
    labeled: Any
    batches: list[Any]
    clip_norm: float | None
    generator: torch.Generator | None
    random: RandomState
    parts: int = 1  # micro-batches, of which the batches are the first ones
    own: tuple[Tensor, ...] = ()  # what the problem holds that requires a gradient

    def copied(self, dtype: torch.dtype | None = None) -> Step:
        """Copies that share what the originals share, with all tensors of floating point in ``dtype``."""
        memo: dict[int, Any] = {id(self.generator): self.generator and self.generator.clone_state()}
        for network in (self.teacher, self.student, self.problem):
            for part in network.modules() if isinstance(network, nn.Module) else ():
                # Results in attributes, such as the old weight_norm's, which deepcopy refuses.
                memo |= {id(t): t.detach().clone() for t in vars(part).values() if isinstance(t, Tensor) and t.grad_fn}
        transform = getattr(self.update, "transform", None)  # of functions alone; TorchOpt's chains cannot be copied
        memo[id(transform)] = transform
        copy.deepcopy((self.teacher, self.student), memo)
        known = set(memo)
        copy.deepcopy(self.problem, memo)
        own = [t for i, t in memo.items() if i not in known and isinstance(t, Tensor) and t.requires_grad]
        case = replace(copy.deepcopy(self, memo), own=tuple(own))
        for t in memo.values() if dtype is not None else ():
            if isinstance(t, Tensor) and t.is_floating_point():
                t.grad, t.data = None, t.data.to(dtype)
        for p in [t for t in memo[id(memo)] if isinstance(t, nn.Parameter)]:
            vars(memo[id(p)]).update(copy.deepcopy(vars(p), memo))  # Python attributes, which torch's copy leaves out
        memory = {p.untyped_storage().data_ptr(): p for p in trainable(self.student).values()}
        for t in memo[id(memo)]:  # tensors in the memory of a parameter, whose copy has memory of its own
            if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and t.untyped_storage().data_ptr() in memory:
                p = memory[t.untyped_storage().data_ptr()]
                begin = t.storage_offset() - p.storage_offset()
                memo[id(t)].data = memo[id(p)].data.as_strided(t.shape, t.stride(), begin)
        if isinstance(self.update, TorchUpdate):
            pairs = zip(*(parts_of(vars(update)["optimizer"]) for update in (case.update, self.update)), strict=True)
            for copied, own in pairs:
                vars(copied).update({name: vars(own)[name] for name in HOOKS})  # which deepcopy leaves out
        case.update.follow(trainable(case.student))
        return case

    def perturbed(self) -> Step:
        """The same a hundredth of the weights' size away: no ReLU is at exactly 0, where it has two slopes."""
        case, draw = self.copied(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in (*case.learned().values(), *trainable(case.student).values()):
                p.add_(1e-2 * max(size_of(p), 0.1) * torch.randn(p.shape, generator=draw).to(p))
        return case

    def learned(self) -> Tree:
        taught = {} if self.teacher is None else trainable(self.teacher)
        return {**taught, **{f"the problem's parameter {i}": t for i, t in enumerate(self.own)}}

    def by_mode(self, mode: Mode) -> Hypergradient:
        case = self.copied()
        case.random.restore()
        batches = {"labeled": case.labeled, "unlabeled": Lookahead(case.batches)}
        options: Any = {"inner_optimizer": case.update, "generator": case.generator, "clip_norm": case.clip_norm}
        return hypergradient(case.teacher, case.student, **batches, mode=mode, problem=case.problem, **options)

    def taken(
        self,
        moved: str = "",
        by: Tree | None = None,
        side: float = 0.0,
        *,
        signals: list[Signal] | None = None,  # signals in the place of the teacher's
        seen: list[Tensor] | None = None,  # the student's outputs as the teacher is given them: constants to every mode
        held: list[Tree] | None = None,  # buffers and frozen parameters with which passes begin
        steps: bool = True,  # False: for L(θ), with the graph of the inner loss
    ) -> Run:
        """Take the steps on fresh copies, with something ``moved`` by ``side`` times ``by``: the ``"teacher"`` and the
        problem's parameters, fields of the ``"signal"``, the student's weights at the ``"inner"`` or the ``"outer"``
        loss, or the ``"weights"`` 1 + ε of the inner losses."""
        case, by = self.copied(), by or {}
        problem, student, update, theta = case.problem, case.student, case.update, trainable(case.student)
        enters, run = enters_input(problem), Run(case)

        def move(what: str, tree: Any) -> None:
            with torch.no_grad():
                for name, d in by.items() if what == moved else ():
                    tree[name].add_(d, alpha=side)

        def begin(network: nn.Module | None) -> None:
            named = [] if network is None else [*network.named_buffers(), *network.named_parameters()]
            still = {name: t for name, t in named if not t.requires_grad}
            for name, t in held[len(run.states)].items() if held is not None else ():
                if name in still:
                    still[name].copy_(t)
            run.states.append({name: t.detach().clone() for name, t in still.items()})

        def ask(x: Any, z: Tensor | None) -> Signal:
            begin(case.teacher)
            k, z = len(run.signals), z if z is None or seen is None else seen[len(run.signals)]
            run.signals.append(problem.signal(case.teacher or nn.Module(), x, z, generator=case.generator))
            signal = run.signals[k].detached() if signals is None else signals[k]
            shift = {name: d for (step, name), d in by.items() if step == k} if moved == "signal" else {}
            return signal.having({name: signal.fields()[name] + side * d for name, d in shift.items()})

        def now() -> Tree:
            return {name: p.detach().clone() for name, p in theta.items()}

        def compare(before: Tree) -> None:
            same = {n: p.dtype == before[n].dtype and p.shape == before[n].shape for n, p in theta.items()}
            changed = (n for n, p in theta.items() if not same[n] or not torch.allclose(p, before[n], 0, 0, True))
            run.written.update(changed)

        move("teacher", case.learned())
        move("inner", theta)
        case.random.restore()
        for k, x in enumerate(case.batches):
            before = now()
            signal = ask(x, None) if problem.signal_of_batch or enters else None
            begin(student)
            z = student(problem.student_input(x, *([signal] if enters else [])))
            after = RandomState.now(self.random.device)
            run.outputs.append(z.detach())
            signal = signal or ask(x, z.detach())
            losses = problem.inner_loss(z, signal, x, theta)
            loss = (losses * (1 + side * by[0, "log_prob"]) if moved == "weights" else losses).mean()
            loss.backward(retain_graph=not steps)
            run.inner = run.inner if k else loss
            compare(before)
            grads = {name: p.grad for name, p in theta.items() if p.grad is not None}
            run.gradients.setdefault("inner", {name: g.clone() for name, g in grads.items()})
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(theta.values(), case.clip_norm)
            if steps:  # the optimizer's own; of a transform, and of Muon, the rule
                update.exactly(theta, grads)
            student.zero_grad()
        move("outer", theta)
        before, judged = now(), problem.outer_batch(case.labeled)
        after.branch().restore()  # the labeled pass draws from a stream of its own
        begin(student)
        run.outputs.append(student(problem.outer_input(judged)))
        total, weight = sum_and_weight(problem.outer_loss(run.outputs[-1], judged))
        compare(before)
        run.loss = total / weight
        if not moved and run.loss.requires_grad:
            run.loss.backward()
            run.gradients["outer"] = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theta.items()}
        run.loss = run.loss.detach()
        return run


def flat(tree: Any) -> Tensor:
    return torch.cat([as_real(t.detach().to_dense()).double().flatten() for t in pytree.tree_leaves(tree)])


def size_of(t: Tensor) -> float:
    return max(float(t.detach().double().square().mean().sqrt()), 1e-2)


def nodes_of(*tensors: Tensor) -> list[Any]:
    nodes: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    known = set(nodes)
    for node in nodes:  # which grows
        nodes += (new := {other for other, _ in node.next_functions if other is not None} - known)
        known |= new
    return nodes


def functions_in(t: Tensor) -> list[str]:
    """The names of autograd functions of one's own in a graph."""
    return sorted({type(n).__name__.removesuffix("Backward") for n in nodes_of(t) if hasattr(n, "_forward_cls")})


def rounding_of(run: Run) -> float:
    """The rounding of the coarsest type in the graphs of a run on copies in float64; 0 where all are in float64."""
    ends = run.inner, run.outputs[-1], *(t for signal in run.signals for t in signal.fields().values())
    dtypes = {result.dtype for node in nodes_of(*ends) for result in getattr(node, "_input_metadata", ())}
    return max((torch.finfo(t).eps for t in dtypes - {torch.float64} if t.is_floating_point), default=0.0)


def causes(before: Step, run: Run) -> list[str]:
    """What a step has in it, or has changed, that may make a gradient wrong."""
    pairs = [(getattr(before, who), getattr(run.copies, who)) for who in ("student", "teacher")]
    parts = [pair for a, b in pairs if a is not None for pair in zip(a.modules(), b.modules(), strict=False)]
    hooked = [type(a).__name__ for a, _ in parts if a._forward_hooks or a._backward_hooks]
    counted = [n for a, b in parts for n, v in vars(b).items() if isinstance(v, int | float) and vars(a).get(n) != v]
    inputs = zip(*(pytree.tree_leaves([case.batches, case.labeled]) for case in (before, run.copies)), strict=True)
    written = ["batches"] if any(isinstance(a, Tensor) and not a.equal(b) for a, b in inputs) else []
    found = {"hooks (of {})": hooked, "attributes that a pass changes ({})": counted, "{} changed in place": written}
    found["autograd functions of the student's own ({})"] = functions_in(run.outputs[-1])
    return [text.format(few(names, 3)) for text, names in found.items() if names]
