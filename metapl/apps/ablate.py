"""``metapl ablate digits|images`` and ``metapl ablate --factory MODULE:FUNCTION``.

Which mode for this model?
"""

from __future__ import annotations

import os
import pkgutil
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from metapl.ablation import ablate
from metapl.apps import digits
from metapl.apps.digits import Digits
from metapl.apps.images import Images
from metapl.apps.inputs import ROOM, Folder, held
from metapl.apps.look import choose_settings
from metapl.apps.machine import write_whole
from metapl.apps.methods import Mpl, Training
from metapl.apps.printing import tell, wrapped
from metapl.apps.report_picture import png_of
from metapl.apps.settings import Flat, SomeSteps, unset
from metapl.apps.train import device
from metapl.apps.tuned_networks import begin_as
from metapl.errors import MetaplError
from metapl.feedback import MODES, estimator
from metapl.runs.fields import Range
from metapl.training.trainer import BilevelTrainer

FIGURES, PICTURE = "ablation.json", "ablation.png"

# Of a picture that is 4 inches wide.
DOTS_PER_INCH = 200


@dataclass(frozen=True, kw_only=True)
class Looking:
    """The options of every ablation.

    Args:
        out: folder that the figures (ablation.json) and their picture (ablation.png) are written
            to. Without it neither is written.
        draws: number of random draws for each mode that draws labels, and for each control.
        rounds: number of times that each mode is timed. By default it is 5, or more for short
            calls.
        altered: leave out the controls, which are feedback that is shuffled, replaced by its mean,
            or given random signs.
    """

    out: Folder = None
    modes: Annotated[
        tuple[str, ...] | None,
        unset("MODE ...", f"modes to compare. By default all are compared: {', '.join(MODES)}."),
    ] = None
    draws: Annotated[int, Range(2, most=10_000)] = 8
    rounds: Annotated[Annotated[int, Range(1, most=10_000)] | None, unset()] = None
    # The flag is --no-altered.
    altered: Annotated[bool, unset()] = True

    def look(self, subject: dict[str, Any]) -> int:
        for name in self.modes or ():
            estimator(name)
        with held(self.out):
            asked: Any = {
                "modes": self.modes,
                "draws": self.draws,
                "rounds": self.rounds,
                "altered": self.altered,
            }
            found = ablate(**subject, **asked, progress=True)
            several = len(found.points) > 1
            where = f"steps {', '.join(map(str, found.points))}" if several else "the start"
            tell(f"gradients at {where} of the training{', costs at the last of them' * several};")
            tell("error and noise are over the length of the exact gradient, and of B times the")
            tell(f"gradient where a mode takes the mean over the batch\n\n{found.table()}\n")
            tell(wrapped(found.recommendation))
            if self.out is not None:
                write_whole(self.out / FIGURES, found.to_json().encode(), ROOM)
                write_whole(self.out / PICTURE, png_of(found.plot(), DOTS_PER_INCH), ROOM)
                tell(
                    f"\nthe figures are in {self.out / FIGURES}, and drawn in {self.out / PICTURE}"
                )
        return 0


@dataclass(frozen=True, kw_only=True)
class AblateDigits:
    """Compare the modes on scikit-learn's digits: their gradients, and what each costs.

    The gradients stand beside the exact one, at the beginning, in the middle and at the end of a
    training of --steps steps.
    """

    config: Flat[Digits] = field(default_factory=Digits)
    method: Flat[Mpl] = digits.METHODS["mpl"]
    looking: Flat[Looking] = field(default_factory=Looking)

    def run(self) -> int:
        steps = self.config.fitting.steps or 1
        return self.looking.look(_of_training(self.config, self.method.scheduled(steps)))


@dataclass(frozen=True, kw_only=True)
class AblateImages:
    """Compare the modes on your pictures: their gradients, and what each costs.

    The gradients stand beside the exact one, at the beginning, in the middle and at the end of a
    training of --steps steps.
    """

    config: Flat[Images]
    method: Flat[Mpl] = field(default_factory=Mpl)
    looking: Flat[Looking] = field(default_factory=Looking)

    def run(self) -> int:
        return self.looking.look(_of_training(*choose_settings(self.config, self.method, tell)))


def _of_training(config: Any, method: Any) -> dict[str, Any]:
    """Trainer, sources and steps, by the names of :func:`metapl.ablation.ablate`."""
    torch.manual_seed(config.fitting.seed)
    data = config.data(tell, progress=True, log=None)
    place = device(config.fitting.device)
    teacher, student = (config.network().to(place) for _ in range(2))
    begin_as(teacher, student)
    unused: Any = None
    training = Training(
        config=config, data=data, teacher=teacher, student=student, fit=unused, label=unused
    )
    sources = {"labeled": data.labeled, "unlabeled": data.unlabeled}
    return {"trainer": method.trainer(training), "steps": config.fitting.steps, **sources}


@dataclass(frozen=True, kw_only=True)
class AblateFactory:
    """Compare the modes on networks of your own: their gradients, and what each costs.

    Args:
        factory: function that builds your networks, as module:function of a module in this folder
            or an installed one. It takes nothing, and returns a metapl.BilevelTrainer, a source of
            labeled batches and a source of unlabeled batches.
        steps: number of steps of the training whose beginning, middle and end are looked at. With 0
            only the beginning is.
    """

    factory: Annotated[str, unset("MODULE:FUNCTION")]
    steps: SomeSteps = 0
    looking: Flat[Looking] = field(default_factory=Looking)

    def run(self) -> int:
        expected = (
            "expected module:function, such as my_networks:build of my_networks.py in this folder"
        )
        # Of os.getcwd, say, the function would be called before anything is known of it.
        if ":" not in self.factory:
            raise MetaplError(f"--factory {self.factory} names no function; {expected}.")
        # The function may import from this folder too.
        sys.path.insert(0, os.getcwd())
        try:
            made = pkgutil.resolve_name(self.factory)()
        except (ImportError, AttributeError, TypeError, SystemExit) as error:
            raise MetaplError(
                f"--factory {self.factory} failed: {type(error).__name__}: {error}; {expected}."
            ) from error
        finally:
            sys.path.pop(0)
        if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], BilevelTrainer):
            expected = (
                "(trainer, labeled, unlabeled), a metapl.BilevelTrainer and sources of batches as "
                "for its fit"
            )
            raise MetaplError(
                f"--factory {self.factory} returned {made!r:.60}; expected {expected}."
            )
        own = dict(zip(("trainer", "labeled", "unlabeled"), made, strict=True))
        return self.looking.look({"steps": self.steps, **own})
