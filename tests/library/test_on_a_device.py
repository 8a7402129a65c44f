"""The same numbers on a device: on CUDA where there is one, and on the CPU elsewhere, so that the tests are always run.

python -m pytest -m gpu    # these, and what can be tested on CUDA alone
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import metapl
from metapl.execution.numerics import full_float32

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = 4


class Attention(nn.Module):
    """A block of attention over the rows of a picture, by the kernel that the device prefers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.embed, self.qkv, self.head = nn.Linear(24, 32), nn.Linear(32, 96), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x.transpose(1, 2).flatten(2))).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        return self.head(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2).mean(1))


def convolutions(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2), nn.GELU()),
        *(nn.Dropout(dropout), nn.Flatten(), nn.Linear(32, CLASSES)),
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {"convolutions": convolutions, "attention": Attention}


def case(network: str, device: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> dict[str, Any]:
    """Teacher, student and batches, the same ones on each device and in each precision."""
    torch.manual_seed(0)
    teacher, student = NETWORKS[network](), NETWORKS[network](dropout)
    x, u = torch.randn(6, 3, 8, 8), torch.randn(8, 3, 8, 8)
    return {
        "teacher": teacher.to(device, dtype),
        "student": student.to(device, dtype),
        "labeled": (x.to(device, dtype), torch.arange(6, device=device) % CLASSES),
        "unlabeled": u.to(device, dtype),
    }


def gradient(given: dict[str, Any], mode: Any, ahead: int = 1) -> Tensor:
    """Of the teacher's weights, in one row in float64 on the CPU."""
    inner = torch.optim.SGD(given["student"].parameters(), lr=0.1, momentum=0.9)
    unlabeled = given["unlabeled"] if ahead == 1 else metapl.Lookahead([given["unlabeled"]] * ahead)
    found = metapl.hypergradient(**{**given, "unlabeled": unlabeled}, mode=mode, inner_optimizer=inner)
    return torch.cat([g.flatten() for g in found.grads.values()]).double().cpu()


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("mode", "ahead"), [("forward", 1), ("forward", 3), ("unrolled", 3), ("difference", 1)])
def test_the_gradient_is_that_of_float64_on_the_cpu(mode: str, network: str, ahead: int) -> None:
    exact = gradient(case(network, "cpu", torch.float64), "unrolled", ahead)
    with full_float32(torch.device(DEVICE)):
        found = gradient(case(network, DEVICE), mode, ahead)
    assert gap(found, exact) < (1e-2 if mode == "difference" else 1e-4)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_in_bfloat16_it_is_near(mode: str, network: str) -> None:
    exact = gradient(case(network, "cpu", torch.float64), "unrolled")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradient(case(network, DEVICE), mode)
    assert gap(found, exact) < 0.05


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "mode", "options"),
    [
        (True, "forward", {}),
        (True, "reinforce", {"precision": "bfloat16"}),
        ("reduce-overhead", "forward", {"precision": "bfloat16"}),
        ("reduce-overhead", "reinforce", {}),
    ],
)
def test_channels_last_and_compiled_passes_train_alike(how: Any, mode: str, options: dict[str, Any]) -> None:
    """And a report outlives the next steps, which are replays of one CUDA graph from the third on."""
    ends, outputs = [], []
    for changed in (False, how):
        given = case("convolutions", DEVICE)
        if changed:
            for name in ("teacher", "student"):
                given[name] = given[name].to(memory_format=torch.channels_last)
        teacher, student = given.pop("teacher"), given.pop("student")
        generator = torch.Generator(DEVICE).manual_seed(2)
        trainer = metapl.BilevelTrainer(teacher, student, mode, compile=changed, generator=generator, **options)
        reports = [trainer.step(**given) for _ in range(2 if how is True else 4)]
        ends.append(torch.cat([p.detach().flatten() for p in student.parameters()]).double().cpu())
        outputs.append(reports[0].student_outputs.double().cpu())
    for pair in (ends, outputs):
        assert gap(*pair) < (1e-4 if not options else 2e-2)


def test_one_rank_with_its_weights_cut_is_the_step_of_one_process(tmp_path: Path) -> None:
    """NCCL or gloo, fully sharded, and a checkpoint by DCP that the other one reads."""
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        ends = []
        for sharded in (False, True):
            given = case("convolutions", DEVICE, dropout=0.2)
            teacher, student = given.pop("teacher"), given.pop("student")
            if sharded:
                mesh = init_device_mesh(DEVICE, (1,))
                fully_shard(teacher, mesh=mesh), fully_shard(student, mesh=mesh)
            trainer = metapl.BilevelTrainer(teacher, student, "forward")
            for _ in range(2):
                torch.manual_seed(3)
                trainer.step(**given)
            state = get_model_state_dict(student)
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in state.values()]
            ends.append(torch.cat([t.detach().flatten() for t in whole]).double().cpu())
            if sharded:
                dcp.save(state, checkpoint_id=tmp_path / "state")
        assert gap(*ends) < 1e-5
        read = {name: torch.empty_like(t) for name, t in case("convolutions", "cpu")["student"].state_dict().items()}
        dcp.load(read, checkpoint_id=tmp_path / "state")
        assert gap(torch.cat([t.flatten() for t in read.values()]).double(), ends[1]) == 0
    finally:
        dist.destroy_process_group()
