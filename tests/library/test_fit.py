"""The loop around the steps: what it averages, selects and writes.

It is compared with hand computations. One process at a time writes to a folder.
"""

from __future__ import annotations

import inspect
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack, get_type_hints

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
from metapl.training import Trainer, loop
from metapl.training.loop import FinetuneKeywords
from metapl.training.options import FitKeywords, FitOptions
from metapl.training.records import figures


@pytest.mark.parametrize(("decay", "validation"), [(0.3, None), (0.99, VALIDATION)])
def test_the_average_is_that_of_a_loop_by_hand(decay: float, validation: Any) -> None:
    fitted = bilevel()
    twin = bilevel()
    labeled, unlabeled = batches(8)
    torch.manual_seed(1)
    result = fitted.fit(
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
        torch.testing.assert_close(result.weights[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(fitted.student.state_dict()[name], result.weights[name])
    assert any(not torch.equal(result.weights[n], p) for n, p in twin.student.named_parameters())


def test_the_latest_best_by_validation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = single()
    steps = 5
    # The first accuracy is that before the first step.
    accuracies = iter([0.9, 0.2, 0.6, 0.4, 0.6, 0.5])
    validated: list[dict[str, Tensor]] = []

    def scripted(*_: Any) -> Any:
        validated.append(copied(trainer.student))
        return SimpleNamespace(value=next(accuracies), n=len(VALIDATION[1]))

    monkeypatch.setattr("metapl.metrics.metric.evaluate_logits", scripted)
    result = trainer.fit(batches(3)[0], steps=steps, validation=VALIDATION, validate_every=1)
    assert (result.validation_accuracy, result.step, len(validated)) == (0.6, 4, 1 + steps)
    assert same(result.weights, validated[4])
    assert same(copied(trainer.student), validated[4])
    assert not same(validated[2], validated[4])


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_latest_within_one_error_of_the_best_is_kept(
    is_resumed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the best accuracy, 0.6 of 100, one standard error is 0.049."""
    by_steps = [0.9, 0.2, 0.6, 0.4, 0.56, 0.54, 0.56, 0.5]
    trainer = single()

    def scripted(*_: Any) -> Any:
        return SimpleNamespace(value=by_steps[trainer.steps_done], n=100)

    def stop(step: int, row: Any, trainer: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("metapl.metrics.metric.evaluate_logits", scripted)
    options: dict[str, Any] = {
        "validation": VALIDATION,
        "validate_every": 1,
        "save_every": 1,
        "select": "one_error",
        "steps": 7,
        "out": tmp_path / "run",
    }
    if is_resumed:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(batches(3)[0], callbacks=[stop], **options)
        trainer = single()
    result = trainer.fit(batches(3)[0], resume=is_resumed, **options)
    assert (result.validation_accuracy, result.step) == (0.56, 6)
    assert same(result.weights, copied(trainer.student))


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_was_validated_is_what_is_kept(ema: float | None) -> None:
    trainer = single()
    result = trainer.fit(
        batches(4)[0], steps=30, validation=VALIDATION, validate_every=7, ema_decay=ema
    )
    assert result.step in (7, 14, 21, 28, 30)
    assert result.validation_accuracy == trainer.evaluate(VALIDATION).accuracy
    model = network().eval()
    model.load_state_dict(result.weights)
    x, y = VALIDATION
    assert evaluate_logits(model(x), y).accuracy == result.validation_accuracy


def poisoned(number: int, step: int) -> list[Any]:
    """Return so many batches, whose inputs are finite throughout.

    The network of :func:`trapped` is not finite on the batch of ``step``.
    """
    labeled, _ = batches(number)
    x, _ = labeled[step - 1]
    x[0, 0] = 1e6
    return labeled


def trapped(trainer: Any) -> Any:
    def trap(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits * (math.nan if inputs[0].max() > 1e5 else 1.0)

    trainer.student.register_forward_hook(trap)
    return trainer


@pytest.mark.parametrize("trainer", [single, bilevel])
@pytest.mark.parametrize("bad", [1, 8, 10, 12, 20])
def test_a_nan_stops_the_run_at_its_step(
    trainer: Callable[[], Trainer], bad: int, tmp_path: Path
) -> None:
    """Between the steps that are logged, validated or saved as well as on them."""
    labeled = poisoned(20, bad)
    _, unlabeled = batches(20)
    last_saved_step = 4 * ((bad - 1) // 4)
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
    checkpoint = CheckpointFolder(tmp_path / "checkpoints/fit").newest()
    assert (checkpoint.state["step"] if checkpoint else 0) == last_saved_step
    # A first step that is refused leaves no file.
    if (tmp_path / "metrics.jsonl").exists():
        assert all(row["step"] < bad for row in rows(tmp_path))
    if checkpoint:
        leaves = pytree.tree_leaves(checkpoint.state)
        assert all(torch.isfinite(leaf).all() for leaf in leaves if isinstance(leaf, Tensor))


def test_weights_that_blow_up_are_not_saved_although_the_loss_is_finite(tmp_path: Path) -> None:
    trainer = single()
    trainer.student[0].weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(MetaplError):
        trainer.fit(batches(4)[0], steps=5, save_every=1, log_every=5, out=tmp_path)
    assert not list(tmp_path.glob("checkpoints/**/*.ckpt"))


# ---------------------------------------------------------------------------------------- callbacks

QUIET: dict[str, Any] = {"say": lambda _: None, "schedule": "constant", "log_every": 2}


def stop_at(last_step: int, reason: str = "enough") -> Callable[..., None]:
    def stop(step: int, row: Any, trainer: Any) -> None:
        if step == last_step:
            raise StopFit(reason)

    return stop


@dataclass(frozen=True)
class Call:
    """A call of a callback of this name."""

    callback: str
    step: int
    row: dict[str, Any]
    trainer: Any


@pytest.mark.parametrize("build", [single, bilevel])
def test_each_callback_sees_every_recorded_row_in_turn(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    trainer = build()
    calls: list[Call] = []

    def note(callback: str, step: int, row: dict[str, Any], trainer: Any) -> None:
        calls.append(Call(callback, step, row, trainer))

    result = trainer.fit(
        *batches(4),
        steps=7,
        log_every=2,
        validation=VALIDATION,
        validate_every=3,
        out=tmp_path,
        callbacks=[partial(note, "a"), partial(note, "b")],
    )
    expected = [(name, step) for step in (2, 3, 4, 6, 7) for name in ("a", "b")]
    assert [(call.callback, call.step) for call in calls] == expected
    assert all(call.trainer is trainer for call in calls)
    logged = []
    for row in rows(tmp_path):
        logged.append({name: value for name, value in row.items() if name != "phase"})
    assert [call.row for call in calls if call.callback == "a"] == logged
    assert logged == result.history
    without_validation = single().fit(batches(4)[0], steps=4, log_every=2, validate_every=1)
    assert [row["step"] for row in without_validation.history] == [2, 4]
    assert "student_validation_accuracy" in result.history[1]
    assert "loss_cross_entropy" in result.history[0] or "outer_loss" in result.history[0]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_fit_that_is_stopped_is_one_of_so_many_steps(ema: float | None, tmp_path: Path) -> None:
    """The steps that were done are kept, and saved; the other callbacks see the last row too."""
    ends = []
    texts: list[str] = []
    steps_seen: list[int] = []

    def note_step(step: int, *_: Any) -> None:
        steps_seen.append(step)

    for steps, callbacks in ((20, [stop_at(6), note_step]), (6, [])):
        trainer = bilevel()
        torch.manual_seed(1)
        out = tmp_path / str(steps)
        options = QUIET | {
            "save_every": 5,
            "ema_decay": ema,
            "validation": VALIDATION,
            "select": False,
        }
        result = trainer.fit(
            *batches(4),
            steps=steps,
            out=out,
            callbacks=callbacks,
            **options | {"say": texts.append},
        )
        checkpoint = CheckpointFolder(out / "checkpoints/fit").newest()
        assert checkpoint is not None
        assert (result.step, checkpoint.state["step"]) == (6, 6)
        ends.append((trainer.state_dict(), result.weights, checkpoint.state["trainer"]))
        resumed = bilevel().fit(
            *batches(4),
            steps=steps,
            out=out,
            resume=True,
            **options | {"say": lambda _: None},
        )
        assert (resumed.step, resumed.value) == (6, result.value), "it has ended"
    stopped, complete = ends
    assert same(stopped, complete)
    assert steps_seen == [2, 4, 6]
    assert texts == ["stopped after step 6 by a callback: enough"]


# ---------------------------------------------------------------------------------- what is written

SCALARS = {
    "inner_loss",
    "outer_loss",
    "teacher_loss",
    "teacher_cross_entropy",
    "inner_lr",
    "outer_lr",
    "feedback_mean",
    "feedback_std",
    "feedback_snr",
    "pseudo_label_confidence",
    "pseudo_label_entropy",
    "agreement",
    "feedback_rms",
    "pseudo_label_class_entropy",
    "student_class_entropy",
    "labeled_class_entropy",
    "class_shares_vs_labeled",
    "student_validation_accuracy",
    "teacher_validation_accuracy",
}


def test_tensorboard_shows_what_the_rows_say_each_step_once(tmp_path: Path) -> None:
    """Rows are right after a resume too, whose lost steps are purged.

    A second phase with the same step numbers may stand beside them.
    """
    labeled, unlabeled = batches(5)
    options: dict[str, Any] = {**OPTIONS, "steps": 17, "out": tmp_path, "log_every": 2}

    def stop() -> None:
        raise KeyError("stop")

    breaking = Counting(labeled, 9, stop)
    with pytest.raises(KeyError, match="stop"):
        bilevel().fit(breaking, unlabeled, **options)
    trainer = bilevel()
    trainer.fit(labeled, unlabeled, resume=True, say=lambda _: None, **options)
    trainer.finetune(labeled, steps=6, out=tmp_path, log_every=1)
    fit_events = events(tmp_path / "tensorboard/fit")
    logged = rows(tmp_path)
    assert set(fit_events.Tags()["scalars"]) >= SCALARS
    for name in SCALARS:
        shown = [(event.step, event.value) for event in fit_events.Scalars(name)]
        expected = []
        for row in logged:
            if name in row:
                expected.append((row["step"], pytest.approx(row[name], rel=1e-6)))
        assert shown == expected
    finetune_events = events(tmp_path / "tensorboard/finetune")
    assert [event.step for event in finetune_events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def digits_trainer() -> tuple[metapl.BilevelTrainer, dict[str, Any]]:
    """Return a trainer on handwritten digits, and the options of a fit of it that has patience."""
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    teacher, student = metapl.models.mlp([64, 32, 10]), metapl.models.mlp([64, 32, 10])
    options: dict[str, Any] = {
        "outer": (x[:100], y[:100]),
        "inner": x[100:1200],
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
    resumed_result = resumed.fit(**options, out=tmp_path / "stopped", resume=True)
    end = end_of(trainer, result, tmp_path / "whole")
    assert same(end, end_of(resumed, resumed_result, tmp_path / "stopped"))


def test_an_ended_fit_stays_ended_when_it_is_resumed(tmp_path: Path) -> None:
    trainer, options = digits_trainer()
    ended = trainer.fit(**options, out=tmp_path)
    resumed, options = digits_trainer()
    resumed_result = resumed.fit(**options, out=tmp_path, resume=True)
    assert resumed.steps_done == trainer.steps_done < options["steps"]
    assert same(ended.weights, resumed_result.weights)
    other, options = digits_trainer()
    with pytest.raises(MetaplError, match="patience was 4, now 5"):
        other.fit(**{**options, "patience": 5}, out=tmp_path, resume=True)


def test_damaged_lines_are_left_out_and_a_torn_one_is_written_anew(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "schedule": "constant",
        "log_every": 1,
        "say": lambda _: None,
        "out": tmp_path,
    }
    single().fit(batches(5)[0], steps=4, **options)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"x" + file.read_bytes() + b'{"phase": "fit", "st')
    result = single().fit(batches(5)[0], steps=6, resume=True, **options)
    assert [row["step"] for row in rows(tmp_path)] == [2, 3, 4, 5, 6]
    assert [row["step"] for row in result.history] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("mode", ["forward", "reinforce_per_example", "reinforce"])
def test_figures_of_the_feedback_are_those_of_a_loop_by_hand(mode: str) -> None:
    labeled, unlabeled = (feed[0] for feed in batches(1))
    trainer = bilevel(mode)
    report = trainer.step(labeled, unlabeled)
    numbers = figures(report, trainer.problem, labeled, ALONE)
    row = {name: float(t) for name, t in numbers.items()}
    h = report.feedback.double()
    logits = report.signal.outputs
    assert row["feedback_mean"] == pytest.approx(float(h.mean()), rel=1e-6)
    assert row["feedback_std"] == pytest.approx(float(h.std(correction=0)), rel=1e-6)
    q = logits.softmax(1).double()
    entropy = float(-(q * q.log()).sum(1).mean())
    assert row["pseudo_label_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert row["feedback_rms"] == pytest.approx(float(h.square().mean().sqrt()), rel=1e-6)
    shares = torch.bincount(labeled[1], minlength=3) / len(labeled[1])
    of_student = report.student_outputs.softmax(1)
    class_shares = {"pseudo_label": q.mean(0), "student": of_student.mean(0), "labeled": shares}
    for name, mean in class_shares.items():
        entropy = float(-(mean * mean.clamp_min(1e-30).log()).sum())
        assert row[f"{name}_class_entropy"] == pytest.approx(entropy, rel=1e-5)
    distance = float((q.mean(0) - shares).abs().sum() / 2)
    assert row["class_shares_vs_labeled"] == pytest.approx(distance, rel=1e-5)
    if mode == "reinforce":
        # One number for all rows has no ratio of signal to noise.
        assert "feedback_snr" not in row
        return
    z = logits.detach().double().requires_grad_()
    if h.ndim == 2:
        signal = z.softmax(1)
    else:
        signal = z.log_softmax(1)[range(len(h)), report.signal.value.long()]
    [g] = torch.autograd.grad((h * signal).sum(), z)
    count = len(g)
    square_of_mean = g.mean(0).square().sum()
    mean_of_squares = g.square().sum(1).mean()
    expected = float(
        (count * square_of_mean - mean_of_squares) / (mean_of_squares - square_of_mean)
    )
    assert math.isfinite(row["feedback_snr"])
    assert row["feedback_snr"] == pytest.approx(expected, rel=1e-4)


def hold_lock(out: Path, is_locked: Any) -> None:
    with folders.Folder(out).locked():
        is_locked.set()
        time.sleep(60)


def test_a_folder_that_another_process_writes_to_is_refused_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.2)
    processes = multiprocessing.get_context("fork")
    is_locked = processes.Event()
    other = processes.Process(target=hold_lock, args=(tmp_path, is_locked))
    other.start()
    is_locked.wait(60)
    with pytest.raises(MetaplError, match="process"):
        single().fit(batches(3)[0], steps=3, out=tmp_path)
    other.kill()
    other.join()
    single().fit(batches(3)[0], steps=3, out=tmp_path)
    folder = folders.Folder(tmp_path)
    # Several phases in one folder lock it once more in the same process.
    with folder.locked():
        single().fit(batches(3)[0], steps=3, out=folder, phase="finetune")
    assert [row["step"] for row in rows(tmp_path, "finetune")] == [3]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ({"checkpoint_every": 2}, "save_every"),
        ({"valdation": VALIDATION}, "validation"),
        ({"workers": 2}, "num_workers"),
        # No option is like this one, so all are named.
        ({"zzz": 1}, "validate_every"),
    ],
    ids=str,
)
def test_an_option_that_is_none_is_refused_with_the_nearest_names(
    wrong: dict[str, Any], nearest: str, tmp_path: Path
) -> None:
    of_student = single()
    of_both = bilevel()
    labeled, _ = batches(2)
    calls: list[tuple[Trainer, Callable[..., Any]]] = [
        (of_student, of_student.fit),
        (of_both, of_both.fit),
        (of_both, of_both.finetune),
    ]
    for trainer, fit in calls:
        weights_before = copied(trainer.student)
        with pytest.raises(MetaplError) as refusal:
            fit(labeled, steps=2, out=tmp_path / "run", **wrong)
        text = str(refusal.value)
        assert text.startswith(f"fit has no option {next(iter(wrong))!r}; ")
        assert nearest in text
        assert "\n" not in text
        assert same(copied(trainer.student), weights_before)
        assert trainer.steps_done == 0
    assert not (tmp_path / "run").exists()


def test_the_keywords_that_an_editor_shows_are_the_options() -> None:
    options = get_type_hints(FitOptions)
    keywords = get_type_hints(FitKeywords)
    options.pop("steps")
    assert keywords == options
    parameters = inspect.signature(Trainer.fit).parameters
    assert parameters["steps"].default is inspect.Parameter.empty
    sources = {"self", "outer", "inner", "steps", "options"}
    of_fit = {
        name: hint
        for name, hint in get_type_hints(Trainer.fit, {**vars(loop), "Unpack": Unpack}).items()
        if name in {*parameters} - sources
    }
    assert get_type_hints(FinetuneKeywords) == keywords | of_fit
    with pytest.raises(TypeError, match="steps"):
        single().fit(batches(1)[0])  # type: ignore[call-arg]


def test_a_rate_that_is_a_tensor_is_a_number_in_the_rows(tmp_path: Path) -> None:
    network = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=torch.tensor(0.01))
    trainer = metapl.LossTrainer(network, optimizer=optimizer)
    labeled = torch.randn(8, 4), torch.arange(8) % 3
    result = trainer.fit(labeled, batch_size=4, steps=4, log_every=2, out=tmp_path, progress=False)
    rates = [row["lr"] for row in result.history if "lr" in row]
    assert [*map(type, rates)] == [float] * 2
