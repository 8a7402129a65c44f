"""``metapl export RUN --hub``: a run's network in the form of the Hugging Face hub.

:class:`metapl.integrations.hub.Classifier` reads what is written here. Nothing is uploaded.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from metapl.errors import MetaplError, few, needed_for
from metapl.integrations.hub import TASK, Classifier
from metapl.networks.model_card import (
    CARD,
    HUB_CARD,
    HUB_CONFIG,
    PROGRAM,
    WEIGHTS,
    escaped,
    package_versions,
    section_text,
)
from metapl.run_folder import EndedRun
from metapl.runs.folder import replacing

with needed_for("metapl export --hub"):
    from huggingface_hub import EvalResult, ModelCardData

TEXT = Template("""\
---
$metadata
---

# $title

A classifier trained with metapl.

## Loading it

With metapl, and huggingface_hub beside it; by the folder, or the name of a repository that has its
files:

```python
from metapl.integrations.hub import Classifier

model = Classifier.from_pretrained("$folder")


def predict(images):
    \"\"\"Class probabilities (B, K) of pictures (B, C, H, W) in [0, 1], for model.classes.\"\"\"
    return model(images).softmax(dim=1)
```
""")


def write_for_hub(run: EndedRun, name: str, out: Path, *, sections: Mapping[str, Any]) -> None:
    """Write one of a run's networks in the form of the hub.

    Args:
        run: the run.
        name: of the network: student, teacher or finetuned.
        out: the folder; files of these names are replaced, each whole or not at all, the card last.
        sections: of the card by their heads.

    Raises: MetaplError for a network that metapl cannot build by name, weights that are not finite,
        and a folder with an export of the other form.
    """
    card = run.cards[name]
    if card.architecture is None and card.widths is None:
        raise MetaplError(
            f"{run.folder.path}: its network is one of its own, which metapl cannot build by name; "
            "expected --hub left out, or a class of yours with huggingface_hub's "
            "PyTorchModelHubMixin."
        )
    if (out / PROGRAM).exists() or (out / CARD).exists():
        raise MetaplError(
            f"{out} holds an export of the other form ({PROGRAM}, {CARD}), whose {WEIGHTS} has "
            "other names; expected another --out."
        )
    model = Classifier(card=dataclasses.asdict(card), classes=list(run.classes))
    model.network.load_state_dict(run.network(name).state_dict())
    state = model.state_dict()
    if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise MetaplError(
            f"weights that are not finite are not exported: {few(bad, 4)}; the training diverged."
        )
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        # huggingface_hub writes a card of its own where there is none.
        (Path(folder) / HUB_CARD).write_text(readme(run, name, sections), encoding="utf-8")
        model.save_pretrained(folder)
        for file in (HUB_CONFIG, WEIGHTS, HUB_CARD):
            files[file] = (Path(folder) / file).read_bytes()
    try:
        for file, content in files.items():
            with replacing(out / file) as target:
                target.write(content)
    except OSError as error:
        raise MetaplError(f"{out} could not be written: {error.strerror or error}.") from error


def readme(run: EndedRun, name: str, sections: Mapping[str, Any]) -> str:
    """Return the model card: the hub's metadata, code that loads the network, and the sections."""
    card = run.cards[name]
    title = f"{run.result['recipe']}: {run.result['title']}, {card.title}"
    facts: dict[str, Any] = {"classes": ", ".join(run.classes)}
    if card.architecture is not None:
        facts["architecture"] = card.architecture.name
    else:
        facts["widths"] = ", ".join(str(width) for width in card.widths or ())
    text = TEXT.substitute(metadata=metadata(run, name).to_yaml(), title=escaped(title), folder=".")
    for head, section in {"Network": facts, **sections, "Versions": package_versions()}.items():
        text += f"\n## {head}\n\n{section_text(section)}\n"
    return text


def metadata(run: EndedRun, name: str) -> ModelCardData:
    """Return what the hub reads of a card: library, task, tags, and the accuracies."""
    result = run.result
    figures = []
    for part in ("test", "validation"):
        accuracy = result.get(f"{name}_{part}_accuracy")
        if accuracy is None:
            continue
        figures.append(
            EvalResult(
                task_type=TASK,
                dataset_type=result["recipe"],
                dataset_name=f"{result['recipe']}, {part} examples",
                dataset_split=part,
                metric_type="accuracy",
                metric_value=accuracy,
            )
        )
    return ModelCardData(
        library_name="metapl",
        pipeline_tag=TASK,
        tags=["metapl", "model_hub_mixin", "pytorch_model_hub_mixin"],
        model_name=f"{result['recipe']}-{result['method']}-{name}" if figures else None,
        eval_results=figures or None,
    )
