"""``metapl.integrations.transformers``: Trainer with a rater takes the steps of a loop by hand.

The loop by hand differentiates AdamW's formula by double backward, and knows nothing of metapl.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl import MetaplError
from metapl.guards.verification import VerificationWarning
from metapl.problems import Table

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed, which Trainer needs")

from metapl.integrations.transformers import FILE, RatedLoss, weighted  # noqa: E402

ROOT = Path(__file__).parents[2]

# Those of other libraries.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")

WORDS = 12
LENGTH = 6
STEPS = 5
RATE = 0.02
# Large, so that the step has a derivative in the gradient that is not rounding alone.
EPSILON = 1e-3
DECAY = 0.1
CLIP = 0.4
RATER_RATE = 1.0


class Rater(Table):
    """Scores (B,): the mean over the tokens that are no padding."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        scores_BT = super().forward(inputs["input_ids"])
        mask_BT = inputs["attention_mask"]
        return (scores_BT * mask_BT).sum(1) / mask_BT.sum(1)


def rater() -> Rater:
    return Rater(torch.linspace(-1.0, 1.0, WORDS, dtype=torch.float64))


def model(*, dropout: float = 0.0, attention: str = "sdpa") -> Any:
    """Return a GPT-2 of a few thousand random weights, the same each time."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config).double()


def sequences(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Return sequences of tokens; every third one is padded."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(WORDS, (LENGTH,), generator=draw)
        mask = torch.ones(LENGTH, dtype=torch.int64)
        if number % 3 == 0:
            mask[4:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


OUTER = [batch_of(sequences(3, seed=7)), batch_of(sequences(4, seed=8))]


def trainer_of(network: Any, out: Path, *, kind: Any = transformers.Trainer, **options: Any) -> Any:
    usual: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "adam_epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(**{**usual, **options})
    return kind(
        model=network,
        args=arguments,
        train_dataset=sequences(18, seed=1),
        eval_dataset=sequences(5, seed=2),
    )


def rated_trainer(
    out: Path, *, every: int = 1, dropout: float = 0.0, rate: float = RATER_RATE, **options: Any
) -> tuple[Any, RatedLoss, Rater]:
    network = rater()
    trainer = trainer_of(model(dropout=dropout), out, **options)
    rated = weighted(
        trainer,
        network,
        outer=OUTER,
        every=every,
        rater_optimizer=torch.optim.SGD(network.parameters(), lr=rate),
    )
    return trainer, rated, network


# --------------------------------------------------------------------------------- the loop by hand


def losses_of_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each following token, 0 where there is none, and which are."""
    following = labels[:, 1:]
    is_there = following != -100
    log_p = logits[:, :-1].log_softmax(2)
    picked = log_p.gather(2, following.clamp_min(0).unsqueeze(2)).squeeze(2)
    return -picked * is_there, is_there


