"""Recordings of trainers that are not ours, against loops by hand.

The loops by hand differentiate the whole training by double backward, and know nothing of metapl.
They are given the batches and the generators that the trainer had.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl
from metapl.problems import NextToken

# Those of other libraries.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")

LENGTH = 24
EXAMPLES = 24
STEPS = 7
RATE = 0.01
WARMUP = 3
CLIP = 0.7
DECAY = 0.1
# Large, so that a step's derivative in the gradient is not rounding alone.
EPSILON = 1e-3


def docstrings() -> Tensor:
    """Return the documentation in some modules of Python's standard library, as bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in ("argparse", "ast", "csv", "heapq"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return torch.tensor(list("\n".join(texts).encode())) % 128


def sequences(first: int, count: int) -> list[dict[str, Tensor]]:
    """Return pieces of the documentation, each as long as the model reads."""
    begin = first * LENGTH
    ids = docstrings()[begin : begin + count * LENGTH].view(count, LENGTH)
    return [{"input_ids": row, "labels": row} for row in ids]


TRAIN = sequences(0, EXAMPLES)
OUTER = {
    name: torch.stack([row[name] for row in sequences(EXAMPLES, 6)])
    for name in ("input_ids", "labels")
}


def gpt2(dtype: torch.dtype, dropout: float) -> Any:
    """Return a GPT-2 of random weights, the same each time, whose loss is in the weights' type."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    if dtype == torch.float64:

        def loss_in_float64(
            logits: Tensor, labels: Tensor, num_items_in_batch: Any, **_: Any
        ) -> Tensor:
            return token_losses(logits, labels).sum() / num_items_in_batch

        # The library's own rounds the logits to float32.
        model.loss_function = loss_in_float64
    return model


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each following token, (B, T − 1)."""
    log_p = logits[:, :-1].log_softmax(2)
    return -log_p.gather(2, labels[:, 1:].unsqueeze(2)).squeeze(2)


class Seen:
    """What a trainer called its model with: each batch, and the generator before it."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.states: list[Tensor] = []

    def watch(self, trainer: Any) -> None:
        loss: Callable[..., Any] = trainer.compute_loss

        def watched(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
            self.batches.append({name: t.clone() for name, t in inputs.items()})
            self.states.append(torch.get_rng_state())
            return loss(model, inputs, **options)

        trainer.compute_loss = watched


def trainer_of(model: Any, out: Path, **options: Any) -> Any:
    import transformers

    usual: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "warmup_steps": WARMUP,
        "weight_decay": DECAY,
        "adam_epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(**{**usual, **options})
    return transformers.Trainer(model=model, args=arguments, train_dataset=TRAIN)


def number_of(row: Tensor) -> int:
    """Return which training sequence has these tokens."""
    (number,) = [i for i, example in enumerate(TRAIN) if example["input_ids"].equal(row)]
    return number


def by_hand(
    model: Any, seen: Seen, *, per_token: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the scores by double backward through the training, its loss and its weights."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    dtype = next(iter(theta.values())).dtype
    shape = (EXAMPLES, LENGTH - 1) if per_token else (EXAMPLES,)
    weights = torch.ones(shape, dtype=dtype, requires_grad=True)
    first = {name: torch.zeros_like(t) for name, t in theta.items()}
    second = {name: torch.zeros_like(t) for name, t in theta.items()}
    model.train()
    for step in range(STEPS):
        loss = torch.zeros((), dtype=dtype)
        for j in (2 * step, 2 * step + 1):
            torch.set_rng_state(seen.states[j])
            batch = seen.batches[j]
            inputs = {"input_ids": batch["input_ids"]}
            logits = torch.func.functional_call(model, theta, kwargs=inputs).logits
            numbers = torch.tensor([number_of(row) for row in batch["input_ids"]])
            w = weights[numbers].reshape(len(numbers), -1)
            # The trainer divides the loss of a GPT-2 by the number of labels of both batches.
            loss = loss + (w * token_losses(logits, batch["labels"])).sum() / (4 * LENGTH)
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        # A linear warm-up from 0, and then a fall in a line to 0.
        rate = RATE * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))
        moved = {}
        for (name, t), gradient in zip(theta.items(), gradients, strict=True):
            g = factor * gradient
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            mean = first[name] / (1 - 0.9 ** (step + 1))
            # The root has no derivative at 0, where the gradient of an unused weight is.
            root = (second[name] / (1 - 0.999 ** (step + 1))).clamp_min(1e-38).sqrt()
            decays = t.ndim > 1 and "ln_" not in name
            decayed = t * (1 - rate * (DECAY if decays else 0.0))
            moved[name] = decayed - rate * mean / (root + EPSILON)
        theta = moved
    model.eval()
    inputs = {"input_ids": OUTER["input_ids"]}
    logits = torch.func.functional_call(model, theta, kwargs=inputs).logits
    outer_loss = token_losses(logits, OUTER["labels"]).mean()
    (slope,) = torch.autograd.grad(outer_loss, weights)
    return -slope, outer_loss.detach(), {name: t.detach() for name, t in theta.items()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4)], ids=["64", "32"]
)
def test_scores_of_a_transformers_trainer_are_those_of_a_loop_by_hand(
    dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    """AdamW, a linear warm-up, clipping, dropout, and accumulation of two."""
    network = gpt2(dtype, dropout=0.1)
    trainer = trainer_of(network, tmp_path)
    seen = Seen()
    seen.watch(trainer)
    out = tmp_path / "recording"
    with metapl.record(network, out=out, problem=NextToken(), states_every=3) as recording:
        trainer.train()
    assert len(seen.batches) == 2 * STEPS
    assert recording.steps == STEPS
    assert recording.loss_factor == (LENGTH - 1) / LENGTH

    scores, loss, theta = by_hand(gpt2(dtype, dropout=0.1), seen)
    attribution = recording.attribute(OUTER, progress=False)
    # The trainer's own weights, which moved by clipped steps.
    for name, p in network.named_parameters():
        assert (p - theta[name]).abs().max() < tolerance
    assert abs(attribution.outer_loss - loss) < tolerance
    # Examples are numbered as they were first seen.
    in_order = torch.empty(EXAMPLES, dtype=torch.int64)
    rows = torch.cat([batch["input_ids"] for batch in seen.batches])
    numbers = recording.order.flatten().tolist()
    for number, row in zip(numbers, rows, strict=True):
        in_order[number] = number_of(row)
    by_recording = torch.zeros_like(attribution.scores)
    by_recording[in_order] = attribution.scores
    size = scores.abs().max()
    assert (by_recording - scores).abs().max() <= tolerance * size
    # They are no rounding, and the largest is not the only one.
    assert scores.abs().median() > 1e-2 * size

    opened = metapl.Recording.open(out, gpt2(dtype, dropout=0.1), problem=NextToken(per="token"))
    tokens = opened.attribute(OUTER, progress=False).scores
    assert tokens.shape == (EXAMPLES, LENGTH)
    by_hand_tokens, _, _ = by_hand(gpt2(dtype, dropout=0.1), seen, per_token=True)
    in_data = torch.zeros_like(tokens)
    in_data[in_order] = tokens
    assert (in_data[:, 1:] - by_hand_tokens).abs().max() <= tolerance * size
