"""The two compiled functions of a training, and which trainings share them.

A step and its adjoint (:mod:`metapl.functional.adjoint`) are compiled once, and kept for later
trainings of the same architecture, losses and rule.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from metapl.execution.batch import Batch
from metapl.functional.adjoint import (
    AdjointFunction,
    StepFunction,
    TrainingRules,
    TrainingStep,
)
from metapl.functional.architecture import (
    EVERYWHERE,
    PASS_HOOKS,
    Undescribed,
    bare_copies,
    description_of,
    description_of_networks,
    description_of_object,
)
from metapl.functional.capture import Captured, take_apart
from metapl.functional.state import clipped, constants_of
from metapl.problems.base import BilevelProblem, kind_of
from metapl.updates import TorchUpdate, parts_of

# What a graph holds of a batch: its structure, its numbers, and the shapes and types of tensors.
BatchKind = tuple[Any, ...]


def kind_of_batch(batch: Batch) -> BatchKind:
    """Return what a graph holds of a batch."""
    kind: list[Any] = []
    take_apart(batch, [], kind)
    return tuple(kind)


@dataclass(eq=False)
class Graphs:
    """The compiled step and adjoint of one training.

    Attributes:
        alive: the objects whose addresses are in the key of the cache, which are held here so that
            no other object gets such an address; empty where the key is a description.
        compared: the kinds of the batches for which the two were compared with the eager step.
        networks: the networks for which they were compared.
    """

    step: StepFunction
    adjoint: AdjointFunction
    alive: tuple[object, ...]
    compared: set[BatchKind] = field(default_factory=set)
    networks: list[weakref.ref[nn.Module] | None] = field(default_factory=list)

    def serve(self, *networks: nn.Module | None) -> None:
        """Forget what was compared where other networks ask.

        A graph is compared once for each network that it serves.
        """
        asking = [None if network is None else weakref.ref(network) for network in networks]
        if asking != self.networks:
            self.compared = set()
            self.networks = asking


# The graphs of the last trainings, by what was compiled: a call for another network of the same
# description (metapl.functional.architecture) compiles nothing.
_CACHE: dict[Hashable, Graphs] = {}
MOST_CACHED = 4


def graphs_of(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: BilevelProblem,
    update: TorchUpdate,
    *,
    clip_norm: float | None,
    in_settings: bool,
    several: bool,
) -> Graphs:
    """Return a training's step and its adjoint as graphs, from the cache where it has them.

    Args:
        update: the rule of an optimizer of ``torch.optim``, without a clip.
        clip_norm: that of the clip.
        in_settings, several: as of :class:`metapl.functional.adjoint.TrainingRules`.
    """
    device = next(student.parameters()).device
    dtype = None
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    constants = constants_of(update)
    # A scheduler notes the first rate in its groups, which no rule reads.
    read_by_rule = [
        {name: value for name, value in group.items() if name != "initial_lr"}
        for group in constants
    ]
    kinds = [type(update), *map(type, parts_of(update.optimizer))]
    rule = (kinds, read_by_rule, update.group_of, clip_norm, in_settings, several, dtype)

    try:
        subject = described(teacher, student, problem, rule)
        undescribed = ""
    except Undescribed as error:
        subject = by_identity(teacher, student, problem, rule)
        undescribed = error.what
    if subject.key in _CACHE:
        # The one that was asked for last goes to the end.
        _CACHE[subject.key] = _CACHE.pop(subject.key)
        return _CACHE[subject.key]

    if undescribed:
        warn_of_second_compiling(subject, undescribed)
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if dtype is not None:
        # Without the cache, which would keep casts of tensors inside a transform.
        autocast = partial(torch.autocast, device.type, dtype, cache_enabled=False)
    step = TrainingStep(
        TrainingRules(
            teacher=subject.teacher,
            student=subject.student,
            problem=subject.problem,
            update=clipped(update.without_optimizer(), clip_norm),
            constants=constants,
            device=device,
            in_settings=in_settings,
            several=several,
            autocast=autocast,
        )
    )
    make_room()
    graphs = Graphs(
        Captured(step.taken, device, subject.alive),
        Captured(step.adjoint, device, subject.alive),
        subject.alive,
    )
    _CACHE[subject.key] = graphs
    return graphs


def warn_of_second_compiling(subject: Subject, undescribed: str) -> None:
    """Warn where graphs of the same classes, which are known by identity, are in the cache.

    Args:
        subject: what is compiled now.
        undescribed: what of it has no description.
    """
    subjects = (subject.teacher, subject.student, subject.problem)
    for graphs in _CACHE.values():
        # With a changed setting the same objects compile again too, for another reason.
        are_same = all(a is b for a, b in zip(graphs.alive[:3], subjects, strict=False))
        if list(map(type, graphs.alive[:3])) == list(map(type, subjects)) and not are_same:
            warnings.warn(
                f"compiled again, which takes seconds: {kind_of(subject.problem)} or a network "
                f"holds {undescribed}, so that its graphs serve the same objects alone; give the "
                "same problem and networks in each call",
                stacklevel=2,
            )
            return


def make_room() -> None:
    """Drop graphs from the cache before another one comes in.

    Those that are known by identity hold networks of the user's, so that one of them at most is
    kept.
    """
    dropped = [key for key, graphs in _CACHE.items() if graphs.alive]
    if not dropped:
        dropped = [*_CACHE][: 1 - MOST_CACHED]
    for key in dropped:
        del _CACHE[key]


class Subject(NamedTuple):
    """What graphs are compiled of, and the key by which they are found again.

    Attributes:
        alive: the objects whose addresses are in the key.
    """

    key: Hashable
    alive: tuple[object, ...]
    teacher: nn.Module | None
    student: nn.Module
    problem: BilevelProblem


def described(
    teacher: nn.Module | None, student: nn.Module, problem: BilevelProblem, rule: tuple[object, ...]
) -> Subject:
    """Return bare copies of networks and problem, with their description as the key.

    Raises: :class:`metapl.functional.architecture.Undescribed`.
    """
    networks = [teacher, student]
    key = (
        description_of(rule),
        description_of_object(problem),
        description_of_networks(networks),
    )
    bare_teacher, bare_student = bare_copies(networks)
    return Subject(key, (), bare_teacher, bare_student, copy.deepcopy(problem))


def by_identity(
    teacher: nn.Module | None, student: nn.Module, problem: BilevelProblem, rule: tuple[object, ...]
) -> Subject:
    """Return networks and problem themselves, with the addresses of all their parts in the key."""
    networks = [network for network in (teacher, student) if network is not None]
    modules = [part for network in networks for part in network.modules()]
    weights = [p for network in networks for p in network.parameters()]
    tables_of_hooks = [vars(part)[name] for part in modules for name in PASS_HOOKS]
    tables_of_hooks += EVERYWHERE
    hooks = [hook for table in tables_of_hooks for hook in table.values()]
    alive = (teacher, student, problem, *modules, *weights, *hooks)
    is_training = [part.training for part in modules]
    requires_grad = [p.requires_grad for p in weights]
    key = (*map(id, alive), str((is_training, requires_grad, rule)))
    return Subject(key, alive, teacher, student, problem)
