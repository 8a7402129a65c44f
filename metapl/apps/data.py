"""What a training of the command is trained, selected and tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on. Examples to look at are (inputs, labels), or batches of these.

    Args:
        labeled, unlabeled, finetuning: sources of batches for ``fit``.
        classes: names of the classes.
        record: what data.json says; a run is resumed on data of the same "hash" only.
        validation: examples to select on.
        test: examples to report on.
        truth: unlabeled examples whose labels are known, for looking at pseudo-labels only.
        test_names: what the test examples are called, such as their files.
        skipped: files that are left out, each with the reason.
    """

    labeled: Any
    unlabeled: Any
    finetuning: Any
    classes: tuple[str, ...]
    record: Mapping[str, Any]
    validation: Any = None
    test: Any = None
    truth: Any = None
    test_names: tuple[str, ...] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