def outputs(network: Any, theta: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits: Tensor = torch.func.functional_call(network, theta, kwargs=inputs).logits
    return logits


def weighted_loss(
    network: Any, theta: dict[str, Tensor], weights: Tensor, batch: dict[str, Tensor]
) -> Tensor:
    losses, is_there = losses_of_tokens(outputs(network, theta, batch), batch["labels"])
    return (weights * losses.sum(1) / is_there.sum(1)).mean()


def outer_loss(network: Any, theta: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    losses, is_there = losses_of_tokens(outputs(network, theta, batch), batch["labels"])
    return losses.sum() / is_there.sum()


def by_hand(batches: list[dict[str, Tensor]], every: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's weights and the rater's after a step on each batch."""
    network = model(attention="eager").train()
    scores = rater()
    names = [name for name, _ in network.named_parameters()]
    theta = {name: p.detach().clone() for name, p in network.named_parameters()}
    first = {name: torch.zeros_like(t) for name, t in theta.items()}
    second = {name: torch.zeros_like(t) for name, t in theta.items()}
    outer_batches: Iterator[dict[str, Tensor]] = iter(OUTER * len(batches))
    for step, batch in enumerate(batches):
        # AdamW, with a gradient that still depends on the rater's parameter.
        theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
        weights = len(batch["labels"]) * scores(batch).softmax(0)
        loss = weighted_loss(network, theta, weights, batch)
        gradients = torch.autograd.grad(loss, [theta[n] for n in names], create_graph=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        rate = RATE * (1 - step / STEPS)
        moved = {}
        for name, gradient in zip(names, gradients, strict=True):
            g = factor * gradient
            first[name] = 0.9 * first[name].detach() + 0.1 * g
            second[name] = 0.999 * second[name].detach() + 0.001 * g * g
            mean = first[name] / (1 - 0.9 ** (step + 1))
            # The root has no derivative at 0, where the gradient of an unused weight is.
            root = (second[name] / (1 - 0.999 ** (step + 1))).clamp_min(1e-300).sqrt()
            decays = theta[name].ndim > 1 and "ln_" not in name
            decayed = theta[name] * (1 - rate * (DECAY if decays else 0.0))
            moved[name] = decayed - rate * mean / (root + EPSILON)
        if step % every == 0:
            after = outer_loss(network, moved, next(outer_batches))
            (slope,) = torch.autograd.grad(after, [*scores.parameters()])
            with torch.no_grad():
                for p in scores.parameters():
                    p -= RATER_RATE * slope
        theta = moved
    (learned,) = scores.parameters()
    return {name: t.detach() for name, t in theta.items()}, learned.detach()


@pytest.mark.parametrize("every", [1, 2])
def test_it_takes_the_steps_of_a_loop_by_hand(every: int, tmp_path: Path) -> None:
    trainer, rated, network = rated_trainer(tmp_path, every=every)
    batches: list[dict[str, Tensor]] = []
    loss = trainer.compute_loss

    def recording(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
        batches.append({name: t.clone() for name, t in inputs.items()})
        return loss(model, inputs, **options)

    trainer.compute_loss = recording
    trainer.train()
    theta, scores = by_hand(batches, every)
    assert len(batches) == STEPS
    assert rated.updates == -(-STEPS // every)
    (learned,) = network.parameters()
    assert (learned - scores).abs().max() < 1e-10
    # It has learned something.
    assert (learned - next(rater().parameters())).abs().max() > 1e-3
    for name, p in trainer.model.named_parameters():
        assert (p - theta[name]).abs().max() < 1e-8, name
    # Weights of another rate of the rater are not these.
    other = by_hand(batches, every=STEPS + 1)[0]
    assert max((p - other[n]).abs().max() for n, p in trainer.model.named_parameters()) > 1e-6


def test_the_default_optimizer_and_a_loss_of_float32(tmp_path: Path) -> None:
    network = rater().float()
    trainer = trainer_of(model(attention="eager").float(), tmp_path, max_steps=2)
    rated = weighted(trainer, network, outer=OUTER)
    trainer.train()
    assert rated.weights is not None
    assert rated.outer_loss is not None
    assert isinstance(rated.rater_optimizer, torch.optim.Adam)
    # A softmax times the number of sequences.
    assert abs(rated.weights.sum().item() - len(rated.weights)) < 1e-5
    assert F.relu(rated.weights).equal(rated.weights)
    assert rated.outer_loss.isfinite()


def test_in_bfloat16_the_rater_moves_much_the_same_way(tmp_path: Path) -> None:
    moves = []
    for is_bfloat16 in (False, True):
        network = rater().float()
        begun = next(network.parameters()).detach().clone()
        trainer = trainer_of(model().float(), tmp_path, bf16=is_bfloat16)
        optimizer = torch.optim.SGD(network.parameters(), lr=RATER_RATE)
        weighted(trainer, network, outer=OUTER, rater_optimizer=optimizer)
        trainer.train()
        moves.append(next(network.parameters()).detach() - begun)
    difference = (moves[0] - moves[1]).norm() / moves[0].norm()
    assert 1e-6 < difference < 0.1


def test_the_loss_of_an_evaluation_is_the_models_own(tmp_path: Path) -> None:
    trainer, rated, _ = rated_trainer(tmp_path)
    plain = trainer_of(model(), tmp_path).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == plain
    assert rated.updates == 0


def test_the_models_own_draws_are_the_same_whatever_the_rater_does(tmp_path: Path) -> None:
    """With dropout, beside a rater that does not move."""
    ends = []
    for every in (1, STEPS):
        trainer, rated, _ = rated_trainer(tmp_path, every=every, dropout=0.2, rate=0.0)
        trainer.train()
        assert rated.updates == (STEPS if every == 1 else 1)
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))


def test_a_checkpoint_of_the_trainer_holds_the_rater(tmp_path: Path) -> None:
    trainer, _, network = rated_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    assert (folder / FILE).is_file()
    resumed, rated, resumed_rater = rated_trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(folder))
    assert rated.updates == STEPS
    assert next(resumed_rater.parameters()).equal(next(network.parameters()))
    for p, q in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert p.equal(q)
    # A checkpoint elsewhere is read by hand.
    (folder / FILE).rename(tmp_path / FILE)
    elsewhere, rated, resumed_rater = rated_trainer(tmp_path / "whole")
    with pytest.raises(MetaplError, match="is missing; expected a checkpoint"):
        elsewhere.train(resume_from_checkpoint=str(folder))
    rated.load(tmp_path)
    elsewhere.train(resume_from_checkpoint=str(folder))
    assert next(resumed_rater.parameters()).equal(next(network.parameters()))


def test_the_rater_of_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    """An older training has left one in the output folder."""
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer, _, network = rated_trainer(tmp_path / "whole", **saved)
    trainer.train()
    other, _, _ = rated_trainer(tmp_path / "other", rate=50 * RATER_RATE, **saved)
    other.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    resumed, rated, resumed_rater = rated_trainer(tmp_path / "other")
    before = next(resumed.model.parameters()).detach().clone()
    with pytest.raises(MetaplError, match=r"learned beside another model .*; expected rated\.load"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert rated.updates < STEPS
    # What it proposes.
    resumed, rated, resumed_rater = rated_trainer(tmp_path / "other")
    rated.load(folder)
    # A checkpoint of before says nothing of a model.
    state = rated.state_dict()
    del state["model"]
    rated.load_state_dict(state)
    resumed.train(resume_from_checkpoint=str(folder))
    assert next(resumed_rater.parameters()).equal(next(network.parameters()))
    assert not before.equal(next(resumed.model.parameters()))


class Halved(transformers.TrainerCallback):
    """Halves the gradients before the step."""

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **others: Any) -> None:
        for p in model.parameters():
            p.grad.mul_(0.5)


class OwnStep(transformers.Trainer):
    """Trains by a step of its own."""

    def training_step(self, *batch: Any, **options: Any) -> Any:
        return super().training_step(*batch, **options)


def test_what_may_change_gradients_behind_the_rater_is_said(tmp_path: Path) -> None:
    trainer = trainer_of(model(), tmp_path)
    trainer.add_callback(Halved())
    with pytest.warns(UserWarning, match="the Trainer has Halved with on_pre_optimizer_step"):
        weighted(trainer, rater(), outer=OUTER)
    trainer = trainer_of(model(), tmp_path, kind=OwnStep)
    with pytest.raises(MetaplError, match="OwnStep with a training_step of its own"):
        weighted(trainer, rater(), outer=OUTER)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2.*expected 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1.*expected 0"),
    ],
)
def test_what_it_cannot_do_is_refused_at_once(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    trainer = trainer_of(model(), tmp_path, **options)
    usual_loss = trainer.compute_loss
    with pytest.raises(MetaplError, match=expected):
        weighted(trainer, rater(), outer=OUTER)
    assert trainer.compute_loss == usual_loss


def test_other_wrong_calls_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(model(), tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    with pytest.raises(MetaplError, match="compute_loss_func, which the rater's loss"):
        weighted(trainer, rater(), outer=OUTER)
    with pytest.raises(MetaplError, match="the type GPT2LMHeadModel; expected a transformers"):
        weighted(model(), rater(), outer=OUTER)
    trainer = trainer_of(model(), tmp_path)
    with pytest.raises(MetaplError, match="every=0: expected"):
        weighted(trainer, rater(), outer=OUTER, every=0)
    with pytest.raises(MetaplError, match="rater is of type int; expected a module"):
        weighted(trainer, 3, outer=OUTER)  # type: ignore[arg-type]
    of_another = torch.optim.Adam(rater().parameters())
    with pytest.raises(MetaplError, match="rater_optimizer holds more than rater"):
        weighted(trainer, rater(), outer=OUTER, rater_optimizer=of_another)
    with pytest.raises(MetaplError, match="outer is"):
        weighted(trainer, rater(), outer=OUTER[0])
    weighted(trainer, rater(), outer=OUTER)
    with pytest.raises(MetaplError, match="a rater already"):
        weighted(trainer, rater(), outer=OUTER)


def test_a_trainer_with_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    """It would not be called in training, and nothing would say so."""

    class Penalized(transformers.Trainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            return 2 * super().compute_loss(*arguments, **options)

    trainer = trainer_of(model(), tmp_path, kind=Penalized)
    with pytest.raises(MetaplError, match="the type Penalized with a compute_loss of its own"):
        weighted(trainer, rater(), outer=OUTER)


def test_an_optimizer_without_a_derivative_is_refused_before_anything_moves(
    tmp_path: Path,
) -> None:
    trainer, rated, network = rated_trainer(tmp_path, optim="adagrad")
    first_weights = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(MetaplError, match="inner_optimizer is Adagrad"):
        trainer.train()
    assert all(p.equal(q) for p, q in zip(first_weights, trainer.model.parameters(), strict=True))
    assert next(network.parameters()).equal(next(rater().parameters()))
    assert rated.updates == 0


class Doubled(torch.autograd.Function):
    """The scores as they are, whose gradient comes back twice as large."""

    @staticmethod
    def forward(scores: Tensor) -> Tensor:
        return scores.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@pytest.mark.parametrize("verify", [True, "warn", False])
def test_the_first_gradient_is_compared_with_its_definition(
    tmp_path: Path, *, verify: bool | Literal["warn"]
) -> None:
    network = rater()
    network.register_forward_hook(lambda *call: Doubled.apply(call[2]))
    trainer = trainer_of(model(), tmp_path, max_steps=1)
    rated = weighted(trainer, network, outer=OUTER, verify=verify)
    if verify is True:
        with pytest.raises(MetaplError, match="the backward of Doubled in the signal is not"):
            trainer.train()
    elif verify == "warn":
        with pytest.warns(VerificationWarning, match="the backward of Doubled"):
            trainer.train()
    else:
        trainer.train()
    assert rated.updates == (0 if verify is True else 1)


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="the examples are not installed")
def test_the_example_tells_counting_sequences_from_random_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["with_transformers.py", "60"])
    runpy.run_path(str(ROOT / "examples" / "with_transformers.py"), run_name="__main__")
    printed = capsys.readouterr().out
    scores = [float(text) for text in re.findall(r"sequences ([+-][\d.]+)", printed)]
    assert "steps of the rater: 30" in printed
    assert scores[0] > scores[1] + 0.5
