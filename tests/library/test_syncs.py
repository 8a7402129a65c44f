"""No step makes the host wait for the device.

On CUDA, PyTorch itself raises where it would. Elsewhere the step runs as it would on an accelerator
(nothing is looked at on the spot), and every operator counts that reads a value out of a tensor, or
whose result has a shape that depends on values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from problems_zoo import ANYWHERE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import metapl
from metapl.execution import checks
from metapl.problems.losses import UDA, CrossEntropy
from metapl.training.loss_trainer import LossTrainer

Block = Callable[[], AbstractContextManager[None]]
WAITS = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "equal",
    "unique_dim",
)


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    monkeypatch.setattr(checks, "waits", lambda t: True)
    with Waits() as waits:
        yield waits


def networks(device: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(288, 4),
        ).to(device)

    return network(), network()


def trainer(mode: Any, device: str, **options: Any) -> metapl.BilevelTrainer:
    teacher, student = networks(device)
    losses = (CrossEntropy(0.1), UDA(threshold=0.3))
    return metapl.BilevelTrainer(
        teacher, student, mode, teacher_losses=losses, clip_norm=1.0, verify=False, **options
    )


def batches(device: str) -> tuple[Any, Any]:
    torch.manual_seed(1)
    labeled = torch.randn(4, 3, 8, 8), torch.arange(4)
    views = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    return tuple(t.to(device) for t in labeled), tuple(t.to(device) for t in views)


SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{mode: (mode, {}) for mode in ANYWHERE},
    "reinforce with a baseline": (metapl.feedback.Reinforce(similarity="cosine", baseline=0.9), {}),
    "a ratio": ("forward", {"feedback_ratio": 0.1}),
    "micro-batches": ("forward", {"accumulate": 2}),
    "bfloat16": ("reinforce", {"precision": "bfloat16"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, options = SETTINGS[name]
    stepping = trainer(mode, "cpu", **options)
    labeled, unlabeled = batches("cpu")
    # What signal leaves is looked at in the first two steps.
    for _ in range(2):
        stepping.step(labeled, unlabeled)
    with as_on_an_accelerator(monkeypatch) as waits:
        report = stepping.step(labeled, unlabeled)
        assert waits.operations == []
        assert report.fault.findings, "it ran as on the CPU, where it may look at values"
        report.as_dict()


@pytest.mark.parametrize("wait", ["teacher_step", "supervised"])
def test_nor_do_the_other_steps(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labeled, unlabeled = batches("cpu")
    with as_on_an_accelerator(monkeypatch) as waits:
        if wait == "teacher_step":
            trainer("forward", "cpu").teacher_step(labeled, unlabeled)
        else:
            model, _ = networks("cpu")
            LossTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).step(labeled)
        assert waits.operations == []


def test_nor_does_the_loop_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedule and averages do not wait between two looks at the numbers.

    The first step looks once: it chooses its order of differentiation.
    """
    stepping = trainer("forward", "cpu")
    labeled, unlabeled = batches("cpu")
    counts: list[int] = []
    with as_on_an_accelerator(monkeypatch) as waits:
        step = stepping.step

        def noted(*args: Any) -> Any:
            counts.append(len(waits.operations))
            return step(*args)

        stepping.step = noted  # type: ignore[method-assign]
        stepping.fit(
            [labeled],
            [unlabeled],
            steps=8,
            wait=2,
            ema_decay=0.9,
            log_every=100,
            validate_every=100,
        )
    assert len(counts) == 6
    assert counts == [0] + [1] * 5


def test_a_look_at_a_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter can fail: it counts a look at the loss, as many training loops have one."""
    stepping = trainer("forward", "cpu")
    # The first step chooses its order of differentiation.
    stepping.step(*batches("cpu"))
    with as_on_an_accelerator(monkeypatch) as waits:
        report = stepping.step(*batches("cpu"))
        if report.scalars["inner_loss"] > 0:
            report.scalars["inner_loss"].item()
    assert len(waits.operations) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "unrolled"])
def test_cuda_is_not_waited_for(name: str, cuda_may_not_wait: Block) -> None:
    mode, options = SETTINGS[name]
    stepping = trainer(mode, "cuda", **options)
    labeled, unlabeled = batches("cuda")
    for _ in range(3):
        stepping.step(labeled, unlabeled)
    torch.cuda.synchronize()
    with cuda_may_not_wait():
        stepping.step(labeled, unlabeled)


def test_the_mode_of_the_process_is_reset_after_an_error(
    cuda_may_not_wait: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's warning that the mode is a prototype is no error.

    The suite's other warnings are.
    """
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet ...",
                stacklevel=2,
            )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)

    def wait() -> None:
        assert modes == ["error"]
        raise RuntimeError("called a synchronizing operation")

    with pytest.raises(RuntimeError, match="called a synchronizing operation"), cuda_may_not_wait():
        wait()
    assert modes == ["error", "default"]
