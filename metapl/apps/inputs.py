"""What several commands share: examples in a user's files, and where a command writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from metapl.apps.printing import tell_wrong
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation
from metapl.networks.card import Input
from metapl.pictures import load_digits_split
from metapl.pictures.folders import Files, LabeledFiles, find_copies, scan_labeled, scan_unlabeled
from metapl.pictures.levels import refuse_other_levels
from metapl.run_folder import PLACES, EndedRun, NetworkName, RunFolder, stored_data
from metapl.runs.files import owned
from metapl.words import composed

# Examples in a pass.
BATCH = 256

# Examples (B, C, H, W) and their labels (B,).
Batch = tuple[Tensor, Tensor]

# The folder of a run, which stands without a flag.
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

# What a file that could not be written is refused with.
ROOM = "expected another --out, a folder with room."

Network = Annotated[
    NetworkName,
    tyro.conf.arg(
        help="which of the run's networks to take. By default it is the one that it delivers."
    ),
]
BUILDS = (
    "function that builds the network of the run, if metapl does not know it. FILE.py is executed."
)
Factory = Annotated[str | None, tyro.conf.arg(metavar="FILE.py:FUNCTION", help=BUILDS)]


def plural(number: int, noun: str) -> str:
    """Return a number of things.

    >>> plural(1, "file"), plural(2_000, "file")
    ('1 file', '2,000 files')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# ------------------------------------------------------------------------------------------ writing


def check_out(out: Path, *settings: Mapping[str, Any]) -> None:
    """Refuse a folder to write to that lies in one that pictures are read from.

    What is written would be read too.

    Args:
        out: the folder to write to.
        settings: the fields of a run, and what a command was given besides.
    """
    for fields in settings:
        for name in PLACES:
            folder = fields.get(name)
            if folder and out.resolve().is_relative_to(Path(folder).expanduser().resolve()):
                raise MetaplError(
                    f"the folder to write to, {out}, lies in {folder}, the {name} pictures, and "
                    "would be read with them; expected --out with a folder elsewhere."
                )


def held(out: Path | None) -> AbstractContextManager[None]:
    """Lock the folder of ``--out``, so that nobody else writes to it until the block ends.

    Without a folder this does nothing.
    """
    return nullcontext() if out is None else owned(out, leaves_lock=False)


def check_file(file: Path | None, suffix: str) -> None:
    """Refuse an ``--out`` that cannot be written, or not be replaced, before any work.

    Of a link, what it leads to is written.
    """
    if file is None:
        return
    if file.suffix.lower() != suffix:
        raise MetaplError(
            f"--out {file} is to be a {suffix} file; expected a name that ends with {suffix}."
        )
    where = Path(os.path.realpath(file))
    if not where.parent.is_dir() or (where.exists() and not where.is_file()):
        raise MetaplError(
            f"--out {file} cannot be written; expected a file, in a folder that is there."
        )


@contextmanager
def open_run_folder(
    out: Path | None, recipe: str, *, resume: bool, holds_runs: bool
) -> Iterator[RunFolder]:
    """Lock the folder of a run, so that nobody else writes to it until the block ends.

    Args:
        out: the folder. None: the next free runs/<recipe>-NNN, or, to resume, the last one that is
            there.
        recipe: the name of the recipe.
        resume: whether a run in the folder is gone on with.
        holds_runs: whether it is the folder of several runs, which may be there to resume.
    """
    path = out
    is_new = out is None and not resume
    if path is None:
        path = run_folder(recipe, resume=resume)
    folder = RunFolder(path)
    try:
        is_checked = not (holds_runs and resume)
        if is_checked:
            # Where that is clear already, nobody is waited for.
            folder.check(resume)
        with folder.locked():
            if is_checked:
                # And again once it is locked, before anything is measured.
                folder.check(resume)
            yield folder
    except Exception:
        if is_new:
            # A folder with files in it stays.
            with suppress(OSError):
                path.rmdir()
                path.parent.rmdir()
        raise


def run_folder(recipe: str, *, resume: bool) -> Path:
    """Return the last folder runs/<recipe>-NNN, to resume, or make the next free one."""
    number = 0
    for place in Path("runs").glob(f"{recipe}-*"):
        end = place.name[len(recipe) + 1 :]
        if end.isdecimal() and place.is_dir():
            number = max(number, int(end))
    if resume and not number:
        raise MetaplError(
            f"there is no run runs/{recipe}-* to resume here; name its folder with --out, or leave "
            "out --resume."
        )
    if not resume:
        number += 1
    while True:
        path = Path("runs") / f"{recipe}-{number:03d}"
        try:
            path.mkdir(parents=True, exist_ok=resume)
            return path
        except FileExistsError:
            # Who asked for one at the same moment has it.
            number += 1


