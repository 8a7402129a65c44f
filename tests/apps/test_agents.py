"""llms.txt and AGENTS.md: their links and paths lead somewhere, and their commands and code run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pages
import pytest
import torch

import metapl
from metapl.apps.main import COMMANDS, parsed

ROOT = Path(__file__).parents[2]
NAMES = ("llms.txt", "AGENTS.md")

pytestmark = pytest.mark.skipif(
    not (ROOT / "AGENTS.md").is_file(), reason="the checkout's pages are not installed"
)

LINK = re.compile(r"\]\(([^)#]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("metapl/", "tests/", "docs/", "benchmarks/", "examples/")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def prose_of(name: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)


def shell_lines(name: str) -> list[list[str]]:
    """Return the commands of a page's blocks, word by word."""
    lines = "\n".join(SHELL.findall(text_of(name))).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_page(name: str) -> None:
    assert text_of(name).startswith("# ")
    assert len(text_of(name).splitlines()) <= 90


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_lead_somewhere(name: str) -> None:
    links = LINK.findall(prose_of(name))
    assert len(links) > 5
    paths = []
    for code in CODE.findall(prose_of(name)):
        is_file = re.fullmatch(r"[\w.-]+\.(md|txt|toml)", code) is not None
        if code.startswith(FOLDERS) or is_file:
            paths.append(code)
    for path in (*links, *paths):
        assert (ROOT / path).exists(), path


def test_the_names_of_the_library_are_there() -> None:
    names = []
    for name in NAMES:
        names += re.findall(r"`(metapl(?:\.\w+)+)`", prose_of(name))
    assert "metapl.hypergradient" in names
    for name in names:
        first = name.split(".")[1]
        assert first in dir(metapl), name
        # A module of the package, and what stands in it.
        assert resolve_name(name) is not None
    (line,) = (line for line in prose_of("llms.txt").splitlines() if "[Training]" in line)
    listed = CODE.findall(line)
    assert len(listed) == 5
    assert {*listed} <= {*metapl.__all__}
    modes = re.findall(r'`"(\w+)"`', prose_of("llms.txt"))
    assert len(modes) == 4
    assert {*modes} <= {*metapl.MODES}


def test_the_commands_named_in_the_text_are_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = (
        line for line in prose_of("llms.txt").splitlines() if "`metapl train images`" in line
    )
    commands = [code.removeprefix("metapl ") for code in CODE.findall(line)]
    assert {*commands} <= {*COMMANDS}
    with pytest.raises(SystemExit):
        parsed(["train", "digits", "--help"])
    help_text = capsys.readouterr().out
    flags = re.findall(r"`(--[\w-]+)`", prose_of("llms.txt"))
    assert flags
    for flag in flags:
        assert f" {flag} " in help_text


def test_each_line_of_the_blocks_is_a_command_that_is_there() -> None:
    targets = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = shell_lines("AGENTS.md")
    assert len(lines) == 7
    for words in lines:
        arguments = [word for word in words if re.match(r"[A-Z_]+=", word)]
        program, *others = (word for word in words if word not in arguments)
        if program == "make":
            assert others[0] in targets
        elif program == ".venv/bin/python":
            assert others[:2] == ["-m", "pytest"]
        else:
            assert program == ".venv/bin/metapl"
            command_name, _ = parsed(others)
            assert command_name == "train digits"
        for word in words:
            for path in re.findall(r"tests/[\w/.]+", word):
                assert (ROOT / path).is_file(), path


def test_the_code_for_a_first_use_runs() -> None:
    (code,) = pages.FENCED.findall(text_of("llms.txt"))
    with torch.random.fork_rng():
        exec(compile(code, "llms.txt", "exec"), {})
