"""What each command does once in its process, done once for all that are forked: flags are read, a page is laid out."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import sklearn.model_selection  # noqa: F401 - as the digits are split
from blank import leave_pictures_blank

from metapl.apps.commands import main
from metapl.apps.recipes import Digits
from metapl.apps.reports.picture import draw_report

leave_pictures_blank()
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for command in ("train digits --steps 0", "train images --steps 0", "evaluate nowhere", "predict nowhere x"):
        main(command.split())
Digits().task()
with tempfile.NamedTemporaryFile(suffix=".png") as file:
    draw_report(Path(file.name), title="", curves={}, evaluation=None, network="student")
