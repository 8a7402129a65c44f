"""How a fit runs, the rates that its schedule moves, and the averages of weights that it keeps."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.layout import reshard
from metapl.execution.shards import as_sharded, laid_out_like, local
from metapl.protocols import AnyTrainer
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range, check_fields, no_such_option

# Processes that prepare batches; some machines end when more are started.
MOST_WORKERS = 256

# Of the exponential schedule: the factor, after how many epochs it comes, and of how many (Noisy
# Student; its smaller models take twice as many of both).
DECAY = 0.97
DECAY_EPOCHS = 2.4
EPOCHS = 350


def decay_interval(steps: int) -> float:
    """Return the steps after which the exponential schedule multiplies the rate by 0.97.

    It is so where nothing is given.

    >>> decay_interval(700)
    4.8
    """
    return steps * DECAY_EPOCHS / EPOCHS


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a fit runs.

    Args:
        steps: number of steps in all.
        schedule: of both learning rates, ``"cosine"`` or ``"linear"`` (to 0 at the last step),
            ``"constant"``, or ``"exponential"``: by 0.97 after every ``decay_every`` steps, as a
            smooth curve. A rate that something else moves in between is refused.
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
        select: keep the best student by validation, the latest of equals; ``"one_error"``: the
            latest whose accuracy is within one standard error of the best one, sqrt(a (1 − a) / n)
            of an accuracy a on n examples, which cannot tell them apart (Breiman et al., 1984:
            the one-standard-error rule); False: keep the last one, whatever validation shows.
        patience: end the fit after so many validations in a row that were no better than the best
            one before them, by the metric by which the student is selected. They are counted from
            where the teacher begins. None: all steps are taken. The schedule stays that of
            ``steps``, so that with ``"cosine"`` or ``"linear"`` an early end is one at a larger
            rate.
        validate_every, log_every, save_every: in steps; the last step counts as a multiple of each.
        keep: checkpoints kept.
        num_workers: of the loaders of metapl's own batches; changes nothing but speed.
        phase: the name under which checkpoints and rows are kept.
    """

    steps: AtLeastOne
    schedule: Literal["cosine", "linear", "constant", "exponential"] = "cosine"
    decay_every: Annotated[float, Range(above=0)] | None = None
    warmup: AtLeastZero = 0
    wait: AtLeastZero = 0
    first_steps: AtLeastZero | None = None
    ema_decay: Annotated[float, Range(0, 1)] | None = None
    warm_start: bool = False
    select: bool | Literal["one_error"] = True
    patience: AtLeastOne | None = None
    validate_every: AtLeastOne = 100
    log_every: AtLeastOne = 20
    save_every: AtLeastOne = 500
    keep: AtLeastOne = 2
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    phase: str = "fit"

    def __post_init__(self) -> None:
        check_fields(self)
        if reason := self._why_not():
            raise MetaplError(f"{reason}.")

    def _why_not(self) -> str:
        """Return which options do not go together, and what to give instead; "" for none."""
        after_wait = self.steps - self.wait
        if after_wait < 1:
            return f"wait={self.wait}: expected fewer than steps={self.steps}"
        if self.first_steps is not None and self.first_steps >= after_wait:
            return f"first_steps={self.first_steps}: expected fewer than steps - wait, {after_wait}"
        if self.warmup > after_wait:
            return f"warmup={self.warmup}: expected at most steps - wait, {after_wait}"
        if self.decay_every is not None and self.schedule != "exponential":
            return f"decay_every={self.decay_every}: expected None, or schedule='exponential'"
        if self.phase in ("", ".", "..") or {*self.phase} & {*"/\\\0"}:
            return f"phase={self.phase!r}: expected a plain name, for it names a folder"
        return ""

    def rate(self, step: int, wait: int = 0) -> float:
        """Return the factor of a base learning rate at ``step``.

        Args:
            wait: the student's, whose factor is 0 for so many steps.

        >>> [round(FitOptions(steps=4, warmup=1).rate(t), 2) for t in range(5)]
        [1.0, 1.0, 0.75, 0.25, 0.0]
        >>> [round(FitOptions(steps=4, schedule="linear").rate(t), 2) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]

        Noisy Student ends with this rate:

        >>> round(0.128 * FitOptions(steps=350, schedule="exponential").rate(350), 6)
        0.001507
        """
        step = step - wait
        steps = self.steps - wait
        if step < 0:
            return 0.0
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "exponential":
            return float(DECAY ** (step / (self.decay_every or decay_interval(steps))))
        share = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "linear":
            return 1.0 - share
        return 0.5 * (1 + math.cos(math.pi * share))

    def due(self, every: int, done: int) -> bool:
        """Return whether what is done ``every`` so many steps is due when so many are ``done``.

        After the last step everything is.
        """
        return done % every == 0 or done == self.steps


class FitKeywords(TypedDict, total=False):
    """The fields of :class:`FitOptions` besides ``steps``, as keywords for a type checker."""

    schedule: Literal["cosine", "linear", "constant", "exponential"]
    decay_every: float | None
    warmup: int
    wait: int
    first_steps: int | None
    ema_decay: float | None
    warm_start: bool
    select: bool | Literal["one_error"]
    patience: int | None
    validate_every: int
    log_every: int
    save_every: int
    keep: int
    num_workers: int
    phase: str


def fit_options(steps: int, keywords: FitKeywords, others: Sequence[str]) -> FitOptions:
    """Return the options of a fit, and refuse a keyword that is none of them.

    Args:
        others: the fit's other keywords, which may have been meant.
    """
    options = [*FitKeywords.__annotations__]
    for name in keywords:
        if name not in options:
            raise no_such_option(name, [*others, *options], "fit")
    return FitOptions(steps=steps, **keywords)


