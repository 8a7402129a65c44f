"""Rate the training data of a language model: which sequences are worth a step?

    python examples/data_rater.py [SEED ...] [--steps N] [--hf]

The training text has three sources: the documentation of PyTorch's functions (half of it), the
source of Python's standard library (a quarter), and documentation whose characters are shuffled (a
quarter). A rater scores sequences of characters. It is told no source, and learns from what two
steps on the sequences, weighted by its scores, do to the loss on other documentation. Two students
of different age take turns, and the older one is replaced now and then, so that the scores fit no
single phase of a training. Then new models are trained, all on as many characters.

Two minutes of one core. ``--hf`` takes GPT-2's architecture, with random weights, from
transformers.
"""

import argparse
import inspect
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import metapl
from metapl.problems import DataRater, Table

# Characters of a sequence, and different ones; sequences of a batch.
LENGTH = 48
WORDS = 96
WIDTH = 48
BATCH = 32
SOURCES = "documentation", "source code", "shuffled"
# The steps of a look-ahead.
AHEAD = 2
# After so many look-aheads a student is replaced.
RENEWED = 40


class Rater(Table):
    """Scores (B,): the mean of those of neighbouring characters, one for each pair of them."""

    def forward(self, ids):
        return 10 * super().forward(WORDS * ids[:, :-1] + ids[:, 1:]).mean(1)


class Transformer(nn.Module):
    """Logits (B, T, words) of the next characters."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, WORDS)
        self.register_buffer(
            "later", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False
        )

    def forward(self, ids):
        return self.head(
            self.layers(self.embed(ids) + self.places.weight, mask=self.later, is_causal=True)
        )


def new_student(hf):
    student = Transformer()
    if hf:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {
            "vocab_size": WORDS,
            "n_positions": LENGTH,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
        }
        student = metapl.models.Logits(
            GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
        )
    return student, torch.optim.AdamW(student.parameters(), lr=3e-3)


def sequences(text):
    """Return sequences (N, T): printable characters by number, any other as a space."""
    ids = torch.tensor(list(text.encode("ascii", "replace"))) - 32
    return ids.where((ids >= 0) & (ids < WORDS), 0)[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


class Data:
    """Batches of the mixture and of documentation, held-out documentation for rater and test."""

    def __init__(self, seed):
        self.draw = torch.Generator().manual_seed(seed)
        named = [
            v
            for m in (torch, nn, F, torch.optim, torch.linalg)
            for _, v in inspect.getmembers(m, callable)
        ]
        documentation = sequences(
            "\n".join(dict.fromkeys(filter(None, map(inspect.getdoc, named))))
        ).unique(dim=0)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
        self.code = sequences("\n".join(file.read_text(errors="replace") for file in files))
        shuffled = documentation[torch.randperm(len(documentation), generator=self.draw)]
        self.test = shuffled[:500]
        self.outer = shuffled[500:2500]
        self.clean = shuffled[2500:]

    def some(self, pool, count):
        return pool[torch.randint(len(pool), (count,), generator=self.draw)]

    def mixture(self, count):
        """Return sequences, and the number of the source of each."""
        source = torch.tensor([0, 0, 1, 2])[torch.randint(4, (count,), generator=self.draw)]
        ids = torch.where(
            (source == 1)[:, None], self.some(self.code, count), self.some(self.clean, count)
        )
        shuffled = ids.gather(1, torch.rand(ids.shape, generator=self.draw).argsort(1))
        return torch.where((source == 2)[:, None], shuffled, ids), source


def learn_rater(rater, data, seed, steps, hf=False, rate=0.03):
    torch.manual_seed(seed)
    outer = torch.optim.Adam(rater.parameters(), lr=rate)
    trainers = []
    for step in range(steps):
        if len(trainers) < 2 or step % RENEWED == 0:
            student, optimizer = new_student(hf)
            trainer = metapl.BilevelTrainer(
                rater,
                student,
                "forward",
                problem=DataRater(),
                inner_optimizer=optimizer,
                outer_optimizer=outer,
            )
            trainers = [*trainers[-1:], trainer]
        inner = metapl.Lookahead([data.mixture(BATCH)[0] for _ in range(AHEAD)])
        trainers[step % len(trainers)].step(outer=data.some(data.outer, BATCH), inner=inner)


@torch.no_grad()
def scores_by_source(rater, data):
    """Return mean scores by source, and areas under documentation's curves against the others."""
    ids, source = data.mixture(2000)
    scores = [rater(ids)[source == number] for number in range(len(SOURCES))]
    means = [s.mean().item() for s in scores]
    areas = [(scores[0][:, None] > s).double().mean().item() for s in scores[1:]]
    return means, areas


def best_half(rater, data):
    """Return a batch: of twice as many sequences of the mixture those with the highest scores."""
    ids = data.mixture(2 * BATCH)[0]
    return ids[rater(ids).topk(BATCH).indices]


def perplexity(batch, data, seed, steps, hf=False):
    """Return a character's perplexity by a new model that learns from so many batches.

    The characters are those of held-out documentation.
    """

    def loss(ids):
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    data.draw.manual_seed(seed)
    torch.manual_seed(seed)
    model, optimizer = new_student(hf)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(batch()).backward()
        optimizer.step()
    model.eval()
    return loss(data.test).exp().item()


def main(seed, steps, hf):
    rater = Rater(torch.zeros(WORDS**2))
    data = Data(seed)
    learn_rater(rater, data, seed, steps, hf)
    scores, areas = scores_by_source(rater, data)
    print(
        f"seed {seed}: mean scores",
        ", ".join(f"{n} {s:+.2f}" for n, s in zip(SOURCES, scores, strict=True)),
    )
    print(
        f"  AUC of documentation against source code {areas[0]:.2f}, against shuffled "
        f"{areas[1]:.2f}"
    )
    learned = {
        "on everything": lambda: data.mixture(BATCH)[0],
        "rated": lambda: best_half(rater, data),
        "documentation alone": lambda: data.some(data.clean, BATCH),
    }
    reached = [
        f"{perplexity(batch, data, seed, 3 * steps, hf):.2f} {name}"
        for name, batch in learned.items()
    ]
    print("  perplexity:", ", ".join(reached))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument(
        "--steps", type=int, default=100, help="of the rater; a model takes three times as many"
    )
    parser.add_argument("--hf", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds:
        main(seed, args.steps, args.hf)
