"""``metapl report``: the page of a run, ``report.html``, and its picture, ``report.png``."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from metapl.apps import web
from metapl.apps.inputs import HeldOut, Run, check_file, plural
from metapl.apps.list_runs import state_of
from metapl.apps.machine import read_plain, write_whole
from metapl.apps.methods import Doubtful
from metapl.apps.methods_over_seeds import Comparison
from metapl.apps.pictures.input import Input
from metapl.apps.printing import short, tell, written_csv
from metapl.apps.run_folder import (
    EndedRun,
    RunFolder,
    counts_of,
    guessing,
    refuse_changed,
    results_within,
    stored_data,
    stored_result,
)
from metapl.apps.settings import unset
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, interval, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.problems import Table
from metapl.runs.folder import read_rows
from metapl.training import Trainer
from metapl.training.trainer import BilevelTrainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, PICTURE = "report.html", "report.png"
# The most methods whose curves can be told apart.
MOST_CURVES = 7

# Mistakes that are shown.
SHOWN = 12

# The most classes of a table that is open.
MOST_UNFOLDED = 40


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a web page of a run: its accuracy, curves, confusions, mistakes and settings.

    The page is one file, and a run that ended has written it already. It shows the accuracy, the
    curves of losses, validation and feedback, the confusion matrix, each class, the surest mistakes
    on the test set if its pictures are still there, the settings, the command and the versions. The
    page of a comparison shows its methods side by side, the paired test, and the run that it
    delivers. The page of a run that has not ended shows how far it has come.

    A page that was written before is replaced; another file is not.

    Args:
        folder: folder of a run.
        out: file of the page, whose name ends with .html.
    """

    folder: Run
    out: Annotated[Path | None, unset("FILE.html", default="(default: RUN/report.html)")] = None

    def run(self) -> int:
        out, folder = self.out or self.folder / PAGE, RunFolder(self.folder)
        # Without --out and a folder there is no run, which is said further on.
        if self.out is not None or self.folder.is_dir():
            check_file(out, ".html")
        if out.exists() and web.GENERATOR.encode() not in read_plain(out)[:1000]:
            raise MetaplError(
                f"{out} is there, and metapl report did not write it; expected another --out "
                "FILE.html."
            )
        if folder.exists and not folder.ended:
            state = state_of(folder)
            heading = f"{state['recipe']}: {' and '.join(state['methods'])}, {state['state']}"
            curves = {state["phase"]: read_rows(self.folder / "metrics.jsonl", state["phase"])}
            picture = draw(title=heading, curves=curves, evaluation=None, network="network")
            parts = [
                web.rows([(name, json.dumps(value)) for name, value in state.items()]),
                drawn(picture),
            ]
            parts += provenance(folder, folder.recipe(), folder)
        else:
            heading, _, parts = page_of(EndedRun.load(self.folder))
        page = web.web_page(heading, self.folder, parts)
        write_whole(
            out, page, "any earlier page is as it was; expected a disk with room, or another --out."
        )
        tell(
            f"{heading}\nthe page is written: {out}, {len(page) / 1e3:,.0f} kB; open it in a "
            "browser"
        )
        return 0


@dataclass(frozen=True)
class Mistakes:
    """What a network reaches on labeled examples, and the mistakes that it is surest of."""

    evaluation: Evaluation
    surest: list[web.Picture]


