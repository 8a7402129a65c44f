"""The commands that train: ``metapl train`` and ``metapl noisy-student``, their flags and runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    get_type_hints,
)

import torch
import tyro

from metapl.apps import digits, images
from metapl.apps.digits import Digits
from metapl.apps.images import Images
from metapl.apps.inputs import check_out, open_run_folder, run_folder, runs_of_comparison
from metapl.apps.look import MINUTES, choose_settings
from metapl.apps.methods.base import Method, TrainingConfig
from metapl.apps.methods.noisy_student import NoisyStudent
from metapl.apps.pace import Timetable
from metapl.apps.printing import as_flags, tell, wrapped
from metapl.apps.progress import is_watched
from metapl.apps.report import PAGE
from metapl.apps.rounds import METHODS, DigitsOfRounds, ImagesOfRounds
from metapl.apps.run_summary import summary
from metapl.apps.settings import flag_values, with_settings_of
from metapl.apps.several_runs import train_and_compare
from metapl.apps.stored_recipe import StoredRecipe
from metapl.apps.train import check_shares, describe, train
from metapl.data.seeds import parse_seeds
from metapl.distributed import Mesh
from metapl.errors import MetaplError, few, require_packages
from metapl.machine import default_threads, device
from metapl.processes import Processes, from_first, joined
from metapl.run_folder import RunFolder, stored_result
from metapl.runs.fields import Range, check_fields
from metapl.runs.terminal import exit_code, spoken_time
from metapl.training import Interrupted
from metapl.words import did_you_mean

# The flag --method of each command, which takes the names of its methods. The type checker cannot
# follow a type that is made while the program runs.
MethodOfImages: TypeAlias = str
MethodOfDigits: TypeAlias = str
if not TYPE_CHECKING:

    def _one_of(methods: dict[str, Method], usual: str = "") -> Any:
        text = "how the network is trained. --method NAME --help lists the flags of a method."
        described = tyro.conf.arg(name="method", help=f"{text}{usual}")
        return Annotated[Literal[tuple(methods)], described]

    MethodOfImages = _one_of(
        images.METHODS,
        " By default it is uda. It is supervised without --unlabeled, and where more than 1,000 "
        "labeled pictures are learned fewer than 40 times.",
    )
    MethodOfDigits = _one_of(digits.METHODS)

# What a command line begins with that starts a training.
TRAINING_COMMANDS = ("train", "noisy-student")

# Labels alone are ahead of UDA where more labels than these are learned fewer times than this: on
# CIFAR-10 by 4.0 points after 8 times, 0.5 after 45, and behind by 1.1 after 180.
MANY_LABELS = 1_000
LEAST_TIMES = 40

# Labeled pictures in a step, and those that are learned in a second.
USUAL_BATCH = 64
PICTURES_A_SECOND = {"cpu": 200, "cuda": 5_000}

# The exit code of the other processes where the first one fails before it trains.
NOT_STARTED = 2


# -------------------------------------------------------------------------------- flags of the runs


@dataclass(frozen=True, kw_only=True)
class Place:
    """The flags that say where a run goes.

    Args:
        out: folder that the run is written to. By default it is the next free one in runs/.
        resume: go on with a run that was stopped, in the folder of --out or the last one in runs/,
            by its own settings.
        recipe: repeat the run that left this recipe.json. Other flags override the file.
    """

    out: Path | None = None
    resume: bool = False
    recipe: Annotated[Path | None, tyro.conf.arg(name="config")] = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Started(Place):
    """The flags that compare methods, and those for processes that torchrun has started.

    Args:
        compare: train by other methods too, and compare what they reach.
        seeds: seeds with which --compare trains by each method, such as 0-4 or 0,3,5.
        methods: methods by which --compare trains. By default it takes some usual ones.
        jobs: number of trainings that --compare runs at a time. By default it runs one per core.
        replicate: number of groups of processes that torchrun has started. Each group has a copy of
            the weights.
        shard: number of processes in a group. They share one copy of the weights.
    """

    compare: bool = False
    seeds: Annotated[str | None, tyro.conf.arg(metavar="SEEDS")] = None
    methods: tuple[str, ...] | None = None
    jobs: Annotated[int, Range(1)] | None = None
    replicate: Annotated[int, tyro.conf.arg(name="mesh.replicate")] = 1
    shard: Annotated[int, tyro.conf.arg(name="mesh.shard")] = 1


@dataclass(frozen=True)
class ComparisonPlan:
    """The methods and seeds that a comparison runs."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int | None

    def first_run(self, folder: RunFolder) -> RunFolder:
        """Return the folder of the first run, whose settings all runs have."""
        return RunFolder(folder.path / self.names[0] / f"seed-{self.seeds[0]}")


