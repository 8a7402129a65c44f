"""Wrong command lines end in one line: what was typed, what was expected, what was meant."""

import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from command import metapl

from metapl.apps.help_pages import flags_of
from metapl.apps.main import COMMANDS, command_type, parsed

IMAGES = "train images --labeled few --unlabeled many"

# Each with what its line has to have: what was typed, and the way out.
WRONG = {
    # A value of another type.
    f"{IMAGES} --steps abc": ("--steps abc: expected a whole number >= 1",),
    f"{IMAGES} --minutes soon": ("--minutes soon: expected a number > 0",),
    f"{IMAGES} --steps=abc": ("--steps abc: expected a whole number >= 1",),
    f"{IMAGES} --labeled_batch x": ("--labeled-batch x: expected a whole number >= 1",),
    "train digits --seed 1.5": ("--seed 1.5: expected a whole number >= 0",),
    "train digits --lr fast": ("--lr fast: expected a number > 0",),
    "train digits --mesh.shard two": ("--mesh.shard two: expected a whole number",),
    "train digits --mesh.shard -1": ("--mesh.shard -1: expected a number of processes >= 1",),
    "train digits --hidden 4 x": ("--hidden 4 x: expected several, each a whole number",),
    "train digits --hidden 0": ("--hidden 0: expected widths of 1 or more",),
    "train digits --compare --jobs 0": ("--jobs 0: expected a whole number >= 1",),
    "train digits --patience never": ("--patience never: expected a whole number >= 1",),
    "noisy-student digits --rounds two": ("--rounds two: expected a whole number >= 1",),
    "ablate digits --draws few": ("--draws few: expected a whole number >= 2",),
    "evaluate run --eps wide": ("--eps wide: expected several, each a number",),
    "predict run x.png --top all": ("--top all: expected a whole number",),
    "label run pictures --out x --batch big": ("--batch big: expected a whole number >= 1",),
    f"train digits --steps {'9' * 5000}": ("--steps 9999", "expected a whole number"),
    # A word that is none of those that a flag takes.
    "train digits --mode forwrd": ("--mode forwrd; did you mean forward?", "Expected unrolled, "),
    "train digits --mode implicit": ("--mode implicit takes", "expected --mode forward"),
    f"{IMAGES} --method mlp": ("--method mlp; did you mean mpl?", "Expected ", "uda, "),
    f"{IMAGES} --method": ("--method was given without a value; expected --method NAME",),
    f"{IMAGES} --grey maybe": ("--grey maybe. Expected True or False.",),
    f"{IMAGES} --grey None": ("--grey None. Expected True or False.",),
    "train digits --schedule linear": (
        "--schedule linear. Expected cosine, constant or exponential.",
    ),
    "noisy-student digits --labels sft": ("--labels sft; did you mean soft?", "soft or hard"),
    "ablate digits --modes forward forwrd": ("--modes forwrd; did you mean forward?",),
    "ablate digits --modes": ("--modes was given without a value; expected one or more of",),
    "ablate digits --modes none none": ("--modes none none: expected one or more", "each once"),
    "evaluate run --attack pdg": ("--attack pdg; did you mean pgd?", "fgsm or pgd"),
    "train digits --compare --methods mlp": (
        "--methods mlp; did you mean mpl?",
        "Expected some of mpl",
    ),
    "train digits --compare --methods": ("--methods was given without a value; expected some",),
    # A flag that there is not, or that another method has.
    f"{IMAGES} --stepz 4": ("there is no flag --stepz; did you mean --steps?",),
    f"{IMAGES} --methd mpl": ("there is no flag --methd; did you mean --method or --methods?",),
    "train images --labelled few --unlabeled many": (
        "there is no flag --labelled; did you mean --labeled?",
    ),
    "train digits -steps 4": ("there is no flag -steps; did you mean --steps?",),
    "train digits --Step 4": ("there is no flag --Step; did you mean --steps?",),
    "train digits --no-warm-start": ("no flag --no-warm-start; did you mean --warm-start False?",),
    "train digits --no-resume": ("--no-resume; --resume is off where it is left out",),
    "train digits --method uda --mode forward": ("--mode is no flag of --method uda", "mpl, none"),
    "runs --zzz": ("there is no flag --zzz of metapl runs; metapl runs --help lists",),
    "export run --out x --netwrk y": ("there is no flag --netwrk; did you mean --network?",),
    "report run --outt x": ("there is no flag --outt; did you mean --out?",),
    # What is missing.
    "train images --labeled few": ("train images was given without --unlabeled DIR", IMAGES[:20]),
    f"{IMAGES} --steps": ("--steps was given without a value; expected --steps INT.",),
    f"{IMAGES} --out --steps 3": ("--out was given without a value; expected --out DIR.",),
    "train digits --out -x": ("--out was given without a value", "--out=-x"),
    "train digits --config": ("--config was given without a value; expected --config FILE.",),
    "train digits --out=": ("--out was given an empty value; expected one, or leave it out",),
    "train digits --out ''": ("--out was given an empty value; expected one, or leave it out",),
    "evaluate ''": ("an empty argument was given",),
    "evaluate": ("evaluate was given without RUN; expected metapl evaluate RUN [flags].",),
    "predict": ("predict was given without RUN; expected metapl predict RUN FILE_OR_FOLDER",),
    "export": ("export was given without RUN and --out DIR; expected metapl export RUN --out",),
    "label run": ("label was given without PICTURES and --out STORE; expected metapl label RUN",),
    "labels select store": ("labels select was given without --out STORE2; expected metapl",),
    "ablate": ("ablate was given without --factory MODULE:FUNCTION; expected metapl ablate",),
    # A word too many, or a command that there is not.
    "train digits extra": ("'extra' is one argument too many. Expected metapl train digits",),
    "train digits steps 4": ("'steps' is one argument too many; did you mean --steps?",),
    "train digits --resume yes": ("--resume takes no value; leave out 'yes'.",),
    "train digits --resume=yes": ("--resume takes no value; leave out 'yes'.",),
    "train digits --seeds 0 1": ("--seeds takes one value, and '1' is another",),
    "evaluate one two": ("'two' is one argument too many. Expected metapl evaluate RUN",),
    "ablate digts": ("'digts' is one argument too many; did you mean ablate digits",),
    "train digit": ("there is no command 'train digit'; did you mean train digits?",),
    "labels": ("labels alone is no command; expected one of labels stats, labels select",),
    "train --config .": ("--config . is a folder; expected the recipe.json of a run, such as",),
    "help train digit": ("there is no command 'train digit'; did you mean train digits?",),
    "--version more": ("--version takes no value; leave out 'more'.",),
    "--verison": ("there is no command '--verison'; did you mean --version?",),
    "train digits --steps 'a\nb'": ("--steps a\\nb: expected a whole number",),
    "train digits 'a\x1bb'": ("'a\\x1bb' is one argument too many",),
    f"runs --{'x' * 5000}": ("there is no flag --xxxx",),
    "--print-completion": ("--print-completion SHELL, one of bash, zsh, fish",),
    "--print-completion ksh": ("--print-completion ksh", "one of bash, zsh, fish"),
}

