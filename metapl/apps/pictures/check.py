"""What is wrong with files and folders of pictures, found before a training begins."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from metapl.apps.pictures.folders import Files, FilesT, LabeledFiles, Progress, ask, digest, silent
from metapl.apps.pictures.reader import UnreadableImage, read_image
from metapl.apps.pictures.tar import open_picture, size_of, status_of
from metapl.errors import few
from metapl.words import shown

# ------------------------------------------------------------------------------------------------- files, one by one

DECODE_UP_TO, DECODE_BYTES = 5_000, 2**29


@dataclass(frozen=True)
class Verified:
    """What :func:`verify_files` found: the indices of the files that passed, and the names of the others with the
    reason."""

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
        return "\n".join(f"{len(names)} skipped: {reason} ({few(names)})" for reason, names in ranked)


def verify_files(files: Files, *, progress: Progress = silent) -> Verified:
    """Find which files can be used, and why the others cannot.

    Up to 5,000 files and half a gigabyte are decoded; of more, the size alone is asked for, and what is found broken
    while training is replaced there (see :class:`metapl.apps.pictures.FileImages`). ``progress`` is called with the
    number of files examined.

    Cost: per file, about 0.01 ms for the size, or one decoding.
    """
    sizes: list[int | str] = []  # or why it is not a file to read
    for path in files.paths():
        try:
            mode, size = status_of(path)
            sizes.append((size or "the file is empty") if stat.S_ISREG(mode) else "it is no plain file")
        except OSError as error:
            sizes.append(error.strerror or type(error).__name__)
    total = sum(size for size in sizes if isinstance(size, int))
    decode = len(sizes) <= DECODE_UP_TO and total <= DECODE_BYTES
    sound, skipped = [], {}
    for index, (path, found) in enumerate(zip(files.paths(), sizes, strict=True)):
        fault = found if isinstance(found, str) else None
        try:
            if fault is None and decode:
                read_image(path, size=(1, 1))  # of a size, JPEGs are decoded several times as fast
        except UnreadableImage as error:
            fault = error.reason
        if fault is None:
            sound.append(index)
        else:
            skipped[files.names[index]] = fault
        progress(index + 1)
    return Verified(tuple(sound), skipped)


# ------------------------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Finding:
    """A problem with the folders that a user should know about before training.

    An "error" makes results wrong or training impossible; a "warning" may be meant so. The kind is "classes",
    "contradiction", or of which pictures there are copies: "test copies", "validation copies" or "labeled copies".
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
) -> list[Finding]:
    """Find what would spoil a training with these folders; errors come first.

    Errors: fewer than two classes; another of these folders inside that of the classes; a class without pictures; a
    class of validation or test that training does not know; a picture of test or validation, by its bytes, among the
    labeled or unlabeled ones, or in two classes. Warnings: a picture of test in validation; a class that validation or
    test lacks; all labeled pictures among the unlabeled ones. ``progress`` is called with the number of files whose
    bytes were compared.

    Cost: one question to the file system for each file. Bytes are read only of files that another side has with the
    same size, and beyond 4 KiB only where these agree too.
    """
    held_out = {name: files for name, files in (("validation", validation), ("test", test)) if files is not None}
    others = held_out if unlabeled is None else {"unlabeled": unlabeled, **held_out}
    nested = find_nested(labeled, {name: files.root for name, files in others.items()})
    # A held-out folder around the labeled one has copies of all that lies in it, which says nothing more.
    beside = {name: files for name, files in held_out.items() if name not in nested}
    root, counts, findings = labeled.root, labeled.counts(), [*nested.values()]
    if len(counts) < 2:
        findings.append(Finding("error", f"{root} has one class, {few(counts)}; expected two or more folders."))
    if empty := [name for name, count in counts.items() if count == 0]:
        findings.append(Finding("error", f"{root} has no picture of {few(empty)}; add some, or remove the folder."))
    findings += find_copies(labeled, unlabeled, beside.get("validation"), beside.get("test"), progress)
    for name, files in held_out.items():
        findings += find_other_classes(labeled, files, name)
    return sorted(findings, key=lambda finding: finding.level != "error")


def find_nested(labeled: LabeledFiles, others: Mapping[str, Path]) -> dict[str, Finding]:
    """By name, which of the unlabeled, validation and test folders lie inside that of the classes, where they would
    count as classes or as pictures of one, and which held-out ones around it."""
    root, found = labeled.root.resolve(), {}
    for name, other in others.items():
        inside = root in other.resolve().parents
        if inside or (other.resolve() in root.parents and name != "unlabeled"):
            inner, outer = ((name, other), ("labeled", root))[:: 1 if inside else -1]
            what = f"the {inner[0]} folder {shown(inner[1])} lies inside the {outer[0]} folder {shown(outer[1])}"
            found[name] = Finding("error", f"{what}, every subfolder of which is a class; expected one beside it.")
    return found