def mistakes(
    network: nn.Module, data: Any, classes: Sequence[str], files: Sequence[str] | None = None
) -> Mistakes:
    """Beneath each mistake stands what it is taken for, what it is, and its file."""
    kept: list[tuple[float, web.Picture]] = []
    seen: list[tuple[Tensor, Tensor]] = []
    n = 0
    for inputs, labels in batches_of(data, torch.device("cpu")):
        logits, labels = predict_logits(network, [(inputs, labels)])
        seen.append((logits, labels))
        best = logits.double().softmax(dim=1).max(dim=1)
        taken = best.indices
        for row in (taken != labels).nonzero()[:, 0].tolist():
            sure = float(best.values[row])
            # Some pictures have no file.
            file = (files or ())[n + row : n + row + 1]
            words = [
                f"{classes[int(taken[row])]} {100 * sure:.0f} %",
                f"is {classes[int(labels[row])]}",
                *file,
            ]
            kept.append((sure, web.Picture(inputs[row], "\n".join(words))))
        n += len(labels)
        # The others need no memory.
        kept = sorted(kept, key=lambda each: -each[0])[:SHOWN]
    logits, labels = map(torch.cat, zip(*seen, strict=True))
    return Mistakes(
        evaluate_logits(logits, labels, list(classes)), [picture for _, picture in kept]
    )


def write_report(run: EndedRun, found: Mistakes | None = None) -> None:
    """Write the page of a run and its picture into its folder."""
    heading, picture, parts = page_of(run, found)
    content = {PICTURE: picture, PAGE: web.web_page(heading, run.folder.path, parts)}
    for name, data in content.items():
        write_whole(run.folder.path / name, data, "make room, then go on with --resume.")


def page_of(run: EndedRun, found: Mistakes | None = None) -> tuple[str, bytes, list[str]]:
    """Return the heading, the picture and the parts of the page of a run that has ended.

    ``found`` is what is not to be looked for again.
    """
    result, path, delivered = run.result, run.folder.path, run.cards[run.result["delivered"]].title
    evaluation = Evaluation(**result["evaluation"]) if "evaluation" in result else None
    # 1. What it reached; of a comparison, the methods side by side and the paired test.
    reached = result.get("test_accuracy", result.get("validation_accuracy"))
    heading, network, note = (
        f"{result['recipe']}: {result['title']}, seed {result['seed']}",
        "network",
        "",
    )
    parts = [] if reached is None else [f'<p class="number">{100 * reached:.1f} %</p>']
    parts += map(web.paragraph, summary(result))
    if run.is_comparison and evaluation is not None:
        methods, seeds = result["methods"], result["seeds"]
        heading = f"{result['recipe']}: {len(methods)} methods, {plural(len(seeds), 'seed')}"
        comparison = Comparison(
            tuple(seeds), methods, result["titles"], evaluation.n, result["chance"]
        )
        head, *cells = comparison.rows()
        own = web.section(f"{result['delivery'][:1].upper()}{result['delivery'][1:]}.", *parts)
        parts = [web.paragraph(result["sentence"])]
        parts.append(
            web.section(
                "Methods", web.rows(cells, head), web.paragraph(comparison.caption(), "quiet")
            )
        )
        against = comparison.against_control()
        if against is not None:
            test = against.test
            figures = {"difference": f"{100 * test.mean:+.2f} points", "pairs of one seed": test.n}
            if test.interval is not None:
                figures["95 % interval"] = " to ".join(f"{100 * end:+.2f}" for end in test.interval)
            kinds = {"p, paired t-test": test.p, "p, exact permutation test": test.p_permutation}
            figures |= {name: f"{p:.2g}" for name, p in kinds.items() if p is not None}
            titles = result["titles"]
            title = f"{titles[against.method]} against {titles[against.control]}"
            parts.append(web.section(title, web.rows([*figures.items()])))
        parts.append(own)
        # 2. Curves: those of the first seed, where the runs that were compared are still there.
        places = {
            (name, seed): RunFolder(path / name / f"seed-{seed}")
            for name in methods
            for seed in seeds
        }
        if all(place.exists for place in places.values()):
            results_within(path, result)
            firsts = {name: places[name, seeds[0]] for name in [*methods][:MOST_CURVES]}
            curves = {name: last_fit(one.path, stored_result(one)) for name, one in firsts.items()}
            note = f"Curves are those of seed {seeds[0]}."
        else:
            curves, note = {}, "Without curves: the folders of the runs are not there any more."
    else:
        curves, network = {result["title"]: last_fit(path, result)}, run.cards["student"].title
    picture = draw(title=heading, curves=curves, evaluation=evaluation, network=network)
    parts.append(drawn(picture, note))
    # 3. Rounds of Noisy Student: what each reached and kept.
    if "rounds" in result:
        rounds, last = result["rounds"], result["rounds"][-1]
        cells = [("0", "", "", "", share(rounds[0]["teacher"].get("test_accuracy")))]
        for each in rounds:
            changed = "" if each["changed_labels"] is None else f"{each['changed_labels']:,}"
            counts = f"{each['kept']:,} of {each['unlabeled']:,}", f"{each['copies']:,}"
            cells.append((str(each["round"]), *counts, changed, share(each.get("test_accuracy"))))
        kept = [
            (
                name,
                f"{count:,}",
                f"{last['kept_per_class'][name]:,}",
                f"{last['copies_per_class'][name]:,}",
            )
            for name, count in last["labeled_per_class"].items()
        ]
        table = web.rows(kept, ("class", "labeled so", "kept", "with copies"))
        heads = ("round", "kept", "with copies", "labels changed", "test accuracy")
        parts.append(
            web.section(
                "Rounds", web.rows(cells, heads), web.folded("classes of the last round", table)
            )
        )
    # 4. The test set: classes, and the mistakes that the network is surest of.
    if evaluation is not None:
        parts.append(web.section("Classes", classes_of(evaluation)))
        try:
            if found is None:
                on = HeldOut(run, result["delivered"])
                judged = run.network(result["delivered"]).to(run.device)
                found = mistakes(judged, on.batches(), run.classes, on.names)
            wrong = round(found.evaluation.n * (1 - found.evaluation.accuracy))
            note = f"of the {delivered} on test: {wrong:,} of {found.evaluation.n:,} are wrong"
            parts.append(web.pictures("Surest mistakes", note, found.surest))
        except (MetaplError, OSError) as error:
            tell(f"metapl: the test pictures are left out: {error}", file=sys.stderr)
            parts.append(
                web.section(
                    "Surest mistakes", web.paragraph(f"The test pictures are left out: {error}")
                )
            )
    parts.append(suspects_shown(path, run.cards["student"].input))
    return heading, picture, [*parts, *provenance(run.folder, run.description, run.source)]


