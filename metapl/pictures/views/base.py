"""Views: augmentations that are frozen values and pure functions of (seed, step, example)."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from metapl.data import draws
from metapl.data.draws import Numbers
from metapl.errors import MetaplError
from metapl.runs.fields import Range, check_fields

WIDE = (torch.float32, torch.float64)
FLOATING = (*WIDE, torch.float16, torch.bfloat16)
FLOATING_OR_BYTES = (*FLOATING, torch.uint8)

NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Probability = Annotated[float, Range(0, most=1)]

# The streams of draws, one for each use. A stream with another number gives other views.
GEOMETRY = 0
NOISE = 1
CROP = 2
RESIZED_CROP = 3
OPERATIONS = 4
CUTOUT = 5
AFFINE = 6
COLOR = 7
HOLE = 8
FLIP = 9
RECOLOR = 10
SOMETIMES = 11
SEEDED = 12

# How far a value may exceed 1, for views that take bytes too: half a level of a byte.
HALF_A_LEVEL = 0.5 / 255

# Grey fills the places that no pixel comes to: the middle level of 255, as in the authors' code.
GREY = 128


class View(Protocol):
    """Map images to images, with every draw fixed by seed, step and example.

    The batches call views.
    """

    def __call__(self, images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        """Return the view (B, ...) of images (B, ...) by seed, step and ``examples`` (B,) int64."""
        ...


def rows_needed(
    view: View, rows: Tensor, *, seed: int, step: int, examples: Tensor
) -> Tensor | None:
    """Return the rows of a batch that a view of some of its rows is made of.

    A view that has a method of this name can be taken of the rows that it names, alone: whoever
    calls the view so passes the examples of the whole batch to it as ``batch``, and the view gives
    ``rows`` the bits that they have in a view of the whole batch.

    Args:
        rows: int64 (n,), numbers of rows, none twice.
        examples: int64 (B,), those of the whole batch.

    Returns: ``rows``, and behind them the further rows that the view reads, such as partners to be
        mixed in. None of a view without such a method, for instance one of a user's own, which may
        read the whole batch.
    """
    method: Callable[..., Tensor | None] | None = getattr(view, "rows_needed", None)
    if method is None:
        return None
    return method(rows, seed=seed, step=step, examples=examples)


@dataclass(frozen=True)
class Identity:
    """The images as they are."""

    def __call__(
        self, images: Tensor, *, seed: int, step: int, examples: Tensor, batch: Tensor | None = None
    ) -> Tensor:
        return images

    def rows_needed(self, rows: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        return rows


@dataclass(frozen=True)
class Chain:
    """One view after another, x ↦ v_n(… v_1(x)), where v_i draws from fold_in(seed, i).

    >>> from metapl.pictures import Flip, ShiftNoiseCutout
    >>> view = Chain((Flip(), ShiftNoiseCutout()))
    >>> view(torch.rand(2, 3, 32, 32), seed=0, step=5, examples=torch.tensor([3, 4])).shape
    torch.Size([2, 3, 32, 32])
    """

    views: tuple[View, ...]

    def __call__(
        self, images: Tensor, *, seed: int, step: int, examples: Tensor, batch: Tensor | None = None
    ) -> Tensor:
        # A view of a user's own takes whole batches alone, and no ``batch``.
        options: dict[str, Tensor] = {}
        if batch is not None:
            options["batch"] = batch
        for position, view in enumerate(self.views):
            view_seed = draws.fold_in(seed, position)
            images = view(images, seed=view_seed, step=step, examples=examples, **options)
        return images

    def rows_needed(self, rows: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor | None:
        """Return the rows that the views need, from the last view to the first.

        The rows that one view needs are those that the view before it has to make.
        """
        for position in reversed(range(len(self.views))):
            view_seed = draws.fold_in(seed, position)
            needed = rows_needed(
                self.views[position], rows, seed=view_seed, step=step, examples=examples
            )
            if needed is None:
                return None
            rows = needed
        return rows


@dataclass(frozen=True)
class Until:
    """One view before a step, and another one from it on: x ↦ first(x) or then(x).

    Args:
        step: the first step of the second view.
        first, then: the views, which draw from the same seed.
    """

    step: int
    first: View
    then: View

    def __call__(
        self, images: Tensor, *, seed: int, step: int, examples: Tensor, batch: Tensor | None = None
    ) -> Tensor:
        # A view of a user's own takes whole batches alone, and no ``batch``.
        options: dict[str, Tensor] = {} if batch is None else {"batch": batch}
        return self._view_at(step)(images, seed=seed, step=step, examples=examples, **options)

    def rows_needed(self, rows: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor | None:
        return rows_needed(self._view_at(step), rows, seed=seed, step=step, examples=examples)

    def _view_at(self, step: int) -> View:
        return self.first if step < self.step else self.then


@dataclass(frozen=True)
class PictureView(ABC):
    """A view of pictures (B, C, H, W) of some types, which refuses all others.

    Neither the rest of the batch nor its order matters. Views that change colors take 1 or 3
    channels of values in [0, 1]; values are looked at on the CPU only, since elsewhere that holds
    the device up.
    """

    takes: ClassVar[tuple[torch.dtype, ...]] = WIDE
    is_colored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in vars(self).items():
            is_range = isinstance(value, tuple) and len(value) == 2
            if is_range and isinstance(value[0], float | int):
                self.require(name, "smallest <= largest", holds=value[0] <= value[1])

    def __call__(
        self, images: Tensor, *, seed: int, step: int, examples: Tensor, batch: Tensor | None = None
    ) -> Tensor:
        fault = self.fault(images, examples)
        if fault is not None:
            raise MetaplError(f"{type(self).__name__} got {fault}.")
        return self.see_in(batch, images, seed, step, examples)

    def fault(self, images: Tensor, examples: Tensor) -> str | None:
        """Return what is wrong with images or their numbers, or None where nothing is."""
        if images.ndim != 4 or images.dtype not in self.takes:
            kinds = " or ".join(map(str, self.takes))
            return (
                f"images {tuple(images.shape)} of {images.dtype}; expected (B, C, H, W) of {kinds}"
            )
        if examples.shape != images.shape[:1]:
            return (
                f"{tuple(examples.shape)} examples for {len(images)} images; expected the index "
                "of each image"
            )
        if not self.is_colored:
            return None
        if images.shape[1] not in (1, 3):
            return f"images of {images.shape[1]} channels; expected 1 (grey) or 3 (RGB)"
        is_seen = images.device.type == "cpu" and images.is_floating_point()
        if is_seen and images.numel():
            smallest, largest = torch.aminmax(images)
            low = smallest.item()
            high = largest.item()
            # Views that take bytes too come first in a chain, and may get a picture that was
            # resized in floating point, whose values exceed 1 by a rounding to bytes.
            excess = HALF_A_LEVEL if torch.uint8 in self.takes else 0.0
            # Written so that NaN is a fault too.
            if not -excess <= low <= high <= 1 + excess:
                return (
                    f"images with values from {low:g} to {high:g}; expected 0 to 1: normalize "
                    "after the views"
                )
        return None

    def see_in(
        self, batch: Tensor | None, images: Tensor, seed: int, step: int, examples: Tensor
    ) -> Tensor:
        """Return the view of images that passed, of a batch with these examples."""
        return self.see(images, seed, step, examples)

    def rows_needed(self, rows: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor | None:
        """Return the rows of a batch that the view of some of them is made of: here these alone."""
        return rows

    @abstractmethod
    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        """Return the view of images that passed."""

    def require(self, field: str, expected: str, *, holds: bool) -> None:
        """Refuse a field that is not as expected."""
        if not holds:
            raise MetaplError(
                f"{type(self).__name__}({field}={getattr(self, field)!r}): expected {expected}."
            )


@dataclass(frozen=True)
class Seeded(PictureView):
    """A transform of one image, such as those of ``torchvision.transforms.v2``, as a view.

    Before each image, the default generators of torch (on the CPU and, for images there, on CUDA),
    Python and numpy are seeded by (seed, step, example); after the batch they are as they were. One
    with a generator of its own is not seeded. Cost: one call per image (C, H, W), and about 0.03 ms
    for the seeds.

    >>> from torchvision.transforms import v2
    >>> view = Seeded(v2.Compose([v2.RandomPerspective(), v2.ColorJitter(brightness=0.4)]))
    >>> images, examples = torch.rand(4, 3, 32, 32), torch.arange(4)
    >>> first = view(images, seed=0, step=7, examples=examples)
    >>> torch.equal(first[2:3], view(images[2:3], seed=0, step=7, examples=examples[2:3]))
    True
    """

    takes = FLOATING_OR_BYTES
    transform: Callable[[Tensor], Tensor]

    def see(self, images: Tensor, seed: int, step: int, examples: Tensor) -> Tensor:
        device = images.device
        is_on_cuda = device.type == "cuda"
        bits = draws.bits(seed, step, examples.cpu(), 1, stream=SEEDED)[:, 0]
        # NumPy takes seeds of 32 bits.
        seeds = (bits & 0xFFFFFFFF).tolist()
        python_state = random.getstate()
        # Transforms draw from NumPy's default generator.
        numpy_state = np.random.get_state()  # noqa: NPY002
        views: list[Tensor] = []
        try:
            with torch.random.fork_rng([device] if is_on_cuda else []):
                for image, image_seed in zip(images, seeds, strict=True):
                    torch.default_generator.manual_seed(image_seed)
                    random.seed(image_seed)
                    np.random.seed(image_seed)  # noqa: NPY002
                    if is_on_cuda:
                        torch.cuda.default_generators[device.index or 0].manual_seed(image_seed)
                    views.append(self.transform(image))
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
        return torch.stack(views) if views else images


def below(u: Tensor, bound: Tensor | int) -> Tensor:
    """Map uniform [0, 1) in float64 to uniform {0, …, bound − 1}.

    53 bits keep the product below any bound in use.
    """
    return (u * bound).long()


def crop_flip(images: Tensor, offsets_B2: Tensor, flip_B: Tensor | None, fill: float) -> Tensor:
    """Mirror the images of ``flip_B``, then cut each at its own offset, with ``fill`` outside it.

    Images are (B, C, H, W) of any dtype; an offset is (down, right), of either sign.
    """
    height, width = images.shape[2:]
    rows_BH = torch.arange(height, device=images.device) + offsets_B2[:, :1]
    columns_BW = torch.arange(width, device=images.device) + offsets_B2[:, 1:]
    if flip_B is not None:
        columns_BW = torch.where(flip_B[:, None], width - 1 - columns_BW, columns_BW)
    return gather(images, rows_BH[:, :, None], columns_BW[:, None, :], fill)


def gather(images: Tensor, rows: Tensor, columns: Tensor, fill: float) -> Tensor:
    """Return the pixels at ``rows`` and ``columns``, and ``fill`` where there are none.

    ``rows`` and ``columns`` broadcast to (B, H, W).
    """
    _, channels, height, width = images.shape
    nearest_rows = rows.clamp(0, height - 1)
    nearest_columns = columns.clamp(0, width - 1)
    is_inside = (nearest_rows == rows) & (nearest_columns == columns)
    places_BHW = nearest_rows * width + nearest_columns
    places_BCN = places_BHW.flatten(1)[:, None].expand(-1, channels, -1)
    pixels = images.flatten(2).gather(2, places_BCN).view_as(images)
    return pixels.masked_fill(~is_inside[:, None], fill)


def cutout(images: Tensor, corners_B2: Tensor, side: int, fill: float) -> Tensor:
    """Fill a square with the given upper left corner (row, column).

    What lies outside the image is lost.
    """
    height, width = images.shape[2:]
    # Rows and columns from the corner of the square.
    rows_BH = torch.arange(height, device=images.device) - corners_B2[:, :1]
    columns_BW = torch.arange(width, device=images.device) - corners_B2[:, 1:]
    is_row_in_square_BH = (rows_BH >= 0) & (rows_BH < side)
    is_column_in_square_BW = (columns_BW >= 0) & (columns_BW < side)
    square_BHW = is_row_in_square_BH[:, :, None] & is_column_in_square_BW[:, None, :]
    return images.masked_fill(square_BHW[:, None], fill)


# ---------------------------------------- numbers that are the same to the last bit on every device

# Numbers of a batch, in torch or on the host.
Values = TypeVar("Values", Tensor, Numbers)


def normal(
    seed: int,
    step: int,
    examples: Tensor,
    n: int,
    stream: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw from the standard normal distribution, ``n`` times per example.

    z = √(−2 log(1 − u₁)) · sin(π(u₂ − ½)), with u₁, u₂ uniform: Box and Muller with the angle
    folded into a half circle.

    Returns: (B, n), float32 or float64, on the device of ``examples``. The logarithm and the sine
    are made of operations that IEEE 754 rounds in one way only: those of libraries differ in the
    last bit between devices, and even between places of one tensor.

    Cost: about fifty elementwise float64 operations, and 2n uniform draws per example.

    >>> z = normal(0, step=3, examples=torch.arange(1000), n=100)
    >>> bool(z.mean().abs() < 0.02), bool((z.std() - 1).abs() < 0.02)
    (True, True)
    """
    u = draws.uniform(seed, step, examples, 2 * n, stream, dtype=torch.float64)
    radius = (-2.0 * _log(1.0 - u[:, 0::2])).sqrt()
    return (radius * _sine_of_half_pi_times(2.0 * u[:, 1::2] - 1.0)).to(dtype)


