"""What ``attribute`` reads.

It reads dicts of columns, dataclasses, data sets and loaders of dicts. Of other data it says in a
line how to go on.
"""

from __future__ import annotations

import warnings
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
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import metapl
from metapl import MetaplError
from metapl.attribution.attribute import Attribution
from metapl.problems import EqualWeights, NextToken

N = 20
STEPS = 5


def digits(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return pictures of the digits 0 to 3 as rows of token numbers, 0 to 16, and their classes."""
    x, y = load_digits(return_X_y=True)
    keep = np.flatnonzero(y < 4)[first : first + count]
    return torch.tensor(x[keep]).long(), torch.tensor(y[keep])


IDS, LABELS = digits(0, N)
OUTER_IDS, OUTER_LABELS = digits(100, 8)
MASK = (torch.arange(64) < 50).long().repeat(N, 1)


class Bag(nn.Module):
    """A bag of tokens, of a dict of ids and a mask, or of a pair of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(17, 6)
        self.head = nn.Linear(6, 4)
        self.double()

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            ids = batch["input_ids"]
            mask = batch["attention_mask"]
        else:
            ids, mask = batch
        outputs: Tensor = self.head((self.embed(ids).tanh() * mask[..., None]).mean(1))
        return outputs


def attributed(
    train: Any, outer: Any, network: nn.Module | None = None, **options: Any
) -> Attribution:
    """Return the scores for a ``Bag`` or another network, by default in batches of 8."""
    if network is None:
        network = Bag()
    defaults = {
        "optimizer": torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9),
        "steps": STEPS,
        "batch_size": 8,
        "progress": False,
    }
    return metapl.attribute(network, train, outer, **{**defaults, **options})


