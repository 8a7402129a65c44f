"""Five small classification problems, few labels: digits twice, clothes, docstrings and a table.

Each draws its labeled, unlabeled and test examples anew for a seed, and makes its networks. The
digits and the table are scikit-learn's. The clothes are Fashion-MNIST, whose four files Debian's
package ``dataset-fashion-mnist`` holds; the texts are docstrings of installed packages. Both are
read from a folder of small files that :func:`prepare` writes once.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import itertools
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.models import mlp

# ----------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Sizes:
    """How many examples a problem draws for a seed."""

    labeled: int
    unlabeled: int
    test: int


@dataclass(frozen=True)
class Examples:
    """All examples of a problem.

    ``test_pool`` has those that may only be tested on, None where there is one pool.
    """

    inputs: Tensor
    labels: Tensor
    test_pool: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Split:
    """The examples of one seed. Nothing reads the labels of the unlabeled ones."""

    labeled_inputs: Tensor
    labels: Tensor
    unlabeled_inputs: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    def chance(self) -> float:
        """Return the share of the most frequent class among the test examples."""
        counts = self.test_labels.bincount()
        return float(counts.max()) / len(self.test_labels)


@dataclass(frozen=True)
class Problem:
    """A problem: how many examples it draws, where all come from, and a network for them."""

    title: str
    sizes: Sizes
    examples: Callable[[Path, bool], Examples]
    network: Callable[[], nn.Module]

    def split(self, seed: int, data: Path, miniature: bool = False) -> Split:
        """Draw the examples of a seed, the same number of labels from each class."""
        examples = self.examples(data, miniature)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(examples.labels), generator=generator)
        labeled_rows = rows_of_each_class(order, examples.labels, self.sizes.labeled)
        other_rows = order[~torch.isin(order, labeled_rows)]
        unlabeled_rows = other_rows[: self.sizes.unlabeled]
        test_rows = other_rows[self.sizes.unlabeled :][: self.sizes.test]
        test_inputs = examples.inputs[test_rows]
        test_labels = examples.labels[test_rows]
        if examples.test_pool is not None:
            pool_inputs, pool_labels = examples.test_pool
            rows = torch.randperm(len(pool_labels), generator=generator)[: self.sizes.test]
            test_inputs = pool_inputs[rows]
            test_labels = pool_labels[rows]
        return Split(
            labeled_inputs=examples.inputs[labeled_rows],
            labels=examples.labels[labeled_rows],
            unlabeled_inputs=examples.inputs[unlabeled_rows],
            test_inputs=test_inputs,
            test_labels=test_labels,
        )


def rows_of_each_class(order: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the first rows of each class in this order, ``count`` in all.

    The first classes have one more.
    """
    classes = int(labels.max()) + 1
    rows = []
    for label in range(classes):
        share = count // classes + int(label < count % classes)
        rows.append(order[labels[order] == label][:share])
    return torch.cat(rows)


# ------------------------------------------------------------------------------- digits and a table


@lru_cache(maxsize=1)
def digits(data: Path, miniature: bool) -> Examples:
    """Return scikit-learn's 1,797 digits as (1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
    return Examples(inputs=inputs, labels=torch.tensor(bunch.target))


@lru_cache(maxsize=1)
def tumors(data: Path, miniature: bool) -> Examples:
    """Return the breast cancer table's 569 rows, each of its 30 columns at mean 0, deviation 1."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    columns = torch.tensor(bunch.data, dtype=torch.float32)
    inputs = (columns - columns.mean(0)) / columns.std(0)
    return Examples(inputs=inputs, labels=torch.tensor(bunch.target))


def digits_mlp() -> nn.Module:
    return mlp([64, 64, 10])


