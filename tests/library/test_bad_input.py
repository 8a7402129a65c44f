"""Whatever cannot be meant is refused, with a useful text, before anything moves; on a device nothing has moved."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import Toy, everything, mlp, same, toy, unmoved
from torch import Tensor, nn

import metapl
from metapl import MetaplError
from metapl.execution import checks
from metapl.feedback import Difference, Forward, Implicit, LossDifference, Reinforce, ReinforcePerExample, Unrolled
from metapl.models import Corrector
from metapl.problems import WeightNet
from metapl.training.loss_trainer import LossTrainer

NAN, INF = float("nan"), float("inf")


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


def labels(case: Toy, *values: int, dtype: torch.dtype = torch.int64) -> Toy:
    return replace(case, labeled=(case.labeled[0], torch.tensor(values, dtype=dtype)))


def with_inputs(case: Toy, x: Tensor) -> Toy:
    return replace(case, labeled=(x, case.labeled[1]))


def unlabeled(case: Toy, batch: Any) -> Toy:
    return replace(case, unlabeled=batch)


def more_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()


BATCHES: dict[str, tuple[Callable[[Toy], Toy], str]] = {
    "label_too_large": (lambda c: labels(c, 0, 1, 2, 3, 1), r"labels run from 0 to 3.*expected 0\.\.2"),
    "label_negative": (lambda c: labels(c, 0, 1, -1, 2, 1), r"labels run from -1 to 2.*expected 0\.\.2"),
    "labels_float": (lambda c: labels(c, 0, 1, 1, 2, 1, dtype=torch.float64), r"float64.*expected integers"),
    "labels_bool": (lambda c: labels(c, 0, 1, 1, 0, 1, dtype=torch.bool), r"bool.*expected integers"),
    "labels_int32": (lambda c: labels(c, 0, 1, 1, 2, 1, dtype=torch.int32), r"int32.*labels\.long\(\)"),
    "labels_one_hot": (
        lambda c: replace(c, labeled=(c.labeled[0], torch.eye(5, dtype=torch.int64))),
        r"shape \(5, 5\).*one class index per example",
    ),
    "too_few_labels": (lambda c: labels(c, 0, 1, 2), r"labeled batch have lengths 5, 3"),
    "labels_missing": (lambda c: replace(c, labeled=c.labeled[0]), r"labeled is a tensor.*expected a pair"),
    "views_of_two_lengths": (
        lambda c: unlabeled(c, (c.unlabeled, c.unlabeled[:2])),
        r"unlabeled batch have lengths 4, 2",
    ),
    "three_views": (lambda c: unlabeled(c, (c.unlabeled,) * 3), r"a tuple of 3.*\(weak view, strong view\)"),
    "no_labelled_rows": (
        lambda c: replace(c, labeled=tuple(t[:0] for t in c.labeled)),
        r"labeled batch is empty.*\(0, 1, 4, 4\)",
    ),
    "no_unlabelled_rows": (lambda c: unlabeled(c, c.unlabeled[:0]), r"unlabeled batch is empty"),
    "labelled_nan": (lambda c: with_inputs(c, spoiled(c.labeled[0], NAN)), r"labeled batch holds NaN or infinite"),
    "labelled_infinite": (lambda c: with_inputs(c, spoiled(c.labeled[0], INF)), r"labeled batch holds NaN or inf"),
    "unlabelled_nan": (lambda c: unlabeled(c, spoiled(c.unlabeled, NAN)), r"unlabeled batch holds NaN"),
    "strong_view_infinite": (
        lambda c: unlabeled(c, (c.unlabeled, spoiled(c.unlabeled, -INF))),
        r"unlabeled batch holds NaN or infinite",
    ),
    "unlabelled_elsewhere": (lambda c: unlabeled(c, c.unlabeled.to("meta")), r"unlabeled batch is on meta.*on cpu"),
    "labelled_elsewhere": (lambda c: with_inputs(c, c.labeled[0].to("meta")), r"labeled batch is on meta.*on cpu"),
    "other_class_count": (
        lambda c: replace(c, teacher=more_classes()),
        r"teacher's outputs have shape \(4, 5\).*\(4, 3\)",
    ),
    "teacher_diverged": (lambda c: diverged(c), r"teacher's outputs are NaN or infinite"),
    "not_a_tensor": (lambda c: unlabeled(c, "images"), r"unlabeled is of type str; expected tensors"),
}


def diverged(case: Toy) -> Toy:
    with torch.no_grad():
        case.teacher[1].bias[0] = NAN
    return case


def with_gradients(case: Toy) -> Toy:
    """Gradients that the caller holds on the student must survive a refusal."""
    for p in case.student.parameters():
        p.grad = torch.full_like(p, 0.25)
    return case


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_wrong_batch_is_refused_and_nothing_moves(kind: str, mode: str) -> None:
    """By ``hypergradient`` and by ``step``, on a student with dropout and running statistics, after a good step."""
    change, text = BATCHES[kind]
    case = with_gradients(noisy())
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.Adam(case.teacher.parameters())
    trainer = metapl.BilevelTrainer(
        **case.networks(), mode=mode, inner_optimizer=inner, outer_optimizer=outer, teacher_losses=()
    )
    trainer.step(**case.data())
    wrong = change(case)
    if wrong.teacher is not case.teacher:  # a trainer keeps the teacher that it was built with
        outer = torch.optim.Adam(wrong.teacher.parameters())
        trainer = metapl.BilevelTrainer(
            **wrong.networks(), mode=mode, inner_optimizer=inner, outer_optimizer=outer, teacher_losses=()
        )
    done = trainer.steps_done
    with_gradients(case)
    with unmoved(wrong, inner, outer), pytest.raises(MetaplError, match=text):
        metapl.hypergradient(**wrong.networks(), **wrong.data(), mode=mode, inner_optimizer=inner)
    with unmoved(wrong, inner, outer), pytest.raises(MetaplError, match=text):
        trainer.step(**wrong.data())
    assert trainer.steps_done == done


def noisy() -> Toy:
    """Dropout and batch norm in both networks: a refusal must put statistics and generators back."""
    case = toy("batch_norm", teacher=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)))
    case.student.append(nn.Dropout(0.3))
    case.teacher.append(nn.Dropout(0.3))
    return case


def build(case: Toy, **options: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The two ways in: ``hypergradient`` and the trainer's construction."""
    options = {"inner_optimizer": torch.optim.SGD(case.student.parameters(), lr=0.1), **options}
    networks = {**case.networks(), **{k: options.pop(k) for k in ("teacher", "student") if k in options}}
    return (
        lambda: metapl.hypergradient(**networks, **case.data(), **options),
        lambda: metapl.BilevelTrainer(**networks, **options),
    )


