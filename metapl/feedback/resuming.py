"""A long compiled path in a folder, by which the same call goes on after the process was killed.

    path.ckpt      whose path it is, as a digest of what was given, and the generators at its beginning
    kept-N.ckpt    the state before step N, for the way back; of the last N, after all steps
    steps-N.ckpt   what is known of the steps before N since the last such file
    adjoint.ckpt   the cotangents at step N, and the feedback on the steps from there on

Each file is the old one or the whole new one, with its checksum (:mod:`metapl.runs.checkpoint`). A path that has ended
removes them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import digest
from metapl.execution.state import RandomState
from metapl.feedback.keeping import States, folder_of
from metapl.problems.base import Problem, kind_of
from metapl.runs import checkpoint
from metapl.runs.folder import Folder as OwnedFolder
from metapl.updates import Update

_PATH, _ADJOINT = "path.ckpt", "adjoint.ckpt"


def known_by(
    student: nn.Module,
    teacher: nn.Module,
    problem: Problem,
    mode: Any,
    update: Update,
    optimizer: torch.optim.Optimizer,
    *given: Any,
) -> int:
    """A number by which a path is known: by networks, losses, U, mode, autocast, and what else was ``given``."""

    def network(module: nn.Module) -> Any:
        modes = [part.training for part in module.modules()]
        return str(module), modes, dict(module.named_parameters()), dict(module.named_buffers())

    kind = next(student.parameters()).device.type
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    rule = type(optimizer).__name__, str(groups), update.read_state()
    own = vars(problem).items()  # the words of a tensor are rounded
    losses = kind_of(problem), {name: value if isinstance(value, Tensor) else str(value) for name, value in own}
    how = mode.name, str({**vars(mode), "keep_on": None})
    cast = torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))
    return int(digest((network(student), network(teacher), rule, losses, how, cast, given)))


def generators_at_start(folder: str | None) -> RandomState | None:
    """The generators at the beginning of the path that a killed process has left in a folder; None without one."""
    place = folder_of(folder)
    if place is None or not _has_path(place):
        return None
    random = checkpoint.load(place / _PATH)["content"]["random"]
    where = torch.device("cpu" if random["accelerator"] is None else torch.accelerator.current_accelerator() or "cpu")
    return RandomState(where, **random)


class Folder(States):
    """Kept states in a folder, and what else a path of so many ``steps``, known by the number ``of``, goes on with."""

    def __init__(self, folder: FilePath, of: int, steps: int, device: torch.device) -> None:
        super().__init__("cpu")  # nothing is held
        self.folder, self.of, self.steps, self.device = folder, of, steps, device

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Own the folder until the block ends; a path that ends removes its files."""
        with OwnedFolder(self.folder).held():
            for left in self.folder.glob("*.tmp"):  # of processes that were killed
                left.unlink(missing_ok=True)
            if not _has_path(self.folder):
                self.finish()
                self._write(_PATH, of=self.of, random=RandomState.now(self.device).values())
            if self._read(_PATH)["of"] != self.of:
                given = f"keep_on={str(self.folder)!r} holds a path of other networks, batches or options"
                raise MetaplError(f"{given}; expected the call that was killed, or {self.folder / _PATH} removed.")
            self.done = max(_numbers(self.folder, "steps"), default=0)
            self.adjoint = self._read(_ADJOINT) if (self.folder / _ADJOINT).exists() else None
            yield self
            self.finish()

    def came_to(self, number: int, **known: Any) -> None:
        """The run forward has kept the state before step ``number``; ``known``: of the steps since the last call."""
        self._write(f"steps-{number:08d}.ckpt", **known)
        self.done = number

    def known(self) -> list[Any]:
        return [self._read(f"steps-{number:08d}.ckpt") for number in _numbers(self.folder, "steps")]

    def came_back_to(self, number: int, **found: Any) -> None:
        """The adjoint has come to the kept state before step ``number``: those from there on are no longer needed."""
        self._write(_ADJOINT, at=number, **found)
        for other in _numbers(self.folder, "kept"):
            if number <= other < self.steps:
                (self.folder / f"kept-{other:08d}.ckpt").unlink()

    def finish(self) -> None:
        """Remove the files of the path, its name first: what is left without it is nobody's."""
        numbered = [f"{kind}-{number:08d}.ckpt" for kind in ("steps", "kept") for number in _numbers(self.folder, kind)]
        for name in (_PATH, _ADJOINT, *numbered):
            (self.folder / name).unlink(missing_ok=True)

    def keep(self, number: int, state: Any) -> None:
        if number not in _numbers(self.folder, "kept"):
            self._write(f"kept-{number:08d}.ckpt", state=state)

    def take(self, number: int) -> Any:
        return self._read(f"kept-{number:08d}.ckpt")["state"]

    def _write(self, name: str, **content: Any) -> None:
        places = [(str(t.device), t.stride()) if isinstance(t, Tensor) else None for t in pytree.tree_leaves(content)]
        checkpoint.save(self.folder / name, {"content": content, "places": places})

    def _read(self, name: str) -> Any:
        found = checkpoint.load(self.folder / name)
        leaves, structure = pytree.tree_flatten(found["content"])

        def placed(t: Any, device: str, stride: Sequence[int]) -> Tensor:  # kernels round by the order of the memory
            made = torch.empty_strided(t.shape, stride, dtype=t.dtype, device=device)
            return made.copy_(t)

        places = pytree.tree_leaves(found["places"], is_leaf=lambda place: place is None or isinstance(place, tuple))
        pairs = zip(leaves, places, strict=True)
        return pytree.tree_unflatten([t if at is None else placed(t, *at) for t, at in pairs], structure)


def _has_path(folder: FilePath) -> bool:
    # Without its first file, a path ended while its files were removed.
    return (folder / _PATH).exists() and bool(_numbers(folder, "steps"))


def _numbers(folder: FilePath, kind: str) -> list[int]:
    return sorted(int(file.stem[-8:]) for file in folder.glob(f"{kind}-{'[0-9]' * 8}.ckpt"))
