"""Images cut along their width: the numbers of whole images, in every pass, on two and on four processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "spatial_cases")
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4, "spatial_cases")
    yield ranks
    ranks.close()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["layers", "small_cnn", "on_pooled"])
def test_every_pass_on_two_processes(two: Ranks, name: str, training: bool) -> None:
    for found in two.run("passes", kind=name, training=training):
        assert found.keys() >= {"outputs", "gradient", "hessian product", "tangent"}
        assert max(found.values()) < 1e-11, found


def test_every_pass_on_four_processes(four: Ranks) -> None:
    for found in four.run("passes", kind="layers", side=128, rows=3):
        assert max(found.values()) < 1e-11, found


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("columns that are not given back", "gradient"),
        ("a sum that is not summed backwards", "gradient"),
        ("a tangent without halo", "tangent"),
        ("a tangent that is not summed", "tangent"),
    ],
)
def test_planted_faults_are_found(two: Ranks, fault: str, what: str) -> None:
    for found in two.run("passes", kind="layers", fault=fault):
        assert found[what] > 1e-3
        assert found["outputs"] < 1e-12


def test_a_network_of_torchvision(two: Ranks) -> None:
    for found in two.run("passes", kind="resnet", rows=2):
        assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("name", ["layers", "small_cnn"])
def test_a_training(two: Ranks, name: str) -> None:
    assert max(two.run("training", kind=name)) < 1e-11


@pytest.mark.parametrize(("left", "right"), [(1, 1), (2, 0), (0, 3), (8, 5)])
def test_the_backward_pass_is_the_adjoint(four: Ranks, left: int, right: int) -> None:
    for differences in four.run("adjoint", left=left, right=right):
        assert max(map(abs, differences)) < 1e-13


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("width", "images of width 17 cannot be cut for 2 processes"),
        ("stride", "0 (kernel 3, stride 2, padding 1, dilation 1) makes of 10 columns a number that 2 processes"),
        ("halo", "0 needs 10 columns beside its own, and each process has 8"),
        ("no padding", "makes of 16 columns a number that 2 processes with 8 each do not share evenly"),
        ("mean", "its own code reads across the width (x.mean((2, 3))"),
        ("upsampling", "0, Upsample(scale_factor=2.0, mode='nearest'), has no form for images cut along their width"),
        ("pool", "0, AdaptiveAvgPool2d(output_size=2), has no form"),
        ("reflect", "expected Conv2d padded by zeros"),
        ("alone", "spatial was given a Conv2d alone; expected a network around it"),
        ("behind zeros", "its own code reads across the width"),
        ("slopes drawn", "draws for single pixels (torch.nn.RReLU, AlphaDropout, F.dropout)"),
        ("pixels dropped", "draws for single pixels (torch.nn.RReLU, AlphaDropout, F.dropout)"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_process_and_stays(two: Ranks, case: str, words: str) -> None:
    for text in two.run("refused", case=case):
        assert words in text


def test_dropout_of_pixels_is_refused(two: Ranks) -> None:
    for text in [*two.run("dropped", rows=2), *two.run("dropped", rows=1)]:
        assert text.startswith("1, Dropout(p=0.5, inplace=False), has no form for images cut along their width")


MODES = ("none", "reinforce", "reinforce_per_example", "loss_difference", "difference", "forward")


@pytest.mark.parametrize(
    "mode", [mode if mode in ("forward", "reinforce") else pytest.param(mode, marks=pytest.mark.long) for mode in MODES]
)
def test_a_trainer_takes_the_steps_of_one_process(two: Ranks, mode: str) -> None:
    """Images in two parts, weights in two copies, every mode."""
    for found in two.run("parity", mode=mode, optimizer="sgd"):
        assert max(found.values()) < (1e-6 if mode == "difference" else 1e-10), found


@pytest.mark.parametrize(
    ("mode", "optimizer", "mesh"),
    [
        ("forward", "adamw", {"shards": 2}),
        pytest.param("forward", "sgd", {"replicate": 2}, marks=pytest.mark.long),
        ("forward", "adamw", {"spatial": 4}),
        ("difference", "sgd", {"tensor": 2}),
        pytest.param("reinforce", "sgd", {"shards": 2}, marks=pytest.mark.long),
        pytest.param("difference", "sgd", {"shards": 2}, marks=pytest.mark.long),
        pytest.param("reinforce", "adamw", {"tensor": 2}, marks=pytest.mark.long),
    ],
)
def test_rows_in_two_shares_and_images_in_parts(four: Ranks, mode: str, optimizer: str, mesh: dict[str, int]) -> None:
    """And products of layers by two processes. Batch norm counts each share's rows alone, so the networks normalize by
    running statistics here."""
    for found in four.run("parity", mode=mode, optimizer=optimizer, **mesh):
        assert max(found.values()) < (1e-6 if mode == "difference" else 1e-10), found


@pytest.mark.long
@pytest.mark.parametrize("sizes", [{"shards": 2}, {"replicate": 2}])
def test_rows_in_two_shares_images_in_parts_and_products_together(sizes: dict[str, int]) -> None:
    ranks = Ranks(8, "spatial_cases")
    try:
        for found in ranks.run("parity", mode="reinforce", optimizer="sgd", tensor=2, **sizes):
            assert max(found.values()) < 1e-10, found
    finally:
        ranks.close()


def test_a_network_that_nothing_averages_is_refused(two: Ranks) -> None:
    for text in two.run("unwrapped"):
        assert "nothing averages its gradients over the processes that hold the parts" in text


def test_different_labels_for_parts_of_the_same_images_are_refused(two: Ranks) -> None:
    for text in two.run("seeded_apart"):
        assert "have drawn different labels for them; seed their default generators alike" in text
