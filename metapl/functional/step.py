r"""One step of Algorithm 1 as one pure function, in every mode but ``implicit``:

    state, report = step(state, outer, inner, noise=None)

Nothing is hidden: weights, buffers, optimizers, their settings and the step's number go in and come
out, labels are drawn by the noise that is given, and only dropout draws from torch's default
generator. So ``torch.compile`` takes the step whole, ``torch.func.vmap`` takes many states at once,
and it can be read from top to bottom.

The mathematics is that of :mod:`metapl.feedback.forward`. With z = S(x_u; θ) and its pullback c ↦
(∂z/∂θ)ᵀ c,

- g = (∂z/∂θ)ᵀ ∂ℓ/∂z, θ′ = U(θ, g), v = ∇L(θ′), w = (∂U/∂g)ᵀ v;
- ż = (∂z/∂θ) w is the *transpose of the pullback*, which is linear in c: its own pullback along w.
  So the student runs once, and ż has the dropout masks and the batch statistics of that one pass;
- h = −∂/∂(signal) ⟨∂ℓ/∂z (z, signal), ż⟩, in the head alone;
- the teacher's gradient is that of −λ Σ sg(h)·signal + Σ its own losses, by one pullback of its
  passes; where L reads the teacher itself, λ L(sg(θ′); θ_T) is added, the direct term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metapl.execution.numerics import Tree, as_real
from metapl.feedback.door import has_direct_term, outer_loss_reads_more
from metapl.feedback.size import FeedbackSize, ratio_of
from metapl.functional.state import (
    Function,
    Network,
    Report,
    State,
    as_dict,
    dot,
    moves,
    norm,
    on_value,
    rounded_steps,
    with_fields,
)
from metapl.problems.base import (
    Problem,
    Signal,
    enters_input,
    overrides,
    reads_signal_in_outer_input,
    sum_and_weight,
)
from metapl.problems.losses import sum_of_terms
from metapl.updates import Update

Step = Callable[..., tuple[State, Report]]
grad, grad_and_value, vmap = torch.func.grad, torch.func.grad_and_value, torch.func.vmap
vjp: Any = torch.func.vjp


class End(NamedTuple):
    """What the student's K steps end in."""

    L: Tensor  # L(θ′)
    z: Tensor  # (B, ...), of the last step
    losses: list[Tensor]  # ℓ of each step
    g: list[Tree]  # and its gradient
    signals: list[dict[str, Any]]  # what each signal holds, with the teacher's graph
    h: list[Tree]  # the feedback on these
    own: Tree  # the teacher's own losses, by name
    G_own: Tree  # and the gradient of their sum, where it is taken by itself
    theta: Tree
    s: Any  # the optimizer's state
    at_S: Tree  # the student's buffers
    at_T: Tree  # the teacher's
    gap: Tensor  # between the sides of ⟨∂ℓ/∂z, ż⟩ = ⟨g, w⟩, relative to their terms


