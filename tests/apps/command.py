"""The metapl command in this process, and what it says."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from metapl.apps.main import main
from metapl.apps.run import RunFolder


def metapl(*arguments: str | Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """The command as it is typed, without the cost of a process."""
    words, out, err = [str(a) for a in arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main(words)
    assert code in (found, None), err.getvalue()
    return subprocess.CompletedProcess(words, found, out.getvalue(), err.getvalue())


def unprompted(words: str) -> str:
    """What standard error says beside the progress, which is in lines where there is no terminal."""
    return "".join(line for line in words.splitlines(keepends=True) if not re.match(r"\w+: step \d", line))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line or the box that a refused command says."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    if said.err.startswith("╭"):  # by tyro, who draws a box
        return " ".join(said.err.translate(dict.fromkeys(map(ord, "╭╮╰╯│─"), " ")).split())
    assert len(said.err.splitlines()) == 1, said.err
    return said.err


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    """Standard output of a command in this process."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    return capsys.readouterr().out


def result(run: Path) -> dict[str, Any]:
    """What a run ended with."""
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def edited(file: Path, *keys: str, **values: Any) -> None:
    """Update what a JSON file holds, or what it holds under these keys; of a run, as if the run had written it so."""
    content = json.loads(file.read_text())
    sealed = content.pop("sha256", {})
    part = content
    for key in keys:
        part = part[key]
    part.update(values)
    if file.name in ("recipe.json", "result.json"):
        sealed.pop(file.name, None)
        RunFolder(file.parent).write_json(file.name, {**content, "sha256": sealed})
    else:
        file.write_text(json.dumps(content))


def reseal(run: Path) -> None:
    """As if the run had written its weights and pictures as they are now."""
    content = result(run)
    files = content["sha256"].keys() - {"result.json"}
    content["sha256"] = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}
    RunFolder(run).write_json("result.json", content)


def rows(text: str) -> list[dict[str, str]]:
    """CSV with a header."""
    return list(csv.DictReader(io.StringIO(text)))
