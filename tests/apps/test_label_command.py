"""``metapl label``: the same store whatever the number of workers, and however often it is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import refused, rows, said
from PIL import Image
from sklearn.datasets import load_digits
from test_labels import files
from tiny_runs import PROVENANCE, TINY, color_folders, images_command

from metapl import MetaplError
from metapl.apps.commands import main
from metapl.apps.experiments import labeling
from metapl.apps.experiments.labeling import Labeled, SourcePictures, provenance, store_labels
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.pictures.input import Input
from metapl.apps.pictures.store import FileImages, MemoryImages


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty digits in a tree of folders, and a file that cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(load_digits().images[:60]):
        path = folder / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(path)
    (folder / "1" / "torn.png").write_bytes(b"torn")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labeling, "FEWEST_ROWS", 16)


def label(*arguments: str | Path) -> int:
    return main(["label", *map(str, arguments)])


def test_labels_are_what_predict_says_whatever_the_number_of_workers(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*TINY, "--dropout", "0.5", "--out", str(run)]) == 0  # which does nothing in eval mode
    capsys.readouterr()
    assert label(run, pictures, "--out", tmp_path / "0", "--batch", 7) == 1
    told = capsys.readouterr()
    assert f"{tmp_path / '0'}: labels of 60 pictures, 10 classes, all probabilities\n" in told.out
    assert f"left out {pictures / '1' / 'torn.png'}: " in told.err
    assert told.err.endswith("metapl: 1 of 61 files left out\n")
    assert label(run, pictures, "--out", tmp_path / "2", "--batch", 7, "--num-workers", 2) == 1
    assert files(tmp_path / "0") == files(tmp_path / "2")
    store = LabelStore(tmp_path / "2")
    assert [part.rows for part in store.parts] == [16, 16, 16, 12]
    store.verify()
    predicted = rows(said(capsys, "predict", run, pictures, "--probabilities", code=1))
    assert len(predicted) == len(store) == 60
    for row in predicted:
        name = Path(row["file"]).relative_to(pictures).as_posix()
        expected = torch.tensor([float(row[f"p({digit})"]) for digit in range(10)])
        assert torch.allclose(store[name], expected, atol=2e-3)
    about = store.provenance
    assert {*PROVENANCE, "run", "model"} <= {*about}
    assert about["examples"] == 61
    assert about["temperature"] == 1.0
    assert about["views"].startswith("as they are, not augmented.")
    assert about["model"]["weights_sha256"] in json.loads((run / "result.json").read_text())["sha256"].values()


def test_temperature_and_top_k(tiny: Path, tmp_path: Path) -> None:
    for name, flags in (("plain", ()), ("sharp", ("--temperature", "0.5")), ("three", ("--top-k", "3"))):
        assert label(tiny, "digits", "--out", tmp_path / name, *flags) == 0
    plain, sharp, three = (LabelStore(tmp_path / name) for name in ("plain", "sharp", "three"))
    assert list(plain) == list(range(1797))
    p = plain.at(range(1797))
    squared = p.square()
    assert torch.allclose(sharp.at(range(1797)), squared / squared.sum(dim=1, keepdim=True), atol=2e-3)
    kept = three.at(range(1797))
    assert torch.allclose(kept.topk(3).values, p.topk(3).values, atol=1e-3)
    assert torch.allclose(kept.sort(dim=1).values[:, 0], kept.sort(dim=1).values[:, 6])
    assert sharp.provenance["temperature"] == 0.5


# ------------------------------------------------------------------------------------------------- kills


def killed_after(moments: int, command: list[str]) -> None:
    """Run the command, and kill it with -9 at the given moment: before or after a file is synced, or gets its name."""
    passed = 0

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*given: Any) -> None:
            nonlocal passed
            for step in (lambda: None, lambda: call(*given)):
                step()
                passed += 1
                if passed == moments:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    sys.exit(main(command))


def test_however_often_it_is_killed_nothing_is_there_twice_and_nothing_is_missing(tiny: Path, tmp_path: Path) -> None:
    command = ["label", str(tiny), "digits", "--batch", "32", "--resume", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    out, context = tmp_path / "killed", multiprocessing.get_context("fork")
    kills, rng = 0, np.random.default_rng(0)
    while True:
        # A part and the description pass six such moments each. In the first, and in the last one before the store is
        # whole, it is killed too.
        moments = 1 if kills == 0 else int(rng.integers(2, 130))
        process = context.Process(target=killed_after, args=(moments, [*command, str(out)]))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        assert (process.exitcode, kills < 100) == (-signal.SIGKILL, True)
        with pytest.raises(MetaplError):
            LabelStore(out)
    assert kills >= 5
    assert files(out) == files(tmp_path / "whole")
    assert {*os.listdir(out)} == {*os.listdir(tmp_path / "whole")}
    killed, whole = LabelStore(out), LabelStore(tmp_path / "whole")
    assert list(killed) == list(range(1797))
    assert torch.equal(killed.at(range(1797)), whole.at(range(1797)))


@pytest.mark.parametrize("moments", range(1, 7))
def test_killed_at_any_moment_of_a_part_and_before_and_after_others_have_their_names(
    moments: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a store of one part: the part, and the description before it, behind it and sealed, pass six moments each."""
    monkeypatch.setattr(labeling, "FEWEST_ROWS", 4096)
    context = multiprocessing.get_context("fork")
    for write in range(4) if moments in (3, 4) else (1,):
        out = tmp_path / f"{write}"
        command = ["label", str(tiny), "digits", "--resume", "--out", str(out)]
        process = context.Process(target=killed_after, args=(6 * write + moments, command))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        has_its_name = moments > 3
        assert len(list(out.glob("*.tmp"))) == (not has_its_name)
        assert len(files(out)) == (write + has_its_name >= 2)
        assert main(command) == 0
        assert list(LabelStore(out)) == list(range(1797))
        assert len(files(out)) == 1
        assert not list(out.glob("*.tmp"))


