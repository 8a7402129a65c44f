"""What a comparison says of its numbers, and which student it delivers."""

from __future__ import annotations

import math

import pytest

from metapl.apps.experiments.accuracies import Comparison, spoken
from metapl.errors import MetaplError
from metapl.metrics import chance_level


def comparison(test: dict[str, list[float]], validation: dict[str, list[float]] | None = None) -> Comparison:
    """Students with these accuracies, and finetuned ones that are worse."""
    methods = {
        name: {"test_accuracy": ones, "student_test_accuracy": ones, "finetuned_test_accuracy": [0.1] * len(ones)}
        for name, ones in test.items()
    }
    for name, ones in (validation or {}).items():
        methods[name]["validation_accuracy"] = ones
    seeds = tuple(range(len(next(iter(test.values())))))
    return Comparison(seeds, methods, examples=400, chance=0.125)


def test_fewer_than_five_seeds_say_the_difference_and_no_more() -> None:
    said = comparison({"mpl": [0.9, 0.91, 0.92, 0.93], "none": [0.5, 0.52, 0.51, 0.52]}).sentence()
    assert "+40.2 points over 4 seeds; at least 5 seeds are needed to tell" in said
    assert "p =" not in said


def test_five_seeds_are_tested() -> None:
    none = [0.5, 0.52, 0.51, 0.52, 0.53]
    helped = comparison({"mpl": [0.9, 0.91, 0.92, 0.93, 0.93], "none": none}).sentence()
    assert "n = 400, chance 12.5%" in helped
    assert helped.endswith("the teacher's feedback helped.")
    hurt = comparison({"mpl": [0.2, 0.21, 0.22, 0.23, 0.23], "none": none}).sentence()
    assert ": the teacher's feedback hurt; the best on the test set is same loop, no feedback with 51.6%" in hurt
    unclear = comparison({"mpl": [0.5, 0.53, 0.5, 0.53, 0.53], "none": none}).sentence()
    assert "these seeds do not show whether" in unclear
    same = comparison({"mpl": none, "none": none}).sentence()
    assert "+0.0 points over 5 seeds, with every seed the same: too little to tell" in same


def test_the_sentence_names_the_best_method_when_it_is_another() -> None:
    found = comparison(
        {"mpl": [0.8, 0.8], "none": [0.7, 0.8], "uda": [0.85, 0.86], "supervised_everything": [0.99] * 2}
    )
    assert found.sentence().endswith("the best on the test set is UDA alone with 85.5% of 400 (chance 12.5%).")
    assert "the best" not in comparison({"mpl": [0.9], "none": [0.7]}).sentence()
    without_mpl = comparison({"uda": [0.9], "none": [0.7]}).sentence()
    assert without_mpl.startswith("The best on the test set is UDA alone with 90.0%")
    assert "mpl" not in without_mpl.lower()


def test_the_delivered_student_is_the_best_methods_by_validation_alone() -> None:
    test = {"mpl": [0.9, 0.9], "uda": [0.1, 0.1], "supervised": [0.2, 0.2], "supervised_everything": [0.99, 0.99]}
    validation = {"mpl": [0.5, 0.6], "uda": [0.4, 0.9], "supervised": [0.65, 0.65], "supervised_everything": [1.0, 1.0]}
    assert comparison(test, validation).delivered() == ("uda", 1)  # ties go to the earlier one: 0.65 on the mean
    assert "UDA alone, seed 1; of all methods" in comparison(test, validation).delivery()
    assert comparison(test).delivered() == ("mpl", 0)
    assert "there was no validation" in comparison(test).delivery()


@pytest.mark.parametrize(("counts", "expected"), [([5, 5], 0.5), ([0, 7, 3], 0.7), ([1, 1, 1, 1], 0.25)])
def test_chance_is_that_of_the_largest_class_at_least(counts: list[int], expected: float) -> None:
    assert chance_level(counts) == expected


def test_words() -> None:
    assert spoken(0.25, 12_000, 1 / 4) == "25.0 % (n = 12,000, 95 % interval 24.2-25.8, chance 25.0 %)"
    assert spoken(1.0, 4, 1 / 3) == "100.0 % (n = 4, 95 % interval 51.0-100.0, chance 33.3 %)"
    assert spoken(0.25, 12_000, None) == "25.0 % (n = 12,000, 95 % interval 24.2-25.8)"


@pytest.mark.parametrize(("accuracy", "n", "chance"), [(1.5, 3, 0.5), (math.nan, 3, 0.5), (0.5, 4, 2.0), (0.5, 0, 0.5)])
def test_impossible_accuracies(accuracy: float, n: int, chance: float) -> None:
    with pytest.raises(MetaplError):
        spoken(accuracy, n, chance)
