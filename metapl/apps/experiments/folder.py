"""A run on disk: what was run, what it measured, and what it ended with.

recipe.json           the recipe as it ran, with versions and hardware
data.json             on which data, by their hashes
split.json            which examples are labeled, unlabeled, held out, where the recipe draws that from a data set
metrics.jsonl         a row per logged step, each with its ``phase`` and ``step``
tensorboard/<phase>/  the same for TensorBoard
checkpoints/<phase>/  whole checkpoints only
student.safetensors   the student; finetuned_student.safetensors and teacher.safetensors likewise
pictures.safetensors  the pictures of the report
report.png            curves, confusion matrix, quality of the pseudo-labels, pictures
skipped.jsonl         the files that could not be read, where there are any
result.json           the end: accuracies
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor

from metapl.errors import MetaplError, few
from metapl.runs.atomic import remove_temporary, write_whole
from metapl.runs.cores import default_threads
from metapl.runs.environment import environment
from metapl.runs.ownership import LOCK, Folder
from metapl.runs.sealed import read_json, read_sealed

FORMAT = 3
"""The layout of run folders that this version writes and reads."""

SPEED_ALONE = ("num_workers",)
"""Fields of recipes in which the parts of a run may differ: they change nothing but speed."""

PLACES = ("labeled", "unlabeled", "clean", "val", "test", "data_root")
"""Fields of recipes that say where the data lie, which may have moved: what they hold is compared by its hashes."""

WEIGHTS = {
    "student": "student.safetensors",
    "finetuned": "finetuned_student.safetensors",
    "teacher": "teacher.safetensors",
}

ANOTHER = (
    "Put the file back from a copy, or train again with another --out; finetuned weights are made anew by: metapl "
    "finetune."
)
"""What to do where a file of a run is not as it was written."""

_MEND = "what was there before is whole. Mend that (is the disk full?), then go on with --resume."


def weights_file(network: str) -> str:
    """The file of a network's weights in a run folder: of the student, the student finetuned or the teacher."""
    return WEIGHTS[network]


@dataclass(frozen=True)
class _MadeWith:
    """What is read of what a run was made with."""

    threads: int


