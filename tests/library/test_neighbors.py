"""Other libraries around metapl's results, as examples and ``docs/neighbors.md`` have them.

The references are loops by hand, which know nothing of metapl.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metapl

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning"),  # those of other libraries
    pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the examples are not installed"),
]

STEPS = 3
RATE = 0.4


def example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name=name))


def scores_by_hand(network: nn.Linear, order: Tensor, train: TensorDataset, test: Tensor) -> Tensor:
    """Return minus the derivative of the loss on one test row in the weights of the examples."""
    x, y = train.tensors
    weights = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    matrix, bias = network.weight, network.bias
    for rows in order:
        losses = F.cross_entropy(x[rows] @ matrix.T + bias, y[rows], reduction="none")
        mean = (weights[rows] * losses).mean()
        slopes = torch.autograd.grad(mean, (matrix, bias), create_graph=True)
        matrix, bias = (p - RATE * slope for p, slope in zip((matrix, bias), slopes, strict=True))
    loss = F.cross_entropy(x[test] @ matrix.T + bias, y[test])
    return -torch.autograd.grad(loss, weights)[0]


def test_an_attributor_of_dattri_has_the_derivative_by_the_order_of_its_loaders() -> None:
    pytest.importorskip("dattri", reason="dattri, which is no extra, is not installed")
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3)
    network = nn.Linear(4, 3).double()
    training = {
        "optimizer": torch.optim.SGD(network.parameters(), lr=RATE),
        "steps": STEPS,
        "batch_size": 5,
        "progress": False,
    }
    attributor = example("with_dattri").WholeTraining(network, **training)
    attributor.cache(DataLoader(data))
    asked = [7, 2]
    scores = attributor.attribute(
        DataLoader(data, batch_size=4), DataLoader(data, batch_size=2, sampler=asked)
    )
    order = metapl.attribute(network, data, data, **training).order
    expected = [scores_by_hand(network, order, data, torch.tensor([row])) for row in asked]
    assert scores.shape == (12, 2)
    assert torch.allclose(scores, torch.stack(expected, dim=1), rtol=0, atol=1e-12)


def without_dropout(network: nn.Module) -> nn.Module:
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return network.double()


def test_a_trainer_learns_sequences_by_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed, which Trainer needs")
    script = example("weights_in_a_trainer")
    torch.manual_seed(0)
    sequences = torch.randint(script.WORDS, (4, script.LENGTH))
    weights = torch.tensor([0.0, 0.5, 1.0, 2.5], dtype=torch.float64)
    given = script.arguments(str(tmp_path), STEPS)
    given.per_device_train_batch_size = len(sequences)  # so that the order does not matter
    student, by_hand = without_dropout(script.model()), without_dropout(script.model())
    trained = script.train_again(student, sequences, weights, given)

    optimizer = torch.optim.AdamW(
        by_hand.parameters(), lr=given.learning_rate, eps=given.adam_epsilon, weight_decay=0.0
    )
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = given.learning_rate * (1 - step / STEPS)
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for ids, weight in zip(sequences, weights, strict=True):
            logits = by_hand(ids[None]).logits[0]
            total = total + weight * F.cross_entropy(logits[:-1], ids[1:])
        (total / len(sequences)).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), given.max_grad_norm)
        optimizer.step()
    ends = zip(trained.parameters(), by_hand.parameters(), strict=True)
    assert max(float((p - q).detach().abs().max()) for p, q in ends) < 1e-8


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "name"),
    [("dattri", "with_dattri"), ("transformers", "weights_in_a_trainer")],
)
def test_the_examples_run(package: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    result = example(name).main(20)
    assert torch.isfinite(result).all()
    assert capsys.readouterr().out
