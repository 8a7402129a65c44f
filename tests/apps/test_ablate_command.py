"""``metapl ablate``: what it writes and says, networks of a user's own, wrong input."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from forked import Forked

import metapl
from metapl.apps.commands import main
from metapl.apps.commands.ablate import COMMANDS

OWN = """
import torch, metapl

def build():
    teacher, student = (torch.nn.Linear(6, 3) for _ in range(2))
    x = torch.randn(12, 6)
    return metapl.BilevelTrainer(teacher, student, "forward"), (x, torch.arange(12) % 3), torch.randn(9, 6)

def with_helper():
    import my_helper
    trainer, labeled, unlabeled = build()
    return trainer, my_helper.labeled(), unlabeled

def wrong():
    return 3

def too_few():
    return build()[:2]

def asks(x):
    return x

def fails():
    return {}["students"]

def leaves():
    raise SystemExit

def mode():
    return metapl.BilevelTrainer(torch.nn.Linear(6, 3), torch.nn.Linear(6, 3), "forwards")
"""

HELPER = """
import torch

def labeled():
    return torch.randn(12, 6), torch.arange(12) % 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_networks.py").write_text(OWN)
    (tmp_path / "my_helper.py").write_text(HELPER)
    (tmp_path / "my_typo.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "my_syntax.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def test_it_writes_figures_and_recommends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "ablate digits --steps 4 --draws 2 --rounds 1 --out there"
    assert main(arguments.split()) == 0
    said = capsys.readouterr().out
    content = json.loads((folder / "there/ablation.json").read_text())
    assert content["recommendation"] in " ".join(said.split())
    assert set(content["modes"]) == set(metapl.MODES)
    figures = {"cosine", "relative_error", "noise_to_signal", "passes", "seconds", "peak_bytes"}
    assert set(content["modes"]["forward"]) == figures
    assert set(content["modes"]["implicit"]) == {"reason"}
    assert content["points"] == [0, 2, 4]
    assert content["recommended"] in ("forward", "unrolled")
    assert [*content["altered"]] == ["forward_permuted", "forward_class_means", "forward_random_sign"]
    assert max(map(len, said.splitlines())) <= 80
    assert "altered feedback, as a control" in said


def test_the_help_names_the_recipes_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--help"]) == 0
    said = capsys.readouterr().out
    named = {line.split()[0] for line in said.splitlines() if line.startswith("  ") and line.split()[0] != "metapl"}
    assert named == {*COMMANDS}
    assert max(map(len, said.splitlines())) <= 80


def test_networks_of_ones_own(folder: Path) -> None:
    """In a process of its own: the module is found in the folder in which the command is called."""
    arguments = "ablate --factory my_networks:with_helper --modes forward reinforce --rounds 1"
    born = Forked(arguments.split(), cwd=folder)
    out, err = born.communicate()
    assert born.returncode == 0, err
    assert "Take forward" in out
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == [".py"] * 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--factory my_networks:wrong", "returned a value of type int; expected (trainer, labeled, unlabeled)"),
        ("--factory my_networks:too_few", "returned (BilevelTrainer, tuple); expected (trainer, labeled, unlabeled)"),
        ("--factory my_networks:biuld", "AttributeError: module 'my_networks' has no attribute 'biuld'"),
        ("--factory my_networks:asks", "asks failed: TypeError: asks() missing 1 required positional argument: 'x'"),
        ("--factory my_networks:fails", "fails failed: KeyError: 'students' (my_networks.py, line 24).\n"),
        ("--factory my_networks:leaves", "leaves failed: SystemExit (my_networks.py, line 27)"),
        ("--factory my_networks:mode", "mode='forwards' was given; expected one of"),
        ("--factory elsewhere:build", "No module named 'elsewhere'; expected module:function"),
        ("--factory my_typo:build", "build failed: ModuleNotFoundError: No module named 'nowhere_to_be_fo"),
        ("--factory my_syntax:build", "build failed: SyntaxError: invalid syntax (my_syntax.py, line 1)"),
        ("--factory os.getcwd", "names no function; expected module:function"),
        ("--factory my_networks", "expected module:function, such as my_networks:build"),
        (
            "--factory my_networks.py:build",
            "expected module:function, such as my_networks:build of my_networks.py in this folder",
        ),
        (
            "--factory nets/mine.py:build",
            "expected module:function, such as my_networks:build of my_networks.py in this folder",
        ),
        ("--factory my_networks:build --steps -1", "--steps -1: expected a whole number from 0 to"),
        ("digitz", "there is no recipe 'digitz'; did you mean digits?"),
        ("digits --modes forwards", "mode='forwards' was given; expected one of"),
        ("digits --modes forward forward", "each name once"),
        ("digits --steps 2 --out my_networks.py", "is a file; expected a folder"),
        ("digits --draws 1", "--draws 1: expected a whole number from 2 to 10,000."),
        ("digits --rounds 0", "--rounds 0: expected a whole number from 1 to 10,000."),
        ("digits --ema-decay 0.9 --finetune.lr 1", "Unrecognized options: --ema-decay, 0.9, --finetune.lr, 1. See"),
        ("images --labeled a --unlabeled b --pad 2", "Unrecognized options: --pad, 2. See metapl ablate images --help"),
        ("images --labeled a --unlabeled b --method mpl", "Unrecognized options: --method, mpl. See"),
        ("digits --alterd", "Unrecognized options: --alterd. Perhaps you meant: --no-altered"),
        ("", "no recipe was named"),
    ],
)
def test_wrong_input_ends_in_a_sentence(
    arguments: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert text in err
    assert err.startswith("metapl: ")
    assert len(err.splitlines()) == 1
    assert not out
    assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".py"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_ends_it_in_one_line(folder: Path) -> None:
    arguments = "ablate --factory my_networks:build --steps 100000 --rounds 1 --out there"
    running = Forked(arguments.split(), cwd=folder)
    deadline = time.monotonic() + 60
    while not (folder / "there").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.strip() == "metapl: stopped."
    assert not (folder / "there").exists()


@pytest.mark.docs
def test_the_page_shows_the_run_whose_figures_are_kept() -> None:
    root = Path(__file__).parents[2]
    content = json.loads((root / "benchmarks/results/ablate_digits.json").read_text())
    page = (root / "docs/modes.md").read_text()
    assert content["recommendation"] in " ".join(page.split())
    rows = {line.split()[0]: line.split() for line in reversed(page.splitlines()) if line}  # the first table counts
    ran = {name: row for name, row in {**content["modes"], **content["altered"]}.items() if "reason" not in row}
    assert len(ran) == len(metapl.MODES) - 1 + 3
    for name, row in ran.items():
        assert rows[name][1] == f"{row['cosine']:.3f}"
        assert rows[name][4] == f"{row['passes']:.1f}"
    assert content["modes"]["implicit"]["reason"] in " ".join(page.split())
