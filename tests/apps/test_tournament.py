"""``--method auto``: the folds, who is ahead, and a run that tries recipes and can be repeated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import metapl
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tiny_runs import color_folders, images_command
from torch import Tensor

from metapl.apps import self_training, tournament
from metapl.apps import train as train_module
from metapl.apps.backbone import accuracy_on_pixels
from metapl.apps.methods import Supervised, Training
from metapl.apps.self_training import SelfTraining, TwoTeachers, with_class_shares
from metapl.apps.tournament import FOLDS, RECIPES, TRIALS, Auto, Standing, folds_of, points_of
from metapl.errors import MetaplError
from metapl.labels import LabelStore
from metapl.networks import create
from metapl.pictures import MemoryImages

# ------------------------------------------------------------------------------------------- folds


def test_folds_divide_each_class_evenly_and_keep_a_single_picture() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3 + [2] * 2 + [3])
    folds = folds_of(labels, seed=4)
    for label, counts in ((0, [3, 2, 2]), (1, [1, 1, 1]), (2, [1, 1, 0])):
        assert torch.bincount(folds[labels == label], minlength=FOLDS).tolist() == counts
    assert folds[labels == 3].tolist() == [-1]
    assert torch.equal(folds, folds_of(labels, seed=4))
    assert not torch.equal(folds, folds_of(labels, seed=5))


# ----------------------------------------------------------------------------------- who is ahead


def standing(
    name: str, right: int, pictures: int, *, sureness: float = 1.0, of_the_last: bool = False
) -> Standing:
    """Return what a recipe reaches that is right on so many of the first pictures, or of the last.

    They are of two classes.
    """
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    labels = torch.arange(pictures) % 2
    is_right = torch.arange(pictures) < right
    if of_the_last:
        is_right = is_right.flip(0)
    predicted = torch.where(is_right, labels, 1 - labels)
    given = torch.nn.functional.one_hot(predicted, 2).double()
    probabilities = sureness * given + (1 - sureness) * (1 - given)
    return Standing(recipe=recipe, probabilities=probabilities, labels=labels)


def winner(standings: list[Standing], linear_advantage: float) -> str:
    return tournament.most_promising_first(standings, linear_advantage)[0].recipe.name


def test_the_score_of_who_is_sure_is_the_accuracy() -> None:
    sure = standing("mild", right=3, pictures=4)
    assert sure.accuracy == 0.75
    assert float(sure.scores.mean()) == 0.75
    # Who is half sure of each class has the same score whether it is right or not.
    unsure = standing("mild", right=3, pictures=4, sureness=0.5)
    assert unsure.scores.tolist() == [0.75] * 4


def test_points_are_the_head_start_and_the_shrunken_advantage() -> None:
    mild = standing("mild", right=40, pictures=100)
    strong = standing("strong", right=60, pictures=100)
    points = points_of([mild, strong], linear_advantage=0.0)
    # On the 20 pictures on which they differ, each is half a score away from their mean.
    squares = 20 * (50 - 10) ** 2 + 80 * 10**2 + 50**2
    variance = squares / 100**2
    # Of a difference to the mean of two.
    spread = tournament.SPREAD**2 / 2
    weight = spread / (spread + variance)
    assert points["mild"] == pytest.approx(-weight * 10)
    assert points["strong"] == pytest.approx(strong.recipe.head_start + weight * 10)


@pytest.mark.parametrize(
    ("mild", "strong", "pictures", "best"),
    [
        # Few pictures say little, and many say much.
        (5, 4, 10, "strong"),
        (12, 8, 20, "mild"),
        (600, 300, 700, "mild"),
        (0, 0, 0, "strong"),
    ],
)
def test_few_pictures_leave_it_to_the_head_start(
    mild: int, strong: int, pictures: int, best: str
) -> None:
    standings = [standing("mild", mild, pictures), standing("strong", strong, pictures)]
    assert winner(standings, linear_advantage=0.0) == best


def test_who_is_surely_wrong_is_behind_who_is_unsure() -> None:
    sure = standing("mild", right=20, pictures=40)
    unsure = standing("mild and mirrored", right=20, pictures=40, sureness=0.6)
    assert sure.accuracy == unsure.accuracy
    best = tournament.most_promising_first([sure, unsure], linear_advantage=0.0)[0]
    assert best.recipe.name == "mild and mirrored"


def test_strong_changes_lose_their_head_start_where_a_linear_layer_is_right() -> None:
    standings = [standing("mild", 20, 40), standing("strong", 20, 40)]
    assert winner(standings, linear_advantage=20.0) == "strong"
    assert winner(standings, linear_advantage=40.0) == "mild"


@pytest.mark.parametrize(("mild", "best"), [(52, "strong"), (55, "strong"), (68, "mild")])
def test_a_head_start_is_gone_where_the_pictures_leave_nothing_open(mild: int, best: str) -> None:
    """The standard error of the difference is 10 points or so."""
    standings = [standing("mild", mild, 100), standing("strong", 50, 100, of_the_last=True)]
    assert winner(standings, linear_advantage=0.0) == best


def test_a_linear_layer_that_is_ahead_leaves_the_head_start() -> None:
    strong = standing("strong", 50, 100)
    assert not tournament.is_surely_behind(strong, [strong, standing("linear", 90, 100)])
    assert tournament.is_surely_behind(strong, [strong, standing("mild", 90, 100)])
    assert not tournament.is_surely_behind(standing("strong", 0, 0), [standing("mild", 0, 0)])


def test_a_linear_layer_is_far_above_chance_on_digits_that_stand_still_alone() -> None:
    data = load_digits()
    digits = torch.from_numpy(data.images[:150] * 15).to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target[:150]).long()
    assert accuracy_on_pixels(MemoryImages(digits), labels, seed=0) > 0.8
    # Each digit somewhere else, around the edges too.
    torch.manual_seed(0)
    shifts = torch.randint(0, 8, (150, 2)).tolist()
    rolled = [
        digit.roll(tuple(shift), dims=(1, 2)) for digit, shift in zip(digits, shifts, strict=True)
    ]
    assert accuracy_on_pixels(MemoryImages(torch.stack(rolled)), labels, seed=0) < 0.35


def test_pixels_of_single_pictures_tell_nothing() -> None:
    assert (
        accuracy_on_pixels(
            MemoryImages(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)), torch.arange(3), seed=0
        )
        == 0.0
    )


@pytest.mark.parametrize(
    ("labels", "accuracy", "expected"),
    [(199, 0.1, True), (200, 0.1, False), (200, 0.86, False), (200, 0.87, True)],
)
def test_unlabeled_pictures_are_learned_where_labels_are_few_or_nearly_right(
    labels: int, accuracy: float, expected: bool
) -> None:
    labels_N = torch.arange(labels) % 10
    assert tournament.unlabeled_help(labels_N, classes=10, accuracy=accuracy) is expected
    mild = RECIPES[0]
    method = mild.method(("augment", "network"), learns_unlabeled=expected)
    assert isinstance(method, TwoTeachers if expected else Supervised)


def test_the_line_of_a_race_says_who_was_right_more_often_and_was_not_taken() -> None:
    mild = standing("mild", right=7, pictures=10)
    mirrored = standing("mild and mirrored", right=8, pictures=10)
    strong = standing("strong", right=3, pictures=10)
    finalists = [mirrored, mild]
    text = tournament.sentence([*finalists, strong], finalists, mild.recipe)
    assert text.endswith(
        "; mild and mirrored was right more often, and mild is ahead by its score and its head "
        "start"
    )
    text = tournament.sentence([*finalists, strong], finalists, mirrored.recipe)
    assert "right more often" not in text


def test_two_teachers_that_are_named_augment_mildly(three_colors: Path, tmp_path: Path) -> None:
    for flags, augment in (((), "mild"), (("--augment", "strong"), "strong")):
        out = tmp_path / augment
        words = ("--method", "two_teachers", "--steps", "8", *flags, "--out", str(out))
        metapl(*images_command(three_colors, *words))
        assert f'"augment": "{augment}"' in (out / "recipe.json").read_text()


def test_an_augmentation_that_was_asked_for_leaves_one_teacher() -> None:
    mild = RECIPES[0]
    method = mild.method(("network",), learns_unlabeled=True)
    assert method == SelfTraining()


# -------------------------------------------------------------------------------------- the labels


def test_balanced_labels_have_the_shares_and_the_odds_of_before() -> None:
    torch.manual_seed(0)
    p = (3 * torch.randn(500, 4)).softmax(1)
    shares = (0.1, 0.2, 0.3, 0.4)
    q = with_class_shares(p, shares)
    torch.testing.assert_close(q.mean(0), torch.tensor(shares), atol=2e-3, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(500))

    def odds(distribution: Tensor) -> Tensor:
        return distribution[:, 1] / distribution[:, 0]

    # The odds of all examples are multiplied by the same number.
    ratio = odds(q) / odds(p)
    torch.testing.assert_close(ratio, ratio[:1].expand(500), rtol=1e-3, atol=0)


def test_a_class_that_no_label_names_stays_impossible() -> None:
    p = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0]])
    assert with_class_shares(p, None)[:, 2].tolist() == [0.0, 0.0]
    assert with_class_shares(p, None).isfinite().all()


# -------------------------------------------------------------------------------------------- runs

AUTO = ("--method", "auto", "--steps", "40", "--finetune-steps", "0")


@pytest.fixture(scope="module")
def auto_run(three_colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("auto") / "run"
    command = images_command(three_colors, *AUTO, "--out", str(out))
    assert "method: " in metapl(*command).stdout
    return out


def put_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a recipe win the race whatever it reaches."""
    points = tournament.points_of

    def with_one_ahead(*args: object, **options: object) -> dict[str, float]:
        return {**points(*args, **options), name: 100.0}  # type: ignore[arg-type]

    monkeypatch.setattr(tournament, "points_of", with_one_ahead)


