"""A training loop of one's own, which goes on where it was killed.

    python examples/own_loop.py [FOLDER] [STEPS]

Kill it, and give the same command again: it ends bit for bit as one that was never stopped. FOLDER
(runs/own-loop) gets its checkpoint and TensorBoard events.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import metapl
from metapl.data import feed
from metapl.runs.checkpoint import rng_state, set_rng_state


def train(out: Path, steps: int, save_every: int = 50, workers: int = 2) -> metapl.BilevelTrainer:
    # 1. Build everything, from the same seed in every life of the run.
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data / 16).float()
    y = torch.tensor(load_digits().target)
    few = DataLoader(TensorDataset(x[:100], y[:100]), batch_size=50, shuffle=True)
    many = DataLoader(x[100:1300], batch_size=100, shuffle=True, num_workers=workers)
    labeled = feed(few, name="labeled", stop=steps)
    unlabeled = feed(many, name="unlabeled", stop=steps)
    teacher, student = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
        for _ in range(2)
    )
    inner = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    outer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        inner_optimizer=inner,
        outer_optimizer=outer,
        precision="bfloat16",
    )
    rates = [CosineAnnealingLR(optimizer, steps) for optimizer in trainer.schedulable]

    # 2. Go on from the checkpoint, if there is one; the generators come last, for nothing may draw
    # after them.
    path = out / "checkpoint.pt"
    if path.exists():
        state = torch.load(path)
        trainer.load_state_dict(state["trainer"])
        for rate, saved in zip(rates, state["rates"], strict=True):
            rate.load_state_dict(saved)
        labeled.restore(state["labeled"])
        unlabeled.restore(state["unlabeled"])
        set_rng_state(state["rng"])

    # 3. Train.
    events = SummaryWriter(out, purge_step=trainer.steps_done)
    while trainer.steps_done < steps:
        x_u = unlabeled.next()
        strong = x_u + 0.2 * torch.randn_like(x_u)
        report = trainer.step(outer=labeled.next(), inner=(x_u, strong))
        for rate in rates:
            rate.step()
        done = trainer.steps_done
        if done % 10 == 0:
            for name, value in report.as_dict().items():
                events.add_scalar(name, value, done)
        if done % save_every == 0 or done == steps:
            accuracy = trainer.evaluate((x[1300:1500], y[1300:1500])).accuracy
            events.add_scalar("validation_accuracy", accuracy, done)
            events.flush()
            save(
                path,
                trainer=trainer.state_dict(),
                rates=[rate.state_dict() for rate in rates],
                labeled=labeled.state(),
                unlabeled=unlabeled.state(),
                rng=rng_state(),
            )
            print(f"step {done}: validation accuracy {100 * accuracy:.1f} %", flush=True)
    # The workers of its loader end here.
    unlabeled.close()
    events.close()
    return trainer


def save(path: Path, **state: Any) -> None:
    """Write all of it in one file, whole or not at all."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    if len(sys.argv) > 3 or any(word.startswith("-") for word in sys.argv[1:]):
        raise SystemExit(__doc__)
    folder, steps = [*sys.argv[1:], *["runs/own-loop", "300"][len(sys.argv) - 1 :]]
    train(Path(folder), int(steps))
