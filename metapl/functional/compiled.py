"""``BilevelTrainer(compile=True)``: the pure step, compiled whole; modules and optimizers go on owning their tensors.

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
from metapl.execution.ranks import gumbel
from metapl.execution.rng import RandomState, branching_to
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.report import StepReport
from metapl.functional.build import step_of, updates_of
from metapl.functional.network import tensors_of
from metapl.functional.state import State, state_of, unclipped
from metapl.functional.trees import norm
from metapl.problems.base import Signal
from metapl.updates import TorchUpdate

# Inductor's own kernels would draw other dropout masks than PyTorch's.
BACKEND: dict[str, Any] = {"options": {"fallback_random": True}}
AGREES = {torch.float64: 1e-6, torch.float32: 2e-2}  # by norm: h, gradients and buffers with the eager ones
SLOPES = 0.1  # the greatest report.flag, to which the curvature along a finite difference contributes


class CompiledStep:
    """The compiled steps of one trainer, which every call is given; a copy of it compiles anew."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledStep, ()

    def __call__(self, trainer: Any, labeled: Any, batches: Sequence[Any], ahead: bool) -> StepReport:
        """One step on a labeled batch and the inner ones; ``ahead``: they were given as a look-ahead."""
        networks = {"student": trainer.student, **({} if trainer.teacher is None else {"teacher": trainer.teacher})}
        parts = [(role, path, part) for role, net in networks.items() for path, part in net.named_modules()]
        flags = tuple(
            (id(p), p.training, *(t is not None and t.requires_grad for t in p._parameters.values())) for *_, p in parts
        )
        weights = trainer.feedback_weight, trainer.feedback_ratio
        key = flags, weights, len(batches), trainer.mode, id(trainer.problem), id(trainer.teacher_losses)
        first = key not in self.known
        if first:
            for role, net in networks.items():
                for name, p in net.named_parameters():
                    if p._backward_hooks or p._post_accumulate_grad_hooks:
                        raise MetaplError(
                            f"the {role}'s {name} has a hook, which no graph captures; leave compile out."
                        )
            if not isinstance(unclipped(trainer.update), TorchUpdate):
                raise MetaplError("inner_optimizer is a TorchOpt transform; expected torch.optim's, or compile=False.")
            updates = updates_of(trainer)
            step: Any = step_of(trainer, len(batches), updates)
            step.__code__ = step.__code__.replace()  # Dynamo counts graphs by code object, which all trainers share
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # while Inductor is imported
                compiled: Any = torch.compile(step, fullgraph=True, dynamic=False, **BACKEND)
            plain = [_numbers(part) for *_, part in parts]
            eager, there, twins = eager_step(trainer, labeled, batches, ahead)
            for (role, path, _), was, twin in zip(parts, plain, twins, strict=True):
                for name in (name for name, value in _numbers(twin).items() if was.get(name) != value):
                    raise MetaplError(f"the {role}'s {path}.{name} changes in a step, which no graph captures.")
            probs = eager.signal.probs
        else:
            compiled, updates, probs = self.known[key]
        noise = None
        if trainer.generator is not None and probs is not None:
            noise = tuple(gumbel(length(batch), probs.shape[1], probs, trainer.generator) for batch in batches)
        state, several = state_of(trainer, updates), len(batches) > 1
        try:
            with torch.no_grad(), no_fast_path(math=True):
                moved, report = compiled(
                    state, labeled, *((tuple(batches), noise) if several else (batches[0], noise and noise[0]))
                )
        except Exception as error:
            if not first:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            said = " ".join([*lines[:2], *[line for line in lines[2:] if line.startswith("File ")][-1:]])
            raise MetaplError(f"torch.compile cannot take this step: {said}; leave compile out.") from error
        scalars = {"inner_loss": report.inner_loss} | {f"teacher_{n}": t for n, t in report.teacher_losses.items()}
        scalars |= {} if trainer.mode.name == "none" else {"outer_loss": report.outer_loss}
        scalars |= {} if trainer.teacher is None else {"teacher_loss": report.teacher_loss}
        text = (
            "the step's numbers are not finite, or the student's outputs do not follow its weights (the slopes differ)."
        )
        wrapped = StepReport(
            trainer.steps_done,
            scalars,
            Fault([(~(report.flag < SLOPES), text)]),
            feedback=tuple(report.feedback) if several else (report.feedback,) if ahead else report.feedback,
            signal=Signal(**(report.signal[-1] if several else report.signal)),
            student_outputs=report.student_outputs,
        )
        if first:
            _compare(_seen(state, moved, wrapped), _seen(state, there, eager), report.inner_loss)
            self.known[key] = compiled, updates, probs
        for net, update, held, of in (
            (trainer.student, updates[0], moved.student, moved.inner),
            (trainer.teacher, updates[1], moved.teacher, moved.outer),
        ):
            pairs = [(own[n], t) for own, new in zip(tensors_of(net), held, strict=True) for n, t in new.items()]
            for name, p in {} if update is None else unclipped(update).parameters.items():
                own = unclipped(update).optimizer.state[p]
                pairs += [(own.setdefault(key, torch.empty_like(t)), t) for key, t in of.state[name].items()]
            if pairs:
                torch._foreach_copy_([to for to, _ in pairs], [t for _, t in pairs])
        trainer.mode_state, trainer.steps_done = moved.mode, trainer.steps_done + 1
        return wrapped


