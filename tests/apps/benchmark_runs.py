"""Benchmarks as their commands run, in this process, and without a trace."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"

# Both halves take as long in miniature; each has a file, so that no process is left alone with all
# of them.
FIRST = (
    "endurance",
    "attribution",
    "data_rater",
    "fashion_protocol",
    "feedback_share",
    "feedback_size",
    "gpt2_training",
    "modes",
    "noisy_student",
    "scale",
    "step",
)
SECOND = (
    "digits_study",
    "fashion_feedback",
    "hyperparameters",
    "long_paths",
    "mnist",
    "noisy_student_fashion",
    "ordinary",
    "overhead",
    "peers",
    "protocol_rows",
    "recorded",
    "recording",
    "reduced",
    "reliability",
    "retraining",
    "silent",
    "when",
)
SECOND += (
    "before_and_after",
    "cifar_few_labels",
    "cifar_tuned_arms",
    "cifar_tuned_arms --few",
    "closed_loop",
    "compile_cost",
    "digits_study --forms",
    "people_labels",
    "rival_attribution",
    "small_pictures",
    "smoothing",
    "something_simpler",
    "stored_labels",
    "teacher_smoothing",
    "readme_example",
)
SCRIPTS = sorted(FIRST + SECOND)
MARKS = {  # of the tables in a page, where they are not called as the script is
    "attribution": ["attribution", "attribution-settings", "attribution-smooth"],
    "cifar_few_labels": [
        "cifar_few_labels",
        "cifar_few_labels-tests",
        "cifar_few_labels-power",
    ],
    "cifar_few_labels --card": [
        "cifar_few_labels",
        "cifar_few_labels-tests",
        "cifar_few_labels-power",
    ],
    "cifar_tuned_arms": [
        "cifar_tuned_arms",
        "cifar_tuned_arms-tries",
        "cifar_tuned_arms-tests",
        "cifar_tuned_arms-power",
    ],
    "cifar_tuned_arms --few": [
        "cifar_tuned_arms_250",
        "cifar_tuned_arms_250-tries",
        "cifar_tuned_arms_250-tests",
        "cifar_tuned_arms_250-power",
    ],
    "closed_loop": ["closed_loop", "closed_loop-chosen"],
    "data_rater": ["data_rater", "data_rater-scores", "data_rater-costs"],
    "digits_study": ["digits"],
    "digits_study --forms": ["digits-forms"],
    "fashion_feedback": [
        "fashion_feedback",
        "fashion_feedback-arms",
        "fashion_feedback-signs",
    ],
    "feedback_share": ["feedback_share", "feedback_share-noise"],
    "hyperparameters": ["hyperparameters", "schedule"],
    "modes": ["modes", "ablation"],
    "noisy_student": ["noisy-student-studies"],
    "noisy_student_fashion": ["noisy-student-fashion"],
    "ordinary": ["ordinary", "ordinary-unseen", "ordinary-declared", "ordinary-smoothed"],
    "people_labels": [
        "people_labels",
        "people_labels-tests",
        "people_labels-longer",
        "people_labels-majority",
        "people_labels-majority-tests",
    ],
    "reliability": [
        "reliability",
        "reliability-errors",
        "reliability-tests",
        "reliability-measurements",
    ],
    "rival_attribution": ["rival_attribution", "rival_attribution-scores"],
    "smoothing": [
        "smoothing-rules",
        "smoothing-own",
        "smoothing-others",
        "smoothing-mean",
        "smoothing-agreement",
        "smoothing-area",
    ],
    "small_pictures": ["small_pictures-step", "small_pictures", "small_pictures-clock"],
    "something_simpler": [
        "simpler-photographs",
        "simpler-wrong_labels",
        "simpler-milder_labels",
        "simpler-symmetric_labels",
        "simpler-tables",
        "simpler-steps",
        "simpler-stacked",
        "simpler-removals",
        "simpler-memory",
        "simpler-distilled",
        "simpler-scores",
        "simpler-sinusoids",
        "simpler-command",
        "simpler-spread",
        "simpler-splits",
        "simpler-killed",
        "simpler-tasks",
    ],
    "when": ["when", "feedback-worth"],
}
MINUTES = (
    "endurance",
    "fashion_protocol",
    "hyperparameters",
    "peers",
    "reduced",
    "rival_attribution",
    "silent",
)
MINUTES += (
    "before_and_after",
    "cifar_few_labels",
    "cifar_tuned_arms",
    "cifar_tuned_arms --few",
    "compile_cost",
    "people_labels",
    "small_pictures",
    "smoothing",
    "something_simpler",
    "stored_labels",
    "teacher_smoothing",
)


def committed() -> dict[Path, bytes]:
    """Return what the files of the results hold."""
    return {path: path.read_bytes() for path in RESULTS.rglob("*") if path.is_file()}


@pytest.fixture
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before, threads = committed(), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(ROOT)
    yield
    torch.set_num_threads(threads)
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
    assert committed() == before


def run(script: str, *arguments: str | Path) -> str:
    """Return what a benchmark's command prints, in this process.

    Endurance forks, which autograd's threads do not survive.
    """
    name, *options = script.split()
    words = [*options, *map(str, arguments)]
    if name == "endurance":
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        importlib.import_module(name).main()
    return printed.getvalue()


def miniatures(scripts: tuple[str, ...]) -> pytest.MarkDecorator:
    cases = [
        pytest.param(script, marks=[pytest.mark.long] * (script in MINUTES)) for script in scripts
    ]
    return pytest.mark.parametrize("script", cases)


def check_miniature(script: str, folder: Path) -> None:
    """Check that it leaves rows that it goes on with and that its tables are made of."""
    name, marks, out, page = (
        script.split()[0],
        MARKS.get(script, [script]),
        folder / "rows.jsonl",
        folder / "page.md",
    )
    own = [script, "--out", out, *(("--workers", "1") if name == "digits_study" else ())]
    run(*own, "--miniature")
    assert name != "endurance" or not re.search(r'"failed": [1-9]', out.read_text())
    if hasattr(importlib.import_module(name), "RAW"):  # rows that are there are not run again
        made = out.read_bytes()
        run(*own, "--miniature")
        assert out.read_bytes() == made
    page.write_text(
        "before\n" + "".join(f"<!-- {m}:begin -->\n<!-- {m}:end -->\n" for m in marks) + "after\n"
    )
    run(*own, "--write", page)
    printed, text = run(*own, "--table"), page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert printed.count("\n|") > 2
    assert all(table.strip() in text for table in printed.split("\n\n"))
    for figure in folder.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")
