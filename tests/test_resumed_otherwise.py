"""A fit that is resumed notices what is not as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import said
from tiny_runs import color_folders, images_command
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metapl import BilevelTrainer, CrossEntropy, LossTrainer, MetaplError, PseudoLabels
from metapl.cli import main
from metapl.data.identity import source_record
from metapl.fingerprints import as_values
from metapl.runs import checkpoint
from metapl.runs.checkpoint import CheckpointFolder


def data(rows: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return TensorDataset(x, (x[:, 0] > 0).long())


def fitted(out: Path, resume: bool = True, allow: Any = (), steps: int = 6, **changed: Any) -> nn.Module:
    """A fit of six steps, or one that goes on with it, of which something may be otherwise."""
    how = {
        "lr": 0.1,
        "momentum": 0.0,
        "dtype": torch.float32,
        "rows": 24,
        "data_seed": 0,
        "batch": 8,
        "shuffle": True,
        "validation": data(10, 1).tensors,
        "smoothing": 0.0,
        "clip": None,
        **changed,
    }
    torch.manual_seed(0)
    model = nn.Linear(4, 2).to(how["dtype"])
    optimizer = torch.optim.SGD(model.parameters(), lr=how["lr"], momentum=how["momentum"])
    trainer = LossTrainer(model, (CrossEntropy(how["smoothing"]),), optimizer=optimizer, clip_norm=how["clip"])
    source = DataLoader(
        data(how["rows"], how["data_seed"], how["dtype"]), batch_size=how["batch"], shuffle=how["shuffle"]
    )
    validation = how["validation"]
    if validation is not None:
        validation = validation[0].to(how["dtype"]), validation[1]
    trainer.fit(
        source,
        steps=steps,
        schedule="constant",
        validation=validation,
        out=str(out),
        resume=resume,
        allow_changes=allow,
        progress=False,
        say=how.get("say", lambda text: None),
        save_every=3,
    )
    return model


CHANGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "learning rate": ({"lr": 0.2}, r"student_optimizer\.lr was 0\.1, now 0\.2", "student_optimizer"),
    "momentum": (
        {"momentum": 0.9},
        r"student_optimizer\.momentum was 0, now 0\.9|momentum was 0\.0",
        "student_optimizer",
    ),
    "weights of the losses": ({"smoothing": 0.1}, r"trainer\.losses was", "trainer"),
    "clipping": ({"clip": 1.0}, r"trainer\.clip_norm was None, now 1\.0", "trainer"),
    "type": ({"dtype": torch.float64}, r"dtype\.student was 'float32', now 'float64'", "dtype"),
    "batch size": ({"batch": 6}, r"labeled\.batch_size was 8, now 6", "labeled"),
    "number of examples": ({"rows": 32}, r"labeled\.examples was 24, now 32", "labeled"),
    "other examples": ({"data_seed": 5}, r"labeled\.fingerprint was", "labeled"),
    "order": ({"shuffle": False}, r"labeled\.sampler was 'RandomSampler', now 'SequentialSampler'", "labeled"),
    "validation": ({"validation": data(10, 2).tensors}, r"validation\.fingerprint was", "validation"),
    "no validation": ({"validation": None}, r"validation was given, now it is the other way round", "validation"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named_and_refused_or_allowed_by_an_argument(name: str, tmp_path: Path) -> None:
    changed, words, part = CHANGES[name]
    fitted(tmp_path, resume=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MetaplError, match=words) as refused:
        fitted(tmp_path, steps=9, **changed)
    assert f"allow_changes={[part]!r}" in str(refused.value) or name == "type"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    allowed = [part] if name != "type" else ["dtype", "labeled", "validation"]
    fitted(tmp_path, allow=allowed, steps=9, **changed)
    fitted(tmp_path, allow=allowed, steps=9, **changed)  # and what is given now counts from then on


def test_nothing_changed_is_nothing_said(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    told: list[str] = []
    fitted(tmp_path, steps=9, say=told.append)
    assert told == ["resumed at step 6"]


def test_a_setting_that_is_allowed_to_change_counts(tmp_path: Path) -> None:
    """As if the optimizer had been given it after the sixth step."""
    fitted(tmp_path, resume=False)
    other = tmp_path.with_name("other")
    shutil.copytree(tmp_path, other)
    slow = fitted(tmp_path, steps=9).weight.clone()
    fast = fitted(other, steps=9, allow=["student_optimizer"], momentum=0.9, lr=0.5).weight
    assert not torch.equal(slow, fast)
    state = checkpoint.load(CheckpointFolder(other / "checkpoints/fit").paths()[0])
    assert state["trainer"]["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert state["made_of"]["student_optimizer"]["lr"] == 0.5


def test_more_steps_done_than_asked_for(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    with pytest.raises(MetaplError, match=r"has done 6 steps, and steps=4; expected more"):
        fitted(tmp_path, steps=4)


def test_another_torch_is_noted(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    newest = CheckpointFolder(tmp_path / "checkpoints/fit").paths()[0]
    state = checkpoint.load(newest)
    assert state["versions"] == {"torch": str(torch.__version__)}
    checkpoint.save(newest, state | {"versions": {"torch": "1.2.3"}})
    told: list[str] = []
    fitted(tmp_path, say=told.append)
    assert "begun with torch 1.2.3" in told[0]


def test_a_checkpoint_of_before_is_gone_on_with(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    for path in CheckpointFolder(tmp_path / "checkpoints/fit").paths():
        state = checkpoint.load(path)
        del state["made_of"], state["versions"]
        checkpoint.save(path, state)
    fitted(tmp_path, steps=9, lr=0.3)


def test_what_may_change_has_a_name(tmp_path: Path) -> None:
    for wrong in ("labeled", ["lr"]):
        with pytest.raises(MetaplError, match=r"allow_changes=.*expected a list of some of student_optimizer"):
            fitted(tmp_path, resume=False, allow=wrong)
    assert list(tmp_path.iterdir()) == []


def test_the_settings_of_a_bilevel_trainer_are_known() -> None:
    teacher, student = nn.Linear(4, 2), nn.Linear(4, 2)
    settings = [
        BilevelTrainer(teacher, student, **options).settings()  # type: ignore[arg-type]
        for options in ({}, {"feedback_weight": 2.0}, {"problem": PseudoLabels(temperature=0.5)}, {"mode": "forward"})
    ]
    assert all(settings[0] != other for other in settings[1:])
    assert settings[0] == BilevelTrainer(nn.Linear(4, 2), nn.Linear(4, 2)).settings()


def test_sources_are_told_apart_by_what_they_hold() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    assert source_record([x]) == source_record([x.clone()])
    assert source_record([x]) != source_record([x + 1])
    assert source_record((x, x)) != source_record((x,))
    record = source_record(iter([x]))
    assert record["length"] is None
    assert as_values({"a": (1, x[:1, 0]), "f": len}) == {"a": [1, 0.0], "f": "builtins.len"}


# ------------------------------------------------------------------------------------------------------- moved folders


def test_pictures_that_moved_are_pointed_to_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, moved, out = color_folders(tmp_path / "before"), tmp_path / "after", tmp_path / "run"
    said(capsys, *images_command(root), "--out", out)
    shutil.copytree(root, moved)
    (out / "result.json").unlink()  # as if it had been stopped
    shutil.rmtree(root)
    assert "is finished already" not in said(capsys, *images_command(moved), "--out", out, "--resume")
    fields = json.loads((out / "recipe.json").read_text())["recipe"]["fields"]
    assert fields["labeled"] == str(moved / "labeled")
    assert fields["test"] == str(moved / "test")
    said(capsys, "evaluate", out)
    # A finished run too, and never to other pictures.
    again = Path(shutil.copytree(moved, tmp_path / "again"))
    assert "is finished already" in said(capsys, *images_command(again), "--out", out, "--resume")
    (again / "unlabeled" / "red-0.png").write_bytes((again / "unlabeled" / "red-1.png").read_bytes())
    third = Path(shutil.copytree(again, tmp_path / "third"))
    capsys.readouterr()
    assert main([*images_command(third), "--out", str(out), "--resume"]) == 2
    assert "the data have changed since the run" in capsys.readouterr().err
    fields = json.loads((out / "recipe.json").read_text())["recipe"]["fields"]
    assert fields["labeled"] == str(again / "labeled")
