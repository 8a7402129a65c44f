"""``metapl compare RUN RUN...``: accuracies of runs, and evaluations, side by side."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from metapl.apps.commands.evaluate import EVALUATION
from metapl.apps.commands.inputs import counted, held, written
from metapl.apps.commands.parse import Command, Folder, unset
from metapl.apps.evaluation.corruptions import CORRUPTIONS
from metapl.apps.evaluation.measure import FLIPS_OF_ALEXNET, LEVELS, Attack
from metapl.apps.experiments.accuracies import ENOUGH_SEEDS, READOUTS, STUDENT, Comparison, spread, where_one_network
from metapl.apps.experiments.folder import LoadedRun, RunFolder, flat, load_run, results_within, stored_data
from metapl.apps.machine.misfit import misfit_entries
from metapl.apps.machine.sealed import read_json
from metapl.apps.recipes import ImageFolders, Recipe
from metapl.apps.recipes.base import as_dict
from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.apps.reports.canvas import PALETTE
from metapl.apps.reports.robustness import RELATIVE, SUMMARY, draw_evaluations, value_at
from metapl.apps.words import short, table, tell, wrapped
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation, paired_test
from metapl.runs.fields import AtLeastOne, Range

COMPARED, PICTURE = "compared.json", "compared.png"

# Fields in which runs may differ: the seed, the method, which is looked at apart, and what changes no number. Those
# that decide which examples a recipe draws from its data set. And what stands for a field that follows from how many
# steps fitted into a run's minutes.
IRRELEVANT = ("seed", "method", "log_every", "save_every", "exact_every", "keep")
DRAWN_BY = ("seed", "labels_per_class", "validation", "split")
MEASURED = "by the minutes"


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Put the test accuracies of runs side by side, and test whether they differ.

    Differences are tested in pairs of the same seed, and so of the same split: where every method (or the same method
    with other options) was run with the same seeds. Otherwise, or with other numbers of labels, the accuracies are
    listed, with the reason. Runs whose steps were measured to fit into the same minutes are paired whatever their
    number. Runs of different recipes, on different data or of different classes are refused: their test sets differ.

    Folders that metapl evaluate --out wrote to are put side by side too, with every figure that they have: metapl
    compare robust/a robust/b. Where all of several run folders have such an evaluation, it follows.

    Args:
        folders: run folders, of single runs or of comparisons; or folders with an evaluation.json.
        out: folder for compared.json and compared.png, of evaluations; made if need be.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, unset("RUN...")]
    out: Folder = None

    def run(self) -> int:
        places = [path.resolve() for path in self.folders]
        for path, place in zip(self.folders, places, strict=True):
            if places.count(place) > 1:
                raise MetaplError(f"{path} was given twice.")
        evaluated = [path for path in self.folders if (path / EVALUATION).is_file()]
        of_runs = all(RunFolder(path).exists for path in evaluated)
        lacking = next((path for path in self.folders if path not in evaluated), None)
        if of_runs and self.out is not None and lacking is not None:
            raise MetaplError(
                f"--out is for evaluations, and {lacking} has no {EVALUATION}; write it by: metapl evaluate {lacking} "
                f"--out {lacking}."
            )
        if of_runs:
            _compare_runs(self.folders)
        if not of_runs or (lacking is None and (len(self.folders) > 1 or self.out is not None)):
            found = read_evaluations(self.folders)
            tell("\n" * of_runs + evaluations_table(found))
            if self.out is not None:
                write_comparison(self.out, found)
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
    runs = [load_run(path) for path in folders]
    names = {run.recipe.name: run.folder.path for run in runs}
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


def _entries(run: LoadedRun) -> Iterator[Entry]:
    # A folder of pictures is the data; other recipes draw theirs from a data set.
    drawn_by = () if isinstance(run.recipe, ImageFolders) else DRAWN_BY
    fields, path, runs = _fields(run.recipe), run.folder.path, [(run.folder, run.result)]
    results = {(run.result["method"], run.result["seed"]): run.result}
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
        given, before = ((one.place, one.evaluation.classes) for one in (entry, entries[0]))
        mend = "Train both on folders with the same classes, or compare each with runs on its own."
        _refuse_other_classes(given, before, mend)
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


def _refuse_other_classes(one: tuple[Any, Any], other: tuple[Any, Any], mend: str) -> None:
    """Of two places, each with its classes or None."""
    (place, names), (there, others) = one, other
    if names is not None and others is not None and list(names) != list(others):
        alone = [name for name in (*names, *others) if name not in names or name not in others]
        differing = f"only one of them has {few(alone)}" if alone else "the order of the classes differs"
        raise MetaplError(f"{place} and {there} are of different classes: {differing}. {mend}")


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


Evaluations = Mapping[str, Mapping[str, Any]]
Share = Annotated[float, Range(0, most=1)]
InPercent = Annotated[float, Range(0)] | None


@dataclass(frozen=True)
class _Found:
    run: str | None
    method: str | None
    network: str | None
    weights: str | None
    test: str | None
    n: AtLeastOne
    accuracy: Share
    expected_calibration_error: Share
    error: Share
    flip_probability: Share
    top5: Share | None
    mean_corrupted_accuracy: Share | None
    mean_corruption_error: InPercent
    mean_flip_rate: InPercent
    interval: tuple[Share, Share] | None
    attacks: dict[str, dict[str, Share]]
    corruptions: dict[str, _Found]
    perturbations: dict[str, _Found]
    multi_label: _Found
    imagenet_a: _Found
    imagenet_c: _Found
    imagenet_p: _Found


KINDS: dict[str, Collection[str]] = {"corruptions": CORRUPTIONS, "perturbations": FLIPS_OF_ALEXNET}
KINDS |= {"attacks": get_args(Attack)}


def read_evaluations(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What the folders' ``evaluation.json`` hold, by folder; refused where they have nothing in common."""
    if not 2 <= len(folders) <= len(PALETTE):
        raise MetaplError(
            f"{counted(len(folders), 'evaluation')} to compare; expected 2 to {len(PALETTE)}: metapl compare robust/a "
            "robust/b."
        )
    found = {str(folder): _read(folder / EVALUATION) for folder in folders}
    (first, one), *others = found.items()
    for name, other in others:
        mend = "Evaluate both on pictures of the same classes."
        _refuse_other_classes((name, other.get("classes")), (first, one.get("classes")), mend)
        if _figures(one).keys().isdisjoint(_figures(other)):
            raise MetaplError(
                f"{name} and {first} have no figure in common: {few(_figures(other))} and {few(_figures(one))}. "
                "Evaluate both by the same flags."
            )
    return found


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise MetaplError(f"{file.parent} has no {EVALUATION}; write it by: metapl evaluate ... --out {file.parent}.")
    again = "Expected what metapl evaluate --out writes: write it again."
    content = read_json(file, mend=again)
    try:
        hints = get_type_hints(_Found, include_extras=True) | {"classes": tuple[str, ...] | None}
        if fault := misfit_entries(content, hints, ""):
            raise ValueError(fault)
        _figures(content)
        parts = [content, *(content.get(part, {}) for part in ("imagenet_c", "imagenet_p"))]
        kinds = {kind for part in parts for name in KINDS for kind in part.get(name, {}) if kind not in KINDS[name]}
        if kinds:
            raise ValueError(f"it is of {few(map(short, sorted(kinds)))}, which are not known")
        if content.get("attacks") and content.get("accuracy") is None:
            raise ValueError("it has attacks, and no accuracy without them")
        for eps in (eps for by_eps in content.get("attacks", {}).values() for eps in by_eps):
            if not re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", eps) or float(eps) > LEVELS:
                raise ValueError(f"attacks have ε = {short(eps)}; expected 0 to {LEVELS}")
    except LookupError as error:
        raise MetaplError(f"{file} is damaged: an entry lacks its {error}. {again}") from error
    except ValueError as error:
        raise MetaplError(f"{file} is damaged: {error}. {again}") from error
    return content


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    """All figures of an evaluation by what they are called: shares in [0, 1], and those in % of AlexNet's."""
    figures = {name: value_at(found, place) for name, place in (SUMMARY | RELATIVE).items()}
    for prefix, part in (("", found), ("ImageNet-C ", found.get("imagenet_c", {}))):
        found_here = part.get("corruptions", {})
        figures |= {f"{prefix}error, {kind}": found_here[kind]["error"] for kind in CORRUPTIONS if kind in found_here}
    for attack, by_eps in found.get("attacks", {}).items():
        figures |= {f"{attack.upper()}, ε = {eps}/255": float(value) for eps, value in by_eps.items()}
    flips = found.get("imagenet_p", {}).get("perturbations", {})
    figures |= {f"flips, {name}": kind["flip_probability"] for name, kind in flips.items()}
    return {name: value for name, value in figures.items() if value is not None}


