"""Wrong labels on real pictures: what each method reaches, and which labels it suspects.

    python -m benchmarks.pictures.wrong_labels --source /usr/share/datasets/fashion-mnist
    python -m benchmarks.pictures.wrong_labels --table
    python -m benchmarks.pictures.wrong_labels --doubts --sheet docs/fashion_doubts.png

Of Fashion-MNIST's training pictures 3,000 get labels of which some are made wrong, and 300 others
keep theirs, which every method is told to be right; the test has all 10,000 pictures. Labels are
wrong in three ways: by any other class, with 20 and with 50 %, or by the partner of ``PAIRS``, with
40 %. The shares are exact. A run is a row, rows that are there are not run again, and all of the
first seed comes before the second.

Every arm has the same processor seconds of one thread, but for two that end before:
``metapl.sklearn`` at its defaults, and ``metapl attribute``, which has its default steps. The arms
of ``metapl train noisy`` are at its defaults, with as many steps as fit by its own measurement. The
rivals share one script: six convolutions, AdamW, a cosine, shifts and flips. Generalized cross
entropy and co-teaching are written out here; cleanlab runs in an interpreter that has it
(``--cleanlab-python``), and what it removes is removed. Nothing chooses by the test pictures.

An arm has a minute. The command's own default is five minutes, which ``--seconds 300`` gives to
every arm: with more time a network learns wrong labels by heart, so that the order may differ.

The command's default learns weights of examples, or plainly where its steps are few. This rule was
made on seeds 0 to 2 with a minute and on seed 0 with five minutes. Named on 28 November 2026 before
any of them was run: seeds 3 and 4 with a minute, of the default and of learned weights, and seed 1
with five minutes, of plain training and of learned weights.

With ``--doubts`` nothing is made wrong: `metapl train noisy` learns 6,000 pictures with the labels
of the set, in twice the seconds of an arm, and the hundred labels that it finds least probable are
drawn on one sheet.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import (
    NONE,
    RESULTS,
    Row,
    arguments,
    environment,
    go_on,
    grid,
    interval,
    loaded,
    parsed,
    read,
    show,
    write_json,
)
from benchmarks.pictures.real import (
    DEBIAN,
    PictureSet,
    convolutions,
    scaled,
    set_of,
    shifted,
    write_picture,
)
from metapl.apps.look import choose_settings
from metapl.apps.main import main as command
from metapl.apps.noisy_labels import METHODS, Noisy
from metapl.apps.settings import with_flags
from metapl.apps.several_runs import Job
from metapl.data import draws
from metapl.errors import MetaplError

RAW = RESULTS / "wrong_labels.jsonl"
DOUBTS = RESULTS / "fashion_doubts.json"
# Keeps these draws apart from every other use of a seed.
SPLIT_STREAM = 0x0DDB
NOISE_STREAM = 0x0DDC

# --------------------------------------------------------------------------------- the wrong labels

CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# Each class has one partner, which it is taken for, and which is taken for it.
PAIRS = (
    ("T-shirt", "shirt"),
    ("pullover", "coat"),
    ("sandal", "sneaker"),
    ("trouser", "dress"),
    ("bag", "ankle boot"),
)


@dataclass(frozen=True)
class Condition:
    """How labels are made wrong, and how many of them."""

    kind: Literal["symmetric", "pairs"]
    share: float

    @property
    def title(self) -> str:
        return f"{self.kind}, {100 * self.share:g} %"


CONDITIONS = (Condition("pairs", 0.4), Condition("symmetric", 0.5), Condition("symmetric", 0.2))


@dataclass(frozen=True)
class Size:
    """How many pictures have doubtful labels, and how many have right ones of each class."""

    doubtful: int = 3_000
    clean_per_class: int = 30


def partners() -> np.ndarray:
    """Return the number of each class's partner, (10,)."""
    numbers = np.empty(len(CLASSES), dtype=np.int64)
    for first, second in PAIRS:
        numbers[CLASSES.index(first)] = CLASSES.index(second)
        numbers[CLASSES.index(second)] = CLASSES.index(first)
    return numbers


