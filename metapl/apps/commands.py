"""``metapl train images|digits|noisy`` and ``metapl noisy-student images|digits``:
their flags, and the runs that they start."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

import torch
import tyro

from metapl.apps import digits, images, noisy_labels, noisy_student
from metapl.apps.digits import Digits
from metapl.apps.images import Images
from metapl.apps.inputs import Folder, check_out, open_run_folder
from metapl.apps.labeling import check_labels_given
from metapl.apps.launch import from_first, joined, program
from metapl.apps.look import choose_settings
from metapl.apps.machine import default_threads
from metapl.apps.methods import ReducedMpl, with_settings_of
from metapl.apps.methods_over_seeds import parse_seeds
from metapl.apps.noisy_labels import Noisy
from metapl.apps.noisy_student import DigitsOfRounds, ImagesOfRounds, NoisyStudent
from metapl.apps.printing import as_flags, exit_code, tell, wrapped
from metapl.apps.progress import is_watched
from metapl.apps.report import summary
from metapl.apps.run_folder import RunFolder, stored_result
from metapl.apps.settings import Flat, Switch, unset
from metapl.apps.several_runs import train_and_compare
from metapl.apps.train import check_shares, describe, device, train
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
class Comparing(Place):
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
class Started(Comparing):
    """The processes that torchrun has started, which train together.

    Args:
        replicate: processes with a copy of the weights.
        shard: processes that share one (torchrun).
    """

    replicate: Annotated[int, tyro.conf.arg(name="mesh.replicate")] = 1
    shard: Annotated[int, tyro.conf.arg(name="mesh.shard")] = 1


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training of ``config`` by a method, or a comparison of the METHODS ``of`` a module."""

    config: Any
    options: Any
    method: Any
    of: ClassVar[Any] = None

    def run(self) -> int:
        """What is wrong is refused before anything is written."""
        config, method, options = self.config, self.method, self.options
        # 1. What can be refused by the words alone.
        mesh = Mesh(replicate=getattr(options, "replicate", 1), shard=getattr(options, "shard", 1))
        if mesh.size != (count := int(os.environ.get("WORLD_SIZE", "1"))):
            raise MetaplError(
                f"{count} process{'es were' if count > 1 else ' was'} started for a mesh of "
                f"{mesh.size}; expected as many: torchrun --nproc-per-node=N -m metapl ... "
                "--mesh.replicate N, or --mesh.shard N for shared weights."
            )
        place = device(config.fitting.device)
        if not options.resume:
            check_out(
                options.out or Path("runs"), {name: getattr(config, name) for name in config.places}
            )
        compares, names = getattr(options, "compare", False), [method.name]
        seeds: tuple[int, ...] = (config.fitting.seed,)
        if self.of is not None:
            for name in ("seeds", "methods", "jobs"):
                if getattr(options, name) and not compares:
                    raise MetaplError(f"--{name} goes with --compare.")
            seeds = parse_seeds(options.seeds) if options.seeds else seeds
            # The own method is the first, which is delivered where validation cannot tell.
            named = (
                options.methods.split(",") if options.methods else (method.name, *self.of.COMPARED)
            )
            names = [*dict.fromkeys(named)]
            if unknown := [name for name in names if name not in self.of.METHODS]:
                raise MetaplError(
                    f"--methods {few(unknown)}: expected some of {', '.join(self.of.METHODS)}."
                )
        if compares and mesh.size > 1:
            raise MetaplError(
                "--compare runs methods side by side, in one process each; leave --mesh out."
            )
        if compares and config.places and config.test is None:
            raise MetaplError(
                "--compare reports on pictures that nothing was selected on: expected --test "
                "beside it."
            )
        check_shares(config, method, mesh)
        if isinstance(method, ReducedMpl):
            check_labels_given(config, method)
        if isinstance(method, NoisyStudent):
            noisy_student.check_selection(config, method)
        with joined(mesh, place) as processes:
            if not processes.first:  # it shows nothing, and its folder is not kept
                given = from_first(None)
                if isinstance(given, int):
                    return given
                config, method, threads = given
                torch.set_num_threads(config.threads or threads)
                with tempfile.TemporaryDirectory() as kept:
                    folder = RunFolder(Path(kept) / "run")
                    with folder.claimed(describe(config, method), resume=False):
                        train(config, method, folder, processes=processes)
                return 0

            def say(text: str) -> None:
                tell(wrapped(as_flags(text)))

            path: Path | None = options.out
            others: int | None = (
                2  # what the other processes leave with, unless they are told to train
            )
            try:
                with open_run_folder(options.out, config.name, options.resume) as folder:
                    path = folder.path
                    if sys.argv[1:2] in (
                        ["train"],
                        ["noisy-student"],
                    ):  # else another program calls this
                        folder.command = f"{program()} {shlex.join(sys.argv[1:])}"
                    # 2. Settings that were left open.
                    before = folder.recipe()["fields"] if options.resume and folder.exists else None
                    torch.set_num_threads(config.threads or default_threads())
                    if config.places:
                        config, method = choose_settings(config, method, say, before)
                    else:
                        method = method.scheduled(config.fitting.steps)
                    if isinstance(method, NoisyStudent):
                        noisy_student.configs_of(
                            config, method
                        )  # refused before anything is written
                    # 3. Several methods, or one.
                    if compares:
                        usual = self.of.METHODS
                        like = {
                            name: with_settings_of(usual[name], method, usual[method.name])
                            for name in names
                        }
                        chosen = {
                            name: one.scheduled(config.fitting.steps) for name, one in like.items()
                        }
                        train_and_compare(
                            config, chosen, seeds, folder, resume=options.resume, jobs=options.jobs
                        )
                        return 0
                    torch.set_num_threads(config.threads or folder.threads())
                    if not folder.ended:
                        others = None
                        from_first((config, method, folder.threads()))
                    with folder.claimed(describe(config, method), resume=options.resume):
                        if folder.ended:
                            tell(f"{folder.path} is finished already.")
                            result, others = stored_result(folder), 0
                        else:
                            tell(
                                f"{config.name} by {method.title}, seed {config.fitting.seed} -> "
                                f"{folder.path}"
                            )
                            result = train(
                                config,
                                method,
                                folder,
                                resume=options.resume,
                                progress=True,
                                say=say,
                                say_progress=None if is_watched() else say,
                                processes=processes,
                            )
                    for line in summary(result):
                        say(line)
                    say(f"the networks, the report and the figures are in {folder.path}")
                    if method.name == "mpl":
                        tell(
                            "whether the teacher's feedback helped, only a comparison tells: "
                            "--compare --seeds 0-4"
                        )
            except KeyboardInterrupt as stopped:
                # Exit as a process that the signal ended would, after the line that resumes.
                if path is None:
                    raise
                words = [word for word in sys.argv[1:] if word != "--resume"]
                if not any(word == "--out" or word.startswith("--out=") for word in words):
                    words += ["--out", str(path)]
                at = stopped if isinstance(stopped, Interrupted) else "stopped"
                tell(
                    f"\n{at}; go on with:\n  {program()} {shlex.join([*words, '--resume'])}",
                    file=sys.stderr,
                )
                return exit_code(stopped)
            finally:
                if others is not None:
                    from_first(others)
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainImages(Train):
    __doc__ = Images.__doc__

    config: Flat[Images]
    options: Flat[Started] = field(default_factory=Started)
    method: OfImages = images.METHODS["uda"]
    of: ClassVar[Any] = images


