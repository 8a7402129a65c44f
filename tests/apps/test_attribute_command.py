"""``metapl attribute RUN --out DIR``: which labeled pictures help and which harm."""

import html
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from command import metapl as shown
from command import rows
from PIL import Image
from test_noisy_labels import FLAGS, given, write
from torch import Tensor, nn
from torch.func import functional_call

import metapl
from metapl.apps import attribute as command
from metapl.errors import MetaplError
from metapl.pictures.folders import scan_labeled
from metapl.run_folder import EndedRun

SOME = ("--steps", "20", "--batch", "16", "--lr", "0.05", "--removals", "8", "--seed", "3")
NETWORK = ("--image-size", "8", "--network", "small_cnn", "--steps", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Return noisy, clean and others, a run of each kind, and the pictures that noisy has wrong."""
    root = tmp_path_factory.mktemp("shapes")
    wrong = write(root / "noisy", 16, 0, wrong=3)
    write(root / "clean", 5, 1000)
    write(root / "others", 4, 2000)
    flags = (
        FLAGS.replace("--steps 24", "--steps 2").replace("--warm-steps 6", "--warm-steps 1").split()
    )
    folders = ["--labeled", str(root / "clean"), "--unlabeled", str(root / "noisy")]
    shown("train", "noisy", *given(root), *flags, "--out", root / "run")
    shown("train", "images", "--method", "uda", *folders, *NETWORK, "--out", root / "images")
    return root, wrong


def tensors(folder: Path) -> tuple[list[str], tuple[Tensor, Tensor]]:
    """Return the pictures of a folder, in the order of their names, as the network sees them."""
    files = sorted(map(str, folder.rglob("*.png")))
    x = torch.stack([torch.tensor(numpy.array(Image.open(file)))[None] / 255 for file in files])
    return files, (x, torch.tensor([int(Path(file).parent.name == "beam") for file in files]))


def figures(page: Path) -> dict[str, Any]:
    """Return what stands on the page of how the scores were found."""
    cells = re.findall(
        r"<t[dh][^>]*>(.*?)</t[dh]>", page.read_text().partition("How they were found")[2]
    )
    return {
        name: json.loads(html.unescape(value))
        for name, value in zip(cells[::2], cells[1::2], strict=True)
    }


def test_the_list_is_that_of_the_library_and_finds_the_misplaced(
    folders: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, wrong = folders
    out = tmp_path / "made" / "out"
    text = shown("attribute", root / "run", "--out", out, *SOME).stdout
    told = figures(out / "attribution.html")
    listed = rows((out / "attribution.csv").read_text())
    files, (x, y) = tensors(root / "noisy")
    torch.manual_seed(3)
    network = EndedRun.load(root / "run").cards["student"].create()
    exact = metapl.attribute(  # the same by the library alone
        *(network, (x, y), tensors(root / "clean")[1]),
        optimizer=torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
        steps=20,
        batch_size=16,
        settings={"lr": 0.05 * (1 - torch.arange(20, dtype=torch.float64)[:, None] / 20)},
        generator=torch.Generator().manual_seed(3),
    )
    scores = dict(zip(files, exact.scores.tolist(), strict=True))
    assert {row["file"]: float(row["score"]) for row in listed} == pytest.approx(
        scores, rel=1e-3, abs=1e-7
    )
    assert [row["file"] for row in listed] == sorted(scores, key=lambda file: scores[file])
    assert [row["rank"] for row in listed] == [str(rank) for rank in range(1, 33)]
    assert all(row["label"] == Path(row["file"]).parent.name for row in listed)
    assert all((row["effect"] == "harms") == (float(row["score"]) < 0) for row in listed)
    assert len({row["file"] for row in listed[: len(wrong)]} & wrong) >= 5
    logits = functional_call(network, exact.student_params, (x,))
    losses = nn.functional.cross_entropy(logits, y, reduction="none").tolist()
    assert {row["file"]: float(row["loss"]) for row in listed} == pytest.approx(
        dict(zip(files, losses, strict=True)), rel=1e-3
    )
    assert told["loss"] == pytest.approx(float(exact.outer_loss), rel=1e-4)
    run = EndedRun.load(root / "run")
    student = run.network("student").eval()
    x_judge, y_judge = tensors(root / "clean")[1]
    own_loss = float(nn.functional.cross_entropy(student(x_judge), y_judge).detach())
    assert told["loss_of_the_run"] == pytest.approx(own_loss, rel=1e-4)
    said = " ".join(text.split())
    assert (
        "trained anew for the scores, by plain SGD for 20 steps on the pictures as they are" in said
    )
    assert f"the student of the run has {own_loss:.3f} there" in said
    assert told["harmful"] == sum(score < 0 for score in scores.values())
    draw = torch.Generator().manual_seed(3)
    check = exact.validate([torch.randperm(32, generator=draw)[:2] for _ in range(8)])
    assert told["spearman"] == pytest.approx(check.spearman)
    assert told["interval"][0] < told["spearman"] <= told["interval"][1] + 1e-3
    assert {path.name for path in out.iterdir()} == {"attribution.csv", "attribution.html"}
    assert f"of {told['spearman']:.2f} (95 %" in text
    page = (out / "attribution.html").read_text()
    pictures = [
        min(24, sum(row["effect"] == effect for row in listed)) for effect in ("harms", "helps")
    ]
    assert page.count('src="data:image/png;base64,') == sum(pictures)
    assert Path(listed[0]["file"]).name in page.partition("Most helpful")[0]
    assert Path(listed[-1]["file"]).name in page.partition("Most helpful")[2]


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    folders: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, _ = folders
    before = sorted(root.rglob("*"))
    for run, flags, words in (
        ("clean", "", "recipe.json"),
        ("images", "", "--val"),
        ("images", f"--val {root}/clean", "would judge themselves"),
        ("run", "--val nowhere", "nowhere"),
        ("run", "--removals 2", "--removals"),
        ("run", "--steps 3 --batch 8", "--steps"),
        ("run", f"--out {root}/noisy/bar/out", "would be read"),
        ("run", f"--out {root}/clean", "would be read"),
        ("run", f"--val {root}/val --out {root}/val/out", "would be read"),
    ):
        told = shown("attribute", root / run, "--out", tmp_path / "out", *flags.split(), code=2)
        assert words in " ".join(told.stderr.split())
    assert not (tmp_path / "out").exists()
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("when", ["attribute", "Attribution.validate"])
def test_what_is_stopped_leaves_what_was_there(
    when: str, folders: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the check, the list and a page."""
    root, _ = folders
    (tmp_path / "attribution.csv").write_text("before")
    monkeypatch.setattr(f"metapl.apps.attribute.{when}", Mock(side_effect=KeyboardInterrupt))
    shown("attribute", root / "run", "--out", tmp_path, *SOME, code=130)
    if when == "attribute":
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
            ("attribution.csv", "before")
        ]
    else:
        assert len(rows((tmp_path / "attribution.csv").read_text())) == 32
        assert "not checked yet" in (tmp_path / "attribution.html").read_text()


