"""``metapl plan RECIPE``: does it fit, and how long does it take, on so many ranks?"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from metapl.ablation.recommend import size
from metapl.apps.planning.plan import NAMES, Plan, bytes_of, pair, plan, propose
from metapl.apps.recipes import PROTOCOL_RECIPES, Digits, ImageFolders, Vision
from metapl.apps.recipes.base import MOST_STEPS, Mode, Recipe
from metapl.apps.recipes.large import IMAGENET_CLASSES, LARGE_RECIPES
from metapl.apps.recipes.noisy_student import PAPER_RECIPES, NoisyImagenet
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.runs.atomic import replacing
from metapl.words import table, tell

MEMORY = "80GB"
"""Of a rank, where it is not given."""

MOST_RANKS = 2**20

CLASSES = {"cifar10": 10, "svhn": 10, "imagenet": len(IMAGENET_CLASSES)}
"""Numbers of classes by data set, so that no data are needed."""


def _left_out(metavar: str = "INT") -> Any:
    """What a flag takes whose default is the recipe's."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


OF_THE_RECIPE = ("image_size", "labeled_batch", "unlabeled_batch", "accumulate", "precision", "steps")
"""Flags that are fields of the recipe."""


@dataclass(frozen=True, kw_only=True)
class PlanRecipe:
    """Say what a training takes on many ranks, without having them: memory of each, operations, bytes sent, hours.

    A step is rehearsed by the code that trains, on tensors without values and one of the ranks. Without a mesh, one is
    proposed that cuts the weights over as few of --ranks as fit.

    Args:
        mesh: the ranks.
        ranks: number of ranks to propose a mesh for, where none is given.
        memory: memory of a rank, such as 80GB or 40GiB.
        flops_per_second: operations that a rank computes in a second, such as 4e14; the hours follow from it.
        json: also write the plan to this file.
        mode: how the gradient of the feedback is computed, if not as in the recipe.
        network: network of teacher and student, if not as in the recipe.
        classes: number of classes, where the recipe finds them in data.
        image_size: side of the pictures in pixels, if not as in the recipe.
        labeled_batch: labeled examples in a batch of all ranks, if not as in the recipe.
        unlabeled_batch: unlabeled examples in a batch of all ranks, if not as in the recipe.
        accumulate: number of parts that a rank's share of a batch is split into, if not as in the recipe.
        precision: bfloat16 runs the networks under autocast; if not as in the recipe.
        steps: number of training steps, if not as in the recipe.
    """

    recipe: ClassVar[str]
    """Its name."""

    mesh: Mesh = field(default_factory=Mesh)
    ranks: Annotated[int | None, _left_out("N")] = None
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = MEMORY
    flops_per_second: Annotated[float | None, _left_out("FLOPS")] = None
    json: Annotated[Path | None, _left_out("FILE")] = None
    mode: Mode | None = None
    network: Annotated[str | None, _left_out("NAME")] = None
    classes: Annotated[int | None, _left_out()] = None
    image_size: Annotated[int | None, _left_out()] = None
    labeled_batch: Annotated[int | None, _left_out()] = None
    unlabeled_batch: Annotated[int | None, _left_out()] = None
    accumulate: Annotated[int | None, _left_out()] = None
    precision: Literal["float32", "bfloat16"] | None = None
    steps: Annotated[int | None, _left_out()] = None

    def __call__(self) -> int:
        self._check()
        given = {name: value for name in OF_THE_RECIPE if (value := getattr(self, name)) is not None}
        given |= {} if self.network is None else {"network_name": self.network}
        recipe: Recipe = without_data(PLANNED[self.recipe], given, self.classes, self.mode)
        machine: dict[str, Any] = {"memory": bytes_of(self.memory), "flops_per_second": self.flops_per_second}
        asked = self.mesh.size > 1
        found = plan(recipe, self.mesh, **machine) if asked else propose(recipe, self.ranks or 1, **machine)
        for line in lines(found):
            tell(line, wrap=not line.startswith(" "))
        if self.json is not None:
            with replacing(self.json) as file:
                file.write((json.dumps(found.as_dict(), indent=1) + "\n").encode())
        return 0

    def _check(self) -> None:
        """Refuse what is wrong before anything is built."""
        bytes_of(self.memory)
        if self.mesh.size > 1 and self.ranks is not None:
            raise MetaplError(f"--ranks {self.ranks} has no effect beside --mesh: leave out one of them.")
        for flag, value, most in (
            ("ranks", self.ranks, MOST_RANKS),
            ("mesh", self.mesh.size, MOST_RANKS),
            ("classes", self.classes, 10**6),
            ("steps", self.steps, MOST_STEPS),
        ):
            if value is not None and not 1 <= value <= most:
                raise MetaplError(f"--{flag} {value}: expected 1 to {most:,}.")
        rate = self.flops_per_second
        if rate is not None and not 0 < rate < math.inf:
            raise MetaplError(f"--flops-per-second {rate}: expected a number above 0, such as 4e14.")
        if self.json is not None and (self.json.is_dir() or not self.json.resolve().parent.is_dir()):
            raise MetaplError(f"--json {self.json}: expected the name of a file, in a folder that is there.")


