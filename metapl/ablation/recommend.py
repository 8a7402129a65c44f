"""The mode that an ablation recommends, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from metapl.ablation.results import ModeCost
from metapl.feedback import MODES, Estimator, Implicit, estimator

TRUSTED = 0.1
"""A mode that should be exact is taken for it up to this distance. In bfloat16, and where the gradient itself is nearly
zero, as in the first steps of Adam, two exact modes differ by as much as some hundredths."""

TOLD = 1e-3
"""Rounding beyond it is told."""

NEAR = 0.01
"""Distance, noise included, up to which a gradient is near the exact one."""

EQUAL = 0.1
"""Times, and bytes, that differ by no more than this fraction count as equal: timings are noisy."""

PREFERRED = "forward"
"""Taken between modes that are equal otherwise: exact, without a second backward pass and its memory."""


def gives_the_gradient_of_a_step(mode: Estimator) -> bool:
    """Whether a mode gives feedback, and that through the student's step, which is what it is compared with."""
    return mode.credits != "nothing" and not isinstance(mode, Implicit)


_BY_NAME = {name: estimator(name) for name in MODES}

EXACT = tuple(name for name, mode in _BY_NAME.items() if mode.exact)
"""Modes that are exact but for rounding."""

NEVER = tuple(name for name, mode in _BY_NAME.items() if not gives_the_gradient_of_a_step(mode))
"""Modes that are never recommended: one gives no feedback, and one is another gradient."""


def recommendation(
    modes: Mapping[str, ModeCost | str], exact_modes: Collection[str] = EXACT, never: Collection[str] = NEVER
) -> tuple[str | None, str]:
    """The name of the mode to take, and the sentences that say so and what decided.

    Of the modes that are exact to rounding, and without noise, the fastest is taken; where times are within 10 % the
    one with the least memory; where that is too, ``forward``. Where none is exact to rounding, the same holds for those
    within 1 %; where there are none of these either, the nearest in one draw is taken. ``none`` gives no feedback and
    ``implicit`` is another gradient: neither is recommended.

    Args:
        modes: as in :class:`metapl.ablation.Ablation`.
        exact_modes: names of modes that are exact but for rounding; of labels that are drawn none is.
        never: names of modes that are not recommended.

    Returns: the name, None where no mode ran; and the text.
    """
    ran = {n: m for n, m in modes.items() if isinstance(m, ModeCost) and n not in never}
    if not ran:
        return None, "No mode that gives feedback can run on this model; the reasons stand beside the modes."
    off = {name: mode.of_one_draw for name, mode in ran.items()}
    sure = {n: m for n, m in ran.items() if n in exact_modes and m.noise_to_signal == 0}
    exact = {n: m for n, m in sure.items() if m.relative_error <= TRUSTED}
    near = {name: mode for name, mode in ran.items() if off[name] <= NEAR}
    if exact:
        name, decided = _cheapest(exact)
        rounding = max(off[name] for name in exact)
        told = f" (which is {rounding:.1g} of its length here)" if rounding > TOLD else ""
        why = f"its gradient is the exact one to rounding{told}, without noise"
        why += f", {decided}" if decided else "; no other of these modes is exact to rounding"
    elif near:
        name, decided = _cheapest(near)
        why = f"none of these modes is exact to rounding; its gradient is within {off[name]:.1g} of the exact one"
        why += f", {decided}" if decided else ""
    else:
        name = min(ran, key=off.__getitem__)
        why = (
            "none of these modes is exact, or nearly; of one draw of labels its gradient is the nearest to the exact "
            f"one (error {ran[name].relative_error:.2g}, noise {ran[name].noise_to_signal:.2g} of its length)"
        )
    text = f"Take {name}: {why}. A call takes {duration(ran[name].seconds)} and {size(ran[name].peak_bytes)}."
    clearly = {n: m.seconds for n, m in near.items() if m.seconds * (1 + EQUAL) < ran[name].seconds and n not in exact}
    if exact and clearly:
        other = min(clearly, key=clearly.__getitem__)
        text += f" {other} is within {off[other]:.1g} of it and takes {duration(clearly[other])}."
    if "reinforce" in ran and name != "reinforce":
        text += (
            f" Algorithm 1's scalar (reinforce) takes {duration(ran['reinforce'].seconds)}, and error and noise of one "
            f"draw are {off['reinforce']:.2g} times the signal."
        )
    return name, text


def _cheapest(modes: Mapping[str, ModeCost]) -> tuple[str, str]:
    """The mode that costs least, and what decided, as part of a sentence; nothing where there is one."""
    if len(modes) == 1:
        return next(iter(modes)), ""
    seconds = {name: mode.seconds for name, mode in modes.items()}
    fastest, next_one = _least(seconds)
    if len(fastest) == 1:
        times = f"{duration(seconds[fastest[0]])}; next {duration(next_one)}"
        return fastest[0], f"and of {_listed(modes)} it is the fastest ({times})"
    smallest, next_one = _least({name: modes[name].peak_bytes for name in fastest})
    of_all = f"of {_listed(modes)}, " if len(fastest) < len(modes) else ""
    tied = f"and as {of_all}{_listed(fastest)} take the same time within {100 * EQUAL:.0f} %"
    if len(smallest) == 1:
        needs = f"{size(modes[smallest[0]].peak_bytes)}; next {size(next_one)}"
        return smallest[0], f"{tied}, the least memory decided ({needs})"
    if PREFERRED in smallest:
        return PREFERRED, f"{tied}, and memory too, the choice is {PREFERRED}, which needs no second derivatives"
    nearest = min(smallest, key=lambda name: modes[name].of_one_draw)
    return nearest, f"{tied}, and memory too, the nearest to the exact gradient is taken"


def _least(values: Mapping[str, float]) -> tuple[list[str], float]:
    """The names whose value is the least, or equal to it within the tolerance; and the least of the others."""
    most = min(values.values()) * (1 + EQUAL)
    names = [name for name, value in values.items() if value <= most]
    return names, min((value for value in values.values() if value > most), default=0.0)


def _listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def duration(seconds: float) -> str:
    """
    >>> duration(0.00247), duration(0.74), duration(12.3)
    ('2.47 ms', '740 ms', '12.3 s')
    """
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"


def size(count: float) -> str:
    """
    >>> size(184_320), size(264_000_000), size(2_640_000_000)
    ('184 KB', '264 MB', '2.64 GB')
    """
    unit, name = next((one for one in ((1e9, "GB"), (1e6, "MB")) if count >= 0.9995 * one[0]), (1e3, "KB"))
    return f"{count / unit:.3g} {name}"
