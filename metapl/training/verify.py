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
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metapl.errors import MetaplError, either, few, reason_of
from metapl.execution.layout import layouts
from metapl.execution.modules import trainable
from metapl.execution.rng import RandomState
from metapl.execution.state import Slots
from metapl.feedback import Estimator, Implicit, LossDifference, Mode, estimator
from metapl.feedback.compatible import prepare
from metapl.feedback.implicit import conjugate_gradient, neumann
from metapl.problems.base import Problem, Signal, field_of, joined_signals, sum_and_weight
from metapl.runs.generators import rng_state, set_rng_state
from metapl.training import real_step
from metapl.training.real_step import EPS, EPS32, Run, Step, Tree, flat, off_by
from metapl.updates import update_of

Errors = dict[str, float | None]  # None: rounding drowns the difference
Status = Literal["right", "allowed", "refused", "cannot tell", "nothing to verify"]
Setting = bool | int | Literal["warn"]

MOST_WEIGHTS = 50_000_000  # of both networks; larger ones are verified by check_gradient, or verify=N
EXACT = 1e-5  # the relative error that an exact mode may have, beyond rounding
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
        mode: default the trainer's own, and ``"forward"`` without one. The others are :func:`metapl.hypergradient`'s.

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
    trainer = isinstance(getattr(teacher, "verification", None), Verification)
    given = [student, inner_optimizer, problem, inner_state, generator, clip_norm]
    wrong = any(part is not None for part in given) if trainer else student is None or inner_optimizer is None
    if wrong or labeled is None or unlabeled is None:
        raise MetaplError("check_gradient takes a trainer, or teacher, student and inner_optimizer; and both batches.")
    if student is None:
        return verified(*_of_trainer(teacher, labeled, unlabeled, mode))
    (of_teacher, of_student, device), estimate = layouts(teacher, student), estimator(mode or "forward")
    if of_student.is_sharded or not of_student.ranks.alone:
        raise MetaplError("check_gradient was given networks of several processes; expected those of one, not sharded.")
    networks = None if of_teacher is None else of_teacher.network, of_student.network, prepare(problem, estimate)
    parts = *networks, inner_optimizer, inner_state, *real_step.batches_of(labeled, unlabeled)
    step = Step(*parts, clip_norm, accumulate, generator, RandomState.now(device))
    return verified(step, estimate)


class Verification:
    """When the steps of a trainer are verified, and what was found; ``setting`` is its ``verify=``."""

    def __init__(self, setting: Setting = True) -> None:
        if setting != "warn" and (not isinstance(setting, int) or setting < 0):
            raise MetaplError(f"verify={setting!r} was given; expected True, False, 'warn' or a number of steps.")
        self.setting, self.verdict = setting, ""
        self.known: set[int] = set()  # fingerprints of networks that were verified

    def before(self, trainer: Any, labeled: Any, unlabeled: Any, networks: Sequence[Slots]) -> None:
        """Verify where it is due, before anything of a step runs; :class:`metapl.MetaplError` for a wrong gradient."""
        if not self.setting:
            return
        mark = hash(tuple(slots.mark for slots in networks))
        every = 0 if isinstance(self.setting, bool | str) else self.setting
        if mark in self.known and not (every and trainer.steps_done % every == 0):
            return
        weights = sum(p.numel() for network in trainer.networks.values() for p in network.parameters())
        spread = any(layout.is_sharded or not layout.ranks.alone for layout in trainer.layouts)
        if spread or (weights > MOST_WEIGHTS and not every):
            what = "several processes" if spread else f"{weights:,} weights"
            if trainer.ranks.first:
                LOG.warning("Networks of %s are not verified: give metapl.check_gradient small ones of one.", what)
        else:
            found = verified(*_of_trainer(trainer, labeled, unlabeled))
            self.verdict = f"{found.status}: {found.verdict}"
            found.taken(self.setting)
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


