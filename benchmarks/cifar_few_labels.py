"""What do unlabeled pictures add to few labels in minutes of a core, and what does feedback add?

    python benchmarks/cifar_few_labels.py --root CIFAR      # two hours of a core; goes on
    python benchmarks/cifar_few_labels.py --write benchmarks/results/cifar_few_labels.md
    python benchmarks/cifar_few_labels.py --root CIFAR --card    # on a GPU, up to six million

Each run is the command ``metapl train images`` or ``metapl noisy-student images`` with the flags of
ARMS, on ``airbench_small`` with its recipe, from pictures of 32 x 32. CIFAR has train/CLASS/*.png
and test/CLASS/*.png. A draw is the seed by which NumPy takes the labeled pictures, as many of each
class, and 8,000 of the others without labels. The command sets 400 of 4,000 labeled pictures aside
to select by. A run is tested once, on the first 300 test pictures of each class.

Work: the operations of the convolutions and products of a step, forward and back, are counted over
all steps of a short run, and so are labeling and finetuning. Validation, batch-norm statistics and
the test are not. A budget of 30,000 pictures is what labels alone need for so many, three fifths of
them of 24 x 24. The others take as many steps as the same work allows. A student that sees no
labels is finetuned for 50 steps, which count.

No arm was tuned. All have the defaults, but for strong changes of pictures, five validations, and
the weight of feedback alone, whose default is relative to losses that it does not have: it is one
over the student's rate.

By ``--card`` the labels are 4,000, the unlabeled pictures all others, and the budgets 600,000, two
and six million pictures; a run is tested on all test pictures. It goes on where it was stopped.

Declared before the first run, each as a paired difference by draw with the interval of a t-test:

- Main question: does the feedback add to the same loop without it, at equal work? ``mpl`` less
  ``none``, what they deliver, 4,000 labels. Draws 11, 12, 13; 14, 15, 16 follow if there is time.
- Row 18, MPL on its own: the finetuned student of ``mpl_alone`` less that of ``none_alone``
  (feedback adds to a random teacher), less ``mpl_start`` (the teacher's losses add), and less
  ``pseudo_labels`` (a fixed teacher). Less ``mpl``, as usual, was declared before its first row.
- Row 19, rounds: Noisy Student's round 2 less 1, and 3 less 2, where round 1 gains on round 0.
- Row 20, sizes: round 1 less labels alone, of two networks, each of as many steps: 469 of 64
  labeled pictures, and 938 of 32 for `pooled_cnn`; so the student has more work.
- Row 21, consistency works less well: ``noisy_student`` less ``uda``, and less ``fixmatch``.
- Row 22, label smoothing: ``mpl`` less ``smoothing_0.1``, and that less ``smoothing_0``.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import NONE, RESULTS, Row, grid, read, show
from PIL import Image

from metapl.ablation.cost import flops
from metapl.apps import images
from metapl.apps.methods.base import Training
from metapl.apps.methods.feedback import Feedback
from metapl.apps.methods.mpl import Mpl
from metapl.feedback import Reinforce
from metapl.networks import create
from metapl.problems import PseudoLabels
from metapl.training.trainer import BilevelTrainer

RAW = RESULTS / "cifar_few_labels.jsonl"
RAW_OF_CARD = RESULTS / "gpu" / "cifar_few_labels.jsonl"
BATCH = 64
SIDE = 32
BUDGET = 30_000
# For few labels, and for as many as usual.
LONGER_BUDGET = 60_000
LONGEST_BUDGET = 180_000
DRAWS = (11, 12, 13)
MORE_DRAWS = (14, 15, 16)
UNLABELED = 8_000
TESTED_PER_CLASS = 300
FINETUNING = 50
VALIDATIONS = 5
# The share of the labeled pictures that is set aside to select by, and how many at most.
SET_ASIDE = 0.2
MOST_SET_ASIDE = 400
# The rows are older than the choice of changes by the number of steps.
STRONG = ("--augment", "strong")

# Steps of the shorter run of two by which work is counted: shares such as 0.6 are whole steps.
COUNTED_STEPS = 20
COUNTED_PART = 4
NOISE_PER_CLASS = 20
NOISE_LABELS = 70

# -------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True, kw_only=True)
class MplAlone(Mpl):
    """Meta Pseudo Labels whose teacher learns by the student's feedback alone."""

    @property
    def name(self) -> str:
        """Return the name with that of the method whose losses are left out."""
        return f"{super().name}_alone"

    def trainer(self, t: Training) -> BilevelTrainer:
        """Build the trainer of both networks, of which the teacher has no losses of its own."""
        return t.bilevel(
            t.teacher,
            self.feedback.estimator(),
            self.feedback.problem(),
            teacher_losses=(),
            student_lr=self.feedback.student_lr,
            **self.feedback.size(),
        )


