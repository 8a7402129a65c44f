"""Noisy Student's eight studies and its table of noise, on digits, paired over seeds.

    # tune, then run; goes on where it was stopped
    python benchmarks/noisy_student.py
    # print the tables, with their p-values; or write them there, and the figure in docs/
    python benchmarks/noisy_student.py --table
    python benchmarks/noisy_student.py --write benchmarks/results/noisy_student.md

A teacher learns from the labeled digits with noise and labels the unlabeled ones without; they are
selected, and a student learns from both by the mean over the batch, with the losses, batches and
selection of ``metapl noisy-student``. The committed rows are older: steps for all seeds at once,
written by hand, gave them (last in commit 9007a994).

4 labels a class. Networks: two hidden layers of a width of 8 to 128, in the place of
EfficientNet-B0 to L2. Noise: the digits' shift, noise and hole in the place of RandAugment, and
dropout; there is no stochastic depth, for these networks have no blocks to drop. Tuning: the
learning rate and the dropout, on 3 other seeds, by the validation accuracy of a student of width
32. Nothing else is chosen but the length of study 6's finetuning, by validation. The test images
are read once, after the last step of each network.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import harness
import torch
from harness import NONE, RESULTS, Bar, Row
from torch import Tensor, nn

from metapl.apps.data import Data
from metapl.apps.digits import Digits, fitting
from metapl.apps.methods.noisy_student import noisy_view
from metapl.apps.train import evaluated
from metapl.data.draws import fold_in
from metapl.data.steps import StepSampler
from metapl.labels.selection import select
from metapl.labels.store import LabelStore, LabelWriter
from metapl.metrics import paired_test
from metapl.metrics.predictions import logits_of
from metapl.noisy_student import Chosen, Noised, PseudoLabeledBatches, end_matched
from metapl.pictures.views.base import Identity
from metapl.problems import NoisyStudentLoss
from metapl.problems.losses import CrossEntropy
from metapl.training.loss_trainer import LossTrainer
from metapl.training.options import decay_interval

RAW = RESULTS / "noisy_student.jsonl"
LABELS = 4
LABELED_BATCH = 32
STEPS = 1500
FINETUNE_LR = 0.02
# Unlabeled examples are kept above this confidence, which is Noisy Student's.
THRESHOLD = 0.3
WIDTHS = (8, 16, 32, 64, 128)
# Tuned: learning rates, probabilities of dropping a hidden unit.
RATES = (0.1, 0.2)
DROPOUTS = (0.05, 0.1)

# Lengths of study 6's finetuning, of which the best by validation is taken.
FINETUNINGS = (
    50,
    150,
    500,
)


# ----------------------------------------------------------------------------------------- the arms


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A network and how it is trained.

    Attributes:
        width: the width of its hidden layers.
        teacher: the width of the network that labels; None: it learns from the labeled examples
            alone.
        rounds: so many students, each of its width, the teacher itself is the last of.
        ratio: unlabeled examples in a batch for each labeled one.
        share: the share of the unlabeled examples that are used, drawn evenly.
        fifth: a fifth of them by the teacher's confidence, the least confident first; None: they
            are selected by the threshold.
        hard: the most probable class is learned, and not the distribution.
        balanced: there are as many of each class, the most confident ones, and copies where there
            are fewer.
        augment, dropout: on unlabeled examples; labeled ones always have both.
        noisy_teacher: the teacher labels augmented examples, with dropout.
        training: on both at once, or first on the unlabeled ones.
        steps: those of all, in percent of the usual number.
        warm: begin with the teacher's weights, at a rate that ends as usual.
    """

    width: int
    teacher: int | None = None
    rounds: int = 0
    ratio: int = 1
    share: float = 1.0
    fifth: int | None = None
    hard: bool = False
    balanced: bool = True
    augment: bool = True
    dropout: bool = True
    noisy_teacher: bool = False
    training: Literal["joint", "pretrain", "pretrain_finetune"] = "joint"
    steps: float = 100.0
    warm: bool = False


def _same(width: int, **changes: Any) -> Arm:
    return Arm(width=width, teacher=width, **changes)


SMALL = WIDTHS[:4]
SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 4, 1.0)
# The largest network after two rounds, in the place of the iterated L2.
BEST = {
    "teacher": WIDTHS[-1],
    "rounds": 2,
}

