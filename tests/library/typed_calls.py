"""Calls as a type checker sees them; `make test` checks this file with the package.

Each ignored error is one that has to be found: mypy refuses an ignore that nothing needs.
"""

from __future__ import annotations

from torch import nn

import metapl


def built(teacher: nn.Module, student: nn.Module) -> None:
    metapl.BilevelTrainer(teacher, student, mode="forward")
    metapl.BilevelTrainer(teacher, student, mode=metapl.feedback.Forward(truncate=2))
    for mode in metapl.MODES:
        metapl.BilevelTrainer(teacher, student, mode=mode)
    metapl.BilevelTrainer(teacher, student, mode="foward")  # type: ignore[arg-type]
    metapl.hypergradient(teacher, student, inner_optimizer=0, mode="foward")  # type: ignore[arg-type]


def fitted(trainer: metapl.BilevelTrainer) -> None:
    trainer.fit([], steps=3, validate_every=2, batch_size=4, metric="loss")
    trainer.fit([], steps=3, valdate_every=2)  # type: ignore[call-arg]
    trainer.fit([], steps=3, warmup="2")  # type: ignore[arg-type]
    trainer.fit([], steps=3, mode="best")  # type: ignore[arg-type]
    trainer.finetune([], steps=3, validation=None, resume=True, log_every=1)
    trainer.finetune([], steps=3, log_evry=1)  # type: ignore[call-arg]
    print(trainer.evaluate([]).value, trainer.evaluate([], metric="loss").value)
    print(trainer.evaluate([], metric="accuracy").accuracy, trainer.evaluate([], classes=["a", "b"]).confusion)
    print(trainer.evaluate([]).accuracy)  # type: ignore[union-attr]
    print(trainer.evaluate([], metric="loss").accuracy)  # type: ignore[attr-defined]


def looked_up(trainer: metapl.BilevelTrainer) -> None:
    print(metapl.ablate(trainer, [], []).table(), metapl.data.without_labels([]), metapl.metrics.Measured)
    metapl.ablate(trainer, [], [], step=3)  # type: ignore[call-arg]
    print(metapl.BilevelTrainr)  # type: ignore[attr-defined]
    print(metapl.data.without_label)  # type: ignore[attr-defined]
    print(metapl.models.mpl)  # type: ignore[attr-defined]
    print(metapl.metrics.Mesured)  # type: ignore[attr-defined]