def runs_of_comparison(path: Path) -> list[Path]:
    """Return the folders of the runs that a comparison has put into a folder, METHOD/seed-N."""
    return sorted(recipe.parent for recipe in path.glob("*/seed-*/recipe.json"))


# ---------------------------------------------------------------------------------------- reading


class Inputs:
    """Pictures in files and in folders, without those that cannot be read.

    Args:
        network_input: how a network reads a picture.
        paths: of files and folders.

    Attributes:
        files: the paths of all pictures.
        skipped: how many of these could not be read in the last pass.
    """

    def __init__(self, network_input: Input, paths: Sequence[Path]) -> None:
        self.input = network_input
        self.skipped = 0
        self.files: list[str] = []
        named_files: list[str] = []
        for path in paths:
            is_list = path.suffix.lower() == ".txt"
            if is_list or path.is_dir():
                scanned = scan_unlabeled(path)
                refuse_other_levels(scanned, network_input.levels)
                self.files += scanned.paths()
            else:
                self.files.append(str(path))
                named_files.append(str(path))
        # Files that were named together are of one kind, as those of a folder are.
        if named_files:
            names = tuple(os.path.relpath(os.path.abspath(file), "/") for file in named_files)
            together = Files(Path("/"), names)
            refuse_other_levels(together, network_input.levels, few(named_files))

    def batches(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yield where each picture stands, and the network's input (B, C, H, W)."""
        self.skipped = 0
        for start in range(0, len(self.files), BATCH):
            names: list[str] = []
            pictures: list[Tensor] = []
            for file in self.files[start : start + BATCH]:
                try:
                    pictures.append(self.input.read(Path(file)))
                    names.append(file)
                except MetaplError as error:
                    self.skipped += 1
                    tell_wrong(f"left out {error}")
            if names:
                yield names, torch.stack(pictures)


class HeldOut:
    """Examples with labels for the network of a run, read as its training data were.

    Args:
        run: the run.
        network: the name of its network.
        folder: of other pictures, with a folder for each class in it. It may lack classes of the
            run, and is refused where it has others; notes on it go to standard error. None: the
            run's own test set, or where it has none its validation examples.

    Attributes:
        part: "test" or "validation".
        recorded: the accuracy on them in ``result.json``, or None.
        about: what a report says of them besides.
        names: of the examples that the last pass has read; of digits there are none.
        note: what is said behind an accuracy on examples that the network was selected on.
    """

    def __init__(self, run: EndedRun, network: str, folder: Path | None = None) -> None:
        self.part = "test"
        self.recorded: float | None = None
        self.about: dict[str, Any] = {}
        self.names: list[str] = []
        self.note = ""
        self._digits: tuple[Tensor, Tensor] | None = None
        if folder is None and run.result["recipe"] == "digits":
            fields = run.folder.recipe()["fields"]
            self._digits = load_digits_split(fields["labels_per_class"], fields["seed"]).test
            self.recorded = run.result.get(f"{network}_test_accuracy")
        else:
            if folder is None:
                files = self._files_of_run(run, network)
            else:
                files = self._other_files(run, folder)
            targets = files.targets(run.classes).tolist()
            paths = [Path(path) for path in files.paths()]
            self.root = files.root
            self._labels = dict(zip(files.paths(), targets, strict=True))
            network_input = run.cards[network].input
            self._inputs = Inputs(network_input, paths)
        if folder is None:
            self.about = {"recorded_accuracy": self.recorded}

    def _files_of_run(self, run: EndedRun, network: str) -> LabeledFiles:
        """Return the run's test files, or its validation files."""
        self.recorded = run.result.get(f"{network}_test_accuracy")
        files = files_of(run, "test")
        if files is not None:
            return files
        self.part = "validation"
        self.recorded = run.result.get(f"{network}_validation_accuracy")
        if run.result["delivered_by"] == "validation":
            self.note = "\n  the network was selected on these examples: train was given no --test"
        files = files_of(run, "validation")
        if files is None:
            raise MetaplError(
                f"{run.folder.path} has neither a test set nor a validation set; give --test DIR, "
                "a folder of labeled pictures with one folder a class."
            )
        return files

    def _other_files(self, run: EndedRun, folder: Path) -> LabeledFiles:
        """Return the files of another folder; say what is remarkable about them."""
        files = scan_labeled(folder)
        counts = files.counts()
        unknown = [name for name, count in counts.items() if count and name not in run.classes]
        if unknown:
            raise MetaplError(
                f"{folder} has pictures of {few(unknown)}, which the run does not know; "
                f"expected folders called as its classes: {few(run.classes, 20)}."
            )
        missing = [name for name in run.classes if not counts.get(name)]
        self.about = {"test": str(folder), "missing_classes": missing}
        notes = []
        if missing:
            notes.append(f"{folder} has no picture of {few(missing)}.")
        fields = run.folder.recipe().get("fields", {})
        if fields.get("labeled"):
            notes += copies_of_training(run, files)
        for note in notes:
            tell_wrong(f"note: {note}")
        return files

    def __len__(self) -> int:
        if self._digits is not None:
            return len(self._digits[1])
        return len(self._labels)

    @property
    def skipped(self) -> int:
        """Return how many files of the last pass could not be read."""
        return 0 if self._digits is not None else self._inputs.skipped

    def batches(self, update: Callable[[int], None] | None = None) -> Iterator[Batch]:
        """Yield the examples and their labels, without files that cannot be read.

        Args:
            update: is called after each batch with the number of examples, skipped ones included.
        """
        count = 0
        for x, labels in self._digit_batches() if self._digits is not None else self._read():
            yield x, labels
            count += len(labels)
            if update is not None:
                update(count + self.skipped)

    def _digit_batches(self) -> Iterator[Batch]:
        assert self._digits is not None
        images, labels = self._digits
        yield from zip(images.split(BATCH), labels.split(BATCH), strict=True)

    def _read(self) -> Iterator[Batch]:
        self.names.clear()
        for paths, x in self._inputs.batches():
            self.names += [Path(path).relative_to(self.root).as_posix() for path in paths]
            yield x, torch.tensor([self._labels[path] for path in paths])
        if not self.names:
            raise MetaplError(
                f"none of the {len(self._labels)} pictures in {self.root} can be read."
            )

    def remark(self, evaluation: Evaluation) -> str:
        """Return what is said of an accuracy behind it."""
        if "test" in self.about:
            return ""
        if self.recorded is None:
            return f", not in result.json{self.note}"
        if evaluation.accuracy == self.recorded:
            return f", as in result.json{self.note}"
        changed = "the weights or the data have changed since, or this machine rounds otherwise"
        return f", but {self.recorded:.2%} in result.json:\n  {changed}{self.note}"


def copies_of_training(run: EndedRun, files: LabeledFiles) -> list[str]:
    """Return notes on files that are copies of pictures that a run was trained on.

    An accuracy on pictures that were trained on says nothing of others.
    """
    fields = run.folder.recipe()["fields"]
    try:
        labeled = scan_labeled(fields["labeled"])
        learned = {*stored_data(run.folder).get("labeled", labeled.names)}
        labeled = labeled.keep([i for i, name in enumerate(labeled.names) if name in learned])
        sides: dict[str, Any] = {"labeled": labeled, "test": files}
        # Without others the unlabeled ones are the labeled ones.
        if fields["unlabeled"] not in (None, fields["labeled"]):
            sides["unlabeled"] = scan_unlabeled(fields["unlabeled"])
        findings = find_copies(sides, trained=True)
    except MetaplError as error:
        return [f"it is not known which of these pictures were trained on: {error}"]
    return [finding.message for finding in findings if finding.kind == "test copies"]


def files_of(run: EndedRun, part: Literal["validation", "test"]) -> LabeledFiles | None:
    """Return the pictures that a run selected by or tested on, as it found them, or None."""
    fields = run.folder.recipe().get("fields", {})
    names = stored_data(run.folder).get(part)
    place = fields.get("val" if part == "validation" else "test")
    # They were set aside from the labeled ones where no folder of their own was given.
    if names and not place:
        place = fields.get("labeled")
    if not place:
        return None
    files = scan_labeled(place)
    if not isinstance(names, list):
        return files
    # The run noted the names of the files that it used. It did not use those that could not be
    # read, nor those that it set aside for validation.
    recorded = {composed(name) for name in names}
    numbers = [number for number, name in enumerate(files.names) if composed(name) in recorded]
    return files.keep(numbers)
