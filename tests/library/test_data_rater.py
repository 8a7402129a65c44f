"""Rated sequences: the gradient of the rater against double backward of the formulas.

Micro-batches have the same gradient.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import torch
from problems_zoo import same
from reference import error
from torch import Tensor, nn

import metapl
from metapl import MetaplError
from metapl.problems import DataRater

WORDS = 11
WIDTH = 8
LENGTH = 7
ADAMW: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1}


class Language(nn.Module):
    """Logits of the next token from the mean of those so far; of a dict it reads the ids."""

    def __init__(self, outputs: int = WORDS) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, inputs: Any) -> Tensor:
        ids = inputs["input_ids"] if isinstance(inputs, dict) else inputs
        mean = self.embed(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(mean.tanh())


class Rater(Language):
    """Scores (B, 1) of the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, inputs: Any) -> Tensor:
        scores = super().forward(inputs)
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        mask = torch.ones_like(scores[..., 0]) if mask is None else mask.to(scores)
        return 3 * (mask[..., None] * scores).sum(1)


def networks(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Rater().to(dtype), Language().to(dtype)


def tokens(rows: int, seed: int, kind: str = "padded") -> Any:
    """Return ids as a tensor, or a dict whose rows have other lengths.

    The first row of the last quarter has no token at all.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (rows, LENGTH), generator=draw)
    if kind == "tensor":
        return ids
    lengths = torch.randint(2, LENGTH + 1, (rows,), generator=draw)
    lengths[3 * rows // 4] = 1
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    if kind == "padded":
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids, "labels": ids.masked_fill((mask == 0) | (ids == 3), -100)}


def left_out(batch: Any) -> Tensor:
    """Return which tokens are not to be predicted, (B, T)."""
    if isinstance(batch, Tensor):
        return torch.zeros_like(batch, dtype=torch.bool)
    return batch["labels"] == -100 if "labels" in batch else batch["attention_mask"] == 0


def losses_of(z: Tensor, batch: Any) -> list[Tensor]:
    """Return the losses of the tokens of each sequence."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    log_p = z.log_softmax(-1)
    is_left_out = left_out(batch)
    losses_of_sequences = []
    for row in range(len(ids)):
        # A sequence with nothing to predict has no loss, and an empty tensor with a graph.
        losses = [z.sum() * 0]
        for t in range(LENGTH - 1):
            if not is_left_out[row, t + 1]:
                losses.append(-log_p[row, t, ids[row, t + 1]])
        losses_of_sequences.append(torch.stack(losses)[1:])
    return losses_of_sequences


def by_hand(outer: Any, inner: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return dL/d(rater), θ_K and L."""
    rater, student = networks()
    theta = reference.weights(student)
    state = None
    rule = reference.adamw(**ADAMW)
    for batch in inner:
        p = rater(batch)[:, 0].softmax(0)
        sequences = losses_of(reference.outputs_at(student, theta, batch), batch)
        loss = sum(p[i] * tokens.mean() for i, tokens in enumerate(sequences) if len(tokens))
        theta, state = reference.stepped(loss, theta, rule, state)
    judged = torch.cat(losses_of(reference.outputs_at(student, theta, outer), outer)).mean()
    grads = torch.autograd.grad(judged, list(rater.parameters()))
    named_grads = dict(zip((n for n, _ in rater.named_parameters()), grads, strict=True))
    return named_grads, {n: t.detach() for n, t in theta.items()}, judged.detach()


def by_metapl(
    outer: Any, inner: list[Any], mode: Any = "forward", **options: Any
) -> metapl.Hypergradient:
    rater, student = networks()
    return metapl.hypergradient(
        rater,
        student,
        outer=outer,
        inner=metapl.Lookahead(inner),
        mode=mode,
        problem=DataRater(),
        inner_optimizer=torch.optim.AdamW(student.parameters(), **ADAMW),
        **options,
    )


@pytest.mark.parametrize(
    ("mode", "steps", "kind"),
    [
        ("forward", 1, "padded"),
        ("forward", 3, "padded"),
        ("forward", 3, "labels"),
        ("forward", 3, "tensor"),
        ("unrolled", 3, "padded"),
        ("difference", 1, "padded"),
    ],
)
def test_the_gradient_is_that_of_the_formulas(mode: str, steps: int, kind: str) -> None:
    outer = tokens(4, 1, kind)
    inner = [tokens(6, 2 + k, kind) for k in range(steps)]
    grads, moved, loss = by_hand(outer, inner)
    hypergradient = by_metapl(outer, inner, mode)
    near = 1e-5 if mode == "difference" else 1e-9
    assert error(hypergradient.grads, grads) < near
    assert error(hypergradient.student_params, moved) < near
    assert abs(hypergradient.outer_loss - loss) < near


@pytest.mark.parametrize("mode", ["forward", "unrolled"])
def test_micro_batches_share_the_softmax_and_the_tokens(mode: str) -> None:
    """Their rows have other lengths, and other scores."""
    batches = tokens(4, 1), [tokens(4, 2), tokens(4, 3)]
    by_batch = by_metapl(*batches, mode)
    by_parts = by_metapl(*batches, mode, accumulate=2)
    assert error(by_parts.grads, by_batch.grads) < 1e-12
    assert error(torch.cat(list(by_parts.feedback)), torch.cat(list(by_batch.feedback))) < 1e-12
    assert error(by_parts.grads, by_hand(*batches)[0]) < 1e-9


@pytest.mark.parametrize("rows", [[0, 1], [0, 2]])
def test_a_micro_batch_may_have_no_token_to_predict(rows: list[int]) -> None:
    """Two of its sequences are a prompt alone, in one micro-batch or in both."""
    ids = tokens(4, 2, "tensor")
    labels = ids.clone()
    labels[rows] = -100
    inner = [{"input_ids": ids, "labels": labels}]
    by_batch, by_parts = (
        by_metapl(tokens(4, 1), inner, "forward", accumulate=parts) for parts in (1, 2)
    )
    assert error(by_parts.grads, by_batch.grads) < 1e-12
    (h,) = by_parts.feedback
    assert (h[rows] == 0).all()
    assert (h != 0).any()


# --------------------------------------------------------------------------------------- what it is


class Heads(nn.Module):
    """A student or a teacher that returns other shapes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, math.prod(shape))
        self.shape = shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids).mean(1).view(len(ids), *self.shape)


IDS = tokens(6, 1, "tensor")
WRONG: list[dict[str, Any]] = [
    {"inner": (IDS, IDS)},
    {"inner": IDS[:1]},
    {"inner": IDS[:, :1]},
    {"outer": {"ids": IDS}},
    {"outer": {"input_ids": IDS, "labels": IDS[:, 1:]}},
    {"outer": {"input_ids": IDS, "labels": IDS + 5}},
    {"outer": IDS.float()},
    {"inner": {"input_ids": IDS, "attention_mask": 0 * IDS}},
    {"student": Heads(WORDS)},
    {"teacher": Heads(2)},
]


@pytest.mark.parametrize("change", WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    teacher, student = networks(torch.float32)
    options = {
        "teacher": teacher,
        "student": student,
        "outer": IDS,
        "inner": IDS,
        "mode": "forward",
        **change,
    }
    first_state = copy.deepcopy(options["student"].state_dict())
    with pytest.raises(MetaplError):
        metapl.hypergradient(
            **options,
            problem=DataRater(),
            inner_optimizer=torch.optim.AdamW(options["student"].parameters()),
        )
    assert same([*first_state.values()], [*options["student"].state_dict().values()])
