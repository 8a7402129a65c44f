"""What `metapl train images` chooses for itself: sizes, rates, views, schedules, and FixMatch among its methods."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, result, said
from flat import known, made

from metapl import UDA, CrossEntropy, LossTrainer
from metapl.apps.commands import main
from metapl.apps.commands.parse import parse
from metapl.apps.commands.train import COMMANDS
from metapl.apps.experiments.experiment import Experiment
from metapl.apps.experiments.folder import RunFolder
from metapl.apps.experiments.settle import Colors, Look, chosen, fitted
from metapl.apps.pictures import Affine, Chain, Color, Flip, Hole, Recolor, Sometimes, View
from metapl.apps.pictures.store import MemoryImages
from metapl.apps.pictures.views.base import Identity
from metapl.apps.pictures.views.transforms import ResizedCrop, Weak
from metapl.apps.recipes import Digits, ImageFolders
from metapl.apps.recipes.base import Task
from metapl.apps.recipes.image_folders import (
    CLIPPED,
    FINETUNED_ON_CHANGED,
    HUE,
    NOT_CLIPPED,
    OTHER_RATE,
    PRETRAINED_RATE,
    RAMP,
    RATES,
    START,
    WAIT,
    WARMUP,
    Changes,
)
from metapl.apps.recipes.image_recipe import ImageParts, Strong
from metapl.apps.recipes.methods import COMPARED, CONTROLS, METHODS, title
from metapl.apps.recipes.settings import SGD_RATE, OpenOptimizer, Optimizer, SelfTraining
from metapl.errors import MetaplError
from metapl.runs.rows import Metrics

METHODS_OF_IMAGES = ("uda", "fixmatch", "mpl", "none", "supervised", "pseudo_labels")
SIZED: dict[str, Any] = {
    "image_size": 32,
    "grey": False,
    "network_name": "pooled_cnn",
    "precision": "float32",
    "val_fraction": 0.0,
    "mean": (0.5,) * 3,
    "uda_prior": (0.25, 0.25, 0.5),
    "std": (0.25,) * 3,
    "class_names": ("a", "b", "c"),
}
"""What a look at the pictures decides."""


def recipe(method: str = "mpl", **fields: Any) -> Any:
    """By a method, of the fields that it or the recipe has."""
    given = {"labeled": "labeled", "unlabeled": "unlabeled", **fields}
    return made(ImageFolders, method, **known(ImageFolders, method, given))


# ----------------------------------------------------------------------------------------------------------- the rates


@pytest.mark.parametrize(
    ("network", "rate", "clip"),
    [
        ("pooled_cnn", RATES["pooled_cnn"], NOT_CLIPPED),
        ("small_cnn", RATES["small_cnn"], NOT_CLIPPED),
        ("wide_resnet28_2", RATES["wide_resnet"], CLIPPED),
        ("resnet18", RATES["resnet"], CLIPPED),
        ("efficientnet_b0_svhn", RATES["efficientnet"], CLIPPED),
        ("vit_b_16", RATES["vit"], CLIPPED),
        ("timm:resnet18", OTHER_RATE, CLIPPED),
        ("timm:vit_tiny_patch16_224", OTHER_RATE, CLIPPED),
    ],
)
def test_the_rates_are_those_of_the_networks_family(network: str, rate: float, clip: float) -> None:
    found = recipe().for_network(network)
    for one in (found.method.student, found.method.teacher):
        assert one == OpenOptimizer(lr=rate)
    assert found.clip_norm == clip
    pretrained = recipe(weights="file.pt").for_network(network)
    assert (pretrained.method.student.lr, pretrained.method.teacher.lr) == (PRETRAINED_RATE,) * 2


def test_the_default_network_has_the_greatest_rate() -> None:
    assert RATES["pooled_cnn"] > max(rate for name, rate in RATES.items() if name != "pooled_cnn")


def test_what_was_asked_for_of_an_optimizer_is_kept() -> None:
    own = OpenOptimizer(lr=0.002)
    found = recipe(student=own, clip_norm=3.0).for_network("resnet18")
    assert (found.method.student, found.method.teacher.lr, found.clip_norm) == (own, RATES["resnet"], 3.0)
    decayed = recipe(student=OpenOptimizer(weight_decay=0.3)).for_network("resnet18").method.student
    assert (decayed.weight_decay, decayed.lr) == (0.3, RATES["resnet"]), "another decay is not another rate"
    plain = Optimizer(algorithm="sgd", lr=0.3)
    assert recipe(student=plain).for_network("resnet18").method.student == plain
    assert recipe(student=OpenOptimizer(algorithm="sgd")).for_network("resnet18").method.student.lr == SGD_RATE


@pytest.mark.parametrize("rate", sorted({*RATES.values(), OTHER_RATE}))
def test_a_rate_that_was_given_counts_whatever_it_is(rate: float) -> None:
    """That of another network's default too, and from the command line."""
    found = recipe(student=OpenOptimizer(lr=rate), teacher=OpenOptimizer(lr=rate)).for_network("timm:any")
    assert (found.method.student.lr, found.method.teacher.lr) == (rate, rate)
    folders = ("--labeled", "labeled", "--unlabeled", "unlabeled")
    words = [*folders, "--method", "mpl", "--teacher.lr", str(rate)]
    given = parse(*COMMANDS["images"].given(words, "metapl train images"), words).recipe
    settled = given.for_network("vit_b_16")
    assert (settled.method.teacher.lr, settled.method.student.lr) == (rate, RATES["vit"])


