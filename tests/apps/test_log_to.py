"""``--log-to MODULE:FUNCTION`` gives a function of the user's every row that a run records."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from command import metapl, result
from test_bits import one_thread
from tiny_runs import NOISY_STUDENT, TINY
from wandb_files import history_of

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import json
import random

import torch


def log(step, metrics):
    torch.rand(3)
    random.random()
    with open("rows.jsonl", "a") as file:
        file.write(json.dumps([step, metrics]) + "\\n")


def fail(step, metrics):
    if step == 4:
        raise KeyError("no such project")
    log(step, metrics)


number = 3
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("own_log.py").write_text(MODULE)
    Path("broken_log.py").write_text("import no_such_package\n")
    yield
    for name in ("own_log", "broken_log"):
        sys.modules.pop(name, None)


def logged() -> list[tuple[int, dict[str, float]]]:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    return [(step, metrics) for step, metrics in rows]


def test_it_gets_every_row_of_all_phases_and_changes_nothing(tiny: Path) -> None:
    metapl(*TINY, "--out", "run", "--log-to", "own_log:log")
    weights = Path("run/finetuned_student.safetensors").read_bytes()
    assert weights == (tiny / "finetuned_student.safetensors").read_bytes()
    assert Path("run/recipe.json").read_text().count("log_to") == 0
    *rows, (last_step, accuracies) = logged()
    recorded = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(recorded) == 10
    offset = {"fit": 0, "finetune": 6}
    for (step, metrics), row in zip(rows, recorded, strict=True):
        phase = row.pop("phase")
        assert step == row.pop("step") + offset[phase]
        assert metrics == {f"{phase}/{name}": value for name, value in row.items()}
    assert last_step == 10
    assert accuracies["result/test_accuracy"] == result(Path("run"))["test_accuracy"]


def test_the_steps_of_all_rounds_are_counted_together() -> None:
    metapl(*NOISY_STUDENT, "--out", "run", "--log-to", "own_log:log")
    steps = [step for step, _ in logged()]
    assert steps == sorted(steps)
    phases = {name.partition("/")[0] for _, metrics in logged() for name in metrics}
    assert len(phases) > 3


def test_a_function_that_fails_ends_in_one_line_and_the_run_goes_on(tiny: Path) -> None:
    said = metapl(*TINY, "--out", "run", "--log-to", "own_log:fail", code=2)
    assert "--log-to own_log:fail failed in step 4: KeyError: 'no such project'" in said.stderr
    assert "(own_log.py, line 17)" in said.stderr
    assert said.stderr.count("\n") == 1
    metapl(*TINY, "--out", "run", "--resume", "--log-to", "own_log:log")
    weights = Path("run/student.safetensors").read_bytes()
    assert weights == (tiny / "student.safetensors").read_bytes()
    # The steps are counted from the beginning of the run.
    assert [step for step, _ in logged()] == [1, 2, 3, *range(3, 11), 10]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("own_log:lgo", "own_log has no 'lgo'; did you mean log?"),
        ("own_log:number", "is 3, which cannot be called; expected MODULE:FUNCTION"),
        ("own_log", "--log-to own_log: expected MODULE:FUNCTION"),
        (":log", "--log-to :log: expected MODULE:FUNCTION"),
        ("no_log:log", "no_log cannot be imported (ModuleNotFoundError: No module named 'no_log')"),
        ("broken_log:log", "cannot be imported (ModuleNotFoundError: No module named 'no_such"),
    ],
)
def test_a_wrong_name_ends_in_one_line_before_anything_is_trained(
    place: str, expected: str
) -> None:
    said = metapl(*TINY, "--out", "run", "--log-to", place, code=2)
    assert expected in said.stderr
    assert said.stderr.count("\n") == 1
    assert not Path("run").exists()


def test_a_comparison_takes_none() -> None:
    said = metapl(*TINY, "--compare", "--log-to", "own_log:log", code=2)
    assert "--log-to gets the rows of one run" in said.stderr


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::Warning")
def test_the_module_of_the_page_on_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    page = Path(__file__).parents[2] / "docs" / "loggers.md"
    if not page.is_file():
        pytest.skip("the documentation is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (module,) = (block for block in pages.QUOTED.findall(page.read_text()) if "def log(" in block)
    Path("own_log.py").write_text(module)
    metapl(*TINY, "--out", "run", "--log-to", "own_log:log")
    run = sys.modules["own_log"].run
    run.finish()
    rows = history_of(run)
    assert [step for step, _ in rows] == [*range(1, 11)]
    # The accuracies join the row of the last step.
    assert rows[-1][1]["result/test_accuracy"] == result(Path("run"))["test_accuracy"]
    assert "fit/inner_loss" in rows[0][1]
