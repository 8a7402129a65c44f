"""The picture protocols of Meta Pseudo Labels, on torchvision's files of the data sets; nothing is downloaded.

    python examples/protocols.py cifar10-4k --root data/ --out runs/cifar        # 4,000 labeled of 50,000
    python examples/protocols.py svhn-1k --root data/ --out runs/svhn            # 1,000 of 604,388, core and extra
    python examples/protocols.py imagenet-10pct --root data/ --out runs/tenth    # 128 a class, ResNet-50
    python examples/protocols.py imagenet-jft --root data/ --unlabeled pictures/ --out runs/jft      # all, and 12.8 M

The settings are those of the code that the authors published, or, with -paper and for SVHN, of the paper's table
(those of SVHN-1K and ImageNet-10 % were noted from memory and are to be checked). What a table does not tell is from
the code: the unlabeled batch, RandAugment, the average of the weights. Every value is a flag: --steps 1000. --method
none trains without feedback, uda one network with the teacher's losses, supervised on the labeled pictures alone, and
headroom on the true labels of all. A run that was stopped goes on with --resume. It leaves weights, metrics.jsonl,
split.json and result.json, whose test accuracy was measured once, at the end; and in delivered/ a run that `metapl
predict`, `evaluate` and `export` read.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from picture_sets import build_network, deliver, load_pictures, save_weights, split_labels, views_of
from torch import Tensor, nn

import metapl
from metapl.apps.networks import parameter_groups
from metapl.apps.pictures import EvaluationBatches, FileImages, LabeledBatches, UnlabeledBatches, scan_unlabeled
from metapl.apps.train import Truth
from metapl.data import StepSampler
from metapl.feedback import Reinforce
from metapl.problems.losses import UDA, CrossEntropy


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a run does; the values are those of the authors' code for CIFAR-10-4K."""

    root: Annotated[str, tyro.conf.arg(metavar="DIR")]  # what torchvision calls so
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    data: Literal["cifar10", "svhn", "imagenet"] = "cifar10"
    unlabeled: str | None = None  # a folder of other pictures: all of the training pictures then keep their labels
    split: str | None = None  # the split.json of another run, instead of drawing one from the seed
    labels_per_class: int = 400
    validation: int = 5_000  # training pictures that are selected on, and not trained on
    method: Literal["mpl", "none", "uda", "supervised", "headroom"] = "mpl"
    resume: bool = False
    seed: int = 0

    network: str = "wide_resnet28_2"
    image_size: int = 32
    channels_last: bool = False
    dropout: float = 0.2
    stochastic_depth: float = 0.0
    teacher_dropout: float | None = None  # None: as the student's
    magnitude: float = 16.0  # of two operations of RandAugment, of 10
    cutout: int = 16
    translate: float = 1 / 8  # greatest shift at magnitude 10, as a share of the side

    steps: int = 300_000
    wait: int = 3_000  # steps of the teacher alone
    warmup: int = 5_000
    labeled_batch: int = 128
    unlabeled_batch: int = 7 * 128
    student_lr: float = 0.05 * 128 / 256  # the authors have 0.05 for 256 labeled pictures
    teacher_lr: float = 0.05 * 128 / 256
    weight_decay: float = 5e-4
    clip_norm: float | None = None
    ema_decay: float = 0.995
    label_smoothing: float = 0.15
    uda_weight: float = 8.0
    uda_temperature: float = 0.7
    uda_threshold: float = 0.6
    uda_ramp: int = 5_000
    # The exact gradient of soft labels, with a weight of 1 (the authors' code has no gradient at all: --method none).
    # False: Algorithm 1, sampled labels, the cosine of the two gradients, and a moving average taken off.
    exact: bool = True
    pseudo_label_smoothing: float = 0.15

    finetune_steps: int = 1_000
    finetune_batch: int = 512
    finetune_lr: float = 1e-5
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    num_workers: int = 2
    log_every: int = 100
    validate_every: int = 1_000
    save_every: int = 5_000


