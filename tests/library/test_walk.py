"""The way back over kept states: which steps it takes again, and what it holds meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metapl import MetaplError
from metapl.core.keeping import Keeping
from metapl.core.replays import ReplayCheck
from metapl.core.walk import States, Walk

STEPS = 23
State = tuple[dict[str, Tensor], None]


class Doubling:
    """Steps that double a number and add their own, by which each state is another one.

    Attributes:
        held: the states before the steps that are held, by number.
        most: the greatest number of steps that were held at once.
        ends: how often the end of a step was asked for.
        noise: is added to each end.
    """

    def __init__(self) -> None:
        self.held: dict[int, State] = {}
        self.most = 0
        self.ends = 0
        self.noise = 0.0

    def hold(self, number: int, state: State) -> None:
        self.held[number] = state
        self.most = max(self.most, len(self.held))

    def after(self, number: int, state: State | None = None) -> State:
        self.ends += 1
        params, _ = self.held[number]
        return {"x": (2 * params["x"] + number + self.noise) % 1009}, None

    def forget(self, number: int) -> None:
        del self.held[number]


def walked(spacings: tuple[int, ...], steps: Doubling) -> tuple[Walk, list[State]]:
    """Return a walk that has gone forward, and the states on its way."""
    walk = Walk(steps, States(None), spacings, ReplayCheck())
    states: list[State] = [({"x": torch.ones(1, dtype=torch.float64)}, None)]
    for number in range(STEPS):
        walk.pass_by(number, states[number], STEPS)
        if spacings:
            steps.hold(number, states[number])
        states.append(steps.after(number))
        if spacings:
            steps.forget(number)
    walk.note(STEPS, states[STEPS])
    return walk, states


@pytest.mark.parametrize("first", [0, 7, STEPS])
@pytest.mark.parametrize("spacings", [(), (5,), (10,), (9, 3), (STEPS,)])
def test_each_step_is_held_with_its_own_state_on_the_way_back(
    spacings: tuple[int, ...], first: int
) -> None:
    steps = Doubling()
    walk, states = walked(spacings, steps)
    seen: list[int] = []
    for number in walk.back(first, 0, STEPS, *spacings):
        assert torch.equal(steps.held[number][0]["x"], states[number][0]["x"])
        seen.append(number)
    assert seen == [*reversed(range(first, STEPS))]
    assert not steps.held
    assert walk.check is not None
    assert walk.check.error == 0.0


@pytest.mark.parametrize(
    ("spacings", "ends"),
    # The first walk, and each step once more; all kept, six ends are compared. Of a block of nine
    # the steps up to its last kept state are taken once more still.
    [((), STEPS + 6), ((5,), 2 * STEPS), ((9, 3), 2 * STEPS + 6 + 6 + 3)],
)
def test_memory_and_steps_are_those_of_the_spacing(spacings: tuple[int, ...], ends: int) -> None:
    steps = Doubling()
    walk, _ = walked(spacings, steps)
    most_kept = 0
    for _ in walk.back(0, 0, STEPS, *spacings):
        most_kept = max(most_kept, len(walk.states._states) + len(steps.held))
    assert most_kept <= Keeping(spacings).states(STEPS)
    assert steps.most == (spacings[-1] if spacings else STEPS)
    assert steps.ends == ends


@pytest.mark.parametrize("spacings", [(), (5,), (9, 3)])
def test_steps_that_lead_elsewhere_are_refused(spacings: tuple[int, ...]) -> None:
    steps = Doubling()
    walk, _ = walked(spacings, steps)
    steps.noise = 1e-3
    with pytest.raises(MetaplError, match="were computed again, and their state differs by"):
        for _ in walk.back(0, 0, STEPS, *spacings):
            pass
