"""Export of a network: its weights, itself as programs, and their model card.

model.safetensors   the weights under the names that torchvision or timm give them
model.pt2           the whole network as a program of torch.export, which needs torch alone
model.onnx          the same as ONNX, if wanted
MODEL_CARD.md       figures, data, versions, and code that loads each
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from metapl.errors import MetaplError, few, reason_of, require_packages
from metapl.networks.architectures import Architecture
from metapl.networks.model_card import (
    CARD,
    PROGRAM,
    WEIGHTS,
    escaped,
    package_versions,
    section_text,
)
from metapl.networks.tuned import Normalized
from metapl.runs.folder import replacing

ONNX = "model.onnx"

# What the input and the output of an ONNX file are called.
INPUT = "images"
OUTPUT = "logits"

# How far a program's outputs may be from the network's, in units of the greatest of these: kernels
# round otherwise.
AGREES_TO = 1e-4

TEXT = Template("""\
# $title

A classifier trained with metapl.

## Loading it

As a program, with torch $torch or newer and nothing else:

```python
import torch

model = torch.export.load("model.pt2").module()


def predict(images):
    \"\"\"Class probabilities (B, K) of pictures (B, C, H, W) $takes.\"\"\"
    with torch.inference_mode():
        return model(images).softmax(dim=1)
```

The weights of the network behind its normalization:

```python
import torch
from safetensors.torch import load_file
$imported
model = $building
model.load_state_dict(load_file("model.safetensors"))
```
""")
ONNX_TEXT = Template("""
As ONNX, with onnxruntime and NumPy; the pictures are NumPy's, float32:

