"""A trained network for others: a program that needs torch alone, its weights, and a card that says what they are.

model.safetensors   the weights under the names that torchvision or timm give them
model.pt2           the whole network as a program of torch.export, which needs torch alone
model.onnx          the same as ONNX, if wanted
MODEL_CARD.md       recipe, data, metrics, versions, and code that loads each
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from metapl.apps.export.card import CARD, WEIGHTS, render
from metapl.apps.export.programs import ONNX, PROGRAM, programs
from metapl.apps.networks import Architecture, Normalized, normalized
from metapl.errors import MetaplError, reason_of
from metapl.runs.atomic import replacing
from metapl.runs.fields import Range, misfit_entries

_REQUIRED, _OPTIONAL = ("recipe", "data_hash", "metrics"), ("title", "classes", "notes", "center")

_METADATA: dict[str, Any] = {
    "architecture": Architecture | None,
    "normalization": dict[str, list[float]] | None,
    "classes": list[str] | None,
    "center": Annotated[float, Range(above=0, most=1)],
}
"""What :func:`export` tells of weights, with types."""


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Args:
        weights, card: the files.
        sha256: of the file of weights; the card states it too.
        program, onnx: the network as programs; None where they were not asked for.
    """

    weights: Path
    card: Path
    sha256: str
    program: Path | None = None
    onnx: Path | None = None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    card: Mapping[str, Any],
    architecture: Architecture | None = None,
    shape: Sequence[int] | None = None,
    onnx: bool = False,
) -> Exported:
    """Write a network's weights, the network as a program, and their model card into a folder.

    The weights go under the network's own names: wrappers by :func:`metapl.apps.networks.normalized` and
    ``torch.compile`` are taken off, so ``torchvision.models.…().load_state_dict(…)`` takes the file as it is. Mean and
    std of a normalized network, the classes and the architecture stand in the file's metadata and on the card, whose
    code normalizes. The programs normalize themselves. Before anything is written, each is run where metapl cannot be
    imported, and its outputs are compared with the network's.

    Args:
        model: the network, on any device; it is left as it is.
        path: the folder; made if need be. Files of an earlier export in it are replaced, each whole or not at all, the
            card last; it states the files' SHA-256.
        card: what the card says: ``recipe`` (a mapping), ``data_hash`` (text, or a mapping of texts), ``metrics`` (a
            mapping from name to number); if wanted ``title``, ``classes`` (their names in the order of the outputs),
            ``notes`` (text in Markdown), and ``center``, the share of a picture's sides that the network is evaluated
            on, for the file's metadata.
        architecture: what builds the network; checked against the weights. None, for a network of your own: the card's
            code spells out a plain sequence of layers, such as :func:`metapl.models.mlp` makes, and leaves the building
            of any other to you.
        shape: (C, H, W) of a picture, for ``model.pt2``: any number of pictures of this size to logits, loaded by
            ``torch.export.load``. None: no program is written.
        onnx: ``model.onnx`` too, which needs ``pip install 'metapl[onnx]'``.

    Returns:
        The files. The same network and card give the same bytes, with the same versions of the packages.

    Cost: with ``shape``, about 10 seconds and a copy of the network; see :func:`metapl.apps.export.programs.programs`.

    Raises:
        MetaplError: a card with a part missing or unknown, weights that are not finite or not of ``architecture``, a
            number of classes that is not that of the network, a network that torch.export cannot export or whose
            program gives something else, a package that is not installed, a folder that cannot be written, or one with
            a program of an earlier export that this one would not replace.

    >>> import tempfile
    >>> from metapl.apps.networks import create
    >>> small = Architecture(name="small_cnn", num_classes=2, in_channels=1)
    >>> written = export(small.create(), tempfile.mkdtemp(), architecture=small, card={
    ...     "recipe": {"steps": 100}, "data_hash": "sha256:1f…", "metrics": {"test accuracy": 0.97}})
    >>> written.weights.name, written.card.name
    ('model.safetensors', 'MODEL_CARD.md')
    """
    folder = Path(path)
    module, normalization = _unwrapped(model)
    state = module.state_dict()
    for fault in _faults(card, architecture, state, folder, shape is not None, onnx):
        raise MetaplError(fault)
    classes, center = card.get("classes"), card.get("center", 1.0)
    metadata = ({} if center == 1.0 else {"center": center}) | {
        "architecture": None if architecture is None else asdict(architecture),
        "normalization": normalization,
        "classes": None if classes is None else list(classes),
    }
    # Tensors that share memory, as tied weights do, are written one by one: safetensors refuses them otherwise.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in sorted(state.items())}
    # One entry, for safetensors writes several in an order that changes from call to call.
    files = {WEIGHTS: save(plain, {"metapl": json.dumps(metadata, sort_keys=True)})}
    if shape is not None:
        files |= programs(module if normalization is None else normalized(module, **normalization), shape, onnx)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[CARD] = render(card, module, normalization, architecture, digests).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with replacing(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise MetaplError(f"{folder} could not be written: {error.strerror or error}.") from error
    program, as_onnx = (folder / name if name in files else None for name in (PROGRAM, ONNX))
    return Exported(folder / WEIGHTS, folder / CARD, digests[WEIGHTS], program, as_onnx)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, dict[str, list[float]] | None]:
    """The network whose names others know, and the normalization that stood before it."""
    normalization = None
    while True:
        if isinstance(model, Normalized):
            if normalization is not None:
                raise MetaplError("export got a network that is normalized twice; expected one normalization.")
            pairs = {name: t.detach().flatten().float().cpu().numpy() for name, t in model.named_buffers(recurse=False)}
            # The shortest decimals that give the same float32 numbers.
            normalization = {name: [float(str(x)) for x in pairs[name]] for name in ("mean", "std")}
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model, normalization


