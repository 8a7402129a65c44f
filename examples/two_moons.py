r"""Two moons with six labels, Meta Pseudo Labels' toy experiment: python examples/two_moons.py

    2,000 points on two moons, 3 of each labeled; teacher and student have two hidden layers of 8
    sigmoid units and initial weights in ±0.1, and learn by SGD at the constant rate 0.1

A run succeeds if it classifies more than 95 % of its points as they were drawn. Printed are the
runs that do, with the 95 % interval of their share, for supervised learning, pseudo-labels of the
network that learned so, MPL, and the same loop without feedback; ``--out`` names the picture of the
decision regions. ``--uda`` takes tanh, weights in ±0.5, the rate 0.3, 3,000 steps, and lets every
teacher also give a noisy copy of a point the sharpened label of the point itself.

All seeds are trained side by side, as one network whose rows are theirs in turn. A mean over the
rows of R runs divides the loss of each by R and mixes none of them, so SGD with R times the rate
takes the step of each run alone, the feedback included: w_r = -(Rη) ∇L_r/R = -η ∇L_r.
"""

import argparse
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.datasets import make_moons
from torch import Tensor, nn

import metapl
from metapl.metrics import interval

SUCCESS = 0.95
METHODS = ("supervised", "pseudo-labels", "MPL", "no feedback")


