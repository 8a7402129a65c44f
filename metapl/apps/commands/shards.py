"""``metapl shards FOLDER --out DIR``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from metapl.apps.commands.parse import Command, Folder, unset
from metapl.apps.pictures.shard_writer import PER_SHARD, check_shards, write_shards
from metapl.errors import MetaplError, few
from metapl.runs.fields import AtLeastOne
from metapl.training.progress import counting
from metapl.words import shown, tell


@dataclass(frozen=True, kw_only=True)
class Shards(Command):
    """Write the pictures of a folder as tar files, which are moved and read faster than millions of small files.

    The folder of the tar files stands for that of the pictures wherever unlabeled pictures are given: --unlabeled, and
    PICTURES of ``metapl label``. WebDataset reads them too. The same pictures give the same bytes; a command that was
    stopped goes on when it is given once more.

    Args:
        folder: folder of pictures, with all folders in it; with --check, folder of shards.
        out: folder of the tar files; made if need be.
        pictures: number of pictures in a tar file.
        check_only: compare the bytes of shards with the checksums of shards.json, and write nothing.
    """

    folder: Annotated[Path, tyro.conf.Positional, unset("FOLDER")]
    out: Folder = None
    pictures: Annotated[AtLeastOne, tyro.conf.arg(metavar="N")] = PER_SHARD
    check_only: Annotated[bool, tyro.conf.arg(name="check", help_behavior_hint="")] = False

    def run(self) -> int:
        if (self.out is None) != self.check_only:
            given = "--out was given with --check" if self.check_only else "neither --out nor --check was given"
            raise MetaplError(f"{given}; expected --out DIR to write shards, or --check to look at written ones.")
        broken: list[str] = []
        with counting("pictures", shown=True) as update:
            if self.out is None:
                manifest, done = check_shards(self.folder, update), f"are as they were written: {shown(self.folder)}"
            else:
                manifest = write_shards(self.folder, self.out, self.pictures, update, broken.append)
                done = f"are written: {shown(self.out)}"
        size = sum(shard.bytes for shard in manifest.shards)
        shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards):,} shards"
        tell(f"{manifest.pictures:,} pictures in {shards} of {size / 1e6:,.1f} MB together {done}")
        if broken:
            files = "1 file" if len(broken) == 1 else f"{len(broken):,} files"
            tell(f"{files} cannot be read as pictures, and will be left out of a training: {few(broken)}", wrap=True)
        return 0
