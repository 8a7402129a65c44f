r"""Two moons with six labels, Meta Pseudo Labels' first experiment: python examples/two_moons.py

    2,000 points on two moons, 3 of each labeled; teacher and student have two hidden layers of 8
    sigmoid units and initial weights in ±0.1, and learn by SGD at the constant rate 0.1

The paper states this, and that MPL finds the right classifier far more often than supervised
learning and pseudo labels. It states no number of steps, size of a batch, noise of the moons,
success or share of successes. Here they are 200,000 steps, 32 unlabeled points and all six labels,
the standard deviation 0.1, more than 95 % of the points as they were drawn, and 32 runs.

Every arm begins with the same networks and sees the same batches, run by run:

- *all true labels*, the ceiling: the student learns the true labels of its batches, as if its
  teacher were perfect. It is trained first.
- *supervised*: the teacher of the next arm, which learns the six labels alone.
- *no feedback*, with soft labels and with drawn ones: the loop of MPL without its feedback.
- *pseudo labels*: the student learns the soft labels of the supervised network.
- *exact gradient* and *Algorithm 1* (drawn labels, the dot product times the mean over the batch),
  at several weights: MPL. The teacher also learns the six labels, as in Algorithm 1.
- *judged by all labels*: the exact gradient where the student is judged by the true labels of 32
  points, anew in each step. The teacher's own loss is still of the six.

The verdict was declared before the runs. It is one of three:

- *not tested*, where the ceiling has fewer than 30 of 32 successes: a network that cannot learn the
  moons from all labels in these steps tells no method from another. Nothing else is trained.
- *reproduced*, where the best arm of MPL has more successes than each of supervised, pseudo
  labels, and the loop without feedback by labels of the same kind; and p < 0.05 each time,
  by McNemar's exact test on paired runs, times the number of the arms of MPL.
- *not reproduced* otherwise. Two numbers help to say why: the student's loss on the six labels
  without feedback (near 0, the labels have nothing left to say), and the successes of *judged by
  all labels* (where these are many, six labels are too few; where they are few, the mechanism
  fails).

A row of ``--rows`` is an arm, written when it ends; an arm that has a row is not trained again.
``--uda`` takes tanh, weights in ±0.5, the rate 0.3 and 3,000 steps, and every teacher also gives a
noisy copy of a point the sharpened label of the point itself.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import metapl
from metapl.feedback import Estimator, Forward, NoFeedback, Reinforce
from metapl.functional import stack
from metapl.machine import environment
from metapl.metrics import interval
from metapl.problems import EqualWeights

BATCH = 32
LABELED = 6
SUCCESS = 0.95
CEILING = 30 / 32
"""The share of runs that have to succeed with all true labels."""
CHUNK = 100
"""Steps whose batches are drawn at once."""
COMPILED = 5_000
"""Steps from which on compiling, about half a minute, pays."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Networks, rates and steps: as the paper states them, or with the consistency term."""

    activation: type[nn.Module]
    scale: float
    rate: float
    steps: int
    uda: bool


STATED = Setting(nn.Sigmoid, scale=0.1, rate=0.1, steps=200_000, uda=False)
WITH_UDA = Setting(nn.Tanh, scale=0.5, rate=0.3, steps=3_000, uda=True)


@dataclass(frozen=True)
class Arm:
    """What the student learns and what the teacher is told.

    Args:
        role: ``"ceiling"``, ``"no feedback"``, ``"pseudo labels"``, ``"MPL"`` or ``"judged"``.
        kind: of the pseudo labels.
    """

    name: str
    role: str
    kind: Literal["soft", "hard"] = "soft"
    weight: float = 0.0


def arms_of(setting: Setting) -> tuple[Arm, ...]:
    """Return the arms in the order of their training: the ceiling is the first."""
    arms = [
        Arm("all true labels", "ceiling"),
        Arm("no feedback", "no feedback"),
        Arm("pseudo labels", "pseudo labels"),
    ]
    if setting.uda:
        arms.append(Arm("exact gradient, weight 10", "MPL", weight=10.0))
        return tuple(arms)
    arms.append(Arm("no feedback, drawn labels", "no feedback", kind="hard"))
    # The mean over the batch makes Algorithm 1's feedback a 32nd of the exact gradient's.
    for weight in (1.0, 30.0, 100.0):
        arms.append(Arm(f"exact gradient, weight {weight:g}", "MPL", weight=weight))
    for weight in (1.0, 30.0, 1000.0):
        arms.append(Arm(f"Algorithm 1, weight {weight:g}", "MPL", kind="hard", weight=weight))
    arms.append(Arm("judged by all labels, weight 30", "judged", weight=30.0))
    return tuple(arms)


