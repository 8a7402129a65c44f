"""Teacher and student, trained together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from metapl.core.algorithm import learn
from metapl.core.lookahead import InnerBatches, Lookahead, require_batches
from metapl.core.order import Order, Orders
from metapl.core.path import Path
from metapl.core.size import DEFAULT_BOUND, FeedbackSize
from metapl.core.teacher import Teacher, Teaching
from metapl.engines.eager import EagerEngine
from metapl.errors import MetaplError, warn
from metapl.execution import checks
from metapl.execution.batch import Batch, Inputs, labeled_pair, plain, returned_by
from metapl.execution.layout import layouts
from metapl.execution.numerics import MissingDerivative, no_fast_path
from metapl.execution.ranks import NOTHING
from metapl.execution.state import RandomState, Slots, one_at_a_time, replayed, restored
from metapl.feedback import (
    Mode,
    check_direct_term,
    check_mode,
    check_signal,
    check_teacher,
    estimator,
    in_place_of,
    mode_words,
    prepare,
)
from metapl.feedback.hypergradient import Hypergradient
from metapl.feedback.report import Report, StepReport
from metapl.guards.door import FirstLook, look_at_step
from metapl.guards.verification import Verification
from metapl.problems.base import (
    BilevelProblem,
    OuterLoss,
    Signal,
    kind_of,
    outer_variables,
    overrides,
)
from metapl.problems.losses import TeacherLoss, check_losses
from metapl.runs.fields import (
    AboveZero,
    AtLeastZero,
    MicroBatches,
    Range,
    check_arguments,
    options_by_name,
)
from metapl.training.base import Trainer, assigned_once
from metapl.training.hypergradient import hypergradient
from metapl.training.loss_trainer import SETTINGS, LossTrainer
from metapl.updates import (
    Clipped,
    InnerOptimizer,
    Update,
    as_one_optimizer,
    load_copy_of_state,
    parameters_of,
    refuse_missing,
    refuse_unfit,
    torch_parts_of,
    update_of,
)

if TYPE_CHECKING:
    from metapl.data.feed import Source
    from metapl.functional.compiled import CompiledStep
    from metapl.functional.state import State
    from metapl.functional.step import StateStep, Step
    from metapl.metrics.metric import Term
    from metapl.training.loop import FinetuneKeywords, FitResult
    from metapl.training.options import FitOptions

FIRST_NOT_FINITE = (
    "the inner loss is NaN or infinite: the student has diverged, or a batch has extreme values; "
    "lower its learning rate, or clean the batch."
)


@dataclass(frozen=True)
class Standing:
    """What the steps have in common as long as the networks are as they were read.

    Args:
        student: as its engine runs it.
        teacher: as its passes are taken.
        direct_term: as :attr:`BilevelTrainer.direct_term`.
        trained: the weights of the outer optimizer.
        precision: the block in which passes run.
        orders: of differentiation, as the first step of so many student steps chose it.
    """

    student: EagerEngine
    teacher: Teacher
    direct_term: Literal["", "included", "left out"]
    trained: Sequence[Tensor]
    precision: AbstractContextManager[Any]
    orders: dict[int, Order | None] = field(default_factory=dict)


@dataclass
class Condition:
    """The modes, frozen parts and hooks of the networks, and how many steps were taken in them.

    Hooks on the inner optimizer's step are among them.

    Args:
        fingerprint: of them.
        steps: the number of steps; networks are looked at in the first.
    """

    fingerprint: int
    steps: int = 0


@assigned_once("teacher", "student", "mode", "problem", "inner_optimizer", "outer_optimizer")
@assigned_once("clip_norm", "precision", "accumulate", "recompute_teacher", "compile")
class BilevelTrainer(Trainer):
    r"""Train a teacher and a student, by Meta Pseudo Labels or another bilevel problem.

    Which gradient the teacher learns from is a choice, the mode.

    .. math:: \theta_S' = U(\theta_S, \nabla_{\theta_S} \ell(S(x_u), \mathrm{signal})), \qquad
              \theta_T \leftarrow \theta_T - \eta_T \nabla_{\theta_T}
              \Big[ -\lambda \sum \mathrm{sg}(h)\cdot\mathrm{signal} + \sum_k L_k(\theta_T) \Big]

    Args:
        teacher, student: modules on one device, with weights of their own. In several processes,
            both in ``DistributedDataParallel`` or sharded by ``fully_shard`` (docs/scale.md): every
            rank then gives its equal share of each batch. No teacher, None, for a problem that has
            none, such as :class:`metapl.problems.LearningToReweight`; it then takes no teacher's
            options.
        mode: one of :data:`metapl.MODES`, or an estimator value such as
            ``metapl.feedback.Reinforce(baseline=0.99)``. ``reinforce`` is Algorithm 1 of the paper:
            one number for the batch, times its labels' mean cross-entropy.
        problem: default :class:`metapl.PseudoLabels`.
        inner_optimizer: the student's: ``torch.optim`` SGD, Adam, AdamW or Muon, a tuple of these
            over disjoint parameters, such as (Muon, AdamW), or a TorchOpt transform.
        outer_optimizer: the teacher's: any of ``torch.optim`` over its parameters, or a tuple;
            default: the problem's (:meth:`metapl.BilevelProblem.default_outer_optimizer`). Where
            the problem names none, and for the student, it is ``SGD(lr=0.05, momentum=0.9,
            nesterov=True, weight_decay=5e-4)``. Of optimizers that accelerate or Lightning have
            wrapped, give the ``.optimizer`` inside (docs/own-loop.md).
        teacher_losses: the teacher's own losses, ``()`` for none; default: those of the problem.
            For pseudo-labels they are ``CrossEntropy()``, and ``UDA()`` if the inner batch has two
            views. Labels smoothed by 0.1 were 0.7 points behind (docs/modes.md).
        feedback_weight: λ by itself. At 1 the teacher descends the true gradient of the outer
            loss after one student step, in the modes without bias. With a large one both networks
            may collapse onto one class (docs/modes.md).
        feedback_ratio: in the place of the weight: ‖λ G_h‖ / ‖G_own‖ in every step, the norm of the
            feedback's gradient in the teacher's parameters over that of the own losses' gradient.
        feedback_bound: that ratio at most: λ = min(weight, bound · ‖G_own‖ / ‖G_h‖), with a weight
            of 1 unless another is given. **The default**, where none of the three is given and the
            teacher learns labels by losses of its own (those of the problem, what is given in their
            place, or a cross-entropy), is a bound of 0.1
            (:data:`metapl.core.size.DEFAULT_BOUND`; measured in docs/modes.md); elsewhere it is
            a weight of 1. A bound and a ratio take no pass more than a weight does, and hold one
            more gradient of the teacher (docs/modes.md has the cost of a compiled step).
        recompute_teacher: run the teacher on the inner batch without a graph first, and once
            more with one at the end: one more teacher forward pass, one graph less in memory.
        generator: for drawing labels; default: the default generator of the device.
        clip_norm: the greatest global norm of either network's gradient; None: no clipping. The
            student's clip is part of its update, so the feedback includes its derivative.
        accumulate: micro-batches that each batch is split into: one more teacher forward pass, for
            about 1/accumulate of the memory. An outer loss of one's own that is a scalar takes one
            more forward pass too; (sum, weight) does not
            (:meth:`metapl.BilevelProblem.outer_loss`). The numbers are the same, except for batch
            statistics, dropout masks, inner and teacher losses that are no means over examples, and
            signals that are normalized over the batch
            (:attr:`metapl.BilevelProblem.signal_of_batch` has them asked for once).
        precision: ``"float32"``, or ``"bfloat16"``: the networks' passes under autocast, weights
            and losses in float32.
        lookahead: student steps that the feedback looks ahead: :meth:`fit` draws as many inner
            batches per step, the student steps on each, and the teacher takes one step on the
            feedback on all of them. For ``forward``, ``unrolled``, ``direct`` and ``none``.
            :meth:`step` takes a :class:`metapl.Lookahead` of any length.
        compile: take steps by the pure step (:meth:`functional`), recorded as one graph that
            Inductor compiles in 5 seconds to three minutes for each shape of batches (docs/modes.md
            says what it holds for). In one process, with SGD, Adam, AdamW or Muon on both levels
            and at most 3 steps ahead, without ``accumulate``. The first step of each graph is
            compared with an eager one. ``"cudagraphs"``: by CUDA graphs alone, recorded in the time
            of three eager steps, for another copy of all state. A network alone
            (:meth:`finetune`) is eager with it.
        verify: True: compare the mode's gradient with differences of the loss after real steps, at
            the first step and where the networks are changed (their modes, frozen parts, hooks) or
            the inner optimizer's step (by hooks), and refuse one that is wrong
            (:func:`metapl.check_gradient`); ``"warn"``: warn of it; False: never; a number N: also
            every N steps. Above 50 million weights only by a number N, and not in several
            processes; a line says what is left out.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="reinforce")
    >>> labeled = torch.randn(5, 4), torch.arange(5) % 3
    >>> report = trainer.step(outer=labeled, inner=torch.randn(6, 4))
    >>> report.feedback.shape, report.step
    (torch.Size([]), 0)

    Raises: :class:`metapl.MetaplError` before anything moves.
    Source: Meta Pseudo Labels, Algorithm 1.
    """

    teacher: nn.Module | None

    @options_by_name
    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        mode: Mode = "forward",
        *,
        problem: BilevelProblem | None = None,
        inner_optimizer: InnerOptimizer | None = None,
        outer_optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        teacher_losses: Sequence[TeacherLoss] | None = None,
        feedback_weight: Annotated[float, Range(0)] | None = None,
        feedback_ratio: Annotated[float, Range(0)] | None = None,
        feedback_bound: Annotated[float, Range(0)] | None = None,
        recompute_teacher: bool = False,
        generator: torch.Generator | None = None,
        clip_norm: AboveZero | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        accumulate: MicroBatches = 1,
        compile: bool | Literal["cudagraphs"] = False,
        lookahead: Annotated[int, Range(1, of="a number of student steps")] = 1,
        verify: bool | AtLeastZero | Literal["warn"] = True,
    ) -> None:
        self.mode = estimator(mode)
        self.verification = Verification(verify)
        check_arguments(BilevelTrainer.__init__, locals())
        self.given_problem = problem
        self.problem = prepare(problem, self.mode)
        self.classifies = self.problem.classifies
        self.teacher_classifies = self.problem.teacher_classifies
        check_teacher(
            teacher,
            self.problem,
            outer_optimizer=outer_optimizer is not None,
            teacher_losses=bool(teacher_losses),
            feedback_weight=feedback_weight is not None,
            feedback_ratio=feedback_ratio is not None,
            feedback_bound=feedback_bound is not None,
            recompute_teacher=recompute_teacher,
        )

        # The networks as they were given, perhaps in DistributedDataParallel.
        self.pair = (teacher, student)
        self.as_given = student
        # How each of them is laid out over processes. A layout holds the network without its
        # wrapper, which is what self.teacher and self.student are.
        gives_feedback = self.mode.credits != "nothing"
        # A compiled step is traced through the networks in every mode, so that none of them may be
        # under torch.compile itself.
        self.teacher_layout, self.layout, self.device = layouts(
            teacher, student, differentiated=gives_feedback or bool(compile)
        )
        checks.generator_of(generator, self.device, "the networks are on")
        # The pure step is loaded where it is used: an eager step needs nothing of it.
        self.compiled_step: CompiledStep | None = None
        if compile:
            from metapl.functional.compiled import CompiledStep
            from metapl.functional.cuda_graphs import refuse_device

            self.compiled_step = CompiledStep()
            if compile == "cudagraphs":
                refuse_device(self.device)
        # The layouts of the networks that there are, the teacher's first.
        self.layouts = [self.layout]
        if self.teacher_layout is not None:
            self.layouts = [self.teacher_layout, self.layout]
        self.teacher = None if self.teacher_layout is None else self.teacher_layout.network
        # The layouts of networks that run in several processes.
        self.distributed = [layout for layout in self.layouts if layout.kind != "plain"]
        self.ranks = self.layout.ranks
        self.student = self.layout.network
        self._engine_type = EagerEngine
        if self.layout.is_sharded:
            # It is loaded where it is used.
            from metapl.engines.sharded import ShardedEngine

            self._engine_type = ShardedEngine

        # How a step is taken.
        self.teacher_losses: Sequence[TeacherLoss] | None = None
        if teacher_losses is not None:
            self.teacher_losses = check_losses(teacher_losses)
        self.recompute_teacher = recompute_teacher
        self.generator = generator
        self.clip_norm = clip_norm
        self.precision = precision
        self.accumulate = accumulate
        self.lookahead = lookahead
        self.compile = compile
        if self.mode.truncate == 0:
            raise MetaplError("truncate=0 differentiates no step of a trainer; expected 1 or more.")
        self._set_feedback_size(feedback_weight, ratio=feedback_ratio, bound=feedback_bound)
        check_mode(self.mode, lookahead, self.problem, self.layout)
        check_direct_term(self.mode, self.problem, self.layouts)

        # The optimizers.
        if inner_optimizer is None:
            self.inner_optimizer = default_optimizer(self.student)
        else:
            self.inner_optimizer = as_one_optimizer(inner_optimizer)
        self.update: Update = update_of(self.inner_optimizer, self.layout.parameters())
        if clip_norm is not None:
            self.update = Clipped(self.update, clip_norm, self.layout.space)
        # Trains the teacher on its own losses, while the student waits.
        self._teacher_trainer: LossTrainer | None = None
        if teacher is None:
            self.outer_optimizer: torch.optim.Optimizer | None = None
        else:
            self.outer_optimizer = self._outer_optimizer_of(outer_optimizer)
            self._teacher_trainer = self._trainer_of(teacher)

        # What changes from step to step.
        teacher_module = nn.Module() if self.teacher is None else self.teacher
        self.slots = [
            Slots(teacher_module),
            Slots(self.student, torch_parts_of(self.inner_optimizer)),
        ]
        self.mode_state = self.mode.first_state(generator, self.device)
        self.orders = Orders()
        self.steps_done = 0
        # Whether the next step finds the feedback's size also where its rule does not need it; a
        # fit says so before the steps that it records. Without effect on weights, and in compiled
        # steps.
        self.measures_feedback = False
        # The conditions in which steps were taken, by fingerprint.
        self._conditions: dict[int, Condition] = {}
        # What is asked once, until the networks change.
        self._condition: Condition | None = None
        self._standing: Standing | None = None
        self.is_made = True

    def _outer_optimizer_of(self, given: Any) -> torch.optim.Optimizer:
        """Return the teacher's optimizer, or the default one; refuse one that does not fit."""
        assert self.teacher is not None, "an outer optimizer is of a teacher"
        assert self.teacher_layout is not None, "a teacher has a layout"
        optimizer = as_one_optimizer(given, "outer_optimizer")
        if given is None:
            of_problem = self.problem.default_outer_optimizer(self.teacher)
            optimizer = of_problem or default_optimizer(self.teacher)
        if not isinstance(optimizer, torch.optim.Optimizer):
            expected = "one of torch.optim over teacher.parameters()"
            raise checks.unexpected("outer_optimizer is", optimizer, expected)
        refuse_unfit(optimizer, "outer_optimizer")
        learned = self.teacher_layout.parameters()
        refuse_missing("outer_optimizer", optimizer, learned, network="teacher")
        ids_of_teacher = {id(p) for p in self.teacher.parameters()}
        if any(id(p) not in ids_of_teacher for p in parameters_of(optimizer)):
            raise MetaplError("outer_optimizer holds other tensors than the teacher's parameters.")
        return optimizer

    def _trainer_of(self, teacher: nn.Module) -> LossTrainer:
        """Return a trainer of the teacher, as it was given, on its own losses alone."""
        assert self.teacher_layout is not None, "a teacher has a layout"
        assert self.outer_optimizer is not None, "a teacher has an optimizer"
        trainer = LossTrainer(
            teacher,
            optimizer=self.outer_optimizer,
            clip_norm=self.clip_norm,
            precision=self.precision,
            accumulate=self.accumulate,
        )
        trainer.total = "teacher_loss"
        trainer.prefix = "teacher"
        # Its network is the teacher, in the layout that it has beside the student: processes that
        # hold the same rows are counted as the student's are (see layouts()).
        trainer.layout = self.teacher_layout
        trainer.layouts = [self.teacher_layout]
        trainer.ranks = self.teacher_layout.ranks
        return trainer

    @one_at_a_time
    def step(self, outer: Batch, inner: Batch = None) -> StepReport:
        """Take one step of Algorithm 1 on an outer batch, which is labeled, and an inner one.

        Args:
            outer: (x_l, y_l), or a dict that also holds the labels, under ``labels``. The inputs
                may be a dict or a tuple of tensors, one argument of the networks
                (:class:`metapl.models.Logits` spreads it over several).
            inner: x_u, or (weak, strong); or a :class:`metapl.Lookahead` of K such batches: the
                student takes K steps, and the teacher one on the feedback on all of them; its own
                losses read the last batch. Every problem needs one.

        Returns: a :class:`metapl.StepReport`.
        Raises: :class:`metapl.MetaplError` before anything moves. An error that an optimizer raises
            in its own ``step()``, such as one of a hook on it, may come when weights have moved:
            the teacher's optimizer steps first, so that the student has not moved where that one
            fails; the teacher may have.
        """
        require_batches(outer, inner)
        inner_batches = InnerBatches.of_trainer(inner, self.lookahead)
        condition, look = self._open_step(outer, inner_batches)
        if self.compiled_step is not None:
            report = self.compiled_step(self, plain(outer), inner_batches)
            condition.steps += 1
            return report
        steps = len(inner_batches)
        if steps != self.lookahead:
            check_mode(self.mode, steps, self.problem, self.layout)
        standing = self._standing or self._stand()
        standing.student.begin()
        attempt = partial(
            self._step_in_order,
            standing=standing,
            condition=condition,
            outer_batch=outer,
            inner_batches=inner_batches,
            look=look,
        )
        try:
            if steps in standing.orders:
                return attempt(standing.orders[steps], is_tried=False)
            candidates = self.mode.orders(steps, self.problem, standing.student)
            report = self.orders.take(candidates, attempt, begin_again=self._reshard)
        except MissingDerivative as error:
            expected = in_place_of(self.mode, steps, self.problem, wrt=())
            raise MissingDerivative(error.what, expected) from error
        standing.orders[steps] = self.orders.chosen(candidates)
        return report

    def _stand(self) -> Standing:
        """Find out what the steps have in common while the networks stay as they are."""
        teacher_slots, student_slots = self.slots
        student = self._engine_type(
            self.layout,
            student_slots,
            double_backward=self.mode.keep_graph,
            parts=self.accumulate,
        )
        teacher = Teacher(
            self.teacher_layout,
            self.problem,
            self.ranks,
            self.device,
            teacher_slots,
            accumulate=self.accumulate,
            recompute=self.recompute_teacher,
        )
        trained = [] if self.outer_optimizer is None else parameters_of(self.outer_optimizer)
        self._standing = Standing(
            student, teacher, self.direct_term, trained, precision=self._autocast()
        )
        return self._standing

    def _open_step(
        self, outer_batch: Batch, inner_batches: InnerBatches
    ) -> tuple[Condition, FirstLook | None]:
        """Read the networks' tables as they are now, and refuse what no step can be taken with.

        Networks are verified on these batches where that is due. Where they are met for the first
        time, what may carry a gradient past the signal is refused.

        Returns: the condition of the networks, and what looks at the graphs of both losses; None:
        they were looked at in this condition before.
        """
        for layout in self.distributed:
            layout.begin_step()
        if not all(slots.are_current() for slots in self.slots):
            self.slots = [slots if slots.are_current() else slots.anew() for slots in self.slots]
            self._standing = None
            self._condition = None
        look = None
        if (condition := self._condition or self._find_condition()).steps == 0:
            self.tell_evaluation(warn)
            look = look_at_step(self, outer_batch, inner_batches)
        # With ``every`` it is asked in each step, and decides itself whether this one is its turn.
        if self.verification.setting and (
            self.verification.every or condition.fingerprint not in self.verification.verified_marks
        ):
            graphs_were_looked_at = self.verification.before(
                self, outer_batch, inner_batches, mark=condition.fingerprint
            )
            # It took a step on these batches, and looked at its graphs as the first look would.
            if graphs_were_looked_at:
                look = None
        return condition, look

    def _find_condition(self) -> Condition:
        """Return the condition of networks that have changed, or refuse one that no step takes."""
        teacher_slots, student_slots = self.slots
        if self.outer_optimizer is not None:
            # Layers may have been added since, or thawed.
            learned = teacher_slots.learned
            refuse_missing("outer_optimizer", self.outer_optimizer, learned, network="teacher")
        fingerprint = hash((teacher_slots.mark, student_slots.mark))
        self._condition = self._conditions.setdefault(fingerprint, Condition(fingerprint))
        return self._condition

    def _step_in_order(
        self,
        order: Order | None,
        is_tried: bool,
        *,
        standing: Standing,
        condition: Condition,
        outer_batch: Batch,
        inner_batches: InnerBatches,
        look: FirstLook | None,
    ) -> StepReport:
        """Take the step with the feedback's second derivative in one order.

        A step that fails before its optimizers step has moved nothing: buffers, gradients and
        generators are put back. An optimizer that fails, as by a hook on it, may leave weights
        moved: the teacher's, perhaps in part, where the outer optimizer fails; those of both
        networks where the inner one does. To undo that would take a copy of weights and optimizers'
        states in every step.

        Args:
            order: None, where there is nothing to choose.
            is_tried: whether the order is being chosen, by whether this step runs in it.
            look: looks at the graphs of both losses; None: they were looked at before.
        """
        mode = self.mode
        student = standing.student
        if is_tried:
            # The student switches the first off itself, after the first graph that it has looked
            # at, and the second stays for the whole step.
            student.inspects_graph = True
            student.chooses_order = True
        # The update is of the weights that are learned now: layers may have been thawed.
        self.update.follow(student.parameters)
        teaching = Teaching(
            standing.teacher,
            self.problem.outer_batch(outer_batch),
            inner_batches,
            generator=self.generator,
            losses=self._losses_for(inner_batches[-1]),
            size=self.feedback_size,
            step=self.steps_done,
            measures=self.measures_feedback,
        )
        # In the second step too: a mean teacher that begins as the teacher does not move before.
        if condition.steps < 2:
            from metapl.guards.calls_of_signal import KeptBySignal

            teaching.check = partial(
                check_signal, mode=mode, problem=self.problem, student_steps=len(inner_batches)
            )
            teaching.compares_parts = bool(self.verification.setting) and condition.steps == 0
            teaching.calls = KeptBySignal(self.problem, standing.teacher.network)
        # Fused attention has no second derivative, which a kept graph of g needs.
        kernels = no_fast_path(math=True) if mode.keep_graph or order == "graph" else NOTHING
        with restored(
            *self.slots, device=self.device, trained=standing.trained, generator=self.generator
        ) as fault:
            with standing.precision, kernels:
                learned = learn(
                    student,
                    self.update,
                    teaching,
                    mode,
                    self.mode_state,
                    order=order,
                    is_tried=is_tried,
                    direct_term=standing.direct_term,
                    look=look,
                )
                last_step = learned.path.steps[-1]
                report = StepReport(
                    self.steps_done,
                    learned.scalars,
                    fault=fault,
                    feedback=tuple(learned.h) if inner_batches.is_lookahead else learned.h[0],
                    signal=last_step.signal.detached() if mode.keep_graph else last_step.signal,
                    # A copy: the outputs may be weights, which the step moves.
                    student_outputs=last_step.outputs.clone(),
                    order=order or "",
                    direct_term=standing.direct_term,
                )
            if look is not None:
                look.at_batches()
            # The gradients are averaged over the processes, and clipped.
            is_averaged_or_clipped = self.clip_norm is not None or not self.ranks.alone
            if self.teacher_layout is not None and is_averaged_or_clipped:
                self.teacher_layout.mean_gradients(self.clip_norm)
            # Nothing has moved so far. The teacher's optimizer may be any, and may fail in its own
            # step; the student moves last, so that it has not moved then.
            commit = learned.path.commit
            if condition.steps == 0 and self.verification.setting and mode.credits != "nothing":
                # Where its optimizer has hooks the student moves first here: that may be refused,
                # and the teacher has not moved then.
                from metapl.guards.step_hooks import committed_first

                commit = committed_first(learned.path)
            if self.outer_optimizer is not None:
                # Line 8: θ_T′.
                self.outer_optimizer.step()
            # Line 3: θ_S′.
            report.scalars.update(commit())
            for layout in self.distributed:
                layout.agree_on_buffers()
            self.mode_state = learned.mode_state
            self.steps_done += 1
            condition.steps += 1
            return report

    def _reshard(self) -> None:
        """Let the blocks of sharded networks give up what a pass that failed has gathered."""
        for layout in self.layouts:
            layout.reshard()

    @property
    def direct_term(self) -> Literal["", "included", "left out"]:
        """Return whether the teacher's gradient has the direct term of an outer loss that reads it.

        "" where the outer loss reads the student alone.
        """
        if not outer_variables(self.problem, self.teacher):
            return ""
        return "included" if self.mode.has_direct_term else "left out"

    def _losses_for(self, inner_batch: Batch) -> Sequence[TeacherLoss]:
        """Return the teacher's own losses in a step, whose last inner batch they may depend on."""
        if self.teacher is None:
            return ()
        if self.teacher_losses is None:
            return self.problem.default_teacher_losses(inner_batch)
        return self.teacher_losses

    @property
    def has_losses(self) -> bool:
        """Whether the teacher has losses of its own."""
        if self.teacher_losses is None:
            return overrides(self.problem, "default_teacher_losses")
        return bool(self.teacher_losses)

    @property
    def _teacher_learns_labels(self) -> bool:
        """Whether the teacher's own losses teach it the task.

        Others may, say, keep its weights small.
        """
        # A problem's default losses teach the task, and losses that are given in their place are
        # taken to do so too. With other problems only a loss that says so does.
        if overrides(self.problem, "default_teacher_losses"):
            return self.has_losses
        return any(getattr(loss, "of_classes", False) for loss in self.teacher_losses or ())

    def _set_feedback_size(
        self, weight: float | None, ratio: float | None, bound: float | None
    ) -> None:
        """Take the rule of the feedback's size, and refuse what does not go together.

        Where nothing is given, it is the bound if the teacher learns labels, else a weight of 1.
        """
        for name, value in (("feedback_ratio", ratio), ("feedback_bound", bound)):
            if value is not None and not self.has_losses:
                raise MetaplError(
                    f"{name}={value:g} was given, and the teacher has no losses to measure by; "
                    "expected feedback_weight=, or another rate of outer_optimizer."
                )
        if ratio is not None and (weight is not None or bound is not None):
            beside = "feedback_weight" if weight is not None else "feedback_bound"
            given = f"feedback_ratio={ratio:g} and {beside} were given"
            raise MetaplError(f"{given}; expected one of them.")
        self.feedback_weight = 1.0 if weight is None else weight
        self.feedback_ratio = ratio
        self.feedback_bound = bound
        nothing_is_given = weight is None and ratio is None and bound is None
        if nothing_is_given and self._teacher_learns_labels:
            self.feedback_bound = DEFAULT_BOUND

    @property
    def feedback_size(self) -> FeedbackSize:
        """Return the rule that gives λ in a step."""
        return FeedbackSize(
            weight=self.feedback_weight, ratio=self.feedback_ratio, bound=self.feedback_bound
        )

    def functional(self) -> tuple[Step, State]:
        """Return the trainer's step as one pure function, and a copy of its state.

        ``state, report = step(state, outer, inner, noise=None)``, which ``torch.func.vmap`` stacks,
        and ``torch.autograd`` differentiates, to any order, in all that it is given: weights,
        settings such as ``state.inner.settings[0]["lr"]``, batches, noise. The derivative is that
        of the numbers which a step computes, by a recording of it (:mod:`metapl.functional.step`),
        and keeps the operations of each step in memory.

        With ``lookahead=K`` (at most 3) ``inner`` is a tuple of K batches. ``noise`` is Gumbel
        noise of the shape of the class probabilities, a tuple of K; None: drawn from torch's
        default generator, from which dropout draws too. The first call is verified as the
        trainer's own first step and compared with it; of several states the first one is.

        >>> import torch, metapl
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> step, state = metapl.BilevelTrainer(teacher, student, mode="forward").functional()
        >>> labeled = torch.randn(5, 4), torch.arange(5) % 3
        >>> for _ in range(3):
        ...     state, report = step(state, labeled, torch.randn(6, 4))
        >>> int(state.step), report.feedback.shape
        (3, torch.Size([6, 3]))

        Raises: :class:`metapl.MetaplError` for what has no pure form: ``implicit``, ``accumulate``,
            several processes, more than 3 steps, and outer optimizers other than SGD, Adam, AdamW
            and Muon.
        """
        from metapl.functional.pure_step import functional

        step, state = functional(self)
        # A recording puts back what the step has in its attributes, so that this is noted here.
        self._was_looked_at = False
        step.first_look = self._look_at_functional
        return step, state

    def _look_at_functional(
        self, step: StateStep, given: tuple[State, Batch, Batch], has_noise: bool
    ) -> None:
        """Refuse a pure step whose first call is not a step that the trainer would take itself."""
        if self._was_looked_at:
            return
        from metapl.functional.compared_step import at_values, refuse_first_call

        state, outer, inner = given
        if self.lookahead > 1 and not isinstance(inner, Lookahead):
            inner = Lookahead(inner)
        inner_batches = InnerBatches.of_trainer(inner, self.lookahead)
        with at_values(self, state):
            self._open_step(outer, inner_batches)
            refuse_first_call(self, step, outer, inner_batches, has_noise=has_noise)
        self._was_looked_at = True

    def teacher_step(self, outer: Batch, inner: Batch = None) -> Report:
        """Take one step of the teacher alone, while the student waits.

        These are lines 6 to 8 of Algorithm 1, on the batches of a step. Its losses get no signal;
        ``steps_done`` increases by one, and of the student nothing changes.

        Returns: a report with ``teacher_loss`` and a ``teacher_<name>`` per term.
        Raises: :class:`metapl.MetaplError` before anything moves.
        """
        if self._teacher_trainer is None or not self.has_losses:
            raise MetaplError("the teacher has no losses of its own; expected teacher_losses=.")
        self._teacher_trainer.losses = self._losses_for(plain(inner))
        self._teacher_trainer.steps_done = self.steps_done
        report = self._teacher_trainer.step(outer, inner)
        self.steps_done += 1
        return report

    def first_steps(self, options: FitOptions) -> int:
        """Return how many steps of a fit are a :meth:`first_step`, after those of ``wait``.

        That is the option ``first_steps``, or what the problem's method of that name returns for
        the number of steps after ``wait``.

        Raises: :class:`metapl.MetaplError` where the problem leaves the teacher no step.
        """
        if options.first_steps is not None:
            # The options have refused one that leaves the teacher no step.
            return options.first_steps
        steps_after_wait = options.steps - options.wait
        steps = self.problem.first_steps(steps_after_wait)
        if not isinstance(steps, int) or not 0 <= steps < steps_after_wait:
            returned = f"{kind_of(self.problem)}.first_steps({steps_after_wait}) returned {steps!r}"
            raise MetaplError(f"{returned}; expected a whole number below {steps_after_wait}.")
        return steps

    @one_at_a_time
    def first_step(self, outer: Batch, inner: Batch) -> Report:
        """Take one step of the student alone, on the problem's ``first_signal``.

        The signal is about the inner batch. :meth:`fit` takes these before the teacher begins, as
        many as the problem's ``first_steps`` says, or the option of that name. Of the teacher, its
        optimizer and the mode nothing changes but the buffers that its forward pass writes;
        ``steps_done`` increases by one.

        The step is eager with ``compile`` too, and the first of them compiles the later ones, so
        that what cannot be compiled is refused before anything moves. It looks one step ahead, so
        that with ``lookahead`` above 1 the mode is verified, and the step compiled, when the
        teacher begins.

        Cost: one forward and one backward pass of the student, and what ``first_signal`` asks of
        the teacher. Returns: a report with ``inner_loss``. Raises: :class:`metapl.MetaplError`
        before anything moves.
        """
        require_batches(outer, inner)
        inner_batches = InnerBatches.of_one_step(inner)
        if self.lookahead == 1:
            self._open_step(outer, inner_batches)
            if self.compiled_step is not None:
                self.compiled_step.prepare(self, plain(outer), inner_batches)
        else:
            # This is one step, and the mode is used over several here: it is not verified yet.
            for layout in self.distributed:
                layout.begin_step()
            # This step is rare, so the tables are read anew without asking whether they changed.
            self.slots = [slots.anew() for slots in self.slots]
            self._standing = None
            self._condition = None
        teacher_slots, student_slots = self.slots
        outer_batch = self.problem.outer_batch(outer)
        student = self._engine_type(self.layout, student_slots, parts=self.accumulate)
        self.update.follow(student.parameters)

        def first_signal(batch: Batch, outputs: Tensor | None) -> Signal:
            with torch.no_grad():
                return self.problem.first_signal(
                    teacher_slots.module, batch, outputs, generator=self.generator
                )

        with restored(
            teacher_slots, student_slots, device=self.device, trained=[], generator=self.generator
        ) as fault:
            with self._autocast():
                path = Path(
                    student,
                    self.update,
                    problem=self.problem,
                    outer_batch=outer_batch,
                    inner_batches=inner_batches,
                    teach=first_signal,
                    mode=self.mode,
                )
                path.take_steps()
            checks.refuse_not_finite(FIRST_NOT_FINITE, path.inner_loss)
            scalars = {"inner_loss": path.inner_loss}
            scalars |= path.commit()
            for layout in self.distributed:
                layout.agree_on_buffers()
            report = Report(self.steps_done, scalars, fault)
            self.steps_done += 1
            return report

    def read_outer(self, batch: Batch, name: str) -> tuple[Inputs, Batch]:
        if overrides(self.problem, "outer_batch"):
            batch = self.problem.outer_batch(batch)
        else:
            batch = labeled_pair(batch, name)
        return self.problem.outer_input(batch), batch

    def outer_terms(self) -> list[Term]:
        def outer_loss(network: Any, inputs: Inputs, batch: Batch) -> OuterLoss:
            outputs = checks.logits(returned_by(network, inputs, "student"), "student")
            return self.problem.outer_loss(outputs, batch)

        return [outer_loss]

    def read_input(self, batch: Batch) -> Inputs:
        if overrides(self.problem, "outer_input") and not isinstance(batch, Tensor):
            return self.problem.outer_input(batch)
        return super().read_input(batch)

    # ---------------------------------------------------------------------------------------- state

    @property
    def optimizers(self) -> dict[str, Any]:
        optimizers = {"inner_optimizer": self.inner_optimizer}
        if self.outer_optimizer is not None:
            optimizers["outer_optimizer"] = self.outer_optimizer
        return optimizers

    @property
    def owners(self) -> dict[str, object]:
        owners: dict[str, object] = {"problem": self.problem}
        for number, loss in enumerate(self.teacher_losses or ()):
            owners[f"teacher_losses[{number}]"] = loss
        return owners

    def _choices(self) -> str:
        return f"mode {mode_words(self.mode)}, problem {kind_of(self.problem)}"

    def settings(self) -> dict[str, Any]:
        names = (
            "mode",
            "lookahead",
            "problem",
            "teacher_losses",
            "feedback_weight",
            "feedback_ratio",
            "feedback_bound",
            *SETTINGS,
        )
        return {name: getattr(self, name) for name in names}

    def live_state(self) -> dict[str, Any]:
        return {
            "mode": self.mode.name,
            "lookahead": self.lookahead,
            # Without a teacher there is an entry too.
            "teacher": None,
            **super().live_state(),
            "inner": self.update.state_dict(),
            "outer": None if self.outer_optimizer is None else self.outer_optimizer.state_dict(),
            "mode_state": self.mode_state,
            "generator": None if self.generator is None else self.generator.get_state(),
            "verification": self.verification.state_dict(),
            "orders": self.orders.state_dict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        if state["mode"] != self.mode.name:
            raise MetaplError(f"it is of mode {state['mode']!r}, not {self.mode.name!r}")
        if (self.generator is None) != (state["generator"] is None):
            raise MetaplError("one of the two has a generator, and the other has none")
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.update.load_state_dict(state["inner"])
        if self.outer_optimizer is not None:
            load_copy_of_state(self.outer_optimizer, state["outer"], "outer_optimizer")
        self.mode_state = dict(state["mode_state"])
        self.verification.load_state_dict(state["verification"])
        self.orders.load_state_dict(state["orders"])
        # It has the orders of before.
        self._standing = None

    # --------------------------------------------------------------------- finetuning and gradients

    def finetune(
        self,
        outer: Source,
        *,
        steps: int,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Unpack[FinetuneKeywords],
    ) -> FitResult:
        """Train the student, as it is now, on labeled batches alone.

        Meta Pseudo Labels ends with this.

        Args:
            outer: as for :meth:`fit`.
            steps: 1,000 or so in the paper, at a small learning rate.
            optimizer: over the student's parameters; default ``SGD(lr=1e-3)``.
            options: as for :meth:`fit` (``validation``, ``out``, ``resume``, ...); the phase is
                called ``finetune``.

        Source: Meta Pseudo Labels, section 2 (finetuning the student), with its learning rate in
        the recipes.
        """
        if optimizer is None:
            optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3)
        trainer = LossTrainer(
            self.as_given,
            optimizer=optimizer,
            clip_norm=self.clip_norm,
            precision=self.precision,
            accumulate=self.accumulate,
            compile=self.compile is True,
        )
        options.setdefault("phase", "finetune")
        return trainer.fit(outer, steps=steps, **options)

    def hypergradient(
        self,
        outer: Batch,
        inner: Batch,
        mode: Mode | None = None,
        *,
        problem: BilevelProblem | None = None,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        """Return the teacher's gradient through the student's step, by this mode or another.

        No weight or state moves. The student's clip and the micro-batches (``accumulate``) count,
        and the baseline so far does not. The default generators stay as they are, so that every
        call sees the same dropout masks.

        Args:
            outer, inner: as for :meth:`step`.
            mode, problem: default this trainer's own.
            generator: for drawing labels; without it they are the same in every call too.
        """
        self._reshard()
        self.update.follow(self.layout.parameters())
        teacher, student = self.pair
        with replayed(RandomState.now(self.device)), self._autocast():
            return hypergradient(
                teacher,
                student,
                outer=outer,
                inner=inner,
                mode=self.mode if mode is None else mode,
                problem=self.given_problem if problem is None else problem,
                inner_optimizer=self.update,
                generator=generator,
                accumulate=self.accumulate,
                # The trainer's steps are.
                verify=False,
            )


def default_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum 0.9 and weight decay 5e-4, at 0.05."""
    return torch.optim.SGD(
        module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