def other_student(case: Toy) -> list[nn.Parameter]:
    return list(toy("mlp").student.parameters())


def held_in_one_memory(of: nn.Module, part: nn.Module) -> nn.Module:
    """A part with a tensor in the memory of another's weight."""
    part.weight = nn.Parameter(of.weight.data) if isinstance(part, nn.Linear) else of.weight.detach()  # type: ignore[assignment,union-attr]
    return part


def viewed_by(part: nn.Module, *views: Tensor) -> nn.Module:
    """A network that keeps views of its weights as attributes."""
    for i, view in enumerate(views):
        setattr(part, "own" + "_" * i, view)
    return nn.Sequential(*[nn.Identity()] * 3, part)


SETTINGS: dict[str, tuple[Callable[[Toy], dict[str, Any]], str]] = {
    "misspelt_mode": (lambda c: {"mode": "foward"}, r"mode='foward' was given; expected one.*; did you mean forward\?"),
    "unknown_mode": (lambda c: {"mode": "reinforced"}, r"mode='reinforced'.*unrolled, forward, difference, reinforce"),
    "mode_class": (lambda c: {"mode": Reinforce}, r"mode=<class.*expected one of"),
    "mode_number": (lambda c: {"mode": 3}, r"mode=3 was given; expected one of"),
    "sampled_mode_soft_problem": (
        lambda c: {"mode": "reinforce", "problem": metapl.PseudoLabels("soft")},
        r"mode 'reinforce' takes hard labels and PseudoLabels\(kind='soft'\)",
    ),
    "unrolled_hard_problem": (
        lambda c: {"mode": "unrolled", "problem": metapl.PseudoLabels("hard")},
        r"mode 'unrolled' takes soft labels and PseudoLabels\(kind='hard'\)",
    ),
    "no_problem": (lambda c: {"problem": "pseudo_labels"}, r"problem is of type str; expected an object with signal"),
    "other_parameters": (
        lambda c: {"inner_optimizer": torch.optim.SGD(other_student(c), lr=0.1)},
        r"none of which is one of the 4 trainable parameters of the student.*it may be the other network's",
    ),
    "fewer_parameters": (
        lambda c: {"inner_optimizer": torch.optim.SGD(list(c.student.parameters())[:3], lr=0.1)},
        r"holds 3 tensors, the student has 4.*3\.bias",
    ),
    "more_parameters": (
        lambda c: {"inner_optimizer": torch.optim.SGD([*c.student.parameters(), *other_student(c)], lr=0.1)},
        r"holds 8 tensors, the student has 4",
    ),
    "rmsprop": (
        lambda c: {"inner_optimizer": torch.optim.RMSprop(c.student.parameters())},
        r"RMSprop.*cannot be differentiated.*SGD, Adam or AdamW",
    ),
    "torchopt_object": (
        lambda c: {"inner_optimizer": torchopt.Adam(c.student.parameters(), lr=0.1)},
        r"torchopt\..*Adam.*TorchOpt transform such as",
    ),
    "optimizer_class": (
        lambda c: {"inner_optimizer": torch.optim.SGD},
        r"is the class torch\.optim.*SGD; expected an optimizer of the student's parameters",
    ),
    "optimizer_name": (lambda c: {"inner_optimizer": "sgd"}, r"is 'sgd'; expected an optimizer of the student's"),
    "optimizer_subclass": (
        lambda c: {"inner_optimizer": type("Mine", (torch.optim.SGD,), {})(c.student.parameters(), lr=0.1)},
        r"Mine.*these classes themselves",
    ),
    "differentiable": (
        lambda c: {"inner_optimizer": torch.optim.SGD(c.student.parameters(), lr=0.1, differentiable=True)},
        r"differentiable=True.*leave it out",
    ),
    "one_network": (lambda c: {"teacher": c.student}, r"share weights; expected two networks"),
    "shared_layer": (lambda c: {"teacher": nn.Sequential(nn.Flatten(), c.student[1], c.student[3])}, r"share weights"),
    "views_of_the_student": (
        lambda c: {"teacher": nn.Sequential(nn.Flatten(), held_in_one_memory(c.student[1], nn.Linear(12, 4)))},
        r"the student's 1\.weight and the teacher's 1\.weight are two tensors in one memory|"
        r"the teacher's 1\.weight and the student's 1\.weight are two tensors in one memory",
    ),
    "a_view_of_its_own": (
        lambda c: {"student": held_in_one_memory(c.student[3], c.student)},
        r"the student's 3\.weight.*two tensors in one memory.*weight\.detach\(\)\.clone\(\)|"
        r"the student's weight and the student's 3\.weight are two tensors in one memory",
    ),
    "a_view_in_numpy": (
        lambda c: {"student": viewed_by(c.student[3], torch.from_numpy(c.student[3].weight.detach().numpy()))},
        r"the student's 3\.(weight|own) and the student's 3\.(weight|own) are two tensors in one memory",
    ),
    "one_of_many_views": (
        lambda c: {
            "student": viewed_by(c.student[3], *c.student[3].weight.detach().unbind(1), c.student[3].weight.data)
        },
        r"the student's 3\.(weight|own\w*) and the student's 3\.(weight|own\w*) are two tensors in one memory",
    ),
    "other_device": (lambda c: {"teacher": mlp().to("meta")}, r"several devices: teacher on meta; student on cpu"),
    "nothing_to_learn": (
        lambda c: {"teacher": mlp().double().requires_grad_(False)},
        r"teacher has no parameter with requires_grad=True",
    ),
    "not_a_module": (lambda c: {"teacher": lambda x: x}, r"teacher is of type function; expected a torch\.nn\.Module"),
}