def with_wrong_labels(labels: np.ndarray, condition: Condition, seed: int) -> np.ndarray:
    """Return the labels with an exact share of them made wrong, (n,) int64.

    The share is exact over all of them, and not in each class.
    """
    count = len(labels)
    bits = draws.bits(seed, 0, torch.arange(count), 2, NOISE_STREAM).numpy()
    wrong = np.argsort(bits[:, 0], kind="stable")[: round(condition.share * count)]
    given_labels = labels.copy()
    if condition.kind == "pairs":
        given_labels[wrong] = partners()[labels[wrong]]
    else:
        # One of the nine other classes, each as often.
        away = 1 + bits[wrong, 1].astype(np.int64) % (len(CLASSES) - 1)
        given_labels[wrong] = (labels[wrong] + away) % len(CLASSES)
    return given_labels


@dataclass(frozen=True)
class Draw:
    """What a method gets: pictures whose labels may be wrong, clean ones, and the set's test.

    Args:
        pictures, clean: (n, side, side) uint8.
        given_labels, clean_labels: (n,) int64.
        is_wrong: (n,) of the pictures whose labels may be wrong; no method is told.
        numbers: (n,) where these pictures lie in the set's training pictures.
        wrong_share: of the labels. Co-teaching alone is told it.
        whole: the set, of which the test pictures are taken.
    """

    pictures: np.ndarray
    given_labels: np.ndarray
    is_wrong: np.ndarray
    numbers: np.ndarray
    clean: np.ndarray
    clean_labels: np.ndarray
    wrong_share: float
    whole: PictureSet

    @classmethod
    def from_seed(
        cls, whole: PictureSet, condition: Condition | None, seed: int, size: Size
    ) -> Draw:
        """Draw pictures of a seed, each once, and none that is a test picture to the pixel.

        The pictures of a seed are the same in all conditions. None makes no label wrong.
        """
        order = shuffled_numbers(len(whole.training), seed)
        seen = {picture.tobytes() for picture in whole.test}
        clean: list[int] = []
        doubtful: list[int] = []
        clean_counts = np.zeros(len(CLASSES), dtype=np.int64)
        for number in order:
            pixels = whole.training[number].tobytes()
            if pixels in seen:
                continue
            seen.add(pixels)
            label = whole.training_labels[number]
            if clean_counts[label] < size.clean_per_class:
                clean_counts[label] += 1
                clean.append(number)
            elif len(doubtful) < size.doubtful:
                doubtful.append(number)
            if len(doubtful) == size.doubtful and clean_counts.min() == size.clean_per_class:
                break
        labels = whole.training_labels[doubtful]
        given_labels = labels
        if condition is not None:
            given_labels = with_wrong_labels(labels, condition, seed)
        return cls(
            pictures=whole.training[doubtful],
            given_labels=given_labels,
            is_wrong=given_labels != labels,
            numbers=np.array(doubtful),
            clean=whole.training[clean],
            clean_labels=whole.training_labels[clean],
            wrong_share=0.0 if condition is None else condition.share,
            whole=whole,
        )

    def write(self, folder: Path) -> None:
        """Write folders as a user has them: labeled/CLASS, clean/CLASS and test/CLASS.

        A picture's file is called by its position in the draw.
        """
        parts = {
            "labeled": (self.pictures, self.given_labels),
            "clean": (self.clean, self.clean_labels),
            "test": (self.whole.test, self.whole.test_labels),
        }
        for part, (pictures, labels) in parts.items():
            for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                write_picture(folder / part / CLASSES[label] / f"{number:05}.png", picture)

    def auc(self, suspicion: np.ndarray) -> float:
        """Return the area under the ROC curve of wrong against right labels.

        Args:
            suspicion: (n,) one number for each picture, the higher the more suspicious.
        """
        from sklearn.metrics import roc_auc_score

        return round(float(roc_auc_score(self.is_wrong, suspicion)), 4)


def shuffled_numbers(count: int, seed: int) -> list[int]:
    bits = draws.bits(seed, 0, torch.arange(count), 1, SPLIT_STREAM)[:, 0]
    return torch.argsort(bits, stable=True).tolist()


# ------------------------------------------------------------------------- the script of the rivals

Losses = Callable[[Tensor, Tensor], Tensor]
cross_entropies: Losses = partial(F.cross_entropy, reduction="none")

LEARNING_RATE = 3e-3
BATCH = 64