@dataclass(frozen=True, kw_only=True)
class MplCosine(Mpl):
    """Meta Pseudo Labels by the authors' form: a cosine, less a moving average of decay 0.99."""

    @property
    def name(self) -> str:
        return "mpl_cosine"

    def trainer(self, t: Training) -> BilevelTrainer:
        """Build the trainer of both networks; the mode is ``reinforce``, for drawn labels."""
        return t.bilevel(
            t.teacher,
            Reinforce(similarity="cosine", baseline=0.99),
            self.feedback.problem(),
            teacher_losses=self.uda.losses(),
            student_lr=self.feedback.student_lr,
            **self.feedback.size(),
        )


@dataclass(frozen=True, kw_only=True)
class MplByLetter(Mpl):
    """Algorithm 1 as it is written: one x_u for both networks, a drawn label, h with weight 1."""

    @property
    def name(self) -> str:
        return f"{super().name}_by_letter"

    def trainer(self, t: Training) -> BilevelTrainer:
        """Build the trainer of both networks; without feedback the labels are drawn too."""
        learns_from_student = self.feedback.learns_from_student
        return t.bilevel(
            t.teacher,
            Reinforce() if learns_from_student else "none",
            PseudoLabels(kind="hard", student_view="weak"),
            teacher_losses=self.uda.losses(),
            student_lr=self.feedback.student_lr,
            feedback_weight=1.0 if learns_from_student else None,
        )


