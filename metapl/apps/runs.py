"""``metapl runs``: the runs below a folder, a line each; ``metapl report``: all there is to see of one as a page."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps import web
from metapl.apps.comparison import DELIVERED, spread
from metapl.apps.inputs import Run, Switch, check_file, unset
from metapl.apps.machine.ownership import is_owned
from metapl.apps.machine.sealed import read_plain, write_whole
from metapl.apps.pictures.folders import walk
from metapl.apps.report import PAGE, html_of, made, page_of
from metapl.apps.run import EndedRun, RunFolder, refuse_changed, stored_result
from metapl.apps.train import TOLD
from metapl.apps.words import short, table, tell
from metapl.errors import MetaplError, reason_of
from metapl.metrics import interval
from metapl.runs.rows import Metrics
from metapl.words import shown

WRITTEN = ("recipe.json", "metrics.jsonl", "result.json")  # the newest of them says of when a run is


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder, the newest last.

    Of a finished run it says the accuracy of the network that it delivers, on test or on validation examples; of
    another one, how many of its steps are done, and whether it is running, interrupted or damaged, and how. Below a
    comparison stand its methods. A run is a folder with a recipe.json; all others are passed over.

    Args:
        folder: where to look, in all folders below it; or a run.
        json: print JSON.
    """

    folder: Annotated[Path, tyro.conf.Positional, unset("FOLDER", default="(default: runs)")] = Path("runs")
    json: Switch = False

    def run(self) -> int:
        if not self.folder.is_dir():
            state = "is a file" if self.folder.exists() else "is not there"
            raise MetaplError(f"the folder {self.folder} {state}; expected one that holds runs: metapl runs FOLDER.")
        refused = list[OSError]()
        found = [glance(place, self.folder) for place in run_folders(self.folder, refused.append)]
        for error in refused:
            tell(f"metapl: left out {error.filename}: {error.strerror}", file=sys.stderr)
        if not found:
            raise MetaplError(f"there is no run in {self.folder}; metapl train writes them: metapl train digits.")
        found.sort(key=lambda entry: str(entry["date"]))
        tell(json.dumps(found, indent=2) if self.json else listing(found))
        return 1 if refused else 0


def run_folders(folder: Path, refuse: Callable[[OSError], None]) -> Iterator[Path]:
    """The runs in a folder, not those of a comparison; links are followed where they lead to a run. ``refuse`` is
    called with the error where a folder cannot be listed."""
    for where, folders, files in walk(folder, refuse):
        if "recipe.json" in {*folders, *files}:
            folders.clear()
            yield Path(where)
        links = {name for name in folders if os.path.islink(os.path.join(where, name))}
        runs = {name for name in links if os.path.lexists(os.path.join(where, name, "recipe.json"))}
        folders[:] = [name for name in folders if not name.startswith(".") and name not in links - runs]


def glance(path: Path, within: Path) -> dict[str, Any]:
    """What a run is, how far it has come and what it reached; of a damaged one, why it cannot be read."""
    name = str(path if path == within else path.relative_to(within))
    times = (file.stat().st_mtime for file in map(path.joinpath, WRITTEN) if os.path.exists(file))
    written = max(times, default=path.stat().st_mtime)
    about = {"run": name, "date": datetime.fromtimestamp(written).isoformat(timespec="seconds")}
    try:
        return about | state_of(RunFolder(path))
    except (MetaplError, OSError) as error:
        why = reason_of(error).replace(f"{path}{os.sep}", "").replace(f"{path} ", "")
        return about | {"state": "damaged", "why": why.partition(". ")[0]}  # not how to mend it


