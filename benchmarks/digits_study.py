"""Does the teacher's feedback help on the digits? Every mode, baseline and control, tuned alike.

    python benchmarks/digits_study.py                        # tune, then run 20 seeds; goes on
    python benchmarks/digits_study.py --write benchmarks/results/digits_study.md
    python benchmarks/digits_study.py --forms --workers 16   # Algorithm 1's forms, in another file

Tuning: each method has 12 configurations, each run on 5 seeds, and the one whose best student by
validation (197 labeled images) is best on average is chosen. Final runs: the chosen configuration
on 20 other seeds, where nothing is selected: no validation image is read, and the student that is
kept, and finetuned, is the average of its weights at the last step. Only these runs look at the
test set, once. Every method sees the same batches from the same initial weights for a seed. At 4
labels a class the settings tuned at 2 are used as they are, for all methods alike. The committed
rows are older: in each of their runs 197 labeled validation images select the checkpoint.

The rows named ``reinforce`` and ``loss_difference`` are of the cross-entropy's *sum* over the
batch, with a tuned weight: B = 64 times what Algorithm 1 multiplies h by, at the same weight.
``--forms`` trains the forms of Algorithm 1 beside each other, tuned alike, at 2 labels a class: as
it is written (the dot product times the mean), the authors' (the cosine times the mean, less a
moving average of decay 0.99), and the sum; with ``forward`` and the control, which are trained
again because the older rows' checkpoints were chosen otherwise.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import harness
import torch
from harness import NONE, RESULTS, Row, best, between, difference, every, grid, read, spread

from metapl.ablation.altered import Alteration, Altered
from metapl.apps.data import Data
from metapl.apps.digits import METHODS, Digits, fitting
from metapl.apps.methods.base import Training
from metapl.apps.methods.feedback import Feedback
from metapl.apps.settings import flag_values, with_flags
from metapl.training import FitResult
from metapl.training.loss_trainer import LossTrainer

RAW = RESULTS / "digits_study.jsonl"
FORMS_RAW = RESULTS / "digits_study_forms.jsonl"
# of the averaged student in the final runs; tuning runs select a checkpoint and have no average
EMA_DECAY = 0.995

STUDENT = "test_accuracy"
FINETUNED = "finetuned_test_accuracy"
Config = dict[str, Any]


class Size(NamedTuple):
    """How much is run: training and finetuning steps, seeds, configurations of each method."""

    steps: int
    finetune_steps: int
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    configurations: int


FULL = Size(1500, 200, tuple(range(100, 105)), tuple(range(20)), configurations=12)
MINIATURE = Size(4, 2, (100,), (0, 1), configurations=1)


@dataclass(frozen=True)
class Entry:
    """A method of the study.

    What it is called, which of the library's methods it is, its mode and its grid of 12.
    """

    title: str
    method: str
    grid: tuple[Config, ...]
    mode: str = "forward"
    labels: str | None = None
    tuned_as: str | None = None
    """The entry whose settings it takes, where it computes the same gradient."""
    reduction: Literal["mean", "sum"] | None = None
    """What h of a sampled mode with one number a batch is multiplied by.

    None for the other modes.
    """
    baseline: float | None = None
    cosine: bool = False
    """Whether h is the cosine of the two gradients, and not their product."""
    alteration: Alteration | None = None
    """How h is altered; None: it is not."""


@dataclass(frozen=True, kw_only=True)
class CosineFeedback(Feedback):
    """Feedback whose h is the cosine of the two gradients, which no flag of the command sets."""

    def estimator(self) -> Any:
        return dataclasses.replace(super().estimator(), similarity="cosine")


@dataclass(frozen=True, kw_only=True)
class AlteredFeedback(Feedback):
    """Feedback that is altered, as no method of the command has it.

    The seed is that of what is drawn for it.
    """

    alteration: Alteration
    alteration_seed: int

    def estimator(self) -> Any:
        return Altered(super().estimator(), self.alteration, seed=self.alteration_seed)


EXACT = every(student_lr=(0.5, 1.0), teacher_lr=(0.03, 0.06), weight=(0.3, 1.0, 3.0))
NOISY = every(student_lr=(0.5, 1.0), weight=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
# The mean over the batch is 1/64 of the sum, so that weights from 0.64 on are those of NOISY. 1 is
# the paper's.
MEAN = every(student_lr=(0.5, 1.0), weight=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0))
# A cosine is at most 1, which a dot product is far below: its weights are smaller. 1 is the
# authors'.
COSINE = every(student_lr=(0.5, 1.0), weight=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
ALONE = every(teacher_lr=(0.03, 0.06, 0.12, 0.25), label_smoothing=(0.0, 0.1, 0.2))
FIXED = every(student_lr=(0.25, 0.5, 1.0), teacher_lr=(0.06, 0.12), temperature=(0.5, 1.0))

ENTRIES: dict[str, Entry] = {
    "mpl": Entry("MPL, forward", "mpl", EXACT),
    "unrolled": Entry("MPL, unrolled", "mpl", (), mode="unrolled", tuned_as="mpl"),
    "difference": Entry("MPL, difference", "mpl", (), mode="difference", tuned_as="mpl"),
    "forward_hard": Entry("MPL, forward, hard labels", "mpl", EXACT, labels="hard"),
    "reinforce_per_example": Entry(
        "MPL, reinforce_per_example", "mpl", EXACT, mode="reinforce_per_example"
    ),
    "reinforce": Entry(
        "MPL, reinforce, sum over the batch", "mpl", NOISY, mode="reinforce", reduction="sum"
    ),
    "reinforce_mean": Entry(
        "MPL, reinforce (Algorithm 1: dot, mean)", "mpl", MEAN, mode="reinforce", reduction="mean"
    ),
    "reinforce_cosine": Entry(
        "MPL, reinforce (the authors' form: cosine, mean, baseline 0.99)",
        "mpl",
        COSINE,
        mode="reinforce",
        reduction="mean",
        baseline=0.99,
        cosine=True,
    ),
    "loss_difference": Entry(
        "MPL, loss_difference, sum over the batch",
        "mpl",
        NOISY,
        mode="loss_difference",
        reduction="sum",
    ),
    "none": Entry(
        "same loop, no feedback",
        "none",
        every(student_lr=(0.25, 0.5, 1.0, 2.0), teacher_lr=(0.03, 0.06, 0.12)),
    ),
    "supervised": Entry("supervised, labeled data only", "supervised", ALONE),
    "pseudo_labels": Entry("pseudo labels, fixed teacher, soft", "pseudo_labels", FIXED),
    "pseudo_labels_hard": Entry(
        "pseudo labels, fixed teacher, hard", "pseudo_labels", FIXED, labels="hard"
    ),
    "uda": Entry(
        "UDA alone", "uda", every(teacher_lr=(0.03, 0.06, 0.12), uda_weight=(0.5, 1.0, 2.0, 4.0))
    ),
    "permuted": Entry(
        "control: feedback permuted over the batch", "mpl", EXACT, alteration="permuted"
    ),
    "class_means": Entry(
        "control: class means of the feedback only", "mpl", EXACT, alteration="class_means"
    ),
    "random_sign": Entry(
        "control: feedback with random signs", "mpl", EXACT, alteration="random_sign"
    ),
}
FORMS = ("mpl", "none", "reinforce", "reinforce_mean", "reinforce_cosine")
"""What the study of the forms compares, at 2 labels a class."""
FORMS_ALONE = ("reinforce_mean", "reinforce_cosine")
COMPARED = {
    2: tuple(name for name in ENTRIES if name not in FORMS_ALONE),
    4: ("mpl", "none", "supervised", "pseudo_labels", "pseudo_labels_hard", "uda"),
}
"""By the labels of a class."""


@lru_cache(maxsize=3)
def drawn(seed: int, labels_per_class: int, size: Size) -> Data:
    """Return the data with their batches drawn once: they are the same for every method."""
    data = Digits(labels_per_class=labels_per_class, fitting=fitting(seed=seed)).data(
        print, progress=False, log=None
    )
    return dataclasses.replace(
        data,
        labeled=[data.labeled[t] for t in range(size.steps)],
        unlabeled=[data.unlabeled[t] for t in range(size.steps)],
        finetuning=[data.finetuning[t] for t in range(size.finetune_steps)],
        truth=None,
    )


def one_run(
    method: str, config: Config, seed: int, labels_per_class: int, final: bool, size: Size
) -> Row:
    """Train one method once: tuning runs read the validation images, final runs the test images."""
    torch.set_num_threads(1)
    since = time.perf_counter()
    entry = ENTRIES[method]
    final_decay = EMA_DECAY if final else None
    settings = {
        "ema_decay": final_decay,
        "finetune_steps": size.finetune_steps,
        "lr": config.get("teacher_lr", 0.06),
    }
    fit_options = fitting(seed=seed, steps=size.steps, log_every=size.steps, **settings)
    digits = Digits(labels_per_class=labels_per_class, fitting=fit_options)
    named = METHODS[entry.method]
    asked = {"mode": entry.mode, "student_lr": config.get("student_lr", 0.5)}
    asked |= {"feedback_weight": config.get("weight", 1.0), "pseudo_labels": entry.labels} | config
    asked |= {"reduction": entry.reduction, "baseline": entry.baseline}
    if entry.cosine:
        # The fields that are asked for are set below, when the mode is one that has a cosine.
        named = dataclasses.replace(named, feedback=CosineFeedback(mode="reinforce"))
    if entry.alteration is not None:
        altered = AlteredFeedback(alteration=entry.alteration, alteration_seed=seed)
        named = dataclasses.replace(named, feedback=altered)
    named = with_flags(
        named, **{n: v for n, v in asked.items() if n in flag_values(named) and v is not None}
    )
    data = dataclasses.replace(
        drawn(seed, labels_per_class, size), **{"validation" if final else "test": None}
    )
    looked_at = {"validation": data.validation, "select": not final, "progress": False}

    def phase(trainer: Any, *sources: Any, truth: Any = None, **fit_settings: Any) -> FitResult:
        return trainer.fit(
            *sources,
            **{"steps": size.steps, **digits.fitting.options(), **looked_at, **fit_settings},
        )

    torch.manual_seed(seed)
    teacher, student = (digits.network() for _ in range(2))
    networks = {"teacher": teacher, "student": student}
    trained = named.train(
        Training(
            config=digits,
            data=data,
            **networks,
            fit=phase,
            label=lambda network: {},
            read_labels=lambda stores: {},
        )
    )
    figures: Row = {"validation_accuracy": trained.result.validation_accuracy}
    if final:
        figures = {"selected": False, STUDENT: trained.trainer.evaluate(data.test).accuracy}
        student = trained.trainer.student
        steps = digits.fitting.finetune_steps
        tuner = LossTrainer(student, optimizer=digits.finetuner(student))
        tuner.fit(data.finetuning, steps=steps, validation=None, log_every=steps, progress=False)
        figures[FINETUNED] = tuner.evaluate(data.test).accuracy
    return figures | {"seconds": round(time.perf_counter() - since, 2)}


def chosen(rows: Sequence[Row]) -> dict[str, Config]:
    """Return each method's configuration with the best mean validation accuracy.

    The mean is over the tuning seeds.
    """
    tuning = [row for row in rows if not row["final"]]
    taken = {name: entry.tuned_as or name for name, entry in ENTRIES.items()}
    rows_by_method = {
        name: [row for row in tuning if row["method"] == name] for name in taken.values()
    }
    return {
        name: best(rows_by_method[method_taken], "config", "validation_accuracy")
        for name, method_taken in taken.items()
        if rows_by_method[method_taken]
    }


def column(rows: Sequence[Row], method: str, labels: int, read_out: str) -> list[float]:
    """Return a method's test accuracies in the order of the seeds."""
    rows_of = [
        row
        for row in rows
        if row["final"] and (row["method"], row["labels_per_class"]) == (method, labels)
    ]
    return [row[read_out] for row in sorted(rows_of, key=lambda row: int(row["seed"]))]


