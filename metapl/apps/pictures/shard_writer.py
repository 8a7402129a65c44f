"""Writing a folder of pictures as tar files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from metapl.apps.machine.ownership import LOCK, owned
from metapl.apps.machine.sealed import is_temporary, remove_temporary, replacing
from metapl.apps.pictures.check import verify_files
from metapl.apps.pictures.folders import Files, Progress, ask, digest, scan_unlabeled, silent
from metapl.apps.pictures.reader import UnreadableImage, image_size
from metapl.apps.pictures.shards import FORMAT, MANIFEST, SUFFIX, Manifest, ShardFile, open_picture, size_of
from metapl.errors import MetaplError, few
from metapl.words import shown

PER_SHARD = 10_000


def write_shards(
    folder: str | Path,
    out: str | Path,
    per_shard: int = PER_SHARD,
    progress: Progress = silent,
    no_picture: Callable[[str], object] = lambda path: None,
) -> Manifest:
    """Write the pictures of a folder as tar files that WebDataset reads too, and that stand for the folder in training.

    The pictures are copied byte by byte in the order of their names, and a shard has no time or owner in it: the same
    pictures give the same bytes. Shards that are there are kept where they have their checksums and these bytes.
    ``no_picture`` is called with the path of each file that is no picture by its header (it is copied), or is empty.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    files = scan_unlabeled(folder)
    verified = verify_files(files, "size")  # links may lead nowhere
    for name in verified.skipped:
        no_picture(str(files.root / name))
    fault = None
    if per_shard < 1:
        fault = f"write_shards got per_shard={per_shard}; expected 1 picture or more"
    elif not verified.sound:
        fault = f"none of the {len(files):,} pictures in {shown(files.root)} can be read"
    elif out.resolve().is_relative_to(folder.resolve()):
        fault = f"{shown(out)} lies in {shown(folder)}, whose pictures are read; expected another place"
    elif out.exists() and not out.is_dir():
        fault = f"{shown(out)} is a file; expected a folder for the shards"
    if fault is not None:
        raise MetaplError(f"{fault}.")
    files = files.keep(verified.sound)
    listing = hashlib.sha256()
    for name, where in zip(files.names, files.paths(), strict=True):
        listing.update(f"{name}\0{ask(size_of, where)}\0".encode("utf-8", "surrogateescape"))
    try:
        with owned(out, leaves_lock=False):
            manifest = _begun(out, Manifest(listing.hexdigest(), len(files), per_shard))
            for number in range(manifest.total):
                part = files.keep(range(number * per_shard, min((number + 1) * per_shard, len(files))))
                path = out / f"{number:06d}{SUFFIX}"
                there = manifest.shards[number] if number < len(manifest.shards) else None
                if there is None or there != _tarred(part, path.name) or not _is_whole(out, there):
                    with replacing(path) as file:
                        shards = list(manifest.shards)
                        shards[number : number + 1] = [_tarred(part, path.name, file, no_picture)]
                        manifest = dataclasses.replace(manifest, shards=tuple(shards))
                        # Before the shard has its name: a kill leaves no shard that the manifest does not have, and
                        # which could be of somebody else; one that it has and that is missing is written again.
                        with replacing(out / MANIFEST) as listed:
                            content = {"format": FORMAT} | dataclasses.asdict(manifest)
                            listed.write(json.dumps(content, indent=1).encode())
                progress(min((number + 1) * per_shard, len(files)))
    except OSError as error:
        raise MetaplError(
            f"{shown(out)} cannot be written: {error.strerror or error}; expected a folder with room for "
            f"{shown(folder)}. Given once more, the command goes on."
        ) from error
    return manifest


def check_shards(folder: str | Path, progress: Progress = silent) -> Manifest:
    """Compare the bytes of all shards with their checksums; a MetaplError where one is not as it was written."""
    folder = Path(folder).expanduser()
    manifest = Manifest.read(folder)
    if manifest is None:
        raise MetaplError(f"{shown(folder)} has no {MANIFEST}; expected a folder that `metapl shards` wrote.")
    manifest.check_files(folder)
    done, wrong = 0, []
    for shard in manifest.shards:
        wrong += [] if _is_whole(folder, shard) else [shard.file]
        done += shard.pictures
        progress(done)
    fault = f"the bytes of {few(wrong)} are not as they were written" if wrong else ""
    if done != manifest.pictures and not wrong:
        fault = f"{MANIFEST} names {manifest.pictures:,} pictures, and {done:,} by shard"
    if fault:
        raise MetaplError(f"{shown(folder)}: {fault}; copy the folder again, or write the shards again.")
    return manifest


def _begun(out: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on from; what a killed writer left beside it is removed."""
    found = Manifest.read(out)
    others = sorted(name for name in os.listdir(out) if name != LOCK and not is_temporary(name))
    if found is None and others:
        raise MetaplError(f"{shown(out)} has {few(others)} in it; expected an empty folder, or shards begun before.")
    if found is not None and dataclasses.replace(found, shards=()) != wanted:
        raise MetaplError(
            f"{shown(out)} holds shards of {found.pictures:,} other pictures, or of another size ({found.per_shard:,} "
            "pictures each); expected a new folder, or the same command as before."
        )
    remove_temporary(out)
    return found or wanted


def _is_whole(folder: Path, shard: ShardFile) -> bool:
    path = folder / shard.file
    return path.is_file() and path.stat().st_size == shard.bytes and digest(str(path)).hex() == shard.sha256


def _tarred(
    files: Files, name: str, file: BinaryIO | None = None, no_picture: Callable[[str], object] | None = None
) -> ShardFile:
    """Put pictures into a tar file, or, without a file, only find out what it would be."""
    hashed = _Hashed(file)
    with tarfile.open(fileobj=hashed, mode="w:", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for inside, path in zip(files.names, files.paths(), strict=True):
            picture = ask(open_picture, path)
            if picture is None:
                raise MetaplError(f"{shown(path)} cannot be read; was it removed? Make it readable, or remove it.")
            if no_picture is not None:
                try:
                    image_size(path)
                except UnreadableImage:
                    no_picture(path)
            with picture:
                member = tarfile.TarInfo(inside)
                member.size = picture.seek(0, os.SEEK_END)
                picture.seek(0)
                tar.addfile(member, picture)
    return ShardFile(name, len(files), hashed.written, hashed.digest.hexdigest())


class _Hashed:
    """A file for writing that hashes what it is given, whatever the disk makes of it."""

    def __init__(self, file: BinaryIO | None) -> None:
        self.file, self.digest, self.written = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.written += len(data)
        return len(data) if self.file is None else self.file.write(data)

    def tell(self) -> int:
        return self.written
