"""When does the teacher's feedback help? Digits, arm by arm against the same loop without feedback, over 20 seeds.

    python benchmarks/when.py                        # tune, then run; goes on where it was stopped
    python benchmarks/when.py --write docs/when.md   # put the tables into the page, and draw the figure beside it
    python benchmarks/when.py --miniature --out FILE # all of it in seconds, to see that it runs

Five questions: how long training lasts and whether the feedback's size dies with the schedule (``length``), which part
of the feedback acts (``part``), what it does for a teacher whose labels are wrong (``wrong``), the size of the outer
batch (``outer``), and how many student steps it looks ahead (``ahead``).

Data, networks and views are those of ``digits_study.py``. Tuning: the settings of :data:`GRIDS`, equally many for each
method of a comparison, on 5 seeds; those with the best mean accuracy on 197 labeled validation images are taken, by
the student or by the finetuned student, whichever is better. Final runs: 20 other seeds, which no study of this
project had before. Nothing is selected, the average of the student's weights at the last step is kept, and the test
images are read then, once. All arms see the same pictures in the same order from the same weights for a seed. An arm is
a row of the raw file, with a figure for each seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from machine import arguments, parsed
from torch import Tensor
from torch.nn import functional as F
from when_stack import (
    CLASSES,
    Alteration,
    Batch,
    Rule,
    Stack,
    Views,
    Weights,
    copied,
    cosine,
    descend,
    drawn_for_controls,
    forward,
    stacked,
)

from metapl.apps.machine.environment import environment
from metapl.apps.pictures import load_digits_split
from metapl.models import mlp

RAW = Path(__file__).parent / "results" / "when.jsonl"
SIZES, BATCH, EMA_DECAY, FINETUNE_LR = [64, 32, 32, 10], 64, 0.995, 0.02
TEACHER_LR, MOMENTUM = 0.06, 0.9
"""Of the training on wrong labels that comes before, and of the recipe."""

BESIDE = 9
"""Arms that are trained side by side at most; what is stopped before it has rows begins again."""

LABELED, UNLABELED, FINETUNING, BEFORE = range(4)
"""Streams of batches."""

Row = dict[str, Any]
Condition = Literal["right", "asymmetric", "style", "half"]
CONDITIONS: dict[Condition, str] = {
    "right": "no labels but the few right ones",
    "asymmetric": "30 % of all labels are of the next class",
    "style": "30 % of all labels are of the next class: one end of each class",
    "half": "50 of each class, from one end of it",
}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    configurations: int | None
    finetune_steps: int
    before_steps: int
    divisor: int = 1
    """Of all numbers of steps."""

    def steps(self, steps: int) -> int:
        """So many."""
        return max(2, steps // self.divisor)


FULL = Size(tuple(range(100, 105)), tuple(range(200, 220)), None, finetune_steps=200, before_steps=1500)
MINIATURE = Size((100,), (200, 201), 1, finetune_steps=2, before_steps=2, divisor=10**9)

# ------------------------------------------------------------------------------------------------------------ the arms


@dataclass(frozen=True)
class Grid:
    """What is chosen from for one method.

    Args:
        condition, labels, steps: where.
        rules: the configurations.
    """

    condition: Condition
    labels: int
    steps: int
    rules: tuple[Rule, ...]


def _rules(**axes: tuple[Any, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(**dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values()))


STUDENT_LR = (0.5, 1.0)
METHODS: dict[str, tuple[Rule, ...]] = {
    "none": _rules(feedback=("none",), student_lr=STUDENT_LR, teacher_lr=(0.03, 0.06, 0.12)),
    "gradient": _rules(feedback=("gradient",), student_lr=STUDENT_LR, size=(0.3, 1.0, 3.0)),
    "learning_rate": _rules(feedback=("learning_rate",), student_lr=STUDENT_LR, size=(0.1, 0.3, 1.0)),
    "ratio": _rules(feedback=("ratio",), student_lr=STUDENT_LR, size=(0.03, 0.1, 0.3)),
}
"""Six configurations of each, beside right labels."""

WITHOUT = {"own_loss": (False,)}
WRONG: dict[str, tuple[Rule, ...]] = {
    "fixed": _rules(feedback=("none",), **WITHOUT, student_lr=(0.25, 0.5, 1.0, 2.0)),
    "alone": _rules(feedback=("learning_rate",), **WITHOUT, size=(0.03, 0.1, 0.3, 1.0)),
    "own": _rules(feedback=("none",), teacher_lr=(0.01, 0.03, 0.06, 0.12)),
    "own_and_feedback": _rules(feedback=("learning_rate",), teacher_lr=(0.03, 0.06), size=(0.3, 1.0)),
}
"""Four configurations of each, after a teacher has learned wrong labels."""

STEPS, LENGTHS = 1500, (1500, 6000, 24000)
"""Of tuning and of most arms, and those that are compared."""

# Of arms of 6,000 steps that were added when the others had been seen: the control tuned at its length, on a grid that
# its choice at 1,500 steps is in the middle of, and UDA as a loss of the teacher.
LATER: dict[str, tuple[Rule, ...]] = {
    "none_long": _rules(feedback=("none",), student_lr=STUDENT_LR, teacher_lr=(0.06, 0.12, 0.24)),
    "none_uda": _rules(feedback=("none",), uda=(1.0,), student_lr=STUDENT_LR, teacher_lr=(0.06, 0.12, 0.24)),
    "gradient_uda": _rules(feedback=("gradient",), uda=(1.0,), student_lr=STUDENT_LR, size=(0.3, 1.0, 3.0)),
}

GRIDS: dict[str, Grid] = {
    **{name: Grid("right", 2, STEPS, rules) for name, rules in METHODS.items()},
    **{name: Grid("right", 2, LENGTHS[1], rules) for name, rules in LATER.items()},
    **{name: Grid("style", 4, STEPS, rules) for name, rules in WRONG.items()},
}


@dataclass(frozen=True)
class Arm:
    """A final run over all seeds.

    Args:
        part: the question that it belongs to.
        method: its name there.
        tuned: the entry of :data:`GRIDS` that its settings are chosen from.
        condition, labels, steps: see :class:`Grid`.
        outer: labeled pictures in a batch.
        alteration: of the feedback.
        lookahead: student steps a teacher step.
    """

    part: str
    method: str
    tuned: str
    condition: Condition = "right"
    labels: int = 2
    steps: int = STEPS
    outer: int = BATCH
    alteration: Alteration | None = None
    lookahead: int = 1

    @property
    def group(self) -> tuple[Any, ...]:
        """Arms of one group see the same batches."""
        return self.condition, self.labels, self.steps, self.outer, self.lookahead


ALTERATIONS: tuple[Alteration, ...] = (
    "permuted",
    "class_means",
    "rest",
    "own_class_means",
    "within_class",
    "one_number",
    "sign",
    "random_sign",
    "negated",
)
ALTERATIONS_OF_WRONG: tuple[Alteration, ...] = (
    "permuted",
    "class_means",
    "own_class_means",
    "within_class",
)
OUTER, AHEAD = (16, 256), (2, 5, 10)


def _lengths(steps: int, labels: int) -> list[Arm]:
    return [Arm("length", method, method, labels=labels, steps=steps) for method in METHODS]


def _wrong(condition: Condition) -> list[Arm]:
    arms = [Arm("wrong", method, method, condition, labels=4) for method in WRONG]
    return arms + [
        Arm("wrong", f"alone {how}", "alone", condition, labels=4, alteration=how) for how in ALTERATIONS_OF_WRONG
    ]


def _arms() -> list[Arm]:
    arms = [*_lengths(STEPS, 4), *_lengths(STEPS, 2)]
    # The control is tuned by itself; this one has the rates of the feedback.
    arms += [Arm("length", "gradient zero", "gradient", steps=steps, alteration="zero") for steps in LENGTHS[1::-1]]
    # The weight keeps what a part of h has; the ratio gives every part the same size.
    arms += [Arm("part", f"gradient {how}", "gradient", alteration=how) for how in ALTERATIONS]
    arms += [Arm("part", f"ratio {how}", "ratio", alteration=how) for how in ("balance", "rest")]
    arms += [*_wrong("style"), *_lengths(LENGTHS[1], 2)[:3]]
    for K in AHEAD:
        arms += [
            Arm("ahead", f"{method} as many student steps", method, steps=STEPS // K, lookahead=K)
            for method in ("none", "gradient")
        ]
    arms += [Arm("outer", method, method, outer=outer) for outer in OUTER for method in ("none", "gradient")]
    arms += [*_wrong("asymmetric"), *_wrong("half")]
    more = [how for how in ALTERATIONS if how != "rest"]
    arms += [Arm("part", f"ratio {how}", "ratio", alteration=how) for how in more]
    arms += [*_lengths(LENGTHS[1], 2)[3:], *_lengths(LENGTHS[1], 4), *_lengths(LENGTHS[2], 2), *_lengths(LENGTHS[2], 4)]
    for K in AHEAD:
        arms += [
            Arm("ahead", f"{method} as many teacher steps", method, lookahead=K) for method in ("none", "gradient")
        ]
    arms += [Arm("length", "ratio balance", "ratio", steps=LENGTHS[1], alteration="balance")]
    return arms + [Arm("length", method, method, steps=LENGTHS[1]) for method in LATER]


ARMS: tuple[Arm, ...] = tuple(_arms())
"""In the order in which they are run."""

PARTS = tuple(dict.fromkeys(arm.part for arm in ARMS))


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True, eq=False)
class Data:
    """The digits of a stack of seeds: pictures (S, n, 64), and labels (S, n)."""

    labeled: tuple[Tensor, Tensor]
    unlabeled: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@lru_cache(maxsize=4)
def drawn(labels: int, seeds: tuple[int, ...]) -> Data:
    """The splits of these seeds. The labels of the unlabeled pictures are for diagnostics, and to make wrong ones."""
    splits = [load_digits_split(labels, seed) for seed in seeds]

    def column(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([x.flatten(1) for x, _ in parts]), torch.stack([y for _, y in parts])

    return Data(
        column([split.labeled for split in splits]),
        column([(split.unlabeled, split.unlabeled_truth) for split in splits]),
        column([split.validation for split in splits]),
        column([split.test for split in splits]),
    )


SHARE, KEPT = 0.3, 50


def wrongly_labeled(condition: Condition, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What the teacher learns before: pictures and labels.

    Two ends of a class are those along the direction in which its pictures differ most, its first principal component.
    """
    noise = torch.rand(len(y), generator=torch.Generator().manual_seed(seed))
    ranks = torch.empty(len(y))
    for c in range(CLASSES):
        mine = (y == c).nonzero()[:, 0]
        centered = x[mine].double() - x[mine].double().mean(0)
        along = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[0]
        score = noise[mine].double() if condition == "asymmetric" else along
        ranks[mine] = score.argsort().argsort().float()
        if condition != "half":
            ranks[mine] /= len(mine)
    if condition == "half":
        kept = ranks < KEPT
        return x[kept], y[kept]
    return x, torch.where(ranks < SHARE, (y + 1) % CLASSES, y)


