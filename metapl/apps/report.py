"""``metapl report``: the page of a run, ``report.html``, and its picture, ``report.png``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps import web
from metapl.apps.inputs import HeldOut, Run, check_file
from metapl.apps.list_runs import state_of
from metapl.apps.printing import short, tell
from metapl.apps.report_picture import draw
from metapl.apps.run_summary import summary
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, interval, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.run_folder import (
    EndedRun,
    RunFolder,
    data_in_words,
    refuse_changed,
    stored_data,
)
from metapl.runs.files import read_plain, write_whole
from metapl.runs.folder import read_rows

PAGE = "report.html"
PICTURE = "report.png"

# Mistakes that are shown.
SHOWN = 12

# The most classes of a table that is open, and the most entries of a setting that are listed.
MOST_UNFOLDED = 40
MOST_LISTED = 40


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a web page of a run: its accuracy, curves, confusions, mistakes and settings.

    The page is one file, and a run that ended has written it already. It shows the accuracy, the
    curves of losses, validation and feedback, the confusion matrix, each class, the surest mistakes
    on the test set if its pictures are still there, the settings, the command and the versions. The
    page of a run that has not ended shows how far it has come.

    A page that was written before is replaced; another file is not.

    Args:
        folder: folder of a run.
        out: file of the page, whose name ends with .html. By default it is report.html in the run's
            folder.
    """

    folder: Run
    out: Path | None = None

    def run(self) -> int:
        """Write the page, and say where it is."""
        out = self.out or self.folder / PAGE
        folder = RunFolder(self.folder)
        # Without the folder there is no run, which is refused below.
        if self.out is not None or self.folder.is_dir():
            check_file(out, ".html")
        if out.exists() and web.GENERATOR.encode() not in read_plain(out)[:1000]:
            raise MetaplError(
                f"{out} is there, and metapl report did not write it; expected another --out "
                "FILE.html."
            )
        if folder.exists and not folder.ended:
            heading, parts = page_of_unfinished(folder)
        else:
            heading, _, parts = page_of(EndedRun.load(self.folder))
        page = web.web_page(heading, self.folder, parts)
        write_whole(
            out, page, "any earlier page is as it was; expected a disk with room, or another --out."
        )
        size = f"{len(page) / 1e3:,.0f} kB"
        tell(f"{heading}\nthe page is written: {out}, {size}; open it in a browser")
        return 0


@dataclass(frozen=True)
class Mistakes:
    """What a network reaches on labeled examples, and the mistakes that it is surest of."""

    evaluation: Evaluation
    surest: list[web.Picture]


def mistakes(
    network: nn.Module, data: Any, classes: Sequence[str], files: Sequence[str] | None = None
) -> Mistakes:
    """Evaluate a network, and return the mistakes that it is surest of.

    Beneath each stands what it is taken for, what it is, and its file.

    Args:
        network: on its device.
        data: labeled examples.
        classes: the names of the classes.
        files: the names of the examples' files; None: they have none.
    """
    # How sure the network is of each mistake, and the mistake.
    surest: list[tuple[float, web.Picture]] = []
    all_logits: list[Tensor] = []
    all_labels: list[Tensor] = []
    n = 0
    for inputs, y in batches_of(data, torch.device("cpu")):
        logits, labels = predict_logits(network, [(inputs, y)])
        all_logits.append(logits)
        all_labels.append(labels)
        best = logits.double().softmax(dim=1).max(dim=1)
        predicted = best.indices
        for row in (predicted != labels).nonzero()[:, 0].tolist():
            confidence = float(best.values[row])
            lines = [
                f"{classes[int(predicted[row])]} {100 * confidence:.0f} %",
                f"is {classes[int(labels[row])]}",
            ]
            # Some pictures have no file.
            if files is not None and n + row < len(files):
                lines.append(files[n + row])
            surest.append((confidence, web.Picture(inputs[row], "\n".join(lines))))
        n += len(labels)
        # The others need no memory.
        surest.sort(key=lambda mistake: -mistake[0])
        del surest[SHOWN:]
    evaluation = evaluate_logits(torch.cat(all_logits), torch.cat(all_labels), list(classes))
    return Mistakes(evaluation, [picture for _, picture in surest])