# ---------------------------------------------------------------------------------- what they start


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training by a method, or a comparison of several methods.

    Args:
        config: what is trained on, and how long.
        options: where the run goes, and whether methods are compared.
    """

    config: TrainingConfig
    options: Annotated[Place, tyro.conf.arg(name="run")] = field(default_factory=Place)
    method_name: tyro.conf.Suppress[str]
    method: Method

    # What --method names, and what --compare compares unless other methods are named.
    methods: ClassVar[Mapping[str, Method]]
    compared: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def default_for(cls, words: Sequence[str]) -> Self:
        """Return the command with the defaults of its flags, which depend on some of them.

        Args:
            words: the flags that were typed. ``--method`` says whose settings are flags;
                ``--config`` names a recipe with the values, and ``--resume`` a run that has one.
        """
        asked = asked_among(words)
        methods = cls.methods
        # tyro refuses a method that there is not.
        name = asked.method if asked.method in methods else None
        if asked.method is None:
            name = cls.usual_method(asked)
        # What is missing has the default of its field.
        default: Self = tyro.MISSING_NONPROP
        types = get_type_hints(cls)
        recipe = None
        if asked.config is not None:
            recipe = StoredRecipe.read(asked.config)
            refuse_other_command(recipe, cls, f"repeat it by {{}} --config {quoted(asked.config)}")
        elif asked.resume and not {"-h", "--help"} & {*words}:
            place = asked.out or run_folder(types["config"].name, resume=True)
            if not asked.compare:
                recipe = StoredRecipe.of_run(place)
            if recipe is not None:
                refuse_other_command(
                    recipe, cls, f"go on with it by {{}} --resume --out {quoted(place)}"
                )
                recipe.refuse_other_steps(asked.steps)
            elif not asked.compare and runs_of_comparison(place):
                raise MetaplError(resume_of_comparison(place))
            elif types["config"].places and asked.labeled is None:
                # It would begin where its folders were named.
                raise MetaplError(nothing_to_resume(place))
        if recipe is None:
            if name is not None:
                config = tyro.MISSING_NONPROP
                default = cls(config=config, method_name=name, method=methods[name])
            return default
        config, method = recipe.settings(types["config"], methods)
        if name is None:
            name = method.name
        if name != method.name:
            method = with_settings_of(methods[name], method, methods[method.name])
        return cls(config=config, method_name=name, method=method)

    @classmethod
    def usual_method(cls, asked: argparse.Namespace) -> str | None:
        """Return the method that other flags ask for; None: that of the field."""
        return None

    @cached_property
    def recipe(self) -> StoredRecipe | None:
        """Return the recipe of the run that is repeated; None: of none."""
        if self.options.recipe is None:
            return None
        return StoredRecipe.read(self.options.recipe)

    def run(self) -> int:
        """Train or compare, and return the exit code; what is wrong is refused first."""
        mesh = started_mesh(self.options)
        place = device(self.config.fitting.device)
        folders = {name: getattr(self.config, name) for name in self.config.places}
        if self.options.resume:
            refuse_moved(folders)
        else:
            check_out(self.options.out or Path("runs"), folders)
        comparison = self.plan_comparison(mesh)
        check_shares(self.config, mesh)
        self.refuse_missing_packages(comparison)
        self.method.check(self.config)
        with joined(mesh, place) as processes:
            if processes.first:
                return self.run_first(processes, comparison)
            return train_beside_first(processes)

    def plan_comparison(self, mesh: Mesh) -> ComparisonPlan | None:
        """Return the methods and seeds to compare, or None; refuse flags that conflict."""
        options = self.options
        if not isinstance(options, Started):
            return None
        for name in ("seeds", "methods", "jobs"):
            if getattr(options, name) is not None and not options.compare:
                raise MetaplError(f"--{name} goes with --compare.")
        seeds: tuple[int, ...] = (self.config.fitting.seed,)
        if options.seeds:
            seeds = parse_seeds(options.seeds)
        names = (self.method.name, *self.compared)
        if options.methods is not None:
            # Commas may stand between them too.
            listed = ",".join(options.methods).split(",")
            names = tuple(name for name in listed if name)
        names = tuple(dict.fromkeys(names))
        expected = f"some of {', '.join(self.methods)}."
        if not names:
            raise MetaplError(f"--methods was given without a value; expected {expected}")
        unknown = [name for name in names if name not in self.methods]
        if unknown:
            meant = did_you_mean(unknown[0], [*self.methods]) or "."
            raise MetaplError(f"--methods {few(unknown)}{meant} Expected {expected}")
        if not options.compare:
            return None
        if mesh.size > 1:
            raise MetaplError(
                "--compare runs methods side by side, in one process each; leave --mesh out."
            )
        if "test" not in getattr(self.config, "parts", ("test",)):
            raise MetaplError(
                "--compare reports on pictures that nothing was selected on: expected --test DIR "
                "or --test-fraction 0.2 beside it."
            )
        return ComparisonPlan(names=names, seeds=seeds, jobs=options.jobs)

    def refuse_missing_packages(self, comparison: ComparisonPlan | None) -> None:
        """Refuse to begin without a package that a later phase, or the report, needs."""
        names = (self.method.name,) if comparison is None else comparison.names
        packages = ["matplotlib"]
        for name in names:
            packages += self.methods[name].packages
        require_packages("a training", *packages)

    def run_first(self, processes: Processes, comparison: ComparisonPlan | None) -> int:
        """Run in the first process, which shows and writes everything, and return the exit code."""
        begun = time.monotonic()
        others = Others()
        path: Path | None = self.options.out
        try:
            with open_run_folder(
                self.options.out,
                self.config.name,
                resume=self.options.resume,
                holds_runs=comparison is not None,
            ) as folder:
                path = folder.path
                first = folder if comparison is None else comparison.first_run(folder)
                was_ended = comparison is None and folder.ended
                if self.options.resume and not first.exists:
                    say(f"there is no run in {path} to resume: it begins")
                # Another program that calls this is not told how to start it again.
                if sys.argv[1:] and sys.argv[1] in TRAINING_COMMANDS:
                    folder.command = f"{program()} {shlex.join(sys.argv[1:])}"
                timetable = Timetable()
                config, method = self.choose_open_settings(first, timetable)
                check_shares(config, processes.mesh)
                if comparison is None:
                    self.train_one(
                        config,
                        method,
                        folder,
                        processes=processes,
                        others=others,
                        timetable=timetable,
                    )
                else:
                    train_and_compare(
                        config,
                        self.methods_like(method, comparison.names, steps=config.fitting.steps),
                        comparison.seeds,
                        folder,
                        resume=self.options.resume,
                        jobs=comparison.jobs,
                    )
                seconds = None if was_ended else time.monotonic() - begun
                tell_next(first.path, seconds)
        except KeyboardInterrupt as stopped:
            # Exit as a process that the signal ended would, after the line that resumes.
            if path is None:
                raise
            tell_how_to_resume(stopped, path)
            return exit_code(stopped)
        finally:
            others.leave(NOT_STARTED)
        return 0

    def choose_open_settings(
        self, folder: RunFolder, timetable: Timetable
    ) -> tuple[TrainingConfig, Method]:
        """Return the settings with a value for each that was left open: those of a resumed run."""
        config = self.config
        method = self.method
        recipe = self.recipe
        if recipe is not None:
            config, method = recipe.with_seen_again(config, method)
        stored = None
        if self.options.resume and folder.exists:
            stored = folder.recipe()["fields"]
        if recipe is not None and recipe.note():
            say(f"note: {recipe.note()}")
        torch.set_num_threads(config.threads or self.usual_threads())
        if isinstance(config, Images):
            config, method = choose_settings(config, method, say, stored, timetable=timetable)
            if recipe is not None:
                recipe.check_weights(config.pictures)
        else:
            method = method.scheduled(config.fitting.chosen_steps)
        method.check_chosen(config)
        return config, method

    def usual_threads(self) -> int:
        """Return the threads of the linear algebra of a new run: those of the run it repeats."""
        repeated_threads = None if self.recipe is None else self.recipe.threads
        return repeated_threads or default_threads()

    def methods_like(
        self, method: Method, names: tuple[str, ...], steps: int | None
    ) -> dict[str, Method]:
        """Return the methods to compare, with the settings in which the run's own is not usual."""
        assert steps is not None, "the settings were chosen"
        usual = self.methods
        compared = {}
        for name in names:
            like_own = with_settings_of(usual[name], method, usual[method.name])
            compared[name] = like_own.scheduled(steps)
        return compared

    def train_one(
        self,
        config: TrainingConfig,
        method: Method,
        folder: RunFolder,
        *,
        processes: Processes,
        others: Others,
        timetable: Timetable,
    ) -> None:
        """Train by one method, unless the run in the folder has ended, and say what it reached."""
        threads = folder.threads(usual=self.usual_threads())
        torch.set_num_threads(config.threads or threads)
        if not folder.ended:
            others.train(config, method, threads=threads)
        with folder.claimed(describe(config, method), resume=self.options.resume):
            if folder.ended:
                refuse_other_places(config, folder)
                tell(f"{folder.path} is finished already.")
                result = stored_result(folder)
                others.leave(0)
            else:
                seed = config.fitting.seed
                steps = method.planned(config.fitting)
                say(f"{config.name} by {method.title}: {steps}, seed {seed} -> {folder.path}")
                result = train(
                    config,
                    method,
                    folder,
                    resume=self.options.resume,
                    progress=True,
                    say=say,
                    say_progress=None if is_watched() else say,
                    processes=processes,
                    timetable=timetable,
                )
        for line in summary(result):
            say(line)
        if method.advice:
            say(method.advice)


