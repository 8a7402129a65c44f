"""What was silently wrong, or failed deep inside PyTorch, is right now, or refused by name before anything moves."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import ANYWHERE, Toy, everything, mlp, same, toy, unmoved
from reference import clipped, error, sgd, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchopt import pytree
from torchopt.transform import masked

import metapl
from metapl import MetaplError, Signal
from metapl.parts import trainable
from metapl.updates import update_of

SOFT, SAMPLED = ("unrolled", "forward", "difference"), ("reinforce", "reinforce_per_example", "loss_difference")


def trainer_for(case: Toy, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    networks = {name: options.pop(name, network) for name, network in case.networks().items()}
    return metapl.BilevelTrainer(**networks, mode=mode, **options)


def refused(call: Callable[[], Any], text: str, *watched: nn.Module) -> None:
    """The call is refused with these words, and leaves modules and the default generator as they were."""
    before = [copy.deepcopy(network.state_dict()) for network in watched], torch.get_rng_state()
    with pytest.raises(MetaplError, match=text):
        call()
    for network, old in zip(watched, before[0], strict=True):
        assert all(torch.equal(t, old[name]) for name, t in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# -------------------------------------------------------------------------------- the feedback's size (feedback_ratio)


class Labeller(nn.Module):
    """A teacher whose labels are from a method of its own, and whose forward may return a tuple or a dict."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.network, self.returns = mlp().double(), returns

    def forward(self, x: Tensor) -> Any:
        logits = self.network(x)
        return {"tensor": logits, "tuple": (x, logits), "dict": {"logits": logits}}[self.returns]

    def label(self, x: Tensor) -> Tensor:
        return self.network(x)

    def logits(self, x: Tensor) -> Tensor:
        outputs = self(x)
        return {"tensor": lambda: outputs, "tuple": lambda: outputs[1], "dict": lambda: outputs["logits"]}[
            self.returns
        ]()


class ByForward(metapl.PseudoLabels):
    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher.logits(batch).softmax(-1))


class ByMethod(metapl.PseudoLabels):
    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher.label(batch).softmax(-1))


