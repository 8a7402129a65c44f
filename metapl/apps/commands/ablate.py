"""``metapl ablate RECIPE``: which mode for this model?"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from metapl.ablation import ablate
from metapl.apps.commands.factory import made_by
from metapl.apps.commands.folders import held, written_to
from metapl.apps.commands.parse import Switch, of_other_views, on_recipe, paragraph, recipe_of
from metapl.apps.experiments.accuracies import parse_seeds
from metapl.apps.experiments.settle import settled
from metapl.apps.recipes import PROTOCOL_RECIPES, Digits, ImageFolders
from metapl.apps.recipes.base import Recipe, Unasked
from metapl.apps.recipes.methods.beside import bilevel_trainer
from metapl.apps.reports.ablation import draw_ablation
from metapl.errors import MetaplError
from metapl.feedback import MODES, estimator
from metapl.runs.atomic import written_last
from metapl.training.trainer import BilevelTrainer
from metapl.words import tell

MOST_TIMES = 10_000
"""Draws, and rounds."""

MOST_TRAINING_STEPS = 10**9

ASKED = ("modes", "draws", "rounds", "altered", "stability", "train_steps")
"""Options of :func:`metapl.ablate` that are flags by the same name."""

OUT_HELP = "folder for ablation.json and ablation.png; by default neither is written."
MODES_HELP = f"these modes alone, of {', '.join(MODES)}."
ROUNDS_HELP = "in which each mode is timed once; by default 5, more for short calls."


@dataclass(frozen=True, kw_only=True)
class Looking(ABC):
    """The options of every ablation.

    Args:
        draws: of labels, for modes that draw them, and of alterations.
        altered: also measure a mode's feedback altered, as a control: permuted, its mean, with random signs.
        stability: also measure the modes over a few step sizes, temperatures and batch sizes.
        train_steps: also train by each mode for so many steps, over --train-seeds; 0 does not.
        train_seeds: seeds of these short trainings, such as 0-4 or 0,3,5.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help=OUT_HELP, help_behavior_hint="")] = None
    modes: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="MODE ...", help=MODES_HELP, help_behavior_hint="")
    ] = None
    draws: int = 8
    rounds: Annotated[int | None, tyro.conf.arg(metavar="INT", help=ROUNDS_HELP, help_behavior_hint="")] = None
    altered: bool = True
    stability: Switch = False
    train_steps: int = 0
    train_seeds: Annotated[str | None, tyro.conf.arg(metavar="SEEDS", help_behavior_hint="(default: 0-4)")] = None

    def __call__(self) -> int:
        self._check()
        with held(self.out):
            return self._compare()

    def _compare(self) -> int:
        asked = {name: getattr(self, name) for name in ASKED}
        found = ablate(**self.subject(), **asked, train_seeds=self._seeds(), progress=True)
        where = f"steps {', '.join(map(str, found.points))}" if len(found.points) > 1 else "the start"
        last = ", costs at the last of them" if len(found.points) > 1 else ""
        tell(f"gradients at {where} of the training{last};")
        tell(f"error and noise are over the length of the exact gradient\n\n{found.table()}\n")
        tell(paragraph(found.recommendation))
        if self.out is not None:
            with written_to(self.out), written_last(self.out / "ablation.json", found.to_json().encode()):
                draw_ablation(self.out / "ablation.png", found.as_dict())
            tell(f"\nthe figures are in {self.out}")
        return 0

    def _check(self) -> None:
        """Refuse wrong options before anything is built."""
        for name in self.modes or ():
            estimator(name)
        for name, least, most in (
            ("draws", 2, MOST_TIMES),
            ("rounds", 1, MOST_TIMES),
            ("train_steps", 0, MOST_TRAINING_STEPS),
        ):
            given = getattr(self, name)
            if given is not None and not least <= given <= most:
                raise MetaplError(f"--{name.replace('_', '-')} {given}: expected {least} to {most:,}.")
        if self.train_seeds is not None and not self.train_steps:
            raise MetaplError(
                f"--train-seeds {self.train_seeds} was given without --train-steps, so nothing would be trained; give "
                "--train-steps 100 too, or leave it out."
            )
        self._seeds()

    def _seeds(self) -> tuple[int, ...]:
        return parse_seeds(self.train_seeds or "0-4", "--train-seeds")

    @abstractmethod
    def subject(self) -> dict[str, Any]:
        """Trainer, sources, steps and validation, by the names of :func:`metapl.ablation.ablate`."""


