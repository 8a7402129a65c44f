"""``metapl train RECIPE``"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from metapl.apps.commands.folders import run_folder
from metapl.apps.commands.idle import Rule, by_choice, by_method, explained, noisy_by_method
from metapl.apps.commands.parse import Switch, did_you_mean, on_recipe, paragraph
from metapl.apps.commands.process import exit_code
from metapl.apps.experiments.accuracies import parse_seeds
from metapl.apps.experiments.jobs import Job, Trial, aloud
from metapl.apps.experiments.labels_given import check_labels_given
from metapl.apps.experiments.settle import settled
from metapl.apps.experiments.shares import check_runs, check_shares
from metapl.apps.experiments.side_by_side import compare
from metapl.apps.experiments.store import stored
from metapl.apps.experiments.summary import summary
from metapl.apps.recipes import RECIPES, Digits, ImageFolders, NoisyFolders
from metapl.apps.recipes.base import Recipe
from metapl.apps.recipes.methods import COMPARED, CONTROLS, METHODS, NOISY_METHODS, Method, title
from metapl.distributed.launch import (
    Lead,
    check_started,
    from_first,
    is_first,
    left_to_first,
    program,
    run_together,
)
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.runs.cores import default_threads
from metapl.runs.folder import RunFolder
from metapl.training import Interrupted
from metapl.words import tell

METHODS_HELP = (
    f"with --compare: these methods alone, of {', '.join(METHODS)}; supervised_everything is for recipes "
    "that know the labels of all examples."
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a student with Meta Pseudo Labels; with --compare, say whether the teacher's feedback helped.

    Args:
        recipe: what is trained, and how.
        out: run folder; by default the next free one in runs/.
        resume: continue the run in the folder; it ends bit for bit as without the interruption.
        compare: train by the other methods too, one of them the same loop without feedback, and compare them.
        seeds: with --compare: seeds, such as 0-9 or 0,3,5; by default the recipe's own.
        controls: with --compare: train with altered feedback too.
        jobs: with --compare: number of runs at a time; by default one for each core, and one on a GPU.
        mesh: processes that train together, started by torchrun.
    """

    known: ClassVar[Mapping[str, Method]] = METHODS
    """The methods that the recipes can be trained by."""
    equal_cost: ClassVar[bool] = False
    """Whether compared methods take as many steps as cost the same; otherwise they take as many steps."""

    recipe: Annotated[Digits, tyro.conf.arg(name="")] = field(default_factory=Digits)
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    resume: Switch = False
    compare: Switch = False
    seeds: Annotated[str | None, tyro.conf.arg(metavar="SEEDS", help_behavior_hint="")] = None
    controls: Switch = False
    methods: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="METHOD ...", help=METHODS_HELP, help_behavior_hint="")
    ] = None
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    mesh: Mesh = field(default_factory=Mesh)

    def __call__(self) -> int:
        try:
            self._check()
            device = self.recipe.torch_device()
        except MetaplError:
            if is_first():
                raise
            return left_to_first()
        return run_together(self.mesh, device, self._lead, self._beside)

    def _lead(self) -> int:
        """The share of the first process, which shows and writes."""
        lead, code = Lead(), 2
        try:
            with run_folder(self.out, self.recipe.name, self.resume) as folder:
                try:
                    recipe = self._settled(folder, lead)
                    self._check_shares(recipe)
                    code = dataclasses.replace(self, recipe=recipe)._run(folder, lead)
                except KeyboardInterrupt as stopped:
                    code = _say_how_to_go_on(stopped, folder.path)
        finally:
            lead.end(code)
        return code

    def _beside(self) -> int:
        """The share of another process than the first, which shows nothing and whose folders are not kept."""
        while isinstance(job := from_first(None), Job | Trial):
            if isinstance(job, Trial):
                job.run(self.mesh)
                continue
            with tempfile.TemporaryDirectory() as place:
                own = dataclasses.replace(job, folder=Path(place) / "run", resume=False)
                try:
                    own.run(mesh=self.mesh)
                except KeyboardInterrupt as stopped:
                    return exit_code(stopped)
        code: int = job
        return code

    def _settled(self, folder: RunFolder, lead: Lead) -> Any:
        """The recipe as it can be stored: what was left open is chosen, or taken from the run that is resumed."""
        recipe: Recipe = self.recipe
        if not isinstance(recipe, ImageFolders):
            return recipe.settled()
        torch.set_num_threads(default_threads())
        before = stored(folder)[0] if self.resume and folder.exists else None
        return settled(recipe, before if isinstance(before, ImageFolders) else None, aloud, partial(self._try, lead))

    def _try(self, lead: Lead, recipe: Recipe) -> None:
        """Refuse a recipe that the processes cannot train together, networks that cannot be cut included."""
        self._check_shares(recipe)
        if self.mesh.together > 1:
            trial = Trial(recipe, self._own_method())
            with lead.together(trial):
                trial.run(self.mesh)

    def _check_shares(self, recipe: Recipe) -> None:
        """Refuse a recipe that the processes cannot train together."""
        if self.mesh.size > 1:
            check_shares(recipe, self.mesh)

    def _run(self, folder: RunFolder, lead: Lead) -> int:
        return self._compare(folder, lead) if self.compare else self._train(folder, lead)

    def _check(self) -> None:
        check_started(self.mesh)
        if self.jobs is not None and self.mesh.size > 1:
            raise MetaplError(
                f"--jobs {self.jobs} has no effect beside --mesh: all processes train one run after another together."
            )
        for name in ("seeds", "methods", "jobs", "controls"):
            if getattr(self, name) and not self.compare:
                raise MetaplError(f"--{name} goes with --compare.")
        if self.controls and self.methods:
            controls = " ".join(self._controls())
            raise MetaplError(f"--controls has no effect beside --methods: add {controls} to the methods.")
        unknown = [name for name in self.methods or () if name not in self.known]
        if unknown:
            meant = did_you_mean(unknown[0], [*self.known]) or "."
            raise MetaplError(
                f"--methods {' '.join(unknown)}: there is no {unknown[0]}{meant} "
                f"Expected some of {', '.join(self.known)}."
            )
        if self.seeds:
            parse_seeds(self.seeds)
        if self.jobs is not None and self.jobs < 1:
            raise MetaplError(f"--jobs {self.jobs}: expected 1 or more.")
        recipe: Recipe = self.recipe
        check_runs(recipe, self.mesh, self._methods() if self.compare else (self._own_method(),))
        if self.compare and isinstance(recipe, ImageFolders) and recipe.test is None:
            raise MetaplError(
                "--compare reports on pictures that nothing was selected on, and no --test was given; name a folder of "
                "labeled pictures for it."
            )

    # ------------------------------------------------------------------------------------------------------ one run

    def _train(self, folder: RunFolder, lead: Lead) -> int:
        out = folder.path
        finished = self.resume and (out / "result.json").exists()
        method = self._own_method()
        if not finished:
            tell(f"{self.recipe.name} by {title(method)}, seed {self.recipe.seed} -> {out}", wrap=True)
        job = Job(self.recipe, method, out, self.resume)
        with nullcontext() if finished else lead.together(job):
            result = job.run(progress=True, quiet=False, within=folder, mesh=self.mesh)
        if finished:
            tell(f"{out} is finished already.")
        for line in summary(result):
            tell(paragraph(line))
        tell(f"the networks, the report and the figures are in {out}", wrap=True)
        if method == "mpl":
            tell("whether the teacher's feedback helped, only a comparison tells: --compare --seeds 0-4", wrap=True)
        return 0

    def _own_method(self) -> str:
        """That of a single run."""
        return self.recipe.own_method

    # --------------------------------------------------------------------------------------------------- a comparison

    def _compare(self, folder: RunFolder, lead: Lead) -> int:
        def run(job: Job) -> dict[str, Any]:
            with nullcontext() if job.finished else lead.together(job):
                return job.run(mesh=self.mesh)

        seeds = parse_seeds(self.seeds) if self.seeds else (self.recipe.seed,)
        together = run if self.mesh.size > 1 else None
        options: dict[str, Any] = {"resume": self.resume, "jobs": self.jobs, "equal_cost": self.equal_cost}
        options["together"] = together
        comparison = compare(self.recipe, folder, self._methods(), seeds, **options)
        tell(f"figures, report and the delivered networks are in {folder.path}")
        tell(f"\n{comparison.caption()}\n\n{comparison.table()}\n")
        tell(paragraph(comparison.sentence()))
        if labels := comparison.labels():
            tell(paragraph(labels))
        tell(paragraph(comparison.delivery()))
        return 0

    def _methods(self) -> tuple[str, ...]:
        """Those that are compared."""
        # The recipe's own method first: it is delivered where validation cannot tell.
        own = self.recipe.own_method
        others = tuple(name for name in COMPARED if name != own) + (self._controls() if self.controls else ())
        return self.methods or (own, *others)

    def _controls(self) -> tuple[str, ...]:
        """Those with altered feedback."""
        return CONTROLS


