"""The base of all trainers: fitting, evaluation, prediction, saving and loading."""

from __future__ import annotations

import copy
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few
from metapl.execution.batch import Batch, Inputs, as_tensors, inputs_of, rows
from metapl.execution.checks import described, unexpected
from metapl.execution.layout import Layout
from metapl.execution.numerics import wide
from metapl.execution.ranks import ALONE, NOTHING, Ranks
from metapl.execution.shards import load_whole
from metapl.feedback.report import Report, Say
from metapl.updates.optimizers import summary_of

if TYPE_CHECKING:
    from metapl.data.feed import Source
    from metapl.metrics.metric import Better, MetricLike, Term
    from metapl.runs.folder import Folder
    from metapl.training.loop import Callback, FitResult
    from metapl.training.options import FitKeywords, FitOptions


REPLACED = (
    "another network was put into the trainer, whose optimizers and state are of the one it was "
    "built with; expected a new trainer, or load_state_dict of the network that it has."
)


class AssignedOnce:
    """An attribute that all steps of a trainer are of, and that its other parts were made of.

    Steps would go on with what was assigned first, or with both. It is read without this class.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __set__(self, trainer: Trainer, value: Any) -> None:
        if not trainer.is_made or vars(trainer)[self.name] is value:
            vars(trainer)[self.name] = value
            return
        if self.name in ("teacher", "student"):
            raise MetaplError(REPLACED)
        raise MetaplError(
            f"{self.name} of a trainer was assigned; expected {self.name}= of a new trainer."
        )


TrainerClass = TypeVar("TrainerClass", bound="type[Trainer]")


def assigned_once(*names: str) -> Callable[[TrainerClass], TrainerClass]:
    """Return a decorator of a class whose attributes of these names are assigned once."""

    def with_names(trainer_class: TrainerClass) -> TrainerClass:
        for name in names:
            setattr(trainer_class, name, AssignedOnce(name))
        return trainer_class

    return with_names


def refuse_missing_entries(state: Any, expected: Mapping[str, Any]) -> None:
    """Refuse a state without the entries of a trainer's own."""
    if not isinstance(state, Mapping):
        raise MetaplError(f"it is {described(state)}")
    missing = sorted({*expected} - {*state})
    if missing:
        raise MetaplError(f"it has no {', '.join(missing)}")


