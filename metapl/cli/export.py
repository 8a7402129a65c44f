"""``metapl export RUN --out DIR``"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any

import tyro

from metapl.cli.finished import Finished, finished, weights_file
from metapl.cli.parse import Run, Switch
from metapl.evaluate import Evaluation
from metapl.export import export
from metapl.programs import ONNX, can_run_onnx, require_onnx
from metapl.recipes import Digits, PictureRecipe, Recipe
from metapl.recipes.comparison import title
from metapl.recipes.store import describe
from metapl.run_folder import RunFolder

FIGURES = {"top5": "top-5 accuracy", "expected_calibration_error": "expected calibration error"}
"""What stands on the card of a student's evaluation, beside its accuracy."""

PARTS = ("labeled", "unlabeled", "validation", "test")
"""Of the data, as ``data.json`` calls them: numbers of examples, or lists of them."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's student for others: files that need no metapl, and a card that says what they are.

    model.pt2 is the whole network, with its normalisation, as a program for torch.export.load: any number of pictures
    in, logits out. model.safetensors holds the weights under the names of torchvision or timm, where the network is
    theirs. MODEL_CARD.md has the code that loads each, the accuracies, the recipe without the places of your files,
    hashes of the data, and versions. Files of these names that are there already are replaced.

    Programs are run without metapl and compared with the network before anything is written.

    Args:
        run: the run folder; of a comparison, the student that it delivers.
        out: the folder to write them to; made if need be.
        finetuned: the student after finetuning on the labelled data.
        onnx: model.onnx too; needs pip install 'metapl[onnx]'.
    """

    run: Run
    out: Annotated[Path, tyro.conf.arg(metavar="DIR", help_behavior_hint="")]
    finetuned: Switch = False
    onnx: Switch = False

    def __call__(self) -> int:
        run = finished(self.run)
        if self.onnx:
            require_onnx()
        trained = _Trained.of(run)
        written = export(
            run.student(self.finetuned),
            self.out,
            card=trained.card(self.finetuned),
            architecture=run.recipe.architecture(),
            shape=_shape(run.recipe),
            onnx=self.onnx,
        )
        print(f"{run.title}, {weights_file(self.finetuned)}\n")
        print(f"{written.weights}: {_size(written.weights)}\n  SHA-256 {written.sha256}")
        for file in (written.program, written.onnx):
            if file is not None:
                print(f"{file}: {_size(file)}\n  {_checked(file)}")
        print(f"{written.card}: how to load them, and how good they are")
        return 0


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.3g} MB"


def _checked(file: Path) -> str:
    if file.name == ONNX and not can_run_onnx():
        return "not run: onnxruntime is not installed"
    return "run without metapl: it gives what the network gives"


def _shape(recipe: Recipe) -> tuple[int, int, int] | None:
    """Of the network's input."""
    if isinstance(recipe, Digits):
        return 1, 8, 8
    if isinstance(recipe, PictureRecipe):
        return 1 if recipe.grey else 3, recipe.image_size, recipe.image_size
    return None