```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])


def predict(images):
    \"\"\"Class probabilities (B, K) of pictures (B, C, H, W) $takes.\"\"\"
    (logits,) = session.run(["logits"], {"images": images})
    exponentials = numpy.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
```
""")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    title: str = "A network",
    sections: Mapping[str, str | Mapping[str, Any]] | None = None,
    classes: Sequence[str] | None = None,
    architecture: Architecture | None = None,
    center: float = 1.0,
    onnx: bool = False,
) -> dict[str, str]:
    """Write a network's weights, the network as a program, and their model card into a folder.

    The weights go under the network's own names: wrappers by
    :class:`metapl.networks.Normalized` and ``torch.compile`` are taken off, so
    ``torchvision.models.…().load_state_dict(…)`` takes the file as it is. Mean and std of a
    normalized network, the classes and the architecture stand in the file's metadata and on the
    card. The programs normalize themselves, and are compared with the network before anything is
    written.

    Args:
        model: the network, on any device; it is left as it is.
        path: the folder; made if need be. Files of an earlier export in it are replaced, each whole
            or not at all, the card last; it states the files' SHA-256.
        shape: (C, H, W) of a picture: the programs take any number of pictures of this size to
            logits.
        title: of the card.
        sections: of the card by their heads: Markdown, or figures and texts by their names.
        classes: names in the order of the outputs.
        architecture: what builds the network. None, for a network of your own, whose building the
            card leaves to you.
        center: share of a picture's sides that the network is evaluated on.
        onnx: ``model.onnx`` too, which needs the extra ``onnx``.

    Returns:
        The SHA-256 of the files but for the card, by their names. The same network and card give
        the same bytes, with the same versions of the packages.

    >>> import tempfile
    >>> small = Architecture(name="small_cnn", num_classes=2, in_channels=1)
    >>> [*export(small.create(), tempfile.mkdtemp(), shape=(1, 16, 16), architecture=small)]
    ['model.safetensors', 'model.pt2']
    """
    folder = Path(path)
    module, normalization = unwrapped(model)
    if not onnx and (folder / ONNX).exists():
        raise MetaplError(
            f"{folder / ONNX} is of another export and would stand beside weights that are not "
            "its own; export ONNX too (onnx=True, or --onnx), remove the file, or take another "
            "folder."
        )
    state = module.state_dict()
    not_finite = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if not_finite:
        raise MetaplError(
            f"weights that are not finite are not exported: {few(not_finite, 4)}; the training "
            "diverged."
        )

    # 1. The weights and the programs.
    metadata: dict[str, Any] = {
        "architecture": None if architecture is None else asdict(architecture),
        "normalization": normalization,
        "classes": None if classes is None else list(classes),
    }
    if center != 1.0:
        metadata["center"] = center
    files = {WEIGHTS: safetensors_of(state, metadata)}
    network = module
    if normalization is not None:
        network = Normalized(module, **normalization, mirrored=is_mirrored(model))
    files |= programs(network, shape, onnx)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    # 2. The card.
    parameters = sum(parameter.numel() for parameter in module.parameters())
    facts: dict[str, Any] = {"parameters": f"{parameters:,}"}
    imported = ""
    building = "build_network()  # the code that builds the network"
    if architecture is not None:
        arguments = arguments_of(architecture)
        facts["architecture"] = arguments
        facts["names of the weights"] = architecture.library
        imported = "import metapl.networks\n"
        building = f"metapl.networks.create({arguments})"
    takes = "in the range of the training"
    if normalization is not None:
        takes = "in [0, 1]"
        mean = normalization["mean"]
        std = normalization["std"]
        facts["normalization"] = f"(x - mean) / std, mean {mean}, std {std}"
        if is_mirrored(model):
            facts["views"] = "the mean of the logits of a picture and of its mirror image"
    if classes is not None:
        facts["classes"] = ", ".join(classes)
    for name, digest in digests.items():
        facts[f"SHA-256 of {name}"] = digest
    versions = package_versions(onnx=onnx)
    text = TEXT.substitute(
        imported=imported,
        building=building,
        takes=takes,
        title=escaped(title),
        torch=versions["torch"].partition("+")[0],
    )
    if onnx:
        text += ONNX_TEXT.substitute(takes=takes)
    for head, section in {"Network": facts, **(sections or {}), "Versions": versions}.items():
        text += f"\n## {head}\n\n{section_text(section)}\n"
    files[CARD] = text.encode()

    # 3. The card is the last file, so that it never names files that are not there.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise MetaplError(f"{folder} could not be written: {error.strerror or error}.") from error
    return digests


def unwrapped(model: nn.Module) -> tuple[nn.Module, dict[str, list[float]] | None]:
    """Return the network in its wrappers, and the mean and the std of its normalization."""
    normalization: dict[str, list[float]] | None = None
    module = model
    while True:
        if isinstance(module, Normalized):
            normalization = {}
            for name in ("mean", "std"):
                values = module.get_buffer(name).flatten().float().cpu().numpy()
                # The shortest decimals that give the same float32 numbers.
                normalization[name] = [float(str(value)) for value in values]
            module = module.module
        elif hasattr(module, "_orig_mod"):
            # torch.compile wraps a network in a module that holds it so.
            module = module.get_submodule("_orig_mod")
        else:
            return module, normalization


def is_mirrored(model: nn.Module) -> bool:
    """Return whether a network predicts by a picture and its mirror image."""
    return any(isinstance(part, Normalized) and part.mirrored for part in model.modules())


def safetensors_of(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Return a file of weights.

    Tensors that share memory, as tied weights do, are written one by one, for safetensors refuses
    them otherwise.
    """
    plain = {}
    for name, tensor in sorted(state.items()):
        plain[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    # One entry, for safetensors writes several in an order that changes from call to call.
    return save(plain, {"metapl": json.dumps(metadata, sort_keys=True)})


def arguments_of(architecture: Architecture) -> str:
    """Return the arguments that build an architecture, without its noise, which has no weights."""
    arguments = []
    for name, value in asdict(architecture).items():
        if value is not None and name not in ("dropout", "stochastic_depth"):
            arguments.append(f"{name}={value!r}")
    return ", ".join(arguments)


def programs(network: nn.Module, shape: Sequence[int], onnx: bool = False) -> dict[str, bytes]:
    """Return a network as programs for pictures of one size, by the names of their files.

    They are ``model.pt2``, for ``torch.export.load``, and with ``onnx`` ``model.onnx``: for any
    number of pictures, float32, in eval mode, with its normalization. Each is compared with the
    network, ONNX where onnxruntime is installed.

    Args:
        network: on any device; it is left as it is.
        shape: (C, H, W) of a picture.
        onnx: whether ``model.onnx`` is wanted too.
    """
    if onnx:
        require_packages(ONNX, "onnx", "onnxscript")
    network = copy.deepcopy(network).eval().requires_grad_(requires_grad=False)
    network = network.to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    program = exported_program(network, shape)
    file = io.BytesIO()
    torch.export.save(program, file)
    files = {PROGRAM: file.getvalue()}
    if onnx:
        files[ONNX] = onnx_of(program)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.rand(count, *shape, generator=generator)
        with torch.inference_mode():
            expected = network(images)
            loaded = torch.export.load(io.BytesIO(files[PROGRAM])).module()
            refuse_other_outputs(PROGRAM, loaded(images), expected)
        if onnx and importlib.util.find_spec("onnxruntime"):
            runtime = importlib.import_module("onnxruntime")
            session = runtime.InferenceSession(files[ONNX], providers=["CPUExecutionProvider"])
            (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
            refuse_other_outputs(ONNX, torch.from_numpy(logits), expected)
    return files


def exported_program(network: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """Trace a network for any number of pictures of one size."""
    # Two pictures, for torch.export takes sizes of 0 and 1 for constants.
    pictures = torch.zeros(2, *shape)
    any_number = {0: torch.export.Dim("batch", min=1)}
    try:
        program = torch.export.export(network, (pictures,), dynamic_shapes=(any_number,))
    except Exception as error:
        # A network of a user's own may do whatever it likes while it is traced.
        raise not_exported("torch.export", error) from error
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            # Where an operation came from: places of files on this machine, and names of classes.
            for note in ("stack_trace", "nn_module_stack", "torch_fn", "custom"):
                node.meta.pop(note, None)
    return program


def onnx_of(program: torch.export.ExportedProgram) -> bytes:
    """Return a program as ONNX, for any number of pictures."""
    try:
        translated = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
        )
    except Exception as error:
        # Some operations have no translation.
        raise not_exported("torch.onnx", error) from error
    assert translated is not None, "it is None where a file is named"
    model = translated.model_proto
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                # The number of pictures, the only size that is not fixed, is called s34 or so.
                dim.dim_param = "batch"
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def not_exported(by: str, error: Exception) -> MetaplError:
    """Return the refusal of a network that a translator has failed on."""
    return MetaplError(
        f"{by} cannot export the network: {type(error).__name__}: {reason_of(error)}"
    )


def refuse_other_outputs(name: str, output: Tensor, expected: Tensor) -> None:
    """Refuse a program whose outputs are not those of the network."""
    distance = float("inf")
    if output.shape == expected.shape:
        distance = float((output - expected).abs().max())
    is_near = distance <= AGREES_TO * float(expected.abs().max())
    # A distance that is NaN is not near either.
    if not is_near:
        raise MetaplError(
            f"{name} gives {tuple(output.shape)} where the network gives {tuple(expected.shape)}, "
            f"and differs by {distance:.2g}; expected {AGREES_TO:g} of its greatest."
        )
