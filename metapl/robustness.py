r"""A network's accuracy on damaged and on attacked pictures.

Attacked pictures are moved against the network:

.. math:: x_{t+1} = \Pi_{\|x - x_0\|_\infty \le \varepsilon,\ 0 \le x \le 1}
          \big(x_t + \alpha\, \mathrm{sign}\, \nabla_x \ell(f(x_t), y)\big)

Damaged ones are of fifteen kinds in five severities, with the constants of ImageNet-C. These are of
Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), for pictures of 224 pixels. Lengths in pixels are scaled by the side of
a picture over 224, so that a damage looks alike at any size; at 224 they are the paper's. Two kinds
differ from it by necessity: its frost is six photographs, ours is drawn, and its motion blur is
ImageMagick's, ours a line of the same radius and width. So errors can be compared between networks
here, and only roughly with those printed for ImageNet-C.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.data.draws import fold_in
from metapl.errors import MetaplError, few, needed_for
from metapl.execution.checks import unexpected
from metapl.metrics.predictions import evaluating, logits_of

with needed_for("metapl.robustness"):
    from einops import rearrange, reduce
    from PIL import Image

# (H, W, C) in [0, 1].
Picture = NDArray[np.float64]

SEVERITIES = (1, 2, 3, 4, 5)

# The side in pixels of the pictures that the paper's lengths are for.
SIDE = 224

# The published lengths of the elastic transform are shares of this, though the pictures have 224
# pixels.
ELASTIC = 244

# Red, green and blue in brightness.
LUMA = np.array([0.299, 0.587, 0.114])

# The color of ice.
ICE = np.array([0.82, 0.92, 1.0])


def corrupted(
    images: Tensor, corruption: str, severity: int, *, seed: int = 0, first: int = 0
) -> Tensor:
    """Damage pictures (B, C, H, W) in [0, 1], C = 1 or 3, by one of :data:`CORRUPTIONS`.

    Severities are 1 to 5. The damage of a picture is a function of the seed, the kind, the severity
    and the picture's number, which is ``first`` plus its row. It has 256 levels, as a picture that
    was saved. 1 to 50 ms a picture of 224 pixels.

    >>> corrupted(torch.full((1, 3, 8, 8), 0.5), "brightness", 3)[0, 0, 0, 0]
    tensor(0.8000)
    """
    is_severity = type(severity) is int and severity in SEVERITIES
    if corruption not in CORRUPTIONS or not is_severity:
        expected = f"a whole number of 1 to 5, and one of {few(CORRUPTIONS, 20)}"
        raise MetaplError(f"corruption {corruption!r}, severity {severity!r}: expected {expected}.")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise unexpected("the pictures are", images, "floating point (B, C, H, W), C = 1 or 3")
    damage, constants_by_severity = CORRUPTIONS[corruption]
    constants = constants_by_severity[severity - 1]
    if not isinstance(constants, tuple):
        constants = (constants,)
    seed_of_kind = fold_in(fold_in(seed, list(CORRUPTIONS).index(corruption)), severity)
    pictures = rearrange(images.detach().cpu().double().numpy(), "b c h w -> b h w c")
    damaged = []
    for number, picture in enumerate(pictures, first):
        rng = np.random.default_rng(fold_in(seed_of_kind, number))
        result = damage(np.ascontiguousarray(picture), rng, *constants)
        damaged.append(np.round(np.clip(result, 0, 1) * 255) / 255)
    return torch.from_numpy(rearrange(damaged, "b h w c -> b c h w").copy()).to(images)


def gaussian_noise(x: Picture, rng: Generator, std: float) -> Picture:
    """Add normal noise."""
    return x + rng.normal(scale=std, size=x.shape)


def shot_noise(x: Picture, rng: Generator, photons: float) -> Picture:
    """Count photons, so many for white."""
    return np.asarray(rng.poisson(x * photons) / photons)


def impulse_noise(x: Picture, rng: Generator, share: float) -> Picture:
    """Set a share of the values to black or white."""
    u = rng.random(x.shape)
    return np.where(u < share / 2, 0.0, np.where(u < share, 1.0, x))


def defocus_blur(x: Picture, rng: Generator, radius: float, edge: float) -> Picture:
    """Take the mean over a disk about each pixel."""
    from scipy import ndimage

    disk = _disk(_length(radius, x), edge)
    return np.asarray(ndimage.convolve(x, disk, mode="mirror"))


def glass_blur(x: Picture, rng: Generator, sigma: float, reach: float, times: int) -> Picture:
    """Blur, exchange each pixel with one nearby some times, and blur again."""
    sigma = _length(sigma, x)
    farthest = max(1, round(_length(reach, x)))
    x = _blurred(x, sigma)
    height, width = x.shape[:2]
    for _ in range(times):
        moves = rng.integers(-farthest, farthest, size=(height, width, 2))
        for row in range(height - farthest - 1, farthest - 1, -1):
            for column in range(width - farthest - 1, farthest - 1, -1):
                dx, dy = moves[row, column]
                pixel = x[row, column].copy()
                x[row, column] = x[row + dy, column + dx]
                x[row + dy, column + dx] = pixel
    return _blurred(x, sigma)


def motion_blur(x: Picture, rng: Generator, radius: float, sigma: float) -> Picture:
    """Take the mean along a line behind each pixel, at an angle within 45 degrees.

    It is weighted by a half Gaussian.
    """
    return _along(x, _length(radius, x), _length(sigma, x), rng.uniform(-45, 45))


def zoom_blur(x: Picture, rng: Generator, end: float, step: float) -> Picture:
    """Take the mean of the picture and of growing magnifications of it."""
    zooms = np.arange(1, end, step)
    return (x + sum(_zoomed(x, float(zoom)) for zoom in zooms)) / (len(zooms) + 1)


def snow(
    x: Picture,
    rng: Generator,
    mean: float,
    std: float,
    zoom: float,
    least: float,
    radius: float,
    sigma: float,
    share: float,
) -> Picture:
    """Lay flakes that fall at an angle over a whitened picture.

    Args:
        x: the picture.
        rng: of the draws.
        mean, std: of the field that the flakes are drawn from.
        zoom: by which it is enlarged.
        least: values below this are no flake.
        radius, sigma: of the motion of the flakes.
        share: of the picture, the rest being the whitened one.
    """
    flakes = _zoomed(rng.normal(mean, std, size=(*x.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = _along(flakes, _length(radius, x), _length(sigma, x), rng.uniform(-135, -45))
    luma = x
    if x.shape[2] == 3:
        luma = (x @ LUMA)[..., None]
    whitened = np.maximum(x, luma * 1.5 + 0.5)
    return share * x + (1 - share) * whitened + flakes + flakes[::-1, ::-1]


def frost(x: Picture, rng: Generator, share: float, ice: float) -> Picture:
    """Lay crystals over a share of the picture, drawn as the ridges of a fractal."""
    ridges = 1 - np.abs(2 * _fractal(x.shape[:2], 1.8, rng) - 1)
    tint = ICE if x.shape[2] == 3 else np.ones(1)
    return share * x + ice * (ridges**2)[..., None] * tint


def fog(x: Picture, rng: Generator, amount: float, decay: float) -> Picture:
    """Lay a cloud over the picture."""
    brightest = float(x.max())
    # ImageNet-C's wobble is a uniform draw within ±w times w, so that with w it falls by the square
    # of the decay.
    cloud = _fractal(x.shape[:2], decay**2, rng)[..., None]
    return (x + amount * cloud) * brightest / max(brightest + amount, 1e-12)


def brightness(x: Picture, rng: Generator, amount: float) -> Picture:
    """Raise the value of each pixel's color; hue and saturation stay."""
    value: Picture = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + amount, 1)
    return np.where(value > 0, x * (raised / np.maximum(value, 1e-12)), raised)


