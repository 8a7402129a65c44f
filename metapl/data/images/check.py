"""What would spoil a training with a set of folders, found before it begins."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from metapl.data.images.folders import Count, Files, LabeledFiles, Progress
from metapl.errors import MetaplError

T = TypeVar("T")

Kind = Literal["classes", "test copies", "validation copies", "labeled copies", "contradiction"]

_SHOWN = 5
_GLIMPSE = 4096


@dataclass(frozen=True)
class Finding:
    """Something about the folders that a user should know before training.

    Args:
        level: an "error" makes results wrong or training impossible; a "warning" may be meant so.
        message: what was found, with the first few files, and how to mend it.
        files: all the files that it is about.
        kind: of the classes' folders ("classes"); of pictures that stand in two folders ("test copies", "validation
            copies", "labeled copies") or in two classes ("contradiction").
    """

    level: Literal["error", "warning"]
    message: str
    files: tuple[Path, ...] = ()
    kind: Kind = "classes"


def check_folders(
    labeled: LabeledFiles,
    unlabeled: Files | None = None,
    validation: LabeledFiles | None = None,
    test: LabeledFiles | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Find what would spoil a training with these folders.

    Errors: fewer than two classes; a class without pictures; a class of validation or test that training does not
    know; a picture of test or validation, by its bytes, among the labelled or unlabelled ones (the result would be too
    good), or in two classes. Warnings: a class with one picture; classes whose names differ by case only; pictures
    beside the class folders; a picture of test in validation; a class that validation or test lacks; all labelled
    pictures among the unlabelled ones.

    Args:
        labeled, unlabeled: the folders trained on.
        validation, test: the folders that are not.
        progress: called with the number of files whose bytes were looked at.

    Returns:
        errors first; empty where all is well.

    Cost: one question to the file system for each file. Bytes are read only of files that another side has with the
    same size, and beyond 4 KiB only where these agree too.

    Raises:
        MetaplError: a file is gone or cannot be read.
    """
    findings = [*_class_findings(labeled), *find_copies(labeled, unlabeled, validation, test, progress)]
    for name, held_out in (("validation", validation), ("test", test)):
        if held_out is not None:
            findings += _other_classes(labeled, held_out, name)
    return sorted(findings, key=lambda one: one.level != "error")


def _class_findings(labeled: LabeledFiles) -> Iterator[Finding]:
    if len(labeled.classes) < 2:
        yield Finding("error", f"{labeled.root} has one class, {labeled.classes[0]!r}; expected two or more folders.")
    counts = labeled.counts()
    for name, count in counts.items():
        where = labeled.root / name
        if count == 0:
            yield Finding(
                "error", f"class {name!r} has no picture in {where}; put some there, or remove the folder.", (where,)
            )
        elif count == 1:
            files = tuple(labeled.path(i) for i, label in enumerate(labeled.labels) if labeled.classes[label] == name)
            yield Finding(
                "warning",
                f"class {name!r} has one picture, {files[0]}: it is trained on, so a validation split cannot have any "
                "of this class; add more.",
                files,
            )
    for same in _grouped(labeled.classes, str.casefold):
        names = " and ".join(map(repr, same))
        folders = tuple(labeled.root / name for name in same)
        yield Finding(
            "warning",
            f"classes {names} differ by case only and count as different classes; if not, merge them.",
            folders,
        )
    if labeled.loose:
        yield Finding(
            "warning",
            f"{labeled.loose} pictures lie in {labeled.root} beside the class folders and are not used; move them into "
            "the folder of their class.",
        )


def _other_classes(labeled: LabeledFiles, held_out: LabeledFiles, name: str) -> Iterator[Finding]:
    counts = held_out.counts()
    known = set(labeled.classes)
    unknown = [one for one, count in counts.items() if one not in known and count]
    if unknown:
        yield Finding(
            "error",
            f"the {name} folder {held_out.root} has classes that {labeled.root} does not: {some(unknown)}; expected "
            "folders of the same names.",
            tuple(held_out.root / one for one in unknown),
        )
    missing = [one for one in labeled.classes if not counts.get(one)]
    if missing:
        yield Finding(
            "warning",
            f"the {name} folder {held_out.root} has no picture of {some(missing)}: nothing is measured there.",
        )


@dataclass(frozen=True)
class _Copy:
    side: str
    label: str | None
    path: str


