"""The page of a run, ``report.html``: what it reached, its curves, confusion, mistakes, settings and command."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.experiments.accuracies import Comparison, seeds_in_words, spoken_rounds, spread, summary
from metapl.apps.experiments.folder import (
    READOUTS,
    RunFolder,
    counts_of,
    flat,
    refuse_changed,
    results_within,
    stored_data,
)
from metapl.apps.experiments.held_out import HeldOut
from metapl.apps.experiments.run import EndedRun
from metapl.apps.experiments.suspects import suspects_shown
from metapl.apps.machine.sealed import write_whole
from metapl.apps.recipes.methods import EVERY_METHOD, called_network, title
from metapl.apps.reports import web
from metapl.apps.words import short, tell
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.runs.rows import Metrics

PAGE = "report.html"
CURVES = 7  # methods whose curves can be told apart
SHOWN = 12  # mistakes


@dataclass(frozen=True)
class Mistakes:
    """A network on labeled examples: its logits (n, K), their labels (n,), and the mistakes that it is surest of."""

    logits: Tensor
    labels: Tensor
    wrong: int
    surest: list[web.Picture]


def mistakes(network: nn.Module, data: Any, classes: Sequence[str], files: Sequence[str] | None = None) -> Mistakes:
    """Beneath each mistake stands what it is taken for, what it is, and its file."""
    kept: list[tuple[float, web.Picture]] = []
    seen: list[tuple[Tensor, Tensor]] = []
    n = wrong = 0
    for inputs, labels in batches_of(data, torch.device("cpu")):
        logits, labels = predict_logits(network, [(inputs, labels)])
        seen.append((logits, labels))
        best = logits.double().softmax(dim=1).max(dim=1)
        taken = best.indices
        for row in (taken != labels).nonzero()[:, 0].tolist():
            sure, file = float(best.values[row]), (files or ())[n + row : n + row + 1]  # some have no file
            words = [f"{classes[int(taken[row])]} {100 * sure:.0f} %", f"is {classes[int(labels[row])]}", *file]
            kept.append((sure, web.Picture(inputs[row], "\n".join(words))))
            wrong += 1
        n += len(labels)
        kept = sorted(kept, key=lambda each: -each[0])[:SHOWN]  # the others need no memory
    logits, labels = map(torch.cat, zip(*seen, strict=True))
    return Mistakes(logits, labels, wrong, [picture for _, picture in kept])


def write_page(run: EndedRun, found: Mistakes | None = None) -> None:
    """The page of a run in its folder."""
    heading, parts = page_of(run, found)
    write_whole(run.folder.path / PAGE, html_of(run.folder.path, heading, parts), "make room, then: metapl report.")


def html_of(folder: Path, heading: str, parts: Sequence[str]) -> bytes:
    return web.web_page(heading, [f"<h1>{web.text(heading)}</h1>", web.paragraph(folder, "quiet"), *parts])


def last_fit(folder: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the main phase of a run, which of Noisy Student is the last round."""
    rounds, file = EVERY_METHOD[content["method"]].is_noisy_student, folder / "metrics.jsonl"
    refuse_changed(file, content)
    return Metrics(file).rows(f"round-{len(content['rounds'])}" if rounds else "fit")


def page_of(run: EndedRun, found: Mistakes | None = None) -> tuple[str, list[str]]:
    """The heading and the parts of the page of a run that has ended; ``found``: what is not to be looked for again."""
    result, path, reached = run.result, run.folder.path, run.result.get("test_accuracy")
    reached = result.get("validation_accuracy") if reached is None else reached
    heading = f"{result['recipe']}: {title(result['method'])}, seed {result['seed']}"
    parts = [] if reached is None else [f'<p class="number">{100 * reached:.1f} %</p>']
    parts += map(web.paragraph, summary(result))
    evaluation = Evaluation(**result["evaluation"]) if "evaluation" in result else None
    if run.is_comparison and evaluation is not None:
        heading = f"{result['recipe']}: {len(result['methods'])} methods, {seeds_in_words(len(result['seeds']))}"
        parts = [
            *_compared(run, evaluation),
            web.section(f"{result['delivery'][:1].upper()}{result['delivery'][1:]}.", *parts),
        ]
    else:
        network = run.cards["student"].title
        parts.append(web.section("Curves", web.plots({result["method"]: last_fit(path, result)}, network)))
    if "rounds" in result:
        parts.append(web.section("Rounds", *_rounds(result["rounds"])))
    if evaluation is not None:
        names = [short(str(name), 60) for name in evaluation.classes or range(len(evaluation.confusion))]
        parts.append(web.section("Confusion on the test set", web.matrix(evaluation, names)))
        parts.append(web.section("Classes", web.classes(evaluation, names)))
        parts.append(_mistakes(run, found))
    parts.append(suspects_shown(path, run.cards["student"].input))
    return heading, [*parts, *made(run.folder, run.description, run.source)]


