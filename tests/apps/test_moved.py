"""Old names lead to where things are now, with a warning; names that stay lead there without."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import metapl
from metapl import moved


@pytest.mark.parametrize(("old", "new"), moved.MODULES.items())
def test_an_old_package_is_the_new_one(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{old}.")]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module(new)
    spec = module.__spec__
    if old in moved.STAYING:
        found = importlib.import_module(old)
    else:
        with pytest.warns(DeprecationWarning, match=rf"{old} is now {new}; the old name goes with the next release"):
            found = importlib.import_module(old)
    assert found is module
    assert found.__spec__ is spec


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_in_an_old_package_is_loaded_once() -> None:
    assert importlib.import_module("metapl.recipes.digits") is importlib.import_module("metapl.apps.recipes.digits")
    assert importlib.import_module("metapl.labels.store") is importlib.import_module("metapl.apps.labels.store")
    with pytest.raises(ModuleNotFoundError, match=r"metapl\.apps\.recipes\.nothing"):
        importlib.import_module("metapl.recipes.nothing")


@pytest.mark.parametrize(("package", "new"), moved.NAMES.items())
def test_names_of_the_application_are_found_where_they_were(package: str, new: str) -> None:
    room, names = importlib.import_module(package), importlib.import_module(new).__all__
    for name in names:
        if package in moved.STAYING:
            assert getattr(room, name) is getattr(importlib.import_module(new), name)
        else:
            with pytest.warns(DeprecationWarning, match=rf"{package}\.{name} is now {new}\.{name}"):
                assert getattr(room, name) is getattr(importlib.import_module(new), name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = room.nothing


PROGRAM = """
import metapl
from metapl.labels import LabelStore
from metapl.data import LabeledBatches, load_digits_split
metapl.labels.LabelStore, metapl.data.Seeded, metapl.apps.recipes.Digits, metapl.distributed
from metapl.recipes import Digits
metapl.models.create, metapl.export.export, metapl.experiments
"""


def test_the_warning_names_the_line_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    where = Path(metapl.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, file], cwd=where, env={"PYTHONPATH": str(where)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(": ") for line in done.stderr.splitlines() if "DeprecationWarning" in line]
    assert [(at, text.split()[1]) for at, _, text in lines] == [
        (f"{file}:6", "metapl.recipes"),
        (f"{file}:7", "metapl.models.create"),
        (f"{file}:7", "metapl.export"),
        (f"{file}:7", "metapl.experiments"),
    ]
