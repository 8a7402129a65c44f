"""Folders of images.

The files in them, their classes and bytes, and what is wrong, found before a training begins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.apps.pictures.reader import (
    SUFFIXES,
    TAR,
    UnreadableImage,
    open_picture,
    read_image,
    size_of,
    tar_members,
)
from metapl.errors import MetaplError, few, reason_of
from metapl.words import shown

Progress = Callable[[int], object]
"""Called now and then with the number of files done."""

FilesT = TypeVar("FilesT", bound="Files")
T = TypeVar("T")

WHOLE_UP_TO, WHOLE_BYTES = 5_000, 2**30
"""Files of a folder whose bytes are all hashed, and how many bytes.

Of larger folders, names and sizes are taken.
"""


def silent(done: int) -> None:
    """Take the number of files that are done, and say nothing."""


@dataclass(frozen=True)
class Files:
    """The pictures below a folder, and the number of other files by suffix.

    Names are relative to the folder, with slashes, in the order of their characters.
    """

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
        """Return the same folder with some of its files."""
        return dataclasses.replace(self, names=tuple(self.names[i] for i in indices))


@dataclass(frozen=True)
class LabeledFiles(Files):
    """The pictures of a folder that holds one folder a class."""

    # The names of the class folders, in the order of their characters.
    classes: tuple[str, ...] = ()

    # Of each file, an index into the classes.
    labels: tuple[int, ...] = ()

    def keep(self, indices: Sequence[int]) -> LabeledFiles:
        return dataclasses.replace(
            super().keep(indices), labels=tuple(self.labels[i] for i in indices)
        )

    def targets(self, classes: Sequence[str] | None = None) -> Tensor:
        """Return the labels, int64 (n,), as indices into ``classes``, or into the folder's own.

        Raises:
            MetaplError: there are pictures of another class.
        """
        known = {
            name: index for index, name in enumerate(self.classes if classes is None else classes)
        }
        if unknown := sorted({self.classes[label] for label in self.labels} - known.keys()):
            raise MetaplError(
                f"{self.root} has pictures of {few(unknown)}; expected {few(known, 20)} alone."
            )
        return torch.tensor(
            [known[self.classes[label]] for label in self.labels], dtype=torch.int64
        )

    def counts(self) -> dict[str, int]:
        """Return the number of pictures of each class."""
        counts = Counter(self.labels)
        return {name: counts[label] for label, name in enumerate(self.classes)}


def scan_unlabeled(folder: str | Path) -> Files:
    """List the pictures of a folder and all folders in it.

    Their order depends on their names alone. Files are known by their suffix, and not opened.
    Hidden ones (``.name``, ``__MACOSX``) are left out; links are followed, and a folder is listed
    once. Where there are tar files and no pictures, the pictures in these are listed:
    ``000000.tar/deep/er/a.png``. In the place of a folder may stand a text file with the path of a
    picture in each line, from the file's own folder on. Cost: about a second for 100,000 files.

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
        root = Path(
            os.path.commonpath([os.path.dirname(path) for path in listed]) if listed else root
        )
        names, passed_over = _pictures(os.path.relpath(path, root) for path in listed)
    else:
        names, passed_over = _pictures(name for _, files in _listed(root) for name in files)
    if not names and passed_over[TAR]:
        listed = set()
        for tar in (name for _, files in _listed(root) for name in files if name.endswith(TAR)):
            inside = [
                name
                for name, _, _ in tar_members(root / tar)
                if all(map(_is_visible, name.split("/")))
            ]
            if twice := [name for name, times in Counter(inside).items() if times > 1]:
                raise MetaplError(
                    f"{shown(root / tar)} has {few(twice)} more than once; expected each name once."
                )
            listed |= {f"{tar}/{name}" for name in inside}
        names, passed_over = _pictures(listed)
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
        raise MetaplError(
            f"{root} has no folder in it; expected one folder a class, with its pictures: {example}"
        )
    # Pictures beside the class folders have no class.
    _, passed_over = _pictures(files)
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        below, others = _pictures(
            file for _, files in _listed(root / name, above=root) for file in files
        )
        names += (f"{name}/{picture}" for picture in below)
        labels += [label] * len(below)
        passed_over.update(others)
    _refuse_none(names, root, passed_over)
    return LabeledFiles(root, tuple(names), passed_over, tuple(classes), tuple(labels))


