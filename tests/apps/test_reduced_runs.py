"""``--method reduced_mpl``: the teacher, its stored labels and the student, as phases of one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from tiny_runs import PROVENANCE, REDUCED, TINY, built_once, color_run, images_command, trained

from metapl.apps.commands import main
from metapl.apps.experiments import experiment
from metapl.apps.experiments.labeling import rows_of
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.pictures import load_digits_split
from metapl.training.resuming import digest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "reduced", lambda out: trained(*REDUCED, "--out", str(out)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_run(tmp_path_factory)


def test_the_curve_is_the_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(experiment, "draw_report", lambda path, network, **_: called.append(network))
    assert main([*REDUCED, "--out", str(tmp_path / "run")]) == 0
    assert called == ["student"]


def contents(run: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "result.json", "student.safetensors", "finetuned_student.safetensors")
    return {name: (run / name).read_bytes() for name in names}


def stored(run: Path) -> dict[str, torch.Tensor]:
    stores = {part: LabelStore(run / "labels" / part) for part in ("unlabeled", "labeled")}
    return {part: store[list(store)] for part, store in stores.items()}


def test_the_store_has_the_labels_of_the_trained_teacher(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = []
    label_by = experiment.label_by

    def noted(teacher: torch.nn.Module, *given: Any) -> Any:
        teachers.append(teacher)
        return label_by(teacher, *given)

    monkeypatch.setattr(experiment, "label_by", noted)
    run = tmp_path / "again"
    assert main([*REDUCED, "--out", str(run)]) == 0
    assert contents(run) == contents(whole)
    split = load_digits_split(2, 0)
    (teacher,) = teachers
    teacher.eval()
    for part, about in ((part, LabelStore(run / "labels" / part).provenance) for part in ("unlabeled", "labeled")):
        assert {*PROVENANCE} <= {*about}
        assert about["pictures"] == part
        assert about["weights_fingerprint"] == digest(dict(teacher.state_dict()))
    with torch.no_grad():
        for part, images in (("unlabeled", split.unlabeled), ("labeled", split.labeled[0])):
            found = stored(run)[part]
            assert found.shape == (len(images), 10)
            assert (found - teacher(images).softmax(-1)).abs().max() < 1e-3


@pytest.mark.long
def test_a_comparison_has_its_control_and_the_words_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("reduced_mpl", "reduced_none", "pseudo_labels")
    out = tmp_path / "compared"
    assert main([*TINY, "--compare", "--methods", *methods, "--seeds", "0-1", "--out", str(out), "--jobs", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Reduced MPL (stored labels, adjusted)" in said
    assert "Reduced MPL's student reaches" in said
    assert "needed to tell whether the student's feedback helped" in said
    found = json.loads((out / "result.json").read_text())
    assert set(found["methods"]) == set(methods)
    assert "reduced_mpl_against_reduced_none" in found


def test_pictures_by_a_teacher_of_the_run(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(images_command(pictures, "--method", "reduced_mpl", "--out", str(run))) == 0
    assert (run / "student.safetensors").is_file()
    assert not (run / "teacher.safetensors").exists()
    assert len(stored(run)["unlabeled"]) == 24
    assert main(["predict", str(run), str(pictures / "test" / "red")]) == 0
    assert "red-0.png" in capsys.readouterr().out


@pytest.fixture
def teacher(pictures: Path) -> Path:
    return pictures / "run"


def test_pictures_by_another_run_and_by_its_stores_are_labeled_alike(
    pictures: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = {part: tmp_path / f"{part}-store" for part in ("unlabeled", "labeled")}
    for part, store in stores.items():
        assert main(["label", str(teacher), str(pictures / part), "--out", str(store)]) == 0
    given = {
        "run": ("--teacher", str(teacher)),
        "stores": ("--labels", str(stores["unlabeled"]), "--labeled-labels", str(stores["labeled"])),
        "one store": ("--labels", str(stores["unlabeled"])),
    }
    for name, flags in given.items():
        assert main(images_command(pictures, "--method", "reduced_mpl", *flags, "--out", str(tmp_path / name))) == 0
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (
        tmp_path / "stores" / "student.safetensors"
    ).read_bytes()
    for part, store in stores.items():
        of_command, of_run = (LabelStore(place).provenance for place in (store, tmp_path / "run" / "labels" / part))
        assert {name: of_command[name] for name in PROVENANCE} == {name: of_run[name] for name in PROVENANCE}
        assert of_command["run"] == of_run["run"] == str(teacher)
    assert "labels are those of" in (said := " ".join(capsys.readouterr().out.split()))
    assert "adjusted by the student's feedback alone" in said
    rows = [json.loads(line) for line in (tmp_path / "one store" / "metrics.jsonl").read_text().splitlines()]
    assert not any("teacher_cross_entropy" in row for row in rows)


def test_a_run_does_not_go_on_with_another_store(
    pictures: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    names = [path.name for path in sorted((pictures / "unlabeled").iterdir())]
    command = images_command(pictures, "--method", "reduced_mpl", "--labels", str(store), "--out", str(run))
    for share in (0.75, 0.5):
        shutil.rmtree(store, ignore_errors=True)
        with LabelWriter(store, ["blue", "red"]) as writer:
            writer.add(names, torch.tensor([[share, 1 - share]] * len(names)))
        assert main([*command, *(["--resume"] if run.exists() else [])]) == (0 if share == 0.75 else 2)
        (run / "result.json").unlink(missing_ok=True)
    assert "data have changed" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unlabeled", "labeled"])
def test_labels_of_other_pictures_are_refused_before_anything_is_written(
    part: str, pictures: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, stores = Path(shutil.copytree(pictures, tmp_path / "pictures")), {}
    for name in ("unlabeled", "labeled"):
        stores[name] = tmp_path / f"{name}-store"
        assert main(["label", str(teacher), str(folder / name), "--out", str(stores[name])]) == 0
    two = sorted((folder / part).rglob("*.png"))[:2]
    levels = numpy.asarray(Image.open(two[0])) // 2  # a picture of the same class
    Image.fromarray(levels).save(two[0])
    flags = ("--labels", str(stores["unlabeled"]), "--labeled-labels", str(stores["labeled"]))
    command = images_command(folder, "--method", "reduced_mpl", *flags, "--out", str(tmp_path / "run"))
    assert main(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"that {stores[part]} has labels of are other ones now" in told
    assert f"bytes: {two[0].relative_to(folder / part)};" in told
    assert not (tmp_path / "run").exists()
    two[0].write_bytes(two[1].read_bytes())
    two[0].unlink()  # a store may have labels of more pictures
    assert main(command) == 0


BESIDE = "expected --teacher, or --labels and perhaps --labeled-labels beside it"
REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("--method", "uda", "--labels", "STORE"), "Unrecognized options: --labels"),
    (("--method", "uda", "--teacher", "RUN"), "Unrecognized options: --teacher"),
    (
        ("--method", "reduced_mpl", "--teacher", "RUN", "--labels", "STORE"),
        BESIDE,
    ),
    (
        ("--method", "reduced_mpl", "--labeled-labels", "STORE"),
        BESIDE,
    ),
    (("--method", "reduced_mpl", "--labels", "PICTURES"), "is not a store of labels"),
    (("--method", "reduced_mpl", "--labels", "OTHER"), "has the classes a, b; expected those of"),
    (("--method", "reduced_mpl", "--teacher", "nowhere"), "there is no folder"),
    (("--method", "reduced_mpl", "--pseudo-labels", "none"), "--pseudo-labels"),
]


@pytest.mark.parametrize(
    ("flags", "words"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_labels_that_cannot_be_used_are_refused_before_anything_is_written(
    flags: tuple[str, ...],
    words: str,
    pictures: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with LabelWriter(tmp_path / "other", ["a", "b"]) as writer:
        writer.add(["x.png"], torch.tensor([[0.5, 0.5]]))
    with LabelWriter(tmp_path / "store", ["blue", "red"]) as writer:
        writer.add(["x.png"], torch.tensor([[0.5, 0.5]]))
    places = {"STORE": tmp_path / "store", "OTHER": tmp_path / "other", "RUN": teacher, "PICTURES": pictures}
    command = [str(places.get(flag, flag)) for flag in flags]
    assert main(images_command(pictures, *command, "--out", str(tmp_path / "run"))) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_examples_without_a_stored_label_get_even_ones_and_a_store_of_others_is_refused(tmp_path: Path) -> None:
    with LabelWriter(tmp_path / "store", ["a", "b"]) as writer:
        writer.add(["x", "y"], torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    store = LabelStore(tmp_path / "store")
    assert rows_of(store, ["y", "z", "x"]).tolist() == [[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]
    with pytest.raises(Exception, match="none of the 2 examples"):
        rows_of(store, ["p", "q"])