WITHOUT = Feedback(learns_from_student=False)
OWN_METHODS = (
    MplAlone(),
    MplAlone(feedback=WITHOUT),
    MplCosine(),
    MplByLetter(),
    MplByLetter(feedback=WITHOUT),
)


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        title: what it is called in a table.
        flags: of ``metapl train images``, or of ``metapl noisy-student images`` where there are
            rounds.
        rounds: the students of Noisy Student.
        is_finetuned: whether the network sees no labels before it is finetuned.
        cost_of: the arm whose steps cost the same; empty: its own are counted.
        network: what is trained.
        batch: the labeled pictures of a step.
        unlabeled: the unlabeled ones, where a method takes some.
        learns_all: whether no labeled picture is set aside to select by.
    """

    title: str
    flags: tuple[str, ...]
    rounds: int = 0
    is_finetuned: bool = False
    cost_of: str = ""
    network: str = "airbench_small"
    batch: int = BATCH
    unlabeled: int = BATCH // 2
    learns_all: bool = False

    @property
    def finetuning(self) -> int:
        """Return the steps of finetuning."""
        return FINETUNING if self.is_finetuned else 0

    def words(
        self,
        steps: int,
        finetuning: int,
        part: int = 1,
        labels: int = 0,
        more: Sequence[str] = STRONG,
        device: str = "cpu",
    ) -> list[str]:
        """Return the words of the command, but for its folders.

        Args:
            steps: of each network.
            finetuning: steps of it.
            part: what batches are divided by.
            labels: how many pictures are labeled, of which a part is set aside.
            more: flags besides.
            device: on which it is trained.
        """
        words = ["train", "images", *self.flags, "--unlabeled-batch", str(self.unlabeled // part)]
        if self.rounds:
            words = ["noisy-student", "images", *self.flags, "--rounds", str(self.rounds)]
        words += ["--network", self.network, "--labeled-batch", str(self.batch // part)]
        words += ["--steps", str(steps), "--finetune-steps", str(finetuning), "--device", device]
        words += ["--validate-every", str(max(1, steps // VALIDATIONS)), *more]
        if labels and not self.learns_all:
            words += ["--val-fraction", f"{min(SET_ASIDE, MOST_SET_ASIDE / labels):g}"]
        return words


def method(name: str, *flags: str) -> tuple[str, ...]:
    return ("--method", name, *flags)


SMOOTHING = "--label-smoothing"
FROM_START = ("--wait", "0")
DRAWN = ("--mode", "reinforce")
WEIGHT = f"{1 / images.RATES['airbench']:.4g}"
SMALLER = "pooled_cnn"
# A new student learns soft labels of all pictures as it learns those of people.
PLAIN_ROUNDS = ("--unlabeled-noise", "standard", "--balance", "False")

ARMS = {
    "labels": Arm("labels alone, smoothing 0.2", method("supervised")),
    "smoothing_0": Arm(
        "labels alone, smoothing 0", method("supervised", SMOOTHING, "0"), cost_of="labels"
    ),
    "smoothing_0.1": Arm(
        "labels alone, smoothing 0.1", method("supervised", SMOOTHING, "0.1"), cost_of="labels"
    ),
    "none": Arm("the loop without feedback", method("none"), is_finetuned=True),
    "mpl": Arm("MPL", method("mpl"), is_finetuned=True),
    "mpl_alone": Arm(
        "MPL on its own, from the first step",
        method("mpl_alone", *FROM_START, "--feedback-weight", WEIGHT),
        is_finetuned=True,
    ),
    "none_alone": Arm(
        "labels of a random teacher", method("none_alone", *FROM_START), is_finetuned=True
    ),
    "mpl_start": Arm("MPL, from the first step", method("mpl", *FROM_START), is_finetuned=True),
    "none_start": Arm(
        "the loop without feedback, from the first step",
        method("none", *FROM_START),
        is_finetuned=True,
    ),
    "pseudo_labels": Arm("labels of a fixed teacher", method("pseudo_labels"), is_finetuned=True),
    "uda": Arm("UDA", method("uda")),
    "fixmatch": Arm("FixMatch", method("fixmatch"), cost_of="uda"),
    "noisy_student": Arm("Noisy Student, one round", (), rounds=1),
    "mpl_outer_4": Arm(
        "MPL, 4 x the labeled batch", method("mpl"), is_finetuned=True, batch=4 * BATCH
    ),
    "mpl_outer_16": Arm(
        "MPL, 16 x the labeled batch", method("mpl"), is_finetuned=True, batch=16 * BATCH
    ),
    "no_noise": Arm(
        "Noisy Student, no noise on unlabeled pictures",
        ("--unlabeled-noise", "none"),
        rounds=1,
        cost_of="noisy_student",
    ),
    "unbalanced": Arm(
        "Noisy Student, not balanced", ("--balance", "False"), rounds=1, cost_of="noisy_student"
    ),
    "staged": Arm(
        "Noisy Student, pretrained and finetuned",
        ("--training", "pretrain_finetune"),
        rounds=1,
        is_finetuned=True,
        cost_of="noisy_student",
    ),
    "three_rounds": Arm("Noisy Student, three rounds", (), rounds=3),
    "smaller_labels": Arm(
        "`pooled_cnn`, labels alone", method("supervised"), network=SMALLER, batch=BATCH // 2
    ),
    "smaller_student": Arm(
        "`pooled_cnn`, Noisy Student, one round", (), rounds=1, network=SMALLER, batch=BATCH // 2
    ),
    "labels_all": Arm(
        "labels alone, none set aside", method("supervised"), cost_of="labels", learns_all=True
    ),
    "uda_all": Arm("UDA, none set aside", method("uda"), cost_of="uda", learns_all=True),
    "uda_few": Arm(
        "UDA, none set aside, 16 labeled and 80 unlabeled a step",
        method("uda"),
        batch=16,
        unlabeled=80,
        learns_all=True,
    ),
    "uda_surer": Arm(
        "UDA, none set aside, 16 and 80 a step, labels from a probability of 0.6 on",
        method("uda", "--uda-threshold", "0.6"),
        cost_of="uda_few",
        batch=16,
        unlabeled=80,
        learns_all=True,
    ),
    "labels_few": Arm("labels alone, 16 a step", method("supervised"), batch=16),
    "labels_few_all": Arm(
        "labels alone, none set aside, 16 a step",
        method("supervised"),
        cost_of="labels_few",
        batch=16,
        learns_all=True,
    ),
    "labels_fast_all": Arm(
        "labels alone, none set aside, four times the rate",
        method("supervised", "--lr", "0.24"),
        cost_of="labels",
        learns_all=True,
    ),
    "none_few": Arm(
        "the loop without feedback, 16 labeled and 80 unlabeled a step",
        method("none"),
        is_finetuned=True,
        batch=16,
        unlabeled=80,
    ),
    "mpl_few": Arm(
        "MPL, 16 labeled and 80 unlabeled a step",
        method("mpl"),
        is_finetuned=True,
        batch=16,
        unlabeled=80,
    ),
    "letter": Arm(
        "MPL with drawn labels, none set aside",
        method("mpl", *DRAWN),
        is_finetuned=True,
        learns_all=True,
    ),
    "authors": Arm(
        "MPL by a cosine less a moving average, none set aside",
        method("mpl_cosine", *DRAWN),
        is_finetuned=True,
        learns_all=True,
    ),
    "drawn": Arm(
        "the loop without feedback, drawn labels, none set aside",
        method("none", *DRAWN),
        is_finetuned=True,
        learns_all=True,
    ),
    "none_all": Arm(
        "the loop without feedback, none set aside",
        method("none"),
        is_finetuned=True,
        cost_of="none",
        learns_all=True,
    ),
    "by_letter": Arm(
        "Algorithm 1 by its letter, none set aside",
        method("mpl_by_letter", *FROM_START),
        is_finetuned=True,
        learns_all=True,
    ),
    "none_by_letter": Arm(
        "the same without feedback, none set aside",
        method("none_by_letter", *FROM_START),
        is_finetuned=True,
        learns_all=True,
    ),
    "restart": Arm(
        "self-training with restart, one round, none set aside",
        PLAIN_ROUNDS,
        rounds=1,
        learns_all=True,
    ),
    "restart_2": Arm(
        "self-training with restart, two rounds, none set aside",
        PLAIN_ROUNDS,
        rounds=2,
        learns_all=True,
    ),
}
# What a card takes at once.
CARD_BATCH = 256
CARD_ARMS = {
    f"card_{name}": replace(
        arm, batch=CARD_BATCH, unlabeled=CARD_BATCH, learns_all=True, cost_of=""
    )
    for name, arm in ARMS.items()
    if name in ("labels", "uda", "none", "mpl", "restart", "restart_2")
}
ARMS |= CARD_ARMS
# ------------------------------------------------------------------------------------- the pictures


def write_pictures(
    root: Path,
    folder: Path,
    *,
    draw: int,
    labels: int,
    is_tested: bool = True,
    unlabeled: int | None = UNLABELED,
    tested: int | None = TESTED_PER_CLASS,
) -> None:
    """Write the labeled, unlabeled and test pictures of a draw, unless they are there.

    Unlabeled pictures are numbered in random order, for names could tell classes.

    Args:
        is_tested: take test pictures to test on; else as many of the other training pictures.
        unlabeled: how many pictures have no label; None: all that are not labeled.
        tested: test pictures of each class; None: all.
    """
    if folder.exists():
        return
    rng = np.random.default_rng(draw)
    classes = sorted(path for path in (root / "train").iterdir() if path.is_dir())
    others: list[Path] = []
    for path in classes:
        pictures = sorted(path.glob("*.png"))
        order = rng.permutation(len(pictures))
        count = labels // len(classes)
        copy([pictures[number] for number in order[:count]], folder / "labeled" / path.name)
        others += [pictures[number] for number in order[count:]]
        if is_tested:
            of_test = sorted((root / "test" / path.name).glob("*.png"))[:tested]
            copy(of_test, folder / "test" / path.name)
    chosen = [others[number] for number in rng.permutation(len(others))]
    copy(chosen[:unlabeled], folder / "unlabeled")
    if not is_tested:
        held_out = chosen[UNLABELED:][: TESTED_PER_CLASS * len(classes)]
        for path in classes:
            of_class = [picture for picture in held_out if picture.parent == path]
            copy(of_class, folder / "test" / path.name)


def copy(pictures: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        shutil.copyfile(picture, folder / f"{number:05d}.png")


def write_noise(root: Path, per_class: int) -> None:
    """Write random pictures of ten classes, by which steps are counted and miniatures run."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "abcdefghij":
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(per_class):
                levels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(levels).save(folder / f"{number}.png")


