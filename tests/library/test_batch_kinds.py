"""Batches whose inputs are dicts or tuples, networks that return objects, and labels beside unlabelled inputs."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems_zoo import ANYWHERE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import metapl
from metapl import UDA, CrossEntropy, LossTrainer, MetaplError
from metapl.ablation import Altered
from metapl.data import feed, without_labels
from metapl.models import Logits

ROWS, CLASSES = 6, 3
MODES: list[Any] = [*ANYWHERE, Altered(alteration="permuted")]


class TwoInputs(nn.Module):
    """Token numbers and weights in, an object out, as networks of Hugging Face have it."""

    def __init__(self, how: str = "object") -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(7, 5), nn.Dropout(0.3), nn.Linear(5, CLASSES)
        self.how = how

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mean = (self.embed(input_ids) * attention_mask[..., None]).mean(1)
        logits = self.head(self.drop(torch.tanh(mean)))
        return {"object": SimpleNamespace(logits=logits), "dict": {"logits": logits}, "tensor": logits}[self.how]


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
    return torch.stack([ids.double(), torch.rand(rows, length, generator=draw, dtype=torch.float64)], -1)


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
    """The same examples in every kind."""
    draw, form = torch.Generator().manual_seed(1), KINDS[kind]
    labeled = form(joined(ROWS, draw)), torch.arange(ROWS) % CLASSES
    weak, strong = (form(joined(ROWS + 2, draw)) for _ in range(2))
    alone = (weak,) if isinstance(weak, tuple | list) else weak  # a pair is two views
    return {"labeled": labeled, "unlabeled": (weak, strong) if views else alone}


def trainer(kind: str, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    teacher, student = networks(kind)
    return metapl.BilevelTrainer(teacher, student, mode, **options)


def weights(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -------------------------------------------------------------------------------------------- steps and hypergradients


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("kind", ["dict", "tokenizer", "tuple", "list"])
@pytest.mark.parametrize("mode", MODES)
def test_the_kind_of_a_batch_changes_no_number(mode: Any, kind: str, views: bool) -> None:
    """Bit for bit those of one tensor, dropout masks included."""
    found = []
    for one in ("tensor", kind):
        teacher, student = networks(one)
        inner = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(2)
        result = metapl.hypergradient(teacher, student, **data(one, views), mode=mode, inner_optimizer=inner)
        found.append([*result.grads.values(), result.feedback, result.outer_loss, *result.student_params.values()])
    assert same(*found)
    assert mode == "none" or any(t.any() for t in found[0][:3])


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"recompute_teacher": True}])
@pytest.mark.parametrize("kind", ["dict", "tokenizer", "tuple"])
def test_a_step_takes_every_kind(kind: str, options: dict[str, Any]) -> None:
    ends = []
    for one in ("tensor", kind):
        bilevel = trainer(one, **options)
        torch.manual_seed(2)
        reports = [bilevel.step(**data(one, views=True)) for _ in range(3)]
        bilevel.teacher_step(**data(one, views=True))
        ends.append([*weights(bilevel.teacher, bilevel.student), *(r.feedback for r in reports)])
    assert same(*ends)


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


@pytest.mark.parametrize("kind", ["dict", "tokenizer", "tuple"])
def test_the_loss_trainer_takes_every_kind(kind: str) -> None:
    ends = []
    for one in ("tensor", kind):
        model, _ = networks(one)
        alone = LossTrainer(model, (CrossEntropy(), UDA()), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        torch.manual_seed(2)
        for _ in range(3):
            alone.step(**data(one, views=True))
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("how", ["object", "dict", "tensor"])
def test_logits_takes_what_the_network_returns(how: str) -> None:
    inputs = data("dict", views=False)["unlabeled"]
    adapted, _ = networks("dict", how)
    adapted.eval()
    network = adapted.network
    mean = (network.embed(inputs["input_ids"]) * inputs["attention_mask"][..., None]).mean(1)
    assert torch.equal(adapted(inputs), network.head(torch.tanh(mean)))


# --------------------------------------------------------------------------------------------- fit, evaluate, predict


class Texts(Dataset[dict[str, Tensor]]):
    """Examples as dicts, the label among the entries or not."""

    def __init__(self, rows: int, labels: bool = True) -> None:
        x = joined(rows, torch.Generator().manual_seed(3))
        self.columns = KINDS["dict"](x) | ({"labels": (x[..., 0].sum(1) % CLASSES).long()} if labels else {})
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def loader(labels: bool = True, rows: int = 20) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Texts(rows, labels), batch_size=6, shuffle=True, drop_last=True)


def test_a_fit_on_dicts_validates_resumes_evaluates_and_predicts(tmp_path: Path) -> None:
    """A run that was cut in two ends as one that was not, with the labels left out of the unlabelled source."""
    ends, columns = [], Texts(40).columns
    truth = columns["labels"]
    for parts in ((9,), (4, 9)):
        bilevel = trainer("dict")
        out = tmp_path / str(len(parts))
        for part, steps in enumerate(parts):
            torch.manual_seed(part)
            found = bilevel.fit(
                loader(),
                without_labels(loader(rows=30)),
                steps=steps,
                schedule="constant",
                validation=columns,
                validate_every=3,
                out=str(out),
                resume=part > 0,
                say=lambda _: None,
            )
        ends.append(weights(bilevel.student))
        assert found.validation_accuracy == bilevel.evaluate(columns).accuracy
        assert bilevel.evaluate(DataLoader(Texts(40), batch_size=7)).accuracy == found.validation_accuracy
        probabilities = bilevel.predict({name: t for name, t in columns.items() if name != "labels"})
        assert (probabilities.argmax(1) == truth).double().mean() == found.validation_accuracy
        assert torch.equal(bilevel.predict(columns), probabilities)  # labels are not inputs
    assert same(*ends)


@pytest.mark.parametrize("validation", [({"x": torch.eye(3)}, [0]), {"x": torch.eye(3)}, torch.eye(3)])
def test_data_without_labels_is_not_evaluated(validation: Any) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(MetaplError):
        LossTrainer(model, optimizer=torch.optim.SGD(model.parameters())).evaluate(validation)


def student(rows: int = 2500) -> tuple[LossTrainer, Tensor, Tensor]:
    """More rows than one pass takes, and parts that differ between train and eval mode."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    model[1].eval()  # frozen by its owner
    alone, x = LossTrainer(model, optimizer=torch.optim.SGD(model.parameters())), torch.randn(rows, 4)
    modes = [m.training for m in model.modules()]
    expected = model.eval()(x).softmax(1).detach()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return alone, x, expected


GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "float64": lambda x: x.double().numpy(),
    "read-only": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "backwards": lambda x: np.ascontiguousarray(x.numpy()[::-1])[::-1],
    "with labels": lambda x: (x, torch.zeros(len(x))),
    "list of batches": lambda x: list(x.split(70)),
    "iterator of arrays": lambda x: iter(np.array_split(x.numpy(), 7)),
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=33),
    "labelled loader": lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=33),
}


@pytest.mark.parametrize("given", GIVEN)
def test_predictions_are_the_students_probabilities(given: str) -> None:
    alone, x, expected = student()
    modes, rng = [m.training for m in alone.student.modules()], torch.get_rng_state()
    found = alone.predict(GIVEN[given](x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [m.training for m in alone.student.modules()] == modes
    assert not found.requires_grad
    assert "loader" in given or torch.equal(torch.get_rng_state(), rng)


def test_the_modes_come_back_when_a_prediction_fails() -> None:
    alone, _, _ = student(5)
    modes = [m.training for m in alone.student.modules()]
    with pytest.raises(RuntimeError):
        alone.predict(torch.zeros(5, 3))
    assert [m.training for m in alone.student.modules()] == modes


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.array(["a"]), "array of <U1"),
        (["a", "b"], "inputs to predict are of type str"),
        ([], "no batches to predict"),
    ],
)
def test_what_cannot_be_predicted_is_refused(given: Any, text: str) -> None:
    with pytest.raises(MetaplError):
        student(5)[0].predict(given)


# -------------------------------------------------------------------------------------------------- what is refused

