"""What stands beside metapl on the page "Something simpler" is what it says it is."""

import importlib
import re
import statistics
from types import ModuleType

import pytest
import torch
from benchmark_runs import RESULTS, ROOT
from sklearn import datasets, preprocessing

from benchmarks.harness import points, read

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]


@pytest.fixture
def simpler() -> ModuleType:
    return importlib.import_module("something_simpler")


def test_the_step_by_hand_is_that_of_the_trainer(simpler: ModuleType) -> None:
    """Three steps of both networks, with momentum, weight decay and the teacher's own loss."""
    moved = []
    for way in ("by hand", simpler.EAGER):
        torch.manual_seed(0)
        pair, data = simpler.NETWORKS["tiny"].make()
        start = torch.nn.utils.parameters_to_vector(pair[0].parameters()).detach().clone()
        if way == "by hand":
            step, weights = simpler.by_hand(pair, data, compiled=False)
        else:
            step, weights = simpler.way_of(way, pair, data)
        for _ in range(3):
            step()
        moved.append(weights() - start)
    by_hand, by_trainer = moved
    assert (by_hand - by_trainer).norm() < 1e-5 * by_trainer.norm()


def test_checkpoints_over_steps_give_the_gradient_of_double_backward(simpler: ModuleType) -> None:
    peers = simpler.peers
    expected = peers.by_hand(*peers.case("MLP", "cpu"), 3)
    found = simpler.by_checkpoints(*peers.case("MLP", "cpu"), 3)
    assert len(found) == len(expected)
    for gradient, wanted in zip(found, expected, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-8)


