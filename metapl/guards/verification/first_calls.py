"""Which calls of :func:`metapl.hypergradient` are verified: those that are like no earlier one.

An earlier call is known by its objects, whose addresses are looked up in every call; or, where some
of these are new, by what they compute (:mod:`metapl.functional.architecture`), so that another
student of one architecture is known.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from metapl.core.order import Orders
from metapl.execution.numerics import MissingDerivative
from metapl.feedback.hypergradient import Differentiation
from metapl.guards.step_hooks import tell_hooks_that_are_left_out
from metapl.guards.verification.check import STEPS, check_step, tell_left_out
from metapl.updates import options_of, parts_of
from metapl.updates.groups import with_options_of_groups
from metapl.updates.lists import is_set

LOG = logging.getLogger("metapl")

MOST_REMEMBERED = 128


class VerifiedCalls:
    """Keys of calls that were verified, the last :data:`MOST_REMEMBERED` of them."""

    def __init__(self) -> None:
        # With each key the objects whose addresses are in it. They are held weakly, and where one
        # has died, another may have its address.
        self._references: dict[Hashable, list[weakref.ref[Any]]] = {}
        # The orders of differentiation that calls with a key have chosen.
        self._orders: dict[Hashable, Orders] = {}

    def knows(self, key: Hashable, objects: Sequence[Any] = ()) -> bool:
        """Return whether a key was remembered with these very objects."""
        references = self._references.get(key)
        if references is None:
            return False
        return all(r() is o for r, o in zip(references, objects, strict=True))

    def remember(self, key: Hashable, objects: Sequence[Any] = ()) -> None:
        """Remember a key, and forget the first one where there are too many."""
        self._references.pop(key, None)
        self._orders.pop(key, None)
        self._references[key] = [weakref.ref(o) for o in objects]
        if len(self._references) > MOST_REMEMBERED:
            first = next(iter(self._references))
            del self._references[first]
            self._orders.pop(first, None)

    def orders(self, key: Hashable) -> Orders:
        """Return the orders of differentiation that calls with a key have chosen so far."""
        return self._orders.setdefault(key, Orders())


RATE = itemgetter("lr")

# Of the whole process: a hypergradient is a function, and no object of one call meets the next.
VERIFIED = VerifiedCalls()


def verify_first_call(differentiation: Differentiation, setting: bool | Literal["warn"]) -> Orders:
    """Verify a hypergradient, unless one like it was verified before.

    Returns: the orders of differentiation that calls with the same objects have chosen.

    Raises: :class:`metapl.MetaplError` for a wrong gradient.
    """
    objects = objects_of(differentiation)
    options = options_of_call(differentiation, setting)
    key = (*map(id, objects), options)
    if VERIFIED.knows(key, objects):
        return VERIFIED.orders(key)
    description = description_of_call(differentiation, options)
    if description is None or not VERIFIED.knows(description):
        verify(differentiation, setting)
    VERIFIED.remember(key, objects)
    if description is not None:
        VERIFIED.remember(description)
    return VERIFIED.orders(key)


def objects_of(differentiation: Differentiation) -> list[Any]:
    """Return the networks, the problem, the mode and the parts of the optimizer of a call."""
    request = differentiation.request
    parts: list[Any] = [request.teacher, request.student, request.problem]
    parts.append(differentiation.estimate)
    optimizer = request.inner_optimizer
    # Several optimizers, or the functions of a transform.
    parts += optimizer if isinstance(optimizer, tuple | list) else [optimizer]
    return [part for part in parts if part is not None]


def options_of_call(
    differentiation: Differentiation, setting: bool | Literal["warn"]
) -> tuple[Hashable, ...]:
    """Return what else verification depends on.

    That includes the fingerprint of the networks: their modes, frozen parts and hooks, and hooks on
    the optimizer's step.
    """
    request = differentiation.request
    return (
        tuple(differentiation.wrt),
        min(len(differentiation.inner_batches), STEPS),
        request.accumulate,
        request.clip_norm is None,
        setting,
        *(slots.mark for slots in differentiation.slots),
    )


def description_of_call(
    differentiation: Differentiation, options: tuple[Hashable, ...]
) -> Hashable:
    """Return what tells a call from those that compute something else; None: it cannot be told."""
    from metapl.functional.architecture import (
        Describer,
        Undescribed,
        description_of,
        description_of_object,
    )

    request = differentiation.request
    try:
        describer = Describer([request.teacher, request.student])
        return (
            describer.networks,
            describer.problem(differentiation.problem),
            description_of_object(differentiation.estimate),
            description_of(kinds_of_settings(differentiation)),
            options,
        )
    except Undescribed as error:
        LOG.info("verified, as each call with new objects: %s has no description", error.what)
        return None


def kinds_of_settings(differentiation: Differentiation) -> list[Any]:
    """Return the optimizers' classes and, of each setting, its value or whether a number is 0.

    A rate of another size is no other rule. A transform is known by its functions alone.
    """
    optimizer = differentiation.inner_optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    kinds: list[Any] = []
    for part in parts_of(optimizer):
        kinds.append(type(part))
        for group in options_of(part):
            of_group = {}
            for name, value in group.items():
                of_group[name] = is_set(value) if isinstance(value, float | Tensor) else value
            kinds.append(of_group)
    return kinds


def verify(differentiation: Differentiation, setting: bool | Literal["warn"]) -> None:
    """Verify a hypergradient, or say that it is left out."""
    request = differentiation.request
    # Gradients in settings are not compared, and compiled steps have some that eager ones lack.
    others = [name for name in differentiation.wrt if name not in differentiation.settings]
    request = replace(request, wrt=others or "teacher")
    if differentiation.options:
        # All steps that are verified are at the greatest rate: that of a warm-up's first steps may
        # be so small that rounding drowns what they change.
        options = max(differentiation.options, key=lambda groups: max(map(RATE, groups)))
        optimizer = with_options_of_groups(differentiation.inner_optimizer, options)
        request = replace(request, inner_optimizer=optimizer)
    of_networks = [differentiation.of_student]
    if differentiation.of_teacher is not None:
        of_networks.append(differentiation.of_teacher)
    tell_hooks_that_are_left_out(differentiation.update)
    if tell_left_out(of_networks):
        return
    try:
        check = check_step(request)
    except MissingDerivative as error:
        raise differentiation.with_proposal(error) from error
    check.refuse_or_warn(setting)