def trials_in(run: Path) -> list[Path]:
    return [*run.rglob("trial-*")]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "student.safetensors")


def test_a_run_says_what_it_tried_and_delivers_the_best(auto_run: Path) -> None:
    result = json.loads((auto_run / "result.json").read_text())
    chosen = result["chosen"]
    assert result["method"] == "auto"
    assert set(chosen["first_fold"]) == {recipe.name for recipe in RECIPES}
    assert len(chosen["all_folds"]) == tournament.FINALISTS
    assert chosen["recipe"] in chosen["all_folds"]
    # All labels are learned in the last training, so that none is left to validate on.
    assert result["validation_size"] == 0
    assert result["delivered"] == "student"
    assert 0 <= result["test_accuracy"] <= 1
    # What the trials left is not kept.
    assert not trials_in(auto_run)


def test_the_steps_of_all_trials_are_the_share_that_was_asked_for() -> None:
    auto = Auto().scheduled(4_000)
    assert auto.trial_steps is not None
    assert auto.final_steps is not None
    assert auto.trial_steps[0] == round(0.125 * 4_000 / TRIALS)
    assert auto.final_steps[0] + TRIALS * auto.trial_steps[0] == 4_000
    # What a run has stored stays.
    assert auto.scheduled(10) == auto


def test_a_run_from_its_recipe_has_the_same_bits(auto_run: Path, tmp_path: Path) -> None:
    metapl("train", "--config", str(auto_run / "recipe.json"), "--out", str(tmp_path / "again"))
    again = weights(tmp_path / "again")
    for name, value in weights(auto_run).items():
        assert torch.equal(value, again[name]), name


