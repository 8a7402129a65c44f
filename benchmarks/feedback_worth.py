"""What is the teacher's feedback worth? Digits with UDA in the teacher, at equal processor time, over 40 seeds.

    python benchmarks/feedback_worth.py                        # tune, then run; goes on where it was stopped
    python benchmarks/feedback_worth.py --costs                # what a step of each arm costs, on an idle core
    python benchmarks/feedback_worth.py --table                # the tables of the rows so far; runs nothing
    python benchmarks/feedback_worth.py --write docs/when.md   # puts them there, and draws the figure
    python benchmarks/feedback_worth.py --miniature --out FILE # all of it in seconds, to see that it runs
    python benchmarks/feedback_worth.py --device cuda --minutes 9   # the same on pictures; goes on at the next call

**The primary test, named before it was run**: two labels a class, equal frequencies, Meta Pseudo Labels (``mpl``) of
6,000 steps minus the best other arm at equal processor time, best by its mean over the final seeds, by a two-sided
paired sign-flip test over the 40 seeds. Everything else is descriptive.

Data, networks and views are those of ``when.py``; the teacher learns from UDA besides its labels, and teacher and
student begin together from weights of their own. An arm's steps are those that :data:`COSTS` gives it for the processor
time of ``mpl``, in which drawing the batches is left out. In each place every arm has eight configurations, tried on 5
seeds; the one with the best mean accuracy on 197 validation images is taken, with the network as trained or finetuned,
whichever is better there. The final seeds are 40 others; ``noisy_student.py`` had the splits of 15 of them before, and
nothing that it chose is taken over. Where frequencies are uneven, the classes' shares fall evenly from 5 to 1, in an
order that each seed draws; of labels, unlabeled images and test images alike.

With ``--device cuda`` the same arms train the convolutional networks of ``feedback_worth_pictures.py`` on three of the
generated problems, at equal time of the device; it was not run on a GPU yet. **Its primary test, named before it was
run**: the same difference of the mean accuracy over the three problems, ``mpl`` at 3,000 steps, over 16 seeds. What the
arms cost is measured in each problem before anything is trained there, and stands in the raw file; 4 other seeds, with
other pictures, are for tuning. As many configurations as fit into what is left of the minutes are trained side by side.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from machine import arguments, described, parsed, results, write_between_marks
from torch import Tensor
from when import (
    BATCH,
    EMA_DECAY,
    LABELED,
    Data,
    drawn,
    finetuned,
    first_weights,
    labeled_batches,
    unlabeled_batches,
)
from when_stack import CLASSES, Batch, Passes, Rule, Stack, Weights, copied, cosine, forward

from metapl.apps.machine.cores import available_cores
from metapl.apps.machine.environment import environment
from metapl.apps.pictures import load_digits_split
from metapl.metrics import paired_test

RAW = Path(__file__).parent / "results" / "feedback_worth.jsonl"
STEPS, FINETUNE_STEPS = 6000, 200
READ_OUTS = "average", "finetuned"
Row = dict[str, Any]
Part = Literal["unlabeled", "validation", "test"]
Clock = Callable[[], float]

# ------------------------------------------------------------------------------------------------------------ the arms


def rules(**axes: tuple[Any, ...]) -> tuple[Rule, ...]:
    """Every choice from these values."""
    return tuple(Rule(uda=1.0, **dict(zip(axes, point, strict=True))) for point in itertools.product(*axes.values()))


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        title: in words.
        rules: its eight configurations.
        begins: share of the steps after which the student begins, as the teacher's average: 0: from the start, with
            weights of its own; 1: never, the teacher is what is trained.
    """

    title: str
    rules: tuple[Rule, ...]
    begins: float = 0.0


