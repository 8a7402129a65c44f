"""ImageNet-A, ImageNet-C and ImageNet-P, from the files in which they were released.

ImageNet-A   <class>/<picture>: 200 folders, called as ImageNet's classes (n01498041)
ImageNet-C   <corruption>/<severity>/<class>/<picture>; the corruptions may lie in the folders of their archives (blur)
ImageNet-P   <perturbation>/<class>/<sequence>.mp4, or a folder of frames in the place of the video

The classes of a folder are found among the network's by name. Where the network's classes have other names than the
folders, as with weights that come without names, all the folders of a data set are taken in the order of their names,
in which ImageNet's outputs are too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metapl.apps.errors import require_extra
from metapl.apps.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from metapl.apps.evaluation.measure import FLIPS_OF_ALEXNET, Robustness, flip_probability, relative_to
from metapl.apps.machine.cores import available_cores
from metapl.apps.machine.sealed import refuse_irregular
from metapl.apps.pictures.batches import in_unit_range
from metapl.apps.pictures.folders import LabeledFiles, scan_labeled
from metapl.apps.pictures.reader import SUFFIXES, UnreadableImage, fitted, read_image
from metapl.errors import MetaplError, few, reason_of
from metapl.metrics.classification import Evaluation, evaluate_logits
from metapl.metrics.predictions import logits_of

IMAGENET_OUTPUTS = 1000

# Which of ImageNet's 1,000 outputs the 200 folders of ImageNet-A are, in the order of both: the mapping that its
# authors publish with their evaluation (hendrycks/natural-adv-examples on GitHub, eval.py).
_OF_A = """
6 11 13 15 17 22 23 27 30 37 39 42 47 50 57 70 71 76 79 89 90 94 96 97 99 105 107 108 110 113 124 125 130 132
143 144 150 151 207 234 235 254 277 283 287 291 295 298 301 306 307 308 309 310 311 313 314 315 317 319 323 324
326 327 330 334 335 336 347 361 363 372 378 386 397 400 401 402 404 407 411 416 417 420 425 428 430 437 438 445
456 457 461 462 470 472 483 486 488 492 496 514 516 528 530 539 542 543 549 552 557 561 562 569 572 573 575 579
589 606 607 609 614 626 627 640 641 642 643 658 668 677 682 684 687 701 704 719 736 746 749 752 758 763 765 768
773 774 776 779 780 786 792 797 802 803 804 813 815 820 823 831 833 835 839 845 847 850 859 862 870 879 880 888
890 897 900 907 913 924 932 933 934 937 943 945 947 951 954 956 957 959 971 972 980 981 984 986 987 988
"""
IMAGENET_A = tuple(map(int, _OF_A.split()))

# Folders in which the parts of ImageNet-C and ImageNet-P may lie: what their archives are called.
ARCHIVES = ("noise", "blur", "weather", "digital", "extra")
AT_ONCE = 64  # pictures in a pass


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1,000 classes in the order of its outputs: by WordNet's numbers, or by name.

    >>> is_imagenet([f"n{number:08}" for number in range(1000)]), is_imagenet(["cat", "dog"])
    (True, False)
    """
    if len(classes) != IMAGENET_OUTPUTS:
        return False
    if all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes) == sorted(classes)
    return classes[0].startswith("tench") and classes[-1].startswith("toilet")


@dataclass(frozen=True)
class Pictures:
    """How a file becomes the input of a network: the middle of it, a share ``center`` of its sides, in so many pixels.
    ImageNet-C and -P were released as crops and are read whole."""

    side: int
    grey: bool = False
    center: float = 1.0

    @property
    def mode(self) -> Literal["RGB", "L"]:
        return "L" if self.grey else "RGB"

    def read(self, path: Path) -> Tensor:
        return in_unit_range(read_image(path, mode=self.mode, size=(self.side, self.side), center=self.center))

    def __str__(self) -> str:
        middle = "" if self.center == 1 else f", of which the middle {self.center:.1%} of the sides"
        return f"{self.side}x{self.side} pixels{', grey' * self.grey}{middle}"


