"""A run on disk: what was run, what it measured, and what it ended with.

recipe.json           the recipe as it ran, with versions and hardware
data.json             on which data, by their hashes
metrics.jsonl         a row per logged step, each with its ``phase`` and ``step``
tensorboard/<phase>/  the same for TensorBoard
checkpoints/<phase>/  whole checkpoints only
student.safetensors   the student; finetuned_student.safetensors and teacher.safetensors likewise
report.html           all there is to see of it, as one page
report.png            curves and confusion matrix
skipped.jsonl         the files that could not be read, where there are any
network.json          what the networks are, and how a file becomes their input
result.json           the end: accuracies
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from metapl.apps.machine.cores import default_threads
from metapl.apps.machine.environment import environment
from metapl.apps.machine.misfit import misfit, misfit_entries
from metapl.apps.machine.ownership import LOCK, owned
from metapl.apps.machine.sealed import is_there, read_json, read_sealed, remove_temporary, write_whole
from metapl.apps.pictures.card import NetworkCard
from metapl.apps.recipes import RECIPES, ImageFolders
from metapl.apps.recipes.base import Recipe, as_dict, recipe_from_dict
from metapl.apps.recipes.methods import EVERY_METHOD
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation
from metapl.runs.fields import AtLeastZero, Range
from metapl.runs.folder import Folder

FORMAT = 4  # the layout of run folders that this version writes and reads

# Fields of recipes in which the parts of a run may differ, for they change nothing but speed; and those that say where
# the data lie, which may have moved: what they hold is compared by its hashes.
SPEED_ALONE = ("num_workers",)
PLACES = ("labeled", "unlabeled", "clean", "val", "test")

NETWORK = "network.json"
WEIGHTS = {
    "student": "student.safetensors",
    "finetuned": "finetuned_student.safetensors",
    "teacher": "teacher.safetensors",
}
# What is compared: the network that a run delivers, the student, and the student finetuned.
READOUTS = ("test_accuracy", "student_test_accuracy", "finetuned_test_accuracy")

ANOTHER = (  # what to do where a file of a run is not as it was written
    "Put the file back from a copy, or train again with another --out; finetuned weights are made anew by: metapl "
    "finetune."
)
_MEND = "what was there before is whole. Mend that (is the disk full?), then go on with --resume."

KNOWN: dict[str, type[Recipe]] = RECIPES

NetworkName = Literal["delivered", "student", "finetuned", "teacher"]  # the one that a run delivers, or one of its own


def weights_file(network: str) -> str:
    return WEIGHTS[network]


@dataclass(frozen=True)
class _MadeWith:
    threads: int  # what is read of what a run was made with


def _seal(content: Mapping[str, Any]) -> str:
    """The SHA-256 of what recipe.json or result.json holds, but for where the data lie, which may change."""
    plain = json.loads(json.dumps(dict(content)))
    if isinstance(recipe := plain.get("recipe"), dict) and isinstance(fields := recipe.get("fields"), dict):
        recipe["fields"] = {name: value for name, value in fields.items() if name not in PLACES}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class RunFolder(Folder):
    """The files of one run of a recipe."""

    # Files that are written before anything was trained.
    undone = ("recipe.json", LOCK, "data.json", "skipped.jsonl")
    command: str | None = None  # what starts the run, for the record

    @contextmanager
    def held(self) -> Iterator[None]:
        """:func:`owned`; within it, this value may be held again, which changes nothing."""
        if self._lock is not None:
            yield
            return
        with owned(self.path, self.undone):
            self._lock = True
            try:
                yield
            finally:
                self._lock = None

    @property
    def exists(self) -> bool:
        return is_there(self.path / "recipe.json")

    @property
    def ended(self) -> bool:
        return is_there(self.path / "result.json")

    @contextmanager
    def claimed(self, recipe: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """:meth:`held`, by a run of this recipe: a new one, or with ``resume`` the one that is there, of the same."""
        with self.held():
            self.check(resume)
            if not self.exists:
                content = {"format": FORMAT, "recipe": dict(recipe), "made_with": environment()}
                self.write_json("recipe.json", content | ({"command": self.command} if self.command else {}))
                yield
                return
            before, now = (
                {name.removeprefix("fields."): value for name, value in flat(content).items()}
                for content in (self.recipe(), json.loads(json.dumps(dict(recipe))))
            )
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
            if others := sorted(name for name in os.listdir(self.path) if not left.fullmatch(name)):
                raise MetaplError(
                    f"{self.path} holds files that are not a run's ({few(others)}), and no recipe.json; expected an "
                    "empty folder, or a new one: give another --out."
                )

    def places(self) -> dict[str, Any]:
        """Where the data of the run in the folder lie, by the names of the recipe's fields."""
        fields: dict[str, Any] = self.recipe().get("fields", {})
        return {name: fields[name] for name in PLACES if name in fields}

    def relocate(self, fields: Mapping[str, Any]) -> None:
        """Note where the data lie now; ``fields`` are those of the run's recipe."""
        content = self.description()
        stored: dict[str, Any] = content["recipe"].get("fields", {})
        moved = {name: fields[name] for name in PLACES if name in stored and stored[name] != fields.get(name)}
        if moved:
            stored.update(moved)
            self.write_json("recipe.json", content)

    def threads(self) -> int:
        """Threads of the linear algebra, on whose number rounding depends: those that the run here was started with."""
        begun = self.description().get("made_with", {}) if self.exists else {}
        return int(begun.get("threads") or default_threads())

    def recipe(self) -> dict[str, Any]:
        """The recipe of the run in the folder."""
        recipe: dict[str, Any] = self.description()["recipe"]
        return recipe

    def description(self) -> dict[str, Any]:
        """What ``recipe.json`` holds: the recipe, with what it was made, and the command where one did it."""
        hints = {"recipe": dict[str, Any], "made_with": _MadeWith, "command": str, "sha256": dict[str, str]}
        content = self.read_json("recipe.json", hints, ("recipe",))
        if content.get("format") != FORMAT:
            made = content.get("made_with", {}).get("metapl", "?")
            raise MetaplError(
                f"{self.path} was written in run format {content.get('format')!r}; this metapl {version('metapl')} "
                f"reads format {FORMAT}. Train again, or use the version that wrote it: {made}."
            )
        return self.unsealed("recipe.json", content)

    def unsealed(self, name: str, content: dict[str, Any]) -> dict[str, Any]:
        """What a file holds, without the SHA-256 of itself; refused where that is another."""
        if content.get("sha256", {}).pop(name, None) not in (None, _seal(content)):  # earlier versions noted none
            fault = "its SHA-256 is not the one that was noted"
            raise MetaplError(f"{self.path / name} is damaged or was edited: {fault}. {ANOTHER}")
        return content

    def read_json(
        self, name: str, hints: Mapping[str, Any] | None = None, needed: Iterable[str] = ()
    ) -> dict[str, Any]:
        """One of the folder's JSON files, an object, as :func:`~metapl.apps.machine.sealed.read_json` reads it."""
        if not is_there(self.path / name):
            raise MetaplError(
                f"{name} is missing in {self.path}: this is not a run folder, or its run has not come so far."
            )
        return read_json(self.path / name, hints, needed)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        if name in ("recipe.json", "result.json"):
            noted = content.get("sha256", {})
            content = {**content, "sha256": {**noted, name: _seal({**content, "sha256": noted})}}
        write_whole(self.path / name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(), _MEND)

    def write_weights(self, name: str, state: Mapping[str, Tensor]) -> str:
        """Weights as safetensors, the same weights as the same bytes; their SHA-256."""
        from safetensors.torch import save

        content = save({key: t.detach().cpu().contiguous().clone() for key, t in sorted(state.items())})
        write_whole(self.path / name, content, _MEND)
        return hashlib.sha256(content).hexdigest()

    def read_weights(self, name: str, sha256: str | None = None) -> dict[str, Tensor]:
        """The weights in a safetensors file of the folder, of this SHA-256 where that is known."""
        from safetensors.torch import load

        file = self.path / name
        if not file.is_file():
            if not (self.path / "result.json").is_file():
                raise MetaplError(f"{file} is missing. The run has not come so far: finish it with --resume.")
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


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their whole names, as on the command line.

    >>> flat({"seed": 3, "student": {"lr": 0.1}})
    {'seed': 3, 'student.lr': 0.1}
    """
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return fields


# ------------------------------------------------------------------------------------------------- recipes and results

Fraction = Annotated[float, Range(0, most=1)]

# What result.json must say, and what it and data.json may say, with types. The names of accuracies end in "_accuracy".
TOLD = ("delivered", "delivered_by", "validation_size", "seed", "method", "steps", "best_step")
RESULT: dict[str, Any] = {
    "recipe": str,
    "method": str,
    **dict.fromkeys(("seed", "steps", "best_step", "validation_size"), AtLeastZero),
    "validation_chance": float | None,
    "delivered": Literal[tuple(WEIGHTS)],
    "delivered_by": Literal["validation", "rule"],
    "evaluation": dict[str, Any],
    "sha256": dict[str, str],
    "rounds": list[dict[str, Any]],
    "seeds": list[int],
    "methods": dict[str, dict[str, list[float]]],
    "delivery": str,
    "chance": Fraction,
}
DATA: dict[str, Any] = {
    "hash": dict[str, str],
    "data": str,
    "counts": dict[str, int],
    **dict.fromkeys(("labeled", "unlabeled", "clean", "validation", "test"), int | list[str] | list[int]),
}


def describe(recipe: Recipe, **run_by: Any) -> dict[str, Any]:
    """A recipe and its method as plain values, with their names and how they are run."""
    return {"name": recipe.name, "method": recipe.method.name, **run_by, "fields": as_dict(recipe)}


OF_COMPARISONS = {"compare": list[str], "seeds": list[int]}  # what the description of one says besides


def described(folder: RunFolder) -> dict[str, Any]:
    """What ``recipe.json`` says of how a run was made, as plain values: its name, its method and their fields."""
    description = folder.recipe()
    hints: dict[str, Any] = {"name": str, "method": str, "fields": dict[str, Any]}
    if fault := misfit_entries(description, hints | OF_COMPARISONS, "its recipe") or _unsaid(description, hints):
        raise MetaplError(f"{folder.path / 'recipe.json'} is damaged: {fault}.")
    return description


def stored(folder: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run folder, and its whole description."""
    file, description = folder.path / "recipe.json", described(folder)
    kind = KNOWN.get(description["name"])
    if kind is None:
        what = f"a run of the recipe {description['name']!r}, which this metapl does not have"
        raise MetaplError(f"{folder.path} is {what}; it has {', '.join(KNOWN)}.")
    try:
        recipe = recipe_from_dict(kind, description["method"], description["fields"])
    except (MetaplError, TypeError) as error:  # TypeError: a field without a default is missing
        raise MetaplError(f"{file} is damaged or of another version: {error}") from error
    if isinstance(recipe, ImageFolders) and not recipe.complete:
        missing = ", ".join(name for name in recipe.chosen if getattr(recipe, name) is None)
        raise MetaplError(f"{file} is damaged: it has no value for {missing}.")
    return recipe, description


