"""What ``attribute`` reads.

Dicts of columns, dataclasses, data sets and loaders of dicts; or a line that leads on.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import metapl
from metapl import MetaplError
from metapl.problems import EqualWeights, NextToken
from metapl.training.attribution import Attribution

N, STEPS = 20, 5


def digits(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return pictures of the digits 0 to 3 as rows of token numbers, 0 to 16, and their classes."""
    x, y = load_digits(return_X_y=True)
    keep = np.flatnonzero(y < 4)[first : first + count]
    return torch.tensor(x[keep]).long(), torch.tensor(y[keep])


IDS, LABELS = digits(0, N)
JUDGED, TRUE = digits(100, 8)
MASK = (torch.arange(64) < 50).long().repeat(N, 1)


class Bag(nn.Module):
    """A bag of tokens, of a dict of ids and a mask, or of a pair of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(17, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, batch: Any) -> Tensor:
        is_dict = isinstance(batch, dict)
        ids, mask = (batch["input_ids"], batch["attention_mask"]) if is_dict else batch
        outputs: Tensor = self.head((self.embed(ids).tanh() * mask[..., None]).mean(1))
        return outputs


def attributed(
    train: Any, outer: Any, network: nn.Module | None = None, **options: Any
) -> Attribution:
    network = Bag() if network is None else network
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
    given = {"optimizer": optimizer, "steps": STEPS, "batch_size": 8, "progress": False, **options}
    return metapl.attribute(network, train, outer, **given)


def columns(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": MASK[: len(ids)], "labels": labels}


class Records(Dataset[Any]):
    """Examples that are dicts, as a data set of Hugging Face has them."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: t[number] for name, t in self.columns.items()}


def pairs(of: dict[str, Tensor]) -> Any:
    return {name: t for name, t in of.items() if name != "labels"}, of["labels"]


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "one dict": lambda of: of,
    "one dict, label": lambda of: {
        ("label" if name == "labels" else name): t for name, t in of.items()
    },
    "a tokenizer's": UserDict,
    "a dict of arrays": lambda of: {name: t.numpy() for name, t in of.items()},
    "a data set of dicts": Records,
    "a list of dicts": lambda of: [Records(of)[i] for i in range(len(of["labels"]))],
    "a loader of dicts": lambda of: DataLoader(Records(of), batch_size=3, shuffle=True),
    "a loader that gives what tokenizers do": lambda of: DataLoader(
        Records(of), collate_fn=lambda rows: UserDict(torch.utils.data.default_collate(rows))
    ),
    "a loader of pairs": lambda of: DataLoader([pairs(row) for row in Records(of)], batch_size=7),
}


@pytest.fixture(scope="module")
def expected() -> Attribution:
    return attributed(pairs(columns(IDS, LABELS)), pairs(columns(JUDGED, TRUE)))


@pytest.mark.parametrize("form", FORMS)
def test_the_form_changes_no_score(form: str, expected: Attribution) -> None:
    make = FORMS[form]
    found = attributed(make(columns(IDS, LABELS)), make(columns(JUDGED, TRUE)))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.outer_loss, expected.outer_loss)


def test_the_scores_of_a_dict_are_differences_of_trainings() -> None:
    found = attributed(columns(IDS, LABELS), columns(JUDGED, TRUE))
    assert found.scores.abs().max() > 1e-4
    for number in (0, 7, 13):
        move = torch.zeros(N, dtype=torch.float64)
        move[number] = 1e-4
        slope = (found._losses_with(1 + move) - found._losses_with(1 - move)) / 2e-4
        assert float(-slope) == pytest.approx(float(found.scores[number]), rel=1e-5, abs=1e-9)


def test_each_outer_example_of_a_dict() -> None:
    by_dict, by_pair = (
        attributed(make(columns(IDS, LABELS)), make(columns(JUDGED, TRUE)), each=True)
        for make in (dict, pairs)
    )
    assert by_dict.scores.shape == (8, N)
    assert torch.equal(by_dict.scores, by_pair.scores)
    network = Bag()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    given: dict[str, Any] = {"optimizer": optimizer, "steps": 3, "batch_size": 8, "progress": False}
    loader = DataLoader(Records(columns(JUDGED, TRUE)))
    assert metapl.metasmoothness(network, columns(IDS, LABELS), loader, **given).agreement > 0.9


