"""Refusals, by name, of what can carry a gradient past the signal.

They stand at the door of the first step, before anything moves; later steps are not looked at. The
feedback knows of one way from the teacher to the inner loss, the signal. Another one is looked for
in what is given and, without a copy, in the graphs of both losses (:class:`FirstLook`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.core.lookahead import InnerBatches
from metapl.core.step import InnerStep
from metapl.errors import MetaplError, few
from metapl.execution.batch import Batch, inputs_of, named_leaves_of
from metapl.execution.batch import leaves_of as leaves_of_batch
from metapl.execution.checks import described
from metapl.execution.compare import same_to_rounding, same_values
from metapl.execution.graphs import leaves_in_graph
from metapl.execution.shards import is_sharded, local
from metapl.execution.state import Slots, State
from metapl.feedback import Mode
from metapl.feedback.hypergradient import Differentiation, Request
from metapl.problems.base import BilevelProblem, outer_variables
from metapl.problems.pseudo_labels import PseudoLabels
from metapl.protocols import TwoLevelTrainer
from metapl.updates import Clipped, Update


class PastTheSignal(MetaplError):
    """A loss depends on what the feedback does not know of, or a batch changes under it."""


# What was expected of a leaf in the graph of a loss,
PAST = {
    "inner": (
        ", past the signal; expected the teacher to reach it by problem.signal alone: put it into "
        "the signal (student_input(self, batch, signal) takes that to the student), make it a "
        "parameter of the student, or .detach() it."
    ),
    "outer": (
        "; expected the student's weights, and the teacher's by a module that the problem holds "
        "(self.teacher = teacher, say): let the problem hold it, or .detach() it."
    ),
}
# and of a weight of the student that was read before the step.
KEPT = (
    " as it was before the step, such as from a plain list or dict of layers or parameters; "
    "expected nn.ModuleList or nn.ModuleDict, and weights that are read when the loss is called: "
    "params in inner_loss, student.parameters() in outer_loss."
)


# ------------------------------------------------------------------------------------ what is given


def refuse_learned(request: Request, update: Update) -> None:
    """Refuse tensors that require a gradient where a feedback would leave it out.

    Batches that a function returns as they are taken are looked at by the first look alone.

    Args:
        request: with the batches.
        update: the inner optimizer, whose settings are numbers.
    """
    inner_batches = InnerBatches.of_hypergradient(request.inner)
    batches_by_name: dict[str, Any] = {"outer": request.outer}
    for k, batch in enumerate(inner_batches.in_memory()):
        batches_by_name[f"inner[{k}]" if inner_batches.is_lookahead else "inner"] = batch
    for name, batch in batches_by_name.items():
        for place, t in named_leaves_of(batch):
            if requires_gradient(t):
                raise MetaplError(
                    f"{name}{place} requires a gradient; expected data: .detach() it, or let the "
                    "signal carry it (problem.signal, and student_input(self, batch, signal))."
                )
    rule = update.inner if isinstance(update, Clipped) else update
    learned = []
    if getattr(rule, "is_learned", False):
        learned.append("the result of the TorchOpt transform")
    for group in getattr(vars(rule).get("optimizer"), "param_groups", ()):
        for name, value in group.items():
            # Such as two betas.
            parts = value if isinstance(value, tuple | list) else (value,)
            if name != "params" and any(map(requires_gradient, parts)):
                learned.append(f"{name} of the inner optimizer")
    if learned:
        raise MetaplError(
            f"{few(learned)} requires a gradient, which the feedback leaves out; expected "
            "numbers (.item()), or torch.optim and metapl.hypergradient(wrt='lr')."
        )


def requires_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def refuse_pair_of_inputs(problem: BilevelProblem, outer: Batch, inner: InnerBatches) -> None:
    """Refuse inner inputs that are read as two views where the outer inputs are several."""
    inputs = inputs_of(outer)
    if not isinstance(problem, PseudoLabels) or not isinstance(inputs, tuple | list):
        return
    for batch in inner.in_memory():
        if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor):
            raise MetaplError(
                "inner is a pair of tensors, which is two views of one input, and outer has "
                f"{len(inputs)} inputs; expected ((x, extra),), or ((x, extra), (x, extra)) views."
            )


def refuse_hooks(student: nn.Module, teacher: nn.Module | None) -> None:
    """Refuse hooks on parameters that change gradients, which copies of a network do not have.

    On the teacher's, those that are called after a gradient are left: an optimizer, say.
    """
    hooked = []
    for name, p in student.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            hooked.append(f"student.{name}")
    for name, p in () if teacher is None else teacher.named_parameters():
        if p._backward_hooks:
            hooked.append(f"teacher.{name}")
    if hooked:
        raise MetaplError(
            f"the parameters {few(hooked, 3)} have hooks; expected none (see clip_norm)."
        )


def refuse_shared_memory(student: nn.Module, teacher: nn.Module | None) -> None:
    """Refuse two parameters that begin at one address, which a copy of a network tells apart."""
    owners: dict[int, tuple[str, nn.Parameter]] = {}
    taught = nn.Module() if teacher is None else teacher
    for name, p in nn.ModuleDict({"student": student, "teacher": taught}).named_parameters():
        address = local(p).data_ptr()
        other_name, other = owners.setdefault(address, (name, p))
        if address and other is not p and (p.requires_grad or other.requires_grad):
            raise MetaplError(
                f"{other_name} and {name} have one memory; expected one nn.Parameter, or a copy."
            )


def look_at_step(
    trainer: TwoLevelTrainer, outer_batch: Batch, inner_batches: InnerBatches
) -> FirstLook | None:
    """Refuse what no step of a trainer is taken on, as long as its networks are as they are.

    Returns: what looks at the graphs of the step; None where there is nothing to look for.
    """
    gives_feedback = trainer.mode.credits != "nothing"
    request = request_of(trainer, outer_batch, inner_batches)
    refuse_pair_of_inputs(trainer.problem, outer_batch, inner_batches)
    refuse_hooks(trainer.student, trainer.teacher)
    if gives_feedback:
        refuse_shared_memory(trainer.student, trainer.teacher)
        refuse_learned(request, trainer.update)
    elif trainer.accumulate == 1:
        return None
    return FirstLook(request, blocks=trainer.layout.blocks, finds_leaves=gives_feedback)


def request_of(
    trainer: TwoLevelTrainer,
    outer_batch: Batch,
    inner_batches: InnerBatches,
    *,
    mode: Mode | None = None,
) -> Request:
    """Return what a trainer would ask for in a step, by its own mode or another."""
    return Request(
        teacher=trainer.teacher,
        student=trainer.student,
        outer=outer_batch,
        inner=inner_batches.as_argument(),
        mode=trainer.mode if mode is None else mode,
        problem=trainer.problem,
        inner_optimizer=trainer.update,
        generator=trainer.generator,
        accumulate=trainer.accumulate,
        clip_norm=trainer.clip_norm,
    )


def look_at_call(differentiation: Differentiation) -> None:
    """Refuse what no hypergradient is taken of, and look at what a call does more than once."""
    request = replace(differentiation.request, problem=differentiation.problem)
    gives_feedback = differentiation.estimate.credits != "nothing"
    if gives_feedback:
        refuse_shared_memory(request.student, request.teacher)
        refuse_learned(request, differentiation.update)
    look = request.look
    if request.accumulate > 1:
        blocks = differentiation.of_student.blocks
        look = FirstLook(request, blocks=blocks, finds_leaves=gives_feedback)
    calls = request.calls
    is_read_again = differentiation.inner_batches.are_read_again
    if request.recompute_teacher or request.accumulate > 1 or is_read_again:
        from metapl.guards.calls_of_signal import KeptBySignal

        network = nn.Module() if request.teacher is None else request.teacher
        calls = KeptBySignal(differentiation.problem, network)
    differentiation.request = replace(differentiation.request, look=look, calls=calls)


# ----------------------------------------------------------------------------------- the first look


class FirstLook:
    """A look at the graphs of both losses in one step, and at its batches.

    A leaf of a graph is refused if it is neither a weight of the student nor a tensor that metapl
    put there, and lived before the pass: a leaf that a pass makes for itself, as for a derivative
    in its input, is another one in each pass.

    Args:
        request: the networks, the problem and the batches of the step; of micro-batches, for each
            of which the signal is made once. Inner batches in memory are looked at.
        blocks: of a sharded student, the submodules that gather their weights while they run.
        named_by: the original teacher, problem and student, where the step is taken by copies: a
            tensor that is called by its name may be theirs.
        finds_leaves: whether leaves past the signal are looked for; False of a mode that
            differentiates in no signal.
    """

    def __init__(
        self,
        request: Request,
        *,
        blocks: Sequence[Any] = (),
        named_by: tuple[nn.Module | None, BilevelProblem, nn.Module] | None = None,
        finds_leaves: bool = True,
    ) -> None:
        teacher, student, problem = request.teacher, request.student, request.problem
        assert problem is not None, "a step has a problem"
        self.teacher = teacher
        self.accumulate = request.accumulate
        self.teacher_before: State | None = None
        self.finds_leaves = finds_leaves
        if teacher is not None and request.accumulate > 1 and not problem.signal_of_batch:
            self.teacher_before = Slots(teacher).snapshot()
        self.named_by = [(teacher, problem, student)]
        if named_by is not None:
            self.named_by.append(named_by)
        self.weights = ids(student.parameters()) | gathered_weights(student, blocks)
        # Copies stand for the student that a loss may have read before.
        originals = student if named_by is None else named_by[-1]
        named = [*student.named_parameters(), *originals.named_parameters()]
        self.names_of_weights = {id(p): name for name, p in named}
        # A sharded student computes with the parameters that it holds, whatever tensors a pass
        # began with: its blocks gather them, and products take a part of each.
        self.keeps_weights = bool(blocks) or any(is_sharded(p) for p in student.parameters())
        self.outer_variables = ids(outer_variables(problem, teacher).values())
        inner_batches = InnerBatches.of_hypergradient(request.inner)
        batches = [request.outer, *inner_batches.in_memory()]
        self.batches = [t for t in leaves_of_batch(batches) if isinstance(t, Tensor)]
        self.batches_before = [t.detach().clone() for t in self.batches]
        self.versions_before = list(map(version_of, self.batches))

    def at_inner_loss(
        self,
        value: Tensor,
        made_here: Sequence[Tensor],
        again: Callable[[], Tensor],
        *,
        at_own_weights: bool,
    ) -> None:
        """Look at the graph of an inner loss.

        Args:
            value: the loss.
            made_here: leaves that metapl made: the weights at which the pass ran, and the signal's
                fields.
            again: computes the loss once more.
            at_own_weights: whether the pass ran at the student's own parameters, and not at leaves
                in their places.
        """
        allowed = ids(made_here)
        for t in made_here:
            # The signal of a micro-batch is a part of a leaf.
            allowed |= ids(leaves_in_graph(t))
        if at_own_weights:
            allowed |= self.weights
        self._refuse_strange_leaf("inner", value, allowed, again)
        self._refuse_moved_state(again)

    def at_outer_loss(
        self, value: Tensor, made_here: Sequence[Tensor], again: Callable[[], Tensor]
    ) -> None:
        """Look at the graph of an outer loss, at leaves in the student's places.

        See :meth:`at_inner_loss`.
        """
        self._refuse_strange_leaf("outer", value, ids(made_here) | self.outer_variables, again)

    def _refuse_strange_leaf(
        self, level: str, value: Tensor, allowed: set[int], again: Callable[[], Tensor]
    ) -> None:
        """Refuse a leaf that does not belong into the graph of a loss."""
        if self.keeps_weights:
            allowed |= self.weights
        strange = [leaf for leaf in leaves_in_graph(value) if id(leaf) not in allowed]
        if not strange or not self.finds_leaves:
            return
        in_another_pass = ids(leaves_in_graph(again()))
        for leaf in strange:
            if id(leaf) in self.names_of_weights:
                raise PastTheSignal(f"the {level} loss depends on {self._name_of(leaf)}{KEPT}")
            if id(leaf) in in_another_pass:
                raise PastTheSignal(
                    f"the {level} loss depends on {self._name_of(leaf)}{PAST[level]}"
                )

    def _refuse_moved_state(self, again: Callable[[], Tensor]) -> None:
        """Refuse an inner loss of micro-batches that reads what signal moves in the teacher.

        It moves once for each of them, and a loss that is taken after the first signal reads
        another state than one that is taken after the last.

        Args:
            again: computes the loss once more.
        """
        if self.teacher is None or self.teacher_before is None:
            return
        loss = again().detach()
        tensors = tensors_of(self.teacher)
        state = Slots(self.teacher).snapshot()
        self.teacher_before.restore()
        try:
            loss_before = again().detach()
            before = tensors_of(self.teacher)
        finally:
            state.restore()
        moved = []
        for name, t in before.items():
            if name in tensors and not same_values(tensors[name], t):
                moved.append(name)
        if moved and not same_to_rounding(loss, loss_before):
            raise PastTheSignal(
                f"the inner loss reads what signal moves in the teacher ({few(moved, 3)}), and "
                f"with accumulate={self.accumulate} that moves once for each micro-batch; expected "
                "it in the signal, a number for each row, or accumulate=1."
            )

    def at_feedback(self, given: Any, steps: Sequence[InnerStep], kind: str) -> None:
        """Refuse what an estimator has returned that is no feedback on the student's steps."""
        # Loaded where it is used.
        from metapl.feedback.returned import what_is_unfit

        if unfit := what_is_unfit(given, steps):
            raise MetaplError(f"{kind}.feedback returned {unfit}.")

    def at_batches(self) -> None:
        """Refuse batches that the step has changed in place, and put them back."""
        changed = []
        for t, before, version in zip(
            self.batches, self.batches_before, self.versions_before, strict=True
        ):
            # The counter is read first, without waiting for a device.
            was_written = version is None or version_of(t) != version
            if was_written and not same_values(t, before):
                changed.append((t, before))
        for t, before in changed:
            with torch.no_grad():
                t.copy_(before)
        if changed:
            raise PastTheSignal(
                "a batch is changed in place by a pass of the student, or by a loss; expected the "
                "pass to work on a copy (x = x.clone())."
            )

    def _name_of(self, leaf: Tensor) -> str:
        if id(leaf) in self.names_of_weights:
            return f"the student's {self.names_of_weights[id(leaf)]}"
        for owners in self.named_by:
            for role, owner in zip(("teacher", "problem", "student"), owners, strict=True):
                if name := name_in(owner, leaf):
                    return f"the {role}'s {name}"
        return f"{described(leaf)} that requires a gradient"


