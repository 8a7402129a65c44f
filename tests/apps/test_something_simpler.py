"""What stands beside metapl on the page "Something simpler" is what it says it is."""

import importlib
import re
from types import ModuleType

import pytest
import torch
from benchmark_runs import RESULTS, ROOT

from benchmarks.harness import points, read

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]


@pytest.fixture
def simpler() -> ModuleType:
    return importlib.import_module("something_simpler")


def test_the_step_by_hand_is_that_of_the_trainer(simpler: ModuleType) -> None:
    """Three steps of both networks, with momentum, weight decay and the teacher's own loss."""
    moved = []
    for way in ("by hand", simpler.EAGER):
        torch.manual_seed(0)
        pair, data = simpler.NETWORKS["tiny"].make()
        start = torch.nn.utils.parameters_to_vector(pair[0].parameters()).detach().clone()
        if way == "by hand":
            step, weights = simpler.by_hand(pair, data, compiled=False)
        else:
            step, weights = simpler.way_of(way, pair, data)
        for _ in range(3):
            step()
        moved.append(weights() - start)
    by_hand, by_trainer = moved
    assert (by_hand - by_trainer).norm() < 1e-5 * by_trainer.norm()


def test_wrong_labels_are_drawn_as_in_the_readme(simpler: ModuleType) -> None:
    digits = simpler.drawn_digits(0)
    readme = (ROOT / "README.md").read_text()
    names: dict[str, object] = {}
    code = readme.partition("```python\n")[2].partition("trainer = ")[0]
    with torch.random.fork_rng():
        exec(compile(code, "README.md", "exec"), names)
    assert torch.equal(names["labels"], digits.noisy[1])
    first = torch.nn.utils.parameters_to_vector(names["student"].parameters())
    assert torch.equal(first, torch.nn.utils.parameters_to_vector(digits.student.parameters()))


def test_the_readme_says_what_the_rows_say(simpler: ModuleType) -> None:
    rows = read(RESULTS / "something_simpler.jsonl")
    readme = " ".join((ROOT / "README.md").read_text().split())
    for arm, words in (
        (simpler.WEIGHTS, r"Over ten other seeds it reaches ([\d.]+) %"),
        (simpler.PLAIN, r"plain training ([\d.]+) %"),
        (simpler.FINISHED, r"100 more steps on the checked digits ([\d.]+) %"),
        (simpler.SPREAD, r"label spreading agrees with ([\d.]+) %"),
        (simpler.GOLD, r"gold loss correction ([\d.]+) %"),
    ):
        (said,) = re.findall(words, readme)
        assert float(said) == points(simpler.accuracies(rows, case="wrong_labels", arm=arm))


def test_the_page_is_short() -> None:
    text = (ROOT / "docs" / "something-simpler.md").read_text()
    prose = re.sub(r"^(?:\||<!--).*$", "", text, flags=re.MULTILINE)
    assert len(prose.split()) <= 700