CIFAR = Protocol(root=tyro.MISSING, out=tyro.MISSING)
TABLE: dict[str, Any] = {"exact": False, "pseudo_label_smoothing": 0.1, "label_smoothing": 0.1, "wait": 0}
TABLE |= {"uda_threshold": 0.0, "uda_ramp": 0}
IMAGENET: dict[str, Any] = {"data": "imagenet", "network": "resnet50", "image_size": 224, "channels_last": True}
IMAGENET |= {"labels_per_class": 128, "validation": 25_000, "validate_every": 5_000, "num_workers": 8}
IMAGENET |= {"magnitude": 17.0, "cutout": 0, "translate": 100 / 224, "clip_norm": 5.0, "ema_decay": 0.999}
TENTH: dict[str, Any] = {"dropout": 0.1, "weight_decay": 1e-4, "label_smoothing": 0.1, "pseudo_label_smoothing": 0.1}
TENTH |= {"student_lr": 0.4 * 1_024 / 256, "teacher_lr": 0.6 * 1_024 / 256, "steps": 700_000, "wait": 20_000}
TENTH |= {"labeled_batch": 1_024, "unlabeled_batch": 15 * 1_024, "finetune_steps": 2_000}
TENTH |= {"uda_temperature": 0.5, "uda_weight": 20.0, "uda_ramp": 50_000}

c4k, tenth = CIFAR, dataclasses.replace(CIFAR, **IMAGENET, **TENTH)
PAPER: dict[str, Any] = {"steps": 1_000_000, "warmup": 2_000, "student_lr": 0.3, "teacher_lr": 0.125}
PAPER |= {"uda_weight": 1.0, "uda_temperature": 0.8, "dropout": 0.35, "teacher_dropout": 0.5}
c4k_paper = dataclasses.replace(c4k, **TABLE, **PAPER)
SVHN: dict[str, Any] = {"data": "svhn", "labels_per_class": 100, "student_lr": 0.15, "teacher_lr": 0.05}
SVHN |= {"uda_weight": 2.5, "uda_temperature": 1.25, "dropout": 0.45, "teacher_dropout": 0.65}
TENTH_PAPER: dict[str, Any] = {"steps": 500_000, "warmup": 1_000, "student_lr": 0.8, "teacher_lr": 0.5}
TENTH_PAPER |= {"weight_decay": 2e-4, "uda_weight": 16.0, "uda_temperature": 0.75}
TENTH_PAPER |= {"labeled_batch": 2_048, "unlabeled_batch": 15 * 2_048}
tenth_paper = dataclasses.replace(tenth, **TABLE | TENTH_PAPER)
# Section 3.3: a ResNet-50 of all labels picks 12,800 pictures a class. What it does not tell is of the tenth's table.
JFT: dict[str, Any] = {"unlabeled": tyro.MISSING, "labeled_batch": 4_096, "unlabeled_batch": 32_768}
JFT |= {"finetune_steps": 10_000, "finetune_lr": 1e-4}
PROTOCOLS = {
    "cifar10-4k": ("CIFAR-10, 4,000 labels, the authors' code", c4k),
    "cifar10-4k-paper": ("CIFAR-10, 4,000 labels, the paper's table", c4k_paper),
    "svhn-1k": ("SVHN, 1,000 labels, core and extra, the paper's table", dataclasses.replace(c4k_paper, **SVHN)),
    "imagenet-10pct": ("ImageNet, 128 labels a class, the authors' code", tenth),
    "imagenet-10pct-paper": ("ImageNet, 128 labels a class, the paper's table", tenth_paper),
    "imagenet-jft": ("ImageNet and 12.8 million other pictures", dataclasses.replace(tenth_paper, **JFT)),
}


