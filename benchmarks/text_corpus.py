"""Docstrings of installed packages as texts with four classes, small networks for them, and a look at their feedback.

The text is on every machine with the project's packages: 32 words of a docstring, of as many from each of four
packages, whose names are masked. Files, not texts, are split, and of texts that begin alike one is kept. The network is
``BertForSequenceClassification`` where transformers is installed, else one of its shape from ``torch.nn``. In the place
of pretraining, it begins with vectors of which words stand together in the unlabeled texts.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.models import Logits

PACKAGES = "torch/distributed", "scipy", "matplotlib", "python"
NAMES = {"torch", "pytorch", "numpy", "np", "scipy", "matplotlib", "matplotlibrc", "mpl", "pyplot", "plt"}
NAMES |= {"sklearn", "scikit", "python", "cpython"}
NO_DOCS = {"tests", "test", "testing", "_vendor", "externals", "site-packages", "idlelib", "lib2to3", "ensurepip"}
SPLIT = {"test": 250, "validation": 125, "training": 500}  # texts a class
OF_A_FILE, OF_A_DOCSTRING, LENGTH = 16, 2, 32  # texts at most; words a text
MASK, WORDS, SIZE = 0, 2000, 2201  # ids: the mask, the frequent words, and 200 hashes of the others
WIDTH, HEADS, LAYERS, LOOKS = 32, 2, 2, 4
MADE_BY = "torch.nn"
Row = dict[str, Any]
with suppress(PackageNotFoundError):
    MADE_BY = f"transformers {version('transformers')}"


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Files and docstrings, in an order of the files' hashes."""
    top, _, folder = package.partition("/")
    spec = None if top == "python" else importlib.util.find_spec(top)
    root = Path(sysconfig.get_paths()["stdlib"]) if spec is None or spec.origin is None else Path(spec.origin).parent
    root /= folder
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if not NO_DOCS & set(name.split("/")) and '"""' in (text := (root / name).read_text(errors="ignore")):
            with suppress(SyntaxError):
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (d := ast.get_docstring(node)):
                        yield name, d


def words_of(text: str) -> list[str]:
    """In small letters, without the names; digits and other signs one by one."""
    return ["[mask]" if word in NAMES else word for word in re.findall(r"[a-z]+|\d|[^\w\s]", text.lower())]


