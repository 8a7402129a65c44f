"""What several commands share: examples in a user's files, and the folders and files that they write to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.machine.ownership import owned
from metapl.apps.machine.sealed import written_last
from metapl.apps.run import PLACES, NetworkName, RunFolder
from metapl.apps.settings import unset
from metapl.errors import MetaplError

Run = Annotated[Path, tyro.conf.Positional, unset("RUN")]  # the folder of a run, by its place
Folder = Annotated[Path | None, unset("DIR")]
File = Annotated[Path | None, unset("FILE")]
OF_RUNS = "which of the run's networks; by default the one that it delivers."
Network = Annotated[NetworkName, unset(help=OF_RUNS)]
OF_FACTORIES = "builds the network of a run that metapl does not know; FILE.py is run."
Factory = Annotated[str | None, unset("FILE.py:FUNCTION", help=OF_FACTORIES)]


def counted(number: int, what: str) -> str:
    """
    >>> counted(1, "file"), counted(2_000, "file")
    ('1 file', '2,000 files')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


# ------------------------------------------------------------------------------------------------------------- writing


def check_out(out: Path, fields: Mapping[str, Any]) -> None:
    """Refuse a folder to write to in one that pictures are read from, where what is written would be read too."""
    for name in PLACES:
        folder = fields.get(name)
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
    if blocked := [name for name in files if (out / name).exists() and not (out / name).is_file()]:
        raise MetaplError(f"--out {out}: {blocked[0]} in it is no plain file, and cannot be replaced.")
    with owned(out, leaves_lock=False):
        yield


def check_file(file: Path | None, suffix: str) -> None:
    """Refuse an ``--out`` that cannot be written, or not be replaced, before any work; of a link, what it leads to."""
    if file is None:
        return
    if file.suffix.lower() != suffix:
        raise MetaplError(f"--out {file} is to be a {suffix} file; expected a name that ends with {suffix}.")
    where = Path(os.path.realpath(file))
    if not where.parent.is_dir() or (where.exists() and not where.is_file()):
        raise MetaplError(f"--out {file} cannot be written; expected a file, in a folder that is there.")


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
    path = out or (new_default_folder(recipe) if is_new else Path("runs") / f"{recipe}-{max(_numbers(recipe)):03d}")
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
        path = Path("runs") / f"{recipe}-{max(_numbers(recipe), default=0) + 1:03d}"
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def _numbers(recipe: str) -> list[int]:
    matches = (re.fullmatch(rf"{recipe}-(\d+)", path.name) for path in Path("runs").glob(f"{recipe}-*"))
    return [int(match[1]) for match in matches if match]
