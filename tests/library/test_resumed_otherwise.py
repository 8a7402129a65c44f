"""A fit that is resumed notices what is not as it was."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchopt
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from metapl import BilevelTrainer, CrossEntropy, LossTrainer, MetaplError, PseudoLabels
from metapl.data.identity import source_record
from metapl.runs import checkpoint
from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.fingerprints import as_values


def data(rows: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return TensorDataset(x, (x[:, 0] > 0).long())


def fitted(out: Path, resume: bool = True, allow: Any = (), steps: int = 6, **changed: Any) -> nn.Module:
    """A fit of six steps, or one that goes on with it, of which something may be otherwise."""
    how = {
        "lr": 0.1,
        "momentum": 0.0,
        "dtype": torch.float32,
        "rows": 24,
        "data_seed": 0,
        "batch": 8,
        "shuffle": True,
        "validation": data(10, 1).tensors,
        "smoothing": 0.0,
        "clip": None,
        **changed,
    }
    torch.manual_seed(0)
    model = nn.Linear(4, 2).to(how["dtype"])
    optimizer = torch.optim.SGD(model.parameters(), lr=how["lr"], momentum=how["momentum"])
    trainer = LossTrainer(model, (CrossEntropy(how["smoothing"]),), optimizer=optimizer, clip_norm=how["clip"])
    source = DataLoader(
        data(how["rows"], how["data_seed"], how["dtype"]), batch_size=how["batch"], shuffle=how["shuffle"]
    )
    validation = how["validation"]
    if validation is not None:
        validation = validation[0].to(how["dtype"]), validation[1]
    trainer.fit(
        source,
        steps=steps,
        schedule="constant",
        validation=validation,
        out=str(out),
        resume=resume,
        allow_changes=allow,
        progress=False,
        say=how.get("say", lambda text: None),
        save_every=3,
    )
    return model


CHANGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "learning rate": ({"lr": 0.2}, r"student_optimizer\.lr was 0\.1, now 0\.2", "student_optimizer"),
    "momentum": (
        {"momentum": 0.9},
        r"student_optimizer\.momentum was 0, now 0\.9|momentum was 0\.0",
        "student_optimizer",
    ),
    "weights of the losses": ({"smoothing": 0.1}, r"trainer\.losses was", "trainer"),
    "clipping": ({"clip": 1.0}, r"trainer\.clip_norm was None, now 1\.0", "trainer"),
    "type": ({"dtype": torch.float64}, r"dtype\.student was 'float32', now 'float64'", "dtype"),
    "batch size": ({"batch": 6}, r"labeled\.batch_size was 8, now 6", "labeled"),
    "number of examples": ({"rows": 32}, r"labeled\.examples was 24, now 32", "labeled"),
    "other examples": ({"data_seed": 5}, r"labeled\.fingerprint was", "labeled"),
    "order": ({"shuffle": False}, r"labeled\.sampler was 'RandomSampler', now 'SequentialSampler'", "labeled"),
    "validation": ({"validation": data(10, 2).tensors}, r"validation\.fingerprint was", "validation"),
    "no validation": ({"validation": None}, r"validation was given, now it is the other way round", "validation"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named_and_refused_or_allowed_by_an_argument(name: str, tmp_path: Path) -> None:
    changed, words, part = CHANGES[name]
    fitted(tmp_path, resume=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MetaplError, match=words) as refused:
        fitted(tmp_path, steps=9, **changed)
    assert f"allow_changes={[part]!r}" in str(refused.value) or name == "type"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    allowed = [part] if name != "type" else ["dtype", "labeled", "validation"]
    fitted(tmp_path, allow=allowed, steps=9, **changed)
    fitted(tmp_path, allow=allowed, steps=9, **changed)  # and what is given now counts from then on


def test_nothing_changed_is_nothing_said(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    told: list[str] = []
    fitted(tmp_path, steps=9, say=told.append)
    assert told == ["resumed at step 6"]


def test_a_setting_that_is_allowed_to_change_counts(tmp_path: Path) -> None:
    """As if the optimizer had been given it after the sixth step."""
    fitted(tmp_path, resume=False)
    other = tmp_path.with_name("other")
    shutil.copytree(tmp_path, other)
    slow = fitted(tmp_path, steps=9).weight.clone()
    fast = fitted(other, steps=9, allow=["student_optimizer"], momentum=0.9, lr=0.5).weight
    assert not torch.equal(slow, fast)
    state = checkpoint.load(CheckpointFolder(other / "checkpoints/fit").paths()[0])
    assert state["trainer"]["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert state["made_of"]["student_optimizer"]["lr"] == 0.5


def test_more_steps_done_than_asked_for(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    with pytest.raises(MetaplError, match=r"has done 6 steps, and steps=4; expected more"):
        fitted(tmp_path, steps=4)


def test_another_torch_is_noted(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    newest = CheckpointFolder(tmp_path / "checkpoints/fit").paths()[0]
    state = checkpoint.load(newest)
    assert state["versions"] == {"torch": str(torch.__version__)}
    checkpoint.save(newest, state | {"versions": {"torch": "1.2.3"}})
    told: list[str] = []
    fitted(tmp_path, say=told.append)
    assert "begun with torch 1.2.3" in told[0]


def test_a_checkpoint_of_before_is_gone_on_with(tmp_path: Path) -> None:
    fitted(tmp_path, resume=False)
    for path in CheckpointFolder(tmp_path / "checkpoints/fit").paths():
        state = checkpoint.load(path)
        del state["made_of"], state["versions"]
        checkpoint.save(path, state)
    fitted(tmp_path, steps=9, lr=0.3)


def test_what_may_change_has_a_name(tmp_path: Path) -> None:
    for wrong in ("labeled", ["lr"]):
        with pytest.raises(MetaplError, match=r"allow_changes=.*expected a list of some of student_optimizer"):
            fitted(tmp_path, resume=False, allow=wrong)
    assert list(tmp_path.iterdir()) == []


def test_the_settings_of_a_bilevel_trainer_are_known() -> None:
    teacher, student = nn.Linear(4, 2), nn.Linear(4, 2)
    settings = [
        BilevelTrainer(teacher, student, **options).settings()  # type: ignore[arg-type]
        for options in ({}, {"feedback_weight": 2.0}, {"problem": PseudoLabels(temperature=0.5)}, {"mode": "forward"})
    ]
    assert all(settings[0] != other for other in settings[1:])
    assert settings[0] == BilevelTrainer(nn.Linear(4, 2), nn.Linear(4, 2)).settings()


def test_sources_are_told_apart_by_what_they_hold() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    assert source_record([x]) == source_record([x.clone()])
    assert source_record([x]) != source_record([x + 1])
    assert source_record((x, x)) != source_record((x,))
    record = source_record(iter([x]))
    assert record["length"] is None
    assert as_values({"a": (1, x[:1, 0]), "f": len}) == {"a": [1, 0.0], "f": "builtins.len"}


# ------------------------------------------------------------------------------------------------------- the networks


class Heads(nn.Module):
    """Attention, whose heads leave no trace in the shapes of its weights, and a function of one's choice."""

    def __init__(self, heads: int = 2, act: Any = torch.tanh, config: Any = None) -> None:
        super().__init__()
        self.act, self.config, self.calls = act, config, 0
        self.attention = nn.MultiheadAttention(4, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # no setting
        return self.act(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])


