"""``metapl export``: a run's network for others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

from metapl.apps.export import export
from metapl.apps.export.network import can_run_onnx, require_onnx
from metapl.apps.inputs import Factory, Network, Run, Switch, held, unset
from metapl.apps.run import EndedRun, counts_of, stored_data
from metapl.apps.words import tell
from metapl.metrics import Evaluation

# What stands on the card of a student's evaluation, beside its accuracy.
FIGURES = {"top5": "top-5 accuracy", "expected_calibration_error": "expected calibration error"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's network for others: a program that needs torch alone, its weights, and a card for both.

    model.pt2 is the whole network, with its normalization, as a program for torch.export.load: any number of pictures
    in, logits out. model.safetensors holds the weights under the names of torchvision or timm, where the network is
    theirs. MODEL_CARD.md has the code that loads each, the accuracies, the recipe without the paths of your files,
    hashes of the data, and versions. Files of these names that are there already are replaced.

    Programs are run without metapl and compared with the network before anything is written.

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
        if self.onnx:
            require_onnx()
        name = run.name(self.network)
        with held(self.out):
            written = export(
                run.network(name, self.factory),
                self.out,
                card=_card(run, name),
                architecture=run.cards[name].architecture,
                shape=run.cards[name].input.shape,
                onnx=self.onnx,
            )
        tell(f"{run.heading(name)}\n")
        for file in filter(None, (written.weights, written.program, written.onnx)):
            about = "run without metapl: it gives what the network gives"
            if file == written.weights:
                about = f"SHA-256 {written.sha256}"
            elif file == written.onnx and not can_run_onnx():
                about = "not run: onnxruntime is not installed"
            tell(f"{file}: {file.stat().st_size / 1e6:.3g} MB\n  {about}")
        tell(f"{written.card}: how to load them, and how good they are")
        return 0


def _card(run: EndedRun, name: str) -> dict[str, Any]:
    """What stands on the card: figures of the exported network, and of no others."""
    result, card, source = run.result, run.cards[name], run.source
    metrics: dict[str, Any] = {}
    if "evaluation" in result:
        evaluation = Evaluation(**result["evaluation"])
        metrics |= {"test accuracy": result[f"{name}_test_accuracy"], "test examples": evaluation.n}
        metrics["test chance level"] = evaluation.chance
        if name == result["delivered"]:  # the evaluation is of that one
            metrics |= {f"test {words}": result["evaluation"][figure] for figure, words in FIGURES.items()}
    if f"{name}_validation_accuracy" in result:
        metrics["validation accuracy"] = result[f"{name}_validation_accuracy"]
        metrics["validation examples"] = result["validation_size"]
    data = stored_data(source)
    examples = {part: f"{count:,} examples" if count else "none" for part, count in counts_of(data).items()}
    fields = {
        # Of the places of files, the last names are left.
        field: PurePath(value).name if isinstance(value, str) and "/" in value else value
        for field, value in source.recipe().get("fields", {}).items()
        if field != "classes"
    }
    run_by = {"name": result["recipe"], "method": result["method"], "best_step": result["best_step"]}
    return {
        "title": f"{result['recipe']}: {result['title']}, {card.title}",
        "classes": run.classes,
        "metrics": {figure: value for figure, value in metrics.items() if value is not None},
        "data_hash": examples | {f"SHA-256 of {part}": f"`{digest}`" for part, digest in data["hash"].items()},
        "recipe": run_by | {"fields": fields},
        "notes": "\n".join(f"- {note}" for note in _notes(run, name)),
        "center": card.input.center,
    }


def _notes(run: EndedRun, name: str) -> Iterator[str]:
    """Of which step these weights are, how they were chosen, and what they take."""
    result, by_validation = run.result, run.result["delivered_by"] == "validation"
    step, steps, student = result["best_step"], result["steps"], run.cards["student"].title
    if name == "teacher":
        yield f"The weights are those of the teacher after the last step, {steps:,}."
    else:
        chosen = f"best {student} by validation" if by_validation else f"last {student}"
        unless = ", unless that lowered the validation accuracy" if by_validation else ""
        anew = f" They were finetuned on the labeled examples{unless}." if name == "finetuned" else ""
        yield f"The weights are those of the {chosen}: step {step:,} of {steps:,}.{anew}"
    why = "as the best by validation" if by_validation else "by a rule of its method"
    if name == result["delivered"]:
        names = ", ".join(run.cards[network].title for network in run.networks)
        yield f"Of the networks of the run ({names}) it delivers this one, {why}."
    else:
        yield f"The run delivers another of its networks, {why}: {run.cards[result['delivered']].title}."
    if "methods" in result:
        methods, seeds = (", ".join(map(str, result[part])) for part in ("methods", "seeds"))
        yield f"It was compared: methods {methods}; seeds {seeds}; {result['delivery']}."
    yield "Nothing was chosen by the test examples." if "evaluation" in result else "No test set was given."
    yield run.cards[name].input.note
