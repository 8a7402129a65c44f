"""Which modes can be taken where one cannot run on a student: they are tried on its own steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

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
        raise type(error)(f"mode '{mode.name}' cannot run here: {error} {_mend(mode, path)}") from error.__cause__
    except RuntimeError as error:
        if not _DTYPES.search(str(error)):
            raise
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
        adjoint = step.adjoint(path.outer_gradient(), None, credited_fields(step.signal))
        return feedback_from_gradients(step.signal, adjoint.in_signal).h

    expected = _tried(by_double_backward)
    if expected is not None and not sampled and not mode.keep_graph:
        fitting.append('mode="unrolled"' + " (with accumulate=1)" * (len(path.labeled) > 1))
    own = None if mode.keep_graph else "forward" if FORWARD_AD in mode.requires else "difference"
    for other in (Forward(), Difference())[: 1 + one_step]:
        found = None if other.name == own else _tried(partial(_last, other, path))
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


def _last(other: Estimator, path: Path) -> Tensor:
    return other.feedback(path, other.init())[0][-1].h


def _tried(trial: Callable[[], Tensor]) -> Tensor | None:
    try:
        return trial()
    except (RuntimeError, MetaplError):
        return None
