"""What a step really holds, for the plans to be compared with."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.ablation.cost import peak_bytes
from metapl.apps.networks.products import products_of
from metapl.apps.recipes.base import ROLES, Recipe
from metapl.apps.recipes.methods.beside import bilevel_trainer
from metapl.distributed import Mesh, shard
from metapl.execution.shards import local

REPEATS = 5
"""Of which the least counts: another thread frees the buffers of an exchange, sooner or later."""


def measured(recipe: Recipe, mesh: Mesh) -> int:
    """Bytes that this process holds at the peak of a step: what is there before it, and what the allocator adds."""
    torch.manual_seed(0)
    networks = [recipe.network(role) for role in ROLES]
    if mesh.size > 1:
        tensor = mesh.tensor
        networks = [shard(net, mesh, plan=products_of(net, tensor) if tensor > 1 else None) for net in networks]
    trainer = bilevel_trainer(recipe, *networks, recipe.method)
    batches = _batches(recipe, mesh)
    return peak_of_steps(trainer, batches, batches, networks)


def _batches(recipe: Recipe, mesh: Mesh) -> Any:
    labeled, unlabeled = recipe.labeled_batch // mesh.shares, recipe.unlabeled_batch // mesh.shares
    shape = recipe.input_shape
    weak, strong = (torch.rand(unlabeled, *shape) for _ in range(2))
    labels = torch.arange(labeled) % len(recipe.classes)
    return (torch.rand(labeled, *shape), labels), (weak, strong)


def peak_of_steps(trainer: Any, batches: Any, given: Any, networks: Sequence[nn.Module] = ()) -> int:
    """The same of any trainer's steps; ``given`` are the tensors of the batches."""
    for _ in range(2):  # with the second, the states of the optimizers are there
        trainer.step(*batches)
    before = [t for network in networks or (trainer.teacher, trainer.student) for t in held(network)]
    states = [state for optimizer in trainer.schedulable for state in optimizer.state.values()]
    before += [local(t) for t in pytree.tree_leaves([states, given]) if isinstance(t, Tensor)]
    peaks = []
    for _ in range(REPEATS):
        gc.collect()  # nothing of the step before is freed within this one
        peaks.append(peak_bytes(lambda: trainer.step(*batches), torch.device("cpu")))
    return sum(t.numel() * t.element_size() for t in before) + min(peaks)


def held(network: nn.Module) -> list[Tensor]:
    """The tensors of a network in this process, with the buckets in which replicas exchange gradients."""
    wrapped = isinstance(network, nn.parallel.DistributedDataParallel)
    inner: Any = network.module if wrapped else network
    own = [local(t) for t in (*inner.parameters(), *inner.buffers())]
    return own + ([p.detach() for p in inner.parameters()] if wrapped else [])
