"""What there is to see of runs: ``metapl runs`` lists them, ``metapl report`` writes one as a web page."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command import edited, metapl, refused, said
from tiny_runs import NOISY_STUDENT, TINY, built_once, color_run, trained

from metapl.apps.commands.listing import HEAD, glance, listing
from metapl.apps.experiments.folder import RunFolder
from metapl.apps.experiments.page import mistakes
from metapl.apps.recipes.base import hints_of
from metapl.apps.reports import web
from metapl.apps.words import width_of
from metapl.metrics import Evaluation

HOSTILE = "<script>alert('x')</script>&\"<img src=http://a/b>"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two methods and two seeds, which tests leave as it is."""
    more = ("--compare", "--seeds", "0-1", "--methods", "mpl", "none", "--jobs", "1")
    return built_once(tmp_path_factory, "tiny-compared", lambda out: trained(*TINY, *more, "--out", str(out)))


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "tiny-rounds", lambda out: trained(*NOISY_STUDENT, "--out", str(out)))


def relabeled(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))


def instead(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


def found(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(said(capsys, "runs", folder, "--json"))
    assert entries == sorted(entries, key=lambda entry: str(entry["date"]))
    return {entry["run"]: entry for entry in entries}


def page_of(capsys: pytest.CaptureFixture[str], folder: Path, out: Path | None = None) -> str:
    """The page of a run, which loads nothing and whose tags are closed."""
    told = said(capsys, "report", folder, *(() if out is None else ("--out", out)))
    file = out or folder / "report.html"
    assert f"the page is written: {file}" in told
    text = file.read_text()
    Closed().feed(text)
    return text


class Closed(HTMLParser):
    """Fails where a tag is not closed, is a script, or an attribute leads elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("href", "action", "srcset")
            assert name != "src" or str(value).startswith("data:image/png;base64,")
            assert name != "style" or "url" not in str(value)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---------------------------------------------------------------------------------------------------------- the listing


def test_runs_of_every_state_are_listed_and_other_folders_are_not(
    tiny: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mine", "stopped", "held", "deep/er/broken"):
        shutil.copytree(tiny, tmp_path / name)
    for name in ("stopped", "held"):
        (tmp_path / name / "result.json").unlink()
    rows = (tmp_path / "held" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held" / "metrics.jsonl").write_text("".join(rows[:4]))
    (tmp_path / "deep/er/broken/result.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "result.json").write_text("{}")
    (tmp_path / "link").symlink_to(tiny)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    shutil.copytree(compared, tmp_path / "compared")
    with RunFolder(tmp_path / "held").held():
        entries = found(capsys, tmp_path)
        table = said(capsys, "runs", tmp_path)
    assert entries.keys() == {"mine", "stopped", "held", "deep/er/broken", "link", "compared"}
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "mine": "finished",
        "stopped": "interrupted",
        "held": "running",
        "deep/er/broken": "damaged",
        "link": "finished",
        "compared": "finished",
    }
    result = json.loads((tiny / "result.json").read_text())
    mine = entries["mine"]
    assert (mine["accuracy"], mine["on"], mine["n"]) == (result["test_accuracy"], "test", 400)
    assert mine["interval"][0] < mine["accuracy"] < mine["interval"][1]
    assert (mine["done"], mine["steps"], mine["methods"], mine["data"]) == (6, 6, ["mpl"], "digits")
    assert (entries["held"]["done"], entries["held"]["phase"]) == (4, "fit")
    assert entries["stopped"]["phase"] == "finetune"
    assert entries["deep/er/broken"]["why"].startswith("result.json cannot be read: ")
    assert list(entries["compared"]["compared"]) == ["mpl", "none"]
    assert max(map(len, table.splitlines())) <= 80
    assert table.isprintable() or "\x1b" not in table
    for words in ("4/6", "running", "interrupted", "2 methods", "2 seeds", f"{100 * mine['accuracy']:.1f} ("):
        assert words in table, words
    assert "  result.json cannot be read: " in table
    assert "foreign" not in table


def test_a_comparison_that_was_stopped_says_how_many_runs_have_ended(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(compared, tmp_path / "copy"))
    for place in (copy, copy / "none" / "seed-1"):
        (place / "result.json").unlink()
    (entry,) = found(capsys, copy).values()
    assert entry["compared"] == {"mpl": {"finished": 2}, "none": {"finished": 1}}
    table = said(capsys, "runs", copy)
    assert "2/2 runs" in table
    assert "1/2 runs" in table
    page = page_of(capsys, copy)
    assert "Not finished: interrupted" in page
    assert "1 of 2" in page


def test_a_run_without_a_test_set_says_its_validation_accuracy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(
        json.dumps({k: v for k, v in content.items() if k not in ("evaluation", "sha256")})
    )
    (entry,) = found(capsys, run).values()
    assert (entry["on"], entry["accuracy"], entry["n"]) == ("validation", content["validation_accuracy"], 197)
    assert ") val " in said(capsys, "runs", run)
    assert "Validation accuracy" in page_of(capsys, run)


def test_names_that_are_too_long_have_a_line_of_their_own() -> None:
    entry = {"date": "2026-01-31T12:00:00", "state": "finished", "methods": ["noisy_student"], "data": "a/very/long"}
    entry |= {"steps": 1_000_000, "seeds": [0], "accuracy": 1.0, "interval": [0.99, 1.0], "on": "test"}
    name = "a-name-that-says-all-there-is-to-say-of-it"
    lines = listing([entry | {"run": name}, entry | {"run": "\x1b[2J<b>"}], 80).splitlines()
    assert name in lines
    assert any(line.startswith("\\x1b[2J<b> ") for line in lines)
    assert max(map(len, lines)) <= 80
    twice = [entry | {"run": "猫の写真", "data": "e\u0301"}, entry | {"run": "cats", "data": "e"}]
    of_wide = listing(twice, 80).splitlines()
    assert len({width_of(line[: line.index("1,000,000")]) for line in of_wide[1:3]}) == 1
    wide = listing([entry | {"run": name}], 200).splitlines()
    assert wide[1].startswith(f"{name}  noisy_student  a/very/long  1,000,000  100.0 (99.0-100.0) test")


@pytest.mark.parametrize(
    ("width", "head"), [(80, " ".join(HEAD)), (60, "run method steps accuracy, %"), (42, "run method accuracy, %")]
)
def test_a_narrow_terminal_has_fewer_columns(width: int, head: str) -> None:
    entry = {
        "run": "a-name-of-a-run",
        "date": "2026-01-31T12:00:00",
        "methods": ["noisy_student"],
        "data": "a/very/long",
    }
    ended = {"state": "finished", "steps": 1_000, "seeds": [0], "accuracy": 0.5, "interval": [0.4, 0.6], "on": "test"}
    lines = listing([entry | ended], width).splitlines()
    assert " ".join(lines[0].split()) == head
    assert "50.0 (40.0-60.0) test" in lines[1] + lines[2]
    assert max(map(len, lines)) <= width


def test_a_folder_that_cannot_be_listed_is_told(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny, tmp_path / "mine")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def scandir(path: str) -> Any:
        if path == str(tmp_path / "closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    words = metapl("runs", tmp_path, code=1)
    assert words.stderr == f"metapl: left out {tmp_path / 'closed'}: Permission denied\n"
    assert "\nmine " in words.stdout


def test_many_runs_are_listed_without_reading_the_types_again(tiny: Path, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        for name in ("recipe.json", "result.json", "data.json", "metrics.jsonl"):
            shutil.copy(tiny / name, tmp_path / str(number) / name)
    first, *others = tmp_path.iterdir()
    assert glance(first, tmp_path)["state"] == "finished"
    known = hints_of.cache_info().misses
    assert all(glance(place, tmp_path)["state"] == "finished" for place in others)
    assert hints_of.cache_info().misses == known


# -------------------------------------------------------------------------------------------------------- damaged runs

DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda place: (place / "recipe.json").write_text("{"), "recipe.json cannot be read"),
    "a list": (lambda place: (place / "recipe.json").write_text("[1]"), "recipe.json is damaged"),
    "an older format": (lambda place: edited(place / "recipe.json", format=2), "was written in run format 2"),
    "a newer format": (lambda place: edited(place / "recipe.json", format=99), "was written in run format 99"),
    "methods that are none": (lambda place: edited(place / "recipe.json", "recipe", compare=3), "compare is 3"),
    "a command that is none": (lambda place: edited(place / "recipe.json", command=3), "command is 3"),
    "an accuracy above 1": (
        lambda place: edited(place / "result.json", "evaluation", accuracy=7),
        "has the accuracy 7",
    ),
    "another accuracy than its table": (
        lambda place: edited(place / "result.json", "evaluation", accuracy=0.9025),
        "has the accuracy 0.9025, and ",
    ),
    "another figure": (
        lambda place: relabeled(place / "result.json", '"student_test_accuracy": 0.', '"student_test_accuracy": 0.0'),
        "result.json is damaged or was edited",
    ),
    "another seed": (lambda place: edited(place / "result.json", seed=5), "its seed is 5"),
    "a result of nothing": (lambda place: (place / "result.json").write_text("{}"), "it does not say delivered"),
    "another log": (lambda place: (place / "metrics.jsonl").write_text("x\n"), "metrics.jsonl is damaged"),
    "another version": (
        lambda place: relabeled(place / "recipe.json", '"metapl": "', '"metapl": "9'),
        "recipe.json is damaged or was edited",
    ),
    "a pipe": (lambda place: instead(place / "recipe.json", os.mkfifo), "recipe.json cannot be read: it is a pipe"),
    "a link to nowhere": (
        lambda place: instead(place / "result.json", lambda file: file.symlink_to("nowhere")),
        "result.json cannot be read: No such file or directory",
    ),
    "a log that has gone": (
        lambda place: (place / "metrics.jsonl").unlink(),
        "metrics.jsonl cannot be read: No such file or directory",
    ),
    "a log that is a folder, of a run that goes on": (
        lambda place: ((place / "result.json").unlink(), instead(place / "metrics.jsonl", os.mkdir)),
        "metrics.jsonl cannot be read",
    ),
    "other data": (lambda place: edited(place / "data.json", hash={}), "data.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_run_is_listed_as_such_and_has_no_page(
    kind: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = DAMAGED[kind]
    before = (run / "report.html").read_bytes()
    spoil(run)
    (entry,) = found(capsys, run.parent).values()
    assert entry["state"] == "damaged"
    assert words in entry["why"]
    assert "damaged" in said(capsys, "runs", run.parent)
    assert words in refused(capsys, "report", run)
    assert (run / "report.html").read_bytes() == before


def test_damaged_lines_of_a_run_that_goes_on_are_left_out_and_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write("no row\n")
    assert "damaged lines of metrics.jsonl, left out: 1" in page_of(capsys, run)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_of_a_run_has_all_there_is(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, tiny, tmp_path / "page.html")
    result = json.loads((tiny / "result.json").read_text())
    assert f'<p class="number">{100 * result["test_accuracy"]:.1f} %</p>' in page
    assert "n = 400, 95 % interval" in page
    for title in ("Losses", "Feedback to the teacher", "Signal to noise of the feedback", "Confusion on the test set"):
        assert title in page
    wrong = 400 - round(400 * result["test_accuracy"])
    assert f"on test: {wrong:,} of 400 are wrong" in page
    for count in (count for row in result["evaluation"]["confusion"] for count in row if count):
        assert f">{count}</td>" in page
    assert page.count("<svg viewBox") >= 5
    assert "labels_per_class" in page
    assert torch.__version__ in page
    of_training = (tiny / "report.html").read_text()  # written when the training ended
    for part in ("<section><h2>Curves", "<section><h2>Confusion", "<section><h2>Surest mistakes"):
        sections = [text[text.index(part) :].split("</section>")[0] for text in (page, of_training)]
        assert sections[0] == sections[1]


def test_the_page_of_a_comparison_has_its_methods_and_the_paired_test(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(capsys, compared, tmp_path / "page.html")
    result = json.loads((compared / "result.json").read_text())
    assert html.escape(result["sentence"]) in page
    assert f"{100 * result['mpl_against_none']['mean']:+.2f} points" in page
    assert page.count("±") >= 6
    assert "mpl, student" in page
    assert "none, student" in page
    copy = Path(shutil.copytree(compared, tmp_path / "copy"))
    for before, after in (("mpl", "other"), ("none", "mpl"), ("other", "none")):
        (copy / before).rename(copy / after)
    for command in ("report", "compare"):
        assert "mpl/seed-0 holds another run than the one that was compared" in refused(capsys, command, copy)
    shutil.rmtree(copy / "none")
    assert "The folders of the runs are not there any more." in page_of(capsys, copy)


def test_the_page_of_rounds(rounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, rounds, tmp_path / "page.html")
    assert "Test accuracy by round: " in page
    assert "labels changed" in page
    (copy := Path(shutil.copytree(rounds, tmp_path / "copy")) / "result.json").unlink()
    assert "Curves of round-2" in page_of(capsys, copy.parent)


def test_a_feedback_that_is_dead_is_told() -> None:
    rows = [{"step": step, "feedback_std": 0.0, "inner_loss": 1.0} for step in range(9)]
    assert "Feedback to the teacher of mpl: 0 in every step." in web.plots({"mpl": rows}, "student")
    assert "0 in every step" not in web.plots({"mpl": [*rows, {"step": 9, "feedback_std": 0.1}]}, "student")


@pytest.mark.parametrize("values", [[0.5], [0.5] * 3, [0.0, 1.0], [1e-9, 1e9], [float("nan"), 0.5], [-1.0, -0.5]])
@pytest.mark.parametrize("key", ["inner_loss", "agreement", "feedback_std", "feedback_snr"])
def test_every_figure_has_a_place_within_its_plot(values: list[float], key: str) -> None:
    if key == "agreement":
        values = [min(max(value, 0.0), 1.0) for value in values]
    drawn = web.plots({"mpl": [{"step": step, key: value} for step, value in enumerate(values)]}, "student")
    lines = re.findall(r'd="M([\d. L-]+)"><title>', drawn)
    assert len(lines) == (key != "feedback_std" or any(value > 0 for value in values))
    for x, y in (point.split() for line in lines for point in line.split("L")):
        assert web.LEFT <= float(x) <= web.WIDTH
        assert 0 <= float(y) <= web.HEIGHT - web.BELOW


def test_hostile_names_are_texts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run.rename(tmp_path / "a<b>&\"'c\n\x1b[2J")
    classes = [HOSTILE, "\u202ename", "caf\udce9", 200 * "x", *"456789"]
    edited(place / "result.json", "evaluation", classes=classes)
    edited(place / "recipe.json", command=f"metapl train {HOSTILE}")
    page = page_of(capsys, place, tmp_path / "page.html")
    assert HOSTILE not in page
    assert f">{29 * 'x'}..." in page
    assert f">{100 * 'x'}" not in page
    assert page.count(html.escape(HOSTILE)) >= 3
    assert html.escape("a<b>&\"'c") in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    inputs, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1])
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([0.0, 100.0]))
    seen = mistakes(network, (inputs, labels), [HOSTILE, "b"], [f"{HOSTILE}.png", "b", "c"])
    assert (seen.wrong, len(seen.labels), len(seen.surest)) == (1, 3, 1)
    shown = web.pictures("Mistakes", HOSTILE, seen.surest)
    assert html.escape(f"{HOSTILE}.png") in shown
    assert "<script" not in shown


def test_many_classes_have_a_picture_of_their_confusion_and_a_folded_table() -> None:
    counts = torch.eye(50, dtype=torch.int64).mul(3).tolist()
    many = Evaluation(150, 1.0, None, 0.1, 0.1, (1.0,) * 50, tuple(map(tuple, counts)))
    names = [f"class {number}" for number in range(50)]
    assert 'class="pixels"' in web.matrix(many, names)
    assert web.classes(many, names).startswith("<details>")


def test_test_pictures_that_have_gone_leave_the_rest_of_the_page(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(color_run(tmp_path_factory) / "run", tmp_path / "run"))
    assert "left out" not in page_of(capsys, copy)
    edited(copy / "recipe.json", "recipe", "fields", test=str(tmp_path / "gone"))
    words = metapl("report", copy)
    assert "the test pictures are left out: " in words.stderr
    page = (copy / "report.html").read_text()
    assert "The test pictures are left out: " in page
    assert "Confusion on the test set" in page


def test_the_command_that_started_a_run_is_on_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--out", str(tmp_path / "a run")]
    monkeypatch.setattr(sys, "argv", ["metapl", *words])
    trained(*words)
    assert html.escape("metapl train digits --steps 6 --hidden 4 ") in page_of(capsys, tmp_path / "a run")
    assert f"--out &#x27;{tmp_path / 'a run'}&#x27;</pre>" in (tmp_path / "a run" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------------- its file


def test_a_page_is_replaced_and_another_file_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "page.html", tmp_path / "other.html"
    page_of(capsys, run, out)
    first = out.read_bytes()
    page_of(capsys, run, out)
    assert out.read_bytes() == first
    other.write_text("<html>mine</html>")
    assert "metapl report did not write it" in refused(capsys, "report", run, "--out", other)
    assert other.read_text() == "<html>mine</html>"
    os.mkfifo(tmp_path / "pipe.html")
    assert "it is a pipe" in refused(capsys, "report", run, "--out", tmp_path / "pipe.html")

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fsync)
    capsys.readouterr()
    told = refused_by_disk(run, out)
    assert "could not be written: No space left on device; any earlier page is as it was" in told
    assert out.read_bytes() == first
    assert not list(tmp_path.glob("*.tmp"))


def refused_by_disk(run: Path, out: Path) -> str:
    return metapl("report", run, "--out", out, code=2).stderr


def test_a_listing_leaves_everything_as_it_was(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tiny.rglob("*")}

    before = state()
    said(capsys, "runs", tiny)
    assert state() == before
