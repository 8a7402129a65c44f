"""Folders of images.

The files in them, their classes and bytes, and what is wrong, found before a training begins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few, reason_of
from metapl.pictures.reader import (
    SUFFIXES,
    TAR,
    Levels,
    UnreadableImage,
    open_picture,
    read_image,
    size_of,
    tar_members,
)
from metapl.words import composed, shown

# Called now and then with the number of files that are done.
Progress = Callable[[int], object]

FilesT = TypeVar("FilesT", bound="Files")
T = TypeVar("T")

# The most files of a folder whose bytes are all hashed, and the most bytes. Of larger folders,
# names and sizes are taken.
WHOLE_UP_TO = 5_000
WHOLE_BYTES = 2**30

# The most files that are decoded before a training, and the most bytes.
DECODE_UP_TO = 5_000
DECODE_BYTES = 2**29

# Names that systems give to folders and files of their own.
SYSTEM_NAMES = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db")

# The flags of the parts of a data set, and the names that their folders have.
PARTS = {
    "--labeled": ("train", "training", "labeled"),
    "--val": ("val", "valid", "validation", "dev"),
    "--test": ("test", "testing"),
    "--unlabeled": ("unlabeled",),
}


# Files by which the forms are known in which CIFAR and SVHN are released, and the name of the set.
# Parquet files do not say by their names what they are of; CIFAR-100's are read by either name.
RELEASED = {
    "cifar-10-batches-py/data_batch_1": "cifar10",
    "data_batch_1.bin": "cifar10",
    "train*.parquet": "cifar10",
    "cifar-100-python/train": "cifar100",
    "train.bin": "cifar100",
    "train_32x32.mat": "svhn",
}


def silent(done: int) -> None:
    """Take the number of files that are done, and say nothing."""


@dataclass(frozen=True)
class Files:
    """The pictures below a folder.

    Args:
        root: the folder.
        names: of the pictures, relative to the folder, with slashes, in the order of their
            characters.
        passed_over: the number of other files by suffix, and of pictures in no folder of a class.
    """

    root: Path
    names: tuple[str, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return where a file is."""
        return self.root / self.names[index]

    def paths(self) -> Iterator[str]:
        """Return where the files are."""
        folder = os.path.join(self.root, "")
        return (folder + name for name in self.names)

    def keep(self: FilesT, indices: Sequence[int]) -> FilesT:
        """Return the same folder with some of its files."""
        return dataclasses.replace(self, names=tuple(self.names[i] for i in indices))

    def without_repeats(self) -> Files:
        """Return the same pictures, each of them once, however often a list names it."""
        return Files(self.root, tuple(dict.fromkeys(self.names)), self.passed_over)


@dataclass(frozen=True)
class LabeledFiles(Files):
    """The pictures of a folder that holds one folder a class.

    Args:
        classes: the names of the class folders in NFC, in the order of their characters.
        labels: of each file, an index into the classes.
    """

    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def keep(self, indices: Sequence[int]) -> LabeledFiles:
        """Return the same folder with some of its files, and their labels."""
        labels = tuple(self.labels[i] for i in indices)
        return dataclasses.replace(super().keep(indices), labels=labels)

    def targets(self, classes: Sequence[str] | None = None) -> Tensor:
        """Return the labels, int64 (n,), as indices into ``classes``, or into the folder's own.

        Raises:
            MetaplError: there are pictures of another class.
        """
        expected = self.classes if classes is None else classes
        numbers = {composed(name): number for number, name in enumerate(expected)}
        names = [self.classes[label] for label in self.labels]
        unknown = sorted({*names} - numbers.keys())
        if unknown:
            raise MetaplError(
                f"{self.root} has pictures of {few(unknown)}; expected {few(numbers, 20)} alone."
            )
        return torch.tensor([numbers[name] for name in names], dtype=torch.int64)

    def counts(self) -> dict[str, int]:
        """Return the number of pictures of each class."""
        counts = Counter(self.labels)
        return {name: counts[label] for label, name in enumerate(self.classes)}