class Clock:
    """Counts processor seconds, up to a number of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin = time.process_time()

    @property
    def share(self) -> float:
        """Return the share of the seconds that has gone by."""
        return (time.process_time() - self.begin) / self.seconds


@dataclass(frozen=True)
class Examples:
    """Pictures as the networks take them, (n, 1, side, side), and labels, (n,)."""

    x: Tensor
    y: Tensor

    def select(self, numbers: Tensor) -> Examples:
        return Examples(self.x[numbers], self.y[numbers])

    def batch(self) -> Examples:
        """Draw a batch with replacement, each picture shifted and half of them mirrored."""
        rows = torch.randint(len(self.x), (BATCH,))
        return Examples(shifted(self.x[rows], is_mirrored=True), self.y[rows])

    def __add__(self, others: Examples) -> Examples:
        return Examples(torch.cat([self.x, others.x]), torch.cat([self.y, others.y]))


def doubtful_and_clean(draw: Draw) -> tuple[Examples, Examples]:
    doubtful = Examples(scaled(draw.pictures), torch.from_numpy(draw.given_labels))
    clean = Examples(scaled(draw.clean), torch.from_numpy(draw.clean_labels))
    return doubtful, clean


def train(examples: Examples, losses: Losses, seconds: float) -> tuple[nn.Module, int]:
    """Train a network for some processor seconds; return it and the number of steps."""
    clock = Clock(seconds)
    network = convolutions(len(CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    steps = 0
    while (share := clock.share) < 1:
        set_rate(optimizer, share)
        batch = examples.batch()
        loss = losses(network(batch.x), batch.y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return network, steps


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set the learning rate, which falls as a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def probabilities(network: nn.Module, x: Tensor) -> Tensor:
    """Return the class probabilities of pictures, (n, classes)."""
    network.eval()
    # With 50 pictures at a time, what lies between two layers stays in the processor's cache.
    parts = [network(part).softmax(1) for part in x.split(50)]
    network.train()
    return torch.cat(parts)


def share_right(predicted: Tensor, draw: Draw) -> float:
    return float((predicted.argmax(1).numpy() == draw.whole.test_labels).mean())


def tested(network: nn.Module, draw: Draw) -> float:
    """Return the share of the test pictures that a network is right on."""
    return share_right(probabilities(network, scaled(draw.whole.test)), draw)


def suspicion_of(predicted: Tensor, labels: Tensor) -> np.ndarray:
    """Return one minus the probability of the given label, (n,)."""
    return 1 - predicted.gather(1, labels[:, None])[:, 0].numpy()


def by_script(draw: Draw, seconds: float, *, losses: Losses = cross_entropies) -> Row:
    """Train on all labels as they are, the clean ones among them."""
    doubtful, clean = doubtful_and_clean(draw)
    network, steps = train(doubtful + clean, losses, seconds)
    suspicion = suspicion_of(probabilities(network, doubtful.x), doubtful.y)
    return {"test_accuracy": tested(network, draw), "auc": draw.auc(suspicion), "steps": steps}


def by_clean_pictures(draw: Draw, seconds: float) -> Row:
    """Train on the clean pictures alone."""
    doubtful, clean = doubtful_and_clean(draw)
    network, steps = train(clean, cross_entropies, seconds)
    suspicion = suspicion_of(probabilities(network, doubtful.x), doubtful.y)
    return {"test_accuracy": tested(network, draw), "auc": draw.auc(suspicion), "steps": steps}


def by_finetuning(draw: Draw, seconds: float) -> Row:
    """Train on all labels for nine tenths of the time, then on the clean ones.

    The learning rate of the second part is a tenth of the first one's, and stays as it is.
    """
    doubtful, clean = doubtful_and_clean(draw)
    network, steps = train(doubtful + clean, cross_entropies, 0.9 * seconds)
    clock = Clock(0.1 * seconds)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1 * LEARNING_RATE)
    while clock.share < 1:
        batch = clean.batch()
        loss = F.cross_entropy(network(batch.x), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    suspicion = suspicion_of(probabilities(network, doubtful.x), doubtful.y)
    return {"test_accuracy": tested(network, draw), "auc": draw.auc(suspicion), "steps": steps}


def generalized_cross_entropies(logits: Tensor, labels: Tensor, q: float = 0.7) -> Tensor:
    """Return (1 - p^q) / q for the probability p of each label, (n,).

    Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks
    with Noisy Labels" (NeurIPS 2018), equation 6; q = 0.7 as there.
    """
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    # Where p is 0 the derivative of p^q has no end.
    return (1 - p.clamp_min(1e-7) ** q) / q


# The share of the time in which co-teaching comes to leave out all that it leaves out. The paper
# takes 10 of its 200 epochs, and the first 10 epochs are about all that the time holds here.
COTEACHING_RISE = 1 / 3


def by_coteaching(draw: Draw, seconds: float) -> Row:
    """Train two networks, each on the pictures of a batch that the other has the least loss on.

    The share that is left out grows to the share of wrong labels, which it is told. Their
    probabilities are averaged.

    Source: Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy
    Labels" (NeurIPS 2018), Algorithm 1.
    """
    doubtful, clean = doubtful_and_clean(draw)
    examples = doubtful + clean
    clock = Clock(seconds)
    networks = [convolutions(len(CLASSES)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(n.parameters(), lr=LEARNING_RATE) for n in networks]
    steps = 0
    while (share := clock.share) < 1:
        left_out = draw.wrong_share * min(1.0, share / COTEACHING_RISE)
        count = math.ceil((1 - left_out) * BATCH)
        batch = examples.batch()
        losses = [cross_entropies(network(batch.x), batch.y) for network in networks]
        chosen = [values.detach().argsort()[:count] for values in losses]
        for number, optimizer in enumerate(optimizers):
            set_rate(optimizer, share)
            loss = losses[number][chosen[1 - number]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        steps += 1

    def predicted(x: Tensor) -> Tensor:
        return (probabilities(networks[0], x) + probabilities(networks[1], x)) / 2

    suspicion = suspicion_of(predicted(doubtful.x), doubtful.y)
    accuracy = share_right(predicted(scaled(draw.whole.test)), draw)
    return {"test_accuracy": accuracy, "auc": draw.auc(suspicion), "steps": steps}


# ----------------------------------------------------------------------------------------- cleanlab

FOLDS = 4
# What runs in the interpreter that has cleanlab. Its file has labels and probabilities.
CLEANLAB = """
import json, sys
import cleanlab, numpy
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
arrays = numpy.load(sys.argv[1])
labels, predicted = arrays["labels"], arrays["predicted"]
is_issue = find_label_issues(labels, predicted, n_jobs=1)
quality = get_label_quality_scores(labels, predicted)
print(json.dumps([cleanlab.__version__, is_issue.tolist(), quality.tolist()]))
"""


def by_cleanlab(draw: Draw, seconds: float, python: Path) -> Row:
    """Remove what cleanlab calls issues, and train on the others.

    Half of the time goes to networks that do not learn the pictures that they predict, one for each
    fold, and all of them learn the clean ones. cleanlab's own seconds, in another process, are not
    counted.

    Source: Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels" (JAIR
    2021).
    """
    doubtful, clean = doubtful_and_clean(draw)
    fold_of_picture = folds_by_class(doubtful.y)
    predicted = torch.zeros(len(doubtful.y), len(CLASSES))
    steps = 0
    for fold in range(FOLDS):
        is_predicted = fold_of_picture == fold
        learned = doubtful.select(~is_predicted) + clean
        network, fold_steps = train(learned, cross_entropies, 0.5 * seconds / FOLDS)
        predicted[is_predicted] = probabilities(network, doubtful.x[is_predicted])
        steps += fold_steps
    version, is_issue, quality = ask_cleanlab(doubtful.y, predicted, python)
    others = doubtful.select(~torch.tensor(is_issue)) + clean
    network, last_steps = train(others, cross_entropies, 0.5 * seconds)
    return {
        "test_accuracy": tested(network, draw),
        "auc": draw.auc(-np.array(quality)),
        "steps": steps + last_steps,
        "removed": sum(is_issue),
        "cleanlab": version,
    }


def folds_by_class(labels: Tensor) -> Tensor:
    """Return a fold for each picture, (n,), each class shared evenly."""
    order = torch.randperm(len(labels))
    by_class = order[labels[order].argsort(stable=True)]
    fold_of_picture = torch.empty(len(labels), dtype=torch.int64)
    fold_of_picture[by_class] = torch.arange(len(labels)) % FOLDS
    return fold_of_picture


def ask_cleanlab(
    labels: Tensor, predicted: Tensor, python: Path
) -> tuple[str, list[bool], list[float]]:
    """Return cleanlab's version, which labels it calls issues, and the quality of each label."""
    expected = "expected an interpreter that has cleanlab, which `pip install cleanlab` installs."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arrays.npz"
        np.savez(file, labels=labels.numpy(), predicted=predicted.double().numpy())
        words = [str(python), "-c", CLEANLAB, str(file)]
        try:
            ended = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise MetaplError(f"--cleanlab-python {python}: {error}; {expected}") from error
    if ended.returncode:
        lines = ended.stderr.splitlines() or ["it said nothing"]
        raise MetaplError(f"--cleanlab-python {python}: {lines[-1]}; {expected}")
    version, is_issue, quality = json.loads(ended.stdout.splitlines()[-1])
    return version, is_issue, quality


