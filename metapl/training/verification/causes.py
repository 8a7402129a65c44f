"""What a step has in it, or has changed, that may make a gradient wrong: looked for once it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import few
from metapl.execution.batch import leaves_of
from metapl.training.verification.case import Case
from metapl.training.verification.real_step import Evaluation, RealStep


def likely_causes(case: Case) -> list[str]:
    """Return what is found in the networks and batches of a step, in words."""
    before = case.step
    after = case.real.copies
    causes = []
    hooked = []
    counting = []
    for part, part_after in pairs_of_parts(before, after):
        if part._forward_hooks or part._backward_hooks:
            hooked.append(type(part).__name__)
        for name, value in vars(part_after).items():
            if isinstance(value, int | float) and vars(part).get(name) != value:
                counting.append(name)
    if hooked:
        causes.append(f"hooks (of {few(hooked, 3)})")
    if counting:
        causes.append(f"attributes that a pass changes ({few(counting, 3)})")
    if changes_batches(before, after):
        causes.append("batches changed in place")
    functions = own_functions_in(case.real.outputs[-1])
    if functions:
        causes.append(f"autograd functions of the student's own ({few(functions, 3)})")
    return causes


def pairs_of_parts(before: RealStep, after: RealStep) -> list[tuple[nn.Module, nn.Module]]:
    """Return the modules of both networks before and after a step."""
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for network, network_after in (
        (before.student, after.student),
        (before.teacher, after.teacher),
    ):
        if network is not None and network_after is not None:
            pairs += zip(network.modules(), network_after.modules(), strict=False)
    return pairs


def changes_batches(before: RealStep, after: RealStep) -> bool:
    """Return whether a step has changed a tensor of its batches."""
    leaves = leaves_of([before.inner_batches, before.outer_batch])
    leaves_after = leaves_of([after.inner_batches, after.outer_batch])
    for t, t_after in zip(leaves, leaves_after, strict=True):
        if isinstance(t, Tensor) and not t.equal(t_after):
            return True
    return False


def graph_nodes(*tensors: Tensor) -> list[Any]:
    """Return all nodes of the graphs that end in some tensors, each once."""
    nodes: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(nodes)
    # The list grows while it is read.
    for node in nodes:
        inputs = {before for before, _ in node.next_functions if before is not None}
        nodes += inputs - seen
        seen |= inputs
    return nodes


def own_functions_in(t: Tensor) -> list[str]:
    """Return the names of a user's autograd functions in a graph."""
    names = {
        type(node).__name__.removesuffix("Backward")
        for node in graph_nodes(t)
        if hasattr(node, "_forward_cls")
    }
    return sorted(names)


def coarsest_rounding(evaluation: Evaluation) -> float:
    """Return the rounding of the coarsest type in the graphs of an evaluation.

    0 where all are in float64.
    """
    ends = [evaluation.inner_loss, evaluation.outputs[-1]]
    for signal in evaluation.signals:
        ends += signal.fields().values()
    dtypes: set[torch.dtype] = set()
    for node in graph_nodes(*ends):
        dtypes |= {result.dtype for result in getattr(node, "_input_metadata", ())}
    shorter = [dtype for dtype in dtypes - {torch.float64} if dtype.is_floating_point]
    return max((torch.finfo(dtype).eps for dtype in shorter), default=0.0)
