r"""One step of Algorithm 1 as one pure function, in every mode but ``implicit``.

    step(state, outer, inner, noise=None) -> (state, report)

Nothing is hidden: weights, buffers, optimizers, their settings and the step's number go in and come out; labels are
drawn by the noise that is given; only dropout draws from torch's default generator. So ``torch.compile`` takes the step
whole, ``torch.func.vmap`` takes many states at once, and it can be read from top to bottom.

The mathematics is that of :mod:`metapl.feedback.forward`. With z = S(x_u; θ) and its pullback c ↦ (∂z/∂θ)ᵀ c,

- g = (∂z/∂θ)ᵀ ∂ℓ/∂z, θ′ = U(θ, g), v = ∇L(θ′), w = (∂U/∂g)ᵀ v;
- ż = (∂z/∂θ) w is the *transpose of the pullback*, which is linear in c: its own pullback along w. So the student runs
  once, and ż has the dropout masks and the batch statistics of that one pass;
- h = −∂/∂(signal) ⟨∂ℓ/∂z (z, signal), ż⟩, in the head alone;
- the teacher's gradient is that of −λ Σ sg(h)·signal + Σ its own losses, by one pullback of its passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.execution.checks import logits
from metapl.execution.numerics import Tree, wide
from metapl.feedback.difference import RELATIVE_STEP
from metapl.functional.network import Function, Network
from metapl.functional.state import Optimizer, Report, State
from metapl.problems.base import Problem, Signal, field_of, sum_and_weight
from metapl.problems.losses import TeacherLoss
from metapl.updates import Update

Step = Callable[..., tuple[State, Report]]
grad, grad_and_value, vmap = torch.func.grad, torch.func.grad_and_value, torch.func.vmap
vjp: Any = torch.func.vjp  # whose type leaves out has_aux


class Walk(NamedTuple):
    """What the student's K steps end in."""

    L: Tensor  # L(θ′)
    z: Tensor  # (B, ...), of the last step
    losses: list[Tensor]  # ℓ of each step
    signals: list[Tree]  # the fields of the signals, with the teacher's graph
    h: list[Tree]  # the feedback on these
    own: Tree  # the teacher's own losses, by name
    theta: Tree
    s: Any  # the optimizer's state
    at_S: Tree  # the student's buffers
    at_T: Tree  # the teacher's
    gap: Tensor  # between the two sides of ⟨∂ℓ/∂z, ż⟩ = ⟨g, w⟩, relative to their terms


def dot(a: Tree, b: Tree) -> Tensor:
    """⟨a, b⟩ over trees of weights."""
    return torch.stack([(wide(a[name]) * wide(b[name])).sum() for name in a]).sum()


def norm(a: Tree) -> Tensor:
    return dot(a, a).sqrt()


def moves(mode: Any, theta: Tree, w: Tree) -> tuple[Tree, Tree, Tensor]:
    """θ + δŵ, θ − δŵ (or θ), and the length between them along w; see :class:`metapl.feedback.Difference`."""
    flat = {name: wide(t) for name, t in theta.items()}
    dtype, count = next(iter(flat.values())).dtype, sum(t.numel() for t in flat.values())
    r = getattr(mode, "relative_step", None) or RELATIVE_STEP[dtype]
    factor = r * (norm(flat) / math.sqrt(count)).clamp_min(1e-3) / norm(w).clamp_min(torch.finfo(dtype).tiny)
    ahead = {name: t + factor * w[name] for name, t in flat.items()}
    if getattr(mode, "one_sided", False):
        return ahead, flat, factor
    return ahead, {name: t - factor * w[name] for name, t in flat.items()}, 2 * factor


