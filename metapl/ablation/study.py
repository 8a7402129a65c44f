"""Every mode on a model: `ablate` compares their gradients with the exact one, and measures what a call costs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.ablation.altered import Altered
from metapl.ablation.cost import flops, peak_bytes
from metapl.ablation.results import (
    PREFERRED,
    Ablation,
    Distance,
    ModeCost,
    gives_the_gradient_of_a_step,
    recommendation,
)
from metapl.data.feed import feed
from metapl.errors import MetaplError
from metapl.execution.batch import is_whole
from metapl.execution.checks import described
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import MODES, Estimator, Lookahead, Mode, estimator
from metapl.feedback.lookahead import inner_batches
from metapl.problems.base import enters_input
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range, check_arguments
from metapl.runs.progress import counted
from metapl.training.trainer import BilevelTrainer

Draws = Annotated[int, Range(2)]  # of one draw no noise can be seen

# Rounds of timing where none are asked for: at least 5, and more for short calls, until a second has passed.
LEAST_ROUNDS, MOST_ROUNDS, TIMED = 5, 50, 1.0


class CannotRun(MetaplError):
    """A mode, or everything, that cannot run on a model; the message is the whole reason."""


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
            feedback on each example, altered in three ways (:class:`metapl.ablation.Altered`): what a training gains by
            them is not due to the feedback on each example.
        progress: show on a terminal how far it is.

    Returns: an :class:`metapl.ablation.Ablation`. The trainer and the default generators are left as they were.

    Cost: some ``draws`` + ``rounds`` + 3 calls of each mode at each point, and the training between the points.

    Raises: :class:`metapl.MetaplError` where no exact gradient can be had, for want of a differentiable signal, or of
    both a second derivative and forward mode of the student.

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
    distances: dict[str, list[Distance]] = {}
    reasons: dict[str, str] = {}  # why the others do not run
    drawing: set[str] = set()  # names of modes whose gradient has drawn labels in it

    def measure(names: Sequence[str], batches: tuple[Any, Any], exact: Tensor) -> None:
        for name in names:
            try:
                found, draws_any = _distance(trainer, batches, estimates[name], exact, draws)
            except CannotRun as error:
                reasons[name] = str(error)
            else:
                distances.setdefault(name, []).append(found)
                drawing.update([name] * draws_any)

    points = tuple(sorted({0, steps // 2, steps}))
    state, random = trainer.state_dict(), RandomState.now(trainer.device)
    try:
        with counted(progress, steps + 1, "steps", 0) as update:
            for t, batches in enumerate(pairs(trainer, labeled, unlabeled, steps + 1)):
                if t in points:
                    exact = _exact(trainer, batches)
                    measure([name for name in estimates if name not in reasons], batches, exact)
                    if altered and t == 0:  # of the first mode that it can be made of, best of the preferred one
                        fit = [m for m in estimates.values() if m.credits in ("signal", "example")]
                        fit = [m for m in fit if m.name not in reasons and not isinstance(m, Altered)]
                        fit.sort(key=lambda mode: mode.name != PREFERRED)
                        kinds = get_args(Literal["permuted", "class_means", "random_sign"])
                        made = {m.name: m for m in (Altered(base, kind) for base in fit[:1] for kind in kinds)}
                        made = {name: mode for name, mode in made.items() if name not in estimates}
                        estimates |= made
                        measure([*made], batches, exact)
                if t < steps:
                    trainer.step(*batches)
                update(batches)
        running = {name: mode for name, mode in estimates.items() if name not in reasons}
        costs = _costs(trainer, batches, running, rounds)
    finally:
        trainer.load_state_dict(state)
        random.restore()
    compared: dict[str, ModeCost | str] = {}
    controls: dict[str, ModeCost | str] = {}
    for name, mode in estimates.items():
        into = controls if isinstance(mode, Altered) else compared
        if name in reasons:
            into[name] = reasons[name]
            continue
        found, n = distances[name], len(distances[name])
        passes, seconds, held = costs[name]
        into[name] = ModeCost(
            sum(d.cosine for d in found) / n,
            math.hypot(*(d.relative_error for d in found)) / math.sqrt(n),
            math.hypot(*(d.noise_to_signal for d in found)) / math.sqrt(n),
            passes,
            seconds,
            held,
        )
    sure = [name for name in compared if estimates[name].exact and name not in drawing]
    never = [name for name in compared if not gives_the_gradient_of_a_step(estimates[name])]
    taken, text = recommendation(compared, sure, never)
    return Ablation(compared, text, points, controls, taken)


@contextmanager
def reasons_told() -> Iterator[None]:
    """Refusals, and errors of torch in the model's own code, as :class:`CannotRun`."""
    try:
        yield
    except (MetaplError, RuntimeError, MemoryError) as error:
        own = str(error)
        if not isinstance(error, MetaplError):  # what torch says may run over many lines; the first says what is wrong
            own = f"{type(error).__name__}: {own.strip().partition(chr(10))[0]}"
        raise CannotRun(own) from error


