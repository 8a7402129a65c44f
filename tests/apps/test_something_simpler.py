"""What stands beside metapl on the page "Something simpler" is what it says it is."""

import importlib
import re
from types import ModuleType

import pytest
import torch
from benchmark_runs import RESULTS, ROOT
from sklearn import datasets, preprocessing

from benchmarks.harness import points, read

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]


@pytest.fixture
def simpler() -> ModuleType:
    return importlib.import_module("something_simpler")


def test_the_step_by_hand_is_that_of_the_trainer(simpler: ModuleType) -> None:
    """Three steps of both networks, with momentum, weight decay and the teacher's own loss."""
    moved = []
    for way in ("by hand", simpler.EAGER):
        torch.manual_seed(0)
        pair, data = simpler.NETWORKS["tiny"].make()
        start = torch.nn.utils.parameters_to_vector(pair[0].parameters()).detach().clone()
        if way == "by hand":
            step, weights = simpler.by_hand(pair, data, compiled=False)
        else:
            step, weights = simpler.way_of(way, pair, data)
        for _ in range(3):
            step()
        moved.append(weights() - start)
    by_hand, by_trainer = moved
    assert (by_hand - by_trainer).norm() < 1e-5 * by_trainer.norm()


def test_a_wrong_label_is_the_next_digit_and_checked_ones_are_right(simpler: ModuleType) -> None:
    digits = simpler.drawn_digits(0)
    x, y = datasets.load_digits(return_X_y=True)
    pictures = torch.tensor(preprocessing.scale(x)).float()

    def shift_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, labels = batch
        rows = torch.cdist(inputs, pictures).argmin(1)
        assert torch.equal(inputs, pictures[rows])
        return (labels - torch.tensor(y)[rows]) % 10

    shift = shift_of(digits.noisy)
    assert set(shift.tolist()) == {0, 1}
    assert shift.double().mean().item() == pytest.approx(0.4, abs=0.05)
    assert not shift_of(digits.checked).any()
    assert not shift_of(digits.test).any()


def test_the_page_of_published_methods_says_what_the_rows_say(simpler: ModuleType) -> None:
    rows = read(RESULTS / "something_simpler.jsonl")
    page = (ROOT / "docs" / "meta-learning.md").read_text()
    ((weights, gold),) = re.findall(r"([\d.]+) %, gold loss correction ([\d.]+)", page)
    for arm, said in ((simpler.WEIGHTS, weights), (simpler.GOLD, gold)):
        assert float(said) == points(simpler.accuracies(rows, case="wrong_labels", arm=arm))


def test_the_page_is_short() -> None:
    text = (ROOT / "docs" / "something-simpler.md").read_text()
    prose = re.sub(r"^(?:\||<!--).*$", "", text, flags=re.MULTILINE)
    assert len(prose.split()) <= 700
