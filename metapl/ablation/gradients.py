"""A mode's gradients of the teacher beside the exact one, what a call costs, and the same over varied settings."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.ablation.cost import flops, peak_bytes
from metapl.ablation.results import Distance, Sweep
from metapl.errors import MetaplError
from metapl.execution.batch import length, rows
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import Altered, Estimator, Lookahead, Mode
from metapl.feedback.difference import RELATIVE_STEP
from metapl.feedback.lookahead import inner_batches
from metapl.problems.base import BilevelProblem, enters_input
from metapl.training.trainer import BilevelTrainer

# Rounds of timing where none are asked for: at least 5, and more for short calls, until a second has passed.
LEAST_ROUNDS, MOST_ROUNDS, TIMED = 5, 50, 1.0

SAME = (  # what a sibling has in common with a trainer
    *("inner_optimizer", "outer_optimizer", "teacher_losses", "feedback_weight", "feedback_ratio", "lookahead"),
    *("recompute_teacher", "generator", "clip_norm", "precision", "accumulate", "compile"),
)

# Of a sweep: times the step size that a mode has, times the problem's temperature, and parts of the unlabeled batch, of
# which none has fewer than two examples, which batch statistics need.
STEPS, TEMPERATURES, PARTS = (0.01, 0.1, 1.0, 10.0), (0.25, 0.5, 1.0, 2.0), (8, 4, 2, 1)


class CannotRun(MetaplError):
    """A mode, or everything, that cannot run on a model; the message is the whole reason."""


@contextmanager
def reasons_told() -> Iterator[None]:
    """Refusals, errors of torch in the model's own code, and too little memory, as :class:`CannotRun`."""
    try:
        yield
    except MetaplError as error:
        raise CannotRun(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        # What torch says may run over many lines; the first says what is wrong.
        first = str(error).strip().partition("\n")[0]
        text = f"{type(error).__name__}: {first}"
        raise CannotRun(text) from error


def sibling(trainer: BilevelTrainer, mode: Mode | None = None, problem: BilevelProblem | None = None) -> BilevelTrainer:
    """A trainer of the same networks and optimizers, in their state, by another mode or on another problem."""
    options: dict[str, Any] = {name: getattr(trainer, name) for name in SAME}
    options |= {"problem": trainer.problem if problem is None else problem, "verify": False}  # the trainer is
    made = BilevelTrainer(trainer.teacher, trainer.student, trainer.mode if mode is None else mode, **options)
    made.update.load_state_dict(copy.deepcopy(trainer.update.state_dict()))
    return made


@dataclass(frozen=True)
class Point:
    """A trainer as it stands, and the batches on which its modes are compared."""

    trainer: BilevelTrainer
    labeled: Any
    unlabeled: Any

    def gradient(self, mode: Mode, generator: torch.Generator | None = None) -> Tensor:
        """The teacher's gradient as one vector, float64; of a problem without a teacher, the gradient in its signal.

        Labels are drawn from the generator, the first of its seed where none is given.
        """
        generator = torch.Generator(self.trainer.device).manual_seed(0) if generator is None else generator
        found = self.trainer.hypergradient(self.labeled, self.unlabeled, mode, generator=generator)
        feedback = pytree.tree_leaves(found.feedback)  # of several steps, or several tensors
        parts = found.grads.values() if self.trainer.teacher is not None else [-h for h in feedback]
        return torch.cat([part.flatten().double() for part in parts])

    def exact(self) -> Tensor:
        """Of the soft step, by double backward, or by forward mode where the student has no second derivative."""
        problem = self.trainer.problem.exact()
        point = self if problem is None else replace(self, trainer=sibling(self.trainer, "forward", problem))
        refusals = []
        for mode in ("unrolled", "forward"):
            try:
                with reasons_told():
                    return point.gradient(mode)
            except CannotRun as error:
                refusals.append(str(error))
        why = f"by double backward, {refusals[0]}; by forward mode, {refusals[1]}"
        if refusals[0] == refusals[1]:
            why = f"by double backward and by forward mode, {refusals[0]}"
        raise MetaplError(f"there is no exact gradient to compare with: {why}")

    def distance(self, mode: Estimator, exact: Tensor, draws: int) -> tuple[Distance, bool]:
        """Of a mode from the exact gradient, by that many draws, and whether anything is drawn at all, which is seen
        by the generator's state (draws of a confident teacher may be equal); :class:`CannotRun` where it cannot run."""
        altered = isinstance(mode, Altered) and mode.alteration != "class_means"
        gradients: list[Tensor] = []
        with reasons_told():
            for seed in range(draws):
                generator = torch.Generator(self.trainer.device).manual_seed(seed)
                start = generator.get_state()
                drawn = replace(mode, seed=mode.seed + seed) if isinstance(mode, Altered) else mode
                gradients.append(self.gradient(drawn, generator))
                draws_any = altered or not torch.equal(start, generator.get_state())
                if not draws_any:
                    break
        found = torch.stack(gradients)
        mean, length = found.mean(0), exact.norm().clamp_min(1e-300)
        # The mean of n draws has 1/n of their noise in it, which the spread of n draws is short of.
        noise = (found - mean).square().sum() / max(1, len(found) - 1)
        cosine = torch.nn.functional.cosine_similarity(mean, exact, dim=0)
        return Distance(float(cosine), float((mean - exact).norm() / length), float(noise.sqrt() / length)), draws_any

    def costs(self, modes: Iterable[Estimator], rounds: int | None) -> dict[str, tuple[float, float, int]]:
        """Passes, seconds and peak bytes by mode; the modes, which have run here before, take turns."""
        trainer, problem, batch = self.trainer, self.trainer.problem, inner_batches(self.unlabeled)[0]
        with torch.no_grad(), replayed(RandomState.now(trainer.device)):
            signal = None
            if enters_input(problem):
                no_outputs: Any = None
                signal = problem.signal(
                    copy.deepcopy(trainer.teacher) or nn.Module(), batch, no_outputs, generator=None
                )
            inputs = problem.student_input(batch, *(() if signal is None else (signal,)))

        def student() -> None:
            with torch.no_grad(), replayed(RandomState.now(trainer.device)):
                copy.deepcopy(trainer.student)(inputs)

        one = flops(student)
        calls = {mode.name: partial(self.gradient, mode) for mode in modes}
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

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start, computed = time.perf_counter(), time.process_time()
    run()
    wait()
    passed = time.perf_counter() - start
    return min(passed, time.process_time() - computed) if device.type == "cpu" else passed


Setting = tuple[float, Point, Sequence[Estimator]]
"""A value of what is varied, and where and by which modes it is measured."""


def sweeps(
    point: Point, modes: Iterable[Estimator], draws: int, done: Callable[[], None] = lambda: None
) -> dict[str, Sweep | str]:
    """The modes over step sizes, temperatures and batch sizes, each against the exact gradient with the same setting.

    The modes have run there before; ``done`` is called after each setting.
    """
    modes = [mode for mode in modes if mode.name != "none"]  # zero is as far from any gradient
    found: dict[str, Sweep | str] = {}
    for name, varied in (("epsilon", _over_steps), ("temperature", _over_temperatures), ("batch_size", _over_sizes)):
        settings = varied(point, modes)
        if isinstance(settings, str):
            found[name] = settings
        else:
            rows: dict[str, tuple[Distance | str, ...]] = {mode.name: () for mode in settings[0][2]}
            for _, at, by in settings:
                exact = at.exact()
                for mode in by:
                    try:
                        cell: Distance | str = at.distance(mode, exact, draws)[0]
                    except CannotRun as error:
                        cell = str(error)
                    rows[mode.name] += (cell,)
            found[name] = Sweep(tuple(value for value, *_ in settings), rows)
        done()
    return found


def _over_steps(point: Point, modes: Sequence[Estimator]) -> list[Setting] | str:
    with_step: list[Any] = [mode for mode in modes if hasattr(mode, "relative_step") and dataclasses.is_dataclass(mode)]
    if not with_step:
        return "none of the modes takes a finite difference, so there is no step size."
    dtype = torch.promote_types(next(point.trainer.student.parameters()).dtype, torch.float32)
    own = with_step[0].relative_step or RELATIVE_STEP[dtype]
    steps = [own * factor for factor in STEPS if own * factor < 1]
    return [(step, point, [replace(mode, relative_step=step) for mode in with_step]) for step in steps]


def _over_temperatures(point: Point, modes: Sequence[Estimator]) -> list[Setting] | str:
    problem: Any = point.trainer.problem
    if not dataclasses.is_dataclass(problem) or not hasattr(problem, "temperature"):
        return f"the problem {type(problem).__name__} has no temperature."
    settings: list[Setting] = []
    for value in (problem.temperature * factor for factor in TEMPERATURES):
        changed: Any = replace(problem, temperature=value)  # type: ignore[type-var]  # an instance
        settings.append((value, replace(point, trainer=sibling(point.trainer, problem=changed)), modes))
    return settings


def _over_sizes(point: Point, modes: Sequence[Estimator]) -> list[Setting] | str:
    batches, parts = inner_batches(point.unlabeled), point.trainer.accumulate
    whole = length(batches[0])
    leaves = [leaf for leaf in pytree.tree_leaves(batches) if isinstance(leaf, Tensor)]
    if whole < 4 * parts or any(leaf.ndim == 0 or len(leaf) != whole for leaf in leaves):
        of = "" if parts == 1 else f" in each of its {parts} micro-batches"
        return f"the unlabeled batch has fewer than four examples{of}, or tensors without a row for each example."
    settings: list[Setting] = []
    for size in sorted({n for n in (whole // part for part in PARTS) if n % parts == 0 and n // parts >= 2}):
        first = [rows(batch, 0, size) for batch in batches]
        part = Lookahead(first) if isinstance(point.unlabeled, Lookahead) else first[0]
        settings.append((float(size), replace(point, unlabeled=part), modes))
    return settings
