"""Which networks a fit keeps.

Their averages, what they reach on validation data, and the best of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from metapl.data.columns import advice_on_columns
from metapl.data.feed import generators_put_back
from metapl.execution.batch import digest
from metapl.execution.shards import load_whole, weights_of
from metapl.execution.state import RandomState, replayed
from metapl.feedback.report import Say
from metapl.guards.outcomes import Outcomes
from metapl.metrics.classification import Evaluation
from metapl.metrics.metric import ACCURACY, Measured, Metric
from metapl.metrics.predictions import outer_batches
from metapl.training.fittable import Fittable
from metapl.training.network_settings import buffers_beside, put_buffers_beside
from metapl.training.options import Average, FitOptions
from metapl.training.statistics import estimated_statistics

# How far, in accuracy, a teacher may end below its best validation and still be kept as it is after
# the last step.
FAR_BEHIND = 0.3


@dataclass
class Best:
    """A network that is kept.

    Its value on the validation data, after which step it had it, its weights, and its buffers that
    are in no ``state_dict``; and the best value of all so far, which may be of an earlier one.
    """

    value: float | None = None
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    best_value: float | None = None

    def __post_init__(self) -> None:
        if self.best_value is None:
            # A checkpoint of before has the best network, and no value beside its own.
            self.best_value = self.value

    @staticmethod
    def of(network: nn.Module, value: float | None, step: int) -> Best:
        """Return a network as it is after a step."""
        return Best(value, step, weights_of(network), buffers_beside(network))

    def put_into(self, network: nn.Module) -> None:
        """Give these weights and buffers to a network."""
        load_whole(network, self.weights)
        put_buffers_beside(network, self.buffers)


def facts_of(name: str, data: Any) -> dict[str, Any]:
    """Return the digest of data in memory, or how many examples others have; nothing for None."""
    if data is None:
        return {}
    if isinstance(data, Tensor | tuple | list | dict):
        return {f"{name}.digest": int(digest(data))}
    dataset = getattr(data, "dataset", data)
    return {f"{name}.examples": len(dataset) if hasattr(dataset, "__len__") else None}


class Selection:
    """The averages of a trainer's networks, what these reach on validation data, and the best.

    Args:
        trainer: whose networks they are.
        options: of the fit.
        validation: the data, or None.
        metric: by which students are compared; None without validation data.
        outcomes: is told what each network reaches.
        batch_norm: inputs of which a network has its statistics where it is validated or kept;
            None: those of training.
    """

    def __init__(
        self,
        trainer: Fittable,
        options: FitOptions,
        validation: Any,
        metric: Metric | None,
        outcomes: Outcomes,
        batch_norm: Iterable[Tensor] | None = None,
    ) -> None:
        self.trainer = trainer
        self.options = options
        self.validation = validation
        self.metric = metric
        self.outcomes = outcomes
        self.batch_norm = batch_norm
        self.best_student = Best()
        # The best teacher by accuracy, which is kept only where the last one is far behind it.
        self.best_teacher = Best()
        # The last values on validation data, by column.
        self.latest: dict[str, float] = {}
        self.averages: dict[str, Average] = {}
        if options.ema_decay is not None:
            self.averages = {
                role: Average(net, options.ema_decay) for role, net in trainer.networks.items()
            }

    @cached_property
    def facts(self) -> dict[str, Any]:
        """By what a fit that is resumed knows its validation data again.

        Of data in memory and of lists of batches that is the digest of all of it, of others the
        number of examples.
        """
        return {
            **facts_of("validation", self.validation),
            **facts_of("batch_norm", self.batch_norm),
        }

    @property
    def student_column(self) -> str:
        """The column of a row by which the student is chosen; "" without validation data."""
        return "" if self.metric is None else f"student_validation_{self.metric.name}"

    @contextmanager
    def network_to_keep(self, role: str) -> Iterator[nn.Module]:
        """Enter a block with the network that is validated and kept.

        It has averaged weights and estimated statistics of batch norm, where these are asked for.
        """
        with ExitStack() as stack:
            network = self.trainer.networks[role]
            if role in self.averages:
                network = stack.enter_context(self.averages[role].applied())
            if self.batch_norm is not None:
                stack.enter_context(estimated_statistics(network, self.batch_norm))
            yield network

    def update_averages(self, roles: Iterable[str]) -> None:
        """Let the averages of these networks follow them by one step."""
        for role in roles:
            if role in self.averages:
                self.averages[role].update()

    def start_student_from_teacher(self) -> None:
        """Give the student the teacher's weights, and begin its average anew.

        The weights are those of the teacher's average, where there is one.
        """
        with self.network_to_keep("teacher") as teacher:
            Best.of(teacher, None, 0).put_into(self.trainer.student)
        if self.options.ema_decay is not None:
            self.averages["student"] = Average(self.trainer.student, self.options.ema_decay)

    def validation_batches(self) -> Iterator[tuple[Any, Any]]:
        """Yield the inputs of a network and the batch as its loss reads it, on the device."""
        trainer = self.trainer
        return outer_batches(self.validation, trainer.read_outer, trainer.device, "validation")

    def validate(self, step: int, roles: Iterable[str]) -> dict[str, float]:
        """Measure these networks as they are after a step, and remember the best of each.

        Of equals that is the latest.
        """
        self.latest = {}
        for role in roles:
            if self.metric is None:
                continue
            # Looking must not change the training, nor the next look: a DataLoader draws from the
            # default generator, and data may have generators of their own, which no checkpoint has.
            with (
                self.network_to_keep(role) as network,
                replayed(RandomState.now(self.trainer.device)),
                generators_put_back(self.validation),
            ):
                batches = self.validation_batches()
                name = f"the {role} on validation data after step {step}"
                measured = self.metric.measured(self.trainer, network, batches, name)
                inputs = (x for x, _ in self.validation_batches())
                advice = partial(advice_on_columns, inputs)
                self.outcomes.validated(step, role, measured, advice)
                self._remember(step, role, measured, network)
            self.latest[f"{role}_validation_{self.metric.name}"] = measured.value
        return self.latest

    def _remember(
        self, step: int, role: str, measured: Measured | Evaluation, network: nn.Module
    ) -> None:
        assert self.metric is not None, "a network was measured"
        if not self.options.select:
            return
        value = measured.value
        best_value = self.best_student.best_value
        if role == "student" and self._is_kept(measured):
            self.best_student = Best.of(network, value, step)
            if best_value is not None and not self.metric.improves(value, best_value):
                self.best_student.best_value = best_value
        # Teachers have an accuracy; what they reach by another metric says nothing of their labels.
        is_teacher_by_accuracy = role == "teacher" and self.metric is ACCURACY
        if is_teacher_by_accuracy and self.metric.improves(value, self.best_teacher.value):
            self.best_teacher = Best.of(network, value, step)

    def _is_kept(self, measured: Measured | Evaluation) -> bool:
        """Return whether a student takes the place of the one that is kept so far."""
        assert self.metric is not None, "a student was measured"
        best_value = self.best_student.best_value
        if best_value is None or self.metric.improves(measured.value, best_value):
            return True
        if self.options.select != "one_error" or self.metric is not ACCURACY:
            return False
        error = math.sqrt(best_value * (1 - best_value) / measured.n)
        return measured.value >= best_value - error

    def install(self, step: int, say: Say) -> tuple[Best, dict[str, Tensor] | None]:
        """Leave the networks that are kept in place.

        Returns the student that is, and the teacher's weights.
        """
        teacher_weights = None
        if self.trainer.teacher is not None:
            teacher = self._kept_teacher(step, say)
            teacher.put_into(self.trainer.teacher)
            teacher_weights = teacher.weights
        student = self.best_student
        if not student.weights:
            # Nothing was validated, or selected by: the last student is kept.
            with self.network_to_keep("student") as network:
                student = Best.of(network, self.latest.get(self.student_column), step)
        student.put_into(self.trainer.student)
        return student, teacher_weights

    def _kept_teacher(self, step: int, say: Say) -> Best:
        """Return the last teacher, or the best one where the last is far behind it."""
        last_value = self.latest.get("teacher_validation_accuracy")
        best_value = self.best_teacher.value
        is_far_behind = False
        if last_value is not None and best_value is not None:
            is_far_behind = best_value - last_value >= FAR_BEHIND
        if is_far_behind:
            say(
                f"the teacher is kept as it was after step {self.best_teacher.step:,}, with "
                f"{best_value:.1%} on the validation data: after the last step it has "
                f"{last_value:.1%}"
            )
            return self.best_teacher
        with self.network_to_keep("teacher") as network:
            return Best.of(network, last_value, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the last values and the best networks.

        Averages are a part of :meth:`live_averages`.
        """
        return {
            "seen": self.latest,
            "best": vars(self.best_student),
            "best_teacher": vars(self.best_teacher),
        }

    def live_averages(self) -> dict[str, Any]:
        """Return the state of the averages, which the next step changes."""
        return {role: average.state_dict() for role, average in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's ``seen``, ``best``, ``best_teacher`` and ``averages``."""
        self.latest = state["seen"]
        self.best_student = Best(**state["best"])
        self.best_teacher = Best(**state["best_teacher"])
        for role, average in self.averages.items():
            average.load_state_dict(state["averages"][role])
