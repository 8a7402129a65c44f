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
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl.data import feed, without_labels
from metapl.models import Logits

ROWS = 6
CLASSES = 3
MODES: list[Any] = [*ANYWHERE]


class TwoInputs(nn.Module):
    """Token numbers and weights in, an object out, as networks of Hugging Face have it."""

    def __init__(self, returned: str = "object") -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, CLASSES)
        self.returned = returned

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mean = (self.embed(input_ids) * attention_mask[..., None]).mean(1)
        logits = self.head(self.drop(torch.tanh(mean)))
        if self.returned == "object":
            return SimpleNamespace(logits=logits)
        if self.returned == "dict":
            return {"logits": logits}
        return logits


class OneTensor(nn.Module):
    """The same network on one tensor that holds both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TwoInputs("tensor")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x[..., 0].long(), x[..., 1])
        return logits


def joined(rows: int, generator: torch.Generator, length: int = 4) -> Tensor:
    """Return token numbers and weights in one tensor, (rows, length, 2)."""
    ids = torch.randint(0, 7, (rows, length), generator=generator)
    token_weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return torch.stack([ids.double(), token_weights], -1)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"input_ids": x[..., 0].long(), "attention_mask": x[..., 1]},
    "tokenizer": lambda x: UserDict(input_ids=x[..., 0].long(), attention_mask=x[..., 1]),
    "tuple": lambda x: (x[..., 0].long(), x[..., 1]),
    "list": lambda x: [x[..., 0].long(), x[..., 1]],
}


def networks(kind: str, returned: str = "object") -> tuple[nn.Module, nn.Module]:
    def network() -> nn.Module:
        if kind == "tensor":
            return OneTensor().double()
        return Logits(TwoInputs(returned)).double()

    torch.manual_seed(0)
    return network(), network()


def data(kind: str, views: bool) -> dict[str, Any]:
    """Return the same examples in every kind."""
    generator = torch.Generator().manual_seed(1)
    form = KINDS[kind]
    labeled = form(joined(ROWS, generator)), torch.arange(ROWS) % CLASSES
    weak = form(joined(ROWS + 2, generator))
    strong = form(joined(ROWS + 2, generator))
    unlabeled = weak
    if views:
        unlabeled = (weak, strong)
    elif isinstance(weak, tuple | list):
        # By itself, a pair would be two views.
        unlabeled = (weak,)
    return {"outer": labeled, "inner": unlabeled}


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

    def hypergradient(kind: str) -> metapl.Hypergradient:
        teacher, student = networks(kind)
        inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(2)
        return metapl.hypergradient(
            teacher, student, **data(kind, views), mode=mode, inner_optimizer=inner
        )

    def tensors(result: metapl.Hypergradient) -> list[Tensor]:
        weights_after = result.student_params.values()
        return [*result.grads.values(), result.feedback, result.outer_loss, *weights_after]

    of_tensor = hypergradient("tensor")
    assert same(tensors(of_tensor), tensors(hypergradient(kind)))
    assert mode == "none" or any(g.any() for g in of_tensor.grads.values())


@pytest.mark.parametrize("key", ["labels", "label"])
def test_labels_may_be_among_the_entries_of_a_dict(key: str) -> None:
    batches = data("dict", views=False)
    inputs, labels = batches["outer"]

    def weights_after_step(outer: Any) -> list[Tensor]:
        bilevel = trainer("dict")
        torch.manual_seed(2)
        bilevel.step(outer, batches["inner"])
        return weights(bilevel.teacher, bilevel.student)

    assert same(weights_after_step((inputs, labels)), weights_after_step({**inputs, key: labels}))


@pytest.mark.parametrize("returned", ["object", "dict", "tensor"])
def test_logits_takes_what_the_network_returns(returned: str) -> None:
    inputs = data("dict", views=False)["inner"]
    adapted, _ = networks("dict", returned)
    adapted.eval()
    network = adapted.network
    mean = (network.embed(inputs["input_ids"]) * inputs["attention_mask"][..., None]).mean(1)
    assert torch.equal(adapted(inputs), network.head(torch.tanh(mean)))


X = torch.rand(8, 5, generator=torch.Generator().manual_seed(5))
Y = torch.arange(8) % CLASSES


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_without_labels_serves_and_resumes_as_the_source(kind: str) -> None:
    source: Any = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    if kind == "loader":
        source = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
    with_labels = feed(source, name="u", stop=20)
    first = feed(without_labels(source), name="u", stop=20)
    second = feed(without_labels(source), name="u", stop=20)
    for _ in range(5):
        inputs, _ = with_labels.next()
        assert torch.equal(inputs, first.next())
    second.restore(first.state())
    for _ in range(5):
        assert torch.equal(first.next(), second.next())
    assert len(without_labels(source)) == len(source)


class Recurrent(nn.Module):
    """A prediction of sequences, returned beside the hidden state."""

    def __init__(self, form: str = "tuple") -> None:
        super().__init__()
        self.cells = nn.LSTM(2, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)
        self.form = form

    def forward(self, x: Any) -> Any:
        if self.form == "one dict":
            x = x["sequence"]
        _, hidden = self.cells(x)
        outputs = self.head(hidden[0][-1])
        if self.form == "named":
            return SimpleNamespace(hidden=hidden, logits=outputs)
        if self.form == "later":
            # The states come first, which are no tensor.
            return hidden, outputs
        if self.form == "list":
            return [outputs, hidden]
        return outputs, hidden


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
    student = Recurrent(form).double()
    labels = torch.arange(ROWS) % CLASSES
    table = metapl.problems.Table(torch.linspace(-1, 1, ROWS, dtype=torch.float64))
    inner = torch.optim.SGD(student.parameters(), lr=0.3)
    outer_batch = (sequences(form), labels)
    inner_batch = (sequences(form), labels, torch.arange(ROWS))

    def hypergradient(network: nn.Module, verify: bool = False) -> metapl.Hypergradient:
        return metapl.hypergradient(
            table,
            network,
            outer=outer_batch,
            inner=inner_batch,
            problem=OfSequences(),
            inner_optimizer=inner,
            verify=verify,
        )

    with pytest.raises(metapl.MetaplError) as refused:
        hypergradient(student)
    call = re.search(r"metapl\.models\.Logits\(student\)", str(refused.value))
    assert call is not None
    wrapped = eval(call[0], {"metapl": metapl, "student": student})
    result = hypergradient(wrapped, verify=True)
    expected = hypergradient(FirstOnly(student))
    assert same(
        [result.feedback, *result.student_params.values()],
        [expected.feedback, *expected.student_params.values()],
    )
    assert result.feedback.abs().min() > 0
    trainer = metapl.BilevelTrainer(table, wrapped, problem=OfSequences(), inner_optimizer=inner)
    trainer.step(outer=outer_batch, inner=inner_batch)
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

    a = torch.ones(2, 3)
    b = torch.full((2, 3), 2.0)
    # One argument is required, which is none of the keys.
    assert torch.equal(Logits(Optional())({"a": a, "b": b}), a)
    assert torch.equal(Logits(Optional())({"x": a, "hidden": b}), a + b)
    assert torch.equal(Logits(Optional())((a, b)), a + b)
    assert torch.equal(Logits(Keywords())({"a": a, "b": b}), a + b)
    assert torch.equal(Logits(One())((a, b)), a + b)
    assert torch.equal(copy.deepcopy(Logits(One()))((a, b)), a + b)


class Optional(TwoInputs):
    def forward(self, input_ids: Any = None, attention_mask: Any = None) -> Any:
        return super().forward(input_ids, attention_mask)


class Keywords(TwoInputs):
    def forward(self, **inputs: Tensor) -> Any:
        return super().forward(**inputs)


@pytest.mark.parametrize("network", [TwoInputs, Optional, Keywords])
@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_a_network_of_several_arguments_is_told_of_logits(
    network: type[TwoInputs], kind: str
) -> None:
    if network is Keywords and kind == "tuple":
        pytest.skip("it takes no positions")
    batches = data(kind, views=False)
    labeled = batches["outer"]
    student = network().double()
    wrapped = Logits(network()).double()
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    problem = metapl.problems.EqualWeights()
    of_attribute: Any = {"optimizer": sgd, "steps": 2, "batch_size": 3, "progress": False}
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: metapl.BilevelTrainer(wrapped, student).step(**batches),
        "compiled": lambda: metapl.BilevelTrainer(wrapped, student, compile=True).step(**batches),
        "teacher": lambda: metapl.BilevelTrainer(student, wrapped).step(**batches),
        "hypergradient": lambda: metapl.hypergradient(
            None, student, outer=labeled, inner=labeled, problem=problem, inner_optimizer=sgd
        ),
        "attribute": lambda: metapl.attribute(student, labeled, labeled, **of_attribute),
        "losses": lambda: metapl.LossTrainer(student, optimizer=sgd).step(labeled),
        "evaluate": lambda: metapl.LossTrainer(student, optimizer=sgd).evaluate(labeled),
        "predict": lambda: metapl.metrics.predict_logits(student, [labeled]),
    }
    for name, call in calls.items():
        with pytest.raises(metapl.MetaplError, match="as one argument") as refused:
            call()
        assert f"metapl.models.Logits({network.__name__}(...))" in str(refused.value), name
    # What is proposed is right.
    metapl.BilevelTrainer(wrapped, Logits(student)).step(**batches)


def test_an_error_of_a_networks_own_stays_as_it_is() -> None:
    class Broken(nn.Linear):
        def forward(self, pair: Any) -> Tensor:
            raise TypeError("of its own")

    batches = data("dict", views=False)
    with pytest.raises(TypeError, match="of its own"):
        metapl.BilevelTrainer(networks("dict")[0], Broken(4, CLASSES)).step(**batches)


# ------------------------------------------------------------- columns and inputs beside the first


class Scaled(nn.Module):
    """A network of two inputs, of which the second may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        logits: Tensor = self.net(x)
        return logits if scale is None else logits * scale


