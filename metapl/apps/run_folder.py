"""A run on disk: what was run, what it measured, and what it ended with.

recipe.json           what was trained, by which settings, with versions and hardware
data.json             on which data, by their hashes
metrics.jsonl         a row per logged step, each with its ``phase`` and ``step``
tensorboard/<phase>/  the same for TensorBoard
checkpoints/<phase>/  whole checkpoints only
student.safetensors   the student; finetuned_student.safetensors and teacher.safetensors likewise
report.html           all there is to see of it, as one page
report.png            curves and confusion matrix
skipped.jsonl         the files that could not be read, where there are any
suspects.csv          labels that may be wrong, of train noisy
labels/, rounds/      stored labels, of reduced_mpl and of Noisy Student
network.json          what the networks are, and how a file becomes their input
result.json           the end: accuracies

Whoever leaves network.json, the weights and result.json leaves a run that ``metapl predict``,
``label`` and ``export`` read: :func:`save` does, for a script of one's own. Nothing in the folder
is code, and nothing of it is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl.apps.machine import (
    default_threads,
    environment,
    json_sha256,
    owned,
    read_json,
    read_sealed,
    remove_temporary,
    sha256_of,
    write_whole,
)
from metapl.apps.networks import Architecture
from metapl.apps.pictures.input import Input, NetworkCard
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation, interval
from metapl.runs.folder import LOCK, Folder

FORMAT = 4  # the layout of run folders that this version writes and reads

# Settings in which the parts of a run may differ, for they change nothing but speed; and those that
# say where the data lie, which may have moved: what they hold is compared by its hashes.
SPEED_ALONE = ("num_workers",)
PLACES = ("labeled", "unlabeled", "clean", "val", "test")

NETWORK = "network.json"
# These files say what a run is, beside its result, which has their SHA-256.
HASHED = (
    "data.json",
    "metrics.jsonl",
)
WEIGHTS = {
    "student": "student.safetensors",
    "finetuned": "finetuned_student.safetensors",
    "teacher": "teacher.safetensors",
}
# What is compared: the network that a run delivers, the student, and the student finetuned.
READOUTS = ("test_accuracy", "student_test_accuracy", "finetuned_test_accuracy")

ANOTHER = "Put the file back from a copy, or train again with another --out."
_MEND = "what was there before is whole. Mend that (is the disk full?), then go on with --resume."

# The network that a run delivers, or one of those that it has kept.
NetworkName = Literal["delivered", "student", "finetuned", "teacher"]


class RunFolder(Folder):
    """The files of one run of a recipe."""

    # Files that are written before anything was trained.
    undone = ("recipe.json", LOCK, "data.json", "skipped.jsonl")
    command: str | None = None  # what starts the run, for the record
    _is_locked = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """:func:`owned`; within it, this value may be locked again, which changes nothing."""
        with nullcontext() if self._is_locked else owned(self.path, self.undone):
            before, self._is_locked = self._is_locked, True
            try:
                yield
            finally:
                self._is_locked = before

    @property
    def exists(self) -> bool:
        return os.path.lexists(self.path / "recipe.json")

    @property
    def ended(self) -> bool:
        return os.path.lexists(self.path / "result.json")

    @contextmanager
    def claimed(self, recipe: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """:meth:`locked`, by a run of this recipe.

        A new one, or with ``resume`` the one that is there, of the same.
        """
        with self.locked():
            self.check(resume)
            if not self.exists:
                content = {"format": FORMAT, "recipe": dict(recipe), "made_with": environment()}
                self.write_json(
                    "recipe.json", content | ({"command": self.command} if self.command else {})
                )
                yield
                return
            before, now = (
                {**content, **content.get("fields", {}), "fields": None}
                for content in (self.recipe(), json.loads(json.dumps(dict(recipe))))
            )
            moved = {
                name
                for name in PLACES
                if isinstance(before.get(name), str) and isinstance(now.get(name), str)
            }
            known = sorted({*before, *now} - {*SPEED_ALONE, *moved})
            changed = [
                f"{k} was {before.get(k)!r}, now {now.get(k)!r}"
                for k in known
                if before.get(k) != now.get(k)
            ]
            if changed:
                what = ", ".join(changed[:4])
                raise MetaplError(
                    f"{self.path} holds a run of another recipe ({what}); resume it as it was "
                    "started."
                )
            remove_temporary(self.path)
            yield

    def check(self, resume: bool) -> None:
        """Refuse a folder with a run that is not to be resumed, or with files of no run."""
        if self.exists and not resume:
            raise MetaplError(
                f"{self.path} holds a run already; give --resume to go on with it, or another "
                "--out."
            )
        if not self.exists and self.path.is_dir():
            # Hidden files are a file manager's; the other kind is what a killed start left.
            left = re.compile(r"\..*|recipe\.json\.[0-9a-f]{8}\.tmp")
            if others := sorted(name for name in os.listdir(self.path) if not left.fullmatch(name)):
                raise MetaplError(
                    f"{self.path} holds files that are not a run's ({few(others)}); give another "
                    "--out."
                )

    def threads(self, usual: int | None = None) -> int:
        """Return the threads of the linear algebra, on whose number rounding depends.

        They are those that the run in the folder was started with; of a new run ``usual``, or None
        for one a core.
        """
        begun = self.description().get("made_with", {}) if self.exists else {}
        return int(begun.get("threads") or usual or default_threads())

    def recipe(self) -> dict[str, Any]:
        """Return the recipe of the run in the folder."""
        recipe: dict[str, Any] = self.description()["recipe"]
        return recipe

    def description(self) -> dict[str, Any]:
        """Return what ``recipe.json`` holds.

        It is the recipe, with what it was made, and the command where one did it.
        """
        content = self.read_json("recipe.json")
        if content.get("format") != FORMAT:
            made = content.get("made_with", {}).get("metapl", "?")
            fault = (
                f"{self.path} was written in run format {content.get('format')!r} by metapl {made}"
            )
            raise MetaplError(
                f"{fault}; this metapl {version('metapl')} reads format {FORMAT}: train again."
            )
        return self.unsealed("recipe.json", content)

    def unsealed(self, name: str, content: dict[str, Any]) -> dict[str, Any]:
        """Return what a file holds without its own SHA-256; refuse it where that is another."""
        noted = content.get("sha256")
        if not isinstance(noted, dict) or noted.pop(name, None) != json_sha256(content):
            fault = "its SHA-256 is not the one that was noted"
            raise MetaplError(f"{self.path / name} is damaged or was edited: {fault}. {ANOTHER}")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in one of the folder's JSON files."""
        return read_json(self.path / name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        if name in ("recipe.json", "result.json"):
            plain = json.loads(json.dumps({"sha256": {}, **content}))
            content = {**plain, "sha256": {**plain["sha256"], name: json_sha256(plain)}}
        write_whole(
            self.path / name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode(), _MEND
        )

    def write_weights(self, name: str, state: Mapping[str, Tensor]) -> str:
        """Write weights as safetensors, the same ones as the same bytes; return their SHA-256."""
        from safetensors.torch import save

        content = save(
            {key: t.detach().cpu().contiguous().clone() for key, t in sorted(state.items())}
        )
        write_whole(self.path / name, content, _MEND)
        return hashlib.sha256(content).hexdigest()

    def read_weights(self, name: str, sha256: str | None) -> dict[str, Tensor]:
        """Return the weights in a safetensors file of the folder; refuse another SHA-256."""
        from safetensors.torch import load

        file = self.path / name
        if not file.is_file():
            left = [network for network, other in WEIGHTS.items() if (self.path / other).is_file()]
            raise MetaplError(
                f"{file} is missing; expected it, or --network with what is left: "
                f"{', '.join(left)}."
            )
        weights: dict[str, Tensor] = load(read_sealed(file, sha256, mend=ANOTHER))
        return weights


def stored_result(folder: RunFolder) -> dict[str, Any]:
    """Return what ``result.json`` holds; refuse one that is damaged or of another recipe."""
    file, result, of = folder.path / "result.json", folder.read_json("result.json"), folder.recipe()
    result = folder.unsealed("result.json", result)
    # Both have the same name in every folder.
    own = ("methods", "compare") if "compare" in of else ("method", "method")
    if sorted(result.get(own[0], ())) != sorted(of.get(own[1], ())) or (
        "compare" not in of and result.get("seed") != of.get("fields", {}).get("seed")
    ):
        raise MetaplError(
            f"{file} is damaged or of another run: its {own[0]} or its seed is not that of "
            "recipe.json."
        )
    return result


def guessing(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracies of a run's networks that are not shown to be better than guessing.

    They are those on the test examples or, without these, on the validation examples, by the names
    of the networks. Guessing lies in their 95 % interval, or above it.
    """
    part, n, chance = "validation", result["validation_size"], result.get("validation_chance")
    if "evaluation" in result:
        tested = Evaluation(**result["evaluation"])
        part, n, chance = "test", tested.n, tested.chance
    found: dict[str, float] = {}
    for name in result["networks"]:
        accuracy = result.get(f"{name}_{part}_accuracy")
        if (
            accuracy is not None
            and chance is not None
            and interval(round(accuracy * n), n)[0] <= chance
        ):
            found[name] = accuracy
    return found


def results_within(
    path: Path, compared: Mapping[str, Any]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Return what the runs of a comparison ended with, by method and seed.

    ``compared`` is the comparison's own ``result.json``.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for method, accuracies in compared["methods"].items():
        for seed, accuracy in zip(compared["seeds"], accuracies[READOUTS[1]], strict=True):
            folder = RunFolder(path / method / f"seed-{seed}")
            result = found[method, seed] = stored_result(folder)
            if (result["method"], result["seed"], result.get(READOUTS[1])) != (
                method,
                seed,
                accuracy,
            ):
                raise MetaplError(
                    f"{folder.path} holds another run than the one that was compared. {ANOTHER}"
                )
    return found


def seal(
    folder: RunFolder,
    title: str,
    classes: Sequence[str],
    cards: Mapping[str, NetworkCard],
    weights: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, str]:
    """Write ``network.json`` and the weights.

    Return the SHA-256 of these and of :data:`HASHED` by their names.
    """
    networks = {name: dataclasses.asdict(card) for name, card in cards.items()}
    folder.write_json(NETWORK, {"title": title, "classes": list(classes), "networks": networks})
    found = {
        WEIGHTS[name]: folder.write_weights(WEIGHTS[name], state) for name, state in weights.items()
    }
    there = (name for name in (NETWORK, *HASHED) if (folder.path / name).is_file())
    return found | {name: sha256_of(folder.path / name) for name in there}


def refuse_changed(file: Path, result: Mapping[str, Any]) -> None:
    """Stop where a file of a run is not as its ``result.json`` notes it.

    What was never noted may be gone.
    """
    sha256 = result["sha256"].get(file.name)
    if sha256 is not None or file.exists():
        read_sealed(file, sha256, mend=ANOTHER)


def stored_data(folder: RunFolder) -> dict[str, Any]:
    """Return what ``data.json`` holds; refuse it where ``result.json`` is of another one."""
    if folder.ended:
        refuse_changed(folder.path / "data.json", stored_result(folder))
    return folder.read_json("data.json")


def counts_of(data: Mapping[str, Any]) -> dict[str, int]:
    """Return how many examples each part of the data of :func:`stored_data` has."""
    found = {
        part: data[part]
        for part in ("labeled", "unlabeled", "clean", "validation", "test")
        if part in data
    }
    return {part: len(of) if isinstance(of, list) else of for part, of in found.items()}


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended, read from its folder alone.

    Of a comparison, the run whose networks it delivers.
    """

    folder: RunFolder
    title: str
    classes: tuple[str, ...]
    cards: Mapping[str, NetworkCard]  # by the names of networks: student, teacher, finetuned
    description: Mapping[str, Any]  # what recipe.json says of how it was made
    result: Mapping[str, Any]  # what result.json holds

    @classmethod
    def load(cls, path: Path) -> EndedRun:
        """Read the run in a folder; refuse one that is not finished, whole and of this version."""
        folder = RunFolder(path)
        if not path.is_dir() or not folder.exists:
            state = "there is no recipe.json in it" if path.is_dir() else "there is no such folder"
            raise MetaplError(
                f"{path}: {state}; expected the folder of a run, such as runs/digits-001."
            )
        if not folder.ended:
            command = folder.description().get(
                "command", f"the command that started it, with --out {path}"
            )
            more = "" if "--resume" in command.split() else " --resume"
            raise MetaplError(
                f"the run in {path} is not finished; go on with it by {command}{more}"
            )
        file = path / NETWORK
        description, result = folder.recipe(), stored_result(folder)
        refuse_changed(file, result)
        said, cards = folder.read_json(NETWORK), dict[str, NetworkCard]()
        try:
            for name, card in said["networks"].items():
                cards[name] = card_of(card)
        # The file of another version lacks a field, or has others.
        except (MetaplError, TypeError, KeyError) as error:
            raise MetaplError(f"{file} is of another version: {error}") from error
        return cls(folder, said["title"], tuple(said["classes"]), cards, description, result)

    @property
    def is_comparison(self) -> bool:
        return "compare" in self.description

    @property
    def source(self) -> RunFolder:
        """Where its data are described; of a comparison, in the run that it delivers."""
        own = f"{self.result['method']}/seed-{self.result['seed']}" if self.is_comparison else ""
        return RunFolder(self.folder.path / own)

    @property
    def networks(self) -> tuple[str, ...]:
        """Those whose weights are there."""
        return tuple(
            name
            for name, file in WEIGHTS.items()
            if name in self.cards and (self.folder.path / file).is_file()
        )

    @property
    def device(self) -> torch.device:
        there = torch.cuda.is_available() and self.description["fields"].get("device") != "cpu"
        return torch.device("cuda" if there else "cpu")

    def name(self, asked: NetworkName) -> str:
        """Which network is meant; refused where the run has no such network."""
        if asked == "delivered":
            return str(self.result["delivered"])
        if asked not in self.networks:
            has = f"{self.folder.path} has no {WEIGHTS[asked]}"
            raise MetaplError(
                f"--network {asked}: {has}; expected one of its networks: "
                f"{', '.join(self.networks)}."
            )
        return asked

    def network(self, name: str, factory: str | None = None) -> nn.Module:
        """Build one of the run's networks with its weights.

        ``factory`` is FILE.py:FUNCTION for one of its own.
        """
        torch.set_num_threads(self.folder.threads())
        file = self.folder.path / WEIGHTS[name]
        weights = self.folder.read_weights(file.name, self.result["sha256"].get(file.name))
        network = self.cards[name].create(None if factory is None else function_in(factory))
        given, expected = (
            {key: tuple(value.shape) for key, value in tensors.items()}
            for tensors in (weights, network.state_dict())
        )
        if differing := sorted({name for name, _ in given.items() ^ expected.items()}):
            raise MetaplError(
                f"{file} does not fit its network: {few(differing)} differ in name or shape."
            )
        network.load_state_dict(weights)
        return network

    def heading(self, name: str) -> str:
        which = (
            f", delivered by {self.result['delivered_by']}"
            if name == self.result["delivered"]
            else ""
        )
        return (
            f"{self.folder.path}: {self.title}, {self.cards[name].title} ({WEIGHTS[name]}{which})"
        )


def card_of(description: Mapping[str, Any]) -> NetworkCard:
    """Return the card that ``dataclasses.asdict`` and JSON have made plain.

    Raises: TypeError, KeyError or MetaplError for what is no such card.
    """
    fields: dict[str, Any] = {}
    for name, value in description.items():
        # JSON has no tuples.
        fields[name] = tuple(value) if isinstance(value, list) else value
    if description["architecture"] is not None:
        fields["architecture"] = Architecture(**description["architecture"])
    fields["input"] = Input(**description["input"])
    return NetworkCard(**fields)


def function_in(place: str) -> Callable[..., nn.Module]:
    """Return the function that FILE.py:FUNCTION names; the file is run."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        raise MetaplError(
            f"--factory {place}: there is no file {file or place}; expected FILE.py:FUNCTION."
        )
    if (function := runpy.run_path(file).get(name)) is None:
        raise MetaplError(f"--factory {place}: {file} has no function {name!r}.")
    found: Callable[..., nn.Module] = function
    return found


def save(
    path: Path,
    network: nn.Module,
    card: NetworkCard,
    *,
    classes: Sequence[str],
    name: str,
    config: Mapping[str, Any],
    evaluation: Evaluation | None = None,
) -> None:
    """Leave a trained network as a run that the commands read, such as ``metapl predict``.

    So do ``evaluate``, ``label``, ``export`` and ``runs``.

    Args:
        path: the folder; made if need be, and refused where it holds anything.
        network: from (B, C, H, W) as the card's input says to logits (B, K), built as the card
            says: by :func:`metapl.apps.networks.create`, then
            :func:`metapl.apps.tuned_networks.Normalized`, say; or any other.
        classes: names of the K outputs.
        name: what trained it, such as the name of the script.
        config: with what settings, as plain values: ``seed`` and ``steps`` among them; and
            ``labeled``, ``unlabeled`` and ``test``, the folders of its pictures, where there are
            any.
        evaluation: what it reached on test examples; see :func:`metapl.metrics.evaluate_logits`.
    """
    folder = RunFolder(path)
    fields = {"seed": 0, "steps": 0, **config}
    about = {"name": name, "method": name, "fields": fields}
    with folder.claimed(about, resume=False):
        folder.write_json("data.json", {"hash": {}})
        result: dict[str, Any] = {
            "recipe": name,
            "method": name,
            "title": name,
            "networks": {"student": card.title},
            "seed": fields["seed"],
            "steps": fields["steps"],
            "best_step": fields["steps"],
            "validation_size": 0,
            "delivered": "student",
            "delivered_by": "rule",
            "sha256": seal(
                folder, name, classes, {"student": card}, {"student": network.state_dict()}
            ),
        }
        if evaluation is not None:
            reached = {
                "test_accuracy": evaluation.accuracy,
                "student_test_accuracy": evaluation.accuracy,
            }
            result |= {"evaluation": evaluation.to_json(), **reached}
        folder.write_json("result.json", result)