class RunFolder(Folder):
    """The files of one run of a recipe."""

    undone = ("recipe.json", LOCK, "data.json", "split.json", "skipped.jsonl")

    @property
    def exists(self) -> bool:
        """Whether a run has been started here."""
        return (self.path / "recipe.json").is_file()

    @contextmanager
    def claimed(self, recipe: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """:meth:`held`, by a run of this recipe: a new one, or the one that is there.

        Raises:
            MetaplError: as there; or a run is here and ``resume`` is not asked for; or it is of another recipe or
                format; or there are files here that are not a run's.
        """
        with self.held():
            self.check(resume)
            if not self.exists:
                self.write_json("recipe.json", {"format": FORMAT, "recipe": dict(recipe), "made_with": environment()})
                yield
                return
            before, now = (_by_flag(content) for content in (self.recipe(), json.loads(json.dumps(dict(recipe)))))
            moved = {name for name in PLACES if isinstance(before.get(name), str) and isinstance(now.get(name), str)}
            known = sorted({*before, *now} - {*SPEED_ALONE, *moved})
            changed = [f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in known if before.get(k) != now.get(k)]
            if changed:
                what = ", ".join(changed[:4])
                raise MetaplError(f"{self.path} holds a run of another recipe ({what}); resume it as it was started.")
            remove_temporary(self.path)
            yield

    def check(self, resume: bool) -> None:
        """Stop where a run is here and ``resume`` is not asked for, or where there are files that are not a run's."""
        if self.exists and not resume:
            raise MetaplError(f"{self.path} holds a run already; give --resume to go on with it, or another --out.")
        if not self.exists and self.path.is_dir():
            # Hidden files are a file manager's; the other kind is what a killed start left.
            left = re.compile(r"\..*|recipe\.json\.[0-9a-f]{8}\.tmp")
            others = sorted(name for name in os.listdir(self.path) if not left.fullmatch(name))
            if others:
                raise MetaplError(
                    f"{self.path} holds files that are not a run's ({few(others)}), and no recipe.json; expected an "
                    "empty folder, or a new one: give another --out."
                )

    def places(self) -> dict[str, Any]:
        """Where the data of the run in the folder lie, by the names of the recipe's fields."""
        fields: dict[str, Any] = self._description()["recipe"].get("fields", {})
        return {name: fields[name] for name in PLACES if name in fields}

    def relocate(self, fields: Mapping[str, Any]) -> None:
        """Note where the data lie now; ``fields`` are those of the run's recipe."""
        content = self._description()
        stored: dict[str, Any] = content["recipe"].get("fields", {})
        moved = {name: fields[name] for name in PLACES if name in stored and stored[name] != fields.get(name)}
        if moved:
            stored.update(moved)
            self.write_json("recipe.json", content)

    def threads(self) -> int:
        """Threads of the linear algebra that the run in the folder was started with; for a new one, the default.

        A resumed run, or one that is evaluated again, takes as many: rounding depends on their number.
        """
        begun = self._description().get("made_with", {}) if self.exists else {}
        return int(begun.get("threads") or default_threads())

    def recipe(self) -> dict[str, Any]:
        """The recipe of the run in the folder."""
        content = self._description()
        if content.get("format") != FORMAT:
            made = content.get("made_with", {}).get("metapl", "?")
            raise MetaplError(
                f"{self.path} was written in run format {content.get('format')!r}; this metapl {version('metapl')} "
                f"reads format {FORMAT}. Train again, or use the version that wrote it: {made}."
            )
        recipe: dict[str, Any] = content["recipe"]
        return recipe

    def _description(self) -> dict[str, Any]:
        """What recipe.json holds."""
        return self.read_json("recipe.json", {"recipe": dict[str, Any], "made_with": _MadeWith}, ("recipe",))

    def read_json(
        self, name: str, hints: Mapping[str, Any] | None = None, needed: Iterable[str] = ()
    ) -> dict[str, Any]:
        """One of the folder's JSON files, an object, as :func:`~metapl.runs.sealed.read_json` reads it."""
        if not (self.path / name).is_file():
            raise MetaplError(
                f"{name} is missing in {self.path}: this is not a run folder, or its run has not come so far."
            )
        return read_json(self.path / name, hints, needed)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        write_whole(self.path / name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(), _MEND)

    def write_weights(self, name: str, state: Mapping[str, Tensor]) -> str:
        """Weights as safetensors, the same weights as the same bytes; their SHA-256."""
        from safetensors.torch import save

        content = save({key: t.detach().cpu().contiguous().clone() for key, t in sorted(state.items())})
        write_whole(self.path / name, content, _MEND)
        return hashlib.sha256(content).hexdigest()

    def read_weights(self, name: str, sha256: str | None = None) -> dict[str, Tensor]:
        """The weights in a safetensors file of the folder; ``sha256`` is that of the file as it was written, None where
        that is not known, as of runs of earlier versions."""
        from safetensors.torch import load

        file = self.path / name
        if not file.is_file() and not (self.path / "result.json").is_file():
            raise MetaplError(f"{file} is missing. The run has not come so far: finish it with --resume.")
        if not file.is_file():
            left = [network for network, other in WEIGHTS.items() if (self.path / other).is_file()]
            instead = f" What is left: --network {' or '.join(left)}." if left else ""
            raise MetaplError(
                f"{file} is missing. The run was finished, so --resume does not mend it: train again with another "
                f"--out.{instead}"
            )
        content = read_sealed(file, sha256, mend=ANOTHER)
        try:
            weights: dict[str, Tensor] = load(content)
        except Exception as error:  # safetensors raises its own types
            raise MetaplError(f"{file} cannot be read: {error}.") from error
        return weights


def _by_flag(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What is run and how, with every field by the name that it has on the command line."""
    return {name.removeprefix("fields."): value for name, value in flat(recipe).items()}


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their whole names, as on the command line.

    >>> flat({"seed": 3, "student": {"lr": 0.1}})
    {'seed': 3, 'student.lr': 0.1}
    """
    fields: dict[str, Any] = {}
    for name, value in values.items():
        whole = f"{above}{name}"
        fields |= flat(value, f"{whole}.") if isinstance(value, Mapping) else {whole: value}
    return fields