@dataclass(frozen=True, kw_only=True)
class TrainDigits(Train):
    __doc__ = Digits.__doc__

    config: Flat[Digits] = field(default_factory=Digits)
    options: Flat[Started] = field(default_factory=Started)
    method: OfDigits = digits.METHODS["mpl"]
    of: ClassVar[Any] = digits


@dataclass(frozen=True, kw_only=True)
class TrainNoisy(Train):
    __doc__ = Noisy.__doc__

    config: Flat[Noisy]
    options: Flat[Comparing] = field(default_factory=Comparing)
    method: OfNoisy = noisy_labels.METHODS["example_weights"]
    of: ClassVar[Any] = noisy_labels


@dataclass(frozen=True, kw_only=True)
class RoundsOfImages(Train):
    """Train by Noisy Student: a teacher labels, a student learns its labels with noise, and becomes the teacher.

    Round 0 trains the first teacher on the labeled examples. In each later round the last network
    labels the unlabeled examples without noise; those it is confident of are kept, as many of each
    class; and a new network of the same size, or larger, learns from both with augmentation,
    dropout and stochastic depth. --steps are those of each round, and --minutes, of your own
    pictures, those of all rounds together.
    """

    config: Flat[ImagesOfRounds]
    options: Flat[Place] = field(default_factory=Place)
    method: Flat[NoisyStudent] = field(default_factory=NoisyStudent)


@dataclass(frozen=True, kw_only=True)
class RoundsOfDigits(Train):
    __doc__ = RoundsOfImages.__doc__

    config: Flat[DigitsOfRounds] = field(default_factory=DigitsOfRounds)
    options: Flat[Place] = field(default_factory=Place)
    method: Flat[NoisyStudent] = field(default_factory=NoisyStudent)
