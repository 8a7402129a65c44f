"""``metapl.record`` on loops that do more than a step needs, and on networks that it cannot follow.

The reference is the loop itself: its outer loss after trainings with other weights of the examples,
by central differences in float64.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from metapl import MetaplError, Recording, record
from metapl.attribution.attribute import mean_of
from metapl.guards.verification import VerificationWarning
from metapl.problems import EqualWeights

EXAMPLES = 24
STEPS = 9
CLASSES = 3
STATES_EVERY = 4

draw = torch.Generator().manual_seed(0)
X = torch.randn(EXAMPLES, 5, generator=draw, dtype=torch.float64)
Y = torch.randint(CLASSES, (EXAMPLES,), generator=draw)
OUTER = torch.randn(9, 5, generator=draw, dtype=torch.float64), torch.arange(9) % CLASSES

# A loop, given a network and the weights of the examples; None: its losses are not weighted.
Loop = Callable[[nn.Module, Tensor | None], object]


def network(dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers).double()


def with_batch_norm() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers).double()


class Words(nn.Module):
    """A bag of words, with some options of the embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(6, 4, dtype=torch.float64, **options)
        self.head = nn.Linear(4, CLASSES, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=0.01)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randperm(EXAMPLES, generator=generator)[:8] for _ in range(STEPS)]


def loss_of(model: nn.Module, rows: Tensor, weights: Tensor | None, data: Tensor = X) -> Tensor:
    losses = F.cross_entropy(model(data[rows]), Y[rows], reduction="none")
    return losses.mean() if weights is None else (weights[rows] * losses).mean()


def outer_loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(OUTER[0]), OUTER[1]))


def recorded(
    loop: Loop,
    out: Path,
    build: Callable[[], nn.Module] = network,
    *,
    train: Any = (X, Y),
    problem: EqualWeights | None = None,
    states_every: int = STATES_EVERY,
) -> Recording:
    model = build()
    with record(
        model, out=out / "r", problem=problem, train=train, states_every=states_every
    ) as recording:
        loop(model, None)
    return recording


def assert_right(
    loop: Loop,
    out: Path,
    build: Callable[[], nn.Module] = network,
    *,
    problem: EqualWeights | None = None,
) -> None:
    """Compare the scores with differences of the loop, and the loop's bits with those without."""
    plain = build()
    loop(plain, None)
    recording = recorded(loop, out, build, problem=problem)
    attribution = recording.attribute(OUTER, progress=False)
    for name, p in plain.named_parameters():
        assert attribution.student_params[name].equal(p)
    buffers = {name: b.clone() for name, b in plain.named_buffers()}
    assert abs(float(attribution.outer_loss) - outer_loss(plain)) < 1e-12

    def loss_with(weights: Tensor) -> float:
        model = build()
        loop(model, weights)
        for name, b in model.named_buffers():
            # They count as constants in the outer loss.
            b.copy_(buffers[name])
        return outer_loss(model)

    h = 1e-5
    direction = torch.randn(EXAMPLES, generator=torch.Generator().manual_seed(2)).double()
    ones = torch.ones(EXAMPLES, dtype=torch.float64)
    difference = (loss_with(ones + h * direction) - loss_with(ones - h * direction)) / (2 * h)
    slope = float(-(attribution.scores * direction).sum())
    assert abs(slope - difference) < 1e-7 * float(attribution.scores.abs().max() + abs(slope))


# ------------------------------------------------------------------ what a step does not consist of


def loop_with(
    before: Callable[[nn.Module, int], object] = lambda model, step: None,
    after: Callable[[nn.Module, int], object] = lambda model, step: None,
) -> Loop:
    """Return a loop that does something before and after each step."""

    def loop(model: nn.Module, weights: Tensor | None) -> None:
        torch.manual_seed(3)
        optimizer = optimizer_of(model)
        for step, rows in enumerate(batches()):
            optimizer.zero_grad()
            before(model, step)
            loss_of(model, rows, weights).backward()
            optimizer.step()
            after(model, step)

    return loop


def evaluate(data: Tensor, *, evaluates: bool) -> Callable[[nn.Module, int], None]:
    def look(model: nn.Module, step: int) -> None:
        if step % 3 == 0:
            model.train(not evaluates)
            # Somebody forgot torch.no_grad().
            model(data)
            model.train()

    return look


