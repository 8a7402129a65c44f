"""Refusals and notes as a newcomer reads them: by the flag, with what may be meant, in lines that fit."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
from command import refused, unwrapped

import metapl
from metapl.apps.commands import main
from metapl.apps.recipes import ImageFolders
from metapl.apps.words import wrapped
from metapl.errors import FieldError

IMAGES = ("train", "images", "--labeled", "few", "--unlabeled", "many")
"""Of folders that there are not: what is refused needs none."""


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--minutes", "-1"), "--minutes -1.0: expected a number in (0, 527040]"),
        (("--minutes", "0"), "--minutes 0.0: expected a number in (0, 527040]"),
        (("--minutes", "nan"), "--minutes nan: expected a finite number"),
        (("--labeled-batch", "0"), "--labeled-batch 0: expected a whole number from 1 to 1,048,576"),
        (("--val-fraction", "2"), "--val-fraction 2.0: expected a number in [0, 1)"),
        (("--uda-threshold", "3"), "--uda-threshold 3.0: expected a number in [0, 1)"),
        (("--uda-temperature", "-1"), "--uda-temperature -1.0: expected a number of 0 or more"),
        (("--label-smoothing", "1"), "--label-smoothing 1.0: expected a number in [0, 1)"),
        (("--changes.zoom", "0.5"), "--changes.zoom 0.5: expected a number of 1 or more"),
        (("--teacher.weight-decay", "-1"), "--teacher.weight-decay -1.0: expected a number of 0 or more"),
        (
            ("--method", "mpl", "--student.weight-decay", "-1"),
            "--student.weight-decay -1.0: expected a number of 0 or more",
        ),
        (("--network", ""), "--network: nothing was given; expected a value"),
    ],
)
def test_a_wrong_value_is_refused_by_its_flag(
    flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *IMAGES, *flags).startswith(f"metapl: {text}")


def test_in_code_a_wrong_value_is_refused_by_its_field() -> None:
    with pytest.raises(FieldError, match=r"ImageFolders\(minutes=-1\): expected a number in \(0, 527040\]") as caught:
        ImageFolders(labeled="few", unlabeled="many", minutes=-1)
    assert caught.value.field == "minutes"
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes out of a process
    assert (str(again), again.field, again.value) == (str(caught.value), "minutes", -1)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ((*IMAGES, "--method", "fixmach"), "invalid choice 'fixmach' for argument '--method'. Expected one of ("),
        ((*IMAGES, "--precision", "bloat16"), "Expected one of ('float32', 'bfloat16')"),
        (
            (*IMAGES, "--compare", "--methods", "udda"),
            "invalid choice 'udda' for argument '--methods'. Expected one of ('mpl', 'none', 'supervised', 'label_",
        ),
        (
            ("evaluate", "run", "--network", "techer"),
            "Expected one of ('delivered', 'student', ",
        ),
        (
            ("train", "digits", "--mode", "xyz"),
            "invalid choice 'xyz' for argument '--mode'. Expected one of (",
        ),
        (("train", "digits", "--student.lr", "x"), "metapl: --student.lr: expected a number, got 'x'. See"),
        ((*IMAGES, "--method", "fixmach"), "Perhaps you meant: fixmatch. See metapl train images"),
        (("train", "images", "--labelled", "a", "--unlabelled", "b"), "Perhaps you meant: --labeled, --unlabeled."),
        (("train", "digits", "--stepz", "3"), "Unrecognized options: --stepz, 3. Perhaps you meant: --steps"),
        (("train", "digits", "--hidden", "3", "x"), "metapl: --hidden: expected a whole number, got 'x'. See"),
        ((*IMAGES, "--mean", "x"), "metapl: --mean: expected a number, got 'x'. See"),
        (
            ("train", "noisy", "--labeled", "a", "--clean", "b", "--method", "clean", "--labeled-batch", "3"),
            "Unrecognized options: --labeled-batch, 3.",
        ),
        (("train", "digits", "--steps", "x"), "metapl: --steps: expected a whole number, got 'x'. See"),
    ],
)
def test_what_the_parser_refuses_is_a_line_too(
    command: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(capsys, *command)


def test_a_network_that_is_nearly_right() -> None:
    with pytest.raises(
        metapl.MetaplError, match=r"no network 'effnet_b0'; did you mean efficientnet_b0\? Expected one"
    ):
        metapl.apps.networks.create("effnet_b0", 10)
    with pytest.raises(metapl.MetaplError, match=r"no network 'xyz'\. Expected one of .*, or timm:NAME"):
        metapl.apps.networks.create("xyz", 10)


# ---------------------------------------------------------------------------------------------------- lines that fit


def test_an_error_that_is_piped_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads it from a log looks for one; a terminal has it broken at its width."""
    for command in (("images", "--labeled", "few", "--unlabeled", "many"), ("digits", "--mode", "forwad")):
        assert main(["train", *command]) == 2
        (line,) = capsys.readouterr().err.splitlines()
    assert len(line) > 80
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert main(["train", "digits", "--mode", "forwad"]) == 2
    broken = terminal.getvalue().splitlines()
    assert max(map(len, broken)) <= 80
    assert " ".join(broken) == line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_broken_can_be_put_together_again() -> None:
    message = "note: " + " ".join(f"/some/folder/{number}.png" for number in range(40)) + " " + "x" * 100
    broken = wrapped(message)
    assert len(broken.splitlines()[0]) <= 80
    assert unwrapped(broken) == message
    assert "x" * 100 in broken, "a path is not broken"
    assert wrapped("a\n  b\n") == "a\n  b\n", "lines stay lines"
    assert wrapped("short") == "short"


def test_the_notes_of_a_training_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from metapl.apps.experiments.jobs import aloud

    aloud(f"note: all labeled pictures are in the unlabeled folder {tmp_path} too, and " + "more " * 20)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines)