ALONE = {"feedback": ("none",), "teacher_lr": (0.03, 0.06, 0.12, 0.24)}
PLAIN_OR_SHARP = {"temperature": (1.0, 0.5)}
TEACHER_LR = {"teacher_lr": (0.03, 0.06)}
ARMS: dict[str, Arm] = {
    "uda": Arm("UDA", rules(**ALONE, **PLAIN_OR_SHARP), 1.0),
    "uda_aligned": Arm("UDA, aligned to the labels' shares", rules(**ALONE, **PLAIN_OR_SHARP, align=(1.0,)), 1.0),
    "fixmatch": Arm("FixMatch", rules(**ALONE, temperature=(0.0,), threshold=(0.8, 0.95)), 1.0),
    "mpl": Arm("Meta Pseudo Labels", rules(**TEACHER_LR, **PLAIN_OR_SHARP, size=(1.0, 3.0))),
    "none": Arm(
        "same loop, no feedback", rules(**TEACHER_LR, **PLAIN_OR_SHARP, feedback=("none",), student_lr=(0.5, 1.0))
    ),
    "push": Arm(
        "same loop, push to equal frequencies",
        rules(**TEACHER_LR, **PLAIN_OR_SHARP, feedback=("ratio",), alteration=("balance",), size=(0.1, 0.3)),
    ),
    "late": Arm("MPL, student begins late", rules(**TEACHER_LR, **PLAIN_OR_SHARP, size=(1.0, 3.0)), 0.75),
}
ALIGNED = {**TEACHER_LR, **PLAIN_OR_SHARP, "align": (1.0,)}
# No part of the primary test: what the feedback adds where the teacher's own labels are aligned.
AFTER: dict[str, Arm] = {
    "mpl_aligned": Arm("MPL, its UDA aligned", rules(**ALIGNED, size=(1.0, 3.0))),
    "none_aligned": Arm(
        "same loop, no feedback, its UDA aligned", rules(**ALIGNED, feedback=("none",), student_lr=(0.5, 1.0))
    ),
}
EVERY = ARMS | AFTER

COSTS = {
    "uda": 0.404,
    "uda_aligned": 0.418,
    "fixmatch": 0.432,
    "mpl": 1.0,
    "none": 0.611,
    "push": 0.72,
    "late": 0.553,
    "mpl_aligned": 1.014,
    "none_aligned": 0.625,
}
"""Processor time of a step, relative to one of ``mpl``: the mean of two runs of ``--costs``, one on each of two idle
cores, fixed before the study was run. Of the last two: without alignment, and what alignment adds to UDA."""


def steps_of(arm: str, steps: int, costs: Mapping[str, float] = COSTS) -> int:
    """The steps that take the time of so many of ``mpl``."""
    return max(1, round(steps / costs[arm]))


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class Place:
    """Labels a class, on average, and how often the most frequent class is there for one of the least frequent."""

    labels: int
    uneven: int = 1

    def __str__(self) -> str:
        return f"{self.labels} labels a class, {'equal' if self.uneven == 1 else f'1:{self.uneven}'} frequencies"


PLACES = Place(2), Place(4), Place(2, 5), Place(4, 5)
PRIMARY = PLACES[0]


def apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in these proportions, at least 1 each.

    >>> apportioned([5, 4, 1], 20)
    [10, 8, 2]
    """
    exact = total * np.asarray(shares, dtype=float) / sum(shares)
    counts = np.maximum(1, exact.astype(int))
    for _ in range(total - counts.sum()):
        counts[np.argmax(exact - counts)] += 1
    return [int(n) for n in counts]


@lru_cache(maxsize=2)
def pictures(place: Place, seeds: tuple[int, ...]) -> tuple[Data, Tensor | None]:
    """The splits of these seeds, and the classes' shares (S, C) where they are not those of the digits."""
    if place.uneven == 1:
        return drawn(place.labels, seeds), None
    falling = np.linspace(place.uneven, 1, CLASSES)
    few = apportioned(falling, place.labels * CLASSES)
    parts: list[list[tuple[Tensor, Tensor]]] = [[], [], [], []]
    shares = []
    for seed in seeds:
        order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
        split = load_digits_split(max(few), seed)
        many = int(split.unlabeled_truth.bincount(minlength=CLASSES).min())
        counts = [round(many * share / place.uneven) for share in falling]
        for part, (x, y), kept in (
            (0, split.labeled, few),
            (1, (split.unlabeled, split.unlabeled_truth), counts),
            (2, split.validation, None),
            (3, split.test, None),
        ):
            if kept is not None:
                rows = torch.cat([(y == c).nonzero()[:n, 0] for c, n in zip(order, kept, strict=True)])
                x, y = x[rows], y[rows]
            parts[part].append((x.flatten(1), y))
        shares.append(torch.zeros(CLASSES).scatter(0, order, torch.tensor(falling / falling.sum()).float()))
    columns = [(torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])) for part in parts]
    return Data(*columns), torch.stack(shares)