def layers(
    middle: nn.Module | None = None, *more: nn.Module, frozen: bool = False, body: nn.Module | None = None
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(body or nn.Linear(4, 4), middle or nn.ReLU(), nn.Linear(4, 2), *more)
    for p in model[0].parameters():
        p.requires_grad_(not frozen)
    return model


def fitted_network(
    model: nn.Module, out: Path, steps: int = 4, optimizer: Any = None, losses: Any = None, **options: Any
) -> nn.Module:
    options = {"resume": True, "say": lambda text: None, **options}
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = LossTrainer(model, (CrossEntropy(),) if losses is None else losses, optimizer=optimizer)
    x, y = data().tensors
    trainer.fit([(x, y)], steps=steps, schedule="constant", progress=False, out=str(out), **options)
    return model


OTHER_NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "activation": ({}, {"middle": nn.Tanh()}, r"networks\.student\.1 was ReLU\(\), now Tanh\(\)"),
    "slope": (
        {"middle": nn.LeakyReLU(0.1)},
        {"middle": nn.LeakyReLU(0.2)},
        r"networks\.student\.1 was LeakyReLU\(negative_slope=0\.1\), now LeakyReLU\(negative_slope=0\.2\)",
    ),
    "dropout": (
        {"middle": nn.Dropout(0.1)},
        {"middle": nn.Dropout(0.3)},
        r"networks\.student\.1 was Dropout\(p=0\.1, inplace=False\), now Dropout\(p=0\.3",
    ),
    "a layer more": ({}, {"more": nn.Dropout(0.5)}, r"networks\.student\.3 was nothing, now Dropout\(p=0\.5"),
    "a layer less": ({"more": nn.Dropout(0.5)}, {}, r"networks\.student\.3 was Dropout\(p=0\.5.*, now nothing"),
    "frozen": ({}, {"frozen": True}, r"networks\.student\.0\.bias was learned, now frozen"),
    "thawed": ({"frozen": True}, {}, r"networks\.student\.0\.bias was frozen, now learned"),
    "heads": (
        {"body": Heads()},
        {"body": Heads(4)},
        r"networks\.student\.0\.attention was MultiheadAttention\(num_heads=2\), now Multi.*\(num_heads=4\)",
    ),
    "a function": ({"body": Heads()}, {"body": Heads(act=torch.relu)}, r"networks\.student\.0 was Heads\(act=.*tanh"),
    "a configuration": (
        {"body": Heads(config=SimpleNamespace(eps=0.1))},
        {"body": Heads(config=SimpleNamespace(eps=0.2))},
        r"networks\.student\.0 was Heads\(config\.eps=0\.1\), now Heads\(config\.eps=0\.2\)",
    ),
}


