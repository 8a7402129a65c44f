"""The metapl command, in a process of its own or in this one, and what it says."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from metapl.apps.main import main
from metapl.apps.run import RunFolder
from metapl.apps.words import wrapped


def process(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    words = [str(a) for a in arguments]
    born = Forked(words)
    out, err = born.communicate()
    assert born.returncode == code, err
    assert "Traceback" not in err
    return subprocess.CompletedProcess(words, code, out, err)


def metapl(*arguments: str | Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """The same without the cost of a process."""
    words, out, err = [str(a) for a in arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main(words)
    assert code in (found, None), err.getvalue()
    return subprocess.CompletedProcess(words, found, out.getvalue(), err.getvalue())


def unprompted(words: str) -> str:
    """What standard error says beside the progress, which is in lines where there is no terminal."""
    return "".join(line for line in words.splitlines(keepends=True) if not re.match(r"\w+: step \d", line))


def unwrapped(words: str) -> str:
    """A message of one line that was broken at 80 columns, as that line."""
    line = words.removesuffix("\n").replace("\n", " ")
    assert wrapped(line) == words.removesuffix("\n"), f"more than one line: {words}"
    return line


def refusal(finished: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command says."""
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("metapl: ")
    return line


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The same without the cost of a process."""
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


def unsealed(run: Path) -> dict[str, Any]:
    """What a run ended with, but for the seal of it."""
    content = result(run)
    del content["sha256"]["result.json"]
    return content


def reseal(run: Path) -> None:
    """As if the run had written its weights and pictures as they are now."""
    content = result(run)
    files = content["sha256"].keys() - {"result.json"}
    content["sha256"] = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}
    RunFolder(run).write_json("result.json", content)


def rows(text: str) -> list[dict[str, str]]:
    """CSV with a header."""
    return list(csv.DictReader(io.StringIO(text)))


ELSEWHERE = """
import json, sys
sys.modules["metapl"] = None  # whoever imports it fails
import numpy, torch
from pathlib import Path
from PIL import Image
from sklearn.datasets import load_digits
scope = {{}}
exec(json.loads({code!r}), scope)
best = scope["predict"]({images}).max(dim=1)
print(json.dumps([best.indices.tolist(), best.values.tolist()]))
"""


def loaded_elsewhere(exported: Path, images: str, file: str = "model.pt2") -> list[tuple[int, float]]:
    """What the code of a model card, run in a fresh process without metapl, takes pictures for, and how surely.

    ``images`` is Python for these, (B, C, H, W); ``file`` is what the code loads.
    """
    blocks = re.findall(r"```python\n(.*?)```", (exported / "MODEL_CARD.md").read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if f'"{file}"' in block)
    command = [sys.executable, "-c", ELSEWHERE.format(code=json.dumps(code), images=images)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return list(zip(*json.loads(finished.stdout), strict=True))
