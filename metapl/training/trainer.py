"""Teacher and student, trained together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl import checks
from metapl.batch import labeled_pair, micro_batches
from metapl.errors import MetaplError
from metapl.execution.compiled import CompiledPasses, refuse_compiled
from metapl.execution.guards import casts_explained, step_guard
from metapl.execution.local import trainable
from metapl.execution.rng import RandomState, replayed
from metapl.feedback import Estimator, Feedback, estimator
from metapl.feedback.lookahead import Lookahead, Path, inner_batches, plain_inner
from metapl.hypergradient import Hypergradient, hypergradient, look_ahead, prepare, refuse_several
from metapl.problems.base import BilevelProblem, Signal, has_default_losses
from metapl.problems.losses import TeacherLoss, refuse_split_batches
from metapl.problems.losses import teacher_losses as checked_losses
from metapl.training import FitResult, Trainer
from metapl.training.finetuning import finetune
from metapl.training.loss_trainer import LossTrainer
from metapl.training.report import Report, StepReport
from metapl.training.teacher import TeacherLosses, TeacherStep, Weight, teacher_scalars
from metapl.updates import Clipped, held, refuse_not_held, update_of


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
        outer_optimizer: the teacher's: any ``torch.optim`` optimizer over the teacher's parameters. Both default to
            ``SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)``.
        teacher_losses: the teacher's own losses; ``None`` is the problem's choice: for pseudo-labels
            ``CrossEntropy(label_smoothing=0.1)``, and ``UDA()`` where the unlabeled batch has two views; for a problem
            that makes no choice, none. ``()`` is none.
        feedback_weight: λ. At 1 the teacher descends the true gradient of the labeled loss after one student step,
            whose size goes with the student's learning rate. Much more than that is dangerous: teacher and student
            then chase each other's class frequencies and may collapse onto one class (on the digits 10 hurts and 50
            collapses, benchmarks/feedback_size.py). ``StepReport.feedback_ratio`` tells how it compares with the
            teacher's own losses.
        feedback_ratio: instead of a weight: scale the feedback at every step so that its gradient at the teacher's
            outputs has this norm in units of that of the teacher's own losses. The direction within a step is that of
            the mode; its size no longer dies with the learning rate, nor does it explode.
        recompute_teacher: run the teacher's pass on the unlabeled batch without a graph first and build it again at
            the end (same dropout masks and statistics): one teacher forward pass more, one graph less in memory.
        generator: for drawing labels; without it the default one.
        clip_norm: the greatest global norm of either network's gradient; the student's clip is part of its update, so
            the feedback goes through its derivative. None: no clipping.
        accumulate: micro-batches that each batch is taken in, one after another: the same numbers (but for batch
            statistics and dropout masks, which are a micro-batch's own) in about 1/accumulate of the memory, for one
            teacher pass more.
        precision: ``"float32"``, or ``"bfloat16"``: the networks' passes under autocast, weights and losses in float32.
        lookahead: student steps that the feedback looks ahead: :meth:`fit` draws so many unlabelled batches a step,
            lets the student take a step on each, and the teacher one on the feedback about all. For ``forward``,
            ``unrolled`` and ``none``. :meth:`step` takes any :class:`metapl.Lookahead`, whatever this is.
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
        lookahead: int = 1,
    ) -> None:
        checks.no_inference_mode()
        self.mode = estimator(mode)
        self.given_problem, self.problem = problem, prepare(problem, self.mode)
        self.device = checks.networks(teacher, student)
        refuse_compiled(teacher=teacher, student=student)
        self.teacher, self.student = teacher, student
        # Double backward has no compiled form: there the student runs as it is.
        compiled = () if not compile else (teacher,) if self.mode.keep_graph else (teacher, student)
        self.compile, self.compiled = compile, CompiledPasses(*compiled)
        self.inner_optimizer = default_optimizer(student) if inner_optimizer is None else inner_optimizer
        self.inner = update_of(self.inner_optimizer, trainable(student))
        if clip_norm is not None:
            self.inner = Clipped(self.inner, clip_norm)
        if precision not in ("float32", "bfloat16"):
            raise MetaplError(f"precision={precision!r}: expected 'float32' or 'bfloat16'.")
        if accumulate < 1 or (accumulate > 1 and self.mode.keep_graph):
            raise MetaplError(
                f"accumulate={accumulate} with mode {self.mode.name!r}: expected 1 or more, and 1 with 'unrolled', "
                "which keeps the graph of the whole batch (mode 'forward' is as exact)."
            )
        if not isinstance(lookahead, int) or lookahead < 1:
            raise MetaplError(f"lookahead={lookahead!r}: expected a number of student steps, 1 or more.")
        refuse_several(self.mode, lookahead)
        if lookahead > 1 and feedback_ratio is not None:
            raise MetaplError(
                f"feedback_ratio is measured on one inner batch and does not go with lookahead={lookahead}; use "
                "feedback_weight."
            )
        self.clip_norm, self.precision, self.accumulate = clip_norm, precision, accumulate
        self.lookahead = lookahead
        self.outer_optimizer = default_optimizer(teacher) if outer_optimizer is None else outer_optimizer
        _check_outer(self.outer_optimizer, teacher)
        self.teacher_losses = None if teacher_losses is None else checked_losses(teacher_losses)
        refuse_split_batches(self.teacher_losses or (), accumulate)
        self._alone = _TeacherAlone(self)
        self.feedback_weight, self.feedback_ratio = feedback_weight, feedback_ratio
        if feedback_ratio is not None:
            self._check_ratio(feedback_ratio)
        self.recompute_teacher = recompute_teacher
        self.generator = generator
        self.mode_state = self.mode.init()
        self.steps_done = 0
        self._seen_a_signal = False

    def step(self, labeled: Any, unlabeled: Any = None) -> StepReport:
        """One step of Algorithm 1 on a labeled batch (x_l, y_l) and an unlabeled one, x_u or (weak, strong).

        In the place of a tensor of inputs may be a dict or a tuple of tensors; a dict that also holds the labels, under
        ``labels``, is a labeled batch. The networks get it as one argument; see :class:`metapl.models.Logits` for
        those that take several. A :class:`metapl.Lookahead` of K unlabeled batches lets the student take K steps, and
        the teacher one on the feedback about all of them; its own losses read the last.
        """
        labeled, unlabeled = labeled_pair(labeled), plain_inner(unlabeled)
        with self._guard(labeled, unlabeled) as fault:
            with self._autocast(), self.compiled():
                path, lessons = self._look_ahead(labeled, unlabeled)  # lines 2-3: ŷ_u ~ T(x_u), θ_S′ = U(θ_S, g_u)
                with casts_explained(self.mode.name):
                    feedback, mode_state = self.mode.feedback(path, self.mode_state)  # line 4: h
                objectives = self._teacher_backward(lessons, feedback, labeled)  # lines 5-7: −Σ h·signal, own losses
            self._alone.clip()
            path.commit()  # line 3; where the student's optimizer fails, the teacher has not moved
            self.outer_optimizer.step()  # line 8
            self.mode_state = mode_state
            self.steps_done += 1
            h = tuple(one.h.detach() for one in feedback)
            scalars = {"inner_loss": path.inner_loss, **path.known_outer_loss()}
            return StepReport(
                self.steps_done - 1,
                scalars | teacher_scalars(objectives, self.accumulate),
                fault,
                feedback=h if isinstance(unlabeled, Lookahead) else h[0],
                signal=path.steps[-1].signal,
                student_outputs=path.steps[-1].outputs,
                problem=self.problem,
            )

    def _look_ahead(self, labeled: Any, unlabeled: Any) -> tuple[Path, list[TeacherStep]]:
        """The student's steps, and the teacher's passes that they learned from, one a micro-batch."""
        lessons: list[TeacherStep] = []

        def teach(batch: Any, outputs: Tensor) -> Signal:
            recomputes = self.recompute_teacher or self.accumulate > 1  # all graphs together are what does not fit
            lessons.append(TeacherStep(self.teacher, self.problem, batch, outputs, self.generator, recomputes))
            return lessons[-1].signal()

        self.inner.follow(trainable(self.student))
        path = look_ahead(
            self.student,
            self.inner,
            self.problem,
            self.mode,
            labeled=labeled,
            unlabeled=unlabeled,
            teach=teach,
            parts=self.accumulate,
            thorough=not self._seen_a_signal,
        )
        self._seen_a_signal = True
        return path, lessons

    def _teacher_backward(
        self, lessons: Sequence[TeacherStep], feedback: Sequence[Feedback], labeled: Any
    ) -> list[TeacherLosses]:
        """The gradient of the teacher's objective, micro-batch by micro-batch; its own losses read the last batch."""
        parts = self.accumulate
        for found in feedback:
            found.check_finite()
        pieces = [piece for found in feedback for piece in found.chunks(parts)]
        labels = micro_batches(labeled, parts, "labeled")
        objectives = []
        for i, (lesson, h) in enumerate(zip(lessons, pieces, strict=True)):
            last = i >= len(lessons) - parts
            losses = self._alone.losses_for(lesson.unlabeled) if last else ()
            objective = lesson.loss(h, self._weight, losses, labels[i % parts], self.steps_done)
            checks.learns(objective.own, "teacher")
            loss = objective.feedback + objective.own / parts
            if loss.requires_grad:
                loss.backward()
            objectives.append(objective.without_graph())
        return objectives

    def teacher_step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step of the teacher alone, while the student waits: lines 6-8 of Algorithm 1, on the batches of a step.

        Its losses are given no signal: those that want the outputs on the weak view make them, as :class:`metapl.UDA`
        does. ``steps_done`` counts on.

        Cost: no pass of the student, whose weights, statistics and optimizer stay as they are. The default generators
        advance by the teacher's dropout masks alone, ``generator`` not at all.

        Returns: a report with ``teacher_loss`` and a ``teacher_<name>`` per term.

        Raises: :class:`metapl.MetaplError` before anything moves: the batches are wrong, or there are no losses.
        """
        if not self._has_losses:
            raise MetaplError("teacher_losses=() leaves the teacher nothing to learn from alone; expected wait=0.")
        self._alone.steps_done = self.steps_done
        report = self._alone.step(labeled, unlabeled)
        self.steps_done += 1
        return report

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
        if not self._has_losses:
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
    def _has_losses(self) -> bool:
        given = self.teacher_losses
        return has_default_losses(self.problem) if given is None else bool(given)

    @property
    def labeller(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    @property
    def labeller_classifies(self) -> bool:
        """As the problem says."""
        return self.problem.teacher_classifies

    @property
    def schedulable(self) -> list[torch.optim.Optimizer]:
        """The student's and the teacher's optimizer; a TorchOpt transform brings its own schedule."""
        return [o for o in (self.inner_optimizer, self.outer_optimizer) if isinstance(o, torch.optim.Optimizer)]

    def live_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the copies."""
        return {
            "teacher": self.teacher.state_dict(),
            "student": self.student.state_dict(),
            "inner": self.inner.state_dict(),
            "outer": self.outer_optimizer.state_dict(),
            "mode": self.mode.name,
            "lookahead": self.lookahead,
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
        if state.get("lookahead", 1) != self.lookahead:
            raise MetaplError(
                f"the state is of a trainer with lookahead={state.get('lookahead', 1)}, this one has "
                f"lookahead={self.lookahead}; build the trainer as it was built before."
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
        """Train the student, as it is now, on labeled batches alone: what Meta Pseudo Labels ends with.

        Args:
            labeled: as for :meth:`fit`.
            steps: 1,000 or so in the paper, at a small learning rate.
            optimizer: over the student's parameters; default ``SGD(lr=1e-3)``.
            options: as for :meth:`fit` (``validation``, ``out``, ``resume``, ...); the phase is called ``finetune``.

        Source: Meta Pseudo Labels, section 2 (finetuning the student), with its learning rate in the recipes.
        """
        own = {name: getattr(self, name) for name in ("precision", "accumulate", "compile", "clip_norm")}
        return finetune(self.student, labeled, steps=steps, optimizer=optimizer, **own, **options)

    def hypergradient(
        self,
        labeled: Any,
        unlabeled: Any,
        mode: str | Estimator | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        """The teacher's gradient through the student's step as it stands, by this mode or another; nothing moves.

        The student's clip counts, and the baseline so far does not. The default generators stay as they are, so that
        every call sees the same dropout masks.

        Args:
            labeled, unlabeled: as for :meth:`step`.
            mode: default this trainer's own.
            generator: for drawing labels; without it they are the same in every call too.
        """
        estimate = self.mode if mode is None else estimator(mode)
        self.inner.follow(trainable(self.student))
        with replayed(RandomState.now(self.device)), self._autocast():
            return hypergradient(
                self.teacher,
                self.student,
                labeled=labeled,
                unlabeled=unlabeled,
                mode=estimate,
                problem=prepare(self.given_problem, estimate),
                inner_optimizer=self.inner,
                generator=generator,
            )

    def exact_cosine(self, labeled: Any, unlabeled: Any) -> float | None:
        """The cosine between this mode's teacher gradient and the exact one of soft labels, on one batch; nothing
        moves. None where there is no feedback, or the problem has no exact form."""
        problem = self.problem.exact()
        if self.mode.name == "none" or problem is None:
            return None
        own = self.hypergradient(labeled, unlabeled)
        with replayed(RandomState.now(self.device)), self._autocast():
            exact = hypergradient(
                self.teacher,
                self.student,
                labeled=labeled,
                unlabeled=unlabeled,
                problem=problem,
                inner_optimizer=self.inner,
            )
        a, b = (torch.cat([g.flatten().double() for g in found.grads.values()]) for found in (own, exact))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    @contextmanager
    def _guard(self, labeled: Any, unlabeled: Any) -> Iterator[checks.Fault]:
        """Check the batches; where the step is refused or fails, everything is left as it was."""
        networks = self.teacher, self.student
        with step_guard(
            *networks, optimizer=self.outer_optimizer, device=self.device, generator=self.generator
        ) as fault:
            checks.batches(labeled, inner_batches(unlabeled), self.device)
            refuse_not_held("outer_optimizer", self.outer_optimizer, trainable(self.teacher), "teacher")
            if self.feedback_ratio is not None and len(inner_batches(unlabeled)) > 1:
                raise MetaplError(
                    "feedback_ratio is measured on one inner batch, and a Lookahead of "
                    f"{len(inner_batches(unlabeled))} was given; use feedback_weight."
                )
            yield fault


class _TeacherAlone(LossTrainer):
    """The teacher on its own losses, which may be the problem's choice for a batch."""

    role = "teacher"
    total = "teacher_loss"
    prefix = "teacher"

    def __init__(self, trainer: BilevelTrainer) -> None:
        super().__init__(
            trainer.teacher,
            optimizer=trainer.outer_optimizer,
            clip_norm=trainer.clip_norm,
            precision=trainer.precision,
            accumulate=trainer.accumulate,
        )
        self.given, self.problem, self.compiled = trainer.teacher_losses, trainer.problem, trainer.compiled

    def losses_for(self, unlabeled: Any) -> tuple[TeacherLoss, ...]:
        return self.problem.default_teacher_losses(unlabeled) if self.given is None else self.given


def default_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4, at 0.05."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _check_outer(optimizer: Any, teacher: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MetaplError(
            f"outer_optimizer is {checks.described(optimizer)}; expected a torch.optim optimizer over "
            "teacher.parameters()."
        )
    refuse_not_held("outer_optimizer", optimizer, trainable(teacher), "teacher")
    own = {id(p) for p in teacher.parameters()}
    if any(id(p) not in own for p in held(optimizer)):
        raise MetaplError(
            "outer_optimizer holds tensors that are not the teacher's; build it from teacher.parameters()."
        )
