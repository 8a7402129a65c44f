"""Meta Pseudo Labels as a LightningModule: python examples/with_lightning.py [FOLDER] [STEPS]

Kill it and give the same command again: it goes on from its last checkpoint in FOLDER
(runs/with-lightning), and ends bit for bit as one that was never stopped.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl.data import feed
from metapl.runs.checkpoint import rng_state, set_rng_state

try:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}; expected it to be installed: pip install '.[integrations]'"
    ) from None


class MetaPseudoLabels(L.LightningModule):
    def __init__(self, teacher: nn.Module, student: nn.Module, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.teacher = teacher
        self.student = student
        self.steps = steps
        self.resumed: dict[str, Any] = {}

    def configure_optimizers(self) -> Any:
        inner = torch.optim.SGD(self.student.parameters(), lr=0.2, momentum=0.9, nesterov=True)
        outer = torch.optim.AdamW(self.teacher.parameters(), lr=3e-3)
        return [inner, outer], [
            CosineAnnealingLR(optimizer, self.steps) for optimizer in (inner, outer)
        ]

    def on_train_start(self) -> None:
        # The networks are on their device by now.
        inner, outer = (wrapper.optimizer for wrapper in self.optimizers())
        self.bilevel = metapl.BilevelTrainer(
            self.teacher,
            self.student,
            "forward",
            inner_optimizer=inner,
            outer_optimizer=outer,
        )
        if self.resumed:
            self.bilevel.load_state_dict(self.resumed["bilevel"])
            # This comes last, for nothing may draw after it.
            set_rng_state(self.resumed["rng"])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        labeled, x_u = batch
        strong = x_u + 0.2 * torch.randn_like(x_u)
        report = self.bilevel.step(outer=labeled, inner=(x_u, strong))
        # Moves nothing, for the gradients are None by now: Lightning counts it as a step.
        self.optimizers()[0].step()
        for rate in self.lr_schedulers():
            rate.step()
        self.log_dict(report.as_dict())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.student(x).argmax(1) == y).float().mean(), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["metapl"] = {"bilevel": self.bilevel.state_dict(), "rng": rng_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint["metapl"]


class Batches:
    """Labeled and unlabeled batches, which know where they are.

    Lightning saves what has a ``state_dict``.
    """

    def __init__(self, steps: int, **loaders: Any) -> None:
        self.feeds = {name: feed(loader, name=name, stop=steps) for name, loader in loaders.items()}
        self.steps = steps

    # Of an epoch; without it Lightning would fetch a batch ahead, and save its position.
    def __len__(
        self,
    ) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield [source.next() for source in self.feeds.values()]

    def state_dict(self) -> dict[str, Any]:
        return {name: source.state() for name, source in self.feeds.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, source in self.feeds.items():
            source.restore(state[name])


def train(
    out: Path, steps: int, save_every: int = 50, **options: Any
) -> tuple[L.Trainer, MetaPseudoLabels]:
    L.seed_everything(0)
    x = torch.tensor(load_digits().data / 16).float()
    y = torch.tensor(load_digits().target)
    batches = Batches(
        steps,
        labeled=DataLoader(TensorDataset(x[:100], y[:100]), batch_size=50, shuffle=True),
        unlabeled=DataLoader(x[100:1300], batch_size=100, shuffle=True),
    )
    validation = DataLoader(TensorDataset(x[1300:1500], y[1300:1500]), batch_size=200)
    module = MetaPseudoLabels(
        *(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
            for _ in range(2)
        ),
        steps,
    )
    checkpoints = ModelCheckpoint(out, save_last=True, every_n_train_steps=save_every)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=min(save_every, steps),
        callbacks=[checkpoints],
        default_root_dir=out,
        enable_progress_bar=False,
        **options,
    )
    last = out / "last.ckpt"
    trainer.fit(
        module, batches, validation, ckpt_path=last if last.exists() else None, weights_only=True
    )
    return trainer, module


if __name__ == "__main__":
    folder, steps = [*sys.argv[1:], *["runs/with-lightning", "300"][len(sys.argv) - 1 :]]
    trainer, _ = train(Path(folder), int(steps))
    print(
        f"{trainer.global_step} steps, validation accuracy "
        f"{100 * trainer.callback_metrics['accuracy']:.1f} %"
    )
