"""What pictures show decides settings that were left open; the steps that fit a time, the rest."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_runs import color_folders

from metapl import MetaplError
from metapl.apps import images, look
from metapl.apps.images import HUE, OTHER_RATE, RATES, TUNING_RATES, Images, Pictures
from metapl.apps.look import (
    UNLABELED,
    Look,
    choose_settings,
    colors_tell,
    fitted,
    steps_within,
    tell_choices,
    with_steps,
)
from metapl.apps.measured import LEARNED
from metapl.apps.pace import SHARE, Part, Timetable
from metapl.apps.rounds import METHODS
from metapl.apps.settings import flag_values, with_flags
from metapl.apps.train import COUNTED
from metapl.data import draws
from metapl.problems.losses import UDA

LEVELS = np.random.default_rng(0)


def config(**fields: Any) -> Any:
    return with_flags(Images(labeled="few", unlabeled="many"), **fields)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folders(tmp_path_factory.mktemp("colors"), side=130)


def given(root: Path, **fields: Any) -> Any:
    folders = {"labeled": str(root / "labeled"), "unlabeled": str(root / "unlabeled")}
    return config(**{**folders, "steps": 40, **fields})


def write(folder: Path, kind: str, count: int, side: tuple[int, int] = (12, 10)) -> list[Path]:
    """Write noise in colors or grey, or light or dark spots on an even ground."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        levels = LEVELS.integers(0, 256, (*side, 3))
        if kind == "grey":
            levels[...] = levels[..., :1]
        if kind in ("light", "dark"):
            levels[...] = 128
            levels[5, 5] = 255 if kind == "light" else 0
        Image.fromarray(levels.astype("uint8")).save(folder / f"{kind}-{number}.png")
    return sorted(folder.glob(f"{kind}-*.png"))


def test_grey_pictures_sides_means_and_light_marks_are_seen(tmp_path: Path) -> None:
    color, grey = (write(tmp_path, kind, 6) for kind in ("color", "grey"))
    seen = look.look(color, torch.arange(6) % 2, grey)
    assert (seen.grey, len(seen.mean), seen.side, seen.square) == (False, 3, 10, False)
    assert all(0.4 < value < 0.6 for value in (*seen.mean, seen.level[0]))
    seen = look.look(grey, torch.arange(6) % 2, [])
    assert (seen.grey, len(seen.mean), len(seen.std)) == (True, 1, 1)
    assert look.look(write(tmp_path, "wide", 3, (8, 8)), torch.tensor([0, 1, 1]), []).square
    for kinds, share in ((("light",), 1.0), (("dark",), 0.0), (("light", "dark"), 0.5)):
        seen = look.look(
            [f for kind in kinds for f in write(tmp_path, kind, 4)],
            torch.arange(4 * len(kinds)) % 2,
            [],
        )
        assert (seen.light, seen.exchangeable) == (share, 0 < share < 1)
    # Which is passed over; a class without a picture has a share.
    color[0].write_bytes(b"no picture")
    assert look.look(color[:4], torch.tensor([0, 0, 0, 2]), color).shares == (4 / 7, 1 / 7, 2 / 7)
    with pytest.raises(MetaplError, match="none"):
        look.look(color[:1], torch.tensor([0]), color)


@pytest.mark.parametrize("sizes", [(10, 10), (40, 4), (6, 6, 6, 6)])
def test_colors_tell_classes_apart_where_each_has_its_own_and_else_hardly_ever(
    sizes: tuple[int, ...],
) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    own = torch.nn.functional.one_hot(labels, 4)[:, :3].float() + 0.1 * torch.randn(
        len(labels), 3, generator=generator
    )
    found = colors_tell(own, labels)
    assert found
    told = [colors_tell(torch.rand(len(labels), 3, generator=generator), labels) for _ in range(5)]
    assert sum(told) <= 1
    # Beside the mean of its own class, in which it is left out, each of these is nearer to the
    # other.
    assert not colors_tell(torch.tensor([[0.0], [10.0], [1.0], [11.0]]), torch.tensor([0, 0, 1, 1]))


