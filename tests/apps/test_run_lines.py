"""What a run says before it begins and when it has ended, and what it asks for first."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from command import metapl, rows
from tiny_runs import NOISY_STUDENT, TINY, images_command

from metapl.apps import images
from metapl.apps.commands import TrainImages
from metapl.errors import origin
from metapl.networks.exports import CARD
from metapl.run_folder import RunFolder, stored_result


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        ("noisy-student digits --out run", "pyarrow", "labels"),
        ("train digits --method reduced_mpl --out run", "pyarrow", "labels"),
        ("train digits --compare --methods uda reduced_mpl", "pyarrow", "labels"),
        ("train digits --out run", "matplotlib", "apps"),
        ("ablate digits --out there", "matplotlib", "apps"),
    ],
)
def test_a_package_of_a_later_part_is_asked_for_before_anything_is_made(
    words: str,
    missing: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A module of None is one that cannot be imported.
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.chdir(tmp_path)
    told = metapl(*words.split(), code=2)
    install = f"expected the package {missing}, which `pip install '{origin()}[{extra}]'` installs"
    assert install in told.stderr
    # The line has the name of the program once, before it.
    assert told.stderr.startswith("metapl: ")
    assert not told.stderr.startswith("metapl: metapl")
    assert told.stdout == ""
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("train digits --method supervised", "6 steps, then 4 of finetuning"),
        ("train digits --method supervised --finetune-steps 0", "6 steps, seed"),
        ("train digits --method pseudo_labels", "6 steps of each of 2 networks, then 4 of"),
        ("train digits --method reduced_mpl", "6 steps of each of 2 networks, then 4 of"),
        ("noisy-student digits --rounds 1 --threshold 0.1", "6 steps of each of 2 networks, seed"),
    ],
)
def test_the_first_line_says_all_steps(words: str, steps: str, tmp_path: Path) -> None:
    flags = "--steps 6 --hidden 4 --labeled-batch 8 --log-every 1"
    if "--finetune-steps" not in words:
        flags += " --finetune-steps 4"
    said = metapl(*words.split(), *flags.split(), "--out", tmp_path / "run").stdout
    assert f": {steps}" in " ".join(said.partition(" -> ")[0].split()), said
    # No network is called finetuned that is not.
    assert ("finetuned" in said) == (", then" in steps), said


def test_the_last_lines_are_what_one_looks_at_and_types_next(colors: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    *_, time, page, command = metapl(*images_command(colors), "--out", out).stdout.splitlines()
    assert re.match(r"after \d+ s the networks, the report and the figures are in ", time)
    assert Path(page.partition("  (")[0].strip()) == out / "report.html"
    assert (out / "report.html").is_file()
    again = metapl("train", "images", "--resume", "--out", out).stdout.splitlines()
    assert again[-3:] == [re.sub(r"after \d+ s ", "", time), page, command]
    words = shlex.split(command)
    assert words[0] == "metapl"
    words[words.index("PICTURES")] = str(colors / "test")
    assert len(rows(metapl(*words[1:]).stdout)) == 12


def test_what_is_set_aside_is_one_line_with_a_way_out(
    three_colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pictures of each of two classes, and five of red: 20 % of those are one."""
    shutil.copytree(three_colors, tmp_path, dirs_exist_ok=True)
    for number in range(3):
        (tmp_path / f"labeled/red/red-{number}.png").unlink()
    monkeypatch.setattr(images, "SPLIT_FROM", 21)
    some = (
        "5 of 21 labeled pictures are set aside to select and to measure by: of each class 20%, "
        "such as 1 of 5 of red; --val-fraction 0 sets none aside"
    )
    none = (
        "all 21 labeled pictures are learned from, and none are set aside to select by; "
        "--val-fraction 0.1 or --val DIR gives some"
    )
    command = images_command(tmp_path, "--steps", "1")
    without_test = [word for word in command if not word.startswith("--test")]
    for number, (words, expected) in enumerate(
        (
            (without_test, some),
            ([*without_test, "--val-fraction", "0"], none),
            (command, none),
            ([*command, "--val-fraction", "0.2"], some),
            ([*command, "--patience", "2"], some),
        )
    ):
        said = metapl(*words, "--out", tmp_path / str(number)).stdout
        assert expected in " ".join(said.split())
    named = [*without_test, "--val", str(tmp_path / "spare")]
    said = metapl(*named, "--out", tmp_path / "named").stdout
    assert "set aside" not in said
    refused = metapl(*named, "--val-fraction", "0.2", code=2)
    assert "expected it, or --val DIR, and not both" in refused.stderr


