"""One property over drawn calls: what is refused raises a MetaplError and leaves everything bit for bit as it was.

Networks with buffers, masks, gradients, optimizer states, generators and files are drawn by hypothesis, some good steps
are taken, and then a call is drawn of which one argument cannot be meant.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems_zoo import ANYWHERE, STUDENTS, Toy, mlp, noisy_teacher, toy
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl

NAN, INF = float("nan"), float("inf")


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[len(x) % 3] = value
    return x


NETWORKS_OWN = "one pixel too many"
"""Of what the user's own network says that it cannot take it, the words are the network's."""

NOT_INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda x: spoiled(x, NAN),
    "infinite": lambda x: spoiled(x, -INF),
    "no rows": lambda x: x[:0],
    "elsewhere": lambda x: x.to("meta"),
    "text": lambda x: "pictures",
    "number": lambda x: 3,
    "object": lambda x: object(),
    "three views": lambda x: (x, x, x),
    "two lengths": lambda x: (x, x[:2]),
    "texts": lambda x: ["a", "b"],
    "a scalar": lambda x: x.sum(),
    NETWORKS_OWN: lambda x: torch.cat([x, x[..., :1]], -1),
    "other floats": lambda x: x.half(),
    "whole numbers": lambda x: x.long(),
}
NOT_LABELS: dict[str, Callable[[Tensor], Any]] = {
    "too large": lambda y: y + 3,
    "negative": lambda y: y - 3,
    "floats": lambda y: y.double(),
    "bools": lambda y: y > 0,
    "int32": lambda y: y.int(),
    "one-hot": lambda y: nn.functional.one_hot(y, 3),
    "too few": lambda y: y[:2],
    "none": lambda y: None,
    "a list": lambda y: y.tolist(),
    "a column": lambda y: y[:, None],
}
NOT_OPTIONS: dict[str, list[Any]] = {
    "steps": [0, -1, 2.5, "6", True, None],
    "schedule": ["linear", 3, None],
    "warmup": [-1, 99, "2"],
    "wait": [-1, 99],
    "ema_decay": [1.5, -0.1, NAN, "x"],
    "validate_every": [0, 1.5],
    "log_every": [0, -3],
    "save_every": [0, "all"],
    "keep": [0, -1],
    "phase": ["a/b", "..", "", 3],
    "num_workers": [-1, 257, 1.5],
    "validation": ["x", 5, [], (torch.zeros(0, 1, 4, 4), torch.zeros(0).long())],
}
NOT_TRAINERS: dict[str, list[Any]] = {
    "mode": ["foward", "", 3, None, object()],
    "problem": ["labels", 3, object()],
    "inner_optimizer": ["sgd", 0.1, object()],
    "outer_optimizer": ["sgd", 0.1],
    "teacher_losses": ["uda", 3, [3], (None,)],
    "feedback_weight": [NAN, INF, "1", None],
    "feedback_ratio": [-1.0, NAN, "1"],
    "clip_norm": [0, -1.0, NAN, "1"],
    "precision": ["float64", "fp16", 16, None],
    "accumulate": [0, -1, 1.5, "2"],
    "lookahead": [0, -1, 1.5],
    "student": [None, "net", 3, nn.Identity()],
    "teacher": ["net", 3],
}

Call = Callable[[], Any]


def bad_data(draw: st.DrawFn, case: Toy) -> tuple[str, dict[str, Any]]:
    """Both batches, of which one cannot be meant, and in what way."""
    (x, y), u = case.labeled, case.unlabeled
    kind = draw(st.sampled_from(["labels", "labeled inputs", "unlabeled", "no pair"]))
    table = NOT_LABELS if kind == "labels" else NOT_INPUTS
    views = {"three views", "two lengths"} if kind == "labeled inputs" else set()  # a tuple of tensors is an input too
    way = draw(st.sampled_from(sorted(table.keys() - views)))
    return f"{kind}: {way}", {
        "labels": lambda: {"labeled": (x, NOT_LABELS[way](y)), "unlabeled": u},
        "labeled inputs": lambda: {"labeled": (NOT_INPUTS[way](x), y), "unlabeled": u},
        "unlabeled": lambda: {"labeled": (x, y), "unlabeled": NOT_INPUTS[way](u)},
        "no pair": lambda: {"labeled": NOT_INPUTS[way](x), "unlabeled": u},
    }[kind]()


def bad_option(draw: st.DrawFn, table: dict[str, list[Any]]) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(table)))
    return {name: draw(st.sampled_from(table[name]))}


def bad_call(draw: st.DrawFn, case: Toy, trainer: metapl.BilevelTrainer, folder: Path) -> tuple[str, Call]:
    """A call that cannot be meant, and its name."""
    kind = draw(
        st.sampled_from(["step", "hypergradient", "fit", "fit data", "trainer", "evaluate", "load", "state", "save"])
    )
    sgd = torch.optim.SGD(case.student.parameters(), lr=0.1)
    if kind == "step":
        way, data = bad_data(draw, case)
        return f"step, {way}", lambda: trainer.step(**data)
    if kind == "hypergradient":
        mode, (way, data) = draw(st.sampled_from(ANYWHERE)), bad_data(draw, case)
        options = {"mode": mode, "inner_optimizer": sgd}
        return f"hypergradient {mode}, {way}", lambda: metapl.hypergradient(**case.networks(), **data, **options)
    source = {"labeled": [case.labeled], "unlabeled": [case.unlabeled]}
    if kind == "fit":
        options = {"steps": 2, "progress": False, "out": folder / "run"} | bad_option(draw, NOT_OPTIONS)
        return f"fit {options}", lambda: trainer.fit(**source, **options)
    if kind == "fit data":
        name = draw(st.sampled_from(["labeled", "unlabeled", "validation"]))
        data = draw(st.sampled_from([5, "x", object(), [5], [None], [(1, 2)]]))
        options = {"steps": 2, "progress": False, "out": folder / "run"}
        return f"fit {name}={data!r}", lambda: trainer.fit(**{**source, name: data}, **options)
    if kind == "trainer":
        option = bad_option(draw, NOT_TRAINERS)
        return f"trainer {option}", lambda: metapl.BilevelTrainer(**{**case.networks(), **option})
    if kind == "evaluate":
        name = draw(st.sampled_from(["evaluate", "predict"]))
        x, y = case.labeled
        way = draw(st.sampled_from(["text", "number", "object", NETWORKS_OWN]))
        spoiled_x = NOT_INPUTS[way](x)
        data = (spoiled_x, y) if name == "evaluate" else spoiled_x
        return f"{name} {way}", lambda: getattr(trainer, name)(data)
    if kind == "load":
        path = folder / draw(st.sampled_from(["nothing", "garbage", "empty", "cut", "flipped", "."]))
        return f"load {path.name}", lambda: trainer.load(path)
    if kind == "state":
        state = trainer.state_dict()
        name = draw(st.sampled_from(sorted(state)))
        state = draw(st.sampled_from([{}, {n: v for n, v in state.items() if n != name}]))
        return f"state without {name}", lambda: trainer.load_state_dict(state)
    return kind, lambda: trainer.save(folder / draw(st.sampled_from(["garbage/under", "."])))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Any, ...]:
    student = draw(st.sampled_from(sorted(STUDENTS)))
    teacher = draw(st.sampled_from([mlp, noisy_teacher]))
    mode = draw(st.sampled_from(ANYWHERE))
    options: dict[str, Any] = {
        "mode": mode,
        "accumulate": 1 if mode == "unrolled" else draw(st.sampled_from([1, 2])),
        "recompute_teacher": draw(st.booleans()),
        "clip_norm": draw(st.sampled_from([None, 1.0])),
    }
    return student, teacher, options, draw(st.integers(0, 2)), draw(st.booleans()), draw(st.booleans())


def everything(case: Toy, trainer: metapl.BilevelTrainer, generator: torch.Generator | None, folder: Path) -> list[Any]:
    """What a refused call leaves bit for bit as it was."""
    tensors = [
        t if t is None else t.detach().clone()
        for network in case.networks().values()
        for t in (*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters()))
    ]
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for network in case.networks().values()
        for m in network.modules()
    ]
    randoms = [
        torch.get_rng_state().tolist(),
        None if generator is None else generator.get_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - a draw from the old generator is what is looked for
    ]
    states = pytree.tree_map_only(Tensor, torch.clone, trainer.state_dict())
    # Not those below it: a fit that is refused at its first step has begun its records.
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return [tensors, modules, randoms, pytree.tree_leaves(states), files, trainer.steps_done]


def same(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor):
        return isinstance(now, Tensor) and before.dtype == now.dtype and torch.equal(before, now)
    if isinstance(before, list):
        return len(before) == len(now) and all(map(same, before, now))
    return bool(before == now)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), situations())
def test_what_is_refused_leaves_everything_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, situation: tuple[Any, ...]
) -> None:
    student, teacher, options, steps, own_generator, with_gradients = situation
    case, folder = toy(student, teacher=teacher), tmp_path_factory.mktemp("here")
    case = replace(case, labeled=(case.labeled[0][:4], case.labeled[1][:4]))
    generator = torch.Generator().manual_seed(1) if own_generator else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = metapl.BilevelTrainer(**case.networks(), **options, generator=generator)
        for _ in range(steps):
            trainer.step(**case.data())
        trainer.save(folder / "saved")
        saved = (folder / "saved").read_bytes()
        (folder / "garbage").write_bytes(b"\x80\x04nothing that was saved")
        (folder / "empty").write_bytes(b"")
        (folder / "cut").write_bytes(saved[: len(saved) // 2])
        (folder / "flipped").write_bytes(saved[:-7] + bytes([saved[-7] ^ 1]) + saved[-6:])
        for p in case.student.parameters() if with_gradients else ():
            p.grad = torch.full_like(p, 0.25)
        name, call = data.draw(st.composite(bad_call)(case, trainer, folder), label="call")
        before = everything(case, trainer, generator, folder)
        with pytest.raises((ValueError, RuntimeError, TypeError, LookupError, AttributeError)) as caught:
            call()
    for what, old, new in zip(
        ("tensors", "modules", "generators", "states", "files", "steps"),
        before,
        everything(case, trainer, generator, folder),
        strict=True,
    ):
        assert same(old, new), f"{name}: {what} moved: {caught.value}"
