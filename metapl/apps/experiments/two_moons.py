"""The two moons: the paper's toy experiment, for many seeds at once."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from metapl.apps.experiments.stacked import Batch, Stack, Steps, Tree, stacked
from metapl.apps.pictures.sets.two_moons import Moons, two_moons
from metapl.apps.recipes.two_moons import SUCCESS, TwoMoons
from metapl.apps.reports.moons import Regions, draw_regions
from metapl.data.draws import fold_in
from metapl.errors import MetaplError
from metapl.execution.ranks import ALONE, Ranks
from metapl.metrics import interval
from metapl.training.progress import counting
from metapl.training.stopping import Interrupted, stop_requests

Method = Literal["supervised", "pseudo_labels", "mpl", "none"]

METHODS: dict[Method, str] = {
    "supervised": "supervised",
    "pseudo_labels": "pseudo-labels",
    "mpl": "Meta Pseudo Labels",
    "none": "the same loop without feedback",
}
"""The methods with their titles. The last is the control."""

MOST_RUNS = 4096

HARDLY = 0.6
"""An accuracy up to which a network has hardly learned anything, on two classes of the same size."""

CHUNK = 128
"""Steps whose batches are drawn at once. Part of what a seed means: other chunks draw other batches. As often,
processes that share the runs hear of each other."""

GRID, BORDER = 200, 0.25
"""Points of the plane on each side that are classified for the picture, and how far it goes beyond the moons."""

_TEACHER, _STUDENT, _BATCHES = 1, 2, 3
"""Keep what is drawn of one seed apart."""


@dataclass(frozen=True)
class Outcome:
    """The runs of a method.

    Args:
        accuracy: the share of all points that each run classifies as they were drawn, by seed.
        networks: their stacked weights.
    """

    accuracy: tuple[float, ...]
    networks: Tree

    @property
    def success(self) -> int:
        """The number of runs that succeed."""
        return sum(accuracy > SUCCESS for accuracy in self.accuracy)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the success rate."""
        return interval(self.success, len(self.accuracy))

    @property
    def median(self) -> int:
        """The position of the run in the middle; of two, the worse one."""
        return self.accuracy.index(statistics.median_low(self.accuracy))

    def to_json(self) -> dict[str, Any]:
        """What ``result.json`` says of the method."""
        return {
            "success": self.success,
            "runs": len(self.accuracy),
            "interval": list(self.interval),
            "accuracy": list(self.accuracy),
        }