class Task(Protocol):
    """The pictures of a place for a stack of seeds, and the networks that learn from them: ``shares`` (S, C) are those
    that the classes are given where accuracy is counted, and ``labeled_shares`` those among the labels."""

    place: Any
    seeds: tuple[int, ...]
    passes: Passes
    shares: Tensor | None
    labeled_shares: Tensor

    def first_weights(self) -> tuple[Weights, Weights]:
        """Teachers and students as they begin; they stay as they are."""

    def batches(self, steps: int) -> Iterator[Batch]:
        """What is seen in each step."""

    def finetuned(self, weights: Weights, steps: int) -> Weights:
        """The networks after some more steps on the labeled pictures."""

    def called(self, weights: Weights, part: Part) -> tuple[Tensor, Tensor]:
        """The classes that the networks find in the pictures of a part, and the true ones, (S, n) both."""


class Digits:
    """A :class:`Task` on scikit-learn's digits."""

    passes = Passes()

    def __init__(self, place: Place, seeds: tuple[int, ...]) -> None:
        self.place, self.seeds = place, seeds
        self.data, self.shares = pictures(place, seeds)
        self.labeled_shares = torch.stack([y.bincount(minlength=CLASSES) / len(y) for y in self.data.labeled[1]])

    def first_weights(self) -> tuple[Weights, Weights]:
        return first_weights(self.seeds)

    def batches(self, steps: int) -> Iterator[Batch]:
        labeled = labeled_batches(*self.data.labeled, self.seeds, LABELED, BATCH, steps)
        unlabeled = unlabeled_batches(self.data.unlabeled[0], self.seeds, BATCH, steps)
        nothing = torch.empty(0)
        for (x, targets), (weak, strong) in zip(labeled, unlabeled, strict=True):
            yield Batch(x, targets, [weak], [strong], nothing, nothing)

    def finetuned(self, weights: Weights, steps: int) -> Weights:
        return finetuned(weights, self.data, self.seeds, steps)

    def called(self, weights: Weights, part: Part) -> tuple[Tensor, Tensor]:
        x, y = getattr(self.data, part)
        return forward(weights, x)[1].argmax(-1), y


# ------------------------------------------------------------------------------------------------------------ the runs


