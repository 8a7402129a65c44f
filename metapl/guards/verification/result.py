"""What comes of a verification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from metapl.errors import MetaplError, warn

Status = Literal["right", "allowed", "refused", "cannot tell", "nothing to verify"]
Setting = bool | int | Literal["warn"]


class VerificationWarning(UserWarning):
    """A gradient is off the derivative of the loss for a good reason, or could not be verified."""


@dataclass(frozen=True)
class GradientCheck:
    """The result of :func:`check_gradient`; ``print`` says it in words.

    Args:
        status: ``"right"``; ``"allowed"``, off the definition for a good reason; ``"refused"``;
            ``"cannot tell"``, where rounding drowns the differences or no copy could be made;
            ``"nothing to verify"``, in mode ``none``.
        verdict: the status in a sentence, with the likely causes of a refusal.
        errors: how far the gradient is off, by what was moved and along what, relative to the
            derivative.
        precision: the type that the copies ran in: ``"float64"``, or that of the networks' own
            weights where their code runs in no other. Empty where nothing ran.
        tolerance: the relative error beyond rounding that counts as right; 0 where nothing ran.
    """

    status: Status
    verdict: str
    errors: dict[str, float] = field(default_factory=dict)
    precision: str = ""
    tolerance: float = 0.0

    @property
    def passed(self) -> bool | None:
        """Whether the gradient is right or allowed, for a test; None where it cannot be told."""
        return None if self.status == "cannot tell" else self.status != "refused"

    def __str__(self) -> str:
        lines = [f"{self.status}: {self.verdict}"]
        if self.precision:
            lines.append(f"  {f'in {self.precision}; right is at most':<56} {self.tolerance:.1e}")
        lines += [f"  {name:<56} {error:.1e}" for name, error in self.errors.items()]
        return "\n".join(lines)

    def refuse_or_warn(self, setting: Setting) -> None:
        """Raise what is refused, unless the setting is ``"warn"``.

        Warn of what is neither refused nor right.
        """
        if self.status == "refused" and setting != "warn":
            raise MetaplError(f"{self.verdict} verify='warn' goes on, with a warning.")
        if self.status not in ("right", "nothing to verify"):
            warn(f"{self.status}: {self.verdict}", VerificationWarning)
