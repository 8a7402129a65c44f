r"""Meta Pseudo Labels for many small classifiers at once: each step is written for one pair of networks, and
``torch.func.vmap`` runs it for the stack.

The feedback on K student steps θ_{k+1} = θ_k − η ∇ℓ_k(θ_k) is the adjoint recursion of
:mod:`metapl.feedback.inner_step` for plain SGD:

.. math:: \lambda_{K+1} = \nabla L(\theta_{K+1}), \quad w_k = -\eta \lambda_{k+1}, \quad
          h_k = \tfrac1B \tfrac{d}{d\varepsilon} \log S(x_k; \theta_k + \varepsilon w_k), \quad
          \lambda_k = \lambda_{k+1} + \nabla^2 \ell_k(\theta_k)\, w_k
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn import functional as F

from metapl.apps.recipes.two_moons import TwoMoons
from metapl.execution.kernels import load_forward_mode

Tree = dict[str, Tensor]
"""The parameters of one network, or, with one more dimension in front, of a stack."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


@dataclass(frozen=True)
class Stack:
    """Fully connected classifiers of one shape.

    Args:
        sizes: widths from the input to the classes.
        activation: between two layers.
    """

    sizes: tuple[int, ...]
    activation: str

    def initial(self, generators: Sequence[torch.Generator], scale: float) -> Tree:
        """Weights and biases of a network for each generator, uniform in ±``scale``."""
        networks = [self._initial_one(generator, scale) for generator in generators]
        return {name: rearrange([network[name] for network in networks], "run ... -> run ...") for name in networks[0]}

    def _initial_one(self, generator: torch.Generator, scale: float) -> Tree:
        def uniform(*shape: int) -> Tensor:
            return scale * (2 * torch.rand(shape, generator=generator) - 1)

        tree: Tree = {}
        for i, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            tree |= {f"{i}.weight": uniform(fan_in, fan_out), f"{i}.bias": uniform(fan_out)}
        return tree

    def __call__(self, params: Tree, x: Tensor) -> Tensor:
        """The logits of one network, (B, C)."""
        for i in range(len(self.sizes) - 1):
            x = ACTIVATIONS[self.activation](x) if i else x
            x = torch.addmm(params[f"{i}.bias"], x, params[f"{i}.weight"])
        return x

    def classes(self, params: Tree, x: Tensor) -> Tensor:
        """The classes that each network of a stack takes its own points (runs, B, 2) for, (runs, B)."""
        return vmap(self)(params, x).argmax(-1)


@dataclass(frozen=True)
class Batch:
    """The batches of one step, of one pair of networks or, with one more dimension in front, of a stack.

    Args:
        labeled, targets: (B_l, 2), and (B_l, C) one-hot.
        weak: (K·B, 2), the unlabeled points of K student steps.
        strong: the same as the student sees them; None: as they are.
        uniform: (B,) in [0, 1), by which labels are sampled; None for soft labels.
    """

    labeled: Tensor
    targets: Tensor
    weak: Tensor
    strong: Tensor | None = None
    uniform: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields."""
        return self.labeled, self.targets, self.weak, self.strong, self.uniform


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy against class probabilities, a scalar."""
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()


def _vjp(function: Callable[[Tree], Tensor], params: Tree) -> tuple[Tensor, Callable[[Tensor], tuple[Tree]]]:
    """``torch.func.vjp``, whose type does not say that it returns two values here."""
    value: tuple[Tensor, Callable[[Tensor], tuple[Tree]]] = vjp(function, params)  # type: ignore[assignment]
    return value


def descend(params: Tree, gradient: Tree, lr: float) -> Tree:
    """A step of SGD."""
    return {name: p - lr * gradient[name] for name, p in params.items()}


