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
from metapl.apps.run import EndedRun, RunFolder, described, refuse_changed, stored_result
from metapl.apps.train import TOLD
from metapl.apps.words import columns, short, table, tell, width_of, wrapped
from metapl.errors import MetaplError, reason_of
from metapl.metrics import interval
from metapl.runs.rows import Metrics
from metapl.words import shown

HEAD = ("run", "method", "data", "steps", "accuracy, %", "date")
CUT, LEAST = (2, 1, 0), 9  # columns that are cut where lines are too long, and to how many letters at least
LEFT_OUT = (5, 2, 3)  # columns that are left out, whose width is then 0, where that does not suffice
WRITTEN = ("recipe.json", "metrics.jsonl", "result.json")  # the newest of them says of when a run is


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder, the newest last.

    Of a finished run it says the accuracy of the network that it delivers, with the 95 % interval, and whether that is
    on test or on validation examples; of another one, how many of its steps are done, and whether it is running,
    interrupted or damaged, and how. Below a comparison stand its methods, with the mean and the standard deviation over
    its seeds. A run is a folder with a recipe.json; all others are passed over. Nothing is changed.

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
        tell(json.dumps(found, indent=2) if self.json else listing(found, columns(sys.stdout)))
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
    description = described(folder)
    name, fields, methods = description["name"], description["fields"], description.get("compare")
    labeled, seeds = fields.get("labeled"), description.get("seeds", [fields.get("seed", 0)])
    data = fields.get("data", name) if labeled is None else "/".join(Path(labeled).parts[-2:])
    entry = {"recipe": name, "data": str(data), "seeds": seeds, "methods": methods or [description["method"]]}
    if folder.ended:
        result = stored_result(folder)
        for name in TOLD if methods is None else ():  # those of a comparison are in its runs
            refuse_changed(folder.path / name, result)
        entry |= {"state": "finished", "steps": result["steps"], "done": result["steps"], **reached_by(result)}
        of_methods = {name: {"accuracies": found[DELIVERED]} for name, found in result.get("methods", {}).items()}
        return entry | ({"compared": of_methods} if of_methods else {})
    entry |= {"state": "running" if is_owned(folder.path) else "interrupted", "steps": fields.get("steps", 0)}
    if methods is not None:
        places = {name: [folder.path / name / f"seed-{seed}" for seed in seeds] for name in methods}
        done = {name: sum((place / "result.json").exists() for place in runs) for name, runs in places.items()}
        return entry | {"compared": {name: {"finished": count} for name, count in done.items()}}
    rows = Metrics(folder.path / "metrics.jsonl").rows()
    return entry | ({"done": rows[-1]["step"], "phase": rows[-1]["phase"]} if rows else {"done": 0, "phase": "fit"})


def reached_by(result: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy of the delivered network on test, else on validation, with its interval; nothing without both."""
    on, accuracy, n = "validation", result.get("validation_accuracy"), result["validation_size"]
    if "evaluation" in result:
        on, accuracy, n = "test", result["evaluation"]["accuracy"], result["evaluation"]["n"]
    if accuracy is None:
        return {}
    return {"accuracy": accuracy, "interval": interval(round(accuracy * n), n), "n": n, "on": on}


def listing(found: Sequence[Mapping[str, Any]], width: int) -> str:
    """The table of what :func:`glance` says, in lines of this width."""
    rows, below, notes = [HEAD], dict[int, str](), "accuracy with its 95 % interval"
    for entry in found:
        name, date, compared = entry["run"], datetime.fromisoformat(entry["date"]), entry.get("compared")
        day = f"{date:%d %b}" if date.year == datetime.now().year else f"{date:%b %Y}"
        if entry["state"] == "damaged":
            below[len(rows)] = wrapped(f"  {shown(entry['why'])}", width)
            rows.append((name, "", "", "", "damaged", day))
            continue
        said = entry["state"]
        if "accuracy" in entry:
            low, high = entry["interval"]
            on = entry["on"].removesuffix("idation")
            said = f"{100 * entry['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f}) {on}"
        methods, steps, phase = entry["methods"], f"{entry['steps']:,}", entry.get("phase")
        if phase is not None:
            steps = f"{entry['done']:,}/{steps}" if phase == "fit" else f"{phase} {entry['done']:,}"
        rows.append(
            (name, methods[0] if compared is None else f"{len(methods)} methods", entry["data"], steps, said, day)
        )
        seeds = len(entry["seeds"])
        for method, of in (compared or {}).items():
            count = f"{of['finished']}/{seeds} runs" if "finished" in of else f"{seeds} seed{'s'[: seeds - 1]}"
            mean = spread(of["accuracies"], digits=1) if "accuracies" in of else ""
            rows.append(("", method, "", count, mean, ""))
    if any(entry.get("compared") for entry in found):
        notes += (
            "; of a comparison, that of the run it delivers, and of its methods mean ± standard deviation over seeds"
        )
    cells = [[shown(text) for text in row] for row in rows]
    widths = [max(map(width_of, column)) for column in zip(*cells, strict=True)]
    least = [min(size, LEAST) if column in CUT else size for column, size in enumerate(widths)]
    for column in LEFT_OUT:
        if sum(least) + 2 * (sum(map(bool, least)) - 1) > width:
            least[column] = widths[column] = 0
    for column in CUT:
        beyond = sum(widths) + 2 * (sum(map(bool, widths)) - 1) - width
        widths[column] = max(widths[column] - max(beyond, 0), min(widths[column], LEAST))
    long = {
        number: row[0] for number, row in enumerate(cells) if width_of(row[0]) > widths[0]
    }  # each in a line of its own
    kept = [column for column, size in enumerate(widths) if size and column]
    fits = [["" if i in long else row[0], *(short(row[j], widths[j]) for j in kept)] for i, row in enumerate(cells)]
    lines = list[str]()
    for number, line in enumerate(table(fits, left=len(HEAD)).split("\n")):
        lines += filter(None, (long.get(number), line, below.get(number)))
    return "\n".join([*lines, "", wrapped(notes, width)])


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
    description = described(folder)
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
