"""Galleries and grids: the pictures appear where they should and as they are, and no text runs into anything."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from metapl.apps.reports import PANELS, Gallery, draw_grid, draw_report, pictures_a_group
from metapl.apps.reports.canvas import png
from metapl.errors import MetaplError

pytestmark = pytest.mark.usefixtures("full_pages")

RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
RIGHT, WRONG = (0, 158, 115), (213, 94, 0)
LONG = (
    "$\\frac{canis}{lupus}$ familiaris var. domestica",
    "猫の名前" * 6,
    "W" * 70,
    "i" * 200,
    "ظبية" * 9,
    "x y " * 30,
)


def plain(*colors: tuple[int, int, int], height: int = 16, width: int = 16) -> Tensor:
    return torch.tensor(colors, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, height, width)


def gallery(pictures: Any, **changes: Any) -> Gallery:
    usual = {"title": "Mistakes", "note": "on validation", "pictures": pictures}
    if "captions" not in changes:
        usual["captions"] = tuple(f"{index}\n98 %" for index in range(len(pictures)))
    return Gallery(**usual | changes)


def rows(panels: int) -> list[dict[str, float]]:
    keys = [panel.series[0][0] for panel in PANELS[:panels]]
    return [{"step": step, **dict.fromkeys(keys, 0.5 + 0.1 * step)} for step in range(4)]


def report(path: Path, *galleries: Gallery, panels: int = 4, size: int = 0, names: tuple[str, ...] = ("cat",)) -> None:
    draw_report(
        path,
        title="A report",
        curves={"mpl": rows(panels)},
        confusion=(9 * torch.eye(size, dtype=torch.int64)).tolist() if size else None,
        classes=[f"{names[index % len(names)]} {index}" for index in range(size)] if size else None,
        summary="Pictures below.",
        galleries=galleries,
    )


def grid(path: Path, *groups: Gallery, title: str = "Pictures", note: str = "by class") -> None:
    draw_grid(path, title, note, groups)


def image(path: Path) -> NDArray[Any]:
    with Image.open(path) as file:
        return numpy.asarray(file.convert("RGB")).astype(int)


def place(pixels: NDArray[Any], color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the rectangle that has the color; nothing else has it."""
    found = (pixels == color).all(axis=2)
    ys, xs = (numpy.flatnonzero(found.any(axis=axis)) for axis in (1, 0))
    assert found[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].all()
    assert found.sum() == len(ys) * len(xs)
    return int(xs[0]), int(ys[0]), len(xs), len(ys)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr("metapl.apps.reports.canvas.png", lambda figure: drawn.append(figure) or png(figure))
    return drawn


def boxes_of_pictures(figure: Figure) -> list[Bbox]:
    """In pixels, from below."""
    sizes = [one.get_size() for one in figure.images]
    return [Bbox.from_bounds(one.ox, one.oy, w, h) for one, (h, w) in zip(figure.images, sizes, strict=True)]


