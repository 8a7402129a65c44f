"""One recipe by one method, end to end: train, finetune, evaluate, and leave a run folder behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from metapl.apps.experiments.folder import RunFolder, weights_file
from metapl.apps.experiments.galleries import FILE as GALLERIES
from metapl.apps.experiments.galleries import draw_galleries, read_galleries, write_galleries
from metapl.apps.experiments.labels_given import labels_given
from metapl.apps.experiments.larger import finetuned_larger
from metapl.apps.experiments.methods import train
from metapl.apps.experiments.reducing import label_by
from metapl.apps.experiments.rounds import Chosen, Rounds
from metapl.apps.experiments.shares import check_runs
from metapl.apps.experiments.summary import spoken_rounds, summary
from metapl.apps.experiments.suspects import SUSPECTS, find_suspects, suspects_gallery, taken_for_others, write_suspects
from metapl.apps.pictures.store import record_files, replaced_files
from metapl.apps.recipes.base import ROLES, SELECTED_ON, Recipe, Stored, Task, as_dict
from metapl.apps.recipes.methods import EVERY_METHOD, title
from metapl.apps.recipes.methods.noisy_student import networks_of
from metapl.apps.reports import Gallery
from metapl.distributed.dropout import can_be_keyed, drops_by_itself, keyed_dropout
from metapl.distributed.mesh import Mesh, shard
from metapl.distributed.spatial import takes_whole_images
from metapl.errors import MetaplError
from metapl.execution.shards import load_whole
from metapl.metrics import Evaluation, evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.runs.rows import Metrics
from metapl.training import FitResult, Say, Trainer
from metapl.training.loss_trainer import finetune
from metapl.training.selection import weights_of


@dataclass(frozen=True)
class Experiment:
    """A recipe, its data and where its run lives; every method trains on the same data from the same weights."""

    recipe: Recipe
    folder: RunFolder
    resume: bool = False
    progress: bool = True
    say: Say = print
    mesh: Mesh = field(default_factory=Mesh)

    def run(self, method: str | None = None) -> dict[str, Any]:
        """Train, finetune, evaluate on the test set once, and write the folder's files.

        Args:
            method: in the place of the recipe's own.

        Returns: what ``result.json`` holds: the accuracies of each network on validation and on the test set, where
        there is one, as ``student_test_accuracy`` and the like; ``delivered``, the name of the network that is used
        later, with its own as ``validation_accuracy``, ``test_accuracy`` and ``evaluation``.
        """
        if method not in (None, self.recipe.method.name):
            return dataclasses.replace(self, recipe=self.recipe.by(str(method))).run()
        check_runs(self.recipe, self.mesh, [self.recipe.method.name])
        torch.manual_seed(self.recipe.seed)
        task = self.recipe.task(self.say, self.progress, self.skipped)
        self.record(task)
        return self.deliver(task, self.train(task))

    def train(self, task: Task) -> Training:
        """The recipe's method, phase by phase, and the networks that it keeps."""
        run = Training(self, task, *self.laid_out_for(self.recipe.torch_device()))
        run.trainer, run.result = train(run, self.fit)
        return run

    def deliver(self, task: Task, run: Training) -> dict[str, Any]:
        """Write what a training ended with: pictures, networks, figures and ``result.json``, which is returned."""
        trained, method = run.trainer, self.recipe.method
        labeler = trained.teacher if trained.teacher is not None and trained.teacher_classifies else trained.student
        galleries = draw_galleries(task, labeler, trained.student, method.networks["student"])
        galleries += self.suspects(task, trained)
        changed = run.rounds.galleries() if method.selects else []
        sealed = {GALLERIES: write_galleries(self.folder.path, galleries)}
        networks = {network.name: network for network in method.kept(run)}
        name = delivered(method.name, networks, self.selects(task))
        for network in networks.values():
            sealed[network.file] = self.folder.write_weights(network.file, network.weights)
        chosen = networks[name]
        content: dict[str, Any] = {
            "recipe": self.recipe.name,
            "method": method.name,
            "seed": self.recipe.seed,
            "steps": self.recipe.steps,
            "best_step": run.result.step,
            "validation_size": task.validation_size,
            "validation_chance": task.validation_chance,
            "delivered_by": "validation" if self.selects(task) else "rule",
            **({"rounds": run.rounds.records} if method.selects else {}),
            "sha256": sealed,
            **chosen.as_delivered(),
        }
        for network in networks.values():
            content |= network.accuracies(f"{network.name}_")
        self.report(content, chosen.evaluation, task)
        if method.selects:
            self.report_rounds(content, changed)
        self.folder.write_json("result.json", content)
        unread = replaced_files(self.skipped)
        if unread:
            self.say(f"files that could not be read: {len(unread):,}, listed with what is wrong in {self.skipped}")
        return content

    def suspects(self, task: Task, trained: Trainer) -> list[Gallery]:
        """List the examples whose labels may be wrong, where there are such; a gallery of the first of them."""
        if task.doubtful is None:
            return []
        found = find_suspects(task.doubtful, trained)
        write_suspects(self.folder.path, found, task)
        self.say(
            f"labels that may be wrong: {self.folder.path / SUSPECTS}, the most suspicious first; of "
            f"{taken_for_others(found):,} of {len(found):,} the network finds another class more probable"
        )
        return [suspects_gallery(found, task)]

    def laid_out_for(self, place: torch.device) -> list[nn.Module]:
        """The teacher and the student with fresh weights, over the processes that train together."""
        method = self.recipe.method
        if method.is_noisy_student:  # builds a network when its round begins
            return [nn.Identity(), nn.Identity()]
        teacher, student = (self.recipe.network(role).to(place) for role in ROLES)
        if self.mesh.size == 1:
            return [teacher, student]
        if method.doubting:  # what is learned about labels is built later
            return [teacher, *self.laid_out(student)]
        return self.laid_out(teacher, student)

    def laid_out(self, *networks: nn.Module, labels: tuple[Tensor, ...] = ()) -> list[nn.Module]:
        """Networks over the processes that train together; they take images, and perhaps two labels of these."""
        options: dict[str, Any] = {}
        if self.mesh.spatial > 1:
            draw = torch.Generator().manual_seed(self.recipe.seed)
            images = torch.rand(2, *self.recipe.input_shape, generator=draw).to(self.recipe.torch_device())
            options["example"] = (images, *labels)
        # Compiled passes would wait for each key.
        if all(map(can_be_keyed, networks)) and not self.recipe.trainer_options().get("compile"):
            for network in networks:
                keyed_dropout(network, self.mesh.share)
        found = [shard(network, self.mesh, **options) for network in networks]
        for network in networks if self.mesh.spatial > 1 else ():
            takes_whole_images(network)
        self.seed_shares(*networks)
        return found

    def beside(self, teacher: nn.Module, reads_inputs: bool) -> nn.Module:
        """What is learned about labels, over the same processes: cut as the student is where it reads its inputs."""
        if self.mesh.size == 1:
            return teacher
        for t in [*teacher.parameters(), *teacher.buffers()]:  # each share may have drawn its own
            first = t.detach().contiguous()
            dist.broadcast(first, 0)
            t.data.copy_(first)
        if not reads_inputs:
            return shard(teacher, Mesh(replicate=self.mesh.size))
        device = next(teacher.parameters()).device
        (laid_out,) = self.laid_out(teacher, labels=(torch.zeros(2, dtype=torch.long, device=device),))
        return laid_out

    def seed_shares(self, *networks: nn.Module) -> None:
        """Where networks drop something row after row, let each share of a batch have masks of its own."""
        if self.mesh.size > 1 and any(map(drops_by_itself, networks)):
            torch.manual_seed(self.recipe.seed + 2**32 * (1 + self.mesh.share))

    def finetuned(self, task: Task, student: nn.Module, before: FitResult) -> Network:
        """:meth:`finetune`, and what the student then reaches."""
        tuned = self.finetune(task, student, before)
        inside = student.module if isinstance(student, DistributedDataParallel) else student
        return self.network("finetuned", task, inside, tuned.validation_accuracy, tuned.weights)

    def network(
        self,
        name: str,
        task: Task,
        module: nn.Module,
        validation_accuracy: float | None,
        weights: Mapping[str, Tensor],
    ) -> Network:
        """A module that has these weights, with what it reaches on the test set."""
        tested = None if task.test is None else evaluated(module, task.test, task.classes)
        return Network(name, dict(weights), validation_accuracy, tested)

    # ------------------------------------------------------------------------------------------------- the phases

    def record(self, task: Task) -> None:
        """Leave behind on which data this runs; refuse to go on with a run on other data."""
        path, record = self.folder.path / "data.json", json.loads(json.dumps(task.record))
        if path.exists() and self.folder.read_json("data.json") != record:
            raise MetaplError(
                f"the data have changed since the run in {self.folder.path} was started (see its data.json); put them "
                "back as they were, or start another run with another --out."
            )
        if self.folder.exists:
            self.folder.relocate(as_dict(self.recipe))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if task.split is not None:
            task.split.save(self.folder.path / "split.json")
        self.folder.write_json("data.json", task.record)
        record_files(self.skipped, task.skipped)

    @property
    def skipped(self) -> Path:
        """Where the files are listed that cannot be read."""
        return self.folder.path / "skipped.jsonl"

    def fit(
        self, trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, *, phase: str = "fit", **over: Any
    ) -> FitResult:
        """The main phase, or one before it; ``over`` replaces options of the recipe."""
        options = {"steps": self.recipe.steps, **self.options(task), **over}
        return trainer.fit(labeled, unlabeled, phase=phase, **options)

    def options(self, task: Task) -> dict[str, Any]:
        """What every fit of the run has in common."""
        return {
            "validation": task.validation,
            "truth": task.truth,
            "out": self.folder,
            "resume": self.resume,
            "progress": self.progress,
            "say": self.say,
            **self.recipe.fit_options(),
            "select": self.selects(task),
            "split_batches": self.mesh.size > 1,
        }

    def selects(self, task: Task) -> bool:
        """Whether there are enough validation examples to choose by."""
        return task.validation is not None and task.validation_size >= SELECTED_ON

    def finetune(self, task: Task, student: nn.Module, before: FitResult) -> FitResult:
        """The student finetuned on the labeled data, or unchanged where validation shows that to be better."""
        torch.manual_seed(self.recipe.seed)  # whatever was drawn before, so that it can be repeated on its own
        self.seed_shares(student)
        if not self.recipe.finetune_steps:
            return before
        result = finetune(
            student,
            task.finetuning,
            optimizer=self.recipe.finetune.build(student),
            **self.recipe.trainer_options(),
            **self.options(task) | {"truth": None} | self.recipe.finetune_options(),
        )
        if self.selects(task) and (result.validation_accuracy or 0) < (before.validation_accuracy or 0):
            load_whole(student.module if isinstance(student, DistributedDataParallel) else student, before.weights)
            return before
        return result

    def report(self, content: Mapping[str, Any], evaluation: Evaluation | None, task: Task) -> None:
        """Draw ``report.png`` from the rows on disk and what ``result.json`` holds."""
        from metapl.apps.reports import draw_report

        draw_report(
            self.folder.path / "report.png",
            title=f"{self.recipe.name}: {title(content['method'])}, seed {self.recipe.seed}",
            curves={content["method"]: last_fit(self.folder.path, content)},
            confusion=None if evaluation is None else evaluation.confusion,
            classes=list(task.classes),
            summary=" ".join(summary(content)),
            galleries=read_galleries(self.folder.path, content.get("sha256", {}).get(GALLERIES)),
        )

    def report_rounds(self, content: Mapping[str, Any], galleries: Sequence[Gallery]) -> None:
        """Draw ``rounds.png`` from what ``result.json`` says of the rounds."""
        from metapl.apps.reports.rounds import draw_rounds

        what = "rounds of " if self.recipe.method.is_noisy_student else ""
        draw_rounds(
            self.folder.path / "rounds.png",
            content["rounds"],
            title=f"{self.recipe.name}: {what}{title(content['method'])}, seed {self.recipe.seed}",
            summary=" ".join(spoken_rounds(content["rounds"])),
            galleries=galleries,
        )