class Supervised:
    name = "supervised"

    def __call__(self, teacher: Any, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        return F.cross_entropy(teacher.logits(labeled[0]), labeled[1])


def step_by_ratio(returns: str, problem: Any) -> tuple[dict[str, Tensor], float]:
    case = toy("mlp", teacher=lambda: Labeller(returns))
    outer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    trainer = trainer_for(
        case, problem=problem, teacher_losses=(Supervised(),), feedback_ratio=0.25, outer_optimizer=outer
    )
    before = values(case.teacher)
    report = trainer.step(**case.data())
    return {name: p - before[name] for name, p in values(case.teacher).items()}, report.feedback_ratio


@pytest.mark.parametrize("returns", ["tuple", "dict"])
def test_a_ratio_is_measured_in_tuples_and_dicts_as_in_tensors(returns: str) -> None:
    moved, ratio = step_by_ratio(returns, ByForward())
    plain, _ = step_by_ratio("tensor", ByForward())
    assert ratio == pytest.approx(0.25)
    assert error(moved, plain) < 1e-12


def test_a_ratio_refuses_a_signal_that_passes_by_what_it_is_measured_at() -> None:
    case = toy("mlp", teacher=Labeller)
    options: dict[str, Any] = {"problem": ByMethod(), "teacher_losses": (Supervised(),)}
    by_ratio = trainer_for(case, feedback_ratio=0.25, **options)
    with (
        unmoved(case),
        pytest.raises(MetaplError, match=r"the signal also depends on the teacher's weights in another way"),
    ):
        by_ratio.step(**case.data())
    report = trainer_for(case, feedback_weight=2.0, **options).step(**case.data())
    assert report.feedback_ratio != report.feedback_ratio, "a ratio that cannot be told is NaN, not 0"


def test_the_gradient_by_a_method_is_that_by_forward() -> None:
    found = []
    for problem in (ByMethod(), ByForward()):
        case = toy("mlp", teacher=Labeller)
        inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
        found.append(metapl.hypergradient(**case.networks(), **case.data(), problem=problem, inner_optimizer=inner))
    assert error(found[0].grads, found[1].grads) < 1e-12


# ------------------------------------------------------------------------------------------------ TorchOpt transforms


def matrices(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.ndim > 1, tree)


def clip_of_matrices(lr: float) -> Any:
    def rule(params: dict[str, Tensor], grads: dict[str, Tensor], state: Any) -> Any:
        big = {name: g for name, g in grads.items() if g.ndim > 1}
        new, _ = clipped(0.05, sgd(1.0))({name: torch.zeros_like(g) for name, g in big.items()}, big, None)
        scaled = {name: -new[name] if name in new else g for name, g in grads.items()}
        return {name: p - lr * scaled[name] for name, p in params.items()}, None

    return rule


WRAPPED: dict[str, tuple[Callable[[], Any], Any]] = {
    "masked": (
        lambda: torchopt.chain(masked(torchopt.clip_grad_norm(0.05), matrices), torchopt.sgd(0.3)),
        clip_of_matrices(0.3),
    ),
    "masked twice": (
        lambda: torchopt.chain(
            masked(torchopt.chain(torchopt.nan_to_num(0.0), masked(torchopt.clip_grad_norm(0.05), matrices)), matrices),
            torchopt.sgd(0.3),
        ),
        clip_of_matrices(0.3),
    ),
    "flat chain": (
        lambda: torchopt.chain.flat(torchopt.clip_grad_norm(0.05), torchopt.sgd(0.3)),
        clipped(0.05, sgd(0.3)),
    ),
    "chain of chains": (
        lambda: torchopt.chain(
            torchopt.chain(torchopt.clip_grad_norm(0.05), torchopt.nan_to_num(0.0)), torchopt.sgd(0.3)
        ),
        clipped(0.05, sgd(0.3)),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_clip_has_its_derivative_wherever_it_stands(name: str) -> None:
    """Against double backward through the rule written out: values and pullback."""
    build, rule = WRAPPED[name]
    student = toy("mlp").student
    functional = update_of(build(), trainable(student))
    draw = torch.Generator().manual_seed(1)
    theta = values(student)
    g, v = ({n: torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in theta.items()} for _ in range(2))
    at = {n: t.clone().requires_grad_() for n, t in g.items()}
    expected, _ = rule(theta, at, None)
    moved, _ = functional.update(theta, g, functional.read_state())
    assert error(moved, expected) < 1e-12
    by_autograd = torch.autograd.grad(sum((expected[n] * v[n]).sum() for n in v), list(at.values()))
    w = functional.pullback(theta, g, functional.read_state(), v)
    assert error(w, dict(zip(at, by_autograd, strict=True))) < 1e-12


@pytest.mark.parametrize("build", [torchopt.adam, torchopt.adamw])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_a_transform_with_a_wrong_derivative_is_refused(build: Any, eps: float) -> None:
    case = toy("mlp")
    wrong = build(0.05, eps=eps, use_accelerated_op=True)
    text = r"derivative in the gradient, or in its state, is wrong.*use_accelerated_op=True"
    refused(lambda: trainer_for(case, inner_optimizer=wrong), text, case.student)
    refused(lambda: metapl.hypergradient(**case.networks(), **case.data(), inner_optimizer=wrong), text, case.student)


def test_a_wrong_derivative_of_ones_own_is_found_too() -> None:
    """A transform that detaches half of what it does."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return {n: -0.1 * g * (1 + g.detach().abs()) for n, g in updates.items()}, state

    wrong = torchopt.base.GradientTransformation(lambda params: (), update)
    case = toy("mlp")
    refused(lambda: trainer_for(case, inner_optimizer=wrong), "or in its state, is wrong", case.student)


def test_a_wrong_derivative_in_the_state_is_found_too() -> None:
    """Momentum that is detached: right for one step, wrong for several."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        moments = {n: g + 0.9 * state[n].detach() for n, g in updates.items()}
        return {n: -0.1 * m for n, m in moments.items()}, moments

    def init(params: Any) -> Any:
        return {n: torch.zeros_like(p) for n, p in params.items()}

    case = toy("mlp")
    wrong = torchopt.base.GradientTransformation(init, update)
    refused(lambda: trainer_for(case, inner_optimizer=wrong), "or in its state, is wrong", case.student)


@pytest.mark.parametrize("name", ["adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "sgd"])
def test_torchopts_own_are_not_refused(name: str) -> None:
    update_of(getattr(torchopt, name)(0.1), trainable(toy("mlp").student))


# ------------------------------------------------------------------------------------------------- networks refused


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("where", ["whole", "part"])
@pytest.mark.parametrize("wrapper", [nn.parallel.DistributedDataParallel, nn.DataParallel])
def test_networks_spread_over_devices_are_refused(wrapper: Any, where: str, who: str) -> None:
    """But for those that are as a whole in DistributedDataParallel, both of them: see test_sharded.py."""
    case = toy("mlp")
    plain = case.networks()[who]
    network = wrapper(plain) if where == "whole" else nn.Sequential(wrapper(plain))
    text = rf"the {who} {'is a' if where == 'whole' else 'has a'} {wrapper.__name__}.*expected the plain module"
    if wrapper is nn.parallel.DistributedDataParallel and where == "whole":
        text = rf"the {who} (is )?in DistributedDataParallel over the processes 0"
    refused(lambda: trainer_for(case, **{who: network}), text, *case.networks().values())


@pytest.mark.usefixtures("one_process")
def test_a_sharded_network_beside_a_plain_one_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = toy("mlp")
    fully_shard(case.student, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(MetaplError, match="the teacher is a plain module, the student sharded over the processes 0"):
        trainer_for(case)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("how", ["scripted", "traced", "part"])
def test_torchscript_is_refused(how: str, who: str) -> None:
    case = toy("mlp")
    plain = case.networks()[who]
    network = torch.jit.trace(plain, case.unlabeled) if how == "traced" else torch.jit.script(plain)
    network = nn.Sequential(network) if how == "part" else network
    refused(lambda: trainer_for(case, **{who: network}), rf"the {who} .*ScriptModule.*expected the plain module")


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_lazy_module_is_refused_until_it_has_shapes(who: str) -> None:
    case = toy("mlp")
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(3, dtype=torch.float64))
    refused(lambda: trainer_for(case, **{who: network}), rf"the {who}'s 1\.weight has no shape yet.*on one batch")
    network(case.unlabeled)
    trainer_for(case, **{who: network}).step(**case.data())


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    case = toy("mlp")
    trainer = trainer_for(case)
    with torch.inference_mode(), unmoved(case), pytest.raises(MetaplError, match=r"inside torch\.inference_mode\(\)"):
        trainer.step(**case.data())
    with torch.inference_mode():
        x, network = case.unlabeled.clone(), mlp().double()
    with unmoved(case), pytest.raises(MetaplError, match=r"the unlabeled batch was made inside.*x\.clone\(\)"):
        trainer.step(case.labeled, x)
    with pytest.raises(MetaplError, match=r"the student's 1\.weight was made inside torch\.inference_mode"):
        trainer_for(case, student=network)
    with torch.no_grad():
        trainer.step(case.labeled, x.clone())


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(10, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def texts() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10, (9, 4), generator=draw)
    return {"labeled": (ids[:5], torch.arange(5) % 3), "unlabeled": ids[5:]}


@pytest.mark.parametrize("mode", ANYWHERE)
def test_a_student_with_sparse_gradients_is_refused(mode: str) -> None:
    teacher, student = Words(False), Words(True)
    trainer = metapl.BilevelTrainer(teacher, student, mode)
    refused(lambda: trainer.step(**texts()), r"student's embed\.weight is sparse.*sparse=False", teacher, student)


def test_a_teacher_with_sparse_gradients_works_where_its_optimizer_can() -> None:
    moved = []
    for sparse in (False, True):
        torch.manual_seed(0)
        teacher, student = Words(sparse), Words(False)
        if sparse:
            by_default = metapl.BilevelTrainer(teacher, student, "difference")
            text = r"embed\.weight is sparse, which SGD with these options cannot use"
            refused(lambda by_default=by_default: by_default.step(**texts()), text, teacher, student)
        outer = torch.optim.SGD(teacher.parameters(), lr=0.1)
        metapl.BilevelTrainer(teacher, student, "difference", outer_optimizer=outer).step(**texts())
        moved.append(values(teacher))
    assert error(*moved) < 1e-6


class Casting(nn.Module):
    """A float32 body whose head runs in another type, by a cast inside."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.head, self.dtype = nn.Linear(16, 8), nn.Linear(8, 3).to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).tanh().to(self.dtype)).float()


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_casts_inside_the_student_work_where_the_weights_keep_their_type(mode: str) -> None:
    case = toy("mlp", dtype=torch.float32)
    trainer_for(case, mode, student=Casting(torch.bfloat16)).step(**case.data())


def test_casts_inside_the_student_are_refused_by_difference() -> None:
    case = toy("mlp", dtype=torch.float32)
    student = Casting(torch.bfloat16)
    trainer = trainer_for(case, "difference", student=student)
    text = r"mode 'difference' runs the student in float32, and a cast inside.*mode=\"forward\""
    refused(lambda: trainer.step(**case.data()), text, case.teacher, student)


class Returning(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network, self.kind = mlp().double(), kind

    def forward(self, x: Tensor) -> Any:
        logits = self.network(x)
        return (logits, logits) if self.kind == "tuple" else {"logits": logits}


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_outputs_that_are_no_tensor_are_refused_and_a_dict_can_be_wrapped(kind: str, who: str) -> None:
    case = toy("mlp")
    network = Returning(kind)
    trainer = trainer_for(case, **{who: network})
    refused(lambda: trainer.step(**case.data()), rf"the {who} returned a {kind} of.*models\.Logits", network)
    if kind == "dict":
        trainer_for(case, **{who: metapl.models.Logits(network)}).step(**case.data())


# ------------------------------------------------------------------------------------- what changes between the steps


def test_a_partly_frozen_student_works_and_can_be_thawed() -> None:
    """With the default optimizer; what is frozen stays, even where a stale gradient lies on it."""
    case = toy("mlp")
    frozen, free = case.student[1], case.student[3]
    frozen.requires_grad_(False)
    trainer = trainer_for(case)
    frozen.weight.grad = torch.ones_like(frozen.weight)
    before = values(case.student)
    trainer.step(**case.data())
    assert torch.equal(frozen.weight, before["1.weight"])
    assert not torch.equal(free.weight, before["3.weight"])
    frozen.requires_grad_(True)
    trainer.step(**case.data())
    assert not torch.equal(frozen.weight, before["1.weight"])


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_layer_is_thawed_by_add_param_group_and_refused_without(who: str) -> None:
    """The step is then that of a trainer built on the whole network, where there is no momentum."""
    runs = []
    for late in (True, False):
        case = toy("mlp")
        network = case.networks()[who]
        layers = [p for p in network.parameters() if not late or p.shape[0] == 3]
        network[1].requires_grad_(not late)
        optimizer = torch.optim.SGD(layers, lr=0.2)
        options = {"inner_optimizer" if who == "student" else "outer_optimizer": optimizer}
        trainer = trainer_for(case, **options)
        if late:
            network[1].requires_grad_(True)
            with unmoved(case), pytest.raises(MetaplError, match=r"1\.weight, 1\.bias are not held.*add_param_group"):
                trainer.step(**case.data())
            optimizer.add_param_group({"params": list(network[1].parameters())})
        trainer.step(**case.data())
        runs.append({**values(case.teacher), **{f"s.{n}": p for n, p in values(case.student).items()}})
    assert error(*runs) < 1e-14


def test_a_layer_thawed_in_a_fit_keeps_its_rate() -> None:
    case = toy("mlp")
    case.student[1].requires_grad_(False)
    inner = torch.optim.SGD(case.student[3].parameters(), lr=0.2)
    rates = []

    def thaw(step: int, row: Any, trainer: Any) -> None:
        if step == 2:
            case.student[1].requires_grad_(True)
            inner.add_param_group({"params": list(case.student[1].parameters()), "lr": 0.1})
        rates.append([group["lr"] for group in inner.param_groups])

    trainer_for(case, inner_optimizer=inner).fit(
        [case.labeled], [case.unlabeled], steps=4, log_every=1, schedule="constant", progress=False, callbacks=[thaw]
    )
    assert rates == [[0.2], [0.2, 0.1], [0.2, 0.1], [0.2, 0.1]]


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("transform", [False, True])
def test_a_head_replaced_after_the_trainer_was_built_is_refused(transform: bool, who: str) -> None:
    case = toy("mlp")
    options = {"inner_optimizer": torchopt.sgd(0.1, momentum=0.9)} if transform else {}
    trainer = trainer_for(case, **options)
    case.networks()[who][3] = nn.Linear(6, 3).double()
    text = (
        "3.weight, 3.bias were added, removed" if transform and who == "student" else r"3\.weight, 3\.bias are not held"
    )
    with unmoved(case), pytest.raises(MetaplError, match=text):
        trainer.step(**case.data())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("who", ["inner_optimizer", "outer_optimizer"])
def test_a_learning_rate_is_a_number(who: str, optimizer: Any) -> None:
    case = toy("mlp")
    network = case.student if who == "inner_optimizer" else case.teacher
    wrong = optimizer(network.parameters(), lr=torch.tensor([0.1]))
    refused(lambda: trainer_for(case, **{who: wrong}), rf"{who} has lr=.*shape \(1,\).*expected a number", network)
    right = optimizer(network.parameters(), lr=torch.tensor(0.1))
    trainer_for(case, **{who: right}).step(**case.data())


# ----------------------------------------------------------------------------------------------- nothing half done


@pytest.mark.parametrize("mode", ANYWHERE)
def test_a_student_that_is_nan_does_not_poison_the_teacher(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode)
    with torch.no_grad():
        case.student[3].weight.fill_(torch.nan)
    with unmoved(case), pytest.raises(MetaplError, match="the student's outputs are NaN or infinite"):
        trainer.step(**case.data())


@pytest.mark.parametrize("mode", [mode for mode in ANYWHERE if mode != "none"])
def test_nor_does_one_that_diverges_within_its_step(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=float("inf")))
    with unmoved(case), pytest.raises(MetaplError, match="the feedback is NaN or infinite"):
        trainer.step(**case.data())
    call = metapl.hypergradient
    with unmoved(case), pytest.raises(MetaplError, match="the feedback is NaN or infinite"):
        call(**case.networks(), **case.data(), mode=mode, inner_optimizer=trainer.inner_optimizer)


@pytest.mark.parametrize("way", ["step", "hypergradient"])
def test_ones_own_generator_is_put_back_after_a_refusal(way: str) -> None:
    class Failing(metapl.PseudoLabels):
        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            raise ZeroDivisionError

    case, generator = toy("mlp"), torch.Generator().manual_seed(3)
    before = generator.get_state()
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    options = {"mode": "reinforce", "problem": Failing(), "inner_optimizer": inner, "generator": generator}
    trainer = trainer_for(case, **options)
    call = {
        "step": lambda: trainer.step(**case.data()),
        "hypergradient": lambda: metapl.hypergradient(**case.networks(), **case.data(), **options),
    }[way]
    with pytest.raises(ZeroDivisionError):
        call()
    assert torch.equal(generator.get_state(), before)


def test_a_student_optimizer_that_fails_leaves_the_teacher_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, statistics, optimizer and gradients, and the generator."""
    case = toy("batch_norm", teacher=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)))
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    outer = torch.optim.Adam(case.teacher.parameters())
    trainer = trainer_for(case, inner_optimizer=inner, outer_optimizer=outer)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(inner, "step", fail)
    before = everything(case, inner, outer)
    with pytest.raises(ZeroDivisionError):
        trainer.step(**case.data())
    assert same(before, everything(case, inner, outer))
    assert trainer.steps_done == 0


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_the_students_optimizer_are_refused(register: str) -> None:
    """They may change the step that is differentiated: gradients before it, weights after it."""
    case = toy("mlp")
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    trainer = trainer_for(case, inner_optimizer=inner)
    getattr(inner, register)(lambda *given: None)
    with unmoved(case, inner), pytest.raises(MetaplError, match=r"inner_optimizer has a hook of register_step"):
        trainer.step(**case.data())
    with pytest.raises(MetaplError, match=r"inner_optimizer has a hook"):
        trainer_for(case, inner_optimizer=inner)


class Elsewhere(nn.Module):
    """A student that reads a weight from a list of its own, beside the layer that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh()), nn.Linear(5, 3)
        self.double()
        self.kept = [self.head.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.kept[0], self.head.bias)


@pytest.mark.parametrize("mode", [mode for mode in metapl.MODES if mode != "none"])
def test_a_weight_that_is_read_from_elsewhere_than_its_module_is_refused(mode: str) -> None:
    """Other weights in the module's place are not seen there: the labelled loss was that at the old one."""
    case = toy("mlp")
    case = Toy(case.teacher, Elsewhere(), case.labeled, case.unlabeled, 0)
    trainer = trainer_for(case, mode)
    with unmoved(case), pytest.raises(MetaplError, match=r"reads the parameter head\.weight from elsewhere"):
        trainer.step(**case.data())
    trainer_for(case, "none").step(**case.data())


@pytest.mark.parametrize("mode", [mode for mode in ANYWHERE if mode != "none"])
def test_an_outer_loss_per_example_is_refused(mode: str) -> None:
    class PerExample(metapl.PseudoLabels):
        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1], reduction="none")

    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=PerExample())
    with unmoved(case), pytest.raises(MetaplError, match=r"outer_loss is a tensor of shape \(5,\).*take the mean"):
        trainer.step(**case.data())