def test_labels_alone_are_learned_where_there_are_no_other_pictures(
    colors: Path, tmp_path: Path
) -> None:
    command = [word for word in images_command(colors, "--steps", "1") if word != "uda"]
    command.remove("--method")
    alone = [word for word in command if not word.startswith("--unlabeled=")]
    for number, (words, method) in enumerate(
        ((command, "uda"), (alone, "supervised"), ([*alone, "--method", "uda"], "uda"))
    ):
        run = tmp_path / str(number)
        said = metapl(*words, "--out", run)
        assert "are in the unlabeled folder" not in said.stdout
        assert ("no others, none for validation" in " ".join(said.stdout.split())) == (number > 0)
        assert stored_result(RunFolder(run))["method"] == method
        # The page and the card of the exported network speak of no others either.
        metapl("export", run, "--out", tmp_path / f"{number}-exported")
        card = (tmp_path / f"{number}-exported" / CARD).read_text()
        for text in (card, (run / "report.html").read_text()):
            assert ("SHA-256 of labeled" in text, "SHA-256 of unlabeled" in text) == (
                True,
                number == 0,
            )
        repeated = ("train", "images", "--config", run / "recipe.json")
        again = metapl(*repeated, "--out", tmp_path / f"{number}-again").stdout
        assert f"images by {images.METHODS[method].title}:" in " ".join(again.split())


@pytest.mark.parametrize(
    ("labels", "words", "method"),
    [
        (1000, ("--steps", "10"), "uda"),
        (1001, ("--steps", "10"), "supervised"),
        # 64 pictures in each of 626 steps are 40 times 1,001; in steps of 32 they are 20 times.
        (1001, ("--steps", "626"), "uda"),
        (1001, ("--steps", "626", "--labeled-batch", "32"), "supervised"),
        (1001, ("--steps", "10", "--method", "uda"), "uda"),
        (1001, ("--steps", "10", "--compare"), "uda"),
        # By the clock a processor learns 200 pictures a second, a GPU 5,000.
        (1501, (), "supervised"),
        (1501, ("--minutes", "5.1"), "uda"),
        (1501, ("--minutes", "many"), "uda"),
    ],
)
def test_many_labels_that_are_learned_a_few_times_are_learned_alone(
    labels: int,
    words: tuple[str, ...],
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "labeled" / "a"
    folder.mkdir(parents=True)
    for number in range(labels):
        (folder / f"{number}.png").touch()
    folders = ("--labeled", str(tmp_path / "labeled"), "--unlabeled", "others")
    command = TrainImages.default_for([*folders, "--device", "cpu", *words])
    # Where nothing was chosen, the command has the default of its field.
    chosen = getattr(command, "method_name", TrainImages.method_name)
    assert chosen == method
    # It is said, but where help is asked for.
    said = " ".join(capsys.readouterr().out.split())
    assert ("--method uda learns the unlabeled ones too" in said) == (method == "supervised")
    TrainImages.default_for([*folders, "--device", "cpu", *words, "--help"])
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------- resume


def files(run: Path) -> dict[Path, bytes]:
    """Return what each file of a run holds."""
    return {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.name != ".lock" and path.is_file()
    }


def stopped(*words: str | Path) -> None:
    """Run the command until its first checkpoint is written."""

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metapl.training.resuming.Checkpoints.write", stop)
        metapl(*words, code=130)


@pytest.mark.parametrize("names_folder", [True, False])
@pytest.mark.parametrize("kind", ["train images", "train digits", "noisy-student digits"])
def test_a_run_is_resumed_by_its_folder_alone(
    kind: str, names_folder: bool, colors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folders, method and settings are in its recipe; without a folder it is the last run."""
    commands = {
        "train images": [*images_command(colors), "--lr", "0.01", "--method", "fixmatch"],
        "train digits": [*TINY, "--method", "uda", "--uda-weight", "2"],
        "noisy-student digits": [*NOISY_STUDENT],
    }
    monkeypatch.chdir(tmp_path)
    run = Path("run") if names_folder else Path("runs") / f"{kind.split()[1]}-001"
    place = ["--out", run] if names_folder else []
    stopped(*commands[kind], *place)
    before = files(run)
    metapl(*kind.split(), *place, "--resume", "--seed", "3", code=2)
    told = metapl(*kind.split(), *place, "--resume", "--lr", "0.5", code=2)
    assert "lr was" in told.stderr
    assert files(run) == before
    metapl(*kind.split(), *place, "--resume")
    assert (run / "recipe.json").read_bytes() == before[run / "recipe.json"]
    metapl(*commands[kind], "--out", "whole")
    for name in ("student.safetensors", "result.json"):
        assert (run / name).read_bytes() == (Path("whole") / name).read_bytes()


def test_a_run_of_another_command_is_not_resumed(tiny: Path, colors: Path) -> None:
    for words, folder, expected in (
        ("train images", tiny, "go on with it by metapl train digits --resume --out"),
        ("noisy-student images", colors / "run", "by metapl train images --resume --out"),
    ):
        told = metapl(*words.split(), "--out", folder, "--resume", code=2)
        assert expected in " ".join(told.stderr.split())
