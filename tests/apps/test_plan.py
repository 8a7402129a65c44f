"""``metapl plan``: what a training takes, beside what it really takes where it runs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plan_cases
import pytest
import torch
from command import refused, said
from flat import made
from ranks import Ranks
from torch import distributed as dist
from torch import nn

import metapl
from metapl.ablation.cost import flops
from metapl.apps.commands.plan import PLANNED, without_data
from metapl.apps.planning import rehearse
from metapl.apps.planning.plan import Plan, bytes_of, plan, propose
from metapl.apps.planning.rehearsal import Held
from metapl.apps.recipes import Cifar10, Digits
from metapl.apps.recipes.base import Recipe
from metapl.apps.recipes.settings import Feedback, Optimizer
from metapl.distributed import Mesh
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.rng import RandomState
from metapl.feedback.path import Path as StudentPath
from metapl.problems import DataRater

NEAR = 0.15
"""The most that a plan may be away from the memory that a step takes."""

ADAMW = Optimizer(algorithm="adamw", lr=1e-3)


def digits(mode: str = "forward", width: int = 256, **fields: Any) -> Digits:
    return made(Digits, feedback=Feedback(mode=mode), hidden=(width, width), **fields)


def pictures(network: str, mode: str = "forward", **fields: Any) -> Cifar10:
    names = tuple(map(str, range(10)))
    sizes: dict[str, Any] = {"labeled_batch": 8, "unlabeled_batch": 16, **fields}
    feedback = Feedback(mode=mode)
    return made(Cifar10, data_root="", class_names=names, network_name=network, feedback=feedback, **sizes)


def planned(recipe: Recipe, **mesh: int) -> Plan:
    return plan(recipe, Mesh(**mesh), memory=10**9)


def gap(found: Plan, measured: int) -> float:
    return abs(found.per_rank["peak"] / measured - 1)


# ---------------------------------------------------------------------------------------------- beside real memory

ALONE = {
    "forward": digits(),
    "none": digits("none"),
    "reinforce, adamw": digits("reinforce", student=ADAMW, teacher=ADAMW),
    "small_cnn": pictures("small_cnn", dropout=0.2),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case != "reinforce, adamw" else case for case in ALONE]
)
def test_a_plan_for_one_process_is_what_it_holds(case: str) -> None:
    assert gap(planned(ALONE[case]), plan_cases.measured(ALONE[case], Mesh())) < NEAR


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, cases="plan_cases")
    yield ranks
    ranks.close()


SHARED = {
    "forward": (digits(), {"shard": 2}),
    "none": (digits("none"), {"shard": 2}),
    "difference, adamw": (digits("difference", student=ADAMW, teacher=ADAMW), {"shard": 2}),
    "replicas": (digits(), {"replicate": 2}),
    "small_cnn": (pictures("small_cnn"), {"shard": 2}),
    "products": (digits("difference"), {"tensor": 2}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case != "forward" else case for case in SHARED]
)
def test_a_plan_for_two_processes_is_what_each_holds(two: Ranks, case: str) -> None:
    recipe, sizes = SHARED[case]
    found = planned(recipe, **sizes)
    for measured in two.run("measured", recipe=recipe, mesh=Mesh(**sizes)):
        assert gap(found, measured) < NEAR


class _Rater(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).mean((1, 2))


@pytest.mark.parametrize("mode", ["forward", pytest.param("unrolled", marks=pytest.mark.long)])
def test_a_language_model_and_a_look_ahead_of_two_steps(mode: str) -> None:
    def networks() -> list[nn.Module]:
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        return [_Rater(500, 1), nn.Sequential(nn.Embedding(500, 64), layer, nn.Linear(64, 500))]

    def train(rater: nn.Module, student: nn.Module) -> metapl.BilevelTrainer:
        inner, outer = (torch.optim.AdamW(network.parameters()) for network in (student, rater))
        return metapl.BilevelTrainer(
            rater, student, mode, problem=DataRater(), inner_optimizer=inner, outer_optimizer=outer
        )

    def batches() -> Any:
        ids = [torch.randint(500, (4, 32)) for _ in range(3)]
        return ids[0], metapl.Lookahead(ids[1:])

    with torch.device("meta"):
        planned_for = networks()
    found = rehearse(planned_for, train, batches)
    trainer, given = train(*networks()), batches()
    measured = plan_cases.peak_of_steps(trainer, given, [given[0], *given[1]])
    assert abs(max(found.peaks.values()) / measured - 1) < 0.05
    states = 3 * 4 * sum(p.numel() for p in trainer.student.parameters())  # θ, m and v
    assert found.phases["feedback"]["feedback"] > 2 * states


def test_networks_with_values_and_steps_that_read_them_are_refused() -> None:
    class Reads(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float(x.sum())

    def batches() -> Any:
        return (torch.randn(4, 3), torch.arange(4) % 2), torch.randn(4, 3)

    with pytest.raises(
        MetaplError, match="a network to rehearse has weights on cpu; expected all networks on the meta"
    ):
        rehearse([nn.Linear(3, 2), nn.Linear(3, 2)], metapl.BilevelTrainer, batches)
    with torch.device("meta"):
        pair = [nn.Linear(3, 2), Reads(3, 2)]
    with pytest.raises(MetaplError, match=r"reads the value of a tensor \(aten._local_scalar_dense.default\)"):
        rehearse(pair, metapl.BilevelTrainer, batches)
    assert all(p.is_meta for network in pair for p in network.parameters())


def own_pair(*_: nn.Module) -> metapl.BilevelTrainer:
    return metapl.BilevelTrainer(nn.Linear(3, 2), nn.Linear(3, 2))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a Sequential": ({"networks": nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))}, "networks is of type Sequential"),
    "no network": ({"networks": [None, nn.Linear(3, 2)]}, "a network to rehearse is of type NoneType"),
    "no function of batches": ({"batches": (torch.ones(4, 3),)}, "batches is a tuple of 1.*expected a function"),
    "a tensor as a batch": ({"batches": lambda: torch.ones(4, 3)}, "what batches returns is a tensor of shape"),
    "no function of networks": ({"train": None}, "train is of type NoneType; expected a function"),
    "no trainer": ({"train": lambda *_: None}, "what train returns is of type NoneType; expected a trainer"),
    "a trainer of others": ({"train": own_pair}, "train returned a trainer of other networks than train was given"),
    "a number of ranks": ({"mesh": 8}, r"mesh is of type int; expected a metapl\.distributed\.Mesh"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rehearsed_is_refused_by_name(case: str) -> None:
    given, said = REFUSED[case]
    with torch.device("meta"):
        pair = [nn.Linear(3, 2), nn.Linear(3, 2)]
    usual = {"networks": pair, "train": metapl.BilevelTrainer, "batches": lambda: ((torch.randn(4, 3),), {})}
    with pytest.raises(MetaplError, match=said):
        rehearse(**{**usual, **given})


def test_the_feedback_is_what_a_step_without_it_does_not_hold() -> None:
    found, without = (planned(digits(mode, 512, unlabeled_batch=8)) for mode in ("forward", "none"))
    assert found.per_rank["feedback"] > found.per_rank["weights"]  # v and θ′ at least, each as large as a network
    assert without.per_rank["feedback"] < 0.001 * without.per_rank["peak"]
    # Without feedback, the teacher has no backward pass through its labels either.
    assert without.per_rank["peak"] < found.per_rank["peak"] - found.per_rank["feedback"]


def test_more_shards_hold_less_and_send_more() -> None:
    plans = [planned(digits(width=512, unlabeled_batch=64), shard=shards) for shards in (1, 2, 4)]
    weights = [found.per_rank["weights"] for found in plans]
    assert weights[0] == 8 * plans[0].parameters["student"]  # two networks, four bytes a weight
    assert weights[1] == pytest.approx(weights[0] / 2, rel=0.01)
    assert weights[2] == pytest.approx(weights[0] / 4, rel=0.02)
    assert plans[0].communication_bytes_per_step == 0
    sent = [found.communication_bytes_per_step for found in plans[1:]]
    assert 3 * weights[0] / 2 < sent[0] < sent[1]
    assert len({found.flops_per_step for found in plans}) == 1
    one, two, four = (found.per_rank["peak"] for found in plans)
    assert one > two > four


def test_operations_are_those_of_the_passes() -> None:
    """2 operations a weight and example forward, 4 backward, less the gradient of the input."""
    found = planned(digits("none", 512))
    matrices = (64 * 512, 512 * 512, 512 * 10)
    forward = 2 * 64 * sum(matrices)
    backward = 2 * 64 * (2 * sum(matrices) - matrices[0])
    assert found.flops_per_step == 3 * forward + 2 * backward  # the teacher labels and learns, the student learns


def test_grouped_convolutions_count_what_their_groups_take() -> None:
    """2 operations a weight of a filter, place and example, in each of three passes."""
    layer = torch.nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    assert flops(lambda: layer(x).sum().backward()) == 3 * 2 * layer.weight.numel() * 25 * 2


def test_products_by_two_ranks_sum_what_is_between_layers() -> None:
    """One sum of a pair's outputs in a pass forward, and one of its inputs' gradients where they are needed."""
    found = planned(digits("none", 64), tensor=2)
    whole = planned(digits("none", 64))
    assert found.flops_per_step == 2 * found.step.flops
    last = 2 * 64 * 64 * 10 * (3 + 2 * 2)  # operations of the layer that is whole on both: three forward, two backward
    assert found.flops_per_step == whole.flops_per_step + last
    assert found.step.sent["allreduce"] > 0


# ----------------------------------------------------------------------------------------------------- the command


def test_the_command_says_and_writes_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    text = said(capsys, "plan", "digits", "--mesh.shard", "2", "--flops-per-second", "1e9", "--json", file)
    found = json.loads(file.read_text())
    parts = dict(found["per_rank"])
    assert parts.pop("peak") == sum(parts.values()) == max(found["phases"].values())
    assert parts.keys() == {"weights", "gradients", "optimizer", "activations", "feedback"}
    assert min(parts.values()) > 0
    assert found["teacher_parameters"] == found["student_parameters"] == 3466
    assert found["fits"] is True
    assert found["communication_bytes_per_step"] == sum(found["communication"].values()) > 0
    assert found["hours"] == pytest.approx(Digits().steps * found["flops_per_step"] / 2 / 1e9 / 3600)
    assert found["mesh"] == {"replicate": 1, "shard": 2, "tensor": 1}
    assert "on 2 ranks: --mesh.shard 2\n" in text
    assert "3,466 weights" in text
    assert "fits into 80 GB" in text
    assert max(map(len, text.splitlines())) <= 80
    assert [*tmp_path.iterdir()] == [file]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "plan", "digits", "--mesh.shard", "1", "--memory", "100KB")
    assert "does not fit into 100 KB" in text
    assert "smaller batches" in text


def test_a_mesh_is_proposed_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = digits(width=1024, labeled_batch=8, unlabeled_batch=8)
    whole = planned(recipe).per_rank["peak"]
    found = propose(recipe, 4, memory=int(0.7 * whole))
    assert found.fits
    assert found.mesh.size == 4
    assert found.mesh.shard > 1
    coarser = Mesh(replicate=8 // found.mesh.shard, shard=found.mesh.shard // 2)
    assert not plan(recipe, coarser, memory=int(0.7 * whole)).fits
    nowhere = propose(recipe, 4, memory=1000)
    assert not nowhere.fits
    assert nowhere.mesh.shard == 4
    text = said(capsys, "plan", "digits", "--ranks", "2")
    assert "on 2 ranks: --mesh.replicate 2\n" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no recipe was named"),
        (("digit",), "did you mean digits"),
        (("digits", "--mesh.shard", "0"), "--mesh.shard 0: expected a number of processes"),
        (("digits", "--mesh.shard", "3"), "labeled_batch of 64, which 3 ranks do not share equally"),
        (("digits", "--unlabeled-batch", "7", "--mesh.shard", "2"), "digits has an unlabeled_batch of 7"),
        (("digits", "--mesh.tensor", "2"), r"mode 'forward' .* mode 'difference'"),
        (("cifar10-4k", "--mesh.tensor", "2"), "has no two linear layers"),
        (("digits", "--mesh.shard", "2", "--ranks", "2"), "--ranks 2 has no effect beside --mesh"),
        (("digits", "--ranks", "0"), "--ranks 0: expected a whole number"),
        (("digits", "--mesh.shard", "10000000"), "--mesh 10000000: expected 1 to 1,048,576"),
        (("digits", "--json", "/"), "--json / cannot be written: it is a folder"),
        (("digits", "--memory", "lots"), "--memory lots: expected a size"),
        (("digits", "--flops-per-second", "-1"), "--flops-per-second -1.0: expected a number above 0"),
        (("digits", "--steps", "0"), "--steps 0: expected a whole number"),
        (("digits", "--json", "/no/such/folder/x"), "cannot be written: there is no folder /no/such/folder"),
        (("digits", "--network", "resnet18"), "digits has no network; leave --network out"),
        (("digits", "--classes", "3"), "--classes 3 has no effect on digits"),
        (("images",), "give their number by --classes"),
        (("images", "--labeled", "a"), r"Unrecognized options: --labeled, a\. .*See metapl plan images --help"),
        (("images", "--mesh.shrad", "2"), "Unrecognized options: --mesh.shrad, 2. Perhaps you meant: --mesh.shard "),
        (("images", "--classes", "5", "--network", "resnet-18"), "did you mean resnet18"),
        (("digits", "--mode", "unrolled", "--mesh.shard", "2"), "'unrolled' does not run on a student that is sharded"),
        (
            ("cifar10-4k", "--labeled-batch", "2", "--mesh.shard", "2", "--network", "resnet18"),
            "does not run: Expected",
        ),
    ],
)
def test_wrong_input_is_refused(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(words, refused(capsys, "plan", *arguments))


def test_every_recipe_is_built_without_data() -> None:
    for name, kind in PLANNED.items():
        recipe = without_data(kind, {}, 3 if name == "images" else None, None)
        assert recipe.name == name
        with_feedback = not name.startswith("noisy-")
        changed = without_data(
            kind, {"steps": 100_000}, 3 if name == "images" else None, "none" if with_feedback else None
        )
        assert changed.steps == 100_000
        assert not with_feedback or changed.method.feedback.mode == "none"
        with torch.device("meta"):
            network = recipe.network()
        assert sum(p.numel() for p in network.parameters()) > 1000


# -------------------------------------------------------------------------------------------------------- the parts


def test_nothing_is_left_behind() -> None:
    before = checks.waits, vars(RandomState)["now"], vars(StudentPath)["outer_gradient"], torch.get_rng_state()
    planned(digits(), shard=2)
    with pytest.raises(MetaplError, match="'unrolled'"):
        planned(digits("unrolled"), shard=2)
    after = checks.waits, vars(RandomState)["now"], vars(StudentPath)["outer_gradient"], torch.get_rng_state()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    assert not dist.is_initialized()
    assert "feedback" in vars(type(Digits().method.feedback.estimator()))


def test_storages_are_counted_while_they_live() -> None:
    held = Held()
    given = torch.zeros(100)
    with held, held.phase("first"):
        held.name([given], "weights")
        a = given * 2
        b = a.view(10, 10)
        del a
        assert held.bytes.total() == 800  # the view holds it
        del b
        assert held.bytes.total() == 400
        c = torch.ones(50)
        c.untyped_storage().resize_(0)
        assert held.bytes.total() == 400
        with held.phase("second"):
            held.name([given], "gradients", others=True)  # it has a name
            d = given + 1
            held.name([d], "feedback", others=True)
            torch.zeros(1)
    assert sum(held.phases["first"].peak.values()) == 800
    second = held.phases["second"]
    assert sum(second.peak.values()) == 804
    assert second.peak["weights"] == second.peak["feedback"] == 400
    assert sum(second.plain.values()) == 800  # while the sum had no name
    assert held.bytes["feedback"] == 400


def test_sizes_of_memory() -> None:
    assert [bytes_of(text) for text in ("80GB", "1 GiB", "1500", "0.5tb")] == [80 * 10**9, 2**30, 1500, 5 * 10**11]
    for wrong in ("", "GB", "-1GB", "nan", "1e400"):
        with pytest.raises(MetaplError, match="--memory"):
            bytes_of(wrong)


def test_the_average_of_weights_is_held() -> None:
    plain, averaged = (planned(pictures("small_cnn", ema_decay=decay)) for decay in (None, 0.9))
    assert averaged.per_rank["weights"] > 1.4 * plain.per_rank["weights"]
    assert dataclasses.replace(averaged, memory=1).fits is False
