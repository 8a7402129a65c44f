"""``metapl.record``: the scores of a followed loop are those of double backward through all of it.

The reference is a loop of plain PyTorch that keeps the graph of the whole training.
"""

from __future__ import annotations

import copy
import random
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Recording, record
from metapl.attribution.recording.replay import Replay
from metapl.problems import EqualWeights
from metapl.runs import checkpoint

EXAMPLES = 30
STEPS = 11
CLASSES = 3
CLIP = 0.6
DECAY = 0.02

draw = torch.Generator().manual_seed(0)
X = torch.randn(EXAMPLES, 5, generator=draw, dtype=torch.float64)
Y = torch.randint(CLASSES, (EXAMPLES,), generator=draw)
OUTER = torch.randn(7, 5, generator=draw, dtype=torch.float64), torch.arange(7) % CLASSES

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=DECAY),
    "AdamW": lambda model: torch.optim.AdamW(
        model.parameters(), 0.05, eps=1e-3, weight_decay=DECAY
    ),
}


def network(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers).double()


def batches(steps: int = STEPS, parts: int = 2) -> Iterator[tuple[Tensor, ...]]:
    """Yield the examples of each step, in micro-batches; the last of an epoch is smaller."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        rows = torch.randperm(EXAMPLES, generator=generator)[:8]
        yield rows.chunk(parts)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = STEPS,
    divide: bool = True,
    clip: bool = True,
    after: Callable[[int], None] = lambda step: None,
    begin: int = 0,
) -> None:
    """Train as somebody else would: accumulation, clipping, a schedule, and draws in between.

    Args:
        begin: the first step; that of a loop that goes on comes with the generator as it was.
    """
    if begin == 0:
        torch.manual_seed(7)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / (2 * STEPS), last_epoch=begin - 1
    )
    for step, parts in enumerate(batches(steps)):
        if step < begin:
            continue
        optimizer.zero_grad()
        for rows in parts:
            loss = F.cross_entropy(model(X[rows].to(dtype_of(model))), Y[rows])
            (loss / len(parts) if divide else loss).backward()
            # Such as a loader that shuffles, or an evaluation.
            torch.randn(3)
        with torch.no_grad():
            model(X[:2].to(dtype_of(model)))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        falling.step()
        after(step)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def by_hand(name: str, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Return the scores and the outer loss by double backward through :func:`train`."""
    model = network()
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    weights = torch.ones(EXAMPLES, dtype=torch.float64, requires_grad=True)
    first = {n: torch.zeros_like(t) for n, t in theta.items()}
    second = {n: torch.zeros_like(t) for n, t in theta.items()}
    torch.manual_seed(7)
    for step, parts in enumerate(batches(steps)):
        total = torch.zeros((), dtype=torch.float64)
        for rows in parts:
            outputs = torch.func.functional_call(model, theta, (X[rows],))
            losses = F.cross_entropy(outputs, Y[rows], reduction="none")
            total = total + (weights[rows] * losses).mean() / len(parts)
            torch.randn(3)
        # The evaluation has dropout too, for this loop forgets model.eval().
        torch.func.functional_call(model, theta, (X[:2],))
        gradients = torch.autograd.grad(total, [*theta.values()], create_graph=True)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        scale = (CLIP / (norm + 1e-6)).clamp(max=1.0)
        shrunk = 1 - step / (2 * STEPS)
        moved = {}
        for (n, t), gradient in zip(theta.items(), gradients, strict=True):
            g = scale * gradient
            if name == "SGD":
                g = g + DECAY * t
                first[n] = 0.9 * first[n] + g
                moved[n] = t - 0.3 * shrunk * first[n]
                continue
            rate = 0.05 * shrunk
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g * g
            root = (second[n] / (1 - 0.999 ** (step + 1))).sqrt()
            step_of_adam = first[n] / (1 - 0.9 ** (step + 1)) / (root + 1e-3)
            moved[n] = t * (1 - rate * DECAY) - rate * step_of_adam
        theta = moved
    model.eval()
    loss = F.cross_entropy(torch.func.functional_call(model, theta, (OUTER[0],)), OUTER[1])
    (slope,) = torch.autograd.grad(loss, weights)
    return -slope, loss.detach()


def recorded(out: Path, name: str = "SGD", **options: Any) -> tuple[Recording, nn.Module]:
    """Return a recording of the usual training, and the trained network."""
    model = network()
    optimizer = OPTIMIZERS[name](model)
    usual: dict[str, Any] = {"train": (X, Y), "states_every": 4}
    with record(model, optimizer, out=out / "recording", **{**usual, **options}) as recording:
        train(model, optimizer)
    return recording, model


# --------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", [*OPTIMIZERS])
@pytest.mark.parametrize("states_every", [1, 4, 100])
def test_scores_are_those_of_double_backward(name: str, states_every: int, tmp_path: Path) -> None:
    recording, model = recorded(tmp_path, name, states_every=states_every)
    scores, loss = by_hand(name)
    attribution = recording.attribute(OUTER, smoothing=0.0, progress=False)
    size = scores.abs().max()
    assert (attribution.scores - scores).abs().max() < 1e-9 * size
    assert abs(attribution.outer_loss - loss) < 1e-12
    assert attribution.replay_error < 1e-12
    assert recording.order.equal(torch.stack([torch.cat(parts) for parts in batches()]))
    assert recording.loss_factor == 1.0
    for parameter_name, p in model.named_parameters():
        assert (attribution.student_params[parameter_name] - p).abs().max() < 1e-13