def written(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


# Where they stand


def test_pictures_stand_in_a_row_below_the_panels_and_in_line_with_them(tmp_path: Path, pages: list[Figure]) -> None:
    path = tmp_path / "report.png"
    report(path, gallery(plain(RED, LIME, BLUE)))
    pixels = image(path)
    red, lime, blue = (place(pixels, color) for color in (RED, LIME, BLUE))
    # 1.5 inches with the frame of 0.8 points around them, 0.6 between.
    assert red[2:] == lime[2:] == blue[2:]
    assert red[2] == red[3] == pytest.approx(150 * (1.5 - 2 * 0.8 / 72), abs=1)
    assert red[1] == lime[1] == blue[1]
    assert lime[0] - red[0] == blue[0] - lime[0] == pytest.approx(150 * 2.1, abs=1)
    panels: list[Any] = [axes.get_tightbbox() for axes in pages[0].axes]
    assert red[0] == pytest.approx(min(panel.x0 for panel in panels), abs=4)
    assert len(pixels) - red[1] < min(panel.y0 for panel in panels) - 60
    report(tmp_path / "without.png")
    assert pixels.shape[1] == image(tmp_path / "without.png").shape[1]


def test_the_size_of_the_page(tmp_path: Path, pages: list[Figure]) -> None:
    report(tmp_path / "report.png")
    before = image(tmp_path / "report.png")
    report(tmp_path / "report.png", gallery(plain(RED)), gallery(plain(RED, LIME), note="", title="Two"))
    after = image(tmp_path / "report.png")
    # Around the title and the note 0.94 each, 0.19 less without a note; pictures of 1.5; captions of 0.06 + 2 · 0.165.
    assert len(after) - len(before) == pytest.approx(150 * (2 * (0.94 + 1.5 + 0.39) - 0.19), abs=1)
    without, with_both = ([page.bbox.y1 - axes.get_window_extent().y1 for axes in page.axes] for page in pages)
    assert with_both == pytest.approx(without)
    grid(tmp_path / "grid.png", gallery(plain(*[RED] * 10)))
    # Eight columns; title, note, the group's own, and two rows.
    height, width, _ = image(tmp_path / "grid.png").shape
    assert width == pytest.approx(150 * (0.8 + 7 * 1.62 + 1.4), abs=1)
    assert height == pytest.approx(150 * (0.8 + 0.36 + 0.26 + 0.94 + 2 * (1.4 + 0.39) + 0.16), abs=1)


@pytest.mark.parametrize(("panels", "number", "columns", "shown"), [(1, 12, 4, 8), (4, 8, 8, 8), (4, 12, 6, 12)])
def test_a_gallery_has_one_row_or_two_from_edge_to_edge(
    tmp_path: Path, pages: list[Figure], panels: int, number: int, columns: int, shown: int
) -> None:
    report(tmp_path / "report.png", gallery(plain(*[RED] * number)), gallery(plain(LIME)), panels=panels)
    boxes = boxes_of_pictures(pages[0])
    assert len(boxes) == shown + 1
    assert len({box.x0 for box in boxes}) == columns
    assert len({box.y0 for box in boxes[:-1]}) == shown // columns
    assert max(box.x1 for box in boxes) == pytest.approx(pages[0].bbox.x1 - 150 * 0.4, abs=4)


def test_galleries_without_pictures_are_left_out(tmp_path: Path) -> None:
    report(tmp_path / "one.png")
    report(tmp_path / "two.png", gallery(torch.zeros(0, 3, 8, 8)))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with pytest.raises(MetaplError, match="nothing to draw"):
        report(tmp_path / "one.png", gallery(torch.zeros(0, 3, 8, 8)), panels=0)
    report(tmp_path / "one.png", gallery(plain(RED)), panels=0)
    assert place(image(tmp_path / "one.png"), RED)[0] == pytest.approx(150 * 0.4, abs=2)


# How they look


def test_small_pictures_keep_their_edges(tmp_path: Path, pages: list[Figure]) -> None:
    values = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid(tmp_path / "grid.png", gallery(values))
    pixels, (box,) = image(tmp_path / "grid.png"), boxes_of_pictures(pages[0])
    shown = pixels[len(pixels) - int(box.y1) : len(pixels) - int(box.y0), int(box.x0) : int(box.x1)]
    side = len(shown) / 8
    for row, column in itertools.product(range(8), range(8)):
        middle = shown[
            int(row * side) + 2 : int((row + 1) * side) - 2, int(column * side) + 2 : int((column + 1) * side) - 2
        ]
        assert (middle == int(values[0, 0, row, column])).all()


def test_large_pictures_are_averaged(tmp_path: Path, pages: list[Figure]) -> None:
    board = (torch.arange(700)[:, None] + torch.arange(700)) % 2 * 255
    grid(tmp_path / "grid.png", gallery(board.to(torch.uint8)[None, None]))
    pixels, (box,) = image(tmp_path / "grid.png"), boxes_of_pictures(pages[0])
    shown = pixels[len(pixels) - int(box.y1) : len(pixels) - int(box.y0), int(box.x0) : int(box.x1)]
    assert 110 < shown.min() <= shown.max() < 145


def test_numbers_of_any_kind_show_the_same(tmp_path: Path) -> None:
    whole = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    drawn = set()
    share = whole / 255
    for pictures in (whole, whole.expand(-1, 3, -1, -1), share, share.half(), share.double().requires_grad_()):
        grid(tmp_path / "grid.png", gallery(pictures))
        drawn.add((tmp_path / "grid.png").read_bytes())
    assert len(drawn) == 1


@pytest.mark.parametrize(("height", "width"), [(20, 40), (40, 30), (300, 500), (90, 10), (1, 900), (900, 1)])
def test_pictures_need_not_be_square(tmp_path: Path, height: int, width: int) -> None:
    grid(tmp_path / "grid.png", gallery(plain(RED, height=height, width=width)))
    _, _, wide, high = place(image(tmp_path / "grid.png"), RED)
    room = 150 * (1.4 - 2 * 0.8 / 72)
    expected = min(room, 1.4 * room * width / height)
    assert wide == pytest.approx(max(1, expected), abs=1)
    assert high == pytest.approx(max(1, expected * height / width), abs=1)


def frame_above(pixels: NDArray[Any], box: Bbox) -> NDArray[Any]:
    """The line just above a picture."""
    return pixels[len(pixels) - int(box.y1) - 3, int(box.x0) : int(box.x1)]


def test_marks_differ_and_not_by_color_alone(tmp_path: Path, pages: list[Figure]) -> None:
    marked = gallery(plain(BLUE, BLUE, BLUE), marks=(True, False, None))
    report(tmp_path / "report.png", marked, panels=1)
    pixels = image(tmp_path / "report.png")
    right, wrong, neither = (frame_above(pixels, box) for box in boxes_of_pictures(pages[0]))
    assert (right == RIGHT).all()
    dashes = (wrong == WRONG).all(axis=1)
    assert 0.4 < dashes.mean() < 0.9
    assert numpy.abs(numpy.diff(dashes.astype(int))).sum() > 10
    assert (neither == 255).all()
    signs = {text.get_text(): text.get_color() for text in pages[0].texts if text.get_text() in "✓✗"}
    assert signs == {"✓": "#009E73", "✗": "#D55E00"}


# Their captions


def check_texts(figure: Figure) -> None:
    """No two texts, no text and picture, and no text of the page and panel have a place in common; none is cut."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in written_anywhere(figure)]
    page = figure.bbox
    pictures = [("a picture", box) for box in boxes_of_pictures(figure)]
    assert len(texts) > 2
    assert overlapping(texts, [*texts, *pictures]) == []
    of_page = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    panels: list[Any] = [("a panel", axes.get_tightbbox(renderer)) for axes in figure.axes]
    assert overlapping(of_page, panels) == []
    outside = [text for text, box in texts if box.x0 < 10 or box.x1 > page.x1 - 10 or box.y0 < 10 or box.y1 > page.y1]
    assert outside == []


def written_anywhere(figure: Figure) -> list[Text]:
    """All texts that are drawn: ticks beyond a scale are not."""
    texts: set[Any] = {text for text in figure.findobj(Text) if text.get_visible()}
    axis: Any
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        drawn = axis._update_ticks()  # there is no public way
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            texts -= set() if tick in drawn else {tick.label1, tick.label2}
    return [text for text in texts if text.get_text().strip()]


def overlapping(some: list[tuple[str, Bbox]], others: list[tuple[str, Bbox]]) -> list[tuple[str, str]]:
    """What has a place in common with something else, more than a rounded pixel's edge."""
    if not others:
        return []
    one, two = (numpy.array([box.extents for _, box in boxes]) for boxes in (some, others))
    shared = numpy.minimum(one[:, None, 2:], two[None, :, 2:]) - numpy.maximum(one[:, None, :2], two[None, :, :2])
    found = numpy.argwhere((shared > 0.5).all(axis=2)).tolist()
    return [(some[i][0], others[j][0]) for i, j in found if some[i][1] is not others[j][1]]


@pytest.mark.parametrize(
    ("panels", "size", "galleries", "number"),
    [
        (4, 10, 3, 12),
        (0, 3, 1, 9),
        *(
            pytest.param(*much, marks=pytest.mark.long)
            for much in ((1, 0, 3, 12), (0, 0, 2, 6), (4, 0, 1, 8), (2, 40, 2, 7), (4, 150, 3, 12))
        ),
    ],
)
def test_long_names_run_into_nothing(
    tmp_path: Path, pages: list[Figure], panels: int, size: int, galleries: int, number: int
) -> None:
    captions = tuple(f"{LONG[index % 6]}\nis: {LONG[(index + 1) % 6]}\n98 %" for index in range(number))
    marks = tuple((True, False, None)[index % 3] for index in range(number))
    one = gallery(
        torch.rand(number, 3, 9, 12), captions=captions, marks=marks, title="Most confident " * 3, note="words " * 50
    )
    report(tmp_path / "report.png", *[one] * galleries, panels=panels, size=size, names=LONG)
    check_texts(pages[0])


@pytest.mark.parametrize(
    ("groups", "number"),
    [(1, 1), (5, 3), (7, 1), *(pytest.param(*much, marks=pytest.mark.long) for much in ((2, 70), (101, 2)))],
)
def test_long_names_in_a_grid(tmp_path: Path, pages: list[Figure], groups: int, number: int) -> None:
    captions = tuple(f"{LONG[index % 6]}\n{LONG[(index + 1) % 6]}" for index in range(number))
    some = [
        gallery(torch.rand(number, 1, 12, 9), captions=captions, title=LONG[index % 6], note="words " * 50)
        for index in range(groups)
    ]
    grid(tmp_path / "grid.png", *some, title="runs/" + "a-long-path/" * 12, note="words " * 50)
    check_texts(pages[0])


def test_a_caption_loses_its_middle_only_where_it_must(tmp_path: Path, pages: list[Figure]) -> None:
    captions = (
        "German shorthaired pointer of the north, 98 %\nIMG_2024_05_18_000012.jpeg",
        "cat, 9 %\na\tb\nc\nd\udcff",
    )
    grid(tmp_path / "grid.png", gallery(plain(RED, LIME), captions=captions))
    first, second, *rest = written(pages[0])[4:]
    assert first.startswith("German")
    assert first.endswith("98 %")
    assert "…" in first
    assert second.startswith("IMG_2024")
    assert second.endswith("12.jpeg")
    assert rest == ["cat, 9 %", "a\\tb", "c d\\xff"]


def test_names_are_not_read_as_formulas(tmp_path: Path, pages: list[Figure]) -> None:
    report(tmp_path / "report.png", gallery(plain(RED), captions=("$\\frac{$",), title="$5", note="_x^ $$"))
    assert {"$\\frac{$", "$5", "_x^ $$"} <= set(written(pages[0]))
    assert not any(text.get_parse_math() for text in pages[0].texts)


# Grids


@pytest.mark.parametrize(
    ("groups", "number", "beside", "size"),
    [
        *((2, 8, 1, 1.4), (10, 4, 2, 1.4)),
        *(pytest.param(*many, marks=pytest.mark.long) for many in ((30, 2, 4, 1.4), (101, 2, 6, 0.95))),
    ],
)
def test_a_grid_has_all_groups_side_by_side_and_below_each_other(
    tmp_path: Path, pages: list[Figure], groups: int, number: int, beside: int, size: float
) -> None:
    short = [gallery(torch.zeros(number, 1, 8, 8), title=f"class {index}") for index in range(groups)]
    short[1] = gallery(torch.zeros(1, 1, 8, 8), title="class 1")
    grid(tmp_path / "grid.png", *short)
    (page,) = pages
    titles = [text for text in page.texts if text.get_text().startswith("class ")]
    assert [text.get_text() for text in titles] == [f"class {index}" for index in range(groups)]
    assert len({round(text.get_position()[0], 6) for text in titles}) == beside
    assert len({round(text.get_position()[1], 6) for text in titles}) == -(-groups // beside)
    boxes = boxes_of_pictures(page)
    assert len(boxes) == groups * number - (number - 1)
    assert {round(box.width) for box in boxes} == {round(150 * (size - 2 * 0.8 / 72))}
    assert max(box.x1 for box in boxes) < page.bbox.x1
    assert not any(Bbox.intersection(one, other) for one, other in itertools.combinations(boxes[:40], 2))
    assert image(tmp_path / "grid.png").shape[0] < 2**14


def test_more_groups_have_fewer_pictures_each() -> None:
    found = [pictures_a_group(groups) for groups in range(1, 400)]
    assert found == sorted(found, reverse=True)
    assert {one % 2 for one in found} == {0}
    assert min(found) == 2


def test_a_grid_leaves_no_other_file_and_no_global_state(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    grid(tmp_path / "grid.png", gallery(plain(RED)))
    assert dict(matplotlib.rcParams) == before
    assert [found.name for found in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([], "0 groups of pictures are no grid"),
        ([gallery(torch.zeros(0, 1, 8, 8))], "0 groups"),
        ([gallery(plain(RED))] * 1001, "1,001 groups of pictures are no grid; expected 1 to 1,000"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_and_an_earlier_one_stays(
    tmp_path: Path, groups: list[Gallery], text: str
) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"earlier")
    with pytest.raises(MetaplError, match=text):
        grid(path, *groups)
    assert path.read_bytes() == b"earlier"
    with pytest.raises(MetaplError, match="could not be written: No such file or directory"):
        grid(tmp_path / "no" / "grid.png", gallery(plain(RED)))


# What a gallery cannot be made of

OK = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"captions": ("one",)}, "'Mistakes' are a tensor of shape .*, with 1 captions .*; expected"),
        ({"marks": (True,)}, r"2 captions and the marks \(True,\); expected"),
        ({"marks": (True, "no")}, "the marks .*'no'.*expected .*True, False or None"),
        ({"marks": (True, 0)}, r"the marks \(True, 0\).*expected .*True, False or None"),
        ({"pictures": OK[0]}, r"shape \(3, 8, 8\), float32.* expected \(n, C, H, W\)"),
        ({"pictures": OK[:, :2]}, r"shape \(2, 2, 8, 8\)"),
        ({"pictures": OK[..., :0]}, r"shape \(2, 3, 8, 0\)"),
        ({"pictures": OK.int()}, "int32.* expected .* uint8 or floating point"),
        ({"pictures": OK.bool()}, "bool"),
        ({"pictures": OK.numpy()}, "of type ndarray.* expected"),
        ({"pictures": OK - 0.5}, r"floating point in \[0, 1\]"),
        ({"pictures": OK + 255}, r"floating point in \[0, 1\]"),
        ({"pictures": OK / 0}, r"floating point in \[0, 1\]"),
        ({"pictures": None, "captions": ()}, "NoneType"),
        ({"pictures": torch.tensor(0.5), "captions": ()}, "expected"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(MetaplError, match=text):
        gallery(**{"pictures": OK, "captions": ("a", "b"), **changes})
