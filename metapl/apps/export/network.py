"""A trained network for others: a program that needs torch alone, its weights, and a card that says what they are.

model.safetensors   the weights under the names that torchvision or timm give them
model.pt2           the whole network as a program of torch.export, which needs torch alone
model.onnx          the same as ONNX, if wanted
MODEL_CARD.md       recipe, data, metrics, versions, and code that loads each
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from metapl.apps.errors import require_extra
from metapl.apps.export.card import CARD, INPUT, ONNX, OUTPUT, PROGRAM, WEIGHTS, render
from metapl.apps.machine.misfit import misfit_entries
from metapl.apps.machine.sealed import replacing
from metapl.apps.networks import Architecture, Normalized, normalized
from metapl.errors import MetaplError, few, reason_of
from metapl.runs.fields import Range

_REQUIRED, _OPTIONAL = ("recipe", "data_hash", "metrics"), ("title", "classes", "notes", "center")

# How far a program's outputs may be from the network's, in units of the greatest of these: kernels round otherwise.
AGREES_TO = 1e-4
# What torch.export notes of where an operation came from: places of files on this machine, and names of classes.
_NOTES = ("stack_trace", "nn_module_stack", "torch_fn", "custom")

# What :func:`export` tells of weights, with types.
_METADATA: dict[str, Any] = {
    "architecture": Architecture | None,
    "normalization": dict[str, list[float]] | None,
    "classes": list[str] | None,
    "center": Annotated[float, Range(above=0, most=1)],
}

_ELSEWHERE = f"""
import os, sys
sys.modules["metapl"] = None  # an import of it fails
import torch
logits = {{}}
batches = torch.load("batches.pt")
run = torch.export.load("{PROGRAM}").module()
logits["{PROGRAM}"] = [run(images).detach() for images in batches]
if os.path.exists("{ONNX}"):
    import onnxruntime
    session = onnxruntime.InferenceSession("{ONNX}", providers=["CPUExecutionProvider"])
    logits["{ONNX}"] = [
        torch.from_numpy(session.run(["{OUTPUT}"], {{"{INPUT}": images.numpy()}})[0]) for images in batches
    ]
