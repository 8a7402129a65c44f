"""The examples run as they stand and print what they promise."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import metapl
from metapl.apps.pictures import load_digits_split

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]


def output(name: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{name}", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_all_modes_prints_each_mode_and_its_cosine_to_the_exact_gradient() -> None:
    rows = dict(line.split(maxsplit=1) for line in output("all_modes.py").splitlines()[1:])
    assert tuple(rows) == tuple(mode for mode in metapl.MODES if mode != "implicit")
    cosines = {mode: [float(c) for c in row.split()[:2]] for mode, row in rows.items()}
    for exact in ("unrolled", "forward", "difference"):
        assert min(cosines[exact]) > 0.999
    assert cosines["reinforce_per_example"][1] > 0.99
    assert cosines["reinforce"][1] > 0.8
    assert cosines["loss_difference"][1] > 0.8
    assert cosines["none"] == [0, 0]


def test_stability_prints_the_distance_of_each_mode_over_its_settings() -> None:
    rows = [line.split() for line in output("stability.py", "--draws", "2", "--steps", "5").splitlines()]
    numbers = [[float(cell) for cell in row] for row in rows if row and row[0][0].isdigit()]
    assert [len(row) for row in numbers] == [2] * 4 + [5] * 8
    assert all(row[1] < 1e-5 and row[2] < 0.01 < row[3] for row in numbers[4:])


@pytest.mark.long
def test_own_networks_learns_with_feedback_and_without() -> None:
    """One seed says nothing of the difference, and that is printed."""
    found = re.fullmatch(
        r"seed 3: student's accuracy ([\d.]+) % with feedback, ([\d.]+) % without\n"
        r"One seed does not show whether the feedback helps: give several, such as 0 1 2 3 4 5 6 7\.\n",
        output("own_networks.py", "3"),
    )
    assert found is not None
    assert min(float(found[1]), float(found[2])) > 60
    assert found[1] != found[2]


@pytest.mark.long
def test_tabular_is_no_worse_than_logistic_regression() -> None:
    """On the mean of its seeds, less a point; the figures of twelve seeds are in the example's own text."""
    printed = output("tabular.py")
    tables = re.findall(
        r"(?:breast cancer|wine), 5 labels a class, test accuracy in % over 3 seeds\n((?:  .*\n)+)", printed
    )
    assert len(tables) == 2
    for table in tables:
        found = dict(re.findall(r"^  (\S.*?) {2,}([\d.]+) ±", table, re.MULTILINE))
        assert list(found) == ["logistic regression", "MPL", "MPL's teacher", "no feedback"]
        assert float(found["MPL"]) > max(80, float(found["logistic regression"]) - 1)


@pytest.mark.long
def test_tabular_takes_seeds() -> None:
    assert output("tabular.py", "--seeds", "4").count("over 1 seeds") == 2


LABEL_METHODS = {
    "meta_weight_net": "MetaWeightNet",
    "learning_to_reweight": "LearningToReweight",
    "example_weights": "ExampleWeights",
    "example_labels": "ExampleLabels",
    "label_correction": "LabelCorrection",
    "noise_transition": "NoiseTransition",
    "your_own_method": "trust in pairs",
}


