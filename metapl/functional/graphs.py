"""The two compiled functions of a training, and which trainings share them.

A step and its adjoint (:mod:`metapl.functional.adjoint`) are compiled once, and kept for later
trainings of the same architecture, losses and rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from metapl.errors import warn
from metapl.execution.state import HOOKS_EVERYWHERE
from metapl.functional.adjoint import TrainingRules, TrainingStep
from metapl.functional.architecture import (
    PASS_HOOKS,
    BareCopier,
    Describer,
    Undescribed,
    description_of,
)
from metapl.functional.capture import Capture, Captured
from metapl.functional.operations import say
from metapl.functional.state import clipped, constants_of
from metapl.problems.base import BilevelProblem, kind_of, modules_in
from metapl.updates import TorchUpdate, parts_of

# What stands in a description, one after the other.
PARTS_OF_KEY = ("the optimizer, or what is asked for,", "the problem", "a network")

# What a graph holds of a batch: its structure, its numbers, and the shapes and types of tensors.
BatchKind = tuple[Any, ...]

# The teacher, the student and the problem of a call.
Asking = tuple[nn.Module | None, nn.Module, BilevelProblem]


class Subject(NamedTuple):
    """What graphs are made of.

    Attributes:
        alive: the objects whose addresses are in the key of the cache, which are held here so that
            no other object gets such an address; empty where the key is a description.
        outside: tensors of copies of modules that are no part of the networks.
    """

    teacher: nn.Module | None
    student: nn.Module
    problem: BilevelProblem
    alive: tuple[object, ...] = ()
    outside: Sequence[Tensor] = ()

    @property
    def sources(self) -> list[object]:
        """The objects whose attributes a graph reads.

        What their methods read of their file is found from them. It may change, and is in no
        description.
        """
        found: list[object] = [self.problem, *self.alive]
        for network in (self.teacher, self.student):
            found += [] if network is None else network.modules()
        return found


@dataclass(eq=False)
class Graphs:
    """The compiled step of one training (:meth:`TrainingStep.taken`), and its adjoint.

    Attributes:
        compared: the kinds of the batches for which the two were compared with the eager step, and
            how many graphs had been made by then.
    """

    step: Captured[Any]
    adjoint: Captured[Any]
    subject: Subject
    compared: dict[BatchKind, int] = field(default_factory=dict)

    @property
    def captures(self) -> int:
        """How many graphs were made."""
        return self.step.captures + self.adjoint.captures

    def doubt(self) -> None:
        """Forget what was compared: a graph is compared once for each network that it serves."""
        self.compared = {}


class Made(Protocol):
    """Graphs that are kept for later calls."""

    subject: Subject

    def doubt(self) -> None:
        """Compare the graphs once more, when they serve other objects."""


Graph = TypeVar("Graph", bound=Made)


class Kept(NamedTuple):
    """Graphs, and the teacher, the student and the problem that they serve.

    Attributes:
        times: how many of the same objects were made one after another.
    """

    graphs: Any
    served: list[weakref.ref[Any] | None]
    times: int


# The graphs of the last calls, by what was recorded: a call for another network of the same
# description (metapl.functional.architecture) records and compiles nothing.
_CACHE: dict[Hashable, Kept] = {}
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

    def make(subject: Subject) -> Graphs:
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            # Without the cache, which would keep casts of tensors inside a transform.
            autocast = partial(torch.autocast, device.type, dtype, cache_enabled=False)
        step = TrainingStep(
            TrainingRules(
                teacher=subject.teacher,
                student=subject.student,
                problem=subject.problem,
                update=clipped(update.without_optimizer(), clip_norm),
                constants=constants_of(update),
                device=device,
                in_settings=in_settings,
                several=several,
                autocast=autocast,
            )
        )
        sources = subject.sources
        # As graphs they return carries and cotangents that are held.
        return Graphs(
            Captured(step.taken, device, sources, holds_first=True),
            Captured(step.adjoint, device, sources, holds_first=True),
            subject,
        )

    options = ("training", clip_norm, in_settings, several)
    return kept_graphs(teacher, student, problem, (rule_of(update, device), options), make)


def rule_of(update: TorchUpdate, device: torch.device) -> tuple[object, ...]:
    """Return what tells the rule of an optimizer from others, but for numbers that are settings."""
    dtype = None
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    # A scheduler notes the first rate in its groups, which no rule reads.
    read_by_rule = [
        {name: value for name, value in group.items() if name != "initial_lr"}
        for group in constants_of(update)
    ]
    kinds = [type(update), *map(type, parts_of(update.optimizer))]
    return kinds, read_by_rule, update.group_of, dtype


def kept_graphs(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: BilevelProblem,
    rule: tuple[object, ...],
    make: Callable[[Subject], Graph],
) -> Graph:
    """Return graphs from the cache, or those that ``make`` makes, which are then kept.

    Args:
        rule: what tells them from other graphs of such networks and such a problem.
    """
    asking: Asking = (teacher, student, problem)
    outside: Sequence[Tensor] = ()
    alive: tuple[object, ...] = ()
    undescribed = ""
    try:
        key, outside = described(asking, rule)
    except Undescribed as error:
        alive = parts_of_call(asking)
        key = by_identity(alive, rule)
        undescribed = error.what
    kept = _CACHE.pop(key, None)
    if kept is None:
        times = say_why_again(key, asking, undescribed)
        subject = Subject(*asking, alive) if alive else bare_subject(asking, outside)
        make_room(student)
        kept = Kept(make(subject), [], times)
    # The one that was asked for last is at the end.
    _CACHE[key] = kept
    graphs: Graph = kept.graphs
    references = [None if part is None else weakref.ref(part) for part in asking]
    if references != kept.served:
        graphs.doubt()
        kept.served[:] = references
    with torch.no_grad():
        for ours, theirs in zip(graphs.subject.outside, outside, strict=True):
            ours.copy_(theirs)
    return graphs


def described(asking: Asking, rule: tuple[object, ...]) -> tuple[Hashable, Sequence[Tensor]]:
    """Return the description of a call, and the tensors of modules that are no networks.

    Raises: :class:`Undescribed`.
    """
    teacher, student, problem = asking
    describer = Describer([teacher, student])
    key = (description_of(rule), describer.problem(problem), describer.networks)
    return key, describer.outside


@dataclass(eq=False)
class SharedCaptures:
    """Graphs of steps with one description."""

    subject: Subject
    captures: list[Capture] = field(default_factory=list)

    def doubt(self) -> None:
        """Do nothing: whoever takes one of the graphs compares it."""


def shared_captures(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: BilevelProblem,
    rule: tuple[object, ...],
) -> list[Capture]:
    """Return the list of the graphs of all steps with this description, which new ones join.

    A step without a description has a list of its own.
    """
    try:
        key, _ = described((teacher, student, problem), rule)
    except Undescribed:
        return []
    kept = _CACHE.pop(key, None)
    if kept is None:
        make_room(student)
        # The graphs are made of the networks of each step, and hold none.
        none: Any = None
        subject = Subject(none, none, none)
        kept = Kept(SharedCaptures(subject), [], 1)
    _CACHE[key] = kept
    captures: list[Capture] = kept.graphs.captures
    return captures


def say_why_again(key: Hashable, asking: Asking, undescribed: str) -> int:
    """Say why graphs are made again, where there are some of such networks and such a problem.

    A number that counts calls, say, makes them in each of these: for the same objects the third
    time is a warning.

    Args:
        undescribed: what of a call has no description.

    Returns: how many were made one after another.
    """
    kinds = [*map(type, asking)]
    for other, kept in [*_CACHE.items()][::-1]:
        subject = kept.graphs.subject
        others = (subject.teacher, subject.student, subject.problem)
        if [*map(type, others)] != kinds:
            continue
        # With a changed setting the same objects compile again too, for another reason.
        are_same = all(a is b for a, b in zip(others, asking, strict=True))
        if undescribed and subject.alive and not are_same:
            warn(
                f"recorded again, which takes seconds: {kind_of(asking[2])} or a network holds "
                f"{undescribed}, so that its graphs serve the same objects alone; give the same "
                "problem and networks in each call",
            )
        elif not undescribed and not subject.alive:
            difference = difference_between(key, other)
            say(f"recorded again, which takes seconds: {difference}")
            served = [None if reference is None else reference() for reference in kept.served]
            if not all(a is b for a, b in zip(served, asking, strict=True)):
                return 1
            if kept.times + 1 == 3:
                warn(
                    f"recorded again, which takes seconds, for the third time: {difference}",
                )
        return kept.times + 1
    return 1


def difference_between(key: Any, other: Any) -> str:
    """Return in words what differs first between two descriptions."""
    for name, one, two in zip(PARTS_OF_KEY, key, other, strict=True):
        if one == two:
            continue
        levels = [(one, two)]
        while isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two):
            one, two = next((a, b) for a, b in zip(one, two, strict=True) if a != b)
            levels.append((one, two))
        # A name, with the type and the value that it has.
        one, two = levels[-3:][0]
        return f"{name} differs from that of an earlier call ({one!r:.80}, and {two!r:.80})"
    return "what is asked for differs"


def make_room(student: nn.Module) -> None:
    """Drop graphs from the cache before another one of a student comes in.

    Those that are known by identity hold networks of the user's, so that they are kept for one
    student at most.
    """
    subjects = {key: kept.graphs.subject for key, kept in _CACHE.items()}
    dropped = [
        key for key, subject in subjects.items() if subject.alive and subject.student is not student
    ]
    if not dropped:
        dropped = [*_CACHE][: 1 - MOST_CACHED]
    for key in dropped:
        del _CACHE[key]


def bare_subject(asking: Asking, outside: Sequence[Tensor]) -> Subject:
    """Return copies of networks and problem that have a description."""
    teacher, student, problem = asking
    copier = BareCopier([teacher, student])
    copies = copier.module(teacher), copier.module(student), copier.object(problem)
    return Subject(*copies, outside=[copier.tensor(t) for t in outside])


def parts_of_call(asking: Asking) -> tuple[object, ...]:
    """Return networks and problem, with all their parts, weights and hooks.

    Of modules that the problem holds the buffers count too: they are no part of any state.
    """
    networks = [part for part in asking[:2] if part is not None]
    held = modules_in(asking[2])
    modules = [*(part for network in networks for part in network.modules()), *held]
    weights = [p for part in modules for p in part._parameters.values() if p is not None]
    buffers = [b for part in held for b in part._buffers.values() if b is not None]
    tables_of_hooks = [vars(part)[name] for part in modules for name in PASS_HOOKS]
    tables_of_hooks += HOOKS_EVERYWHERE
    hooks = [hook for table in tables_of_hooks for hook in table.values()]
    return (*asking, *modules, *weights, *buffers, *hooks)


def by_identity(alive: tuple[object, ...], rule: tuple[object, ...]) -> Hashable:
    """Return the addresses of all parts of a call, with modes and what is frozen."""
    is_training = [part.training for part in alive if isinstance(part, nn.Module)]
    requires_grad = [p.requires_grad for p in alive if isinstance(p, nn.Parameter)]
    return (*map(id, alive), str((is_training, requires_grad, rule)))
