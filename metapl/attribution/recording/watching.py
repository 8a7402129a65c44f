"""What a loop does between two steps, seen at the functions of PyTorch that it calls.

Hooks see the calls of a network and the steps of an optimizer. Two things have no hook: which loss
was backpropagated, and how gradients were clipped. Both are seen where every loop goes through,
``torch.autograd.backward``, which ``Tensor.backward`` calls, and the two functions that
``torch.nn.utils.clip_grad_norm_`` is made of. They are put back when the recording ends, and do
what they did meanwhile.

A loss counts that reaches a call of the network, or its weights. A loop may train another network
beside it, whose losses are not its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from metapl.errors import MetaplError
from metapl.execution.graphs import nodes_of
from metapl.updates import parameters_of

# A module whose two parts of clip_grad_norm_ are private to a type checker.
_CLIP: Any = clip_grad
_UTILS: Any = torch.nn.utils
_AUTOGRAD: Any = torch.autograd


class StepWatch:
    """What was seen since the last step.

    Args:
        weights: those of the network that is followed.
        before_backward: is called before each backward pass that is not within another.

    Attributes:
        losses: scalars that were backpropagated to the network, without their graphs.
        has_reached_call: whether a backward pass has come to a call of the network since this was
            last set to False; the recorder sets it.
        is_in_backward: whether ``torch.autograd.backward`` is running.
        clip_norm: the greatest norm that gradients were clipped to; None: they were not.
        clipped: the parameters whose gradients were clipped, by identity.
        gradient_versions: those of the weights' gradients when the last backward pass had ended.
        refusal: why the clipping cannot be followed; "" where it can.
    """

    def __init__(self, weights: Iterable[Tensor], before_backward: Callable[[], object]) -> None:
        self.before_backward = before_backward
        self._parameters = [*weights]
        self._weights = {id(p) for p in self._parameters}
        self.has_reached_call = False
        self.is_in_backward = False
        self.begin()

    def begin(self) -> None:
        """Forget what was seen, before a next step."""
        self.losses: list[Tensor] = []
        self.clip_norm: float | None = None
        self.clipped: frozenset[int] = frozenset()
        self.gradient_versions: list[int] = []
        self.refusal = ""
        self._norm_type = 2.0

    def note_losses(self, tensors: Any) -> None:
        """Note the scalars among tensors whose backward pass has ended.

        Those that have reached neither a call of the network nor its weights are not noted.
        """
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        roots = [t for t in tensors if isinstance(t, Tensor)]
        if not self.has_reached_call and not self._reach_weights(roots):
            return
        for t in roots:
            if t.numel() == 1:
                self.losses.append(t.detach().reshape(()))
        self.gradient_versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [p.grad._version for p in self._parameters if p.grad is not None]

    def are_gradients_gone(self) -> bool:
        """Return whether what was backpropagated was thrown away by ``zero_grad``.

        Zeros are looked for where something has written to the gradients since, so that no host
        waits for a device between usual micro-batches.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if gradients and self._versions_now() == self.gradient_versions:
            return False
        return not any(bool(g.any()) for g in gradients)

    def _reach_weights(self, roots: Iterable[Tensor]) -> bool:
        """Return whether the graph of some tensors ends at a weight of the network.

        Cost: a walk over the graph, for losses alone that have reached no call of the network.
        """
        return any(id(getattr(node, "variable", None)) in self._weights for node in nodes_of(roots))

    def note_norm(self, norm_type: Any) -> None:
        """Note which norm of the gradients is taken."""
        self._norm_type = float(norm_type)

    def note_clipping(self, parameters: Any, max_norm: Any) -> None:
        """Note that gradients are clipped to a norm; to infinity, as a look at it, is none."""
        if float(max_norm) == math.inf:
            return
        if self.clip_norm is not None:
            self.refusal = (
                "gradients that are clipped twice in a step; expected once, after the last of its "
                "micro-batches"
            )
        if self._norm_type != 2.0:
            self.refusal = (
                f"gradients clipped by their {self._norm_type:g}-norm; expected the 2-norm"
            )
        self.clip_norm = float(max_norm)
        self.clipped = frozenset(id(p) for p in parameters if p.grad is not None)

    def note_clipped_values(self) -> None:
        """Note that each entry of the gradients is clipped."""
        self.refusal = "clip_grad_value_, which clips each entry; expected clip_grad_norm_"


@contextmanager
def watching(watch: StepWatch) -> Iterator[None]:
    """Let a watch see losses and clipping in this block."""
    backward: Callable[..., Any] = _AUTOGRAD.backward
    get_total_norm: Callable[..., Any] = _CLIP._get_total_norm
    clip_grads: Callable[..., Any] = _CLIP._clip_grads_with_norm_
    clip_values: Callable[..., Any] = _UTILS.clip_grad_value_

    def watched_backward(tensors: Any, *args: Any, **options: Any) -> Any:
        watch.has_reached_call = False
        if not isinstance(tensors, Tensor):
            # They may come one by one.
            tensors = [*tensors]
        # A checkpoint calls it within another.
        was_in_backward = watch.is_in_backward
        if not was_in_backward:
            watch.before_backward()
        watch.is_in_backward = True
        try:
            result = backward(tensors, *args, **options)
        finally:
            watch.is_in_backward = was_in_backward
        watch.note_losses(tensors)
        return result

    def watched_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **options: Any) -> Any:
        watch.note_norm(norm_type)
        return get_total_norm(tensors, norm_type, *args, **options)

    def watched_clipping(
        parameters: Any, max_norm: float, total_norm: Tensor, *args: Any, **options: Any
    ) -> Any:
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        parameters = [*parameters]
        watch.note_clipping(parameters, max_norm)
        return clip_grads(parameters, max_norm, total_norm, *args, **options)

    def watched_values(*args: Any, **options: Any) -> Any:
        watch.note_clipped_values()
        return clip_values(*args, **options)

    replacements = [
        (_AUTOGRAD, "backward", watched_backward),
        (_CLIP, "_get_total_norm", watched_norm),
        (_CLIP, "_clip_grads_with_norm_", watched_clipping),
        (_UTILS, "clip_grads_with_norm_", watched_clipping),
        (_UTILS, "clip_grad_value_", watched_values),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, replacement in replacements:
            setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def refuse_clipping(watch: StepWatch, optimizer: torch.optim.Optimizer) -> None:
    """Refuse clipping that the rule of the steps does not have."""
    if watch.refusal:
        raise MetaplError(f"record: the loop has {watch.refusal}.")
    if watch.clip_norm is None:
        return
    with_gradient = frozenset(id(p) for p in parameters_of(optimizer) if p.grad is not None)
    if not with_gradient <= watch.clipped:
        raise MetaplError(
            f"record: the loop clips the gradients of {len(watch.clipped & with_gradient)} of "
            f"{len(with_gradient)} parameters together; expected those of all of them."
        )