def stored_result(folder: RunFolder) -> dict[str, Any]:
    """What the ``result.json`` of a run folder holds, where it is whole and of the run in ``recipe.json``."""
    result = folder.read_json("result.json")
    for fault in chain(_faults(result), _contradictions(result, folder.recipe())):
        raise MetaplError(f"{folder.path / 'result.json'} is damaged or of another version: {fault}.")
    return folder.unsealed("result.json", result)


def results_within(path: Path, compared: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """What the runs of a comparison ended with, by method and seed; ``compared`` is its own ``result.json``."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for method, accuracies in compared["methods"].items():
        for seed, accuracy in zip(compared["seeds"], accuracies[READOUTS[1]], strict=True):
            folder = RunFolder(path / method / f"seed-{seed}")
            result = found[method, seed] = stored_result(folder)
            if (result["method"], result["seed"], result.get(READOUTS[1])) != (method, seed, accuracy):
                raise MetaplError(f"{folder.path} holds another run than the one that was compared. {ANOTHER}")
    return found


def describe_networks(folder: RunFolder, title: str, classes: Sequence[str], cards: Mapping[str, NetworkCard]) -> None:
    """Write ``network.json``."""
    networks = {name: dataclasses.asdict(card) for name, card in cards.items()}
    folder.write_json(NETWORK, {"title": title, "classes": list(classes), "networks": networks})


def refuse_changed(file: Path, result: Mapping[str, Any]) -> None:
    """Stop where a file of a run is not as its ``result.json`` notes it; what was never noted may be gone."""
    sha256 = result.get("sha256", {}).get(file.name)
    if sha256 is not None or file.exists():
        read_sealed(file, sha256, mend=ANOTHER)


def stored_data(folder: RunFolder) -> dict[str, Any]:
    """What ``data.json`` holds, where it is of the run that ``result.json`` is of."""
    if folder.ended:
        refuse_changed(folder.path / "data.json", stored_result(folder))
    return folder.read_json("data.json", DATA, ("hash",))


def counts_of(data: Mapping[str, Any]) -> dict[str, int]:
    """How many examples each part of the data has, of what :func:`stored_data` gives."""
    record = {**data, **data.get("counts", {})}
    found = {part: record[part] for part in ("labeled", "unlabeled", "validation", "test") if part in record}
    return {part: len(of) if isinstance(of, list) else of for part, of in found.items()}


def _unsaid(content: dict[str, Any], names: Any) -> str | None:
    return next((f"it does not say {name}" for name in names if name not in content), None)


def _faults(result: dict[str, Any]) -> Iterator[str | None]:
    """What is wrong with a ``result.json``; each is looked for only where there was nothing before it."""
    fractions = {name: Fraction for name in result if name.endswith("_accuracy")}
    if fault := _unsaid(result, TOLD) or misfit_entries(result, {**RESULT, **fractions}, "its content"):
        yield fault
    if "methods" in result:
        if fault := _unsaid(result, ("seeds", "delivery")):
            yield fault
        for name, readouts in result["methods"].items():
            if name not in EVERY_METHOD or not readouts.keys() >= set(READOUTS):
                yield f"methods.{name} does not say {', '.join(READOUTS)} of a method"
            if any(len(values) != len(result["seeds"]) for values in readouts.values()):
                yield f"methods.{name} has not one value for each of the {len(result['seeds'])} seeds"
        if result["method"] not in result["methods"] or result["seed"] not in result["seeds"]:
            yield "the run that it delivers is not one of its own"
    if "evaluation" in result:
        try:
            found = Evaluation(**result["evaluation"])
        except TypeError as error:
            yield f"its evaluation {str(error).removeprefix('Evaluation.__init__() ')}"
        if fault := misfit(result["evaluation"], Evaluation, "evaluation"):
            yield fault
        width, classes = len(found.confusion), found.per_class if found.classes is None else found.classes
        wide = {width, len(found.per_class), len(classes), *map(len, found.confusion)}
        counts = [count for row in found.confusion for count in row]
        if len(wide) > 1 or found.n < 1 or sum(counts) != found.n or min(counts) < 0:
            yield f"its evaluation has tables that do not fit each other and n = {found.n}"
        right = sum(row[index] for index, row in enumerate(found.confusion))
        if not abs(found.accuracy - right / found.n) < 1e-6:
            yield f"its evaluation has the accuracy {found.accuracy}, and {right} right of {found.n} in its table"


def _contradictions(result: dict[str, Any], description: dict[str, Any]) -> Iterator[str]:
    """Where a ``result.json`` is of another run than a ``recipe.json``: both have the same name in every folder."""
    pairs: dict[str, tuple[Any, Any]] = {}
    if "compare" in description:
        for name, of in (("methods", "compare"), ("seeds", "seeds")):
            if isinstance(run := description.get(of), list):
                pairs[name] = sorted(map(str, result.get(name, ()))), sorted(map(str, run))
    else:
        fields = description.get("fields")
        seed = fields.get("seed") if isinstance(fields, dict) else None
        pairs = {"method": (result["method"], description.get("method")), "seed": (result["seed"], seed)}
    for name, (told, run) in pairs.items():
        if told != run:
            yield f"its {name} is {told!s:.60}, and that of recipe.json {run!s:.60}"


# ---------------------------------------------------------------------------------------------------- a run that ended


def begun(path: Path) -> RunFolder:
    """The folder of a run, whether that has ended or not."""
    if not path.is_dir():
        state = f"{path} is a file" if path.exists() else f"there is no folder {path}"
        raise MetaplError(f"{state}; expected the folder of a run that metapl train wrote, such as runs/digits-001.")
    folder = RunFolder(path)
    if not folder.exists:
        raise MetaplError(f"{path} is not a run folder: there is no recipe.json in it.")
    return folder
