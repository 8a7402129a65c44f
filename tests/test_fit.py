"""The loop around the steps: what it schedules, averages, selects, records and saves, against hand computations."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import ANYWHERE, toy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import CrossEntropy, MetaplError
from metapl.data import LabeledBatches, MemoryImages, StepSampler, Weak, feed
from metapl.feedback import Altered, LossDifference, Reinforce
from metapl.metrics import evaluate_logits
from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.tensorboard import Events
from metapl.training import FitOptions, FitResult, Interrupted, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.progress import examples_in

Inner = Callable[[nn.Module], Any]


def network(dropout: float = 0.3) -> nn.Module:
    """With everything that has a state: batch statistics, dropout masks."""
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def batches(number: int, seed: int = 0, rows: int = 6) -> tuple[list[Any], list[Tensor]]:
    """Labelled and unlabelled ones."""
    draw = torch.Generator().manual_seed(seed)
    labeled = [
        (torch.randn(rows, 5, generator=draw), torch.randint(0, 3, (rows,), generator=draw)) for _ in range(number)
    ]
    return labeled, [torch.randn(rows + 2, 5, generator=draw) for _ in range(number)]


def examples(number: int = 60) -> tuple[Tensor, Tensor]:
    """Three classes that a linear map tells apart, almost."""
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(number, 5, generator=draw)
    return x, (x[:, :3] + 0.3 * torch.randn(number, 3, generator=draw)).argmax(1)


VALIDATION = examples()
SGD: Inner = lambda student: torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)  # noqa: E731


def bilevel(mode: Any = "forward", seed: int = 0, inner: Inner = SGD, **options: Any) -> metapl.BilevelTrainer:
    torch.manual_seed(seed)
    teacher, student = network(), network()
    outer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    return metapl.BilevelTrainer(
        teacher, student, mode, inner_optimizer=inner(student), outer_optimizer=outer, **options
    )


def single(lr: float = 0.1, seed: int = 0, dropout: float = 0.3, **options: Any) -> LossTrainer:
    torch.manual_seed(seed)
    model = network(dropout)
    return LossTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **options)


def leaves(tree: Any) -> list[Any]:
    """Tensors and numbers of a state, in order."""
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for one in tree for leaf in leaves(one)]
    return [tree]


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def rows(folder: Path, phase: str = "fit") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


class Counting(list[Any]):
    """Batches that do something when a step's batch is taken."""

    def __init__(self, items: list[Any], at: int, what: Callable[[], None]) -> None:
        super().__init__(items)
        self.taken, self.at, self.what = 0, at, what

    def __getitem__(self, place: Any) -> Any:
        self.taken += 1
        if self.taken == self.at:
            self.what()
        return super().__getitem__(place)


# ------------------------------------------------------------------------------------------------------- schedule, EMA


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0), ("cosine", 3), ("constant", 0), ("constant", 4)])
def test_every_step_runs_at_the_rates_of_the_schedule(schedule: Any, warmup: int) -> None:
    trainer, seen = bilevel(), []
    step = trainer.step

    def noted(*data: Any) -> Any:
        seen.append([o.param_groups[0]["lr"] for o in trainer.schedulable])
        return step(*data)

    trainer.step = noted  # type: ignore[method-assign]
    trainer.fit(*batches(3), steps=10, schedule=schedule, warmup=warmup)
    after = [1.0 if schedule == "constant" else (1 + math.cos(math.pi * t / (10 - warmup))) / 2 for t in range(10)]
    factors = [(t + 1) / warmup for t in range(warmup)] + after[: 10 - warmup]
    assert seen == [pytest.approx([0.1 * f, 0.05 * f], rel=1e-12) for f in factors]
    assert [o.param_groups[0]["lr"] for o in trainer.schedulable] == [0.1, 0.05]


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_the_average_is_that_of_a_loop_by_hand(decay: float) -> None:
    fitted, twin, (labeled, unlabeled) = bilevel(), bilevel(), batches(8)
    torch.manual_seed(1)
    found = fitted.fit(labeled, unlabeled, steps=8, schedule="constant", ema_decay=decay)
    torch.manual_seed(1)
    average = copied(twin.student)
    for t, data in enumerate(zip(labeled, unlabeled, strict=True)):
        twin.step(*data)
        d = min(decay, (1 + t) / (10 + t))
        average = {n: d * average[n] + (1 - d) * p for n, p in copied(twin.student).items()}
    buffers = {n: b.clone() for n, b in twin.student.named_buffers()}  # statistics are the student's own
    for name, value in {**average, **buffers}.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(fitted.student.state_dict()[name], found.weights[name])
    assert any(not torch.equal(found.weights[n], p) for n, p in twin.student.named_parameters())


