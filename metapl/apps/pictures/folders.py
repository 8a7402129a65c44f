"""Folders of images: the files in them, their classes and bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.apps.pictures.reader import SUFFIXES
from metapl.apps.pictures.tar import SUFFIX, members, open_picture, size_of
from metapl.errors import MetaplError, few
from metapl.words import shown

Progress = Callable[[int], object]
"""Called now and then with the number of files done."""

FilesT = TypeVar("FilesT", bound="Files")
T = TypeVar("T")

WHOLE_UP_TO, WHOLE_BYTES = 5_000, 2**30
"""Files of a folder whose bytes are all hashed, and how many bytes; of larger folders, names and sizes are taken."""


def silent(done: int) -> None:
    """The progress that nobody looks at."""


@dataclass(frozen=True)
class Files:
    """The pictures below a folder: their names relative to it, with slashes, in the order of their characters, and the
    number of other files by suffix."""

    root: Path
    names: tuple[str, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where a file is."""
        return self.root / self.names[index]

    def paths(self) -> Iterator[str]:
        """Where the files are."""
        folder = os.path.join(self.root, "")
        return (folder + name for name in self.names)

    def keep(self: FilesT, indices: Sequence[int]) -> FilesT:
        """The same folder with some of its files."""
        return dataclasses.replace(self, names=tuple(self.names[i] for i in indices))


@dataclass(frozen=True)
class LabeledFiles(Files):
    """The pictures of a folder that holds one folder a class."""

    classes: tuple[str, ...] = ()  # of all these folders, in the order of their characters
    labels: tuple[int, ...] = ()  # of each file, an index into the classes

    def keep(self, indices: Sequence[int]) -> LabeledFiles:
        return dataclasses.replace(super().keep(indices), labels=tuple(self.labels[i] for i in indices))

    def targets(self, classes: Sequence[str] | None = None) -> Tensor:
        """The labels, int64 (n,), as indices into ``classes``; None: into the folder's own. A MetaplError where there
        are pictures of another class."""
        known = {name: index for index, name in enumerate(self.classes if classes is None else classes)}
        if unknown := sorted({self.classes[label] for label in self.labels} - known.keys()):
            raise MetaplError(f"{self.root} has pictures of {few(unknown)}; expected {few(known, 20)} alone.")
        return torch.tensor([known[self.classes[label]] for label in self.labels], dtype=torch.int64)

    def counts(self) -> dict[str, int]:
        """Number of pictures of each class."""
        counts = Counter(self.labels)
        return {name: counts[label] for label, name in enumerate(self.classes)}


def scan_unlabeled(folder: str | Path) -> Files:
    """List the pictures of a folder and all folders in it, in an order that depends on their names alone.

    Files are known by their suffix, and not opened. Hidden ones (``.name``, ``__MACOSX``) are left out; links are
    followed, and a folder is listed once. Where there are tar files and no pictures, the pictures in these are listed:
    ``000000.tar/deep/er/a.png``. In the place of a folder may stand a text file with the path of a picture in each
    line, from the file's own folder on. Cost: about a second for 100,000 files.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "deep" / "er").mkdir(parents=True)
    >>> _ = (root / "deep" / "er" / "a.PNG").write_bytes(b""), (root / "b.jpg").write_bytes(b"")
    >>> scan_unlabeled(root).names
    ('b.jpg', 'deep/er/a.PNG')
    """
    root = Path(folder).expanduser()
    if root.suffix == ".txt" and root.is_file():
        lines = root.read_text("utf-8", "surrogateescape").splitlines()
        listed = {os.path.abspath(root.parent / line) for line in lines if line}
        root = Path(os.path.commonpath([os.path.dirname(path) for path in listed]) if listed else root)
        names, passed_over = _pictures(os.path.relpath(path, root) for path in listed)
    else:
        names, passed_over = _pictures(name for _, files in _listed(root) for name in files)
    if not names and passed_over[SUFFIX]:
        names, passed_over = _pictures(_in_tars(root))
    _refuse_none(names, root, passed_over)
    return Files(root, names, passed_over)


def scan_labeled(folder: str | Path) -> LabeledFiles:
    """List the pictures of a folder that holds one folder a class, likewise; below those, any tree.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("cat/1.png", "dog/2.png", "dog/3.png"):
    ...     (root / name).parent.mkdir(exist_ok=True)
    ...     _ = (root / name).write_bytes(b"")
    >>> scan_labeled(root).classes, scan_labeled(root).labels
    (('cat', 'dog'), (0, 1, 1))
    """
    root = Path(folder).expanduser()
    classes, files = next(_listed(root))
    if not classes:
        example = f"{root / 'cat'}, {root / 'dog'}"
        raise MetaplError(f"{root} has no folder in it; expected one folder a class, with its pictures: {example}")
    _, passed_over = _pictures(files)  # pictures beside the class folders have no class
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        below, others = _pictures(file for _, files in _listed(root / name, above=root) for file in files)
        names += (f"{name}/{picture}" for picture in below)
        labels += [label] * len(below)
        passed_over.update(others)
    _refuse_none(names, root, passed_over)
    return LabeledFiles(root, tuple(names), passed_over, tuple(classes), tuple(labels))