def contrast(x: Picture, rng: Generator, share: float) -> Picture:
    """Keep a share of the distance of each value from its mean."""
    mean: Picture = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * share + mean


def elastic_transform(
    x: Picture, rng: Generator, amount: float, sigma: float, affine: float
) -> Picture:
    """Apply a random affine map, then move each pixel along a smooth random field."""
    from scipy import ndimage

    height, width = x.shape[:2]
    side = min(height, width)
    amount = amount * ELASTIC / SIDE
    sigma = sigma * ELASTIC / SIDE
    affine = affine * ELASTIC / SIDE
    center = np.array([height, width]) / 2
    reach = side / 3
    corners = np.array([center + reach, center + reach * np.array([1, -1]), center - reach])
    moved = corners + rng.uniform(-affine * side, affine * side, size=corners.shape)
    # It says from where a pixel comes.
    matrix = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T
    noise = [rng.uniform(-1, 1, (height, width, 1)) for _ in range(2)]
    field = []
    for noise_of_axis in noise:
        smooth = _blurred(noise_of_axis, sigma * side, edges="reflect", truncate=3)
        field.append(amount * side * smooth[..., 0])
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    shifted = np.stack([rows + field[0], columns + field[1], np.ones_like(rows, dtype=float)])
    places = np.tensordot(matrix, shifted, axes=1)
    planes = []
    for plane in np.moveaxis(x, 2, 0):
        planes.append(ndimage.map_coordinates(plane, places, order=1, mode="reflect"))
    return np.stack(planes, axis=2)


