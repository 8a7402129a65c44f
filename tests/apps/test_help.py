"""What tyro prints for the command: help, completion, and what is said of wrong flags."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import metapl

from metapl.apps.commands import TrainImages
from metapl.apps.main import COMMANDS, TRUE_OR_FALSE, tell_error
from metapl.errors import MetaplError, origin

IMAGES = "train images --labeled few --unlabeled many"

# Wrong command lines, each with words that are said of it.
WRONG = {
    "": ("train", "predict"),
    "trian": ("metapl: metapl has no trian; expected train, ", "; did you mean train?"),
    "train": ("metapl: metapl train was typed alone; expected images or digits behind it.",),
    "train imges": ("metapl train has no imges; expected images or digits; did you mean images?",),
    "train table --labeled few": ("metapl train has no table; expected images or digits.",),
    f"{IMAGES} --steps abc": ("metapl: --steps abc: expected a whole number.",),
    f"{IMAGES} --steps 0": ("metapl: --steps 0: expected a whole number >= 1",),
    f"{IMAGES} --lr -0.1": ("metapl: --lr -0.1: expected a number > 0.",),
    f"{IMAGES} --minutes -1": ("metapl: --minutes -1.0: expected a number > 0 and <= 527,040.",),
    f"{IMAGES} --minutes soon": ("metapl: --minutes soon: expected a number.",),
    f"{IMAGES} --grey maybe": ("--grey maybe was given; expected --grey True or --grey False.",),
    f"{IMAGES} --mirror": ("--mirror was given; expected --mirror True or --mirror False.",),
    f"{IMAGES} --mirror --steps 9": ("expected --mirror True or --mirror False.",),
    "train digits --warm_start=yes": ("--warm-start yes was given; expected --warm-start True",),
    f"{IMAGES} --stepz 4": ("--stepz: there is no such flag; did you mean --steps?",),
    f"{IMAGES} --method supervised --uda-threshold 0.5": (
        "--uda-threshold: a flag of --method uda or fixmatch or mpl or none or reduced_mpl or "
        "reduced_none; leave it out, or give one of these.",
    ),
    "train images --labeled few --uda-threshold 0.5": ("a flag of --method uda or fixmatch",),
    "train images --labled few": ("--labled: there is no such flag; did you mean --labeled",),
    f"{IMAGES} --steps": ("Missing value", "--steps"),
    f"{IMAGES} --method mlp": ("--method mlp: expected one of uda, ", "; did you mean mpl?"),
    f"{IMAGES} --method fixmach": ("; did you mean fixmatch?",),
    f"{IMAGES} --method": ("Missing value", "--method"),
    f"{IMAGES} --config": ("Missing value", "--config"),
    "train images": ("--labeled", "required"),
    "train digits --method uda --mode forward": ("--mode",),
    "train digits --mode implicit": ("--mode implicit: expected one of ", "forward"),
    "train digits --mesh.shard -1": ("--mesh.shard -1: expected a number of processes >= 1",),
    "train digits extra": ("extra",),
    "train digits --config .": ("is a folder; expected the recipe.json of a run",),
    "noisy-student digits --rounds two": ("--rounds", "two"),
    "ablate digits --modes none none": ("expected one or more", "each once"),
    "ablate": ("--factory", "required"),
    "evaluate": ("RUN", "required"),
    "evaluate run --attack pgd --eps -2": ("--eps -2.0: expected several, each a number >= 0",),
    "predict run x.png --top all": ("--top", "all"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = metapl(*shlex.split(line), code=2)
    said = done.stderr
    for words in WRONG[line]:
        assert words in said
    # It is one line, for a program that reads it.
    assert said.startswith("metapl: ")
    assert said.count("\n") == 1
    assert done.stdout == ""
    assert "Traceback" not in said
    assert not [*tmp_path.iterdir()]


def unboxed(text: str) -> str:
    """Return what tyro prints, without its boxes, as one line."""
    return " ".join(text.replace("│", " ").split())


def test_the_list_of_commands_imports_none_of_them() -> None:
    program = (
        "import sys; from metapl.apps.main import main; code = main(['--help']); "
        "print([name for name in sys.modules if name.startswith('metapl.apps.')]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, entry in COMMANDS.items():
        assert f"• {name.split()[0]} " in done.stdout
        assert f"metapl.apps.{entry.module}" not in done.stdout
    assert re.fullmatch(r"metapl \d+\.\d+\S*\n", metapl("--version").stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_flag_is_explained(name: str) -> None:
    text = metapl(*name.split(), "--help").stdout
    assert text.startswith(f"usage: metapl {name} [-h]")
    words = unboxed(text)
    # Between a flag, with what stands for its value, and its default is what it does.
    assert not re.findall(r"(--[\w.-]*\w)(?: [A-Z{\[]\S*)? \((?:default|required)", words)


def test_the_flags_of_true_or_false_are_those_that_help_lists() -> None:
    commands = [(name, name.split()) for name in COMMANDS]
    commands += [
        ("train images", ["train", "images", "--method", name]) for name in TrainImages.methods
    ]
    listed: dict[str, set[str]] = {}
    for name, words in commands:
        text = unboxed(metapl(*words, "--help").stdout)
        flags = re.findall(r"(--[\w-]+) \{True,False\}", text)
        if flags:
            listed.setdefault(name, set()).update(flags)
    assert {name: {*flags} for name, flags in TRUE_OR_FALSE.items()} == listed


def test_the_help_of_a_method_has_its_flags() -> None:
    help_of_uda = metapl("train", "images", "--method", "uda", "--help").stdout
    assert "--uda-weight" in help_of_uda
    assert "--wait" not in help_of_uda
    help_of_mpl = metapl("train", "images", "--method=mpl", "--help").stdout
    assert "--wait" in help_of_mpl
    assert "Train a student on a teacher's labels" in help_of_mpl


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_as_wide_as_a_terminal(name: str) -> None:
    text = metapl(*name.split(), "--help").stdout
    assert max(map(len, text.splitlines())) <= 80


def test_an_error_is_broken_into_lines_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a folder of pictures was given " * 5
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert tell_error(MetaplError(text.strip())) == 2
        lines = capsys.readouterr().err.splitlines()
        assert (max(map(len, lines)) <= 80) == (len(lines) > 1) == is_terminal


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_shell_completes_commands_and_flags(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(metapl("--tyro-print-completion", "bash").stdout)
    cases = {
        "metapl train digits --warm": {"--warmup", "--warm-start"},
        "metapl train images --mesh": {"--mesh.replicate", "--mesh.shard"},
        "metapl train digits --conf": {"--config"},
        "metapl train digits --mode for": {"forward"},
        "metapl train images --method reduced_m": {"reduced_mpl"},
        "metapl ablate digits --no-al": {"--no-altered"},
        "metapl noisy-student dig": {"digits"},
    }
    for line, expected in cases.items():
        words = line.split()
        commands = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _tyro_metapl; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", commands], capture_output=True, text=True, check=True)
        assert {*done.stdout.split()} == expected, line


def test_help_says_how_to_install_an_extra_as_the_errors_do() -> None:
    """Metapl is on no package index."""
    installed = f"pip install '{origin()}[labels,onnx,timm]'"
    assert installed in metapl("--help").stdout
    for name, extra in (("label", "labels"), ("export", "onnx")):
        text = unboxed(metapl(*name.split(), "--help").stdout)
        assert f"It needs the extra {extra}, see metapl --help." in text
