"""What a fit writes and shows, and that its memory stays flat."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    INNER,
    OPTIONS,
    VALIDATION,
    Counting,
    _one_thread,  # noqa: F401  # used by every test
    batches,
    bilevel,
    events,
    rows,
    single,
)

import metapl
from metapl import MetaplError
from metapl.runs.progress import examples_in

# ------------------------------------------------------------------------------------------------------------- records


SCALARS = {
    "inner_loss",
    "outer_loss",
    "teacher_loss",
    "teacher_cross_entropy",
    "feedback_mean",
    "feedback_std",
    "feedback_ratio",
    "feedback_snr",
    "pseudo_label_confidence",
    "pseudo_label_entropy",
    "agreement",
    "student_lr",
    "teacher_lr",
    "exact_cosine",
    "student_validation_accuracy",
    "teacher_validation_accuracy",
    "pseudo_label_accuracy",
    "class_shares_vs_labeled",
    "class_shares_vs_truth",
}


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_tensorboard_shows_what_the_rows_say_each_step_once(mode: str, tmp_path: Path) -> None:
    """Also after a resume, whose lost steps are purged, and beside a second phase with the same step numbers."""
    labeled, unlabeled = batches(5)
    how: dict[str, Any] = {
        **OPTIONS,
        "steps": 17,
        "out": tmp_path,
        "exact_every": 4,
        "truth": VALIDATION,
        "log_every": 2,
    }
    breaking = Counting(labeled, 9, lambda: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(MetaplError, match="stop"):
        bilevel(mode).fit(breaking, unlabeled, **how)
    trainer = bilevel(mode)
    trainer.fit(labeled, unlabeled, resume=True, say=lambda _: None, **how)
    trainer.finetune(labeled, steps=6, out=tmp_path, log_every=1)

    found, logged = events(tmp_path / "tensorboard/fit"), rows(tmp_path)
    assert set(found.Tags()["scalars"]) == SCALARS
    for name in SCALARS:
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        assert shown == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged if name in row]
        assert len({step for step, _ in shown}) == len(shown)
    histograms = found.Histograms("pseudo_label_classes")
    assert [event.step for event in histograms] == [2, 4, 6, 8, 10, 12, 14, 16, 17]
    for event in histograms:
        assert event.histogram_value.bucket_limit == [0.5, 1.5, 2.5]
        assert sum(event.histogram_value.bucket) == len(unlabeled[0])
    assert [e.step for e in events(tmp_path / "tensorboard/finetune").Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_report_counts_the_pseudo_labels() -> None:
    labeled, unlabeled = batches(1)
    for mode in ("forward", "reinforce"):
        report = bilevel(mode).step(labeled[0], unlabeled[0])
        logits = report.signal.outputs
        assert logits is not None
        chosen = (report.signal.value if mode == "reinforce" else logits.argmax(1)).tolist()
        assert report.counts() == {"pseudo_label_classes": [chosen.count(k) for k in range(3)]}
    assert single().step(labeled[0]).counts() == {}


def test_the_rates_are_named_after_their_networks(tmp_path: Path) -> None:
    """A TorchOpt transform has its own schedule, and only the teacher's rate is known."""
    bilevel(inner=INNER["torchopt_momentum"]).fit(*batches(2), steps=1, out=tmp_path / "a")
    single().fit(batches(2)[0], steps=1, out=tmp_path / "b")
    names = [{k for k in rows(tmp_path / run)[0] if k.endswith("_lr")} for run in "ab"]
    assert names == [{"teacher_lr"}, {"student_lr"}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_the_time_left_accuracy_and_examples_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("metapl.training.trainer.BilevelTrainer.step", slowly(metapl.BilevelTrainer.step, time.sleep))
    bilevel().fit(*batches(3), steps=6, log_every=1, validation=VALIDATION, validate_every=1)
    last = [line for line in terminal.getvalue().split("\r") if "examples/s" in line][-1]
    shown = re.search(r"fit: +\d+%\|(.+)\| \d/6, \d\d:\d\d left, accuracy [\d.]+% of \d+, (\d+) examples/s *$", last)
    assert shown is not None, last
    assert len(last) <= 80
    assert len(shown[1]) >= 10
    assert 0 < int(shown[2]) < 14 / 0.12 + 1  # 6 labelled and 8 unlabelled ones, in more than 0.12 s


def test_what_is_no_terminal_gets_lines_at_validations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metapl.runs.progress.LINE_EVERY", 0.0)
    bilevel().fit(*batches(3), steps=5, log_every=1, validation=VALIDATION, validate_every=2, wait=2)
    bilevel().fit(*batches(3), steps=2, validate_every=1)
    bilevel().fit(*batches(3), steps=2, validate_every=1, progress=False)
    n = len(VALIDATION[1])
    patterns = (
        r"fit: step 2 of 5, about \d+ s left",  # the student has waited so far
        rf"fit: step 4 of 5, validation accuracy [\d.]+% of {n}, about \d+ s left",
        rf"fit: step 5 of 5, validation accuracy [\d.]+% of {n}, after \d+ s",
        r"fit: step 1 of 2, about \d+ s left",
        r"fit: step 2 of 2, after \d+ s",
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line


def slowly(step: Callable[..., Any], sleep: Callable[[float], None]) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        sleep(0.12)
        return step(*given, **named)

    return slow


def test_a_batch_of_no_rows_is_no_reason_to_fail() -> None:
    """Sources are pytrees of any kind; the bar counts what has rows."""
    assert [examples_in(one) for one in (torch.tensor(1.0), "x", {"a": torch.ones(4, 2)}, ())] == [0, 0, 4, 0]


# -------------------------------------------------------------------------------------------------------------- memory


MEMORY = """
import sys, torch, metapl
from pathlib import Path
sys.path.insert(0, {tests!r})
import fits as t

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def noted(batches, seen):
    for number in range(1201):
        if number in (200, 1200):
            seen.append(resident())
        yield batches[number % len(batches)]

labeled, unlabeled = t.batches(5)
seen = []
t.bilevel("forward").fit(
    noted(labeled, seen), iter(unlabeled * 300), steps=1201, out={out!r}, validation=t.VALIDATION, validate_every=20,
    log_every=5, save_every=50, ema_decay=0.9, exact_every=100,
)
print(seen[1] - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.long
def test_memory_stays_flat_over_a_thousand_steps(tmp_path: Path) -> None:
    """Less than 8 MB more after 1,200 steps than after 200; a step's graph kept by mistake would be above 20 kB."""
    program = MEMORY.format(tests=str(Path(__file__).parent), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8e6
