"""The checkpoints of a fit.

Where they are written, what is compared where it is resumed, and each process's part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from metapl.errors import MetaplError, few
from metapl.execution.shards import gathered, is_sharded
from metapl.runs.checkpoint import (
    CheckpointFolder,
    PartsFolder,
    encoded,
    load,
    load_parts,
    rng_state,
    set_rng_state,
)
from metapl.runs.folder import Folder
from metapl.training.fittable import Fittable
from metapl.training.options import FitOptions
from metapl.training.sources import Sources


class Checkpoints:
    """The checkpoints of a fit on all its processes.

    The first process writes them, or each its part of sharded networks.

    Args:
        trainer: whose processes they are of.
        options: of the fit, with the name of the folder that they are in.

    Attributes:
        folder: None on a process that writes nothing.
    """

    def __init__(self, trainer: Fittable, options: FitOptions) -> None:
        self.trainer = trainer
        self.options = options
        self.ranks = trainer.ranks
        self.folder: CheckpointFolder | None = None

    @property
    def last(self) -> Path | None:
        """The newest checkpoint that this process wrote or went on from."""
        return None if self.folder is None else self.folder.last

    @property
    def is_in_parts(self) -> bool:
        return isinstance(self.folder, PartsFolder)

    def open(self, out: Folder | None, stack: ExitStack, *, saves: bool, resumes: bool) -> None:
        """Own the folder until the stack ends.

        One that has checkpoints is refused where the fit is not resumed.
        """
        keep = self.options.keep
        if out is not None:
            stack.enter_context(out.locked())
            self.folder = CheckpointFolder(out.path / "checkpoints" / self.options.phase, keep)
        with self.ranks.agreed(waiting=True):
            if self.folder is not None and self.folder.paths() and not resumes:
                instead = "go on with resume=True, or give another out or phase"
                raise MetaplError(f"{self.folder.folder} holds checkpoints already; {instead}.")
        networks = self.trainer.networks.values()
        has_shards = any(is_sharded(p) for network in networks for p in network.parameters())
        if not saves or not has_shards or self.ranks.alone:
            return
        # Where networks are sharded over all processes of the job, each writes its part. Elsewhere
        # the first process has everything, or could not say who else writes.
        place = self.ranks.gathered(self.folder and str(self.folder.folder.resolve()))[0]
        if self.ranks.processes == dist.get_world_size():
            parts = PartsFolder(place, keep)
            self.folder = parts
            stack.callback(parts.close)

    def newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        """Return the path of the newest whole checkpoint, and its state if this process read it.

        The first process looks for it, and all get its path.
        """
        match = None
        with self.ranks.agreed(waiting=True):
            if self.ranks.first and self.folder is not None:
                match = self.folder.newest()
        path: Path | None = self.ranks.gathered(match and match.path)[0]
        return path, None if match is None else match.state

    def read(self, path: Path, live_state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a checkpoint, with tensors that are sharded as in the fit's state."""
        if not path.is_dir():
            return load(path)
        like = sharded_tensors(live_state, self.trainer) if self.is_in_parts else {}
        return load_parts(path, like)

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after a step."""
        if not (self.ranks.alone or self.is_in_parts):
            state = gathered(state)
        with self.ranks.agreed(waiting=True):
            if self.folder is not None:
                self.folder.write(step, state)

    def go_on_from(self, path: Path) -> None:
        """Take a checkpoint for the last good one."""
        if self.folder is not None:
            self.folder.last = path

    def finish(self) -> None:
        """Wait until what is being written is whole."""
        if self.folder is not None:
            self.folder.finish()


def texts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as text: a dataclass shows its fields, and nothing where it is in memory."""
    return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in settings.items()}


def refuse_other_settings(
    stored: Mapping[str, str], current: Mapping[str, str], path: Path
) -> None:
    """Refuse to go on from a checkpoint of a fit with other data, options or settings."""
    groups = {name.rpartition(".")[0] for name in stored if name.endswith(".parameters")}
    groups_now = {name.rpartition(".")[0] for name in current if name.endswith(".parameters")}
    if missing := sorted(groups - groups_now):
        mend = "expected them, by add_param_group before the fit that resumes"
        raise MetaplError(f"{path} has param groups that are missing: {few(missing)}; {mend}.")
    changes = []
    for name in {**stored, **current}:
        if stored.get(name) != current.get(name):
            changes.append(f"{name} was {stored.get(name)}, now {current.get(name)}")
    if changes:
        expected = "expected the same, or resume='anyway'"
        raise MetaplError(f"{path} was begun otherwise ({few(changes)}); {expected}.")


def state_of_process(
    states: Sequence[dict[str, Any]], trainer: Fittable, path: Path, sources: Sources
) -> dict[str, Any]:
    """Return the state of this process among those of each process of a checkpoint.

    On another number of processes it is that of the first one; where the networks have dropout, the
    default generator is then seeded anew for each share.
    """
    ranks = trainer.ranks
    if len(states) == ranks.processes:
        if ranks.alone:
            return states[0]
        return states[ranks.gathered(dist.get_rank()).index(dist.get_rank())]
    if ranks.size > 1 and not sources.are_shared:
        raise MetaplError(f"{path} is of {len(states)} processes with data each; expected as many.")
    state = states[0]
    modules = [module for network in trainer.networks.values() for module in network.modules()]
    if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in modules):
        set_rng_state(state["rng"])
        torch.manual_seed(int(torch.randint(2**62, ())) + ranks.rank)
        state = {**state, "rng": rng_state()}
    return state


def sharded_tensors(state: dict[str, Any], trainer: Fittable) -> dict[str, Any]:
    """Return the sharded tensors of a fit's state, by their places in it."""
    tensors: dict[str, Any] = {}
    encoded(state, tensors)
    tensors = {place: t for place, t in tensors.items() if is_sharded(t)}
    # An optimizer's state may not be there yet; it is laid out as its parameters are.
    keys = []
    for key, value in state["trainer"].items():
        if isinstance(value, dict) and "param_groups" in value:
            keys.append(key)
    for key, optimizer in zip(keys, trainer.schedulable, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, p in enumerate(parameters):
            if is_sharded(p):
                tensors[f"trainer/{key}/state/{number}"] = p
    return tensors
