"""``examples/tensor_parallel.py``: processes that cut products end on the numbers of one."""

import math
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tensor_parallel
import torch
from safetensors.torch import load_file

from metapl.networks import create

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]


def test_the_plan_cuts_two_thirds_of_the_weights_of_vit_1b_14() -> None:
    with torch.device("meta"):
        network = create("vit_1b_14", 1000)
    cut = 0
    for pattern in tensor_parallel.PLAN:
        layers = [m for name, m in network.named_modules() if fnmatch(name, pattern)]
        assert len(layers) == 24
        cut += sum(math.prod(layer.weight.shape) for layer in layers)
    weights = sum(p.numel() for p in network.parameters())
    assert 0.65 < cut / weights < 0.68


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["--mesh.tensor 2", "--mesh.tensor 2 --mesh.shard 2"])
def test_processes_end_on_the_numbers_of_one(mesh: str, tmp_path: Path) -> None:
    weights = tensor_parallel.train(tensor_parallel.Settings())
    first = tensor_parallel.train(tensor_parallel.Settings(steps=0))
    assert not any(torch.equal(weights[name], first[name]) for name in weights if "mlp" in name)
    out = tmp_path / "student.safetensors"
    processes = 2 ** mesh.count("--mesh")
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    words = ["examples/tensor_parallel.py", *mesh.split(), "--out", str(out)]
    done = subprocess.run(
        [*launcher, "--standalone", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-10)
