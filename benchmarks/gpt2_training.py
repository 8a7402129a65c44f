"""What each sequence did to a GPT-2 of 124 million weights, through its whole training.

    python benchmarks/gpt2_training.py --device cuda     # a minute and a half; make gpu has it too
    python benchmarks/gpt2_training.py --write docs/studies/whole-training-costs.md

The network is GPT-2's smallest, with random weights: 12 layers of 768, 12 heads, 50,257 words, and
the head tied to the embedding. The text is Python's own documentation, the docstrings of the
standard library, in words; every tenth file is held out. It is trained by 200 steps of AdamW on 8
sequences of 256 words, with weights in float32 and passes in bfloat16, and ``metapl.attribute``
says what each sequence did to the loss on the files that were held out. The states before every
fourth step lie on the host, and the steps of one block of four on the card.

The rows, in this order: plain steps, by torch.optim in a loop; a tenth of the training; the whole
training; a tenth in float32, and the rank correlation of its scores with those in bfloat16; and
plain trainings without a twentieth of the sequences, the most helpful, the most harmful and any,
whose change of the loss the scores predict. What does not fit into the seconds that are left is not
begun. Where the whole training does not fit, it has fewer steps; each row says how many it has.
"""

from __future__ import annotations

import ast
import math
import re
import resource
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import harness
import torch
from harness import RESULTS, Row, append, grid, loaded, read, show
from modes import Place
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.errors import MetaplError
from metapl.feedback import Forward
from metapl.problems import NextToken

RAW = RESULTS / "gpt2_training.jsonl"
SECONDS = 90.0
"""How long all rows together may take."""

# -------------------------------------------------------------------------------------- the network


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.perceptron_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        # (B, heads, T, width / heads)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.hidden(self.perceptron_norm(x)), approximate="tanh")
        return x + self.perceptron_out(hidden)


class GPT2(nn.Module):
    """GPT-2 without dropout: word ids (B, T) to logits (B, T, words). Its smallest is the default.

    The head has the weights of the embedding.
    """

    def __init__(
        self,
        words: int = 50_257,
        positions: int = 1_024,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(initialize)
        for block in self.blocks:
            # So that the sum over the blocks has the size of one.
            for layer in (block.attention_out, block.perceptron_out):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.words.weight)


def initialize(layer: nn.Module) -> None:
    """Give a layer GPT-2's initial weights."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        nn.init.normal_(layer.weight, std=0.02)
    if isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.bias)


# ----------------------------------------------------------------------------------------- the text

# Not documentation that a reader of the library sees.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
UNKNOWN = 0


def documentation(files: int | None = None) -> list[str]:
    """Return the docstrings of the standard library, one text for each file that has any.

    Args:
        files: how many of the files are read, in the order of their names; None: all.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in sorted(folder.rglob("*.py"))
        if not LEFT_OUT & {*path.relative_to(folder).parts}
    ]
    texts: list[str] = []
    for path in paths[:files]:
        with warnings.catch_warnings():
            # Of old escapes in their strings.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [
            ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)
        ]
        text = "\n\n".join(string for string in strings if string)
        if text:
            texts.append(text)
    if not texts:
        raise MetaplError(
            f"{folder} has no docstrings; expected the standard library's sources, as Python "
            "without -OO and with its files installs them."
        )
    return texts


def pieces(text: str) -> list[str]:
    """Return the words and signs of a text, each with the space before it, and other blanks.

    >>> pieces("a b, c\\n  d")
    ['a', ' b', ',', ' c', '\\n ', ' d']
    """
    return re.findall(r" ?\w+| ?[^\w\s]|\s+(?=\s)|\s", text)