PAIRS = (
    (2, "none", STUDENT),
    (4, "none", STUDENT),
    *((2, other, STUDENT) for other in ("permuted", "class_means", "random_sign", "difference")),
    (2, "pseudo_labels", FINETUNED),
    (4, "pseudo_labels", FINETUNED),
)
"""What MPL is compared with beside the tables of the methods: labels a class, method, read-out."""


def block(rows: Sequence[Row]) -> str:
    """Return the tables of the page."""
    parts = []
    for labels, names in COMPARED.items():
        control = column(rows, "none", labels, FINETUNED)
        lines = []
        for name in names:
            student, finetuned = (
                column(rows, name, labels, read_out) for read_out in (STUDENT, FINETUNED)
            )
            beside = (NONE, NONE) if name == "none" else difference(finetuned, control)
            lines.append([ENTRIES[name].title, spread(student), spread(finetuned), *beside])
        parts += [
            f"**{labels} labels a class** (difference: the method's finetuned student less the "
            "control's)",
            grid(["method", "student", "finetuned", "difference", "p"], lines),
        ]
    lines = []
    for labels, other, read_out in PAIRS:
        gain, p = difference(*(column(rows, name, labels, read_out) for name in ("mpl", other)))
        words = "student" if read_out == STUDENT else "finetuned"
        lines.append(
            [f"{ENTRIES['mpl'].title} − {ENTRIES[other].title}", words, str(labels), gain, p]
        )
    parts.append(
        grid(
            ["student against student", "read-out", "labels a class", "difference", "p"],
            lines,
            names=2,
        )
    )
    return "\n\n".join(parts)


