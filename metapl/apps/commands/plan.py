"""``metapl plan RECIPE``: does it fit, and how long does it take, on so many ranks?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, Literal

import tyro

from metapl.apps.commands.inputs import check_file
from metapl.apps.commands.parse import Command, File, unset
from metapl.apps.machine.sealed import replacing
from metapl.apps.planning.plan import NAMES, Plan, bytes_of, pair, plan, propose, self_trained
from metapl.apps.recipes import PROTOCOL_RECIPES, Digits, ImageFolders, Vision
from metapl.apps.recipes.base import Recipe
from metapl.apps.recipes.protocols import IMAGENET_CLASSES, LARGE_RECIPES, PAPER_RECIPES, NoisyImagenet
from metapl.apps.recipes.settings import MOST_STEPS, Mode
from metapl.apps.words import table, tell
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.runs.fields import Range

MOST_RANKS = 2**20
FLOPS = {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}

# Numbers of classes by data set, so that no data are needed.
CLASSES = {"cifar10": 10, "svhn": 10, "imagenet": len(IMAGENET_CLASSES)}

PLANNED: dict[str, type[Recipe]] = {kind.name: kind for kind in (Digits, ImageFolders)}
PLANNED |= {kind.name: kind for kind in PROTOCOL_RECIPES if kind is not Vision}
PLANNED |= {**{kind.name: kind for kind in LARGE_RECIPES}, **PAPER_RECIPES}

# Flags that are fields of the recipe.
OF_THE_RECIPE = ("image_size", "labeled_batch", "unlabeled_batch", "accumulate", "precision", "steps")

# What pictures of usual size have of a user's own; a run chooses by looking at its pictures.
USUAL: dict[str, Any] = {"image_size": 32, "network_name": "pooled_cnn", "precision": "float32", "steps": 10_000}

Count = Annotated[int | None, unset("INT")]


@dataclass(frozen=True, kw_only=True)
class PlanRecipe(Command):
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

    kind: ClassVar[type[Recipe]]  # of the recipe

    mesh: Mesh = field(default_factory=Mesh)
    ranks: Annotated[Annotated[int, Range(1, most=MOST_RANKS)] | None, unset("N")] = None
    memory: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "80GB"
    flops_per_second: Annotated[Annotated[float, Range(above=0)] | None, unset("FLOPS")] = None
    json: File = None
    mode: Annotated[Mode | None, unset()] = None
    network: Annotated[str | None, unset("NAME")] = None
    classes: Annotated[Annotated[int, Range(1, most=10**6)] | None, unset("INT")] = None
    image_size: Count = None
    labeled_batch: Count = None
    unlabeled_batch: Count = None
    accumulate: Count = None
    precision: Annotated[Literal["float32", "bfloat16"] | None, unset()] = None
    steps: Annotated[Annotated[int, Range(1, most=MOST_STEPS)] | None, unset("INT")] = None

    def run(self) -> int:
        machine: dict[str, Any] = {"memory": bytes_of(self.memory), "flops_per_second": self.flops_per_second}
        meshed = self.mesh.size > 1
        if meshed and self.ranks is not None:
            raise MetaplError(f"--ranks {self.ranks} has no effect beside --mesh: leave out one of them.")
        if self.mesh.size > MOST_RANKS:
            raise MetaplError(f"--mesh {self.mesh.size}: expected 1 to {MOST_RANKS:,} ranks.")
        check_file("--json", self.json)
        given = {name: value for name in OF_THE_RECIPE if (value := getattr(self, name)) is not None}
        given |= {} if self.network is None else {"network_name": self.network}
        recipe: Recipe = without_data(self.kind, given, self.classes, self.mode)
        found = plan(recipe, self.mesh, **machine) if meshed else propose(recipe, self.ranks or 1, **machine)
        for line in lines(found):
            tell(line, wrap=not line.startswith(" "))
        if self.json is not None:
            with replacing(self.json) as file:
                file.write((json.dumps(found.as_dict(), indent=1) + "\n").encode())
        return 0


COMMANDS = {
    name: type("Plan", (PlanRecipe,), {"kind": kind, "__doc__": PlanRecipe.__doc__}) for name, kind in PLANNED.items()
}


def without_data(kind: type[Any], given: dict[str, Any], classes: int | None, mode: str | None) -> Any:
    """A recipe of ``PLANNED`` without data, with these fields, number of classes, and mode of the feedback."""
    own_pictures = kind is ImageFolders
    if issubclass(kind, NoisyImagenet) and (idle := mode or given.get("unlabeled_batch")):
        raise MetaplError(
            f"{'--mode' if mode else '--unlabeled-batch'} {idle} has no effect on {kind.name}: its students learn "
            "stored labels, and its unlabeled batch follows from the labeled one; leave it out."
        )
    for name in given.keys() - {f.name for f in dataclasses.fields(kind)}:
        flag = name.removesuffix("_name").replace("_", "-")
        raise MetaplError(f"{kind.name} has no {flag}; leave --{flag} out.")
    if own_pictures != (classes is not None):
        if own_pictures:
            raise MetaplError(
                "images finds its classes in folders, and a plan reads none: give their number by --classes."
            )
        raise MetaplError(f"--classes {classes} has no effect on {kind.name}, which knows its classes; leave it out.")
    if classes is not None:
        found: dict[str, Any] = {"class_names": tuple(map(str, range(classes))), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        found |= {"labeled": "", "unlabeled": "", "method": "mpl", "grey": False, "val_fraction": 0.0}
        recipe = kind(**found, **USUAL | given).with_method(uda_prior=(1 / classes,) * classes)
    elif issubclass(kind, Vision):  # what is found by looking at data
        data = next(f.default for f in dataclasses.fields(kind) if f.name == "data")
        recipe = kind(data_root="", class_names=tuple(map(str, range(CLASSES[str(data)]))), **given)
    else:
        recipe = kind(**given)
    if mode is not None:
        feedback = pair(recipe).feedback
        # Without what is of the recipe's own mode alone.
        plain: dict[str, Any] = {"labels": None, "normalization": None, "baseline": None}
        changed = dataclasses.replace(feedback, mode=mode, **plain if mode != feedback.mode else {})
        recipe = recipe.with_method(feedback=changed)
    return recipe.for_network(recipe.network_name).scheduled(recipe.steps) if own_pictures else recipe


def lines(found: Plan) -> list[str]:
    recipe, mesh, held = found.recipe, found.mesh, found.per_rank
    teacher, student = (f"{found.parameters[role]:,}" for role in ("teacher", "student"))
    labeled, unlabeled = (f"{count // mesh.shares:,}" for count in (recipe.labeled_batch, recipe.unlabeled_batch))
    factors = " ".join(f"--mesh.{name} {value}" for name, value in dataclasses.asdict(mesh).items() if value > 1)
    ranks = f"{mesh.size:,} ranks: {factors}" if factors else "1 rank"
    if self_trained(recipe):
        head = [f"{recipe.name}, a step of Noisy Student, on {ranks}"]
        head += [f"{student} weights in the student; the teacher's labels are stored"]
    else:
        head = [f"{recipe.name}, mode {pair(recipe).feedback.mode}, on {ranks}"]
        head += [f"{teacher} weights in the teacher, {student} in the student"]
    parts = [("memory of a rank", "peak"), *((name, size(held[name])) for name in NAMES), ("sum", size(held["peak"]))]
    phases = [("phase", "peak"), *((name, size(peak)) for name, peak in found.step.peaks.items())]
    left, right = table(parts).splitlines(), table(phases).splitlines()
    width = max(map(len, left))
    beside = [f"  {a:{width}}        {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    most = f"into {size(found.memory)}; the most is held in the {found.fullest}."
    verdict = f"It fits {most}"
    if not found.fits:
        mend = "Give a greater --mesh.shard."
        if held["activations"] > found.memory / 2:
            mend = "Activations are most of it: give smaller batches, or --accumulate."
        verdict = f"It does not fit {most} {mend}"
    return [
        *head,
        f"{labeled} labeled and {unlabeled} unlabeled examples for a rank",
        "",
        *beside,
        "",
        verdict,
        _costs(found),
        "Not counted: what kernels and libraries take for themselves, and memory that lies in pieces.",
    ]


def in_units(value: float, units: Mapping[str, float]) -> str:
    """A value in the first of these units, the greatest first, that it reaches.

    >>> in_units(0.00247, {"s": 1.0, "ms": 1e-3}), in_units(264_000_000, {"GB": 1e9, "MB": 1e6})
    ('2.47 ms', '264 MB')
    """
    name, one = next(((name, one) for name, one in units.items() if value >= 0.9995 * one), list(units.items())[-1])
    return f"{value / one:.3g} {name}"


size = partial(in_units, units={"GB": 1e9, "MB": 1e6, "KB": 1e3})


def _costs(found: Plan) -> str:
    sent = size(found.communication_bytes_per_step)
    step = f"A rank computes {in_units(found.step.flops, FLOPS)} a step and sends {sent}."
    hours = found.hours
    if hours is None or found.flops_per_second is None:
        return step
    taken = f"{hours * 3600:.2g} seconds" if hours < 0.1 else f"{hours:.2g} hours"
    if hours >= 24:
        taken = f"{hours:,.0f} hours ({hours / 24:,.1f} days)"
    each = "of each round " if self_trained(found.recipe) else ""
    rate = in_units(found.flops_per_second, FLOPS)
    return f"{step} At {rate} a second, {found.recipe.steps:,} steps {each}take {taken}."