# ---------------------------------------------------------------------------------------------------------- selection


def test_the_latest_best_by_validation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, steps, wanted = single(), 5, iter([0.2, 0.6, 0.4, 0.6, 0.5])
    seen: list[dict[str, Tensor]] = []

    def scripted(*_: Any) -> Any:
        seen.append(copied(trainer.student))
        accuracy = next(wanted)
        return type("Found", (), {"accuracy": accuracy, "n": len(VALIDATION[1])})

    monkeypatch.setattr("metapl.training.selection.evaluate_logits", scripted)
    found = trainer.fit(batches(3)[0], steps=steps, validation=VALIDATION, validate_every=1)
    assert (found.validation_accuracy, found.step, len(seen)) == (0.6, 4, steps)
    assert same(found.weights, seen[3])
    assert same(copied(trainer.student), seen[3])
    assert not same(seen[1], seen[3])


def test_without_selection_the_last_student_is_kept_and_its_accuracy_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, steps, wanted = single(), 3, iter([0.2, 0.6, 0.4])

    def scripted(*_: Any) -> Any:
        return type("Found", (), {"accuracy": next(wanted), "n": len(VALIDATION[1])})

    monkeypatch.setattr("metapl.training.selection.evaluate_logits", scripted)
    found = trainer.fit(batches(3)[0], steps=steps, validation=VALIDATION, validate_every=1, select=False)
    assert (found.validation_accuracy, found.step) == (0.4, steps)
    twin = single()
    assert same(found.weights, twin.fit(batches(3)[0], steps=steps).weights)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_was_validated_is_what_is_kept(ema: float | None) -> None:
    trainer = single()
    found = trainer.fit(batches(4)[0], steps=30, validation=VALIDATION, validate_every=7, ema_decay=ema)
    assert found.step in (7, 14, 21, 28, 30)
    assert found.validation_accuracy == trainer.evaluate(VALIDATION).accuracy
    model = network().eval()
    model.load_state_dict(found.weights)
    assert evaluate_logits(model(VALIDATION[0]), VALIDATION[1]).accuracy == found.validation_accuracy


def test_without_validation_the_last_student_is_kept(tmp_path: Path) -> None:
    trainer = single()
    found = trainer.fit(batches(4)[0], steps=5, out=tmp_path)
    last = CheckpointFolder(tmp_path / "checkpoints/fit").newest()
    assert last is not None
    assert (found.validation_accuracy, found.step) == (None, 5)
    assert same(found.weights, last.state["trainer"]["student"])
    assert same(found.weights, copied(trainer.student))


def test_validating_changes_nothing_else() -> None:
    """Not even a DataLoader that draws from the default generator."""
    often, never = single(), single()
    loader = DataLoader(TensorDataset(*VALIDATION), batch_size=16, shuffle=True)
    ends = []
    for trainer, how in ((often, {"validation": loader, "validate_every": 2}), (never, {})):
        torch.manual_seed(4)
        trainer.fit(batches(4)[0], steps=9, **how)
        ends.append((trainer.optimizer.state_dict(), torch.get_rng_state()))
    assert same(*ends)


