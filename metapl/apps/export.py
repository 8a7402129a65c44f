"""``metapl export``: a trained network for others.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Any

import torch
from safetensors.torch import save
from torch import nn

from metapl.apps.inputs import Factory, Network, Run, check_out, held
from metapl.apps.model_card import (
    CARD,
    HUB_CONFIG,
    PROGRAM,
    WEIGHTS,
    escaped,
    markdown_of,
    sections_of,
    versions_of,
)
from metapl.apps.networks import Architecture
from metapl.apps.printing import require_packages, tell
from metapl.apps.run_folder import EndedRun
from metapl.apps.settings import Switch, unset
from metapl.apps.tuned_networks import Normalized
from metapl.errors import MetaplError, few, reason_of
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


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's network for others: a program for torch alone, its weights, and a card.

    model.pt2 is the whole network, with its normalization, as a program for torch.export.load: any
    number of pictures in, logits out. model.safetensors holds the weights under the names of
    torchvision or timm, where the network is theirs. MODEL_CARD.md has the code that loads each,
    the accuracies, the recipe without the paths of your files, hashes of the data, and versions.
    Files of these names that are there already are replaced. Programs are compared with the network
    before anything is written.

    Args:
        folder: the run folder; of a comparison, the run that it delivers.
        out: the folder to write them to; made if need be.
        onnx: model.onnx too; needs pip install 'metapl[onnx]'.
        hub: the form of the Hugging Face hub instead: config.json, model.safetensors, README.md.
    """

    folder: Run
    out: Annotated[Path, unset("DIR")]
    network: Network = "delivered"
    factory: Factory = None
    onnx: Switch = False
    hub: Switch = False

    def run(self) -> int:
        run = EndedRun.load(self.folder)
        name = run.name(self.network)
        check_out(self.out, run.source.recipe().get("fields", {}))
        if self.hub:
            return self.run_for_hub(run, name)
        card = run.cards[name]
        with held(self.out):
            digests = export(
                run.network(name, self.factory),
                self.out,
                shape=card.input.shape,
                title=f"{run.result['recipe']}: {run.result['title']}, {card.title}",
                sections=sections_of(run, name),
                classes=run.classes,
                architecture=card.architecture,
                center=card.input.center,
                onnx=self.onnx,
            )
        tell(f"{run.heading(name)}\n")
        for file, sha256 in digests.items():
            tell(
                f"{self.out / file}: {(self.out / file).stat().st_size / 1e6:.3g} MB, SHA-256 "
                f"{sha256}"
            )
        if self.onnx and not importlib.util.find_spec("onnxruntime"):
            tell(f"{self.out / ONNX} was not run: onnxruntime is not installed")
        tell(f"{self.out / CARD}: how to load them, and how good they are")
        return 0

    def run_for_hub(self, run: EndedRun, name: str) -> int:
        """Write a network in the form of the hub, and return the exit code."""
        if self.onnx:
            raise MetaplError("--onnx and --hub were given, which write other files; take one.")
        require_packages("--hub", "huggingface_hub")
        from metapl.apps.hub import write_for_hub

        with held(self.out):
            write_for_hub(run, name, self.out, sections=sections_of(run, name))
        tell(f"{run.heading(name)}\n")
        tell(f"{self.out}: for metapl.apps.hub.Classifier.from_pretrained; nothing was uploaded")
        return 0


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
    :func:`metapl.apps.tuned_networks.Normalized` and ``torch.compile`` are taken off, so
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
        onnx: ``model.onnx`` too, which needs ``pip install 'metapl[onnx]'``.

    Returns:
        The SHA-256 of the files but for the card, by their names. The same network and card give
        the same bytes, with the same versions of the packages.

    >>> import tempfile
    >>> small = Architecture(name="small_cnn", num_classes=2, in_channels=1)
    >>> [*export(small.create(), tempfile.mkdtemp(), shape=(1, 16, 16), architecture=small)]
    ['model.safetensors', 'model.pt2']
    """
    folder, normalization, module = Path(path), None, model
    # torch.compile wraps a network in a module that holds it as _orig_mod.
    while isinstance(module, Normalized) or hasattr(module, "_orig_mod"):
        if isinstance(module, Normalized):
            pairs = {
                name: t.flatten().float().cpu().numpy()
                for name, t in module.named_buffers(recurse=False)
            }
            # The shortest decimals that give the same float32 numbers.
            normalization = {name: [float(str(x)) for x in pairs[name]] for name in ("mean", "std")}
        module = (
            module.module if isinstance(module, Normalized) else module.get_submodule("_orig_mod")
        )
    state = module.state_dict()
    if (folder / HUB_CONFIG).exists():
        raise MetaplError(
            f"{folder} holds an export for the hub ({HUB_CONFIG}), whose {WEIGHTS} has other "
            "names; expected another folder."
        )
    if not onnx and (folder / ONNX).exists():
        fault = (
            f"{folder / ONNX} is of another export and would stand beside weights that are not "
            "its own"
        )
        raise MetaplError(
            f"{fault}; export ONNX too (--onnx), remove the file, or take another folder."
        )
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        raise MetaplError(
            f"weights that are not finite are not exported: {few(bad, 4)}; the training diverged."
        )
    metadata = ({} if center == 1.0 else {"center": center}) | {
        "architecture": None if architecture is None else asdict(architecture),
        "normalization": normalization,
        "classes": None if classes is None else list(classes),
    }
    # Tensors that share memory, as tied weights do, are written one by one: safetensors refuses
    # them otherwise.
    plain = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in sorted(state.items())
    }
    # One entry, for safetensors writes several in an order that changes from call to call.
    files = {WEIGHTS: save(plain, {"metapl": json.dumps(metadata, sort_keys=True)})}
    files |= programs(
        module if normalization is None else Normalized(module, **normalization), shape, onnx
    )
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    facts = {"parameters": f"{sum(p.numel() for p in module.parameters()):,}"}
    code = {"imported": "", "building": "build_network()  # the code that builds the network"}
    if architecture is not None:
        built, noise = asdict(architecture), ("dropout", "stochastic_depth")
        own = {
            name: value for name, value in built.items() if value is not None and name not in noise
        }
        arguments = ", ".join(f"{name}={value!r}" for name, value in own.items())
        facts |= {"architecture": arguments, "names of the weights": architecture.library}
        code = {
            "imported": "import metapl.apps.networks\n",
            "building": f"metapl.apps.networks.create({arguments})",
        }
    if normalization is not None:
        facts["normalization"] = (
            f"(x - mean) / std, mean {normalization['mean']}, std {normalization['std']}"
        )
    if classes is not None:
        facts["classes"] = ", ".join(classes)
    facts |= {f"SHA-256 of {file}": digest for file, digest in digests.items()}
    versions = versions_of(*(("onnx", "onnxscript") if onnx else ()))
    code["takes"] = "in the range of the training" if normalization is None else "in [0, 1]"
    text = TEXT.substitute(code, title=escaped(title), torch=versions["torch"].partition("+")[0])
    text += ONNX_TEXT.substitute(code) if onnx else ""
    text += markdown_of({"Network": facts, **(sections or {}), "Versions": versions})
    files[CARD] = text.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with replacing(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise MetaplError(f"{folder} could not be written: {error.strerror or error}.") from error
    return digests


def programs(network: nn.Module, shape: Sequence[int], onnx: bool = False) -> dict[str, bytes]:
    """Return a network as programs for pictures of one size, by the names of their files.

    They are ``model.pt2``, for ``torch.export.load``, and with ``onnx`` ``model.onnx``: for any
    number of pictures, float32, in eval mode, with its normalization.

    Each is compared with the network, ONNX where onnxruntime is installed.
    """
    if onnx:
        require_packages("--onnx", "onnx", "onnxscript")
    network = copy.deepcopy(network).eval().requires_grad_(requires_grad=False)
    network = network.to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    by = "torch.export"
    try:
        # Two, for torch.export takes sizes of 0 and 1 for constants.
        batch, file = {0: torch.export.Dim("batch", min=1)}, io.BytesIO()
        program = torch.export.export(network, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                # Where an operation came from: places of files on this machine, and names of
                # classes.
                for note in ("stack_trace", "nn_module_stack", "torch_fn", "custom"):
                    node.meta.pop(note, None)
        torch.export.save(program, file)
        files = {PROGRAM: file.getvalue()}
        if onnx:
            by = "torch.onnx"
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
            assert made is not None  # as it is when a file is given
            model = made.model_proto
            for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
                for dim in value.type.tensor_type.shape.dim:
                    if dim.HasField("dim_param"):
                        # the only size that is not fixed, called s34 or the like so far
                        dim.dim_param = "batch"
            files[ONNX] = model.SerializeToString(deterministic=True)
    except (
        Exception
    ) as error:  # whatever a network of a user's own does while it is traced, or has no translation
        raise MetaplError(
            f"{by} cannot export the network: {type(error).__name__}: {reason_of(error)}"
        ) from error
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.rand(count, *shape, generator=generator)
        with torch.inference_mode():
            expected, found = network(images), {}
            found[PROGRAM] = torch.export.load(io.BytesIO(files[PROGRAM])).module()(images)
        if onnx and importlib.util.find_spec("onnxruntime"):
            session = importlib.import_module("onnxruntime").InferenceSession(
                files[ONNX], providers=["CPUExecutionProvider"]
            )
            found[ONNX] = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
        for name, output in found.items():
            fits = output.shape == expected.shape
            apart = float((output - expected).abs().max()) if fits else float("inf")
            if not apart <= AGREES_TO * float(expected.abs().max()):  # NaN is refused as well
                fault = (
                    f"{name} gives {tuple(output.shape)} where the network gives "
                    f"{tuple(expected.shape)}"
                )
                raise MetaplError(
                    f"{fault}, and differs by {apart:.2g}; expected {AGREES_TO:g} of its greatest."
                )
    return files
