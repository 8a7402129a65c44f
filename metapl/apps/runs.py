"""``metapl runs``: the runs below a folder, a line each; ``metapl report``: all there is to see of one as a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps import web
from metapl.apps.curves import draw
from metapl.apps.inputs import Run, check_file
from metapl.apps.machine.ownership import is_owned
from metapl.apps.machine.sealed import read_plain, write_whole
from metapl.apps.pictures.folders import walk
from metapl.apps.report import PAGE, drawn, made, page_of
from metapl.apps.run import TOLD, EndedRun, RunFolder, refuse_changed, stored_result
from metapl.apps.settings import Switch, unset
from metapl.apps.words import short, table, tell
from metapl.errors import MetaplError, reason_of
from metapl.metrics import interval
from metapl.runs.folder import read_rows
from metapl.words import shown

WRITTEN = ("recipe.json", "metrics.jsonl", "result.json")  # the newest of them says of when a run is


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder, the newest last.

    Of a finished run it says the accuracy of the network that it delivers, on test or on validation examples; of
    another one, how many of its steps are done, and whether it is running, interrupted or damaged, and how. A run is a
    folder with a recipe.json; all others are passed over.

    Args:
        folder: where to look, in all folders below it; or a run.
        json: print JSON.
    """

    folder: Annotated[Path, tyro.conf.Positional, unset("FOLDER", default="(default: runs)")] = Path("runs")
    json: Switch = False

    def run(self) -> int:
        if not self.folder.is_dir():
            raise MetaplError(f"{self.folder} is no folder; expected one that holds runs: metapl runs FOLDER.")
        refused, found = list[OSError](), list[dict[str, Any]]()
        for where, folders, files in walk(self.folder, refused.append):
            folders[:] = [name for name in folders if not name.startswith(".") and "recipe.json" not in files]
            if "recipe.json" in files:
                found.append(glance(Path(where)))
        for error in refused:
            tell(f"metapl: left out {error.filename}: {error.strerror}", file=sys.stderr)
        if not found:
            raise MetaplError(f"there is no run in {self.folder}; metapl train writes them: metapl train digits.")
        found.sort(key=lambda entry: str(entry["date"]))
        tell(json.dumps(found, indent=2) if self.json else listing(found))
        return 1 if refused else 0


def glance(path: Path) -> dict[str, Any]:
    """What a run is, how far it has come and what it reached; of a damaged one, why it cannot be read."""
    times = (file.stat().st_mtime for file in map(path.joinpath, WRITTEN) if file.exists())
    date = datetime.fromtimestamp(max(times, default=path.stat().st_mtime)).isoformat(timespec="seconds")
    try:
        return {"run": str(path), "date": date, **state_of(RunFolder(path))}
    except (MetaplError, OSError) as error:
        return {"run": str(path), "date": date, "state": "damaged", "why": reason_of(error)}


def state_of(folder: RunFolder) -> dict[str, Any]:
    """What :func:`glance` says of a run that is not damaged."""
    description = folder.recipe()
    name, fields, methods = description["name"], description["fields"], description.get("compare")
    seeds, labeled = description.get("seeds", [fields.get("seed", 0)]), Path(fields.get("labeled") or name)
    entry = {"recipe": name, "data": "/".join(labeled.parts[-2:]), "seeds": seeds}
    entry["methods"] = methods or [description["method"]]
    if folder.ended:
        result = stored_result(folder)
        for name in TOLD if methods is None else ():  # those of a comparison are in its runs
            refuse_changed(folder.path / name, result)
        entry |= {"state": "finished", "steps": result["steps"], "done": result["steps"]}
        on, n = "validation", result["validation_size"]
        if "evaluation" in result:
            on, n = "test", result["evaluation"]["n"]
        if (accuracy := result.get(f"{on}_accuracy")) is not None:
            entry |= {"accuracy": accuracy, "interval": interval(round(accuracy * n), n), "n": n, "on": on}
        return entry
    entry["state"] = "running" if is_owned(folder.path) else "interrupted"
    if methods is not None:
        places = [folder.path / name / f"seed-{seed}" for name in methods for seed in seeds]
        done = sum((place / "result.json").exists() for place in places)
        return entry | {"phase": "runs", "done": done, "steps": len(places)}
    rows = read_rows(folder.path / "metrics.jsonl") or [{"step": 0, "phase": "fit"}]
    return entry | {"phase": rows[-1]["phase"], "done": rows[-1]["step"], "steps": fields.get("steps", 0)}


def listing(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of what :func:`glance` says."""
    rows, notes = [("run", "method", "data", "steps", "accuracy, %", "date")], "accuracy with its 95 % interval"
    for entry in found:
        name, state, steps = shown(entry["run"]), entry["state"], ""
        methods, phase = entry.get("methods", [""]), entry.get("phase", "fit")
        if state == "damaged":
            notes += f"\n{name}: {shown(entry['why'])}"
        else:
            of = "" if state == "finished" else f"{entry['done']:,}/"
            steps = f"{'' if phase == 'fit' else f'{phase} '}{of}{entry['steps']:,}"
        if "accuracy" in entry:
            low, high = entry["interval"]
            state = f"{100 * entry['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f}) {entry['on']}"
        method = short(methods[0]) if len(methods) == 1 else f"{len(methods)} methods"
        rows.append((name, method, short(entry.get("data", "")), steps, state, entry["date"][:10]))
    return f"{table(rows, left=len(rows[0]))}\n\n{notes}"


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
            check_file(out, ".html")
        if out.exists() and web.GENERATOR.encode() not in read_plain(out)[:1000]:
            raise MetaplError(f"{out} is there, and metapl report did not write it; expected another --out FILE.html.")
        folder = RunFolder(self.folder)
        if folder.exists and not folder.ended:
            heading, parts = _unfinished(folder)
        else:
            heading, _, parts = page_of(EndedRun.load(self.folder))
        page = web.web_page(heading, self.folder, parts)
        write_whole(out, page, "any earlier page is as it was; expected a disk with room, or another --out.")
        tell(f"{heading}\nthe page is written: {out}, {len(page) / 1e3:,.0f} kB; open it in a browser")
        return 0


def _unfinished(folder: RunFolder) -> tuple[str, list[str]]:
    """What :func:`state_of` says of a run that has not ended, and its curves so far."""
    description, found = folder.recipe(), state_of(folder)
    heading = f"{found['recipe']}: {' and '.join(found['methods'])}, {found['state']}"
    rows = read_rows(folder.path / "metrics.jsonl", found["phase"])
    picture = draw(title=heading, curves={found["phase"]: rows}, evaluation=None, network="network")
    state = web.rows([(name, json.dumps(value)) for name, value in found.items()])
    return heading, [state, drawn(picture), *made(folder, description, folder)]
