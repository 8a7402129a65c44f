"""What is installed.

Dependencies, imports, and the files of the wheel and the source distribution.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Of modules that are called otherwise."""

INDIRECT = {"onnx", "onnxruntime", "onnxscript", "tensorboard", "torchopt"}
"""Declared for torch.onnx and torch.utils.tensorboard, which import them themselves, for programs
that run in another process, and for users, who hand over TorchOpt's transforms."""


def imported(wherever: bool = True) -> set[str]:
    """The distributions that the package's files import, wherever in a file, or as they are loaded."""
    modules: set[str] = set()
    for file in (ROOT / "metapl").rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree) if wherever else tree.body:
            if isinstance(node, ast.Import):
                modules.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.partition(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in modules - {"metapl"}}


def declared(requirements: list[str]) -> set[str]:
    """The names in a list of requirements."""
    return {re.split(r"[^\w-]", one, maxsplit=1)[0] for one in requirements}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    extras = PROJECT["optional-dependencies"]
    optional = declared(extras["labels"] + extras["onnx"] + extras["timm"])
    needed = (declared(PROJECT["dependencies"]) | optional) - INDIRECT
    assert imported() - sys.stdlib_module_names == needed
    # matplotlib is slow to load, and Windows has no fcntl.
    assert imported(wherever=False).isdisjoint({"matplotlib", "fcntl", *optional})


BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, "
    "sys.argv[1])(sys.argv[2]))"
)


def built(kind: str, source: Path, out: Path) -> Path:
    """The file that the build backend makes of a source tree, as ``pip`` and ``build`` call it."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    return (
        out
        / subprocess.run(
            command, cwd=source, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()[-1]
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution of a copy of the checkout, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("distributions")
    copy, passed_over = folder / "copy", shutil.ignore_patterns(".*", "__pycache__")
    copy.mkdir()
    for name in ("metapl", "docs", "examples", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=passed_over)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, copy)
    source = built("sdist", copy, folder)
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return source, built("wheel", unpacked, folder)


@pytest.mark.long
def test_the_distributions_have_the_package_and_its_license(
    distributions: tuple[Path, Path],
) -> None:
    source, wheel = distributions
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "metapl").rglob("*.py")} | {
        "metapl/py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"metapl-{PROJECT['version']}.dist-info"
        metadata, commands = (
            archive.read(f"{info}/{name}").decode() for name in ("METADATA", "entry_points.txt")
        )
    assert {name for name in names if not name.startswith(f"{info}/")} == package
    assert f"{info}/licenses/LICENSE" in names
    assert "metapl = metapl.apps.main:main\n" in commands
    assert f"Version: {PROJECT['version']}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    with tarfile.open(source) as archive:
        files = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    assert package | {"LICENSE", "README.md", "pyproject.toml"} <= files
    assert not {name for name in files if name.startswith("tests/")}


@pytest.mark.long
def test_the_wheel_alone_trains(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Beside this environment's libraries, and away from the checkout."""
    site = tmp_path / "site"
    install = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(site),
    ]
    subprocess.run(
        [sys.executable, "-m", "pip", *install, str(distributions[1])],
        check=True,
        capture_output=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = [
        sys.executable,
        "-c",
        "import importlib.util as u; print(u.find_spec('metapl').origin)",
    ]
    found = subprocess.run(
        where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == f"{site / 'metapl' / '__init__.py'}\n"
    train = [
        sys.executable,
        str(site / "bin" / "metapl"),
        "train",
        "digits",
        "--steps",
        "2",
        "--out",
        "run",
    ]
    done = subprocess.run(
        train, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] > 0


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    for line in (
        "cff-version: 1.2.0",
        f"version: {PROJECT['version']}",
        f"license: {PROJECT['license']}",
    ):
        assert f"{line}\n" in text


def test_python_runs_the_package_as_the_command() -> None:
    """``python -m metapl``, with its exit code.

    Importing the package alone loads nothing of the command.
    """
    answers = {}
    for words in ("--version", "trian"):
        ended = subprocess.run(
            [sys.executable, "-m", "metapl", words], capture_output=True, text=True, check=False
        )
        answers[words] = (ended.returncode, ended.stdout.strip(), ended.stderr.strip())
    assert answers["--version"] == (0, f"metapl {PROJECT['version']}", "")
    assert answers["trian"][0] == 2
    assert answers["trian"][2].startswith(
        "metapl: there is no command 'trian'; did you mean train?"
    )
    look = (
        "import sys, metapl; print([name for name in ('tyro', 'metapl.apps') if name in "
        "sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", look], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
