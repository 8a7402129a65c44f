"""Whether a mode, a problem, networks and batches go together; and which modes do, where one does not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, called, either
from metapl.execution import checks
from metapl.execution.agreement import check_shares
from metapl.execution.buffers import own_code
from metapl.execution.capabilities import CURVATURE, FORWARD_AD, ONE_PROCESS, THROUGH_INPUT, Capability
from metapl.execution.kernels import NotByThisMode
from metapl.execution.layout import Layout
from metapl.execution.ranks import Ranks
from metapl.feedback import MODES, Difference, Estimator, Feedback, Forward, estimator, modes_for
from metapl.feedback.credit import credited_fields, feedback_from_gradients
from metapl.feedback.path import Path
from metapl.problems import PseudoLabels
from metapl.problems.base import BilevelProblem, Kind, Problem, Signal, enters_input, has_own, kind_of

PSEUDO_LABELS = PseudoLabels()

AGREES_TO = 0.05
"""How far the feedback of a mode may be from that of double backward, relative to its norm, for it to be named."""

_DTYPES = re.compile(r"dtype|scalar type|(?:Half|BFloat16|Float|Double)\w* and (?:bias|weight) type", re.IGNORECASE)


def prepare(problem: BilevelProblem | None, mode: Estimator) -> Problem:
    """The problem (default: pseudo-labels) with a kind of signal that the mode takes."""
    problem = PSEUDO_LABELS if problem is None else problem
    if isinstance(problem, type) or not isinstance(problem, BilevelProblem):
        name = f"the class {problem.__name__}" if isinstance(problem, type) else checks.described(problem)
        raise MetaplError(
            f"problem is {name}; expected an object with signal, inner_loss and outer_loss (metapl.BilevelProblem), "
            "such as problem=PseudoLabels()."
        )
    return problem.for_modes(mode.labels, mode.name)


def both_batches(labeled: Any, unlabeled: Any, outer: Any, inner: Any) -> tuple[Any, Any]:
    """The outer and the inner batch, each by either of its names; one that is missing is refused."""
    labeled, unlabeled = either(labeled=labeled, outer=outer), either(unlabeled=unlabeled, inner=inner)
    for batch, name, what in (
        (labeled, "labeled= (or outer=)", "outer"),
        (unlabeled, "unlabeled= (or inner=)", "inner"),
    ):
        if batch is None:
            raise MetaplError(f"{name} was not given; expected the {what} batch.")
    return labeled, unlabeled


def check_teacher(teacher: nn.Module | None, problem: Problem, **given: bool) -> None:
    """Refuse a problem without the teacher that makes its signal, one that is not used, and options that are ``given``
    for a teacher where there is none."""
    kind = kind_of(problem)
    if teacher is None and problem.has_teacher:
        raise MetaplError(f"teacher is None, and {kind} takes its signal from a teacher; expected a torch.nn.Module.")
    if teacher is not None and not problem.has_teacher:
        raise MetaplError(f"a teacher was given, and {kind} has none; expected teacher=None.")
    for name in (name for name, is_given in given.items() if is_given and teacher is None):
        raise MetaplError(f"{name} was given with teacher=None, and there is no teacher to use it; leave it out.")


def check_batches(labeled: Any, unlabeled: Sequence[Any], device: torch.device, ranks: Ranks, steps: int = 1) -> None:
    """:func:`metapl.execution.agreement.check_shares`; ``unlabeled``: the first ones of so many steps."""
    inner = [("unlabeled", batch, f" of step {n}" if steps > 1 else "") for n, batch in enumerate(unlabeled)]
    check_shares([("labeled", labeled, ""), *inner], device, ranks)


def check_mode(mode: Estimator, steps: int, problem: Problem, student: Layout) -> None:
    """Refuse steps of the student that the mode or the problem cannot take, and what the layout does not offer."""
    kind, mend = kind_of(problem), "give one batch (lookahead=1)"
    revising, entering = has_own(problem, "revised_signal"), enters_input(problem)
    wrong = ""
    if steps > 1 and revising:
        wrong = (
            f"{kind} takes the student's step again on a signal that it makes of the feedback, and this goes with one "
            f"step, but {steps} were given; {mend}."
        )
    elif steps > 1 and not mode.looks_ahead:
        wrong = (
            f"mode '{mode.name}' looks one student step ahead, and {steps} were given; {mend}, or use a mode that "
            f"takes several: {', '.join(modes_for(looks_ahead=True))}."
        )
    elif entering and revising:
        wrong = (
            f"{kind} has revised_signal and student_input(batch, signal), and a step that is taken again has the first "
            "one's input; expected one of the two."
        )
    elif revising and getattr(mode, "normalization", None) == "cosine":
        wrong = (
            'normalization="cosine" divides by the student\'s gradient, which is zero where a problem makes its signal '
            'of the feedback; leave it at "gradient".'
        )
    if wrong:
        raise MetaplError(wrong)
    if mode.credits == "example" and entering:
        raise _labels_enter(mode, problem)
    for need, who in _required(mode, steps, problem).items():
        if need not in student.offers:
            fitting = " or ".join(
                repr(m.name) for m in map(estimator, MODES) if not _required(m, 1, problem).keys() - student.offers
            )
            there = f"With one student step, mode {fitting} runs there; else train" if fitting else "Train"
            raise MetaplError(
                f"{who} does not run on a student that is {student.how}: it takes {need.value}. {there} in one process."
            )


def _required(mode: Estimator, steps: int, problem: Problem) -> dict[Capability, str]:
    """What is required of the student's layout, and what requires it."""
    found = {need: f"mode {mode.name!r}" for need in Capability if need in mode.requires}
    if steps > 1:
        found.setdefault(CURVATURE, f"a {called('look-ahead')} of {steps} student steps")
    if mode.keep_graphs:
        found.setdefault(ONE_PROCESS, f"keep_graphs={mode.keep_graphs}")
    if mode.keep_on not in (None, "cpu"):
        found.setdefault(ONE_PROCESS, "keep_on= with a folder")
    if has_own(problem, "revised_signal"):
        found.setdefault(ONE_PROCESS, f"{kind_of(problem)}, which makes its signal of the feedback,")
    if mode.credits == "signal" and enters_input(problem):
        found[THROUGH_INPUT] = f"mode {mode.name!r} with the signal of {kind_of(problem)}, which enters the input,"
    return found


