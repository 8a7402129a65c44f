"""``metapl evaluate --weights FILE``: networks without a run, with every evaluator, and two of them side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, said
from imagenet_sets import SIDE, WNIDS, picture, save, write_a, write_c, write_p
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import color_folders, color_run
from torch import Tensor

from metapl.apps.commands.runs import _card
from metapl.apps.evaluation.imagenet import IMAGENET_A
from metapl.apps.experiments.folder import load_run
from metapl.apps.export import export
from metapl.apps.networks import Architecture, load_weights, normalized
from metapl.apps.reports import robustness
from metapl.apps.reports.canvas import PALETTE
from metapl.metrics import evaluate_logits

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
CARD: dict[str, Any] = {"recipe": {}, "data_hash": "x", "metrics": {}}
READ = ("--image-size", "16", "--mean", *map(str, MEAN), "--std", *map(str, STD))
"""Flags for a file that says nothing of its pictures."""


def written(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return content


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_run(tmp_path_factory)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network of ImageNet's thousand classes, and ImageNet's test sets in small."""
    root = tmp_path_factory.mktemp("thousand")
    torch.manual_seed(0)
    network = Architecture(name="small_cnn", num_classes=1000).create()
    with torch.no_grad():
        network.get_parameter("head.weight").mul_(10)
    save_file(network.state_dict(), root / "plain.safetensors")
    (root / "classes.txt").write_text("".join(f"{wnid} name, of {wnid}\n" for wnid in WNIDS))
    for number in range(4):
        save(root / "val" / WNIDS[number] / f"ILSVRC2012_val_{number + 1:08}.JPEG", number)
    write_a(root / "a", IMAGENET_A)
    write_c(root / "c", [3])
    write_p(root / "p", [3], frames=3)
    return root


# -------------------------------------------------------------------------------------------------- what a file says


