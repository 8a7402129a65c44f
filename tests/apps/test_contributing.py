"""What contributors are given, and what SECURITY.md promises of weights.

The workflow, the pinned tools, pre-commit.
"""

from __future__ import annotations

import pickle
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from metapl.errors import MetaplError
from metapl.networks.weights import read_weights

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def loaded(file: str) -> Any:
    """Return the content of a YAML file, in which the key ``on`` is read as a truth value."""
    yaml = pytest.importorskip("yaml", reason="mkdocs brings it: make docs")
    return yaml.safe_load((ROOT / file).read_text())


def package(requirement: str) -> str:
    """Return the name in a requirement."""
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def test_the_workflow_runs_what_the_makefile_has_on_what_pyproject_promises() -> None:
    workflow = loaded(".github/workflows/test.yml")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [
        step["run"].split()[1]
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if step.get("run", "").startswith("make ")
    ]
    assert set(called) == {"lint", "types", "tests", "docs", "test-long"}
    assert set(called) <= targets
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    oldest_python = PROJECT["requires-python"].removeprefix(">=")
    assert matrix["python"][0] == oldest_python
    (torch_promise,) = (text for text in PROJECT["dependencies"] if package(text) == "torch")
    oldest_torch = torch_promise.removeprefix("torch>=")
    assert matrix["torch"] == [f"torch=={oldest_torch}.*", "torch"]
    # The long tests run at night, and the others with each change.
    triggers = workflow[True]
    assert {"push", "pull_request", "schedule"} <= triggers.keys()
    assert "schedule" in workflow["jobs"]["long"]["if"]


def test_the_classifiers_name_versions_that_the_workflow_has() -> None:
    matrix = loaded(".github/workflows/test.yml")["jobs"]["tests"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: "
    named = [
        text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(prefix)
    ]
    assert named
    assert set(named) <= set(matrix["python"])


def test_every_tool_is_pinned_and_nothing_that_metapl_runs_on() -> None:
    extras = PROJECT["optional-dependencies"]
    of_users = {
        package(text) for name in ("apps", "labels", "onnx", "timm") for text in extras[name]
    }
    runs_on = {package(text) for text in PROJECT["dependencies"]} | of_users
    assert runs_on.isdisjoint(PINNED)
    # Which setuptools there may be is for torch to say: 2.11 wants one below 82.
    unpinned = {"metapl", "av", "setuptools"}
    tools = {package(text) for text in [*extras["dev"], *extras["docs"]]} - unpinned
    assert tools <= PINNED.keys()
    assert "setuptools" not in PINNED
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text()


def test_pre_commit_runs_the_tools_of_make_test() -> None:
    (repository,) = loaded(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert [entry.split()[0] for entry in entries] == [".venv/bin/ruff"] * 2 + [".venv/bin/mypy"]


class Trap:
    """A pickle that leaves a file behind where it is run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_file_of_weights_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for number, protocol in enumerate((2, 4)):
        weights = tmp_path / f"{number}.pt"
        weights.write_bytes(pickle.dumps({"weight": Trap(mark)}, protocol=protocol))
        with pytest.raises(MetaplError, match="cannot be read as weights"):
            read_weights(weights)
    torch.save({"weight": Trap(mark)}, tmp_path / "zip.pt")
    with pytest.raises(MetaplError, match="cannot be read as weights"):
        read_weights(tmp_path / "zip.pt")
    assert not mark.exists()
    # The trap is one.
    pickle.loads((tmp_path / "0.pt").read_bytes())
    assert mark.exists()
