"""A network as a file that runs without the code that built it: a program of torch.export, and ONNX."""

from __future__ import annotations

import copy
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from metapl.errors import MetaplError, reason_of, require_extra

PROGRAM, ONNX = "model.pt2", "model.onnx"
INPUT, OUTPUT = "images", "logits"
"""What the input and the output of an ONNX file are called."""

AGREES_TO = 1e-4
"""How far a program's outputs may be from the network's, in units of the greatest of these: kernels round otherwise."""

_NOTES = ("stack_trace", "nn_module_stack", "torch_fn", "custom")
"""What torch.export notes of where an operation came from: places of files on this machine, and names of classes."""

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
"""Refuse to go on without the packages that write ONNX."""


def can_run_onnx() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def programs(network: nn.Module, shape: Sequence[int], onnx: bool = False) -> dict[str, bytes]:
    """A network as programs, each run where metapl cannot be imported and compared with the network.

    Args:
        network: from pictures (B, C, H, W) to logits (B, K), with its normalization; it is left as it is.
        shape: (C, H, W). The size is fixed; B is any number from 1 up.
        onnx: ``model.onnx`` too; it is run where onnxruntime is installed.

    Returns:
        the files' contents by name: ``model.pt2``, for ``torch.export.load``, and ``model.onnx``. float32, in eval
        mode. The same network gives the same bytes with the same torch.

    Cost: a copy of the network; about 10 seconds and a process that imports torch, ONNX about as much again.

    Raises:
        MetaplError: the network cannot be exported, a package is not installed, or what a program gives differs from
            what the network gives.
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
            files[ONNX] = _as_onnx(program)
    except Exception as error:  # whatever a network of a user's own does while it is traced, or has no translation
        raise MetaplError(f"{by} cannot export the network: {type(error).__name__}: {reason_of(error)}") from error
    _check(files, network, shape)
    return files


def _as_onnx(program: torch.export.ExportedProgram) -> bytes:
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT])
    assert made is not None  # as it is when a file is given
    model = made.model_proto
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = "batch"  # the only size that is not fixed, called s34 or the like so far
    content: bytes = model.SerializeToString(deterministic=True)
    return content


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
