"""Data whose every draw is a pure function of (seed, step, example): a run resumes by position alone."""

from metapl.data.batches import LabeledBatches, StepBatches, UnlabeledBatches, loader
from metapl.data.digits import DigitsSplit, load_digits_split
from metapl.data.feed import Feed, feed, to_device
from metapl.data.samplers import StepSampler
from metapl.data.views import Identity, ShiftNoiseCutout, View

__all__ = [
    "DigitsSplit",
    "Feed",
    "Identity",
    "LabeledBatches",
    "ShiftNoiseCutout",
    "StepBatches",
    "StepSampler",
    "UnlabeledBatches",
    "View",
    "feed",
    "load_digits_split",
    "loader",
    "to_device",
]