# ------------------------------------------------------------------------------------------- metapl


def by_noisy(draw: Draw, seconds: float, seed: int, *, name: str, settings: Row) -> Row:
    """Run `metapl train noisy` at its defaults, with as many steps as fit into the seconds.

    ``test_accuracy`` is that of the network that the run delivers, and ``auc`` that of its list.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw.write(root)
        begin = time.process_time()
        result = noisy_run(root, name, {"seed": seed, "minutes": seconds / 60, **settings})
        lists = suspects_of(root / "run" / "suspects.csv")
    row: Row = {
        "test_accuracy": result[f"{result['delivered']}_test_accuracy"],
        "auc": draw.auc(rising(lists["number"])),
        "steps": result["steps"],
        # Which method the default has taken.
        "method": result["method"],
        "processor_seconds": round(time.process_time() - begin, 1),
        "delivered": result["delivered"],
        "student_test_accuracy": result["student_test_accuracy"],
    }
    if "weight" in lists:
        weights = np.empty(len(draw.pictures))
        weights[lists["number"].astype(np.int64)] = lists["weight"]
        row["auc_by_weight"] = draw.auc(-weights)
    return row


def noisy_run(root: Path, name: str, settings: Row) -> Row:
    """Train on the folders of ROOT, into ROOT/run; return the result, with the steps."""
    config = Noisy(
        labeled=str(root / "labeled"),
        clean=str(root / "clean"),
        test=str(root / "test") if (root / "test").exists() else None,
    )
    config, method = choose_settings(
        with_flags(config, **settings),
        METHODS[name],
        say=lambda text: None,
        clock=time.process_time,
    )
    result = Job(config, method, root / "run", resume=False, threads=1).run()
    return {**result, "steps": config.fitting.chosen_steps}


def suspects_of(file: Path) -> dict[str, np.ndarray]:
    """Return the columns of a list, with the positions of the pictures as ``number``."""
    with file.open(newline="") as lines:
        rows = [*csv.DictReader(lines)]
    columns: dict[str, np.ndarray] = {
        "number": np.array([int(Path(row["file"]).stem) for row in rows])
    }
    for name in ("weight", "score", "loss", "p_given"):
        if name in rows[0]:
            columns[name] = np.array([float(row[name]) for row in rows])
    return columns


def rising(numbers: np.ndarray) -> np.ndarray:
    """Return the suspicion of each picture where the first of a list is the most suspicious."""
    suspicion = np.empty(len(numbers))
    suspicion[numbers] = -np.arange(len(numbers))
    return suspicion


def by_attribution(draw: Draw, seed: int, *, settings: Row) -> Row:
    """Run `metapl attribute` at its default steps, judged by the clean pictures.

    The folder that it asks for is that of a run of three steps: of a run it takes the pictures and
    the network's architecture, and no weights. It delivers no network, so it has no accuracy.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw.write(root)
        few = {"seed": seed, "steps": 3, "finetune_steps": 1, **settings}
        noisy_run(root, "plain", few)
        begin = time.process_time()
        words = ["attribute", str(root / "run"), "--out", str(root / "which"), "--removals", "0"]
        if settings:
            words += ["--steps", "4"]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            assert command(words) == 0
        seconds = time.process_time() - begin
        lists = suspects_of(root / "which" / "attribution.csv")
    losses = np.empty(len(draw.pictures))
    losses[lists["number"]] = lists["loss"]
    return {
        "auc": draw.auc(rising(lists["number"])),
        "auc_by_loss": draw.auc(losses),
        "processor_seconds": round(seconds, 1),
    }


