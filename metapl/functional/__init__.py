"""A step as one function of tensors, and recordings of functions as graphs of operations.

They are for compilers, ``torch.func.vmap`` and readers.
:meth:`metapl.BilevelTrainer.functional` returns such a step, and the state that it begins with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metapl.functional.state import Optimizer, Report, State, stack, unstack

if TYPE_CHECKING:
    from metapl.functional.recorder import Recorded, recorded

__all__ = ["Optimizer", "Recorded", "Report", "State", "recorded", "stack", "unstack"]


def __getattr__(name: str) -> Any:
    """Load what records functions where it is asked for."""
    if name in ("Recorded", "recorded"):
        from metapl.functional import recorder

        return getattr(recorder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
