"""A training from its settings to its run folder, whatever is trained on and by which method."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metapl.apps.backbone import Control
from metapl.apps.data import Data
from metapl.apps.labeling import read_labels, write_all_labels
from metapl.apps.measured import Measured, evaluated, measured
from metapl.apps.methods.base import Method, Trained, Training, TrainingConfig
from metapl.apps.pace import FINETUNING, Pacer, Timetable
from metapl.apps.report import write_report
from metapl.apps.settings import flag_values
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError, few
from metapl.execution.shards import load_whole, weights_of
from metapl.machine import device
from metapl.metrics import chance_level
from metapl.metrics.predictions import logits_of
from metapl.metrics.pseudo_labels import PseudoLabelAccuracy
from metapl.networks.tuned import Tuned, begin_as
from metapl.pictures.batches import in_unit_range, record_files, replaced_files
from metapl.problems.model_noise import model_noise
from metapl.processes import Processes, done_by_first
from metapl.run_folder import EndedRun, RunFolder, seal
from metapl.runs.files import sha256_of
from metapl.runs.terminal import FitLines, draws_bars
from metapl.training import FitResult, Say, Trainer
from metapl.training.loop import Callback
from metapl.training.loss_trainer import LossTrainer
from metapl.training.selection import FAR_BEHIND
from metapl.words import shown

# The fewest validation examples to choose a student by: one standard error is 7 points then.
SELECTED_ON = 50

# The pictures from which the statistics of batch norm are estimated, unlabeled ones where there
# are as many, of a batch, and those whose classes are counted. On CIFAR-10 accuracies by 256 and by
# 3,000 pictures are 0.3 points apart, and each validation takes as many forward passes.
STATISTICS_OF = 256
STATISTICS_AT_ONCE = 256
COUNTED = 1500

# Predicted classes are skewed where one has more than its share among the labels by these two: a
# part of the share, and a multiple of its standard deviation.
MOST_EXCESS = 0.5
SURE_EXCESS = 4.0

# How long processes wait for the one that labels all pictures.
LABELING = timedelta(days=7)


def describe(config: TrainingConfig, method: Method) -> dict[str, Any]:
    """Return what recipe.json says of a training."""
    return {
        "name": config.name,
        "method": method.name,
        "fields": {**flag_values(config), **flag_values(method)},
    }


def train(
    config: TrainingConfig,
    method: Method,
    folder: RunFolder,
    *,
    resume: bool = False,
    progress: bool = False,
    say: Say = lambda text: None,
    say_progress: Say | None = None,
    processes: Processes | None = None,
    timetable: Timetable | None = None,
) -> dict[str, Any]:
    """Train by a method, finetune, test once, and write the run folder, which the caller holds.

    Args:
        config: what is trained on and how long, such as :class:`metapl.apps.digits.Digits`; every
            field has a value.
        method: one of :mod:`metapl.apps.methods`, or of what is trained on; with a value for every
            field.
        resume: go on with what the folder has; it ends bit for bit as without the interruption.
        progress: show a bar on standard error, where that is a terminal.
        say: where the lines about the data and the result go.
        say_progress: where a line goes every half minute, of how far a phase is; None: nowhere.
        processes: those that train together; None: one.
        timetable: by which one process skips steps; None: all steps are taken.

    Returns: what ``result.json`` holds.
    """
    fitting = config.fitting
    processes = processes or Processes()

    # 1. The data: listed, checked and noted. A run goes on with the same data only.
    torch.manual_seed(fitting.seed)
    skipped = folder.path / "skipped.jsonl"
    data = config.data(say, progress, skipped)
    # The first process alone has the folder of the run, and knows whether the data have changed.
    done_by_first(lambda: note_data(data, method, folder), processes)
    record_files(skipped, data.skipped)
    validation_labels = labels_of(data.validation)
    selects = len(validation_labels) >= SELECTED_ON
    if data.validation is not None and not selects:
        say(
            f"note: {len(validation_labels):,} validation examples are too few to select a network "
            f"by ({SELECTED_ON} are enough); they measure it"
        )

    # 2. Both networks from the seed, the teacher first.
    place = device(fitting.device)
    teacher = config.network().to(place)
    student = config.network().to(place)
    control = Control.of(teacher, data)
    baseline: dict[str, Any] = {}
    judged_on = data.test or data.validation
    if judged_on is not None:
        baseline["control_accuracy"] = control.accuracy(judged_on)
        baseline["control_of"] = control.sees
    if isinstance(teacher, Tuned):
        control.start(teacher)
    begin_as(teacher, student)
    if processes.mesh.size > 1:
        has_noise = bool(model_noise(teacher) or model_noise(student))
        teacher = shard(teacher, processes.mesh)
        student = shard(student, processes.mesh)
        if has_noise:
            processes.seed(student, fitting.seed)

    # 3. The method.
    options = {
        "validation": data.validation,
        "out": folder,
        "resume": resume,
        # Where there is no bar, what is said of how far it is goes to say_progress.
        "progress": progress and draws_bars(),
        "say": say,
        "steps": fitting.steps,
        **fitting.options(),
        # Networks of a few steps apart: a hundred pictures or so cannot tell them apart.
        "select": "one_error" if selects else False,
    }
    phases = Phases(
        config=config,
        data=data,
        student=student,
        place=place,
        processes=processes,
        folder=folder.path,
        options=options,
        say=say,
        say_progress=say_progress,
        timetable=timetable or Timetable(),
    )
    training = Training(
        config=config,
        data=data,
        teacher=teacher,
        student=student,
        fit=phases.fit,
        label=phases.label,
        read_labels=phases.read_labels,
        lay_out=phases.lay_out,
        folder=folder.path,
        progress=progress,
        say=say,
    )
    trained = method.train(training)

    # 4. What is kept: the student as it is, its teacher, and the student finetuned; each is tested
    # once.
    result = trained.result
    networks: dict[str, Measured] = {}
    networks["student"] = measured(
        data, trained.trainer.student, result.validation_accuracy, result.weights
    )
    if trained.teacher is not None:
        network, weights = trained.teacher
        accuracy = None
        if data.validation is not None:
            accuracy = evaluated(network, data.validation).accuracy
        networks["teacher"] = measured(data, network, accuracy, weights)
    elif selects and trained.fallback is not None:
        network, weights = trained.fallback
        accuracy = evaluated(network, data.validation).accuracy
        if accuracy - (result.validation_accuracy or 0.0) >= FAR_BEHIND:
            networks["teacher"] = measured(data, network, accuracy, weights)
    if trained.finetunes and fitting.chosen_finetuning:
        finetuned = finetune(trained, training, processes, selects=selects)
        network = inside(trained.trainer.as_given)
        networks["finetuned"] = measured(
            data, network, finetuned.validation_accuracy, finetuned.weights
        )

    # 5. The networks, what they are and reach, and the page of the run.
    words = words_for(networks, has_teacher=method.has_teacher)
    chosen = delivered(networks, select=selects, last=method.delivers_last)
    cards = {name: trained.configs.get(name, config).card(words[name]) for name in networks}
    title = f"{config.name}, {method.name}, seed {fitting.seed}"
    chance = None
    if len(validation_labels):
        counts = torch.bincount(validation_labels, minlength=len(data.classes)).tolist()
        chance = chance_level(counts)
    weights_by_name = {name: network.weights for name, network in networks.items()}
    content: dict[str, Any] = {
        "recipe": config.name,
        "method": method.name,
        "title": method.title,
        "networks": words,
        "seed": fitting.seed,
        "steps": fitting.steps,
        "best_step": trained.result.step,
        "validation_size": len(validation_labels),
        "validation_chance": chance,
        "delivered": chosen,
        "delivered_by": "validation" if selects else "rule",
        "sha256": seal(folder, title, data.classes, cards, weights_by_name),
        "warnings": phases.warnings,
        "class_counts": phases.class_counts,
        "skipped_steps": phases.timetable.skipped,
        "steps_by_phase": phases.timetable.counts,
        **baseline,
        **networks[chosen].accuracies(),
    }
    if trained.rounds is not None:
        content["rounds"] = trained.rounds
    tested = networks[chosen].tested
    if tested is not None:
        content["evaluation"] = tested.evaluation.to_json()
    for name, measurement in networks.items():
        content |= measurement.accuracies(f"{name}_")
    # What the other processes leave is not kept.
    if processes.first:
        run = EndedRun(folder, title, data.classes, cards, describe(config, method), content)
        write_report(run, tested)
    # This file is the last: a run that has it has all.
    folder.write_json("result.json", content)
    # Those that the folders were without from the start were said.
    unread = replaced_files(skipped).keys() - data.skipped.keys()
    if unread:
        say(f"files that could not be read: {len(unread):,}, listed in {skipped}")
    return content


# ------------------------------------------------------------------------------ parts of a training


def note_data(data: Data, method: Method, folder: RunFolder) -> None:
    """Write ``data.json``, or refuse data that have changed since the run was started."""
    hashes = dict(data.record["hash"])
    for name, description in method.descriptions.items():
        hashes[name] = sha256_of(description)
    record = json.loads(json.dumps({**data.record, "hash": hashes}))
    if (folder.path / "data.json").exists():
        before = folder.read_json("data.json")
        if before != record:
            differing = "; ".join(changes_of_data(before, record)) or "see its data.json"
            raise MetaplError(
                f"the data have changed since the run in {folder.path} was started ({differing}); "
                "put them back, or start another run with another --out."
            )
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_json("data.json", record)


def changes_of_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two records of data, part by part."""
    changes = []
    for part in sorted({*before["hash"], *now["hash"]}):
        if before["hash"].get(part) == now["hash"].get(part):
            continue
        old = names_of(before, part)
        new = names_of(now, part)
        differences = []
        if isinstance(old, set) and isinstance(new, set):
            if old - new:
                differences.append(f"{len(old - new):,} gone ({few(sorted(old - new))})")
            if new - old:
                differences.append(f"{len(new - old):,} new ({few(sorted(new - old))})")
        elif isinstance(old, int) and isinstance(new, int) and old != new:
            differences.append(f"{old:,} before, {new:,} now")
        listed_differences = ", ".join(differences) or "as many, of which some are others"
        changes.append(f"{part}: {listed_differences}")
    return changes