# ------------------------------------------------------------------------------------------------- numbers gone wrong


def poisoned(number: int, at: int) -> list[Any]:
    """Inputs are finite throughout; the network of :func:`trapped` is not on batch ``at``."""
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
def test_a_nan_stops_the_run_at_its_step(trainer: Callable[[], Trainer], bad: int, tmp_path: Path) -> None:
    """Between the steps that are logged, validated or saved as well as on them."""
    labeled, unlabeled = poisoned(20, bad), batches(20)[1]
    saved = 4 * ((bad - 1) // 4)
    good = f"checkpoint is .*step-{saved:08d}.ckpt" if saved else "no checkpoint was written"
    # A trainer with a teacher refuses such a step itself, before anything moves.
    told = f"(NaN or infinite at step {bad};|step {bad}: the feedback is NaN or infinite).*{good}"
    with pytest.raises(MetaplError, match=told):
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
    assert all(row["step"] < bad for row in rows(tmp_path))
    if kept:
        assert all(torch.isfinite(t).all() for t in leaves(kept.state) if isinstance(t, Tensor))


def test_weights_that_blow_up_are_not_saved_although_the_loss_is_finite(tmp_path: Path) -> None:
    trainer = single()
    trainer.student[0].weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(MetaplError, match=r"weights were NaN or infinite after step 1.*no checkpoint"):
        trainer.fit(batches(4)[0], steps=5, save_every=1, log_every=5, out=tmp_path)
    assert not list(tmp_path.glob("checkpoints/**/*.ckpt"))


# ------------------------------------------------------------------------------------------------ clipping, precision


def test_the_students_clip_is_part_of_its_update_and_the_teachers_is_torchs() -> None:
    """Beside a TorchOpt chain of clip and SGD, which an estimator differentiates through as any other transform."""
    limit, ends = 0.05, []
    for clipped in (True, False):
        case = toy("mlp")
        chain = torchopt.chain(torchopt.clip_grad_norm(limit), torchopt.sgd(0.3))
        inner: Any = torch.optim.SGD(case.student.parameters(), lr=0.3) if clipped else chain
        trainer = metapl.BilevelTrainer(
            **case.networks(),
            mode="forward",
            inner_optimizer=inner,
            outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=1.0),
            teacher_losses=(CrossEntropy(),),
            clip_norm=limit if clipped else None,
        )
        before = copied(case.teacher)
        h = trainer.step(**case.data()).feedback
        gradient = {n: before[n] - p.detach() for n, p in case.teacher.named_parameters()}
        ends.append((h, copied(case.student), gradient))
    (h, student, gradient), (h_chain, student_chain, whole) = ends
    torch.testing.assert_close(h, h_chain, rtol=1e-9, atol=1e-15)
    for name, value in student.items():
        torch.testing.assert_close(value, student_chain[name], rtol=1e-12, atol=1e-14)
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    assert norm > 2 * limit
    for name, value in gradient.items():
        torch.testing.assert_close(value, whole[name] * limit / (norm + 1e-6), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("trainer", [single, bilevel])
def test_bfloat16_trains_and_the_weights_stay_float32(trainer: Callable[..., Any]) -> None:
    x, y = examples(512)
    data = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]
    ends = []
    for precision in ("bfloat16", "float32"):
        one = trainer(precision=precision)
        before = one.evaluate(VALIDATION).accuracy
        one.fit(data, [x for x, _ in data], steps=80)
        assert all(t.dtype in (torch.float32, torch.int64) for t in leaves(one.state_dict()) if isinstance(t, Tensor))
        assert one.evaluate(VALIDATION).accuracy > max(before, 0.6)
        ends.append(copied(one.student))
    assert not same(*ends)


# -------------------------------------------------------------------------------------------------------- exact cosine


