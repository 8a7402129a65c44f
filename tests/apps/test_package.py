"""What is installed.

Dependencies, imports, and the files of the wheel and the source distribution.
"""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from command import metapl

from metapl.errors import OPTIONAL_PACKAGES, origin

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

EXTRAS = PROJECT["optional-dependencies"]

OF_USERS = ("apps", "labels", "onnx", "timm", "torchopt", "transformers")
"""The extras of what the package can do; the others are for those who work on it."""

DISTRIBUTIONS = {module: package for module, (package, _) in OPTIONAL_PACKAGES.items()}
"""By their modules, some of which are called otherwise."""

INDIRECT = {"accelerate", "onnx", "onnxruntime", "onnxscript", "tensorboard", "torchopt"}
"""Declared for transformers, torch.onnx and torch.utils.tensorboard, which import them themselves,
for programs that run in another process, and for users, who hand over TorchOpt's transforms."""

AT_THE_TOP = {"numpy", "safetensors", "torch", "tqdm"}
"""What a module of the library may import as it is loaded. The rest of the core, scipy and
filelock, is loaded where it is used."""


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Give the statements that run as a module is loaded, without those for a type checker."""
    for statement in tree.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        yield statement


def imported(files: Iterable[Path], *, anywhere: bool = True) -> set[str]:
    """Return the distributions that files import, anywhere in them, or as they are loaded."""
    modules: set[str] = set()
    for file in files:
        tree = ast.parse(file.read_text())
        nodes: Iterable[ast.AST] = ast.walk(tree) if anywhere else statements(tree)
        for node in nodes:
            if isinstance(node, ast.Import):
                modules.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.partition(".")[0])
    outside = modules - {"metapl"} - sys.stdlib_module_names
    return {DISTRIBUTIONS.get(name, name) for name in outside}


def files_of(*, application: bool) -> list[Path]:
    """Return the files of the application, or those of the library."""
    apps = ROOT / "metapl" / "apps"
    files = sorted((ROOT / "metapl").rglob("*.py"))
    return [file for file in files if file.is_relative_to(apps) == application]


def declared(requirements: list[str]) -> set[str]:
    """Return the names in a list of requirements, those of metapl's own extras aside."""
    return {re.split(r"[^\w-]", one, maxsplit=1)[0] for one in requirements} - {"metapl"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    core = declared(PROJECT["dependencies"])
    optional = set().union(*(declared(EXTRAS[extra]) for extra in OF_USERS))
    library = files_of(application=False)
    application = files_of(application=True)
    assert imported([*library, *application]) == (core | optional) - INDIRECT
    assert imported(library, anywhere=False) == AT_THE_TOP
    # matplotlib is slow to load.
    late = {"matplotlib"}.union(*(declared(EXTRAS[extra]) for extra in OF_USERS if extra != "apps"))
    assert imported(application, anywhere=False).isdisjoint(late)


def unguarded(file: Path) -> list[str]:
    """Return the optional packages that a file imports outside of ``with needed_for(...)``."""
    tree = ast.parse(file.read_text())
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_guard = isinstance(node, ast.With) and "needed_for(" in ast.unparse(node.items[0])
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_guard or is_for_types:
            guarded.update(ast.walk(node))
    names = []
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        for module in modules:
            if module.partition(".")[0] in OPTIONAL_PACKAGES and node not in guarded:
                names.append(module)
    return names


def test_the_library_says_in_a_line_which_extra_it_lacks(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "with needed_for('a figure'):\n    import matplotlib\n\n"
        "def draw():\n    from PIL import Image\n"
    )
    assert unguarded(planted) == ["PIL"]
    for file in files_of(application=False):
        assert unguarded(file) == [], file


def test_each_optional_package_is_named_with_the_extra_that_installs_it() -> None:
    extra_of = dict(OPTIONAL_PACKAGES.values())
    for extra in OF_USERS:
        names = {package for package, its_extra in extra_of.items() if its_extra == extra}
        assert names == declared(EXTRAS[extra])
    # Whoever installs stored labels, say, gets the command that writes them.
    for extra in ("labels", "onnx", "timm"):
        assert "metapl[apps]" in EXTRAS[extra]


WITHOUT_APPS = """
import sys
import metapl
# Importing the package alone loads nothing of the command.
assert not {"tyro", "metapl.apps"} & sys.modules.keys()
for name in ("tyro", "sklearn", "einops"):
    sys.modules[name] = None
from importlib import import_module
from metapl.__main__ import main
assert main() == 2
for module in ("pictures", "labels", "networks"):
    try:
        import_module(f"metapl.{module}")
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ('{"url": "file://FOLDER", "dir_info": {}}', "FOLDER"),
        ('{"url": "file://FOLDER/gone.whl", "archive_info": {}}', "/path/to/metapl"),
        ('{"url": "https://example.com/metapl.whl", "archive_info": {}}', "/path/to/metapl"),
        ("{}", "/path/to/metapl"),
        (None, "/path/to/metapl"),
    ],
)
def test_the_way_out_of_a_missing_package_is_where_metapl_came_from(
    note: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if note is None else note.replace("FOLDER", str(tmp_path))

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    assert origin() == expected.replace("FOLDER", str(tmp_path))


def test_without_the_extra_of_the_command_a_line_names_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_APPS], capture_output=True, text=True, check=True
    )
    command = "the command: expected the package tyro"
    end = f"which `pip install '{origin()}[apps]'` installs.\n"
    assert done.stderr == f"metapl: {command}, {end}"
    missing = [
        "metapl.pictures: expected the package einops",
        # Stored labels are of pictures in files, and so is what networks take.
        "metapl.labels: expected the package einops",
        "metapl.networks: expected the package einops",
    ]
    lines = done.stdout.splitlines()
    for line, start in zip(lines, missing, strict=True):
        assert line.startswith(start)
        assert f"{line}\n".endswith(end)


def test_a_package_that_a_command_imports_late_is_named_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    refused = metapl("train", "digits", "--steps", "2", "--out", tmp_path / "run", code=2)
    assert refused.stderr == (
        "metapl: the command train: expected the package scikit-learn, which "
        f"`pip install '{origin()}[apps]'` installs.\n"
    )


BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, "
    "sys.argv[1])(sys.argv[2]))"
)


def built(kind: str, source: Path, out: Path) -> Path:
    """Return what the build backend makes of a source tree, as ``pip`` and ``build`` call it."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    return (
        out
        / subprocess.run(
            command, cwd=source, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()[-1]
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the source distribution of a copy of the checkout, and from it alone the wheel."""
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
    assert "metapl = metapl.__main__:main\n" in commands
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


LIBRARY = """
import sys, torch, metapl

x, y, u = torch.randn(12, 6), torch.arange(12) % 3, torch.randn(24, 6)
networks = [metapl.models.mlp([6, 8, 3]) for _ in range(2)]
trainer = metapl.BilevelTrainer(*networks, mode="forward")
result = trainer.fit((x, y), u, steps=4, batch_size=4, validation=(x, y), out="fit", save_every=2)
print(f"{result.validation_accuracy:.2f}")
metapl.ablate(trainer, (x, y), u, ["forward", "none"])
loaded = {name.partition(".")[0] for name in sys.modules}
assert loaded.isdisjoint({"tyro", "sklearn", "torchvision", "matplotlib", "PIL"}), loaded
"""


@pytest.mark.long
def test_the_wheel_installs_into_an_empty_environment_and_runs(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    """The core alone, then the command. pip takes packages from where it always does.

    Minutes, and gigabytes, where torch is the one for CUDA; the environment is removed at the end.
    """
    _, wheel = distributions
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder) / "bin" / "python"
        command = python.with_name("metapl")
        pip = (python, "-m", "pip", "install", "--quiet")

        run(*pip, wheel)
        installed = {
            row["name"] for row in json.loads(run(*pip[:3], "list", "--format=json").stdout)
        }
        assert declared(PROJECT["dependencies"]) <= installed
        assert installed.isdisjoint(declared(EXTRAS["apps"]) | {"torchopt"})
        fitted = run(python, "-c", LIBRARY)
        assert 0 <= float(fitted.stdout) <= 1
        # The only thing that a fit does without, and says.
        assert f"tensorboard, which `pip install '{wheel}[apps]'` installs" in fitted.stderr
        assert f"pip install '{wheel}[apps]'" in run(command, "--version", code=2).stderr

        run(*pip, f"metapl[apps] @ {wheel.as_uri()}")
        assert run(command, "--version").stdout == f"metapl {PROJECT['version']}\n"
        run(command, "train", "digits", "--steps", "2", "--out", "run")
        assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] > 0
        labels = run(command, "label", "run", "digits", "--out", "labels", code=2)
        assert f"pip install '{wheel}[labels]'" in labels.stderr


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    for line in (
        "cff-version: 1.2.0",
        f"version: {PROJECT['version']}",
        f"license: {PROJECT['license']}",
    ):
        assert f"{line}\n" in text


def test_the_page_on_installing_names_the_wheel_of_this_version() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    wheels = set(re.findall(r"metapl-[\w.]+-py3-none-any\.whl", text))
    assert wheels == {f"metapl-{PROJECT['version']}-py3-none-any.whl"}


def test_python_runs_the_package_as_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m metapl``, with its exit code: once in a process of its own, then in this one."""
    ended = subprocess.run(
        [sys.executable, "-m", "metapl", "trian"], capture_output=True, text=True, check=False
    )
    answers = {"trian": (ended.returncode, ended.stdout.strip(), ended.stderr.strip())}
    for words in ("--version", "train"):
        monkeypatch.setattr(sys, "argv", ["metapl", words])
        with pytest.raises(SystemExit) as ending:
            runpy.run_module("metapl", run_name="__main__", alter_sys=True)
        printed, said = capsys.readouterr()
        answers[words] = (ending.value.code, printed.strip(), said.strip())
    assert answers["--version"] == (0, f"metapl {PROJECT['version']}", "")
    for words, expected in (("trian", "train, noisy-student"), ("train", "images or digits")):
        exit_code, printed, said = answers[words]
        assert (exit_code, printed) == (2, "")
        assert expected in said
