"""Which student is kept: the average of its weights, and the best one by validation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from metapl.errors import MetaplError, placed, reason_of
from metapl.execution import checks
from metapl.execution.batch import as_tensors, length, rows
from metapl.execution.checks import dense, described
from metapl.execution.layout import reshard
from metapl.execution.rng import RandomState, replayed
from metapl.execution.shards import as_sharded, laid_out_like, local, whole
from metapl.metrics.classification import Evaluation, check_labels
from metapl.metrics.metric import ACCURACY, Measured, Metric, default_metric, labels_of
from metapl.metrics.predictions import logits_of, outer_batches
from metapl.training.beside import Beside
from metapl.training.contract import Say, Stepwise


class Average:
    r"""The average that follows a network's weights, \theta̅ \leftarrow d_t \theta̅ + (1 - d_t) \theta.

    .. math:: d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics) are copied.
    ``torch.optim.swa_utils.AveragedModel`` would do the same, but counts on the device, so that each step would wait
    for it, and copies the module, which a sharded one does not allow.

    Args:
        network: whose weights take turns with their average.
        decay: in [0, 1).

    Cost: a copy of the weights, of sharded ones of this process's parts; one fused pass over them an update.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(network.weight)
    >>> average = Average(network, decay=0.995)
    >>> _ = nn.init.ones_(network.weight)
    >>> average.update()
    >>> with average.held() as averaged:
    ...     print(round(averaged.weight.item(), 6))  # d_0 = 1/10
    0.9
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
            raise MetaplError(
                "the average of 16-bit weights does not move: its steps are below their resolution; expected "
                "ema_decay=None, or 32-bit weights with precision='bfloat16'."
            )
        self.network, self.decay, self.steps = network, decay, 0
        self._kept = {name: t.clone() for name, t in self._parts().items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        parts = self._parts()
        moving = [name for name, p in self.network.named_parameters() if p.is_floating_point() or p.is_complex()]
        torch._foreach_lerp_([self._kept[name] for name in moving], [parts[name] for name in moving], 1 - decay)
        copied = {name: t for name, t in parts.items() if name not in {*moving}}
        self._kept = {name: self._kept[name] for name in moving} | _written(self._kept, copied)
        self.steps += 1

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """The network with the averaged weights in this block, and bit for bit its own afterwards."""
        own = {name: t.clone() for name, t in self._parts().items()}
        try:
            _written(self._parts(), self._kept)
            yield self.network
        finally:
            _written(self._parts(), own)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, as the network's state has its own, and how many steps they have followed."""
        return {"module": {name: as_sharded(kept, t) for name, t, kept in self._of_state()}, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, whole or laid out as the network is."""
        given = {name: local(laid_out_like(state["module"][name], t)) for name, t, _ in self._of_state()}
        for name, _, kept in self._of_state():
            if kept.shape != given[name].shape:
                raise ValueError(f"the average of {name} has the shape {tuple(given[name].shape)}")
            kept.copy_(given[name])
        self.steps = state["steps"]

    def _tensors(self) -> dict[str, Any]:
        reshard(self.network)  # else a sharded network holds other tensors
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers(remove_duplicate=False))

    def _parts(self) -> dict[str, Tensor]:
        """This process's parts of the weights, sharing their memory."""
        return {name: local(t).detach() for name, t in self._tensors().items()}

    def _of_state(self) -> Iterator[tuple[str, Any, Tensor]]:
        """The tensors of the network's state by name, each with this process's part of its average."""
        kept = {id(t): self._kept[name] for name, t in self._tensors().items() if name in self._kept}
        state = self.network.state_dict(keep_vars=True)
        return ((name, t, kept[id(t)]) for name, t in state.items() if id(t) in kept)


@torch.no_grad()
def _written(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values, in the tensors of these names; in copies where there is none, or of another shape: of buffers that a
    pass has made."""
    found = {}
    for name, value in values.items():
        t = into.get(name)
        found[name] = value.clone() if t is None or t.shape != value.shape else t.copy_(value)
    return found


def weights_of(model: nn.Module) -> dict[str, Any]:
    """A copy of a network's state on the host; of a sharded one every process has all of it."""
    return {
        name: whole(t).detach().cpu().clone() if isinstance(t, Tensor) else copy.deepcopy(t)
        for name, t in model.state_dict().items()
    }


# ---------------------------------------------------------------------------------------------------------- validation

Kept = Callable[[], AbstractContextManager[nn.Module]]
"""A network in a block."""


@dataclass
class Best:
    """The best student so far, by the metric on validation data; the latest of equals."""

    value: float | None = None
    step: int = 0
    weights: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)  # of Beside.changed


class Selection:
    """Measures the networks on validation data, and remembers the best student.

    Args:
        trainer: whose networks they are, and which says how a batch is read and judged.
        validation: a labeled batch, or an iterable of such; None: nothing is looked at.
        truth: (inputs, labels) of unlabeled examples, for the teacher.
        metric: by what they are measured; None: by the kind of problem, which :meth:`check` finds out.
        select: whether the best student is remembered.
        say: takes what a user should know of the validation data.
    """

    def __init__(
        self,
        trainer: Stepwise,
        validation: Any,
        truth: Any = None,
        metric: Metric | None = None,
        select: bool = True,
        say: Say | None = None,
    ) -> None:
        self.trainer, self.device, self.metric, self.select = trainer, trainer.device, metric, select
        if metric is not None and validation is None:
            raise MetaplError(f"the metric {metric.name!r} was given without validation data; expected both.")
        if select and metric is not None and metric.better is None:
            raise MetaplError(
                f"the metric {metric.name!r} was given without which of its values are better; expected mode='max', or "
                "mode='min' of an error."
            )
        self.validation, self.truth = (as_tensors(data, trainer.dtype) for data in (validation, truth))
        self.say: Say = say or (lambda text: None)
        self.best, self.beside = Best(), Beside(trainer.student)
        self.before: tuple[str, ...] | None = None
        self.lost = 0  # that could not be read
        self.told = ""  # the student's last value, and on how many examples it was measured

    def check(self, labeler: nn.Module | None = None) -> None:
        """Refuse validation data, and truth, that could not be used later, and a metric that fails on them; find out
        which metric it is where none was given.

        Cost: a pass on two examples of each; where the metric is not accuracy, on the first batch.
        """
        for name, data, network in (
            ("validation", self.validation, self.trainer.student),
            ("truth", self.truth, labeler),
        ):
            if data is None or network is None:
                continue
            if isinstance(data, Iterator):
                raise MetaplError(
                    f"{name} is {described(data)}, which can be read only once, and is read at every validation; "
                    "expected a pair (inputs, labels), a list of batches or a DataLoader."
                )
            with replayed(RandomState.now(self.device)):
                first = next(outer_batches(data, self.trainer.read_outer, self.device, name), None)
                if first is None or not length(first[0]):
                    raise MetaplError(f"{name} has no batches; expected at least one example, or None.")
                inputs, batch = first
                dense(batch, f"{name} holds")
                with placed(f"{name} cannot be measured: "):
                    checks.finite_on_host(inputs)
                labels = labels_of(batch)
                if isinstance(data, Dataset) and isinstance(labels, int | Tensor) and not getattr(labels, "ndim", 0):
                    raise MetaplError(
                        f"{name} is a data set of single examples; expected batches: DataLoader({name}, 256)."
                    )
                try:
                    outputs = logits_of(network, [rows(inputs, 0, 2)])
                except RuntimeError as error:
                    raise MetaplError(
                        f"the network failed on {name} ({type(error).__name__}: {reason_of(error)}); expected inputs "
                        "such as its batches for training have."
                    ) from error
                metric = ACCURACY if name == "truth" else self.metric or default_metric(self.trainer, batch, outputs)
                if metric is ACCURACY:
                    _check_classes(inputs, labels, outputs, name)
                else:
                    with placed(f"{name} cannot be measured by it: "):
                        metric.over(self.trainer, network, [first])
                self.metric = self.metric or metric

    @property
    def kind(self) -> tuple[str, ...] | None:
        """The name of the metric, and which of its values are better; without validation data, what it was before the
        fit was resumed, if there were any then."""
        return self.before if self.metric is None else (self.metric.name, str(self.metric.better))

    @property
    def row(self) -> str:
        """What a record calls the student's value."""
        return f"student_validation_{self.metric.name}" if self.metric else ""

    def look(
        self, student: Kept | None, teacher: Kept | None, labeler: nn.Module | None, step: int
    ) -> dict[str, float]:
        """The metric after ``step`` steps; None for a network that there is not, or that has not begun.

        Args:
            student, teacher: the networks that are kept, such as the averages, each in a block of its own: averages of
                sharded networks take the place of these.
            labeler: the network that makes the pseudo-labels.
            step: number of steps done.
        """
        if self.validation is None or self.metric is None:
            return {}
        values = {}
        for role, held in (("student", student), ("teacher", teacher)):
            if held is not None:
                with held() as network:
                    of = f"the {role} on validation data after step {step}"
                    found = self._measured(network, self.validation, "validation", self.metric, of)
                    values[f"{role}_validation_{self.metric.name}"] = found.value
                    if role == "student":
                        self.told = f"{self.metric.shown(found.value)} of {found.n:,}"
                        if self.select and self.metric.improves(found.value, self.best.value):
                            self.best = Best(found.value, step, weights_of(network), self.beside.changed())
        if labeler is not None and self.truth is not None:
            found = self._measured(labeler, self.truth, "truth", ACCURACY, "the teacher on truth")
            assert isinstance(found, Evaluation)
            off = torch.tensor(found.confusion).sum(0) - torch.tensor(found.confusion).sum(1)
            values["pseudo_label_accuracy"] = found.accuracy
            values["class_shares_vs_truth"] = float(off.abs().sum()) / (2 * found.n)
        return values

    def _measured(self, network: nn.Module, data: Any, name: str, metric: Metric, of: str) -> Measured | Evaluation:
        from metapl.data.steps import StepBatches  # needed for fitting only

        counts: list[int] = []

        def batches() -> Iterator[tuple[Any, Any]]:
            for inputs, batch in outer_batches(data, self.trainer.read_outer, self.device, name):
                counts.append(length(inputs))
                yield inputs, batch

        expected = data.examples if isinstance(data, StepBatches) else None
        try:
            # A DataLoader draws from the default generator; looking must not change the training.
            with replayed(RandomState.now(self.device)):
                found = metric.measured(self.trainer, network, batches(), of)
        except MetaplError as error:
            if not expected or any(counts):
                raise
            raise MetaplError(
                f"none of the {expected:,} validation pictures can be read any more; were they moved or removed while "
                "the run was under way? Put them back, then go on with the run."
            ) from error
        expected = expected or found.n
        lost, before = expected - found.n, self.lost
        self.lost = max(lost, before)
        if lost > before:
            self.say(
                f"note: {lost:,} of the {expected:,} validation pictures cannot be read any more; accuracies are of "
                "the others, and are not to be compared with those before"
            )
        return found


def _check_classes(inputs: Any, labels: Any, outputs: Tensor, name: str) -> None:
    count = length(inputs)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or len(labels) != count:
        raise MetaplError(
            f"{name} has the labels {described(labels)} for {count:,} examples; expected one class index for each, and "
            "at least one example."
        )
    checks.class_outputs(outputs, "network")
    check_labels(labels, outputs.shape[1], f" of {name}")
