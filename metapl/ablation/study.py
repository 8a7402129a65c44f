"""Every mode on a model: `ablate` compares their gradients with the exact one and measures what a
call costs; what it finds is figures as values, as JSON and in lines of a terminal, and the mode
that they recommend."""

from __future__ import annotations

import copy
import json
import math
import textwrap
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.ablation.altered import Alteration, Altered
from metapl.ablation.cost import flops, peak_bytes, seconds
from metapl.ablation.figure import draw_modes
from metapl.ablation.mode_cost import ModeCost, ModeDistance
from metapl.data.feed import feed
from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import is_whole, length
from metapl.execution.checks import described
from metapl.execution.numerics import float32_products
from metapl.execution.state import RandomState, replayed
from metapl.feedback import MODES, Estimator, Implicit, Lookahead, Mode, estimator
from metapl.feedback.lookahead import InnerBatches
from metapl.problems.base import BilevelProblem, enters_input
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range, check_arguments
from metapl.runs.terminal import step_bar
from metapl.training.trainer import BilevelTrainer
from metapl.words import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draws = Annotated[int, Range(2)]  # of one draw no noise can be seen

# Rounds of timing where none are asked for: at least 5, and more for short calls, until a second
# has passed.
LEAST_ROUNDS, MOST_ROUNDS, TIMED = 5, 50, 1.0
CANNOT_RUN = MetaplError, RuntimeError, MemoryError  # what a mode raises that cannot run on a model

# A mode that should be exact is taken for it up to this distance: in bfloat16, and where the
# gradient itself is nearly zero, as in the first steps of Adam, two exact modes differ by as much
# as some hundredths.
TRUSTED = 0.1
NEAR = 0.01  # distance, noise included, up to which a gradient is near the exact one
# times, and bytes, that differ by no more than this fraction count as equal: timings are noisy
EQUAL = 0.1
# between modes that are equal otherwise: exact, without a second backward pass and its memory
PREFERRED = "forward"