def asked_among(words: Sequence[str]) -> argparse.Namespace:
    """Return the flags of a training on which the defaults of the others depend.

    Nothing is refused here: tyro reads the same flags again.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--method")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps")
    parser.add_argument("--minutes")
    parser.add_argument("--device")
    parser.add_argument("--labeled")
    parser.add_argument("--labeled-batch")
    parser.add_argument("--unlabeled")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compare", action="store_true")
    try:
        asked, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:
        # One of them has no value.
        return argparse.Namespace(
            method=None, config=None, resume=False, labeled=None, compare=False
        )
    return asked


def learns_seldom(asked: argparse.Namespace) -> bool:
    """Return whether many labeled pictures are learned so few times that UDA has not begun to pay.

    Minutes count as what a usual step takes.
    """
    try:
        if asked.steps is not None:
            learned = int(asked.steps) * int(asked.labeled_batch or USUAL_BATCH)
        else:
            place = device(asked.device or "auto").type
            learned = round(60 * float(asked.minutes or MINUTES) * PICTURES_A_SECOND[place])
    except (ValueError, OverflowError):
        # What is no number is refused where the flags are read.
        return False
    most = max(MANY_LABELS, learned // LEAST_TIMES)
    files = (path for path in Path(asked.labeled).expanduser().rglob("*") if path.is_file())
    return sum(1 for _ in islice(files, most + 1)) > most


def refuse_other_command(recipe: StoredRecipe, kind: type[Train], way_out: str) -> None:
    """Refuse a recipe that another command has made, by the name of that command.

    Args:
        recipe: which is repeated or gone on with.
        kind: of the command that was typed.
        way_out: what to type, with ``{}`` in the place of the command.
    """
    config_kind = get_type_hints(kind)["config"]
    own_command = command_of(config_kind.name, [*kind.methods][0])
    command = command_of(recipe.name, recipe.method)
    if command is not None and command != own_command:
        raise MetaplError(
            f"{recipe.path} is of metapl {command}; {way_out.format('metapl ' + command)}"
        )


def quoted(path: Path) -> str:
    """Return a path as one word of a command line, which is no flag.

    >>> quoted(Path("-q")), quoted(Path("a run"))
    ('./-q', "'a run'")
    """
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def command_of(name: str, method: str) -> str | None:
    """Return the words of the command that trains on such data by a method, or None."""
    if name in ("digits", "images") and method in METHODS:
        return f"noisy-student {name}"
    methods = {"digits": digits.METHODS, "images": images.METHODS}.get(name, {})
    return f"train {name}" if method in methods else None


def refuse_moved(folders: Mapping[str, str | None]) -> None:
    """Refuse folders of a run that are not where they were, and say how they are named anew."""
    for name, folder in folders.items():
        if folder is not None and not Path(folder).expanduser().exists():
            raise MetaplError(
                f"{folder}, the {name} pictures of the run, is not there; put it back, or name the "
                f"folder that they are in now: --{name} DIR --resume."
            )


def resume_of_comparison(place: Path) -> str:
    """Return what to type to go on with the runs of a comparison."""
    runs = runs_of_comparison(place)
    command = RunFolder(runs[0]).description().get("command")
    started = f"by {command}" if command else "by --compare and all that it was started with"
    if "--resume" not in started.split():
        started += " --resume"
    return f"{place} has the runs of a comparison, {few(runs)}; go on with it {started}"


def nothing_to_resume(place: Path) -> str:
    """Return why there is nothing to go on with in a folder, and what to type."""
    if runs_of_comparison(place):
        return resume_of_comparison(place)
    if RunFolder(place).exists:
        return f"{place} has one run, and no comparison; leave --compare out to go on with it."
    places = sorted(place.glob("*/recipe.json")) or sorted(place.parent.glob("*/recipe.json"))
    others = ""
    if places:
        others = f", but in {few(recipe.parent for recipe in places)}"
    return (
        f"there is no run in {place} to resume{others}; expected --out with the folder of a run, "
        "or --labeled to begin one."
    )


def started_mesh(options: Place) -> Mesh:
    """Return the mesh that the flags ask for; refuse one of another number of processes."""
    mesh = Mesh()
    if isinstance(options, Started):
        mesh = Mesh(replicate=options.replicate, shard=options.shard)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if mesh.size != count:
        started = "1 process was" if count == 1 else f"{count} processes were"
        raise MetaplError(
            f"{started} started for a mesh of {mesh.size}; expected as many: "
            "torchrun --nproc-per-node=N -m metapl ... "
            "--mesh.replicate N, or --mesh.shard N for shared weights."
        )
    return mesh


@dataclass
class Others:
    """The processes beside the first one, which wait until it says what they do."""

    are_waiting: bool = True

    def train(self, config: TrainingConfig, method: Method, *, threads: int) -> None:
        """Let them train beside the first process."""
        self.are_waiting = False
        from_first((config, method, threads))

    def leave(self, exit_code: int) -> None:
        """Let them end with an exit code, unless they train."""
        if self.are_waiting:
            self.are_waiting = False
            from_first(exit_code)


def train_beside_first(processes: Processes) -> int:
    """Train in a process that is not the first, shows nothing, and keeps no folder."""
    message = from_first(None)
    if isinstance(message, int):
        return message
    config, method, threads = message
    torch.set_num_threads(config.threads or threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary) / "run")
        with folder.claimed(describe(config, method), resume=False):
            train(config, method, folder, processes=processes)
    return 0


def say(text: str) -> None:
    """Print a message of a training, in which arguments of the library are called as the flags."""
    tell(wrapped(as_flags(text)))


def refuse_other_places(config: TrainingConfig, folder: RunFolder) -> None:
    """Refuse a finished run with folders of other data than it had, of which it says nothing."""
    fields = folder.description()["recipe"]["fields"]
    values = flag_values(config)
    others = [name for name in config.places if values[name] != fields.get(name)]
    if others:
        flags = few([f"--{name}" for name in others])
        raise MetaplError(
            f"the run in {folder.path} is finished, and {flags} names other data than it had; "
            f"leave it out, or measure the networks by metapl evaluate {quoted(folder.path)} "
            "--test FOLDER."
        )


def tell_next(path: Path, seconds: float | None) -> None:
    """Print how long a training took, unless it was done before, and what one types next."""
    after = "" if seconds is None else f"after {spoken_time(seconds)} "
    tell(
        f"{after}the networks, the report and the figures are in {path}:\n"
        f"  {path / PAGE}  (open it in a browser)\n"
        f"  metapl predict {quoted(path)} PICTURES"
    )


def tell_how_to_resume(stopped: KeyboardInterrupt, path: Path) -> None:
    """Print the command that goes on with the run in a folder."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(path)]
    words.append("--resume")
    # A fit that was stopped says after which step.
    reason = str(stopped) if isinstance(stopped, Interrupted) else "stopped"
    tell(f"\n{reason}; go on with:\n  {program()} {shlex.join(words)}", file=sys.stderr)


