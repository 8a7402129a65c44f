"""Folders of pictures.

What a scan finds, what is wrong with them, which files are sound, and how they split; trainings on
many files, broken ones, files that block; and names that move no cursor, are no formula, and no
Markdown.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import metapl, result
from PIL import Image
from test_readers import SPECIAL, promptly
from tiny_runs import color_folders, images_command

from metapl.apps.images import METHODS, Images, Pictures, apart
from metapl.apps.look import choose_settings
from metapl.apps.main import main
from metapl.apps.printing import CsvRows
from metapl.apps.settings import Fitting
from metapl.errors import MetaplError, few
from metapl.pictures import (
    FileImages,
    Files,
    Finding,
    check_folders,
    folders,
    reader,
    replaced_files,
    scan_labeled,
    scan_unlabeled,
    stratified_split,
    verify_files,
)
from metapl.pictures.folders import hash_files, without_copies
from metapl.pictures.reader import open_picture
from metapl.words import TURNS, shown

SMALL: dict[str, Any] = {
    "pictures": Pictures(image_size=8, network="small_cnn"),
    "fitting": Fitting(steps=6),
}
PARTS = ("labeled", "unlabeled", "test")


def fill(root: Path, *names: str) -> Path:
    """Make empty files, with the folders that they need."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def pictures(root: Path, **levels: list[int]) -> Path:
    """Make one folder a class, with small pictures of the given levels.

    Two of one level have the same bytes.
    """
    for name, values in levels.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, value in enumerate(values):
            Image.new("RGB", (4, 4), (value, value, value)).save(root / name / f"{i}.bmp")
    return root


def labeled(root: Path, **levels: list[int]) -> Any:
    return scan_labeled(pictures(root, **levels))


def unlabeled(root: Path, *levels: int) -> Files:
    return scan_unlabeled(pictures(root, any=[*levels]))