def printed(name: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What an example prints, run in this process."""
    patch.setattr(sys, "argv", [name, *arguments])
    patch.syspath_prepend(ROOT / "examples")
    with torch.random.fork_rng():
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def compared(
    name: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, tuple[float, float, float]]:
    """By the kind of noise: accuracies of the method and of plain training, and their difference, as printed."""
    line = rf"(\w+): ([\d.]+) by {LABEL_METHODS[name]}, ([\d.]+) by plain training, difference ([+-][\d.]+) ± [\d.]+ "
    found = re.findall(line, printed(name, patch, capsys, *arguments))
    return {noise: (float(a), float(b), float(d)) for noise, a, b, d in found}


@pytest.mark.parametrize("name", LABEL_METHODS)
def test_a_label_method_is_compared_with_plain_training_on_two_kinds_of_noise(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(name, monkeypatch, capsys, "3", "--steps", "3")
    assert list(found) == ["symmetric", "asymmetric"]
    for own, plain, difference in found.values():
        assert abs(own - plain - difference) < 0.11  # each is rounded
        assert min(own, plain) > 40


def test_learning_to_reweight_is_better_than_plain_training_on_asymmetric_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, plain, difference = compared("learning_to_reweight", monkeypatch, capsys, "0")["asymmetric"]
    assert difference > 2
    assert plain > 75
    assert own > 88


def test_ten_learned_images_teach_more_than_ten_real_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = printed("distilled_digits", monkeypatch, capsys, "3", "--steps", "40")
    found = re.search(r"over 1 seeds: ([\d.]+) ± [\d.]+ on learned ones, ([\d.]+) ± [\d.]+ on random real ones", line)
    assert found is not None
    assert float(found[1]) > float(found[2]) + 5


def test_a_rater_of_text_tells_what_it_finds_and_what_is_gained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed("data_rater", monkeypatch, capsys, "3", "--steps", "50")
    areas = re.search(r"AUC of documentation against source code ([\d.]+), against shuffled ([\d.]+)", text)
    reached = re.search(r"perplexity: ([\d.]+) on everything, ([\d.]+) rated, ([\d.]+) documentation alone", text)
    assert areas is not None
    assert reached is not None
    assert min(map(float, areas.groups())) > 0.6
    everything, rated, clean = map(float, reached.groups())
    assert clean < rated < everything


def test_the_noise_of_an_augmentation_is_learned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = printed("learned_augmentation", monkeypatch, capsys, "3", "--steps", "200")
    found = re.search(r": ([\d.]+) with noise that was learned \(0\.1 -> ([\d.]+)\), ([\d.]+) with 0\.1", line)
    assert found is not None
    assert 0.15 < float(found[2]) < 1
    assert float(found[1]) > float(found[3])


def test_the_hyperparameters_of_an_example_are_learned() -> None:
    example = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "learned_hyperparameters.py")))
    (loss, logs, _), (later, moved, _) = example.learn(load_digits_split(10, 3), 3, rounds=2)
    assert later < loss
    torch.testing.assert_close(logs["decay"].exp(), torch.full((3,), 0.001))
    assert (moved["decay"] < logs["decay"]).all()


def test_the_gradient_in_hyperparameters_is_that_of_double_backward_by_hand() -> None:
    example = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "learned_hyperparameters.py")))
    problem, draw = example.Hyperparameters(), torch.Generator().manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.GELU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    values = {"decay": [0.02, 0.03, 0.01], "smoothing": [0.2], "noise": [0.3], "shift": [0.4]}
    logs = nn.ParameterDict({name: torch.tensor(of).double().log() for name, of in values.items()})
    student = student.double()
    batches = [
        (torch.rand(6, 1, 8, 8, generator=draw).double(), torch.randint(3, (6,), generator=draw)) for _ in range(5)
    ]
    *ahead, outer = batches
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = metapl.hypergradient(
            logs, student, outer=outer, inner=metapl.Lookahead(ahead), problem=problem, inner_optimizer=optimizer
        )
        torch.manual_seed(1)
        params, signal = dict(student.named_parameters()), problem.signal(logs, None, None, generator=None)
        velocity = {name: torch.zeros_like(p) for name, p in params.items()}
        for batch in ahead:
            outputs = functional_call(student, params, (problem.student_input(batch, signal),))
            loss = problem.inner_loss(outputs, signal, batch, params).mean()
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            velocity = {name: 0.9 * velocity[name] + g for name, g in zip(params, grads, strict=True)}
            params = {name: p - 0.3 * velocity[name] for name, p in params.items()}
        loss = problem.outer_loss(functional_call(student, params, (outer[0],)), outer)
    torch.testing.assert_close(found.outer_loss, loss.detach(), rtol=1e-12, atol=0)
    for (name, log), by_hand in zip(logs.items(), torch.autograd.grad(loss, [*logs.values()]), strict=True):
        assert float(by_hand.abs().min()) > 1e-6
        assert log.shape == by_hand.shape
        torch.testing.assert_close(found.grads[name], by_hand, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "of", "outputs"), [("maml_digits", "Digits", 6), ("maml_sinusoids", "Sinusoids", 1)])
def test_the_gradient_in_the_start_of_maml_is_that_of_double_backward(
    name: str, of: str, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / f"{name}.py")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = vars(example)[of]()
        few, many = ([t.double() if t.is_floating_point() else t for t in part] for part in problem.draw())
        network = nn.Sequential(nn.Linear(few[0].shape[-1], 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    student = example.EachTask(network)
    given = {"problem": problem, "inner_optimizer": torch.optim.SGD(student.parameters(), 0.1), "outer": many}
    found = metapl.hypergradient(None, student, inner=metapl.Lookahead([few] * 5), wrt="start", **given)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = functional_call(network, params, (x,))
        return nn.functional.cross_entropy(z, y) if outputs > 1 else (z - y).square().mean()

    start = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    losses = []
    for x, y, others, truth in zip(*few, *many, strict=True):
        params = start
        for _ in range(5):
            grads = torch.autograd.grad(loss(params, x, y), list(params.values()), create_graph=True)
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(loss(params, others, truth))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(start.values()))
    for own, by_hand in zip(found.start.values(), expected, strict=True):
        assert (own.sum(0) - by_hand).abs().max() < 1e-7 * by_hand.abs().max()


@pytest.mark.long
def test_a_start_that_is_learned_fits_new_sinusoids_and_known_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    sinusoids, digits = (runpy.run_path(str(ROOT / "examples" / f"maml_{of}.py")) for of in ("sinusoids", "digits"))
    with torch.random.fork_rng():
        random, together, learned = sinusoids["errors"](7, rounds=200)
        *_, of_random, _, of_learned = digits["accuracies"](7, rounds=60)
    assert learned < together < random
    assert of_learned > of_random + 5


def test_a_schedule_of_an_example_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "learned_schedule.py"))
    for name, value in {"STEPS": 20, "START": {n: log - 1 for n, log in example["START"].items()}}.items():
        monkeypatch.setitem(example["learn"].__globals__, name, value)
    with torch.random.fork_rng():
        (loss, logs, student), (later, moved, _) = example["learn"](load_digits_split(10, 3), 3, rounds=2)
    assert later < loss  # from a small rate
    assert student[-1].weight.shape == (10, 64)
    assert all((moved[name] != log).all() for name, log in logs.items())
    assert example["settings"](moved)["lr"].shape == (20, 3)


def test_a_start_for_fine_tuning_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean loss after fine-tuning on the same digits falls."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = runpy.run_path(str(ROOT / "examples" / "learned_start.py"))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        (x, y), _ = example["split"]()
        monkeypatch.setitem(example["learn"].__globals__, "draw", lambda *_: [(x[:20], y[:20]), (x[20:220], y[20:220])])
        student = metapl.models.mlp([64, 32, 10])
        sgd = torch.optim.SGD(student.parameters(), 0.03, momentum=0.9)
        given: Any = {"outer": (x[20:220], y[20:220]), "inner": metapl.Lookahead([(x[:20], y[:20])] * 20)}
        given |= {"problem": metapl.problems.EqualWeights(), "inner_optimizer": sgd}
        before = metapl.hypergradient(None, student, **given)
        example["learn"](student, x, y, 15)
        assert metapl.hypergradient(None, student, **given).outer_loss < 0.98 * before.outer_loss


def test_two_moons_prints_the_rate_of_each_method_and_draws_its_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    for more in ([], ["--uda"]):
        arguments = ("--seeds", "3", "--steps", "4", "--out", str(tmp_path / "regions.png"), *more)
        text = printed("two_moons", monkeypatch, capsys, *arguments)
        rows = re.findall(r"^(\S.*?) +(\d) of 3 +(\d+)-(\d+) % +([\d.]+) %$", text, re.MULTILINE)
        assert [name for name, *_ in rows] == ["supervised", "pseudo-labels", "MPL", "no feedback"]
        assert "MPL and the same loop without feedback: p = 1 " in text
        assert (tmp_path / "regions.png").read_bytes().startswith(b"\x89PNG")
    torch.set_num_threads(threads)


def test_the_seeds_of_two_moons_end_beside_others_as_they_do_alone() -> None:
    two_moons = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "two_moons.py")))
    try:
        torch.set_default_dtype(torch.float64)
        together, alone = (two_moons.Moons(seeds, 5, True, 10.0) for seeds in (range(4), range(2, 3)))
        for method in two_moons.METHODS:
            for moons in (together, alone):
                moons.x = moons.x.double()
                moons.few = moons.few[0].double(), moons.few[1]
                moons.train(method)
            for many, one in zip(*(moons.networks[method].parameters() for moons in (together, alone)), strict=True):
                torch.testing.assert_close(many[2], one[0], rtol=1e-9, atol=1e-12)
                assert not torch.allclose(many[1], one[0])
    finally:
        torch.set_default_dtype(torch.float32)
