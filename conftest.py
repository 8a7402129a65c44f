"""What holds in every test and in every example of a docstring."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _the_same_numbers_are_drawn_each_time() -> None:
    """Seed the CPU's generator.

    A test or an example that draws without a seed of its own passes always or never.
    """
    import torch

    torch.default_generator.manual_seed(0)