def build(how: dict[str, Any]) -> nn.Module:
    how = copy.deepcopy(how)
    more = [how.pop("more")] if "more" in how else []
    return layers(how.pop("middle", None), *more, **how)


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_another_network_of_the_same_shapes_is_named_and_refused(name: str, tmp_path: Path) -> None:
    first, other, words = OTHER_NETWORKS[name]
    fitted_network(build(first), tmp_path, resume=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = build(other)
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(MetaplError, match=rf"{words}.*allow_changes=\['networks'\]"):
        fitted_network(model, tmp_path, steps=6)
    assert all(map(torch.equal, weights, model.parameters()))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    fitted_network(build(first), tmp_path, steps=6)
    fitted_network(model, tmp_path, steps=8, allow_changes=["networks"])


def test_the_same_network_is_gone_on_with_in_any_mode_and_by_the_same_trainer(tmp_path: Path) -> None:
    class Moving(nn.Linear):
        """It shows a weight, which is another after a step, and where its function lies."""

        def extra_repr(self) -> str:
            return f"{super().extra_repr()}, first={self.weight[0, 0].item():.4f}, act={object()}"

    model = layers(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), Moving(2, 2), body=Heads())
    fitted_network(model, tmp_path, resume=False)
    fitted_network(model.eval(), tmp_path, steps=6)
    told: list[str] = []
    wrapped = copy.deepcopy(model).train()
    wrapped[1] = checkpoint_wrapper(wrapped[1])
    fitted_network(wrapped, tmp_path, steps=8, say=told.append)
    assert told == ["resumed at step 6"]