def columns(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": MASK[: len(ids)], "labels": labels}


class Records(Dataset[Any]):
    """Examples that are dicts, as a data set of Hugging Face has them."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: t[number] for name, t in self.columns.items()}


def pair(table: dict[str, Tensor]) -> Any:
    """Return the columns other than the labels in a dict, and the labels."""
    inputs = {name: t for name, t in table.items() if name != "labels"}
    return inputs, table["labels"]


def with_label_for_labels(table: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs, labels = pair(table)
    return {**inputs, "label": labels}


def list_of_dicts(table: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    records = Records(table)
    return [records[number] for number in range(len(records))]


def collate_as_a_tokenizer(rows: list[dict[str, Tensor]]) -> UserDict[str, Tensor]:
    return UserDict(torch.utils.data.default_collate(rows))


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "one dict": dict,
    "one dict, label": with_label_for_labels,
    "a tokenizer's": UserDict,
    "a dict of arrays": lambda table: {name: t.numpy() for name, t in table.items()},
    "a data set of dicts": Records,
    "a list of dicts": list_of_dicts,
    "a loader of dicts": lambda table: DataLoader(Records(table), batch_size=3, shuffle=True),
    "a loader that gives what tokenizers do": lambda table: DataLoader(
        Records(table), collate_fn=collate_as_a_tokenizer
    ),
    "a loader of shuffled batches": lambda table: DataLoader(
        Records(table),
        batch_sampler=BatchSampler(RandomSampler(Records(table)), 4, drop_last=True),
        num_workers=0,
    ),
    "a loader of pairs": lambda table: DataLoader(
        [pair(row) for row in list_of_dicts(table)], batch_size=7
    ),
}


@pytest.fixture(scope="module")
def expected() -> Attribution:
    return attributed(pair(columns(IDS, LABELS)), pair(columns(OUTER_IDS, OUTER_LABELS)))


@pytest.mark.parametrize("form", FORMS)
def test_the_form_changes_no_score(form: str, expected: Attribution) -> None:
    make = FORMS[form]
    attribution = attributed(make(columns(IDS, LABELS)), make(columns(OUTER_IDS, OUTER_LABELS)))
    assert torch.equal(attribution.scores, expected.scores)
    assert torch.equal(attribution.outer_loss, expected.outer_loss)


def test_lists_of_numbers_are_tensors() -> None:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    scores = []
    for train in (
        (x, labels),
        (x.tolist(), labels.tolist()),
        (x, labels.tolist()),
        [*zip(x.tolist(), labels.tolist(), strict=True)],
        [[row, label] for row, label in zip(x.tolist(), labels.tolist(), strict=True)],
    ):
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        scores.append(attributed(train, (x, labels), network, optimizer=optimizer).scores)
    for others in scores[1:]:
        assert torch.equal(others, scores[0])


def slope_in_weight(attribution: Attribution, number: int) -> Any:
    """Return the central difference of the outer losses of trainings, in one example's weight."""
    move = torch.zeros(N, dtype=torch.float64)
    move[number] = 1e-4
    upper = attribution._losses_with(1 + move)
    lower = attribution._losses_with(1 - move)
    return (upper - lower) / 2e-4


def test_the_scores_of_a_dict_are_differences_of_trainings() -> None:
    attribution = attributed(columns(IDS, LABELS), columns(OUTER_IDS, OUTER_LABELS))
    assert attribution.scores.abs().max() > 1e-4
    for number in (0, 7, 13):
        score = -float(slope_in_weight(attribution, number))
        assert score == pytest.approx(float(attribution.scores[number]), rel=1e-5, abs=1e-9)


def test_each_outer_example_of_a_dict() -> None:
    train = columns(IDS, LABELS)
    outer = columns(OUTER_IDS, OUTER_LABELS)
    by_dict = attributed(train, outer, each=True)
    by_pair = attributed(pair(train), pair(outer), each=True)
    assert by_dict.scores.shape == (8, N)
    assert torch.equal(by_dict.scores, by_pair.scores)
    network = Bag()
    smoothness = metapl.metasmoothness(
        network,
        train,
        DataLoader(Records(outer)),
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        steps=3,
        batch_size=8,
        progress=False,
    )
    assert smoothness.agreement > 0.9


def test_tokens_of_a_dict_are_scored_too() -> None:
    """NextToken on one dict of ids, a mask and labels, as (dict, labels) is."""
    torch.manual_seed(0)
    ids = torch.randint(17, (10, 6))
    table = {"input_ids": ids, "labels": ids.clone()}

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed = nn.Embedding(17, 5).double()
            self.head = nn.Linear(5, 17).double()

        def forward(self, batch: Any) -> Tensor:
            return self.head(self.embed(batch["input_ids"]).cumsum(1).tanh())

    def token_scores(data: Any) -> Tensor:
        return attributed(data, data, Words(), problem=NextToken(per="token"), batch_size=5).scores

    expected = token_scores(pair(table))
    assert expected.shape == (10, 6)
    alone = {"input_ids": ids}
    for data in (table, Records(table), DataLoader(Records(table)), alone, Records(alone)):
        assert torch.equal(token_scores(data), expected)


class Causal(nn.Module):
    """A language model of ids, or of a dict with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(17, 5).double()
        self.head = nn.Linear(5, 17).double()

    def forward(self, batch: Any) -> Tensor:
        ids = batch["input_ids"] if isinstance(batch, dict) else batch
        return self.head(self.embed(ids).cumsum(1).tanh())


def test_ids_alone_are_their_labels() -> None:
    ids = torch.randint(17, (10, 6), generator=torch.Generator().manual_seed(0))
    options: Any = {"problem": NextToken(per="token"), "batch_size": 5}
    expected = attributed((ids, ids), (ids, ids), Causal(), **options).scores
    for data in (ids, TensorDataset(ids), [*ids]):
        assert torch.equal(attributed(data, data, Causal(), **options).scores, expected)
    lists = ids.tolist()
    assert torch.equal(attributed(lists, ids, Causal(), **options).scores, expected)
    # What is masked is no label.
    mask = torch.ones_like(ids)
    mask[4:, 3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    labeled = {**inputs, "labels": ids.masked_fill(mask == 0, -100)}
    scores = [attributed(data, data, Causal(), **options).scores for data in (inputs, labeled)]
    assert torch.equal(*scores)
    assert not torch.equal(scores[0], expected)
    with pytest.raises(MetaplError, match="train is .*; expected token ids"):
        attributed(ids.double(), (ids, ids), Causal(), **options)


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
    column: Tensor = batch[name] if isinstance(batch, dict) else getattr(batch, name)
    return column


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
@pytest.mark.filterwarnings("ignore:scores may not say what removals do")
@pytest.mark.parametrize("each", [False, True])
def test_a_problem_that_reads_columns_of_its_own(form: str, each: bool) -> None:
    """Scaled losses have the scores of the plain problem on scaled losses.

    These are taken by a loop over trainings.
    """

    def build(ids: Tensor, labels: Tensor) -> Any:
        tensors = ids.double() / 16, labels, torch.linspace(0.5, 2, len(ids)).double()
        table = dict(zip(("x", "y", "scale"), tensors, strict=True))
        if form == "dict":
            return table
        if form == "dataclass":
            return Record(*tensors)
        if form == "named tuple":
            return Named(*tensors)
        if form == "tuple":
            return tensors
        if form == "data set of tuples":
            return TensorDataset(*tensors)
        rows = [{name: t[i] for name, t in table.items()} for i in range(len(ids))]
        if form == "data set of dicts":
            return rows
        return DataLoader(rows, batch_size=2, collate_fn=collate_record)

    def collate_record(rows: list[dict[str, Tensor]]) -> Record:
        return Record(**torch.utils.data.default_collate(rows))

    torch.manual_seed(0)
    network = nn.Linear(64, 4).double()
    has_columns_by_place = form in ("tuple", "data set of tuples")
    problem = OfColumns() if has_columns_by_place else OfFields()
    train = build(IDS, LABELS)
    outer = build(OUTER_IDS, OUTER_LABELS)
    scaled = attributed(train, outer, network, problem=problem, each=each)
    slope = slope_in_weight(scaled, 3)
    torch.testing.assert_close(-slope, scaled.scores[..., 3], rtol=1e-5, atol=1e-9)
    unscaled = attributed(
        (IDS.double() / 16, LABELS), (OUTER_IDS.double() / 16, OUTER_LABELS), network, each=each
    )
    # Scores that differ show that the scale was read.
    assert not torch.allclose(scaled.scores, unscaled.scores, rtol=1e-2)


def test_a_loader_may_pad_its_batches() -> None:
    """Examples of different lengths, by the loader's own collate_fn.

    The padded columns give the same scores.
    """
    rows = []
    for number in range(N):
        length = 3 + number % 5
        rows.append({"input_ids": IDS[number, 20 : 20 + length], "labels": LABELS[number]})

    def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        masks = [torch.ones(len(row["input_ids"])).long() for row in rows]
        return {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True),
            "labels": torch.stack([row["labels"] for row in rows]),
        }

    class Sums(Bag):
        """A bag whose sum is over tokens, so that its outputs do not depend on the padding."""

        def forward(self, batch: Any) -> Tensor:
            features = self.embed(batch["input_ids"]).tanh()
            mask = batch["attention_mask"][..., None]
            return self.head((features * mask).sum(1) / 8)

    table = pad(rows)
    loader = DataLoader(rows, batch_size=4, collate_fn=pad)
    by_loader = attributed(loader, table, Sums()).scores
    by_columns = attributed(table, table, Sums()).scores
    torch.testing.assert_close(by_loader, by_columns, rtol=1e-9, atol=1e-12)
    text = "do not go together .* a DataLoader with a collate_fn"
    with pytest.raises(MetaplError, match=text):
        attributed(rows, table, Sums())


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
    student = Graph()
    problem = OfNodes()
    steps = 3
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    with pytest.raises(MetaplError, match=r"x'\] 6, \['edge_index'\] 2, \['y'\] 6") as refusal:
        metapl.attribute(
            student, graph, graph, problem=problem, optimizer=optimizer, steps=steps, batch_size=6
        )
    text = str(refusal.value)
    call = text[text.index("metapl.hypergradient(") : text.index(".feedback.")] + ".feedback"
    names = {
        "metapl": metapl,
        "student": student,
        "graph": graph,
        "steps": steps,
        "problem": problem,
        "optimizer": optimizer,
    }
    feedback = eval(call, names)

    w = torch.ones(6, dtype=torch.float64, requires_grad=True)
    theta = [p.detach().clone().requires_grad_() for p in student.parameters()]
    source, target = graph["edge_index"]
    neighborhood = x + torch.zeros_like(x).index_add(0, target, x[source])
    for _ in range(steps):
        logits = F.linear(neighborhood, *theta)
        loss = (w * F.cross_entropy(logits, graph["y"], reduction="none")).mean()
        gradients = torch.autograd.grad(loss, theta, create_graph=True)
        theta = [p - 0.5 * g for p, g in zip(theta, gradients, strict=True)]
    outer_loss = F.cross_entropy(F.linear(neighborhood, *theta), graph["y"])
    (gradient,) = torch.autograd.grad(outer_loss, w)
    torch.testing.assert_close(sum(feedback), -gradient)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Records(columns(IDS, LABELS)))


class Doubling(DataLoader[Any]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {name: 2 * t for name, t in batch.items()}


class Augmented(Records):
    def __getitem__(self, number: int) -> dict[str, Tensor]:
        record = super().__getitem__(number)
        return {**record, "attention_mask": torch.rand(MASK.shape[1:]).double()}


TABLE = columns(IDS, LABELS)
WEIGHTED = WeightedRandomSampler([1.0] * N, N)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lists of a tokenizer": (lambda: {**TABLE, "input_ids": IDS.tolist()}, "return_tensors='pt'"),
    "texts": (lambda: {**TABLE, "text": np.array(["a"] * N)}, "train holds data of ndarray"),
    "a dict without labels": (lambda: pair(TABLE)[0], "under 'labels'"),
    "a number beside the columns": (
        lambda: {**TABLE, "temperature": torch.tensor(1.0)},
        r"\['temperature'\] 0",
    ),
    "no rows": (lambda: {name: t[:0] for name, t in TABLE.items()}, "rows"),
    "a stream": (lambda: DataLoader(Stream()), r"train=list\(dataset\)"),
    "a generator": (lambda: iter(Records(TABLE)), r"train=list\(...\)"),
    "a weighted sampler": (
        lambda: DataLoader(Records(TABLE), sampler=WEIGHTED),
        "WeightedRandomSampler",
    ),
    "a subset's sampler": (
        lambda: DataLoader(Records(TABLE), sampler=SubsetRandomSampler(range(5))),
        "Subset",
    ),
    "a weighted sampler in batches": (
        lambda: DataLoader(Records(TABLE), batch_sampler=BatchSampler(WEIGHTED, 2, drop_last=True)),
        "draws by a WeightedRandomSampler",
    ),
    "numbers in batches": (
        lambda: DataLoader(Records(TABLE), batch_sampler=BatchSampler([0, 1], 2, drop_last=True)),  # type: ignore[arg-type]
        "draws by a list",
    ),
    "batches of one's own": (
        lambda: DataLoader(Records(TABLE), batch_sampler=[[0, 1]]),
        "draws by a list",
    ),
    "a sampler with replacement": (
        lambda: DataLoader(Records(TABLE), sampler=RandomSampler(Records(TABLE), replacement=True)),
        "draws by a RandomSampler",
    ),
    "a sampler of the first examples": (
        lambda: DataLoader(Records(TABLE), sampler=SequentialSampler(range(4))),
        "draws 4 examples by a SequentialSampler",
    ),
    "batches of the first examples": (
        lambda: DataLoader(
            Records(TABLE), batch_sampler=BatchSampler(RandomSampler(range(4)), 2, drop_last=False)
        ),
        "draws 4 examples by a RandomSampler",
    ),
    "a loader that drops the last ones": (
        lambda: DataLoader(Records(TABLE), batch_size=N - 1, drop_last=True),
        "drops its last examples",
    ),
    "a loader that changes its batches": (
        lambda: Doubling(Records(TABLE)),
        "with an __iter__ of its own",
    ),
    "a loader of batches": (lambda: DataLoader(Records(TABLE), batch_size=None), "batch_size=None"),
    "a data set without examples": (lambda: Subset(Records(TABLE), []), "train has no examples"),
    "a dataclass for the usual problem": (
        lambda: Record(IDS.double(), LABELS, torch.ones(N)),
        r"give the problem a method student_input\(batch\)",
    ),
    "a number": (lambda: 3, "a data set of examples by number"),
    "rows of different lengths": (lambda: (IDS, [[1, 2], [3]] * (N // 2)), r"a list in \[1\]"),
    "token ids alone": (lambda: IDS, r"give problem=metapl\.problems\.NextToken\(\)"),
    "token ids alone in a dict": (lambda: {"input_ids": IDS}, r"problems\.NextToken\(\)"),
    "random augmentation": (lambda: Augmented(TABLE), "without random augmentation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_line(case: str) -> None:
    make, text = REFUSED[case]
    network = Bag()
    weights_before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(MetaplError, match=text) as refusal:
        attributed(make(), columns(OUTER_IDS, OUTER_LABELS), network)
    assert "\n" not in str(refusal.value)
    for weight, weight_before in zip(network.parameters(), weights_before, strict=True):
        assert torch.equal(weight, weight_before)


class Cube(torch.autograd.Function):
    """x³, in whose backward pass a part of x is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 3 * x * x.detach()


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(Cube.apply(self.first(x)))
        return outputs


def test_a_wrong_second_derivative_is_refused_as_in_hypergradient() -> None:
    torch.manual_seed(0)
    student = Cubed().double()
    data = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 3
    options: dict[str, Any] = {
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "steps": 4,
        "batch_size": 8,
        "progress": False,
    }
    before = {name: t.clone() for name, t in student.state_dict().items()}
    with pytest.raises(MetaplError, match="after real steps"):
        metapl.attribute(student, data, data, **options)
    with pytest.warns(UserWarning, match="after real steps"):
        metapl.attribute(student, data, data, verify="warn", **options)
    assert metapl.attribute(student, data, data, verify=False, **options).scores.shape == (24,)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())


