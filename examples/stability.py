"""How much settings matter: a finite difference's step, pseudo-labels' temperature, a batch's size.

    python examples/stability.py [--draws N]

Each mode is compared with the exact gradient under the same setting, on the digits, after some
steps of training.
"""

import argparse
from dataclasses import replace

import torch
from sklearn.datasets import load_digits

import metapl
from metapl.feedback import Difference

MODES = ("forward", "difference", "reinforce", "reinforce_per_example")


def trained(temperature: float, steps: int, few, many) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    teacher, student = (metapl.models.mlp([64, 32, 10]) for _ in range(2))
    problem = metapl.PseudoLabels(temperature=temperature)
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=problem)
    for _ in range(steps):
        trainer.step(few, many)
    return trainer


def row(trainer: metapl.BilevelTrainer, few, many, modes, draws: int) -> str:
    """Return error and noise of one draw, over the length of the exact gradient."""
    ablation = metapl.ablate(trainer, few, many, modes, draws=draws, rounds=1, altered=False)
    line = ""
    for mode in ablation.modes.values():
        cell = "-" if isinstance(mode, str) else f"{mode.of_one_draw:.2g}"
        line += f"{cell:>23}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = (x / 16).float()
    few = x[:100], y[:100]
    many = x[100:164]
    trainer = trained(1.0, args.steps, few, many)

    print("step of the difference, over a typical weight")
    for step in (1e-5, 1e-4, 1e-3, 1e-2):
        figures = row(trainer, few, many, [replace(Difference(), relative_step=step)], args.draws)
        print(f"{step:>8}{figures}")
    head = "".join(f"{name:>23}" for name in MODES)
    print(f"\ntemperature of the pseudo-labels\n        {head}")
    for temperature in (0.25, 0.5, 1.0, 2.0):
        trainer_at_temperature = trained(temperature, args.steps, few, many)
        figures = row(trainer_at_temperature, few, many, MODES, args.draws)
        print(f"{temperature:>8}{figures}")
    print(f"\nrows of the inner batch\n        {head}")
    for rows in (8, 16, 32, 64):
        print(f"{rows:>8}{row(trainer, few, many[:rows], MODES, args.draws)}")


if __name__ == "__main__":
    main()
