"""The page of a run, ``report.html``: what it reached, its curves, confusion, mistakes, settings and command."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metapl.apps import web
from metapl.apps.comparison import Comparison, seeds_in_words
from metapl.apps.held_out import HeldOut
from metapl.apps.machine.sealed import write_whole
from metapl.apps.run import EndedRun, RunFolder, counts_of, refuse_changed, results_within, stored_data, stored_result
from metapl.apps.suspects import suspects_shown
from metapl.apps.words import short, tell
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, interval, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.runs.atomic import replacing
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
    file = folder / "metrics.jsonl"
    refuse_changed(file, content)
    return Metrics(file).rows(f"round-{len(content['rounds'])}" if "rounds" in content else "fit")


def page_of(run: EndedRun, found: Mistakes | None = None) -> tuple[str, list[str]]:
    """The heading and the parts of the page of a run that has ended; ``found``: what is not to be looked for again."""
    result, path, reached = run.result, run.folder.path, run.result.get("test_accuracy")
    reached = result.get("validation_accuracy") if reached is None else reached
    heading = f"{result['recipe']}: {result['title']}, seed {result['seed']}"
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
        parts.append(web.section("Curves", web.plots({result["title"]: last_fit(path, result)}, network)))
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
    found = Comparison(tuple(result["seeds"]), result["methods"], result["titles"], evaluation.n, chance)
    head, *cells = found.rows()
    yield web.paragraph(found.sentence())
    yield web.section("Methods", web.rows(cells, head), web.paragraph(found.caption(), "quiet"))
    if (compared := found.against_control()) is not None:
        test, pair = compared[4], [found.titles[compared[0]], found.titles[compared[2]]]
        figures = {"difference": f"{100 * test.mean:+.2f} points", "pairs of one seed": test.n}
        if test.interval is not None:
            figures["95 % interval"] = " to ".join(f"{100 * end:+.2f}" for end in test.interval)
        names = {"p, paired t-test": test.p, "p, exact permutation test": test.p_permutation}
        figures |= {name: f"{p:.2g}" for name, p in names.items() if p is not None}
        yield web.section(" against ".join(pair), web.rows([*figures.items()]))
    if not all(RunFolder(path / name / f"seed-{seed}").exists for name in found.methods for seed in found.seeds):
        yield web.section("Curves", web.paragraph("The folders of the runs are not there any more."))
        return
    results_within(path, result)  # they are those that were compared
    plots = web.plots(curves_of(path, found), "network")
    yield web.section("Curves", plots, web.paragraph(f"of seed {found.seeds[0]}", "quiet"))


def _mistakes(run: EndedRun, found: Mistakes | None) -> str:
    """The surest mistakes on the test set; or why there are none."""
    try:
        if found is None:
            name = run.result["delivered"]
            on = HeldOut(run, name)
            found = mistakes(run.network(name).to(run.device), on.batches(), run.classes, on.names)
    except (MetaplError, OSError) as error:
        tell(f"metapl: the test pictures are left out: {error}", file=sys.stderr)
        return web.section("Surest mistakes", web.paragraph(f"The test pictures are left out: {error}"))
    whose = f"of the {run.cards[run.result['delivered']].title} on test"
    note = f"{whose}: {found.wrong:,} of {len(found.labels):,} are wrong"
    return web.pictures("Surest mistakes", note, found.surest)


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each round reached and kept, and the classes of the last one."""
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
    told = {name: value for name, value in description.items() if name != "fields"} | description["fields"]
    yield web.folded("Settings", web.rows([(name, json.dumps(value)) for name, value in told.items()]))
    yield web.folded("Versions and hardware", web.rows([*by.get("made_with", {}).items()]))


