"""``--patience``: a training ends as by ``fit(patience=)``, repeated and resumed to the bit."""

import json
import shutil
from pathlib import Path

import pytest
from command import metapl
from tiny_runs import TINY, color_folders, images_command

from metapl.apps.digits import Digits
from metapl.apps.settings import with_flags

# A network of four units that stands still: its second validation is no better than its first.
STILL = (*TINY, "--steps", "40", "--lr", "1e-9", "--method", "supervised", "--patience", "2")
WEIGHTS = "student.safetensors"


def steps_of(run: Path, phase: str) -> list[int]:
    """Return the steps of the rows of a phase."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["phase"] == phase]


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("still") / "run"
    said = metapl(*STILL, "--out", out).stdout
    assert "stopped after step 6 by patience: the last 2 validations have no better" in said
    return out


def test_it_ends_the_training_and_not_the_finetuning(still: Path) -> None:
    assert steps_of(still, "fit")[-1] == 6
    assert steps_of(still, "finetune")[-1] == 4


def test_it_is_in_the_recipe_which_repeats_the_run(still: Path, tmp_path: Path) -> None:
    fields = json.loads((still / "recipe.json").read_text())["recipe"]["fields"]
    assert fields["patience"] == 2
    repeated = tmp_path / "repeated"
    metapl("train", "digits", "--config", still / "recipe.json", "--out", repeated)
    assert (repeated / WEIGHTS).read_bytes() == (still / WEIGHTS).read_bytes()
    longer = tmp_path / "longer"
    metapl("train", "digits", "--config", still / "recipe.json", "--patience", "3", "--out", longer)
    assert steps_of(longer, "fit")[-1] == 8


def test_a_run_that_is_resumed_ends_at_the_same_step_with_the_same_bits(
    still: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(still, tmp_path / "run"))
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "finetune")
    # As if it had been killed after four steps, one validation before its end.
    for checkpoint in (run / "checkpoints" / "fit").iterdir():
        if "00000004" not in checkpoint.name:
            checkpoint.unlink()
    said = metapl(*STILL, "--out", run, "--resume").stdout
    assert "resumed at step 4" in said
    assert "stopped after step 6 by patience" in said
    assert (run / WEIGHTS).read_bytes() == (still / WEIGHTS).read_bytes()
    assert steps_of(run, "fit") == steps_of(still, "fit")


def test_it_changes_nothing_where_it_is_not_exhausted(tiny: Path, tmp_path: Path) -> None:
    metapl(*TINY, "--patience", "50", "--out", tmp_path / "run")
    for name in (WEIGHTS, "teacher.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tiny / name).read_bytes()


def test_it_needs_validation_examples(tmp_path: Path) -> None:
    folders = color_folders(tmp_path / "pictures", few=2)
    out = tmp_path / "run"
    words = images_command(folders, "--method", "supervised", "--out", str(out))
    refused = metapl(*words, "--patience", "2", code=2)
    assert "--patience 2 was given, and there are no validation examples" in refused.stderr
    # Nothing was said of a run before.
    assert not refused.stdout
    assert not out.exists()
    # The folder is free for the same line without it.
    metapl(*words)


def test_every_fit_but_that_which_finetunes_has_it() -> None:
    fitting = with_flags(Digits(), patience=3).fitting
    assert fitting.options()["patience"] == 3
    assert fitting.finetuning("cosine")["patience"] is None
    assert "patience" not in Digits().fitting.options()
