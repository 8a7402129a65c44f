r"""How far ``difference`` should move the weights: ż against float64 forward mode, over the length δ of the move.

    python benchmarks/difference_step.py            # about five minutes on two cores
    python benchmarks/difference_step.py --table benchmarks/results/difference_step.json

On small and large, smooth and ReLU networks, fresh and trained, the error of the one-sided and the central difference
is measured over δ, as the root mean square of three seeds. Then rules for δ are judged by the error by the rule over
the least error over δ, worst case and geometric mean: a constant times 1, ‖θ‖ or ‖θ‖/√n (the root mean square of the n
weights), each with its best constant, and the rule in use.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import arguments, described, parsed, write_json
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.apps.pictures import load_digits_split
from metapl.execution.modules import trainable
from metapl.execution.numerics import WHOLE
from metapl.feedback import Difference, path
from metapl.feedback.difference import RELATIVE_STEP
from metapl.updates import update_of

RESULT = Path(__file__).parent / "results" / "difference_step.json"
HALF_DECADES = [10 ** (k / 2) for k in range(-18, 1)]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Transformer(nn.Module):
    """The rows of a digit as a sequence of eight."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1).unflatten(1, (8, 8))
        logits: Tensor = self.head(self.blocks(self.embed(rows) + self.position).mean(1))
        return logits


def group_norm_net() -> nn.Sequential:
    """Three convolutions with group norm and ReLU."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


# name: (network, batch, training steps)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "MLP, ReLU": (lambda: metapl.models.mlp([64, 128, 64, 10]), 64, 200),
    "MLP, ReLU, wide": (lambda: metapl.models.mlp([64, 1024, 1024, 10]), 64, 200),
    "MLP, tanh": (lambda: metapl.models.mlp([64, 128, 64, 10], nn.Tanh), 64, 200),
    "transformer": (Transformer, 64, 200),
    "conv, group norm": (group_norm_net, 64, 200),
    "WRN-28-2": (lambda: metapl.models.wide_resnet28_2(num_classes=10), 16, 25),
}
MINIATURE_NETWORKS = {name: (NETWORKS[name][0], 2, 1) for name in ("MLP, ReLU", "transformer", "WRN-28-2")}
SIDE, MINIATURE_SIDE = 32, 8  # of WRN-28-2's images


def cases(seed: int, miniature: bool) -> list[dict[str, Any]]:
    """Every network before and after some supervised steps on the digits."""
    side = MINIATURE_SIDE if miniature else SIDE
    split = load_digits_split(labels_per_class=40, seed=seed)
    rows = []
    for name, (build, batch, steps) in (MINIATURE_NETWORKS if miniature else NETWORKS).items():
        torch.manual_seed(seed)
        teacher, student = build(), build()
        images, labels = as_input(split.labeled[0], name, side), split.labeled[1]
        unlabeled = as_input(split.unlabeled, name, side)
        for trained in (0, steps):
            if trained:
                for network in (teacher, student):
                    train(network, images, labels, batch, trained)
            at, of = torch.randperm(len(images))[:batch], torch.randperm(len(unlabeled))[:batch]
            row = measure(teacher, student, (images[at], labels[at]), unlabeled[of])
            rows.append({"network": name, "trained_steps": trained, "batch": batch, "seed": seed, **row})
            print(f"{name}, {trained} steps, seed {seed}: done", flush=True)
    return rows


def as_input(images: Tensor, network: str, side: int) -> Tensor:
    if network != "WRN-28-2":
        return images
    return F.interpolate(images, size=side, mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def train(network: nn.Module, images: Tensor, labels: Tensor, batch: int, steps: int) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(steps):
        at = torch.randint(len(images), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[at]), labels[at]).backward()
        optimizer.step()


def look(teacher: nn.Module, student: nn.Module, labeled: Any, unlabeled: Tensor, dtype: torch.dtype) -> path.Path:
    """A step on soft labels, by copies of the networks in ``dtype``."""
    teacher, student = (copy.deepcopy(network).to(dtype) for network in (teacher, student))
    problem = metapl.PseudoLabels("soft")
    return path.take_steps(
        student,
        update_of(torch.optim.SGD(student.parameters(), lr=0.05), trainable(student)),
        problem,
        labeled=(labeled[0].to(dtype), labeled[1]),
        batches=[unlabeled.to(dtype)],
        teach=lambda batch, outputs: problem.signal(teacher, batch, outputs, generator=None),
    )


def measure(teacher: nn.Module, student: nn.Module, labeled: Any, unlabeled: Tensor) -> dict[str, Any]:
    """Relative errors of ż along one w, and of the teacher's gradient by the whole way through."""
    paths = {name: look(teacher, student, labeled, unlabeled, dtype) for name, dtype in DTYPES.items()}
    steps = {name: path.steps[0] for name, path in paths.items()}
    v = paths["float32"].outer_gradient()
    w = steps["float32"].pullback(v)
    wide = {name: t.double() for name, t in w.items()}
    exact = steps["float64"].tangent(wide)

    def error(z_dot: Tensor) -> float:
        return float((z_dot.double() - exact).norm() / exact.norm())

    row: dict[str, Any] = {
        "weights": sum(p.numel() for p in student.parameters()),
        "norm_of_weights": float(WHOLE.norm(steps["float32"].params)),
        "norm_of_v": float(WHOLE.norm(v)),
        "forward_float32": error(steps["float32"].tangent(w)),
        "gradient": gradient_errors(teacher, student, labeled, unlabeled),
        "z_dot": {},
    }
    for name, step in steps.items():
        direction = {k: t.to(DTYPES[name]) for k, t in wide.items()}
        length = WHOLE.norm(direction)
        central, one_sided = [], []
        for delta in HALF_DECADES:
            move = torch.tensor(delta, dtype=DTYPES[name])
            ahead, behind = step.shifted(move / length, direction), step.shifted(-move / length, direction)
            central.append(error(length * (ahead - behind) / (2 * move)))
            one_sided.append(error(length * (ahead - step.outputs) / move))
        row["z_dot"][name] = {
            "central": central,
            "one_sided": one_sided,
            "chosen": {
                "delta": float(Difference().step_size(step)),
                "central": error(Difference().tangent(step, direction).z_dot),
                "one_sided": error(Difference(one_sided=True).tangent(step, direction).z_dot),
            },
        }
    return row


