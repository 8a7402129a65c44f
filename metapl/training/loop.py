"""The loop: batches in, steps taken, what they showed recorded, checkpoints out.

It does not know what a step does. It is resumed by position: what is drawn, scheduled and measured is a function of
the step's number and of what a checkpoint holds, so a run that was killed ends bit for bit as one that was not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from metapl.data.feed import Feed, feed
from metapl.data.steps import StepBatches, in_memory
from metapl.errors import MetaplError, few
from metapl.execution.batch import as_tensors, digest, length, map_tensors, plain
from metapl.execution.checks import Fault
from metapl.execution.ranks import Ranks
from metapl.execution.shards import gathered, is_sharded, load_whole, local, weights_of
from metapl.execution.state import RandomState, replayed
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.report import Say
from metapl.metrics.metric import ACCURACY, Metric, metric_for
from metapl.metrics.predictions import outer_batches
from metapl.runs.checkpoint import CheckpointFolder, PartsFolder, encoded, load, load_parts, rng_state, set_rng_state
from metapl.runs.folder import Folder, Records
from metapl.runs.terminal import progress, stop_requests
from metapl.training.options import Average, FitOptions, Rates
from metapl.training.outcomes import Outcomes
from metapl.training.records import figures

# Options of a fit, and settings of an optimizer, that do not decide where it goes; the rate is compared as the schedule
# found it.
FREE = ("validate_every", "log_every", "save_every", "keep", "num_workers", "phase")
OF_SPEED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names")

# How far, in accuracy, a teacher may end below its best validation and still be kept as it is after the last step.
FAR_BEHIND = 0.3

Callback = Callable[[int, Mapping[str, float], Any], object]
"""Called with the number of steps done, the row recorded after them and the trainer; a dict of numbers
that it returns becomes part of the row.