def _refuse_none(names: Sequence[str], root: Path, passed_over: Mapping[str, int]) -> None:
    if not names:
        kinds = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(passed_over.items()))
        others = f", only {kinds}" if kinds else ""
        raise MetaplError(
            f"{root} has no picture in it{others}; expected files that end with "
            f"{', '.join(SUFFIXES)}."
        )


def _pictures(files: Iterable[str]) -> tuple[tuple[str, ...], Counter[str]]:
    """Return the pictures among files, sorted, and the number of the others by suffix."""
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
    """As :func:`walk`, without hidden names.

    The folders in each folder, and its files relative to the root.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise MetaplError(f"{root} {state}; expected a folder with pictures.")

    def refuse(error: OSError) -> NoReturn:
        raise MetaplError(f"{shown(error.filename)} cannot be listed: {error.strerror}.") from error

    for folder, inside, files in walk(root, refuse, above):
        inside[:] = filter(_is_visible, inside)
        below = os.path.relpath(folder, root)
        yield (
            inside,
            [name if below == "." else f"{below}/{name}" for name in files if _is_visible(name)],
        )


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def walk(
    root: str | Path, refuse: Callable[[OSError], None], above: str | Path | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield folders, each once, with the sorted names of the folders and the files in them.

    Links are followed. What is taken from the list of a folder's folders is not gone into.
    ``refuse`` is called with the error where a folder cannot be listed; the folder ``above`` counts
    as listed already.
    """

    def identity(folder: str) -> tuple[int, int]:
        status = os.stat(folder)
        # What a folder and a link to it have in common.
        return status.st_dev, status.st_ino

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
    """Return what a function says of a file, or None where the file cannot be read.

    A link that leads nowhere is such a file. Whoever reads the pictures leaves it out, and says so.
    """
    try:
        return question(path)
    except OSError:
        return None


