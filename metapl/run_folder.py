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
labels/, rounds/      stored labels, of reduced_mpl and of Noisy Student
network.json          what the networks are, and how a file becomes their input
failure.json          why it ended before its end, until it goes on
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few, reason_of
from metapl.machine import default_threads, environment
from metapl.metrics import Evaluation, interval
from metapl.networks.card import NetworkCard, card_of
from metapl.runs.files import (
    StrPath,
    json_sha256,
    owned,
    read_json,
    read_sealed,
    remove_temporary,
    sha256_of,
    write_whole,
)
from metapl.runs.folder import LOCK, Folder
from metapl.words import composed

# The layout of run folders that this version writes and reads.
FORMAT = 4

# Settings in which the parts of a run may differ, for they change nothing but speed; and those that
# say where the data lie, which may have moved: what they hold is compared by its hashes.
SPEED_ALONE = ("num_workers",)
PLACES = ("labeled", "unlabeled", "val", "test")

NETWORK = "network.json"
FAILURE = "failure.json"

# These files say what a run is, beside its result, which has their SHA-256.
HASHED = ("data.json", "metrics.jsonl")

WEIGHTS = {
    "student": "student.safetensors",
    "finetuned": "finetuned_student.safetensors",
    "teacher": "teacher.safetensors",
}
# What is compared: the network that a run delivers, the student, and the student finetuned.
DELIVERED_READOUT = "test_accuracy"
STUDENT_READOUT = "student_test_accuracy"
READOUTS = (DELIVERED_READOUT, STUDENT_READOUT, "finetuned_test_accuracy")

ANOTHER = "Put the file back from a copy, or train again with another --out."
_MEND = "what was there before is whole. Mend that (is the disk full?), then go on with --resume."

# The network that a run delivers, or one of those that it has kept.
NetworkName = Literal["delivered", "student", "finetuned", "teacher"]


