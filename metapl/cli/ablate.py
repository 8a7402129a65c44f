"""``metapl ablate RECIPE``: which mode for this model?"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from metapl.ablation import Ablation, ModeCost, ablate
from metapl.cli.parse import paragraph
from metapl.errors import MetaplError
from metapl.experiments.methods import bilevel_trainer
from metapl.experiments.settle import settled
from metapl.feedback import MODES
from metapl.recipes import PROTOCOL_RECIPES, Digits, ImageFolders
from metapl.report.ablation import draw_ablation
from metapl.runs.atomic import replacing
from metapl.training.trainer import BilevelTrainer
from metapl.words import tell

MOST_TIMES = 10_000
"""Draws, and rounds."""

OUT_HELP = "folder for ablation.json and ablation.png; by default neither is written."
MODES_HELP = f"these modes alone, of {', '.join(MODES)}."


@dataclass(frozen=True, kw_only=True)
class Looking(ABC):
    """The options of every ablation.

    Args:
        draws: of labels, for modes that draw them.
        rounds: in which each mode is timed once.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help=OUT_HELP, help_behavior_hint="")] = None
    modes: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="MODE ...", help=MODES_HELP, help_behavior_hint="")
    ] = None
    draws: int = 8
    rounds: int = 3

    def __call__(self) -> int:
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise MetaplError(f"--out {self.out} is a file; expected a folder, which is made if it is not there.")
        for name in ("draws", "rounds"):
            if not 1 <= getattr(self, name) <= MOST_TIMES:
                raise MetaplError(f"--{name} {getattr(self, name)}: expected 1 to {MOST_TIMES:,}.")
        trainer, labeled, unlabeled, steps = self.subject()
        found = ablate(trainer, labeled, unlabeled, self.modes, steps=steps, draws=self.draws, rounds=self.rounds)
        where = f"steps {', '.join(map(str, found.points))}" if len(found.points) > 1 else "the start"
        tell(f"gradients at {where} of the training, costs at the last of them\n")
        tell(found.table())
        tell()
        tell(paragraph(found.recommendation))
        if self.out is not None:
            self._write(self.out, found)
        return 0

    @abstractmethod
    def subject(self) -> tuple[BilevelTrainer, Any, Any, int]:
        """The trainer, its sources of batches, and the steps of training that are looked at."""

    def _write(self, out: Path, found: Ablation) -> None:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "ablation.json") as file:
            file.write(found.to_json().encode())
        ran = {name: dataclasses.asdict(mode) for name, mode in found.modes.items() if isinstance(mode, ModeCost)}
        if ran:
            draw_ablation(out / "ablation.png", ran, found.recommendation)
        tell(f"\nthe figures are in {out}")


@dataclass(frozen=True, kw_only=True)
class Ablate(Looking):
    """Compare the modes on a recipe's networks and data: gradients beside the exact one, and what each costs.

    It looks at the beginning, in the middle and at the end of a training of --steps steps.

    Args:
        recipe: whose networks, data and optimizers are used.
    """

    recipe: Annotated[Digits, tyro.conf.arg(name="")] = field(default_factory=Digits)

    def subject(self) -> tuple[BilevelTrainer, Any, Any, int]:
        """By the recipe, Meta Pseudo Labels."""
        recipe: Any = self.recipe
        recipe = settled(recipe, None, print) if isinstance(recipe, ImageFolders) else recipe.settled()
        torch.manual_seed(recipe.seed)
        task, device = recipe.task(print, True), recipe.torch_device()
        teacher, student = (recipe.network(role).to(device) for role in ("teacher", "student"))
        return bilevel_trainer(recipe, teacher, student), task.labeled, task.unlabeled, recipe.steps


@dataclass(frozen=True, kw_only=True)
class AblateFactory(Looking):
    """Compare the modes on networks of your own.

    Args:
        factory: module:function of a module in this folder or installed; the function takes nothing and returns a
            metapl.BilevelTrainer, a source of labelled and one of unlabelled batches.
        steps: of the training that is looked at, at its beginning, in its middle and at its end.
    """

    factory: Annotated[str, tyro.conf.arg(metavar="MODULE:FUNCTION", help_behavior_hint="")]
    steps: int = 0

    def subject(self) -> tuple[BilevelTrainer, Any, Any, int]:
        """By the function."""
        made = _call(self.factory)
        if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], BilevelTrainer):
            raise MetaplError(
                f"--factory {self.factory} returned {type(made).__name__}; expected (trainer, labeled, unlabeled), the "
                "trainer a metapl.BilevelTrainer, the others batches or sources of batches as for its fit."
            )
        return *made, self.steps


def _call(name: str) -> Any:
    """What module:function returns; the module may lie in the current folder."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise MetaplError(f"--factory {name}: expected module:function, such as my_networks:build.")
    with _current_folder_first():
        try:
            imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise MetaplError(
                f"--factory {name}: {error}; expected a module in this folder, or an installed one."
            ) from error
    build = getattr(imported, function, None)
    if not callable(build):
        raise MetaplError(f"--factory {name}: the module {module} has no function {function}.")
    return build()


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _ablate_on(kind: Any) -> type[Ablate]:
    fields = [("recipe", Annotated[kind, tyro.conf.arg(name="")])]
    command = dataclasses.make_dataclass(f"Ablate{kind.__name__}", fields, bases=(Ablate,), frozen=True, kw_only=True)
    command.__doc__ = Ablate.__doc__
    return command


COMMANDS: dict[str, type[Ablate]] = {
    Digits.name: Ablate,
    ImageFolders.name: _ablate_on(ImageFolders),
    **{kind.name: _ablate_on(kind) for kind in PROTOCOL_RECIPES},
}
"""The recipes whose networks can be looked at, by name."""
