"""The test of feedback on Fashion-MNIST trains, counts and decides as it was declared."""

import importlib
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tape import record_on_tape
from torch.nn import functional as F

from metapl.functional import cuda_graphs

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]

CPU = torch.device("cpu")


@pytest.fixture
def study(as_scripts: None) -> Any:
    return importlib.import_module("fashion_feedback")


def a_batch(study: Any, runs: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def pictures(rows: int) -> torch.Tensor:
        return torch.randn(runs, rows, study.PIXELS, generator=generator)

    labels = torch.randint(0, 10, (runs, 40), generator=generator)
    return study.Batch(pictures(40), labels, pictures(64), pictures(64), labels)


def two_runs(study: Any, method: str) -> list[Any]:
    """Return runs of one method and temperature whose other settings differ."""
    grid = study.GRIDS[method]
    others = [settings for settings in grid if settings.temperature == grid[0].temperature]
    return [study.Run(others[0], 1), study.Run(others[-1], 2)]


def test_a_convolution_is_that_of_torch(study: Any) -> None:
    ours = study.Convolution(3, 5, padding=(1, 2))
    x = torch.randn(2, 7, 7, 3)
    # Ours reads (square down, square right, pixel down, pixel right, channel).
    weight = ours.linear.weight.view(5, 2, 2, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(5, 3, 4, 4)
    padded = F.pad(x.permute(0, 3, 1, 2), (1, 2, 1, 2))
    expected = F.conv2d(padded, weight, ours.linear.bias, stride=2)
    torch.testing.assert_close(ours(x), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("method", ["mpl", "uda_aligned"])
def test_each_run_of_a_stack_takes_the_steps_of_its_own_trainer(study: Any, method: str) -> None:
    runs = two_runs(study, method)
    with torch.no_grad():
        stacked = study.Stack(runs, 10, CPU, constant_rates=True)
        batches = [a_batch(study, 2, seed) for seed in range(3)]
        for batch in batches:
            stacked.step(batch)
    for index, run in enumerate(runs):
        torch.manual_seed(run.seed)
        trainer = study.trainer_of(run.settings, study.Classifier(), study.Classifier())
        for batch in batches:
            outer, inner = stacked.outer_and_inner(batch)
            trainer.step(tuple(part[index] for part in outer), tuple(part[index] for part in inner))
        for name, p in trainer.student.named_parameters():
            torch.testing.assert_close(stacked.state.student.params[name][index], p.detach())


def test_the_weight_of_the_feedback_is_a_factor_of_the_teachers_gradient(study: Any) -> None:
    settings = [study.Settings("mpl", 0.1, 1.0, 0.5, weight) for weight in (0.0, 1.0, 3.0)]
    with torch.no_grad():
        stacked = study.Stack([study.Run(one, 0) for one in settings], 10, CPU)
        batch = a_batch(study, 1)
        same = study.Batch(
            *(
                getattr(batch, name).expand(3, *[-1] * (getattr(batch, name).dim() - 1)).clone()
                for name in ("labeled", "labels", "weak", "strong", "truth")
            )
        )
        stacked.step(same)
    for t in stacked.state.teacher.params.values():
        torch.testing.assert_close(t[2] - t[0], 3 * (t[1] - t[0]), rtol=1e-3, atol=1e-7)
    assert any(not torch.equal(t[0], t[1]) for t in stacked.state.teacher.params.values())


def test_a_recorded_step_is_the_step_and_a_failed_recording_is_said(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained() -> Any:
        study.REPEATED_STEPS.clear()
        # Two stacks after each other, of which the second uses the first one's recording.
        for _ in range(2):
            stacked = study.Stack(two_runs(study, "mpl"), 10, CPU)
            for seed in range(3):
                stacked.step(a_batch(study, 2, seed))
        return stacked

    def no_recording(*arguments: Any) -> Any:
        raise RuntimeError("no graph\nof this")

    with torch.no_grad():
        plain = trained()
        monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", record_on_tape)
        recorded = trained()
        monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", no_recording)
        failed = trained()
    assert plain.execution == "operations"
    assert recorded.execution == "CUDA graph"
    assert failed.execution == "operations (no CUDA graph: RuntimeError: no graph)"
    assert failed.execution in capsys.readouterr().err
    for name, t in plain.average.items():
        torch.testing.assert_close(recorded.average[name], t)
        assert torch.equal(failed.average[name], t)
        assert not torch.equal(t, plain.network.state_dict()[name].expand_as(t))


def test_arms_have_equal_operations_and_equally_many_settings(study: Any) -> None:
    operations = {method: study.operations_of_step(method) for method in study.METHODS}
    size = study.Size(miniature=False, stack=4, device=CPU)
    totals = [operations[method] * size.steps(method) for method in study.METHODS]
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)
    assert len(study.GRIDS["mpl"]) == len(study.GRIDS["uda_aligned"]) == 8
    assert study.weights_of_network() == 26_578


def test_a_split_has_its_labels_and_no_picture_twice(study: Any) -> None:
    pictures = study.read_pictures(study.Path("none"), miniature=True, device=CPU)
    settings = study.GRIDS["mpl"][0]
    runs = [study.Run(settings, 0, 4), study.Run(settings, 1, 8)]
    splits = study.split(pictures, runs, validation=100)
    for index, run in enumerate(runs):
        labeled = splits.labeled[index].unique()
        assert pictures.training_labels[labeled].bincount().tolist() == [run.labels_per_class] * 10
        for rows in splits.labeled[index]:
            assert pictures.training_labels[rows].bincount().tolist() == [4] * 10
        parts = [labeled, splits.unlabeled[index], splits.validation[index]]
        rows = torch.cat(parts)
        assert len(rows.unique()) == len(rows)
    alone = study.split(pictures, runs[:1], validation=100)
    assert len(alone.unlabeled[0]) == len(pictures.training) - 40 - 100
    for batch_of_two, batch_of_one in zip(
        study.batches(pictures, study.split(pictures, [runs[0]] * 2, validation=100), [0, 5], 30),
        study.batches(pictures, alone, [0], 30),
        strict=True,
    ):
        assert torch.equal(batch_of_two.strong[0], batch_of_one.strong[0])
        assert torch.equal(batch_of_two.labeled[0], batch_of_one.labeled[0])


def test_the_number_of_seeds_follows_from_the_pilot(study: Any) -> None:
    def rows(part: str, differences: list[float]) -> list[dict[str, Any]]:
        rows_of_part = []
        for method in study.METHODS:
            settings = asdict(study.GRIDS[method][0])
            for seed, difference in enumerate(differences):
                accuracy = 0.7 + difference if method == "mpl" else 0.7
                row = {"part": part, "method": method, "seed": seed, "settings": settings}
                rows_of_part.append({**row, "average": accuracy, "finetuned": 0.5})
        return rows_of_part

    def plan(deviation: float) -> Any:
        differences = [scale * deviation for scale in (-1, -1, 1, 1)]
        spread = math.sqrt(4 / 3)
        pilot = rows("pilot", [difference / spread for difference in differences])
        return study.plan_of(rows("tuning", [0.0]) + pilot, size=None)

    # (2.8 * 4)^2 = 125.44
    assert (plan(0.04).computed, plan(0.04).seeds) == (126, 128)
    assert (plan(0.01).computed, plan(0.01).seeds) == (8, 64)
    assert plan(0.1).seeds == 320
    tuning = rows("tuning", [0.0]) + rows("pilot", [0.01, -0.01, 0.02, 0.0])
    above = study.verdict(tuning + rows("final", [0.02, 0.01] * 10))
    assert "| +1.5 (" in above
    assert "| yes |" in above
    assert "| below |" in study.verdict(tuning + rows("final", [-0.02, -0.01] * 10))
    assert "| no |" in study.verdict(tuning + rows("final", [-0.02, 0.02] * 10))


def test_signs_are_those_of_the_gradient_at_the_teachers_logits(study: Any) -> None:
    q = torch.tensor([[[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]])
    h = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 2.0, 2.0]]])
    logits = q.log().requires_grad_()
    (logits.softmax(-1) * h).sum().backward()
    expected = logits.grad[..., 0] > 0
    assert study.is_raised(h, q, q.argmax(-1, keepdim=True)).tolist() == expected.tolist()
    assert expected.tolist() == [[True, False]]


def test_no_seed_has_two_parts(study: Any) -> None:
    seeds = [seed for of_part in study.SEEDS.values() for seed in of_part]
    assert len(seeds) == len(set(seeds))
