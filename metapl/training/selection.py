"""Which student is kept: the average of its weights, and the best one by validation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import as_tensors, length, rows
from metapl.execution.layout import reshard
from metapl.execution.rng import RandomState, replayed
from metapl.execution.shards import as_sharded, laid_out_like, local, whole
from metapl.metrics.metric import Metric, default_metric
from metapl.metrics.predictions import logits_of, outer_batches


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
        self._kept = {name: local(t).detach().clone() for name, t in self._tensors().items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        parts = {name: local(t) for name, t in self._tensors().items()}
        moving = [name for name, p in self.network.named_parameters() if p.is_floating_point() or p.is_complex()]
        torch._foreach_lerp_([self._kept[name] for name in moving], [parts[name] for name in moving], 1 - decay)
        # A pass may have made buffers, or given them another shape.
        self._kept = {name: self._kept[name] if name in {*moving} else t.clone() for name, t in parts.items()}
        self.steps += 1

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """The network with the averaged weights in this block, and bit for bit its own afterwards."""
        own = {name: local(t).detach().clone() for name, t in self._tensors().items()}
        try:
            self._write(self._kept)
            yield self.network
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, t in self._tensors().items():
            part, value = local(t), values.get(name)
            if value is not None and value.shape == part.shape:  # others are caches that grew with a longer input
                part.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, laid out as the network's, and how many steps they have followed."""
        held = {name: as_sharded(self._kept[name], t) for name, t in self._tensors().items() if name in self._kept}
        return {"module": held, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, whole or laid out as the network is."""
        for name, t in self._tensors().items():
            self._kept[name] = local(laid_out_like(state["module"][name], t)).to(t.device, copy=True)
        self.steps = state["steps"]

    def _tensors(self) -> dict[str, Any]:
        reshard(self.network)  # else a sharded network holds other tensors
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())


def weights_of(model: nn.Module) -> dict[str, Any]:
    """A copy of a network's state on the host; of a sharded one every process has all of it."""
    return {
        name: whole(t).detach().cpu().clone() if isinstance(t, Tensor) else copy.deepcopy(t)
        for name, t in model.state_dict().items()
    }


@dataclass
class Best:
    """The best student so far, by the metric on validation data; the latest of equals."""

    value: float | None = None
    step: int = 0
    weights: dict[str, Any] = field(default_factory=dict)


class Selection:
    """Measures the networks on validation data, and remembers the best student.

    Args:
        trainer: whose networks they are, and which says how a batch is read and judged.
        validation: a labeled batch, or an iterable of such; None: nothing is looked at.
        metric: by what they are measured; None: accuracy or the loss, by the kind of problem.
        select: whether the best student is remembered.
        say: shows a line.
    """

    def __init__(self, trainer: Any, validation: Any, metric: Metric | None, select: bool, say: Any) -> None:
        self.trainer, self.metric, self.select, self.say = trainer, metric, select, say
        self.validation, self.best = as_tensors(validation, trainer.dtype), Best()
        self.examples: int | None = None  # that the last values are of
        if metric is not None and validation is None:
            raise MetaplError(f"the metric {metric.name!r} was given without validation data; expected both.")
        if select and metric is not None and metric.better is None:
            raise MetaplError(f"metric {metric.name!r}: expected mode='max', or mode='min' of an error, beside it.")
        if isinstance(validation, Iterator):
            raise MetaplError("validation is an iterator, which is read once; expected a list or a DataLoader.")

    def check(self) -> None:
        """Measure the student on the first batch, so that data and metric that do not fit are seen before the first
        step; where no metric was given, find out which it is."""
        if self.validation is None:
            return
        with replayed(RandomState.now(self.trainer.device)):
            first = next(self._batches(), None)
            if first is None:
                raise MetaplError("validation has no batches; expected at least one example, or None.")
            inputs, batch = first
            if self.metric is None:
                self.metric = default_metric(self.trainer, batch, logits_of(self.trainer.student, [rows(inputs, 0, 2)]))
            self.metric.over(self.trainer, self.trainer.student, [first])

    @property
    def row(self) -> str:
        """What a record calls the student's value."""
        return f"student_validation_{self.metric.name}" if self.metric else ""

    def look(self, role: str, network: nn.Module, step: int) -> dict[str, float]:
        """The metric of the ``student`` or ``teacher``, or of its average, after ``step`` steps."""
        assert self.metric is not None
        # A DataLoader draws from the default generator; looking must not change the training.
        with replayed(RandomState.now(self.trainer.device)):
            of = f"the {role} on validation data after step {step}"
            found = self.metric.measured(self.trainer, network, self._batches(), of)
        if self.examples not in (None, found.n):
            self.say(f"note: validation is on {found.n:,} examples, and was on {self.examples:,}: not to be compared")
        self.examples = found.n
        if role == "student" and self.select and self.metric.improves(found.value, self.best.value):
            self.best = Best(found.value, step, weights_of(network))
        return {f"{role}_validation_{self.metric.name}": found.value}

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        read = outer_batches(self.validation, self.trainer.read_outer, self.trainer.device, "validation")
        return ((inputs, batch) for inputs, batch in read if length(inputs))
