"""The direct term alone: the outer loss's own dependence on the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from metapl.feedback.none import NoFeedback


@dataclass(frozen=True)
class Direct(NoFeedback):
    r"""Give the direct term alone: h = 0, and the teacher descends the outer loss at fixed θ′.

    .. math:: \frac{\partial L(\theta'; \theta_T)}{\partial \theta_T}

    For problems whose outer loss reads the teacher, through a module that the problem holds, as the
    weights of an architecture; for others it is refused. ``none`` leaves this term out too.

    Takes: soft and hard labels, and any inner optimizer of ``torch.optim``. Cost: that of ``none``,
    and a forward pass of the student on the outer batch; a backward pass where its input depends on
    the teacher. Bias: the whole dependence
    of θ′ on the teacher is left out, O(η) of a step with rate η. Source: the first order of DARTS
    (Liu, Simonyan and Yang, ICLR 2019).
    """

    name: ClassVar[str] = "direct"
    gives_gradient: ClassVar[bool] = True
    has_direct_term: ClassVar[bool] = True
