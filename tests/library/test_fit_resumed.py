"""A fit that is killed, stopped or refused by the disk ends as one that was not.

It loses nothing that was saved.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from feed_sources import same
from fits import (
    INNER,
    OPTIONS,
    Counting,
    _one_thread,  # noqa: F401  # used by every test
    batches,
    bilevel,
    end_of,
    single,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from metapl import UDA, CrossEntropy, LossTrainer, MetaplError
from metapl.data import StepBatches, without_labels
from metapl.feedback import LossDifference, Reinforce
from metapl.runs.checkpoint import CheckpointFolder
from metapl.training import FitResult, Interrupted

STEPS = 24
LOSSES = (CrossEntropy(label_smoothing=0.1), UDA(weight=2.0, ramp=5))


class Steps(StepBatches[Any]):
    steps = None

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def batch(self, step: int) -> Any:
        return self.items[step % len(self.items)]


def lists() -> tuple[Any, Any]:
    return batches(7)


def stepwise() -> tuple[Any, Any]:
    labeled, unlabeled = batches(7)
    return Steps(labeled), Steps(unlabeled)


def loaders(workers: int = 0) -> tuple[Any, Any]:
    """Return shuffled loaders, one with its own generator; their epochs differ in length."""
    labeled, unlabeled = batches(7)
    x = torch.cat([x for x, _ in labeled])
    y = torch.cat([y for _, y in labeled])
    labeled_loader = DataLoader(
        TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=workers, drop_last=True
    )
    unlabeled_loader = DataLoader(
        TensorDataset(torch.cat(unlabeled)),
        batch_size=9,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(3),
    )
    return labeled_loader, without_labels(unlabeled_loader)


class Count:
    """A callback with a state, which is part of the rows."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, step: int, row: Any, trainer: Any) -> dict[str, float]:
        self.rows += 1
        return {"count": self.rows}

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows = state["rows"]


Kind = tuple[Callable[[int], Any], Callable[[], tuple[Any, Any]], dict[str, Any]]
KINDS: dict[str, Kind] = {
    "forward, SGD": (lambda seed: bilevel(seed=seed), lists, {}),
    "baseline, a transform": (
        lambda seed: bilevel(Reinforce(baseline=0.9), seed, INNER["torchopt_adam"]),
        loaders,
        {},
    ),
    "AdamW, workers": (
        lambda seed: bilevel("unrolled", seed, INNER["adamw"]),
        lambda: loaders(1),
        {"keep": 1},
    ),
    "waits, averages": (
        lambda seed: bilevel(LossDifference(baseline=0.5), seed, teacher_losses=LOSSES),
        lambda: (lists()[0], [(x, x.roll(1, 0)) for x in lists()[1]]),
        {"wait": 15, "ema_decay": 0.9},
    ),
    "looks ahead, own generator": (
        lambda seed: bilevel(
            "forward", seed, lookahead=2, generator=torch.Generator().manual_seed(seed)
        ),
        stepwise,
        {"schedule": "constant", "select": False},
    ),
    "one network": (
        lambda seed: single(seed=seed),
        lambda: (loaders()[0], None),
        {"schedule": "exponential"},
    ),
}


def fit(
    kind: str,
    out: Path,
    seed: int = 0,
    resume: Any = True,
    say: Any = lambda text: None,
    callbacks: Any = (),
) -> Any:
    """Fit a trainer of this kind, and return all that it leaves."""
    build, sources, options_of_kind = KINDS[kind]
    torch.set_num_threads(1)
    trainer = build(seed)
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):
        set_seed(7 + seed)
    options = {
        **OPTIONS,
        "steps": STEPS,
        "save_every": 3,
        "log_every": 2,
        "callbacks": [Count(), *callbacks],
        **options_of_kind,
    }
    result = trainer.fit(
        *sources(), out=str(out), resume=resume, progress=False, say=say, **options
    )
    return (
        end_of(trainer, result, out),
        result.teacher_weights,
        trainer.state_dict(),
        result.history,
    )


