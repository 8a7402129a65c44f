"""A run that has ended, from its folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from metapl.apps.experiments.folder import WEIGHTS, RunFolder, weights_file
from metapl.apps.experiments.store import stored, stored_result
from metapl.apps.recipes import ImageRecipe, Recipe
from metapl.apps.recipes.base import Role
from metapl.apps.recipes.methods import titled
from metapl.apps.recipes.settings import SelfTraining
from metapl.errors import MetaplError

NetworkName = Literal["delivered", "student", "finetuned", "teacher"]
"""One of a run's networks, or the one that it delivers."""


@dataclass(frozen=True)
class LoadedRun:
    """A run, or a comparison and the run whose networks it delivers.

    Args:
        folder: its files.
        recipe: what was run; of a comparison, with the seed of the run that it delivers.
        description: what ``recipe.json`` holds.
        result: what ``result.json`` holds.
    """

    folder: RunFolder
    recipe: Recipe
    description: dict[str, Any]
    result: dict[str, Any]

    @property
    def is_comparison(self) -> bool:
        """Whether several methods were run here."""
        return "compare" in self.description

    @property
    def device(self) -> torch.device:
        """Where the run was trained; the CPU, which every machine has, where that device is not here."""
        try:
            return self.recipe.torch_device()
        except MetaplError:
            return torch.device("cpu")

    @property
    def title(self) -> str:
        """The run in words."""
        return f"{self.folder.path}: {self.recipe.name}, {self.result['method']}, seed {self.result['seed']}"

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the networks that it has."""
        return tuple(name for name in WEIGHTS if (self.folder.path / weights_file(name)).is_file())

    def name(self, asked: NetworkName) -> str:
        """Which network is meant.

        Raises:
            MetaplError: the run has no such network.
        """
        delivered: str = self.result["delivered"]
        if asked == "delivered":
            return delivered
        if asked not in self.networks:
            raise MetaplError(
                f"--network {asked}: {self.folder.path} has no {weights_file(asked)}; expected one of its networks: "
                f"{', '.join(self.networks)}."
            )
        if self.finetuned_larger and asked != delivered and "finetuned" in (asked, delivered):
            raise MetaplError(
                f"--network {asked}: it takes pictures of another size than the network that {self.folder.path} "
                f"delivers; expected --network {delivered}, or none."
            )
        return asked

    @property
    def rounds(self) -> SelfTraining | None:
        """The rounds of a run of Noisy Student."""
        settings = self.recipe.method.selection
        return settings if isinstance(settings, SelfTraining) else None

    @property
    def finetuned_larger(self) -> bool:
        """Whether its last student was finetuned on larger pictures."""
        return self.rounds is not None and self.rounds.finetune_size is not None

    def network(self, name: str) -> nn.Module:
        """One of the run's networks, with its weights.

        Args:
            name: student, finetuned or teacher.

        Raises:
            MetaplError: the weights are missing, damaged, or of another network.
        """
        torch.set_num_threads(getattr(self.recipe, "threads", self.folder.threads()))
        role: Role = "teacher" if name == "teacher" else self.recipe.method.built_as
        recipe, file = self.recipe, weights_file(name)
        if self.rounds is not None and name == "teacher":  # of another network than its student, perhaps
            recipe = stored(self.folder)[0].by(self.result["method"])
            named = self.rounds.network(len(self.result["rounds"]) - 1)
            recipe = recipe if named is None else recipe.with_network(named)
        if isinstance(recipe, ImageRecipe):  # what it was started from need not be there any more
            recipe = dataclasses.replace(recipe, weights=None)
        weights, network = self.folder.read_weights(file, self.result.get("sha256", {}).get(file)), recipe.network(role)
        given, expected = (
            {key: tuple(value.shape) for key, value in tensors.items()} for tensors in (weights, network.state_dict())
        )
        for key in sorted(given.keys() | expected.keys()):
            if given.get(key) != expected.get(key):
                raise MetaplError(
                    f"{self.folder.path / file} does not fit the network of recipe.json: {key} is "
                    f"{given.get(key, 'missing')} in the file and {expected.get(key, 'missing')} in the network."
                )
        network.load_state_dict(weights)
        return network

    def titled(self, name: str) -> str:
        """One of its networks in words."""
        return titled(self.result["method"], name)

    def heading(self, name: str) -> str:
        """The run and one of its networks in words."""
        which = f", delivered by {self.result['delivered_by']}" if name == self.result["delivered"] else ""
        return f"{self.title}, {self.titled(name)} ({weights_file(name)}{which})"


def load_run(path: Path) -> LoadedRun:
    """The run in a folder.

    Raises:
        MetaplError: there is no run, or it is not finished, of another version, or damaged.
    """
    if not path.is_dir():
        expected = "that metapl train wrote, such as runs/digits-001"
        missing = f"there is no folder {path}; expected one {expected}."
        raise MetaplError(f"{path} is a file; expected the folder of a run." if path.exists() else missing)
    folder = RunFolder(path)
    if not folder.exists:
        raise MetaplError(f"{path} is not a run folder: there is no recipe.json in it.")
    recipe, description = stored(folder)
    if not (path / "result.json").is_file():
        raise MetaplError(
            f"the run in {path} is not finished; go on with it by the command that started it, with --out {path} "
            "--resume."
        )
    result = stored_result(folder)
    run = LoadedRun(folder, recipe.compared(result["method"], result["seed"]), description, result)
    settings = run.rounds
    if settings is None:
        return run
    if (told := len(result.get("rounds", ()))) != settings.rounds:
        raise MetaplError(
            f"{path / 'result.json'} is damaged: it tells of {told} rounds, and recipe.json of {settings.rounds}."
        )
    last = settings.network(settings.rounds)
    own = run.recipe if last is None else run.recipe.with_network(last)
    if result["delivered"] == "finetuned" and settings.finetune_size is not None:
        own = own.at_size(settings.finetune_size)
    return dataclasses.replace(run, recipe=own)
