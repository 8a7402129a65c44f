"""``BilevelTrainer(compile=True)``: the pure step, compiled whole; modules and optimizers go on owning their tensors.

A step reads networks and optimizers into a state, runs one graph, and copies the new state back. The first step of each
kind is compared with the eager one, taken by a copy of the trainer; what cannot be captured is refused there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.batch import length
from metapl.execution.checks import Fault
from metapl.execution.kernels import no_fast_path
from metapl.execution.ranks import gumbel
from metapl.execution.rng import RandomState
from metapl.feedback.report import StepReport
from metapl.functional.build import step_of, updates_of
from metapl.functional.first_step import eager_step, refuse_other
from metapl.functional.state import Report, State, leaves_of, settings_of, state_of, unclipped
from metapl.problems.base import Signal
from metapl.updates import TorchUpdate

# Inductor's own kernels would draw other dropout masks than PyTorch's.
BACKEND: dict[str, Any] = {"options": {"fallback_random": True}}
SLOPES = 0.1  # the greatest report.flag, to which the curvature along a finite difference contributes


class CompiledStep:
    """The compiled steps of one trainer, which every call is given; a copy of it compiles anew."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self.state: State | None = None  # views of the tensors that modules and optimizers hold
        self.tensors: list[Tensor] = []  # these, in the order of leaves_of,
        self.memory: list[int] = []  # and where they were
        self.places: list[tuple[Any, Any, Any]] = []  # what is known to stand in a table under a name
        self.numbers: list[Any] = []  # the optimizers' settings, and these as tensors
        self.settings: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledStep, ()

    def __call__(self, trainer: Any, labeled: Any, batches: Sequence[Any], ahead: bool) -> StepReport:
        """One step on a labeled batch and the inner ones; ``ahead``: they were given as a look-ahead."""
        networks = {"student": trainer.student, **({} if trainer.teacher is None else {"teacher": trainer.teacher})}
        modules = [module for net in networks.values() for module in _modules(net)]
        flags = tuple(
            (id(m), m.training, *[p is not None and p.requires_grad for p in m._parameters.values()]) for m in modules
        )
        optimizers = [o for o in (trainer.inner_optimizer, trainer.outer_optimizer) if o is not None]
        weights = trainer.feedback_weight, trainer.feedback_ratio, trainer.mode, tuple(map(id, optimizers))
        key = flags, weights, len(batches), id(trainer.problem), id(trainer.teacher_losses)
        first, several, draw = key not in self.known, len(batches) > 1, trainer.generator
        start, drawn = RandomState.now(trainer.device), draw and draw.get_state()
        if first:
            compiled, updates = self.compile(trainer, networks, len(batches))
            eager = eager_step(trainer, labeled, batches, ahead)
            state, probs = state_of(trainer, updates), eager[1].signal.probs
        else:
            compiled, updates, probs = self.known[key]
            state = self.read(trainer, updates)
        noise = None
        if draw is not None and probs is not None:
            noise = tuple(gumbel(length(batch), probs.shape[1], probs, draw) for batch in batches)
        try:
            with torch.no_grad(), no_fast_path(math=True):
                given = (tuple(batches), noise) if several else (batches[0], noise and noise[0])
                moved, report = compiled(state, labeled, *given)
            wrapped = _wrapped(trainer, report, several, ahead)
            if first:
                refuse_other(state, (moved, wrapped), eager)
        except Exception as error:
            start.restore()
            if draw is not None:
                draw.set_state(drawn)
            if not first or isinstance(error, MetaplError):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            said = " ".join([*lines[:2], *[line for line in lines[2:] if line.startswith("File ")][-1:]])
            raise MetaplError(f"torch.compile cannot take this step: {said}; leave compile out.") from error
        if first:
            self.known[key], self.state = (compiled, updates, probs), None
            self.read(trainer, updates)
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, leaves_of(moved, state))
        trainer.mode_state, trainer.steps_done = moved.mode, trainer.steps_done + 1
        return wrapped

    def compile(self, trainer: Any, networks: dict[str, Any], steps: int) -> tuple[Any, Any]:
        """The trainer's step as one graph, once it is called; refused where none could be."""
        for role, net in networks.items():
            for name, p in net.named_parameters():
                if p._backward_hooks or p._post_accumulate_grad_hooks:
                    raise MetaplError(f"the {role}'s {name} has a hook, which no graph captures; leave compile out.")
        if not isinstance(unclipped(trainer.update), TorchUpdate):
            raise MetaplError("inner_optimizer is a TorchOpt transform; expected torch.optim's, or compile=False.")
        trainer.update.follow({name: p for name, p in trainer.student.named_parameters() if p.requires_grad})
        updates = updates_of(trainer)
        step = step_of(trainer, steps, updates)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # while Inductor is imported
            return torch.compile(step, fullgraph=True, dynamic=False, **BACKEND), updates

    def read(self, trainer: Any, updates: Any) -> State:
        """The state, in the very tensors that modules and optimizers hold; those of optimizers made where missing."""
        held = all(table.get(name) is value for table, name, value in self.places)
        if self.state is None or not held or [t.data_ptr() for t in self.tensors] != self.memory:
            self.state, self.places, self.tensors = state_of(trainer, updates), [], []
            for net, role, update, optimizer in (
                (trainer.student, self.state.student, unclipped(updates[0]), self.state.inner),
                (trainer.teacher, self.state.teacher, unclipped(updates[1]), self.state.outer),
            ):
                for name in (*role.params, *role.state):
                    path, _, last = name.rpartition(".")
                    part = net.get_submodule(path)
                    self.hold(part._parameters if last in part._parameters else part._buffers, last)
                for name in optimizer.state and role.params:  # in the order of leaves_of
                    p = update.parameters[name]
                    own = update.optimizer.state[p]
                    self.places += [
                        (vars(update.optimizer), "state", update.optimizer.state),
                        (update.optimizer.state, p, own),
                    ]
                    for key, t in optimizer.state[name].items():
                        own.setdefault(key, t)
                        self.hold(own, key)
            self.memory = [t.data_ptr() for t in self.tensors]
        numbers = [[] if update is None else unclipped(update).settings() for update in updates]
        if numbers != self.numbers:
            self.numbers, self.settings = numbers, [settings_of(n, trainer.device) for n in numbers]
        inner, outer = (
            optimizer._replace(settings=now)
            for optimizer, now in zip((self.state.inner, self.state.outer), self.settings, strict=True)
        )
        step = torch.tensor(trainer.steps_done, device=trainer.device)
        mode = {name: t.to(trainer.device) for name, t in trainer.mode_state.items()}
        return self.state._replace(inner=inner, outer=outer, mode=mode, step=step)

    def hold(self, table: dict[str, Any], name: str) -> None:
        self.places.append((table, name, table[name]))
        self.tensors.append(table[name])


def _wrapped(trainer: Any, report: Report, several: bool, ahead: bool) -> StepReport:
    """A pure step's report as the trainer's."""
    scalars = {"inner_loss": report.inner_loss} | {f"teacher_{n}": t for n, t in report.teacher_losses.items()}
    scalars |= {} if trainer.mode.name == "none" else {"outer_loss": report.outer_loss}
    scalars |= {} if trainer.teacher is None else {"teacher_loss": report.teacher_loss}
    text = "the step is not finite, or the student's outputs do not follow its weights (the slopes differ)."
    return StepReport(
        trainer.steps_done,
        scalars,
        Fault([(~(report.flag < SLOPES), text)]),
        feedback=tuple(report.feedback) if several else (report.feedback,) if ahead else report.feedback,
        signal=Signal(**(report.signal[-1] if several else report.signal)),
        student_outputs=report.student_outputs,
    )


def _modules(module: Any) -> list[Any]:
    """A module and those in it, in the order of ``modules()``."""
    return [module, *(part for child in module._modules.values() if child is not None for part in _modules(child))]