An object with ``state_dict()`` and ``load_state_dict(state)`` beside its ``__call__`` is saved in the checkpoints and
goes on where it was when the fit is resumed.
"""


class StopFit(Exception):
    """Raised by a callback to end the fit after the step at hand, as if it had been the last one.

    The student is then chosen as at the end of any fit, a checkpoint is written, the text is shown, and the fit counts
    as finished when it is resumed. During ``wait`` the student has not begun, and is returned untrained.

    >>> import torch, metapl
    >>> def stop_at_small_loss(step, row, trainer):
    ...     if row["loss"] < 0.1:
    ...         raise metapl.StopFit(f"the loss is {row['loss']:.2f}")

    To stop once the validation has not become better for a while, a callback counts, and keeps its count in the
    checkpoints:

    >>> class Patience:
    ...     best, since = float("-inf"), 0
    ...     def __call__(self, step, row, trainer):
    ...         if "student_validation_accuracy" in row:
    ...             value = row["student_validation_accuracy"]
    ...             self.best, self.since = (value, 0) if value > self.best else (self.best, self.since + 1)
    ...             if self.since == 5:
    ...                 raise metapl.StopFit("five validations without a better one")
    ...     def state_dict(self):
    ...         return dict(vars(self))
    ...     def load_state_dict(self, state):
    ...         vars(self).update(state)
    """


class Interrupted(KeyboardInterrupt):
    """A fit that was asked to stop (Ctrl-C, SIGTERM, SIGHUP); what was done is saved, if there is where."""

    def __init__(self, step: int, signal_number: int, saved: Path | None) -> None:
        where = f"saved to {saved}" if saved else "nothing saved: fit was given no out"
        super().__init__(f"stopped after step {step}; {where}")
        self.step, self.signal_number, self.saved = step, signal_number, saved


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with.

    Args:
        value: of the metric, of the student that is kept on the validation data; None without these.
        step: the number of steps after which it was as it is kept: the best by validation, or the last.
        weights: of that student; they are in the student now.
        teacher_weights: of the teacher after the last step, averaged where the student is; they are in the teacher now.
            Where students are selected by accuracy, and the teacher ends 30 points below its best validation, they are
            those that it had then.
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


@dataclass
class Progress:
    """How far a fit is, as its checkpoints have it."""

    step: int = 0  # the steps that are done
    ended: bool = False  # by a callback
    seen: dict[str, float] = field(default_factory=dict)  # the last values on validation data
    best: dict[str, Any] = field(default_factory=lambda: {"value": None, "step": 0, "weights": {}})  # the best student
    # The best teacher by accuracy, which is kept only where the last one is far behind it.
    best_teacher: dict[str, Any] = field(default_factory=lambda: {"value": None, "step": 0, "weights": {}})


def fit(
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
) -> FitResult:
    """A fit; for what it is given see :meth:`metapl.training.Trainer.fit`."""
    ranks, networks, phase = trainer.ranks, trainer.networks, options.phase
    if options.wait and trainer.teacher is None:
        raise MetaplError(f"wait={options.wait} was given, and there is no teacher to train; expected wait=0.")
    # The student learns alone in the steps before this one, and after those of ``wait``.
    teacher_begins = options.wait + trainer.first_steps(options)
    if not ranks.first:  # of several processes, the first shows and writes
        out, shown, say = None, False, lambda text: None
    # Perhaps only the first knows of the run.
    saves, resumes = ranks.any(out is not None), ranks.any(bool(resume))
    if resumes and not saves:
        raise MetaplError("resume was given without out; expected the folder of the run to go on with.")
    sources: dict[str, Any] = {
        name: in_memory(source, name, batch_size, trainer.dtype, stream=i)
        for i, (name, source) in enumerate(given.items())
        if source is not None
    }
    decay, held_out, rates = options.ema_decay, as_tensors(validation, trainer.dtype), Rates(trainer, options)
    averages = {} if decay is None else {role: Average(network, decay) for role, network in networks.items()}
    measure = metric_for(trainer, held_out, metric, options.select)
    selects_teacher = options.select and measure is ACCURACY
    chosen_by = "" if measure is None else f"student_validation_{measure.name}"
    stateful: list[Any] = [callback for callback in callbacks if hasattr(callback, "state_dict")]
    feeds: dict[str, Feed] = {}
    known: dict[str, dict[str, Any]] = {}  # of each source: how many examples it has, and its first batch
    faults: list[tuple[int, Fault]] = []  # of steps, on the device until something is read anyway
    checkpoints: CheckpointFolder | None = None  # of the first process; of all, where each writes its part
    now = Progress()
    outcomes = Outcomes(trainer, options, say)

    def draw(name: str) -> Any:
        batch = feeds[name].next()
        if name not in known:
            known[name] = about(sources[name], batch)
        return batch

    def kept(role: str) -> AbstractContextManager[Any]:
        """What is validated and kept: the averaged network in a block, or the network."""
        return averages[role].held() if role in averages else nullcontext(networks[role])

    def refuse_bad() -> None:
        """Stop where a step so far went wrong, or the weights after it are not finite."""
        for number, fault in faults:
            fault.raise_if_found(f"step {number}: ")
        faults.clear()
        weights = [local(p.detach()) for network in networks.values() for p in network.parameters()]
        if ranks.any(not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())):
            raise MetaplError(f"weights were NaN or infinite after step {now.step}; lower the learning rates.")

    def look() -> dict[str, float]:
        """Measure the networks as they are now, and remember the best student, the latest of equals."""
        now.seen = {}
        for role in networks:
            # A teacher that weighs examples, say, has no accuracy.
            is_judged = trainer.teacher_classifies if role == "teacher" else now.step > options.wait
            if measure is None or not is_judged:
                continue
            # A DataLoader draws from the default generator; looking must not change the training.
            with kept(role) as network, replayed(RandomState.now(trainer.device)):
                batches = outer_batches(held_out, trainer.read_outer, trainer.device, "validation")
                of = f"the {role} on validation data after step {now.step}"
                measured = measure.measured(trainer, network, batches, of)
                outcomes.validated(now.step, role, measured)
                value = measured.value
                if role == "student" and options.select and measure.improves(value, now.best["value"]):
                    now.best = {"value": value, "step": now.step, "weights": weights_of(network)}
                if role == "teacher" and selects_teacher and measure.improves(value, now.best_teacher["value"]):
                    now.best_teacher = {"value": value, "step": now.step, "weights": weights_of(network)}
            now.seen[f"{role}_validation_{measure.name}"] = value
        return now.seen

    def compared() -> dict[str, str]:
        """What two parts of a fit have in common, by name: sources, options, settings, callbacks with a state."""
        found: dict[str, Any] = {f"{name}.{key}": value for name, of in known.items() for key, value in of.items()}
        # The digests are on their device until here.
        found = {name: int(value) if torch.is_tensor(value) else value for name, value in found.items()}
        found |= {name: value for name, value in vars(options).items() if name not in FREE}
        # By steps where the problem says how many; a fit without them, as by earlier versions, has no such entry.
        del found["first_steps"]
        if teacher_begins > options.wait:
            found["first_steps"] = teacher_begins - options.wait
        if options.schedule == "constant" or options.decay_every is not None:
            del found["steps"]  # the rates do not depend on it
        found |= {"trainer": type(trainer).__name__, "dtype": trainer.dtype, **trainer.settings()}
        found |= {"validation metric": measure and (measure.name, measure.better)}
        found |= {"callbacks": [type(callback).__name__ for callback in stateful]}
        for name, optimizer in rates.optimizers.items():
            for i, (group, rate) in enumerate(zip(optimizer.param_groups, rates.base[name], strict=False)):
                of = {key: value for key, value in group.items() if key not in OF_SPEED}
                of |= {"optimizer": type(optimizer).__name__, "lr": float(rate), "parameters": len(group["params"])}
                found |= {f"{name.removesuffix('_lr')}.{i}.{key}": value for key, value in of.items()}
        # A frozen dataclass shows its fields; other values may show where they are in memory.
        return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in found.items()}

    def live_state() -> dict[str, Any]:
        own = {role: average.state_dict() for role, average in averages.items()}
        return {"trainer": trainer.live_state(), "averages": own}

    def save() -> None:
        if not saves:
            return
        refuse_bad()
        state = {**vars(now), **live_state(), "callbacks": [callback.state_dict() for callback in stateful]}
        state["outcomes"] = outcomes.state_dict()
        own = {  # what differs between processes
            "rng": rng_state(),
            "generator": state["trainer"].get("generator"),
            "feeds": {name: one.state() for name, one in feeds.items()},
            "compared": compared(),
        }
        state["ranks"] = ranks.gathered(own)
        if not (ranks.alone or isinstance(checkpoints, PartsFolder)):
            state = gathered(state)
        with ranks.agreed(waiting=True):
            records.flush()
        with ranks.agreed(waiting=True):
            if checkpoints is not None:
                checkpoints.write(now.step, state)

    with ExitStack() as ending:
        # Own the folder.
        if out is not None:
            ending.enter_context(out.held())
            checkpoints = CheckpointFolder(out.path / "checkpoints" / phase, options.keep)
        with ranks.agreed(waiting=True):
            if checkpoints is not None and checkpoints.paths() and not resumes:
                otherwise = "go on with resume=True, or give another out or phase."
                raise MetaplError(f"{checkpoints.folder} holds checkpoints already; {otherwise}")
        # Where networks are sharded over all processes of the job, each writes its part; elsewhere the first process
        # has everything, or could not say who else writes.
        weights = [p for network in networks.values() for p in network.parameters()]
        if saves and not ranks.alone and any(map(is_sharded, weights)):
            place = ranks.gathered(checkpoints and str(checkpoints.folder.resolve()))[0]
            if ranks.processes == dist.get_world_size():
                checkpoints = PartsFolder(place, options.keep)
                ending.callback(checkpoints.close)
        # Begin the feeds.
        for name, source in sources.items():
            last = options.steps * (trainer.lookahead if name == "unlabeled" else 1)
            how: dict[str, Any] = {"num_workers": options.num_workers, "device": trainer.device}
            feeds[name] = feed(source, name=name, stop=last, **how)
            ending.callback(feeds[name].close)
        ending.callback(rates.move, None)
        if hasattr(trainer, "measures_feedback"):
            ending.callback(setattr, trainer, "measures_feedback", False)
        try:
            # Take over what the newest whole checkpoint has: the first process finds it, and all read it.
            found = None
            with ranks.agreed(waiting=True):
                if resumes and ranks.first and checkpoints is not None:
                    found = checkpoints.newest()
            path: Path | None = ranks.gathered(found and found.path)[0]
            if path is not None:
                with ranks.agreed(waiting=True):
                    state = None if found is None else found.state
                    if state is None:
                        like = sharded(live_state(), trainer) if isinstance(checkpoints, PartsFolder) else {}
                        state = load_parts(path, like) if path.is_dir() else load(path)
                    own = own_state(state["ranks"], trainer, path, [*sources.values()])
                    if state["step"] > options.steps:
                        raise MetaplError(
                            f"{path} has done {state['step']} steps; expected steps={state['step']} or more."
                        )
                    begun = {name: one.state() for name, one in feeds.items()}
                    for name in feeds:
                        draw(name)  # the first batch, by which other data are known
                    before, after = own["compared"], compared()
                    names = [name for name in before | after if before.get(name) != after.get(name)]
                    if names and resume != "anyway":
                        changed = few([f"{name} was {before.get(name)}, now {after.get(name)}" for name in names])
                        raise MetaplError(f"{path} was begun otherwise ({changed}); or give resume='anyway'.")
                    for callback, its in zip(stateful, state["callbacks"], strict=False):
                        callback.load_state_dict(its)
                    trainer.load_state_dict(state["trainer"] | {"generator": own["generator"]})
                    for role, average in averages.items():
                        average.load_state_dict(state["averages"][role])
                    now = Progress(**{name: state[name] for name in vars(now) if name in state})
                    outcomes.load_state_dict(state.get("outcomes", {}))
                    if checkpoints is not None:
                        checkpoints.last = path
                    for name, one in feeds.items():
                        one.restore(own["feeds"].get(name, begun[name]))
                    set_rng_state(own["rng"])  # last: what comes before may draw
                say(f"resumed at step {now.step}{'' if phase == 'fit' else f' of phase {phase}'}")
            elif resumes:
                say(f"no checkpoint of phase {phase} yet: it begins at its first step")
            stop, stops = ending.enter_context(stop_requests()), False
            bar = ending.enter_context(progress(shown, name=phase, start=now.step, steps=options.steps))
            records = Records(None if out is None else out.path, phase, now.step, say)
            ending.callback(records.close)
            while now.step < options.steps and not now.ended and not stops:
                # The batches of a step; nobody looks ahead where the student waits, or learns alone.
                waits = now.step < options.wait
                is_first = options.wait <= now.step < teacher_begins
                labeled, unlabeled = draw("labeled"), None
                if "unlabeled" in feeds:
                    # Copies, for a source may fill the memory of one batch with the next.
                    more = range(0 if waits or is_first else trainer.lookahead - 1)
                    ahead = [map_tensors(Tensor.clone, plain(draw("unlabeled"))) for _ in more]
                    unlabeled = draw("unlabeled")
                    unlabeled = Lookahead([*ahead, unlabeled]) if ahead else unlabeled
                # The step.
                rates.move(now.step)
                if options.warm_start and now.step == options.wait and trainer.teacher is not None:
                    with kept("teacher") as teacher:
                        load_whole(trainer.student, weights_of(teacher))
                    if decay is not None:
                        averages["student"] = Average(trainer.student, decay)
                if hasattr(trainer, "measures_feedback"):
                    trainer.measures_feedback = options.due(options.log_every, now.step + 1)
                take_step = trainer.step
                if waits:
                    take_step = trainer.teacher_step
                elif is_first:
                    take_step = trainer.first_step
                try:
                    report = take_step(labeled, unlabeled)
                except MetaplError as error:
                    refuse_bad()  # what went wrong before is the reason
                    raise MetaplError(f"step {now.step + 1}: {error}") from error
                now.step += 1
                if report.fault.findings:
                    faults.append((now.step, report.fault))
                for role, average in averages.items():
                    if not (waits and role == "student"):
                        average.update()
                # What it showed.
                logged, validated = (options.due(n, now.step) for n in (options.log_every, options.validate_every))
                row: dict[str, float] = {"step": now.step}
                if logged or validated:
                    refuse_bad()
                if logged:
                    row |= report.as_dict() | rates.now()
                    if hasattr(report, "signal"):
                        scalars = figures(report, trainer.problem, labeled, ranks)
                        values = torch.stack([t.double() for t in scalars.values()]).tolist()
                        row |= dict(zip(scalars, values, strict=True))
                        examples = ranks.size * len(report.student_outputs)
                        outcomes.recorded(now.step, row, examples, labeled=ranks.size * length(labeled))
                if validated:
                    row |= look()
                if len(row) > 1:  # the step alone is nothing to record
                    reasons = []
                    try:
                        for callback in callbacks:
                            # Observing must not change the run: a DataLoader, for one, draws from the generators.
                            with replayed(RandomState.now(trainer.device)):
                                try:
                                    numbers = callback(now.step, dict(row), trainer)
                                    row |= numbers if isinstance(numbers, Mapping) else {}
                                except StopFit as ends:
                                    reasons.append(str(ends))
                        if reasons:
                            now.ended, reason = True, "; ".join(filter(None, reasons))
                            late = "; the student is untrained: it would have begun later" * waits
                            say(f"stopped after step {now.step} by a callback{': ' * bool(reason)}{reason}{late}")
                            row |= {} if validated else look()  # as the last step of any fit
                    finally:  # what a callback raises comes out, and the step was done
                        records.add(row)
                if chosen_by in row:
                    bar.set_postfix_str(f"validation {row[chosen_by]:.4g}", refresh=False)
                bar.update()
                if due := now.ended or options.due(options.save_every, now.step):
                    save()
                # Several processes agree on a stop where numbers are read anyway.
                stops = (ranks.alone or options.due(options.log_every, now.step)) and ranks.any(bool(stop))
                if stops and not due:
                    save()
            if checkpoints is not None:
                checkpoints.finish()
        except MetaplError as error:
            if checkpoints is not None and checkpoints.last:
                raise MetaplError(f"{error} (the last good checkpoint is {checkpoints.last})") from error
            raise
    if stops or stop:
        raise Interrupted(now.step, (*stop, signal.SIGTERM)[0], None if checkpoints is None else checkpoints.last)
    # Leave the networks that are kept in place.
    best, taught = now.best, None
    if trainer.teacher is not None:
        with kept("teacher") as network:
            taught = weights_of(network)
        last_value = now.seen.get("teacher_validation_accuracy")
        best_value = now.best_teacher["value"]
        if last_value is not None and best_value is not None and best_value - last_value >= FAR_BEHIND:
            taught = now.best_teacher["weights"]
            say(
                f"the teacher is kept as it was after step {now.best_teacher['step']:,}, with {best_value:.1%} on the "
                f"validation data: after the last step it has {last_value:.1%}"
            )
        load_whole(trainer.teacher, taught)
    if not best["weights"]:
        with kept("student") as network:
            best = {"value": now.seen.get(chosen_by), "step": now.step, "weights": weights_of(network)}
    load_whole(trainer.student, best["weights"])
    # The first of several processes knows the rows of the earlier parts of a fit that was resumed.
    history = ranks.gathered(records.history)[0]
    return FitResult(
        best["value"], best["step"], best["weights"], taught, history, None if measure is None else measure.name
    )


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
        return every[0 if ranks.alone else ranks.gathered(dist.get_rank()).index(dist.get_rank())]
    if ranks.size > 1 and not all(hasattr(source, "whole") for source in sources):
        raise MetaplError(f"{file} is of a fit in {len(every)} processes with sources of their own; expected as many.")
    own, parts = every[0], [part for network in trainer.networks.values() for part in network.modules()]
    if any(isinstance(part, nn.modules.dropout._DropoutNd) for part in parts):
        set_rng_state(own["rng"])
        torch.manual_seed(int(torch.randint(2**62, ())) + ranks.rank)
        own = own | {"rng": rng_state()}
    return own


def sharded(state: dict[str, Any], trainer: Any) -> dict[str, Any]:
    """The sharded tensors of a fit's state, by their places in it."""
    known: dict[str, Any] = {}
    encoded(state, known)
    known = {place: t for place, t in known.items() if is_sharded(t)}
    # An optimizer's state may not be there yet; it is laid out as its parameters are.
    optimizers = [k for k, value in state["trainer"].items() if isinstance(value, dict) and "param_groups" in value]
    for key, optimizer in zip(optimizers, trainer.schedulable, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known |= {f"trainer/{key}/state/{i}": p for i, p in enumerate(parameters) if is_sharded(p)}
    return known