def write_report(run: EndedRun, judged: Mistakes | None = None) -> None:
    """Write the page of a run and its picture into its folder.

    Args:
        run: that has ended.
        judged: the mistakes on its test set; None: they are looked for.
    """
    heading, picture, parts = page_of(run, judged)
    content = {PICTURE: picture, PAGE: web.web_page(heading, run.folder.path, parts)}
    for name, data in content.items():
        write_whole(run.folder.path / name, data, "make room, then go on with --resume.")


def page_of_unfinished(folder: RunFolder) -> tuple[str, list[str]]:
    """Return the heading and the parts of the page of a run that has not ended."""
    state = state_of(folder)
    heading = f"{state['recipe']}: {state['method']}, {state['state']}"
    rows = read_rows(folder.path / "metrics.jsonl", state["phase"])
    picture = draw(title=heading, rows=rows, evaluation=None, network="network")
    parts = [
        web.rows([(name, json.dumps(value)) for name, value in state.items()]),
        drawn(picture),
        *provenance(folder),
    ]
    return heading, parts


def page_of(run: EndedRun, judged: Mistakes | None = None) -> tuple[str, bytes, list[str]]:
    """Return the heading, the picture and the parts of the page of a run that has ended.

    Args:
        run: that has ended.
        judged: the mistakes on its test set; None: they are looked for.
    """
    result = run.result
    evaluation = Evaluation(**result["evaluation"]) if "evaluation" in result else None

    # 1. What it reached.
    parts = []
    accuracy = result.get("test_accuracy", result.get("validation_accuracy"))
    if accuracy is not None:
        parts.append(f'<p class="number">{100 * accuracy:.1f} %</p>')
    parts += map(web.paragraph, summary(result))
    heading = f"{result['recipe']}: {result['title']}, seed {result['seed']}"
    # 2. Curves and the confusion matrix.
    rows = last_fit(run.folder.path, result)
    network = run.cards["student"].title
    picture = draw(title=heading, rows=rows, evaluation=evaluation, network=network)
    parts.append(drawn(picture))

    # 3. Rounds of Noisy Student: what each of them reached and kept.
    if "rounds" in result:
        parts.append(rounds_shown(result["rounds"]))

    # 4. The test set: classes, and the mistakes that the network is surest of.
    if evaluation is not None:
        parts.append(web.section("Classes", classes_of(evaluation)))
        parts.append(mistakes_shown(run, judged))
    parts += provenance(run.folder)
    return heading, picture, parts


