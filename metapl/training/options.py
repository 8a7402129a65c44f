"""How a fit runs, and the learning rates that its schedule moves."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypedDict

from metapl.errors import MetaplError
from metapl.metrics.metric import Asked
from metapl.runs.fields import AtLeastOne, Range, check_fields
from metapl.runs.ownership import Folder
from metapl.training.contract import Say, Stepwise
from metapl.training.stopping import Callback
from metapl.words import did_you_mean

MOST_WORKERS = 256  # processes that prepare batches; some machines end when more are started

# Of the exponential schedule: the factor, after how many epochs it comes, and of how many (Noisy Student; its smaller
# models take twice as many of both).
DECAY, DECAY_EPOCHS, EPOCHS = 0.97, 2.4, 350


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a fit runs.

    Args:
        steps: number of steps in all.
        schedule: of both learning rates, ``"cosine"`` (to 0 at the last step), ``"constant"``, or ``"exponential"``: by
            0.97 after every ``decay_every`` steps, as a smooth curve.
        warmup: steps over which the rates grow linearly from 0 first.
        decay_every: of the exponential schedule; None: 2.4 of 350 parts of the steps, so that the rate ends at 1.2 % of
            what it was, as in Noisy Student.
        wait: steps during which the teacher trains alone, on its own losses, before the student begins, with its
            schedule, warm-up included, and its average. The authors have 3,000 for CIFAR-10 and 20,000 for ImageNet.
        ema_decay: keep a moving average of the student's weights, with decay min(this, (1+t)/(10+t)), which is then
            validated and kept. A teacher is averaged alike, and itself makes the labels. None: no averages.
        warm_start: when the student begins, after ``wait`` steps, it takes the teacher's weights (the average's, where
            there is one). The two need the same architecture.
        select: keep the best student by validation, the latest of equals; False: keep the last one, whatever
            validation shows. A few validation examples cannot tell students apart.
        validate_every, log_every, save_every: in steps; the last step counts as a multiple of each.
        exact_every: every so many steps also compute the cosine between the mode's teacher gradient and the exact one;
            None: never. It costs two hypergradients and changes nothing else.
        keep: checkpoints kept.
        split_batches: in several processes, the sources serve whole batches, the same in every process, of which each
            takes its own rows; by default they serve this process's share.
        num_workers: of the loaders of metapl's own batches; changes nothing but speed.
        phase: the name under which checkpoints and rows are kept.
    """

    steps: AtLeastOne
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    decay_every: Annotated[float, Range(above=0)] | None = None
    warmup: int = 0
    wait: int = 0
    ema_decay: Annotated[float, Range(0, 1)] | None = None
    warm_start: bool = False
    select: bool = True
    validate_every: AtLeastOne = 100
    log_every: AtLeastOne = 20
    save_every: AtLeastOne = 500
    exact_every: AtLeastOne | None = None
    keep: AtLeastOne = 2
    split_batches: bool = False
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    phase: str = "fit"

    def __post_init__(self) -> None:
        check_fields(self)
        names = {os.sep, os.altsep, "\0"}, ("", ".", "..")
        is_name = isinstance(self.phase, str) and not names[0] & {*self.phase} and self.phase not in names[1]
        after = f" - wait={self.wait}" if self.wait else ""
        late = self.decay_every is not None and self.schedule != "exponential"
        for name, wrong, expected in (
            ("phase", not is_name, "a plain name, for it names a folder: phase='fit'"),
            ("wait", not 0 <= self.wait < self.steps, f"0 or more, and fewer than steps={self.steps}"),
            ("decay_every", late, "None, or a number beside schedule='exponential'"),
            ("warm_start", self.warm_start and not self.wait, "steps in which the teacher trains alone, wait=1000 say"),
            ("warmup", not 0 <= self.warmup <= self.steps - self.wait, f"between 0 and steps={self.steps}{after}"),
        ):
            if wrong:
                raise MetaplError(f"{name}={getattr(self, name)!r}: expected {expected}.")

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with its beginning."""
        names = ["schedule", "warmup", "wait", "ema_decay", "warm_start", "select"]
        names += ["decay_every"] * (self.schedule == "exponential")
        names += ["steps"] * (self.schedule != "constant" and self.decay_every is None)
        return {name: getattr(self, name) for name in names}

    def waits(self, step: int) -> bool:
        return step < self.wait

    def rate(self, step: int) -> float:
        """The factor of the teacher's base learning rate at ``step``.

        >>> [round(FitOptions(steps=4, warmup=1).rate(t), 2) for t in range(5)]
        [1.0, 1.0, 0.75, 0.25, 0.0]
        >>> round(0.128 * FitOptions(steps=350, schedule="exponential").rate(350), 6)  # what Noisy Student ends with
        0.001507
        """
        return self._factor(step, self.steps)

    def student_rate(self, step: int) -> float:
        """The same of the student's: 0 while it waits, then as of a run that begins."""
        return 0.0 if self.waits(step) else self._factor(step - self.wait, self.steps - self.wait)

    def _factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "exponential":
            every = decay_interval(steps) if self.decay_every is None else self.decay_every
            return float(DECAY ** (step / every))
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def due(self, every: int | None, step: int) -> bool:
        """Whether what is done ``every`` so many steps (None: never) is done after ``step``; the last one counts."""
        return every is not None and ((step + 1) % every == 0 or step + 1 == self.steps)


