"""A small BERT from few labeled texts and many unlabeled ones.

    python examples/text.py [--steps 300] [--seeds 0]

Which package is a docstring from? The texts are those of installed packages, whose names are
masked; 16 of each have their label. The network is transformers' BertForSequenceClassification with
new weights, on batches that are dicts, as tokenizers give them. Printed is the test accuracy of
four ways to train it; what to expect is in docs/text.md.
"""

import argparse
import ast
import importlib.util
import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl.models import Logits

try:
    from transformers import BertConfig, BertForSequenceClassification
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}; expected it to be installed: pip install '.[integrations]'"
    ) from None

PACKAGES = "torch", "scipy", "matplotlib", "sklearn"
NAMES = {*PACKAGES, "pytorch", "numpy", "np", "mpl", "plt", "pyplot", "scikit"}
PAD = 0
MASK = 1
UNKNOWN = 2
WORDS = 2000
LENGTH = 32
WIDTH = 32
Text = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, (B, LENGTH)."""


def docstrings(package: str, files: int = 150) -> list[str]:
    """Return the docstrings of some files of a package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    paths = sorted(
        path for path in Path(spec.origin).parent.rglob("*.py") if "tests" not in path.parts
    )
    texts = []
    for path in random.Random(0).sample(paths, min(files, len(paths))):
        with suppress(SyntaxError):
            nodes = ast.walk(ast.parse(path.read_text(errors="ignore")))
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            for node in nodes:
                if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                    texts.append(text)
    return texts


def words_of(text: str) -> list[str]:
    return [
        "[mask]" if word in NAMES else word
        for word in re.findall(r"[a-z]+|\d|[^\w\s]", text.lower())
    ][:LENGTH]


def encoded(texts: list[list[str]], numbers: dict[str, int]) -> Text:
    """Return what a tokenizer gives, by the words' numbers."""
    rows = [[numbers.get(word, UNKNOWN) for word in words] for words in texts]
    ids = torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def corpus() -> dict[str, tuple[Text, Tensor]]:
    """Return texts and labels of each part: as many of each package, no two that begin alike."""
    of_package = []
    for package in PACKAGES:
        all_words = [words_of(text) for text in docstrings(package)]
        of_package.append([*{tuple(w[:8]): w for w in all_words if len(w) >= 12}.values()])
    size = min(map(len, of_package))
    ranges = {
        "validation": slice(0, size // 10),
        "test": slice(size // 10, size // 4),
        "training": slice(size // 4, size),
    }
    texts = {}
    for name, rows in ranges.items():
        texts[name] = [
            (words, label) for label, texts_of in enumerate(of_package) for words in texts_of[rows]
        ]
    counts = Counter(word for words, _ in texts["training"] for word in words if word != "[mask]")
    numbers = {"[mask]": MASK}
    for rank, (word, _) in enumerate(counts.most_common(WORDS)):
        numbers[word] = UNKNOWN + 1 + rank
    parts = {}
    for name, pairs in texts.items():
        labels = torch.tensor([label for _, label in pairs])
        parts[name] = encoded([words for words, _ in pairs], numbers), labels
    return parts


def word_vectors(ids: Tensor) -> Tensor:
    """Return vectors that say which words stand together, in the place of pretraining.

    They are found from the unlabeled texts.
    """
    holds = torch.zeros(len(ids), UNKNOWN + 1 + WORDS).scatter_(1, ids, 1.0)
    holds[:, : UNKNOWN + 1] = 0
    weighted = F.normalize(holds * (len(ids) / (1 + holds.sum(0))).log(), dim=1)
    _, size, direction = torch.svd_lowrank(weighted, WIDTH, niter=3)
    return F.normalize(direction * size, dim=1)


def network(vectors: Tensor) -> Logits:
    config = BertConfig(
        vocab_size=len(vectors),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        num_labels=len(PACKAGES),
    )
    bert = BertForSequenceClassification(config)
    bert.get_input_embeddings().weight.data.copy_(vectors)
    # The dict goes in as keyword arguments, and the tensor of logits comes out.
    return Logits(bert)


def masked(text: Text, share: float = 0.15) -> Text:
    """Return the strong view: this share of the words is masked."""
    ids = text["input_ids"]
    drop = (torch.rand(ids.shape) < share) & (ids != PAD)
    return {**text, "input_ids": ids.masked_fill(drop, MASK)}


def two_views(rows: list[tuple[Tensor, Tensor]]) -> tuple[Text, Text]:
    ids, mask = map(torch.stack, zip(*rows, strict=True))
    weak = {"input_ids": ids, "attention_mask": mask}
    return weak, masked(weak)


def accuracies(seed: int, steps: int, labels: int = 16) -> dict[str, float]:
    """Return the finetuned student's test accuracy, by the way to train it."""
    torch.manual_seed(seed)
    parts = corpus()
    text, y = parts["training"]
    few = torch.cat(
        [(y == c).nonzero()[:, 0][torch.randperm(int((y == c).sum()))[:labels]] for c in range(4)]
    )
    labeled = [({name: t[few] for name, t in text.items()}, y[few])]
    many = TensorDataset(text["input_ids"], text["attention_mask"])
    vectors = word_vectors(text["input_ids"])
    ways: dict[str, dict[str, Any]] = {
        "no feedback": {"mode": "none"},
        "feedback as it is": {"mode": "forward"},
        "feedback 0.1 of the teacher's losses": {"mode": "forward", "feedback_ratio": 0.1},
    }
    fit: dict[str, Any] = {
        "validation": parts["validation"],
        "validate_every": 25,
        "progress": False,
    }
    accuracy_of_way = {}
    for way, options in ways.items():
        torch.manual_seed(seed)
        teacher = network(vectors)
        student = network(vectors)
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            inner_optimizer=torch.optim.AdamW(student.parameters(), lr=1e-3),
            outer_optimizer=torch.optim.AdamW(teacher.parameters(), lr=1e-3),
            **options,
        )
        unlabeled = DataLoader(many, batch_size=64, shuffle=True, collate_fn=two_views)
        result = trainer.fit(labeled, unlabeled, steps=steps, log_every=10, **fit)
        if ratio := options.get("feedback_ratio"):
            weights = sorted(
                row["feedback_weight"] for row in result.history if "feedback_weight" in row
            )
            # The ratio that the feedback would have with the weight 1.
            as_it_is = ratio / weights[len(weights) // 2]
            print(
                f"seed {seed}: the feedback as it is, beside the teacher's losses: {as_it_is:.2g}"
            )
        trainer.finetune(
            labeled,
            steps=min(50, steps),
            optimizer=torch.optim.AdamW(student.parameters(), lr=1e-4),
            **fit,
        )
        accuracy_of_way[way] = trainer.evaluate(parts["test"]).accuracy
    torch.manual_seed(seed)
    alone = network(vectors)
    supervised = metapl.LossTrainer(alone, optimizer=torch.optim.AdamW(alone.parameters(), lr=1e-3))
    supervised.fit(labeled, steps=steps, **fit)
    return {"labels alone": supervised.evaluate(parts["test"]).accuracy, **accuracy_of_way}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    rows = [accuracies(seed, args.steps) for seed in args.seeds]
    for way in rows[0]:
        values = 100 * torch.tensor([row[way] for row in rows])
        print(
            f"{way:<38}{values.mean():5.1f} %" + (f" ± {values.std():.1f}" if len(rows) > 1 else "")
        )
