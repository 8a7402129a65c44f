"""The step that a gradient is compared with: real steps and the problem's own losses, on copies.

:class:`RealStep` is what a step is computed from. :class:`Evaluation` takes that step once, on
fresh copies, with something moved by a little: differences of its loss are the definition of a
gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch
from metapl.execution.numerics import explain
from metapl.execution.state import (
    RandomState,
    Slots,
    all_with_contents_of,
    copies_of_results,
    swapped,
    trainable,
)
from metapl.feedback import Estimator, Lookahead
from metapl.feedback.hypergradient import Differentiation, Hypergradient, Request
from metapl.guards.door import FirstLook
from metapl.problems.base import (
    FIELDS_BESIDE_VALUE,
    BilevelProblem,
    Signal,
    enters_input,
    sum_and_weight,
)
from metapl.updates import Update

Tree = dict[Any, Tensor]


@dataclass(frozen=True)
class Move:
    """Something that an evaluation moves before it reads it, by ``length`` times ``direction``.

    Args:
        what: the parameters of the ``"teacher"`` and of the problem; fields of the ``"signal"``;
            the student's weights at the ``"inner"`` or at the ``"outer"`` loss; or the
            ``"weights"`` 1 + ε of the inner losses.
        direction: tensors by parameter, or by (number of the step, field of its signal).
    """

    what: Literal["nothing", "teacher", "signal", "inner", "outer", "weights"] = "nothing"
    direction: Tree = field(default_factory=dict)
    length: float = 0.0


STILL = Move()


@dataclass(frozen=True)
class RealStep:
    """What a step is computed from, as it was given or copied; a copy serves one evaluation.

    Args:
        teacher: None where the problem has none.
        student: the network that the inner optimizer moves.
        problem: the two losses and the signal.
        update: the inner optimizer, without a clip.
        outer_batch: as it was given, before the problem's ``outer_batch`` reads it.
        inner_batches: one for each student step.
        clip_norm: the greatest norm of the student's gradient; None: no clip.
        generator: draws labels; None: torch's default generator does.
        random: the state of the generators in which the step begins.
        micro_batches: into how many parts each batch was split; the batches here are the first of
            them.
        other_part: another micro-batch of the first inner batch; None of a batch that is not split.
        in_start: whether the gradient in the student's first weights is asked for.
        problem_parameters: the tensors that the problem holds and that require a gradient.
        originals: the step of which these are copies, by whose names a tensor is called.
    """

    teacher: nn.Module | None
    student: nn.Module
    problem: BilevelProblem
    update: Update
    outer_batch: Batch
    inner_batches: list[Any]
    clip_norm: float | None
    generator: torch.Generator | None
    random: RandomState
    micro_batches: int = 1
    other_part: Batch = None
    in_start: bool = False
    problem_parameters: tuple[Tensor, ...] = ()
    originals: RealStep | None = None

    def copied(self, dtype: torch.dtype | None = None) -> RealStep:
        """Return copies that share what the originals share.

        Args:
            dtype: that all tensors of floating point are given; None: their own.
        """
        memo: dict[int, Any] = {id(self.originals): self.originals}
        if self.generator is not None:
            memo[id(self.generator)] = self.generator.clone_state()
        for network in (self.teacher, self.student, self.problem):
            if isinstance(network, nn.Module):
                memo |= copies_of_results(network)
        # A transform is made of functions alone, and TorchOpt's chains cannot be copied.
        transform = getattr(self.update, "transform", None)
        memo[id(transform)] = transform

        copy.deepcopy((self.teacher, self.student), memo)
        of_the_networks = set(memo)
        copy.deepcopy(self.problem, memo)
        problem_parameters = []
        for key, t in memo.items():
            if key not in of_the_networks and isinstance(t, Tensor) and t.requires_grad:
                problem_parameters.append(t)
        copied_step = replace(
            copy.deepcopy(self, memo),
            problem_parameters=tuple(problem_parameters),
            originals=self if self.originals is None else self.originals,
        )

        if dtype is not None:
            for t in memo.values():
                if isinstance(t, Tensor) and t.is_floating_point():
                    t.grad = None
                    t.data = t.data.to(dtype)
        # deepcopy keeps the originals that it copied under the memo's own id.
        originals = memo[id(memo)]
        self._copy_what_deepcopy_leaves_out(originals, memo)
        copied_step.update.follow(trainable(copied_step.student))
        return copied_step

    def _copy_what_deepcopy_leaves_out(self, originals: list[Any], memo: dict[int, Any]) -> None:
        """Copy what deepcopy leaves out.

        That are the Python attributes of parameters. And tensors that lie in a parameter's memory
        are put into that of its copy.
        """
        for p in list(originals):
            if isinstance(p, nn.Parameter):
                vars(memo[id(p)]).update(copy.deepcopy(vars(p), memo))
        parameter_at = {p.untyped_storage().data_ptr(): p for p in trainable(self.student).values()}
        for t in originals:
            if not isinstance(t, Tensor) or isinstance(t, nn.Parameter):
                continue
            p = parameter_at.get(t.untyped_storage().data_ptr())
            if p is not None:
                offset = t.storage_offset() - p.storage_offset()
                memo[id(t)].data = memo[id(p)].data.as_strided(t.shape, t.stride(), offset)

    def perturbed(self) -> RealStep:
        """Return the step a hundredth of the weights' size away.

        No ReLU is at exactly 0, where it has two slopes.
        """
        step = self.copied()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in (*step.learned().values(), *trainable(step.student).values()):
                p.add_(1e-2 * max(size_of(p), 0.1) * torch.randn(p.shape, generator=draw).to(p))
        return step

    def learned(self) -> Tree:
        """Return the parameters that the feedback may reach: the teacher's and the problem's."""
        of_teacher = {} if self.teacher is None else trainable(self.teacher)
        of_problem = {
            f"the problem's parameter {i}": t for i, t in enumerate(self.problem_parameters)
        }
        return {**of_teacher, **of_problem}

    def in_the_originals(self) -> AbstractContextManager[None]:
        """Let the original networks and the problem hold what these copies hold, in a block.

        What reads them by a closure or a global reads the originals, for deepcopy leaves functions
        as they are: a loss that reads ``student.parameters()``, a hook that fills a list of the
        problem, a number of the teacher.
        """
        originals = self if self.originals is None else self.originals
        pairs = (
            (self.problem, originals.problem),
            (self.teacher, originals.teacher),
            (self.student, originals.student),
        )
        return all_with_contents_of(pairs)

    def by_mode(self, mode: Estimator) -> tuple[Hypergradient, Tree]:
        """Return the gradient that a mode finds of this step, on fresh copies, and its h.

        h is by the step's number and the name of the signal's field.

        Raises: :class:`metapl.MetaplError` for what carries a gradient past the signal
        (:mod:`metapl.guards.door`).
        """
        step = self.copied()
        step.random.restore()
        originals = self if self.originals is None else self.originals
        request = Request(
            teacher=step.teacher,
            student=step.student,
            outer=step.outer_batch,
            inner=Lookahead(step.inner_batches),
            mode=mode,
            problem=step.problem,
            inner_optimizer=step.update,
            generator=step.generator,
            clip_norm=step.clip_norm,
        )
        look = FirstLook(
            replace(request, accumulate=step.micro_batches),
            named_by=(originals.teacher, originals.problem, originals.student),
        )
        with step.in_the_originals():
            found, h_of_steps = with_feedback(replace(request, look=look))
        h: Tree = {}
        for number, h_by_field in enumerate(h_of_steps):
            h |= {(number, name): t for name, t in h_by_field.items()}
        return found, h


class Evaluation:
    """The real step, taken once on fresh copies: F(θ_T) = L(θ′(θ_T)), and what was met on the way.

    Args:
        step: what to take the step from; it is copied first.
        move: what to move, and how far.
        signals: signals to take in the place of the teacher's.
        student_outputs: what the teacher is given for the student's outputs of each step, which are
            constants to every mode.
        states: the buffers and frozen parameters with which each pass begins; None: those that the
            passes leave.
        takes_steps: whether the student moves; if not, the loss is L(θ) and the graph of the inner
            loss is kept.

    Attributes:
        loss: the outer loss, a scalar without a graph.
        inner_loss: the first step's loss, a scalar.
        signals: of each step, with the teacher's graph.
        beside_labels: leaves in the first loss for what a drawn signal has beside its labels.
        outputs: the student's outputs of each step, (B, ...), and at last those on the outer batch,
            with their graph.
        gradients: of the first ``"inner"`` loss, and of the ``"outer"`` loss where nothing is
            moved, by parameter.
        states: the buffers and frozen parameters before each pass.
        written: the names of weights of the student that a pass or a loss has changed.
    """

    loss: Tensor
    inner_loss: Tensor

    def __init__(
        self,
        step: RealStep,
        move: Move = STILL,
        *,
        signals: list[Signal] | None = None,
        student_outputs: list[Tensor] | None = None,
        states: list[Tree] | None = None,
        takes_steps: bool = True,
    ) -> None:
        self.copies = step.copied()
        self.theta = trainable(self.copies.student)
        self.move = move
        self.given_signals = signals
        self.given_outputs = student_outputs
        self.given_states = states
        self.signals: list[Signal] = []
        self.beside_labels: dict[str, Tensor] = {}
        self.outputs: list[Tensor] = []
        self.gradients: dict[str, Tree] = {}
        self.states: list[Tree] = []
        self.written: set[str] = set()

        # Where derivatives are taken twice, parts whose kernel has no second one are computed by
        # their formulas.
        formulas = Slots(self.copies.student).in_formulas()
        with self.copies.in_the_originals(), swapped(formulas):
            try:
                self._take_all_steps(takes_steps)
            except RuntimeError as error:
                explain(error)
                raise

    def _take_all_steps(self, takes_steps: bool) -> None:
        self._move_weights("teacher", self.copies.learned())
        self._move_weights("inner", self.theta)
        self.copies.random.restore()
        random_after = self.copies.random
        for inner_batch in self.copies.inner_batches:
            random_after = self._take_a_step(inner_batch, takes_steps)
        self._move_weights("outer", self.theta)
        # The outer pass draws from a stream of its own.
        random_after.branch().restore()
        self._find_outer_loss()

    def _move_weights(self, what: str, weights: Mapping[str, Tensor]) -> None:
        if what != self.move.what:
            return
        with torch.no_grad():
            for name, t in self.move.direction.items():
                weights[name].add_(t, alpha=self.move.length)

    def _take_a_step(self, inner_batch: Batch, takes_steps: bool) -> RandomState:
        """Take one step of the student, and return the state of the generators after its pass."""
        copies = self.copies
        problem = copies.problem
        student = copies.student
        weights_before = self._weights_now()
        entering = enters_input(problem)
        signal = None
        if problem.signal_of_batch or entering:
            signal = self._ask_teacher(inner_batch, None)
        self._begin_pass(student)
        if entering:
            inputs = problem.student_input(inner_batch, signal)  # type: ignore[call-arg]
        else:
            inputs = problem.student_input(inner_batch)
        z = student(inputs)
        random_after = RandomState.now(copies.random.device)
        self.outputs.append(z.detach())
        if signal is None:
            signal = self._ask_teacher(inner_batch, z.detach())

        losses = problem.inner_loss(z, signal, inner_batch, self.theta)
        if self.move.what == "weights":
            losses = losses * (1 + self.move.length * self.move.direction[0, "log_prob"])
        loss = losses.mean()
        loss.backward(retain_graph=not takes_steps)
        if len(self.outputs) == 1:
            self.inner_loss = loss
        self._note_written_weights(weights_before)

        gradient = {name: p.grad for name, p in self.theta.items() if p.grad is not None}
        if "inner" not in self.gradients:
            self.gradients["inner"] = {name: g.clone() for name, g in gradient.items()}
        if copies.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.theta.values(), copies.clip_norm)
        if takes_steps:
            # The optimizer's own step(); of a transform, and of Muon, the rule.
            copies.update.take_differentiated_step(self.theta, gradient)
        student.zero_grad()
        return random_after

    def _find_outer_loss(self) -> None:
        problem = self.copies.problem
        student = self.copies.student
        weights_before = self._weights_now()
        batch = problem.outer_batch(self.copies.outer_batch)
        self._begin_pass(student)
        self.outputs.append(student(problem.outer_input(batch)))
        total, weight = sum_and_weight(problem.outer_loss(self.outputs[-1], batch))
        self._note_written_weights(weights_before)
        if self.copies.micro_batches > 1 and not bool(torch.as_tensor(weight > 0)):
            # As in the step, which adds the parts up first: another part is looked at.
            raise MetaplError(checks.NO_WEIGHT)
        loss = total / weight
        if self.move.what == "nothing" and loss.requires_grad:
            loss.backward()
            gradient = {}
            for name, p in self.theta.items():
                gradient[name] = torch.zeros_like(p) if p.grad is None else p.grad
            self.gradients["outer"] = gradient
        self.loss = loss.detach()

    def _ask_teacher(self, inner_batch: Batch, student_outputs: Tensor | None) -> Signal:
        """Return the signal that the student learns from, and note the teacher's.

        The first has no graph.
        """
        number = len(self.signals)
        self._begin_pass(self.copies.teacher)
        if student_outputs is not None and self.given_outputs is not None:
            student_outputs = self.given_outputs[number]
        teacher = nn.Module() if self.copies.teacher is None else self.copies.teacher
        asked = self.copies.problem.signal(
            teacher, inner_batch, student_outputs, generator=self.copies.generator
        )
        self.signals.append(asked)
        signal = asked.detached() if self.given_signals is None else self.given_signals[number]
        if signal.sampled and number == 0:
            for name, t in signal.fields().items():
                if name in FIELDS_BESIDE_VALUE:
                    self.beside_labels[name] = t.detach().requires_grad_()
            # A loss may write to what it is given, as to no leaf.
            signal = signal.having({name: t.clone() for name, t in self.beside_labels.items()})
        if self.move.what != "signal":
            return signal
        moved = {}
        for (step_number, name), t in self.move.direction.items():
            if step_number == number:
                moved[name] = signal.fields()[name] + self.move.length * t
        return signal.having(moved)

    def _begin_pass(self, network: nn.Module | None) -> None:
        """Note the buffers and frozen parameters of a network.

        Those that were given are put in place first.
        """
        named = (
            {} if network is None else dict([*network.named_buffers(), *network.named_parameters()])
        )
        carried = {name: t for name, t in named.items() if not t.requires_grad}
        if self.given_states is not None:
            for name, t in self.given_states[len(self.states)].items():
                if name in carried:
                    carried[name].copy_(t)
        self.states.append({name: t.detach().clone() for name, t in carried.items()})

    def _weights_now(self) -> Tree:
        return {name: p.detach().clone() for name, p in self.theta.items()}

    def _note_written_weights(self, before: Tree) -> None:
        for name, p in self.theta.items():
            as_before = p.dtype == before[name].dtype and p.shape == before[name].shape
            if not as_before or not torch.allclose(p, before[name], 0, 0, equal_nan=True):
                self.written.add(name)


def with_feedback(request: Request) -> tuple[Hypergradient, list[dict[str, Tensor]]]:
    """Return the gradient that is asked for, and h of each step by the signal's fields."""
    differentiation = Differentiation(request)
    found = differentiation.find()
    return found, [feedback.by_field() for feedback in differentiation.feedback]


def size_of(t: Tensor) -> float:
    """Return the root mean square of a tensor, and 1e-2 where it is smaller."""
    return max(float(t.detach().abs().double().square().mean().sqrt()), 1e-2)
