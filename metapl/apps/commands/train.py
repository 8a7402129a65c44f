"""``metapl train RECIPE`` and ``metapl noisy-student RECIPE``"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from metapl.apps.inputs import check_out, run_folder
from metapl.apps.commands.launch import Lead, check_started, from_first, program, run_together
from metapl.apps.commands.parse import Command, Folder, OnRecipe, Switch, unset
from metapl.apps.process import exit_code
from metapl.apps.accuracies import parse_seeds, summary
from metapl.apps.experiments.experiment import check_runs, check_shares
from metapl.apps.run import RunFolder, stored
from metapl.apps.jobs import Job, Trial, aloud
from metapl.apps.labeling import check_labels_given
from metapl.apps.experiments.settle import settled
from metapl.apps.compare import compare
from metapl.apps.machine.cores import default_threads
from metapl.apps.recipes import RECIPES, Digits, ImageFolders
from metapl.apps.recipes.base import SEEDS, Method, Recipe, Unasked
from metapl.apps.recipes.methods import title
from metapl.apps.recipes.settings import Optimizer
from metapl.apps.words import tell, wrapped
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.runs.fields import AtLeastOne
from metapl.training import Interrupted


@dataclass(frozen=True, kw_only=True)
class Train(OnRecipe):
    """Train a network; with --compare, train by other methods too, and say which is better.

    With --compare, the flags are those of --method, and the other methods take those that they have too.

    Args:
        out: run folder; by default the next free one in runs/.
        resume: continue the run in the folder; it ends bit for bit as without the interruption.
        compare: train by the other methods too, and compare them: of a teacher with feedback, one is the same loop
            without it.
        seeds: with --compare: seeds, such as 0-9 or 0,3,5; by default the recipe's own.
        controls: with --compare: train with altered feedback too, which tells whether it matters which example it is
            of.
        jobs: with --compare: number of runs at a time; by default one for each core, and one on a GPU.
        mesh: processes that train together, started by torchrun.
    """

    own: ClassVar[str | None] = None  # the method that trains it unless another is named; None: the recipe's own
    alone: ClassVar[bool] = False

    method: Unasked[str] = ""
    out: Folder = None
    resume: Switch = False
    compare: Switch = False
    seeds: Annotated[str | None, unset("SEEDS"), SEEDS] = None
    controls: Switch = False
    methods: Unasked[Any] = None
    jobs: Annotated[AtLeastOne | None, unset("N")] = None
    mesh: Mesh = field(default_factory=Mesh)

    @classmethod
    def offered(cls) -> Mapping[str, str]:
        return {name: name for name in cls.kind.known}

    @classmethod
    def compares(cls) -> Sequence[str]:
        return [name for name, method in cls.kind.known.items() if not method.is_noisy_student]

    @classmethod
    def usual(cls, name: str) -> Method:
        return cls.kind.by_name(cls.offered()[name])

    @classmethod
    def given(cls, words: Sequence[str], program: str) -> tuple[type[Command], str]:
        """With the flags of the method that is named, or of the recipe's own."""
        named = [after for word, after in pairwise([*words, ""]) if word == "--method"]
        named += [word.removeprefix("--method=") for word in words if word.startswith("--method=")]
        name = next((name for name in named if name in cls.offered()), cls.own or cls.kind.own)
        settings = cls.usual(name)
        hidden = () if "--compare" in words else settings.hidden(words)
        offered, compares = cls.offered(), cls.compares()
        if len(offered) == 1:
            return cls.flags(settings, words, cls.about(), hidden), program
        one: Any = Literal[tuple(offered)]
        some: Any = Literal[tuple(compares)]
        how = (
            f"how it is trained, one of {', '.join(offered)}. Each has flags of its own, which --help shows beside "
            f"--method: {program} --method mpl --help."
        )
        several = f"with --compare: these methods alone, of {', '.join(compares)}."
        methods: dict[str, Any] = {
            "method": (Annotated[one, unset("METHOD", how, f"(default: {name})")], name),
            "methods": (Annotated[tuple[some, ...] | None, unset("METHOD ...", several)], None),
        }
        return cls.flags(settings, words, cls.about(), hidden, **methods), f"{program} --method {name}"

    @classmethod
    def about(cls) -> str:
        said, _, _ = (cls.kind.__doc__ or "").partition("    Args:")
        _, note, _ = (Train.__doc__ or "").split("\n\n")
        return f"{said.rstrip()}\n\n{note}"

    def check(self) -> None:
        recipe: Recipe = self.recipe
        check_started(self.mesh)
        if not self.resume:
            check_out(self.out or Path("runs"), recipe)
        if self.jobs is not None and self.mesh.size > 1:
            raise MetaplError(
                f"--jobs {self.jobs} has no effect beside --mesh: all processes train one run after another together."
            )
        for name in ("seeds", "methods", "jobs", "controls"):
            if getattr(self, name) and not self.compare:
                raise MetaplError(f"--{name} goes with --compare.")
        if self.controls and self.methods:
            controls = " ".join(recipe.controls(recipe.method.name))
            raise MetaplError(f"--controls has no effect beside --methods: add {controls} to the methods.")
        if self.seeds:
            parse_seeds(self.seeds)
        check_runs(recipe, self.mesh, self.compared() if self.compare else (recipe.method.name,))
        if self.compare and getattr(recipe, "test", "") is None:
            raise MetaplError(
                "--compare reports on pictures that nothing was selected on, and no --test was given; name a folder of "
                "labeled pictures for it."
            )
        check_labels_given(recipe)
        if recipe.complete and not self.compare:
            recipe.method.check_networks(recipe)
        recipe.torch_device()

    def run(self) -> int:
        return run_together(self.mesh, self.recipe.torch_device(), self._lead, self._beside)

    def _lead(self) -> int:
        lead, code = Lead(), 2
        try:
            with run_folder(self.out, self.recipe.name, self.resume) as folder:
                try:
                    if sys.argv[1:2] in (["train"], ["noisy-student"]):  # else another program calls this
                        folder.command = f"{program()} {shlex.join(sys.argv[1:])}"
                    recipe = self._settled(folder, lead)
                    self._check_shares(recipe)
                    (self._compare if self.compare else self._train)(recipe, folder, lead)
                    code = 0
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

        def tried(recipe: Recipe) -> None:
            """Refuse a recipe that the processes cannot train together, networks that cannot be cut included."""
            self._check_shares(recipe)
            if self.mesh.tensor > 1:
                trial = Trial(recipe, recipe.method.name)
                with lead.together(trial):
                    trial.run(self.mesh)

        if not self.recipe.looks:
            return self.recipe.settled()
        torch.set_num_threads(default_threads())
        before: Any = stored(folder)[0] if self.resume and folder.exists else None
        return settled(self.recipe, before if before is not None and before.looks else None, aloud, tried)

    def _check_shares(self, recipe: Recipe) -> None:
        if self.mesh.size > 1:
            check_shares(recipe, self.mesh)

    def _train(self, recipe: Recipe, folder: RunFolder, lead: Lead) -> None:
        out, method = folder.path, recipe.method.name
        job = Job(recipe, method, out, self.resume)
        finished = self.resume and job.finished
        if not finished:
            tell(f"{recipe.name} by {title(method)}, seed {recipe.seed} -> {out}", wrap=True)
        with nullcontext() if finished else lead.together(job):
            result = job.run(progress=True, quiet=False, within=folder, mesh=self.mesh)
        if finished:
            tell(f"{out} is finished already.")
        for line in summary(result):
            tell(wrapped(line))
        tell(f"the networks, the report and the figures are in {out}", wrap=True)
        if method == "mpl":
            tell("whether the teacher's feedback helped, only a comparison tells: --compare --seeds 0-4", wrap=True)

    def _compare(self, recipe: Recipe, folder: RunFolder, lead: Lead) -> None:
        def together(job: Job) -> dict[str, Any]:
            with nullcontext() if job.finished else lead.together(job):
                return job.run(mesh=self.mesh)

        comparison = compare(
            recipe,
            folder,
            self.compared(),
            parse_seeds(self.seeds) if self.seeds else (recipe.seed,),
            resume=self.resume,
            jobs=self.jobs,
            together=together if self.mesh.size > 1 else None,
        )
        tell(f"figures, report and the delivered networks are in {folder.path}")
        tell(f"\n{comparison.caption()}\n\n{comparison.table()}\n")
        for text in (comparison.sentence(), comparison.delivery()):
            tell(wrapped(text))

    def compared(self) -> tuple[str, ...]:
        """The methods that are compared: the recipe's own first, which is delivered where validation cannot tell."""
        recipe, own = self.recipe, self.recipe.method.name
        return self.methods or (own, *recipe.rivals(own), *(recipe.controls(own) if self.controls else ()))