def child(kind: str, out: Path, begun: Any) -> None:
    """Run a fit in a process of its own, slow enough to be killed in its midst.

    Each save takes a while too.
    """
    sync = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(0.002)
        sync(descriptor)

    os.fsync = slowly
    begun.set()
    fit(kind, out, resume=True)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[pytest.mark.long] * (k not in ("forward, SGD", "one network")))
        for k in KINDS
    ],
)
def test_a_fit_that_is_killed_at_random_again_and_again_ends_as_one_that_was_not(
    kind: str, tmp_path: Path
) -> None:
    """By SIGKILL, in a process of its own, while it trains, saves or begins.

    And half of what it leaves is damaged.
    """
    expected = fit(kind, tmp_path / "whole", resume=False)
    draw = random.Random(kind)
    out = tmp_path / "run"
    processes = multiprocessing.get_context("fork")
    for number in range(3):
        begun = processes.Event()
        process = processes.Process(target=child, args=(kind, out, begun))
        process.start()
        begun.wait(60)
        time.sleep(0.05 + 0.5 * draw.random())
        process.kill()
        process.join()
        newest = [*CheckpointFolder(out / "checkpoints/fit").paths()][:1]
        if number % 2 and len([*CheckpointFolder(out / "checkpoints/fit").paths()]) > 1:
            content = bytearray(newest[0].read_bytes())
            content[draw.randrange(len(content))] ^= 64
            newest[0].write_bytes(content[: draw.choice([len(content), len(content) // 2])])
    said: list[str] = []
    # Without a checkpoint it begins anew, from the seed that it was begun with.
    seed = 1 if CheckpointFolder(out / "checkpoints/fit").paths() else 0
    assert same(fit(kind, out, seed=seed, say=said.append), expected)
    assert any("resumed" in text for text in said) == bool(seed)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fit("forward, SGD", tmp_path_factory.mktemp("whole"), resume=False)


@pytest.mark.parametrize("limit", [1_500, 9_000, 20_000])
def test_a_full_disk_ends_a_fit_and_loses_nothing_that_was_saved(
    limit: int, plain: Any, tmp_path: Path
) -> None:
    """Rows, checkpoints or TensorBoard's events cannot be written."""
    limits_before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits_before[1]))
    try:
        with pytest.raises(MetaplError, match="written"):
            fit("forward, SGD", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits_before)
    has_checkpoint = bool(CheckpointFolder(tmp_path / "run/checkpoints/fit").paths())
    # A fit that goes on has the weights and random numbers of the checkpoint, whatever the seed.
    seed = 1 if has_checkpoint else 0
    assert same(fit("forward, SGD", tmp_path / "run", seed=seed), plain)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 7), (signal.SIGINT, 12), (signal.SIGTERM, 12)],
)
def test_asked_to_stop_a_fit_finishes_its_step_and_saves(
    number: signal.Signals, step: int, tmp_path: Path
) -> None:
    """The same trainer, its learning rates put back, goes on with it."""
    labeled, unlabeled = batches(5)
    ends = []
    for is_stopped in (True, False):
        trainer = bilevel()
        folder = tmp_path / str(is_stopped)
        torch.manual_seed(7)
        if is_stopped:
            handler_before = signal.getsignal(number)
            signaling = Counting(labeled, step, lambda: signal.raise_signal(number))
            with pytest.raises(Interrupted) as interruption:
                trainer.fit(signaling, unlabeled, steps=12, out=folder, **OPTIONS)
            assert interruption.value.step == step
            assert interruption.value.signal_number == number
            assert interruption.value.saved == folder / f"checkpoints/fit/step-{step:08d}.ckpt"
            assert signal.getsignal(number) == handler_before
            assert trainer.schedulable[0].param_groups[0]["lr"] == 0.1
            torch.manual_seed(100)
        result = trainer.fit(
            labeled,
            unlabeled,
            steps=12,
            out=folder,
            resume=is_stopped,
            say=lambda _: None,
            **OPTIONS,
        )
        ends.append(end_of(trainer, result, folder))
    stopped, uninterrupted = ends
    assert same(stopped, uninterrupted)


def test_a_second_ctrl_c_is_not_held_back_and_a_second_sigterm_is() -> None:
    def twice(number: signal.Signals) -> Callable[[], None]:
        return lambda: [signal.raise_signal(number) for _ in range(2)] and None

    with pytest.raises(KeyboardInterrupt) as caught:
        single().fit(Counting(batches(3)[0], 2, twice(signal.SIGINT)), steps=5)
    assert not isinstance(caught.value, Interrupted)
    with pytest.raises(Interrupted):
        single().fit(Counting(batches(3)[0], 2, twice(signal.SIGTERM)), steps=5)


