"""The commands after ``train`` on runs of pictures: many classes, several right labels, grids, and exports."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from command import loaded_elsewhere, refused, result, rows, said
from PIL import Image, ImageOps
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torchvision.models import resnet18

from metapl.apps.commands import main

KINDS = {"plain": lambda image: image, "inverted": ImageOps.invert, "turned": lambda image: image.rotate(180)}
"""Ten digits of each of these are thirty classes."""

SHORT = (
    *("--strong.writing", "--pad", "2", "--strong.cutout", "4", "--labeled-batch", "16", "--unlabeled-batch", "16"),
    *("--log-every", "10", "--save-every", "100", "--finetune-steps", "2"),
)


def train(*arguments: str | Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", *map(str, arguments), *SHORT]) == 0


def digits(side: int) -> Iterator[tuple[int, int, Image.Image]]:
    """Which of its class it is, its class, and the picture."""
    data, seen = load_digits(), dict.fromkeys(range(10), 0)
    for image, label in zip(data.images[:150], data.target[:150].tolist(), strict=True):
        picture = Image.fromarray((image * 255 / 16).round().astype(numpy.uint8)).resize((side, side))
        yield seen[label], label, picture
        seen[label] += 1


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty classes, whose test pictures are called as ImageNet's, in another order than that of the numbers."""
    root, number = tmp_path_factory.mktemp("many"), 0
    for which, label, picture in digits(16):
        for kind, change in KINDS.items():
            number += 1
            part = "test" if which < 3 else "few" if which < 5 else "val" if which < 7 else "many"
            name = f"ILSVRC2012_val_{37 * number % 1009:08}.png" if which < 3 else f"{number}.png"
            file = root / "data" / part / f"{label} {kind}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            change(picture).save(file)
    few, many, val, test = (root / "data" / part for part in ("few", "many", "val", "test"))
    data = ("--labeled", few, "--unlabeled", many, "--val", val, "--test", test, "--method", "mpl", "--randaugment")
    how = ("--precision", "float32", "--network", "small_cnn", "--image-size", "16", "--steps", "40")
    train("images", *data, *how, "--out", root / "run")
    return root


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on_colors(tmp_path_factory.mktemp("colored"), "small_cnn")


def trained_on_colors(root: Path, network: str) -> Path:
    """A network on colored pictures of two classes, with validation pictures and no test set."""
    for which, label, picture in digits(32):
        if label < 2:
            file = root / ("many" if which < 6 else f"few/is {label}") / f"{label}-{which}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            ImageOps.colorize(picture, "navy", "orange").save(file)
    data = ("--labeled", root / "few", "--unlabeled", root / "many", "--network", network, "--image-size", "32")
    how = ("--method", "mpl", "--randaugment", "--precision", "float32", "--val-fraction", "0.4")
    train("images", *data, *how, "--dropout", "0.2", "--steps", "4", "--validate-every", "2", "--out", root / "run")
    return root


