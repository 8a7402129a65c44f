"""``metapl report RUN``: the page of a run written again, or of one that has not ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from metapl.apps.inputs import check_file
from metapl.apps.runs import state_of
from metapl.apps.commands.parse import Command, Run, unset
from metapl.apps.run import RunFolder, described
from metapl.apps.report import PAGE, html_of, made, page_of
from metapl.apps.run import EndedRun
from metapl.apps.machine.sealed import read_plain, write_whole
from metapl.apps.recipes.methods import title
from metapl.apps import web
from metapl.apps.words import tell
from metapl.errors import MetaplError
from metapl.runs.rows import Metrics


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write all there is to see of a run as one web page, for a browser, without any other file; a run that ended left
    such a page already.

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
        if stopped:
            heading, parts = _unfinished(folder)
        else:
            heading, parts = page_of(EndedRun.load(self.folder))
        page = html_of(self.folder, heading, parts)
        write_whole(out, page, "any earlier page is as it was; expected a disk with room, or another --out.")
        tell(f"{heading}\nthe page is written: {out}, {len(page) / 1e3:,.0f} kB; open it in a browser")
        return 0


def _unfinished(folder: RunFolder) -> tuple[str, list[str]]:
    description = described(folder)
    fields = description["fields"]
    found, metrics = state_of(folder), Metrics(folder.path / "metrics.jsonl")
    method, done = title(description["method"]), found.get("compared")
    said, curves = f"Not finished: {found['state']}", ""
    if done is not None:
        method, seeds = f"{len(done)} methods", len(found["seeds"])
        ended = [(title(name), f"{of['finished']} of {seeds}") for name, of in done.items()]
        curves = web.section("Runs that have ended", web.rows(ended, ("method", "runs")))
    else:
        said += f", at step {found['done']:,} of {found['phase']} (of {fields['steps']:,} steps)"
        lines = metrics.file.read_bytes().split(b"\n")[:-1] if metrics.file.exists() else []
        lost = len(lines) - len(metrics.rows())
        said += f"; damaged lines of {metrics.file.name}, left out: {lost}" if lost else ""
        curves = web.section(
            f"Curves of {found['phase']}", web.plots({method: metrics.rows(found["phase"])}, "network")
        )
    said += "; it goes on by its command with --resume" if found["state"] == "interrupted" else ""
    parts = [f'<p class="state">{web.text(said)}</p>', curves, *made(folder, description, folder)]
    return f"{description['name']}: {method}, seed {fields['seed']}", parts