# -------------------------------------------------------------------------------------------- runs


def enter_methods() -> None:
    """Enter the methods of this file, before the command's flags are made of their names."""
    torch.set_num_threads(1)
    for own in OWN_METHODS:
        images.METHODS[own.name] = own


def command(words: list[str], folder: Path, out: Path, *, tests: bool) -> float:
    """Run a command of ``metapl`` on a folder's pictures, and return its processor time."""
    from metapl.apps.main import main

    folders: list[str] = []
    for part in ("labeled", "unlabeled", "test") if tests else ("labeled", "unlabeled"):
        folders += [f"--{part}", str(folder / part)]
    begun = time.process_time()
    with redirect_stdout(io.StringIO()) as printed:
        code = main([*words, *folders, "--out", str(out)])
    if code:
        raise RuntimeError(f"metapl {' '.join(words)} ended with {code}: {printed.getvalue()}")
    return time.process_time() - begun


def counted(words: list[str], folder: Path, out: Path) -> int:
    """Return the operations of a run, of products and convolutions."""
    return flops(lambda: command(words, folder, out, tests=False))


def cost(pool: Executor, arm: str, steps: int) -> Row:
    """Return the operations of an average step of an arm, counted on random pictures.

    Two runs of different length differ by that of their steps alone. Batches are a part of their
    size, with which the operations grow.
    """
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "noise")
        write_noise(root, per_class=NOISE_PER_CLASS)
        folder = Path(place, "pictures")
        write_pictures(root, folder, draw=0, labels=NOISE_LABELS)
        operations: list[int] = []
        for number in (steps, 2 * steps):
            words = [*ARMS[arm].words(number, finetuning=0, part=COUNTED_PART), "--mirror", "True"]
            run = pool.submit(counted, words, folder, Path(place, f"run-{number}"))
            operations.append(run.result())
    average = (operations[1] - operations[0]) / steps
    return {"gflop_a_step": COUNTED_PART * average / 1e9}


def picture_gflop(network: str) -> tuple[float, float]:
    """Return the operations of a picture of 32 x 32 forward and back, and forward alone."""
    module = create(network, 10)
    pictures = torch.zeros(2, 3, SIDE, SIDE)
    forward = flops(lambda: module(pictures)) / 2e9
    both = flops(lambda: module(pictures).sum().backward()) / 2e9
    return both, forward


