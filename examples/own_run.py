"""A network and a loop of one's own on folders of pictures, in a run that the command reads:

    python examples/own_run.py --labeled few --unlabeled many --test held_out --out runs/own
    metapl predict runs/own held_out --factory examples/own_run.py:network
    metapl runs

It prints the accuracy on the test pictures. The folder describes how a file becomes an input; the
network is built by the function `network` of this file, which whoever reads the run names.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import metapl
from metapl.data import StepSampler
from metapl.metrics import evaluate_logits, predict_logits
from metapl.networks import Input, NetworkCard
from metapl.pictures import (
    Affine,
    Chain,
    Color,
    EvaluationBatches,
    FileImages,
    Hole,
    LabeledBatches,
    UnlabeledBatches,
    check_folders,
    scan_labeled,
    scan_unlabeled,
)
from metapl.problems.losses import UDA, CrossEntropy
from metapl.run_folder import save

# The side of a picture in pixels.
SIDE = 32
# The number of folders that --labeled has.
CLASSES = 3


def network() -> nn.Module:
    """Return a small convnet of colored pictures from 0 to 1."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.GELU()]

    features = [*stage(3, 24), *stage(24, 48), *stage(48, 96)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES))


def train(
    labeled: Path, unlabeled: Path, test: Path, out: Path, steps: int = 400, seed: int = 0
) -> float:
    # 1. The pictures: listed, and refused where a test picture would be trained on.
    few = scan_labeled(labeled)
    many = scan_unlabeled(unlabeled)
    held_out = scan_labeled(test)
    for finding in check_folders(few, many, None, held_out):
        if finding.level == "error":
            raise SystemExit(finding.message)
    if len(few.classes) != CLASSES:
        raise SystemExit(
            f"{labeled} has {len(few.classes)} folders of classes, and the network {CLASSES} "
            f"outputs; expected as many: write CLASSES = {len(few.classes)} into "
            f"{Path(__file__).name}."
        )
    labeled_images, unlabeled_images, test_images = (
        FileImages([*files.paths()], size=(SIDE, SIDE)).cached() for files in (few, many, held_out)
    )

    # 2. Batches: that of step t is a function of the seed and t.
    weak = Affine(5.0, 0.03, (0.93, 1.07), 2.5)
    strong = Chain(
        (Affine(20.0, 0.125, (0.75, 1.33), 10.0), Color(0.4, 0.4, 0.4, 0.0), Hole((0.1, 0.5)))
    )
    inner_rows = StepSampler(len(unlabeled_images), 32, seed=seed, stream=1)
    inner = UnlabeledBatches(unlabeled_images, inner_rows, weak, strong, seed)
    outer_rows = StepSampler(len(labeled_images), 16, seed=seed, stream=0)
    outer = LabeledBatches(labeled_images, few.targets(), outer_rows, strong, seed)

    # 3. Teacher and student by Meta Pseudo Labels.
    torch.manual_seed(seed)
    teacher = network()
    student = network()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        inner_optimizer=torch.optim.AdamW(student.parameters(), lr=3e-3),
        outer_optimizer=torch.optim.AdamW(teacher.parameters(), lr=3e-3),
        teacher_losses=[CrossEntropy(), UDA(weight=1.0, temperature=0.5, threshold=0.85)],
    )
    trainer.fit(outer, inner, steps=steps, progress=False)

    # 4. What it reached, and the run that the command reads.
    logits, labels = predict_logits(
        student, EvaluationBatches(test_images, held_out.targets(few.classes), 256)
    )
    reached = evaluate_logits(logits, labels, [*few.classes])
    places = {"labeled": str(labeled), "unlabeled": str(unlabeled), "test": str(test)}
    card = NetworkCard(title="student", input=Input(size=SIDE))
    config = {"seed": seed, "steps": steps, **places}
    save(
        out,
        student,
        card,
        classes=few.classes,
        name="own_run",
        config=config,
        evaluation=reached,
    )
    return reached.accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("labeled", "unlabeled", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    print(f"test accuracy {train(**vars(parser.parse_args())):.1%}")
