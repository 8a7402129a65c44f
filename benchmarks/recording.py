"""What it costs a loop to be recorded, and to be attributed from the recording.

    python benchmarks/recording.py         # three loops; that of transformers where it is installed
    python benchmarks/recording.py --write docs/studies/whole-training-costs.md

Processor time on one thread. A plain training and a recorded one take turns, and a row has one of
each, with the seconds of the first step apart: there the data are read once, and the loss and the
gradient are compared. Then the recording is attributed. Rows that are there are not repeated.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Row, arguments, environment, go_on, grid, parsed, read, show
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import metapl
from metapl.problems import EqualWeights, NextToken

RAW = RESULTS / "recording.jsonl"
EXAMPLES = Path(__file__).parents[1] / "examples"
TITLES = {
    "mlp": "digits, perceptron 64-256-10, batch 100, SGD",
    "conv": "digits, three convolutions of 64 channels, batch 32, AdamW",
    "gpt2": "`transformers.Trainer`, GPT-2 of 0.8 million weights, 2 × 4 sequences of 64, AdamW",
}
STEPS = {"mlp": 1000, "conv": 200, "gpt2": 100}


class Loop:
    """A training of somebody else, which has been prepared and not begun.

    Attributes:
        model: what is trained.
        train: its examples.
        outer: clean ones.
        run: trains.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        outer: Any,
        problem: EqualWeights,
        run: Callable[[], Any],
    ) -> None:
        self.model = model
        self.train = train
        self.outer = outer
        self.problem = problem
        self.run = run


def loop_of(name: str, steps: int, folder: str) -> Loop:
    torch.manual_seed(0)
    if name == "gpt2":
        return loop_of_transformers(steps, folder)
    data = load_digits()
    x = torch.tensor(data.data).float() / 16
    y = torch.tensor(data.target)
    if name == "conv":
        x = x.view(-1, 1, 8, 8)
        model = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, 10),
        )
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-4)
        batch_size = 32
    else:
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        batch_size = 100
    train = x[:1000], y[:1000]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*train), batch_size=batch_size, shuffle=True, drop_last=True
    )

    def run() -> None:
        done = 0
        while True:
            for inputs, labels in loader:
                if done == steps:
                    return
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                done += 1

    return Loop(model, train, (x[1000:], y[1000:]), EqualWeights(), run)


def loop_of_transformers(steps: int, folder: str) -> Loop:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    sys.path.insert(0, str(EXAMPLES))
    from record_a_trainer import docstrings

    length = 64
    text = docstrings()
    pieces = text[: 320 * length].view(320, length)
    config = GPT2Config(
        vocab_size=256,
        n_positions=length,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config)
    options = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        adam_epsilon=1e-2,
        warmup_steps=steps // 10,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in pieces[:288]]
    trainer = Trainer(model=model, args=options, train_dataset=rows)
    outer = {"input_ids": pieces[288:], "labels": pieces[288:]}
    return Loop(model, rows, outer, NextToken(), trainer.train)


def seconds(run: Callable[[], Any]) -> float:
    gc.collect()
    # The order of the examples, and dropout, are the same in each training.
    torch.manual_seed(1)
    start = time.process_time()
    run()
    return time.process_time() - start


def recorded(loop: Loop, folder: str) -> tuple[float, metapl.Recording]:
    """Return the seconds of a recorded training, and its recording."""
    recordings: list[metapl.Recording] = []

    def run() -> None:
        out = Path(folder) / "recording"
        with metapl.record(loop.model, out=out, problem=loop.problem, train=loop.train) as opened:
            loop.run()
        recordings.append(opened)

    return seconds(run), recordings[0]


def measured(loop: str, steps: int, repeat: int) -> Row:
    """Return the seconds of a plain training and a recorded one, and of the attribution."""
    with tempfile.TemporaryDirectory() as warm:
        # What is loaded at a first call is not timed.
        recorded(loop_of(loop, 2, warm), warm)
    with tempfile.TemporaryDirectory() as folder:
        base = loop_of(loop, steps, folder)
        followed = loop_of(loop, steps, folder)
        one = loop_of(loop, 1, folder)
        begun, _ = recorded(one, f"{folder}/one")
        plain_of_one = seconds(loop_of(loop, 1, folder).run)
        if repeat % 2:
            seconds_recorded, recording = recorded(followed, folder)
            seconds_plain = seconds(base.run)
        else:
            seconds_plain = seconds(base.run)
            seconds_recorded, recording = recorded(followed, folder)
        written = sum(file.stat().st_size for file in Path(folder, "recording").glob("*.ckpt"))
        same = all(
            p.equal(q)
            for p, q in zip(base.model.parameters(), followed.model.parameters(), strict=True)
        )
        row: Row = {
            "plain_seconds": seconds_plain,
            "recorded_seconds": seconds_recorded,
            "first_step_seconds": begun - plain_of_one,
            "has_same_bits": same,
            "bytes": written,
        }
        if repeat == 0:
            attributions: list[Any] = []
            row["attribute_seconds"] = seconds(
                lambda: attributions.append(
                    recording.attribute(followed.outer, smoothing=0.0, progress=False)
                )
            )
            row["replay_error"] = attributions[0].replay_error
    return {"cpu": environment()["processor"], **row}


def table(rows: list[Row]) -> str:
    lines = []
    for name, title in TITLES.items():
        of_loop = [row for row in rows if row["loop"] == name]
        if not of_loop:
            continue
        steps = of_loop[0]["steps"]
        plain = statistics.median(row["plain_seconds"] for row in of_loop)
        # The two of a row ran one after the other, so that the machine was as busy for both.
        shares = sorted(
            (row["recorded_seconds"] - row["first_step_seconds"]) / row["plain_seconds"] - 1
            for row in of_loop
        )
        share = f"{100 * statistics.median(shares):.1f} %"
        if shares[1:]:
            share += f" ({100 * shares[0]:.1f} to {100 * shares[-1]:.1f})"
        first = statistics.median(row["first_step_seconds"] for row in of_loop)
        attributed = [row for row in of_loop if "attribute_seconds" in row]
        lines.append(
            [
                title,
                f"{steps:,}",
                f"{1000 * plain / steps:.3g} ms",
                share,
                f"{first:.2f} s",
                f"{attributed[0]['attribute_seconds'] / attributed[0]['plain_seconds']:.1f}",
                f"{attributed[0]['replay_error']:.0e}",
                f"{of_loop[0]['bytes'] / 1e6:,.0f}",
            ]
        )
    head = ["loop", "steps", "a step", "recorded", "once", "attribute", "replay error", "MB"]
    return grid(head, lines)


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    torch.set_num_threads(1)
    loops = [*TITLES]
    if importlib.util.find_spec("transformers") is None:
        loops.remove("gpt2")
    jobs = []
    for repeat in range(1 if args.miniature else 3):
        for name in loops:
            jobs.append(
                {"loop": name, "steps": 4 if args.miniature else STEPS[name], "repeat": repeat}
            )
    if args.runs:
        go_on(args.out, jobs, measured, machine=environment())
    show(args.write, "recording", table(read(args.out, "loop")))


if __name__ == "__main__":
    main()
