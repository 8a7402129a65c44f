"""``metapl evaluate RUN``, on its own test set or on another folder"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import nn

from metapl.apps.commands.evaluators import Evaluators, Measured, left_out, write_evaluation
from metapl.apps.commands.inputs import Network, TestFolder
from metapl.apps.commands.parse import Run
from metapl.apps.evaluation.imagenet import Pictures, Subject, is_imagenet
from metapl.apps.experiments.folder import weights_file
from metapl.apps.experiments.load_run import LoadedRun, load_run
from metapl.apps.recipes import ImageRecipe
from metapl.errors import MetaplError
from metapl.metrics import Evaluation
from metapl.metrics.predictions import batches_of
from metapl.words import tell


@dataclass(frozen=True, kw_only=True)
class Evaluate(Evaluators):
    """Measure a run's network on its test set again: accuracy, calibration, and which classes it takes for which.

    It is the network that the run delivers, or the one named. The accuracy is the one in the run's result.json; where
    it is not, the output says so. Of a comparison, the run that the comparison delivers is measured: the best method's
    best seed by validation, and the first method's first seed where validation cannot tell. Beside it stand its 95 %
    interval, the chance level, which is what always naming the largest class gives, and what guessing evenly among them
    gives.

    A run without a test set is measured on its validation examples, and the accuracy is called so.

    With --test, it is measured on other pictures: one folder a class, called as the run's classes. A file that cannot
    be read is left out, with the reason on standard error; the exit code is then 1.

    With label sets, several classes of a picture can be right, or none: ReaL accuracy. The file is a JSON list with a
    list of classes for each test picture, such as ReaL's own real.json; or a JSON object of such lists by file name; or
    CSV with the columns file and labels, these with ; between them. A class is its name or its index.

    The pictures can also be damaged in 15 ways and 5 severities each, as in ImageNet-C (--corruptions), and be moved
    against the network (--attack); all accuracies are then written to --out, as evaluation.json and robustness.png.
    There are flags for ImageNet-A, ImageNet-C and ImageNet-P in the files in which they were released too.

    A network of a file of weights, without a run: metapl evaluate --weights FILE --help says how.

    Args:
        run: the run folder.
    """

    run: Run
    network: Network = "delivered"

    def measured(self) -> int:
        run = load_run(self.run)
        name, device = run.name(self.network), run.device
        network = run.network(name).to(device)
        if self.released and not isinstance(run.recipe, ImageRecipe):
            raise MetaplError(
                f"--imagenet-a, --imagenet-c and --imagenet-p are for networks of pictures in files, and {self.run} is "
                f"of {run.recipe.name}."
            )
        on = _own(run, device) if self.test is None else Measured.on_folder(TestFolder(run.recipe, self.test))
        if self.label_sets is not None and on.part == "validation":
            raise MetaplError(f"--label-sets are of test pictures, and {_UNTESTED.format(self.run)}")
        found = self.found(_subject(run, network), on)
        assert found.clean is not None  # there is something that it was measured on
        recorded = run.result.get(f"{name}_{on.part}_accuracy")
        about = {**self._about(run, name), "measured_on": on.part}
        on_record = {"recorded_accuracy": recorded} if self.test is None else dict(on.about)
        if self.json:
            tell(json.dumps({**about, **on_record, **found.to_json()}, indent=2))
        else:
            where = "" if self.test is None else f"\non {self.test}"
            compared = _as_recorded(found.clean, recorded) + on.remark if self.test is None else ""
            tell(f"{run.heading(name)}{where}\n")
            tell(found.text(on.part, compared, run.recipe.classes))
        content = {**about, **({} if self.test is None else on_record), **found.to_json()}
        write_evaluation(self.out, content, f"{run.heading(name)}: accuracy on {on.part} pictures")
        return left_out(found.skipped)

    def _about(self, run: LoadedRun, name: str) -> dict[str, str | int]:
        return {
            "run": str(self.run),
            "recipe": run.recipe.name,
            "method": run.result["method"],
            "seed": run.recipe.seed,
            "network": name,
            "weights": weights_file(name),
        }


_UNTESTED = "{} has no test set; give --test DIR, a folder of labeled pictures with one folder a class."


def _subject(run: LoadedRun, network: nn.Module) -> Subject:
    recipe = run.recipe
    pictures = Pictures(1)
    if isinstance(recipe, ImageRecipe):
        pictures = Pictures(recipe.image_size, recipe.grey, recipe.center)
    imagenet = getattr(recipe, "data", None) == "imagenet" or is_imagenet(recipe.classes)
    return Subject(network, pictures, recipe.classes, len(recipe.classes), imagenet)


def _own(run: LoadedRun, device: torch.device) -> Measured:
    """The run's own test set; where it has none, what it was validated on."""
    task = run.recipe.task(progress=True)
    if task.test is not None:
        return Measured(lambda: batches_of(task.test, device), lambda: task.test_names)
    if task.validation is None:
        raise MetaplError(f"{_UNTESTED.format(run.folder.path)} It has no validation set either.")
    selected = run.result["delivered_by"] == "validation"
    remark = "\n  the network was selected on these examples: train was given no --test" * selected
    return Measured(lambda: batches_of(task.validation, device), lambda: None, "validation", remark)


def _as_recorded(evaluation: Evaluation, recorded: float | None) -> str:
    if recorded is None:
        return "not in result.json"
    if evaluation.accuracy == recorded:
        return "as in result.json"
    return (
        f"but {recorded:.2%} in result.json:\n"
        "  the weights or the data have changed since, or this machine rounds otherwise"
    )
