"""Networks that fill one card: the paper's own pair, a billion weights, and long sequences.

    python benchmarks/gpu.py --plan      # on a CPU; no number is computed: results/large_plan.json

``gpu.py`` measures each of :data:`SETTINGS` as one of its parts, in bfloat16, and writes the
planned memory beside the measured one. The networks are built on the device, and their blocks are
run again in the backward pass (``torch.utils.checkpoint``), as is the teacher
(``recompute_teacher``). Batches come in micro-batches (``accumulate``). Batch norms inside such a
block count each batch twice in their running statistics, as they do in plain PyTorch.

Planned bytes are what ``examples/plan.py`` counts in one step of the same trainer: the storages of
tensors, without what CUDA, cuDNN and cuBLAS take for themselves, and without memory that lies in
pieces. Measured bytes are the most that PyTorch's allocator has given out, weights and optimizers
included.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from harness import HERE, NONE, RESULTS, Row, environment, grid, loaded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import metapl
from metapl.ablation.cost import peak_bytes, seconds
from metapl.problems import DataRater

PLAN = RESULTS / "large_plan.json"
"""What was planned, by setting and mode."""
TABLE_OF_PLAN = RESULTS / "gpu_large.md"
"""The same as a table, beside what was measured."""
MEASURED = RESULTS / "gpu"
"""The folders of what was measured, each with a file for a part."""
EXAMPLES = 4_096
"""Rows of the table of example weights."""
REPEATS = 5
"""Timed steps at most, after the first one."""
ENOUGH = 5.0
"""Seconds of timed steps after which no other is begun."""

Pair = tuple[nn.Module, nn.Module]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---------------------------------------------------------------------------------------- networks


def by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by PyTorch's default, which metapl takes by the math kernel where it has to."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by PyTorch's default, and in blocks of queries where that has no derivative."""
    return metapl.models.attention(q, k, v, is_causal=True)


def by_jvp_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the kernel of the package jvp-flash-attention, which has a forward mode."""
    # Of the package: to compile one configuration of its kernel, not to choose among 54.
    os.environ.setdefault("PYTEST_VERSION", "none")
    module = importlib.import_module("jvp_flash_attention.jvp_attention")
    attended: Tensor = module.JVPAttn.fwd_dual(q, k, v, causal=True)
    return attended


class Block(nn.Module):
    """A block of a causal transformer."""

    def __init__(self, width: int, head: int, attend: Attend) -> None:
        super().__init__()
        self.head_width = head
        self.attend = attend
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, h: Tensor) -> Tensor:
        """Return hidden states (B, T, width) of hidden states (B, T, width)."""
        q, k, v = (
            t.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for t in self.qkv(self.norm(h)).chunk(3, -1)
        )
        heads = self.attend(q, k, v)
        h = h + self.out(heads.transpose(1, 2).flatten(2))
        mixed: Tensor = h + self.mlp(h)
        return mixed


class GPT(nn.Module):
    """A causal language model.

    Args:
        attend: how a head attends, from queries, keys and values (B, heads, T, head).
        reruns: run each block again in the backward pass, in the place of keeping what it computed.
        is_rater: return one score (B, 1) for each sequence, in the place of logits (B, T, words).
    """

    def __init__(
        self,
        words: int = 50_257,
        width: int = 2_048,
        depth: int = 16,
        length: int = 512,
        head: int = 128,
        *,
        attend: Attend = by_pytorch,
        reruns: bool = True,
        is_rater: bool = False,
    ) -> None:
        super().__init__()
        self.is_rater = is_rater
        self.reruns = reruns
        self.embed = nn.Embedding(words, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, head, attend) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1 if is_rater else words)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        h = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.reruns else block(h)
        h = self.norm(h)
        outputs: Tensor = self.head(h.mean(1) if self.is_rater else h)
        return outputs


class TableOfScores(nn.Module):
    """A rater that holds a score for each training example, at first 0."""

    def __init__(self, examples: int = EXAMPLES) -> None:
        super().__init__()
        self.scores = nn.Embedding(examples, 1)
        nn.init.zeros_(self.scores.weight)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the scores (B, 1) of the sequences with these indices."""
        scores: Tensor = self.scores(batch["index"])
        return scores


def efficientnets(name: str) -> Pair:
    """Build two networks of timm by their name, with fresh weights and blocks that run again."""
    import timm

    pair = timm.create_model(name), timm.create_model(name)
    for network in pair:
        # timm's checkpoints are those without reentrance, which have derivatives forward.
        network.set_grad_checkpointing()
        network.to(memory_format=torch.channels_last)
    return pair