@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay"])
def test_an_optimizer_without_a_rate_is_checked_too(field: str) -> None:
    with pytest.raises(MetaplError, match=f"{field}=-1"):
        OpenOptimizer(**{"algorithm": "sgd", field: -1})  # type: ignore[arg-type]  # its values are of several types


def test_clipping_can_be_left_out_and_the_settled_recipe_says_so() -> None:
    found = recipe(**SIZED, clip_norm=0).for_network("resnet18").scheduled(20)
    assert (found.clip_norm, found.trainer_options()["clip_norm"]) == (0, None)
    assert found.for_network("resnet18") == found
    clipped = recipe(**SIZED).for_network("resnet18").trainer_options()["clip_norm"]
    assert (clipped, recipe(**SIZED).for_network("small_cnn").trainer_options()["clip_norm"]) == (CLIPPED, None)
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(MetaplError, match=r"clip_norm="):
            recipe(clip_norm=wrong)


def test_a_settled_recipe_stays_as_it_is_when_it_is_settled_again() -> None:
    once = recipe(**SIZED).for_network("vit_b_16")
    assert once.for_network("vit_b_16") == once


# ------------------------------------------------------------------------------------------------- a look at pictures


def look(side: int = 28, grey: bool = False, tell: bool = False, light: float = 0.5) -> Look:
    mean, std = ((0.3,), (0.2,)) if grey else ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    colors = Colors(0.5, 0.5, tell)
    return Look(
        side=side, grey=grey, mean=mean, std=std, level=(0.35, 0.15), colors=colors, light=light, shares=(0.25, 0.75)
    )


def fitted_to(seen: Look, **fields: Any) -> ImageFolders:
    return fitted(recipe(val="val", **fields), seen)


@pytest.mark.parametrize(
    ("side", "brought_to"), [(8, 16), (16, 16), (20, 20), (25, 24), (27, 28), (32, 32), (48, 48), (96, 48), (4000, 48)]
)
def test_pictures_are_brought_to_a_side_that_a_processor_can_train_on(side: int, brought_to: int) -> None:
    found = fitted_to(look(side))
    assert (found.image_size, found.network_name) == (brought_to, "pooled_cnn")
    assert found.method.student.lr == RATES["pooled_cnn"]


