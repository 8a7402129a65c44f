"""The page of a run, ``report.html``: what it reached, its curves, confusion, mistakes, settings and command; and its
picture, ``report.png``."""

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
from metapl.apps.comparison import Comparison, seeds_in_words
from metapl.apps.curves import Curves, draw
from metapl.apps.held_out import HeldOut
from metapl.apps.machine.sealed import write_whole
from metapl.apps.run import EndedRun, RunFolder, counts_of, refuse_changed, results_within, stored_data, stored_result
from metapl.apps.suspects import suspects_shown
from metapl.apps.words import short, tell
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, interval, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.runs.folder import read_rows

PAGE, PICTURE = "report.html", "report.png"
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


def write_report(run: EndedRun, found: Mistakes | None = None) -> None:
    """The page of a run and its picture, in its folder."""
    heading, picture, parts = page_of(run, found)
    content = {PICTURE: picture, PAGE: web.web_page(heading, run.folder.path, parts)}
    for name, data in content.items():
        write_whole(run.folder.path / name, data, "make room, then: metapl report.")


def last_fit(folder: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the main phase of a run, which of Noisy Student is the last round."""
    file = folder / "metrics.jsonl"
    refuse_changed(file, content)
    return read_rows(file, f"round-{len(content['rounds'])}" if "rounds" in content else "fit")


def page_of(run: EndedRun, found: Mistakes | None = None) -> tuple[str, bytes, list[str]]:
    """The heading, the picture and the parts of the page of a run that has ended; ``found``: what is not to be looked
    for again."""
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
        curves, network, of = *_curves(run), "network"
    else:
        curves, network, of = {result["title"]: last_fit(path, result)}, run.cards["student"].title, ""
    picture = draw(title=heading, curves=curves, evaluation=evaluation, network=network)
    parts.append(drawn(picture, of))
    if "rounds" in result:
        parts.append(web.section("Rounds", *_rounds(result["rounds"])))
    if evaluation is not None:
        names = [short(str(name), 60) for name in evaluation.classes or range(len(evaluation.confusion))]
        parts.append(web.section("Classes", web.classes(evaluation, names)))
        parts.append(_mistakes(run, found))
    parts.append(suspects_shown(path, run.cards["student"].input))
    return heading, picture, [*parts, *made(run.folder, run.description, run.source)]


def drawn(picture: bytes, note: str = "") -> str:
    """The picture of a run in its page."""
    image = f'<img class="drawn" alt="curves over the steps, and the confusion matrix" src="{web.picture(picture)}">'
    return web.section("Curves and confusion", image, web.paragraph(note, "quiet") if note else "")


def _compared(run: EndedRun, evaluation: Evaluation) -> Iterator[str]:
    """The methods of a comparison side by side, and the paired test."""
    result = run.result
    of = tuple(result["seeds"]), result["methods"], result["titles"]
    found = Comparison(*of, evaluation.n, result["chance"])
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


def _curves(run: EndedRun) -> tuple[Curves, str]:
    """Those of the first methods of a comparison, each with the first seed, and a note; none where a run is gone."""
    path, methods, seeds = run.folder.path, run.result["methods"], run.result["seeds"]
    if not all(RunFolder(path / name / f"seed-{seed}").exists for name in methods for seed in seeds):
        return {}, "Without curves: the folders of the runs are not there any more."
    results_within(path, run.result)  # they are those that were compared
    runs = {name: RunFolder(path / name / f"seed-{seeds[0]}") for name in [*methods][:CURVES]}
    curves = {name: last_fit(one.path, stored_result(one)) for name, one in runs.items()}
    return curves, f"Curves are those of seed {seeds[0]}."


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
        on = content["validation_size"], content["validation_chance"]
        lines.append(f"Validation accuracy: {spoken(reached, *on)}.")
    if not lines:
        lines.append(f"The {words[name]} is delivered; without --test and --val nothing says how good it is.")
    part = "test" if tested is not None else "validation"
    others = {name: content.get(f"{name}_{part}_accuracy") for name in words}
    shown = ", ".join(f"{words[name]} {100 * value:.1f} %" for name, value in others.items() if value is not None)
    if shown:
        lines.append(f"On {part}: {shown}; delivered is the {words[name]} ({why}).")
    lines += linear_baseline(content)
    if tested is not None and rounds:
        reached = [each.get("test_accuracy") or 0.0 for each in (rounds[0]["teacher"], *rounds[:-1])]
        if (best := max(reached)) > tested["accuracy"]:
            which = f"Round {reached.index(best)} reached {100 * best:.1f} % on test, more than the last"
            lines.append(f"{which}, which is delivered by rule: the test set chooses nothing.")
    return lines


def linear_baseline(content: Mapping[str, Any]) -> list[str]:
    """What the linear baseline of a run reached, and whether the run is behind it."""
    if "control_accuracy" not in content:
        return []
    part = "test" if "test_accuracy" in content else "validation"
    what = f"logistic regression on the {content['control_of']} of the labeled pictures alone"
    lines = [f"The linear baseline, {what}: {100 * content['control_accuracy']:.1f} % on {part}."]
    if content[f"{part}_accuracy"] < content["control_accuracy"]:
        lines.append("This run is behind its linear baseline: what is this simple does better here.")
    return lines


def spoken(accuracy: float, n: int, chance: float | None) -> str:
    """An accuracy in words, with its number of examples n, its 95 % interval, and what guessing reaches where known.

    >>> spoken(131 / 150, 150, 0.1)
    '87.3 % (n = 150, 95 % interval 81.1-91.7, chance 10.0 %)'
    """
    low, high = (f"{100 * end:.1f}" for end in interval(round(accuracy * n), n))
    guessed = "" if chance is None else f", chance {100 * chance:.1f} %"
    return f"{accuracy * 100:.1f} % (n = {n:,}, 95 % interval {low}-{high}{guessed})"