def train(c: Protocol) -> dict[str, Any]:
    pictures, labels, test, test_labels, classes, labelable = load_pictures(c)
    out = Path(c.out)
    per_class = c.labels_per_class if c.unlabeled is None else None
    drawn = split_labels(labels, per_class, c.validation, c.seed, labelable)
    if c.split is not None:
        drawn = {name: torch.tensor(rows) for name, rows in json.loads(Path(c.split).read_text()).items()}
    few, many, held_out = drawn.values()
    (weak, strong, crop), every = views_of(c), torch.cat([few, many])
    unlabeled = (
        pictures.select(many)
        if c.unlabeled is None
        else FileImages(scan_unlabeled(c.unlabeled).paths(), size=(c.image_size, c.image_size))
    )

    def labeled(rows: Tensor, batch: int, stream: int, seed: int) -> LabeledBatches:
        sampler = StepSampler(len(rows), batch, seed=c.seed, stream=stream)
        return LabeledBatches(pictures.select(rows), labels[rows], sampler, weak, seed, crop=crop)

    sampler = StepSampler(len(unlabeled), c.unlabeled_batch, seed=c.seed, stream=1)
    pairs = UnlabeledBatches(unlabeled, sampler, weak, strong, c.seed, crop=crop)
    validation = EvaluationBatches(pictures.select(held_out), labels[held_out], 256)
    torch.manual_seed(c.seed)
    teacher_dropout = c.dropout if c.teacher_dropout is None else c.teacher_dropout
    teacher, student = (build_network(c, len(classes), dropout, c.network) for dropout in (teacher_dropout, c.dropout))

    def sgd(of: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(of, c.weight_decay), lr=lr, momentum=0.9, nesterov=True)

    options: dict[str, Any] = {"clip_norm": c.clip_norm, "accumulate": c.accumulate, "precision": c.precision}
    losses: tuple[Any, ...] = (CrossEntropy(c.label_smoothing),)
    if c.method in ("mpl", "none", "uda"):
        losses += (UDA(c.uda_temperature, c.uda_threshold, c.uda_weight, c.uda_ramp),)
    if c.method in ("mpl", "none"):
        mode: Any = "forward" if c.exact else Reinforce(similarity="cosine", baseline=0.99)
        kind = "soft" if c.exact else "hard" if c.method == "none" else None
        problem = metapl.PseudoLabels(kind=kind, label_smoothing=c.pseudo_label_smoothing)
        own = {"inner_optimizer": sgd(student, c.student_lr), "outer_optimizer": sgd(teacher, c.teacher_lr)}
        own |= {"problem": problem, "teacher_losses": losses, "verify": False}  # the tests verify this problem
        # The papers add the feedback as it is; the library's default would bound it.
        own["feedback_weight"] = 1.0
        mode = "none" if c.method == "none" else mode
        trainer: Any = metapl.BilevelTrainer(teacher, student, mode, **own, **options)
    else:
        student = teacher  # the one network
        trainer = metapl.LossTrainer(student, losses, optimizer=sgd(student, c.teacher_lr), **options)
    how: dict[str, Any] = {"out": out, "resume": c.resume, "validation": validation, "num_workers": c.num_workers}
    how |= {"log_every": c.log_every, "save_every": c.save_every}
    out.mkdir(parents=True, exist_ok=True)
    (out / "split.json").write_text(json.dumps({name: rows.tolist() for name, rows in drawn.items()}))
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(c), indent=1))
    known = many[:2_048] if c.unlabeled is None else many
    truth = [Truth(EvaluationBatches(pictures.select(known), labels[known], 256))] if len(known) else []
    found = trainer.fit(
        labeled(every if c.method == "headroom" else few, c.labeled_batch, 0, c.seed),
        pairs if c.method in ("mpl", "none", "uda") else None,
        steps=c.steps,
        wait=c.wait if c.method in ("mpl", "none") else 0,
        warmup=c.warmup,
        ema_decay=c.ema_decay,
        validate_every=c.validate_every,
        callbacks=truth,
        **how,
    )
    kept = {"student": found.weights} | ({"teacher": found.teacher_weights} if found.teacher_weights else {})
    tested = {"student": trainer.evaluate(EvaluationBatches(test, test_labels, 256), classes=classes)}
    if c.finetune_steps and c.method != "headroom":
        torch.manual_seed(c.seed)
        optimizer = torch.optim.SGD(parameter_groups(student, 0.0), lr=c.finetune_lr)
        tuner = metapl.LossTrainer(student, optimizer=optimizer, **options)
        how |= {"phase": "finetune", "schedule": "constant", "validate_every": max(1, c.finetune_steps // 10)}
        tuned = tuner.fit(labeled(few, c.finetune_batch, 2, c.seed + 1), steps=c.finetune_steps, **how)
        kept["finetuned"] = tuned.weights
        tested["finetuned"] = tuner.evaluate(EvaluationBatches(test, test_labels, 256), classes=classes)
    for name, weights in kept.items():
        save_weights(weights, out / f"{name}.safetensors")
    result = {f"{name}_test_accuracy": one.accuracy for name, one in tested.items()}
    values = {"student": found.value or 0.0} | ({"finetuned": tuned.value or 0.0} if "finetuned" in kept else {})
    result |= {"delivered": max(reversed([*values]), key=lambda name: values[name]), "best_step": found.step}
    result |= {"validation_accuracy": values, "labeled": len(few), "unlabeled": len(unlabeled), "tested_on": len(test)}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    made = build_network(c, len(classes), c.dropout, c.network)
    made.load_state_dict(kept[result["delivered"]])
    deliver(c, made, c.method, c.network, c.image_size, test, classes, tested[result["delivered"]])
    return result


if __name__ == "__main__":
    print(json.dumps(train(tyro.extras.overridable_config_cli(PROTOCOLS, description=__doc__)), indent=1))
