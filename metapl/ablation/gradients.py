"""A mode's gradients of the teacher beside the exact one, and what a call costs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metapl.ablation.figures import Distance, ModeCost
from metapl.errors import MetaplError
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import Altered, Estimator
from metapl.feedback.inner_step import student_input
from metapl.feedback.lookahead import inner_batches
from metapl.metrics.cost import flops, peak_bytes
from metapl.problems.base import BilevelProblem, enters_input
from metapl.runs.memory import out_of_memory
from metapl.training.trainer import BilevelTrainer

Gradient = Tensor
"""The teacher's gradient as one vector, float64; of a problem without a teacher, the gradient in its signal."""

LEAST_ROUNDS, MOST_ROUNDS, TIMED = 5, 50, 1.0
"""Rounds of timing where none are asked for: at least 5, and more for short calls, until a second has passed."""

SAME = (
    *("inner_optimizer", "outer_optimizer", "teacher_losses", "feedback_weight", "feedback_ratio", "lookahead"),
    *("recompute_teacher", "generator", "clip_norm", "precision", "accumulate", "compile"),
)
"""What a :func:`sibling` has in common with a trainer."""


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
        whose = out_of_memory(error)
        # What torch says may run over many lines; the first says what is wrong.
        first = str(error).strip().partition("\n")[0]
        text = f"{type(error).__name__}: {first}" if whose is None else f"the memory {whose} does not suffice for it."
        raise CannotRun(text) from error


def sibling(
    trainer: BilevelTrainer, mode: str | Estimator | None = None, problem: BilevelProblem | None = None
) -> BilevelTrainer:
    """A trainer of the same networks and optimizers, in their state, by another mode or on another problem."""
    options: dict[str, Any] = {name: getattr(trainer, name) for name in SAME}
    made = BilevelTrainer(
        trainer.teacher,
        trainer.student,
        trainer.mode if mode is None else mode,
        problem=trainer.given_problem if problem is None else problem,
        **options,
    )
    made.update.load_state_dict(copy.deepcopy(trainer.update.state_dict()))
    return made


@dataclass(frozen=True)
class Point:
    """A trainer as it stands, and the batches on which its modes are compared."""

    trainer: BilevelTrainer
    labeled: Any
    unlabeled: Any

    def gradient(self, mode: str | Estimator, generator: torch.Generator | None = None) -> Gradient:
        """Of labels drawn from a generator, the first of its seed where none is given."""
        generator = torch.Generator(self.trainer.device).manual_seed(0) if generator is None else generator
        found = self.trainer.hypergradient(self.labeled, self.unlabeled, mode, generator=generator)
        # Without a teacher, the gradient is that in the signal.
        feedback = found.feedback if isinstance(found.feedback, tuple) else (found.feedback,)
        parts = found.grads.values() if self.trainer.teacher is not None else [-h for h in feedback]
        return torch.cat([part.flatten().double() for part in parts])

    def exact(self) -> Gradient:
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

    def distance(self, mode: Estimator, exact: Gradient, draws: int) -> tuple[Distance, bool]:
        """Of a mode from the exact gradient, by that many draws, and whether anything is drawn at all;
        :class:`CannotRun` where it cannot run.

        Labels are drawn from the generator that is given, so whether they are is seen by its state: draws of a
        confident teacher may well be equal.
        """
        altered = isinstance(mode, Altered) and mode.alteration != "class_means"
        gradients: list[Gradient] = []
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
                signal = problem.signal(copy.deepcopy(trainer._asked), batch, no_outputs, generator=None)
            inputs = student_input(problem, batch, signal)

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
            name: (
                flops(run) / one if one else math.nan,
                min(seconds[name]),  # other work on the machine only ever adds
                peak_bytes(run, trainer.device),
            )
            for name, run in calls.items()
        }


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What a call takes, in seconds: on a CPU the processor's time where that is less than the time that passes.

    A call of a few milliseconds on a busy machine waits for the cores longer than it computes, and the modes would be
    told apart by who had to wait. With several threads the processor's time is the greater one, and does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, computed = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    passed = time.perf_counter() - start
    return min(passed, time.process_time() - computed) if device.type == "cpu" else passed


def over_points(distances: Sequence[Distance], passes: float, seconds: float, peak: int) -> ModeCost:
    """The distances at several points as one, with the costs."""
    cosine = sum(d.cosine for d in distances) / len(distances)
    squares = [
        math.sqrt(sum(getattr(d, name) ** 2 for d in distances) / len(distances))
        for name in ("relative_error", "noise_to_signal")
    ]
    return ModeCost(cosine, squares[0], squares[1], passes, seconds, peak)