def scan_unlabeled(folder: str | Path) -> Files:
    """List the pictures of a folder and all folders in it.

    Their order depends on their names alone. Files are known by their suffix, and not opened.
    Hidden ones and those of systems (``.name``, ``__MACOSX``, ``@eaDir``) are left out; links are
    followed, and a folder is listed once. Where there are tar files and no pictures, the pictures
    in these are listed: ``000000.tar/deep/er/a.png``. In the place of a folder may stand a text
    file with the path of a picture in each line, from the file's own folder on. A picture counts
    as often as the file names it, as in a selection whose classes were balanced. Cost: about a
    second for 100,000 files.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "deep" / "er").mkdir(parents=True)
    >>> _ = (root / "deep" / "er" / "a.PNG").write_bytes(b""), (root / "b.jpg").write_bytes(b"")
    >>> scan_unlabeled(root).names
    ('b.jpg', 'deep/er/a.PNG')
    """
    root = Path(folder).expanduser()
    if root.suffix.lower() == ".txt" and root.is_file():
        root, files = _files_of_list(root)
    else:
        files = _files_below(root)
    names, passed_over = _pictures(files)
    if not names and passed_over[TAR]:
        files_in_tars: list[str] = []
        for name in files:
            if name.endswith(TAR):
                files_in_tars += [f"{name}/{member}" for member in _members_of(root / name)]
        names, passed_over = _pictures(files_in_tars)
    if not names:
        raise _none_found(root, passed_over, files)
    return Files(root, names, passed_over)


def _files_of_list(file: Path) -> tuple[Path, list[str]]:
    """Return the folder that the files of a list have in common, and the files relative to it."""
    # Editors of some systems begin a file with a mark of its encoding, and end lines by two
    # characters. Others at which text may be split are part of a name.
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    times: Counter[str] = Counter()
    for line, count in Counter(filter(None, lines)).items():
        times[_path_on_disk(os.path.abspath(file.parent / line))] += count
    if not times:
        return file, []
    root = os.path.commonpath([os.path.dirname(path) for path in times])
    names = {os.path.relpath(path, root): count for path, count in times.items()}
    return Path(root), [*Counter(names).elements()]


def _path_on_disk(path: str) -> str:
    """Return a path in the form that the file has on the disk, or as it is where there is none."""
    for form in (path, composed(path), unicodedata.normalize("NFD", path)):
        if os.path.lexists(form):
            return form
    return path


def _files_below(root: Path, above: Path | None = None) -> list[str]:
    """Return all visible files below a folder, relative to it.

    Args:
        root: the folder.
        above: a folder that counts as listed already.
    """
    files: list[str] = []
    for _, files_of_folder in _listed(root, above):
        files += files_of_folder
    return files


def _members_of(tar: Path) -> list[str]:
    """Return the names of the visible members of a tar file; refuse a name that stands twice."""
    names = []
    for name, _, _ in tar_members(tar):
        if all(map(_is_visible, name.split("/"))):
            names.append(name)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise MetaplError(
            f"{shown(tar)} has {few(repeated)} more than once; expected each name once."
        )
    return names


def scan_labeled(folder: str | Path) -> LabeledFiles:
    """List the pictures of a folder that holds one folder a class, with all folders in those.

    Files are found as by :func:`scan_unlabeled`, without lists and tar files. Folders whose names
    differ in their Unicode form alone are one class.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("cat/1.png", "dog/2.png", "dog/3.png"):
    ...     (root / name).parent.mkdir(exist_ok=True)
    ...     _ = (root / name).write_bytes(b"")
    >>> scan_labeled(root).classes, scan_labeled(root).labels
    (('cat', 'dog'), (0, 1, 1))
    """
    root = Path(folder).expanduser()
    folders, files = next(_listed(root))
    if not folders:
        raise MetaplError(
            f"{root} has no folder in it; expected a folder for each class, such as "
            f"{root.name}/cat{_way_to_folders(root, files)}"
        )
    # Pictures beside the class folders have no class.
    loose, passed_over = _pictures(files)
    if loose:
        passed_over["no class folder"] = len(loose)
    names: list[str] = []
    labels: list[int] = []
    classes = sorted({composed(folder) for folder in folders})
    for folder in sorted(folders, key=composed):
        pictures, others = _pictures(_files_below(root / folder, above=root))
        names += [f"{folder}/{picture}" for picture in pictures]
        labels += [classes.index(composed(folder))] * len(pictures)
        passed_over.update(others)
    if not names:
        raise _none_found(root, passed_over, _files_below(root))
    return LabeledFiles(root, tuple(names), passed_over, tuple(classes), tuple(labels))