class ScaledAlways(Scaled):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, scale)


def step_of(network: nn.Module, outer: Any, inner: Any) -> Any:
    trainer = metapl.BilevelTrainer(copy.deepcopy(network), network, "forward", verify=False)
    return trainer.step(outer, inner)


X = torch.arange(32.0).reshape(8, 4) / 32
SCALE = torch.arange(32.0).flip(0).reshape(8, 4)[:, :1] / 8
LABELS = torch.arange(8) % 3


@pytest.mark.parametrize("is_wrapped", [True, False])
@pytest.mark.parametrize("kind", [Scaled, ScaledAlways])
def test_a_column_that_the_forward_does_not_take_is_named(
    kind: type[nn.Module], *, is_wrapped: bool
) -> None:
    torch.manual_seed(0)
    network = metapl.models.Logits(kind()) if is_wrapped else kind()
    batch = {"x": X, "scale": SCALE, "row": torch.arange(8)}
    words = "the batch has row" if is_wrapped else "forward takes x, scale.*a batch of these alone"
    with pytest.raises(metapl.MetaplError, match=words):
        step_of(network, {**batch, "labels": LABELS}, batch)
    # The way out.
    del batch["row"]
    step_of(metapl.models.Logits(kind()), {**batch, "labels": LABELS}, batch)


