"""``BilevelTrainer(compile=True)``: its steps by the pure step, compiled whole; modules and optimizers own the tensors.

A step reads networks and optimizers into a state, runs one graph, and copies the new state back. The first step of each
kind is compared with the eager one, taken by a copy of the trainer; what cannot be captured is refused there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import length
from metapl.execution.checks import Fault
from metapl.execution.kernels import no_fast_path
from metapl.execution.numerics import Tree
from metapl.execution.ranks import gumbel
from metapl.execution.rng import RandomState, branching_to
from metapl.functional.build import state_of, step_of, updates_of
from metapl.functional.network import tensors_of
from metapl.functional.state import Report, State
from metapl.functional.trees import norm
from metapl.problems.base import Signal
from metapl.training.contract import StepReport
from metapl.updates import Clipped, TorchUpdate

# Draws of eager passes, dropout masks among them: Inductor's own kernels draw others.
OPTIONS: dict[str, Any] = {"fallback_random": True}
# How far the first step's h, first moments and buffers may be from eager ones, by norm.
AGREES = {torch.float64: 1e-6, torch.float32: 2e-2}
# Of the slope identity, which a difference of outputs keeps to the second order of its move.
SLOPES = 0.1


class CompiledStep:
    """The compiled steps of one trainer, which every call is given; a copy of it compiles anew."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledStep, ()

    def __call__(self, trainer: Any, labeled: Any, batches: Sequence[Any], ahead: bool) -> StepReport:
        """One step on a labeled batch and the inner ones; ``ahead``: as a look-ahead, even of one step."""
        key = _kind(trainer, len(batches))
        first = key not in self.known
        if first:
            _refuse(trainer)
            updates = updates_of(trainer)
            step: Any = step_of(trainer, len(batches), updates)
            # Dynamo counts graphs by code object, which the steps of all trainers would share.
            step.__code__ = step.__code__.replace()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # while Inductor is imported
                compiled: Any = torch.compile(step, fullgraph=True, dynamic=False, options=OPTIONS)
            eager, there, probs = _eager(trainer, labeled, batches, ahead)
        else:
            compiled, updates, probs = self.known[key]
        noise = None
        if trainer.generator is not None and probs is not None:
            drawn = [gumbel(length(batch), probs.shape[1], probs, trainer.generator) for batch in batches]
            noise = tuple(drawn) if len(drawn) > 1 else drawn[0]
        state = state_of(trainer, updates)
        given = state, labeled, tuple(batches) if len(batches) > 1 else batches[0], noise
        with torch.no_grad(), no_fast_path(math=True):
            try:
                moved, report = compiled(*given)
            except Exception as error:
                if not first:
                    raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                where = [line.strip() for line in lines if line.strip().startswith("File ")][-1:]
                raise MetaplError(
                    f"torch.compile cannot take this step: {' '.join([lines[0], *where])}; leave compile out."
                ) from error
        wrapped = _report(trainer, report, ahead)
        if first:
            _compare(state, moved, wrapped, there, eager)
            self.known[key] = compiled, updates, probs
        _write(trainer, state, moved, updates)
        trainer.mode_state, trainer.steps_done = moved.mode, trainer.steps_done + 1
        return wrapped


def _kind(trainer: Any, steps: int) -> Any:
    """What a graph is of, besides the tensors: of another kind another one is compiled, and compared."""
    networks = [n for n in (trainer.teacher, trainer.student) if n is not None]
    parts = tuple((id(m), m.training, *((p is not None and p.requires_grad) for p in m._parameters.values()))
                  for network in networks for m in network.modules())  # fmt: skip
    chosen = trainer.feedback_weight, trainer.feedback_ratio, id(trainer.problem), trainer.mode, trainer.teacher_losses
    return steps, chosen, parts


def _refuse(trainer: Any) -> None:
    for role, network in {"teacher": trainer.teacher, "student": trainer.student}.items():
        for name, p in [] if network is None else network.named_parameters():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise MetaplError(f"the {role}'s {name} has a hook, which no graph captures; leave compile out.")
    if not all(isinstance(u.inner if isinstance(u, Clipped) else u, TorchUpdate) for u in (trainer.update,)):
        raise MetaplError("inner_optimizer is a TorchOpt transform, which is not compiled; leave compile out.")


def _eager(trainer: Any, labeled: Any, batches: Sequence[Any], ahead: bool) -> tuple[StepReport, State, Tensor | None]:
    """The same step by a copy of the trainer, eagerly: its report, the state after it, and the probabilities that
    labels were drawn from. The generators stay where they are."""
    start = RandomState.now(trainer.device)

    def taken() -> tuple[Any, StepReport]:
        memo = {} if trainer.generator is None else {id(trainer.generator): trainer.generator.clone_state()}
        twin = copy.deepcopy(trainer, memo)
        vars(twin)["compile"] = False
        from metapl.feedback.lookahead import Lookahead

        return twin, twin.step(labeled, Lookahead(list(batches)) if ahead else batches[0])

    numbers = _plain(trainer)
    twin, report = taken()
    end = RandomState.now(trainer.device)
    if not end.same(start):  # L(θ′) draws where the teacher's passes end; on the eager road, from a stream of its own
        start.restore()
        with branching_to(end):
            twin, report = taken()
    start.restore()
    changed = [name for name, value in _plain(twin).items() if numbers.get(name) != value]
    if changed:
        raise MetaplError(f"{changed[0]} changes from step to step, which no graph captures; leave compile out.")
    return report, state_of(twin, updates_of(twin)), report.signal.probs


