"""Pictures: in files and in memory, their batches and views."""

from metapl.pictures.batches import (
    EvaluationBatches,
    FileImages,
    Images,
    LabeledBatches,
    MemoryImages,
    UnlabeledBatches,
    replaced_files,
)
from metapl.pictures.folders import (
    Files,
    Finding,
    LabeledFiles,
    Verified,
    check_folders,
    scan_labeled,
    scan_unlabeled,
    verify_files,
)
from metapl.pictures.levels import find_levels
from metapl.pictures.reader import UnreadableImage, read_image
from metapl.pictures.splits import DigitsSplit, load_digits_split, stratified_split
from metapl.pictures.views.base import Chain, Identity, Seeded, View
from metapl.pictures.views.randaugment import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment
from metapl.pictures.views.transforms import (
    Affine,
    Color,
    Flip,
    Hole,
    Recolor,
    ResizedCrop,
    ShiftNoiseCutout,
    Sometimes,
    Weak,
)

__all__ = [
    "CIFAR_OPERATIONS",
    "SVHN_OPERATIONS",
    "Affine",
    "Chain",
    "Color",
    "DigitsSplit",
    "EvaluationBatches",
    "FileImages",
    "Files",
    "Finding",
    "Flip",
    "Hole",
    "Identity",
    "Images",
    "LabeledBatches",
    "LabeledFiles",
    "MemoryImages",
    "RandAugment",
    "Recolor",
    "ResizedCrop",
    "Seeded",
    "ShiftNoiseCutout",
    "Sometimes",
    "UnlabeledBatches",
    "UnreadableImage",
    "Verified",
    "View",
    "Weak",
    "check_folders",
    "find_levels",
    "load_digits_split",
    "read_image",
    "replaced_files",
    "scan_labeled",
    "scan_unlabeled",
    "stratified_split",
    "verify_files",
]