# ------------------------------------------------------------------------------------- the commands


@dataclass(frozen=True, kw_only=True)
class TrainImages(Train):
    __doc__ = Images.__doc__

    config: Images
    options: Annotated[Started, tyro.conf.arg(name="run")] = field(default_factory=Started)
    method_name: MethodOfImages = "uda"
    method: Method = images.METHODS["uda"]
    methods: ClassVar[Mapping[str, Method]] = images.METHODS
    compared: ClassVar[tuple[str, ...]] = images.COMPARED

    @classmethod
    def usual_method(cls, asked: argparse.Namespace) -> str | None:
        """Return labels alone, where a new run has no other pictures or learns its own seldom."""
        is_stored = asked.config is not None or asked.resume or asked.compare
        if is_stored or asked.labeled is None:
            return None
        if asked.unlabeled is None:
            return "supervised"
        if not learns_seldom(asked):
            return None
        if not asked.help and os.environ.get("RANK", "0") == "0":
            say(
                f"note: labels alone are learned, for more than {MANY_LABELS:,} labeled pictures "
                f"are learned fewer than {LEAST_TIMES} times; --method uda learns the unlabeled "
                "ones too"
            )
        return "supervised"


@dataclass(frozen=True, kw_only=True)
class TrainDigits(Train):
    __doc__ = Digits.__doc__

    config: Digits = field(default_factory=Digits)
    options: Annotated[Started, tyro.conf.arg(name="run")] = field(default_factory=Started)
    method_name: MethodOfDigits = "mpl"
    method: Method = digits.METHODS["mpl"]
    methods: ClassVar[Mapping[str, Method]] = digits.METHODS
    compared: ClassVar[tuple[str, ...]] = digits.COMPARED