def digits_convolutions() -> nn.Module:
    """Return two convolutions of 8 and 16 channels, each with a pooling, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def table_network() -> nn.Module:
    return mlp([30, 32, 2])


# ------------------------------------------------------------------------------------------ clothes

FASHION_FILE = "fashion_14.npz"
FASHION_POOL = 8000
"""Training pictures that the cached file keeps: the seeds draw theirs from these."""


def idx_pictures(file: Path) -> np.ndarray:
    """Read pictures (n, 28, 28) of a gzipped IDX file.

    Four big-endian numbers, then a byte a pixel.
    """
    content = gzip.decompress(file.read_bytes())
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(-1, 28, 28)


def idx_labels(file: Path) -> np.ndarray:
    """Read labels (n,) of a gzipped IDX file: two big-endian numbers, then a byte a label."""
    return np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8, offset=8)


def halved(pictures: np.ndarray) -> np.ndarray:
    """Average pictures (n, 28, 28) over 2 x 2 pixels, as bytes (n, 14, 14)."""
    means = pictures.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    return means.round().astype(np.uint8)


def prepare_fashion(source: Path, data: Path) -> None:
    """Write the cached file from the folder that holds the four files of Fashion-MNIST."""
    np.savez_compressed(
        data / FASHION_FILE,
        pictures=halved(idx_pictures(source / "train-images-idx3-ubyte.gz")[:FASHION_POOL]),
        labels=idx_labels(source / "train-labels-idx1-ubyte.gz")[:FASHION_POOL],
        test_pictures=halved(idx_pictures(source / "t10k-images-idx3-ubyte.gz")),
        test_labels=idx_labels(source / "t10k-labels-idx1-ubyte.gz"),
    )


@lru_cache(maxsize=1)
def clothes(data: Path, miniature: bool) -> Examples:
    """Return pictures of Fashion-MNIST as (1, 14, 14) in [0, 1]; in miniature, padded digits."""
    if miniature:
        small = digits(data, miniature)
        inputs = F.pad(small.inputs, [3, 3, 3, 3])
        return Examples(inputs=inputs, labels=small.labels, test_pool=(inputs, small.labels))
    with np.load(cached(data / FASHION_FILE)) as arrays:
        inputs = torch.tensor(arrays["pictures"])[:, None] / 255
        labels = torch.tensor(arrays["labels"]).long()
        test_inputs = torch.tensor(arrays["test_pictures"])[:, None] / 255
        test_labels = torch.tensor(arrays["test_labels"]).long()
    return Examples(inputs=inputs, labels=labels, test_pool=(test_inputs, test_labels))


def clothes_convolutions() -> nn.Module:
    """Return three convolutions of 8, 16 and 32 channels with batch norm, a mean, a linear layer.

    The mean is over the positions.
    """
    layers: list[nn.Module] = []
    for channels_in, channels_out in itertools.pairwise((1, 8, 16, 32)):
        layers.append(nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(channels_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


# -------------------------------------------------------------------------------------------- texts

TEXT_FILE = "docstrings.npz"
PACKAGES = ("torch/distributed", "scipy", "matplotlib", "python")
NAMES = {
    "torch",
    "pytorch",
    "numpy",
    "np",
    "scipy",
    "matplotlib",
    "matplotlibrc",
    "mpl",
    "pyplot",
    "plt",
}
NAMES |= {"sklearn", "scikit", "python", "cpython"}
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "externals",
    "site-packages",
    "idlelib",
    "lib2to3",
}
SKIPPED_FOLDERS |= {"ensurepip"}
TEXTS_PER_CLASS = 800
TEXTS_PER_FILE = 16
WORDS_PER_TEXT = 48
VOCABULARY = 2000
UNKNOWN_WORD = 0


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Yield files and their docstrings, in an order of the hashes of the files' names."""
    top, _, folder = package.partition("/")
    root = Path(sysconfig.get_paths()["stdlib"])
    if top != "python":
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            raise SystemExit(
                f"the package {top} is not installed; its docstrings are one of the four classes"
            )
        root = Path(spec.origin).parent / folder
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if SKIPPED_FOLDERS & set(name.split("/")):
            continue
        with suppress(SyntaxError):
            for node in ast.walk(ast.parse((root / name).read_text(errors="ignore"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    docstring = ast.get_docstring(node)
                    if docstring is not None:
                        yield name, docstring


def texts_of(package: str, count: int) -> list[list[str]]:
    """Return the first words of so many docstrings, in small letters, without packages' names.

    None begins as another one, and no file gives more than :data:`TEXTS_PER_FILE`.
    """
    texts: list[list[str]] = []
    beginnings = set[str]()
    from_file = Counter[str]()
    for file, docstring in docstrings(package):
        words = [
            word
            for word in re.findall(r"[a-z]+|\d|[^\w\s]", docstring.lower())
            if word not in NAMES
        ]
        beginning = " ".join(words[:16])
        if (
            len(words) < WORDS_PER_TEXT
            or beginning in beginnings
            or from_file[file] == TEXTS_PER_FILE
        ):
            continue
        beginnings.add(beginning)
        from_file[file] += 1
        texts.append(words[:WORDS_PER_TEXT])
        if len(texts) == count:
            break
    return texts


def prepare_texts(data: Path) -> None:
    """Write the cached file from the installed packages.

    The words' numbers (n, 48) and the packages' numbers (n,).
    """
    texts: list[list[str]] = []
    labels: list[int] = []
    for label, package in enumerate(PACKAGES):
        of_package = texts_of(package, TEXTS_PER_CLASS)
        texts += of_package
        labels += [label] * len(of_package)
    counts = Counter(word for words in texts for word in words)
    numbers = {word: 1 + rank for rank, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}
    ids = [[numbers.get(word, UNKNOWN_WORD) for word in words] for words in texts]
    np.savez_compressed(
        data / TEXT_FILE, ids=np.array(ids, dtype=np.int16), labels=np.array(labels, dtype=np.int8)
    )


@lru_cache(maxsize=1)
def texts(data: Path, miniature: bool) -> Examples:
    """Return docstrings as numbers of words (48,).

    In miniature, pixels of digits in their place.
    """
    if miniature:
        small = digits(data, miniature)
        ids = (16 * small.inputs.flatten(1)).long()[:, :WORDS_PER_TEXT]
        labels = small.labels % len(PACKAGES)
        return Examples(inputs=ids, labels=labels, test_pool=(ids, labels))
    with np.load(cached(data / TEXT_FILE)) as arrays:
        return Examples(
            inputs=torch.tensor(arrays["ids"]).long(), labels=torch.tensor(arrays["labels"]).long()
        )


class MeanOfWords(nn.Module):
    """The mean of the words' vectors, layer norm, a hidden layer and the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 32)
        self.head = nn.Sequential(
            nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, len(PACKAGES))
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, 4) of texts (B, 48)."""
        logits: Tensor = self.head(self.words(ids).mean(1))
        return logits


# ----------------------------------------------------------------------------------------- all five

PROBLEMS: dict[str, Problem] = {
    "digits_mlp": Problem("digits, an MLP", Sizes(128, 1200, 469), digits, digits_mlp),
    "digits_conv": Problem(
        "digits, convolutions", Sizes(128, 1200, 469), digits, digits_convolutions
    ),
    "fashion": Problem(
        "Fashion-MNIST, convolutions", Sizes(400, 3600, 2000), clothes, clothes_convolutions
    ),
    "text": Problem("docstrings, mean of words", Sizes(400, 1800, 1000), texts, MeanOfWords),
    "table": Problem("breast cancer, an MLP", Sizes(30, 380, 159), tumors, table_network),
}


def cached(file: Path) -> Path:
    """Return the file, or end in a line that says how it is made."""
    if not file.exists():
        raise SystemExit(
            f"{file} is missing; make it by --prepare FOLDER, the folder of Fashion-MNIST's four "
            "files"
        )
    return file


def prepare(fashion_source: Path, data: Path) -> None:
    """Write the cached files of clothes and texts."""
    data.mkdir(parents=True, exist_ok=True)
    prepare_fashion(fashion_source, data)
    prepare_texts(data)