def test_the_loop_has_the_bits_that_it_has_without_a_recording(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        plain = network().to(dtype)
        train(plain, OPTIMIZERS["AdamW"](plain))
        draws = torch.randn(3)
        python_draw = random.random
        model = network().to(dtype)
        optimizer = OPTIMIZERS["AdamW"](model)
        backward = torch.autograd.backward
        with record(model, optimizer, out=tmp_path / str(dtype), train=(X.to(dtype), Y)):
            train(model, optimizer)
            assert torch.autograd.backward is not backward
        assert torch.autograd.backward is backward
        assert torch.randn(3).equal(draws)
        assert random.random is python_draw
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.equal(q)
        assert not model._forward_pre_hooks
        assert not model._forward_hooks


def test_it_is_read_in_another_process_and_nothing_of_the_network_moves(tmp_path: Path) -> None:
    recording, _ = recorded(tmp_path)
    scores = recording.attribute(OUTER, progress=False).scores
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model.eval()
    weights = [p.clone() for p in model.parameters()]
    opened = Recording.open(tmp_path / "recording", model, train=(X, Y))
    state = torch.get_rng_state()
    assert opened.attribute(OUTER, progress=False).scores.equal(scores)
    assert torch.get_rng_state().equal(state)
    assert not model.training
    assert not model[2].training
    for p, before in zip(model.parameters(), weights, strict=True):
        assert p.equal(before)
    with pytest.raises(MetaplError, match="opened to be read; expected metapl.record"), opened:
        pass


def test_scores_of_each_outer_example_add_up(tmp_path: Path) -> None:
    recording, _ = recorded(tmp_path)
    attribution = recording.attribute(OUTER, each=True, progress=False)
    whole = recording.attribute(OUTER, progress=False)
    assert attribution.scores.shape == (7, EXAMPLES)
    assert (attribution.scores.mean(0) - whole.scores).abs().max() < 1e-12


def test_predictions_are_those_of_trainings_with_other_weights(tmp_path: Path) -> None:
    """By central differences of the replayed training, and of the loop itself."""
    recording, _ = recorded(tmp_path)
    attribution = recording.attribute(OUTER, progress=False)
    small = 1e-5
    for number in (0, 11):
        change = torch.zeros(EXAMPLES, dtype=torch.float64)
        change[number] = small
        above = attribution._losses_with(1 + change)
        below = attribution._losses_with(1 - change)
        slope = (above - below) / (2 * small)
        assert abs(-slope - attribution.scores[number]) < 1e-7 * attribution.scores.abs().max()
    agreement = attribution.validate([[i] for i in range(6)], progress=False)
    assert agreement.spearman > 0.5


def test_without_a_data_set_examples_are_recorded_as_they_are_called(tmp_path: Path) -> None:
    class Labeled(nn.Module):
        """A network that is called with labels, as those of transformers."""

        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            outputs: Tensor = self.body(x)
            return outputs

    model = Labeled()
    optimizer = OPTIMIZERS["SGD"](model)
    with record(model, optimizer, out=tmp_path / "r", states_every=4) as recording:
        torch.manual_seed(7)
        for parts in batches():
            optimizer.zero_grad()
            for rows in parts:
                outputs = model(x=X[rows], labels=Y[rows])
                (F.cross_entropy(outputs, Y[rows]) / 2).backward()
            optimizer.step()
    rows = torch.cat([torch.cat(parts) for parts in batches()])
    # The examples in the order in which they were first seen.
    seen = [*dict.fromkeys(rows.tolist())]
    assert [seen[i] for i in recording.order.flatten().tolist()] == rows.tolist()
    scores = recording.attribute({"x": OUTER[0], "labels": OUTER[1]}, progress=False).scores

    second = Labeled()
    optimizer = OPTIMIZERS["SGD"](second)
    data = {"x": X, "labels": Y}
    with record(second, optimizer, out=tmp_path / "data", train=data) as with_data:
        torch.manual_seed(7)
        for parts in batches():
            optimizer.zero_grad()
            for rows in parts:
                outputs = second(x=X[rows], labels=Y[rows])
                (F.cross_entropy(outputs, Y[rows]) / 2).backward()
            optimizer.step()
    by_number = with_data.attribute({"x": OUTER[0], "labels": OUTER[1]}, progress=False).scores
    assert (by_number[seen] - scores).abs().max() < 1e-12 * scores.abs().max()


@pytest.mark.parametrize("kind", ["sum", "not divided", "smaller last part"])
def test_loops_that_weigh_micro_batches_otherwise(kind: str, tmp_path: Path) -> None:
    """Scores are derivatives of what the loop did, by central differences of the loop itself."""

    def loop(weights: Tensor, context: Any = None) -> Tensor:
        model = network(dropout=0.0)
        optimizer = OPTIMIZERS["SGD"](model)
        with context(model, optimizer) if context else torch.enable_grad():
            for parts in batches(4):
                optimizer.zero_grad()
                sizes = (5, 3) if kind == "smaller last part" else (4, 4)
                for rows in torch.cat(parts).split(sizes):
                    losses = weights[rows] * F.cross_entropy(
                        model(X[rows]), Y[rows], reduction="none"
                    )
                    if kind == "sum":
                        losses.sum().backward()
                    elif kind == "not divided":
                        losses.mean().backward()
                    else:
                        (losses.sum() / 8).backward()
                optimizer.step()
        return F.cross_entropy(model(OUTER[0]), OUTER[1]).detach()

    recordings: list[Recording] = []

    def context(model: nn.Module, optimizer: torch.optim.Optimizer) -> Recording:
        recordings.append(record(model, optimizer, out=tmp_path / "r", train=(X, Y)))
        return recordings[0]

    ones = torch.ones(EXAMPLES, dtype=torch.float64)
    loop(ones, context)
    (recording,) = recordings
    assert recording.loss_factor == {"sum": 8, "not divided": 2, "smaller last part": 1}[kind]
    scores = recording.attribute(OUTER, progress=False).scores
    for number in recording.order[0, :2].tolist():
        change = torch.zeros_like(ones)
        change[number] = 1e-5
        slope = (loop(ones + change) - loop(ones - change)) / 2e-5
        assert abs(-slope - scores[number]) < 1e-6 * scores.abs().max()


class Closure:
    """What an optimizer calls within its step, as in Lightning."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> None:
        self.model = model
        self.optimizer = optimizer
        self.rows = rows

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(X[self.rows]), Y[self.rows])
        loss.backward()
        return loss


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_sequences_whose_tokens_count_alike(per: Any, tmp_path: Path) -> None:
    """Batches are padded to their longest sequence, and tokens of two are accumulated."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(3, 8, (EXAMPLES,), generator=generator).tolist()
    texts = [torch.randint(11, (n,), generator=generator) for n in lengths]

    def padded(numbers: list[int]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([texts[i] for i in numbers], batch_first=True)
        masks = [torch.ones_like(texts[i]) for i in numbers]
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.words = nn.Embedding(11, 5).double()
            self.mix = nn.GRU(5, 5, batch_first=True).double()
            self.head = nn.Linear(5, 11).double()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden, _ = self.mix(self.words(input_ids))
            outputs: Tensor = self.head(hidden)
            return outputs

    outer = padded([27, 28, 29])

    def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(batch["input_ids"], batch["attention_mask"])
        return F.cross_entropy(
            outputs[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        )

    def loop(weights: Tensor, context: Any = None) -> Tensor:
        model = Model()
        optimizer = OPTIMIZERS["SGD"](model)
        with context(model, optimizer) if context else torch.enable_grad():
            for parts in batches(5):
                optimizer.zero_grad()
                micro_batches = [padded(rows.tolist()) for rows in parts]
                count = sum((batch["labels"][:, 1:] >= 0).sum() for batch in micro_batches)
                for rows, batch in zip(parts, micro_batches, strict=True):
                    losses = token_losses(model, batch)
                    w = weights[rows][:, 1 : 1 + losses.shape[1]]
                    ((w * losses).sum() / count).backward()
                optimizer.step()
            return token_losses(model, outer).sum() / (outer["labels"][:, 1:] >= 0).sum()

    class Texts(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return EXAMPLES

        def __getitem__(self, number: int) -> int:
            return number

    recordings: list[Recording] = []
    problem = metapl.problems.NextToken(per=per, mean="token")

    def context(model: nn.Module, optimizer: torch.optim.Optimizer) -> Recording:
        data = torch.utils.data.DataLoader(Texts(), collate_fn=padded)
        recordings.append(record(model, optimizer, out=tmp_path / "r", problem=problem, train=data))
        return recordings[0]

    ones = torch.ones(EXAMPLES, 8, dtype=torch.float64)
    loss = loop(ones, context).detach()
    (recording,) = recordings
    assert recording.loss_factor == 1.0
    assert recording.order.equal(torch.stack([torch.cat(parts) for parts in batches(5)]))
    attribution = recording.attribute(outer, progress=False)
    assert abs(attribution.outer_loss - loss) < 1e-12
    scores = attribution.scores
    number = int(recording.order[0, 0])
    change = torch.zeros_like(ones)
    if per == "token":
        change[number, 2] = 1e-5
        score = scores[number, 2]
    else:
        change[number] = 1e-5
        score = scores[number]
    slope = (loop(ones + change) - loop(ones - change)).detach() / 2e-5
    assert abs(-slope - score) < 1e-6 * scores.abs().max()
    # By the replayed training with other weights, too.
    replayed: list[Tensor] = []
    for weights in (ones + change, ones - change):
        if per == "token":
            replayed.append(attribution._losses_with(weights[:, : scores.shape[1]]))
        else:
            replayed.append(attribution._losses_with(weights[:, 0]))
    slope = (replayed[0] - replayed[1]) / 2e-5
    assert abs(-slope - score) < 1e-6 * scores.abs().max()

    # A loop that counts the first labels too has another multiple of the mean in each step.
    counting = Model()
    optimizer = OPTIMIZERS["SGD"](counting)
    data = torch.utils.data.DataLoader(Texts(), collate_fn=padded)
    with record(counting, optimizer, out=tmp_path / "c", problem=problem, train=data):
        batch = padded([0, 1, 2, 3])
        (token_losses(counting, batch).sum() / (batch["labels"] >= 0).sum()).backward()
        with pytest.raises(MetaplError, match="number of labels, .* expected -100 as the first"):
            optimizer.step()

    # Where each sequence counts alike, the gradient is another one.
    other = Model()
    optimizer = OPTIMIZERS["SGD"](other)
    data = torch.utils.data.DataLoader(Texts(), collate_fn=padded)
    by_sequence = metapl.problems.NextToken()
    with record(other, optimizer, out=tmp_path / "s", problem=by_sequence, train=data):
        token_losses(other, padded([0, 1, 2, 3])).sum().backward()
        with pytest.raises(MetaplError, match="differs from p.grad"):
            optimizer.step()


@pytest.mark.parametrize("has_data", [True, False])
def test_a_call_that_is_not_backpropagated_does_not_count(has_data: bool, tmp_path: Path) -> None:
    """Losses are taken of other data in evaluation, and of the own in training, with a graph."""

    class Labeled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(dropout=0.0)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            outputs = self.body(x)
            loss = None if labels is None else F.cross_entropy(outputs, labels)
            return {"loss": loss, "logits": outputs}

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, *, evaluates: bool) -> None:
        for parts in batches():
            if evaluates:
                model.eval()
                assert model(x=OUTER[0], labels=OUTER[1])["loss"].requires_grad
                model.train()
                assert model(x=X[:3], labels=Y[:3])["loss"] > 0
            rows = torch.cat(parts)
            optimizer.zero_grad()
            model(x=X[rows], labels=Y[rows])["loss"].backward()
            optimizer.step()

    data = {"x": X, "labels": Y} if has_data else None
    scores: list[Tensor] = []
    for evaluates in (False, True):
        model = Labeled()
        optimizer = OPTIMIZERS["AdamW"](model)
        out = tmp_path / str(evaluates)
        with record(model, optimizer, out=out, train=data, states_every=4) as recording:
            loop(model, optimizer, evaluates=evaluates)
        outer = {"x": OUTER[0], "labels": OUTER[1]}
        scores.append(recording.attribute(outer, progress=False).scores)
    assert scores[0].equal(scores[1])
    assert scores[0].abs().max() > 0


class Rounding(nn.Module):
    """A network in float64 that rounds in some places, as many language models do."""

    def __init__(self, place: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = network(dropout=0.0)
        self.place = place
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[0](x)
        if self.place == "inside":
            hidden = hidden.to(self.dtype).double()
        outputs: Tensor = self.body[3](hidden.tanh())
        return outputs.to(self.dtype) if self.place == "outputs" else outputs


ROUNDING = {
    "outputs": Rounding("outputs"),
    "inside": Rounding("inside"),
    "inside in half precision": Rounding("inside", torch.bfloat16),
    "the loop": Rounding(),
}


@pytest.mark.parametrize("case", ROUNDING)
def test_rounding_is_that_of_the_coarsest_type_on_the_way_to_the_loss(
    case: str, tmp_path: Path
) -> None:
    start = ROUNDING[case]

    def losses_of(outputs: Tensor, rows: Tensor) -> Tensor:
        if case == "the loop":
            outputs = outputs.float()
        # Not by cross_entropy, which has the bits of the problem's.
        return outputs.logsumexp(1) - outputs[torch.arange(len(rows)), Y[rows]]

    def smoothed_losses_of(outputs: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(outputs, Y[rows], reduction="none", label_smoothing=0.1)

    def loop(out: Path, losses_of: Callable[[Tensor, Tensor], Tensor]) -> Recording:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        with record(model, optimizer, out=out, train=(X, Y), states_every=4) as recording:
            for parts in batches():
                rows = torch.cat(parts)
                optimizer.zero_grad()
                losses_of(model(X[rows]), rows).mean().backward()
                optimizer.step()
        return recording

    theta = {n: p.detach().clone().requires_grad_() for n, p in start.named_parameters()}
    weights = torch.ones(EXAMPLES, dtype=torch.float64, requires_grad=True)
    for parts in batches():
        rows = torch.cat(parts)
        losses = losses_of(torch.func.functional_call(start, theta, (X[rows],)), rows)
        total = (weights[rows] * losses).mean()
        gradients = torch.autograd.grad(total, [*theta.values()], create_graph=True)
        theta = {n: t - 0.3 * g for (n, t), g in zip(theta.items(), gradients, strict=True)}
    outputs = torch.func.functional_call(start, theta, (OUTER[0],))
    (slope,) = torch.autograd.grad(F.cross_entropy(outputs, OUTER[1]), weights)

    recording = loop(tmp_path / "r", losses_of)
    opened = Recording.open(tmp_path / "r", copy.deepcopy(start), train=(X, Y))
    for read in (recording, opened):
        scores = read.attribute(OUTER, progress=False, verify=False).scores
        assert (scores + slope).abs().max() < 1e-5 * slope.abs().max()
        assert read._read().network.types == {torch.float64, start.dtype}
    # Another loss is refused as it is without the rounding.
    with pytest.raises(MetaplError, match="differs from p.grad"):
        loop(tmp_path / "s", smoothed_losses_of)


def test_steps_with_a_closure_and_an_optimizer_that_comes_late(tmp_path: Path) -> None:
    scores = []
    for is_within_step in (False, True):
        model = network()
        out = tmp_path / str(is_within_step)
        with record(model, out=out, train=(X, Y), states_every=3) as recording:
            optimizer = OPTIMIZERS["AdamW"](model)
            torch.manual_seed(7)
            for parts in batches():
                closure = Closure(model, optimizer, torch.cat(parts))
                if is_within_step:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        assert recording.steps == STEPS
        attribution = recording.attribute(OUTER, progress=False)
        assert attribution.replay_error < 1e-12
        scores.append(attribution.scores)
    assert scores[0].equal(scores[1])


def test_batch_norm_and_draws_of_the_host_are_replayed(tmp_path: Path) -> None:
    class Skipping(nn.Module):
        """Leaves a layer out now and then."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.first = nn.Linear(5, 6).double()
            self.norm = nn.BatchNorm1d(6).double()
            self.last = nn.Linear(6, CLASSES).double()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(self.first(x))
            if self.training and float(torch.rand(())) < 0.5:
                hidden = hidden.tanh()
            outputs: Tensor = self.last(hidden)
            return outputs

    def loop(weights: Tensor, context: Any) -> nn.Module:
        model = Skipping()
        optimizer = OPTIMIZERS["SGD"](model)
        torch.manual_seed(4)
        with context(model, optimizer):
            for parts in batches(6):
                optimizer.zero_grad()
                rows = torch.cat(parts)
                losses = F.cross_entropy(model(X[rows]), Y[rows], reduction="none")
                (weights[rows] * losses).mean().backward()
                optimizer.step()
        return model

    recordings: list[Recording] = []

    def context(model: nn.Module, optimizer: torch.optim.Optimizer) -> Recording:
        out = tmp_path / "r"
        recordings.append(record(model, optimizer, out=out, train=(X, Y), states_every=2))
        return recordings[0]

    ones = torch.ones(EXAMPLES, dtype=torch.float64)
    model = loop(ones, context)
    attribution = recordings[0].attribute(OUTER, progress=False)
    assert attribution.replay_error < 1e-12
    model.eval()
    with torch.no_grad():
        assert abs(attribution.outer_loss - F.cross_entropy(model(OUTER[0]), OUTER[1])) < 1e-12
    # The weights of the next training lower the loss that they were found for.
    better = attribution._losses_with(attribution.weights(rate=0.05))
    assert better < attribution.outer_loss


def test_blocks_of_steps_are_taken_once_more_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, _ = recorded(tmp_path, "AdamW", states_every=100)
    scores = recording.attribute(OUTER, progress=False).scores
    from metapl.attribution.recording.replay import Replay

    # Not all of eleven steps are held, and then not all of four.
    monkeypatch.setattr(Replay, "_spacings", lambda self, steps, state: (4, 2))
    assert recording.attribute(OUTER, progress=False).scores.equal(scores)


# ------------------------------------------------------------------------------ kills and bad input


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at_step", [4, 6, 9])
def test_a_killed_training_leaves_what_was_saved(at_step: int, tmp_path: Path) -> None:
    """A process that is killed never comes to the end of the context."""
    model = network()
    optimizer = OPTIMIZERS["SGD"](model)
    recording = record(model, optimizer, out=tmp_path / "r", train=(X, Y), states_every=4)
    recording.__enter__()

    def kill(step: int) -> None:
        if step == at_step:
            raise Killed

    with pytest.raises(Killed):
        train(model, optimizer, after=kill)
    assert recording._recorder is not None
    recording._recorder._hooks.close()

    saved = at_step // 4 * 4
    opened = Recording.open(tmp_path / "r", network(), train=(X, Y))
    assert opened.steps == saved
    scores, _ = by_hand("SGD", steps=saved)
    attribution = opened.attribute(OUTER, progress=False)
    assert (attribution.scores - scores).abs().max() < 1e-9 * scores.abs().max()


class Saved:
    """What a loop saves after each step, to go on from there."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.by_step: dict[int, tuple[Any, Any, Tensor]] = {}

    def __call__(self, step: int) -> None:
        states = self.model.state_dict(), self.optimizer.state_dict()
        self.by_step[step + 1] = (*copy.deepcopy(states), torch.get_rng_state())

    def restored(self, step: int, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a fresh network and its optimizer as they were before a step."""
        # An optimizer trains on in the tensors that it loads.
        of_model, of_optimizer, random_state = copy.deepcopy(self.by_step[step])
        model = network()
        model.load_state_dict(of_model)
        optimizer = OPTIMIZERS[name](model)
        optimizer.load_state_dict(of_optimizer)
        torch.set_rng_state(random_state)
        return model, optimizer


@pytest.mark.parametrize("begin", [4, 8, 10])
@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_a_recording_goes_on_where_the_loop_does(name: str, begin: int, tmp_path: Path) -> None:
    """From a kept state, or from the end of what was recorded; twice."""
    model = network()
    optimizer = OPTIMIZERS[name](model)
    saved = Saved(model, optimizer)
    options: dict[str, Any] = {"out": tmp_path / "r", "train": (X, Y), "states_every": 4}
    with record(model, optimizer, **options, resume=True):
        train(model, optimizer, steps=10, after=saved)
    for _ in range(2):
        model, optimizer = saved.restored(begin, name)
        with record(model, optimizer, **options, resume=True) as recording:
            train(model, optimizer, begin=begin)
    assert recording.steps == STEPS
    opened = Recording.open(tmp_path / "r", network(), train=(X, Y))
    scores, _ = by_hand(name)
    attribution = opened.attribute(OUTER, smoothing=0.0, progress=False)
    assert opened.steps == STEPS
    assert (attribution.scores - scores).abs().max() < 1e-9 * scores.abs().max()
    for parameter_name, p in model.named_parameters():
        assert (attribution.student_params[parameter_name] - p).abs().max() < 1e-13


def test_a_kill_right_after_a_kept_state_loses_nothing(tmp_path: Path) -> None:
    """The loop saves its checkpoint behind step 7, and step 8 does not end."""
    model = network()
    optimizer = OPTIMIZERS["AdamW"](model)
    saved = Saved(model, optimizer)
    options: dict[str, Any] = {"train": (X, Y), "states_every": 4}

    def after(step: int) -> None:
        saved(step)
        if step == 7:
            shutil.copytree(tmp_path / "r", tmp_path / "killed")

    with record(model, optimizer, out=tmp_path / "r", **options):
        train(model, optimizer, after=after)
    model, optimizer = saved.restored(8, "AdamW")
    with record(model, optimizer, out=tmp_path / "killed", **options, resume=True) as resumed:
        train(model, optimizer, begin=8)
    whole = Recording.open(tmp_path / "r", network(), train=(X, Y))
    scores = [found.attribute(OUTER, progress=False).scores for found in (whole, resumed)]
    assert torch.equal(*scores)


def test_a_recording_without_a_step_is_said_at_its_end(tmp_path: Path) -> None:
    model = network()
    copied = copy.deepcopy(model)
    with (
        pytest.warns(UserWarning, match="has no step: no optimizer has stepped over"),
        record(model, out=tmp_path / "r", train=(X, Y)),
    ):
        train(copied, OPTIMIZERS["SGD"](copied))


def test_the_scale_of_a_scaler_is_refused_behind_a_clip_too(tmp_path: Path) -> None:
    model, x = network().float(), X.float()
    optimizer = OPTIMIZERS["SGD"](model)
    scaler = torch.amp.GradScaler("cpu")
    with record(model, optimizer, out=tmp_path / "r", train=(x, Y)):
        scaler.scale(F.cross_entropy(model(x), Y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with pytest.raises(MetaplError, match="is 65536 times the mean .* by a GradScaler"):
            scaler.step(optimizer)


class WithLabels(nn.Module):
    """A network that is called with labels, and with a mask, as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(dropout=0.0)

    def forward(
        self, x: Tensor, attention_mask: Tensor, labels: Tensor | None = None, scale: float = 2.0
    ) -> Any:
        logits = self.inner(scale * x * attention_mask)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_examples_that_were_seen_by_the_first_process_have_their_numbers(tmp_path: Path) -> None:
    """Without a data set, some are seen first after the recording has gone on."""

    def trained(out: Path, parts: list[range]) -> Recording:
        model = WithLabels()
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        for steps in parts:
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = WithLabels()
            optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            options: dict[str, Any] = {"out": out, "states_every": 2, "resume": True}
            with record(model, optimizer, **options) as recording:
                for step in steps:
                    rows = torch.arange(4 * step, 4 * step + 6) % 21
                    inputs = {"x": X[rows], "attention_mask": torch.ones_like(X[rows])}
                    optimizer.zero_grad()
                    model(**inputs, labels=Y[rows], scale=2.0)["loss"].backward()
                    optimizer.step()
        return recording

    whole = trained(tmp_path / "whole", [range(9)])
    in_parts = trained(tmp_path / "parts", [range(4), range(4, 6), range(6, 9)])
    assert in_parts.order.equal(whole.order)
    outer = {"x": OUTER[0], "labels": OUTER[1], "attention_mask": torch.ones_like(OUTER[0])}
    scores = [r.attribute(outer, progress=False).scores for r in (whole, in_parts)]
    assert scores[0].equal(scores[1])


def test_a_recording_does_not_go_on_from_elsewhere(tmp_path: Path) -> None:
    """What was recorded stays as it was."""
    model = network()
    optimizer = OPTIMIZERS["AdamW"](model)
    saved = Saved(model, optimizer)
    options: dict[str, Any] = {"out": tmp_path / "r", "train": (X, Y), "states_every": 4}
    with record(model, optimizer, **options):
        train(model, optimizer, steps=10, after=saved)
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "r").iterdir())}

    def begun(step: int, **others: Any) -> None:
        model, optimizer = saved.restored(step, "AdamW")
        with record(model, optimizer, **{**options, "resume": True, **others}):
            train(model, optimizer, begin=step)

    with pytest.raises(MetaplError, match=r"in no state .* before step 0, 4, 8, 10; expected"):
        begun(5)
    with pytest.raises(MetaplError, match="with states_every 4, and this is 2; expected"):
        begun(8, states_every=2)
    with pytest.raises(MetaplError, match="with another data set; expected"):
        begun(8, train=(X.flip(0), Y.flip(0)))
    other = EqualWeights()
    other.smoothing = 0.1  # type: ignore[attr-defined]
    with pytest.raises(MetaplError, match=r"fields of the problem {}, and this is {'smoothing"):
        begun(8, problem=other)
    with pytest.raises(MetaplError, match=r"resume=True to go on with it\."):
        begun(8, resume=False)
    model, optimizer = saved.restored(8, "AdamW")
    optimizer.state.clear()
    with (
        pytest.raises(MetaplError, match="in no state"),
        record(model, optimizer, **options, resume=True),
    ):
        train(model, optimizer, begin=8)
    assert files == {path.name: path.read_bytes() for path in sorted((tmp_path / "r").iterdir())}


class NormedLoop:
    """A loop over a network with batch norm, whose checkpoints are kept after each step."""

    def __init__(self, *, rates: Sequence[float] = (0.3,) * 12) -> None:
        self.rates = rates
        self.checkpoints: dict[int, Any] = {}
        self.restart()

    def restart(self, step: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.3)
        if step is not None:
            of_model, of_optimizer = copy.deepcopy(self.checkpoints[step])
            self.model.load_state_dict(of_model)
            self.optimizer.load_state_dict(of_optimizer)

    def run(
        self,
        out: Path,
        steps: Iterable[int],
        *,
        evaluates: Sequence[int] = (),
        raises_in: int | None = None,
    ) -> Recording:
        """Train, and record it.

        Args:
            evaluates: the steps in which batch norm is in evaluation.
            raises_in: a step that ends between its passes.
        """
        with record(
            self.model, self.optimizer, out=out, train=(X, Y), states_every=4, resume=True
        ) as recording:
            for step in steps:
                self.model[1].train(step not in evaluates)
                rows = torch.arange(4 * step, 4 * step + 6) % 21
                self.optimizer.param_groups[0]["lr"] = self.rates[step]
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.model(X[rows]), Y[rows])
                if step == raises_in:
                    raise KeyboardInterrupt
                loss.backward()
                self.optimizer.step()
                self.checkpoints[step + 1] = copy.deepcopy(
                    (self.model.state_dict(), self.optimizer.state_dict())
                )
        return recording

    def scores(self, out: Path) -> Tensor:
        opened = Recording.open(out, self.model, train=(X, Y))
        assert opened.steps == 12
        return opened.attribute(OUTER, progress=False).scores


def test_the_passes_of_a_step_that_was_interrupted_are_none_of_the_recording(
    tmp_path: Path,
) -> None:
    """Batch norm has moved its statistics in them."""
    whole = NormedLoop()
    whole.run(tmp_path / "whole", range(12))
    parts = NormedLoop()
    with pytest.raises(KeyboardInterrupt):
        parts.run(tmp_path / "parts", range(12), raises_in=7)
    parts.restart(7)
    parts.run(tmp_path / "parts", range(7, 12))
    assert parts.scores(tmp_path / "parts").equal(whole.scores(tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore:the losses read")
@pytest.mark.parametrize("evaluates", [range(4), range(8, 12)], ids=["first", "last"])
def test_batch_norm_may_be_in_evaluation_for_a_part_of_a_training(
    evaluates: range, tmp_path: Path
) -> None:
    loop = NormedLoop()
    loop.run(tmp_path / "whole", range(12), evaluates=evaluates)
    scores = loop.scores(tmp_path / "whole")
    loop.restart()
    loop.run(tmp_path / "parts", range(8), evaluates=evaluates)
    loop.restart(8)
    loop.run(tmp_path / "parts", range(8, 12), evaluates=evaluates)
    assert loop.scores(tmp_path / "parts").equal(scores)


def test_a_recording_without_a_state_begins_anew(tmp_path: Path) -> None:
    """One that was killed before it had written its first one."""
    loop = NormedLoop()
    loop.run(tmp_path, range(12))
    scores = loop.scores(tmp_path)
    for file in tmp_path.glob("state-*"):
        file.unlink()
    loop.restart()
    loop.run(tmp_path, range(12))
    assert loop.scores(tmp_path).equal(scores)


def test_two_kept_states_that_are_the_same_are_told_from_none(tmp_path: Path) -> None:
    loop = NormedLoop(rates=(0.0,) * 5 + (0.3,) * 7)
    loop.model[1].eval().requires_grad_(requires_grad=False)
    loop.run(tmp_path, range(8), evaluates=range(12))
    loop.restart(4)
    loop.model[1].requires_grad_(requires_grad=False)
    with pytest.raises(MetaplError, match="the states before steps 0 and 4 in .* are the same"):
        loop.run(tmp_path, range(4, 12), evaluates=range(12))


def test_a_training_that_raises_is_recorded_up_to_there(tmp_path: Path) -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD"](model)

    def fail(step: int) -> None:
        if step == 5:
            raise Killed

    with (
        pytest.raises(Killed),
        record(model, optimizer, out=tmp_path / "r", train=(X, Y)) as recording,
    ):
        train(model, optimizer, after=fail)
    assert recording.steps == 6
    scores, _ = by_hand("SGD", steps=6)
    found = recording.attribute(OUTER, progress=False).scores
    assert (found - scores).abs().max() < 1e-9 * scores.abs().max()


@pytest.mark.filterwarnings("ignore:the network holds other weights")
@pytest.mark.parametrize("unseen", ["a batch is dropped", "an evaluation forgets eval()"])
def test_statistics_that_no_step_has_moved_are_those_of_the_end(
    unseen: str, tmp_path: Path
) -> None:
    """Also where the network holds other weights, with other statistics, after the training."""
    found: list[tuple[Tensor, Tensor]] = []
    for is_replaced in (False, True):
        torch.manual_seed(2)
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES)]
        model = nn.Sequential(*layers).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        folder = tmp_path / str(is_replaced)
        with record(model, optimizer, out=folder, train=(X, Y)) as recording:
            for step in range(7):
                rows = torch.arange(6) + 3 * step
                optimizer.zero_grad()
                F.cross_entropy(model(X[rows]), Y[rows]).backward()
                if unseen == "a batch is dropped" and step in (2, 4):
                    continue
                optimizer.step()
                last = copy.deepcopy(model).eval()
                if unseen != "a batch is dropped" and step < 6:
                    with torch.no_grad():
                        model(X[:9])
            if is_replaced:
                for t in (*model.parameters(), *model.buffers()):
                    t.data.mul_(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attribution = recording.attribute(OUTER, progress=False)
        assert abs(attribution.outer_loss - F.cross_entropy(last(OUTER[0]), OUTER[1])) < 1e-12
        found.append((attribution.scores, attribution.outer_loss))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:the network holds other weights")
def test_a_last_step_that_spares_the_smallest_weight_is_seen_too(tmp_path: Path) -> None:
    model = network(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with record(model, optimizer, out=tmp_path / "r", train=(X, Y)) as recording:
        for step in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(X[:6]), Y[:6]).backward()
            if step == 1:
                model[0].weight.grad.mul_(-20.0)
            optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
    with pytest.raises(MetaplError, match="lead to a state that differs"):
        recording.attribute(OUTER, progress=False)


@pytest.mark.parametrize("way", ["best weights", "average by .data"])
def test_weights_that_are_moved_after_the_training_are_not_its_end(
    way: str, tmp_path: Path
) -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD"](model)
    recording = record(model, optimizer, out=tmp_path / "r", train=(X, Y), states_every=4)
    recording.__enter__()
    train(model, optimizer)
    if way == "best weights":
        # As load_best_model_at_end.
        model.load_state_dict(network().state_dict())
    else:
        # As Lightning's EMAWeightAveraging, past the versions of the weights.
        for p in model.parameters():
            p.data.mul_(0.5)
    with pytest.warns(UserWarning, match="the recording ends with those of the last step"):
        recording.__exit__(None, None, None)
    scores, loss = by_hand("SGD")
    attribution = recording.attribute(OUTER, progress=False)
    assert abs(attribution.outer_loss - loss) < 1e-12
    assert (attribution.scores - scores).abs().max() < 1e-9 * scores.abs().max()


def test_what_a_loop_does_unseen_is_noticed_at_the_next_state(tmp_path: Path) -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD"](model)

    def shrink(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                model[0].weight.mul_(0.999)

    with record(model, optimizer, out=tmp_path / "r", train=(X, Y), states_every=4) as recording:
        train(model, optimizer, after=shrink)
    with pytest.raises(MetaplError, match=r"the loss in step 6 is|the steps before step 8 were"):
        recording.attribute(OUTER, progress=False)
    assert recording.attribute(OUTER, progress=False, replay_tolerance=0.5).replay_error > 1e-4


def test_steps_in_the_place_of_others_are_refused_before_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path, states_every=2)
    folder = tmp_path / "recording"
    files = [folder / f"steps-{number:08d}.ckpt" for number in (4, 6)]
    steps, later_steps = (file.read_bytes() for file in files)
    files[0].write_bytes(later_steps)
    files[1].write_bytes(steps)
    opened = Recording.open(folder, network(), train=(X, Y))
    # No step is taken again.
    monkeypatch.setattr(Replay, "last_state", None)
    with pytest.raises(MetaplError, match=r"the loss in step 4 is .* was recorded"):
        opened.attribute(OUTER, progress=False)


def test_wrong_recordings_are_refused_before_the_replay(tmp_path: Path) -> None:
    recording, _ = recorded(tmp_path)
    scores = recording.attribute(OUTER, progress=False).scores
    folder = tmp_path / "recording"

    def refused(expected: str, **options: Any) -> None:
        usual: dict[str, Any] = {"train": (X, Y)}
        model = options.pop("model", network())
        with pytest.raises(MetaplError, match=expected) as caught:
            Recording.open(options.pop("out", folder), model, **{**usual, **options})
        assert "\n" not in str(caught.value)

    refused("has no recording.ckpt; expected a folder", out=tmp_path)
    wider = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()
    refused("made with a Sequential with other weights that are trained, such as", model=wider)
    refused("with other weights", model=network().float())
    refused("numbers of examples alone; expected train=", train=None)
    refused("has 29 examples, the recording was of 30, and example 0", train=(X[1:], Y[1:]))
    swapped = torch.cat([X[:2].flip(0), X[2:]])
    refused(
        "example 0 is the first that differs; expected the data set",
        train=(swapped, Y),
    )
    other_labels = torch.cat([Y[:4], (Y[4:5] + 1) % CLASSES, Y[5:]])
    refused("example 4 is the first that differs", train=(X, other_labels))
    refused("made with problem EqualWeights, and this", problem=metapl.problems.NextToken())
    with pytest.raises(MetaplError, match="expected another folder for out, metapl.Recording"):
        record(network(), out=folder, train=(X, Y))
    with pytest.raises(MetaplError, match="outer is"):
        recording.attribute(3, progress=False)
    with pytest.raises(MetaplError, match="labels"):
        recording.attribute((OUTER[0], OUTER[1] + CLASSES), progress=False)

    # A network with the same weights and another formula.
    other = network()
    other[1] = nn.ReLU()
    opened = Recording.open(folder, other, train=(X, Y))
    with pytest.raises(
        MetaplError, match=r"the loss in step 0 is .* was recorded, .*; expected the"
    ):
        opened.attribute(OUTER, progress=False)

    description = checkpoint.load(folder / "recording.ckpt")
    checkpoint.save(folder / "recording.ckpt", {**description, "torch": "2.0.0"})
    refused(r"made with torch 2.0.0, and this is .*; expected the same")
    checkpoint.save(folder / "recording.ckpt", description)

    # The state before another step, under the name of this one.
    state = (folder / "state-00000004.ckpt").read_bytes()
    (folder / "state-00000004.ckpt").write_bytes((folder / "state-00000008.ckpt").read_bytes())
    with pytest.raises(MetaplError, match="has the state before step 8; expected that before"):
        Recording.open(folder, network(), train=(X, Y)).attribute(OUTER, progress=False)
    (folder / "state-00000004.ckpt").write_bytes(state[:-1] + bytes([state[-1] ^ 1]))
    with pytest.raises(MetaplError, match="is damaged"):
        Recording.open(folder, network(), train=(X, Y)).attribute(OUTER, progress=False)
    (folder / "state-00000004.ckpt").unlink()
    # What is missing is computed again.
    opened = Recording.open(folder, network(), train=(X, Y))
    assert torch.allclose(opened.attribute(OUTER, progress=False).scores, scores)
    # The steps before a later state: the scores would be those of a shorter training.
    (folder / "steps-00000004.ckpt").unlink()
    refused(r"has files of step \d+, and no steps-00000004.ckpt; expected that file")


@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        (
            (OUTER[0][:, :4], OUTER[1]),
            r"cannot take outer \(.*shapes.*expected examples in the form",
        ),
        (
            (OUTER[0].float(), OUTER[1]),
            "the student's inputs are float32, and the weights of .* float64; .* student.float",
        ),
        ((OUTER[0], OUTER[1] + 1), r"the labels are 1\.\.3; .*expected 0\.\.2"),
    ],
)
def test_an_outer_set_that_cannot_be_read_is_said_before_the_replay(
    outer: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, _ = recorded(tmp_path)
    monkeypatch.setattr("metapl.attribution.recording.recording.feedback_of", None)
    with pytest.raises(MetaplError, match=expected) as caught:
        recording.attribute(outer, progress=False)
    assert "\n" not in str(caught.value)


def test_a_recording_without_a_step_says_why(tmp_path: Path) -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD"](model)
    recording = record(model, optimizer, out=tmp_path / "outside", train=(X, Y))
    train(model, optimizer)
    with pytest.raises(MetaplError, match=r"has no recording.ckpt; .* the training inside"):
        recording.attribute(OUTER)

    with record(model, optimizer, out=tmp_path / "ended", train=(X, Y)) as recording:
        F.cross_entropy(model(X[:6]), Y[:6]).backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        with pytest.raises(MetaplError, match="clips each entry"):
            optimizer.step()
    with pytest.raises(MetaplError, match="a first step .* that was not refused"):
        recording.attribute(OUTER)


def test_frozen_weights_have_to_be_those_of_the_recording(tmp_path: Path) -> None:
    def frozen() -> nn.Sequential:
        model = network()
        model[0].requires_grad_(requires_grad=False)
        return model

    model = frozen()
    optimizer = torch.optim.SGD(model[3].parameters(), 0.3)
    with record(model, optimizer, out=tmp_path / "r", train=(X, Y)) as recording:
        train(model, optimizer)
    assert recording.attribute(OUTER, progress=False).scores.abs().max() > 0
    other = frozen()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    with pytest.raises(MetaplError, match="other frozen weights or buffers"):
        Recording.open(tmp_path / "r", other, train=(X, Y))


# ----------------------------------------------------------------------------- what is not followed


def first_step(
    out: Path,
    *,
    model: nn.Module | None = None,
    optimizer: Any = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    before_step: Callable[[nn.Module], object] = lambda model: None,
    inputs: Tensor = X,
    **options: Any,
) -> None:
    """Take one step of a loop that is recorded."""
    model = model or network()
    optimizer = (optimizer or OPTIMIZERS["SGD"])(model)
    usual: dict[str, Any] = {"train": (X, Y)}
    with record(model, optimizer, out=out / "r", **{**usual, **options}):
        loss(model(inputs[:6]), Y[:6]).backward()
        before_step(model)
        optimizer.step()


class Doubled(EqualWeights):
    """Cross-entropy of sharper logits, which is another loss."""

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return super().inner_loss(2 * outputs, signal, batch, params)


def smoothed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss": smoothed}, r"differs from p.grad by 0\.\d+ of its size.* was backpropagated"),
        ({"problem": Doubled()}, r"mean of Doubled's losses .* differs from p.grad"),
        (
            {"optimizer": lambda model: torch.optim.Adagrad(model.parameters())},
            "the optimizer is Adagrad, .*; expected torch.optim",
        ),
        (
            {"optimizer": lambda model: torch.optim.SGD(model[3].parameters(), 0.1)},
            r"loop is not over 0.weight, 0.bias; .* requires_grad=False",
        ),
        (
            {
                "optimizer": lambda model: torch.optim.SGD(
                    [*model.parameters(), nn.Parameter(torch.ones(2))], 0.1
                )
            },
            "loop is over 1 tensors that the network does not have; expected model= with all",
        ),
        (
            {"train": torch.utils.data.TensorDataset(X, Y, torch.arange(len(X)))},
            r"train is a tuple of 3 \(Tensor\); expected \(inputs, labels\). For other batches",
        ),
        (
            {"problem": metapl.problems.NextToken()},
            r"NextToken cannot take the losses .*expected problem= with the loop's loss",
        ),
        (
            {"train": (X, Y.double()), "loss": lambda outputs, labels: outputs.square().mean()},
            r"EqualWeights cannot take the losses of the loop's examples \(.*(dtype|scalar type)",
        ),
        (
            {
                "model": nn.Linear(5, CLASSES, bias=False).double(),
                "optimizer": lambda model: torch.optim.Muon(model.parameters()),
            },
            "the optimizer is Muon, whose steps no rule takes bit for bit",
        ),
        (
            {"before_step": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3)},
            "clip_grad_value_, which clips each entry",
        ),
        (
            {"before_step": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0, 1.0)},
            "clipped by their 1-norm; expected the 2-norm",
        ),
        (
            {"before_step": lambda model: nn.utils.clip_grad_norm_(model[0].parameters(), 1.0)},
            "clips the gradients of 2 of 4 parameters",
        ),
        (
            {"before_step": lambda model: model[0].weight.grad.mul_(0.5)},
            "differs from p.grad by",
        ),
        (
            {"inputs": X + 0.1},
            "6 of 6 rows that the network is called with are none of the examples",
        ),
        ({"train": None}, "called without labels.*expected train="),
        (
            {"train": (torch.cat([X, X[:1]]), torch.cat([Y, Y[:1] + 1]))},
            "equal inputs with differ.*as without one of these two",
        ),
        ({"model": network().bfloat16(), "inputs": X.bfloat16()}, "in torch.bfloat16; expected"),
    ],
)
def test_what_cannot_be_followed_is_said_at_the_first_step(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(MetaplError, match=expected) as caught:
        first_step(tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert torch.autograd.backward.__name__ == "backward"


def test_float16_and_a_scaler_are_refused_by_name(tmp_path: Path) -> None:
    model = network().float()
    optimizer = OPTIMIZERS["SGD"](model)
    with record(model, optimizer, out=tmp_path / "r", train=(X, Y)):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(X[:6].float()).float(), Y[:6])
        loss.backward()
        with pytest.raises(MetaplError, match="trains in float16, whose scaled steps"):
            optimizer.step()


def test_autocast_to_bfloat16_is_followed(tmp_path: Path) -> None:
    model = network().float()
    optimizer = OPTIMIZERS["SGD"](model)
    x = X.float()
    with record(model, optimizer, out=tmp_path / "r", train=(x, Y), states_every=3) as recording:
        for parts in batches():
            rows = torch.cat(parts)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x[rows]), Y[rows])
            loss.backward()
            optimizer.step()
    attribution = recording.attribute((OUTER[0].float(), OUTER[1]), progress=False)
    assert attribution.replay_error < 1e-5
    assert attribution.scores.abs().max() > 0


