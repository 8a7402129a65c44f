"""The loop around the steps: what it averages, selects and writes.

It is compared with hand computations. One process at a time writes to a folder.
"""

from __future__ import annotations

import inspect
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from feed_sources import same
from fits import (
    OPTIONS,
    VALIDATION,
    Counting,
    _one_thread,  # noqa: F401  # used by every test
    batches,
    bilevel,
    copied,
    end_of,
    events,
    network,
    rows,
    single,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl
from metapl import MetaplError, StopFit
from metapl.execution.ranks import ALONE
from metapl.metrics import evaluate_logits
from metapl.runs import folder as folders
from metapl.runs.checkpoint import CheckpointFolder
from metapl.training import Trainer
from metapl.training.base import FinetuneKeywords
from metapl.training.options import FitKeywords, FitOptions
from metapl.training.records import figures


@pytest.mark.parametrize(("decay", "validation"), [(0.3, None), (0.99, VALIDATION)])
def test_the_average_is_that_of_a_loop_by_hand(decay: float, validation: Any) -> None:
    fitted, twin, (labeled, unlabeled) = bilevel(), bilevel(), batches(8)
    torch.manual_seed(1)
    found = fitted.fit(
        labeled, unlabeled, steps=8, schedule="constant", ema_decay=decay, validation=validation
    )
    torch.manual_seed(1)
    average = copied(twin.student)
    for t, data in enumerate(zip(labeled, unlabeled, strict=True)):
        twin.step(*data)
        d = min(decay, (1 + t) / (10 + t))
        average = {n: d * average[n] + (1 - d) * p for n, p in copied(twin.student).items()}
    # Statistics are the student's own.
    buffers = {n: b.clone() for n, b in twin.student.named_buffers()}
    for name, value in {**average, **buffers}.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(fitted.student.state_dict()[name], found.weights[name])
    assert any(not torch.equal(found.weights[n], p) for n, p in twin.student.named_parameters())


def test_the_latest_best_by_validation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first before the first step.
    trainer, steps, wanted = (
        single(),
        5,
        iter([0.9, 0.2, 0.6, 0.4, 0.6, 0.5]),
    )
    seen: list[dict[str, Tensor]] = []

    def scripted(*_: Any) -> Any:
        seen.append(copied(trainer.student))
        accuracy = next(wanted)
        return type("Found", (), {"value": accuracy, "n": len(VALIDATION[1])})

    monkeypatch.setattr("metapl.metrics.metric.evaluate_logits", scripted)
    found = trainer.fit(batches(3)[0], steps=steps, validation=VALIDATION, validate_every=1)
    assert (found.validation_accuracy, found.step, len(seen)) == (0.6, 4, 1 + steps)
    assert same(found.weights, seen[4])
    assert same(copied(trainer.student), seen[4])
    assert not same(seen[2], seen[4])


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_was_validated_is_what_is_kept(ema: float | None) -> None:
    trainer = single()
    found = trainer.fit(
        batches(4)[0], steps=30, validation=VALIDATION, validate_every=7, ema_decay=ema
    )
    assert found.step in (7, 14, 21, 28, 30)
    assert found.validation_accuracy == trainer.evaluate(VALIDATION).accuracy
    model = network().eval()
    model.load_state_dict(found.weights)
    assert (
        evaluate_logits(model(VALIDATION[0]), VALIDATION[1]).accuracy == found.validation_accuracy
    )


def poisoned(number: int, at: int) -> list[Any]:
    """Return batches whose inputs are finite throughout.

    The network of :func:`trapped` is not finite on batch ``at``.
    """
    labeled = batches(number)[0]
    labeled[at - 1][0][0, 0] = 1e6
    return labeled


def trapped(trainer: Any) -> Any:
    def trap(module: nn.Module, given: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits * (math.nan if given[0].max() > 1e5 else 1.0)

    trainer.student.register_forward_hook(trap)
    return trainer


@pytest.mark.parametrize("trainer", [single, bilevel])
@pytest.mark.parametrize("bad", [1, 8, 10, 12, 20])
def test_a_nan_stops_the_run_at_its_step(
    trainer: Callable[[], Trainer], bad: int, tmp_path: Path
) -> None:
    """Between the steps that are logged, validated or saved as well as on them."""
    labeled, unlabeled = poisoned(20, bad), batches(20)[1]
    saved = 4 * ((bad - 1) // 4)
    with pytest.raises(MetaplError, match=f"step {bad}\\b"):
        trapped(trainer()).fit(
            labeled,
            unlabeled,
            steps=20,
            log_every=5,
            save_every=4,
            validation=VALIDATION,
            validate_every=6,
            out=tmp_path,
        )
    kept = CheckpointFolder(tmp_path / "checkpoints/fit").newest()
    assert (kept.state["step"] if kept else 0) == saved
    if (tmp_path / "metrics.jsonl").exists():  # a first step that is refused leaves nothing
        assert all(row["step"] < bad for row in rows(tmp_path))
    if kept:
        assert all(
            torch.isfinite(t).all() for t in pytree.tree_leaves(kept.state) if isinstance(t, Tensor)
        )


def test_weights_that_blow_up_are_not_saved_although_the_loss_is_finite(tmp_path: Path) -> None:
    trainer = single()
    trainer.student[0].weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(MetaplError):
        trainer.fit(batches(4)[0], steps=5, save_every=1, log_every=5, out=tmp_path)
    assert not list(tmp_path.glob("checkpoints/**/*.ckpt"))


# ---------------------------------------------------------------------------------------- callbacks

QUIET: dict[str, Any] = {"say": lambda _: None, "schedule": "constant", "log_every": 2}


def stop_at(step: int, reason: str = "enough") -> Callable[..., None]:
    def stop(at: int, row: Any, trainer: Any) -> None:
        if at == step:
            raise StopFit(reason)

    return stop


@pytest.mark.parametrize("trainer", [single, bilevel])
def test_each_callback_sees_every_recorded_row_in_turn(
    trainer: Callable[[], Any], tmp_path: Path
) -> None:
    one, seen = trainer(), []
    calls = [lambda *given, name=name: seen.append((name, *given)) for name in "ab"]
    found = one.fit(
        *batches(4),
        steps=7,
        log_every=2,
        validation=VALIDATION,
        validate_every=3,
        out=tmp_path,
        callbacks=calls,
    )
    assert [(name, step) for name, step, _, _ in seen] == [
        (n, step) for step in (2, 3, 4, 6, 7) for n in "ab"
    ]
    assert all(who is one for *_, who in seen)
    logged = [
        {name: value for name, value in row.items() if name != "phase"} for row in rows(tmp_path)
    ]
    assert [row for name, _, row, _ in seen if name == "a"] == logged == found.history
    assert [
        row["step"]
        for row in single().fit(batches(4)[0], steps=4, log_every=2, validate_every=1).history
    ] == [
        2,
        4,
    ]
    assert "student_validation_accuracy" in found.history[1]
    assert "loss_cross_entropy" in found.history[0] or "outer_loss" in found.history[0]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_fit_that_is_stopped_is_one_of_so_many_steps(ema: float | None, tmp_path: Path) -> None:
    """The steps that were done are kept, and saved; the other callbacks see the last row too."""
    ends, seen, said = [], [], []
    for steps, calls in ((20, [stop_at(6), lambda step, *_: seen.append(step)]), (6, [])):
        trainer = bilevel()
        torch.manual_seed(1)
        out = tmp_path / str(steps)
        how = QUIET | {
            "say": said.append,
            "save_every": 5,
            "ema_decay": ema,
            "validation": VALIDATION,
            "select": False,
        }
        found = trainer.fit(*batches(4), steps=steps, out=out, callbacks=calls, **how)
        last = CheckpointFolder(out / "checkpoints/fit").newest()
        assert last is not None
        assert (found.step, last.state["step"]) == (6, 6)
        ends.append((trainer.state_dict(), found.weights, last.state["trainer"]))
        again = bilevel().fit(
            *batches(4), steps=steps, out=out, resume=True, **how | {"say": lambda _: None}
        )
        assert (again.step, again.value) == (6, found.value), "it has ended"
    assert same(*ends)
    assert (seen, said) == ([2, 4, 6], ["stopped after step 6 by a callback: enough"])


# ---------------------------------------------------------------------------------- what is written

SCALARS = {
    *(
        "inner_loss",
        "outer_loss",
        "teacher_loss",
        "teacher_cross_entropy",
        "inner_lr",
        "outer_lr",
    ),
    *(
        "feedback_mean",
        "feedback_std",
        "feedback_snr",
        "pseudo_label_confidence",
        "pseudo_label_entropy",
        "agreement",
    ),
    *(
        "feedback_rms",
        "pseudo_label_class_entropy",
        "student_class_entropy",
        "labeled_class_entropy",
    ),
    *("class_shares_vs_labeled", "student_validation_accuracy", "teacher_validation_accuracy"),
}


def test_tensorboard_shows_what_the_rows_say_each_step_once(tmp_path: Path) -> None:
    """Rows are right after a resume too, whose lost steps are purged.

    A second phase with the same step numbers may stand beside them.
    """
    labeled, unlabeled = batches(5)
    how: dict[str, Any] = {**OPTIONS, "steps": 17, "out": tmp_path, "log_every": 2}
    breaking = Counting(labeled, 9, lambda: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError, match="stop"):
        bilevel().fit(breaking, unlabeled, **how)
    trainer = bilevel()
    trainer.fit(labeled, unlabeled, resume=True, say=lambda _: None, **how)
    trainer.finetune(labeled, steps=6, out=tmp_path, log_every=1)
    found, logged = events(tmp_path / "tensorboard/fit"), rows(tmp_path)
    assert set(found.Tags()["scalars"]) >= SCALARS
    for name in SCALARS:
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        assert shown == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged if name in row
        ]
    assert [e.step for e in events(tmp_path / "tensorboard/finetune").Scalars("loss")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def digits_trainer() -> tuple[metapl.BilevelTrainer, dict[str, Any]]:
    """Return a trainer on handwritten digits, and the options of a fit of it that has patience."""
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    teacher, student = metapl.models.mlp([64, 32, 10]), metapl.models.mlp([64, 32, 10])
    options: dict[str, Any] = {
        "labeled": (x[:100], y[:100]),
        "unlabeled": x[100:1200],
        "batch_size": 50,
        "validation": (x[1200:], y[1200:]),
        "steps": 1000,
        "validate_every": 10,
        "save_every": 10,
        "patience": 4,
    }
    return metapl.BilevelTrainer(teacher, student, verify=False), options


def test_patience_ends_a_fit_on_digits_at_its_best_student(tmp_path: Path) -> None:
    trainer, options = digits_trainer()
    lines: list[str] = []
    result = trainer.fit(**options, out=tmp_path / "whole", say=lines.append)
    measured = [row for row in result.history if "student_validation_accuracy" in row]
    values = [row["student_validation_accuracy"] for row in measured]
    # No value after the best one is better, and it took no step after the fourth of these.
    assert trainer.steps_done == measured[-1]["step"] < options["steps"]
    assert values.index(max(values)) == len(values) - 1 - options["patience"]
    assert result.value == max(values) > 0.8
    assert trainer.evaluate(options["validation"]).value == result.value
    assert lines[-1] == (
        f"stopped after step {trainer.steps_done} by patience: the last 4 validations have no "
        f"better accuracy than {max(values):.4g}"
    )

    # A fit that breaks off between the best validation and the last one counts on.
    breaks_at = measured[-2]["step"]

    def break_off(step: int, row: Any, trainer: Any) -> None:
        if step == breaks_at:
            raise KeyError("break")

    stopped, options = digits_trainer()
    with pytest.raises(KeyError, match="break"):
        stopped.fit(**options, out=tmp_path / "stopped", callbacks=[break_off])
    resumed, options = digits_trainer()
    again = resumed.fit(**options, out=tmp_path / "stopped", resume=True)
    end = end_of(trainer, result, tmp_path / "whole")
    assert same(end, end_of(resumed, again, tmp_path / "stopped"))


def test_an_ended_fit_stays_ended_when_it_is_resumed(tmp_path: Path) -> None:
    trainer, options = digits_trainer()
    ended = trainer.fit(**options, out=tmp_path)
    resumed, options = digits_trainer()
    again = resumed.fit(**options, out=tmp_path, resume=True)
    assert resumed.steps_done == trainer.steps_done < options["steps"]
    assert same(ended.weights, again.weights)
    other, options = digits_trainer()
    with pytest.raises(MetaplError, match="patience was 4, now 5"):
        other.fit(**{**options, "patience": 5}, out=tmp_path, resume=True)


def test_damaged_lines_are_left_out_and_a_torn_one_is_written_anew(tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "schedule": "constant",
        "log_every": 1,
        "say": lambda _: None,
        "out": tmp_path,
    }
    single().fit(batches(5)[0], steps=4, **how)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"x" + file.read_bytes() + b'{"phase": "fit", "st')
    found = single().fit(batches(5)[0], steps=6, resume=True, **how)
    assert (
        [row["step"] for row in rows(tmp_path)]
        == [row["step"] for row in found.history]
        == [2, 3, 4, 5, 6]
    )


@pytest.mark.parametrize("mode", ["forward", "reinforce_per_example", "reinforce"])
def test_figures_of_the_feedback_are_those_of_a_loop_by_hand(mode: str) -> None:
    labeled, unlabeled = (one[0] for one in batches(1))
    trainer = bilevel(mode)
    report = trainer.step(labeled, unlabeled)
    found = {name: float(t) for name, t in figures(report, trainer.problem, labeled, ALONE).items()}
    h, logits = report.feedback.double(), report.signal.outputs
    assert found["feedback_mean"] == pytest.approx(float(h.mean()), rel=1e-6)
    assert found["feedback_std"] == pytest.approx(float(h.std(correction=0)), rel=1e-6)
    q = logits.softmax(1).double()
    assert found["pseudo_label_entropy"] == pytest.approx(
        float(-(q * q.log()).sum(1).mean()), rel=1e-5
    )
    assert found["feedback_rms"] == pytest.approx(float(h.square().mean().sqrt()), rel=1e-6)
    shares = torch.bincount(labeled[1], minlength=3) / len(labeled[1])
    of_student = report.student_outputs.softmax(1)
    for name, mean in (
        ("pseudo_label", q.mean(0)),
        ("student", of_student.mean(0)),
        ("labeled", shares),
    ):
        entropy = float(-(mean * mean.clamp_min(1e-30).log()).sum())
        assert found[f"{name}_class_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["class_shares_vs_labeled"] == pytest.approx(
        float((q.mean(0) - shares).abs().sum() / 2), rel=1e-5
    )
    if mode == "reinforce":
        assert "feedback_snr" not in found  # one number for all rows
        return
    z = logits.detach().double().requires_grad_()
    spoken = (
        z.softmax(1) if h.ndim == 2 else z.log_softmax(1)[range(len(h)), report.signal.value.long()]
    )
    [g] = torch.autograd.grad((h * spoken).sum(), z)
    mean, square, count = g.mean(0).square().sum(), g.square().sum(1).mean(), len(g)
    expected = float((count * mean - square) / (square - mean))
    assert math.isfinite(found["feedback_snr"])
    assert found["feedback_snr"] == pytest.approx(expected, rel=1e-4)


def held(out: Path, begun: Any) -> None:
    with folders.Folder(out).locked():
        begun.set()
        time.sleep(60)


def test_a_folder_that_another_process_writes_to_is_refused_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.2)
    processes = multiprocessing.get_context("fork")
    begun = processes.Event()
    other = processes.Process(target=held, args=(tmp_path, begun))
    other.start()
    begun.wait(60)
    with pytest.raises(MetaplError, match="process"):
        single().fit(batches(3)[0], steps=3, out=tmp_path)
    other.kill()
    other.join()
    single().fit(batches(3)[0], steps=3, out=tmp_path)
    folder = folders.Folder(tmp_path)
    with folder.locked():  # which may be locked again, as several phases in one folder do
        single().fit(batches(3)[0], steps=3, out=folder, phase="finetune")
    assert [row["step"] for row in rows(tmp_path, "finetune")] == [3]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ({"checkpoint_every": 2}, "save_every"),
        ({"valdation": VALIDATION}, "validation"),
        ({"workers": 2}, "num_workers"),
        ({"zzz": 1}, "validate_every"),  # nothing is like it: all are named
    ],
    ids=str,
)
def test_an_option_that_is_none_is_refused_with_the_nearest_names(
    wrong: dict[str, Any], nearest: str, tmp_path: Path
) -> None:
    alone, both, source = single(), bilevel(), batches(2)
    calls: list[tuple[Trainer, Callable[..., Any]]] = [
        (alone, alone.fit),
        (both, both.fit),
        (both, both.finetune),
    ]
    for trainer, fit in calls:
        before = copied(trainer.student)
        with pytest.raises(MetaplError) as refused:
            fit(source[0], steps=2, out=tmp_path / "run", **wrong)
        text = str(refused.value)
        assert text.startswith(f"fit has no option {next(iter(wrong))!r}; ")
        assert nearest in text
        assert "\n" not in text
        assert same(copied(trainer.student), before)
        assert trainer.steps_done == 0
    assert not (tmp_path / "run").exists()


def test_the_keywords_that_an_editor_shows_are_the_options() -> None:
    options, keywords = get_type_hints(FitOptions), get_type_hints(FitKeywords)
    options.pop("steps")
    assert keywords == options
    parameters = inspect.signature(Trainer.fit).parameters
    assert parameters["steps"].default is inspect.Parameter.empty
    sources = {"self", "labeled", "unlabeled", "inner", "outer", "steps", "options"}
    of_fit = {
        name: hint
        for name, hint in get_type_hints(Trainer.fit).items()
        if name in {*parameters} - sources
    }
    assert get_type_hints(FinetuneKeywords) == keywords | of_fit
    with pytest.raises(TypeError, match="steps"):
        single().fit(batches(1)[0])  # type: ignore[call-arg]