def by_sklearn(draw: Draw, seed: int, seconds: float | None) -> Row:
    """Fit ``metapl.sklearn``'s classifier for wrong labels, which is told the clean rows.

    Args:
        seconds: None: at the defaults, a perceptron on the pixels. Otherwise the network is the
            script's, with as many steps as fit into the seconds by a first fit.
    """
    from metapl.sklearn import MetaReweightedClassifier

    x = pixels(np.concatenate([draw.pictures, draw.clean]))
    y = np.concatenate([draw.given_labels, draw.clean_labels])
    is_trusted = np.arange(len(y)) >= len(draw.pictures)
    model = MetaReweightedClassifier(random_state=seed)
    if seconds is not None:
        clock = Clock(seconds)
        model.set_params(network=convolutions_of_columns, steps=SKLEARN_PROBE)
        # The first fit has what is done but once; the second one shows what steps take.
        model.fit(x, y, trusted=is_trusted)
        first_share = clock.share
        model.fit(x, y, trusted=is_trusted)
        share_per_step = (clock.share - first_share) / SKLEARN_PROBE
        model.set_params(steps=max(1, int((1 - clock.share) / share_per_step)))
    model.fit(x, y, trusted=is_trusted)
    predicted = torch.from_numpy(model.predict_proba(pixels(draw.pictures)))
    suspicion = suspicion_of(predicted, torch.from_numpy(draw.given_labels))
    is_right = model.predict(pixels(draw.whole.test)) == draw.whole.test_labels
    return {
        "test_accuracy": float(is_right.mean()),
        "auc": draw.auc(-model.weights_[~is_trusted]),
        "auc_by_loss": draw.auc(suspicion),
        "steps": model.steps,
    }


