"""What several commands share: examples in a user's files, and the folders and files that they write to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.machine.ownership import owned
from metapl.apps.run import PLACES, NetworkName, RunFolder
from metapl.apps.settings import unset
from metapl.errors import MetaplError
from metapl.runs.folder import replacing

Run = Annotated[Path, tyro.conf.Positional, unset("RUN")]  # the folder of a run, by its place
Folder = Annotated[Path | None, unset("DIR")]
File = Annotated[Path | None, unset("FILE")]
Network = Annotated[NetworkName, unset(help="which of the run's networks; by default the one that it delivers.")]
BUILDS = "builds the network of a run that metapl does not know; FILE.py is run."
Factory = Annotated[str | None, unset("FILE.py:FUNCTION", help=BUILDS)]


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


def held(out: Path | None) -> AbstractContextManager[None]:
    """The folder of ``--out``, which nobody else writes to until the block ends; nothing where there is none."""
    return nullcontext() if out is None else owned(out, leaves_lock=False)


def check_file(file: Path | None, suffix: str) -> None:
    """Refuse an ``--out`` that cannot be written, or not be replaced, before any work; of a link, what it leads to."""
    if file is None:
        return
    if file.suffix.lower() != suffix:
        raise MetaplError(f"--out {file} is to be a {suffix} file; expected a name that ends with {suffix}.")
    where = Path(os.path.realpath(file))
    if not where.parent.is_dir() or (where.exists() and not where.is_file()):
        raise MetaplError(f"--out {file} cannot be written; expected a file, in a folder that is there.")


def write(out: Path, name: str, text: str) -> None:
    """Write a file into the folder of ``--out``, which is made if need be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / name) as file:
            file.write(text.encode())
    except OSError as error:
        raise MetaplError(f"--out {out} cannot be written: {error.strerror}; expected a folder with room.") from error


@contextmanager
def run_folder(out: Path | None, recipe: str, resume: bool) -> Iterator[RunFolder]:
    """The folder of a run, which nobody else writes to until the block ends.

    Without ``out``, it is the next free runs/<recipe>-NNN; to resume, the last one that is there.
    """
    places = Path("runs").glob(f"{recipe}-*")
    number = max((int(end) for place in places if (end := place.name[len(recipe) + 1 :]).isdecimal()), default=0)
    is_new, path = out is None and not resume, out
    if path is None and resume and not number:
        raise MetaplError(f"there is no run runs/{recipe}-* to resume here; name its folder with --out.")
    while path is None:
        place = Path("runs") / f"{recipe}-{number + is_new:03d}"
        number += 1
        with suppress(FileExistsError):  # who asked for one at the same moment has it, so it is the next
            place.mkdir(parents=True, exist_ok=resume)
            path = place
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