def ids(tensors: Any) -> set[int]:
    return {id(t) for t in tensors}


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters and buffers of a network."""
    named = (*network.named_parameters(), *network.named_buffers())
    return {name: t.detach().clone() for name, t in named}


def version_of(t: Tensor) -> int | None:
    """Return how often a tensor was written to.

    None of a tensor of inference mode, which does not count.
    """
    return None if t.is_inference() else t._version


def gathered_weights(student: nn.Module, blocks: Sequence[Any]) -> set[int]:
    """Return the ids of the whole weights that a sharded student gathers, block by block."""
    weights = set[int]()
    for block in blocks:
        block.unshard()
        weights |= ids(student.parameters())
        block.reshard()
    return weights


def name_in(owner: Any, leaf: Tensor) -> str:
    """Return what a tensor is called in a module or an object; "" where it is not found.

    It is looked for in attributes, and in modules, lists and dicts in these.
    """
    parts = owner.named_modules() if isinstance(owner, nn.Module) else [("", owner)]
    for prefix, part in parts:
        attributes = dict(getattr(part, "__dict__", {}))
        for name, value in {**attributes, **attributes.get("_parameters", {})}.items():
            inside = name_in(value, leaf) if isinstance(value, nn.Module) else ""
            holds = not name.startswith("_") and any(t is leaf for t in pytree.tree_leaves(value))
            if inside or holds:
                return ".".join(filter(None, (prefix, name, inside)))
    return ""
