"""What the settings of all trainings are made of.

Ranges, and how long, how fast and in what batches is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from metapl.errors import FieldError
from metapl.runs.fields import AboveZero, Range, check_fields
from metapl.training import FitOptions
from metapl.training.options import MOST_WORKERS

MOST_STEPS, MOST_IN_A_BATCH = (
    10**9,
    2**20,
)  # beyond these a machine would be asked for more than any has

Steps = Annotated[int, Range(1, most=MOST_STEPS)]
SomeSteps = Annotated[int, Range(0, most=MOST_STEPS)]
Batch = Annotated[int, Range(1, most=MOST_IN_A_BATCH)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]

T = TypeVar("T")
Hidden = tyro.conf.Suppress[T]  # a setting that is no flag


def unset(
    metavar: str | None = None, help: str | None = None, default: str = "", name: str | None = None
) -> Any:
    """Of a flag whose default is not shown, or in words; ``metavar`` stands for its value."""
    return tyro.conf.arg(name=name, metavar=metavar, help=help, help_behavior_hint=default)


Switch = Annotated[bool, unset()]  # off unless given
Flat = Annotated[
    T, tyro.conf.arg(name="")
]  # a dataclass whose fields are flags beside those around it

Role = Literal["teacher", "student"]


def require(value: object, condition: bool, field: str, expected: str) -> None:
    """Refuse a dataclass whose ``field`` is not as ``expected``."""
    if not condition:
        given = getattr(value, field)
        raise FieldError(
            f"{type(value).__name__}({field}={given!r}): expected {expected}.",
            field,
            given,
            expected,
        )


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How long, how fast and in what batches networks are trained. What is None is chosen where the training begins.

    Args:
        steps: training steps.
        seed: of all that is drawn.
        labeled_batch: labeled examples in a batch.
        lr: rate of the teacher, or the one network.
        schedule: cosine, constant or exponential.
        warmup: steps of growing rates.
        ema_decay: of the average that is kept.
        finetune_steps: on labeled examples, at the end.
        validate_every: steps between validations.
        log_every: steps between rows.
        save_every: steps between checkpoints.
        accumulate: parts of a batch, for memory.
        precision: float32 or bfloat16.
        num_workers: processes that read pictures.
        device: auto, cpu or cuda.
    """

    steps: Annotated[Steps | None, unset()] = None
    seed: Annotated[int, Range(0, most=2**32 - 1)] = 0
    labeled_batch: Batch = 32
    lr: Annotated[AboveZero | None, unset()] = None
    schedule: Annotated[
        Literal["cosine", "constant", "exponential"], tyro.conf.arg(metavar="NAME")
    ] = "cosine"
    warmup: Annotated[SomeSteps | None, unset()] = None
    ema_decay: Annotated[Share | None, unset()] = None
    finetune_steps: SomeSteps = 200
    validate_every: Annotated[Steps | None, unset()] = None
    log_every: Steps = 20
    save_every: Steps = 500
    accumulate: Batch = 1
    precision: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(metavar="TYPE")] = "float32"
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(metavar="NAME")] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is not None:
            FitOptions(steps=self.steps, **self.options())

    def options(self) -> dict[str, Any]:
        """Options of a fit; those of a phase come to these."""
        names = (
            "schedule",
            "warmup",
            "ema_decay",
            "validate_every",
            "log_every",
            "save_every",
            "num_workers",
        )
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def finetuning(self, schedule: str) -> dict[str, Any]:
        """Options of the fit that finetunes."""
        steps = self.finetune_steps
        own = {
            "steps": steps,
            "ema_decay": None,
            "warmup": 0,
            "validate_every": max(1, steps // 10),
        }
        return {**self.options(), **own, "schedule": schedule}


def replaced(value: Any, **fields: Any) -> Any:
    """A dataclass with other values of these fields, as far as it has them, or a dataclass in it has.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Whole:
    ...     fitting: Fitting = Fitting()
    >>> replaced(Whole(), seed=3).fitting.seed
    3
    """
    own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed = {name: fields[name] for name in own.keys() & fields.keys()}
    for name, part in own.items():
        if dataclasses.is_dataclass(part) and (inner := fields.keys() & flat(part).keys()):
            changed[name] = replaced(part, **{each: fields[each] for each in inner})
    return dataclasses.replace(value, **changed)


def flat(value: Any) -> dict[str, Any]:
    """The settings of a dataclass and of those in it by their names as flags.

    None has the name of another.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        found |= flat(part) if dataclasses.is_dataclass(part) else {field.name: part}
    return found


def filled(value: T, stored: Mapping[str, Any]) -> T:
    """A dataclass whose settings that were left open are those that a run has stored."""
    have = flat(value)
    missing = {name for name, own in have.items() if own is None and stored.get(name) is not None}
    made = {name: tuple(one) if isinstance(one := stored[name], list) else one for name in missing}
    found: T = replaced(value, **made)
    return found
