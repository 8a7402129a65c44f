"""What is loaded is what was written, or is refused in one clear line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import batches, bilevel, single

import metapl
from metapl.errors import MetaplError
from metapl.runs import checkpoint
from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.rows import Metrics

# ---------------------------------------------------------------------------------------------------------------- rows


DAMAGES = {
    "half a line": b'{"phase": "fit", "st\n',
    "another thing": b"[1, 2]\n",
    "no step": b'{"phase": "fit", "loss": 1.0}\n',
    "a text for a number": b'{"phase": "fit", "step": "3", "loss": 1.0}\n',
    "a text for a loss": b'{"phase": "fit", "step": 3, "loss": "1.0"}\n',
    "no text": b"\xff\xfe\x00{}\n",
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_row_is_cut_and_said_and_the_run_goes_on(name: str, tmp_path: Path) -> None:
    labeled, _ = batches(5)
    for steps in (6, 9):
        spoken: list[str] = []
        if steps == 9:
            lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:2], DAMAGES[name], *lines[3:]]))
        single().fit(
            labeled,
            steps=steps,
            out=str(tmp_path),
            resume=steps == 9,
            schedule="constant",
            log_every=1,
            say=spoken.append,
            progress=False,
        )
    assert spoken[-1] == f"{tmp_path / 'metrics.jsonl'}: lines that are damaged are left out: 3"
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.damaged() == [1]
    assert [row["step"] for row in metrics.rows()] == [1, 2, *range(4, 10)]


def test_a_run_that_was_killed_after_damaged_rows_were_cut_goes_on(tmp_path: Path) -> None:
    file, spoken = tmp_path / "metrics.jsonl", list[str]()
    how: dict[str, Any] = {"schedule": "constant", "log_every": 1, "progress": False, "say": spoken.append}
    single().fit(batches(5)[0], steps=4, out=tmp_path, **how)
    file.write_bytes(b"x" + file.read_bytes())
    Metrics(file).cut("fit", 4)
    single().fit(batches(5)[0], steps=6, out=tmp_path, resume=True, **how)
    assert [row["step"] for row in Metrics(file).rows()] == [2, 3, 4, 5, 6]
    assert spoken[-1].endswith("lines that are damaged are left out: 1")


def test_somebody_elses_rows_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(MetaplError, match=r"metrics\.jsonl is not a run's"):
        single().fit(batches(5)[0], steps=2, out=str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_rows_of_another_run_are_noticed_when_a_run_goes_on_and_when_it_is_finished(tmp_path: Path) -> None:
    def fit(name: str, steps: int, resume: bool, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        how: dict[str, Any] = {"schedule": "constant", "log_every": 1, "save_every": 2, "progress": False}
        return single().fit(
            batches(5)[0][seed:], steps=steps, out=tmp_path / name, resume=resume, say=lambda _: None, **how
        )

    for seed, name in enumerate(("one", "other")):
        fit(name, 4, False, seed)
    rows = (tmp_path / "one/metrics.jsonl").read_bytes()
    (tmp_path / "one/metrics.jsonl").write_bytes(other := (tmp_path / "other/metrics.jsonl").read_bytes())
    assert other != rows
    for steps in (4, 6):
        with pytest.raises(MetaplError, match=r"one/metrics\.jsonl is of another run than .*step-00000004\.ckpt"):
            fit("one", steps, True)
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == other
    (tmp_path / "one/metrics.jsonl").unlink()
    assert len(fit("one", 4, True).history) == 0
    (tmp_path / "one/metrics.jsonl").write_bytes(rows)
    assert len(fit("one", 6, True).history) == 6


# ----------------------------------------------------------------------------------------------------- JSON of a run


def replaced(content: Any, keys: tuple[Any, ...], value: Any) -> Any:
    if not keys:
        return value
    copy = content.copy()
    copy[keys[0]] = replaced(content[keys[0]], keys[1:], value)
    return copy


# ----------------------------------------------------------------------------------------- checkpoints sealed again


def spoiled(state: dict[str, Any], keys: tuple[Any, ...], value: Any) -> dict[str, Any]:
    return replaced(state, keys, value)  # type: ignore[no-any-return]


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "step as text": lambda state: spoiled(state, ("step",), "4"),
    "step below 0": lambda state: spoiled(state, ("step",), -1),
    "step beyond the end": lambda state: spoiled(state, ("step",), 10**9),
    "options of another kind": lambda state: spoiled(state, ("options",), []),
    "no trainer": lambda state: spoiled(state, ("trainer",), {}),
    "trainer of another kind": lambda state: spoiled(state, ("trainer",), 3),
    "weights of another shape": lambda state: spoiled(state, ("trainer", "student", "0.weight"), torch.ones(2)),
    "weights without a name": lambda state: spoiled(state, ("trainer", "student"), {}),
    "weights that are numbers": lambda state: spoiled(state, ("trainer", "student", "0.weight"), 1.0),
    "an optimizer of another kind": lambda state: spoiled(state, ("trainer", "outer"), {"state": {}}),
    "momentum of another shape": lambda state: spoiled(
        state, ("trainer", "outer", "state", 0, "momentum_buffer"), torch.ones(1, 2, 3)
    ),
    "accuracies of another kind": lambda state: spoiled(state, ("seen",), {"x": "y"}),
    "a best student of another kind": lambda state: spoiled(state, ("best",), None),
    "the best of another network": lambda state: spoiled(state, ("best", "weights"), {"x": torch.ones(1)}),
    "feeds of another kind": lambda state: spoiled(state, ("feeds", "labeled"), {"kind": "sequence", "position": -1}),
    "random numbers of another kind": lambda state: spoiled(state, ("rng", "torch"), torch.ones(3)),
    "an end of another kind": lambda state: spoiled(state, ("ended",), ("x",)),
    "callbacks of another kind": lambda state: spoiled(state, ("callbacks",), [1, 2]),
}


def fitted(out: Path, resume: bool, trainer: metapl.BilevelTrainer) -> None:
    labeled, unlabeled = batches(5)
    how: dict[str, Any] = {"steps": 8, "save_every": 4, "progress": False, "say": lambda _: None}
    trainer.fit(labeled, unlabeled, out=str(out), resume=resume, **how)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit whose newest checkpoint is of its fourth step."""
    out = tmp_path_factory.mktemp("run")
    fitted(out, False, bilevel())
    CheckpointFolder(out / "checkpoints/fit").paths()[0].unlink()
    return out


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_was_sealed_with_wrong_values_is_refused_in_one_line(
    name: str, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (older,) = CheckpointFolder(run / "checkpoints/fit").paths()
    state = checkpoint.load(older)
    checkpoint.save(older, WRONG[name](state))
    trainer = bilevel()
    before = {key: value.clone() for key, value in trainer.student.state_dict().items()}
    with pytest.raises(
        MetaplError, match=r"step-00000004\.ckpt|the checkpoint has the states|this is no state for this BilevelTrainer"
    ) as told:
        fitted(run, True, trainer)
    assert "\n" not in str(told.value)
    if name != "momentum of another shape":
        assert all(torch.equal(before[key], value) for key, value in trainer.student.state_dict().items())
    checkpoint.save(older, state)
    fitted(run, True, bilevel())
