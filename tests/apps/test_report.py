"""The page of a run, ``report.html``, and its picture, ``report.png``."""

import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import edited, metapl, reseal, result
from PIL import Image
from tiny_runs import color_folders, images_command

from metapl.apps.report import mistakes, write_report
from metapl.execution.numerics import float32_products
from metapl.metrics import Evaluation
from metapl.run_folder import EndedRun

HOSTILE = "<script>alert('x')<&\"<img src=x>"


class Page(HTMLParser):
    """The headings of a page, which loads nothing, has no script, and whose tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.headings, self.words = list[str](), list[str](), list[str]()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("href", "action", "srcset")
            assert name != "src" or str(value).startswith("data:image/png;base64,")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "summary"):
            self.headings.append(data)


def page(run: Path) -> Page:
    return Page((run / "report.html").read_text())


SECTIONS = ["Curves and confusion", "Classes", "Surest mistakes", "Command", "Data", "Settings"]


def test_a_run_leaves_its_page(tiny: Path) -> None:
    found, told = page(tiny), result(tiny)
    assert found.headings == [
        f"digits: {told['title']}, seed 0",
        *SECTIONS,
        "Versions and hardware",
    ]
    text = " ".join(found.words)
    wrong = 400 - round(400 * told["test_accuracy"])
    for words in (f"{100 * told['test_accuracy']:.1f} %", "n = 400", f"{wrong} of 400", "SHA-256"):
        assert words in text, words
    assert (tiny / "report.html").read_text().count("data:image/png") == 1 + 12


@pytest.mark.usefixtures("drawn")
def test_page_and_picture_are_written_anew_from_the_run_as_it_was_or_elsewhere(
    run: Path, tmp_path: Path
) -> None:
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    metapl("report", run)
    assert Page(before.decode()).headings == page(run).headings
    write_report(EndedRun.load(run))
    with Image.open(run / "report.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(10**7) or ()) > 50
    metapl("report", run, "--out", tmp_path / "page.html")
    assert page(run).headings == Page((tmp_path / "page.html").read_text()).headings


def test_names_and_texts_are_escaped(run: Path) -> None:
    classes = [HOSTILE, *map(str, range(1, 10))]
    edited(run / "result.json", "evaluation", classes=classes)
    edited(run / "result.json", title=HOSTILE)
    edited(run / "network.json", classes=classes)
    reseal(run)
    edited(run / "recipe.json", command=f"metapl train {HOSTILE}")
    edited(run / "recipe.json", "recipe", "fields", name=HOSTILE)
    metapl("report", run)
    assert HOSTILE in " ".join(page(run).words)
    assert HOSTILE not in (run / "report.html").read_text()


def test_a_long_setting_is_counted(run: Path) -> None:
    edited(run / "recipe.json", "recipe", "fields", patches=[0.5] * 144)
    metapl("report", run)
    assert "144 entries, in recipe.json" in " ".join(page(run).words)
    assert "0.5, 0.5" not in (run / "report.html").read_text()


def test_a_run_whose_pictures_are_gone_has_a_page_without_them(tmp_path: Path) -> None:
    root = color_folders(tmp_path, few=3, many=4)
    # After one step the network still takes some pictures for others.
    metapl(*images_command(root, "--steps", "1"), "--out", root / "run")
    assert "Surest mistakes" in page(root / "run").headings
    shutil.rmtree(root / "test")
    told = metapl("report", root / "run")
    assert "left out" in told.stderr
    found = page(root / "run")
    assert {"Curves and confusion", "Classes", "Settings"} <= {*found.headings}
    assert "left out" in " ".join(found.words)
    assert (root / "run" / "report.html").read_text().count("data:image/png") == 1  # the curves


def test_beneath_a_mistake_stands_its_own_file_whichever_batch_it_is_in() -> None:
    network, rows = torch.nn.Linear(2, 2, bias=False), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    torch.nn.init.eye_(network.weight)
    found = mistakes(
        network,
        [(rows, torch.tensor([0, 1])), (rows, torch.tensor([1, 0]))],
        "ab",
        ["w", "x", "y", "z"],
    )
    assert [picture.caption for picture in found.surest] == ["a 88 %\nis b\ny", "b 73 %\nis a\nz"]


def test_a_run_without_a_test_set_has_its_validation_accuracy(run: Path) -> None:
    content = result(run)
    kept = {
        name: value
        for name, value in content.items()
        if name != "evaluation" and "test_accuracy" not in name
    }
    (run / "result.json").write_text(json.dumps({"sha256": content["sha256"]}))
    edited(run / "result.json", **{name: value for name, value in kept.items() if name != "sha256"})
    metapl("report", run)
    found = page(run)
    assert "Classes" not in found.headings
    assert f"{100 * kept['validation_accuracy']:.1f} %" in " ".join(found.words)


def evaluated(counts: Any, classes: Any = None) -> Evaluation:
    counts = np.asarray(counts)
    share = float(np.trace(counts) / max(counts.sum(), 1))
    confusion = tuple(map(tuple, counts.tolist()))
    return Evaluation(
        int(counts.sum()), share, None, 0.1, 0.1, (1.0,) * len(counts), confusion, classes=classes
    )


def rows(count: int) -> list[dict[str, float]]:
    keys = ("inner_loss", "outer_loss", "feedback_std", "agreement", "student_validation_accuracy")
    return [{"step": step, **dict.fromkeys(keys, 1 / (step + 1))} for step in range(count)]


SHOWN: dict[str, tuple[Any, Evaluation | None]] = {
    "names": (
        rows(90),
        evaluated(np.eye(3, dtype=int) * 7, ("$\\frac{$", "猫\n\udcff", "c" * 90)),
    ),
    "nothing": ([], None),
    "zeros": ([{"step": 1, "feedback_std": 0.0}], evaluated([[0, 0], [0, 0]])),
    "many classes": (rows(1), evaluated(np.eye(70, dtype=int))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n != "names")) for n in SHOWN]
)
def test_curves_and_confusion_of_any_size_and_name_are_drawn(name: str, drawn: Any) -> None:
    found, evaluation = SHOWN[name]
    picture = drawn(
        title="costs $5 or $6_ 猫", rows=found, evaluation=evaluation, network="student"
    )
    with Image.open(io.BytesIO(picture)) as image:
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors() or "white alone") > 1


def test_a_run_says_in_what_precision_products_of_float32_were_taken(tiny: Path) -> None:
    made_with = json.loads((tiny / "recipe.json").read_text())["made_with"]
    for kind, precision in float32_products(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ).items():
        assert made_with[f"float32 {kind}"] == precision
        assert f"float32 {kind}" in page(tiny).words
