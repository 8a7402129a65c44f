"""What a training takes on many ranks, before there are any: memory, operations, bytes on the wire, hours."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from metapl.apps.experiments.experiment import check_shares
from metapl.apps.planning.rehearsal import Rehearsal, rehearse
from metapl.apps.recipes.base import ROLES, Recipe
from metapl.apps.recipes.methods.beside import Pair, bilevel_trainer
from metapl.apps.recipes.methods.noisy_student import NoisyStudent
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError, reason_of
from metapl.problems.stored import NoisyStudentLoss
from metapl.training.loss_trainer import LossTrainer

# Ranks over which weights are cut at most: with more, gathering them takes longer, and what a rank holds of them is
# small already. And the share of what is called activations that stays when they are cut over more ranks.
WIDEST, STAYS = 128, 0.8

NAMES = ("weights", "gradients", "optimizer", "activations", "feedback")


@dataclass(frozen=True)
class Plan:
    """A training on a mesh, of ranks with ``memory`` bytes that compute so many operations a second, if that is known.

    ``parameters`` are of the teacher and the student, ``step`` is what rank 0 does; the ranks have equal shares.
    """

    recipe: Recipe
    mesh: Mesh
    memory: int
    flops_per_second: float | None
    parameters: dict[str, int]
    step: Rehearsal

    @property
    def fullest(self) -> str:
        return max(self.step.peaks, key=lambda name: self.step.peaks[name])

    @property
    def per_rank(self) -> dict[str, int]:
        """Bytes by what they are for where a step holds the most, and their sum, ``peak``."""
        peak, plain = self.step.peaks[self.fullest], self.step.plain
        found = {**plain, "feedback": peak - sum(plain.values())}
        return {**{name: found.get(name, 0) for name in NAMES}, "peak": peak}

    @property
    def fits(self) -> bool:
        return self.per_rank["peak"] <= self.memory

    @property
    def hours(self) -> float | None:
        """Of all steps, of Noisy Student those of one student, if communication is hidden behind computation."""
        if self.flops_per_second is None:
            return None
        return self.recipe.steps * self.step.flops / self.flops_per_second / 3600

    @property
    def flops_per_step(self) -> int:
        return self.step.flops * self.mesh.size

    @property
    def communication_bytes_per_step(self) -> int:
        return sum(self.step.sent.values())

    def as_dict(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "mesh": asdict(self.mesh),
            "ranks": self.mesh.size,
            "mode": None if self_trained(recipe) else pair(recipe).feedback.mode,
            "labeled_batch": recipe.labeled_batch,
            "unlabeled_batch": recipe.unlabeled_batch,
            "teacher_parameters": self.parameters["teacher"],
            "student_parameters": self.parameters["student"],
            "per_rank": self.per_rank,
            "phases": self.step.peaks,
            "memory": self.memory,
            "fits": self.fits,
            "flops_per_step": self.flops_per_step,
            "communication_bytes_per_step": self.communication_bytes_per_step,
            "communication": self.step.sent,
            "steps": recipe.steps,
            "flops_per_second": self.flops_per_second,
            "hours": self.hours,
            "torch": torch.__version__,
        }


def plan(recipe: Recipe, mesh: Mesh, *, memory: int, flops_per_second: float | None = None) -> Plan:
    """What a training by a recipe takes on a mesh: a step is rehearsed on tensors without values; no data are read."""
    method = recipe.method
    if isinstance(method, NoisyStudent):
        changed: dict[str, Any] = {"unlabeled_batch": method.self_training.ratio * recipe.labeled_batch}
        recipe = dataclasses.replace(recipe, **changed)
    check_shares(recipe, mesh)
    labeled, unlabeled = recipe.labeled_batch // mesh.shares, recipe.unlabeled_batch // mesh.shares
    shape, classes = recipe.input_shape, len(recipe.classes)
    with torch.device("meta"):
        networks = _networks(recipe)
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]

    def train(*networks: nn.Module) -> Any:
        if not isinstance(method, NoisyStudent):
            return bilevel_trainer(recipe, networks[0], networks[1], pair(recipe))
        settings = method.self_training
        loss = NoisyStudentLoss(settings.loss, settings.labels == "hard", label_smoothing=method.label_smoothing)
        optimizer = method.teacher.build(networks[0])
        return LossTrainer(networks[0], (loss,), optimizer=optimizer, **recipe.trainer_options())

    def batches() -> Any:
        # Pictures in float32, as they come from the views, and stored labels.
        weak, strong = (torch.empty(unlabeled, *shape) for _ in range(2))
        pictures = (strong, torch.empty(unlabeled, classes)) if self_trained(recipe) else (weak, strong)
        return (torch.empty(labeled, *shape), torch.empty(labeled, dtype=torch.int64)), pictures

    try:
        step = rehearse(networks, train, batches, mesh, averaged=recipe.ema_decay is not None)
    except MetaplError:
        raise
    except (RuntimeError, ValueError) as error:  # of the networks' own code, such as a batch norm's of one example
        raise MetaplError(
            f"a step of {recipe.name} on {mesh.size:,} ranks, with {labeled:,} labeled and {unlabeled:,} unlabeled "
            f"examples on each, does not run: {reason_of(error)}."
        ) from error
    parameters = {"teacher": 0 if self_trained(recipe) else counts[0], "student": counts[-1]}
    return Plan(recipe, mesh, memory, flops_per_second, parameters, step)


def self_trained(recipe: Recipe) -> bool:
    """Whether a step is of Noisy Student's students, which learn stored labels: no teacher is held."""
    return recipe.method.is_noisy_student


def _networks(recipe: Recipe) -> list[nn.Module]:
    return [recipe.network(role) for role in (ROLES[:1] if self_trained(recipe) else ROLES)]


def pair(recipe: Recipe) -> Pair:
    """The recipe's method, which is of a teacher and a student."""
    assert isinstance(recipe.method, Pair)
    return recipe.method


def propose(recipe: Recipe, ranks: int, *, memory: int, flops_per_second: float | None = None) -> Plan:
    """The plan on the mesh of so many ranks that cuts weights over the fewest on which a step fits, or over most."""
    sizes = [size for size in range(1, min(ranks, WIDEST) + 1) if ranks % size == 0]
    with torch.device("meta"):
        weights = sum(p.numel() * p.element_size() for network in _networks(recipe) for p in network.parameters())
    # Only those are rehearsed on which weights and gradients alone fit, and then what a rank holds besides activations.
    sizes = [size for size in sizes if 2 * weights / size < memory] or sizes[-1:]
    while True:
        size = sizes.pop(0)
        mesh = Mesh(replicate=ranks // size, shard=size)
        found = plan(recipe, mesh, memory=memory, flops_per_second=flops_per_second)
        if found.fits or not sizes:
            return found
        peak, activations = found.per_rank["peak"], found.per_rank["activations"]
        least = [STAYS * activations + (peak - activations) * size / larger for larger in sizes]
        sizes = [larger for larger, held in zip(sizes, least, strict=True) if held < memory] or sizes[-1:]


def bytes_of(text: str) -> int:
    """A size such as 80GB, 40 GiB or 500000000, in bytes.

    >>> bytes_of("80GB"), bytes_of("1.5 GiB"), bytes_of("2e9")
    (80000000000, 1610612736, 2000000000)
    """
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    plain = text.strip().upper()
    unit = next((unit for unit in units if plain.endswith(unit)), "")
    try:
        size = float(plain.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        size = math.nan
    if not 1 <= size < math.inf:
        raise MetaplError(f"--memory {text}: expected a size of memory, such as 80GB or 40GiB.")
    return int(size)
