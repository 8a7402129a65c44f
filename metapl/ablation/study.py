"""Every mode on a model.

`ablate` compares their gradients with the exact one and measures what a call costs. What it returns
is figures as values, as JSON and in lines of a terminal, and the mode that they recommend.
"""

from __future__ import annotations

import copy
import json
import math
import textwrap
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, is_dataclass, replace
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
from metapl.core.lookahead import InnerBatches
from metapl.data.feed import feed
from metapl.data.held_values import names_written, numbers_of
from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import Batch, is_record_of_rows, is_whole, length
from metapl.execution.checks import unexpected
from metapl.execution.numerics import float32_products, no_fast_path
from metapl.execution.outside import DrawsOutside, refusing_draws_outside
from metapl.execution.state import RandomState, replayed
from metapl.feedback import MODES, Estimator, Lookahead, Mode, estimator
from metapl.guards.verification.causes import why_again
from metapl.problems.base import BilevelProblem, enters_input
from metapl.runs.checkpoint import rng_state, set_rng_state
from metapl.runs.fields import AtLeastOne, AtLeastZero, Range, check_arguments
from metapl.runs.terminal import step_bar
from metapl.training.trainer import BilevelTrainer
from metapl.words import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of one draw no noise can be seen.
Draws = Annotated[int, Range(2)]

# Rounds of timing where none are asked for: at least 5, and more for short calls, until a second
# has passed.
LEAST_ROUNDS = 5
MOST_ROUNDS = 50
SECONDS_OF_ROUNDS = 1.0

# The errors of a mode that cannot run on a model.
CANNOT_RUN = (MetaplError, RuntimeError, MemoryError)

# The outer batch, and the inner batch or a look-ahead of several.
Batches = tuple[Any, Any]

# A mode that should be exact is taken for it up to this distance: in bfloat16, and where the
# gradient itself is nearly zero, as in the first steps of Adam, two exact modes differ by as much
# as some hundredths.
TRUSTED = 0.1

# A gradient is near the exact one up to this distance, noise included.
NEAR = 0.01

# Gradients of one step and one draw differ by less, as an accelerator adds up in any order.
ROUNDING = 1e-5

# Times, and bytes, that differ by no more than this fraction count as equal: timings are noisy.
EQUAL = 0.1