def test_any_tree(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "b.jpg",
        "a/z.PNG",
        "a/deep/er/y.Tiff",
        "a-b.webp",
        "B/4.png",
        "notes.txt",
        "README",
        "a/notes.txt",
    )
    root = fill(tmp_path, ".hidden.png", "a/.cache/x.png", "a/._x.png", "__MACOSX/x.png")
    files = scan_unlabeled(root)
    assert files.names == ("B/4.png", "a-b.webp", "a/deep/er/y.Tiff", "a/z.PNG", "b.jpg")
    assert files.passed_over == {".txt": 2, "no suffix": 1}
    assert [*files.paths()] == [str(root / name) for name in files.names]
    assert files.keep([3, 1]).names == ("a/z.PNG", "a-b.webp")
    # Links are followed, and end.
    (root / "a" / "up").symlink_to(root)
    fill(tmp_path / "elsewhere", "2.png")
    for name in ("c", "twice"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    assert scan_unlabeled(root).names == ("B/4.png", *files.names[1:], "c/2.png")
    (tmp_path / "list.txt").write_text("a/z.PNG\nelsewhere/2.png\n\n")
    assert scan_unlabeled(tmp_path / "list.txt").names == ("a/z.PNG", "elsewhere/2.png")
    # A line that stands several times is a picture that counts so often, however it is written.
    (tmp_path / "list.txt").write_text("b.jpg\nb.jpg\na/z.PNG\n./b.jpg\nB/4.png\n")
    files = scan_unlabeled(tmp_path / "list.txt")
    assert files.names == ("B/4.png", "a/z.PNG", "b.jpg", "b.jpg", "b.jpg")
    assert files.without_repeats().names == ("B/4.png", "a/z.PNG", "b.jpg")


def test_a_list_ends_its_lines_as_editors_do_and_nowhere_else(tmp_path: Path) -> None:
    """Names may have what Python splits text at: other ends of lines, pages and records."""
    names = ["a\u2028b.png", "c\x85d.png", "e\x0bf.png", "g\x1ch.png", "i\rj.png", "k.png"]
    fill(tmp_path, *names)
    for end in ("\n", "\r\n"):
        content = "".join(name + end for name in names).encode()
        (tmp_path / "list.txt").write_bytes(content)
        assert {*scan_unlabeled(tmp_path / "list.txt").names} == {*names}


def test_one_folder_a_class(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "dog/1.png",
        "cat/2.png",
        "cat/more/1.jpg",
        "loose.png",
        "list.csv",
        "dog/x.txt",
        ".git/a/b.png",
    )
    (tmp_path / "empty").mkdir()
    for name in ("cat", "dog"):  # which brings no pictures of other classes
        (tmp_path / name / "up").symlink_to(tmp_path)
    files = scan_labeled(tmp_path)
    assert files.classes == ("cat", "dog", "empty")
    assert files.names == ("cat/2.png", "cat/more/1.jpg", "dog/1.png")
    assert files.targets().tolist() == [0, 0, 1]
    assert files.targets(("dog", "x", "cat")).tolist() == [2, 2, 0]
    assert files.passed_over == {".csv": 1, ".txt": 1, "no class folder": 1}
    assert files.counts() == {"cat": 2, "dog": 1, "empty": 0}
    kept = files.keep([2, 1])
    assert (kept.names, kept.labels, kept.classes) == (
        ("dog/1.png", "cat/more/1.jpg"),
        (1, 0),
        files.classes,
    )
    with pytest.raises(MetaplError, match="cat"):
        files.targets(("dog", "fish"))


def other_form(name: str) -> str:
    """Return a name as it is after its way through a Mac."""
    return unicodedata.normalize("NFD", name)


def test_names_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    """In the order of their characters, whichever form comes first."""
    names = ("Äpfel/1.png", other_form("Äpfel/1.png"), other_form("Nüsse/2.png"), "Zimt/3.png")
    files = scan_labeled(fill(tmp_path / "few", *names))
    assert files.classes == ("Nüsse", "Zimt", "Äpfel")
    assert sorted(files.names) == sorted(names)
    assert files.labels == (0, 1, 2, 2)
    assert all(path.exists() for path in map(Path, files.paths()))
    assert files.targets([other_form(name) for name in files.classes]).tolist() == [0, 1, 2, 2]
    # Validation and test have them in other forms than the labeled ones.
    few = labeled(tmp_path / "a", **{"Äpfel": [1, 2], "Nüsse": [3, 4]})
    test = labeled(tmp_path / "b", **{other_form("Äpfel"): [5, 6], other_form("Nüsse"): [7, 8]})
    assert check_folders(few, test=test) == []
    # A list may have them in other forms than the disk.
    lines = [other_form("few/Äpfel/1.png"), "few/Nüsse/2.png", "few/gone.png"]
    (tmp_path / "list.TXT").write_text("\n".join(lines), "utf-8-sig")
    found = scan_unlabeled(tmp_path / "list.TXT")
    assert [(found.root / name).exists() for name in found.names] == [True, True, False]


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX"])
def test_folders_of_the_system_are_no_classes(name: str, tmp_path: Path) -> None:
    root = fill(tmp_path, "a/1.png", "b/2.png", "a/Thumbs.db", ".DS_Store")
    fill(tmp_path, f"{name}/3.png", f"a/{name}/1.png/SYNOPHOTO_THUMB_M.jpg")
    files = scan_labeled(root)
    assert (files.classes, files.names) == (("a", "b"), ("a/1.png", "b/2.png"))
    assert files.passed_over == {}
    assert scan_unlabeled(root).names == files.names


def test_what_cannot_be_scanned(tmp_path: Path) -> None:
    fill(tmp_path, "one/x.txt", "file.png")
    (tmp_path / "some" / "cat").mkdir(parents=True)
    both, of_classes, of_none = (scan_labeled, scan_unlabeled), (scan_labeled,), (scan_unlabeled,)
    for scans, name, word in (
        *((both, "no", "exist"), (both, "file.png", "file"), (of_classes, "some/cat", "class")),
        *((of_classes, "some", "picture"), (of_none, "one", "txt")),
    ):
        for scan in scans:
            with pytest.raises(MetaplError, match=word):
                scan(tmp_path / name)


def png(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, **members: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def levels(files: Files) -> list[int]:
    return (
        FileImages(files.paths(), size=(2, 2))
        .fetch(torch.arange(len(files)))[0][:, 0, 0, 0]
        .tolist()
    )


def test_a_tar_file_stands_for_the_folder(tmp_path: Path) -> None:
    (pictures(tmp_path / "u", any=[1, 2, 3]) / "deep" / "er").mkdir(parents=True)
    (tmp_path / "u" / "any" / "0.bmp").rename(tmp_path / "u" / "deep" / "er" / "blue.0.bmp")
    (tmp_path / "tars").mkdir()
    made = (
        "--sort=name",
        "--mtime=@0",
        "-cf",
        tmp_path / "tars" / "many.tar",
        "-C",
        tmp_path / "u",
        ".",
    )
    subprocess.run(["tar", *made], check=True)  # as the page says
    files, inside = scan_unlabeled(tmp_path / "u"), scan_unlabeled(tmp_path / "tars")
    assert [name.partition("/")[2] for name in inside.names] == [*files.names]
    assert levels(inside) == levels(files) == [2, 3, 1]
    assert verify_files(inside).sound == (0, 1, 2)
    found = check_folders(
        labeled(tmp_path / "l", a=[7, 8], b=[9, 10]),
        inside,
        test=labeled(tmp_path / "t", a=[2], b=[5]),
    )
    assert [one.kind for one in found] == ["test copies"]


def test_tar_files_of_others(tmp_path: Path) -> None:
    """As `tar cf` and WebDataset write them.

    Names that begin with ./, labels beside pictures, hidden files.
    """
    root = tmp_path / "many"
    write_tar(
        root / "b.tar",
        **{"./x/1.png": png(10), "./x/1.cls": b"3", "./.hidden/2.png": png(), "../3.png": png()},
    )
    write_tar(root / "a.tar", **{"/9.png": png(90), "x/1.png": png(50)})
    files = scan_unlabeled(root)
    assert files.names == ("a.tar/9.png", "a.tar/x/1.png", "b.tar/x/1.png")
    assert (dict(files.passed_over), levels(files)) == ({".cls": 1}, [90, 50, 10])
    write_tar(
        root / "a.tar",
        **{"0.png": png(1), "longer": b"x" * 9999, "9.png": png(91), "x/1.png": png(51)},
    )
    assert levels(files) == [91, 51, 10]  # read anew where it changed
    with pytest.raises(FileNotFoundError):
        open_picture(root / "a.tar" / "2.png")
    (root / "loose.png").write_bytes(png())
    assert scan_unlabeled(root).names == ("loose.png",)  # beside pictures, a tar file is a backup
    path, whole = root / "a.tar", (root / "a.tar").read_bytes()
    (root / "loose.png").unlink()
    with tarfile.open(path, "a") as tar:
        tar.add(__file__, "9.png")
    for content in (whole[:1500], b"no tar file " * 100, gzip.compress(whole), path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(MetaplError, match=r"a\.tar"):
            scan_unlabeled(root)


L = {"cat": [1, 2], "dog": [3, 4]}
Sides = dict[str, Any]
FINDINGS: dict[str, tuple[Sides, list[tuple[str, str, str]]]] = {
    # What is in the folders: levels by class; and of each finding the level, the kind, and a word.
    "sound": ({"labeled": L, "unlabeled": [1, 5, 6], "validation": {"cat": [11], "dog": [12]}}, []),
    "sound test": ({"labeled": L, "test": {"cat": [13], "dog": [14]}}, []),
    "twice in a class": ({"labeled": {"cat": [1, 1], "dog": [2, 3]}}, []),
    "one class": ({"labeled": {"cat": [1, 2]}}, [("error", "classes", "one class")]),
    "empty class": ({"labeled": {**L, "empty": []}}, [("error", "classes", "empty")]),
    "two classes": (
        {"labeled": {"cat": [1, 2], "dog": [2, 3]}},
        [("error", "contradiction", "more than one")],
    ),
    "other classes": (
        {"labeled": L, "test": {"cat": [5], "fish": [6], "empty": []}},
        [("error", "classes", "fish"), ("warning", "classes", "dog")],
    ),
    "test in labeled": (
        {"labeled": L, "test": {"cat": [1, 9], "dog": [4]}},
        [("error", "test copies", "2 test pictures")],
    ),
    "test in unlabeled": (
        {"labeled": L, "unlabeled": [5, 6], "test": {"cat": [6], "dog": [9]}},
        [("error", "test copies", "among the unlabeled")],
    ),
    "validation in both": (
        {"labeled": L, "unlabeled": [5, 6], "validation": {"cat": [5, 2], "dog": [9]}},
        [("error", "validation "
                   "copies", "among the "
                             "labeled"), ("error", "validation copies", "among the unlabeled")],
    ),
    "test in validation": (
        {"labeled": L, "validation": {"cat": [8], "dog": [9]}, "test": {"cat": [10], "dog": [9]}},
        [("warning", "test copies", "among the validation")],
    ),
    "no others": ({"labeled": L, "unlabeled": [1, 2, 3, 4]}, [("warning", "labeled "
                                                                          "copies", "4 of its 4")]),
    "some there too": ({"labeled": L, "unlabeled": [4, 3, 2, 5]}, []),
}  # fmt: skip


def test_of_many_copies_in_two_classes_one_of_each_is_named(tmp_path: Path) -> None:
    folder = labeled(tmp_path / "few", cat=[1] * 9, dog=[1] * 9)
    (finding,) = check_folders(folder)
    assert finding.message.count(".bmp") == 2


@pytest.mark.parametrize("name", FINDINGS)
def test_what_would_spoil_a_training_is_found(name: str, tmp_path: Path) -> None:
    sides, expected = FINDINGS[name]
    found = check_folders(
        **{
            side: labeled(tmp_path / side, **held)
            if isinstance(held, dict)
            else unlabeled(tmp_path / side, *held)
            for side, held in sides.items()
        }
    )
    assert [(one.level, one.kind) for one in found] == [
        (level, kind) for level, kind, _ in expected
    ]
    for one, (_, _, word) in zip(found, expected, strict=True):
        assert word in one.message


INNER = ("leaf/1.png", "stem/2.png")
PARTS_OF_DATA: dict[str, tuple[list[str], str | None]] = {
    # What is in the folder; and what is said of it, or None where these are classes.
    "folds": ([f"fold{i}/{name}" for i in range(3) for name in INNER], "as in ROOT/fold0, or"),
    "a stray picture": (
        [f"fold{i}/{kind}/{k}.png" for i in range(3) for kind in "xy" for k in range(3)]
        + ["fold0/overview.png"],
        "as in ROOT/fold0, or",
    ),
    "one fold lacks a class": (
        ["a/x/1.png", "a/y/1.png", "a/z/1.png", "b/x/1.png", "b/y/1.png"],
        "a, b in ROOT all have the folders x, y",
    ),
    "deeper": (
        [f"north/2020/{INNER[0]}", f"north/2020/{INNER[1]}", *(f"s/21/{name}" for name in INNER)],
        "as in ROOT/north/2020, or",
    ),
    "years between": (
        [f"{part}/{year}/{name}" for part in "ab" for year in (20, 21) for name in INNER],
        "as in ROOT/a/20, or, where a, b or 20, 21 are the classes",
    ),
    "one part, and years": (
        [f"a/{year}/{name}" for year in (20, 21) for name in INNER],
        "as in ROOT/a/20: leaf, stem",
    ),
    "two forms": (
        ["1/Äpfel/1.png", "1/b/1.png", other_form("2/Äpfel/1.png"), "2/b/1.png"],
        "b, Äpfel",
    ),
    "train, val and test": (
        [f"{part}/{name}" for part in ("train", "val", "test") for name in INNER],
        "expected --labeled ROOT/train --val ROOT/val --test ROOT/test",
    ),
    "without classes": (
        ["Train/1.png", "Unlabeled/2.png"],
        "expected --unlabeled ROOT/Unlabeled, one folder a class in Train.",
    ),
    "a part without classes": (
        [*(f"train/{name}" for name in INNER), "test/1.png"],
        "expected --labeled ROOT/train, one folder a class in test.",
    ),
    "one more level": ([f"data/{name}" for name in INNER], "as in ROOT/data: leaf, stem"),
    "in a folder each": (["cat/images/1.png", "dog/images/2.png"], None),
    "pictures of their own": ([f"{i}/{name}" for i in "ab" for name in (*INNER, "3.png")], None),
    "other years": (["a/2019/1.png", "a/2020/2.png", "b/2020/1.png", "b/2021/1.png"], None),
    "a class of that name": (["test/1.png", "bus/2.png"], None),
}


@pytest.mark.parametrize("name", PARTS_OF_DATA)
def test_parts_of_a_data_set_are_no_classes(name: str, tmp_path: Path) -> None:
    files, words = PARTS_OF_DATA[name]
    found = check_folders(scan_labeled(fill(tmp_path, *files)), copies=False)
    errors = [one.message for one in found if one.level == "error"]
    if words is None:
        assert errors == []
    else:
        (message,) = errors
        assert words.replace("ROOT", str(tmp_path)) in message


@pytest.mark.parametrize("name", ["years between", "one part, and years", "folds", "deeper"])
def test_the_folder_that_is_proposed_has_classes(name: str, tmp_path: Path) -> None:
    (finding,) = check_folders(scan_labeled(fill(tmp_path, *PARTS_OF_DATA[name][0])), copies=False)
    proposed = finding.message.partition("as in ")[2].partition(":")[0].partition(",")[0]
    again = check_folders(scan_labeled(proposed), copies=False)
    assert [one for one in again if one.level == "error"] == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat ", "'cat '"),
        (" cat", "' cat'"),
        ("cat\u200b", "'cat\\u200b'"),
        ("\ufeffcat", "'\\ufeffcat'"),
        ("c\xadat", "'c\\xadat'"),
        ("Cat\xa0", "'Cat\\xa0'"),
    ],
)
def test_classes_that_look_alike_are_an_error(name: str, shown: str, tmp_path: Path) -> None:
    files = [f"{folder}/{number}.png" for folder in ("cat", "dog", name) for number in (1, 2)]
    (found,) = check_folders(scan_labeled(fill(tmp_path / "root", *files)), copies=False)
    assert found.level == "error"
    assert shown in found.message
    assert "'cat'" in found.message
    # A test folder with one of them.
    plain = fill(tmp_path / "plain", *files[:4])
    test = fill(tmp_path / "test", *files[2:])
    messages = [
        one.message
        for one in check_folders(scan_labeled(plain), test=scan_labeled(test), copies=False)
        if one.level == "error"
    ]
    assert len(messages) == 1
    assert (shown if name.strip("\xa0") != "Cat" else "Cat") in messages[0]


def test_other_blanks_within_a_name_are_seen(tmp_path: Path) -> None:
    files = [f"{folder}/{n}.png" for folder in ("red fox", "redfox", "Red fox") for n in (1, 2)]
    (found,) = check_folders(scan_labeled(fill(tmp_path, *files)), copies=False)
    assert found.level == "warning"
    assert "Red fox, red fox in" in found.message


def test_parts_that_share_some_classes_are_a_note(tmp_path: Path) -> None:
    places = ("a/cat", "a/dog", "a/fox", "b/fox", "b/owl", "b/yak")
    found = check_folders(
        scan_labeled(fill(tmp_path, *(f"{p}/1.png" for p in places))), copies=False
    )
    assert [
        (one.level, "a, b in" in one.message, "folders fox;" in one.message) for one in found
    ] == [("warning", True, True)]


def test_patients_with_a_class_each_are_a_note(tmp_path: Path) -> None:
    places = ("p0/ill", "p1/well", "p2/ill", "p3/well")
    files = [f"{place}/{number}.png" for place in places for number in (1, 2)]
    (found,) = check_folders(scan_labeled(fill(tmp_path, *files)), copies=False)
    assert found.level == "warning"
    assert "several of them have the folders ill, well;" in found.message
    # Pictures of each class in a folder of the same name are no reason.
    fine = fill(tmp_path / "fine", *(f"{name}/images/{n}.png" for name in "ab" for n in (1, 2)))
    assert check_folders(scan_labeled(fine), copies=False) == []


def test_what_is_odd_about_classes_is_said(tmp_path: Path) -> None:
    few = labeled(tmp_path, cat=[1, 2], Cat=[3, 4], dog=[5], fish=[6], cow=[7, 8])
    single, alike = check_folders(few)
    assert {single.level, alike.level} == {"warning"}
    assert "one picture of dog, fish:" in single.message
    assert alike.message.startswith(f"Cat, cat in {tmp_path} are 2 classes: ")


def only(findings: list[Finding], *words: str) -> Finding:
    (one,) = [finding for finding in findings if all(word in finding.message for word in words)]
    return one


def test_no_folder_lies_inside_another(tmp_path: Path) -> None:
    few = labeled(tmp_path / "data", cat=[1, 2], more=[3, 4], train=[5, 6])
    finding = only(
        check_folders(few, scan_unlabeled(tmp_path / "data" / "more")),
        "unlabeled folder",
        "lies inside",
    )
    assert finding.level == "error"
    # All pictures may be in one folder, of which the classes are a part; a test folder may not.
    above = labeled(tmp_path / "all" / "few", **L)
    pictures(tmp_path / "all" / "held_out", cat=[5], dog=[6])
    assert {one.level for one in check_folders(above, scan_unlabeled(tmp_path / "all"))} <= {
        "warning"
    }
    findings = check_folders(above, test=scan_labeled(tmp_path / "all"))
    assert only(findings, "lies inside the test folder").level == "error"
    assert not any("are among" in one.message for one in findings)


@pytest.mark.parametrize("others", [3, 0])
def test_pictures_set_aside_for_validation_are_not_learned_from_as_unlabeled_ones(
    tmp_path: Path, others: int
) -> None:
    levels = {"cat": [*range(4)], "dog": [*range(10, 14)]}
    few = labeled(tmp_path / "l", **levels)
    many = unlabeled(tmp_path / "u", *levels["cat"], *levels["dog"], *range(100, 100 + others))
    given = Images(labeled=str(few.root), unlabeled=str(many.root), val_fraction=0.5, **SMALL)
    config, said = choose_settings(given, METHODS["uda"], lambda text: None)[0], list[str]()
    task = config.data(said.append, progress=False, log=None)
    val = {task.validation.images.path(i).read_bytes() for i in range(4)}
    left = [task.unlabeled.images.path(i).read_bytes() for i in range(len(task.unlabeled.images))]
    assert len(left) == task.record["unlabeled"] == 4 + others
    assert val.isdisjoint(left)
    assert len([line for line in said if "4 unlabeled pictures are left out" in line]) == 1
    assert without_copies(few, scan_labeled(few.root)).names == ()
    with pytest.raises(MetaplError, match="--val"):
        apart(
            scan_unlabeled(few.root / "cat"),
            few,
            said.append,
            aside="validation",
            way_out="--val",
        )


@pytest.mark.parametrize("flag", ["val_fraction", "test_fraction"])
def test_copies_of_pictures_set_aside_are_not_learned_from(tmp_path: Path, flag: str) -> None:
    """Every picture of a folder is there twice."""
    twice = pictures(tmp_path, cat=[*range(10), *range(10)], dog=[*range(10, 20), *range(10, 20)])
    given = Images(labeled=str(twice), **{flag: 0.2}, **SMALL)
    config, said = choose_settings(given, METHODS["uda"], lambda text: None)[0], list[str]()
    record = config.data(said.append, progress=False, log=None).record
    held_out = record["validation"] + record["test"]
    assert len(held_out) == 8
    contents = [
        {(twice / name).read_bytes() for name in names} for names in (held_out, record["labeled"])
    ]
    assert contents[0].isdisjoint(contents[1])
    assert len(contents[0] | contents[1]) == 20
    assert any("labeled pictures are left out: they are copies" in line for line in said)
    pictures(tmp_path, dog=[11] * 20)
    with pytest.raises(
        MetaplError, match="all labeled pictures of dog in .* are copies of labeled"
    ):
        config.data(said.append, progress=False, log=None)


def test_one_folder_is_split_into_what_is_learned_from_validated_on_and_tested_on(
    tmp_path: Path,
) -> None:
    one = pictures(tmp_path, cat=[*range(10)], dog=[*range(10, 20)])
    tested = []
    for seed in (0, 1):
        fitting = Fitting(steps=6, seed=seed)
        given = Images(
            labeled=str(one),
            test_fraction=0.2,
            val_fraction=0.2,
            **{**SMALL, "fitting": fitting},
        )
        config, _ = choose_settings(given, METHODS["uda"], lambda text: None)
        data = config.data(lambda text: None, progress=False, log=None)
        parts = {name: {*data.record[name]} for name in ("labeled", "validation", "test")}
        assert {name: len(names) for name, names in parts.items()} == {
            "labeled": 12,
            "validation": 4,
            "test": 4,
        }
        assert len(set.union(*parts.values())) == 20
        # Without --unlabeled the labeled ones are learned from without their labels too.
        learned = {data.unlabeled.images.path(i) for i in range(len(data.unlabeled.images))}
        assert learned == {one / name for name in parts["labeled"]}
        tested.append(parts["test"])
    assert tested[0] == tested[1]
    with pytest.raises(MetaplError, match="it, or --test DIR, and not both"):
        Images(labeled=str(one), test=str(one), test_fraction=0.2)


def test_a_run_on_one_folder_is_evaluated_on_what_it_held_out(tmp_path: Path) -> None:
    one = color_folders(tmp_path) / "labeled"
    out = tmp_path / "run"
    words = images_command(tmp_path)[:2]
    flags = images_command(tmp_path)[5:]
    metapl(*words, "--labeled", one, "--test-fraction", "0.34", *flags, "--out", out)
    assert result(out)["evaluation"]["n"] == 4
    assert "of 4, as in result.json" in metapl("evaluate", out).stdout
    # A folder of these alone has none that was trained on.
    held_out = tmp_path / "held_out"
    for name in json.loads((out / "data.json").read_text())["test"]:
        (held_out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(one / name, held_out / name)
    evaluated = metapl("evaluate", out, "--test", held_out)
    assert "among the" not in evaluated.stdout + evaluated.stderr
    again = metapl("evaluate", out, "--test", one)
    learned = len(json.loads((out / "data.json").read_text())["labeled"])
    assert f"{learned} test pictures are among the labeled ones too" in again.stderr


def test_how_far_files_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(pictures(tmp_path, good=[1, 2]), "empty.png")
    for name, content in (("words.jpg", b"words"), ("words too.jpg", b"other words")):
        (root / name).write_bytes(content)
    Image.new("RGB", (60, 60)).save(root / "large.png")
    monkeypatch.setattr(reader, "MAX_PIXELS", 1000)
    files, told = scan_unlabeled(root), list[int]()
    verified = verify_files(files, progress=told.append)
    assert sorted(verified.skipped) == ["empty.png", "large.png", "words too.jpg", "words.jpg"]
    assert {*files.keep(verified.sound).names} == {*files.names} - {*verified.skipped}
    assert told == [*range(1, 7)]
    lines = verified.summary().splitlines()
    assert lines[0] == "2 skipped: not a picture of a known format (words too.jpg, words.jpg)"
    for limit, value in (("DECODE_UP_TO", 5), ("DECODE_BYTES", 10)):
        with monkeypatch.context() as patch:
            patch.setattr(folders, limit, value)
            assert [*verify_files(files).skipped] == ["empty.png"]


def test_large_folders_are_known_by_names_and_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changes() -> Iterator[str]:
        """Yield the digest of a folder as it is, with other bytes, another size, another name."""
        for content, name in ((b"123", "a"), (b"124", "a"), (b"1234", "a"), (b"1234", "b")):
            shutil.rmtree(tmp_path / "x", ignore_errors=True)
            (fill(tmp_path / "x", f"{name}.png") / f"{name}.png").write_bytes(content)
            yield hash_files(scan_unlabeled(tmp_path / "x"))

    assert len({*changes()}) == 4
    one = hash_files(labeled(tmp_path / "classes", **L))
    # Its pictures have other labels.
    assert hash_files(labeled(tmp_path / "classes", ant=[])) != one
    for limit in ("WHOLE_UP_TO", "WHOLE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(folders, limit, 0)
            first, *others = changes()
            assert first.startswith("names and sizes: ")
            assert [one == first for one in others] == [True, False, False]


def test_stratified() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    train, validation = stratified_split(labels, 0.1, seed=0)
    assert torch.cat([train, validation]).sort().values.tolist() == [*range(113)]
    assert labels[validation].bincount(minlength=4).tolist() == [10, 1, 1, 0]
    assert torch.equal(validation, stratified_split(labels, 0.1, seed=0)[1])
    assert not torch.equal(validation, stratified_split(labels, 0.1, seed=1)[1])
    assert labels[stratified_split(labels, 0.99, seed=0)[1]].bincount(minlength=4).tolist() == [
        99,
        9,
        1,
        0,
    ]
    for wrong, fraction in ((labels, 0.0), (labels, 1.0), (torch.arange(5), 0.5)):
        with pytest.raises(MetaplError, match="expected"):
            stratified_split(wrong, fraction, seed=0)


def test_training_on_many_files_starts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 files that are no pictures are not opened to see that before a batch needs them."""
    for limit in ("DECODE_UP_TO", "WHOLE_UP_TO"):
        monkeypatch.setattr(folders, limit, 100)
    root = color_folders(tmp_path)
    for number in range(600):
        (root / "unlabeled" / f"{number:03}.png").write_text("no picture")
    given = Images(**{name: str(root / name) for name in PARTS}, **SMALL)
    task = choose_settings(given, METHODS["uda"], lambda text: None)[0].data(
        lambda line: None, progress=False, log=None
    )
    assert (task.record["unlabeled"], task.skipped) == (624, {})
    assert task.record["hash"]["unlabeled"].startswith("names and sizes: ")


def test_a_terminal_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("metapl.apps.progress.BAR_EVERY", 0)
    with contextlib.redirect_stderr(Terminal()) as shown, contextlib.redirect_stdout(io.StringIO()):
        assert main(images_command(color_folders(tmp_path), "--out", str(tmp_path / "run"))) == 0
    for words in ("looking at labeled files: 12 of 12", "comparing files: ", "fit: "):
        assert f"\r{words}" in shown.getvalue()


def test_a_folder_is_named_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    color_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ("train", "images", "--labeled", "labeled", "--unlabeled", "unlabeled")
    for flag in ("--test", "--val"):
        told = metapl(*words, flag, "labeled/red", code=2).stderr
        assert told == (
            "metapl: labeled/red has no folder in it; expected a folder for each class, such as "
            "red/cat\n"
        )
    copied = metapl(*words, "--test", "labeled", code=2).stderr
    assert len(copied) < 400
    assert copied.count(".png") <= 2


def test_files_that_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains, files that break are replaced, recorded once, and counted at the end.

    So it is in folders that are too large to decode first. Where all are decoded first, such files
    are left out. A class that has no other file is named.
    """
    root = color_folders(tmp_path / "root")
    cut = [
        root / name
        for name in ("labeled/red/red-2.png", "unlabeled/blue-3.png", "unlabeled/red-4.png")
    ]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-60])
    cut += [root / "unlabeled" / f"{name}.png" for name in ("pipe", "loop")]
    os.mkfifo(cut[3])
    cut[4].symlink_to("loop.png")
    results, told = [], ""
    for first, workers in ((1, "0"), (1, "2"), (folders.DECODE_UP_TO, "0")):
        monkeypatch.setattr(folders, "DECODE_UP_TO", first)
        run = tmp_path / f"run{len(results)}"
        words = images_command(
            root, "--num-workers", workers, "--unlabeled-batch", "8", "--out", str(run)
        )
        with promptly():
            told = " ".join(metapl(*words).stdout.split())
        # A pipe and a loop are seen at the start in any case, and said then.
        later = "files that could not be read: 3, "
        assert (later in told) == (first == 1) == ("files that could not be read" in told)
        assert {*replaced_files(run / "skipped.jsonl")} == {*map(str, cut)}
        results.append(json.loads((run / "result.json").read_text()))
    assert results[0] == results[1]
    assert "labeled: of 12 files, 1 skipped: the picture is truncated (red/red-2.png)" in told
    assert "unlabeled: of 26 files, 2 skipped: the picture is truncated" in told
    assert told.count("red-2.png") == 1
    (root / "labeled" / "bee").mkdir()
    (root / "labeled" / "bee" / "1.png").write_bytes(b"")
    assert "bee" in metapl(*images_command(root), "--out", tmp_path / "none", code=2).stderr


PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"

EVIL = (
    "a\x1b[2J\x1b[31mred",
    "a\nmetapl: all is well",
    "a\rb",
    "a\u202egnp.exe",
    "a\x07",
    "a\x9bc",
    os.fsdecode(b"caf\xe9"),  # not UTF-8
)


def test_what_is_shown_is_one_line_of_printable_letters() -> None:
    for name in EVIL:
        text = shown(name)
        assert not {*text} & {*TURNS, "\n", "\r", "\x1b", "\x07", "\x9b"}
        text.encode()
        assert text != name
        assert shown(text) == text == few([name])
    # In any script.
    for name in (
        "größe",
        "猫",
        "naïve café",
        PERSIAN,
        "👩\u200d🚀",
        "a b",
        "$5_x",
    ):
        assert shown(name) == name


def test_predict_passes_over_what_is_no_plain_file_and_shows_names_harmlessly(
    tiny: Path, digit: Path, tmp_path: Path
) -> None:
    """And writes them as they are, to a new file."""
    folder, out = tmp_path / "pictures", tmp_path / "pictures" / "out.csv"
    folder.mkdir()
    out.write_text("file,class\n")
    for name in EVIL:
        (folder / f"{name}.png").write_bytes(b"no picture")
        (folder / f"fine {name}.png").write_bytes(digit.read_bytes())
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "loop.png").symlink_to("loop.png")
    for kind, make in SPECIAL.items():
        make(folder / f"{kind}.png")
    refused = metapl("predict", tiny, folder, "--out", out, code=2).stderr
    assert "is there already; expected the name of a new file" in refused
    assert out.read_text() == "file,class\n"
    out.unlink()
    with promptly():
        told = metapl("predict", tiny, folder, "--out", out, code=1)
    for text in (told.stdout, told.stderr):
        assert not {*text} & {*TURNS, "\r", "\x1b", "\x07", "\x9b"}
    assert (
        len(told.stderr.splitlines())
        == told.stderr.count("left out")
        == len(EVIL) + 2 + len(SPECIAL) + 1
    )
    with out.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {
            f"{folder}/fine {name}.png" for name in EVIL
        }


