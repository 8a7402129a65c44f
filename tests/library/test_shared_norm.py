"""Batch norms that share their statistics over processes.

Equal to one process, in every derivative and mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import forward_ad

import metapl
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError
from metapl.execution.batch_norm import SharedBatchNorm
from metapl.feedback import Reinforce

pytestmark = pytest.mark.long

NUMBER = 4
ROWS = 8


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.BatchNorm1d(6),
    ]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, 3)).double()


def pictures(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randn(
        rows, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def own_rows(t: Tensor, ranks: int) -> Tensor:
    """Return the rows of this process where several share them."""
    return t if ranks == 1 else t.chunk(ranks)[dist.get_rank()]


# ------------------------------------------------------------------------------ what a process runs


def derivatives(ranks: int) -> dict[str, Tensor]:
    """Return outputs, the gradient, its derivative along a direction, and a tangent.

    Of all processes together, and the statistics.
    """
    norm: Any = nn.BatchNorm2d(2).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.7, 1.3]))
        norm.bias.copy_(torch.tensor([0.2, -0.1]))
    if ranks > 1:
        norm = SharedBatchNorm.like(norm, dist.group.WORLD)
    x = own_rows(pictures(0), ranks).requires_grad_()
    weights = own_rows(pictures(1), ranks)
    direction = own_rows(pictures(2), ranks)
    outputs = norm(x)
    (gradient,) = torch.autograd.grad((outputs.sin() * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gradient * direction).sum(), x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(x.detach(), direction))).tangent
    results: dict[str, Tensor] = {}
    for name, t in (
        ("outputs", outputs),
        ("gradient", gradient),
        ("second", second),
        ("tangent", tangent),
    ):
        results[name] = t.detach()
        if ranks > 1:
            parts = [torch.empty_like(t) for _ in range(ranks)]
            dist.all_gather(parts, t.detach().contiguous())
            results[name] = torch.cat(parts)
    results["mean"] = norm.running_mean
    results["var"] = norm.running_var
    results["batches"] = norm.num_batches_tracked
    return results


def trained(
    mesh: dict[str, int], mode: str, accumulate: int = 1, group: int | None = None
) -> dict[str, Tensor]:
    """Return weights and statistics of both networks after three steps.

    The global batches are the same on every mesh.
    """
    over = Mesh(**mesh)
    teacher = network(0)
    student = network(1)
    if over.size > 1:
        count = group or over.shares
        teacher = shard(teacher, over, batch_norm_ranks=count)
        student = shard(student, over, batch_norm_ranks=count)
    estimator: Any = mode
    if mode == "cosine":
        estimator = Reinforce(similarity="cosine")
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        estimator,
        teacher_losses=(metapl.CrossEntropy(), metapl.UDA()),
        feedback_weight=1.0,
        generator=torch.Generator().manual_seed(3),
        accumulate=accumulate,
        verify=False,
    )
    for step in range(3):
        inputs = own_rows(pictures(10 + step), over.shares)
        labels = own_rows(torch.arange(ROWS) % 3, over.shares)
        weak = own_rows(pictures(20 + step), over.shares)
        strong = own_rows(pictures(30 + step), over.shares)
        trainer.step((inputs, labels), (weak, strong))
    tensors = {}
    for role, module in trainer.networks.items():
        for name, t in module.state_dict().items():
            gathered: Any = t.full_tensor() if hasattr(t, "full_tensor") else t
            tensors[f"{role}.{name}"] = gathered.detach().clone()
    return tensors


def refused(count: int) -> str:
    with pytest.raises(MetaplError) as error:
        shard(network(0), Mesh(replicate=NUMBER), batch_norm_ranks=count)
    return str(error.value)


def copied() -> bool:
    """Return whether a copy of a network is of the same group."""
    norm = SharedBatchNorm.like(nn.BatchNorm1d(2), dist.group.WORLD)
    other = copy.deepcopy(norm)
    return (
        other.group is norm.group
        and other.weight is not norm.weight
        and torch.equal(other.weight, norm.weight)
    )


# ---------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(NUMBER, cases="test_shared_norm")
    yield ranks
    ranks.close()


def check_same(by_rank: list[dict[str, Tensor]], expected: dict[str, Tensor], limit: float) -> None:
    for tensors in by_rank:
        assert tensors.keys() == expected.keys()
        for name, t in expected.items():
            torch.testing.assert_close(
                tensors[name],
                t,
                rtol=limit,
                atol=limit,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_every_derivative_is_that_of_all_rows(four: Ranks) -> None:
    check_same(four.run("derivatives", ranks=NUMBER), derivatives(1), 1e-12)


@pytest.mark.parametrize(
    "mode", ["forward", "reinforce", "cosine", "difference", "loss_difference", "none"]
)
def test_replicas_with_shared_statistics_are_one_process(mode: str, four: Ranks) -> None:
    check_same(four.run("trained", mesh={"replicate": NUMBER}, mode=mode), trained({}, mode), 1e-10)


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
@pytest.mark.parametrize(
    "mesh", [{"shard": 4}, {"replicate": 2, "shard": 2}], ids=["shards", "both"]
)
def test_shards_with_shared_statistics_are_one_process(
    mode: str, mesh: dict[str, int], four: Ranks
) -> None:
    check_same(four.run("trained", mesh=mesh, mode=mode), trained({}, mode), 1e-10)


def test_a_group_of_two_sees_what_a_micro_batch_sees(four: Ranks) -> None:
    """Two groups of two processes take statistics as one process does with two micro-batches."""
    by_rank = four.run("trained", mesh={"replicate": NUMBER}, mode="forward", group=2)
    expected = trained({}, "forward", accumulate=2)
    learned = [name for name in expected if "running" not in name and "batches" not in name]
    check_same(
        [{name: tensors[name] for name in learned} for tensors in by_rank],
        {name: expected[name] for name in learned},
        1e-10,
    )
    alone = four.run("trained", mesh={"replicate": NUMBER}, mode="forward", group=1)
    assert (alone[0]["student.0.weight"] - expected["student.0.weight"]).abs().max() > 1e-6


def test_groups_that_do_not_divide_the_shares_are_refused(four: Ranks) -> None:
    assert all("divisor of the 4 shares" in text for text in four.run("refused", count=3))


def test_a_copy_is_of_the_same_group(four: Ranks) -> None:
    assert four.run("copied") == [True] * NUMBER
