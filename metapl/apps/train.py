"""A training from its settings to its run folder, whatever is trained on and by which method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metapl.apps.backbone import Control
from metapl.apps.label_store import DESCRIPTION
from metapl.apps.labeling import stored_labels
from metapl.apps.launch import Processes, done_by_first
from metapl.apps.log_to import MetricLog
from metapl.apps.machine import sha256_of
from metapl.apps.methods import Data, Method, ReducedMpl, Training, TrainingConfig
from metapl.apps.pictures.batches import record_files, replaced_files
from metapl.apps.progress import FitLines
from metapl.apps.report import Mistakes, mistakes, write_report
from metapl.apps.run_folder import EndedRun, RunFolder, seal
from metapl.apps.settings import flag_values
from metapl.apps.suspects import SUSPECTS, write_suspects
from metapl.apps.tuned_networks import Tuned, begin_as, merged
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError
from metapl.execution.shards import load_whole, weights_of
from metapl.metrics import Evaluation, chance_level, evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.problems.model_noise import model_noise
from metapl.training import FitResult, Say, Trainer
from metapl.training.loop import Callback
from metapl.training.loss_trainer import LossTrainer
from metapl.training.selection import FAR_BEHIND

# The fewest validation examples to choose a student by: one standard error is 7 points then.
SELECTED_ON = 50

# How long processes wait for the one that labels all pictures.
LABELING = timedelta(days=7)


@dataclass(frozen=True)
class Measured:
    """A network that is kept, and what it reaches."""

    # On the host.
    weights: Mapping[str, Tensor]

    # A fraction.
    validation_accuracy: float | None

    # On the test examples.
    tested: Mistakes | None

    def accuracies(self, prefix: str = "") -> dict[str, float]:
        tested = None if self.tested is None else self.tested.evaluation.accuracy
        found = {"validation_accuracy": self.validation_accuracy, "test_accuracy": tested}
        return {prefix + key: value for key, value in found.items() if value is not None}


def describe(config: TrainingConfig, method: Method, **run_by: Any) -> dict[str, Any]:
    """Return what recipe.json says of a training."""
    return {
        "name": config.name,
        "method": method.name,
        **run_by,
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
    log: MetricLog | None = None,
    processes: Processes | None = None,
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
        log: is given every recorded row, and the accuracies at the end; None: nobody.
        processes: those that train together; None: one.

    Returns: what ``result.json`` holds.
    """
    fitting, processes = config.fitting, processes or Processes()

    # 1. The data: listed, checked and noted. A run goes on with the same data only.
    torch.manual_seed(fitting.seed)
    skipped = folder.path / "skipped.jsonl"
    data = config.data(say, progress, skipped)
    hashes = dict(data.record["hash"])
    for part, store in method.stores.items() if isinstance(method, ReducedMpl) else ():
        # The description has the hashes of the labels.
        hashes[f"labels of {part}"] = sha256_of(Path(store) / DESCRIPTION)
    selection: Path | None = getattr(method, "stored_selection", None)
    if selection is not None:
        hashes["selection"] = sha256_of(selection / DESCRIPTION)
    record = json.loads(json.dumps({**data.record, "hash": hashes}))
    noted = folder.path / "data.json"
    if noted.exists() and folder.read_json("data.json") != record:
        since = f"since the run in {folder.path} was started (see its data.json)"
        raise MetaplError(
            f"the data have changed {since}; put them back, or start another run with another "
            "--out."
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_json("data.json", record)
    record_files(skipped, data.skipped)
    validated: Any = getattr(
        data.validation, "labels", data.validation[1] if isinstance(data.validation, tuple) else ()
    )
    select = len(validated) >= SELECTED_ON

    # 2. Both networks from the seed, the teacher first.
    place = device(fitting.device)
    teacher, student = (config.network().to(place) for _ in range(2))
    control = Control.of(teacher, data)
    judged_on = data.test or data.validation
    baseline = dict[str, Any]()
    if judged_on is not None:
        accuracy = control.accuracy(judged_on)
        baseline = {
            "control_accuracy": accuracy,
            "control_of": control.sees,
            "control_on": config.known,
        }
    if isinstance(teacher, Tuned):
        control.start(teacher)
    begin_as(teacher, student)
    if processes.mesh.size > 1:
        noisy = any(map(model_noise, (teacher, student)))
        teacher, student = (shard(network, processes.mesh) for network in (teacher, student))
        if noisy:
            processes.seed(student, fitting.seed)

    # 3. The method.
    options = {
        "validation": data.validation,
        "out": folder,
        "resume": resume,
        "progress": progress,
        "say": say,
    }
    options |= {"steps": fitting.steps, **fitting.options(), "select": select}

    def phase(
        trainer: Trainer,
        labeled: Any,
        unlabeled: Any,
        *,
        phase: str = "fit",
        truth: Any = data.truth,
        callbacks: Sequence[Callback] = (),
        **own: Any,
    ) -> FitResult:
        shares = map(processes.share, (labeled, unlabeled))
        looking: list[Callback] = [*callbacks]
        if truth is not None:
            looking.insert(0, Truth(truth))
        fit_options = options | own
        if say_progress is not None:
            lines = FitLines(say_progress, steps=fit_options["steps"], phase=phase, resume=resume)
            looking.append(lines)
        if log is not None:
            looking.append(log.of_phase(phase))
        try:
            result = trainer.fit(*shares, phase=phase, callbacks=looking, **fit_options)
        except (RuntimeError, ConnectionError, EOFError) as error:
            reason = str(error).partition(". ")[0].strip(" .")
            lost = isinstance(error, ConnectionError | EOFError) and fitting.num_workers
            if not (lost or reason.startswith("DataLoader worker")):
                raise
            raise MetaplError(
                f"a process that prepares batches died ({reason}): was there too little memory?"
            ) from error
        if log is not None:
            log.end_phase(fit_options["steps"])
        return result

    def lay_out(network: nn.Module) -> nn.Module:
        if processes.mesh.size == 1:
            return network
        network = shard(network, processes.mesh)
        processes.seed(student, fitting.seed)
        return network

    def label(network: nn.Module | None) -> dict[str, Tensor]:
        """Return stored labels; of several processes the first one labels for all."""
        # ReducedMpl, or a method of a user's own with its fields.
        reader: Any = method
        if processes.mesh.size == 1 or network is None:
            return stored_labels(network, config, reader, folder.path, data, say)
        # All processes gather the weights, which no pass of one process alone could do.
        weights = weights_of(inside(network))

        def stored_by_first() -> dict[str, Tensor]:
            labeler = config.network().to(place)
            labeler.load_state_dict(weights)
            return stored_labels(labeler, config, reader, folder.path, data, say)

        labels: dict[str, Tensor] = done_by_first(stored_by_first, processes, patience=LABELING)
        return labels

    training = Training(
        config=config,
        data=data,
        teacher=teacher,
        student=student,
        fit=phase,
        label=label,
        lay_out=lay_out,
        folder=folder.path,
        progress=progress,
        say=say,
    )
    trained = method.train(training)

    # 4. What is kept: the student as it is, its teacher, and the student finetuned; each is tested
    # once.
    result, kept = trained.result, dict[str, Measured]()
    kept["student"] = measured(
        data, trained.trainer.student, result.validation_accuracy, result.weights
    )
    if trained.teacher is not None:
        network, weights = trained.teacher
        reached = None if data.validation is None else evaluated(network, data.validation).accuracy
        kept["teacher"] = measured(data, network, reached, weights)
    elif select and trained.fallback is not None:
        network, weights = trained.fallback
        reached = evaluated(network, data.validation).accuracy
        if reached - (result.validation_accuracy or 0.0) >= FAR_BEHIND:
            kept["teacher"] = measured(data, network, reached, weights)
    if callable(trained.finetunes):
        kept["finetuned"] = trained.finetunes()
    elif trained.finetunes:
        network = trained.trainer.as_given
        # Whatever was drawn before, so that finetuning can be repeated on its own.
        processes.seed(network, fitting.seed)
        if fitting.finetune_steps:
            trainer = LossTrainer(network, optimizer=config.finetuner(network), **training.options)
            result = phase(
                trainer, data.finetuning, None, phase="finetune", truth=None, **config.finetuning()
            )
            if select and (result.validation_accuracy or 0) < (
                trained.result.validation_accuracy or 0
            ):
                load_whole(inside(network), trained.result.weights)
                result = trained.result
        kept["finetuned"] = measured(
            data, inside(network), result.validation_accuracy, result.weights
        )

    # 5. Labels that may be wrong, the networks, what they are and reach, and the page of the run.
    if data.doubtful is not None:
        text = write_suspects(folder.path, data.doubtful, trained.trainer, data.classes)
        say(
            f"labels that may be wrong: {folder.path / SUSPECTS}, the most suspicious first; {text}"
        )
    # One network that was trained alone is no student of a teacher.
    is_alone = trained.trainer.teacher is None and trained.rounds is None
    words = {"student": "network" if is_alone else "student", "teacher": "teacher"}
    words = {name: words.get(name, f"finetuned {words['student']}") for name in kept}
    chosen = delivered(kept, select, trained.rounds is not None)
    cards = {name: trained.configs.get(name, config).card(words[name]) for name in kept}
    called = f"{config.name}, {method.name}, seed {fitting.seed}"
    tested = kept[chosen].tested
    counts = None
    if len(validated):
        counts = torch.bincount(validated, minlength=len(data.classes)).tolist()
    content: dict[str, Any] = {
        "recipe": config.name,
        "method": method.name,
        "title": method.title,
        "networks": words,
        "seed": fitting.seed,
        "steps": fitting.steps,
        "best_step": trained.result.step,
        "validation_size": len(validated),
        "validation_chance": None if counts is None else chance_level(counts),
        "delivered": chosen,
        "delivered_by": "validation" if select else "rule",
        "sha256": seal(
            folder,
            called,
            data.classes,
            cards,
            {name: merged(measurement.weights) for name, measurement in kept.items()},
        ),
        **({} if trained.rounds is None else {"rounds": trained.rounds}),
        **baseline,
        **kept[chosen].accuracies(),
        **({} if tested is None else {"evaluation": tested.evaluation.to_json()}),
    }
    for name, measurement in kept.items():
        content |= measurement.accuracies(f"{name}_")
    # What the other processes leave is not kept.
    if processes.first:
        run = EndedRun(folder, called, data.classes, cards, describe(config, method), content)
        write_report(run, tested)
    if log is not None:
        log.end(content)
    # This file is the last: a run that has it has all.
    folder.write_json("result.json", content)
    if unread := replaced_files(skipped):
        say(f"files that could not be read: {len(unread):,}, listed in {skipped}")
    return content


class Truth:
    """Measures at each validation how many of the teacher's labels are right.

    ``truth`` is (inputs, labels) of unlabeled examples.
    """

    def __init__(self, truth: Any) -> None:
        self.truth = truth

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> dict[str, float]:
        validated = any("_validation_" in name for name in row)
        if not validated or trainer.teacher is None or not trainer.teacher_classifies:
            return {}
        found = evaluate_logits(
            *predict_logits(trainer.teacher, batches_of(self.truth, trainer.device, "truth"))
        )
        confusion = torch.tensor(found.confusion)
        off = (confusion.sum(0) - confusion.sum(1)).abs().sum()
        return {
            "pseudo_label_accuracy": found.accuracy,
            "class_shares_vs_truth": float(off) / (2 * found.n),
        }


def delivered(kept: Mapping[str, Measured], select: bool, rounds: bool) -> str:
    """Return the network that a run delivers: the best by validation, the first of equals.

    Where validation cannot tell networks apart, it is the finetuned student, which did better on
    the seen half of benchmarks/pictures. Of Noisy Student it is the last student, of equals the
    finetuned one; its teacher only where that is 30 points better.
    """

    def reached(name: str) -> float:
        return kept[name].validation_accuracy or 0.0

    names = [name for name in reversed([*kept]) if name != "teacher"] if rounds else [*kept]
    if select:
        chosen, best = max(names, key=reached), max(kept, key=reached)
        return best if reached(best) - reached(chosen) >= FAR_BEHIND else chosen
    return "finetuned" if "finetuned" in kept else "student"


def measured(
    data: Data, network: nn.Module, validated: float | None, weights: Mapping[str, Tensor]
) -> Measured:
    """Return a network with these weights and this validation accuracy, tested once."""
    tested = (
        None if data.test is None else mistakes(network, data.test, data.classes, data.test_names)
    )
    return Measured(dict(weights), validated, tested)


def evaluated(network: nn.Module, data: Any) -> Evaluation:
    device = next(network.parameters()).device
    return evaluate_logits(*predict_logits(network, batches_of(data, device)))


def inside(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network


def device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise MetaplError(
            "--device cuda was asked for, and PyTorch sees no GPU; use --device auto or cpu."
        )
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def check_shares(config: Any, method: Method, mesh: Mesh) -> None:
    """Refuse batches that do not fall into equal parts for the processes.

    And in each process for --accumulate.
    """
    parts = mesh.shares * config.fitting.accumulate
    for name, size in flag_values(config).items():
        if name.endswith("_batch") and size % parts:
            raise MetaplError(
                f"--{name.replace('_', '-')} {size:,}: expected a multiple of {parts:,}, for "
                f"{mesh.shares:,} processes and --accumulate {config.fitting.accumulate:,}."
            )
    if (
        mesh.shard > 1
        and config.places
        and config.pictures.backbone != "none"
        and config.pictures.tuning != "all"
    ):
        raise MetaplError(
            "--mesh.shard cuts what is trained; of a --backbone expected --tuning all, or copies."
        )