def test_grey_pictures_are_read_as_such_and_colors_where_they_are() -> None:
    grey, color = fitted_to(look(grey=True)), fitted_to(look())
    assert (grey.grey, grey.mean, grey.std) == (True, (0.35,), (0.15,))
    assert (color.grey, color.mean, color.std) == (False, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    forced = fitted_to(look(grey=True), grey=False)
    assert (forced.grey, forced.mean, forced.std) == (False, (0.3,) * 3, (0.2,) * 3)
    without = fitted_to(look(), grey=True)
    assert (without.grey, without.mean, without.std) == (True, (0.35,), (0.15,))


def test_the_labels_are_spread_like_those_that_were_given() -> None:
    assert fitted_to(look()).method.uda_prior == (0.25, 0.75)
    assert fitted_to(look(), uda_prior=(0.5, 0.5)).method.uda_prior == (0.5, 0.5)


@pytest.mark.parametrize(("light", "exchanged"), [(0.0, False), (0.1, False), (0.3, True), (0.8, True), (1.0, False)])
def test_light_and_dark_are_exchanged_where_both_are_usual(light: float, exchanged: bool) -> None:
    assert fitted_to(look(grey=True, light=light)).changes.recolor == exchanged
    assert fitted_to(look(light=light)).changes.recolor, "colors are another question"
    assert not fitted_to(look(grey=True, light=light, tell=True)).changes.recolor


@pytest.mark.parametrize("tell", [True, False])
def test_colors_are_exchanged_where_they_tell_nothing(tell: bool) -> None:
    found = fitted_to(look(tell=tell)).changes
    assert (found.recolor, found.hue) == (not tell, 0.0 if tell else HUE)
    for asked in (True, False):
        found = fitted_to(look(tell=tell), changes=Changes(recolor=asked)).changes
        assert (found.recolor, found.hue) == (asked, HUE if asked else 0.0)
        assert fitted_to(look(tell=tell), changes=Changes(recolor=asked, hue=0.3)).changes.hue == 0.3


def test_pretrained_weights_bring_their_own_size_and_normalization() -> None:
    found = fitted_to(look(grey=True), weights="file.pt")
    assert (found.network_name, found.image_size, found.grey) == ("resnet18", 128, False)
    assert found.mean == (0.485, 0.456, 0.406)
    assert (found.method.student.lr, found.clip_norm) == (PRETRAINED_RATE, CLIPPED)


# ------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("method", METHODS_OF_IMAGES)
def test_shares_of_the_steps(method: Any) -> None:
    found = recipe(**SIZED, method=method).scheduled(1000)
    assert (found.steps, found.validate_every) == (1000, 50)
    shares = {"wait": WAIT, "uda_start": START, "uda_ramp": RAMP}
    own = {name: share for name, share in shares.items() if hasattr(found.method, name)}
    assert {"mpl": 3, "none": 3, "uda": 2, "fixmatch": 2}.get(method, 0) == len(own)
    assert all(getattr(found.method, name) == 1000 * share for name, share in own.items())
    assert found.warmup == 1000 * WARMUP
    of_fit = {**found.fit_options(), **found.method.options(found)}
    of_student = 1000 * (1 - WAIT) if method in ("mpl", "none") else 1000
    assert of_fit["warmup"] == round(WARMUP * of_student), "a student that waits has fewer steps"
    given = {"wait": 7, "uda_start": 3, "uda_ramp": 0}
    kept = recipe(**SIZED, **given, method=method, warmup=0, validate_every=9).scheduled(1000)
    assert (kept.warmup, kept.validate_every) == (0, 9)
    assert all(getattr(kept.method, name) == given[name] for name in own)


@pytest.mark.parametrize("method", METHODS_OF_IMAGES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 19, 86])
def test_few_steps_are_a_schedule_too(steps: int, method: Any) -> None:
    """The recipe checks itself when it is complete."""
    found = recipe(**SIZED, method=method).scheduled(steps)
    assert found.complete
    own = found.method
    assert 0 <= getattr(own, "wait", 0) < steps
    assert found.validate_every >= 1
    if not hasattr(own, "uda"):
        return
    uda = own.uda()
    assert uda.start + uda.ramp <= steps
    assert (uda.start, uda.ramp) == (own.uda_start, own.uda_ramp)
    if method != "fixmatch":
        assert (uda.align, uda.prior) == (own.uda_align, own.uda_prior)