def rounds_shown(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return the part of the page on the rounds of Noisy Student: what they reached and kept."""
    first_teacher = rounds[0]["teacher"]
    cells = [("0", "", "", "", share(first_teacher.get("test_accuracy")))]
    for record in rounds:
        changed = record["changed_labels"]
        row = (
            str(record["round"]),
            f"{record['kept']:,} of {record['unlabeled']:,}",
            f"{record['copies']:,}",
            "" if changed is None else f"{changed:,}",
            share(record.get("test_accuracy")),
        )
        cells.append(row)
    last = rounds[-1]
    cells_of_classes = []
    for name, count in last["labeled_per_class"].items():
        count_kept = last["kept_per_class"][name]
        with_copies = last["copies_per_class"][name]
        cells_of_classes.append((name, f"{count:,}", f"{count_kept:,}", f"{with_copies:,}"))
    of_classes = web.rows(cells_of_classes, ("class", "labeled so", "kept", "with copies"))
    head = ("round", "kept", "with copies", "labels changed", "test accuracy")
    return web.section(
        "Rounds", web.rows(cells, head), web.folded("classes of the last round", of_classes)
    )


def mistakes_shown(run: EndedRun, judged: Mistakes | None) -> str:
    """Return the part of the page with the mistakes on the test set, if its pictures are there."""
    name = run.result["delivered"]
    try:
        if judged is None:
            examples = HeldOut(run, name)
            network = run.network(name).to(run.device)
            judged = mistakes(network, examples.batches(), run.classes, examples.names)
    except (MetaplError, OSError) as error:
        text = f"The test pictures are left out: {error}"
        tell(f"metapl: the test pictures are left out: {error}", file=sys.stderr)
        return web.section("Surest mistakes", web.paragraph(text))
    n = judged.evaluation.n
    wrong = round(n * (1 - judged.evaluation.accuracy))
    note = f"of the {run.cards[name].title} on test: {wrong:,} of {n:,} are wrong"
    return web.pictures("Surest mistakes", note, judged.surest)


def last_fit(folder: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the main phase of a run, which of Noisy Student is the last round."""
    file = folder / "metrics.jsonl"
    refuse_changed(file, content)
    phase = "fit"
    if "rounds" in content:
        phase = f"round-{len(content['rounds'])}"
    return read_rows(file, phase)


def drawn(picture: bytes) -> str:
    """Return the picture of a run in its page."""
    image = (
        '<img class="drawn" alt="curves over the steps, and the confusion matrix" '
        f'src="{web.picture(picture)}">'
    )
    return web.section("Curves and confusion", image)


def share(accuracy: float | None) -> str:
    """Return an accuracy in percent, or nothing where there is none."""
    return "" if accuracy is None else f"{100 * accuracy:.1f} %"


def classes_of(evaluation: Evaluation) -> str:
    """Return a table of how many of each class are right, the worst first.

    Beside each stands what it is most often taken for.
    """
    classes = evaluation.classes or range(len(evaluation.confusion))
    names = [short(str(name), 60) for name in classes]
    # Each row behind its share of right ones; classes without examples are the last.
    shares_and_rows: list[tuple[float, Sequence[object]]] = []
    for number, counts in enumerate(evaluation.confusion):
        n = sum(counts)
        right = counts[number]
        wrong_counts = list(counts)
        wrong_counts[number] = 0
        most = max(wrong_counts)
        taken_for = f"{names[wrong_counts.index(most)]} ({most:,})" if most else ""
        accuracy = "-"
        right_share = 2.0
        if n:
            low, high = interval(right, n)
            accuracy = f"{100 * right / n:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
            right_share = right / n
        row = (names[number], f"{n:,}", f"{right:,}", accuracy, taken_for)
        shares_and_rows.append((right_share, row))
    shares_and_rows.sort(key=lambda entry: entry[0])
    head = ("class", "examples", "right", "accuracy (95 %)", "most often taken for")
    table = web.rows([row for _, row in shares_and_rows], head)
    if len(names) <= MOST_UNFOLDED:
        return table
    return web.folded(f"all {len(names):,} classes", table)


def setting_in_words(value: Any) -> str:
    """Return a setting as recipe.json has it; of a long list how many entries it has there."""
    if isinstance(value, list) and len(value) > MOST_LISTED:
        return f"{len(value):,} entries, in recipe.json"
    return json.dumps(value)


def provenance(folder: RunFolder) -> Iterator[str]:
    """Yield the parts of a page on what, with which settings and by what a run was made, folded."""
    about = folder.description()
    description = about["recipe"]
    if "command" in about:
        yield web.section("Command", f"<pre>{web.text(about['command'])}</pre>")
    data: Mapping[str, Any] = {}
    if folder.ended or (folder.path / "data.json").exists():
        data = stored_data(folder)
    fields = description["fields"]
    about_data = data_in_words(data, fields)
    if about_data:
        yield web.folded("Data", web.rows([*about_data.items()]))
    settings = {name: value for name, value in description.items() if name != "fields"}
    settings |= fields
    rows_of_settings = [(name, setting_in_words(value)) for name, value in settings.items()]
    yield web.folded("Settings", web.rows(rows_of_settings))
    yield web.folded("Versions and hardware", web.rows([*about.get("made_with", {}).items()]))