def planned(
    rows: list[Row], *, arm: str, pictures: int, is_equal: bool, unlabeled: int = UNLABELED
) -> tuple[int, float]:
    """Return the steps of an arm for its work, and the work in GFLOP.

    Args:
        rows: those that have the cost of steps.
        arm: its name.
        pictures: as many as labels alone learn for the same work.
        is_equal: whether the work is that of labels alone; else every network of the arm takes
            the steps that labels alone take.
        unlabeled: the pictures that a round labels.
    """
    costs = {row["cost_of"]: row["gflop_a_step"] for row in rows if "cost_of" in row}
    chosen = ARMS[arm]
    step = costs[chosen.cost_of or arm]
    learned, forward = picture_gflop(chosen.network)
    # A network predicts by a picture and its mirror image where its recipe says so.
    views = 1 if chosen.network == SMALLER else 2
    fixed = chosen.finetuning * BATCH * learned + chosen.rounds * unlabeled * views * forward
    steps = max(1, round(pictures / BATCH))
    if is_equal:
        steps = max(2, round((steps * costs["labels"] - fixed) / step))
    return steps, steps * step + fixed


def trained(pool: Executor, words: list[str], folder: Path) -> Row:
    """Run a command, and return what its result has of accuracies, and its processor time."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "run")
        begun = time.monotonic()
        seconds = pool.submit(command, words, folder, out, tests=True).result()
        elapsed = time.monotonic() - begun
        result = json.loads((out / "result.json").read_text())
    row: Row = {name: value for name, value in result.items() if name.endswith("_accuracy")}
    row |= {"delivered": result["delivered"], "best_step": result["best_step"]}
    if "rounds" in result:
        first = result["rounds"][0]["teacher"]
        row["rounds"] = [
            {name: value for name, value in one.items() if name.endswith("_accuracy")}
            for one in (first, *result["rounds"])
        ]
    return {**row, "core_seconds": round(seconds, 1), "seconds": round(elapsed, 1)}


# -------------------------------------------------------------------------------------------- jobs

FIRST = ("labels", "smoothing_0", "smoothing_0.1", "none", "mpl")
SECOND = ("mpl_alone", "pseudo_labels", "uda", "noisy_student")
THIRD = ("fixmatch", "mpl_start")
LAST = ("none_alone", "none_start")
AS_MANY_STEPS = ("three_rounds", "smaller_labels", "smaller_student")
NOISY_STUDENTS = ("no_noise", "unbalanced", "staged")
LARGER_OUTER = ("mpl_outer_4", "mpl_outer_16")
FEW_ARMS = ("labels", "none", "mpl", "uda")
LONGEST_ARMS = ("labels", "none", "mpl")
FORMS = ("letter", "authors", "drawn")
ALL_LEARNED = {
    4000: ("labels_all",),
    1000: ("labels_all", "uda_all"),
    250: ("labels_all", "uda_all", "none_all", "uda_few", "uda_surer"),
}
LATER = (
    (4000, ("by_letter", "none_by_letter", "uda_all", "restart", "restart_2")),
    (250, ("restart", "restart_2", "labels_few_all")),
    (1000, ("labels_few_all",)),
    (1000, ("uda_surer", "uda_few")),
    (4000, ("labels_few_all",)),
    (1000, ("labels_fast_all",)),
    (4000, ("labels_fast_all",)),
    (250, ("labels_fast_all",)),
)
CARD_BUDGETS = (600_000, 2_000_000, 6_000_000)


def jobs() -> Iterator[Row]:
    """Yield the jobs in the order of their worth; later ones depend on earlier rows."""
    usual: Row = {"labels": 4000, "pictures": BUDGET, "is_equal": True}
    for arms in (FIRST, SECOND, THIRD):
        for draw in DRAWS:
            for arm in arms:
                yield from with_cost({"arm": arm, **usual, "draw": draw})
    for draw in DRAWS:
        for arm in AS_MANY_STEPS:
            pictures = BUDGET * BATCH // ARMS[arm].batch
            longer = {**usual, "pictures": pictures, "is_equal": False}
            yield from with_cost({"arm": arm, **longer, "draw": draw})
    for draw in DRAWS:
        for arm in LAST:
            yield from with_cost({"arm": arm, **usual, "draw": draw})
    for draw in MORE_DRAWS:
        for arm in ("none", "mpl"):
            yield from with_cost({"arm": arm, **usual, "draw": draw})
    for draw in DRAWS:
        for arm in LARGER_OUTER:
            yield from with_cost({"arm": arm, **usual, "draw": draw})
    for draw in DRAWS:
        for labels in (1000, 250):
            for arm in FEW_ARMS:
                few: Row = {"labels": labels, "pictures": LONGER_BUDGET, "is_equal": True}
                yield from with_cost({"arm": arm, **few, "draw": draw})
        for arm in LONGEST_ARMS:
            yield from with_cost({"arm": arm, **usual, "pictures": LONGEST_BUDGET, "draw": draw})
    for draw in DRAWS:
        for labels in (1000, 250):
            for arm in FEW_ARMS:
                longest: Row = {"labels": labels, "pictures": LONGEST_BUDGET, "is_equal": True}
                yield from with_cost({"arm": arm, **longest, "draw": draw})
    for draw in DRAWS:
        yield from with_cost({"arm": "uda", **usual, "pictures": LONGEST_BUDGET, "draw": draw})
    for draw in DRAWS:
        for arm in NOISY_STUDENTS:
            yield from with_cost({"arm": arm, **usual, "is_equal": False, "draw": draw})
    for draw in DRAWS:
        for arm in FORMS:
            yield from with_cost({"arm": arm, **usual, "draw": draw})
    for draw in DRAWS:
        for labels, arms in ALL_LEARNED.items():
            for arm in arms:
                longest = {"labels": labels, "pictures": LONGEST_BUDGET, "is_equal": True}
                yield from with_cost({"arm": arm, **longest, "draw": draw})
    for labels, arms in LATER:
        for draw in DRAWS:
            for arm in arms:
                longest = {"labels": labels, "pictures": LONGEST_BUDGET, "is_equal": True}
                yield from with_cost({"arm": arm, **longest, "draw": draw})
    for draw in DRAWS:
        for arm in (*FEW_ARMS, "restart"):
            longer = {**usual, "pictures": LONGER_BUDGET, "draw": draw}
            yield from with_cost({"arm": arm, **longer})


def jobs_of_card() -> Iterator[Row]:
    """Yield the jobs of a GPU, the shorter ones first."""
    for pictures in CARD_BUDGETS:
        for draw in DRAWS:
            for arm in CARD_ARMS:
                job: Row = {"labels": 4000, "pictures": pictures, "is_equal": True}
                yield from with_cost({"arm": arm, **job, "draw": draw})


def miniature_jobs(second_arm: str) -> Iterator[Row]:
    """Yield two draws of labels alone and one of another arm, of two steps on random pictures."""
    for arm, draws in (("labels", DRAWS[:2]), (second_arm, DRAWS[:1])):
        for draw in draws:
            few: Row = {"labels": NOISE_LABELS, "pictures": 2 * BATCH, "is_equal": False}
            yield from with_cost({"arm": arm, **few, "draw": draw})


def with_cost(job: Row) -> Iterator[Row]:
    """Yield the counting of an arm's steps, which is done once, and of those of labels alone."""
    yield {"cost_of": "labels"}
    yield {"cost_of": ARMS[job["arm"]].cost_of or job["arm"]}
    yield job