class SixLabels(metapl.CrossEntropy):
    """Cross-entropy on the six labels beside another outer batch: (x, y, x of the six, y)."""

    detaches_signal = True

    def __call__(self, teacher: nn.Module, *, outer: Any, **others: Any) -> Tensor:
        return super().__call__(teacher, outer=outer[2:], **others)


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Draw 2,000 points in random order, but three of each moon first: these are labeled."""
    x, y = make_moons(2000, noise=0.1, random_state=seed)
    few = [i for moon in (0, 1) for i in np.flatnonzero(y == moon)[: LABELED // 2]]
    order = [*few, *np.setdiff1d(np.arange(len(y)), few)]
    return torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order])


def network(setting: Setting, seed: int) -> nn.Sequential:
    """Return a network as it begins: weights and biases are uniform."""
    act = setting.activation
    layers = nn.Sequential(nn.Linear(2, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(setting.scale * (2 * torch.rand(p.shape, generator=generator) - 1))
    return layers


class Moons:
    """The runs of all seeds in a setting."""

    def __init__(self, setting: Setting, seeds: range, steps: int) -> None:
        self.setting = setting
        self.seeds = seeds
        self.steps = steps
        # (R, 2000, 2) and (R, 2000).
        self.x, self.y = map(torch.stack, zip(*map(draw, seeds), strict=True))
        self.six = innermost((self.x[:, :LABELED], self.y[:, :LABELED]))

    def trainer(self, arm: Arm, seed: int, teacher_weights: Any) -> metapl.BilevelTrainer:
        """Return the trainer of a run, whose pure step is stacked with those of the others."""
        student = network(self.setting, 2 * seed + 1)
        inner_optimizer = torch.optim.SGD(student.parameters(), lr=self.setting.rate)
        if arm.role == "ceiling":
            return metapl.BilevelTrainer(
                None, student, "none", problem=EqualWeights(), inner_optimizer=inner_optimizer
            )
        teacher = network(self.setting, 2 * seed)
        losses: tuple[Any, ...] = (metapl.CrossEntropy(),)
        if self.setting.uda:
            losses = (*losses, metapl.UDA(temperature=0.5))
        mode: Estimator = NoFeedback()
        feedback_weight = None
        if arm.role == "judged":
            losses = (SixLabels(),)
        if arm.role == "pseudo labels":
            # Without losses and feedback the teacher stays as it is.
            teacher.load_state_dict(teacher_weights)
            losses = ()
        if arm.role in ("MPL", "judged"):
            mode = Forward() if arm.kind == "soft" else Reinforce()
            feedback_weight = arm.weight
        return metapl.BilevelTrainer(
            teacher,
            student,
            mode,
            problem=metapl.PseudoLabels(kind=arm.kind),
            inner_optimizer=inner_optimizer,
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=self.setting.rate),
            teacher_losses=losses,
            feedback_weight=feedback_weight,
            verify=False,
        )

    def batches(self, arm: Arm) -> Iterator[tuple[Any, ...]]:
        """Yield the outer and the inner batch of every step, and the noise that draws labels.

        What is drawn for one arm is drawn for all.
        """
        places, judges, copies, labels = (torch.Generator().manual_seed(i) for i in range(4))
        rows = torch.arange(len(self.seeds))[:, None]
        for first in range(0, self.steps, CHUNK):
            # Steps, runs and points.
            shape = (min(CHUNK, self.steps - first), len(self.seeds), BATCH)
            place = torch.randint(LABELED, 2000, shape, generator=places)
            x = self.x[rows, place]
            inner: Any = x
            if arm.role == "ceiling":
                inner = x, self.y[rows, place]
            elif self.setting.uda:
                inner = x, x + 0.2 * torch.randn(x.shape, generator=copies)
            judging: tuple[Tensor, ...] = ()
            if arm.role == "judged":
                judge = torch.randint(LABELED, 2000, shape, generator=judges)
                judging = self.x[rows, judge], self.y[rows, judge]
            noise: tuple[Tensor, ...] = ()
            if arm.kind == "hard":
                # Gumbel noise, which is not infinite where the uniform number is 0.
                uniform = torch.rand(*shape, 2, generator=labels).clamp_min(1e-20)
                noise = (-(-uniform.log()).log(),)
            drawn = innermost((judging, inner, noise), dim=1)
            for k in range(len(x)):
                judging_k, inner_k, noise_k = tree_map(itemgetter(k), drawn)
                yield (*judging_k, *self.six), inner_k, *noise_k

    @torch.no_grad()
    def train(self, arm: Arm, teachers: list[Any]) -> Row:
        """Return an arm's row.

        Args:
            teachers: the weights of the finished supervised networks, for pseudo labels.
        """
        start = time.perf_counter()
        states = []
        for run, seed in enumerate(self.seeds):
            weights = None
            if arm.role == "pseudo labels":
                weights = read(teachers[run])
            step, state = self.trainer(arm, seed, weights).functional()
            states.append(state)
        # All runs have one step, which differs in its state alone.
        stacked = innermost(stack(states))
        stacked_step = vmap(step)
        graph: Any = None
        learning: dict[str, list[float]] = {}
        for k, batch in enumerate(self.batches(arm), 1):
            if graph is None:
                # The step is recorded once as operations on the tensors of all runs: of networks
                # this small, most of a step would be the dispatch of vmap.
                table = {torch.ops.aten.bmm.default: products}
                graph = make_fx(lambda *args: stacked_step(*args)[0], table)(stacked, *batch)
                graph.graph.eliminate_dead_code()
                graph.recompile()
                if self.steps >= COMPILED:
                    graph = torch.compile(graph, dynamic=False, options={"cpp_wrapper": True})
            stacked = graph(stacked, *batch)
            if k % max(1, self.steps // 8) == 0:
                learning[str(k)] = self.reading(stacked.student.params)["accuracy"]
        row = self.job(arm) | {"seconds": round(time.perf_counter() - start), "learning": learning}
        row["student"] = self.reading(stacked.student.params)
        if arm.role == "no feedback":
            row["teacher"] = self.reading(stacked.teacher.params)
            row["teachers"] = [
                written({name: t[run] for name, t in stacked.teacher.params.items()})
                for run in range(len(self.seeds))
            ]
        run = median_run(row["student"]["accuracy"])
        row["median"] = written({name: t[run] for name, t in stacked.student.params.items()})
        row["made_with"] = environment()
        return row

    def job(self, arm: Arm) -> Row:
        """Return the columns by which the row of an arm is found again."""
        return {
            "arm": arm.name,
            "uda": self.setting.uda,
            "steps": self.steps,
            "seeds": list(self.seeds),
        }

    @torch.no_grad()
    def reading(self, weights: Any) -> Row:
        """Return the share of right points of each run, and its mean loss on the six labels."""
        layers = network(self.setting, 0)
        logits = vmap(functional_call, (None, 0, 0))(layers, weights, self.x)
        right = (logits.argmax(-1) == self.y).double().mean(1)
        on_six = logits[:, :LABELED].flatten(0, 1)
        losses = nn.functional.cross_entropy(on_six, self.six[1].reshape(-1), reduction="none")
        means = losses.view(len(self.seeds), LABELED).mean(1)
        return {
            "accuracy": [round(share, 4) for share in right.tolist()],
            "labeled_loss": [float(f"{loss:.4g}") for loss in means.tolist()],
        }


def innermost(tree: Any, dim: int = 0) -> Any:
    """Return the same tensors with neighboring runs, the dimension ``dim``, side by side in memory.

    A compiled step is vectorized over them: all other dimensions are shorter than a register.
    """
    return tree_map(lambda t: t.movedim(dim, -1).contiguous().movedim(-1, dim), tree)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm(a, b)`` by sums that keep the runs side by side."""
    rows = a.permute(1, 2, 0).unsqueeze(2)
    columns = b.permute(1, 2, 0).unsqueeze(0)
    return (rows * columns).sum(1).permute(2, 0, 1)