def _faults(
    card: Mapping[str, Any],
    architecture: Architecture | None,
    state: Mapping[str, Tensor],
    folder: Path,
    program: bool,
    onnx: bool,
) -> Iterator[str]:
    """What cannot be exported, in words."""
    missing, unknown = sorted({*_REQUIRED} - card.keys()), sorted(card.keys() - {*_REQUIRED, *_OPTIONAL})
    if missing or unknown:
        expected = f"{', '.join(_REQUIRED)}, and if wanted {', '.join(_OPTIONAL)}"
        yield f"the model card lacks {missing} and has the unknown {unknown}; expected {expected}."
    if onnx and not program:
        yield "onnx=True was given without shape; expected the shape of a picture too: shape=(3, 32, 32)."
    for name, replaced, mend in ((PROGRAM, program, "give shape"), (ONNX, onnx, "export ONNX too (--onnx)")):
        if not replaced and (folder / name).exists():
            yield (
                f"{folder / name} is of another export and would stand beside weights that are not its own; {mend}, "
                "remove the file, or take another folder."
            )
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        yield f"weights that are not finite are not exported: {', '.join(bad[:4])}; the training diverged."
    if architecture is None:
        return
    if card.get("classes") is not None and len(card["classes"]) != architecture.num_classes:
        named, outputs = len(card["classes"]), architecture.num_classes
        yield f"the model card names {named} classes, and the network has {outputs} outputs."
    with torch.device("meta"):
        expected_shapes = {name: t.shape for name, t in architecture.create().state_dict().items()}
    given = {name: t.shape for name, t in state.items()}
    if differing := sorted({name for name, _ in expected_shapes.items() ^ given.items()}):
        yield (
            f"the network is not what {architecture} builds: it differs in {', '.join(differing[:4])} "
            f"({len(differing)} in all); give the architecture that it was created from."
        )


def read_metadata(file: Path) -> dict[str, Any]:
    """What :func:`export` wrote into a file of weights about them; empty for a file that others wrote.

    Returns:
        ``architecture`` (the fields of :class:`metapl.apps.networks.Architecture`, or None), ``normalization`` (mean
        and std, or None), ``classes`` (their names, or None) and, where it is not 1, ``center``.

    Raises:
        MetaplError: there is no such file, it is damaged, or it is of an export that is not understood.
    """
    if not file.is_file():
        raise MetaplError(f"there is no file of weights {file}; expected a .safetensors or .pt file on this machine.")
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as stored:
            content = json.loads((stored.metadata() or {}).get("metapl", "{}"))
        if not isinstance(content, dict):
            raise ValueError(f"the metadata is {type(content).__name__}")
        if fault := misfit_entries(content, _METADATA, "its metadata"):
            raise ValueError(fault)
        classes, normalization = content.get("classes") or (), content.get("normalization")
        if len(set(classes)) < len(classes):
            raise ValueError("two classes have one name")
        if content.get("architecture") is not None and normalization is not None:
            channels = Architecture(**content["architecture"]).in_channels
            numbers = [len(normalization.get(name, ())) for name in ("mean", "std")]
            if numbers != [channels, channels]:
                means, stds = numbers
                raise ValueError(f"normalization has {means} means and {stds} deviations; expected {channels} of each")
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise MetaplError(
            f"{file} cannot be read as weights: {reason_of(error)}. Expected .safetensors as metapl export writes it, "
            "or tensors alone."
        ) from error
    return content
