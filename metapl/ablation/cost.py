"""What a call costs: floating-point operations, time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def _convolution_backward(*given: Any, **shapes: Any) -> int:
    """Either gradient takes as many as the pass forward.

    PyTorch's own formula does not divide by the groups.
    """
    grad_out, x, weight, *_, transposed, _padding, _groups, wanted = given
    return int(sum(wanted[:2]) * conv_flop_count(x, weight, grad_out, transposed))


FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward}


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call, of products and convolutions.

    The rest is not counted.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return int(counter.get_total_flops())


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What a call takes.

    On a CPU the processor's time where that is less than the time that passes.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    start, computed = time.perf_counter(), time.process_time()
    run()
    wait(device)
    passed = time.perf_counter() - start
    return passed if device.type == "cuda" else min(passed, time.process_time() - computed)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call holds at its fullest, beyond what was held before it, by the allocator's own account."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    # Or the profiler's library writes of its own start and end, past Python, on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # acc_events: without it torch 2.11 warns that events of an earlier cycle are dropped, of which
    # there is none.
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
