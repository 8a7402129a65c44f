"""``metapl runs``: the runs below a folder, a line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.pace import FINETUNING, spoken_counts
from metapl.apps.printing import as_flags, short, table, tell
from metapl.errors import MetaplError, reason_of
from metapl.metrics import interval
from metapl.pictures.folders import walk
from metapl.run_folder import HASHED, RunFolder, guessing, refuse_changed, stored_result
from metapl.runs.files import is_owned
from metapl.runs.folder import read_rows
from metapl.words import shown

# Files of a run, the newest of which says of when it is.
WRITTEN = ("recipe.json", "metrics.jsonl", "result.json")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder, the newest last.

    The line of a finished run has the accuracy of the network that it delivers, on test or
    validation examples, and names its networks that are not better than guessing, and the steps of
    each phase that were taken where some were skipped to keep to --minutes. The line of another run
    says how many of its steps are done, and whether it is running, interrupted or damaged, with the
    error that ended it. A run is a folder with a recipe.json; other folders are passed over.

    Args:
        folder: folder to look in, with all folders below it; or the folder of a run.
        json: print JSON.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    json: bool = False

    def run(self) -> int:
        """Print the runs; return 1 where a folder could not be looked into."""
        if not self.folder.is_dir():
            raise MetaplError(
                f"{self.folder} is no folder; expected one that holds runs: metapl runs FOLDER."
            )
        refused: list[OSError] = []
        entries = []
        for where, folders, files in walk(self.folder, refused.append):
            if "recipe.json" in files:
                entries.append(entry_of(where))
                # What is in a run is not looked into.
                folders.clear()
            else:
                folders[:] = [name for name in folders if not name.startswith(".")]
        for error in refused:
            tell(f"metapl: left out {error.filename}: {error.strerror}", file=sys.stderr)
        if not entries:
            raise MetaplError(
                f"there is no run in {self.folder}; metapl train writes them: metapl train digits."
            )
        entries.sort(key=lambda entry: str(entry["date"]))
        if self.json:
            tell(json.dumps(entries, indent=2))
        else:
            tell(text_of(entries))
        return 1 if refused else 0


def entry_of(where: str) -> dict[str, Any]:
    """Return where a run is, its date, and what it is; of a damaged one, how it is damaged."""
    path = Path(where)
    times = [(path / name).stat().st_mtime for name in WRITTEN if (path / name).exists()]
    newest = max(times, default=path.stat().st_mtime)
    date = datetime.fromtimestamp(newest).isoformat(timespec="seconds")
    try:
        state = state_of(RunFolder(path))
    except (MetaplError, OSError) as error:
        state = {"state": "damaged", "why": reason_of(error)}
    return {"run": where, "date": date, **state}


def text_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of runs, and notes on some of them."""
    rows = [("run", "method", "data", "steps", "accuracy, %", "date")]
    notes = ["accuracy with its 95 % interval"]
    for entry in entries:
        name = shown(entry["run"])
        state = entry["state"]
        steps = ""
        if entry.get("why"):
            notes.append(f"{name}: {as_flags(shown(entry['why']))}")
        if state != "damaged":
            steps = f"{entry['steps']:,}"
            if entry["done"] != entry["steps"] or state != "finished":
                steps = f"{entry['done']:,}/{steps}"
            phase = entry.get("phase", "fit")
            if phase != "fit":
                steps = f"{phase} {steps}"
        if entry.get("guessing"):
            named = ", ".join(
                f"{network} {100 * accuracy:.1f} %"
                for network, accuracy in entry["guessing"].items()
            )
            notes.append(f"{name}: not better than guessing: {named}")
        if entry.get("skipped"):
            taken = spoken_counts(entry["steps_by_phase"])
            notes.append(f"{name}: to end in time not all steps were taken: {taken}")
        if "accuracy" in entry:
            low, high = entry["interval"]
            state = (
                f"{100 * entry['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f}) {entry['on']}"
            )
        method = short(entry.get("method", ""))
        data = short(entry.get("data", ""))
        rows.append((name, method, data, steps, state, entry["date"][:10]))
    notes_text = "\n".join(notes)
    return f"{table(rows, left=len(rows[0]))}\n\n{notes_text}"


def state_of(folder: RunFolder) -> dict[str, Any]:
    """Return what a run is, how far it has come and what it reached; refuse a damaged one."""
    recipe = folder.recipe()
    fields = recipe["fields"]
    labeled = Path(fields.get("labeled") or recipe["name"])
    entry: dict[str, Any] = {
        "recipe": recipe["name"],
        "data": "/".join(labeled.parts[-2:]),
        "seed": fields.get("seed", 0),
        "method": recipe["method"],
    }
    if folder.ended:
        result = stored_result(folder)
        for name in HASHED:
            refuse_changed(folder.path / name, result)
        return entry | _reached(result)
    entry["state"] = "running"
    if not is_owned(folder.path):
        entry |= {"state": "interrupted", "why": folder.failure}
    rows = read_rows(folder.path / "metrics.jsonl") or [{"step": 0, "phase": "fit"}]
    last_row = rows[-1]
    phase = last_row["phase"]
    steps = fields.get("finetune_steps" if phase == FINETUNING else "steps", 0)
    return entry | {"phase": phase, "done": last_row["step"], "steps": steps}


def _reached(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run that has ended reached."""
    counts = result.get("steps_by_phase", {})
    done = result["steps"]
    if "fit" in counts:
        done = counts["fit"]["taken"]
    reached: dict[str, Any] = {
        "state": "finished",
        "steps": result["steps"],
        "done": done,
        "skipped": result.get("skipped_steps", 0),
        "steps_by_phase": counts,
    }
    part = "validation"
    examples = result["validation_size"]
    if "evaluation" in result:
        part = "test"
        examples = result["evaluation"]["n"]
    accuracy = result.get(f"{part}_accuracy")
    if accuracy is not None:
        reached |= {
            "accuracy": accuracy,
            "interval": interval(round(accuracy * examples), examples),
            "n": examples,
            "on": part,
            "guessing": {
                result["networks"][network]: value for network, value in guessing(result).items()
            },
        }
    return reached
