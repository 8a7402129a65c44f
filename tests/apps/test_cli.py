"""The command line as its users meet it: real processes, their output and exit codes."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import loaded_elsewhere, metapl, process, refusal, refused, reseal, result, rows, said
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from metapl.apps.commands import main
from metapl.apps.experiments.folder import weights_file
from metapl.apps.recipes import Digits
from metapl.metrics import Evaluation, interval

SHORT = ("--steps", "300", "--finetune-steps", "20")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, which tests leave as it is."""
    run = tmp_path_factory.mktemp("runs") / "one"
    process("train", "digits", *SHORT, "--out", run)
    return run


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison, which tests leave as it is."""
    run = tmp_path_factory.mktemp("runs") / "compared"
    short = ("--steps", "30", "--finetune-steps", "5", "--jobs", "1")
    metapl("train", "digits", "--compare", "--seeds", "0-1", "--methods", "mpl", "none", *short, "--out", run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten digits as images and as a table, and a file that is neither."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    (folder / "more").mkdir()
    for index, image in enumerate(digits.images[:10]):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(folder / "more" / f"{index}.png")
    with (folder / "a, b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f"pixel {i}" for i in range(64)], *digits.data[:10].tolist()])
    (folder / "notes.txt").write_text("not to be read")
    return folder


def delivered(run: Path) -> Path:
    """The weights that the commands take."""
    return run / weights_file(result(run)["delivered"])


# -------------------------------------------------------------------------------------------------------- the commands


def test_evaluate_gives_the_number_on_record_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = metapl("evaluate", trained).stdout
    recorded = result(trained)
    assert f"{recorded['test_accuracy']:.2%} of 400, as in result.json" in text
    assert recorded["test_accuracy"] > 0.3
    table = [line.split() for line in text[text.rindex("\nclass ") :].splitlines()[2:]]
    counts = [[0 if cell == "." else int(cell) for cell in line[1:-1]] for line in table]
    assert counts == recorded["evaluation"]["confusion"]
    found = json.loads(said(capsys, "evaluate", trained, "--json"))
    assert found["accuracy"] == found["recorded_accuracy"] == recorded["test_accuracy"]
    assert {name: found[name] for name in recorded["evaluation"]} == recorded["evaluation"]
    assert "delivered by validation" in text
    assert (found["network"], found["measured_on"]) == (recorded["delivered"], "test")
    for name in ("student", "finetuned", "teacher"):
        found = json.loads(said(capsys, "evaluate", trained, "--json", "--network", name))
        assert found["accuracy"] == found["recorded_accuracy"] == recorded[f"{name}_test_accuracy"]
        assert (found["network"], found["weights"]) == (name, weights_file(name))


def test_evaluate_says_so_when_the_number_is_another(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: torch.zeros_like(value) for name, value in load_file(delivered(run)).items()}
    save_file(weights, delivered(run))
    assert "its SHA-256 is not the one that was noted" in refused(capsys, "evaluate", run)
    reseal(run)
    assert f"but {result(run)['test_accuracy']:.2%} in result.json" in said(capsys, "evaluate", run)


def test_an_accuracy_stands_beside_what_it_takes_to_judge_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, found = said(capsys, "evaluate", trained), json.loads(said(capsys, "evaluate", trained, "--json"))
    low, high = interval(round(400 * found["accuracy"]), 400)
    assert found["interval"] == [low, high]
    assert f"95 % interval               {low:.2%} to {high:.2%}" in text.splitlines()
    frequent = max(map(sum, found["confusion"])) / 400
    assert (found["chance"], found["even_guess"]) == (frequent, 0.1)
    assert found["chance"] == Evaluation(**result(trained)["evaluation"]).chance, "as where the run was made"
    line = f"chance level                {frequent:.2%}, the largest class; even guesses: 10.00%"
    assert line in text.splitlines()
    assert max(map(len, text.splitlines()[1:])) <= 80  # the first line names the run


def test_evaluate_measures_on_another_folder(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    truth = {}
    for index, digit in enumerate(load_digits().images[:40]):
        label = int(load_digits().target[index])
        if label != 7:
            (other / str(label)).mkdir(parents=True, exist_ok=True)
            truth[f"{other}/{label}/{index}.png"] = str(label)
            Image.fromarray((digit * 255 / 16).round().astype("uint8")).save(other / str(label) / f"{index}.png")
    taken = {row["file"]: row["class"] for row in rows(said(capsys, "predict", trained, other))}
    right = sum(taken[file] == label for file, label in truth.items())
    found = json.loads(said(capsys, "evaluate", trained, "--test", other, "--json"))
    assert (found["n"], found["accuracy"]) == (len(truth), right / len(truth))
    assert (found["test"], found["missing_classes"], found["per_class"][7]) == (str(other), ["7"], None)
    assert "recorded_accuracy" not in found
    (other / "3" / "torn.png").write_bytes(b"")
    (other / "7").mkdir()
    (other / "nothing here").mkdir()
    finished = metapl("evaluate", trained, "--test", other, code=1)
    assert f"\non {other}\n" in finished.stdout
    assert f"test accuracy               {right / len(truth):.2%} of {len(truth)}\n" in finished.stdout
    note = f"metapl: note: {other} has no picture of 7: nothing is measured there.\n"
    assert note in finished.stderr
    assert f"{other}/3/torn.png" in finished.stderr
    assert "metapl: 1 file left out" in finished.stderr
    (other / "ten").mkdir()
    shutil.copy(pictures / "more" / "0.png", other / "ten")
    words = refused(capsys, "evaluate", trained, "--test", other)
    assert f"{other} has pictures of ten, which the run does not know" in words
    assert "its classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in words
    assert "does not exist" in refused(capsys, "evaluate", trained, "--test", tmp_path / "none")
    assert "expected one folder a class" in refused(capsys, "evaluate", trained, "--test", pictures / "more")


def test_evaluate_takes_the_student_that_a_comparison_delivers(
    compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(said(capsys, "evaluate", compared, "--json"))
    delivered = result(compared / found["method"] / f"seed-{found['seed']}")
    assert found["accuracy"] == found["recorded_accuracy"] == delivered["test_accuracy"]
    assert (found["method"], found["seed"]) == (result(compared)["method"], result(compared)["seed"])


def test_predict_takes_images_and_tables_for_the_same(trained: Path, pictures: Path) -> None:
    found = rows(metapl("predict", trained, pictures).stdout)
    assert list(found[0]) == ["file", "class", "probability"]
    table, images = found[:10], found[10:]
    assert [row["file"] for row in table] == [f"{pictures}/a, b.csv:{line}" for line in range(2, 12)]
    assert [row["file"] for row in images] == [f"{pictures}/more/{index}.png" for index in range(10)]
    assert [row["class"] for row in table] == [row["class"] for row in images]
    for one, other in zip(table, images, strict=True):
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=0.01)


def test_predict_agrees_with_the_network(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = Digits().network()
    network.load_state_dict(load_file(trained / "finetuned_student.safetensors"))
    images = torch.tensor(load_digits().images[:10], dtype=torch.float32)[:, None] / 16
    probability, index = network(images).softmax(dim=1).max(dim=1)
    found = rows(said(capsys, "predict", trained, pictures / "a, b.csv", "--network", "finetuned"))
    assert [int(row["class"]) for row in found] == index.tolist()
    assert [float(row["probability"]) for row in found] == pytest.approx(probability.tolist(), abs=2e-6)


def test_predict_leaves_out_what_it_cannot_read_and_says_so(trained: Path, pictures: Path, tmp_path: Path) -> None:
    inputs, out = Path(shutil.copytree(pictures / "more", tmp_path / "inputs")), tmp_path / "inputs" / "out.csv"
    (inputs / "torn.png").write_bytes((inputs / "0.png").read_bytes()[:60])
    finished = metapl("predict", trained, inputs, "--out", out, code=1)
    assert len(rows(out.read_text())) == 10
    *reasons, count = finished.stderr.splitlines()
    assert [f"{inputs}/torn.png: " in reason for reason in reasons] == [True]
    assert count == "metapl: 1 of 11 files left out"
    assert list(tmp_path.rglob("*.tmp")) == []


def test_predict_refuses_what_is_not_there_before_it_writes(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, missing = pictures / "more" / "0.png", tmp_path / "none"
    assert "FILE_OR_FOLDER" in refused(capsys, "predict", trained)
    assert f"there is no file or folder {tmp_path}/none" in refused(
        capsys, "predict", trained, image, tmp_path / "none"
    )
    assert "no file in" in refused(capsys, "predict", trained, tmp_path)
    assert "is a folder" in refused(capsys, "predict", trained, image, "--out", tmp_path)
    assert "there is no folder" in refused(capsys, "predict", trained, image, "--out", missing / "out.csv")


def test_a_network_that_a_run_does_not_have_is_refused_with_those_it_has(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "teacher.safetensors").unlink()
    for command, *more in (
        ("evaluate",),
        ("predict", pictures / "a, b.csv"),
        ("export", "--out", tmp_path / "out"),
    ):
        line = refused(capsys, command, run, *more, "--network", "teacher")
        assert f"--network teacher: {run} has no teacher.safetensors" in line
        assert "expected one of its networks: student, finetuned." in line
    assert not (tmp_path / "out").exists()


def test_predict_gives_more_classes_and_all_probabilities(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pictures / "a, b.csv"
    plain = rows(said(capsys, "predict", trained, table))
    found = rows(said(capsys, "predict", trained, table, "--top", "3", "--probabilities"))
    more = ["class_2", "probability_2", "class_3", "probability_3"]
    assert list(found[0]) == ["file", "class", "probability", *more, *(f"p({digit})" for digit in range(10))]
    for row, before in zip(found, plain, strict=True):
        assert row.items() >= before.items()
        shares = {str(digit): float(row[f"p({digit})"]) for digit in range(10)}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        ranked = sorted(shares.values(), reverse=True)
        for which, share in zip(("", "_2", "_3"), ranked, strict=False):
            assert shares[row[f"class{which}"]] == float(row[f"probability{which}"]) == share
    for wrong in ("0", "11"):
        words = refused(capsys, "predict", trained, table, "--top", wrong)
        assert f"--top {wrong} was given; expected 1 to 10" in words


def test_a_diverged_network_names_the_files(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(delivered(run))
    last = list(weights)[-1]
    save_file({**weights, last: torch.full_like(weights[last], torch.nan)}, delivered(run))
    reseal(run)
    out, shown = tmp_path / "out.csv", [f"{pictures}/more/{index}.png" for index in range(5)]
    words = refused(capsys, "predict", run, pictures / "more", "--out", out)
    assert f"outputs are not finite for {', '.join(shown)} and 5 more" in words
    assert not out.exists()
    for index in range(2):
        (tmp_path / "other" / str(index)).mkdir(parents=True)
        shutil.copy(pictures / "more" / f"{index}.png", tmp_path / "other" / str(index) / "x.png")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--test", str(tmp_path / "other")]) == 2
    assert "not finite for 0/x.png, 1/x.png; " in capsys.readouterr().err
    assert "not finite" in refused(capsys, "evaluate", run)  # where they have no names


def test_a_reader_that_goes_away_ends_predict_quietly(trained: Path, pictures: Path) -> None:
    command = [sys.executable, "-m", "metapl.apps", "predict", str(trained), str(pictures)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.long
def test_export_of_digits_is_read_without_metapl(trained: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    text = metapl("export", trained, "--out", out, "--network", "finetuned").stdout
    assert "finetuned_student.safetensors" in text
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() in text
    card = (out / "MODEL_CARD.md").read_text()
    assert f"| test accuracy | {result(trained)['finetuned_test_accuracy']:.6g} |" in card
    assert f"| validation accuracy | {result(trained)['finetuned_validation_accuracy']:.6g} |" in card
    assert ("top-5" in card) == (result(trained)["delivered"] == "finetuned")  # of which alone it is known
    assert "| SHA-256 of labeled |" in card
    table = rows(metapl("predict", trained, pictures / "a, b.csv", "--network", "finetuned").stdout)
    for file in ("model.safetensors", "model.pt2"):
        found = loaded_elsewhere(out, "torch.tensor(load_digits().images[:10]).float()[:, None] / 16", file)
        assert [index for index, _ in found] == [int(row["class"]) for row in table]
        assert [p for _, p in found] == pytest.approx([float(row["probability"]) for row in table], abs=1e-5)


@pytest.mark.long
def test_export_takes_the_student_that_a_comparison_delivers(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "export", compared, "--out", tmp_path / "all")
    seed = result(compared)["seed"]
    said(capsys, "export", compared / result(compared)["method"] / f"seed-{seed}", "--out", tmp_path / "one")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("all", "one")]
    assert weights[0] == weights[1]
    whole, one = (set((tmp_path / name / "MODEL_CARD.md").read_text().splitlines()) for name in ("all", "one"))
    compared_with = f"- It was compared: methods mpl, none; seeds 0, 1; {result(compared)['delivery']}."
    assert whole - one == {compared_with}
    assert one <= whole
    (tmp_path / "file").write_text("")
    assert "is a file; expected a folder" in refused(capsys, "export", compared, "--out", tmp_path / "file")


def test_compare_pairs_the_runs_of_a_comparison(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = result(compared)["sentence"]
    whole = metapl("compare", compared).stdout
    assert sentence in " ".join(whole.split())
    singles = said(capsys, "compare", *(compared / m / f"seed-{s}" for m in ("mpl", "none") for s in (0, 1)))
    assert sentence in " ".join(singles.split())
    accuracy = result(compared / "none" / "seed-1")["test_accuracy"]
    assert re.search(rf"none +1 +{100 * accuracy:.2f}", singles)


def test_compare_says_why_it_does_not_pair(
    trained: Path, compared: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = compared / "mpl" / "seed-0", compared / "none" / "seed-1"
    assert "Not paired: mpl has seeds 0, none has 1." in said(capsys, "compare", first, other)
    assert "Not paired: mpl with seed 0 is there twice." in said(capsys, "compare", compared, first)
    assert "against those of mpl, steps 300, finetune_steps 20" in said(capsys, "compare", trained, first)
    assert "Nothing to pair" in said(capsys, "compare", trained)
    edit(run / "recipe.json", lambda content: content["recipe"]["fields"].update(labels_per_class=4))
    assert "different numbers of labels (labels_per_class 2, 4)" in said(capsys, "compare", trained, run)
    assert "was given twice" in refused(capsys, "compare", trained, trained)


def test_compare_refuses_runs_on_other_data_or_of_other_classes(
    trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = json.loads((run / "result.json").read_text())
    spoiled["evaluation"]["classes"][3] = "three"
    del spoiled["sha256"]
    (run / "result.json").write_text(json.dumps(spoiled))
    line = refused(capsys, "compare", trained, run)
    assert f"{run} and {trained} are of different classes: only one of them has three, 3." in line
    shutil.copy(trained / "result.json", run)
    edit(run / "data.json", lambda content: content["hash"].update(test="0", unlabeled="1"))
    assert "data.json is damaged or of another run" in refused(capsys, "compare", trained, run)
    reseal(run)
    line = refused(capsys, "compare", trained, run)
    assert f"{run} and {trained} are on different data: test and unlabeled differ by their hashes" in line
    assert "Train both on the same files" in line
    # Another seed has another split of the same data.
    edit(run / "recipe.json", lambda content: content["recipe"]["fields"].update(seed=1))
    edit(run / "result.json", lambda content: content.update(seed=1))
    said(capsys, "compare", trained, run)


def test_compare_names_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN..." in refused(capsys, "compare")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_run_of_another_version_gives_one_line_and_exit_code_2(run: Path) -> None:
    edit(run / "recipe.json", lambda content: content.update(format=99))
    assert "written in run format 99" in refusal(metapl("evaluate", run, code=2))


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    content.pop("sha256", None)  # as of an earlier version: its values are looked at
    change(content)
    file.write_text(json.dumps(content))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no recipe": (lambda run: (run / "recipe.json").unlink(), "there is no recipe.json in it"),
    "no result": (lambda run: (run / "result.json").unlink(), "not finished.*--resume"),
    "no weights": (lambda run: delivered(run).unlink(), "safetensors is missing.*--resume"),
    "torn recipe": (lambda run: (run / "recipe.json").write_text("{"), "recipe.json cannot be read"),
    "another thing": (lambda run: (run / "recipe.json").write_text("[]"), "recipe.json is damaged"),
    "no fields": (lambda run: edit(run / "recipe.json", lambda c: c["recipe"].pop("fields")), "recipe.json is damaged"),
    "result of another thing": (lambda run: (run / "result.json").write_text("{}"), "result.json is damaged"),
    "other network": (
        lambda run: edit(
            run / "network.json", lambda c: [n.update(widths=[64, 16, 10]) for n in c["networks"].values()]
        ),
        r"safetensors does not fit",
    ),
    "torn weights": (lambda run: delivered(run).write_bytes(b"torn"), "safetensors is damaged"),
    "a file": (lambda run: (shutil.rmtree(run), run.write_text("")), "is a file; expected the folder of a run"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_run_is_refused_in_one_line(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = SPOILED[name]
    spoil(run)
    line = refused(capsys, "evaluate", run)
    assert str(run) in line
    assert re.search(expected, line), line
