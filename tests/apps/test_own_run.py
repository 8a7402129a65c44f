"""A run folder says what its networks are.

The command reads that of a script whose network it does not know.
"""

import json
import runpy
from pathlib import Path

import pytest
from command import metapl, rows
from tiny_runs import COLORS

from metapl.labels.store import LabelStore

SCRIPT = Path(__file__).parents[2] / "examples" / "own_run.py"
FACTORY = ("--factory", f"{SCRIPT}:network")


@pytest.fixture(name="made", scope="module")
def _made(three_colors: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    out, script = tmp_path_factory.mktemp("own") / "run", runpy.run_path(str(SCRIPT))
    places = {part: three_colors / part for part in ("labeled", "unlabeled", "test")}
    return three_colors, out, script["train"](**places, out=out, steps=12)


def test_predict_label_evaluate_and_runs_read_it(
    made: tuple[Path, Path, float], tmp_path: Path
) -> None:
    root, folder, accuracy = made
    predicted = rows(metapl("predict", folder, root / "test", *FACTORY).stdout)
    right = [row["class"] == Path(row["file"]).parent.name for row in predicted]
    assert len(predicted) == 18
    assert sum(right) / 18 == pytest.approx(accuracy)

    metapl("label", folder, root / "unlabeled", "--out", tmp_path / "labels", *FACTORY)
    store = LabelStore(tmp_path / "labels")
    assert (len(store), store.classes) == (36, COLORS)
    # A selection finds the pictures from any folder.
    assert store.provenance["pictures"] == str((root / "unlabeled").resolve())

    assert f"{accuracy:.2%} of 18, as in result.json" in metapl("evaluate", folder, *FACTORY).stdout
    (entry,) = json.loads(metapl("runs", folder, "--json").stdout)
    assert (entry["state"], entry["method"], entry["steps"], entry["n"]) == (
        "finished",
        "own_run",
        12,
        18,
    )
    assert entry["accuracy"] == pytest.approx(accuracy)
    assert entry["data"].endswith("labeled")


def test_without_its_function_and_with_another_it_is_refused(
    made: tuple[Path, Path, float], tmp_path: Path
) -> None:
    root, folder, _ = made
    other = tmp_path / "other.py"
    other.write_text("from torch import nn\n\ndef network():\n    return nn.Linear(3, 3)\n")
    for factory, expected in (
        (None, "--factory"),
        (f"{other}:network", "does not fit"),
        (f"{other}:none", "no function"),
        (f"{tmp_path}/none.py:network", "no file"),
    ):
        told = metapl(
            "predict", folder, root / "test", *(("--factory", factory) if factory else ()), code=2
        )
        assert told.stdout == ""
        assert expected in told.stderr
