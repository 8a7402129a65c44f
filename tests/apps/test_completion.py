"""The scripts by which shells complete the command, run by the shells that are there."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from metapl.apps.commands import main

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
_tyro_metapl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``metapl --print-completion bash`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["--print-completion", "bash"]) == 0
    file = tmp_path_factory.mktemp("completion") / "metapl"
    file.write_text(printed.getvalue())
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tr", {"train"}),
        ("train dig", {"digits"}),
        ("train digits --feedback-", {"--feedback-weight", "--feedback-ratio"}),
        ("train digits --mode ", {"forward", "reinforce", "none"}),
        ("train images --changes.mir", {"--changes.mirror"}),
        ("train digits --method uda --uda-", {"--uda-weight", "--uda-temperature"}),
        ("train digits --method noisy_student --rou", {"--rounds"}),
        ("train noi", {"noisy"}),
        ("train noisy --clean-b", {"--clean-batch"}),
        ("evaluate runs/mine --net", {"--network"}),
        ("run", {"runs"}),
        ("rep", {"report"}),
        ("att", {"attribute"}),
        ("attribute runs/mine --each", {"--each-class"}),
        ("report runs/mine --o", {"--out"}),
        ("evaluate runs/mine --network ", {"delivered", "student", "teacher"}),
    ],
)
def test_bash_completes_commands_recipes_flags_and_values(script: Path, line: str, expected: set[str]) -> None:
    command = ["bash", "-c", COMPLETE, "bash", str(script), "metapl", *line.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert expected <= found
    assert len(expected) > 1 or found == expected


@pytest.mark.parametrize(
    ("shell", "begins"), [pytest.param("zsh", "#compdef metapl", marks=pytest.mark.long), ("fish", "#")]
)
def test_other_shells_have_scripts_too(shell: str, begins: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["--print-completion", shell]) == 0
    text = capsys.readouterr().out
    assert text.startswith(begins)
    assert "--feedback-weight" in text


@pytest.mark.parametrize("given", [[], ["tcsh"], ["bash", "zsh"]])
def test_another_shell_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", *given]) == 2
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err