def table_and_gpt(**options: Any) -> Pair:
    return TableOfScores(), GPT(**options)


def two_gpts(**options: Any) -> Pair:
    return GPT(is_rater=True, **options), GPT(**options)


# ----------------------------------------------------------------------------------------- batches


def pictures(labeled: int, unlabeled: int, side: int, classes: int, device: str) -> tuple[Any, Any]:
    """Return a labeled batch, and an unlabeled one of two views, as UDA takes it."""

    def images(count: int) -> Tensor:
        drawn = torch.rand(count, 3, side, side, device=device)
        return drawn.contiguous(memory_format=torch.channels_last)

    labels = torch.arange(labeled, device=device) % classes
    return (images(labeled), labels), (images(unlabeled), images(unlabeled))


def sequences(outer: int, inner: int, length: int, words: int, device: str) -> tuple[Any, Any]:
    """Return token ids of an outer batch, and those of an inner one with its indices."""
    outer_ids = torch.randint(words, (outer, length), device=device)
    inner_ids = torch.randint(words, (inner, length), device=device)
    index = torch.arange(inner, device=device)
    return {"input_ids": outer_ids}, {"input_ids": inner_ids, "index": index}


# ---------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """A pair of networks that is measured, and its batches.

    Args:
        build: makes teacher and student on torch's default device.
        draw: makes the outer and the inner batch on a device.
        examples: how many a step reads, of both batches together; the two views of a picture are
            one.
        accumulate: micro-batches that each batch is split into.
        problem: None: pseudo-labels.
        attends: whether it is said by which kernels attention ran.
    """

    build: Callable[[], Pair]
    draw: Callable[[str], tuple[Any, Any]]
    examples: int
    accumulate: int
    problem: metapl.BilevelProblem | None = None
    attends: bool = False

    def trainer(self, mode: str, teacher: nn.Module, student: nn.Module) -> metapl.BilevelTrainer:
        """Return a trainer of the pair; SGD, whose state is one number for each weight."""
        return metapl.BilevelTrainer(
            teacher,
            student,
            mode,
            problem=self.problem,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.01, momentum=0.9),
            feedback_weight=1.0,
            recompute_teacher=True,
            accumulate=self.accumulate,
            precision="bfloat16",
        )


L2, TABLE, PAIR = "EfficientNet-L2 twice", "a billion weights, table", "a billion weights, pair"
LANGUAGE = Setting(
    build=table_and_gpt,
    draw=partial(sequences, 8, 16, 512, 50_257),
    examples=24,
    accumulate=2,
    problem=DataRater(),
)
ATTENTION: dict[str, Attend] = {
    "attention at length 2048, default": by_pytorch,
    "attention at length 2048, in blocks": in_blocks,
    "attention at length 2048, jvp-flash": by_jvp_flash,
}
"""How the long sequences are attended to."""
LONG_GPT: Row = {"words": 8_192, "width": 1_024, "depth": 4, "length": 2_048, "head": 64}
SETTINGS: dict[str, Setting] = {
    L2: Setting(
        # 480 million weights each.
        build=partial(efficientnets, "tf_efficientnet_l2"),
        draw=partial(pictures, 4, 16, 475, 1_000),
        examples=20,
        accumulate=2,
    ),
    TABLE: LANGUAGE,
    PAIR: replace(LANGUAGE, build=two_gpts),
}
SMALL_GPT: Row = {"words": 211, "width": 64, "depth": 3, "length": 24, "head": 16}
SMALL_LANGUAGE = Setting(
    build=partial(table_and_gpt, **SMALL_GPT),
    draw=partial(sequences, 8, 16, 24, 211),
    examples=24,
    accumulate=2,
    problem=DataRater(),
)
MINIATURES: dict[str, Setting] = {
    L2: Setting(
        # The smallest of the kind.
        build=partial(efficientnets, "test_efficientnet"),
        draw=partial(pictures, 4, 8, 48, 1_000),
        examples=12,
        accumulate=2,
    ),
    TABLE: SMALL_LANGUAGE,
    PAIR: replace(SMALL_LANGUAGE, build=partial(two_gpts, **SMALL_GPT)),
}
MODES: dict[str, tuple[str, ...]] = {
    L2: ("reinforce", "forward", "none"),
    TABLE: ("none", "forward", "difference"),
    PAIR: ("none", "forward", "difference"),
}
for _name, _attend in ATTENTION.items():
    _long = {"attend": _attend, "reruns": False}
    SETTINGS[_name] = Setting(
        build=partial(table_and_gpt, **LONG_GPT, **_long),
        draw=partial(sequences, 4, 4, 2_048, 8_192),
        examples=8,
        accumulate=1,
        problem=DataRater(),
        attends=True,
    )
    MINIATURES[_name] = Setting(
        build=partial(table_and_gpt, **{**SMALL_GPT, "length": 320, "depth": 1}, **_long),
        draw=partial(sequences, 2, 2, 320, 211),
        examples=4,
        accumulate=1,
        problem=DataRater(),
        attends=True,
    )
    # The package's kernel has no second derivative backward.
    MODES[_name] = ("forward",) if _attend is by_jvp_flash else ("forward", "unrolled")


# ---------------------------------------------------------------------------------------- the plan


def planned(setting: Setting, mode: str) -> Row:
    """Return the bytes of a step by what they are for, at its fullest, and its operations.

    No number is computed: see ``examples/plan.py``.
    """
    examples = str(HERE.parent / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    plan = importlib.import_module("plan")
    with torch.device("meta"):
        teacher, student = setting.build()
    step = plan.rehearse(
        [teacher, student], partial(setting.trainer, mode), partial(setting.draw, "cpu")
    )
    phase = max(step.phases, key=lambda name: sum(step.phases[name].values()))
    fullest = step.phases[phase]
    return {
        "planned_bytes": sum(fullest.values()),
        "fullest_in": phase,
        "planned_by_use": fullest,
        "tflop": step.flops / 1e12,
    }


def plan_all(plans: Row) -> Iterator[Row]:
    """Yield what is planned so far, one setting and mode more at a time, without those in it."""
    plans = {"measured_on": environment()} | plans
    for name, setting in SETTINGS.items():
        if ATTENTION.get(name) is by_jvp_flash:
            # Its kernel runs on a GPU alone, also without numbers.
            continue
        for mode in MODES[name]:
            if f"{name}, {mode}" in plans:
                continue
            start = time.perf_counter()
            plans[f"{name}, {mode}"] = planned(setting, mode)
            took = time.perf_counter() - start
            print(f"{name}, {mode}: {plans[f'{name}, {mode}']}, {took:.0f} s", flush=True)
            yield plans


def committed_rows() -> list[Row]:
    """Return the rows of these settings that were measured on a GPU, the newest folder last."""
    found: list[Row] = []
    for file in sorted(MEASURED.glob("*/*.json")):
        rows_of_file = loaded(file)
        if isinstance(rows_of_file, list):
            found += [row for row in rows_of_file if row.get("setting") in SETTINGS]
    return found


def table(plans: Row, measured_rows: Sequence[Row]) -> str:
    """Return a row for each setting and mode that was planned, with its last measurement."""
    last = {(row["setting"], row["mode"]): row for row in measured_rows if "seconds" in row}
    lines = []
    for name in SETTINGS:
        for mode in MODES[name]:
            plan = plans.get(f"{name}, {mode}")
            if plan is None:
                continue
            cells = [
                name,
                f"`{mode}`",
                f"{plan['tflop']:.3g}",
                f"{plan['planned_bytes'] / 1e9:.1f}",
            ]
            row = last.get((name, mode))
            if row is None:
                cells += 4 * [NONE]
            else:
                cells += [f"{row['bytes'] / 1e9:.1f}", f"{row['seconds']:.3g}"]
                cells += [f"{row['first_seconds']:.3g}", row["order"] or NONE]
            lines.append(cells)
    head = ["networks", "mode", "TFLOP", "planned, GB", "measured, GB", "a step, s", "the first, s"]
    return grid([*head, "order"], lines, "llrrrrrl") + "\n"


# ------------------------------------------------------------------------------------ measurements


def rows(part: Any, done: Sequence[Row], device: str, *, is_small: bool) -> Iterator[list[Row]]:
    """Yield a row for each mode of a part, without those ``done``.

    What stops, for want of memory say, is a row with its reason.

    Args:
        part: its ``network`` is a name of :data:`SETTINGS`, and its ``modes`` are measured.
    """
    name = part.network
    setting = MINIATURES[name] if is_small else SETTINGS[name]
    plans: Row = loaded(PLAN) if PLAN.exists() and not is_small else {}
    for mode in part.modes:
        if any(row["mode"] == mode for row in done):
            continue
        row: Row = {"setting": name, "mode": mode, "examples": setting.examples}
        row |= plans.get(f"{name}, {mode}", {})
        try:
            if is_small:
                row |= planned(setting, mode)
            row |= measured(setting, mode, torch.device(device))
        # A kernel of another package may raise anything.
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row["reason"] = f"stops: {type(error).__name__}: {lines[0][:160]}"
        # The traceback of an error, and cycles of its frames, hold the networks.
        gc.collect()
        if device == "cuda":
            row["bytes"] = torch.cuda.max_memory_allocated()
            row["reserved_bytes"] = torch.cuda.max_memory_reserved()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield [row | {"measured_on": environment()}]


def measured(setting: Setting, mode: str, device: torch.device) -> Row:
    """Return what one step takes, after a first one, and what verified that one."""
    torch.manual_seed(0)
    start = time.perf_counter()
    with device:
        teacher, student = setting.build()
    outer, inner = setting.draw(device.type)
    trainer = setting.trainer(mode, teacher, student)
    row: Row = {
        "teacher_weights": sum(p.numel() for p in teacher.parameters()),
        "student_weights": sum(p.numel() for p in student.parameters()),
        "accumulate": setting.accumulate,
        "build_seconds": time.perf_counter() - start,
    }
    reports = []

    def step() -> None:
        reports.append(trainer.step(outer=outer, inner=inner))

    row["first_seconds"] = seconds(step, device)
    row["verification"] = trainer.verification.verdict
    row["order"] = reports[0].order
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH:
        # The report of a step holds the student's outputs.
        reports.clear()
        times.append(seconds(step, device))
    row["steps"] = len(times)
    row["seconds"] = statistics.median(times)
    row["seconds_per_example"] = row["seconds"] / setting.examples
    try:
        scalars = reports[-1].as_dict()
    except metapl.MetaplError as error:
        # A check of the step that has failed on the device; the time and the memory are known.
        row["fault"] = str(error)[:160]
    else:
        row["inner_loss"] = scalars["inner_loss"]
        row["is_finite"] = all(map(math.isfinite, scalars.values()))
    reports.clear()
    if setting.attends:
        row["attention"] = attention_kernels(step)
        reports.clear()
    if device.type == "cpu":
        # The profiler counts what a step adds.
        row["bytes"] = standing_bytes(trainer) + peak_bytes(step, device)
    return row


def attention_kernels(step: Callable[[], Any]) -> dict[str, int]:
    """Return how often a step calls each kernel of ``F.scaled_dot_product_attention``."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        step()
    calls: dict[str, int] = {}
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::_scaled_dot_product_")
        if name != event.key and not name.endswith("_backward"):
            calls[name] = event.count
    return calls


