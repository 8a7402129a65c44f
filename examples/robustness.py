"""Networks on ImageNet's released test sets, and attacked, as JSON.

    python examples/robustness.py runs/imagenet --imagenet-a DIR
    # a network with Noisy Student beside one without
    python examples/robustness.py runs/b0/round-0.safetensors runs/b0/delivered \\
        --test DIR --imagenet-a DIR --imagenet-c DIR --imagenet-p DIR \\
        --attack fgsm pgd --eps 2 16

    ImageNet-A  --imagenet-a DIR   DIR/<class>/<picture>: 200 folders, called as ImageNet's classes
                                   (n01498041)
    ImageNet-C  --imagenet-c DIR   DIR/<corruption>/<severity>/<class>/<picture>, the corruptions
                                   also inside noise/ ...
    ImageNet-P  --imagenet-p DIR   DIR/<perturbation>/<class>/<sequence>.mp4, or a folder of frames
                                   for each video
    ReaL        --test DIR         DIR/<class>/ILSVRC2012_val_<number>.JPEG, and all right outputs
                --real real.json   of each
    attacks     --test DIR         these pictures, moved against the network by --eps of 1/255

A network is that of a run, or of a file of weights: one that metapl wrote says what it is of, such
as model.safetensors of ``metapl export`` or a round of ``noisy_student_imagenet.py``; of any other,
``--network resnet50`` (torchvision's, or timm:NAME) says it. Pictures are normalized by the mean
and the std in the file; one that has none is evaluated as timm or torchvision do. ``--size 475``
brings the pictures of ImageNet-C and -P to this side, as Noisy Student has those of L2, whose other
pictures are of 800 pixels. Of several networks, ``figures`` has a list of each figure, in the order
of the command line. Class folders are found among the network's
classes by name; of a network of a thousand outputs whose names are others or unknown, all folders
of a set are taken in the order of their names, which is ImageNet's.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from operator import getitem
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from metapl.errors import MetaplError, few, reason_of
from metapl.metrics import Evaluation, evaluate_logits
from metapl.metrics.predictions import logits_of
from metapl.networks import Architecture, Normalized
from metapl.networks.tuned import IMAGENET
from metapl.networks.weights import (
    load_weights,
    read_metadata,
    read_normalization,
    read_weights,
)
from metapl.pictures.batches import in_unit_range
from metapl.pictures.folders import LabeledFiles, scan_labeled
from metapl.pictures.reader import SUFFIXES, UnreadableImage, read_image
from metapl.robustness import CORRUPTIONS, SEVERITIES, Attack, by_severity, measure
from metapl.run_folder import EndedRun

# The number of ImageNet's classes.
OUTPUTS = 1000
# Which of them ImageNet-A's 200 folders are, in the order of both (hendrycks/natural-adv-examples,
# eval.py).
IMAGENET_A = """
6 11 13 15 17 22 23 27 30 37 39 42 47 50 57 70 71 76 79 89 90 94 96 97 99 105 107 108 110 113 124
125 130 132 143 144 150 151 207 234 235 254 277 283 287 291 295 298 301 306 307 308 309 310 311 313
314 315 317 319 323 324 326 327 330 334 335 336 347 361 363 372 378 386 397 400 401 402 404 407 411
416 417 420 425 428 430 437 438 445 456 457 461 462 470 472 483 486 488 492 496 514 516 528 530 539
542 543 549 552 557 561 562 569 572 573 575 579 589 606 607 609 614 626 627 640 641 642 643 658 668
677 682 684 687 701 704 719 736 746 749 752 758 763 765 768 773 774 776 779 780 786 792 797 802 803
804 813 815 820 823 831 833 835 839 845 847 850 859 862 870 879 880 888 890 897 900 907 913 924 932
933 934 937 943 945 947 951 954 956 957 959 971 972 980 981 984 986 987 988
"""
# In which the parts of -C and -P may lie.
ARCHIVES = (
    "",
    "noise",
    "blur",
    "weather",
    "digital",
    "extra",
)
# The pictures of one pass.
AT_ONCE = 64

# AlexNet's mean top-1 error by kind on ImageNet-C, by which mCE divides, as the benchmark's authors
# publish it; and its flip probability by perturbation of ImageNet-P, by which mFR divides, rounded
# as papers restate it. With the figures that are published of ResNeXt-101 32x48d WSL
# (eminorhan/resnext-wsl) they give its printed mCE, 45.7, and mFR, 27.8.
_ERRORS = (
    0.886428,
    0.894468,
    0.922640,
    0.819880,
    0.826268,
    0.785948,
    0.798360,
    0.866816,
    0.826572,
    0.819324,
)
ALEXNET = dict(
    zip(CORRUPTIONS, (*_ERRORS, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500), strict=True)
)
_MOVED = {"translate": 0.1101, "rotate": 0.1310, "tilt": 0.0705, "scale": 0.2353}
FLIPS_OF_ALEXNET = {
    "gaussian_noise": 0.2365,
    "shot_noise": 0.3006,
    "motion_blur": 0.0930,
    "zoom_blur": 0.0594,
}
FLIPS_OF_ALEXNET |= {"snow": 0.1193, "brightness": 0.0489, **_MOVED}


@dataclass(frozen=True)
class Subject:
    """A network that gives logits (B, K) of pictures (B, C, side, side) in [0, 1].

    Only the middle of a picture is looked at.

    Attributes:
        classes: None where their names are not known.
        center: the share of the sides that is looked at; pictures of ImageNet-C and -P were
            released as crops.
    """

    network: nn.Module
    side: int
    classes: Sequence[str] | None
    outputs: int
    grey: bool = False
    center: float = 1.0

    def read(self, path: Path) -> Tensor:
        size, center = (self.side, self.side), self.center
        return in_unit_range(
            read_image(path, colors="L" if self.grey else "RGB", size=size, center=center)
        )

    def outputs_of(
        self, root: Path, folders: Sequence[str], published: Sequence[int] = range(OUTPUTS)
    ) -> list[int]:
        """Return the output that each class folder is.

        It is found by the folder's name, or by its place among the ``published`` ones.
        """
        output_of_class: dict[str, int] = {}
        for output, name in enumerate(self.classes or ()):
            output_of_class[name] = output
            # The papers' scripts call a class of ImageNet "tench (n01440764)".
            if wnid := re.search(r"\((n\d{8})\)$", name):
                output_of_class[wnid[1]] = output
        if unknown := [name for name in folders if name not in output_of_class]:
            if self.outputs == OUTPUTS and len(folders) == len(published):
                return list(published)
            raise MetaplError(
                f"{root}: it is not known which of the network's {self.outputs:,} outputs "
                f"{few(unknown, 3)} stand for; expected folders called as its classes, or all "
                f"{len(published):,} of the set and of ImageNet."
            )
        return [output_of_class[name] for name in folders]

    def batches(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        """Yield the pictures in files, some at a time."""
        # Pillow decodes without Python's lock, so threads are enough.
        with ThreadPoolExecutor(cpu_count()) as pool:
            for first in range(0, len(paths), AT_ONCE):
                yield torch.stack([*pool.map(self.read, paths[first : first + AT_ONCE])])

    def logits(self, paths: Sequence[Path]) -> Tensor:
        """Return the logits of pictures in files, (N, K)."""
        return logits_of(self.network, self.batches(paths))

    def on_crops(self, side: int | None) -> Subject:
        """Return this network for pictures of ImageNet-C or -P, which were released as crops.

        Args:
            side: to which they are brought; None: that of other pictures.
        """
        subject = replace(self, center=1.0, side=side or self.side)
        channels = 1 if self.grey else 3
        try:
            logits_of(self.network, [torch.zeros(1, channels, subject.side, subject.side)])
        except (RuntimeError, AssertionError, ValueError) as error:
            # A vision transformer is built for one side, and small pictures vanish in pooling.
            raise MetaplError(
                f"--size {side}: the network does not take such pictures ({reason_of(error)}); "
                f"expected another side, such as {self.side}."
            ) from error
        return subject


def of_run(folder: Path) -> Subject:
    """Return the network that a run delivers."""
    run = EndedRun.load(folder)
    name = run.name("delivered")
    reads = run.cards[name].input
    if reads.kind != "picture":
        raise MetaplError(
            f"the network of {folder} takes a {reads.kind}; expected a run on pictures in files."
        )
    network = run.network(name).eval().to(run.device)
    return Subject(
        network, reads.size, run.classes, len(run.classes), reads.channels == 1, reads.center
    )


def of_weights(file: Path, name: str | None) -> Subject:
    """Return the network of a file of weights, by what the file says, or by ``name``.

    The name says the library that has the network, too.
    """
    metadata = read_metadata(file)
    # This is how torchvision evaluates its networks.
    side = 224
    middle = 224 / 256
    normalization: Any = IMAGENET
    if "architecture" in metadata:
        architecture = Architecture(**metadata["architecture"])
        if name not in (None, architecture.name):
            raise MetaplError(f"{file} is of {architecture.name}; leave out --network {name}.")
        network = replace(architecture, dropout=0.0, stochastic_depth=0.0)
        side = network.image_size or side
        middle = metadata.get("center", 1.0)
        normalization = read_normalization(file)
    else:
        if name is None:
            raise MetaplError(
                f"{file} does not say which network it is of; expected --network NAME, such as "
                "resnet50."
            )
        network = Architecture(name=name, num_classes=OUTPUTS)
        with torch.device("meta"):
            module = network.create()
        stored = read_normalization(file)
        if network.library == "timm":
            evaluated: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
            side = evaluated.get("input_size", (3, side, side))[-1]
            middle = evaluated.get("crop_pct") or middle
            normalization = (evaluated.get("mean", IMAGENET[0]), evaluated.get("std", IMAGENET[1]))
        elif network.library == "metapl" and stored is None:
            raise MetaplError(
                f"{file} does not say how its pictures are normalized; expected one of metapl "
                "export."
            )
        normalization = stored or normalization
        bias = read_weights(file).get(f"{network.heads(module)[0]}.bias")
        if bias is None:
            raise MetaplError(
                f"{file} has no tensors of {few(network.heads(module))}, the head of {name}."
            )
        network = replace(network, num_classes=len(bias))
    module = network.create()
    load_weights(module, file)
    module = (module if normalization is None else Normalized(module, *normalization)).eval()
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    return Subject(
        module, side, metadata.get("classes"), network.num_classes, network.in_channels == 1, middle
    )


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def figures(evaluation: Evaluation) -> dict[str, Any]:
    names = ("n", "accuracy", "top5", "negative_log_likelihood", "expected_calibration_error")
    return {name: getattr(evaluation, name) for name in names}


def imagenet_a(subject: Subject, root: Path) -> dict[str, Any]:
    """Return accuracy and calibration on 200 class folders, by these classes' outputs alone.

    Source: Hendrycks et al. (CVPR 2021), "Natural Adversarial Examples"; Noisy Student, appendix
    A.5.
    """
    files = filled(root)
    outputs = subject.outputs_of(root, files.classes, [*map(int, IMAGENET_A.split())])
    logits = subject.logits([*map(Path, files.paths())])[:, outputs]
    return figures(evaluate_logits(logits, torch.tensor(files.labels)))


def imagenet_c(subject: Subject, root: Path) -> dict[str, Any]:
    """Return accuracies by corruption and severity, and mCE where all fifteen are there.

    ``subject`` is one of :meth:`Subject.on_crops`.
    """
    folders = parts(root, CORRUPTIONS, "gaussian_noise/1/n01440764/ILSVRC2012_val_00000293.JPEG")
    # All folders are listed first, so that a missing one is said before any picture is read.
    sets_by_name = {}
    for name, folder in folders.items():
        sets_by_name[name] = [filled(folder / str(severity)) for severity in SEVERITIES]
    n = 0
    accuracies: dict[str, list[float]] = {}
    for name, sets in sets_by_name.items():
        for files in sets:
            outputs = torch.tensor(subject.outputs_of(files.root, files.classes))
            guesses = subject.logits([*map(Path, files.paths())]).argmax(1)
            right = guesses == outputs[torch.tensor(files.labels)]
            accuracies.setdefault(name, []).append(float(right.double().mean()))
            n += len(files)
    measured = by_severity(accuracies)
    errors = {name: kind["error"] for name, kind in measured["corruptions"].items()}
    mce = relative_to(ALEXNET, errors) if subject.outputs == OUTPUTS else None
    return {"n": n, "side": subject.side, **measured, "mean_corruption_error": mce}


def imagenet_p(subject: Subject, root: Path) -> dict[str, Any]:
    """Return how often predictions change along the sequences, in videos or in frames, and mFR.

    ``subject`` is one of :meth:`Subject.on_crops`.
    """
    folders = parts(root, FLIPS_OF_ALEXNET, "tilt/n01440764/ILSVRC2012_val_00000293.mp4")
    flips = dict[str, float]()
    sequences = 0
    frames = 0
    right = 0
    for name, folder in folders.items():
        paths: list[Path] = []
        for class_folder in visible(folder):
            if class_folder.is_dir():
                for path in visible(class_folder):
                    if path.is_dir() or path.suffix.lower() == ".mp4":
                        paths.append(path)
        if not paths:
            raise MetaplError(
                f"{folder} has no sequence; expected a folder a class, of .mp4 or folders of "
                "frames."
            )
        classes = sorted({path.parent.name for path in paths})
        output = dict(zip(classes, subject.outputs_of(folder, classes), strict=True))
        predictions: list[list[int]] = []
        for path in paths:
            inputs = frames_of(path, subject)
            taken = list[int]()
            while piece := [*islice(inputs, AT_ONCE)]:
                taken += logits_of(subject.network, [torch.stack(piece)]).argmax(1).tolist()
            predictions.append(taken)
            right += taken.count(output[path.parent.name])
            frames += len(taken)
        flips[name] = flip_probability(predictions, name)
        sequences += len(predictions)
    rate = relative_to(FLIPS_OF_ALEXNET, flips) if subject.outputs == OUTPUTS else None
    about = {"sequences": sequences, "frames": frames, "side": subject.side}
    about |= {"accuracy": right / frames}
    return {**about, "flip_probability": flips, "mean_flip_rate": rate}


def relative_to(alexnet: Mapping[str, float], values: Mapping[str, float]) -> float | None:
    r"""Return errors, or flip probabilities, relative to AlexNet's in %; None if a kind is missing.

    .. math:: \mathrm{mCE} = 100 \cdot \tfrac{1}{15} \sum_c
              \frac{\sum_s E_{s,c}}{\sum_s E^{\mathrm{AlexNet}}_{s,c}}, \qquad
              \mathrm{mFR} = 100 \cdot \tfrac{1}{10} \sum_p
                \mathrm{FP}_p / \mathrm{FP}^{\mathrm{AlexNet}}_p

    Source: Hendrycks and Dietterich (ICLR 2019), sections 4.1 and 4.2.
    """
    if alexnet.keys() != values.keys():
        return None
    return 100 * fmean(values[name] / divisor for name, divisor in alexnet.items())


def flip_probability(predictions: Sequence[Sequence[int]], perturbation: str) -> float:
    r"""Return how often the predicted class changes from one frame to the next.

    .. math:: \mathrm{FP}_p = \frac{1}{m} \sum_{i=1}^{m} \frac{1}{n_i - 1} \sum_{j=2}^{n_i}
              [f(x^{(i)}_j) \ne f(x^{(i)}_{j-1})], \qquad x_{j-1} \to x_1 \text{ for noise}

    ``predictions`` are, for each of the m sequences, the classes of its n_i frames, 2 or more.
    Frames of noise do not follow each other: each is compared with the first, which is clean.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.2.

    >>> flip_probability([[3, 7, 7, 7, 7]], "tilt")
    0.25
    >>> flip_probability([[3, 7, 7, 7, 7]], "shot_noise")
    1.0
    """
    least = min(map(len, predictions), default=0)
    if least < 2:
        raise MetaplError(
            f"{perturbation}: {len(predictions):,} sequences, the shortest of {least} frames; "
            "expected at least one, and two frames in each."
        )
    noise = perturbation in ("gaussian_noise", "shot_noise")
    return fmean(
        np.mean(c[1:] != (c[0] if noise else c[:-1])) for c in map(np.asarray, predictions)
    )


def frames_of(path: Path, subject: Subject) -> Iterator[Tensor]:
    """Yield the frames of a sequence in their order.

    Those of a folder are in the order of the numbers in their names, 9 before 10.
    """
    if path.is_dir():
        files = [file for file in visible(path) if file.suffix.lower() in SUFFIXES]
        numbers = {
            file: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", file.name)]
            for file in files
        }
        yield from map(subject.read, sorted(files, key=numbers.__getitem__))
        return
    try:
        import av
    except ImportError as error:
        raise MetaplError(
            f"{path} is a video: pip install av, or put a folder of its frames in its place."
        ) from error
    try:
        with av.open(str(path)) as video:
            decoded: Iterator[Any] = video.decode(video=0)
            for frame in decoded:
                image = frame.to_image().convert("L" if subject.grey else "RGB")
                square = ImageOps.fit(
                    image, (subject.side, subject.side), Image.Resampling.BILINEAR
                )
                yield in_unit_range(pil_to_tensor(square))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UnreadableImage(path, f"the video cannot be decoded ({reason_of(error)})") from error


def parts(root: Path, names: Iterable[str], example: str) -> dict[str, Path]:
    """Return the folders of a set's parts that are there, in the order of ``names``."""
    places = [root / archive for archive in ARCHIVES]
    folders = {name: place / name for name in names for place in places if (place / name).is_dir()}
    if not folders:
        raise MetaplError(
            f"{root} has none of the folders of the set, {few(names, 20)}; expected "
            f"{root / example}."
        )
    return folders