@pytest.mark.parametrize("way", ["hypergradient", "trainer"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_wrong_setting_is_refused_by_name(kind: str, way: str) -> None:
    settings, text = SETTINGS[kind]
    case = toy("mlp")
    call = build(case, **settings(case))[way == "trainer"]
    with unmoved(case), pytest.raises(MetaplError, match=text):
        call()


def test_a_weight_that_a_hook_makes_before_each_pass_may_lie_in_the_memory_of_another() -> None:
    case = toy("mlp")
    nn.utils.spectral_norm(case.student[1])
    metapl.BilevelTrainer(**case.networks(), mode="forward").step(**case.data())


def test_what_a_hook_keeps_of_a_pass_may_lie_in_the_memory_of_a_weight() -> None:
    case = toy("mlp")
    layer = case.student[1]
    layer.register_forward_hook(lambda layer, args, output: setattr(layer, "seen", (output, layer.weight.T)[1]))
    case.student(case.unlabeled)
    trainer = metapl.BilevelTrainer(**case.networks(), mode="forward")
    trainer.step(**case.data())


def test_rows_of_one_memory_are_not_shared() -> None:
    """Weights that alternate in one tensor have no entry in common."""
    case = toy("mlp")
    layer = case.student[3]
    both = torch.randn(2 * len(layer.weight), *layer.weight.shape[1:], dtype=torch.float64)
    layer.weight, layer.other = nn.Parameter(both[::2]), both[1::2]
    metapl.BilevelTrainer(**case.networks(), mode="forward").step(**case.data())


OPTIONS: dict[str, tuple[object, str]] = {
    "clip_norm": (0.0, "a number above 0 or None"),
    "precision": ("float16", "'float32', 'bfloat16'"),
    "accumulate": (0, "a number of micro-batches, 1 or more"),
    "compile": (1, "True or False"),
    "feedback_weight": (float("nan"), "a finite number"),
    "feedback_ratio": (-1.0, "a number of 0 or more or None"),
    "recompute_teacher": ("no", "True or False"),
    "lookahead": (1.0, "a number of student steps, 1 or more"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_out_of_its_range_is_refused_by_name(name: str) -> None:
    case, (wrong, text) = toy("mlp"), OPTIONS[name]
    with unmoved(case), pytest.raises(MetaplError, match=rf"^{name}={wrong!r}: expected .*{text}"):
        metapl.BilevelTrainer(**case.networks(), **{name: wrong})
    if name in inspect.signature(metapl.hypergradient).parameters:
        with unmoved(case), pytest.raises(MetaplError, match=rf"^{name}={wrong!r}: expected .*{text}"):
            build(case, **{name: wrong})[0]()
    if name in inspect.signature(LossTrainer).parameters:
        optimizer = torch.optim.SGD(case.student.parameters(), lr=0.1)
        with unmoved(case), pytest.raises(MetaplError, match=rf"^{name}={wrong!r}: expected .*{text}"):
            LossTrainer(case.student, optimizer=optimizer, **{name: wrong})


def test_inner_state_beside_a_torch_optimiser_is_refused() -> None:
    case = toy("mlp")
    call, _ = build(case, inner_state={"momentum": 1})
    with unmoved(case), pytest.raises(MetaplError, match=r"inner_state was given with torch\.optim\.SGD"):
        call()


def test_an_outer_optimiser_must_hold_the_teacher() -> None:
    case = toy("mlp")
    with pytest.raises(MetaplError, match=r"outer_optimizer holds 4 tensors, none of which.* of the teacher"):
        metapl.BilevelTrainer(**case.networks(), outer_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.1))
    with pytest.raises(MetaplError, match=r"outer_optimizer is a .*expected a torch\.optim optimizer"):
        metapl.BilevelTrainer(**case.networks(), outer_optimizer=torchopt.sgd(0.1))


def test_uda_with_one_view_is_refused_and_nothing_moves() -> None:
    case = toy("dropout")
    trainer = metapl.BilevelTrainer(**case.networks(), teacher_losses=(metapl.CrossEntropy(), metapl.UDA()))
    with unmoved(case), pytest.raises(MetaplError, match=r"UDA was given one view.*unlabeled=\(weak, strong\)"):
        trainer.step(**case.data())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: metapl.PseudoLabels("firm"), r"kind='firm'.*'soft', 'hard' or None"),
        (lambda: metapl.PseudoLabels(temperature=0.0), r"temperature=0\.0.*above 0"),
        (lambda: metapl.PseudoLabels(label_smoothing=1.0), r"label_smoothing=1\.0.*\[0, 1\)"),
        (lambda: metapl.CrossEntropy(label_smoothing=-0.1), r"label_smoothing=-0\.1.*\[0, 1\)"),
        (lambda: metapl.UDA(threshold=1.0), r"UDA\(threshold=1\.0\): expected a number in \[0, 1\)"),
        (lambda: metapl.UDA(temperature=-0.1), r"UDA\(temperature=-0\.1\): expected a number of 0 or more"),
        (
            lambda: metapl.UDA(temperature=float("nan")),
            r"UDA\(temperature=nan\): expected a finite number of 0 or more",
        ),
        (
            lambda: metapl.UDA(temperature=float("inf")),
            r"UDA\(temperature=inf\): expected a finite number of 0 or more",
        ),
        (lambda: metapl.UDA(align=1.1), r"align=1\.1\): expected a number in \[0, 1\]"),
        (lambda: metapl.UDA(align=-0.1), r"align=-0\.1\): expected a number in \[0, 1\]"),
        (lambda: metapl.UDA(ramp=-1), r"ramp=-1\): expected a number of steps, 0 or more"),
        (lambda: metapl.UDA(start=-1), r"start=-1\): expected a number of steps, 0 or more"),
        (lambda: Reinforce(similarity="angle"), r"similarity='angle'.*'dot', 'cosine'"),
        (lambda: Reinforce(baseline=1.0), r"baseline=1\.0.*\[0, 1\)"),
        (lambda: Reinforce(similarity="cosine", normalization="learning_rate"), r"does not depend on the learning"),
        (lambda: LossDifference(baseline=-0.5), r"baseline=-0\.5"),
        (lambda: LossDifference(normalization="cosine"), r"normalization='cosine'.*expected one of"),
        (lambda: Forward(normalization="unit"), r"normalization='unit'.*'gradient', 'learning_rate', 'cosine'"),
        (lambda: ReinforcePerExample(tangent="both"), r"tangent='both'.*'forward', 'difference'"),
        (lambda: Difference(relative_step=0.0), r"relative_step=0\.0"),
        *(
            (make, r"expected (a|the) ")
            for make in (
                partial(Forward, keep_every=True),
                partial(Forward, truncate=True),
                partial(Unrolled, truncate=False),
                partial(Implicit, iterations=True),
                partial(Implicit, iterations=NAN),
                partial(WeightNet, 0),
                partial(WeightNet, "10"),
                partial(Corrector, nn.Linear(4, 3), classes=1),
                partial(Corrector, nn.Linear(4, 3), classes=None),
                partial(metapl.Lookahead, b"abc"),
                partial(metapl.Lookahead, (batch for batch in [torch.ones(1)])),
            )
        ),
        *(
            (partial(Implicit, **{name: value}), rf"Implicit\({name}=.*expected a (finite )?number {least}")
            for name, least in (("step_size", "above 0 or None"), ("damping", "of 0 or more"))
            for value in ("2", [], 2 + 1j, NAN, INF, 10**400, torch.ones(2), object())
        ),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_made(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(MetaplError, match=text):
        make()


def test_a_transform_does_not_tell_its_learning_rate() -> None:
    case = toy("mlp")
    call, _ = build(case, mode=Forward(normalization="learning_rate"), inner_optimizer=torchopt.sgd(0.1))
    with unmoved(case), pytest.raises(MetaplError, match=r'TorchOpt transform does not expose.*"gradient"'):
        call()


# --------------------------------------------------------------------------------- where looking would wait


def momentum_trainer(case: Toy, mode: Any, inner: str) -> metapl.BilevelTrainer:
    student = {
        "sgd": lambda: torch.optim.SGD(case.student.parameters(), lr=0.2, momentum=0.9),
        "adam": lambda: torch.optim.Adam(case.student.parameters(), lr=0.02),
        "torchopt": lambda: torchopt.sgd(0.2, momentum=0.9),
    }[inner]()
    teacher = torch.optim.SGD(case.teacher.parameters(), lr=0.2, momentum=0.9)
    return metapl.BilevelTrainer(**case.networks(), mode=mode, inner_optimizer=student, outer_optimizer=teacher)


BAD_VALUES = ["label_too_large", "label_negative", "labelled_nan", "unlabelled_nan"]


@pytest.mark.parametrize("mode", [Reinforce(baseline=0.9), "forward", "loss_difference", "unrolled"])
@pytest.mark.parametrize("inner", ["sgd", "adam", "torchopt"])
@pytest.mark.parametrize("kind", BAD_VALUES)
def test_on_a_device_a_bad_batch_is_told_on_reading(
    kind: str, inner: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the device before the step is taken, so that the weights may be spoiled by then."""
    monkeypatch.setattr(checks, "waits", lambda t: True)
    case = toy("batch_norm")
    trainer = momentum_trainer(case, mode, inner)
    trainer.step(**case.data()).as_dict()
    report = trainer.step(**BATCHES[kind][0](case).data())
    with pytest.raises(MetaplError, match="detected on the device after the step was taken"):
        report.as_dict()


def test_on_a_device_a_good_step_is_the_same_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for deferred in (False, True):
        monkeypatch.setattr(checks, "waits", lambda t, deferred=deferred: deferred)
        case = toy("batch_norm")
        trainer = momentum_trainer(case, "reinforce", "sgd")
        for step in range(3):
            torch.manual_seed(step)
            report = trainer.step(**case.data())
        runs.append([*everything(case, trainer.inner_optimizer, trainer.outer_optimizer), report.feedback])
    assert same(*runs)
