"""What a call costs: floating-point operations, time and memory."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.module_tracker import ModuleTracker


def _convolution_backward(*arguments: Any, **shapes: Any) -> int:
    """Count the operations of a convolution's gradients, each as many as the pass forward.

    PyTorch's own formula does not divide by the groups.
    """
    gradient, inputs, weight, *_, transposed, _padding, _groups, output_mask = arguments
    wants_inputs, wants_weight, *_ = output_mask
    one_gradient = conv_flop_count(inputs, weight, gradient, transposed)
    return int((wants_inputs + wants_weight) * one_gradient)


def _recurrent(inputs: Sequence[int], *weights: Any, **shapes: Any) -> int:
    """Count the products of fused recurrent layers.

    Each row of each step is multiplied by each matrix once; other weights are biases.
    """
    in_matrices = sum(math.prod(shape) for shape in weights if len(shape) == 2)
    return int(2 * math.prod(inputs[:-1]) * in_matrices)


def _recurrent_on_cpu(inputs: Sequence[int], *arguments: Any, **shapes: Any) -> int:
    """Count the products of a layer of oneDNN, whose two matrices come first.

    Without biases they follow once more.
    """
    return _recurrent(inputs, *arguments[:2])


def _recurrent_on_cpu_backward(inputs: Sequence[int], *arguments: Any, **shapes: Any) -> int:
    """Count those of its gradients, in its inputs and in its weights."""
    return 2 * _recurrent_on_cpu(inputs, *arguments)


def _recurrent_on_cuda(inputs: Sequence[int], weights: Any, *arguments: Any, **shapes: Any) -> int:
    """Count the products of all layers and directions, whose weights are one list."""
    return _recurrent(inputs, *weights)


def _recurrent_on_cuda_backward(
    inputs: Sequence[int], weights: Any, *arguments: Any, **shapes: Any
) -> int:
    """Count those of its gradients, in its inputs and, where they are asked for, its weights."""
    wants_weights = bool(arguments[-1][-1])
    return (1 + wants_weights) * _recurrent(inputs, *weights)


def _attention(*arguments: Any, **shapes: Any) -> int:
    """Count the products of queries, keys and values."""
    return int(sdpa_flop_count(*arguments[:3]))


def _attention_backward(*arguments: Any, **shapes: Any) -> int:
    """Count those of their gradients, for which the kernel computes the weights again."""
    return int(sdpa_backward_flop_count(*arguments[:4]))


def _matrix_by_vector(*arguments: Any, **shapes: Any) -> int:
    """Count a product whose last but one argument is the matrix, and the last one the vector."""
    rows, columns = arguments[-2]
    return int(2 * rows * columns)


# What PyTorch's counter leaves out, or counts otherwise.
ATEN = torch.ops.aten
FORMULAS = {
    ATEN.convolution_backward: _convolution_backward,
    ATEN.mkldnn_rnn_layer: _recurrent_on_cpu,
    ATEN.mkldnn_rnn_layer_backward: _recurrent_on_cpu_backward,
    ATEN._cudnn_rnn: _recurrent_on_cuda,
    ATEN._cudnn_rnn_backward: _recurrent_on_cuda_backward,
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    ATEN.mv: _matrix_by_vector,
    ATEN.addmv: _matrix_by_vector,
}


class NoModules(ModuleTracker):
    """Follows no module, so that operations count for the whole call alone.

    PyTorch's own tracker has hooks on what modules return. They fail where a gradient is asked for
    in a leaf that a module returns, as a table of learned numbers does.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


def flops(run: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call, of products and convolutions alone."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = NoModules()
    with counter:
        run()
    return int(counter.get_total_flops())


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes.

    On a CPU that is the processor's time, where it is less than the time that passes.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    processor_start = time.process_time()
    run()
    if is_cuda:
        torch.cuda.synchronize(device)
    passed = time.perf_counter() - start
    if is_cuda:
        return passed
    return min(passed, time.process_time() - processor_start)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes that a call holds at its fullest, by the allocator's own account.

    What was held before it does not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        bytes_before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - bytes_before)
    # What was left before, and is freed meanwhile, would count against what the call holds.
    gc.collect()
    # Else the profiler's library writes of its own start and end, past Python, on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # Not torch.profiler, which makes a tree of all operations as it ends, or warns in torch 2.11.
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        run()
    results: Any = profile.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    allocated = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        # What is freed has a negative number of bytes.
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