def find_other_classes(labeled: LabeledFiles, held_out: LabeledFiles, name: str) -> Iterator[Finding]:
    """The classes that validation or test (its ``name``) does not share: an error where training does not know one."""
    counts, folder = held_out.counts(), f"the {name} folder {held_out.root}"
    if unknown := [label for label, count in counts.items() if label not in labeled.classes and count]:
        what = f"{folder} has classes that {labeled.root} does not: {few(unknown)}; expected folders of the same names."
        yield Finding("error", what)
    if missing := [label for label in labeled.classes if not counts.get(label)]:
        yield Finding("warning", f"{folder} has no picture of {few(missing)}: nothing is measured there.")


# -------------------------------------------------------------------------------------------------------------- copies


class _File(NamedTuple):
    side: str
    path: str
    label: int = 0


def find_copies(
    labeled: LabeledFiles,
    unlabeled: Files | None,
    validation: LabeledFiles | None,
    test: LabeledFiles | None,
    progress: Progress = silent,
    *,
    trained: bool = False,
) -> Iterator[Finding]:
    """The pictures that stand on several sides, or in several classes, by their bytes; see :func:`check_folders`.
    ``trained``: the labeled and unlabeled ones were already trained on, so that the others are to be mended."""
    files = [_File("labeled", *one) for one in zip(labeled.paths(), labeled.labels, strict=True)]
    for side, folder in (("unlabeled", unlabeled), ("validation", validation), ("test", test)):
        files += [] if folder is None else [_File(side, path) for path in folder.paths()]

    def on(group: list[_File], side: str) -> list[str]:
        return [file.path for file in group if file.side == side]

    def contradict(group: list[_File]) -> bool:
        return len({file.label for file in group if file.side == "labeled"}) > 1

    groups = _same_bytes(files, lambda group: contradict(group) or len({file.side for file in group}) > 1, progress)
    for held_out, other in (
        *((held_out, other) for held_out in ("test", "validation") for other in ("labeled", "unlabeled")),
        ("test", "validation"),
    ):
        pairs = [(path, copy) for group in groups for copy in on(group, other)[:1] for path in on(group, held_out)]
        if pairs:
            harmless = other == "validation"
            named = few(path + f" is {copy}" * (path != copy) for path, copy in pairs)
            spoilt = "what is selected on them looks better than it is" if harmless else "the result would be too good"
            yield Finding(
                "warning" if harmless else "error",
                f"{len(pairs)} {held_out} pictures are among the {other} ones too: {named}; {spoilt}: remove them from "
                f"the {held_out if trained else other} folder.",
                f"{held_out} copies",
            )
    twice = sum(len(on(group, "labeled")) for group in groups if on(group, "unlabeled"))
    if unlabeled is not None and twice == len(labeled):
        # Usual in the papers, and of no use where there are no others.
        note = f"they are {len(labeled):,} of its {len(unlabeled):,}"
        what = f"all labeled pictures are in the unlabeled folder {unlabeled.root} too: {note}"
        yield Finding("warning", what, "labeled copies")
    if doubtful := [on(group, "labeled") for group in groups if contradict(group)]:
        what = f"pictures in more than one class, {len(doubtful)}: {few(map(' and '.join, doubtful))}; keep one."
        yield Finding("error", what, "contradiction")


def same_pictures(files: Files, others: Files) -> Iterator[tuple[list[str], list[str]]]:
    """The paths in one folder, and those in another, of each picture that both have, by its bytes."""
    both = [*(_File("own", path) for path in files.paths()), *(_File("other", path) for path in others.paths())]
    for group in _same_bytes(both, lambda group: len({file.side for file in group}) == 2):
        yield [file.path for file in group if file.side == "own"], [f.path for f in group if f.side == "other"]


def without_copies(files: FilesT, of: Files) -> FilesT:
    """Those of the files that another folder does not have too."""
    copies = {path for own, _ in same_pictures(files, of) for path in own}
    return files.keep([i for i, path in enumerate(files.paths()) if path not in copies]) if copies else files


def _same_bytes(
    files: list[_File], matters: Callable[[list[_File]], bool], progress: Progress = silent
) -> list[list[_File]]:
    """Groups of files with the same bytes; ``matters`` says of a group, alike so far, whether it is compared further.

    Each key costs more than the one before and sees fewer files. Uncompressed pictures all have one size, so a piece
    of them is compared before all their bytes.
    """
    groups, compared = [files], 0
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
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size // 2 - 2048))
        return hashlib.sha256(file.read(4096)).digest()
