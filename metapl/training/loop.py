"""The loop: batches in, steps taken, what they showed recorded, checkpoints out.

It does not know what a step does. It is resumed by position: what is drawn, scheduled and measured is a function of
the step's number and of what a checkpoint holds, so a run that was killed ends bit for bit as one that was not.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import plain
from metapl.execution.checks import Fault
from metapl.execution.rng import RandomState, replayed
from metapl.execution.shards import gathered, is_sharded, load_whole, local
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.report import Say
from metapl.metrics.metric import Metric
from metapl.runs import checkpoint_parts as parts
from metapl.runs.folder import Folder
from metapl.runs.generators import rng_state, set_rng_state
from metapl.runs.progress import progress
from metapl.training import resuming
from metapl.training.figures import figures
from metapl.training.options import FitOptions, Rates
from metapl.training.records import Records
from metapl.training.selection import Average, Best, Selection, weights_of
from metapl.training.stopping import Callback, Interrupted, StopFit, stop_requests

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
        trainer: Any,
        options: FitOptions,
        given: Mapping[str, Any],
        batch_size: int | None,
        out: Folder | None,
        validation: Any,
        metric: Metric | None,
        shown: bool,
        say: Say,
        callbacks: Sequence[Callback],
    ) -> None:
        from metapl.data.arrays import in_memory  # needed for fitting only

        if options.wait and trainer.teacher is None:
            raise MetaplError(f"wait={options.wait} was given, and there is no teacher to train; expected wait=0.")
        self.trainer, self.options, self.ranks = trainer, options, trainer.ranks
        first = trainer.ranks.first  # of several processes, which shows and writes
        self.say, self.shown = say if first else lambda text: None, shown and first
        self.rates = Rates(trainer, options)
        decay, networks = options.ema_decay, trainer.networks.items()
        self.averages = {} if decay is None else {role: Average(network, decay) for role, network in networks}
        self.selection = Selection(trainer, validation, metric, options.select, self.say)
        self.records = Records(out if first else None, options, self.say)
        self.callbacks: list[Any] = [*callbacks]
        self.stateful = [one for one in self.callbacks if hasattr(one, "state_dict")]
        self.ended: int | None = None  # the last step, once a callback has said so
        self.sources: dict[str, Any] = {
            name: in_memory(source, name, batch_size, trainer.dtype, stream=i)
            for i, (name, source) in enumerate(given.items())
            if source is not None
        }
        self.feeds: dict[str, Feed] = {}
        self.data: dict[str, Any] = {}  # what is known of the sources
        self.parts: parts.PartsWriter | None = None  # of checkpoints that every process writes its part of
        self.saves = self.ranks.any(self.records.out is not None)  # in a folder, perhaps of another process
        self.seen: dict[str, float] = {}  # the last values on validation data
        self.faults: list[tuple[int, Fault]] = []  # of steps, on the device until something is read anyway

    def run(self, resume: bool | Literal["anyway"]) -> FitResult:
        ranks, options, trainer, records = self.ranks, self.options, self.trainer, self.records
        goes_on = ranks.any(bool(resume))  # the first of several processes knows of the run
        if goes_on and not self.saves:
            raise MetaplError("resume was given without out; expected the folder of the run to go on with.")
        with ranks.agreed(waiting=True):
            folder = records.checkpoints
            if folder is not None and folder.paths() and not goes_on:
                raise MetaplError(
                    f"{folder.folder} holds checkpoints already; go on with resume=True, or give another out or phase."
                )
        self.selection.check()
        try:
            # Where networks are sharded over all processes of the job, each writes its part; elsewhere the first
            # process has everything, or could not say who else writes.
            tensors = [p for network in trainer.networks.values() for p in network.parameters()]
            if self.saves and not ranks.alone and any(map(is_sharded, tensors)):
                place = ranks.gathered(None if folder is None else str(folder.folder.resolve()))[0]
                whole_job = ranks.processes == dist.get_world_size()
                self.parts = parts.PartsWriter(Path(place), options.keep) if whole_job else None
            self.feeds = {name: self._feed(name) for name in self.sources}
            start = self._restore(compare=resume != "anyway") if goes_on else 0
            with stop_requests() as stop:
                bar = progress(self.shown, name=options.phase, start=start, steps=options.steps)
                with bar, records.opened(start):
                    for t in range(start, options.steps):
                        if self.ended is not None:
                            break
                        row = self._step(t)
                        if row:
                            self._record(t + 1, {"step": t + 1, **row})
                            shown = self.seen.get(self.selection.row)
                            bar.set_postfix_str("" if shown is None else f"validation {shown:.4g}", refresh=False)
                        bar.update()
                        if self.ended is not None or options.due(options.save_every, t):
                            self._save(t + 1)
                        # Several processes agree on a stop where numbers are read anyway.
                        logged = ranks.alone or options.due(options.log_every, t)
                        if logged and ranks.any(bool(stop)):
                            number = (*stop, signal.SIGTERM)[0]
                            raise Interrupted(t + 1, number, self._save(t + 1) or self._finished())
                    self._finished()
                if stop:  # after the last step, while the records were closed
                    raise Interrupted(options.steps, stop[0], records.saved_at)
        except Exception as error:
            # A source may know which file a worker has died of; it is asked before the workers are stopped.
            asked = (getattr(source, "explain", lambda: None)() for source in self.sources.values())
            known = next((why for why in asked if why), None)
            if known is None and not (isinstance(error, MetaplError) and records.saved_at):
                raise
            last = f" (the last good checkpoint is {records.saved_at})" if records.saved_at else ""
            raise MetaplError(f"{known or error}{last}") from error
        finally:
            self.rates.move(None)
            for one in self.feeds.values():
                one.close()
            if self.parts is not None:
                self.parts.close()
        return self._result()

    def _feed(self, name: str) -> Feed:
        from metapl.data.feed import feed  # needed for fitting only

        stop = self.options.steps * (self.trainer.lookahead if name == "unlabeled" else 1)
        how: dict[str, Any] = {"num_workers": self.options.num_workers, "device": self.trainer.device}
        return feed(self.sources[name], name=name, stop=stop, **how)

    # ----------------------------------------------------------------------------------------------------- the steps

    def _step(self, t: int) -> dict[str, float]:
        """Step t; the numbers to record, if this step is one that is recorded."""
        options, trainer, waits = self.options, self.trainer, t < self.options.wait
        labeled, unlabeled = self._next("labeled"), None
        if "unlabeled" in self.feeds:
            # The student that waits takes no steps to look ahead. Copies, for a source may fill the memory of one batch
            # with the next.
            more = range(0 if waits else trainer.lookahead - 1)
            ahead = [pytree.tree_map_only(Tensor, Tensor.clone, plain(self._next("unlabeled"))) for _ in more]
            unlabeled = self._next("unlabeled")
            unlabeled = Lookahead([*ahead, unlabeled]) if ahead else unlabeled
        self.rates.move(t)
        if options.warm_start and t == options.wait and trainer.teacher is not None:
            with self._held("teacher") as teacher:
                load_whole(trainer.student, weights_of(teacher))
            if options.ema_decay is not None:
                self.averages["student"] = Average(trainer.student, options.ema_decay)
        try:
            report = trainer.teacher_step(labeled, unlabeled) if waits else trainer.step(labeled, unlabeled)
        except MetaplError as error:
            self._refuse_bad(t - 1)  # what went wrong before is the reason
            raise MetaplError(f"step {t + 1}: {error}") from error
        for role, average in self.averages.items():
            if not (waits and role == "student"):
                average.update()
        if report.fault.findings:
            self.faults.append((t, report.fault))
        logged, validated = options.due(options.log_every, t), options.due(options.validate_every, t)
        row: dict[str, float] = {}
        if logged or validated:
            self._refuse_bad(t)
        if logged:
            row |= report.as_dict() | self.rates.now()
            if hasattr(report, "signal"):
                found = figures(report, trainer.problem, labeled, self.ranks)
                row |= dict(zip(found, torch.stack([t.double() for t in found.values()]).tolist(), strict=True))
        return row | self._look(t) if validated else row

    def _next(self, name: str) -> Any:
        batch = self.feeds[name].next()
        if name not in self.data:
            self.data[name] = resuming.about(self.sources[name], batch)
        return batch

    def _record(self, step: int, row: dict[str, float]) -> None:
        """Call the callbacks on a row, and record it with the numbers that they return."""
        reasons = list[str]()
        try:
            for callback in self.callbacks:
                # Observing must not change the run: a DataLoader, for one, draws from the default generator.
                with replayed(RandomState.now(self.trainer.device)):
                    try:
                        found = callback(step, dict(row), self.trainer)
                        row |= found if isinstance(found, Mapping) else {}
                    except StopFit as stop:
                        self.ended = step
                        reasons += [str(stop)] if str(stop) else []
            if self.ended is not None:
                reason = ": " * bool(reasons) + "; ".join(reasons)
                untrained = "; the student is untrained: it would have begun later" * (step <= self.options.wait)
                self.say(f"stopped after step {step} by a callback{reason}{untrained}")
                # The last step is validated, as in any fit.
                row |= {} if self.options.due(self.options.validate_every, step - 1) else self._look(step - 1)
        finally:  # what a callback raises comes out, and the step was done
            self.records.row(row)

    def _look(self, t: int) -> dict[str, float]:
        self.seen = {}
        for role in self.trainer.networks if self.selection.validation is not None else ():
            # A teacher that weighs examples, say, has no accuracy.
            if self.trainer.teacher_classifies if role == "teacher" else t >= self.options.wait:
                with self._held(role) as network:
                    self.seen |= self.selection.look(role, network, t + 1)
        return self.seen

    def _held(self, role: str) -> AbstractContextManager[Any]:
        """What is validated and kept: the averaged network in a block, or the network."""
        average = self.averages.get(role)
        return nullcontext(self.trainer.networks[role]) if average is None else average.held()

    def _refuse_bad(self, t: int) -> None:
        """Stop where a step up to t went wrong, or the weights after it are not finite."""
        for step, fault in self.faults:
            fault.raise_if_found(f"step {step + 1}: ")
        self.faults.clear()
        weights = [local(p.detach()) for network in self.trainer.networks.values() for p in network.parameters()]
        if self.ranks.any(not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())):
            raise MetaplError(f"weights were NaN or infinite after step {t + 1}; lower the learning rates.")

    # ------------------------------------------------------------------------------------------- saving and resuming

    def _save(self, step: int) -> Path | None:
        """Write a checkpoint; None where it is written beside the training, until :meth:`_finished`."""
        if not self.saves:
            return None
        self._refuse_bad(step - 1)
        state, ranks, path = self._state(step), self.ranks, None
        if not ranks.alone:
            state["ranks"] = ranks.gathered(resuming.own_state(state))
            state = gathered(state) if self.parts is None else state
            self._finished()
        with ranks.agreed(waiting=True):
            self.records.flush()
            if self.parts is None:
                path = self.records.save(step, state)  # by the first one
        if self.parts is not None:
            self.parts.write(step, state)
        return path

    def _finished(self) -> Path | None:
        """Wait for the checkpoint that is written beside the training; the last one that was."""
        if self.parts is not None:
            self.records.saved_at = self.parts.finished() or self.records.saved_at
        return self.records.saved_at

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "options": resuming.options_of(self),
            "trainer": self.trainer.live_state(),
            "averages": {role: average.state_dict() for role, average in self.averages.items()},
            "seen": self.seen,
            "best": dict(vars(self.selection.best)),
            "feeds": {name: feed.state() for name, feed in self.feeds.items()},
            "rng": rng_state(),
            "callbacks": [callback.state_dict() for callback in self.stateful],
            "ended": self.ended,
        }

    def _restore(self, compare: bool) -> int:
        """Go on from the newest whole checkpoint of a fit that was begun alike; the step to go on with."""
        ranks, trainer, options, folder, found = self.ranks, self.trainer, self.options, self.records.checkpoints, None
        with ranks.agreed(waiting=True):
            if folder is not None:  # of the first of several processes, which finds it; all read it
                found = folder.newest(parts.check)
        path = ranks.gathered(found and found.path)[0]
        if path is None:
            self.say(f"no checkpoint of phase {options.phase} yet: it begins at its first step")
            return 0
        with ranks.agreed(waiting=True):
            state = (found and found.state) or parts.load(path, self._layouts())
            state = resuming.of_this(state, trainer, path, [*self.sources.values()])
            step: int = state["step"]
            if {*state["feeds"]} != {*self.sources}:
                raise MetaplError(f"{path} is of a fit on {' and '.join(state['feeds'])} batches; give the same.")
            if step > options.steps:
                raise MetaplError(f"{path} has done {step} steps; expected steps={step} or more.")
            for name, source in self.sources.items():
                with closing(self._feed(name)) as once:  # whose draws nobody else sees
                    self.data[name] = resuming.about(source, None if hasattr(source, "whole") else once.next())
            if compare:
                resuming.refuse_other(path, state["options"], resuming.options_of(self))
            if len(state["callbacks"]) != len(self.stateful):
                raise MetaplError(f"{path} has {len(state['callbacks'])} callbacks' states; give the same ones.")
            for callback, saved in zip(self.stateful, state["callbacks"], strict=True):
                callback.load_state_dict(saved)
            trainer.load_state_dict(state["trainer"])
            for role, average in self.averages.items():
                average.load_state_dict(state["averages"][role])
            self.seen, self.selection.best, self.ended = state["seen"], Best(**state["best"]), state["ended"]
            for name, feed in self.feeds.items():
                feed.restore(state["feeds"][name])
            set_rng_state(state["rng"])  # last: what comes before may draw
        self.records.saved_at = path
        self.say(f"resumed at step {step}{'' if options.phase == 'fit' else f' of phase {options.phase}'}")
        return step

    def _layouts(self) -> parts.Like | None:
        """The layouts of the tensors of this fit's state, by their names; those of optimizers may not be there yet."""
        if self.parts is None:
            return None
        state = self._state(0)
        known = parts.layouts(state)
        optimizers = [k for k, value in state["trainer"].items() if isinstance(value, dict) and "param_groups" in value]
        for key, optimizer in zip(optimizers, self.trainer.schedulable, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            known |= {f"trainer/{key}/state/{i}": p for i, p in enumerate(parameters) if is_sharded(p)}

        def like(name: str, shape: torch.Size) -> Any:
            layout = known.get(name, known.get(name.rpartition("/")[0]))
            return layout if layout is not None and layout.shape == shape else None

        return like

    def _result(self) -> FitResult:
        """Leave the networks that are kept in place."""
        trainer, taught, best, metric = self.trainer, None, self.selection.best, self.selection.metric
        if trainer.teacher is not None:
            with self._held("teacher") as kept:
                taught = weights_of(kept)
            load_whole(trainer.teacher, taught)
        if not best.weights:
            with self._held("student") as kept:
                value, step = self.seen.get(self.selection.row), self.ended or self.options.steps
                best = Best(value, step, weights_of(kept))
        load_whole(trainer.student, best.weights)
        # The first of several processes knows the rows of the earlier parts of a fit that was resumed.
        history = self.ranks.gathered(self.records.history)[0]
        return FitResult(best.value, best.step, best.weights, taught, history, None if metric is None else metric.name)
