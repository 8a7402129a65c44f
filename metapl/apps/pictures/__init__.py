"""Pictures: in files and in memory, their batches and views."""

from metapl.apps.pictures.batches import (
    EvaluationBatches,
    FileImages,
    Images,
    LabeledBatches,
    MemoryImages,
    UnlabeledBatches,
    replaced_files,
)
from metapl.apps.pictures.folders import (
    Files,
    Finding,
    LabeledFiles,
    Verified,
    check_folders,
    scan_labeled,
    scan_unlabeled,
    verify_files,
)
from metapl.apps.pictures.reader import UnreadableImage, read_image
from metapl.apps.pictures.splits import DigitsSplit, load_digits_split, stratified_split
from metapl.apps.pictures.views.base import Chain, Identity, Seeded, View
from metapl.apps.pictures.views.randaugment import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment
from metapl.apps.pictures.views.transforms import (
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
]
__all__ += [
    "FileImages",
    "Files",
    "Finding",
    "Flip",
    "Hole",
    "Identity",
    "Images",
    "LabeledBatches",
]
__all__ += [
    "LabeledFiles",
    "MemoryImages",
    "RandAugment",
    "Recolor",
    "ResizedCrop",
    "Seeded",
    "ShiftNoiseCutout",
]
__all__ += ["Sometimes", "UnlabeledBatches", "UnreadableImage", "Verified", "View", "Weak"]
__all__ += ["check_folders", "load_digits_split", "read_image", "replaced_files"]
__all__ += ["scan_labeled", "scan_unlabeled", "stratified_split", "verify_files"]
