"""One recipe by one method, end to end: train, finetune, evaluate, and leave a run folder behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from metapl.apps.experiments import suspects
from metapl.apps.experiments.fitting import Share, fit
from metapl.apps.experiments.folder import RunFolder, describe, describe_networks, weights_file
from metapl.apps.experiments.labeling import label_by, labels_given
from metapl.apps.experiments.page import Mistakes, last_fit, mistakes, write_page
from metapl.apps.experiments.rounds import Rounds
from metapl.apps.experiments.run import EndedRun
from metapl.apps.machine.sealed import sha256_of
from metapl.apps.networks.products import products_of
from metapl.apps.pictures.card import NetworkCard
from metapl.apps.pictures.store import record_files, replaced_files
from metapl.apps.recipes.base import ROLES, SELECTED_ON, Chosen, Recipe, Run, Stored, Task, as_dict
from metapl.apps.recipes.methods import EVERY_METHOD, title, titled
from metapl.apps.recipes.methods.noisy_student import finetuned_larger, networks_of
from metapl.apps.recipes.settings import SelfTraining
from metapl.apps.reports.picture import draw_report
from metapl.distributed.mesh import Mesh, shard
from metapl.errors import MetaplError
from metapl.execution.ranks import ALONE, Ranks
from metapl.execution.shards import load_whole
from metapl.metrics import Evaluation, evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.problems.stored import model_noise
from metapl.training import FitResult, Say, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.selection import weights_of

TOLD = ("data.json", "metrics.jsonl")  # what a run says of itself beside its result, which has their SHA-256


@dataclass(frozen=True)
class Network:
    """A network that a run has trained, and what it reaches."""

    name: str  # student, finetuned or teacher
    weights: Mapping[str, Tensor]  # on the host
    validation_accuracy: float | None  # a fraction
    evaluation: Evaluation | None  # on the test set
    mistakes: Mistakes | None = None  # there, for the page

    @property
    def file(self) -> str:
        return weights_file(self.name)

    def accuracies(self, prefix: str = "") -> dict[str, float]:
        """Its accuracies by name, for ``result.json``; nothing that was not measured."""
        tested = None if self.evaluation is None else self.evaluation.accuracy
        found = {"validation_accuracy": self.validation_accuracy, "test_accuracy": tested}
        return {prefix + key: value for key, value in found.items() if value is not None}

    def as_delivered(self) -> dict[str, Any]:
        evaluation = {} if self.evaluation is None else {"evaluation": self.evaluation.to_json()}
        return {"delivered": self.name, **self.accuracies(), **evaluation}


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
        """Train by the recipe's or another method, finetune, evaluate on the test set once, and write all files.

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

    def record(self, task: Task) -> None:
        """Leave behind on which data this runs; refuse to go on with a run on other data."""
        path, record = self.folder.path / "data.json", json.loads(json.dumps(task.record))
        if path.exists() and self.folder.read_json("data.json") != record:
            since = f"since the run in {self.folder.path} was started (see its data.json)"
            raise MetaplError(f"the data have changed {since}; put them back, or start another run with another --out.")
        if self.folder.exists:
            self.folder.relocate(as_dict(self.recipe))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.write_json("data.json", task.record)
        record_files(self.skipped, task.skipped)

    def train(self, task: Task) -> Training:
        teacher, student = self.laid_out_for(self.recipe.torch_device())
        run = Training(self.recipe, task, teacher, student, self)
        run.trainer, run.result = run.train(self.fit)
        return run

    def deliver(self, task: Task, run: Training) -> dict[str, Any]:
        """Write what a training ended with: pictures, networks, figures and ``result.json``, which is returned."""
        trained, method, folder = run.trainer, self.recipe.method, self.folder
        if task.doubtful is not None:
            found = suspects.find_suspects(task.doubtful, trained)
            suspects.write_suspects(folder.path, found, task.classes)
            text = suspects.what_they_are(found)
            self.say(f"labels that may be wrong: {folder.path / suspects.SUSPECTS}, the most suspicious first; {text}")
        sealed: dict[str, str] = {}
        networks = {name: run.keep(name) for name in method.kept}
        for network in networks.values():
            sealed[network.file] = folder.write_weights(network.file, network.weights)
        sealed |= {name: sha256_of(folder.path / name) for name in TOLD if (folder.path / name).is_file()}
        called = f"{self.recipe.name}, {method.name}, seed {self.recipe.seed}"
        cards = self.cards(networks)
        describe_networks(folder, called, task.classes, cards)
        chosen = networks[delivered(method.name, networks, self.selects(task))]
        content: dict[str, Any] = {
            "recipe": self.recipe.name,
            "method": method.name,
            "seed": self.recipe.seed,
            "steps": self.recipe.steps,
            "best_step": run.result.step,
            "validation_size": task.validation_size,
            "validation_chance": task.validation_chance,
            "delivered_by": "validation" if self.selects(task) else "rule",
            **({"rounds": run.rounds.records} if method.is_noisy_student else {}),
            "sha256": sealed,
            **chosen.as_delivered(),
        }
        for network in networks.values():
            content |= network.accuracies(f"{network.name}_")
        draw_report(
            folder.path / "report.png",
            title=f"{self.recipe.name}: {title(method.name)}, seed {self.recipe.seed}",
            curves={method.name: last_fit(folder.path, content)},
            evaluation=chosen.evaluation,
            network=titled(method.name, "student"),
        )
        folder.write_json("result.json", content)
        if self.mesh.size == 1 or dist.get_rank() == 0:  # what the others leave is not kept
            write_page(EndedRun(folder, called, task.classes, cards, describe(self.recipe), content), chosen.mistakes)
        if unread := replaced_files(self.skipped):
            self.say(f"files that could not be read: {len(unread):,}, listed with what is wrong in {self.skipped}")
        return content

    def cards(self, names: Iterable[str]) -> dict[str, NetworkCard]:
        """What each network is; of Noisy Student, teacher and student are those of the last round."""
        method, cards = self.recipe.method, {}
        for name in names:
            own, rounds = self.recipe, method.selection
            last = None if rounds is None else rounds.network(-1)
            if name == "teacher" and isinstance(rounds, SelfTraining):
                last = rounds.network(rounds.rounds - 1)
            own = own if last is None else own.with_network(last)
            if name == "finetuned" and isinstance(rounds, SelfTraining) and rounds.finetune_size is not None:
                own = own.at_size(rounds.finetune_size)
            cards[name] = own.card("teacher" if name == "teacher" else method.built_as, titled(method.name, name))
        return cards

    @property
    def skipped(self) -> Path:
        return self.folder.path / "skipped.jsonl"

    # --------------------------------------------------------------------------------------------------------- fits

    def selects(self, task: Task) -> bool:
        """Whether there are enough validation examples to choose by."""
        return task.validation is not None and task.validation_size >= SELECTED_ON

    def options(self, task: Task) -> dict[str, Any]:
        return {
            "validation": task.validation,
            "truth": task.truth,
            "out": self.folder,
            "resume": self.resume,
            "progress": self.progress,
            "say": self.say,
            **self.recipe.fit_options(),
            "select": self.selects(task),
        }

    def fit(
        self, trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, *, phase: str = "fit", **over: Any
    ) -> FitResult:
        """The main phase, or one before it; ``over`` replaces options of the recipe."""
        options = {"steps": self.recipe.steps, **self.options(task), **over}
        return fit(trainer, self.share(labeled), self.share(unlabeled), phase=phase, **options)

    def share(self, source: Any) -> Any:
        """The rows of this process, where several train together."""
        mesh = self.mesh
        return source if mesh.size == 1 or source is None else Share(source, mesh.share, mesh.shares)

    def finetune(self, task: Task, student: nn.Module, before: FitResult) -> FitResult:
        """The student finetuned on the labeled data, or unchanged where validation shows that to be better."""
        torch.manual_seed(self.recipe.seed)  # whatever was drawn before, so that it can be repeated on its own
        self.seed_shares(student)
        if not self.recipe.finetune_steps:
            return before
        trainer = LossTrainer(student, optimizer=self.recipe.finetune.build(student), **self.recipe.trainer_options())
        options = {k: v for k, v in self.options(task).items() if k != "truth"} | self.recipe.finetune_options()
        result = trainer.fit(self.share(task.finetuning), **{"phase": "finetune"} | options)
        if self.selects(task) and (result.validation_accuracy or 0) < (before.validation_accuracy or 0):
            load_whole(_inside(student), before.weights)
            return before
        return result

    def finetuned(self, task: Task, student: nn.Module, before: FitResult) -> Network:
        tuned = self.finetune(task, student, before)
        return self.network("finetuned", task, _inside(student), tuned.validation_accuracy, tuned.weights)

    def network(
        self, name: str, task: Task, module: nn.Module, accuracy: float | None, weights: Mapping[str, Tensor]
    ) -> Network:
        """A module that has these weights and this validation accuracy, with what it reaches on the test set."""
        if task.test is None:
            return Network(name, dict(weights), accuracy, None)
        found = mistakes(module, task.test, task.classes, task.test_names)
        tested = evaluate_logits(found.logits, found.labels, list(task.classes))
        return Network(name, dict(weights), accuracy, tested, found)

    # ------------------------------------------------------------------------- over the processes that train together

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

    def laid_out(self, *networks: nn.Module) -> list[nn.Module]:
        """Networks over the processes that train together."""
        tensor, found = self.mesh.tensor, []
        for network in networks:
            plan = products_of(network, tensor) if tensor > 1 else None
            if plan == {}:
                raise MetaplError(f"--mesh.tensor {tensor}: a {type(network).__name__} has {NO_PRODUCTS}")
            found.append(shard(network, self.mesh, plan=plan))
        self.seed_shares(*networks)
        return found

    def seed_shares(self, *networks: nn.Module) -> None:
        """Where networks drop something row after row, let each share of a batch have masks of its own."""
        if self.mesh.size > 1 and any(map(model_noise, networks)):
            torch.manual_seed(self.recipe.seed + 2**32 * (1 + self.mesh.share))


