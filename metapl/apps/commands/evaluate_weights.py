"""``metapl evaluate --weights FILE --network NAME``, of a network without a run"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from metapl.apps.commands.evaluators import Evaluators, Measured, left_out, write_evaluation
from metapl.apps.commands.inputs import TestFolder
from metapl.apps.commands.parse import Switch
from metapl.apps.evaluation.imagenet import IMAGENET_OUTPUTS, Pictures, Subject, is_imagenet
from metapl.apps.export import read_metadata
from metapl.apps.networks import Architecture, head_outputs, load_weights, normalized
from metapl.apps.pictures.folders import scan_labeled
from metapl.apps.pictures.reader import SUFFIXES
from metapl.apps.recipes.image_recipe import IMAGENET, LARGEST_SIDE
from metapl.errors import MetaplError, few
from metapl.runs.sealed import read_plain
from metapl.words import tell

USUAL_SIDE, USUAL_CENTER = 224, 224 / 256
"""How torchvision's networks are evaluated on ImageNet, and timm's that say nothing else."""


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

    weights: Annotated[Path, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
    network: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    image_size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")] = None
    grey: Switch = False
    mean: Annotated[tuple[float, ...], tyro.conf.arg(metavar="M", help_behavior_hint="")] = ()
    std: Annotated[tuple[float, ...], tyro.conf.arg(metavar="S", help_behavior_hint="")] = ()
    center: Annotated[float | None, tyro.conf.arg(metavar="SHARE", help_behavior_hint="")] = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> None:
        super().check()
        if self.test is None and not self.released:
            raise MetaplError(
                f"there is nothing to measure {self.weights} on: give --test DIR, a folder of pictures with one folder "
                "a class, or --imagenet-a, --imagenet-c or --imagenet-p."
            )
        if self.test is None and (self.corruptions or self.attack or self.label_sets):
            flag = "--corruptions" if self.corruptions else "--attack" if self.attack else "--label-sets"
            raise MetaplError(f"{flag} is for the pictures of --test DIR, and that was not given.")
        if bool(self.mean) != bool(self.std):
            raise MetaplError("one of --mean and --std was given; expected both, with a number for each channel.")
        if self.center is not None and not 0 < self.center <= 1:
            raise MetaplError(f"--center {self.center:g}: expected a share of the sides, above 0 and at most 1.")
        if self.image_size is not None and not 1 <= self.image_size <= LARGEST_SIDE:
            raise MetaplError(f"--image-size {self.image_size}: expected 1 to {LARGEST_SIDE:,} pixels.")

    def measured(self) -> int:
        told = read_metadata(self.weights)
        architecture, library = self._architecture(told)
        names = self._names(told, architecture.num_classes)
        pictures = self._pictures(architecture, told, library)
        mean, std = self._normalization(architecture, told, library)
        names = self._completed(names, architecture.num_classes)
        module = architecture.create()
        load_weights(module, self.weights, adapt=architecture.family.adapt)
        network: nn.Module = module if mean is None or std is None else normalized(module, mean, std)
        # Without names, a network of a thousand outputs is taken for one of ImageNet's classes.
        imagenet = architecture.num_classes == IMAGENET_OUTPUTS and (names is None or is_imagenet(names))
        subject = Subject(network.eval().to(self._device()), pictures, names, architecture.num_classes, imagenet)
        reader = _Reader(pictures, names or ())
        on = None if self.test is None else Measured.on_folder(TestFolder(reader, self.test))
        found = self.found(subject, on)
        scale = "as it is" if mean is None else f"mean {_numbers(mean)}, std {_numbers(std or ())}"
        heading = f"{self.weights}: {architecture.name}, {architecture.num_classes:,} classes"
        about: dict[str, Any] = {
            "weights": str(self.weights),
            "network": architecture.name,
            "pictures": str(pictures),
            "normalization": None if mean is None else {"mean": list(mean), "std": list(std or ())},
        }
        if on is not None:
            about |= {**on.about, "measured_on": "test"}
        content = about | found.to_json()
        if self.json:
            tell(json.dumps(content, indent=2))
        else:
            tell(f"{heading}\npictures of {pictures}; {scale}\n")
            tell(found.text("test", "", names or ()))
        write_evaluation(self.out, content, heading)
        return left_out(found.skipped)

    # --------------------------------------------------------------------------------------------------- the network

    def _architecture(self, told: Mapping[str, Any]) -> tuple[Architecture, Mapping[str, Any]]:
        """What builds the network, and what its library says of its pictures."""
        stored = told.get("architecture")
        if stored is not None:
            architecture = Architecture(**stored)
            if self.network not in (None, architecture.name):
                raise MetaplError(
                    f"--network {self.network}: {self.weights} says that it is of {architecture.name}; leave --network "
                    "out."
                )
            if self.grey and architecture.in_channels != 1:
                raise MetaplError(f"--grey: {self.weights} is of a network of colored pictures; leave --grey out.")
            size = self.image_size or architecture.image_size
            return replace(architecture, image_size=size, dropout=0.0, stochastic_depth=0.0), {}
        if self.network is None:
            raise MetaplError(
                f"{self.weights} does not say which network it is of; expected --network NAME, such as resnet50 or "
                "timm:convnext_tiny, or a model.safetensors that metapl export wrote of a network with a name."
            )
        channels = 1 if self.grey else 3
        fields: dict[str, Any] = {"name": self.network, "in_channels": channels, "image_size": self.image_size}
        drawn = Architecture(num_classes=IMAGENET_OUTPUTS, **fields)
        with torch.device("meta"):
            module = drawn.family.build(drawn)
        library = {} if drawn.library != "timm" else dict(getattr(module, "pretrained_cfg", None) or {})
        if drawn.library == "metapl" and self.image_size is None:
            raise MetaplError(
                f"{self.weights} does not say what pictures its {self.network} takes; expected --image-size, the side "
                "in pixels that it was trained with."
            )
        outputs = head_outputs(self.weights, drawn.family.heads(module))
        if outputs is None:
            raise MetaplError(
                f"{self.weights} has no tensors of {few(drawn.family.heads(module))}, which give the classes of "
                f"{self.network}; expected its weights: --network names the network that they are of."
            )
        return Architecture(num_classes=outputs, **fields), library

    def _device(self) -> torch.device:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MetaplError("--device cuda was asked for, and PyTorch sees no GPU; use --device auto or cpu.")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    # -------------------------------------------------------------------------------------------------- the pictures

    def _pictures(self, architecture: Architecture, told: Mapping[str, Any], library: Mapping[str, Any]) -> Pictures:
        exported = told.get("architecture") is not None
        usual = library.get("input_size", (3, USUAL_SIDE, USUAL_SIDE))[-1]
        side = self.image_size or architecture.image_size or int(usual)
        center = told.get("center", 1.0) if exported else float(library.get("crop_pct") or USUAL_CENTER)
        if architecture.library == "metapl" and not exported:
            center = 1.0
        return Pictures(side, architecture.in_channels == 1, float(center if self.center is None else self.center))

    def _normalization(
        self, architecture: Architecture, told: Mapping[str, Any], library: Mapping[str, Any]
    ) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and standard deviation; None where the network takes pictures in [0, 1] as they are."""
        channels = architecture.in_channels
        if self.mean:
            if len(self.mean) != channels or len(self.std) != channels:
                raise MetaplError(
                    f"--mean has {len(self.mean)} numbers and --std {len(self.std)}; expected {channels}, one for each "
                    "channel."
                )
            return self.mean, self.std
        if told.get("architecture") is not None:
            stored = told.get("normalization") or {}
            return stored.get("mean"), stored.get("std")
        if architecture.library == "metapl" or channels != 3:
            raise MetaplError(
                f"{self.weights} does not say how its pictures are normalized; expected --mean and --std, with "
                f"{channels} number{'s' * (channels != 1)} each; --mean 0 --std 1 leaves grey ones as they are."
            )
        return library.get("mean", IMAGENET[0]), library.get("std", IMAGENET[1])

    def _names(self, told: Mapping[str, Any], outputs: int) -> tuple[str, ...] | None:
        """Of the classes, as far as they are known."""
        names = _read_names(self.classes) if self.classes is not None else told.get("classes")
        if names is not None and len(names) != outputs:
            source = self.weights if self.classes is None else self.classes
            raise MetaplError(
                f"{source} names {len(names):,} classes, and {self.weights} has {outputs:,} outputs; expected a name "
                "for each, in the order of the outputs: --classes FILE."
            )
        return None if names is None else tuple(names)

    def _completed(self, names: tuple[str, ...] | None, outputs: int) -> tuple[str, ...] | None:
        """Names of the classes: where they are not known, the folders of --test give them."""
        if self.test is not None and names is None:
            folders = scan_labeled(self.test).classes
            if len(folders) != outputs:
                raise MetaplError(
                    f"{self.test} has {len(folders):,} class folders, {self.weights} has {outputs:,} outputs, and it "
                    "is not known which is which; expected the names of all classes, in the order of the outputs: "
                    "--classes FILE."
                )
            names = folders
        return names


@dataclass(frozen=True)
class _Reader:
    """Reads pictures like :class:`~metapl.apps.recipes.Recipe`."""

    pictures: Pictures
    classes: tuple[str, ...]
    reads: tuple[str, ...] = SUFFIXES

    def read(self, path: Path) -> list[tuple[str, Tensor]]:
        return [(str(path), self.pictures.read(path))]


def _read_names(file: Path) -> list[str]:
    try:
        lines = read_plain(file).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise MetaplError(
            f"--classes {file} cannot be read: {reason}; expected the name of a class in each line."
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


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