def curves_of(folder: Path, comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """The rows of the first methods of a comparison, each with the first seed."""
    runs = {method: RunFolder(folder / method / f"seed-{comparison.seeds[0]}") for method in comparison.methods}
    return {method: last_fit(run.path, stored_result(run)) for method, run in [*runs.items()][:CURVES]}


# ------------------------------------------------------------------------------------------------------- in sentences


def summary(content: Mapping[str, Any]) -> list[str]:
    """What a run reached, in sentences: ``result.json`` in words."""
    words, lines = content["networks"], list[str]()
    name, tested, rounds = content["delivered"], content.get("evaluation"), content.get("rounds")
    why = "by validation" if content["delivered_by"] == "validation" else "the rule where validation cannot tell"
    if rounds is not None:
        why = "of the last round" + ", at its best step by validation" * (why == "by validation")
    if tested is not None:
        chance = Evaluation(**tested).chance
        lines.append(f"Test accuracy of the {words[name]}: {spoken(tested['accuracy'], tested['n'], chance)}.")
        if interval(round(tested["accuracy"] * tested["n"]), tested["n"])[0] <= chance:
            lines.append("That is not shown to be better than guessing: it may need more steps, or other choices.")
    if (reached := content.get("validation_accuracy")) is not None:
        guessed = content.get("validation_chance")  # older runs did not store it
        lines.append(f"Validation accuracy: {spoken(reached, content['validation_size'], guessed)}.")
    if not lines:
        lines.append(f"The {words[name]} is delivered; without --test and --val nothing says how good it is.")
    part = "test" if tested is not None else "validation"
    others = {name: content.get(f"{name}_{part}_accuracy") for name in words}
    shown = ", ".join(f"{words[name]} {100 * value:.1f} %" for name, value in others.items() if value is not None)
    if shown:
        lines.append(f"On {part}: {shown}; delivered is the {words[name]} ({why}).")
    lines += control(content)
    if tested is not None and rounds:
        reached = [each.get("test_accuracy") or 0.0 for each in (rounds[0]["teacher"], *rounds[:-1])]
        if (best := max(reached)) > tested["accuracy"]:
            which = f"Round {reached.index(best)} reached {100 * best:.1f} % on test, more than the last"
            lines.append(f"{which}, which is delivered by rule: the test set chooses nothing.")
    return lines


def control(content: Mapping[str, Any]) -> list[str]:
    """What the linear control of a run reached, and whether the run is behind it."""
    if "control_accuracy" not in content:
        return []
    part = "test" if "test_accuracy" in content else "validation"
    what = f"logistic regression on the {content['control_of']} of the labeled pictures alone"
    lines = [f"The control, {what}: {100 * content['control_accuracy']:.1f} % on {part}."]
    if content[f"{part}_accuracy"] < content["control_accuracy"]:
        lines.append("This run is behind its control: what is this simple does better here.")
    return lines


def spoken(accuracy: float, n: int, chance: float | None) -> str:
    """An accuracy in words, with its number of examples n, its 95 % interval, and what guessing reaches where known.

    >>> spoken(131 / 150, 150, 0.1)
    '87.3 % (n = 150, 95 % interval 81.1-91.7, chance 10.0 %)'
    """
    low, high = (f"{100 * end:.1f}" for end in interval(round(accuracy * n), n))
    guessed = "" if chance is None else f", chance {100 * chance:.1f} %"
    return f"{accuracy * 100:.1f} % (n = {n:,}, 95 % interval {low}-{high}{guessed})"


# --------------------------------------------------------------------------------------------------------- report.png

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", ":", "-.")  # those of a panel; colors and lines begin again where a figure has more
MOST_NAMED, MOST_NUMBERED = 60, 20  # classes of a matrix whose names, and whose counts, can be read


def draw_report(path: Path, *, title: str, curves: web.Curves, evaluation: Evaluation | None, network: str) -> None:
    """A panel for each group of figures, and the confusion matrix on the test set where there is one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    panels = web.panels_of(curves, network)
    count = len(panels) + (evaluation is not None)
    columns = max(1, min(4, math.ceil(count / 2)))
    figure = Figure((4.6 * columns, 3.6 * math.ceil(max(1, count) / columns) + 0.5), 150, layout="constrained")
    plain: Any = {"parse_math": False}  # a name with a $ is a name
    figure.suptitle(short(title, 90), x=0.01, ha="left", **plain)
    places = [figure.add_subplot(math.ceil(count / columns), columns, number + 1) for number in range(count)]
    for panel, axes in zip(panels, places, strict=False):
        axes.set_title(panel.title, fontsize=10, loc="left")
        for number, (method, rows) in enumerate(curves.items()):
            for rank, (key, name) in enumerate(panel.series):
                if points := panel.points(rows, key):
                    steps, values = np.array(points).T
                    axes.plot(
                        steps,
                        panel.means(values),
                        color=COLORS[(number if len(curves) > 1 else rank) % len(COLORS)],
                        linestyle=LINES[rank % len(LINES)],
                        marker="o" if len(values) == 1 else None,
                        label=f"{method}, {name}" if len(curves) > 1 else name,
                    )
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("step", loc="right")
        axes.grid(color="#dddddd")
        axes.legend(fontsize=7).set_in_layout(False)  # of many methods it is higher than the panel
    if evaluation is not None:
        counts, axes = np.array(evaluation.confusion), places[-1]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.set_title(f"Confusion on test, {100 * evaluation.accuracy:.1f} % right", fontsize=10, loc="left")
        axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)  # the root shows a mistake in a hundred
        axes.set(xlabel="predicted", ylabel="true")
        if len(counts) <= MOST_NAMED:
            names = [short(str(name), 14) for name in evaluation.classes or range(len(counts))]
            look: Any = {"fontsize": 8 if len(counts) <= MOST_NUMBERED else 5, **plain}
            axes.set_xticks(range(len(counts)), names, rotation=90, **look)
            axes.set_yticks(range(len(counts)), names, **look)
        for row, column in np.argwhere(counts) if len(counts) <= MOST_NUMBERED else ():
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, str(counts[row, column]), color=color, ha="center", va="center", fontsize=7)
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # boxes stand for letters that the font does not have
        figure.savefig(file, format="png", metadata={"Software": None})