@torch.no_grad()
def train(task: Task, arm: Arm, rules: Sequence[Rule], steps: int) -> tuple[list[Stack], list[list[list[float]]]]:
    """Stacks that are trained side by side on the same batches, and of each the feedback's ratio at ten steps."""
    teacher, student = task.first_weights()
    first = copied(student) if arm.begins == 0 else None
    stacks = [
        Stack(rule, copied(teacher), first and copied(first), EMA_DECAY, task.labeled_shares, task.passes)
        for rule in rules
    ]
    begins = round(arm.begins * steps)
    ratios: list[list[Tensor]] = [[] for _ in rules]
    for step, batch in enumerate(task.batches(steps)):
        for stack, ratio in zip(stacks, ratios, strict=True):
            if step == begins and stack.student is None:
                stack.begin()
            stack.step(batch, cosine(step, steps), cosine(max(0, step - begins), max(1, steps - begins)))
            if (step + 1) % max(1, steps // 10) == 0:
                ratio.append(stack.ratio)
    return stacks, [[each.tolist() for each in ratio] for ratio in ratios]


def accuracies(called: Tensor, truth: Tensor, shares: Tensor | None = None) -> Tensor:
    """Of each seed, as if the classes had these shares."""
    right = (called == truth).float()
    if shares is None:
        return right.mean(1)
    counts = torch.stack([each.bincount(minlength=CLASSES) for each in truth])
    weight = (shares / counts).gather(1, truth)
    return (right * weight).sum(1) / weight.sum(1)


@torch.no_grad()
def trained(task: Task, name: str, rules: Sequence[Rule], count: int, final: bool, clock: Clock) -> list[Row]:
    """A row for each rule and seed: tuning runs read the validation images, final runs the test images."""
    began = clock()
    stacks, ratios = train(task, EVERY[name], rules, count)
    seconds = (clock() - began) / (len(rules) * len(task.seeds))
    part: Part = "test" if final else "validation"
    rows = []
    for rule, stack, ratio in zip(rules, stacks, ratios, strict=True):
        read_outs = {"average": stack.average, "finetuned": task.finetuned(stack.average, min(FINETUNE_STEPS, count))}
        read_outs |= {"teacher": stack.teacher} if final else {}
        found = {key: accuracies(*task.called(weights, part), task.shares) for key, weights in read_outs.items()}
        if final:
            called, truth = task.called(stack.average, "unlabeled")
            classes = task.labeled_shares.shape[1]
            counts = [torch.stack([y.bincount(minlength=classes) for y in ys]) for ys in (called, truth)]
            found["labels_right"] = accuracies(*task.called(stack.teacher, "unlabeled"))
            found["frequency_error"] = (counts[0] - counts[1]).abs().sum(1) / (2 * truth.shape[1])
        for s, seed in enumerate(task.seeds):
            row = {"final": final, "place": dataclasses.asdict(task.place), "arm": name, "seed": seed, "steps": count}
            row |= {"seconds": round(seconds, 2), **{key: round(float(value[s]), 5) for key, value in found.items()}}
            told = {"ratio": [round(each[s], 4) for each in ratio]} if any(map(any, ratio)) else {}
            rows.append({**row, **told, "rule": dataclasses.asdict(rule)})
    return rows


def ran(place: Place, name: str, rules: Sequence[Rule], seeds: tuple[int, ...], steps: int, final: bool) -> list[Row]:
    """:func:`trained` on digits, in a process of its own."""
    torch.set_num_threads(1)
    return trained(Digits(place, seeds), name, rules, steps_of(name, steps), final, time.process_time)


@dataclass(frozen=True)
class Size:
    """How much is run."""

    tuning_seeds: tuple[int, ...] = tuple(range(110, 115))
    seeds: tuple[int, ...] = tuple(range(300, 340))
    steps: int = STEPS
    configurations: int = 8
    places: tuple[Any, ...] = PLACES


MINIATURE = Size((110,), (300, 301), steps=8, configurations=2, places=(PLACES[0], PLACES[2]))


def read(raw: Path = RAW) -> list[Row]:
    """The rows of runs so far."""
    lines = raw.read_text().splitlines() if raw.exists() else []
    return [row for line in lines if "arm" in (row := json.loads(line))]


def of(rows: Sequence[Row], place: Any, arm: str, final: bool) -> list[Row]:
    """Those of an arm in a place, by seed."""
    mine = [r for r in rows if r["arm"] == arm and r["final"] is final and r["place"] == dataclasses.asdict(place)]
    return sorted(mine, key=lambda row: int(row["seed"]))


def chosen(rows: Sequence[Row], place: Any, arm: str) -> tuple[Rule, str]:
    """The configuration and the read-out with the best mean over the tuning seeds; of equals, the first."""
    found: dict[tuple[Rule, str], list[float]] = {}
    for row in of(rows, place, arm, final=False):
        for name in READ_OUTS:
            found.setdefault((Rule(**row["rule"]), name), []).append(row[name])
    return max(found, key=lambda choice: float(np.mean(found[choice])))


def study(size: Size, raw: Path, workers: int) -> None:
    """Tune every arm in every place, then run what was chosen on the seeds that nobody has looked at."""
    for final in (False, True):
        rows = read(raw)
        done = {(Place(**r["place"]), r["arm"]) for r in rows if r["final"] is final}
        missing = [(place, name) for place in size.places for name in EVERY if (place, name) not in done]
        jobs = []
        for place, name in missing:
            picked = [chosen(rows, place, name)[0]] if final else EVERY[name].rules[: size.configurations]
            jobs.append((place, name, picked, size.seeds if final else size.tuning_seeds, size.steps, final))
        if jobs:
            _append(raw, [{"made_with": environment(), "costs": COSTS}])
        for number, found in enumerate(results(ran, jobs, workers), 1):
            _append(raw, found)
            kind = "final" if final else "tuning"
            print(f"{kind} {number}/{len(jobs)}: {found[0]['arm']}, {Place(**found[0]['place'])}", flush=True)


def _append(raw: Path, rows: Sequence[Row]) -> None:
    raw.parent.mkdir(parents=True, exist_ok=True)
    with raw.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))  # those of an arm at once: all or none