def state_of(folder: RunFolder) -> dict[str, Any]:
    """What :func:`glance` says of a run that is not damaged."""
    description = folder.recipe()
    name, fields, methods = description["name"], description["fields"], description.get("compare")
    labeled, seeds = fields.get("labeled"), description.get("seeds", [fields.get("seed", 0)])
    data = fields.get("data", name) if labeled is None else "/".join(Path(labeled).parts[-2:])
    entry = {"recipe": name, "data": str(data), "seeds": seeds, "methods": methods or [description["method"]]}
    if folder.ended:
        result = stored_result(folder)
        for name in TOLD if methods is None else ():  # those of a comparison are in its runs
            refuse_changed(folder.path / name, result)
        entry |= {"state": "finished", "steps": result["steps"], "done": result["steps"]}
        # The accuracy of the delivered network on test, else on validation.
        on, accuracy, n = "validation", result.get("validation_accuracy"), result["validation_size"]
        if "evaluation" in result:
            on, accuracy, n = "test", result["evaluation"]["accuracy"], result["evaluation"]["n"]
        if accuracy is not None:
            between = interval(round(accuracy * n), n)
            entry |= {"accuracy": accuracy, "interval": between, "n": n, "on": on}
        of_methods = {name: {"accuracies": found[DELIVERED]} for name, found in result.get("methods", {}).items()}
        return entry | ({"compared": of_methods} if of_methods else {})
    entry |= {"state": "running" if is_owned(folder.path) else "interrupted", "steps": fields.get("steps", 0)}
    if methods is not None:
        places = {name: [folder.path / name / f"seed-{seed}" for seed in seeds] for name in methods}
        done = {name: sum((place / "result.json").exists() for place in runs) for name, runs in places.items()}
        return entry | {"compared": {name: {"finished": count} for name, count in done.items()}}
    rows = Metrics(folder.path / "metrics.jsonl").rows()
    return entry | ({"done": rows[-1]["step"], "phase": rows[-1]["phase"]} if rows else {"done": 0, "phase": "fit"})


def listing(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of what :func:`glance` says."""
    rows, notes = [("run", "method", "data", "steps", "accuracy, %", "date")], "accuracy with its 95 % interval"
    for entry in found:
        name, date, compared = entry["run"], datetime.fromisoformat(entry["date"]), entry.get("compared") or {}
        day = f"{date:%d %b}" if date.year == datetime.now().year else f"{date:%b %Y}"
        if entry["state"] == "damaged":
            rows.append((name, "", "", "", "damaged", day))
            notes += f"\n{shown(name)}: {shown(entry['why'])}"
            continue
        said = entry["state"]
        if "accuracy" in entry:
            low, high = entry["interval"]
            on = entry["on"].removesuffix("idation")
            said = f"{100 * entry['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f}) {on}"
        methods, steps, phase = entry["methods"], f"{entry['steps']:,}", entry.get("phase")
        if phase is not None:
            steps = f"{entry['done']:,}/{steps}" if phase == "fit" else f"{phase} {entry['done']:,}"
        method = f"{len(compared)} methods" if compared else methods[0]
        rows.append((name, method, entry["data"], steps, said, day))
        for method, of in compared.items():
            count = f"{of.get('finished', len(entry['seeds']))}/{len(entry['seeds'])} runs"
            rows.append(("", method, "", count, spread(of["accuracies"], digits=1) if "accuracies" in of else "", ""))
    if any(entry.get("compared") for entry in found):
        notes += "\nof a comparison, that of the run it delivers, and of its methods mean ± std over seeds"
    cells = [[short(text) if column in (1, 2) else shown(text) for column, text in enumerate(row)] for row in rows]
    return f"{table(cells, left=len(cells[0]))}\n\n{notes}"


# --------------------------------------------------------------------------------------------------- metapl report RUN


@dataclass(frozen=True, kw_only=True)
class Report:
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
    description = folder.recipe()
    fields = description["fields"]
    found, metrics = state_of(folder), Metrics(folder.path / "metrics.jsonl")
    method, done = description["method"], found.get("compared")
    said, curves = f"Not finished: {found['state']}", ""
    if done is not None:
        method, seeds = f"{len(done)} methods", len(found["seeds"])
        ended = [(name, f"{of['finished']} of {seeds}") for name, of in done.items()]
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