def test_a_teacher_loss_per_example_is_refused() -> None:
    class PerExample(Supervised):
        def __call__(self, teacher: Any, **given: Any) -> Tensor:
            return F.cross_entropy(teacher(given["labeled"][0]), given["labeled"][1], reduction="none")

    case = toy("mlp")
    trainer = trainer_for(case, teacher_losses=(PerExample(),))
    with unmoved(case), pytest.raises(MetaplError, match=r"teacher loss 'supervised' is a tensor of shape \(5,\)"):
        trainer.step(**case.data())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference", "reinforce", "loss_difference"])
def test_a_signal_without_the_teachers_graph_is_refused(mode: str, recompute: bool) -> None:
    class Detached(metapl.PseudoLabels):
        def signal(self, *given: Any, **options: Any) -> Signal:
            return super().signal(*given, **options).detached()

    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=Detached(), recompute_teacher=recompute)
    text = r"signal \((value|log_prob)\) carries no gradient.*detached.*mode=\"none\""
    with unmoved(case), pytest.raises(MetaplError, match=text):
        trainer.step(**case.data())
    inner = trainer.inner_optimizer
    with unmoved(case), pytest.raises(MetaplError, match=text):
        metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=Detached(), inner_optimizer=inner)
    trainer_for(case, "none", problem=Detached()).step(**case.data())