def pixelate(x: Picture, rng: Generator, share: float) -> Picture:
    """Shrink by averages over boxes, and enlarge by repetition."""
    image = _image(x)
    sides = [max(1, int(side * share)) for side in image.size]
    small = image.resize(sides, Image.Resampling.BOX)
    return _levels(small.resize(image.size, Image.Resampling.NEAREST))


def jpeg_compression(x: Picture, rng: Generator, quality: int) -> Picture:
    """Write and read the picture as a JPEG."""
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=quality)
    return _levels(Image.open(file))


SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
ELASTICS = (
    (2, 0.7, 0.1),
    (2, 0.08, 0.2),
    (0.05, 0.01, 0.02),
    (0.07, 0.01, 0.02),
    (0.12, 0.01, 0.02),
)

# Kinds of damage with what each takes at its five severities, in the order of ImageNet-C: noise,
# blur, weather and digital. The place of a kind enters the seed of its draws: moving one changes
# the damage of all that move with it.
CORRUPTIONS: dict[str, tuple[Callable[..., Picture], tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (
        zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (snow, SNOW),
    "frost": (frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (elastic_transform, ELASTICS),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
}


def _length(pixels: float, x: Picture) -> float:
    """Return a length of the paper's pictures in pixels of this one."""
    return pixels * float(min(x.shape[:2])) / SIDE


def _blurred(x: Picture, sigma: float, edges: str = "nearest", truncate: float = 4) -> Picture:
    """Return the picture blurred by a Gaussian."""
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(x, (sigma, sigma, 0), mode=edges, truncate=truncate))


def _disk(radius: float, edge: float) -> Picture:
    """Return a disk with an edge blurred by a Gaussian of width ``edge``, (H, W, 1) of sum 1.

    Its rim counts in part.
    """
    reach = math.ceil(radius) + 2
    side = 2 * reach + 1
    # Along a pixel's side there are four samples.
    samples = 4
    offsets = (np.arange(side * samples) + 0.5) / samples - reach - 0.5
    is_inside = offsets[:, None] ** 2 + offsets[None] ** 2 <= max(radius, 0.5) ** 2
    shares = is_inside.astype(float)
    kernel = reduce(shares, "(h down) (w right) -> h w 1", "mean", down=samples, right=samples)
    kernel = _blurred(kernel, edge, edges="constant")
    return np.asarray(kernel / kernel.sum())


def _along(x: Picture, radius: float, sigma: float, angle: float) -> Picture:
    """Take the mean of the picture at places along a line, at an angle in degrees.

    It is weighted by exp(−t²/2σ²) for t from 0 to 2·radius.
    """
    from scipy import ndimage

    count = max(1, math.ceil(radius))
    steps = np.arange(2 * count + 1) * (max(radius, 0.5) / count)
    weights = np.exp(-(steps**2) / (2 * max(sigma, 1e-6) ** 2))
    weights /= weights.sum()
    dy = math.sin(math.radians(angle))
    dx = math.cos(math.radians(angle))
    moved = []
    for t, weight in zip(steps, weights, strict=True):
        shifted = ndimage.shift(x, (t * dy, t * dx, 0), order=1, mode="nearest")
        moved.append(weight * shifted)
    return np.asarray(np.sum(moved, axis=0))


def _zoomed(x: Picture, factor: float) -> Picture:
    """Return the picture magnified about its center."""
    from scipy import ndimage

    center = (np.array(x.shape[:2]) - 1) / 2
    matrix = (1 / factor, 1 / factor, 1)
    offset = (*(center - center / factor), 0)
    return np.asarray(ndimage.affine_transform(x, matrix, offset, order=1, mode="nearest"))


def _fractal(shape: tuple[int, ...], decay: float, rng: Generator) -> Picture:
    """Return plasma by midpoint displacement, (H, W).

    Its wobble falls by ``decay`` from scale to scale. It is cut from a square field whose least
    value is 0 and whose greatest is 1.
    """
    size = 1 << max(1, math.ceil(math.log2(max(shape))))
    field = np.zeros((size, size))
    wobble = 100.0
    step = size
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        # The middle of each square is the mean of its corners, and a draw.
        pairs = corners + np.roll(corners, -1, 0)
        means = (pairs + np.roll(pairs, -1, 1)) / 4
        field[half::step, half::step] = means + rng.uniform(-wobble, wobble, corners.shape)
        middles = field[half::step, half::step]
        # The middle of each edge is the mean of its ends and of the middles beside it, and a draw.
        horizontal = corners + np.roll(corners, -1, 1) + middles + np.roll(middles, 1, 0)
        field[::step, half::step] = horizontal / 4 + rng.uniform(-wobble, wobble, corners.shape)
        vertical = corners + np.roll(corners, -1, 0) + middles + np.roll(middles, 1, 1)
        field[half::step, ::step] = vertical / 4 + rng.uniform(-wobble, wobble, corners.shape)
        step = half
        wobble /= decay
    field -= field.min()
    return np.asarray((field / max(field.max(), 1e-12))[: shape[0], : shape[1]])


def _image(x: Picture) -> Image.Image:
    """Return a picture in 8 bits, as Pillow has it."""
    levels = np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)
    if x.shape[2] == 1:
        levels = levels.squeeze(axis=2)
    return Image.fromarray(levels)


def _levels(image: Image.Image) -> Picture:
    """Return a picture of Pillow, (H, W, C) in [0, 1]."""
    width, height = image.size
    return np.asarray(image, dtype=np.float64).reshape(height, width, -1) / 255


# -------------------------------------------------------------------------- attacks, and accuracies

Attack = Literal["fgsm", "pgd"]

# ε is counted in levels of a picture of 8 bits.
LEVELS = 255

PGD_STEPS = 10


def attacked(
    network: nn.Module, images: Tensor, labels: Tensor, attack: Attack, eps: float
) -> Tensor:
    """Move pictures (B, C, H, W) in [0, 1] so that the network's loss on them is greater.

    Each value moves by ``eps`` / 255 or less. ``"fgsm"`` is one step of ε along the sign of the
    gradient; ``"pgd"`` ten steps of ε/4, each brought back to within ε, from the picture itself.
    The network runs in the mode that it is in; its weights and their gradients stay.

    Source: Goodfellow, Shlens and Szegedy (ICLR 2015); Madry et al. (ICLR 2018). Noisy Student's
    study of adversarial robustness takes ten iterations and does not print its step size.

    >>> line = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = line[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> attacked(line, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), "fgsm", 51)
    tensor([[[[0.3000]]]])
    """
    if attack not in ("fgsm", "pgd") or not 0 <= eps <= LEVELS:
        expected = f"'fgsm' or 'pgd', and 0 to {LEVELS} of 1/{LEVELS}"
        raise MetaplError(f"attack {attack!r}, eps={eps}: expected {expected}.")
    if eps == 0:
        return images
    reach = eps / LEVELS
    steps = 1
    size = reach
    if attack == "pgd":
        steps = PGD_STEPS
        size = reach / 4
    least = (images - reach).clamp(min=0)
    most = (images + reach).clamp(max=1)
    moved = images
    for _ in range(steps):
        point = moved.detach().clone().requires_grad_()
        with torch.enable_grad():
            # With the sum, the sign for a picture is the same in any batch.
            loss = F.cross_entropy(network(point), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
        moved = torch.maximum(torch.minimum(moved + size * gradient.sign(), most), least)
    return moved


def measure(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    attacks: Sequence[Attack] = (),
    eps: Sequence[float] = (),
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Measure accuracies on corrupted and on attacked pictures.

    Args:
        network: on its device.
        batches: of pictures (B, C, H, W) in [0, 1] and labels (B,), read once.
        corruptions: kinds of damage, each at five severities.
        attacks: each with each ε, on the pictures as they are.
        eps: in 1/255.
        seed: of the corruptions.
        progress: is called with the number of pictures that are done.

    Returns: for JSON, what was asked for: ``corruptions`` by kind (:func:`by_severity`) with
        ``mean_corrupted_accuracy`` beside them, and ``attacks`` by attack, then by ε.

    Cost: 75 forward passes a picture and, mostly, the corruptions.
    """
    device = next(network.parameters()).device
    # Each is measured once, though it may have been asked for twice.
    damages = dict.fromkeys(product(corruptions, SEVERITIES))
    reaches = dict.fromkeys(product(attacks, map(float, eps)))
    right: Counter[tuple[str, float]] = Counter()
    n = 0
    with evaluating(network):
        for x, y in batches:
            if x.ndim != 4 or x.shape[1] not in (1, 3):
                raise unexpected("the inputs are", x, "pictures (B, 1 or 3, H, W)")
            x = x.to(device)
            y = y.to(device)
            # One at a time: 75 batches would fill the memory.
            for name, severity in damages:
                pictures = corrupted(x, name, severity, seed=seed, first=n)
                right[name, severity] += count_right(network, pictures, y)
            for attack, reach in reaches:
                pictures = attacked(network, x, y, attack, reach)
                right[attack, reach] += count_right(network, pictures, y)
            n += len(y)
            progress(n)
    if not n:
        raise MetaplError("there are no pictures to measure on; expected at least one.")
    content: dict[str, Any] = {}
    if damages:
        accuracies = {}
        for name, _ in damages:
            accuracies[name] = [right[name, severity] / n for severity in SEVERITIES]
        content = by_severity(accuracies)
    for attack, reach in reaches:
        by_eps = content.setdefault("attacks", {}).setdefault(attack, {})
        by_eps[repr(reach).removesuffix(".0")] = right[attack, reach] / n
    return content


def count_right(network: nn.Module, pictures: Tensor, labels: Tensor) -> int:
    """Return how many of the pictures a network takes for what they are."""
    predicted = logits_of(network, [pictures]).argmax(-1)
    return int((predicted == labels.cpu()).sum())


def by_severity(accuracies: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return, by kind, the accuracies at the five severities and the error, 1 - their mean.

    Beside them stands the mean of all.
    """
    kinds = {}
    means = []
    for name, by_level in accuracies.items():
        mean = fmean(by_level)
        means.append(mean)
        kinds[name] = {"error": 1 - mean, "accuracy_by_severity": list(by_level)}
    return {"corruptions": kinds, "mean_corrupted_accuracy": fmean(means)}
