"""How far gradients are from double backward in float64 while the inner AdamW is young, on a small BERT.

``python benchmarks/fresh_adam.py`` measures it, in a few minutes; it needs transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from harness import RESULTS, arguments, described, grid, loaded, parsed, show, write_json
from torch import Tensor, nn

import metapl

RESULT = RESULTS / "fresh_adam.json"
STEPS, MINIATURE_STEPS = (0, 1, 2, 5, 10, 40), (0, 1)
WAYS = (("unrolled", "float32"), ("forward", "float32"), ("difference", "float32"), ("difference", "float64"))
HEAD = ("steps of AdamW", "double backward, float32", *(f"`{mode}`, {dtype}" for mode, dtype in WAYS[1:]))


class Classifier(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": 1000, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
        rest = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
        config = BertConfig(**sizes, **rest, num_hidden_layers=layers, num_labels=4)
        self.bert = BertForSequenceClassification(config)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.bert(**tokens).logits


def gradient(
    teacher: nn.Module, student: nn.Module, adam: Any, held: dict[str, Any], mode: Any, dtype: torch.dtype
) -> Tensor:
    """The teacher's gradient of a step, on copies of this type."""
    teacher, student, adam = copy.deepcopy((teacher, student, adam))
    for network in (teacher, student):
        network.to(dtype)
    for name, t in [(name, t) for state in adam.state.values() for name, t in state.items()]:
        t.data = t.data if name == "step" else t.data.to(dtype)
    found = metapl.hypergradient(teacher, student, **held, mode=mode, inner_optimizer=adam)
    return torch.cat([g.double().flatten() for g in found.grads.values()])


def measure(steps: tuple[int, ...], layers: int) -> list[dict[str, Any]]:
    """The relative errors after so many steps of training."""
    torch.manual_seed(0)
    teacher, student, draw = Classifier(layers), Classifier(layers), torch.Generator().manual_seed(1)

    def tokens(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(5, 1000, (rows, 24), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def labeled() -> tuple[dict[str, Tensor], Tensor]:
        return tokens(16), torch.randint(0, 4, (16,), generator=draw)

    adam = torch.optim.AdamW(student.parameters(), lr=5e-4)
    trainer = metapl.BilevelTrainer(teacher, student, "forward", inner_optimizer=adam)
    held, rows = {"labeled": labeled(), "unlabeled": tokens(32)}, []
    for step in range(steps[-1] + 1):
        if step in steps:
            given = teacher, student, adam, held
            exact = gradient(*given, "unrolled", torch.float64)
            found = [gradient(*given, mode, getattr(torch, dtype)) for mode, dtype in WAYS]
            rows.append({"steps": step, "errors": [float((g - exact).norm() / exact.norm()) for g in found]})
        trainer.step(labeled(), tokens(32))
    return rows


def main() -> None:
    given = parsed(arguments(__doc__, RESULT))
    if given.runs:
        rows = measure(MINIATURE_STEPS, 1) if given.miniature else measure(STEPS, 2)
        write_json(given.out, {"setup": described() | {"command": "python benchmarks/fresh_adam.py"}, "rows": rows})
    rows = loaded(given.out)["rows"]
    lines = ([row["steps"], *(f"{e:.1e}" for e in row["errors"])] for row in rows)
    show(given.write, "fresh_adam", grid(HEAD, lines, names=0))


if __name__ == "__main__":
    main()
