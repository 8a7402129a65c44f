"""What the application adds to a fit: shares of whole batches, and figures of the pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from metapl.data import StepBatches
from metapl.errors import MetaplError
from metapl.execution.batch import length, micro_batches
from metapl.metrics import evaluate_logits
from metapl.metrics.predictions import batches_of, predict_logits
from metapl.training import FitResult, Trainer


@dataclass(frozen=True, eq=False)
class Share(StepBatches[Any]):
    """This process's rows of the batches that every process has whole; a run may go on in another number of them."""

    whole: StepBatches[Any]
    number: int
    shares: int

    def __post_init__(self) -> None:
        if hasattr(self.whole, "raw"):  # half of a batch is made on the device
            object.__setattr__(self, "raw", self.whole.raw)

    @property
    def steps(self) -> int | None:  # type: ignore[override]  # the whole batches'
        return self.whole.steps

    def batch(self, step: int) -> Any:
        return self._own(self.whole[step])

    def augment(self, step: int, fetched: Any) -> Any:
        return self._own(self.whole.augment(step, fetched))  # type: ignore[attr-defined]  # of those that have raw()

    def _own(self, batch: Any) -> Any:
        assert length(batch) % self.shares == 0, "check_shares has refused it"
        return micro_batches(batch, self.shares, "whole")[self.number]


class Truth:
    """How many of the teacher's labels are right, on (inputs, labels) of unlabeled examples, at each validation."""

    def __init__(self, truth: Any) -> None:
        self.truth = truth

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> dict[str, float]:
        validated = any("_validation_" in name for name in row)
        if not validated or trainer.teacher is None or not trainer.teacher_classifies:
            return {}
        found = evaluate_logits(*predict_logits(trainer.teacher, batches_of(self.truth, trainer.device, "truth")))
        confusion = torch.tensor(found.confusion)
        off = (confusion.sum(0) - confusion.sum(1)).abs().sum()
        return {"pseudo_label_accuracy": found.accuracy, "class_shares_vs_truth": float(off) / (2 * found.n)}


def fit(trainer: Trainer, labeled: Any, unlabeled: Any, *, truth: Any = None, **options: Any) -> FitResult:
    """:meth:`metapl.training.Trainer.fit`, with what its pseudo-labels are like.

    Args:
        truth: (inputs, labels) of unlabeled examples whose labels are known, for looking at pseudo-labels only.
    """
    callbacks = [] if truth is None else [Truth(truth)]
    try:
        return trainer.fit(labeled, unlabeled, callbacks=callbacks, **options)
    except (RuntimeError, ConnectionError, EOFError) as error:
        reason = str(error).partition(". ")[0].strip(" .")
        lost = isinstance(error, ConnectionError | EOFError) and options.get("num_workers")
        if not (lost or reason.startswith("DataLoader worker")):
            raise
        raise MetaplError(f"a process that prepares batches died ({reason}): was there too little memory?") from error
