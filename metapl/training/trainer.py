"""Teacher and student, trained together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, either
from metapl.execution import checks
from metapl.execution.batch import labeled_pair, micro_batches
from metapl.execution.compiled import CompiledPasses, refuse_compiled
from metapl.execution.kernels import NotByThisMode
from metapl.execution.layout import Layout, layouts
from metapl.execution.local import NOTHING
from metapl.execution.rng import RandomState, replayed
from metapl.execution.shards import as_held, load_whole, whole
from metapl.feedback import Estimator, Feedback, Mode, estimator
from metapl.feedback.compatible import both_batches, check_kind, check_mode, check_teacher, name_others, prepare
from metapl.feedback.hypergradient import Hypergradient, hypergradient
from metapl.feedback.inner_step import read_batch
from metapl.feedback.lookahead import Lookahead, inner_batches
from metapl.feedback.path import Path, take_steps
from metapl.feedback.teacher import Means, Objective, TeacherPass, teacher_scalars, updated
from metapl.functional.build import functional
from metapl.functional.compiled import CompiledStep
from metapl.functional.state import State
from metapl.functional.step import Step
from metapl.metrics.metric import Term
from metapl.problems.base import BilevelProblem, Signal, has_own
from metapl.problems.losses import TeacherLoss, check_losses, refuse_ignored_labels, refuse_split_batches, starts
from metapl.runs.fields import AboveZero, MicroBatches, Range, check_arguments
from metapl.runs.fingerprints import built_with, settings_of
from metapl.training import FitResult, Trainer
from metapl.training.contract import Report, StepReport
from metapl.training.guard import StepGuard, check_options, check_outer, has_losses
from metapl.training.loss_trainer import SETTINGS, LossTrainer, finetune
from metapl.training.options import FinetuneKeywords
from metapl.training.states import check_state, names_of
from metapl.updates import Clipped, update_of

# What parts of a trainer are made of; the other options are read at every step.
_BUILT_WITH = frozenset(
    ("teacher", "student", "inner_optimizer", "outer_optimizer", "accumulate", "clip_norm", "compile", "mode",
     "precision", "teacher_losses")
)  # fmt: skip


class BilevelTrainer(Trainer):
    r"""Meta Pseudo Labels, or any other bilevel label problem: Algorithm 1 with a choice of gradient.

    .. math:: \theta_S' = U(\theta_S, \nabla_{\theta_S} \ell(S(x_u), \mathrm{signal})), \qquad
              \theta_T \leftarrow \theta_T - \eta_T \nabla_{\theta_T}
              \Big[ -\lambda \sum \mathrm{sg}(h)\cdot\mathrm{signal} + \sum_k L_k(\theta_T) \Big]

    Args:
        teacher, student: modules on one device, with weights of their own. In several processes, both in
            ``DistributedDataParallel`` or sharded by ``fully_shard`` (docs/scale.md): every rank then gives its equal
            share of each batch, and the report's scalars are means over the ranks. No teacher, None, for a problem
            that has none, such as :class:`metapl.problems.LearningToReweight`; it then takes no teacher's options.
        mode: one of :data:`metapl.MODES`, or an estimator value such as ``metapl.feedback.Reinforce(baseline=0.99)``.
            Take ``forward``; ``reinforce`` is the paper's Algorithm 1 and stays the trainer's default.
        problem: default :class:`metapl.PseudoLabels`.
        inner_optimizer: the student's: ``torch.optim`` SGD, Adam or AdamW, or a TorchOpt transform.
        outer_optimizer: the teacher's: any of ``torch.optim`` over the teacher's parameters. Both default to
            ``SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)``. Of optimizers that accelerate or Lightning
            have wrapped, what they wrap is taken (docs/own-loop.md).
        teacher_losses: the teacher's own losses, ``()`` for none; default: those of the problem. For pseudo-labels they
            are ``CrossEntropy(label_smoothing=0.1)``, and ``UDA()`` if the unlabeled batch has two views.
        feedback_weight: λ. At 1 the teacher descends the true gradient of the labeled loss after one student step,
            which is proportional to the student's learning rate. With a much larger one teacher and student follow each
            other's class frequencies and may collapse onto one class (docs/modes.md has measurements).
        feedback_ratio: in the place of the weight: at every step the feedback is scaled so that the norm of its
            gradient at the teacher's outputs is this multiple of the norm of the own losses' gradient, whatever the
            student's learning rate.
        recompute_teacher: run the teacher on the unlabeled batch without a graph first, and once more with one at the
            end (same dropout masks and statistics): one more teacher forward pass, one graph less in memory.
        generator: for drawing labels; default: the default generator of the device.
        clip_norm: the greatest global norm of either network's gradient; None: no clipping. The student's clip is part
            of its update, so the feedback includes its derivative.
        accumulate: micro-batches that each batch is split into: one more teacher forward pass, for about 1/accumulate
            of the memory. The numbers are the same, except for batch statistics, dropout masks and losses that are not
            means over examples (an ``outer_loss`` that returns (sum, weight) is exact, a scalar one warns).
        precision: ``"float32"``, or ``"bfloat16"``: the networks' passes under autocast, weights and losses in float32.
        lookahead: student steps that the feedback looks ahead: :meth:`fit` draws as many unlabeled batches per step,
            the student steps on each, and the teacher takes one step on the feedback on all of them. For ``forward``,
            ``unrolled`` and ``none``. :meth:`step` takes a :class:`metapl.Lookahead` of any length.
        compile: take steps by the pure step (:meth:`functional`), compiled whole: a fifth to a half of the time, after
            10 seconds to some minutes of compiling for each shape of batches. In one process, with SGD, Adam or AdamW
            on both levels and at most 3 steps ahead, without ``accumulate``; ``recompute_teacher`` has no meaning
            there. The first step is compared with an eager one, and what cannot be captured is refused then.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="reinforce")
    >>> report = trainer.step(labeled=(torch.randn(5, 4), torch.arange(5) % 3), unlabeled=torch.randn(6, 4))
    >>> report.feedback.shape, report.step
    (torch.Size([]), 0)

    Raises: :class:`metapl.MetaplError` before anything moves.
    Source: Meta Pseudo Labels, Algorithm 1.
    """

    teacher: nn.Module | None

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        mode: Mode = "reinforce",
        *,
        problem: BilevelProblem | None = None,
        inner_optimizer: Any = None,
        outer_optimizer: torch.optim.Optimizer | None = None,
        teacher_losses: Sequence[TeacherLoss] | None = None,
        feedback_weight: float = 1.0,
        feedback_ratio: Annotated[float, Range(0)] | None = None,
        recompute_teacher: bool = False,
        generator: torch.Generator | None = None,
        clip_norm: AboveZero | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        accumulate: MicroBatches = 1,
        compile: bool = False,
        lookahead: Annotated[int, Range(1, of="a number of student steps")] = 1,
    ) -> None:
        self.mode = estimator(mode)
        check_arguments(BilevelTrainer.__init__, locals())
        checks.no_inference_mode()
        checks.is_generator(generator)
        self.given_problem, self.problem = problem, prepare(problem, self.mode)
        self._given_as = dict(getattr(problem, "__dict__", {}))
        check_teacher(
            teacher,
            self.problem,
            outer_optimizer=outer_optimizer is not None,
            teacher_losses=bool(teacher_losses),
            feedback_weight=feedback_weight != 1.0,
            feedback_ratio=feedback_ratio is not None,
            recompute_teacher=recompute_teacher,
        )
        self.given, self.as_given = (teacher, student), student  # perhaps in DistributedDataParallel
        self.teacher_layout, self.layout, self.device = layouts(teacher, student)
        self.layouts: list[Layout] = [one for one in (self.teacher_layout, self.layout) if one is not None]
        self.ranks, self.student = self.layout.ranks, self.layout.network
        self.teacher = None if self.teacher_layout is None else self.teacher_layout.network
        refuse_compiled(student=self.student, **({} if self.teacher is None else {"teacher": self.teacher}))
        self.teacher_losses = None if teacher_losses is None else check_losses(teacher_losses)
        self.clip_norm, self.precision, self.accumulate, self.lookahead = clip_norm, precision, accumulate, lookahead
        self.feedback_weight, self.feedback_ratio = feedback_weight, feedback_ratio
        self.recompute_teacher, self.generator = recompute_teacher, generator
        self.compile, self.outer_optimizer = compile, outer_optimizer
        check_options(self, lookahead)
        refuse_split_batches(self.teacher_losses or (), accumulate)
        check_mode(self.mode, lookahead, self.problem, self.layout)

        self.compiled, self.compiled_step = CompiledPasses(), CompiledStep(StepReport.of_pure)
        self.inner_optimizer = default_optimizer(self.student) if inner_optimizer is None else inner_optimizer
        update = update_of(self.inner_optimizer, self.layout.parameters())
        self.update = update if clip_norm is None else Clipped(update, clip_norm, self.layout.space)
        self._teacher_trainer: _TeacherTrainer | None = None
        if self.teacher is not None and teacher is not None:
            self.outer_optimizer = self.outer_optimizer or default_optimizer(self.teacher)
            check_outer(self.outer_optimizer, self.teacher)
            self._teacher_trainer = _TeacherTrainer(self, teacher, self.outer_optimizer)
        self.mode_state = self.mode.init()
        self.recent: Means = {}
        self.steps_done = 0
        self.guard = StepGuard(self)
        self._built = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BUILT_WITH and "_built" in vars(self) and value is not getattr(self, name):
            raise MetaplError(
                f"{name} of a BilevelTrainer was assigned, and other parts of the trainer were built with the one that "
                f"it has; expected it as it was given: build a new BilevelTrainer(..., {name}=...), in which networks "
                "and optimizers go on from their states."
            )
        if name == "problem" and "_built" in vars(self):
            self.given_problem, value = value, prepare(value, self.mode)
            self._given_as = dict(getattr(self.given_problem, "__dict__", {}))
        super().__setattr__(name, value)

    def step(self, labeled: Any = None, unlabeled: Any = None, *, outer: Any = None, inner: Any = None) -> StepReport:
        """One step of Algorithm 1 on a labeled batch and an unlabeled one.

        Args:
            labeled: (x_l, y_l). The inputs may also be a dict or a tuple of tensors, which the networks get as one
                argument (:class:`metapl.models.Logits` spreads it over several). A dict that also holds the labels,
                under ``labels``, is such a pair.
            unlabeled: x_u, or (weak, strong), with inputs of the same kinds; or a :class:`metapl.Lookahead` of K such
                batches. The student then takes K steps, and the teacher takes one on the feedback on all of them; its
                own losses read the last batch.
            outer, inner: other names of ``labeled`` and ``unlabeled``.

        Returns: a :class:`metapl.StepReport`.

        Raises: :class:`metapl.MetaplError` before anything moves.
        """
        if outer is not None or inner is not None or labeled is None or unlabeled is None:
            labeled, unlabeled = both_batches(labeled, unlabeled, outer, inner)
        self._follow_problem()
        labeled, ahead = read_batch(self.problem, "outer_batch", labeled), isinstance(unlabeled, Lookahead)
        if self.compile:
            batches = inner_batches(unlabeled, self.lookahead)
            taken: StepReport = self.compiled_step(self, labeled, batches, ahead)
            return taken
        batches, guard, teacher_steps = inner_batches(unlabeled, self.lookahead), self.guard, list[TeacherPass]()

        def teach(batch: Any, outputs: Tensor | None) -> Signal:  # line 2; one call for each micro-batch
            recompute = self.recompute_teacher or self.accumulate > 1  # the graphs of all of them would not fit
            given = self.problem, batch, outputs, self.generator, recompute, self.ranks, guard.slots
            apart = student.module if len(batches) > 1 else None
            step = TeacherPass(guard.asked, *given, student=apart, records=True)
            kind = len(batches), step.signal.sampled, *step.signal.differentiable()
            if kind != guard.kind:
                check_kind(step.signal, self.mode, self.problem, len(batches), outputs)
                guard.kind = kind
            teacher_steps.append(step)
            return step.signal

        with guard.step(self, labeled, batches) as (fault, student):
            first = not student.slots.looked_at
            bfloat16, compiled = self.precision != "float32", self.compiled.forwards
            with self._autocast() if bfloat16 else NOTHING, self.compiled() if compiled else NOTHING:
                path = take_steps(  # lines 2-3: ŷ_u ~ T(x_u), θ_S′ = U(θ_S, g)
                    student,
                    self.update,
                    self.problem,
                    labeled=labeled,
                    batches=batches,
                    teach=teach,
                    parts=self.accumulate,
                    first=first,
                    keep_graph=self.mode.keep_graph,
                    keep_graphs=self.mode.keep_graphs,
                    keep=self.mode.keeping,
                    credits=self.mode.credits,
                )
                try:
                    feedback, mode_state = self.mode.checked_feedback(path, self.mode_state)  # line 4: h
                except (NotByThisMode, RuntimeError) as error:
                    name_others(error, self.mode, path)
                    raise
                given = [
                    h.on_given(step) if step.normalized else h for step, h in zip(path.steps, feedback, strict=True)
                ]
                objectives = self._teacher_backward(teacher_steps, given, labeled)  # lines 5-7: −Σ h·signal + losses
                known = {"outer_loss": path.outer_loss} if "outer_loss" in vars(path) else {}
                h = tuple(found.of_batch(step) for step, found in zip(path.steps, feedback, strict=True))
                path = path.revised(h[-1])
                report = self._report(path, known, h if ahead else h[0], objectives, fault, labeled)
            if self._teacher_trainer is not None and (guard.spread or self.clip_norm is not None):
                self._teacher_trainer.clip()
            elif self.outer_optimizer is not None:
                checks.sparse_gradients(self.outer_optimizer, guard.asked)
            guard.refuse_moves(student)
            with guard.both_or_none(self, first):
                path.commit()  # line 3; before the teacher moves: a failing student optimizer leaves it in place
                if self.outer_optimizer is not None:
                    self.outer_optimizer.step()  # line 8: θ_T′
            for layout in guard.spread:
                layout.agree_on_buffers()
            self.mode_state, self.recent = mode_state, report.recent
            self.steps_done += 1
            return report

    def functional(self) -> tuple[Step, State]:
        """The trainer's step as one pure function, and a copy of its state: :mod:`metapl.functional.step`.

        ``state, report = step(state, outer, inner, noise=None)`` with the networks, losses, rules and options of this
        trainer, whose own tensors do not move. It can be compiled, stacked (``torch.func.vmap``) and differentiated.
        With ``lookahead=K`` (at most 3) ``inner`` is a tuple of K batches. ``noise`` is Gumbel noise of the shape of
        the class probabilities, a tuple of K; None: it is drawn from torch's default generator.

        A parameter that no loss reaches has a gradient of zero there, so that it decays; freeze it. Dropout of L(θ′)
        draws from the default generator too, after the teacher's passes.

        >>> import torch, metapl
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> step, state = metapl.BilevelTrainer(teacher, student, mode="forward").functional()
        >>> for _ in range(3):
        ...     state, report = step(state, (torch.randn(5, 4), torch.arange(5) % 3), torch.randn(6, 4))
        >>> int(state.step), report.feedback.shape
        (3, torch.Size([6, 3]))

        Raises: :class:`metapl.MetaplError` for what has no pure form: ``implicit``, ``accumulate``, several processes,
            more than 3 steps, and outer optimizers other than SGD, Adam and AdamW.
        """
        return functional(self)

    def _follow_problem(self) -> None:
        """Where a copy of the problem that was given is in use, put on it what has been put on that one since."""
        given = self.given_problem
        if given is not None and given is not self.problem:
            now = getattr(given, "__dict__", {})
            for name, value in now.items():
                if name != "kind" and (name not in self._given_as or self._given_as[name] is not value):
                    object.__setattr__(self.problem, name, value)
            self._given_as = dict(now)
        if self._teacher_trainer is not None:
            self._teacher_trainer.problem = self.problem

    def _teacher_backward(
        self, teacher_steps: Sequence[TeacherPass], feedback: Sequence[Feedback], labeled: Any
    ) -> list[Objective]:
        """The gradient of the teacher's objective, micro-batch by micro-batch; its own losses read the last batch."""
        if self._teacher_trainer is None:
            return []
        parts = self.accumulate
        with self.ranks.agreed():
            own = self._teacher_trainer.losses_for(teacher_steps[-1].batch)
            refuse_ignored_labels(own, labeled, parts, self.ranks)
        chunks = [chunk for step_feedback in feedback for chunk in step_feedback.chunks(parts)]
        labeled_parts = micro_batches(labeled, parts, "labeled")
        weights, last, objectives = (self.feedback_weight, self.feedback_ratio), len(teacher_steps) - parts, []
        for i, (step, h) in enumerate(zip(teacher_steps, chunks, strict=True)):
            losses = own if i >= last else ()
            objectives.append(step.backward(h, *weights, losses, labeled_parts[i % parts], self.steps_done, parts))
        return objectives

    def _report(
        self,
        path: Path,
        known: dict[str, Tensor],
        h: Any,
        objectives: Sequence[Objective],
        fault: checks.Fault,
        labeled: Any,
    ) -> StepReport:
        of_teacher = teacher_scalars(objectives, self.accumulate, self.ranks) if objectives else {}
        signal = path.steps[-1].signal
        pushes = [push for *_, push in objectives if push is not None]
        report = StepReport(
            self.steps_done,
            {"inner_loss": path.inner_loss, **known, **of_teacher},
            fault,
            ranks=self.ranks,
            feedback=h,
            # Copies: a signal, or outputs, may be weights, such as a table of labels, which the step moves.
            signal=signal.having({name: t.clone() for name, t in signal.fields().items()}),
            student_outputs=path.steps[-1].outputs.clone(),
            problem=self.problem,
            recent=updated(self.recent, pushes, path.steps[-1], labeled, self.ranks),
        )
        return report if self.ranks.alone else report.exchanged()

    def teacher_step(
        self, labeled: Any = None, unlabeled: Any = None, *, outer: Any = None, inner: Any = None
    ) -> Report:
        """One step of the teacher alone, while the student waits: lines 6-8 of Algorithm 1, on the batches of a step.

        Its losses get no signal: a loss that needs the outputs on the weak view computes them, as :class:`metapl.UDA`
        does. ``steps_done`` increases by one.

        Cost: the teacher's passes only. The student's weights, statistics and optimizer do not change. The default
        generators advance by the teacher's dropout masks only, ``generator`` not at all.

        Returns: a report with ``teacher_loss`` and a ``teacher_<name>`` per term.

        Raises: :class:`metapl.MetaplError` before anything moves: the batches are wrong, or there are no losses.
        """
        labeled, unlabeled = either(labeled=labeled, outer=outer), either(unlabeled=unlabeled, inner=inner)
        if self._teacher_trainer is None:
            return super().teacher_step(labeled, unlabeled)
        if not has_losses(self):
            raise MetaplError(
                "the teacher has no losses of its own (teacher_losses=()), so it cannot train without feedback; "
                "expected teacher losses, or wait=0."
            )
        self._follow_problem()
        self._teacher_trainer.steps_done = self.steps_done
        report = self._teacher_trainer.step(labeled, unlabeled)
        self.steps_done += 1
        return report

    def read_outer(self, batch: Any, name: str) -> tuple[Any, Any]:
        batch = read_batch(self.problem, "outer_batch", batch) if self._reads("batch") else labeled_pair(batch, name)
        return read_batch(self.problem, "outer_input", batch), batch

    def outer_terms(self) -> list[Term]:
        judge = self.problem.outer_loss
        return [lambda network, inputs, batch: judge(checks.logits(network(inputs), "student"), batch)]

    def read_input(self, batch: Any) -> Any:
        own = self._reads("input") and not isinstance(batch, Tensor)
        return read_batch(self.problem, "outer_input", batch) if own else super().read_input(batch)

    def _reads(self, what: Literal["batch", "input"]) -> bool:
        return has_own(self.problem, f"outer_{what}")

    @property
    def late_starts(self) -> list[int]:
        return starts(self.teacher_losses or (), self.steps_done)

    @property
    def teacher_classifies(self) -> bool:
        return self.problem.teacher_classifies

    # --------------------------------------------------------------------------------------------------------- state

    @property
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        known = {"inner": self.inner_optimizer, "outer": self.outer_optimizer}
        return {name: o for name, o in known.items() if isinstance(o, torch.optim.Optimizer)}

    @property
    def schedulable(self) -> list[torch.optim.Optimizer]:
        return [*self._optimizers.values()]

    def settings(self) -> dict[str, Any]:
        names = ["mode", "problem", "teacher_losses", "feedback_weight", "feedback_ratio", *SETTINGS]
        values = settings_of(self, names)
        if self.inner_optimizer not in self.schedulable:  # a transform, whose settings are in its functions
            values["settings"] |= built_with({"inner_optimizer": self.inner_optimizer})
        return values

    def live_state(self) -> dict[str, Any]:
        return {
            "mode": self.mode.name,
            "lookahead": self.lookahead,
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "student": self.student.state_dict(),
            "inner": self.update.state_dict(),
            "outer": None if self.outer_optimizer is None else self.outer_optimizer.state_dict(),
            "optimizers": names_of(self._optimizers),
            "mode_state": {**self.mode_state, "recent": self.recent},
            "steps_done": self.steps_done,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, in a trainer built alike.

        Raises: :class:`metapl.MetaplError` for anything else, before anything is loaded.
        """
        check_state(type(self).__name__, state, self.live_state(), self._optimizers)
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        if self.teacher is not None:
            load_whole(self.teacher, state["teacher"])
        load_whole(self.student, state["student"])
        # An optimizer keeps and modifies the tensors that it loads, and these belong to the caller.
        self.update.load_state_dict(as_held(copy.deepcopy(state["inner"]), self.inner_optimizer))
        if self.outer_optimizer is not None:
            self.outer_optimizer.load_state_dict(as_held(copy.deepcopy(state["outer"]), self.outer_optimizer))
        mode_state = dict(state["mode_state"])
        self.recent = mode_state.pop("recent", {})  # which states of earlier versions do not have
        self.mode_state, self.steps_done = mode_state, state["steps_done"]

    # ------------------------------------------------------------------------------------------- beside the training

    def finetune(
        self,
        labeled: Any,
        *,
        steps: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Unpack[FinetuneKeywords],
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
        return finetune(self.given[1], labeled, steps=steps, optimizer=optimizer, **own, **options)

    def hypergradient(
        self,
        labeled: Any = None,
        unlabeled: Any = None,
        mode: Mode | None = None,
        *,
        outer: Any = None,
        inner: Any = None,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        """The teacher's gradient through the student's step as it stands, by this mode or another; nothing moves.

        The student's clip and the micro-batches (``accumulate``) count, and the baseline so far does not. The default
        generators stay as they are, so that every call sees the same dropout masks.

        Args:
            labeled, unlabeled, outer, inner: as for :meth:`step`.
            mode: default this trainer's own.
            generator: for drawing labels; without it they are the same in every call too.
        """
        labeled, unlabeled = both_batches(labeled, unlabeled, outer, inner)
        estimate = estimator(self.mode if mode is None else mode)
        return self._gradient(estimate, prepare(self.given_problem, estimate), labeled, unlabeled, generator)

    def exact_cosine(self, labeled: Any, unlabeled: Any) -> float | None:
        """The cosine between this mode's teacher gradient and the exact one of soft labels, on one batch; nothing
        moves. None where there is no feedback, or the problem has no exact form."""
        exact = self.problem.exact()
        if self.mode.credits == "nothing" or exact is None:
            return None
        compared = (self.mode, self.problem), (estimator("forward"), exact)
        found = [self._gradient(*one, labeled, unlabeled) for one in compared]
        a, b = (torch.cat([whole(g).flatten().double() for g in gradient.grads.values()]) for gradient in found)
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    def _gradient(
        self, mode: Estimator, problem: BilevelProblem, labeled: Any, unlabeled: Any, generator: Any = None
    ) -> Hypergradient:
        for layout in self.layouts:
            layout.reshard()
        self.update.follow(self.layout.parameters())
        with replayed(RandomState.now(self.device)), self._autocast():
            return hypergradient(
                *self.given,
                labeled=labeled,
                unlabeled=unlabeled,
                mode=mode,
                problem=problem,
                inner_optimizer=self.update,
                generator=generator,
                accumulate=self.accumulate,
            )


class _TeacherTrainer(LossTrainer):
    """The teacher on its own losses, which may be the problem's default for a batch."""

    role = "teacher"
    total = "teacher_loss"
    prefix = "teacher"

    def __init__(self, trainer: BilevelTrainer, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        options = {name: getattr(trainer, name) for name in SETTINGS}
        super().__init__(teacher, optimizer=optimizer, **options)
        assert trainer.teacher_layout is not None
        self.layout = trainer.teacher_layout  # which knows the student's
        self.layouts, self.ranks = [self.layout], self.layout.ranks
        self.given, self.problem, self.compiled = trainer.teacher_losses, trainer.problem, trainer.compiled

    def losses_for(self, unlabeled: Any) -> tuple[TeacherLoss, ...]:
        return self.problem.default_teacher_losses(unlabeled) if self.given is None else self.given


def default_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4, at 0.05."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