# ------------------------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("inner", ["sgd", "adam", "torchopt"])
def test_a_state_dict_is_a_snapshot(inner: str) -> None:
    """Steps leave it as it is, also those after it was loaded; what it brings back is the run from there, twice."""
    case = toy("batch_norm")
    optimizer = {
        "sgd": lambda: torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(case.student.parameters()),
        "torchopt": lambda: torchopt.sgd(0.1, momentum=0.9),
    }[inner]()
    trainer = trainer_for(case, metapl.feedback.Reinforce(baseline=0.9), inner_optimizer=optimizer)
    trainer.step(**case.data())
    best, runs = trainer.state_dict(), []
    for _ in range(2):
        trainer.load_state_dict(best)
        torch.manual_seed(0)
        for _ in range(3):
            trainer.step(**case.data())
        runs.append(everything(case, generator=False))
    assert same(*runs)


def test_so_is_that_of_a_trainer_of_one_network() -> None:
    case = toy("batch_norm")
    optimizer = torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9)
    trainer = metapl.LossTrainer(case.student, optimizer=optimizer)
    trainer.step(case.labeled)
    best, runs = trainer.state_dict(), []
    for _ in range(2):
        trainer.load_state_dict(best)
        for _ in range(3):
            trainer.step(case.labeled)
        runs.append(everything(case, generator=False))
    assert same(*runs)


