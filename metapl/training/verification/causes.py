"""What a step has in it, or has changed, that may make a gradient wrong: looked for once it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metapl.errors import few
from metapl.execution.batch import leaves_of
from metapl.execution.graphs import nodes_of, types_in_graphs
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


def own_functions_in(t: Tensor) -> list[str]:
    """Return the names of a user's autograd functions in a graph."""
    names = {
        type(node).__name__.removesuffix("Backward")
        for node in nodes_of([t])
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
    shorter = types_in_graphs(ends) - {torch.float64}
    return max((torch.finfo(dtype).eps for dtype in shorter), default=0.0)
