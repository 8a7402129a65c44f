"""Which student is kept: the average of its weights, and the best one by validation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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


Kept = Callable[[], AbstractContextManager[nn.Module]]
"""A network in a block."""


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

    def __init__(
        self, trainer: Any, validation: Any, metric: Metric | None = None, select: bool = True, say: Any = print
    ) -> None:
        self.trainer, self.metric, self.select, self.say = trainer, metric, select, say
        self.lost = 0  # validation examples whose files went
        self.validation, self.best = as_tensors(validation, trainer.dtype), Best()
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

    def look(self, networks: Mapping[str, Kept], step: int) -> dict[str, float]:
        """The metric of networks, ``student`` or ``teacher``, after ``step`` steps.

        Args:
            networks: that are kept, such as the averages, each in a block of its own: averages of sharded networks take
                the place of these.
            step: number of steps done.
        """
        values: dict[str, float] = {}
        if self.validation is None or self.metric is None:
            return values
        for role, held in networks.items():
            of = f"the {role} on validation data after step {step}"
            # A DataLoader draws from the default generator; looking must not change the training.
            with held() as network, replayed(RandomState.now(self.trainer.device)):
                value = self._measured(network, self.metric, of)
                values[f"{role}_validation_{self.metric.name}"] = value
                if role == "student" and self.select and self.metric.improves(value, self.best.value):
                    self.best = Best(value, step, weights_of(network))
        return values

    def _measured(self, network: nn.Module, metric: Metric, of: str) -> float:
        """The metric; told, or refused, where files went that the validation examples were in."""
        expected = getattr(self.validation, "examples", None)
        counts = list[int]()

        def batches() -> Iterator[tuple[Any, Any]]:
            for inputs, batch in self._batches():
                counts.append(length(inputs))
                if counts[-1] or expected is None:
                    yield inputs, batch
            if expected and not sum(counts):
                raise MetaplError(
                    f"none of the {expected:,} validation examples can be read any more; put their files back, then go "
                    "on with the run."
                )

        found = metric.measured(self.trainer, network, batches(), of)
        lost = 0 if expected is None else expected - sum(counts)
        if lost > self.lost:
            self.lost = lost
            self.say(
                f"note: {lost:,} of the {expected:,} validation examples cannot be read any more; {metric.name} is of "
                "the others, and not to be compared with that before"
            )
        return found.value

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        return outer_batches(self.validation, self.trainer.read_outer, self.trainer.device, "validation")
