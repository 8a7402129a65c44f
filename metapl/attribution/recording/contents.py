"""The contents of a recording, which fit a network and its data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from metapl.attribution.examples import examples_of
from metapl.attribution.recording.calls import CallForm, Data, DigestIndex, RecordedRows
from metapl.attribution.recording.folder import RecordingFolder, StepRow
from metapl.attribution.recording.network import RecordedNetwork
from metapl.attribution.recording.recorder import shape_of
from metapl.errors import MetaplError, few
from metapl.execution.state import trainable
from metapl.problems.base import BilevelProblem, kind_of
from metapl.problems.doubtful import EqualWeights
from metapl.updates import TorchUpdate, update_of


@dataclass(frozen=True)
class OpenedRecording:
    """The contents of a recording, which fit the network and the data.

    Attributes:
        rows: of all steps.
        network: at any weights.
        update: the rule of the optimizer.
        data: the examples, or the rows that the recording has itself.
        example_numbers: the number of the example that each of these is, (rows,).
        digests: by which each example is known in a data set, (N,).
        has_data_set: whether examples are numbered as the rows of a data set, and not as they were
            first seen.
        states_every: steps from one kept state to the next.
        training_parts: the names of the parts that trained in the first call.
        first_sizes: how many examples, or tokens, each micro-batch of the first step had.
        factor: by which the loop multiplies the mean loss.
        counts_examples: whether the micro-batches of the first step weighed as their examples.
    """

    folder: RecordingFolder
    rows: list[StepRow]
    network: RecordedNetwork
    update: TorchUpdate
    data: Data
    example_numbers: Tensor
    digests: Tensor
    has_data_set: bool
    states_every: int
    training_parts: list[str]
    first_sizes: list[float]
    factor: float
    counts_examples: bool

    @staticmethod
    def of(
        folder: RecordingFolder, model: nn.Module, problem: EqualWeights, train: Any
    ) -> OpenedRecording:
        """Read a recording, or refuse it where it is of another network, problem or data set."""
        description = folder.read_description()
        rows = folder.read_steps()
        if not rows:
            raise MetaplError(
                f"the recording in {folder.path} has no step whose end was saved; expected a "
                "training that came to its second kept state (states_every=), or to its end, "
                "without what a line has said of it meanwhile."
            )
        refuse_other_network(description, model, problem)
        autocast = description["autocast"]
        network = RecordedNetwork(
            model,
            problem,
            None if autocast is None else type_named(autocast),
            map(type_named, description["types"]),
        )
        state, _ = folder.read_state(0, network.device)
        fixed = network.fixed_digest([*state.buffers])
        if not torch.equal(fixed.cpu(), description["fixed"]):
            raise MetaplError(
                f"the recording in {folder.path} is of a network with other frozen weights or "
                "buffers; expected those of the recording."
            )
        keys = description["keys"]
        form = CallForm(
            keys=None if keys is None else tuple(keys),
            has_labels=description["has_labels"],
            constants=description["constants"],
        )
        first = next(model.parameters())
        data, example_numbers, digests = data_of(description, folder, problem, train, form, first)
        return OpenedRecording(
            folder=folder,
            rows=rows,
            network=network,
            update=rule_of(description, rows[0], model),
            data=data,
            example_numbers=example_numbers,
            digests=digests,
            has_data_set=train is not None,
            states_every=description["states_every"],
            training_parts=description["training_parts"],
            first_sizes=description["first_sizes"],
            factor=description["factor"],
            counts_examples=description["counts_examples"],
        )

    def numbers_in(self, dataset: Any) -> Tensor:
        """Return the number of the example that each row of a data set is, −1 for none, (rows,).

        Of equal examples it is the number of the first. None: the data set of the recording.
        """
        of_rows = self.digests
        if dataset is not None:
            first = next(self.network.model.parameters())
            of_rows = digests_of(dataset, "dataset", self.data.problem, self.data.form, first)
            found_among(self.digests, of_rows, "dataset")
        return DigestIndex(self.digests).find(of_rows)

    def examples_of(self, row: StepRow) -> Tensor:
        """Return the numbers of the examples of a step, (B,)."""
        return self.example_numbers[torch.cat(row.numbers)]

    def outer_batch(self, batch: Any) -> Any:
        """Return an outer batch as the problem reads it."""
        return self.network.problem.outer_batch(self.data.form.selected(batch))


def type_named(name: str) -> torch.dtype:
    """Return a type of PyTorch by its name in a recording."""
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def refuse_other_network(
    description: dict[str, Any], model: nn.Module, problem: BilevelProblem
) -> None:
    """Refuse a network, a problem or a version of torch that is not the recording's."""
    # Another version of torch may round otherwise, and dropout draws from a device's generator.
    current: dict[str, Any] = {
        "torch": str(torch.__version__),
        "problem": kind_of(problem),
        "device": next(model.parameters()).device.type,
        "weights": {name: shape_of(p) for name, p in trainable(model).items()},
    }
    for name, value in current.items():
        recorded = description[name]
        if value == recorded:
            continue
        differ = f"{name} {recorded}, and this is {value}"
        if name == "weights":
            names = [key for key in {**recorded, **value} if value.get(key) != recorded.get(key)]
            differ = f"a {description['network']} with other weights that are trained, such as "
            differ += few(names, 3)
        raise MetaplError(f"the recording was made with {differ}; expected the same.")


