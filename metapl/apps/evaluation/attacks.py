r"""A network's accuracy on damaged and on attacked pictures, and errors and flips beside AlexNet's.

Attacked pictures are moved against the network:

.. math:: x_{t+1} = \Pi_{\|x - x_0\|_\infty \le \varepsilon,\ 0 \le x \le 1}
          \big(x_t + \alpha\, \mathrm{sign}\, \nabla_x \ell(f(x_t), y)\big)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.apps.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from metapl.errors import MetaplError
from metapl.metrics.predictions import eval_mode, logits_of

Attack = Literal["fgsm", "pgd"]
LEVELS, PGD_STEPS = 255, 10  # ε is counted in levels of a picture of 8 bits

# AlexNet's mean top-1 error by kind on ImageNet-C, by which mCE divides, as the benchmark's authors publish it; and its
# flip probability by perturbation of ImageNet-P, by which mFR divides, rounded as papers restate it. With the figures
# that are published of ResNeXt-101 32x48d WSL (eminorhan/resnext-wsl) they give its printed mCE, 45.7, and mFR, 27.8.
_ERRORS = (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324)
ALEXNET = dict(zip(CORRUPTIONS, (*_ERRORS, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500), strict=True))
_MOVED = {"translate": 0.1101, "rotate": 0.1310, "tilt": 0.0705, "scale": 0.2353}
FLIPS_OF_ALEXNET = {"gaussian_noise": 0.2365, "shot_noise": 0.3006, "motion_blur": 0.0930, "zoom_blur": 0.0594}
FLIPS_OF_ALEXNET |= {"snow": 0.1193, "brightness": 0.0489, **_MOVED}


def attacked(network: nn.Module, images: Tensor, labels: Tensor, attack: Attack, eps: float) -> Tensor:
    """Pictures (B, C, H, W) in [0, 1], each value moved by ``eps`` / 255 or less, on which the network's loss is
    greater.

    ``"fgsm"`` is one step of ε along the sign of the gradient; ``"pgd"`` ten steps of ε/4, each brought back to within
    ε, from the picture itself. The network runs in the mode that it is in; its weights and their gradients stay.

    Source: Goodfellow, Shlens and Szegedy (ICLR 2015); Madry et al. (ICLR 2018). Noisy Student, section 4.3, takes ten
    iterations and does not print its step size.

    >>> line = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = line[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> attacked(line, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), "fgsm", 51)
    tensor([[[[0.3000]]]])
    """
    if attack not in ("fgsm", "pgd") or not 0 <= eps <= LEVELS:
        raise MetaplError(f"attack {attack!r}, eps={eps}: expected 'fgsm' or 'pgd', and 0 to {LEVELS} of 1/{LEVELS}.")
    reach = eps / LEVELS
    steps, size = (1, reach) if attack == "fgsm" else (PGD_STEPS, reach / 4)
    least, most = (images - reach).clamp(min=0), (images + reach).clamp(max=1)
    moved = images
    for _ in range(steps if eps else 0):
        at = moved.detach().clone().requires_grad_()
        with torch.enable_grad():
            # The sum: the sign for a picture is the same in any batch.
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(at), labels, reduction="sum"), at)
        moved = torch.maximum(torch.minimum(moved + size * gradient.sign(), most), least)
    return moved


def relative_to(alexnet: Mapping[str, float], values: Mapping[str, float]) -> float | None:
    r"""Errors, or flip probabilities, relative to AlexNet's in %; None where a kind is missing.

    .. math:: \mathrm{mCE} = 100 \cdot \tfrac{1}{15} \sum_c
              \frac{\sum_s E_{s,c}}{\sum_s E^{\mathrm{AlexNet}}_{s,c}}, \qquad
              \mathrm{mFR} = 100 \cdot \tfrac{1}{10} \sum_p \mathrm{FP}_p / \mathrm{FP}^{\mathrm{AlexNet}}_p

    Source: Hendrycks and Dietterich (ICLR 2019), sections 4.1 and 4.2.
    """
    if alexnet.keys() != values.keys():
        return None
    return 100 * fmean(values[name] / divisor for name, divisor in alexnet.items())


def flip_probability(predictions: Sequence[Sequence[int]], perturbation: str) -> float:
    r"""How often the predicted class changes from one frame to the next.

    .. math:: \mathrm{FP}_p = \frac{1}{m} \sum_{i=1}^{m} \frac{1}{n_i - 1} \sum_{j=2}^{n_i}
              [f(x^{(i)}_j) \ne f(x^{(i)}_{j-1})], \qquad x_{j-1} \to x_1 \text{ for noise}

    ``predictions`` are, for each of the m sequences, the classes of its n_i frames, 2 or more. Frames of noise do not
    follow each other: each is compared with the first, which is clean.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.2.

    >>> flip_probability([[3, 7, 7, 7, 7]], "tilt"), flip_probability([[3, 7, 7, 7, 7]], "shot_noise")
    (0.25, 1.0)
    """
    least = min(map(len, predictions), default=0)
    if least < 2:
        raise MetaplError(
            f"{perturbation}: {len(predictions):,} sequences, the shortest of {least} frames; expected at least one, "
            "and two frames in each."
        )
    noise = perturbation in ("gaussian_noise", "shot_noise")
    return fmean(np.mean(c[1:] != (c[0] if noise else c[:-1])) for c in map(np.asarray, predictions))


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
    """Accuracies on corrupted and on attacked pictures: 75 forward passes a picture and, mostly, the corruptions.

    ``batches`` are of pictures (B, C, H, W) in [0, 1] and labels (B,), read once; ``seed`` is that of the corruptions,
    and ``progress`` is called with the number of pictures done. Each attack, with each ε in 1/255, is on the pictures
    as they are. The result is for JSON: ``corruptions`` by kind (:func:`by_severity`) and ``attacks`` by ε.
    """
    device = next(network.parameters()).device
    damages = dict.fromkeys((name, severity) for name in corruptions for severity in SEVERITIES)
    reaches = dict.fromkeys((attack, float(reach)) for attack in attacks for reach in eps)
    right: Counter[tuple[str, float]] = Counter()
    n = 0
    with eval_mode(network):
        for x, y in batches:
            if x.ndim != 4 or x.shape[1] not in (1, 3):
                raise MetaplError(f"the inputs are {tuple(x.shape)}; expected pictures (B, 1 or 3, H, W).")
            x, y = x.to(device), y.to(device)
            damaged = ((key, corrupted(x, *key, seed=seed, first=n)) for key in damages)
            moved = ((key, attacked(network, x, y, *key)) for key in reaches)
            for key, pictures in chain(damaged, moved):  # one at a time: 75 batches would fill the memory
                right[key] += int((logits_of(network, [pictures]).argmax(-1) == y.cpu()).sum())
            n += len(y)
            progress(n)
    if not n:
        raise MetaplError("there are no pictures to measure on; expected at least one.")
    found: dict[str, Any] = {}
    if damages:
        found = by_severity({name: [right[name, s] / n for s in SEVERITIES] for name, _ in damages})
    for attack, reach in reaches:
        by_eps = found.setdefault("attacks", {}).setdefault(attack, {})
        by_eps[repr(reach).removesuffix(".0")] = right[attack, reach] / n
    return found


def by_severity(accuracies: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """By kind, the accuracies at the five severities and the error, 1 - their mean; and the mean of all."""
    kinds = {name: {"error": 1 - fmean(of), "accuracy_by_severity": list(of)} for name, of in accuracies.items()}
    return {"corruptions": kinds, "mean_corrupted_accuracy": fmean(map(fmean, accuracies.values()))}
