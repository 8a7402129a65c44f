"""What an ablation finds: figures as values, as JSON and in lines of a terminal, and the mode that they recommend."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

# A mode that should be exact is taken for it up to this distance: in bfloat16, and where the gradient itself is nearly
# zero, as in the first steps of Adam, two exact modes differ by as much as some hundredths.
TRUSTED = 0.1
NEAR = 0.01  # distance, noise included, up to which a gradient is near the exact one
EQUAL = 0.1  # times, and bytes, that differ by no more than this fraction count as equal: timings are noisy
PREFERRED = "forward"  # between modes that are equal otherwise: exact, without a second backward pass and its memory


@dataclass(frozen=True)
class ModeCost:
    """How far a mode's gradient is from the exact one, and what it costs.

    Args:
        cosine: of its gradient, averaged over the draws, with the exact one; the mean over the points.
        relative_error, noise_to_signal: as :func:`metapl.ablate` defines them, the latter 0 for a mode that draws
            nothing; root mean squares over the points.
        passes: floating-point operations over those of a forward pass of the student on the unlabeled batch.
        seconds: a call, the least of interleaved rounds; on a CPU the processor's time, where that is less.
        peak_bytes: what a call holds at its fullest, beyond what was held before.
    """

    cosine: float
    relative_error: float
    noise_to_signal: float
    passes: float
    seconds: float
    peak_bytes: int

    @property
    def of_one_draw(self) -> float:
        """Error and noise together, the distance of one draw; at most √(1 + 1/n) times too large."""
        return math.hypot(self.relative_error, self.noise_to_signal)


@dataclass(frozen=True)
class Ablation:
    """What :func:`metapl.ablate` returns.

    Args:
        modes: by name: the costs, or the reason why a mode cannot run on this model.
        recommendation: which mode to take, and why.
        points: the steps of training that were looked at.
        altered: the figures of a mode's feedback, altered (:class:`metapl.ablation.Altered`); controls.
        recommended: the name in the recommendation; None where no mode can be recommended.
    """

    modes: dict[str, ModeCost | str]
    recommendation: str
    points: tuple[int, ...]
    altered: dict[str, ModeCost | str] = field(default_factory=dict)
    recommended: str | None = None

    def to_json(self) -> str:
        """The fields as text: a reason in the place of figures is ``{"reason": ...}``, a number that is not finite
        null."""
        plain = asdict(self)
        for part in ("modes", "altered"):
            plain[part] = {n: {"reason": m} if isinstance(m, str) else m for n, m in plain[part].items()}
        finite = json.loads(json.dumps(plain), parse_constant=lambda name: None)
        return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The figures in lines of a terminal of 80 columns; the reasons for what is missing stand below."""
        lines = ["mode                     cosine     error    noise   passes time, ms peak, KB"]
        reasons: list[str] = []
        for modes in (self.modes, self.altered):
            if modes is self.altered and modes:
                lines.append("altered feedback, as a control:")
            for name, found in modes.items():
                if isinstance(found, str):
                    reasons += [found] * (found not in reasons)
                    lines.append(f"{name:<22}  cannot run on this model [{reasons.index(found) + 1}]")
                else:
                    distance = f"{found.cosine:>9.3f}{found.relative_error:>10.2g}{found.noise_to_signal:>9.2g}"
                    cost = f"{found.passes:>9.1f}{found.seconds * 1e3:>9.3g}{found.peak_bytes / 1e3:>9.0f}"
                    lines.append(f"{name:<22}{distance}{cost}")
        texts = (f"[{number}] {' '.join(reason.split())}" for number, reason in enumerate(reasons, 1))
        return "\n\n".join(["\n".join(lines), *(textwrap.fill(text, 80, subsequent_indent="    ") for text in texts)])


def recommendation(
    modes: Mapping[str, ModeCost | str], exact_modes: Collection[str], never: Collection[str]
) -> tuple[str | None, str]:
    """The name of the mode to take, and the sentences that say so and what decided.

    Of the modes that are exact to rounding (``exact_modes``), and without noise, the fastest is taken; where times are
    within 10 % the one with the least memory; where that is too, ``forward``. Where none is, the same holds for those
    within 1 %; else the nearest in one draw is taken. Those in ``never`` are not recommended; None where no mode ran.
    """
    ran = {n: m for n, m in modes.items() if isinstance(m, ModeCost) and n not in never}
    if not ran:
        return None, "No mode that gives feedback can run on this model; the reasons stand beside the modes."
    sure = {n: m for n, m in ran.items() if n in exact_modes and m.noise_to_signal == 0 and m.relative_error <= TRUSTED}
    near = {n: m for n, m in ran.items() if m.of_one_draw <= NEAR}
    name = min(ran, key=lambda n: ran[n].of_one_draw)
    why = "no mode is exact, or nearly, and of one draw of labels its gradient is the nearest to the exact one"
    if among := sure or near:

        def least(values: Mapping[str, float]) -> list[str]:
            return [name for name, value in values.items() if value <= min(values.values()) * (1 + EQUAL)]

        fastest = least({n: m.seconds for n, m in among.items()})
        smallest = least({n: among[n].peak_bytes for n in fastest})
        name = PREFERRED if PREFERRED in smallest else min(smallest, key=lambda n: among[n].of_one_draw)
        why = "its gradient is " + ("the exact one to rounding" if sure else f"within {NEAR:.0%} of the exact one")
        if len(among) > 1:
            decided = "is the fastest" if len(fastest) == 1 else "takes the least memory of the fastest"
            why += f", and of {', '.join(among)} it {decided if len(smallest) == 1 else 'is as fast and small as any'}"
    found = ran[name]
    text = f"Take {name}: {why}. A call takes {found.seconds * 1e3:.3g} ms and {found.peak_bytes / 1e3:,.0f} KB."
    if "reinforce" in ran and name != "reinforce":
        text += (
            f" Algorithm 1's scalar (reinforce) takes {ran['reinforce'].seconds * 1e3:.3g} ms, and error and noise of "
            f"one draw are {ran['reinforce'].of_one_draw:.2g} times the signal."
        )
    return name, text
