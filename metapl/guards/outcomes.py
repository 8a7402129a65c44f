"""What a fit says of itself where it goes wrong: a line for each kind, with a remedy that helps.

It is looked at with the rows that are recorded and at validations, and never in a step: nothing
waits for the device that would not wait anyway.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from metapl.core.size import DEFAULT_BOUND
from metapl.execution.shards import local
from metapl.feedback.report import Say
from metapl.metrics import Evaluation
from metapl.protocols import AnyTrainer, TwoLevelTrainer, is_two_level

# From this ratio on of the feedback's gradient to that of the teacher's own losses, the feedback
# decides alone where the teacher goes.
TOO_LARGE = 10.0

# Below this ratio, in the mean of so many rows or more, the teacher learns as without feedback. The
# mean is over all rows after warm-up: the feedback is as small as the student's rate, and so it is
# small at the end of every schedule.
TOO_SMALL = 1e-3
FEWEST_ROWS = 10

# A single batch may be odd: so many rows in a row show it before anything is said.
ROWS = 3

# Predictions have collapsed where the entropy of their mean is below this part of that of the
# labels' classes. The mean of fewer examples says nothing of classes.
COLLAPSED = 0.1
FEWEST_EXAMPLES = 16

# Parts of the steps, after warm-up, by which what is learned has moved, and by which a network is
# better than guessing: an MLP on digits that is trained for 40 steps in all guesses for the first
# 20. Of fewer steps nothing is expected.
MOVED_BY = 0.1
KNOWS_BY = 0.5
FEWEST_STEPS = 20

# What counts as no move by then: a part of the size that the parameters began with; of those that
# began at zero, such as logits of weights, whose natural size is 1, a root mean square. Training a
# network by AdamW at 1e-5 for 300 steps has moved it by 3e-3 of its size by then; a table of
# weights under SGD at 0.05, by 3e-5, and by 4e-4 in 1,500 steps.
STILL_OF_SIZE = 3e-4
STILL_FROM_ZERO = 1e-3
ZERO = 1e-3

# Entries of the parameters that are compared.
SAMPLED = 4096

# Entropies of the mean prediction among the columns of a row, and by whom and of what they are.
PREDICTIONS = {
    "pseudo_label_class_entropy": ("teacher", "the teacher's labels"),
    "student_class_entropy": ("student", "the student's predictions"),
}

# Returns what to do about the data.
Advice = Callable[[], list[str]]


# What is saved with the fit.
COUNTS = ("rows_in_a_row", "mean_ratio", "compared_rows", "rows_of_uda", "entropies", "first_step")
REMEMBERED = ("said", "warnings", *COUNTS, "start")


class Plan(Protocol):
    """How a fit runs: the options of :class:`metapl.FitOptions` that are read here."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def wait(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def phase(self) -> str: ...


