"""Which mode for a model: how far each is from the exact gradient, how noisy, and what it costs."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from metapl.batch import is_whole
from metapl.errors import MetaplError
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import MODES, Estimator, estimator
from metapl.metrics.cost import flops, peak_bytes
from metapl.training.trainer import BilevelTrainer

Gradient = Tensor
"""The teacher's gradient as one vector, float64; of a problem without a teacher, the gradient in its signal."""


@dataclass(frozen=True)
class ModeCost:
    """What was found of one mode.

    Args:
        cosine: of its gradient, averaged over the draws of labels, with the exact one; averaged over the points.
        relative_error: ‖mean − exact‖/‖exact‖, root mean square over the points.
        noise_to_signal: √(mean ‖draw − mean‖²)/‖exact‖, likewise; 0 for a mode that draws nothing.
        passes: floating-point operations over those of a forward pass of the student on the unlabeled batch.
        seconds: a call, the median over interleaved rounds.
        peak_bytes: what a call holds at its fullest, beyond what was held before.
    """

    cosine: float
    relative_error: float
    noise_to_signal: float
    passes: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Ablation:
    """What :func:`ablate` returns.

    Args:
        modes: by name: the costs, or the reason why a mode cannot run on this model.
        recommendation: one sentence.
        points: the steps of training that were looked at.
    """

    modes: dict[str, ModeCost | str]
    recommendation: str
    points: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """``{"modes": {name: {...} or {"reason": ...}}, "recommendation": ..., "points": [...]}``."""
        rows = {n: {"reason": m} if isinstance(m, str) else asdict(m) for n, m in self.modes.items()}
        return {"modes": rows, "recommendation": self.recommendation, "points": list(self.points)}

    def to_json(self) -> str:
        """:meth:`as_dict` as text; what is not a finite number is null."""
        return json.dumps(_finite(self.as_dict()), indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The figures in lines of a terminal."""
        width = max(len(name) for name in self.modes)
        lines = [f"{'mode':<{width}}  cosine  rel. error  noise/signal  passes  seconds  peak MB"]
        for name, mode in self.modes.items():
            if isinstance(mode, str):
                reason = re.split(r"[,;:(]", mode, maxsplit=1)[0]
                lines.append(f"{name:<{width}}  cannot run here: {reason}")
                continue
            lines.append(
                f"{name:<{width}}  {mode.cosine:6.3f}  {mode.relative_error:10.2g}  {mode.noise_to_signal:12.2g}  "
                f"{mode.passes:6.1f}  {mode.seconds:7.3f}  {mode.peak_bytes / 1e6:7.1f}"
            )
        return "\n".join(lines)


def ablate(
    trainer: BilevelTrainer,
    labeled: Any,
    unlabeled: Any,
    modes: Sequence[str | Estimator] | None = None,
    *,
    steps: int = 0,
    draws: int = 8,
    rounds: int = 3,
) -> Ablation:
    r"""Compare the modes on a model: their gradients with the exact one, and what they cost.

    .. math:: \text{relative error} = \frac{\|\bar g - g^*\|}{\|g^*\|}, \qquad
              \text{noise to signal} = \frac{\sqrt{\tfrac1n \sum_i \|g_i - \bar g\|^2}}{\|g^*\|}

    with :math:`g^*` the exact gradient of the soft step, by double backward (by forward mode where the student has no
    second derivative), and :math:`\bar g` the mean of n draws of labels.

    Args:
        trainer: the networks, the problem and the student's optimizer as they stand. It is left as it was.
        labeled, unlabeled: a batch each, as for ``trainer.step``, or sources of batches, as for ``trainer.fit``.
        modes: names or estimators; default: all.
        steps: the training in which is looked: at its beginning, in its middle and at its end, by copies of the
            trainer's state, which is put back. 0: at the trainer's state alone.
        draws: of labels, for modes that draw them.
        rounds: in which each mode is timed once.

    Cost: some ``draws`` + ``rounds`` + 3 calls of each mode at each point, and the training between the points.

    Raises: :class:`metapl.MetaplError` where no exact gradient can be had: the problem has no differentiable signal, or
    the student neither a second derivative nor forward mode.

    >>> import metapl
    >>> trainer = metapl.BilevelTrainer(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), "reinforce")
    >>> labeled, unlabeled = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(8, 4)
    >>> found = ablate(trainer, labeled, unlabeled, ["forward", "reinforce"], draws=2, rounds=1)
    >>> round(found.modes["forward"].cosine, 3), "forward" in found.recommendation
    (1.0, True)
    """
    if steps < 0 or draws < 1 or rounds < 1:
        raise MetaplError(f"ablate(steps={steps}, draws={draws}, rounds={rounds}): expected 0, 1 and 1 or more.")
    estimates = {e.name: e for e in map(estimator, modes or MODES)}
    points = tuple(sorted({0, steps // 2, steps}))
    batches = _batches(trainer, labeled, unlabeled, steps)
    errors: dict[str, list[tuple[float, float, float]]] = {name: [] for name in estimates}
    reasons: dict[str, str] = {}
    costs: dict[str, tuple[float, float, int]] = {}
    with _put_back(trainer):
        for t, (x_l, x_u) in enumerate(batches):
            if t in points:
                exact = _exact(trainer, x_l, x_u)
                for name, estimate in estimates.items():
                    if name not in reasons:
                        try:
                            errors[name].append(_errors(trainer, estimate, x_l, x_u, exact, draws))
                        except MetaplError as error:
                            reasons[name] = str(error)
            if t == points[-1]:
                runs = [estimate for name, estimate in estimates.items() if name not in reasons]
                costs = _costs(trainer, runs, x_l, x_u, rounds)
                break
            trainer.step(x_l, x_u)
    measured: dict[str, ModeCost | str] = {
        name: reasons[name] if name in reasons else _mean(errors[name], *costs[name]) for name in estimates
    }
    return Ablation(measured, recommendation(measured), points)


def recommendation(modes: dict[str, ModeCost | str]) -> str:
    """The sentence that recommends a mode and says why."""
    ran = {n: m for n, m in modes.items() if isinstance(m, ModeCost) and n not in ("none", "implicit")}
    if not ran:
        return "No mode that gives feedback can run on this model; the reasons stand beside the modes."

    def distance(mode: ModeCost) -> float:
        return math.hypot(mode.relative_error, mode.noise_to_signal)

    exact = {name: mode for name, mode in ran.items() if distance(mode) <= EXACT}
    if exact:
        name, mode = min(exact.items(), key=lambda item: (item[1].passes, item[1].peak_bytes))
        near = distance(mode)
        why = (
            "its gradient is the exact one to rounding"
            if near < 1e-5
            else f"its gradient is within {near:.1g} of the exact one"
        )
        why += " and has no noise"
        others = [other for other in exact if other != name]
        beside = f", the cheapest of those ({', '.join([name, *others])})" if others else ""
    else:
        name, mode = min(ran.items(), key=lambda item: distance(item[1]))
        why = (
            "no mode that is exact can run here, and of the others its gradient is the nearest to the exact one in one "
            f"draw (relative error {mode.relative_error:.2g}, noise {mode.noise_to_signal:.2g} of the signal)"
        )
        beside = ""
    cheap = ran.get("reinforce")
    cost = f"{mode.passes:.1f} student passes a step{beside}"
    if cheap is not None and name != "reinforce" and cheap.passes > 0:
        cost += (
            f"; Algorithm 1's scalar (reinforce) costs {cheap.passes:.1f} and has {cheap.noise_to_signal:.2g} times as "
            "much noise as signal"
        )
    return f"Take {name}: {why}; it costs {cost}."


EXACT = 0.01
"""Relative distance from the exact gradient, noise included, up to which a mode counts as exact."""


def _gradient(trainer: BilevelTrainer, mode: str | Estimator, labeled: Any, unlabeled: Any, seed: int = 0) -> Gradient:
    generator = torch.Generator(trainer.device).manual_seed(seed)
    found = trainer.hypergradient(labeled, unlabeled, mode, generator=generator)
    # Without a teacher, the gradient is that in the signal.
    parts = found.grads.values() if trainer.teacher is not None else [-torch.as_tensor(found.feedback)]
    return torch.cat([g.flatten().double() for g in parts])


def _exact(trainer: BilevelTrainer, labeled: Any, unlabeled: Any) -> Gradient:
    try:
        return _gradient(trainer, "unrolled", labeled, unlabeled)
    except MetaplError as unrolled:
        try:
            return _gradient(trainer, "forward", labeled, unlabeled)
        except MetaplError as forward:
            raise MetaplError(
                f"there is no exact gradient to compare with: by double backward, {unrolled}; by forward mode, "
                f"{forward}"
            ) from forward


def _errors(
    trainer: BilevelTrainer, estimate: Estimator, labeled: Any, unlabeled: Any, exact: Gradient, draws: int
) -> tuple[float, float, float]:
    """Cosine, relative error and noise to signal of a mode at one point."""
    draws = draws if estimate.labels[0] == "hard" else 1
    found = torch.stack([_gradient(trainer, estimate, labeled, unlabeled, seed) for seed in range(draws)])
    mean, length = found.mean(0), exact.norm().clamp_min(1e-300)
    # The mean of n draws has 1/n of their noise in it, which the spread of n draws is short of.
    noise = (found - mean).square().sum(1).mean() * (draws / max(1, draws - 1))
    cosine = torch.nn.functional.cosine_similarity(mean, exact, dim=0)
    return float(cosine), float((mean - exact).norm() / length), float(noise.sqrt() / length)


def _costs(
    trainer: BilevelTrainer, estimates: Sequence[Estimator], labeled: Any, unlabeled: Any, rounds: int
) -> dict[str, tuple[float, float, int]]:
    """Passes, seconds and peak bytes by mode; the modes take turns."""

    def call(estimate: Estimator) -> Callable[[], Gradient]:
        return lambda: _gradient(trainer, estimate, labeled, unlabeled)

    def student() -> None:
        with torch.no_grad(), replayed(RandomState.now(trainer.device)):
            copy.deepcopy(trainer.student)(trainer.problem.student_input(unlabeled))

    one = flops(student)
    seconds: dict[str, list[float]] = {estimate.name: [] for estimate in estimates}
    for _ in range(rounds):
        for estimate in estimates:
            seconds[estimate.name].append(_seconds(call(estimate), trainer.device))
    return {
        estimate.name: (
            flops(call(estimate)) / one if one else math.nan,
            statistics.median(seconds[estimate.name]),
            peak_bytes(call(estimate), trainer.device),
        )
        for estimate in estimates
    }


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _mean(errors: Sequence[tuple[float, float, float]], passes: float, seconds: float, peak: int) -> ModeCost:
    cosines, relative, noise = zip(*errors, strict=True)
    squares = [math.sqrt(sum(value**2 for value in values) / len(values)) for values in (relative, noise)]
    return ModeCost(sum(cosines) / len(cosines), squares[0], squares[1], passes, seconds, peak)


def _batches(trainer: BilevelTrainer, labeled: Any, unlabeled: Any, steps: int) -> Iterator[tuple[Any, Any]]:
    """Steps + 1 pairs of batches."""
    from metapl.data.feed import feed

    sources = [labeled] if is_whole(labeled) else labeled, [unlabeled] if _is_batch(unlabeled) else unlabeled
    names = ("labeled", "unlabeled")
    feeds = [
        feed(source, name=name, stop=steps + 1, device=trainer.device)
        for source, name in zip(sources, names, strict=True)
    ]
    try:
        for _ in range(steps + 1):
            first, second = (one.next() for one in feeds)
            yield first, second
    finally:
        for one in feeds:
            one.close()


def _is_batch(unlabeled: Any) -> bool:
    return isinstance(unlabeled, Tensor | dict | tuple)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _put_back(trainer: BilevelTrainer) -> Iterator[None]:
    """Leave the trainer and the default generators as they were."""
    state, random = trainer.state_dict(), RandomState.now(trainer.device)
    try:
        yield
    finally:
        trainer.load_state_dict(state)
        random.restore()
