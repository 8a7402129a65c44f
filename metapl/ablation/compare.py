"""Every mode on a model: `ablate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from metapl.ablation.batches import pairs, refuse_single_use
from metapl.ablation.figures import Distance, ModeCost
from metapl.ablation.gradients import CannotRun, costs, distance, exact_gradient, over_points
from metapl.ablation.recommend import recommendation
from metapl.ablation.results import Ablation
from metapl.ablation.stability import sweeps
from metapl.ablation.trainings import short_trainings
from metapl.errors import MetaplError
from metapl.execution.rng import RandomState
from metapl.feedback import MODES, Altered, Estimator, Forward, Unrolled, estimator
from metapl.training.progress import counting
from metapl.training.trainer import BilevelTrainer

Alteration = Literal["permuted", "class_means", "random_sign"]
ALTERATIONS: tuple[Alteration, ...] = get_args(Alteration)

PER_EXAMPLE = ("forward", "difference", "unrolled", "reinforce_per_example")
"""Modes whose feedback can be altered; the first of them that runs is."""


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
              \text{noise to signal} = \frac{\sqrt{\tfrac1n \sum_i \|g_i - \bar g\|^2}}{\|g^*\|}

    with :math:`g^*` the exact gradient of the soft step, by double backward (by forward mode where the student has no
    second derivative), and :math:`\bar g` the mean of n draws of labels.

    Args:
        trainer: the networks, the problem and the student's optimizer as they stand. It is left as it was. With
            ``lookahead=K`` the gradients are those through K steps.
        labeled, unlabeled: a batch each, as for ``trainer.step``, or sources of batches, as for ``trainer.fit``.
        modes: names or estimators; default: all.
        steps: the training in which is looked: at its beginning, in its middle and at its end, by copies of the
            trainer's state, which is put back. 0: at the trainer's state alone.
        draws: of labels, for modes that draw them, and of alterations.
        rounds: in which each mode is timed once, and the least counts; None: 5, and more for short calls, for a second.
        altered: also measure the feedback of a mode altered in three ways (:class:`metapl.feedback.Altered`), of the
            first that runs of ``forward``, ``difference``, ``unrolled`` and ``reinforce_per_example``. These are
            controls: what a training gains by them is not due to the feedback on each example.
        stability: also measure the modes over a few step sizes of finite differences (``epsilon``), temperatures and
            sizes of the unlabeled batch, at the last point.
        train_steps: steps of short trainings by each mode, and by altered feedback, from the trainer's state; 0: none.
        train_seeds: of the short trainings: of drawn labels, dropout and the order of batches.
        validation: (inputs, labels) or an iterable of such batches, on which short trainings are measured.
        progress: show on a terminal how far it is.

    Cost: some ``draws`` + ``rounds`` + 3 calls of each mode at each point, and the training between the points;
    stability: up to 12 × ``draws`` calls of each mode more; short trainings: ``train_steps`` steps for each mode and
    seed.

    Raises: :class:`metapl.MetaplError` where no exact gradient can be had: the problem has no differentiable signal, or
    the student neither a second derivative nor forward mode.

    >>> import metapl, torch
    >>> trainer = metapl.BilevelTrainer(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), "reinforce")
    >>> labeled, unlabeled = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(8, 4)
    >>> found = ablate(trainer, labeled, unlabeled, ["forward", "reinforce"], draws=2, rounds=1)
    >>> round(found.modes["forward"].cosine, 3), found.recommended
    (1.0, 'forward')
    """
    _check_numbers(steps=steps, draws=draws, rounds=rounds, train_steps=train_steps)
    if train_steps:
        _check_seeds(train_seeds)
        refuse_single_use(labeled, unlabeled)
    estimates = _by_name(modes)
    look = _Look(trainer, draws)
    points = tuple(sorted({0, steps // 2, steps}))
    with _put_back(trainer) as start:
        with _counted("steps looked at", progress, len(points)) as done:
            for t, (x_l, x_u) in enumerate(pairs(trainer, labeled, unlabeled, steps + 1)):
                if t in points:
                    look.at(x_l, x_u, estimates)
                    if altered and t == 0:
                        estimates |= _altered(estimates, look.reasons)
                        look.at(x_l, x_u, {n: e for n, e in estimates.items() if isinstance(e, Altered)})
                    done()
                if t < steps:
                    trainer.step(x_l, x_u)
                    continue
                running = [estimate for name, estimate in estimates.items() if name not in look.reasons]
                cost = costs(trainer, running, x_l, x_u, rounds)
        measured = look.figures(estimates, cost)
        sweep = {}
        if stability:
            with _counted("settings varied", progress, 3) as done:
                true = [estimate for estimate in running if not isinstance(estimate, Altered)]
                sweep = sweeps(trainer, true, x_l, x_u, draws, done)
        trainings = None
        if train_steps:
            with _counted("trainings", progress, len(running) * len(train_seeds)) as done:
                trainings = short_trainings(
                    trainer,
                    start,
                    running,
                    labeled,
                    unlabeled,
                    steps=train_steps,
                    seeds=train_seeds,
                    validation=validation,
                    done=done,
                )
    controls = {name: mode for name, mode in measured.items() if isinstance(estimates[name], Altered)}
    compared = {name: mode for name, mode in measured.items() if name not in controls}
    name, text = recommendation(compared, [name for name in compared if _is_exact(estimates[name])])
    return Ablation(compared, text, points, controls, sweep, trainings, name)


class _Look:
    """The distances of the modes at several points, or why they cannot run."""

    def __init__(self, trainer: BilevelTrainer, draws: int) -> None:
        self.trainer, self.draws = trainer, draws
        self.distances: dict[str, list[Distance]] = {}
        self.reasons: dict[str, str] = {}

    def at(self, labeled: Any, unlabeled: Any, estimates: Mapping[str, Estimator]) -> None:
        """Look with the trainer as it stands."""
        exact = exact_gradient(self.trainer, labeled, unlabeled)
        for name, estimate in estimates.items():
            if name in self.reasons:
                continue
            try:
                found = distance(self.trainer, estimate, labeled, unlabeled, exact, self.draws)
            except CannotRun as error:
                self.reasons[name] = str(error)
            else:
                self.distances.setdefault(name, []).append(found)

    def figures(
        self, names: Mapping[str, Estimator], cost: Mapping[str, tuple[float, float, int]]
    ) -> dict[str, ModeCost | str]:
        """By name, with the costs."""
        return {
            name: self.reasons[name] if name in self.reasons else over_points(self.distances[name], *cost[name])
            for name in names
        }


def _by_name(modes: Sequence[str | Estimator] | None) -> dict[str, Estimator]:
    estimates = [estimator(mode) for mode in (MODES if modes is None else modes)]
    names = [estimate.name for estimate in estimates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        given = f"{twice[0]} more than once" if twice else "no mode"
        raise MetaplError(f"ablate was given {given}; expected one or more modes, each name once.")
    return dict(zip(names, estimates, strict=True))


def _altered(estimates: Mapping[str, Estimator], reasons: Mapping[str, str]) -> dict[str, Estimator]:
    """The alterations of the first mode that they can be made of."""
    base = next((estimates[name] for name in PER_EXAMPLE if name in estimates and name not in reasons), None)
    made = [] if base is None else [Altered(base, alteration) for alteration in ALTERATIONS]
    return {one.name: one for one in made if one.name not in estimates}


def _is_exact(mode: Estimator) -> bool:
    """Whether a mode gives the whole gradient, but for rounding."""
    if not isinstance(mode, Unrolled | Forward) or mode.truncate is not None:
        return False
    return isinstance(mode, Unrolled) or mode.normalization == "gradient"


def _check_numbers(**numbers: int | None) -> None:
    least = {"steps": 0, "train_steps": 0}
    for name, number in numbers.items():
        if number is not None and number < least.get(name, 1):
            raise MetaplError(f"ablate({name}={number}): expected {least.get(name, 1)} or more.")


def _check_seeds(seeds: Sequence[int]) -> None:
    if not len(seeds) or any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise MetaplError(f"ablate(train_seeds={seeds!r}): expected one or more numbers of 0 or more, none twice.")


@contextmanager
def _counted(what: str, shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """Give a function that counts one more."""
    with counting(what, shown, total) as update:
        done = 0

        def one_more() -> None:
            nonlocal done
            done += 1
            update(done)

        yield one_more


@contextmanager
def _put_back(trainer: BilevelTrainer) -> Iterator[dict[str, Any]]:
    """The trainer's state; in the end the trainer and the default generators are as they were."""
    state, random = trainer.state_dict(), RandomState.now(trainer.device)
    try:
        yield state
    finally:
        trainer.load_state_dict(state)
        random.restore()
