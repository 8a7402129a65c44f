"""The loop: batches in, steps taken, what they showed recorded, checkpoints out.

It does not know what a step does. It is resumed by position: what is drawn, scheduled and measured is a function of
the step's number and of what a checkpoint holds, so a run that was killed ends bit for bit as one that was not.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.batch import as_tensors, digest, plain
from metapl.execution.checks import Fault
from metapl.execution.ranks import Ranks
from metapl.execution.rng import RandomState, replayed
from metapl.execution.shards import gathered, is_sharded, load_whole, local
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
from metapl.training.stopping import Callback, Interrupted, call, stop_requests

if TYPE_CHECKING:
    from metapl.data.feed import Feed

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
    """Take the steps of a fit; for the arguments see :meth:`metapl.training.Trainer.fit`."""
    from metapl.data.feed import feed
    from metapl.data.steps import in_memory  # needed for fitting only

    ranks, networks, steps, wait, phase = trainer.ranks, trainer.networks, options.steps, options.wait, options.phase
    if wait and trainer.teacher is None:
        raise MetaplError(f"wait={wait} was given, and there is no teacher to train; expected wait=0.")
    if not ranks.first:  # of several processes, the first shows and writes
        out, shown, say = None, False, lambda text: None
    saves, resumes = ranks.any(out is not None), ranks.any(bool(resume))  # perhaps only the first knows of the run
    if resumes and not saves:
        raise MetaplError("resume was given without out; expected the folder of the run to go on with.")
    sources: dict[str, Any] = {
        name: in_memory(source, name, batch_size, trainer.dtype, stream=i)
        for i, (name, source) in enumerate(given.items())
        if source is not None
    }
    decay, validation = options.ema_decay, as_tensors(validation, trainer.dtype)
    averages = {} if decay is None else {role: Average(network, decay) for role, network in networks.items()}
    metric = metric_for(trainer, validation, metric, options.select)
    chosen_by = "" if metric is None else f"student_validation_{metric.name}"
    rates = Rates(trainer, options)
    stateful: list[Any] = [callback for callback in callbacks if hasattr(callback, "state_dict")]

    ended = False  # by a callback
    seen: dict[str, float] = {}  # the last values on validation data,
    examples: int | None = None  # and of how many
    best: dict[str, Any] = {"value": None, "step": 0, "weights": {}}  # the best student, the latest of equals
    data: dict[str, Any] = {}  # what is known of the sources
    faults: list[tuple[int, Fault]] = []  # of steps, on the device until something is read anyway
    saved: Path | None = None  # the last checkpoint

    def new_feed(name: str) -> Feed:
        last = steps * (trainer.lookahead if name == "unlabeled" else 1)
        return feed(sources[name], name=name, stop=last, num_workers=options.num_workers, device=trainer.device)

    def draw(name: str) -> Any:
        batch = feeds[name].next()
        if name not in data:
            data[name] = about(sources[name], batch)
        return batch

    def kept(role: str) -> AbstractContextManager[Any]:
        """What is validated and kept: the averaged network in a block, or the network."""
        return averages[role].held() if role in averages else nullcontext(networks[role])

    def look(step: int) -> dict[str, float]:
        """Measure the networks after so many steps, and remember the best student."""
        nonlocal seen, best, examples
        seen = {}
        for role in networks:
            # A teacher that weighs examples, say, has no accuracy.
            if metric is None or not (trainer.teacher_classifies if role == "teacher" else step > wait):
                continue
            # A DataLoader draws from the default generator; looking must not change the training.
            with kept(role) as network, replayed(RandomState.now(trainer.device)):
                batches = outer_batches(validation, trainer.read_outer, trainer.device, "validation")
                of = f"the {role} on validation data after step {step}"
                found = metric.measured(trainer, network, batches, of)
                if examples not in (None, found.n):
                    say(f"note: validation is on {found.n:,} examples, and was on {examples:,}")
                value, examples = found.value, found.n
                if role == "student" and options.select and metric.improves(value, best["value"]):
                    best = {"value": value, "step": step, "weights": weights_of(network)}
            seen[f"{role}_validation_{metric.name}"] = value
        return seen

    def refuse_bad(step: int) -> None:
        """Stop where a step so far went wrong, or the weights after it are not finite."""
        for number, fault in faults:
            fault.raise_if_found(f"step {number}: ")
        faults.clear()
        weights = [local(p.detach()) for network in networks.values() for p in network.parameters()]
        if ranks.any(not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())):
            raise MetaplError(f"weights were NaN or infinite after step {step}; lower the learning rates.")

    def compared() -> dict[str, str]:
        """What two parts of a fit have in common, by name: sources, options, settings, callbacks with a state."""
        # The digests are on their device until here.
        found = {f"{n}.{key}": int(v) if torch.is_tensor(v) else v for n, of in data.items() for key, v in of.items()}
        found |= {name: value for name, value in vars(options).items() if name not in FREE}
        if options.schedule == "constant" or options.decay_every is not None:
            del found["steps"]  # the rates do not depend on it
        found |= {"trainer": type(trainer).__name__, "dtype": trainer.dtype, **trainer.settings()}
        found |= {"validation metric": metric and (metric.name, metric.better)}
        found |= {"callbacks": [type(callback).__name__ for callback in stateful]}
        for name, optimizer in rates.optimizers.items():
            for i, (group, rate) in enumerate(zip(optimizer.param_groups, rates.base[name], strict=False)):
                of = {key: value for key, value in group.items() if key not in OF_SPEED}
                of |= {"optimizer": type(optimizer).__name__, "lr": float(rate), "parameters": len(group["params"])}
                found |= {f"{name.removesuffix('_lr')}.{i}.{key}": value for key, value in of.items()}
        # A frozen dataclass shows its fields; other values may show where they are in memory.
        return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in found.items()}

    def save(step: int) -> None:
        nonlocal saved
        if not saves:
            return
        refuse_bad(step)
        state = {
            "step": step,
            "trainer": trainer.live_state(),
            "averages": {role: average.state_dict() for role, average in averages.items()},
            "callbacks": [callback.state_dict() for callback in stateful],
            "ended": ended,
            "seen": seen,
            "best": best,
        }
        own = {  # what differs between processes
            "rng": rng_state(),
            "generator": state["trainer"].get("generator"),
            "feeds": {name: one.state() for name, one in feeds.items()},
            "compared": compared(),
        }
        state["ranks"] = ranks.gathered(own)
        state = state if ranks.alone or parts is not None else gathered(state)
        with ranks.agreed(waiting=True):
            records.flush()
            if checkpoints is not None and parts is None:
                saved = checkpoints.write(step, state)
        if parts is not None:  # written while the training goes on, when the one before is
            saved = parts.finished() or saved
            parts.write(step, state)

    with ExitStack() as ending:
        if out is not None:
            ending.enter_context(out.held())
        checkpoints = None if out is None else out.checkpoints(phase, options.keep)
        with ranks.agreed(waiting=True):
            if checkpoints is not None and checkpoints.paths() and not resumes:
                otherwise = "go on with resume=True, or give another out or phase."
                raise MetaplError(f"{checkpoints.folder} holds checkpoints already; {otherwise}")
        # Where networks are sharded over all processes of the job, each writes its part; elsewhere the first process
        # has everything, or could not say who else writes.
        parts: checkpoint_parts.PartsWriter | None = None
        if saves and not ranks.alone and any(is_sharded(p) for one in networks.values() for p in one.parameters()):
            place = ranks.gathered(checkpoints and str(checkpoints.folder.resolve()))[0]
            if ranks.processes == dist.get_world_size():
                parts = checkpoint_parts.PartsWriter(Path(place), options.keep)
                ending.callback(parts.close)
        feeds = {name: new_feed(name) for name in sources}
        for each in feeds.values():
            ending.callback(each.close)
        ending.callback(rates.move, None)

        try:
            # ----------------------------------------------------------------------------------------- start, or resume
            done, found = 0, None
            with ranks.agreed(waiting=True):
                if resumes and checkpoints is not None:  # the first process finds it, and all read it
                    found = checkpoints.newest(checkpoint_parts.check)
            path = ranks.gathered(found and found.path)[0]
            if path is not None:
                with ranks.agreed(waiting=True):
                    like = None if parts is None else layouts(trainer, averages)
                    state = (found and found.state) or checkpoint_parts.load(path, like)
                    done, own = state["step"], own_state(state["ranks"], trainer, path, [*sources.values()])
                    if done > steps:
                        raise MetaplError(f"{path} has done {done} steps; expected steps={done} or more.")
                    for name, source in sources.items():
                        with closing(new_feed(name)) as once:  # whose draws nobody else sees
                            data[name] = about(source, once.next())
                    before, now = own["compared"], compared()
                    names = [name for name in before | now if before.get(name) != now.get(name)]
                    if names and resume != "anyway":
                        changed = few([f"{name} was {before.get(name)}, now {now.get(name)}" for name in names])
                        raise MetaplError(f"{path} was begun otherwise ({changed}); or give resume='anyway'.")
                    for callback, its in zip(stateful, state["callbacks"], strict=False):
                        callback.load_state_dict(its)
                    trainer.load_state_dict(state["trainer"] | {"generator": own["generator"]})
                    for role, average in averages.items():
                        average.load_state_dict(state["averages"][role])
                    ended, seen, best, saved = state["ended"], state["seen"], state["best"], path
                    for name in feeds.keys() & own["feeds"].keys():
                        feeds[name].restore(own["feeds"][name])
                    set_rng_state(own["rng"])  # last: what comes before may draw
                say(f"resumed at step {done}{'' if phase == 'fit' else f' of phase {phase}'}")
            elif resumes:
                say(f"no checkpoint of phase {phase} yet: it begins at its first step")
            stop, stops = ending.enter_context(stop_requests()), False
            bar = ending.enter_context(progress(shown, name=phase, start=done, steps=steps))
            records = Records(out, phase, done, say)
            ending.callback(records.close)

            while done < steps and not ended and not stops:
                # ------------------------------------------------------------------------------------- draw the batches
                waits, labeled, unlabeled = done < wait, draw("labeled"), None
                if "unlabeled" in feeds:
                    # The student that waits takes no steps to look ahead. Copies, for a source may fill the memory of
                    # one batch with the next.
                    more = range(0 if waits else trainer.lookahead - 1)
                    ahead = [pytree.tree_map_only(Tensor, Tensor.clone, plain(draw("unlabeled"))) for _ in more]
                    unlabeled = draw("unlabeled")
                    unlabeled = Lookahead([*ahead, unlabeled]) if ahead else unlabeled

                # ---------------------------------------------------------------------------------------- take the step
                rates.move(done)
                if options.warm_start and done == wait and trainer.teacher is not None:
                    with kept("teacher") as teacher:
                        load_whole(trainer.student, weights_of(teacher))
                    if decay is not None:
                        averages["student"] = Average(trainer.student, decay)
                try:
                    report = (trainer.teacher_step if waits else trainer.step)(labeled, unlabeled)
                except MetaplError as error:
                    refuse_bad(done)  # what went wrong before is the reason
                    raise MetaplError(f"step {done + 1}: {error}") from error
                done += 1
                if report.fault.findings:
                    faults.append((done, report.fault))
                for role, average in averages.items():
                    if not (waits and role == "student"):
                        average.update()

                # -------------------------------------------------------------------------------- record what it showed
                logged, validated = options.due(options.log_every, done), options.due(options.validate_every, done)
                row: dict[str, float] = {}
                if logged or validated:
                    refuse_bad(done)
                if logged:
                    row |= report.as_dict() | rates.now()
                    if hasattr(report, "signal"):
                        scalars = figures(report, trainer.problem, labeled, ranks)
                        values = torch.stack([t.double() for t in scalars.values()]).tolist()
                        row |= dict(zip(scalars, values, strict=True))
                if validated:
                    row |= look(done)
                if row:
                    row = {"step": done} | row
                    try:
                        if reasons := call(callbacks, done, row, trainer):
                            ended, reason = True, "; ".join(filter(None, reasons))
                            late = "; the student is untrained: it would have begun later" * waits
                            say(f"stopped after step {done} by a callback{': ' * bool(reason)}{reason}{late}")
                            row |= {} if validated else look(done)  # as the last step of any fit
                    finally:  # what a callback raises comes out, and the step was done
                        records.add(row)
                    if chosen_by in row:
                        bar.set_postfix_str(f"validation {row[chosen_by]:.4g}", refresh=False)
                bar.update()

                # --------------------------------------------------------------------------------------- save, and stop
                if due := ended or options.due(options.save_every, done):
                    save(done)
                # Several processes agree on a stop where numbers are read anyway.
                stops = (ranks.alone or logged) and ranks.any(bool(stop))
                if stops and not due:
                    save(done)
            if parts is not None:
                saved = parts.finished() or saved
        except MetaplError as error:
            if saved:
                raise MetaplError(f"{error} (the last good checkpoint is {saved})") from error
            raise

    if stops or stop:
        raise Interrupted(done, (*stop, signal.SIGTERM)[0], saved)

    # ------------------------------------------------------------------------ leave the networks that are kept in place
    taught = None
    if trainer.teacher is not None:
        with kept("teacher") as network:
            taught = weights_of(network)
        load_whole(trainer.teacher, taught)
    if not best["weights"]:
        with kept("student") as network:
            best = {"value": seen.get(chosen_by), "step": done, "weights": weights_of(network)}
    load_whole(trainer.student, best["weights"])
    # The first of several processes knows the rows of the earlier parts of a fit that was resumed.
    history = ranks.gathered(records.history)[0]
    return FitResult(best["value"], best["step"], best["weights"], taught, history, metric.name if metric else None)


def about(source: Any, batch: Any) -> dict[str, Any]:
    """How many examples a source has, and how many a batch, where that is known, and the digest of its first batch."""
    from metapl.data.steps import StepBatches  # needed for fitting only

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


def layouts(trainer: Any, averages: Mapping[str, Any]) -> checkpoint_parts.Like:
    """The layouts of the sharded tensors of a fit's state, by their names."""
    state = {"trainer": trainer.live_state(), "averages": {role: one.state_dict() for role, one in averages.items()}}
    known = checkpoint_parts.layouts(state)
    # An optimizer's state may not be there yet; it is laid out as its parameters are.
    optimizers = [k for k, value in state["trainer"].items() if isinstance(value, dict) and "param_groups" in value]
    for key, optimizer in zip(optimizers, trainer.schedulable, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known |= {f"trainer/{key}/state/{i}": p for i, p in enumerate(parameters) if is_sharded(p)}

    def like(name: str, shape: torch.Size) -> Any:
        layout = known.get(name, known.get(name.rpartition("/")[0]))
        return layout if layout is not None and layout.shape == shape else None

    return like
