"""Whether the processes of a mesh can share the batches of a recipe."""

from __future__ import annotations

from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.recipes.base import Recipe


def check_shares(recipe: Recipe, mesh: Mesh) -> None:
    """Refuse batches that the ranks do not share equally, and pictures that they do not cut into equal parts."""
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
