"""What a resumed fit must have in common with its beginning, and what of its state is of one process."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metapl.errors import MetaplError
from metapl.execution.batch import digest
from metapl.execution.ranks import Ranks
from metapl.execution.shards import is_sharded
from metapl.metrics.metric import Metric
from metapl.runs import checkpoint_parts
from metapl.runs.generators import rng_state, set_rng_state
from metapl.training.options import FitOptions, Rates

# Options of a fit, and settings of an optimizer, that do not decide where it goes; the rate is compared as the schedule
# found it.
FREE = ("validate_every", "log_every", "save_every", "keep", "num_workers", "phase")
OF_SPEED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names")


def compared(
    options: FitOptions,
    trainer: Any,
    metric: Metric | None,
    rates: Rates,
    data: Mapping[str, Mapping[str, Any]],
    stateful: Sequence[Any],
) -> dict[str, str]:
    """What two parts of a fit have in common, as texts by name: sources, options, settings, callbacks with a state."""
    # The digests are on their device until here.
    found = {f"{n}.{key}": int(v) if torch.is_tensor(v) else v for n, of in data.items() for key, v in of.items()}
    found |= {name: value for name, value in vars(options).items() if name not in FREE}
    if options.schedule == "constant" or options.decay_every is not None:
        del found["steps"]  # the rates do not depend on it
    found |= {"trainer": type(trainer).__name__, "dtype": trainer.dtype, **trainer.settings()}
    found |= {"validation metric": metric and (metric.name, metric.better)}
    found |= {"callbacks": [type(callback).__name__ for callback in stateful]}
    for name, optimizer in rates.optimizers.items():
        for i, (group, rate) in enumerate(zip(optimizer.param_groups, rates.base[name], strict=False)):
            settings = {key: value for key, value in group.items() if key not in OF_SPEED}
            settings |= {"optimizer": type(optimizer).__name__, "lr": float(rate), "parameters": len(group["params"])}
            found |= {f"{name.removesuffix('_lr')}.{i}.{key}": value for key, value in settings.items()}
    # A frozen dataclass shows its fields; other values may show where they are in memory.
    return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in found.items()}


def about(source: Any, batch: Any) -> dict[str, Any]:
    """How many examples a source has, and how many a batch, where that is known, and the digest of its first batch."""
    from metapl.data.steps import StepBatches  # needed for fitting only

    if hasattr(source, "whole"):  # of a share
        source, batch = source.whole, source.whole[0]
    examples, held = getattr(source, "examples", None), getattr(source, "dataset", source)
    if examples is None and hasattr(held, "__len__") and not isinstance(held, StepBatches):  # which count steps
        examples = len(held)
    return {"examples": examples, "batch_size": getattr(source, "batch_size", None), "first_batch": digest(batch)}


def own_state(every: list[dict[str, Any]], trainer: Any, file: Path, sources: Sequence[Any]) -> dict[str, Any]:
    """The state of this process among those of each; on another number of processes that of the first one, and where
    the networks have dropout, a default generator seeded anew for each share."""
    ranks: Ranks = trainer.ranks
    if len(every) == ranks.processes:
        return every[ranks.number]
    if ranks.size > 1 and not all(hasattr(source, "whole") for source in sources):
        raise MetaplError(f"{file} is of a fit in {len(every)} processes with sources of their own; expected as many.")
    own, parts = every[0], [part for network in trainer.networks.values() for part in network.modules()]
    if any(isinstance(part, nn.modules.dropout._DropoutNd) for part in parts):
        set_rng_state(own["rng"])
        torch.manual_seed(int(torch.randint(2**62, ())) + ranks.rank)
        own = own | {"rng": rng_state()}
    return own


def layouts(trainer: Any, averages: Mapping[str, Any]) -> checkpoint_parts.Like:
    """The layouts of the sharded tensors of a fit's state, by their names."""
    state = {"trainer": trainer.live_state(), "averages": {role: one.state_dict() for role, one in averages.items()}}
    known = checkpoint_parts.layouts(state)
    # An optimizer's state may not be there yet; it is laid out as its parameters are.
    optimizers = [k for k, value in state["trainer"].items() if isinstance(value, dict) and "param_groups" in value]
    for key, optimizer in zip(optimizers, trainer.schedulable, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known |= {f"trainer/{key}/state/{i}": p for i, p in enumerate(parameters) if is_sharded(p)}

    def like(name: str, shape: torch.Size) -> Any:
        layout = known.get(name, known.get(name.rpartition("/")[0]))
        return layout if layout is not None and layout.shape == shape else None

    return like
