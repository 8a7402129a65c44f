"""What the application adds to a fit: shares of whole batches, and figures of the pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from metapl.data import StepBatches
from metapl.errors import MetaplError
from metapl.execution.batch import length, micro_batches
from metapl.execution.shards import whole
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
        for name in ("raw", "explain"):  # half of a batch is made on the device; of what a worker has died
            if hasattr(self.whole, name):
                object.__setattr__(self, name, getattr(self.whole, name))

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


class ExactCosine:
    """The cosine between the mode's teacher gradient and the exact one before every so many steps, in rows of these.

    It costs two hypergradients and changes nothing else.
    """

    def __init__(self, trainer: Any, every: int, steps: int) -> None:
        self.found: dict[int, float] = {}
        step = trainer.step

        def measured(labeled: Any, unlabeled: Any = None) -> Any:
            done = trainer.steps_done + 1
            if done % every == 0 or done == steps:
                gradients = [trainer.hypergradient(labeled, unlabeled, mode).grads for mode in (None, "forward")]
                a, b = (torch.cat([whole(g).flatten().double() for g in found.values()]) for found in gradients)
                self.found = {done: float(torch.nn.functional.cosine_similarity(a, b, dim=0))}
            return step(labeled, unlabeled)

        trainer.step = measured

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> dict[str, float]:
        return {"exact_cosine": self.found[step]} if step in self.found else {}


def fit(
    trainer: Trainer,
    labeled: Any,
    unlabeled: Any,
    *,
    truth: Any = None,
    exact_every: int | None = None,
    **options: Any,
) -> FitResult:
    """:meth:`metapl.training.Trainer.fit` with what is above.

    Args:
        trainer, labeled, unlabeled, options: of the fit.
        truth: (inputs, labels) of unlabeled examples whose labels are known, for looking at pseudo-labels only.
        exact_every: steps between measurements of the cosine to the exact gradient; None: never.
    """
    callbacks = [*options.pop("callbacks", ()), *([] if truth is None else [Truth(truth)])]
    own = "step" in vars(trainer)
    if exact_every is not None and getattr(getattr(trainer, "mode", None), "credits", "nothing") != "nothing":
        callbacks.append(ExactCosine(trainer, exact_every, options["steps"]))
    try:
        return trainer.fit(labeled, unlabeled, callbacks=callbacks, **options)
    except (RuntimeError, ConnectionError, EOFError) as error:
        reason = str(error).partition(". ")[0].strip(" .")
        lost = isinstance(error, ConnectionError | EOFError) and options.get("num_workers")
        if not (lost or reason.startswith("DataLoader worker")):
            raise
        raise MetaplError(f"a process that prepares batches died ({reason}): was there too little memory?") from error
    finally:
        if not own:
            vars(trainer).pop("step", None)
