"""Things at a path that are no plain files, by name: functions that make one there."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest


def device(path: Path) -> None:
    """A character device that takes everything and gives nothing, of this test's own."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")


def bound(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as there:
            there.bind(path.name)
    finally:
        os.chdir(before)


KINDS = {"pipe": os.mkfifo, "device": device, "socket": bound}