def find_copies(
    labeled: LabeledFiles,
    unlabeled: Files | None,
    validation: LabeledFiles | None,
    test: LabeledFiles | None,
    progress: Progress | None,
    *,
    trained: bool = False,
) -> Iterator[Finding]:
    """The pictures that stand on several sides, or in several classes, by their bytes; see :func:`check_folders`.

    Args:
        trained: the labeled and unlabeled pictures were already trained on, so that the others are to be mended.
    """
    sides = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation, "test": test}
    files = [
        _Copy(side, found.classes[found.labels[i]] if isinstance(found, LabeledFiles) else None, path)
        for side, found in sides.items()
        if found is not None
        for i, path in enumerate(found.paths())
    ]
    count = Count(progress)
    leaks: defaultdict[tuple[str, str], list[tuple[_Copy, _Copy]]] = defaultdict(list)
    contradictions: list[list[_Copy]] = []
    used_twice = 0
    for group in _same_bytes(files, count):
        of = {side: [one for one in group if one.side == side] for side in sides}
        for held_out, other in _LEAKS:
            if of[other]:
                leaks[held_out, other] += ((one, of[other][0]) for one in of[held_out])
        used_twice += _labeled_twins(group)
        if len({one.label for one in of["labeled"]}) > 1:
            contradictions.append(of["labeled"])
    count.end()
    for (held_out, other), pairs in leaks.items():
        if pairs:
            yield _leak(held_out, other, pairs, mended=held_out if trained else other)
    if unlabeled is not None and used_twice == len(labeled):
        yield _used_twice(labeled, unlabeled)
    if contradictions:
        shown = some([" and ".join(one.path for one in group) for group in contradictions])
        yield Finding(
            "error",
            f"{len(contradictions)} pictures are in two classes: {shown}; remove them from all classes but one.",
            tuple(Path(one.path) for group in contradictions for one in group),
            kind="contradiction",
        )


def _used_twice(labeled: LabeledFiles, unlabeled: Files) -> Finding:
    """All labelled pictures are unlabelled too: usual in the papers, and of no use where there are no others."""
    if len(unlabeled) > len(labeled):
        note = f"they are {len(labeled):,} of its {len(unlabeled):,}; that is usual and does no harm."
    else:
        note = "it has no others, so there is nothing more to learn from; name a folder with more pictures."
    told = f"all labelled pictures are in the unlabelled folder {unlabeled.root} too: {note}"
    return Finding("warning", told, kind="labeled copies")


_COPIES: dict[str, Kind] = {"test": "test copies", "validation": "validation copies"}

_LEAKS = (
    ("test", "labeled"),
    ("test", "unlabeled"),
    ("validation", "labeled"),
    ("validation", "unlabeled"),
    ("test", "validation"),
)


def _leak(held_out: str, other: str, pairs: Sequence[tuple[_Copy, _Copy]], mended: str) -> Finding:
    harmless = (held_out, other) == ("test", "validation")
    shown = some([f"{a.path} is {b.path}" for a, b in pairs])
    return Finding(
        "warning" if harmless else "error",
        f"{len(pairs)} {held_out} pictures are among the {other} ones too: {shown}; "
        + ("what is selected on them looks better than it is: " if harmless else "the result would be too good: ")
        + f"remove them from the {mended} folder.",
        tuple(Path(one.path) for pair in pairs for one in pair),
        kind=_COPIES[held_out],
    )


def _same_bytes(files: Sequence[_Copy], count: Count) -> Iterator[list[_Copy]]:
    """Groups of files with the same bytes that matter: on several sides, or labelled in two ways.

    Each key costs more than the one before and sees fewer files. Uncompressed pictures all have one size, so a look
    into them comes before all their bytes.
    """

    def asked(key: Callable[[str], Hashable], counted: bool) -> Callable[[_Copy], Hashable]:
        def ask(file: _Copy) -> Hashable:
            try:
                found = key(file.path)
            except OSError as error:
                raise MetaplError(f"{file.path} cannot be read: {error.strerror}; was it removed just now?") from error
            count.add(counted)
            return found

        return ask

    groups, labeled = [list(files)], sum(file.side == "labeled" for file in files)
    for key, counted in ((os.path.getsize, False), (_glimpse, True), (_digest, False)):
        found = [same for group in groups for same in _grouped(group, asked(key, counted))]
        all_twice = sum(_labeled_twins(same) for same in found) == labeled
        groups = [files for same in found if (files := _mattering(same, all_twice))]
    return iter(groups)


def _labeled_twins(files: Sequence[_Copy]) -> int:
    """How many labelled ones stand beside an unlabelled one."""
    sides = [file.side for file in files]
    return sides.count("labeled") if "unlabeled" in sides else 0


def _mattering(files: list[_Copy], all_twice: bool) -> list[_Copy]:
    """Those of files that might be one picture with which something would be wrong then.

    That some labelled pictures are unlabelled too is usual; it is said where ``all_twice`` of them might be.
    """
    sides = {file.side for file in files}
    if any(held_out in sides and other in sides for held_out, other in _LEAKS):
        return files
    if all_twice and {"labeled", "unlabeled"} <= sides:
        return files
    labeled = [file for file in files if file.side == "labeled"]
    return labeled if len({file.label for file in labeled}) > 1 else []


def _glimpse(path: str) -> bytes:
    """4 KiB from the middle: the beginning is often a header that all files share."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size // 2 - _GLIMPSE // 2))
        return hashlib.sha256(file.read(_GLIMPSE)).digest()


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _grouped(values: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The values that share their key with another."""
    groups: defaultdict[Hashable, list[T]] = defaultdict(list)
    for value in values:
        groups[key(value)].append(value)
    return [group for group in groups.values() if len(group) > 1]


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
