"""Noisy Student on ImageNet, with the paper's settings: a teacher labels, a student learns with noise, and labels next.

    python examples/noisy_student_imagenet.py b0 --root data/ --unlabeled pictures/ --out runs/b0
    python examples/noisy_student_imagenet.py l2 --root data/ --unlabeled pictures/ --out runs/l2 --finetune-size 800

Rows b0 to b7 are the study of model sizes (Figure 2, Table 9): teacher and student, once. l2 learns from B7, and then
twice from itself (Table 7; its last round took a ratio of 28, and its B7 saw pictures of 600 pixels). Of the paper:
batches, the rate and its decay by 0.97 every 2.4 epochs of 350 (4.8 of 700), dropout, the last block kept with a
probability of 0.8, RandAugment of magnitude 27 (taken to be of 30), 130,000 pictures a class above 0.3, filled up by
copies. The rest is of imagenet-10pct in protocols.py. Its 300 million pictures are not public: --unlabeled is a folder
such as YFCC100M; without it most of ImageNet loses its labels. Every value is a flag; --resume goes on with a run.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from picture_sets import build_network as network
from picture_sets import deliver
from picture_sets import load_pictures as load
from picture_sets import save_weights as keep
from picture_sets import split_labels as divided
from picture_sets import views_of as views
from torch import Tensor, nn

import metapl
from metapl.apps.labels import LabelStore, LabelWriter, select
from metapl.apps.model_noise import NoisyStudentLoss
from metapl.apps.networks import parameter_groups
from metapl.apps.pictures import (
    EvaluationBatches,
    FileImages,
    Identity,
    LabeledBatches,
    UnlabeledBatches,
    scan_unlabeled,
)
from metapl.apps.pictures.batches import in_unit_range
from metapl.data import StepSampler
from metapl.data.draws import fold_in
from metapl.problems.losses import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class Config:
    """The values of EfficientNet-B0."""

    root: Annotated[str, tyro.conf.arg(metavar="DIR")]  # what torchvision calls so
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    unlabeled: str | None = None
    networks: tuple[str, ...] = ("efficientnet_b0", "efficientnet_b0")  # of the teacher, and of each student
    image_size: int = 224
    epochs: int = 700  # of 1,281,167 labeled pictures
    steps: int | None = None  # None: of so many epochs
    ratio: int = 1  # unlabeled pictures in a batch for each labeled one
    labeled_batch: int = 2_048
    lr: float = 0.128
    weight_decay: float = 1e-5
    dropout: float = 0.5
    stochastic_depth: float = 0.2
    magnitude: float = 10 / 30 * 27  # ours is of 10
    threshold: float = 0.3
    per_class: int = 130_000
    label_smoothing: float = 0.1
    finetune_size: int | None = None  # FixRes: side of the pictures that the last student is finetuned and tested on
    finetune_steps: int = 2_000
    finetune_lr: float = 1e-5
    finetune_batch: int = 512
    labels_per_class: int = 128  # without --unlabeled
    validation: int = 25_000
    seed: int = 0
    resume: bool = False
    channels_last: bool = False
    translate: float = 100 / 224  # of RandAugment, as a share of the side at magnitude 10
    cutout: int = 0
    ema_decay: float = 0.999
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    num_workers: int = 8
    log_every: int = 100
    validate_every: int = 5_000
    save_every: int = 5_000
    data: tyro.conf.Suppress[str] = "imagenet"


def row(model: str, side: int, epochs: int, ratio: int = 3, networks: tuple[str, ...] = ()) -> Config:
    own: dict[str, Any] = {"networks": networks or (f"efficientnet_{model}",) * 2, "image_size": side}
    return Config(root=tyro.MISSING, out=tyro.MISSING, epochs=epochs, ratio=ratio, **own)


ROWS = {
    "b0": row("b0", 224, 700, ratio=1),
    **{name: row(name, side, 700) for name, side in (("b1", 240), ("b2", 260), ("b3", 300), ("b4", 380))},
    **{name: row(name, side, 350) for name, side in (("b5", 456), ("b6", 528), ("b7", 600))},
    "l2": row("l2", 475, 350, 14, ("efficientnet_b7", *["efficientnet_l2"] * 3)),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Selected(UnlabeledBatches):
    """Batches (x, stored) of selected pictures, whose distributions are read from the store as they are needed."""

    rows: Tensor
    store: LabelStore

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def fetch(self, step: int) -> tuple[Tensor, ...]:
        *images, rows = super().fetch(step)
        return (*images, self.store.at(rows))


def labeled_by(teacher: nn.Module, images: Any, place: Path, classes: list[str]) -> LabelStore:
    """The store of a network's labels of all pictures as they are; one that was stopped is gone on with."""
    teacher.eval()
    with torch.no_grad(), LabelWriter(place, classes, resume=place.exists()) as writer:
        done = len(images) if writer.complete else 0 if writer.last is None else int(writer.last) + 1
        for start in range(done, len(images), 256):
            numbers = torch.arange(start, min(start + 256, len(images)))
            x, used = (images.fetch_sound if isinstance(images, FileImages) else images.fetch)(numbers)
            logits = teacher(in_unit_range(x).to(next(teacher.parameters()).device))
            writer.add(used.tolist(), logits.float().softmax(1).cpu())
    return LabelStore(place)