def forms_block(rows: Sequence[Row]) -> str:
    """Return Algorithm 1's forms in a table, each beside the control, both finetuned."""
    settings = chosen(rows)
    lines = []
    control = column(rows, "none", 2, FINETUNED)
    for name in FORMS:
        student, finetuned = (column(rows, name, 2, read_out) for read_out in (STUDENT, FINETUNED))
        if not student or not control:
            continue
        beside = [NONE, NONE, NONE]
        if name != "none":
            gain, p = difference(finetuned, control)
            beside = [gain, between(finetuned, control), p]
        weight = settings[name].get("weight", NONE)
        rate = settings[name]["student_lr"]
        lines.append(
            [ENTRIES[name].title, weight, rate, spread(student), spread(finetuned), *beside]
        )
    head = [
        "method",
        "weight",
        "student's rate",
        "student",
        "finetuned",
        "against the control",
        "95 %",
        "p",
    ]
    return grid(head, lines)


SECONDS_A_RUN = 9
"""Of one core, in the mean over the methods, as the older rows have it."""


def run_study(names: dict[int, tuple[str, ...]], args: Any, raw: Any) -> None:
    """Tune these methods, by labels a class, then run them on seeds that nothing was chosen on."""
    size = MINIATURE if args.miniature else FULL
    made_with = {"made_with": harness.environment(), "steps": size.steps}
    run = partial(one_run, size=size)
    tuned = [name for name in ENTRIES if name in names[2]]
    tuning = [
        {"method": name, "config": config, "seed": seed, "labels_per_class": 2, "final": False}
        for seed in size.tuning_seeds
        for name in tuned
        for config in ENTRIES[name].grid[: size.configurations]
    ]
    finals = sum(len(size.seeds) * len(methods_of) for methods_of in names.values())
    minutes = SECONDS_A_RUN * (len(tuning) + finals) / 60
    print(
        f"{len(tuning)} tuning runs and {finals} final ones: some {minutes:.0f} minutes of one "
        "core",
        flush=True,
    )
    rows = harness.go_on(raw, tuning, run, args.workers, **made_with)
    settings = chosen([row for row in rows if "method" in row])
    final = [
        {
            "method": name,
            "config": settings[name],
            "seed": seed,
            "labels_per_class": labels,
            "final": True,
        }
        for labels, methods_of in names.items()
        for seed in size.seeds
        for name in methods_of
    ]
    harness.go_on(raw, final, run, args.workers, **made_with)


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--forms", action="store_true", help="the forms of Algorithm 1 beside each other"
    )
    args = harness.parsed(parser)
    raw = FORMS_RAW if args.forms and args.out == RAW else args.out
    if args.runs:
        run_study({2: FORMS} if args.forms else COMPARED, args, raw)
    mark, tables = ("digits-forms", forms_block) if args.forms else ("digits", block)
    harness.show(args.write, mark, tables(read(raw, "method")))


if __name__ == "__main__":
    main()
