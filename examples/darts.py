"""DARTS: learn which operation a network has, by the loss after its step.

    python examples/darts.py [SEED] [--steps N]

On one edge stand three operations on the digits: a convolution, a convolution of every second
pixel, and the mean of the neighborhood, which has no weights. Behind them is one linear layer, so
the mix of the operations is the mix of what it makes of each:

    f(x) = Σ_o softmax(α)_o head(op_o(x))

The weights take steps on one half of the labeled digits. α learns from the loss on the other half
after such a step, which depends on α twice: by the weights that the step leaves, and by the mix
itself, at fixed weights. The problem holds the module with α, and metapl adds that second, direct
term; their sum is the second-order gradient of DARTS. The direct term alone, ``mode="direct"``, is
its first order. Printed beside both is the same training with α as it began. Source: Liu, Simonyan
and Yang, DARTS, 2019.
"""

import argparse
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Signal
from metapl.data import StepSampler
from metapl.pictures import load_digits_split

OPERATIONS = ("convolution", "dilated convolution", "mean")
CHANNELS = 8


class Mix(nn.Module):
    """The teacher: α, by which the outputs (B, O, C) of the operations are mixed to (B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(len(OPERATIONS)))

    def forward(self, outputs_BOC: Tensor) -> Tensor:
        return mixed(self.alpha, outputs_BOC)


def mixed(alpha: Tensor, outputs_BOC: Tensor) -> Tensor:
    return torch.einsum("o,boc->bc", alpha.softmax(0), outputs_BOC)


class Cell(nn.Module):
    """The student: what the head makes of each operation, (B, O, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.operations = nn.ModuleList(
            [
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2),
                nn.AvgPool2d(3, stride=1, padding=1),
            ]
        )
        self.head = nn.Linear(CHANNELS * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x).relu()
        outputs = []
        for operation in self.operations:
            outputs.append(self.head(F.avg_pool2d(operation(hidden).relu(), 2).flatten(1)))
        return torch.stack(outputs, dim=1)


class Darts(metapl.BilevelProblem):
    """Both losses are the cross-entropy of the mix; the outer one reads the module of α."""

    signal_has_rows: ClassVar[Any] = False

    def __init__(self, mix: Mix) -> None:
        self.mix = mix

    def signal(self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any) -> Signal:
        return Signal(teacher.alpha)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(mixed(signal.value, outputs), batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(self.mix(outputs), batch[1])


def trained(
    seed: int, steps: int, *, mode: metapl.feedback.Mode, rate_of_alpha: float
) -> tuple[float, list[float]]:
    """Return the test accuracy of a training, in percent, and the weights of the operations."""
    split = load_digits_split(labels_per_class=20, seed=seed)
    torch.manual_seed(seed)
    mix = Mix()
    cell = Cell()
    trainer = metapl.BilevelTrainer(
        mix,
        cell,
        mode,
        problem=Darts(mix),
        teacher_losses=(),
        inner_optimizer=torch.optim.SGD(cell.parameters(), lr=0.1, momentum=0.9),
        outer_optimizer=torch.optim.Adam(mix.parameters(), lr=rate_of_alpha),
        feedback_weight=1.0,
    )
    x, y = split.labeled
    halves = torch.randperm(len(x)).chunk(2)
    samplers = [StepSampler(len(half), 32, seed=seed, stream=n) for n, half in enumerate(halves)]
    for step in range(steps):
        outer, inner = (
            half[sampler.indices(step)] for half, sampler in zip(halves, samplers, strict=True)
        )
        trainer.step((x[outer], y[outer]), (x[inner], y[inner]))
    x_test, y_test = split.test
    with torch.no_grad():
        accuracy = (mix(cell(x_test)).argmax(1) == y_test).float().mean()
    return 100 * float(accuracy), mix.alpha.softmax(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    arms: list[tuple[str, metapl.feedback.Mode, float]] = [
        ("second order", "forward", 0.03),
        ("first order", "direct", 0.03),
        ("not learned", "none", 0.0),
    ]
    for title, mode, rate in arms:
        accuracy, weights = trained(options.seed, options.steps, mode=mode, rate_of_alpha=rate)
        shares = ", ".join(f"{n} {w:.2f}" for n, w in zip(OPERATIONS, weights, strict=True))
        print(f"architecture {title}: {accuracy:.1f} ({shares})")


if __name__ == "__main__":
    main()