def test_a_clipping_of_its_own_is_told_by_its_norm(tmp_path: Path) -> None:
    def clip(model: nn.Module) -> None:
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        for p in model.parameters():
            p.grad.mul_((0.1 / (norm + 1e-6)).clamp(max=1.0))

    with pytest.raises(MetaplError, match=r"clip_grad_norm_ or clip_norm="):
        first_step(tmp_path / "seen", before_step=clip)
    first_step(tmp_path / "told", before_step=clip, clip_norm=0.1)


def test_more_bytes_than_allowed_end_the_recording_and_not_the_training(tmp_path: Path) -> None:
    class Labeled(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = Labeled(5, CLASSES).double()
    optimizer = OPTIMIZERS["SGD"](model)

    def loop() -> None:
        for parts in batches():
            rows = torch.cat(parts)
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows], Y[rows]), Y[rows]).backward()
            optimizer.step()

    expected = r"ended before step 2: .* bytes; expected max_bytes="
    with record(model, optimizer, out=tmp_path / "r", max_bytes=700, states_every=1) as recording:
        with pytest.warns(UserWarning, match=expected):
            loop()
    assert recording.steps < STEPS
    outer = {"x": OUTER[0], "labels": OUTER[1]}
    found = recording.attribute(outer, progress=False)
    assert found.scores.abs().max() > 0


