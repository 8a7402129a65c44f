"""``metapl evaluate --weights FILE --network NAME``, of a network without a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from metapl.apps.commands.evaluate import Evaluators
from metapl.apps.commands.inputs import TestFolder
from metapl.apps.commands.parse import File, Switch, unset
from metapl.apps.evaluation.imagenet import IMAGENET_OUTPUTS, Pictures, Subject, is_imagenet
from metapl.apps.export import read_metadata
from metapl.apps.machine.sealed import read_plain
from metapl.apps.networks import Architecture, head_outputs, load_weights, normalized
from metapl.apps.pictures.folders import scan_labeled
from metapl.apps.pictures.reader import SUFFIXES
from metapl.apps.recipes.image_recipe import IMAGENET, LARGEST_SIDE
from metapl.errors import MetaplError, few, reason_of
from metapl.runs.fields import Range

# How torchvision's networks are evaluated on ImageNet, and timm's that say nothing else.
USUAL_SIDE, USUAL_CENTER = 224, 224 / 256

Side = Annotated[int, Range(1, most=LARGEST_SIDE)]
Share = Annotated[float, Range(above=0, most=1, of="a share of the sides")]


@dataclass(frozen=True, kw_only=True)
class EvaluateWeights(Evaluators):
    """Measure a network of a file of weights, without a run: accuracy, calibration, and all that evaluate RUN measures.

    The network is one that metapl knows by name: its own, torchvision's or timm's (timm:NAME). A model.safetensors of
    metapl export says itself which network it is of, how pictures are normalized and what its classes are called. For
    any other file, --network says which; the number of classes is the file's; pictures are normalized as ImageNet's
    and read at 224 pixels (of timm's networks, as timm has it), which is printed; other flags change that.

    Without names of classes, those of the test folders count, in their order, if there are as many as outputs.

    Args:
        weights: the file: .safetensors, or what torch.save wrote.
        network: its name, such as resnet50, efficientnet_b0 or timm:convnext_tiny.
        classes: text file with the name of a class in each line, in the order of the outputs. Of lines that begin with
            WordNet's numbers (n01440764 tench), these are taken.
        image_size: side in pixels that every picture is brought to.
        grey: pictures are read without colors.
        mean: mean of each channel, from 0 to 1, by which pictures are normalized.
        std: standard deviation of each channel, likewise.
        center: share of a picture's sides that is looked at.
        device: auto takes a GPU if there is one.
    """

    weights: Annotated[Path, unset("FILE")]
    network: Annotated[str | None, unset("NAME")] = None
    classes: File = None
    image_size: Annotated[Side | None, unset("PIXELS")] = None
    grey: Switch = False
    mean: Annotated[tuple[float, ...], unset("M ...")] = ()
    std: Annotated[tuple[float, ...], unset("S ...")] = ()
    center: Annotated[Share | None, unset("SHARE")] = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> None:
        super().check()
        if self.test is None and not self.released:
            raise MetaplError(
                f"there is nothing to measure {self.weights} on: give --test DIR, a folder of pictures with one folder "
                "a class, or --imagenet-a, --imagenet-c or --imagenet-p."
            )
        for flag in ("corruptions", "attack", "label_sets"):
            if self.test is None and getattr(self, flag):
                named = flag.replace("_", "-")
                raise MetaplError(f"--{named} is for the pictures of --test DIR, and that was not given.")
        if bool(self.mean) != bool(self.std):
            raise MetaplError("one of --mean and --std was given; expected both, with a number for each channel.")

    def evaluated(self) -> int:
        told = {name: value for name, value in read_metadata(self.weights).items() if value is not None}
        network, library = self._network(told)
        outputs, channels, exported = network.num_classes, network.in_channels, "architecture" in told
        side = self.image_size or network.image_size or library.get("input_size", (3, USUAL_SIDE, USUAL_SIDE))[-1]
        center = float(told.get("center", 1.0) if exported else library.get("crop_pct") or USUAL_CENTER)
        if network.library == "metapl" and not exported:
            center = 1.0
        pictures = Pictures(int(side), channels == 1, center if self.center is None else self.center)
        mean, std = self._normalization(network, told, library)
        names = self._names(told, outputs)
        gpu = torch.cuda.is_available()
        if self.device == "cuda" and not gpu:
            raise MetaplError("--device cuda was asked for, and PyTorch sees no GPU; use --device auto or cpu.")
        module = network.create()
        load_weights(module, self.weights, adapt=network.family.adapt)
        if mean is not None and std is not None:
            module = normalized(module, mean, std)
        # Without names, a network of a thousand outputs is taken for one of ImageNet's classes.
        imagenet = outputs == IMAGENET_OUTPUTS and (names is None or is_imagenet(names))
        module = module.eval().to("cuda" if gpu and self.device != "cpu" else "cpu")
        subject = Subject(module, pictures, names, outputs, imagenet)
        on = None if self.test is None else TestFolder(_Reader(pictures, names or ()), self.test)
        numbers = [", ".join(f"{value:.4g}" for value in values or ()) for values in (mean, std)]
        scale = "as it is" if mean is None else "mean {}, std {}".format(*numbers)
        heading = f"{self.weights}: {network.name}, {outputs:,} classes\npictures of {pictures}; {scale}"
        about: dict[str, Any] = {
            "weights": str(self.weights),
            "network": network.name,
            "pictures": str(pictures),
            "normalization": None if mean is None else {"mean": list(mean), "std": list(std or ())},
        }
        return self.found(subject, on, heading, about | ({} if on is None else on.about))

    def _network(self, told: Mapping[str, Any]) -> tuple[Architecture, Mapping[str, Any]]:
        if "architecture" in told:
            stored = Architecture(**told["architecture"])
            if self.network not in (None, stored.name):
                raise MetaplError(
                    f"--network {self.network}: {self.weights} says that it is of {stored.name}; leave --network out."
                )
            if self.grey and stored.in_channels != 1:
                raise MetaplError(f"--grey: {self.weights} is of a network of colored pictures; leave --grey out.")
            size = self.image_size or stored.image_size
            return replace(stored, image_size=size, dropout=0.0, stochastic_depth=0.0), {}
        if self.network is None:
            raise MetaplError(
                f"{self.weights} does not say which network it is of; expected --network NAME, such as resnet50 or "
                "timm:convnext_tiny, or a model.safetensors that metapl export wrote of a network with a name."
            )
        sizes: dict[str, Any] = {"in_channels": 1 if self.grey else 3, "image_size": self.image_size}
        drawn = Architecture(name=self.network, num_classes=IMAGENET_OUTPUTS, **sizes)
        if drawn.library == "metapl" and self.image_size is None:
            raise MetaplError(
                f"{self.weights} does not say what pictures its {self.network} takes; expected --image-size, the side "
                "in pixels that it was trained with."
            )
        with torch.device("meta"):
            module = drawn.family.build(drawn)
        library = {} if drawn.library != "timm" else dict(getattr(module, "pretrained_cfg", None) or {})
        outputs = head_outputs(self.weights, drawn.family.heads(module))
        if outputs is None:
            raise MetaplError(
                f"{self.weights} has no tensors of {few(drawn.family.heads(module))}, which give the classes of "
                f"{self.network}; expected its weights: --network names the network that they are of."
            )
        return replace(drawn, num_classes=outputs), library

    def _normalization(
        self, network: Architecture, told: Mapping[str, Any], library: Mapping[str, Any]
    ) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and standard deviation; None where the network takes pictures in [0, 1] as they are."""
        channels = network.in_channels
        if self.mean:
            if len(self.mean) != channels or len(self.std) != channels:
                raise MetaplError(
                    f"--mean has {len(self.mean)} numbers and --std {len(self.std)}; expected {channels}, one for each "
                    "channel."
                )
            return self.mean, self.std
        if "architecture" in told:
            stored = told.get("normalization", {})
            return stored.get("mean"), stored.get("std")
        if network.library == "metapl" or channels != 3:
            raise MetaplError(
                f"{self.weights} does not say how its pictures are normalized; expected --mean and --std, with "
                f"{channels} number{'s' * (channels != 1)} each; --mean 0 --std 1 leaves grey ones as they are."
            )
        return library.get("mean", IMAGENET[0]), library.get("std", IMAGENET[1])

    def _names(self, told: Mapping[str, Any], outputs: int) -> tuple[str, ...] | None:
        """Of the classes, as far as they are known: by --classes, by the file, or by the folders of --test."""
        names = _read_names(self.classes) if self.classes is not None else told.get("classes")
        said, kind = f"{self.classes or self.weights} names", "classes"
        if names is None and self.test is not None:
            names, said, kind = scan_labeled(self.test).classes, f"{self.test} has", "class folders"
        if names is not None and len(names) != outputs:
            raise MetaplError(
                f"{said} {len(names):,} {kind}, and {self.weights} has {outputs:,} outputs; expected a name for each, "
                "in the order of the outputs: --classes FILE."
            )
        return None if names is None else tuple(names)


@dataclass(frozen=True)
class _Reader:
    pictures: Pictures
    classes: tuple[str, ...]
    reads: tuple[str, ...] = SUFFIXES

    def read(self, path: Path) -> list[tuple[str, Tensor]]:
        return [(str(path), self.pictures.read(path))]


def _read_names(file: Path) -> list[str]:
    try:
        lines = read_plain(file).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MetaplError(
            f"--classes {file} cannot be read: {reason_of(error)}; expected the name of a class in each line, in UTF-8."
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    numbers = [re.match(r"n\d{8}\b", name) for name in names]
    if names and all(numbers):
        names = [number[0] for number in numbers if number]
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated or not names:
        what = f"has {few(repeated)} more than once" if repeated else "has no line"
        raise MetaplError(f"--classes {file} {what}; expected the name of a class in each line, once.")
    return names
