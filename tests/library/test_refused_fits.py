"""What ``fit``, ``predict``, ``evaluate`` and ``Logits`` refuse, with what to give instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import MetaplError
from metapl.models import Logits

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def trainer(model: nn.Module, over: nn.Module | None = None) -> metapl.LossTrainer:
    return metapl.LossTrainer(model, optimizer=torch.optim.SGD((over or model).parameters(), lr=0.1))


def fit(one: Any, **options: Any) -> Any:
    return one.fit(**{"labeled": [(X, Y)], "steps": 2, "progress": False, **options})


# ------------------------------------------------------------------------------------------- nothing would be learned


def test_a_fit_that_would_train_nothing_is_refused_at_its_first_step() -> None:
    with pytest.raises(
        MetaplError, match=r"step 1: the network's loss has no gradient.*outputs are detached"
    ) as caught:
        fit(trainer(Detached(4, 3)))
    assert "checkpoint" not in str(caught.value), "nothing is kept, and nothing was trained that could be lost"
    with torch.no_grad():
        learning = nn.Linear(4, 3)
        before = learning.weight.clone()
        fit(trainer(learning))
        assert not torch.equal(learning.weight, before), "a step takes gradients wherever it is called"
    with pytest.raises(MetaplError, match=r"optimizer holds none of the network's parameters"):
        fit(trainer(nn.Linear(4, 3), over=nn.Linear(4, 3)))
    with pytest.raises(MetaplError, match=r"all parameters of the network have requires_grad=False"):
        fit(trainer(nn.Linear(4, 3).requires_grad_(False)))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_neither_teacher_nor_student_is_trained_on_a_detached_loss(role: str) -> None:
    networks = {"teacher": nn.Linear(4, 3), "student": nn.Linear(4, 3), role: Detached(4, 3)}
    one = metapl.BilevelTrainer(**networks, mode="none")
    with pytest.raises(MetaplError, match=f"the {role}'s loss has no gradient"):
        one.fit([(X, Y)], [X], steps=2, progress=False)
    if role == "teacher":
        with pytest.raises(MetaplError, match="the teacher's loss has no gradient"):
            one.fit([(X, Y)], [X], steps=2, wait=1, progress=False)


def test_part_of_a_network_may_be_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    before = model[0].weight.clone()
    fit(trainer(model, over=model[1]))
    assert torch.equal(model[0].weight, before)


# -------------------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize("kind", [ConnectionRefusedError, EOFError])
def test_a_callbacks_own_broken_connection_is_not_a_workers(kind: type[Exception]) -> None:
    def send(step: int, row: Any, of: Any) -> None:
        raise kind("the tracking server is away")

    with pytest.raises(kind, match="the tracking server is away"):
        fit(trainer(nn.Linear(4, 3)), num_workers=2, log_every=1, callbacks=[send])


# -------------------------------------------------------------------------------------------- before the first step


FITS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 2.5}, r"steps=2\.5\): expected a whole number"),
    ({"steps": "6"}, r"steps='6'\): expected a whole number"),
    ({"steps": True}, r"steps=True\): expected a whole number"),
    ({"log_every": 1.5}, r"log_every=1\.5\): expected a whole number"),
    ({"exact_every": 1.5}, r"exact_every=1\.5\): expected a whole number"),
    ({"exact_every": 0}, r"exact_every=0\): expected a whole number of 1 or more or None"),
    ({"num_workers": 257}, r"num_workers=257\): expected a whole number from 0 to 256"),
    ({"warmup": "2"}, r"warmup='2'\): expected a whole number"),
    ({"ema_decay": float("nan")}, r"ema_decay=nan\): expected a finite number in \[0, 1\) or None"),
    ({"decay_every": 0, "schedule": "exponential"}, r"decay_every=0\): expected a number above 0 or None"),
    ({"select": None}, r"select=None\): expected True or False"),
    ({"phase": "a\0b"}, r"phase='a\\x00b': expected a plain name"),
    ({"phase": "../../esc"}, r"expected a plain name"),
    ({"phase": ".."}, r"expected a plain name"),
    ({"out": ""}, r"out='' was given; expected the path of a folder"),
    # Of a wait, some step of the student is left, and its warm-up takes no longer than that.
    *(({"steps": 5, "wait": wait}, f"wait={wait}: expected 0 or more, and fewer than steps=5") for wait in (-1, 5, 6)),
    ({"steps": 5, "wait": 3, "warmup": 3}, "warmup=3: expected between 0 and steps=5 - wait=3"),
    ({"steps": 5, "wait": 2}, r"wait=2 .*LossTrainer has no teacher"),
    ({"labeled": None}, "labeled is None; expected a source"),
    ({"validation": (X[:0], Y[:0])}, "at least one example"),
    ({"validation": (X, Y[:3])}, r"a tensor of shape \(3,\).* for 8 examples"),
    ({"validation": (X, Y + 1)}, r"the labels of validation run from 1 to 3; of 3 classes, expected 0 to 2"),
    ({"validation": (X, Y - 1)}, r"run from -1 to 1"),
    ({"validation": [(X, Y + 1)]}, r"run from 1 to 3"),
    ({"validation": []}, "validation has no batches"),
    ({"validation": iter([(X, Y)])}, r"validation is of type list_iterator, which can be read only once.*DataLoader"),
    ({"validation": 5}, "validation is of type int; expected tensors, or an iterable of batches"),
    (
        {"validation": X},
        r"^validation is a tensor of shape \(8, 4\).*expected a pair",
    ),
    ({"validation": (X,)}, r"^validation is a tuple of 1 \(Tensor\).*expected a pair"),
    ({"validation": (X, Y.tolist())}, r"^validation is a tuple of 2 \(Tensor, list\).*expected a pair"),
    ({"validation": {"x": X, "y": Y}}, r"^validation is a dict with the keys 'x', 'y'; expected a pair"),
    ({"validation": DataLoader(X, 4)}, r"^validation is of type DataLoader.*a batch of it is a tensor"),  # type: ignore[arg-type]
    ({"validation": TensorDataset(X, Y)}, r"^validation is a data set.*DataLoader\(validation, 256\)"),
    ({"validation": (X, Y.double())}, r"^the labels of validation are .* float64.*labels\.long\(\)"),
    ({"validation": (X, Y), "truth": (X, Y + 1), "unlabeled": [X]}, r"the labels of truth run from 1 to 3"),
]


@pytest.mark.parametrize(("options", "text"), FITS)
def test_a_fit_is_refused_before_its_first_step_and_leaves_no_file(
    options: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    one: Any = metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3))
    if "unlabeled" not in options:
        one = trainer(nn.Linear(4, 3))
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(MetaplError, match=text):
        fit(one, **{"out": "run", **options})
    assert one.steps_done == 0
    assert same(one.state_dict(), before)
    assert [*tmp_path.rglob("*")] == [tmp_path / "here"]


def test_the_look_at_validation_changes_nothing() -> None:
    def weights(validation: Any) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        fit(trainer(model), validation=validation, validate_every=2)
        return model[0].weight.detach()

    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    assert torch.equal(weights(None), weights(loader))


class ByPosition:
    """Batches without ``__iter__``, as metapl's own are."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= 2:
            raise IndexError
        return X[4 * index :][:4], Y[4 * index :][:4]