def hash_files(files: Files) -> str:
    """Return the SHA-256 over the names, the classes and the bytes of a folder's files.

    Beyond ``WHOLE_UP_TO`` files or ``WHOLE_BYTES``, sizes stand for bytes, and the result begins
    with "names and sizes:". Files that cannot be read count by their names.
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


# -------------------------------------------------------------------------------- files, one by one

DECODE_UP_TO, DECODE_BYTES = 5_000, 2**29


@dataclass(frozen=True)
class Verified:
    """What :func:`verify_files` found.

    These are the indices of the files that passed, and the names of the others with the reason.
    """

    sound: tuple[int, ...]
    skipped: dict[str, str]

    def summary(self) -> str:
        """One line a reason, the most frequent first, with the number of files and the first few.

        >>> Verified((0,), {"a.png": "the file is empty", "b.png": "the file is empty"}).summary()
        '2 skipped: the file is empty (a.png, b.png)'
        """
        reasons = defaultdict(list)
        for name, reason in self.skipped.items():
            reasons[reason.split(" (")[0]].append(name)  # without what is the file's own
        ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
        return "\n".join(
            f"{len(names)} skipped: {reason} ({few(names)})" for reason, names in ranked
        )


def verify_files(files: Files, *, progress: Progress = silent) -> Verified:
    """Find which files can be used, and why the others cannot.

    Up to 5,000 files and half a gigabyte are decoded; of more, the size alone is asked for, and
    what is found broken while training is replaced there (see
    :class:`metapl.apps.pictures.FileImages`). ``progress`` is called with the number of files
    examined.

    Cost: per file, about 0.01 ms for the size, or one decoding.
    """
    sizes = [ask(size_of, path) or 0 for path in files.paths()]
    decode = len(sizes) <= DECODE_UP_TO and sum(sizes) <= DECODE_BYTES
    sound, skipped = [], {}
    for index, path in enumerate(files.paths()):
        try:
            if decode:
                # With a size, JPEGs are decoded several times as fast.
                read_image(path, size=(1, 1))
            elif not size_of(path):
                raise UnreadableImage(path, "the file is empty")
            sound.append(index)
        except UnreadableImage as error:
            skipped[files.names[index]] = error.reason
        except OSError as error:
            skipped[files.names[index]] = reason_of(error)
        progress(index + 1)
    return Verified(tuple(sound), skipped)


# ------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True)
class Finding:
    """A problem with the folders that a user should know about before training.

    An "error" makes results wrong or training impossible; a "warning" may be meant so. The kind is
    "classes", "contradiction", or of which pictures there are copies: "test copies", "validation
    copies" or "labeled copies".
    """

    level: Literal["error", "warning"]
    message: str
    kind: str = "classes"


def check_folders(
    labeled: LabeledFiles,
    unlabeled: Files | None = None,
    validation: LabeledFiles | None = None,
    test: LabeledFiles | None = None,
    progress: Progress = silent,
    *,
    copies: bool = True,
) -> list[Finding]:
    """Find what would spoil a training with these folders; errors come first.

    Errors: fewer than two classes; another of these folders inside that of the classes; a class
    without pictures; a class of validation or test that training does not know; a picture of test
    or validation, by its bytes, among the labeled or unlabeled ones, or in two classes. Warnings: a
    picture of test in validation; a class that validation or test lacks; all labeled pictures among
    the unlabeled ones. ``progress`` is called with the number of files whose bytes were compared;
    without ``copies``, none are.

    Cost: one question to the file system for each file. Bytes are read only of files that another
    side has with the same size, and beyond 4 KiB only where these agree too.
    """
    named = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation, "test": test}
    sides: dict[str, Any] = {side: files for side, files in named.items() if files is not None}
    root, counts, findings = labeled.root, labeled.counts(), list[Finding]()
    for side, files in [*sides.items()][1:]:
        whole, other = root.resolve(), files.root.resolve()
        inside = whole in other.parents
        # The folder of unlabeled pictures may hold all pictures.
        if inside or (other in whole.parents and side != "unlabeled"):
            inner, outer = ((side, files.root), ("labeled", root))[:: 1 if inside else -1]
            what = (
                f"the {inner[0]} folder {shown(inner[1])} lies inside the {outer[0]} folder "
                f"{shown(outer[1])}"
            )
            findings.append(
                Finding(
                    "error", f"{what}, every subfolder of which is a class; expected one beside it."
                )
            )
            if side != "unlabeled":
                # A folder around the labeled one has copies of all in it, which says nothing more.
                del sides[side]
    if len(counts) < 2:
        findings.append(
            Finding("error", f"{root} has one class, {few(counts)}; expected two or more folders.")
        )
    if empty := [name for name, count in counts.items() if count == 0]:
        findings.append(
            Finding(
                "error", f"{root} has no picture of {few(empty)}; add some, or remove the folder."
            )
        )
    if copies:
        findings += find_copies(sides, progress)
    for side, held_out in (("validation", validation), ("test", test)):
        if held_out is None:
            continue
        found, folder = held_out.counts(), f"the {side} folder {held_out.root}"
        if unknown := [label for label, count in found.items() if label not in counts and count]:
            what = (
                f"{folder} has classes that {root} does not: {few(unknown)}; expected folders of "
                "the same names."
            )
            findings.append(Finding("error", what))
        if missing := [label for label in counts if not found.get(label)]:
            what = f"{folder} has no picture of {few(missing)}: nothing is measured there."
            findings.append(Finding("warning", what))
    return sorted(findings, key=lambda finding: finding.level != "error")


# ------------------------------------------------------------------------------------------- copies


class _File(NamedTuple):
    side: str
    path: str
    label: int = 0


def find_copies(
    sides: Mapping[str, Files], progress: Progress = silent, *, trained: bool = False
) -> Iterator[Finding]:
    """Find pictures that stand on several sides, or in several classes, by their bytes.

    See :func:`check_folders`.

    Args:
        sides: the labeled files, and of unlabeled, validation and test ones what there is.
        trained: the labeled and unlabeled ones were already trained on, so that the others are to
            be mended.
    """

    def on(group: list[_File], side: str) -> list[str]:
        return [file.path for file in group if file.side == side]

    def contradict(group: list[_File]) -> bool:
        return len({file.label for file in group if file.side == "labeled"}) > 1

    groups = _same_bytes(
        sides, lambda group: contradict(group) or len({file.side for file in group}) > 1, progress
    )
    for held_out, other in (
        *(
            (held_out, other)
            for held_out in ("test", "validation")
            for other in ("labeled", "unlabeled")
        ),
        ("test", "validation"),
    ):
        pairs = [
            (path, copy)
            for group in groups
            for copy in on(group, other)[:1]
            for path in on(group, held_out)
        ]
        if pairs:
            harmless = other == "validation"
            named = few(path + f" is {copy}" * (path != copy) for path, copy in pairs)
            spoilt = (
                "what is selected on them looks better than it is"
                if harmless
                else "the result would be too good"
            )
            yield Finding(
                "warning" if harmless else "error",
                f"{len(pairs)} {held_out} pictures are among the {other} ones too: {named}; "
                f"{spoilt}: remove them from the {held_out if trained else other} folder.",
                f"{held_out} copies",
            )
    twice = sum(len(on(group, "labeled")) for group in groups if on(group, "unlabeled"))
    if "unlabeled" in sides and twice == len(sides["labeled"]):
        # Usual in the papers, and of no use where there are no others.
        note = f"they are {twice:,} of its {len(sides['unlabeled']):,}"
        what = (
            f"all labeled pictures are in the unlabeled folder {sides['unlabeled'].root} too: "
            f"{note}"
        )
        yield Finding("warning", what, "labeled copies")
    if doubtful := [on(group, "labeled") for group in groups if contradict(group)]:
        what = (
            f"pictures in more than one class, {len(doubtful)}: "
            f"{few(map(' and '.join, doubtful))}; keep one."
        )
        yield Finding("error", what, "contradiction")


def same_pictures(files: Files, others: Files) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the paths in one folder, and in another, of each picture that both have."""
    for group in _same_bytes(
        {"own": files, "other": others}, lambda group: len({file.side for file in group}) == 2
    ):
        yield (
            [file.path for file in group if file.side == "own"],
            [f.path for f in group if f.side == "other"],
        )


