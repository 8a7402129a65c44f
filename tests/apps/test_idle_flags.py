"""Flags of `metapl train images` that change nothing are refused by name, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import refused, unwrapped

from metapl.apps.commands import main
from metapl.apps.commands.parse import parse
from metapl.apps.commands.train import TrainImages

UNREAD = ("train", "images", "--labeled", "nowhere", "--unlabeled", "nowhere", "--test", "nowhere")
"""Folders that there are not: whoever reads them fails."""


def said_of(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    return refused(capsys, *UNREAD, *flags.split()).removeprefix("metapl: ").strip()


FED_BACK = "it is for --method mpl or reduced_mpl"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--pad 2 --strong.cutout 4",
            "--pad and --strong.cutout have no effect without --randaugment: add --randaugment, or use --changes.* "
            "instead.",
        ),
        ("--pad 4", "--pad has no effect without --randaugment: add"),  # its default
        (
            "--randaugment --changes.zoom 1.1 --changes.mirror",
            "--changes.zoom and --changes.mirror have no effect besi",
        ),
        ("--resized-crop --changes.degrees 3", "--changes.degrees has no effect beside --resized-crop, which cuts"),
        ("--randaugment --resized-crop --pad 1 --strong.again", "--pad and --strong.again have no effect beside --res"),
        ("--grey --changes.hue 0.2", "--changes.hue has no effect on grey pictures"),
        ("--val nowhere --val-fraction 0.1", "--val-fraction has no effect beside --val: leave out one of them."),
        ("--minutes 5 --steps 10", "--minutes has no effect beside --steps: leave out one of them."),
        (
            "--method mpl --feedback-weight 1 --feedback-ratio 0.1",
            "--feedback-weight has no effect beside --feedback-r",
        ),
        (
            "--finetune-steps 0 --finetune.lr 0.1 --finetune_batch=3",
            "--finetune.lr and --finetune-batch have no effect",
        ),
        ("--finetune.no-decay-norms", "--finetune.no-decay-norms has no effect with --finetune.weight-decay 0: give"),
        ("--student.lr 0.01", "--student.lr has no effect with --method uda: give --teacher.* instead"),
        ("--method supervised --student.momentum 0 --unlabelled-batch 8", "--unlabeled-batch has no effect with --met"),
        ("--method fixmatch --temperature 2", "--temperature has no effect with --method fixmatch: it is for --method"),
        ("--teacher-dropout 0.1 --dropout 0.2", "--dropout has no effect beside --teacher-dropout with --method uda"),
        (
            "--wait 3 --no-warm-start",
            "--wait and --no-warm-start have no effect with --method uda: it is for --method m",
        ),
        ("--method pseudo_labels --wait 3", "--wait has no effect with --method pseudo_labels"),
        ("--mode forward --pseudo-labels soft", "--mode and --pseudo-labels have no effect with --method uda"),
        (
            "--feedback-weight 2",
            "--feedback-weight has no effect with --method uda: it is for --method mpl or reduced_mpl.",
        ),
        (
            "--method none --exact-every 2",
            "--exact-every has no effect with --method none: it is for --method mpl or reduced_mpl.",
        ),
        ("--method mpl --mode none --feedback-weight 2", "--feedback-weight has no effect with --mode none"),
        ("--method supervised --label-smoothing 0.1", "--label-smoothing has no effect with --method supervised"),
        ("--method supervised --randaugment --strong.cutout 3", "--strong.cutout has no effect with --method superv"),
        ("--method supervised --uda-weight 2 --uda-start 3", "--uda-weight and --uda-start have no effect with --meth"),
        ("--method pseudo_labels --uda-ramp 2", "--uda-ramp has no effect with --method pseudo_labels"),
        ("--method fixmatch --uda-threshold 0.9", "FixMatch has values of its own"),
        ("--method fixmatch --uda-prior 0.5 0.5", "--uda-prior has no effect with --method fixmatch"),
        ("--uda-align 0 --uda-prior 0.5 0.5", "--uda-prior has no effect with --uda-align 0"),
        ("--uda-weight 0", "--uda-weight has no effect at 0 with --method uda"),
        ("--method mpl --uda-weight 0 --uda-align 1", "--uda-align has no effect with --uda-weight 0"),
        ("--compare --seeds 0-1 --seed 3", "--seed has no effect beside --seeds"),
        ("--compare --methods mpl --controls", "--controls has no effect beside --methods: add permuted class_means"),
    ],
    ids=lambda one: one if one.startswith("--") else "",
)
def test_a_flag_that_changes_nothing_is_refused_by_name(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in said_of(capsys, flags)


USED = (
    "--changes.zoom 1.1 --teacher.lr 0.01 --uda-threshold 0.8 --uda-align 0 --dropout 0.1 --clip-norm 0",
    "--randaugment --pad 2 --strong.cutout 4",
    "--resized-crop --changes.mirror --changes.hole 0.1",
    "--method fixmatch --uda-weight 2 --uda-start 4",
    "--method mpl --wait 3 --student.lr 0.1 --mode reinforce --baseline 0.9 --exact-every 2 --uda-align 0",
    "--method none --wait 3 --student.lr 0.1 --pseudo-labels hard --uda-weight 0 --temperature 2",
    "--method pseudo_labels --student.lr 0.1 --unlabeled-batch 4 --label-smoothing 0.1",
    "--method supervised --randaugment --pad 1 --strong.writing --labeled-batch 3",
    "--finetune.weight-decay 0.1 --finetune.no-decay-norms",
    "--compare --uda-threshold 0.8 --feedback-weight 2 --student.lr 0.1 --label-smoothing 0.1 --wait 2",
)


@pytest.mark.parametrize("flags", USED)
def test_flags_that_are_used_are_taken(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing that is wrong is then the folder that there is not."""
    assert main([*UNREAD, *flags.split()]) == 2
    printed = capsys.readouterr()
    assert "nowhere" in printed.err
    assert "no effect" not in printed.err + printed.out