def test_ctrl_c_says_how_to_go_on_and_files_that_cannot_be_read_are_left_out_again(
    tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (tiny, pictures, "--batch", 5, "--top-k", 4)
    assert label(*command, "--out", tmp_path / "whole") == 1
    out, add = tmp_path / "stopped", LabelWriter.add

    def stopped(self: LabelWriter, *given: object) -> None:
        if self.rows >= 32:
            raise KeyboardInterrupt
        add(self, *given)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(LabelWriter, "add", stopped)
    assert label(*command, "--out", out) == 130
    assert f"metapl: 32 labels are in {out}; go on with --resume.\n" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(labeling, "FEWEST_ROWS", 16)
    assert f"{out} holds an unfinished store of labels; go on with resume=True (--resume)" in refused(
        capsys, "label", *command, "--out", out
    )
    assert label(*command, "--out", out, "--resume", "--num-workers", 1) == 1
    assert files(out) == files(tmp_path / "whole")
    assert label(*command, "--out", out, "--resume") == 1, "a whole store stays as it is"


@pytest.mark.parametrize("whole", [True, False])
def test_pictures_that_were_replaced_are_not_gone_on_with(
    whole: bool,
    tiny: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under the same names, and of the same size and time where need be; only those that are labeled are compared."""
    folder, out = Path(shutil.copytree(pictures, tmp_path / "pictures")), tmp_path / "store"
    with monkeypatch.context() as patched:
        add = LabelWriter.add

        def stopped(self: LabelWriter, *given: Any) -> None:
            if self.rows >= 32 and not whole:
                raise KeyboardInterrupt
            add(self, *given)

        patched.setattr(LabelWriter, "add", stopped)
        assert label(tiny, folder, "--batch", 5, "--out", out) == (1 if whole else 130)
    before, command = files(out), (tiny, folder, "--batch", 5, "--out", out, "--resume")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    last = names[-1]  # which the store that is not whole does not have
    (folder / names[0]).write_bytes((folder / names[9]).read_bytes())
    (folder / last).write_bytes((folder / names[9]).read_bytes())
    said_so = refused(capsys, "label", *command)
    many = f"2 of the 60 pictures that {out} has labels of" if whole else f"1 of the 32 pictures that {out} has"
    assert f"{many}" in said_so
    assert f"{names[0]}, {last};" in said_so if whole else f"{names[0]};" in said_so
    assert files(out) == before
    for name in (names[0], last):
        shutil.copy2(pictures / name, folder / name)
    (folder / names[1]).unlink()
    (folder / names[1]).symlink_to("nowhere")  # one that cannot be read is no other picture
    (folder / names[2]).unlink()
    os.mkfifo(folder / names[2])
    capsys.readouterr()
    assert label(*command) == 1
    assert "2 files that were labeled before cannot be read now: " in capsys.readouterr().err
    assert len(LabelStore(out)) == 60


# ------------------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("kind", [lambda images: images, MemoryImages])
def test_pictures_in_memory_are_told_apart_by_what_they_are(kind: Callable[[torch.Tensor], Any]) -> None:
    """They are called by their numbers, and a store is gone on with where its provenance is the same."""
    images = torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4)
    found = [SourcePictures(kind(x)).content() for x in (images, images.clone(), images + 1, images[[1, 0, 2]])]
    assert found[0] == found[1]
    assert len({*found}) == 3
    chosen = [MemoryImages(images, torch.tensor(indices)) for indices in ([0, 1], [1, 0])]
    assert SourcePictures(chosen[0]).content() != SourcePictures(chosen[1]).content()


def test_a_runs_own_labels_are_of_the_pictures_that_it_has(pictures: Path, tmp_path: Path) -> None:
    """Those of Noisy Student's rounds and of Reduced MPL, in which pictures are called by their numbers."""
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    paths = sorted(folder.rglob("*.png"))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    def stored(resized: bool) -> LabelStore:
        images = FileImages(paths, size=(8, 8), mode="L", log=tmp_path / "skipped.jsonl")
        labeled = Labeled(SourcePictures(images if resized else images.cached()), range(len(images)), "unlabeled")
        about = provenance(network, labeled, Input(size=8))
        return store_labels(network, labeled, tmp_path / "store", "abcdefghij", about, lambda text: None)

    first = stored(resized=True)
    assert (len(first), first.has_digests) == (60, True)
    assert files(stored(resized=False).folder) == files(first.folder)
    paths[3].write_bytes(paths[4].read_bytes())
    with pytest.raises(MetaplError, match=r"1 of the 60 pictures that .* has labels of are other ones now.*: 3;"):
        stored(resized=True)


# ------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_labeled_is_refused_in_one_line(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "store")
    for arguments, expected in (
        ((tiny, tmp_path / "none"), "does not exist; expected a folder with pictures, or for a run of digits"),
        ((tiny, pictures / "0" / "0.png"), "is a file; expected a folder"),
        ((tiny, pictures, "--temperature", "0"), "--temperature 0.0: expected a number above 0."),
        ((tiny, pictures, "--temperature", "nan"), "--temperature nan: expected"),
        ((tiny, "digits", "--temperature", "1e-45"), "divided by the temperature 1e-45: expected a greater one"),
        ((tiny, pictures, "--top-k", "11"), "--top-k 11 was given; expected 1 to 10, the number of classes"),
        ((tiny, pictures, "--batch", "0"), "--batch 0: expected a whole number from 1 to 1,048,576"),
        ((tiny, pictures, "--num-workers", "-1"), "--num-workers -1: expected a whole number from 0 to"),
        ((tmp_path / "none", pictures), "there is no folder"),
        ((tiny, tmp_path), "has no picture in it"),
    ):
        assert expected in refused(capsys, "label", *arguments, *out)
    assert not (tmp_path / "store").exists()
    assert f"{tiny} holds files that are not a store's" in refused(capsys, "label", tiny, pictures, "--out", tiny)


def test_a_run_of_pictures_labels_folders_and_not_the_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = color_folders(tmp_path / "root", few=3, many=4)
    assert main([*images_command(root), "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    hostile = root / "unlabeled" / "a\x1b[2J\n.png"
    shutil.copy(root / "unlabeled" / "red-0.png", hostile)
    (root / "unlabeled" / os.fsdecode(b"caf\xe9.png")).write_bytes(hostile.read_bytes())
    (root / "unlabeled" / "b\x1b[31m.png").write_bytes(b"")
    capsys.readouterr()
    assert label(tmp_path / "run", root / "unlabeled", "--out", tmp_path / "store") == 1
    told = capsys.readouterr()
    assert "caf\\xe9.png: its name is not UTF-8; rename it." in told.err
    assert "b\\x1b[31m.png: the file is empty" in told.err
    assert "\x1b" not in told.out + told.err
    store = LabelStore(tmp_path / "store")
    assert len(store) == 9
    assert torch.equal(store["a\x1b[2J\n.png"], store["red-0.png"])
    with pytest.raises(MetaplError) as refusal:
        _ = store["b\x1b[31m.png"]
    assert "\x1b" not in str(refusal.value)
    assert "digits does not exist" in refused(capsys, "label", tmp_path / "run", "digits", "--out", tmp_path / "new")
