"""The base of all trainers: fitting, evaluation, prediction, saving and loading."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from metapl.errors import MetaplError, either
from metapl.execution import checks
from metapl.execution.batch import as_tensors, inputs_of, rows
from metapl.execution.layout import Layout
from metapl.execution.numerics import wide
from metapl.execution.shards import is_sharded
from metapl.metrics import Evaluation, Measured
from metapl.metrics.metric import Asked, Better, default_metric, metric_of, of_classes
from metapl.metrics.predictions import input_batches, logits_of, outer_batches
from metapl.runs import checkpoint
from metapl.runs.generators import rng_state, set_rng_state
from metapl.runs.ownership import Folder
from metapl.training.contract import Say, Stepwise
from metapl.training.loop import FitResult, FitRun
from metapl.training.options import FitKeywords, FitOptions, refuse_unknown
from metapl.training.resuming import check_allowed, going_on_from
from metapl.training.stopping import Callback


class Trainer(Stepwise):
    """A trainer that can be fitted, evaluated, saved and loaded."""

    precision: Literal["float32", "bfloat16"] = "float32"
    layouts: list[Layout]
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
        labeled: Any = None,
        unlabeled: Any = None,
        *,
        inner: Any = None,
        outer: Any = None,
        steps: int | None = None,
        batch_size: int | None = None,
        validation: Any = None,
        metric: Asked | None = None,
        mode: Better | None = None,
        truth: Any = None,
        out: str | Folder | None = None,
        resume: bool = False,
        allow_changes: Sequence[str] = (),
        progress: bool = True,
        say: Say | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Unpack[FitKeywords],
    ) -> FitResult:
        """Train for ``steps`` steps, and leave the best student by validation in place.

        Args:
            labeled, unlabeled: endless or re-iterable sources of batches: a DataLoader, a list of batches, metapl's
                own step batches, anything :func:`metapl.data.feed.feed` takes; ``unlabeled=None`` where nothing reads
                it. The batches are as :meth:`step` takes them; of a loader that gives labels too,
                :func:`metapl.data.without_labels` leaves them out. With ``batch_size``, also examples in memory: a
                tensor or an array, or a tuple or dict of these, with a row for each example.
            inner, outer: other names of ``unlabeled`` and ``labeled``, as of a bilevel problem.
            steps: in all, including the steps of an earlier part of the run; always given.
            batch_size: of sources in memory, which are served in shuffled epochs. A source of fewer rows is served
                whole. Arrays of floating point become the type of the student's weights.
            validation: a labeled batch, of any size, or an iterable of such; without it the last student is kept.
            metric: what the networks are measured by on it. By default their accuracy, where the loss shows that the
                labels are classes (:func:`metapl.metrics.metric.of_classes`), and else the problem's ``outer_loss``
                (of a :class:`metapl.LossTrainer` the sum of its losses), as one mean over all batches: Σ sum / Σ weight
                where it returns (sum, weight), and a scalar counts with the rows of its batch. Or

                - ``"accuracy"`` or ``"loss"``, these two by name;
                - a function ``(outputs, batch) -> number``, with the batch as the problem's ``outer_batch`` reads it,
                  such as (inputs, labels); of several batches the mean counts, each weighed by its rows;
                - an object with ``update``, ``compute`` and ``reset``, such as those of torchmetrics, for what is no
                  mean over rows. It is updated by ``update(outputs, labels)``, the second element of a batch, or what a
                  dict has under ``labels``; or by ``update(outputs, batch)`` where its second parameter has that name.

                Rows and results call it by its attribute ``name``, else by the name of the function or the class:
                ``student_validation_f1``. It is given the network's outputs in eval mode.
            mode: whether the smallest (``"min"``) or the greatest (``"max"``) value of the metric is the best; for
                functions, and objects without ``higher_is_better``. Not the trainer's mode.
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
        labeled, unlabeled = either(labeled=labeled, outer=outer), either(unlabeled=unlabeled, inner=inner)
        if steps is None:
            raise MetaplError("steps= was not given, the number of steps to take; expected steps=1000, say.")
        if out == "":
            raise MetaplError("out='' was given; expected the path of a folder, or None to keep nothing.")
        folder = Folder(out) if isinstance(out, str | Path) else out
        how = progress, say or partial(print, file=sys.stderr, flush=True), callbacks, check_allowed(allow_changes)
        measure = metric_of(metric, mode)
        run = FitRun(self, FitOptions(steps=steps, **options), folder, validation, truth, measure, *how)
        with run.records.held():
            return run.run(labeled, unlabeled, resume, batch_size)

    @overload
    def evaluate(self, data: Any, *, classes: list[str], metric: Literal["accuracy"] | None = None) -> Evaluation: ...

    @overload
    def evaluate(self, data: Any, *, metric: Literal["accuracy"]) -> Evaluation: ...

    @overload  # Any: what the loss is of is known when it is asked, and the attributes of one of classes are asked for
    def evaluate(self, data: Any, *, metric: None = None) -> Evaluation | Any: ...

    @overload
    def evaluate(self, data: Any, *, metric: Asked) -> Measured: ...

    def evaluate(
        self, data: Any, *, classes: list[str] | None = None, metric: Asked | None = None
    ) -> Evaluation | Measured:
        """How good the student is on labeled data.

        Args:
            data: as ``validation`` of :meth:`fit`; also an iterator, which is read once.
            classes: names of the classes, for the result.
            metric: as for :meth:`fit`; default: accuracy where the loss shows that the labels are classes, else the
                problem's loss.

        Returns: for classes an :class:`metapl.metrics.Evaluation`: accuracy, per class, confusion matrix and
        calibration; for any other problem or metric a :class:`metapl.metrics.Measured`. Both have ``metric``, its name,
        its ``value``, and ``n``, the number of examples. A type checker takes it for the first, unless
        ``metric`` is another one.

        >>> import metapl
        >>> model = torch.nn.Linear(4, 1)
        >>> trainer = metapl.LossTrainer(model, optimizer=torch.optim.SGD(model.parameters()))
        >>> x = torch.zeros(8, 4)
        >>> def error(outputs, batch):
        ...     return (outputs - batch[1]).abs().mean()
        >>> trainer.evaluate((x, model(x).detach()), metric=error)
        Measured(metric='error', value=0.0, n=8)
        """
        batches = outer_batches(as_tensors(data, self.dtype), self.read_outer, self.device, "the labeled data")
        measure = metric_of(metric)
        if measure is None:
            first = next(batches, None)
            if first is None:
                raise MetaplError("the labeled data have no batches; expected at least one, and a fresh iterator.")
            batches = chain([first], batches)
            measure = default_metric(self, first[1], logits_of(self.student, [rows(first[0], 0, 2)]))
        found = measure.measured(self, self.student, batches, "the student")
        if classes is None:
            return found
        if not isinstance(found, Evaluation) or len(classes) != len(found.confusion):
            width = (
                f"{len(found.confusion)} logits" if isinstance(found, Evaluation) else f"the metric {found.metric!r}"
            )
            raise MetaplError(
                f"{len(classes)} names of classes were given for {width}; expected one for each class of an accuracy."
            )
        return replace(found, classes=tuple(classes))

    def read_input(self, batch: Any) -> Any:
        """The student's input in what :meth:`predict` is given."""
        return inputs_of(batch)

    def predict(self, data: Any) -> Tensor:
        """The student's outputs, in eval mode and without gradients; class probabilities, softmax(S(x)), where the
        problem is one of classes (:func:`metapl.metrics.metric.of_classes`).

        Args:
            data: inputs, a tensor or a numpy array (B, ...) or a dict of these, or an iterable of batches of them, such
                as a DataLoader. Where a tuple is given or served, its first element is the inputs, so labels beside
                them are left out; a problem with an ``outer_input`` of its own reads tuples and dicts by that.
                Floating-point arrays of numpy are cast to the type of the student's weights.

        Returns: probabilities (N, C), or the outputs (N, ...) as they are, such as the logits (N, T, V) of a language
        model; float32 or wider, on the CPU, in the order of the examples. Every module is in the mode (train or eval)
        that it had.

        Cost: one forward pass per example, on at most 1,024 at a time where the inputs come as a whole, and the outputs
        of all examples in memory: where these are large, predict batch by batch.

        Raises: :class:`metapl.MetaplError` for data of another kind, and batches whose outputs differ in shape.

        >>> import metapl
        >>> student = torch.nn.Linear(4, 3)
        >>> trainer = metapl.LossTrainer(student, optimizer=torch.optim.SGD(student.parameters()))
        >>> import numpy as np
        >>> trainer.predict(np.ones((5, 4))).shape
        torch.Size([5, 3])
        """
        outputs = logits_of(self.student, input_batches(data, self.dtype, self.read_input))
        classes = of_classes(self, None, outputs)
        if classes:
            checks.finite(outputs)
        return wide(outputs).softmax(-1) if classes else wide(outputs)

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
        if self.precision == "float32":
            return nullcontext()
        # Kept casts would be of weights that a sharded network has gathered, and given up since.
        kept = not any(layout.is_sharded for layout in self.layouts)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=kept)
