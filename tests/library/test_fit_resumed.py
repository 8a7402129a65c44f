"""A fit that was saved, stopped, or failed goes on as if it had not been."""

from __future__ import annotations

import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    INNER,
    OPTIONS,
    Counting,
    _one_thread,  # noqa: F401  # used by every test
    batches,
    bilevel,
    end_of,
    examples,
    network,
    same,
    single,
)
from problems_zoo import ANYWHERE, product
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metapl
from metapl import MetaplError
from metapl.ablation import Altered
from metapl.feedback import Estimator, LossDifference, Reinforce
from metapl.runs.checkpoint import CheckpointFolder
from metapl.runs.rows import Events
from metapl.training import FitOptions, Interrupted

# ---------------------------------------------------------------------------------------------------- save and resume


MODES: list[Any] = [*ANYWHERE, Reinforce(baseline=0.9), LossDifference(baseline=0.5), Altered(alteration="random_sign")]


@pytest.mark.parametrize(
    ("mode", "inner", "own_generator"),
    product(MODES, INNER, (True, False), usual=("forward", "reinforce", "sgd", True)),
    ids=lambda one: getattr(one, "name", str(one)) + "_" * isinstance(one, Estimator),
)
def test_a_saved_trainer_goes_on_bit_for_bit(mode: Any, inner: str, own_generator: bool, tmp_path: Path) -> None:
    def built(seed: int) -> metapl.BilevelTrainer:
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        return bilevel(mode, seed, INNER[inner], generator=generator)

    data = list(zip(*batches(6), strict=True))
    first = built(0)
    torch.manual_seed(2)
    for one in data[:3]:
        first.step(*one)
    first.save(tmp_path / "half.ckpt")
    ends = [(*(first.step(*one).feedback for one in data[3:]), first.state_dict(), torch.get_rng_state())]
    second = built(1)  # other weights, other draws
    torch.manual_seed(3)
    second.load(tmp_path / "half.ckpt")
    ends.append((*(second.step(*one).feedback for one in data[3:]), second.state_dict(), torch.get_rng_state()))
    assert same(*ends)


def test_a_trainer_refuses_the_state_of_another_mode_and_of_no_trainer(tmp_path: Path) -> None:
    bilevel("forward").save(tmp_path / "a.ckpt")
    with pytest.raises(MetaplError, match="its mode is 'forward', and the trainer's is 'reinforce'"):
        bilevel("reinforce").load(tmp_path / "a.ckpt")
    metapl.runs.checkpoint.save(tmp_path / "b.ckpt", {"weights": torch.ones(1)})
    with pytest.raises(MetaplError, match=r"b\.ckpt is not a trainer's file"):
        bilevel("forward").load(tmp_path / "b.ckpt")


Change = Callable[[dict[str, Any]], Any]


def without(name: str) -> Change:
    return lambda state: {key: value for key, value in state.items() if key != name}


def at(*path: Any, value: Any) -> Change:
    """The state with another value at a place, whose former value ``value`` is given."""

    def changed(state: dict[str, Any]) -> dict[str, Any]:
        held = state
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = value(held.get(path[-1]) if isinstance(held, dict) else held[path[-1]])
        return state

    return changed


