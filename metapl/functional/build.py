"""The pure step of a trainer; see :meth:`metapl.BilevelTrainer.functional`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.feedback import MODES, Implicit, estimator
from metapl.functional.state import State, dot, norm, state_of, unclipped
from metapl.functional.step import Step, make_step
from metapl.problems.base import enters_input, has_own
from metapl.updates import Clipped, TorchUpdate, Update, as_taken, options_of, update_of

LONGEST = 3  # steps that are unrolled in one function


# An estimator of one's own, or a subclass, has its feedback on the eager road alone.
KNOWN = {type(estimator(name)) for name in MODES} - {Implicit}


def updates_of(trainer: Any) -> tuple[Update, Update | None]:
    found: list[Any] = [unclipped(trainer.update), None]
    if trainer.teacher is not None:
        trained = {name: p for name, p in trainer.teacher.named_parameters() if p.requires_grad}
        found[1] = update_of(trainer.outer_optimizer, trained, name="outer_optimizer")
    if trainer.clip_norm is not None:
        space: Any = SimpleNamespace(dot=dot, norm=norm)  # by operations that every transform has rules for
        found = [update and Clipped(update, trainer.clip_norm, space) for update in found]
    return found[0], found[1]


def step_of(trainer: Any, steps: int, updates: tuple[Update, Update | None]) -> Step:
    """The pure step of a trainer that looks so many steps ahead."""
    mode, problem, own = trainer.mode, trainer.problem, trainer.teacher_losses
    enters, inner = enters_input(problem), unclipped(updates[0])
    refused = {
        f"{type(mode).__name__}, but the library's modes without implicit": type(mode) not in KNOWN,
        "accumulate": trainer.accumulate > 1,
        "several processes": trainer.layout.kind != "plain" or not trainer.ranks.alone,
        f"{steps} steps ahead, but {LONGEST} at most": steps > LONGEST,
        "cosine of several steps": (steps > 1 or enters) and getattr(mode, "normalization", "") == "cosine",
        "transform that hides state": not isinstance(inner, TorchUpdate) and not _repeats(inner),
    }
    for what in (what for what, is_so in refused.items() if is_so):
        raise MetaplError(f"the pure step takes no {what}; leave compile= and functional() out.")
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if trainer.precision != "float32":  # without the cache, which would keep casts of tensors inside a transform
        autocast = partial(torch.autocast, trainer.device.type, torch.bfloat16, cache_enabled=False)
    groups: list[Any] = [[], []]
    for place, update in enumerate(map(unclipped, updates)):
        if isinstance(update, TorchUpdate):  # a number that is no setting is 0
            groups[place] = [group | dict.fromkeys(update.numbers, 0.0) for group in options_of(update.optimizer)]
    groups[1] = as_taken(groups[1])
    return make_step(
        trainer.teacher,
        trainer.student,
        problem,
        mode,
        *updates,
        groups,
        problem.default_teacher_losses if own is None else lambda batch: own,
        steps=steps,
        weight=trainer.feedback_weight,
        ratio=trainer.feedback_ratio,
        enters=enters,
        revises=has_own(problem, "revised_signal"),
        autocast=autocast,
    )


def functional(trainer: Any) -> tuple[Step, State]:
    updates = updates_of(trainer)
    step: Any = step_of(trainer, trainer.lookahead, updates)
    step.__code__ = step.__code__.replace()  # Dynamo counts graphs by code object, which all steps would share
    return step, pytree.tree_map_only(Tensor, Tensor.clone, state_of(trainer, updates))


def _repeats(update: Update) -> bool:
    """Whether a second call with the same state gives the same update."""
    theta = {name: p.detach() for name, p in update.parameters.items()}
    once, again = (update.update(theta, theta, update.read_state())[0] for _ in "ab")
    return all(torch.equal(t, again[name]) for name, t in once.items())
