"""``examples/plan.py``.

What it says that a step takes, beside what the step really takes where it runs.
"""

import gc
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.distributed import Mesh, shard
from metapl.execution.shards import local
from metapl.problems import DataRater

pytestmark = pytest.mark.docs

PLAN: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "plan.py"))


class Rater(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).mean((1, 2))


def networks(kind: str) -> list[nn.Module]:
    if kind == "mlp":
        return [metapl.models.mlp([64, 256, 256, 10]) for _ in range(2)]
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
    return [Rater(500, 1), nn.Sequential(nn.Embedding(500, 64), layer, nn.Linear(64, 500))]


def trainer(teacher: nn.Module, student: nn.Module, mode: str = "forward") -> metapl.BilevelTrainer:
    inner, outer = (torch.optim.AdamW(network.parameters()) for network in (student, teacher))
    problem = DataRater() if isinstance(teacher, Rater) else metapl.PseudoLabels()
    options: dict[str, Any] = {
        "inner_optimizer": inner,
        "outer_optimizer": outer,
        "problem": problem,
    }
    return metapl.BilevelTrainer(teacher, student, mode, **options)


def batches(kind: str, shares: int = 1) -> tuple[Any, metapl.Lookahead]:
    if kind == "text":
        outer, *inner = (torch.randint(500, (4, 32)) for _ in range(3))
        return outer, metapl.Lookahead(inner)
    few, many = (torch.rand(64 // shares, 64) for _ in range(2))
    return (few, torch.arange(len(few)) % 10), metapl.Lookahead([many])


def taken(kind: str, sizes: dict[str, int]) -> int:
    """Return the bytes that this process holds at the peak of a step.

    They are what is there before it, and what the allocator adds.
    """
    own = [shard(network, Mesh(**sizes)) if sizes else network for network in networks(kind)]
    real, (outer, ahead) = trainer(*own), batches(kind, Mesh(**sizes).shares)
    real.step(outer, ahead)  # the states of the optimizers are there now
    there = pytree.tree_leaves([[each.state for each in real.schedulable], outer, *ahead])
    there += [t for network in own for t in (*network.parameters(), *network.buffers())]
    peaks = []
    for _ in range(3):  # another thread frees the buffers of an exchange, sooner or later
        gc.collect()
        peaks.append(peak_bytes(lambda: real.step(outer, ahead), torch.device("cpu")))
    return sum(local(t).nbytes for t in there if isinstance(t, Tensor)) + min(peaks)


def planned(kind: str, mode: str = "forward", **sizes: int) -> tuple[Any, int]:
    """Return the rehearsed step of a rank, and its peak."""
    mesh = Mesh(**sizes)
    with torch.device("meta"):
        own = networks(kind)
    step = PLAN["rehearse"](
        own, lambda *pair: trainer(*pair, mode), lambda: batches(kind, mesh.shares), mesh
    )
    return step, max(sum(held.values()) for held in step.phases.values())


@pytest.mark.parametrize(
    ("kind", "within"), [("mlp", 0.15), pytest.param("text", 0.05, marks=pytest.mark.long)]
)
def test_a_step_is_planned_as_it_is(kind: str, within: float) -> None:
    assert planned(kind)[1] == pytest.approx(taken(kind, {}), rel=within)


@pytest.mark.long
def test_a_step_of_two_ranks_is_planned_as_it_is() -> None:
    ranks = Ranks(2, cases="test_plan")
    measured = ranks.run("taken", kind="mlp", sizes={"shard": 2})
    ranks.close()
    assert measured == [pytest.approx(planned("mlp", shard=2)[1], rel=0.15)] * 2


def test_more_shards_hold_less_and_send_more() -> None:
    plans, peaks = zip(*(planned("mlp", "none", shard=shards) for shards in (1, 2, 4)), strict=True)
    matrices = (64 * 256, 256 * 256, 256 * 10)
    whole = 2 * 4 * (sum(matrices) + 256 + 256 + 10)
    weights = [found.phases["student step"]["weights"] for found in plans]
    assert weights == [pytest.approx(whole / shards, rel=0.02) for shards in (1, 2, 4)]
    assert 0 == plans[0].sent < plans[1].sent < plans[2].sent
    assert peaks[0] > peaks[1] > peaks[2]
    # 2 operations a weight and example forward, 4 backward, less the gradient of the input: three
    # passes, two backward.
    flops = 3 * 2 * 64 * sum(matrices) + 2 * 2 * 64 * (2 * sum(matrices) - matrices[0])
    assert [found.flops * shards for found, shards in zip(plans, (1, 2, 4), strict=True)] == [
        flops
    ] * 3
    assert not distributed.is_initialized()
