"""Runs of every kind, stopped in each of their phases one after the other, end bit for bit as one that was not.

Ctrl-C comes in this process; kills, signals to processes and full disks are in test_resume.py and test_image_resume.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_runs import NOISY_STUDENT, REDUCED, built_once, trained

from metapl.apps.commands import main
from metapl.apps.experiments import rounds
from metapl.apps.labels import LabelWriter
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer

FINETUNED = (*NOISY_STUDENT, "--training", "pretrain_finetune", "--finetune-steps", "4", "--dropout", "0.1")


class Stop(NamedTuple):
    """The call in the middle of which Ctrl-C comes, counted from where the run goes on."""

    owner: Any
    name: str
    call: int


KINDS: dict[str, tuple[tuple[str, ...], list[Stop]]] = {
    "noisy student": (
        NOISY_STUDENT,
        [
            Stop(LossTrainer, "step", 3),  # while the first teacher is trained
            Stop(LabelWriter, "add", 2),  # while its labels are stored
            Stop(LabelWriter, "_describe", 4),  # while the last of them are
            Stop(rounds, "select", 1),  # between labels and selection
            Stop(LabelWriter, "add_table", 1),  # while the selection is written
            Stop(LossTrainer, "step", 3),  # while the first student is trained
            Stop(LabelWriter, "add", 3),  # while it labels
            Stop(LossTrainer, "step", 5),  # while the last student is trained
        ],
    ),
    # The third step of the first student's finetuning, after two trainings of six.
    "noisy student, finetuned": (FINETUNED, [Stop(LossTrainer, "step", 15)]),
    "reduced": (
        REDUCED,
        [
            Stop(LossTrainer, "step", 3),  # while the teacher is trained
            Stop(LabelWriter, "add", 2),  # while its labels are stored
            Stop(LabelWriter, "_describe", 4),  # while the last of them are
            Stop(BilevelTrainer, "step", 3),  # while the student is trained
            Stop(LossTrainer, "step", 2),  # while it is finetuned
        ],
    ),
}


def stops(patch: pytest.MonkeyPatch, stop: Stop) -> None:
    real, calls = getattr(stop.owner, stop.name), []

    def stopped(*given: Any, **named: Any) -> Any:
        calls.append(stop)
        if len(calls) == stop.call:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **named)

    patch.setattr(stop.owner, stop.name, stopped)


def contents(run: Path) -> dict[str, bytes]:
    """What two runs must have in common to the byte."""
    kinds = (".safetensors", ".parquet", ".jsonl")
    found = (path for path in sorted(run.rglob("*")) if path.suffix in kinds or path.name == "result.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_in_any_phase_ends_as_one_that_was_not(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (command, points), run = KINDS[kind], tmp_path / "run"
    whole = built_once(tmp_path_factory, kind, lambda out: trained(*command, "--out", str(out)))
    given = [*command, "--out", str(run)]
    for stop in points:
        with pytest.MonkeyPatch.context() as patch:
            stops(patch, stop)
            assert main(given) == 130, stop
        assert not (run / "result.json").exists()
        given = [*command, "--out", str(run), "--resume"]
    assert main(given) == 0
    assert contents(run) == contents(whole)
    assert min(path.stat().st_size for path in run.glob("*.png")) > 1000
