"""A run folder says what its networks are; the command reads that of a script whose network it does not know."""

import csv
import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from command import metapl
from safetensors.torch import load_file
from test_goldens import COLORS, pictures

from metapl.apps.labels import LabelStore
from metapl.apps.run import EndedRun

SCRIPT = Path(__file__).parents[2] / "examples" / "own_run.py"
FACTORY = ("--factory", f"{SCRIPT}:network")


def run(*command: object) -> tuple[int, str, str]:
    done = metapl(*map(str, command), code=None)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    root = pictures(tmp_path_factory.mktemp("pictures"))
    script = runpy.run_path(str(SCRIPT))
    places = {part: root / part for part in ("labeled", "unlabeled", "test")}
    return root, root / "run", script["train"](**places, out=root / "run", steps=12)


def test_predict_and_label_read_it(made: tuple[Path, Path, float], tmp_path: Path) -> None:
    root, folder, accuracy = made
    code, out, _ = run("predict", folder, root / "test", *FACTORY)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    right = [row["class"] == Path(row["file"]).parent.name for row in rows]
    assert len(rows) == 18
    assert sum(right) / 18 == pytest.approx(accuracy)

    assert run("label", folder, root / "unlabeled", "--out", tmp_path / "labels", *FACTORY)[0] == 0
    store = LabelStore(tmp_path / "labels")
    assert (len(store), store.classes) == (36, COLORS)


def test_evaluate_measures_its_test_pictures_again(made: tuple[Path, Path, float]) -> None:
    code, out, _ = run("evaluate", made[1], *FACTORY)
    assert code == 0
    assert f"{made[2]:.2%} of 18, as in result.json" in out
    code, out, err = run("evaluate", made[1], "--test", made[0] / "labeled", "--json", *FACTORY)
    assert (code, json.loads(out)["n"]) == (0, 24)
    assert "24 test pictures" in err


def test_it_is_listed_with_what_it_reached(made: tuple[Path, Path, float]) -> None:
    code, out, _ = run("runs", made[1], "--json")
    (entry,) = json.loads(out)
    assert code == 0
    assert (entry["state"], entry["methods"], entry["steps"], entry["n"]) == ("finished", ["own_run"], 12, 18)
    assert entry["accuracy"] == pytest.approx(made[2])
    assert entry["data"].endswith("labeled")


@pytest.mark.long
def test_export_gives_its_program_and_weights(made: tuple[Path, Path, float], tmp_path: Path) -> None:
    root, folder, _ = made
    assert run("export", folder, "--out", tmp_path / "out", *FACTORY)[0] == 0
    run_of_it = EndedRun.load(folder)
    x = run_of_it.cards["student"].input.read(next((root / "test" / "red").iterdir()))
    network = run_of_it.network("student", FACTORY[1]).eval()
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(program(x[None]), network(x[None]), rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == network.state_dict().keys()


def test_without_its_function_and_with_another_it_is_refused(made: tuple[Path, Path, float], tmp_path: Path) -> None:
    root, folder, _ = made
    other = tmp_path / "other.py"
    other.write_text("from torch import nn\n\ndef network():\n    return nn.Linear(3, 3)\n")
    for words, expected in (
        ((), "--factory"),
        (("--factory", f"{other}:network"), "does not fit"),
        (("--factory", f"{other}:none"), "no function"),
        (("--factory", f"{tmp_path}/none.py:network"), "no file"),
    ):
        code, out, err = run("predict", folder, root / "test", *words)
        assert (code, out) == (2, "")
        assert expected in err
