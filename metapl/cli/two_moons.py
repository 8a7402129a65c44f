"""``metapl train two-moons``"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from metapl.cli.folders import run_folder
from metapl.cli.idle import Rule, explained
from metapl.cli.parse import Switch, paragraph
from metapl.errors import MetaplError
from metapl.experiments.comparison import parse_seeds
from metapl.experiments.two_moons import MOST_RUNS, Method, TwoMoonsRuns, draw, table, verdict
from metapl.recipes.two_moons import TwoMoons
from metapl.runs.folder import RunFolder
from metapl.words import tell


class _Stopped(Exception):
    """Ctrl-C as an error, so that the folder is left as it was found: there is nothing to go on with."""

    def __init__(self, stopped: KeyboardInterrupt) -> None:
        super().__init__()
        self.code = 128 + int(getattr(stopped, "signal_number", signal.SIGINT))


@dataclass(frozen=True, kw_only=True)
class TrainTwoMoons:
    """Train tiny networks on two moons with six labels: supervised, by pseudo-labels and by Meta Pseudo Labels.

    All seeds are trained side by side. A run succeeds if it classifies more than 95 % of all points as they were
    drawn; result.json has the success rates with their intervals, two_moons.png the decision regions.

    Args:
        recipe: what is trained, and how.
        out: run folder; by default the next free one in runs/.
        seeds: seeds, such as 0-31 or 0,3,5.
        controls: train by the same loop without feedback too.
    """

    recipe: Annotated[TwoMoons, tyro.conf.arg(name="")] = field(default_factory=TwoMoons)
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    seeds: Annotated[str, tyro.conf.arg(metavar="SEEDS")] = "0-31"
    controls: Switch = False

    def __call__(self) -> int:
        seeds = parse_seeds(self.seeds)
        if len(seeds) > MOST_RUNS:
            raise MetaplError(f"--seeds {self.seeds}: expected {MOST_RUNS:,} seeds at most.")
        if self.out is not None and RunFolder(self.out).exists:
            raise MetaplError(f"{self.out} holds a run already; give another --out.")
        torch.set_num_threads(1)  # more do not help networks of this size
        try:
            with run_folder(self.out, self.recipe.name, resume=False) as folder:
                try:
                    self._run(folder, seeds)
                except KeyboardInterrupt as stopped:
                    raise _Stopped(stopped) from stopped
        except _Stopped as stopped:
            tell("\nstopped; nothing was kept, and such a run is not resumed: start it again.", file=sys.stderr)
            return stopped.code
        return 0

    def check_flags(self, given: Sequence[str]) -> None:
        """Refuse flags that are given and change nothing.

        Args:
            given: their names; see :func:`metapl.cli.idle.given_flags`.
        """
        unused = explained(given, self._rules())
        if unused:
            raise MetaplError(unused)

    def _rules(self) -> Iterator[Rule]:
        if not self.recipe.uda_weight:
            yield Rule("uda-temperature", "with --uda-weight 0", "give a weight above 0")

    def _run(self, folder: RunFolder, seeds: Sequence[int]) -> None:
        recipe = self.recipe
        tell(f"{recipe.name}, {len(seeds)} seeds, {recipe.steps:,} steps -> {folder.path}")
        methods: tuple[Method, ...] = ("supervised", "pseudo_labels", "mpl", *(("none",) if self.controls else ()))
        runs = TwoMoonsRuns(recipe, seeds, progress=True)
        outcomes = {method: runs.run(method) for method in methods}
        # Nothing is written before all is there: a run that was killed leaves a folder that can be used again.
        with folder.claimed(
            {"name": recipe.name, "seeds": list(seeds), "fields": dataclasses.asdict(recipe)}, resume=False
        ):
            draw(folder.path / "two_moons.png", runs, outcomes)
            content = {"methods": {name: outcome.to_json() for name, outcome in outcomes.items()}, "seeds": list(seeds)}
            folder.write_json("result.json", content)
        tell(f"\n{table(recipe, outcomes)}\n")
        tell(paragraph(verdict(recipe, outcomes)))
        tell(f"result.json and two_moons.png are in {folder.path}")
