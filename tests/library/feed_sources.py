"""Sources of batches of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
    get_worker_info,
)

from metapl.data import Feed, StepBatches, StepSampler, feed


class Noisy(Dataset[Tensor]):
    """Examples whose transform draws from all three default generators."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        numpy = np.random.random()  # noqa: NPY002
        return torch.tensor([index, torch.rand(()), random.random(), numpy], dtype=torch.float64)


class OwnGenerators(Noisy):
    """Examples whose transform draws from generators of the data set."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.Generator().manual_seed(1)
        self.python = random.Random(2)
        self.numpy = np.random.default_rng(3)
        self.legacy = np.random.RandomState(4)

    def __getitem__(self, index: int) -> Tensor:
        numpy = self.numpy.random() + self.legacy.rand()
        return torch.tensor(
            [index, torch.rand((), generator=self.torch), self.python.random(), numpy],
            dtype=torch.float64,
        )


class Stream(IterableDataset[Tensor]):
    """Examples without indices, dealt out among the workers."""

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        worker_number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(worker_number, 10, workers):
            yield torch.tensor([index, torch.rand(()), random.random()], dtype=torch.float64)


class Reiterable:
    """No loader at all: batches in another order each time."""

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.randperm(4):
            yield torch.stack([index, torch.randint(100, ())])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Rows(StepBatches[Tensor]):
    """Rows that are drawn by the number of the step."""

    steps = None

    def batch(self, step: int) -> Tensor:
        indices = StepSampler(10, 4, seed=0).indices(step)
        return torch.rand(10, 2, generator=seeded(0))[indices]


def nested() -> DataLoader[Tensor]:
    subset: Subset[Tensor] = Subset(ConcatDataset([OwnGenerators(), Noisy(3)]), list(range(2, 12)))
    return DataLoader(
        subset,
        batch_sampler=BatchSampler(RandomSampler(subset, generator=seeded(7)), 3, drop_last=True),
    )


def weighted(generator: torch.Generator) -> DataLoader[Tensor]:
    sampler = WeightedRandomSampler(
        [0.1 * (i + 1) for i in range(10)], num_samples=9, generator=generator
    )
    return DataLoader(Noisy(), batch_size=3, sampler=sampler)


SOURCES: dict[str, Callable[[], Any]] = {
    "steps": Rows,
    "list": lambda: [torch.tensor([i]) for i in range(3)],
    "shuffled": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), batch_size=3),
    "own generator": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, generator=seeded(5)),
    "sampler's generator": lambda: DataLoader(
        Noisy(), batch_size=3, sampler=RandomSampler(Noisy(), generator=seeded(5))
    ),
    "batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 3, drop_last=True)
    ),
    "weighted": lambda: weighted(seeded(6)),
    "data set's generators": lambda: DataLoader(OwnGenerators(), batch_size=3, shuffle=True),
    # Where batches fill the epoch, the sampler draws once more as it ends.
    "full batches": lambda: DataLoader(Noisy(12), batch_size=3, shuffle=True, generator=seeded(5)),
    "nested": nested,
    "iterable": lambda: DataLoader(Stream(), batch_size=3),
    "re-iterable": Reiterable,
}


def feed_from(source: Any, **options: Any) -> Feed:
    return feed(source, **{"name": "labeled", "stop": 100, **options})


def take(stream: Feed, number: int) -> list[Any]:
    return [stream.next() for _ in range(number)]


def same(a: Any, b: Any) -> bool:
    leaves_a, tree_a = pytree.tree_flatten(a)
    leaves_b, tree_b = pytree.tree_flatten(b)
    equal = (
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )
    return tree_a == tree_b and all(equal)


class Augmenting:
    """Makes batches of rows with noise from generators that it holds in a list and in an object."""

    def __init__(self) -> None:
        self.generators = [seeded(1), np.random.default_rng(2)]
        self.inner = OwnGenerators()

    def __call__(self, rows: list[Any]) -> Any:
        noise = torch.rand(len(rows), generator=self.generators[0])
        more = torch.from_numpy(self.generators[1].random(len(rows)))
        return torch.stack([torch.as_tensor(row) for row in rows]), noise, more, self.inner[0]


class Around:
    """A loader under a name of the user's."""

    def __init__(self, batches: Any) -> None:
        self.my_loader = batches

    def __iter__(self) -> Any:
        return iter(self.my_loader)


SOURCES["collate_fn"] = lambda: DataLoader(Noisy(), batch_size=3, collate_fn=Augmenting())
SOURCES["around"] = lambda: Around(DataLoader(OwnGenerators(), batch_size=3, generator=seeded(4)))