@dataclass(frozen=True, kw_only=True)
class TrainImages(Train):
    """Train a classifier on your own pictures: a few with labels, in one folder for each class, and many without.

    The teacher's flags are also those of the one network that the methods uda, fixmatch and supervised train.

    Args:
        recipe: what is trained, and how.
    """

    recipe: Annotated[ImageFolders, tyro.conf.arg(name="")]  # type: ignore[assignment]  # another recipe, run alike

    def _check(self) -> None:
        super()._check()
        check_labels_given(self.recipe)

    def check_flags(self, given: Sequence[str]) -> None:
        """Refuse flags that are given and change nothing; see :func:`metapl.apps.commands.idle.given_flags`."""
        refused = explained(given, by_choice(self.recipe, seeds=bool(self.seeds)))
        methods = self._methods() if self.compare else (self.recipe.method,)
        unused = explained(given, self._rules(methods))
        if refused or (unused and not self.compare):
            raise MetaplError(" ".join(filter(None, (refused, unused))))
        if unused:  # comparisons of other methods are run with the same flags
            tell(f"note: {unused}", wrap=True)

    def _rules(self, methods: Sequence[str]) -> Iterator[Rule]:
        """What none of the methods makes use of."""
        return by_method(self.recipe, methods)


NOISY_METHODS_HELP = f"with --compare: these methods alone, of {', '.join(NOISY_METHODS)}."