def spoiled(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[-1] = torch.nan
    return t


def of_another(optimizer: Any) -> Change:
    """The state with another optimizer's in the place of the student's, which is the last network's."""

    def changed(state: dict[str, Any]) -> dict[str, Any]:
        model = network()
        found = optimizer(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        found.step()
        return state | {key: found.state_dict() for key in ("inner", "optimizer") if key in state}

    return changed


NO_STATES: dict[str, tuple[Change, str]] = {
    "none": (lambda state: None, "it is of type NoneType, and no dict with"),
    "a list": (lambda state: [state], r"it is a list of 1 \(dict\), and no dict with"),
    "empty": (lambda state: {}, r"it has no .*student"),
    "weights": (lambda state: state["student"], r"it has no .* and it has 0\.weight"),
    "no student": (without("student"), "it has no student"),
    "student none": (at("student", value=lambda _: None), "its student is of type NoneType"),
    "an entry more": (lambda state: state | {"extra": 1}, "it has extra, which the trainer's has not"),
    "a weight less": (at("student", value=without("4.bias")), r"its student has no 4\.bias"),
    "a weight more": (at("student", "5.weight", value=lambda _: torch.ones(1)), r"its student has 5\.weight, which"),
    "another shape": (
        at("student", "4.weight", value=lambda t: t[:2]),
        r"its student\.4\.weight is .*\(2, 8\).*\(3, 8\)",
    ),
    "no tensor": (at("student", "4.weight", value=lambda t: t.tolist()), r"its student\.4\.weight is a list"),
    "NaN": (at("student", "4.weight", value=spoiled), r"its student\.4\.weight has numbers that are NaN"),
    "infinite": (at("student", "1.running_mean", value=lambda t: t + torch.inf), "running_mean has numbers that are"),
    "no number": (at("steps_done", value=lambda _: None), "its steps_done is None"),
    "Adam": (of_another(torch.optim.Adam), "is of another optimizer than SGD: .*betas"),
    "sparse": (at("student", "4.weight", value=lambda t: t.to_sparse()), r"student\.4\.weight is a sparse_coo tensor"),
    "int": (at("student", "4.weight", value=lambda t: t.long()), r"its student\.4\.weight is .* int64"),
    "names": (at("optimizers", value=lambda _: [1]), "its optimizers are a list of 1"),
    "RMSprop": (of_another(torch.optim.RMSprop), "is of another optimizer than SGD: .*alpha"),
}
OF_OPTIMIZERS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "none": ((), lambda _: None, "is of type NoneType, and no state of an optimizer"),
    "groups": (("param_groups",), lambda groups: groups * 2, r"over groups of \[6, 6\] parameters, .* \[6\]"),
    "no groups": (("param_groups",), lambda groups: {}, "no state of an optimizer of torch.optim"),
    "parameters": (("param_groups", 0, "params"), lambda ids: ids[:-1], r"over groups of \[5\] parameters"),
    "shape": (("state", 0, "momentum_buffer"), lambda t: t[:2], r"state\.0\.momentum_buffer is .*\(8, 5\)"),
    "NaN": (("state", 0, "momentum_buffer"), spoiled, r"momentum_buffer has numbers that are NaN"),
    "infinite": (("state", 0, "momentum_buffer"), lambda t: t / 0, "momentum_buffer has numbers that are NaN or inf"),
    "no buffer": (("state", 0), lambda _: {"step": 1}, r"state\.0\.momentum_buffer is of type NoneType"),
    "no state": (("state",), lambda state: {i: state[i] for i in [*state][1:]}, "state has no 0, of which the trainer"),
    "rate": (("param_groups", 0, "lr"), lambda _: float("nan"), r"\['lr'\] is nan; expected one such as"),
    "infinite rate": (("param_groups", 0, "lr"), lambda _: float("inf"), r"\['lr'\] is inf; expected one such as"),
    "negative rate": (("param_groups", 0, "lr"), lambda _: -1.0, "is refused by SGD: .*learning rate"),
    "decay": (("param_groups", 0, "weight_decay"), lambda _: None, r"\['weight_decay'\] is None; expected one such as"),
    "flag for a rate": (("param_groups", 0, "lr"), lambda _: True, r"\['lr'\] is True; expected one such as"),
    "tensor": (("param_groups", 0, "momentum"), lambda _: torch.ones(1), r"\['momentum'\] is tensor.*one such as"),
    "no numbers": (("param_groups", 0, "params"), lambda ids: [[i] for i in ids], "no state of an optimizer of torch"),
    "twice": (("param_groups", 0, "params"), lambda ids: [0] * len(ids), "number of a parameter twice"),
    "foreign": (("state", 99), lambda _: {}, "state has 99, which is no number"),
}


def refuse_state(trainer: Any, change: Change, words: str, folder: Path) -> None:
    """By itself and from a file; then everything is bit for bit as before."""
    state, before, drawn = change(trainer.state_dict()), trainer.state_dict(), torch.get_rng_state()
    with pytest.raises(MetaplError, match=rf"this is no state for this {type(trainer).__name__}: .*{words}"):
        trainer.load_state_dict(state)
    torch.manual_seed(99)
    metapl.runs.checkpoint.save(folder / "a.ckpt", {"trainer": state, "rng": metapl.runs.generators.rng_state()})
    torch.set_rng_state(drawn)
    with pytest.raises(MetaplError, match=rf"a\.ckpt: this is no state for this .*{words}"):
        trainer.load(folder / "a.ckpt")
    assert same((trainer.state_dict(), torch.get_rng_state()), (before, drawn))


def stepped(kind: str, **options: Any) -> Any:
    trainer = bilevel(**options) if kind == "two" else single(**options)
    labeled, unlabeled = batches(1)
    trainer.step(labeled[0], unlabeled[0])
    return trainer


@pytest.mark.parametrize("kind", ["two", "one"])
@pytest.mark.parametrize("name", NO_STATES)
def test_what_is_no_state_of_a_trainer_is_refused_before_anything_is_loaded(
    name: str, kind: str, tmp_path: Path
) -> None:
    refuse_state(stepped(kind), *NO_STATES[name], tmp_path)


@pytest.mark.parametrize("of", ["inner", "outer", "optimizer"])
@pytest.mark.parametrize("name", OF_OPTIMIZERS)
def test_nor_is_that_of_another_optimizer(name: str, of: str, tmp_path: Path) -> None:
    path, value, words = OF_OPTIMIZERS[name]
    refuse_state(stepped("one" if of == "optimizer" else "two"), at(of, *path, value=value), words, tmp_path)


OF_ADAM: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no step": (("state", 0), without("step"), r"state\.0\.step is of type NoneType; expected a number"),
    "step inf": (("state", 0, "step"), lambda t: t / 0, r"state\.0\.step has numbers that are NaN or infinite"),
    "step below 0": (("state", 0, "step"), lambda t: -t, r"state\.0\.step has numbers below 0"),
    "step of a shape": (("state", 0, "step"), lambda t: t.expand(2), r"state\.0\.step is a tensor of shape \(2,\)"),
    "no mean": (("state", 0), without("exp_avg"), r"exp_avg is of type NoneType; expected a tensor"),
    "mean None": (("state", 1, "exp_avg"), lambda _: None, r"state\.1\.exp_avg is of type NoneType"),
    "mean str": (("state", 0, "exp_avg"), lambda _: "abc", r"state\.0\.exp_avg is of type str"),
    "mean sparse": (("state", 0, "exp_avg"), lambda t: t.to_sparse(), r"exp_avg is a sparse_coo tensor"),
    "mean long": (("state", 0, "exp_avg"), lambda t: t.long(), r"exp_avg is .* int64"),
    "mean inf": (
        ("state", 0, "exp_avg"),
        lambda t: t.double().fill_(1e300),
        r"exp_avg has numbers that are NaN or inf",
    ),
    "square below 0": (("state", 0, "exp_avg_sq"), lambda t: t - 1, r"exp_avg_sq has numbers below 0"),
    "square inf": (("state", 0, "exp_avg_sq"), lambda t: t / 0 + torch.inf, r"exp_avg_sq has numbers that are NaN or"),
    "amsgrad": (("param_groups", 0, "amsgrad"), lambda _: True, r"max_exp_avg_sq is of type NoneType"),
    "amsgrad str": (("param_groups", 0, "amsgrad"), lambda _: "yes", r"\['amsgrad'\] is 'yes'; expected"),
    "rate": (("param_groups", 0, "lr"), lambda _: "abc", r"\['lr'\] is 'abc'; expected one such as"),
    "betas": (("param_groups", 0, "betas"), lambda _: None, r"\['betas'\] is None; expected one such as"),
    "three betas": (("param_groups", 0, "betas"), lambda given: (*given, 1.0), r"\['betas'\] is .*; expected one such"),
    "beta": (("param_groups", 0, "betas"), lambda _: (0.9, 1.5), "is refused by Adam: .*beta"),
}