X = torch.rand(8, 5, generator=torch.Generator().manual_seed(5))
Y = torch.arange(8) % CLASSES
REFUSED: dict[str, tuple[Any, str]] = {
    "labels": (
        (X, Y),
        r"shape \(8, 5\), float32.*shape \(8,\), int64.*If the second is labels.*without_labels\(loader\)",
    ),
    "labels in a list": ([X, Y], r"If the second is labels.*without_labels\(loader\)"),
    "one-hot labels": ((X, F.one_hot(Y)), r"shape \(8, 3\), int64.*If the second is labels"),
    "probabilities": ((X, F.one_hot(Y).float()), r"shape \(8, 3\), float32.*If the second is labels"),
    "numbers and labels": ((Y, Y), r"If the second is labels"),
    "views and labels": (((X, X), Y), r"If the second is labels.*without_labels\(loader\)"),
    "dict and labels": (({"x": X}, Y), r"a dict of 1 \('x'\).*If the second is labels"),
    "dicts of other names": (({"x": X}, {"z": X}), r"If the second is labels"),
    "dicts of other types": (({"x": X}, {"x": X.double()}), r"If the second is labels"),
    "dict with labels": ({"x": X, "labels": Y}, r"'x', 'labels'.*with labels under 'labels'; leave the labels out"),
    "three tensors": ((X, X, X), r"a tuple of 3"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("single", [False, True])
def test_labels_among_the_unlabelled_are_refused_and_nothing_moves(case: str, single: bool) -> None:
    unlabeled, text = REFUSED[case]
    torch.manual_seed(6)
    teacher, model = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)
    one: Any = metapl.BilevelTrainer(teacher, model, "forward")
    if single:
        one = LossTrainer(model, (CrossEntropy(), UDA()), optimizer=torch.optim.SGD(model.parameters()))
    before = weights(teacher, model)
    with pytest.raises(MetaplError):
        one.step((X, Y), unlabeled)
    with pytest.raises(MetaplError):
        one.fit([(X, Y)], [unlabeled], steps=2)
    assert same(before, weights(teacher, model))


@pytest.mark.parametrize(
    "labeled",
    [{"x": X}, {"labels": Y}, {"x": X, "labels": Y, "label": Y}, X, (X,), (X.numpy(), Y), "batch", {}],
)
def test_a_labelled_batch_without_labels_is_refused(labeled: Any) -> None:
    bilevel = metapl.BilevelTrainer(nn.Linear(5, CLASSES), nn.Linear(5, CLASSES))
    with pytest.raises(MetaplError):
        bilevel.step(labeled, X)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_network_that_returns_an_object_is_refused_with_the_adapter(who: str) -> None:
    both = dict(zip(("teacher", "student"), networks("dict"), strict=True))
    both[who] = nn.Module()
    both[who].add_module("network", TwoInputs().double())
    both[who].forward = lambda inputs: both[who].network(**inputs)
    before = weights(*both.values())
    with pytest.raises(MetaplError):
        metapl.BilevelTrainer(**both, mode="forward").step(**data("dict", views=False))
    assert same(before, weights(*both.values()))


CALLS: dict[str, Callable[[nn.Module, nn.Module, Any], Any]] = {
    "step": lambda teacher, student, data: metapl.BilevelTrainer(teacher, student, "forward").step(**data),
    "fit": lambda teacher, student, data: metapl.BilevelTrainer(teacher, student, "forward").fit(
        [data["labeled"]], [data["unlabeled"]], steps=1, progress=False
    ),
    "hypergradient": lambda teacher, student, data: metapl.hypergradient(
        teacher, student, **data, inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1)
    ),
    "teacher_step": lambda teacher, student, data: metapl.BilevelTrainer(teacher, student).teacher_step(**data),
    "evaluate": lambda teacher, student, data: metapl.BilevelTrainer(teacher, student).evaluate(data["labeled"]),
    "predict": lambda teacher, student, data: metapl.BilevelTrainer(teacher, student).predict(data["unlabeled"]),
}


@pytest.mark.parametrize("kind", ["dict", "tokenizer", "tuple"])
@pytest.mark.parametrize(
    ("call", "who"),
    [
        *((call, "student") for call in CALLS if call != "teacher_step"),
        ("step", "teacher"),
        ("teacher_step", "teacher"),
    ],
)
def test_a_network_that_takes_its_inputs_one_by_one_is_refused_with_the_adapter(call: str, who: str, kind: str) -> None:
    """As all of Hugging Face do; with the line that the message shows, it runs."""
    both = dict(zip(("teacher", "student"), networks("dict"), strict=True))
    both[who] = both[who].network
    before = weights(*both.values())
    role = "network" if call in ("evaluate", "predict") else who
    mend = rf"one by one, so wrap it: {role} = metapl\.models\.Logits\({role}\)"
    text = rf"the {role}, a TwoInputs, was given .* \(TypeError: .*{mend}"
    with pytest.raises(MetaplError):
        CALLS[call](**both, data=data(kind, views=False))
    assert same(before, weights(*both.values()))
    CALLS[call](**both | {who: Logits(both[who])}, data=data(kind, views=False))


def test_an_error_of_a_network_that_takes_a_dict_stays_as_it_is() -> None:
    class Own(nn.Linear):
        def forward(self, batch: Any) -> Tensor:
            return batch["x"].missing

    trainer = metapl.BilevelTrainer(nn.Linear(5, CLASSES), Own(5, CLASSES))
    with pytest.raises(AttributeError):
        trainer.step(({"x": X}, Y), {"x": X})


def test_logits_refuses_what_has_none() -> None:
    model = Logits(nn.LSTM(5, 3))
    with pytest.raises(MetaplError):
        model(X)