def cosine_and_sine(half_turns: Numbers) -> tuple[Numbers, Numbers]:
    """Return cos πt and sin πt for t in [−1, 1], on the host.

    They are float64, within 2e-15 of the cosine and 2e-8 of the sine; of 0 they are exact. As they
    are made of operations that IEEE 754 rounds in one way only, they are the same everywhere.

    >>> cosine, sine = cosine_and_sine(np.array([0.0, 0.5]))
    >>> bool(cosine[0] == 1 and abs(cosine[1]) < 2e-15), sine.tolist()
    (True, [0.0, 1.0])
    """
    s = _sine_of_half_pi_times(half_turns)
    # These are formulas of the half angle, whose cosine is not negative.
    return 1.0 - 2.0 * s * s, 2.0 * s * np.sqrt(np.maximum(1.0 - s * s, 0.0))


def _log(x: Tensor) -> Tensor:
    """Return log x for x in (0, 1].

    x = m·2^e with m in [√½, √2), and log m = 2 artanh((m − 1) / (m + 1)).
    """
    mantissa, exponent = torch.frexp(x)
    # frexp has the mantissa in [½, 1).
    is_small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(is_small, 2.0 * mantissa, mantissa)
    exponent = torch.where(is_small, exponent - 1, exponent).to(x.dtype)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    # s² ≤ 0.0295, so the first term left out is below 1e-18 of the sum.
    series = _polynomial(s * s, [1.0 / (2 * k + 1) for k in range(11)])
    return exponent * math.log(2.0) + 2.0 * s * series


def _sine_of_half_pi_times(t: Values) -> Values:
    """Return sin(πt/2) for t in [−1, 1], by its power series.

    The first term left out is below 2e-18.
    """
    x = t * (math.pi / 2)
    coefficients = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(11)]
    return x * _polynomial(x * x, coefficients)


def _polynomial(x: Values, coefficients: list[float]) -> Values:
    """Return Σ c_k xᵏ by Horner's rule, from coefficients that begin with c_0."""
    value: Any = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value  # type: ignore[no-any-return]