@pytest.mark.parametrize("evaluates", [True, False])
@pytest.mark.parametrize("data", ["training", "validation"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_that_is_not_backpropagated_is_no_micro_batch(
    data: str, when: str, evaluates: bool, tmp_path: Path
) -> None:
    look = evaluate(X[:7] if data == "training" else OUTER[0], evaluates=evaluates)
    loop = loop_with(before=look) if when == "before" else loop_with(after=look)
    assert_right(loop, tmp_path)


@pytest.mark.parametrize("first_step", [0, 3])
@pytest.mark.parametrize("data", ["training", "validation"])
def test_a_picture_of_what_the_network_looks_at_is_no_micro_batch(
    data: str, first_step: int, tmp_path: Path
) -> None:
    rows = X[:7] if data == "training" else OUTER[0]

    def look(model: nn.Module, step: int) -> None:
        if step >= first_step:
            inputs = rows.clone().requires_grad_()
            torch.autograd.grad(model(inputs).sum(), inputs)

    assert_right(loop_with(before=look), tmp_path)


def test_a_loop_without_backward_is_followed(tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        torch.manual_seed(3)
        optimizer = optimizer_of(model)
        parameters = [*model.parameters()]
        for rows in batches():
            gradients = torch.autograd.grad(loss_of(model, rows, weights), parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            optimizer.step()

    assert_right(loop, tmp_path)


@pytest.mark.parametrize("sets_to_none", [True, False])
@pytest.mark.parametrize("is_backpropagated", [True, False])
def test_a_batch_that_is_skipped_is_no_micro_batch(
    is_backpropagated: bool, sets_to_none: bool, tmp_path: Path
) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        torch.manual_seed(3)
        optimizer = optimizer_of(model)
        for step, rows in enumerate(batches()):
            optimizer.zero_grad(set_to_none=sets_to_none)
            loss = loss_of(model, rows, weights)
            if step in (0, 5):
                # As of a loss that is no number.
                if is_backpropagated:
                    loss.backward()
                continue
            loss.backward()
            optimizer.step()

    assert_right(loop, tmp_path)


def test_a_batch_that_zero_grad_drops_between_its_passes_is_no_micro_batch(tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        torch.manual_seed(3)
        optimizer = optimizer_of(model)
        for step, rows in enumerate(batches()):
            loss = loss_of(model, rows, weights)
            optimizer.zero_grad()
            loss.backward()
            if step not in (2, 5):
                optimizer.step()

    assert_right(loop, tmp_path)


OF_CLASSES = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


class OfClasses(EqualWeights):
    """Cross-entropy with weights of classes, in the units of the mean over the examples."""

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = F.cross_entropy(outputs, batch[1], OF_CLASSES, reduction="none")
        return signal.value * losses


class OverTheirSum(OfClasses):
    """The same, divided by the sum of the weights, as PyTorch's mean is."""

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = super().inner_loss(outputs, signal, batch, params)
        return losses * len(losses) / OF_CLASSES[batch[1]].sum()


def with_weights_of_classes(model: nn.Module, weights: Tensor | None) -> None:
    optimizer = optimizer_of(model)
    for rows in batches():
        optimizer.zero_grad()
        losses = F.cross_entropy(model(X[rows]), Y[rows], OF_CLASSES, reduction="none")
        if weights is not None:
            losses = weights[rows] * losses
        (losses.sum() / OF_CLASSES[Y[rows]].sum()).backward()
        optimizer.step()


def test_a_loss_that_divides_by_another_number_ends_the_recording(tmp_path: Path) -> None:
    # The weights in step 4 happen to have the sum of those in the first step.
    with pytest.warns(UserWarning, match=r"in step 8 p.grad differs .* OfClasses's .* inner_loss"):
        recording = recorded(with_weights_of_classes, tmp_path, problem=OfClasses())
    with pytest.raises(MetaplError, match=r"the loss in step \d is .* was recorded"):
        recording.attribute(OUTER, progress=False)


def test_a_loss_that_divides_by_another_number_is_followed_by_its_problem(tmp_path: Path) -> None:
    assert_right(with_weights_of_classes, tmp_path, problem=OverTheirSum())


def test_a_loop_that_looks_at_its_gradient_first_is_followed(tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        torch.manual_seed(3)
        optimizer = optimizer_of(model)
        for rows in batches():
            loss = loss_of(model, rows, weights)
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    assert_right(loop, tmp_path)


def test_a_penalty_that_begins_at_zero_ends_the_recording(tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        start = [p.detach().clone() for p in model.parameters()]
        for rows in batches():
            optimizer.zero_grad()
            far = sum(
                (p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True)
            )
            (loss_of(model, rows, weights) + 0.05 * far).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"in step 4 p.grad differs .* by 0\.\d+ of its size"):
        recorded(loop, tmp_path)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_first_gradient_tells_how_micro_batches_weigh(reduction: str, tmp_path: Path) -> None:
    """All losses are the same where a head begins at zero, whatever the weights are."""

    def with_zero_head() -> nn.Module:
        model = network(0.0)
        nn.init.zeros_(model[3].weight)
        nn.init.zeros_(model[3].bias)
        return model

    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        for rows in batches():
            optimizer.zero_grad()
            for part in rows.split([2, 6]):
                loss = loss_of(model, part, weights)
                (loss / 2 if reduction == "mean" else loss).backward()
            optimizer.step()

    assert_right(loop, tmp_path, with_zero_head)


def test_another_optimizer_ends_the_recording(tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        torch.manual_seed(3)
        optimizer = optimizer_of(model)
        for step, rows in enumerate(batches()):
            if step == 5:
                optimizer = torch.optim.Adam(model.parameters(), 0.01)
            optimizer.zero_grad()
            loss_of(model, rows, weights).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="ended before step 5: another optimizer, of type Adam"):
        recording = recorded(loop, tmp_path)
    assert recording.attribute(OUTER, progress=False).order.shape == (5, 8)


def test_an_optimizer_in_another_one_is_followed(tmp_path: Path) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inside: torch.optim.Optimizer) -> None:
            super().__init__(inside.param_groups, {})
            self.inside = inside

        def step(self, closure: Any = None) -> None:
            self.inside.step()

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        wrapper = Wrapper(optimizer)
        for rows in batches():
            wrapper.zero_grad()
            loss_of(model, rows, None).backward()
            wrapper.step()

    model = network(0.0)
    optimizer = optimizer_of(model)
    with record(model, optimizer, out=tmp_path / "r", train=(X, Y)) as recording:
        loop(model, optimizer)
    assert recording.steps == STEPS
    attribution = recording.attribute(OUTER, progress=False)
    assert abs(float(attribution.outer_loss) - outer_loss(model)) < 1e-12


class WithIgnored(EqualWeights):
    """A loss of a user's own, which leaves some examples out."""

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        labels = batch[1]
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return signal.value * losses * len(labels) / (labels != -100).sum()


def test_a_loss_of_ones_own_reads_its_labels_alone(tmp_path: Path) -> None:
    labels = Y.clone()
    labels[::3] = -100
    model = network(0.0)
    optimizer = optimizer_of(model)
    data = X, labels
    with record(model, optimizer, out=tmp_path, train=data, problem=WithIgnored()) as recording:
        for rows in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]), labels[rows]).backward()
            optimizer.step()
    attribution = recording.attribute(OUTER, progress=False)
    assert abs(float(attribution.outer_loss) - outer_loss(model)) < 1e-12
    assert not attribution.scores[::3].any()
    with pytest.raises(MetaplError, match="the labels are -100..2"):
        recording.attribute((OUTER[0], labels[:9]), progress=False)


def test_a_forward_that_raises_is_no_micro_batch(tmp_path: Path) -> None:
    def too_wide(model: nn.Module, step: int) -> None:
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.zeros(3, 4, dtype=torch.float64))

    assert_right(loop_with(before=too_wide), tmp_path)


@pytest.mark.parametrize("first_step", [0, 4])
def test_losses_of_another_network_are_none_of_this_one(first_step: int, tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        torch.manual_seed(3)
        other = network(dropout=0.0)
        other_optimizer = torch.optim.AdamW(other.parameters(), 0.1)

        def train_other(_: nn.Module, step: int) -> None:
            if step >= first_step:
                other_optimizer.zero_grad()
                F.cross_entropy(other(X), Y).backward()
                other_optimizer.step()

        loop_with(before=train_other, after=train_other)(model, weights)

    assert_right(loop, tmp_path)


def test_a_penalty_that_is_backpropagated_alone_is_seen(tmp_path: Path) -> None:
    def penalize(model: nn.Module, step: int) -> None:
        # These steps do not keep their states, and are not compared in the loop.
        if step in (5, 6):
            (0.1 * model[0].weight.square().sum()).backward()

    recording = recorded(loop_with(before=penalize), tmp_path)
    with pytest.raises(MetaplError, match=r"the loss in step \d is .* was recorded"):
        recording.attribute(OUTER, progress=False)


def test_the_last_steps_are_compared_where_their_state_was_not_there_any_more(
    tmp_path: Path,
) -> None:
    def shrink_in_the_end(model: nn.Module, step: int) -> None:
        if step == STEPS - 1:
            for p in model.parameters():
                p.grad.mul_(0.5)

    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        for step, rows in enumerate(batches()):
            optimizer.zero_grad()
            loss_of(model, rows, weights).backward()
            shrink_in_the_end(model, step)
            optimizer.step()
        # As load_best_model_at_end.
        model.load_state_dict(network().state_dict())

    with pytest.warns(UserWarning, match="the recording ends with those of the last step"):
        recording = recorded(loop, tmp_path, states_every=5)
    with pytest.raises(MetaplError, match="the steps before step 9 were taken again, and lead to"):
        recording.attribute(OUTER, progress=False)


def test_a_step_at_moved_weights_is_refused_at_once(tmp_path: Path) -> None:
    """As sharpness-aware minimization takes it."""

    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        rows = batches()[0]
        loss_of(model, rows, weights).backward()
        with torch.no_grad():
            model[0].weight.add_(0.1)
        optimizer.zero_grad()
        loss_of(model, rows, weights).backward()
        with torch.no_grad():
            model[0].weight.sub_(0.1)
        optimizer.step()

    with pytest.raises(MetaplError, match="differs from p.grad"):
        recorded(loop, tmp_path)


COPIES: dict[str, Callable[[nn.Module], object]] = {
    "deepcopy": copy.deepcopy,
    "an average": torch.optim.swa_utils.AveragedModel,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
}


def shift(module: nn.Module, args: Any, outputs: Tensor) -> Tensor:
    """Shift what a layer returns, as a hook on it."""
    return outputs + 0.5


def test_hooks_that_are_gone_after_the_recording_are_named(tmp_path: Path) -> None:
    model = network()
    handle = model[0].register_forward_hook(shift)
    with record(model, out=tmp_path / "r", train=(X, Y), states_every=1) as recording:
        loop_with()(model, None)
    handle.remove()
    with pytest.raises(MetaplError, match="expected the network .* with the hooks that it had"):
        recording.attribute(OUTER, progress=False)
    # What it proposes.
    model[0].register_forward_hook(shift)
    assert recording.attribute(OUTER, progress=False).scores.isfinite().all()


def test_weights_that_are_put_back_are_not_warned_of(tmp_path: Path) -> None:
    """As where an average of the weights is evaluated after each step."""

    def evaluate_average(model: nn.Module, step: int) -> None:
        weights = copy.deepcopy(model.state_dict())
        model.load_state_dict({name: 0.5 * t for name, t in weights.items()})
        model.load_state_dict(weights)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(loop_with(after=evaluate_average), tmp_path)


@pytest.mark.parametrize("way", [*COPIES])
def test_a_loop_may_copy_its_network(way: str, tmp_path: Path) -> None:
    def keep(model: nn.Module, step: int) -> None:
        twin = COPIES[way](model)
        if isinstance(twin, nn.Module):
            # Nobody follows the copy, whose data are no examples.
            twin(OUTER[0]).sum().backward()

    assert_right(loop_with(before=keep, after=keep), tmp_path)


def test_parts_train_and_evaluate_as_they_did_in_each_step(tmp_path: Path) -> None:
    def switch(model: nn.Module, step: int) -> None:
        model[2].train(step % 3 == 1)

    assert_right(loop_with(before=switch), tmp_path, lambda: network(dropout=0.5))


def test_weights_that_are_frozen_later_end_the_recording(tmp_path: Path) -> None:
    def freeze(model: nn.Module, step: int) -> None:
        model[0].requires_grad_(step != 5)

    with pytest.warns(UserWarning, match="ended before step 5: the loop learns other weights"):
        recording = recorded(loop_with(before=freeze), tmp_path)
    assert recording.attribute(OUTER, progress=False).order.shape == (5, 8)


class Padded(Words):
    """A classifier of padded sequences, which is called with the labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Tensor:
        mask = attention_mask.unsqueeze(2).double()
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return self.head(torch.tanh(mean))


@pytest.mark.parametrize("padding", [0, 5])
def test_a_sequence_is_one_example_however_it_is_padded(padding: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    sequences = []
    for number in range(EXAMPLES):
        ids = torch.randint(6, (2 + number % 4,), generator=generator)
        sequences.append({"input_ids": ids, "labels": Y[number]})

    def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding),
            "attention_mask": nn.utils.rnn.pad_sequence(
                [torch.ones_like(t) for t in ids], batch_first=True
            ),
            "labels": torch.stack([row["labels"] for row in rows]),
        }

    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        for rows in batches():
            optimizer.zero_grad()
            batch = padded([sequences[number] for number in rows[:3].tolist()])
            F.cross_entropy(model(**batch), batch["labels"]).backward()
            optimizer.step()

    outer = padded(sequences[:5])
    loader = torch.utils.data.DataLoader(sequences, collate_fn=padded)  # type: ignore[arg-type]
    in_data = recorded(loop, tmp_path / "data", Padded, train=loader)
    by_sight = recorded(loop, tmp_path / "sight", Padded, train=None)
    seen = [*dict.fromkeys(torch.stack(batches())[:, :3].flatten().tolist())]
    expected = in_data.attribute(outer, progress=False)
    attribution = by_sight.attribute(outer, progress=False)
    assert attribution.scores.shape == (len(seen),)
    assert (attribution.scores - expected.scores[seen]).abs().max() < 1e-14
    assert torch.tensor(seen)[by_sight.order].equal(in_data.order)
    removals = [[0], [1, 2], [3]]
    retrained = attribution.validate(removals, progress=False).retrained
    in_numbers_of_data = [[seen[place] for place in places] for places in removals]
    expected_changes = expected.validate(in_numbers_of_data, progress=False).retrained
    assert (retrained - expected_changes).abs().max() < 1e-12


# ----------------------------------------------------------------------------- what is warned about


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": lambda model: nn.DataParallel(model),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=[*WRAPPERS])
@pytest.mark.parametrize("build", [network, with_batch_norm])
def test_a_wrapper_in_one_process_is_seen_through(
    wrap: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    loop = loop_with()
    plain = recorded(loop, tmp_path, build).attribute(OUTER, progress=False)
    model = wrap(build())
    with record(model, out=tmp_path / "w", train=(X, Y), states_every=STATES_EVERY) as recording:
        loop(model, None)
    assert recording.attribute(OUTER, progress=False).scores.equal(plain.scores)
    for other in (wrap(build()), build()):
        opened = Recording.open(tmp_path / "w", other, train=(X, Y))
        assert opened.attribute(OUTER, progress=False).scores.equal(plain.scores)


def averaged_in_two_processes(rank: int, meeting: str, out: str, pipe: Any) -> None:
    """Record a training in two processes, and send what is refused."""
    distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{meeting}")
    model = network(dropout=0.0)
    replicated = nn.parallel.DistributedDataParallel(model)
    refusals: list[str] = []
    try:
        record(replicated, out=f"{out}/whole{rank}", train=(X, Y))
    except MetaplError as error:
        refusals.append(str(error))
    try:
        with record(model, out=f"{out}/inside{rank}", train=(X, Y)):
            optimizer = optimizer_of(model)
            F.cross_entropy(replicated(X[rank::2]), Y[rank::2]).backward()
            optimizer.step()
    except MetaplError as error:
        refusals.append(str(error))
    pipe.put(refusals)
    distributed.destroy_process_group()


@pytest.mark.long
def test_several_processes_are_refused_in_these_words(tmp_path: Path) -> None:
    spawn = torch.multiprocessing.get_context("spawn")
    queue = spawn.SimpleQueue()
    arguments = str(tmp_path / "meeting"), str(tmp_path), queue
    processes = [
        spawn.Process(target=averaged_in_two_processes, args=(rank, *arguments)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        refusals = queue.get()
        assert len(refusals) == 2
        for text in refusals:
            assert "trained in several processes; expected one process" in text
    for process in processes:
        process.join()


def test_wrappers_that_no_pass_goes_through_are_named(tmp_path: Path) -> None:
    compiled = torch.compile(network())
    for model in (compiled, nn.Sequential(compiled)):
        with pytest.raises(MetaplError, match="the network is under torch.compile"):
            record(model, out=tmp_path, train=(X, Y))
    scripted = torch.jit.script(network())
    with pytest.raises(MetaplError, match="the network has a ScriptModule, .* made from"):
        record(scripted, out=tmp_path, train=(X, Y))
    with pytest.raises(MetaplError, match="the network has a DataParallel at '0'"):
        record(nn.Sequential(nn.DataParallel(network())), out=tmp_path, train=(X, Y))


def test_a_loader_may_draw_as_it_likes(tmp_path: Path) -> None:
    """A recording has the draws of the loop itself."""
    data = torch.utils.data.TensorDataset(X, Y)
    sampler = torch.utils.data.WeightedRandomSampler(
        [1.0] * 12 + [0.1] * 12, 30, generator=torch.Generator().manual_seed(0)
    )
    batch_sampler = torch.utils.data.BatchSampler(sampler, 8, drop_last=True)
    loader = torch.utils.data.DataLoader(data, batch_sampler=batch_sampler)

    def loop(model: nn.Module, weights: Tensor | None) -> None:
        sampler.generator.manual_seed(4)
        torch.manual_seed(3)
        optimizer = optimizer_of(model)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    scores = [
        recorded(loop, tmp_path / name, train=train).attribute(OUTER, progress=False).scores
        for name, train in (("loader", loader), ("columns", (X, Y)))
    ]
    assert scores[0].equal(scores[1])


def test_equal_examples_are_named(tmp_path: Path) -> None:
    x = X.clone()
    y = Y.clone()
    for number in (7, 15):
        x[number] = x[3]
        y[number] = y[3]

    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        for rows in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()

    with pytest.warns(
        UserWarning, match="2 of the 24 examples of train equal an earlier one, such"
    ):
        recording = recorded(loop, tmp_path, train=(x, y))
    scores = recording.attribute(OUTER, progress=False).scores
    assert scores[7] == scores[15] == 0
    assert scores[3] != 0


def spectral() -> nn.Sequential:
    model = network()
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def freeze_batch_norm(model: nn.Module, step: int) -> None:
    if step == 5:
        model[1].eval()


class CenteredByAll(nn.Module):
    """A layer on what its inputs are beside their mean over all passes so far."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1)
            self.mean.add_((x.detach().mean(0) - self.mean) / self.count)
        logits: Tensor = self.layer(x - self.mean)
        return logits


@pytest.mark.parametrize(
    ("build", "loop", "name"),
    [
        (spectral, loop_with(), r"0\.parametrizations\.weight\.0\._"),
        (lambda: CenteredByAll().double(), loop_with(), "mean"),
        (with_batch_norm, loop_with(before=freeze_batch_norm), r"1\.running_mean, 1\.running_var"),
    ],
)
def test_moved_buffers_that_the_losses_read_are_named(
    build: Callable[[], nn.Module], loop: Loop, name: str, tmp_path: Path
) -> None:
    recording = recorded(loop, tmp_path, build)
    with pytest.warns(UserWarning, match=f"the losses read {name}.*counts them as constants"):
        recording.attribute(OUTER, progress=False, verify=False)


def test_a_norm_that_a_loop_looks_at_by_a_clip_to_infinity_is_none(tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        for rows in batches():
            optimizer.zero_grad()
            loss_of(model, rows, weights).backward()
            nn.utils.clip_grad_norm_(model.parameters(), float("inf"), norm_type=1.0)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()

    assert_right(loop, tmp_path)


class Detached(nn.Module):
    """A layer on rows of a length that its gradient takes for a constant, as DoRA's."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(5, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        lengths = self.rows.weight.norm(dim=1, keepdim=True).detach()
        logits: Tensor = self.head(torch.tanh(F.linear(x, self.rows.weight / lengths)))
        return logits


def test_a_gradient_that_is_not_the_derivative_of_the_loss_is_said(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return Detached().double()

    recording = recorded(loop_with(), tmp_path, build)
    with pytest.warns(VerificationWarning, match=r"is not its derivative \(straight-through, det"):
        recording.attribute(OUTER, progress=False)


class Centered(nn.Module):
    """A layer on what its inputs are beside their running mean, which each pass moves."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        logits: Tensor = self.layer(x - self.mean)
        return logits


def loop_of_micro_batches(model: nn.Module, weights: Tensor | None) -> None:
    optimizer = optimizer_of(model)
    for rows in batches():
        optimizer.zero_grad()
        for part in rows.chunk(2):
            (loss_of(model, part, weights) / 2).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:the losses read mean")
def test_a_buffer_moves_between_micro_batches(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Centered().double()

    assert_right(loop_of_micro_batches, tmp_path, build)


def test_running_statistics_that_no_step_reads_are_not_warned_of(tmp_path: Path) -> None:
    recording = recorded(loop_with(), tmp_path, with_batch_norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recording.attribute(OUTER, progress=False)


# -------------------------------------------------------------------------------- what is refused


IDS = torch.randint(6, (EXAMPLES, 5), generator=torch.Generator().manual_seed(1))


def words_loop(model: nn.Module, weights: Tensor | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for rows in batches():
        optimizer.zero_grad()
        loss_of(model, rows, weights, data=IDS).backward()
        optimizer.step()


class Writing(nn.Linear):
    """A layer that writes to its weight past its version."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_forward_that_writes_to_weights_is_refused_at_once(tmp_path: Path) -> None:
    # None of these norms is above the largest one: the embedding writes the same values.
    with pytest.raises(MetaplError, match=r"writes to embedding\.weight, as an nn.Embedding with"):
        recorded(words_loop, tmp_path / "a", lambda: Words(max_norm=100.0), train=(IDS, Y))
    torch.manual_seed(1)
    with pytest.raises(MetaplError, match="writes to weight, as"):
        recorded(loop_with(), tmp_path / "b", lambda: Writing(5, CLASSES).double())


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x.cosh().square()


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[3](NoSecondDerivative.apply(self.layers[0](x)))


def test_a_wrong_second_derivative_is_refused_before_the_replay(tmp_path: Path) -> None:
    recording = recorded(
        words_loop, tmp_path / "a", lambda: Words(scale_grad_by_freq=True), train=(IDS, Y)
    )
    outer = IDS[:9], OUTER[1]
    # Also of a network that is not verified, as a large one is not.
    for verify in (True, False):
        with pytest.raises(
            MetaplError, match=r"another one by double backward .* scale_grad_by_freq"
        ):
            recording.attribute(outer, verify=verify, progress=False)
    recorded(words_loop, tmp_path / "b", Words, train=(IDS, Y)).attribute(outer, progress=False)

    recording = recorded(loop_with(), tmp_path / "c", Marked)
    with pytest.raises(MetaplError, match="NoSecondDerivative lacks a derivative"):
        recording.attribute(OUTER, progress=False)


# ------------------------------------------------------------- how far rounding under autocast goes


def autocast_loop(
    label_smoothing: float = 0.0,
    before_step: Callable[[nn.Module, int], object] = lambda model, step: None,
    after_step: Callable[[nn.Module, int], object] = lambda model, step: None,
) -> Loop:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        for step, rows in enumerate(batches()):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(X[rows].float())
            F.cross_entropy(outputs.float(), Y[rows], label_smoothing=label_smoothing).backward()
            before_step(model, step)
            optimizer.step()
            after_step(model, step)

    return loop


def halve(model: nn.Module, step: int) -> None:
    if step > 1:
        for p in model.parameters():
            p.grad.mul_(0.5)


@torch.no_grad()
def shrink(model: nn.Module, step: int) -> None:
    if step < STEPS - 1:
        for p in model.parameters():
            p.mul_(0.97)


def test_under_autocast_what_is_more_than_rounding_is_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return network(dropout=0.0).float()

    data = X.float(), Y
    outer = OUTER[0].float(), OUTER[1]
    plain = recorded(autocast_loop(), tmp_path / "plain", build, train=data)
    attribution = plain.attribute(outer, progress=False)
    assert attribution.replay_error < 1e-5
    assert plain.loss_factor == 1.0
    for smoothing in (0.05, 0.1):
        with pytest.raises(MetaplError, match="differs from p.grad by 0.0"):
            recorded(autocast_loop(smoothing), tmp_path / str(smoothing), build, train=data)
    with pytest.warns(UserWarning, match="in step 4 p.grad differs"):
        recorded(autocast_loop(before_step=halve), tmp_path / "halved", build, train=data)
    shrunk = recorded(autocast_loop(after_step=shrink), tmp_path / "shrunk", build, train=data)
    with pytest.raises(MetaplError, match="differs from the recorded one|was recorded"):
        shrunk.attribute(outer, progress=False)


@pytest.mark.parametrize("factor", [0.0006, 1 / 3, 0.5, 4096.0])
def test_the_factor_under_autocast_is_that_of_the_loop(factor: float, tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for rows in batches()[:2]:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(X[rows].float())
            (factor * F.cross_entropy(outputs.float(), Y[rows])).backward()
            optimizer.step()

    recording = recorded(loop, tmp_path, lambda: network(0.0).float(), train=(X.float(), Y))
    assert abs(recording.loss_factor / factor - 1) < 1e-5


# At this rate the scores of 150 batches are larger than the loss.
@pytest.mark.filterwarnings("ignore:scores may not say")
def test_thirds_of_losses_under_autocast_are_replayed_as_the_loop_rounded_them(
    tmp_path: Path,
) -> None:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16).float()[:600], torch.tensor(y)[:600]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    # Adam turns the rounding of a small gradient into a step of the full rate.
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with record(model, optimizer, out=tmp_path / "thirds", train=(x, y)) as recording:
        for _ in range(50):
            optimizer.zero_grad()
            for rows in torch.randint(0, len(x), (3, 20)):
                with torch.autocast("cpu", torch.bfloat16):
                    outputs = model(x[rows])
                (F.cross_entropy(outputs.float(), y[rows]) / 3).backward()
            optimizer.step()
    attribution = recording.attribute((x, y), verify=False, progress=False)
    assert attribution.replay_error < 1e-2


@pytest.mark.parametrize("has_norm", [False, True])
def test_what_is_learned_may_change_after_the_steps_that_are_recorded(
    has_norm: bool, tmp_path: Path
) -> None:
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3

    def recorded(steps: int, thawed_at: int | None, out: str) -> tuple[int, Tensor]:
        """Return the steps of a recording, and the scores of the examples in it."""
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4) if has_norm else nn.Tanh()
        model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 3)).double()
        model[0].requires_grad_(requires_grad=False)
        frozen = copy.deepcopy(model[0].state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with record(model, optimizer, out=tmp_path / out, train=(x, y)) as recording:
            for step in range(steps):
                if step == thawed_at:
                    model[0].requires_grad_(requires_grad=True)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        # The recording is of a network with the frozen weights of its steps.
        model[0].requires_grad_(requires_grad=False)
        model[0].load_state_dict(frozen)
        return recording.steps, recording.attribute((x, y), progress=False).scores

    with pytest.warns(UserWarning, match="ended before step 13: the loop learns other weights"):
        steps, scores = recorded(20, 13, "thawed")
    expected_steps, expected = recorded(13, None, "frozen")
    assert steps == expected_steps == 13
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


def with_passes_that_lead_to_no_step(model: nn.Module, weights: Tensor | None) -> None:
    optimizer = optimizer_of(model)
    for step, rows in enumerate(batches()):
        optimizer.zero_grad()
        loss = loss_of(model, rows, weights)
        if step in (1, 4):
            continue
        loss.backward()
        optimizer.step()


def with_statistics_estimated_at_the_end(model: nn.Module, weights: Tensor | None) -> None:
    optimizer = optimizer_of(model)
    for rows in batches():
        optimizer.zero_grad()
        loss_of(model, rows, weights).backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(20):
            model(X)


# To first order in what a removal does to statistics, of which those that are estimated anew at the
# end follow the weights otherwise than those of the steps.
@pytest.mark.parametrize(
    ("loop", "tolerance"),
    [(with_passes_that_lead_to_no_step, 1e-3), (with_statistics_estimated_at_the_end, 4e-2)],
)
@pytest.mark.parametrize("states_every", [2, STATES_EVERY])
def test_retraining_has_the_statistics_of_passes_that_led_to_no_step(
    loop: Loop, tolerance: float, states_every: int, tmp_path: Path
) -> None:
    recording = recorded(loop, tmp_path, with_batch_norm, states_every=states_every)
    found = recording.attribute(OUTER, progress=False)
    removals = [[0], [1], [2], [3]]
    retrained = found.validate(removals, progress=False).retrained
    plain = with_batch_norm()
    loop(plain, None)
    real = []
    for removed in removals:
        model = with_batch_norm()
        weights = torch.ones(EXAMPLES, dtype=torch.float64)
        weights[removed] = 0.0
        loop(model, weights)
        real.append(outer_loss(model) - outer_loss(plain))
    expected = torch.tensor(real).to(retrained)
    torch.testing.assert_close(retrained, expected, rtol=0, atol=tolerance)
    same = found.validate([torch.zeros(EXAMPLES, dtype=torch.bool)] * 3, progress=False)
    assert float(same.retrained.abs().max()) < 1e-9


def test_the_mean_of_recordings_of_different_examples_is_refused(tmp_path: Path) -> None:
    def loop(model: nn.Module, data: Tensor) -> None:
        optimizer = optimizer_of(model)
        for rows in batches():
            optimizer.zero_grad()
            loss_of(model, rows, None, data).backward()
            optimizer.step()

    results = []
    for number, data in enumerate((X, X, X.flip(0))):
        recording = recorded(
            lambda model, _, data=data: loop(model, data),  # type: ignore[misc]
            tmp_path / str(number),
            train=(data, Y),
        )
        results.append(recording.attribute(OUTER, progress=False))
    assert mean_of(results[:2]).scores.shape == (EXAMPLES,)
    with pytest.raises(MetaplError, match="different examples"):
        mean_of(results)


class TwoHeads(nn.Module):
    """A network that takes one of two heads in turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.heads = nn.ModuleList(nn.Linear(5, CLASSES, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[len(x) % 2](x)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_of_zero_moves_a_weight_by_its_momentum(
    *, set_to_none: bool, tmp_path: Path
) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)
        for step, rows in enumerate(batches()):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, rows[step % 3 % 2 :], weights).backward()
            optimizer.step()

    assert_right(loop, tmp_path, TwoHeads)


def test_a_rate_that_a_hook_sets_before_the_step_is_that_of_the_step(tmp_path: Path) -> None:
    def loop(model: nn.Module, weights: Tensor | None) -> None:
        optimizer = optimizer_of(model)

        def set_rate(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            optimizer.param_groups[0]["lr"] *= 0.9

        optimizer.register_step_pre_hook(set_rate)
        for rows in batches():
            optimizer.zero_grad()
            loss_of(model, rows, weights).backward()
            optimizer.step()

    assert_right(loop, tmp_path)