def _gradient(
    trainer: BilevelTrainer, batches: tuple[Any, Any], mode: Estimator, generator: torch.Generator | None = None
) -> Tensor:
    """The teacher's gradient as one vector, float64; of a problem without a teacher, the gradient in its signal. Labels
    are drawn from the generator, the first of its seed where none is given."""
    generator = torch.Generator(trainer.device).manual_seed(0) if generator is None else generator
    found = trainer.hypergradient(*batches, mode, generator=generator)
    parts = found.grads.values() if trainer.teacher is not None else [-h for h in pytree.tree_leaves(found.feedback)]
    return torch.cat([part.flatten().double() for part in parts])


def _exact(trainer: BilevelTrainer, batches: tuple[Any, Any]) -> Tensor:
    """Of the soft step, by double backward, or by forward mode where the student has no second derivative."""
    problem, reasons = trainer.problem.exact(), []
    for mode in map(estimator, ("unrolled", "forward")):
        try:
            with reasons_told():
                if problem is None:
                    return _gradient(trainer, batches, mode)
                grads = trainer._gradient(mode, problem, *batches).grads
                return torch.cat([g.flatten().double() for g in grads.values()])
        except CannotRun as error:
            reasons.append(str(error))
    raise MetaplError(
        f"there is no exact gradient to compare with: by double backward, {reasons[0]}; by forward mode, {reasons[1]}"
    )


def _distance(
    trainer: BilevelTrainer, batches: tuple[Any, Any], mode: Estimator, exact: Tensor, draws: int
) -> tuple[Distance, bool]:
    """Of a mode from the exact gradient, by that many draws, and whether anything is drawn at all, which is seen by the
    generator's state (draws of a confident teacher may be equal); :class:`CannotRun` where it cannot run."""
    altered = isinstance(mode, Altered) and mode.alteration != "class_means"
    gradients: list[Tensor] = []
    with reasons_told():
        for seed in range(draws):
            generator = torch.Generator(trainer.device).manual_seed(seed)
            start = generator.get_state()
            drawn = replace(mode, seed=mode.seed + seed) if isinstance(mode, Altered) else mode
            gradients.append(_gradient(trainer, batches, drawn, generator))
            draws_any = altered or not torch.equal(start, generator.get_state())
            if not draws_any:
                break
    found = torch.stack(gradients)
    mean, length = found.mean(0), exact.norm().clamp_min(1e-300)
    # The mean of n draws has 1/n of their noise in it, which the spread of n draws is short of.
    noise = (found - mean).square().sum() / max(1, len(found) - 1)
    cosine = torch.nn.functional.cosine_similarity(mean, exact, dim=0)
    return Distance(float(cosine), float((mean - exact).norm() / length), float(noise.sqrt() / length)), draws_any


def _costs(
    trainer: BilevelTrainer, batches: tuple[Any, Any], modes: dict[str, Estimator], rounds: int | None
) -> dict[str, tuple[float, float, int]]:
    """Passes, seconds and peak bytes by mode; the modes, which have run here before, take turns."""
    problem, batch = trainer.problem, inner_batches(batches[1])[0]

    def student() -> None:
        """A forward pass, which moves nothing."""
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
    """What a call takes, in seconds: on a CPU the processor's time where that is less than the time that passes, for a
    call of milliseconds on a busy machine waits longer than it computes. With several threads it is the greater."""
    on_device = device.type == "cuda"
    if on_device:
        torch.cuda.synchronize(device)
    start, computed = time.perf_counter(), time.process_time()
    run()
    if on_device:
        torch.cuda.synchronize(device)
    passed = time.perf_counter() - start
    return passed if on_device else min(passed, time.process_time() - computed)


def pairs(trainer: BilevelTrainer, labeled: Any, unlabeled: Any, count: int) -> Iterator[tuple[Any, Any]]:
    """``count`` pairs of a labeled batch and an unlabeled one, or a look-ahead where the trainer takes several."""
    several = trainer.lookahead if not isinstance(unlabeled, Lookahead) else 1
    one_batch = isinstance(unlabeled, Tensor | dict | tuple | Lookahead)
    outer = feed([labeled] if is_whole(labeled) else labeled, name="labeled", stop=count, device=trainer.device)
    source = [unlabeled] if one_batch else unlabeled
    inner = feed(source, name="unlabeled", stop=count * several, device=trainer.device)
    try:
        for _ in range(count):
            batches = [inner.next() for _ in range(several)]
            yield outer.next(), batches[0] if several == 1 else Lookahead(batches)
    finally:
        outer.close()
        inner.close()