# Inputs are looked up in the data where rows are written, so that other inputs take the rows before
# them along.
@pytest.mark.parametrize(
    ("kind", "kept"), [("clipped values", 3), ("other inputs", 2), ("no call", 3)]
)
def test_what_a_later_step_does_ends_the_recording_and_not_the_training(
    kind: str, kept: int, tmp_path: Path
) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step, rows in enumerate(torch.arange(EXAMPLES).split(6)):
            optimizer.zero_grad()
            x = X[rows] + 0.5 if kind == "other inputs" and step == 3 else X[rows]
            if kind == "no call" and step == 3:
                model[0].weight.square().sum().backward()
            else:
                F.cross_entropy(model(x), Y[rows]).backward()
            if kind == "clipped values" and step == 3:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()

    plain = network(dropout=0.0)
    loop(plain, OPTIMIZERS["SGD"](plain))
    model = network(dropout=0.0)
    optimizer = OPTIMIZERS["SGD"](model)
    with record(model, optimizer, out=tmp_path / "r", train=(X, Y), states_every=2) as recording:
        with pytest.warns(UserWarning, match=f"ended before step {kept}: .* goes on without it"):
            loop(model, optimizer)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert p.equal(q)
    assert len(recording.order) == kept
    assert recording.attribute(OUTER, progress=False).scores[:12].abs().min() > 0


