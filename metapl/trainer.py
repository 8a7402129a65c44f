"""Teacher and student, trained together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl import checks
from metapl.accumulate import micro_batches, split, union
from metapl.batch import labeled_pair, plain
from metapl.compiled import CompiledPasses, refuse_compiled
from metapl.deferred import Movable, kept_where, undone_where
from metapl.errors import MetaplError
from metapl.execution.buffers import Buffers, nothing_moved
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import Estimator, estimator
from metapl.guards import casts_explained, one_at_a_time, restored_on_failure
from metapl.hypergradient import check_kind, hypergradient, prepare, refuse_other_fields
from metapl.inner import InnerStep, trainable
from metapl.losses import TeacherLoss, refuse_split_batches
from metapl.losses import teacher_losses as checked_losses
from metapl.optimizers import Clipped, held, refuse_not_held
from metapl.optimizers import inner_optimizer as functional
from metapl.problem import BilevelProblem, Signal
from metapl.problems import PseudoLabels
from metapl.teacher import TeacherStep, Weight, means, own_losses, teacher_scalars
from metapl.training import FitResult, Trainer
from metapl.training.finetuning import finetune
from metapl.training.report import StepReport, TeacherReport


class BilevelTrainer(Trainer):
    r"""Meta Pseudo Labels, or any other bilevel label problem: Algorithm 1 with a choice of gradient.

    .. math:: \theta_S' = U(\theta_S, \nabla_{\theta_S} \ell(S(x_u), \mathrm{signal})), \qquad
              \theta_T \leftarrow \theta_T - \eta_T \nabla_{\theta_T}
              \Big[ -\lambda \sum \mathrm{sg}(h)\cdot\mathrm{signal} + \sum_k L_k(\theta_T) \Big]

    Args:
        teacher, student: modules on one device, with weights of their own.
        mode: one of :data:`metapl.MODES`, or an estimator value such as ``metapl.feedback.Reinforce(baseline=0.99)``.
        problem: default :class:`metapl.PseudoLabels`.
        inner_optimizer: the student's: ``torch.optim`` SGD, Adam or AdamW, or a TorchOpt transform.
        outer_optimizer: the teacher's: any ``torch.optim`` optimiser over the teacher's parameters. Both default to
            ``SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)``.
        teacher_losses: the teacher's own losses; ``None`` is the problem's choice: for pseudo-labels
            ``CrossEntropy(label_smoothing=0.1)``, and ``UDA()`` where the unlabelled batch has two views; for a problem
            that makes no choice, none. ``()`` is none.
        feedback_weight: λ. At 1 the teacher descends the true gradient of the labelled loss after one student step,
            whose size goes with the student's learning rate. Much more than that is dangerous: teacher and student
            then chase each other's class frequencies and may collapse onto one class (on the digits 10 hurts and 50
            collapses, benchmarks/feedback_size.py). ``StepReport.feedback_ratio`` tells how it compares with the
            teacher's own losses.
        feedback_ratio: instead of a weight: scale the feedback at every step so that its gradient at the teacher's
            outputs has this norm in units of that of the teacher's own losses. The direction within a step is that of
            the mode; its size no longer dies with the learning rate, nor does it explode.
        recompute_teacher: run the teacher's pass on the unlabelled batch without a graph first and build it again at
            the end (same dropout masks and statistics): one teacher forward pass more, one graph less in memory.
        generator: for drawing labels; without it the default one.
        clip_norm: the greatest global norm of either network's gradient; the student's clip is part of its update, so
            the feedback goes through its derivative. None: no clipping.
        accumulate: micro-batches that each batch is taken in, one after another: the same numbers (but for batch
            statistics and dropout masks, which are a micro-batch's own) in about 1/accumulate of the memory, for one
            teacher pass more.
        precision: ``"float32"``, or ``"bfloat16"``: the networks' passes under autocast, weights and losses in float32.
        compile: run the networks' passes, forward and backward, through ``torch.compile``: the same numbers to
            rounding, dropout masks included (the first passes that draw are compared with plain ones). Plain are the
            forward-mode pass of ``forward`` and ``reinforce_per_example``, all of the student's under ``unrolled``, and
            what is no part of a step, such as validation. The networks stay plain modules. Each kind of pass is
            compiled when it first meets a shape of batch, about a minute in all for WRN-28-2 on a CPU; so let batches
            have one size.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="reinforce")
    >>> report = trainer.step(labeled=(torch.randn(5, 4), torch.arange(5) % 3), unlabeled=torch.randn(6, 4))
    >>> report.feedback.shape, report.step
    (torch.Size([]), 0)

    Raises: :class:`metapl.MetaplError` before anything moves.
    Source: Meta Pseudo Labels, Algorithm 1.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        mode: str | Estimator = "reinforce",
        *,
        problem: BilevelProblem | None = None,
        inner_optimizer: Any = None,
        outer_optimizer: torch.optim.Optimizer | None = None,
        teacher_losses: Sequence[TeacherLoss] | None = None,
        feedback_weight: float = 1.0,
        feedback_ratio: float | None = None,
        recompute_teacher: bool = False,
        generator: torch.Generator | None = None,
        clip_norm: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        accumulate: int = 1,
        compile: bool = False,
    ) -> None:
        checks.no_inference_mode()
        self.mode = estimator(mode)
        self.problem = prepare(problem, self.mode)
        self.device = checks.networks(teacher, student)
        refuse_compiled(teacher=teacher, student=student)
        self.teacher, self.student = teacher, student
        # Double backward has no compiled form: there the student runs as it is.
        compiled = () if not compile else (teacher,) if self.mode.keep_graph else (teacher, student)
        self.compile, self.compiled = compile, CompiledPasses(*compiled)
        self.inner_optimizer = default_optimizer(student) if inner_optimizer is None else inner_optimizer
        self.inner = functional(self.inner_optimizer, trainable(student))
        if clip_norm is not None:
            self.inner = Clipped(self.inner, clip_norm)
        if precision not in ("float32", "bfloat16"):
            raise MetaplError(f"precision={precision!r}: expected 'float32' or 'bfloat16'.")
        if accumulate < 1 or (accumulate > 1 and self.mode.keep_graph):
            raise MetaplError(
                f"accumulate={accumulate} with mode {self.mode.name!r}: expected 1 or more, and 1 with 'unrolled', "
                "which keeps the graph of the whole batch (mode 'forward' is as exact)."
            )
        self.clip_norm, self.precision, self.accumulate = clip_norm, precision, accumulate
        self.outer_optimizer = default_optimizer(teacher) if outer_optimizer is None else outer_optimizer
        _check_outer(self.outer_optimizer, teacher)
        self.teacher_losses = None if teacher_losses is None else checked_losses(teacher_losses)
        refuse_split_batches(self.teacher_losses or (), accumulate)
        self.feedback_weight, self.feedback_ratio = feedback_weight, feedback_ratio
        if feedback_ratio is not None:
            self._check_ratio(feedback_ratio)
        self.recompute_teacher = recompute_teacher
        self.generator = generator
        self.mode_state = self.mode.init()
        self.steps_done = 0
        self._first_signal = True

    def step(self, labeled: Any, unlabeled: Any = None) -> StepReport:
        """One step of Algorithm 1 on a labelled batch (x_l, y_l) and an unlabelled one, x_u or (weak, strong).

        In the place of a tensor of inputs may be a dict or a tuple of tensors; a dict that also holds the labels, under
        ``labels``, is a labelled batch. The networks get it as one argument; see :class:`metapl.models.Logits` for
        those that take several.
        """
        labeled, unlabeled = labeled_pair(labeled), plain(unlabeled)
        fault = checks.Fault()
        with self._nothing_moves(fault, labeled, unlabeled) as buffers:
            with self._autocast(), self.compiled():
                self.inner.follow(trainable(self.student))
                students, teachers = [], []
                micro = list(self._micro_batches(labeled, unlabeled))
                for x_l, x_u in micro:
                    student = self._inner_step(x_l, x_u)
                    teacher = TeacherStep(
                        self.teacher, self.problem, x_u, student.outputs, self.generator, self._recomputes
                    )
                    signal = teacher.signal()  # line 2: ŷ_u ~ P(·|x_u; θ_T), or the soft label
                    self._check_signal(signal, student)
                    student.learn(signal)  # line 3: g_u
                    checks.dense_gradients(student.gradient)
                    students.append(student)
                    teachers.append(teacher)
                whole = union(students)  # line 3: θ_S′ = U(θ_S, g_u)
                with casts_explained(self.mode.name):
                    (feedback,), mode_state = self.mode.feedback([whole], self.mode_state)  # line 4: h
                checks.finite_feedback(feedback.h)
                parts = []
                for teacher, h, (x_l, x_u) in zip(teachers, split(feedback, len(micro)), micro, strict=True):
                    part = teacher.loss(h, self._weight, self._losses_for(x_u), x_l, self.steps_done)
                    checks.learns(part.own, "teacher")
                    loss = part.feedback + part.own / len(micro)
                    if loss.requires_grad:
                        loss.backward()  # lines 5-7
                    parts.append(part.without_graph())
            self._clip_teacher()
            with undone_where(fault.flag, self._movable(buffers)):
                whole.commit()  # line 3; where the student's optimizer fails, the teacher has not moved
                self.outer_optimizer.step()  # line 8
            self.mode_state = kept_where(fault.flag, self.mode_state, mode_state)
            self._end_step()
            scalars = {"inner_loss": whole.inner_loss, **whole.known_outer_loss(), **teacher_scalars(parts)}
            return StepReport(self.steps_done - 1, feedback.h.detach(), scalars, whole.signal, whole.outputs, fault)

    def _inner_step(self, labeled: Any, unlabeled: Any) -> InnerStep:
        step = InnerStep(
            self.student,
            self.inner,
            self.problem,
            labeled=labeled,
            unlabeled=unlabeled,
            keep_graph=self.mode.keep_graph,
        )
        checks.finite_student(step.outputs)
        return step

    def _check_signal(self, signal: Signal, step: InnerStep) -> None:
        check_kind(signal.sampled, self.mode)
        if self._first_signal and self.mode.name != "none":
            refuse_other_fields(self.problem, step, signal)
        self._first_signal = False

    def teacher_step(self, labeled: Any, unlabeled: Any = None) -> TeacherReport:
        """One step of the teacher alone, while the student waits: lines 6-8 of Algorithm 1, on the batches of a step.

        Its losses are given no signal: those that want the outputs on the weak view make them, as :class:`metapl.UDA`
        does. ``steps_done`` counts on.

        Cost: no pass of the student, whose weights, statistics and optimiser stay as they are. The default generators
        advance by the teacher's dropout masks alone, ``generator`` not at all.

        Raises: :class:`metapl.MetaplError` before anything moves: the batches are wrong, or there are no losses.
        """
        if self._has_no_losses:
            raise MetaplError("teacher_losses=() leaves the teacher nothing to learn from alone; expected wait=0.")
        labeled, unlabeled = labeled_pair(labeled), plain(unlabeled)
        fault = checks.Fault()
        with self._nothing_moves(fault, labeled, unlabeled) as buffers:
            with self._autocast(), self.compiled():
                scalars = [self._own_backward(x_l, x_u) for x_l, x_u in self._micro_batches(labeled, unlabeled)]
            self._clip_teacher()
            with undone_where(fault.flag, self._movable(buffers)):
                self.outer_optimizer.step()  # line 8
            self._end_step()
            return TeacherReport(self.steps_done - 1, means(scalars), fault)

    def _own_backward(self, labeled: Any, unlabeled: Any) -> dict[str, Tensor]:
        """The teacher's own losses on a micro-batch, whose share of the gradient is added to what is there."""
        own = own_losses(
            self.teacher,
            self._losses_for(unlabeled),
            labeled=labeled,
            unlabeled=unlabeled,
            signal=Signal(torch.empty(0, device=self.device)),
            step=self.steps_done,
        )
        loss = torch.stack(list(own.values())).sum()
        checks.learns(loss, "teacher")
        if loss.requires_grad:  # UDA alone is a plain 0 before its start
            (loss / self.accumulate).backward()  # lines 6-7
        return {name: value.detach() for name, value in (*own.items(), ("teacher_loss", loss))}

    def _clip_teacher(self) -> None:
        checks.sparse_gradients(self.outer_optimizer, trainable(self.teacher))
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.teacher.parameters(), self.clip_norm)

    def _end_step(self) -> None:
        torch.clear_autocast_cache()  # it may hold casts of weights that have just moved
        self.steps_done += 1

    def _micro_batches(self, labeled: Any, unlabeled: Any) -> Iterator[tuple[Any, Any]]:
        return zip(
            micro_batches(labeled, self.accumulate, "labeled"),
            micro_batches(unlabeled, self.accumulate, "unlabeled"),
            strict=True,
        )

    @property
    def _weight(self) -> Weight:
        if self.feedback_ratio is None:
            return Weight(self.feedback_weight)
        return Weight(self.feedback_ratio, relative=True)

    def _check_ratio(self, ratio: float) -> None:
        if not ratio >= 0:
            raise MetaplError(f"feedback_ratio={ratio}: expected a number of 0 or more, or None.")
        if self.feedback_weight != 1.0:
            raise MetaplError("feedback_weight and feedback_ratio were both given; expected one of them.")
        if self._has_no_losses:
            raise MetaplError(
                "feedback_ratio needs teacher losses to measure by, and there are none: teacher_losses=(), or the "
                "default of a problem that has no default_teacher_losses."
            )
        if self.accumulate > 1:
            raise MetaplError(
                f"feedback_ratio is measured on a whole batch and does not go with accumulate={self.accumulate}; "
                "use feedback_weight."
            )

    @property
    def _has_no_losses(self) -> bool:
        return self.teacher_losses == () or (
            self.teacher_losses is None and not hasattr(self.problem, "default_teacher_losses")
        )

    @property
    def _recomputes(self) -> bool:
        # The graphs of all micro-batches together are what does not fit.
        return self.recompute_teacher or self.accumulate > 1

    @property
    def labeller(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    @property
    def labeller_classifies(self) -> bool:
        """As the problem says."""
        return bool(getattr(self.problem, "teacher_classifies", False))

    @property
    def schedulable(self) -> list[torch.optim.Optimizer]:
        """The student's and the teacher's optimiser; a TorchOpt transform brings its own schedule."""
        return [o for o in (self.inner_optimizer, self.outer_optimizer) if isinstance(o, torch.optim.Optimizer)]

    def live_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the copies."""
        return {
            "teacher": self.teacher.state_dict(),
            "student": self.student.state_dict(),
            "inner": self.inner.state_dict(),
            "outer": self.outer_optimizer.state_dict(),
            "mode": self.mode.name,
            "mode_state": dict(self.mode_state),
            "steps_done": self.steps_done,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, in a trainer built alike."""
        if state["mode"] != self.mode.name:
            raise MetaplError(
                f"the state is of a trainer with mode {state['mode']!r}, this one has {self.mode.name!r}; "
                "build the trainer as it was built before."
            )
        self.teacher.load_state_dict(state["teacher"])
        self.student.load_state_dict(state["student"])
        # An optimizer goes on in the tensors that it is given, and these are the caller's.
        self.inner.load_state_dict(copy.deepcopy(state["inner"]))
        self.outer_optimizer.load_state_dict(copy.deepcopy(state["outer"]))
        self.mode_state = dict(state["mode_state"])
        self.steps_done = state["steps_done"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def finetune(
        self, labeled: Any, *, steps: int, optimizer: torch.optim.Optimizer | None = None, **options: Any
    ) -> FitResult:
        """Train the student, as it is now, on labelled batches alone: what Meta Pseudo Labels ends with.

        Args:
            labeled: as for :meth:`fit`.
            steps: 1,000 or so in the paper, at a small learning rate.
            optimizer: over the student's parameters; default ``SGD(lr=1e-3)``.
            options: as for :meth:`fit` (``validation``, ``out``, ``resume``, ...); the phase is called ``finetune``.

        Source: Meta Pseudo Labels, section 2 (finetuning the student), with its learning rate in the recipes.
        """
        own = {name: getattr(self, name) for name in ("precision", "accumulate", "compile", "clip_norm")}
        return finetune(self.student, labeled, steps=steps, optimizer=optimizer, **own, **options)

    def exact_cosine(self, labeled: Any, unlabeled: Any) -> float | None:
        """The cosine between this mode's teacher gradient and the exact one of soft labels, on one batch; nothing
        moves, generators included; ``clip_norm`` and the baseline so far are left out of both. None where there is no
        feedback, or the problem's signal is not pseudo-labels."""
        if self.mode.name == "none" or not isinstance(self.problem, PseudoLabels):
            return None
        state = self.inner.read_state() if isinstance(self.inner_optimizer, tuple) else None

        def gradient(mode: str | Estimator, problem: BilevelProblem) -> Tensor:
            with replayed(RandomState.now(self.device)), self._autocast():
                found = hypergradient(
                    self.teacher,
                    self.student,
                    labeled=labeled,
                    unlabeled=unlabeled,
                    mode=mode,
                    problem=problem,
                    inner_optimizer=self.inner_optimizer,
                    inner_state=state,
                )
            return torch.cat([g.flatten().double() for g in found.grads.values()])

        own = gradient(self.mode, self.problem)
        exact = gradient("forward", replace(self.problem, kind="soft"))
        return float(torch.nn.functional.cosine_similarity(own, exact, dim=0))

    @contextmanager
    def _nothing_moves(self, fault: checks.Fault, labeled: Any, unlabeled: Any) -> Iterator[list[Buffers]]:
        """Check the batches; whatever is refused or fails, everything is left as it was."""
        checks.no_inference_mode()
        with (
            one_at_a_time,
            checks.deferred_to(fault),
            restored_on_failure(self.generator),
            nothing_moved(self.teacher, self.student, random=RandomState.now(self.device)) as buffers,
        ):
            checks.batches(labeled, unlabeled, self.device)
            refuse_not_held("outer_optimizer", self.outer_optimizer, trainable(self.teacher), "teacher")
            self.outer_optimizer.zero_grad(set_to_none=True)
            try:
                with torch.enable_grad():
                    yield buffers
            finally:
                self.outer_optimizer.zero_grad(set_to_none=True)

    def _movable(self, buffers: list[Buffers]) -> Movable:
        return Movable((self.teacher, self.student), buffers, self.schedulable, self.inner)

    def _losses_for(self, unlabeled: Any) -> tuple[TeacherLoss, ...]:
        if self.teacher_losses is not None:
            return self.teacher_losses
        default = getattr(self.problem, "default_teacher_losses", None)
        return () if default is None else default(unlabeled)


def default_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4, at 0.05."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _check_outer(optimizer: Any, teacher: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MetaplError(
            f"outer_optimizer is {checks.described(optimizer)}; expected a torch.optim optimiser over "
            "teacher.parameters()."
        )
    refuse_not_held("outer_optimizer", optimizer, trainable(teacher), "teacher")
    own = {id(p) for p in teacher.parameters()}
    if any(id(p) not in own for p in held(optimizer)):
        raise MetaplError(
            "outer_optimizer holds tensors that are not the teacher's; build it from teacher.parameters()."
        )