# The first line of the table.
HEADER = (
    f"{'mode':<22}{'cosine':>7}{'length':>8}{'error':>8}{'noise':>8}{'passes':>8}{'time, ms':>9}"
    f"{'peak, KB':>9}"
)


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
        """Return the fields as text.

        A reason in the place of figures is ``{"reason": ...}``, a number that is not finite null.
        """
        values = asdict(self)
        for part in ("modes", "altered"):
            for name, figures in values[part].items():
                if isinstance(figures, str):
                    values[part][name] = {"reason": figures}
        finite = json.loads(json.dumps(values), parse_constant=lambda constant: None)
        return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ablation:
        """Return the ablation that :meth:`to_json` wrote; a null among the figures is read as nan.

        Raises: :class:`metapl.MetaplError` for other text.
        """
        try:
            values = json.loads(text)
            for part in ("modes", "altered"):
                values[part] = {name: _mode_of(figures) for name, figures in values[part].items()}
            values["points"] = tuple(values["points"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            text = f"the text is no ablation ({reason}); expected that of Ablation.to_json."
            raise MetaplError(text) from error

    def __repr__(self) -> str:
        return summary("Ablation", **vars(self))

    def __str__(self) -> str:
        return f"{self.table()}\n\n{textwrap.fill(self.recommendation, 80)}"

    def plot(self) -> Figure:
        """Draw the figures.

        Above is how far each mode is from the exact gradient at each point of the training, and
        below, what a call costs in passes, seconds and memory. A mark is the error of the mean over
        the draws, and the line behind it reaches to the distance of one draw.

        Returns: a figure of matplotlib, 4 inches wide: ``found.plot().savefig("modes.png",
        dpi=200)``. Raises: :class:`metapl.MetaplError` where matplotlib is not installed.
        """
        return draw_modes(
            self.modes, self.altered, points=self.points, recommended=self.recommended
        )

    def table(self) -> str:
        """Return the figures in lines of a terminal of 80 columns.

        The reasons for what is missing stand below.
        """
        lines = [HEADER]
        reasons: list[str] = []
        _add_lines(self.modes, lines, reasons)
        if self.altered:
            lines.append("altered feedback, as a control:")
            _add_lines(self.altered, lines, reasons)
        paragraphs = ["\n".join(lines)]
        for number, reason in enumerate(reasons, 1):
            text = f"[{number}] {' '.join(reason.split())}"
            paragraphs.append(textwrap.fill(text, 80, subsequent_indent="    "))
        return "\n\n".join(paragraphs)


def _add_lines(modes: Mapping[str, ModeCost | str], lines: list[str], reasons: list[str]) -> None:
    """Add a line for each mode, and the reasons that are not there yet."""
    for name, mode in modes.items():
        if isinstance(mode, str):
            if mode not in reasons:
                reasons.append(mode)
            lines.append(f"{name:<22}  cannot run on this model [{reasons.index(mode) + 1}]")
        else:
            direction = f"{mode.cosine:>7.3f}{mode.length:>8.2g}"
            distance = f"{mode.relative_error:>8.2g}{mode.noise_to_signal:>8.2g}"
            time_and_memory = f"{mode.seconds * 1e3:>9.3g}{mode.peak_bytes / 1e3:>9.0f}"
            lines.append(f"{name:<22}{direction}{distance}{mode.passes:>8.1f}{time_and_memory}")


def recommendation(
    modes: Mapping[str, ModeCost | str], exact_modes: Sequence[str], never: Collection[str]
) -> tuple[str | None, str]:
    """Return the name of the mode to take, and the sentences that say so and what decided.

    Of the modes that are exact to rounding (``exact_modes``), and without noise, the fastest is
    taken; where times are within 10 % the one with the least memory; where that is too, the first
    of ``exact_modes``. Where none is, the same holds for those within 1 %; else the nearest in one
    draw is taken. Those in ``never`` are not recommended; None where no mode ran.
    """
    ran: dict[str, ModeCost] = {}
    for name, mode in modes.items():
        if isinstance(mode, ModeCost) and name not in never:
            ran[name] = mode
    if not ran:
        return (
            None,
            "No mode that gives feedback can run on this model; the reasons stand beside the "
            "modes.",
        )
    exact: dict[str, ModeCost] = {}
    near: dict[str, ModeCost] = {}
    for name, mode in ran.items():
        is_without_noise = mode.noise_to_signal == 0
        if name in exact_modes and is_without_noise and mode.relative_error <= TRUSTED:
            exact[name] = mode
        if mode.of_one_draw <= NEAR:
            near[name] = mode
    if exact:
        recommended, decision = _cheapest(exact, exact_modes)
        reason = f"its gradient is the exact one to rounding{decision}"
    elif near:
        recommended, decision = _cheapest(near, exact_modes)
        reason = f"its gradient is within {NEAR:.0%} of the exact one{decision}"
    else:
        recommended = min(ran, key=lambda name: ran[name].of_one_draw)
        reason = (
            "no mode is exact, or nearly, and of one draw of labels its gradient is the nearest to "
            "the exact one"
        )
    cost = ran[recommended]
    text = (
        f"Take {recommended}: {reason}. A call takes {cost.seconds * 1e3:.3g} ms and "
        f"{cost.peak_bytes / 1e3:,.0f} KB."
    )
    if "reinforce" in ran and recommended != "reinforce":
        text += (
            f" Algorithm 1's scalar (reinforce) takes {ran['reinforce'].seconds * 1e3:.3g} ms, and "
            f"error and noise of one draw are {ran['reinforce'].of_one_draw:.2g} times the signal."
        )
    return recommended, text


def _cheapest(modes: Mapping[str, ModeCost], exact_modes: Sequence[str]) -> tuple[str, str]:
    """Return the name of the cheapest mode, and what decided, to follow a sentence.

    Of several as cheap, it is the first of the exact ones, or else the nearest.
    """
    fastest = _least({name: mode.seconds for name, mode in modes.items()})
    smallest = _least({name: modes[name].peak_bytes for name in fastest})
    nearest = min(smallest, key=lambda name: modes[name].of_one_draw)
    cheapest = next((name for name in exact_modes if name in smallest), nearest)
    if len(modes) == 1:
        return cheapest, ""
    if len(smallest) > 1:
        decision = "is as fast and small as any"
    elif len(fastest) > 1:
        decision = "takes the least memory of the fastest"
    else:
        decision = "is the fastest"
    return cheapest, f", and of {', '.join(modes)} it {decision}"


def _least(values: Mapping[str, float]) -> list[str]:
    """Return the names of the least values, of which those that differ by little are equal."""
    limit = min(values.values()) * (1 + EQUAL)
    return [name for name, value in values.items() if value <= limit]


def ablate(
    trainer: BilevelTrainer,
    outer: Batch,
    inner: Batch,
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
        outer, inner: a batch each, as for ``trainer.step``, or sources of batches, as for
            ``trainer.fit``.
        modes: names or estimators; default: all.
        steps: number of training steps; the modes are compared before the first, in the middle and
            after the last. 0: at the trainer's state alone.
        draws: of labels, for modes that draw them, and of alterations; 2 or more.
        rounds: rounds of timing; the least time of a mode counts. None: 5, and more for short
            calls, for a second.
        altered: also measure, as controls, the feedback of a mode that runs, altered in three ways
            (:class:`metapl.ablation.Altered`): of ``forward`` or another exact mode without a
            second backward pass, or else of the first that gives feedback on each example.
        progress: show on a terminal how far it is, and log it elsewhere, every half minute.

    Returns: an :class:`metapl.ablation.Ablation`. The trainer and the default generators are left
    as they were. Noise is that between draws, whatever generator they come from; an estimator with
    a field ``seed`` is given another seed for each. Cost: some ``draws`` + ``rounds`` + 3 calls of
    each mode at each point, and the training between the points. Raises:
    :class:`metapl.MetaplError` where no exact gradient can be had, as where a network or a loss
    draws from Python's, NumPy's or a generator of its own.

    >>> import metapl, torch
    >>> trainer = metapl.BilevelTrainer(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), "reinforce")
    >>> labeled = torch.randn(6, 4), torch.arange(6) % 3
    >>> unlabeled = torch.randn(8, 4)
    >>> ablation = ablate(trainer, labeled, unlabeled, ["forward", "reinforce"], draws=2, rounds=1)
    >>> round(ablation.modes["forward"].cosine, 3), ablation.recommended
    (1.0, 'forward')
    """
    if not isinstance(trainer, BilevelTrainer):
        raise unexpected("ablate was given a trainer that is", trainer, "a metapl.BilevelTrainer")
    check_arguments(ablate, locals())
    # A text is a sequence too, of letters.
    estimators = []
    if not isinstance(modes, str):
        estimators = [estimator(mode) for mode in (MODES if modes is None else modes)]
    by_name = {mode.name: mode for mode in estimators}
    if not estimators or len(by_name) < len(estimators):
        raise MetaplError(f"modes={modes!r}: expected one or more, each name once.")
    study = Study(trainer, by_name, draws=draws, shows_progress=progress)
    points = tuple(sorted({0, steps // 2, steps}))
    state = trainer.state_dict()
    generators = rng_state()
    try:
        with (
            closing(_batches(trainer, outer, inner, stop=steps + 1)) as batches_by_step,
            step_bar(progress, steps + 1, name="steps") as advance,
        ):
            for step, batches in enumerate(batches_by_step):
                if step in points:
                    exact_gradient = _exact_gradient(trainer, batches)
                    study.measure(list(study.modes), batches, exact_gradient)
                    if altered and step == 0:
                        study.measure(study.add_controls(), batches, exact_gradient)
                if step < steps:
                    trainer.step(*batches)
                advance()
        costs = study.costs(batches, rounds)
    finally:
        trainer.load_state_dict(state)
        set_rng_state(generators)
    compared: dict[str, ModeCost | str] = {}
    controls: dict[str, ModeCost | str] = {}
    for name, mode in study.modes.items():
        part = controls if isinstance(mode, Altered) else compared
        if name in study.reasons:
            part[name] = study.reasons[name]
        else:
            part[name] = costs[name]
    exact_modes = [
        name for name in compared if study.modes[name].exact and name not in study.drawing
    ]
    # Between modes that are equal otherwise, one is taken that needs no second backward pass.
    exact_modes.sort(key=lambda name: study.modes[name].keep_graph)
    # A mode without feedback is not recommended, nor one at the optimum: its gradient is not
    # through a step, as that is with which it is compared.
    never = []
    for name in compared:
        mode = study.modes[name]
        if mode.credits == "nothing" or not mode.is_through_step:
            never.append(name)
    recommended, text = recommendation(compared, exact_modes, never)
    return Ablation(
        modes=compared,
        recommendation=text,
        points=points,
        altered=controls,
        recommended=recommended,
        float32_products=float32_products(trainer.device),
    )


class Study:
    """The measurements of one ablation.

    Args:
        trainer: the networks and the problem, whose state moves between the points.
        modes: the modes by name; the controls are added to them.
        draws: of labels, and of alterations.
        shows_progress: whether to show how far each measurement is.
    """

    def __init__(
        self,
        trainer: BilevelTrainer,
        modes: Mapping[str, Estimator],
        draws: int,
        *,
        shows_progress: bool,
    ) -> None:
        self.trainer = trainer
        self.modes = dict(modes)
        self.draws = draws
        self.shows_progress = shows_progress
        # By mode, one at each point.
        self.distances: dict[str, list[ModeDistance]] = {}
        # Why the other modes do not run.
        self.reasons: dict[str, str] = {}
        # The names of modes whose gradient has drawn labels in it.
        self.drawing: set[str] = set()

    def measure(self, names: Sequence[str], batches: Batches, exact_gradient: Tensor) -> None:
        """Measure how far these modes are from the exact gradient at the trainer's state.

        Modes that have failed before are left out.
        """
        with step_bar(self.shows_progress, len(names), name="modes") as advance:
            for name in names:
                if name not in self.reasons:
                    self._measure_mode(name, batches, exact_gradient)
                advance()

    def _measure_mode(self, name: str, batches: Batches, exact_gradient: Tensor) -> None:
        """Measure how far a mode is from the exact gradient, or note why it cannot run."""
        try:
            gradients, draws_labels = self._gradients(self.modes[name], batches)
        except CANNOT_RUN as error:
            self.reasons[name] = _reason(error)
            return
        if draws_labels:
            self.drawing.add(name)
        # A mode with the mean over the batch gives 1/B of the gradient.
        factor = 1
        if self.modes[name].reduction == "mean":
            factor = length(InnerBatches.of_trainer(batches[1])[0])
        distance = _distance(factor * gradients, exact_gradient, factor=factor)
        self.distances.setdefault(name, []).append(distance)

    def _gradients(self, mode: Estimator, batches: Batches) -> tuple[Tensor, bool]:
        """Return the gradients of several draws, (draws, weights), and whether the mode draws.

        Every mode is asked for all of them, since a generator of its own is seen by nothing but its
        gradients. A mode that draws nothing has the same one in each draw, which is returned once.
        """
        # An estimator of one's own may be another class than a dataclass.
        seeded: Any = mode
        has_seed = is_dataclass(seeded) and hasattr(seeded, "seed")
        gradients = []
        draws_labels = False
        for seed in range(self.draws):
            generator = torch.Generator(self.trainer.device).manual_seed(seed)
            start = generator.get_state()
            drawn_mode = mode
            if has_seed:
                drawn_mode = replace(seeded, seed=seeded.seed + seed)
            gradients.append(_gradient(self.trainer, batches, drawn_mode, generator=generator))
            # Seen by the generator's state, for draws of a confident teacher may be equal.
            if not torch.equal(start, generator.get_state()):
                draws_labels = True
        if not draws_labels and all(_are_same(gradients[0], other) for other in gradients):
            return gradients[0][None], False
        return torch.stack(gradients), True

    def add_controls(self) -> list[str]:
        """Add the altered feedback of a mode that runs, and return the names of the controls.

        It is an exact one without a second backward pass, or else the first with feedback on each
        example.
        """
        candidates = []
        for name, mode in self.modes.items():
            has_rows = mode.credits in ("signal", "example")
            if has_rows and name not in self.reasons and not isinstance(mode, Altered):
                candidates.append(mode)
        if not candidates:
            return []
        without_graph = (mode for mode in candidates if mode.exact and not mode.keep_graph)
        base = next(without_graph, candidates[0])
        added = []
        for alteration in get_args(Alteration):
            control = Altered(base, alteration)
            if control.name not in self.modes:
                self.modes[control.name] = control
                added.append(control.name)
        return added

    def costs(self, batches: Batches, rounds: int | None) -> dict[str, ModeCost]:
        """Measure what a call of each mode costs, and return that with its distances.

        The modes, which have run here before, take turns in the rounds of timing.
        """
        device = self.trainer.device
        operations_of_pass = flops(
            partial(self._student_pass, InnerBatches.of_trainer(batches[1])[0])
        )
        calls = {
            name: partial(_gradient, self.trainer, batches, mode)
            for name, mode in self.modes.items()
            if name not in self.reasons
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        # Without a number of rounds there are more than these only where all of them are short.
        shown_rounds = rounds or LEAST_ROUNDS
        with step_bar(self.shows_progress, shown_rounds, name="timings") as advance:
            for number in range(rounds or MOST_ROUNDS):
                is_long_enough = time.perf_counter() - start > SECONDS_OF_ROUNDS
                if rounds is None and number >= LEAST_ROUNDS and is_long_enough:
                    break
                for name, call in calls.items():
                    times[name].append(seconds(call, device))
                if number < shown_rounds:
                    advance()
        costs = {}
        with step_bar(self.shows_progress, len(calls), name="memory") as advance:
            for name, call in calls.items():
                distances = self.distances[name]
                passes = math.nan
                if operations_of_pass:
                    passes = flops(call) / operations_of_pass
                costs[name] = ModeCost(
                    cosine=fmean(distance.cosine for distance in distances),
                    relative_error=_root_mean_square([d.relative_error for d in distances]),
                    noise_to_signal=_root_mean_square([d.noise_to_signal for d in distances]),
                    passes=passes,
                    seconds=min(times[name]),
                    peak_bytes=peak_bytes(call, device),
                    length=fmean(distance.length for distance in distances),
                    by_point=tuple(distances),
                )
                advance()
        return costs

    def _student_pass(self, batch: Batch) -> None:
        """Take one forward pass of a copy of the student on an inner batch."""
        problem = self.trainer.problem
        # PyTorch's counter does not know the fused layers of a transformer in eval mode.
        with torch.no_grad(), no_fast_path(), replayed(RandomState.now(self.trainer.device)):
            if enters_input(problem):
                teacher: Any = copy.deepcopy(self.trainer.teacher)
                signal = problem.signal(teacher, batch, None, generator=None)
                inputs = problem.student_input(batch, signal)  # type: ignore[call-arg]
            else:
                inputs = problem.student_input(batch)
            copy.deepcopy(self.trainer.student)(inputs)


def _batches(
    trainer: BilevelTrainer, outer: Batch, inner: Batch, *, stop: int
) -> Generator[Batches, None, None]:
    """Yield the outer and the inner batch of each step; several inner ones are a look-ahead."""
    is_one_outer_batch = is_whole(outer) or isinstance(outer, Tensor)
    is_one_inner_batch = isinstance(inner, Tensor | dict | tuple | Lookahead)
    is_one_inner_batch = is_one_inner_batch or is_record_of_rows(inner)
    inner_in_step = 1 if isinstance(inner, Lookahead) else trainer.lookahead
    outer_feed = feed(
        [outer] if is_one_outer_batch else outer,
        name="outer",
        stop=stop,
        device=trainer.device,
    )
    inner_feed = feed(
        [inner] if is_one_inner_batch else inner,
        name="inner",
        stop=stop * inner_in_step,
        device=trainer.device,
    )
    with closing(outer_feed), closing(inner_feed):
        for _ in range(stop):
            inner = [inner_feed.next() for _ in range(inner_in_step)]
            yield outer_feed.next(), inner[0] if inner_in_step == 1 else Lookahead(inner)


def _distance(gradients: Tensor, exact_gradient: Tensor, *, factor: int) -> ModeDistance:
    """Return how far gradients (draws, weights) are from the exact one.

    ``factor`` is what they were multiplied by; the length is that of the gradients without it.
    """
    mean = gradients.mean(0)
    exact_norm = exact_gradient.norm().clamp_min(1e-300)
    # The mean of n draws has 1/n of their noise in it, which the spread of n draws is short of.
    degrees_of_freedom = max(1, len(gradients) - 1)
    spread = ((gradients - mean).square().sum() / degrees_of_freedom).sqrt()
    cosine = torch.nn.functional.cosine_similarity(mean, exact_gradient, dim=0)
    return ModeDistance(
        cosine=float(cosine),
        relative_error=float((mean - exact_gradient).norm() / exact_norm),
        noise_to_signal=float(spread / exact_norm),
        length=float(mean.norm() / factor / exact_norm),
    )


def _mode_of(figures: dict[str, Any]) -> ModeCost | str:
    """Return a mode as an :class:`Ablation` has it, from what its JSON has."""
    if "reason" in figures:
        return str(figures["reason"])
    distances = []
    for distance in figures.get("by_point", ()):
        distances.append(ModeDistance(**_with_nan(distance)))
    values = _with_nan(figures)
    values["by_point"] = tuple(distances)
    return ModeCost(**values)


def _with_nan(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with nan in the place of null, as which JSON has it."""
    return {name: math.nan if value is None else value for name, value in figures.items()}


def _root_mean_square(values: Sequence[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values))


def _reason(error: BaseException) -> str:
    """Return a refusal in full, or the first line of another error.

    The errors of torch may run over many lines, and the first one says what is wrong.
    """
    if isinstance(error, MetaplError):
        return str(error)
    return f"{type(error).__name__}: {reason_of(error)}"


def _exact_gradient(trainer: BilevelTrainer, batches: Batches) -> Tensor:
    """Return the gradient of the soft step, by double backward or else by forward mode.

    It is asked for twice: draws that no pass repeats would be in the figures of every mode.
    """
    reasons = []
    for mode in (estimator("unrolled"), estimator("forward")):
        numbers_before = numbers_of(trainer.problem, trainer.teacher)
        try:
            with refusing_draws_outside():
                gradient, again = (
                    _gradient(trainer, batches, mode, problem=trainer.problem.exact())
                    for _ in range(2)
                )
        except DrawsOutside:
            raise
        except CANNOT_RUN as error:
            reasons.append(_reason(error))
            continue
        if not _are_same(gradient, again):
            written = names_written(numbers_before, numbers_of(trainer.problem, trainer.teacher))
            raise MetaplError(
                "there is no exact gradient: it is another one when it is asked for again, of the "
                f"same step: {why_again(written)}"
            )
        return gradient
    raise MetaplError(
        f"there is no exact gradient: by double backward, {reasons[0]}; by forward mode, "
        f"{reasons[1]}"
    )


def _are_same(gradient: Tensor, other: Tensor) -> bool:
    """Return whether two gradients are equal but for the order of sums on an accelerator.

    Of those that are not finite nothing is known.
    """
    return not bool((gradient - other).norm() > ROUNDING * gradient.norm())


def _gradient(
    trainer: BilevelTrainer,
    batches: Batches,
    mode: Estimator,
    *,
    generator: torch.Generator | None = None,
    problem: BilevelProblem | None = None,
) -> Tensor:
    """Return the teacher's gradient as one vector, float64.

    Without a teacher, that is the gradient in the signal.
    """
    if generator is None:
        generator = torch.Generator(trainer.device).manual_seed(0)
    hypergradient = trainer.hypergradient(*batches, mode, problem=problem, generator=generator)
    if trainer.teacher is not None:
        parts = list(hypergradient.grads.values())
    else:
        # The feedback is minus the gradient.
        parts = [-h for h in pytree.tree_leaves(hypergradient.feedback)]
    return torch.cat([part.flatten().double() for part in parts])
