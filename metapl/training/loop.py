"""The loop: batches in, steps taken, what they showed recorded, checkpoints out.

It does not know what a step does. It is resumed by position: what is drawn, scheduled and measured is a function of
the step's number and of what a checkpoint holds, so a run that was killed ends bit for bit as one that was not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils import _pytree as pytree

from metapl.data.feed import Feed, feed
from metapl.data.steps import StepBatches, in_memory
from metapl.errors import MetaplError, few
from metapl.execution.batch import as_tensors, digest, plain
from metapl.execution.checks import Fault
from metapl.execution.ranks import Ranks
from metapl.execution.shards import gathered, is_sharded, load_whole, local
from metapl.execution.state import RandomState, replayed
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.report import Say
from metapl.metrics.metric import Metric
from metapl.metrics.predictions import outer_batches
from metapl.runs import checkpoint_parts
from metapl.runs.folder import Folder
from metapl.runs.generators import rng_state, set_rng_state
from metapl.runs.progress import progress
from metapl.training.options import FitOptions, Rates
from metapl.training.records import Records, figures
from metapl.training.selection import Average, metric_for, weights_of
from metapl.training.stopping import Callback, Interrupted, StopFit, stop_requests

# Options of a fit, and settings of an optimizer, that do not decide where it goes; the rate is compared as the schedule
# found it.
FREE = ("validate_every", "log_every", "save_every", "keep", "num_workers", "phase")
OF_SPEED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names")


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with.

    Args:
        value: of the metric, of the student that is kept on the validation data; None without these.
        step: the number of steps after which it was as it is kept: the best by validation, or the last.
        weights: of that student; they are in the student now.
        teacher_weights: of the teacher after the last step, averaged where the student is; they are in the teacher now.
        history: the recorded rows in their order, each with its ``step``, of earlier parts of the fit too.
        metric: its name: ``"accuracy"``, whose value is a fraction, ``"loss"``, or that of the metric that was given.
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


class Fit:
    """A fit as it goes; for what it is given see :meth:`metapl.training.Trainer.fit`."""

    def __init__(
        self,
        trainer: Any,
        options: FitOptions,
        given: Mapping[str, Any],
        batch_size: int | None,
        validation: Any,
        metric: Metric | None,
        out: Folder | None,
        resume: bool | Literal["anyway"],
        shown: bool,
        say: Say,
        callbacks: Sequence[Callback],
    ) -> None:
        ranks, networks = trainer.ranks, trainer.networks
        if options.wait and trainer.teacher is None:
            raise MetaplError(f"wait={options.wait} was given, and there is no teacher to train; expected wait=0.")
        if not ranks.first:  # of several processes, the first shows and writes
            out, shown, say = None, False, lambda text: None
        self.trainer, self.options, self.ranks, self.networks = trainer, options, ranks, networks
        self.out, self.resume, self.shown, self.say, self.callbacks = out, resume, shown, say, callbacks
        # Perhaps only the first knows of the run.
        self.saves, self.resumes = ranks.any(out is not None), ranks.any(bool(resume))
        if self.resumes and not self.saves:
            raise MetaplError("resume was given without out; expected the folder of the run to go on with.")
        self.sources: dict[str, Any] = {
            name: in_memory(source, name, batch_size, trainer.dtype, stream=i)
            for i, (name, source) in enumerate(given.items())
            if source is not None
        }
        decay, self.validation = options.ema_decay, as_tensors(validation, trainer.dtype)
        self.averages = {} if decay is None else {role: Average(network, decay) for role, network in networks.items()}
        self.metric = metric_for(trainer, self.validation, metric, options.select)
        self.rates = Rates(trainer, options)
        self.stateful: list[Any] = [callback for callback in callbacks if hasattr(callback, "state_dict")]

        self.done, self.ended = 0, False  # steps; and whether a callback has ended it
        self.seen: dict[str, float] = {}  # the last values on validation data
        self.best: dict[str, Any] = {"value": None, "step": 0, "weights": {}}  # the best student, the latest of equals
        self.data: dict[str, Any] = {}  # what is known of the sources
        self.faults: list[tuple[int, Fault]] = []  # of steps, on the device until something is read anyway
        self.saved: Path | None = None  # the last checkpoint
        self.feeds: dict[str, Feed] = {}
        self.checkpoints: Any = None  # of the first process,
        self.parts: checkpoint_parts.PartsWriter | None = None  # or of all, where networks are sharded over them
        self.records: Records

    def run(self) -> FitResult:
        options, ranks = self.options, self.ranks
        with ExitStack() as ending:
            self.open(ending)
            try:
                self.go_on()
                stop, stops = ending.enter_context(stop_requests()), False
                shown = progress(self.shown, name=options.phase, start=self.done, steps=options.steps)
                bar = ending.enter_context(shown)
                self.records = Records(self.out, options.phase, self.done, self.say)
                ending.callback(self.records.close)
                while self.done < options.steps and not self.ended and not stops:
                    waits = self.done < options.wait
                    labeled, unlabeled = self.batches(waits)
                    report = self.step(labeled, unlabeled, waits)
                    row = self.record(report, labeled, waits)
                    if (value := row.get(self.chosen_by)) is not None:
                        bar.set_postfix_str(f"validation {value:.4g}", refresh=False)
                    bar.update()
                    if due := self.ended or options.due(options.save_every, self.done):
                        self.save()
                    # Several processes agree on a stop where numbers are read anyway.
                    stops = (ranks.alone or options.due(options.log_every, self.done)) and ranks.any(bool(stop))
                    if stops and not due:
                        self.save()
                if self.parts is not None:
                    self.saved = self.parts.finished() or self.saved
            except MetaplError as error:
                if self.saved:
                    raise MetaplError(f"{error} (the last good checkpoint is {self.saved})") from error
                raise
        if stops or stop:
            raise Interrupted(self.done, (*stop, signal.SIGTERM)[0], self.saved)
        return self.result()

    # ------------------------------------------------------------------------------------------------ start, or resume

    def open(self, ending: ExitStack) -> None:
        """Own the folder and begin the feeds, until ``ending``."""
        ranks, options = self.ranks, self.options
        if self.out is not None:
            ending.enter_context(self.out.held())
            self.checkpoints = self.out.checkpoints(options.phase, options.keep)
        with ranks.agreed(waiting=True):
            if self.checkpoints is not None and self.checkpoints.paths() and not self.resumes:
                otherwise = "go on with resume=True, or give another out or phase."
                raise MetaplError(f"{self.checkpoints.folder} holds checkpoints already; {otherwise}")
        # Where networks are sharded over all processes of the job, each writes its part; elsewhere the first process
        # has everything, or could not say who else writes.
        weights = [p for network in self.networks.values() for p in network.parameters()]
        if self.saves and not ranks.alone and any(map(is_sharded, weights)):
            place = ranks.gathered(self.checkpoints and str(self.checkpoints.folder.resolve()))[0]
            if ranks.processes == dist.get_world_size():
                self.parts = checkpoint_parts.PartsWriter(Path(place), options.keep)
                ending.callback(self.parts.close)
        how: dict[str, Any] = {"num_workers": options.num_workers, "device": self.trainer.device}
        for name, source in self.sources.items():
            last = options.steps * (self.trainer.lookahead if name == "unlabeled" else 1)
            self.feeds[name] = feed(source, name=name, stop=last, **how)
            ending.callback(self.feeds[name].close)
        ending.callback(self.rates.move, None)

    def go_on(self) -> None:
        """Take over what the newest whole checkpoint has, if the fit is to be resumed and there is one."""
        ranks, phase, found = self.ranks, self.options.phase, None
        with ranks.agreed(waiting=True):
            if self.resumes and self.checkpoints is not None:  # the first process finds it, and all read it
                found = self.checkpoints.newest(checkpoint_parts.check)
        path = ranks.gathered(found and found.path)[0]
        if path is not None:
            with ranks.agreed(waiting=True):
                like = {} if self.parts is None else layouts(self.trainer, self.averages)
                self.load(path, (found and found.state) or checkpoint_parts.load(path, like))
            self.say(f"resumed at step {self.done}{'' if phase == 'fit' else f' of phase {phase}'}")
        elif self.resumes:
            self.say(f"no checkpoint of phase {phase} yet: it begins at its first step")

    def load(self, path: Path, state: Any) -> None:
        """Take over a checkpoint's state; one of a fit that was begun otherwise is refused."""
        own = own_state(state["ranks"], self.trainer, path, [*self.sources.values()])
        if state["step"] > self.options.steps:
            raise MetaplError(f"{path} has done {state['step']} steps; expected steps={state['step']} or more.")
        begun = {name: one.state() for name, one in self.feeds.items()}
        for name in self.feeds:
            self.draw(name)  # the first batch, by which other data are known
        before, now = own["compared"], self.compared()
        names = [name for name in before | now if before.get(name) != now.get(name)]
        if names and self.resume != "anyway":
            changed = few([f"{name} was {before.get(name)}, now {now.get(name)}" for name in names])
            raise MetaplError(f"{path} was begun otherwise ({changed}); or give resume='anyway'.")
        for callback, its in zip(self.stateful, state["callbacks"], strict=False):
            callback.load_state_dict(its)
        self.trainer.load_state_dict(state["trainer"] | {"generator": own["generator"]})
        for role, average in self.averages.items():
            average.load_state_dict(state["averages"][role])
        self.done, self.ended, self.seen, self.best = state["step"], state["ended"], state["seen"], state["best"]
        self.saved = path
        for name, one in self.feeds.items():
            one.restore(own["feeds"].get(name, begun[name]))
        set_rng_state(own["rng"])  # last: what comes before may draw

    def compared(self) -> dict[str, str]:
        """What two parts of a fit have in common, by name: sources, options, settings, callbacks with a state."""
        options, trainer, metric = self.options, self.trainer, self.metric
        # The digests are on their device until here.
        of_data = {f"{name}.{key}": value for name, known in self.data.items() for key, value in known.items()}
        found = {name: int(value) if torch.is_tensor(value) else value for name, value in of_data.items()}
        found |= {name: value for name, value in vars(options).items() if name not in FREE}
        if options.schedule == "constant" or options.decay_every is not None:
            del found["steps"]  # the rates do not depend on it
        found |= {"trainer": type(trainer).__name__, "dtype": trainer.dtype, **trainer.settings()}
        found |= {"validation metric": metric and (metric.name, metric.better)}
        found |= {"callbacks": [type(callback).__name__ for callback in self.stateful]}
        for name, optimizer in self.rates.optimizers.items():
            for i, (group, rate) in enumerate(zip(optimizer.param_groups, self.rates.base[name], strict=False)):
                of = {key: value for key, value in group.items() if key not in OF_SPEED}
                of |= {"optimizer": type(optimizer).__name__, "lr": float(rate), "parameters": len(group["params"])}
                found |= {f"{name.removesuffix('_lr')}.{i}.{key}": value for key, value in of.items()}
        # A frozen dataclass shows its fields; other values may show where they are in memory.
        return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in found.items()}

    # ---------------------------------------------------------------------------------------------------------- a step

    def batches(self, waits: bool) -> tuple[Any, Any]:
        """The labeled batch of a step, and its unlabeled one, a look-ahead, or None."""
        labeled = self.draw("labeled")
        if "unlabeled" not in self.feeds:
            return labeled, None
        # The student that waits takes no steps to look ahead. Copies, for a source may fill the memory of one batch
        # with the next.
        more = range(0 if waits else self.trainer.lookahead - 1)
        ahead = [pytree.tree_map_only(Tensor, Tensor.clone, plain(self.draw("unlabeled"))) for _ in more]
        unlabeled = self.draw("unlabeled")
        return labeled, Lookahead([*ahead, unlabeled]) if ahead else unlabeled

    def draw(self, name: str) -> Any:
        batch = self.feeds[name].next()
        if name not in self.data:
            self.data[name] = about(self.sources[name], batch)
        return batch

    def step(self, labeled: Any, unlabeled: Any, waits: bool) -> Any:
        trainer = self.trainer
        self.rates.move(self.done)
        if self.options.warm_start and self.done == self.options.wait and trainer.teacher is not None:
            with self.kept("teacher") as teacher:
                load_whole(trainer.student, weights_of(teacher))
            if self.options.ema_decay is not None:
                self.averages["student"] = Average(trainer.student, self.options.ema_decay)
        try:
            report = (trainer.teacher_step if waits else trainer.step)(labeled, unlabeled)
        except MetaplError as error:
            self.refuse_bad()  # what went wrong before is the reason
            raise MetaplError(f"step {self.done + 1}: {error}") from error
        self.done += 1
        if report.fault.findings:
            self.faults.append((self.done, report.fault))
        for role, average in self.averages.items():
            if not (waits and role == "student"):
                average.update()
        return report

    def refuse_bad(self) -> None:
        """Stop where a step so far went wrong, or the weights after it are not finite."""
        for number, fault in self.faults:
            fault.raise_if_found(f"step {number}: ")
        self.faults.clear()
        weights = [local(p.detach()) for network in self.networks.values() for p in network.parameters()]
        if self.ranks.any(not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())):
            raise MetaplError(f"weights were NaN or infinite after step {self.done}; lower the learning rates.")

    def record(self, report: Any, labeled: Any, waits: bool) -> dict[str, float]:
        """Record what a step showed, if it is due: the row, or nothing."""
        options, row = self.options, dict[str, float]()
        logged, validated = (options.due(every, self.done) for every in (options.log_every, options.validate_every))
        if logged or validated:
            self.refuse_bad()
        if logged:
            row |= report.as_dict() | self.rates.now()
            if hasattr(report, "signal"):
                scalars = figures(report, self.trainer.problem, labeled, self.ranks)
                values = torch.stack([t.double() for t in scalars.values()]).tolist()
                row |= dict(zip(scalars, values, strict=True))
        if validated:
            row |= self.look()
        if not row:
            return row
        row = {"step": self.done} | row
        try:
            reasons = []
            for callback in self.callbacks:
                # Observing must not change the run: a DataLoader, for one, draws from the default generator.
                with replayed(RandomState.now(self.trainer.device)):
                    try:
                        found = callback(self.done, dict(row), self.trainer)
                        row |= found if isinstance(found, Mapping) else {}
                    except StopFit as stop:
                        reasons.append(str(stop))
            if reasons:
                self.ended, reason = True, "; ".join(filter(None, reasons))
                late = "; the student is untrained: it would have begun later" * waits
                self.say(f"stopped after step {self.done} by a callback{': ' * bool(reason)}{reason}{late}")
                row |= {} if validated else self.look()  # as the last step of any fit
        finally:  # what a callback raises comes out, and the step was done
            self.records.add(row)
        return row

    @property
    def chosen_by(self) -> str:
        return "" if self.metric is None else f"student_validation_{self.metric.name}"

    def kept(self, role: str) -> AbstractContextManager[Any]:
        """What is validated and kept: the averaged network in a block, or the network."""
        return self.averages[role].held() if role in self.averages else nullcontext(self.networks[role])

    def look(self) -> dict[str, float]:
        """Measure the networks as they are now, and remember the best student."""
        metric, trainer = self.metric, self.trainer
        self.seen = {}
        for role in self.networks:
            # A teacher that weighs examples, say, has no accuracy.
            measured = trainer.teacher_classifies if role == "teacher" else self.done > self.options.wait
            if metric is None or not measured:
                continue
            # A DataLoader draws from the default generator; looking must not change the training.
            with self.kept(role) as network, replayed(RandomState.now(trainer.device)):
                batches = outer_batches(self.validation, trainer.read_outer, trainer.device, "validation")
                of = f"the {role} on validation data after step {self.done}"
                value = metric.measured(trainer, network, batches, of).value
                if role == "student" and self.options.select and metric.improves(value, self.best["value"]):
                    self.best = {"value": value, "step": self.done, "weights": weights_of(network)}
            self.seen[f"{role}_validation_{metric.name}"] = value
        return self.seen

    # ----------------------------------------------------------------------------------------- checkpoints, and the end

    def save(self) -> None:
        if not self.saves:
            return
        self.refuse_bad()
        state = {
            "step": self.done,
            "trainer": self.trainer.live_state(),
            "averages": {role: average.state_dict() for role, average in self.averages.items()},
            "callbacks": [callback.state_dict() for callback in self.stateful],
            "ended": self.ended,
            "seen": self.seen,
            "best": self.best,
        }
        own = {  # what differs between processes
            "rng": rng_state(),
            "generator": state["trainer"].get("generator"),
            "feeds": {name: one.state() for name, one in self.feeds.items()},
            "compared": self.compared(),
        }
        state["ranks"] = self.ranks.gathered(own)
        state = state if self.ranks.alone or self.parts is not None else gathered(state)
        with self.ranks.agreed(waiting=True):
            self.records.flush()
            if self.checkpoints is not None and self.parts is None:
                self.saved = self.checkpoints.write(self.done, state)
        if self.parts is not None:  # written while the training goes on, when the one before is
            self.saved = self.parts.finished() or self.saved
            self.parts.write(self.done, state)

    def result(self) -> FitResult:
        """Leave the networks that are kept in place."""
        trainer, best, taught = self.trainer, self.best, None
        if trainer.teacher is not None:
            with self.kept("teacher") as network:
                taught = weights_of(network)
            load_whole(trainer.teacher, taught)
        if not best["weights"]:
            with self.kept("student") as network:
                best = {"value": self.seen.get(self.chosen_by), "step": self.done, "weights": weights_of(network)}
        load_whole(trainer.student, best["weights"])
        # The first of several processes knows the rows of the earlier parts of a fit that was resumed.
        history = self.ranks.gathered(self.records.history)[0]
        metric = None if self.metric is None else self.metric.name
        return FitResult(best["value"], best["step"], best["weights"], taught, history, metric)