SKLEARN_PROBE = 10


def pixels(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1) / 255


def convolutions_of_columns(columns: int, classes: int) -> nn.Module:
    side = math.isqrt(columns)
    return nn.Sequential(nn.Unflatten(1, (1, side, side)), convolutions(classes))


# ----------------------------------------------------------------------------------------- the rows

OURS = "`train noisy`, the default"
WEIGHTS = "`train noisy`, example_weights"
TRANSITION = "`train noisy`, noise_transition"
NOISY_PLAIN = "`train noisy`, plain"
SKLEARN = "`metapl.sklearn`, its defaults"
SKLEARN_CONVOLUTIONS = "`metapl.sklearn`, convolutions"
ATTRIBUTE = "`metapl attribute`"
PLAIN = "script, plain"
FINETUNED = "script, plain, then clean"
CLEAN = "script, clean alone"
GCE = "script, GCE"
COTEACHING = "script, co-teaching"
CLEAN_LAB = "script, cleanlab"
ARMS = (
    OURS,
    SKLEARN,
    PLAIN,
    COTEACHING,
    CLEAN_LAB,
    GCE,
    ATTRIBUTE,
    CLEAN,
    FINETUNED,
    NOISY_PLAIN,
    WEIGHTS,
    TRANSITION,
    SKLEARN_CONVOLUTIONS,
)


def run(
    kind: Literal["symmetric", "pairs"],
    share: float,
    seed: int,
    arm: str,
    seconds: float,
    *,
    source: str,
    size: Size,
    cleanlab_python: Path | None,
    settings: Row,
    whole: PictureSet | None = None,
) -> Row:
    """Run one arm on one draw; return a row with its accuracy and its AUC.

    Args:
        seconds: of processor time.
        settings: of the recipe, beside its defaults.
        whole: the set; None: Fashion-MNIST of the source.
    """
    torch.set_num_threads(1)
    if whole is None:
        whole = set_of("fashion", source)
    draw = Draw.from_seed(whole, Condition(kind, share), seed, size)
    torch.manual_seed(seed)
    begin = time.process_time()
    row = run_arm(arm, draw, seed, seconds, cleanlab_python=cleanlab_python, settings=settings)
    return {
        "processor_seconds": round(time.process_time() - begin, 1),
        **row,
        "wrong": int(draw.is_wrong.sum()),
        "pictures": len(draw.pictures),
        "clean": len(draw.clean),
        "tested_on": len(whole.test_labels),
        "processor_capability": torch.backends.cpu.get_cpu_capability(),
        "made_with": environment(),
    }


