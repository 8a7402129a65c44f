"""``metapl train two-moons``"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import distributed as dist

from metapl.apps.commands.folders import run_folder
from metapl.apps.commands.parse import Switch, paragraph
from metapl.apps.experiments.accuracies import parse_seeds
from metapl.apps.experiments.two_moons import (
    MOST_RUNS,
    Method,
    Outcome,
    TwoMoonsRuns,
    draw,
    seeds_of,
    table,
    together,
    verdict,
)
from metapl.apps.recipes.two_moons import TwoMoons
from metapl.distributed.launch import Lead, check_started, from_first, is_first, left_to_first, run_together, started
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.execution.ranks import ALONE, Ranks
from metapl.runs.folder import RunFolder
from metapl.words import tell


class _Stopped(Exception):
    """Ctrl-C as an error, so that the folder is left as it was found: there is nothing to go on with."""

    def __init__(self, stopped: KeyboardInterrupt) -> None:
        super().__init__()
        self.code = 128 + int(getattr(stopped, "signal_number", signal.SIGINT))


@dataclass(frozen=True, kw_only=True)
class SharedRuns(Mesh):
    """Processes that share the runs of the seeds.

    Args:
        replicate: processes that share the runs: each trains those of some seeds, and the first shows and writes all.
        shard: as replicate; with both, as many processes as their product.
        tensor: 1, for there is nothing to cut in networks of a few dozen weights.
        spatial: 1, likewise.
    """


@dataclass(frozen=True, kw_only=True)
class TrainTwoMoons:
    """Train tiny networks on two moons with six labels: supervised, by pseudo-labels and by Meta Pseudo Labels.

    All seeds are trained side by side, in several processes where torchrun starts them. A run succeeds if it classifies
    more than 95 % of all points as they were drawn; result.json has the success rates with their intervals,
    two_moons.png the decision regions.

    Args:
        recipe: what is trained, and how.
        out: run folder; by default the next free one in runs/.
        seeds: seeds, such as 0-31 or 0,3,5.
        controls: train by the same loop without feedback too.
        mesh: processes that share the runs, started by torchrun.
    """

    recipe: Annotated[TwoMoons, tyro.conf.arg(name="")] = field(default_factory=TwoMoons)
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    seeds: Annotated[str, tyro.conf.arg(metavar="SEEDS")] = "0-31"
    controls: Switch = False
    mesh: SharedRuns = field(default_factory=SharedRuns)

    def __call__(self) -> int:
        try:
            seeds = self._checked()
        except MetaplError:
            if is_first():
                raise
            return left_to_first()
        torch.set_num_threads(1)  # more do not help networks of this size
        place, then = torch.device("cpu"), "Start the command again."
        return run_together(self.mesh, place, lambda: self._lead(seeds), lambda: self._beside(seeds), then)

    def _checked(self) -> tuple[int, ...]:
        """The seeds; refuse what does not go together."""
        seeds, mesh, count = parse_seeds(self.seeds), self.mesh, started()
        if len(seeds) > MOST_RUNS:
            raise MetaplError(f"--seeds {self.seeds}: expected {MOST_RUNS:,} seeds at most.")
        if mesh.together > 1:
            name, size = ("tensor", mesh.tensor) if mesh.tensor > 1 else ("spatial", mesh.spatial)
            raise MetaplError(
                f"--mesh.{name} {size}: {self.recipe.name} trains networks of a few dozen weights on points, and none "
                f"of them is cut; give --mesh.replicate {size}, by which {size} processes share the runs of the seeds."
            )
        if mesh.size == 1 and count > 1:
            raise MetaplError(
                f"{count} processes were started, and no mesh says what each of them does; give --mesh.replicate "
                f"{count}, by which they share the runs of the seeds."
            )
        check_started(mesh)
        if len(seeds) < mesh.size:
            raise MetaplError(
                f"--seeds {self.seeds}: {len(seeds)} {'run' if len(seeds) == 1 else 'runs'} for {mesh.size} processes; "
                "expected one or more for each: give more seeds, or start fewer processes."
            )
        return tuple(seeds)

    def _lead(self, seeds: Sequence[int]) -> int:
        """The share of the first process, which shows and writes."""
        lead, code = Lead(), 2
        try:
            if self.out is not None and RunFolder(self.out).exists:
                raise MetaplError(f"{self.out} holds a run already; give another --out.")
            with run_folder(self.out, self.recipe.name, resume=False) as folder:
                try:
                    self._run(folder, seeds, lead)
                except KeyboardInterrupt as stopped:
                    raise _Stopped(stopped) from stopped
            code = 0
        except _Stopped as stopped:
            tell("\nstopped; nothing was kept, and such a run is not resumed: start it again.", file=sys.stderr)
            code = stopped.code
        finally:
            lead.end(code)
        return code

    def _beside(self, seeds: Sequence[int]) -> int:
        """The share of another process, which shows and writes nothing."""
        while isinstance(methods := from_first(None), tuple):
            try:
                self._outcomes(seeds, methods)
            except KeyboardInterrupt as stopped:
                return _Stopped(stopped).code
        code: int = methods
        return code

    def _outcomes(self, seeds: Sequence[int], methods: Sequence[Method]) -> dict[Method, Outcome]:
        """All runs by each method, of which this process trains its share."""
        world: Any = dist.group.WORLD
        ranks = ALONE if world is None else Ranks([world], dist.get_rank(), first=is_first())
        own = seeds_of(seeds, ranks.rank, ranks.size)
        runs = TwoMoonsRuns(self.recipe, own, progress=ranks.first, ranks=ranks)
        return {method: together(runs.run(method), ranks) for method in methods}

    def _run(self, folder: RunFolder, seeds: Sequence[int], lead: Lead) -> None:
        recipe = self.recipe
        tell(f"{recipe.name}, {len(seeds)} seeds, {recipe.steps:,} steps -> {folder.path}")
        methods: tuple[Method, ...] = ("supervised", "pseudo_labels", "mpl", *(("none",) if self.controls else ()))
        with lead.together(methods):
            outcomes = self._outcomes(seeds, methods)
        # Nothing is written before all is there: a run that was killed leaves a folder that can be used again.
        with folder.claimed(
            {"name": recipe.name, "seeds": list(seeds), "fields": dataclasses.asdict(recipe)}, resume=False
        ):
            draw(folder.path / "two_moons.png", recipe, seeds, outcomes)
            content = {"methods": {name: outcome.to_json() for name, outcome in outcomes.items()}, "seeds": list(seeds)}
            folder.write_json("result.json", content)
        tell(f"\n{table(recipe, outcomes)}\n")
        tell(paragraph(verdict(recipe, outcomes)))
        tell(f"result.json and two_moons.png are in {folder.path}")
