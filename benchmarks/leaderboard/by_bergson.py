"""Write the scores of one training by bergson's MAGIC; methods.py runs it, with bergson's Python.

    rival/bin/python benchmarks/leaderboard/by_bergson.py training.pt scores.npy

bergson's Trainer, optimizers, checkpoints and backward pass run as they are, in float64; in the
place of its data stream stand the examples of the task. It needs no metapl and no scikit-learn.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchopt
from bergson.magic.trainer import BackwardState, Trainer
from tasks import TASKS, Task, example_losses
from torch import Tensor, nn


class Stream:
    """What bergson's Trainer asks of a data stream: the batches of a task, and their weights."""

    requires_grad = True
    device = torch.device("cpu")

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs, self.labels = inputs["train"]
        self.order = inputs["order"]
        self.weights = nn.Parameter(torch.ones(len(self.labels), dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rows = self.order[step]
        return {
            "input_ids": self.inputs[rows],
            # bergson reads what is called "labels" as those of tokens.
            "y": self.labels[rows],
            "weights": self.weights[rows],
        }


class Weighted(nn.Module):
    """What bergson's Trainer calls: the loss of a batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, y: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        return (weights * example_losses(self.network(input_ids), y)).mean()


def in_double(examples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, labels = examples
    return (inputs.double() if inputs.is_floating_point() else inputs), labels


def transform_of(task: Task) -> Any:
    rates = task.rates()

    def rate(step: int) -> float:
        return rates[min(int(step), len(rates) - 1)]

    if task.rule == "sgd":
        return torchopt.sgd(rate, momentum=0.9)
    # The root of zero has no derivative, so that a small number stands under it.
    return torchopt.adamw(rate, eps=1e-6, eps_root=1e-30, weight_decay=0.01)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    inputs = torch.load(source)
    # TorchOpt's counts of steps become tensors of the default type, and with them the rates.
    torch.set_default_dtype(torch.float64)
    task = TASKS[inputs["task"]]
    network = task.network().double()
    network.load_state_dict(inputs["weights"])
    inputs["train"] = in_double(inputs["train"])
    with tempfile.TemporaryDirectory() as folder:
        trainer, state = Trainer.initialize(Weighted(network), transform_of(task))
        stream = Stream(inputs)
        state = trainer.train(
            state.detach_(), stream, inplace=True, save_dir=folder, save_mode="all"
        )
        with state.activate(trainer.model) as params:
            outer = trainer.model(*in_double(inputs["outer"]))
            gradients = torch.autograd.grad(outer, list(params.values()))
            in_params = dict(zip(params, gradients, strict=True))
        others = state.differentiable_tensors()[len(in_params) :]
        adjoint = BackwardState(
            in_params, [torch.zeros_like(t) for t in others], torch.zeros_like(stream.weights)
        )
        adjoint = trainer.backward(folder, stream, adjoint, state, inplace=True, save_mode="all")
    np.save(target, -adjoint.weight_grads.detach().numpy())


if __name__ == "__main__":
    main()
