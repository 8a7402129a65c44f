"""The loop: batches in, steps taken, what they showed recorded, checkpoints out.

It does not know what a step does. It is resumed by position: what is drawn, scheduled and measured is a function of
the step's number and of what a checkpoint holds, so a run that was killed ends bit for bit as one that was not.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import length, micro_batches, plain
from metapl.execution.checks import Fault
from metapl.execution.shards import gathered, load_whole, local
from metapl.feedback.lookahead import Lookahead, inner_batches
from metapl.metrics.metric import Metric
from metapl.runs.checkpoint import Found
from metapl.runs.checkpoint_parts import PartsWriter, check, load
from metapl.runs.generators import rng_state, set_rng_state
from metapl.runs.memory import LESS, out_of_memory
from metapl.runs.ownership import Folder
from metapl.runs.progress import Progress, progress
from metapl.training import resuming
from metapl.training.beside import Beside
from metapl.training.contract import Report, Say, Stepwise
from metapl.training.options import FitOptions, Rates
from metapl.training.records import Records
from metapl.training.selection import Average, Best, Selection, weights_of
from metapl.training.stopping import Callback, Callbacks, Interrupted, stop_requests

if TYPE_CHECKING:
    from metapl.data.feed import Feed


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with.

    Args:
        value: of the metric, of the student that is kept on the validation data; None without these.
        step: the number of steps after which it was as it is kept: the best by validation, or the last where validation
            does not select.
        weights: of that student; they are in the student now.
        teacher_weights: of the teacher after the last step, averaged where the student is; they are in the teacher now.
            None where there is no teacher.
        history: the recorded rows in their order, each with its ``step``; of a fit that was resumed, those of its
            earlier parts too.
        metric: its name: ``"accuracy"``, whose value is a fraction, ``"loss"``, or that of the metric that was given;
            None without validation data.
    """

    value: float | None
    step: int
    weights: dict[str, Tensor] = field(repr=False)
    teacher_weights: dict[str, Tensor] | None = field(default=None, repr=False)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    metric: str | None = "accuracy"

    @property
    def validation_accuracy(self) -> float | None:
        """The value, where the metric is accuracy; else None."""
        return self.value if self.metric == "accuracy" else None


