"""What of a checkpoint is of one process, where several train together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from metapl.errors import MetaplError
from metapl.execution.ranks import Ranks
from metapl.execution.shards import is_sharded
from metapl.runs.checkpoint_parts import Like, PartsWriter, named
from metapl.runs.generators import rng_state, set_rng_state
from metapl.training.contract import Say, Stepwise


def with_ranks(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The state of a fit, and under ``ranks`` what differs between processes; all have to call it."""
    return state | {"ranks": ranks.gathered(_own(state))}


def parts_writer(trainer: Stepwise, folder: Path | None, keep: int) -> PartsWriter | None:
    """What writes checkpoints in parts: where networks are sharded over all processes of the job. Elsewhere the first
    process has everything, or could not say who else writes.

    Args:
        trainer: of the fit.
        folder: of the checkpoints; known to the first process.
        keep: how many of them stay.
    """
    networks = [network for network in (trainer.student, trainer.teacher) if network is not None]
    sharded = any(is_sharded(p) for network in networks for p in network.parameters())
    if trainer.ranks.alone or not sharded or trainer.ranks.processes != dist.get_world_size():
        return None
    path = trainer.ranks.gathered(None if folder is None else str(folder.resolve()))[0]
    return PartsWriter(Path(path), keep)


def layouts_of(state: Mapping[str, Any], trainer: Stepwise) -> Like:
    """The layouts of the tensors of a fit's state, by their names; those of optimizers may not be there yet."""
    known = named(state)
    optimizers = [key for key, value in state["trainer"].items() if isinstance(value, dict) and "param_groups" in value]
    for key, optimizer in zip(optimizers, trainer.schedulable, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known |= {f"trainer/{key}/state/{i}": p for i, p in enumerate(parameters) if is_sharded(p)}

    def like(name: str, shape: torch.Size) -> Any:
        layout = known.get(name, known.get(name.rpartition("/")[0]))
        return layout if layout is not None and layout.shape == shape else None

    return like


def of_this(state: dict[str, Any], trainer: Stepwise, file: Path, *, whole_batches: bool, say: Say) -> dict[str, Any]:
    """The state of a fit with the generators and the places in the sources of this process.

    On another number of processes, each takes the default generators of the first one; where the networks drop row
    after row by these, each share seeds them anew, from that state and its number.

    Args:
        state: of a checkpoint, by one process or several.
        trainer: of the fit.
        file: the checkpoint, for errors.
        whole_batches: every process reads the same batches and takes its share.
        say: takes what a user should know.

    Raises: :class:`metapl.MetaplError` where the processes are as many as before no longer, and have sources of their
    own.
    """
    from metapl.distributed.dropout import drops_by_itself  # needed for resuming only

    ranks = trainer.ranks
    if ranks.alone and "ranks" not in state:
        return state
    every = state.get("ranks") or [_own(state)]
    count = ranks.processes
    if len(every) != count and ranks.size > 1 and not whole_batches:
        raise MetaplError(
            f"{file} is of a run in {len(every)} processes, each with sources of its own, and now there are {count}, "
            "so their places in these are not known; resume it in as many, or give all of them the same whole batches, "
            "with split_batches=True."
        )
    own = every[ranks.number if len(every) == count else 0]
    networks = [network for network in (trainer.student, trainer.teacher) if network is not None]
    if len(every) != count and any(map(drops_by_itself, networks)):
        say(f"the run was in {len(every)} processes and goes on in {count}: dropout masks are others than before")
        set_rng_state(own["rng"])
        drawn = torch.get_rng_state().numpy().tobytes() + ranks.rank.to_bytes(4, "little")
        torch.manual_seed(int.from_bytes(hashlib.sha256(drawn).digest()[:8], "little"))
        own = own | {"rng": rng_state()}
    held = state["trainer"] | ({"generator": own["generator"]} if "generator" in state["trainer"] else {})
    return state | {"rng": own["rng"], "feeds": own["feeds"], "trainer": held}


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"rng": state["rng"], "generator": state["trainer"].get("generator"), "feeds": state["feeds"]}
