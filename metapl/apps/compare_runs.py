"""``metapl compare RUN RUN...``: the test accuracies of runs side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from metapl.apps.inputs import plural, runs_of_comparison
from metapl.apps.printing import table, tell, wrapped
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation, paired_test
from metapl.run_folder import (
    DELIVERED_READOUT,
    READOUTS,
    STUDENT_READOUT,
    EndedRun,
    RunFolder,
    guessing,
    stored_data,
)

# With fewer, no claim is made on a difference: a t-test over 3 pairs hardly ever finds one, and one
# that it finds is as often luck.
ENOUGH_SEEDS = 5

# Fields in which runs may differ: the seed, what a method is called by, which is looked at apart,
# and what changes no number.
IRRELEVANT = ("seed", "learns_from_student", "log_every", "save_every", "num_workers")

# Fields that follow from how many steps fitted into a run's minutes.
BY_STEPS = ("steps", "warmup", "validate_every", "wait", "uda_start", "uda_ramp")


class Entry(NamedTuple):
    """A run, or one of those in a folder.

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
        return float(self.result.get(readout, self.result[STUDENT_READOUT]))


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put the test accuracies of runs side by side, and test whether they differ.

    Differences are tested in pairs of the same seed, and so of the same split: where every method
    (or the same method with other options) was run with the same seeds. Otherwise the accuracies
    are listed, with the reason. Runs on different data or of different classes are refused: their
    test sets differ.

    Args:
        folders: folders of runs, or folders that --compare of metapl train has put runs into.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]

    def run(self) -> int:
        """Print the accuracies, and whether the students' differ."""
        if not self.folders or len({path.resolve() for path in self.folders}) < len(self.folders):
            given = few(self.folders) if self.folders else "no run"
            raise MetaplError(
                f"compare RUN RUN...: expected runs, each once, and {given} was given."
            )
        tell(comparison_of(self.folders))
        return 0


def comparison_of(folders: Sequence[Path]) -> str:
    """Return a table of the accuracies of runs by their methods, and whether the students' differ.

    Args:
        folders: of runs, or of the runs of a comparison.
    """
    same_data = SameData(folders[0])
    groups: dict[tuple[str, str], list[Entry]] = {}
    for path in folders:
        for place in places_of(path):
            entry = entry_of(path, place)
            same_data.check(place, entry)
            groups.setdefault((str(path), entry.result["method"]), []).append(entry)
    rows: list[tuple[str, ...]] = [("run", "method", "seeds", "delivered", "student", "finetuned")]
    for (folder, method), group in groups.items():
        seeds = spoken_seeds(entry.result["seed"] for entry in group)
        accuracies = [spread([entry.reached(readout) for entry in group]) for readout in READOUTS]
        rows.append((folder, method, seeds, *accuracies))
    rows += baseline_rows(groups)
    entries = [entry for group in groups.values() for entry in group]
    evaluations = same_data.evaluations
    chance = statistics.fmean(evaluation.chance for evaluation in evaluations)
    caption = f"test accuracy in % on {evaluations[0].n:,} examples (chance {100 * chance:.1f})"
    said = wrapped("\n".join([verdict(entries), *untrained(entries)]))
    return f"{caption}\n\n{table(rows, left=3)}\n\n{said}"


def baseline_rows(groups: Mapping[tuple[str, str], Sequence[Entry]]) -> list[tuple[str, ...]]:
    """Return a row of the linear baseline, or one for each folder where they learned other labels.

    Args:
        groups: the runs by folder and method.
    """
    # By folder and seed.
    baselines: dict[str, dict[int, float]] = {}
    for (folder, _), entries in groups.items():
        for entry in entries:
            if "control_accuracy" in entry.result:
                accuracies = baselines.setdefault(folder, {})
                accuracies[entry.result["seed"]] = entry.result["control_accuracy"]
    all_accuracies: dict[int, float] = {}
    for accuracies in baselines.values():
        all_accuracies.update(accuracies)
    if not all_accuracies:
        return []
    if all(accuracies.items() <= all_accuracies.items() for accuracies in baselines.values()):
        baselines = {"": all_accuracies}
    rows: list[tuple[str, ...]] = []
    for folder, accuracies in baselines.items():
        reached = spread([*accuracies.values()])
        rows.append((folder, "linear baseline", spoken_seeds(accuracies), reached, "", ""))
    return rows


