"""What is loaded is what was written, or is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, reseal, result, said
from fits import batches, bilevel, single
from tiny_runs import TINY, digit, run, tiny  # noqa: F401 - fixtures

from metapl.cli import main
from metapl.errors import MetaplError
from metapl.recipes.base import Optimizer, from_dict
from metapl.runs import checkpoint
from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.folder import WEIGHTS
from metapl.runs.metrics import Metrics
from metapl.typed import misfit

SEALED = (*WEIGHTS.values(), "pictures.safetensors")


# ------------------------------------------------------------------------------------------------- weights and pictures


def test_result_json_has_the_checksums_of_all_weights_and_pictures(tiny: Path) -> None:  # noqa: F811
    hashes = result(tiny)["sha256"]
    assert hashes == {name: hashlib.sha256((tiny / name).read_bytes()).hexdigest() for name in SEALED}


@pytest.mark.parametrize("name", SEALED)
def test_every_flipped_bit_of_weights_and_pictures_is_noticed(
    name: str,
    run: Path,  # noqa: F811
    digit: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, draw = (run / name).read_bytes(), random.Random(name)
    network = {file: network for network, file in WEIGHTS.items()}.get(name)
    commands: list[tuple[str | Path, ...]] = [("finetune", run)]
    if network is not None:
        commands = [("predict", run, digit, "--network", network)]
        commands += [("evaluate", run, "--network", network)] if network == "student" else []
    for position in [0, 7, 9, len(content) - 1, *(draw.randrange(len(content)) for _ in range(8))]:
        spoiled = bytearray(content)
        spoiled[position] ^= 1 << draw.randrange(8)
        (run / name).write_bytes(spoiled)
        capsys.readouterr()
        for command in commands:
            assert main([*map(str, command)]) == 2
            words = capsys.readouterr().err.splitlines()[-1]
            assert f"{run / name} is damaged or of another run: its SHA-256" in words
    assert (run / name).read_bytes() != content


def test_the_weights_of_another_run_are_not_taken_for_its_own(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    said(capsys, *TINY, "--seed", "1", "--out", other)
    shutil.copy(other / "student.safetensors", run / "student.safetensors")
    assert "of another run" in refused(capsys, "evaluate", run, "--network", "student")


def test_runs_from_before_checksums_are_loaded_without_them(
    run: Path,  # noqa: F811
    digit: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = result(run)
    for name in ("sha256", "validation_chance"):
        del content[name]
    (run / "result.json").write_text(json.dumps(content))
    said(capsys, "predict", run, digit)
    assert "is finished already" in said(capsys, *TINY, "--out", run, "--resume")
    said(capsys, "finetune", run)
    assert result(run)["sha256"].keys() == {"finetuned_student.safetensors"}
    said(capsys, "evaluate", run, "--network", "finetuned")


def test_outputs_that_are_not_finite_are_an_error(
    run: Path,  # noqa: F811
    digit: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    for bad in (math.nan, math.inf):
        for name in WEIGHTS.values():
            weights = load_file(run / name)
            save_file({key: torch.full_like(value, bad) for key, value in weights.items()}, run / name)
        reseal(run)
        assert "not finite" in refused(capsys, "predict", run, digit, "--out", tmp_path / "out.csv")
        assert "not finite" in refused(capsys, "evaluate", run)
        assert not (tmp_path / "out.csv").exists()


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
            (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:2], DAMAGES[name], *lines[2:]]))
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
    assert metrics.damaged() == []
    assert [row["step"] for row in metrics.rows()] == [*range(1, 10)]


def test_somebody_elses_rows_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(MetaplError, match=r"metrics\.jsonl is not a run's"):
        single().fit(batches(5)[0], steps=2, out=str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


# ----------------------------------------------------------------------------------------------------- JSON of a run


def test_json_of_a_wrong_shape_ends_in_one_line(
    run: Path,  # noqa: F811
    digit: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every value of recipe.json and result.json, replaced by values of other kinds."""
    commands = [("evaluate", run), ("compare", run, run), ("predict", run, digit)]
    for name in ("recipe.json", "result.json", "data.json"):
        text = (run / name).read_text()
        content, draw, cases = json.loads(text), random.Random(name), 0
        for keys in [(), *paths(content)]:
            for wrong in draw.sample([[], {}, "x", None, -1, 0.5, True, [[]], 10**30], 2):
                (run / name).write_text(json.dumps(replaced(content, keys, wrong)))
                command = commands[cases % len(commands)]
                cases += 1
                capsys.readouterr()
                # What is not looked at, such as the versions, or still makes sense, is taken.
                code = main([*map(str, command)])
                words = capsys.readouterr().err
                assert code in (0, 2), (name, keys, wrong)
                assert "Traceback" not in words
                if code == 2:
                    assert len([line for line in words.splitlines() if line.startswith("metapl: ")]) == 1, words
        assert cases > 8
        (run / name).write_text(text)


def paths(content: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values in nested content stand; of long lists, the first."""
    if isinstance(content, dict):
        entries = [*content.items()]
    elif isinstance(content, list):
        entries = [*enumerate(content[:1])]
    else:
        return []
    return [path for key, value in entries for path in [(*above, key), *paths(value, (*above, key))]]


def replaced(content: Any, keys: tuple[Any, ...], value: Any) -> Any:
    if not keys:
        return value
    copy = content.copy()
    copy[keys[0]] = replaced(content[keys[0]], keys[1:], value)
    return copy


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (math.nan, float, False),
        (math.inf, float | None, False),
        ("1", int, False),
        (None, int | None, True),
        ([1, 2], tuple[int, ...], True),
        ([1, "2"], tuple[int, ...], False),
        ([1, 2, 3], tuple[int, int], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": []}, dict[str, int], False),
        ({"lr": 0.1}, Optimizer, True),
        ({"lr": "0.1"}, Optimizer, False),
        ({"algorithm": "sgdd"}, Optimizer, False),
        ([], Optimizer, False),
    ],
)
def test_values_and_types(value: Any, hint: Any, fits: bool) -> None:
    assert (misfit(value, hint) is None) == fits


def test_a_recipe_of_other_types_is_refused_by_the_name_of_the_field() -> None:
    with pytest.raises(MetaplError, match=r"Optimizer\.lr is '0\.1'; expected float"):
        from_dict(Optimizer, {"lr": "0.1"})


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


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_was_sealed_with_wrong_values_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    labeled, unlabeled = batches(5)
    how: dict[str, Any] = {"out": str(tmp_path), "steps": 8, "save_every": 4, "progress": False, "say": lambda _: None}
    bilevel().fit(labeled, unlabeled, **how)
    newest, older = CheckpointFolder(tmp_path / "checkpoints/fit").paths()
    newest.unlink()
    state = checkpoint.load(older)
    checkpoint.save(older, WRONG[name](state))
    trainer = bilevel()
    before = {key: value.clone() for key, value in trainer.student.state_dict().items()}
    with pytest.raises(
        MetaplError, match=r"step-00000004\.ckpt|the checkpoint has the states|this is no state for this BilevelTrainer"
    ) as told:
        trainer.fit(labeled, unlabeled, resume=True, **how)
    assert "\n" not in str(told.value)
    if name != "momentum of another shape":
        assert all(torch.equal(before[key], value) for key, value in trainer.student.state_dict().items())
    checkpoint.save(older, state)
    bilevel().fit(labeled, unlabeled, resume=True, **how)
