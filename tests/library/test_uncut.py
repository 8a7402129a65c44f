"""A teacher that is not cut, beside a student whose products or images are: the numbers of one process, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import uncut_cases
from ranks import Ranks
from reference import error
from test_sharded import tolerance

METHODS = tuple(uncut_cases.TEACHERS)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "uncut_cases")
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4, "uncut_cases")
    yield ranks
    ranks.close()


@cache
def alone(method: str, mode: str, images: bool) -> dict[str, Any]:
    """The same in this process, with the whole batch."""
    return uncut_cases.train(method, mode, None, images)


def check(ranks: Ranks, cases: list[dict[str, Any]]) -> None:
    found = ranks.run("many", cases=cases)
    for i, case in enumerate(cases):
        expected, limit = alone(case["method"], case["mode"], case["images"]), tolerance(case["mode"])
        for own in (each[i] for each in found):
            for part in ("gradient", "teacher", "student"):
                assert error(own[part], expected[part]) < limit, (case, part)
            for row, other in zip(own["scalars"], expected["scalars"], strict=True):
                assert row == pytest.approx(other, rel=limit, abs=limit, nan_ok=True), case


@pytest.mark.parametrize("method", METHODS)
def test_each_method_beside_a_cut_student_is_as_in_one_process(two: Ranks, method: str) -> None:
    """Weights of examples and matrices of noise stay whole; a corrector of labels is cut as the student is."""
    images = [{"mode": mode, "mesh": {"spatial": 2}, "images": True} for mode in ("forward", "difference")]
    products = {"mode": "difference", "mesh": {"tensor": 2}, "images": False}
    check(two, [{"method": method, **case} for case in (*images, products)])


@pytest.mark.parametrize(
    ("method", "others"),
    [
        ("example_weights", ("shard", "replicate")),
        ("label_correction", ("shard",)),
        pytest.param("label_correction", ("replicate",), marks=pytest.mark.long),
        pytest.param("noise_transition", ("shard", "replicate"), marks=pytest.mark.long),  # a table too
    ],
)
def test_shares_of_the_rows_beside_cuts(four: Ranks, method: str, others: tuple[str, ...]) -> None:
    """Each share of the rows counts once, however many processes hold it."""
    cut = [{"mode": "forward", "mesh": {other: 2, "spatial": 2}, "images": True} for other in others]
    products = {"mode": "difference", "mesh": {"shard": 2, "tensor": 2}, "images": False}
    check(four, [{"method": method, **case} for case in (*cut, products)])


def test_the_gradient_is_that_of_double_backward(two: Ranks) -> None:
    for images, mesh, mode in ((True, {"spatial": 2}, "forward"), (False, {"tensor": 2}, "difference")):
        expected = uncut_cases.by_double_backward(images)
        for own in two.run("train", method="meta_weight_net", mode=mode, mesh=mesh, images=images, steps=1):
            assert error(own["gradient"], expected) < tolerance(mode)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("reads columns", "processes that hold the same rows have different signals of the teacher"),
        ("waits on columns", "processes that hold the same rows have different losses of the teacher"),
        ("other weights", "processes that hold the same rows have different signals of the teacher"),
        ("other rows", "processes that hold the same rows have different labels, or other whole numbers of a batch,"),
        ("other labels", "processes that hold the same rows have different labels, or other whole numbers of a batch,"),
        ("other inputs", "processes that hold the same rows have different rows of a batch"),
        (
            "cut beside whole",
            "by parallelize_module over the processes 0, 1, of which 2 share each row, the student i",
        ),
        ("images beside products", "over the processes 0, 1, of which 2 share each row, the student sharded by par"),
        (
            "a table by products",
            "A teacher that has nothing to cut, beside a student that is cut: shard(teacher",
        ),
        ("weights by images", "the WeightNet cannot take the example of shape (2, 3, 8, 8)"),
    ],
)
def test_what_would_be_wrong_is_refused_on_every_rank_with_one_message(two: Ranks, how: str, text: str) -> None:
    first, second = two.run("refused", how=how)
    assert text in first
    assert first == second
