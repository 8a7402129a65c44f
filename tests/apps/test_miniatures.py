"""Each benchmark runs in miniature: the first half of them; the others in test_benchmarks.py."""

from pathlib import Path

import pytest
from benchmark_runs import FIRST, check_miniature, miniatures

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]


@miniatures(FIRST)
def test_a_miniature_leaves_rows_and_tables(script: str, tmp_path: Path) -> None:
    check_miniature(script, tmp_path)
