"""``metapl runs``: the runs below a folder, a line each."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.machine import is_owned
from metapl.apps.pictures.folders import walk
from metapl.apps.printing import short, table, tell
from metapl.apps.run_folder import HASHED, RunFolder, guessing, refuse_changed, stored_result
from metapl.apps.settings import Switch, unset
from metapl.errors import MetaplError, reason_of
from metapl.metrics import interval
from metapl.runs.folder import read_rows
from metapl.words import shown

WRITTEN = (
    "recipe.json",
    "metrics.jsonl",
    "result.json",
)  # the newest of them says of when a run is


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder, the newest last.

    Of a finished run it says the accuracy of the network that it delivers, on test or on validation
    examples, and which of its networks are not better than guessing; of another one, how many of
    its steps are done, and whether it is running, interrupted or damaged, and how. A run is a
    folder with a recipe.json; all others are passed over.

    Args:
        folder: where to look, in all folders below it; or a run.
        json: print JSON.
    """

    folder: Annotated[Path, tyro.conf.Positional, unset("FOLDER", default="(default: runs)")] = (
        Path("runs")
    )
    json: Switch = False

    def run(self) -> int:
        if not self.folder.is_dir():
            raise MetaplError(
                f"{self.folder} is no folder; expected one that holds runs: metapl runs FOLDER."
            )
        refused, found = list[OSError](), list[dict[str, Any]]()
        for where, folders, files in walk(self.folder, refused.append):
            folders[:] = [
                name for name in folders if not name.startswith(".") and "recipe.json" not in files
            ]
            if "recipe.json" not in files:
                continue
            path = Path(where)
            times = (file.stat().st_mtime for file in map(path.joinpath, WRITTEN) if file.exists())
            date = datetime.fromtimestamp(max(times, default=path.stat().st_mtime)).isoformat(
                timespec="seconds"
            )
            try:
                about = state_of(RunFolder(path))
            except (MetaplError, OSError) as error:
                about = {"state": "damaged", "why": reason_of(error)}
            found.append({"run": where, "date": date, **about})
        for place in refused:
            tell(f"metapl: left out {place.filename}: {place.strerror}", file=sys.stderr)
        if not found:
            raise MetaplError(
                f"there is no run in {self.folder}; metapl train writes them: metapl train digits."
            )
        found.sort(key=lambda entry: str(entry["date"]))
        if self.json:
            tell(json.dumps(found, indent=2))
            return 1 if refused else 0
        rows, notes = (
            [("run", "method", "data", "steps", "accuracy, %", "date")],
            "accuracy with its 95 % interval",
        )
        for entry in found:
            name, state, steps = shown(entry["run"]), entry["state"], ""
            methods, phase = entry.get("methods", [""]), entry.get("phase", "fit")
            if state == "damaged":
                notes += f"\n{name}: {shown(entry['why'])}"
            else:
                of = "" if state == "finished" else f"{entry['done']:,}/"
                steps = f"{'' if phase == 'fit' else f'{phase} '}{of}{entry['steps']:,}"
            if entry.get("guessing"):
                named = ", ".join(
                    f"{network} {100 * value:.1f} %" for network, value in entry["guessing"].items()
                )
                notes += f"\n{name}: not better than guessing: {named}"
            if "accuracy" in entry:
                low, high = entry["interval"]
                state = (
                    f"{100 * entry['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f}) "
                    f"{entry['on']}"
                )
            method = short(methods[0]) if len(methods) == 1 else f"{len(methods)} methods"
            rows.append(
                (name, method, short(entry.get("data", "")), steps, state, entry["date"][:10])
            )
        tell(f"{table(rows, left=len(rows[0]))}\n\n{notes}")
        return 1 if refused else 0


def state_of(folder: RunFolder) -> dict[str, Any]:
    """Return what a run is, how far it has come and what it reached; refuse a damaged one."""
    description = folder.recipe()
    name, fields, methods = description["name"], description["fields"], description.get("compare")
    seeds, labeled = (
        description.get("seeds", [fields.get("seed", 0)]),
        Path(fields.get("labeled") or name),
    )
    entry = {"recipe": name, "data": "/".join(labeled.parts[-2:]), "seeds": seeds}
    entry["methods"] = methods or [description["method"]]
    if folder.ended:
        result = stored_result(folder)
        for name in HASHED if methods is None else ():  # those of a comparison are in its runs
            refuse_changed(folder.path / name, result)
        entry |= {"state": "finished", "steps": result["steps"], "done": result["steps"]}
        on, n = "validation", result["validation_size"]
        if "evaluation" in result:
            on, n = "test", result["evaluation"]["n"]
        if (accuracy := result.get(f"{on}_accuracy")) is not None:
            entry |= {
                "accuracy": accuracy,
                "interval": interval(round(accuracy * n), n),
                "n": n,
                "on": on,
            }
            entry["guessing"] = {
                result["networks"][network]: value for network, value in guessing(result).items()
            }
        return entry
    entry["state"] = "running" if is_owned(folder.path) else "interrupted"
    if methods is not None:
        places = [folder.path / name / f"seed-{seed}" for name in methods for seed in seeds]
        done = sum((place / "result.json").exists() for place in places)
        return entry | {"phase": "runs", "done": done, "steps": len(places)}
    rows = read_rows(folder.path / "metrics.jsonl") or [{"step": 0, "phase": "fit"}]
    return entry | {
        "phase": rows[-1]["phase"],
        "done": rows[-1]["step"],
        "steps": fields.get("steps", 0),
    }
