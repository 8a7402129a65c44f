"""The loop around a trainer's steps: schedule, EMA, validation, records, checkpoints.

The loop knows nothing of what a step does. It is resumed by position: what is drawn, scheduled and measured is a
function of the step's number and of what a checkpoint holds, so a run that was killed ends bit for bit as one that was
not.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from metapl import checkpoint
from metapl.checks import Fault
from metapl.data.feed import Feed, feed, to_device
from metapl.errors import MetaplError
from metapl.evaluate import Evaluation, evaluate_logits, predict_logits
from metapl.events import Events
from metapl.replay import RandomState, replayed
from metapl.run_folder import Metrics, RunFolder

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a fit runs.

    Args:
        steps: number of steps in all.
        schedule: of both learning rates, ``"cosine"`` (to 0 at the last step) or ``"constant"``.
        warmup: steps over which the rates grow linearly from 0 first.
        ema_decay: keep a moving average of the student's weights, with decay min(this, (1+t)/(10+t)); it is then what
            is validated and kept. None: the student itself.
        validate_every, log_every, save_every: in steps; the last step counts as a multiple of each.
        exact_every: every so many steps also compute the cosine between the mode's teacher gradient and the exact one;
            None: never. It costs two hypergradients and changes nothing else.
        keep: checkpoints kept.
        num_workers: of the loaders of metapl's own batches; changes nothing but speed.
        phase: the name under which checkpoints and rows are kept.
    """

    steps: int
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    ema_decay: float | None = None
    validate_every: int = 100
    log_every: int = 20
    save_every: int = 500
    exact_every: int | None = None
    keep: int = 2
    num_workers: int = 0
    phase: str = "fit"

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise MetaplError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.schedule not in ("cosine", "constant"):
            raise MetaplError(f"schedule={self.schedule!r}: expected 'cosine' or 'constant'.")
        if not 0 <= self.warmup <= self.steps:
            raise MetaplError(f"warmup={self.warmup}: expected between 0 and steps={self.steps}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise MetaplError(f"ema_decay={self.ema_decay}: expected a decay in [0, 1), or None.")
        if self.exact_every is not None and self.exact_every < 1:
            raise MetaplError(f"exact_every={self.exact_every}: expected 1 or more, or None.")

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with its beginning."""
        names = ("schedule", "warmup", "ema_decay")
        decisive = {name: getattr(self, name) for name in names}
        return decisive | ({"steps": self.steps} if self.schedule == "cosine" else {})

    def rate(self, step: int) -> float:
        """The factor of the base learning rates at ``step``.

        >>> [round(FitOptions(steps=4, warmup=1).rate(t), 2) for t in range(5)]
        [1.0, 1.0, 0.75, 0.25, 0.0]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Best:
    """The best student so far, by validation accuracy; the earliest of equals."""

    accuracy: float = -1.0
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with: the best validation accuracy (a fraction; None without validation), the step it was
    reached at, and these weights, which are in the student now."""

    validation_accuracy: float | None
    step: int
    weights: dict[str, Tensor] = field(repr=False)


class Interrupted(KeyboardInterrupt):
    """A fit that was asked to stop (Ctrl-C, SIGTERM); what was done is saved, if there is where."""

    def __init__(self, step: int, signal_number: int, saved: Path | None) -> None:
        where = f"saved to {saved}" if saved else "nothing saved: fit was given no out"
        super().__init__(f"stopped after step {step}; {where}")
        self.step, self.signal_number, self.saved = step, signal_number, saved


class Report(Protocol):
    """What a step returns: numbers that stay on the device until they are read."""

    @property
    def fault(self) -> Fault: ...

    @property
    def scalars(self) -> dict[str, Tensor]: ...

    def as_dict(self) -> dict[str, float]: ...

    def counts(self) -> dict[str, list[int]]: ...


class Loop(ABC):
    """A trainer that can be fitted: it steps, and its state can be saved."""

    student: nn.Module
    device: torch.device
    precision: str = "float32"
    steps_done: int = 0

    @property
    def labeller(self) -> nn.Module | None:
        """The teacher, where there is one."""
        return None

    @property
    @abstractmethod
    def schedulable(self) -> list[torch.optim.Optimizer]:
        """The optimisers whose learning rates the schedule moves."""

    @abstractmethod
    def step(self, labeled: Any, unlabeled: Any = None) -> Report:
        """One step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, but the data and the default generators."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def exact_cosine(self, labeled: Any, unlabeled: Any) -> float | None:
        """The cosine between this trainer's teacher gradient and the exact one; None where it has none."""
        return None

    def fit(
        self,
        labeled: Any,
        unlabeled: Any = None,
        *,
        steps: int,
        validation: Any = None,
        truth: Any = None,
        out: str | RunFolder | None = None,
        resume: bool = False,
        progress: bool = True,
        say: Say | None = None,
        **options: Any,
    ) -> FitResult:
        """Train for ``steps`` steps, and leave the best student by validation in place.

        Args:
            labeled, unlabeled: endless or re-iterable sources of batches: a DataLoader, a list of batches, metapl's
                own step batches, anything :func:`metapl.data.feed.feed` takes; ``unlabeled=None`` where nothing reads
                it.
            steps: in all, those of an earlier part of the run included.
            validation: (inputs, labels) or an iterable of such batches; without it the last student is kept.
            truth: (inputs, labels) of unlabelled examples whose labels happen to be known, for recording how many of
                the teacher's labels are right; nothing is trained or selected on it.
            out: a folder for metrics, TensorBoard events and checkpoints.
            resume: go on from the newest whole checkpoint in ``out``; without it, a folder with checkpoints of this
                phase is refused.
            progress: draw a progress bar on standard error, where that is a terminal.
            say: where messages go; default: standard error.
            options: the other fields of :class:`FitOptions`.

        Returns: a :class:`FitResult`.

        Raises:
            MetaplError: wrong options or sources, a loss that is not finite (with its step and the last good
                checkpoint), a disk that is full.
            Interrupted: after Ctrl-C or SIGTERM, when the step under way is finished and saved.
        """
        how = FitOptions(steps=steps, **options)
        folder = RunFolder(out) if isinstance(out, str | Path) else out
        return _Fit(self, how, folder, validation, truth, progress, say or _to_stderr).run(labeled, unlabeled, resume)

    def evaluate(self, data: Any, *, classes: list[str] | None = None) -> Evaluation:
        """Accuracy, per class, confusion matrix and calibration of the student on (inputs, labels) or batches."""
        logits, labels = predict_logits(self.student, batches_of(data, self.device))
        return evaluate_logits(logits, labels, classes)

    def save(self, path: str | Path) -> None:
        """Write :meth:`state_dict` and the default generators to a file, whole or not at all."""
        checkpoint.save(path, {"trainer": self.state_dict(), "rng": checkpoint.rng_state()})

    def load(self, path: str | Path) -> None:
        """Go on from :meth:`save`."""
        state = checkpoint.load(path)
        if "trainer" not in state:
            raise MetaplError(f"{path} is not a trainer's file; expected one written by save().")
        self.load_state_dict(state["trainer"])
        checkpoint.set_rng_state(state["rng"])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class _Fit:
    """One run of the loop."""

    def __init__(
        self,
        trainer: Loop,
        how: FitOptions,
        out: RunFolder | None,
        validation: Any,
        truth: Any,
        progress: bool,
        say: Say,
    ) -> None:
        self.trainer, self.how, self.out, self.say = trainer, how, out, say
        self.validation, self.truth = validation, truth
        self.progress = progress and sys.stderr.isatty()
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in trainer.schedulable]
        self.average = None if how.ema_decay is None else _average(trainer.student, how.ema_decay)
        self.best = Best()
        self.feeds: dict[str, Feed] = {}
        self.checkpoints = None if out is None else out.checkpoints(how.phase, how.keep)
        self.metrics = None if out is None else Metrics(out.path / "metrics.jsonl")
        self.saved_at: Path | None = None
        self.first_bad = torch.full((), torch.inf, device=trainer.device)
        self.faults: list[tuple[int, Fault]] = []

    def run(self, labeled: Any, unlabeled: Any, resume: bool) -> FitResult:
        if not resume:
            self._refuse_another_run()
        sources = {"labeled": labeled, "unlabeled": unlabeled}
        try:
            for name, source in sources.items():
                if source is not None:
                    self.feeds[name] = feed(source, name=name, stop=self.how.steps, num_workers=self.how.num_workers)
            start = self._restore() if resume else 0
            if self.metrics is not None:
                with self._writing():
                    self.metrics.cut(self.how.phase, start)
            self._steps(start)
        finally:
            self._scale_rates(1.0)
            for one in self.feeds.values():
                one.close()
        return self._finish()

    def _steps(self, start: int) -> None:
        with _stop_requests() as stop:
            with self._bar(start) as bar, self._events(start) as events:
                for t in range(start, self.how.steps):
                    row = self._one_step(t, bar, events)
                    if row is not None:
                        self._record(row, events)
                    if _every(self.how.save_every, t, self.how.steps):
                        self._save(t + 1, events)
                    if stop:
                        raise Interrupted(t + 1, stop[0], self._save(t + 1, events))
            if stop:  # after the last step, while the records were closed
                raise Interrupted(self.how.steps, stop[0], self.saved_at)

    def _one_step(self, t: int, bar: _Bar, events: Events | None) -> dict[str, float] | None:
        """Step t; the row to record, if this step is one that is recorded."""
        batches = {name: to_device(one.next(), self.trainer.device) for name, one in self.feeds.items()}
        labeled, unlabeled = batches["labeled"], batches.get("unlabeled")
        self._scale_rates(self.how.rate(t))
        row: dict[str, float] = {}
        if self.how.exact_every is not None and _every(self.how.exact_every, t, self.how.steps):
            cosine = self.trainer.exact_cosine(labeled, unlabeled)
            row |= {} if cosine is None else {"exact_cosine": cosine}
        report = self._step(t, labeled, unlabeled)
        if self.average is not None:
            self.average.update_parameters(self.trainer.student)
        self._watch(report, t)
        logged = _every(self.how.log_every, t, self.how.steps)
        validated = _every(self.how.validate_every, t, self.how.steps)
        if logged or validated:
            self._refuse_bad(t)
        if logged:
            row |= report.as_dict() | self._rates()
            self._record_counts(t + 1, report.counts(), events)
        if validated:
            row |= self._validate(t)
        bar.advance(sum(map(_examples, batches.values())), row)
        return {"step": t + 1, **row} if row else None

    # ----------------------------------------------------------------------------------------------- parts of a step

    def _step(self, t: int, labeled: Any, unlabeled: Any) -> Report:
        try:
            return self.trainer.step(labeled, unlabeled)
        except MetaplError as error:
            self._refuse_bad(t - 1)  # what went wrong before is the reason
            raise MetaplError(f"step {t + 1}: {error} ({self._last_good()})") from error

    def _scale_rates(self, factor: float) -> None:
        for optimizer, rates in zip(self.trainer.schedulable, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _rates(self) -> dict[str, float]:
        """The student's rate and the teacher's; of a transform that brings its own schedule, none is known."""
        names = ("student_lr", "teacher_lr") if len(self.trainer.schedulable) > 1 else (self._only_rate(),)
        return {name: o.param_groups[0]["lr"] for name, o in zip(names, self.trainer.schedulable, strict=True)}

    def _only_rate(self) -> str:
        return "student_lr" if self.trainer.labeller is None else "teacher_lr"

    def _watch(self, report: Report, t: int) -> None:
        """Note, on the device, the first step whose losses were not finite."""
        losses = [v.detach().float().reshape(()) for k, v in report.scalars.items() if k != "feedback_ratio"]
        bad = ~torch.isfinite(torch.stack(losses)).all()
        here = torch.where(bad, torch.full_like(self.first_bad, t + 1), torch.full_like(self.first_bad, torch.inf))
        self.first_bad = torch.minimum(self.first_bad, here)
        if report.fault.found:
            self.faults.append((t, report.fault))

    def _refuse_bad(self, t: int) -> None:
        """Stop where a batch was wrong or a loss not finite up to step t, or the weights after it are not."""
        for step, fault in self.faults:
            fault.raise_if_found(f"step {step + 1}: ")
        self.faults.clear()
        first = float(self.first_bad)
        if math.isfinite(first):
            what = f"a loss was NaN or infinite at step {int(first)}"
        elif not _all_finite([self.trainer.student, self.trainer.labeller]):
            what = f"weights were NaN or infinite after step {t + 1}, and the losses were not yet"
        else:
            return
        raise MetaplError(
            f"{what}; {self._last_good()}. Lower the learning rates or feedback_weight, or look for examples with "
            "extreme values."
        )

    def _candidate(self) -> nn.Module:
        """What is validated and kept: the averaged student, or the student."""
        if self.average is None:
            return self.trainer.student
        averaged: nn.Module = self.average.module
        return averaged

    def _validate(self, t: int) -> dict[str, float]:
        candidate = self._candidate()
        if self.validation is None:
            return {}
        found = {"student_validation_accuracy": self._accuracy(candidate)}
        teacher = self.trainer.labeller
        if teacher is not None:
            found["teacher_validation_accuracy"] = self._accuracy(teacher)
            if self.truth is not None:
                found["pseudo_label_accuracy"] = self._accuracy(teacher, self.truth)
        accuracy = found["student_validation_accuracy"]
        if accuracy > self.best.accuracy:
            self.best = Best(accuracy, t + 1, {k: v.detach().cpu().clone() for k, v in candidate.state_dict().items()})
        return found

    def _accuracy(self, model: nn.Module, data: Any = None) -> float:
        data = self.validation if data is None else data
        # A DataLoader draws from the default generator; looking at the validation data must not change the training.
        with replayed(RandomState.now(self.trainer.device)):
            logits, labels = predict_logits(model, batches_of(data, self.trainer.device))
        return evaluate_logits(logits, labels).accuracy

    # ------------------------------------------------------------------------------------------- records and resuming

    def _record(self, row: dict[str, float], events: Events | None) -> None:
        if self.metrics is None or events is None:
            return
        with self._writing():
            self.metrics.add({"phase": self.how.phase, **{k: _plain(v) for k, v in row.items()}})
            events.scalars(int(row["step"]), {name: value for name, value in row.items() if name != "step"})

    def _record_counts(self, step: int, counts: dict[str, list[int]], events: Events | None) -> None:
        if events is not None:
            with self._writing():
                events.counts(step, counts)

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "options": self.how.decisive(),
            "trainer": self.trainer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": {"accuracy": self.best.accuracy, "step": self.best.step, "weights": self.best.weights},
            "feeds": {name: one.state() for name, one in self.feeds.items()},
            "rng": checkpoint.rng_state(),
        }

    def _save(self, step: int, events: Events | None) -> Path | None:
        if self.checkpoints is None or self.metrics is None or events is None:
            return None
        self._refuse_bad(step - 1)
        with self._writing():
            # What is older than the checkpoint is not written again, so it must be on the disk first.
            events.flush()
            self.metrics.sync()
        self.saved_at = self.checkpoints.write(step, self._state(step))
        return self.saved_at

    def _restore(self) -> int:
        """Go on from the newest whole checkpoint; the step to go on with."""
        if self.checkpoints is None:
            raise MetaplError("resume=True was given without out; expected the folder of the run to go on with.")
        try:
            found = self.checkpoints.newest()
        except checkpoint.CheckpointError as error:
            self.say(f"{error}\nno whole checkpoint: starting anew")
            return 0
        if found is None:
            self.say(f"no checkpoint of phase {self.how.phase} yet: starting anew")
            return 0
        for skipped in found.skipped:
            self.say(f"passed over {skipped.path.name}: {skipped.reason}")
        state = found.state
        self._refuse_other_options(found.path, state)
        self.trainer.load_state_dict(state["trainer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best = Best(**state["best"])
        for name, one in self.feeds.items():
            one.restore(state["feeds"][name])
        checkpoint.set_rng_state(state["rng"])
        self.saved_at = found.path
        step: int = state["step"]
        self.say(f"resumed at step {step}" + ("" if self.how.phase == "fit" else f" of phase {self.how.phase}"))
        return step

    def _refuse_another_run(self) -> None:
        if self.out is not None and self.checkpoints is not None and self.checkpoints.paths():
            raise MetaplError(
                f"{self.out.path} holds checkpoints of a phase {self.how.phase!r} already; go on with it by "
                "resume=True, or give another out or phase."
            )

    def _refuse_other_options(self, file: Path, state: dict[str, Any]) -> None:
        before, now = state["options"], self.how.decisive()
        changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        if changed:
            what = ", ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
            raise MetaplError(f"{file} is of a run with other options ({what}); resume it as it was started.")
        if state["feeds"].keys() != self.feeds.keys():
            had, has = (" and ".join(kinds) for kinds in (state["feeds"], self.feeds))
            raise MetaplError(f"{file} is of a run on {had} batches, now there are {has} ones; give the same sources.")

    def _finish(self) -> FitResult:
        """Put the best student in place."""
        if not self.best.weights:
            last = {k: v.detach().cpu().clone() for k, v in self._candidate().state_dict().items()}
            self.trainer.student.load_state_dict(last)
            return FitResult(None, self.how.steps, last)
        self.trainer.student.load_state_dict(self.best.weights)
        return FitResult(self.best.accuracy, self.best.step, self.best.weights)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say which checkpoint is left when the records cannot be written."""
        try:
            yield
        except OSError as error:
            where = self.out.path if self.out is not None else None
            raise MetaplError(
                f"the records in {where} could not be written: {error.strerror or error}; {self._last_good()}. Mend "
                "that (is the disk full?), then resume the run."
            ) from error

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.saved_at}" if self.saved_at else "no checkpoint was written before"

    @contextmanager
    def _bar(self, start: int) -> Iterator[_Bar]:
        # Not tqdm's disable=True: it makes locks between processes even so, which a killed worker would leave behind.
        if not self.progress:
            yield _Bar(None)
            return
        from tqdm import tqdm

        with tqdm(total=self.how.steps, initial=start, desc=self.how.phase, unit="step", leave=False) as bar:
            yield _Bar(bar)

    def _events(self, start: int) -> AbstractContextManager[Events | None]:
        if self.out is None:
            return nullcontext()
        # A folder per phase: what is void after resuming is void for every curve in the folder.
        with self._writing():
            return Events(self.out.path / "tensorboard" / self.how.phase, start)


class _Bar:
    """The progress bar with what a user wants to see on it."""

    def __init__(self, bar: Any | None) -> None:
        self.bar, self.examples, self.since = bar, 0, time.monotonic()
        self.shown: dict[str, str] = {}

    def advance(self, examples: int, row: dict[str, float]) -> None:
        if self.bar is None:
            return
        self.bar.update()
        self.examples += examples
        names = {"student_validation_accuracy": "accuracy", "feedback_mean": "h"}
        self.shown |= {short: f"{row[name]:.3g}" for name, short in names.items() if name in row}
        if row:
            seconds = time.monotonic() - self.since
            self.bar.set_postfix(
                {**self.shown, "examples/s": f"{self.examples / max(seconds, 1e-9):.0f}"}, refresh=False
            )


def _average(student: nn.Module, decay: float) -> AveragedModel:
    def average(averaged: Any, current: Any, count: Any) -> None:
        t = int(count)
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + t) / (10 + t)))

    return AveragedModel(student, multi_avg_fn=torch.no_grad()(average))


def _all_finite(modules: Sequence[nn.Module | None]) -> bool:
    weights = [p.detach() for module in modules if module is not None for p in module.parameters()]
    return bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())


def _every(n: int, t: int, steps: int) -> bool:
    return (t + 1) % n == 0 or t + 1 == steps


def _plain(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _examples(batch: Any) -> int:
    """How many examples a batch holds: the rows of its first tensor that has any."""
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)


def batches_of(data: Any, device: torch.device, size: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) in batches on the device, from a pair of tensors or an iterable of pairs."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
    pieces = zip(data[0].split(size), data[1].split(size), strict=True) if pair else data
    for inputs, labels in pieces:
        yield inputs.to(device), labels.to(device)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of being torn out of a step; a second Ctrl-C is not held back."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        # Not on a second SIGTERM: who stops a group of processes may reach one of them twice.
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are another's affair
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
