"""Recordings of trainers that are not ours, against loops by hand.

The loops by hand differentiate the whole training by double backward, and know nothing of metapl.
They are given the batches and the generators that the trainer had.
"""

from __future__ import annotations

import ast
import re
import runpy
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

ROOT = Path(__file__).parents[2]

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
    ("dtype", "tolerance", "has_data"),
    [(torch.float64, 1e-8, False), (torch.float32, 2e-4, True)],
    ids=["64", "32"],
)
def test_scores_of_a_transformers_trainer_are_those_of_a_loop_by_hand(
    dtype: torch.dtype, tolerance: float, has_data: bool, tmp_path: Path
) -> None:
    """AdamW, a linear warm-up, clipping, dropout, and accumulation of two.

    The examples are numbered by the data set, or as they were first seen.
    """
    network = gpt2(dtype, dropout=0.1)
    trainer = trainer_of(network, tmp_path)
    seen = Seen()
    seen.watch(trainer)
    out = tmp_path / "recording"
    data = TRAIN if has_data else None
    with metapl.record(
        network, out=out, problem=NextToken(), train=data, states_every=3
    ) as recording:
        trainer.train()
    assert len(seen.batches) == 2 * STEPS
    assert recording.steps == STEPS
    assert recording.loss_factor == (LENGTH - 1) / LENGTH

    scores, loss, theta = by_hand(gpt2(dtype, dropout=0.1), seen)
    attribution = recording.attribute(OUTER, smoothing=0.0, progress=False)
    # The trainer's own weights, which moved by clipped steps.
    for name, p in network.named_parameters():
        assert (p - theta[name]).abs().max() < tolerance
    assert abs(attribution.outer_loss - loss) < tolerance
    rows = torch.cat([batch["input_ids"] for batch in seen.batches])
    numbers = [number_of(row) for row in rows]
    place = torch.arange(EXAMPLES)
    if not has_data:
        place = torch.tensor([*dict.fromkeys(numbers)])
    assert place[recording.order.flatten()].tolist() == numbers
    size = scores.abs().max()
    assert (attribution.scores - scores[place]).abs().max() <= tolerance * size
    # They are no rounding, and the largest is not the only one.
    assert scores.abs().median() > 1e-2 * size

    by_token = NextToken(per="token")
    opened = metapl.Recording.open(out, gpt2(dtype, dropout=0.1), problem=by_token, train=data)
    tokens = opened.attribute(OUTER, smoothing=0.0, progress=False).scores
    assert tokens.shape == (EXAMPLES, LENGTH)
    by_hand_tokens, _, _ = by_hand(gpt2(dtype, dropout=0.1), seen, per_token=True)
    assert (tokens[:, 1:] - by_hand_tokens[place]).abs().max() <= tolerance * size


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the examples are not installed")
def test_the_example_finds_random_bytes_among_documentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    main = runpy.run_path(str(ROOT / "examples" / "record_a_trainer.py"))["main"]
    main(60, tmp_path)
    printed = capsys.readouterr().out
    share = re.search(r"of the 16 lowest scores, (\d+) % are random bytes", printed)
    assert share is not None
    # 15 of 16 on the machine of the page.
    assert int(share[1]) >= 75
    assert (tmp_path / "scores.csv").is_file()


# ------------------------------------------------------------------------- Lightning and accelerate


