"""The command lines of the examples that have rows of settings: one line, and help that fits."""

from types import ModuleType

import noisy_student_imagenet
import protocols
import pytest

FASHION = "fashion-4k --root x --out y"

WRONG = {
    "": ("no row was named. Expected first one of cifar10-4k, ",),
    "fashion-4": ("there is no row 'fashion-4'; did you mean fashion-4k", "Expected first one of"),
    "fashion-4k --root x": (
        "fashion-4k was given without --out DIR; expected protocols.py fashion-4k --root DIR",
    ),
    f"{FASHION} --steps abc": ("--steps abc: expected a whole number.",),
    f"{FASHION} --steps 0": ("--steps 0: expected 1 or more.",),
    f"{FASHION} --stepz 3": ("there is no flag --stepz; did you mean --steps?",),
    f"{FASHION} --clip-norm x": ("--clip-norm x: expected a number",),
    f"{FASHION} --mesh.shrd 2": ("no flag --mesh.shrd; did you mean --mesh.shard?",),
    f"{FASHION} --mesh.shard two": ("--mesh.shard two: expected a number of processes",),
    f"{FASHION} --feedback exct": ("--feedback exct; did you mean exact? Expected exact, dot,",),
    f"{FASHION} --seed": ("--seed was given without a value; expected --seed INT.",),
    f"{FASHION} more": ("--out takes one value, and 'more' is another; leave it out.",),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_of_the_protocols_ends_in_one_line(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert protocols.main(line.split()) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith("protocols.py: ")
    assert said.count("\n") == 1
    for part in WRONG[line]:
        assert part in said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("b9", "there is no row 'b9'"),
        ("b0 --ratios 2 x", "--ratios 2 x: expected several, each a whole number."),
        ("b0 --labels sft", "--labels sft; did you mean soft? Expected soft or hard."),
        ("b0 --dryrun", "there is no flag --dryrun; did you mean --dry-run?"),
    ],
)
def test_a_wrong_command_line_of_noisy_student_ends_in_one_line(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert noisy_student_imagenet.main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"noisy_student_imagenet.py: {expected}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("script", [protocols, noisy_student_imagenet])
def test_help_into_a_pipe_is_80_columns_wide_and_lists_the_rows(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for name, row in script.ROWS.items():
        assert name in said
        assert row.title.split(",")[0] in " ".join(said.split())