@pytest.mark.filterwarnings("ignore:the scores say that the outer loss")
def test_a_training_that_learned_nothing_has_no_scores(
    folders: tuple[Path, set[str]], tmp_path: Path
) -> None:
    """One that is too sure has.

    Its loss is above that of even guesses, but most of its answers are right.
    """
    root, _ = folders
    # Pictures that all it has learned is wrong for.
    for here, there in (
        ("bar", "beam"),
        ("beam", "bar"),
    ):
        shutil.copytree(root / "others" / here, tmp_path / "val" / there)
    given = ["attribute", root / "run", "--val", tmp_path / "val", "--out", tmp_path / "out", *SOME]
    assert "no score would count" in " ".join(shown(*given, code=2).stderr.split())
    assert not [*tmp_path.rglob("*.csv")]
    shutil.rmtree(tmp_path / "val")
    shutil.copytree(root / "others", tmp_path / "val")
    for picture in sorted((tmp_path / "val" / "bar").iterdir())[:2]:
        picture.rename(tmp_path / "val" / "beam" / f"wrong-{picture.name}")
    shown(*given, "--steps", "60", "--removals", "0")
    assert figures(tmp_path / "out" / "attribution.html")["loss"] > math.log(2)


def test_a_picture_that_has_gone_does_not_give_its_score_to_another(
    folders: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, _ = folders
    write(tmp_path, 2, 0)
    pictures = command.Pictures(EndedRun.load(root / "run"), scan_labeled(tmp_path))
    Path(pictures.images.path(1)).write_bytes(b"")
    assert pictures[0][0].shape == (1, 8, 8)
    with pytest.raises(MetaplError, match="cannot be read any more"):
        _ = pictures[1]
