"""``benchmarks/pictures/real.py``: its draws, its script, its rows, in miniature."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import read
from benchmarks.pictures import real
from metapl.errors import MetaplError

pytestmark = pytest.mark.docs


def test_a_draw_has_as_many_of_each_class_and_a_larger_one_contains_it() -> None:
    small = real.Draw.from_case(real.Case("digits", 40, 100), seed=3, source="")
    large = real.Draw.from_case(real.Case("digits", 400, None), seed=3, source="")
    assert np.bincount(small.labels).tolist() == [4] * 10
    assert np.bincount(large.labels).tolist() == [40] * 10
    assert len(small.unlabeled) == 100
    assert len(large.unlabeled) == len(large.whole.training) - 400

    def rows(pictures: np.ndarray) -> set[bytes]:
        return {picture.tobytes() for picture in pictures}

    assert rows(small.labeled) <= rows(large.labeled)
    # A few of the digits are alike to the pixel.
    assert len(rows(large.labeled) & rows(large.unlabeled)) < 5
    other = real.Draw.from_case(real.Case("digits", 40, 100), seed=4, source="")
    assert rows(small.labeled) != rows(other.labeled)


def test_all_of_the_first_draw_comes_before_the_second() -> None:
    jobs = [*real.jobs(real.CASES, real.METHODS, seconds=300.0, most_draws=8)]
    numbers = [job["draw"] for job in jobs]
    assert numbers == sorted(numbers)
    draws = {(job["set_name"], job["labels"], job["unlabeled"]): job["draw"] + 1 for job in jobs}
    assert draws["fashion", 40, 6_000] == draws["fashion", 40, None] == 5
    assert draws["fashion", 100, 6_000] == 5
    assert draws["fashion", 4_000, 6_000] == 3
    assert draws["fashion", 400, 6_000] == draws["mnist", 400, None] == 8


def test_views_keep_the_pictures_size_and_cover_a_square() -> None:
    x = torch.ones(6, 1, 28, 28)
    torch.manual_seed(0)
    assert real.shifted(x, is_mirrored=False).shape == x.shape
    covered = (real.changed(x, is_mirrored=True) == 0).sum((1, 2, 3))
    # Of the border, rotation and shifts cover some more.
    assert (covered >= 64).all()
    # A picture that is only mirrored has its columns in the other order.
    ramp = torch.arange(28.0).expand(50, 1, 28, 28)
    mirrored = real.placed(ramp, degrees=0.0, zoom=0.0, is_mirrored=True)
    falls = mirrored[:, 0, 14, 20] < mirrored[:, 0, 14, 8]
    assert 5 < falls.sum() < 45


def bars(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of 16 x 16 with a bright bar at the top, in the middle or at the bottom."""
    rng = np.random.default_rng(count)
    labels = np.arange(count) % 3
    pictures = rng.integers(0, 60, (count, 16, 16), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[5 * label : 5 * label + 5] += 180
    return pictures, labels


@pytest.mark.long
@pytest.mark.parametrize("with_fixmatch", [False, True])
def test_the_script_learns(*, with_fixmatch: bool) -> None:
    training, labels = bars(60)
    test, test_labels = bars(90)
    draw = real.Draw(
        labeled=training[:12],
        labels=labels[:12],
        unlabeled=training[12:],
        whole=real.PictureSet(training, labels, test, test_labels),
    )
    # A second thread that waits for a busy core counts as processor time, and leaves few steps.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        row = real.by_script(draw, 4.0, seed=0, with_fixmatch=with_fixmatch)
    finally:
        torch.set_num_threads(threads)
    assert row["test_accuracy"] > 0.8, row


def test_linear_models_learn_the_digits() -> None:
    draw = real.Draw.from_case(real.Case("digits", 400, None), seed=0, source="")
    assert real.by_pixels(draw)["test_accuracy"] > 0.8


@pytest.mark.long
def test_a_miniature_leaves_rows_and_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["real.py", "--miniature", "--sets", "digits", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    threads = torch.get_num_threads()
    real.main()
    rows = read(out)
    methods = {row["method"] for row in rows}
    assert methods == {*real.METHODS} - {real.FROZEN}
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows)
    assert all(row["seconds"] == 1.0 and row["tested_on"] == 500 for row in rows)
    assert f"without --backbone there is no row of {real.FROZEN}" in capsys.readouterr().err
    content = out.read_bytes()
    real.main()
    assert out.read_bytes() == content
    torch.set_num_threads(threads)


def test_a_folder_without_the_four_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match="expected Fashion-MNIST's four files there"):
        real.fashion(str(tmp_path))


def test_the_page_has_the_table_of_the_committed_rows() -> None:
    page = (real.RESULTS.parents[1] / "docs" / "pictures.md").read_text()
    begin = page.partition("<!-- real:begin -->\n")[2]
    table = real.table(read(real.RAW, having="draw"))
    assert begin.partition("\n<!-- real:end -->")[0] == table
