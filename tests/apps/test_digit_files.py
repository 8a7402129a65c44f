"""Images and tables as the digits' networks take them."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from digit_pictures import picture
from PIL import Image
from sklearn.datasets import load_digits

from metapl.apps.digits import Digits
from metapl.apps.pictures.csv_files import csv_rows
from metapl.apps.pictures.reader import gray_image
from metapl.errors import MetaplError

# ------------------------------------------------------------------------------------------------ images and CSV files


@pytest.mark.parametrize("kind", ["gray", "color", "palette", "print", "16 bits", "paper", "transparent", "large"])
def test_an_image_of_any_kind_gives_the_same_input(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("digit.tif" if kind == "print" else "digit.png")
    picture(kind).save(file)
    ((name, found),) = Digits().input.read(file)
    assert name == str(file)
    torch.testing.assert_close(found, torch.tensor(load_digits().images[5:6] / 16).float(), atol=0.003, rtol=0)


def test_areas_are_averaged(tmp_path: Path) -> None:
    Image.fromarray(numpy.array([[0, 255, 51, 51]] * 2, numpy.uint8)).save(tmp_path / "x.png")
    expected = torch.tensor([[0.5, 0.2], [0.5, 0.2]])
    torch.testing.assert_close(gray_image(tmp_path / "x.png", 2), expected)


@pytest.mark.parametrize(
    "text", ["1,2.5,0\n", "a,b,c\n1,2.5,0\n", "0,1,2\n1,2.5,0\n", "\ufeffa,b,c\r\n\r\n1, 2.5 ,0\r\n"]
)
def test_tables_with_and_without_a_header(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text, newline="")
    ((line, values),) = csv_rows(tmp_path / "x.csv", 3, highest=16)
    assert line == len(text.splitlines())
    assert values.tolist() == [1, 2.5, 0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no row of numbers"),
        (b"a,b,c\n", "no row of numbers"),
        (b"1,2,3\n1,2\n", r":2: the row has 2 cells; expected 3"),
        (b"1,2,3\n1,x,3\n", r":2: cell 2 is 'x'"),
        (b"1,2,17\n", r":1: cell 3 is '17'; expected a number from 0 to 16"),
        (b"1,2,nan\n", r":1: cell 3 is 'nan'"),
        (b"\xff\xfe,2\n", "cannot be read"),
    ],
)
def test_a_table_that_is_not_of_examples_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(MetaplError, match=expected):
        csv_rows(tmp_path / "x.csv", 3, highest=16)