def evaluations_table(evaluations: Evaluations) -> str:
    letters = "ABCDEFG"[: len(evaluations)]
    figures = [
        {name: value if name in RELATIVE else 100 * value for name, value in _figures(found).items()}
        for found in evaluations.values()
    ]
    two = len(figures) == 2
    rows = [("in %", *letters, *(["B - A"] * two))]
    for name in dict.fromkeys(name for found in figures for name in found):
        cells = [f"{found[name]:.1f}" if name in found else "-" for found in figures]
        if two:
            cells.append("-" if "-" in cells else f"{figures[1][name] - figures[0][name]:+.1f}")
        rows.append((name, *cells))
    named = [
        "\n   ".join([f"{letter}  {short(name, 70)}", *_measured(found)])
        for letter, (name, found) in zip(letters, evaluations.items(), strict=True)
    ]
    counts, tests = ({found.get(key) for found in evaluations.values()} - {None} for key in ("n", "test"))
    note = ""
    if len(counts) > 1:
        note = "\n\nnote: the numbers of test pictures differ, so these are not the same pictures"
    elif len(tests) > 1:
        note = "\n\nnote: the folders of test pictures differ; differences count where the pictures are the same"
    return "\n".join(named) + f"\n\n{table(rows)}{note}"


def _measured(found: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, on what, and how far the top-1 accuracy is known, where the evaluation says so."""
    if found.get("run") is not None:
        method, name = EVERY_METHOD.get(str(found.get("method"))), str(found.get("network"))
        yield f"{name if method is None else method.networks.get(name, name)} of {short(str(found['run']), 50)}"
    elif found.get("weights") is not None:
        yield short(str(found["weights"]), 70)
    if found.get("n") is not None:
        folder = found.get("test")
        yield f"{found['n']:,} test pictures{'' if folder is None else f' of {short(str(folder), 50)}'}"
    if found.get("interval") is not None:
        low, high = found["interval"]
        yield f"95 % interval of top-1: {100 * low:.1f} to {100 * high:.1f}"


def write_comparison(folder: Path, evaluations: Evaluations) -> None:
    content = {"evaluations": {name: _figures(found) for name, found in evaluations.items()}}
    with held(folder, COMPARED, PICTURE), written(folder, COMPARED, f"{json.dumps(content, indent=1)}\n"):
        draw_evaluations(folder / PICTURE, evaluations, "evaluations side by side")
