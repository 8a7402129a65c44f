"""Where a recording goes on, of a loop that goes on from a checkpoint of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metapl.attribution.recording.folder import KeptState, RecordingFolder
from metapl.errors import MetaplError, few

# What is the same in all parts of a recording, by its names in the description.
OF_ONE_LOOP = (
    "torch",
    "device",
    "network",
    "weights",
    "fixed",
    "autocast",
    "optimizer",
    "groups",
    "problem",
    "fields of the problem",
    "keys",
    "has_labels",
    "constants",
    "states_every",
    "examples",
)
IN_WORDS = {
    "weights": "network",
    "fixed": "network (its frozen weights or buffers)",
    "groups": "split of the weights into param groups",
    "examples": "data set",
    "keys": "form of the batches",
    "has_labels": "form of the batches",
    "factor": "factor of the loss",
}
# The factor of the loss is the quotient of two losses.
FACTORS_DIFFER = 1e-3


def step_of_kept_state(folder: RecordingFolder, current: KeptState, device: torch.device) -> int:
    """Return the step of a recording before which a loop is, by the kept states.

    Args:
        current: the weights, the optimizer's state and all buffers now.
    """
    current_digest = current.digest()

    def is_current(number: int) -> bool:
        state, digest = folder.read_state(number, device)
        has_buffers = all(torch.equal(b, current.buffers[n]) for n, b in state.buffers.items())
        return has_buffers and torch.equal(current_digest, digest)

    numbers = folder.states()
    for place, number in reversed([*enumerate(numbers)]):
        if not is_current(number):
            continue
        if place > 0 and is_current(numbers[place - 1]):
            raise MetaplError(
                f"record: resume=True was given, and the states before steps {numbers[place - 1]} "
                f"and {number} in {folder.path} are the same, as by a learning rate of 0; expected "
                "a loop that goes on from another state, or another folder for out."
            )
        return number
    raise MetaplError(
        "record: resume=True was given, and the network with its optimizer is in no state that "
        f"{folder.path} keeps, those before step {few(map(str, numbers))}; expected a loop that "
        "goes on from a checkpoint of its own (weights, buffers, optimizer) of one of these steps, "
        "or another folder for out."
    )


def refuse_other_loop(
    recorded: Mapping[str, Any], current: Mapping[str, Any], folder: RecordingFolder
) -> None:
    """Refuse to go on with a recording of another network, data set or loop.

    Args:
        recorded, current: the descriptions of the recording and of the loop now.
    """
    differing = [
        name
        for name in OF_ONE_LOOP
        # Recordings of earlier versions have no fields of the problem.
        if name in recorded and not is_equal(recorded[name], current[name])
    ]
    if not math.isclose(recorded["factor"], current["factor"], rel_tol=FACTORS_DIFFER):
        differing.append("factor")
    if not differing:
        return
    name = differing[0]
    difference = f"with another {IN_WORDS.get(name, name)}"
    if name not in IN_WORDS:
        difference = f"with {name} {recorded[name]!r:.60}, and this is {current[name]!r:.60}"
    raise MetaplError(
        f"record: resume=True was given, and the recording in {folder.path} was made {difference}; "
        "expected the loop of the recording, or another folder for out."
    )


def is_equal(one: Any, two: Any) -> bool:
    """Return whether two values of a description are equal."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one.cpu(), two.cpu())
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return False
    return bool(one == two)
