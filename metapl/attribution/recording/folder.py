"""The files of a recording, each of which is the old one or the whole new one.

    recording.ckpt       what was recorded: network, optimizer, versions; written at the first step
    state-00000000.ckpt  weights, optimizer state and moving buffers before step 0, and so on
    steps-00000000.ckpt  what is known of the steps from 0 on to the next state
    rows-00000000.ckpt   examples that were first seen in these steps, where no data set was given
    end-00000000.ckpt    what is known of the end, where no state could be written any more

A training that is killed leaves a recording of the steps up to its last state. Every file has a
checksum, and none can run code (:mod:`metapl.runs.checkpoint`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metapl.core.replays import state_digest
from metapl.errors import MetaplError
from metapl.execution.batch import Batch, map_tensors
from metapl.execution.numerics import Tree
from metapl.runs import checkpoint

DESCRIPTION = "recording.ckpt"


@dataclass
class StepRow:
    """What is known of one step.

    Attributes:
        numbers: of the examples in each call of the network, (B,) each.
        draws: the generators before each call, as :meth:`RandomState.values` has them; None where
            the call drew nothing.
        training_parts: the names of the parts that were in training mode in each call; None where
            they are those of the recording's first call.
        loss: the sum of the losses that were backpropagated; NaN where none was seen.
        clip_norm: the greatest norm of the gradient; None: it was not clipped.
        options: of the optimizer's param groups.
        without_gradient: the names of weights that the optimizer passed by, whose ``grad`` was
            None. One that is zero moves a weight by its momentum and decay.
    """

    numbers: list[Tensor]
    draws: list[dict[str, Any] | None]
    training_parts: list[list[str] | None]
    loss: float
    clip_norm: float | None
    options: list[dict[str, Any]]
    without_gradient: list[str]

    @property
    def sizes(self) -> list[int]:
        """Return how many examples each call has."""
        return [len(numbers) for numbers in self.numbers]


class KeptState(NamedTuple):
    """A state of the training before a step.

    Attributes:
        params: θ by name.
        optimizer: its state, by parameter and entry.
        buffers: those that a step moves, by name.
    """

    params: Tree
    optimizer: dict[str, dict[str, Any]]
    buffers: Tree

    def digest(self) -> Tensor:
        """Return the digest of weights and optimizer, (2, 256)."""
        return state_digest(self.params, self.optimizer)


class EndOfTraining(NamedTuple):
    """What is known of the network after the last step, where it holds other weights by now.

    Attributes:
        weights: the smallest of them, by its name.
        norms: of all weights by name, scalars.
        buffers: those that a step moves, by name.
    """

    weights: Tree
    norms: Tree
    buffers: Tree


class RecordingFolder:
    """Reads and writes the files of a recording.

    Args:
        path: the folder, which is made with the first file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def refuse_existing(self) -> None:
        """Refuse a folder that has a recording already."""
        if (self.path / DESCRIPTION).exists():
            raise MetaplError(
                f"{self.path} has a recording already; expected another folder for out, "
                "metapl.Recording.open to read it, or resume=True to go on with it."
            )

    def write_description(self, description: Mapping[str, Any]) -> None:
        checkpoint.save(self.path / DESCRIPTION, description)

    def read_description(self) -> dict[str, Any]:
        """Return what was recorded, or refuse a folder without a recording."""
        if not (self.path / DESCRIPTION).is_file():
            raise MetaplError(
                f"{self.path} has no {DESCRIPTION}; expected a folder that metapl.record wrote: "
                "the training inside `with metapl.record(...)`, and in it a first step of an "
                "optimizer over the network's weights that was not refused."
            )
        return checkpoint.load(self.path / DESCRIPTION)

    def write_state(self, number: int, state: KeptState) -> None:
        """Write the state before a step."""
        contents = {"number": number, **state._asdict(), "digest": state.digest()}
        checkpoint.save(self._file("state", number), contents)

    def read_state(self, number: int, device: torch.device) -> tuple[KeptState, Tensor]:
        """Return the state before a step, on a device, and its digest; refuse another one."""
        contents = checkpoint.load(self._file("state", number))
        state = KeptState(
            params={name: t.to(device) for name, t in contents["params"].items()},
            # Counts stay on the host, as torch has them.
            optimizer=map_tensors(lambda t: t.to(device) if t.ndim else t, contents["optimizer"]),
            buffers={name: t.to(device) for name, t in contents["buffers"].items()},
        )
        digest = contents["digest"].to(device)
        if contents["number"] != number:
            raise MetaplError(
                f"{self._file('state', number)} has the state before step {contents['number']}; "
                f"expected that before step {number}."
            )
        return state, digest

    def write_end(self, number: int, end: EndOfTraining) -> None:
        """Write what is known of the network before a step that did not come."""
        checkpoint.save(self._file("end", number), end._asdict())

    def read_end(self, number: int, device: torch.device) -> EndOfTraining | None:
        """Return what :meth:`write_end` has written; None for none."""
        if not self._file("end", number).is_file():
            return None
        contents = checkpoint.load(self._file("end", number))
        return EndOfTraining(**map_tensors(lambda t: t.to(device), contents))

    def write_steps(self, first: int, rows: Sequence[StepRow]) -> None:
        """Write what is known of the steps from ``first`` on.

        The numbers of all examples are one tensor, and so are the states of torch's generator.
        """
        numbers = [t for row in rows for t in row.numbers]
        draws = [values for row in rows for values in row.draws if values is not None]
        others = [{key: v for key, v in values.items() if key != "cpu"} for values in draws]
        contents = {
            "numbers": torch.cat(numbers),
            "sizes": [row.sizes for row in rows],
            "has_draws": [[values is not None for values in row.draws] for row in rows],
            "cpu": torch.stack([values["cpu"] for values in draws]) if draws else None,
            "other_generators": others,
            "training_parts": [row.training_parts for row in rows],
            "losses": [row.loss for row in rows],
            "clip_norms": [row.clip_norm for row in rows],
            "options": [row.options for row in rows],
            "without_gradient": [row.without_gradient for row in rows],
        }
        checkpoint.save(self._file("steps", first), contents)

    def write_examples(self, first: int, parts: Sequence[Batch], examples: Sequence[int]) -> None:
        """Write the rows that were first seen in the steps from ``first`` on.

        Args:
            parts: of batches, with these rows.
            examples: the number of the example that each row is.
        """
        contents = {"parts": [*parts], "examples": [*examples]}
        checkpoint.save(self._file("rows", first), contents)

    def read_steps(self) -> list[StepRow]:
        """Return the steps, or refuse a folder that lacks some of them.

        A file of later steps shows that, and so does a later state: it is written after the steps.
        """
        rows: list[StepRow] = []
        while self._file("steps", len(rows)).is_file():
            rows += rows_of(checkpoint.load(self._file("steps", len(rows))))
        last = max([*self._numbers("steps"), *self._numbers("end"), *self.states()], default=0)
        if last > len(rows):
            raise MetaplError(
                f"the recording in {self.path} has files of step {last}, and no "
                f"{self._file('steps', len(rows)).name}; expected that file, or the folder without "
                "the later ones."
            )
        return rows

    def cut(self, step: int) -> None:
        """Drop what is known of a step and of those after it, but for the state before it.

        The latest goes first, so that what is left when this is killed is a recording too.
        """
        numbers = {n for kind in ("end", "state", "steps", "rows") for n in self._numbers(kind)}
        for number in sorted(numbers, reverse=True):
            if number < step:
                return
            self._file("end", number).unlink(missing_ok=True)
            if number > step:
                self._file("state", number).unlink(missing_ok=True)
            self._file("steps", number).unlink(missing_ok=True)
            self._file("rows", number).unlink(missing_ok=True)

    def read_examples(self, before: float = math.inf) -> tuple[list[Batch], list[int]]:
        """Return the rows that the recording has itself, and the number of each one's example.

        Args:
            before: those alone that were first seen before this step.
        """
        parts: list[Batch] = []
        examples: list[int] = []
        for number in self._numbers("rows"):
            if number >= before:
                break
            contents = checkpoint.load(self._file("rows", number))
            parts += contents["parts"]
            examples += contents["examples"]
        return parts, examples

    def states(self) -> list[int]:
        """Return before which steps there are states."""
        return self._numbers("state")

    def _numbers(self, kind: str) -> list[int]:
        """Return the numbers of the files of a kind."""
        stems = [path.stem.partition("-")[2] for path in self.path.glob(f"{kind}-*.ckpt")]
        return sorted(int(number) for number in stems if number.isdecimal())

    def _file(self, kind: str, number: int) -> Path:
        return self.path / f"{kind}-{number:08d}.ckpt"


def rows_of(contents: Mapping[str, Any]) -> list[StepRow]:
    """Return the steps that :meth:`RecordingFolder.write_steps` has written."""
    sizes = [size for sizes_of_step in contents["sizes"] for size in sizes_of_step]
    numbers = iter(contents["numbers"].split(sizes))
    cpu_states = iter(() if contents["cpu"] is None else contents["cpu"])
    other_generators = iter(contents["other_generators"])
    rows: list[StepRow] = []
    for step, sizes_of_step in enumerate(contents["sizes"]):
        draws: list[dict[str, Any] | None] = []
        for has_draws in contents["has_draws"][step]:
            values = None
            if has_draws:
                # A generator reads its state from the beginning of a tensor's memory.
                values = {"cpu": next(cpu_states).clone(), **next(other_generators)}
            draws.append(values)
        row = StepRow(
            numbers=[next(numbers) for _ in sizes_of_step],
            draws=draws,
            training_parts=contents["training_parts"][step],
            loss=contents["losses"][step],
            clip_norm=contents["clip_norms"][step],
            options=contents["options"][step],
            without_gradient=contents["without_gradient"][step],
        )
        rows.append(row)
    return rows