@dataclass
class Training:
    """A training under way in the folder of a run: what its method asks for, and what it ended with.

    Args:
        task: the data.
        teacher, student: networks with fresh weights, laid out.
    """

    experiment: Experiment
    task: Task
    teacher: nn.Module
    student: nn.Module
    trainer: Trainer = field(init=False)
    result: FitResult = field(init=False)

    def __post_init__(self) -> None:
        self.recipe, self.data = self.experiment.recipe, self.task

    def beside(self, teacher: nn.Module, reads_inputs: bool) -> nn.Module:
        return self.experiment.beside(teacher, reads_inputs)

    def labels_given(self) -> Stored | None:
        return labels_given(self.recipe, self.task, self.experiment.folder.path, self.experiment.say)

    def label(self, teacher: nn.Module) -> Stored:
        return label_by(teacher, self.recipe, self.experiment.folder.path, self.task, self.experiment.say)

    @cached_property
    def rounds(self) -> Rounds:
        """What labels and selects the unlabeled examples, in the run's folder."""

        def measure(network: nn.Module) -> dict[str, float]:
            parts = {"validation_accuracy": self.data.validation, "test_accuracy": self.data.test}
            return {name: evaluated(network, data).accuracy for name, data in parts.items() if data is not None}

        settings = self.recipe.method.selection
        assert settings is not None  # methods that select ask for rounds
        any_class, folder = not self.recipe.method.is_noisy_student, self.experiment.folder.path
        return Rounds(self.recipe, folder, self.data, settings, any_class, measure, self.experiment.say)

    def select(self, number: int, teacher: nn.Module) -> Chosen:
        return self.rounds.choose(number, teacher)

    def trained(self, number: int, network: nn.Module, result: FitResult) -> None:
        self.rounds.trained(number, network, result)

    # --------------------------------------------------------------------------------------- the networks that it keeps

    def network(self, name: str, module: nn.Module, accuracy: float | None, weights: Mapping[str, Tensor]) -> Network:
        return self.experiment.network(name, self.data, module, accuracy, weights)

    def keep_student(self) -> Network:
        accuracy = self.result.validation_accuracy
        return self.network("student", self.trainer.student, accuracy, self.result.weights)

    def keep_teacher(self) -> Network:
        noisy_student = self.recipe.method.is_noisy_student
        teacher = self.rounds.teachers[-1] if noisy_student else self.trainer.teacher
        assert teacher is not None
        weights = weights_of(teacher) if noisy_student else self.result.teacher_weights
        assert weights is not None
        accuracy = None if self.data.validation is None else evaluated(teacher, self.data.validation).accuracy
        return self.network("teacher", teacher, accuracy, weights)

    def keep_finetuned(self) -> Network:
        return self.experiment.finetuned(self.data, self.trainer.as_given, self.result)

    def keep_larger(self, size: int) -> Network:
        experiment, settings = self.experiment, self.rounds.settings
        larger = networks_of(self.recipe, settings)[-1].at_size(size)
        seen = larger.task(None, experiment.progress, experiment.skipped)
        phase = finetuned_larger(larger, settings, self.trainer.student, seen)
        tuned = experiment.fit(phase.trainer, phase.labeled, None, seen, phase=phase.name, **phase.options)
        return experiment.network("finetuned", seen, self.trainer.student, tuned.validation_accuracy, tuned.weights)