def lines(found: Plan) -> list[str]:
    """A plan as lines of a terminal."""
    recipe, mesh, held = found.recipe, found.mesh, found.per_rank
    teacher, student = (f"{found.parameters[role]:,}" for role in ("teacher", "student"))
    labeled, unlabeled = (f"{count // mesh.shares:,}" for count in (recipe.labeled_batch, recipe.unlabeled_batch))
    share = "a rank" if mesh.spatial == 1 else f"{mesh.spatial} ranks, each with a part of every picture"
    parts = [("memory of a rank", "peak"), *((name, size(held[name])) for name in NAMES), ("sum", size(held["peak"]))]
    phases = [("phase", "peak"), *((name, size(peak)) for name, peak in found.step.peaks.items())]
    if found.by_stored_labels:
        head = [f"{recipe.name}, a step of Noisy Student, on {_ranks(mesh)}"]
        head += [f"{student} weights in the student; the teacher's labels are stored"]
    else:
        head = [f"{recipe.name}, mode {pair(recipe).feedback.mode}, on {_ranks(mesh)}"]
        head += [f"{teacher} weights in the teacher, {student} in the student"]
    return [
        *head,
        f"{labeled} labeled and {unlabeled} unlabeled examples for {share}",
        "",
        *_side_by_side(table(parts), table(phases)),
        "",
        _verdict(found),
        _costs(found),
        "Not counted: what kernels and libraries take for themselves, and memory that lies in pieces.",
    ]


def _ranks(mesh: Mesh) -> str:
    """
    >>> _ranks(Mesh()), _ranks(Mesh(replicate=16, shard=128))
    ('1 rank', '2,048 ranks: --mesh.replicate 16 --mesh.shard 128')
    """
    if mesh.size == 1:
        return "1 rank"
    sizes = {name: value for name, value in dataclasses.asdict(mesh).items() if value > 1}
    return f"{mesh.size:,} ranks: {' '.join(f'--mesh.{name} {value}' for name, value in sizes.items())}"


def _verdict(found: Plan) -> str:
    """Whether it fits, and otherwise what takes less memory."""
    if found.fits:
        return f"It fits into {size(found.memory)}; the most is held in the {found.step.fullest}."
    by_activations = found.per_rank["activations"] > found.memory / 2
    mend = (
        "Activations are most of it: give smaller batches, --accumulate, or --mesh.spatial for convolutions"
        if by_activations
        else "Give a greater --mesh.shard"
    )
    return f"It does not fit into {size(found.memory)}; the most is held in the {found.step.fullest}. {mend}."


def _costs(found: Plan) -> str:
    step = (
        f"A rank computes {_operations(found.step.flops)} a step and sends {size(found.communication_bytes_per_step)}."
    )
    if found.hours is None or found.flops_per_second is None:
        return step
    rate = _operations(int(found.flops_per_second))
    each = "of each round " if found.by_stored_labels else ""
    return f"{step} At {rate} a second, {found.recipe.steps:,} steps {each}take {_duration(found.hours)}."


def _side_by_side(left: str, right: str) -> list[str]:
    pairs = list(zip_longest(left.splitlines(), right.splitlines(), fillvalue=""))
    width = max(len(first) for first, _ in pairs)
    return [f"  {first:{width}}        {second}".rstrip() for first, second in pairs]


def _operations(flops: int) -> str:
    """
    >>> _operations(5_464_064), _operations(81_300_000_000_000)
    ('5.46 MFLOP', '81.3 TFLOP')
    """
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= 0.9995 * unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops / 1e6:.3g} MFLOP"