def test_the_steps_of_the_greatest_rates_are_compared() -> None:
    """The first ones of a warm-up, and the rate that the optimizer holds then, hide all errors."""
    torch.manual_seed(0)
    data = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 3
    rates = torch.tensor([1e-9, 1e-9, 1e-9, 0.1])[:, None]

    def scores(student: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-9)
        options: dict[str, Any] = {"steps": 4, "batch_size": 8, "progress": False}
        settings = {"lr": rates}
        return metapl.attribute(
            student, data, data, optimizer=optimizer, settings=settings, **options
        ).scores

    with pytest.raises(MetaplError, match="after real steps"):
        scores(Cubed().double())
    right = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(right).shape == (24,)


def noise_like(x: Tensor) -> Tensor:
    """Return noise by no generator of torch, since those are set back for a second reading."""
    return torch.tensor(np.random.default_rng().normal(size=x.shape)).to(x)


@dataclass(frozen=True)
class NoisyProblem(EqualWeights):
    """A problem that makes another batch of the same examples at each reading."""

    def labeled_batch(self, batch: Any, name: str) -> Any:
        x, y = super().labeled_batch(batch, name)
        return x + noise_like(x), y


class NoisyExamples(TensorDataset):
    """A data set that returns another example at each reading."""

    def __getitem__(self, number: int) -> Any:
        x, y = super().__getitem__(number)
        return x + noise_like(x), y


