"""The eight studies of Noisy Student's appendix and its table of noise, on digits, paired over seeds.

    python benchmarks/noisy_student.py                                 # tune, then run; goes on where it was stopped
    python benchmarks/noisy_student.py --write benchmarks/results/noisy_student.md  # tables there, figure in docs/
    python benchmarks/noisy_student.py --miniature --out FILE          # all of it in seconds, to see that it runs

A teacher learns from the labeled digits with noise and labels the unlabeled ones without; they are selected as
``metapl labels select`` does; a student learns from both by the mean over the batch, as ``metapl noisy-student`` does.
A test holds a step and a selection against the library's. All seeds of an arm are trained at once, a network a seed, by
batched matrix products.

Data: the splits of ``when.py``, 4 labels a class. Networks: two hidden layers of a width of 8 to 128, in the place of
EfficientNet-B0 to L2. Noise: the digits' shift, noise and hole in the place of RandAugment, and dropout; there is no
stochastic depth, for these networks have no blocks to drop. Tuning: the learning rate and the dropout, on 3 other
seeds, by the validation accuracy of a student of width 32. Nothing else is chosen but the length of study 6's
finetuning, by validation. The test images are read once, after the last step of each network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import harness
import torch
from harness import NONE, RESULTS, Bar, Row
from torch import Tensor, nn
from torch.nn import functional as F
from when import CLASSES, drawn, views

from metapl.apps.noisy_student import decay_interval
from metapl.metrics import paired_test
from metapl.models import mlp
from metapl.training.options import DECAY

RAW = RESULTS / "noisy_student.jsonl"
LABELS, LABELED_BATCH, STEPS, MOMENTUM, FINETUNE_LR = 4, 32, 1500, 0.9, 0.02
THRESHOLD = 0.3
"""Confidence above which unlabeled examples are kept: Noisy Student's."""

WIDTHS = (8, 16, 32, 64, 128)
RATES, DROPOUTS = (0.1, 0.2), (0.05, 0.1)
"""What is tuned: the learning rate, and the probability of dropping a hidden unit."""

FINETUNINGS = (50, 150, 500)
"""Lengths of study 6's finetuning, of which the best by validation is taken."""

Weights = list[Tensor]  # (S, in, out) and (S, 1, out) of the first layer, of the second, ...