def changed(**changes: Any) -> Callable[..., Any]:
    """Return a fit of one network in which something is otherwise."""

    def run(out: Path, resume: Any) -> Any:
        torch.manual_seed(0)
        options = {
            "rows": 24,
            "seed": 0,
            "batch": 8,
            "shuffle": True,
            "lr": 0.1,
            "momentum": 0.0,
            "smoothing": 0.0,
            "clip": None,
            "steps": 6,
            "warmup": 0,
            "validation": OPTIONS["validation"],
            "validate_every": 2,
            "batch_norm": None,
            "patience": 5,
            "trainer": "one",
            **changes,
        }
        generator = torch.Generator().manual_seed(options["seed"])
        x = torch.randn(options["rows"], 5, generator=generator)
        y = (x[:, 0] > 0).long()
        source = DataLoader(TensorDataset(x, y), options["batch"], shuffle=options["shuffle"])
        fit_options: dict[str, Any] = {
            "steps": options["steps"],
            "warmup": options["warmup"],
            "validation": options["validation"],
            "validate_every": options["validate_every"],
            "patience": options["patience"],
            "batch_norm": options["batch_norm"],
            "out": str(out),
            "resume": resume,
            "progress": False,
            "say": lambda _: None,
        }
        if options["trainer"] == "two":
            return bilevel().fit(source, without_labels(source), **fit_options)
        trainer = single(
            lr=options["lr"],
            losses=(CrossEntropy(options["smoothing"]),),
            clip_norm=options["clip"],
        )
        trainer.optimizer.param_groups[0]["momentum"] = options["momentum"]
        return trainer.fit(source, **fit_options)

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.2},
        {"momentum": 0.9},
        {"smoothing": 0.1},
        {"clip": 1.0},
        {"warmup": 2},
        {"steps": 9},
        {"batch": 6},
        {"rows": 32},
        {"seed": 5},
        {"shuffle": False},
        {"validation": None, "patience": None},
        {"validation": (OPTIONS["validation"][0], 1 - OPTIONS["validation"][1].clamp(max=1))},
        {"validation": tuple(t[:20] for t in OPTIONS["validation"])},
        {"validate_every": 3},
        {"batch_norm": [torch.eye(8, 5)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_was_begun_otherwise_is_refused_by_name_and_goes_on_anyway(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing in the folder has moved by then."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    changed()(tmp_path, resume=False)
    files_before = files()
    name = next(iter(options))
    # The error names some options otherwise than this table.
    texts = {
        "rows": "examples",
        "seed": "first_batch",
        "shuffle": "first_batch",
        "batch": "batch_size",
        "smoothing": "losses",
        "clip": "clip_norm",
    }
    with pytest.raises(MetaplError, match=texts.get(name, name)):
        changed(**options)(tmp_path, resume=True)
    assert files() == files_before
    changed(**options)(tmp_path, "anyway")


def test_an_iterator_is_said_to_have_no_position_and_goes_on_anyway(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path, "save_every": 2, "progress": False}
    labeled, unlabeled = batches(20)
    ends: list[int] = []

    def stop(step: int, row: Any, trainer: Any) -> None:
        ends.append(step)
        if len(ends) == 1 and step == 4:
            raise ValueError("stopped")

    options |= {"log_every": 4, "callbacks": [stop], "steps": 8}
    with pytest.raises(ValueError, match="stopped"):
        bilevel().fit(labeled, iter(unlabeled), **options)
    with pytest.raises(MetaplError, match="an iterator, which has no position; .*='anyway'"):
        bilevel().fit(labeled, iter(unlabeled), **options, resume=True)
    result = bilevel().fit(labeled, iter(unlabeled), **options, resume="anyway")
    assert result.step == 8
    assert any("cannot be resumed" in text for text in result.warnings)
    assert any("goes on where it is" in text for text in result.warnings)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ({"step": 0}, "'step', which the row"),
        ({"inner_loss": 1.0}, "'inner_loss', which the row"),
        ({"f1": "abc"}, "'f1': 'abc'; expected numbers"),
        ({"f1": None}, "'f1': None; expected numbers"),
        ({"f1": torch.ones(2)}, r"'f1': tensor\(\[1., 1.\]\); expected numbers"),
        ({3: 1.0}, "3: 1.0; expected numbers by their names"),
    ],
)
def test_what_a_callback_returns_is_a_number_of_its_own_name(
    returned: dict[Any, Any], text: str, tmp_path: Path
) -> None:
    def numbers(step: int, row: Any, trainer: Any) -> dict[Any, Any]:
        return returned

    labeled, unlabeled = batches(7)
    options: dict[str, Any] = {"out": tmp_path, "steps": 2, "log_every": 1, "progress": False}
    with pytest.raises(MetaplError, match="the callback numbers returned " + text):
        bilevel().fit(labeled, unlabeled, **options, callbacks=[numbers])


def test_numbers_of_numpy_and_of_tensors_join_the_row(tmp_path: Path) -> None:
    def numbers(step: int, row: Any, trainer: Any) -> dict[str, Any]:
        return {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.ones(1), "d": True}

    labeled, unlabeled = batches(7)
    options: dict[str, Any] = {"out": tmp_path, "steps": 2, "log_every": 1, "progress": False}
    result = bilevel().fit(labeled, unlabeled, **options, callbacks=[numbers])
    assert [result.history[-1][name] for name in "abcd"] == [0.5, 2, 1.0, True]


def test_a_trainer_that_is_saved_goes_on_in_another(tmp_path: Path) -> None:
    data = list(zip(*batches(4), strict=True))
    trainer = bilevel(Reinforce(baseline=0.9), 0, INNER["adamw"])
    trainer.step(*data[0])
    for name in ("a.pt", "a.ckpt", "a", "a.safetensors.gz"):
        with pytest.raises(
            MetaplError, match=r"format of safetensors; .* such as a\.safetensors\."
        ):
            trainer.save(tmp_path / name)
    assert not [*tmp_path.iterdir()]
    trainer.save(tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    for name, t in trainer.student.state_dict().items():
        assert torch.equal(tensors[f"trainer/student/{name}"], t)
    state = trainer.state_dict()
    feedback = [trainer.step(*batches_of_step).feedback for batches_of_step in data[1:]]
    end = trainer.state_dict()

    # The other trainer has seen other random numbers by now, and takes these from the file.
    other = bilevel(Reinforce(baseline=0.9), 1, INNER["adamw"])
    other.load(tmp_path / "a.safetensors")
    assert same(other.state_dict(), state)
    assert same([other.step(*batches_of_step).feedback for batches_of_step in data[1:]], feedback)
    assert same(other.state_dict(), end)


def test_the_checkpoint_of_a_fit_is_no_file_of_a_trainer(tmp_path: Path) -> None:
    trainer = bilevel(Reinforce(baseline=0.9), 0, INNER["adamw"])
    outer, inner = (list(side) for side in batches(2))
    trainer.fit(outer, inner, steps=2, out=tmp_path, progress=False)
    before = trainer.state_dict()
    (newest,) = sorted((tmp_path / "checkpoints" / "fit").glob("*.ckpt"))[-1:]
    with pytest.raises(
        MetaplError, match=r"expected a file of save, or fit\(out=\.\.\., resume=True"
    ):
        trainer.load(newest)
    assert same(trainer.state_dict(), before)


class NoisyRows(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise of a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 60

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.generator.standard_normal(4)).float(), torch.tensor(row % 3)


def test_validation_data_with_a_generator_of_their_own_are_the_same_in_each_look(
    tmp_path: Path,
) -> None:
    """A fit that is resumed begins with a new generator."""

    def fitted(out: Path, **options: Any) -> FitResult:
        torch.manual_seed(1)
        student = nn.Linear(4, 3)
        trainer = LossTrainer(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))
        return trainer.fit(
            (torch.randn(60, 4), torch.arange(60) % 3),
            batch_size=8,
            steps=20,
            log_every=5,
            save_every=5,
            validate_every=5,
            validation=DataLoader(NoisyRows(), batch_size=20),
            out=out,
            progress=False,
            **options,
        )

    def stop(step: int, row: Any, trainer: Any) -> None:
        if step >= 10:
            raise KeyboardInterrupt

    whole = fitted(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "killed", callbacks=[stop])
    resumed = fitted(tmp_path / "killed", resume=True)
    assert resumed.step == whole.step
    assert resumed.history[-1] == whole.history[-1]
