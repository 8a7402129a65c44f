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
    parts, side = getattr(recipe, "accumulate", 1), recipe.input_shape[-1]
    for name in recipe.batches_shared:
        size = getattr(recipe, name, None)
        if size is not None and size % (mesh.shares * parts):
            raise MetaplError(
                f"{recipe.name} has {'an' if name == 'unlabeled_batch' else 'a'} {name} of {size:,}, which "
                f"{mesh.shares:,} ranks do not share equally{f' in {parts} parts' if parts > 1 else ''}; expected a "
                f"multiple of {mesh.shares * parts:,}: give --{name.replace('_', '-')}, or another mesh."
            )
    if side % mesh.spatial:
        raise MetaplError(
            f"{recipe.name} has pictures of {side} pixels, which cannot be cut into {mesh.spatial} parts; expected a "
            f"multiple of {mesh.spatial}: give --image-size, or another --mesh.spatial."
        )
    network = getattr(recipe, "network_name", None)
    if mesh.tensor > 1 and network is not None:
        with torch.random.fork_rng(devices=[]):
            pairs = pairs_of(recipe.network())
        if not pairs:
            raise MetaplError(
                f"--mesh.tensor {mesh.tensor}: {network} has no two linear layers with an activation between them, "
                "whose products several processes could compute together; give --network vit_b_16 or another vision "
                "transformer, or --mesh.spatial or --mesh.shard in the place of --mesh.tensor."
            )
