"""The scores of ``benchmarks/gpt2_training.py`` are those of a loop by hand, in float64."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = [pytest.mark.docs, pytest.mark.usefixtures("as_scripts")]

STEPS = 7


def next_word_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of each sequence, (B,)."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1)


def scores_by_hand(measurement: Any, order: Tensor) -> Tensor:
    """Return minus the derivative of the last loss in the weights of the sequences, (N,).

    By double backward through all steps of AdamW, written out.
    """
    network = measurement.network
    ids = measurement.text.training
    held_out = measurement.text.held_out
    (group,) = measurement.optimizer(network).param_groups
    beta_1, beta_2 = group["betas"]
    weights = torch.ones(len(ids), dtype=torch.float64, requires_grad=True)
    theta = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in theta.items()}
    n = {name: torch.zeros_like(p) for name, p in theta.items()}
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for step, rows in enumerate(order):
            losses = next_word_losses(functional_call(network, theta, (ids[rows],)), ids[rows])
            loss = (weights[rows] * losses).mean()
            gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
            rate = group["lr"] * measurement.share_of_rate(step, STEPS)
            for (name, p), g in zip([*theta.items()], gradients, strict=True):
                m[name] = beta_1 * m[name] + (1 - beta_1) * g
                n[name] = beta_2 * n[name] + (1 - beta_2) * g * g
                m_hat = m[name] / (1 - beta_1 ** (step + 1))
                n_hat = n[name] / (1 - beta_2 ** (step + 1))
                # Positions that no sequence reaches have no gradient, and the root none at 0.
                root = n_hat.clamp_min(torch.finfo(n_hat.dtype).tiny).sqrt()
                decayed = p * (1 - rate * group["weight_decay"])
                theta[name] = decayed - rate * m_hat / (root + group["eps"])
        outer = next_word_losses(functional_call(network, theta, (held_out,)), held_out).mean()
        (gradient,) = torch.autograd.grad(outer, weights)
    return -gradient


def test_the_scores_are_those_of_a_loop_by_hand() -> None:
    gpt2 = importlib.import_module("gpt2_training")
    setting = gpt2.Setting(
        network={"words": 50, "positions": 12, "width": 16, "depth": 2, "heads": 2},
        length=8,
        batch_size=4,
        held_out=3,
        steps=STEPS,
        warmup=2,
        rate=3e-3,
        keep_every=3,
        files=30,
    )
    measurement = gpt2.Measurement(setting, "cpu")
    measurement.network.double()
    attribution, row = measurement.attribute(STEPS, "float32")
    by_hand = scores_by_hand(measurement, attribution.order)
    assert attribution.scores.dtype == torch.float64
    assert attribution.scores.abs().max() > 1e-5
    largest = by_hand.abs().max()
    torch.testing.assert_close(
        attribution.scores / largest, by_hand / largest, rtol=0.0, atol=1e-10
    )
    assert row["kept"] == "one step in 3, of 7"


def test_the_network_is_the_smallest_gpt_2() -> None:
    gpt2 = importlib.import_module("gpt2_training")
    with torch.device("meta"):
        network = gpt2.GPT2()
    assert sum(p.numel() for p in network.parameters()) == 124_439_808


def test_every_tenth_file_is_held_out_and_rare_words_are_unknown() -> None:
    gpt2 = importlib.import_module("gpt2_training")
    texts = ["a a b c"] * 9 + [" d d d d a"]
    text = gpt2.Text.from_files(texts, words=3, length=2, held_out=1)
    # The most frequent pieces are " a" and "a"; with the unknown one they are three words.
    assert text.training.shape == (18, 2)
    assert text.held_out.shape == (1, 2)
    assert text.training.max() == 2
    assert (text.training == gpt2.UNKNOWN).sum() == 18