@dataclass(eq=False)
class Training(Run):
    """A run in its folder: what its method asks for is laid out, stored and kept."""

    experiment: Experiment
    trainer: Trainer = field(init=False)  # what it ended with
    result: FitResult = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.task  # a method may go on with a part of it

    def beside(self, teacher: nn.Module, reads_inputs: bool) -> nn.Module:
        """What is learned about labels, over the same processes: cut as the student is where it reads its inputs."""
        mesh = self.experiment.mesh
        if mesh.size == 1:
            return teacher
        for t in [*teacher.parameters(), *teacher.buffers()]:  # each share may have drawn its own
            first = t.detach().contiguous()
            dist.broadcast(first, 0)
            t.data.copy_(first)
        return self.experiment.laid_out(teacher)[0] if reads_inputs else shard(teacher, Mesh(replicate=mesh.size))

    def laid_out(self, network: nn.Module) -> nn.Module:
        return network if self.experiment.mesh.size == 1 else self.experiment.laid_out(network)[0]

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self.experiment.seed_shares(self.student)

    @cached_property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        mesh = self.experiment.mesh
        if mesh.size == 1:
            return ALONE
        world: Any = dist.group.WORLD
        return Ranks([world], mesh.share, self.recipe.torch_device(), mesh.tensor, first=dist.get_rank() == 0)

    @cached_property
    def shared(self) -> Path:
        """The folder of the first process, where the stores are."""
        return Path(self.ranks.gathered(str(self.experiment.folder.path.absolute()))[0])

    def labels_given(self) -> Stored | None:
        return labels_given(self.recipe, self.task, self.shared, self.experiment.say, self.ranks)

    def label(self, teacher: nn.Module) -> Stored:
        return label_by(_inside(teacher), self.recipe, self.shared, self.task, self.experiment.say, self.ranks)

    @cached_property
    def rounds(self) -> Rounds:
        """What labels and selects the unlabeled examples, in the run's folder."""

        def measure(network: nn.Module) -> dict[str, float]:
            parts = {"validation_accuracy": self.data.validation, "test_accuracy": self.data.test}
            return {name: evaluated(network, data).accuracy for name, data in parts.items() if data is not None}

        settings, say = self.recipe.method.selection, self.experiment.say
        return Rounds(self.recipe, self.shared, self.data, settings, measure, say, self.ranks)

    def select(self, number: int, teacher: nn.Module) -> Chosen:
        return self.rounds.choose(number, teacher)

    def trained(self, number: int, network: nn.Module, result: FitResult) -> None:
        self.rounds.trained(number, network, result)

    def keep(self, name: str) -> Network:
        """The student, the teacher, or the student finetuned, of Noisy Student on larger pictures, as measured."""
        experiment, task, result = self.experiment, self.data, self.result
        rounds = self.rounds if self.recipe.method.is_noisy_student else None
        if name == "student":
            return experiment.network(name, task, self.trainer.student, result.validation_accuracy, result.weights)
        if name == "teacher":
            teacher: Any = self.trainer.teacher if rounds is None else rounds.teachers[-1]
            weights: Any = result.teacher_weights if rounds is None else weights_of(teacher)
            accuracy = None if task.validation is None else evaluated(teacher, task.validation).accuracy
            return experiment.network(name, task, teacher, accuracy, weights)
        if rounds is None:
            return experiment.finetuned(task, self.trainer.as_given, result)
        larger = networks_of(self.recipe, rounds.settings)[-1].at_size(rounds.settings.finetune_size)
        seen = larger.task(None, experiment.progress, experiment.skipped)
        phase = finetuned_larger(larger, rounds.settings, self.trainer.as_given, seen)
        tuned = experiment.fit(phase.trainer, phase.labeled, None, seen, phase=phase.name, **phase.options)
        return experiment.network(name, seen, self.trainer.student, tuned.validation_accuracy, tuned.weights)


