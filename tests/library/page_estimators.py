"""The estimators of docs/write-an-estimator.md, as its code has them, and what two ranks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pages
import sharded_cases
import torch

from metapl.feedback import Estimator

PAGE = Path(__file__).parents[2] / "docs" / "write-an-estimator.md"


def page_classes() -> dict[str, Any]:
    """Return the classes of estimators on the page, which have this module's name."""
    blocks = pages.FENCED.findall(PAGE.read_text())
    names: dict[str, Any] = {"__name__": __name__}
    for block in blocks:
        if "(Estimator):" in block:
            # As the page is run: without what this file imports from the future.
            exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    classes = {}
    for name, value in names.items():
        if isinstance(value, type) and issubclass(value, Estimator) and value is not Estimator:
            classes[name] = value
    return classes


CLASSES = page_classes()
# So that a value of one can be sent to another process.
globals().update(CLASSES)


def sharded(
    modes: list[Estimator], layout: str = "fsdp"
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return of each mode the h of this rank's rows, on a student in a layout, and its key."""
    results = []
    for mode in modes:
        trainer = sharded_cases.built(mode, layout)
        key = trainer.mode_state.get("draws")
        (labeled, unlabeled), *_ = sharded_cases.batches(1)
        report = trainer.step(sharded_cases.share(labeled), sharded_cases.share(unlabeled))
        results.append((report.feedback, key))
    return results