class Rates:
    """The rates that the optimizers of a trainer came with, and what the schedule makes of them.

    Attributes:
        optimizers: those of ``torch.optim`` by the names of their arguments, such as
            ``"inner_optimizer"``, whose rate has the column ``"inner_lr"``.
        begun_groups: the settings of the groups of each as the fit began, or as they were added.

    Raises: :class:`metapl.MetaplError` where something else moves a rate in between.
    """

    def __init__(self, trainer: AnyTrainer, options: FitOptions) -> None:
        self.options = options
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.begun_groups: dict[str, list[dict[str, Any]]] = {}
        for name, optimizer in trainer.optimizers.items():
            # A transform of TorchOpt has no rate to move.
            if not isinstance(optimizer, torch.optim.Optimizer):
                continue
            self.optimizers[name] = optimizer
            self.begun_groups[name] = [settings_of_group(group) for group in optimizer.param_groups]
        # As the last step had them.
        self._moved: dict[str, list[float]] = {}

    def move(self, step: int | None) -> None:
        """Set the rates of a step; None: the base rates."""
        for name, optimizer in self.optimizers.items():
            # While the teacher trains alone, the student waits.
            wait = 0 if name == "outer_optimizer" else self.options.wait
            factor = 1.0 if step is None else self.options.rate(step, wait)
            groups = optimizer.param_groups
            begun_groups = self.begun_groups[name]
            for group, rate in zip(groups, self._moved.get(name, []), strict=False):
                # The same object first: to compare tensors makes the host wait for a device.
                if step is not None and group["lr"] is not rate and group["lr"] != rate:
                    raise MetaplError(
                        f"something set the rate of {name} to {float(group['lr']):g} during a fit, "
                        "which sets it itself by schedule=; expected no other scheduler, or a loop "
                        "of trainer.step (docs/own-loop.md)."
                    )
            # Groups may have been added since, such as those of layers that were unfrozen.
            for group in groups[len(begun_groups) :]:
                begun_groups.append(settings_of_group(group))
            for group, begun in zip(groups, begun_groups, strict=True):
                group["lr"] = begun["lr"] * factor
            self._moved[name] = [group["lr"] for group in groups]

    def take_given(self, names: Container[str]) -> None:
        """Set the groups to settings that the fit began with, where a state has brought others.

        Args:
            names: of these settings, such as ``inner_optimizer.0.momentum``.
        """
        for name, optimizer in self.optimizers.items():
            groups = zip(optimizer.param_groups, self.begun_groups[name], strict=True)
            for number, (group, begun) in enumerate(groups):
                for key, value in begun.items():
                    if key in group and f"{name}.{number}.{key}" in names:
                        group[key] = value

    def now(self) -> dict[str, float]:
        """Return the rates of the first param groups, by column of a row."""
        rates = {}
        for name, optimizer in self.optimizers.items():
            column = name.removesuffix("optimizer") + "lr"
            # It may be a tensor.
            rates[column] = float(optimizer.param_groups[0]["lr"])
        return rates


def settings_of_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the settings of a param group, with the number of its parameters."""
    settings = {key: value for key, value in group.items() if key != "params"}
    settings["parameters"] = len(group["params"])
    return settings


class Average:
    r"""The average θ̅ that follows a network's weights θ.

    .. math:: \bar\theta \leftarrow d_t \bar\theta + (1 - d_t)\, \theta, \qquad
              d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics)
    are copied. ``torch.optim.swa_utils.AveragedModel`` counts on the device, so that each step
    would wait for it, and copies the module, which a sharded one does not allow. Cost: a copy of
    the weights; one fused pass over them an update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
            raise MetaplError("ema_decay was given with 16-bit weights; expected 32-bit ones.")
        self.network = network
        self.decay = decay
        self.steps = 0
        self._averages = self._copies()

    @torch.no_grad()
    def update(self) -> None:
        """Follow the network by one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        parts = {name: local(t) for name, t in self._tensors().items()}
        moving = set()
        for name, p in self.network.named_parameters():
            if p.is_floating_point() or p.is_complex():
                moving.add(name)
        torch._foreach_lerp_(
            [self._averages[name] for name in moving], [parts[name] for name in moving], 1 - decay
        )
        # A pass may have made buffers, or given them another shape.
        self._averages = {
            name: self._averages[name] if name in moving else t.clone() for name, t in parts.items()
        }
        self.steps += 1

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Yield the network with the averaged weights.

        After the block it is bit for bit as it was.
        """
        weights = self._copies()
        try:
            self._write(self._averages)
            yield self.network
        finally:
            self._write(weights)

    def _copies(self) -> dict[str, Tensor]:
        """Return copies of this process's parts of the network's tensors."""
        return {name: local(t).detach().clone() for name, t in self._tensors().items()}

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, t in self._tensors().items():
            part = local(t)
            value = values.get(name)
            # What has another shape is a cache that grew with a longer input.
            if value is not None and value.shape == part.shape:
                part.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights, laid out as the network's, and their number of steps."""
        averages = {}
        for name, t in self._tensors().items():
            if name in self._averages:
                averages[name] = as_sharded(self._averages[name], t)
        return {"module": averages, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, whole or laid out as the network is."""
        for name, t in self._tensors().items():
            part = local(laid_out_like(state["module"][name], t))
            self._averages[name] = part.to(t.device, copy=True)
        self.steps = state["steps"]

    def _tensors(self) -> dict[str, Any]:
        # Else a sharded network holds other tensors.
        reshard(self.network)
        return dict(self.network.named_parameters()) | dict(self.network.named_buffers())
