"""Networks, optimizers and options that failed deep inside PyTorch work now, or are refused before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import ANYWHERE, mlp, toy, unmoved
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import refused, trainer_for, values

import metapl
from metapl import MetaplError

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

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
    if wrapper is nn.parallel.DistributedDataParallel:
        text = rf"the {who} (is )?in DistributedDataParallel over the processes 0"
        text = (
            text if where == "whole" else rf"the {who}, a Sequential, has a part in DistributedDataParallel.*expected"
        )
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
    text = r"mode 'difference' cannot run here: it runs the student in float32, and a cast inside.*mode=\"forward\""
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
    mend = rf"{who} = metapl\.models\.Logits\({who}\)" if kind == "dict" else "write a module that returns one"
    refused(lambda: trainer.step(**case.data()), rf"the {who} returned a {kind} of.*{mend}", network)
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


# ------------------------------------------------------------------------------------------------------- slips


SLIPS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a problem's class": (
        lambda: {"problem": metapl.PseudoLabels},
        r"problem is the class PseudoLabels.*problem=PseudoLabels\(\)",
    ),
    "a single loss": (
        lambda: {"teacher_losses": metapl.CrossEntropy()},
        r"teacher_losses is CrossEntropy\(.* alone.*\(CrossEntropy\(\),\)",
    ),
    "a loss's class": (
        lambda: {"teacher_losses": (metapl.CrossEntropy,)},
        r"teacher_losses holds the class CrossEntropy.*\(CrossEntropy\(\),\)",
    ),
    "a loss's name": (lambda: {"teacher_losses": ("uda",)}, r"teacher_losses holds 'uda'; expected a tuple"),
    "a text": (lambda: {"teacher_losses": "uda"}, r"teacher_losses is 'uda' alone; expected a tuple of losses"),
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


class FakeQuantized(nn.Module):
    """Weights on a grid, with the gradient of those beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = ((t + ((8 * t).round() / 8 - t).detach()) for t in (self.first.weight, self.second.weight))
        return F.linear(F.linear(x.flatten(1), first, self.first.bias).tanh(), second, self.second.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["difference", metapl.feedback.ReinforcePerExample(tangent="difference")], ids=str)
def test_a_difference_of_outputs_that_jump_is_never_right_by_chance(mode: Any, dtype: torch.dtype) -> None:
    """The derivative of the loss alone agrees in one of ten of these, with feedback that is wrong by its own size."""
    for seed in range(12):
        torch.manual_seed(seed)
        teacher, student = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype), FakeQuantized().to(dtype)
        x, y, u = torch.randn(8, 1, 4, 4, dtype=dtype), torch.arange(8) % 3, torch.randn(8, 1, 4, 4, dtype=dtype)
        inner = torch.optim.SGD(student.parameters(), lr=0.1)
        with pytest.raises(MetaplError, match=r"not of one function|outputs jump|does not return the same outputs"):
            metapl.hypergradient(teacher, student, labeled=(x, y), unlabeled=u, mode=mode, inner_optimizer=inner)


class Own(nn.Module):
    """A student whose forward is changed by ``how``."""

    def __init__(self, how: Callable[[Own, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.energy = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(5, 3)
        self.how, self.calls, self.draw = how, iter(range(10**6)), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)

    def plain(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).tanh())
        return out


def own_feedback(how: Any, mode: Any, dtype: torch.dtype, steps: int = 1, build: Any = Own) -> list[Tensor]:
    torch.manual_seed(0)
    student, teacher = build(how).to(dtype), nn.Linear(5, 3).to(dtype)
    labeled = torch.randn(7, 5, dtype=dtype), torch.arange(7) % 3
    batches = [torch.randn(9, 5, dtype=dtype) for _ in range(steps)]
    found = metapl.hypergradient(
        teacher,
        student,
        labeled=labeled,
        unlabeled=batches[0] if steps == 1 else metapl.Lookahead(batches),
        mode=mode,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
    )
    assert all(p.requires_grad for p in student.parameters())
    return [*found.grads.values()]


@DTYPES
@pytest.mark.parametrize(
    "how",
    [
        lambda student, x: student.plain(x * (1 + 0.1 * next(student.calls))),
        lambda student, x: student.plain(x + torch.randn(x.shape, generator=student.draw).to(x)),
    ],
    ids=["counter", "generator"],
)
def test_losses_of_two_functions_have_no_difference(how: Any, dtype: torch.dtype) -> None:
    with pytest.raises(MetaplError, match=r"the outer loss has another value when it is evaluated again"):
        own_feedback(how, "loss_difference", dtype)


def test_losses_of_one_function_have_a_difference_under_dropout() -> None:
    assert own_feedback(lambda student, x: student.plain(F.dropout(x)), "loss_difference", torch.float32)


def test_losses_that_are_compared_are_of_weights_that_require_a_gradient() -> None:
    """Where forward asks, in later steps too, L(θ) and L(θ′) were of another function than the student learns."""

    def asking(student: Own, x: Tensor) -> Tensor:
        z = student.plain(x)
        return 2 * z if student.training and not z.requires_grad else z

    def trained(late: Any) -> list[Tensor]:
        torch.manual_seed(0)
        student, teacher, generator = Own(Own.plain), nn.Linear(5, 3), torch.Generator().manual_seed(0)
        trainer = metapl.BilevelTrainer(teacher, student, "loss_difference", generator=generator, feedback_weight=100.0)
        labeled, batch = (torch.randn(7, 5), torch.arange(7) % 3), torch.randn(9, 5)
        for step in range(4):
            student.how = late if step > 1 else Own.plain
            trainer.step(labeled, batch)
        return [*teacher.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(asking), trained(Own.plain), strict=True))


