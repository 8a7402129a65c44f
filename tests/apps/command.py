"""The metapl command in this process, and what it says."""

import contextlib
import csv
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metapl.apps.main import main
from metapl.run_folder import RunFolder


def metapl(*arguments: str | Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command as it is typed, without the cost of a process."""
    words, out, err = [str(a) for a in arguments], io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["metapl", *words])  # which a run notes
        found = main(words)
    assert code in (found, None), err.getvalue()
    return subprocess.CompletedProcess(words, found, out.getvalue(), err.getvalue())


def result(run: Path) -> dict[str, Any]:
    """Return what a run ended with."""
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def edited(file: Path, *keys: str, **values: Any) -> None:
    """Update what a JSON file holds, or what it holds under these keys.

    Of a run, as if the run had written it so.
    """
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
    """Seal a run as if it had written its weights and pictures as they are now."""
    content = result(run)
    files = content["sha256"].keys() - {"result.json"}
    content["sha256"] = {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files
    }
    RunFolder(run).write_json("result.json", content)


def rows(text: str) -> list[dict[str, str]]:
    """Return the rows of CSV with a header."""
    return list(csv.DictReader(io.StringIO(text)))