@pytest.mark.parametrize("mode", [m for m in ANYWHERE if m != "none"])
def test_the_exact_cosine_is_one_for_exact_modes_and_changes_nothing(mode: str, tmp_path: Path) -> None:
    """Weights, statistics, draws and every other number are bit for bit those of the run without it."""
    ends = []
    for exact in (3, None):
        trainer = bilevel(mode, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(6)
        folder = tmp_path / str(exact)
        trainer.fit(*batches(4), steps=7, log_every=1, exact_every=exact, out=folder, schedule="constant")
        logged = rows(folder)
        cosines = {row["step"]: row.pop("exact_cosine") for row in logged if "exact_cosine" in row}
        assert list(cosines) == ([3, 6, 7] if exact else [])
        assert all(-1 - 1e-12 <= c <= 1 + 1e-12 for c in cosines.values())
        if mode in ("forward", "unrolled"):
            assert all(c == pytest.approx(1, abs=1e-5) for c in cosines.values())
        ends.append((trainer.state_dict(), torch.get_rng_state(), logged))
    assert same(*ends)


# ---------------------------------------------------------------------------------------------------- save and resume


MODES: list[Any] = [*ANYWHERE, Reinforce(baseline=0.9), LossDifference(baseline=0.5), Altered(alteration="random_sign")]
INNER: dict[str, Inner] = {
    "sgd": SGD,
    "adamw": lambda student: torch.optim.AdamW(student.parameters(), lr=0.01),
    "torchopt_momentum": lambda _: torchopt.sgd(0.1, momentum=0.9),
    "torchopt_adam": lambda _: torchopt.adam(0.01),
}


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "mode", MODES, ids=lambda mode: getattr(mode, "name", mode) + "_" * (not isinstance(mode, str))
)
def test_a_saved_trainer_goes_on_bit_for_bit(mode: Any, inner: str, own_generator: bool, tmp_path: Path) -> None:
    def built(seed: int) -> metapl.BilevelTrainer:
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        return bilevel(mode, seed, INNER[inner], generator=generator)

    data = list(zip(*batches(6), strict=True))
    first = built(0)
    torch.manual_seed(2)
    for one in data[:3]:
        first.step(*one)
    first.save(tmp_path / "half.ckpt")
    ends = [(*(first.step(*one).feedback for one in data[3:]), first.state_dict(), torch.get_rng_state())]
    second = built(1)  # other weights, other draws
    torch.manual_seed(3)
    second.load(tmp_path / "half.ckpt")
    ends.append((*(second.step(*one).feedback for one in data[3:]), second.state_dict(), torch.get_rng_state()))
    assert same(*ends)


def test_a_trainer_refuses_the_state_of_another_mode_and_of_no_trainer(tmp_path: Path) -> None:
    bilevel("forward").save(tmp_path / "a.ckpt")
    with pytest.raises(MetaplError, match="mode 'forward', this one has 'reinforce'"):
        bilevel("reinforce").load(tmp_path / "a.ckpt")
    metapl.runs.checkpoint.save(tmp_path / "b.ckpt", {"weights": torch.ones(1)})
    with pytest.raises(MetaplError, match=r"b\.ckpt is not a trainer's file"):
        bilevel("forward").load(tmp_path / "b.ckpt")


OPTIONS: dict[str, Any] = {
    "validation": VALIDATION,
    "validate_every": 4,
    "log_every": 3,
    "save_every": 5,
    "warmup": 2,
    "ema_decay": 0.9,
}


