"""What holds in every test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with slow tests first: of several processes, none is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _small_pages() -> Iterator[None]:
    """Pages of 30 dots an inch: of a run of a second, half is the picture that it ends with."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError):  # a checkout without the reports
            _drawn_at(patch, 30)
        yield


@pytest.fixture(scope="module")
def full_pages() -> Iterator[None]:
    """Pages as users get them, from here to the end of the file."""
    with pytest.MonkeyPatch.context() as patch:
        _drawn_at(patch, 150)
        yield


def _drawn_at(patch: pytest.MonkeyPatch, dots: int) -> None:
    from metapl.apps.reports.canvas import STYLE

    patch.setitem(STYLE, "figure.dpi", dots)
