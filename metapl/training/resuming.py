"""What a resumed fit must have in common with its beginning, and what of its state is of one process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.runs.generators import rng_state, set_rng_state

# Options of a fit, and settings of an optimizer, that do not decide where it goes; the rate is compared as the schedule
# found it.
FREE = ("validate_every", "log_every", "save_every", "keep", "num_workers", "phase")
OF_SPEED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names")


def options_of(run: Any) -> dict[str, Any]:
    """One flat dict of plain values, which two parts of a fit have in common."""
    options, trainer, metric = run.options, run.trainer, run.selection.metric
    found = {name: value for name, value in vars(options).items() if name not in FREE}
    if options.schedule == "constant" or options.decay_every is not None:
        del found["steps"]  # the rates do not depend on it
    found |= {"trainer": type(trainer).__name__, "dtype": str(trainer.dtype), "validation": metric is not None}
    found |= {"metric": metric and metric.name, "mode_of_metric": metric and metric.better}
    found |= {name: _plain(value) for name, value in trainer.settings().items()}
    found |= {f"{name}.{key}": value for name, known in run.data.items() for key, value in known.items()}
    for name, optimizer in run.rates.optimizers.items():
        for i, (group, rate) in enumerate(zip(optimizer.param_groups, run.rates.base[name], strict=False)):
            settings = {key: _plain(value) for key, value in group.items() if key not in OF_SPEED}
            settings |= {"optimizer": type(optimizer).__name__, "lr": float(rate), "parameters": len(group["params"])}
            found |= {f"{name.removesuffix('_lr')}.{i}.{key}": value for key, value in settings.items()}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # a frozen dataclass shows its fields


def refuse_other(file: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Stop where a fit was begun otherwise."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changed = few([f"{name} was {before.get(name)!r:.80}, now {now.get(name)!r:.80}" for name in names])
        raise MetaplError(f"{file} is of a fit that was begun otherwise ({changed}); or give resume='anyway'.")


# ---------------------------------------------------------------------------------------------------------------- data


def about(source: Any, batch: Any) -> dict[str, Any]:
    """How many examples a source has, and how many a batch, where that is known, and the digest of its first batch."""
    from metapl.data.steps import StepBatches  # needed for fitting only

    if hasattr(source, "whole"):  # of a share
        source, batch = source.whole, source.whole[0]
    examples, held = getattr(source, "examples", None), getattr(source, "dataset", source)
    if examples is None and hasattr(held, "__len__") and not isinstance(held, StepBatches):  # which count steps
        examples = len(held)
    return {"examples": examples, "batch_size": getattr(source, "batch_size", None), "first_batch": digest(batch)}


def digest(batch: Any) -> str:
    """A SHA-256 over the tensors, numbers and texts of a batch."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            numbers: Any = leaf.detach().cpu().contiguous().reshape(-1)
            found.update(numbers.view(torch.uint8).numpy() if leaf.numel() else b"")
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


# ------------------------------------------------------------------------------------- of several processes together

OWN = ("rng", "feeds", "options")


def own_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between processes."""
    return {name: state[name] for name in OWN} | {"generator": state["trainer"].get("generator")}


def of_this(state: dict[str, Any], trainer: Any, file: Path, sources: Sequence[Any]) -> dict[str, Any]:
    """The state of a fit, by one process or several, with what is of this process.

    On another number of processes, each takes the generators of the first one; where the networks have dropout, each
    share seeds the default one anew, from that state and its number.

    Raises: :class:`metapl.MetaplError` where the processes are as many as before no longer, and a source serves the
    batches of one process, and not its share of a ``whole`` source.
    """
    ranks = trainer.ranks
    if ranks.alone and "ranks" not in state:
        return state
    every = state.get("ranks") or [own_state(state)]
    as_many = len(every) == ranks.processes
    if not as_many and ranks.size > 1 and not all(hasattr(source, "whole") for source in sources):
        raise MetaplError(f"{file} is of a fit in {len(every)} processes with sources of their own; expected as many.")
    own = every[ranks.number if as_many else 0]
    parts = [part for network in trainer.networks.values() for part in network.modules()]
    if not as_many and any(isinstance(part, nn.modules.dropout._DropoutNd) for part in parts):
        set_rng_state(own["rng"])
        torch.manual_seed(int(torch.randint(2**62, ())) + ranks.rank)
        own = own | {"rng": rng_state()}
    held = state["trainer"] | ({"generator": own["generator"]} if "generator" in state["trainer"] else {})
    return state | {name: own[name] for name in OWN} | {"trainer": held}