@dataclass(frozen=True, kw_only=True)
class Ablate(Looking):
    """Compare the modes on a recipe's networks and data: gradients beside the exact one, and what each costs.

    It looks at the beginning, in the middle and at the end of a training of --steps steps.

    Args:
        recipe: whose networks, data and optimizers are used.
        settings: of Meta Pseudo Labels.
    """

    kind: ClassVar[type[Recipe]] = Digits
    """Of the recipe."""

    recipe: Unasked[Any]
    settings: Unasked[Any]

    @classmethod
    def given(cls, words: Sequence[str], program: str) -> type[Ablate]:
        """The command whose flags have an effect beside the others of a command line."""
        hidden = (*OF_RUNS, *of_other_views(cls.kind, words))
        return on_recipe(cls, cls.kind, cls.kind.by_name("mpl"), Ablate.__doc__, hidden)

    def made(self) -> Ablate:
        """With the recipe that the flags make."""
        return dataclasses.replace(self, recipe=recipe_of(self))

    def subject(self) -> dict[str, Any]:
        """By the recipe, Meta Pseudo Labels."""
        recipe: Any = self.recipe
        recipe = settled(recipe, None, print) if recipe.looks else recipe.settled()
        torch.manual_seed(recipe.seed)
        task, device = recipe.task(print, True), recipe.torch_device()
        teacher, student = (recipe.network(role).to(device) for role in ("teacher", "student"))
        trainer = bilevel_trainer(recipe, teacher, student, recipe.method)
        sources = {"labeled": task.labeled, "unlabeled": task.unlabeled, "validation": task.validation}
        return {"trainer": trainer, "steps": recipe.steps, **sources}


@dataclass(frozen=True, kw_only=True)
class AblateFactory(Looking):
    """Compare the modes on networks of your own.

    Args:
        factory: module:function of a module in this folder or installed; the function takes nothing and returns a
            metapl.BilevelTrainer, a source of labeled and one of unlabeled batches, and validation data if there are
            any.
        steps: of the training that is looked at, at its beginning, in its middle and at its end.
    """

    factory: Annotated[str, tyro.conf.arg(metavar="MODULE:FUNCTION", help_behavior_hint="")]
    steps: int = 0

    def subject(self) -> dict[str, Any]:
        """By the function."""
        if not 0 <= self.steps <= MOST_TRAINING_STEPS:
            raise MetaplError(f"--steps {self.steps}: expected 0 to {MOST_TRAINING_STEPS:,}.")
        made = made_by(self.factory)
        if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(made[0], BilevelTrainer):
            raise MetaplError(
                f"--factory {self.factory} returned {_kind(made)}; expected (trainer, labeled, unlabeled) or (trainer, "
                "labeled, unlabeled, validation), the trainer a metapl.BilevelTrainer, the others batches or sources "
                "of batches as for its fit."
            )
        names = ("trainer", "labeled", "unlabeled", "validation")
        return {"steps": self.steps, **dict(zip(names, made, strict=False))}


def _kind(made: Any) -> str:
    """
    >>> _kind(None), _kind((1, "a"))
    ('None', '(int, str)')
    """
    if isinstance(made, tuple):
        return f"({', '.join(type(part).__name__ for part in made)})"
    return "None" if made is None else f"a value of type {type(made).__name__}"


OF_RUNS = (
    *("schedule", "warmup", "wait", "warm_start", "ema_decay", "validate_every", "log_every", "save_every", "keep"),
    *("exact_every", "num_workers", "finetune_steps", "finetune_batch", "finetune"),
)
"""Fields of recipes that an ablation has no use for, which takes steps at constant rates and keeps no run."""


def _on(kind: type[Recipe]) -> type[Ablate]:
    return type("Ablate", (Ablate,), {"kind": kind})


_KINDS: tuple[type[Recipe], ...] = (Digits, ImageFolders, *PROTOCOL_RECIPES)
COMMANDS: dict[str, type[Ablate]] = {kind.name: _on(kind) for kind in _KINDS}
"""The recipes whose networks can be looked at, by name."""