@pytest.mark.parametrize("kind", [Scaled, ScaledAlways])
def test_a_pair_of_inputs_is_not_read_as_two_views(kind: type[nn.Module]) -> None:
    """The second input has the width of the first, so that it could be a view of it."""
    torch.manual_seed(0)
    network = metapl.models.Logits(kind())
    extra = SCALE.expand(8, 4)[:, :3]
    outer = (X[:, :4], extra), LABELS
    with pytest.raises(metapl.MetaplError, match="two views of one input"):
        step_of(network, outer, (X, extra))
    report = step_of(network, outer, ((X, extra),))
    logits = network((X, extra)).shape
    assert report.student_outputs.shape == report.feedback.shape == logits


def test_a_forward_of_two_inputs_that_gets_one_says_how_two_are_given() -> None:
    network = ScaledAlways()
    with pytest.raises(metapl.MetaplError, match=r"\(\(x, extra\),\) without labels"):
        step_of(network, (X, LABELS), (X, X.flip(0)))


# ------------------------------------------------------- tensors that no pass keeps for a gradient


def of_inference(seed: int) -> tuple[Tensor, Tensor]:
    """Return a batch as features of a frozen network are made."""
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(8, 4, generator=generator) * 2, LABELS.clone()


class Held(metapl.BilevelProblem):
    """A problem without a teacher that may hold a tensor."""

    has_teacher = False

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = F.cross_entropy(outputs * self.held, batch[1], reduction="none")
        return losses * signal.value

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Any:
        return metapl.Signal(torch.ones(len(batch[1])))


