"""Which mode an ablation recommends, on made-up figures."""

from __future__ import annotations

import pytest

from metapl.ablation import ModeCost, recommendation


def cost(seconds: float, peak: int = 100_000, error: float = 0.0, noise: float = 0.0) -> ModeCost:
    return ModeCost(1.0, error, noise, 10.0, seconds, peak)


SAMPLED = {"reinforce": cost(0.02, 90_000, 2.0, 19.0), "reinforce_per_example": cost(0.03, 100_000, 0.1, 1.5)}
NONE = {"none": cost(0.001, 10_000, 1.0)}


@pytest.mark.parametrize(
    ("modes", "taken", "decided"),
    [
        # The fastest of the exact ones, though difference is faster and nearly exact.
        (
            {"unrolled": cost(0.040), "forward": cost(0.030), "difference": cost(0.020, error=1e-4)},
            "forward",
            "and of unrolled and forward it is the fastest (30 ms; next 40 ms)",
        ),
        ({"unrolled": cost(0.020), "forward": cost(0.030)}, "unrolled", "it is the fastest (20 ms; next 30 ms)"),
        # Within 10 %, memory decides.
        (
            {"unrolled": cost(0.0290, 300_000), "forward": cost(0.0310, 150_000)},
            "forward",
            "unrolled and forward take the same time within 10 %, the least memory decided (150 KB; next 300 KB)",
        ),
        (
            {"unrolled": cost(0.0310, 100_000), "forward": cost(0.0290, 150_000)},
            "unrolled",
            "the least memory decided (100 KB; next 150 KB)",
        ),
        # Within 10 % in both, forward.
        (
            {"unrolled": cost(0.0290, 100_000), "forward": cost(0.0310, 105_000)},
            "forward",
            "take the same time within 10 %, and memory too, the choice is forward",
        ),
        # Just beyond the tolerance a difference counts.
        ({"unrolled": cost(0.0290), "forward": cost(0.0320)}, "unrolled", "it is the fastest"),
        # One exact mode, whose rounding is large because the gradient is nearly zero.
        (
            {"unrolled": "no second derivative", "forward": cost(0.03, error=0.024)},
            "forward",
            "the exact one to rounding (which is 0.02 of its length here), without noise; no other",
        ),
    ],
)
def test_of_exact_modes_time_decides_then_memory_then_forward(
    modes: dict[str, ModeCost | str], taken: str, decided: str
) -> None:
    name, text = recommendation({**modes, **SAMPLED, **NONE})
    assert name == taken
    assert text.startswith(f"Take {taken}: its gradient is the exact one to rounding")
    assert decided in text
    assert "Algorithm 1's scalar (reinforce) takes 20 ms, and error and noise of one draw are 19 times" in text


def test_a_mode_that_is_nearly_exact_and_clearly_faster_is_mentioned() -> None:
    slow, fast = {"unrolled": cost(0.03)}, {"difference": cost(0.02, error=1e-4)}
    assert "difference is within 0.0001 of it and takes 20 ms." in recommendation({**slow, **fast})[1]
    assert "difference" not in recommendation({**slow, "difference": cost(0.028, error=1e-4)})[1]


def test_an_exact_mode_that_is_not_exact_here_is_not_believed() -> None:
    name, text = recommendation({"forward": cost(0.03, error=0.5), "difference": cost(0.04, error=1e-4)})
    assert name == "difference"
    assert text.startswith("Take difference: none of these modes is exact to rounding; its gradient is within 0.0001")


def test_a_mode_with_noise_is_not_exact() -> None:
    name, text = recommendation({"forward": cost(0.03, error=1e-5, noise=2e-3), "unrolled": cost(0.05)})
    assert name == "unrolled"
    assert "without noise; no other of these modes is exact to rounding" in text
    alone = recommendation({"forward": cost(0.03, error=1e-5, noise=2e-3)})[1]
    assert alone.startswith("Take forward: none of these modes is exact to rounding; its gradient is within 0.002")


def test_a_truncated_mode_is_not_exact() -> None:
    modes: dict[str, ModeCost | str] = {"forward": cost(0.03, error=0.005), "difference": cost(0.04, error=1e-4)}
    assert "within 0.005 of the exact one, and of forward and difference" in recommendation(modes, ())[1]


def test_without_an_exact_mode_the_nearest_is_taken() -> None:
    name, text = recommendation({**SAMPLED, **NONE, "forward": "it cannot"})
    assert name == "reinforce_per_example"
    assert "none of these modes is exact, or nearly" in text
    assert "error 0.1, noise 1.5 of its length" in text


def test_no_feedback_and_the_gradient_at_an_optimum_are_never_recommended() -> None:
    name, text = recommendation({"forward": "it cannot", "implicit": cost(0.001), **NONE})
    assert name is None
    assert text.startswith("No mode that gives feedback can run")
