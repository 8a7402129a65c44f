"""``benchmarks/pictures/step.py``: what it counts as the limit, its ways, and its miniature."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import RESULTS, read
from benchmarks.pictures import one_step, step

pytestmark = pytest.mark.docs


class Counted(TorchDispatchMode):
    """Counts calls of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a training in each kind of steps, and put back what they time."""
    folder = tmp_path_factory.mktemp("digits")
    step.write_digits(folder)
    sum_of_terms = one_step.loss_trainer.sum_of_terms
    backward = torch.Tensor.backward
    yield {name: one_step.Phase(kind, folder) for name, kind in one_step.KINDS.items()}
    one_step.loss_trainer.sum_of_terms = sum_of_terms
    torch.Tensor.backward = backward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("labels alone", 3, 3), ("labels and UDA", 9, 6), ("mild, mixed up", 4, 4)],
)
def test_the_limit_has_the_convolutions_of_a_step(
    name: str, forward: int, backward: int, phases: Any
) -> None:
    phase = phases[name]
    with Counted() as of_limit:
        phase.convolutions.run()
    assert of_limit.calls["convolution"] == forward
    assert of_limit.calls["convolution_backward"] == backward
    assert not {*of_limit.calls} - {"convolution", "convolution_backward", "detach"}
    with Counted() as of_step:
        phase.take_steps(1)
    for operation in ("convolution", "convolution_backward"):
        assert of_step.calls[operation] == of_limit.calls[operation]


@pytest.mark.parametrize("name", one_step.KINDS)
def test_the_parts_of_a_step_are_all_of_it(name: str, phases: Any) -> None:
    parts = phases[name].parts(steps=2)
    whole = parts.pop("whole")
    limit = parts.pop("limit")
    assert limit > 0
    assert sorted(parts) == ["averages", "bookkeeping", "network", "optimizer", "views"]
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(whole)


def test_ways_of_one_algorithm_have_one_gradient(phases: Any) -> None:
    phase = phases["labels and UDA"]
    way = one_step.Way(phase, phase.network)
    gradients = []
    for compute in (way.by_terms, way.by_two_backwards, way.in_two_passes):
        compute()
        gradients.append(torch.cat([p.grad.flatten() for p in phase.network.parameters()]))
    as_it_is, by_two, shared_statistics = gradients
    torch.testing.assert_close(by_two, as_it_is)
    # With the statistics of labeled and strong pictures together, it is another algorithm.
    assert not torch.allclose(shared_statistics, as_it_is, rtol=1e-2)


def test_a_miniature_leaves_rows_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = tmp_path / "rows.jsonl"
    words = ["step.py", "--miniature", "--capabilities", "avx2", "--out", str(rows_file)]
    monkeypatch.setattr(sys, "argv", words)
    step.main()
    rows = read(rows_file)
    assert [row["phase"] for row in rows] == [*one_step.KINDS]
    for row in rows:
        assert row["capability"] in ("AVX2", "DEFAULT")
        assert row["batch"] == [32, 32]
        is_mild = row["phase"] == step.MILD
        assert row["architecture"] == ("strided_cnn" if is_mild else "pooled_cnn")
        assert row["ratio"] == pytest.approx(row["whole"] / row["limit"], rel=0.5)
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    table = capsys.readouterr().out
    assert table.count("| labels and UDA |") == 1


def test_the_page_says_what_the_committed_rows_show() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "pictures.md").read_text().split())
    said = step.sentences(read(RESULTS / "picture_step.jsonl"))
    assert len(said) >= 2
    for sentence in said:
        assert sentence in page
