"""What a step of each mode costs in student forward passes, and the documentation's account of it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- modes:begin -->", "<!-- modes:end -->"


@pytest.mark.docs
def test_the_page_shows_the_table_of_the_committed_result() -> None:
    command = [sys.executable, "benchmarks/modes.py", "--table", "benchmarks/results/modes.json"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    page = (ROOT / "docs" / "modes.md").read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert page.split(BEGIN)[1].split(END)[0].strip() == table.strip()