def filled(root: Path) -> LabeledFiles:
    """Return the class folders; refuse them where one has no picture.

    The folders of a set that is half unpacked would stand for other outputs.
    """
    files = scan_labeled(root)
    if empty := [name for name, count in files.counts().items() if not count]:
        raise MetaplError(
            f"{root} has class folders without a picture: {few(empty)}; unpack the set again."
        )
    return files


def real(file: Path, paths: Sequence[Path], guesses: Sequence[int]) -> dict[str, Any]:
    """Return the share of predictions among a picture's right outputs; those without do not count.

    Source: Beyer et al. 2020, "Are we done with ImageNet?", section 3.1.
    """
    entries = json.loads(file.read_text())
    numbers = [re.fullmatch(r"ILSVRC2012_val_(\d{8})", path.stem) for path in paths]
    if unknown := [
        p.name
        for p, n in zip(paths, numbers, strict=True)
        if not n or not 0 < int(n[1]) <= len(entries)
    ]:
        raise MetaplError(
            f"{file} has no entry of {few(unknown)}; expected ILSVRC2012_val_<number>, 1 to "
            f"{len(entries)}."
        )
    sets = [entries[int(number[1]) - 1] for number in numbers if number]
    hits = [guess in right for guess, right in zip(guesses, sets, strict=True) if right]
    return {
        "accuracy": sum(hits) / max(1, len(hits)),
        "n": len(hits),
        "without_label": len(sets) - len(hits),
    }