def test_the_weights_of_a_fit_are_a_snapshot() -> None:
    case = toy("batch_norm")
    trainer = trainer_for(case)
    found = trainer.fit([case.labeled], [case.unlabeled], steps=2, progress=False)
    before = copy.deepcopy(found.weights)
    trainer.step(**case.data())
    assert all(torch.equal(t, before[name]) for name, t in found.weights.items())
    assert not torch.equal(case.student[0].weight, before["0.weight"])


# ------------------------------------------------------------------------------------------------ problems of one's own


class Reweighting:
    """The teacher weighs each example by the student's own loss on it; a batch is (x, noisy label)."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        losses = F.cross_entropy(student_outputs, batch[1], reduction="none")
        return Signal(teacher(losses.unsqueeze(-1)).squeeze(-1).sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def reweighting(**options: Any) -> tuple[Toy, metapl.BilevelTrainer]:
    case = toy("mlp", teacher=lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    case = Toy(case.teacher, case.student, case.labeled, (case.unlabeled, torch.tensor([2, 0, 1, 1])), case.seed)
    return case, trainer_for(case, problem=Reweighting(), **options)


def test_a_problem_of_ones_own_needs_no_teacher_losses() -> None:
    """By default it has none; the teacher's step is the hypergradient's."""
    case, trainer = reweighting(outer_optimizer=None)
    trainer.outer_optimizer.param_groups[0].update(lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    inner = trainer.inner_optimizer
    found = metapl.hypergradient(**case.networks(), **case.data(), problem=Reweighting(), inner_optimizer=inner)
    before = values(case.teacher)
    trainer.step(**case.data())
    assert error({n: before[n] - p for n, p in values(case.teacher).items()}, found.grads) < 1e-12
    with pytest.raises(MetaplError, match="there are no teacher losses to measure the feedback by"):
        reweighting(feedback_ratio=0.1)
    with pytest.raises(MetaplError, match="cannot train without feedback"):
        trainer.teacher_step(**case.data())


def test_it_can_be_fitted_with_validation_data() -> None:
    """Where the teacher is no classifier, the student alone has an accuracy."""
    case, trainer = reweighting()
    data = {"labeled": [case.labeled], "unlabeled": [case.unlabeled], "steps": 2, "progress": False}
    found = trainer.fit(**data, validation=case.labeled, validate_every=1)
    assert found.validation_accuracy is not None
    assert "teacher_validation_accuracy" not in found.history[-1]
    with pytest.raises(MetaplError, match="gives no class logits; leave truth out"):
        trainer.fit(**data, validation=case.labeled, truth=case.labeled)


def test_and_says_whether_its_teacher_is_a_classifier() -> None:
    class Correcting(ByForward):
        teacher_classifies = True

    case = toy("mlp", teacher=Labeller)
    trainer = trainer_for(case, problem=Correcting(), teacher_losses=())
    found = trainer.fit(
        [case.labeled], [case.unlabeled], steps=2, progress=False, validation=case.labeled, validate_every=1
    )
    assert "teacher_validation_accuracy" in found.history[-1]


class Anchored(metapl.PseudoLabels):
    """The student's logits are drawn towards the teacher's, which the loss reads from ``signal.outputs``."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        anchor = self.read(signal.outputs)
        return super().inner_loss(outputs, signal, batch, params) + 0.1 * (anchor - outputs).square().mean(1)

    def read(self, outputs: Any) -> Tensor:
        return outputs.detach()