def _compared(run: EndedRun, evaluation: Evaluation) -> Iterator[str]:
    """The methods of a comparison side by side, the paired test, and their curves where their runs are still there."""
    result, path = run.result, run.folder.path
    chance = result.get("chance", evaluation.chance)
    found = Comparison(tuple(result["seeds"]), result["methods"], evaluation.n, chance)
    cells = [
        (title(name), *(spread(of[readout], digits=1) for readout in READOUTS)) for name, of in found.methods.items()
    ]
    yield web.paragraph(found.sentence())
    table = web.rows(cells, ("method", "delivered", "student", "finetuned"))
    yield web.section("Methods", table, web.paragraph(found.caption(), "quiet"))
    if (difference := found.against_control()) is not None:
        test, pair = difference[0], [title(name) for name in found.pair() or ()]
        figures = {"difference": f"{100 * test.mean:+.2f} points", "pairs of one seed": test.n}
        if test.interval is not None:
            figures["95 % interval"] = " to ".join(f"{100 * end:+.2f}" for end in test.interval)
        names = {"p, paired t-test": test.p, "p, exact permutation test": test.p_permutation}
        figures |= {name: f"{p:.2g}" for name, p in names.items() if p is not None}
        yield web.section(" against ".join(pair), web.rows([*figures.items()]))
    if not all(RunFolder(path / name / f"seed-{seed}").exists for name in found.methods for seed in found.seeds):
        yield web.section("Curves", web.paragraph("The folders of the runs are not there any more."))
        return
    curves = mean_curves(path, found, results_within(path, result))
    plots = web.plots(curves, called_network(curves))
    yield web.section("Curves", plots, web.paragraph("means over the seeds", "quiet"))


def _mistakes(run: EndedRun, found: Mistakes | None) -> str:
    """The surest mistakes on the test set; or why there are none."""
    try:
        if found is None:
            name = run.result["delivered"]
            on = HeldOut(run, name)
            found = mistakes(run.network(name).to(run.device), on.batches(), run.classes, on.names)
    except (MetaplError, OSError) as error:
        tell(f"metapl: the test pictures are left out: {error}", file=sys.stderr, wrap=True)
        return web.section("Surest mistakes", web.paragraph(f"The test pictures are left out: {error}"))
    whose = f"of the {run.cards[run.result['delivered']].title} on test"
    note = f"{whose}: {found.wrong:,} of {len(found.labels):,} are wrong"
    return web.pictures("Surest mistakes", note, found.surest)


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each round reached and kept, and the classes of the last one."""
    yield from map(web.paragraph, spoken_rounds(rounds))
    cells = [(0, "", "", "", _share(rounds[0]["teacher"].get("test_accuracy")))]
    for each in rounds:
        changed = "" if each["changed_labels"] is None else f"{each['changed_labels']:,}"
        counts = f"{each['kept']:,} of {each['unlabeled']:,}", f"{each['copies']:,}"
        cells.append((each["round"], *counts, changed, _share(each.get("test_accuracy"))))
    yield web.rows(cells, ("round", "kept", "with copies", "labels changed", "test accuracy"))
    last = rounds[-1]
    classes = [
        (name, f"{count:,}", f"{last['kept_per_class'][name]:,}", f"{last['copies_per_class'][name]:,}")
        for name, count in last["labeled_per_class"].items()
    ]
    yield web.folded("classes of the last round", web.rows(classes, ("class", "labeled so", "kept", "with copies")))


def _share(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f} %"


def made(folder: RunFolder, description: Mapping[str, Any], source: RunFolder) -> Iterator[str]:
    """On what, by which settings and with what a run was made, folded."""
    by = folder.description() if folder.exists else {}
    if "command" in by:
        yield web.section("Command", f"<pre>{web.text(by['command'])}</pre>")
    there = source.exists and (source.ended or (source.path / "data.json").exists())
    data = stored_data(source) if there else {}
    counts = {part: f"{count:,} examples" for part, count in counts_of(data).items()}
    counts |= {f"SHA-256 of {part}": digest for part, digest in data.get("hash", {}).items()}
    yield web.folded("Data", web.rows([*counts.items()])) if counts else ""
    told = {name: value for name, value in description.items() if name != "fields"} | flat(description["fields"])
    yield web.folded("Settings", web.rows([(name, json.dumps(value)) for name, value in told.items()]))
    yield web.folded("Versions and hardware", web.rows([*by.get("made_with", {}).items()]))


def mean_curves(
    folder: Path, comparison: Comparison, results: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, list[dict[str, float]]]:
    """The rows of the first methods, averaged over seeds."""
    return {
        method: mean_rows([last_fit(folder / method / f"seed-{s}", results[method, s]) for s in comparison.seeds])
        for method in list(comparison.methods)[:CURVES]
    }


def mean_rows(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """Rows averaged over runs, step by step, of the figures that every run has there.

    >>> mean_rows([[{"step": 1, "x": 1.0}], [{"step": 1, "x": 3.0}]])
    [{'step': 1, 'x': 2.0}]
    """
    by_step: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in (row for rows in runs for row in rows):
        by_step[row["step"]].append(row)
    found = []
    for step, rows in sorted(by_step.items()):
        if len(rows) == len(runs):
            names = [k for k in rows[0] if k != "step" and all(isinstance(row.get(k), float) for row in rows)]
            found.append({"step": step, **{name: sum(row[name] for row in rows) / len(rows) for name in names}})
    return found
