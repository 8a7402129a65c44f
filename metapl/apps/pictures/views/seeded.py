"""Any transform of one image as a view."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metapl.apps.pictures.views.base import FLOATING_OR_BYTES, SEEDED, PictureView
from metapl.data import draws
from metapl.errors import MetaplError
from metapl.execution.checks import described


@dataclass(frozen=True)
class Seeded(PictureView):
    """A transform of one image, such as those of ``torchvision.transforms.v2``, as a view.

    Before each image, the default generators of torch (on the CPU and, for images there, on CUDA), Python and numpy are
    seeded by (seed, step, example); after the batch they are as they were. So the view of an example is a function of
    these three alone, whatever else the batch holds, wherever a run is resumed and however many workers there are.

    Args:
        transform: takes an image (C, H, W) and returns a tensor; all results have one shape. What it draws comes from
            the default generators: one with a generator of its own is not seeded. Workers need one that can be pickled
            where processes are not forked.

    Call: as other views, with images (B, C, H, W), floating point or uint8. The result has the dtype and the shape that
    the transform gives.

    Cost: one call of the transform per image, and about 0.03 ms for the seeds. Views of whole batches are faster.

    Raises:
        MetaplError: what is given cannot be called; on the call, images of another kind, a number of examples other
            than B, or results that are not tensors of one shape.

    >>> from torchvision.transforms import v2
    >>> view = Seeded(v2.Compose([v2.RandomPerspective(), v2.ColorJitter(brightness=0.4)]))
    >>> images, examples = torch.rand(4, 3, 32, 32), torch.arange(4)
    >>> first = view(images, seed=0, step=7, examples=examples)
    >>> torch.equal(first[2:3], view(images[2:3], seed=0, step=7, examples=examples[2:3]))
    True
    """

    takes = FLOATING_OR_BYTES
    transform: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.transform) or isinstance(self.transform, type):
            example = "such as torchvision.transforms.v2.RandomHorizontalFlip()"
            raise MetaplError(f"Seeded got {described(self.transform)}; expected a transform of one image, {example}")

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        # 32 bits, which is what numpy takes.
        keys = (draws.bits(seed, step, examples.cpu(), 1, stream=SEEDED)[:, 0] & 0xFFFFFFFF).tolist()
        python, numpy, device = random.getstate(), np.random.get_state(), images.device  # noqa: NPY002
        seen = []
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                for image, key in zip(images, keys, strict=True):
                    torch.default_generator.manual_seed(key)
                    random.seed(key)
                    np.random.seed(key)  # noqa: NPY002  # what transforms draw from
                    if device.type == "cuda":
                        torch.cuda.default_generators[device.index or 0].manual_seed(key)
                    seen.append(self.transform(image))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
        shapes = {tuple(x.shape) if isinstance(x, Tensor) else described(x) for x in seen}
        if len(shapes) > 1 or not all(isinstance(x, Tensor) for x in seen):
            raise MetaplError(
                f"the transform of Seeded gave {' and '.join(map(str, sorted(shapes, key=str)))} for images of shape "
                f"{tuple(images.shape[1:])}; expected tensors of one shape: end it with a resize or a crop of one size"
            )
        return torch.stack(seen) if seen else images