class AnchoredWithGraph(Anchored):
    def read(self, outputs: Any) -> Tensor:
        return outputs


@pytest.mark.parametrize("problem", [Anchored, AnchoredWithGraph], ids=["constants", "with_graph"])
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_an_inner_loss_may_read_the_teachers_outputs(mode: str, problem: type[Anchored]) -> None:
    """Against double backward with the graph through the label, and through the outputs where the loss keeps it."""
    case = toy("mlp")
    theta, phi = weights(case.student), weights(case.teacher)
    z = functional_call(case.student, theta, (case.unlabeled,))
    logits = functional_call(case.teacher, phi, (case.unlabeled,))
    anchor = problem.read(problem(), logits)
    losses = -(logits.softmax(-1) * z.log_softmax(-1)).sum(-1) + 0.1 * (anchor - z).square().mean(1)
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
    moved = {n: p - 0.3 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = F.cross_entropy(functional_call(case.student, moved, (case.labeled[0],)), case.labeled[1])
    expected = dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    found = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=problem(), inner_optimizer=inner)
    assert error(found.grads, expected) < (1e-4 if mode == "difference" else 1e-9)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    before = {n: p.detach().clone() for n, p in case.teacher.named_parameters()}
    outer_optimizer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    trainer_for(
        case, mode, problem=problem(), inner_optimizer=inner, outer_optimizer=outer_optimizer, teacher_losses=()
    ).step(**case.data())
    moved = {n: before[n] - p.detach() for n, p in case.teacher.named_parameters()}
    assert error(moved, expected) < (1e-4 if mode == "difference" else 1e-9)