def _say_how_to_go_on(stopped: KeyboardInterrupt, out: Path) -> int:
    """Exit as a process that the signal ended would, after the line that resumes."""
    given = [a for a in sys.argv[1:] if a != "--resume"]
    if not any(a == "--out" or a.startswith("--out=") for a in given):
        given += ["--out", str(out)]
    where = f"{stopped}; " if isinstance(stopped, Interrupted) else "stopped; "
    tell(f"\n{where}go on with:\n  {program()} {shlex.join([*given, '--resume'])}", file=sys.stderr)
    return exit_code(stopped)


@dataclass(frozen=True, kw_only=True)
class NoisyStudent(Train):
    """Train by Noisy Student: a teacher labels, a student learns its labels with noise, and becomes the teacher.

    Round 0 trains the first teacher on the labeled examples. In each later round the last network labels the unlabeled
    examples without noise; those it is confident of are kept, as many of each class; and a new network of the same
    size, or larger, learns from both with augmentation, dropout and stochastic depth. --steps are those of each round,
    and --minutes, of your own pictures, those of all rounds together.
    """

    own: ClassVar[str | None] = "noisy_student"

    compare: Unasked[bool] = False
    seeds: Unasked[str | None] = None
    controls: Unasked[bool] = False
    jobs: Unasked[int | None] = None

    @classmethod
    def offered(cls) -> Mapping[str, str]:
        return {"noisy_student": "noisy_student"}

    @classmethod
    def usual(cls, name: str) -> Method:
        teacher = {"teacher": Optimizer(lr=0.2, momentum=0.9)} if issubclass(cls.kind, Digits) else {}
        return dataclasses.replace(super().usual(name), **teacher)

    @classmethod
    def about(cls) -> str:
        return NoisyStudent.__doc__ or ""


Schedule = Literal["cosine", "constant", "exponential"]


@dataclass(frozen=True, kw_only=True)
class _Digits(Digits):
    steps: int = 1000
    hidden: tuple[int, ...] = (64, 64)
    schedule: Schedule = "exponential"


@dataclass(frozen=True, kw_only=True)
class _Images(ImageFolders):
    schedule: Schedule = "exponential"


COMMANDS = Train.on(*RECIPES.values())
NOISY_STUDENT = NoisyStudent.on(_Digits, _Images)
