"""``benchmarks/pictures/wrong_labels.py``: its labels, its losses, its lists, in miniature."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.harness import read
from benchmarks.pictures import wrong_labels
from benchmarks.pictures.real import PictureSet
from benchmarks.pictures.wrong_labels import (
    ARMS,
    CLASSES,
    CONDITIONS,
    Condition,
    Draw,
    Size,
    generalized_cross_entropies,
    with_wrong_labels,
)
from metapl.errors import MetaplError

pytestmark = pytest.mark.docs


def squares(training: int = 200, tested: int = 40) -> PictureSet:
    """Return pictures of 16 x 16 in ten classes; a class is where a bright square lies."""
    rng = np.random.default_rng(0)
    count = training + tested
    labels = (np.arange(count) % 10).astype(np.int64)
    pictures = rng.integers(0, 60, (count, 16, 16), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        top = 8 * (label // 5)
        left = 3 * (label % 5)
        picture[top : top + 8, left : left + 3] += 180
    return PictureSet(
        pictures[:training], labels[:training], pictures[training:], labels[training:]
    )


def test_exactly_the_share_is_wrong_and_pairs_are_taken_for_each_other() -> None:
    labels = np.arange(3_000) % 10
    for condition in CONDITIONS:
        given_labels = with_wrong_labels(labels, condition, seed=1)
        assert (given_labels != labels).sum() == round(3_000 * condition.share)
    pairs = with_wrong_labels(labels, Condition("pairs", 0.4), seed=1)
    taken_for = {
        (CLASSES[right], CLASSES[wrong])
        for right, wrong in zip(labels, pairs, strict=True)
        if right != wrong
    }
    both_ways = {
        pair for first, second in wrong_labels.PAIRS for pair in ((first, second), (second, first))
    }
    assert taken_for == both_ways
    symmetric = with_wrong_labels(labels, Condition("symmetric", 0.5), seed=1)
    changes = {
        (right, wrong) for right, wrong in zip(labels, symmetric, strict=True) if right != wrong
    }
    assert len(changes) == 90


def test_a_seed_has_the_same_pictures_in_all_conditions_and_no_test_picture() -> None:
    whole = squares()
    # The first test picture is in the training pictures too, and a training picture is there twice.
    training = np.concatenate([whole.training, whole.test[:1], whole.training[:1]])
    labels = np.concatenate(
        [whole.training_labels, whole.test_labels[:1], whole.training_labels[:1]]
    )
    whole = dataclasses.replace(whole, training=training, training_labels=labels)
    size = Size(doubtful=180, clean_per_class=2)
    first = Draw.from_seed(whole, Condition("pairs", 0.4), 3, size)
    second = Draw.from_seed(whole, Condition("symmetric", 0.5), 3, size)
    assert (first.numbers == second.numbers).all()
    assert first.is_wrong.sum() == 72
    assert np.bincount(first.clean_labels).tolist() == [2] * 10
    pixels = [picture.tobytes() for picture in np.concatenate([first.pictures, first.clean])]
    assert len({*pixels}) == len(pixels) == 200
    assert whole.test[0].tobytes() not in pixels
    other = Draw.from_seed(whole, Condition("pairs", 0.4), 4, size)
    assert (first.numbers != other.numbers).any()


def test_the_auc_is_one_where_the_wrong_labels_come_first() -> None:
    draw = Draw.from_seed(squares(), Condition("pairs", 0.4), 0, Size(100, 2))
    assert draw.auc(draw.is_wrong.astype(float)) == 1.0
    wrong_first = np.argsort(~draw.is_wrong, kind="stable")
    assert draw.auc(wrong_labels.rising(wrong_first)) == 1.0
    assert draw.auc(wrong_labels.rising(wrong_first[::-1])) == 0.0


def test_gce_is_the_papers_loss_and_near_cross_entropy_for_a_small_q() -> None:
    logits = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    p = logits.softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(generalized_cross_entropies(logits, labels), (1 - p**0.7) / 0.7)
    near = generalized_cross_entropies(logits, labels, q=1e-6)
    exact = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(near, exact, rtol=1e-4, atol=1e-4)


def test_folds_share_each_class() -> None:
    labels = torch.arange(100) % 5
    folds = wrong_labels.folds_by_class(labels)
    for label in range(5):
        assert torch.bincount(folds[labels == label]).tolist() == [5] * 4


def test_all_of_the_first_seed_comes_before_the_second() -> None:
    jobs = [*wrong_labels.jobs(CONDITIONS, ARMS, seeds=3, seconds=60.0)]
    assert len(jobs) == 3 * len(CONDITIONS) * len(ARMS)
    seeds = [job["seed"] for job in jobs]
    assert seeds == sorted(seeds)


def test_differences_are_paired_by_seed_and_one_seed_has_no_interval() -> None:
    def row(arm: str, seed: int, accuracy: float, seconds: float = 60.0) -> dict[str, object]:
        condition = {"kind": "pairs", "share": 0.4, "seconds": seconds}
        scores = {"test_accuracy": accuracy, "auc": 0.9, "processor_seconds": seconds + 1}
        return {**condition, "arm": arm, "seed": seed, **scores}

    rows = [row(wrong_labels.OURS, 0, 0.8), row(wrong_labels.PLAIN, 0, 0.7)]
    line = "| pairs, 40 % | 60 | script, plain | 1 | 70.0 | +10.0 | 0.900 | +0.000 | 61 |"
    assert line in wrong_labels.table(rows)
    # What had more time is in lines of its own, and nothing is compared with it.
    longer = [*rows, row(wrong_labels.PLAIN, 0, 0.6, seconds=300.0)]
    assert line in wrong_labels.table(longer)
    alone = "| pairs, 40 % | 300 | script, plain | 1 | 60.0 | – | 0.900 | – | 301 |"
    assert alone in wrong_labels.table(longer)
    rows += [row(wrong_labels.OURS, 1, 0.9), row(wrong_labels.PLAIN, 1, 0.78)]
    # 10 and 12 points, of which a t-interval of one degree of freedom reaches 12.7 to each side.
    assert "| 2 | 74.0 | +11.0 (-1.7 to +23.7) |" in wrong_labels.table(rows)


@pytest.mark.long
@pytest.mark.parametrize("arm", ["by_script", "by_coteaching", "by_clean_pictures"])
def test_the_script_finds_wrong_labels(arm: str) -> None:
    torch.manual_seed(0)
    draw = Draw.from_seed(squares(600), Condition("symmetric", 0.2), 0, Size(300, 10))
    row = getattr(wrong_labels, arm)(draw, 5.0)
    assert row["auc"] > 0.8, row
    assert row["test_accuracy"] > 0.5, row


@pytest.mark.long
def test_a_miniature_leaves_a_row_of_each_arm_and_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(wrong_labels, "set_of", lambda name, source: squares())
    monkeypatch.setattr(sys, "argv", ["wrong_labels.py", "--miniature", "--out", str(out)])
    threads = torch.get_num_threads()
    wrong_labels.main()
    rows = read(out)
    assert {row["arm"] for row in rows} == {*ARMS} - {wrong_labels.CLEAN_LAB}
    assert all(row["wrong"] == 24 and row["tested_on"] == 40 for row in rows)
    assert all(0 <= row["auc"] <= 1 for row in rows)
    without_accuracy = {row["arm"] for row in rows if "test_accuracy" not in row}
    assert without_accuracy == {wrong_labels.ATTRIBUTE}
    assert "no row of cleanlab" in capsys.readouterr().err
    content = out.read_bytes()
    wrong_labels.main()
    assert out.read_bytes() == content
    torch.set_num_threads(threads)


def test_the_page_has_the_table_of_the_committed_rows() -> None:
    page = (wrong_labels.RESULTS.parents[1] / "docs" / "label-noise.md").read_text()
    begin = page.partition("<!-- wrong_labels:begin -->\n")[2]
    assert begin.partition("\n<!-- wrong_labels:end -->")[0] == wrong_labels.table(
        read(wrong_labels.RAW, having="arm")
    )


def test_cleanlabs_interpreter_is_asked_and_its_error_said(tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(
        "#!/bin/sh\necho a line before\necho '[\"9\", [true, false], [0.1, 0.9]]'\n"
    )
    interpreter.chmod(0o755)
    labels = torch.tensor([0, 1])
    answer = wrong_labels.ask_cleanlab(labels, torch.eye(2), interpreter)
    assert answer == ("9", [True, False], [0.1, 0.9])
    with pytest.raises(MetaplError, match="expected an interpreter that has cleanlab"):
        wrong_labels.ask_cleanlab(labels, torch.eye(2), tmp_path / "nothing")
    interpreter.write_text("#!/bin/sh\necho no module named cleanlab >&2\nexit 1\n")
    with pytest.raises(MetaplError, match="no module named cleanlab"):
        wrong_labels.ask_cleanlab(labels, torch.eye(2), interpreter)


@pytest.mark.long
def test_the_doubtful_labels_are_drawn_on_one_sheet(tmp_path: Path) -> None:
    whole = squares()
    size = Size(doubtful=120, clean_per_class=2)
    threads = torch.get_num_threads()
    result = wrong_labels.find_doubts(whole, 1.0, size, wrong_labels.MINIATURE["settings"])
    torch.set_num_threads(threads)
    doubts = result["doubts"]
    assert [doubt["rank"] for doubt in doubts] == [*range(1, 101)]
    for doubt in doubts:
        assert CLASSES[whole.training_labels[doubt["number"]]] == doubt["given"]
    chances = [doubt["p_given"] for doubt in doubts]
    assert chances == sorted(chances)
    sheet = tmp_path / "sheet.png"
    wrong_labels.draw_sheet(whole, doubts, sheet)
    with Image.open(sheet) as image:
        assert image.size == (1_000, 1_140)
