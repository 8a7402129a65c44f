"""``metapl compare RUN RUN...``"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.commands.evaluations import (
    differing,
    evaluations_table,
    has_evaluation,
    read_evaluations,
    write_comparison,
)
from metapl.apps.commands.evaluators import check_folder
from metapl.apps.commands.parse import paragraph
from metapl.apps.experiments.accuracies import ENOUGH_SEEDS, READOUTS, STUDENT, Comparison, spread, where_one_network
from metapl.apps.experiments.folder import RunFolder, flat
from metapl.apps.experiments.load_run import LoadedRun, load_run
from metapl.apps.experiments.store import stored_data, stored_result
from metapl.apps.recipes import ImageFolders, Recipe
from metapl.apps.recipes.base import as_dict
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, paired_test
from metapl.words import table, tell

IRRELEVANT = ("seed", "method", "log_every", "save_every", "exact_every", "keep")
"""Fields in which runs may differ: the seed, the method, which is looked at apart, and what changes no number."""

MEASURED = "by the minutes"
"""Stands for a field that follows from how many steps fitted into a run's minutes."""

DRAWN_BY = ("seed", "labels_per_class", "validation", "split")
"""Fields that decide which examples a recipe draws from its data set."""


@dataclass(frozen=True)
class Entry:
    """One method with one seed.

    Args:
        method, seed, steps: of its training.
        fields: of its recipe, without the irrelevant ones; nested ones as ``feedback.mode``.
        accuracies: by read-out.
        place: its folder.
        hashes: of its data, by part.
        drawn_by: runs that agree in it have the same data.
        evaluation: on the test set, of the network that it delivers.
    """

    method: str
    seed: int
    steps: int
    fields: dict[str, Any]
    accuracies: dict[str, float]
    place: Path
    hashes: dict[str, str]
    drawn_by: tuple[Any, ...]
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put the test accuracies of runs side by side, and test whether they differ.

    Differences are tested in pairs of the same seed, and so of the same split: where every method (or the same method
    with other options) was run with the same seeds. Otherwise, or with other numbers of labels, the accuracies are
    listed, with the reason why they are not paired. Runs whose steps were measured to fit into the same minutes are
    paired even if the numbers of steps differ; the table then has them. Runs of different recipes, on different data or
    of different classes are refused: their test sets differ.

    Folders that metapl evaluate --out wrote to are put side by side too, with every figure that they have: metapl
    compare robust/a robust/b. Where all of several run folders have such an evaluation, it follows.

    Args:
        runs: run folders, of single runs or of comparisons; or folders with an evaluation.json.
        out: folder for compared.json and compared.png, of evaluations; made if need be.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None

    def __call__(self) -> int:
        if self.out is not None:
            check_folder(self.out)
        paths = [path.resolve() for path in self.runs]
        twice = [path for path, place in zip(self.runs, paths, strict=True) if paths.count(place) > 1]
        if twice:
            raise MetaplError(f"{twice[0]} was given twice.")
        evaluated = [path for path in self.runs if has_evaluation(path)]
        if any(not RunFolder(path).exists for path in evaluated):
            self._evaluations()
            return 0
        if self.out is not None and not (self.runs and len(evaluated) == len(self.runs)):
            lacking = next((path for path in self.runs if path not in evaluated), Path("RUN"))
            raise MetaplError(
                f"--out is for evaluations, and {lacking} has no evaluation.json; write it by: metapl evaluate "
                f"{lacking} --out {lacking}."
            )
        if not self.runs:
            raise MetaplError(
                "no runs were named; expected run folders: metapl compare runs/digits-001 runs/digits-002"
            )
        self._runs()
        if len(evaluated) == len(self.runs) and (len(self.runs) > 1 or self.out is not None):
            tell("")
            self._evaluations()
        return 0

    def _evaluations(self) -> None:
        found = read_evaluations(self.runs)
        tell(evaluations_table(found))
        if self.out is not None:
            write_comparison(self.out, found)

    def _runs(self) -> None:
        runs = [load_run(path) for path in self.runs]
        names = {run.recipe.name: run.folder.path for run in runs}
        if len(names) > 1:
            which = ", ".join(f"{path} is of {name}" for name, path in names.items())
            raise MetaplError(f"the runs are of different recipes, whose test sets differ: {which}.")
        by_run = [(run.folder.path, list(_entries(run))) for run in runs]
        entries = [entry for _, members in by_run for entry in members]
        _refuse_other_data(entries)
        # Runs that were given the same minutes may have found time for other numbers of steps.
        differ = len({entry.steps for entry in entries if entry.fields["steps"] == MEASURED}) > 1
        caption = f"test accuracy in % on {entries[0].evaluation.n:,} examples (chance {100 * _chance(entries):.1f})"
        tell(f"{caption}{where_one_network(entry.method for entry in entries)}\n\n{_table(by_run, differ)}\n")
        if differ:
            tell(paragraph("The numbers of steps differ: each run took as many as fitted into its minutes.") + "\n")
        tell(_verdict(entries))


