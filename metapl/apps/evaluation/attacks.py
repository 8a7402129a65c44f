r"""Pictures that are moved against a network.

.. math:: x_{t+1} = \Pi_{\|x - x_0\|_\infty \le \varepsilon,\ 0 \le x \le 1}
          \big(x_t + \alpha\, \mathrm{sign}\, \nabla_x \ell(f(x_t), y)\big)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError

Attack = Literal["fgsm", "pgd"]
LEVELS = 255
"""ε is counted in levels of a picture of 8 bits."""

PGD_STEPS = 10


def attacked(network: nn.Module, images: Tensor, labels: Tensor, attack: Attack, eps: float) -> Tensor:
    """Pictures, each value moved by ``eps`` levels or less, on which the network's loss is greater.

    Args:
        network: gives logits (B, C) of pictures in [0, 1]; it runs in the mode that it is in, and its weights and their
            gradients stay.
        images: float (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        attack: ``"fgsm"`` is one step of ε along the sign of the gradient; ``"pgd"`` ten steps of ε/4, each brought
            back to within ε, from the picture itself.
        eps: ε in 1/255 of the range from black to white; 0 gives the pictures as they are.

    Returns: pictures like ``images``.

    Cost: one forward and one backward pass, or ten.

    Raises:
        MetaplError: another attack, or an ε below 0 or above 255.

    Source: Goodfellow, Shlens and Szegedy (ICLR 2015); Madry et al. (ICLR 2018). Noisy Student, section 4.3, takes ten
    iterations and does not print its step size.

    >>> line = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = line[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> attacked(line, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), "fgsm", 51)
    tensor([[[[0.3000]]]])
    """
    if attack not in ("fgsm", "pgd") or not 0 <= eps <= LEVELS:
        raise MetaplError(
            f"attack {attack!r} with eps={eps}: expected 'fgsm' or 'pgd', and 0 to {LEVELS} of 1/{LEVELS}."
        )
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
