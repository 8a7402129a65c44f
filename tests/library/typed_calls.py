"""Calls as a type checker sees them; `make test` checks this file with the package.

Each ignored error is one that has to be found: mypy refuses an ignore that nothing needs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import metapl


class Weighted(metapl.problems.BilevelProblem):
    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        label = teacher(batch).softmax(1)
        return metapl.Signal({"weight": label[:, 0], "label": label})

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        return signal["weight"] * nn.functional.cross_entropy(
            outputs, signal["label"], reduction="none"
        )

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class Unfinished:
    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher(batch))


class Norm:
    name = "norm"

    def __call__(self, teacher: nn.Module, *, outer: Any, **_: Any) -> Tensor:
        return teacher(outer[0]).norm()  # type: ignore[no-any-return]


def error(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    return float((outputs.argmax(1) != batch[1]).float().mean())


def built(teacher: nn.Module, student: nn.Module) -> None:
    metapl.BilevelTrainer(teacher, student, mode="forward")
    metapl.BilevelTrainer(teacher, student, mode=metapl.feedback.Forward(truncate=2))
    for mode in metapl.MODES:
        metapl.BilevelTrainer(teacher, student, mode=mode)
    metapl.BilevelTrainer(teacher, student, mode="foward")  # type: ignore[arg-type]
    batches: dict[str, Any] = {"outer": 0, "inner": 0}
    metapl.hypergradient(teacher, student, **batches, inner_optimizer=0, mode="foward")  # type: ignore[arg-type]
    metapl.BilevelTrainer(teacher, student, problem=Weighted(), teacher_losses=[Norm()])
    metapl.BilevelTrainer(teacher, student, problem=Weighted)  # type: ignore[arg-type]
    metapl.BilevelTrainer(teacher, student, problem=Unfinished())  # type: ignore[arg-type]
    metapl.BilevelTrainer(teacher, student, teacher_losses=Norm())  # type: ignore[arg-type]
    metapl.BilevelTrainer(teacher, student, precision="bf16")  # type: ignore[arg-type]
    metapl.BilevelTrainer(teacher, student, inner_optimiser=None)  # type: ignore[call-arg]


def fitted(trainer: metapl.BilevelTrainer) -> None:
    trainer.fit([], steps=3, validate_every=2, batch_size=4, metric="loss")
    trainer.fit([], steps=3, validate_every=2)
    trainer.fit([], steps="3")  # type: ignore[arg-type]
    trainer.fit([], steps=3, metric_mode="best")  # type: ignore[arg-type]
    trainer.fit([], steps=3, metric=error, metric_mode="min")
    trainer.fit([], steps=3, metric="acuracy")  # type: ignore[arg-type]
    trainer.fit([], steps=3, metric=lambda outputs: 0.0)  # type: ignore[arg-type]
    trainer.fit(
        [],
        steps=3,
        schedule="constant",
        warmup=1,
        wait=0,
        first_steps=None,
        ema_decay=0.9,
        phase="first",
    )
    trainer.fit([])  # type: ignore[call-arg]
    trainer.fit([], steps=3, checkpoint_every=2)  # type: ignore[call-arg]
    trainer.fit([], steps=3, save_every="2")  # type: ignore[arg-type]
    trainer.fit([], steps=3, schedule="quadratic")  # type: ignore[arg-type]
    trainer.finetune([], steps=3, validation=None, resume=True, log_every=1)
    trainer.finetune([])  # type: ignore[call-arg]
    trainer.finetune([], steps=3, checkpoint_every=2)  # type: ignore[call-arg]
    trainer.finetune([], steps=3, batch_size="4")  # type: ignore[arg-type]
    print(trainer.evaluate([]).value, trainer.evaluate([], metric="loss").value)
    print(
        trainer.evaluate([], metric="accuracy").accuracy,
        trainer.evaluate([], classes=["a", "b"]).confusion,
    )


def fitted_alone(trainer: metapl.LossTrainer) -> None:
    trainer.fit([], steps=3, validate_every=2, callbacks=[lambda step, row, trainer: None])
    trainer.fit([])  # type: ignore[call-arg]
    trainer.fit([], steps=3, checkpoint_every=2)  # type: ignore[call-arg]


def looked_up(trainer: metapl.BilevelTrainer) -> None:
    print(
        metapl.ablate(trainer, [], []).table(),
        metapl.data.without_labels([]),
        metapl.metrics.Measured,
    )
    metapl.ablate(trainer, [], [], step=3)  # type: ignore[call-arg]
    print(metapl.BilevelTrainr)  # type: ignore[attr-defined]
    print(metapl.data.without_label)  # type: ignore[attr-defined]
    print(metapl.models.mpl)  # type: ignore[attr-defined]
    print(metapl.metrics.Mesured)  # type: ignore[attr-defined]