@lru_cache(maxsize=1)
def corpus(miniature: bool) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """(ids, labels) of each part, and a hash of all of it."""
    parts: dict[str, list[tuple[list[str], int]]] = {name: [] for name in SPLIT}
    seen = set[str]()
    for label, package in enumerate(PACKAGES):
        quotas = iter((name, size // 10 if miniature else size) for name, size in SPLIT.items())
        part, wanted = next(quotas)
        for _, found in itertools.groupby(docstrings(package), lambda pair: pair[0]):
            if not wanted:
                part, wanted = next(quotas, ("", 0))
            if not wanted:
                break
            taken = 0
            for _, docstring in found:
                words = words_of(docstring)
                for k in range(min(OF_A_DOCSTRING, len(words) // LENGTH)):
                    text = words[k * LENGTH : (k + 1) * LENGTH]
                    if min(wanted, OF_A_FILE - taken) > 0 and (start := " ".join(text[:16])) not in seen:
                        seen.add(start)
                        parts[part].append((text, label))
                        taken, wanted = taken + 1, wanted - 1
    counts = Counter(word for words, _ in parts["training"] for word in words if word != "[mask]")
    known = {"[mask]": MASK} | {word: 1 + i for i, (word, _) in enumerate(counts.most_common(WORDS))}

    def number(word: str) -> int:
        hashed = int(hashlib.sha256(word.encode()).hexdigest(), 16) % (SIZE - 1 - WORDS)
        return known.get(word, 1 + WORDS + hashed)

    coded = {
        name: (torch.tensor([[number(w) for w in words] for words, _ in part]), torch.tensor([y for _, y in part]))
        for name, part in parts.items()
    }
    return coded, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def word_vectors(miniature: bool) -> Tensor:
    """From a singular value decomposition of which unlabeled text has which words."""
    x = corpus(miniature)[0]["training"][0]
    holds = torch.zeros(len(x), SIZE).scatter_(1, x, 1.0)
    holds[:, MASK] = 0
    weighted = F.normalize(holds * (len(x) / (1 + holds.sum(0))).log(), dim=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, size, direction = torch.svd_lowrank(weighted, WIDTH, niter=3)
    return F.normalize(direction * size, dim=1)


class Encoder(nn.Module):
    """The shape of the BERT, from torch's own layers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(SIZE, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.last = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, len(PACKAGES)))

    def forward(self, ids: Tensor) -> Any:
        return self.last(self.layers(self.words(ids) + self.places.weight)[:, 0])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words


def network(dropout: float, vectors: Tensor) -> nn.Module:
    """One with new weights, but for the words' vectors."""
    found: Any = Encoder(dropout) if MADE_BY == "torch.nn" else None
    if found is None:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": SIZE, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
        sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": LENGTH}
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        found = BertForSequenceClassification(BertConfig(**sizes, **rates, num_labels=len(PACKAGES), pad_token_id=None))
    found.get_input_embeddings().weight.data.copy_(vectors)
    return Logits(found)


class Calm(nn.Module):
    """A student that drops nothing of an input in a dict, which is that of the outer pass of :class:`CalmOuter`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Any) -> Any:
        was = self.network.training
        self.network.train(was and isinstance(inputs, Tensor))
        try:
            return self.network(inputs if isinstance(inputs, Tensor) else inputs["input_ids"])
        finally:
            self.network.train(was)


class CalmOuter(metapl.PseudoLabels):
    def outer_input(self, batch: Any) -> Any:
        return {"input_ids": batch[0]}


VARIANTS: dict[str, tuple[str, dict[str, bool]]] = {
    "as it is": ("own", {}),
    "other labels in the outer batch": ("other", {}),
    "no dropout in the outer pass": ("own", {"calm": True}),
    "128 unlabeled texts a batch": ("own", {"large": True}),
    "a step of SGD": ("own", {"sgd": True}),
    "no dropout in the student": ("own", {"still": True}),
}


class Look:
    """The teacher's gradient by the feedback, for several unlabeled batches, as it is and with one thing changed: its
    size, squared signal to noise over batches and dropout masks, and its cosine with the gradient that held-out labels
    give, for the same batch and masks and without dropout in the outer pass. The outer batch has all labels."""

    def __init__(self, at: Sequence[int], batches: Sequence[Any], labeled: Row) -> None:
        self.at, self.labeled, self.found = at, labeled, dict[str, list[list[float]]]()
        large = [tuple(map(torch.cat, zip(*batches[k::LOOKS], strict=True))) for k in range(LOOKS)]
        self.batches = {True: large, False: batches[:LOOKS]}

    def __call__(self, step: int, row: Row, trainer: Any) -> None:
        if step not in self.at or trainer.mode.name == "none":
            return
        true = {}
        for name, (labels, how) in VARIANTS.items():
            own, same = self.gradients(trainer, labels, **how), (how.get("large"), how.get("sgd"), how.get("still"))
            if same not in true:
                true[same] = self.gradients(trainer, "held_out", **{**how, "calm": True})
            total = own.square().sum(1).mean()
            signal = (own.sum(0).square().sum() - LOOKS * total) / (LOOKS * (LOOKS - 1))
            cosine = F.cosine_similarity(own, true[same], dim=1).mean()
            values = total.sqrt(), signal / (total - signal).clamp_min(1e-30), cosine
            self.found.setdefault(name, []).append([float(f"{v:.3g}") for v in values])

    def gradients(
        self, trainer: Any, labels: str, calm: bool = False, large: bool = False, sgd: bool = False, still: bool = False
    ) -> Tensor:
        """(LOOKS, weights of the teacher)."""
        steps = torch.optim.SGD(trainer.student.parameters(), lr=0.05) if sgd else trainer.inner_optimizer
        problem, rows = CalmOuter() if calm else metapl.PseudoLabels(), []
        given = {"labeled": self.labeled[labels], "problem": problem, "inner_optimizer": steps}
        trainer.student.train(not still)
        for k, batch in enumerate(self.batches[large]):
            torch.manual_seed(k)
            grads = metapl.hypergradient(trainer.teacher, trainer.student, unlabeled=batch, **given).grads
            rows.append(torch.cat([g.flatten() for g in grads.values()]).double())
        trainer.student.train()
        return torch.stack(rows)