def end_of(trainer: Trainer, found: FitResult, folder: Path) -> Any:
    newest = CheckpointFolder(folder / "checkpoints/fit").newest()
    assert newest is not None
    return found.weights, found.step, found.validation_accuracy, newest.state, (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "kind", "workers"),
    [
        *((name, "lists", 0) for name in ("sgd", "adamw", "torchopt_momentum")),
        ("sgd", "loaders", 0),
        ("sgd", "loaders", 2),
    ],
)
def test_a_fit_that_failed_ends_as_one_that_did_not(name: str, kind: str, workers: int, tmp_path: Path) -> None:
    """The same seed twice, with and without loader workers, and once in two pieces."""
    labeled, unlabeled = batches(7)

    def sources() -> tuple[Any, Any]:
        if kind == "lists":
            return labeled, unlabeled
        whole = TensorDataset(torch.cat([x for x, _ in labeled]), torch.cat([y for _, y in labeled]))
        many: Any = TensorDataset(torch.cat(unlabeled))
        return (
            DataLoader(whole, batch_size=8, shuffle=True, num_workers=workers, drop_last=True),
            DataLoader(many, batch_size=9, shuffle=True, num_workers=workers, drop_last=True, collate_fn=Stacked()),
        )

    def trainer(seed: int) -> metapl.BilevelTrainer:
        return bilevel(Reinforce(baseline=0.9), seed, INNER[name])

    ends = []
    for number in range(2):
        one = trainer(0)
        torch.manual_seed(7)
        ends.append(
            end_of(one, one.fit(*sources(), steps=17, out=tmp_path / f"{number}", **OPTIONS), tmp_path / f"{number}")
        )
    assert same(*ends)

    one, folder = trainer(0), tmp_path / "pieces"
    step, calls = one.step, []

    def failing(*data: Any) -> Any:
        calls.append(data)
        if len(calls) == 14:
            raise RuntimeError("the lights went out")
        return step(*data)

    one.step = failing  # type: ignore[method-assign]
    torch.manual_seed(7)
    with pytest.raises(RuntimeError, match="lights"):
        one.fit(*sources(), steps=17, out=folder, **OPTIONS)
    other, said = trainer(1), list[str]()
    found = other.fit(*sources(), steps=17, out=folder, resume=True, say=said.append, **OPTIONS)
    assert said == ["resumed at step 10"]
    assert same(end_of(other, found, folder), ends[0])


class Stacked:
    """Batches of plain tensors, made where a worker can find it."""

    def __call__(self, items: list[tuple[Tensor]]) -> Tensor:
        return torch.stack([x for (x,) in items])


def test_workers_change_nothing() -> None:
    x, y = examples(40)
    loaders = [DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=n) for n in (0, 2)]
    ends = []
    for loader in loaders:
        trainer = single()
        torch.manual_seed(8)
        trainer.fit(loader, steps=12)
        ends.append((trainer.state_dict(), torch.get_rng_state()))
    assert same(*ends)


def test_a_run_may_go_on_where_views_are_taken_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the views taken by the loader, on the trainer's device, and in turns."""
    draw = torch.Generator().manual_seed(0)
    images = MemoryImages(torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8, generator=draw))
    labels, sampler, weak = torch.arange(20) % 3, StepSampler(20, 6, seed=0), Weak(pad=1)
    ends = []
    for ways in ("loader", "device", "in turns"):
        trainer, folder = single(), tmp_path / ways
        trainer.student[0] = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
        trainer.optimizer = torch.optim.SGD(trainer.student.parameters(), lr=0.1)
        torch.manual_seed(7)
        for steps in (5, 9):
            on_device = ways == "device" or (ways, steps) == ("in turns", 9)
            monkeypatch.setattr(sys.modules[feed.__module__], "_finishes_batches", lambda _, here=on_device: here)
            labeled = LabeledBatches(images, labels, sampler, weak, seed=0)
            trainer.fit(
                labeled,
                steps=steps,
                schedule="constant",
                out=folder,
                resume=steps == 9,
                say=lambda _: None,
            )
        ends.append((copied(trainer.student), (folder / "metrics.jsonl").read_bytes()))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 7, 12])