def test_tokens_of_a_dict_are_scored_too() -> None:
    """NextToken on one dict of ids, a mask and labels, as (dict, labels) is."""
    torch.manual_seed(0)
    ids = torch.randint(17, (10, 6))
    of = {"input_ids": ids, "labels": ids.clone()}

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.head = nn.Embedding(17, 5).double(), nn.Linear(5, 17).double()

        def forward(self, batch: Any) -> Tensor:
            return self.head(self.embed(batch["input_ids"]).cumsum(1).tanh())

    scores = [
        attributed(make(of), make(of), Words(), problem=NextToken(per="token"), batch_size=5).scores
        for make in (dict, pairs, Records, lambda of: DataLoader(Records(of)))
    ]
    assert scores[0].shape == (10, 6)
    assert all(torch.equal(one, scores[1]) for one in scores)


@dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    scale: Tensor


class Named(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor


def field(batch: Any, name: str) -> Tensor:
    found: Tensor = batch[name] if isinstance(batch, dict) else getattr(batch, name)
    return found


class OfFields(EqualWeights):
    """Reads batches of three columns, with a ``student_input`` of its own."""

    def student_input(self, batch: Any) -> Any:
        return field(batch, "x")

    outer_input = student_input

    def outer_batch(self, batch: Any) -> Any:
        return batch

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = F.cross_entropy(outputs, field(batch, "y"), reduction="none")
        return signal.value * field(batch, "scale") * losses

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, field(batch, "y"))


class OfColumns(OfFields):
    def student_input(self, batch: Any) -> Any:
        return batch[0]

    outer_input = student_input

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return signal.value * batch[2] * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize(
    "form",
    [
        "dict",
        "dataclass",
        "named tuple",
        "tuple",
        "data set of dicts",
        "loader of dataclasses",
        "data set of tuples",
    ],
)
@pytest.mark.parametrize("each", [False, True])
def test_a_problem_that_reads_columns_of_its_own(form: str, each: bool) -> None:
    """Scaled losses have the scores of the plain problem on scaled losses.

    These are taken by a loop over trainings.
    """

    def made(ids: Tensor, labels: Tensor) -> Any:
        tensors = ids.double() / 16, labels, torch.linspace(0.5, 2, len(ids)).double()
        as_dict = dict(zip(("x", "y", "scale"), tensors, strict=True))
        if form == "dict":
            return as_dict
        if form == "dataclass":
            return Record(*tensors)
        if form == "named tuple":
            return Named(*tensors)
        if form == "tuple":
            return tensors
        if form == "data set of tuples":
            return TensorDataset(*tensors)
        rows = [{name: t[i] for name, t in as_dict.items()} for i in range(len(ids))]
        if form == "data set of dicts":
            return rows
        return DataLoader(
            rows,
            batch_size=2,
            collate_fn=lambda given: Record(*(torch.stack([r[n] for r in given]) for n in as_dict)),
        )

    torch.manual_seed(0)
    network = nn.Linear(64, 4).double()
    problem = OfColumns() if "tuple" in form and "named" not in form else OfFields()
    train, outer = made(IDS, LABELS), made(JUDGED, TRUE)
    found = attributed(train, outer, network, problem=problem, each=each)
    move = torch.zeros(N, dtype=torch.float64)
    move[3] = 1e-4
    slope = (found._losses_with(1 + move) - found._losses_with(1 - move)) / 2e-4
    torch.testing.assert_close(-slope, found.scores[..., 3], rtol=1e-5, atol=1e-9)
    plain = attributed(
        (IDS.double() / 16, LABELS), (JUDGED.double() / 16, TRUE), network, each=each
    )
    assert not torch.allclose(found.scores, plain.scores, rtol=1e-2)  # the scale was read


def test_a_loader_may_pad_its_batches() -> None:
    """Examples of different lengths, by the loader's own collate_fn.

    The padded columns give the same scores.
    """
    lengths = [3 + i % 5 for i in range(N)]

    def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(row["input_ids"])).long() for row in rows], batch_first=True
        )
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.stack([row["labels"] for row in rows]),
        }

    class Sums(Bag):
        def forward(self, batch: Any) -> Tensor:
            return self.head(
                (self.embed(batch["input_ids"]).tanh() * batch["attention_mask"][..., None]).sum(1)
                / 8
            )

    rows = [
        {"input_ids": IDS[i, 20 : 20 + length], "labels": LABELS[i]}
        for i, length in enumerate(lengths)
    ]
    loader = DataLoader(rows, batch_size=4, collate_fn=padded)
    whole = padded(rows)
    by_loader, by_columns = (attributed(train, whole, Sums()).scores for train in (loader, whole))
    torch.testing.assert_close(by_loader, by_columns, rtol=1e-9, atol=1e-12)
    with pytest.raises(
        MetaplError, match="a DataLoader with a collate_fn that makes a batch of them"
    ):
        attributed(rows, whole, Sums())


