"""Data whose every draw is a pure function of (seed, step, example): a run resumes by position alone."""

from metapl.data.batches import EvaluationBatches, LabeledBatches, UnlabeledBatches
from metapl.data.feed import Feed, feed
from metapl.data.images.check import Finding, check_folders
from metapl.data.images.folders import Files, LabeledFiles, scan_labeled, scan_unlabeled
from metapl.data.images.reader import UnreadableImage, read_image
from metapl.data.images.record import replaced_files
from metapl.data.images.store import FileImages, Images, MemoryImages
from metapl.data.images.verify import Skipped, Verified, verify_files
from metapl.data.sampler import StepSampler
from metapl.data.sets.digits import DigitsSplit, load_digits_split
from metapl.data.sets.torchvision_sets import PROTOCOLS, ImageData, SplitProtocol, load_image_data
from metapl.data.splits import Split, draw_split, stratified_split
from metapl.data.steps import StepBatches, loader
from metapl.data.unlabeled import WithoutLabels, without_labels
from metapl.data.views.base import Chain, Identity, View
from metapl.data.views.batched import Affine, Color, Flip, Hole, Recolor, Sometimes
from metapl.data.views.crops import ResizedCrop, Weak
from metapl.data.views.randaugment import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment
from metapl.data.views.seeded import Seeded
from metapl.data.views.shift_noise_cutout import ShiftNoiseCutout
from metapl.device import to_device

__all__ = [
    "CIFAR_OPERATIONS",
    "PROTOCOLS",
    "SVHN_OPERATIONS",
    "Affine",
    "Chain",
    "Color",
    "DigitsSplit",
    "EvaluationBatches",
    "Feed",
    "FileImages",
    "Files",
    "Finding",
    "Flip",
    "Hole",
    "Identity",
    "ImageData",
    "Images",
    "LabeledBatches",
    "LabeledFiles",
    "MemoryImages",
    "RandAugment",
    "Recolor",
    "ResizedCrop",
    "Seeded",
    "ShiftNoiseCutout",
    "Skipped",
    "Sometimes",
    "Split",
    "SplitProtocol",
    "StepBatches",
    "StepSampler",
    "UnlabeledBatches",
    "UnreadableImage",
    "Verified",
    "View",
    "Weak",
    "WithoutLabels",
    "check_folders",
    "draw_split",
    "feed",
    "load_digits_split",
    "load_image_data",
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