def check_kind(signal: Signal, mode: Estimator, problem: Problem, steps: int, outputs: Tensor | None = None) -> None:
    """Refuse a signal of a kind that the mode cannot differentiate; ``steps`` of the student are taken. Of the
    student's ``outputs`` on classes, warn if they are probabilities."""
    takes_logits = problem.teacher_classifies and own_code(problem.inner_loss)
    if takes_logits and outputs is not None and _are_probabilities(outputs):
        warnings.warn(
            "the student's outputs are probabilities (none is negative, and each row sums to 1), and the losses "
            "take logits, of which they compute the softmax themselves: it would be taken twice, and little would "
            "be learned. Leave the softmax out of the networks.",
            stacklevel=2,
        )
    told = signal.differentiable()
    if isinstance(signal.value, dict):
        told = {name: t for name, t in told.items() if name not in vars(signal)}
    if not signal.sampled and not told and mode.credits != "nothing":
        raise MetaplError(
            f"the problem's signal is {checks.described(signal.value)} without a log_prob, so mode '{mode.name}' has "
            "nothing to differentiate; expected a floating-point tensor (of a dict, one of them), or the log_prob of "
            "each sampled value."
        )
    if signal.sampled and mode.credits == "signal" and enters_input(problem):
        raise _labels_enter(mode, problem)
    if mode.keep_graphs and (signal.sampled or enters_input(problem)):
        raise MetaplError(
            f"keep_graphs={mode.keep_graphs} was given, and the signal of {kind_of(problem)} "
            f"{'is sampled' if signal.sampled else 'enters the input of the student'}, where the derivative is taken "
            "in a pass of its own; expected keep_graphs=0."
        )
    kind: Kind = "hard" if signal.sampled else "soft"
    if kind not in mode.labels:
        words = {"soft": ("differentiable", "it carries no log_prob"), "hard": ("sampled", "it carries log_prob")}
        (own, why), (other, _) = words.pop(kind), *words.values()
        raise MetaplError(
            f"mode '{mode.name}' is for {other} signals, and the problem's signal is {own} ({why}); expected one of "
            f"the modes {', '.join(modes_for(kind, looks_ahead=steps > 1))}."
        )


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether the rows of outputs on the host are distributions."""
    if checks.waits(outputs) or outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    return bool((outputs >= 0).all()) and bool(((outputs.detach().sum(1) - 1).abs() < 1e-3).all())


def _labels_enter(mode: Estimator, problem: Problem) -> MetaplError:
    fitting = [m.name for m in map(estimator, MODES) if "hard" in m.labels and m.credits in ("batch", "nothing")]
    return MetaplError(
        f"mode {mode.name!r} credits each label apart, and the sampled labels of {kind_of(problem)} enter the "
        f"student's input, where they act on others too; expected one of the modes {', '.join(fitting)}, or a "
        "differentiable signal (without log_prob)."
    )


def name_others(error: BaseException, mode: Estimator, path: Path) -> None:
    """Where a mode cannot run on the student of a path, raise an error that names it, and those that can: they are
    tried on its own steps."""
    if isinstance(error, NotByThisMode):
        raise type(error)(f"mode '{mode.name}' cannot run here: {error} {_mend(mode, path)}") from error.__cause__
    plain = _tried(path.outer_gradient) is not None  # else it is a labeled batch or a loss that is wrong, in any mode
    if plain and isinstance(error, RuntimeError) and _DTYPES.search(str(error)):
        raise NotByThisMode(
            f"mode '{mode.name}' cannot run here: it runs the student in float32, and a cast inside the student does "
            f'not go along ({str(error).splitlines()[0]}); expected weights of one type, and precision="bfloat16" '
            f"instead of casts. {_mend(mode, path)}"
        ) from error


def _mend(mode: Estimator, path: Path) -> str:
    """The modes that run, and agree with double backward where that does."""
    if mode.name == "implicit":  # the gradient of an optimum, which no other mode takes
        return "Write that part of the student otherwise."
    step, one_step, fitting = path.steps[-1], len(path.steps) == 1, []
    sampled = step.signal.sampled

    def by_double_backward() -> Tensor:
        _, in_signal = step.adjoint(path.outer_gradient(), None, credited_fields(step.signal))
        return entries(feedback_from_gradients(step.signal, in_signal))

    def by(other: Estimator) -> Tensor:
        return entries(other.feedback(path, other.init())[0][-1])

    def entries(feedback: Feedback) -> Tensor:
        return torch.cat([h.flatten() for h in (feedback.h, *feedback.others.values())])

    expected = _tried(by_double_backward) if path.student.ranks.alone else None
    if expected is not None and not sampled and not mode.keep_graph:
        fitting.append('mode="unrolled"' + " (with accumulate=1)" * (len(path.labeled) > 1))
    own = None if mode.keep_graph else "forward" if FORWARD_AD in mode.requires else "difference"
    for other in (Forward(), Difference())[: 1 + one_step]:
        found = None if other.name == own else _tried(partial(by, other))
        if found is not None and (expected is None or (found - expected).norm() <= AGREES_TO * expected.norm()):
            by_example = f'metapl.feedback.ReinforcePerExample(tangent="{other.name}")'
            fitting.append(by_example if mode.credits == "example" else f'mode="{other.name}"')
    if sampled and one_step:
        fitting.append('mode="reinforce"')
    if fitting:
        return f"Use {' or '.join(fitting)}, which {'run' if len(fitting) > 1 else 'runs'} on this student."
    if one_step:
        return 'Use mode="reinforce" with sampled labels, which takes plain passes only.'
    return "Look one step ahead, where the modes that take plain passes only can be used."


def _tried(trial: Callable[[], Any]) -> Any:
    try:
        return trial()
    except (RuntimeError, MetaplError):
        return None
