"""Every mode on a model: `ablate` compares their gradients with the exact one, and measures what a call costs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.ablation.altered import Alteration, Altered
from metapl.ablation.cost import flops, peak_bytes
from metapl.ablation.results import PREFERRED, Ablation, ModeCost, recommendation
from metapl.data.feed import feed
from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import is_whole
from metapl.execution.checks import described
from metapl.execution.state import RandomState, replayed
from metapl.feedback import MODES, Estimator, Implicit, Lookahead, Mode, estimator
from metapl.feedback.lookahead import inner_batches
from metapl.problems.base import BilevelProblem, enters_input
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range, check_arguments
from metapl.runs.terminal import counted
from metapl.training.trainer import BilevelTrainer

Draws = Annotated[int, Range(2)]  # of one draw no noise can be seen

# Rounds of timing where none are asked for: at least 5, and more for short calls, until a second has passed.
LEAST_ROUNDS, MOST_ROUNDS, TIMED = 5, 50, 1.0
CANNOT_RUN = MetaplError, RuntimeError, MemoryError  # what a mode raises that cannot run on a model


def ablate(
    trainer: BilevelTrainer,
    labeled: Any,
    unlabeled: Any,
    modes: Sequence[Mode] | None = None,
    *,
    steps: AtLeastZero = 0,
    draws: Draws = 8,
    rounds: AtLeastOne | None = None,
    altered: bool = True,
    progress: bool = False,
) -> Ablation:
    r"""Compare the modes on a model: their gradients with the exact one, and what they cost.

    .. math:: \text{relative error} = \frac{\|\bar g - g^*\|}{\|g^*\|}, \qquad
              \text{noise to signal} = \frac{\sqrt{\tfrac1{n-1} \sum_i \|g_i - \bar g\|^2}}{\|g^*\|}

    with :math:`g^*` the exact gradient of the soft step, by double backward (by forward mode where the student has no
    second derivative), and :math:`\bar g` the mean of n draws of labels.

    Args:
        trainer: the networks, the problem and the student's optimizer as they stand. It is left as it was. With
            ``lookahead=K`` the gradients are those through K steps.
        labeled, unlabeled: a batch each, as for ``trainer.step``, or sources of batches, as for ``trainer.fit``.
        modes: names or estimators; default: all.
        steps: number of training steps; the modes are compared before the first, in the middle and after the last.
            0: at the trainer's state alone.
        draws: of labels, for modes that draw them, and of alterations; 2 or more.
        rounds: rounds of timing; the least time of a mode counts. None: 5, and more for short calls, for a second.
        altered: also measure, as controls, the feedback of ``forward``, or else of the first mode that runs and gives
            feedback on each example, altered in three ways (:class:`metapl.ablation.Altered`).
        progress: show on a terminal how far it is.

    Returns: an :class:`metapl.ablation.Ablation`. The trainer and the default generators are left as they were.
    Cost: some ``draws`` + ``rounds`` + 3 calls of each mode at each point, and the training between the points.
    Raises: :class:`metapl.MetaplError` where no exact gradient can be had.

    >>> import metapl, torch
    >>> trainer = metapl.BilevelTrainer(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), "reinforce")
    >>> labeled, unlabeled = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(8, 4)
    >>> found = ablate(trainer, labeled, unlabeled, ["forward", "reinforce"], draws=2, rounds=1)
    >>> round(found.modes["forward"].cosine, 3), found.recommended
    (1.0, 'forward')
    """
    if not isinstance(trainer, BilevelTrainer):
        raise MetaplError(f"ablate was given a trainer that is {described(trainer)}; expected a metapl.BilevelTrainer.")
    check_arguments(ablate, locals())
    given = [estimator(mode) for mode in (MODES if modes is None else modes)] if not isinstance(modes, str) else []
    estimates = {mode.name: mode for mode in given}
    if not given or len(estimates) < len(given):
        raise MetaplError(f"ablate was given modes={modes!r}; expected a list of one or more, each name once.")
    distances: dict[str, list[tuple[float, float, float]]] = {}  # cosine, error and noise at each point
    reasons: dict[str, str] = {}  # why the others do not run
    drawing: set[str] = set()  # names of modes whose gradient has drawn labels in it

    def measure(names: Iterable[str], batches: tuple[Any, Any], exact: Tensor) -> None:
        for name in [name for name in names if name not in reasons]:
            mode, found = estimates[name], list[Tensor]()
            draws_any = isinstance(mode, Altered) and mode.alteration != "class_means"
            try:
                for seed in range(draws):
                    generator = torch.Generator(trainer.device).manual_seed(seed)
                    start = generator.get_state()
                    drawn = replace(mode, seed=mode.seed + seed) if isinstance(mode, Altered) else mode
                    found.append(_gradient(trainer, batches, drawn, generator))
                    # Seen by the generator's state, for draws of a confident teacher may be equal.
                    if not (draws_any := draws_any or not torch.equal(start, generator.get_state())):
                        break
            except CANNOT_RUN as error:
                reasons[name] = _reason(error)
                continue
            drawing.update([name] * draws_any)
            g = torch.stack(found)  # (draws, weights)
            mean, length = g.mean(0), exact.norm().clamp_min(1e-300)
            # The mean of n draws has 1/n of their noise in it, which the spread of n draws is short of.
            noise = ((g - mean).square().sum() / max(1, len(g) - 1)).sqrt() / length
            cosine, off = torch.nn.functional.cosine_similarity(mean, exact, dim=0), (mean - exact).norm() / length
            distances.setdefault(name, []).append((float(cosine), float(off), float(noise)))

    points = tuple(sorted({0, steps // 2, steps}))
    several = 1 if isinstance(unlabeled, Lookahead) else trainer.lookahead
    one_batch = isinstance(unlabeled, Tensor | dict | tuple | Lookahead)
    stop, device = steps + 1, trainer.device
    outer = feed([labeled] if is_whole(labeled) else labeled, name="labeled", stop=stop, device=device)
    inner = feed([unlabeled] if one_batch else unlabeled, name="unlabeled", stop=stop * several, device=device)
    state, random = trainer.state_dict(), RandomState.now(device)
    try:
        with closing(outer), closing(inner), counted(progress, stop, "steps", 0) as update:
            for t in range(stop):
                ahead = [inner.next() for _ in range(several)]
                batches = outer.next(), ahead[0] if several == 1 else Lookahead(ahead)
                if t in points:
                    exact = _exact(trainer, batches)
                    measure(estimates, batches, exact)
                    if altered and t == 0:  # of the preferred mode, or else of the first that runs and can be altered
                        fit = [m for m in estimates.values() if m.credits in ("signal", "example")]
                        fit = [m for m in fit if m.name not in reasons and not isinstance(m, Altered)]
                        base = min(fit, key=lambda mode: mode.name != PREFERRED, default=None)
                        controls = [Altered(base, kind) for kind in get_args(Alteration)] if base else []
                        added = {mode.name: mode for mode in controls if mode.name not in estimates}
                        estimates |= added
                        measure(added, batches, exact)
                if t < steps:
                    trainer.step(*batches)
                update(batches)
        costs = _costs(trainer, batches, {n: m for n, m in estimates.items() if n not in reasons}, rounds)
    finally:
        trainer.load_state_dict(state)
        random.restore()
    compared: tuple[dict[str, ModeCost | str], ...] = {}, {}  # the modes, and the controls
    for name, mode in estimates.items():
        into = compared[isinstance(mode, Altered)]
        if name in reasons:
            into[name] = reasons[name]
            continue
        cosines, errors, noises = zip(*distances[name], strict=True)
        root = math.sqrt(len(cosines))
        into[name] = ModeCost(
            sum(cosines) / len(cosines), math.hypot(*errors) / root, math.hypot(*noises) / root, *costs[name]
        )
    sure = [name for name in compared[0] if estimates[name].exact and name not in drawing]
    # No feedback; and at the optimum, a gradient that is not through a step, with which it is compared.
    never = [n for n in compared[0] if estimates[n].credits == "nothing" or isinstance(estimates[n], Implicit)]
    taken, text = recommendation(compared[0], sure, never)
    return Ablation(compared[0], text, points, compared[1], taken)


def _reason(error: BaseException) -> str:
    """A refusal in full; of torch's errors, which may run over many lines, the first one, which says what is wrong."""
    return str(error) if isinstance(error, MetaplError) else f"{type(error).__name__}: {reason_of(error)}"


