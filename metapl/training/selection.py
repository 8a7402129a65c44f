"""Which student is kept: the average of its weights, and the metric that the best one is chosen by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import rows
from metapl.execution.layout import reshard
from metapl.execution.shards import as_sharded, laid_out_like, local, whole
from metapl.execution.state import RandomState, replayed
from metapl.metrics.metric import Metric, default_metric
from metapl.metrics.predictions import logits_of, outer_batches


class Average:
    r"""The average that follows a network's weights, \theta̅ \leftarrow d_t \theta̅ + (1 - d_t) \theta.

    .. math:: d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics) are copied.
    ``torch.optim.swa_utils.AveragedModel`` counts on the device, so that each step would wait for it, and copies the
    module, which a sharded one does not allow. Cost: a copy of the weights; one fused pass over them an update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
            raise MetaplError("ema_decay of 16-bit weights does not move; expected 32-bit ones with precision=.")
        self.network, self.decay, self.steps = network, decay, 0
        self._kept = {name: local(t).detach().clone() for name, t in self._tensors().items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        parts = {name: local(t) for name, t in self._tensors().items()}
        moving = {name for name, p in self.network.named_parameters() if p.is_floating_point() or p.is_complex()}
        torch._foreach_lerp_([self._kept[name] for name in moving], [parts[name] for name in moving], 1 - decay)
        # A pass may have made buffers, or given them another shape.
        self._kept = {name: self._kept[name] if name in moving else t.clone() for name, t in parts.items()}
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
    return {
        name: whole(t).detach().cpu().clone() if isinstance(t, Tensor) else copy.deepcopy(t)
        for name, t in model.state_dict().items()
    }


def metric_for(trainer: Any, validation: Any, metric: Metric | None, select: bool) -> Metric | None:
    """The metric of the networks on validation data, None without these; the student is measured on the first batch."""
    if validation is None:
        if metric is not None:
            raise MetaplError(f"the metric {metric.name!r} was given without validation data; expected both.")
        return None
    if isinstance(validation, Iterator):
        raise MetaplError("validation is an iterator, which is read once; expected a list or a DataLoader.")
    with replayed(RandomState.now(trainer.device)):
        first = next(outer_batches(validation, trainer.read_outer, trainer.device, "validation"), None)
        if first is None:
            raise MetaplError("validation has no batches; expected at least one example, or None.")
        metric = metric or default_metric(trainer, first[1], logits_of(trainer.student, [rows(first[0], 0, 2)]))
        if select and metric.better is None:
            raise MetaplError(f"metric {metric.name!r}: expected mode='max', or mode='min' of an error, beside it.")
        metric.over(trainer, trainer.student, [first])
    return metric
