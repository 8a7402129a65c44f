"""``metapl train images|digits|noisy`` and ``metapl noisy-student images|digits``: what is asked for, and the going."""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

import torch
import tyro

from metapl.apps import digits, images, noisy_labels, noisy_student
from metapl.apps.compare import compare
from metapl.apps.comparison import parse_seeds
from metapl.apps.digits import Digits
from metapl.apps.images import Images
from metapl.apps.inputs import Folder, check_out, run_folder
from metapl.apps.label import check_labels_given
from metapl.apps.launch import Processes, check_started, from_first, joined, program
from metapl.apps.look import settled
from metapl.apps.machine.environment import default_threads
from metapl.apps.methods import ReducedMpl, beside
from metapl.apps.noisy_labels import Noisy
from metapl.apps.noisy_student import DigitsOfRounds, ImagesOfRounds, NoisyStudent
from metapl.apps.process import exit_code
from metapl.apps.report import linear_baseline, summary
from metapl.apps.run import RunFolder, stored_result
from metapl.apps.settings import Flat, Switch, unset
from metapl.apps.train import check_shares, describe, device, train
from metapl.apps.words import table, tell, wrapped
from metapl.distributed import Mesh
from metapl.errors import MetaplError, few
from metapl.runs.fields import Range
from metapl.training import Interrupted