class OutputsAlone(AnchoredWithGraph):
    """Nothing but the teacher's logits teaches the student."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (signal.outputs - outputs).square().mean(1)


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_an_inner_loss_may_read_nothing_but_the_teachers_outputs(mode: str) -> None:
    case = toy("mlp")
    found = {
        one: metapl.hypergradient(
            **case.networks(),
            **case.data(),
            mode=one,
            problem=OutputsAlone(),
            inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
        )
        for one in (mode, "unrolled")
    }
    assert error(found[mode].grads, found["unrolled"].grads) < (1e-4 if mode == "difference" else 1e-9)
    assert not found[mode].feedback.any()


@pytest.mark.parametrize("how", ["permuted", "class_means", "random_sign"])
def test_a_control_alters_the_feedback_on_every_field(how: Any) -> None:
    """Each part of it by the same permutation or coins."""
    case = toy("mlp")
    options = {"inner_optimizer": torch.optim.SGD(case.student.parameters(), lr=0.3)}
    altered, plain = (
        metapl.hypergradient(
            **case.networks(), **case.data(), **options, problem=problem, mode=metapl.feedback.Altered(alteration=how)
        )
        for problem in (OutputsAlone(), ByForwardOfOutputs())
    )
    exact = metapl.hypergradient(**case.networks(), **case.data(), **options, problem=OutputsAlone())
    assert error(altered.grads, plain.grads) < 1e-12
    assert error(altered.grads, exact.grads) > 1e-2


class ByForwardOfOutputs(metapl.PseudoLabels):
    """:class:`OutputsAlone` with the logits as the signal's value."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (signal.value - outputs).square().mean(1)


class Steep(AnchoredWithGraph):
    """Its derivative in the teacher's outputs is infinite."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        steep = (signal.outputs - signal.outputs.detach()).abs().sqrt().sum(1)
        return super().inner_loss(outputs, signal, batch, params) + steep * outputs.sum(1)


@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_feedback_that_is_not_finite_is_refused_in_every_field(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=Steep())
    with unmoved(case), pytest.raises(MetaplError, match="the feedback is NaN or infinite"):
        trainer.step(**case.data())
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    with pytest.raises(MetaplError, match="the feedback is NaN or infinite"):
        metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=Steep(), inner_optimizer=inner)


class Shares:
    """The teacher weighs each example against the others of the batch that the loss is given."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch).sigmoid()[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value / signal.value.mean() * outputs.square().sum(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_micro_batches_and_a_loss_that_looks_at_the_whole_batch(mode: str, dtype: torch.dtype) -> None:
    """It is given a micro-batch, in the student's step as in the feedback on it."""
    case = toy("mlp", rows=8, dtype=dtype)
    case = Toy(case.teacher, case.student, (case.labeled[0][:8], case.labeled[1][:8]), case.unlabeled, 0)
    theta, phi = weights(case.student), weights(case.teacher)
    z = functional_call(case.student, theta, (case.unlabeled,)).square().sum(1)
    share = functional_call(case.teacher, phi, (case.unlabeled,)).sigmoid()[:, 0]
    halves = [(q / q.mean() * one).mean() for q, one in zip(share.chunk(2), z.chunk(2), strict=True)]
    g = torch.autograd.grad((halves[0] + halves[1]) / 2, list(theta.values()), create_graph=True)
    moved = {n: p - 0.3 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = F.cross_entropy(functional_call(case.student, moved, (case.labeled[0],)), case.labeled[1])
    grads = torch.autograd.grad(outer, list(phi.values()))
    before = values(case.teacher)
    trainer_for(
        case,
        mode,
        problem=Shares(),
        accumulate=2,
        inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
        outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=1.0),
    ).step(**case.data())
    found = {n: before[n] - p for n, p in values(case.teacher).items()}
    assert error(found, dict(zip(phi, grads, strict=True))) < 1e-3


