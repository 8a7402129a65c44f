"""Pictures that one of two networks alone is right on, and whether they are more of one network.

    metapl predict runs/first held_out/ --out first.csv
    metapl predict runs/second held_out/ --out second.csv
    python examples/compare_two_networks.py first.csv second.csv

The class of a picture is the name of its folder. McNemar's exact test asks whether either network
is as often alone in being right, as by tosses of a coin. compared.png shows such pictures, the
surest predictions first, as Noisy Student's Figure 3.
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest

COLUMNS = 8


@dataclass
class Prediction:
    label: str
    probability: float
    is_right: bool


def read(path: Path) -> dict[Path, Prediction]:
    """Return the prediction of each picture in a file of metapl predict."""
    predictions = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            picture = Path(row["file"])
            is_right = row["class"] == picture.parent.name
            predictions[picture] = Prediction(row["class"], float(row["probability"]), is_right)
    return predictions


def alone(right: dict[Path, Prediction], wrong: dict[Path, Prediction]) -> list[Path]:
    """Return the pictures that one network alone is right on, its surest predictions first."""
    shared = [picture for picture in right if picture in wrong]
    found = [picture for picture in shared if right[picture].is_right > wrong[picture].is_right]
    return sorted(found, key=lambda picture: -right[picture].probability)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path, default=Path("compared.png"))
    options = parser.parse_args()
    first = read(options.first)
    second = read(options.second)
    groups = {"first": alone(first, second), "second": alone(second, first)}
    counts = {name: len(pictures) for name, pictures in groups.items()}
    p = 1.0
    if any(counts.values()):
        p = binomtest(counts["first"], sum(counts.values())).pvalue
    shared = len(first.keys() & second.keys())
    print(f"of {shared} pictures the first alone is right on {counts['first']}", end=", ")
    print(f"the second on {counts['second']}; McNemar's exact test: p = {p:.2g}")

    figure = Figure((1.5 * COLUMNS, 5.0), layout="constrained")
    places = figure.subplots(2, COLUMNS)
    for row, (name, pictures) in zip(places, groups.items(), strict=True):
        row[0].set_title(f"the {name} alone is right", loc="left")
        for axes in row:
            axes.axis("off")
        for axes, picture in zip(row, pictures, strict=False):
            axes.imshow(Image.open(picture).convert("RGB"))
            labels = f"1: {first[picture].label}\n2: {second[picture].label}"
            axes.text(0.0, -0.05, labels, transform=axes.transAxes, va="top")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
