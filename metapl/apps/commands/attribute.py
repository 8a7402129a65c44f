"""``metapl attribute RUN_OR_RECIPE --out DIR``: which labeled pictures help what a network does, and which harm it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metapl.apps.commands.inputs import check_out, held, written
from metapl.apps.commands.parse import Command, Folder, OnRecipe, Run, Switch, unset
from metapl.apps.experiments.folder import begun, flat, stored
from metapl.apps.experiments.settle import settled
from metapl.apps.machine.cores import default_threads
from metapl.apps.machine.progress import duration
from metapl.apps.pictures.batches import in_unit_range
from metapl.apps.pictures.csv_files import written_csv
from metapl.apps.pictures.store import FileImages
from metapl.apps.recipes import ImageFolders, NoisyFolders
from metapl.apps.recipes.image_folders import SELECTED
from metapl.apps.recipes.image_recipe import EVALUATED_AT_ONCE, whole
from metapl.apps.recipes.settings import Batch, Steps
from metapl.apps.reports import web
from metapl.apps.words import short, table, tell, wrapped
from metapl.errors import MetaplError, few
from metapl.execution.rng import RandomState
from metapl.problems import EqualWeights
from metapl.runs.fields import Range
from metapl.training.attribution import Attribution, attribute

TABLE, PAGE = "attribution.csv", "attribution.html"
PASSES, FEWEST_STEPS = 10, 100  # over the pictures, where --steps is not given
MOMENTUM = 0.9
REMOVED, FEWEST_REMOVALS = 0.05, 8  # share of the pictures in each removal of the check; fewer say too little
DO = "Look at these first; a low score is not yet a wrong label."
SHOWN, LISTED = 24, 5  # pictures in a gallery, and on a terminal


# Fields of recipes by which pictures and the network are found; the others are of trainings that are not taken here.
OF_PICTURES = {
    *("labeled", "unlabeled", "clean", "val", "val_fraction", "image_size", "grey", "mean", "std"),
    *("network_name", "weights", "dropout", "stochastic_depth", "channels_last", "device", "seed"),
}


class Subject(NamedTuple):
    """What is attributed."""

    about: dict[str, str]  # what it is called
    recipe: ImageFolders
    seed: int  # of the initial weights, the order of the pictures and the removals
    threads: int


@dataclass(frozen=True, kw_only=True)
class Attributing(Command):
    """The options of every attribution.

    Args:
        out: the folder to write to; made if need be.
        each_class: score the loss on each class by itself too, and name the class that a picture helps or harms most;
            this takes as long again for every class.
        removals: how many trainings without pictures the check takes; 0 does without it.
        steps: number of steps; by default 10 passes over the pictures, and 100 at least.
        batch: pictures in a step; at most all of them.
        lr: learning rate at the start.
        json: print JSON.
    """

    out: Annotated[Path, unset("DIR")]
    each_class: Switch = False
    removals: Annotated[int, Range(0, most=1000)] = 10
    steps: Annotated[Steps | None, unset()] = None
    batch: Batch = 64
    lr: Annotated[float, Range(above=0)] = 0.03
    json: Switch = False

    @abstractmethod
    def subject(self) -> Subject:
        """The pictures and the network."""

    def check(self) -> None:
        if 0 < self.removals < FEWEST_REMOVALS:
            raise MetaplError(
                f"--removals {self.removals} are too few for a correlation; expected {FEWEST_REMOVALS} or more, or 0 "
                "for no check."
            )

    def run(self) -> int:
        subject = self.subject()
        recipe = subject.recipe
        if self.out is not None:
            check_out(self.out, recipe)
        with held(self.out, TABLE, PAGE):
            torch.set_num_threads(subject.threads)
            device = recipe.torch_device()
            task = recipe.task(lambda text: tell(f"metapl: {text}", file=sys.stderr, wrap=True), progress=True)
            doubtful, judges = task.doubtful, task.validation
            if judges is None and doubtful is not None:
                judges = task.labeled
            if judges is None:
                raise MetaplError(
                    f"{' '.join(subject.about.values())} has no validation pictures to judge by; expected --val DIR, a "
                    "folder of pictures whose labels are right, with one folder a class."
                )
            given = task.labeled if doubtful is None else doubtful.examples
            train = Pictures(given.images, given.labels if doubtful is None else doubtful.given)
            found, rows, scores = self._found(subject, train, Pictures(judges.images, judges.labels), device)
            with written(self.out, PAGE, page(found, rows, train).decode()), written_csv(self.out / TABLE) as csv:
                csv.writerow(
                    ["rank", "file", "label", "score", "effect", "loss", *["most", "score_most"] * self.each_class]
                )
                for rank, row in enumerate(rows, 1):
                    of_class = [row.most, f"{row.score_most:.6g}"] * self.each_class
                    effect = "harms" if row.score < 0 else "helps"
                    score, loss = f"{row.score:.6g}", f"{row.loss:.6g}"
                    csv.writerow([str(rank), row.file, row.label, score, effect, loss, *of_class])
            if self.removals:
                tell(f"metapl: {self.out / TABLE} has all of them; now the check", file=sys.stderr, wrap=True)
                found |= self._check(scores, subject.seed, found)
                with written(self.out, PAGE, page(found, rows, train).decode()):
                    pass
        tell(json.dumps(found, indent=1) if self.json else said(found, rows, self.out))
        return 0

    def _found(
        self, subject: Subject, train: Pictures, outer: Pictures, device: torch.device
    ) -> tuple[dict[str, Any], list[Scored], Attribution]:
        """What was done and what came of it, by name; the pictures, the most harmful first; and what scored them."""
        _, recipe, seed, _ = subject
        batch = min(self.batch, len(train))
        steps = self.steps or max(FEWEST_STEPS, -(-PASSES * len(train) // batch))
        if steps * batch < len(train):
            raise MetaplError(
                f"--steps {steps} of {batch} pictures leave some of the {len(train):,} out, which would have no score; "
                f"expected {-(-len(train) // batch):,} steps or more."
            )
        torch.manual_seed(seed)
        network = recipe.network(recipe.method.built_as).to(device)
        start = RandomState.now(device)

        def scored(problem: EqualWeights) -> Attribution:
            start.restore()  # the same training for every class
            return attribute(
                network,
                train,
                outer,
                optimizer=torch.optim.SGD(network.parameters(), lr=self.lr, momentum=MOMENTUM),
                steps=steps,
                batch_size=batch,
                schedule=lambda step: 1 - step / steps,
                generator=torch.Generator().manual_seed(seed),
                problem=problem,
            )

        began = time.perf_counter()
        all_of_it = scored(EqualWeights())
        judged, guesses = float(all_of_it.outer_loss), math.log(len(recipe.classes))
        if not judged < guesses and (right := accuracy(network, all_of_it, outer)) <= 1 / len(recipe.classes):
            raise MetaplError(
                f"after {steps:,} steps of {batch} at --lr {self.lr:g} the loss of {recipe.network_name} on the "
                f"{len(outer):,} pictures that judge is {judged:.3f}, that of even guesses {guesses:.3f}, and its "
                f"accuracy {right:.1%}: it has learned nothing that holds for them, and no score would count. Nothing "
                f"was written; try --lr {self.lr / 3:.1g}, fewer or more --steps, or more labeled pictures than these "
                f"{len(train):,}."
            )
        known = outer.labels.unique().tolist() if self.each_class else []
        of_classes = [scored(OfClass(label)).scores.tolist() for label in known]
        rows, seconds = [], time.perf_counter() - began
        each_loss = F.cross_entropy(logits(network, all_of_it, train), train.labels, reduction="none")
        columns = (t.tolist() for t in (train.labels, all_of_it.scores, each_loss))
        for number, (label, score, loss) in enumerate(zip(*columns, strict=True)):
            each = [(scores[number], recipe.classes[c]) for c, scores in zip(known, of_classes, strict=True)]
            most = max(each, key=lambda of: abs(of[0]), default=(0.0, ""))
            file, given = str(train.images.path(number)), recipe.classes[label]
            rows.append(Scored(number, file, given, score, loss, most[1], most[0]))
        found = {
            **subject.about,
            "network": recipe.network_name,
            "image_size": recipe.image_size,
            "pictures": len(train),
            "judged_on": len(outer),
            "not_judged_on": [name for c, name in enumerate(recipe.classes) if c not in outer.labels],
            "steps": steps,
            "batch": batch,
            "lr": self.lr,
            "momentum": MOMENTUM,
            "seed": seed,
            "device": str(device),
            "loss": judged,
            "loss_of_guesses": guesses,
            "harmful": sum(row.score < 0 for row in rows),
            "spearman": None,
            "interval": None,
            "removals": self.removals,
            "removed": max(1, round(REMOVED * len(train))),
            "kept": all_of_it.kept,
            "seconds": {"scores": seconds, "check": 0.0},
        }
        return found, sorted(rows, key=lambda row: row.score), all_of_it

    def _check(self, scores: Attribution, seed: int, found: dict[str, Any]) -> dict[str, Any]:
        """What the trainings without pictures say of the scores, in the place of what was found without them."""
        began, draw = time.perf_counter(), torch.Generator().manual_seed(seed)
        drawn = (torch.randperm(found["pictures"], generator=draw) for _ in range(self.removals))
        rho = scores.validate([order[: found["removed"]] for order in drawn]).spearman
        seconds = {**found["seconds"], "check": time.perf_counter() - began}
        return {"spearman": rho, "interval": interval(rho, self.removals), "seconds": seconds}


@dataclass(frozen=True, kw_only=True)
class Attribute(Attributing):
    """Say which labeled pictures help a network, and which harm it.

    RUN is the folder of a run. Without one, name a recipe, images or noisy, and its pictures, as for metapl train:
    metapl attribute noisy --labeled DIR --clean DIR --out DIR. Its flags: metapl attribute noisy --help. (A run in a
    folder of that name is ./noisy.)

    The network is trained from its start on the labeled pictures, of noisy on those of --labeled: by SGD with momentum
    at a rate that falls to zero, in float32, on the pictures as they are. No view is drawn and no unlabeled picture is
    used, unlike in a run of metapl train. A picture's score is minus the derivative, through all of this training, of
    the loss on pictures whose labels are right, in the weight of the picture: more of one with a positive score would
    lower the loss, more of one with a negative score raise it.

    The pictures with right labels are the validation pictures; of noisy without --val, those of --clean.

    A score is a prediction. The check trains without 5 % of the pictures, drawn at random, again and again, and
    compares: a correlation near 1 says that the scores can be believed, one near 0 that they cannot.

    DIR gets attribution.csv, with all pictures and the most harmful first, and attribution.html, a page of the most
    harmful and the most helpful ones. Files of these names that are there already are replaced.

    Args:
        folder: the folder of a run of train images, train noisy or noisy-student images, finished or not.
        val: other pictures whose labels are right, in a folder like --labeled.
        seed: of the initial weights, the order of the pictures and the removals; by default the run's.
        device: by default the run's.
    """

    folder: Run
    val: Folder = None
    seed: Annotated[Annotated[int, Range(0, most=2**32 - 1)] | None, unset()] = None
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, unset()] = None

    def subject(self) -> Subject:
        if not self.folder.exists():
            recipes = " or ".join(kind.name for kind in JUDGED)
            raise MetaplError(
                f"there is no folder {self.folder}; expected the folder of a run, or {recipes}, the recipes whose "
                f"pictures are in folders: metapl attribute {JUDGED[0].name} --help."
            )
        folder = begun(self.folder)
        recipe, _ = stored(folder)
        if not isinstance(recipe, ImageFolders):
            raise MetaplError(
                f"{self.folder} is a run of {recipe.name}; expected one of pictures in folders, by metapl train images "
                "or metapl train noisy."
            )
        changed: dict[str, Any] = {"val": whole(str(self.val))} if self.val else {}
        seed = recipe.seed if self.seed is None else self.seed
        recipe = dataclasses.replace(recipe, device=self.device or recipe.device, **changed)
        return Subject({"run": str(self.folder)}, recipe, seed, folder.threads())


@dataclass(frozen=True, kw_only=True)
class AttributeRecipe(Attributing, OnRecipe):
    """Say which labeled pictures of a recipe help its network, and which harm it. See metapl attribute --help."""

    @classmethod
    def given(cls, words: Sequence[str], program: str) -> tuple[type[Command], str]:
        settings = cls.kind.by_name(cls.kind.own)
        fields = {each.name for kind in (cls.kind, type(settings)) for each in dataclasses.fields(kind)}
        return cls.flags(settings, words, AttributeRecipe.__doc__ or "", fields - OF_PICTURES), program

    def subject(self) -> Subject:
        # One step: what a training takes is not measured.
        recipe = settled(dataclasses.replace(self.recipe, steps=1))
        return Subject({"recipe": recipe.name, "labeled": recipe.labeled}, recipe, recipe.seed, default_threads())


@dataclass(frozen=True, kw_only=True)
class JudgedFolders(ImageFolders):
    """Pictures in one folder a class, and others whose labels are right.

    Args:
        unlabeled: pictures that a run had beside these, by which its sizes and colors were chosen; by default none.
        val: pictures whose labels are right, by which the others are judged, in a folder like --labeled. By default
            a fifth of the labeled pictures is set aside if that makes 50 or more.
    """

    unlabeled: Annotated[str, unset("DIR")] = ""
    val: Annotated[str | None, unset("DIR"), SELECTED] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unlabeled", self.unlabeled or self.labeled)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class JudgedNoisyFolders(NoisyFolders):
    """Pictures some of which are in the folder of a wrong class, and others whose labels are right.

    Args:
        val: pictures whose labels are right, by which the others are judged, in a folder like --labeled. By default
            those of --clean.
    """

    val: Annotated[str | None, unset("DIR")] = None


JUDGED = (JudgedFolders, JudgedNoisyFolders)
OF_RECIPES = AttributeRecipe.on(*JUDGED)


class Scored(NamedTuple):
    """A picture, and what it does."""

    number: int  # among the labeled ones
    file: str
    label: str
    score: float
    loss: float  # of the trained network, on the picture itself
    most: str = ""  # the class whose loss it changes most, where that was asked for
    score_most: float = 0.0  # its score for that class alone


class Pictures:
    """Pictures and labels by number, always as they are."""

    def __init__(self, images: FileImages, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        picture, (used,) = self.images.fetch(torch.tensor([number]))
        if int(used) != number:  # another would have its score
            raise MetaplError(f"{self.images.path(number)} cannot be read any more; put it back, or remove it.")
        return in_unit_range(picture)[0], self.labels[number]


class OfClass(EqualWeights):
    """Judged by the examples of one class alone; a batch norm sees all."""

    def __init__(self, label: int) -> None:
        self.label = label

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        chosen = batch[1] == self.label
        return F.cross_entropy(outputs[chosen], batch[1][chosen])


def logits(network: nn.Module, found: Attribution, pictures: Pictures) -> Tensor:
    """Of the trained network, in mixed batches, whose statistics a batch norm takes."""
    mixed, outputs = torch.randperm(len(pictures)), list[Tensor]()
    with torch.no_grad():
        for some in mixed.chunk(-(-len(pictures) // EVALUATED_AT_ONCE)):
            x = torch.stack([pictures[number][0] for number in some.tolist()]).to(found.scores.device)
            outputs.append(functional_call(network, found.student_params, (x,)).cpu())
    return torch.cat(outputs)[mixed.argsort()]


def accuracy(network: nn.Module, found: Attribution, pictures: Pictures) -> float:
    return float((logits(network, found, pictures).argmax(1) == pictures.labels).float().mean())


def interval(rho: float, n: int) -> tuple[float, float]:
    """A 95 % interval of Spearman's correlation of n pairs, by Fisher's z with the variance of Bonett and Wright.

    >>> [round(end, 2) for end in interval(0.8, 10)]
    [0.24, 0.96]
    """
    z, half = math.atanh(max(min(rho, 0.999), -0.999)), 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(z - half), math.tanh(z + half)


def sentences(found: dict[str, Any]) -> list[str]:
    """What was found, for the terminal and for the page."""
    check = "The scores are not checked yet." if found["removals"] else "The scores were not checked: --removals was 0."
    if found["spearman"] is not None:
        low, high = found["interval"]
        check = (
            f"The check: {found['removals']} trainings without {found['removed']:,} random pictures each, and what the "
            f"scores predict of them, have a Spearman correlation of {found['spearman']:.2f} (95 % {low:.2f} to "
            f"{high:.2f}). Near 1 the scores can be believed; near 0 or below they cannot, and a lower "
            f"rate, such as --lr {found['lr'] / 3:.1g}, may help."
        )
    missing = f", none of them of {few(found['not_judged_on'])}," * bool(found["not_judged_on"])
    return [
        f"{found['harmful']:,} of {found['pictures']:,} labeled pictures have a score below 0: more of one would raise "
        f"the loss of {found['network']} on {found['judged_on']:,} others{missing} after {found['steps']:,} steps of "
        f"{found['batch']}, at a rate of {found['lr']:g} that falls to 0. The loss there is {found['loss']:.3f}, that "
        f"of even guesses {found['loss_of_guesses']:.3f}.",
        check,
    ]


def said(found: dict[str, Any], rows: list[Scored], out: Path) -> str:
    """The same for a terminal, with the first of the list."""
    cells = [(short(row.file, 48), short(row.label, 16), f"{row.score:+.2g}") for row in rows[:LISTED]]
    seconds = found["seconds"]
    check = f", {duration(seconds['check'])} for the check" * bool(found["removals"])
    spent = f"{duration(seconds['scores'])} for the scores{check}"
    parts = [wrapped("\n".join(sentences(found))), table([("most harmful", "label", "score"), *cells], left=2)]
    return "\n\n".join([*parts, wrapped(f"{out / TABLE} has all of them, {out / PAGE} shows them; {spent}")])


def page(found: dict[str, Any], rows: list[Scored], train: Pictures) -> bytes:
    """The first and the last of the list, and how they were found."""

    def hung(title: str, note: str, shown: list[Scored]) -> str:
        most = "\nmost: {}" * bool(rows[0].most)
        captions = [f"{row.label}: {row.score:+.2g}\n{Path(row.file).name}{most.format(row.most)}" for row in shown]
        pictures = [web.Picture(train[row.number][0], words) for row, words in zip(shown, captions, strict=True)]
        return web.pictures(title, note, pictures)

    harmful = [row for row in rows if row.score < 0][:SHOWN]
    helpful = [row for row in reversed(rows) if row.score > 0][:SHOWN]
    beneath = "beneath each its label, score and file" + ", and the class it changes most" * bool(rows[0].most)
    title = "Which pictures help, and which harm"
    parts = [
        f"<h1>{title}</h1>",
        web.paragraph(found.get("run") or found["labeled"], "quiet"),
        *map(web.paragraph, sentences(found)),
        hung("Most harmful", f"more of these would raise the loss; {beneath}. {DO}", harmful),
        hung("Most helpful", f"more of these would lower the loss; {beneath}", helpful),
        web.folded("How they were found", web.rows([(name, json.dumps(value)) for name, value in flat(found).items()])),
    ]
    return web.web_page(title, parts)