def predicted(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The class of each test picture, by its name."""
    found = rows(said(capsys, "predict", root / "run", root / "data" / "test"))
    return {str(Path(row["file"]).relative_to(root / "data" / "test")): row["class"] for row in found}


# ------------------------------------------------------------------------------------------------------------ evaluate


def test_many_classes_are_summed_up(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "evaluate", many / "run")
    recorded = result(many / "run")["evaluation"]
    assert max(map(len, text.splitlines()[1:])) <= 80  # the first line names the run
    assert f"{recorded['accuracy']:.2%} of 90, as in result.json" in text
    assert f"top-5 accuracy              {recorded['top5']:.2%}" in text
    names, confusion = recorded["classes"], torch.tensor(recorded["confusion"])
    wrong = confusion - confusion.diag().diag()
    shown = re.findall(r"^(\d \w+) +(\d \w+) +(\d+) +3$", text, flags=re.MULTILINE)
    assert len(shown) == 10
    for true, taken, times in shown:
        assert wrong[names.index(true), names.index(taken)] == int(times)
    assert [int(times) for *_, times in shown] == wrong.flatten().sort(descending=True).values[:10].tolist()
    worst = re.findall(r"^(\d \w+) +(\d+\.\d)% +3$", text, flags=re.MULTILINE)
    assert [float(right) for _, right in worst] == [round(100 * x, 1) for x in sorted(recorded["per_class"])[:10]]
    for name, right in worst:
        assert float(right) == round(100 * recorded["per_class"][names.index(name)], 1)


def test_a_matrix_that_is_wider_than_a_terminal_has_shorter_heads() -> None:
    from metapl.apps.commands.evaluate import confusions as _confusions
    from metapl.metrics import evaluate_logits

    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    labels = torch.arange(10).repeat(1000)
    few = _confusions(evaluate_logits(torch.eye(10)[labels], labels, names), names)
    assert 70 < max(map(len, few.splitlines())) <= 80
    assert " auto " in few
    names = tuple(f"{name} of the {place}" for name in names for place in ("left", "right"))
    labels = torch.arange(20)
    lists = _confusions(evaluate_logits(torch.eye(20)[labels], labels, names), names)
    assert "nothing is taken for anything else" in lists
    assert max(map(len, lists.splitlines())) <= 80


@pytest.mark.filterwarnings("ignore:.* is left out")
def test_a_test_picture_that_is_gone_is_told(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted((many / "data" / "test").rglob("*.png"))[7]
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    try:
        assert main(["evaluate", str(many / "run")]) == 1  # a file was left out
        assert " of 89, but " in " ".join(capsys.readouterr().out.split())
    finally:
        file.write_bytes(whole)


def test_an_accuracy_on_validation_is_called_so(colored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, recorded = said(capsys, "evaluate", colored / "run"), result(colored / "run")
    assert recorded["delivered_by"] == "rule"  # so few pictures cannot tell
    assert "delivered by rule" in text
    n = recorded["validation_size"]
    assert f"\nvalidation accuracy         {recorded['validation_accuracy']:.2%} of {n}, as in result.json\n" in text
    assert "test accuracy" not in text
    for name in ("student", "finetuned", "teacher"):
        found = json.loads(said(capsys, "evaluate", colored / "run", "--json", "--network", name))
        assert found["accuracy"] == found["recorded_accuracy"] == recorded[f"{name}_validation_accuracy"]
        assert found["measured_on"] == "validation"


def test_a_run_of_a_gpu_is_looked_at_without_one(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(many / "run", tmp_path / "run"))
    content = json.loads((run / "recipe.json").read_text())
    content["recipe"]["fields"]["device"] = "cuda"
    del content["sha256"]
    (run / "recipe.json").write_text(json.dumps(content))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "as in result.json" in said(capsys, "evaluate", run)
    assert len(rows(said(capsys, "predict", run, many / "data" / "test"))) == 90


# ------------------------------------------------------------------------------------------------- predict and export


@pytest.mark.parametrize("terminal", [True, False])
def test_a_name_does_not_reach_a_terminal_as_it_is(
    terminal: bool, colored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a\x1b[2Jb.png")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(["predict", str(colored / "run"), str(tmp_path / "a\x1b[2Jb.png")]) == 0
    assert ("\x1b" in capsys.readouterr().out) != terminal


@pytest.mark.long
def test_torchvision_alone_predicts_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resnet = trained_on_colors(tmp_path / "resnet", "resnet18")
    out, files = tmp_path / "out", sorted((resnet / "many").iterdir())
    text = said(capsys, "export", resnet / "run", "--out", out)
    assert f"{out}/model.safetensors" in text
    resnet18(num_classes=2).load_state_dict(load_file(out / "model.safetensors"), strict=True)
    names = [str(file) for file in files]
    read = f"torch.stack([torch.tensor(numpy.array(Image.open(f))).permute(2, 0, 1) / 255 for f in {names}])"
    told = rows(said(capsys, "predict", resnet / "run", *files))
    for file in ("model.safetensors", "model.pt2"):
        found = loaded_elsewhere(out, read, file)
        assert [("is 0", "is 1")[index] for index, _ in found] == [row["class"] for row in told]
        assert [p for _, p in found] == pytest.approx([float(row["probability"]) for row in told], abs=1e-5)


@pytest.mark.long  # make test runs the programs of small networks, in test_export
def test_the_default_network_runs_in_plain_pytorch_and_as_onnx(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out, files = tmp_path / "out", sorted((many / "data" / "test").rglob("*.png"))[:7]
    text = said(capsys, "export", many / "run", "--out", out, "--onnx")
    for name in ("model.pt2", "model.onnx"):
        assert f"{out}/{name}: " in text
    assert text.count("run without metapl: it gives what the network gives") == 2
    told = rows(said(capsys, "predict", many / "run", *files))
    names = [str(file) for file in files]
    read = f"numpy.stack([numpy.array(Image.open(f).convert('RGB')).transpose(2, 0, 1) for f in {names}])"
    read = f"({read}.astype('float32') / 255)"
    classes = result(many / "run")["evaluation"]["classes"]
    network = torch.export.load(out / "model.pt2").module()
    with torch.inference_mode():
        scope = {"numpy": numpy, "Image": Image}
        shares = network(torch.from_numpy(eval(read, scope))).softmax(dim=1)
    assert [classes[index] for index in shares.argmax(dim=1)] == [row["class"] for row in told]
    (code,) = re.findall(r"```python\n([^`]*model\.onnx[^`]*)```", (out / "MODEL_CARD.md").read_text())
    with contextlib.chdir(out):
        exec(code, scope)
    found = scope["predict"](eval(read, scope))  # type: ignore[operator]  # what the card defines
    assert found == pytest.approx(shares.numpy(), abs=1e-5)


def test_evaluate_says_which_pictures_were_trained_on(
    colored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(colored / "few", tmp_path / "other"))
    seen = sorted((colored / "many").iterdir())[0]
    shutil.copy(seen, other / "is 0" / "new.png")
    capsys.readouterr()
    assert main(["evaluate", str(colored / "run"), "--test", str(other)]) == 0
    notes = " ".join(capsys.readouterr().err.splitlines())  # long lines are broken
    count = len(list((colored / "few").rglob("*.png")))
    assert f"note: {count} test pictures are among the labeled ones too" in notes
    assert notes.count("remove them from the test folder") == 2  # the run has already learned from the others
    assert f"note: 1 test pictures are among the unlabeled ones too: {other}/is 0/new.png is {seen}" in notes


@pytest.mark.usefixtures("blank_programs")
def test_the_card_says_what_was_measured_and_no_place_of_a_file(
    colored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "export", colored / "run", "--out", tmp_path / "out")
    card, recorded = (tmp_path / "out" / "MODEL_CARD.md").read_text(), result(colored / "run")
    assert f"| validation accuracy | {recorded['validation_accuracy']:.6g} |" in card
    assert f"| validation examples | {recorded['validation_size']} |" in card
    assert "test accuracy" not in card
    assert "- No test set was given." in card
    assert "it delivers this one, by a rule of its method" in card
    assert "- Classes, in the order of the outputs: is 0, is 1" in card
    hashes = json.loads((colored / "run" / "data.json").read_text())["hash"]
    assert all(f"| SHA-256 of {part} | `{digest}` |" in card for part, digest in hashes.items())
    recipe = json.loads(re.findall(r"```json\n(.*?)```", card, flags=re.DOTALL)[0])
    assert (recipe["name"], recipe["method"], recipe["best_step"]) == ("images", "mpl", recorded["best_step"])
    fields = recipe["fields"]
    assert (fields["labeled"], fields["unlabeled"], fields["test"], fields["steps"]) == ("few", "many", None, 4)
    assert "/" not in json.dumps(recipe)
    assert str(colored) not in card
    assert colored.name not in card


@pytest.mark.usefixtures("blank_programs")
def test_the_card_counts_the_examples_of_a_split(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "export", many / "run", "--out", tmp_path, "--network", "finetuned")
    card, recorded = (tmp_path / "MODEL_CARD.md").read_text(), result(many / "run")
    for line in (
        "| labeled | 60 examples |",
        "| test | 90 examples |",
        f"| test accuracy | {recorded['finetuned_test_accuracy']:.6g} |",
        f"| validation accuracy | {recorded['finetuned_validation_accuracy']:.6g} |",
    ):
        assert line in card.splitlines()
    assert ("calibration" in card) == (recorded["delivered"] == "finetuned")  # of which alone it is known
    weights = load_file(tmp_path / "model.safetensors")
    for name, value in load_file(many / "run" / "finetuned_student.safetensors").items():
        if name.startswith("module."):
            assert torch.equal(weights[name.removeprefix("module.")], value)


def test_an_export_needs_the_record_of_the_data(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(many / "run", tmp_path / "run"))
    (run / "data.json").unlink()
    assert "data.json cannot be read: No such" in refused(capsys, "export", run, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
