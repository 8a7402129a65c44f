"""The scripts by which shells complete the command, run by the shells that are there."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from metapl.apps.commands import main

# Of each line that it reads, a line of completions.
COMPLETE = """
source "$1"
while IFS= read -r line; do
  read -ra COMP_WORDS <<< "metapl $line"
  [[ "$line" == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_LINE="metapl $line"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
  _tyro_metapl
  echo "${COMPREPLY[@]}"
done
"""
FEW = {
    "tr": {"train"},
    "train dig": {"digits"},
    "train digits --feedback-": {"--feedback-weight", "--feedback-ratio"},
    "train digits --mode ": {"forward", "reinforce", "none"},
    "train images --changes.mir": {"--changes.mirror"},
    "train digits --method uda --uda-": {"--uda-weight", "--uda-temperature"},
    "train digits --method noisy_student --rou": {"--rounds"},
    "attribute runs/mine --each": {"--each-class"},
    "evaluate runs/mine --network ": {"delivered", "student", "teacher"},
}
MORE = {
    "train noi": {"noisy"},
    "train noisy --clean-b": {"--clean-batch"},
    "evaluate runs/mine --net": {"--network"},
    "run": {"runs"},
    "rep": {"report"},
    "att": {"attribute"},
    "report runs/mine --o": {"--out"},
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("completed", [FEW, pytest.param(MORE, marks=pytest.mark.long)])
def test_bash_completes_commands_recipes_flags_and_values(completed: dict[str, set[str]], tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--print-completion", "bash"]) == 0
    (tmp_path / "script").write_text(printed.getvalue())
    command = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "script")]
    lines = "".join(f"{line}\n" for line in completed)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for (line, expected), found in zip(completed.items(), map(str.split, done.stdout.splitlines()), strict=True):
        assert expected <= {*found}, line
        assert len(expected) > 1 or {*found} == expected, line


@pytest.mark.long
@pytest.mark.parametrize(("shell", "begins"), [("zsh", "#compdef metapl"), ("fish", "#")])
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
