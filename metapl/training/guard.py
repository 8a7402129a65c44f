"""What holds around a step: what was found out about networks and options stands until they change, and a step that is
refused or fails leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.buffers import Slots, explain_types, step_guard, step_lock
from metapl.execution.kernels import checkpoints_without_reentry
from metapl.execution.local import LocalStudent
from metapl.execution.modules import trainable
from metapl.execution.sharded import student_of
from metapl.execution.writes import changed_input, tensors_in
from metapl.feedback.compatible import check_batches, check_mode
from metapl.problems.base import has_own
from metapl.updates import parameters_of, refuse_missing


class StepGuard:
    """Around the steps of one :class:`~metapl.BilevelTrainer`.

    Attributes:
        asked: the teacher; a problem without one gets an empty module.
        slots: what of the teacher is looked at, and restored.
        spread: the layouts over several processes.
    """

    def __init__(self, trainer: Any) -> None:
        self.asked = nn.Module() if trainer.teacher is None else trainer.teacher
        self.slots = Slots(self.asked)
        self.spread = [layout for layout in trainer.layouts if layout.kind != "plain"]
        self.student: LocalStudent | None = None
        self.problem, self.steps = trainer.problem, trainer.lookahead  # which were checked
        self.kind: tuple[Any, ...] = ()  # of the signal
        self._given: list[tuple[Tensor, int]] = []  # the tensors of the batches, and their versions before

    @contextmanager
    def step(self, trainer: Any, labeled: Any, batches: Sequence[Any]) -> Iterator[tuple[checks.Fault, LocalStudent]]:
        """Begin a step: look at what has changed since the last one, and check the batches. If the step is refused or
        fails, restore everything.

        Yields: the fault of the step's report, and the student.
        """
        problem, device, outer = trainer.problem, trainer.device, trainer.outer_optimizer
        networks = {"student": trainer.student, "teacher": trainer.teacher if problem.teacher_reads_inputs else None}
        how: dict[str, Any] = {"device": device, "optimizer": outer, "generator": trainer.generator}
        with step_lock, checkpoints_without_reentry():
            for layout in self.spread:
                layout.begin_step()
            student = self._looked_at(trainer)
            slots = self.slots, student.slots
            for role, one in zip(("teacher", "student"), slots, strict=True):
                one.weights = one.compared(role, student.waits) if len(batches) == 1 else None
            with step_guard(*slots, explain=partial(explain_types, labeled, batches, networks), **how) as fault:
                if trainer.ranks.alone and len(batches) == 1:
                    checks.batches([("labeled", labeled), ("unlabeled", batches[0])], device)
                else:
                    check_batches(labeled, batches, device, trainer.ranks, len(batches))
                if problem is not self.problem:  # another was assigned
                    self.problem, self.steps, self.kind = problem, 0, ()
                if len(batches) != self.steps:
                    check_mode(trainer.mode, len(batches), problem, trainer.layout)
                    self.steps = len(batches)
                if outer is not None:
                    refuse_missing("outer_optimizer", outer, self.slots.learned, "teacher")
                if trainer.feedback_ratio is not None:
                    check_options(trainer, len(batches))
                self._given = [(t, t._version) for t in tensors_in((labeled, batches))]
                try:
                    yield fault, student
                except RuntimeError as error:  # autograd's own, where a graph has saved what was changed
                    self._refuse_changed_batches(error)
                    raise
                student.slots.looked_at = self.slots.looked_at = True

    def _looked_at(self, trainer: Any) -> LocalStudent:
        """The student at the beginning of a step. It is looked at closely on the first one, and where it has changed
        since the last one; what was found out about it otherwise stands."""
        known, layout, update = self.student, trainer.layout, trainer.update
        if not self.slots.hold():
            self.slots = Slots(self.asked)
        sharded = layout.kind == "sharded"  # whose weights come and go
        if known is not None and not sharded and known.begin():
            update.follow(known.parameters)
            return known
        update.follow(layout.parameters())
        first = known is None or not (sharded and known.slots.looked_at)
        self.student = student_of(layout, update.parameters, double_backward=trainer.mode.keep_graph, first=first)
        return self.student

    def refuse_moves(self, student: LocalStudent) -> None:
        for slots in (self.slots, student.slots):
            if slots.weights is not None:
                slots.weights.check()
                slots.weights = None
        self._refuse_changed_batches()

    def _refuse_changed_batches(self, cause: BaseException | None = None) -> None:
        if any(t._version != version for t, version in self._given):
            raise changed_input("a network or a function of the step") from cause

    @contextmanager
    def both_or_none(self, trainer: Any, first: bool) -> Iterator[None]:
        """Put both networks and their optimizers' states back if this block fails; cost: a copy of all of these.

        Only where the outer optimizer's step may fail: code of others runs in it, or it is the first one of a class
        that is none of the best known. Sharded networks are not put back.
        """
        outer: Any = trainer.outer_optimizer
        known = type(outer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        safe = outer is None or any(one.is_sharded for one in self.spread)
        if safe or not (first and not known):
            yield
            return
        update, parameters = trainer.update, trainer.layout.parameters()
        params = {name: p.detach().clone() for name, p in parameters.items()}
        state = pytree.tree_map_only(Tensor, Tensor.clone, update.read_state())
        teacher = [(p, p.detach().clone()) for p in parameters_of(outer)]
        held = {p: copy.deepcopy(values) for p, values in outer.state.items()}
        try:
            yield
        except BaseException:
            update.write(parameters, params, state)
            with torch.no_grad():
                for p, before in teacher:
                    p.copy_(before)
            outer.state.clear()
            outer.state.update(held)
            raise


# ------------------------------------------------------------------------------------------------------------- options


def check_options(trainer: Any, steps: int) -> None:
    """Refuse options that do not go together, for a teacher that looks so many student steps ahead."""
    graph, ratio = trainer.mode.keep_graph, trainer.feedback_ratio is not None
    parts = {"accumulate": trainer.accumulate, "lookahead": steps}
    several = next((f"{name}={n}" for name, n in parts.items() if n > 1), "")
    for wrong, text in (
        (
            trainer.mode.keep_on not in (None, "cpu"),
            f"keep_on={trainer.mode.keep_on!r} was given to a trainer, and a folder is of one call of "
            'metapl.hypergradient or metapl.attribute; expected keep_on="cpu" or None, with keep="tree" for the fewest '
            "states.",
        ),
        (
            graph and trainer.accumulate > 1,
            f"accumulate={trainer.accumulate} with mode {trainer.mode.name!r}: expected 1 with 'unrolled', which keeps "
            "the graph of the whole batch (mode 'forward' is as exact).",
        ),
        (
            graph and trainer.compile and trainer.teacher is None,
            "compile=True was given with mode 'unrolled', under which the student runs as it is, and teacher=None: "
            'nothing would be compiled; leave compile out, or use mode="forward", which is as exact.',
        ),
        (
            ratio and trainer.feedback_weight != 1.0,
            "feedback_weight and feedback_ratio were both given; expected one of them.",
        ),
        (
            ratio and not has_losses(trainer),
            "feedback_ratio was given, and there are no teacher losses to measure the feedback by; expected "
            "teacher_losses=(...), or feedback_weight instead.",
        ),
        (
            ratio and several,
            f"feedback_ratio is measured on one whole inner batch and does not go with {several}; use feedback_weight.",
        ),
    ):
        if wrong:
            raise MetaplError(text)


def has_losses(trainer: Any) -> bool:
    given = trainer.teacher_losses
    return has_own(trainer.problem, "default_teacher_losses") if given is None else bool(given)


def check_outer(optimizer: Any, teacher: nn.Module) -> None:
    """Refuse an outer optimizer that is none, or not of the teacher's parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MetaplError(
            f"outer_optimizer is {checks.described(optimizer)}; expected a torch.optim optimizer over "
            "teacher.parameters(); of a wrapper, what it wraps: outer_optimizer=optimizer.optimizer."
        )
    refuse_missing("outer_optimizer", optimizer, trainable(teacher), "teacher")
    own = {id(p) for p in teacher.parameters()}
    if any(id(p) not in own for p in parameters_of(optimizer)):
        raise MetaplError(
            "outer_optimizer holds tensors that are not the teacher's; build it from teacher.parameters()."
        )