def test_batches_by_position_are_data() -> None:
    one = trainer(nn.Linear(4, 3))
    assert fit(one, validation=ByPosition()).validation_accuracy == one.evaluate((X, Y)).accuracy
    assert one.evaluate(ByPosition()).n == 8


def test_arrays_of_any_byte_order_and_width_are_predicted() -> None:
    one = trainer(nn.Linear(4, 3))
    for kind in (">f4", ">f8", "<f8"):
        assert torch.equal(one.predict(X.numpy().astype(kind)), one.predict(X))


# ---------------------------------------------------------------------------------- predictions, evaluations, logits


class Returns(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.change(x)}


def predicted(data: Any) -> object:
    return trainer(nn.Linear(4, 3)).predict(data)


def evaluated(data: Any) -> object:
    return trainer(nn.Linear(4, 3)).evaluate(data)


def diverged() -> nn.Module:
    model = nn.Linear(4, 3)
    nn.init.constant_(model.bias, float("nan"))
    return model


OF_ANOTHER_TYPE = {
    "int": X.int(),
    "bool": X > 0,
    "double": X.double(),
    "int array": X.int().numpy(),
    "bool array": (X > 0).numpy(),
    "uint16 array": X.numpy().astype(np.uint16),
}
OTHER_TYPE, NO_LOGITS = (
    r"inputs of \w+: its weights are float32.*x\.to\(torch\.float32",
    r"expected floating-point logits \(ex",
)
CALLS: dict[str, tuple[Callable[[], object], str]] = {
    **{f"predict {x!r}": (partial(predicted, x), r"\w") for x in (None, 5, {}, (), [])},
    **{f"evaluate {x!r}": (partial(evaluated, x), r"\w") for x in (None, 5, {}, (), [])},
    **{f"predict {kind}": (partial(predicted, x), OTHER_TYPE) for kind, x in OF_ANOTHER_TYPE.items()},
    **{f"evaluate {kind}": (partial(evaluated, (OF_ANOTHER_TYPE[kind], Y)), OTHER_TYPE) for kind in ("int", "double")},
    "evaluate bool": (partial(evaluated, (X > 0, Y)), OTHER_TYPE),
    "evaluate without labels": (partial(evaluated, X), r"^the labeled data is a tensor of shape \(8, 4\)"),
    "diverged": (lambda: trainer(diverged()).predict(X), r"logits of 8 of 8 examples are not finite.*diverged"),
    "logits of one axis": (lambda: Logits(Returns(lambda x: x[:, 0]))(X), NO_LOGITS),
    "whole logits": (lambda: Logits(Returns(lambda x: x.long()))(X), NO_LOGITS),
    "logits of fewer rows": (lambda: Logits(Returns(lambda x: x[:3]))(X), NO_LOGITS),
    "logits of three axes": (lambda: Logits(Returns(lambda x: x[None]))(X), NO_LOGITS),
    "logits of nothing": (lambda: Logits(None), r"of type NoneType; expected a torch\.nn\.Module"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", CALLS)
def test_what_cannot_be_predicted_is_refused(what: str) -> None:
    call, text = CALLS[what]
    with pytest.raises(MetaplError, match=text):
        call()


def test_logits_are_found_in_a_dict() -> None:
    assert Logits(Returns(lambda x: x))(X).shape == X.shape


def test_logits_of_a_language_model_have_an_axis_of_tokens() -> None:
    assert Logits(Returns(lambda x: x[:, None]))(X).shape == (len(X), 1, *X.shape[1:])