class FitKeywords(TypedDict, total=False):
    """The fields of :class:`FitOptions` beside ``steps``, as keyword arguments that a type checker knows."""

    schedule: Literal["cosine", "constant", "exponential"]
    decay_every: float | None
    warmup: int
    wait: int
    ema_decay: float | None
    warm_start: bool
    select: bool
    validate_every: int
    log_every: int
    save_every: int
    exact_every: int | None
    keep: int
    split_batches: bool
    num_workers: int
    phase: str


class FinetuneKeywords(FitKeywords, total=False):
    """The keyword arguments of :meth:`metapl.training.Trainer.fit` that ``finetune`` hands on."""

    batch_size: int | None
    validation: Any
    metric: Asked | None
    mode: Literal["min", "max"] | None
    truth: Any
    out: str | Folder | None
    resume: bool
    allow_changes: Sequence[str]
    progress: bool
    say: Say | None
    callbacks: Sequence[Callback]


class Rates:
    """The base rates as the optimizers of a trainer came with them, and what the schedule makes of them; a TorchOpt
    transform brings its own schedule."""

    def __init__(self, trainer: Stepwise, options: FitOptions) -> None:
        optimizers = trainer.schedulable
        names = ["student_lr"] if trainer.teacher is None else ["student_lr", "teacher_lr"]
        self.options = options
        self.optimizers = dict(zip(names[len(names) - len(optimizers) :], optimizers, strict=True))
        self.came_with = {name: [dict(group) for group in o.param_groups] for name, o in self.optimizers.items()}
        self.base = {name: [group["lr"] for group in groups] for name, groups in self.came_with.items()}

    def move(self, step: int) -> None:
        for name in self.optimizers:
            self._scale(name, self.options.student_rate(step) if name == "student_lr" else self.options.rate(step))

    def put_back(self) -> None:
        for name in self.optimizers:
            self._scale(name, 1.0)

    def keep_settings(self, allowed: Sequence[str]) -> None:
        """Of the optimizers that may differ from those of a checkpoint, take the settings that they came with."""
        for name, optimizer in self.optimizers.items():
            if f"{name.removesuffix('_lr')}_optimizer" in allowed:
                for group, own in zip(optimizer.param_groups, self.came_with[name], strict=False):
                    group.update({key: value for key, value in own.items() if key not in ("params", "lr")})

    def now(self) -> dict[str, float]:
        return {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}

    def _scale(self, name: str, factor: float) -> None:
        groups, base = self.optimizers[name].param_groups, self.base[name]
        base.extend(group["lr"] for group in groups[len(base) :])  # added since, such as layers that were unfrozen
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * factor


def refuse_unknown(given: Iterable[str], *functions: Callable[..., Any]) -> None:
    """Refuse options that neither the first of some functions, nor those that it calls with them, nor
    :class:`FitOptions` has, with what may have been meant.

    >>> refuse_unknown(["stpes"], decay_interval)
    Traceback (most recent call last):
    metapl.errors.MetaplError: decay_interval() has no option 'stpes'; did you mean steps?
    """
    arguments = [p for function in functions for p in inspect.signature(function).parameters.values()]
    named = [p.name for p in arguments if p.kind is p.KEYWORD_ONLY or p.name in ("labeled", "unlabeled")]
    known = list(dict.fromkeys([*named, *(field.name for field in fields(FitOptions))]))
    for name in given:
        if name not in known:
            meant = did_you_mean(name, known) or f"; expected some of {', '.join(known)}."
            raise MetaplError(f"{functions[0].__name__}() has no option {name!r}{meant}")


def decay_interval(steps: int) -> float:
    """Steps after which the exponential schedule multiplies the rate by :data:`DECAY`, where that is not given.

    >>> decay_interval(700)
    4.8
    """
    return steps * DECAY_EPOCHS / EPOCHS