def test_what_was_chosen_is_one_line() -> None:
    plain = recipe(**SIZED, changes=Changes(recolor=False)).for_network("pooled_cnn").scheduled(4400)
    assert chosen(plain) == (
        f"chosen: pooled_cnn on 32x32 color pictures, colors kept, not mirrored; adamw at {RATES['pooled_cnn']:g}, "
        "float32, 4,400 steps"
    )
    other = {**SIZED, "grey": True, "precision": "bfloat16", "image_size": 20, "mean": (0.5,), "std": (0.5,)}
    changed = recipe(**other, changes=Changes(recolor=True, mirror=True)).for_network("resnet18").scheduled(86)
    told = (
        f"on 20x20 grey pictures, light and dark exchanged, mirrored; adamw at {RATES['resnet']:g}, bfloat16, 86 steps"
    )
    assert told in chosen(changed)
    rounds = SelfTraining(networks=("small_cnn", "pooled_cnn"))
    of_rounds = plain.by("noisy_student").with_method(self_training=rounds)
    assert chosen(of_rounds).startswith("chosen: small_cnn, then pooled_cnn on")


@pytest.mark.parametrize(
    ("side", "square", "lost"),
    [
        (32, True, "pictures, colors"),
        (24, True, "pictures, colors"),
        (640, True, "pictures (shrunk from about 640), colors"),
        (32, False, "pictures (cut to squares), colors"),
        (640, False, "pictures (cut to squares, shrunk from about 640), colors"),
    ],
)
def test_the_line_says_what_pictures_lose(side: int, square: bool, lost: str) -> None:
    one = recipe(**SIZED, changes=Changes(recolor=False)).for_network("pooled_cnn").scheduled(4400)
    assert f"on 32x32 color {lost} kept" in chosen(one, dataclasses.replace(look(side), square=square))


def test_the_line_says_what_randaugment_does() -> None:
    changes = Changes(recolor=True, mirror=False)
    pillow = recipe(**SIZED, randaugment=True, changes=changes).for_network("pooled_cnn").scheduled(10)
    assert "color pictures, changed by RandAugment, mirrored (not with --strong.writing); adamw" in chosen(pillow)
    assert "exchanged" not in chosen(pillow), "RandAugment comes instead of --changes"
    writing = dataclasses.replace(pillow, strong=Strong(writing=True))
    assert "color pictures, changed by RandAugment, not mirrored; adamw" in chosen(writing)
    flips = [isinstance(one.views().weak, Weak) and one.views().weak.flip for one in (pillow, writing)]
    assert flips == [True, False]


@pytest.mark.parametrize(("method", "rate"), [("uda", 0.3), ("supervised", 0.3), ("mpl", 0.2), ("pseudo_labels", 0.2)])
def test_what_was_chosen_has_the_rate_of_the_optimizer_that_is_used(method: Any, rate: float) -> None:
    """One network has the teacher's."""
    optimizers = {"teacher": OpenOptimizer(lr=0.3), "student": OpenOptimizer(lr=0.2)}
    assert f"adamw at {rate}," in chosen(recipe(**SIZED, method=method, **optimizers).scheduled(20))


def test_a_recipe_of_a_comparison_is_that_of_each_of_its_methods() -> None:
    alone = recipe(**SIZED, method="mpl").for_network("pooled_cnn").scheduled(1000)
    compared = recipe(**SIZED, method="uda").for_network("pooled_cnn").scheduled(1000)
    assert compared.by("mpl") == alone


# ---------------------------------------------------------------------------------------------------------- the views

CHANGES: dict[str, Any] = {"degrees": 20, "translate": 0.2, "zoom": 1.5, "shear": 8, "hole": 0.5}
CHANGES |= {"brightness": 0.1, "contrast": 0.2, "saturation": 0.3, "hue": 0.4}
COLOR, HOLE = Color(0.1, 0.2, 0.3, 0.4), Hole((0.1, 0.5))
STRONG_MOVE = Affine(20.0, 0.2, (1 / 1.5, 1.5), 8.0)
WEAK_MOVE = Affine(5.0, 0.05, (1.5**-0.25, 1.5**0.25), 2.0)


def same(found: View, expected: tuple[View, ...]) -> bool:
    """Whether a chain is of these views, but for rounding."""
    assert isinstance(found, Chain)
    return [_rounded(one) for one in found.views] == [_rounded(one) for one in expected]


