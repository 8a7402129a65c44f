"""The loop: batches in, steps taken, what they showed recorded, checkpoints out.

It does not know what a step does. It is resumed by position: what is drawn, scheduled and measured
is a function of the step's number and of what a checkpoint holds, so a run that was killed ends bit
for bit as one that was not.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metapl.data.feed import Source
from metapl.errors import MetaplError, few
from metapl.execution.batch import Batch, as_tensors, length
from metapl.execution.checks import Fault
from metapl.execution.shards import local
from metapl.execution.state import RandomState, replayed
from metapl.feedback.report import Report, Say, StepReport
from metapl.guards.outcomes import Outcomes
from metapl.metrics.metric import Better, Metric, MetricLike, metric_for
from metapl.protocols import is_two_level
from metapl.runs.checkpoint import rng_state, set_rng_state
from metapl.runs.folder import Folder, Records
from metapl.runs.terminal import FitLines, draws_bars, progress, stop_requests
from metapl.training.fittable import Fittable
from metapl.training.options import FitKeywords, FitOptions, Rates
from metapl.training.patience import Patience
from metapl.training.records import figures
from metapl.training.selection import Selection
from metapl.training.sources import Sources
from metapl.training.statistics import refuse_other_inputs

# Options that do not decide where a fit goes, and settings of an optimizer that change its speed
# alone.
FREE_OPTIONS = ("validate_every", "log_every", "save_every", "keep", "num_workers", "phase")
SPEED_SETTINGS = (
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "initial_lr",
    "param_names",
)

Callback = Callable[[int, Mapping[str, float], Any], object]
"""Called with the number of steps done, the row recorded after them and the trainer; a dict of
numbers that it returns becomes part of the row.

An object with ``state_dict()`` and ``load_state_dict(state)`` beside its ``__call__`` is saved in
the checkpoints and goes on where it was when the fit is resumed. One with ``skips(fit)`` may
skip a step before it is taken, and returns whether it has; the schedule goes on.
"""


class FinetuneKeywords(FitKeywords, total=False):
    """The keywords of :meth:`Trainer.fit` for a network that learns from one source of batches."""

    batch_size: int | None
    validation: Source
    metric: MetricLike | None
    metric_mode: Better | None
    out: str | Path | Folder | None
    resume: bool | Literal["anyway"]
    progress: bool
    say: Say | None
    callbacks: Sequence[Callback]
    batch_norm: Iterable[Tensor] | None


class StopFit(Exception):
    """Raised by a callback to end the fit after the step at hand, as if it had been the last one.

    The student is then chosen as at the end of any fit, a checkpoint is written, the text is shown,
    and the fit counts as finished when it is resumed. During ``wait`` the student has not begun,
    and is returned untrained.

    >>> import torch, metapl
    >>> def stop_at_small_loss(step, row, trainer):
    ...     if row["loss"] < 0.1:
    ...         raise metapl.StopFit(f"the loss is {row['loss']:.2f}")

    To stop once the validation has not become better for a while is ``fit(patience=)``.
    """


class Interrupted(KeyboardInterrupt):
    """A fit that was asked to stop (Ctrl-C, SIGTERM, SIGHUP).

    What was done is saved, if there is where.
    """

    def __init__(self, step: int, signal_number: int, saved: Path | None) -> None:
        where = f"saved to {saved}" if saved else "nothing saved: fit was given no out"
        super().__init__(f"stopped after step {step}; {where}")
        self.step = step
        self.signal_number = signal_number
        self.saved = saved


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with.

    Args:
        value: of the metric, of the student that is kept on the validation data; None without
            these.
        step: the number of steps after which it was as it is kept: the best by validation, or the
            last.
        weights: of that student; they are in the student now.
        teacher_weights: of the teacher after the last step, averaged where the student is; they are
            in the teacher now. Where students are selected by accuracy, and the teacher ends 30
            points below its best validation, they are those that it had then.
        history: the recorded rows in their order, each with its ``step``, of earlier parts of the
            fit too.
        metric: its name: ``"accuracy"``, whose value is a fraction, ``"loss"``, or that of the
            metric that was given.
        warnings: what the fit has said that went wrong, such as a feedback that does nothing.
    """

    value: float | None
    step: int
    weights: dict[str, Tensor] = field(repr=False)
    teacher_weights: dict[str, Tensor] | None = field(default=None, repr=False)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    metric: str | None = "accuracy"
    warnings: tuple[str, ...] = ()

    @property
    def validation_accuracy(self) -> float | None:
        """The value, where the metric is accuracy; else None."""
        return self.value if self.metric == "accuracy" else None


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """A fit as it was asked for; for the fields see :meth:`metapl.training.Trainer.fit`."""

    options: FitOptions
    sources: Mapping[str, Any]
    batch_size: int | None
    validation: Any
    metric: Metric | None
    out: Folder | None
    resume: bool | Literal["anyway"]
    shows_progress: bool
    say: Say
    callbacks: Sequence[Callback]
    batch_norm: Iterable[Tensor] | None