def written(weights: dict[str, Tensor]) -> Row:
    """Return weights as JSON takes them; nine digits are those of float32."""
    return {
        name: (t.shape, [float(f"{value:.9g}") for value in t.flatten().tolist()])
        for name, t in weights.items()
    }


def read(weights: Row) -> dict[str, Tensor]:
    return {name: torch.tensor(values).view(shape) for name, (shape, values) in weights.items()}


def median_run(accuracy: list[float]) -> int:
    """Return the run whose accuracy is the median; of an even number, the lower one."""
    return int(np.argsort(accuracy, kind="stable")[(len(accuracy) - 1) // 2])


def successes(reading: Row) -> np.ndarray[Any, Any]:
    return np.array(reading["accuracy"]) > SUCCESS


def best(rows: dict[str, Row], arms: list[Arm]) -> Arm:
    """Return the arm with the most successes; of equals, the one with the highest median."""

    def order(arm: Arm) -> tuple[int, float]:
        reading = rows[arm.name]["student"]
        return int(successes(reading).sum()), float(np.median(reading["accuracy"]))

    return max(arms, key=order)


def is_ceiling_low(row: Row) -> bool:
    return bool(successes(row["student"]).mean() < CEILING)


def verdict(rows: dict[str, Row], arms: tuple[Arm, ...]) -> str:
    """Return the verdict that the head of this file declares, with its numbers."""
    ceiling = rows[arms[0].name]
    runs = len(ceiling["seeds"])
    if is_ceiling_low(ceiling):
        return (
            f"not tested: the network cannot learn the moons in {ceiling['steps']} steps; with all "
            f"true labels {successes(ceiling['student']).sum()} of {runs} runs succeed"
        )
    of_mpl = [arm for arm in arms if arm.role == "MPL"]
    chosen = best(rows, of_mpl)
    mpl = successes(rows[chosen.name]["student"])
    control = next(arm for arm in arms if arm.role == "no feedback" and arm.kind == chosen.kind)
    others = {
        "supervised": rows["no feedback"]["teacher"],
        "pseudo labels": rows["pseudo labels"]["student"],
        control.name: rows[control.name]["student"],
    }
    is_above = True
    comparisons = []
    for name, reading in others.items():
        other = successes(reading)
        alone = int((mpl & ~other).sum())
        differing = int((mpl != other).sum())
        p = 1.0
        if differing:
            p = min(1.0, len(of_mpl) * float(binomtest(alone, differing).pvalue))
        is_above = is_above and 2 * alone > differing and p < 0.05
        comparisons.append(f"{name} {other.sum()} (p = {p:.2g})")
    numbers = f"{chosen.name}: {mpl.sum()} of {runs} runs; {', '.join(comparisons)}"
    if is_above:
        return f"reproduced: {numbers}"
    on_six = np.median(rows[control.name]["student"]["labeled_loss"])
    text = f"not reproduced: {numbers}; the student's loss on the six labels in {control.name} "
    text += f"{on_six:.2g} (median)"
    judged = [arm for arm in arms if arm.role == "judged"]
    if judged:
        reading = rows[best(rows, judged).name]["student"]
        text += f"; {best(rows, judged).name}: {successes(reading).sum()}"
    return text


def table(rows: dict[str, Row]) -> str:
    """Return a line for each arm in Markdown; supervised learning is a teacher's."""
    readings = {}
    for name, row in rows.items():
        if name == "no feedback":
            readings["supervised"] = row["teacher"]
        readings[name] = row["student"]
    lines = [
        "| arm | above 95 % | 95 % interval | median accuracy, % | median loss on the six labels |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, reading in readings.items():
        right = int(successes(reading).sum())
        runs = len(reading["accuracy"])
        low, high = (100 * end for end in interval(right, runs))
        lines.append(
            f"| {name} | {right} of {runs} | {low:.0f} to {high:.0f} % "
            f"| {100 * np.median(reading['accuracy']):.1f} "
            f"| {np.median(reading['labeled_loss']):.2g} |"
        )
    return "\n".join(lines)


def picture(path: Path, moons: Moons, rows: dict[str, Row], arms: tuple[Arm, ...]) -> None:
    """Draw each method's regions, of its median run, and the accuracies of all of its runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    panels = {arms[0].name: (rows[arms[0].name]["student"], rows[arms[0].name]["median"])}
    if "no feedback" in rows:
        supervised = rows["no feedback"]["teacher"]
        run = median_run(supervised["accuracy"])
        panels["supervised"] = supervised, rows["no feedback"]["teachers"][run]
    for role in ("pseudo labels", "no feedback", "MPL", "judged"):
        of_role = [arm for arm in arms if arm.role == role and arm.name in rows]
        if of_role:
            row = rows[best(rows, of_role).name]
            panels[row["arm"]] = row["student"], row["median"]
    colors = ListedColormap(["#0072B2", "#D55E00"])
    figure, axes = plt.subplots(
        2,
        len(panels),
        figsize=(3.6 * len(panels), 5.6),
        height_ratios=(3, 1),
        layout="constrained",
        sharex="row",
        squeeze=False,
    )
    low = moons.x.amin((0, 1)) - 0.2
    high = moons.x.amax((0, 1)) + 0.2
    columns = [torch.linspace(float(a), float(b), 200) for a, b in zip(low, high, strict=True)]
    plane = torch.stack(torch.meshgrid(*columns, indexing="xy"), -1).flatten(0, 1)
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    for (above, below), (name, (reading, weights)) in zip(axes.T, panels.items(), strict=True):
        run = median_run(reading["accuracy"])
        layers = network(moons.setting, 0)
        layers.load_state_dict(read(weights))
        with torch.no_grad():
            regions = layers(plane).argmax(1).view(200, 200)
        points = moons.x[run].numpy()
        classes = moons.y[run].numpy()
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
        six = points[:LABELED].T
        above.scatter(*six, c=classes[:LABELED], cmap=colors, s=110, edgecolors="black")
        accuracy = reading["accuracy"][run]
        title = f"{name}\nseed {moons.seeds[run]}, {100 * accuracy:.1f} %"
        above.set(xticks=[], yticks=[], title=title)
        below.hist(reading["accuracy"], bins=40, range=(0.4, 1.0), color="#777777")
        below.axvline(SUCCESS, color="black", linestyle="--", linewidth=1)
        runs = len(reading["accuracy"])
        label = f"accuracy; {successes(reading).sum()} of {runs} runs above 0.95"
        below.set(xlabel=label, ylabel="runs", ylim=(0, runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32, help="how many runs an arm; default 32")
    parser.add_argument(
        "--steps", type=int, help="of each training; default 200000, with --uda 3000"
    )
    parser.add_argument("--uda", action="store_true", help="with the consistency term")
    parser.add_argument(
        "--rows", type=Path, default=Path("two_moons.jsonl"), help="the file of the results"
    )
    parser.add_argument("--out", type=Path, default=Path("two_moons.png"), help="the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = WITH_UDA if args.uda else STATED
    moons = Moons(setting, range(args.seeds), args.steps or setting.steps)
    arms = arms_of(setting)
    stored = []
    if args.rows.exists():
        stored = [json.loads(line) for line in args.rows.read_text().splitlines()]
    rows: dict[str, Row] = {}
    for arm in arms:
        job = moons.job(arm)
        row = next((row for row in stored if job.items() <= row.items()), None)
        if row is None:
            teachers = rows["no feedback"]["teachers"] if "no feedback" in rows else []
            row = json.loads(json.dumps(moons.train(arm, teachers)))
            args.rows.parent.mkdir(parents=True, exist_ok=True)
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{arm.name}: {row['seconds']} seconds", flush=True)
        rows[arm.name] = row
        if arm.role == "ceiling":
            counts = [
                f"{(np.array(accuracy) > SUCCESS).sum()} after {step}"
                for step, accuracy in row["learning"].items()
            ]
            print(f"with all true labels, runs that succeed: {', '.join(counts)} steps", flush=True)
            if is_ceiling_low(row):
                break
    print(f"\n{table(rows)}\n\n{verdict(rows, arms)}")
    picture(args.out, moons, rows, arms)
    print(f"the decision regions are in {args.out}")


if __name__ == "__main__":
    main()
