"""Pictures: in files and in memory, their batches, views and known data sets.

``folders`` lists the files of a folder, ``check`` finds copies and other problems, ``verify`` finds unreadable files,
``reader`` reads a file, ``store`` gives images by number, with a record of files that failed.
``batches`` are the batches of a step, seen through ``views``; ``sets`` has known data sets, ``splits`` divides them.
"""

from metapl.apps.pictures.batches import EvaluationBatches, LabeledBatches, UnlabeledBatches
from metapl.apps.pictures.check import Finding, check_folders
from metapl.apps.pictures.folders import Files, LabeledFiles, scan_labeled, scan_unlabeled
from metapl.apps.pictures.reader import UnreadableImage, read_image
from metapl.apps.pictures.sets.digits import DigitsSplit, load_digits_split
from metapl.apps.pictures.sets.torchvision_sets import ImageData, load_image_data
from metapl.apps.pictures.splits import Split, draw_split, stratified_split
from metapl.apps.pictures.store import FileImages, Images, MemoryImages, replaced_files
from metapl.apps.pictures.verify import Skipped, Verified, verify_files
from metapl.apps.pictures.views.base import Chain, Identity, View
from metapl.apps.pictures.views.batched import Affine, Color, Flip, Hole, Recolor, Sometimes
from metapl.apps.pictures.views.crops import ResizedCrop, ShiftNoiseCutout, Weak
from metapl.apps.pictures.views.randaugment import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment
from metapl.apps.pictures.views.seeded import Seeded

__all__ = ["CIFAR_OPERATIONS", "SVHN_OPERATIONS", "Affine", "Chain", "Color", "DigitsSplit", "EvaluationBatches"]
__all__ += ["FileImages", "Files", "Finding", "Flip", "Hole", "Identity", "ImageData", "Images", "LabeledBatches"]
__all__ += ["LabeledFiles", "MemoryImages", "RandAugment", "Recolor", "ResizedCrop", "Seeded", "ShiftNoiseCutout"]
__all__ += ["Skipped", "Sometimes", "Split", "UnlabeledBatches", "UnreadableImage", "Verified", "View", "Weak"]
__all__ += ["check_folders", "draw_split", "load_digits_split", "load_image_data", "read_image", "replaced_files"]
__all__ += ["scan_labeled", "scan_unlabeled", "stratified_split", "verify_files"]