class FitRun:
    """One run of the loop; for its arguments see :meth:`metapl.training.Trainer.fit`."""

    def __init__(
        self,
        trainer: Stepwise,
        options: FitOptions,
        out: Folder | None,
        validation: Any,
        truth: Any,
        metric: Metric | None,
        shown: bool,
        say: Say,
        callbacks: Sequence[Callback] = (),
        allow_changes: Sequence[str] = (),
    ) -> None:
        _check(trainer, options, truth)
        self.trainer, self.options, self.ranks = trainer, options, trainer.ranks
        # One of several processes shows and writes.
        self.first = trainer.ranks.first
        self.say, self.shown = say if self.first else lambda text: None, shown and self.first
        self.rates = Rates(trainer, options)
        self.allow_changes = allow_changes
        self.made_of = resuming.made_of(trainer, self.rates)  # before a callback moves anything
        self.averages = {role: self._average(role) for role in ("student", "teacher")}
        self.selection = Selection(trainer, validation, truth, metric, options.select, say)
        self.beside = {"student": self.selection.beside}
        if trainer.teacher is not None:
            self.beside["teacher"] = Beside(trainer.teacher)
        self.records = Records(out if self.first else None, options)
        self.callbacks = Callbacks(callbacks, trainer)
        self.ended: tuple[int, str] | None = None  # the last step, and why it is, once a callback has said so
        self.feeds: dict[str, Feed] = {}
        self.parts: PartsWriter | None = None  # of checkpoints that every process writes its part of
        self.saves = False  # whether there is a folder, perhaps that of another process
        self.resumed_from: tuple[int, Path] | None = None
        self.under_way = 0  # the number of the step
        self.seen: dict[str, float] = {}  # the last values on validation data
        # The first step that went wrong, kept on the device until something is read anyway.
        self.first_bad = torch.full((), torch.inf, device=trainer.device)
        self.faults: list[tuple[int, Fault]] = []

    def run(self, labeled: Any, unlabeled: Any, resume: bool, batch_size: int | None = None) -> FitResult:
        from metapl.data.arrays import in_memory  # needed for fitting only
        from metapl.data.feed import feed

        if labeled is None:
            raise MetaplError(
                "labeled is None; expected a source of labeled batches (inputs, labels): a DataLoader, or a list."
            )
        ranks, options = self.ranks, self.options
        resume = ranks.any(resume)  # the first of several processes knows of the run
        self.saves = ranks.any(self.records.kept)
        with ranks.agreed(waiting=True):
            if not resume:
                self.records.refuse_another_run()
        self.selection.check(self.trainer.teacher)
        given = {"labeled": labeled} | ({} if unlabeled is None else {"unlabeled": unlabeled})
        how = batch_size, self.trainer.dtype
        sources = {name: in_memory(source, name, *how, stream=i) for i, (name, source) in enumerate(given.items())}
        if batch_size is not None and all(sources[name] is source for name, source in given.items()):
            raise MetaplError(
                f"batch_size={batch_size} was given, and {' and '.join(given)} are no examples in memory, so their own "
                "batches count; expected tensors or arrays beside it, or batch_size=None."
            )
        try:
            if self.saves:
                known = self.records.checkpoints
                self.parts = resuming.parts_writer(self.trainer, None if known is None else known.folder, options.keep)
            for name, source in sources.items():
                stop = options.steps * (self.trainer.lookahead if name == "unlabeled" else 1)
                self.feeds[name] = feed(
                    source, name=name, stop=stop, num_workers=options.num_workers, device=self.trainer.device
                )
            if self.records.kept:
                self.made_of |= resuming.data_of(sources | {"validation": self.selection.validation})
            self._steps(self._restore() if resume else 0)
        except Exception as error:
            told = self._explained(error, sources.values())  # asked before the workers are stopped
            if told is None:
                raise
            raise MetaplError(told) from error
        finally:
            self.rates.put_back()
            for one in self.feeds.values():
                one.close()
            if self.parts is not None:
                self.parts.close()
        return self._finish()

    def _explained(self, error: Exception, sources: Iterable[Any]) -> str | None:
        step, last = self.under_way + 1, self.records.last_good()
        if whose := out_of_memory(error):
            return f"step {step}: the memory {whose} does not suffice; {LESS} ({last})"
        if error is self.callbacks.raised:
            return None  # it may have lost a connection of its own, to a server for example: no worker died
        if death := _worker_death(error, sources, self.options.num_workers):
            return f"{death} ({last})"
        # States of an optimizer show what they are where they are used.
        first = self.resumed_from is not None and self.resumed_from[0] == self.under_way
        if self.resumed_from and first and isinstance(error, RuntimeError | LookupError | TypeError | AttributeError):
            return (
                f"step {step}, the first after {self.resumed_from[1]}, failed ({type(error).__name__}: "
                f"{reason_of(error):.200}); was that checkpoint of other networks or optimizers?"
            )
        return None

    # ----------------------------------------------------------------------------------------------------- the steps

    def _steps(self, start: int) -> None:
        options, ranks = self.options, self.ranks
        with stop_requests() as stop:
            bar = progress(self.shown, name=options.phase, start=start, steps=options.steps)
            with bar as progressing, self.records.opened(start, self.say):
                for t in range(start, options.steps if self.ended is None else start):
                    row = self._one_step(t, progressing)
                    if row:
                        self._record(t + 1, {"step": t + 1, **row})
                    if self.ended or options.due(options.save_every, t):
                        self._save(t + 1)
                    # Several processes agree on a stop where numbers are read anyway.
                    asked = bool(stop) if ranks.alone else options.due(options.log_every, t) and ranks.any(bool(stop))
                    if asked:
                        raise Interrupted(t + 1, (*stop, signal.SIGTERM)[0], self._save(t + 1) or self._settle())
                    if self.ended:
                        break
                self._settle()
            if stop:  # after the last step, while the records were closed
                raise Interrupted(options.steps, stop[0], self.records.saved_at)

    def _one_step(self, t: int, progressing: Progress) -> dict[str, float]:
        """Step t; the numbers to record, if this step is one that is recorded."""
        self.under_way, options, trainer = t, self.options, self.trainer
        waits = options.waits(t)
        labeled, unlabeled = self._own_rows(self.feeds["labeled"].next()), self._own_rows(self._unlabeled(waits))
        self.rates.move(t)
        row: dict[str, float] = {}
        if options.due(options.exact_every, t) and not waits:
            cosine = trainer.exact_cosine(labeled, unlabeled)
            row |= {} if cosine is None else {"exact_cosine": cosine}
        if options.warm_start and t == options.wait and trainer.teacher is not None:
            with self._held("teacher") as teacher:
                load_whole(trainer.student, weights_of(teacher))
            self.averages["student"] = self._average("student")
        try:
            report = trainer.teacher_step(labeled, unlabeled) if waits else trainer.step(labeled, unlabeled)
        except MetaplError as error:
            self._refuse_bad(t - 1)  # what went wrong before is the reason
            # Of a first step that is refused there is nothing to go back to.
            last = f" ({self.records.last_good()})" if t or self.records.kept else ""
            raise MetaplError(f"step {t + 1}: {error}{last}") from error
        self.records.begun = True
        for role, average in self.averages.items():
            if average is not None and not (waits and role == "student"):
                average.update()
        self._watch(report, t)
        logged, validated = options.due(options.log_every, t), options.due(options.validate_every, t)
        if logged or validated:
            self._refuse_bad(t)
        if logged:
            row |= report.as_dict() | self.rates.now()
            self.records.counts(t + 1, report.counts())
        if validated:
            row |= self._look(t)
        drawn = [labeled, *inner_batches(unlabeled)]
        progressing.advance(drawn, row, due=validated, validated=self.selection.told)
        return row

    def _unlabeled(self, waits: bool) -> Any:
        """What a step reads of the unlabeled source; the student that waits takes no steps to look ahead."""
        source, several = self.feeds.get("unlabeled"), self.trainer.lookahead
        if source is None or several == 1 or waits:
            return None if source is None else source.next()
        # Copies, for a source may fill the memory of one batch with the next.
        held = [pytree.tree_map_only(Tensor, Tensor.clone, plain(source.next())) for _ in range(several - 1)]
        return Lookahead([*held, source.next()])

    def _own_rows(self, batch: Any) -> Any:
        """This process's share of a batch, where the sources serve whole ones."""
        ranks = self.ranks
        if ranks.alone or not self.options.split_batches or batch is None:
            return batch
        if length(batch) % ranks.size:
            raise MetaplError(
                f"a batch has {length(batch)} examples, which {ranks.size} processes cannot share equally; expected a "
                f"multiple of {ranks.size}."
            )
        return micro_batches(batch, ranks.size, "whole")[ranks.rank]

    def _record(self, step: int, row: dict[str, float]) -> None:
        options = self.options
        try:
            reason = self.callbacks.after(step, row)
            if reason is not None:
                self.ended = step, reason
                why = f": {reason}" if reason else ""
                if options.waits(step - 1):
                    why += f"; the student is untrained: it would have begun after step {options.wait}"
                self.say(f"stopped after step {step} by a callback{why}")
                # The last step is validated, as in any fit.
                row |= {} if options.due(options.validate_every, step - 1) else self._look(step - 1)
        finally:  # what a callback raises comes out, and the step was done
            self.records.row(row)

    def _look(self, t: int) -> dict[str, float]:
        # A teacher that weighs examples, say, has no accuracy.
        labeler = self.trainer.teacher if self.trainer.teacher_classifies else None
        student = None if self.options.waits(t) else lambda: self._held("student")
        teacher = None if labeler is None else lambda: self._held("teacher")
        self.seen = self.selection.look(student, teacher, labeler, t + 1)
        return self.seen

    def _average(self, role: str) -> Average | None:
        network, decay = self.trainer.networks.get(role), self.options.ema_decay
        return None if network is None or decay is None else Average(network, decay)

    def _held(self, role: str) -> AbstractContextManager[Any]:
        """What is validated and kept: the averaged network in a block, or the network."""
        average = self.averages[role]
        return nullcontext(self.trainer.networks[role]) if average is None else average.held()

    def _watch(self, report: Report, t: int) -> None:
        """Remember whether a loss of step t was not finite, and what was wrong with its batch."""
        losses = [v.detach().float().reshape(()) for k, v in report.scalars.items() if k != "feedback_ratio"]
        bad = ~torch.isfinite(torch.stack(losses)).all()
        self.first_bad = torch.minimum(self.first_bad, torch.where(bad, t + 1.0, torch.inf))
        if report.fault.findings:
            self.faults.append((t, report.fault))

    def _refuse_bad(self, t: int) -> None:
        """Stop where a batch was wrong or a loss not finite up to step t, or the weights after it are not."""
        for step, fault in self.faults:
            fault.raise_if_found(f"step {step + 1}: ")
        self.faults.clear()
        weights = [local(p.detach()) for network in self.trainer.networks.values() for p in network.parameters()]
        if (first := float(self.first_bad)) != torch.inf:
            what = f"a loss was NaN or infinite at step {int(first)}"
        elif self.ranks.any(not bool(torch.stack([torch.isfinite(t).all() for t in weights]).all())):
            what = f"weights were NaN or infinite after step {t + 1}, and the losses were not yet"
        else:
            return
        raise MetaplError(
            f"{what}; {self.records.last_good()}. Lower the learning rates or feedback_weight, or look for examples "
            "with extreme values."
        )

    # ------------------------------------------------------------------------------------------- saving and resuming

    def _save(self, step: int) -> Path | None:
        """Write a checkpoint; None where it is written beside the training, until :meth:`_settle`."""
        if not self.saves:
            return None
        self._refuse_bad(step - 1)
        state, ranks, path = self._state(step), self.ranks, None
        if not ranks.alone:
            state["ranks"] = ranks.gathered(resuming.own_state(state))
            if self.parts is None:
                state = gathered(state)
            self._settle()
        with ranks.agreed(waiting=True):
            if self.parts is None:
                path = self.records.save(step, state)  # by the first one
            else:
                self.records.flush()
        if self.parts is not None:
            self.parts.write(step, state)
        return path

    def _settle(self) -> Path | None:
        """Wait for the checkpoint that is written beside the training; the last one that was."""
        if self.parts is not None:
            self.records.saved_at = self.parts.settle() or self.records.saved_at
        return self.records.saved_at

    def _state(self, step: int) -> dict[str, Any]:
        averages = {role: None if one is None else one.state_dict() for role, one in self.averages.items()}
        return {
            "step": step,
            "options": self.options.decisive(),
            "made_of": self.made_of,
            "versions": resuming.VERSIONS,
            "trainer": self.trainer.live_state(),
            "average": averages["student"],
            "teacher_average": averages["teacher"],
            "beside": {role: one.changed() for role, one in self.beside.items()},
            "seen": self.seen,
            "best": dict(vars(self.selection.best)),
            "metric": self.selection.kind,
            "feeds": {name: feed.state() for name, feed in self.feeds.items()},
            "rng": rng_state(),
            "callbacks": [callback.state_dict() for callback in self.callbacks.stateful],
            "ended": self.ended,
            "rows": self.records.digest.hexdigest(),
        }

    def _restore(self) -> int:
        """Go on from the newest whole checkpoint of a fit that was made alike; the step to go on with."""
        found, ranks, trainer, options = self._newest(), self.ranks, self.trainer, self.options
        if found is None:
            return 0
        file = found.path
        with resuming.going_on_from(file):
            state = resuming.of_this(found.state, trainer, file, whole_batches=options.split_batches, say=self.say)
        with ranks.agreed(waiting=True), resuming.going_on_from(file):
            resuming.check_state(file, state, trainer.student, options.steps)
            resuming.refuse_other_options(file, state, options.decisive(), self.feeds)
            resuming.refuse_other_metric(file, state, self.selection.kind)
            if self.first:  # the others keep no record of the data
                resuming.refuse_changes(file, state.get("made_of", {}), self.made_of, self.allow_changes)
                self.records.refuse_other_rows(file, state)
            note = resuming.version_note(state.get("versions"))
            if note is not None:
                self.say(note)
            before = trainer.state_dict()
            try:
                self._take(state)
            except Exception:
                with suppress(Exception):
                    trainer.load_state_dict(before)
                raise
        step: int = state["step"]
        self.records.saved_at, self.resumed_from = file, (step, file)
        self.say(f"resumed at step {step}{'' if options.phase == 'fit' else f' of phase {options.phase}'}")
        return step

    def _newest(self) -> Found | None:
        """The newest whole checkpoint: the first of several processes finds it, and all read it."""
        ranks, found = self.ranks, None
        with ranks.agreed(waiting=True):
            found = self.records.newest(self.say, load if ranks.alone else check) if self.first else None
        if ranks.alone:
            return found
        path = ranks.gathered(None if found is None else str(found.path))[0]
        found = None
        with ranks.agreed(waiting=True):  # as the networks are laid out, where they are sharded
            if path is not None:
                like = None if self.parts is None else resuming.layouts_of(self._state(0), self.trainer)
                found = Found(Path(path), load(Path(path), like, checked=True))
        return found

    def _take(self, state: dict[str, Any]) -> None:
        self.callbacks.restore(state.get("callbacks", []))
        trainer = state["trainer"]
        if {"student_optimizer", "teacher_optimizer"} & {*self.allow_changes}:
            trainer = trainer | {"optimizers": None}  # of any class
        self.trainer.load_state_dict(trainer)
        for role, changed in state.get("beside", {}).items():  # which states of earlier versions do not have
            self.beside[role].load(changed)
        self.rates.keep_settings(self.allow_changes)
        for role, average in self.averages.items():
            if average is not None:
                average.load_state_dict(state["average" if role == "student" else "teacher_average"])
        self.seen, self.selection.best = state["seen"], Best(**state["best"])
        self.selection.before = state.get("metric")
        for name, feed in self.feeds.items():
            feed.restore(state["feeds"][name])
        set_rng_state(state["rng"])
        self.ended = state.get("ended")

    def _finish(self) -> FitResult:
        trainer, taught = self.trainer, None
        if trainer.teacher is not None:
            with self._held("teacher") as kept:
                taught = weights_of(kept)
            load_whole(trainer.teacher, taught)
        best = self.selection.best
        if not best.weights:
            with self._held("student") as candidate:
                step = self.ended[0] if self.ended else self.options.steps
                best = Best(self.seen.get(self.selection.row), step, weights_of(candidate))
                best.beside = self.selection.beside.changed()
        load_whole(trainer.student, best.weights)
        self.selection.beside.load(best.beside)
        # The first of several processes knows the rows of the earlier parts of a fit that was resumed.
        history = self.records.history if self.ranks.alone else self.ranks.gathered(self.records.history)[0]
        metric = (self.selection.kind or [None])[0]
        return FitResult(best.value, best.step, best.weights, taught, history, metric)