@pytest.mark.parametrize("of", ["inner", "optimizer"])
@pytest.mark.parametrize("name", OF_ADAM)
def test_nor_is_one_that_its_optimizer_cannot_step_from(name: str, of: str, tmp_path: Path) -> None:
    path, value, words = OF_ADAM[name]

    def adam(student: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(student.parameters(), lr=0.01)

    if of == "inner":
        trainer = stepped("two", inner=adam)
    else:
        model = network()
        trainer = metapl.LossTrainer(model, optimizer=adam(model))
        trainer.step(batches(1)[0][0], None)
    refuse_state(trainer, at(of, *path, value=value), words, tmp_path)


OPTIMIZERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Adafactor"])
def test_a_state_of_every_optimizer_is_loaded(name: str) -> None:
    """Also one in which a parameter has no state, as nothing is learned of it."""

    def built() -> Any:
        model = network()
        model[0].bias.requires_grad_(False)
        return metapl.LossTrainer(model, optimizer=getattr(torch.optim, name)(model.parameters()))

    first, second = built(), built()
    (one,), _ = batches(1)
    first.step(one, None)
    second.load_state_dict(first.state_dict())
    assert same(second.state_dict(), first.state_dict())
    for trainer in (first, second):
        torch.manual_seed(1)
        trainer.step(one, None)
    assert same(second.state_dict(), first.state_dict())


def test_nor_is_a_state_without_its_teacher_or_with_another(tmp_path: Path) -> None:
    trainer = stepped("two", generator=torch.Generator())
    refuse_state(trainer, without("teacher"), "it has no teacher", tmp_path)
    refuse_state(trainer, at("teacher", "4.weight", value=spoiled), r"its teacher\.4\.weight has numbers", tmp_path)
    refuse_state(trainer, at("generator", value=lambda t: t[:9]), "its generator is a tensor", tmp_path)
    refuse_state(trainer, at("mode_state", value=lambda _: None), "its mode_state is of type NoneType", tmp_path)
    for recent in (7, [1], {"spread": 1}, {"feedback": torch.zeros(3)}, {"spread": 0.5, "shares": "x"}):
        refuse_state(trainer, at("mode_state", "recent", value=lambda _, r=recent: r), r"\['recent'\] is", tmp_path)
    with pytest.raises(MetaplError, match="its teacher is of type NoneType, and the trainer's is a dict"):
        trainer.load_state_dict(trainer.state_dict() | {"teacher": None})
    with pytest.raises(MetaplError, match=r"it has no mode, lookahead, teacher.* and it has optimizer, which"):
        trainer.load_state_dict(single().state_dict())


def test_optimizers_of_the_same_settings_are_told_apart_by_their_classes(tmp_path: Path) -> None:
    adam, adamw = (
        bilevel(inner=lambda student, kind=kind: kind(student.parameters()))
        for kind in (torch.optim.Adam, torch.optim.AdamW)
    )
    refuse_state(
        adamw, lambda _: adam.state_dict(), "its inner is of an optimizer Adam, and the trainer's is AdamW", tmp_path
    )
    refuse_state(adamw, without("optimizers"), "it has no optimizers", tmp_path)


def test_nor_is_the_state_of_another_transform(tmp_path: Path) -> None:
    trainer = bilevel(inner=INNER["torchopt_adam"])
    other = bilevel(inner=INNER["torchopt_momentum"]).state_dict()
    refuse_state(trainer, lambda _: other, r"its inner\.leaves is a list", tmp_path)
    refuse_state(
        trainer, at("inner", "leaves", 0, value=lambda t: t[:2]), r"its inner\.leaves\.0 is a tensor", tmp_path
    )
    refuse_state(trainer, at("inner", "leaves", 0, value=spoiled), r"its inner\.leaves\.0 has numbers", tmp_path)


def test_nor_are_weights_without_values() -> None:
    trainer = stepped("one")
    state = at("student", "4.weight", value=lambda t: t.to("meta"))(trainer.state_dict())
    with pytest.raises(MetaplError, match=r"its student\.4\.weight is a tensor .* on meta"):
        trainer.load_state_dict(state)


def test_a_pickled_trainer_goes_on_bit_for_bit() -> None:
    data = list(zip(*batches(4), strict=True))
    one = bilevel(inner=INNER["adamw"])
    one.step(*data[0])
    bilevel(inner=INNER["adamw"])  # each that is built patches the class
    other = pickle.loads(pickle.dumps(one))
    state = torch.get_rng_state()
    ends = []
    for trainer in (one, other):
        torch.set_rng_state(state)
        ends.append([*(trainer.step(*each).feedback for each in data[1:]), trainer.state_dict()])
    assert same(*ends)


def test_load_expects_a_path() -> None:
    with pytest.raises(MetaplError, match=r"load\(\) was given of type NoneType; expected the path of a file"):
        single().load(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind", "workers"),
    [
        ("torchopt_momentum", "lists", 0),
        ("sgd", "loaders", 1),
        *(pytest.param(name, "lists", 0, marks=pytest.mark.long) for name in ("sgd", "adamw")),
        pytest.param("sgd", "loaders", 0, marks=pytest.mark.long),
    ],
)
def test_a_fit_that_failed_ends_as_one_that_did_not(name: str, kind: str, workers: int, tmp_path: Path) -> None:
    """The same seed twice, with and without loader workers, and once in two pieces."""
    labeled, unlabeled = batches(7)

    def sources() -> tuple[Any, Any]:
        if kind == "lists":
            return labeled, unlabeled
        whole = TensorDataset(torch.cat([x for x, _ in labeled]), torch.cat([y for _, y in labeled]))
        many: Any = TensorDataset(torch.cat(unlabeled))
        return (
            DataLoader(whole, batch_size=8, shuffle=True, num_workers=workers, drop_last=True),
            DataLoader(many, batch_size=9, shuffle=True, num_workers=workers, drop_last=True, collate_fn=Stacked()),
        )

    def trainer(seed: int) -> metapl.BilevelTrainer:
        return bilevel(Reinforce(baseline=0.9), seed, INNER[name])

    ends = []
    for number in range(2):
        one = trainer(0)
        torch.manual_seed(7)
        ends.append(
            end_of(one, one.fit(*sources(), steps=17, out=tmp_path / f"{number}", **OPTIONS), tmp_path / f"{number}")
        )
    assert same(*ends)

    one, folder = trainer(0), tmp_path / "pieces"
    step, calls = one.step, []

    def failing(*data: Any) -> Any:
        calls.append(data)
        if len(calls) == 14:
            raise RuntimeError("the lights went out")
        return step(*data)

    one.step = failing  # type: ignore[method-assign]
    torch.manual_seed(7)
    with pytest.raises(RuntimeError, match="lights"):
        one.fit(*sources(), steps=17, out=folder, **OPTIONS)
    other, said = trainer(1), list[str]()
    found = other.fit(*sources(), steps=17, out=folder, resume=True, say=said.append, **OPTIONS)
    assert said == ["resumed at step 10"]
    assert same(end_of(other, found, folder), ends[0])


class Stacked:
    """Batches of plain tensors, made where a worker can find it."""

    def __call__(self, items: list[tuple[Tensor]]) -> Tensor:
        return torch.stack([x for (x,) in items])


def test_workers_change_nothing() -> None:
    x, y = examples(40)
    loaders = [DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=n) for n in (0, 2)]
    ends = []
    for loader in loaders:
        trainer = single()
        torch.manual_seed(8)
        trainer.fit(loader, steps=12)
        ends.append((trainer.state_dict(), torch.get_rng_state()))
    assert same(*ends)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 7, 12])
