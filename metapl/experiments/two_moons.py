"""The two moons: the paper's toy experiment, for many seeds at once."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from metapl.data.draws import fold_in
from metapl.data.sets.two_moons import Moons, two_moons
from metapl.errors import MetaplError
from metapl.experiments.stacked import Batch, Stack, Steps, Tree, stacked
from metapl.metrics import interval
from metapl.recipes.two_moons import SUCCESS, TwoMoons

Method = Literal["supervised", "pseudo_labels", "mpl", "none"]

METHODS: dict[Method, str] = {
    "supervised": "supervised",
    "pseudo_labels": "pseudo-labels",
    "mpl": "Meta Pseudo Labels",
    "none": "the same loop without feedback",
}
"""The methods with their titles. The last is the control."""

MOST_RUNS = 4096

CHUNK = 128
"""Steps whose batches are drawn at once. Part of what a seed means: other chunks draw other batches."""

_TEACHER, _STUDENT, _BATCHES = 1, 2, 3
"""Keep what is drawn of one seed apart."""

Progress = Callable[[str, int, int], None]
"""Takes the name of a phase, the steps done and the steps in all."""


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


class TwoMoonsRuns:
    """The runs of all seeds, side by side; each ends as it would alone, up to rounding.

    Args:
        recipe: their settings.
        seeds: one for each run.
        progress: is told now and then how far they are.
        dtype: of weights and points.
    """

    def __init__(
        self,
        recipe: TwoMoons,
        seeds: Sequence[int],
        progress: Progress | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 1 <= len(seeds) <= MOST_RUNS:
            raise MetaplError(f"{len(seeds):,} seeds were given; expected 1 to {MOST_RUNS:,}.")
        self.recipe, self.seeds, self.progress = recipe, tuple(seeds), progress
        self.steps = Steps(recipe)
        self.moons = [self._drawn(seed) for seed in self.seeds]
        columns = [(m.points, m.classes, m.points[m.labeled], m.classes[m.labeled]) for m in self.moons]
        points, self.classes, labeled, labels = (
            rearrange(list(column), "run ... -> run ...") for column in zip(*columns, strict=True)
        )
        self.points, self.labeled = points.to(dtype), labeled.to(dtype)
        self.targets = F.one_hot(labels, 2).to(dtype)
        self._supervised: Tree | None = None

    @property
    def network(self) -> Stack:
        """The networks of all methods."""
        return self.steps.network

    @torch.no_grad()
    def run(self, method: Method) -> Outcome:
        """Train all runs by a method."""
        networks = getattr(self, f"_{method}_networks")()
        right = self.network.classes(networks, self.points) == self.classes
        return Outcome(tuple(right.double().mean(1).tolist()), networks)

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

    def _supervised_networks(self) -> Tree:
        if self._supervised is None:
            self._supervised = self._alone("teacher", self.recipe.steps, self.recipe.uda_weight, METHODS["supervised"])
        return self._supervised

    def _pseudo_labels_networks(self) -> Tree:
        teacher, student = self._supervised_networks(), self.initial("student")
        step = None
        for number, batch in enumerate(self.batches(self.recipe.steps)):
            step = step or stacked(self.steps.student_alone, teacher, student, batch=batch)
            student = step(teacher, student, batch=batch)
            self._tell(METHODS["pseudo_labels"], number, self.recipe.steps)
        return student

    def _mpl_networks(self) -> Tree:
        return self.teachers_and_students(self.steps, METHODS["mpl"])[1]

    def _none_networks(self) -> Tree:
        quiet = dataclasses.replace(self.recipe, feedback_weight=0.0, feedback_ratio=None)
        return self.teachers_and_students(Steps(quiet), METHODS["none"])[1]

    def teachers_and_students(self, steps: Steps, title: str) -> tuple[Tree, Tree]:
        """The networks of all runs after the loop of Meta Pseudo Labels."""
        before = self.recipe.pretrain_steps
        teacher, student = (self._alone(role, before, 0.0, "first steps") for role in ("teacher", "student"))
        step = None
        for number, batch in enumerate(self.batches(self.recipe.steps)):
            step = step or stacked(steps.teacher_and_student, teacher, student, batch=batch)
            teacher, student = step(teacher, student, batch=batch)
            self._tell(title, number, self.recipe.steps)
        return teacher, student

    def _alone(self, role: Literal["teacher", "student"], steps: int, uda_weight: float, title: str) -> Tree:
        """Networks that learn from the labeled points and, with UDA, from the others too."""
        params = self.initial(role)
        lr = self.recipe.teacher_lr if role == "teacher" else self.recipe.student_lr

        def one(params: Tree, batch: Batch) -> Tree:
            return self.steps.network_alone(params, batch, lr, uda_weight)

        labeled_only = Batch(self.labeled, self.targets, self.labeled)
        batches = self.batches(steps) if uda_weight else (labeled_only for _ in range(steps))
        step = None
        for number, batch in enumerate(batches):
            step = step or stacked(one, params, batch=batch)
            params = step(params, batch=batch)
            self._tell(title, number, steps)
        return params

    # ---------------------------------------------------------------------------------------------------------- draws

    def _drawn(self, seed: int) -> Moons:
        recipe = self.recipe
        return two_moons(
            seed,
            points=recipe.points,
            noise=recipe.noise,
            labels_per_class=recipe.labels_per_class,
            placement=recipe.placement,
        )

    def _chunk(self, moons: Moons, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Positions of unlabeled points, noise, and what labels are drawn by, for ``CHUNK`` steps of a run."""
        recipe = self.recipe
        shape = (CHUNK, recipe.lookahead * recipe.unlabeled_batch)
        unlabeled = moons.unlabeled
        index = unlabeled[torch.randint(len(unlabeled), shape, generator=generator)]
        noise = torch.randn(*shape, 2, generator=generator) if recipe.input_noise else None
        uniform = torch.rand(shape, generator=generator) if recipe.mode == "reinforce" else None
        return index, noise, uniform

    def _tell(self, title: str, done: int, steps: int) -> None:
        if self.progress is not None:
            self.progress(title, done + 1, steps)
