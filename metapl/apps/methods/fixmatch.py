"""``--method fixmatch``: hard labels of what the network is sure of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from metapl.apps.methods.uda import Consistency, Uda

# Published is 0.95 (arXiv:2001.07685). With few steps this reached more.
THRESHOLD = 0.85


@dataclass(frozen=True, kw_only=True)
class FixMatch(Uda):
    """Train as uda does, with hard labels of those examples that the network is sure of."""

    uda: Consistency = field(
        default_factory=lambda: Consistency(
            uda_temperature=0.0, uda_threshold=THRESHOLD, uda_align=0.0
        )
    )

    name: ClassVar[str] = "fixmatch"
    title: ClassVar[str] = "FixMatch alone"
