"""Flags that a command line has no use for are no flags of it: the parser refuses them, before anything is read."""

from __future__ import annotations

import pytest
from command import refused

from metapl.apps.commands import main

UNREAD = ("train", "images", "--labeled", "nowhere", "--unlabeled", "nowhere", "--test", "nowhere")
"""Folders that there are not: whoever reads them fails."""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # of another method
        ("--student.lr 0.01", "Unrecognized options: --student.lr"),
        ("--wait 3 --no-warm-start", "Unrecognized options: --wait, 3, --no-warm-start"),
        ("--mode forward", "--mode"),
        ("--feedback-weight 2", "--feedback-weight"),
        ("--temperature 2", "--temperature"),
        ("--labels store", "--labels"),
        ("--rounds 2", "--rounds"),
        ("--method pseudo_labels --wait 3", "--wait"),
        ("--method pseudo_labels --uda-ramp 2", "--uda-ramp"),
        ("--method none --exact-every 2", "--exact-every"),
        ("--method none --feedback-weight 2", "--feedback-weight"),
        ("--method supervised --label-smoothing 0.1", "--label-smoothing"),
        ("--method supervised --unlabelled-batch 8", "Unrecognized options: --unlabelled-batch"),
        ("--method supervised --uda-weight 2", "--uda-weight"),
        ("--method fixmatch --uda-threshold 0.9", "--uda-threshold"),
        ("--method fixmatch --uda-prior 0.5 0.5", "--uda-prior"),
        ("--method=reduced_mpl --wait 3", "--wait"),
        ("--method noisy_student --finetune-steps 3", "--finetune-steps"),
        # of other views
        ("--pad 4", "--pad"),
        ("--strong.cutout 4", "--strong.cutout"),
        ("--randaugment --changes.zoom 1.1", "--changes.zoom"),
        # one of two
        ("--val nowhere --val-fraction 0.1", "Arguments --val and --val-fraction are not allowed together"),
        ("--minutes 5 --steps 10", "Arguments --minutes and --steps are not allowed together"),
        ("--method mpl --feedback-weight 1 --feedback-ratio 0.1", "--feedback-weight and --feedback-ratio are not"),
        ("--compare --seeds 0-1 --seed 3", "--seeds and --seed are not allowed together"),
        (
            "--method reduced_mpl --teacher run --labels store",
            "--teacher and --labels: expected --teacher, or",
        ),
        ("--method reduced_mpl --labeled-labels store", "--labeled-labels: expected --teacher, or --labels"),
        ("--compare --methods mpl --controls", "--controls has no effect beside --methods: add permuted class_means"),
    ],
    ids=lambda one: one if one.startswith("--") else "",
)
def test_a_flag_that_changes_nothing_is_refused_by_name(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *UNREAD, *flags.split())
    assert words in said
    assert "nowhere" not in said


USED = (
    "--changes.zoom 1.1 --teacher.lr 0.01 --uda-threshold 0.8 --uda-align 0 --dropout 0.1 --clip-norm 0",
    "--randaugment --pad 2 --strong.cutout 4",
    "--resized-crop --changes.mirror --changes.hole 0.1",
    "--method fixmatch --uda-weight 2 --uda-start 4",
    "--method mpl --wait 3 --student.lr 0.1 --mode reinforce --baseline 0.9 --exact-every 2 --uda-align 0",
    "--method none --wait 3 --student.lr 0.1 --pseudo-labels hard --uda-weight 0 --temperature 2",
    "--method pseudo_labels --student.lr 0.1 --unlabeled-batch 4 --label-smoothing 0.1",
    "--method supervised --randaugment --pad 1 --strong.writing --labeled-batch 3",
    "--method noisy_student --rounds 1 --training pretrain_finetune --finetune-steps 3",
    "--finetune.weight-decay 0.1 --finetune.no-decay-norms",
    "--compare --method mpl --uda-threshold 0.8 --feedback-weight 2 --student.lr 0.1 --label-smoothing 0.1 --wait 2",
    "--compare --method supervised --unlabeled-batch 4",
)


@pytest.mark.parametrize("flags", USED)
def test_flags_that_are_used_are_taken(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing that is wrong is then the folder that there is not."""
    assert main([*UNREAD, *flags.split()]) == 2
    assert "nowhere" in capsys.readouterr().err