class Outcomes:
    """Watch a fit, and say each thing that goes wrong once.

    What it remembers is saved with the fit, so that one that is resumed says what it would have
    said, and nothing twice. The numbers of a row are the same on every rank; only the first rank
    says anything.

    Args:
        trainer: whose teacher's parameters are the outer variables.
        options: of the fit.
        say: where a line goes.
    """

    def __init__(self, trainer: AnyTrainer, options: Plan, say: Say) -> None:
        self.trainer = trainer
        self.options = options
        self._say = say
        # The kinds of warnings that have been said, or were looked for once, and what was said.
        self.said: list[str] = []
        self.warnings: list[str] = []
        # How many recorded rows in a row have shown a kind, of those that are said after several.
        self.rows_in_a_row: dict[str, int] = {}
        # The mean ratio of the feedback's gradient to that of the teacher's own losses, of so many
        # rows.
        self.mean_ratio = 0.0
        self.compared_rows = 0
        # How many rows had a loss of UDA.
        self.rows_of_uda = 0
        # The first entropy of each prediction, and the least one of the labeled examples' classes.
        self.entropies: dict[str, float] = {}
        # Roughly the first step in which the outer variables are taught.
        self.first_step: int | None = None
        self.start = sample_of(trainer.teacher)

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.copy(getattr(self, name)) for name in REMEMBERED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def recorded(
        self, step: int, row: Mapping[str, float], examples: int, outer_examples: int
    ) -> None:
        """Look at the row after so many steps of a teacher and a student.

        Args:
            examples, outer_examples: in the inner and the outer batch, of all ranks.
        """
        self._look_at_size(step, row)
        if examples >= FEWEST_EXAMPLES:
            self._look_for_collapse(step, row, counts_labels=outer_examples >= FEWEST_EXAMPLES)
        self._look_at_move(step, row)

    def look_for_idle_loss(self, step: int, row: Mapping[str, float]) -> None:
        """Look whether the loss of UDA was 0 in every row of a fit."""
        value = row.get("loss_uda", row.get("teacher_uda"))
        if value is None:
            return
        self.rows_of_uda += 1
        is_idle = self._count("idle", value == 0.0) == self.rows_of_uda
        if is_idle and step >= self.options.steps:
            self.say_once(
                "idle",
                "the unlabeled examples have taught nothing: their loss, of UDA, was 0 in every "
                "row. It has no weight, it had not begun, or no example was predicted with the "
                "confidence that it asks for; take more steps, or lower its threshold",
            )

    def validated(self, step: int, role: str, measured: Any, advice: Advice = list) -> None:
        """Look at what a network reaches on the validation data, on which there may be advice."""
        if not isinstance(measured, Evaluation):
            return
        # A network that tells classes of different sizes apart may be right less often than one
        # that always names the largest class, if it has learned from labels of other shares.
        recalls = [recall for recall in measured.per_class if recall is not None]
        mean_recall = sum(recalls) / len(recalls)
        guesses = is_at_chance(measured.accuracy, measured.chance, measured.n) and is_at_chance(
            mean_recall, 1 / len(recalls), measured.n
        )
        first_step = self.options.wait if role == "student" else 0
        if step < self.due_after(first_step, KNOWS_BY):
            return
        rows = self._count(f"{role} at chance", guesses)
        # Where the classes are of different sizes, naming the largest one is a stage that a
        # training passes through.
        if rows and (rows > 1 or step >= self.options.steps):
            network = role if self.trainer.teacher is not None else "network"
            if self.options.phase != "fit":
                network = f"{network} of phase {self.options.phase}"
            remedies = [*advice(), *self._remedies(role), "train it for more steps"]
            self.say_once(
                f"{role} at chance",
                f"the {network} is at chance on the validation data after step {step:,}, with "
                f"{measured.accuracy:.1%} where guessing has {measured.chance:.1%}: "
                f"{listed(remedies)}",
            )

    def due_after(self, first_step: int, part: float) -> float:
        """Return the step by which a network has learned for a part of its steps, after warm-up.

        Args:
            first_step: when it begins to learn.
        """
        first_step += self.options.warmup
        return first_step + max(part * (self.options.steps - first_step), FEWEST_STEPS)

    def say_once(self, kind: str, text: str) -> None:
        """Say something, unless something of its kind has been said."""
        if kind not in self.said:
            self.said.append(kind)
            self.warn(text)

    def warn(self, text: str) -> None:
        """Say what went wrong, and remember it for the result."""
        # A resumed fit says again what is still so.
        if text not in self.warnings:
            self.warnings.append(text)
        self._say(f"warning: {text}")

    def _remedies(self, role: str) -> list[str]:
        """Return what to do about a network that has learned nothing, or has forgotten it."""
        if role == "student" and "pseudo_label_class_entropy" in self.said:
            return ["mend the teacher's labels first, which it learns"]
        less_feedback = self._less_feedback() if role == "teacher" else []
        return [*less_feedback, "lower its learning rate"]

    def _less_feedback(self) -> list[str]:
        """Return ways to make the feedback smaller.

        There are none where it is small by its rule, or there is no feedback.
        """
        trainer = self.trainer
        if not is_two_level(trainer) or trainer.teacher is None:
            return []
        if not trainer.mode.gives_gradient or not trainer.has_losses:
            return []
        bound = f"give feedback_bound={DEFAULT_BOUND:g}"
        if trainer.feedback_bound is not None:
            return [bound] if trainer.feedback_bound > DEFAULT_BOUND else []
        option = "feedback_weight" if trainer.feedback_ratio is None else "feedback_ratio"
        return [f"leave out {option}", bound]

    def _count(self, kind: str, is_so: bool) -> int:
        """Return how many rows in a row have shown a kind, up to this one."""
        rows = 0
        if is_so:
            rows = self.rows_in_a_row.get(kind, 0) + 1
        self.rows_in_a_row[kind] = rows
        return rows

    def _look_at_size(self, step: int, row: Mapping[str, float]) -> None:
        ratio = row.get("feedback_ratio")
        if ratio is None:
            return
        if step > self.options.warmup:
            self._look_for_no_effect(step, ratio, weight=row.get("feedback_weight", 1.0))
        # It is infinite where the own losses say nothing, such as before they begin.
        if self._count("feedback", TOO_LARGE <= ratio < math.inf) >= ROWS:
            remedies = self._less_feedback() or ["lower its learning rate"]
            self.say_once(
                "feedback",
                f"the feedback's gradient is {ratio:,.0f} times that of the teacher's own losses "
                f"at step {step:,}, and was {TOO_LARGE:.0f} times or more in {ROWS} rows running, "
                f"so the teacher may forget its labels: {listed(remedies)}",
            )

    def _look_for_no_effect(self, step: int, ratio: float, *, weight: float) -> None:
        """Look whether the feedback is so small that the teacher learns as without it."""
        mode = self.trainer.mode if is_two_level(self.trainer) else None
        if mode is None or not mode.gives_gradient or weight == 0:
            return
        self.compared_rows += 1
        self.mean_ratio += (ratio - self.mean_ratio) / self.compared_rows
        if self.compared_rows < FEWEST_ROWS or self.mean_ratio >= TOO_SMALL:
            return
        remedies = ["give feedback_ratio=0.1 in place of a weight"]
        if self.mean_ratio > 0:
            tenth = weight * DEFAULT_BOUND / self.mean_ratio
            remedies = [f"give feedback_weight={tenth:.1g}, by which it would be a tenth"]
        if mode.credits == "batch":
            remedies.append("take a mode with less noise, such as 'reinforce_per_example'")
        self.say_once(
            "no feedback",
            f"the feedback does nothing: up to step {step:,} its gradient was in the mean "
            f"{self.mean_ratio:.1g} of that of the teacher's own losses, so the teacher learns as "
            f"without it; {listed(remedies)}",
        )

    def _look_for_collapse(
        self, step: int, row: Mapping[str, float], *, counts_labels: bool
    ) -> None:
        """Look at the entropies of the mean predictions.

        Args:
            counts_labels: whether the outer batch has enough rows to say something of its classes.
        """
        entropies = self.entropies
        labeled = row.get("labeled_class_entropy")
        if labeled is not None and counts_labels:
            # Of classes of very different sizes the least is 0: naming the largest alone is then a
            # stage of a training.
            entropies["labeled"] = min(labeled, entropies.get("labeled", labeled))
        for column, (role, whose) in PREDICTIONS.items():
            entropy = row.get(column)
            if entropy is None:
                continue
            first = entropies.setdefault(column, entropy)
            # A network that has collapsed before the first row would be compared with itself.
            usual = entropies.get("labeled", first)
            if self._count(column, entropy < COLLAPSED * usual) >= ROWS:
                compared = "they had at first"
                if "labeled" in entropies:
                    compared = "the classes of the labeled examples have"
                self.say_once(
                    column,
                    f"{whose} have collapsed onto few classes: their mean has an entropy of "
                    f"{entropy:.2g} nats at step {step:,}, where {compared} {usual:.2g}; "
                    f"{listed(self._remedies(role))}",
                )

    def _look_at_move(self, step: int, row: Mapping[str, float]) -> None:
        if self.first_step is None:
            self.first_step = step - self.options.log_every
        if "move" in self.said or self.start is None:
            return
        if step < self.due_after(self.first_step, MOVED_BY):
            return
        sample = sample_of(self.trainer.teacher)
        # It is looked at once, whatever is seen.
        self.said.append("move")
        # Of another shape it is where layers were added, say.
        if sample is None or sample.shape != self.start.shape:
            return
        if not is_two_level(self.trainer) or not is_taught(self.trainer):
            return
        if row.get("outer_lr") == 0:
            return
        size = root_mean_square(self.start)
        move = root_mean_square(sample - self.start)
        is_from_zero = size <= ZERO
        least_move = STILL_OF_SIZE * size
        compared = f"of a size of {size:.2g}"
        rate = "1e-3"
        if is_from_zero:
            least_move = STILL_FROM_ZERO
            compared = "from zero"
            rate = "0.1"
        if move >= least_move:
            return
        self.warn(
            f"the teacher's parameters have hardly moved after {step:,} steps, by "
            f"{move:.1g} each {compared}; give it a greater rate, as by "
            f"outer_optimizer=torch.optim.Adam(teacher.parameters(), lr={rate})"
        )