def places_of(path: Path) -> list[Path]:
    """Return the folder of a run, or those of the runs of a comparison, METHOD/seed-N in it."""
    places = runs_of_comparison(path)
    if RunFolder(path).exists or not places:
        return [path]
    return places


def entry_of(path: Path, place: Path) -> Entry:
    """Return a run for the comparison; refuse one that was not tested.

    Args:
        path: the folder that was named.
        place: of the run.
    """
    run = EndedRun.load(place)
    settings = run.description["fields"]
    ignored = set(IRRELEVANT)
    if settings.get("minutes"):
        ignored |= set(BY_STEPS)
    fields = {name: str(value) for name, value in settings.items() if name not in ignored}
    if "evaluation" not in run.result:
        raise MetaplError(f"{place} has no test accuracy; train it again with --test.")
    return Entry(given=path, fields=fields, result=run.result)


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
    """Compare what the runs of each method deliver with those of the first, in pairs of a seed.

    Every method has chosen among its networks by validation or by its rule, so that one whose
    student is finetuned on the labels is measured as such. Return the differences, or why the runs
    are not paired.
    """
    # Methods have settings of their own, which differ between them. Runs are told apart by settings
    # in which those of one method differ, and by those that all of the runs have.
    values: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        for name, value in entry.fields.items():
            is_shared = all(name in other.fields for other in entries)
            method = "" if is_shared else entry.result["method"]
            values.setdefault((method, name), set()).add(value)
    differing = {key for key, different_values in values.items() if len(different_values) > 1}
    variants: dict[str, dict[int, float]] = {}
    for entry in entries:
        variant = entry.result["method"]
        for name, value in entry.fields.items():
            if {("", name), (entry.result["method"], name)} & differing:
                variant += f", {name} {value}"
        seed = entry.result["seed"]
        accuracies = variants.setdefault(variant, {})
        if seed in accuracies:
            return f"Not paired: {variant} with seed {seed} is there twice."
        accuracies[seed] = entry.reached(DELIVERED_READOUT)
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
    lines = [f"What is delivered, by seed ({spoken_seeds(seeds)}), against {first}:"]
    for variant in others:
        reached = [variants[variant][seed] for seed in seeds]
        reached_by_first = [variants[first][seed] for seed in seeds]
        test = paired_test(reached, reached_by_first)
        if reached == reached_by_first:
            finding = "equal in every seed"
        elif test.p is not None and test.n >= ENOUGH_SEEDS:
            finding = f"paired t-test p = {test.p:.2g}"
        else:
            seeds_so_far = plural(test.n, "seed")
            finding = f"not told apart by {seeds_so_far}: a test takes {ENOUGH_SEEDS}, --seeds 0-4"
        lines.append(f"  {100 * test.mean:+.2f} points  {variant} ({finding})")
    return "\n".join(lines)


def untrained(entries: Sequence[Entry]) -> list[str]:
    """Return a line on runs that deliver what is no better than guessing, where there are any."""
    steps = [
        entry.result["steps"]
        for entry in entries
        if entry.result["delivered"] in guessing(entry.result)
    ]
    if not steps:
        return []
    return [
        f"{len(steps)} of {plural(len(entries), 'run')} deliver what is not shown to be better "
        f"than guessing, after {few(sorted({*steps}))} steps: their differences say nothing of "
        "the methods. Train for more --steps or --minutes."
    ]


def spread(values: Sequence[float]) -> str:
    """Return the mean in %, and the standard deviation of several values.

    >>> spread([0.8, 0.9]), spread([0.8])
    ('85.0 ± 7.1', '80.0')
    """
    mean = f"{100 * statistics.fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.1f}"
