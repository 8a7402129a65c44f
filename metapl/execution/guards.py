"""What surrounds a step, so that one that fails or meets another leaves things as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import nn

from metapl import checks
from metapl.errors import MetaplError
from metapl.execution.buffers import nothing_moved
from metapl.execution.rng import RandomState

one_at_a_time = RLock()
"""Held while a step runs: PyTorch's default generators and switches, which passes are replayed by, belong to the whole
process, so a step in another thread waits."""


@contextmanager
def restored_on_failure(generator: torch.Generator | None) -> Iterator[None]:
    """Put a generator of the user's own back if the block fails."""
    before = None if generator is None else generator.get_state()
    try:
        yield
    except BaseException:
        if generator is not None and before is not None:
            generator.set_state(before)
        raise


@contextmanager
def step_guard(
    *networks: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Iterator[checks.Fault]:
    """Surround a step: where the block fails, buffers, gradients and generators are as they were before it.

    Args:
        networks: whose buffers the step moves.
        optimizer: its gradients are cleared before and after.
        device: of the networks.
        generator: one of the user's own that the step draws from.

    Yields: what is found wrong with values on the device, for the step's report.
    """
    checks.no_inference_mode()
    fault = checks.Fault()
    with (
        one_at_a_time,
        checks.deferred_to(fault),
        restored_on_failure(generator),
        nothing_moved(*networks, random=RandomState.now(device)),
        torch.enable_grad(),
    ):
        clear_gradients(optimizer)
        try:
            yield fault
        finally:
            clear_gradients(optimizer)
            torch.clear_autocast_cache()  # it may hold casts of weights that have just moved


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.zero_grad(set_to_none=True)`` without its bookkeeping, which a step of a small network would feel."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


_DTYPES = re.compile(r"dtype|scalar type|(?:Half|BFloat16|Float|Double)\w* and (?:bias|weight) type", re.IGNORECASE)


@contextmanager
def casts_explained(mode: str) -> Iterator[None]:
    """Turn PyTorch's refusal to mix number formats in a feedback pass, where the inner pass met none, into an error
    that names the cause."""
    try:
        yield
    except MetaplError:
        raise
    except RuntimeError as error:
        if not _DTYPES.search(str(error)):
            raise
        raise MetaplError(
            f"mode '{mode}' runs the student in float32, and a cast inside the student does not go along "
            f'({str(error).splitlines()[0]}). Use mode="forward", or weights of one type and precision="bfloat16" '
            "instead of casts."
        ) from error