# ------------------------------------------------------------------------------------------------------------ the arms


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A network and how it is trained."""

    width: int  # of its hidden layers
    teacher: int | None = None  # width of the network that labels; None: it learns from the labeled examples alone
    rounds: int = 0  # students that the teacher itself is the last of, each of its width
    ratio: int = 1  # unlabeled examples in a batch for each labeled one
    share: float = 1.0  # of the unlabeled examples that there are, drawn evenly
    fifth: int | None = None  # of them by the teacher's confidence, the least confident first; None: by the threshold
    hard: bool = False  # learn the most probable class, not the distribution
    balanced: bool = True  # as many of each class, the most confident ones, and copies where there are fewer
    augment: bool = True  # unlabeled examples; labeled ones always are
    dropout: bool = True  # on unlabeled examples, likewise
    noisy_teacher: bool = False  # the teacher labels augmented examples, with dropout
    training: Literal["joint", "pretrain", "pretrain_finetune"] = "joint"  # on both, or first on the unlabeled ones
    steps: float = 100.0  # of all, in percent of the usual
    warm: bool = False  # begin with the teacher's weights, at a rate that ends as usual


def _same(width: int, **changes: Any) -> Arm:
    return Arm(width=width, teacher=width, **changes)


SMALL = WIDTHS[:4]
SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 4, 1.0)
BEST = {"teacher": WIDTHS[-1], "rounds": 2}
"""The largest network after two rounds, in the place of the iterated L2."""

Arms = dict[str, tuple[Arm, float | None]]
KINDS: dict[str, Callable[[int], Arm]] = {  # by their width
    "supervised": lambda width: Arm(width=width),
    "same teacher": partial(_same, ratio=3),
    "best teacher": lambda width: Arm(width=width, **BEST, ratio=3),
    "Noisy Student": _same,
    "without balancing": partial(_same, balanced=False),
    "pretraining only": partial(_same, training="pretrain"),
    "pretraining + finetuning": partial(_same, training="pretrain_finetune"),
    "joint": _same,
    **{f"{ratio}:1": partial(_same, ratio=ratio) for ratio in (1, 3, 7)},
}
NOISE: dict[str, Callable[[float], Arm]] = {  # by the share of the unlabeled examples
    "supervised": lambda share: Arm(width=32),
    "Noisy Student": lambda share: _same(32, share=share),
    "student without augmentation": lambda share: _same(32, share=share, augment=False),
    "student without augmentation and dropout": lambda share: _same(32, share=share, augment=False, dropout=False),
    "teacher with augmentation and dropout": lambda share: _same(32, share=share, noisy_teacher=True),
}


def by_width(widths: Sequence[int], kinds: Sequence[str]) -> dict[str, Arm]:
    return {f"width {width}: {kind}": KINDS[kind](width) for width in widths for kind in kinds}


def capacity(teacher: int) -> dict[str, Arm]:
    return {
        f"teacher {teacher}": Arm(width=teacher),
        f"teacher {teacher}, student {teacher}": _same(teacher),
        f"teacher {teacher}, student {2 * teacher}": Arm(width=2 * teacher, teacher=teacher),
        f"supervised {2 * teacher}": Arm(width=2 * teacher),
    }


def printed(arms: dict[str, Arm], values: str) -> Arms:
    """Each with the top-1 accuracy on ImageNet in % that the paper prints of it; "-": it does not."""
    found = [None if value == "-" else float(value) for value in values.split()]
    return {name: (arm, value) for (name, arm), value in zip(arms.items(), found, strict=True)}


HEADINGS = {
    "noise": "Noise (Table 6; B5, with 1.3M and with 130M unlabeled images)",
    "1": "Study 1, teacher capacity (Table 9; widths for B0, B2, B4, B6, B7, best teacher for L2)",
    "2": "Study 2, unlabeled size (Table 10; B4)",
    "3": "Study 3, hard and soft labels by the teacher's confidence (Figure 5; B0; its values are not printed)",
    "4": "Study 4, student capacity (Table 11; widths 8, 16, 32, 64 for teachers B0, B2, B4, B7)",
    "5": "Study 5, balancing (Table 12; widths for B0 to B3)",
    "6": "Study 6, joint training (Table 13; widths for B0 to B3)",
    "7": "Study 7, batch ratio (Table 14; widths for B4 and for L2 with the teacher of 87.0)",
    "8": "Study 8, warm start (Table 15; B0)",
}
SOME, FIFTHS = ((1 / 16, "a sixteenth"), (1.0, "all")), [*itertools.product(range(5), ("soft", "hard"))]
STUDIES: dict[str, Arms] = {
    "noise": printed(
        {f"{name}, {of} of the unlabeled": made(share) for share, of in SOME for name, made in NOISE.items()},
        "83.3 83.9 83.6 83.2 83.7 84.0 85.1 84.6 84.3 84.4",
    ),
    "1": printed(
        by_width(WIDTHS, ("supervised", "same teacher", "best teacher")),
        "77.3 78.1 78.8 80.0 81.1 82.4 83.2 84.4 85.3 84.5 85.9 86.4 85.0 86.4 86.9",
    ),
    "2": printed(
        {"supervised": Arm(width=32)} | {f"1/{round(1 / share)}": _same(32, share=share) for share in SHARES},
        "83.2 83.4 83.3 83.7 83.9 83.8 84.0",
    ),
    "3": printed(
        {"supervised": Arm(width=16)}
        | {f"{q}, fifth {n + 1}": _same(16, fifth=n, hard=q == "hard", balanced=False) for n, q in FIFTHS},
        "- " * 11,
    ),
    "4": printed(
        {name: arm for teacher in SMALL for name, arm in capacity(teacher).items()},
        "77.3 77.9 79.5 - 80.0 80.7 82.0 - 83.2 84.0 84.7 - 86.9 86.9 87.2 -",
    ),
    "5": printed(
        by_width(SMALL, ("supervised", "Noisy Student", "without balancing")),
        "77.3 77.9 77.6 79.2 79.9 79.6 80.0 80.7 80.6 81.7 82.1 82.1",
    ),
    "6": printed(
        by_width(SMALL, ("supervised", "pretraining only", "pretraining + finetuning", "joint")),
        "77.3 72.6 77.5 77.9 79.2 75.1 79.4 79.9 80.0 75.9 80.3 80.7 81.7 76.5 81.7 82.1",
    ),
    "7": printed(by_width((16, WIDTHS[-1]), ("1:1", "3:1", "7:1")), "84.0 84.0 - 86.7 87.4 -"),
    "8": printed(
        {"supervised": Arm(width=16)}
        | {f"{percent} %, warm": _same(16, steps=percent, warm=True) for percent in (10, 20, 40, 80)}
        | {"100 %, no warm start": _same(16)},
        "77.3 77.4 77.5 77.7 77.8 77.9",
    ),
}
"""The arms by their names; one that several studies have is run once."""

ARMS: tuple[Arm, ...] = tuple(dict.fromkeys(arm for arms in STUDIES.values() for arm, _ in arms.values()))


# -------------------------------------------------------------------------------------------------------- the networks


def passed(weights: Weights, x: Tensor, masks: Sequence[Tensor | None] = (None, None)) -> Tensor:
    """The outputs, (S, B, C).

    Args:
        masks: for each hidden layer, what its values are multiplied by; None: they stay.
    """
    *hidden, (last, bias) = zip(weights[::2], weights[1::2], strict=True)
    for (weight, b), mask in zip(hidden, masks, strict=True):
        x = torch.baddbmm(b, x, weight).relu()
        x = x if mask is None else x * mask
    return torch.baddbmm(bias, x, last)


def dropped(weights: Weights, batch: int, p: float, draw: torch.Generator, rows: int | None = None) -> list[Tensor]:
    """Masks that drop hidden units of a stack of networks with this probability, (S, B, H) for each hidden layer; in
    the first ``rows`` alone, where there are any."""
    masks = [torch.ones(len(bias), batch, bias.shape[-1]) for bias in weights[1:-1:2]]
    for mask in masks:
        part = mask[:, :rows]
        part.copy_((torch.rand(part.shape, generator=draw) >= p).float() / (1 - p))
    return masks


@dataclass
class Learner:
    """A stack of networks that SGD with momentum trains.

    Args:
        weights: theirs, changed in place.
        lr: learning rate.
    """

    weights: Weights
    lr: float
    velocity: Weights | None = None

    def step(self, x: Tensor, targets: Tensor, masks: Sequence[Tensor | None], factor: float) -> None:
        """One on the mean cross-entropy of the batch, at this factor of the rate."""
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in self.weights]
            loss = -(targets * passed(leaves, x, masks).log_softmax(-1)).sum() / x.shape[1]
        gradient = list(torch.autograd.grad(loss, leaves))
        if self.velocity is not None:
            gradient = list(torch._foreach_add(gradient, self.velocity, alpha=MOMENTUM))
        self.velocity = gradient
        torch._foreach_add_(self.weights, gradient, alpha=-self.lr * factor)


def first_weights(width: int, seeds: Sequence[int], student: int) -> Weights:
    """Networks as they begin; ``student``: 0 for the first teacher, then the number of the round."""
    weights: list[Weights] = []
    for seed in seeds:
        torch.manual_seed(10 * seed + student)
        layers = [m for m in mlp([64, width, width, CLASSES]) if isinstance(m, nn.Linear)]
        weights.append([t for layer in layers for t in (layer.weight.detach().T, layer.bias.detach()[None])])
    return [torch.stack(same) for same in zip(*weights, strict=True)]


# --------------------------------------------------------------------------------------------------------- the batches


def selected(q: Tensor, *, threshold: float, per_class: int | None, balanced: bool) -> Tensor:
    """Examples that are kept, each as often as it counts: what ``metapl.apps.labels.queries.select`` keeps of a store.

    Args:
        q: (n, C), their labels.
        threshold: of the confidence; 0 where none is above it.
        per_class: the most of a class, and with ``balanced`` how many of each count.
        balanced: fill up classes that have fewer.
    """
    confidence, label = q.max(1)
    kept = confidence > (threshold if float(confidence.max()) > threshold else 0.0)
    chosen: list[int] = []
    groups: list[list[int]] = []
    for c in range(q.shape[1]):
        mine = (kept & (label == c)).nonzero()[:, 0]
        order = mine[confidence[mine].argsort(descending=True, stable=True)]
        groups.append(sorted(order[:per_class].tolist()))
    goal = (per_class or max(map(len, groups))) if balanced else 0
    for group in groups:
        times, more = divmod(goal, len(group)) if group and balanced else (1, 0)
        once_more = set(sorted(group, key=lambda example: hashlib.md5(str(example).encode()).digest()[:7:-1])[:more])
        for example in group:
            chosen += [example] * (times + (example in once_more))
    return torch.tensor(sorted(chosen))


def shuffled(positions: Tensor, length: int, seed: int, stream: int) -> Tensor:
    """The first so many of an endless stream of shuffled epochs of some examples."""
    generator = torch.Generator().manual_seed(1_000 * seed + 500 + stream)
    epochs = -(-length // len(positions))
    return torch.cat([positions[torch.randperm(len(positions), generator=generator)] for _ in range(epochs)])[:length]


def batches(
    x: Tensor,
    kept: Sequence[Tensor],
    targets: Tensor,
    setting: Setting,
    stream: int,
    batch: int,
    steps: int,
    seen: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and targets.

    Args:
        x, targets: (S, n, 64) and (S, n, C).
        kept: of each seed, the examples that are drawn.
        stream: keeps apart what is drawn for different purposes.
        seen: augmented.
    """
    pairs = zip(kept, setting.seeds, strict=True)
    order = torch.stack([shuffled(positions, batch * steps, seed, stream) for positions, seed in pairs])
    order, rows = order.unflatten(1, (steps, batch)), torch.arange(len(setting.seeds))[:, None]
    for one, altered in views(x, setting.seeds, stream, batch, steps, order):
        yield (altered if seen else x[rows, one]), targets[rows, one]