# ------------------------------------------------------------------------------------------ tables


def selected(rows: list[Row], arm: str, **columns: Any) -> dict[int, Row]:
    """Return the rows of an arm by draw; without columns those of the declared tests."""
    expected = {"labels": 4000, "is_equal": True, **columns}
    if expected["is_equal"]:
        expected = {"pictures": BUDGET, **expected}
    return {
        row["draw"]: row for row in rows if row["arm"] == arm and expected.items() <= row.items()
    }


def table_of_arms(rows: list[Row]) -> str:
    """Return what each arm reaches, with its work, and its difference to labels alone."""
    lines = []
    groups = dict.fromkeys(
        (row["labels"], row["pictures"], row["is_equal"], row["arm"]) for row in rows
    )
    for labels, pictures, is_equal, arm in groups:
        of_arm = selected(rows, arm, labels=labels, pictures=pictures, is_equal=is_equal)
        same_work = pictures if is_equal else BUDGET
        baseline = selected(rows, "labels", labels=labels, pictures=same_work)
        if ARMS[arm].network == SMALLER:
            baseline = selected(rows, "smaller_labels", is_equal=False)
        accuracies = [row["test_accuracy"] for row in of_arm.values()]
        change = compared(of_arm, baseline)
        if of_arm == baseline:
            change = [NONE] * 3
        deliveries = [row["delivered"] for row in of_arm.values()]
        work = statistics.fmean(row["work_gflop"] for row in of_arm.values()) / 1e3
        seconds = statistics.median(row["core_seconds"] for row in of_arm.values())
        line = [f"{labels:,}", ARMS[arm].title, f"{next(iter(of_arm.values()))['steps']:,}"]
        line += [f"{work:.1f}", f"{seconds:.0f}", str(len(of_arm)), harness.spread(accuracies)]
        line += [*change[:2], statistics.mode(deliveries)]
        lines.append(line)
    head = ["labels", "arm", "steps", "TFLOP", "core-seconds", "draws", "test, %"]
    head += ["less labels alone", "95 %", "delivers"]
    return grid(head, lines, "llrrrrrrrl")