def names_of(record: Mapping[str, Any], part: str) -> set[str] | int:
    """Return the names of the files of a part of the data, or the number of its examples."""
    content: list[str] | int = record.get({"val": "validation"}.get(part, part), 0)
    if not isinstance(content, list):
        return content
    names = {*content}
    if part == "labeled" and "val" not in record["hash"]:
        # Those were set aside.
        names |= {*record["validation"]}
    return names


def some_of(sources: Sequence[Any], most: int) -> Iterator[Tensor]:
    """Yield some examples as they are, in batches of equal size.

    Each batch is spread over all of them, for a folder may be in the order of the classes.

    Args:
        sources: images in memory or in files, of one size.
        most: how many.
    """
    total = sum(len(images) for images in sources)
    count = min(total, most)
    indices = torch.arange(count) * total // count
    parts = -(-count // STATISTICS_AT_ONCE)
    for part in range(parts):
        pieces = []
        first = 0
        for images in sources:
            numbers = indices[part::parts] - first
            numbers = numbers[(numbers >= 0) & (numbers < len(images))]
            first += len(images)
            if isinstance(images, Tensor):
                pieces.append(images[numbers])
            elif len(numbers):
                pieces.append(in_unit_range(images.fetch(numbers)[0]))
        yield torch.cat(pieces)


@dataclass(frozen=True)
class PlainPictures:
    """Batches of examples as they are, of which batch norm has its statistics.

    A network labels pictures, is validated and is kept with these.

    Args:
        data: that is trained on.
    """

    data: Data

    def __iter__(self) -> Iterator[Tensor]:
        sources = [self.data.unlabeled.images]
        if len(sources[0]) < STATISTICS_OF:
            # A few unlabeled pictures, or those of one class, are no sample of what is predicted.
            sources.append(self.data.labeled.images)
        return some_of(sources, STATISTICS_OF)


def labels_of(examples: Any) -> Any:
    """Return the labels of examples, batches or (inputs, labels); nothing where there are none."""
    if isinstance(examples, tuple):
        return examples[1]
    return getattr(examples, "labels", ())


@dataclass(frozen=True, eq=False, kw_only=True)
class Phases:
    """How the phases of a method are run.

    Args:
        config: the settings of the training.
        data: that is trained on.
        student: the network that is trained.
        place: the device of the networks.
        processes: those that train together.
        folder: of the run.
        options: of every fit.
        say: where messages go.
        say_progress: where a line goes every half minute, of how far a phase is; None: nowhere.
        timetable: by which steps are skipped.
        warnings: what the phases so far have warned of.
        class_counts: by phase, how many of some unlabeled examples have each class by the network
            that labels them.
        skewed_phases: those in which it prefers a class.
    """

    config: TrainingConfig
    data: Data
    student: nn.Module
    place: torch.device
    processes: Processes
    folder: Path
    options: Mapping[str, Any]
    say: Say
    say_progress: Say | None
    timetable: Timetable = field(default_factory=Timetable)
    warnings: list[str] = field(default_factory=list)
    class_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    skewed_phases: list[str] = field(default_factory=list)

    def fit(
        self,
        trainer: Trainer,
        labeled: Any,
        unlabeled: Any,
        *,
        phase: str = "fit",
        truth: Any = ...,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> FitResult:
        """Run a phase, which goes on where it was stopped.

        Args:
            trainer: of the networks.
            labeled, unlabeled: sources of batches.
            phase: its name.
            truth: unlabeled examples whose labels are known, by which pseudo-labels are looked at;
                None: they are not. By default those of the data.
            callbacks: of the fit.
            options: of this fit, in the place of those of every fit.
        """
        if truth is ...:
            truth = self.data.truth
        fit_options = {**self.options, **options}
        all_callbacks: list[Callback] = [*callbacks]
        if truth is not None:
            all_callbacks.insert(0, PseudoLabelAccuracy(truth))
        pacers: list[Pacer] = []
        if self.processes.mesh.size == 1:
            pacers = self.timetable.pacers(phase, fit_options["steps"])
            all_callbacks += pacers
        if self.say_progress is not None:
            lines = FitLines(
                self.say_progress,
                steps=fit_options["steps"],
                phase=phase,
                done=None if fit_options["resume"] else 0,
                seconds_left=pacers[0].seconds_left if pacers else None,
            )
            all_callbacks.append(lines)
        try:
            result = trainer.fit(
                self.processes.share(labeled),
                self.processes.share(unlabeled),
                phase=phase,
                callbacks=all_callbacks,
                batch_norm=PlainPictures(self.data),
                **fit_options,
            )
        except (RuntimeError, ConnectionError, EOFError) as error:
            reason = str(error).partition(". ")[0].strip(" .")
            has_workers = self.config.fitting.num_workers > 0
            is_lost = isinstance(error, ConnectionError | EOFError) and has_workers
            if not is_lost and not reason.startswith("DataLoader worker"):
                raise
            raise MetaplError(
                f"a process that prepares batches died ({reason}): was there too little memory?"
            ) from error
        self.warnings.extend(result.warnings)
        self.note_class_counts(trainer, phase)
        return result

    def note_class_counts(self, trainer: Trainer, phase: str) -> None:
        """Note what classes plain unlabeled examples have by the network that labels them.

        That is the teacher, or the only network. Where they are skewed, it is said, once: a student
        of such labels prefers the same classes.
        """
        labeler = trainer.teacher if trainer.teacher_classifies else trainer.student
        unlabeled = some_of([self.data.unlabeled.images], COUNTED)
        labels = logits_of(labeler or trainer.student, unlabeled).argmax(1)
        classes = self.data.classes
        counts = torch.bincount(labels, minlength=len(classes))
        self.class_counts[phase] = dict(zip(classes, counts.tolist(), strict=True))
        given = torch.bincount(labels_of(self.data.labeled), minlength=len(classes))
        expected = given / given.sum() * len(labels)
        excess = counts - expected
        is_skewed = (excess > MOST_EXCESS * expected) & (excess > SURE_EXCESS * expected.sqrt())
        if not is_skewed.any():
            return
        self.skewed_phases.append(phase)
        if len(self.skewed_phases) > 1:
            return
        worst = int(torch.where(is_skewed, excess, -1.0).argmax())
        fair = f"{float(expected[worst]):,.0f}"
        what_follows = "it is often wrong of these"
        # Of a network that is trained alone, no student learns labels, unless it comes before one.
        if trainer.teacher is not None or phase != "fit":
            what_follows = "a student of such labels prefers that class too"
        self.say(
            f"class counts: the network of phase {phase} calls {int(counts[worst]):,} of "
            f"{len(labels):,} examples {shown(classes[worst])}, of which {fair} "
            f"would be as many as among the labeled ones: {what_follows}; train for more steps, or "
            "label more examples of the other classes"
        )

    def lay_out(self, network: nn.Module) -> nn.Module:
        """Lay a network out over the processes that train together."""
        if self.processes.mesh.size == 1:
            return network
        network = shard(network, self.processes.mesh)
        self.processes.seed(self.student, self.config.fitting.seed)
        return network

    def read_labels(self, stores: Mapping[str, str]) -> dict[str, Tensor]:
        """Return the class distributions of the parts of the data whose labels are stored."""
        labels = {}
        for part, store in stores.items():
            images = getattr(self.data, part).images
            labels[part] = read_labels(store, images, self.config.scan(part), self.say)
        return labels

    def label(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the labels of a network; of several processes the first one labels for all."""

        def labels_by(labeler: nn.Module) -> dict[str, Tensor]:
            return write_all_labels(labeler, self.data, self.config.input, self.folder, self.say)

        if self.processes.mesh.size == 1:
            return labels_by(network)
        # All processes gather the weights, which no pass of one process alone could do.
        weights = weights_of(inside(network))

        def label_alone() -> dict[str, Tensor]:
            labeler = self.config.network().to(self.place)
            labeler.load_state_dict(weights)
            return labels_by(labeler)

        labels: dict[str, Tensor] = done_by_first(label_alone, self.processes, patience=LABELING)
        return labels


def finetune(
    trained: Trained, training: Training, processes: Processes, *, selects: bool
) -> FitResult:
    """Finetune the student of a method, and return the better one by validation.

    That is the student as it was where finetuning has made it worse.
    """
    config = training.config
    network = trained.trainer.as_given
    # Whatever was drawn before, so that finetuning can be repeated on its own.
    processes.seed(network, config.fitting.seed)
    trainer = LossTrainer(network, optimizer=config.finetuner(network), **training.options)
    result = training.fit(
        trainer,
        training.data.finetuning,
        None,
        phase=FINETUNING,
        truth=None,
        **config.finetuning(),
    )
    accuracy_before = trained.result.validation_accuracy or 0
    if selects and (result.validation_accuracy or 0) < accuracy_before:
        load_whole(inside(network), trained.result.weights)
        return trained.result
    fit_result: FitResult = result
    return fit_result


def words_for(networks: Mapping[str, Measured], *, has_teacher: bool) -> dict[str, str]:
    """Return what the networks that are kept are called."""
    student = "student" if has_teacher else "network"
    words = {"student": student, "teacher": "teacher", "finetuned": f"finetuned {student}"}
    return {name: words[name] for name in networks}


def delivered(networks: Mapping[str, Measured], *, select: bool, last: bool) -> str:
    """Return the network that a run delivers: the best by validation, the first of equals.

    Where validation cannot tell networks apart, it is the finetuned student.

    Args:
        networks: those that are kept, by their names.
        select: whether validation can tell them apart.
        last: whether it is the last student, of equals the finetuned one, and its teacher only
            where that is 30 points better.
    """
    if not select:
        return "finetuned" if "finetuned" in networks else "student"
    accuracies = {name: network.validation_accuracy or 0.0 for name, network in networks.items()}
    names = [*networks]
    if last:
        names = [name for name in reversed(names) if name != "teacher"]
    chosen = max(names, key=accuracies.__getitem__)
    best = max(networks, key=accuracies.__getitem__)
    return best if accuracies[best] - accuracies[chosen] >= FAR_BEHIND else chosen


def inside(network: nn.Module) -> nn.Module:
    """Return a network without the wrapper of DDP."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def check_shares(config: TrainingConfig, mesh: Mesh) -> None:
    """Refuse batches that do not fall into equal parts for the processes and --accumulate."""
    parts = mesh.shares * config.fitting.accumulate
    for name, size in flag_values(config).items():
        # What is open is looked at again once it was chosen.
        if name.endswith("_batch") and size is not None and size % parts:
            raise MetaplError(
                f"--{name.replace('_', '-')} {size:,}: expected a multiple of {parts:,}, for "
                f"{mesh.shares:,} processes and --accumulate {config.fitting.accumulate:,}."
            )
    if mesh.shard > 1 and config.has_frozen_layers:
        raise MetaplError(
            "--mesh.shard cuts what is trained; of a --backbone expected --tuning all, or copies."
        )