def without_copies(files: FilesT, of: Files) -> FilesT:
    """Those of the files that another folder does not have too."""
    copies = {path for own, _ in same_pictures(files, of) for path in own}
    return (
        files.keep([i for i, path in enumerate(files.paths()) if path not in copies])
        if copies
        else files
    )


def _same_bytes(
    sides: Mapping[str, Files], matters: Callable[[list[_File]], bool], progress: Progress = silent
) -> list[list[_File]]:
    """Yield groups of files with the same bytes.

    ``matters`` says of a group that is alike so far whether it is compared further. Each key costs
    more than the one before and sees fewer files. Uncompressed pictures all have one size, so a
    piece of them is compared before all their bytes.
    """
    groups, compared = [list[_File]()], 0
    for side, files in sides.items():
        labels = files.labels if isinstance(files, LabeledFiles) else [0] * len(files)
        groups[0] += (_File(side, *one) for one in zip(files.paths(), labels, strict=True))
    for key in (size_of, _middle, digest):
        alike = []
        for group in groups:
            by_key: defaultdict[Hashable, list[_File]] = defaultdict(list)
            for file in group:
                by_key[ask(key, file.path)].append(file)
                compared += key is _middle
            by_key.pop(None, None)
            alike += [same for same in by_key.values() if len(same) > 1 and matters(same)]
            progress(compared)
        groups = alike
    return groups


def _middle(path: str) -> bytes:
    """4 KiB from the middle: the beginning is often a header that all files share."""
    with open_picture(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) // 2 - 2048))
        return file.read(4096)
