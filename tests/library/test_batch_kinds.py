"""Batches whose inputs are dicts or tuples, and networks that return objects.

Labels stand beside unlabelled inputs.
"""

from __future__ import annotations

import copy
import re
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems_zoo import ANYWHERE, product, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl.data import feed, without_labels
from metapl.models import Logits

ROWS, CLASSES = 6, 3
MODES: list[Any] = [*ANYWHERE]


class TwoInputs(nn.Module):
    """Token numbers and weights in, an object out, as networks of Hugging Face have it."""

    def __init__(self, how: str = "object") -> None:
        super().__init__()
        self.embed, self.drop, self.head = (
            nn.Embedding(7, 5),
            nn.Dropout(0.3),
            nn.Linear(5, CLASSES),
        )
        self.how = how

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mean = (self.embed(input_ids) * attention_mask[..., None]).mean(1)
        logits = self.head(self.drop(torch.tanh(mean)))
        return {
            "object": SimpleNamespace(logits=logits),
            "dict": {"logits": logits},
            "tensor": logits,
        }[self.how]


class OneTensor(nn.Module):
    """The same network on one tensor that holds both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TwoInputs("tensor")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x[..., 0].long(), x[..., 1])
        return logits


def joined(rows: int, draw: torch.Generator, length: int = 4) -> Tensor:
    ids = torch.randint(0, 7, (rows, length), generator=draw)
    return torch.stack(
        [ids.double(), torch.rand(rows, length, generator=draw, dtype=torch.float64)], -1
    )


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"input_ids": x[..., 0].long(), "attention_mask": x[..., 1]},
    "tokenizer": lambda x: UserDict(input_ids=x[..., 0].long(), attention_mask=x[..., 1]),
    "tuple": lambda x: (x[..., 0].long(), x[..., 1]),
    "list": lambda x: [x[..., 0].long(), x[..., 1]],
}


def networks(kind: str, how: str = "object") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    build = OneTensor if kind == "tensor" else lambda: Logits(TwoInputs(how))
    return build().double(), build().double()


def data(kind: str, views: bool) -> dict[str, Any]:
    """Return the same examples in every kind."""
    draw, form = torch.Generator().manual_seed(1), KINDS[kind]
    labeled = form(joined(ROWS, draw)), torch.arange(ROWS) % CLASSES
    weak, strong = (form(joined(ROWS + 2, draw)) for _ in range(2))
    alone = (weak,) if isinstance(weak, tuple | list) else weak  # a pair is two views
    return {"labeled": labeled, "unlabeled": (weak, strong) if views else alone}


def trainer(kind: str, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    teacher, student = networks(kind)
    return metapl.BilevelTrainer(teacher, student, mode, verify=False, **options)


def weights(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


@pytest.mark.parametrize(
    ("mode", "kind", "views"),
    product(
        MODES,
        ("dict", "tokenizer", "tuple", "list"),
        (False, True),
        usual=["forward", "dict", True],
    ),
)
def test_the_kind_of_a_batch_changes_no_number(mode: Any, kind: str, views: bool) -> None:
    """Bit for bit those of one tensor, dropout masks included."""
    found = []
    for one in ("tensor", kind):
        teacher, student = networks(one)
        inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(2)
        result = metapl.hypergradient(
            teacher, student, **data(one, views), mode=mode, inner_optimizer=inner
        )
        found.append(
            [
                *result.grads.values(),
                result.feedback,
                result.outer_loss,
                *result.student_params.values(),
            ]
        )
    assert same(*found)
    assert mode == "none" or any(t.any() for t in found[0][:3])


@pytest.mark.parametrize("key", ["labels", "label"])
def test_labels_may_be_among_the_entries_of_a_dict(key: str) -> None:
    ends = []
    for inside in (False, True):
        bilevel, batch = trainer("dict"), data("dict", views=False)
        inputs, labels = batch["labeled"]
        torch.manual_seed(2)
        bilevel.step({**inputs, key: labels} if inside else (inputs, labels), batch["unlabeled"])
        ends.append(weights(bilevel.teacher, bilevel.student))
    assert same(*ends)


@pytest.mark.parametrize("how", ["object", "dict", "tensor"])
def test_logits_takes_what_the_network_returns(how: str) -> None:
    inputs = data("dict", views=False)["unlabeled"]
    adapted, _ = networks("dict", how)
    adapted.eval()
    network = adapted.network
    mean = (network.embed(inputs["input_ids"]) * inputs["attention_mask"][..., None]).mean(1)
    assert torch.equal(adapted(inputs), network.head(torch.tanh(mean)))


X = torch.rand(8, 5, generator=torch.Generator().manual_seed(5))
Y = torch.arange(8) % CLASSES


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_without_labels_serves_and_resumes_as_the_source(kind: str) -> None:
    source: Any = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
    source = source if kind == "loader" else [(X[:3], Y[:3]), (X[3:], Y[3:])]
    bare, first, second = (
        feed(s, name="u", stop=20) for s in (source, without_labels(source), without_labels(source))
    )
    for _ in range(5):
        assert torch.equal(bare.next()[0], first.next())
    second.restore(first.state())
    for _ in range(5):
        assert torch.equal(first.next(), second.next())
    assert len(without_labels(source)) == len(source)


class Recurrent(nn.Module):
    """A prediction of sequences, returned beside the hidden state."""

    def __init__(self, form: str = "tuple") -> None:
        super().__init__()
        self.cells, self.head, self.form = (
            nn.LSTM(2, 5, batch_first=True),
            nn.Linear(5, CLASSES),
            form,
        )

    def forward(self, x: Any) -> Any:
        x = x["sequence"] if self.form == "one dict" else x
        _, hidden = self.cells(x)
        outputs = self.head(hidden[0][-1])
        if self.form == "named":
            return SimpleNamespace(hidden=hidden, logits=outputs)
        if self.form == "later":  # the states first, which are no tensor
            return hidden, outputs
        return [outputs, hidden] if self.form == "list" else (outputs, hidden)


class FirstOnly(nn.Module):
    """What the same network predicts, written out."""

    def __init__(self, network: Recurrent) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any) -> Tensor:
        _, hidden = self.network.cells(x["sequence"] if self.network.form == "one dict" else x)
        outputs: Tensor = self.network.head(hidden[0][-1])
        return outputs


class OfSequences(metapl.problems.ExampleWeights):
    def student_input(self, batch: Any) -> Any:
        return batch[0]


def sequences(form: str) -> Any:
    x = torch.randn(ROWS, 4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if form == "packed":
        return nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor([4, 3, 3, 2, 1, 1]), batch_first=True
        )
    return {"sequence": x} if form == "one dict" else x


@pytest.mark.parametrize("form", ["tuple", "list", "named", "later", "packed", "one dict"])
def test_a_network_that_returns_its_hidden_state_too(form: str) -> None:
    """The refusal of the plain network names a call.

    With it the numbers are those of the first tensor alone.
    """
    torch.manual_seed(0)
    student, labels = Recurrent(form).double(), torch.arange(ROWS) % CLASSES
    table = metapl.problems.Table(torch.linspace(-1, 1, ROWS, dtype=torch.float64))
    inner = torch.optim.SGD(student.parameters(), lr=0.3)
    given: dict[str, Any] = {
        "inner": (sequences(form), labels, torch.arange(ROWS)),
        "problem": OfSequences(),
    }
    given |= {"outer": (sequences(form), labels), "inner_optimizer": inner}
    with pytest.raises(metapl.MetaplError) as refused:
        metapl.hypergradient(table, student, **given)
    call = re.search(r"metapl\.models\.Logits\(student\)", str(refused.value))
    assert call is not None
    wrapped = eval(call[0], {"metapl": metapl, "student": student})
    found = metapl.hypergradient(table, wrapped, **given, verify=True)
    expected = metapl.hypergradient(table, FirstOnly(student), **given)
    assert same(
        [found.feedback, *found.student_params.values()],
        [expected.feedback, *expected.student_params.values()],
    )
    assert found.feedback.abs().min() > 0
    trainer = metapl.BilevelTrainer(table, wrapped, problem=OfSequences(), inner_optimizer=inner)
    trainer.step(outer=given["outer"], inner=given["inner"])
    assert same([*trainer.student.parameters()], [*expected.student_params.values()])


@pytest.mark.parametrize(
    ("outputs", "word"),
    [
        ({"out": torch.zeros(2, 3)}, "return one from the student's forward"),
        ((), "return one from the student's forward"),
        (torch.zeros(2, 3, dtype=torch.complex64), "torch.view_as_real"),
    ],
    ids=["a dict without logits", "nothing", "complex"],
)
def test_outputs_that_are_refused_in_other_words(outputs: Any, word: str) -> None:
    with pytest.raises(metapl.MetaplError, match="the student returned") as refused:
        metapl.execution.checks.logits(outputs, "student")
    assert word in str(refused.value)
    assert "Logits" not in str(refused.value)


def test_the_arguments_of_a_network_decide_how_a_batch_goes_in() -> None:
    class Optional(nn.Module):
        def forward(self, x: Any, hidden: Any = None) -> Tensor:
            return x["a"] if hidden is None and isinstance(x, dict) else x + hidden

    class Keywords(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return inputs["a"] + inputs["b"]

    class One(nn.Module):
        def forward(self, pair: Any) -> Tensor:
            return pair[0] + pair[1]

    a, b = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert torch.equal(
        Logits(Optional())({"a": a, "b": b}), a
    )  # one required argument, which is none of the keys
    assert torch.equal(Logits(Optional())({"x": a, "hidden": b}), a + b)
    assert torch.equal(Logits(Optional())((a, b)), a + b)
    assert torch.equal(Logits(Keywords())({"a": a, "b": b}), a + b)
    assert torch.equal(Logits(One())((a, b)), a + b)
    assert torch.equal(copy.deepcopy(Logits(One()))((a, b)), a + b)
