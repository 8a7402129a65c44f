"""Every mode on a model: `ablate`, with short trainings by each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from metapl.ablation.gradients import CannotRun, Point, reasons_told, sibling, sweeps
from metapl.ablation.results import (
    PREFERRED,
    Ablation,
    Distance,
    ModeCost,
    Outcome,
    Trainings,
    gives_the_gradient_of_a_step,
    recommendation,
)
from metapl.errors import MetaplError
from metapl.execution.batch import is_whole
from metapl.execution.checks import described
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import MODES, Altered, Estimator, Lookahead, Mode, estimator
from metapl.metrics import Evaluation
from metapl.metrics.metric import metric_of
from metapl.metrics.predictions import eval_mode
from metapl.problems.base import sum_and_weight
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range, check_arguments, fits, words
from metapl.runs.progress import progress as bar_of
from metapl.training.selection import Selection
from metapl.training.trainer import BilevelTrainer

Alteration = Literal["permuted", "class_means", "random_sign"]
ALTERATIONS: tuple[Alteration, ...] = get_args(Alteration)

Draws = Annotated[int, Range(2)]  # of one draw no noise can be seen
Seeds = tuple[Annotated[int, Range(0, below=2**63)], ...]


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
    stability: bool = False,
    train_steps: AtLeastZero = 0,
    train_seeds: Sequence[int] = (0, 1, 2, 3, 4),
    validation: Any = None,
    metric: Any = None,
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
            feedback on each example, altered in three ways (:class:`metapl.feedback.Altered`): what a training gains by
            them is not due to the feedback on each example.
        stability: also measure the modes over a few step sizes of finite differences (``epsilon``), temperatures and
            sizes of the unlabeled batch, at the last point.
        train_steps: steps of short trainings by each mode, and by altered feedback, from the trainer's state; 0: none.
        train_seeds: of the short trainings: of drawn labels, dropout and the order of batches.
        validation, metric: on which short trainings are measured, and by what, as for ``trainer.evaluate``.
        progress: show on a terminal how far it is.

    Returns: an :class:`metapl.ablation.Ablation`. The trainer and the default generators are left as they were.

    Cost: some ``draws`` + ``rounds`` + 3 calls of each mode at each point, and the training between the points;
    stability: up to 12 × ``draws`` calls of each mode more; short trainings: ``train_steps`` steps for each mode and
    seed.

    Raises: :class:`metapl.MetaplError` where no exact gradient can be had, for want of a differentiable signal, or of
    both a second derivative and forward mode of the student; and, before anything runs, for validation data that the
    student could not be measured on.

    >>> import metapl, torch
    >>> trainer = metapl.BilevelTrainer(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), "reinforce")
    >>> labeled, unlabeled = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(8, 4)
    >>> found = ablate(trainer, labeled, unlabeled, ["forward", "reinforce"], draws=2, rounds=1)
    >>> round(found.modes["forward"].cosine, 3), found.recommended
    (1.0, 'forward')
    """
    if not isinstance(trainer, BilevelTrainer):
        raise MetaplError(f"ablate was given a trainer that is {described(trainer)}; expected a metapl.BilevelTrainer.")
    check_arguments(ablate, locals() | {"train_seeds": ()})
    seeds = _checked_seeds(train_seeds, labeled, unlabeled, validation) if train_steps else ()
    selection = Selection(trainer, validation, metric=metric_of(metric), select=False)
    selection.check()
    compared, points = _Compared(_by_name(modes), draws), tuple(sorted({0, steps // 2, steps}))

    sweep, trainings = {}, None
    with _put_back(trainer) as start:
        with _counted("steps looked at", progress, len(points)) as done:
            for t, (x_l, x_u) in enumerate(pairs(trainer, labeled, unlabeled, steps + 1)):
                if t in points:
                    point = Point(trainer, x_l, x_u)
                    compared.look(point, controls=altered and t == 0)
                    done()
                if t < steps:
                    trainer.step(x_l, x_u)
            costs = point.costs(compared.running(), rounds)
        if stability:
            with _counted("settings varied", progress, 3) as done:
                plain = [mode for mode in compared.running() if not isinstance(mode, Altered)]
                sweep = sweeps(point, plain, draws, done)
        if train_steps:
            with _counted("trainings", progress, len(compared.running()) * len(seeds)) as done:
                given = {"steps": train_steps, "seeds": seeds, "validation": validation, "metric": metric, "done": done}
                ends = _trainings(trainer, start, compared.running(), labeled, unlabeled, **given)
                trainings = Trainings(train_steps, seeds, ends, getattr(selection.metric, "name", None))
    return compared.ablation(costs, points, sweep, trainings)


class _Compared:
    """The modes that run, by name, and how far their gradients are from the exact one at the points looked at."""

    def __init__(self, estimates: dict[str, Estimator], draws: int) -> None:
        self.estimates, self.draws = estimates, draws
        self.distances: dict[str, list[Distance]] = {}
        self.reasons: dict[str, str] = {}  # why the others do not run
        self.drawing: set[str] = set()  # names of modes whose gradient has drawn labels in it

    def running(self) -> list[Estimator]:
        """The modes that have run at every point."""
        return [mode for name, mode in self.estimates.items() if name not in self.reasons]

    def look(self, point: Point, *, controls: bool) -> None:
        """Measure the modes at a point; with ``controls``, add the altered feedback of one of them from here on."""
        exact = point.exact()
        self._measure(self.running(), point, exact)
        if controls:
            # Of the first mode that they can be made of, best of the preferred one.
            fit = [mode for mode in self.running() if mode.credits in ("signal", "example")]
            fit = [mode for mode in fit if not isinstance(mode, Altered)]
            fit.sort(key=lambda mode: mode.name != PREFERRED)
            made = [Altered(base, alteration) for base in fit[:1] for alteration in ALTERATIONS]
            made = [mode for mode in made if mode.name not in self.estimates]
            self.estimates |= {mode.name: mode for mode in made}
            self._measure(made, point, exact)

    def _measure(self, modes: Iterable[Estimator], point: Point, exact: Tensor) -> None:
        for mode in modes:
            try:
                found, draws_any = point.distance(mode, exact, self.draws)
            except CannotRun as error:
                self.reasons[mode.name] = str(error)
            else:
                self.distances.setdefault(mode.name, []).append(found)
                self.drawing.update([mode.name] * draws_any)

    def ablation(self, costs: Mapping[str, Any], points: tuple[int, ...], sweep: Any, trainings: Any) -> Ablation:
        """All of it, with what is recommended."""
        compared: dict[str, ModeCost | str] = {}
        changed: dict[str, ModeCost | str] = {}
        for name, mode in self.estimates.items():
            into = changed if isinstance(mode, Altered) else compared
            reason = self.reasons.get(name)
            into[name] = ModeCost(*_over_points(self.distances[name]), *costs[name]) if reason is None else reason
        sure = [name for name in compared if self.estimates[name].exact and name not in self.drawing]
        never = [name for name in compared if not gives_the_gradient_of_a_step(self.estimates[name])]
        taken, text = recommendation(compared, sure, never)
        return Ablation(compared, text, points, changed, sweep, trainings, taken)


def _checked_seeds(given: Any, labeled: Any, unlabeled: Any, validation: Any) -> tuple[int, ...]:
    """The seeds of short trainings, which read their sources again."""
    seeds = [*given] if isinstance(given, range) else given
    wrong = "" if fits(seeds, Seeds) else f"train_seeds is {seeds!r}; expected {words(Seeds)}"
    if not wrong and len(set(seeds)) < max(1, len(seeds)):
        wrong = f"train_seeds is {seeds}; expected one or more, none twice"
    if wrong:
        raise MetaplError(f"{wrong}.")
    for name, source in (("labeled", labeled), ("unlabeled", unlabeled), ("validation", validation)):
        if isinstance(source, Iterator):
            raise MetaplError(
                f"{name} is an iterator ({type(source).__name__}), which can be read once, and short trainings by "
                "each mode read it again; expected a DataLoader, a list of batches, or metapl.data's step batches."
            )
    return tuple(seeds)


def _by_name(modes: Sequence[Mode] | None) -> dict[str, Estimator]:
    if isinstance(modes, str | Estimator):
        raise MetaplError(f"ablate was given modes={modes!r}; expected a list of modes: [{modes!r}].")
    estimates = [estimator(mode) for mode in (MODES if modes is None else modes)]
    by_name = {estimate.name: estimate for estimate in estimates}
    if not estimates or len(by_name) < len(estimates):
        twice = next((name for name in by_name if [e.name for e in estimates].count(name) > 1), None)
        given = f"{twice} more than once" if twice else "no mode"
        raise MetaplError(f"ablate was given {given}; expected one or more modes, each name once.")
    return by_name


def _over_points(distances: Sequence[Distance]) -> tuple[float, float, float]:
    cosines, errors, noises = zip(*((d.cosine, d.relative_error, d.noise_to_signal) for d in distances), strict=True)
    n = len(distances)
    return sum(cosines) / n, math.hypot(*errors) / math.sqrt(n), math.hypot(*noises) / math.sqrt(n)


@contextmanager
def _counted(what: str, shown: bool, total: int) -> Iterator[Callable[[], None]]:
    with bar_of(shown, name=what, start=0, steps=total) as bar:
        yield bar.update


@contextmanager
def _put_back(trainer: BilevelTrainer) -> Iterator[dict[str, Any]]:
    state, random = trainer.state_dict(), RandomState.now(trainer.device)
    try:
        yield state
    finally:
        trainer.load_state_dict(state)
        random.restore()


def pairs(
    trainer: BilevelTrainer, labeled: Any, unlabeled: Any, count: int, *, first: int = 0, seed: int = 0
) -> Iterator[tuple[Any, Any]]:
    """``count`` pairs of a labeled batch and an unlabeled one, or a look-ahead where the trainer takes several steps.

    They begin with the ``first`` of sources whose batches are numbered; ``seed`` is of the order of other sources.
    """
    from metapl.data.feed import feed

    several = trainer.lookahead if not isinstance(unlabeled, Lookahead) else 1
    one_batch = isinstance(unlabeled, Tensor | dict | tuple | Lookahead)
    sources = {
        "labeled": ([labeled] if is_whole(labeled) else labeled, 1),
        "unlabeled": ([unlabeled] if one_batch else unlabeled, several),
    }
    feeds = {}
    try:
        for name, (source, each) in sources.items():
            stop = (first + count) * each
            feeds[name] = feed(source, name=name, stop=stop, device=trainer.device, seed=seed)
            if first and feeds[name].state().get("kind") in ("sequence", "steps"):
                feeds[name].restore({**feeds[name].state(), "position": first * each})
        for _ in range(count):
            inner = [feeds["unlabeled"].next() for _ in range(several)]
            yield feeds["labeled"].next(), inner[0] if several == 1 else Lookahead(inner)
    finally:
        for one in feeds.values():
            one.close()


def _trainings(
    trainer: BilevelTrainer,
    start: Mapping[str, Any],
    modes: Iterable[Estimator],
    labeled: Any,
    unlabeled: Any,
    *,
    steps: int,
    seeds: Sequence[int],
    validation: Any,
    metric: Any,
    done: Callable[[], None],
) -> dict[str, Outcome | str]:
    """Train by each mode for a few steps at the optimizers' present rates, without selection or averaging.

    The seed is that of everything drawn: labels, dropout, and the order of batches. Sources with numbered batches
    (lists, step batches) are read from batch ``seed · steps`` on, so that seeds see different batches and all modes
    see the same. Every training begins in the state ``start``; the caller puts the trainer back.
    """

    def ended(mode: Estimator, seed: int) -> dict[str, float]:
        trained = sibling(trainer, mode=replace(mode, seed=seed) if isinstance(mode, Altered) else mode)
        own = {"mode": trained.mode.name, "mode_state": trained.mode.init(), "generator": None}
        trained.load_state_dict({**start, **own})
        torch.manual_seed(seed)
        if trained.generator is not None:
            trained.generator.manual_seed(seed)
        # One pair more than is trained on: the outer loss is measured on the next labeled batch.
        for t, (x_l, x_u) in enumerate(pairs(trained, labeled, unlabeled, steps + 1, first=seed * steps, seed=seed)):
            if t < steps:
                trained.step(x_l, x_u)
            else:
                outer = outer_loss_of(trained, x_l)
        if validation is None:
            return {"outer_loss": outer}
        with replayed(RandomState.now(trained.device)):
            found = trained.evaluate(validation, metric=metric)
        if isinstance(found, Evaluation):
            measured = {"validation_loss": found.negative_log_likelihood, "accuracy": found.accuracy}
        else:
            measured = {"validation_loss" if found.metric == "loss" else "value": found.value}
        return {"outer_loss": outer} | measured

    found: dict[str, Outcome | str] = {}
    for mode in modes:
        ends = []
        try:
            for seed in seeds:
                with reasons_told():
                    ends.append(ended(mode, seed))
                done()
        except CannotRun as error:
            found[mode.name] = str(error)
        else:
            found[mode.name] = Outcome(**{name: tuple(end[name] for end in ends) for name in ends[0]})
    return found


def outer_loss_of(trainer: BilevelTrainer, labeled: Any) -> float:
    batch = trainer.problem.outer_batch(labeled)
    with eval_mode(trainer.student), torch.no_grad():
        outputs = trainer.student(trainer.problem.outer_input(batch))
        total, weight = sum_and_weight(trainer.problem.outer_loss(outputs, batch))
        return float(total / weight)
