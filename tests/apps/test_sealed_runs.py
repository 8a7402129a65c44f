"""What is loaded is what was written, or is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, reseal, result, said
from tiny_runs import TINY

from metapl.apps.commands import main
from metapl.apps.experiments.folder import WEIGHTS, RunFolder, stored_result
from metapl.apps.machine.misfit import misfit
from metapl.apps.recipes.base import from_dict
from metapl.apps.recipes.settings import Optimizer
from metapl.errors import MetaplError

SEALED = tuple(WEIGHTS.values())


# ------------------------------------------------------------------------------------------------- weights and pictures


def test_result_json_has_the_checksums_of_all_weights_and_pictures(tiny: Path) -> None:
    hashes = stored_result(RunFolder(tiny))["sha256"]
    assert result(tiny)["sha256"].keys() == {*hashes, "result.json"}
    names = (*SEALED, "data.json", "metrics.jsonl")
    assert hashes == {name: hashlib.sha256((tiny / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize("name", SEALED)
def test_every_flipped_bit_of_weights_and_pictures_is_noticed(
    name: str, run: Path, digit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, draw = (run / name).read_bytes(), random.Random(name)
    network = {file: network for network, file in WEIGHTS.items()}[name]
    commands: list[tuple[str | Path, ...]] = [("predict", run, digit, "--network", network)]
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
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    said(capsys, *TINY, "--seed", "1", "--out", other)
    shutil.copy(other / "student.safetensors", run / "student.safetensors")
    assert "of another run" in refused(capsys, "evaluate", run, "--network", "student")


def test_runs_from_before_checksums_are_loaded_without_them(
    run: Path, digit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = result(run)
    for name in ("sha256", "validation_chance"):
        del content[name]
    (run / "result.json").write_text(json.dumps(content))
    said(capsys, "predict", run, digit)
    assert "is finished already" in said(capsys, *TINY, "--out", run, "--resume")
    said(capsys, "evaluate", run, "--network", "finetuned")


def test_outputs_that_are_not_finite_are_an_error(
    run: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


# ----------------------------------------------------------------------------------------------------- JSON of a run


def test_json_of_a_wrong_shape_ends_in_one_line(run: Path, digit: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    with pytest.raises(MetaplError, match=r"Optimizer\.lr is '0\.1'; expected a number"):
        from_dict(Optimizer, {"lr": "0.1"})


# ----------------------------------------------------------------------------------------- checkpoints sealed again


def spoiled(state: dict[str, Any], keys: tuple[Any, ...], value: Any) -> dict[str, Any]:
    return replaced(state, keys, value)  # type: ignore[no-any-return]