# A flag or a value that was meant, in the place of the one that was typed.
MENDED = [
    (f"{IMAGES} --method mlp", "mlp"),
    (f"{IMAGES} --stepz 4", "--stepz"),
    (f"{IMAGES} --methd mpl", "--methd"),
    ("train images --labelled few --unlabeled many", "--labelled"),
    ("train digits --mode forwrd", "forwrd"),
    ("train digits -steps 4", "-steps"),
    ("train digits --no-warm-start", "--no-warm-start"),
    ("train digits --labels-per 4", "--labels-per"),
    ("train digits --setps 4", "--setps"),
    ("noisy-student digits --labels sft", "sft"),
    ("ablate digits --modes forwrd", "forwrd"),
    ("evaluate run --attack pdg", "pdg"),
    ("export run --out x --netwrk student", "--netwrk"),
]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_ends_in_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = metapl(*shlex.split(line), code=2)
    assert done.stdout == ""
    said = done.stderr
    assert said.startswith("metapl: ")
    assert said.count("\n") == 1
    assert said.endswith((".\n", "?\n", "--help\n"))
    for part in WRONG[line]:
        assert part in said
    assert "Traceback" not in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("line", "wrong"), MENDED)
def test_what_an_error_proposes_is_taken(line: str, wrong: str) -> None:
    said = metapl(*shlex.split(line), code=2).stderr
    proposals = said.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert all(proposals)
    for proposal in proposals:
        words: list[str] = []
        for word in shlex.split(line):
            words += proposal.split() if word == wrong else [word]
        name, _ = parsed(words)
        assert line.startswith(name)