@dataclass(frozen=True, kw_only=True)
class TrainNoisy(TrainImages):
    """Train a classifier on your own pictures, some of them in the folder of a wrong class, and list the suspects.

    A few pictures with clean labels say what helps. The run folder then has suspects.csv, all of the other pictures
    with the class that they probably are of, the most suspicious first, and suspects.png, a page of the first of them.

    Args:
        recipe: what is trained, and how.
        compare: train by plain training on all labels and on the clean ones too, and compare.
        controls: with --compare: train with altered feedback too, which tells whether what is learned about labels
            depends on whose label it is.
    """

    known: ClassVar[Mapping[str, Method]] = NOISY_METHODS

    recipe: Annotated[NoisyFolders, tyro.conf.arg(name="")]
    compare: Switch = False
    controls: Switch = False
    methods: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="METHOD ...", help=NOISY_METHODS_HELP, help_behavior_hint="")
    ] = None

    def _methods(self) -> tuple[str, ...]:
        own = self.recipe.own_method
        plain = tuple(name for name in ("plain", "clean") if name != own)
        return self.methods or (own, *plain, *(self._controls() if self.controls else ()))

    def _controls(self) -> tuple[str, ...]:
        method = NOISY_METHODS[self.recipe.own_method]
        return tuple(
            name
            for name, control in NOISY_METHODS.items()
            if control.place == "control" and control.doubting == method.doubting
        )

    def _rules(self, methods: Sequence[str]) -> Iterator[Rule]:
        return noisy_by_method(self.recipe, methods)


def _train_on(kind: type[Recipe]) -> type[Train]:
    """The command that trains by a recipe; its help begins with what the recipe says of itself."""
    about, _, _ = (kind.__doc__ or "").partition("    Args:")
    return on_recipe(Train, kind, f"{about.rstrip()}\n\n    Args:\n        recipe: what is trained, and how.\n    ")


_OWN: dict[str, type[Train]] = {Digits.name: Train, ImageFolders.name: TrainImages, NoisyFolders.name: TrainNoisy}
"""Commands that say or do more than that of any recipe."""

COMMANDS: dict[str, type[Train]] = {name: _OWN.get(name) or _train_on(kind) for name, kind in RECIPES.items()}
"""The recipes that can be trained, by name."""


def _say_how_to_go_on(stopped: KeyboardInterrupt, out: Path) -> int:
    """Exit as a process that the signal ended would, after the line that resumes."""
    given = [a for a in sys.argv[1:] if a != "--resume"]
    if not any(a == "--out" or a.startswith("--out=") for a in given):
        given += ["--out", str(out)]
    where = f"{stopped}; " if isinstance(stopped, Interrupted) else "stopped; "
    tell(f"\n{where}go on with:\n  {program()} {shlex.join([*given, '--resume'])}", file=sys.stderr)
    return exit_code(stopped)
