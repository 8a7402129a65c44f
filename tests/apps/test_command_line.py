"""The command line: its help, its messages, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re

import pytest
from command import metapl, process, refusal, refused

from metapl.apps.commands import COMMANDS, main
from metapl.apps.commands.ablate import COMMANDS as ABLATED
from metapl.apps.commands.labels import COMMANDS as LABELS
from metapl.apps.commands.train import COMMANDS as TRAINED
from metapl.apps.recipes import RECIPES, TwoMoons

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
        (["evaluate", "none", "--netwrok"], "there is no --netwrok; did you mean --network?"),
    ],
)
def test_a_wrong_command_line_gives_one_line_and_exit_code_2(arguments: list[str], expected: str) -> None:
    assert expected in refusal(process(*arguments, code=2))


def test_commands_and_recipes_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "trian")
    assert (
        "there is no command 'trian'; did you mean train? Expected one of train, noisy-student, ablate, plan," in line
    )
    line = refused(capsys, "train", "dgits")
    assert "there is no recipe 'dgits'; did you mean digits? Expected one of digits" in line
    assert "there is no recipe 'xyz'. Expected one of digits" in refused(capsys, "train", "xyz")
    assert "no recipe was named" in refused(capsys, "train")
    assert "--steps 0: expected 1 or more" in refused(capsys, "train", "digits", "--steps", "0")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--lableed", "a", "--unlabeled", "b"), "there is no --lableed; did you mean --labeled"),
        (("--lr", "3"), "there is no --lr; did you mean --student.lr or --teacher.lr or --finetune.lr?"),
        (("--labelled", "a"), "missing: --unlabeled DIR."),
        (("--unlabelled", "a"), "missing: --labeled DIR."),
        (("--labelled", "nowhere", "--unlabelled", "b", "--gray"), "nowhere"),
        (("--xyzzy",), "there is no --xyzzy. See metapl train images --help."),
    ],
)
def test_flags_that_do_not_exist_are_refused_with_what_was_meant(
    flags: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, "train", "images", *flags)


@pytest.mark.parametrize("recipe", ["digits", "images", "torchvision", "cifar10-4k"])
def test_the_help_of_a_recipe_is_in_groups(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    from metapl.apps.commands.help import OTHERS

    with contextlib.suppress(SystemExit):
        main(["train", recipe, "--help"])
    text = capsys.readouterr().out
    blocks = {block.partition(":\n")[0]: block.splitlines()[1:] for block in text.split("\n\n")}
    # A new flag is put into a group in metapl/apps/commands/help.py.
    assert "".join(blocks[OTHERS]).split()[:2] == ["-h,", "--help"]
    assert len(re.findall(r"^  -", "\n".join(blocks[OTHERS]), re.MULTILINE)) == 1
    flags = re.findall(r"^  --(?:no-)?([\w.-]+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags))
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(RECIPES[recipe])}
    hidden = {"class-names", "network-name", "strong", "feedback", "student", "teacher", "finetune", "view", "changes"}
    hidden |= {"teacher-run", "label-store", "labeled-label-store"}  # --teacher, --labels, --labeled-labels
    hidden |= {"self-training"}  # whose fields are flags of metapl noisy-student
    hidden |= {"data"} if recipe.startswith("cifar") else set()
    assert fields - hidden <= set(flags)
    assert all(len(block) > 0 for block in blocks.values() if block)
    if recipe == "images":
        required = [line.split()[0] for line in blocks["required"] if line.startswith("  -")]
        assert required == ["--labeled", "--unlabeled"]
        assert text.index("required:") < text.index("data:")
        assert "resnet18" in " ".join("".join(blocks["network"]).split())


@pytest.mark.parametrize(
    "command",
    [
        *(f"train {name}" for name in TRAINED),
        *(f"ablate {name}" for name in ABLATED),
        "ablate --factory networks:build",
        *(f"labels {name}" for name in LABELS),
        *(f"noisy-student {name}" for name in ("digits", "images", "torchvision", "noisy-imagenet-l2")),
        "plan images",
        *(command for command in COMMANDS if command not in ("train", "ablate", "labels", "plan", "noisy-student")),
    ],
)
def test_every_flag_has_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from metapl.apps.commands.help import entries_in

    from metapl.apps.commands import parse

    told: list[str] = []
    monkeypatch.setattr(parse, "readable", lambda text: told.append(text) or "")
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    entries = list(entries_in("".join(told)))
    assert entries
    silent = re.compile(r"\((default: .*|on by default.*)\)|\(required\)")
    assert [entry.name for entry in entries if not silent.sub("", entry.help).strip()] == []


# ------------------------------------------------------------------------------------------------ images and CSV files


def test_every_recipe_is_told() -> None:
    from metapl.apps.commands.commands import RECIPES_HELP

    told = [line.split()[0] for line in RECIPES_HELP.splitlines() if line.startswith("  ")]
    assert told == list(TRAINED) == [*RECIPES, TwoMoons.name]
    assert max(map(len, RECIPES_HELP.splitlines())) <= 80
