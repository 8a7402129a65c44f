"""The code of docs/loggers.md runs as it stands, and each package has the rows of the fit.

Nothing leaves this machine: each package runs in its offline mode, in a temporary folder.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from torch import nn
from wandb_files import history_of

import metapl

PAGE = Path(__file__).parents[2] / "docs" / "loggers.md"
STEPS = [1, 2, 3, 4]
Rows = list[tuple[int, float]]

# Those of other libraries.
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning"),
    pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not installed"),
]


def of_wandb(names: dict[str, Any], folder: Path) -> Rows:
    """Return the losses in the file of an offline run, each with its step."""
    return [(step, values["inner_loss"]) for step, values in history_of(names["run"])]


def of_mlflow(names: dict[str, Any], folder: Path) -> Rows:
    """Return the losses in the data base of MLflow."""
    import mlflow

    assert (folder / "mlflow.db").is_file()
    run = names["run"].info.run_id
    client = mlflow.MlflowClient()
    assert client.get_run(run).data.params == {"mode": "forward"}
    return [(row.step, row.value) for row in client.get_metric_history(run, "inner_loss")]


def of_aim(names: dict[str, Any], folder: Path) -> Rows:
    """Return the losses in the repository of Aim."""
    import aim

    assert (folder / ".aim").is_dir()
    hash_of_run = names["run"].hash
    (stored,) = (path.name for path in (folder / ".aim" / "meta" / "chunks").iterdir())
    assert stored == hash_of_run
    run = aim.Run(hash_of_run, repo=str(folder))
    (metric,) = (metric for metric in run.metrics() if metric.name == "inner_loss")
    table = metric.dataframe().sort_values("step")
    return [*zip(table["step"].tolist(), table["value"].tolist(), strict=True)]


def of_lightning(names: dict[str, Any], folder: Path) -> Rows:
    """Return the losses in the file of Lightning's logger."""
    file = folder / "logs" / "digits" / "version_0" / "metrics.csv"
    with file.open() as text:
        return [(int(row["step"]), float(row["inner_loss"])) for row in csv.DictReader(text)]


READERS: dict[str, Callable[[dict[str, Any], Path], Rows]] = {
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "aim": of_aim,
    "lightning": of_lightning,
}


def block_of(package: str) -> str:
    """Return the first block of the page that imports a package."""
    blocks = pages.QUOTED.findall(PAGE.read_text())
    for block in blocks:
        if block.startswith((f"import {package}\n", f"from {package}.")):
            return str(block)
    raise AssertionError(f"no block of docs/loggers.md imports {package}")


def names_of_the_page() -> dict[str, Any]:
    """Return a trainer and its data by the names that the page has."""
    torch.manual_seed(0)
    teacher = nn.Linear(4, 3)
    student = nn.Linear(4, 3)
    trainer = metapl.BilevelTrainer(teacher, student, "forward", verify=False)
    labeled = [(torch.randn(6, 4), torch.arange(6) % 3)]
    unlabeled = [torch.randn(8, 4)]
    return {"trainer": trainer, "labeled": labeled, "unlabeled": unlabeled}


@pytest.mark.long
@pytest.mark.parametrize("package", READERS)
def test_the_code_of_the_page_gives_each_package_the_rows(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = names_of_the_page()
    expected: Rows = []
    fit = names["trainer"].fit

    def recorded(*data: Any, callbacks: list[Any], **options: Any) -> Any:
        def remember(step: int, row: Any, trainer: Any) -> None:
            expected.append((step, row["inner_loss"]))

        return fit(*data, callbacks=[remember, *callbacks], **options)

    names["trainer"].fit = recorded
    exec(compile(block_of(package), str(PAGE), "exec"), names)
    logged = READERS[package](names, tmp_path)
    assert [step for step, _ in expected] == STEPS
    assert [step for step, _ in logged] == STEPS
    for (_, value), (_, loss) in zip(logged, expected, strict=True):
        assert value == pytest.approx(loss, rel=1e-6)