def _none_found(root: Path, passed_over: Mapping[str, int], files: Iterable[str]) -> MetaplError:
    """Return the error of a folder without pictures, which says what is in it."""
    others = ""
    if passed_over:
        kinds = [f"{count} with {suffix}" for suffix, count in sorted(passed_over.items())]
        others = f", only {', '.join(kinds)}"
    return MetaplError(
        f"{root} has no picture in it{others}; expected files that end with {', '.join(SUFFIXES)}"
        f"{_way_to_folders(root, files)}."
    )


def _way_to_folders(root: Path, files: Iterable[str]) -> str:
    """Return the command that writes CIFAR or SVHN, as it is released, as folders of pictures.

    Args:
        root: a folder.
        files: the files below it, relative to it; where there is no such set, nothing is returned.
    """
    for file in files:
        path = root.resolve() / file
        for pattern, name in RELEASED.items():
            if path.match(pattern):
                place = shlex.quote(str(path.parents[pattern.count("/")]))
                return (
                    f"; if these are CIFAR or SVHN as released, `python examples/set_folders.py "
                    f"--name {name} --root {place} --per-class 400 --out {name}-folders` writes "
                    "their pictures as folders"
                )
    return ""


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
    """Yield the folders in each folder, and its files relative to the root.

    They are those of :func:`walk`, without hidden names.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise MetaplError(f"{root} {state}; expected a folder with pictures.")

    def refuse(error: OSError) -> NoReturn:
        raise MetaplError(f"{shown(error.filename)} cannot be listed: {error.strerror}.") from error

    for folder, folders, files in walk(root, refuse, above):
        # What is not in the list is not gone into.
        folders[:] = filter(_is_visible, folders)
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        yield folders, [prefix + name for name in files if _is_visible(name)]


def _is_visible(name: str) -> bool:
    """Return whether a file or folder is one of the user's, and not of the system."""
    return not name.startswith(".") and name.lower() not in SYSTEM_NAMES


