"""The first compiled step beside the eager one, taken by a copy of the trainer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.numerics import as_real
from metapl.execution.rng import RandomState, branching_to
from metapl.feedback.lookahead import Lookahead
from metapl.functional.build import updates_of
from metapl.functional.state import State, state_of
from metapl.functional.trees import norm

AGREES = {torch.float64: 1e-6, torch.float32: 2e-2}  # by norm
Taken = tuple[State, Any]  # the state after a step, and the trainer's report


def eager_step(trainer: Any, labeled: Any, batches: Sequence[Any], ahead: bool) -> Taken:
    """The step of a trainer, taken by a copy of it on the eager road. No generator moves."""
    start, generator = RandomState.now(trainer.device), trainer.generator

    def taken() -> Any:
        twin = copy.deepcopy(trainer, {} if generator is None else {id(generator): generator.clone_state()})
        vars(twin)["compile"] = False
        return twin, twin.step(labeled, Lookahead(list(batches)) if ahead else batches[0])

    twin, report = taken()
    end = RandomState.now(trainer.device)
    start.restore()
    # L(θ′) draws on where the teacher's passes end; on the eager road, from its own stream.
    ends = zip(end.values().values(), start.values().values(), strict=True)
    if any(a is not None and b is not None and not a.equal(b) for a, b in ends):
        with branching_to(end):
            twin, report = taken()
        start.restore()
    for net, other in ((trainer.student, twin.student), (trainer.teacher, twin.teacher)):
        for (path, part), moved in zip(net.named_modules(), other.modules(), strict=True) if net is not None else ():
            for name, value in vars(moved).items():
                if isinstance(value, int | float | str) and vars(part).get(name) != value:
                    raise MetaplError(f"a network's {path}.{name} changes in a step, which no graph captures.")
    return state_of(twin, updates_of(twin)), report


def refuse_other(before: State, found: Taken, expected: Taken) -> None:
    """Refuse a compiled step that is not the eager one: by h, both gradients, and the buffers."""

    def seen(state: State, report: Any) -> dict[str, dict[Any, Tensor]]:
        trees = {"h": dict(enumerate(pytree.tree_leaves(report.feedback)))}
        for role, held in (("student", state.inner.state), ("teacher", state.outer.state)):
            network, was = getattr(state, role), getattr(before, role).params
            # By first moments, in which gradients are; of a fresh Adam, a weight's move is a sign.
            params = network.params.items()
            moved = {n: held[n].get("exp_avg", held[n].get("momentum_buffer", t - was[n])) for n, t in params}
            trees |= {f"the {role}'s gradient": moved, f"the {role}'s buffers": network.state}
        return trees

    for role in ("student", "teacher"):
        was, there, here = (getattr(state, role).params for state in (before, expected[0], found[0]))
        for name in (n for n, p in was.items() if torch.equal(p, there[n]) and not torch.equal(p, here[n])):
            raise MetaplError(f"no loss reaches the {role}'s {name}, which would decay; expected requires_grad=False.")
    ours, loss = seen(*found), expected[1].scalars["inner_loss"]
    for name, tree in seen(*expected).items():
        refuse_gap(name, ours[name], tree, loss, rounding=name == "h")


def refuse_gap(name: str, ours: Any, eager: Any, loss: Tensor, *, rounding: bool = False) -> None:
    """Refuse a tree that is not the eager one's values, by norm; ``rounding``: of scalars that cancel."""
    off = {n: as_real(ours[n]).double() - as_real(t) for n, t in eager.items()}
    gap, size = (norm(tree) if tree else 0.0 * loss for tree in (off, eager))
    least = 1e3 * torch.finfo(loss.dtype).eps * loss.abs() if rounding else 0.0
    if not bool(gap <= AGREES[loss.dtype] * size + least):
        raise MetaplError(f"compiled, {name} is {float(gap / size):.2g} off its eager value; leave compile out.")