class Networks(nn.Module):
    """R fully connected classifiers of points.

    The rows are R equal parts, of which each network gets its own.
    """

    def __init__(self, seeds: range, stream: int, scale: float, activation: nn.Module) -> None:
        super().__init__()
        generators = [torch.Generator().manual_seed(2 * seed + stream) for seed in seeds]

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.stack([scale * (2 * torch.rand(shape, generator=g) - 1) for g in generators])
            )

        sizes = (2, 8, 8, 2)
        self.weights = nn.ParameterList(uniform(m, n) for m, n in pairwise(sizes))
        self.biases = nn.ParameterList(uniform(1, n) for n in sizes[1:])
        self.activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.unflatten(0, (len(self.biases[0]), -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, self.activation(x) if i else x, weight)
        return x.flatten(0, 1)


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Draw 2,000 points in random order, but three of each moon first: these are labeled."""
    x, y = make_moons(2000, noise=0.1, random_state=seed)
    few = [i for c in (0, 1) for i in np.flatnonzero(y == c)[:3]]
    order = [*few, *np.setdiff1d(np.arange(len(y)), few)]
    return torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])


class Moons:
    """The runs of all seeds by each method.

    They begin with the same networks and see the same batches.
    """

    def __init__(self, seeds: range, steps: int, uda: bool, weight: float) -> None:
        self.seeds = seeds
        self.steps = steps
        self.uda = uda
        self.weight = weight
        self.x, self.y = map(torch.stack, zip(*map(draw, seeds), strict=True))
        self.few = self.x[:, :6].flatten(0, 1), self.y[:, :6].flatten()
        self.losses: tuple[Any, ...] = (
            metapl.CrossEntropy(),
            *([metapl.UDA(temperature=0.5)] if uda else []),
        )
        self.networks: dict[str, Networks] = {}

    def views(self) -> Iterator[Any]:
        """Yield 32 unlabeled points of each run, the same positions in all.

        With UDA a noisy copy of them comes with them.
        """
        generator = torch.Generator().manual_seed(0)
        while True:
            weak = self.x[:, torch.randint(6, self.x.shape[1], (32,), generator=generator)]
            noise = torch.randn(32, 2, generator=generator)
            yield (
                (weak.flatten(0, 1), (weak + 0.2 * noise).flatten(0, 1))
                if self.uda
                else weak.flatten(0, 1)
            )

    def fresh(self, stream: int) -> tuple[Networks, torch.optim.Optimizer]:
        scale, rate, activation = (0.5, 0.3, nn.Tanh()) if self.uda else (0.1, 0.1, nn.Sigmoid())
        networks = Networks(self.seeds, stream, scale, activation)
        return networks, torch.optim.SGD(networks.parameters(), lr=len(self.seeds) * rate)

    def train(self, method: str) -> Tensor:
        """Return each run's share of points that it classifies as they were drawn."""
        (teacher, outer), (student, inner), losses = self.fresh(0), self.fresh(1), self.losses
        trainer: Any
        if method == "supervised":
            trainer = metapl.LossTrainer(teacher, losses, optimizer=outer)
            student = teacher
        else:
            # In this method the teacher stays as it is, for it has no losses.
            if method == "pseudo-labels":
                teacher = self.networks["supervised"]
                losses = ()
                outer = torch.optim.SGD(teacher.parameters(), lr=0.1)
            trainer = metapl.BilevelTrainer(
                teacher,
                student,
                "forward" if method == "MPL" else "none",
                problem=metapl.PseudoLabels(kind="soft"),
                inner_optimizer=inner,
                outer_optimizer=outer,
                teacher_losses=losses,
                feedback_weight=self.weight,
            )
        unlabeled = None if method == "supervised" and not self.uda else self.views()
        trainer.fit([self.few], unlabeled, steps=self.steps, schedule="constant", progress=False)
        self.networks[method] = student
        with torch.no_grad():
            return (
                (student(self.x.flatten(0, 1)).argmax(1).view_as(self.y) == self.y).double().mean(1)
            )


def picture(path: str, moons: Moons, accuracies: dict[str, Tensor]) -> None:
    """Draw each method's regions, of its median run, and the accuracies of all of its runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    colors = ListedColormap(["#0072B2", "#D55E00"])
    figure, axes = plt.subplots(
        2, 4, figsize=(16, 5.6), height_ratios=(3, 1), layout="constrained", sharex="row"
    )
    low = moons.x.amin((0, 1)) - 0.2
    high = moons.x.amax((0, 1)) + 0.2
    columns = [torch.linspace(float(a), float(b), 200) for a, b in zip(low, high, strict=True)]
    plane = torch.stack(torch.meshgrid(*columns, indexing="xy"), -1).flatten(0, 1)
    for (above, below), (method, accuracy) in zip(axes.T, accuracies.items(), strict=True):
        run = int(accuracy.argsort()[(len(accuracy) - 1) // 2])
        with torch.no_grad():
            regions = (
                moons.networks[method](plane.repeat(len(accuracy), 1))
                .argmax(1)
                .view(-1, 200, 200)[run]
            )
        points = moons.x[run].numpy()
        classes = moons.y[run].numpy()
        extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
        above.imshow(
            regions.numpy(),
            origin="lower",
            extent=extent,
            cmap=colors,
            vmin=0,
            vmax=1,
            alpha=0.25,
            aspect="auto",
        )
        above.scatter(*points.T, c=classes, cmap=colors, s=3, alpha=0.5, linewidths=0)
        above.scatter(*points[:6].T, c=classes[:6], cmap=colors, s=110, edgecolors="black")
        above.set(
            xticks=[],
            yticks=[],
            title=f"{method}: seed {moons.seeds[run]}, {100 * accuracy[run]:.1f} %",
        )
        below.hist(accuracy.numpy(), bins=40, range=(0.4, 1.0), color="#777777")
        below.axvline(SUCCESS, color="black", linestyle="--", linewidth=1)
        below.set(xlabel=f"accuracy of {len(accuracy)} runs", ylabel="runs")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32, help="how many; default 32")
    parser.add_argument(
        "--steps", type=int, help="of each training; default 12000, with --uda 3000"
    )
    parser.add_argument("--weight", type=float, help="of the feedback; default 1, with --uda 10")
    parser.add_argument("--uda", action="store_true", help="with the consistency term")
    parser.add_argument("--out", default="two_moons.png", help="the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = args.steps or (3000 if args.uda else 12_000)
    weight = args.weight or (10.0 if args.uda else 1.0)
    moons = Moons(range(args.seeds), steps, args.uda, weight)
    accuracies = {method: moons.train(method) for method in METHODS}
    print(f"{'':<14} above 95 %  95 % interval  median run")
    for method, accuracy in accuracies.items():
        right = int((accuracy > SUCCESS).sum())
        runs = len(accuracy)
        low, high = (100 * end for end in interval(right, runs))
        print(
            f"{method:<14} {right:>4} of {runs:<3} {low:>8.0f}-{high:.0f} % "
            f"{100 * accuracy.median():>10.1f} %"
        )
    mpl, control = (accuracies[method] > SUCCESS for method in METHODS[2:])
    alone = int((mpl & ~control).sum())
    differing = int((mpl != control).sum())
    p = binomtest(alone, differing).pvalue if differing else 1.0
    print(
        f"MPL and the same loop without feedback: p = {p:.2g} (McNemar's exact test on paired "
        "seeds)"
    )
    picture(args.out, moons, accuracies)
    print(f"the decision regions are in {args.out}")


if __name__ == "__main__":
    main()
