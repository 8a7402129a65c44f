"""The time that a training may take: what its steps take, and which are skipped to keep to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from typing import Any

from metapl.training.loop import Fit

# The share of the time that steps, labeling and finetuning get at least, and the one after which
# finetuning takes no further step. The rest is for tests and the report.
SHARE = 0.85
FINETUNED = 0.93

# The phase that finetunes.
FINETUNING = "finetune"

# The share of this time that steps get at least, however long the rest takes.
LEAST_SHARE = 0.5

# The weight of all steps before in the pace, against that of a step.
MEMORY = 0.97

# From this part on of the steps that are left, all of them are taken.
ON_TIME = 0.98

# Steps of a phase before its pace is known.
FIRST_STEPS = 20

# What a checkpoint has of the pace of a phase: see Pacer.
COUNTS = ("taken", "credit", "seconds", "measured_seconds")


@dataclass(frozen=True)
class Part:
    """Some steps of a phase that take equally long.

    Args:
        first, last: shares of the phase's steps, between which they are.
        seconds: of such a step, as it was measured before the training.
    """

    first: float
    last: float
    seconds: float

    def seconds_after(self, share: float) -> float:
        """Return the seconds of the part behind a share of the steps, in a phase of one step."""
        return max(0.0, self.last - max(self.first, share)) * self.seconds


@dataclass
class Timetable:
    """What the phases of a training were measured to take, and when its steps have to be done.

    A resumed run has what its checkpoints hold, and its minutes are those that were left.

    Args:
        clock: gives seconds.
        begun: when the training began, by the clock.
        minutes: that it may take; None: as many as it takes.
        rest: seconds that tests and the report take; None: they were not measured.
        parts: of each phase, by its name.
        reserved: seconds for labeling and finetuning.
        phases: how many phases there are.
        counts: of each phase so far that keeps to its time, how many of its steps were taken, and
            how many skipped.
    """

    clock: Callable[[], float] = time.monotonic
    begun: float = 0.0
    minutes: float | None = None
    rest: float | None = None
    parts: dict[str, Sequence[Part]] = field(default_factory=dict)
    reserved: float = 0.0
    phases: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begun = self.clock()
        self.program_begun = self.begun

    @property
    def skipped(self) -> int:
        """Return how many steps were skipped."""
        return sum(count["skipped"] for count in self.counts.values())

    def seconds_of(self, share: float) -> float:
        """Return the seconds of a share of the minutes, and of more where the rest takes less."""
        assert self.minutes is not None, "without minutes no phase ends by the clock"
        rest = (1 - share) * 60 * self.minutes
        if self.rest is not None:
            rest = min(rest, self.rest)
        return 60 * self.minutes - rest

    def state_dict(self) -> dict[str, Any]:
        parts = {phase: [*map(astuple, parts)] for phase, parts in self.parts.items()}
        return {
            "taken": self.clock() - self.begun,
            "parts": parts,
            "rest": self.rest,
            "reserved": self.reserved,
            "phases": self.phases,
            "counts": self.counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.begun = self.program_begun - state["taken"]
        self.parts = {phase: [Part(*p) for p in parts] for phase, parts in state["parts"].items()}
        self.rest = state.get("rest")
        self.reserved = state["reserved"]
        self.phases = state["phases"]
        self.counts = state["counts"]

    def pacers(self, phase: str, steps: int) -> list[Pacer]:
        """Return what keeps a phase to its time; nothing where there is none.

        One without parts, which were not measured or are in a checkpoint, takes all steps.
        """
        if self.minutes is None:
            return []
        if phase == FINETUNING:
            # Its steps are alike, whatever they take.
            parts: Sequence[Part] = [Part(0.0, 1.0, 1.0)]
            ends = self.begun + self.seconds_of(FINETUNED)
            return [Pacer(self, phase, parts, steps=steps, ends=ends)]
        if phase not in self.parts:
            return [Pacer(self, phase, [], steps=steps, ends=self.begun)]
        # About as much of what is beside the steps has been done as of the phases.
        self.phases = max(self.phases, len(self.parts))
        reserved = self.reserved * len(self.parts) / self.phases
        ends = self.begun + self.seconds_of(SHARE) - reserved
        parts = self.parts.pop(phase)
        # What phases leave that come after this one.
        others = [part for parts in self.parts.values() for part in parts]
        later = steps * sum(part.seconds_after(0.0) for part in others)
        return [Pacer(self, phase, parts, steps=steps, ends=ends - later)]


class Pacer:
    """Decides before each step of a phase whether it is taken, so that the phase ends in time.

    Where the steps that are left take longer than the time that is left, by the pace so far, an
    even part of them is skipped. Rates, sizes of pictures and all else that depends on the number
    of a step go on as they were planned.

    Args:
        timetable: counts the steps that are taken, and those that are skipped.
        phase: its name.
        parts: of the phase.
        steps: of the phase.
        ends: when it has to be done, by the clock, if all goes at the measured pace.
    """

    def __init__(
        self, timetable: Timetable, phase: str, parts: Sequence[Part], *, steps: int, ends: float
    ) -> None:
        self.timetable = timetable
        self.phase = phase
        self.parts = parts
        self.steps = steps
        self.ends = ends
        self.taken = 0
        self.credit = 0.0
        self.last_time: float | None = None
        # Of the steps so far, the later ones with more weight: the seconds that they took, and
        # those that they were measured to take.
        self.seconds = 0.0
        self.measured_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in COUNTS}
        return {
            **state,
            "parts": [*map(astuple, self.parts)],
            "seconds_until_end": self.ends - self.timetable.begun,
            "timetable": self.timetable.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.timetable.load_state_dict(state["timetable"])
        self.parts = [Part(*part) for part in state["parts"]]
        self.ends = self.timetable.begun + state["seconds_until_end"]
        for name in COUNTS:
            setattr(self, name, state[name])

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> dict[str, int]:
        """Return for a row how many steps of the phase were skipped, where some were."""
        skipped = self.count()["skipped"]
        return {"skipped_steps": skipped} if skipped else {}

    def count(self) -> dict[str, int]:
        """Return how many steps of the phase were taken, and how many skipped, to be counted on."""
        return self.timetable.counts.setdefault(self.phase, {"taken": 0, "skipped": 0})

    def skips(self, fit: Fit) -> bool:
        """Skip the next step of a fit where there is no time for it, and return whether it was.

        Steps after which something is due, and those in which a network begins, are taken.
        """
        options = fit.options
        due = (options.log_every, options.validate_every, options.save_every)
        begins = (0, options.wait, fit.teacher_begins)
        is_needed = fit.step in begins or any(options.due(n, fit.step + 1) for n in due)
        if self.takes_step(fit.step, is_needed=is_needed):
            return False
        for name in fit.sources.sources:
            fit.sources.skip(name, fit.trainer.lookahead if name == "inner" else 1)
        fit.step += 1
        trainer: Any = fit.trainer
        trainer.steps_done += 1
        return True

    def takes_step(self, step: int, *, is_needed: bool) -> bool:
        """Return whether the step of this number, from 0, is taken, as one that is needed is."""
        now = self.timetable.clock()
        if self.last_time is not None:
            self.seconds = MEMORY * self.seconds + now - self.last_time
        self.last_time = now
        self.credit += self.share_to_take(step, now)
        if self.credit < 1.0 and not is_needed:
            self.count()["skipped"] += 1
            return False
        self.credit = max(self.credit - 1.0, 0.0)
        self.taken += 1
        self.count()["taken"] += 1
        seconds = self.measured_left(step) - self.measured_left(step + 1)
        self.measured_seconds = MEMORY * self.measured_seconds + seconds
        return True

    def share_to_take(self, step: int, now: float) -> float:
        """Return the part of the steps that are left for which there is time."""
        seconds = self.seconds_at_pace(step)
        if seconds is None:
            return 1.0
        share = (self.ends - now) / seconds
        return 1.0 if share > ON_TIME else max(share, 0.0)

    def seconds_left(self, step: int) -> float | None:
        """Return the seconds until the phase ends, before this step; None where none are known."""
        seconds = self.seconds_at_pace(step)
        if seconds is None:
            return None
        # Steps that would take longer are skipped.
        return max(0.0, min(seconds, self.ends - self.timetable.clock()))

    def seconds_at_pace(self, step: int) -> float | None:
        """Return what the steps from this one on take at the pace so far; None: it is not known."""
        if self.taken <= FIRST_STEPS or not self.parts:
            return None
        return self.seconds / self.measured_seconds * self.measured_left(step)

    def measured_left(self, step: int) -> float:
        """Return the seconds that the steps from this one on were measured to take."""
        share = step / self.steps
        return self.steps * sum(part.seconds_after(share) for part in self.parts)


def parts_of(bounds: Sequence[int], seconds: Sequence[float]) -> list[Part]:
    """Return the parts of a phase between bounds in steps, with the seconds of a step in each."""
    steps = bounds[-1]
    parts = []
    for (first, last), seconds_of_step in zip(pairwise(bounds), seconds, strict=True):
        parts.append(Part(first / steps, last / steps, seconds_of_step))
    return parts


def spoken_counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return how many steps were taken, of those planned so far, in phases that skipped some.

    >>> spoken_counts({"finetune": {"taken": 9, "skipped": 1}, "fit": {"taken": 9, "skipped": 3}})
    'fit 9 of 12, finetune 9 of 10'
    >>> spoken_counts({"finetune": {"taken": 9, "skipped": 1}, "fit": {"taken": 9, "skipped": 0}})
    'finetune 9 of 10'
    """
    phases = []
    # A file of JSON has them by their names, and finetuning comes last.
    for phase in sorted(counts, key=lambda name: name == FINETUNING):
        count = counts[phase]
        if not count["skipped"]:
            continue
        planned = count["taken"] + count["skipped"]
        phases.append(f"{phase} {count['taken']:,} of {planned:,}")
    return ", ".join(phases)