def walk(
    root: str | Path, refuse: Callable[[OSError], None], above: str | Path | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield folders, each once, with the sorted names of the folders and the files in them.

    Links are followed. What is taken from the list of a folder's folders is not gone into.

    Args:
        root: the first folder.
        refuse: is called with the error where a folder cannot be listed.
        above: a folder that counts as listed already.
    """
    listed: set[tuple[int, int]] = set()
    if above is not None:
        listed.add(_identity(os.fspath(above)))
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        identity = ask(_identity, folder)
        if identity is None or identity in listed:
            folders.clear()
            continue
        listed.add(identity)
        folders.sort()
        yield folder, folders, sorted(files)


def _identity(folder: str) -> tuple[int, int]:
    """Return what a folder and a link to it have in common."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def digest(path: str) -> bytes:
    """Return the SHA-256 of a file's bytes."""
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
    bytes_of_all = sum(size or 0 for size in sizes)
    reads_bytes = len(sizes) <= WHOLE_UP_TO and bytes_of_all <= WHOLE_BYTES
    sha256 = hashlib.sha256()
    labels: Sequence[int | None] = [None] * len(sizes)
    if isinstance(files, LabeledFiles):
        labels = files.labels
    for name, label, path, size in zip(files.names, labels, files.paths(), sizes, strict=True):
        content = str(size).encode()
        if reads_bytes:
            content = ask(digest, path) or b""
        sha256.update(f"{name}\0{label}\0".encode("utf-8", "surrogateescape") + content)
    if reads_bytes:
        return sha256.hexdigest()
    return f"names and sizes: {sha256.hexdigest()}"


def hashes(**parts: Any) -> dict[str, str]:
    """Return the SHA-256 of each part of examples in memory: tensors, or tuples of them.

    >>> hashes(x=torch.zeros(2))["x"][:8]
    '46d4846c'
    """
    digests = {}
    for name, part in parts.items():
        sha256 = hashlib.sha256()
        for tensor in pytree.tree_leaves(part):
            sha256.update(f"{tensor.dtype} {tuple(tensor.shape)}:".encode())
            sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        digests[name] = sha256.hexdigest()
    return digests


# -------------------------------------------------------------------------------- files, one by one


@dataclass(frozen=True)
class Verified:
    """What :func:`verify_files` found.

    Args:
        sound: the indices of the files that can be used.
        skipped: the names of the others, each with the reason.
    """

    sound: tuple[int, ...]
    skipped: dict[str, str]

    def summary(self) -> str:
        """Return a line for each reason, the most frequent first, with the first few files.

        >>> Verified((0,), {"a.png": "the file is empty", "b.png": "the file is empty"}).summary()
        '2 skipped: the file is empty (a.png, b.png)'
        """
        names_by_reason: defaultdict[str, list[str]] = defaultdict(list)
        for name, reason in self.skipped.items():
            # What stands in brackets is of this file alone.
            names_by_reason[reason.split(" (")[0]].append(name)
        ranked = sorted(names_by_reason.items(), key=lambda entry: -len(entry[1]))
        lines = [f"{len(names)} skipped: {reason} ({few(names)})" for reason, names in ranked]
        return "\n".join(lines)


def verify_files(
    files: Files, *, progress: Progress = silent, levels: Levels | None = None
) -> Verified:
    """Find which files can be used, and why the others cannot.

    Up to 5,000 files and half a gigabyte are decoded; of more, the size alone is asked for, and
    what is found broken while training is replaced there (see
    :class:`metapl.pictures.FileImages`).

    Args:
        files: to look at.
        progress: is called with the number of files that were looked at.
        levels: as for :func:`metapl.pictures.read_image`.

    Cost: per file, about 0.01 ms for the size, or one decoding.
    """
    sizes = [ask(size_of, path) or 0 for path in files.paths()]
    decodes = len(sizes) <= DECODE_UP_TO and sum(sizes) <= DECODE_BYTES
    sound: list[int] = []
    skipped: dict[str, str] = {}
    for index, path in enumerate(files.paths()):
        try:
            if decodes:
                # To a small size, JPEGs are decoded several times as fast.
                read_image(path, size=(1, 1), levels=levels)
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

    Errors: fewer than two classes; classes whose names differ in blanks or marks that are not seen;
    parts of a data set in the place of classes; another of these folders inside that of the
    classes; a class without pictures; a class of validation or test that training does not know; a
    picture of test or validation, by its bytes, among the labeled or unlabeled ones, or in two
    classes. Warnings: a picture of test in validation; a class that validation or test lacks; a
    class with one picture; classes whose names differ in case alone; all labeled pictures among the
    unlabeled ones.

    Args:
        labeled: the pictures with labels.
        unlabeled, validation, test: the others, as far as there are any.
        progress: is called with the number of files whose bytes were compared.
        copies: whether bytes are compared.

    Cost: one question to the file system for each file. Bytes are read only of files that another
    side has with the same size, and beyond 4 KiB only where these agree too.
    """
    sides: dict[str, Files] = {"labeled": labeled}
    if unlabeled is not None:
        sides["unlabeled"] = unlabeled
    if validation is not None:
        sides["validation"] = validation
    if test is not None:
        sides["test"] = test
    root = labeled.root
    counts = labeled.counts()
    findings: list[Finding] = []

    # 1. Folders in each other.
    for side in ("unlabeled", "validation", "test"):
        if side not in sides:
            continue
        nested = _nested(labeled, side, sides[side])
        if nested is not None:
            findings.append(nested)
            if side != "unlabeled":
                # A folder around the labeled one has copies of all in it, which says nothing more.
                del sides[side]

    # 2. Classes to learn.
    parts = _parts_for_classes(labeled)
    if parts is not None:
        findings.append(parts)
    elif len(counts) < 2:
        text = f"{root} has one class, {few(counts)}; expected two or more folders"
        if any(name.count("/") > 1 for name in labeled.names):
            deepest, _ = _classes_below(root / labeled.names[0].split("/")[0])
            if len(deepest.classes) > 1:
                text += f", as in {shown(deepest.root)}: {few(deepest.classes)}"
        findings.append(Finding("error", f"{text}."))
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        text = f"{root} has no picture of {few(empty)}; add some, or remove the folder."
        findings.append(Finding("error", text))
    single = [name for name, count in counts.items() if count == 1]
    if single:
        text = f"{root} has one picture of {few(single)}: it is learned or measured, and not both."
        findings.append(Finding("warning", text))
    findings += _names_alike(root, counts)

    # 3. The same pictures on several sides.
    if copies:
        findings += find_copies(sides, progress)

    # 4. Classes that are measured.
    for side, held_out in (("validation", validation), ("test", test)):
        if held_out is None:
            continue
        held_out_counts = held_out.counts()
        folder = f"the {side} folder {held_out.root}"
        unknown = [name for name, count in held_out_counts.items() if count and name not in counts]
        if unknown:
            looks = {_look(name) for name in counts}
            names = [repr(name) if _look(name) in looks else name for name in unknown]
            text = (
                f"{folder} has classes that {root} does not: {few(names)}; expected folders of "
                "the same names."
            )
            findings.append(Finding("error", text))
        missing = [name for name in counts if not held_out_counts.get(name)]
        if missing:
            text = f"{folder} has no picture of {few(missing)}: nothing is measured there."
            findings.append(Finding("warning", text))
    return sorted(findings, key=lambda finding: finding.level != "error")


def _names_alike(root: Path, names: Iterable[str]) -> list[Finding]:
    """Return what is wrong with classes whose names look alike.

    Blanks around a name, other kinds of blanks and marks without a width are seen by nobody.
    """
    names_by_look: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        names_by_look[_look(name).casefold()].append(name)
    by_case: list[str] = []
    by_marks: list[str] = []
    for alike in names_by_look.values():
        if len(alike) > 1:
            has_marks = any(name != _look(name) for name in alike)
            (by_marks if has_marks else by_case).extend(alike)
    findings = []
    if by_marks:
        text = (
            f"{few(map(repr, by_marks))} in {root} are {len(by_marks)} classes: names among them "
            "differ in blanks or marks that are not seen alone; expected one folder for each class."
        )
        findings.append(Finding("error", text))
    if by_case:
        text = (
            f"{few(by_case)} in {root} are {len(by_case)} classes: their names differ in case "
            "alone."
        )
        findings.append(Finding("warning", text))
    return findings


def _look(name: str) -> str:
    """Return what is seen of a name: without marks, and with one blank for several of any kind."""
    letters = []
    for letter in name:
        if unicodedata.category(letter) not in ("Cc", "Cf") or letter.isspace():
            letters.append(letter)
    return " ".join("".join(letters).split())


# The share of pictures that may lie beside the folders of parts, such as an overview of each.
FEW_OWN_PICTURES = 0.1


def _parts_for_classes(labeled: LabeledFiles) -> Finding | None:
    """Return what is wrong where parts of a data set may stand in the place of its classes."""
    parts = [name for name, count in labeled.counts().items() if count]
    with_folders = {composed(name).split("/")[0] for name in labeled.names if name.count("/") > 1}
    flags = []
    without_classes = []
    for flag, names in PARTS.items():
        for name in parts:
            if name.lower() not in names:
                continue
            if flag == "--unlabeled" or name in with_folders:
                flags.append(f"{flag} {shown(labeled.root / name)}")
            else:
                without_classes.append(name)
    if parts and len(flags) + len(without_classes) == len(parts):
        words = [" ".join(flags)] if flags else []
        if without_classes:
            words.append(f"one folder a class in {few(without_classes)}")
        text = f"{labeled.root} has parts of a data set, {few(parts)}; expected {', '.join(words)}"
        return Finding("error", f"{text}.")
    if len(parts) < 2 or _has_own_pictures(labeled):
        # Folders with pictures of their own are classes.
        return None
    shared, folder = _shared_folders(labeled)
    if shared:
        deepest, between = _classes_below(folder)
        candidates = " or ".join([few(parts), *between])
        return Finding(
            "error",
            f"{few(parts)} in {labeled.root} all have the folders {few(shared)} and hardly a "
            f"picture of their own; expected one folder a class, as in {shown(deepest.root)}, or, "
            f"where {candidates} are the classes, their pictures without folders between.",
        )
    places = [composed(name).split("/") for name in labeled.names if name.count("/") > 1]
    # Two hospitals, say, that have not the same classes, or patients of whom each has one.
    inner = {(place[0], place[1]) for place in places}
    folders_of_part = Counter(part for part, _ in inner)
    parts_of_folder = Counter(folder for _, folder in inner)
    repeated = sorted(folder for folder, count in parts_of_folder.items() if count > 1)
    all_repeat = len(parts_of_folder) > 1 and len(repeated) == len(parts_of_folder)
    if repeated and (all_repeat or min(folders_of_part.values()) > 1):
        return Finding(
            "warning",
            f"{few(parts)} in {labeled.root} are taken for the classes, and several of them have "
            f"the folders {few(repeated)}; if those are the classes, expected one folder for each.",
        )
    return None


def _has_own_pictures(labeled: LabeledFiles) -> bool:
    """Return whether the folders have more than a few pictures that lie in no folder below."""
    own_pictures = sum(name.count("/") == 1 for name in labeled.names)
    return own_pictures > FEW_OWN_PICTURES * len(labeled.names)


def _shared_folders(labeled: LabeledFiles) -> tuple[list[str], Path]:
    """Return the folders that all parts of a data set have, and a folder that has them.

    There are none where the parts are not alike.
    """
    deep = [name for name in labeled.names if name.count("/") > 1]
    # The folders that are alike may lie deeper: in hospitals, then in years.
    for level in (1, -2):
        folders_by_part: defaultdict[str, set[str]] = defaultdict(set)
        for name in deep:
            place = composed(name).split("/")
            folders_by_part[place[0]].add(place[level])
        if not folders_by_part:
            break
        shared = set.intersection(*folders_by_part.values())
        all_folders = set.union(*folders_by_part.values())
        if len(shared) > 1 and 2 * len(shared) >= len(all_folders):
            return sorted(shared), labeled.root.joinpath(*deep[0].split("/")[:level])
    return [], labeled.root


def _classes_below(folder: Path) -> tuple[LabeledFiles, list[str]]:
    """Return a folder of classes at or below this one, and the levels between them in words.

    A level whose folders all have the same ones, in years for example, is none of classes.
    """
    labeled = scan_labeled(folder)
    between: list[str] = []
    while not _has_own_pictures(labeled):
        shared, inner = _shared_folders(labeled)
        if not shared:
            break
        between.append(few(labeled.classes))
        labeled = scan_labeled(inner)
    return labeled, between


def _nested(labeled: LabeledFiles, side: str, files: Files) -> Finding | None:
    """Return an error where a folder lies in the labeled one, or around it."""
    labeled_root = labeled.root.resolve()
    other_root = files.root.resolve()
    labeled_folder = f"the labeled folder {shown(labeled.root)}"
    other_folder = f"the {side} folder {shown(files.root)}"
    if labeled_root in other_root.parents:
        inner = other_folder
        outer = labeled_folder
    elif other_root in labeled_root.parents and side != "unlabeled":
        inner = labeled_folder
        outer = other_folder
    else:
        # The folder of unlabeled pictures may hold all pictures.
        return None
    return Finding(
        "error",
        f"{inner} lies inside {outer}, every subfolder of which is a class; expected one beside "
        "it.",
    )


# ------------------------------------------------------------------------------------------- copies

# The sides whose pictures are to be on no other one, with the others.
APART = (
    ("test", "labeled"),
    ("test", "unlabeled"),
    ("validation", "labeled"),
    ("validation", "unlabeled"),
    ("test", "validation"),
)


class _File(NamedTuple):
    """A file, the side that it is on, and its label there."""

    side: str
    path: str
    label: int = 0


# Files with the same bytes.
_Group = list[_File]


def find_copies(
    sides: Mapping[str, Files], progress: Progress = silent, *, trained: bool = False
) -> Iterator[Finding]:
    """Yield what is wrong with pictures that stand on several sides, or in several classes.

    They are compared by their bytes. See :func:`check_folders`.

    Args:
        sides: the labeled files, and of unlabeled, validation and test ones what there is.
        progress: is called with the number of files whose bytes were compared.
        trained: whether the labeled and unlabeled ones were already trained on, so that the others
            are to be mended.
    """
    groups = _same_bytes(sides, _is_remarkable, progress)
    for held_out, other in APART:
        pairs = []
        for group in groups:
            copies = _paths_on(group, other)
            if copies:
                pairs += [(path, copies[0]) for path in _paths_on(group, held_out)]
        if pairs:
            yield _copies_found(pairs, held_out, other, trained=trained)
    repeated = 0
    contradicting = []
    for group in groups:
        labeled_paths = _paths_on(group, "labeled")
        if _paths_on(group, "unlabeled"):
            repeated += len(labeled_paths)
        if _has_several_labels(group):
            contradicting.append(" and ".join(_path_by_label(group).values()))
    unlabeled = sides.get("unlabeled")
    is_another_folder = unlabeled is not None and unlabeled.root != sides["labeled"].root
    if unlabeled is not None and is_another_folder and repeated == len(sides["labeled"]):
        # Usual in the papers, and of no use where there are no others.
        text = (
            f"all labeled pictures are in the unlabeled folder {unlabeled.root} too: they are "
            f"{repeated:,} of its {len(unlabeled):,}"
        )
        yield Finding("warning", text, "labeled copies")
    if contradicting:
        text = (
            f"pictures in more than one class, {len(contradicting)}: {few(contradicting)}; keep "
            "one."
        )
        yield Finding("error", text, "contradiction")


def _copies_found(
    pairs: Sequence[tuple[str, str]], held_out: str, other: str, *, trained: bool
) -> Finding:
    """Return what is wrong with pictures of a held-out side that are on another one too.

    Args:
        pairs: the path of each picture, and that of a copy.
        held_out: the side of the pictures.
        other: the side of the copies.
        trained: as for :func:`find_copies`.
    """
    named = few([path if path == copy else f"{path} is {copy}" for path, copy in pairs], most=2)
    level: Literal["error", "warning"] = "error"
    harm = "the result would be too good"
    if other == "validation":
        level = "warning"
        harm = "what is selected on them looks better than it is"
    mended = f"remove them from the {held_out} folder" if trained else "keep each in one of the two"
    return Finding(
        level,
        f"{len(pairs)} {held_out} pictures are among the {other} ones too: {named}; {harm}: "
        f"{mended}.",
        f"{held_out} copies",
    )


def _paths_on(group: _Group, side: str) -> list[str]:
    """Return the paths of the files of a group that are on a side."""
    return [file.path for file in group if file.side == side]


def _has_several_labels(group: _Group) -> bool:
    """Return whether labeled files of a group are in several classes."""
    return len(_path_by_label(group)) > 1


def _path_by_label(group: _Group) -> dict[int, str]:
    """Return the path of a labeled file of each class."""
    return {file.label: file.path for file in reversed(group) if file.side == "labeled"}


def _is_on_several_sides(group: _Group) -> bool:
    return len({file.side for file in group}) > 1


def _is_remarkable(group: _Group) -> bool:
    """Return whether files of a group are on several sides, or labeled ones in several classes."""
    return _has_several_labels(group) or _is_on_several_sides(group)


def without_copies(files: FilesT, others: Files) -> FilesT:
    """Return those of the files that another folder does not have too."""
    copies: set[str] = set()
    for group in _same_bytes({"files": files, "others": others}, _is_on_several_sides):
        copies.update(_paths_on(group, "files"))
    if not copies:
        return files
    return files.keep([i for i, path in enumerate(files.paths()) if path not in copies])


def _same_bytes(
    sides: Mapping[str, Files], matters: Callable[[_Group], bool], progress: Progress = silent
) -> list[_Group]:
    """Return groups of files with the same bytes.

    Files are compared by one key after another. Each costs more than the one before, and sees fewer
    files. Uncompressed pictures all have one size, so a piece of them is compared before all their
    bytes.

    Args:
        sides: the files.
        matters: says of a group that is alike so far whether it is compared further.
        progress: is called with the number of files whose bytes were compared.
    """
    all_files: _Group = []
    for side, files in sides.items():
        labels: Sequence[int] = [0] * len(files)
        if isinstance(files, LabeledFiles):
            labels = files.labels
        for path, label in zip(files.paths(), labels, strict=True):
            all_files.append(_File(side, path, label))
    groups = [all_files]
    compared = 0
    for key in (size_of, _middle, digest):
        groups_alike: list[_Group] = []
        for group in groups:
            files_by_key: defaultdict[Hashable, _Group] = defaultdict(list)
            for file in group:
                files_by_key[ask(key, file.path)].append(file)
                if key is _middle:
                    compared += 1
            # Files that cannot be read are like no others.
            files_by_key.pop(None, None)
            for alike in files_by_key.values():
                if len(alike) > 1 and matters(alike):
                    groups_alike.append(alike)
            progress(compared)
        groups = groups_alike
    return groups


def _middle(path: str) -> bytes:
    """Return 4 KiB from the middle: the beginning is often a header that all files share."""
    with open_picture(path) as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length // 2 - 2048))
        return file.read(4096)