def _refuse_none(names: Sequence[str], root: Path, passed_over: Mapping[str, int]) -> None:
    if not names:
        kinds = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(passed_over.items()))
        others = f", only {kinds}" if kinds else ""
        raise MetaplError(f"{root} has no picture in it{others}; expected files that end with {', '.join(SUFFIXES)}.")


def _pictures(files: Iterable[str]) -> tuple[tuple[str, ...], Counter[str]]:
    """The pictures among files, sorted, and the number of the others by suffix."""
    names: list[str] = []
    passed_over: Counter[str] = Counter()
    for name in files:
        suffix = os.path.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            names.append(name)
        else:
            passed_over[suffix or "no suffix"] += 1
    return tuple(sorted(names)), passed_over


def _listed(root: Path, above: Path | None = None) -> Iterator[tuple[list[str], list[str]]]:
    """As :func:`walk`, without hidden names: the folders in each folder, and its files relative to the root."""
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise MetaplError(f"{root} {state}; expected a folder with pictures.")

    def refuse(error: OSError) -> NoReturn:
        raise MetaplError(f"{shown(error.filename)} cannot be listed: {error.strerror}.") from error

    for folder, inside, files in walk(root, refuse, above):
        inside[:] = filter(_is_visible, inside)
        below = os.path.relpath(folder, root)
        yield inside, [name if below == "." else f"{below}/{name}" for name in files if _is_visible(name)]


def _in_tars(root: Path) -> Iterator[str]:
    """The members of the tar files below a folder, likewise."""
    for tar in (name for _, files in _listed(root) for name in files if name.endswith(SUFFIX)):
        inside = [name for name, _, _ in members(root / tar) if all(map(_is_visible, name.split("/")))]
        if twice := [name for name, times in Counter(inside).items() if times > 1]:
            raise MetaplError(f"{shown(root / tar)} has {few(twice)} more than once; expected each name once.")
        yield from (f"{tar}/{name}" for name in inside)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def walk(
    root: str | Path, refuse: Callable[[OSError], None], above: str | Path | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders, each once, with the names of the folders and of the files in them, sorted, links followed.

    What is taken from the list of a folder's folders is not gone into. ``refuse`` is called with the error where a
    folder cannot be listed; the folder ``above`` counts as listed already.
    """

    def identity(folder: str) -> tuple[int, int]:
        status = os.stat(folder)
        return status.st_dev, status.st_ino  # what a folder and a link to it have in common

    seen = set() if above is None else {identity(os.fspath(above))}
    for folder, inside, files in os.walk(root, onerror=refuse, followlinks=True):
        known = ask(identity, folder)
        if known is None or known in seen:
            inside.clear()
            continue
        seen.add(known)
        inside.sort()
        yield folder, inside, sorted(files)


def digest(path: str) -> bytes:
    """SHA-256 of a file's bytes."""
    with open_picture(path) as file:
        return hashlib.file_digest(file, "sha256").digest()


def ask(question: Callable[[str], T], path: str) -> T | None:
    """What a function says of a file that a scan found; None where it cannot be read, as a link that leads nowhere.
    Whoever reads the pictures leaves it out, and says so."""
    try:
        return question(path)
    except OSError:
        return None


def hash_files(files: Files) -> str:
    """What a folder holds: SHA-256 over the names, the classes and the bytes of its files, in hexadecimal.

    Beyond ``WHOLE_UP_TO`` files or ``WHOLE_BYTES``, sizes stand for bytes, and the result begins with "names and
    sizes:". Files that cannot be read count by their names.
    """
    sizes = [ask(size_of, path) for path in files.paths()]
    whole = len(sizes) <= WHOLE_UP_TO and sum(size or 0 for size in sizes) <= WHOLE_BYTES
    sha256 = hashlib.sha256()
    labels = files.labels if isinstance(files, LabeledFiles) else [None] * len(sizes)
    for name, label, path, size in zip(files.names, labels, files.paths(), sizes, strict=True):
        content = (ask(digest, path) or b"") if whole else str(size).encode()
        sha256.update(f"{name}\0{label}\0".encode("utf-8", "surrogateescape") + content)
    return sha256.hexdigest() if whole else f"names and sizes: {sha256.hexdigest()}"


def hashes(**parts: Any) -> dict[str, str]:
    """SHA-256 of each part of examples in memory, in hexadecimal: tensors, or tuples of them.

    >>> hashes(x=torch.zeros(2))["x"][:8]
    '46d4846c'
    """
    found = {}
    for name, part in parts.items():
        sha256 = hashlib.sha256()
        for tensor in pytree.tree_leaves(part):
            sha256.update(f"{tensor.dtype} {tuple(tensor.shape)}:".encode())
            sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        found[name] = sha256.hexdigest()
    return found
