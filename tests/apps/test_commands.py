"""The command line.

What is typed in the pages parses, what is refused leaves every file as it was; and what each
command that reads a run says and writes.
"""

import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command import edited, metapl, reseal, result, rows
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tiny_runs import TINY, color_folders

from metapl.apps import look
from metapl.apps.digits import Digits
from metapl.apps.main import COMMANDS, parsed
from metapl.apps.settings import flag_values
from metapl.errors import MetaplError
from metapl.labels.store import LabelStore
from metapl.robustness import CORRUPTIONS
from metapl.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def typed() -> list[str]:
    """Return the command lines of the pages, as one types them."""
    lines: list[str] = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(
                    r"^(\$ )?(torchrun|python) .*-m metapl\.apps ", "metapl ", line.strip()
                )
                if re.match(r"(\$ )?metapl (?!--)[a-z]", line):
                    lines.append(line.removeprefix("$ "))
    return sorted({*lines})


@pytest.mark.docs
@pytest.mark.parametrize("line", typed())
def test_a_command_line_of_a_page_parses(
    line: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some lines read the recipe of a run.
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for copy in ("runs/mine/recipe.json", "mine.json"):
        shutil.copy(tiny / "recipe.json", tmp_path / copy)
    monkeypatch.chdir(tmp_path)
    name, command = parsed(shlex.split(line, comments=True)[1:])
    assert name in COMMANDS
    assert callable(command.run)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--method uda --steps 3", ("uda", {"steps": 3})),
        ("--steps 3 --method=uda --uda-weight 2", ("uda", {"uda_weight": 2.0})),
        ("--uda-weight 2 --method mpl", ("mpl", {"uda_weight": 2.0})),
        ("", ("mpl", {"steps": 6000})),
        (
            "--compare --methods mpl none --seeds 0-1",
            ("mpl", {"methods": ("mpl", "none"), "seeds": "0-1"}),
        ),
        ("--methods mpl,none --compare --method uda", ("uda", {"methods": ("mpl,none",)})),
        ("--method uda --method mpl --wait 3", ("mpl", {"wait": 3})),
        ("--hidden 4 8 --lr 0.1", ("mpl", {"hidden": (4, 8), "lr": 0.1})),
    ],
)
def test_a_method_is_named_before_or_behind_the_flags(
    words: str, expected: tuple[str, dict[str, Any]]
) -> None:
    _, command = parsed(["train", "digits", *words.split()])
    assert command.method.name == expected[0]
    assert flag_values(command).items() >= expected[1].items()


