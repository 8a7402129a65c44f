"""A folder with trained networks: ``network.json`` says what they are, and ``result.json`` what they reached.

Whoever leaves these two beside the weights leaves a run that ``metapl predict``, ``label`` and ``export`` read:
:func:`save` does, for a script of one's own. Nothing in the folder is code, and nothing of it is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metapl.apps.experiments.folder import (
    NETWORK,
    WEIGHTS,
    NetworkName,
    RunFolder,
    begun,
    describe_networks,
    described,
    stored_result,
)
from metapl.apps.machine.misfit import from_dict
from metapl.apps.pictures.card import NetworkCard
from metapl.errors import MetaplError
from metapl.metrics import Evaluation


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended, read from its folder alone; of a comparison, the run whose networks it delivers."""

    folder: RunFolder
    title: str
    classes: tuple[str, ...]
    cards: Mapping[str, NetworkCard]  # by the names of networks: student, teacher, finetuned
    description: Mapping[str, Any]  # what recipe.json says of how it was made
    result: Mapping[str, Any]  # what result.json holds

    @classmethod
    def load(cls, path: Path) -> EndedRun:
        """The run in a folder, where it is finished, whole and of this version."""
        folder = begun(path)
        if not folder.ended:
            command = folder.description().get("command", f"the command that started it, with --out {path}")
            more = "" if "--resume" in command.split() else " --resume"
            raise MetaplError(f"the run in {path} is not finished; go on with it by {command}{more}")
        file = path / NETWORK
        description = described(folder)
        said = folder.read_json(NETWORK, {"title": str, "classes": list[str], "networks": dict[str, Any]}, TOLD)
        try:
            cards = {name: from_dict(NetworkCard, card) for name, card in said["networks"].items()}
        except (MetaplError, TypeError) as error:  # TypeError: a field without a default is missing
            raise MetaplError(f"{file} is damaged or of another version: {error}") from error
        if unknown := cards.keys() - WEIGHTS.keys():
            raise MetaplError(f"{file} describes {', '.join(sorted(unknown))}; expected some of {', '.join(WEIGHTS)}.")
        return cls(folder, said["title"], tuple(said["classes"]), cards, description, stored_result(folder))

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
            name for name, file in WEIGHTS.items() if name in self.cards and (self.folder.path / file).is_file()
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
            raise MetaplError(f"--network {asked}: {has}; expected one of its networks: {', '.join(self.networks)}.")
        return asked

    def network(self, name: str, factory: str | None = None) -> nn.Module:
        """One of the run's networks with its weights; ``factory`` is FILE.py:FUNCTION for one of its own."""
        # Rounding depends on their number, so it is that of the training.
        torch.set_num_threads(self.description["fields"].get("threads") or self.folder.threads())
        file = self.folder.path / WEIGHTS[name]
        weights = self.folder.read_weights(file.name, self.result.get("sha256", {}).get(file.name))
        network = self.cards[name].create(None if factory is None else function_in(factory))
        given, expected = (
            {key: tuple(value.shape) for key, value in tensors.items()} for tensors in (weights, network.state_dict())
        )
        for key in sorted(given.keys() | expected.keys()):
            if given.get(key) != expected.get(key):
                raise MetaplError(
                    f"{file} does not fit its network: {key} is {given.get(key, 'missing')} in the file and "
                    f"{expected.get(key, 'missing')} in the network."
                )
        network.load_state_dict(weights)
        return network

    def heading(self, name: str) -> str:
        which = f", delivered by {self.result['delivered_by']}" if name == self.result["delivered"] else ""
        return f"{self.folder.path}: {self.title}, {self.cards[name].title} ({WEIGHTS[name]}{which})"


TOLD = ("title", "classes", "networks")


def function_in(place: str) -> Callable[..., nn.Module]:
    """The function that FILE.py:FUNCTION names; its file is run."""
    file, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise MetaplError(f"--factory {place}: there is no file {file or place}; expected FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., nn.Module] | None = getattr(module, name, None)
    if function is None:
        raise MetaplError(f"--factory {place}: {file} has no function {name!r}.")
    return function


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
    """Leave a trained network as a run that ``metapl predict``, ``evaluate``, ``label``, ``export`` and ``runs`` read.

    Args:
        path: the folder; made if need be, and refused where it holds anything.
        network: from (B, C, H, W) as the card's input says to logits (B, K), built as the card says: by
            :func:`metapl.apps.networks.create`, then :func:`metapl.apps.networks.normalized`, say; or any other.
        classes: names of the K outputs.
        name: what trained it, such as the name of the script.
        config: with what settings, as plain values: ``seed`` and ``steps`` among them; and ``labeled``, ``unlabeled``
            and ``test``, the folders of its pictures, where there are any.
        evaluation: what it reached on test examples; see :func:`metapl.metrics.evaluate_logits`.
    """
    folder = RunFolder(path)
    fields = {"seed": 0, "steps": 0, **config}
    about = {"name": name, "method": name, "fields": fields}
    with folder.claimed(about, resume=False):
        describe_networks(folder, name, classes, {"student": card})
        sha256 = {WEIGHTS["student"]: folder.write_weights(WEIGHTS["student"], network.state_dict())}
        result: dict[str, Any] = {
            "recipe": name,
            "method": name,
            "seed": fields["seed"],
            "steps": fields["steps"],
            "best_step": fields["steps"],
            "validation_size": 0,
            "delivered": "student",
            "delivered_by": "rule",
            "sha256": sha256,
        }
        if evaluation is not None:
            reached = {"test_accuracy": evaluation.accuracy, "student_test_accuracy": evaluation.accuracy}
            result |= {"evaluation": evaluation.to_json(), **reached}
        folder.write_json("data.json", {"hash": {}})
        folder.write_json("result.json", result)