def gradient_errors(teacher: nn.Module, student: nn.Module, labeled: Any, unlabeled: Tensor) -> dict[str, float]:
    """‖g − exact‖/‖exact‖ of the teacher's gradient in float32, against forward mode in float64."""

    def gradient(mode: Any, dtype: torch.dtype) -> Tensor:
        networks = [copy.deepcopy(network).to(dtype) for network in (teacher, student)]
        found = metapl.hypergradient(
            *networks,
            labeled=(labeled[0].to(dtype), labeled[1]),
            unlabeled=unlabeled.to(dtype),
            mode=mode,
            inner_optimizer=torch.optim.SGD(networks[1].parameters(), lr=0.05),
        )
        return torch.cat([g.double().flatten() for g in found.grads.values()])

    exact = gradient("forward", torch.float64)
    modes = {"forward": "forward", "central": Difference(), "one_sided": Difference(one_sided=True)}
    return {name: float((gradient(mode, torch.float32) - exact).norm() / exact.norm()) for name, mode in modes.items()}


IN_USE = "‖θ‖/√n, in use"
RULES: dict[str, Callable[[dict[str, Any]], float]] = {
    "constant": lambda row: 1.0,
    "‖θ‖": lambda row: row["norm_of_weights"],
    "‖θ‖/√n": lambda row: row["norm_of_weights"] / math.sqrt(row["weights"]),
    IN_USE: lambda row: row["norm_of_weights"] / math.sqrt(row["weights"]),
}


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per network and stage: the root mean square of every figure over the seeds."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["trained_steps"]), []).append(row)
    return [_root_mean_square(group) for group in groups.values()]


