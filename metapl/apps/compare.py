"""Methods side by side over several seeds, and runs side by side.

What they reach, and do they differ?
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from joblib import cpu_count

from metapl.apps.comparison import ENOUGH_SEEDS, STUDENT, Comparison, spread
from metapl.apps.inputs import plural
from metapl.apps.machine import default_threads, read_sealed
from metapl.apps.report import SUSPECTS, linear_baseline, write_report
from metapl.apps.run import (
    ANOTHER,
    NETWORK,
    READOUTS,
    WEIGHTS,
    EndedRun,
    RunFolder,
    results_within,
    stored_data,
    stored_result,
)
from metapl.apps.settings import replaced
from metapl.apps.train import describe, device, train
from metapl.apps.words import table, tell, wrapped
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation, paired_test

PATIENCE = 30.0  # seconds that a worker has to save the step under way before it is killed


# -------------------------------------------------------------------------------- runs side by side


@dataclass(frozen=True)
class Job:
    """A training by one method with one seed."""

    config: Any
    method: Any
    folder: Path
    resume: bool
    threads: int  # rounding depends on them

    @property
    def title(self) -> str:
        return f"{self.method.name}, seed {self.config.fitting.seed}"

    def run(self) -> dict[str, Any]:
        """Run it here, with a line every half minute, which names it, and no other.

        One that is finished only gives its result, if its networks are those it was of.
        """

        def say_progress(text: str) -> None:
            tell(f"{self.title}: {text}")

        folder = RunFolder(self.folder)
        torch.set_num_threads(self.config.threads or self.threads)
        try:
            with folder.claimed(describe(self.config, self.method), resume=self.resume):
                if not folder.ended:
                    return train(
                        self.config,
                        self.method,
                        folder,
                        resume=self.resume,
                        say_progress=say_progress,
                    )
                result = stored_result(folder)
                for name, sha256 in result["sha256"].items():
                    if (
                        folder.path / name
                    ).is_file():  # weights may have been removed for their room
                        read_sealed(folder.path / name, sha256, mend=ANOTHER)
                return result
        except MetaplError as error:
            raise MetaplError(f"{self.title}: {error}") from error


def compare(
    config: Any,
    methods: Mapping[str, Any],
    seeds: Sequence[int],
    folder: RunFolder,
    *,
    resume: bool,
    jobs: int | None,
) -> None:
    """Train by each method with each seed, ``jobs`` runs at a time, and compare.

    All settings are chosen.
    """
    out, names = folder.path, list(methods)
    with folder.claimed(
        describe(config, methods[names[0]], compare=names, seeds=list(seeds)), resume=resume
    ):
        if not folder.ended:
            config.data(tell, True, None)  # shows its notes once: the jobs are silent
        # 1. The runs, side by side; finished ones are not run again. Two threads add up a sum in
        # another order than one does, and round it otherwise: after one step of small_cnn the
        # weights differ already. So a job has as many threads whatever --jobs is, and when it is
        # resumed.
        on_gpu, todo, results = (
            device(config.fitting.device).type == "cuda",
            list[Job](),
            dict[tuple[str, int], Any](),
        )
        for seed in seeds:
            for name, method in methods.items():
                place = out / name / f"seed-{seed}"
                begun = resume or (place / "recipe.json").exists()
                todo.append(
                    Job(
                        replaced(config, seed=seed),
                        method,
                        place,
                        begun,
                        default_threads() if on_gpu else 1,
                    )
                )
        workers = min(jobs or (1 if on_gpu else cpu_count()), len(todo))
        tell(
            f"{plural(len(names), 'method')} x {plural(len(seeds), 'seed')}, {workers} at a time "
            f"-> {out}"
        )
        with closing(run_all(todo, workers)) as running:  # workers end before the command does
            for number, (job, result) in enumerate(running, 1):
                results[job.method.name, job.config.fitting.seed] = result
                reached = f"{result['test_accuracy']:.1%} of {result['evaluation']['n']:,}"
                tell(f"[{number:>{len(str(len(todo)))}}/{len(todo)}] {job.title}: {reached}")
        # 2. What they reach, and the networks of the one that is delivered.
        comparison = Comparison.of(tuple(seeds), names, results)
        method, seed, _ = comparison.delivered()
        source = RunFolder(out / method / f"seed-{seed}")
        for name in WEIGHTS.values():
            if (source.path / name).is_file():
                # The same weights are the same bytes: the checksums of the run hold here too.
                folder.write_weights(
                    name, source.read_weights(name, results[method, seed]["sha256"][name])
                )
        folder.write_json(NETWORK, source.read_json(NETWORK))
        if (source.path / SUSPECTS).is_file():
            shutil.copyfile(source.path / SUSPECTS, out / SUSPECTS)
        folder.write_json("result.json", {**results[method, seed], **comparison.to_json()})
        write_report(EndedRun.load(out))
        result = stored_result(folder)
    tell(f"figures, report and the delivered networks are in {out}")
    tell(f"\n{wrapped(comparison.caption())}\n\n{table(comparison.rows(), left=4)}\n")
    for text in (result["sentence"], result["delivery"], *linear_baseline(result)):
        tell(wrapped(text))


def run_all(jobs: Sequence[Job], workers: int) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    """Run the jobs, ``workers`` at a time, and give each with its result as it ends.

    One worker is this process. However this ends, no worker is left: where it is stopped, or a job
    fails, the others save the step under way and go; and a worker whose parent was killed ends
    itself, so that nobody goes on writing to the folders.
    """
    if workers <= 1 or len(jobs) == 1:
        for job in jobs:
            yield job, job.run()
        return
    spawned: Any = {"mp_context": multiprocessing.get_context("spawn")}
    pool = ProcessPoolExecutor(
        workers, **spawned, initializer=_end_with_parent, initargs=(os.getpid(),)
    )
    # Processes that are started in between do not get what a terminal sends to all: the parent
    # alone decides.
    ours = {signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        running = {pool.submit(_run_apart, job): job for job in jobs}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)
    started = [*pool._processes.values()]
    try:
        for future in as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool as error:
        fault = "the process of one of the runs was killed"
        raise MetaplError(f"{fault}: was there too little memory? Go on with --resume.") from error
    except BaseException:
        # Ask them to save and go; kill those that do not.
        for worker in started:
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        give_up = time.monotonic() + PATIENCE
        try:
            for worker in started:
                worker.join(max(0.0, give_up - time.monotonic()))
        finally:  # also when the user has no more patience
            for worker in started:
                worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_stopped = False  # whether this worker was stopped, and begins no other job


def _run_apart(job: Job) -> dict[str, Any]:
    global _stopped
    try:
        return {} if _stopped else job.run()
    except KeyboardInterrupt:  # stopped and saved; nobody waits for the result
        _stopped = True
        return {}


def _end_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------ metapl compare RUN RUN...

# Fields in which runs may differ: the seed, what a method is called by, which is looked at apart,
# and what changes no number; and those that follow from how many steps fitted into a run's minutes.
IRRELEVANT = ("seed", "feedback", "kind", "clean_alone", "log_every", "save_every", "num_workers")
BY_STEPS = ("steps", "warmup", "validate_every", "wait", "uda_start", "uda_ramp", "warm_steps")


class Entry(NamedTuple):
    """A run, or one of those of a comparison."""

    given: Path  # the folder that was named
    fields: Mapping[str, str]  # in which it may differ from others
    result: Mapping[str, Any]

    def reached(self, readout: str) -> float:
        return float(self.result.get(readout, self.result[STUDENT]))


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put the test accuracies of runs side by side, and test whether they differ.

    Differences are tested in pairs of the same seed, and so of the same split: where every method
    (or the same method with other options) was run with the same seeds. Otherwise the accuracies
    are listed, with the reason. Runs on different data or of different classes are refused: their
    test sets differ.

    Args:
        folders: run folders, of single runs or of comparisons.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

    def run(self) -> int:
        if not self.folders or len({path.resolve() for path in self.folders}) < len(self.folders):
            given = few(self.folders) if self.folders else "no run"
            raise MetaplError(
                f"metapl compare RUN RUN...: expected runs, each once, and {given} was given."
            )
        groups: dict[tuple[str, str], list[Entry]] = {}  # by folder and method
        drawn: dict[
            tuple[str, ...], Mapping[str, str]
        ] = {}  # hashes of data, by what these are drawn by
        evaluations = list[Evaluation]()
        for path in self.folders:
            run = EndedRun.load(path)
            own = run.description["fields"]
            unlike = {*IRRELEVANT, *(BY_STEPS if own.get("minutes") else ())}
            fields = {name: str(value) for name, value in own.items() if name not in unlike}
            within = (
                results_within(path, run.result) if run.is_comparison else {("", 0): run.result}
            )
            for (method, seed), result in within.items():
                place = path / method / f"seed-{seed}" if run.is_comparison else path
                if "evaluation" not in result:
                    raise MetaplError(f"{place} has no test accuracy; train it again with --test.")
                evaluations.append(Evaluation(**result["evaluation"]))
                # Accuracies on other test pictures, or of students of other classes, say nothing of
                # which method is better. A folder of pictures is the data; the digits are drawn
                # from a data set.
                kind, seeded, hashes = (
                    result["recipe"],
                    str(result["seed"]),
                    stored_data(RunFolder(place))["hash"],
                )
                by = (kind, seeded, fields["labels_per_class"]) if kind == "digits" else (kind,)
                parts = sorted(
                    {part for part, _ in drawn.setdefault(by, hashes).items() ^ hashes.items()}
                )
                if kind != next(iter(drawn))[0]:
                    parts = ["test sets"]
                elif (classes := evaluations[-1].classes or ()) != (
                    others := evaluations[0].classes or ()
                ):
                    parts = [f"classes ({few(sorted({*classes} ^ {*others})) or 'their order'})"]
                if parts:
                    both = f"{place} and {self.folders[0]} are on different data"
                    raise MetaplError(f"{both}: {', '.join(parts)} differ.")
                groups.setdefault((str(path), result["method"]), []).append(
                    Entry(path, fields, result)
                )
        rows: list[tuple[str, ...]] = [
            ("run", "method", "seeds", "delivered", "student", "finetuned")
        ]
        for key, group in groups.items():
            shares = [spread([entry.reached(each) for entry in group]) for each in READOUTS]
            rows.append((*key, spoken_seeds(entry.result["seed"] for entry in group), *shares))
        chance = statistics.fmean(each.chance for each in evaluations)
        caption = f"test accuracy in % on {evaluations[0].n:,} examples (chance {100 * chance:.1f})"
        tell(
            f"{caption}\n\n{table(rows, left=3)}\n\n{wrapped(verdict([*itertools.chain(*groups.values())]))}"
        )
        return 0


def spoken_seeds(seeds: Iterable[int]) -> str:
    """Seeds as ``--seeds`` takes them."""
    return ",".join(map(str, sorted(seeds)))


def verdict(entries: Sequence[Entry]) -> str:
    """The students of each method against those of the first one, in pairs of a seed.

    Or why they are not paired.
    """
    values: dict[
        str, set[str]
    ] = {}  # methods have fields of their own: what the entries have of each is looked at
    for entry in entries:
        for name, value in entry.fields.items():
            values.setdefault(name, set()).add(value)
    variants: dict[str, dict[int, float]] = {}
    for entry in entries:
        options = "".join(
            f", {name} {value}" for name, value in entry.fields.items() if len(values[name]) > 1
        )
        name, seed = f"{entry.result['method']}{options}", entry.result["seed"]
        if seed in variants.setdefault(name, {}):
            return f"Not paired: {name} with seed {seed} is there twice."
        variants[name][seed] = entry.reached(STUDENT)
    first, *others = variants
    seeds = sorted(variants[first])
    for name in others:
        if sorted(variants[name]) != seeds:
            return (
                f"Not paired: {first} has seeds {spoken_seeds(seeds)}, {name} has "
                f"{spoken_seeds(variants[name])}."
            )
    if not others:
        return "Nothing to pair: one method with one set of options."
    lines = [f"The students by seed ({spoken_seeds(seeds)}), against those of {first}:"]
    for name in others:
        test = paired_test(*([variants[each][seed] for seed in seeds] for each in (name, first)))
        p = f"at least {ENOUGH_SEEDS} seeds are needed for a test"
        if test.p is not None and test.n >= ENOUGH_SEEDS:
            p = f"paired t-test p = {test.p:.2g}"
        lines.append(f"  {100 * test.mean:+.2f} points  {name} ({p})")
    return "\n".join(lines)