def run_arm(
    arm: str,
    draw: Draw,
    seed: int,
    seconds: float,
    *,
    cleanlab_python: Path | None,
    settings: Row,
) -> Row:
    """Return what an arm reaches; where a row has processor seconds, they are its training's."""
    if arm == OURS:
        return by_noisy(draw, seconds, seed, name="auto", settings=settings)
    if arm == WEIGHTS:
        return by_noisy(draw, seconds, seed, name="example_weights", settings=settings)
    if arm == TRANSITION:
        return by_noisy(draw, seconds, seed, name="noise_transition", settings=settings)
    if arm == NOISY_PLAIN:
        return by_noisy(draw, seconds, seed, name="plain", settings=settings)
    if arm == SKLEARN:
        return by_sklearn(draw, seed, seconds=None)
    if arm == SKLEARN_CONVOLUTIONS:
        return by_sklearn(draw, seed, seconds)
    if arm == ATTRIBUTE:
        return by_attribution(draw, seed, settings=settings)
    if arm == PLAIN:
        return by_script(draw, seconds)
    if arm == FINETUNED:
        return by_finetuning(draw, seconds)
    if arm == CLEAN:
        return by_clean_pictures(draw, seconds)
    if arm == GCE:
        return by_script(draw, seconds, losses=generalized_cross_entropies)
    if arm == COTEACHING:
        return by_coteaching(draw, seconds)
    assert arm == CLEAN_LAB
    assert cleanlab_python is not None, "the jobs leave it out without an interpreter"
    return by_cleanlab(draw, seconds, cleanlab_python)


def jobs(
    conditions: Sequence[Condition], arms: Sequence[str], seeds: int, seconds: float
) -> Iterator[Row]:
    """Yield what is run: all of the first seed before the second one."""
    for seed in range(seeds):
        for condition in conditions:
            for arm in arms:
                yield {**vars(condition), "seed": seed, "arm": arm, "seconds": seconds}


# --------------------------------------------------------------------------------------- the tables


def table(rows: list[Row]) -> str:
    """Return for each way of being wrong what each arm reaches, and what ours is ahead by.

    Only arms of the same time are compared. A difference is paired by seed, in points, with its
    95 % interval where there are several.
    """
    lines = []
    budgets = sorted({row["seconds"] for row in rows})
    for condition, seconds in itertools.product(CONDITIONS, budgets):
        by_arm: dict[str, dict[int, Row]] = {}
        for row in rows:
            is_of_condition = (row["kind"], row["share"]) == (condition.kind, condition.share)
            if is_of_condition and row["seconds"] == seconds:
                by_arm.setdefault(row["arm"], {})[row["seed"]] = row
        ours = by_arm.get(OURS, {})
        for arm in ARMS:
            if arm not in by_arm:
                continue
            by_seed = by_arm[arm]
            cells: list[Any] = [condition.title, f"{seconds:g}", arm, len(by_seed)]
            for column, form in (("test_accuracy", ".1f"), ("auc", ".3f")):
                cells += cells_of(column, form, by_seed, {} if arm == OURS else ours)
            spent = [row["processor_seconds"] for row in by_seed.values()]
            lines.append([*cells, f"{sum(spent) / len(spent):.0f}"])
    head = [
        "wrong labels",
        "seconds",
        "arm",
        "seeds",
        "test, %",
        "the default minus it",
        "AUC",
        "the default minus it",
        "seconds taken",
    ]
    return grid(head, lines, "lrlrrrrrr")


def cells_of(
    column: str, form: str, by_seed: Mapping[int, Row], ours: Mapping[int, Row]
) -> list[str]:
    """Return the mean of a column, and the mean difference of ours to it over common seeds."""
    scale = 100 if column == "test_accuracy" else 1
    values = [scale * row[column] for row in by_seed.values() if column in row]
    if not values:
        return [NONE, NONE]
    ahead = NONE
    common_seeds = sorted(by_seed.keys() & ours.keys())
    if common_seeds:
        ahead = interval(
            [scale * ours[seed][column] for seed in common_seeds],
            [scale * by_seed[seed][column] for seed in common_seeds],
            form=f"+{form}",
        )
    return [f"{sum(values) / len(values):{form}}", ahead]


# ------------------------------------------------------------------------ the set's doubtful labels

DOUBTS_SIZE = Size(doubtful=6_000, clean_per_class=30)
SHEET_SIDE = 10


