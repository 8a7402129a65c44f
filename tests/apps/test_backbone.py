"""Pictures from a backbone.

Where its weights are found, what of them is trained, and the control beside the run.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import metapl, result
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_runs import color_folders
from torch import nn
from torchvision.models import ResNet18_Weights
from torchvision.transforms.functional import pil_to_tensor

from metapl.apps import backbone
from metapl.apps.images import Pictures
from metapl.apps.run_summary import summary
from metapl.errors import MetaplError
from metapl.networks.architectures import create
from metapl.networks.tuned import Tuned, begin_as
from metapl.pictures import MemoryImages
from metapl.run_folder import WEIGHTS, EndedRun
from metapl.training.trainer import BilevelTrainer

SIDE = 32
FLAGS = "--steps 3 --finetune-steps 2 --device cpu --labeled-batch 4 --log-every 1 --save-every 2"
NETWORK = f"--network pooled_cnn --image-size {SIDE} {FLAGS}"
PLACES = "--labeled {root}/labeled --unlabeled {root}/unlabeled --test {root}/test"
IMAGES = f"train images {PLACES} {NETWORK} --unlabeled-batch 4 --method"


@pytest.fixture(name="root", scope="module")
def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return red and blue pictures, and weights of a network of ten classes."""
    root = color_folders(tmp_path_factory.mktemp("colors"), few=6, many=8, side=SIDE)
    torch.manual_seed(3)
    torch.save(create("pooled_cnn", 10, image_size=SIDE).state_dict(), root / "weights.pt")
    return root


def command(words: str, root: Path, out: Path, *more: object) -> list[str]:
    return [*words.format(root=root).split(), "--out", str(out), *map(str, more)]