def train(c: Config) -> dict[str, Any]:
    pictures, labels, test, test_labels, classes, core = load(c)
    out, (_, noisy, crop) = Path(c.out), views(c)
    each, sides = None if c.unlabeled else c.labels_per_class, (c.image_size, c.image_size)
    few, many, held_out = divided(labels, each, c.validation, c.seed, core).values()
    unlabeled = pictures.select(many)
    if c.unlabeled:
        unlabeled = FileImages(scan_unlabeled(c.unlabeled).paths(), size=sides, center=224 / 256)
    validation, tested = EvaluationBatches(pictures.select(held_out), labels[held_out], 256), []
    how: dict[str, Any] = {"out": out, "resume": c.resume, "validation": validation, "num_workers": c.num_workers}
    how |= {"log_every": c.log_every, "validate_every": c.validate_every, "save_every": c.save_every}
    student = nn.Module()  # of the round before
    for number, name in enumerate(c.networks):  # round 0 has labeled pictures alone
        seed = fold_in(c.seed, number)
        sampler = StepSampler(len(few), c.labeled_batch, seed=seed)
        known = LabeledBatches(pictures.select(few), labels[few], sampler, noisy, seed, crop=crop)
        losses: tuple[Any, ...] = (CrossEntropy(c.label_smoothing),)
        pairs = None
        if number:
            place = out / "rounds" / str(number)
            store = labeled_by(student, unlabeled, place / "labels", classes)
            most: dict[str, Any] = {"threshold": c.threshold, "per_class": c.per_class, "balance": True}
            select(store, place / "selected", **most)
            chosen = LabelStore(place / "selected")
            rows = torch.from_numpy(chosen.rows_with_copies())
            images = unlabeled.select(torch.tensor([*chosen])[rows])
            draw = StepSampler(len(rows), c.ratio * c.labeled_batch, seed=seed, stream=1)
            pairs = Selected(images, draw, noisy, None, seed, crop=crop, rows=rows, store=chosen)
            losses = (NoisyStudentLoss(label_smoothing=c.label_smoothing),)
        torch.manual_seed(seed)
        student = network(c, len(classes), c.dropout, name)
        groups = parameter_groups(student, c.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=c.lr, momentum=0.9, nesterov=True)
        trainer = metapl.LossTrainer(student, losses, optimizer=optimizer)
        own = {"phase": f"round-{number}", "schedule": "exponential", "ema_decay": c.ema_decay}
        found = trainer.fit(known, pairs, steps=c.steps or round(c.epochs * 1_281_167 / 2_048), **own, **how)
        reached = trainer.evaluate(EvaluationBatches(test, test_labels, 256))
        tested.append(reached.accuracy)
        keep(found.weights, out / f"round-{number}.safetensors")

    result: dict[str, Any] = {"networks": c.networks, "test_accuracy_of_rounds": tested, "tested_on": len(test_labels)}
    if c.finetune_size:  # labeled pictures as they are, and the first half of the layers frozen with their statistics
        pictures, _, test, *_ = load(dataclasses.replace(c, image_size=c.finetune_size))
        layers = [part for part in student.modules() if [*part.parameters(recurse=False)]]
        for layer in layers[: len(layers) // 2]:
            layer.eval().requires_grad_(False)
        sampler = StepSampler(len(few), c.finetune_batch, seed=c.seed, stream=2)
        known = LabeledBatches(pictures.select(few), labels[few], sampler, Identity(), c.seed + 1)
        trained = [p for p in student.parameters() if p.requires_grad]
        trainer = metapl.LossTrainer(student, optimizer=torch.optim.SGD(trained, lr=c.finetune_lr))
        how |= {"validation": EvaluationBatches(pictures.select(held_out), labels[held_out], 256)}
        found = trainer.fit(known, steps=c.finetune_steps, phase="resolution", schedule="constant", **how)
        keep(found.weights, out / "finetuned.safetensors")
        reached = trainer.evaluate(EvaluationBatches(test, test_labels, 256))
        result["finetuned_test_accuracy"] = reached.accuracy
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(c), indent=1))
    (out / "result.json").write_text(json.dumps(result, indent=1))
    size = c.finetune_size or c.image_size
    deliver(c, student, "noisy_student", c.networks[-1], size, test, classes, reached)
    return result


if __name__ == "__main__":
    rows = {name: (", ".join(dict.fromkeys(c.networks)), c) for name, c in ROWS.items()}
    print(json.dumps(train(tyro.extras.overridable_config_cli(rows, description=__doc__)), indent=1))