def find_doubts(whole: PictureSet, seconds: float, size: Size, settings: Row) -> Row:
    """Train on pictures with the set's own labels; return the first of the list of suspects."""
    torch.set_num_threads(1)
    draw = Draw.from_seed(whole, None, seed=0, size=size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw.write(root)
        begin = time.process_time()
        fixed = {"seed": 0, "minutes": seconds / 60, **settings}
        result = noisy_run(root, "example_weights", fixed)
        spent = time.process_time() - begin
        with (root / "run" / "suspects.csv").open(newline="") as lines:
            suspects = [*csv.DictReader(lines)]
    doubts = []
    for rank, suspect in enumerate(suspects[: SHEET_SIDE**2], 1):
        doubt = {
            "rank": rank,
            "number": int(draw.numbers[int(Path(suspect["file"]).stem)]),
            "given": suspect["given"],
            "proposed": suspect["probably"],
            "p_given": float(suspect["p_given"]),
        }
        doubts.append(doubt)
    others = sum(suspect["probably"] != suspect["given"] for suspect in suspects)
    return {
        "pictures": len(draw.pictures),
        "clean": len(draw.clean),
        "steps": result["steps"],
        "processor_seconds": round(spent, 1),
        "processor_capability": torch.backends.cpu.get_cpu_capability(),
        "test_accuracy": result[f"{result['delivered']}_test_accuracy"],
        "another_class_more_probable": others,
        "made_with": environment(),
        "doubts": doubts,
    }


# In pixels of the sheet: a cell, and a picture of 28 x 28 three times as large in it.
CELL_WIDTH = 100
CELL_HEIGHT = 114
LARGE_SIDE = 84


def draw_sheet(whole: PictureSet, doubts: Sequence[Row], file: Path) -> None:
    """Draw the doubtful pictures, beneath each its given and its proposed class."""
    width = SHEET_SIDE * CELL_WIDTH
    sheet = Image.new("L", (width, SHEET_SIDE * CELL_HEIGHT), 255)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for doubt in doubts:
        row, column = divmod(doubt["rank"] - 1, SHEET_SIDE)
        left = column * CELL_WIDTH
        top = row * CELL_HEIGHT
        picture = Image.fromarray(whole.training[doubt["number"]])
        # Light things on black are printed as dark things on white.
        picture = picture.point(lambda level: 255 - level)
        picture = picture.resize((LARGE_SIDE, LARGE_SIDE), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (CELL_WIDTH - LARGE_SIDE) // 2, top))
        pen.text((left + 3, top + LARGE_SIDE), f"{doubt['rank']} {doubt['given']}", 0, font)
        pen.text((left + 3, top + LARGE_SIDE + 14), f"? {doubt['proposed']}", 0, font)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Sixteen levels of grey are enough to look at, and a quarter of the size.
    sheet.quantize(16).save(file, optimize=True)


# ---------------------------------------------------------------------------------------- the words


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--source", default=DEBIAN, metavar="DIR", help="Fashion-MNIST's four files"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--seeds", type=int, default=3, help="so many")
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time, an arm")
    parser.add_argument(
        "--cleanlab-python", type=Path, metavar="FILE", help="an interpreter that has cleanlab"
    )
    parser.add_argument("--doubts", action="store_true", help="list the set's doubtful labels")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw them there, as PNG")
    options = parsed(parser)
    if options.doubts:
        doubts(options)
        return
    if options.runs:
        measure(options)
    show(options.write, "wrong_labels", table(read(options.out, having="arm")))


def measure(options: Any) -> None:
    """Run what the options ask for and no row has."""
    arms = [name for name in ARMS if name in options.arms]
    if options.cleanlab_python is None and CLEAN_LAB in arms:
        arms.remove(CLEAN_LAB)
        print("without --cleanlab-python there is no row of cleanlab", file=sys.stderr)
    fixed: Row = {
        "source": options.source,
        "cleanlab_python": options.cleanlab_python,
        "size": Size(),
        "settings": {},
    }
    wanted = jobs(CONDITIONS, arms, options.seeds, options.seconds)
    if options.miniature:
        wanted = jobs(CONDITIONS[:1], arms, seeds=1, seconds=1.0)
        fixed |= MINIATURE
    go_on(options.out, wanted, partial(run, **fixed))


def doubts(options: Any) -> None:
    """Find the doubtful labels where no file has them, and draw them."""
    file = DOUBTS if options.out == RAW else options.out
    whole = set_of("fashion", options.source)
    if options.runs and not file.exists():
        write_json(file, find_doubts(whole, 2 * options.seconds, DOUBTS_SIZE, settings={}))
    if options.sheet is not None:
        draw_sheet(whole, loaded(file)["doubts"], options.sheet)


MINIATURE: Row = {
    "size": Size(doubtful=60, clean_per_class=2),
    "settings": {"steps": 6, "finetune_steps": 2, "image_size": 8, "network": "small_cnn"},
}


if __name__ == "__main__":
    main()