def test_asked_to_stop_a_fit_finishes_its_step_and_saves(number: signal.Signals, at: int, tmp_path: Path) -> None:
    """And the same trainer, its learning rates put back, goes on with it."""
    labeled, unlabeled = batches(5)
    ends = []
    for stopped in (True, False):
        trainer, folder = bilevel(), tmp_path / str(stopped)
        torch.manual_seed(7)
        if stopped:
            before = signal.getsignal(number)
            ringing = Counting(labeled, at, lambda: signal.raise_signal(number))
            with pytest.raises(Interrupted, match=f"after step {at}; saved to") as caught:
                trainer.fit(ringing, unlabeled, steps=12, out=folder, **OPTIONS)
            assert (caught.value.step, caught.value.signal_number) == (at, number)
            assert caught.value.saved == folder / f"checkpoints/fit/step-{at:08d}.ckpt"
            assert signal.getsignal(number) == before
            assert trainer.schedulable[0].param_groups[0]["lr"] == 0.1
            torch.manual_seed(100)
        found = trainer.fit(labeled, unlabeled, steps=12, out=folder, resume=stopped, say=lambda _: None, **OPTIONS)
        ends.append(end_of(trainer, found, folder))
    assert same(*ends)


def test_a_second_ctrl_c_is_not_held_back_and_a_second_sigterm_is() -> None:
    def twice(number: signal.Signals) -> Callable[[], None]:
        return lambda: [signal.raise_signal(number) for _ in range(2)] and None

    with pytest.raises(KeyboardInterrupt) as caught:
        single().fit(Counting(batches(3)[0], 2, twice(signal.SIGINT)), steps=5)
    assert not isinstance(caught.value, Interrupted)
    with pytest.raises(Interrupted, match="nothing saved"):
        single().fit(Counting(batches(3)[0], 2, twice(signal.SIGTERM)), steps=5)


def test_a_signal_while_the_records_are_closed_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Events.__exit__

    def ringing(self: Any, *error: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(self, *error)

    monkeypatch.setattr(Events, "__exit__", ringing)
    with pytest.raises(Interrupted, match="after step 5; saved to"):
        single().fit(batches(3)[0], steps=5, out=tmp_path)


def test_damaged_checkpoints_are_passed_over_by_name_and_without_a_whole_one_it_is_refused(tmp_path: Path) -> None:
    labeled, unlabeled = batches(5)

    def ended(resume: bool) -> Any:
        trainer = bilevel()
        torch.manual_seed(7)
        found = trainer.fit(labeled, unlabeled, steps=12, out=tmp_path, resume=resume, say=said.append, **OPTIONS)
        return end_of(trainer, found, tmp_path)

    said: list[str] = []
    whole = ended(False)
    newest, older = CheckpointFolder(tmp_path / "checkpoints/fit").paths()
    newest.write_bytes(newest.read_bytes()[:-100])
    assert same(ended(True), whole)
    assert re.search(r"passed over step-00000012\.ckpt.*truncated", said[0])
    assert said[1] == "resumed at step 10"
    for path in (newest, older):
        path.write_bytes(b"")
    said.clear()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MetaplError, match=r"none can be used; to start anew, move them away: .*12\.ckpt is empty"):
        ended(True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert said == []
    for path in (newest, older):
        path.unlink()
    assert same(ended(True), whole)
    assert said == ["no checkpoint of phase fit yet: starting anew"]


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    labeled, unlabeled = batches(5)

    def fit(resume: bool = True, again: Any = (labeled, unlabeled), **changed: Any) -> None:
        how = {"steps": 6, "out": tmp_path, "say": lambda _: None, **changed}
        bilevel().fit(*again, resume=resume, **how)

    fit(resume=False)
    with pytest.raises(MetaplError, match="holds checkpoints of a phase 'fit' already; go on with it by resume=True"):
        fit(resume=False)
    with pytest.raises(MetaplError, match="steps was 6, now 9"):
        fit(steps=9)
    with pytest.raises(MetaplError, match=r"ema_decay was None, now 0\.9"):
        fit(ema_decay=0.9)
    with pytest.raises(MetaplError, match="schedule was 'cosine', now 'constant'"):
        fit(schedule="constant")
    with pytest.raises(MetaplError, match="warmup was 0, now 2"):
        fit(warmup=2)
    with pytest.raises(MetaplError, match="on labeled and unlabeled batches, now there are labeled ones"):
        fit(again=(labeled, None))
    with pytest.raises(MetaplError, match="resume=True was given without out"):
        fit(out=None)
    fit(phase="another", resume=False)
    fit()


def test_a_run_of_constant_rates_may_be_made_longer(tmp_path: Path) -> None:
    ends = []
    for pieces in ((6, 11), (11,)):
        trainer, folder = single(), tmp_path / str(len(pieces))
        torch.manual_seed(7)
        for number, steps in enumerate(pieces):
            trainer.fit(
                batches(4)[0],
                steps=steps,
                schedule="constant",
                out=folder,
                resume=number > 0,
                say=lambda _: None,
                save_every=3,
            )
        ends.append(trainer.state_dict())
    assert same(*ends)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_were_asked_for(keep: int, tmp_path: Path) -> None:
    single().fit(batches(4)[0], steps=10, save_every=2, keep=keep, out=tmp_path)
    assert [int(path.stem[5:]) for path in CheckpointFolder(tmp_path / "checkpoints/fit").paths()] == [10, 8, 6][:keep]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"keep": 0}, "keep=0"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"warmup": 7}, "warmup=7"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"exact_every": 0}, "exact_every=0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        FitOptions(**{"steps": 5, **options})