def _gradient(
    trainer: BilevelTrainer,
    batches: tuple[Any, Any],
    mode: Estimator,
    generator: torch.Generator | None = None,
    problem: BilevelProblem | None = None,
) -> Tensor:
    """The teacher's gradient as one vector, float64; of a problem without a teacher, the gradient in its signal."""
    generator = torch.Generator(trainer.device).manual_seed(0) if generator is None else generator
    found = trainer.hypergradient(*batches, mode, problem=problem, generator=generator)
    parts = found.grads.values() if trainer.teacher is not None else [-h for h in pytree.tree_leaves(found.feedback)]
    return torch.cat([part.flatten().double() for part in parts])


def _exact(trainer: BilevelTrainer, batches: tuple[Any, Any]) -> Tensor:
    reasons = []
    for mode in map(estimator, ("unrolled", "forward")):
        try:
            return _gradient(trainer, batches, mode, problem=trainer.problem.exact())
        except CANNOT_RUN as error:
            reasons.append(_reason(error))
    raise MetaplError(f"there is no exact gradient: by double backward, {reasons[0]}; by forward mode, {reasons[1]}")


def _costs(
    trainer: BilevelTrainer, batches: tuple[Any, Any], modes: dict[str, Estimator], rounds: int | None
) -> dict[str, tuple[float, float, int]]:
    """Passes, seconds and peak bytes by mode; the modes, which have run here before, take turns."""
    problem, batch = trainer.problem, inner_batches(batches[1])[0]

    def student() -> None:
        with torch.no_grad(), replayed(RandomState.now(trainer.device)):
            given: Any = (batch,)
            if enters_input(problem):
                given = (batch, problem.signal(copy.deepcopy(trainer.teacher), batch, None, generator=None))  # type: ignore[arg-type]
            copy.deepcopy(trainer.student)(problem.student_input(*given))

    one = flops(student)
    calls = {name: partial(_gradient, trainer, batches, mode) for name, mode in modes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(rounds or MOST_ROUNDS):
        if rounds is None and done >= LEAST_ROUNDS and time.perf_counter() - start > TIMED:
            break
        for name, run in calls.items():
            seconds[name].append(_seconds(run, trainer.device))
    return {
        name: (flops(run) / one if one else math.nan, min(seconds[name]), peak_bytes(run, trainer.device))
        for name, run in calls.items()
    }


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What a call takes, in seconds: on a CPU the processor's time where that is less than the time that passes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    start, computed = time.perf_counter(), time.process_time()
    run()
    wait(device)
    passed = time.perf_counter() - start
    return passed if device.type == "cuda" else min(passed, time.process_time() - computed)
