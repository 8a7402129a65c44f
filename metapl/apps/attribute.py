"""``metapl attribute RUN --out DIR``: which labeled pictures help a network, and which harm it."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metapl.apps import web
from metapl.apps.inputs import ROOM, Folder, Run, check_out, files_of, held, plural
from metapl.apps.printing import short, table, tell, wrapped, written_csv
from metapl.apps.progress import count_bar
from metapl.apps.settings import Batch, Steps, unset
from metapl.errors import MetaplError, few
from metapl.metrics import predict_logits
from metapl.pictures.batches import FileImages, in_unit_range
from metapl.pictures.folders import (
    LabeledFiles,
    scan_labeled,
    verify_files,
    without_copies,
)
from metapl.run_folder import EndedRun
from metapl.runs.fields import Range
from metapl.runs.files import write_whole
from metapl.training.attribution import Attribution, attribute

TABLE = "attribution.csv"
PAGE = "attribution.html"

# Where --steps is not given: passes over the pictures, and the fewest steps.
PASSES = 10
FEWEST_STEPS = 100

MOMENTUM = 0.9

# Pictures in a pass of the trained network.
AT_ONCE = 256

# The share of the pictures in each removal of the check, and the number of removals below which
# these say too little.
REMOVED = 0.05
FEWEST_REMOVALS = 8

ADVICE = "Look at these first; a low score is not yet a wrong label."

# Pictures in a gallery, and on a terminal.
SHOWN = 24
LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Say which labeled pictures of a run help its network, and which harm it.

    A network like that of the run is trained anew on the labeled pictures as they are, by SGD with
    momentum at a rate that falls to zero. A picture's score is minus the derivative, through all of
    this training, of the loss on the validation pictures in the weight of the picture. For a run
    of train noisy without --val, the pictures of --clean are taken. A higher weight of a picture
    with a positive score would lower the loss, and one with a negative score would raise it.

    A score is a prediction, and it is checked: the network is trained several times without 5 % of
    the pictures, drawn at random, and its losses are compared with the predicted ones. A
    correlation near 1 says that the scores can be believed, one near 0 that they cannot.

    The folder of --out gets attribution.csv, with all pictures and the most harmful first, and
    attribution.html, a page of the most harmful and the most helpful ones.

    Args:
        folder: folder of a finished run of train images, train noisy or noisy-student images.
        val: folder of other pictures whose labels are right, with a folder for each class in it.
        out: folder to write to. It is made if it does not exist.
        removals: number of trainings without some of the pictures, by which the scores are checked.
            0 leaves the check out.
        steps: number of training steps. By default they are 10 passes over the pictures, and 100 at
            least.
        batch: number of pictures in each step.
        lr: learning rate at the start.
        seed: seed of the first weights, of the order of the pictures and of the check. By default
            it is that of the run.
    """

    folder: Run
    val: Folder = None
    out: Annotated[Path, unset("DIR")]
    removals: Annotated[int, Range(0, most=1000)] = 10
    steps: Annotated[Steps | None, unset()] = None
    batch: Batch = 64
    lr: Annotated[float, Range(above=0)] = 0.03
    seed: Annotated[Annotated[int, Range(0, most=2**32 - 1)] | None, unset()] = None

    def run(self) -> int:
        """Score the pictures, check the scores, and write the list and the page."""
        if 0 < self.removals < FEWEST_REMOVALS:
            raise MetaplError(
                f"--removals {self.removals}: expected {FEWEST_REMOVALS} or more, or 0 for no "
                "check."
            )
        run = EndedRun.load(self.folder)
        fields = run.description["fields"]
        if not fields.get("labeled"):
            raise MetaplError(
                f"{self.folder} is a run of {run.result['recipe']}; expected one of pictures in "
                "folders."
            )
        check_out(self.out, fields, {"val": self.val})
        seed = fields["seed"] if self.seed is None else self.seed
        with held(self.out):
            scored = self.score(run, seed)
            if self.removals:
                text = self.publish(scored, "The scores are not checked yet.")
            else:
                text = self.publish(scored, "The scores were not checked: --removals was 0.")
            self.write_table(scored)
            if self.removals:
                tell(f"metapl: {self.out / TABLE} has all of them; now the check", file=sys.stderr)
                text = self.publish(scored, self.check(scored, seed))
        rows = [("most harmful", "label", "score")]
        for number in scored.ranked[:LISTED]:
            row = (
                short(scored.files[number], 48),
                short(scored.labels[number], 16),
                f"{scored.scores[number]:+.2g}",
            )
            rows.append(row)
        sentences = wrapped("\n".join(text))
        tell(
            f"{sentences}\n\n{table(rows, left=2)}\n\n{self.out / TABLE} has all of them, "
            f"{self.out / PAGE} shows them"
        )
        return 0

    def score(self, run: EndedRun, seed: int) -> Scored:
        """Train anew, and score the labeled pictures of a run."""
        fields = run.description["fields"]
        train, outer = self.pictures(run)
        batch = min(self.batch, len(train))
        steps = self.steps or max(FEWEST_STEPS, -(-PASSES * len(train) // batch))
        if steps * batch < len(train):
            # Some pictures would be left out, and have no score.
            least = -(-len(train) // batch)
            raise MetaplError(
                f"--steps {steps}: expected {least:,} or more for {len(train):,} pictures."
            )
        torch.set_num_threads(run.folder.threads())
        torch.manual_seed(seed)
        network = run.cards["student"].create(weights=fields.get("weights")).to(run.device)
        # The rate falls to 0 in a line.
        shares = 1 - torch.arange(steps, dtype=torch.float64) / steps
        rates = self.lr * shares[:, None]
        attribution = attribute(
            network,
            train,
            outer,
            optimizer=torch.optim.SGD(network.parameters(), lr=self.lr, momentum=MOMENTUM),
            steps=steps,
            batch_size=batch,
            settings={"lr": rates},
            generator=torch.Generator().manual_seed(seed),
        )
        classes = run.classes
        loss = float(attribution.outer_loss)
        loss_of_guesses = math.log(len(classes))
        is_right = logits(network, attribution, outer).argmax(1) == outer.labels
        accuracy = float(is_right.float().mean())
        if not loss < loss_of_guesses and accuracy <= 1 / len(classes):
            raise MetaplError(
                f"after {steps:,} steps the loss on the pictures that judge is {loss:.3f}, "
                f"and the accuracy {accuracy:.1%}: nothing was learned that holds for them, and "
                f"no score would count; try --lr {self.lr / 3:.1g}, other --steps, or more "
                "labeled pictures."
            )
        outputs = logits(network, attribution, train)
        losses = F.cross_entropy(outputs, train.labels, reduction="none").tolist()
        scores = attribution.scores.tolist()
        figures: dict[str, Any] = {
            "run": str(self.folder),
            "pictures": len(train),
            "judged_on": len(outer),
            "not_judged_on": [
                name for number, name in enumerate(classes) if number not in outer.labels
            ],
            "steps": steps,
            "batch": batch,
            "lr": self.lr,
            "momentum": MOMENTUM,
            "seed": seed,
            "device": str(run.device),
            "replay_error": attribution.replay_error,
        }
        for kind, precision in attribution.float32_products.items():
            figures[f"float32 {kind}"] = precision
        figures |= {
            "loss": loss,
            "loss_of_the_run": loss_of_run(run, outer),
            "loss_of_guesses": loss_of_guesses,
            "harmful": sum(score < 0 for score in scores),
            "spearman": None,
            "interval": None,
            "removals": self.removals,
            "removed": max(1, round(REMOVED * len(train))),
        }
        return Scored(
            attribution=attribution,
            pictures=train,
            files=[str(train.images.path(number)) for number in range(len(train))],
            labels=[classes[label] for label in train.labels.tolist()],
            scores=scores,
            losses=losses,
            figures=figures,
        )

    def pictures(self, run: EndedRun) -> tuple[Pictures, Pictures]:
        """Return the labeled pictures of a run, and those to judge by, without unreadable ones."""
        labeled = files_of(run, "labeled")
        judges = files_of(run, "validation") or files_of(run, "clean")
        assert labeled is not None, "a run has been trained on them"
        if self.val:
            judges = self.judges_of_val(labeled)
        if not judges:
            raise MetaplError(
                f"{self.folder} has no validation pictures to judge by; expected --val DIR."
            )
        return readable(run, labeled, "labeled"), readable(run, judges, "validation")

    def judges_of_val(self, labeled: LabeledFiles) -> LabeledFiles:
        """Return the pictures of --val that the run has not learned from, and say which are left.

        A picture that judges itself is helpful whatever it shows.
        """
        assert self.val is not None
        files = scan_labeled(self.val)
        judges = without_copies(files, labeled)
        copies = len(files) - len(judges)
        if not judges:
            raise MetaplError(
                f"--val {self.val} has none but labeled pictures of the run, which would judge "
                "themselves; expected others."
            )
        if copies:
            tell(
                f"metapl: left out {copies:,} of the {len(files):,} pictures of --val, which are "
                "labeled pictures of the run and would judge themselves",
                file=sys.stderr,
            )
        return judges

    def check(self, scored: Scored, seed: int) -> str:
        """Train without some pictures, again and again; return how well the scores predict it."""
        removed = scored.figures["removed"]
        generator = torch.Generator().manual_seed(seed)
        removals = []
        for _ in range(self.removals):
            order = torch.randperm(len(scored.pictures), generator=generator)
            removals.append(order[:removed])
        rho = scored.attribution.validate(removals).spearman
        low, high = interval(rho, self.removals)
        scored.figures.update(spearman=rho, interval=(low, high))
        return (
            f"The check: {self.removals} trainings, each without "
            f"{plural(removed, 'random picture')}, and what the scores predict of them, have a "
            f"Spearman correlation of {rho:.2f} (95 % {low:.2f} to {high:.2f}). Near 1 the scores "
            "can be believed; near 0 or below they cannot, and a lower rate, such as --lr "
            f"{self.lr / 3:.1g}, may help."
        )

    def publish(self, scored: Scored, check: str) -> list[str]:
        """Write the page of the first and the last pictures of the list; return what it says."""
        figures = scored.figures
        missing = ""
        if figures["not_judged_on"]:
            missing = f", none of them of {few(figures['not_judged_on'])},"
        loss_of_own = figures["loss_of_the_run"]
        ending = "."
        if loss_of_own is not None:
            ending = f"; the student of the run has {loss_of_own:.3f} there."
        summary = (
            f"{figures['harmful']:,} of {len(scored.pictures):,} labeled pictures have a score "
            f"below 0: more of one would raise the loss on {figures['judged_on']:,} others"
            f"{missing}, which is {figures['loss']:.3f}, and of even guesses "
            f"{figures['loss_of_guesses']:.3f}. That is of a network that was trained anew for the "
            f"scores, by plain SGD for {figures['steps']:,} steps on the pictures as they are"
            f"{ending}"
        )
        beneath = "beneath each its label, score and file"
        harmful = [number for number in scored.ranked if scored.scores[number] < 0]
        helpful = [number for number in reversed(scored.ranked) if scored.scores[number] > 0]
        settings = [(name, json.dumps(value)) for name, value in figures.items()]
        parts = [
            web.paragraph(summary),
            web.paragraph(check),
            scored.gallery(
                "Most harmful",
                f"more of these would raise the loss; {beneath}. {ADVICE}",
                harmful,
            ),
            scored.gallery(
                "Most helpful", f"more of these would lower the loss; {beneath}", helpful
            ),
            web.folded("How they were found", web.rows(settings)),
        ]
        content = web.web_page("Which pictures help, and which harm", self.folder, parts)
        write_whole(self.out / PAGE, content, ROOM)
        return [summary, check]

    def write_table(self, scored: Scored) -> None:
        """Write the list of all pictures, the most harmful first."""
        with written_csv(self.out / TABLE) as csv:
            csv.writerow(["rank", "file", "label", "score", "effect", "loss"])
            for rank, number in enumerate(scored.ranked, 1):
                score = scored.scores[number]
                csv.writerow(
                    [
                        str(rank),
                        scored.files[number],
                        scored.labels[number],
                        f"{score:.6g}",
                        "harms" if score < 0 else "helps",
                        f"{scored.losses[number]:.6g}",
                    ]
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Labeled pictures and their scores.

    Args:
        attribution: what the library found.
        pictures: by their numbers.
        files, labels, scores, losses: of each picture.
        figures: how the scores were found, for the page.
    """

    attribution: Attribution
    pictures: Pictures
    files: list[str]
    labels: list[str]
    scores: list[float]
    losses: list[float]
    figures: dict[str, Any]

    @property
    def ranked(self) -> list[int]:
        """Return the numbers of the pictures, the most harmful first."""
        return sorted(range(len(self.scores)), key=self.scores.__getitem__)

    def gallery(self, title: str, note: str, numbers: Sequence[int]) -> str:
        """Return a part of the page with the first of these pictures."""
        pictures = []
        for number in numbers[:SHOWN]:
            name = Path(self.files[number]).name
            caption = f"{self.labels[number]}: {self.scores[number]:+.2g}\n{name}"
            picture, _ = self.pictures[number]
            pictures.append(web.Picture(picture, caption))
        return web.pictures(title, note, pictures)


class Pictures:
    """Pictures in files and their labels by number, as a run's network takes them, not changed."""

    def __init__(self, run: EndedRun, files: LabeledFiles) -> None:
        network_input = run.cards["student"].input
        size: Any = network_input.shape[1:]
        images = FileImages(
            [*files.paths()],
            size=size,
            colors="L" if network_input.channels == 1 else "RGB",
            center=network_input.center,
        )
        self.images = images.cached()
        self.labels = files.targets(run.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            # The warning says that it is left out, which it is not.
            warnings.simplefilter("ignore", UserWarning)
            picture, used = self.images.fetch_sound(torch.tensor([number]))
        if not len(used):
            raise MetaplError(
                f"{self.images.path(number)} cannot be read any more; put it back, or remove it."
            )
        return in_unit_range(picture)[0], self.labels[number]


def readable(run: EndedRun, files: LabeledFiles, part: str) -> Pictures:
    """Return the pictures of a part of the data that can be read."""
    with count_bar(f"looking at {part} files", is_shown=True, total=len(files)) as update:
        sound = verify_files(files, progress=update).sound
    return Pictures(run, files.keep(sound))


def logits(network: nn.Module, attribution: Attribution, pictures: Pictures) -> Tensor:
    """Return the logits of the trained network, float32 (N, K).

    Batches are mixed, for a batch norm takes their statistics.
    """
    order = torch.randperm(len(pictures))
    device = attribution.scores.device
    outputs = []
    with torch.no_grad():
        for numbers in order.chunk(-(-len(pictures) // AT_ONCE)):
            x = torch.stack([pictures[number][0] for number in numbers.tolist()]).to(device)
            outputs.append(functional_call(network, attribution.student_params, (x,)).cpu())
    return torch.cat(outputs)[order.argsort()]


def loss_of_run(run: EndedRun, pictures: Pictures) -> float | None:
    """Return the loss of the run's own student on pictures; None where its weights are gone."""
    if "student" not in run.networks:
        return None
    batches = [
        (torch.stack([pictures[number][0] for number in some.tolist()]), pictures.labels[some])
        for some in torch.arange(len(pictures)).split(AT_ONCE)
    ]
    # A network is built with fresh weights first, which are drawn.
    with torch.random.fork_rng(devices=[]):
        network = run.network("student").to(run.device)
    outputs, labels = predict_logits(network, batches)
    return float(F.cross_entropy(outputs, labels))


def interval(rho: float, n: int) -> tuple[float, float]:
    """Return a 95 % interval of Spearman's correlation of n pairs.

    It is Fisher's z with the variance of Bonett and Wright.

    >>> [round(end, 2) for end in interval(0.8, 10)]
    [0.24, 0.96]
    """
    z = math.atanh(max(min(rho, 0.999), -0.999))
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(z - half), math.tanh(z + half)