def altered(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    for path in CheckpointFolder(folder / "checkpoints/fit").paths():
        state = checkpoint.load(path)
        change(state["made_of"])
        checkpoint.save(path, state)


def test_of_another_torch_only_the_types_of_layers_are_compared(tmp_path: Path) -> None:
    fitted_network(layers(nn.LeakyReLU(0.1)), tmp_path, resume=False)
    altered(tmp_path, lambda made_of: made_of["networks"].update(torch="1.2.3"))
    with pytest.raises(MetaplError, match=r"networks\.student\.1 was LeakyReLU, now Tanh"):
        fitted_network(layers(nn.Tanh()), tmp_path, steps=6)
    fitted_network(layers(nn.LeakyReLU(0.2)), tmp_path, steps=6)


def test_a_run_from_before_networks_were_compared_goes_on(tmp_path: Path) -> None:
    fitted_network(layers(), tmp_path, resume=False)

    def forget(made_of: dict[str, Any]) -> None:
        del made_of["networks"], made_of["trainer"]["settings"], made_of["student_optimizer"]["parameters"]

    altered(tmp_path, forget)
    fitted_network(layers(nn.Tanh()), tmp_path, steps=6)


def test_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    """The optimizer's state would go to other weights."""

    def square(turned: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        parameters = [*model.parameters()][:: -1 if turned else 1]
        return {"model": model, "optimizer": torch.optim.SGD(parameters, lr=0.1, momentum=0.9)}

    fitted_network(out=tmp_path, **square(False), resume=False)
    with pytest.raises(MetaplError, match=r"student_optimizer\.parameters was \['0\.weight', '1\.weight'\], now \['1"):
        fitted_network(out=tmp_path, **square(True), steps=6)


class Weighted:
    """A loss of one's own, with a setting, a tensor, a function and a counter."""

    name = "weighted"

    def __init__(self, weight: float = 1.0, classes: Any = (1.0, 1.0), scale: Any = None) -> None:
        self.weight, self.classes, self.scale, self.calls = weight, torch.tensor(classes), scale, 0

    def __call__(self, teacher: nn.Module, *, labeled: Any, **others: Any) -> torch.Tensor:
        self.calls += 1
        return self.weight * nn.functional.cross_entropy(teacher(labeled[0]), labeled[1], self.classes)


def scaled(by: float) -> Callable[[float], float]:
    return lambda value: by * value


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": 2.0}, r"trainer\.settings\.losses\.0\.weight was '1\.0', now '2\.0'"),
        ({"classes": (1.0, 2.0)}, r"trainer\.settings\.losses\.0\.classes was"),
        ({"scale": scaled(2.0)}, r"trainer\.settings\.losses\.0\.scale\.by was '1\.0', now '2\.0'"),
        ({"scale": partial(scaled, by=3.0)}, r"trainer\.settings\.losses\.0\.scale was"),
    ],
)
def test_settings_of_losses_of_ones_own_are_compared(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    loss = Weighted(scale=scaled(1.0))
    fitted_network(layers(), tmp_path, losses=(loss,), resume=False)
    fitted_network(layers(), tmp_path, losses=(loss,), steps=5)
    with pytest.raises(MetaplError, match=words):
        fitted_network(layers(), tmp_path, losses=(Weighted(**{"scale": scaled(1.0), **changed}),), steps=6)


def test_a_loss_that_counts_and_has_no_constructor_is_no_other_loss(tmp_path: Path) -> None:
    class Counting:
        name, calls = "counting", 0

        def __call__(self, teacher: nn.Module, *, labeled: Any, **others: Any) -> torch.Tensor:
            self.calls += 1
            return nn.functional.cross_entropy(teacher(labeled[0]), labeled[1])

    losses = (Counting(),)
    fitted_network(layers(), tmp_path, losses=losses, resume=False)
    fitted_network(layers(), tmp_path, losses=losses, steps=5)


def test_the_settings_of_a_transform_are_known() -> None:
    found = []
    for rate in (0.1, 0.1, 0.2):
        optimizer = torchopt.adam(rate)
        trainer = BilevelTrainer(nn.Linear(4, 2), nn.Linear(4, 2), "forward", inner_optimizer=optimizer)
        found.append(trainer.settings())
    assert found[0] == found[1] != found[2]


def collated(examples: Any) -> Any:
    return torch.utils.data.default_collate(examples)


@pytest.mark.parametrize("name", ["weights", "replacement", "num_samples", "collate_fn", "indices"])
def test_another_order_of_a_loader_is_refused(name: str, tmp_path: Path) -> None:
    """Where its sampler is of the same class, or where a function of another name puts the examples together."""
    data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 2)
    weights = [1.0, 2.0] * 6
    loaders: dict[str, tuple[Any, Any]] = {
        "weights": (
            {"sampler": WeightedRandomSampler(weights, 12)},
            {"sampler": WeightedRandomSampler(weights[::-1], 12)},
        ),
        "replacement": ({"shuffle": True}, {"sampler": RandomSampler(data, replacement=True)}),
        "num_samples": ({"shuffle": True}, {"sampler": RandomSampler(data, num_samples=6)}),
        "collate_fn": ({}, {"collate_fn": collated}),
        "indices": ({"sampler": SubsetRandomSampler(range(6))}, {"sampler": SubsetRandomSampler(range(6, 12))}),
    }

    def fit(options: dict[str, Any], resume: bool) -> None:
        network = nn.Linear(4, 2)
        trainer = LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
        trainer.fit(DataLoader(data, 4, **options), steps=2, out=tmp_path, resume=resume, progress=False)

    fit(loaders[name][0], False)
    with pytest.raises(MetaplError, match=rf"labeled\.settings\.{name} was .*allow_changes=\['labeled'\]"):
        fit(loaders[name][1], True)
    fit(loaders[name][0], True)
