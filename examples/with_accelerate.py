"""Meta Pseudo Labels in a loop of Hugging Face's accelerate.

    python examples/with_accelerate.py [FOLDER] [STEPS]

In two processes, which share each batch and end with the same weights but for rounding (accelerate
launch --cpu starts one, whatever its --num_processes): torchrun --nproc-per-node 2
examples/with_accelerate.py [FOLDER] [STEPS]

Kill it and give the same command again: it goes on from its last checkpoint in FOLDER
(runs/with-accelerate).
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl.data import feed

try:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}; expected it to be installed: pip install '.[integrations]'"
    ) from None


def train(accelerator: Any, out: Path, steps: int, save_every: int = 50) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data / 16).float()
    y = torch.tensor(load_digits().target)
    views = TensorDataset(x[100:1300], x[100:1300] + 0.2 * torch.randn(1200, 64))
    few = DataLoader(
        TensorDataset(x[:100], y[:100]), batch_size=50, shuffle=True, generator=torch.Generator()
    )
    many = DataLoader(views, batch_size=100, shuffle=True, generator=torch.Generator())
    teacher, student = (metapl.models.mlp([64, 64, 10]) for _ in range(2))
    inner = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    outer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    rates = [CosineAnnealingLR(optimizer, steps) for optimizer in (inner, outer)]

    teacher, student, inner, outer, few, many, *rates = accelerator.prepare(
        teacher, student, inner, outer, few, many, *rates
    )
    # The trainer takes the optimizers out of accelerate's wrappers.
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        "forward",
        inner_optimizer=inner.optimizer,
        outer_optimizer=outer.optimizer,
    )
    labeled = feed(few, name="labeled", stop=steps)
    unlabeled = feed(many, name="unlabeled", stop=steps)

    feeds = [
        SimpleNamespace(
            state_dict=feed_of_batches.state,
            load_state_dict=feed_of_batches.restore,
        )
        for feed_of_batches in (labeled, unlabeled)
    ]
    accelerator.register_for_checkpointing(trainer, *feeds)
    if out.exists():
        accelerator.load_state(str(out))

    while trainer.steps_done < steps:
        report = trainer.step(outer=labeled.next(), inner=unlabeled.next())
        for rate in rates:
            rate.step()
        if trainer.steps_done % save_every == 0:
            accelerator.print(
                f"step {trainer.steps_done}: inner loss {report.inner_loss:.4f}", flush=True
            )
            accelerator.save_state(str(out))
    if accelerator.is_main_process:
        print(f"test accuracy {100 * trainer.evaluate((x[1500:], y[1500:])).accuracy:.1f} %")
    return trainer


if __name__ == "__main__":
    folder, steps = [*sys.argv[1:], *["runs/with-accelerate", "300"][len(sys.argv) - 1 :]]
    # The batch size is that of all processes together.
    loaders = DataLoaderConfiguration(split_batches=True)
    train(Accelerator(cpu=True, dataloader_config=loaders), Path(folder), int(steps))