# ------------------------------------------------------------------------------- lines that lead on


class Graph(nn.Module):
    """One graph convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()

    def forward(self, graph: Any) -> Tensor:
        source, target = graph["edge_index"]
        summed = torch.zeros_like(graph["x"]).index_add(0, target, graph["x"][source])
        outputs: Tensor = self.layer(graph["x"] + summed)
        return outputs


class OfNodes(EqualWeights):
    def student_input(self, batch: Any) -> Any:
        return batch

    outer_input = student_input

    def outer_batch(self, batch: Any) -> Any:
        return batch

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch["y"], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["y"])


def test_a_graph_is_refused_with_the_call_that_scores_its_nodes() -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64)
    graph = {"x": x, "edge_index": torch.randint(6, (2, 9)), "y": torch.arange(6) % 2}
    student, problem, steps = Graph(), OfNodes(), 3
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    with pytest.raises(MetaplError, match=r"x'\] 6, \['edge_index'\] 2, \['y'\] 6") as refused:
        metapl.attribute(
            student, graph, graph, problem=problem, optimizer=optimizer, steps=steps, batch_size=6
        )
    text = str(refused.value)
    call = text[text.index("metapl.hypergradient(") : text.index(".feedback.")] + ".feedback"
    names = {
        "metapl": metapl,
        "student": student,
        "graph": graph,
        "steps": steps,
        "problem": problem,
    }
    feedback = eval(call, names | {"optimizer": optimizer})
    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in student.parameters())
    source, target = graph["edge_index"]
    seen = x + torch.zeros_like(x).index_add(0, target, x[source])
    theta = [weight, bias]
    for _ in range(steps):
        loss = (w * F.cross_entropy(F.linear(seen, *theta), graph["y"], reduction="none")).mean()
        g = torch.autograd.grad(loss, theta, create_graph=True)
        theta = [p - 0.5 * d for p, d in zip(theta, g, strict=True)]
    outer = F.cross_entropy(F.linear(seen, *theta), graph["y"])
    torch.testing.assert_close(sum(feedback), -torch.autograd.grad(outer, w)[0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Records(columns(IDS, LABELS)))


OF = columns(IDS, LABELS)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lists of a tokenizer": (lambda: {**OF, "input_ids": IDS.tolist()}, "return_tensors='pt'"),
    "texts": (lambda: {**OF, "text": np.array(["a"] * N)}, "train holds data of ndarray"),
    "a dict without "
    "labels": (lambda: {name: t for name, t in OF.items() if name != "labels"}, "under 'labels'"),
    "a number beside the "
    "columns": (lambda: {**OF, "temperature": torch.tensor(1.0)}, r"\['temperature'\] 0"),
    "no rows": (lambda: {name: t[:0] for name, t in OF.items()}, "rows"),
    "a stream": (lambda: DataLoader(Stream()), r"train=list\(dataset\)"),
    "a generator": (lambda: iter(Records(OF)), r"train=list\(...\)"),
    "a weighted sampler": (
        lambda: DataLoader(Records(OF), sampler=WeightedRandomSampler([1.0] * N, N)),
        "WeightedRandomSampler"),
    "a subset's "
    "sampler": (lambda: DataLoader(Records(OF), sampler=SubsetRandomSampler(range(5))), "Subset"),
    "a loader of batches": (lambda: DataLoader(Records(OF), batch_size=None), "batch_size=None"),
    "a data set without examples": (lambda: Subset(Records(OF), []), "train has no examples"),
    "a dataclass for the usual problem": (
        lambda: Record(IDS.double(), LABELS, torch.ones(N)),
        r"give the problem a method student_input\(batch\)"),
    "a number": (lambda: 3, "a data set of examples by number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_line(case: str) -> None:
    make, words = REFUSED[case]
    network = Bag()
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(MetaplError, match=words) as refused:
        attributed(make(), columns(JUDGED, TRUE), network)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
