"""The pure road: a step as one function of tensors.

It is for ``torch.compile``, ``torch.func.vmap`` and readers.
:meth:`metapl.BilevelTrainer.functional` returns such a step, and the state that it begins with.
"""

from __future__ import annotations

from metapl.functional.state import Optimizer, Report, State, stack, unstack

__all__ = ["Optimizer", "Report", "State", "stack", "unstack"]
