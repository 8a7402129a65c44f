"""What holds in every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

collect_ignore = ["conftest.py", "apps/conftest.py"]  # which hold no test, and share a name

LONGEST = [
    *("test_plan", "test_sharded", "test_pictures", "test_report", "test_recipes", "test_cli_pictures", "test_export"),
    *("test_command_processes", "test_resume", "test_two_moons", "test_delivery", "test_mesh_command", "test_spatial"),
    *("test_noisy_student_pictures", "test_cli", "test_reduced_runs", "test_exact", "test_equal_cost", "test_compile"),
    *("test_image_resume", "test_noisy_student", "test_picture_problems", "test_writes", "test_fit_resumed"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of several processes, none is left alone with one of them at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _no_absent_device_is_seeded() -> Iterator[None]:
    """For each kind of device that is not there, ``torch.manual_seed`` formats the stack, which pytest makes long."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patch.setattr(kind, "manual_seed_all", lambda seed: None)
        yield