@dataclass(frozen=True)
class Subject:
    """The network that is measured: it gives logits (B, K) of pictures (B, C, H, W) in [0, 1].

    ``classes`` are the names of its K ``outputs``, if they are known; with ``imagenet`` these are ImageNet's 1,000
    classes in their usual order, whatever they are called. ``skip`` is called with the reason for each file that cannot
    be read, ``progress`` with the number of pictures done.
    """

    network: nn.Module
    pictures: Pictures
    classes: tuple[str, ...] | None
    outputs: int
    imagenet: bool
    skip: Callable[[str], None] = lambda reason: None
    progress: Callable[[int], None] = lambda done: None

    def outputs_of(
        self, root: Path, folders: Sequence[str], published: Sequence[int] = range(IMAGENET_OUTPUTS)
    ) -> list[int]:
        """The output that each class folder is, by its name, or by its place among the ``published`` ones."""
        known = {name: output for output, name in enumerate(self.classes or ())}
        if unknown := [name for name in folders if name not in known]:
            if self.imagenet and len(folders) == len(published):
                return list(published)
            called = f"folders called as the network's classes ({few(known, 3)})"
            names = called if known else "their names by --classes FILE"
            whole = f", or all {len(published):,} folders of the data set" * self.imagenet
            raise MetaplError(
                f"{root}: it is not known which of the network's {self.outputs:,} outputs {few(unknown, 3)} stand for; "
                f"expected {names}{whole}."
            )
        return [known[name] for name in folders]

    def batches(self, files: LabeledFiles, labels: Sequence[int], before: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels of the files that can be read; ``before``: pictures done already."""

        def read(path: Path) -> Tensor | UnreadableImage:
            try:
                return self.pictures.read(path)
            except UnreadableImage as error:
                return error

        done, paths = before, list(map(Path, files.paths()))
        with ThreadPoolExecutor(available_cores()) as pool:  # Pillow decodes without Python's lock
            for start in range(0, len(paths), AT_ONCE):
                rows = slice(start, start + AT_ONCE)
                found = list(zip(pool.map(read, paths[rows]), labels[rows], strict=True))
                for error in (x for x, _ in found if isinstance(x, UnreadableImage)):
                    self.skip(str(error))
                if readable := [(x, y) for x, y in found if isinstance(x, Tensor)]:
                    done += len(readable)
                    self.progress(done)
                    inputs, right = zip(*readable, strict=True)
                    yield logits_of(self.network, [torch.stack(inputs)]), torch.tensor(right)
        if done == before:
            raise MetaplError(f"none of the {len(files):,} pictures in {files.root} can be read.")

    @property
    def whole(self) -> Subject:
        return replace(self, pictures=replace(self.pictures, center=1.0))


@dataclass(frozen=True)
class Stability:
    """What :func:`imagenet_p` found; ``flips`` are probabilities by perturbation."""

    sequences: int
    frames: int
    accuracy: float
    flips: dict[str, float]
    mean_flip_rate: float | None

    def to_json(self) -> dict[str, Any]:
        content = vars(self).copy()
        content["perturbations"] = {name: {"flip_probability": flips} for name, flips in content.pop("flips").items()}
        return content


def imagenet_a(subject: Subject, root: Path) -> Evaluation:
    """Accuracy and calibration on ImageNet-A's 200 class folders, by the outputs of its classes alone.

    Source: Hendrycks et al. (CVPR 2021), "Natural Adversarial Examples"; Noisy Student, appendix A.5.
    """
    files = _filled(root)
    outputs = subject.outputs_of(root, files.classes, IMAGENET_A)
    logits, labels = map(torch.cat, zip(*subject.batches(files, files.labels), strict=True))
    return evaluate_logits(logits[:, outputs], labels, files.classes)


def imagenet_c(subject: Subject, root: Path) -> Robustness:
    """Accuracies on the released pictures of ImageNet-C, by corruption and severity."""
    folders = _parts(root, CORRUPTIONS, "ImageNet-C", "gaussian_noise/1/n01440764/ILSVRC2012_val_00000293.JPEG")
    sets = {name: [_filled(folder / str(severity)) for severity in SEVERITIES] for name, folder in folders.items()}
    accuracies: dict[str, list[float]] = {name: [] for name in sets}
    n = 0
    for name, files in ((name, files) for name, severities in sets.items() for files in severities):
        outputs = subject.outputs_of(files.root, files.classes)
        right = total = 0
        for logits, y in subject.whole.batches(files, [outputs[label] for label in files.labels], before=n):
            right += int((logits.argmax(1) == y).sum())
            total += len(y)
        accuracies[name].append(right / total)
        n += total
    return Robustness(n, {name: tuple(shares) for name, shares in accuracies.items()}, {}, subject.imagenet)


def imagenet_p(subject: Subject, root: Path) -> Stability:
    """How often predictions change along the sequences of ImageNet-P, in videos or in folders of frames."""
    folders = _parts(root, FLIPS_OF_ALEXNET, "ImageNet-P", "tilt/n01440764/ILSVRC2012_val_00000293.mp4")
    flips: dict[str, float] = {}
    sequences = frames = right = 0
    for name, folder in folders.items():
        found = [path for kind in _visible(folder) if kind.is_dir() for path in _visible(kind)]
        found = [path for path in found if path.is_dir() or path.suffix.lower() == ".mp4"]
        if not found:
            raise MetaplError(
                f"{folder} has no sequence in it; expected a folder a class, of .mp4 or folders of frames."
            )
        classes = sorted({path.parent.name for path in found})
        output = dict(zip(classes, subject.outputs_of(folder, classes), strict=True))
        predictions: list[list[int]] = []
        for path in found:
            taken: list[int] = []
            inputs = _frames(path, subject.whole.pictures)
            try:
                while piece := list(islice(inputs, AT_ONCE)):
                    taken += logits_of(subject.network, [torch.stack(piece)]).argmax(1).tolist()
            except UnreadableImage as error:
                subject.skip(str(error))
                continue
            predictions.append(taken)
            right += taken.count(output[path.parent.name])
            frames += len(taken)
            subject.progress(frames)
        flips[name] = flip_probability(predictions, name)
        sequences += len(predictions)
    rate = relative_to(FLIPS_OF_ALEXNET, flips) if subject.imagenet else None
    return Stability(sequences, frames, right / frames, flips, rate)


def _frames(path: Path, pictures: Pictures) -> Iterator[Tensor]:
    """The frames of a sequence in their order, as inputs: a folder's by the numbers in their names, 9 before 10."""
    if path.is_dir():
        files = [file for file in _visible(path) if file.suffix.lower() in SUFFIXES]
        numbered = {file: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", file.name)] for file in files}
        yield from map(pictures.read, sorted(files, key=numbered.__getitem__))
        return
    try:
        refuse_irregular(path)  # to open a pipe waits for ever
    except OSError as error:
        raise UnreadableImage(path, reason_of(error)) from error
    require_extra("video", f"{path} is a video; in its place may stand a folder of its frames, or get", "av")
    import av

    try:
        with av.open(str(path)) as video:
            frames: Iterator[Any] = video.decode(video=0)  # PyAV's types are there in some environments only
            for frame in frames:
                fit = fitted(frame.to_image(), mode=pictures.mode, size=(pictures.side, pictures.side))
                yield in_unit_range(fit)
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UnreadableImage(path, f"the video cannot be decoded ({reason_of(error)})") from error


def _parts(root: Path, names: Iterable[str], kind: str, example: str) -> dict[str, Path]:
    """The folders of a data set's parts that are there, in the order of ``names``."""
    places = [root / archive for archive in ("", *ARCHIVES)]
    found = {name: place / name for name in names for place in places if (place / name).is_dir()}
    if not found:
        raise MetaplError(f"{root} has none of the folders of {kind}, {few(names, 20)}; expected {root / example}.")
    return found


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise MetaplError(f"{folder} cannot be listed: {error.strerror}.") from error


def _filled(root: Path) -> LabeledFiles:
    """A set each of whose class folders has a picture: of one that is half unpacked, the figures would be others."""
    files = scan_labeled(root)
    if empty := [files.classes[label] for label in sorted({*range(len(files.classes))} - {*files.labels})]:
        raise MetaplError(
            f"{root} has {len(empty):,} class folder{'s' * (len(empty) != 1)} without a picture: {few(empty)}; unpack "
            "the set again, or remove them."
        )
    return files