class RunFolder(Folder):
    """The files of one run of a recipe."""

    # Files that are written before anything was trained.
    undone = ("recipe.json", LOCK, "data.json", "skipped.jsonl", FAILURE)

    # What starts the run, for the record.
    command: str | None = None

    _is_locked = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the folder, as :func:`owned`, until the block ends.

        Within the block this value may be locked again, which changes nothing.
        """
        if self._is_locked:
            yield
            return
        with owned(self.path, self.undone):
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    @property
    def exists(self) -> bool:
        """Return whether there is a run in the folder."""
        return os.path.lexists(self.path / "recipe.json")

    @property
    def ended(self) -> bool:
        """Return whether the run in the folder has ended."""
        return os.path.lexists(self.path / "result.json")

    @contextmanager
    def claimed(self, recipe: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Lock the folder for a run of this recipe, until the block ends.

        Args:
            recipe: of the run.
            resume: whether it is the run that is there, which is of the same recipe then. Else it
                is a new one.
        """
        with self.locked():
            self.check(resume)
            if self.exists:
                self.refuse_other_recipe(json.loads(json.dumps(dict(recipe))))
                remove_temporary(self.path)
                (self.path / FAILURE).unlink(missing_ok=True)
            else:
                content = {"format": FORMAT, "recipe": dict(recipe), "made_with": environment()}
                if self.command:
                    content["command"] = self.command
                self.write_json("recipe.json", content)
            try:
                yield
            except Exception as error:
                # A full disk, say, is no reason to lose the error.
                with suppress(MetaplError, OSError):
                    self.write_json(FAILURE, {"reason": reason_of(error)})
                raise

    @property
    def failure(self) -> str | None:
        """Return why the run in the folder ended before its end; None where that is not known."""
        if not (self.path / FAILURE).exists():
            return None
        return str(self.read_json(FAILURE).get("reason"))

    def refuse_other_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Refuse a recipe that is not that of the run in the folder.

        Folders of pictures may have moved, and what changes speed alone may differ.
        """
        stored_fields = fields_of(self.recipe())
        new_fields = fields_of(recipe)
        changes = []
        for name in sorted({*stored_fields, *new_fields}):
            stored = stored_fields.get(name)
            new = new_fields.get(name)
            has_moved = name in PLACES and isinstance(stored, str) and isinstance(new, str)
            if stored != new and not has_moved and name not in SPEED_ALONE:
                changes.append(f"{name} was {stored!r}, now {new!r}")
        if changes:
            other = f"a run of another recipe ({', '.join(changes[:4])})"
            raise MetaplError(f"{self.path} holds {other}; resume it as it was started.")

    def check(self, resume: bool) -> None:
        """Refuse a folder with a run that is not to be resumed, or with files of no run."""
        if self.exists and not resume:
            mend = "give --resume to go on with it, or another --out"
            raise MetaplError(f"{self.path} holds a run already; {mend}.")
        if not self.exists and self.path.is_dir():
            # Hidden files are a file manager's; the other kind is what a killed start left.
            negligible = re.compile(r"\..*|recipe\.json\.[0-9a-f]{8}\.tmp")
            names = sorted(os.listdir(self.path))
            others = [name for name in names if not negligible.fullmatch(name)]
            if others:
                held = f"files that are not a run's ({few(others)})"
                raise MetaplError(f"{self.path} holds {held}; give another --out.")

    def threads(self, usual: int | None = None) -> int:
        """Return the threads of the linear algebra, on whose number rounding depends.

        They are those that the run in the folder was started with; of a new run ``usual``, or None
        for one a core.
        """
        threads = None
        if self.exists:
            threads = self.description().get("made_with", {}).get("threads")
        return int(threads or usual or default_threads())

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
            writer = content.get("made_with", {}).get("metapl", "?")
            raise MetaplError(
                f"{self.path} was written in run format {content.get('format')!r} by metapl "
                f"{writer}; this metapl {version('metapl')} reads format {FORMAT}: train again."
            )
        return self.unsealed("recipe.json", content)

    def unsealed(self, name: str, content: dict[str, Any]) -> dict[str, Any]:
        """Return what a file holds without its own SHA-256; refuse it where that is another."""
        noted = content.get("sha256")
        if not isinstance(noted, dict) or noted.pop(name, None) != json_sha256(content):
            reason = "is damaged or was edited: its SHA-256 is not the one that was noted"
            raise MetaplError(f"{self.path / name} {reason}. {ANOTHER}")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in one of the folder's JSON files."""
        return read_json(self.path / name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one of the folder's JSON files; the recipe and the result have their SHA-256."""
        if name in ("recipe.json", "result.json"):
            plain = json.loads(json.dumps({"sha256": {}, **content}))
            content = {**plain, "sha256": {**plain["sha256"], name: json_sha256(plain)}}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_whole(self.path / name, text.encode(), _MEND)

    def write_weights(self, name: str, state: Mapping[str, Tensor]) -> str:
        """Write weights as safetensors, the same ones as the same bytes; return their SHA-256."""
        from safetensors.torch import save

        plain = {}
        for key, tensor in sorted(state.items()):
            plain[key] = tensor.detach().cpu().contiguous().clone()
        content = save(plain)
        write_whole(self.path / name, content, _MEND)
        return hashlib.sha256(content).hexdigest()

    def read_weights(self, name: str, sha256: str | None) -> dict[str, Tensor]:
        """Return the weights in a safetensors file of the folder; refuse another SHA-256."""
        from safetensors.torch import load

        file = self.path / name
        if not file.is_file():
            others = [network for network in WEIGHTS if (self.path / WEIGHTS[network]).is_file()]
            expected = f"it, or --network with what is left: {', '.join(others)}"
            raise MetaplError(f"{file} is missing; expected {expected}.")
        weights: dict[str, Tensor] = load(read_sealed(file, sha256, mend=ANOTHER))
        return weights


def stored_result(folder: RunFolder) -> dict[str, Any]:
    """Return what ``result.json`` holds; refuse one that is damaged or of another recipe."""
    result = folder.read_json("result.json")
    recipe = folder.recipe()
    result = folder.unsealed("result.json", result)
    # Both files have the same name in every folder, so one may have been put beside another.
    is_same_method = result.get("method") == recipe.get("method")
    is_same = is_same_method and result.get("seed") == recipe.get("fields", {}).get("seed")
    if not is_same:
        reason = "is damaged or of another run: its method or seed is not that of recipe.json"
        raise MetaplError(f"{folder.path / 'result.json'} {reason}.")
    return result


def fields_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a recipe says, its fields beside the rest."""
    fields: dict[str, Any] = recipe.get("fields", {})
    content = {name: value for name, value in recipe.items() if name != "fields"}
    return content | fields


def guessing(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracies of a run's networks that are not shown to be better than guessing.

    They are those on the test examples or, without these, on the validation examples, by the names
    of the networks. Guessing lies in their 95 % interval, or above it.
    """
    part = "validation"
    n = result["validation_size"]
    chance = result.get("validation_chance")
    if "evaluation" in result:
        tested = Evaluation(**result["evaluation"])
        part = "test"
        n = tested.n
        chance = tested.chance
    guesses: dict[str, float] = {}
    if chance is None:
        return guesses
    for name in result["networks"]:
        accuracy = result.get(f"{name}_{part}_accuracy")
        if accuracy is None:
            continue
        low, _ = interval(round(accuracy * n), n)
        if low <= chance:
            guesses[name] = accuracy
    return guesses


def seal(
    folder: RunFolder,
    title: str,
    classes: Sequence[str],
    cards: Mapping[str, NetworkCard],
    weights: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, str]:
    """Write ``network.json`` and the weights.

    Args:
        folder: of the run, which the caller has locked.
        title: what the run is called.
        classes: the names of the classes.
        cards: what the networks are, by their names.
        weights: of the networks, by their names.

    Returns: the SHA-256 of the files, and of those of :data:`HASHED`, by their names.
    """
    networks = {name: dataclasses.asdict(card) for name, card in cards.items()}
    folder.write_json(NETWORK, {"title": title, "classes": list(classes), "networks": networks})
    digests: dict[str, str] = {}
    for name, state in weights.items():
        file = WEIGHTS[name]
        digests[file] = folder.write_weights(file, state)
    for file in (NETWORK, *HASHED):
        if (folder.path / file).is_file():
            digests[file] = sha256_of(folder.path / file)
    return digests


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


def data_in_words(data: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, str]:
    """Return how many examples each part of the data of :func:`stored_data` has, and its hash.

    Args:
        fields: of the recipe. Without others the unlabeled pictures are the labeled ones, and are
            left out.
    """
    parts = ["labeled", "unlabeled", "validation", "test"]
    if "unlabeled" in fields and fields["unlabeled"] == fields["labeled"]:
        parts.remove("unlabeled")
    words: dict[str, str] = {}
    for part in parts:
        if part in data:
            # It has the names of the examples, or their number.
            names = data[part]
            count = len(names) if isinstance(names, list) else names
            words[part] = f"{count:,} examples"
    for part, digest in data.get("hash", {}).items():
        if part != "unlabeled" or part in parts:
            words[f"SHA-256 of {part}"] = digest
    return words


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended, read from its folder alone.

    Args:
        folder: of the run.
        title: what it is called.
        classes: the names of the classes.
        cards: what its networks are, by their names: student, teacher and finetuned.
        description: what recipe.json says of how it was made.
        result: what result.json holds.
    """

    folder: RunFolder
    title: str
    classes: tuple[str, ...]
    cards: Mapping[str, NetworkCard]
    description: Mapping[str, Any]
    result: Mapping[str, Any]

    @classmethod
    def load(cls, path: StrPath) -> EndedRun:
        """Read the run in a folder; refuse one that is not finished, whole and of this version."""
        path = Path(path)
        folder = RunFolder(path)
        if not path.is_dir() or not folder.exists:
            state = "there is no recipe.json in it" if path.is_dir() else "there is no such folder"
            # A comparison has its runs in folders METHOD/seed-N.
            runs_within = sorted(path.glob("*/seed-*"))
            example = runs_within[0] if runs_within else "runs/digits-001"
            raise MetaplError(f"{path}: {state}; expected the folder of a run, such as {example}.")
        if not folder.ended:
            command = folder.description().get(
                "command", f"the command that started it, with --out {path}"
            )
            if "--resume" not in command.split():
                command += " --resume"
            raise MetaplError(f"the run in {path} is not finished; go on with it by {command}")
        description = folder.recipe()
        result = stored_result(folder)
        file = path / NETWORK
        refuse_changed(file, result)
        about = folder.read_json(NETWORK)
        cards: dict[str, NetworkCard] = {}
        try:
            for name, card in about["networks"].items():
                cards[name] = card_of(card)
        except (MetaplError, TypeError, KeyError) as error:
            # It lacks a field, or has others.
            raise MetaplError(f"{file} is of another version: {error}") from error
        return cls(
            folder=folder,
            title=about["title"],
            classes=tuple(map(composed, about["classes"])),
            cards=cards,
            description=description,
            result=result,
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """Return the names of the networks whose weights are there."""
        names = []
        for name, file in WEIGHTS.items():
            if name in self.cards and (self.folder.path / file).is_file():
                names.append(name)
        return tuple(names)

    @property
    def device(self) -> torch.device:
        """Return the GPU, unless there is none or the run was asked to do without."""
        on_cpu = self.description["fields"].get("device") == "cpu"
        has_gpu = torch.cuda.is_available()
        return torch.device("cuda" if has_gpu and not on_cpu else "cpu")

    def name(self, asked: NetworkName) -> str:
        """Return the name of the network that is meant; refuse one that the run does not have."""
        if asked == "delivered":
            return str(self.result["delivered"])
        if asked not in self.networks:
            lacks = f"--network {asked}: {self.folder.path} has no {WEIGHTS[asked]}"
            raise MetaplError(f"{lacks}; expected one of its networks: {', '.join(self.networks)}.")
        return asked

    def network(self, name: str, factory: str | None = None) -> nn.Module:
        """Build one of the run's networks with its weights.

        Args:
            name: of the network.
            factory: FILE.py:FUNCTION, which builds a network that metapl does not know; or None.
        """
        torch.set_num_threads(self.folder.threads())
        file = self.folder.path / WEIGHTS[name]
        weights = self.folder.read_weights(file.name, self.result["sha256"].get(file.name))
        build = None if factory is None else function_in(factory)
        network = self.cards[name].create(build)
        expected = network.state_dict()
        differing = []
        for key in sorted({*weights, *expected}):
            is_in_both = key in weights and key in expected
            if not is_in_both or weights[key].shape != expected[key].shape:
                differing.append(key)
        if differing:
            differ = f"{few(differing)} differ in name or shape"
            raise MetaplError(f"{file} does not fit its network: {differ}.")
        network.load_state_dict(weights)
        return network

    def heading(self, name: str) -> str:
        """Return a line on the run and one of its networks."""
        file = WEIGHTS[name]
        if name == self.result["delivered"]:
            file += f", delivered by {self.result['delivered_by']}"
        return f"{self.folder.path}: {self.title}, {self.cards[name].title} ({file})"


def function_in(place: str) -> Callable[..., nn.Module]:
    """Return the function that FILE.py:FUNCTION names; the file is run."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        missing = f"there is no file {file or place}"
        raise MetaplError(f"--factory {place}: {missing}; expected FILE.py:FUNCTION.")
    function: Callable[..., nn.Module] | None = runpy.run_path(file).get(name)
    if function is None:
        raise MetaplError(f"--factory {place}: {file} has no function {name!r}.")
    return function


def save(
    path: StrPath,
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
            says: by :func:`metapl.networks.create`, then
            :class:`metapl.networks.Normalized`, say; or any other.
        classes: names of the K outputs.
        name: what trained it, such as the name of the script.
        config: with what settings, as plain values: ``seed`` and ``steps`` among them; and
            ``labeled``, ``unlabeled`` and ``test``, the folders of its pictures, where there are
            any.
        evaluation: what it reached on test examples; see :func:`metapl.metrics.evaluate_logits`.
    """
    folder = RunFolder(Path(path))
    fields = {"seed": 0, "steps": 0, **config}
    about = {"name": name, "method": name, "fields": fields}
    with folder.claimed(about, resume=False):
        folder.write_json("data.json", {"hash": {}})
        cards = {"student": card}
        digests = seal(folder, name, classes, cards, {"student": network.state_dict()})
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
            "sha256": digests,
        }
        if evaluation is not None:
            result["evaluation"] = evaluation.to_json()
            result["test_accuracy"] = evaluation.accuracy
            result[STUDENT_READOUT] = evaluation.accuracy
        folder.write_json("result.json", result)