def _duration(hours: float) -> str:
    """
    >>> _duration(0.01), _duration(5.25), _duration(264.0)
    ('36 seconds', '5.2 hours', '264 hours (11.0 days)')
    """
    if hours < 0.1:
        return f"{hours * 3600:.2g} seconds"
    return f"{hours:.2g} hours" if hours < 24 else f"{hours:,.0f} hours ({hours / 24:,.1f} days)"


# --------------------------------------------------------------------------------------------------------- the recipes

USUAL: dict[str, Any] = {"image_size": 32, "network_name": "pooled_cnn", "precision": "float32", "steps": 10_000}
"""What pictures of usual size have of a user's own; a run chooses by looking at its pictures."""


def without_data(kind: type[Any], given: dict[str, Any], classes: int | None, mode: str | None) -> Any:
    """A recipe without data.

    Args:
        kind: of ``PLANNED``.
        given: fields.
        classes: their number, where the recipe finds them in data.
        mode: of the feedback; None: the recipe's.
    """
    own_pictures = kind is ImageFolders
    if own_pictures and classes is None:
        raise MetaplError("images finds its classes in folders, and a plan reads none: give their number by --classes.")
    if not own_pictures and classes is not None:
        raise MetaplError(f"--classes {classes} has no effect on {kind.name}, which knows its classes; leave it out.")
    if issubclass(kind, NoisyImagenet):
        _refuse_idle(kind, given, mode)
    known = {f.name for f in dataclasses.fields(kind)}
    for name in given.keys() - known:
        flag = "network" if name == "network_name" else name.replace("_", "-")
        raise MetaplError(f"{kind.name} has no {flag}; leave --{flag} out.")
    recipe = kind(**_in_place_of_data(kind, classes), **(USUAL if own_pictures else {}) | given)
    if own_pictures and classes is not None:
        recipe = recipe.with_method(uda_prior=(1 / classes,) * classes)
    if mode is not None:
        recipe = recipe.with_method(feedback=_by(recipe, mode))
    return recipe.for_network(recipe.network_name).scheduled(recipe.steps) if own_pictures else recipe


def _in_place_of_data(kind: type[Any], classes: int | None) -> dict[str, Any]:
    """Fields that are found by looking at data."""
    if issubclass(kind, Vision):
        data = next(f.default for f in dataclasses.fields(kind) if f.name == "data")
        return {"data_root": "", "class_names": tuple(map(str, range(CLASSES[str(data)])))}
    if classes is None:
        return {}
    return {
        "labeled": "",
        "unlabeled": "",
        "class_names": tuple(map(str, range(classes))),
        "method": "mpl",
        "grey": False,
        "val_fraction": 0.0,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
    }


def _by(recipe: Recipe, mode: str) -> Any:
    """The recipe's feedback by another mode, without what is of its own mode alone."""
    plain: dict[str, Any] = {"labels": None, "normalization": None, "baseline": None}
    feedback = pair(recipe).feedback
    return dataclasses.replace(feedback, mode=mode, **plain if mode != feedback.mode else {})


def _refuse_idle(kind: type[NoisyImagenet], given: dict[str, Any], mode: str | None) -> None:
    """A step of Noisy Student has no feedback, and its unlabeled batch follows from the labeled one."""
    for flag, value in (("mode", mode), ("unlabeled-batch", given.get("unlabeled_batch"))):
        if value is not None:
            raise MetaplError(
                f"--{flag} {value} has no effect on {kind.name}: its students learn stored labels, and its unlabeled "
                "batch follows from the labeled one; leave it out."
            )


PLANNED: dict[str, type[Recipe]] = {
    **{kind.name: kind for kind in (Digits, ImageFolders)},
    **{kind.name: kind for kind in PROTOCOL_RECIPES if kind is not Vision},
    **{kind.name: kind for kind in LARGE_RECIPES},
    **PAPER_RECIPES,
}
"""The recipes that can be planned, by name."""


def _plan_of(name: str) -> type[PlanRecipe]:
    command = type(f"Plan{name}", (PlanRecipe,), {"recipe": name, "__doc__": PlanRecipe.__doc__})
    return dataclass(frozen=True, kw_only=True)(command)


COMMANDS: dict[str, type[PlanRecipe]] = {name: _plan_of(name) for name in PLANNED}
"""The commands by the recipe's name."""
