"""Verification of a gradient by its definition, at a trainer's first step and when asked for.

- :mod:`check`: when a step is verified, and what is said of it.
- :mod:`first_calls`: which calls of :func:`metapl.hypergradient` are verified.
- :mod:`verdict`, :mod:`result`: the verdict on a step, and what comes of it.
- :mod:`case`: the mode's gradient and the real step, at one point.
- :mod:`contract`: what a step must keep whatever the differences say.
- :mod:`differences`: how far a gradient is from differences of the loss.
- :mod:`explain`, :mod:`causes`: why it may be off.
- :mod:`real_step`: the step itself, taken on copies.
"""

from metapl.guards.verification.check import Verification, check_gradient
from metapl.guards.verification.result import GradientCheck, VerificationWarning

__all__ = ["GradientCheck", "Verification", "VerificationWarning", "check_gradient"]