def eager_step(trainer: Any, labeled: Any, batches: Sequence[Any], ahead: bool) -> tuple[StepReport, State, list[Any]]:
    """The same step by a copy of the trainer on the eager road: its report, the state after it, and the copy's modules.
    No generator moves."""
    start, generator = RandomState.now(trainer.device), trainer.generator

    def taken() -> Any:
        twin = copy.deepcopy(trainer, {} if generator is None else {id(generator): generator.clone_state()})
        vars(twin)["compile"] = False
        return twin, twin.step(labeled, Lookahead(list(batches)) if ahead else batches[0])

    twin, report = taken()
    end = RandomState.now(trainer.device)
    start.restore()
    if not end.same(start):  # L(θ′) draws on where the teacher's passes end; on the eager road, from its own stream
        with branching_to(end):
            twin, report = taken()
        start.restore()
    modules = [part for net in (twin.student, twin.teacher) if net is not None for part in net.modules()]
    return report, state_of(twin, updates_of(twin)), modules


def _numbers(part: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if isinstance(value, int | float | str)}


def _seen(before: State, after: State, report: StepReport) -> dict[str, dict[Any, Tensor]]:
    """What is compared. Gradients by the first moments, not by weights, of which a fresh Adam's move is a sign."""
    trees = {"h": dict(enumerate(pytree.tree_leaves(report.feedback)))}
    for role, held in (("student", after.inner.state), ("teacher", after.outer.state)):
        network, was = getattr(after, role), getattr(before, role).params
        moments = {
            n: held[n].get("exp_avg", held[n].get("momentum_buffer", p - was[n])) for n, p in network.params.items()
        }
        trees |= {f"the {role}'s gradient": moments, f"the {role}'s buffers": network.state}
    return trees


def _compare(found: dict[str, Any], expected: dict[str, Any], loss: Tensor) -> None:
    """Refuse a compiled step that is not the eager one."""
    for name, tree in expected.items():
        if tree:
            gap, size = norm({n: found[name][n].double() - t for n, t in tree.items()}), norm(tree)
            rounding = 1e3 * torch.finfo(loss.dtype).eps * loss.abs() if name == "h" else 0.0
            if not bool(gap <= AGREES[loss.dtype] * size + rounding):
                raise MetaplError(
                    f"compiled, {name} is {float(gap / size):.2g} off its eager value; leave compile out."
                )
