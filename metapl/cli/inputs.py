"""The examples in a user's files, read as those that a run was trained on."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from metapl.errors import MetaplError
from metapl.recipes import Recipe

BATCH = 256

NAMED = 5
"""Files that an error names."""


class Inputs:
    """The examples in files and folders, as they are asked for.

    Args:
        recipe: reads the files.
        paths: files and folders.
        leave: files that are not read though they lie in one of the folders.
    """

    def __init__(self, recipe: Recipe, paths: Sequence[Path], leave: Sequence[Path] = ()) -> None:
        self.recipe, self.seen, self.skipped = recipe, 0, 0
        self.leave = {file.resolve() for file in leave}
        self.files = [file for path in paths for file in (self._within(path) if path.is_dir() else [path])]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            self.seen += 1
            try:
                yield from self.recipe.read(file)
            except MetaplError as error:
                self._skip(str(error))

    def batches(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The same, some at a time."""
        examples = iter(self)
        while batch := list(itertools.islice(examples, BATCH)):
            yield batch

    def _within(self, folder: Path) -> list[Path]:
        """The readable files of a folder and of those in it, sorted."""
        files = [Path(where) / name for where, _, names in os.walk(folder, onerror=self._unlisted) for name in names]
        readable = sorted(
            file for file in files if file.suffix.lower() in self.recipe.reads and not self._is_left(file)
        )
        if not readable:
            raise MetaplError(
                f"there is no file in {folder} that can be read; expected {', '.join(self.recipe.reads)}."
            )
        return readable

    def _is_left(self, file: Path) -> bool:
        return bool(self.leave) and file.resolve() in self.leave

    def _unlisted(self, error: OSError) -> None:
        self.seen += 1
        self._skip(f"{error.filename}: {error.strerror}")

    def _skip(self, why: str) -> None:
        self.skipped += 1
        print(f"metapl: left out {why}", file=sys.stderr)


def require_finite(logits_BC: Tensor, names: Sequence[str]) -> None:
    """Refuse logits that are not finite, and name the examples."""
    bad = [name for name, fine in zip(names, logits_BC.isfinite().all(dim=1).tolist(), strict=True) if not fine]
    if bad:
        more = f" and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
        raise MetaplError(
            f"the network's outputs are not finite for {', '.join(bad[:NAMED])}{more}; its training diverged: train "
            "again with a smaller learning rate."
        )