@dataclass(frozen=True, kw_only=True)
class RoundsOfImages(Train):
    """Train by Noisy Student on pictures: each student learns the labels of the one before it.

    Round 0 trains the first teacher on the labeled examples. In each later round the last network
    labels the unlabeled examples without noise; those it is confident of are kept, as many of each
    class; and a new network of the same size, or larger, learns from both with augmentation,
    dropout and stochastic depth. --steps counts the steps of each round. --minutes, for your own
    pictures, is the time of all rounds together, with their labeling. It needs the extra labels,
    see metapl --help.
    """

    config: ImagesOfRounds
    method_name: tyro.conf.Suppress[str] = NoisyStudent.name
    method: NoisyStudent = field(default_factory=NoisyStudent)
    methods: ClassVar[Mapping[str, Method]] = METHODS


@dataclass(frozen=True, kw_only=True)
class RoundsOfDigits(Train):
    __doc__ = (RoundsOfImages.__doc__ or "").replace("on pictures", "on digits", 1)

    config: DigitsOfRounds = field(default_factory=DigitsOfRounds)
    method_name: tyro.conf.Suppress[str] = NoisyStudent.name
    method: NoisyStudent = field(default_factory=NoisyStudent)
    methods: ClassVar[Mapping[str, Method]] = METHODS


def program() -> str:
    """Return what this command was started with, for a line that starts it again."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return "metapl"
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == count
    options = f"--nproc-per-node={count}" if is_one_machine else "..."
    return f"torchrun {options} -m metapl"
