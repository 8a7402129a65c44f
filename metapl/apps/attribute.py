"""``metapl attribute RUN --out DIR``.

Which labeled pictures help what a network does, and which harm it.
"""

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
from metapl.apps.machine import write_whole
from metapl.apps.pictures.batches import FileImages, in_unit_range
from metapl.apps.pictures.folders import LabeledFiles, scan_labeled, verify_files
from metapl.apps.printing import short, table, tell, wrapped, written_csv
from metapl.apps.run_folder import EndedRun
from metapl.apps.settings import Batch, Steps, unset
from metapl.errors import MetaplError, few
from metapl.metrics import predict_logits
from metapl.runs.fields import Range
from metapl.training.attribution import Attribution, attribute

TABLE, PAGE = "attribution.csv", "attribution.html"
PASSES, FEWEST_STEPS = 10, 100  # over the pictures, where --steps is not given
MOMENTUM, AT_ONCE = 0.9, 256  # pictures in a pass of the trained network
REMOVED, FEWEST_REMOVALS = (
    0.05,
    8,
)  # share of the pictures in each removal of the check; fewer say too little
DO = "Look at these first; a low score is not yet a wrong label."
SHOWN, LISTED = 24, 5  # pictures in a gallery, and on a terminal


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Say which labeled pictures of a run help its network, and which harm it.

    A network like that of the run is trained anew, from its start, on the labeled pictures as they
    are, by plain SGD with momentum at a rate that falls to zero; the loss of the run's own network
    is stated beside it. A picture's score is minus the derivative, through all of this training, of
    the loss on the validation pictures (of train noisy without --val, of those of --clean), in the
    weight of the picture: more of one with a positive score would lower the loss, more of one with
    a negative score raise it.

    A score is a prediction. The check trains without 5 % of the pictures, drawn at random, again
    and again, and compares: a correlation near 1 says that the scores can be believed, one near 0
    that they cannot.

    DIR gets attribution.csv, with all pictures and the most harmful first, and attribution.html, a
    page of the most harmful and the most helpful ones.

    Args:
        folder: the folder of a finished run of train images, train noisy or noisy-student images.
        val: other pictures whose labels are right, in a folder like --labeled.
        out: the folder to write to; made if need be.
        removals: how many trainings without pictures the check takes; 0 does without it.
        steps: number of steps; by default 10 passes over the pictures, and 100 at least.
        batch: pictures in a step; at most all of them.
        lr: learning rate at the start.
        seed: of the initial weights, the order of the pictures and the removals; by default the
            run's.
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
        with held(self.out):
            given, judges = (
                files_of(run, "labeled"),
                files_of(run, "validation") or files_of(run, "clean"),
            )
            judges = scan_labeled(self.val) if self.val else judges
            if not judges:
                raise MetaplError(
                    f"{self.folder} has no validation pictures to judge by; expected --val DIR."
                )
            assert given is not None  # a run has been trained on them
            train, outer = (
                Pictures(run, each.keep(verify_files(each).sound)) for each in (given, judges)
            )
            batch, seed = (
                min(self.batch, len(train)),
                fields["seed"] if self.seed is None else self.seed,
            )
            steps = self.steps or max(FEWEST_STEPS, -(-PASSES * len(train) // batch))
            if steps * batch < len(
                train
            ):  # which would leave some pictures out, which would have no score
                least = -(-len(train) // batch)
                raise MetaplError(
                    f"--steps {steps}: expected {least:,} or more for {len(train):,} pictures."
                )
            torch.set_num_threads(run.folder.threads())
            torch.manual_seed(seed)
            network = run.cards["student"].create(weights=fields.get("weights")).to(run.device)
            scores = attribute(
                network,
                train,
                outer,
                optimizer=torch.optim.SGD(network.parameters(), lr=self.lr, momentum=MOMENTUM),
                steps=steps,
                batch_size=batch,
                schedule=lambda step: 1 - step / steps,
                generator=torch.Generator().manual_seed(seed),
            )
            judged, guesses = float(scores.outer_loss), math.log(len(run.classes))
            right = float((logits(network, scores, outer).argmax(1) == outer.labels).float().mean())
            if not judged < guesses and right <= 1 / len(run.classes):
                raise MetaplError(
                    f"after {steps:,} steps the loss on the pictures that judge is {judged:.3f}, "
                    f"and the accuracy {right:.1%}: nothing was learned that holds for them, and "
                    f"no score would count; try --lr {self.lr / 3:.1g}, other --steps, or more "
                    "labeled pictures."
                )
            losses = F.cross_entropy(
                logits(network, scores, train), train.labels, reduction="none"
            ).tolist()
            labels = [run.classes[label] for label in train.labels.tolist()]
            files = [str(train.images.path(number)) for number in range(len(train))]
            score = scores.scores.tolist()
            ranked = sorted(range(len(train)), key=score.__getitem__)  # the most harmful first
            found: dict[str, Any] = {
                "run": str(self.folder),
                "pictures": len(train),
                "judged_on": len(outer),
                "not_judged_on": [
                    label for c, label in enumerate(run.classes) if c not in outer.labels
                ],
                "steps": steps,
                "batch": batch,
                "lr": self.lr,
                "momentum": MOMENTUM,
                "seed": seed,
                "device": str(run.device),
                "replay_error": scores.replay_error,
                **{
                    f"float32 {kind}": precision
                    for kind, precision in scores.float32_products.items()
                },
                "loss": judged,
                "loss_of_the_run": loss_of_run(run, outer),
                "loss_of_guesses": guesses,
                "harmful": sum(each < 0 for each in score),
                "spearman": None,
                "interval": None,
                "removals": self.removals,
                "removed": max(1, round(REMOVED * len(train))),
            }

            def hung(title: str, note: str, numbers: Sequence[int]) -> str:
                shown = (
                    (n, f"{labels[n]}: {score[n]:+.2g}\n{Path(files[n]).name}")
                    for n in numbers[:SHOWN]
                )
                return web.pictures(
                    title, note, [web.Picture(train[n][0], caption) for n, caption in shown]
                )

            def publish(check: str) -> list[str]:
                """Write the page of the first and the last of the list.

                What it says, for the terminal too.
                """
                missing = f", none of them of {few(found['not_judged_on'])}," * bool(
                    found["not_judged_on"]
                )
                said = (
                    f"{found['harmful']:,} of {len(train):,} labeled pictures have a score below "
                    f"0: more of one would raise the loss on {len(outer):,} others{missing}, which "
                    f"is {judged:.3f}, and of even guesses {guesses:.3f}. That is of a network "
                    f"that was trained anew for the scores, by plain SGD for {steps:,} steps on "
                    "the pictures as they are"
                )
                own_loss = found["loss_of_the_run"]
                said += (
                    "."
                    if own_loss is None
                    else f"; the student of the run has {own_loss:.3f} there."
                )
                beneath = "beneath each its label, score and file"
                harmful = [number for number in ranked if score[number] < 0]
                helpful = [number for number in reversed(ranked) if score[number] > 0]
                parts = [
                    *map(web.paragraph, (said, check)),
                    hung(
                        "Most harmful",
                        f"more of these would raise the loss; {beneath}. {DO}",
                        harmful,
                    ),
                    hung("Most helpful", f"more of these would lower the loss; {beneath}", helpful),
                    web.folded(
                        "How they were found",
                        web.rows([(k, json.dumps(value)) for k, value in found.items()]),
                    ),
                ]
                content = web.web_page("Which pictures help, and which harm", self.folder, parts)
                write_whole(self.out / PAGE, content, ROOM)
                return [said, check]

            said = publish(
                "The scores are not checked yet."
                if self.removals
                else "The scores were not checked: --removals was 0."
            )
            with written_csv(self.out / TABLE) as csv:
                csv.writerow(["rank", "file", "label", "score", "effect", "loss"])
                for rank, n in enumerate(ranked, 1):
                    effect = "harms" if score[n] < 0 else "helps"
                    csv.writerow(
                        [
                            str(rank),
                            files[n],
                            labels[n],
                            f"{score[n]:.6g}",
                            effect,
                            f"{losses[n]:.6g}",
                        ]
                    )
            if self.removals:
                tell(f"metapl: {self.out / TABLE} has all of them; now the check", file=sys.stderr)
                draw = torch.Generator().manual_seed(seed)
                drawn = (torch.randperm(len(train), generator=draw) for _ in range(self.removals))
                rho = scores.validate([order[: found["removed"]] for order in drawn]).spearman
                found |= {"spearman": rho, "interval": (between := interval(rho, self.removals))}
                without = plural(found["removed"], "random picture")
                said = publish(
                    f"The check: {self.removals} trainings, each without {without}, and what the "
                    f"scores predict of them, have a Spearman correlation of {rho:.2f} (95 % "
                    f"{between[0]:.2f} to {between[1]:.2f}). Near 1 the scores can be believed; "
                    "near 0 or below they cannot, and a lower rate, such as --lr "
                    f"{self.lr / 3:.1g}, may help."
                )
        cells = [
            (short(files[n], 48), short(labels[n], 16), f"{score[n]:+.2g}") for n in ranked[:LISTED]
        ]
        listed = table([("most harmful", "label", "score"), *cells], left=2)
        text = wrapped("\n".join(said))
        tell(
            f"{text}\n\n{listed}\n\n{self.out / TABLE} has all of them, {self.out / PAGE} shows "
            "them"
        )
        return 0


class Pictures:
    """Pictures in files and their labels by number, as a run's network takes them, not changed."""

    def __init__(self, run: EndedRun, files: LabeledFiles) -> None:
        given = run.cards["student"].input
        size: Any = given.shape[1:]
        images = FileImages(
            [*files.paths()],
            size=size,
            mode="L" if given.channels == 1 else "RGB",
            center=given.center,
        )
        self.images, self.labels = images.cached(), files.targets(run.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is left out, which it is not
            picture, used = self.images.fetch_sound(torch.tensor([number]))
        if not len(used):
            raise MetaplError(
                f"{self.images.path(number)} cannot be read any more; put it back, or remove it."
            )
        return in_unit_range(picture)[0], self.labels[number]


def logits(network: nn.Module, found: Attribution, pictures: Pictures) -> Tensor:
    """Of the trained network, in mixed batches, whose statistics a batch norm takes."""
    mixed, outputs = torch.randperm(len(pictures)), list[Tensor]()
    with torch.no_grad():
        for some in mixed.chunk(-(-len(pictures) // AT_ONCE)):
            x = torch.stack([pictures[number][0] for number in some.tolist()]).to(
                found.scores.device
            )
            outputs.append(functional_call(network, found.student_params, (x,)).cpu())
    return torch.cat(outputs)[mixed.argsort()]


def loss_of_run(run: EndedRun, pictures: Pictures) -> float | None:
    """Return the loss of the run's own student on pictures; None where its weights are gone."""
    if "student" not in run.networks:
        return None
    batches = [
        (torch.stack([pictures[number][0] for number in some.tolist()]), pictures.labels[some])
        for some in torch.arange(len(pictures)).split(AT_ONCE)
    ]
    with torch.random.fork_rng(devices=[]):  # a network is built with fresh weights first
        network = run.network("student").to(run.device)
    outputs, labels = predict_logits(network, batches)
    return float(F.cross_entropy(outputs, labels))


def interval(rho: float, n: int) -> tuple[float, float]:
    """Return a 95 % interval of Spearman's correlation of n pairs.

    It is Fisher's z with the variance of Bonett and Wright.

    >>> [round(end, 2) for end in interval(0.8, 10)]
    [0.24, 0.96]
    """
    z, half = math.atanh(max(min(rho, 0.999), -0.999)), 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(z - half), math.tanh(z + half)
