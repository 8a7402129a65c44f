"""A long path in a folder, by which the same call goes on after the process was killed.

    path.ckpt      whose path it is, as digests of what was given, and the generators at its beginning
    kept-N.ckpt    θ and s before step N, for the way back; of the last N, after all steps
    steps-N.ckpt   the steps before N since the last such file, and what the networks and generators had come to
    adjoint.ckpt   the cotangents at step N, and the feedback on the steps from there on

Each file is the old one or the whole new one, with its checksum (:mod:`metapl.runs.checkpoint`). A path that has ended
removes them all.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import digest
from metapl.execution.local import LocalStudent, Pass
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
_NUMBERED = re.compile(r"(kept|steps)-(\d{8,})\.ckpt")


def known_by(
    student: LocalStudent,
    teach: Teaching,
    update: Update,
    inner_optimizer: Any,
    options: Sequence[Any],
    labeled: Any,
    first: Any,
) -> dict[str, Any]:
    """What a path depends on, by name, as numbers by which it is known; ``options``: of the inner optimizer in each
    step; ``labeled``, ``first``: the outer batch, and the first inner one."""

    def known(value: Any) -> int:
        return int(digest(value))

    def network(module: nn.Module) -> Any:
        return (
            str(module),
            [part.training for part in module.modules()],
            {
                **dict(module.named_parameters()),
                **dict(module.named_buffers()),
            },
        )

    groups = getattr(inner_optimizer, "param_groups", [])
    rule = type(inner_optimizer).__name__, str([{**group, "params": len(group["params"])} for group in groups])
    mode, kind = teach.mode, student.device.type
    return {
        "a student": known(network(student.module)),
        "a teacher": known(network(teach.network)),
        "batches": known((labeled, first)),
        "a number of steps": teach.steps,
        "an inner optimizer": known((*rule, str(options), getattr(update, "max_norm", None), update.read_state())),
        "a problem": known((kind_of(teach.problem), str(sorted(vars(teach.problem).items())))),
        "a precision": known((torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind)))),
        "a generator": known(None if teach.generator is None else teach.generator.get_state()),
        "a mode": known((mode.name, str({**vars(mode), "keep_on": None}), teach.parts)),
    }


def generators_at_start(folder: str | None) -> RandomState | None:
    """The generators at the beginning of the path that a killed process has left in a folder; None without one."""
    place = folder_of(folder)
    if place is None or not _has_path(place):
        return None
    random = checkpoint.load(place / _PATH)["content"]["random"]
    where = torch.device("cpu" if random["accelerator"] is None else torch.accelerator.current_accelerator() or "cpu")
    return RandomState(where, **random)


class Folder(States):
    """The states of a path in a folder, and all that it needs to be gone on with; one process at a time has it.

    Args:
        folder: that exists.
        of: what the path depends on, as :func:`known_by` has it.
        student, teach: their modules, with the state that they begin with.
        update: U.
    """

    def __init__(
        self, folder: FilePath, of: Mapping[str, Any], student: LocalStudent, teach: Teaching, update: Update
    ) -> None:
        super().__init__("cpu")  # nothing is held
        self.name = ""  # of the path, by which its files are known
        self.folder, self.student, self.teach, self.update = folder, student, teach, update
        self.bases = [slots.state or State(slots) for slots in (student.slots, teach.slots)]
        self._written = set[int]()  # the states that are kept, of this process
        if enters_input(teach.problem):
            raise MetaplError(
                f"keep_on={str(folder)!r} was given, and the signal of {kind_of(teach.problem)} enters the student's "
                'input, whose graph no file holds; expected keep_on="cpu", or None.'
            )
        for left in self.folder.glob("*.tmp"):  # of processes that were killed
            left.unlink(missing_ok=True)
        if not _has_path(folder):
            self.finish()
            content = {"of": dict(of), "random": RandomState.now(student.device).values(), "name": secrets.token_hex(8)}
            self._write(_PATH, content)
        found = self._read(_PATH)
        known, self.name = found["of"], found["name"]
        others = [name for name in of if known.get(name) != of[name]]
        if others:
            raise MetaplError(
                f"keep_on={str(folder)!r} holds the states of another path, begun with {' and '.join(others)} "
                "other than now; expected the call that was killed, to go on with it, or another folder. To begin anew "
                f"in this one, remove {self.folder / _PATH}."
            )
        self.done = max(_numbers(self.folder, "steps"), default=0)
        self.adjoint = self._read(_ADJOINT) if (self.folder / _ADJOINT).exists() else None

    # ------------------------------------------------------------------------------------------------ the run forward

    def resume(self, path: Path, updates: Sequence[Update]) -> Any:
        """Give a path the steps that were taken before, and the networks and generators what they had come to; θ and s
        after them."""
        for number in sorted(_numbers(self.folder, "steps")):
            found = self._read(f"steps-{number:08d}.ckpt")
            for record in found["steps"]:
                rule = updates[len(path.steps)] if updates else path.update
                passes = [self._student_pass(part) for part in record["passes"]]
                plain = {"inner_loss": record["inner_loss"], "digest": record["digest"]}
                signal = Signal(**record["signal"])
                step = InnerStep(
                    self.teach.problem, rule, passes, None, signal, grads={}, state=None, as_taken=True, **plain
                )
                path.steps.append(step)
            self.teach.passes += map(self._teacher_pass, found["passes"])
        path.keeping = Keeping(tuple(found["spacings"]), str(self.folder))
        for base, values in zip(self.bases, found["states"], strict=True):
            base.having(values).restore()
        self.student.slots.state = None
        RandomState(self.student.device, **found["random"]).restore()
        if self.teach.generator is not None:
            self.teach.generator.set_state(found["drawn"])
        moved = self.take(self.done)
        if self.done == self.teach.steps:
            vars(path.steps[-1])["moved"] = moved
        if self.adjoint is not None:
            path.found, vars(path)["outer_loss"] = self.adjoint["found"], self.adjoint["outer_loss"]
        return moved

    def note(self, path: Path, number: int, params: Any, state: Any) -> None:
        """Keep the state before step ``number``, with the steps since the last one, so that the path goes on there."""
        self.keep(number, (params, state))
        passes, self_done = self.teach.passes, self.done * self.teach.parts
        content = {
            "steps": [
                {
                    "signal": vars(step.signal),
                    "inner_loss": step.inner_loss,
                    "digest": step.digest,
                    "passes": [self._record_student(part) for part in step.passes],
                }
                for step in path.steps[self.done : number]
            ],
            "passes": [
                {
                    "signal": vars(part.signal.detached()),
                    "outputs": part.student_outputs,
                    "random": part.random.values(),
                    "state": part.state.values(),
                    "drawn": part.drawn,
                }
                for part in passes[self_done : number * self.teach.parts]
            ],
            "states": [State(slots).values() for slots in (self.student.slots, self.teach.slots)],
            "random": RandomState.now(self.student.device).values(),
            "drawn": None if self.teach.generator is None else self.teach.generator.get_state(),
            "spacings": list(path.keeping.spacings),
        }
        self._write(f"steps-{number:08d}.ckpt", content)
        self.done = number

    def _record_student(self, part: Pass) -> dict[str, Any]:
        return {
            "outputs": part.outputs if part._sample is None else part.outputs.new_empty(0),
            "sample": part._sample,
            "shape": part.outputs.shape,
            "state": part._state.values(),
            "before": part._before.values(),
            "after": part.after.values(),
            "dtype": str(part._dtype).removeprefix("torch."),
        }

    def _student_pass(self, record: Mapping[str, Any]) -> Pass:
        """A pass that has been run, without its θ and inputs, which the way back computes again."""
        part = object.__new__(self.student.pass_type)
        part.student, part.params, part.inputs, part.graph = self.student, {}, None, None
        part._kept, part._at, part._held = None, {}, []
        part._state, part._sample = self.bases[0].having(record["state"]), record["sample"]
        part._before, part.after = (RandomState(self.student.device, **record[name]) for name in ("before", "after"))
        part._dtype, part.outputs = getattr(torch, record["dtype"]), record["outputs"]
        if part._sample is not None:
            part.outputs = part.outputs.new_zeros(()).expand(record["shape"])
        return part

    def _teacher_pass(self, record: Mapping[str, Any]) -> TeacherPass:
        part = object.__new__(TeacherPass)
        part.teaching, part.batch, part.student_outputs = self.teach, None, record["outputs"]
        part.random, part.state = (
            RandomState(self.student.device, **record["random"]),
            self.bases[1].having(record["state"]),
        )
        part.signal, part.drawn = Signal(**record["signal"]), record["drawn"]
        return part

    # --------------------------------------------------------------------------------------------------- the way back

    def passed(self, path: Path, number: int, v: Any, state_cotangent: Any) -> None:
        """The adjoint has come to the kept state before step ``number``: those from there on are no longer needed."""
        cotangents = {"v": v, "state_cotangent": state_cotangent}
        self._write(_ADJOINT, {"at": number, "found": path.found, "outer_loss": path.outer_loss, **cotangents})
        for other in _numbers(self.folder, "kept"):
            if number <= other < self.teach.steps:
                self._remove(other)

    def finish(self) -> None:
        """Remove the files of the path, its name first: what is left without it is nobody's."""
        for file in (_PATH, _ADJOINT):
            (self.folder / file).unlink(missing_ok=True)
        for kind in ("steps", "kept"):
            for number in _numbers(self.folder, kind):
                (self.folder / f"{kind}-{number:08d}.ckpt").unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------- the files

    def keep(self, number: int, state: Any) -> None:
        if number not in self._written:
            params, inner = state
            tree = inner if type(inner) is dict else pytree.tree_leaves(inner)  # of torch.optim, of TorchOpt
            self._write(f"kept-{number:08d}.ckpt", {"params": params, "state": tree})
            self._written.add(number)

    def take(self, number: int) -> Any:
        found = self._read(f"kept-{number:08d}.ckpt")
        if type(found["state"]) is not dict:
            found["state"] = pytree.tree_unflatten(found["state"], pytree.tree_structure(self.update.read_state()))
        return found["params"], found["state"]

    def _remove(self, number: int) -> None:
        (self.folder / f"kept-{number:08d}.ckpt").unlink(missing_ok=True)
        self._written.discard(number)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        leaves = pytree.tree_leaves(content)
        places = [str(t.device) if isinstance(t, Tensor) else "" for t in leaves]
        checkpoint.save(self.folder / name, {"content": content, "places": places, "of": [self.name, name]})

    def _read(self, name: str) -> Any:
        found = checkpoint.load(self.folder / name)
        if found["of"] != [self.name, name]:
            raise MetaplError(
                f"{self.folder / name} was not written by this path under this name, so the path in this folder cannot "
                f"be gone on with; to begin anew, remove {self.folder / _PATH}."
            )
        leaves, structure = pytree.tree_flatten(found["content"])
        places = zip(leaves, found["places"], strict=True)
        return pytree.tree_unflatten([t.to(at) if at else t for t, at in places], structure)


@contextmanager
def states_in(
    folder: FilePath, of: Mapping[str, Any], student: LocalStudent, teach: Teaching, update: Update
) -> Iterator[Folder]:
    """The states of a path in a folder that nobody else writes to; a path that ends removes them."""
    with OwnedFolder(folder).held():
        states = Folder(folder, of, student, teach, update)
        yield states
        states.finish()


def _has_path(folder: FilePath) -> bool:
    # Without its first file, a path ended while its files were removed.
    return (folder / _PATH).exists() and bool(_numbers(folder, "steps"))


def _numbers(folder: FilePath, kind: str) -> list[int]:
    names = (_NUMBERED.fullmatch(file.name) for file in folder.iterdir())
    return [int(name[2]) for name in names if name is not None and name[1] == kind]
