"""Names of files and classes are names: they move no cursor, are no formula, and no Markdown."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pytest
from command import said
from forked import Forked
from tiny_runs import color_folders, images_command

from metapl.apps.main import main
from metapl.apps.pictures.csv_files import CsvRows
from metapl.apps.suspects import Suspect, write_suspects
from metapl.apps.words import cell
from metapl.errors import few
from metapl.words import TURNS, shown

PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"

EVIL = {
    "escape": "a\x1b[2J\x1b[31mred",
    "newline": "a\nmetapl: all is well",
    "carriage return": "a\rb",
    "turned": "a\u202egnp.exe",
    "bell": "a\x07",
    "c1": "a\x9bc",
    "not UTF-8": os.fsdecode(b"caf\xe9"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_what_is_shown_is_one_line_of_printable_letters(kind: str) -> None:
    text = shown(EVIL[kind])
    assert not {*text} & {*TURNS, "\n", "\r", "\x1b", "\x07", "\x9b"}
    text.encode()
    assert text != EVIL[kind]
    assert shown(text) == text
    assert few([EVIL[kind]]) == text


@pytest.mark.parametrize(
    "name",
    ["größe", "猫", "naïve café", PERSIAN, "👩\u200d🚀", "a b", "$5_x"],
)
def test_names_in_any_script_are_shown_as_they_are(name: str) -> None:
    assert shown(name) == name


@pytest.mark.parametrize("kind", EVIL)
def test_predict_shows_names_of_files_harmlessly(
    kind: str, tiny: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / f"{EVIL[kind]}.png").write_bytes(b"no picture")
    (folder / f"fine {EVIL[kind]}.png").write_bytes(digit.read_bytes())
    capsys.readouterr()
    out = tmp_path / "out.csv"
    assert main(["predict", str(tiny), str(folder), "--out", str(out)]) == 1
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert not {*text} & {*TURNS, "\r", "\x1b", "\x07", "\x9b"}
    assert len(told.err.splitlines()) == 2
    with out.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        (row,) = csv.DictReader(file)
    assert row["file"] == f"{folder}/fine {EVIL[kind]}.png"


def test_a_spreadsheet_finds_no_formula() -> None:
    sink = io.StringIO()
    names = ["=1+1.png", "+1.png", "-1.png", "@x.png", "\tx.png", "\rx.png", "a\rb.png", 'a",b.png', "a\nb", "fine.png"]
    writer = CsvRows(sink)
    for name in names:
        writer.writerow([name, "=cat", "0.5"])
    found = list(csv.reader(io.StringIO(sink.getvalue(), newline="")))
    assert [row[0] for row in found] == [f"'{name}" for name in names[:6]] + names[6:]
    assert {row[1] for row in found} == {"'=cat"}
    assert {row[2] for row in found} == {"0.5"}
    assert cell("0.5") == "0.5"
    for line in sink.getvalue().split("\n"):
        bare = line.replace('""', "")
        assert "\r" not in bare or '"' in bare


def test_on_a_terminal_cells_are_escaped() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    sink = Terminal()
    CsvRows(sink).writerow(["a\x1b[2J", "b"])
    assert sink.getvalue() == "a\\x1b[2J,b\n"


def test_names_that_are_not_utf8_come_out_of_predict_as_they_are(tiny: Path, digit: Path, tmp_path: Path) -> None:
    """To a file as to a pipe."""
    picture = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(picture, "wb") as file:
        file.write(digit.read_bytes())
    printed = tmp_path / "printed"
    assert Forked(["predict", tiny, os.fsdecode(picture)], said=printed).wait() == 0
    assert any(line.startswith(picture + b",") for line in printed.read_bytes().splitlines())


@pytest.mark.usefixtures("blank_programs")
def test_classes_of_any_name_go_through_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training, evaluating, predicting and the model card."""
    root, evil, other = color_folders(tmp_path / "root"), "=a\x1b[2J\u202e|<b>*c*", os.fsdecode(b"caf\xe9\n[x](y)")
    for part in ("labeled", "test"):
        (root / part / "red").rename(root / part / evil)
        (root / part / "blue").rename(root / part / other)
    out = tmp_path / "run"
    texts = [said(capsys, *images_command(root), "--out", out), said(capsys, "evaluate", out)]
    said(capsys, "predict", out, root / "unlabeled", "--out", tmp_path / "out.csv", "--probabilities")
    texts.append(said(capsys, "export", out, "--out", tmp_path / "card"))
    card = (tmp_path / "card" / "MODEL_CARD.md").read_text()
    for text in (*texts, card):
        assert not {*text} & {*TURNS, "\x1b", "\r"}
    (classes,) = (line for line in card.splitlines() if line.startswith("| classes |"))
    assert r"\|\<b\>\*c\*" in classes
    assert r"caf\\xe9\\n\[x\](y)" in classes
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= {f"'{evil}", other}


def test_suspects_have_the_same_csv(tmp_path: Path) -> None:
    """Names of files and of classes alike, which are as they are on the disk but for formulas."""
    names = ("=1+1.png", "x\ry.png", "x\ny,z.png", "caf\udce9.png", "@a")
    found = [Suspect(name, i, i % 3, (i + 1) % 3, 0.25, 0.5) for i, name in enumerate(names)]
    write_suspects(tmp_path, found, ("=cmd|' /C calc'!A0", "a\rb", '"c"'))
    with (tmp_path / "suspects.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *table = csv.reader(file)
    assert header == ["file", "given", "probably", "p_given", "p_probably"]
    assert [row[0] for row in table] == ["'=1+1.png", "x\ry.png", "x\ny,z.png", "caf\udce9.png", "'@a"]
    assert table[0][1:] == ["'=cmd|' /C calc'!A0", "a\rb", "0.25", "0.5"]
    assert b'"x\ry.png","a\rb"' in (tmp_path / "suspects.csv").read_bytes()