@torch.no_grad()
def costs(task: Task, steps: int, rounds: int, clock: Clock) -> tuple[dict[str, float], float]:
    """Time of a step of each arm, relative to ``mpl``, and of that in seconds: medians over some rounds after a first
    one, in each of which every arm takes its steps in turn. Drawing the batches is not counted: it takes about as long
    as a step of networks that are so small, and is the same for all; so arms of more steps take more time in all."""
    arms = {name: dataclasses.replace(arm, begins=arm.begins // 1) for name, arm in ARMS.items()}
    (teacher, student), batch = task.first_weights(), next(task.batches(1))
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _, (name, arm) in itertools.product(range(rounds + 1), arms.items()):
        first = None if arm.begins else copied(student)
        stack = Stack(arm.rules[0], copied(teacher), first, EMA_DECAY, task.labeled_shares, task.passes)
        began = clock()
        for step in range(steps):
            stack.step(batch, cosine(step, steps))
        taken[name].append(clock() - began)
    of_mpl = taken["mpl"][1:]
    ratio = {name: float(np.median(np.divide(seconds[1:], of_mpl))) for name, seconds in taken.items()}
    late = ARMS["late"].begins
    ratio["late"] = late * ratio["uda"] + 1 - late
    return {name: round(share, 3) for name, share in ratio.items()}, float(np.median(of_mpl)) / steps


# ------------------------------------------------------------------------------------------------ pictures on a device

RAW_PICTURES = RAW.with_stem("feedback_worth_pictures")


def sizes_of_pictures(miniature: bool) -> Size:
    """How much is run on pictures."""
    from feedback_worth_pictures import Generated

    if miniature:
        return Size((500,), (600, 601), steps=2, configurations=1, places=(Generated("digits", 48, 48, batch=4),))
    places = tuple(Generated(name) for name in ("letters", "digits", "textures"))
    return Size(tuple(range(500, 504)), tuple(range(600, 616)), steps=3000, places=places)


def study_pictures(size: Size, raw: Path, device: torch.device, minutes: float, folder: Path, workers: int) -> None:
    """As :func:`study`, a problem after another on one device; stops before the minutes are over, and goes on there."""
    from feedback_worth_pictures import GeneratedTask

    torch.backends.cudnn.benchmark = device.type == "cuda"

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def task_of(place: Any, final: bool) -> Task:
        return GeneratedTask(place, size.seeds if final else size.tuning_seeds, device, folder, workers)

    end, runs = clock() + 60 * minutes, 0
    for place, final in itertools.product(size.places, (False, True)):
        task, over = None, 1.5  # how much longer a run takes than its steps alone, until one is measured
        for name, arm in ARMS.items():
            rows = read(raw)
            done = {Rule(**row["rule"]) for row in of(rows, place, name, final)}
            wanted = [chosen(rows, place, name)[0]] if final else arm.rules[: size.configurations]
            missing = [rule for rule in wanted if rule not in done]
            while missing:
                of_arms, of_mpl = measured(place, task_of, size.steps, raw, device, clock)
                left, alone = end - clock(), over * of_mpl * size.steps
                if (beside := min(len(missing), int(left / alone))) < 1:
                    told = f"{left:.0f} s are left, and a run takes {alone:.0f}"
                    raise SystemExit(f"{told}: {'run the command again' if runs else 'more --minutes are needed'}.")
                task = task or task_of(place, final)
                began, count = clock(), steps_of(name, size.steps, of_arms)
                _append(raw, trained(task, name, missing[:beside], count, final, clock))
                over = 1.2 * (clock() - began) / (beside * of_mpl * size.steps)
                missing, runs = missing[beside:], runs + beside
                print(f"{'final' if final else 'tuning'}: {name}, {place}, {beside} of {len(wanted)}", flush=True)


def measured(
    place: Any, task_of: Callable[[Any, bool], Task], steps: int, raw: Path, device: torch.device, clock: Clock
) -> tuple[dict[str, float], float]:
    """What the arms cost in a place, and seconds of a step of ``mpl``: as the raw file has it, once it is there."""
    told = dataclasses.asdict(place)
    for line in raw.read_text().splitlines() if raw.exists() else ():
        if "costs" in (known := json.loads(line)) and known["place"] == told:
            return known["costs"], known["seconds"]
    relative, seconds = costs(task_of(place, True), min(20, steps), min(5, steps - 1), clock)
    print(f"{place}: a step of mpl takes {1000 * seconds:.1f} ms", flush=True)
    line = {"made_with": environment(), **described(device.type), "place": told}
    _append(raw, [{**line, "costs": relative, "seconds": seconds}])
    return relative, seconds


# ---------------------------------------------------------------------------------------------------------- the tables


def sign_flip(first: Sequence[float], second: Sequence[float], flips: int = 200_000) -> float:
    """Two-sided p of the paired sign-flip test: the share of random signs under which the mean difference is as large.

    >>> sign_flip([1.0] * 10, [0.0] * 10) < 0.01
    True
    """
    d = np.asarray(first) - np.asarray(second)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (flips, len(d)))
    reached = (np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).sum()
    return float((reached + 1) / (flips + 1))


def picked(first: Sequence[float], others: Sequence[Sequence[float]], flips: int = 200_000) -> float:
    """The share of random signs, of a seed the same for all, under which the best of the others is ahead of the first
    by as much, in units of the root mean square of its differences."""
    d = np.asarray(others) - np.asarray(first)
    ahead = (d / np.maximum(np.sqrt((d**2).mean(1, keepdims=True)), 1e-12)).T
    best = ahead.sum(0)[d.sum(1).argmax()]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (flips, len(ahead)))
    return float(((signs @ ahead).max(1) >= best - 1e-9).mean())