def about(source: Any, batch: Any) -> dict[str, Any]:
    """How many examples a source has, and how many a batch, where that is known, and the digest of its first batch."""
    if hasattr(source, "whole"):  # of a share
        source, batch = source.whole, source.whole[0]
    examples, held = getattr(source, "examples", None), getattr(source, "dataset", source)
    if examples is None and hasattr(held, "__len__") and not isinstance(held, StepBatches):  # which count steps
        examples = len(held)
    return {"examples": examples, "batch_size": getattr(source, "batch_size", None), "first_batch": digest(batch)}


def own_state(every: list[dict[str, Any]], trainer: Any, file: Path, sources: Sequence[Any]) -> dict[str, Any]:
    """The state of this process among those of each; on another number of processes that of the first one, and where
    the networks have dropout, a default generator seeded anew for each share."""
    ranks: Ranks = trainer.ranks
    if len(every) == ranks.processes:
        return every[ranks.number]
    if ranks.size > 1 and not all(hasattr(source, "whole") for source in sources):
        raise MetaplError(f"{file} is of a fit in {len(every)} processes with sources of their own; expected as many.")
    own, parts = every[0], [part for network in trainer.networks.values() for part in network.modules()]
    if any(isinstance(part, nn.modules.dropout._DropoutNd) for part in parts):
        set_rng_state(own["rng"])
        torch.manual_seed(int(torch.randint(2**62, ())) + ranks.rank)
        own = own | {"rng": rng_state()}
    return own


def layouts(trainer: Any, averages: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded tensors of a fit's state, by their places in it."""
    state = {"trainer": trainer.live_state(), "averages": {role: one.state_dict() for role, one in averages.items()}}
    known = checkpoint_parts.layouts(state)
    # An optimizer's state may not be there yet; it is laid out as its parameters are.
    optimizers = [k for k, value in state["trainer"].items() if isinstance(value, dict) and "param_groups" in value]
    for key, optimizer in zip(optimizers, trainer.schedulable, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known |= {f"trainer/{key}/state/{i}": p for i, p in enumerate(parameters) if is_sharded(p)}
    return known