def test_letters_do_not_look_like_their_mirror_images_and_what_faces_both_ways_does() -> None:
    """Any 200 pictures say the same, of which 100 are labeled; fewer say nothing."""
    digits = load_digits()
    pictures = torch.from_numpy(digits.images).float()[:, None] / 16
    pictures = torch.nn.functional.interpolate(pictures, (32, 32), mode="bilinear")[:, 0]
    labels = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    for draw in range(30):
        rows = torch.randperm(len(pictures), generator=generator)[:200]
        is_turned = torch.rand(200, 1, 1, generator=generator) < 0.5
        chosen_pictures = pictures[rows]
        turned = torch.where(is_turned, chosen_pictures.flip(2), chosen_pictures)
        chosen_labels = labels[rows]
        chosen_labels[100 + 10 * (draw % 11) :] = UNLABELED
        assert look.mirrors(chosen_pictures, chosen_pictures.abs(), chosen_labels) is False, draw
        assert look.mirrors(turned, turned.abs(), chosen_labels) is True, draw
        chosen_labels[99:] = UNLABELED
        assert look.mirrors(turned, turned.abs(), chosen_labels) is None
        assert look.mirrors(turned[:199], turned[:199].abs(), labels[rows[:199]]) is None


def test_whether_pictures_are_mirrored_is_said_with_a_way_out() -> None:
    for mirrors, expected in (
        (True, "mirrored (--mirror False where classes mirror each other), mild changes;"),
        (None, "not mirrored (too few pictures to tell; --mirror True), mild changes;"),
        (False, "not mirrored, mild changes;"),
    ):
        look_at_few = seen(mirrors=mirrors)
        settings = fitted(config(classes=("a", "b"), steps=9, augment="mild"), look_at_few, 0.0)
        assert settings.pictures.mirror is bool(mirrors)
        said: list[str] = []
        tell_choices(settings, images.METHODS["supervised"], look_at_few, said.append)
        assert expected in said[0]


def seen(
    side: int = 28, grey: bool = False, tell: bool = False, light: float = 0.5, **more: Any
) -> Look:
    mean, std = ((0.3,), (0.2,)) if grey else ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    given: Any = {
        "mean": mean,
        "std": std,
        "level": (0.35, 0.15),
        "colors_tell": tell,
        "shares": (0.25, 0.75),
        "patches": tuple(torch.eye(12).flatten().tolist()),
    }
    return Look(side=side, grey=grey, light=light, **{**given, **more})


def chosen(of: Look, **fields: Any) -> Pictures:
    found: Pictures = fitted(config(**fields), of, 0.0).pictures
    return found