def standing_bytes(trainer: metapl.BilevelTrainer) -> int:
    """Return the bytes of a trainer's weights, buffers and optimizer states between two steps."""
    tensors: list[Tensor] = []
    for network in trainer.networks.values():
        tensors += [*network.parameters(), *network.buffers()]
    for optimizer in trainer.schedulable:
        tensors += [t for t in pytree.tree_leaves(optimizer.state) if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors)


def shown(row: Row) -> list[str]:
    """Return the cells of a row: what was measured, the result, the goal."""
    what = f"{row['setting']}: `{row['mode']}`"
    goal = "80 GB"
    gigabytes = f"{row['bytes'] / 1e9:.3g} GB" if "bytes" in row else "memory not known"
    if "planned_bytes" in row:
        gigabytes += f" ({row['planned_bytes'] / 1e9:.3g} planned)"
    if "reason" in row:
        return [what, f"{row['reason']}; {gigabytes}", goal]
    rate = ""
    if "tflop" in row:
        rate = f", {row['tflop'] / row['seconds']:.3g} TFLOP/s"
    result = (
        f"{gigabytes}, {row['seconds']:.3g} s a step of {row['examples']}, "
        f"{row['seconds_per_example']:.3g} s an example{rate}, first step "
        f"{row['first_seconds']:.0f} s; {row['verification']}"
    )
    if "attention" in row:
        kernels = [f"{count} {name}" for name, count in row["attention"].items()]
        result += f"; attention by {', '.join(kernels)}"
    if "fault" in row:
        result += f"; FAULT: {row['fault']}"
    return [what, result, goal]