def test_flags_beside_a_recipe_are_followed_by_the_race(auto_run: Path, tmp_path: Path) -> None:
    repeated = ("train", "--config", str(auto_run / "recipe.json"))
    asked = ("--augment", "strong", "--network", "small_cnn", "--steps", "32")
    out = tmp_path / "again"
    metapl(*repeated, *asked, "--out", str(out))
    chosen = json.loads((out / "result.json").read_text())["chosen"]
    assert chosen["augment"] == "strong"
    assert chosen["network"] == "small_cnn"
    # Of 32 steps each of seven trials has one at least.
    assert chosen["steps"] == 32 - TRIALS
    more = tmp_path / "more"
    metapl(*repeated, "--trial-share", "0.5", "--out", str(more))
    fields = json.loads((more / "recipe.json").read_text())["recipe"]["fields"]
    assert fields["trial_steps"] == [round(0.5 * 40 / TRIALS)] * len(RECIPES)


def test_another_share_of_the_time_is_as_many_more_steps() -> None:
    """A run by minutes, whose linear layer has one step."""
    by_minutes = Auto(
        trial_share=0.25,
        trial_steps=(40, 40, 30, 1),
        final_steps=(4_900, 4_900, 2_100, 1),
        final_steps_with_unlabeled=(2_800, 2_800, 2_100, 1),
    )
    method = by_minutes.with_flags_beside(["trial_share"], repeated_share=0.125)
    assert method.trial_steps == (80, 80, 60, 2)
    assert method.final_steps == (4_200, 4_200, 1_800, 1)
    assert method.final_steps_with_unlabeled == (2_400, 2_400, 1_800, 1)
    mild = by_minutes.with_flags_beside(["augment"], repeated_share=0.25)
    assert mild.trial_steps == by_minutes.trial_steps
    assert by_minutes.with_flags_beside(["steps"], repeated_share=0.25).trial_steps is None