def _plain(trainer: Any) -> dict[str, Any]:
    """The numbers and texts in the networks' modules."""
    networks = {"the teacher": trainer.teacher, "the student": trainer.student}
    return {
        f"{role}'s {path}{'.' * bool(path)}{name}": value
        for role, network in networks.items()
        for path, part in ([] if network is None else network.named_modules())
        for name, value in vars(part).items()
        if isinstance(value, int | float | str)
    }


def _report(trainer: Any, report: Report, ahead: bool) -> StepReport:
    """A pure step's report as the trainer's."""
    several = isinstance(report.feedback, list)
    feedback = [_by_key(h) for h in (report.feedback if several else [report.feedback])]
    fields = report.signal[-1] if several else report.signal
    keyed = {name: t for name, t in fields.items() if name.startswith("value[")}
    rest = {name: t for name, t in fields.items() if name not in keyed}
    signal = Signal(**{"value": _by_key(keyed), **rest}) if keyed else Signal(**rest)
    scalars = {"inner_loss": report.inner_loss, "outer_loss": report.outer_loss}
    if trainer.mode.name == "none":
        scalars.pop("outer_loss")
    if trainer.teacher is not None:
        own = {f"teacher_{name}": t for name, t in report.teacher_losses.items()}
        scalars |= {"teacher_loss": report.teacher_loss, **own}
    text = "the step's numbers are not finite, or the student's pass is no function of its weights."
    return StepReport(
        trainer.steps_done,
        scalars,
        Fault([(~(report.flag < SLOPES), text)]),
        feedback=tuple(feedback) if ahead else feedback[0],
        signal=signal,
        student_outputs=report.student_outputs,
    )


def _by_key(fields: Any) -> Any:
    """A dict by fields of a signal's dict, ``value['weight']``, by its keys."""
    return fields if isinstance(fields, Tensor) else {name[7:-2]: t for name, t in fields.items()}


def _compare(before: State, moved: State, report: StepReport, there: State, eager: StepReport) -> None:
    """Refuse a compiled step that is not the eager one: by h, both gradients, and the buffers."""

    def seen(state: State, report: StepReport) -> dict[str, Tree]:
        trees = {"h": {str(i): t for i, t in enumerate(pytree.tree_leaves(report.feedback))}}
        for role in ("teacher", "student"):
            network, begun = getattr(state, role), getattr(before, role)
            held = (state.outer if role == "teacher" else state.inner).state
            # First moments, in which the gradient is; not weights, of which a fresh Adam's move is a sign.
            trees[f"the {role}'s gradient"] = {
                n: held[n].get("exp_avg", held[n].get("momentum_buffer", p - begun.params[n]))
                for n, p in network.params.items()
            }
            trees[f"the {role}'s buffers"] = {n: t for n, t in network.state.items() if t.is_floating_point()}
        return {name: tree for name, tree in trees.items() if tree}

    for name, tree in seen(there, eager).items():
        found = seen(moved, report)[name]
        gap, size = norm({n: found[n] - t for n, t in tree.items()}), norm(tree)
        rounding = 1e3 * torch.finfo(gap.dtype).eps * report.scalars["inner_loss"].abs() if name == "h" else 0.0
        if not bool(gap <= AGREES[gap.dtype] * size + rounding):
            raise MetaplError(f"compiled, {name} is {float(gap / size):.2g} off its eager value; leave compile out.")


def _write(trainer: Any, before: State, moved: State, updates: Any) -> None:
    """The new state into modules and optimizers."""
    for role, update, optimizer in zip(("student", "teacher"), updates, (moved.inner, moved.outer), strict=True):
        network: Any = getattr(moved, role)
        for tree, held in zip(network, tensors_of(getattr(trainer, role)), strict=True):
            if tree:
                torch._foreach_copy_([held[n] for n in tree], list(tree.values()))
        if update is None:
            continue
        inner: Any = update.inner if isinstance(update, Clipped) else update
        there, new = list[Tensor](), list[Tensor]()
        for name, p in inner.parameters.items():
            state = inner.optimizer.state[p]
            for key, t in optimizer.state[name].items():
                if isinstance(state.get(key), Tensor):
                    there.append(state[key])
                    new.append(t)
                else:
                    state[key] = t.clone()
        if there:
            torch._foreach_copy_(there, new)