IMAGES = "train images --labeled {few} --unlabeled {few} --test {few} --out {new}"
DIGITS = "train digits --steps 6 --finetune-steps 4 --out {new}"
TOO_LARGE = (
    "--labeled-batch 100000000000",
    f"--hidden {'1 ' * 100}",
    "--compare --seeds 0-99999999999",
)
REFUSED = {
    "trian": "train",
    "train digits --stepz 3": "--stepz",
    f"{DIGITS} --method fixmach": "fixmatch",
    f"{DIGITS} --mode forwad": "forward",
    f"{DIGITS} --lr 0": "--lr 0.0: expected a number > 0",
    f"{DIGITS} --wait 6": "--wait",
    f"{DIGITS} --mode reinforce --pseudo-labels soft": "labels",
    f"{DIGITS} --mesh.replicate 2": "torchrun",
    f"WORLD_SIZE=2 {DIGITS}": "2 processes were started",
    f"WORLD_SIZE=1 {DIGITS} --mesh.shard 2": "1 process was started",
    f"WORLD_SIZE=2 {DIGITS} --mesh.shard 2 --labeled-batch 9": "--labeled-batch 9",
    f"WORLD_SIZE=2 {DIGITS} --mesh.replicate 2 --accumulate 8 --labeled-batch 24": "multiple of 16",
    f"WORLD_SIZE=2 {DIGITS} --mesh.replicate 2 --compare": "--compare",
    f"{DIGITS} --device cuda": "GPU",
    f"{DIGITS} --compare --methods plain": "plain",
    f"{DIGITS} --seeds 0-1": "--compare",
    **{f"{DIGITS} --compare --seeds {wrong}": "seeds" for wrong in ("²", "4-2", "3-5,4", "-")},
    f"{DIGITS} --method uda --mode forward": "--mode",
    **{f"{DIGITS} {flag}": "expected" for flag in TOO_LARGE},
    **{
        f"{IMAGES} {flag}": "expected"
        for flag in ("--num-workers 2147483647", "--image-size 1000000")
    },
    "train digits --out {run}": "--resume",
    "train digits --out {few}": "another --out",
    "train digits --out {few} --resume": "another --out",
    "train digits --steps 7 --out {run} --resume": "takes 6 steps, and --steps 7 was given",
    # Fewer than the steps of the warm-up, which nobody typed.
    "train images --steps 1 --out {colors} --resume": "takes 4 steps, and --steps 1 was given",
    # What is there, and what to type.
    "train images --resume --out {new}": "expected --out with the folder of a run",
    "train images --resume --out {colors}/..": "but in",
    "train images --resume --compare --out {colors}": "leave --compare out",
    "train images --resume --out {run}": "go on with it by metapl train digits --resume --out",
    "noisy-student images --resume --out {colors}": "by metapl train images --resume --out",
    "noisy-student digits --config {run}/recipe.json": "by metapl train digits --config",
    f"{IMAGES} --minutes 0": "--minutes 0.0: expected a number > 0",
    f"{IMAGES} --weights {{new}}/none.pt": "no such file",
    f"{IMAGES} --method reduced_mpl --labeled-labels x": "--labels",
    f"{IMAGES} --steps 4": "test",  # pictures of which are those that are learned from
    IMAGES.replace("--out {new}", "--out {few}/out"): "would be read",
    IMAGES.replace("--test {few}", "--compare"): "--test",
    IMAGES.replace("{few}", "{new}"): "new",
    "predict {run}": "FILE_OR_FOLDER",
    "predict {run} {few}/blue/blue-0.png --top 11": "--top",
    "predict {run} {few}/blue/blue-0.png --out {few}/blue/blue-0.png": ".csv",
    "predict {run} {few} --network techer": "teacher",
    "evaluate {few}": "recipe.json",
    "evaluate {run} --test {few}": "does not know",
    "evaluate {run} --eps 2": "--attack",
    "evaluate {run} --attack pgd --eps -2": "255",
    "runs {new}": "new",
    "report {run} --out page.png": ".html",
    "compare": "RUN",
    "compare {run} {run}": "once",
    "compare {run} {colors}": "test sets",
    "export {colors} --out {colors}/../labeled/exported": "elsewhere",
    "label {run} {new} --out {new}": "new",
    "label {run} {few} --out {few}": "store",
    "label {run} {few} --out {new} --top-k 11": "top_k is 11; expected 1 to 10,",
    "labels stats {run}": "store",
    "ablate --factory x": "module:function",
    "ablate --factory os:getcwd": "BilevelTrainer",
}