def seeds_of(seeds: Sequence[int], number: int, processes: int) -> tuple[int, ...]:
    """The seeds of a process, in their order; shares differ by one run at most.

    >>> [seeds_of(range(5), number, 2) for number in range(2)]
    [(0, 1), (2, 3, 4)]
    """
    return tuple(seeds[len(seeds) * number // processes : len(seeds) * (number + 1) // processes])


class TwoMoonsRuns:
    """The runs of all seeds, side by side; each ends as it would alone, up to rounding.

    Args:
        recipe: their settings.
        seeds: one for each run.
        progress: show how far they are.
        dtype: of weights and points.
        ranks: processes each of which has runs of its own, at the same time; they end, fail and stop together.
    """

    def __init__(
        self,
        recipe: TwoMoons,
        seeds: Sequence[int],
        progress: bool = False,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
    ) -> None:
        if not 1 <= len(seeds) <= MOST_RUNS:
            raise MetaplError(f"{len(seeds):,} seeds were given; expected 1 to {MOST_RUNS:,}.")
        self.recipe, self.seeds, self.progress, self.ranks = recipe, tuple(seeds), progress, ranks
        self._asked: list[int] = []
        self.steps = Steps(recipe)
        self.moons = [moons_of(recipe, seed) for seed in self.seeds]
        columns = [(m.points, m.classes, m.points[m.labeled], m.classes[m.labeled]) for m in self.moons]
        points, self.classes, labeled, labels = (
            rearrange(list(column), "run ... -> run ...") for column in zip(*columns, strict=True)
        )
        self.points, self.labeled = points.to(dtype), labeled.to(dtype)
        self.targets = F.one_hot(labels, 2).to(dtype)

    @property
    def network(self) -> Stack:
        """The networks of all methods."""
        return self.steps.network

    @torch.no_grad()
    def run(self, method: Method) -> Outcome:
        """Train all runs by a method.

        Raises:
            MetaplError: the weights of some runs are not finite.
            Interrupted: one of several processes was asked to stop.
        """
        requests: AbstractContextManager[list[int]] = nullcontext([]) if self.ranks.alone else stop_requests()
        with requests as self._asked:
            networks: Tree = getattr(self, f"_{method}_networks")()
            self._heed()
        with self.ranks.agreed():
            finite = torch.stack([t.isfinite().flatten(1).all(1) for t in networks.values()]).all(0)
            if not finite.all():
                raise MetaplError(
                    f"{METHODS[method]}: the weights of {int((~finite).sum())} of {len(self.seeds)} runs are not "
                    "finite after training; expected lower learning rates, or less weight on the feedback or UDA."
                )
        right = self.network.classes(networks, self.points) == self.classes
        return Outcome(tuple(right.double().mean(1).tolist()), networks)

    def _heed(self) -> None:
        """Stop, in all processes, where one of them was asked to."""
        if self.ranks.any(bool(self._asked)):
            (number, *_) = [n for asked in self.ranks.gathered(self._asked) for n in asked]
            raise Interrupted(0, number, None)

    def initial(self, role: Literal["teacher", "student"]) -> Tree:
        """The first weights of teachers or students."""
        stream = _TEACHER if role == "teacher" else _STUDENT
        generators = [torch.Generator().manual_seed(fold_in(seed, stream)) for seed in self.seeds]
        tree = self.network.initial(generators, self.recipe.init_scale)
        return {name: t.to(self.points.dtype) for name, t in tree.items()}

    def batches(self, steps: int) -> Iterator[Batch]:
        """The stacked batches of so many steps; all methods get the same."""
        recipe = self.recipe
        generators = [torch.Generator().manual_seed(fold_in(seed, _BATCHES)) for seed in self.seeds]
        for start in range(0, steps, CHUNK):
            drawn = [self._chunk(moons, generator) for moons, generator in zip(self.moons, generators, strict=True)]
            index, noise, uniform = (
                None if column[0] is None else rearrange(list(column), "run step ... -> step run ...")
                for column in zip(*drawn, strict=True)
            )
            assert index is not None
            runs = torch.arange(len(self.seeds))[:, None]
            for i in range(min(CHUNK, steps - start)):
                weak = self.points[runs, index[i]]
                strong = None if noise is None else weak + recipe.input_noise * noise[i].to(weak)
                yield Batch(self.labeled, self.targets, weak, strong, None if uniform is None else uniform[i])

    # --------------------------------------------------------------------------------------------------- the methods

    @cached_property
    def _supervised(self) -> Tree:
        return self._alone("teacher", self.recipe.steps, METHODS["supervised"], uda=self.recipe.uda_weight != 0)

    def _supervised_networks(self) -> Tree:
        return self._supervised

    def _pseudo_labels_networks(self) -> Tree:
        networks = self._supervised, self.initial("student")

        def step(teacher: Tree, student: Tree, batch: Batch) -> tuple[Tree, Tree]:
            return teacher, self.steps.student_alone(teacher, student, batch)

        return self._trained(step, networks, self.recipe.steps, METHODS["pseudo_labels"])[1]

    def _mpl_networks(self) -> Tree:
        return self.teachers_and_students()[1]

    def _none_networks(self) -> Tree:
        return self.teachers_and_students(feedback=False)[1]

    def teachers_and_students(self, feedback: bool = True) -> tuple[Tree, Tree]:
        """The networks of all runs after the loop of Meta Pseudo Labels, or after the same loop without feedback."""
        recipe = self.recipe
        steps = self.steps
        if not feedback:
            steps = Steps(dataclasses.replace(recipe, feedback_weight=0.0, feedback_ratio=None))
        title = METHODS["mpl" if feedback else "none"]
        teacher, student = self._trained(steps.teacher_and_student, self._first, recipe.steps, title)
        return teacher, student

    @cached_property
    def _first(self) -> tuple[Tree, Tree]:
        """The teachers and students that the loop begins with."""
        steps = self.recipe.pretrain_steps
        return (
            self._alone("teacher", steps, "first steps, teachers", uda=False),
            self._alone("student", steps, "first steps, students", uda=False),
        )

    def _alone(self, role: Literal["teacher", "student"], steps: int, title: str, *, uda: bool) -> Tree:
        """Networks that learn from the labeled points and, with UDA, from the others too."""
        lr = self.recipe.teacher_lr if role == "teacher" else self.recipe.student_lr

        def step(params: Tree, batch: Batch) -> tuple[Tree]:
            return (self.steps.network_alone(params, batch, lr, uda=uda),)

        # Without UDA only the labeled points count, and no others are drawn.
        batches = None if uda else itertools.repeat(Batch(self.labeled, self.targets, self.labeled), steps)
        (params,) = self._trained(step, (self.initial(role),), steps, title, batches)
        return params

    def _trained(
        self,
        step: Callable[..., tuple[Tree, ...]],
        networks: tuple[Tree, ...],
        steps: int,
        title: str,
        batches: Iterable[Batch] | None = None,
    ) -> tuple[Tree, ...]:
        """The networks after so many steps.

        Args:
            step: of one run: the networks after it, from those before it and a batch.
            networks: of all runs.
            steps, title: for the count that is shown.
            batches: one for each step; None: the unlabeled ones that all methods get.
        """
        run: Callable[..., tuple[Tree, ...]] | None = None
        with counting(title, self.progress, steps) as done:
            for number, batch in enumerate(self.batches(steps) if batches is None else batches):
                if number % CHUNK == 0 and not self.ranks.alone:
                    self._heed()
                run = run or stacked(step, *networks, batch=batch)
                networks = run(*networks, batch=batch)
                done(number + 1)
        return networks

    # ---------------------------------------------------------------------------------------------------------- draws

    def _chunk(self, moons: Moons, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Positions of unlabeled points, noise, and what labels are drawn by, for ``CHUNK`` steps of a run."""
        recipe = self.recipe
        shape = (CHUNK, recipe.lookahead * recipe.unlabeled_batch)
        unlabeled = moons.unlabeled
        index = unlabeled[torch.randint(len(unlabeled), shape, generator=generator)]
        noise = torch.randn(*shape, 2, generator=generator) if recipe.input_noise else None
        uniform = torch.rand(shape, generator=generator) if recipe.mode == "reinforce" else None
        return index, noise, uniform


def moons_of(recipe: TwoMoons, seed: int) -> Moons:
    """The points of a run."""
    return two_moons(
        seed,
        points=recipe.points,
        noise=abs(recipe.noise),  # scikit-learn refuses -0
        labels_per_class=recipe.labels_per_class,
        placement=recipe.placement,
    )


def together(outcome: Outcome, ranks: Ranks) -> Outcome:
    """The runs of all processes, in the order of their seeds."""
    found: list[Outcome] = ranks.gathered(outcome)
    networks = {name: torch.cat([one.networks[name] for one in found]) for name in outcome.networks}
    return Outcome(tuple(accuracy for one in found for accuracy in one.accuracy), networks)


def titles(recipe: TwoMoons) -> dict[Method, str]:
    """The methods in words; with UDA, supervised learning is more than that."""
    return METHODS | ({"supervised": "supervised and UDA"} if recipe.uda_weight else {})


def table(recipe: TwoMoons, outcomes: Mapping[Method, Outcome]) -> str:
    """The success of each method, for a terminal."""
    named = titles(recipe)
    head = f"{'':<30}  above {100 * SUCCESS:.0f} %  95 % interval  median run"
    return "\n".join([head, *(_row(named[method], outcome) for method, outcome in outcomes.items())])


def _row(title: str, outcome: Outcome) -> str:
    low, high = (100 * end for end in outcome.interval)
    rate, ends = f"{outcome.success} of {len(outcome.accuracy)}", f"{low:.0f}-{high:.0f} %"
    return f"{title:<30}  {rate:>10}  {ends:>13}  {100 * outcome.accuracy[outcome.median]:>8.1f} %"


def mcnemar(first: Sequence[float], second: Sequence[float]) -> tuple[int, int, float]:
    """McNemar's exact test of whether one of two methods succeeds more often, from the accuracies of paired runs.

    Returns: in how many pairs the first alone succeeds, in how many the second alone, and the two-sided p-value.

    >>> mcnemar([1.0, 1.0, 1.0, 0.8], [0.8, 0.8, 1.0, 0.8])
    (2, 0, 0.5)
    """
    import scipy.stats

    pairs = [(a > SUCCESS, b > SUCCESS) for a, b in zip(first, second, strict=True)]
    alone, other_alone = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    differing = alone + other_alone
    return alone, other_alone, float(scipy.stats.binomtest(alone, differing).pvalue) if differing else 1.0


def verdict(recipe: TwoMoons, outcomes: Mapping[Method, Outcome]) -> str:
    """Whether Meta Pseudo Labels separates the moons more often than the others, by McNemar's exact test."""
    mpl, named = outcomes["mpl"], titles(recipe)
    other, best = max(
        ((method, outcome) for method, outcome in outcomes.items() if method != "mpl"),
        key=lambda pair: pair[1].success,
    )
    only_mpl, only_other, p = mcnemar(mpl.accuracy, best.accuracy)
    if p >= 0.05:
        said = f"does not differ from that of {named[other]}"
    else:
        said = f"is {'higher' if only_mpl > only_other else 'lower'} than that of {named[other]}"
    return (
        f"The success rate of {METHODS['mpl']} {said}, the best of the others (p = {p:.2g}, McNemar's exact test on "
        f"{len(mpl.accuracy)} paired seeds).{_hardly_learned(outcomes.values())}"
    )


def _hardly_learned(outcomes: Iterable[Outcome]) -> str:
    """A sentence for networks that are still as they began: then no method has been compared with another."""
    if any(outcome.accuracy[outcome.median] > HARDLY for outcome in outcomes):
        return ""
    return (
        f" Half of the runs of every method classify {100 * HARDLY:.0f} % of the points or fewer, and guessing "
        "classifies 50 %: so few steps say nothing about the methods. Take more --steps."
    )


def draw(path: Path, recipe: TwoMoons, seeds: Sequence[int], outcomes: Mapping[Method, Outcome]) -> None:
    """The decision regions of each method's median run, and the accuracies of all of its runs, as a PNG."""
    panels = [_regions(recipe, seeds, titles(recipe)[method], outcome) for method, outcome in outcomes.items()]
    note = (
        f"{recipe.points:,} points, {recipe.labels_per_class} of each moon labeled (large marks); {len(seeds)} "
        "seeds. Of each method its run with the median accuracy; below, all of its runs, green above "
        f"{100 * SUCCESS:.0f} %. In brackets the 95 % interval of the success rate."
    )
    draw_regions(path, "Two moons", note, panels, SUCCESS)


def _regions(recipe: TwoMoons, seeds: Sequence[int], title: str, outcome: Outcome) -> Regions:
    """The panel of a method."""
    run = outcome.median
    moons = moons_of(recipe, seeds[run])
    low, high = moons.points.amin(0) - BORDER, moons.points.amax(0) + BORDER
    axes = [torch.linspace(float(a), float(b), GRID) for a, b in zip(low, high, strict=True)]
    plane = rearrange(torch.stack(torch.meshgrid(*axes, indexing="xy")), "xy y x -> 1 (y x) xy")
    network = {name: t[run : run + 1] for name, t in outcome.networks.items()}
    classes = Steps(recipe).network.classes(network, plane.to(next(iter(network.values()))))
    grid = rearrange(classes, "1 (y x) -> y x", y=GRID)
    ends = "-".join(f"{100 * end:.0f}" for end in outcome.interval)
    return Regions(
        title=title[:1].upper() + title[1:],
        note=f"{outcome.success} of {len(outcome.accuracy)} succeed ({ends} %); shown: seed {seeds[run]}, "
        f"{100 * outcome.accuracy[run]:.1f} %",
        points=moons.points.tolist(),
        classes=moons.classes.tolist(),
        labeled=moons.labeled.tolist(),
        corner=(float(low[0]), float(low[1])),
        far_corner=(float(high[0]), float(high[1])),
        grid=grid.tolist(),
        accuracy=outcome.accuracy,
    )