@pytest.mark.parametrize("mode", SAMPLED)
def test_a_derivative_that_the_feedback_leaves_out_is_refused(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=AnchoredWithGraph())
    text = r"inner_loss has a derivative in signal\.outputs.*signal\.outputs\.detach\(\)"
    with unmoved(case), pytest.raises(MetaplError, match=text):
        trainer.step(**case.data())
    trainer_for(case, mode, problem=Anchored()).step(**case.data())
    trainer_for(case, "none", problem=AnchoredWithGraph()).step(**case.data())


# ------------------------------------------------------------------------------------------------------- slips


SLIPS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a problem's class": (
        lambda: {"problem": metapl.PseudoLabels},
        r"problem is the class PseudoLabels.*problem=PseudoLabels\(\)",
    ),
    "a single loss": (
        lambda: {"teacher_losses": metapl.CrossEntropy()},
        r"teacher_losses is CrossEntropy\(.*\) alone.*\(CrossEntropy\(\),\)",
    ),
    "a loss's class": (
        lambda: {"teacher_losses": (metapl.CrossEntropy,)},
        r"teacher_losses holds the class CrossEntropy.*write CrossEntropy\(\)",
    ),
    "a loss's name": (lambda: {"teacher_losses": ("uda",)}, r"teacher_losses holds a value of type str"),
    "a text": (lambda: {"teacher_losses": "uda"}, r"teacher_losses is of type str; expected a tuple of losses"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_of_the_pen_is_told(slip: str) -> None:
    options, text = SLIPS[slip]
    case = toy("mlp")
    refused(lambda: trainer_for(case, **options()), text, *case.networks().values())


def test_a_single_loss_is_told_by_the_trainer_of_one_network_too() -> None:
    optimizer = torch.optim.SGD((model := mlp()).parameters(), lr=0.1)
    refused(lambda: metapl.LossTrainer(model, metapl.CrossEntropy(), optimizer=optimizer), r"losses is Cross.*alone")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_labels_beside_unlabelled_inputs_are_refused(dtype: torch.dtype) -> None:
    case = toy("mlp")
    pair = case.unlabeled, torch.zeros(4, dtype=dtype)
    with unmoved(case), pytest.raises(MetaplError, match=r"two views of the same examples.*leave the labels out"):
        trainer_for(case).step(case.labeled, pair)


# ------------------------------------------------------------------------------------------------------- two threads


def in_threads(*runs: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def guarded(run: Callable[[], Any]) -> None:
        try:
            run()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_threads_take_turns() -> None:
    """Two trainers as well: dropout masks are replayed by generators that the whole process shares."""
    under_way: list[int] = []

    class Watching(metapl.PseudoLabels):
        def signal(self, *given: Any, **options: Any) -> Signal:
            assert under_way == []
            under_way.append(threading.get_ident())
            time.sleep(0.002)
            return super().signal(*given, **options)

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            assert under_way == [threading.get_ident()]
            under_way.clear()
            return super().outer_loss(outputs, batch)

    cases = [toy("dropout", seed=seed) for seed in range(2)]
    trainers = [trainer_for(case, problem=Watching()) for case in cases]
    inner = torch.optim.SGD(cases[1].student.parameters(), lr=0.1)
    in_threads(
        lambda: [trainers[0].step(**cases[0].data()) for _ in range(10)],
        lambda: [
            metapl.hypergradient(**cases[1].networks(), **cases[1].data(), problem=Watching(), inner_optimizer=inner)
            for _ in range(10)
        ],
    )


def test_one_trainer_steps_in_two_threads() -> None:
    """Twenty steps are twenty steps."""
    case, twin = toy("mlp"), toy("mlp")
    trainer, again = trainer_for(case, "difference"), trainer_for(twin, "difference")
    in_threads(*[lambda: [trainer.step(**case.data()) for _ in range(10)]] * 2)
    for _ in range(20):
        again.step(**twin.data())
    assert trainer.steps_done == 20
    assert same(everything(case, generator=False), everything(twin, generator=False))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class OnceDifferentiable(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(super().forward(x.flatten(1)))


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_a_backward_pass_that_cannot_be_differentiated_is_refused_by_name(mode: str) -> None:
    """Double backward gives zero for it, without a word."""
    base = toy("mlp")
    case = dataclasses.replace(base, student=OnceDifferentiable(16, 3).double())
    trainer = trainer_for(case, mode)
    text = "marked with @once_differentiable" if mode == "unrolled" else "lacks a derivative that it needs"
    with unmoved(case), pytest.raises(MetaplError, match=text):
        trainer.step(**case.data())