def _root_mean_square(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _root_mean_square([v[key] for v in values]) for key in first if key != "seed"}
    if isinstance(first, list):
        return [_root_mean_square(list(same)) for same in zip(*values, strict=True)]
    if isinstance(first, float):
        return math.sqrt(sum(v * v for v in values) / len(values))
    return first


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dtype, form and rule: its best constant, and the error by it over the least one, worst and mean."""
    found = []
    for dtype in DTYPES:
        for form in ("central", "one_sided"):
            for rule, unit in RULES.items():
                constants = [10 ** (k / 4) for k in range(-40, 0)]
                if rule == IN_USE:
                    constants = [RELATIVE_STEP[DTYPES[dtype]]]
                worst, mean, constant = min((*_excess(rows, dtype, form, unit, c), c) for c in constants)
                found.append(
                    {"dtype": dtype, "form": form, "rule": rule, "constant": constant, "worst": worst, "mean": mean}
                )
    return found


def _excess(
    rows: list[dict[str, Any]], dtype: str, form: str, unit: Callable[[dict[str, Any]], float], constant: float
) -> tuple[float, float]:
    ratios = []
    for row in rows:
        errors = row["z_dot"][dtype][form]
        ratios.append(_interpolated(errors, constant * unit(row)) / min(errors))
    return max(ratios), math.exp(sum(map(math.log, ratios)) / len(ratios))


def _interpolated(errors: list[float], delta: float) -> float:
    """The error at δ, between measured half-decades by straight lines in logarithms."""
    place = min(max(2 * math.log10(delta) + 18, 0.0), len(errors) - 1.001)
    i = int(place)
    return float(errors[i] ** (1 - place + i) * errors[i + 1] ** (place - i))


def table(result: dict[str, Any]) -> str:
    """The cases and the rules, as Markdown."""
    lines = [
        "| network | steps | dtype | δ chosen | error of ż, central (least) | one-sided (least) | forward float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in over_seeds(result["cases"]):
        for dtype, errors in row["z_dot"].items():
            chosen = errors["chosen"]
            lines.append(
                f"| {row['network']} | {row['trained_steps']} | {dtype} | {chosen['delta']:.1e} "
                f"| {chosen['central']:.1e} ({min(errors['central']):.1e}) "
                f"| {chosen['one_sided']:.1e} ({min(errors['one_sided']):.1e}) "
                f"| {row['forward_float32']:.1e} |"
            )
    lines += [
        "",
        "| network | steps | error of the teacher's gradient in float32: forward | central | one-sided |",
        "|---|---|---|---|---|",
    ]
    for row in over_seeds(result["cases"]):
        errors = row["gradient"]
        lines.append(
            f"| {row['network']} | {row['trained_steps']} | {errors['forward']:.1e} | {errors['central']:.1e} "
            f"| {errors['one_sided']:.1e} |"
        )
    lines += ["", "| dtype | form | δ over | constant | worst excess | mean excess |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['dtype']} | {r['form']} | {r['rule']} | {r['constant']:.1e} | {r['worst']:.1f} | {r['mean']:.1f} |"
        for r in judged(over_seeds(result["cases"]))
    ]
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, RESULT)
    parser.add_argument("--seeds", type=int, help="how many; default 3, in miniature 1")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a result and stop")
    given = parsed(parser)
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return
    seeds = given.seeds or (1 if given.miniature else 3)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit\._script")
    rows = [row for seed in range(seeds) for row in cases(seed, given.miniature)]
    command = f"python benchmarks/difference_step.py --seeds {seeds}"
    result = {
        "setup": {**described("cpu"), "command": command, "seeds": seeds},
        "deltas": HALF_DECADES,
        "cases": rows,
    }
    write_json(given.out, result)
    print(table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