def last_fit(folder: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the main phase of a run, which of Noisy Student is the last round."""
    phase = EVERY_METHOD[content["method"]].last_phase(len(content.get("rounds", ())))
    return Metrics(folder / "metrics.jsonl").rows(phase)


@dataclass(frozen=True)
class Network:
    """A network that a run has trained, and what it reaches.

    Args:
        name: student, finetuned or teacher.
        weights: its weights, on the host.
        validation_accuracy: a fraction; None without validation.
        evaluation: on the test set; None without one.
    """

    name: str
    weights: Mapping[str, Tensor]
    validation_accuracy: float | None
    evaluation: Evaluation | None

    @property
    def file(self) -> str:
        """Where its weights are in the run folder."""
        return weights_file(self.name)

    def accuracies(self, prefix: str = "") -> dict[str, float]:
        """Its accuracies by name, for ``result.json``; nothing that was not measured."""
        accuracies = {"validation_accuracy": self.validation_accuracy}
        accuracies["test_accuracy"] = None if self.evaluation is None else self.evaluation.accuracy
        return {prefix + key: value for key, value in accuracies.items() if value is not None}

    def as_delivered(self) -> dict[str, Any]:
        """What ``result.json`` says of the network that is delivered."""
        evaluation = {} if self.evaluation is None else {"evaluation": self.evaluation.to_json()}
        return {"delivered": self.name, **self.accuracies(), **evaluation}


def delivered(method: str, networks: Mapping[str, Network], select: bool) -> str:
    """The name of the network that a run delivers; see :meth:`metapl.apps.recipes.base.Method.delivered`."""
    return EVERY_METHOD[method].delivered({name: one.validation_accuracy for name, one in networks.items()}, select)


def evaluated(network: nn.Module, data: Any, classes: Sequence[str] | None = None) -> Evaluation:
    """A network on (inputs, labels), or batches of these."""
    device = next(network.parameters()).device
    logits, labels = predict_logits(network, batches_of(data, device))
    return evaluate_logits(logits, labels, classes and list(classes))
