"""``metapl compare RUN RUN...``: the test accuracies of runs side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from metapl.apps.methods_over_seeds import ENOUGH_SEEDS, STUDENT, spread
from metapl.apps.printing import table, tell, wrapped
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation, paired_test
from metapl.run_folder import (
    READOUTS,
    EndedRun,
    RunFolder,
    results_within,
    stored_data,
)

# Fields in which runs may differ: the seed, what a method is called by, which is looked at apart,
# and what changes no number.
IRRELEVANT = ("seed", "learns_from_student", "log_every", "save_every", "num_workers")

# Fields that follow from how many steps fitted into a run's minutes.
BY_STEPS = ("steps", "warmup", "validate_every", "wait", "uda_start", "uda_ramp")


class Entry(NamedTuple):
    """A run, or one of those of a comparison.

    Args:
        given: the folder that was named on the command line.
        fields: settings, in which it may differ from others.
        result: what its result.json holds.
    """

    given: Path
    fields: Mapping[str, str]
    result: Mapping[str, Any]

    def reached(self, readout: str) -> float:
        """Return an accuracy; of a run that has none of this kind, the student's."""
        return float(self.result.get(readout, self.result[STUDENT]))


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put the test accuracies of runs side by side, and test whether they differ.

    Differences are tested in pairs of the same seed, and so of the same split: where every method
    (or the same method with other options) was run with the same seeds. Otherwise the accuracies
    are listed, with the reason. Runs on different data or of different classes are refused: their
    test sets differ.

    Args:
        folders: folders of runs, or of comparisons.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]

    def run(self) -> int:
        """Print the accuracies, and whether the students' differ."""
        if not self.folders or len({path.resolve() for path in self.folders}) < len(self.folders):
            given = few(self.folders) if self.folders else "no run"
            raise MetaplError(
                f"metapl compare RUN RUN...: expected runs, each once, and {given} was given."
            )
        same_data = SameData(self.folders[0])
        groups: dict[tuple[str, str], list[Entry]] = {}
        for path in self.folders:
            for place, entry in entries_of(path):
                same_data.check(place, entry)
                key = (str(path), entry.result["method"])
                groups.setdefault(key, []).append(entry)
        rows: list[tuple[str, ...]] = [
            ("run", "method", "seeds", "delivered", "student", "finetuned")
        ]
        for (folder, method), group in groups.items():
            seeds = spoken_seeds(entry.result["seed"] for entry in group)
            accuracies = []
            for readout in READOUTS:
                accuracies.append(spread([entry.reached(readout) for entry in group]))
            rows.append((folder, method, seeds, *accuracies))
        evaluations = same_data.evaluations
        chance = statistics.fmean(evaluation.chance for evaluation in evaluations)
        caption = f"test accuracy in % on {evaluations[0].n:,} examples (chance {100 * chance:.1f})"
        entries = [entry for group in groups.values() for entry in group]
        tell(f"{caption}\n\n{table(rows, left=3)}\n\n{wrapped(verdict(entries))}")
        return 0


def entries_of(path: Path) -> Iterator[tuple[Path, Entry]]:
    """Yield a run, or the runs of a comparison, each with its folder."""
    run = EndedRun.load(path)
    settings = run.description["fields"]
    ignored = set(IRRELEVANT)
    if settings.get("minutes"):
        ignored |= set(BY_STEPS)
    fields = {name: str(value) for name, value in settings.items() if name not in ignored}
    results: Mapping[tuple[str, int], Mapping[str, Any]] = {("", 0): run.result}
    if run.is_comparison:
        results = results_within(path, run.result)
    for (method, seed), result in results.items():
        place = path / method / f"seed-{seed}" if run.is_comparison else path
        if "evaluation" not in result:
            raise MetaplError(f"{place} has no test accuracy; train it again with --test.")
        yield place, Entry(given=path, fields=fields, result=result)


class SameData:
    """Refuses runs whose data, test sets or classes are not those of the runs before.

    Accuracies on other test pictures, or of students of other classes, say nothing of which method
    is better.

    Args:
        first: the folder that was named first.
    """

    def __init__(self, first: Path) -> None:
        self.first = first
        self.evaluations: list[Evaluation] = []

        # The hashes of the data, by what these are drawn by. A folder of pictures is the data; the
        # digits are drawn from a data set by the seed.
        self.hashes: dict[tuple[str, ...], Mapping[str, str]] = {}

    def check(self, place: Path, entry: Entry) -> None:
        """Remember a run; refuse it where it cannot be compared."""
        evaluation = Evaluation(**entry.result["evaluation"])
        self.evaluations.append(evaluation)
        hashes = stored_data(RunFolder(place))["hash"]
        recipe = entry.result["recipe"]
        drawn_by: tuple[str, ...] = (recipe,)
        if recipe == "digits":
            drawn_by = (recipe, str(entry.result["seed"]), entry.fields["labels_per_class"])
        hashes_before = self.hashes.setdefault(drawn_by, hashes)
        differing = sorted({part for part, _ in hashes_before.items() ^ hashes.items()})
        first_recipe, *_ = next(iter(self.hashes))
        classes = evaluation.classes or ()
        first_classes = self.evaluations[0].classes or ()
        if recipe != first_recipe:
            differing = ["test sets"]
        elif classes != first_classes:
            names = few(sorted({*classes} ^ {*first_classes})) or "their order"
            differing = [f"classes ({names})"]
        if differing:
            raise MetaplError(
                f"{place} and {self.first} are on different data: {', '.join(differing)} differ."
            )


def spoken_seeds(seeds: Iterable[int]) -> str:
    """Return seeds as ``--seeds`` takes them."""
    return ",".join(str(seed) for seed in sorted(seeds))


def verdict(entries: Sequence[Entry]) -> str:
    """Compare the students of each method with those of the first one, in pairs of a seed.

    Return the differences, or why the students are not paired.
    """
    # Methods have fields of their own, so what the entries have of each field is looked at.
    values: dict[str, set[str]] = {}
    for entry in entries:
        for name, value in entry.fields.items():
            values.setdefault(name, set()).add(value)
    variants: dict[str, dict[int, float]] = {}
    for entry in entries:
        variant = entry.result["method"]
        for name, value in entry.fields.items():
            if len(values[name]) > 1:
                variant += f", {name} {value}"
        seed = entry.result["seed"]
        accuracies = variants.setdefault(variant, {})
        if seed in accuracies:
            return f"Not paired: {variant} with seed {seed} is there twice."
        accuracies[seed] = entry.reached(STUDENT)
    first, *others = variants
    seeds = sorted(variants[first])
    for variant in others:
        if sorted(variants[variant]) != seeds:
            return (
                f"Not paired: {first} has seeds {spoken_seeds(seeds)}, {variant} has "
                f"{spoken_seeds(variants[variant])}."
            )
    if not others:
        return "Nothing to pair: one method with one set of options."
    lines = [f"The students by seed ({spoken_seeds(seeds)}), against those of {first}:"]
    for variant in others:
        test = paired_test(
            [variants[variant][seed] for seed in seeds], [variants[first][seed] for seed in seeds]
        )
        p = f"at least {ENOUGH_SEEDS} seeds are needed for a test"
        if test.p is not None and test.n >= ENOUGH_SEEDS:
            p = f"paired t-test p = {test.p:.2g}"
        lines.append(f"  {100 * test.mean:+.2f} points  {variant} ({p})")
    return "\n".join(lines)