class Fit:
    """One fit: its parts, each of which owns its state, and the loop over the steps.

    Args:
        trainer: takes the steps.
        request: what was asked for.
    """

    def __init__(self, trainer: Fittable, request: FitRequest) -> None:
        from metapl.training.resuming import Checkpoints, texts_of

        options = request.options
        if options.wait and trainer.teacher is None:
            raise MetaplError(f"wait={options.wait} was given without a teacher; expected wait=0.")
        self.trainer = trainer
        self.options = options
        self.ranks = trainer.ranks
        self.request = request
        # The student learns alone in the steps before this one, and after those of ``wait``.
        self.teacher_begins = options.wait + trainer.first_steps(options)
        # Of several processes, the first one shows and writes. Perhaps it alone knows of the run.
        is_first = self.ranks.first
        self.out = request.out if is_first else None
        self.say: Say = request.say if is_first else lambda text: None
        self.shows_progress = request.shows_progress and is_first
        self.saves = self.ranks.any(self.out is not None)
        self.resumes = self.ranks.any(bool(request.resume))
        if self.resumes and not self.saves:
            raise MetaplError("resume was given without out; expected the folder of the run.")
        validation = as_tensors(request.validation, trainer.dtype)
        self.sources = Sources(request.sources, request.batch_size, trainer.dtype)
        self.rates = Rates(trainer, options)
        self.outcomes = Outcomes(trainer, options, self.say)
        if options.patience is not None and validation is None:
            raise MetaplError("patience was given without validation data; expected both.")
        compares = bool(options.select) or options.patience is not None
        self.metric = metric_for(trainer, validation, request.metric, compares)
        self.patience = Patience(options.patience, self.metric)
        if request.batch_norm is not None:
            refuse_other_inputs(request.batch_norm, trainer.dtype)
        self.selection = Selection(
            trainer, options, validation, self.metric, self.outcomes, request.batch_norm
        )
        self.checkpoints = Checkpoints(trainer, options)
        self.callbacks_with_state: list[Any] = [
            c for c in request.callbacks if hasattr(c, "state_dict")
        ]
        self.pacers: list[Any] = [c for c in request.callbacks if hasattr(c, "skips")]
        # How far the fit is, and whether a callback, or its patience, has ended it.
        self.step = 0
        self.is_ended = False
        # As text, for steps may move what a problem holds.
        self.trainer_settings = texts_of(trainer.settings())
        # What may have gone wrong in steps so far: on the device until something is read anyway.
        self.faults: list[tuple[int, Fault]] = []
        self.records: Records

    def run(self) -> FitResult:
        """Take the steps that are left, and leave the networks that are kept in place."""
        options = self.options
        is_stopped = False
        with ExitStack() as stack:
            self.open(stack)
            try:
                self.begin()
                stop_signals = stack.enter_context(stop_requests())
                bar = progress(
                    self.shows_progress,
                    name=options.phase,
                    start=self.step,
                    steps=options.steps,
                    seconds_left=self.pacers[0].seconds_left if self.pacers else None,
                )
                stack.enter_context(bar)
                lines = None
                if self.shows_progress and not draws_bars():
                    lines = FitLines(
                        self.say, steps=options.steps, phase=options.phase, done=self.step
                    )
                folder = None if self.out is None else self.out.path
                self.records = Records(folder, options.phase, self.step, self.say)
                stack.callback(self.records.close)
                while self.step < options.steps and not self.is_ended and not is_stopped:
                    if any(pacer.skips(self) for pacer in self.pacers):
                        continue
                    outer, report, student_waits = self.take_step()
                    row = self.observe(report, outer, student_waits=student_waits)
                    if self.selection.student_column in row:
                        value = row[self.selection.student_column]
                        bar.set_postfix_str(f"validation {value:.4g}", refresh=False)
                    # Steps that were skipped are behind it too.
                    bar.update(self.step - bar.n)
                    if lines is not None:
                        lines(self.step, row, self.trainer)
                    is_saved = self.is_ended or options.due(options.save_every, self.step)
                    if is_saved:
                        self.save()
                    # Several processes agree on a stop where numbers are read anyway.
                    if self.ranks.alone or options.due(options.log_every, self.step):
                        is_stopped = self.ranks.any(bool(stop_signals))
                    if is_stopped and not is_saved:
                        self.save()
                self.checkpoints.finish()
            except MetaplError as error:
                if self.checkpoints.last:
                    raise MetaplError(
                        f"{error} (the last good checkpoint is {self.checkpoints.last})"
                    ) from error
                raise
        if is_stopped or stop_signals:
            signal_number = stop_signals[0] if stop_signals else signal.SIGTERM
            raise Interrupted(self.step, signal_number, self.checkpoints.last)
        return self.result()

    # ----------------------------------------------------------------------------- begin, or resume

    def open(self, stack: ExitStack) -> None:
        """Own the folder and begin the feeds, until the stack ends."""
        trainer = self.trainer
        self.checkpoints.open(self.out, stack, saves=self.saves, resumes=self.resumes)
        self.sources.open(stack, trainer, self.options)
        without_position = self.sources.without_position()
        if self.saves and without_position and not self.resumes:
            self.outcomes.warn(
                f"{few(without_position)} cannot be resumed from a checkpoint, but by "
                "resume='anyway', which goes on where they are; expected a DataLoader or a list"
            )
        # The optimizers are left with their base rates.
        stack.callback(self.rates.move, None)
        if is_two_level(trainer):
            # As a step outside of a fit has it.
            stack.callback(vars(trainer).update, measures_feedback=False)

    def begin(self) -> None:
        """Begin at the first step, or where the newest whole checkpoint is."""
        if self.resumes:
            self.resume()
        self.trainer.tell_evaluation(self.outcomes.warn)

    def resume(self) -> None:
        """Begin where the newest whole checkpoint is, or at the first step where there is none."""
        path, state = self.checkpoints.newest()
        phase = self.options.phase
        if path is None:
            self.say(f"{phase} has no checkpoint yet, so it begins at its first step")
            return
        with self.ranks.agreed(waiting=True):
            if state is None:
                state = self.checkpoints.read(path, self.live_state())
            self.go_on_from(path, state)
        of_phase = "" if phase == "fit" else f" of phase {phase}"
        self.say(f"resumed at step {self.step}{of_phase}")

    def go_on_from(self, path: Path, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint has."""
        from metapl.training.network_settings import restored_in_words
        from metapl.training.resuming import refuse_other_settings, state_of_process

        process_state = state_of_process(state["ranks"], self.trainer, path, self.sources)
        if state["step"] > self.options.steps:
            raise MetaplError(f"{path} has done {state['step']} steps; expected steps= of as many.")
        # The first batch, by which other data are known.
        goes_on_anyway = self.request.resume == "anyway"
        positions = self.sources.draw_facts()
        settings_of_fit = self.settings()
        if not goes_on_anyway:
            refuse_other_settings(process_state["compared"], settings_of_fit, path)
        # Of resume="anyway": what is given now.
        given_otherwise = {
            name
            for name, text in settings_of_fit.items()
            if process_state["compared"].get(name) != text
        }
        for callback, callback_state in zip(
            self.callbacks_with_state, state["callbacks"], strict=False
        ):
            callback.load_state_dict(callback_state)
        settings_before = copy.deepcopy(self.trainer.network_settings())
        trainer_state = {**state["trainer"], "generator": process_state["generator"]}
        # A checkpoint of an older version may have none, and is refused as it is loaded.
        for role in [*trainer_state.get("held", ())]:
            if role.partition("[")[0] in given_otherwise:
                # Numbers of the problem and the losses.
                held = trainer_state["held"]
                trainer_state["held"] = {k: values for k, values in held.items() if k != role}
        self.trainer.load_state_dict(trainer_state)
        self.rates.take_given(given_otherwise)
        for role, settings in self.trainer.network_settings().items():
            changes = restored_in_words(settings_before[role], settings)
            if changes:
                self.say(f"as when it was saved, of the {role} are {'; '.join(changes)}")
        self.outcomes.load_state_dict(state["outcomes"])
        if words := self.trainer.unsaved(state["trainer"]):
            self.outcomes.warn(
                f"not restored: {few(words, 3)}; expected numbers, tensors or modules in "
                "attributes, which are made before the fit"
            )
        self.selection.load_state_dict(state)
        self.patience.load_state_dict(state["patience"])
        self.step = state["step"]
        self.is_ended = state["ended"]
        self.checkpoints.go_on_from(path)
        positions.update(process_state["feeds"])
        if goes_on_anyway:
            for description in self.sources.without_position():
                self.outcomes.warn(f"{description} goes on where it is, not where it was saved")
        self.sources.load_state_dict(positions, leaves_others=goes_on_anyway)
        # Last, for what comes before may draw.
        set_rng_state(process_state["rng"])

    # --------------------------------------------------------------------------------------- a step

    def take_step(self) -> tuple[Any, Report, bool]:
        """Draw the batches of a step and take it.

        Returns: the outer batch, the report, and whether the student waits, for a teacher that
        learns alone.
        """
        trainer = self.trainer
        options = self.options
        student_waits = self.step < options.wait
        student_is_alone = options.wait <= self.step < self.teacher_begins
        # Nobody looks ahead where the student waits, or learns alone.
        looks_ahead = not student_waits and not student_is_alone
        outer, inner = self.sources.next_batches(
            lookahead=trainer.lookahead if looks_ahead else 1, reads_inner=trainer.reads_inner
        )
        self.rates.move(self.step)
        if options.warm_start and self.step == options.wait and trainer.teacher is not None:
            self.selection.start_student_from_teacher()
        take_step: Callable[[Any, Any], Report] = trainer.step
        if is_two_level(trainer):
            trainer.measures_feedback = options.due(options.log_every, self.step + 1)
            if student_waits:
                take_step = trainer.teacher_step
            elif student_is_alone:
                take_step = trainer.first_step
        try:
            report = take_step(outer, inner)
        except MetaplError as error:
            # What went wrong before is the reason.
            self.refuse_what_went_wrong()
            raise MetaplError(f"step {self.step + 1}: {error}") from error
        self.step += 1
        if report.fault.findings:
            self.faults.append((self.step, report.fault))
        self.selection.update_averages(["teacher"] if student_waits else trainer.networks)
        return outer, report, student_waits

    def refuse_what_went_wrong(self) -> None:
        """Stop where a step so far went wrong, or the weights after it are not finite."""
        for number, fault in self.faults:
            fault.raise_if_found(f"step {number}: ")
        self.faults.clear()
        networks = self.trainer.networks.values()
        weights = [local(p.detach()) for network in networks for p in network.parameters()]
        are_finite = bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())
        if self.ranks.any(not are_finite):
            raise MetaplError(
                f"weights were not finite after step {self.step}; lower the learning rates."
            )

    # ------------------------------------------------------------------------------- what it showed

    def observe(self, report: Report, outer: Batch, *, student_waits: bool) -> dict[str, float]:
        """Log, validate and call the callbacks after a step, where that is due.

        Returns the row that is recorded.
        """
        options = self.options
        logs = options.due(options.log_every, self.step)
        validates = options.due(options.validate_every, self.step)
        row: dict[str, float] = {"step": self.step}
        if logs or validates:
            self.refuse_what_went_wrong()
        if logs:
            self.log(report, outer, row)
        if validates:
            row.update(self.validate())
            # A student that learned alone has been validated without what its teacher is to add.
            if self.metric is not None and self.step > self.teacher_begins:
                self.patience.validated(row[self.selection.student_column])
        # The step alone is nothing to record.
        if len(row) == 1:
            return row
        try:
            reasons = self.call_back(row)
            if reasons:
                self.end_early("by a callback", reasons, student_waits=student_waits)
                if not validates:
                    # As after the last step of any fit.
                    row.update(self.validate())
            elif options.patience is not None and validates and self.step < options.steps:
                # Values of several processes may differ by rounding, and all of them end together.
                if self.ranks.any(self.patience.is_exhausted):
                    self.end_early("by patience", [self.patience.reason()], student_waits=False)
        finally:
            # What a callback raises comes out, and the step was done.
            self.records.add(row)
        return row

    def log(self, report: Report, outer: Batch, row: dict[str, float]) -> None:
        """Put the numbers of a step into its row."""
        row.update(report.as_dict())
        row.update(self.rates.now())
        self.outcomes.look_for_idle_loss(self.step, row)
        if not isinstance(report, StepReport) or not is_two_level(self.trainer):
            return
        scalars = figures(report, self.trainer.problem, outer, self.ranks)
        # One copy from the device for all of them.
        values = torch.stack([t.double() for t in scalars.values()]).tolist()
        row.update(zip(scalars, values, strict=True))
        inner_examples = self.ranks.size * len(report.student_outputs)
        self.outcomes.recorded(
            self.step, row, inner_examples, outer_examples=self.ranks.size * length(outer)
        )

    def validate(self) -> dict[str, float]:
        """Measure the networks that have an accuracy, or another metric, as they are now."""
        roles = []
        for role in self.trainer.networks:
            # A teacher that weighs examples, say, has no accuracy; a student that waits has not
            # begun.
            is_judged = self.step > self.options.wait
            if role == "teacher":
                is_judged = self.trainer.teacher_classifies
            if is_judged:
                roles.append(role)
        return self.selection.validate(self.step, roles)

    def call_back(self, row: dict[str, float]) -> list[str]:
        """Call the callbacks, whose numbers join the row.

        Returns why some of them ask the fit to stop.
        """
        reasons = []
        for callback in self.request.callbacks:
            # Observing must not change the run: a DataLoader, for one, draws from the generators.
            with replayed(RandomState.now(self.trainer.device)):
                try:
                    numbers = callback(self.step, dict(row), self.trainer)
                except StopFit as stop:
                    reasons.append(str(stop))
                    continue
            if isinstance(numbers, Mapping):
                row.update(numbers_of_callback(callback, numbers, row))
        return reasons

    def end_early(self, cause: str, reasons: Sequence[str], *, student_waits: bool) -> None:
        """End the fit after this step, and say why."""
        self.is_ended = True
        text = f"stopped after step {self.step} {cause}"
        named = "; ".join(reason for reason in reasons if reason)
        if named:
            text += f": {named}"
        if student_waits:
            text += "; the student is untrained: it would have begun later"
        self.say(text)

    # ---------------------------------------------------------------------- what is saved, and kept

    def settings(self) -> dict[str, str]:
        """Return what a part of this fit that is resumed must have in common with it, by name.

        That are the data, the options, the settings, and the callbacks with a state.
        """
        from metapl.training.resuming import texts_of

        options = self.options
        settings: dict[str, Any] = {}
        for name, facts in self.sources.facts.items():
            for key, value in facts.items():
                # A digest waits on its device until here.
                settings[f"{name}.{key}"] = int(value) if torch.is_tensor(value) else value
        settings.update(self.selection.facts)
        for name, value in vars(options).items():
            if name not in FREE_OPTIONS:
                settings[name] = value
        if options.patience is not None:
            # It counts validations.
            settings["validate_every"] = options.validate_every
        # The steps of the student alone that are taken, which the problem may have chosen.
        settings["first_steps"] = self.teacher_begins - options.wait
        if options.schedule == "constant" or options.decay_every is not None:
            # The rates do not depend on the number of steps.
            del settings["steps"]
        settings["trainer"] = type(self.trainer).__name__
        settings["dtype"] = self.trainer.dtype
        settings["validation metric"] = self.metric and (self.metric.name, self.metric.better)
        settings["callbacks"] = [
            type(c).__name__ for c in self.callbacks_with_state if not hasattr(c, "skips")
        ]
        names = {
            id(p): f"{role}.{name}"
            for role, network in self.trainer.networks.items()
            for name, p in network.named_parameters()
        }
        for name, optimizer in self.rates.optimizers.items():
            for number, group in enumerate(self.rates.begun_groups[name]):
                group_settings = {**group, "optimizer": type(optimizer).__name__}
                group_settings["lr"] = float(group["lr"])
                # Of a state torch knows their places alone.
                parameters = optimizer.param_groups[number]["params"]
                group_settings["parameters"] = [names.get(id(p), "") for p in parameters]
                for key, value in group_settings.items():
                    if key not in SPEED_SETTINGS:
                        settings[f"{name}.{number}.{key}"] = value
        return {**texts_of(settings), **self.trainer_settings}

    def live_state(self) -> dict[str, Any]:
        """Return the state of trainer and averages, whose tensors the next step changes."""
        return {"trainer": self.trainer.live_state(), "averages": self.selection.live_averages()}

    def save(self) -> None:
        """Write a checkpoint, if there is where."""
        if not self.saves:
            return
        self.refuse_what_went_wrong()
        state: dict[str, Any] = {"step": self.step, "ended": self.is_ended}
        state.update(self.selection.state_dict())
        state.update(self.live_state())
        state["callbacks"] = [callback.state_dict() for callback in self.callbacks_with_state]
        state["outcomes"] = self.outcomes.state_dict()
        state["patience"] = self.patience.state_dict()
        # What differs between processes.
        process_state = {
            "rng": rng_state(),
            "generator": state["trainer"].get("generator"),
            "feeds": self.sources.state_dict(),
            "compared": self.settings(),
        }
        state["ranks"] = self.ranks.gathered(process_state)
        with self.ranks.agreed(waiting=True):
            self.records.flush()
        self.checkpoints.write(self.step, state)

    def result(self) -> FitResult:
        """Leave the networks that are kept in place, and return what the fit ended with."""
        student, teacher_weights = self.selection.install(self.step, self.say)
        return FitResult(
            value=student.value,
            step=student.step,
            weights=student.weights,
            teacher_weights=teacher_weights,
            # The first of several processes knows the rows of the earlier parts of a fit that was
            # resumed.
            history=self.ranks.gathered(self.records.history)[0],
            metric=None if self.metric is None else self.metric.name,
            warnings=tuple(self.outcomes.warnings),
        )


def numbers_of_callback(
    callback: Any, numbers: Mapping[Any, Any], row: Mapping[str, float]
) -> dict[str, float]:
    """Return what a callback has returned as numbers of Python, or refuse it.

    Args:
        row: what the fit has recorded of the step, whose names are no callback's.
    """
    name_of_callback = getattr(callback, "__name__", type(callback).__name__)
    returned: dict[str, float] = {}
    for name, value in numbers.items():
        if name in row:
            raise MetaplError(
                f"the callback {name_of_callback} returned {name!r}, which the row of the step has "
                "already; expected another name."
            )
        number = value
        if hasattr(value, "item"):
            # Of NumPy, or a tensor; one of several entries is none.
            with suppress(ValueError, RuntimeError):
                number = value.item()
        if not isinstance(name, str) or not isinstance(number, int | float):
            raise MetaplError(
                f"the callback {name_of_callback} returned {name!r}: {value!r:.60}; expected "
                "numbers by their names."
            )
        returned[name] = number
    return returned
