"""Settings that all trainings have, their ranges, and how they are read and set by flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from metapl.errors import MetaplError
from metapl.runs.fields import AboveZero, AtLeastOne, Range, check_fields
from metapl.training import FitOptions
from metapl.training.options import MOST_WORKERS

# Beyond these numbers a machine would be asked for more than any has.
MOST_STEPS = 10**9
MOST_IN_A_BATCH = 2**20

Steps = Annotated[int, Range(1, most=MOST_STEPS)]
SomeSteps = Annotated[int, Range(0, most=MOST_STEPS)]
Batch = Annotated[int, Range(1, most=MOST_IN_A_BATCH)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]

T = TypeVar("T")

Role = Literal["teacher", "student"]


def require(value: object, condition: bool, field: str, expected: str) -> None:
    """Refuse a dataclass whose ``field`` is not as ``expected``."""
    if not condition:
        refused = getattr(value, field)
        raise MetaplError(f"{type(value).__name__}({field}={refused!r}): expected {expected}.")


# Steps of finetuning, where no flag and no method says otherwise.
USUAL_FINETUNING = 200


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How long, how fast and in what batches networks are trained.

    What is None is chosen where the training begins.

    Args:
        steps: number of training steps before those of finetuning. Of your own pictures it follows
            from --minutes by default.
        seed: seed of all random numbers. The same seed gives the same run.
        labeled_batch: number of labeled examples in each step. By default it is 32, and 64 for
            airbench_small and for digits.
        lr: learning rate of the teacher, or of the only network. By default it fits the network.
        schedule: how the learning rate changes over time: cosine, linear, constant or exponential.
            By default it fits the network.
        warmup: number of steps in which the learning rate grows from zero. Of your own pictures it
            is 5 % of the steps by default.
        ema_decay: decay of the running average of the weights, such as 0.99. If it is given, the
            average is the network that is kept.
        finetune_steps: number of steps on labeled examples alone at the end. By default it is 200,
            and 0 where airbench_small learns labels alone.
        validate_every: number of steps between two measurements on the validation examples. Of your
            own pictures there are 10 measurements by default.
        patience: stop after so many of these measurements in a row that were no better than the
            best one before them, and finetune. By default all steps are taken.
        log_every: number of steps between two rows of metrics.jsonl.
        save_every: number of steps between two checkpoints.
        accumulate: number of parts into which a batch is split to save memory.
        precision: number type in which the networks compute: float32 or bfloat16.
        num_workers: number of extra processes that read pictures.
        device: what to compute on: cpu, cuda, or auto for a GPU if there is one.
    """

    steps: Steps | None = None
    seed: Annotated[int, Range(0, most=2**32 - 1)] = 0
    labeled_batch: Batch | None = None
    lr: AboveZero | None = None
    schedule: Literal["cosine", "linear", "constant", "exponential"] | None = None
    warmup: SomeSteps | None = None
    ema_decay: Share | None = None
    finetune_steps: SomeSteps | None = None
    validate_every: Steps | None = None
    patience: AtLeastOne | None = None
    log_every: Steps = 20
    save_every: Steps = 500
    accumulate: Batch = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is not None:
            FitOptions(steps=self.steps, **self.options())

    @property
    def chosen_steps(self) -> int:
        """Return the number of steps, which was given or chosen."""
        assert self.steps is not None, "choose_settings gave it"
        return self.steps

    @property
    def chosen_batch(self) -> int:
        """Return the number of labeled examples in a step, which was given or chosen."""
        assert self.labeled_batch is not None, "choose_settings gave it"
        return self.labeled_batch

    @property
    def chosen_finetuning(self) -> int:
        """Return the number of steps of finetuning, the usual one where none was chosen."""
        return USUAL_FINETUNING if self.finetune_steps is None else self.finetune_steps

    def options(self) -> dict[str, Any]:
        """Return the options of every fit; a phase adds its own."""
        names = (
            "schedule",
            "warmup",
            "ema_decay",
            "validate_every",
            "patience",
            "log_every",
            "save_every",
            "num_workers",
        )
        options = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value is not None}

    def finetuning(self, schedule: str | None) -> dict[str, Any]:
        """Return the options of the fit that finetunes."""
        return {
            **self.options(),
            "steps": self.chosen_finetuning,
            "ema_decay": None,
            "warmup": 0,
            "validate_every": max(1, self.chosen_finetuning // 10),
            # It is short, and the better network is kept in any case.
            "patience": None,
            "schedule": schedule,
        }


# -------------------------------------------------------------------------- settings by their flags


def flag_values(settings: Any) -> dict[str, Any]:
    """Return all settings of a dataclass and of those in it by the names of their flags.

    No two of them have the same name.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values |= flag_values(value)
        else:
            values[field.name] = value
    return values


def with_flags(settings: T, **flags: Any) -> T:
    """Return settings with other values of these flags; those that they do not have are ignored.

    Where the names are known when the code is written, take ``dataclasses.replace``.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Training:
    ...     fitting: Fitting = Fitting()
    >>> with_flags(Training(), seed=3, color="red").fitting.seed
    3
    """
    untyped: Any = settings
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(untyped):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            # Its fields are flags. Its own name is none, though one of them may be called as it.
            if flags.keys() & flag_values(value).keys():
                changes[field.name] = with_flags(value, **flags)
        elif field.name in flags:
            changes[field.name] = flags[field.name]
    changed: T = dataclasses.replace(untyped, **changes)
    return changed


def with_stored(settings: T, stored: Mapping[str, Any]) -> T:
    """Return settings in which each one that is None has the value that a run has stored for it.

    Args:
        settings: those of a training, as a command line gave them.
        stored: the values by the names of their flags, as recipe.json has them.
    """
    flags: dict[str, Any] = {}
    for name, value in flag_values(settings).items():
        stored_value = stored.get(name)
        if value is None and stored_value is not None:
            # JSON has no tuples.
            is_list = isinstance(stored_value, list)
            flags[name] = tuple(stored_value) if is_list else stored_value
    return with_flags(settings, **flags)


def with_settings_of(method: T, own: T, usual: T) -> T:
    """Return a method of a comparison with the settings in which a run's own is not the usual one.

    Args:
        method: another method, as it is usually.
        own: the run's method.
        usual: the run's method as it is usually.

    >>> with_settings_of(Fitting(), Fitting(seed=3), Fitting(labeled_batch=8)).seed
    3
    """
    usual_values = flag_values(usual)
    flags = flag_values(method).keys()
    changed = {
        name: value
        for name, value in flag_values(own).items()
        if name in flags and value != usual_values[name]
    }
    return with_flags(method, **changed)
