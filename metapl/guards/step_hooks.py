"""Hooks on the inner optimizer's own step, or another step: what they do is in no rule.

A hook may keep an average of the weights or step a scheduler, so that verification, which takes
many steps of copies, does not call it. The first real step is compared with the rule instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metapl.core.path import Path
from metapl.errors import MetaplError, few, warn
from metapl.updates import Clipped, TorchUpdate, Update, parts_of

# How far a step may lead from its rule, in the step's length; of Muon, which takes it in bfloat16.
TOLERANCE = 1e-3
TOLERANCE_OF_ROUNDED = 0.1
# In the weights' rounding.
ROUNDINGS = 16


def optimizers_of(update: Update) -> Sequence[torch.optim.Optimizer]:
    """Return the optimizers of ``torch.optim`` behind a rule."""
    while isinstance(update, Clipped):
        update = update.inner
    return parts_of(update.optimizer) if isinstance(update, TorchUpdate) else ()


def with_hooks(update: Update) -> str:
    """Return the kinds of the optimizers behind a rule that do more in their step; "" for none."""
    kinds: list[str] = []
    for optimizer in optimizers_of(update):
        step = vars(optimizer).get("step")
        # A scheduler of torch wraps it, and counts its calls.
        is_replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
        hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        if is_replaced or any(hooks):
            kinds.append(type(optimizer).__name__)
    return few(kinds)


def tell_hooks_that_are_left_out(update: Update) -> None:
    """Warn of hooks on an optimizer's step, in a call that takes no step of that optimizer."""
    kinds = with_hooks(update)
    if kinds:
        warn(
            f"hooks on the step of the inner optimizer, or a step() in its place ({kinds}), are "
            "not called here, and what they do to weights and gradients is in no derivative.",
        )


def committed_first(path: Path) -> Callable[[], dict[str, Tensor]]:
    """Move the student by an optimizer with hooks, and refuse hooks that move it otherwise.

    Returns: what moves the student where no hook has to be looked at, and what has moved it; either
        returns the numbers of :meth:`metapl.core.path.Path.commit`.

    Raises: :class:`metapl.MetaplError`, with weights and optimizers as they were.
    """
    student = path.student
    kinds = with_hooks(path.update)
    if not kinds or not student.has_whole_weights or not student.ranks.alone:
        return path.commit
    optimizers = optimizers_of(path.update)
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    before = {name: p.detach().clone() for name, p in student.parameters.items()}
    by_rule = {name: t.clone() for name, t in path.params.items()}
    numbers = path.commit()
    norm = student.space.norm
    after = {name: p.detach() for name, p in student.parameters.items()}
    gap = float(norm({name: after[name] - t for name, t in by_rule.items()}))
    length = float(norm({name: before[name] - t for name, t in by_rule.items()}))
    rounding = ROUNDINGS * max(torch.finfo(t.dtype).eps for t in by_rule.values())
    share = TOLERANCE_OF_ROUNDED if path.update.is_rounded else TOLERANCE
    if gap <= share * length + rounding * float(norm(by_rule)):
        return lambda: numbers
    with torch.no_grad():
        for name, p in student.parameters.items():
            p.copy_(before[name])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    raise MetaplError(
        f"a hook on the step of the inner optimizer, or a step() in its place ({kinds}), moves the "
        f"student {gap:.1e} away from where the rule leads, in a step of {length:.1e}, and no mode "
        "knows of it; expected hooks that change no weight and no gradient (see clip_norm), or "
        "verify=False."
    )