@dataclass(frozen=True)
class Text:
    """Sequences of word ids to train on, (N, T), and those of files that were held out, (M, T).

    A word that is not among the most frequent ones has the number 0.
    """

    training: Tensor
    held_out: Tensor

    @classmethod
    def from_files(cls, texts: Sequence[str], *, words: int, length: int, held_out: int) -> Text:
        """Return the sequences of some texts, every tenth of which is held out.

        Args:
            words: the most words that are told apart, with the unknown one.
            length: T.
            held_out: M, at most.
        """
        pieces_of_files = [pieces(text) for text in texts]
        counts = Counter(piece for file in pieces_of_files for piece in file)
        frequent = [piece for piece, _ in counts.most_common(words - 1)]
        numbers = {piece: number for number, piece in enumerate(frequent, start=UNKNOWN + 1)}

        def sequences(files: Sequence[Sequence[str]]) -> Tensor:
            ids = [numbers.get(piece, UNKNOWN) for file in files for piece in file]
            whole = len(ids) // length * length
            return torch.tensor(ids[:whole]).view(-1, length)

        others = [file for number, file in enumerate(pieces_of_files) if number % 10 != 9]
        return cls(sequences(others), sequences(pieces_of_files[9::10])[:held_out])


# ------------------------------------------------------------------------------------- the training


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network, its text and its training; by default those of the page.

    Args:
        network: the arguments of :class:`GPT2`.
        length: words of a sequence.
        held_out: sequences that the trained network is judged on.
        warmup: steps in which the rate rises; it falls to 0 at the last one.
        eps: AdamW's, above its usual 1e-8, with which derivatives through a training predict less.
        keep_every: the states before so many steps are kept on the host.
        files: of the standard library; None: all.
    """

    network: dict[str, int]
    length: int = 256
    batch_size: int = 8
    held_out: int = 8
    steps: int = 200
    warmup: int = 20
    rate: float = 3e-4
    eps: float = 1e-6
    keep_every: int = 4
    files: int | None = None

    @property
    def words(self) -> int:
        return self.network.get("words", 50_257)


PAGE = Setting(network={})
MINIATURE = Setting(
    network={"words": 200, "positions": 16, "width": 16, "depth": 2, "heads": 2},
    length=8,
    batch_size=4,
    held_out=3,
    steps=20,
    warmup=2,
    keep_every=4,
    files=20,
)


class Measurement:
    """The training of a setting on a device, and what is measured of it."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.setting = setting
        self.device = device
        torch.manual_seed(0)
        self.network = GPT2(**setting.network).to(device)

    @cached_property
    def text(self) -> Text:
        setting = self.setting
        return Text.from_files(
            documentation(setting.files),
            words=setting.words,
            length=setting.length,
            held_out=setting.held_out,
        )

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            network.parameters(),
            lr=self.setting.rate,
            betas=(0.9, 0.95),
            eps=self.setting.eps,
            weight_decay=0.1,
        )

    def share_of_rate(self, step: int, steps: int) -> float:
        """Return the rate of a step over the greatest one: it rises, and falls to 0."""
        warmup = max(1, self.setting.warmup * steps // self.setting.steps)
        return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))

    def attribute(self, steps: int, precision: str) -> tuple[metapl.Attribution, Row]:
        """Return the scores of a training of so many steps, and what they took.

        Seconds are those of the whole call, with the look at the first steps' smoothness that it
        takes from 100 steps on. Bytes of the card are beyond the weights.
        """
        text = self.text
        self.reset_peak()
        with Place(self.device, precision).active(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            began = time.perf_counter()
            optimizer = self.optimizer(self.network)
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: self.share_of_rate(step, steps)
            )
            attribution = metapl.attribute(
                self.network,
                (text.training, text.training),
                (text.held_out, text.held_out),
                optimizer=optimizer,
                steps=steps,
                batch_size=self.setting.batch_size,
                settings=metapl.scheduled_settings(scheduler, steps),
                problem=NextToken(),
                mode=Forward(keep_every=self.setting.keep_every, keep_on="cpu"),
                smoothing=0.0,
                progress=False,
            )
            self.synchronize()
            seconds = time.perf_counter() - began
        row: Row = {
            "seconds": seconds,
            "ms_a_step": 1e3 * seconds / steps,
            "outer_loss": float(attribution.outer_loss),
            "score_of_mean_size": float(attribution.scores.abs().mean()),
            "examples": len(attribution.scores),
            "replay_error": attribution.replay_error,
            "kept": attribution.kept,
            "warned": [str(entry.message) for entry in caught],
            **self.peak(),
        }
        return attribution, row

    def plain_steps(self, steps: int, precision: str) -> Row:
        """Measure steps of a plain training, by torch.optim in a loop."""
        network = GPT2(**self.setting.network).to(self.device)
        optimizer = self.optimizer(network)
        batch = self.text.training[: self.setting.batch_size].to(self.device)

        def take_step() -> None:
            optimizer.zero_grad()
            logits = network(batch).float()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()

        self.reset_peak()
        place = Place(self.device, precision)
        # The first steps choose kernels.
        with place.active():
            take_step()
            take_step()
            self.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                take_step()
            self.synchronize()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "ms_a_step": 1e3 * seconds / steps, **self.peak()}

    def removals(self, attribution: metapl.Attribution, precision: str, most: int) -> Iterator[Row]:
        """Train without a twentieth of the sequences, and compare with what was predicted.

        Yields: a row for the most helpful ones, the most harmful ones and any, of those that the
        training has seen, ``most`` of these at most.
        """
        trained_on = attribution.order.unique()
        count = max(1, len(trained_on) // 20)
        helpful_first = trained_on[attribution.scores.cpu()[trained_on].argsort(descending=True)]
        order = torch.randperm(len(trained_on), generator=torch.Generator().manual_seed(0))
        sets = {
            "the most helpful": helpful_first[:count],
            "the most harmful": helpful_first[-count:],
            "any": trained_on[order[:count]],
        }
        names = [*sets][:most]
        began = time.perf_counter()
        with Place(self.device, precision).active():
            changes = attribution.validate(
                [sets[name] for name in names], at_once=1, progress=False
            )
        seconds = (time.perf_counter() - began) / len(names)
        for number, name in enumerate(names):
            yield {
                "seconds": seconds,
                "without": name,
                "removed": count,
                "predicted": float(changes.predicted[number]),
                "retrained": float(changes.retrained[number]),
            }

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Row:
        """Return the most memory so far, in bytes: of the process on the host, and of the card."""
        row: Row = {"host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        if self.device == "cuda":
            row["device_bytes"] = torch.cuda.max_memory_allocated()
        return row


def rows(
    done: Sequence[Row], *, device: str, seconds: float = SECONDS, is_small: bool = False
) -> Iterator[list[Row]]:
    """Yield the rows one by one, without those that are done.

    Scores are not stored, so that what compares them is measured together.
    """
    end = time.perf_counter() + seconds
    setting = MINIATURE if is_small else PAGE
    names = {row["what"] for row in done}
    tenth = setting.steps // 10
    measurement = Measurement(setting, device)

    def seconds_left() -> float:
        return end - time.perf_counter()

    def row_of(what: str, steps: int, precision: str, measured: Row) -> list[Row]:
        count = sum(p.numel() for p in measurement.network.parameters())
        about: Row = {"what": what, "steps": steps, "precision": precision, "weights": count}
        about |= {"batch_size": setting.batch_size, "length": setting.length, "device": device}
        return [{**about, **measured, "measured_on": harness.environment()}]

    plain = next((row for row in done if row["what"] == "plain"), None)
    if plain is None:
        (plain,) = row_of("plain", tenth, "bf16", measurement.plain_steps(tenth, "bf16"))
        yield [plain]
    in_bf16: metapl.Attribution | None = None
    if not {"a tenth", "whole", "a tenth in float32"} <= names:
        # The first call loads kernels, and its time is none of a step's.
        measurement.attribute(2, "bf16")
        in_bf16, measured = measurement.attribute(tenth, "bf16")
        seconds_of_tenth = measured["seconds"]
        if "a tenth" not in names:
            yield row_of("a tenth", tenth, "bf16", measured)
    whole: metapl.Attribution | None = None
    if "whole" not in names:
        steps = setting.steps
        if not is_small:
            # The look at the first steps' smoothness takes some more.
            fitting = int(seconds_left() / (1.2 * seconds_of_tenth / tenth)) // 10 * 10
            steps = min(steps, fitting)
        if steps < tenth:
            raise RuntimeError(f"{seconds:.0f} seconds are too few for {tenth} steps")
        whole, measured = measurement.attribute(steps, "bf16")
        yield row_of("whole", steps, "bf16", measured)
    # The products of float32 take several times those of bfloat16, of which a step is a part.
    if in_bf16 is not None and (is_small or seconds_left() > 4 * seconds_of_tenth):
        in_float32, measured = measurement.attribute(tenth, "float32")
        measured |= agreement(in_bf16.scores, in_float32.scores, in_bf16.order)
        yield row_of("a tenth in float32", tenth, "float32", measured)
    if whole is not None:
        # The loop that trains again takes its steps by metapl's rule, which is slower.
        seconds_of_training = 1.5 * steps * plain["ms_a_step"] / 1e3
        most = 3 if is_small else int(seconds_left() / seconds_of_training)
        # Of one there is no correlation.
        if most >= 2:
            for measured in measurement.removals(whole, "bf16", most=most):
                yield row_of("removal", steps, "bf16", measured)


def agreement(first: Tensor, second: Tensor, order: Tensor) -> Row:
    """Return the rank correlation of two lists of scores, of the examples that steps have drawn."""
    from scipy import stats

    trained_on = order.unique()
    pair = [scores.cpu()[trained_on].numpy() for scores in (first, second)]
    return {"spearman": float(stats.spearmanr(*pair).statistic)}


# ------------------------------------------------------------------------------------------- tables

NAMES = {
    "plain": "plain steps, by torch.optim in a loop",
    "a tenth": "attribution of a tenth of the steps",
    "whole": "attribution of the whole training",
    "a tenth in float32": "attribution of a tenth, in float32",
    "removal": "plain training without some sequences",
}


def remark(row: Row) -> str:
    """Return what a row says beside time and memory."""
    if "spearman" in row:
        return f"rank correlation of the scores with those in bfloat16 {row['spearman']:.2f}"
    if "removed" in row:
        without = f"without {row['without']} {row['removed']}"
        return f"{without}: loss {row['retrained']:+.4f}, predicted {row['predicted']:+.4f}"
    if "outer_loss" in row:
        loss = f"loss on the files held out {row['outer_loss']:.2f}"
        return f"kept: {row['kept']}; {loss}" if "kept" in row else loss
    return ""


def in_words(row: Row) -> str:
    """Return steps, time and memory of a row in words."""
    words = f"{row['steps']} steps, {row['precision']}: {row['seconds']:.1f} s"
    for name, place in (("device_bytes", "card"), ("host_bytes", "host")):
        if name in row:
            words += f", {row[name] / 1e9:.1f} GB of the {place}"
    return words


def line(row: Row) -> list[str]:
    """Return the cells of a row of the table."""
    ms = f"{row['ms_a_step']:.0f}" if "ms_a_step" in row else ""
    on_card = f"{row['device_bytes'] / 1e9:.1f}" if "device_bytes" in row else ""
    on_host = f"{row['host_bytes'] / 1e9:.1f}" if "host_bytes" in row else ""
    cells = [NAMES[row["what"]], f"{row['steps']}", row["precision"], f"{row['seconds']:.1f}"]
    return [*cells, ms, on_card, on_host, remark(row)]


def table(measured: list[Row]) -> str:
    head = [
        "what",
        "steps",
        "passes in",
        "seconds",
        "ms a step",
        "GB of the card",
        "GB of the host",
    ]
    return grid([*head, ""], [line(row) for row in measured], "lrlrrrrl")


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all rows together")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="append the rows that make gpu left; runs nothing"
    )
    options = harness.parsed(parser)
    if options.add is not None:
        append(options.out, *loaded(options.add))
    elif options.runs:
        device = "cpu" if options.miniature else options.device
        done = read(options.out, having="what")
        small: dict[str, Any] = {"seconds": options.seconds, "is_small": options.miniature}
        for new in rows(done, device=device, **small):
            append(options.out, *new)
    show(options.write, "gpt2_training", table(read(options.out, having="what")))


if __name__ == "__main__":
    main()