def test_padded_texts_of_two_lengths_with_names_in_any_order_are_two_views() -> None:
    draw, batch = torch.Generator().manual_seed(7), data("dict", views=True)
    batch["unlabeled"] = tuple(KINDS["dict"](joined(8, draw, length)) for length in (4, 6))
    strong = batch["unlabeled"][1]
    batch["unlabeled"] = (batch["unlabeled"][0], {name: strong[name] for name in reversed(strong)})
    assert trainer("dict").step(**batch).as_dict().keys() >= {"teacher_uda"}


# ----------------------------------------------------------------------------------------------------- without labels


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_without_labels_serves_and_resumes_as_the_source(kind: str) -> None:
    source: Any = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
    source = source if kind == "loader" else [(X[:3], Y[:3]), (X[3:], Y[3:])]
    bare, first, second = (feed(s, name="u", stop=20) for s in (source, without_labels(source), without_labels(source)))
    for _ in range(5):
        assert torch.equal(bare.next()[0], first.next())
    second.restore(first.state())
    for _ in range(5):
        assert torch.equal(first.next(), second.next())
    assert len(without_labels(source)) == len(source)


def test_views_with_a_label_beside_them_are_left_as_views() -> None:
    (views,) = without_labels([[[X, X + 1], Y]])
    bilevel = metapl.BilevelTrainer(nn.Linear(5, CLASSES), nn.Linear(5, CLASSES))
    assert "teacher_uda" in bilevel.step((X, Y), views).as_dict()


# ------------------------------------------------------------------------------------------------------ sparse batches


DENSE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).relu()
LABELS = torch.arange(6) % CLASSES


def csr(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return t.to_sparse_csr()


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {"coo": Tensor.to_sparse, "csr": csr}


def linear(mode: str, **options: Any) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    return metapl.BilevelTrainer(nn.Linear(4, CLASSES), nn.Linear(4, CLASSES), mode, **options)


def moved(trainer: metapl.BilevelTrainer, labeled: Tensor, unlabeled: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    trainer.step((labeled, LABELS), unlabeled)
    return [p.detach() for network in (trainer.teacher, trainer.student) if network for p in network.parameters()]


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("mode", ["reinforce", "difference", "unrolled"])
def test_sparse_inputs_give_the_numbers_of_dense_ones_where_they_can_be_used(mode: str, layout: str) -> None:
    sparse = SPARSE[layout](DENSE)
    torch.testing.assert_close(moved(linear(mode), sparse, sparse), moved(linear(mode), DENSE, DENSE))


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("mode", ["forward", "implicit", "reinforce_per_example"])
def test_sparse_inputs_are_refused_by_forward_mode(mode: str, layout: str) -> None:
    sparse, trainer = SPARSE[layout](DENSE), linear(mode)
    before = [p.detach().clone() for p in trainer.student.parameters()]
    with pytest.raises(MetaplError):
        moved(trainer, DENSE, sparse)
    assert all(map(torch.equal, before, trainer.student.parameters()))


@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_tensors_are_refused_where_rows_are_taken_or_labels_read(layout: str) -> None:
    sparse = SPARSE[layout](DENSE)
    of_many = SPARSE[layout](DENSE.repeat(200, 1))
    labels = LABELS.to_sparse()
    splits, plain = linear("reinforce", accumulate=2), linear("reinforce")
    refused: dict[str, Callable[[], Any]] = {
        "the unlabeled batch, which is split for accumulate=2, holds": lambda: moved(splits, DENSE, sparse),
        "the labeled batch, which is split for accumulate=2, holds": lambda: moved(splits, sparse, DENSE),
        "the labels are": lambda: plain.step((DENSE, labels), DENSE),
        "a batch that is read in parts holds": lambda: plain.predict(of_many),
        "validation holds": lambda: plain.fit(
            [(DENSE, LABELS)], [DENSE], steps=1, validation=(sparse, LABELS), progress=False
        ),
    }
    for text, call in refused.items():
        with pytest.raises(MetaplError):
            call()
    with pytest.raises(MetaplError):
        plain.evaluate((DENSE, labels))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_finite_in_a_sparse_tensor_and_nested_rows_are_refused() -> None:
    bad = DENSE.index_fill(0, torch.tensor([2]), torch.nan)
    for convert in SPARSE.values():
        with pytest.raises(MetaplError):
            moved(linear("reinforce"), DENSE, convert(bad))
    with pytest.raises(MetaplError):
        moved(linear("reinforce"), DENSE, torch.nested.nested_tensor([DENSE[:2], DENSE[:3]]))