def test_an_exported_file_says_it_all(colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The network of a run, exported, is the same without the run: no flag but the pictures."""
    run = load_run(colors / "run")
    card = _card(run, run.name("delivered"))
    network = run.network(run.name("delivered"))
    file = export(network, tmp_path, card=card, architecture=run.recipe.architecture()).weights
    flags = ("--test", colors / "test", "--attack", "fgsm", "--json")
    of_run = json.loads(said(capsys, "evaluate", colors / "run", *flags))
    alone = json.loads(said(capsys, "evaluate", "--weights", file, *flags))
    assert alone.keys() - of_run.keys() == {"pictures", "normalization"}
    about = {"run", "recipe", "method", "seed", "network", "weights"}
    for key in of_run.keys() - about:
        # The run's network is stored otherwise (channels last), so its sums are rounded otherwise.
        expected = pytest.approx(of_run[key], rel=1e-5) if isinstance(of_run[key], float) else of_run[key]
        assert alone[key] == expected, key
    assert alone["network"] == "small_cnn"
    text = said(capsys, "evaluate", f"--weights={file}", "--test", colors / "test")
    assert "small_cnn, 2 classes\npictures of 8x8 pixels; mean" in text
    assert "how many of a class (row)" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_a_plain_file_by_the_networks_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: the logits of the network with these weights, of pictures normalized so."""
    root = color_folders(tmp_path / "colors", few=4)
    torch.manual_seed(0)
    for name, flags in (("small_cnn", READ), ("resnet18", ("--image-size", "32")), ("timm:resnet10t", READ)):
        network = Architecture(name=name, num_classes=2).create().eval()
        torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pt")
        content = json.loads(
            said(
                capsys,
                *("evaluate", "--weights", tmp_path / "weights.pt", "--network", name, *flags, "--center", "1"),
                *("--test", root / "test", "--json"),
            )
        )
        side = 32 if name == "resnet18" else SIDE
        mean, std = (content["normalization"][key] for key in ("mean", "std"))
        assert mean == ([0.485, 0.456, 0.406] if name == "resnet18" else MEAN)
        files = sorted((root / "test").rglob("*.png"))
        images = [Image.open(file).resize((side, side), Image.Resampling.BILINEAR) for file in files]
        x = torch.stack([torch.tensor(list(image.tobytes())).view(side, side, 3).permute(2, 0, 1) for image in images])
        with torch.no_grad():
            logits = normalized(network, mean, std).eval()(x / 255)
        labels = torch.tensor([int(file.parent.name == "red") for file in files])
        expected = evaluate_logits(logits, labels, ("blue", "red"))
        assert content["n"] == 8
        assert content["accuracy"] == expected.accuracy
        assert content["negative_log_likelihood"] == pytest.approx(expected.negative_log_likelihood, rel=1e-4)
        assert content["classes"] == ["blue", "red"]


def test_timms_own_size_normalization_and_crop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = color_folders(tmp_path / "colors", few=1)
    save_file(Architecture(name="timm:resnet10t", num_classes=2).create().state_dict(), tmp_path / "w.safetensors")
    text = said(
        capsys,
        "evaluate",
        "--weights",
        tmp_path / "w.safetensors",
        "--network",
        "timm:resnet10t",
        "--test",
        root / "test",
    )
    assert "pictures of 176x176 pixels, of which the middle 87.5% of the sides; mean 0.485, 0.456, 0.406" in text


def test_a_center_that_the_export_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = color_folders(tmp_path / "colors", few=1)
    architecture = Architecture(name="small_cnn", num_classes=2, image_size=16)
    model = normalized(architecture.create(), MEAN, STD)
    card = {**CARD, "classes": ["blue", "red"], "center": 0.875}
    file = export(model, tmp_path / "out", card=card, architecture=architecture).weights
    content = json.loads(said(capsys, "evaluate", "--weights", file, "--test", root / "test", "--json"))
    assert content["pictures"] == "16x16 pixels, of which the middle 87.5% of the sides"


# ----------------------------------------------------------------------------------------------------- all evaluators


@pytest.mark.usefixtures("full_pages")
def test_every_evaluator_in_one_file_and_one_picture(
    thousand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (thousand / "real.json").write_text(json.dumps([[number % 4] if number else [] for number in range(50_000)]))
    out = tmp_path / "out"
    text = said(
        capsys,
        *("evaluate", "--weights", thousand / "plain.safetensors", "--network", "small_cnn", *READ),
        *("--classes", thousand / "classes.txt", "--test", thousand / "val", "--label-sets", thousand / "real.json"),
        *("--corruptions", "--attack", "pgd", "--eps", "0", "2", "--imagenet-a", thousand / "a"),
        *("--imagenet-c", thousand / "c", "--imagenet-p", thousand / "p", "--out", out),
    )
    content = written(out)
    assert content["attacks"]["pgd"]["0"] == content["accuracy"]
    # ReaL: the labels repeat the folders, but the first picture has none and does not count.
    assert content["multi_label"]["n"] == 3
    assert content["multi_label"]["without_label"] == 1
    assert content["mean_corruption_error"] is not None  # the classes are ImageNet's
    assert content["imagenet_a"]["n"] == content["imagenet_a"]["classes"] == 200
    assert set(content["imagenet_c"]["corruptions"]) == set(content["corruptions"])
    assert content["imagenet_c"]["mean_corruption_error"] is not None
    assert set(content["imagenet_p"]["perturbations"]) >= {"tilt", "shot_noise"}
    assert content["imagenet_p"]["mean_flip_rate"] is not None
    with Image.open(out / "robustness.png") as page:
        assert page.width > 2000
        assert page.height > 1500
    for words in ("multi-label accuracy", "mCE", "ImageNet-A accuracy", "ImageNet-C", "mFR", "flip probability"):
        assert words in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    # Without --test, and the order of the folders alone to tell the classes by.
    alone = json.loads(
        said(
            capsys,
            *("evaluate", "--weights", thousand / "plain.safetensors", "--network", "small_cnn", *READ),
            *("--imagenet-a", thousand / "a", "--json"),
        )
    )
    assert alone["imagenet_a"] == content["imagenet_a"]
    assert "accuracy" not in alone


def test_a_run_takes_imagenets_sets_too(colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        for severity in "12345":
            name = ("blue", "red")[number % 2]
            file = tmp_path / "c" / "fog" / severity / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(file)
    content = json.loads(said(capsys, "evaluate", colors / "run", "--imagenet-c", tmp_path / "c", "--json"))
    assert content["imagenet_c"]["n"] == 20
    assert content["imagenet_c"]["mean_corruption_error"] is None
    assert content["n"] == 12  # its own test set


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_what_is_refused(
    thousand: Path, colors: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, test = thousand / "plain.safetensors", ("--test", colors / "test")
    named = (plain, "--network", "small_cnn", *READ)
    state: dict[str, Tensor] = Architecture(name="small_cnn", num_classes=1000).create().state_dict()
    first = next(iter(state))
    save_file({k: v for k, v in state.items() if k != first}, tmp_path / "lacks.safetensors")
    save_file({k: v[:2].clone() if k == first else v for k, v in state.items()}, tmp_path / "shape.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("head")}, tmp_path / "headless.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights at all")
    (tmp_path / "two.txt").write_text("blue\nred\n")
    (tmp_path / "twice.txt").write_text("blue\nblue\n")
    cases = (
        ((plain, *test), "does not say which network it is of; expected --network NAME, such as resnet50"),
        ((plain, "--network", "resnet51", *test), "there is no network 'resnet51'; did you mean resnet50"),
        (named, "there is nothing to measure"),
        (
            (plain, "--network", "small_cnn", *test),
            "what pictures its small_cnn takes; expected --image-size",
        ),
        (
            (plain, "--network", "small_cnn", "--image-size", "16", *test),
            "expected --mean and --std, with 3 numbers each",
        ),
        ((plain, "--network", "small_cnn", "--image-size", "16", "--mean", "0.5", *test), "one of --mean and --std"),
        ((plain, "--network", "resnet18", *test), "has no tensors of fc, which give the classes of resnet18"),
        ((*named, *test), "has 2 class folders"),
        ((*named, "--classes", tmp_path / "two.txt", *test), "names 2 classes, and"),
        ((*named, "--classes", tmp_path / "twice.txt", *test), "has blue more than once"),
        ((*named, "--classes", tmp_path / "none.txt", *test), "cannot be read: No such file"),
        (
            (*named, "--classes", thousand / "classes.txt", *test),
            "has pictures of blue, red, which the run does not know",
        ),
        ((*named, "--center", "2", *test), "--center 2.0: expected a share"),
        ((*named, "--imagenet-a", thousand / "a", "--label-sets", plain), "--label-sets is for the pictures of --test"),
        ((*named, "--imagenet-a", tmp_path / "nowhere"), "there is no such folder; expected"),
        ((*named, "--imagenet-a", thousand / "c", "--json"), "by --classes FILE, or all 200 folders of the data set"),
        ((tmp_path / "none.safetensors", *test), "there is no file of weights"),
        ((tmp_path / "bad.safetensors", *test), "cannot be read as weights"),
    )
    for given, words in cases:
        assert words in refused(capsys, "evaluate", "--weights", *given), given
    faults = {"lacks": f"{first} missing", "shape": f"{first} (", "headless": "has no tensors of head"}
    for name, words in faults.items():
        found = refused(
            capsys,
            *("evaluate", "--weights", tmp_path / f"{name}.safetensors", "--network", "small_cnn", *READ),
            *("--classes", thousand / "classes.txt", "--test", thousand / "val"),
        )
        assert words in found
        assert "expected" in found or "create the network that the weights are of" in found
    assert "are for networks of pictures" in refused(capsys, "evaluate", tiny, "--imagenet-a", thousand / "a")


# ------------------------------------------------------------------------------------------------------- side by side


@pytest.mark.usefixtures("full_pages")
def test_two_evaluations_side_by_side(colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    torch.save(Architecture(name="small_cnn", num_classes=2).create().state_dict(), tmp_path / "w.pt")
    flags = ("--test", colors / "test", "--attack", "fgsm", "--imagenet-c", tmp_path / "c", "--out")
    for severity in "12345":
        for name in ("blue", "red"):
            file = tmp_path / "c" / "fog" / severity / name / "1.png"
            file.parent.mkdir(parents=True)
            picture(int(severity)).save(file)
    said(capsys, "evaluate", colors / "run", *flags, tmp_path / "a")
    said(capsys, "evaluate", "--weights", tmp_path / "w.pt", "--network", "small_cnn", *READ, *flags, tmp_path / "b")
    text = said(capsys, "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    one, other = written(tmp_path / "a"), written(tmp_path / "b")
    a, b = 100 * one["accuracy"], 100 * other["accuracy"]
    lines = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in text.splitlines() if line.strip()}
    assert lines["top-1"] == [f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"]
    fogs = [100 * found["imagenet_c"]["corruptions"]["fog"]["error"] for found in (one, other)]
    assert lines["ImageNet-C error, fog"][:2] == [f"{fog:.1f}" for fog in fogs]
    assert {"FGSM, ε = 2/255", "FGSM, ε = 8/255", "calibration error"} <= lines.keys()
    assert max(map(len, text.splitlines())) <= 80
    low, high = (100 * end for end in one["interval"])
    assert f"95 % interval of top-1: {low:.1f} to {high:.1f}" in text
    assert "   finetuned network of " in text
    assert "test pictures of " in text
    assert "note: the folders of test pictures differ" not in text
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(other | {"test": "elsewhere"}))
    assert "note: the folders of test pictures differ" in said(capsys, "compare", tmp_path / "a", tmp_path / "b")
    compared = json.loads((tmp_path / "out" / "compared.json").read_text())
    assert compared["evaluations"][str(tmp_path / "a")]["top-1"] == one["accuracy"]
    with Image.open(tmp_path / "out" / "compared.png") as page:
        assert page.width > 1000
    for given, words in (
        ((tmp_path / "a", tmp_path / "a"), "was given twice"),
        ((tmp_path / "a",), "1 evaluation to compare; expected 2 to"),
        ((tmp_path / "a", colors / "run"), "has no evaluation.json; write it by: metapl evaluate"),
        ((colors / "run", "--out", tmp_path / "x"), "--out is for evaluations, and"),
    ):
        assert words in refused(capsys, "compare", *given)
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(other | {"classes": ["blue", "green"]}))
    assert "of different classes: only one of them has" in refused(capsys, "compare", tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "evaluation.json").write_text('{"corruptions": {"fog": 3}}')
    assert "Expected what metapl evaluate --out writes" in refused(capsys, "compare", tmp_path / "a", tmp_path / "b")


def test_an_evaluation_keeps_its_color_where_another_lacks_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(robustness, "_page", lambda path, panels, *rest, **more: drawn.extend(panels))
    found = {
        "a": {"accuracy": 0.5, "attacks": {"fgsm": {"2": 0.4}}},
        "b": {"accuracy": 0.6, "attacks": {"pgd": {"2": 0.1}}},
    }
    robustness.draw_evaluations(tmp_path / "page.png", found, "title")
    colors = {}
    for title, draw in drawn:
        if title in ("FGSM", "PGD"):
            axes = Figure().subplots()
            draw(axes)
            colors[title] = axes.lines[0].get_color()
    assert colors == {"FGSM": PALETTE[0], "PGD": PALETTE[1]}


def test_shares_are_drawn_up_to_100_percent(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    robustness._bars(axes, {"": {"accuracy": 1.0}}, robustness.SUMMARY)
    assert max(axes.get_xticks()) == 100


def test_runs_with_evaluations_are_compared_in_both_ways(
    colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        shutil.copytree(colors / "run", run)
        said(capsys, "evaluate", run, "--attack", "fgsm", "--eps", "2", "--out", run)
    text = said(capsys, "compare", *runs, "--out", tmp_path / "out")
    assert "test accuracy in % on 12 examples" in text
    assert "FGSM, ε = 2/255" in text
    assert (tmp_path / "out" / "compared.png").is_file()


def test_weights_load_as_they_are_without_a_head_left_fresh(thousand: Path) -> None:
    """The test above would pass with a fresh head too, were it drawn alike."""
    network = Architecture(name="small_cnn", num_classes=1000).create()
    assert load_weights(network, thousand / "plain.safetensors").fresh == ()
