"""``metapl train noisy``: pictures some of which are in the folder of a wrong class."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import refused, result, rows, said
from PIL import Image

from metapl.apps.commands import main
from metapl.apps.experiments.accuracies import READOUTS, Comparison
from metapl.apps.experiments.experiment import check_shares
from metapl.apps.experiments.settle import settled
from metapl.apps.experiments.suspects import Suspect, what_they_are
from metapl.apps.recipes import NoisyFolders
from metapl.apps.recipes.methods import METHODS, NOISY_METHODS
from metapl.apps.recipes.methods.label_noise import LabelOptimizer
from metapl.distributed import Mesh
from metapl.errors import MetaplError

FLAGS = (
    "--image-size 8 --network small_cnn --precision float32 --labeled-batch 12 --clean-batch 6 --steps 24 "
    "--warm-steps 6 --finetune-steps 4 --log-every 2 --validate-every 6 --save-every 4"
)
SHAPES = ("bar", "beam")


def picture(shape: str, seed: int) -> Image.Image:
    """A bar stands, a beam lies."""
    draw = np.random.default_rng(seed)
    levels = draw.integers(0, 60, (8, 8)).astype(np.uint8)
    place = int(draw.integers(1, 6))
    levels[:, place : place + 2] = 255
    return Image.fromarray(levels if shape == "bar" else np.ascontiguousarray(levels.T))


def write(root: Path, each: int, seed: int, wrong: int = 0) -> set[str]:
    """``each`` pictures a class, the first ``wrong`` of them in the other folder; the paths of these."""
    misplaced = set()
    for number, shape in enumerate(SHAPES):
        for index in range(each):
            folder = SHAPES[1 - number] if index < wrong else shape
            path = root / folder / f"{shape}-{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(shape, seed + 100 * number + index).save(path)
            misplaced |= {str(path)} if index < wrong else set()
    return misplaced


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """noisy, clean and test, and the pictures of noisy that are in the wrong folder."""
    root = tmp_path_factory.mktemp("shapes")
    wrong = write(root / "noisy", 20, 0, wrong=3)
    write(root / "clean", 4, 1000)
    write(root / "test", 10, 2000)
    return root, wrong


def given(root: Path) -> list[str]:
    return ["--labeled", str(root / "noisy"), "--clean", str(root / "clean")]


@pytest.fixture(scope="module")
def run(folders: tuple[Path, set[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default method, long enough to tell a bar from a beam."""
    out = tmp_path_factory.mktemp("runs") / "noisy"
    root, _ = folders
    flags = FLAGS.replace("--steps 24", "--steps 60").split()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", "noisy", *given(root), "--test", str(root / "test"), *flags, "--out", str(out)]) == 0
    (out.parent / "said.txt").write_text(said.getvalue())
    return out