def test_of_a_comparison_what_no_method_uses_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    """The same flags are given to comparisons of other methods; a flag beside another one is refused even so."""
    assert main([*UNREAD, "--compare", "--methods", "supervised", "uda", "--wait", "3", "--uda-align", "0"]) == 2
    printed = capsys.readouterr()
    assert unwrapped(printed.out) == (
        "note: --wait has no effect with --methods supervised uda: it is for --method mpl or none."
    )
    assert "nowhere" in printed.err
    assert "--pad has no effect without" in said_of(capsys, "--compare --pad 3")


def test_every_flag_is_known_to_the_rules_or_to_each_method() -> None:
    """A rule that names a flag that there is not would never refuse anything."""
    import contextlib
    import io
    import re
    from fnmatch import fnmatchcase

    from metapl.apps.commands.idle import FEEDBACK, STRONG, by_choice, by_method

    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        parse(TrainImages, "metapl train images", ["--help"])
    flags = [name for one in re.findall(r"^  --(\S+)", shown.getvalue(), re.MULTILINE) for name in (one, f"no-{one}")]
    flags += [re.sub(r"(^|\.)no-", r"\1", one) for one in flags]
    flags += [re.sub(r"\.(?=decay)", ".no-", one) for one in flags]
    patterns = [*FEEDBACK.split(), *STRONG.split()]
    for given in (
        *USED,
        "--val nowhere --steps 3 --feedback-ratio 1 --finetune-steps 0 --grey --resized-crop --uda-align 0",
    ):
        train = parse(TrainImages, "metapl train images", [*UNREAD[2:], *given.split()])
        assert Path(train.recipe.labeled) == Path("nowhere")
        rules = [*by_choice(train.recipe, seeds=True), *by_method(train.recipe, (train.recipe.method,))]
        patterns += [pattern for rule in rules for pattern in rule.flags.split()]
    for pattern in patterns:
        assert any(fnmatchcase(flag, pattern) for flag in flags), pattern