# ------------------------------------------------------------------------------------------------------------- records


SCALARS = {
    "inner_loss",
    "outer_loss",
    "teacher_loss",
    "teacher_cross_entropy",
    "feedback_mean",
    "feedback_std",
    "feedback_ratio",
    "pseudo_label_confidence",
    "pseudo_label_entropy",
    "agreement",
    "student_lr",
    "teacher_lr",
    "exact_cosine",
    "student_validation_accuracy",
    "teacher_validation_accuracy",
    "pseudo_label_accuracy",
}


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_tensorboard_shows_what_the_rows_say_each_step_once(mode: str, tmp_path: Path) -> None:
    """Also after a resume, whose lost steps are purged, and beside a second phase with the same step numbers."""
    labeled, unlabeled = batches(5)
    how: dict[str, Any] = {
        **OPTIONS,
        "steps": 17,
        "out": tmp_path,
        "exact_every": 4,
        "truth": VALIDATION,
        "log_every": 2,
    }
    breaking = Counting(labeled, 9, lambda: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(MetaplError, match="stop"):
        bilevel(mode).fit(breaking, unlabeled, **how)
    trainer = bilevel(mode)
    trainer.fit(labeled, unlabeled, resume=True, say=lambda _: None, **how)
    trainer.finetune(labeled, steps=6, out=tmp_path, log_every=1)

    found, logged = events(tmp_path / "tensorboard/fit"), rows(tmp_path)
    assert set(found.Tags()["scalars"]) == SCALARS
    for name in SCALARS:
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged if name in row]
        assert len({step for step, _ in shown}) == len(shown)
    histograms = found.Histograms("pseudo_label_classes")
    assert [event.step for event in histograms] == [2, 4, 6, 8, 10, 12, 14, 16, 17]
    for event in histograms:
        assert event.histogram_value.bucket_limit == [0.5, 1.5, 2.5]
        assert sum(event.histogram_value.bucket) == len(unlabeled[0])
    assert [e.step for e in events(tmp_path / "tensorboard/finetune").Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_report_counts_the_pseudo_labels() -> None:
    labeled, unlabeled = batches(1)
    for mode in ("forward", "reinforce"):
        report = bilevel(mode).step(labeled[0], unlabeled[0])
        logits = report.signal.outputs
        assert logits is not None
        chosen = (report.signal.value if mode == "reinforce" else logits.argmax(1)).tolist()
        assert report.counts() == {"pseudo_label_classes": [chosen.count(k) for k in range(3)]}
    assert single().step(labeled[0]).counts() == {}


def test_the_rates_are_named_after_their_networks(tmp_path: Path) -> None:
    """A TorchOpt transform has its own schedule, and only the teacher's rate is known."""
    bilevel(inner=INNER["torchopt_momentum"]).fit(*batches(2), steps=1, out=tmp_path / "a")
    single().fit(batches(2)[0], steps=1, out=tmp_path / "b")
    names = [{k for k in rows(tmp_path / run)[0] if k.endswith("_lr")} for run in "ab"]
    assert names == [{"teacher_lr"}, {"student_lr"}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_the_time_left_accuracy_and_examples_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("metapl.training.trainer.BilevelTrainer.step", slowly(metapl.BilevelTrainer.step, time.sleep))
    bilevel().fit(*batches(3), steps=6, log_every=1, validation=VALIDATION, validate_every=1)
    last = [line for line in terminal.getvalue().split("\r") if "examples/s" in line][-1]
    shown = re.search(r"fit: +\d+%\|(.+)\| \d/6, \d\d:\d\d left, accuracy [\d.]+% of \d+, (\d+) examples/s *$", last)
    assert shown is not None, last
    assert len(last) <= 80
    assert len(shown[1]) >= 10
    assert 0 < int(shown[2]) < 14 / 0.12 + 1  # 6 labelled and 8 unlabelled ones, in more than 0.12 s


def test_what_is_no_terminal_gets_lines_at_validations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metapl.training.progress.LINE_EVERY", 0.0)
    bilevel().fit(*batches(3), steps=5, log_every=1, validation=VALIDATION, validate_every=2, wait=2)
    bilevel().fit(*batches(3), steps=2, validate_every=1)
    bilevel().fit(*batches(3), steps=2, validate_every=1, progress=False)
    n = len(VALIDATION[1])
    patterns = (
        r"fit: step 2 of 5, at least \d+ s left",  # the student has waited so far
        rf"fit: step 4 of 5, validation accuracy [\d.]+% of {n}, about \d+ s left",
        rf"fit: step 5 of 5, validation accuracy [\d.]+% of {n}, after \d+ s",
        r"fit: step 1 of 2, about \d+ s left",
        r"fit: step 2 of 2, after \d+ s",
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line


def slowly(step: Callable[..., Any], sleep: Callable[[float], None]) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        sleep(0.12)
        return step(*given, **named)

    return slow


def test_a_batch_of_no_rows_is_no_reason_to_fail() -> None:
    """Sources are pytrees of any kind; the bar counts what has rows."""
    assert [examples_in(one) for one in (torch.tensor(1.0), "x", {"a": torch.ones(4, 2)}, ())] == [0, 0, 4, 0]


# -------------------------------------------------------------------------------------------------------------- memory


MEMORY = """
import sys, torch, metapl
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_fit as t

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def noted(batches, seen):
    for number in range(1201):
        if number in (200, 1200):
            seen.append(resident())
        yield batches[number % len(batches)]

labeled, unlabeled = t.batches(5)
seen = []
t.bilevel("forward").fit(
    noted(labeled, seen), iter(unlabeled * 300), steps=1201, out={out!r}, validation=t.VALIDATION, validate_every=20,
    log_every=5, save_every=50, ema_decay=0.9, exact_every=100,
)
print(seen[1] - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.long
def test_memory_stays_flat_over_a_thousand_steps(tmp_path: Path) -> None:
    """Less than 8 MB more after 1,200 steps than after 200; a step's graph kept by mistake would be above 20 kB."""
    program = MEMORY.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8e6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Rounding depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
