"""``torchrun -m metapl.apps train noisy`` where products are cut: as in one process, resumed and compared too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_cases
import pytest
from ranks import Ranks
from test_mesh_command import as_if_killed, same, trained
from test_noisy_folders import suspects, write

SMALL = (
    "--precision float32 --labeled-batch 8 --clean-batch 4 --log-every 1 --steps 6 --warm-steps 2 --finetune-steps 2 "
    "--validate-every 3 --save-every 3 --student.algorithm sgd --student.lr 0.05"
)
NETWORKS = {
    "small": "--image-size 8 --network small_cnn",
    "tensor": "--image-size 16 --network timm:test_vit --mode difference",
}
PHASES = ("warm", "fit", "finetune")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "command_cases", joined=False)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    for seed, (name, each, wrong) in enumerate((("noisy", 8, 2), ("clean", 4, 0), ("test", 4, 0))):
        write(root / name, each, seed=1000 * seed, wrong=wrong)
    return root


def command(pictures: Path, cut: str, *more: str) -> list[str]:
    places = (("labeled", "noisy"), ("clean", "clean"), ("test", "test"))
    given = [f"--{flag}={pictures / name}" for flag, name in places]
    return ["train", "noisy", *given, *SMALL.split(), *NETWORKS[cut].split(), *more]


def accuracies(run: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((run / "result.json").read_text()).items() if "accuracy" in k}


def same_run(run: Path, other: Path, limit: float) -> None:
    # At the first steps all examples weigh alike, and what a step says to their sum is rounding.
    same(run, other, PHASES, limit, but="feedback_snr")
    assert accuracies(run)
    assert accuracies(run) == accuracies(other)
    found, expected = ({row.pop("file"): row for row in suspects(each)} for each in (run, other))
    assert found.keys() == expected.keys()
    for name, row in found.items():
        for column in row.keys() & {"p_given", "weight"}:
            assert float(row[column]) == pytest.approx(float(expected[name][column]), abs=2e-3)


LIMIT = 5e-3
"""Of rounding in float32, and of differences of outputs there."""


@pytest.mark.parametrize(
    "method",
    [
        "label_correction",
        *(pytest.param(m, marks=pytest.mark.long) for m in ("meta_weight_net", "example_weights", "noise_transition")),
    ],
)
def test_a_run_in_parts_is_that_of_one_process(two: Ranks, pictures: Path, tmp_path: Path, method: str) -> None:
    """Metrics, accuracies and suspects; and it goes on from a checkpoint bit for bit."""
    given = command(pictures, "tensor", "--method", method)
    trained(None, given, tmp_path / "alone")
    trained(two, [*given, "--mesh.tensor", "2"], tmp_path / "cut")
    same_run(tmp_path / "cut", tmp_path / "alone", LIMIT)
    left = as_if_killed(tmp_path / "cut", tmp_path / "again", step=3)
    (left / "suspects.csv").unlink()
    trained(two, [*given, "--mesh.tensor", "2", "--resume"], left)
    for name in ("student.safetensors", "finetuned_student.safetensors", "suspects.csv"):
        assert (left / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_corrector_is_sharded_as_the_student_is(two: Ranks, pictures: Path, tmp_path: Path) -> None:
    given = command(pictures, "small", "--method", "label_correction")
    trained(None, [*given, "--accumulate", "2"], tmp_path / "parts")  # batch norms see a share of the rows
    trained(two, [*given, "--mesh.shard", "2"], tmp_path / "shard")
    same_run(tmp_path / "shard", tmp_path / "parts", 1e-3)


@pytest.mark.parametrize(
    ("network", "flags", "text"),
    [
        ("small", "--mesh.tensor 2", "--mesh.tensor 2: small_cnn has no two linear layers"),
        ("tensor", "--mesh.tensor 2 --compile", "--compile runs in one process"),
        ("small", "--mesh.replicate 2 --labeled-batch 7", "labeled_batch of 7, which 2 ranks do not share equally"),
    ],
)
def test_what_does_not_fit_is_said_once_before_steps_are_measured(
    two: Ranks, pictures: Path, tmp_path: Path, network: str, flags: str, text: str
) -> None:
    given = command(pictures, network, *flags.split(), "--out", str(tmp_path / "run"))
    given[given.index("--steps") : given.index("--steps") + 2] = ["--minutes", "0.1"]
    (code, out, said), *others = two.run("command", arguments=given)
    assert code == 2
    assert text in " ".join(said.split())
    assert others == [(2, "", "")]
    assert "chosen" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_comparison_in_parts(two: Ranks, pictures: Path, tmp_path: Path) -> None:
    given = command(pictures, "tensor", "--compare", "--methods", "label_correction", "meta_weight_net", "plain")
    trained(None, [*given, "--jobs", "1"], tmp_path / "alone")
    trained(two, [*given, "--mesh.tensor", "2"], tmp_path / "cut")
    for method in ("label_correction", "meta_weight_net", "plain"):
        same_run(tmp_path / "cut" / method / "seed-0", tmp_path / "alone" / method / "seed-0", LIMIT)


@pytest.mark.long
def test_torchrun(pictures: Path, tmp_path: Path) -> None:
    """With validation pictures, of which the command chooses the best step."""
    given = [*command(pictures, "tensor"), "--out", str(tmp_path / "cut")]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "metapl.apps",
    ]
    done = subprocess.run(
        [*torchrun, *given, "--mesh.tensor", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert command_cases.command([*given[:-1], str(tmp_path / "alone")])[0] == 0
    same_run(tmp_path / "cut", tmp_path / "alone", LIMIT)