def compared(
    first: dict[int, Row], second: dict[int, Row], column: str = "test_accuracy"
) -> list[str]:
    """Return the difference over the draws that both have, its interval and its p."""
    draws = sorted(first.keys() & second.keys())
    if not draws:
        return [NONE] * 3
    values = [[rows[draw][column] for draw in draws] for rows in (first, second)]
    change, p = harness.difference(*values)
    return [change, harness.between(*values), p]


def table_of_tests(rows: list[Row]) -> str:
    """Return the tests that were declared before the first run, and later comparisons."""
    student = "finetuned_test_accuracy"
    pairs = [
        ("main: feedback adds", "mpl", "none", "test_accuracy"),
        ("18: feedback adds to a random teacher", "mpl_alone", "none_alone", student),
        ("18: less with the teacher's losses", "mpl_alone", "mpl_start", student),
        ("18: less MPL as usual", "mpl_alone", "mpl", student),
        ("18: less labels of a fixed teacher", "mpl_alone", "pseudo_labels", student),
        ("21: Noisy Student less UDA", "noisy_student", "uda", "test_accuracy"),
        ("21: Noisy Student less FixMatch", "noisy_student", "fixmatch", "test_accuracy"),
        ("22: MPL less smoothing 0.1", "mpl", "smoothing_0.1", "test_accuracy"),
        ("22: smoothing 0.1 less 0", "smoothing_0.1", "smoothing_0", "test_accuracy"),
    ]
    lines = []
    for name, first, second, column in pairs:
        both = [selected(rows, arm) for arm in (first, second)]
        count = len(both[0].keys() & both[1].keys())
        lines.append([name, str(count), *compared(both[0], both[1], column)])
    rounds = {
        draw: [{"test_accuracy": one["test_accuracy"]} for one in row["rounds"]]
        for draw, row in selected(rows, "three_rounds", is_equal=False).items()
    }
    for number in (1, 2, 3):
        both = [
            {draw: reached[place] for draw, reached in rounds.items()}
            for place in (number, number - 1)
        ]
        name = f"19: round {number} less round {number - 1}"
        lines.append([name, str(len(rounds)), *compared(*both)])
    sizes = (
        (
            "airbench_small",
            {draw: one[1] for draw, one in rounds.items()},
            selected(rows, "labels"),
        ),
        (
            SMALLER,
            selected(rows, "smaller_student", is_equal=False),
            selected(rows, "smaller_labels", is_equal=False),
        ),
    )
    for network, first_round, labels_alone in sizes:
        count = len(first_round.keys() & labels_alone.keys())
        name = f"20: `{network}`, round 1 less labels alone"
        lines.append([name, str(count), *compared(first_round, labels_alone)])
    lines += later_lines(rows, rounds)
    return grid(["test", "draws", "difference", "95 %", "p"], lines, 1)


def later_lines(rows: list[Row], rounds: dict[int, list[Row]]) -> list[list[str]]:
    """Return the comparisons that were not declared, with their names.

    Args:
        rounds: what each network of Noisy Student's three rounds reaches, by draw.
    """
    first_round = {draw: reached[1] for draw, reached in rounds.items()}
    budgets = [
        {"labels": labels, "pictures": pictures}
        for pictures in (LONGER_BUDGET, LONGEST_BUDGET)
        for labels in (4000, 1000, 250)
    ]
    pairs = []
    for columns in budgets:
        name = f"{columns['labels']:,} labels, {columns['pictures']:,} pictures"
        mpl, none, labels, uda = (
            selected(rows, arm, **columns) for arm in ("mpl", "none", "labels", "uda")
        )
        pairs += [(f"{name}: feedback adds", mpl, none), (f"{name}: UDA adds", uda, labels)]
    drawn = selected(rows, "drawn")
    pairs += [("4,000 labels: feedback adds to drawn labels", selected(rows, "letter"), drawn)]
    pairs += [("4,000 labels: the cosine adds", selected(rows, "authors"), drawn)]
    for labels in (4000, 1000, 250):
        columns = {"labels": labels, "pictures": LONGEST_BUDGET}
        alone, uda, none = (
            selected(rows, arm, **columns) for arm in ("labels_all", "uda_all", "none_all")
        )
        name = f"{labels:,} labels, none set aside"
        by_letter, without = (
            selected(rows, arm, **columns) for arm in ("by_letter", "none_by_letter")
        )
        pairs += [(f"{name}: Algorithm 1 by its letter adds", by_letter, without)]
        for arm, rounds_in_words in (("restart", "one round"), ("restart_2", "two rounds")):
            restarted = selected(rows, arm, **columns)
            pairs += [(f"{name}: self-training, {rounds_in_words}, adds", restarted, alone)]
        pairs += [(f"{name}: UDA adds", uda, alone), (f"{name}: the loop adds", none, alone)]
        surer = selected(rows, "uda_surer", **columns)
        pairs += [(f"{name}: UDA with more unlabeled pictures and a threshold of 0.6", surer, uda)]
        few = selected(rows, "labels_few_all", **columns)
        pairs += [
            (f"{name}: labels alone, 16 less 64 a step", few, alone),
            (
                f"{name}: labels alone, four times the rate less the default",
                selected(rows, "labels_fast_all", **columns),
                alone,
            ),
            (f"{name}: UDA less labels alone, 16 a step", uda, few),
            (f"{name}: UDA, threshold of 0.6, less labels alone, all of 16 a step", surer, few),
        ]
    for arm, times in (("mpl_outer_4", 4), ("mpl_outer_16", 16)):
        name = f"MPL, {times} x the labeled batch, less MPL"
        pairs.append((name, selected(rows, arm), selected(rows, "mpl")))
    for arm in NOISY_STUDENTS:
        name = f"{ARMS[arm].title}, less as usual"
        pairs.append((name, selected(rows, arm, is_equal=False), first_round))
    lines = []
    for name, first, second in pairs:
        count = len(first.keys() & second.keys())
        if count > 1:
            lines.append([f"not declared: {name}", str(count), *compared(first, second)])
    return lines


