"""The command line: its help, its messages, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import re

import pytest
from command import metapl, process, refusal, refused

from metapl.apps.commands import COMMANDS, main
from metapl.apps.commands.ablate import COMMANDS as ABLATED
from metapl.apps.commands.labels import COMMANDS as LABELS
from metapl.apps.commands.train import COMMANDS as TRAINED
from metapl.apps.recipes import RECIPES

# ------------------------------------------------------------------------------------------------------------ the help


def test_help_names_every_command_and_fits_a_terminal() -> None:
    text = metapl("--help").stdout
    assert all(f"\n  metapl {command} " in text for command in COMMANDS)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("command", [*COMMANDS, "train digits", "labels stats", "labels select"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert f"metapl {command}" in text
    assert max(map(len, text.splitlines())) <= 80


# ------------------------------------------------------------------------------------------------------------- messages


def test_what_the_library_logs_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def logging_twice(given: list[str]) -> int:
        for _ in range(2):
            logging.getLogger("metapl.apps.networks.architecture").info("12 tensors loaded; fresh: %s", "head.weight")
        return 0

    monkeypatch.setattr("metapl.apps.commands._dispatch", logging_twice)
    for _ in range(2):  # a handler that stayed would show the second command's messages twice
        assert main(["evaluate"]) == 0
        assert capsys.readouterr().err == "metapl: 12 tensors loaded; fresh: head.weight\n"
    logging.getLogger("metapl.apps.networks.architecture").info("beside the command")
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "none"], "there is no folder none"),
        (["evaluate", "none", "--netwrok"], "Unrecognized options: --netwrok. Perhaps you meant: --network"),
    ],
)
def test_a_wrong_command_line_gives_one_line_and_exit_code_2(arguments: list[str], expected: str) -> None:
    assert expected in refusal(process(*arguments, code=2))


def test_commands_and_recipes_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "trian")
    assert "there is no command 'trian'; did you mean train? Expected one of train, noisy-student, ablate," in line
    line = refused(capsys, "train", "dgits")
    assert "there is no recipe 'dgits'; did you mean digits? Expected one of digits" in line
    assert "there is no recipe 'xyz'. Expected one of digits" in refused(capsys, "train", "xyz")
    assert "no recipe was named" in refused(capsys, "train")
    assert "--steps 0: expected a whole number from 1 to 1,000,000,000" in refused(
        capsys, "train", "digits", "--steps", "0"
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--lableed", "a", "--unlabeled", "b"), "Missing from metapl train images --method uda: --labeled DIR"),
        (("--labeled", "a", "--unlabeled", "b", "--lr", "3"), "Unrecognized options: --lr, 3"),
        (("--labeled", "a"), ": --unlabeled DIR. See metapl train images --method uda --help."),
        (("--labeled", "a", "--unlabeled", "b", "--gray"), "Unrecognized options: --gray. Perhaps you meant: --grey"),
    ],
)
def test_flags_that_do_not_exist_are_refused(
    flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, "train", "images", *flags)


def helped(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``--help`` prints."""
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return capsys.readouterr().out


OF_METHODS = [
    *(("images", name) for name in RECIPES["images"].known),
    *(("digits", name) for name in ("mpl", "uda", "noisy_student")),
    *(("noisy", name) for name in ("example_weights", "plain")),
]


@pytest.mark.parametrize(("recipe", "method"), OF_METHODS)
def test_the_help_of_a_method_has_its_own_flags(recipe: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every field of it, and none that another method alone has."""
    text = helped(f"train {recipe} --method {method}", capsys)
    flags = {*re.findall(r"^[│ ]{1,3}--(?:no-)?([\w-]+)", text, re.MULTILINE)}
    kind = RECIPES[recipe]

    def fields(name: str) -> set[str]:
        made = kind.by_name(name)
        parts = [made, *(part for part in (getattr(made, "self_training", None),) if part is not None)]
        own = {field.name for part in parts for field in dataclasses.fields(part)}
        return {name.replace("_", "-") for name in own - NESTED}

    assert fields(method) <= flags
    alone = set().union(*(fields(name) for name in kind.known)) - fields(method)
    assert alone & flags <= {"teacher", "student", "labels"}
    options = text[text.index(" options") :]
    assert max(map(len, options.splitlines())) <= 80


NESTED = {
    "feedback",
    "self_training",
    "first",
    "student",
    "teacher",
    "teacher_run",
    "label_store",
    "labeled_label_store",
}
"""Fields whose flags have other names."""


@pytest.mark.parametrize(
    "command",
    [
        *(f"train {name}" for name in TRAINED),
        *(f"ablate {name}" for name in ABLATED),
        "ablate --factory networks:build",
        *(f"labels {name}" for name in LABELS),
        *(f"noisy-student {name}" for name in ("digits", "images")),
        *(command for command in COMMANDS if command not in ("train", "ablate", "labels", "noisy-student")),
    ],
)
def test_every_flag_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip("│").rstrip() for line in helped(command, capsys).splitlines()]
    flags = [number for number, line in enumerate(lines) if re.match(r" {1,2}(-h, )?--[a-z]", line)]
    assert flags
    for number in flags:
        below = itertools.takewhile(lambda line: line and not re.match(r" {1,2}--|[╭╰]", line), lines[number + 1 :])
        words = " ".join([lines[number].strip().partition("  ")[2], *below])
        assert re.sub(r"\((default: .*|required)\)", "", words).strip(), lines[number]


# ------------------------------------------------------------------------------------------------ images and CSV files


def test_every_recipe_is_told() -> None:
    from metapl.apps.commands.commands import RECIPES_HELP

    told = [line.split()[0] for line in RECIPES_HELP.splitlines() if line.startswith("  ")]
    assert told == list(TRAINED) == [*RECIPES]
    assert max(map(len, RECIPES_HELP.splitlines())) <= 80
