"""A run that has ended, from its folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from metapl.apps.experiments.folder import WEIGHTS, RunFolder, weights_file
from metapl.apps.experiments.methods import compared
from metapl.apps.experiments.store import stored, stored_result
from metapl.apps.recipes import ImageRecipe, Recipe
from metapl.apps.recipes.base import Role
from metapl.apps.recipes.methods import titled
from metapl.apps.recipes.self_training import SelfTraining
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
        if asked == "delivered":
            delivered: str = self.result["delivered"]
            return delivered
        if asked not in self.networks:
            raise MetaplError(
                f"--network {asked}: {self.folder.path} has no {weights_file(asked)}; expected one of its networks: "
                f"{', '.join(self.networks)}."
            )
        other = "finetuned" in (asked, self.result["delivered"]) and asked != self.result["delivered"]
        if other and self.finetuned_larger:
            raise MetaplError(
                f"--network {asked}: it takes pictures of another size than the network that {self.folder.path} "
                f"delivers; expected --network {self.result['delivered']}, or none."
            )
        return asked

    @property
    def finetuned_larger(self) -> bool:
        """Whether its last student was finetuned on larger pictures."""
        method = self.recipe.method
        return method.is_noisy_student and self.settings.finetune_size is not None

    @property
    def settings(self) -> SelfTraining:
        """The rounds of a run of Noisy Student."""
        settings = self.recipe.method.selection
        assert isinstance(settings, SelfTraining)
        return settings

    def network(self, name: str) -> nn.Module:
        """One of the run's networks, with its weights.

        Args:
            name: student, finetuned or teacher.

        Raises:
            MetaplError: the weights are missing, damaged, or of another network.
        """
        torch.set_num_threads(getattr(self.recipe, "threads", self.folder.threads()))
        role: Role = "teacher" if name == "teacher" else self.recipe.method.built_as
        # What it was started from need not be there any more.
        fresh = self.recipe_of(name)
        if isinstance(fresh, ImageRecipe):
            fresh = dataclasses.replace(fresh, weights=None)
        file = weights_file(name)
        weights, network = self.folder.read_weights(file, self.result.get("sha256", {}).get(file)), fresh.network(role)
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        for key in sorted(shapes.keys() | expected.keys()):
            if shapes.get(key) != expected.get(key):
                raise MetaplError(
                    f"{self.folder.path / file} does not fit the network of recipe.json: {key} is "
                    f"{shapes.get(key, 'missing')} in the file and {expected.get(key, 'missing')} in the network."
                )
        network.load_state_dict(weights)
        return network

    def recipe_of(self, name: str) -> Recipe:
        """The recipe with the architecture of one of its networks, which Noisy Student can change between rounds."""
        if not self.recipe.method.is_noisy_student or name != "teacher":
            return self.recipe
        sized: Recipe = stored(self.folder)[0].by(self.result["method"])
        named = self.settings.network(len(self.result["rounds"]) - 1)
        return sized if named is None else sized.with_network(named)

    def titled(self, name: str) -> str:
        """One of its networks in words."""
        return titled(self.result["method"], name)

    def heading(self, name: str) -> str:
        """The run and one of its networks in words."""
        by = {"validation": "by validation", "rule": "by rule"}[self.result["delivered_by"]]
        which = f", delivered {by}" if name == self.result["delivered"] else ""
        return f"{self.title}, {self.titled(name)} ({weights_file(name)}{which})"


def load_run(path: Path) -> LoadedRun:
    """The run in a folder.

    Raises:
        MetaplError: there is no run, or it is not finished, of another version, or damaged.
    """
    if not path.is_dir():
        raise MetaplError(f"{path} is a file; expected the folder of a run." if path.exists() else _missing(path))
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
    run = LoadedRun(folder, compared(recipe, result["method"], result["seed"]), description, result)
    if run.recipe.method.is_noisy_student:
        rounds, told = run.settings.rounds, len(result.get("rounds", ()))
        if told != rounds:
            raise MetaplError(
                f"{path / 'result.json'} is damaged: it tells of {told} rounds, and recipe.json of {rounds}."
            )
        last = run.settings.network(rounds)
        own = run.recipe if last is None else run.recipe.with_network(last)
        if result["delivered"] == "finetuned" and run.finetuned_larger:
            own = own.at_size(run.settings.finetune_size or 0)
        run = dataclasses.replace(run, recipe=own)
    return run


def _missing(path: Path) -> str:
    return f"there is no folder {path}; expected one that metapl train wrote, such as runs/digits-001."
