"""Every mode on a model: `ablate`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal, get_args

from metapl.ablation.batches import pairs, refuse_single_use
from metapl.ablation.figures import Distance, ModeCost
from metapl.ablation.gradients import CannotRun, Point, over_points
from metapl.ablation.recommend import PREFERRED, gives_the_gradient_of_a_step, recommendation
from metapl.ablation.results import Ablation
from metapl.ablation.stability import sweeps
from metapl.ablation.trainings import short_trainings
from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.execution.rng import RandomState
from metapl.feedback import MODES, Altered, Estimator, estimator
from metapl.training.progress import counting
from metapl.training.selection import Selection
from metapl.training.trainer import BilevelTrainer

Alteration = Literal["permuted", "class_means", "random_sign"]
ALTERATIONS: tuple[Alteration, ...] = get_args(Alteration)

LEAST = {"steps": 0, "train_steps": 0, "draws": 2}
"""Of the numbers that are given; 1 of the others. Of one draw no noise can be seen."""


def ablate(
    trainer: BilevelTrainer,
    labeled: Any,
    unlabeled: Any,
    modes: Sequence[str | Estimator] | None = None,
    *,
    steps: int = 0,
    draws: int = 8,
    rounds: int | None = None,
    altered: bool = True,
    stability: bool = False,
    train_steps: int = 0,
    train_seeds: Sequence[int] = (0, 1, 2, 3, 4),
    validation: Any = None,
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
        altered: also measure the feedback of a mode altered in three ways (:class:`metapl.feedback.Altered`): of
            ``forward``, or else of the first of the modes that runs and gives feedback on each example. These are
            controls: what a training gains by them is not due to the feedback on each example.
        stability: also measure the modes over a few step sizes of finite differences (``epsilon``), temperatures and
            sizes of the unlabeled batch, at the last point.
        train_steps: steps of short trainings by each mode, and by altered feedback, from the trainer's state; 0: none.
        train_seeds: of the short trainings: of drawn labels, dropout and the order of batches.
        validation: (inputs, labels) or an iterable of such batches, on which short trainings are measured.
        progress: show on a terminal how far it is.

    Returns: an :class:`metapl.ablation.Ablation`: ``modes`` and ``altered`` by name, ``recommended`` and the sentences
    ``recommendation``, and what else was asked for. The trainer and the default generators are left as they were.

    Cost: some ``draws`` + ``rounds`` + 3 calls of each mode at each point, and the training between the points;
    stability: up to 12 × ``draws`` calls of each mode more; short trainings: ``train_steps`` steps for each mode and
    seed.

    Raises: :class:`metapl.MetaplError` where no exact gradient can be had: the problem has no differentiable signal, or
    the student neither a second derivative nor forward mode; and, before anything runs, for validation data that the
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
    _check_numbers(steps=steps, draws=draws, rounds=rounds, train_steps=train_steps)
    if train_steps:
        _check_seeds(train_seeds)
        refuse_single_use(labeled=labeled, unlabeled=unlabeled, validation=validation)
    Selection(validation, None, trainer.device).check(trainer.student)
    estimates, points = _by_name(modes), tuple(sorted({0, steps // 2, steps}))
    look = _Look(draws)
    sweep, trainings = {}, None
    with _put_back(trainer) as start:
        with _counted("steps looked at", progress, len(points)) as done:
            for t, (x_l, x_u) in enumerate(pairs(trainer, labeled, unlabeled, steps + 1)):
                if t in points:
                    look.at(Point(trainer, x_l, x_u), look.estimates or estimates)
                    if altered and t == 0:
                        look.at(Point(trainer, x_l, x_u), look.alterations())
                    done()
                if t < steps:
                    trainer.step(x_l, x_u)
            measured = look.figures(look.point.costs(look.running, rounds))
        if stability:
            with _counted("settings varied", progress, 3) as done:
                true = [estimate for estimate in look.running if not isinstance(estimate, Altered)]
                sweep = sweeps(look.point, true, draws, done)
        if train_steps:
            with _counted("trainings", progress, len(look.running) * len(train_seeds)) as done:
                seen = {"steps": train_steps, "seeds": train_seeds, "validation": validation, "done": done}
                trainings = short_trainings(trainer, start, look.running, labeled, unlabeled, **seen)
    controls = {name: mode for name, mode in measured.items() if isinstance(look.estimates[name], Altered)}
    compared = {name: mode for name, mode in measured.items() if name not in controls}
    exact = [name for name in compared if look.estimates[name].exact and name not in look.drawing]
    never = [name for name in compared if not gives_the_gradient_of_a_step(look.estimates[name])]
    name, text = recommendation(compared, exact, never)
    return Ablation(compared, text, points, controls, sweep, trainings, name)


class _Look:
    """The distances of the modes at several points, the last of which is ``point``, or why they cannot run."""

    point: Point

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self.estimates: dict[str, Estimator] = {}
        self.distances: dict[str, list[Distance]] = {}
        self.reasons: dict[str, str] = {}
        self.drawing: set[str] = set()  # names of modes whose gradient has drawn labels in it

    @property
    def running(self) -> list[Estimator]:
        """The modes that ran at every point."""
        return [estimate for name, estimate in self.estimates.items() if name not in self.reasons]

    def at(self, point: Point, estimates: Mapping[str, Estimator]) -> None:
        """Look by these modes too."""
        self.point, exact = point, point.exact()
        self.estimates |= estimates
        for name in [name for name in estimates if name not in self.reasons]:
            try:
                found, draws_any = point.distance(estimates[name], exact, self.draws)
            except CannotRun as error:
                self.reasons[name] = str(error)
            else:
                self.distances.setdefault(name, []).append(found)
                self.drawing |= {name} if draws_any else set()

    def alterations(self) -> dict[str, Estimator]:
        """Of the first mode that runs and that they can be made of, best of the preferred one."""
        fit = [mode for mode in self.running if mode.credits in ("signal", "example") and not isinstance(mode, Altered)]
        base = next((mode for mode in fit if mode.name == PREFERRED), fit[0] if fit else None)
        made = [] if base is None else [Altered(base, alteration) for alteration in ALTERATIONS]
        return {one.name: one for one in made if one.name not in self.estimates}

    def figures(self, cost: Mapping[str, tuple[float, float, int]]) -> dict[str, ModeCost | str]:
        """By name, with the costs."""
        return {
            name: self.reasons[name] if name in self.reasons else over_points(self.distances[name], *cost[name])
            for name in self.estimates
        }


def _by_name(modes: Sequence[str | Estimator] | None) -> dict[str, Estimator]:
    if isinstance(modes, str | Estimator):
        raise MetaplError(f"ablate was given modes={modes!r}; expected a list of modes: [{modes!r}].")
    estimates = [estimator(mode) for mode in (MODES if modes is None else modes)]
    names = [estimate.name for estimate in estimates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        given = f"{twice[0]} more than once" if twice else "no mode"
        raise MetaplError(f"ablate was given {given}; expected one or more modes, each name once.")
    return dict(zip(names, estimates, strict=True))


def _check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        least = LEAST.get(name, 1)
        if (number is not None or name != "rounds") and not _is_whole(number, least):
            raise MetaplError(f"ablate({name}={number!r}): expected {least} or more, a whole number.")


def _check_seeds(seeds: Any) -> None:
    if not isinstance(seeds, Sequence) or not seeds or not all(_is_whole(seed, 0, 2**63) for seed in seeds):
        expected = "one or more whole numbers of 0 or more"
    elif len(set(seeds)) < len(seeds):
        expected = "seeds, none twice"
    else:
        return
    raise MetaplError(f"ablate(train_seeds={seeds!r}): expected a list of {expected}.")


def _is_whole(number: Any, least: int, beyond: float = math.inf) -> bool:
    return not isinstance(number, bool) and isinstance(number, Integral) and least <= int(number) < beyond


@contextmanager
def _counted(what: str, shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """Give a function that counts one more."""
    with counting(what, shown, total) as update:
        numbers = itertools.count(1)
        yield lambda: update(next(numbers))


@contextmanager
def _put_back(trainer: BilevelTrainer) -> Iterator[dict[str, Any]]:
    """The trainer's state; in the end the trainer and the default generators are as they were."""
    state, random = trainer.state_dict(), RandomState.now(trainer.device)
    try:
        yield state
    finally:
        trainer.load_state_dict(state)
        random.restore()