def make_step(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    mode: Any,  # an Estimator
    inner_update: Update,  # U of the student, perhaps behind a clip
    outer_update: Update | None,  # that of the teacher
    kept: tuple[list[dict[str, Any]], list[dict[str, Any]]],  # what their param groups hold besides the settings
    losses_for: Callable[[Any], Sequence[TeacherLoss]],  # the teacher's own losses, by the inner batch
    *,
    steps: int = 1,  # K
    weight: float = 1.0,  # λ
    ratio: float | None = None,  # in its place, the norm of the feedback's gradient over that of the own losses'
    enters: bool = False,  # whether the signal enters the student's input
    reads: bool = True,  # whether the inner loss reads the student's weights
    revises: bool = False,  # whether the problem makes the real step's signal of the feedback
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Step:
    """The step of these networks, losses and rules; the modules' own tensors are not read, those of the state are."""
    T, S, kind = Function(teacher), Function(student), mode.name
    composed = kind == "unrolled" or steps > 1 or (enters and kind == "forward")
    first = steps if kind == "none" else steps - (getattr(mode, "truncate", None) or steps)  # of those with feedback
    unit = "cosine" if getattr(mode, "similarity", "") == "cosine" else getattr(mode, "normalization", "gradient")

    def step(state: State, outer: Any, inner: Any, noise: Any = None) -> tuple[State, Report]:
        batches, noises = ([inner], [noise]) if steps == 1 else (list(inner), list(noise or [None] * steps))
        judged, now = problem.outer_batch(outer), cast(int, state.step)  # a tensor, for tensor expressions
        rates = [{**group, **now} for group, now in zip(kept[0], state.inner.settings, strict=True)]
        teacher_rates = [{**group, **now} for group, now in zip(kept[1], state.outer.settings, strict=True)]

        def run(theta: Tree, at_S: Tree, k: int, *entering: Signal) -> tuple[Tensor, Tree]:
            """z = S(x_k; θ), (B, ...), and the buffers that the pass leaves."""
            x = problem.student_input(batches[k], *entering)
            z, left = S.at(theta, at_S, lambda network: network(x))
            return wide(logits(z, "student")), left

        def outer_loss(theta: Tree, at_S: Tree) -> Tensor:
            """L, by a pass with batch statistics of its own, which leaves the running ones as they are."""
            z, _ = S.at(theta, at_S, lambda network: network(problem.outer_input(judged)))
            total, count = sum_and_weight(problem.outer_loss(wide(logits(z, "student")), judged))
            return total / count

        def ask(theta_T: Tree, at_T: Tree, k: int, z: Tensor | None) -> tuple[Signal, Tree, Tree]:
            """Line 2: ŷ ~ T(x_u), or the soft label; and with the last batch lines 6-7, the teacher's own losses."""

            def asked(network: Any) -> tuple[Signal, Tree]:
                own: Tree = {}
                signal = problem.signal(network, batches[k], z, generator=noises[k])  # type: ignore[arg-type]
                for loss in losses_for(batches[k]) if k == steps - 1 else ():
                    value = loss(network, labeled=judged, unlabeled=batches[k], signal=signal, step=now)
                    own[loss.name] = own[loss.name] + value if loss.name in own else value
                return signal, own

            (signal, own), left = T.at(theta_T, at_T, asked)
            return signal, own, left

        def in_units(h: Tree, w: Tree | None = None, g: Tree | None = None) -> Tree:
            """h as it is, by the learning rate, or by ‖w‖‖g‖."""
            size: Any = 1.0
            if unit == "learning_rate":
                size = torch.where(rates[0]["lr"] > 0, rates[0]["lr"], 1.0)
            elif w is not None and g is not None:
                size = (norm(w) * norm(g)).clamp_min(1e-30)
            return h if unit == "gradient" else {name: t / size for name, t in h.items()}

        def revised(end: Walk, signal: Signal, gradient: Callable[[Signal], Any], theta: Tree, s: Any) -> Walk:
            """The student's real step, where the problem makes its signal of the feedback."""
            h = end.h[0]
            at = {key: h[field_of(key)] for key in signal.value} if isinstance(signal.value, dict) else h["value"]
            real = problem.revised_signal(signal, at)
            if real is None:
                return end
            loss, g, *_ = gradient(real)
            moved, s = inner_update.update(theta, g, s, rates)
            return end._replace(losses=[loss], signals=[real.fields()], theta=moved, s=s)

        def walk(k: int, theta_T: Tree, theta: Tree, s: Any, at_S: Tree, at_T: Tree) -> Walk:
            """Lines 2 to 4: the student's step k and those after it, and the feedback on the signal of each."""
            z, pull, left = (None, None, at_S) if enters else vjp(lambda t: run(t, at_S, k), theta, has_aux=True)
            given, own, at_T = ask(theta_T, at_T, k, None if z is None else z.detach())
            signal = given.detached()  # a constant for the student
            fields = signal.differentiable()
            if signal.sampled and kind in ("forward", "difference"):  # the expectation over labels, at the drawn ones
                assert signal.probs is not None
                fields = {"value": F.one_hot(signal.value, signal.probs.shape[-1]).to(signal.probs.dtype)}  # (B, C)

            def losses(z: Tensor, signal: Signal, theta: Tree) -> Tensor:
                return problem.inner_loss(z, signal, batches[k], theta)  # (B,)

            def gradient(signal: Signal) -> Any:
                """Line 3: ℓ and g = ∇_θ (1/B) Σ ℓ_i, with the pass that they come from."""
                back: Any
                at, back, after = z, pull, left
                if enters:
                    at, back, after = vjp(lambda t: run(t, at_S, k, signal), theta, has_aux=True)
                of = (0, 1) if reads else 0
                c, loss = grad_and_value(lambda z, t: losses(z, signal, t).mean(), of)(at, theta)
                g = back(c[0] if reads else c)[0]
                return loss, {n: t + c[1][n] for n, t in g.items()} if reads else g, at, back, after

            def onward(fields: Tree) -> tuple[Tensor, Walk]:
                """L(θ_K) as a function of signal k, through this step and all after it."""
                loss, g, z_k, _, after = gradient(signal.having(fields))
                moved, s_k = inner_update.update(theta, g, s, rates)  # line 3: θ′ = U(θ, g)
                if k + 1 < steps:
                    end = walk(k + 1, theta_T, moved, s_k, after, at_T)
                    end = end._replace(losses=[loss, *end.losses], signals=[given.fields(), *end.signals])
                    return end.L, end
                L = torch.full_like(loss, torch.nan) if kind == "none" else outer_loss(moved, after)
                return L, Walk(L, z_k, [loss], [given.fields()], [], own, moved, s_k, after, at_T, 0 * loss)

            def slope(fields: Tree, u: Tensor, z: Tensor, z_dot: Tensor, w: Tree) -> tuple[Tensor, Tensor]:
                """d/dε (1/B) Σ u_i ℓ_i(z + εż, signal, θ + εw), and the size of its terms."""

                def mean(z: Tensor, theta: Tree) -> Tensor:
                    return (u * losses(z, signal.having(fields), theta)).mean()

                c = grad(mean, (0, 1) if reads else 0)(z, theta)
                terms = {
                    "": (c[0] if reads else c) * z_dot,
                    **({n: t * w[n] for n, t in c[1].items()} if reads else {}),
                }
                return torch.stack([t.sum() for t in terms.values()]).sum(), norm(terms)

            if k < first:
                _, end = onward(fields)
                return end._replace(h=[{name: torch.zeros_like(t) for name, t in fields.items()}, *end.h])
            if composed:  # h = −dL(θ_K)/d(signal k), by the composed derivative
                L, pull_L, end = vjp(onward, fields, has_aux=True)
                h = in_units({name: -t for name, t in pull_L(torch.ones_like(L))[0].items()})
                end = end._replace(h=[h, *end.h])
                return revised(end, signal, gradient, theta, s) if revises else end
            loss, g, z, pull, left = gradient(signal)
            moved, s_k = inner_update.update(theta, g, s, rates)  # line 3: θ′ = U(θ, g)
            w, gap = g, torch.zeros_like(loss)
            if kind == "loss_difference":  # line 4: h = L(θ) − L(θ′), under the same dropout masks
                pair = {n: torch.stack([t, moved[n]]) for n, t in theta.items()}
                before, L = vmap(outer_loss, randomness="same")(pair, {n: torch.stack([t, t]) for n, t in left.items()})
                h = {"log_prob": before - L}
            else:
                v, L = grad_and_value(outer_loss)(moved, left)  # line 4: v = ∇L(θ′)
                w = inner_update.pullback(theta, g, s, v, rates)  # w = (∂U/∂g)ᵀ v
            if kind == "reinforce":
                h = {"log_prob": -dot(w, g)}
            elif kind == "difference" and enters:  # h = −d/dε ∂ℓ/∂(signal) at θ + εw
                ahead, behind, span = moves(mode, theta, w)

                def at(theta: Tree) -> Tree:
                    def inner_loss(fields: Tree) -> Tensor:
                        entering = signal.having(fields)
                        return losses(run(theta, at_S, k, entering)[0], entering, theta).mean()

                    found: Tree = grad(inner_loss)(fields)
                    return found

                there, back = at(ahead), at(behind)
                h = {n: (back[n] - there[n]) / span for n in fields}
            elif kind != "loss_difference":
                if "difference" in (kind, getattr(mode, "tangent", "")):
                    ahead, behind, span = moves(mode, theta, w)
                    with torch.autocast(z.device.type, enabled=False):
                        z_dot = (run(ahead, at_S, k)[0] - (run(behind, at_S, k)[0])) / span
                else:
                    z_dot = vjp(lambda c: pull(c)[0], torch.zeros_like(z))[1](w)[0]  # ż = (∂z/∂θ) w, (B, ...)
                by_example, ones = kind == "reinforce_per_example", torch.ones(len(z), dtype=z.dtype, device=z.device)
                found, (along, size) = grad_and_value(slope, int(by_example), has_aux=True)(fields, ones, z, z_dot, w)
                h = {"log_prob": -found} if by_example else {n: -t for n, t in found.items()}
                products = {n: t * w[n] for n, t in g.items()}
                rounding = 1e4 * torch.finfo(z.dtype).eps * norm(g) * norm(w)
                gap = (along - dot(g, w)).abs() / (size + norm(products) + rounding).clamp_min(1e-30)
            h = in_units(h, w, g)
            end = Walk(L, z, [loss], [given.fields()], [h], own, moved, s_k, left, at_T, gap)
            return revised(end, signal, gradient, theta, s) if revises else end

        def objective(theta_T: Tree) -> tuple[tuple[Tensor, Tensor], tuple[Walk, list[Tree], Tree]]:
            """Lines 2 to 7 as a function of the teacher's weights: Σ sg(h)·signal, and the sum of its own losses."""
            end = walk(0, theta_T, *state.student[:1], state.inner.state, state.student.state, state.teacher.state)
            h, mode_state = end.h, state.mode
            if "baseline" in state.mode:  # of a moving average, the value from before this step
                raw = h[0]["log_prob"]
                b = state.mode["baseline"].to(raw)
                h, mode_state = [{"log_prob": raw - b}], {"baseline": mode.baseline * b + (1 - mode.baseline) * raw}
            push = torch.zeros_like(end.losses[0])
            for found, signal in zip(h, end.signals, strict=True):
                for name, t in found.items():  # on labels whose expectation was taken, h is on their distribution
                    push = (
                        push
                        + (t.detach() * signal["probs" if "log_prob" in signal and name == "value" else name]).sum()
                    )
            own = torch.stack([torch.zeros_like(push), *end.own.values()]).sum()
            return (push, own), (end, h, mode_state)

        with autocast():
            if teacher is None:
                (_, own), (end, h, mode_state) = objective({})
            else:
                (_, own), pull_T, (end, h, mode_state) = vjp(objective, state.teacher.params, has_aux=True)
                one, zero = torch.ones_like(own), torch.zeros_like(own)
                if ratio is None:
                    G = pull_T((-weight * one, one))[0]
                else:
                    of_h, of_own = pull_T((-one, zero))[0], pull_T((zero, one))[0]
                    size = norm(of_h)
                    factor = torch.where(size > 0, ratio * norm(of_own) / size, 0.0)
                    G = {name: factor * t + of_own[name] for name, t in of_h.items()}
        theta_T, s_T = state.teacher.params, state.outer.state
        if outer_update is not None and (first < steps or end.own):  # line 8; without feedback and losses it stays
            theta_T, s_T = outer_update.update(theta_T, G, s_T, teacher_rates)
        finite = torch.stack([end.losses[0], own, *(t.sum() for found in h for t in found.values())]).sum() * 0
        feedback = [next(iter(found.values())) if {"value", "log_prob"} & {*found} else found for found in h]
        signals = [{name: t.detach() for name, t in signal.items()} for signal in end.signals]
        several = steps > 1
        report = Report(
            feedback=feedback if several else feedback[0],
            signal=signals if several else signals[0],
            student_outputs=end.z,
            inner_loss=torch.stack(end.losses).mean(),
            outer_loss=end.L,
            teacher_loss=own,
            flag=end.gap + finite,
            teacher_losses=end.own,
        )
        moved = State(
            Network(theta_T, end.at_T),
            Network(end.theta, end.at_S),
            Optimizer(end.s, state.inner.settings),
            Optimizer(s_T, state.outer.settings),
            mode_state,
            state.step + 1,
        )
        return moved, report

    return step