def test_asked_to_stop_a_fit_finishes_its_step_and_saves(number: signal.Signals, at: int, tmp_path: Path) -> None:
    """And the same trainer, its learning rates put back, goes on with it."""
    labeled, unlabeled = batches(5)
    ends = []
    for stopped in (True, False):
        trainer, folder = bilevel(), tmp_path / str(stopped)
        torch.manual_seed(7)
        if stopped:
            before = signal.getsignal(number)
            ringing = Counting(labeled, at, lambda: signal.raise_signal(number))
            with pytest.raises(Interrupted, match=f"after step {at}; saved to") as caught:
                trainer.fit(ringing, unlabeled, steps=12, out=folder, **OPTIONS)
            assert (caught.value.step, caught.value.signal_number) == (at, number)
            assert caught.value.saved == folder / f"checkpoints/fit/step-{at:08d}.ckpt"
            assert signal.getsignal(number) == before
            assert trainer.schedulable[0].param_groups[0]["lr"] == 0.1
            torch.manual_seed(100)
        found = trainer.fit(labeled, unlabeled, steps=12, out=folder, resume=stopped, say=lambda _: None, **OPTIONS)
        ends.append(end_of(trainer, found, folder))
    assert same(*ends)


def test_a_second_ctrl_c_is_not_held_back_and_a_second_sigterm_is() -> None:
    def twice(number: signal.Signals) -> Callable[[], None]:
        return lambda: [signal.raise_signal(number) for _ in range(2)] and None

    with pytest.raises(KeyboardInterrupt) as caught:
        single().fit(Counting(batches(3)[0], 2, twice(signal.SIGINT)), steps=5)
    assert not isinstance(caught.value, Interrupted)
    with pytest.raises(Interrupted, match="nothing saved"):
        single().fit(Counting(batches(3)[0], 2, twice(signal.SIGTERM)), steps=5)


