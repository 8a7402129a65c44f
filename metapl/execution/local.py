"""A student on one device: the inner pass, and the passes at other weights that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metapl import checks
from metapl.compiled import uncompiled
from metapl.errors import MetaplError
from metapl.execution.agreement import coarsest
from metapl.execution.buffers import Slots, buffers_aside, copies, fresh, inputs_unchanged, stand_ins, swapped
from metapl.execution.kernels import (
    checkpoints_without_reentry,
    explained,
    load_forward_mode,
    no_fast_path,
    only_math_attention,
)
from metapl.execution.rng import RandomState, replayed
from metapl.numerics import Tree, full_float32, wide, wide_tree


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module learns, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Local:
    """Building it runs S(x_u; θ), the pass of record: it moves buffers and generators as training does.

    All other passes run with other weights swapped in, and leave weights, buffers and generators as they are: those of
    the inner batch on the draws and from the buffers of the inner pass, the outer one from the buffers that the inner
    pass left and on draws of its own.

    Args:
        student: in the mode (train or eval) that its owner left it in.
        inputs: what the student reads of the inner batch.
        double_backward: keep g differentiable.
    """

    def __init__(self, student: nn.Module, inputs: Any, *, double_backward: bool) -> None:
        self.student, self.inputs, self.double_backward = student, inputs, double_backward
        self.parameters = trainable(student)
        _refuse_late_hooks(self.parameters)
        self.device = next(iter(self.parameters.values())).device
        self.params: Tree = {name: p.detach() for name, p in self.parameters.items()}
        self._slots = Slots(student)
        self._random_before = RandomState.now(self.device)
        self._buffers_before = copies(self._slots.loose_buffers)
        with torch.enable_grad(), self._as_trained(), inputs_unchanged(inputs, "student"):
            outputs = checks.logits(student(inputs), "student")
        self._random_after = RandomState.now(self.device)
        self.rounded_to = coarsest([outputs.dtype, *(p.dtype for p in self.params.values())], self.device)
        self.graph: Tensor | None = wide(outputs)
        self.outputs = self.graph.detach()

    # ------------------------------------------------------------------------------------------- the inner pass

    def gradient(self, loss: Tensor) -> Tree:
        """∇_θ of a loss of the inner pass, of the parameters that it reaches; the graph is gone afterwards."""
        with self._as_trained():
            grads = torch.autograd.grad(
                loss, list(self.parameters.values()), create_graph=self.double_backward, allow_unused=True
            )
        self.graph = None
        return {name: g for name, g in zip(self.parameters, grads, strict=True) if g is not None}

    def gradient_through(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], leaf: Tensor) -> Tensor:
        """The derivative of what was made of :meth:`gradient`, in a leaf of the inner loss: double backward."""
        # A checkpoint of the inner pass runs again here, at θ.
        with self._as_trained(), buffers_aside(self.student):
            (found,) = torch.autograd.grad(outputs, leaf, cotangents, materialize_grads=True)
        return found

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        with checkpoints_without_reentry(), only_math_attention() if self.double_backward else nullcontext():
            yield

    # ------------------------------------------------------------------------------------------- the outer pass

    def loss(self, params: Tree, inputs: Any, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """A loss at other weights, without a graph."""
        with torch.no_grad(), no_fast_path(), checkpoints_without_reentry(), self._beside(params):
            return loss(self._run(inputs))

    def loss_and_gradient(self, params: Tree, inputs: Any, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tree]:
        """A loss and its gradient at other weights."""
        at = {name: p.detach().requires_grad_() for name, p in params.items()}
        math = only_math_attention() if self.double_backward else nullcontext()
        # The backward pass belongs into the block: checkpoints run the student again in it.
        with torch.enable_grad(), checkpoints_without_reentry(), math, self._beside(at):
            value = loss(self._run(inputs))
            v = torch.autograd.grad(value, list(at.values()), materialize_grads=True)
        return value.detach(), dict(zip(at, v, strict=True))

    @contextmanager
    def _beside(self, params: Tree) -> Iterator[None]:
        """Other weights, copies of the buffers that the inner pass left, and a stream of draws beside the caller's."""
        buffers = copies(self._slots.loose_buffers)
        with replayed(self._random_outer), self._slots.frozen(), swapped([*self._at(params), *buffers]):
            yield

    @cached_property
    def _random_outer(self) -> RandomState:
        # Whatever runs after the inner pass (the teacher, the next step) draws from its end on.
        return self._random_after.branch()

    # ----------------------------------------------------------------------------------------------- the replays

    def tangent(self, w: Tree) -> tuple[Tensor, Tensor]:
        """S(x_u; θ) and its derivative along w by forward-mode AD, without a graph."""
        load_forward_mode()
        with (
            torch.no_grad(),
            uncompiled(),
            forward_ad.dual_level(),
            only_math_attention(),
            checkpoints_without_reentry(),
            explained("forward"),
        ):
            duals = {name: forward_ad.make_dual(p, w[name]) for name, p in self.params.items() if name in w}
            with self._again(self._at(duals)):
                outputs, tangent = forward_ad.unpack_dual(self._run(self.inputs))
            return outputs.clone(), torch.zeros_like(self.outputs) if tangent is None else tangent.clone()

    def shifted(self, step: Tensor, direction: Tree) -> Tensor:
        """S(x_u; θ + step·direction) in float32 or wider, without autocast and TF32."""
        moved = {n: wide(p) + step * wide(direction[n]) if n in direction else wide(p) for n, p in self.params.items()}
        frozen = {id(t): wide(t) for _, _, t in self._slots.parameters if not t.requires_grad}
        held = [*self._at(moved), *stand_ins(self._slots.parameters, frozen)]
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            full_float32(self.device),
            no_fast_path(),
            checkpoints_without_reentry(),
            self._again(held, upcast=True),
        ):
            return self._run(wide_tree(self.inputs))

    @contextmanager
    def _again(self, held: Sequence[Any], *, upcast: bool = False) -> Iterator[None]:
        """The draws of the inner pass, and copies of the buffers that it began with."""
        buffers = fresh(self._buffers_before)
        if upcast:
            buffers = [(tensors, name, wide(t)) for tensors, name, t in buffers]
        with self._same_draws(), self._slots.frozen(), swapped([*held, *buffers]):
            yield

    def _same_draws(self) -> Any:
        return replayed(self._random_before)

    # -------------------------------------------------------------------------------------------------- plumbing

    def _at(self, params: Tree) -> list[Any]:
        return stand_ins(self._slots.parameters, {id(self.parameters[name]): p for name, p in params.items()})

    def _run(self, inputs: Any) -> Tensor:
        with inputs_unchanged(inputs, "student"):
            outputs: Tensor = wide(self.student(inputs))
        return outputs


def _refuse_late_hooks(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse hooks that wait for ``.grad``, which no pass here fills."""
    hooked = [name for name, p in parameters.items() if p._post_accumulate_grad_hooks]
    if hooked:
        raise MetaplError(
            f"the student's parameter {hooked[0]} has a hook of register_post_accumulate_grad_hook, which would never "
            "be called: metapl takes the student's gradient without filling .grad. Remove the hook, or use "
            "register_hook, which is called with the gradient."
        )
