"""The rivals of the study of people's labels do what their papers say."""

import importlib
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]


@pytest.fixture
def people() -> ModuleType:
    return importlib.import_module("people_labels")


def random_examples(seed: int) -> tuple[Tensor, Tensor]:
    """Return logits of 40 examples in ten classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(40, 10, generator=generator)
    return logits, torch.randint(10, (40,), generator=generator)


class Outputs(nn.Module):
    """Returns what goes in, as the outputs of a network."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_confident_learning_removes_what_is_off_the_diagonal(people: ModuleType) -> None:
    logits, labels = random_examples(0)
    p = logits.softmax(1).tolist()
    given = labels.tolist()
    thresholds = {}
    for c in set(given):
        own = [row[c] for row, label in zip(p, given, strict=True) if label == c]
        thresholds[c] = sum(own) / len(own)
    expected = []
    for row, label in zip(p, given, strict=True):
        confident = [c for c in thresholds if row[c] >= thresholds[c]]
        expected.append(bool(confident) and max(confident, key=lambda c: row[c]) != label)
    found = people.confident_issues(logits.softmax(1), labels).tolist()
    assert found == expected
    assert 0 < sum(expected) < len(expected)


def test_gold_correction_is_cross_entropy_through_the_matrix_of_noisy_examples_alone(
    people: ModuleType,
) -> None:
    logits, labels = random_examples(1)
    matrix = people.gold_matrix(logits.softmax(1), torch.arange(40) % 10)
    assert torch.allclose(matrix[3], logits.softmax(1)[3::10].mean(0))
    loss = people.GoldCorrection(matrix, trusted_from=30)
    found = loss(Outputs(), (logits, labels, torch.arange(40)), 0.0)
    total = 0.0
    for number, (row, label) in enumerate(zip(logits.softmax(1), labels.tolist(), strict=True)):
        p = row[label]
        if number < 30:
            p = sum(row[c] * matrix[c, label] for c in range(10))
        total -= math.log(p) / 40
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_each_network_of_co_teaching_learns_what_the_other_finds_easy(people: ModuleType) -> None:
    """At the end half is left out; of two examples the first network finds one easy each."""
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.0]]))
        second.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 5.0]]))
    # The first network is sure of example 0, which has label 0, and the second one of example 1.
    batch = (torch.eye(2), torch.tensor([0, 1]), torch.arange(2))
    loss = people.co_teaching(forgotten=0.5)(nn.ModuleList([first, second]), batch, 1.0)
    assert loss.item() == pytest.approx(2 * math.log(2))
    all_of_them = people.co_teaching(forgotten=0.5)(nn.ModuleList([first, second]), batch, 0.0)
    sure = math.log(1 + math.exp(-5))
    assert all_of_them.item() == pytest.approx(math.log(2) + sure)


def test_early_learning_and_generalized_cross_entropy_are_their_formulas(
    people: ModuleType,
) -> None:
    logits, labels = random_examples(2)
    batch = (logits, labels, torch.arange(40))
    p = logits.double().softmax(1)
    of_label = p[torch.arange(40), labels]
    q_loss = people.generalized_cross_entropy(0.7)(Outputs(), batch, 0.0)
    assert q_loss.item() == pytest.approx(((1 - of_label**0.7) / 0.7).mean().item(), rel=1e-5)
    early = people.EarlyLearning(40, weight=3.0)
    early(Outputs(), batch, 0.0)
    second = early(Outputs(), batch, 0.0)
    # After two equal predictions the target is (1 - 0.7^2) p.
    agreement = (0.51 * p * p).sum(1)
    expected = -of_label.log().mean() + 3 * (1 - agreement).log().mean()
    assert second.item() == pytest.approx(expected.item(), rel=1e-2)


def test_methods_of_the_library_take_the_steps_that_their_work_pays_for(
    people: ModuleType,
) -> None:
    size = people.MINIATURE
    alone, with_feedback = people.costs("example_weights", size)
    assert (alone, 2.5 < with_feedback < 3.5) == (1.0, True)
    for share in (None, 0.7):
        steps = people.affordable("example_weights", 100, size, share)
        first = people.first_steps("example_weights", steps, share)
        assert first == round((0.1 if share is None else share) * steps)
        spent = first + with_feedback * (steps - first)
        assert 100 - 2 * with_feedback < spent <= 100