def scores_of_compiled_steps(problem: EqualWeights, train: Any) -> Tensor:
    """Return the scores of a linear network."""
    torch.manual_seed(0)
    student = nn.Linear(64, 4)
    outer_ids, outer_labels = digits(N, N)
    return metapl.attribute(
        student,
        train,
        (outer_ids / 16, outer_labels),
        optimizer=torch.optim.SGD(student.parameters(), 0.01),
        steps=STEPS,
        batch_size=10,
        problem=problem,
        compile=True,
        progress=False,
    ).scores


@pytest.mark.long
def test_compiled_steps_refuse_batches_that_are_others_when_they_are_read_again() -> None:
    """They may be where a problem or a data set makes them, and rows in memory are not."""
    in_memory = IDS / 16, LABELS
    by_rows = scores_of_compiled_steps(EqualWeights(), in_memory)
    by_data_set = scores_of_compiled_steps(EqualWeights(), TensorDataset(*in_memory))
    torch.testing.assert_close(by_rows, by_data_set)
    with pytest.raises(MetaplError, match="was another one when it was read again"):
        scores_of_compiled_steps(NoisyProblem(), in_memory)
    with pytest.raises(MetaplError, match="was another one when it was read again"):
        scores_of_compiled_steps(EqualWeights(), NoisyExamples(*in_memory))