def test_pictures_are_brought_to_a_side_that_a_processor_can_train_on_grey_ones_as_such() -> None:
    for side, brought_to, network in (
        *((8, 16, "pooled_cnn"), (25, 24, "pooled_cnn"), (27, 28, "pooled_cnn")),
        *((28, 28, "airbench_small"), (48, 48, "airbench_small"), (64, 48, "airbench_small")),
        (4000, 48, "pooled_cnn"),
    ):
        found = chosen(seen(side))
        assert (found.image_size, found.network) == (brought_to, network)
    for of, given, channels, mean, std in (
        (seen(grey=True), None, 1, (0.35,), (0.15,)),
        (seen(), None, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        (seen(grey=True), False, 3, (0.3,) * 3, (0.2,) * 3),
        (seen(), True, 1, (0.35,), (0.15,)),
    ):
        found = chosen(of, grey=given)
        assert (found.input.channels, found.mean, found.std) == (channels, mean, std)


def test_colors_of_the_edges_tell_classes_apart_too(tmp_path: Path) -> None:
    """Photographs of a class lie on sky or on water, with objects of any color before it."""
    labels = torch.arange(24) % 2
    for number, label in enumerate(labels.tolist()):
        levels = np.full((16, 16, 3), LEVELS.integers(0, 256, 3))
        levels[-4:] = (40, 160, 60) if label else (60, 90, 200)
        Image.fromarray(levels.astype("uint8")).save(tmp_path / f"{number:02}.png")
    pictures = sorted(tmp_path.glob("*.png"))
    assert look.look(pictures, labels, []).colors_tell
    assert not look.look(pictures, (torch.arange(24) // 2) % 2, []).colors_tell


def test_colors_are_exchanged_where_they_tell_nothing_and_what_was_given_stays() -> None:
    assert chosen(seen(grey=True, light=0.05)).recolor is False
    for tell in (True, False):
        assert chosen(seen(tell=tell)).recolor == (not tell)
        for asked in (True, False):
            found = chosen(seen(tell=tell), recolor=asked)
            assert found.recolor == (f"hue={HUE}" in repr(found.views().strong)) == asked


@pytest.mark.parametrize("network", ["airbench_small", "pooled_cnn"])
def test_colors_of_labeled_pictures_are_exchanged_as_is_said(network: str) -> None:
    count = 400
    images = torch.tensor([0.9, 0.5, 0.1])[:, None, None].expand(count, 3, 32, 32)
    where: dict[str, Any] = {"seed": 7, "step": 3, "examples": torch.arange(count)}
    for recolor in (False, True):
        pictures = chosen(seen(32), network=network, recolor=recolor)
        changed = pictures.views().labeled(images, **where)
        still_red = int((changed.mean((2, 3)).argmax(1) == 0).sum())
        # A quarter is not exchanged, and of the others a third ends red.
        assert 160 < still_red < 240 if recolor else still_red == count


@pytest.mark.parametrize("mirror", [False, True])
def test_a_quarter_of_the_labeled_pictures_is_changed_mildly(*, mirror: bool) -> None:
    options: dict[str, Any] = {"network": "pooled_cnn", "mirror": mirror}
    mild = chosen(seen(28), augment="mild", **options).views()
    strong = chosen(seen(28), augment="strong", **options).views()
    count = 400
    images = torch.rand(1, 3, 28, 28).expand(count, -1, -1, -1)
    where: dict[str, Any] = {"seed": 7, "step": 3, "examples": torch.arange(count)}
    # What is changed otherwise draws by a seed of its own.
    mildly = mild.labeled(images, **{**where, "seed": draws.fold_in(7, 1)})
    is_mild = (strong.labeled(images, **where) == mildly).flatten(1).all(1)
    # 300 of 400 are expected to be changed strongly, with a standard deviation of 9.
    assert 70 < int(is_mild.sum()) < 130
    # Unlabeled pictures are all changed.
    assert not (strong.strong(images, **where) == images).flatten(1).all(1).any()


def test_a_network_is_whitened_by_the_pictures_that_were_seen(tmp_path: Path) -> None:
    """Half of what leaves the first layer is uncorrelated, of variance 1; the rest is minus it."""
    files = [*write(tmp_path, "color", 8, (32, 32)), *write(tmp_path, "grey", 8, (32, 32))]
    for paths, grey in ((files, False), (files, True), (files[8:], False), (files[8:], True)):
        of = look.look(paths, torch.arange(len(paths)) % 2, [])
        settings = fitted(config(classes=("a", "b"), grey=grey), of, 0.0)
        network: Any = settings.network()
        assert not network.module.whitening.weight.requires_grad
        pictures = settings.pictures.images(map(str, paths), None).fetch(torch.arange(len(paths)))
        with torch.no_grad():
            whitened = network.module.whitening((pictures[0] / 255 - network.mean) / network.std)
        values = whitened.double().movedim(1, 0).flatten(1)
        half = len(values) // 2
        assert torch.equal(values[half:], -values[:half])
        covariance = torch.cov(values[:half])
        # Three equal channels vary in a third of the directions alone.
        varies = covariance.diagonal() > 0.5
        assert int(varies.sum()) == (4 if of.grey or grey else 12)
        expected = torch.eye(int(varies.sum()), dtype=torch.float64)
        torch.testing.assert_close(covariance[varies][:, varies], expected, atol=0.05, rtol=0)


def test_the_network_with_two_views_is_mirrored_where_pictures_are_and_others_when_asked() -> None:
    for network, mirrors, asked, is_mirrored, has_two_views in (
        (None, True, None, True, True),
        (None, False, None, False, False),
        (None, True, False, False, False),
        ("pooled_cnn", True, None, False, False),
        ("pooled_cnn", True, True, True, False),
    ):
        settings = fitted(
            config(network=network, mirror=asked, classes=("a", "b")), seen(mirrors=mirrors), 0.0
        )
        assert settings.pictures.mirror == is_mirrored
        built: Any = settings.network()
        assert built.mirrored == settings.card("network").mirrored == has_two_views


def test_pictures_are_smaller_in_the_first_part_of_a_training(root: Path) -> None:
    settings = with_flags(given(root, classes=("blue", "red")), image_size=32)
    settings = fitted(settings, seen(32), 0.0)
    sources = settings.sources(settings.scan("labeled"), settings.scan("unlabeled"), None)
    for step, side in ((0, 24), (23, 24), (24, 32), (39, 32)):
        shapes = [x.shape[2:] for x in (sources["labeled"][step][0], *sources["unlabeled"][step])]
        assert shapes == [(side, side)] * 3
        assert sources["finetuning"][step][0].shape[2:] == (32, 32)


def test_pretrained_weights_bring_their_own_network_size_and_normalization(tmp_path: Path) -> None:
    assert [
        chosen(seen(28), network=f"vit_{name}").image_size for name in ("b_16", "b_32", "h_14")
    ] == [32, 32, 28]
    file = tmp_path / "file.pt"
    torch.save({"weight": torch.zeros(2)}, file)
    found = fitted(config(weights=str(file)), seen(grey=True), 0.0)
    assert (found.pictures.network, found.pictures.image_size, found.pictures.grey) == (
        "resnet18",
        128,
        False,
    )
    assert (found.pictures.mean, found.pictures.std) == look.IMAGENET
    assert found.fitting.lr == TUNING_RATES["all"]
    # Those of the small network are for small pictures, and say what they are behind.
    torch.save({"mean": torch.full((1, 3, 1, 1), 0.4), "std": torch.full((1, 3, 1, 1), 0.3)}, file)
    found = fitted(config(weights=str(file), network="airbench_small"), seen(28), 0.0)
    assert (found.pictures.image_size, found.pictures.recipe.optimizer) == (28, "adamw")
    assert found.pictures.mean == pytest.approx((0.4,) * 3)


def test_the_rates_are_those_of_the_networks_family_or_as_given() -> None:
    for network, rate, clipped in (
        *(("pooled_cnn", RATES["pooled_cnn"], False), ("small_cnn", RATES["small_cnn"], False)),
        ("airbench_small", RATES["airbench"], False),
        *(
            ("resnet18", RATES["resnet"], True),
            ("vit_b_16", RATES["vit"], True),
            ("timm:resnet18", OTHER_RATE, True),
        ),
    ):
        found = fitted(config(network=network), seen(), 0.0)
        assert (found.fitting.lr, found.trainer_options()["clip_norm"] == 1.0) == (rate, clipped)
        own, module = fitted(config(network=network, lr=0.5), seen(), 0.0), torch.nn.Linear(2, 2)
        assert [
            own.optimizer(role, module).param_groups[0]["lr"] for role in ("teacher", "student")
        ] == [0.5, rate]


@pytest.fixture
def _all_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time as many steps on a machine that is busy."""
    monkeypatch.setattr(look, "SECONDS", math.inf)


@pytest.mark.usefixtures("_all_are_timed")
def test_steps_are_as_many_as_fit_into_the_minutes_by_the_clock(tmp_path: Path) -> None:
    """Each look at the clock moves it on by so much; a step is timed by two looks."""
    own: dict[str, Any] = {
        "network": "small_cnn",
        "labeled_batch": 2,
        "unlabeled_batch": 2,
        "image_size": 8,
        "finetune_steps": 0,
    }
    settings = given(color_folders(tmp_path), classes=("blue", "red"), device="cpu", **own)
    settings, state = fitted(with_flags(settings, steps=1000), seen(), 0.0), torch.get_rng_state()
    # The first has (0.85 · 6 - 0.53) / 0.01 steps: timing has taken 53 looks. The second has two
    # phases, and the third no time for a step.
    for name, seconds, minutes, steps in (
        ("supervised", 0.01, 0.1, 460),
        ("pseudo_labels", 0.3, 2.0, 120),
        ("mpl", 60.0, 0.1, 1),
    ):
        method, ticks = images.METHODS[name].scheduled(1000), itertools.count()
        timetable = Timetable(lambda s=seconds, t=ticks: s * next(t), minutes=minutes)
        assert steps_within(settings, method, timetable) == steps
        assert "fit" in timetable.parts
    # Of 5.1 seconds, timing takes 0.97, and 200 steps of finetuning 2.
    finetuned, ticks = with_flags(settings, finetune_steps=200), itertools.count()
    supervised = images.METHODS["supervised"].scheduled(1000)
    timetable = Timetable(lambda: 0.01 * next(ticks), minutes=0.1)
    assert steps_within(finetuned, supervised, timetable) == 210
    assert timetable.reserved == pytest.approx(2.0)
    # A look for 12 pictures; ten validations are of as many after the statistics of 256. The steps
    # are (5.1 - 0.53 - 2.23) / 0.01, and nothing is kept for what comes after them.
    validated = dataclasses.replace(settings, val=str(tmp_path / "test"))
    ticks = itertools.count()
    timetable = Timetable(lambda: 0.01 * next(ticks), minutes=0.1)
    assert steps_within(validated, supervised, timetable) == 230
    assert timetable.reserved == pytest.approx(0.0)
    # With half of the time for other steps it would end in time, without some of its own.
    ticks = itertools.count()
    timetable = Timetable(lambda: 0.01 * next(ticks), minutes=0.05)
    said: list[str] = []
    assert steps_within(finetuned, supervised, timetable, said.append) == 79
    (note,) = said
    assert note.endswith("too long for --minutes 0.05: some of them may be skipped")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("_all_are_timed")
@pytest.mark.parametrize(("finetuning", "networks"), [(0, 1), (1, 2)])
def test_a_long_training_keeps_no_more_time_than_tests_and_the_report_take(
    finetuning: int, networks: int, tmp_path: Path
) -> None:
    """A look is 12 labeled pictures long; each network is tested on 12 others, and labels some."""
    root = color_folders(tmp_path)
    settings = small_settings(root, steps=1000, finetune_steps=finetuning)
    settings = with_flags(settings, test=str(root / "test"))
    ticks = itertools.count()
    timetable = Timetable(lambda: 0.12 * next(ticks), minutes=10.0)
    steps_within(settings, images.METHODS["supervised"].scheduled(1000), timetable)
    pictures = networks * (12 + LEARNED + COUNTED)
    rest = look.REPORT + 1.5 * 0.01 * pictures
    assert timetable.rest == pytest.approx(rest)
    assert timetable.seconds_of(SHARE) == pytest.approx(600 - rest)
    # Of a short training it is a share, as it is of a long one that was not measured.
    timetable.minutes = 1.0
    assert timetable.seconds_of(SHARE) == pytest.approx(60 * SHARE)
    assert Timetable(minutes=10.0).seconds_of(SHARE) == pytest.approx(600 * SHARE)


@pytest.mark.usefixtures("_all_are_timed")
def test_labeling_is_not_the_time_of_steps(tmp_path: Path) -> None:
    """A quarter of the unlabeled pictures are labeled between two looks at the clock."""
    root = color_folders(tmp_path, side=8, many=2 * look.PICTURES)
    settings = small_settings(root, steps=1000, finetune_steps=0)
    said: list[str] = []
    method = with_flags(METHODS["noisy_student"], rounds=2).scheduled(1000)
    # Three phases and two labelings have (5.1 - 1.3 - 2 · 0.04) / (3 · 0.01) steps, to two digits.
    for minutes, steps, notes in ((0.1, 120, 0), (0.001, 1, 2)):
        ticks = itertools.count()

        def clock(ticks: Iterator[int] = ticks) -> float:
            return 0.01 * next(ticks)

        timetable = Timetable(clock, minutes=minutes)
        assert steps_within(settings, method, timetable, said.append) == steps
        assert len(said) == notes
    assert said[0].startswith("note: the look at the pictures and a few steps took 1 s, which is")
    assert said[-1].startswith("note: labeling and validations take about")
    assert said[-1].endswith("too long for --minutes 0.001: it will take longer")


def small_settings(root: Path, **length: Any) -> Images:
    """Return settings of a training on the folders, of few pictures a step and a small network."""
    settings = config(
        labeled=str(root / "labeled"),
        unlabeled=str(root / "unlabeled"),
        classes=("blue", "red"),
        device="cpu",
        network="small_cnn",
        labeled_batch=2,
        unlabeled_batch=2,
        image_size=8,
        **length,
    )
    return fitted(settings, seen(), 0.0)


def test_a_method_is_timed_where_the_first_class_alone_has_more_pictures_than_are_timed(
    tmp_path: Path,
) -> None:
    root = color_folders(tmp_path, few=look.PICTURES + 2, side=8)
    settings, _ = with_steps(
        small_settings(root, minutes=0.05), images.METHODS["uda"], Timetable(), learned=100
    )
    assert settings.fitting.chosen_steps > 1


def test_a_short_phase_has_the_kinds_of_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase of 300 of 1,000 steps, of which UDA begins after the first 120."""
    stopwatch = look.Stopwatch(config(steps=1_000), Timetable())
    trainer: Any = SimpleNamespace(
        teacher=None,
        losses=(UDA(start=120),),
        step=None,
        device=torch.device("cpu"),
        student=torch.nn.Linear(1, 1),
        networks={"student": None},
    )

    def seconds(trainer: Any, step: Any, feeds: Any) -> float:
        return 1.0 if trainer.steps_done < 120 else 3.0

    monkeypatch.setattr(stopwatch, "usual_seconds", seconds)
    stopwatch.fit(trainer, None, None, steps=300)
    assert (stopwatch.per_step, stopwatch.beside) == (0.0, pytest.approx(120 * 1.0 + 180 * 3.0))
    assert stopwatch.timetable.parts == {}
    stopwatch.fit(trainer, None, None)
    assert stopwatch.per_step == pytest.approx((120 * 1.0 + 880 * 3.0) / 1_000)
    assert stopwatch.timetable.parts == {"fit": [Part(0.0, 0.12, 1.0), Part(0.12, 1.0, 3.0)]}


def test_steps_of_each_kind_count_as_often_as_they_come() -> None:
    both = SimpleNamespace(
        teacher="one", teacher_losses=(UDA(start=400),), step="both", teacher_step="teacher alone"
    )
    kinds = [(0, 400, "teacher alone"), (400, 750, "teacher alone"), (750, 1000, "both")]
    assert look.kinds_of_steps(both, 1000, wait=750) == kinds
    both.teacher = None  # one network
    assert look.kinds_of_steps(both, 1000, wait=750) == [(0, 400, "both"), (400, 1000, "both")]
    kinds = [(0, 400, "both"), (400, 600, "both"), (600, 1000, "both")]
    assert look.kinds_of_steps(both, 1000, wait=0, small_until=600) == kinds


def test_shares_follow_the_steps_of_which_those_that_were_given_are_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def timed(config: Images, *given: Any) -> Any:
        asked.append(config.fitting.steps)
        return SimpleNamespace(per_step=0.0981, beside=0.0, validations=0.0)

    monkeypatch.setattr(look, "timed", timed)
    found, method = with_steps(config(steps=1000), images.METHODS["mpl"], Timetable(), learned=100)
    assert (found.fitting.warmup, found.fitting.validate_every, found.minutes) == (50, 100, None)
    assert (method.wait, method.uda.uda_start) == (750, 400)
    own, method = with_steps(
        config(steps=1000, warmup=0, validate_every=9),
        with_flags(images.METHODS["mpl"], wait=7),
        Timetable(),
        learned=100,
    )
    assert (own.fitting.warmup, own.fitting.validate_every, method.wait) == (0, 9, 7)
    assert asked == []
    # A phase that is given in steps is in the training that is measured, and stays as it is.
    found, method = with_steps(
        config(), with_flags(images.METHODS["mpl"], wait=200), Timetable(), learned=100
    )
    assert (found.fitting.steps, found.minutes, method.wait) == (2600, look.MINUTES, 200)
    assert asked == [look.REHEARSED]


@pytest.mark.parametrize(
    ("network", "steps", "given_changes", "changes"),
    [
        ("airbench_small", 31, None, "mild"),
        ("airbench_small", 32, None, "strong"),
        ("airbench_small", 31, "strong", "strong"),
        ("pooled_cnn", 1, None, "strong"),
    ],
)
def test_changes_are_mild_where_each_picture_is_seen_a_few_times(
    network: str, steps: int, given_changes: str | None, changes: str
) -> None:
    """A hundred pictures in batches of 64: twenty times each are 31 steps."""
    settings = config(network=network, steps=steps, labeled_batch=64, augment=given_changes)
    found, _ = with_steps(settings, images.METHODS["uda"], Timetable(), learned=100)
    assert found.pictures.augment == changes


@pytest.mark.parametrize(
    ("method", "network", "given_steps", "steps"),
    [
        ("supervised", "airbench_small", None, 0),
        ("supervised", "airbench_small", 7, 7),
        ("supervised", "pooled_cnn", None, 200),
        ("uda", "airbench_small", None, 200),
    ],
)
def test_the_network_of_small_pictures_is_not_finetuned_on_labels_that_it_learns_alone(
    method: str, network: str, given_steps: int | None, steps: int, root: Path
) -> None:
    settings = given(root, network=network, finetune_steps=given_steps)
    found, _ = choose_settings(settings, images.METHODS[method], print)
    assert found.fitting.chosen_finetuning == steps


def test_a_look_gives_every_setting_a_value_says_it_and_a_run_that_is_resumed_takes_it(
    root: Path,
) -> None:
    said: list[str] = []
    found, method = choose_settings(given(root), images.METHODS["mpl"], said.append)
    open_ = (
        "val",
        "test",
        "test_fraction",
        "minutes",
        "weights",
        "tuning",
        "levels",
        "weights_sha256",
        "ema_decay",
        "patience",
    )
    assert [
        name for name, value in flag_values(found).items() if value is None and name not in open_
    ] == []
    assert None not in [
        value for name, value in flag_values(method).items() if name.startswith("uda_")
    ]
    assert (found.classes, method.uda.uda_prior) == (("blue", "red"), (0.5, 0.5))
    assert (found.pictures.recolor, found.pictures.image_size, found.val_fraction) == (
        False,
        48,
        0.0,
    )
    words = " ".join(said)
    for word in (
        "pooled_cnn",
        "48x48",
        "shrunk",
        "colors kept",
        "0.01",
        "40 steps",
        "--weights imagenet",
    ):
        assert word in words, word
    # Whatever the pictures show now, and however long a step takes.
    stored = {
        name: list(v) if isinstance(v, tuple) else v
        for name, v in {**flag_values(found), **flag_values(method)}.items()
    }
    stored |= {"mean": [0.1, 0.2, 0.3], "lr": 0.123, "steps": 41, "wait": 5}
    again, method = choose_settings(
        with_flags(given(root), steps=None), images.METHODS["mpl"], pytest.fail, stored
    )
    assert (again.pictures.mean, again.fitting.lr, again.fitting.steps) == (
        (0.1, 0.2, 0.3),
        0.123,
        41,
    )
    assert (method.wait, method.uda.uda_start) == (5, 16)
    assert (
        choose_settings(given(root, lr=0.5), images.METHODS["mpl"], print, stored)[0].fitting.lr
        == 0.5
    )
    with pytest.raises(MetaplError, match="damaged"):
        choose_settings(given(root), images.METHODS["uda"], print, {"warmup": -1})


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, images.SET_ASIDE),
        ({"val": "test"}, 0.0),
        ({"test": "test"}, 0.0),
        ({"test_fraction": 0.2}, 0.0),
        ({"test": "test", "patience": 3}, images.SET_ASIDE),
        ({"test": "test", "val_fraction": 0.3}, 0.3),
    ],
)
def test_labels_are_set_aside_where_nothing_else_measures(
    fields: dict[str, Any], share: float, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "SPLIT_FROM", 2)
    fields = {
        name: str(root / value) if isinstance(value, str) else value
        for name, value in fields.items()
    }
    chosen, _ = choose_settings(given(root, **fields), images.METHODS["uda"], print)
    assert chosen.val_fraction == share


@pytest.mark.parametrize("others", ["unlabeled", "labeled"])
def test_without_others_the_labeled_pictures_are_looked_at_once(
    others: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few that count twice are enough to say that they look like their mirror images."""
    look_at_pictures = look.look
    counts: list[tuple[int, int]] = []

    def counted(labeled: Any, labels: Any, unlabeled: Any, levels: Any) -> Look:
        counts.append((len(labeled), len(unlabeled)))
        return look_at_pictures(labeled, labels, unlabeled, levels)

    monkeypatch.setattr(look, "look", counted)
    settings = given(root, unlabeled=str(root / others))
    choose_settings(settings, images.METHODS["supervised"], print)
    labeled, unlabeled = (len([*(root / name).rglob("*.png")]) for name in ("labeled", others))
    assert counts == [(labeled, 0 if others == "labeled" else unlabeled)]