def content(*folders: Path) -> dict[str, tuple[int, float]]:
    """Return every file, with its size and when it was written, and every folder."""
    found = {str(file): file.stat() for folder in folders for file in folder.rglob("*")}
    return {
        name: (-1, 0) if stat.S_ISDIR(s.st_mode) else (s.st_size, s.st_mtime_ns)
        for name, s in found.items()
    }


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folders(tmp_path_factory.mktemp("refused"), few=2, many=2, side=8) / "labeled"


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_leaves_every_file_as_it_was(
    line: str, tiny: Path, colors: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "timed", lambda *given: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = content(tmp_path, tiny, few.parent, colors / "run")
    places = {"run": tiny, "colors": colors / "run", "few": few, "new": tmp_path / "new"}
    words = [word.format(**places) for word in shlex.split(line)]
    if words[0].startswith("WORLD_SIZE="):
        monkeypatch.setenv(*words.pop(0).split("="))
    told = metapl(*words, code=2)
    assert REFUSED[line] in " ".join(told.stderr.split()), told.stderr
    assert "Traceback" not in told.stderr
    assert content(tmp_path, tiny, few.parent, colors / "run") == before


def test_predict_and_label_say_what_the_network_says(
    tiny: Path, ten_digits: Path, tmp_path: Path
) -> None:
    network = Digits(hidden=(4,)).network()
    network.load_state_dict(load_file(tiny / "student.safetensors"))
    p = network(torch.tensor(load_digits().images[:10]).float()[:, None] / 16).softmax(1)
    found = rows(
        metapl(
            "predict", tiny, ten_digits, "--network", "student", "--top", "3", "--probabilities"
        ).stdout
    )
    assert list(found[0])[:5] == ["file", "class", "probability", "class_2", "probability_2"]
    assert [row["file"] for row in found] == [f"{ten_digits}/{number}.png" for number in range(10)]
    for row, expected in zip(found, p, strict=True):
        shares = {str(digit): float(row[f"p({digit})"]) for digit in range(10)}
        assert [*shares.values()] == pytest.approx(expected.tolist(), abs=0.01)
        for suffix, share in zip(
            ("", "_2", "_3"), sorted(shares.values(), reverse=True), strict=False
        ):
            assert shares[row[f"class{suffix}"]] == float(row[f"probability{suffix}"]) == share
    metapl("label", tiny, ten_digits, "--network", "student", "--out", tmp_path / "store")
    store = LabelStore(tmp_path / "store")
    torch.testing.assert_close(
        store[[f"{number}.png" for number in range(10)]], p.detach(), atol=2e-3, rtol=0
    )


def test_a_diverged_network_predicts_nothing(run: Path, digit: Path, tmp_path: Path) -> None:
    for file in run.glob("*student.safetensors"):
        save_file(
            {key: torch.full_like(value, torch.nan) for key, value in load_file(file).items()}, file
        )
    reseal(run)
    for name, *words in (("predict", digit, "--out", tmp_path / "out.csv"), ("evaluate",)):
        assert "not finite" in metapl(name, run, *words, "--network", "student", code=2).stderr
    assert not (tmp_path / "out.csv").exists()


def test_evaluate_gives_the_number_on_record_again_and_those_of_damaged_pictures(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: CORRUPTIONS[name] for name in ("contrast", "shot_noise")}
    monkeypatch.setattr("metapl.apps.evaluate.CORRUPTIONS", few)
    flags = ("--corruptions", "--attack", "fgsm", "--eps", "0", "8", "--out", tmp_path)
    told, text = result(tiny), metapl("evaluate", tiny, *flags).stdout
    for words in (
        f"{told['test_accuracy']:.2%} of 400, as in result.json",
        "under corruption",
        "ε in 1/255",
    ):
        assert words in text
    assert max(map(len, text.splitlines()[1:-1])) <= 80
    heads = next(line for line in text.splitlines() if line.startswith("true "))
    assert heads.split() == ["true", "\\", "predicted", *"0123456789", "right"]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["confusion"] == told["evaluation"]["confusion"]
    assert (
        found["accuracy"]
        == found["recorded_accuracy"]
        == told["test_accuracy"]
        == found["attacks"]["fgsm"]["0"]
    )
    assert found["attacks"]["fgsm"]["8"] <= found["accuracy"]
    contrast = found["corruptions"]["contrast"]
    assert contrast["error"] == pytest.approx(1 - sum(contrast["accuracy_by_severity"]) / 5)
    assert str(tmp_path / "evaluation.json") in text
    del few["shot_noise"]
    again = json.loads(metapl("evaluate", tiny, "--corruptions", "--json").stdout)
    assert again["corruptions"] == {"contrast": contrast}


def test_a_student_that_finetuning_spoils_is_kept_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        Digits, "finetuner", lambda _, net: torch.optim.SGD(net.parameters(), lr=1.0, maximize=True)
    )
    seldom = ("--validate-every", "30", "--save-every", "60", "--log-every", "60")
    metapl(*TINY, "--method", "supervised", "--steps", "60", *seldom, "--out", tmp_path)
    told = result(tmp_path)
    assert 0 < told["finetuned_test_accuracy"] == told["student_test_accuracy"]