def test_a_spreadsheet_finds_no_formula_and_a_terminal_no_escape() -> None:
    sink = io.StringIO()
    names = [
        "=1+1.png",
        "+1.png",
        "-1.png",
        "@x.png",
        "\tx.png",
        "\rx.png",
        "a\rb.png",
        'a",b.png',
        "a\nb",
        "fine.png",
    ]
    writer = CsvRows(sink)
    for name in names:
        writer.writerow([name, "=cat", "0.5"])
    found = list(csv.reader(io.StringIO(sink.getvalue(), newline="")))
    assert [row[0] for row in found] == [f"'{name}" for name in names[:6]] + names[6:]
    assert {(row[1], row[2]) for row in found} == {("'=cat", "0.5")}
    sink = io.StringIO()
    sink.isatty = lambda: True  # type: ignore[method-assign]
    CsvRows(sink).writerow(["a\x1b[2J", "b"])
    assert sink.getvalue() == "a\\x1b[2J,b\n"


@pytest.mark.usefixtures("blank_programs")
def test_classes_of_any_name_go_through_everything(tmp_path: Path) -> None:
    """Training, evaluating, predicting and the model card."""
    root, evil, other = (
        color_folders(tmp_path / "root"),
        "=a\x1b[2J\u202e|<b>*c*",
        os.fsdecode(b"caf\xe9\n[x](y)"),
    )
    for part in ("labeled", "test"):
        (root / part / "red").rename(root / part / evil)
        (root / part / "blue").rename(root / part / other)
    out = tmp_path / "run"
    texts = [metapl(*images_command(root), "--out", out).stdout, metapl("evaluate", out).stdout]
    metapl("predict", out, root / "unlabeled", "--out", tmp_path / "out.csv", "--probabilities")
    texts.append(metapl("export", out, "--out", tmp_path / "card").stdout)
    assert (
        hashlib.sha256((tmp_path / "card" / "model.safetensors").read_bytes()).hexdigest()
        in texts[-1]
    )
    card = (tmp_path / "card" / "MODEL_CARD.md").read_text()
    for text in (*texts, card):
        assert not {*text} & {*TURNS, "\x1b", "\r"}
    assert f"{100 * result(out)['test_accuracy']:.1f} % (n = 12, 95 % interval" in card
    assert str(out) not in card, "no place on this machine"
    (classes,) = (line for line in card.splitlines() if line.startswith("| classes |"))
    assert r"\|\<b\>\*c\*" in classes
    assert r"caf\\xe9\\n\[x\](y)" in classes
    with (tmp_path / "out.csv").open(
        newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        assert {row["class"] for row in csv.DictReader(file)} <= {f"'{evil}", other}
