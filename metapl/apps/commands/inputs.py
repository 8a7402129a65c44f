"""What several commands share: examples in a user's files, and the folders and files that they write to."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from metapl.apps.commands.parse import unset
from metapl.apps.experiments.folder import NetworkName, RunFolder
from metapl.apps.machine.ownership import owned
from metapl.apps.machine.sealed import refuse_irregular, written_last
from metapl.apps.pictures.check import find_copies
from metapl.apps.pictures.folders import scan_labeled, walk
from metapl.apps.recipes import ImageFolders
from metapl.apps.words import tell
from metapl.errors import MetaplError, few
from metapl.words import shown

OF_RUNS = (
    "which of the run's networks: the one that it delivers, the student, the student finetuned on the labeled data, or "
    "the teacher. Of a method that trains one network, such as uda, that is the student."
)
Network = Annotated[NetworkName, unset(help=OF_RUNS)]

BATCH = 256

# Names of open files of a process: to replace the file behind one would lose what else is written to it.
STREAMS = ("/dev/std", "/dev/fd/", "/proc/")


def counted(number: int, what: str) -> str:
    """
    >>> counted(1, "file"), counted(2_000, "file")
    ('1 file', '2,000 files')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


# ------------------------------------------------------------------------------------------------------------- reading


class Inputs:
    """The examples in files, and in folders, of which the readable files are taken, but for those to ``leave``.

    The ``recipe``, or what stands for one, reads them. ``seen`` and ``skipped`` are of the last pass.
    """

    def __init__(self, recipe: Any, paths: Sequence[Path], leave: Sequence[Path] = ()) -> None:
        self.recipe, self.seen, self.skipped = recipe, 0, 0
        left = {os.path.realpath(file) for file in leave}
        self.files: list[Path] = []
        for path in paths:
            files = [path]
            if path.is_dir():
                files = [Path(where) / name for where, _, names in walk(path, self._unlisted) for name in names]
                files = sorted(file for file in files if file.suffix.lower() in recipe.reads)
                files = [file for file in files if not left or os.path.realpath(file) not in left]
                if not files:
                    expected = ", ".join(recipe.reads)
                    raise MetaplError(f"there is no file in {path} that can be read; expected {expected}.")
            self.files += files
        self._unlisted_folders = self.skipped

    def batches(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Where each example stands, and the network's input for it."""
        examples = self._read()
        while batch := list(itertools.islice(examples, BATCH)):
            yield batch

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        self.seen = self.skipped = self._unlisted_folders  # whatever was read before
        for file in self.files:
            try:
                yield from self.recipe.read(file)
            except MetaplError as error:
                self._skip(str(error))
            else:
                self.seen += 1

    def _unlisted(self, error: OSError) -> None:
        self._skip(f"{shown(error.filename)}: {error.strerror}")

    def _skip(self, why: str) -> None:
        self.seen += 1
        self.skipped += 1
        tell(f"metapl: left out {why}", file=sys.stderr)


class TestFolder:
    """The pictures of a folder that holds one folder a class, read like the training data of a run.

    Those of classes without pictures may be missing; others than the run's are refused. Notes go to standard error.
    """

    __test__ = False  # pytest takes classes with such names for tests
    part = "test"

    def __init__(self, recipe: Any, folder: Path) -> None:
        files = scan_labeled(folder)
        counts = files.counts()
        if unknown := [name for name, count in counts.items() if count and name not in recipe.classes]:
            raise MetaplError(
                f"{folder} has pictures of {few(unknown)}, which the run does not know; expected folders called as "
                f"its classes: {few(recipe.classes, 20)}."
            )
        missing = [name for name in recipe.classes if not counts.get(name)]
        self.about: dict[str, Any] = {"test": str(folder), "missing_classes": missing}
        self.root, self.names = files.root, list[str]()
        self._labels = dict(zip(files.paths(), files.targets(recipe.classes).tolist(), strict=True))
        self._inputs = Inputs(recipe, [Path(path) for path in files.paths()])
        notes = []
        if missing:
            notes.append(f"{files.root} has no picture of {few(missing)}: nothing is measured there.")
        if files.loose:
            notes.append(f"{files.loose} pictures beside the class folders are not used.")
        if files.passed_over:
            kinds = ", ".join(f"{count:,} with {suffix}" for suffix, count in sorted(files.passed_over.items()))
            notes.append(f"files without the name of a picture are passed over: {kinds}.")
        if isinstance(recipe, ImageFolders):  # an accuracy on pictures that were trained on says nothing of others
            try:
                labeled, others = recipe.trained_on()
            except MetaplError as error:
                notes.append(f"it is not known which of these pictures were trained on: {error}")
            else:
                found = find_copies(labeled, others, None, files, trained=True)
                notes += [finding.message for finding in found if finding.kind == "test copies"]
        for note in notes:
            tell(f"metapl: note: {note}", file=sys.stderr, wrap=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.names = []
        for batch in self._inputs.batches():
            paths = [path for path, _ in batch]
            self.names += [Path(path).relative_to(self.root).as_posix() for path in paths]
            yield torch.stack([x for _, x in batch]), torch.tensor([self._labels[path] for path in paths])
        if not self.names:
            raise MetaplError(f"none of the {len(self._labels)} pictures in {self.root} can be read.")

    @property
    def skipped(self) -> int:
        return self._inputs.skipped

    def remark(self, evaluation: object) -> str:
        return ""


# ------------------------------------------------------------------------------------------------------------- writing


def check_out(out: Path, recipe: Any) -> None:
    """Refuse a folder to write to in one that a recipe reads pictures from, where what is written would be read too."""
    for name in getattr(recipe, "places", ()):
        folder = getattr(recipe, name)
        if folder and out.resolve().is_relative_to(Path(folder).expanduser().resolve()):
            raise MetaplError(
                f"the folder to write to, {out}, lies in {folder}, the {name} pictures, and would be read with them; "
                "expected --out with a folder elsewhere."
            )


@contextmanager
def held(out: Path | None, *files: str) -> Iterator[None]:
    """The folder of ``--out``, which nobody else writes to until the block ends; nothing where there is none.

    ``files`` will be written there, in the place of plain files alone.
    """
    if out is None:
        yield
        return
    if out.exists() and not out.is_dir():
        raise MetaplError(f"--out {out} is a file; expected a folder, or the name of a new one.")
    for name in files:
        try:
            refuse_irregular(out / name)
        except OSError as error:
            raise MetaplError(f"--out {out}: {name} in it cannot be replaced: {error.strerror}.") from error
    with owned(out, leaves_lock=False):
        yield


def check_file(flag: str, file: Path | None, suffix: str = "") -> None:
    """Refuse a file that cannot be written, or not be replaced, before any work; of a link, what it leads to."""
    if file is None:
        return
    if file.suffix.lower() != (suffix or file.suffix.lower()):
        raise MetaplError(f"{flag} {file} is to be a {suffix} file; expected a name that ends with {suffix}.")
    if str(file) == "-" or os.path.abspath(file).startswith(STREAMS):
        raise MetaplError(f"{flag} {file} is a stream; expected a file.")
    where = Path(os.path.realpath(file))
    try:
        refuse_irregular(where)
    except OSError as error:
        raise MetaplError(f"{flag} {file} cannot be written: {error.strerror}.") from error
    if not where.parent.is_dir():
        raise MetaplError(f"{flag} {file} cannot be written: there is no folder {where.parent}.")


@contextmanager
def written(out: Path, name: str, text: str) -> Iterator[None]:
    """A file in the folder of ``--out``, made if need be, and what the block writes beside it: both, or neither."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with written_last(out / name, text.encode()):
            yield
    except OSError as error:
        raise MetaplError(f"--out {out} cannot be written: {error.strerror}; expected a folder with room.") from error


@contextmanager
def run_folder(out: Path | None, recipe: str, resume: bool) -> Iterator[RunFolder]:
    """The folder of a run, which nobody else writes to until the block ends.

    Without ``out``, it is the next free runs/<recipe>-NNN; to resume, the last one that is there.
    """
    is_new = out is None and not resume
    if out is None and resume and not _numbers(recipe):
        raise MetaplError(f"there is no run runs/{recipe}-* to resume here; name its folder with --out.")
    path = out or (new_default_folder(recipe) if is_new else _numbered(recipe, max(_numbers(recipe))))
    folder = RunFolder(path)
    try:
        folder.check(resume)  # where that is clear already, nobody is waited for
        with folder.held():
            folder.check(resume)  # before anything is measured
            yield folder
    except Exception:
        if is_new:
            with suppress(OSError):  # there is more in it than its name
                path.rmdir()
                path.parent.rmdir()
        raise


def new_default_folder(recipe: str) -> Path:
    """The next free runs/<recipe>-NNN, which is made: who asks for one at the same moment gets another."""
    while True:
        path = _numbered(recipe, max(_numbers(recipe), default=0) + 1)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.is_dir():
                raise


def _numbered(recipe: str, number: int) -> Path:
    return Path("runs") / f"{recipe}-{number:03d}"


def _numbers(recipe: str) -> list[int]:
    matches = (re.fullmatch(rf"{recipe}-(\d+)", path.name) for path in Path("runs").glob(f"{recipe}-*"))
    return [int(match[1]) for match in matches if match]
