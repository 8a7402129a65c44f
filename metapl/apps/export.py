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
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from metapl.apps.errors import require_extra
from metapl.apps.inputs import Factory, Network, Run, Switch, held, unset
from metapl.apps.machine.sealed import sha256_of
from metapl.apps.networks import Architecture, Normalized
from metapl.apps.run import EndedRun, counts_of, stored_data
from metapl.apps.words import tell
from metapl.errors import MetaplError, few, reason_of
from metapl.runs.atomic import replacing
from metapl.words import shown

WEIGHTS, CARD, PROGRAM, ONNX = "model.safetensors", "MODEL_CARD.md", "model.pt2", "model.onnx"
INPUT, OUTPUT = "images", "logits"  # what the input and the output of an ONNX file are called

# How far a program's outputs may be from the network's, in units of the greatest of these: kernels round otherwise.
AGREES_TO = 1e-4

# What stands on the card of a student's evaluation, beside its accuracy.
FIGURES = {"top5": "top-5 accuracy", "expected_calibration_error": "expected calibration error"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's network for others: a program that needs torch alone, its weights, and a card for both.

    model.pt2 is the whole network, with its normalization, as a program for torch.export.load: any number of pictures
    in, logits out. model.safetensors holds the weights under the names of torchvision or timm, where the network is
    theirs. MODEL_CARD.md has the code that loads each, the accuracies, the recipe without the paths of your files,
    hashes of the data, and versions. Files of these names that are there already are replaced. Programs are compared
    with the network before anything is written.

    Args:
        folder: the run folder; of a comparison, the run that it delivers.
        out: the folder to write them to; made if need be.
        onnx: model.onnx too; needs pip install 'metapl[onnx]'.
    """

    folder: Run
    out: Annotated[Path, unset("DIR")]
    network: Network = "delivered"
    factory: Factory = None
    onnx: Switch = False

    def run(self) -> int:
        run = EndedRun.load(self.folder)
        name = run.name(self.network)
        card, shape = run.cards[name], run.cards[name].input.shape
        with held(self.out):
            network, about = run.network(name, self.factory), _card(run, name)
            how: dict[str, Any] = {"architecture": card.architecture, "shape": shape, "onnx": self.onnx}
            written = export(network, self.out, card=about, **how)
        tell(f"{run.heading(name)}\n")
        for file in filter(None, (written.weights, written.program, written.onnx)):
            tell(f"{file}: {file.stat().st_size / 1e6:.3g} MB, SHA-256 {sha256_of(file)}")
        if self.onnx and not _can_run_onnx():
            tell(f"{written.onnx} was not run: onnxruntime is not installed")
        tell(f"{written.card}: how to load them, and how good they are")
        return 0


def _card(run: EndedRun, name: str) -> dict[str, Any]:
    """What stands on the card: figures of the exported network, and of no others."""
    result, card, source = run.result, run.cards[name], run.source
    metrics: dict[str, Any] = {}
    if "evaluation" in result:
        evaluation = result["evaluation"]
        examples = sum(map(sum, evaluation["confusion"]))
        metrics |= {"test accuracy": result[f"{name}_test_accuracy"], "test examples": examples}
        if name == result["delivered"]:  # the evaluation is of that one
            metrics |= {f"test {words}": evaluation[figure] for figure, words in FIGURES.items()}
    if f"{name}_validation_accuracy" in result:
        metrics["validation accuracy"] = result[f"{name}_validation_accuracy"]
        metrics["validation examples"] = result["validation_size"]
    data = stored_data(source)
    examples_of = {part: f"{count:,} examples" if count else "none" for part, count in counts_of(data).items()}
    fields = {
        # Of the places of files, the last names are left.
        field: PurePath(value).name if isinstance(value, str) and "/" in value else value
        for field, value in source.recipe().get("fields", {}).items()
        if field != "classes"
    }
    when = "the last step" if name == "teacher" else f"step {result['best_step']:,} of {result['steps']:,}"
    notes = [
        f"The weights are those of the {card.title}, of {when}.",
        f"The run delivers the {run.cards[result['delivered']].title}, by {result['delivered_by']}.",
        "Nothing was chosen by the test examples." if "evaluation" in result else "No test set was given.",
        card.input.note,
    ]
    if "methods" in result:
        methods, seeds = (", ".join(map(str, result[part])) for part in ("methods", "seeds"))
        notes.append(f"It was compared: methods {methods}; seeds {seeds}; {result['delivery']}.")
    return {
        "title": f"{result['recipe']}: {result['title']}, {card.title}",
        "classes": run.classes,
        "metrics": {figure: value for figure, value in metrics.items() if value is not None},
        "data_hash": examples_of | {f"SHA-256 of {part}": digest for part, digest in data["hash"].items()},
        "recipe": {"name": result["recipe"], "method": result["method"], "fields": fields},
        "notes": "\n".join(f"- {note}" for note in notes),
        "center": card.input.center,
    }


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

    The weights go under the network's own names: wrappers by :func:`metapl.apps.networks.Normalized` and
    ``torch.compile`` are taken off, so ``torchvision.models.…().load_state_dict(…)`` takes the file as it is. Mean and
    std of a normalized network, the classes and the architecture stand in the file's metadata and on the card, whose
    code normalizes. The programs normalize themselves, and are compared with the network before anything is written.

    Args:
        model: the network, on any device; it is left as it is.
        path: the folder; made if need be. Files of an earlier export in it are replaced, each whole or not at all, the
            card last; it states the files' SHA-256.
        card: ``recipe`` (a mapping), ``data_hash`` (text, or a mapping of texts), ``metrics`` (numbers by name); if
            wanted ``title``, ``classes`` (in the order of the outputs), ``notes`` (Markdown), and ``center``, the share
            of a picture's sides that the network is evaluated on.
        architecture: what builds the network; checked against the weights. None, for a network of your own, whose
            building the card's code leaves to you.
        shape: (C, H, W) of a picture, for ``model.pt2``: any number of pictures of this size to logits, loaded by
            ``torch.export.load``. None: no program is written.
        onnx: ``model.onnx`` too, which needs ``pip install 'metapl[onnx]'``.

    Returns:
        The files. The same network and card give the same bytes, with the same versions of the packages.

    >>> import tempfile
    >>> small = Architecture(name="small_cnn", num_classes=2, in_channels=1)
    >>> written = export(small.create(), tempfile.mkdtemp(), architecture=small, card={
    ...     "recipe": {"steps": 100}, "data_hash": "sha256:1f…", "metrics": {"test accuracy": 0.97}})
    >>> written.weights.name, written.card.name
    ('model.safetensors', 'MODEL_CARD.md')
    """
    folder, normalization, module = Path(path), None, model
    while isinstance(module, Normalized) or hasattr(module, "_orig_mod"):  # which torch.compile wraps
        if isinstance(module, Normalized):
            pairs = {name: t.flatten().float().cpu().numpy() for name, t in module.named_buffers(recurse=False)}
            # The shortest decimals that give the same float32 numbers.
            normalization = {name: [float(str(x)) for x in pairs[name]] for name in ("mean", "std")}
        module = module.module if isinstance(module, Normalized) else module.get_submodule("_orig_mod")
    state = module.state_dict()
    if onnx and shape is None:
        raise MetaplError("onnx=True was given without shape; expected the shape of a picture too: shape=(3, 32, 32).")
    for name, replaced, mend in ((PROGRAM, shape is not None, "give shape"), (ONNX, onnx, "export ONNX too (--onnx)")):
        if not replaced and (folder / name).exists():
            fault = f"{folder / name} is of another export and would stand beside weights that are not its own"
            raise MetaplError(f"{fault}; {mend}, remove the file, or take another folder.")
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        raise MetaplError(f"weights that are not finite are not exported: {few(bad, 4)}; the training diverged.")
    classes, center = card.get("classes"), card.get("center", 1.0)
    if architecture is not None:
        if classes is not None and len(classes) != (outputs := architecture.num_classes):
            raise MetaplError(f"the model card names {len(classes)} classes, and the network has {outputs} outputs.")
        with torch.device("meta"):
            built = {name: t.shape for name, t in architecture.create().state_dict().items()}
        if differing := sorted(
            {name for name, _ in built.items() ^ {name: t.shape for name, t in state.items()}.items()}
        ):
            raise MetaplError(f"the network is not what {architecture} builds: it differs in {few(differing, 4)}.")
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
        files |= programs(module if normalization is None else Normalized(module, **normalization), shape, onnx)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[CARD] = _rendered(card, module, normalization, architecture, digests).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with replacing(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise MetaplError(f"{folder} could not be written: {error.strerror or error}.") from error
    program, as_onnx = (folder / name if name in files else None for name in (PROGRAM, ONNX))
    return Exported(folder / WEIGHTS, folder / CARD, digests[WEIGHTS], program, as_onnx)


def read_metadata(file: Path) -> dict[str, Any]:
    """What :func:`export` wrote into a file of weights: ``architecture``, ``normalization`` and ``classes``, each or
    None, and, where it is not 1, ``center``; empty for a file that others wrote."""
    if not file.is_file():
        raise MetaplError(f"there is no file of weights {file}; expected a .safetensors or .pt file on this machine.")
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as stored:
            content: dict[str, Any] = json.loads((stored.metadata() or {}).get("metapl", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise MetaplError(f"{file} cannot be read as weights: {reason_of(error)}.") from error
    return content


def _can_run_onnx() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def programs(network: nn.Module, shape: Sequence[int], onnx: bool = False) -> dict[str, bytes]:
    """A network as programs for pictures of one size, in any number, by the names of their files: ``model.pt2``, for
    ``torch.export.load``, and with ``onnx`` ``model.onnx``. float32, in eval mode, with its normalization.

    Each is compared with the network, ONNX where onnxruntime is installed.
    """
    if onnx:
        require_extra("onnx", "ONNX needs", "onnx", "onnxscript")
    network = copy.deepcopy(network).eval().requires_grad_(False)
    network = network.to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    by = "torch.export"
    try:
        # Two, for torch.export takes sizes of 0 and 1 for constants.
        batch, file = {0: torch.export.Dim("batch", min=1)}, io.BytesIO()
        program = torch.export.export(network, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                # Where an operation came from: places of files on this machine, and names of classes.
                for note in ("stack_trace", "nn_module_stack", "torch_fn", "custom"):
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
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.rand(count, *shape, generator=generator)
        with torch.inference_mode():
            expected, found = network(images), {}
            found[PROGRAM] = torch.export.load(io.BytesIO(files[PROGRAM])).module()(images)
        if onnx and _can_run_onnx():
            session = importlib.import_module("onnxruntime").InferenceSession(
                files[ONNX], providers=["CPUExecutionProvider"]
            )
            found[ONNX] = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
        for name, output in found.items():
            fits = output.shape == expected.shape
            apart = float((output - expected).abs().max()) if fits else float("inf")
            if not apart <= AGREES_TO * float(expected.abs().max()):  # NaN is refused as well
                fault = f"{name} gives {tuple(output.shape)} where the network gives {tuple(expected.shape)}"
                raise MetaplError(f"{fault}, and differs by {apart:.2g}; expected {AGREES_TO:g} of its greatest.")
    return files


# ---------------------------------------------------------------------------------------------------------- the card


def _rendered(
    card: Mapping[str, Any],
    module: nn.Module,
    normalization: Mapping[str, list[float]] | None,
    architecture: Architecture | None,
    digests: Mapping[str, str],
) -> str:
    """The text of the card, in Markdown; ``digests`` are the SHA-256 of each file by its name."""
    summary = [f"- Weights: {sum(p.numel() for p in module.parameters()):,} parameters"]
    building = "model = build_network()  # the code that builds the network"
    if architecture is not None:
        fields = {field: value for field, value in asdict(architecture).items() if value is not None}
        fields = {field: value for field, value in fields.items() if field not in ("dropout", "stochastic_depth")}
        arguments = ", ".join(f"{field}={value!r}" for field, value in fields.items())
        summary.append(f"- Network: `{arguments}`; its weights have the names of {architecture.library}")
        building = f"model = metapl.apps.networks.create({arguments})"
    summary += [f"- `{file}`: SHA-256 `{digest}`" for file, digest in digests.items()]
    takes, normalize = "in the range of the training", ""
    if normalization is None:
        summary.append("- Normalization: none; the network takes pictures in the range that it was trained on")
    else:
        takes, (mean, std) = "in [0, 1]", (normalization["mean"], normalization["std"])
        summary.append(f"- Normalization: (x - mean) / std per channel of pictures in [0, 1], mean {mean}, std {std}")
        normalize = f"    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in ({mean}, {std}))\n"
        normalize += "    images = (images - mean) / std\n"
    if card.get("classes") is not None:
        summary.append(f"- Classes, in the order of the outputs: {', '.join(map(_text, card['classes']))}")
    predict = f'''

def predict(images):
    """Class probabilities (B, K) of pictures (B, C, H, W) {takes}."""
'''
    by_torch = "    with torch.inference_mode():\n        return model(images).softmax(dim=1)\n"
    # A section for each file; whichever code is run, ``predict`` is the same.
    loading = {
        PROGRAM: (
            f"As a program, with torch {torch.__version__.partition('+')[0]} or newer and nothing else:",
            f'import torch\n\nmodel = torch.export.load("{PROGRAM}").module()\n{predict}{by_torch}',
        ),
        WEIGHTS: (
            "The weights:",
            "import torch\nfrom safetensors.torch import load_file\n"
            + "import metapl.apps.networks\n" * (architecture is not None)
            + f'\n{building}\nmodel.load_state_dict(load_file("{WEIGHTS}"))\nmodel.eval()\n'
            + f"{predict}{normalize}{by_torch}",
        ),
        ONNX: (
            "As ONNX, with onnxruntime and NumPy; the pictures are NumPy's, float32:",
            f'import numpy\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("{ONNX}", '
            f'providers=["CPUExecutionProvider"])\n{predict}'
            f'    (logits,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})\n'
            "    exponentials = numpy.exp(logits - logits.max(axis=1, keepdims=True))\n"
            "    return exponentials / exponentials.sum(axis=1, keepdims=True)\n",
        ),
    }
    versions = {"python": platform.python_version()}
    for package in ("metapl", "torch", "torchvision", "timm", *(("onnx", "onnxscript") if ONNX in digests else ())):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    data = card["data_hash"]
    sections = {
        "Loading it": "\n\n".join(
            f"{what}\n\n```python\n{code}```" for file, (what, code) in loading.items() if file in digests
        ),
        "Metrics": _table("metric", card["metrics"]),
        "Data": _table("part", data if isinstance(data, Mapping) else {"hash": data}),
        "Recipe": f"```json\n{json.dumps(card['recipe'], indent=2, sort_keys=True, default=str)}\n```",
        "Versions": _table("package", versions),
        "Notes": card.get("notes", ""),
    }
    below = "".join(f"\n## {head}\n\n{text}\n" for head, text in sections.items() if text)
    title = _text(card.get("title") or "A network")
    return f"# {title}\n\nA classifier trained with metapl.\n\n" + "\n".join(summary) + f"\n{below}"


def _table(head: str, values: Mapping[str, Any]) -> str:
    texts = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in values.items()]
    return "\n".join([f"| {head} | value |", "|---|---|", *(f"| {_text(a)} | {_text(b)} |" for a, b in texts)])


def _text(value: object) -> str:
    r"""A name or a value in the card's text, where nothing of it is taken for Markdown or HTML.

    >>> _text("<b>|a*b[c]"), _text("n02012849_x")
    ('\\<b\\>\\|a\\*b\\[c\\]', 'n02012849_x')
    """
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown(value).replace("\n", " "))