Arms = dict[str, tuple[Arm, float | None]]
# Arms by their width.
KINDS: dict[str, Callable[[int], Arm]] = {
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
# Arms by the share of the unlabeled examples.
NOISE: dict[str, Callable[[float], Arm]] = {
    "supervised": lambda share: Arm(width=32),
    "Noisy Student": lambda share: _same(32, share=share),
    "student without augmentation": lambda share: _same(32, share=share, augment=False),
    "student without augmentation and dropout": lambda share: _same(
        32, share=share, augment=False, dropout=False
    ),
    "teacher with augmentation and dropout": lambda share: _same(
        32, share=share, noisy_teacher=True
    ),
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
    """Return each arm with the top-1 accuracy on ImageNet in % that the paper prints of it.

    "-" stands where it prints none.
    """
    numbers = [None if value == "-" else float(value) for value in values.split()]
    return {name: (arm, value) for (name, arm), value in zip(arms.items(), numbers, strict=True)}


HEADINGS = {
    "noise": "Noise (Table 6; B5, with 1.3M and with 130M unlabeled images)",
    "1": "Study 1, teacher capacity (Table 9; widths for B0, B2, B4, B6, B7, best teacher for L2)",
    "2": "Study 2, unlabeled size (Table 10; B4)",
    "3": "Study 3, hard and soft labels by the teacher's confidence (Figure 5; B0; its values are "
    "not printed)",
    "4": "Study 4, student capacity (Table 11; widths 8, 16, 32, 64 for teachers B0, B2, B4, B7)",
    "5": "Study 5, balancing (Table 12; widths for B0 to B3)",
    "6": "Study 6, joint training (Table 13; widths for B0 to B3)",
    "7": "Study 7, batch ratio (Table 14; widths for B4 and for L2 with the teacher of 87.0)",
    "8": "Study 8, warm start (Table 15; B0)",
}
SOME = ((1 / 16, "a sixteenth"), (1.0, "all"))
FIFTHS = [*itertools.product(range(5), ("soft", "hard"))]
STUDIES: dict[str, Arms] = {
    "noise": printed(
        {
            f"{name}, {of} of the unlabeled": made(share)
            for share, of in SOME
            for name, made in NOISE.items()
        },
        "83.3 83.9 83.6 83.2 83.7 84.0 85.1 84.6 84.3 84.4",
    ),
    "1": printed(
        by_width(WIDTHS, ("supervised", "same teacher", "best teacher")),
        "77.3 78.1 78.8 80.0 81.1 82.4 83.2 84.4 85.3 84.5 85.9 86.4 85.0 86.4 86.9",
    ),
    "2": printed(
        {"supervised": Arm(width=32)}
        | {f"1/{round(1 / share)}": _same(32, share=share) for share in SHARES},
        "83.2 83.4 83.3 83.7 83.9 83.8 84.0",
    ),
    "3": printed(
        {"supervised": Arm(width=16)}
        | {
            f"{q}, fifth {n + 1}": _same(16, fifth=n, hard=q == "hard", balanced=False)
            for n, q in FIFTHS
        },
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
        | {
            f"{percent} %, warm": _same(16, steps=percent, warm=True)
            for percent in (10, 20, 40, 80)
        }
        | {"100 %, no warm start": _same(16)},
        "77.3 77.4 77.5 77.7 77.8 77.9",
    ),
}
"""The arms by their names; one that several studies have is run once."""

ARMS: tuple[Arm, ...] = tuple(
    dict.fromkeys(arm for arms in STUDIES.values() for arm, _ in arms.values())
)

# Differences between two arms of which neither is what the study's arms are compared with, by study
# and by question: those that the paper's text draws its findings from. p is also printed times the
# number of differences that answer the same question (Bonferroni).
FURTHER: dict[str, dict[str, list[tuple[str, str]]]] = {
    "1": {
        "the best teacher, minus a teacher of the student's width": [
            (f"width {width}: best teacher", f"width {width}: same teacher") for width in WIDTHS
        ]
    },
    "3": {
        "soft labels, minus hard ones": [
            (f"soft, fifth {number}", f"hard, fifth {number}") for number in range(1, 6)
        ]
    },
    "4": {
        "the larger student, minus the equal one": [
            (f"teacher {width}, student {2 * width}", f"teacher {width}, student {width}")
            for width in SMALL
        ],
        "the larger student, minus a supervised network of its width": [
            (f"teacher {width}, student {2 * width}", f"supervised {2 * width}") for width in SMALL
        ],
    },
}


# ----------------------------------------------------------------------------------------- the runs


class Setting(NamedTuple):
    """What was tuned, the seed, and how much is run: all numbers of steps are divided."""

    lr: float
    dropout: float
    seed: int
    divisor: int = 1

    def steps(self, steps: int) -> int:
        return max(2, steps // self.divisor)

    def config(self, width: int) -> Digits:
        options = fitting(
            seed=self.seed, labeled_batch=LABELED_BATCH, lr=self.lr, schedule="exponential"
        )
        return Digits(
            labels_per_class=LABELS, hidden=(width, width), dropout=self.dropout, fitting=options
        )


@lru_cache(maxsize=16)
def drawn(seed: int) -> Data:
    return Setting(0.1, 0.0, seed).config(32).data(print, progress=False, log=None)


def learned(
    network: nn.Module, losses: Any, optimizer: Any, *sources: Any, steps: int, **options: Any
) -> nn.Module:
    trainer = LossTrainer(network, losses, optimizer=optimizer)
    trainer.fit(*sources, steps=steps, log_every=steps, progress=False, **options)
    return network


@cache
def supervised(width: int, setting: Setting) -> nn.Module:
    """Return a network that learned from the labeled examples alone, with noise."""
    config = setting.config(width)
    steps = setting.steps(STEPS)
    torch.manual_seed(fold_in(setting.seed, 0))
    network = config.network()
    optimizer = config.optimizer("teacher", network)
    decay = decay_interval(steps)
    sources = (drawn(setting.seed).labeled, None)
    rates = {"schedule": "exponential", "decay_every": decay}
    return learned(network, (CrossEntropy(),), optimizer, *sources, steps=steps, **rates)


@cache
def labeler(width: int, rounds: int, setting: Setting) -> nn.Module:
    """Return the network that labels: the first teacher, or a student after so many rounds."""
    if not rounds:
        return supervised(width, setting)
    return student(_same(width, ratio=3), labeler(width, rounds - 1, setting), setting, rounds)


def kept_of(arm: Arm, q: Tensor, seed: int) -> Tensor:
    """Return the examples that the student learns from, each as often as it counts."""
    pool = torch.arange(len(q))
    if arm.share < 1:
        drawn_evenly = torch.randperm(len(q), generator=torch.Generator().manual_seed(seed))
        pool = drawn_evenly[: round(arm.share * len(q))].sort().values
    confidence = q[pool].max(1).values
    if arm.fifth is not None:
        return pool[confidence.argsort().tensor_split(5)[arm.fifth]]
    threshold = THRESHOLD if float(confidence.max()) > THRESHOLD else 0.0
    most = -(-len(pool) // q.shape[1]) if arm.balanced else None
    with tempfile.TemporaryDirectory() as folder:
        all_labels = Path(folder) / "every"
        selected_labels = Path(folder) / "kept"
        with LabelWriter(all_labels, Digits.classes, provenance={}) as writer:
            writer.add(pool.tolist(), q[pool])
        select(
            LabelStore(all_labels),
            selected_labels,
            threshold=threshold,
            per_class=most,
            balance=arm.balanced,
        )
        store = LabelStore(selected_labels)
        return torch.from_numpy(store.column("id"))[store.rows_with_copies()].sort().values


def student(arm: Arm, teacher: nn.Module, setting: Setting, number: int) -> nn.Module:
    """Return a network that learned the labels of its teacher, in the round of this number."""
    config = setting.config(arm.width)
    data = drawn(setting.seed)
    seed = fold_in(setting.seed, number)
    x = data.unlabeled.images
    view = noisy_view(data)
    if arm.noisy_teacher:
        teacher = Noised(teacher, seed)
        x = view(x, seed=seed, step=0, examples=torch.arange(len(x)))
    q = logits_of(teacher, x.split(256)).softmax(dim=1)
    labels_of_selection = kept_of(arm, q, setting.seed)
    chosen = Chosen(labels_of_selection, labels_of_selection, lambda rows: q[rows])
    sampler = StepSampler(len(labels_of_selection), arm.ratio * LABELED_BATCH, seed=seed, stream=1)
    seen = view if arm.augment else Identity()
    pairs = PseudoLabeledBatches(
        data.unlabeled.images[labels_of_selection], sampler, seen, None, seed, chosen=chosen
    )
    labeled = dataclasses.replace(
        data.labeled, seed=seed, sampler=dataclasses.replace(data.labeled.sampler, seed=seed)
    )
    losses: Any = (NoisyStudentLoss("mean", arm.hard, arm.dropout),)
    sources: Any = (labeled, pairs)
    if arm.training != "joint":
        losses, sources = (NoisyStudentLoss(hard=arm.hard, model_noise=arm.dropout),), (pairs, None)
    torch.manual_seed(seed)
    network = copy.deepcopy(teacher) if arm.warm else config.network()
    usual = setting.steps(STEPS)
    steps = setting.steps(round(STEPS * arm.steps / 100))
    optimizer = config.optimizer("teacher", network)
    decay = decay_interval(usual)
    # A run that is shorter ends at the rate of a usual one: study 8.
    for group in optimizer.param_groups:
        group["lr"] *= end_matched(steps, usual)
    learned(
        network, losses, optimizer, *sources, steps=steps, schedule="exponential", decay_every=decay
    )
    if arm.training != "pretrain_finetune":
        return network
    # Each is finetuned for another number of steps, and the one that validates best is taken.
    tuned = [copy.deepcopy(network) for _ in FINETUNINGS]
    for candidate, steps in zip(tuned, FINETUNINGS, strict=True):
        slow = torch.optim.SGD(candidate.parameters(), lr=FINETUNE_LR, momentum=0.9)
        learned(
            candidate,
            (CrossEntropy(),),
            slow,
            data.finetuning,
            None,
            steps=setting.steps(steps),
            schedule="constant",
        )
    return max(tuned, key=lambda candidate: evaluated(candidate, data.validation).accuracy)


def reached(arm: Arm, setting: Setting, parts: Sequence[str]) -> list[float]:
    """Return the share of each part that the network of an arm is right on."""
    if arm.teacher is None:
        network = supervised(arm.width, setting)
    else:
        network = student(arm, labeler(arm.teacher, arm.rounds, setting), setting, arm.rounds + 1)
    data = drawn(setting.seed)
    parts_to_judge: dict[str, Any] = {
        "validation": data.validation,
        "test": data.test,
        "unlabeled": data.truth,
    }
    return [evaluated(network, parts_to_judge[part]).accuracy for part in parts]


# ---------------------------------------------------------------------------------------- the study


def tuned(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the rate and the dropout with the best mean accuracy on validation examples."""
    best = max(
        (row for row in rows if not row["final"]),
        key=lambda row: statistics.fmean(row["validation"]),
    )
    return best["lr"], best["dropout"]


def study(
    seeds: tuple[int, ...],
    tuning_seeds: tuple[int, ...],
    arms: Sequence[Arm],
    divisor: int,
    out: Path,
) -> None:
    """Tune and run what has no row yet; each row is written when it is there."""

    def run(
        final: bool, seeds: tuple[int, ...], lr: float, dropout: float, arm: Row | None = None
    ) -> Row:
        began = time.perf_counter()
        parts = ("test", "unlabeled") if final else ("validation",)
        trained = Arm(**arm) if arm else _same(32)
        rows_of_seeds = [
            reached(trained, Setting(lr, dropout, seed, divisor), parts) for seed in seeds
        ]
        columns: Row = dict(zip(parts, map(list, zip(*rows_of_seeds, strict=True)), strict=True))
        return {**columns, "seconds": round(time.perf_counter() - began, 1)}

    grid = itertools.product(RATES, DROPOUTS)
    tuning = (
        {"final": False, "seeds": tuning_seeds, "lr": lr, "dropout": dropout}
        for lr, dropout in grid
    )
    lr, dropout = tuned(
        [
            row
            for row in harness.go_on(out, tuning, run, about=harness.environment())
            if "final" in row
        ]
    )
    chosen = {"seeds": seeds, "lr": lr, "dropout": dropout}
    harness.go_on(
        out, ({"final": True, "arm": dataclasses.asdict(arm), **chosen} for arm in arms), run
    )


# --------------------------------------------------------------------------------- beside the paper

SURE = 0.05
"""p below which a difference counts as shown."""


def reference(study: str, name: str) -> str | None:
    """Return the arm that an arm is compared with; None for the one that the others have."""
    width = name.partition(":")[0]
    first = name.partition(",")[0]
    other = {
        "noise": f"Noisy Student, {name.partition(', ')[2]}",
        "1": f"{width}: supervised",
        "5": f"{width}: {'Noisy Student' if name.endswith('balancing') else 'supervised'}",
        "6": f"{width}: joint",
        "7": f"{width}: 1:1",
        "8": "100 %, no warm start",
    }.get(study, "supervised")
    # Here a student is compared with its teacher, and a teacher with one of half its width.
    if study == "4":
        other = first if first.startswith("teacher") else f"teacher {int(first.split()[-1]) // 2}"
    return None if other == name else other


class Compared(NamedTuple):
    """An arm of a study, beside the one that it is compared with.

    Its accuracies by seed, those of the other, what that is called without what both have, and the
    paper's difference in points, if any.
    """

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
    """Return the comparisons by study and arm, of the arms that have a row."""
    results = [(row["arm"], row["test"]) for row in rows if row["final"]]
    arms_by_table: dict[str, dict[str, Compared]] = {}
    for study, arms in STUDIES.items():
        accuracies = {
            n: test
            for n, (arm, _) in arms.items()
            for name_of_arm, test in results
            if name_of_arm == dataclasses.asdict(arm)
        }
        for name, values in accuracies.items():
            other = reference(study, name)
            paper = None
            beside = NONE
            if other in accuracies and other is not None:
                printed = [arms[name_of_pair][1] for name_of_pair in (name, other)]
                paper = None if None in printed else round(printed[0] - printed[1], 1)  # type: ignore[operator]
                beside = other.partition(": ")[2] or other.partition(", ")[0]
            compared = Compared(
                values,
                accuracies.get(other or ""),
                "no warm start" if study == "8" else beside,
                paper,
            )
            arms_by_table.setdefault(study, {})[name] = compared
    return arms_by_table


def verdicts(rows: Sequence[Row]) -> Counter[str]:
    """Return how often each verdict is given, of the paper's differences that are not zero."""
    compared = (comparison for arms in comparisons(rows).values() for comparison in arms.values())
    return Counter(comparison.verdict for comparison in compared if comparison.paper)


def further(arms: dict[str, Compared], pairs: Sequence[tuple[str, str]]) -> str:
    """Return the differences that answer one question, as far as their arms have rows."""
    pairs = [pair for pair in pairs if set(pair) <= arms.keys()]
    lines = []
    for first, second in pairs:
        values = arms[first].first
        other_values = arms[second].first
        gain, p = harness.difference(values, other_values)
        exact = paired_test(values, other_values).p
        corrected = NONE if exact is None else f"{min(1.0, len(pairs) * exact):.2g}"
        interval = harness.between(values, other_values)
        lines.append([first, second, gain, interval, p, corrected])
    head = ["arm", "minus", "difference", "95 %", "p", f"p, {len(pairs)} times"]
    return harness.grid(head, lines, names=2)


def block(rows: Sequence[Row]) -> str:
    """Return all tables, and what they were made with."""
    counts = verdicts(rows)
    parts = [
        f"Of the {sum(counts.values())} differences that the paper prints and these tables have "
        f"(some rows share their arms), {counts['yes']} are seen here with the same sign (p < "
        f"{SURE}), {counts['the reverse']} with the other sign, and {counts['not shown']} are not "
        "shown."
    ]
    head = [
        "arm",
        "here",
        "against",
        "difference",
        "95 %",
        "p",
        "paper",
        "its difference",
        "seen here",
    ]
    for study, arms in comparisons(rows).items():
        lines = []
        for name, comparison in arms.items():
            cells = [name, harness.spread(comparison.first), *[NONE] * 4]
            printed = STUDIES[study][name][1]
            if comparison.second:
                gain, p = harness.difference(comparison.first, comparison.second)
                cells[2:] = [
                    comparison.beside,
                    gain,
                    harness.between(comparison.first, comparison.second),
                    p,
                ]
            cells.append(NONE if printed is None else f"{printed:.1f}")
            lines.append(
                [
                    *cells,
                    NONE if comparison.paper is None else f"{comparison.paper:+.1f}",
                    comparison.verdict,
                ]
            )
        parts.append(f"**{HEADINGS[study]}**\n\n{harness.grid(head, lines, 'lrlrrrrrl')}")
        for question, pairs in FURTHER.get(study, {}).items():
            parts.append(f"Study {study}, {question}:\n\n{further(arms, pairs)}")
    return "\n\n".join(parts)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw each difference with its interval, beside the paper's, a panel a study."""
    panels = {
        HEADINGS[study].partition(" (")[0]: [
            Bar(f"{name.replace('augmentation', 'aug.').replace(' of the unlabeled', '')} − "
                f"{comparison.beside}",
                comparison.first, comparison.second, other=comparison.paper)
            for name, comparison in arms.items()
            if comparison.second
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
    args = harness.parsed(harness.arguments(__doc__, RAW))
    torch.set_num_threads(1)
    if args.runs and args.miniature:
        study((300, 301), (320,), ARMS[::5], 10**9, args.out)
    elif args.runs:
        study(tuple(range(300, 312)), (320, 321, 322), ARMS, 1, args.out)
    rows = harness.read(args.out, "final")
    harness.show(args.write, "noisy-student-studies", block(rows))
    if args.write:
        draw(harness.figure_of(args.write, f"{args.out.stem}.png"), rows)


if __name__ == "__main__":
    main()