def _rounded(view: View) -> Any:
    if not isinstance(view, Affine):
        return view
    return dataclasses.replace(view, scale=tuple(round(value, 12) for value in view.scale))


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("recolor", [True, False, None])
def test_the_weak_view_moves_a_little_and_the_strong_one_changes_everything(recolor: bool | None, mirror: bool) -> None:
    flip, other = (Flip(),) * mirror, (Recolor(),) * bool(recolor)
    one = recipe(changes=Changes(**CHANGES, mirror=mirror, recolor=recolor), image_size=24)
    found = one.views()
    assert same(found.weak, (*flip, WEAK_MOVE))
    assert same(found.strong, (*flip, STRONG_MOVE, COLOR, HOLE, *other))
    assert found.labeled == found.strong
    assert found.finetuned == Sometimes(found.strong, FINETUNED_ON_CHANGED)
    assert found.crop is None
    cropped = dataclasses.replace(one, resized_crop=True).views()
    assert cropped.weak == Identity()
    assert cropped.crop == ResizedCrop(24, flip=mirror)
    assert same(cropped.strong, (COLOR, HOLE, *other))
    assert cropped.labeled == cropped.strong
    assert cropped.finetuned is None


def test_finetuning_sees_a_half_of_the_labelled_pictures_as_they_are() -> None:
    images = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8)
    few = MemoryImages(images)
    made = recipe(image_size=24, labeled_batch=40).for_network("pooled_cnn").scheduled(10)
    sources = made.batches(ImageParts(few=few, labels=torch.arange(40) % 2, many=few))
    as_they_are = {picture.numpy().tobytes() for picture in images.float() / 255}

    def unchanged(source: str) -> float:
        pictures = torch.cat([sources[source][step][0] for step in range(10)])
        return sum(picture.numpy().tobytes() in as_they_are for picture in pictures) / len(pictures)

    assert unchanged("labeled") == 0.0
    assert 0.4 < unchanged("finetuning") < 0.6