# ------------------------------------------------------------------------------------------------------------ the runs


class Setting(NamedTuple):
    """What was tuned, and how much is run: all numbers of steps are divided."""

    lr: float
    dropout: float
    seeds: tuple[int, ...]
    divisor: int = 1

    def steps(self, steps: int) -> int:
        return max(2, steps // self.divisor)

    def labeled(self, stream: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = drawn(LABELS, self.seeds).labeled
        everything = [torch.arange(x.shape[1])] * len(self.seeds)
        return batches(x, everything, F.one_hot(y, CLASSES).to(x), self, stream, LABELED_BATCH, steps, seen=True)


def trained(arm: Arm, setting: Setting) -> Weights:
    """The networks of an arm, one a seed."""
    if arm.teacher is None:
        return supervised(arm.width, setting)
    return student(arm, labeler(arm.teacher, arm.rounds, setting), setting, arm.rounds + 1)


@lru_cache(maxsize=64)
def supervised(width: int, setting: Setting) -> Weights:
    """Networks that learn from the labeled examples alone, with noise."""
    learner = Learner(first_weights(width, setting.seeds, 0), setting.lr)
    _learn_labels(learner, setting, setting.steps(STEPS), stream=0, decay=True)
    return learner.weights


@lru_cache(maxsize=16)
def labeler(width: int, rounds: int, setting: Setting) -> Weights:
    """The networks that label: the first teachers, or the students after so many rounds."""
    if not rounds:
        return supervised(width, setting)
    return student(_same(width, ratio=3), labeler(width, rounds - 1, setting), setting, rounds)


def _learn_labels(learner: Learner, setting: Setting, steps: int, stream: int, decay: bool) -> None:
    draw = torch.Generator().manual_seed(stream)
    for step, (seen, right) in enumerate(setting.labeled(stream, steps)):
        masks = dropped(learner.weights, seen.shape[1], setting.dropout, draw)
        learner.step(seen, right, masks, decayed(step, steps) if decay else 1.0)


def decayed(step: int, steps: int) -> float:
    """The factor of the rate: Noisy Student's schedule for so many steps."""
    return float(DECAY ** (step / decay_interval(steps)))


def labels_of(arm: Arm, teacher: Weights, setting: Setting) -> Tensor:
    """The teacher's distributions on the unlabeled examples, (S, n, C)."""
    x, _ = drawn(LABELS, setting.seeds).unlabeled
    if not arm.noisy_teacher:
        return passed(teacher, x).softmax(-1)
    everything = torch.arange(x.shape[1]).expand(len(setting.seeds), 1, -1)
    _, seen = next(views(x, setting.seeds, 7, x.shape[1], 1, everything))
    masks = dropped(teacher, x.shape[1], setting.dropout, torch.Generator().manual_seed(7))
    return passed(teacher, seen, masks).softmax(-1)


def kept_of(arm: Arm, q: Tensor, seeds: Sequence[int]) -> list[Tensor]:
    """The examples that each seed's student learns from, each as often as it counts."""
    kept = []
    for labels, seed in zip(q, seeds, strict=True):
        pool = torch.arange(len(labels))
        if arm.share < 1:
            drawn_evenly = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            pool = drawn_evenly[: round(arm.share * len(labels))].sort().values
        mine = labels[pool]
        if arm.fifth is not None:
            parts = mine.max(1).values.argsort().tensor_split(5)
            kept.append(pool[parts[arm.fifth]])
            continue
        most = -(-len(mine) // CLASSES) if arm.balanced else None
        kept.append(pool[selected(mine, threshold=THRESHOLD, per_class=most, balanced=arm.balanced)])
    return kept


def student(arm: Arm, teacher: Weights, setting: Setting, number: int) -> Weights:
    """Networks that learn from the labels of their teachers."""
    q = labels_of(arm, teacher, setting)
    targets = F.one_hot(q.argmax(-1), CLASSES).to(q) if arm.hard else q
    weights = [w.clone() for w in teacher] if arm.warm else first_weights(arm.width, setting.seeds, number)
    usual, steps = setting.steps(STEPS), setting.steps(round(STEPS * arm.steps / 100))
    # A run that is shorter ends at the rate of a usual one: study 8.
    learner = Learner(weights, setting.lr * decayed(usual - steps, usual))
    kept, x, draw = kept_of(arm, q, setting.seeds), drawn(LABELS, setting.seeds).unlabeled[0], torch.Generator()
    draw.manual_seed(number)
    unlabeled = batches(x, kept, targets, setting, 1, arm.ratio * LABELED_BATCH, steps, arm.augment)
    joint = arm.training == "joint"
    rows = None if arm.dropout else LABELED_BATCH if joint else 0
    for step, ((x_l, y_l), (x_u, q_u)) in enumerate(zip(setting.labeled(2, steps), unlabeled, strict=True)):
        seen, target = (torch.cat([x_l, x_u], 1), torch.cat([y_l, q_u], 1)) if joint else (x_u, q_u)
        masks = dropped(weights, seen.shape[1], setting.dropout, draw, rows)
        learner.step(seen, target, masks, decayed(step, usual))
    if arm.training != "pretrain_finetune":
        return learner.weights
    found = []  # finetuned on the labeled examples, for as many steps as validate best
    for steps in FINETUNINGS:
        tuned = Learner([w.clone() for w in weights], FINETUNE_LR)
        _learn_labels(tuned, setting, setting.steps(steps), stream=3, decay=False)
        found.append((statistics.fmean(right(tuned.weights, "validation", setting)), tuned.weights))
    return max(found, key=lambda pair: pair[0])[1]


def right(weights: Weights, part: Literal["validation", "test", "unlabeled"], setting: Setting) -> list[float]:
    """The share of a part that each network is right on."""
    x, y = getattr(drawn(LABELS, setting.seeds), part)
    shares: list[float] = (passed(weights, x).argmax(-1) == y).double().mean(1).tolist()
    return shares


# ----------------------------------------------------------------------------------------------------------- the study


def tuned(rows: Sequence[Row]) -> tuple[float, float]:
    """The learning rate and the dropout with the best mean accuracy on validation examples."""
    best = max((row for row in rows if not row["final"]), key=lambda row: statistics.fmean(row["validation"]))
    return best["lr"], best["dropout"]


def study(seeds: tuple[int, ...], tuning_seeds: tuple[int, ...], divisor: int, out: Path) -> None:
    """Tune and run what has no row yet; each row is written when it is there."""

    def run(final: bool, seeds: tuple[int, ...], lr: float, dropout: float, arm: Row | None = None) -> Row:
        began, setting = time.perf_counter(), Setting(lr, dropout, seeds, divisor)
        weights = trained(Arm(**arm) if arm else _same(32), setting)
        parts: Any = ("test", "unlabeled") if final else ("validation",)
        found = {part: right(weights, part, setting) for part in parts}
        return {**found, "seconds": round(time.perf_counter() - began, 1)}

    grid = itertools.product(RATES, DROPOUTS)
    tuning = ({"final": False, "seeds": tuning_seeds, "lr": lr, "dropout": dropout} for lr, dropout in grid)
    lr, dropout = tuned([row for row in harness.go_on(out, tuning, run, about=harness.environment()) if "final" in row])
    chosen = {"seeds": seeds, "lr": lr, "dropout": dropout}
    harness.go_on(out, ({"final": True, "arm": dataclasses.asdict(arm), **chosen} for arm in ARMS), run)


# --------------------------------------------------------------------------------------------------- beside the paper

SURE = 0.05
"""p below which a difference counts as shown."""


def reference(study: str, name: str) -> str | None:
    """The arm that an arm is compared with; None: it is what the others are compared with."""
    width, first = name.partition(":")[0], name.partition(",")[0]
    other = {
        "noise": f"Noisy Student, {name.partition(', ')[2]}",
        "1": f"{width}: supervised",
        "5": f"{width}: {'Noisy Student' if name.endswith('balancing') else 'supervised'}",
        "6": f"{width}: joint",
        "7": f"{width}: 1:1",
        "8": "100 %, no warm start",
    }.get(study, "supervised")
    if study == "4":  # a student with its teacher, and a teacher with one of half its width
        other = first if first.startswith("teacher") else f"teacher {int(first.split()[-1]) // 2}"
    return None if other == name else other


class Compared(NamedTuple):
    """An arm of a study: its accuracies by seed, those of the arm that it is compared with, what that is called without
    what both have, and the paper's difference in points, if any."""

    first: list[float]
    second: list[float] | None
    beside: str
    paper: float | None

    @property
    def verdict(self) -> str:
        """Whether the paper's difference is seen here."""
        if self.second is None or self.paper is None:
            return NONE
        test = paired_test(self.first, self.second)
        if test.p is None or test.p >= SURE:
            return "not shown"
        if self.paper == 0:
            return "the paper has no difference"
        return "yes" if (test.mean > 0) == (self.paper > 0) else "the reverse"


def comparisons(rows: Sequence[Row]) -> dict[str, dict[str, Compared]]:
    """By study and arm; of the arms that have a row."""
    known = [(row["arm"], row["test"]) for row in rows if row["final"]]
    found: dict[str, dict[str, Compared]] = {}
    for study, arms in STUDIES.items():
        own = {n: test for n, (arm, _) in arms.items() for of, test in known if of == dataclasses.asdict(arm)}
        for name, values in own.items():
            other, paper, beside = reference(study, name), None, NONE
            if other in own and other is not None:
                printed = [arms[each][1] for each in (name, other)]
                paper = None if None in printed else round(printed[0] - printed[1], 1)  # type: ignore[operator]
                beside = other.partition(": ")[2] or other.partition(", ")[0]
            compared = Compared(values, own.get(other or ""), "no warm start" if study == "8" else beside, paper)
            found.setdefault(study, {})[name] = compared
    return found


def verdicts(rows: Sequence[Row]) -> Counter[str]:
    """How often each verdict is given, of the paper's differences that are not zero."""
    every = (each for arms in comparisons(rows).values() for each in arms.values())
    return Counter(each.verdict for each in every if each.paper)


def block(rows: Sequence[Row]) -> str:
    """All tables, and what they were made with."""
    counts = verdicts(rows)
    parts = [
        f"Of the {sum(counts.values())} differences that the paper prints and these tables have (some rows share their "
        f"arms), {counts['yes']} are seen here with the same sign (p < {SURE}), {counts['the reverse']} with the other "
        f"sign, and {counts['not shown']} are not shown."
    ]
    head = ["arm", "here", "against", "difference", "95 %", "p", "paper", "its difference", "seen here"]
    for study, arms in comparisons(rows).items():
        lines = []
        for name, each in arms.items():
            cells, printed = [name, harness.spread(each.first), *[NONE] * 4], STUDIES[study][name][1]
            if each.second:
                gain, p = harness.difference(each.first, each.second)
                cells[2:] = [each.beside, gain, harness.between(each.first, each.second), p]
            cells.append(NONE if printed is None else f"{printed:.1f}")
            lines.append([*cells, NONE if each.paper is None else f"{each.paper:+.1f}", each.verdict])
        parts.append(f"**{HEADINGS[study]}**\n\n{harness.grid(head, lines, 'lrlrrrrrl')}")
    seeds = "/".join(str(len(each)) for each in {tuple(row["seeds"]) for row in rows if row["final"]})
    lr, dropout = tuned(rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    arms_run = len({str(row["arm"]) for row in rows if row["final"]})
    parts.append(
        f"Test accuracy in %, mean ± standard deviation over {seeds} seeds (400 test images each, drawn anew per seed "
        "from the same 1,797); differences in points, with the paired t-test's interval and p "
        "over draws of these images, not corrected for the "
        f"number of rows. Paper: top-1 on ImageNet. {arms_run} arms, {STEPS:,} steps each, learning rate {lr:g} and "
        f"dropout {dropout:g} by validation on other seeds; {minutes:.0f} minutes, on a machine with other work. "
        "`python benchmarks/noisy_student.py`; raw rows: `benchmarks/results/noisy_student.jsonl`."
    )
    return "\n\n".join(parts)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Each difference with its interval, beside the paper's, a panel a study."""
    panels = {
        HEADINGS[study].partition(" (")[0]: [
            Bar(f"{name.replace('augmentation', 'aug.').replace(' of the unlabeled', '')} − {each.beside}",
                each.first, each.second, other=each.paper)
            for name, each in arms.items()
            if each.second
        ]
        for study, arms in comparisons(rows).items()
    }  # fmt: skip
    counts = verdicts(rows)
    heading = (
        f"Of the paper's {sum(counts.values())} differences {counts['yes']} are seen on digits, "
        f"{counts['the reverse']} the other way round, and {counts['not shown']} are not shown"
    )
    axis = "points, digits, 95 %; diamonds: the paper, ImageNet"
    harness.bars(path, panels, heading, axis, columns=2)


def main() -> None:
    given = harness.parsed(harness.arguments(__doc__, RAW))
    torch.set_num_threads(1)
    if given.runs and given.miniature:
        study((300, 301), (320,), 10**9, given.out)
    elif given.runs:
        study(tuple(range(300, 312)), (320, 321, 322), 1, given.out)
    rows = harness.read(given.out, "final")
    harness.show(given.write, "noisy-student-studies", block(rows))
    if given.write:
        draw(harness.figure_of(given.write, f"{given.out.stem}.png"), rows)


if __name__ == "__main__":
    main()