def delivered(rows: Sequence[Row], place: Any, arm: str) -> list[float]:
    """Test accuracies of an arm's final runs, seed by seed, by the read-out that tuning chose."""
    read_out = chosen(rows, place, arm)[1]
    return [row[read_out] for row in of(rows, place, arm, final=True)]


def primary(rows: Sequence[Row], places: Sequence[Any]) -> str:
    """The primary test in words: of each seed's mean over these places."""
    reached = {arm: np.mean([delivered(rows, place, arm) for place in places], axis=0).tolist() for arm in ARMS}
    others = [arm for arm in ARMS if arm != "mpl"]
    rival = max(others, key=lambda arm: float(np.mean(reached[arm])))
    test, p = paired_test(reached["mpl"], reached[rival]), sign_flip(reached["mpl"], reached[rival])
    low, high = (100 * end for end in test.interval or (float("nan"), float("nan")))
    where, share = "; ".join(map(str, places)), picked(reached["mpl"], [reached[arm] for arm in others])
    return (
        f"Primary test ({where}): Meta Pseudo Labels minus {ARMS[rival].title}, the best other arm: "
        f"{100 * test.mean:+.1f} points (95 % {low:+.1f} to {high:+.1f}), sign-flip p = {p:.2g}, {test.n} seeds. "
        f"These seeds picked that arm: under random signs of all differences, in {100 * share:.0f} % of draws one of "
        f"the {len(others)} others is ahead as clearly."
    )


