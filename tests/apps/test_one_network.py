"""A method that trains one network speaks of a network, not of a student and its teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import said
from PIL import Image, ImageDraw

from metapl.apps.experiments.accuracies import READOUTS, Comparison, summary
from metapl.apps.recipes.methods import EVERY_METHOD, titled
from metapl.metrics import Evaluation

TINY = (
    "--network",
    "small_cnn",
    "--image-size",
    "8",
    "--precision",
    "float32",
    "--steps",
    "4",
    "--finetune-steps",
    "2",
)


def shapes(root: Path) -> Path:
    """Circles and crosses, three of each with a label; the name of a class is longer than 16 letters."""
    for part in ("few", "test"):
        for number in range(6):
            name = ("circle", "a_cross_of_two_diagonals")[number % 2]
            image = Image.new("RGB", (12, 12), (10 * number, 30, 50 if part == "few" else 90))
            pen = ImageDraw.Draw(image)
            if name == "circle":
                pen.ellipse((2, 2, 9, 9), fill=(200, 200, 10 * number))
            else:
                pen.line((2, 2, 9, 9), fill=(200, 200, 10 * number))
            file = root / part / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return root


def train(root: Path, capsys: pytest.CaptureFixture[str], method: str) -> str:
    folders = ("--labeled", root / "few", "--unlabeled", root / "few", "--test", root / "test")
    return said(capsys, "train", "images", *folders, *TINY, "--method", method, "--out", root / method)


@pytest.mark.long
def test_every_message_about_one_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shapes(tmp_path)
    words = train(root, capsys, "uda")
    assert "6 labeled pictures of 2 classes (a_cross_of_two_diagonals, circle), 6 unlabeled" in words.replace("\n", " ")
    assert "Test accuracy of the finetuned network: " in words
    assert "On test: network " in words
    matrix = said(capsys, "evaluate", root / "uda")
    assert re.search(r"^class +a_cross\.\.\.gonals +circle +right$", matrix, re.MULTILINE)  # as long as a row's
    export = said(capsys, "export", root / "uda", "--out", root / "model")
    card = (root / "model" / "MODEL_CARD.md").read_text()
    assert "The weights are those of the last network: step 4 of 4." in card
    for text in (words, matrix, export.replace("finetuned_student.safetensors", ""), card.split("## ")[0]):
        text = text.replace("finetuned_student.safetensors", "").replace("student.safetensors", "")
        assert "student" not in text
        assert "teacher" not in text
    assert json.loads((root / "uda" / "result.json").read_text())["delivered"] == "finetuned"  # the file's own names


def test_a_student_is_called_so() -> None:
    confusion = [[2, 0], [1, 1]]
    evaluation = Evaluation(
        accuracy=0.75,
        n=4,
        per_class=[1.0, 0.5],
        confusion=confusion,
        negative_log_likelihood=0.1,
        expected_calibration_error=0.1,
        top5=None,
        classes=["a", "b"],
    )
    content = {"delivered": "finetuned", "delivered_by": "rule", "validation_size": 0, "finetuned_test_accuracy": 0.75}
    content["evaluation"] = evaluation.to_json()
    of_two, of_one = (" ".join(summary({**content, "method": method})) for method in ("mpl", "supervised"))
    assert of_two.replace("finetuned student", "finetuned network") == of_one != of_two
    alone = {name for name, method in EVERY_METHOD.items() if method.one_network}
    assert {"uda", "fixmatch", "supervised", "plain", "clean"} <= alone
    assert not alone & {"mpl", "none", "pseudo_labels", "example_weights", "permuted"}
    assert titled("none", "student") == "student"


def test_the_tables_of_a_comparison_say_what_stands_under_student() -> None:
    accuracies = {name: [0.8, 0.9] for name in READOUTS}
    remark = "student: where one network is trained, that network"
    assert remark in Comparison((0, 1), {"mpl": accuracies, "uda": accuracies}, 400, 0.1).caption()
    assert remark not in Comparison((0, 1), {"mpl": accuracies, "none": accuracies}, 400, 0.1).caption()