def rule_of(description: dict[str, Any], row: StepRow, model: nn.Module) -> TorchUpdate:
    """Return the rule of the recorded optimizer, over the weights of a network."""
    parameters = trainable(model)
    kind: Any = getattr(torch.optim, description["optimizer"])
    groups: list[dict[str, Any]] = []
    for names, options in zip(description["groups"], row.options, strict=True):
        groups.append({**options, "params": [parameters[name] for name in names]})
    update = update_of(kind(groups), parameters)
    assert isinstance(update, TorchUpdate), "the optimizer is one of torch.optim"
    return update


def data_of(
    description: dict[str, Any],
    folder: RecordingFolder,
    problem: EqualWeights,
    train: Any,
    form: CallForm,
    first: Tensor,
) -> tuple[Data, Tensor, Tensor]:
    """Return the examples of a recording, their numbers, and the digest of each number.

    Of its own examples, several rows may be one example that was padded to several lengths. They
    are numbered as they were first seen, or as the rows of a data set.
    """
    digests = description["examples"]
    if digests is None:
        parts, numbers = folder.read_examples()
        rows = Data(RecordedRows(parts, first.device), problem, form)
        _, of_rows = rows.digests()
        of_rows = of_rows.cpu()
        example_numbers = torch.tensor(numbers)
        if train is None:
            digests = of_rows.new_zeros(max(numbers) + 1)
            digests[example_numbers] = of_rows
            return rows, example_numbers, digests
        digests = digests_of(train, "train", problem, form, first)
        return rows, found_among(of_rows, digests, "train"), digests
    if train is None:
        raise MetaplError(
            f"the recording in {folder.path} has numbers of examples alone; expected train= with "
            "the data set of the recording."
        )
    data = Data(examples_of(train, "train", first, each_once=False), problem, form)
    _, of_all = data.digests()
    pairs = zip_longest(of_all.tolist(), digests.tolist())
    differing = [number for number, (digest, recorded) in enumerate(pairs) if digest != recorded]
    if differing:
        raise MetaplError(
            f"train has {len(data):,} examples, the recording was of {len(digests):,}, and example "
            f"{differing[0]} is the first that differs; expected the data set of the recording, in "
            "its order."
        )
    return data, torch.arange(len(data)), digests


def digests_of(
    dataset: Any, name: str, problem: EqualWeights, form: CallForm, first: Tensor
) -> Tensor:
    """Return a number of each row of a data set, by which its example is known, (rows,)."""
    data = Data(examples_of(dataset, name, first, each_once=False), problem, form)
    try:
        _, digests = data.digests()
    except MetaplError:
        # Rows of several lengths, which the loop pads.
        _, digests = data.digests(at_once=1)
    return digests.cpu()


def found_among(examples: Tensor, of_rows: Tensor, name: str) -> Tensor:
    """Return the first row of a data set that each example is, by their digests, or refuse it.

    Args:
        examples: of a recording.
        name: of the data set.
    """
    places = DigestIndex(of_rows).find(examples)
    missing = int((places < 0).sum())
    if missing:
        raise MetaplError(
            f"{name} has {len(of_rows):,} rows, and {missing:,} of the {len(examples):,} examples "
            "of the recording are none of them; expected the data set of the loop, as the network "
            "was called with it."
        )
    return places