def pictures() -> tuple[Tensor, Tensor]:
    """Return the digits of scikit-learn as pictures, (N, 1, 8, 8), and their labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    x, y = datasets.load_digits(return_X_y=True)
    return torch.tensor(x / 16).view(-1, 1, 8, 8), torch.tensor(y)


def vision_network() -> nn.Sequential:
    torch.manual_seed(5)
    layers = [
        nn.Conv2d(1, 4, 3),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(36, 10),
    ]
    return nn.Sequential(*layers).double()


def vision_scores_by_hand(
    states: list[Tensor], batches: list[Tensor], outer: tuple[Tensor, Tensor], *, parts: int
) -> Tensor:
    """Return the scores of SGD with momentum, a falling rate and clipping by double backward.

    Args:
        states: the generator before each call of the network.
        batches: the examples of each call.
        parts: how many calls a step has.
    """
    x, y = pictures()
    network = vision_network().train()
    theta = {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters()}
    weights = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    momentum = {name: torch.zeros_like(t) for name, t in theta.items()}
    steps = len(batches) // parts
    for step in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for j in range(step * parts, (step + 1) * parts):
            torch.set_rng_state(states[j])
            rows = batches[j]
            outputs = torch.func.functional_call(network, theta, (x[rows],))
            losses = nn.functional.cross_entropy(outputs, y[rows], reduction="none")
            loss = loss + (weights[rows] * losses).mean() / parts
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        moved = {}
        for (name, t), g in zip(theta.items(), gradients, strict=True):
            momentum[name] = 0.9 * momentum[name] + factor * g
            moved[name] = t - 0.2 * (1 - step / 20) * momentum[name]
        theta = moved
    network.eval()
    outputs = torch.func.functional_call(network, theta, (outer[0],))
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(outputs, outer[1]), weights)
    return -slope


def rate_of(step: int) -> float:
    return 1 - step / 20


class CallsSeen:
    """The generator before each call of a network in a loop, and the examples of the call."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.rows: list[Tensor] = []
        self._x, _ = pictures()

    def look(self, inputs: Tensor) -> None:
        """Note a call that comes next."""
        self.states.append(torch.get_rng_state())
        is_row = (inputs[:, None] == self._x[None]).flatten(2).all(2)
        self.rows.append(is_row.int().argmax(1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scores_of_a_lightning_trainer_are_those_of_a_loop_by_hand(
    accumulate: int, tmp_path: Path
) -> None:
    """A vision network, with clipping, a schedule, a validation, and accumulation."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    x, y = pictures()

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = vision_network()

        def training_step(self, batch: Any, number: int) -> Tensor:
            inputs, labels = batch
            calls.look(inputs)
            return nn.functional.cross_entropy(self.network(inputs), labels)

        def validation_step(self, batch: Any, number: int) -> None:
            self.network(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.network.parameters(), 0.2, momentum=0.9)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    data = torch.utils.data.TensorDataset(x[:40], y[:40])
    loader = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    calls = CallsSeen()
    torch.manual_seed(9)
    out = tmp_path / "recording"
    with metapl.record(module.network, out=out, train=data, states_every=3) as recording:
        trainer.fit(module, loader, loader)
    assert recording.steps == 8 // accumulate
    outer = (x[100:120], y[100:120])
    by_hand = vision_scores_by_hand(calls.states, calls.rows, outer, parts=accumulate)[:40]
    attribution = recording.attribute(outer, smoothing=0.0, progress=False)
    assert (attribution.scores - by_hand).abs().max() < 1e-8 * by_hand.abs().max()


def test_scores_of_a_loop_with_accelerate_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    x, y = pictures()
    data = torch.utils.data.TensorDataset(x[:40], y[:40])
    network = vision_network()
    calls = CallsSeen()
    optimizer = torch.optim.SGD(network.parameters(), 0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of)
    torch.manual_seed(9)
    loader = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
    model, prepared, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    out = tmp_path / "recording"
    with metapl.record(network, prepared, out=out, train=data, states_every=3) as recording:
        for _ in range(2):
            for inputs, labels in loader:
                calls.look(inputs)
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    prepared.step()
                    schedule.step()
                    prepared.zero_grad()
    assert recording.steps == 4
    outer = (x[100:120], y[100:120])
    by_hand = vision_scores_by_hand(calls.states, calls.rows, outer, parts=2)[:40]
    attribution = recording.attribute(outer, smoothing=0.0, progress=False)
    assert (attribution.scores - by_hand).abs().max() < 1e-8 * by_hand.abs().max()
