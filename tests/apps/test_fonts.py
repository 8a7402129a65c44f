"""Names in any script: drawn where an installed font has their letters, and spelled out where none has."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from metapl.apps.reports import Gallery, draw_grid, draw_report
from metapl.apps.reports.canvas import BASE, drawable, drawing, families, headed_page, letters_of, png

pytestmark = pytest.mark.usefixtures("full_pages")

NOWHERE = "\U0001e900"  # Adlam, which neither DejaVu nor the fonts of most systems have
CAT, BOTH = "猫", "猫 \U0001e900"


@pytest.fixture
def with_cats(tmp_path: Path) -> Iterator[str]:
    """A font that has one letter more than DejaVu, a black square."""
    pen = TTGlyphPen(None)
    for step, point in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if step else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord(CAT): "cat"})
    font.setupGlyf({".notdef": square, "cat": square})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "cats.ttf")
    letters_of.cache_clear()
    yield "Cats"
    fontManager.ttflist[:] = before
    letters_of.cache_clear()


@pytest.fixture
def without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has no font but matplotlib's own."""
    own = [entry for entry in fontManager.ttflist if entry.name == BASE]
    monkeypatch.setattr(fontManager, "ttflist", own)
    letters_of.cache_clear()


def test_a_font_is_taken_for_the_letters_that_the_usual_one_lacks(
    without_others: None, with_cats: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert families(["cat", "Katze", "кошка", "γάτα"]) == [BASE]
    with drawing(["cat", CAT]) as explanation:
        assert families(["cat", CAT]) == [BASE, with_cats]
        assert explanation == ""
        assert drawable(f"{CAT} cat") == f"{CAT} cat"
        figure = headed_page("", "", 2, 1)
        figure.text(0.2, 0.2, CAT, fontsize=20)
        drawn = numpy.asarray(Image.open(io.BytesIO(png(figure))).convert("L"))
    assert (drawn == 34).sum() > 0.9 * (20 / 72 * 150) ** 2  # the square, in ink
    assert caplog.messages == []  # that it has no bold letters is no news to a user


def test_what_no_font_has_is_spelled_out_and_said(without_others: None, tmp_path: Path) -> None:
    with drawing([CAT, NOWHERE]) as explanation:
        assert drawable(f"a {CAT}{NOWHERE} b") == "a U+732B U+1E900 b"
        assert drawable("a\U000e0001") == "a"  # a mark of a language is not seen itself
        assert explanation == "No font here has 2 of the letters: they stand as codes, such as U+732B."
    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("metapl.apps.reports.canvas.png", lambda figure: drawn.extend(texts(figure)) or png(figure))
        gallery = Gallery(f"of {CAT}", "a note", torch.zeros(1, 1, 4, 4), (f"{CAT}  90%\n{NOWHERE}.png",))
        draw_grid(tmp_path / "grid.png", f"all {CAT}", "a note", [gallery])
        assert any("U+732B  90%" in one for one in drawn)
        assert "stand as codes" in " ".join(drawn)
        drawn.clear()
        draw_report(
            tmp_path / "report.png",
            title=CAT,
            curves={},
            confusion=[[1, 0], [0, 1]],
            classes=[CAT, "dog"],
            summary="All is well.",
        )
        assert drawn.count("U+732B") >= 3
        assert "stand as codes" in " ".join(drawn)


def texts(figure: object) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]  # type: ignore[attr-defined]  # a matplotlib figure
