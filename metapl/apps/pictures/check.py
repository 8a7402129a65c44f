"""What is wrong with files and folders of pictures, found before a training begins."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from metapl.apps.pictures.folders import Files, FilesT, LabeledFiles, Progress, ask, digest, silent
from metapl.apps.pictures.reader import UnreadableImage, read_image
from metapl.apps.pictures.tar import open_picture, size_of
from metapl.errors import few, reason_of
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
    sizes = [ask(size_of, path) or 0 for path in files.paths()]
    decode = len(sizes) <= DECODE_UP_TO and sum(sizes) <= DECODE_BYTES
    sound, skipped = [], {}
    for index, path in enumerate(files.paths()):
        try:
            if decode:
                read_image(path, size=(1, 1))  # of a size, JPEGs are decoded several times as fast
            elif not size_of(path):
                raise UnreadableImage(path, "the file is empty")
            sound.append(index)
        except UnreadableImage as error:
            skipped[files.names[index]] = error.reason
        except OSError as error:
            skipped[files.names[index]] = reason_of(error)
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
    *,
    copies: bool = True,
) -> list[Finding]:
    """Find what would spoil a training with these folders; errors come first.

    Errors: fewer than two classes; another of these folders inside that of the classes; a class without pictures; a
    class of validation or test that training does not know; a picture of test or validation, by its bytes, among the
    labeled or unlabeled ones, or in two classes. Warnings: a picture of test in validation; a class that validation or
    test lacks; all labeled pictures among the unlabeled ones. ``progress`` is called with the number of files whose
    bytes were compared; without ``copies``, none are.

    Cost: one question to the file system for each file. Bytes are read only of files that another side has with the
    same size, and beyond 4 KiB only where these agree too.
    """
    named = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation, "test": test}
    sides: dict[str, Any] = {side: files for side, files in named.items() if files is not None}
    root, counts, findings = labeled.root, labeled.counts(), list[Finding]()
    for side, files in [*sides.items()][1:]:
        whole, other = root.resolve(), files.root.resolve()
        inside = whole in other.parents
        if inside or (other in whole.parents and side != "unlabeled"):  # whose folder may hold all pictures
            inner, outer = ((side, files.root), ("labeled", root))[:: 1 if inside else -1]
            what = f"the {inner[0]} folder {shown(inner[1])} lies inside the {outer[0]} folder {shown(outer[1])}"
            findings.append(Finding("error", f"{what}, every subfolder of which is a class; expected one beside it."))
            if side != "unlabeled":
                del sides[side]  # around the labeled folder, it has copies of all in it, which says nothing more
    if len(counts) < 2:
        findings.append(Finding("error", f"{root} has one class, {few(counts)}; expected two or more folders."))
    if empty := [name for name, count in counts.items() if count == 0]:
        findings.append(Finding("error", f"{root} has no picture of {few(empty)}; add some, or remove the folder."))
    if copies:
        findings += find_copies(sides, progress)
    for side, held_out in (("validation", validation), ("test", test)):
        if held_out is None:
            continue
        found, folder = held_out.counts(), f"the {side} folder {held_out.root}"
        if unknown := [label for label, count in found.items() if label not in counts and count]:
            what = f"{folder} has classes that {root} does not: {few(unknown)}; expected folders of the same names."
            findings.append(Finding("error", what))
        if missing := [label for label in counts if not found.get(label)]:
            what = f"{folder} has no picture of {few(missing)}: nothing is measured there."
            findings.append(Finding("warning", what))
    return sorted(findings, key=lambda finding: finding.level != "error")


# -------------------------------------------------------------------------------------------------------------- copies


class _File(NamedTuple):
    side: str
    path: str
    label: int = 0


def find_copies(sides: Mapping[str, Files], progress: Progress = silent, *, trained: bool = False) -> Iterator[Finding]:
    """The pictures that stand on several sides, or in several classes, by their bytes; see :func:`check_folders`.

    Args:
        sides: the labeled files, and of unlabeled, validation and test ones what there is.
        trained: the labeled and unlabeled ones were already trained on, so that the others are to be mended.
    """

    def on(group: list[_File], side: str) -> list[str]:
        return [file.path for file in group if file.side == side]

    def contradict(group: list[_File]) -> bool:
        return len({file.label for file in group if file.side == "labeled"}) > 1

    groups = _same_bytes(sides, lambda group: contradict(group) or len({file.side for file in group}) > 1, progress)
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
    if "unlabeled" in sides and twice == len(sides["labeled"]):
        # Usual in the papers, and of no use where there are no others.
        note = f"they are {twice:,} of its {len(sides['unlabeled']):,}"
        what = f"all labeled pictures are in the unlabeled folder {sides['unlabeled'].root} too: {note}"
        yield Finding("warning", what, "labeled copies")
    if doubtful := [on(group, "labeled") for group in groups if contradict(group)]:
        what = f"pictures in more than one class, {len(doubtful)}: {few(map(' and '.join, doubtful))}; keep one."
        yield Finding("error", what, "contradiction")


def same_pictures(files: Files, others: Files) -> Iterator[tuple[list[str], list[str]]]:
    """The paths in one folder, and those in another, of each picture that both have, by its bytes."""
    for group in _same_bytes({"own": files, "other": others}, lambda group: len({file.side for file in group}) == 2):
        yield [file.path for file in group if file.side == "own"], [f.path for f in group if f.side == "other"]


def without_copies(files: FilesT, of: Files) -> FilesT:
    """Those of the files that another folder does not have too."""
    copies = {path for own, _ in same_pictures(files, of) for path in own}
    return files.keep([i for i, path in enumerate(files.paths()) if path not in copies]) if copies else files


def _same_bytes(
    sides: Mapping[str, Files], matters: Callable[[list[_File]], bool], progress: Progress = silent
) -> list[list[_File]]:
    """Groups of files with the same bytes; ``matters`` says of a group, alike so far, whether it is compared further.

    Each key costs more than the one before and sees fewer files. Uncompressed pictures all have one size, so a piece
    of them is compared before all their bytes.
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
