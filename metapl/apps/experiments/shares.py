"""Whether the processes of a mesh can train a recipe together."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from metapl.apps.recipes.base import Recipe
from metapl.apps.recipes.methods import EVERY_METHOD, title
from metapl.distributed.mesh import Mesh
from metapl.distributed.tensor import pairs_of
from metapl.errors import MetaplError


def check_runs(recipe: Recipe, mesh: Mesh, methods: Iterable[str]) -> None:
    """Refuse methods and options that do not run in the processes of a mesh; nothing is read or built."""
    for method in methods if mesh.size > 1 else ():
        if EVERY_METHOD[method].selects or EVERY_METHOD[method].reduced:
            raise MetaplError(f"{title(method)} is not built yet for several processes; leave out --mesh.*.")
    if getattr(recipe, "compile", False) and mesh.together > 1:
        raise MetaplError(
            "--compile does not run with --mesh.spatial or --mesh.tensor; leave it out, or give --mesh.replicate and "
            "--mesh.shard."
        )


def check_shares(recipe: Recipe, mesh: Mesh) -> None:
    """Refuse what the ranks do not share equally: batches, the columns of pictures and the products of a network."""
    parts = getattr(recipe, "accumulate", 1)
    for name in recipe.batches_shared:
        size = getattr(recipe, name, None)
        if size is not None and size % (mesh.shares * parts):
            each = f" in {parts} parts" if parts > 1 else ""
            batch = f"{'an' if name == 'unlabeled_batch' else 'a'} {name} of {size:,}"
            raise MetaplError(
                f"{recipe.name} has {batch}, which {mesh.shares:,} ranks do not share equally{each}; "
                f"expected a multiple of {mesh.shares * parts:,}: give --{name.replace('_', '-')}, or another mesh."
            )
    if recipe.input_shape[-1] % mesh.spatial:
        raise MetaplError(
            f"{recipe.name} has pictures of {recipe.input_shape[-1]} pixels, which cannot be cut into {mesh.spatial} "
            f"parts; expected a multiple of {mesh.spatial}: give --image-size, or another --mesh.spatial."
        )
    network = getattr(recipe, "network_name", None)
    if mesh.tensor > 1 and network is not None and not _has_pairs(recipe):
        raise MetaplError(
            f"--mesh.tensor {mesh.tensor}: {network} has no two linear layers with an activation between them, whose "
            "products several processes could compute together; give --network vit_b_16 or another vision "
            "transformer, or --mesh.spatial or --mesh.shard in the place of --mesh.tensor."
        )


def _has_pairs(recipe: Recipe) -> bool:
    """Whether some products of the recipe's network can be shared; the default generator is put back."""
    with torch.random.fork_rng(devices=[]):
        return bool(pairs_of(recipe.network()))