class Trainer(ABC):
    """A trainer that goes step by step, whose state can be saved between any two.

    Attributes:
        student: the network that is trained, evaluated and kept.
        teacher: the network that makes the labels; None: there is none.
        as_given: the student as it was handed over, perhaps in ``DistributedDataParallel``.
        device: where the networks are.
        ranks: the processes that share its batches.
        layouts: where the weights of each network lie.
        lookahead: how many inner batches the loop draws for a step; several are a
            :class:`metapl.Lookahead`.
        classifies: whether the losses are known to be of classes.
        teacher_classifies: whether the teacher gives class logits, so that its accuracy can be
            measured.
        precision: of the networks' passes.
        steps_done: the number of steps so far.
        is_made: whether all of it is there, so that what steps are of stays as it is.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    as_given: nn.Module
    device: torch.device
    ranks: Ranks = ALONE
    layouts: list[Layout]
    lookahead: int = 1
    classifies: bool = False
    teacher_classifies: bool = False
    precision: Literal["float32", "bfloat16"]
    steps_done: int = 0
    is_made: bool = False
    _told_in_evaluation: tuple[str, ...] = ()

    @property
    @abstractmethod
    def optimizers(self) -> dict[str, Any]:
        """The optimizers by the names of the arguments that they are, the student's first."""

    @property
    @abstractmethod
    def owners(self) -> dict[str, object]:
        """The problem and the losses, which may hold state in attributes, by their roles."""

    @property
    def schedulable(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose learning rates the schedule moves.

        The student's, then the teacher's. A transform of TorchOpt has no param groups.
        """
        optimizers = self.optimizers.values()
        return [part for part in optimizers if isinstance(part, torch.optim.Optimizer)]

    @property
    def reads_inner(self) -> bool:
        """Whether the next step reads an inner batch; a fit makes none that is not read."""
        return True

    @abstractmethod
    def _choices(self) -> str:
        """Return what decides a step beside networks and optimizers, in a few words."""

    @abstractmethod
    def step(self, outer: Batch, inner: Batch = None) -> Report:
        """Take one step."""

    @abstractmethod
    def read_outer(self, batch: Batch, name: str) -> tuple[Inputs, Batch]:
        """Return the student's inputs in an outer batch, and the batch as its loss reads it.

        Args:
            name: of the batch, in an error.
        """

    @abstractmethod
    def outer_terms(self) -> Sequence[Term]:
        """Return the losses by whose sum the student is validated, where its metric is the loss."""

    def settings(self) -> dict[str, Any]:
        """Return what decides a step; a fit that is resumed has the same."""
        return {}

    def live_state(self) -> dict[str, Any]:
        """Return :meth:`state_dict` without the copies: the next step changes its tensors.

        Checkpoints are written from it, and :meth:`_load` takes the same entries back; whoever adds
        one here adds it there.
        """
        return {
            **{role: network.state_dict() for role, network in self.networks.items()},
            "settings": self.network_settings(),
            "held": self.held(),
            "steps_done": self.steps_done,
        }

    def _load(self, state: dict[str, Any]) -> None:
        """Take the entries of :meth:`live_state`; it may raise anything, and have loaded a part.

        :meth:`load_state_dict` then puts the trainer back.
        """
        refuse_missing_entries(state, self.live_state())
        for role, network in self.networks.items():
            load_whole(network, state[role])
        self.set_network_settings(state["settings"])
        self.put_held(state["held"])
        self.steps_done = state["steps_done"]

    def first_steps(self, options: FitOptions) -> int:
        """Return how many steps of a fit the student takes alone, before its teacher begins."""
        if options.first_steps:
            given = f"first_steps={options.first_steps} was given to a {type(self).__name__}"
            raise MetaplError(f"{given}; expected it left out.")
        return 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of the student's weights, which arrays of floating point are given."""
        for p in self.student.parameters():
            if p.is_floating_point():
                return p.dtype
        return torch.float32

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by role, the student first."""
        networks = {"student": self.student}
        if self.teacher is not None:
            networks["teacher"] = self.teacher
        return networks

    def __repr__(self) -> str:
        """Return what is trained, and how far it is: a line, and one for each network.

        >>> import metapl
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> rule = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> metapl.BilevelTrainer(teacher, student, mode="reinforce", inner_optimizer=rule)
        BilevelTrainer: mode 'reinforce', problem PseudoLabels, 0 steps done
          student: Linear, 15 weights, SGD with lr=0.1
          teacher: Linear, 15 weights, SGD with lr=0.05
        >>> metapl.LossTrainer(student, optimizer=rule)
        LossTrainer: losses CrossEntropy, 0 steps done
          student: Linear, 15 weights, SGD with lr=0.1
        """
        steps = "1 step" if self.steps_done == 1 else f"{self.steps_done:,} steps"
        lines = [f"{type(self).__name__}: {self._choices()}, {steps} done"]
        networks_and_optimizers = zip(self.networks.items(), self.optimizers.values(), strict=True)
        for (role, network), optimizer in networks_and_optimizers:
            count = sum(p.numel() for p in network.parameters())
            lines.append(
                f"  {role}: {type(network).__name__}, {count:,} weights, {summary_of(optimizer)}"
            )
        return "\n".join(lines)

    # -------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        outer: Source,
        inner: Source = None,
        *,
        steps: int,
        batch_size: int | None = None,
        validation: Source = None,
        metric: MetricLike | None = None,
        metric_mode: Better | None = None,
        out: str | Path | Folder | None = None,
        resume: bool | Literal["anyway"] = False,
        progress: bool = True,
        say: Say | None = None,
        callbacks: Sequence[Callback] = (),
        batch_norm: Iterable[Tensor] | None = None,
        **options: Unpack[FitKeywords],
    ) -> FitResult:
        """Train for ``steps`` steps, and leave the best student by validation in place.

        Args:
            outer, inner: sources of batches as :meth:`step` takes them: a DataLoader, a list of
                batches, anything :func:`metapl.data.feed.feed` takes; ``inner=None`` where
                nothing reads it. Of a loader that gives labels too,
                :func:`metapl.data.without_labels` leaves them out. With ``batch_size``, also
                examples in memory: a tensor or an array, or a tuple or dict of these, with a row
                for each example.
            steps: in all, including the steps of an earlier part of the run.
            batch_size: of sources in memory, which are served in shuffled epochs; one of fewer rows
                is served whole. Arrays of floating point become the type of the student's weights.
            validation: an outer batch, of any size, or an iterable of such; without it the last
                student is kept.
            metric: what the networks are measured by on it, in eval mode. By default their
                accuracy, where the labels are classes (:func:`metapl.metrics.metric.of_classes`),
                and else the problem's ``outer_loss`` (of a :class:`metapl.LossTrainer` the sum of
                its losses), as one mean over all batches. Or

                - ``"accuracy"`` or ``"loss"``, these two by name;
                - a function ``(outputs, batch) -> number``, with the batch as the problem's
                  ``outer_batch`` reads it, such as (inputs, labels); of several batches the mean
                  counts, each weighed by its rows;
                - an object with ``update``, ``compute`` and ``reset``, such as those of
                  torchmetrics: updated by ``update(outputs, labels)``, or ``update(outputs,
                  batch)`` where its second parameter has that name.

                Rows call it by its ``name``, else by that of the function or class:
                ``student_validation_f1``.
            metric_mode: whether the smallest (``"min"``) or the greatest (``"max"``) value of the
                metric is the best; for functions, and objects without ``higher_is_better``.
            out: a folder for metrics, TensorBoard events and checkpoints.
            resume: go on from the newest whole checkpoint in ``out``; without it, a folder with
                checkpoints of this phase is refused. So are, by name, other options, losses,
                settings of the optimizers, and data of another size or with another first batch;
                ``"anyway"`` compares nothing.
            progress: show how far it is: a bar on standard error, or where that is no terminal, a
                line every half minute by ``say``.
            say: where messages go; default: standard error.
            callbacks: each is called as ``callback(step, row, trainer)`` after every row that is
                recorded; numbers that it returns by their names join the row. It may raise
                :class:`metapl.StopFit`; what it draws from torch's default generators is undone.
                One that has ``state_dict`` and ``load_state_dict`` is saved with the run.
            batch_norm: inputs, such as a list of batches (B, ...) or a loader of them: batch norm
                has their mean and variance while a network is validated and where it is kept. Those
                of training are of augmented inputs, and of weights of before. Cost: a forward pass
                over all of them at each validation, as of
                ``torch.optim.swa_utils.update_bn``.
            options: the other fields of :class:`metapl.training.options.FitOptions`, as keywords:
                ``schedule``, ``warmup``, ``validate_every``, ``patience``, ``ema_decay``, ...

        Returns: a :class:`FitResult`.

        Raises:
            MetaplError: wrong or unknown options, wrong sources, a loss that is not finite (with
                its step and the last good checkpoint), a disk that is full.
            Interrupted: after Ctrl-C, SIGTERM or SIGHUP, when the step under way is finished and
                saved.

        >>> import metapl
        >>> x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(4, 2)
        >>> trainer = metapl.LossTrainer(model, optimizer=torch.optim.SGD(model.parameters()))
        >>> steps = []
        >>> result = trainer.fit([(x, (x[:, 0] > 0).long())], steps=6, log_every=2,
        ...                     callbacks=[lambda step, row, trainer: steps.append(step)])
        >>> steps, sorted(result.history[-1])
        ([2, 4, 6], ['loss', 'loss_cross_entropy', 'lr', 'step'])
        """
        # What only a fit needs is loaded here.
        from metapl.metrics.metric import metric_of
        from metapl.runs.folder import Folder
        from metapl.training.loop import Fit, FitRequest
        from metapl.training.options import fit_options

        if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
            expected = "a list of functions: callback(step, row, trainer)"
            raise unexpected("callbacks is", callbacks, expected)
        request = FitRequest(
            options=fit_options(steps, options, FIT_ARGUMENTS),
            sources={"outer": outer, "inner": inner},
            batch_size=batch_size,
            validation=validation,
            metric=metric_of(metric, metric_mode),
            out=Folder(out) if isinstance(out, str | Path) else out,
            resume=resume,
            shows_progress=progress,
            say=say or partial(print, file=sys.stderr, flush=True),
            callbacks=callbacks,
            batch_norm=batch_norm,
        )
        return Fit(self, request).run()

    def evaluate(
        self, data: Any, *, classes: list[str] | None = None, metric: MetricLike | None = None
    ) -> Any:
        """Return how good the student is on labeled data.

        Args:
            data: as ``validation`` of :meth:`fit`; also an iterator, which is read once.
            classes: names of the classes, for the result.
            metric: as for :meth:`fit`.

        Returns: for classes an :class:`metapl.metrics.Evaluation`; for any other problem or metric
        a :class:`metapl.metrics.Measured`. Both have ``metric``, its name, its ``value``, and
        ``n``.

        >>> import metapl
        >>> model = torch.nn.Linear(4, 1)
        >>> trainer = metapl.LossTrainer(model, optimizer=torch.optim.SGD(model.parameters()))
        >>> x = torch.zeros(8, 4)
        >>> def error(outputs, batch):
        ...     return (outputs - batch[1]).abs().mean()
        >>> trainer.evaluate((x, model(x).detach()), metric=error)
        Measured(metric='error', value=0.0, n=8)
        """
        from metapl.metrics.metric import default_metric, metric_of
        from metapl.metrics.predictions import logits_of, outer_batches

        batches = outer_batches(
            as_tensors(data, self.dtype), self.read_outer, self.device, "the labeled data"
        )
        measure = metric_of(metric)
        if measure is None:
            first = next(batches, None)
            if first is None:
                raise MetaplError("the labeled data have no batches; expected one or more.")
            batches = chain([first], batches)
            first_inputs, first_batch = first
            # Two rows tell whether the outputs are class logits.
            outputs = logits_of(self.student, [rows(first_inputs, 0, 2)])
            measure = default_metric(self, first_batch, outputs)
        result: Any = measure.measured(self, self.student, batches, "the student")
        if classes is None:
            return result
        if len(classes) != len(getattr(result, "confusion", ())):
            raise MetaplError(f"{len(classes)} names of classes were given; expected one a class.")
        return replace(result, classes=tuple(classes))

    def read_input(self, batch: Batch) -> Inputs:
        """Return the student's input in what :meth:`predict` is given."""
        return inputs_of(batch)

    def predict(self, data: Any) -> Tensor:
        """Return the student's outputs, in eval mode and without gradients.

        They are class probabilities, softmax(S(x)), where the problem is one of classes
        (:func:`metapl.metrics.metric.of_classes`).

        Args:
            data: inputs, a tensor or a numpy array (B, ...) or a dict of these, or an iterable of
                batches of them, such as a DataLoader. Of a tuple the first element counts, unless
                the problem has an ``outer_input``. Floating-point arrays of numpy are cast to the
                type of the student's weights.

        Returns: probabilities (N, C), or the outputs (N, ...) as they are, such as the logits (N,
        T, V) of a language model; float32 or wider, on the CPU, in the order of the examples. Every
        module then trains or evaluates as it did before. Cost: one forward pass per example, on at
        most 1,024 at a time, and the outputs of all in memory. Raises: :class:`metapl.MetaplError`
        for data of another kind, and batches whose outputs differ in shape.

        >>> import metapl
        >>> student = torch.nn.Linear(4, 3)
        >>> trainer = metapl.LossTrainer(student, optimizer=torch.optim.SGD(student.parameters()))
        >>> import numpy as np
        >>> trainer.predict(np.ones((5, 4))).shape
        torch.Size([5, 3])
        """
        from metapl.metrics.metric import of_classes
        from metapl.metrics.predictions import input_batches, logits_of

        batches = input_batches(data, self.dtype, self.read_input)
        outputs = logits_of(self.student, batches, "the" if self.classifies else "")
        if not of_classes(self, None, outputs):
            return wide(outputs)
        return wide(outputs).softmax(-1)

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the next step, except the data and the default generators.

        It is a snapshot, which later steps do not change. Cost: a copy of weights and optimizers'
        states on their device.
        """
        return copy.deepcopy(self.live_state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, in a trainer built alike.

        Raises: :class:`metapl.MetaplError` where it cannot be loaded; what had been is then loaded
        back.
        """
        state_before = self.state_dict()
        try:
            self._load(state)
        except Exception as error:
            self._load(state_before)
            # torch writes a line for each weight that does not fit.
            lines = [line.strip().rstrip(":.") for line in str(error).splitlines()]
            reason = f"{type(error).__name__}: {few(lines, 2)}"
            if isinstance(error, MetaplError):
                reason = str(error)
            raise MetaplError(
                f"this is no state for this trainer ({reason}); expected that of a "
                f"{type(self).__name__} with the same networks, optimizers and mode."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write :meth:`state_dict` and the default generators to a file, whole or not at all.

        The file is in the format of safetensors: ``safetensors.torch.load_file`` reads its tensors,
        such as "trainer/student/0.weight", and :meth:`load` all of it. A state of sharded networks
        is not written so. In a callback of a fit its rates are those of the step under way: set
        ``lr`` before another fit.

        Args:
            path: of a file that ends in ``.safetensors``.

        Raises: :class:`metapl.MetaplError` for another suffix, and where it cannot be written.
        """
        from metapl.runs import checkpoint

        checkpoint.check_suffix(path)
        checkpoint.save(path, {"trainer": self.live_state(), "rng": checkpoint.rng_state()})

    def load(self, path: str | Path) -> None:
        """Go on from a file that :meth:`save` has written.

        Raises: :class:`metapl.MetaplError` for another file, such as a checkpoint of a fit.
        """
        from metapl.runs import checkpoint

        state = checkpoint.load(path)
        if not {"trainer", "rng"} <= state.keys():
            mend = "a file of save, or fit(out=..., resume=True) with the folder of a fit"
            raise MetaplError(f"{path} was not written by a trainer's save; expected {mend}.")
        self.load_state_dict(state["trainer"])
        # Last, for loading may draw.
        checkpoint.set_rng_state(state["rng"])

    def network_settings(self) -> dict[str, Any]:
        """Return what of the networks is frozen and in evaluation, and their values, by role."""
        from metapl.training.network_settings import network_settings

        registered = self.registered()
        return {
            role: network_settings(network, registered) for role, network in self.networks.items()
        }

    def set_network_settings(self, settings: Mapping[str, Any]) -> None:
        """Give the networks the settings that :meth:`network_settings` has returned."""
        from metapl.training.network_settings import set_network_settings

        for role, network in self.networks.items():
            set_network_settings(network, settings[role], role)

    def registered(self) -> set[int]:
        """Return the ids of the networks' modules, parameters and buffers."""
        from metapl.training.network_settings import registered_in

        return set().union(*map(registered_in, self.networks.values()))

    def held(self) -> dict[str, dict[str, Any]]:
        """Return what problem and losses hold in attributes, such as a running mean, by roles."""
        from metapl.data.held_values import Walk, held_values

        walk = Walk(self.registered())
        return {role: held_values(owner, walk) for role, owner in self.owners.items()}

    def put_held(self, values: Mapping[str, Any]) -> None:
        """Give problem and losses what :meth:`held` has returned."""
        from metapl.data.held_values import put_values

        for role, owner in self.owners.items():
            put_values(owner, values.get(role, {}), device=self.device)

    def unsaved(self, saved: Mapping[str, Any]) -> list[str]:
        """Return what is not as in a state that was put back, or is in no state, in words."""
        from metapl.training.network_settings import unsaved_in_words

        return unsaved_in_words(saved, self.live_state())

    def tell_evaluation(self, warn: Say) -> None:
        """Warn of networks that are in evaluation mode as a whole, once until they are not."""
        from metapl.training.network_settings import changed_by_evaluation

        told_before = self._told_in_evaluation
        self._told_in_evaluation = ()
        for role, network in self.networks.items():
            changes = changed_by_evaluation(network)
            if not changes:
                continue
            self._told_in_evaluation += (role,)
            if role not in told_before:
                warn(
                    f"the {role} is in eval() as a whole: {', and '.join(changes)}; call "
                    f"{role}.train() before, unless that is meant"
                )

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return a block in which the networks run in the trainer's precision."""
        if self.precision == "float32":
            return NOTHING
        # Casts in a cache would be of weights that a sharded network has gathered, and given up
        # since.
        is_sharded = any(layout.is_sharded for layout in self.layouts)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=not is_sharded)


# The arguments of a fit by name, but for those that are gathered in ``options``.
FIT_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(Trainer.fit).parameters.items()
    if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
]