def make_step(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    mode: Any,  # an Estimator
    inner_update: Update,  # U of the student, perhaps behind a clip
    outer_update: Update | None,  # that of the teacher
    constants: Sequence[list[dict[str, Any]]],  # what their param groups hold besides the settings
    losses_for: Callable[[Any], Sequence[Any]],  # the teacher's own losses, by the inner batch
    *,
    steps: int = 1,  # K
    feedback_size: FeedbackSize,  # the rule that gives λ
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Step:
    """The step of these networks, losses and rules.

    The modules' own tensors are not read, those of the state are.
    """
    T, S, kind = Function(teacher, "teacher"), Function(student), mode.name
    enters, revises = enters_input(problem), overrides(problem, "revised_signal")
    composed = kind == "unrolled" or steps > 1 or enters
    first = (
        steps if kind == "none" else steps - (getattr(mode, "truncate", None) or steps)
    )  # of those with feedback
    judges_with_signal = reads_signal_in_outer_input(problem)
    reads_teacher = outer_loss_reads_more(problem, teacher)
    adds_direct_term = has_direct_term(kind, problem, teacher)
    compares = feedback_size.compares and kind != "none"
    takes_mean = getattr(mode, "reduction", "sum") == "mean"
    unit = (
        "cosine"
        if getattr(mode, "similarity", "") == "cosine"
        else getattr(mode, "normalization", "gradient")
    )

    def step(state: State, outer: Any, inner: Any, noise: Any = None) -> tuple[State, Report]:
        batches, noises = (
            ([inner], [noise]) if steps == 1 else (list(inner), list(noise or [None] * steps))
        )
        judged = problem.outer_batch(outer)
        rates, teacher_rates = (
            [{**group, **now} for group, now in zip(groups, optimizer.settings, strict=True)]
            for groups, optimizer in zip(constants, (state.inner, state.outer), strict=True)
        )

        def run(theta: Tree, at_S: Tree, k: int, *entering: Signal) -> tuple[Tensor, Tree]:
            """z = S(x_k; θ), (B, ...), and the buffers that the pass leaves."""
            return S.outputs(theta, at_S, problem.student_input(batches[k], *entering))

        def outer_loss(
            theta: Tree, at_S: Tree, signal: Signal, theta_T: Tree = state.teacher.params
        ) -> Tensor:
            """L, by a pass with batch statistics of its own, which leaves the running ones as they are."""

            def judge(_: Any) -> Tensor:
                entering = [signal] if judges_with_signal else []
                z, left = S.outputs(theta, at_S, problem.outer_input(judged, *entering))
                # A loss may read ``student.parameters()``, so it is called while these weights are
                # in the student.
                (total, count), _ = S.at(
                    theta, left, lambda network: sum_and_weight(problem.outer_loss(z, judged))
                )
                loss: Tensor = total / count
                return loss

            # Where L reads the teacher, the module holds θ_T meanwhile.
            L: Tensor = (
                T.at(theta_T, state.teacher.state, judge)[0] if reads_teacher else judge(None)
            )
            return L

        def ask(
            theta_T: Tree, at_T: Tree, k: int, z: Tensor | None
        ) -> tuple[Any, Tree, Tree, Tree]:
            """Line 2: ŷ ~ T(x_u), or the soft label; and with the last batch lines 6-7, the teacher's own losses.

            Returns: the signal, the losses by name, their gradient where it is taken apart from
            that of the feedback, and the teacher's buffers. Losses that read no graph of the signal
            are differentiated by themselves: a pullback of both would run through all passes of the
            teacher once more.
            """
            losses = losses_for(batches[k]) if k == steps - 1 else ()
            are_apart = compares and all(getattr(loss, "detaches_signal", False) for loss in losses)

            def own_losses(network: Any, signal: Signal) -> Tree:
                given = {
                    "labeled": judged,
                    "unlabeled": batches[k],
                    "signal": signal,
                    "step": state.step,
                }
                return sum_of_terms(network, losses, **given)

            def asked(network: Any) -> tuple[Signal, Tree]:
                signal: Any = problem.signal(network, batches[k], z, generator=noises[k])
                return signal, {} if are_apart else own_losses(network, signal)

            (signal, own), left = T.at(theta_T, at_T, asked)
            if not losses or not are_apart:
                return signal, own, {}, left
            known = signal.detached()

            def sum_of_losses(theta_T: Tree) -> tuple[Tensor, tuple[Tree, Tree]]:
                own, left_by_losses = T.at(
                    theta_T, left, lambda network: own_losses(network, known)
                )
                return torch.stack([*own.values()]).sum(), (own, left_by_losses)

            G_own, (_, (own, left)) = grad_and_value(sum_of_losses, has_aux=True)(
                state.teacher.params
            )
            return signal, own, G_own, left

        def in_units(h: Tree, w: Tree, g: Tree) -> Tree:
            """h as it is, by the learning rate, or by ‖w‖‖g‖."""
            if unit == "gradient":
                return h
            eta = rates[0]["lr"] if unit == "learning_rate" else norm(w) * norm(g)
            return {name: t / torch.where(eta > 0, eta, 1.0) for name, t in h.items()}

        def walk(k: int, theta_T: Tree, theta: Tree, s: Any, at_S: Tree, at_T: Tree) -> End:
            """Lines 2 to 4: the student's step k and those after it, and the feedback on the signal of each."""
            none: Any = (None, None, at_S)
            z, pull, left = none if enters else vjp(lambda t: run(t, at_S, k), theta, has_aux=True)
            given, own, G_own, at_T = ask(theta_T, at_T, k, None if z is None else z.detach())
            own_signal = [as_dict(given)]
            signal = given.detached()  # a constant for the student
            fields = signal.differentiable()
            if signal.sampled and kind in (
                "forward",
                "difference",
            ):  # the expectation over labels, at the drawn ones
                fields = {
                    "value": torch.zeros_like(signal.probs).scatter(
                        -1, signal.value[..., None], 1.0
                    )
                }  # (B, C)

            def mean_loss(
                z: Tensor, theta: Tree, fields: Tree, buffers: Tree, u: Tensor | float = 1.0
            ) -> Tensor:
                given = signal.having(fields)
                losses, _ = S.at(
                    theta, buffers, lambda network: problem.inner_loss(z, given, batches[k], theta)
                )
                mean: Tensor = (u * losses).mean()  # of (B,)
                return mean

            def gradient(fields: Tree) -> Any:
                """Line 3: ℓ and g = ∇_θ (1/B) Σ ℓ_i, with the pass that they come from."""
                at, back, after = z, pull, left
                if enters:
                    entering = signal if signal.sampled else signal.having(fields)
                    at, back, after = vjp(lambda t: run(t, at_S, k, entering), theta, has_aux=True)
                (c, direct), loss = grad_and_value(mean_loss, (0, 1))(at, theta, fields, after)
                g = {name: t + direct[name] for name, t in back(c)[0].items()}
                return loss, g, at, after

            def onward(fields: Tree) -> tuple[Tensor, End]:
                """L(θ_K) as a function of signal k, through this step and all after it."""
                loss, g, z_k, after = gradient(fields)
                moved, s_k = inner_update.update(theta, g, s, rates)  # line 3: θ′ = U(θ, g)
                if k + 1 < steps:
                    end = walk(k + 1, theta_T, moved, s_k, after, at_T)
                    end = with_fields(
                        end,
                        losses=[loss, *end.losses],
                        g=[g, *end.g],
                        signals=[*own_signal, *end.signals],
                    )
                    return end.L, end
                L = (
                    torch.full_like(loss, torch.nan)
                    if kind == "none"
                    else outer_loss(moved, after, signal)
                )
                return L, End(
                    L,
                    z_k,
                    [loss],
                    [g],
                    own_signal,
                    [],
                    own,
                    G_own,
                    moved,
                    s_k,
                    after,
                    at_T,
                    0 * loss,
                )

            def slope(
                fields: Tree, u: Tensor, z: Tensor, z_dot: Tensor, w: Tree
            ) -> tuple[Tensor, Tensor]:
                """d/dε (1/B) Σ u_i ℓ_i(z + εż, signal, θ + εw), and the size of its terms."""
                c, direct = grad(mean_loss, (0, 1))(z, theta, fields, left, u)
                terms = {
                    "z": c * z_dot,
                    **{name: as_real(t) * as_real(w[name]) for name, t in direct.items()},
                }
                return torch.stack([t.sum() for t in terms.values()]).sum(), norm(terms)

            if k < first:
                _, end = onward(fields)
                zero = (
                    {}
                    if kind == "none"
                    else {name: torch.zeros_like(t) for name, t in fields.items()}
                )
                return with_fields(end, h=[zero, *end.h])
            if composed and fields:  # line 4: h = −dL(θ_K)/d(signal k), by the composed derivative
                L, pull_L, end = vjp(onward, fields, has_aux=True)
                h = {name: -t for name, t in pull_L(torch.ones_like(L))[0].items()}
                end = with_fields(end, h=[in_units(h, {}, {}), *end.h])
            else:
                loss, g, z, left = gradient({})
                moved, s_k = inner_update.update(theta, g, s, rates)  # line 3: θ′ = U(θ, g)
                w, gap = g, 0 * loss
                if (
                    kind == "loss_difference"
                ):  # line 4: h = L(θ) − L(θ′), under the same dropout masks
                    weights = {n: torch.stack([t, moved[n]]) for n, t in theta.items()}
                    buffers = {n: torch.stack([t, t]) for n, t in left.items()}
                    both = vmap(
                        lambda theta, at_S: outer_loss(theta, at_S, signal), randomness="same"
                    )
                    before, L = both(weights, buffers)
                    h = {"log_prob": before - L}
                else:
                    v, L = grad_and_value(outer_loss)(moved, left, signal)  # line 4: v = ∇L(θ′)
                    w = inner_update.pullback(theta, g, s, v, rates)  # w = (∂U/∂g)ᵀ v
                    h = {"log_prob": -dot(w, g)}
                if kind in ("forward", "difference", "reinforce_per_example"):
                    if "difference" in (kind, getattr(mode, "tangent", "")):
                        ahead, behind, distance = moves(mode, theta, w)
                        with torch.autocast(z.device.type, enabled=False):
                            z_dot = (run(ahead, at_S, k)[0] - run(behind, at_S, k)[0]) / distance
                    else:
                        z_dot = vjp(lambda c: pull(c)[0], torch.zeros_like(z))[1](w)[
                            0
                        ]  # ż = (∂z/∂θ) w, (B, ...)
                    u, by_example = (
                        torch.ones(len(z), dtype=z.dtype, device=z.device),
                        kind == "reinforce_per_example",
                    )
                    found, (along, size) = grad_and_value(slope, int(by_example), has_aux=True)(
                        fields, u, z, z_dot, w
                    )
                    h = (
                        {"log_prob": -found}
                        if by_example
                        else {name: -t for name, t in found.items()}
                    )
                    rounding = (
                        1e4 * torch.finfo(z.dtype).eps * norm(g) * norm(w)
                    )  # where both sides cancel
                    size = size + norm({n: t * w[n] for n, t in g.items()}) + rounding
                    gap = (along - dot(g, w)).abs() / size.clamp_min(torch.finfo(z.dtype).tiny)
                shaped = [in_units(h, w, g)]
                end = End(
                    L, z, [loss], [g], own_signal, shaped, own, G_own, moved, s_k, left, at_T, gap
                )
            if revises:  # line 3 once more, on the signal that the problem makes of the feedback
                real = problem.revised_signal(signal, on_value(end.h[0], signal.value))
                if real is not None:
                    loss, g, *_ = gradient(real.fields())
                    moved, s_k = inner_update.update(theta, g, s, rates)
                    end = with_fields(
                        end, losses=[loss], g=[g], signals=[as_dict(real)], theta=moved, s=s_k
                    )
            return end

        def objective(theta_T: Tree) -> tuple[tuple[Tensor, Tensor], Any]:
            """Lines 2 to 7 as a function of the teacher's weights.

            Σ sg(h)·signal, and the sum of its own losses.
            """
            end = walk(
                0,
                theta_T,
                state.student.params,
                state.inner.state,
                state.student.state,
                state.teacher.state,
            )
            h, mode_state = end.h, state.mode
            if "baseline" in state.mode:  # the moving average from before this step
                raw = h[0]["log_prob"]
                b = state.mode["baseline"].to(raw)
                h, mode_state = (
                    [{"log_prob": raw - b}],
                    {"baseline": mode.baseline * b + (1 - mode.baseline) * raw},
                )
            push = 0 * end.losses[0]
            for found, signal in zip(h, end.signals, strict=True):
                for (
                    name,
                    t,
                ) in (
                    found.items()
                ):  # where labels were drawn, h on their values is on their distribution
                    field = "probs" if "log_prob" in signal and name == "value" else name
                    term = (t.detach() * Signal(**signal).fields()[field]).sum()
                    # Algorithm 1: h times the mean cross-entropy.
                    push = push + (term / len(signal["log_prob"]) if takes_mean else term)
            if adds_direct_term:  # −L(θ′; θ_T) at fixed θ′
                theta_end, at_end = (
                    {n: t.detach() for n, t in tree.items()} for tree in (end.theta, end.at_S)
                )
                push = push - outer_loss(theta_end, at_end, Signal(**end.signals[-1]), theta_T)
            return (push, torch.stack([0 * push, *end.own.values()]).sum()), (end, h, mode_state)

        theta_T, s_T, G = state.teacher.params, state.outer.state, {}
        sizes: Tree = {}
        with autocast(), sdpa_kernel(SDPBackend.MATH):  # fused kernels have no second derivative
            if theta_T:
                (_, own), pull_T, (end, h, mode_state) = vjp(objective, theta_T, has_aux=True)
                one = torch.ones_like(own)
                if compares:
                    (G_h,) = pull_T((-one, 0 * one))
                    G_own = end.G_own or pull_T((0 * one, one))[0]
                    weight = feedback_size.weight_for(norm(G_h), norm(G_own))
                    G = {name: weight * t + G_own[name] for name, t in G_h.items()}
                    sizes = {
                        "feedback_weight": weight,
                        "feedback_ratio": ratio_of(weight, norm(G_h), norm(G_own)),
                    }
                else:
                    (G,) = pull_T((-feedback_size.weight * one, one))
            else:
                (_, own), (end, h, mode_state) = objective({})
        if outer_update is not None and (
            kind != "none" or end.own
        ):  # line 8; what nothing reaches does not decay
            theta_T, s_T = outer_update.update(theta_T, G, s_T, teacher_rates)

        signals = [as_dict(Signal(**signal).detached()) for signal in end.signals]
        found = [
            on_value(t, signal["value"]) if t else 0 * own
            for t, signal in zip(h, signals, strict=True)
        ]
        shown = (found, signals) if steps > 1 else (found[0], signals[0])
        loss, sums = (
            torch.stack(end.losses).mean(),
            [own, *(t.sum() for tree in h for t in tree.values())],
        )
        flag = end.gap + 0 * (loss + torch.stack(sums).sum())  # NaN where anything is not finite
        theta, s, rounding = rounded_steps(
            inner_update, state.student.params, end, state.inner.state, rates
        )
        report = Report(
            shown[0], shown[1], end.z.detach(), loss, end.L, own, flag, end.own, rounding, sizes
        )
        networks = Network(theta_T, end.at_T), Network(theta, end.at_S)
        optimizers = with_fields(state.inner, state=s), with_fields(state.outer, state=s_T)
        return State(*networks, *optimizers, mode_state, state.step + 1), report

    return step