def test_evaluate_measures_on_other_pictures(colors: Path, tmp_path: Path) -> None:
    shutil.copytree(colors / "test" / "red", tmp_path / "other" / "red")
    (tmp_path / "other" / "red" / "torn.png").write_bytes(b"")
    told = metapl("evaluate", colors / "run", "--test", tmp_path / "other", "--json", code=1)
    found = json.loads(told.stdout)
    assert (found["n"], found["missing_classes"], found["per_class"][0]) == (6, ["blue"], None)
    for words in ("torn.png", "1 file left out", "blue"):
        assert words in told.stderr
    told = metapl("evaluate", colors / "run", "--test", colors / "labeled", code=None)
    assert "are among the" in " ".join(told.stderr.split())
    for part in ("labeled", "test"):
        told = metapl("evaluate", colors / "run", "--out", colors / part / "out", code=2)
        assert "would be read" in " ".join(told.stderr.split())
        assert not (colors / part / "out").exists()


def test_an_evaluation_is_not_written_over_another(colors: Path, tmp_path: Path) -> None:
    words = ("evaluate", colors / "run", "--out", tmp_path / "out")
    metapl(*words)
    written = (tmp_path / "out" / "evaluation.json").read_bytes()
    told = metapl(*words, "--attack", "fgsm", "--eps", "1", code=2)
    assert "is there; expected another --out" in " ".join(told.stderr.split())
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == written


def test_a_finished_run_says_nothing_of_other_data(colors: Path, tmp_path: Path) -> None:
    shutil.copytree(colors / "run", tmp_path / "run")
    shutil.copytree(colors / "test", tmp_path / "other")
    words = ("train", "images", "--resume", "--out", tmp_path / "run")
    told = metapl(*words, "--test", tmp_path / "other", code=2)
    assert "--test names other data than it had" in " ".join(told.stderr.split())
    assert "is finished already" in " ".join(metapl(*words).stdout.split())


def test_runs_of_every_state_are_listed(tiny: Path, tmp_path: Path) -> None:
    for name in ("mine", "stopped", "held", "deep/er/broken"):
        shutil.copytree(tiny, tmp_path / name)
    for name in ("stopped", "held"):
        (tmp_path / name / "result.json").unlink()
    counts = {"fit": {"taken": 4, "skipped": 2}, "finetune": {"taken": 1, "skipped": 0}}
    edited(tmp_path / "mine" / "result.json", skipped_steps=2, steps_by_phase=counts)
    (tmp_path / "deep/er/broken/result.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "link").symlink_to(tiny)
    (tmp_path / "loop").symlink_to(tmp_path)
    with RunFolder(tmp_path / "held").locked():
        entries = {
            entry["run"]: entry for entry in json.loads(metapl("runs", tmp_path, "--json").stdout)
        }
        table = metapl("runs", tmp_path).stdout
    states = {
        "mine": "finished",
        "stopped": "interrupted",
        "held": "running",
        "deep/er/broken": "damaged",
    }
    found = {
        str(Path(name).relative_to(tmp_path)): entry["state"] for name, entry in entries.items()
    }
    assert found == states | {"link": "finished"}
    mine, told = entries[str(tmp_path / "mine")], result(tiny)
    assert (mine["accuracy"], mine["on"], mine["n"], mine["steps"]) == (
        told["test_accuracy"],
        "test",
        400,
        6,
    )
    assert mine["interval"][0] < mine["accuracy"] < mine["interval"][1]
    skipped = "mine: to end in time not all steps were taken: fit 4 of 6"
    for words in (
        "running",
        "interrupted",
        "result.json",
        " 4/6 ",
        skipped,
        f"{100 * mine['accuracy']:.1f} (",
    ):
        assert words in table, words


def test_a_run_that_was_stopped_while_it_finetuned_is_listed_with_those_steps(
    tiny: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny, tmp_path / "mine"))
    (out / "result.json").unlink()
    edited(out / "recipe.json", "recipe", "fields", finetune_steps=200)
    rows = (out / "metrics.jsonl").read_text().splitlines()
    row = {**json.loads(rows[-1]), "phase": "finetune", "step": 180}
    (out / "metrics.jsonl").write_text("\n".join([*rows, json.dumps(row)]) + "\n")
    assert "finetune 180/200 " in metapl("runs", tmp_path).stdout