@pytest.mark.parametrize(
    ("words", "tuning"),
    [
        (f"{IMAGES} mpl", "head"),
        (f"{IMAGES} uda", "all"),
        pytest.param(f"{IMAGES} supervised", "head", marks=pytest.mark.long),
        pytest.param(
            f"noisy-student images {PLACES} {NETWORK} --rounds 1 --ratio 1",
            "head",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_run_begins_from_a_file_goes_on_from_it_alone_and_is_read_without_it(
    words: str, tuning: str, root: Path, tmp_path: Path
) -> None:
    given, out = Path(shutil.copy(root / "weights.pt", tmp_path)), tmp_path / "run"
    started = command(words, root, out, "--backbone", given, "--tuning", tuning)
    metapl(*started)
    fields = json.loads((out / "recipe.json").read_text())["recipe"]["fields"]
    assert (fields["network"], fields["weights"], fields["tuning"]) == (
        "pooled_cnn",
        str(given),
        tuning,
    )
    assert fields["weights_sha256"] == backbone.find(str(given), "pooled_cnn").weights_sha256
    assert result(out)["control_accuracy"] == 1.0
    assert "linear baseline" in (out / "report.html").read_text()
    before = torch.load(given)
    ended = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    if tuning == "all":
        for name in ("result.json", *ended):
            (out / name).unlink()
        torch.save(create("pooled_cnn", 10, image_size=SIDE).state_dict(), given)
        assert "another file" in metapl(*started, "--resume", code=2).stderr
        shutil.copy(root / "weights.pt", given)
        metapl(*started, "--resume")
        assert {file.name: file.read_bytes() for file in out.glob("*.safetensors")} == ended
    given.unlink()
    assert len(metapl("predict", out, root / "test").stdout.splitlines()) == 1 + 12
    for name in EndedRun.load(out).networks:
        weights = load_file(out / WEIGHTS[name])
        after = {key.removeprefix("module."): t for key, t in weights.items()}
        moved = {key for key, t in before.items() if not torch.equal(t, after[key])} - {
            "head.weight",
            "head.bias",
        }
        assert bool(moved) == (tuning == "all")


def tuned(tuning: Any, name: str = "pooled_cnn", **options: Any) -> Tuned:
    config = Pictures(network=name, weights="", backbone="given", tuning=tuning, **options)
    module = config.architecture(classes=3).create()
    heads = config.architecture(classes=3).heads(module)
    return Tuned(module, (0.5,) * 3, (0.5,) * 3, heads=heads, tuning=tuning)


def test_frozen_weights_are_stored_once_and_the_heads_alone_move() -> None:
    teacher, student = tuned("head"), tuned("head")
    begin_as(teacher, student)
    own = [
        {id(p) for p in network.parameters() if not p.requires_grad}
        for network in (teacher, student)
    ]
    assert own[0] == own[1] != set()
    before = {name: t.clone() for name, t in student.state_dict().items()}
    inner, outer = (
        torch.optim.SGD([p for p in n.parameters() if p.requires_grad], 0.1)
        for n in (student, teacher)
    )
    given: Any = {"inner_optimizer": inner, "outer_optimizer": outer, "verify": False}
    x = [torch.rand(4, 3, SIDE, SIDE) for _ in range(3)]
    BilevelTrainer(teacher, student, "forward", **given).step(
        (x[0], torch.tensor([0, 1, 2, 0])), (x[1], x[2])
    )
    moved = {name for name, t in student.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name, p in student.named_parameters() if p.requires_grad}


def cached(name: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save = save_file if file.suffix == ".safetensors" else torch.save
    save(create(name, 1000).state_dict(), file)  # type: ignore[operator]


def test_a_name_stands_for_the_weights_in_a_cache_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("resnet18", "timm:resnet10t"):
        with pytest.raises(MetaplError, match="put them at"):
            backbone.find(name, None)
    file = tmp_path / "torch" / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    cached("resnet18", file)
    assert backbone.find("resnet18", None).weights == str(file)
    repo = tmp_path / "hub" / "models--timm--resnet10t.c3_in1k"
    cached("timm:resnet10t", repo / "snapshots" / "abc" / "model.safetensors")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    found = backbone.find("timm:resnet10t", "timm:resnet10t")
    weights = repo / "snapshots" / "abc" / "model.safetensors"
    assert (found.weights, found.mean) == (str(weights), (0.485, 0.456, 0.406))


def test_the_network_of_a_run_is_a_backbone(root: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "first", tmp_path / "second"
    metapl(*command(f"{IMAGES} supervised", root, out))
    found, card = backbone.find(str(out), None), EndedRun.load(out).cards["finetuned"]
    assert (found.network, found.image_size, found.mean) == ("pooled_cnn", SIDE, card.mean)
    from_it = f"train images {PLACES} {FLAGS} --unlabeled-batch 4 --method supervised"
    metapl(*command(from_it, root, again, "--backbone", out, "--tuning", "head"))
    after = load_file(again / "student.safetensors")
    finetuned = load_file(out / "finetuned_student.safetensors")
    name = next(key for key in after if after[key].ndim == 4)
    assert torch.equal(after[name], finetuned[name])
    shutil.copy(out / "student.safetensors", out / "finetuned_student.safetensors")
    assert (
        "SHA-256"
        in metapl(*command(from_it, root, tmp_path / "third", "--backbone", out), code=2).stderr
    )


def test_weights_that_were_exchanged_are_not_gone_on_with(root: Path, tmp_path: Path) -> None:
    given, out = Path(shutil.copy(root / "weights.pt", tmp_path)), tmp_path / "run"
    started = command(f"{IMAGES} supervised --weights {given}", root, out)
    metapl(*started)
    (out / "result.json").unlink()
    torch.save(create("pooled_cnn", 10, image_size=SIDE).state_dict(), given)
    assert "another file" in metapl(*started, "--resume", code=2).stderr


def test_what_is_no_backbone_is_refused_in_a_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for more, word in (
        ("--backbone resnet19", "resnet18"),
        ("--backbone small_cnn", "nobody"),
        ("--backbone gone.pth --network small_cnn", "no such file"),
        ("--backbone timm:resnet10t --network timm:resnet10t", "put them at"),
        ("--backbone {root}/weights.pt --network small_cnn", "not of this network"),
        ("--backbone {root}/weights.pt --image-size 16", "too small"),
        ("--backbone {root}/test", "recipe.json"),
        ("--backbone {root}/weights.pt --weights {root}/weights.pt", "leave one out"),
        ("--backbone {root}/weights.pt --dropout 0.5", "noise"),
        ("--backbone {root}/weights.pt --grey True", "takes color pictures"),
        ("--backbone none --tuning head", "expected --backbone beside it"),
        ("--backbone {root}/test/red/red-0.png", "read"),
    ):
        error = metapl(*command(f"{IMAGES} uda {more}", root, tmp_path / "run"), code=2).stderr
        assert word in " ".join(error.split())
        assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("from_backbone", [True, False])
def test_the_control_is_that_of_a_script_of_ten_lines(
    from_backbone: bool, root: Path, tmp_path: Path
) -> None:
    hard = Path(shutil.copytree(root / "test", tmp_path / "test"))
    given = ("--backbone", root / "weights.pt")
    for file in sorted(hard.rglob("*.png"))[::4]:  # the colors of the other class
        Image.merge("RGB", Image.open(file).split()[::-1]).save(file)
    metapl(
        *command(
            f"{IMAGES} supervised",
            root,
            tmp_path / "run",
            "--test",
            hard,
            *given[: 2 * from_backbone],
        )
    )

    network: Any = create("pooled_cnn", 10, image_size=SIDE, weights=root / "weights.pt").eval()
    network.head = nn.Identity()
    mean, std = torch.tensor(backbone.IMAGENET).view(2, 1, 3, 1, 1)

    def table(folder: Path) -> tuple[Any, list[str]]:
        files = sorted(folder.rglob("*.png"))
        pictures = torch.stack([pil_to_tensor(Image.open(file)) for file in files]) / 255
        with torch.no_grad():
            x = (
                network((pictures - mean) / std)
                if from_backbone
                else nn.functional.avg_pool2d(pictures, 2)
            )
        return x.flatten(1).double().numpy(), [file.parent.name for file in files]

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
        *table(root / "labeled")
    )
    found = result(tmp_path / "run")
    assert found["control_accuracy"] == pytest.approx(fitted.score(*table(hard)))
    assert ("backbone" in found["control_of"]) == from_backbone
    assert 0.5 < found["control_accuracy"] < 1


def test_the_control_has_a_picture_of_each_class_however_rare_and_a_run_behind_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backbone, "CONTROL_PICTURES", 4)
    labels = torch.arange(40) % 2
    labels[7] = 2
    images = MemoryImages(torch.randint(0, 256, (40, 3, SIDE, SIDE), dtype=torch.uint8))
    data: Any = SimpleNamespace(labeled=SimpleNamespace(images=images, labels=labels))
    assert [*backbone.Control.of(tuned("head"), data).regression.classes_] == [0, 1, 2]
    content = {"networks": {"student": "network"}, "delivered": "student", "delivered_by": "rule"}
    content |= {
        "validation_accuracy": 0.8,
        "validation_size": 50,
        "student_validation_accuracy": 0.8,
    }
    content |= {"validation_chance": 0.1, "control_of": "pixels"}
    for control, behind in ((0.5, False), (0.9, True)):
        lines = " ".join(summary({**content, "control_accuracy": control}))
        assert f"{100 * control:.1f}" in lines
        assert ("behind" in lines) == behind
