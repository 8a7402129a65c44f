"""Guards around a step: if it fails, buffers, gradients and generators are restored; steps in threads take turns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import inputs_of
from metapl.execution.buffers import nothing_moved
from metapl.execution.kernels import NotByThisMode
from metapl.execution.rng import RandomState

step_lock = RLock()
"""Held while a step runs: replays set PyTorch's default generators and global switches, so other threads wait."""


@contextmanager
def restored_on_failure(generator: torch.Generator | None) -> Iterator[None]:
    """Restore a user's generator if the block fails."""
    before = None if generator is None else generator.get_state()
    try:
        yield
    except BaseException:
        if generator is not None and before is not None:
            generator.set_state(before)
        raise


@contextmanager
def parametrized_anew() -> Iterator[None]:
    """Compute parametrized weights anew in this block: those of ``parametrize.cached()`` are of other weights."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, {}


@contextmanager
def step_guard(
    *networks: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Iterator[checks.Fault]:
    """Run a step in this block; if it fails, restore buffers, gradients and generators.

    Args:
        networks: their buffers are restored.
        optimizer: the gradients of its parameters are cleared before and after; if the step fails, those that were
            there are put back. None: no network fills any.
        device: the networks' device.
        generator: the user's generator, if the step draws from one.

    Yields: the fault of the step's report, which collects checks of values on the device.
    """
    checks.no_inference_mode()
    fault = checks.Fault()
    with (
        step_lock,
        parametrized_anew(),
        checks.deferred_to(fault),
        restored_on_failure(generator),
        nothing_moved(*networks, random=RandomState.now(device)),
        torch.enable_grad(),
    ):
        groups = [] if optimizer is None else optimizer.param_groups
        before = [(p, p.grad) for group in groups for p in group["params"]]
        clear_gradients(optimizer)
        try:
            yield fault
        except BaseException:
            for p, grad in before:
                p.grad = grad
            raise
        else:
            clear_gradients(optimizer)
        finally:
            torch.clear_autocast_cache()  # it may hold casts of weights from before the step


def clear_gradients(optimizer: torch.optim.Optimizer | None) -> None:
    """``optimizer.zero_grad(set_to_none=True)`` without its bookkeeping, which would slow down small networks."""
    for group in () if optimizer is None else optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


@contextmanager
def types_explained(labeled: Any, unlabeled: Sequence[Any], **networks: nn.Module | None) -> Iterator[None]:
    """Turn an error about inputs of another type than the weights, or in one argument for several, into one that names
    batch and network.

    Args:
        labeled: the outer batch.
        unlabeled: the inner ones.
        networks: by role; None: no such network.
    """
    try:
        yield
    except (MetaplError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, MetaplError) else error
        batches = [("labeled", inputs_of(labeled)), *(("unlabeled", inputs_of(batch)) for batch in unlabeled)]
        if cause is not error:
            # Of a feedback pass: the student's own pass has taken the unlabeled batch, and inputs like it.
            taken = [checks.types(inputs) for _, inputs in batches[1:]]
            batches = [] if checks.types(batches[0][1]) in taken else batches[:1]
        for role, network in networks.items():
            weight = None if network is None else next((p for p in network.parameters() if p.is_floating_point()), None)
            for name, inputs in batches:
                if isinstance(cause, RuntimeError):
                    checks.explain_type(cause, inputs, weight, f"the {role}", f"{name} inputs")
        raise
    except checks.WRONG_CALL as error:
        checks.explain_call(error, **networks)
        raise


_DTYPES = re.compile(r"dtype|scalar type|(?:Half|BFloat16|Float|Double)\w* and (?:bias|weight) type", re.IGNORECASE)


@contextmanager
def casts_explained() -> Iterator[None]:
    """Turn PyTorch's error about mixed dtypes in a feedback pass into one that names the cause."""
    try:
        yield
    except MetaplError:
        raise
    except RuntimeError as error:
        if not _DTYPES.search(str(error)):
            raise
        raise NotByThisMode(
            f"it runs the student in float32, and a cast inside the student does not go along "
            f'({str(error).splitlines()[0]}); expected weights of one type, and precision="bfloat16" instead of casts.'
        ) from error
