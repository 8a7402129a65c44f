"""``metapl compare RUN RUN...``: the test accuracies of runs side by side."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from metapl.apps.methods_over_seeds import ENOUGH_SEEDS, STUDENT, spread
from metapl.apps.printing import table, tell, wrapped
from metapl.apps.run_folder import (
    READOUTS,
    EndedRun,
    RunFolder,
    results_within,
    stored_data,
)
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation, paired_test

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