def measured(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Return all that a command line asks for of one network."""
    results: dict[str, Any] = {}
    if args.test:
        files = scan_labeled(args.test)
        outputs = torch.tensor(subject.outputs_of(args.test, files.classes))
        labels = outputs[torch.tensor(files.labels)]
        paths = [*map(Path, files.paths())]
        logits = subject.logits(paths)
        results = {"side": subject.side, **figures(evaluate_logits(logits, labels))}
        if args.real:
            results["real"] = real(args.real, paths, logits.argmax(1).tolist())
        if args.attack:
            batches = zip(subject.batches(paths), labels.split(AT_ONCE), strict=True)
            results |= measure(
                subject.network, batches, corruptions=(), attacks=args.attack, eps=args.eps
            )
    if args.imagenet_a:
        results["imagenet_a"] = imagenet_a(subject, args.imagenet_a)
    for measure_crops in (imagenet_c, imagenet_p):
        if folder := getattr(args, measure_crops.__name__):
            results[measure_crops.__name__] = measure_crops(subject.on_crops(args.size), folder)
    return results


def beside(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the figures that papers print, by their names, with one value for each network.

    Accuracies are shares, and mCE and mFR in %, as in the results.
    """
    places = {
        "top-1": ("accuracy",),
        "top-5": ("top5",),
        "ReaL": ("real", "accuracy"),
        "ImageNet-A top-1": ("imagenet_a", "accuracy"),
        "ImageNet-A top-5": ("imagenet_a", "top5"),
        "ImageNet-C top-1": ("imagenet_c", "mean_corrupted_accuracy"),
        "ImageNet-C mCE": ("imagenet_c", "mean_corruption_error"),
        "ImageNet-P top-1": ("imagenet_p", "accuracy"),
        "ImageNet-P mFR": ("imagenet_p", "mean_flip_rate"),
    }
    for attack, by_eps in results[0].get("attacks", {}).items():
        for eps in by_eps:
            places[f"{attack.upper()} {eps}/255"] = ("attacks", attack, eps)
    lists = {}
    for name, place in places.items():
        if place[0] in results[0]:
            lists[name] = [reduce(getitem, place, result) for result in results]
    return lists


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", type=Path, nargs="+", metavar="RUN_OR_WEIGHTS")
    parser.add_argument(
        "--network", dest="name", metavar="NAME", help="of files that do not say it"
    )
    for flag in ("--test", "--real", "--imagenet-a", "--imagenet-c", "--imagenet-p"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--size", type=int, help="side of the pictures of ImageNet-C and -P")
    parser.add_argument("--attack", nargs="+", choices=get_args(Attack), default=[])
    parser.add_argument("--eps", nargs="+", type=float, default=[], help="in 1/255")
    args = parser.parse_args()
    try:
        for flag, needed in (
            ("real", "test"),
            ("attack", "test"),
            ("attack", "eps"),
            ("eps", "attack"),
        ):
            if getattr(args, flag) and not getattr(args, needed):
                raise MetaplError(f"--{flag} was given without --{needed}.")
        if args.size is not None and not (args.size > 0 and (args.imagenet_c or args.imagenet_p)):
            raise MetaplError(
                f"--size {args.size}: expected pixels, beside --imagenet-c or --imagenet-p."
            )
        results: list[dict[str, Any]] = []
        for place in args.networks:
            subject = of_run(place) if place.is_dir() else of_weights(place, args.name)
            results.append({"network": str(place), **measured(subject, args)})
    except MetaplError as error:
        parser.error(str(error))
    if len(results) == 1:
        print(json.dumps(results[0], indent=1))
        return
    print(json.dumps({"figures": beside(results), "networks": results}, indent=1))


if __name__ == "__main__":
    main()
