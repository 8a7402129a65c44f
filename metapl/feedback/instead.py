"""Which modes can be taken where one cannot run on a student: they are tried on its own steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.capabilities import FORWARD_AD
from metapl.execution.kernels import NotByThisMode
from metapl.feedback.base import Estimator
from metapl.feedback.credit import credited_fields, feedback_from_gradients
from metapl.feedback.difference import Difference
from metapl.feedback.forward import Forward
from metapl.feedback.path import Path

AGREES_TO = 0.05
"""How far the feedback of a mode may be from that of double backward, relative to its norm, for it to be named."""


_DTYPES = re.compile(r"dtype|scalar type|(?:Half|BFloat16|Float|Double)\w* and (?:bias|weight) type", re.IGNORECASE)


@contextmanager
def others_named(mode: Estimator, path: Path) -> Iterator[None]:
    """Name the mode in the error that it cannot run on the student of a path, and those that can."""
    try:
        yield
    except NotByThisMode as error:
        raise type(error)(_named(mode, path, str(error))) from error.__cause__
    except RuntimeError as error:
        if not _DTYPES.search(str(error)):
            raise
        why = (
            "it runs the student in float32, and a cast inside the student does not go along "
            f'({str(error).splitlines()[0]}); expected weights of one type, and precision="bfloat16" instead of casts.'
        )
        raise NotByThisMode(_named(mode, path, why)) from error


def _named(mode: Estimator, path: Path, why: str) -> str:
    return f"mode '{mode.name}' cannot run here: {why} {_mend(mode, path)}"


def _mend(mode: Estimator, path: Path) -> str:
    if mode.name == "implicit":  # the gradient of an optimum, which no other mode takes
        return "Write that part of the student otherwise."
    sampled, one_step = path.steps[-1].signal.sampled, len(path.steps) == 1
    fitting = list(_exact(mode, path, sampled, one_step))
    if sampled and one_step:
        fitting.append('mode="reinforce"')
    if fitting:
        return f"Use {' or '.join(fitting)}, which {'run' if len(fitting) > 1 else 'runs'} on this student."
    if one_step:
        return 'Use mode="reinforce" with sampled labels, which takes plain passes only.'
    return "Look one step ahead, where the modes that take plain passes only can be used."


def _exact(mode: Estimator, path: Path, sampled: bool, one_step: bool) -> Iterator[str]:
    """The modes without noise for this signal and so many steps that run, and agree with double backward where that
    does."""
    expected = _tried(_by_double_backward, path)
    if expected is not None and not sampled and not mode.keep_graph:
        yield 'mode="unrolled"' + " (with accumulate=1)" * (len(path.labeled) > 1)
    tangents = [("forward", Forward()), ("difference", Difference())] if one_step else [("forward", Forward())]
    own = None if mode.keep_graph else "forward" if FORWARD_AD in mode.requires else "difference"
    for name, estimate in tangents:
        found = None if name == own else _tried(_by, path, estimate)
        if found is not None and expected is not None:
            found = found if (found - expected).norm() <= AGREES_TO * expected.norm() else None
        if found is not None:
            by_example = f'metapl.feedback.ReinforcePerExample(tangent="{name}")'
            yield by_example if mode.credits == "example" else f'mode="{name}"'


def _by_double_backward(path: Path) -> Tensor:
    """The feedback on the last signal."""
    step = path.steps[-1]
    adjoint = step.adjoint(path.outer_gradient(), None, credited_fields(step.signal))
    return feedback_from_gradients(step.signal, adjoint.in_signal).h


def _by(path: Path, estimate: Estimator) -> Tensor:
    return estimate.feedback(path, estimate.init())[0][-1].h


def _tried(trial: Callable[..., Tensor], *given: Any) -> Tensor | None:
    try:
        return trial(*given)
    except (RuntimeError, MetaplError):
        return None