def last_fit(folder: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the main phase of a run, which of Noisy Student is the last round."""
    file = folder / "metrics.jsonl"
    refuse_changed(file, content)
    return read_rows(file, f"round-{len(content['rounds'])}" if "rounds" in content else "fit")


def drawn(picture: bytes, note: str = "") -> str:
    """Return the picture of a run in its page."""
    image = (
        '<img class="drawn" alt="curves over the steps, and the confusion matrix" '
        f'src="{web.picture(picture)}">'
    )
    return web.section("Curves and confusion", image, web.paragraph(note, "quiet") if note else "")


def share(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.1f} %"


def classes_of(evaluation: Evaluation) -> str:
    """How many of each class are right, the worst first, and what it is most often taken for."""
    names = [
        short(str(name), 60) for name in evaluation.classes or range(len(evaluation.confusion))
    ]
    cells: list[tuple[float, Sequence[object]]] = []
    for index, (name, row) in enumerate(zip(names, evaluation.confusion, strict=True)):
        n, right = sum(row), row[index]
        others = [0 if other == index else count for other, count in enumerate(row)]
        most = max(range(len(row)), key=others.__getitem__)
        taken = f"{names[most]} ({others[most]:,})" if others[most] else ""
        low, high = interval(right, n) if n else (0.0, 1.0)
        reached = f"{100 * right / n:.1f} % ({100 * low:.1f}-{100 * high:.1f})" if n else "-"
        cells.append((right / n if n else 2.0, (name, f"{n:,}", f"{right:,}", reached, taken)))
    head = ("class", "examples", "right", "accuracy (95 %)", "most often taken for")
    found = web.rows([row for _, row in sorted(cells, key=lambda cell: cell[0])], head)
    return (
        found if len(names) <= MOST_UNFOLDED else web.folded(f"all {len(names):,} classes", found)
    )


def provenance(
    folder: RunFolder, description: Mapping[str, Any], source: RunFolder
) -> Iterator[str]:
    """On what, by which settings and with what a run was made, folded."""
    by = folder.description() if folder.exists else {}
    if "command" in by:
        yield web.section("Command", f"<pre>{web.text(by['command'])}</pre>")
    there = source.exists and (source.ended or (source.path / "data.json").exists())
    data = stored_data(source) if there else {}
    counts = {part: f"{count:,} examples" for part, count in counts_of(data).items()}
    counts |= {f"SHA-256 of {part}": digest for part, digest in data.get("hash", {}).items()}
    yield web.folded("Data", web.rows([*counts.items()])) if counts else ""
    settings = {
        name: value for name, value in description.items() if name != "fields"
    } | description["fields"]
    yield web.folded(
        "Settings", web.rows([(name, json.dumps(value)) for name, value in settings.items()])
    )
    yield web.folded("Versions and hardware", web.rows([*by.get("made_with", {}).items()]))


# ------------------------------------------------------------------------- labels that may be wrong

# The list of a run's suspects, and how many of them the page shows.
SUSPECTS = "suspects.csv"
SUSPECTS_SHOWN = 48


def write_suspects(
    folder: Path, doubtful: Doubtful, trained: Trainer, classes: Sequence[str]
) -> str:
    """Write a list of all examples, those with the least probable given label first.

    The network sees them without augmentation. Beside each stands its learned weight, where weights
    of examples were learned. Return what the list says as a whole.
    """
    teacher, weights = trained.teacher, None
    # A table with one number for each example holds the examples' weights.
    if (
        isinstance(trained, BilevelTrainer)
        and isinstance(teacher, Table)
        and teacher.values.ndim == 1
    ):
        weights = teacher.values.detach().cpu().sigmoid().tolist()
    found: list[tuple[float, int, int, int, float]] = []
    for inputs, positions in batches_of(doubtful.examples, torch.device("cpu")):
        given = doubtful.given[positions]
        logits, _ = predict_logits(trained.student, [(inputs, given)])
        log_p = logits.double().log_softmax(dim=1)
        best = log_p.max(dim=1)
        of_given = log_p.gather(1, given[:, None])[:, 0]
        found += zip(
            *(c.tolist() for c in (of_given, positions, given, best.indices, best.values)),
            strict=True,
        )
    with written_csv(folder / SUSPECTS) as writer:
        writer.writerow(
            ["file", "given", "probably", "p_given", "p_probably", *(["weight"] if weights else [])]
        )
        for log_p_given, number, label, taken, log_p_taken in sorted(found):
            shares = [f"{math.exp(each):.3g}" for each in (log_p_given, log_p_taken)]
            cells = [doubtful.names[number], classes[label], classes[taken], *shares]
            writer.writerow([*cells, *([f"{weights[number]:.3g}"] if weights else [])])
    # That is little where the network agrees with few of the labels.
    others = sum(taken != label for _, _, label, taken, _ in found)
    more = ": it has not learned enough for this list; train it longer (--minutes)" * (
        2 * others > len(found)
    )
    return f"of {others:,} of {len(found):,} the network finds another class more probable{more}"


def suspects_shown(folder: Path, given: Input) -> str:
    """Return the first suspects for the page, as far as their pictures are there."""
    if not (folder / SUSPECTS).is_file():
        return ""
    with (folder / SUSPECTS).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    shown = []
    for row in rows[:SUSPECTS_SHOWN]:
        probably = f"{row['probably']}, {float(row['p_probably']):.0%}"
        caption = f"{row['given']}\n{probably}\n{Path(row['file']).name}"
        try:
            x = given.read(Path(row["file"]))
        except (MetaplError, OSError):
            continue
        shown.append(web.Picture(x, caption))
    note = (
        f"of {len(rows):,} labels, the most suspicious first; beneath each, the given label, what "
        f"the network takes it for and how surely, and its file. {SUSPECTS} has all of them."
    )
    return web.pictures("Labels that may be wrong", note, shown)


# -------------------------------------------------------------------------------------- the picture

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# A panel draws its curves in these colors and lines, and begins again where it has more.
LINES = (
    "-",
    "--",
    ":",
    "-.",
)

# The most classes of a matrix whose names, and whose counts, can be read.
MOST_NAMED = 60
MOST_NUMBERED = 20

# Plots of a few quantities over the steps: keys of the rows, and their names in the legend.
PANELS = {
    "Validation accuracy": {
        "student_validation_accuracy": "student",
        "teacher_validation_accuracy": "teacher",
    },
    "Losses": {"inner_loss": "inner (student)", "outer_loss": "outer (labeled)"},
    "Losses of the network": {
        "loss_cross_entropy": "labeled",
        "loss_uda": "unlabeled (strong view, own label)",
        "loss_entropy": "unlabeled (entropy)",
        "loss_noisy_student": "with pseudo-labels",
    },
    "Losses apart, with noise and without": {
        "labeled_loss_with_noise": "labeled, with noise",
        "labeled_loss_without_noise": "labeled, without",
        "unlabeled_loss_with_noise": "unlabeled, with noise",
        "unlabeled_loss_without_noise": "unlabeled, without",
    },
    # A mode that sends back one number has no deviation in a batch.
    "Feedback to the teacher": {
        "feedback_rms": "root mean square in a batch",
        "feedback_std": "standard deviation in a batch",
    },
    "Size of the feedback": {
        "feedback_ratio": "its gradient over that of the teacher's own losses"
    },
    "Signal to noise of the feedback": {"feedback_snr": "of one step, by its examples"},
    "Pseudo-labels": {
        "pseudo_label_accuracy": "accuracy",
        "pseudo_label_confidence": "confidence",
        "agreement": "agreement",
    },
    "Class-frequency error": {"class_shares_vs_truth": "pseudo-labels against the truth"},
    "Class-frequency error of the labels": {
        "class_shares_vs_labeled": "pseudo-labels against the labels"
    },
}
PERCENT = (
    "Validation accuracy",
    "Pseudo-labels",
    "Class-frequency error",
    "Class-frequency error of the labels",
)
# Panels of quantities that are never zero and range over orders of magnitude.
LOGARITHMIC = ("Feedback to the teacher", "Size of the feedback")

# Of a quantity of a method: its numbers, its name in the legend, and its points (step, value).
Line = tuple[int, int, str, list[tuple[float, float]]]


def panels_of(
    curves: Mapping[str, Sequence[Mapping[str, float]]], network: str
) -> dict[str, list[Line]]:
    """Return what there is to draw of each method's rows: the lines of each panel with any."""
    panels: dict[str, list[Line]] = {}
    for panel, names in PANELS.items():
        lines = list[Line]()
        for number, (method, rows) in enumerate(curves.items()):
            for rank, (key, name) in enumerate(names.items()):
                pairs = (
                    (float(r["step"]), float(r[key]))
                    for r in rows
                    if "step" in r and r.get(key) is not None
                )
                finite = (pair for pair in pairs if all(map(math.isfinite, pair)))
                if points := sorted(
                    pair for pair in finite if pair[1] > 0 or panel not in LOGARITHMIC
                ):
                    lines.append(
                        (number, rank, f"{method}, {name}" if len(curves) > 1 else name, points)
                    )
        # Without a teacher there is no such curve.
        if panel == "Validation accuracy" and not any(rank for _, rank, _, _ in lines):
            lines = [
                (number, 0, name.replace("student", network), points)
                for number, _, name, points in lines
            ]
        if lines:
            panels[panel] = lines
    if "Class-frequency error" in panels:
        panels.pop("Class-frequency error of the labels", None)
    return panels


def draw(
    *,
    title: str,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    evaluation: Evaluation | None,
    network: str,
) -> bytes:
    """Draw a panel for each group of figures, and the confusion matrix on the test set, as PNG.

    Args:
        curves: rows by method.
        network: what it is called where no method has a teacher beside it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    # 1. What there is to draw.
    panels = panels_of(curves, network)
    count = len(panels) + (evaluation is not None)
    # On the page, more columns would be too small to read.
    columns = 1 if count <= 1 else 2
    figure = Figure(
        (4.6 * columns, 3.6 * math.ceil(max(1, count) / columns) + 0.5), 150, layout="constrained"
    )
    # A name with a $ is a name.
    plain: Any = {"parse_math": False}
    figure.suptitle(short(title, 90), x=0.01, ha="left", **plain)
    places = [
        figure.add_subplot(math.ceil(count / columns), columns, number + 1)
        for number in range(count)
    ]
    # 2. The curves: moving averages over a fortieth of the points, shorter at both ends.
    for (panel, lines), axes in zip(panels.items(), places, strict=False):
        axes.set_title(panel, fontsize=10, loc="left")
        for number, rank, name, points in lines:
            steps, values = np.array(points).T
            span = np.ones(2 * (len(values) // 80) + 1)
            axes.plot(
                steps,
                np.convolve(values, span, "same") / np.convolve(np.ones(len(values)), span, "same"),
                color=COLORS[(number if len(curves) > 1 else rank) % len(COLORS)],
                linestyle=LINES[rank % len(LINES)],
                marker="o" if len(values) == 1 else None,
                label=name,
            )
        if panel in LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if panel in PERCENT:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("step", loc="right")
        axes.grid(color="#dddddd")
        axes.legend(fontsize=7).set_in_layout(False)  # of many methods it is higher than the panel
    # 3. The confusion matrix.
    if evaluation is not None:
        counts, axes = np.array(evaluation.confusion), places[-1]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.set_title(
            f"Confusion on test, {100 * evaluation.accuracy:.1f} % right", fontsize=10, loc="left"
        )
        # The square root makes one mistake in a hundred visible.
        axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="true")
        if len(counts) <= MOST_NAMED:
            labels = [short(str(name), 14) for name in evaluation.classes or range(len(counts))]
            look: Any = {"fontsize": 8 if len(counts) <= MOST_NUMBERED else 5, **plain}
            axes.set_xticks(range(len(counts)), labels, rotation=90, **look)
            axes.set_yticks(range(len(counts)), labels, **look)
        for row, column in np.argwhere(counts) if len(counts) <= MOST_NUMBERED else ():
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(
                column,
                row,
                str(counts[row, column]),
                color=color,
                ha="center",
                va="center",
                fontsize=7,
            )
    return png_of(figure)


def png_of(figure: Figure, dots_per_inch: float | None = None) -> bytes:
    """Return a figure as the bytes of a PNG file; without ``dots_per_inch`` by the figure's own."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Boxes stand for letters that the font does not have.
        warnings.filterwarnings("ignore", message="Glyph")
        dots: Any = "figure" if dots_per_inch is None else dots_per_inch
        figure.savefig(file, format="png", dpi=dots, metadata={"Software": None})
    return file.getvalue()


# ------------------------------------------------------------------------------------- in sentences


def summary(content: Mapping[str, Any]) -> list[str]:
    """Return what a run reached, in sentences: ``result.json`` in words."""
    words, lines = content["networks"], list[str]()
    name, tested, rounds = content["delivered"], content.get("evaluation"), content.get("rounds")
    why = (
        "by validation"
        if content["delivered_by"] == "validation"
        else "the rule where validation cannot tell"
    )
    if rounds is not None and name == "teacher":
        why = "by validation, for the last round ended far behind it"
    elif rounds is not None:
        why = "of the last round" + ", at its best step by validation" * (why == "by validation")
    if tested is not None:
        chance = Evaluation(**tested).chance
        lines.append(
            f"Test accuracy of the {words[name]}: "
            f"{spoken(tested['accuracy'], tested['n'], chance)}."
        )
    if (reached := content.get("validation_accuracy")) is not None:
        on = content["validation_size"], content["validation_chance"]
        lines.append(f"Validation accuracy: {spoken(reached, *on)}.")
    if not lines:
        lines.append(
            f"The {words[name]} is delivered; without --test and --val nothing says how good it is."
        )
    part = "test" if tested is not None else "validation"
    others = {name: content.get(f"{name}_{part}_accuracy") for name in words}
    shown = ", ".join(
        f"{words[name]} {100 * value:.1f} %" for name, value in others.items() if value is not None
    )
    if shown:
        lines.append(f"On {part}: {shown}; delivered is the {words[name]} ({why}).")
    if guesses := guessing(content):
        named = ", ".join(
            f"the {words[each]} ({100 * value:.1f} %)" for each, value in guesses.items()
        )
        lines.append(
            f"Not shown to be better than guessing on {part}: {named}. It may need more steps, or "
            "lower learning rates."
        )
    lines += linear_baseline(content)
    if tested is not None and rounds:
        reached = [
            each.get("test_accuracy") or 0.0 for each in (rounds[0]["teacher"], *rounds[:-1])
        ]
        if (best := max(reached)) > tested["accuracy"]:
            which = (
                f"Round {reached.index(best)} reached {100 * best:.1f} % on test, more than the "
                "last"
            )
            lines.append(f"{which}, which is delivered by rule: the test set chooses nothing.")
    return lines


def linear_baseline(content: Mapping[str, Any]) -> list[str]:
    """Return what the linear baseline reached, and what to do where the run is behind it."""
    if "control_accuracy" not in content:
        return []
    part = "test" if "test_accuracy" in content else "validation"
    examples = content.get("control_on", "labeled pictures")
    what = f"logistic regression on the {content['control_of']} of the {examples} alone"
    lines = [f"The linear baseline, {what}: {100 * content['control_accuracy']:.1f} % on {part}."]
    if content[f"{part}_accuracy"] < content["control_accuracy"]:
        lines.append(f"This run is behind its linear baseline. {next_try(content)}")
    return lines


def next_try(content: Mapping[str, Any]) -> str:
    """Return what to do about a run that is behind its linear baseline."""
    steps = content.get("steps", 0)
    if content.get("recipe") == "digits":
        more = f"Try more steps (it took {steps:,}: --steps)"
        return (
            f"{more}, other learning rates (--lr, --student-lr), or other methods beside it "
            "(--compare)."
        )
    has_backbone = content["control_of"] != "pixels"
    begin = (
        "training its head alone (--tuning head)"
        if has_backbone
        else "a pretrained network (--backbone auto)"
    )
    if content.get("recipe") == "noisy":
        return (
            f"Try more time (--minutes), {begin}, more clean pictures, or these alone (--method "
            "clean)."
        )
    return f"Try more time (--minutes), {begin}, or more labeled pictures."


def spoken(accuracy: float, n: int, chance: float | None) -> str:
    """Return an accuracy in words, with n, its 95 % interval, and what guessing reaches.

    >>> spoken(131 / 150, 150, 0.1)
    '87.3 % (n = 150, 95 % interval 81.1-91.7, chance 10.0 %)'
    """
    low, high = (f"{100 * end:.1f}" for end in interval(round(accuracy * n), n))
    guessed = "" if chance is None else f", chance {100 * chance:.1f} %"
    return f"{accuracy * 100:.1f} % (n = {n:,}, 95 % interval {low}-{high}{guessed})"