def _inside(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network


def delivered(method: str, networks: Mapping[str, Network], select: bool) -> str:
    """The name of the network that a run delivers; see :meth:`metapl.apps.recipes.base.Method.delivered`."""
    return EVERY_METHOD[method].delivered({name: one.validation_accuracy for name, one in networks.items()}, select)


def evaluated(network: nn.Module, data: Any, classes: Sequence[str] | None = None) -> Evaluation:
    device = next(network.parameters()).device
    logits, labels = predict_logits(network, batches_of(data, device))
    return evaluate_logits(logits, labels, classes and list(classes))


# -------------------------------------------------------------------------------------- whether processes can share it


NO_PRODUCTS = (
    "no two linear layers with an activation between them; give --network vit_b_16 or another vision transformer, or "
    "--mesh.shard instead."
)


def check_runs(recipe: Recipe, mesh: Mesh, methods: Iterable[str]) -> None:
    """Refuse methods and options that do not run in the processes of a mesh; nothing is read or built."""
    if getattr(recipe, "compile", False) and max(mesh.replicate, mesh.shard, mesh.tensor) > 1:
        raise MetaplError("--compile runs in one process; leave it out, or leave --mesh out.")


def check_shares(recipe: Recipe, mesh: Mesh) -> None:
    """Refuse what the ranks do not share equally: batches and the products of a network."""
    parts = getattr(recipe, "accumulate", 1)
    for name in recipe.batches_shared:
        size = getattr(recipe, name, None)
        if size is not None and size % (mesh.shares * parts):
            how = f"{mesh.shares:,} ranks do not share equally{f' in {parts} parts' if parts > 1 else ''}"
            one = "an" if name.startswith("u") else "a"
            raise MetaplError(
                f"{recipe.name} has {one} {name} of {size:,}, which {how}; expected a multiple of "
                f"{mesh.shares * parts:,}: give --{name.replace('_', '-')}, or another mesh."
            )
    network = getattr(recipe, "network_name", None)
    if mesh.tensor > 1 and network is not None:
        with torch.random.fork_rng(devices=[]):
            plan = products_of(recipe.network(), mesh.tensor)
        if not plan:
            raise MetaplError(f"--mesh.tensor {mesh.tensor}: {network} has {NO_PRODUCTS}")