def test_help_takes_a_command_behind_it() -> None:
    assert metapl("help", "train", "digits").stdout == metapl("train", "digits", "--help").stdout
    assert metapl("--help", "runs").stdout == metapl("runs", "-h").stdout


def test_each_command_refuses_a_flag_that_there_is_not() -> None:
    for name in COMMANDS:
        said = metapl(*name.split(), "--qqqq", code=2).stderr
        assert said == (
            f"metapl: there is no flag --qqqq of metapl {name}; metapl {name}"
            f"{of_method(name)} --help lists its flags.\n"
        )


def of_method(name: str) -> str:
    method = getattr(command_type(name), "method_name", None)
    return "" if method is None else f" --method {method}"


@pytest.mark.long
def test_each_flag_of_a_number_refuses_a_word() -> None:
    """Every flag that takes a number says so, with its name and the word, in the first command."""
    tried: set[str] = set()
    for name in COMMANDS:
        kind = command_type(name)
        flags = flags_of(kind)
        needed: list[str] = []
        for flag in flags:
            if flag.is_required and not flag.is_positional:
                needed += [flag.name, "x"]
        needed += ["x" for flag in flags if flag.is_positional and flag.is_required]
        for flag in flags:
            if flag.metavar in ("INT", "FLOAT") and flag.name not in tried:
                said = metapl(*name.split(), *needed, flag.name, "qqqq", code=2).stderr
                assert said.startswith(f"metapl: {flag.name} qqqq: expected "), (name, flag)
                assert "number" in said
                assert said.count("\n") == 1
                tried.add(flag.name)
    assert len(tried) > 40


def test_a_release_of_tyro_without_the_hook_ends_with_the_same_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(tyro._errors, "on_parse_error")
    said = metapl("train", "digits", "--steps", "abc", code=2).stderr
    assert "--steps" in said
    assert "abc" in said


@pytest.mark.parametrize("words", ["train digits --mode forwrd", "evaluate"])
def test_the_line_is_the_same_in_a_terminal(words: str) -> None:
    """The program in a process of its own, whose standard error is a terminal of 60 columns."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60"}
    program = [sys.executable, "-m", "metapl", *words.split()]
    done = subprocess.run(
        program, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=False
    )
    os.close(terminal)
    said = os.read(controller, 10_000).decode().replace("\r\n", "\n")
    os.close(controller)
    assert done.returncode == 2
    assert done.stdout == b""
    assert said == metapl(*words.split(), code=2).stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_shell_completes_the_flags_of_every_method(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(metapl("--print-completion", "bash", code=0).stdout)
    cases = {
        "metapl train digits --method mpl --wa": {"--warmup", "--warm-start", "--wait"},
        "metapl train images --method mpl --mo": {"--mode"},
        "metapl train images --mesh": {"--mesh.replicate", "--mesh.shard"},
        "metapl train digits --conf": {"--config"},
        "metapl train digits --mode for": {"forward"},
        "metapl train digits --mode im": set(),
        "metapl train images --method fix": {"fixmatch"},
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
