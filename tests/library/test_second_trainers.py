"""A compiled trainer takes the graph of another one with the same description, and no other."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from captures import without_inductor
from torch import Tensor, nn

import metapl
from metapl.functional import graphs as graphs_kept


class Scaled(nn.Module):
    """A network that reads an attribute and a variable of its file."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.scale * FACTOR * x)


FACTOR = 1.0


def of_second(seed: int, **options: Any) -> metapl.BilevelTrainer:
    """Return a trainer of fresh networks; options of its networks and optimizers by name."""
    torch.manual_seed(seed)
    scale = options.pop("scale", 1.0)
    teacher, student = (Scaled(scale).double() for _ in range(2))
    if options.pop("frozen", False):
        student.layers[0].bias.requires_grad_(requires_grad=False)
    if options.pop("act", False):
        student.layers[2] = nn.ReLU()
    if options.pop("evaluates", False):
        teacher.layers[1].eval()
    weights: Any = [p for p in student.parameters() if p.requires_grad]
    if options.pop("groups", False):
        weights = [{"params": weights[:2], "lr": 0.2}, {"params": weights[2:]}]
    momentum = options.pop("momentum", 0.9)
    options.setdefault("compile", True)
    return metapl.BilevelTrainer(
        teacher,
        student,
        options.pop("mode", "forward"),
        inner_optimizer=torch.optim.SGD(weights, lr=0.1, momentum=momentum),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=options.pop("rate", 0.1)),
        **options,
    )


def trained_second(seed: int, **options: Any) -> Tensor:
    trainer = of_second(seed, **options)
    draw = torch.Generator().manual_seed(3)
    for _ in range(3):
        x, u = torch.randn(2, 6, 4, generator=draw, dtype=torch.float64)
        trainer.step((x, torch.arange(6) % 3), u)
    return torch.cat([p.detach().flatten() for p in trainer.teacher.parameters()])


@pytest.mark.parametrize("options", [{}, {"rate": 0.3}], ids=str)
def test_a_second_trainer_of_an_architecture_records_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_kept, "_CACHE", {})
    graphs = without_inductor(monkeypatch)
    trained_second(0)
    assert len(graphs) == 1
    found = trained_second(1, **options)
    assert len(graphs) == 1
    assert (found - trained_second(1, **options, compile=False)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 2.0},
        {"frozen": True},
        {"act": True},
        {"evaluates": True},
        {"groups": True},
        {"momentum": 0.0},
        {"mode": "reinforce_per_example"},
        {"clip_norm": 0.1},
        {"feedback_weight": 0.5},
        {"teacher_losses": (metapl.CrossEntropy(label_smoothing=0.2),)},
        {"problem": metapl.PseudoLabels(temperature=0.5)},
        {"FACTOR": 3.0},
    ],
    ids=str,
)
def test_a_second_trainer_of_something_else_has_a_graph_of_its_own(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_kept, "_CACHE", {})
    graphs = without_inductor(monkeypatch)
    trained_second(0)
    monkeypatch.setitem(globals(), "FACTOR", options.pop("FACTOR", 1.0))
    torch.manual_seed(5)
    found = trained_second(1, **dict(options))
    assert len(graphs) == 2
    torch.manual_seed(5)
    assert (found - trained_second(1, **dict(options), compile=False)).abs().max() < 1e-12


def test_the_graph_of_a_trainer_holds_none_of_its_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_kept, "_CACHE", {})
    without_inductor(monkeypatch)
    trainer = of_second(0)
    trainer.step(
        (torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3), torch.randn(6, 4).double()
    )
    networks = [weakref.ref(trainer.teacher), weakref.ref(trainer.student)]
    del trainer
    gc.collect()
    assert [network() for network in networks] == [None, None]


class Recurrent(nn.Module):
    """A network whose recurrent part holds its weights a second time, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x[..., None])
        return self.head(states[:, -1])


class Listed(nn.Module):
    """A network that holds its layers a second time, in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.layers = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_a_forward_of_torch_that_was_replaced_has_a_graph_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs_kept, "_CACHE", {})
    graphs = without_inductor(monkeypatch)
    trained_second(0)
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x.clamp(-0.1, 0.1))
    found = trained_second(1)
    assert len(graphs) == 2
    assert (found - trained_second(1, compile=False)).abs().max() < 1e-12


@pytest.mark.parametrize(("network", "graphs_made"), [(Recurrent, 1), (Listed, 3)])
def test_no_graph_holds_the_weights_of_trainers_that_are_gone(
    network: type[nn.Module], graphs_made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_kept, "_CACHE", {})
    graphs = without_inductor(monkeypatch)
    weights: list[weakref.ref[Tensor]] = []
    batches = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(6, 4)
    for _ in range(3):
        trainer = metapl.BilevelTrainer(nn.Linear(4, 3), network(), compile=True)
        trainer.step(*batches)
        weights += map(weakref.ref, trainer.student.parameters())
        del trainer
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert len(graphs) == graphs_made