@dataclass(frozen=True)
class Steps:
    """The steps of one pair of networks, or of one network.

    Args:
        recipe: their settings.
    """

    recipe: TwoMoons

    @property
    def network(self) -> Stack:
        """The networks."""
        return Stack((2, *self.recipe.hidden, 2), self.recipe.activation)

    def teacher_and_student(self, teacher: Tree, student: Tree, batch: Batch) -> tuple[Tree, Tree]:
        """One step of Meta Pseudo Labels: K student steps, and a teacher step on the feedback and its own losses."""
        gradient, moved = self.teacher_gradient(teacher, student, batch)
        return descend(teacher, gradient, self.recipe.teacher_lr), moved

    def student_alone(self, teacher: Tree, student: Tree, batch: Batch) -> Tree:
        """K student steps on the labels of a teacher that stays as it is."""
        q = self.network(teacher, batch.weak).softmax(-1)
        return self._path(student, batch, self._targets(q, batch))[-1]

    def network_alone(self, params: Tree, batch: Batch, lr: float, *, uda: bool) -> Tree:
        """A step of one network on the labeled points and, with ``uda``, on UDA with the recipe's weight."""
        inputs = [batch.labeled, *(self._pair(batch) if uda else ())]
        logits, pullback = _vjp(lambda p: self.network(p, torch.cat(inputs)), params)
        parts = logits.split([len(x) for x in inputs])
        gradients = [self._at_labeled(parts[0], batch)]
        if uda:
            gradients += [torch.zeros_like(parts[1]), self._at_strong(parts[1], parts[2])]
        (gradient,) = pullback(torch.cat(gradients))
        return descend(params, gradient, lr)

    def teacher_gradient(self, teacher: Tree, student: Tree, batch: Batch) -> tuple[Tree, Tree]:
        """The gradient that the teacher descends, and the student after its K steps."""
        recipe = self.recipe
        inputs = [batch.weak, batch.labeled, *(self._pair(batch)[1:] if recipe.uda_weight else ())]
        # One pass of the teacher over all that it is asked about, and one backward pass from all of its outputs.
        logits, pullback = _vjp(lambda p: self.network(p, torch.cat(inputs)), teacher)
        on_unlabeled, on_labeled, *on_strong = logits.split([len(x) for x in inputs])
        q = on_unlabeled.softmax(-1)
        own = [recipe.supervised_loss * self._at_labeled(on_labeled, batch)]
        if on_strong:
            own.append(self._at_strong(on_unlabeled.chunk(recipe.lookahead)[-1], on_strong[0]))
        targets = self._targets(q, batch)
        path = self._path(student, batch, targets)
        if recipe.feedback_weight == 0:
            at_unlabeled = torch.zeros_like(q)
        elif recipe.mode == "reinforce":
            at_unlabeled = self.scalar_feedback(path, batch) * (q - targets[0])  # of h Σ CE(ŷ, T)
        else:
            h = self.feedback(path, batch, targets)
            at_unlabeled = -q * (h - (q * h).sum(-1, keepdim=True))  # of −Σ h·q
        (gradient,) = pullback(torch.cat([at_unlabeled * self._factor(at_unlabeled, own), *own]))
        return gradient, path[-1]

    def scalar_feedback(self, path: Sequence[Tree], batch: Batch) -> Tensor:
        """Algorithm 1's h for the score of all sampled labels, −⟨w, g⟩."""
        before, after = path
        v = self._outer_gradient(after, batch)
        # w = −ηv, and the step took ηg away.
        return torch.stack([(v[name] * (before[name] - after[name])).sum() for name in before]).sum()

    def feedback(self, path: Sequence[Tree], batch: Batch, targets: Sequence[Tensor]) -> Tensor:
        """The exact feedback h on the soft labels of all student steps, (K·B, C)."""
        adjoint = self._outer_gradient(path[-1], batch)
        inputs = self._inputs(batch)
        rows: list[Tensor] = []
        for k in reversed(range(len(targets))):
            w = {name: -self.recipe.student_lr * t for name, t in adjoint.items()}
            if k == 0:
                slope = self._slope(path[0], w, inputs[0])
            else:
                slope, curved = self._slope_and_curvature(path[k], w, inputs[k], targets[k])
                adjoint = {name: t + curved[name] for name, t in adjoint.items()}
            rows.append(slope / len(inputs[k]))
        return torch.cat(rows[::-1])

    # ------------------------------------------------------------------------------------------------- the student

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The points of each student step, as the student sees them."""
        seen = batch.weak if batch.strong is None else batch.strong
        return seen.chunk(self.recipe.lookahead)

    def _targets(self, q: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """The labels of each student step: q, or one-hot labels of two classes that are drawn from it."""
        if batch.uniform is not None:
            q = F.one_hot((batch.uniform >= q[..., 0]).long(), 2).to(q)
        return q.chunk(self.recipe.lookahead)

    def _path(self, student: Tree, batch: Batch, targets: Sequence[Tensor]) -> list[Tree]:
        """The student before and after each of its steps, θ_1 to θ_{K+1}."""
        path = [student]
        for x, target in zip(self._inputs(batch), targets, strict=True):
            g = grad(lambda p, x=x, target=target: cross_entropy(self.network(p, x), target))(path[-1])
            path.append(descend(path[-1], g, self.recipe.student_lr))
        return path

    def _outer_gradient(self, student: Tree, batch: Batch) -> Tree:
        gradient: Tree = grad(lambda p: cross_entropy(self.network(p, batch.labeled), batch.targets))(student)
        return gradient

    def _slope(self, params: Tree, w: Tree, x: Tensor) -> Tensor:
        """d/dε log S(x; θ + εw)."""
        slope: Tensor = jvp(lambda p: F.log_softmax(self.network(p, x), -1), (params,), (w,))[1]
        return slope

    def _slope_and_curvature(self, params: Tree, w: Tree, x: Tensor, target: Tensor) -> tuple[Tensor, Tree]:
        """The same, and the product of w with the Hessian of the student's loss."""

        def slopes(p: Tree) -> tuple[Tensor, Tree]:
            log_S, pullback = _vjp(lambda p: F.log_softmax(self.network(p, x), -1), p)
            (g,) = pullback(-target / len(x))
            return log_S, g

        tangents: tuple[Tensor, Tree] = jvp(slopes, (params,), (w,))[1]
        return tangents

    # ------------------------------------------------------------------------------------ the teacher's own losses

    def _pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The points of the last student step, as they are and with noise."""
        assert batch.strong is not None
        K = self.recipe.lookahead
        return batch.weak.chunk(K)[-1], batch.strong.chunk(K)[-1]

    def _at_labeled(self, logits: Tensor, batch: Batch) -> Tensor:
        """The gradient of the cross-entropy of the labeled points in the outputs."""
        return (logits.softmax(-1) - batch.targets) / len(logits)

    def _at_strong(self, weak: Tensor, strong: Tensor) -> Tensor:
        """The gradient of UDA in the outputs on noisy points; its target, from the outputs without noise, is fixed."""
        target = (weak / self.recipe.uda_temperature).softmax(-1)
        return self.recipe.uda_weight * (strong.softmax(-1) - target) / len(strong)

    def _factor(self, from_feedback: Tensor, own: Sequence[Tensor]) -> Tensor | float:
        """What the feedback is multiplied by."""
        if self.recipe.feedback_ratio is None:
            return self.recipe.feedback_weight
        size = torch.linalg.vector_norm(torch.cat(list(own)))
        norm = torch.linalg.vector_norm(from_feedback)
        factor = self.recipe.feedback_ratio * size / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return torch.where(norm > 0, factor, 0.0)


def stacked(step: Callable[..., Any], *networks: Tree, batch: Batch) -> Callable[..., Any]:
    """The step of one pair of networks, for a stack of them.

    It is recorded once as plain operations on stacked tensors and replayed, since a step of tiny networks costs mostly
    the dispatch of ``vmap`` itself.

    Args:
        step: of networks and a :class:`Batch`.
        networks, batch: of a stack, of the shapes that later steps have too.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = batch.tensors()
    here = tuple(i for i, t in enumerate(tensors) if t is not None)

    def one(networks: tuple[Tree, ...], columns: tuple[Tensor, ...]) -> Any:
        fields: list[Any] = [None] * len(tensors)
        for i, column in zip(here, columns, strict=True):
            fields[i] = column
        return step(*networks, Batch(*fields))

    load_forward_mode()
    recorded = make_fx(vmap(one))(networks, tuple(t for t in tensors if t is not None))
    recorded.graph.eliminate_dead_code()
    recorded.recompile()

    def run(*networks: Tree, batch: Batch) -> Any:
        fields = batch.tensors()
        return recorded(networks, tuple(fields[i] for i in here))

    return run
