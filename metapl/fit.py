"""What a trainer needs to be fitted: the loop around its steps, evaluation, saving and loading."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from metapl import checkpoint
from metapl.errors import MetaplError
from metapl.evaluate import Evaluation, evaluate_logits, predict_logits
from metapl.fitting.contract import Report, Say, Stepwise
from metapl.fitting.options import FitOptions
from metapl.fitting.run import FitResult, FitRun
from metapl.fitting.selection import batches_of
from metapl.fitting.stopping import Interrupted
from metapl.run_folder import RunFolder

__all__ = ["FitOptions", "FitResult", "Interrupted", "Loop", "Report", "Say", "batches_of"]


class Loop(Stepwise):
    """A trainer that can be fitted."""

    precision: str = "float32"
    steps_done: int = 0

    def fit(
        self,
        labeled: Any,
        unlabeled: Any = None,
        *,
        steps: int,
        validation: Any = None,
        truth: Any = None,
        out: str | RunFolder | None = None,
        resume: bool = False,
        progress: bool = True,
        say: Say | None = None,
        **options: Any,
    ) -> FitResult:
        """Train for ``steps`` steps, and leave the best student by validation in place.

        Args:
            labeled, unlabeled: endless or re-iterable sources of batches: a DataLoader, a list of batches, metapl's
                own step batches, anything :func:`metapl.data.feed.feed` takes; ``unlabeled=None`` where nothing reads
                it.
            steps: in all, those of an earlier part of the run included.
            validation: (inputs, labels) or an iterable of such batches; without it the last student is kept.
            truth: (inputs, labels) of unlabelled examples whose labels happen to be known, for recording how many of
                the teacher's labels are right; nothing is trained or selected on it.
            out: a folder for metrics, TensorBoard events and checkpoints.
            resume: go on from the newest whole checkpoint in ``out``; without it, a folder with checkpoints of this
                phase is refused.
            progress: show on standard error how far it is: a bar on a terminal, else a line for each validation.
            say: where messages go; default: standard error.
            options: the other fields of :class:`FitOptions`.

        Returns: a :class:`FitResult`.

        Raises:
            MetaplError: wrong options or sources, a loss that is not finite (with its step and the last good
                checkpoint), a disk that is full.
            Interrupted: after Ctrl-C or SIGTERM, when the step under way is finished and saved.
        """
        how = FitOptions(steps=steps, **options)
        folder = RunFolder(out) if isinstance(out, str | Path) else out
        run = FitRun(self, how, folder, validation, truth, progress, say or _to_stderr)
        return run.run(labeled, unlabeled, resume)

    def evaluate(self, data: Any, *, classes: list[str] | None = None) -> Evaluation:
        """Accuracy, per class, confusion matrix and calibration of the student on (inputs, labels) or batches."""
        logits, labels = predict_logits(self.student, batches_of(data, self.device))
        return evaluate_logits(logits, labels, classes)

    def save(self, path: str | Path) -> None:
        """Write :meth:`state_dict` and the default generators to a file, whole or not at all."""
        checkpoint.save(path, {"trainer": self.state_dict(), "rng": checkpoint.rng_state()})

    def load(self, path: str | Path) -> None:
        """Go on from :meth:`save`."""
        state = checkpoint.load(path)
        if "trainer" not in state:
            raise MetaplError(f"{path} is not a trainer's file; expected one written by save().")
        self.load_state_dict(state["trainer"])
        checkpoint.set_rng_state(state["rng"])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
