"""The pure step of a trainer, and its state; see :meth:`metapl.BilevelTrainer.functional`."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.numerics import wide
from metapl.functional.network import tensors_of
from metapl.functional.state import Optimizer, State, optimizer_of
from metapl.functional.step import Step, make_step
from metapl.functional.trees import PlainSpace
from metapl.problems.base import enters_input, has_own
from metapl.updates import Clipped, TorchUpdate, Update, options_of, update_of

LONGEST = 3  # steps that are unrolled in one function


def updates_of(trainer: Any) -> tuple[Update, Update | None]:
    """U of the student and of the teacher, with their clips."""
    inner = trainer.update.inner if isinstance(trainer.update, Clipped) else trainer.update
    outer = None
    if trainer.teacher is not None:
        if type(trainer.outer_optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            raise MetaplError(
                f"outer_optimizer is {trainer.outer_optimizer!r:.80}; expected torch.optim.SGD, Adam or AdamW on the "
                "pure road (compile=False takes any)."
            )
        outer = update_of(
            trainer.outer_optimizer, {n: p for n, p in trainer.teacher.named_parameters() if p.requires_grad}
        )
    if trainer.clip_norm is None:
        return inner, outer
    clipped = [update and Clipped(update, trainer.clip_norm, PlainSpace()) for update in (inner, outer)]
    return clipped[0], clipped[1]  # type: ignore[return-value]  # the first is one


def step_of(trainer: Any, steps: int, updates: tuple[Update, Update | None]) -> Step:
    """The pure step of a trainer that looks so many steps ahead."""
    given: dict[str, Any] = {
        "accumulate": trainer.accumulate > 1,
        f"lookahead={steps}, more than {LONGEST} steps (metapl.functional.training)": steps > LONGEST,
        "mode implicit": trainer.mode.name == "implicit",
        "several processes or a sharded network": trainer.layout.kind != "plain" or not trainer.ranks.alone,
        "normalization='cosine' with several steps": steps > 1
        and getattr(trainer.mode, "normalization", "") == "cosine",
        "a TorchOpt transform with hidden state": not _is_function(updates[0]),
    }
    for what in (name for name, is_given in given.items() if is_given):
        raise MetaplError(f"the pure step takes no {what}; leave compile and functional() out.")
    kept = [
        [{n: v for n, v in group.items() if not _is_setting(u, n, v)} for group in options_of(u.optimizer)]
        if isinstance(u := update.inner if isinstance(update, Clipped) else update, TorchUpdate)
        else []
        for update in updates
    ]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if trainer.precision != "float32":
        # Its cache would keep casts of tensors that a transform has wrapped.
        autocast = partial(torch.autocast, trainer.device.type, torch.bfloat16, cache_enabled=False)
    own, code = trainer.teacher_losses, getattr(trainer.problem.inner_loss, "__code__", None)
    weights = [*inspect.signature(trainer.problem.inner_loss).parameters][3:4]
    return make_step(
        trainer.teacher,
        trainer.student,
        trainer.problem,
        trainer.mode,
        *updates,
        (kept[0], kept[1]),
        trainer.problem.default_teacher_losses if own is None else lambda batch: own,
        steps=steps,
        weight=trainer.feedback_weight,
        ratio=trainer.feedback_ratio,
        enters=enters_input(trainer.problem),
        reads=code is None or any(weights[0] in str(i.argval) for i in dis.get_instructions(code)),
        revises=has_own(trainer.problem, "revised_signal"),
        autocast=autocast,
    )


def state_of(trainer: Any, updates: tuple[Update, Update | None]) -> State:
    """The tensors of a trainer's networks and optimizers, as they are, with those made that are missing."""
    inner, outer = updates
    student, device = tensors_of(trainer.student), trainer.device
    kind = wide(next(iter(student.params.values()))).dtype
    return State(
        tensors_of(trainer.teacher),
        student,
        optimizer_of(inner, device),
        Optimizer({}, []) if outer is None else optimizer_of(outer, device),
        {name: t.to(device, kind) for name, t in trainer.mode_state.items()},
        torch.tensor(trainer.steps_done, device=device),
    )


def functional(trainer: Any) -> tuple[Step, State]:
    """The pure step of a trainer, and a copy of its state."""
    updates = updates_of(trainer)
    step = step_of(trainer, trainer.lookahead, updates)
    return step, pytree.tree_map_only(Tensor, Tensor.clone, state_of(trainer, updates))


def _is_setting(update: TorchUpdate, name: str, value: Any) -> bool:
    return name in update.settings and (isinstance(value, tuple) or value != 0)


def _is_function(update: Update) -> bool:
    """Whether a second call with the same state gives the same update."""
    inner = update.inner if isinstance(update, Clipped) else update
    if isinstance(inner, TorchUpdate):
        return True
    theta = {name: p.detach() for name, p in inner.parameters.items()}
    once, again = (inner.update(theta, theta, inner.read_state())[0] for _ in "ab")
    return all(torch.equal(t, again[name]) for name, t in once.items())
