"""The folder that a command writes to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from metapl.apps.experiments.folder import RunFolder
from metapl.errors import MetaplError
from metapl.runs.ownership import owned


def held(out: Path | None) -> AbstractContextManager[None]:
    """The folder of ``--out``, which nobody else writes to until the block ends; nothing where there is none."""
    if out is not None and out.exists() and not out.is_dir():
        raise MetaplError(f"--out {out} is a file; expected a folder, or the name of a new one.")
    return nullcontext() if out is None else owned(out, leaves_lock=False)


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """The folder of ``--out``, made if need be; refuse it where the block cannot write there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise MetaplError(f"--out {out} cannot be written: {error.strerror}; expected a folder with room.") from error


@contextmanager
def run_folder(out: Path | None, recipe: str, resume: bool) -> Iterator[RunFolder]:
    """The folder of a run, which nobody else writes to until the block ends.

    Args:
        out: as it was given; None: the next free runs/<recipe>-NNN, with ``resume`` the last one that is there.
        recipe: its name.
        resume: go on with the run in it.
    """
    is_new = out is None and not resume
    path = out or (new_default_folder(recipe) if is_new else _last_default_folder(recipe))
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
        path = Path("runs") / f"{recipe}-{max(_default_numbers(recipe), default=0) + 1:03d}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.is_dir():
                raise


def _last_default_folder(recipe: str) -> Path:
    numbers = _default_numbers(recipe)
    if not numbers:
        raise MetaplError(f"there is no run runs/{recipe}-* to resume here; name its folder with --out.")
    return Path("runs") / f"{recipe}-{max(numbers):03d}"


def _default_numbers(recipe: str) -> list[int]:
    """The numbers of the runs with default names that are there."""
    matches = (re.fullmatch(rf"{recipe}-(\d+)", path.name) for path in Path("runs").glob(f"{recipe}-*"))
    return [int(match[1]) for match in matches if match]