def test_the_result_says_what_was_trained_and_for_how_many_steps(auto_run: Path) -> None:
    result = json.loads((auto_run / "result.json").read_text())
    chosen = result["chosen"]
    assert result["steps"] == chosen["steps"] == 40 - TRIALS * round(0.125 * 40 / TRIALS)
    assert f'"name": "{chosen["network"]}"' in (auto_run / "network.json").read_text()
    assert {"augment", "mirror", "lr", "finetune_steps"} <= chosen.keys()


def test_a_comparison_without_the_race_is_of_the_methods_as_they_are(
    three_colors: Path, tmp_path: Path
) -> None:
    out = tmp_path / "compared"
    methods = ("--compare", "--methods", "supervised", "uda", "--seeds", "0", "--jobs", "1")
    command = images_command(three_colors, "--method", "auto", "--steps", "12", *methods)
    said = metapl(*command, "--out", str(out))
    assert "recipes are tried" not in said.stdout + said.stderr
    for method in ("supervised", "uda"):
        recipe = json.loads((out / method / "seed-0" / "recipe.json").read_text())["recipe"]
        assert recipe["fields"]["finetune_steps"] == 2
        assert recipe["fields"]["steps"] == 12


def test_a_run_that_was_stopped_in_the_race_ends_with_the_same_bits(
    auto_run: Path, three_colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = images_command(three_colors, *AUTO, "--out", str(out))
    measured = tournament.Race.measure_on_fold
    calls = 0

    def stopped(*args: object, **options: object) -> Standing:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return measured(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(tournament.Race, "measure_on_fold", stopped)
        metapl(*command, code=130)
    metapl(*command, "--resume")
    resumed = weights(out)
    for name, value in weights(auto_run).items():
        assert torch.equal(value, resumed[name]), name


def test_strong_changes_are_followed_by_finetuning_that_is_delivered(
    three_colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_ahead("strong", monkeypatch)
    out = tmp_path / "run"
    metapl(*images_command(three_colors, *AUTO, "--out", str(out)))
    result = json.loads((out / "result.json").read_text())
    assert result["chosen"]["recipe"] == "strong"
    assert result["delivered"] == "finetuned"
    finetuned = load_file(out / "finetuned_student.safetensors")
    assert any(not torch.equal(value, finetuned[name]) for name, value in weights(out).items())


def test_labels_of_one_class_are_guessed_and_not_nearly_right() -> None:
    labels_N = torch.tensor([0] * 380 + [1] * 20)
    assert not tournament.unlabeled_help(labels_N, classes=2, accuracy=0.96)
    assert tournament.unlabeled_help(labels_N, classes=2, accuracy=0.995)


@pytest.mark.parametrize(("nearly_right", "method"), [(-9.0, "two_teachers"), (1.1, "supervised")])
def test_many_labels_leave_it_to_the_race_whether_unlabeled_pictures_are_learned(
    three_colors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nearly_right: float,
    method: str,
) -> None:
    put_ahead("mild", monkeypatch)
    monkeypatch.setattr(tournament, "FEW_LABELS", 1)
    monkeypatch.setattr(tournament, "NEARLY_RIGHT", nearly_right)
    trained: list[int] = []
    train = tournament.Recipe.train

    def noted(recipe: Any, *args: Any, lengths: tournament.Lengths, **options: Any) -> Any:
        trained.append(lengths.steps)
        return train(recipe, *args, lengths=lengths, **options)

    # Where there is no time for the timing, the two trainings have other steps.
    scheduled = Auto.scheduled

    def planned(auto: Auto, steps: int) -> Auto:
        plan = scheduled(auto, steps)
        return dataclasses.replace(
            plan, final_steps=(13,) * len(RECIPES), final_steps_with_unlabeled=(7,) * len(RECIPES)
        )

    monkeypatch.setattr(tournament.Recipe, "train", noted)
    monkeypatch.setattr(Auto, "scheduled", planned)
    out = tmp_path / "run"
    metapl(*images_command(three_colors, *AUTO, "--out", str(out)))
    result = json.loads((out / "result.json").read_text())
    assert result["chosen"]["recipe"] == "mild"
    assert result["chosen"]["method"] == method
    expected = {"two_teachers": 7, "supervised": 13}[method]
    assert trained[-1] == result["steps"] == result["chosen"]["steps"] == expected


def test_a_run_that_was_stopped_in_the_finetuning_holds_no_race_again(
    three_colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    put_ahead("strong", monkeypatch)
    out = tmp_path / "run"
    command = images_command(three_colors, *AUTO, "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "finetune", stopped)
        metapl(*command, code=130)
    assert trials_in(out)
    metapl(*command, "--resume")
    assert json.loads((out / "result.json").read_text())["delivered"] == "finetuned"
    assert not trials_in(out)


def test_a_warm_up_that_was_asked_for_is_that_of_the_training(
    three_colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[tournament.Lengths] = []
    train = tournament.Recipe.train

    def noted(recipe: Any, *args: Any, **options: Any) -> Any:
        lengths.append(options["lengths"])
        return train(recipe, *args, **options)

    monkeypatch.setattr(tournament.Recipe, "train", noted)
    command = images_command(three_colors, *AUTO, "--warmup", "10", "--out", str(tmp_path / "run"))
    metapl(*command)
    *trials, training = lengths
    assert training.warmup == 10
    # A trial has one step of 40.
    assert {trial.warmup for trial in trials} == {0}
    assert training.validate_every < 40 / 10


def test_finetuning_is_a_tenth_of_the_steps_and_200_at_most() -> None:
    recipes = {recipe.name: recipe for recipe in RECIPES}
    assert [recipes["strong"].finetune_steps(steps) for steps in (9, 870, 5_000)] == [0, 87, 200]
    assert recipes["mild"].finetune_steps(5_000) == 0


def test_patience_is_of_the_training_and_not_of_the_trials(
    three_colors: Path, tmp_path: Path
) -> None:
    more = ("--patience", "2", "--val", str(three_colors / "test"), "--lr", "1e-9")
    command = images_command(three_colors, *AUTO, *more, "--out", str(tmp_path / "run"))
    assert "patience" in metapl(*command).stdout


def test_a_linear_layer_that_is_best_is_delivered_as_it_was_fitted(
    three_colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"mild", "mild and mirrored", "strong"}
    points = tournament.points_of

    def far_ahead(*args: object, **options: object) -> dict[str, float]:
        scores = points(*args, **options)  # type: ignore[arg-type]
        return {name: -100.0 if name in others else score for name, score in scores.items()}

    monkeypatch.setattr(tournament, "points_of", far_ahead)
    out = tmp_path / "run"
    metapl(*images_command(three_colors, *AUTO, "--out", str(out)))
    result = json.loads((out / "result.json").read_text())
    assert result["chosen"]["recipe"] == "linear"
    # The network is right on the pictures that the regression is right on.
    assert result["test_accuracy"] == pytest.approx(result["control_accuracy"])
    predicted = tmp_path / "predictions.csv"
    test = three_colors / "test"
    metapl("predict", str(out), str(test), "--out", str(predicted))
    assert predicted.exists()


def test_steps_of_finetuning_are_refused_beside_the_race(three_colors: Path) -> None:
    said = metapl(*images_command(three_colors, *AUTO, "--finetune-steps", "3"), code=2).stderr
    assert "--finetune-steps 3 goes with a method that is named, such as --method uda" in said


def test_several_processes_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    folders = ("--labeled", "few", "--unlabeled", "many")
    said = metapl("train", "images", *folders, "--mesh.replicate", "2", code=2).stderr
    assert "--method auto tries recipes in one process, and 2 were started" in said


def test_a_share_of_nothing_or_of_all_is_refused() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(MetaplError, match="trial_share"):
            Auto(trial_share=share)


def test_recipes_race_from_a_backbone_too(tmp_path: Path) -> None:
    root = color_folders(tmp_path / "pictures", few=4, many=4, side=32)
    file = tmp_path / "weights.pt"
    torch.manual_seed(3)
    torch.save(create("pooled_cnn", 10, image_size=32).state_dict(), file)
    backbone = ("--image-size", "32", "--network", "pooled_cnn", "--backbone", str(file))
    out = tmp_path / "run"
    metapl(*images_command(root, *AUTO, *backbone, "--out", str(out)))
    result = json.loads((out / "result.json").read_text())
    # No recipe has another network than the one that was asked for.
    assert '"name": "pooled_cnn"' in (out / "network.json").read_text()
    assert 0 <= result["test_accuracy"] <= 1


@pytest.mark.parametrize("method", ["self_training", "two_teachers"])
def test_each_network_takes_a_step_where_one_was_asked_for(
    method: str, three_colors: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    named = ("--method", method, "--steps", "1", "--finetune-steps", "0")
    metapl(*images_command(three_colors, *named, "--warmup", "0", "--out", str(out)))
    assert json.loads((out / "result.json").read_text())["best_step"] == 1


# ------------------------------------------------------------------------------------ two teachers

TWO_TEACHERS = ("--method", "two_teachers", "--steps", "20", "--finetune-steps", "0")


@pytest.fixture(scope="module")
def taught_by_two(three_colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two-teachers") / "run"
    metapl(*images_command(three_colors, *TWO_TEACHERS, "--out", str(out)))
    return out


def test_the_student_learns_the_labels_of_both_teachers(
    taught_by_two: Path, monkeypatch: pytest.MonkeyPatch, three_colors: Path, tmp_path: Path
) -> None:
    first = LabelStore(taught_by_two / "labels" / "unlabeled")
    second = LabelStore(taught_by_two / "labels" / "second-teacher" / "unlabeled")
    # The student has 9 of the 20 steps. Pictures are labeled that it passes over four times.
    fields = json.loads((taught_by_two / "recipe.json").read_text())["recipe"]["fields"]
    names = first.column("id").tolist()
    pictures = len(list((three_colors / "unlabeled").iterdir()))
    assert len(names) == 9 * fields["unlabeled_batch"] // 4 < pictures
    assert names == second.column("id").tolist() == sorted(names)
    of_first, of_second = (store.at(store.find(names)) for store in (first, second))
    assert not torch.equal(of_first, of_second)

    learned: list[Tensor] = []
    trained_student = TwoTeachers.trained_student

    def noted(self: TwoTeachers, t: Training, soft_labels_NC: Tensor, steps: int) -> object:
        # The timing of steps, before the run, is of fewer pictures.
        if t.folder is not None:
            learned.append(soft_labels_NC)
        return trained_student(self, t, soft_labels_NC, steps)

    monkeypatch.setattr(TwoTeachers, "trained_student", noted)
    metapl(*images_command(three_colors, *TWO_TEACHERS, "--out", str(tmp_path / "again")))
    (soft_labels_NC,) = learned
    torch.testing.assert_close(soft_labels_NC, with_class_shares((of_first + of_second) / 2, None))


def test_a_run_that_was_stopped_at_the_second_teacher_ends_with_the_same_bits(
    taught_by_two: Path, three_colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = images_command(three_colors, *TWO_TEACHERS, "--out", str(out))

    def stopped(t: Training) -> Training:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(self_training, "with_strong_augmentation", stopped)
        metapl(*command, code=130)
    metapl(*command, "--resume")
    resumed = weights(out)
    for name, value in weights(taught_by_two).items():
        assert torch.equal(value, resumed[name]), name


def test_teachers_that_leave_the_student_no_step_are_refused() -> None:
    with pytest.raises(MetaplError, match="--second-share 0.5: the two teachers have 1.1"):
        TwoTeachers(teacher_share=0.6, second_share=0.5)