def power(spread: float, draws: int) -> float:
    """Return the difference that the t-test finds four times in five.

    Args:
        spread: standard deviation of the paired differences.
        draws: how many there are.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    bound = t.ppf(0.975, draws - 1)

    def missing(shift: float) -> float:
        return float(nct.sf(bound, draws - 1, shift) - 0.8)

    return float(brentq(missing, 0.1, 100.0)) * spread / math.sqrt(draws)


def table_of_power(rows: list[Row]) -> str:
    """Return the differences that the main question's test finds, by the spread of its pairs."""
    both = [selected(rows, arm) for arm in ("mpl", "none")]
    draws = sorted(both[0].keys() & both[1].keys())
    changes = [both[0][draw]["test_accuracy"] - both[1][draw]["test_accuracy"] for draw in draws]
    spread = statistics.stdev(changes) if len(changes) > 1 else math.nan
    lines = []
    for count in (3, 6, 12):
        points = NONE if math.isnan(spread) else f"{100 * power(spread, count):.1f}"
        lines.append([str(count), points])
    return grid(["draws", "difference found four times in five, points"], lines, "r")


def run_all(args: argparse.Namespace, pool: Executor, place: Path) -> None:
    """Run the jobs that are not in the file yet."""
    todo = jobs_of_card() if args.card else jobs()
    root = args.root
    counted_steps = COUNTED_STEPS
    device = "cuda" if args.card and not args.miniature else "cpu"
    if args.miniature:
        todo = miniature_jobs("card_restart" if args.card else "mpl_alone")
        counted_steps = 2
        root = place / "noise"
        write_noise(root, per_class=NOISE_PER_CLASS)

    def measure(**job: Any) -> Row:
        if "cost_of" in job:
            return cost(pool, job["cost_of"], counted_steps)
        folder = place / f"{job['draw']}-{job['labels']}"
        write_pictures(
            root,
            folder,
            draw=job["draw"],
            labels=job["labels"],
            unlabeled=None if args.card else UNLABELED,
            tested=None if args.card else TESTED_PER_CLASS,
        )
        arm = ARMS[job["arm"]]
        steps, work = planned(
            read(args.out),
            arm=job["arm"],
            pictures=job["pictures"],
            is_equal=job["is_equal"],
            unlabeled=len([*(folder / "unlabeled").iterdir()]),
        )
        finetuning = 1 if args.miniature and arm.is_finetuned else arm.finetuning
        words = arm.words(steps, finetuning, labels=job["labels"], device=device)
        row = trained(pool, words, folder)
        return {"steps": steps, "work_gflop": round(work, 1), **row}

    harness.go_on(args.out, todo, measure, environment=harness.environment())


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--root", type=Path, help="folder of train/CLASS and test/CLASS")
    parser.add_argument("--card", action="store_true", help="the larger budgets, on a GPU")
    args = harness.parsed(parser)
    if args.card and args.out == RAW:
        args.out = RAW_OF_CARD
    if args.runs:
        # One process takes all commands, so that nothing is imported twice.
        one = ProcessPoolExecutor(1, get_context("spawn"), initializer=enter_methods)
        with one as pool, tempfile.TemporaryDirectory() as place:
            run_all(args, pool, Path(place))
    rows = read(args.out, having="arm")
    show(args.write, "cifar_few_labels", table_of_arms(rows))
    show(args.write, "cifar_few_labels-tests", table_of_tests(rows))
    show(args.write, "cifar_few_labels-power", table_of_power(rows))


if __name__ == "__main__":
    main()