@pytest.mark.parametrize("where", ["Lookahead", "problem", "DataLoader"])
def test_a_tensor_of_inference_mode_is_said_wherever_it_comes_from(where: str) -> None:
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    plain_batch = tuple(t.clone() for t in of_inference(0))
    with torch.inference_mode():
        held = torch.ones(3) * 2

    def call(*, cloned: bool) -> Any:
        def taken(number: int) -> Any:
            batch = of_inference(number)
            return tuple(t.clone() for t in batch) if cloned else batch

        if where == "DataLoader":
            loader = DataLoader(range(16), batch_size=8, collate_fn=lambda rows: taken(rows[0]))
            return metapl.attribute(
                student,
                loader,
                plain_batch,
                optimizer=optimizer,
                steps=2,
                batch_size=8,
                progress=False,
            )
        inner: Any = metapl.Lookahead(taken, steps=2)
        factor = torch.ones(3)
        if where == "problem":
            inner = metapl.Lookahead([plain_batch] * 2)
            factor = held.clone() if cloned else held
        return metapl.hypergradient(
            None,
            student,
            outer=plain_batch,
            inner=inner,
            problem=Held(factor),
            wrt="lr",
            inner_optimizer=optimizer,
        )

    weight = student.weight.clone()
    with pytest.raises(metapl.MetaplError, match=r"torch.inference_mode\(\) enters a pass"):
        call(cloned=False)
    assert torch.equal(student.weight, weight)
    call(cloned=True)


class Moving(nn.Module):
    """A teacher that reads a buffer, which it or the signal moves in place."""

    def __init__(self, *, reads_copy: bool) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.reads_copy = reads_copy
        self.register_buffer("level", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        self.level.mul_(0.9).add_(0.1 * x.mean())
        return logits * (self.level.clone() if self.reads_copy else self.level)


@pytest.mark.parametrize("verify", [True, False])
def test_a_buffer_that_is_moved_in_place_after_it_was_read_is_said(*, verify: bool) -> None:
    class Soft(Held):
        has_teacher = True

        def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Any:
            return metapl.Signal(teacher(batch[0]).softmax(-1))

        def inner_loss(
            self, outputs: Tensor, signal: Any, batch: Any, params: Any = None
        ) -> Tensor:
            return -(signal.value * outputs.log_softmax(-1)).sum(-1)

    def trainer(*, reads_copy: bool) -> Any:
        torch.manual_seed(0)
        teacher = Moving(reads_copy=reads_copy)
        return metapl.BilevelTrainer(
            teacher,
            nn.Linear(4, 3),
            "forward",
            problem=Soft(torch.ones(3)),
            teacher_losses=(),
            lookahead=3,
            verify=verify,
        )

    batches = metapl.Lookahead([tuple(t.clone() for t in of_inference(k)) for k in range(3)])
    refused = trainer(reads_copy=False)
    with pytest.raises(metapl.MetaplError, match=r"changed in place after it.*level.clone\(\)"):
        refused.step(batches[0], batches)
    assert torch.equal(refused.teacher.level, torch.ones(3))
    trainer(reads_copy=True).step(batches[0], batches)