@lru_cache(maxsize=8)
def first_weights(seeds: tuple[int, ...]) -> tuple[Weights, Weights]:
    """Teachers and students as they begin."""
    pairs = []
    for seed in seeds:
        torch.manual_seed(seed)
        pairs.append((mlp(SIZES), mlp(SIZES)))
    teachers, students = zip(*pairs, strict=True)
    return stacked(teachers), stacked(students)


@lru_cache(maxsize=8)
def taught(condition: Condition, labels: int, seeds: tuple[int, ...], steps: int) -> Weights:
    """The teachers at the first step: as they begin, or after learning wrong labels."""
    teacher = copied(first_weights(seeds)[0])
    if condition == "right":
        return teacher
    pictures, truth = drawn(labels, seeds).unlabeled
    pairs = [wrongly_labeled(condition, x, y, seed) for x, y, seed in zip(pictures, truth, seeds, strict=True)]
    x, given = torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
    velocity = None
    for step, (seen, targets) in enumerate(labeled_batches(x, given, seeds, BEFORE, BATCH, steps)):
        velocity = descend(teacher, seen, targets, velocity, TEACHER_LR * cosine(step, steps), MOMENTUM)
    return teacher


def labeled_batches(
    x: Tensor, y: Tensor, seeds: Sequence[int], stream: int, batch: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Altered pictures and one-hot labels."""
    views = Views(x, seeds, stream, batch, steps)
    targets = F.one_hot(y, CLASSES).to(x)
    seed = torch.arange(len(seeds))[:, None]
    for which, seen in _one_by_one(views):
        yield seen, targets[seed, which]


def unlabeled_batches(x: Tensor, seeds: Sequence[int], batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures as they are, and altered."""
    seed = torch.arange(len(seeds))[:, None]
    for which, seen in _one_by_one(Views(x, seeds, UNLABELED, batch, steps)):
        yield x[seed, which], seen


def _one_by_one(views: Views) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    while done < views.steps:
        which, seen = views.chunk()
        yield from zip(which, seen, strict=True)
        done += len(which)


# ------------------------------------------------------------------------------------------------------------ the runs


@torch.no_grad()
def train(arm: Arm, rules: Sequence[Rule], seeds: tuple[int, ...], size: Size) -> tuple[list[Stack], list[list[float]]]:
    """Stacks that are trained side by side on the batches of an arm, and the feedback's ratio at ten steps of each."""
    data, steps = drawn(arm.labels, seeds), size.steps(arm.steps)
    teacher = taught(arm.condition, arm.labels, seeds, size.before_steps)
    student = first_weights(seeds)[1]
    stacks = [Stack(rule, copied(teacher), copied(student), EMA_DECAY) for rule in rules]
    labeled = labeled_batches(*data.labeled, seeds, LABELED, arm.outer, steps)
    unlabeled = unlabeled_batches(data.unlabeled[0], seeds, BATCH, steps * arm.lookahead)
    altered = any(rule.alteration in ("permuted", "random_sign") for rule in rules)
    controls = (torch.empty(0), torch.empty(0))
    ratios: list[list[float]] = [[] for _ in rules]
    for step, (x, targets) in enumerate(labeled):
        weak, strong = zip(*itertools.islice(unlabeled, arm.lookahead), strict=True)
        if altered:
            controls = drawn_for_controls(seeds, step, BATCH)
        batch = Batch(x, targets, weak, strong, *controls)
        for stack, ratio in zip(stacks, ratios, strict=True):
            stack.step(batch, cosine(step, steps))
            told = stack.rule.own_loss and stack.rule.feedback != "none"
            if told and (step + 1) % max(1, steps // 10) == 0:
                ratio.append(round(float(stack.ratio.mean()), 5))
    return stacks, ratios


@torch.no_grad()
def finetuned(weights: Weights, data: Data, seeds: tuple[int, ...], steps: int) -> Weights:
    """The students after some more steps on the labeled pictures."""
    weights = copied(weights)
    for step, (x, targets) in enumerate(labeled_batches(*data.labeled, seeds, FINETUNING, BATCH, steps)):
        descend(weights, x, targets, None, FINETUNE_LR * cosine(step, steps), 0.0)
    return weights


def accuracies(weights: Weights, part: tuple[Tensor, Tensor]) -> list[float]:
    """Of each seed."""
    x, y = part
    right = forward(weights, x)[1].argmax(-1) == y
    return [round(float(share), 5) for share in right.double().mean(1)]


def found(arm: Arm, rule: Rule, stack: Stack, seeds: tuple[int, ...], size: Size, final: bool) -> Row:
    """What a row has: tuning runs read the validation pictures, final runs the test pictures."""
    data = drawn(arm.labels, seeds)
    part = data.test if final else data.validation
    tuned = finetuned(stack.average, data, seeds, size.finetune_steps)
    row: Row = {
        "final": final,
        **dataclasses.asdict(arm),
        "steps_run": size.steps(arm.steps),
        "rule": dataclasses.asdict(rule),
        "seeds": list(seeds),
        "student": accuracies(stack.average, part),
        "finetuned": accuracies(tuned, part),
    }
    if final:
        x, truth = data.unlabeled
        q, p = (forward(weights, x)[1].softmax(-1) for weights in (stack.teacher, stack.average))
        row["teacher"] = accuracies(stack.teacher, part)
        row["labels_right"] = accuracies(stack.teacher, data.unlabeled)
        row["confidence"] = [round(float(c), 4) for c in q.amax(-1).mean(1)]
        row["frequency_error"] = [_frequency_error(each, y) for each, y in zip(p, truth, strict=True)]
    return row


def _frequency_error(p: Tensor, y: Tensor) -> float:
    """Total variation between the frequencies of the classes that a network finds and the true ones."""
    counts = [labels.bincount(minlength=CLASSES).double() / len(y) for labels in (p.argmax(-1), y)]
    return round(float((counts[0] - counts[1]).abs().sum() / 2), 5)


# ------------------------------------------------------------------------------------------------------ running it all


def read(raw: Path = RAW) -> list[Row]:
    """The rows of runs so far."""
    if not raw.exists():
        return []
    return [row for line in raw.read_text().splitlines() if "method" in (row := json.loads(line))]


def _key(row: Row) -> str:
    names = ("final", "steps_run", *(f.name for f in dataclasses.fields(Arm)))
    rule = dataclasses.asdict(Rule(**row["rule"]))  # with the defaults of what older rows do not name
    return json.dumps([rule, *(row[name] for name in names)], sort_keys=True)


def run_missing(jobs: Sequence[tuple[Arm, Rule]], size: Size, raw: Path, final: bool) -> None:
    """Run what the raw file does not hold yet; jobs that see the same batches side by side."""
    done = {_key(row) for row in read(raw)}

    def key(arm: Arm, rule: Rule) -> str:
        told = {"final": final, "rule": dataclasses.asdict(rule), "steps_run": size.steps(arm.steps)}
        return _key({**told, **dataclasses.asdict(arm)})

    missing = [job for job in jobs if key(*job) not in done]
    if not missing:
        return
    raw.parent.mkdir(parents=True, exist_ok=True)
    with raw.open("a") as file:
        file.write(json.dumps({"made_with": environment(), **dataclasses.asdict(size)}) + "\n")
    groups = [
        jobs[first : first + BESIDE]
        for jobs in (list(same) for _, same in itertools.groupby(missing, key=lambda job: job[0].group))
        for first in range(0, len(jobs), BESIDE)
    ]
    seeds = size.seeds if final else size.tuning_seeds
    for number, group in enumerate(groups, 1):
        began = time.process_time()
        arms, rules = zip(*group, strict=True)
        stacks, ratios = train(arms[0], rules, seeds, size)
        seconds = round((time.process_time() - began) / len(group), 1)
        with raw.open("a") as file:
            for arm, rule, stack, ratio in zip(arms, rules, stacks, ratios, strict=True):
                row = found(arm, rule, stack, seeds, size, final)
                file.write(json.dumps({**row, "ratio": ratio, "seconds": seconds}) + "\n")
                file.flush()  # a row at a time: another process may write its own
        print(f"{number}/{len(groups)} groups: {len(group)} runs of {arms[0].group}, {seconds} s each", flush=True)


def score(row: Row) -> float:
    """Of a tuning run: the mean accuracy of its better read-out."""
    return max(statistics.fmean(row["student"]), statistics.fmean(row["finetuned"]))


def chosen(rows: Sequence[Row], tuned: str) -> Rule:
    """The configuration with the best score; of equals, the first."""
    tuning = [row for row in rows if not row["final"] and row["tuned"] == tuned]
    return Rule(**max(tuning, key=score)["rule"])


def rule_of(arm: Arm, rows: Sequence[Row]) -> Rule:
    """The settings of a final run."""
    return dataclasses.replace(chosen(rows, arm.tuned), alteration=arm.alteration, lookahead=arm.lookahead)


def study(size: Size, raw: Path, arms: Sequence[Arm] = ARMS) -> None:
    """Tune every method of these arms, then run them on the seeds that nobody has looked at."""
    needed = {arm.tuned for arm in arms}
    tuning = [
        (Arm("tuning", name, name, grid.condition, grid.labels, grid.steps), rule)
        for name, grid in GRIDS.items()
        if name in needed
        for rule in grid.rules[: size.configurations]
    ]
    run_missing(tuning, size, raw, final=False)
    rows = read(raw)
    run_missing([(arm, rule_of(arm, rows)) for arm in arms], size, raw, final=True)


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables there, draw the figure, and stop")
    parser.add_argument("--table", action="store_true", help="print the tables of the file's rows, and run nothing")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="the questions whose arms are run")
    given = parsed(parser)
    torch.set_num_threads(1)
    if not given.table and given.write is None:
        arms = [arm for arm in ARMS if arm.part in given.parts]
        study(MINIATURE if given.miniature else FULL, given.out, arms)
        return
    from when_tables import block, write

    if given.write is not None:
        write(given.write, given.out)
    else:
        print(block(read(given.out)))


if __name__ == "__main__":
    main()
