"""What needs a newer torch than the oldest one that pyproject.toml names."""

from __future__ import annotations

import pytest
import torch
from torch.torch_version import TorchVersion


def require_torch(version: str, reason: str) -> None:
    """Skip the running test below a release of torch, with the reason."""
    if torch.__version__ < TorchVersion(version):
        pytest.skip(f"{reason} from torch {version} on, and this is {torch.__version__}")