@dataclass(frozen=True)
class Ablation:
    """What :func:`metapl.ablate` returns.

    Args:
        modes: by name: the costs, or the reason why a mode cannot run on this model.
        recommendation: which mode to take, and why.
        points: the steps of training that were looked at.
        altered: the figures of a mode's feedback, altered (:class:`metapl.ablation.Altered`);
            controls.
        recommended: the name in the recommendation; None where no mode can be recommended.
        float32_products: in what precision matrix products and convolutions of float32 were taken
            on the device; empty for a device that has no such switches.
    """

    modes: dict[str, ModeCost | str]
    recommendation: str
    points: tuple[int, ...]
    altered: dict[str, ModeCost | str] = field(default_factory=dict)
    recommended: str | None = None
    float32_products: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The fields as text: a reason in the place of figures is ``{"reason": ...}``, a number
        that is not finite null."""
        plain = asdict(self)
        for part in ("modes", "altered"):
            plain[part] = {
                n: {"reason": m} if isinstance(m, str) else m for n, m in plain[part].items()
            }
        finite = json.loads(json.dumps(plain), parse_constant=lambda name: None)
        return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ablation:
        """Return the ablation that :meth:`to_json` wrote; a null among the figures is read as nan.

        Raises: :class:`metapl.MetaplError` for other text.
        """
        try:
            plain = json.loads(text)
            for part in ("modes", "altered"):
                plain[part] = {name: _mode_of(figures) for name, figures in plain[part].items()}
            return cls(**plain | {"points": tuple(plain["points"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MetaplError(
                f"the text is no ablation ({type(error).__name__}: {error}); expected what "
                "Ablation.to_json wrote."
            ) from error

    def __repr__(self) -> str:
        return summary("Ablation", **vars(self))

    def __str__(self) -> str:
        return f"{self.table()}\n\n{textwrap.fill(self.recommendation, 80)}"

    def plot(self) -> Figure:
        """Draw the figures: above, how far each mode is from the exact gradient at each point of
        the training; below, what a call costs in passes, seconds and memory.

        A mark is the error of the mean over the draws, and the line behind it reaches to the
        distance of one draw.

        Returns: a figure of matplotlib, 4 inches wide: ``found.plot().savefig("modes.png",
        dpi=200)``. Raises: :class:`metapl.MetaplError` where matplotlib is not installed.
        """
        return draw_modes(self.modes, self.altered, self.points, self.recommended)

    def table(self) -> str:
        """The figures in lines of a terminal of 80 columns.

        The reasons for what is missing stand below.
        """
        lines = [
            f"{'mode':<22}{'cosine':>7}{'length':>8}{'error':>8}{'noise':>8}{'passes':>8}{'time, ms':>9}{'peak, KB':>9}"
        ]
        reasons: list[str] = []
        for modes in (self.modes, self.altered):
            if modes is self.altered and modes:
                lines.append("altered feedback, as a control:")
            for name, found in modes.items():
                if isinstance(found, str):
                    reasons += [found] * (found not in reasons)
                    lines.append(
                        f"{name:<22}  cannot run on this model [{reasons.index(found) + 1}]"
                    )
                else:
                    direction = f"{found.cosine:>7.3f}{found.length:>8.2g}"
                    distance = f"{found.relative_error:>8.2g}{found.noise_to_signal:>8.2g}"
                    cost = f"{found.passes:>8.1f}{found.seconds * 1e3:>9.3g}{found.peak_bytes / 1e3:>9.0f}"
                    lines.append(f"{name:<22}{direction}{distance}{cost}")
        texts = (
            f"[{number}] {' '.join(reason.split())}" for number, reason in enumerate(reasons, 1)
        )
        return "\n\n".join(
            [
                "\n".join(lines),
                *(textwrap.fill(text, 80, subsequent_indent="    ") for text in texts),
            ]
        )


def recommendation(
    modes: Mapping[str, ModeCost | str], exact_modes: Collection[str], never: Collection[str]
) -> tuple[str | None, str]:
    """The name of the mode to take, and the sentences that say so and what decided.

    Of the modes that are exact to rounding (``exact_modes``), and without noise, the fastest is
    taken; where times are within 10 % the one with the least memory; where that is too,
    ``forward``. Where none is, the same holds for those within 1 %; else the nearest in one draw is
    taken. Those in ``never`` are not recommended; None where no mode ran.
    """
    ran = {n: m for n, m in modes.items() if isinstance(m, ModeCost) and n not in never}
    if not ran:
        return (
            None,
            "No mode that gives feedback can run on this model; the reasons stand beside the "
            "modes.",
        )
    sure = {
        n: m
        for n, m in ran.items()
        if n in exact_modes and m.noise_to_signal == 0 and m.relative_error <= TRUSTED
    }
    near = {n: m for n, m in ran.items() if m.of_one_draw <= NEAR}
    name = min(ran, key=lambda n: ran[n].of_one_draw)
    why = (
        "no mode is exact, or nearly, and of one draw of labels its gradient is the nearest to "
        "the exact one"
    )
    if among := sure or near:

        def least(values: Mapping[str, float]) -> list[str]:
            return [
                name
                for name, value in values.items()
                if value <= min(values.values()) * (1 + EQUAL)
            ]

        fastest = least({n: m.seconds for n, m in among.items()})
        smallest = least({n: among[n].peak_bytes for n in fastest})
        name = (
            PREFERRED
            if PREFERRED in smallest
            else min(smallest, key=lambda n: among[n].of_one_draw)
        )
        why = "its gradient is " + (
            "the exact one to rounding" if sure else f"within {NEAR:.0%} of the exact one"
        )
        if len(among) > 1:
            decided = (
                "is the fastest" if len(fastest) == 1 else "takes the least memory of the fastest"
            )
            why += (
                f", and of {', '.join(among)} it "
                f"{decided if len(smallest) == 1 else 'is as fast and small as any'}"
            )
    found = ran[name]
    text = (
        f"Take {name}: {why}. A call takes {found.seconds * 1e3:.3g} ms and "
        f"{found.peak_bytes / 1e3:,.0f} KB."
    )
    if "reinforce" in ran and name != "reinforce":
        text += (
            f" Algorithm 1's scalar (reinforce) takes {ran['reinforce'].seconds * 1e3:.3g} ms, and "
            f"error and noise of one draw are {ran['reinforce'].of_one_draw:.2g} times the signal."
        )
    return name, text


def ablate(
    trainer: BilevelTrainer,
    labeled: Any,
    unlabeled: Any,
    modes: Sequence[Mode] | None = None,
    *,
    steps: AtLeastZero = 0,
    draws: Draws = 8,
    rounds: AtLeastOne | None = None,
    altered: bool = True,
    progress: bool = False,
) -> Ablation:
    r"""Compare the modes on a model: their gradients with the exact one, and what they cost.

    .. math:: \text{relative error} = \frac{\|\bar g - g^*\|}{\|g^*\|}, \qquad
              \text{noise to signal} = \frac{\sqrt{\tfrac1{n-1} \sum_i \|g_i - \bar g\|^2}}{\|g^*\|}

    with :math:`g^*` the exact gradient of the soft step, by double backward (by forward mode where
    the student has no second derivative), and :math:`\bar g` the mean of n draws of labels.
    Direction and length are told apart: a mode with ``reduction="mean"``, as Algorithm 1 is
    written, gives 1/B of the gradient, so g is taken as B times what it gives, and its ``length``
    is stated as it is.

    Args:
        trainer: the networks, the problem and the student's optimizer as they stand. It is left as
            it was. With ``lookahead=K`` the gradients are those through K steps.
        labeled, unlabeled: a batch each, as for ``trainer.step``, or sources of batches, as for
            ``trainer.fit``.
        modes: names or estimators; default: all.
        steps: number of training steps; the modes are compared before the first, in the middle and
            after the last. 0: at the trainer's state alone.
        draws: of labels, for modes that draw them, and of alterations; 2 or more.
        rounds: rounds of timing; the least time of a mode counts. None: 5, and more for short
            calls, for a second.
        altered: also measure, as controls, the feedback of ``forward``, or else of the first mode
            that runs and gives feedback on each example, altered in three ways
            (:class:`metapl.ablation.Altered`).
        progress: show on a terminal how far it is.

    Returns: an :class:`metapl.ablation.Ablation`. The trainer and the default generators are left
    as they were. Cost: some ``draws`` + ``rounds`` + 3 calls of each mode at each point, and the
    training between the points. Raises: :class:`metapl.MetaplError` where no exact gradient can be
    had.

    >>> import metapl, torch
    >>> trainer = metapl.BilevelTrainer(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), "reinforce")
    >>> labeled, unlabeled = (torch.randn(6, 4), torch.arange(6) % 3), torch.randn(8, 4)
    >>> found = ablate(trainer, labeled, unlabeled, ["forward", "reinforce"], draws=2, rounds=1)
    >>> round(found.modes["forward"].cosine, 3), found.recommended
    (1.0, 'forward')
    """
    if not isinstance(trainer, BilevelTrainer):
        raise MetaplError(
            f"ablate was given a trainer that is {described(trainer)}; expected a "
            "metapl.BilevelTrainer."
        )
    check_arguments(ablate, locals())
    given = (
        [estimator(mode) for mode in (MODES if modes is None else modes)]
        if not isinstance(modes, str)
        else []
    )
    estimates = {mode.name: mode for mode in given}
    if not given or len(estimates) < len(given):
        raise MetaplError(
            f"ablate was given modes={modes!r}; expected a list of one or more, each name once."
        )
    problem, device = trainer.problem, trainer.device
    distances: dict[str, list[ModeDistance]] = {}  # by mode, at each point
    reasons: dict[str, str] = {}  # why the others do not run
    drawing: set[str] = set()  # names of modes whose gradient has drawn labels in it

    def measure(names: Iterable[str], batches: tuple[Any, Any], exact: Tensor) -> None:
        for name in [name for name in names if name not in reasons]:
            mode, found = estimates[name], list[Tensor]()
            draws_any = isinstance(mode, Altered) and mode.alteration != "class_means"
            try:
                for seed in range(draws):
                    generator = torch.Generator(device).manual_seed(seed)
                    start = generator.get_state()
                    drawn = (
                        replace(mode, seed=mode.seed + seed) if isinstance(mode, Altered) else mode
                    )
                    found.append(_gradient(trainer, batches, drawn, generator))
                    # Seen by the generator's state, for draws of a confident teacher may be equal.
                    if not (
                        draws_any := draws_any or not torch.equal(start, generator.get_state())
                    ):
                        break
            except CANNOT_RUN as error:
                reasons[name] = _reason(error)
                continue
            drawing.update([name] * draws_any)
            examples = (
                length(InnerBatches.of_trainer(batches[1])[0])
                if getattr(mode, "reduction", "sum") == "mean"
                else 1
            )
            g = examples * torch.stack(found)  # (draws, weights)
            mean = g.mean(0)
            exact_norm = exact.norm().clamp_min(1e-300)
            # The mean of n draws has 1/n of their noise in it, which the spread of n draws is short
            # of.
            noise = ((g - mean).square().sum() / max(1, len(g) - 1)).sqrt() / exact_norm
            cosine = torch.nn.functional.cosine_similarity(mean, exact, dim=0)
            off = (mean - exact).norm() / exact_norm
            distance = ModeDistance(
                cosine=float(cosine),
                relative_error=float(off),
                noise_to_signal=float(noise),
                length=float(mean.norm() / examples / exact_norm),
            )
            distances.setdefault(name, []).append(distance)

    def student(batch: Any) -> None:
        with torch.no_grad(), replayed(RandomState.now(device)):
            arguments: list[Any] = [batch]
            if enters_input(problem):
                teacher: Any = copy.deepcopy(trainer.teacher)
                arguments.append(problem.signal(teacher, batch, None, generator=None))
            copy.deepcopy(trainer.student)(problem.student_input(*arguments))

    points, stop = tuple(sorted({0, steps // 2, steps})), steps + 1
    several = 1 if isinstance(unlabeled, Lookahead) else trainer.lookahead
    one_batch = isinstance(unlabeled, Tensor | dict | tuple | Lookahead)
    outer = feed(
        [labeled] if is_whole(labeled) else labeled, name="labeled", stop=stop, device=device
    )
    inner = feed(
        [unlabeled] if one_batch else unlabeled,
        name="unlabeled",
        stop=stop * several,
        device=device,
    )
    state, random = trainer.state_dict(), RandomState.now(device)
    try:
        with closing(outer), closing(inner), step_bar(progress, stop, "steps", 0) as update:
            for t in range(stop):
                ahead = [inner.next() for _ in range(several)]
                batches = outer.next(), ahead[0] if several == 1 else Lookahead(ahead)
                if t in points:
                    exact = _exact(trainer, batches)
                    measure(estimates, batches, exact)
                    if (
                        altered and t == 0
                    ):  # of the preferred mode, or else of the first that runs and can be altered
                        fit = [m for m in estimates.values() if m.credits in ("signal", "example")]
                        fit = [
                            m for m in fit if m.name not in reasons and not isinstance(m, Altered)
                        ]
                        base = min(fit, key=lambda mode: mode.name != PREFERRED, default=None)
                        controls = (
                            [Altered(base, kind) for kind in get_args(Alteration)] if base else []
                        )
                        added = {mode.name: mode for mode in controls if mode.name not in estimates}
                        estimates |= added
                        measure(added, batches, exact)
                if t < steps:
                    trainer.step(*batches)
                update()
        # What a call costs; the modes, which have run here before, take turns.
        one = flops(partial(student, InnerBatches.of_trainer(batches[1])[0]))
        calls = {
            n: partial(_gradient, trainer, batches, m)
            for n, m in estimates.items()
            if n not in reasons
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        for done in range(rounds or MOST_ROUNDS):
            if rounds is None and done >= LEAST_ROUNDS and time.perf_counter() - start > TIMED:
                break
            for name, run in calls.items():
                times[name].append(seconds(run, device))
        ran = {}
        for name, run in calls.items():
            by_point = distances[name]
            ran[name] = ModeCost(
                cosine=fmean(distance.cosine for distance in by_point),
                relative_error=_root_mean_square(
                    [distance.relative_error for distance in by_point]
                ),
                noise_to_signal=_root_mean_square(
                    [distance.noise_to_signal for distance in by_point]
                ),
                passes=flops(run) / one if one else math.nan,
                seconds=min(times[name]),
                peak_bytes=peak_bytes(run, device),
                length=fmean(distance.length for distance in by_point),
                by_point=tuple(by_point),
            )
    finally:
        trainer.load_state_dict(state)
        random.restore()
    compared: tuple[dict[str, ModeCost | str], ...] = {}, {}  # the modes, and the controls
    for name, mode in estimates.items():
        compared[isinstance(mode, Altered)][name] = reasons[name] if name in reasons else ran[name]
    sure = [name for name in compared[0] if estimates[name].exact and name not in drawing]
    # No feedback; and at the optimum, a gradient that is not through a step, with which it is
    # compared.
    never = [
        n
        for n in compared[0]
        if estimates[n].credits == "nothing" or isinstance(estimates[n], Implicit)
    ]
    taken, text = recommendation(compared[0], sure, never)
    return Ablation(
        modes=compared[0],
        recommendation=text,
        points=points,
        altered=compared[1],
        recommended=taken,
        float32_products=float32_products(device),
    )


def _mode_of(figures: dict[str, Any]) -> ModeCost | str:
    """Return a mode as :class:`Ablation` holds it, from what its JSON holds."""
    if "reason" in figures:
        return str(figures["reason"])
    by_point = tuple(
        ModeDistance(**_with_nan(distance)) for distance in figures.get("by_point", ())
    )
    return ModeCost(**_with_nan(figures) | {"by_point": by_point})


def _with_nan(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in figures.items()}


def _root_mean_square(values: Sequence[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values))


def _reason(error: BaseException) -> str:
    """A refusal in full.

    Of torch's errors, which may run over many lines, the first one, which says what is wrong.
    """
    return (
        str(error)
        if isinstance(error, MetaplError)
        else f"{type(error).__name__}: {reason_of(error)}"
    )


def _exact(trainer: BilevelTrainer, batches: tuple[Any, Any]) -> Tensor:
    reasons = []
    for mode in map(estimator, ("unrolled", "forward")):
        try:
            return _gradient(trainer, batches, mode, problem=trainer.problem.exact())
        except CANNOT_RUN as error:
            reasons.append(_reason(error))
    raise MetaplError(
        f"there is no exact gradient: by double backward, {reasons[0]}; by forward mode, "
        f"{reasons[1]}"
    )


def _gradient(
    trainer: BilevelTrainer,
    batches: tuple[Any, Any],
    mode: Estimator,
    generator: torch.Generator | None = None,
    problem: BilevelProblem | None = None,
) -> Tensor:
    """The teacher's gradient as one vector, float64.

    Of a problem without a teacher, the gradient in its signal.
    """
    generator = torch.Generator(trainer.device).manual_seed(0) if generator is None else generator
    found = trainer.hypergradient(*batches, mode, problem=problem, generator=generator)
    parts = (
        found.grads.values()
        if trainer.teacher is not None
        else [-h for h in pytree.tree_leaves(found.feedback)]
    )
    return torch.cat([part.flatten().double() for part in parts])
