"""Label sets: what the figure counts, and files of every form, good and bad."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from metapl.apps.evaluation import MultiLabelAccuracy, multi_label_accuracy, read_label_sets
from metapl.errors import MetaplError

CLASSES = ("cat", "dog", "great owl")
NAMES = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/3.png")
SETS = ({0}, {0, 1}, set(), {2})


def test_by_hand() -> None:
    sets = [{0}, {0, 1}, {2}, set(), {1, 2}]
    # Right, right, wrong, not counted, wrong.
    assert multi_label_accuracy(torch.tensor([0, 1, 1, 2, 0]), sets) == MultiLabelAccuracy(0.5, 4, 1)
    assert json.loads(json.dumps(asdict(multi_label_accuracy(torch.tensor([0]), [{0}])))) == {
        "accuracy": 1.0,
        "n": 1,
        "without_label": 0,
    }


def test_with_one_label_each_it_is_the_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 7, (300,), generator=generator) for _ in range(2))
    found = multi_label_accuracy(predicted, [{label} for label in labels.tolist()])
    assert found.accuracy == (predicted == labels).double().mean().item()


def test_a_larger_set_never_lowers_it_and_an_empty_one_does_not_count() -> None:
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randint(0, 5, (200,), generator=generator)
    sets: list[set[int]] = [set() for _ in range(200)]
    before = -1.0
    for label in range(5):
        sets = [one | {label} if index % 3 else one for index, one in enumerate(sets)]
        found = multi_label_accuracy(predicted, sets)
        assert (found.n, found.without_label) == (133, 67)
        assert found.accuracy >= before
        before = found.accuracy
    assert before == 1.0


@pytest.mark.parametrize(
    ("predicted", "sets", "words"),
    [
        (
            torch.tensor([0, 1]),
            [{0}],
            r"sets for 1 examples, 1 of them with a label, .* shape \(2,\)",
        ),
        (torch.tensor([[0]]), [{0}], r"shape \(1, 1\)"),
        (torch.tensor([0, 1]), [set(), set()], "2 examples, 0 of them with a label"),
    ],
)
def test_sets_that_do_not_fit(predicted: torch.Tensor, sets: list[set[int]], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        multi_label_accuracy(predicted, sets)


# --------------------------------------------------------------------------------------------------------------- files


def read(tmp_path: Path, content: Any, **over: Any) -> tuple[set[int], ...]:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "sets").write_text(text, encoding="utf-8", newline="")
    given = {"classes": CLASSES, "names": NAMES, **over}
    return tuple(set(one) for one in read_label_sets(tmp_path / "sets", **given))


@pytest.mark.parametrize(
    "content",
    [
        [[0], [0, 1], [], [2]],
        [["cat"], ["cat", "dog"], [], ["great owl"]],
        [["0"], ["0", "1"], [], ["2"]],
        {"dog/1.png": [], "cat/2.png": [1, 0], "cat/1.png": [0], "dog/deep/3.png": [2]},
        {"3.png": ["great owl"], "dog/1.png": [], "2.png": ["dog", "cat", "cat"], "cat/1.png": ["cat"]},
        {"cat/1.png": [0], "2.png": [0, 1], "dog/1.png": [], "3.png": [2], "bird/9.png": [1]},
        "file,labels\ncat/1.png,cat\n2.png,cat;dog\ndog/1.png,\n3.png,great owl\n",
        '\ufefffile,labels\r\n"cat/1.png",0\r\n2.png,0; 1;\r\ndog/1.png,\r\ndog/deep/3.png,2\r\n',
        "note,labels,file\n-,great owl,3.png\n-,,dog/1.png\n-,dog;cat,2.png\n-,cat,cat/1.png\n",
        "\n  [[0], [0, 1], [], [2]]",
    ],
)
def test_every_form_says_the_same(content: Any, tmp_path: Path) -> None:
    assert read(tmp_path, content) == SETS


def test_a_list_without_names_goes_by_place(tmp_path: Path) -> None:
    assert read(tmp_path, [[0], [], [2]], names=None) == ({0}, set(), {2})


def test_reals_list_goes_by_the_numbers_of_the_files(tmp_path: Path) -> None:
    names = [f"n0{number % 3}/ILSVRC2012_val_{number:08}.JPEG" for number in (7, 2, 9, 1)]
    sets = [[number % 3] if number % 2 else [] for number in range(1, 11)]
    assert read(tmp_path, sets, names=names) == ({1}, set(), {0}, {1})
    with pytest.raises(MetaplError, match="list of 6 entries, and a test file has the number 9"):
        read(tmp_path, sets[:6], names=names)
    with pytest.raises(
        MetaplError, match="list of 10 entries, and there are 5 test examples"
    ):  # one is called otherwise
        read(tmp_path, sets, names=[*names, "n01/x.JPEG"])


def test_indices_where_classes_are_called_by_numbers(tmp_path: Path) -> None:
    same, shifted = {"classes": ("0", "1", "2")}, {"classes": ("1", "10", "2")}
    assert read(tmp_path, [[0], [1, 2], [], [2]], **same) == ({0}, {1, 2}, set(), {2})
    assert read(tmp_path, [["1"], ["10", "2"], [], ["2"]], **shifted) == ({0}, {1, 2}, set(), {2})
    with pytest.raises(
        MetaplError, match="1 of the 3 classes can be read in two ways: 1 is the index of '10' and the name of another"
    ):
        read(tmp_path, [[1], [2, 0], [], [2]], **shifted)
    with pytest.raises(
        MetaplError, match="can be read in two ways"
    ):  # 0 is no name, so these are indices, or a mistake
        read(tmp_path, [["0"], ["1"], [], ["2"]], **shifted)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([[0], [1]], "list of 2 entries, and there are 4 test examples"),
        (
            [[0], [1], [2], [3]],
            r"1 of the 4 classes .* not among the run's: 3; expected their names, .*, or 0 to 2",
        ),
        ([[0], [-1], [2], []], "not among the run's: -1"),
        ([["cat"], ["cow"], ["2"], []], "2 of the 3 .*: 2, cow; expected their names, such as cat, dog, great owl"),
        ([[0], ["dog"], [], []], "1 of the 2 .*: 0; expected their names"),
        ([[0], 1, [], []], r"the entry of 1 is 1; expected a list of classes"),
        ([[0], [True], [], []], r"the entry of 1 is \[true\]"),
        ([[0], [0.5], [], []], r"the entry of 1 is \[0.5\]"),
        ("[[0], [1]", "cannot be read: Expecting"),
        (
            {"cat/1.png": [0]},
            r"3 of the 4 .*: cat/2.png has no entry, dog/1.png has .*3.png has no entry; .* it: cat/1",
        ),
        (
            {"1.png": [0], "2.png": [], "3.png": []},
            r"2 of the 4 .*: cat/1.png has 1.png, as others have, dog/1.png has .*; .* with its folder",
        ),
        ({"cat/2.png": [0], "2.png": [0]}, r"of the 4 test files .*cat/2.png has cat/2.png, 2.png"),
        ('{"3.png": [0], "3.png": [1]}', "more than one entry of 3.png"),
        ({"cat/1.png": "cat"}, 'the entry of cat/1.png is "cat"'),
        ("file,labels\n3.png,cat\n3.png,dog\n", "more than one entry of 3.png"),
        ("file,labels\n3.png,cat,dog\n", "line 2 has not as many cells as the first; labels are separated by ;"),
        ("file,labels\n3.png\n", "line 2 has not as many cells"),
        ("file,class\n3.png,cat\n", "begins with 'file,class'; expected JSON, or CSV with the columns file and labels"),
        ("file,labels\n3.png,cat dog\n", "not among the run's: cat dog"),
        ("", "begins with ''"),
        ("file,labels\n", "4 of the 4 test files .*: cat/1.png has no entry, .* and 1 more"),
    ],
)
def test_files_that_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match=words) as refusal:
        read(tmp_path, content)
    assert str(tmp_path / "sets") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match="cannot be read: No such file"):
        read_label_sets(tmp_path / "none", CLASSES, NAMES)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MetaplError, match="utf-8"):
        read_label_sets(tmp_path / "bytes", CLASSES, NAMES)
    with pytest.raises(MetaplError, match="the test examples have no names; expected a JSON list"):
        read(tmp_path, {"1.png": [0]}, names=None)
