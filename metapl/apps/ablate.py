"""``metapl ablate digits|images`` and ``metapl ablate --factory MODULE:FUNCTION``.

Which mode for this model?
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from metapl.ablation import ablate
from metapl.apps import digits
from metapl.apps.digits import Digits
from metapl.apps.images import Images
from metapl.apps.inputs import ROOM, held
from metapl.apps.look import choose_settings
from metapl.apps.methods.base import Training, TrainingConfig
from metapl.apps.methods.mpl import Mpl
from metapl.apps.printing import tell, wrapped
from metapl.apps.report_picture import png_of
from metapl.apps.settings import SomeSteps
from metapl.errors import MetaplError, require_packages
from metapl.feedback import MODES
from metapl.machine import device
from metapl.networks.tuned import begin_as
from metapl.runs.fields import Range, check_fields
from metapl.runs.files import write_whole
from metapl.training.trainer import BilevelTrainer

FIGURES = "ablation.json"
PICTURE = "ablation.png"

# The picture is 4 inches wide.
DOTS_PER_INCH = 200


# The type checker cannot read the names from a tuple.
if TYPE_CHECKING:
    ComparedMode = str
else:
    ComparedMode = Literal[MODES]

EXPECTED_FACTORY = (
    "expected module:function, such as my_networks:build of my_networks.py in this folder"
)


@dataclass(frozen=True, kw_only=True)
class Looking:
    """The options of every ablation.

    Args:
        out: folder that the figures (ablation.json) and their picture (ablation.png) are written
            to. Without it neither is written.
        modes: modes to compare. By default all are compared.
        draws: number of random draws for each mode that draws labels, and for each control.
        rounds: number of times that each mode is timed. By default it is 5, or more for short
            calls.
        altered: leave out the controls, which are feedback that is shuffled, replaced by its mean,
            or given random signs.
    """

    out: Path | None = None
    modes: tuple[ComparedMode, ...] | None = None
    draws: Annotated[int, Range(2, most=10_000)] = 8
    rounds: Annotated[int, Range(1, most=10_000)] | None = None
    altered: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.modes is not None and len({*self.modes}) != max(1, len(self.modes)):
            raise MetaplError(
                f"--modes {' '.join(self.modes)}: expected one or more of {', '.join(MODES)}, "
                "each once."
            )

    def look(self, trainer: BilevelTrainer, labeled: Any, unlabeled: Any, *, steps: int) -> int:
        """Compare the modes on networks and data, and print and write what was measured.

        Args:
            trainer: the networks and the problem.
            labeled, unlabeled: sources of batches.
            steps: of the training that is looked at.
        """
        if self.out is not None:
            require_packages("the figure of an ablation", "matplotlib")
        modes: list[Any] | None = None if self.modes is None else [*self.modes]
        with held(self.out):
            ablation = ablate(
                trainer,
                labeled,
                unlabeled,
                modes,
                steps=steps,
                draws=self.draws,
                rounds=self.rounds,
                altered=self.altered,
                progress=True,
            )
            tell(explained(ablation.points))
            tell(f"\n{ablation.table()}\n")
            tell(wrapped(ablation.recommendation))
            if self.out is not None:
                figures = self.out / FIGURES
                picture = self.out / PICTURE
                write_whole(figures, ablation.to_json().encode(), ROOM)
                write_whole(picture, png_of(ablation.plot(), DOTS_PER_INCH), ROOM)
                tell(f"\nthe figures are in {figures}, and drawn in {picture}")
        return 0


def explained(points: Sequence[int]) -> str:
    """Return what the columns of the table say, of gradients at these steps."""
    place = "the start"
    costs = ""
    if len(points) > 1:
        place = f"steps {', '.join(map(str, points))}"
        costs = ", costs at the last of them"
    return (
        f"gradients at {place} of the training{costs};\n"
        "error and noise are over the length of the exact gradient, and of B times the\n"
        "gradient where a mode takes the mean over the batch"
    )


@dataclass(frozen=True, kw_only=True)
class AblateDigits:
    """Compare the modes on scikit-learn's digits: their gradients, and what each costs.

    The gradients stand beside the exact one, at the beginning, in the middle and at the end of a
    training of --steps steps.
    """

    config: Digits = field(default_factory=Digits)
    method: Mpl = digits.MPL
    looking: Looking = field(default_factory=Looking)

    def run(self) -> int:
        """Compare the modes in a training on the digits."""
        steps = self.config.fitting.steps or 1
        return look_at(self.config, self.method.scheduled(steps), self.looking)


@dataclass(frozen=True, kw_only=True)
class AblateImages:
    """Compare the modes on your pictures: their gradients, and what each costs.

    The gradients stand beside the exact one, at the beginning, in the middle and at the end of a
    training of --steps steps.
    """

    config: Images
    method: Mpl = field(default_factory=Mpl)
    looking: Looking = field(default_factory=Looking)

    def run(self) -> int:
        """Compare the modes in a training on the pictures."""
        config, method = choose_settings(self.config, self.method, tell)
        return look_at(config, method, self.looking)


def look_at(config: TrainingConfig, method: Mpl, looking: Looking) -> int:
    """Compare the modes on the networks of a training as they are at its start, and its data."""
    torch.manual_seed(config.fitting.seed)
    data = config.data(tell, progress=True, log=None)
    place = device(config.fitting.device)
    teacher = config.network().to(place)
    student = config.network().to(place)
    begin_as(teacher, student)
    unused: Any = None
    training = Training(
        config=config,
        data=data,
        teacher=teacher,
        student=student,
        fit=unused,
        label=unused,
        read_labels=unused,
    )
    trainer = method.trainer(training)
    return looking.look(trainer, data.labeled, data.unlabeled, steps=config.fitting.steps or 0)


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

    factory: Annotated[str, tyro.conf.arg(metavar="MODULE:FUNCTION")]
    steps: SomeSteps = 0
    looking: Looking = field(default_factory=Looking)

    def run(self) -> int:
        """Compare the modes on what the function returns."""
        # pkgutil.resolve_name also takes a name without a colon, such as os.getcwd, which would be
        # called below though nobody said that it is a function of networks.
        if ":" not in self.factory:
            raise MetaplError(f"--factory {self.factory} names no function; {EXPECTED_FACTORY}.")
        # The function may import from this folder too.
        sys.path.insert(0, os.getcwd())
        try:
            built = pkgutil.resolve_name(self.factory)()
        except (ImportError, AttributeError, TypeError, SystemExit) as error:
            raise MetaplError(
                f"--factory {self.factory} failed: {type(error).__name__}: {error}; "
                f"{EXPECTED_FACTORY}."
            ) from error
        finally:
            sys.path.pop(0)
        is_triple = isinstance(built, tuple) and len(built) == 3
        if not is_triple or not isinstance(built[0], BilevelTrainer):
            raise MetaplError(
                f"--factory {self.factory} returned {built!r:.60}; expected (trainer, labeled, "
                "unlabeled), a metapl.BilevelTrainer and sources of batches as for its fit."
            )
        trainer, labeled, unlabeled = built
        return self.looking.look(trainer, labeled, unlabeled, steps=self.steps)
