"""Scores as a table: a row for each example, and weights for a next training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError, needed_for
from metapl.runs.fields import AboveZero, check_arguments


def weights_by(scores: Tensor, rate: AboveZero) -> Tensor:
    """Return weights that are a step along scores away from 1, with the mean 1."""
    check_arguments(weights_by, {"rate": rate})
    size = scores.square().mean().sqrt()
    if not bool(size > 0):
        return torch.ones_like(scores)
    weights = (1 + rate * scores / size).clamp_min(0)
    return weights * (weights.numel() / weights.sum())


def columns_of(
    scores: Tensor, draws: Tensor, *, rate: float, name_of_numbers: str
) -> dict[str, list[Any]]:
    """Return a table with a row for each example, as columns by name.

    Args:
        scores: (N,), or (N, T) of parts of the examples.
        draws: how often each was drawn, (N,).
        rate: as for :func:`weights_by`.
        name_of_numbers: of the first column.
    """
    weights = weights_by(scores, rate)
    columns: dict[str, list[Any]] = {
        name_of_numbers: list(range(len(scores))),
        "score": scores.reshape(len(scores), -1).sum(1).tolist(),
        "weight": weights.reshape(len(scores), -1).mean(1).tolist(),
        "draws": draws.tolist(),
    }
    if scores.ndim > 1:
        columns["token_score"] = scores.tolist()
        columns["token_weight"] = weights.tolist()
    return columns


def path_of_table(file: str | Path) -> Path:
    """Return the path of a table to be written, or refuse one of no known kind."""
    path = Path(file)
    if path.suffix not in (".csv", ".parquet"):
        raise MetaplError(
            f"{path} would be a table of no known kind; expected a name.csv or name.parquet."
        )
    return path


def write_table(columns: dict[str, list[Any]], path: Path) -> None:
    """Write columns to a CSV file, which needs no further package, or to a Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        return
    with needed_for("a table of scores"):
        import pyarrow
        import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