def _entries(run: LoadedRun) -> Iterator[Entry]:
    """The runs in a folder: one, or all of a comparison."""
    fields = _fields(run.recipe)
    if not run.is_comparison:
        yield _entry(run, run.folder, run.result, fields)
        return
    for method, readouts in run.result["methods"].items():
        for index, seed in enumerate(run.result["seeds"]):
            numbers = {"method": method, "seed": seed, **{readout: readouts[readout][index] for readout in READOUTS}}
            yield _entry(run, RunFolder(run.folder.path / method / f"seed-{seed}"), numbers, fields)


def _fields(recipe: Recipe) -> dict[str, Any]:
    """What runs that are paired have in common."""
    fields = flat(as_dict(recipe)) | dict.fromkeys(recipe.decided_by_minutes(), MEASURED)
    return {name: value for name, value in fields.items() if name not in IRRELEVANT}


def _entry(run: LoadedRun, folder: RunFolder, numbers: dict[str, Any], fields: dict[str, Any]) -> Entry:
    result = stored_result(folder)
    if "evaluation" not in result:
        raise MetaplError(f"{folder.path} has no test accuracy: train was given no --test; train it again with one.")
    if STUDENT not in numbers:
        raise MetaplError(f"{folder.path / 'result.json'} is damaged: it does not say {STUDENT}.")
    # A folder of pictures is the data; other recipes draw theirs from a data set.
    drawn_by = () if isinstance(run.recipe, ImageFolders) else DRAWN_BY
    return Entry(
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


def _refuse_other_data(entries: Sequence[Entry]) -> None:
    """Accuracies on other test pictures, or of students of other classes, say nothing of which method is better.

    Raises:
        MetaplError: two runs are on different data or classes; it names the first such pair.
    """
    first: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        names, others = entry.evaluation.classes or (), entries[0].evaluation.classes or ()
        if tuple(names) != tuple(others):
            raise MetaplError(
                f"{entry.place} and {entries[0].place} are of different classes: {differing(names, others)}. Train "
                "both on folders with the same classes, or compare each with runs on its own."
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


# ------------------------------------------------------------------------------------------------------- what is shown


def _chance(entries: Sequence[Entry]) -> float:
    return statistics.fmean(entry.evaluation.chance for entry in entries)


def _table(by_run: Sequence[tuple[Path, list[Entry]]], with_steps: bool) -> str:
    """A row for each method of each folder, with mean ± standard deviation where it has several seeds."""
    head = ("run", "method", "seeds", *["steps"] * with_steps, "delivered", "student", "finetuned")
    rows: list[tuple[str, ...]] = [head]
    for place, entries in by_run:
        for method in dict.fromkeys(entry.method for entry in entries):
            by_seed = [entry for entry in entries if entry.method == method]
            accuracies = [spread([entry.accuracies[readout] for entry in by_seed], digits=2) for readout in READOUTS]
            steps = [f"{by_seed[0].steps:,}"] * with_steps  # all runs of a comparison have the same number
            rows.append((str(place), method, _ranges([entry.seed for entry in by_seed]), *steps, *accuracies))
    return table(rows, left=3)


def _ranges(seeds: Sequence[int]) -> str:
    """Seeds as ``--seeds`` takes them.

    >>> _ranges([0, 1, 2, 7])
    '0-2,7'
    """
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


# ------------------------------------------------------------------------------------------------------ what is tested


def _values(entries: list[Entry], field: str) -> list[str]:
    """What the entries have there; methods have fields of their own."""
    return list(dict.fromkeys(str(entry.fields[field]) for entry in entries if field in entry.fields))


def _verdict(entries: list[Entry]) -> str:
    """Whether the feedback helps, where that was run, else each against the first; or why they are not paired."""
    names = dict.fromkeys(name for entry in entries for name in entry.fields)
    differing = {name: values for name in names if len(values := _values(entries, name)) > 1}
    if "labels_per_class" in differing:
        counts = ", ".join(differing["labels_per_class"])
        return f"Not paired: the runs have different numbers of labels (labels_per_class {counts})."
    variants: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        name = ", ".join(
            [entry.method, *(f"{field} {entry.fields[field]}" for field in differing if field in entry.fields)]
        )
        if entry.seed in variants.setdefault(name, {}):
            return f"Not paired: {name} with seed {entry.seed} is there twice."
        variants[name][entry.seed] = entry
    first, *_ = variants
    seeds = tuple(sorted(variants[first]))
    for name, by_seed in variants.items():
        if set(by_seed) != set(seeds):
            return f"Not paired: {first} has seeds {_ranges(seeds)}, {name} has {_ranges(list(by_seed))}."
    if len(variants) < 2:
        return "Nothing to pair: one method with one set of options."
    methods = {
        name: {readout: [by_seed[seed].accuracies[readout] for seed in seeds] for readout in READOUTS}
        for name, by_seed in variants.items()
    }
    comparison = Comparison(seeds, methods, entries[0].evaluation.n, _chance(entries))
    if comparison.against_control() is not None:
        return paragraph(comparison.sentence())
    lines = [f"The students by seed ({_ranges(seeds)}), against those of {first}:"]
    for name in [*methods][1:]:
        test = paired_test(methods[name][STUDENT], methods[first][STUDENT])
        too_few = test.p is None or test.n < ENOUGH_SEEDS
        p = f"at least {ENOUGH_SEEDS} seeds are needed for a test" if too_few else f"paired t-test p = {test.p:.2g}"
        lines.append(f"  {100 * test.mean:+.2f} points  {name} ({p})")
    return "\n".join(lines)
