"""How a fit runs, the learning rates that its schedule moves, and the averages of weights that it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.layout import reshard
from metapl.execution.shards import as_sharded, laid_out_like, local
from metapl.protocols import AnyTrainer
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range, check_fields
from metapl.words import did_you_mean

MOST_WORKERS = 256  # processes that prepare batches; some machines end when more are started

# Of the exponential schedule: the factor, after how many epochs it comes, and of how many (Noisy
# Student; its smaller models take twice as many of both).
DECAY, DECAY_EPOCHS, EPOCHS = 0.97, 2.4, 350


def decay_interval(steps: int) -> float:
    """Steps after which the exponential schedule multiplies the rate by 0.97, where that is not given.

    >>> decay_interval(700)
    4.8
    """
    return steps * DECAY_EPOCHS / EPOCHS


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a fit runs.

    Args:
        steps: number of steps in all.
        schedule: of both learning rates, ``"cosine"`` (to 0 at the last step), ``"constant"``, or
            ``"exponential"``: by 0.97 after every ``decay_every`` steps, as a smooth curve.
        warmup: steps over which the rates grow linearly from 0 first.
        decay_every: of the exponential schedule; None: 2.4 of 350 parts of the steps, so that the
            rate ends at 1.2 % of what it was, as in Noisy Student.
        wait: steps during which the teacher trains alone, on its own losses, before the student
            begins, with its schedule, warm-up included, and its average. The authors have 3,000 for
            CIFAR-10 and 20,000 for ImageNet.
        first_steps: steps in which the student learns alone, by the problem's ``first_signal``,
            before its teacher begins; they are among ``steps``, and after ``wait``. None: as many
            as the problem says (``first_steps``); 0 for a student that has learned the given labels
            already.
        ema_decay: keep a moving average of the student's weights, with decay min(this,
            (1+t)/(10+t)), which is then validated and kept. A teacher is averaged alike, and itself
            makes the labels. None: no averages.
        warm_start: when the student begins, after ``wait`` steps, it takes the teacher's weights
            (the average's, where there is one). The two need the same architecture.
        select: keep the best student by validation, the latest of equals; False: keep the last one,
            whatever validation shows. A few validation examples cannot tell students apart.
        validate_every, log_every, save_every: in steps; the last step counts as a multiple of each.
        keep: checkpoints kept.
        num_workers: of the loaders of metapl's own batches; changes nothing but speed.
        phase: the name under which checkpoints and rows are kept.
    """

    steps: AtLeastOne
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    decay_every: Annotated[float, Range(above=0)] | None = None
    warmup: AtLeastZero = 0
    wait: AtLeastZero = 0
    first_steps: AtLeastZero | None = None
    ema_decay: Annotated[float, Range(0, 1)] | None = None
    warm_start: bool = False
    select: bool = True
    validate_every: AtLeastOne = 100
    log_every: AtLeastOne = 20
    save_every: AtLeastOne = 500
    keep: AtLeastOne = 2
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    phase: str = "fit"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.wait >= self.steps:
            raise MetaplError(f"wait={self.wait}: expected fewer than steps={self.steps}.")
        if self.first_steps is not None and self.first_steps >= self.steps - self.wait:
            given = f"first_steps={self.first_steps}"
            raise MetaplError(
                f"{given}: expected fewer than the steps after wait, {self.steps - self.wait}."
            )
        if self.warmup > self.steps - self.wait:
            raise MetaplError(
                f"warmup={self.warmup}: expected at most the steps after wait, "
                f"{self.steps - self.wait}."
            )
        if self.decay_every is not None and self.schedule != "exponential":
            raise MetaplError(
                f"decay_every={self.decay_every}: expected None, or schedule='exponential' beside "
                "it."
            )
        if self.phase in ("", ".", "..") or {*self.phase} & {*"/\\\0"}:
            raise MetaplError(
                f"phase={self.phase!r}: expected a plain name, for it names a folder."
            )

    def rate(self, step: int, wait: int = 0) -> float:
        """The factor of a base learning rate at ``step``; with ``wait`` the student's, which is 0 for so long.

        >>> [round(FitOptions(steps=4, warmup=1).rate(t), 2) for t in range(5)]
        [1.0, 1.0, 0.75, 0.25, 0.0]
        >>> round(0.128 * FitOptions(steps=350, schedule="exponential").rate(350), 6)  # what Noisy Student ends with
        0.001507
        """
        step, steps = step - wait, self.steps - wait
        if step < 0:
            return 0.0
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "exponential":
            return float(DECAY ** (step / (self.decay_every or decay_interval(steps))))
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def due(self, every: int, done: int) -> bool:
        """Whether what is done ``every`` so many steps is done when so many are.

        The last one counts.
        """
        return done % every == 0 or done == self.steps


