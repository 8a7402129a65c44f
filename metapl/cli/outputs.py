"""Where ``predict`` may write: not over what it reads, nor over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from metapl.errors import MetaplError
from metapl.report import SOFTWARE


def check_outputs(
    outputs: Mapping[str, Path | None], *, run: Path, read: Sequence[Path], suffixes: Sequence[str], header: str
) -> None:
    """Refuse files that cannot be written, or whose content would be lost, before anything is read or written.

    Args:
        outputs: by flag.
        run: the run's folder.
        read: the files and folders to be read.
        suffixes: of the files in these folders that are read.
        header: what a file of predictions begins with.

    A file in a folder that is read may be replaced where an earlier call wrote it.
    """
    given = {flag: file for flag, file in outputs.items() if file is not None}
    for flag, file in given.items():
        _check_kind(flag, file)
        where = file.resolve()
        if where.is_relative_to(run.resolve()):
            raise MetaplError(f"{flag} {file} lies in the run folder {run}; expected a file elsewhere.")
        for path in read:
            source = path.resolve()
            within = where.is_relative_to(source) and where.suffix.lower() in suffixes and where.is_file()
            if where == source or (path.is_dir() and within and not _is_ours(where, header)):
                raise MetaplError(
                    f"{flag} {file} is one of the files to be read, and would be lost; expected another file."
                )
    if len({file.resolve() for file in given.values()}) < len(given):
        raise MetaplError(f"{' and '.join(given)} are the same file; expected one for each.")


def _check_kind(flag: str, file: Path) -> None:
    if file.is_dir():
        why = "is a folder"
    elif not file.parent.is_dir():
        why = f"cannot be written: there is no folder {file.parent}"
    elif file.is_symlink():
        why = "is a symbolic link"
    elif file.exists() and not file.is_file():
        why = "is a device or a pipe"
    else:
        return
    raise MetaplError(f"{flag} {file} {why}; expected a plain file in a folder that exists.")


def _is_ours(file: Path, header: str) -> bool:
    """Whether an earlier call wrote the file."""
    with file.open("rb") as content:
        if content.read(len(header)) == header.encode():
            return True
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == SOFTWARE
    except (UnidentifiedImageError, OSError):
        return False