torch.save(logits, "logits.pt")
"""

require_onnx = partial(require_extra, "onnx", "ONNX needs", "onnx", "onnxscript")


def can_run_onnx() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


@dataclass(frozen=True)
class Exported:
    """The files that :func:`export` wrote: weights, with their SHA-256, card, and the programs that were asked for."""

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
        card: ``recipe`` (a mapping), ``data_hash`` (text, or a mapping of texts), ``metrics`` (numbers by name); if
            wanted ``title``, ``classes`` (in the order of the outputs), ``notes`` (Markdown), and ``center``, the share
            of a picture's sides that the network is evaluated on.
        architecture: what builds the network; checked against the weights. None, for a network of your own: the card's
            code spells out a plain sequence of layers, and leaves the building of any other to you.
        shape: (C, H, W) of a picture, for ``model.pt2``: any number of pictures of this size to logits, loaded by
            ``torch.export.load``. None: no program is written.
        onnx: ``model.onnx`` too, which needs ``pip install 'metapl[onnx]'``.

    Returns:
        The files. The same network and card give the same bytes, with the same versions of the packages.

    Cost: with ``shape``, a copy of the network, a process that imports torch, and about 10 seconds; ONNX as much again.

    Raises:
        MetaplError: a card with a part missing or unknown, weights that are not finite or not of ``architecture``, a
            network that cannot be exported or whose program gives something else, a package that is not installed, a
            folder that cannot be written, or one with a program of an earlier export that this one would not replace.

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
        yield f"weights that are not finite are not exported: {few(bad, 4)}; the training diverged."
    if architecture is None:
        return
    if card.get("classes") is not None and len(card["classes"]) != (outputs := architecture.num_classes):
        yield f"the model card names {len(card['classes'])} classes, and the network has {outputs} outputs."
    with torch.device("meta"):
        expected_shapes = {name: t.shape for name, t in architecture.create().state_dict().items()}
    given = {name: t.shape for name, t in state.items()}
    if differing := sorted({name for name, _ in expected_shapes.items() ^ given.items()}):
        yield (
            f"the network is not what {architecture} builds: it differs in {', '.join(differing[:4])} "
            f"({len(differing)} in all); give the architecture that it was created from."
        )


def read_metadata(file: Path) -> dict[str, Any]:
    """What :func:`export` wrote into a file of weights: ``architecture``, ``normalization`` and ``classes``, each or
    None, and, where it is not 1, ``center``; empty for a file that others wrote."""
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
            means, stds = (len(normalization.get(name, ())) for name in ("mean", "std"))
            if not means == stds == channels:
                raise ValueError(f"normalization has {means} means and {stds} deviations; expected {channels} of each")
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise MetaplError(
            f"{file} cannot be read as weights: {reason_of(error)}. Expected .safetensors as metapl export writes it, "
            "or tensors alone."
        ) from error
    return content


def programs(network: nn.Module, shape: Sequence[int], onnx: bool = False) -> dict[str, bytes]:
    """A network as programs for pictures of one size, in any number, by the names of their files: ``model.pt2``, for
    ``torch.export.load``, and with ``onnx`` ``model.onnx``. float32, in eval mode, with its normalization.

    Each is run where metapl cannot be imported, ONNX where onnxruntime is installed, and compared with the network.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise MetaplError(f"the shape of a picture is {tuple(shape)}; expected (C, H, W), 1 or more each.")
    if onnx:
        require_onnx()
    network = copy.deepcopy(network).eval().requires_grad_(False)
    network = network.to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    by = "torch.export"
    try:
        # Two, for torch.export takes sizes of 0 and 1 for constants.
        batch, file = {0: torch.export.Dim("batch", min=1)}, io.BytesIO()
        program = torch.export.export(network, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                for note in _NOTES:
                    node.meta.pop(note, None)
        torch.export.save(program, file)
        files = {PROGRAM: file.getvalue()}
        if onnx:
            by = "torch.onnx"
            made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT])
            assert made is not None  # as it is when a file is given
            model = made.model_proto
            for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
                for dim in value.type.tensor_type.shape.dim:
                    if dim.HasField("dim_param"):
                        dim.dim_param = "batch"  # the only size that is not fixed, called s34 or the like so far
            files[ONNX] = model.SerializeToString(deterministic=True)
    except Exception as error:  # whatever a network of a user's own does while it is traced, or has no translation
        raise MetaplError(f"{by} cannot export the network: {type(error).__name__}: {reason_of(error)}") from error
    _check(files, network, shape)
    return files


def _check(files: dict[str, bytes], network: nn.Module, shape: Sequence[int]) -> None:
    """Refuse programs whose outputs are not those of the network, for a picture alone and for three at once."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, *shape, generator=generator) for count in (1, 3)]
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="metapl-") as name:
        folder = Path(name)
        for file, content in files.items():
            if file != ONNX or can_run_onnx():
                (folder / file).write_bytes(content)
        torch.save(batches, folder / "batches.pt")
        # -c alone would import what the current folder has under the names of Python's own modules.
        command = [sys.executable, "-P", "-c", _ELSEWHERE]
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if finished.returncode:
            why = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
            # Its last line tells in this process whether the memory was too little.
            raise MetaplError(f"{' and '.join(files)} cannot be run without metapl: {why}") from RuntimeError(why)
        for file, outputs in torch.load(folder / "logits.pt").items():
            for images, output in zip(batches, outputs, strict=True):
                expected = network(images)
                fits = output.shape == expected.shape
                apart = float((output - expected).abs().max()) if fits else float("inf")
                if not apart <= AGREES_TO * float(expected.abs().max()):  # NaN is refused as well
                    raise MetaplError(
                        f"{file} gives {tuple(output.shape)} where the network gives {tuple(expected.shape)}, and "
                        f"differs by {apart:.2g}; expected {AGREES_TO:g} of its greatest, so nothing was written."
                    )
