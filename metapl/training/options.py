"""How a fit runs."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal

from metapl.errors import MetaplError
from metapl.words import did_you_mean

COUNTS = ("steps", "warmup", "wait", "validate_every", "log_every", "save_every", "exact_every", "keep", "num_workers")
"""Options that count something."""


MOST_WORKERS = 256
"""Processes that prepare batches; a machine has no use for more, and some end when more are started."""


DECAY, DECAY_EPOCHS, EPOCHS = 0.97, 2.4, 350
"""Of the exponential schedule: the factor, after how many epochs it comes, and of how many (Noisy Student; its smaller
models take twice as many of both)."""


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
        wait: steps during which the teacher trains alone, on its own losses, before the student begins; the student's
            schedule, warm-up included, and its average count from there. 3,000 for CIFAR-10 and 20,000 for ImageNet in
            the code of the method's authors.
        ema_decay: keep a moving average of the student's weights, with decay min(this, (1+t)/(10+t)); it is then what
            is validated and kept. None: the student itself. The teacher, where there is one, is averaged alike: its
            average is validated and kept, and the teacher itself makes the labels.
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

    steps: int
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    decay_every: float | None = None
    warmup: int = 0
    wait: int = 0
    ema_decay: float | None = None
    warm_start: bool = False
    select: bool = True
    validate_every: int = 100
    log_every: int = 20
    save_every: int = 500
    exact_every: int | None = None
    keep: int = 2
    split_batches: bool = False
    num_workers: int = 0
    phase: str = "fit"

    def __post_init__(self) -> None:
        for name in COUNTS:
            value: Any = getattr(self, name)
            left_out = name == "exact_every" and value is None
            if not left_out and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise MetaplError(f"{name}={value!r}: expected a whole number.")
        if not is_file_name(self.phase):
            raise MetaplError(f"phase={self.phase!r}: expected a plain name, for it names a folder: 'fit'.")
        for name in ("steps", "validate_every", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise MetaplError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if not 0 <= self.num_workers <= MOST_WORKERS:
            raise MetaplError(f"num_workers={self.num_workers}: expected 0 to {MOST_WORKERS}.")
        if self.schedule not in ("cosine", "constant", "exponential"):
            raise MetaplError(f"schedule={self.schedule!r}: expected 'cosine', 'constant' or 'exponential'.")
        every = self.decay_every
        if every is not None and not (self.schedule == "exponential" and 0 < every < math.inf):
            raise MetaplError(
                f"decay_every={every!r}: expected a number of steps above 0 beside schedule='exponential', or None."
            )
        if not 0 <= self.wait < self.steps:
            raise MetaplError(f"wait={self.wait}: expected 0 or more, and fewer than steps={self.steps}.")
        if self.warm_start and not self.wait:
            raise MetaplError(
                "warm_start=True was given with wait=0; expected steps in which the teacher trains alone."
            )
        if not 0 <= self.warmup <= self.steps - self.wait:
            after = f" - wait={self.wait}" if self.wait else ""
            raise MetaplError(f"warmup={self.warmup}: expected between 0 and steps={self.steps}{after}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise MetaplError(f"ema_decay={self.ema_decay}: expected a decay in [0, 1), or None.")
        if self.exact_every is not None and self.exact_every < 1:
            raise MetaplError(f"exact_every={self.exact_every}: expected 1 or more, or None.")

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with its beginning."""
        names = ("schedule", "warmup", "wait", "ema_decay", "warm_start", "select")
        decisive = {name: getattr(self, name) for name in names}
        if self.schedule == "exponential":
            decisive["decay_every"] = self.decay_every
        counts = self.schedule == "cosine" or (self.schedule == "exponential" and self.decay_every is None)
        return decisive | ({"steps": self.steps} if counts else {})

    def waits(self, step: int) -> bool:
        """Whether the student waits at ``step``."""
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
        """The factor of the student's base learning rate at ``step``: 0 while it waits, then as of a run that begins.

        >>> [round(FitOptions(steps=6, warmup=1, wait=2).student_rate(t), 2) for t in range(7)]
        [0.0, 0.0, 1.0, 1.0, 0.75, 0.25, 0.0]
        """
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
        """Whether what is done ``every`` so many steps (None: never) is done after ``step``; the last one counts.

        >>> [t for t in range(5) if FitOptions(steps=5).due(2, t)]
        [1, 3, 4]
        """
        return every is not None and ((step + 1) % every == 0 or step + 1 == self.steps)


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


def is_file_name(name: Any) -> bool:
    r"""Whether a name is that of a file or folder, and no path.

    >>> [is_file_name(name) for name in ("fit", "../fit", "..", "", "a\0b")]
    [True, False, False, False, False]
    """
    separators = {os.sep, os.altsep, "\0"}
    return isinstance(name, str) and name not in ("", ".", "..") and not separators & set(name)
