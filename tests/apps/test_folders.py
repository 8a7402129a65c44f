"""Folders of pictures: what a scan finds, what is wrong with them, which files are sound, and how they split."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from metapl.apps.images import METHODS, Images, Pictures, apart
from metapl.apps.look import settled
from metapl.apps.pictures import (
    Files,
    Finding,
    LabeledFiles,
    check_folders,
    reader,
    scan_labeled,
    scan_unlabeled,
    stratified_split,
    verify_files,
)
from metapl.apps.pictures.check import without_copies
from metapl.apps.settings import Fitting
from metapl.errors import MetaplError


def fill(root: Path, *names: str) -> Path:
    """Empty files, with the folders that they need."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def pictures(root: Path, **levels: list[int]) -> Path:
    """One folder a class, with small pictures of the given levels: two of one level have the same bytes."""
    for name, values in levels.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, value in enumerate(values):
            Image.new("RGB", (4, 4), (value, value, value)).save(root / name / f"{i}.bmp")
    return root


# --- scans ------------------------------------------------------------------------------------------------------------


def test_any_tree(tmp_path: Path) -> None:
    root = fill(
        tmp_path, "b.jpg", "a/z.PNG", "a/deep/er/y.Tiff", "a-b.webp", "notes.txt", "README", "a/notes.txt",
        ".hidden.png", "a/.cache/x.png", "a/._x.png", "__MACOSX/x.png",
    )  # fmt: skip
    files = scan_unlabeled(root)
    assert files.names == ("a-b.webp", "a/deep/er/y.Tiff", "a/z.PNG", "b.jpg")
    assert files.passed_over == {".txt": 2, "no suffix": 1}
    assert list(files.paths()) == [str(root / name) for name in files.names]
    assert files.path(3) == root / "b.jpg"
    assert files.keep([2, 0]).names == ("a/z.PNG", "a-b.webp")
    assert scan_unlabeled(str(root)) == files


def test_one_folder_a_class(tmp_path: Path) -> None:
    root = fill(
        tmp_path, "dog/1.png", "cat/2.png", "cat/more/1.jpg", "loose.png", "list.csv", "dog/x.txt", ".git/a/b.png"
    )
    (root / "empty").mkdir()
    files = scan_labeled(root)
    assert files.classes == ("cat", "dog", "empty")
    assert files.names == ("cat/2.png", "cat/more/1.jpg", "dog/1.png")
    assert files.targets().tolist() == [0, 0, 1]
    assert files.loose == 1
    assert files.passed_over == {".csv": 1, ".txt": 1}
    assert files.counts() == {"cat": 2, "dog": 1, "empty": 0}
    kept = files.keep([2, 1])
    assert (kept.names, kept.labels) == (("dog/1.png", "cat/more/1.jpg"), (1, 0))
    assert kept.classes == files.classes


