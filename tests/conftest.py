"""What holds in every test."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

collect_ignore = ["conftest.py", "apps/conftest.py"]  # which hold no test, and share a name

# A job in the background is born ignoring Ctrl-C and hangups, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What is imported and collected stays, two million objects: no test looks for garbage among them.
gc.disable()

LONGEST = [
    *(
        "test_sharded",
        "test_verify",
        "test_compile",
        "test_ranks",
        "test_resume",
        "test_commands",
    ),
    *(
        "test_planted_faults",
        "test_fit_resumed",
        "test_functional",
        "test_long_paths",
    ),
    *(
        "test_views",
        "test_export",
        "test_picture_batches",
        "test_attribute_command",
        "test_package",
        "test_refusals",
    ),
    *("test_folders", "test_attribution", "test_cost", "test_bits"),
    *("test_modes", "test_planted", "test_command_outcomes", "test_first_call"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first.

    Of several processes, none is left alone with one of them at the end.
    """
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    # pytest listens to loggers that pass nothing on. To this one torch writes traces of all that it
    # compiles, with the stack of each frame, if anybody listens.
    logging.getLogger("torch.__trace").propagate = True


def pytest_collection(session: pytest.Session) -> None:
    """Let each of several processes begin with other files.

    All of them need ten seconds for asserts to be rewritten.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]
    processes = os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)
    if int(processes) > 1 and session.config.args == session.config.getini("testpaths"):
        for file in sorted(Path(__file__).parent.glob("*/test_*.py"))[
            int(number) :: int(processes)
        ]:
            with suppress(Exception, pytest.skip.Exception):  # which collecting it tells of
                importlib.import_module(file.stem)


@pytest.fixture(scope="session", autouse=True)
def _no_absent_device_is_seeded() -> Iterator[None]:
    """Seed no device that is not there.

    For each such kind ``torch.manual_seed`` formats the stack, which pytest makes long.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patch.setattr(kind, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(autouse=True)
def _no_call_was_verified_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first call of ``metapl.hypergradient`` in each test be verified."""
    from metapl.guards.verification import first_calls

    monkeypatch.setattr(first_calls, "VERIFIED", first_calls.VerifiedCalls())


@pytest.fixture
def cuda_may_not_wait() -> Callable[[], AbstractContextManager[None]]:
    """Return a block in which CUDA raises where the host would wait for it.

    The mode is one of the process, so the block resets it, also after an error. Torch says once in
    a process that the mode is a prototype; the tests expect that.
    """
    import torch

    @contextmanager
    def block() -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "Synchronization debug mode is a prototype", UserWarning
                )
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return block