def _check(trainer: Stepwise, options: FitOptions, truth: Any) -> None:
    """Refuse what needs another teacher than there is."""
    teacher, wrong = trainer.teacher, None
    if options.wait and teacher is None:
        wrong = (
            f"wait={options.wait} was asked for, and a {type(trainer).__name__} has no teacher that could train while "
            "its student waits; expected wait=0."
        )
    elif truth is not None and teacher is not None and not trainer.teacher_classifies:
        wrong = (
            "truth was given, to measure how many of the teacher's labels are right, and the problem's teacher gives "
            "no class logits; leave truth out, or set teacher_classifies = True on the problem."
        )
    elif options.warm_start and teacher is not None:
        here, there = (
            {name: getattr(t, "shape", "there") for name, t in net.state_dict().items()}
            for net in (trainer.student, teacher)
        )
        other = next((name for name in {**here, **there} if here.get(name) != there.get(name)), None)
        if other is not None:
            wrong = (
                f"warm_start=True needs a student of the teacher's architecture; {other} is "
                f"{here.get(other, 'missing')} in the student and {there.get(other, 'missing')} in the teacher."
            )
    if wrong:
        raise MetaplError(wrong)


def _worker_death(error: Exception, sources: Iterable[Any], num_workers: int) -> str | None:
    """What became of a worker, if that is the error: torch raises it wherever the loop is at."""
    known = next((told for source in sources if (told := getattr(source, "explain", lambda: None)())), None)
    if known is not None:
        return str(known)
    cause: BaseException | None = error
    while cause is not None:  # torch's C++ code, such as the writer of checkpoints, wraps errors in its own
        text = str(cause)  # what a worker raised begins so
        lost = isinstance(cause, ConnectionError | EOFError) and num_workers and not text.startswith("Caught ")
        if lost or text.startswith("DataLoader worker"):
            if isinstance(error, MetaplError) and type(cause).__name__ not in str(error):
                return str(error)  # the feed knew more than the error, or it would quote it
            reason = text.split(". ")[0].strip(" .") or type(cause).__name__
            return f"a process that prepares batches died ({reason}): was there too little memory?"
        cause = cause.__cause__ or cause.__context__
    return None