OfImages: TypeAlias = Any
OfDigits: TypeAlias = Any
OfNoisy: TypeAlias = Any
if not TYPE_CHECKING:
    OfImages, OfDigits, OfNoisy = (
        Flat[tyro.extras.subcommand_type_from_defaults(of.METHODS, prefix_names=False)]
        for of in (images, digits, noisy_labels)
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run goes.

    Args:
        out: run folder; the next free one in runs/.
        resume: go on with the run that is there.
    """

    out: Folder = None
    resume: Switch = False


@dataclass(frozen=True, kw_only=True)
class Started:
    """The processes that torchrun has started, which train together.

    Args:
        replicate: processes with a copy of the weights.
        shard: processes that share one (torchrun).
    """

    replicate: Annotated[int, tyro.conf.arg(name="mesh.replicate")] = 1
    shard: Annotated[int, tyro.conf.arg(name="mesh.shard")] = 1


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """Whether and how methods are compared.

    Args:
        compare: train by other methods too, and compare.
        seeds: with --compare, such as 0-4.
        methods: with --compare: these alone.
        jobs: with --compare: runs at a time.
    """

    compare: Switch = False
    seeds: Annotated[str | None, unset("SEEDS")] = None
    methods: Annotated[str | None, unset("NAME ...")] = None
    jobs: Annotated[Annotated[int, Range(1)] | None, unset()] = None


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training by a method."""

    config: Any
    place: Flat[Place] = field(default_factory=Place)
    method: Any

    def run(self) -> int:
        return go(self.config, self.method, self.place)


@dataclass(frozen=True, kw_only=True)
class TrainOrCompare(Train):
    """A training by one of the METHODS ``of`` a module, or by several."""

    comparing: Flat[Comparing] = field(default_factory=Comparing)

    of: ClassVar[Any]

    def run(self) -> int:
        return go(self.config, self.method, self.place, self.comparing, self.of, getattr(self, "mesh", Started()))


@dataclass(frozen=True, kw_only=True)
class TrainImages(TrainOrCompare):
    __doc__ = Images.__doc__

    config: Flat[Images]
    mesh: Flat[Started] = field(default_factory=Started)
    method: OfImages = images.METHODS["uda"]
    of: ClassVar[Any] = images


@dataclass(frozen=True, kw_only=True)
class TrainDigits(TrainOrCompare):
    __doc__ = Digits.__doc__

    config: Flat[Digits] = field(default_factory=Digits)
    mesh: Flat[Started] = field(default_factory=Started)
    method: OfDigits = digits.METHODS["mpl"]
    of: ClassVar[Any] = digits


@dataclass(frozen=True, kw_only=True)
class TrainNoisy(TrainOrCompare):
    __doc__ = Noisy.__doc__

    config: Flat[Noisy]
    method: OfNoisy = noisy_labels.METHODS["example_weights"]
    of: ClassVar[Any] = noisy_labels


@dataclass(frozen=True, kw_only=True)
class RoundsOfImages(Train):
    """Train by Noisy Student: a teacher labels, a student learns its labels with noise, and becomes the teacher.

    Round 0 trains the first teacher on the labeled examples. In each later round the last network labels the unlabeled
    examples without noise; those it is confident of are kept, as many of each class; and a new network of the same
    size, or larger, learns from both with augmentation, dropout and stochastic depth. --steps are those of each round,
    and --minutes, of your own pictures, those of all rounds together.
    """

    config: Flat[ImagesOfRounds]
    method: Flat[NoisyStudent] = field(default_factory=NoisyStudent)


@dataclass(frozen=True, kw_only=True)
class RoundsOfDigits(Train):
    __doc__ = RoundsOfImages.__doc__

    config: Flat[DigitsOfRounds] = field(default_factory=DigitsOfRounds)
    method: Flat[NoisyStudent] = field(default_factory=NoisyStudent)


def go(
    config: Any,
    method: Any,
    where: Place,
    comparing: Comparing | None = None,
    of: Any = None,
    started: Started = Started(),  # frozen
) -> int:
    """Train in a run folder, or compare methods ``of`` a module: what is wrong is refused before anything is written.

    Returns: the exit code.
    """
    # 1. What can be refused by the words alone.
    mesh, fitting = Mesh(replicate=started.replicate, shard=started.shard), config.fitting
    check_started(mesh)
    place = device(fitting.device)
    if not where.resume:
        check_out(where.out or Path("runs"), {name: getattr(config, name) for name in config.places})
    compares = comparing is not None and comparing.compare
    seeds: tuple[int, ...] = (fitting.seed,)
    names = [method.name]
    if comparing is not None:
        for name in ("seeds", "methods", "jobs"):
            if getattr(comparing, name) and not compares:
                raise MetaplError(f"--{name} goes with --compare.")
        seeds = parse_seeds(comparing.seeds) if comparing.seeds else seeds
        # The own method is the first, which is delivered where validation cannot tell.
        names = [*dict.fromkeys(comparing.methods.split(",") if comparing.methods else (method.name, *of.COMPARED))]
        if unknown := [name for name in names if name not in of.METHODS]:
            raise MetaplError(f"--methods {few(unknown)}: expected some of {', '.join(of.METHODS)}.")
    if compares and mesh.size > 1:
        raise MetaplError("--compare runs methods side by side, in one process each; leave --mesh out.")
    if compares and config.places and config.test is None:
        raise MetaplError("--compare reports on pictures that nothing was selected on: expected --test beside it.")
    check_shares(config, method, mesh)
    if isinstance(method, ReducedMpl):
        check_labels_given(config, method)
    with joined(mesh, place) as processes:
        if not processes.first:
            return _beside(processes)
        others: int | None = 2  # what the other processes leave with, unless they are told to train
        try:
            with run_folder(where.out, config.name, where.resume) as folder:
                if sys.argv[1:2] in (["train"], ["noisy-student"]):  # else another program calls this
                    folder.command = f"{program()} {shlex.join(sys.argv[1:])}"
                try:
                    # 2. Settings that were left open.
                    before = folder.recipe()["fields"] if where.resume and folder.exists else None
                    torch.set_num_threads(config.threads or default_threads())
                    if config.places:
                        config, method = settled(config, method, lambda text: tell(wrapped(text)), before)
                    else:
                        method = method.scheduled(fitting.steps)
                    if isinstance(method, NoisyStudent):
                        noisy_student.configs_of(config, method)  # refused before anything is written
                    # 3. Several methods, or one.
                    if comparing is not None and compares:
                        like = {name: beside(of.METHODS[name], method, of.METHODS[method.name]) for name in names}
                        chosen = {name: one.scheduled(config.fitting.steps) for name, one in like.items()}
                        found = compare(config, chosen, seeds, folder, resume=where.resume, jobs=comparing.jobs)
                        tell(f"figures, report and the delivered networks are in {folder.path}")
                        tell(f"\n{wrapped(found.caption())}\n\n{table(found.rows(), left=4)}\n")
                        for text in (found.sentence(), found.delivery(), *linear_baseline(stored_result(folder))):
                            tell(wrapped(text))
                        return 0
                    torch.set_num_threads(config.threads or folder.threads())
                    if not folder.ended:
                        others = None
                        from_first((config, method, folder.threads()))
                    with folder.claimed(describe(config, method), resume=where.resume):
                        if folder.ended:
                            tell(f"{folder.path} is finished already.")
                            result = stored_result(folder)
                        else:
                            tell(f"{config.name} by {method.title}, seed {fitting.seed} -> {folder.path}")
                            own: Any = {"progress": True, "say": tell, "processes": processes}
                            result = train(config, method, folder, resume=where.resume, **own)
                    for line in summary(result):
                        tell(wrapped(line))
                    tell(f"the networks, the report and the figures are in {folder.path}")
                    if method.name == "mpl":
                        tell("whether the teacher's feedback helped, only a comparison tells: --compare --seeds 0-4")
                    others = None if others is None else 0
                except KeyboardInterrupt as stopped:
                    # Exit as a process that the signal ended would, after the line that resumes.
                    given = [word for word in sys.argv[1:] if word != "--resume"]
                    if not any(word == "--out" or word.startswith("--out=") for word in given):
                        given += ["--out", str(folder.path)]
                    at = f"{stopped}; " if isinstance(stopped, Interrupted) else "stopped; "
                    tell(f"\n{at}go on with:\n  {program()} {shlex.join([*given, '--resume'])}", file=sys.stderr)
                    return exit_code(stopped)
        finally:
            if others is not None:
                from_first(others)
    return 0


def _beside(processes: Processes) -> int:
    """The share of another process than the first, which shows nothing and whose folder is not kept."""
    given = from_first(None)
    if isinstance(given, int):
        return given
    config, method, threads = given
    torch.set_num_threads(config.threads or threads)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run")
        try:
            with folder.claimed(describe(config, method), resume=False):
                train(config, method, folder, processes=processes)
        except KeyboardInterrupt as stopped:
            return exit_code(stopped)
    return 0