def table(rows: Sequence[Row], place: Any) -> str:
    """The arms of a place."""
    lines = [
        f"**{place}**",
        "",
        "| arm | steps | test accuracy | lowest | labels right | frequency error | MPL above it | 95 % | p |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    mpl = delivered(rows, place, "mpl")
    for name, arm in EVERY.items():
        if not (mine := of(rows, place, name, final=True)):
            continue
        values = delivered(rows, place, name)
        mean = {key: 100 * float(np.mean([row[key] for row in mine])) for key in ("labels_right", "frequency_error")}
        cells = [
            arm.title,
            f"{mine[0]['steps']:,}",
            f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}",
            f"{100 * min(values):.1f}",
        ]
        cells += [f"{mean['labels_right']:.1f}", f"{mean['frequency_error']:.1f}"]
        test = paired_test(mpl, values)
        if name == "mpl" or test.interval is None:
            cells += ["–", "–", "–"]
        else:
            low, high = (100 * end for end in test.interval)
            cells += [f"{100 * test.mean:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{sign_flip(mpl, values):.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    there = (name for name in EVERY if of(rows, place, name, final=True))
    choices = "; ".join(f"{name}: {_settings(name, *chosen(rows, place, name))}" for name in there)
    return "\n".join([*lines, "", *_aligned(rows, place), f"Chosen on the tuning seeds: {choices}."])


def _aligned(rows: Sequence[Row], place: Place) -> Iterator[str]:
    """What the feedback adds where the teacher's own labels are aligned, in words."""
    if not all(of(rows, place, name, final=True) for name in AFTER):
        return
    mpl = delivered(rows, place, "mpl_aligned")
    said = []
    for name in ("uda_aligned", "none_aligned"):
        other = delivered(rows, place, name)
        test, p = paired_test(mpl, other), sign_flip(mpl, other)
        low, high = (100 * end for end in test.interval or (float("nan"), float("nan")))
        said.append(f"{100 * test.mean:+.1f} ({low:+.1f} to {high:+.1f}, p = {p:.2g}) against {EVERY[name].title}")
    added = f"Added when the others' tuning runs had been seen, and run after them: {EVERY['mpl_aligned'].title}, is"
    yield f"{added} {' and '.join(said)}."
    yield ""


def _settings(name: str, rule: Rule, read_out: str) -> str:
    told = {"teacher's rate": rule.teacher_lr, "temperature": rule.temperature}
    told |= {"threshold": rule.threshold} if rule.threshold else {}
    told |= {"student's rate": rule.student_lr} if EVERY[name].begins < 1 else {}
    told |= {} if rule.feedback == "none" else {"ratio" if rule.feedback == "ratio" else "weight": rule.size}
    return ", ".join(f"{setting} {value:g}" for setting, value in told.items()) + f", {read_out}"


def of_places(rows: Sequence[Row], places: Sequence[Any], of_primary: Sequence[Any]) -> str:
    """The primary test, and the tables of these places, as far as their runs are there."""
    there = complete(rows, places)
    first = [primary(rows, of_primary)] if all(place in there for place in of_primary) else []
    return "\n\n".join([*first, *(table(rows, place) for place in there)])


def block(rows: Sequence[Row]) -> str:
    """What was found on digits, and what it was made with."""
    seeds = len({row["seed"] for row in rows if row["final"]})
    minutes = sum(row["seconds"] for row in rows) / 60
    told = (
        f"Test accuracy in %, at 1:5 weighted to the classes' shares, mean ± standard deviation over {seeds} seeds "
        "(400 test images each, drawn anew per seed from the same 1,797, so intervals and p speak of other draws of "
        "these images, not of other data). *Labels right*: accuracy of the teacher, or of the one network, on the "
        "unlabeled images. *Frequency error*: the share of these that the student, or the one network, would have to "
        "call otherwise before it is finetuned for its class frequencies to be right. Every arm has the processor "
        "time of 6,000 steps of Meta Pseudo Labels, by costs that were measured once, without drawing the batches, "
        "and had eight configurations tried on five other seeds, by the accuracy on 197 labeled validation images. "
        "*Lowest*: of the seeds. Intervals: t; p: sign-flip test, of which 5e-06 is the least that is told apart; not "
        "corrected for their number. "
        f"{len(rows):,} runs in {minutes:.0f} minutes of one core. "
        "`python benchmarks/feedback_worth.py`; raw rows: `benchmarks/results/feedback_worth.jsonl`."
    )
    return f"{of_places(rows, PLACES, (PRIMARY,))}\n\n{told}"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Meta Pseudo Labels minus each other arm with its interval, a panel a place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places, others = complete(rows, PLACES), [name for name in ARMS if name != "mpl"]
    figure = Figure(figsize=(10, 1.2 + 2.1 * ((len(places) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots((len(places) + 1) // 2, 2, squeeze=False, sharex=True, sharey=True).flat
    for axes, place in zip(panels, places, strict=False):
        mpl = delivered(rows, place, "mpl")
        for y, name in enumerate(others[::-1]):
            test = paired_test(mpl, delivered(rows, place, name))
            color = "#0072B2" if test.mean > 0 else "#D55E00"
            axes.plot([100 * end for end in test.interval or (test.mean, test.mean)], [y, y], color=color)
            axes.plot(100 * test.mean, y, "o", color=color, markersize=5)
        axes.set_yticks(range(len(others)), [ARMS[name].title for name in others[::-1]], fontsize=8)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_title(str(place), fontsize=9.5)
        axes.grid(axis="x", color="0.92")
        for edge in ("top", "right", "left"):
            axes.spines[edge].set_visible(False)
        axes.tick_params(left=False)
    mpl, uda, aligned = (delivered(rows, places[0], name) for name in ("mpl", "uda", "uda_aligned"))
    above = [100 * paired_test(mpl, other).mean for other in (uda, aligned)]
    figure.suptitle(
        f"At equal time Meta Pseudo Labels is {above[0]:+.1f} points against UDA and {above[1]:+.1f} against "
        f"aligned UDA ({places[0]})",
        fontsize=10.5,
    )
    figure.supxlabel(
        f"points of test accuracy, {len(mpl)} seeds, 95 %; on the right of 0 Meta Pseudo Labels is ahead", fontsize=9
    )
    figure.savefig(path, dpi=120)


def complete(rows: Sequence[Row], places: Sequence[Any]) -> list[Any]:
    """The places in which every arm has final rows."""
    return [place for place in places if all(of(rows, place, arm, final=True) for arm in ARMS)]


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--costs", action="store_true", help="measure what a step of each arm costs, and stop")
    parser.add_argument("--table", action="store_true", help="print the tables of the file's rows, and run nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables there, draw the figure, and stop")
    parser.add_argument("--workers", type=int, metavar="N", help="processes: 2, and all cores to draw pictures with")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the study on pictures; in miniature anywhere",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of a call on cuda, which the next one goes on from")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "feedback_worth", help="of drawn pictures, on cuda"
    )
    given = parsed(parser)
    on_pictures = given.device == "cuda"
    if on_pictures and not given.miniature and not given.table and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --miniature runs on the CPU")
    if given.costs:
        torch.set_num_threads(1)
        found, _ = costs(Digits(PRIMARY, Size.seeds), *((2, 2) if given.miniature else (60, 25)), time.process_time)
        print(json.dumps({"costs": found, **described("cpu")}))
        return
    if on_pictures:
        size, raw = sizes_of_pictures(given.miniature), RAW_PICTURES if given.out == RAW else given.out
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not given.table:
            study_pictures(size, raw, device, given.minutes, given.folder, given.workers or available_cores())
        print(of_places(read(raw), size.places, size.places))
        return
    if not (given.table or given.write):
        study(MINIATURE if given.miniature else Size(), given.out, given.workers or 2)
    rows = read(given.out)
    if given.write:
        write_between_marks(given.write, "feedback-worth", block(rows))
        draw(given.write.with_name("feedback_worth.png"), rows)
    else:
        print(block(rows))


if __name__ == "__main__":
    main()