def is_at_chance(value: float, chance: float, n: int) -> bool:
    """Return whether a share of n examples is that of guessing, to a standard error."""
    standard_error = math.sqrt(chance * (1 - chance) / n)
    return value <= chance + standard_error


def listed(ways: Sequence[str]) -> str:
    """Join several ways out.

    >>> listed(["wait"]), listed(["wait", "go"]), listed(["wait", "go", "stop"])
    ('wait', 'wait, or go', 'wait, go, or stop')
    """
    *others, last = ways
    return f"{', '.join(others)}, or {last}" if others else last


def is_taught(trainer: TwoLevelTrainer) -> bool:
    """Return whether anything is meant to move the teacher.

    That are losses of its own, or a feedback that counts.
    """
    has_feedback = trainer.mode.gives_gradient and trainer.feedback_weight != 0
    return bool(has_feedback or trainer.has_losses)


@torch.no_grad()
def sample_of(teacher: torch.nn.Module | None) -> Tensor | None:
    """Return evenly chosen entries of what a teacher learns, on the host.

    They are of this process's part of it; None without any.
    """
    if teacher is None:
        return None
    learned = [local(p.detach()) for p in teacher.parameters() if p.requires_grad]
    total = sum(p.numel() for p in learned)
    if total == 0:
        return None
    stride = math.ceil(total / SAMPLED)
    return torch.cat([p.reshape(-1)[::stride] for p in learned]).to("cpu", torch.float32, copy=True)


def root_mean_square(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())