@dataclass(frozen=True)
class _Trained:
    """A run, with what the run that trained its student left behind; of a comparison, that is one of its runs.

    Args:
        run: the run, or the comparison.
        result: the student's own ``result.json``.
        data: its ``data.json``.
    """

    run: Finished
    result: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def of(cls, run: Finished) -> _Trained:
        folder = run.folder
        if run.is_comparison:
            folder = RunFolder(folder.path / run.result["method"] / f"seed-{run.result['seed']}")
        return cls(run, folder.read_json("result.json"), folder.read_json("data.json"))

    def card(self, finetuned: bool) -> dict[str, Any]:
        """What :func:`metapl.export.export` writes on the card."""
        method = self.run.result["method"]
        return {
            "title": f"{self.run.recipe.name}: {title(method)}",
            "classes": self.run.recipe.classes,
            "metrics": self.metrics(finetuned),
            "data_hash": self.examples(),
            "recipe": self.recipe(finetuned),
            "notes": "\n".join(f"- {one}" for one in self.notes(finetuned)),
        }

    def metrics(self, finetuned: bool) -> dict[str, Any]:
        """Figures of the weights that are exported, and of no others."""
        which, part = "finetuned_" if finetuned else "", "validation" if self.without_test else "test"
        accuracy = self.run.result[f"{which}test_accuracy"]
        evaluation = self.result["evaluation"]
        found = {f"{part} accuracy": accuracy, f"{part} examples": evaluation["n"]}
        found[f"{part} chance level"] = Evaluation(**evaluation).chance
        if not finetuned:  # the evaluation is of the student before that
            found |= {f"{part} {title}": evaluation[name] for name, title in FIGURES.items()}
        # One of a comparison's runs may have been finetuned anew since.
        if self.result[f"{which}test_accuracy"] == accuracy:
            found["validation accuracy"] = self.result[f"{which}validation_accuracy"]
        return {name: value for name, value in found.items() if value is not None}

    def examples(self) -> dict[str, str]:
        """On which data: how many examples, and their hashes."""
        told = self.data | self.data.get("counts", {})
        counts = {
            part: len(told[part]) if isinstance(told[part], list) else told[part] for part in PARTS if part in told
        }
        name = {"data set": self.data["data"]} if "data" in self.data else {}
        return (
            name
            | {part: f"{count:,} examples" for part, count in counts.items()}
            | {f"SHA-256 of {part}": f"`{digest}`" for part, digest in self.data["hash"].items()}
        )

    def recipe(self, finetuned: bool) -> dict[str, Any]:
        """The recipe without the places of files, of which the last names are left."""
        fields: dict[str, Any] = describe(self.run.recipe)["fields"]
        fields = {
            name: PurePath(value).name if isinstance(value, str) and "/" in value else value
            for name, value in fields.items()
            if name != "class_names"
        }
        how = {"name": self.run.recipe.name, "method": self.run.result["method"], "best_step": self.result["best_step"]}
        again = {"finetuned_with": self.result["finetuned_with"]} if finetuned and self.finetuned_anew else {}
        return how | again | {"fields": fields}

    def notes(self, finetuned: bool) -> list[str]:
        """Which weights these are, how they were chosen, and what they take."""
        step, steps = self.result["best_step"], self.run.recipe.steps
        notes = [f"The weights are those of the best student by validation: step {step:,} of {steps:,}."]
        if finetuned:
            notes.append("They were finetuned on the labelled examples, unless that lowered the validation accuracy.")
        if self.run.is_comparison:
            methods, seeds = (", ".join(map(str, self.run.result[name])) for name in ("methods", "seeds"))
            notes.append(f"It was compared: methods {methods}; seeds {seeds}. This is the best by validation.")
        if self.without_test:
            notes.append("There was no test set: the accuracy is on the pictures by which the weights were chosen.")
        else:
            notes.append("Nothing was chosen by the test examples.")
        return [*notes, *_takes(self.run.recipe)]

    @property
    def without_test(self) -> bool:
        """Whether the accuracy on record is that on validation."""
        return bool(self.data.get("test_is_validation"))

    @property
    def finetuned_anew(self) -> bool:
        """Whether the finetuned weights are of other options than the recipe's."""
        key = "finetuned_test_accuracy"
        return "finetuned_with" in self.result and self.result[key] == self.run.result[key]


def _takes(recipe: Recipe) -> list[str]:
    """How the network's input is made of a picture."""
    if isinstance(recipe, Digits):
        return ["Its input is (B, 1, 8, 8), ink from 0 to 1: scikit-learn's digits, divided by 16."]
    if not isinstance(recipe, PictureRecipe):
        return []
    colours = "grey (0.299 R + 0.587 G + 0.114 B)" if recipe.grey else "in colours"
    middle = "" if recipe.centre == 1 else f"the middle {recipe.centre:.1%} of "
    size = f"{recipe.image_size}x{recipe.image_size}"
    return [
        f"Pictures were {colours}, from 0 to 1: {middle}the largest centred square of each, brought to {size} by "
        "antialiased bilinear resampling."
    ]
