r"""A network's accuracy on damaged and on attacked pictures.

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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.apps.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from metapl.errors import MetaplError
from metapl.metrics.predictions import eval_mode, logits_of

Attack = Literal["fgsm", "pgd"]
LEVELS, PGD_STEPS = 255, 10  # ε is counted in levels of a picture of 8 bits


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