def test_what_a_network_is_called_with_beside_rows_is_recorded(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(dropout=0.0)

        def forward(self, x: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> Tensor:
            outputs: Tensor = scale * self.body(x)
            return outputs

    model = Scaled()
    optimizer = OPTIMIZERS["SGD"](model)
    with record(model, optimizer, out=tmp_path / "r") as recording:
        F.cross_entropy(model(X[:6], labels=Y[:6], scale=2.0), Y[:6]).backward()
        optimizer.step()
    outer = {"x": OUTER[0], "labels": OUTER[1]}
    with torch.no_grad():
        loss = F.cross_entropy(model(OUTER[0], scale=2.0), OUTER[1])
    assert abs(recording.attribute(outer, progress=False).outer_loss - loss) < 1e-12


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match="states_every=0: expected"):
        record(network(), out=tmp_path / "r", states_every=0)
    with pytest.raises(MetaplError, match="model is of type int; expected a module"):
        record(3, out=tmp_path / "r")  # type: ignore[arg-type]
    with pytest.raises(MetaplError, match="expected an EqualWeights with its signal"):
        record(network(), out=tmp_path / "r", problem=metapl.PseudoLabels())  # type: ignore[arg-type]
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------- what it leads to


def test_examples_of_a_tokenizer_are_lists_of_numbers(tmp_path: Path) -> None:
    """As those of a ``datasets.Dataset``, of which a Trainer makes tensors."""
    ids = torch.randint(7, (EXAMPLES, 4), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()

        def forward(self, input_ids: Tensor) -> Tensor:
            outputs: Tensor = self.body(input_ids)
            return outputs

    scores: list[Tensor] = []
    for number, data in enumerate((rows, {"input_ids": ids, "labels": ids})):
        model = Model()
        optimizer = OPTIMIZERS["SGD"](model)
        out = tmp_path / str(number)
        problem = metapl.problems.NextToken()
        with record(model, optimizer, out=out, problem=problem, train=data) as recording:
            for parts in batches(3):
                batch = ids[torch.cat(parts)]
                optimizer.zero_grad()
                outputs = model(input_ids=batch)[:, :-1].transpose(1, 2)
                F.cross_entropy(outputs, batch[:, 1:]).backward()
                optimizer.step()
        outer = rows[:5] if number == 0 else {"input_ids": ids[:5], "labels": ids[:5]}
        scores.append(recording.attribute(outer, progress=False).scores)
    assert scores[0].equal(scores[1])
    assert scores[0].abs().max() > 0


@pytest.mark.parametrize("form", ["pair", "ids", "rows", "by sight"])
def test_ids_alone_are_the_labels_of_a_language_model(form: str, tmp_path: Path) -> None:
    """The reference is double backward through the loop."""
    ids = torch.randint(7, (EXAMPLES, 4), generator=torch.Generator().manual_seed(2))
    data = {"pair": (ids, ids), "ids": ids, "rows": [*ids], "by sight": None}[form]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()

    def losses_of(outputs: Tensor, batch: Tensor) -> Tensor:
        words = outputs[:, :-1].transpose(1, 2)
        return F.cross_entropy(words, batch[:, 1:], reduction="none").mean(1)

    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    weights = torch.ones(EXAMPLES, dtype=torch.float64, requires_grad=True)
    for parts in batches():
        rows = torch.cat(parts)
        outputs = torch.func.functional_call(model, theta, (ids[rows],))
        loss = (weights[rows] * losses_of(outputs, ids[rows])).mean()
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        theta = {n: t - 0.3 * g for (n, t), g in zip(theta.items(), gradients, strict=True)}
    outputs = torch.func.functional_call(model, theta, (ids[:5],))
    (slope,) = torch.autograd.grad(losses_of(outputs, ids[:5]).mean(), weights)

    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    problem = metapl.problems.NextToken()
    with record(model, optimizer, out=tmp_path / "r", problem=problem, train=data) as recording:
        for parts in batches():
            batch = ids[torch.cat(parts)]
            optimizer.zero_grad()
            losses_of(model(batch), batch).mean().backward()
            optimizer.step()
    outer = (ids[:5], ids[:5]) if form == "pair" else ids[:5]
    scores = recording.attribute(outer, progress=False).scores
    # Without a data set, in the order in which they were first seen.
    seen = [*dict.fromkeys(torch.cat([torch.cat(parts) for parts in batches()]).tolist())]
    expected = -slope[seen] if form == "by sight" else -slope
    assert (scores - expected).abs().max() < 1e-9 * expected.abs().max()


def test_rows_are_known_by_their_bits_and_not_by_their_padding() -> None:
    from metapl.execution.batch import row_digests

    ids = torch.randint(0, 50, (6, 9))
    mask = torch.ones(6, 9, dtype=torch.int64)
    mask[:3, 6:] = 0
    digests = row_digests({"input_ids": ids, "attention_mask": mask}, ignores_padding=True)
    longer = {
        "input_ids": F.pad(ids, (0, 4), value=7),
        "attention_mask": F.pad(mask, (0, 4)),
    }
    assert row_digests(longer, ignores_padding=True).equal(digests)
    assert not row_digests(longer).equal(digests)
    shuffled = torch.randperm(6)
    assert row_digests({"a": ids[shuffled]}).equal(row_digests({"a": ids})[shuffled])
    # A part of a tensor that begins at an odd place, and rows that fill no words.
    values = torch.randn(7, 3)
    assert row_digests(values.flatten()[1:19].view(3, 6)).equal(
        row_digests(values.flatten()[1:19].clone().view(3, 6))
    )
    assert row_digests(values[2:]).equal(row_digests(values)[2:])
    # Small whole numbers in floating point differ in their leading bits alone.
    grid = torch.cartesian_prod(*[torch.arange(12.0)] * 4) / 16
    assert len(row_digests(grid).unique()) == len(grid)
    # Two numbers in every second column, in the upper halves of words.
    draw = torch.Generator().manual_seed(0)
    for two in ([0.0, 1.0], [-1.0, 1.0], [0.0, 2.0]):
        rows = torch.zeros(60_000, 64)
        rows[:, 1::2] = torch.tensor(two)[torch.randint(2, (60_000, 32), generator=draw)]
        assert len(row_digests(rows).unique()) == len(rows.unique(dim=0))


def test_a_dict_with_other_names_than_the_network_takes_is_named(tmp_path: Path) -> None:
    model = nn.Linear(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 16)
    labels = torch.arange(8) % 4

    def train_with(name: str) -> None:
        data = {name: x, "labels": labels}
        with record(model, optimizer, out=tmp_path / name, train=data):
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

    # As Linear calls it.
    train_with("input")
    optimizer.zero_grad()
    with pytest.raises(MetaplError, match="a dict of pixels, and the network's forward takes inp"):
        train_with("pixels")
