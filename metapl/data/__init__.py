"""Data whose every draw is a pure function of (seed, step, example): a run resumes by position alone."""

from metapl.data.augment import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment, ResizedCrop, Weak
from metapl.data.batched import Affine, Color, Flip, Hole, Recolor
from metapl.data.batches import LabeledBatches, StepBatches, UnlabeledBatches, loader
from metapl.data.digits import DigitsSplit, load_digits_split
from metapl.data.feed import Feed, feed
from metapl.data.folder_check import Finding, check_folders
from metapl.data.folders import Files, LabeledFiles, scan_labeled, scan_unlabeled
from metapl.data.image_batches import ImageEvaluationBatches, ImageLabeledBatches, ImageUnlabeledBatches
from metapl.data.image_sets import FileImages, Images, MemoryImages, replaced_files
from metapl.data.images import UnreadableImage, read_image
from metapl.data.samplers import StepSampler
from metapl.data.sound_files import Skipped, Verified, verify_files
from metapl.data.splits import Split, draw_split, stratified_split
from metapl.data.unlabeled import WithoutLabels, without_labels
from metapl.data.views import Chain, Identity, ShiftNoiseCutout, View
from metapl.data.vision import PROTOCOLS, Protocol, VisionData, load_vision
from metapl.device import to_device

__all__ = [
    "CIFAR_OPERATIONS",
    "PROTOCOLS",
    "SVHN_OPERATIONS",
    "Affine",
    "Chain",
    "Color",
    "DigitsSplit",
    "Feed",
    "FileImages",
    "Files",
    "Finding",
    "Flip",
    "Hole",
    "Identity",
    "ImageEvaluationBatches",
    "ImageLabeledBatches",
    "ImageUnlabeledBatches",
    "Images",
    "LabeledBatches",
    "LabeledFiles",
    "MemoryImages",
    "Protocol",
    "RandAugment",
    "Recolor",
    "ResizedCrop",
    "ShiftNoiseCutout",
    "Skipped",
    "Split",
    "StepBatches",
    "StepSampler",
    "UnlabeledBatches",
    "UnreadableImage",
    "Verified",
    "View",
    "VisionData",
    "Weak",
    "WithoutLabels",
    "check_folders",
    "draw_split",
    "feed",
    "load_digits_split",
    "load_vision",
    "loader",
    "read_image",
    "replaced_files",
    "scan_labeled",
    "scan_unlabeled",
    "stratified_split",
    "to_device",
    "verify_files",
    "without_labels",
]
