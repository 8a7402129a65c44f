"""``torchrun examples/protocols.py``.

Four processes end on the numbers of one, to 1e-10 in float64.
"""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import picture_sets
import protocols
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from metapl.distributed import Mesh
from metapl.processes import joined

pytestmark = [pytest.mark.docs, pytest.mark.long]

NUMBER = 4
WORDS = [
    "--data",
    "fashion",
    "--image-size",
    "28",
    "--network",
    "pooled_cnn",
    "--device",
    "cpu",
    "--num-workers",
    "0",
]
WORDS += [
    "--labels-per-class",
    "2",
    "--validation",
    "10",
    "--labeled-batch",
    "8",
    "--unlabeled-batch",
    "8",
]
WORDS += [
    "--dropout",
    "0",
    "--teacher-dropout",
    "0",
    "--steps",
    "5",
    "--wait",
    "1",
    "--warmup",
    "1",
    "--finetune-steps",
    "2",
]
WORDS += [
    "--finetune-batch",
    "8",
    "--finetune-lr",
    "0.01",
    "--student-lr",
    "0.05",
    "--teacher-lr",
    "0.05",
]
WORDS += ["--log-every", "1", "--validate-every", "2", "--save-every", "2"]


def write_noise(root: Path) -> None:
    """Write 60 pictures to train on and 20 to test on, of random levels.

    Picture i has the label i mod 10.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        levels = rng.integers(0, 256, count * 28 * 28, dtype=np.uint8)
        labels = (np.arange(count, dtype=np.uint8) % 10).tobytes()
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(bytes(16) + levels.tobytes())
        )
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))


class Double(nn.Module):
    """A network in float64, of pictures in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pictures.double())


def trained(words: list[str]) -> dict[str, Any]:
    """Return what a process of the words' mesh returns, with networks in float64."""
    real = picture_sets.build_network
    protocols.build_network = lambda *arguments: Double(real(*arguments))
    protocols.deliver = lambda *_: None  # which has networks in float32
    try:
        c = protocols.settings_of(words)
        with joined(c.mesh, torch.device("cpu")) as processes:
            return protocols.train(c, processes)
    finally:
        protocols.build_network = real
        protocols.deliver = picture_sets.deliver


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(NUMBER, cases="test_protocol_ranks", joined=False)
    yield ranks
    ranks.close()


def same(run: Path, other: Path, limit: float) -> None:
    """Check that all recorded numbers and all weights are the same."""
    rows, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, other)
    )
    assert len(rows) == len(expected) > 5
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=limit, abs=limit)
            assert row[name] == value, name
    for name in ("teacher", "student", "finetuned"):
        found, weights = (load_file(folder / f"{name}.safetensors") for folder in (run, other))
        assert found.keys() == weights.keys()
        for key, t in weights.items():
            torch.testing.assert_close(found[key], t, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    ("row", "mesh"),
    [
        ("cifar10-4k", Mesh(replicate=4)),
        ("cifar10-4k-paper", Mesh(shard=4)),
        ("svhn-1k", Mesh(replicate=2, shard=2)),
        ("svhn-1k-paper", Mesh(replicate=4)),
    ],
    ids=["exact, replicas", "Algorithm 1, shards", "exact, both", "Algorithm 1, replicas"],
)
def test_four_processes_give_the_numbers_of_one(
    row: str, mesh: Mesh, four: Ranks, tmp_path: Path
) -> None:
    write_noise(tmp_path)
    words = [row, *WORDS, "--root", str(tmp_path)]
    alone = trained([*words, "--out", str(tmp_path / "one")])
    over = ["--mesh.replicate", str(mesh.replicate), "--mesh.shard", str(mesh.shard)]
    found = four.run("trained", words=[*words, *over, "--out", str(tmp_path / "four")])
    assert found == [found[0]] * NUMBER
    for name, value in alone.items():
        assert found[0][name] == (pytest.approx(value) if isinstance(value, float) else value)
    same(tmp_path / "four", tmp_path / "one", 1e-10)


def test_torchrun_starts_a_protocol(tmp_path: Path) -> None:
    """Two processes, as a user starts them: one result, and with --resume it is read."""
    write_noise(tmp_path)
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started += [
        protocols.__file__,
        "svhn-1k-paper",
        *WORDS,
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    refused = subprocess.run(started, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "2 processes were started for a mesh of 1" in refused.stderr
    assert not (tmp_path / "run").exists()
    started += ["--mesh.replicate", "2"]
    done = subprocess.run(started, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert json.loads(done.stdout) == result, "the first process alone shows it"
