"""The base of all trainers: fitting, evaluation, prediction, saving and loading."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.numerics import wide
from metapl.execution.shards import is_sharded
from metapl.metrics import Evaluation, evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of, input_batches, logits_of
from metapl.runs import checkpoint
from metapl.runs.generators import rng_state, set_rng_state
from metapl.runs.ownership import Folder
from metapl.training.contract import Say, Stepwise
from metapl.training.loop import FitResult, FitRun
from metapl.training.options import FitOptions, refuse_unknown
from metapl.training.resuming import check_allowed, going_on_from
from metapl.training.stopping import Callback
from metapl.words import tell


class Trainer(Stepwise):
    """A trainer that can be fitted, evaluated, saved and loaded."""

    precision: Literal["float32", "bfloat16"] = "float32"
    steps_done: int = 0

    def __repr__(self) -> str:
        """The networks by class and size, what trains each of them at which rate, and how far it is."""
        lines = []
        for name, network in self.networks.items():
            own = {id(p): p.numel() for p in network.parameters()}
            lines.append(f"  {name}: {type(network).__name__}, {sum(own.values()):,} parameters")
            for optimizer in self.schedulable:
                groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
                rates = dict.fromkeys(f"{float(group['lr']):.4g}" for group in groups)
                lines[-1] += f", {type(optimizer).__name__}(lr={', '.join(rates)})" if rates else ""
        mode = f"mode={mode.name!r}, " if (mode := getattr(self, "mode", None)) is not None else ""
        done = f"steps_done={self.steps_done:,}, device={str(self.device)!r}"
        return "\n".join([f"{type(self).__name__}({mode}{done})", *lines])

    def fit(
        self,
        labeled: Any,
        unlabeled: Any = None,
        *,
        steps: int | None = None,
        validation: Any = None,
        truth: Any = None,
        out: str | Folder | None = None,
        resume: bool = False,
        allow_changes: Sequence[str] = (),
        progress: bool = True,
        say: Say | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> FitResult:
        """Train for ``steps`` steps, and leave the best student by validation in place.

        Args:
            labeled, unlabeled: endless or re-iterable sources of batches: a DataLoader, a list of batches, metapl's
                own step batches, anything :func:`metapl.data.feed.feed` takes; ``unlabeled=None`` where nothing reads
                it. The batches are as :meth:`step` takes them; of a loader that gives labels too,
                :func:`metapl.data.without_labels` leaves them out.
            steps: in all, including the steps of an earlier part of the run; always given.
            validation: (inputs, labels) or an iterable of such batches; without it the last student is kept.
            truth: (inputs, labels) of unlabeled examples whose labels happen to be known, for recording how many of
                the teacher's labels are right; nothing is trained or selected on it.
            out: a folder for metrics, TensorBoard events and checkpoints.
            resume: go on from the newest whole checkpoint in ``out``; without it, a folder with checkpoints of this
                phase is refused.
            allow_changes: what may differ from the run that is resumed, some of ``student_optimizer``,
                ``teacher_optimizer``, ``trainer`` (losses, weights, precision, clipping), ``networks`` (what their
                modules say of themselves, and which parameters they learn), ``dtype``, ``labeled``, ``unlabeled`` and
                ``validation``. Anything else that is known to differ is refused by name.
            progress: show on standard error how far it is: a bar on a terminal, else a line a minute at most.
            say: where messages go; default: standard error.
            callbacks: each is called as ``callback(step, row, trainer)`` after every row that is recorded, with the
                number of steps done and the numbers of the row. It may raise :class:`metapl.StopFit`, which ends the
                fit and keeps what was done; what it draws from torch's default generators is undone. One that has
                ``state_dict`` and ``load_state_dict`` is saved and restored with the run.
            options: the other fields of :class:`FitOptions`.

        Returns: a :class:`FitResult`.

        Raises:
            MetaplError: wrong or unknown options, wrong sources, a loss that is not finite (with its step and the last
                good checkpoint), a disk that is full.
            Interrupted: after Ctrl-C, SIGTERM or SIGHUP, when the step under way is finished and saved.

        >>> import metapl
        >>> x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        >>> trainer = metapl.LossTrainer(model := torch.nn.Linear(4, 2), optimizer=torch.optim.SGD(model.parameters()))
        >>> steps = []
        >>> found = trainer.fit([(x, (x[:, 0] > 0).long())], steps=6, log_every=2,
        ...                     callbacks=[lambda step, row, trainer: steps.append(step)])
        >>> steps, sorted(found.history[-1])
        ([2, 4, 6], ['loss', 'loss_cross_entropy', 'step', 'student_lr'])
        """
        refuse_unknown(options, self.fit)
        if steps is None:
            raise MetaplError("fit() was not told how many steps to take; expected steps=1000, say.")
        if out == "":
            raise MetaplError("out='' was given; expected the path of a folder, or None to keep nothing.")
        folder = Folder(out) if isinstance(out, str | Path) else out
        how = progress, say or partial(tell, file=sys.stderr), callbacks, check_allowed(allow_changes)
        run = FitRun(self, FitOptions(steps=steps, **options), folder, validation, truth, *how)
        with run.records.held():
            return run.run(labeled, unlabeled, resume)

    def evaluate(self, data: Any, *, classes: list[str] | None = None) -> Evaluation:
        """Accuracy, per class, confusion matrix and calibration of the student on (inputs, labels) or batches."""
        logits, labels = predict_logits(self.student, batches_of(data, self.device))
        return evaluate_logits(logits, labels, classes)

    def predict(self, data: Any) -> Tensor:
        """The student's class probabilities, softmax(S(x)), in eval mode and without gradients.

        Args:
            data: inputs, a tensor or a numpy array (B, ...) or a dict of these, or an iterable of batches of them, such
                as a DataLoader. Where a tuple is given or served, its first element is the inputs, so labels beside
                them are left out. Floating-point arrays of numpy are cast to the type of the student's weights.

        Returns: probabilities (N, C), float32 or wider, on the CPU, in the order of the examples. Every module is in
        the mode (train or eval) that it had.

        Cost: one forward pass per example, on at most 1,024 at a time where the inputs come as a whole.

        Raises: :class:`metapl.MetaplError` for data of another kind, and for outputs that are not logits (B, C).

        >>> import metapl
        >>> student = torch.nn.Linear(4, 3)
        >>> trainer = metapl.LossTrainer(student, optimizer=torch.optim.SGD(student.parameters()))
        >>> import numpy as np
        >>> trainer.predict(np.ones((5, 4))).shape
        torch.Size([5, 3])
        """
        dtype = next(p.dtype for p in self.student.parameters() if p.is_floating_point())
        logits = logits_of(self.student, input_batches(data, dtype))
        checks.class_outputs(logits, "student")
        checks.finite(logits)
        return wide(logits).softmax(-1)

    def save(self, path: str | Path) -> None:
        """Write :meth:`state_dict` and the default generators to a file, whole or not at all."""
        self._refuse_parts("save")
        checkpoint.save(path, {"trainer": self.live_state(), "rng": rng_state()})

    def load(self, path: str | Path) -> None:
        """Go on from :meth:`save`."""
        self._refuse_parts("load")
        if not isinstance(path, str | os.PathLike):
            raise MetaplError(f"load() was given {checks.described(path)}; expected the path of a file.")
        state = checkpoint.load(path)
        if not state.keys() >= {"trainer", "rng"}:
            raise MetaplError(f"{path} is not a trainer's file; expected one written by save().")
        before = rng_state()
        set_rng_state(state["rng"])  # or nothing has moved
        try:
            with going_on_from(path):
                self.load_state_dict(state["trainer"])
        except MetaplError:
            set_rng_state(before)
            raise

    def _refuse_parts(self, name: str) -> None:
        if any(is_sharded(p) for network in self.networks.values() for p in network.parameters()):
            raise MetaplError(
                f"{name}() is not built yet for sharded networks, of which this process holds a part; write the "
                "networks and optimizers with torch.distributed.checkpoint."
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        on = self.precision != "float32"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if on else nullcontext()