def test_what_ended_a_run_is_listed_until_it_goes_on(tmp_path: Path) -> None:
    """A loss that is not finite ends it, a signal is no error, and one that never began is gone."""
    out = tmp_path / "mine"
    words = (*TINY, "--lr", "1e20", "--out", out)
    told = metapl(*words, code=2).stderr
    (entry,) = json.loads(metapl("runs", tmp_path, "--json").stdout)
    assert entry["state"] == "interrupted"
    assert "is NaN or infinite" in entry["why"]
    assert told == f"metapl: {entry['why']}.\n"
    assert f"mine: {entry['why']}\n" in metapl("runs", tmp_path).stdout
    folder = RunFolder(out)
    with folder.claimed(folder.recipe(), resume=True):
        assert folder.failure is None
    with pytest.raises(KeyboardInterrupt), folder.claimed(folder.recipe(), resume=True):
        raise KeyboardInterrupt
    assert folder.failure is None
    other = RunFolder(tmp_path / "other")
    with pytest.raises(MetaplError), other.claimed(folder.recipe(), resume=False):
        raise MetaplError("the data are gone.")
    assert not other.path.exists()


def test_ablate_measures_the_modes_of_digits_and_of_networks_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_networks.py").write_text(
        "import torch, metapl\ndef build():\n    a, b = (torch.nn.Linear(6, 3) for _ in range(2))\n"
        "    x = torch.randn(12, 6)\n"
        "    return metapl.BilevelTrainer(a, b, 'forward'), (x, torch.arange(12) % 3), "
        "torch.randn(9, 6)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    for of in (
        "digits --steps 2 --modes forward difference",
        "--factory own_networks:build --modes forward",
    ):
        text = metapl(
            "ablate", *of.split(), "--draws", "2", "--rounds", "1", "--out", tmp_path / "there"
        ).stdout
        found = json.loads((tmp_path / "there" / "ablation.json").read_text())
        assert [*found["modes"]] == of.partition("--modes ")[2].split()
        assert found["recommendation"] in " ".join(text.split())
        assert str(tmp_path / "there" / "ablation.png") in text
        with Image.open(tmp_path / "there" / "ablation.png") as picture:
            assert picture.width == 800


@pytest.mark.long
def test_a_reader_that_goes_away_ends_the_command_quietly(tiny: Path, digit: Path) -> None:
    command = [sys.executable, "-m", "metapl.apps", "predict", str(tiny), str(digit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_what_goes_wrong_is_a_line_and_an_exit_code(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = MetaplError("x")
    told = MetaplError("the memory of the GPU does not suffice; lower it")
    wrapped.__cause__ = told.__cause__ = MemoryError()
    for error, code, word in (
        (MemoryError(), 2, "of this machine"),
        (wrapped, 2, "of this machine"),
        (told, 2, "of the GPU does not suffice; lower it"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "of the GPU"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), 2, "--accumulate"),
        (MetaplError("so it is"), 2, "metapl: so it is"),
        (PermissionError(13, "Permission denied", "file"), 1, "file: Permission denied"),
        (BlockingIOError(11, "Resource temporarily unavailable"), 1, "temporarily"),
        (KeyboardInterrupt(), 130, "stopped"),
        (RuntimeError("shape '[2]' is invalid"), None, ""),
    ):
        monkeypatch.setattr("metapl.apps.evaluate.Evaluate.run", Mock(side_effect=error))
        if code is None:  # a fault of the program is shown whole
            with pytest.raises(RuntimeError, match="shape"):
                metapl("evaluate", tiny)
        else:
            assert word in " ".join(metapl("evaluate", tiny, code=code).stderr.split())
