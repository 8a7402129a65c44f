"""``metapl report RUN``: all there is to see of a run as one web page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from metapl.apps.commands.evaluate import Own
from metapl.apps.commands.inputs import check_file
from metapl.apps.commands.listing import reached_by, state_of
from metapl.apps.commands.parse import Command, Run, unset
from metapl.apps.experiments.accuracies import Comparison, seeds_in_words, spoken_rounds, spread, summary
from metapl.apps.experiments.experiment import last_fit
from metapl.apps.experiments.folder import (
    READOUTS,
    LoadedRun,
    RunFolder,
    counts_of,
    flat,
    load_run,
    results_within,
    stored,
    stored_data,
)
from metapl.apps.experiments.galleries import FILE, mistakes, read_galleries
from metapl.apps.experiments.side_by_side import mean_curves
from metapl.apps.machine.sealed import read_plain, write_whole
from metapl.apps.recipes.methods import called_network, title, titled
from metapl.apps.reports import web
from metapl.apps.words import short, tell
from metapl.errors import MetaplError
from metapl.metrics import Evaluation
from metapl.runs.rows import Metrics

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write all there is to see of a run as one web page, for a browser, without any other file.

    Its accuracy, curves of losses, validation and feedback, the confusion matrix, each class, the surest mistakes on
    the test set where its pictures are still there, settings, the command and versions. Of a comparison: its methods
    side by side, the paired test, and the run that it delivers. Of a run that has not ended: how far it has come.

    A page that was written before is replaced; another file is not.

    Args:
        folder: the run folder.
        out: the page, a file that ends with .html.
    """

    folder: Run
    out: Annotated[Path | None, unset("FILE.html", default="(default: RUN/report.html)")] = None

    def run(self) -> int:
        out = self.out or self.folder / PAGE
        if self.out is not None or self.folder.is_dir():  # else there is no run
            check_file("--out", out, ".html")
        if out.exists() and web.GENERATOR.encode() not in read_plain(out)[:1000]:
            raise MetaplError(f"{out} is there, and metapl report did not write it; expected another --out FILE.html.")
        folder = RunFolder(self.folder)
        stopped = folder.exists and not folder.ended
        heading, parts = _unfinished(folder) if stopped else _ended(load_run(self.folder))
        page = web.web_page(heading, [f"<h1>{web.text(heading)}</h1>", web.paragraph(self.folder, "quiet"), *parts])
        write_whole(out, page, "any earlier page is as it was; expected a disk with room, or another --out.")
        tell(f"{heading}\nthe page is written: {out}, {len(page) / 1e3:,.0f} kB; open it in a browser")
        return 0


def _unfinished(folder: RunFolder) -> tuple[str, list[str]]:
    recipe, description = stored(folder)
    found, metrics = state_of(folder), Metrics(folder.path / "metrics.jsonl")
    method, done = title(recipe.method.name), found.get("compared")
    network = titled(recipe.method.name, "student")
    said, curves = f"Not finished: {found['state']}", ""
    if done is not None:
        method, seeds = f"{len(done)} methods", len(found["seeds"])
        ended = [(title(name), f"{of['finished']} of {seeds}") for name, of in done.items()]
        curves = web.section("Runs that have ended", web.rows(ended, ("method", "runs")))
    else:
        said += f", at step {found['done']:,} of {found['phase']} (of {recipe.steps:,} steps)"
        lines = metrics.file.read_bytes().split(b"\n")[:-1] if metrics.file.exists() else []
        lost = len(lines) - len(metrics.rows())
        said += f"; damaged lines of {metrics.file.name}, left out: {lost}" if lost else ""
        curves = web.section(f"Curves of {found['phase']}", web.plots({method: metrics.rows(found["phase"])}, network))
    said += "; it goes on by its command with --resume" if found["state"] == "interrupted" else ""
    parts = [f'<p class="state">{web.text(said)}</p>', curves, *_made(folder, description, folder)]
    return f"{recipe.name}: {method}, seed {recipe.seed}", parts


def _ended(run: LoadedRun) -> tuple[str, list[str]]:
    result, path, reached = run.result, run.folder.path, reached_by(run.result)
    heading = f"{run.recipe.name}: {title(result['method'])}, seed {result['seed']}"
    parts = [f'<p class="number">{100 * reached["accuracy"]:.1f} %</p>'] if reached else []
    parts += map(web.paragraph, summary(result))
    evaluation = Evaluation(**result["evaluation"]) if "evaluation" in result else None
    if run.is_comparison and evaluation is not None:
        heading = f"{run.recipe.name}: {len(result['methods'])} methods, {seeds_in_words(len(result['seeds']))}"
        parts = [
            *_compared(run, evaluation),
            web.section(f"{result['delivery'][:1].upper()}{result['delivery'][1:]}.", *parts),
        ]
    else:
        network = titled(result["method"], "student")
        parts.append(web.section("Curves", web.plots({result["method"]: last_fit(path, result)}, network)))
    if "rounds" in result:
        parts.append(web.section("Rounds", *map(web.paragraph, spoken_rounds(result["rounds"]))))
    if evaluation is not None:
        names = [short(str(name), 60) for name in evaluation.classes or range(len(evaluation.confusion))]
        parts.append(web.section("Confusion on the test set", web.matrix(evaluation, names)))
        parts.append(web.section("Classes", web.classes(evaluation, names)))
        parts.append(_mistakes(run, names))
    sealed = {} if run.is_comparison else result.get("sha256", {})  # of a comparison, the file is in its runs
    parts += map(web.pictures, read_galleries(path, sealed.get(FILE)))
    if FILE in sealed and not (path / FILE).is_file():
        parts.append(web.section("Pseudo-labels", web.paragraph(f"{FILE} is not there any more.")))
    return heading, [*parts, *_made(run.folder, run.description, run.source)]


def _compared(run: LoadedRun, evaluation: Evaluation) -> Iterator[str]:
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


def _mistakes(run: LoadedRun, names: Sequence[str]) -> str:
    """The surest mistakes on the test set; or why there are none."""
    delivered = run.result["delivered"]
    try:
        network, on = run.network(delivered).to(run.device), Own.of(run, delivered)
        gallery = mistakes(network, on.data, names, f"{run.titled(delivered)} on test", on.names or ())
    except (MetaplError, OSError) as error:
        tell(f"metapl: the test pictures are left out: {error}", file=sys.stderr, wrap=True)
        return web.section("Most confident mistakes", web.paragraph(f"The test pictures are left out: {error}"))
    return "" if gallery is None else web.pictures(gallery)


def _made(folder: RunFolder, description: Mapping[str, Any], source: RunFolder) -> Iterator[str]:
    """On what, by which settings and with what a run was made, folded."""
    made = folder.description()
    if "command" in made:
        yield web.section("Command", f"<pre>{web.text(made['command'])}</pre>")
    data = stored_data(source) if source.ended or (source.path / "data.json").exists() else {}
    counts = {part: f"{count:,} examples" for part, count in counts_of(data).items()}
    counts |= {f"SHA-256 of {part}": digest for part, digest in data.get("hash", {}).items()}
    yield web.folded("Data", web.rows([*counts.items()])) if counts else ""
    told = {name: value for name, value in description.items() if name != "fields"} | flat(description["fields"])
    yield web.folded("Settings", web.rows([(name, json.dumps(value)) for name, value in told.items()]))
    yield web.folded("Versions and hardware", web.rows([*made.get("made_with", {}).items()]))
