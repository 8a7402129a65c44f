"""The help of each command: all flags that tyro takes, each in a sentence, in lines that fit."""

import contextlib
import io
import re
from typing import Any

import pytest
import tyro
from command import metapl

from metapl.apps import help_pages
from metapl.apps.main import COMMANDS, CONFIG, command_type

WITH_METHODS = [name for name in COMMANDS if hasattr(command_type(name), "method_name")]

# How a sentence does not begin that says what a flag does.
RIDDLES = re.compile(r"(Of|In which|Such as|Likewise|And|Its|By theirs|That)\b")


def page_of(name: str, columns: int = 80, method: str | None = None) -> str:
    """Return the help of a command, as a terminal of so many columns shows it."""
    chosen = ["--method", method] if method else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        return metapl(*name.split(), *chosen, "--help").stdout


def flags_of_tyro(kind: Any) -> dict[str, bool]:
    """Return the flags that tyro's own help lists, and whether each is required."""
    text = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        # From 130 columns on, tyro puts its boxes beside each other.
        patch.setenv("COLUMNS", "129")
        tyro.cli(kind, args=["--help"], config=CONFIG)
    flags: dict[str, bool] = {}
    name = ""
    for line in text.getvalue().splitlines():
        begun = re.match(r"[│ ] (-h, )?(--[\w.-]+|\[?[A-Z_]+[\w.]*)", line)
        if begun:
            name = begun[2].strip("[.")
            flags[name] = False
        if name and "(required)" in line:
            flags[name] = True
    flags.pop("--help")
    return flags


def kinds() -> list[tuple[str, str | None]]:
    """Return each command, with each of its methods."""
    cases: list[tuple[str, str | None]] = []
    for name in COMMANDS:
        methods = command_type(name).methods.METHODS if name in WITH_METHODS else [None]
        cases += [(name, method) for method in methods]
    return cases


@pytest.mark.parametrize(("name", "method"), kinds())
def test_the_help_has_the_flags_that_the_command_takes(name: str, method: str | None) -> None:
    kind = command_type(name)
    if method is not None:
        kind = kind.with_method(method)
    flags = help_pages.flags_of(kind)
    expected = flags_of_tyro(kind)
    assert {flag.name.strip(".") for flag in flags} == expected.keys()
    assert len(expected) == len(flags)
    for flag in flags:
        # Of pictures or runs, tyro takes none too, which the command refuses.
        if not flag.is_positional:
            assert flag.is_required == expected[flag.name], flag
    shown = [flag for group in help_pages.grouped(kind, flags).values() for flag in group]
    assert sorted(flag.name for flag in shown) == sorted(flag.name for flag in flags)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("columns", "most"), [(80, 80), (120, 100)])
def test_each_flag_is_explained_by_a_sentence_in_lines_that_fit(
    name: str, columns: int, most: int
) -> None:
    text = page_of(name, columns)
    assert text.startswith(f"usage: metapl {name}")
    assert max(map(len, text.splitlines())) <= most
    for flag in help_pages.flags_of(command_type(name)):
        assert flag.sentence[0].isupper(), flag
        assert flag.text.endswith("."), flag
        assert len(flag.text.split()) >= 2, flag
        assert not RIDDLES.match(flag.sentence), flag
        assert re.search(rf"^ +{re.escape(flag.typed)}( |$)", text, re.MULTILINE), flag


def test_help_into_a_pipe_is_80_columns_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert max(map(len, metapl("train", "images", "--help").stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", WITH_METHODS)
def test_each_method_is_listed_with_what_it_does_and_the_controls_last(name: str) -> None:
    kind = command_type(name)
    methods = kind.methods.METHODS
    text = page_of(name)
    listed, _, controls = text.partition("Controls, which are trained")
    listed = listed.partition("--method NAME")[2]
    for method, settings in methods.items():
        part = controls if settings.is_control else listed
        assert re.search(rf"^ +{method}(\n| ) *[A-Z]", part, re.MULTILINE), method
        assert settings.summary.endswith(".")
        assert settings.summary.split()[0] in ("Train", "Learn")
    summaries = [settings.summary for settings in methods.values()]
    assert len({*summaries}) == len(summaries)
    assert not methods[kind.method_name].is_control
    assert f"(default: {kind.method_name})" in listed


@pytest.mark.parametrize("name", [*WITH_METHODS, "noisy-student images", "noisy-student digits"])
def test_flags_are_in_groups_with_ten_that_are_used_most_first(name: str) -> None:
    titles = re.findall(r"^([a-z][\w ]*):$", page_of(name), re.MULTILINE)
    assert titles[0] == "most used"
    assert "other" not in titles, "a new flag is to be in a group of help_pages.GROUPS"
    assert {"network", "training", "output"} <= {*titles}
    assert any(title.startswith("method") for title in titles)
    kind = command_type(name)
    groups = help_pages.grouped(kind, help_pages.flags_of(kind))
    assert len(groups["most used"]) <= help_pages.MOST_USED_COUNT
    required = {flag.name for flag in help_pages.flags_of(kind) if flag.is_required}
    assert required <= {flag.name for flag in groups["most used"]}


def test_the_help_of_a_method_has_its_flags() -> None:
    usual = page_of("train images")
    assert "--trial-share" in usual
    assert "--uda-weight" not in usual
    own = page_of("train images", method="uda")
    assert "--uda-weight" in own
    assert "--wait" not in own
    chosen = page_of("train images", method="mpl")
    assert "method mpl:" in chosen
    assert "--wait" in chosen
    assert "--rounds" not in chosen


def test_a_flag_of_another_method_is_refused_with_those_that_have_it() -> None:
    said = metapl("train", "digits", "--method", "uda", "--wait", "3", code=2).stderr
    assert "--wait is no flag of --method uda; it is one of mpl, none" in said
    assert "metapl train digits --method uda --help" in said


def test_a_method_that_there_is_not_is_answered_by_those_that_there_are() -> None:
    for words in (["--method", "fixmach"], ["--method=fixmach"]):
        said = metapl("train", "digits", *words, code=2).stderr
        assert "--method fixmach; did you mean fixmatch?" in said, words
        assert "Expected mpl, supervised" in said
    assert "--method" in metapl("train", "digits", "--method", code=2).stderr
    said = metapl("train", "digits", "uda", "--steps", "3", code=2).stderr
    assert "uda is a method; expected --method uda." in said