def suspects(out: Path) -> list[dict[str, str]]:
    with (out / "suspects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("others", [0, 5, 6, 10])
def test_a_network_that_agrees_with_few_labels_is_said_to_have_learned_too_little(others: int) -> None:
    listed = [Suspect(f"{i}.png", i, 0, int(i < others), 0.4, 0.6) for i in range(10)]
    text = what_they_are(listed)
    assert text.startswith(f"of {others} of 10 the network finds another class more probable")
    assert ("it has not learned enough for this list" in text) == (others > 5)


def test_a_run_lists_the_misplaced_pictures_first(run: Path, folders: tuple[Path, set[str]]) -> None:
    _, wrong = folders
    listed = suspects(run)
    assert len(listed) == 40
    assert len({row["file"] for row in listed}) == 40
    assert all(Path(row["file"]).parent.name == row["given"] for row in listed)
    of_given = [float(row["p_given"]) for row in listed]
    assert of_given == sorted(of_given)
    assert all(float(row["p_probably"]) >= float(row["p_given"]) for row in listed)
    assert all(0 < float(row["weight"]) < 1 for row in listed)
    first = listed[: len(wrong)]
    assert len({row["file"] for row in first} & wrong) >= 5
    assert all(row["probably"] != row["given"] for row in first if row["file"] in wrong)
    of_wrong, of_right = ([float(r["weight"]) for r in listed if (r["file"] in wrong) == one] for one in (True, False))
    assert np.mean(of_wrong) < np.mean(of_right)
    others = sum(row["probably"] != row["given"] for row in listed)
    said = " ".join((run.parent / "said.txt").read_text().split())
    assert f"of {others} of 40 the network finds another class more probable" in said
    page = (run / "report.html").read_text()
    assert page[page.index("Labels that may be wrong") :].count("<figure>") >= 40


@pytest.mark.usefixtures("blank_programs")
def test_the_run_is_evaluated_predicted_with_finetuned_and_exported(
    run: Path, folders: tuple[Path, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = folders
    told = result(run)
    assert (told["recipe"], told["method"], told["delivered_by"]) == ("noisy", "example_weights", "rule")
    assert told["test_accuracy"] == told["finetuned_test_accuracy"] >= 0.9
    evaluated = json.loads(said(capsys, "evaluate", run, "--json"))
    assert evaluated["accuracy"] == evaluated["recorded_accuracy"] == told["test_accuracy"]
    predicted = rows(said(capsys, "predict", run, root / "test"))
    right = np.mean([Path(row["file"]).name.startswith(f"{row['class']}-") for row in predicted])
    assert right == told["test_accuracy"]
    said(capsys, "export", run, "--out", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    # A picture that was trained on says nothing of others, whichever folder it is from.
    other = tmp_path / "other"
    shutil.copytree(root / "noisy" / "bar", other / "bar")
    main(["evaluate", str(run), "--test", str(other)])
    assert "20 test pictures are among the unlabeled ones too" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["meta_weight_net", "noise_transition", "plain", "clean"])
def test_every_method_leaves_a_list(method: str, folders: tuple[Path, set[str]], tmp_path: Path) -> None:
    root, _ = folders
    teacher = [] if NOISY_METHODS[method].one_network else ["--mode", "difference"]
    idle = ["--warm-steps 6", "--clean-batch 6", *["--labeled-batch 12"] * (method == "clean")]
    flags = functools.reduce(lambda flags, one: flags.replace(one, ""), idle, FLAGS).split()
    command = ["train", "noisy", *given(root), "--method", method, *flags, *teacher, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    listed = suspects(tmp_path / "run")
    assert len(listed) == 40
    assert "weight" not in listed[0]
    assert result(tmp_path / "run")["method"] == method
    # Where labels may be wrong, nothing may be trained on but what the method says.
    phases = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert ("warm" in phases) == bool(teacher)


@pytest.mark.long
def test_a_comparison_says_whether_it_helped_against_plain_training(
    folders: tuple[Path, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = folders
    out = tmp_path / "compared"
    flags = FLAGS.replace("--steps 24", "--steps 8").split()
    test = ["--test", root / "test", "--compare", "--controls", "--seeds", "0-1", "--jobs", "1"]
    printed = said(capsys, "train", "noisy", *given(root), *test, *flags, "--out", out)
    told = result(out)
    own = ["example_weights", "plain", "clean", "example_weights_permuted", "example_weights_random_sign"]
    assert told["methods"].keys() == set(own)
    assert told["example_weights_against_plain"]["n"] == 2
    words = " ".join(printed.split())
    assert "With learned weights of examples the finetuned student reaches" in words
    assert "plain training" in words
    assert "at least 5 seeds are needed to tell whether what is learned about labels helped" in words
    source = out / told["method"] / f"seed-{told['seed']}"
    assert (out / "suspects.csv").read_bytes() == (source / "suspects.csv").read_bytes()
    said(capsys, "predict", out, root / "test")


def test_the_sentence_of_a_comparison_names_what_helped() -> None:
    better = {readout: [0.9, 0.91, 0.92, 0.93, 0.95] for readout in READOUTS}
    worse = {readout: [0.8, 0.82, 0.81, 0.84, 0.83] for readout in READOUTS}
    found = Comparison((0, 1, 2, 3, 4), {"noise_transition": better, "plain": worse}, examples=400, chance=0.1)
    assert found.sentence().endswith(": what is learned about labels helped.")
    assert "noise_transition_against_plain" in found.to_json()
    found = Comparison((0, 1, 2, 3, 4), {"noise_transition": worse, "plain": better}, examples=400, chance=0.1)
    assert "what is learned about labels hurt; the best on the test set is plain" in found.sentence()


# ------------------------------------------------------------------------------------------------------------ refusals


def same(root: Path) -> tuple[Path, Path]:
    return root / "noisy", root / "noisy"


def nested(root: Path) -> tuple[Path, Path]:
    shutil.move(root / "clean", root / "noisy" / "clean")
    return root / "noisy", root / "noisy" / "clean"


def shared(root: Path) -> tuple[Path, Path]:
    shutil.copy(root / "clean" / "bar" / "bar-00.png", root / "noisy" / "beam" / "x.png")
    return root / "noisy", root / "clean"


def other_classes(root: Path) -> tuple[Path, Path]:
    (root / "clean" / "beam").rename(root / "clean" / "Beam")
    return root / "noisy", root / "clean"


def no_clean(root: Path) -> tuple[Path, Path]:
    shutil.rmtree(root / "clean")
    (root / "clean" / "bar").mkdir(parents=True)
    return root / "noisy", root / "clean"


def one_class_empty(root: Path) -> tuple[Path, Path]:
    shutil.rmtree(root / "clean" / "beam")
    (root / "clean" / "beam").mkdir()
    return root / "noisy", root / "clean"


def one_given_class_empty(root: Path) -> tuple[Path, Path]:
    shutil.rmtree(root / "noisy" / "bar")
    (root / "noisy" / "bar").mkdir()
    return root / "noisy", root / "clean"


def missing(root: Path) -> tuple[Path, Path]:
    return root / "noisy", root / "nowhere"


REFUSED = (
    (same, "are the same folder; expected two folders"),
    (nested, "are one inside the other; expected two folders"),
    (shared, r"1 clean pictures are among the labeled ones too: .*bar-00.png is .*x.png; remove them from"),
    (other_classes, "classes differ: beam in .*noisy alone; Beam in .*clean alone"),
    (no_clean, "clean has no picture in it"),
    (one_class_empty, "class 'beam' has no picture in"),
    (one_given_class_empty, "no picture of bar in .*noisy; put some there, or remove it from .*clean too"),
    (missing, "nowhere does not exist; expected a folder with pictures"),
)


@pytest.mark.parametrize(("spoil", "words"), REFUSED, ids=lambda one: getattr(one, "__name__", ""))
def test_folders_that_would_spoil_it_are_refused_before_anything_is_written(
    spoil: Callable[[Path], tuple[Path, Path]],
    words: str,
    folders: tuple[Path, set[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(folders[0], tmp_path / "copy")
    noisy, clean = spoil(tmp_path / "copy")
    out = tmp_path / "out"
    line = refused(capsys, "train", "noisy", "--labeled", noisy, "--clean", clean, *FLAGS.split(), "--out", out)
    assert re.search(words, line), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method plain --teacher.lr 0.1", "Unrecognized options: --teacher.lr, 0.1"),
        ("--method plain --clean-batch 3", "Unrecognized options: --clean-batch, 3"),
        ("--method clean --warm-steps 3", "Unrecognized options: --warm-steps, 3"),
        ("--steps 5 --minutes 2", "Arguments --steps and --minutes are not allowed together"),
        ("--steps 5 --warm-steps 5", "--warm-steps 5: expected 0 or more, and fewer than steps=5"),
        ("--clean-batch 0", "--clean-batch 0: expected a whole number from 1 to 1,048,576."),
        ("--clean-batch 100000000000", "--clean-batch 100000000000: expected a whole number from 1 to 1,048,576."),
        ("--accumulate 5", "--accumulate 5: expected a divisor of labeled_batch and clean_batch"),
        ("--controls", "--controls goes with --compare"),
        ("--compare", "--compare reports on pictures that nothing was selected on"),
        ("--compare --test x --methods mpl", "invalid choice 'mpl' for argument '--methods'. Expected one of ("),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: str, words: str, folders: tuple[Path, set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "train", "noisy", *given(folders[0]), *flags.split())


@pytest.mark.parametrize("size", [80, 81])
def test_a_batch_with_many_copies_of_each_picture_is_told(size: int, folders: tuple[Path, set[str]]) -> None:
    """Of eight clean pictures, 80 in a batch are ten of each."""
    root, said = folders[0], list[str]()
    small: dict[str, Any] = {"steps": 5, "image_size": 8, "precision": "float32", "clean_batch": size}
    settled(NoisyFolders(labeled=str(root / "noisy"), clean=str(root / "clean"), **small), None, said.append)
    told = [line for line in said if "--clean-batch 81 is 10 times the 8 pictures" in line]
    assert len(told) == (size == 81)


def test_several_processes_share_its_own_batches() -> None:
    recipe = NoisyFolders(labeled="a", clean="b", labeled_batch=12, clean_batch=6, image_size=8, grey=True)
    check_shares(recipe, Mesh(replicate=2))
    with pytest.raises(MetaplError, match=r"clean_batch of 6, which 4 ranks do not share equally.*give --clean-batch"):
        check_shares(recipe, Mesh(replicate=4))


def test_the_other_recipes_do_not_have_these_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert METHODS.keys() & NOISY_METHODS.keys() == set()
    line = refused(capsys, "train", "digits", "--compare", "--methods", "plain")
    assert "invalid choice 'plain' for argument '--methods'" in line


def test_a_teacher_without_a_learning_rate_has_the_method_s_own() -> None:
    recipe = NoisyFolders(labeled="a", clean="b")
    names = ("example_weights", "noise_transition", "label_correction")
    assert [recipe.by_name(name).optimizer().lr for name in names] == [0.1, 0.05, 0.001]
    given = recipe.with_method(teacher=LabelOptimizer(lr=0.3))
    assert given.by("label_correction").method.optimizer().lr == 0.3
