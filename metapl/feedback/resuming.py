"""A long path in a folder, by which the same call goes on after the process was killed.

    path.ckpt      whose path it is, as a digest of what was given, and the generators at its beginning
    kept-N.ckpt    θ and s before step N, for the way back; of the last N, after all steps
    steps-N.ckpt   the steps before N since the last such file, and what the networks and generators had come to
    adjoint.ckpt   the cotangents at step N, and the feedback on the steps from there on

Each file is the old one or the whole new one, with its checksum (:mod:`metapl.runs.checkpoint`). A path that has ended
removes them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import digest
from metapl.execution.local import LocalStudent
from metapl.execution.rng import RandomState
from metapl.execution.state import State
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.keeping import Keeping, States, folder_of
from metapl.feedback.teacher import TeacherPass, Teaching
from metapl.problems.base import Signal, enters_input, kind_of
from metapl.runs import checkpoint
from metapl.runs.folder import Folder as OwnedFolder
from metapl.updates import Update

if TYPE_CHECKING:
    from metapl.feedback.path import Path

_PATH, _ADJOINT = "path.ckpt", "adjoint.ckpt"


@contextmanager
def states_in(
    folder: FilePath,
    student: LocalStudent,
    teach: Teaching,
    update: Update,
    inner_optimizer: Any,
    options: Sequence[Any],
    labeled: Any,
    first: Any,
) -> Iterator[Folder]:
    """The states of a path in a folder that nobody else writes to; a path that ends removes them.

    Args:
        folder: that exists.
        student, teach: their modules, with the state that they begin with.
        update, inner_optimizer, options: U, what it was made of, and the options of each step.
        labeled, first: the outer batch, and the first inner one.
    """

    def network(module: nn.Module) -> Any:
        modes = [part.training for part in module.modules()]
        return str(module), modes, dict(module.named_parameters()), dict(module.named_buffers())

    mode, kind, problem, generator = teach.mode, student.device.type, teach.problem, teach.generator
    groups = [{**group, "params": len(group["params"])} for group in getattr(inner_optimizer, "param_groups", [])]
    rule = type(inner_optimizer).__name__, groups, str(options), getattr(update, "max_norm", None), update.read_state()
    losses = kind_of(problem), {name: str(value) for name, value in vars(problem).items()}
    how = mode.name, str({**vars(mode), "keep_on": None}), teach.steps, teach.parts
    drawn = torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind)), generator and generator.get_state()
    of = digest((network(student.module), network(teach.network), labeled, first, rule, losses, how, drawn))
    with OwnedFolder(folder).held():
        states = Folder(folder, int(of), student, teach, update)
        yield states
        states.finish()


def generators_at_start(folder: str | None) -> RandomState | None:
    """The generators at the beginning of the path that a killed process has left in a folder; None without one."""
    place = folder_of(folder)
    if place is None or not _has_path(place):
        return None
    random = checkpoint.load(place / _PATH)["content"]["random"]
    where = torch.device("cpu" if random["accelerator"] is None else torch.accelerator.current_accelerator() or "cpu")
    return RandomState(where, **random)


class Folder(States):
    """The states of a path in a folder, and all that it needs to be gone on with; ``of`` is the digest of what the path
    depends on."""

    def __init__(self, folder: FilePath, of: int, student: LocalStudent, teach: Teaching, update: Update) -> None:
        super().__init__("cpu")  # nothing is held
        self.folder, self.student, self.teach, self.update = folder, student, teach, update
        if enters_input(teach.problem):
            raise MetaplError(
                f"keep_on={str(folder)!r}: no file holds the graph of a signal that enters the student's input; "
                'expected keep_on="cpu", or None.'
            )
        for left in folder.glob("*.tmp"):  # of processes that were killed
            left.unlink(missing_ok=True)
        if not _has_path(folder):
            self.finish()
            self._write(_PATH, of=of, random=RandomState.now(student.device).values())
        if self._read(_PATH)["of"] != of:
            raise MetaplError(
                f"keep_on={str(folder)!r} holds the states of a path of other networks, batches or options; expected "
                f"the call that was killed, or another folder. To begin anew in this one, remove {folder / _PATH}."
            )
        self.done = max(_numbers(folder, "steps"), default=0)
        self.adjoint = self._read(_ADJOINT) if (folder / _ADJOINT).exists() else None

    # ------------------------------------------------------------------------------------------------ the run forward

    def resume(self, path: Path, updates: Sequence[Update]) -> Any:
        """Give a path the steps that were taken before, and the networks and generators what they had come to; θ and s
        after them."""
        student, teach = self.student, self.teach
        begun = [slots.state or State(slots) for slots in (student.slots, teach.slots)]
        for number in _numbers(self.folder, "steps"):
            found = self._read(f"steps-{number:08d}.ckpt")
            for signal, loss, known, records in found["steps"]:
                rule = updates[len(path.steps)] if updates else path.update
                passes = [student.pass_type.recorded(student, begun[0], part) for part in records]
                given = path.problem, rule, passes, None, Signal(**signal), loss
                path.steps.append(InnerStep(*given, grads={}, state=None, by_optimizer=True, digest=known))
            for outputs, signal, random, state, drawn in found["passes"]:
                asked = RandomState(student.device, **random), begun[1].with_values(state), drawn
                teach.passes.append(TeacherPass(None, outputs, Signal(**signal), *asked))
        path.keeping = Keeping(tuple(found["spacings"]), str(self.folder))
        for state, values in zip(begun, found["states"], strict=True):
            state.with_values(values).restore()
        student.slots.state = None
        RandomState(student.device, **found["random"]).restore()
        if teach.generator is not None:
            teach.generator.set_state(found["drawn"])
        moved = self.take(self.done)
        if self.done == teach.steps:
            vars(path.steps[-1])["updated"] = moved
        if self.adjoint is not None:
            path.feedback, path.in_settings = self.adjoint["found"], self.adjoint["in_settings"]
            vars(path)["outer_loss"] = self.adjoint["outer_loss"]
        return moved

    def note(self, path: Path, number: int, params: Any, state: Any) -> None:
        """Keep the state before step ``number``, with the steps since the last one, so that the path goes on there."""
        super().note(path, number, params, state)
        parts, generator = self.teach.parts, self.teach.generator
        self._write(
            f"steps-{number:08d}.ckpt",
            steps=[
                [vars(step.signal), step.inner_loss, step.digest, [part.record() for part in step.passes]]
                for step in path.steps[self.done : number]
            ],
            passes=[
                [p.student_outputs, vars(p.signal.detached()), p.random.values(), p.state.values(), p.drawn]
                for p in self.teach.passes[self.done * parts : number * parts]
                if p.random is not None and p.state is not None  # all are computed again
            ],
            states=[State(slots).values() for slots in (self.student.slots, self.teach.slots)],
            random=RandomState.now(self.student.device).values(),
            drawn=None if generator is None else generator.get_state(),
            spacings=list(path.keeping.spacings),
        )
        self.done = number

    # --------------------------------------------------------------------------------------------------- the way back

    def passed(self, path: Path, number: int, v: Any, state_cotangent: Any) -> None:
        """The adjoint has come to the kept state before step ``number``: those from there on are no longer needed."""
        found, loss, own = path.feedback, path.outer_loss, path.in_settings
        self._write(
            _ADJOINT, at=number, found=found, outer_loss=loss, in_settings=own, v=v, state_cotangent=state_cotangent
        )
        for other in _numbers(self.folder, "kept"):
            if number <= other < self.teach.steps:
                (self.folder / f"kept-{other:08d}.ckpt").unlink()

    def finish(self) -> None:
        """Remove the files of the path, its name first: what is left without it is nobody's."""
        numbered = [f"{kind}-{number:08d}.ckpt" for kind in ("steps", "kept") for number in _numbers(self.folder, kind)]
        for name in (_PATH, _ADJOINT, *numbered):
            (self.folder / name).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------- the files

    def keep(self, number: int, state: Any) -> None:
        if number not in _numbers(self.folder, "kept"):
            params, inner = state
            tree = inner if type(inner) is dict else pytree.tree_leaves(inner)  # of torch.optim, of TorchOpt
            self._write(f"kept-{number:08d}.ckpt", params=params, state=tree)

    def take(self, number: int) -> Any:
        found = self._read(f"kept-{number:08d}.ckpt")
        if type(found["state"]) is not dict:
            found["state"] = pytree.tree_unflatten(found["state"], pytree.tree_structure(self.update.read_state()))
        return found["params"], found["state"]

    def _write(self, name: str, **content: Any) -> None:
        places = [str(t.device) if isinstance(t, Tensor) else "" for t in pytree.tree_leaves(content)]
        checkpoint.save(self.folder / name, {"content": content, "places": places})

    def _read(self, name: str) -> Any:
        found = checkpoint.load(self.folder / name)
        leaves, structure = pytree.tree_flatten(found["content"])
        places = zip(leaves, found["places"], strict=True)
        return pytree.tree_unflatten([t.to(at) if at else t for t, at in places], structure)


def _has_path(folder: FilePath) -> bool:
    # Without its first file, a path ended while its files were removed.
    return (folder / _PATH).exists() and bool(_numbers(folder, "steps"))


def _numbers(folder: FilePath, kind: str) -> list[int]:
    return sorted(int(file.stem[-8:]) for file in folder.glob(f"{kind}-{'[0-9]' * 8}.ckpt"))