def test_trainings_without_examples_are_those_one_by_one(
    simpler: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = simpler.retraining.MINIATURE
    attribution = simpler.retraining.scored(case)
    sets = simpler.retraining.removals_of(case)
    losses = simpler.without(case, attribution.order, sets, 3)
    alone = attribution.validate(sets, progress=False, at_once=1).retrained
    assert (losses - attribution.outer_loss - torch.as_tensor(alone)).abs().max() < 1e-6
    assert losses.std() > 1e-5


@pytest.mark.parametrize("is_first_order", [False, True])
def test_the_gradients_of_maml_by_hand_are_those_of_the_library(
    simpler: ModuleType, is_first_order: bool
) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    points_of_tasks = tuple(torch.randn(3, 10, 1) for _ in range(4))
    gradients = {
        way: simpler.maml_of(way, network, points_of_tasks, is_first_order=is_first_order)()
        for way in simpler.RIVAL_OF
    }
    for gradient in gradients.values():
        for name, t in gradients[simpler.TASKS_BY_HAND].items():
            torch.testing.assert_close(gradient[name], t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("share", "is_symmetric"), [(0.4, False), (0.3, True)])
def test_wrong_labels_are_as_many_as_said_and_checked_ones_are_right(
    simpler: ModuleType, share: float, *, is_symmetric: bool
) -> None:
    digits = simpler.drawn_digits(0, share=share, is_symmetric=is_symmetric)
    x, y = datasets.load_digits(return_X_y=True)
    pictures = torch.tensor(preprocessing.scale(x)).float()

    def shift_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, labels = batch
        rows = torch.cdist(inputs, pictures).argmin(1)
        assert torch.equal(inputs, pictures[rows])
        return (labels - torch.tensor(y)[rows]) % 10

    shift = shift_of(digits.noisy)
    assert set(shift.tolist()) == ({*range(10)} if is_symmetric else {0, 1})
    assert (shift != 0).double().mean().item() == pytest.approx(share, abs=0.05)
    assert not shift_of(digits.checked).any()
    assert not shift_of(digits.test).any()


def test_the_page_of_published_methods_says_what_the_rows_say(simpler: ModuleType) -> None:
    rows = read(RESULTS / "something_simpler.jsonl")
    page = (ROOT / "docs" / "meta-learning.md").read_text()
    ((weights, gold),) = re.findall(r"([\d.]+) %, gold loss correction ([\d.]+)", page)
    for arm, said in ((simpler.WEIGHTS, weights), (simpler.GOLD, gold)):
        assert float(said) == points(simpler.accuracies(rows, case="wrong_labels", arm=arm))


def test_the_page_of_evidence_says_what_the_rows_of_the_rivals_say(simpler: ModuleType) -> None:
    rows = read(RESULTS / "something_simpler.jsonl")
    page = (ROOT / "docs" / "evidence.md").read_text()

    def row_of(words: str) -> str:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {words}")]
        return line

    def beside(case: str, first: str, second: str) -> str:
        pair = (simpler.accuracies(rows, case=case, arm=arm) for arm in (first, second))
        found: str = simpler.beside(*pair)
        return found

    generalized = beside("wrong_labels", simpler.WEIGHTS, simpler.GENERALIZED)
    assert generalized in row_of("`ExampleWeights`")
    for arm in (simpler.SCALED, simpler.NEAREST):
        assert beside("distilled", simpler.LEARNED, arm) in row_of("ten distilled digits")
    spread = beside("command", simpler.SPREADING, simpler.COMMAND).replace("+", "")
    assert f"**behind** by {spread}" in row_of("`metapl train digits")
    baseline = beside("command", simpler.COMMAND, simpler.REGRESSION)
    assert baseline in row_of("`metapl train digits")

    errors = {
        arm: [row["error"] for row in simpler.rows_of(rows, case="sinusoids", arm=arm, final=True)]
        for arm in simpler.START_ARMS
    }
    for arm in (simpler.FIRST_ORDER, simpler.REPTILE, simpler.LONGER):
        difference = simpler.interval(errors[simpler.MAML], errors[arm], "+.2f")
        assert difference in row_of("MAML on sinusoids")

    stacked = simpler.rows_of(rows, case="stacked", arm=simpler.STACKED_OURS)
    ratios = {row["network"]: f"{row['ratio']:.2f}" for row in stacked}
    assert f"**behind**: {ratios['tiny']} (" in row_of("32 stacked seeds")
    assert f"on the larger, {ratios['mlp']} |" in row_of("32 stacked seeds")
    steps = {(row["network"], row["arm"]): row for row in simpler.rows_of(rows, case="steps")}
    ratios = {key: f"{row['ratio']:.2f}" for key, row in steps.items()}
    compiled = row_of("a compiled step of an MLP")
    assert f"{ratios['tiny', simpler.OURS]} (quartiles" in compiled
    assert f"by hand {ratios['tiny', simpler.HAND_ALIKE]}" in compiled
    of_larger = f"{ratios['mlp', simpler.OURS]} and {ratios['mlp', simpler.HAND_ALIKE]} on"
    assert of_larger in compiled
    times = [
        f"{steps[network, simpler.OURS]['ms'] / steps[network, simpler.HAND_ALIKE]['ms']:.2f}"
        for network in simpler.STEP_NETWORKS
    ]
    modes = (ROOT / "docs" / "modes.md").read_text()
    assert f"{times[0]} and {times[1]} times as long as [by hand with equal" in modes
    taken = []
    for arm in (simpler.REMOVED_HAND, simpler.REMOVED_OURS):
        of_arm = simpler.rows_of(rows, case="removals", arm=arm)
        taken += [f"{statistics.median(row['plain_trainings']):.0f}" for row in of_arm]
    words = "{} and {} plain trainings, ours {} and {},".format(*taken)
    assert words in row_of("100 trainings without")
    taken = []
    for arm in (
        simpler.SCORES_STEPS,
        simpler.SCORES_OURS,
        simpler.SCORES_HAND,
        simpler.SCORES_EAGER,
    ):
        of_arm = simpler.rows_of(rows, case="scores", arm=arm)
        taken += [f"{statistics.median(row['plain_trainings']):.1f}" for row in of_arm]
    words = (
        "{} and {} plain trainings, ours {} and {} once compiled; one graph of double backward {} "
        "and {}, ours eager {} and {};"
    )
    assert words.format(*taken) in row_of("an attribution in 2.4")
    megabytes = {
        (row["network"], row["arm"]): f"{row['bytes'] / 1e6:.0f}"
        for row in simpler.rows_of(rows, case="memory")
    }
    assert f"{megabytes['WRN-28-2', simpler.CHECKPOINTS]} MB" in row_of("ten steps of WRN")
    of_language_model = megabytes[simpler.LANGUAGE, simpler.CHECKPOINTS]
    assert f"{of_language_model} MB" in row_of("0.43 of double backward")


def test_the_page_is_short() -> None:
    text = (ROOT / "docs" / "something-simpler.md").read_text()
    prose = re.sub(r"^(?:\||<!--).*$", "", text, flags=re.MULTILINE)
    assert len(prose.split()) <= 700
