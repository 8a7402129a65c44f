"""Refusals and notes as a newcomer reads them: by the flag, with what may be meant, in lines that fit."""

from __future__ import annotations

import io
import os

import pytest

from metapl.apps.words import columns, tell

# ---------------------------------------------------------------------------------------------------- lines that fit


def test_other_lines_that_are_piped_have_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    tell("word " * 60, wrap=True)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in ((100, 100), (20, 40)):
        monkeypatch.setattr("shutil.get_terminal_size", lambda fallback, given=given: os.terminal_size((given, 24)))
        assert columns(Terminal()) == expected
        assert columns(io.StringIO()) == 80
        terminal = Terminal()
        tell("word " * 60, file=terminal, wrap=True)
        assert max(map(len, terminal.getvalue().splitlines())) <= expected


def test_a_table_is_not_broken() -> None:
    text = io.StringIO()
    tell("cell " * 40, file=text)
    assert text.getvalue().count("\n") == 1