class FitKeywords(TypedDict, total=False):
    """The fields of :class:`FitOptions` besides ``steps``, as the keywords of a call that a type checker reads."""

    schedule: Literal["cosine", "constant", "exponential"]
    decay_every: float | None
    warmup: int
    wait: int
    first_steps: int | None
    ema_decay: float | None
    warm_start: bool
    select: bool
    validate_every: int
    log_every: int
    save_every: int
    keep: int
    num_workers: int
    phase: str


def fit_options(steps: int, keywords: FitKeywords, others: Sequence[str]) -> FitOptions:
    """Return the options of a fit, or refuse a keyword that is none of them and none of the fit's ``others``."""
    options = [*FitKeywords.__annotations__]
    for name in keywords:
        if name not in options:
            names = [*others, *options]
            nearest = (
                did_you_mean(name, names, likeness=0.5) or f"; expected one of {', '.join(names)}."
            )
            raise MetaplError(f"fit has no option {name!r}{nearest}")
    return FitOptions(steps=steps, **keywords)


class Rates:
    """The base rates as the optimizers of a trainer came with them, and what the schedule makes of them."""

    def __init__(self, trainer: AnyTrainer, options: FitOptions) -> None:
        optimizers = trainer.schedulable
        names = ["student_lr"] if trainer.teacher is None else ["student_lr", "teacher_lr"]
        self.options = options
        self.optimizers = dict(zip(names[len(names) - len(optimizers) :], optimizers, strict=True))
        self.base = {
            name: [group["lr"] for group in one.param_groups]
            for name, one in self.optimizers.items()
        }

    def move(self, step: int | None) -> None:
        """Set the rates of a step; None: the base rates."""
        for name, optimizer in self.optimizers.items():
            groups, base, wait = (
                optimizer.param_groups,
                self.base[name],
                self.options.wait * (name == "student_lr"),
            )
            factor = 1.0 if step is None else self.options.rate(step, wait)
            base.extend(
                group["lr"] for group in groups[len(base) :]
            )  # added since, such as layers that were unfrozen
            for group, rate in zip(groups, base, strict=True):
                group["lr"] = rate * factor

    def now(self) -> dict[str, float]:
        return {
            name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()
        }


class Average:
    r"""The average that follows a network's weights, \theta̅ \leftarrow d_t \theta̅ + (1 - d_t) \theta.

    .. math:: d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics)
    are copied. ``torch.optim.swa_utils.AveragedModel`` counts on the device, so that each step
    would wait for it, and copies the module, which a sharded one does not allow. Cost: a copy of
    the weights; one fused pass over them an update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
            raise MetaplError(
                "ema_decay of 16-bit weights does not move; expected 32-bit ones with precision=."
            )
        self.network, self.decay, self.steps = network, decay, 0
        self._kept = {name: local(t).detach().clone() for name, t in self._tensors().items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        parts = {name: local(t) for name, t in self._tensors().items()}
        moving = {
            name
            for name, p in self.network.named_parameters()
            if p.is_floating_point() or p.is_complex()
        }
        torch._foreach_lerp_(
            [self._kept[name] for name in moving], [parts[name] for name in moving], 1 - decay
        )
        # A pass may have made buffers, or given them another shape.
        self._kept = {
            name: self._kept[name] if name in moving else t.clone() for name, t in parts.items()
        }
        self.steps += 1

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """The network with the averaged weights in this block, and bit for bit its own afterwards."""
        own = {name: local(t).detach().clone() for name, t in self._tensors().items()}
        try:
            self._write(self._kept)
            yield self.network
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, t in self._tensors().items():
            part, value = local(t), values.get(name)
            if (
                value is not None and value.shape == part.shape
            ):  # others are caches that grew with a longer input
                part.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, laid out as the network's, and how many steps they have followed."""
        held = {
            name: as_sharded(self._kept[name], t)
            for name, t in self._tensors().items()
            if name in self._kept
        }
        return {"module": held, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, whole or laid out as the network is."""
        for name, t in self._tensors().items():
            self._kept[name] = local(laid_out_like(state["module"][name], t)).to(
                t.device, copy=True
            )
        self.steps = state["steps"]

    def _tensors(self) -> dict[str, Any]:
        reshard(self.network)  # else a sharded network holds other tensors
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())
