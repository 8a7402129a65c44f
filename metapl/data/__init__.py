"""Data whose every draw is a pure function of (seed, step, example).

So a run resumes by its position alone.
"""

from metapl.data.feed import Feed, WithoutLabels, feed, without_labels
from metapl.data.steps import StepBatches, StepSampler, loader
from metapl.execution.batch import to_device

__all__ = [
    "Feed",
    "StepBatches",
    "StepSampler",
    "WithoutLabels",
    "feed",
    "loader",
    "to_device",
    "without_labels",
]
__dir__ = __all__.copy
