"""``metapl ablate RECIPE`` and ``metapl ablate --factory MODULE:FUNCTION``: which mode for this model?"""

from __future__ import annotations

import os
import pkgutil
import sys
import traceback
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from metapl.ablation import ablate
from metapl.apps.inputs import held, written
from metapl.apps.commands.parse import Command, Folder, OnRecipe, unset
from metapl.apps.experiments.settle import settled
from metapl.apps.recipes import Digits, ImageFolders
from metapl.apps.recipes.methods.beside import bilevel_trainer
from metapl.apps.words import tell, wrapped
from metapl.errors import MetaplError
from metapl.feedback import MODES, estimator
from metapl.runs.fields import Range
from metapl.training.trainer import BilevelTrainer

# Options of :func:`metapl.ablate` that are flags by the same name.
ASKED = ("modes", "draws", "rounds", "altered")

# Fields of recipes that an ablation has no use for, which takes steps at constant rates and keeps no run.
OF_RUNS = (
    *("schedule", "warmup", "wait", "warm_start", "ema_decay", "validate_every", "log_every", "save_every", "keep"),
    *("exact_every", "num_workers", "finetune_steps", "finetune_batch", "finetune"),
)

Steps = Annotated[int, Range(0, most=10**9)]


@dataclass(frozen=True, kw_only=True)
class Looking(Command):
    """The options of every ablation.

    Args:
        out: folder for ablation.json; by default it is not written.
        draws: of labels, for modes that draw them, and of alterations.
        rounds: in which each mode is timed once; by default 5, more for short calls.
        altered: also measure a mode's feedback altered, as a control: permuted, its mean, with random signs.
    """

    out: Folder = None
    modes: Annotated[tuple[str, ...] | None, unset("MODE ...", f"these modes alone, of {', '.join(MODES)}.")] = None
    draws: Annotated[int, Range(2, most=10_000)] = 8
    rounds: Annotated[Annotated[int, Range(1, most=10_000)] | None, unset()] = None
    altered: bool = True

    def check(self) -> None:
        for name in self.modes or ():
            estimator(name)

    def run(self) -> int:
        with held(self.out):
            asked = {name: getattr(self, name) for name in ASKED}
            found = ablate(**self.subject(), **asked, progress=True)
            several = len(found.points) > 1
            where = f"steps {', '.join(map(str, found.points))}" if several else "the start"
            tell(f"gradients at {where} of the training{', costs at the last of them' * several};")
            tell(f"error and noise are over the length of the exact gradient\n\n{found.table()}\n")
            tell(wrapped(found.recommendation))
            if self.out is not None:
                with written(self.out, "ablation.json", found.to_json()):
                    tell(f"\nthe figures are in {self.out / 'ablation.json'}")
        return 0

    @abstractmethod
    def subject(self) -> dict[str, Any]:
        """Trainer, sources and steps, by the names of :func:`metapl.ablation.ablate`."""


@dataclass(frozen=True, kw_only=True)
class Ablate(Looking, OnRecipe):
    """Compare the modes on a recipe's networks and data: gradients beside the exact one, and what each costs.

    It looks at the beginning, in the middle and at the end of a training of --steps steps.
    """

    @classmethod
    def given(cls, words: Sequence[str], program: str) -> tuple[type[Command], str]:
        return cls.flags(cls.kind.by_name("mpl"), words, Ablate.__doc__ or "", OF_RUNS), program

    def subject(self) -> dict[str, Any]:
        recipe = settled(self.recipe, None, print) if self.recipe.looks else self.recipe.settled()
        torch.manual_seed(recipe.seed)
        task, device = recipe.task(print, True), recipe.torch_device()
        teacher, student = (recipe.network(role).to(device) for role in ("teacher", "student"))
        trainer = bilevel_trainer(recipe, teacher, student, recipe.method)
        return {"trainer": trainer, "steps": recipe.steps, "labeled": task.labeled, "unlabeled": task.unlabeled}


COMMANDS = Ablate.on(Digits, ImageFolders)


@dataclass(frozen=True, kw_only=True)
class AblateFactory(Looking):
    """Compare the modes on networks of your own.

    Args:
        factory: module:function of a module in this folder or installed; the function takes nothing and returns a
            metapl.BilevelTrainer, a source of labeled and one of unlabeled batches.
        steps: of the training that is looked at, at its beginning, in its middle and at its end.
    """

    factory: Annotated[str, unset("MODULE:FUNCTION")]
    steps: Steps = 0

    def subject(self) -> dict[str, Any]:
        made = made_by(self.factory)
        if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], BilevelTrainer):
            several = isinstance(made, tuple) and f"({', '.join(type(part).__name__ for part in made)})"
            raise MetaplError(
                f"--factory {self.factory} returned {several or f'a value of type {type(made).__name__}'}; expected "
                "(trainer, labeled, unlabeled), the trainer a metapl.BilevelTrainer, the others batches or sources of "
                "batches as for its fit."
            )
        return {"steps": self.steps, **dict(zip(("trainer", "labeled", "unlabeled"), made, strict=True))}


def made_by(name: str) -> Any:
    """What ``module:function`` returns; the module may lie in the current folder. Errors name the place in it."""
    expected = "expected module:function, such as my_networks:build of my_networks.py in this folder"
    if ":" not in name:  # of os.getcwd, say, the function would be called before anything is known of it
        raise MetaplError(f"--factory {name} names no function; {expected}.")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # the function may import from there too
    try:
        return pkgutil.resolve_name(name)()
    except MetaplError:
        raise
    except (Exception, SystemExit) as error:
        # The innermost line of the user's own says more than one inside a library.
        frames = traceback.extract_tb(error.__traceback__)
        own = [at for at in frames if at.filename.startswith(folder + os.sep) and at.filename != __file__]
        told = f"; {expected}"
        if own:  # its name was right
            told = f" ({os.path.relpath(own[-1].filename)}, line {own[-1].lineno})"
        text = str(error).strip().partition("\n")[0].rstrip(".")
        kind = f"{type(error).__name__}{f': {text}' if text else ''}"
        raise MetaplError(f"--factory {name} failed: {kind}{told}.") from error
    finally:
        sys.path.remove(folder)
