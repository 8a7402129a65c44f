"""``metapl compare RUN RUN...``: accuracies of runs side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.commands.parse import Command, unset
from metapl.apps.experiments.accuracies import ENOUGH_SEEDS, READOUTS, STUDENT, Comparison, spread, where_one_network
from metapl.apps.experiments.folder import RunFolder, flat, results_within, stored, stored_data
from metapl.apps.experiments.run import EndedRun
from metapl.apps.recipes import ImageFolders, Recipe
from metapl.apps.recipes.base import as_dict
from metapl.apps.words import table, tell, wrapped
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation, paired_test

# Fields in which runs may differ: the seed, the method, which is looked at apart, and what changes no number. Those
# that decide which examples a recipe draws from its data set. And what stands for a field that follows from how many
# steps fitted into a run's minutes.
IRRELEVANT = ("seed", "method", "log_every", "save_every", "exact_every", "keep")
DRAWN_BY = ("seed", "labels_per_class")
MEASURED = "by the minutes"


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Put the test accuracies of runs side by side, and test whether they differ.

    Differences are tested in pairs of the same seed, and so of the same split: where every method (or the same method
    with other options) was run with the same seeds. Otherwise, or with other numbers of labels, the accuracies are
    listed, with the reason. Runs whose steps were measured to fit into the same minutes are paired whatever their
    number. Runs of different recipes, on different data or of different classes are refused: their test sets differ.

    Args:
        folders: run folders, of single runs or of comparisons.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, unset("RUN...")]

    def run(self) -> int:
        places = [path.resolve() for path in self.folders]
        for path, place in zip(self.folders, places, strict=True):
            if places.count(place) > 1:
                raise MetaplError(f"{path} was given twice.")
        _compare_runs(self.folders)
        return 0


@dataclass(frozen=True)
class Entry:
    """One method with one seed, and how it did on the test set; those that are drawn alike have the same data."""

    method: str
    seed: int
    steps: int
    fields: dict[str, Any]
    accuracies: dict[str, float]
    place: Path
    hashes: dict[str, str]
    drawn_by: tuple[Any, ...]
    evaluation: Evaluation


def _compare_runs(folders: Sequence[Path]) -> None:
    runs = [EndedRun.load(path) for path in folders]
    names = {run.result["recipe"]: run.folder.path for run in runs}
    if len(names) > 1:
        which = ", ".join(f"{path} is of {name}" for name, path in names.items())
        raise MetaplError(f"the runs are of different recipes, whose test sets differ: {which}.")
    by_run = [(run.folder.path, list(_entries(run))) for run in runs]
    entries = [entry for _, members in by_run for entry in members]
    _refuse_other_data(entries)
    # Runs that were given the same minutes may have found time for other numbers of steps.
    differ = len({entry.steps for entry in entries if entry.fields["steps"] == MEASURED}) > 1
    rows: list[tuple[str, ...]] = [("run", "method", "seeds", *["steps"] * differ, "delivered", "student", "finetuned")]
    for place, members in by_run:
        for method in dict.fromkeys(entry.method for entry in members):
            by_seed = [entry for entry in members if entry.method == method]
            shares = [spread([entry.accuracies[readout] for entry in by_seed], digits=2) for readout in READOUTS]
            steps = [f"{by_seed[0].steps:,}"] * differ  # all runs of a comparison have the same number
            rows.append((str(place), method, _ranges([entry.seed for entry in by_seed]), *steps, *shares))
    caption = f"test accuracy in % on {entries[0].evaluation.n:,} examples (chance {100 * _chance(entries):.1f})"
    heading = wrapped(f"{caption}{where_one_network(entry.method for entry in entries)}")
    tell(f"{heading}\n\n{table(rows, left=3)}\n")
    if differ:
        tell(wrapped("The numbers of steps differ: each run took as many as fitted into its minutes.") + "\n")
    tell(_verdict(entries))


def _entries(run: EndedRun) -> Iterator[Entry]:
    # A folder of pictures is the data; other recipes draw theirs from a data set.
    recipe = stored(run.folder)[0].by(run.result["method"], run.result["seed"])
    drawn_by = () if isinstance(recipe, ImageFolders) else DRAWN_BY
    fields, path, runs = _fields(recipe), run.folder.path, [(run.folder, run.result)]
    results = {(run.result["method"], run.result["seed"]): dict(run.result)}
    if run.is_comparison:
        results = results_within(path, run.result)
        runs = [
            (RunFolder(path / method / f"seed-{seed}"), {"method": method, "seed": seed} | numbers)
            for method, found in run.result["methods"].items()
            for index, seed in enumerate(run.result["seeds"])
            for numbers in [{readout: found[readout][index] for readout in READOUTS}]
        ]
    for folder, numbers in runs:
        result = results[numbers["method"], numbers["seed"]]
        if "evaluation" not in result:
            raise MetaplError(
                f"{folder.path} has no test accuracy: train was given no --test; train it again with one."
            )
        if STUDENT not in numbers:
            raise MetaplError(f"{folder.path / 'result.json'} is damaged: it does not say {STUDENT}.")
        yield Entry(
            numbers["method"],
            numbers["seed"],
            result["steps"],
            fields,
            {readout: numbers.get(readout, numbers[STUDENT]) for readout in READOUTS},
            folder.path,
            stored_data(folder)["hash"],
            tuple(str((fields | {"seed": numbers["seed"]}).get(name)) for name in drawn_by),
            Evaluation(**result["evaluation"]),
        )


def _fields(recipe: Recipe) -> dict[str, Any]:
    """What runs that are paired have in common."""
    fields = flat(as_dict(recipe)) | dict.fromkeys(recipe.decided_by_minutes(), MEASURED)
    return {name: value for name, value in fields.items() if name not in IRRELEVANT}


def _refuse_other_data(entries: Sequence[Entry]) -> None:
    """Accuracies on other test pictures, or of students of other classes, say nothing of which method is better."""
    first: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        names, own = entries[0].evaluation.classes, entry.evaluation.classes
        if names is not None and own is not None and list(names) != list(own):
            alone = [name for name in (*own, *names) if name not in own or name not in names]
            raise MetaplError(
                f"{entry.place} and {entries[0].place} are of different classes: "
                f"{f'only one of them has {few(alone)}' if alone else 'the order of the classes differs'}. Train both "
                "on folders with the same classes, or compare each with runs on its own."
            )
        same = first.setdefault(entry.drawn_by, entry)
        parts = [part for part in {**same.hashes, **entry.hashes} if same.hashes.get(part) != entry.hashes.get(part)]
        everywhere = "labels"  # of the whole data set, whatever is drawn from it
        if entries[0].hashes.get(everywhere) != entry.hashes.get(everywhere):
            same, parts = entries[0], [everywhere]
        if parts:
            raise MetaplError(
                f"{entry.place} and {same.place} are on different data: {' and '.join(parts)} differ by their hashes "
                "in data.json. Train both on the same files, or compare each with runs on its own data."
            )


def _chance(entries: Sequence[Entry]) -> float:
    return statistics.fmean(entry.evaluation.chance for entry in entries)


def _ranges(seeds: Sequence[int]) -> str:
    """Seeds as ``--seeds`` takes them.

    >>> _ranges([0, 1, 2, 7])
    '0-2,7'
    """
    firsts = [seed for seed in sorted(seeds) if seed - 1 not in seeds]
    lasts = [seed for seed in sorted(seeds) if seed + 1 not in seeds]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def _verdict(entries: Sequence[Entry]) -> str:
    """Whether the feedback helps, where that was run, else each against the first; or why they are not paired."""
    # Methods have fields of their own: what the entries have of each is looked at.
    values: dict[str, set[str]] = {}
    for entry in entries:
        for name, value in entry.fields.items():
            values.setdefault(name, set()).add(str(value))
    differing = [name for name, found in values.items() if len(found) > 1]
    if "labels_per_class" in differing:
        counts = ", ".join(dict.fromkeys(str(entry.fields["labels_per_class"]) for entry in entries))
        return f"Not paired: the runs have different numbers of labels (labels_per_class {counts})."
    variants: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        options = (f"{name} {entry.fields[name]}" for name in differing if name in entry.fields)
        name = ", ".join([entry.method, *options])
        if entry.seed in variants.setdefault(name, {}):
            return f"Not paired: {name} with seed {entry.seed} is there twice."
        variants[name][entry.seed] = entry
    first, *others = variants
    seeds = tuple(sorted(variants[first]))
    for name in others:
        if {*variants[name]} != {*seeds}:
            return f"Not paired: {first} has seeds {_ranges(seeds)}, {name} has {_ranges([*variants[name]])}."
    if not others:
        return "Nothing to pair: one method with one set of options."
    methods = {
        name: {readout: [by_seed[seed].accuracies[readout] for seed in seeds] for readout in READOUTS}
        for name, by_seed in variants.items()
    }
    comparison = Comparison(seeds, methods, entries[0].evaluation.n, _chance(entries))
    if comparison.against_control() is not None:
        return wrapped(comparison.sentence())
    lines = [f"The students by seed ({_ranges(seeds)}), against those of {first}:"]
    for name in others:
        test = paired_test(methods[name][STUDENT], methods[first][STUDENT])
        too_few = test.p is None or test.n < ENOUGH_SEEDS
        p = f"at least {ENOUGH_SEEDS} seeds are needed for a test" if too_few else f"paired t-test p = {test.p:.2g}"
        lines.append(f"  {100 * test.mean:+.2f} points  {name} ({p})")
    return "\n".join(lines)
