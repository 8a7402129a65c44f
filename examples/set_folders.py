"""Write CIFAR or SVHN, in any form of ``released_sets.py``, as the folders of the command.

    python examples/set_folders.py --name cifar10 --root data/ --per-class 400 --out cifar/
    metapl train images --labeled cifar/labeled --unlabeled cifar/unlabeled \\
        --test cifar/test --out runs/cifar

The pictures that keep their labels are those that ``protocols.py`` draws by the seed. Each is
called by its number in the set.
"""

import shlex
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro
from picture_sets import load_released, split_labels
from PIL import Image

from metapl.errors import MetaplError


def write_folders(
    name: Literal["cifar10", "cifar100", "svhn"],
    root: Path,
    out: Path,
    per_class: int | None = None,
    validation: int = 0,
    seed: int = 0,
) -> None:
    """Write labeled/CLASS, unlabeled, val/CLASS and test/CLASS, as far as there are such pictures.

    The command that trains on them is printed.

    Args:
        name: of the set.
        root: folder of its files.
        out: folder that is written, which must not exist.
        per_class: how many pictures of each class keep their labels; without it all do.
        validation: how many pictures are held out to select on.
        seed: of the split.
    """
    if out.exists():
        raise MetaplError(f"{out} exists; expected the name of a new folder as --out.")
    sets = load_released(name, str(root))
    split = split_labels(sets.train_labels, per_class, validation, seed, sets.labelable)
    names = {"labeled": "labeled", "unlabeled": "unlabeled", "validation": "val"}
    parts = [(names[part], sets.train, rows.tolist()) for part, rows in split.items()]
    parts.append(("test", sets.test, list(range(len(sets.test_labels)))))
    for part, images, rows in parts:
        labels = sets.test_labels if part == "test" else sets.train_labels
        for number in rows:
            folder = out / part
            if part != "unlabeled":
                folder /= sets.classes[int(labels[number])]
            folder.mkdir(parents=True, exist_ok=True)
            picture = images.fetch(torch.tensor([number]))[0][0]
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number:06}.png")
    if len(split["unlabeled"]):
        words = ["metapl", "train", "images"]
        for folder in sorted(out.iterdir()):
            words += [f"--{folder.name}", str(folder)]
        print(shlex.join(words))


if __name__ == "__main__":
    try:
        tyro.cli(write_folders, description=__doc__)
    except MetaplError as error:
        sys.exit(f"set_folders.py: {error}")