def _of_trainer(trainer: Any, labeled: Any, unlabeled: Any, mode: Mode | None = None) -> tuple[Step, Estimator]:
    estimate, optimizer = estimator(trainer.mode if mode is None else mode), trainer.inner_optimizer
    state = None if real_step.of_torch(optimizer) else trainer.update.read_state()
    networks = trainer.teacher, trainer.student, prepare(trainer.problem, estimate)
    options = trainer.clip_norm, trainer.accumulate, trainer.generator, RandomState.now(trainer.device)
    given: tuple[Any, ...] = (*networks, optimizer, state, *real_step.batches_of(labeled, unlabeled), *options)
    return Step(*given), estimate


# -------------------------------------------------------------------------------------------------------- the verdict


def verified(given: Step, estimate: Any) -> GradientCheck:
    """A mode's gradient of a step beside its definition; nothing of the process is moved."""
    estimate = getattr(estimate, "base", estimate)  # whose feedback a control alters
    plainly = {"normalization": "gradient", "similarity": "dot", "baseline": None, "truncate": None}
    names = {one.name for one in fields(estimate)} if is_dataclass(estimate) else set()
    estimate = replace(estimate, **{name: value for name, value in plainly.items() if name in names})
    if estimate.credits == "nothing":
        return GradientCheck("nothing to verify", f"mode {estimate.name!r} gives no feedback.")
    given = replace(given, accumulate=1) if isinstance(estimate, Implicit) else given  # its system is the whole batch's
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
        self.found, self.run = real_step.by_mode(base, estimate), base.taken()
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
        if at.off(errors):
            at = _Verified(self.base.beside(), self.estimate, self.eps)
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
        return EXACT if exact and not by_difference and self.eps < EPS32 else real_step.APPROXIMATE

    def off(self, errors: Errors) -> list[str]:
        return [what for what, error in errors.items() if error is not None and error > self._tolerance]

    def errors(self, held: list[Tree] | None = None) -> Errors:
        """Of the mode; ``held``: with these states before each pass."""
        errors: Errors = {}
        if type(self.base.problem).revised_signal is Problem.revised_signal:  # else the mode's is that of a later step
            gap = abs(float(self.found.outer_loss) - float(self.run.loss)) / max(abs(float(self.run.loss)), 1e-3)
            errors["the mode's own L(θ′)"] = max(gap, 2 * real_step.APPROXIMATE) if gap > 1000 * self.eps else gap
        if isinstance(self.estimate, Implicit):
            errors |= self._of_implicit(self.estimate)
        elif isinstance(self.estimate, LossDifference):
            before, after, h = float(self.base.taken(steps=False).loss), float(self.run.loss), float(self.h[0, "value"])
            errors["L(θ) − L(θ′)"] = abs(before - after - h) / max(abs(h), 1e-9 * abs(before), 1e-300)
        elif self.sampled and not self.expected:
            errors |= self._of("weights", {"weights": -self.h[0, "value"]}, told=self.told, held=held)
            if None in errors.values():  # such as of a clip, which takes all lengths for one
                change = abs(float(self.base.taken(steps=False).loss) - float(self.run.loss))
                drowned = 5e4 * self.eps * max(abs(float(self.run.loss)), 1e-3)  # by the rounding of the longest move
                errors = {n: 0.0 if e is None and drowned < EXACT * change else e for n, e in errors.items()}
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
        direction = {n: t * (real_step.size_of(theta[n]) if n in theta else 1.0) for n, t in signs.items()}
        what, length = what or f"the {moved}", float(flat(gradient).norm())
        errors: Errors = {}
        if length > 0 and len(flat(gradient)) > 1:
            along = {n: g * float(flat(direction).norm()) / length for n, g in gradient.items()}
            errors[f"{what}, along the gradient"] = off_by(at, gradient, along, *given)
        return errors | {f"{what}, in a random direction": off_by(at, gradient, direction, *given)}

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
        how: dict[str, Any] = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        g = dict(zip(learned, torch.autograd.grad(score, [*learned.values()], **how), strict=True))
        return g if own else g | self.found.grads

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
            left = flat([t + mode.damping * w[name] - v[name] for name, t in hessian(w).items()]).norm()
            exact, h = flat(mixed(w, [*at.values()])), flat([*self.h.values()])
        LOG.info("(H + damping) w = -v is solved up to %.2g of v.", float(left / flat(v).norm()))
        return {"h beside double backward": float((h - exact).norm() / exact.norm().clamp_min(1e-300))}

    # ------------------------------------------------------------------------------------- what is wrong, and why

    def _fault(self) -> str:
        """What is against the contract whatever the differences say."""
        run, parts = self.run, self.base.accumulate
        if run.written:
            return f"a pass of the student, or a loss, writes to its weights ({few(sorted(run.written), 3)})."
        for signal in run.signals:
            log_prob, probs, value = signal.log_prob, signal.probs, signal.value
            if log_prob is None or value.is_floating_point() or value.shape != log_prob.shape:
                continue  # no classes
            if bool((log_prob > 1e-6).any()):
                return "log_prob is above 0, so it is no logarithm of a probability."
            if probs is not None and probs.shape[:-1] == value.shape:
                right = probs.gather(-1, value[..., None])[..., 0].log()
                if not torch.allclose(log_prob, right, 1e-6, max(1e-6, 10 * self.eps)):
                    return "log_prob is not the logarithm of probs at the value that was drawn."
        if parts > 1:
            case, signal, z = self.base.copied(), joined_signals(self.told[:parts]), torch.cat(run.outputs[:parts])
            inner = case.problem.inner_loss(z, signal, case.batches[0], trainable(case.student)).mean()
            whole = case.problem.outer_loss(torch.cat(run.labeled), case.problem.outer_batch(case.labeled))
            total, weight = sum_and_weight(whole)
            outer = float((total / weight).detach()), float(run.loss)
            pairs = {"inner_loss": (float(inner.detach()), run.inner), "outer_loss": outer}
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
            return "refused", "two equal steps differ: random numbers that are not torch's own, or other state."
        if not self.off(self.errors(held=self.run.states)):
            return "allowed", "state that passes carry on (buffers, frozen parameters) depends on the weights."
        if self.learned and self.off(self._past_the_signal()):
            return "refused", "the loss moves while the signal is held: there is a way past the signal to it."
        if off[0].startswith("the signal in the teacher") and not self.expected:
            return "refused", "the gradient of log_prob in the teacher is not its derivative: is it detached in part?"
        causes = real_step.causes(self.base, self.run)
        if off[0] == "the mode's own L(θ′)":
            return "refused", f"likely {'; '.join(causes) or 'state or random numbers of its own, or a shared memory'}."
        scored = self.learned and (self.expected or not self.sampled)
        if scored and not self.off(self._of_signal()):
            if not self.off(self._of_score(self._gradient(own=True))):
                return "refused", "h is right, and the mode's gradient in the teacher is not that of h."
            if names := real_step.functions_in(self._score(self.run.signals)):
                return "refused", f"the backward of {few(names)} in the signal is not the derivative of its forward."
            return "allowed", "the signal is detached in part (detach, no_grad, argmax), which leaves out that part."
        at = {"inner": "start", "outer": "end"}
        bent = [n for n, w in at.items() if self.off(self._of(w, self.run.gradients[w], told=self.told))]
        which = f"the gradient of the {' and '.join(bent)} loss in the student's weights is not its derivative"
        if bent and self._as_another():
            return "allowed", f"{which} (straight-through, detached, a backward of its own), and the mode follows it."
        causes = [which] * bool(bent) + causes
        return "refused", f"likely {'; '.join(causes) or 'the mode, or a derivative of torch that it takes'}."

    def _as_another(self) -> bool:
        """Whether h is that of double backward on the same copies; of a mode without it, that of a mode alike."""
        if self.expected:
            return True  # no other mode differentiates at labels that were drawn
        alike = {"unrolled": "forward", "reinforce": "reinforce_per_example", "reinforce_per_example": "reinforce"}
        other: Any = alike.get(self.estimate.name, "unrolled")
        try:
            h, reference = flat([*self.h.values()]), flat(real_step.by_mode(self.base, other).feedback)
        except (RuntimeError, MetaplError):  # of an operation without that derivative
            return bool(other == "forward")
        h, reference = (h.sum(), reference.sum()) if self.sampled else (h, reference)  # Σ h_i is the batch's scalar
        return bool(torch.dist(h, reference) <= self._tolerance * reference.norm())
