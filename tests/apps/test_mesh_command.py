"""``torchrun -m metapl.apps train``: every recipe over several processes, and one message where something fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_cases
import pytest
from ranks import Ranks
from test_noisy_folders import suspects
from test_noisy_folders import write as bars_and_beams
from tiny_runs import TINY, color_folders, images_command

from metapl.apps.commands.launch import check_started
from metapl.distributed import Mesh
from metapl.errors import MetaplError


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2, "command_cases", joined=False)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folders(tmp_path_factory.mktemp("pictures"), many=8)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def as_if_killed(run: Path, copy: Path, step: int) -> Path:
    """A finished run as it was after so many steps."""
    shutil.copytree(run, copy)
    for path in [*copy.glob("*.safetensors"), *copy.glob("*.png"), copy / "result.json"]:
        path.unlink()
    shutil.rmtree(copy / "checkpoints" / "finetune")
    for path in (copy / "checkpoints" / "fit").iterdir():
        if f"{step:08}" not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [path.stem for path in (copy / "checkpoints" / "fit").iterdir()] == [f"step-{step:08}"]
    return copy


def trained(ranks: Ranks | None, arguments: list[str], out: Path) -> str:
    """What the command shows, in several processes or in this one."""
    given = [*arguments, "--out", str(out)]
    said = [command_cases.command(given)] if ranks is None else ranks.run("command", arguments=given)
    assert [code for code, _, _ in said] == [0] * len(said), said
    assert [(out, err) for _, out, err in said[1:]] == [("", "")] * (len(said) - 1)
    return said[0][1]


def same(
    run: Path, other: Path, phases: tuple[str, ...] = ("fit", "finetune"), limit: float = 1e-3, but: str = ""
) -> None:
    """The rows of two runs, but for rounding, and one column."""
    pairs = [pair for pair in zip(rows(run), rows(other), strict=True) if pair[0]["phase"] in phases]
    assert pairs
    for a, b in pairs:
        assert a.pop("phase") == b.pop("phase")
        a, b = ({k: v for k, v in row.items() if v is not None and k != but} for row in (a, b))
        assert a == pytest.approx(b, rel=limit, abs=1e-5)


SGD = [word for role in ("student", "teacher") for word in (f"--{role}.algorithm", "sgd", f"--{role}.lr", "0.05")]
IMAGES = (
    "--method",
    "mpl",
    "--mode",
    "forward",
    "--pseudo-labels",
    "soft",
    "--ema-decay",
    "0.9",
    "--uda-align",
    "0",
    *SGD,
)


def test_pictures_by_every_mesh(two: Ranks, pictures: Path, tmp_path: Path) -> None:
    """With averaged weights and finetuning. Batch norms see a share of the rows, as in one process that takes each
    batch in two parts."""
    command = images_command(pictures, *IMAGES)
    trained(None, [*command, "--accumulate", "2"], tmp_path / "parts")
    for name, expected in (("replicate", "parts"), ("shard", "parts")):
        trained(two, [*command, f"--mesh.{name}", "2"], tmp_path / name)
        same(tmp_path / name, tmp_path / expected)


def test_labels_that_may_be_wrong(two: Ranks, tmp_path: Path) -> None:
    """The weights of the examples are learned from the rows of all processes."""
    for seed, (name, each, wrong) in enumerate((("noisy", 8, 2), ("clean", 4, 0), ("test", 4, 0))):
        bars_and_beams(tmp_path / name, each, seed=1000 * seed, wrong=wrong)
    given = [
        f"--{flag}={tmp_path / name}" for flag, name in (("labeled", "noisy"), ("clean", "clean"), ("test", "test"))
    ]
    small = "--image-size 8 --network small_cnn --precision float32 --labeled-batch 8 --clean-batch 4 --log-every 1"
    steps = "--steps 6 --warm-steps 2 --finetune-steps 2 --validate-every 3 --save-every 6"
    command = ["train", "noisy", *given, *small.split(), *steps.split(), *SGD[:4]]
    trained(None, [*command, "--accumulate", "2"], tmp_path / "parts")
    weights = {row["file"]: float(row["weight"]) for row in suspects(tmp_path / "parts")}
    assert len(set(weights.values())) > 1
    trained(two, [*command, "--mesh.replicate", "2"], tmp_path / "replicate")
    same(tmp_path / "replicate", tmp_path / "parts", ("warm", "fit", "finetune"))
    found = {row["file"]: float(row["weight"]) for row in suspects(tmp_path / "replicate")}
    assert found == pytest.approx(weights, abs=2e-3)


def test_digits_by_shards(two: Ranks, tmp_path: Path, tiny: Path) -> None:
    """The numbers of one process; what one left is gone on with by two, and a finished run is left alone."""
    sharded = [*TINY, "--mesh.shard", "2"]
    said = trained(two, sharded, tmp_path / "shard")
    assert "Test accuracy" in said
    same(tmp_path / "shard", tiny, ("fit",))
    left = as_if_killed(tmp_path / "shard", tmp_path / "again", step=4)
    assert [path.suffix for path in (left / "checkpoints" / "fit").iterdir()] == [".parts"]
    trained(two, [*sharded, "--resume"], left)
    assert "is finished already" in trained(two, [*sharded, "--resume"], left)
    for name in ("student.safetensors", "finetuned_student.safetensors", "teacher.safetensors"):
        assert (left / name).read_bytes() == (tmp_path / "shard" / name).read_bytes()


@pytest.mark.long
def test_products_of_layers(two: Ranks, tmp_path: Path) -> None:
    """The numbers of two processes that share the rows."""
    command = [*TINY, "--mode", "difference", "--ema-decay", "0.9", "--dropout", "0"]
    trained(two, [*command, "--mesh.replicate", "2"], tmp_path / "replicas")
    trained(two, [*command, "--mesh.tensor", "2"], tmp_path / "tensor")
    same(tmp_path / "tensor", tmp_path / "replicas")
    left = as_if_killed(tmp_path / "tensor", tmp_path / "again", step=4)
    trained(two, [*command, "--mesh.tensor", "2", "--resume"], left)
    for name in ("student.safetensors", "finetuned_student.safetensors", "teacher.safetensors"):
        assert (left / name).read_bytes() == (tmp_path / "tensor" / name).read_bytes()


@pytest.mark.long
def test_a_comparison(two: Ranks, tmp_path: Path) -> None:
    command = [*TINY, "--compare", "--methods", "mpl", "pseudo_labels"]
    trained(None, [*command, "--jobs", "1"], tmp_path / "alone")
    command += ["--mesh.replicate", "2"]
    assert "mpl" in trained(two, command, tmp_path / "two")
    for method in ("mpl", "pseudo_labels"):
        same(tmp_path / "two" / method / "seed-0", tmp_path / "alone" / method / "seed-0", ("fit", "teacher"))
    assert "2 methods" in trained(two, [*command, "--resume"], tmp_path / "two")  # nothing is left to run


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "2 processes were started, and no mesh says what each of them does"),
        (["--mesh.shard", "2", "--labeled-batch", "9"], "labeled_batch of 9, which 2 ranks do not share equally"),
        (
            ["--mesh.tensor", "2", "--mode", "forward"],
            "mode 'forward' does not run on a student that is sharded by parallelize_module: it takes a pass of the "
            "student in forward mode",
        ),
        (["--mesh.tensor", "2", "--hidden", "5", "--mode", "none"], "mesh.tensor=2 does not divide the 5 outputs of 1"),
        (["--mesh.shard", "2", "--mode", "unrolled"], "mode 'unrolled' does not run on a student that is sharded"),
        (["--mesh.tensor", "2", "--mode", "none", "--dropout", "0.1"], "would drop alike"),
        (["--mesh.replicate", "2", "--compare", "--jobs", "2"], "--jobs 2 has no effect beside --mesh"),
        (["--mesh.replicate", "2", "--resume", "--out", "{there}", "--steps", "7"], "holds a run of another recipe"),
        (["--mesh.replicate", "2", "--out", "{there}"], "holds a run already"),
        (["--mesh.replicate", "2", "--stpes", "3"], "Unrecognized options: --stpes, 3. Perhaps you meant: --steps "),
        (
            ["--mesh.replicate", "3"],
            "the mesh is of 3 processes (--mesh.replicate 3) and 2 were started",
        ),
    ],
)
def test_what_does_not_run_is_said_once(
    two: Ranks, tmp_path: Path, tiny: Path, arguments: list[str], text: str
) -> None:
    """What the first process alone finds, before the others have heard of it, does not leave them waiting."""
    given = [*TINY, "--out", str(tmp_path / "run"), *(word.format(there=tiny) for word in arguments)]
    (code, _, said), *others = two.run("command", arguments=given)
    assert code == 2
    assert text in " ".join(said.split())
    assert others == [(2, "", "")]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            [*IMAGES, "--mode", "difference", "--mesh.tensor", "2"],
            "--mesh.tensor 2: small_cnn has no two linear layers",
        ),
    ],
)
def test_what_pictures_do_not_run_on_is_said_once(
    two: Ranks, pictures: Path, tmp_path: Path, arguments: list[str], text: str
) -> None:
    given = images_command(pictures, *arguments, "--out", str(tmp_path))
    for flag in ("--finetune-steps", "--unlabeled-batch") if "noisy_student" in arguments else ():  # it has neither
        del given[given.index(flag) : given.index(flag) + 2]
    (code, _, said), *others = two.run("command", arguments=given)
    assert code == 2
    assert text in " ".join(said.split())
    assert others == [(2, "", "")]


@pytest.mark.parametrize(("how", "text"), [("refuses", "process 1: step 3: the third"), ("breaks", "another process")])
def test_an_error_of_one_process_ends_all_with_its_message_once(
    two: Ranks, tmp_path: Path, how: str, text: str
) -> None:
    given = [*TINY, "--mesh.shard", "2", "--out", str(tmp_path / "run")]
    found = two.run("failing", arguments=given, rank=1, how=how)
    said = [" ".join((out + err).split()) for _, out, err in found]
    assert sum(text in each for each in said) == 1, said
    assert [code for code, _, _ in found] == ([2, 2] if how == "refuses" else [2, -1])
    assert "go on with" not in said[1].lower()


@pytest.mark.parametrize("flags", [["--out", "{there}"], ["--mesh.shard", "2", "--mode", "unrolled"]])
def test_processes_leave_when_the_first_has_said_why(two: Ranks, tmp_path: Path, tiny: Path, flags: list[str]) -> None:
    """Whether it alone has found what is wrong, or all of them."""
    mesh = [] if "--mesh.shard" in flags else ["--mesh.replicate", "2"]
    given = [*TINY, *mesh, "--out", str(tmp_path / "run"), *(word.format(there=tiny) for word in flags)]
    (first, said, _), (beside, _, left) = two.run("slowly_refused", arguments=given)
    assert first[0] == 2
    assert first[2].count("metapl: ") == 1
    assert "stopped" not in first[2]
    assert beside == (2, "", "")
    assert 0 < said < left


def test_a_process_that_hangs_ends_the_run(two: Ranks, tmp_path: Path) -> None:
    given = [*TINY, "--mesh.shard", "2", "--out", str(tmp_path / "run")]
    found = two.run("failing", arguments=given, rank=1, how="hangs")
    assert found[0][0] == 2
    assert "another process has not answered for 0.05 minutes" in " ".join(found[0][2].split())


@pytest.mark.parametrize(
    ("started", "mesh", "text"),
    [
        (
            1,
            Mesh(shard=2),
            "--mesh.shard 2) and 1 was started; expected as many. Start them with: torchrun",
        ),
        (2, Mesh(), "2 processes were started, and no mesh says what each of them does; give --mesh.replicate 2"),
        (2, Mesh(shard=3), "--nproc-per-node=3 -m metapl.apps ..., or give a mesh of 2"),
    ],
)
def test_a_mesh_of_other_processes_is_refused_with_both_remedies(
    started: int, mesh: Mesh, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(MetaplError, match=re.escape(text)):
        check_started(mesh)