def test_a_signal_while_the_records_are_closed_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Events.__exit__

    def ringing(self: Any, *error: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(self, *error)

    monkeypatch.setattr(Events, "__exit__", ringing)
    with pytest.raises(Interrupted, match="after step 5; saved to"):
        single().fit(batches(3)[0], steps=5, out=tmp_path)


def test_damaged_checkpoints_are_passed_over_by_name_and_without_a_whole_one_it_is_refused(tmp_path: Path) -> None:
    labeled, unlabeled = batches(5)

    def ended(resume: bool) -> Any:
        trainer = bilevel()
        torch.manual_seed(7)
        found = trainer.fit(labeled, unlabeled, steps=12, out=tmp_path, resume=resume, say=said.append, **OPTIONS)
        return end_of(trainer, found, tmp_path)

    said: list[str] = []
    whole = ended(False)
    newest, older = CheckpointFolder(tmp_path / "checkpoints/fit").paths()
    newest.write_bytes(newest.read_bytes()[:-100])
    assert same(ended(True), whole)
    assert re.search(r"passed over step-00000012\.ckpt.*was cut", said[0])
    assert said[1] == "resumed at step 10"
    for path in (newest, older):
        path.write_bytes(b"")
    said.clear()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MetaplError, match=r"none can be used; to start anew, move them away: .*12\.ckpt is empty"):
        ended(True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert said == []
    for path in (newest, older):
        path.unlink()
    assert same(ended(True), whole)
    assert said == ["no checkpoint of phase fit yet: it begins at its first step"]


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    labeled, unlabeled = batches(5)

    def fit(resume: bool = True, again: Any = (labeled, unlabeled), **changed: Any) -> None:
        how = {"steps": 6, "out": tmp_path, "say": lambda _: None, **changed}
        bilevel().fit(*again, resume=resume, **how)

    fit(resume=False)
    with pytest.raises(MetaplError, match="holds checkpoints of a phase 'fit' already; go on with it by resume=True"):
        fit(resume=False)
    with pytest.raises(MetaplError, match="steps was 6, now 9"):
        fit(steps=9)
    with pytest.raises(MetaplError, match=r"ema_decay was None, now 0\.9"):
        fit(ema_decay=0.9)
    with pytest.raises(MetaplError, match="schedule was 'cosine', now 'constant'"):
        fit(schedule="constant")
    with pytest.raises(MetaplError, match="warmup was 0, now 2"):
        fit(warmup=2)
    with pytest.raises(MetaplError, match="on labeled and unlabeled batches, now there are labeled ones"):
        fit(again=(labeled, None))
    with pytest.raises(MetaplError, match="resume=True was given without out"):
        fit(out=None)
    fit(phase="another", resume=False)
    fit()


def test_a_run_of_constant_rates_may_be_made_longer(tmp_path: Path) -> None:
    ends = []
    for pieces in ((6, 11), (11,)):
        trainer, folder = single(), tmp_path / str(len(pieces))
        torch.manual_seed(7)
        for number, steps in enumerate(pieces):
            trainer.fit(
                batches(4)[0],
                steps=steps,
                schedule="constant",
                out=folder,
                resume=number > 0,
                say=lambda _: None,
                save_every=3,
            )
        ends.append(trainer.state_dict())
    assert same(*ends)


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_stay_as_were_asked_for(keep: int, tmp_path: Path) -> None:
    single().fit(batches(4)[0], steps=10, save_every=2, keep=keep, out=tmp_path)
    assert [int(path.stem[5:]) for path in CheckpointFolder(tmp_path / "checkpoints/fit").paths()] == [10, 8, 6][:keep]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"keep": 0}, "keep=0"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"warmup": 7}, "warmup=7"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"exact_every": 0}, "exact_every=0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        FitOptions(**{"steps": 5, **options})