def test_the_views_leave_pictures_in_their_range_and_only_mirroring_mirrors() -> None:
    images, given = torch.rand(32, 3, 12, 12), {"seed": 0, "step": 0, "examples": torch.arange(32)}
    still = Changes(degrees=0, translate=0, zoom=1, shear=0, brightness=0, contrast=0, saturation=0, hue=0, hole=0)
    assert torch.equal(still.strong()(images, **given), images)
    assert torch.equal(still.weak()(images, **given), images)
    mirrored = dataclasses.replace(still, mirror=True).weak()(images, **given)
    turned = [torch.equal(one, image.flip(2)) for one, image in zip(mirrored, images, strict=True)]
    assert 8 < sum(turned) < 24
    strong = Changes(mirror=True, recolor=True).strong()(images, **given)
    assert strong.min() >= 0
    assert strong.max() <= 1


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("degrees", (-1.0, 181.0, math.nan)),
        ("translate", (-0.1, math.inf)),
        ("zoom", (0.9, math.nan, math.inf)),
        ("shear", (-1.0, 90.0)),
        ("brightness", (-0.1,)),
        ("contrast", (math.inf,)),
        ("saturation", (-1.0,)),
        ("hue", (-0.1, 0.6)),
    ],
)
def test_changes_out_of_range_are_refused(field: str, values: tuple[float, ...]) -> None:
    named = {"zoom": "zoom|scale"}.get(field, field)
    for value in values:
        with pytest.raises(MetaplError, match=named):
            Changes(**{field: value})


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_hole_out_of_range_is_refused_by_its_own_name(value: float) -> None:
    with pytest.raises(MetaplError, match=r"Changes\(hole="):
        Changes(hole=value)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"uda_align": 1.5}, r"uda_align=1\.5.*\[0, 1\]"),
        ({"uda_start": -1}, "uda_start=-1"),
        ({"uda_temperature": -0.5}, r"uda_temperature=-0\.5.*0 or more"),
        ({"uda_threshold": 1.0}, r"uda_threshold=1\.0.*\[0, 1\)"),
        ({"uda_ramp": -3}, "uda_ramp=-3"),
    ],
)
def test_uda_out_of_range_is_refused_when_the_recipe_is_made(field: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        recipe(**field)


# ------------------------------------------------------------------------------------------------------------ FixMatch


def noise_task(one: ImageFolders, count: int = 24) -> Task:
    """Pictures of noise that get darker from class to class, with three classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    shape = (count, 3, one.image_size, one.image_size)
    levels = torch.randint(0, 80, shape, generator=generator) + 60 * labels[:, None, None, None]
    images = MemoryImages(levels.to(torch.uint8))
    return Task(**one.batches(ImageParts(few=images, labels=labels, many=images)), classes=one.classes, record={})


def trained(one: ImageFolders, method: str, folder: Path) -> tuple[LossTrainer, list[Mapping[str, Any]]]:
    """The trainer afterwards, and the rows of its metrics."""
    torch.manual_seed(0)
    run = Experiment(one, RunFolder(folder), progress=False, say=lambda text: None)
    trainer = dataclasses.replace(run, recipe=one.by(method)).train(noise_task(one)).trainer
    assert isinstance(trainer, LossTrainer)
    return trainer, Metrics(folder / "metrics.jsonl").rows("fit")


def test_fixmatch_trains_one_network_on_hard_labels(tmp_path: Path) -> None:
    small = {"image_size": 8, "labeled_batch": 6, "unlabeled_batch": 6, "log_every": 1, "uda_weight": 2.0}
    small |= {"uda_align": 0.3, "label_smoothing": 0.1}
    one = recipe(**SIZED | small, method="fixmatch", uda_start=2, uda_ramp=2).for_network("pooled_cnn").scheduled(6)
    trainer, rows = trained(one, "fixmatch", tmp_path)
    supervised, uda = trainer.losses
    assert supervised == CrossEntropy(0.1)
    assert uda == UDA(temperature=0.0, threshold=0.85, weight=2.0, ramp=2, start=2)  # nothing is aligned
    assert trainer.teacher is None
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert rows[0]["loss_uda"] == rows[2]["loss_uda"] == 0


def test_fixmatch_is_a_method_like_the_others() -> None:
    assert METHODS["fixmatch"].built_as == "teacher"
    assert title("fixmatch") == "FixMatch alone"
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_the_methods_of_a_comparison() -> None:
    assert COMPARED == ("mpl", "none", "supervised", "pseudo_labels", "uda")
    assert CONTROLS == ("permuted", "class_means", "random_sign")
    assert [name for name, method in METHODS.items() if method.name != name] == []
    assert [name for name, method in METHODS.items() if method.teaches] == ["mpl", "none", *CONTROLS]
    finetuned = {name for name, method in METHODS.items() if method.delivers == "finetuned"}
    # All but the controls and what is told the true labels: rivals are finetuned as the default is.
    assert finetuned == METHODS.keys() - {*CONTROLS, "supervised_everything"}


@pytest.mark.parametrize("name", [Digits.name, ImageFolders.name])
def test_the_help_lists_every_method(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", name, "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert f"with --compare: these methods alone, of {', '.join(METHODS)}." in told


def test_fixmatch_is_compared_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--steps", "2", "--finetune-steps", "0", "--labels-per-class", "2", "--hidden", "4")
    compared = ("train", "digits", "--compare", "--jobs", "1", "--methods", "fixmatch", *small)
    told = said(capsys, *compared, "--out", tmp_path / "run")
    assert "FixMatch alone" in told
    assert result(tmp_path / "run" / "fixmatch" / "seed-0")["method"] == "fixmatch"
    wrong = refused(capsys, "train", "digits", "--compare", "--methods", "fixmacht", "--out", tmp_path / "other")
    assert "invalid choice 'fixmacht' for argument '--methods'. Expected one of (" in wrong


# ----------------------------------------------------------------------------------------------- networks from nothing


@pytest.mark.slow
@pytest.mark.parametrize("network", [pytest.param("resnet18", marks=pytest.mark.long), "efficientnet_b0"])
def test_other_networks_do_not_diverge_at_the_start(network: str, tmp_path: Path) -> None:
    small = {"network_name": network, "labeled_batch": 4, "unlabeled_batch": 4, "log_every": 1}
    one = recipe(**SIZED | small).for_network(network).scheduled(20)
    _, rows = trained(one, "uda", tmp_path)
    losses = [row["loss"] for row in rows]
    assert len(losses) == 20
    assert max(losses) < 10, losses  # guessing evenly among three classes costs 1.1