class Kind(nn.Parameter):
    pass


class OwnKind(Own):
    """With a weight of another kind, and an attribute on it."""

    def __init__(self, how: Any) -> None:
        super().__init__(how)
        self.a.weight = Kind(self.a.weight.detach())
        self.a.weight.gain = 1.0


@pytest.mark.parametrize(("mode", "steps"), [*((mode, 1) for mode in ANYWHERE), ("forward", 3), ("unrolled", 3)])
@pytest.mark.parametrize(
    "asked",
    [
        lambda weight: isinstance(weight, nn.Parameter),
        lambda weight: type(weight) is Kind,
        lambda weight: hasattr(weight, "gain"),
        lambda weight: weight.requires_grad,
    ],
    ids=["parameter", "kind", "attribute", "learned"],
)
def test_a_forward_that_asks_what_its_weights_are_is_told_the_same_of_those_that_stand_in(
    asked: Any, mode: str, steps: int
) -> None:
    """L(θ′), and later student steps, were of another function than the student learns."""
    found = [
        own_feedback(
            lambda student, x, ask=ask: student.plain(x) * (1 if ask(student.a.weight) else 2),
            mode,
            torch.float64,
            steps,
            OwnKind,
        )
        for ask in (asked, lambda weight: True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def freezing(student: Own, x: Tensor) -> Tensor:
    student.a.weight.requires_grad_(not student.a.weight.requires_grad)
    return student.plain(x)


@pytest.mark.parametrize(
    ("mode", "steps"), [("forward", 1), ("unrolled", 1), ("forward", 3), ("unrolled", 3), ("reinforce", 1)]
)
def test_a_forward_that_freezes_weights_is_refused(mode: str, steps: int) -> None:
    with pytest.raises(MetaplError, match=r"changes requires_grad of its weights.*weight\.detach\(\)"):
        own_feedback(freezing, mode, torch.float64, steps)


def with_slopes(student: Own, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    z = student.plain(x)
    (slopes,) = torch.autograd.grad(z.logsumexp(-1).sum(), x, create_graph=True)
    return z + student.energy(slopes)


@torch.enable_grad()
def with_slopes_anywhere(student: Own, x: Tensor) -> Tensor:
    return with_slopes(student, x)


def by_formula(student: Own, x: Tensor) -> Tensor:
    """As ``with_slopes``, with the gradient written by hand."""
    h = student.a(x).tanh()
    z: Tensor = student.b(h)
    return z + student.energy(((z.softmax(-1) @ student.b.weight) * (1 - h * h)) @ student.a.weight)


@DTYPES
@pytest.mark.parametrize(("mode", "steps"), [("unrolled", 1), ("unrolled", 3), ("forward", 1), ("forward", 3)])
def test_a_student_that_differentiates_in_its_own_input(mode: str, steps: int, dtype: torch.dtype) -> None:
    exact = own_feedback(by_formula, "unrolled", dtype, steps)
    found = own_feedback(with_slopes_anywhere, mode, dtype, steps)
    for one, other in zip(found, exact, strict=True):
        assert error(one, other) < (1e-5 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("mode", ["forward", "difference", "reinforce_per_example"])
def test_without_a_graph_it_is_refused_by_name(mode: str) -> None:
    with pytest.raises(MetaplError, match=r"its forward differentiates .*within torch\.enable_grad\(\)"):
        own_feedback(with_slopes, mode, torch.float64)


class AnotherJvp(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * torch.tensor([1.0, 0.0, 0.0]).to(t)


@DTYPES
@pytest.mark.parametrize("mode", ["forward", "reinforce_per_example"])
def test_a_function_with_another_jvp_than_backward_is_refused(mode: str, dtype: torch.dtype) -> None:
    with pytest.raises(MetaplError, match="a projection of the outputs"):
        own_feedback(lambda student, x: AnotherJvp.apply(student.plain(x)), mode, dtype)