def test_a_link_in_a_class_folder_to_the_folder_above_brings_no_pictures_of_other_classes(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.png", "cat/more/2.png", "dog/3.png")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "dog" / "up").symlink_to(tmp_path)
    found = scan_labeled(tmp_path)
    assert list(zip(found.names, found.labels, strict=True)) == [
        ("cat/1.png", 0),
        ("cat/more/2.png", 0),
        ("dog/3.png", 1),
    ]


def test_links_are_followed_and_end(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", "a/1.png")
    fill(tmp_path / "elsewhere", "2.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to(tmp_path / "elsewhere")
    (root / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert scan_unlabeled(root).names == ("a/1.png", "b/2.png", "gone.png")
    assert [*verify_files(scan_unlabeled(root), "size").skipped.values()][-1] == "No such file or directory"


def test_what_cannot_be_scanned(tmp_path: Path) -> None:
    fill(tmp_path, "one/x.txt", "file.png")
    (tmp_path / "none").mkdir()
    for scan in (scan_labeled, scan_unlabeled):
        with pytest.raises(MetaplError, match="does not exist"):
            scan(tmp_path / "nowhere")
        with pytest.raises(MetaplError, match="is a file"):
            scan(tmp_path / "file.png")
    with pytest.raises(MetaplError, match=r"no picture in it, only 1 with \.txt; expected files that end with .*\.jpg"):
        scan_unlabeled(tmp_path / "one")
    with pytest.raises(MetaplError, match="no folder in it; expected one folder a class"):
        scan_labeled(tmp_path / "none")
    (tmp_path / "some" / "cat").mkdir(parents=True)
    with pytest.raises(MetaplError, match="no picture in it"):
        scan_labeled(tmp_path / "some")


def test_many_files(tmp_path: Path) -> None:
    for folder in range(20):
        os.mkdir(tmp_path / str(folder))
        for file in range(100):
            os.close(os.open(tmp_path / str(folder) / f"{file}.png", os.O_CREAT))
    told: list[int] = []
    start = time.perf_counter()
    files = scan_unlabeled(tmp_path, told.append)
    seconds = time.perf_counter() - start
    assert len(files) == 2_000
    assert told[-1] == 2_000
    assert told == sorted(told)
    assert seconds < 4  # some 0.01 s on a machine with nothing else to do
    labeled = scan_labeled(tmp_path, told.append)
    assert len(labeled.classes) == 20
    assert len(verify_files(files, "size").skipped) == 2_000


# --- findings ---------------------------------------------------------------------------------------------------------


def found(findings: list[Finding], *words: str) -> Finding:
    (one,) = [finding for finding in findings if all(word in finding.message for word in words)]
    return one


def test_nothing_to_find(tmp_path: Path) -> None:
    labeled = scan_labeled(pictures(tmp_path / "l", cat=[1, 2], dog=[3, 4]))
    unlabeled = scan_unlabeled(pictures(tmp_path / "u", any=[1, 5, 6]))  # labelled pictures may be there too
    validation = scan_labeled(pictures(tmp_path / "v", cat=[11], dog=[12]))
    test = scan_labeled(pictures(tmp_path / "t", cat=[13], dog=[14]))
    assert check_folders(labeled, unlabeled, validation, test) == []
    assert check_folders(labeled) == []


def test_classes(tmp_path: Path) -> None:
    root = pictures(tmp_path, Cat=[1, 2], cat=[3, 4], dog=[5])
    (root / "empty").mkdir()
    fill(root, "loose.png")
    findings = check_folders(scan_labeled(root))
    assert [one.level for one in findings] == ["error", "warning", "warning", "warning"]
    assert found(findings, "'empty'", "no picture").files == (root / "empty",)
    assert found(findings, "'dog'", "one picture").files == (root / "dog" / "0.bmp",)
    assert found(findings, "'Cat' and 'cat'", "case").files == (root / "Cat", root / "cat")
    assert "1 pictures" in found(findings, "beside").message
    alone = check_folders(scan_labeled(pictures(tmp_path / "alone", cat=[1, 2])))
    assert (alone[0].level, "one class" in alone[0].message) == ("error", True)


def test_the_parts_of_a_data_set_are_not_its_classes(tmp_path: Path) -> None:
    """The folder above that of the classes was given: its subfolders have subfolders, and are called as parts are."""
    root = tmp_path / "data"
    pictures(root / "Labelled", cat=[1, 2], dog=[3, 4])
    pictures(root / "held-out", cat=[5, 6], dog=[7, 8])
    (finding,) = check_folders(scan_labeled(root))
    assert finding.level == "error"
    assert (
        "Labelled, held-out, which are the parts of a data set; expected one subfolder for each class"
        in finding.message
    )
    assert finding.message.endswith(str(root / "Labelled"))
    pictures(tmp_path / "years" / "train2017", cat=[1, 2], dog=[3, 4])
    pictures(tmp_path / "years" / "02_val", cat=[5, 6], dog=[7, 8])
    found(check_folders(scan_labeled(tmp_path / "years")), "02_val, train2017", "the parts of a data set")
    assert check_folders(scan_labeled(pictures(tmp_path / "toys", train1=[1, 2], train2=[3, 4]))) == []
    # Classes may be called so: bottles with a label and without.
    flat = pictures(tmp_path / "bottles", labeled=[1, 2], unlabeled=[3, 4])
    (finding,) = check_folders(scan_labeled(flat))
    assert finding.level == "warning"
    assert "which may be the parts of a data set" in finding.message
    assert check_folders(scan_labeled(pictures(tmp_path / "vehicles", train=[1, 2], car=[3, 4]))) == []


def test_classes_with_pictures_in_deeper_folders_alone_are_noted(tmp_path: Path) -> None:
    root = tmp_path / "data"
    pictures(root / "first", cat=[1, 2], dog=[3, 4])
    pictures(root / "second", cat=[5, 6], dog=[7, 8])
    finding = found(check_folders(scan_labeled(root)), "(first, second)", "first/cat", "rather cat, dog")
    assert finding.level == "warning"
    Image.new("L", (4, 4), 9).save(root / "second" / "9.png")  # a class with a picture of its own
    assert check_folders(scan_labeled(root)) == []


def test_no_folder_lies_inside_that_of_the_classes(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data", cat=[1, 2], more=[3, 4], train=[5, 6])
    labeled, inside = scan_labeled(root), scan_unlabeled(root / "more")
    finding = found(check_folders(labeled, inside), "the unlabeled folder", "lies inside", "cat, more, train")
    assert finding.level == "error"
    assert finding.message.endswith(f"Did you mean {root / 'train'}?")
    # All pictures may be in one folder, of which the classes are a part.
    above = scan_labeled(pictures(tmp_path / "all" / "few", cat=[1, 2], dog=[3, 4]))
    pictures(tmp_path / "all", other=[7, 8])
    assert [one for one in check_folders(above, scan_unlabeled(tmp_path / "all")) if one.level == "error"] == []


def test_a_test_folder_around_the_labeled_one_is_named_and_not_each_of_its_pictures(tmp_path: Path) -> None:
    labeled = scan_labeled(pictures(tmp_path / "all" / "few", cat=[1, 2], dog=[3, 4]))
    pictures(tmp_path / "all" / "held_out", cat=[5], dog=[6])
    findings = check_folders(labeled, test=scan_labeled(tmp_path / "all"))
    finding = found(findings, "the labeled folder", "lies inside the test folder", "the test pictures alone")
    assert finding.level == "error"
    assert not any("are among" in one.message for one in findings)


def test_a_file_on_two_sides_is_named_once(tmp_path: Path) -> None:
    folder = scan_labeled(pictures(tmp_path / "l", cat=[1, 2], dog=[3, 4]))
    (leak,) = check_folders(folder, test=folder)
    assert f"too: {tmp_path / 'l' / 'cat' / '0.bmp'}, {tmp_path / 'l' / 'cat' / '1.bmp'}, " in leak.message


def test_held_out_pictures_in_training(tmp_path: Path) -> None:
    labeled = scan_labeled(pictures(tmp_path / "l", cat=[1, 2], dog=[3, 4]))
    unlabeled = scan_unlabeled(pictures(tmp_path / "u", any=[5, 6, 7]))
    validation = scan_labeled(pictures(tmp_path / "v", cat=[5, 2], dog=[9]))
    test = scan_labeled(pictures(tmp_path / "t", cat=[1, 6], dog=[9, 4]))
    findings = check_folders(labeled, unlabeled, validation, test)
    assert [one.level for one in findings] == ["error"] * 4 + ["warning"]
    paths = {(tmp_path / name) for name in ("t/cat/0.bmp", "l/cat/0.bmp", "t/dog/1.bmp", "l/dog/1.bmp")}
    leak = found(findings, "2 test pictures", "labeled ones")
    assert set(leak.files) == paths
    assert all(str(path) in leak.message for path in paths)
    assert "remove them from the labeled folder" in leak.message
    for words in (("1 test", "unlabeled"), ("1 validation", "among the labeled"), ("1 validation", "unlabeled")):
        found(findings, *words)
    assert found(findings, "1 test pictures are among the validation").level == "warning"
    assert [one.kind for one in findings if "test pictures" in one.message] == ["test copies"] * 3
    assert {one.kind for one in findings if "validation pictures" in one.message} == {"validation copies"}


def test_the_same_folder_twice(tmp_path: Path) -> None:
    labeled = scan_labeled(pictures(tmp_path, cat=list(range(4)), dog=list(range(10, 14))))
    leak = found(check_folders(labeled, test=labeled), "8 test pictures", "and 3 more")
    assert leak.level == "error"
    assert len(leak.files) == 16


def test_labelled_pictures_that_are_all_unlabelled_too_are_noted(tmp_path: Path) -> None:
    root = pictures(tmp_path / "l", cat=[1, 2], dog=[3, 4])
    labeled = scan_labeled(root)
    same = found(check_folders(labeled, scan_unlabeled(root)), "all labeled pictures", "no others", "more pictures")
    assert (same.level, same.kind) == ("warning", "labeled copies")
    copies = scan_unlabeled(pictures(tmp_path / "u", any=[4, 3, 2, 1, 5, 6]))
    found(check_folders(labeled, copies), "all labeled pictures", "4 of its 6", "no harm")
    test = scan_labeled(pictures(tmp_path / "t", cat=[11], dog=[12]))
    assert len(check_folders(labeled, copies, test=test)) == 1
    fewer = scan_unlabeled(pictures(tmp_path / "fewer", any=[4, 3, 2, 5, 6]))
    assert check_folders(labeled, fewer) == []


def test_files_that_are_copies_of_others_are_left_out(tmp_path: Path) -> None:
    unlabeled = scan_unlabeled(pictures(tmp_path / "u", any=[1, 5, 2, 6, 2]))
    val = scan_labeled(pictures(tmp_path / "v", cat=[2, 9], dog=[1]))
    assert without_copies(unlabeled, val).names == ("any/1.bmp", "any/3.bmp")
    assert len(without_copies(val, unlabeled)) == 1
    assert len(without_copies(val, val)) == 0
    others = scan_unlabeled(pictures(tmp_path / "w", any=[7, 8]))
    assert without_copies(others, val) is others
    (tmp_path / "u" / "any" / "0.bmp").unlink()
    assert without_copies(unlabeled, val).names == ("any/0.bmp", "any/1.bmp", "any/3.bmp"), "one that is gone stays"


@pytest.mark.parametrize("others", [3, 0])
def test_pictures_set_aside_for_validation_are_not_learned_from_as_unlabeled_ones(tmp_path: Path, others: int) -> None:
    labels = {"cat": list(range(4)), "dog": list(range(10, 14))}
    labeled = pictures(tmp_path / "l", **labels)
    many = pictures(tmp_path / "u", any=[*labels["cat"], *labels["dog"], *range(100, 100 + others)])
    own: dict[str, Any] = {"pictures": Pictures(image_size=8, network="small_cnn"), "fitting": Fitting(steps=4)}
    given = Images(labeled=str(labeled), unlabeled=str(many), val_fraction=0.5, **own)
    config, said = settled(given, METHODS["uda"], lambda text: None)[0], list[str]()
    task = config.data(said.append, False, None)
    val = {task.validation.images.path(i).read_bytes() for i in range(4)}
    left = [task.unlabeled.images.path(i).read_bytes() for i in range(len(task.unlabeled.images))]
    assert len(left) == task.record["unlabeled"] == 4 + others
    assert val.isdisjoint(left)
    said_of_it = [line for line in said if "4 unlabeled pictures are left out: they are copies of labeled ones" in line]
    assert len(said_of_it) == 1
    assert any(f"4 labeled pictures of 2 classes (cat, dog), {4 + others} unlabeled" in line for line in said)
    with pytest.raises(MetaplError, match=r"all 4 unlabeled pictures in .* expected others"):
        apart(scan_unlabeled(labeled / "cat"), scan_labeled(labeled), said.append)


def test_a_picture_in_two_classes(tmp_path: Path) -> None:
    labeled = scan_labeled(pictures(tmp_path, cat=[1, 2], dog=[2, 3]))
    finding = found(check_folders(labeled), "pictures in more than one class, 1")
    assert (finding.level, finding.kind) == ("error", "contradiction")
    assert set(finding.files) == {tmp_path / "cat" / "1.bmp", tmp_path / "dog" / "0.bmp"}
    # Twice in one class is twice the weight, and no harm.
    assert check_folders(scan_labeled(pictures(tmp_path / "same", cat=[1, 1], dog=[2, 3]))) == []


def test_classes_of_held_out_folders(tmp_path: Path) -> None:
    labeled = scan_labeled(pictures(tmp_path / "l", cat=[1, 2], dog=[3, 4]))
    test = scan_labeled(pictures(tmp_path / "t", cat=[5], fish=[6]))
    (tmp_path / "t" / "empty").mkdir()
    findings = check_folders(labeled, test=scan_labeled(tmp_path / "t"))
    assert found(findings, "test folder", "fish").level == "error"
    assert {one.kind for one in findings} == {"classes"}
    assert "empty" not in found(findings, "fish").message.replace(str(tmp_path), "")
    assert found(findings, "no picture of dog").level == "warning"
    assert len(check_folders(labeled, validation=test)) == 2


def test_bytes_are_read_only_where_they_can_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, content: bytes) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    large = bytes(range(256)) * 400
    write("l/a/1.bmp", large)
    write("l/b/1.bmp", b"of a size of its own")
    write("l/a/2.bmp", b"of another one")
    write("l/b/2.bmp", b"1234")
    write("u/1.bmp", large[:50_000] + b"x" * 10 + large[50_010:])  # differs in the middle
    write("u/2.bmp", b"x" + large[1:])  # differs at the start
    write("t/a/1.bmp", large[:-1] + b"x")  # differs at the end
    write("t/b/2.bmp", b"1243")
    read: list[str] = []
    from metapl.apps.pictures import check

    whole = check.digest
    monkeypatch.setattr(check, "digest", lambda path: read.append(Path(path).parent.name) or whole(path))
    told: list[int] = []
    labeled, test = scan_labeled(tmp_path / "l"), scan_labeled(tmp_path / "t")
    assert check_folders(labeled, scan_unlabeled(tmp_path / "u"), None, test, told.append) == []
    assert sorted(read) == ["a", "a", "u"]
    assert told[-1] == 6


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    """It is the copy of nothing, and is left out where the pictures are read."""
    labeled = scan_labeled(pictures(tmp_path / "l", cat=[1, 2], dog=[3, 4]))
    copies = scan_unlabeled(pictures(tmp_path / "u", any=[3]))
    test = scan_labeled(pictures(tmp_path / "t", dog=[3], cat=[9]))
    assert any(finding.kind == "test copies" for finding in check_folders(labeled, copies, None, test))
    labeled.path(2).unlink()
    copies.path(0).unlink()
    assert not any(finding.kind == "test copies" for finding in check_folders(labeled, copies, None, test))
    assert [*verify_files(labeled).skipped] == ["dog/0.bmp"]


# --- sound files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Files:
    root = pictures(tmp_path / "mixed", good=[1, 2])
    fill(root, "empty.png")
    (root / "words.jpg").write_bytes(b"words")
    (root / "words too.jpg").write_bytes(b"other words")
    Image.new("RGB", (60, 60)).save(root / "large.png")
    Image.new("RGB", (30, 30)).save(root / "cut.bmp")
    (root / "cut.bmp").write_bytes((root / "cut.bmp").read_bytes()[:1000])
    return scan_unlabeled(root)


EMPTY, WORDS, LARGE, CUT = {"empty.png"}, {"words.jpg", "words too.jpg"}, {"large.png"}, {"cut.bmp"}


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        ("size", EMPTY),
        ("header", EMPTY | WORDS | LARGE),
        ("decode", EMPTY | WORDS | LARGE | CUT),
        (None, EMPTY | WORDS | LARGE | CUT),
    ],
)
def test_depths(mixed: Files, depth: Any, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_PIXELS", 1000)
    told: list[int] = []
    verified = verify_files(mixed, depth, progress=told.append)
    assert {*verified.skipped} == expected
    sound = mixed.keep(verified.sound)
    assert set(sound.names) == set(mixed.names) - expected
    assert told == [*range(1, 8)]


def test_summary(mixed: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_PIXELS", 1000)
    lines = verify_files(mixed).summary().splitlines()
    assert lines[0] == "2 skipped: not a picture of a known format (words too.jpg, words.jpg)"
    assert set(lines[1:]) == {
        "1 skipped: the file is empty (empty.png)",
        "1 skipped: the picture has more than the 1,000 pixels that are allowed (large.png)",
        "1 skipped: the picture is truncated (cut.bmp)",
    }


def test_depth_by_number(mixed: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from metapl.apps.pictures import check

    assert verify_files(mixed).depth == "decode"
    monkeypatch.setattr(check, "DECODE_UP_TO", 6)
    assert verify_files(mixed).depth == "header"
    monkeypatch.setattr(check, "HEADER_UP_TO", 6)
    assert verify_files(mixed).depth == "size"


# --- splits -----------------------------------------------------------------------------------------------------------

LABELS = torch.arange(10).repeat_interleave(torch.arange(30, 130, 10))  # 30 to 120 a class, 750 in all


def test_stratified(tmp_path: Path) -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    train, validation = stratified_split(labels, 0.1, seed=0)
    assert torch.cat([train, validation]).sort().values.tolist() == list(range(113))
    assert labels[validation].bincount(minlength=4).tolist() == [10, 1, 1, 0]
    assert torch.equal(validation, stratified_split(labels, 0.1, seed=0)[1])
    assert not torch.equal(validation, stratified_split(labels, 0.1, seed=1)[1])
    assert labels[stratified_split(labels, 0.99, seed=0)[1]].bincount(minlength=4).tolist() == [99, 9, 1, 0]
    for fraction in (0.0, 1.0, -1):
        with pytest.raises(MetaplError, match="fraction"):
            stratified_split(labels, fraction, seed=0)
    with pytest.raises(MetaplError, match="--val"):
        stratified_split(torch.arange(5), 0.5, seed=0)


def test_labeled_files_are_files(tmp_path: Path) -> None:
    files = scan_labeled(pictures(tmp_path, cat=[1], dog=[2]))
    assert isinstance(files, LabeledFiles)
    assert verify_files(files).sound == (0, 1)
