"""Networks in several processes.

The same numbers as one process with the whole batch, every mode, every layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import sharded_cases
import torch
from ranks import Ranks
from reference import error
from torch import nn
from torch_versions import require_torch

import metapl
from metapl.ablation import Altered
from metapl.distributed import Mesh, blocks_of, shard
from metapl.errors import MetaplError
from metapl.feedback import Forward, Reinforce, ReinforcePerExample
from metapl.models import mlp as multilayer

DIFFERENTIABLE_TWICE = "a DTensor can be differentiated twice"
MODES = ("none", "reinforce", "reinforce_per_example", "loss_difference", "difference", "forward")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@cache
def alone(**case: Any) -> dict[str, Any]:
    """Return the same in this process, with the whole batch."""
    return sharded_cases.train(**case)


def tolerance(mode: Any) -> float:
    takes_difference = "difference" in (mode, getattr(mode, "tangent", None))
    return 1e-6 if takes_difference else 1e-10


# These are of each rank's own rows.
OF_OWN_ROWS = ("feedback_mean", "feedback_std")


def compare(
    by_rank: list[dict[str, Any]], expected: dict[str, Any], limit: float, copies: int = 1
) -> None:
    """Compare what every rank found with what one process found.

    Args:
        limit: the relative error that is allowed.
        copies: so many neighboring ranks have the same rows.
    """
    for rank, result in enumerate(by_rank):
        for name in ("teacher", "student"):
            assert error(result[name], expected[name]) < limit, (name, rank)
        for step, row in enumerate(expected["scalars"]):
            for name, value in row.items():
                if name in OF_OWN_ROWS:
                    continue
                scalar = result["scalars"][step][name]
                place = (name, step, rank)
                assert scalar == pytest.approx(value, rel=limit, abs=limit, nan_ok=True), place
                # To the bit, all ranks have the same.
                first = by_rank[0]["scalars"][step][name]
                assert scalar == pytest.approx(first, rel=0, abs=0, nan_ok=True), place
        for ours, theirs in zip(result["gradients"], expected["gradients"], strict=True):
            gap = (reference.flat(ours) - reference.flat(theirs)).norm()
            assert gap <= limit * reference.flat(theirs).norm()
        for ours, theirs in zip(result["moved"], expected["moved"], strict=True):
            assert error(ours, theirs) < limit
    for step, h in enumerate(expected["feedback"]):
        parts = [result["feedback"][step] for result in by_rank[::copies]]
        if h.ndim == 0:
            # Algorithm 1's h is one number.
            assert all(torch.equal(part, parts[0]) for part in parts)
            parts = [parts[0][None]]
        together = torch.cat(parts).reshape(h.shape)
        assert float((together - h).norm()) <= limit * float(h.norm()), step


def in_modes(modes: tuple[Any, ...] | list[Any], **case: Any) -> list[dict[str, Any]]:
    return [{"mode": mode, **case} for mode in modes]


FORWARD: dict[str, Any] = {"mode": "forward", "gradients": False}
PLAIN_PASSES = (
    "none",
    "reinforce",
    "loss_difference",
    "difference",
    ReinforcePerExample(tangent="difference"),
)
CUT: dict[str, Any] = {"layout": "tensor", "hidden": 8}
OF_TWO: dict[str, list[dict[str, Any]]] = {
    "every mode": in_modes(MODES),
    "every mode, AdamW": in_modes(MODES, optimizer="adamw"),
    "signals of several tensors": [
        *in_modes(["forward", "difference"], problem=sharded_cases.SEVERAL),
        {"mode": "forward", "problem": sharded_cases.SEVERAL, "accumulate": 2},
    ],
    # Its weights sum to one over the rows of all ranks, and the teacher learns by those of every
    # rank.
    "a signal of the batch as a whole": [
        {"mode": "forward", "problem": sharded_cases.OF_ALL_ROWS, "accumulate": parts}
        for parts in (1, 2)
    ],
    "an outer loss of a sum and a weight": [
        # These take the loss's slope, its value and its gradient.
        *in_modes(["reinforce", "loss_difference", "forward"], problem=sharded_cases.Weighted()),
        {**FORWARD, "problem": sharded_cases.Weighted(), "accumulate": 2},
    ],
    "options": [
        {"mode": "forward", "clip_norm": 0.05, "steps": 1},
        {**FORWARD, "clip_norm": 0.05, "optimizer": "adamw", "mode": "reinforce_per_example"},
        # With UDA.
        {**FORWARD, "views": True, "steps": 1},
        {**FORWARD, "recompute_teacher": True, "steps": 1},
        {**FORWARD, "accumulate": 2, "steps": 1},
        {**FORWARD, "feedback_ratio": 0.5, "steps": 1},
        {**FORWARD, "mode": Reinforce(similarity="cosine", baseline=0.9)},
    ],
    "several steps": [{"mode": Forward(keep_every=2), "lookahead": 3, "accumulate": 2, "steps": 1}],
    "several steps, all kept": in_modes([Forward(), Forward(truncate=2)], lookahead=3),
}
# The number of ranks, how many of them have the same rows, and the cases.
Cases = tuple[int, int, list[dict[str, Any]]]


def of_both_layouts(cases_of_two: dict[str, list[dict[str, Any]]]) -> dict[str, Cases]:
    """Return the cases of two processes, once by DDP and once by FSDP2."""
    cases_by_name: dict[str, Cases] = {}
    for name, cases in cases_of_two.items():
        for layout in ("ddp", "fsdp"):
            cases_by_name[f"{name}, {layout}"] = (
                2,
                1,
                [{**case, "layout": layout} for case in cases],
            )
    return cases_by_name


CASES: dict[str, Cases] = {
    **of_both_layouts(OF_TWO),
    # An order is tried, and fails, on every rank.
    "orders, fsdp": (
        2,
        1,
        [
            *in_modes(["forward"], layout="fsdp", inside="distances"),
            *in_modes([Forward(by="double_backward")], layout="fsdp"),
        ],
    ),
    "orders, ddp": (
        2,
        1,
        [
            *in_modes([Forward(by="tangent")], layout="ddp"),
            *in_modes(
                [Forward(by="double_backward"), "reinforce_per_example"],
                layout="ddp",
                inside="distances",
            ),
        ],
    ),
    "an outer loss that reads the teacher": (
        2,
        1,
        [
            {"problem": sharded_cases.ReadsTeacher(), "teacher_layout": "ddp", **options}
            for options in (
                {"mode": "forward", "layout": "ddp"},
                {"mode": "direct", "layout": "ddp"},
                {
                    "mode": "difference",
                    "layout": "ddp",
                    "teacher_losses": (metapl.CrossEntropy(),),
                    "feedback_ratio": 0.5,
                },
                {"mode": "forward", "layout": "ddp", "accumulate": 2},
            )
        ],
    ),
    "altered feedback": (
        2,
        1,
        in_modes([Altered(), Altered(ReinforcePerExample(), "random_sign")], layout="ddp"),
    ),
    "a replicated teacher": (
        2,
        1,
        in_modes(["forward"], layout="fsdp", teacher_layout="ddp", optimizer="adamw"),
    ),
    "metapl's own function": (2, 1, in_modes(["forward", "difference"], layout="shard")),
    "its checkpoints": (2, 1, in_modes(["forward", "difference"], layout="shard_checkpoint")),
    "its checkpoints, several steps": (
        2,
        1,
        in_modes(
            ["forward"], layout="shard_checkpoint", lookahead=3, recompute_teacher=True, steps=1
        ),
    ),
    "products, AdamW": (2, 2, in_modes(["reinforce"], optimizer="adamw", **CUT)),
    "products": (2, 2, in_modes(PLAIN_PASSES, **CUT) + in_modes(["none"], clip_norm=0.05, **CUT)),
    # The teacher is whole in each process.
    "products of the student": (2, 2, in_modes(["none"], teacher_layout="ddp", **CUT)),
    "shards and products": (
        4,
        2,
        in_modes(["reinforce"], layout="tensor_by_shard", optimizer="adamw", hidden=8),
    ),
    "shards, products, a clip": (
        4,
        2,
        in_modes(["difference"], layout="tensor_by_shard", hidden=8, clip_norm=0.05),
    ),
    "replicas and products": (
        4,
        2,
        in_modes(["difference"], layout="tensor_by_replicate", hidden=8, optimizer="adamw"),
    ),
    "replicas of shards of one": (2, 1, in_modes(["reinforce"], layout="hsdp", optimizer="adamw")),
    "replicas of shards": (4, 1, in_modes(["reinforce", "difference"], layout="hsdp")),
    "replicas of shards, AdamW": (4, 1, in_modes(["forward"], layout="hsdp", optimizer="adamw")),
    "replicas, several steps": (
        4,
        1,
        in_modes([Forward(keep_every=2)], layout="hsdp", lookahead=3),
    ),
    # Widths of 3, 5 and 9 over four processes: some hold nothing of a bias.
    "uneven shards": (4, 1, in_modes(["forward", "reinforce"], layout="fsdp", gradients=False)),
}
QUICK = {
    "every mode, fsdp",
    "an outer loss of a sum and a weight, ddp",
    "several steps, fsdp",
    "altered feedback",
    "a replicated teacher",
    "an outer loss that reads the teacher",
    "products, AdamW",
    "orders, fsdp",
}


def long_but_for(names: Iterable[str], quick: set[str]) -> list[Any]:
    """Return parameters of a test, marked as long but for the quick ones."""
    parameters = []
    for name in names:
        marks = () if name in quick else (pytest.mark.long,)
        parameters.append(pytest.param(name, marks=marks))
    return parameters


@pytest.mark.parametrize("name", long_but_for(CASES, QUICK))
def test_processes_are_as_one(two: Ranks, four: Ranks, name: str) -> None:
    """They agree in gradients, weights, feedback and reports.

    What one process finds is beside double backward elsewhere.
    """
    number, copies, cases = CASES[name]
    if any(case.get("inside") == "distances" for case in cases):
        require_torch("2.14", "the second derivative of cdist is there")
    if any("lookahead" in case and case["layout"] != "ddp" for case in cases):
        require_torch("2.12", DIFFERENTIABLE_TWICE)
    ranks = two if number == 2 else four
    by_case = zip(*ranks.run("many", cases=cases), strict=True)
    for by_rank, case in zip(by_case, cases, strict=True):
        plain = {key: case[key] for key in case if key not in ("layout", "teacher_layout")}
        compare(list(by_rank), alone(**plain), limit=tolerance(case["mode"]), copies=copies)


@pytest.mark.parametrize(
    ("number", "layout", "optimizer", "each"),
    [
        (2, "fsdp", "sgd", False),
        # Four do not divide the widths.
        pytest.param(4, "fsdp", "sgd", False, marks=pytest.mark.long),
        pytest.param(4, "hsdp", "adamw", False, marks=pytest.mark.long),
        pytest.param(4, "ddp", "sgd", True, marks=pytest.mark.long),
    ],
)
def test_whole_trainings_are_as_in_one_process(
    two: Ranks, four: Ranks, number: int, layout: str, optimizer: str, each: bool
) -> None:
    """Scores of all examples on every rank, and derivatives in the start.

    No more than a block and the root is held.
    """
    if layout != "ddp":
        require_torch("2.12", DIFFERENTIABLE_TWICE)
    expected = sharded_cases.whole_training(None, optimizer, each=each)
    ranks = two if number == 2 else four
    by_rank = ranks.run("gathered_at_once", layout=layout, optimizer=optimizer, each=each)
    for training, most_at_once, block_and_root in by_rank:
        if layout == "fsdp":
            assert most_at_once == block_and_root
        assert training.keys() == expected.keys()
        for name, t in expected.items():
            assert float((training[name] - t).norm()) <= 1e-12 * float(t.norm()), name


@pytest.mark.long
@pytest.mark.parametrize("inside", ["dropout", "norm"])
def test_blocks_that_run_again_have_their_masks_and_statistics(two: Ranks, inside: str) -> None:
    """As replicas have, whose blocks do not."""
    require_torch("2.12", DIFFERENTIABLE_TWICE)
    sharded = two.run("whole_training", layout="fsdp", inside=inside)
    replicated = two.run("whole_training", layout="ddp", inside=inside)
    for ours, theirs in zip(sharded, replicated, strict=True):
        # Kind by kind, since a bias before a norm has a derivative of zero.
        for kind in ("scores", "losses", "params", "start", "moved"):
            ours_of_kind = {name: t for name, t in ours.items() if name.startswith(kind)}
            theirs_of_kind = {name: t for name, t in theirs.items() if name.startswith(kind)}
            assert error(ours_of_kind, theirs_of_kind) < 1e-12, kind


@pytest.mark.long
@pytest.mark.parametrize("inside", ["dropout", "norm"])
def test_replicas_repeat_a_training_with_their_own_masks_and_statistics(
    two: Ranks, inside: str
) -> None:
    for changes in two.run("trained_again", inside=inside):
        without_none, without_one, *_ = changes
        assert abs(without_none) < 1e-15 < abs(without_one)


@pytest.mark.parametrize(
    "layout", ["fsdp", pytest.param("shard_checkpoint", marks=pytest.mark.long)]
)
def test_a_path_that_failed_leaves_the_student_as_it_was(two: Ranks, layout: str) -> None:
    """A fault in a forward pass, and where a block is run again in the backward pass.

    The weights are then those of a later step.
    """
    require_torch("2.12", DIFFERENTIABLE_TWICE)
    for call in (2, 3, 4, 5):
        assert max(two.run("interrupted", layout=layout, failing_call=call)) < 1e-12, call


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_batch_norms_have_the_statistics_of_their_ranks(two: Ranks, layout: str) -> None:
    """So the numbers are those of one process that takes each batch in two parts.

    The running statistics are means.
    """
    case: dict[str, Any] = {
        "mode": "forward",
        "optimizer": "sgd",
        "inside": "norm",
        "gradients": False,
    }
    by_rank = two.run("train", layout=layout, **case)
    expected = alone(**case, accumulate=2)
    for result in by_rank:
        assert error(result["student"], expected["student"]) < 1e-10
        assert error(result["teacher"], expected["teacher"]) < 1e-10
    first, second = (result["student_buffers"] for result in by_rank)
    assert first.keys() == expected["student_buffers"].keys()
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_a_scalar_outer_loss_is_the_mean_of_the_ranks_own_and_a_pair_is_not(two: Ranks) -> None:
    case: dict[str, Any] = {"layout": "ddp", "optimizer": "sgd", "mode": "forward"}
    of_scalar = two.run("train", problem=sharded_cases.WeightedScalar(), **case)
    of_pair = two.run("train", problem=sharded_cases.Weighted(), **case)
    assert error(of_scalar[0]["teacher"], of_pair[0]["teacher"]) > 1e-6


def test_dropout_has_the_masks_of_the_inner_pass(two: Ranks) -> None:
    """Forward mode and a difference of outputs agree, which they would not with other masks."""
    case: dict[str, Any] = {"layout": "fsdp", "optimizer": "sgd", "steps": 1, "inside": "dropout"}
    forward, _ = two.run("train", mode="forward", **case)
    difference, _ = two.run("train", mode="difference", **case)
    assert error(forward["gradients"][0], difference["gradients"][0]) < 1e-6


@pytest.mark.long
def test_bfloat16_by_autocast(two: Ranks) -> None:
    """Autocast keeps casts of weights, which must not survive a move of them."""
    case: dict[str, Any] = {
        "optimizer": "sgd",
        "steps": 1,
        "dtype": torch.float32,
        "precision": "bfloat16",
    }
    for mode, parts in (("loss_difference", 1), ("forward", 2)):
        expected = alone(mode=mode, accumulate=parts, **case)
        loss = expected["scalars"][0]["outer_loss"]
        for result in two.run("train", mode=mode, layout="fsdp", accumulate=parts, **case):
            assert error(result["student"], expected["student"]) < 1e-2
            assert error(result["gradients"][0], expected["gradients"][0]) < 5e-2
            assert result["scalars"][0]["outer_loss"] == pytest.approx(loss, rel=2e-3)


@pytest.mark.parametrize(
    ("fault", "layout", "mode"),
    [
        ("stale_root", "fsdp", "loss_difference"),
        # Where the slopes differ, the first step would take double backward, which needs no
        # direction.
        ("direction_not_gathered", "fsdp", Forward(by="tangent")),
        ("gradient_not_averaged", "ddp", "reinforce"),
        ("mean_over_own_rows", "fsdp", "forward"),
        ("mean_over_own_rows", "ddp", "reinforce_per_example"),
        ("rows_of_others_forgotten", "ddp", "forward"),
    ],
)
def test_planted_faults_are_caught(two: Ranks, fault: str, layout: str, mode: Any) -> None:
    """A fault is seen by the comparison with one process, or by the checks of the library.

    All ranks see it alike.
    """
    plain: dict[str, Any] = {"mode": mode, "optimizer": "sgd", "steps": 1}
    if fault == "rows_of_others_forgotten":
        plain["problem"] = sharded_cases.OF_ALL_ROWS
    first, second = two.run("faulty", fault=fault, case={**plain, "layout": layout})
    if isinstance(first, str):
        assert first == second
        return
    with pytest.raises(AssertionError):
        compare([first, second], alone(**plain), limit=1e-3)


@pytest.mark.parametrize(
    "name", long_but_for(sharded_cases.REFUSED, {*sharded_cases.REFUSED} - {"repeated_training"})
)
def test_what_does_not_run_is_refused_on_every_rank(two: Ranks, name: str) -> None:
    """Before anything moves, and with one message, unless only one rank has seen what is wrong."""
    first, second = two.run("refused", call=name)
    assert first != "not refused"
    if name == "not_finite_on_one":
        assert first.startswith("the inner loss, the outer loss or the feedback is NaN")
        assert second == "inner inputs: 4 of 4 rows have NaN; expected finite numbers."
    else:
        assert first == second


@pytest.mark.parametrize(
    "case",
    [
        {},
        # A rank has as many rows as the matrix.
        {"rows": 2 * sharded_cases.CLASSES, "mode": Altered()},
        {"mode": Altered(alteration="random_sign"), "accumulate": 2},
        {"matrix": False, "accumulate": 2},
    ],
)
def test_feedback_on_a_signal_without_rows_is_that_of_all_processes(
    two: Ranks, case: dict[str, Any]
) -> None:
    expected = sharded_cases.without_rows(**{**case, "accumulate": 1})
    for result in two.run("without_rows", **case):
        assert result == pytest.approx(expected, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("layout", "inside"), [("replicate", "moving, scaled"), ("shard", "moving")]
)
def test_tied_weights_and_buffers_that_move(two: Ranks, layout: str, inside: str) -> None:
    """Running statistics are means over the ranks.

    Another buffer is the first rank's, on all of them.
    """
    case: dict[str, Any] = {
        "mode": "forward",
        "inside": inside,
        "gradients": False,
        "teacher_losses": (),
    }
    results = [*two.run("train", layout=layout, **case), alone(**case)]
    for role in ("teacher", "student"):
        first, second, expected = (
            {**result[role], **result[f"{role}_buffers"]} for result in results
        )
        assert first.keys() == expected.keys()
        assert all(torch.equal(t, second[name]) for name, t in first.items())
        # This buffer is of a rank's own rows.
        assert not torch.equal(first.pop("seen"), expected.pop("seen"))
        assert error(first, expected) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("inside", ["plain", "norm"])
def test_weights_gathered_in_bfloat16(two: Ranks, inside: str) -> None:
    """Forward mode goes along.

    A difference of outputs would be noise. Batch norms stay in float32, on their own.
    """
    blocks = ["", "blocks.0", "blocks.1"]
    if inside == "norm":
        blocks += ["blocks.0.inside", "blocks.1.inside"]
    for result in two.run("in_bfloat16", inside=inside):
        assert 1e-6 < error(result["bfloat16"], result["float32"]) < 0.1
        assert result["dtypes"] == {"torch.float32"}
        assert sorted(result["blocks"]) == sorted(blocks)
        assert "bfloat16" in result["difference"]


def test_layouts_that_cannot_be_are_refused() -> None:
    for wrong in (
        lambda: shard(multilayer([4, 3]), Mesh(shard=2), plan={}),
        lambda: shard(multilayer([4, 3]), Mesh(tensor=2)),
        lambda: shard(multilayer([4, 3]), Mesh(tensor=2), plan={"head": None}),
        lambda: Mesh(shard=0),
        lambda: shard(multilayer([4, 3]), Mesh(shard=2)),
        lambda: shard(multilayer([4, 3]), Mesh(), precision="bfloat16"),
        lambda: shard(multilayer([4, 3]), Mesh(shard=2), precision="half"),
        lambda: shard(multilayer([4, 3]), Mesh(shard=2), blocks=lambda n: [n]),
        lambda: shard(nn.Flatten(), Mesh(shard=2)),
        lambda: shard(
            sharded_cases.Moving(scale=False), Mesh(shard=2), blocks=lambda n: [n.layers[0]]
        ),
        lambda: shard(nn.Sequential(nn.BatchNorm1d(3)), Mesh(shard=2), checkpoint=True),
    ):
        with pytest.raises(MetaplError):
            wrong()


def test_the_blocks_of_known_families() -> None:
    import timm
    import torchvision

    with torch.device("meta"):
        blocks_by_kind = {
            "BasicBlock": blocks_of(torchvision.models.resnet18()),
            "EncoderBlock": blocks_of(torchvision.models.vit_b_16()),
            "Block": blocks_of(timm.create_model("vit_tiny_patch16_224")),
            "InvertedResidual": blocks_of(timm.create_model("tf_efficientnet_b0"))[1:],
        }
    numbers = {"BasicBlock": 8, "EncoderBlock": 12, "Block": 12, "InvertedResidual": 15}
    for kind, blocks in blocks_by_kind.items():
        assert {type(block).__name__ for block in blocks} == {kind}
        assert len(blocks) == numbers[kind]


def check_fits(by_rank: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for fit in by_rank:
        assert fit["step"] == expected["step"]
        for part in ("weights", "teacher", "tuned"):
            assert error(fit[part], expected[part]) < 1e-10
        for row, expected_row in zip(fit["history"], expected["history"], strict=True):
            assert row == pytest.approx(expected_row, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_fit_is_as_in_one_process_and_the_first_rank_writes(
    two: Ranks, layout: str, tmp_path: Path
) -> None:
    """With averaged weights, which are validated and kept."""
    by_rank = two.run("fitted", layout=layout, out=str(tmp_path / "run"), ema_decay=0.7)
    expected = sharded_cases.fitted(None, str(tmp_path / "one"), ema_decay=0.7)
    check_fits(by_rank, expected)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps_written = [row["step"] for row in rows if row["phase"] == "fit"]
    assert steps_written == [row["step"] for row in expected["history"]]


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_the_first_rank_says_what_goes_wrong_as_one_process_does(two: Ranks, layout: str) -> None:
    expected = sharded_cases.said(None)
    assert [line for line in expected if "hardly moved" in line]
    first, second = two.run("said", layout=layout)
    assert second == []

    def without_numbers(lines: list[str]) -> list[str]:
        return [line.partition(", by")[0] for line in lines]

    if layout == "fsdp":
        # Of a sharded network the first rank looks at its own part.
        assert without_numbers(first) == without_numbers(expected)
    else:
        assert first == expected


@pytest.mark.parametrize("layout", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_a_fit_that_was_stopped_goes_on_bit_for_bit_in_as_many_processes(
    two: Ranks, layout: str, tmp_path: Path
) -> None:
    """With dropout, whose masks are of the generators of each process."""
    case = {"layout": layout, "inside": "dropout"}
    uninterrupted = two.run("fitted", **case, out=str(tmp_path / "whole"))
    two.run("fitted", **case, out=str(tmp_path / "run"), stop=3)
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints" / "fit").iterdir())]
    # Every process writes its part of what is sharded.
    suffix = "ckpt" if layout == "ddp" else "parts"
    assert names == [f"step-00000002.{suffix}"]
    resumed = two.run("fitted", **case, out=str(tmp_path / "run"), resume=True)
    for ours, expected in zip(resumed, uninterrupted, strict=True):
        for part in ("weights", "teacher"):
            assert all(torch.equal(ours[part][name], t) for name, t in expected[part].items())
    assert resumed[0]["history"] == uninterrupted[0]["history"]


@pytest.mark.parametrize(
    ("first_layout", "second_layout"),
    [
        ("ddp", "fsdp"),
        pytest.param("fsdp", None, marks=pytest.mark.long),
        pytest.param(None, "fsdp", marks=pytest.mark.long),
        pytest.param("fsdp", "hsdp", marks=pytest.mark.long),
    ],
)
def test_a_fit_goes_on_in_another_layout(
    two: Ranks, four: Ranks, first_layout: str | None, second_layout: str | None, tmp_path: Path
) -> None:
    """The numbers are those of one process; None is a layout in one process."""
    expected = sharded_cases.fitted(None, str(tmp_path / "whole"))

    def fit(layout: str | None, **options: Any) -> list[dict[str, Any]]:
        out = str(tmp_path / "run")
        if layout is None:
            return [sharded_cases.fitted(layout, out, **options)]
        ranks = four if layout == "hsdp" else two
        return ranks.run("fitted", layout=layout, out=out, **options)

    fit(first_layout, stop=2)
    resumed = fit(second_layout, resume=True)
    check_fits(resumed, expected)
    # The hooks by which a network is sharded are no state of it.
    assert not [line for line in resumed[0]["said"] if "not restored" in line]


def test_a_checkpoint_that_fails_on_the_first_rank_ends_on_all(two: Ranks, tmp_path: Path) -> None:
    first, second = two.run("unwritten", folder=str(tmp_path))
    assert first == second
    assert all(text.startswith(str(tmp_path)) for text in first)
    assert all("could not be written" in text and "a bug" in text for text in first)
    assert [*tmp_path.iterdir()] == []
