"""The pure step of a trainer, :meth:`metapl.BilevelTrainer.functional`: what of a trainer it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import Batch
from metapl.execution.layout import refuse_compiled
from metapl.execution.state import trainable
from metapl.functional.state import (
    State,
    clipped,
    constants_of,
    state_of,
    unclipped,
)
from metapl.functional.step import StateStep, StepRules
from metapl.problems.base import modules_in
from metapl.problems.losses import TeacherLoss
from metapl.protocols import TwoLevelTrainer
from metapl.updates import (
    TorchUpdate,
    Update,
    parts_of,
    rounded_options,
    update_of,
)

# How many steps are unrolled in one function at most.
LONGEST = 3


class Updates(NamedTuple):
    """The rules of the two optimizers of a trainer, each behind its clip, if there is one."""

    inner: Update
    outer: Update | None


def updates_of(trainer: TwoLevelTrainer) -> Updates:
    """Return the rules of a trainer's optimizers for the parameters that are trained now."""
    inner = trainer.update
    if trainer.teacher is None or trainer.outer_optimizer is None:
        return Updates(inner, None)
    outer = update_of(
        trainer.outer_optimizer,
        trainable(trainer.teacher),
        name="outer_optimizer, beside compile= or functional(),",
        alternative="or compile left out",
    )
    return Updates(inner, clipped(outer, trainer.clip_norm))


def step_of(trainer: TwoLevelTrainer, steps: int, updates: Updates) -> StateStep:
    """Return the step of a trainer that looks so many steps ahead, as a function of tensors.

    Raises: :class:`metapl.MetaplError` for what has no pure step.
    """
    refuse_compiled("student", trainer.student)
    refuse_compiled("teacher", trainer.teacher)
    inner = unclipped(updates.inner)
    if reason := why_not_pure(trainer, steps, inner):
        raise MetaplError(f"compile= or functional() was given {reason}.")

    losses_for: Callable[[Batch], Sequence[TeacherLoss]] = trainer.problem.default_teacher_losses
    if trainer.teacher_losses is not None:
        losses_for = for_every_batch(trainer.teacher_losses)
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if trainer.precision != "float32":
        # Without the cache, which would keep casts of tensors inside a transform.
        autocast = partial(torch.autocast, trainer.device.type, torch.bfloat16, cache_enabled=False)
    return StateStep(
        StepRules(
            teacher=trainer.teacher_layout,
            student=trainer.layout,
            problem=trainer.problem,
            mode=trainer.mode,
            inner_update=updates.inner,
            outer_update=updates.outer,
            inner_constants=constants_of(inner),
            outer_constants=rounded_options(constants_of(unclipped(updates.outer))),
            losses_for=losses_for,
            steps=steps,
            feedback_size=trainer.feedback_size,
            direct_term=trainer.direct_term,
            device=trainer.device,
            autocast=autocast,
        ),
        sources_of(trainer),
    )


def for_every_batch(losses: Sequence[TeacherLoss]) -> Callable[[Batch], Sequence[TeacherLoss]]:
    """Return a function of a batch that returns the same losses for all of them."""
    return lambda batch: losses


def why_not_pure(trainer: TwoLevelTrainer, steps: int, inner: Update) -> str:
    """Return what of a trainer has no pure step, and what is expected instead; "" for nothing.

    Args:
        steps: how many the trainer looks ahead.
        inner: the rule of the student's optimizer, without its clip.
    """
    mode = trainer.mode
    is_alone = trainer.layout.kind == "plain" and trainer.ranks.alone
    if not mode.is_pure:
        name = type(mode).__name__
        return f"mode {name}, of the eager road alone; expected another, or is_pure = True in it"
    if mode.takes_outer_losses and trainer.precision != "float32":
        # Its outer losses run as one vmapped pass, in which autocast leaves biases in float32.
        return f'{mode.name} with precision="{trainer.precision}"; expected "float32"'
    tensors = tensors_of_networks(trainer)
    if any(t._backward_hooks or t._post_accumulate_grad_hooks for t in tensors):
        return "a hook on a parameter of the networks; expected none"
    if any(hooks_of_optimizers(trainer)):
        return "a hook on an optimizer's step; expected none"
    if trainer.accumulate > 1:
        return f"accumulate={trainer.accumulate}; expected 1"
    if not is_alone:
        return "networks of several processes; expected one process"
    if steps > LONGEST:
        return f"{steps} steps ahead; expected at most {LONGEST}"
    if not isinstance(inner, TorchUpdate) and has_hidden_state(inner):
        return "a transform with hidden state; expected torch.optim's"
    return ""


def has_hidden_state(update: Update) -> bool:
    """Return whether a second call of an update with the same state gives another result."""
    weights = {name: p.detach() for name, p in update.parameters.items()}
    gradients = weights
    first, _ = update.update(weights, gradients, update.read_state())
    second, _ = update.update(weights, gradients, update.read_state())
    return not all(torch.equal(t, second[name]) for name, t in first.items())


def functional(trainer: TwoLevelTrainer) -> tuple[StateStep, State]:
    """Return the pure step of a trainer, and a copy of its state."""
    updates = updates_of(trainer)
    step = step_of(trainer, trainer.lookahead, updates)
    return step, pytree.tree_map_only(Tensor, Tensor.clone, state_of(trainer, updates))


def networks_of(trainer: TwoLevelTrainer) -> list[nn.Module]:
    """Return the student and the teacher of a trainer, which may have no teacher."""
    return [network for network in (trainer.student, trainer.teacher) if network is not None]


def sources_of(trainer: TwoLevelTrainer) -> list[object]:
    """Return the objects whose attributes a step of the trainer reads."""
    modules = [part for network in networks_of(trainer) for part in network.modules()]
    losses = trainer.teacher_losses or ()
    held = modules_in(trainer.problem)
    return [*modules, *held, trainer.problem, trainer.mode, *losses]


def hooks_of_optimizers(trainer: TwoLevelTrainer) -> list[dict[Any, Any]]:
    """Return the tables of hooks on the steps of a trainer's optimizers."""
    tables: list[dict[Any, Any]] = []
    for optimizer in trainer.schedulable:
        for part in parts_of(optimizer):
            tables += [part._optimizer_step_pre_hooks, part._optimizer_step_post_hooks]
    return tables


def tensors_of_networks(trainer: TwoLevelTrainer) -> list[Tensor]:
    """Return the parameters and buffers of a trainer's networks."""
    networks = networks_of(trainer)
    parameters = [p for network in networks for p in network.parameters()]
    buffers = [b for network in networks for b in network.buffers()]
    return [*parameters, *buffers]
