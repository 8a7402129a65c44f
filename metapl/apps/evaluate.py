"""``metapl evaluate RUN``, on its own test set or on another folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from metapl.apps.differences import Judged, Opponent, check_comparable, differences, sheet
from metapl.apps.inputs import ROOM, Factory, Folder, HeldOut, Network, Run, check_out, held, plural
from metapl.apps.labeling import refuse_infinite
from metapl.apps.machine import write_whole
from metapl.apps.printing import WIDTH, short, table, tell
from metapl.apps.progress import count_bar
from metapl.apps.report import COLORS, LINES, png_of
from metapl.apps.robustness import CORRUPTIONS, LEVELS, SEVERITIES, Attack, measure
from metapl.apps.run_folder import WEIGHTS, EndedRun, NetworkName
from metapl.apps.settings import Switch, unset
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, evaluate_logits, interval, predict_logits
from metapl.runs.fields import Range
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EVALUATION, PICTURE, SHEET = "evaluation.json", "evaluation.png", "differences.png"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run's network on its test set again: accuracy, calibration and confusions.

    The accuracy is printed with its 95 % interval, and with the accuracy of always naming the
    largest class and of guessing evenly. The output says so if it is not the accuracy in the run's
    result.json. A run without a test set is measured on its validation examples, and the output
    says so.

    With --test, the network is measured on other pictures. They stand in one folder for each class,
    whose name is that of the class. A file that cannot be read is left out, with the reason on
    standard error; the exit code is then 1.

    With --corruptions the pictures are damaged in 15 ways and 5 severities each, as in ImageNet-C,
    and with --attack they are changed to mislead the network. All accuracies are then written to
    evaluation.json in the folder of --out, and their curves to evaluation.png.

    With --against, another network is measured on the same pictures. The output says on how many
    of them one network alone is right, with the p of McNemar's exact test. In the folder of --out,
    evaluation.json names those pictures, and differences.png shows them.

    examples/robustness.py measures on ImageNet-A, -C, -P and ReaL, and takes files of weights.

    Args:
        folder: folder of a run.
        test: folder of labeled pictures to measure on, with a folder for each class in it.
        corruptions: measure on damaged pictures too: noise, blur, weather and digital damage.
        attack: measure also on pictures that are changed to mislead the network: fgsm takes one
            step along the sign of the gradient, pgd ten.
        eps: how far --attack may change each value of a picture, in 1/255 of the range from black
            to white. Several can be given.
        against: folder of another run, whose network is compared with this one picture by picture.
            With --against-network it may be the same run.
        against_network: which network of the run of --against to take. By default it is the one
            that the run delivers.
        out: folder that the figures are written to. It is made if it does not exist.
        json: print JSON.
    """

    folder: Run
    network: Network = "delivered"
    factory: Factory = None
    test: Folder = None
    corruptions: Switch = False
    attack: Annotated[Attack | None, unset()] = None
    eps: Annotated[
        tuple[Annotated[float, Range(0, most=LEVELS)], ...],
        unset("E ...", default="(default: 2 8)"),
    ] = ()
    against: Folder = None
    against_network: Annotated[NetworkName, unset()] = "delivered"
    out: Folder = None
    json: Switch = False

    def run(self) -> int:
        if self.against_network != "delivered" and self.against is None:
            raise MetaplError(
                f"--against-network {self.against_network} was given without --against RUN."
            )
        if self.eps and self.attack is None:
            raise MetaplError(
                "--eps was given without --attack; expected --attack fgsm or --attack pgd."
            )
        run = EndedRun.load(self.folder)
        if self.out is not None:
            check_out(self.out, run.source.recipe().get("fields", {}), {"test": self.test})
        with held(self.out):
            name = run.name(self.network)
            other = (
                None if self.against is None else Opponent.load(self.against, self.against_network)
            )
            if other is not None:
                check_comparable(run, other.run, (name, other.name), has_test=self.test is not None)
            network = run.network(name, self.factory).to(run.device)
            on = HeldOut(run, name, self.test)
            content: dict[str, Any] = {
                "run": str(self.folder),
                **{key: run.result[key] for key in ("recipe", "method", "seed")},
                "network": name,
                "weights": WEIGHTS[name],
                **on.about,
                "measured_on": on.part,
            }
            with count_bar("pictures", is_shown=True) as update:
                logits, labels = predict_logits(network, on.batches())
                if on.names:
                    refuse_infinite(logits, on.names)
                found = evaluate_logits(logits, labels, run.classes)
                low, high = interval(round(found.accuracy * found.n), found.n)
                even = 1 / len(found.confusion)
                content |= found.to_json() | {
                    "interval": [low, high],
                    "chance": found.chance,
                    "even_guess": even,
                }
                rows = [
                    (
                        f"{on.part} accuracy",
                        f"{found.accuracy:.2%} of {found.n:,}{on.remark(found)}",
                    ),
                    ("95 % interval", f"{low:.2%} to {high:.2%}"),
                    (
                        "chance level",
                        f"{found.chance:.2%}, the largest class; even guesses: {even:.2%}",
                    ),
                    *([] if found.top5 is None else [("top-5 accuracy", f"{found.top5:.2%}")]),
                    ("expected calibration error", f"{found.expected_calibration_error:.2%}"),
                    ("negative log-likelihood", f"{found.negative_log_likelihood:.3f}"),
                ]
                blocks = [run.heading(name) + ("" if self.test is None else f"\non {self.test}")]
                blocks += [table(rows, left=2), confusions(found, run.classes)]
                if self.corruptions or self.attack is not None:
                    damaged = measure(
                        network,
                        on.batches(),
                        corruptions=tuple(CORRUPTIONS) if self.corruptions else (),
                        attacks=() if self.attack is None else (self.attack,),
                        eps=self.eps or (2.0, 8.0),
                        progress=update,
                    )
                    content |= damaged
                    blocks += robustness_tables(damaged, found)
            if other is not None:
                compared = differences(
                    Judged(logits, labels, [*on.names]),
                    other.judge(self.factory, self.test),
                    run.classes,
                )
                titles = other.titles(run, name)
                content["against"] = {
                    "run": str(self.against),
                    "network": other.name,
                    **compared.to_json(),
                }
                blocks.append(compared.text(*titles))
            tell(json.dumps(content, indent=2) if self.json else "\n\n".join(blocks))
            if self.out is not None:
                write_whole(
                    self.out / EVALUATION, f"{json.dumps(content, indent=1)}\n".encode(), ROOM
                )
                written = f"the figures are in {self.out / EVALUATION}"
                if "corruptions" in content or "attacks" in content:
                    write_whole(self.out / PICTURE, png_of(robustness_curves(content)), ROOM)
                    written += f", and drawn in {self.out / PICTURE}"
                if other is not None:
                    write_whole(self.out / SHEET, sheet(compared, on, *titles), ROOM)
                    written += (
                        f"; the pictures that one alone is right on are shown in {self.out / SHEET}"
                    )
                if not self.json:
                    tell(f"\n{written}")
            if on.skipped:
                tell(f"metapl: {plural(on.skipped, 'file')} left out", file=sys.stderr)
            return 1 if on.skipped else 0


# ------------------------------------------------------------------------------------ what is shown

# Letters of a class that head a row, and the least that head a column; classes listed where there
# is no room for all.
MOST_LETTERS, LEAST_LETTERS, LISTED = 16, 3, 10


def robustness_tables(found: Mapping[str, Any], clean: Evaluation) -> Iterator[str]:
    """Yield tables of what :func:`measure` found on damaged and on attacked pictures."""
    if "corruptions" in found:
        rows = [("corruption", "none", *map(str, SEVERITIES), "mean error")]
        for name, kind in found["corruptions"].items():
            shares = (
                f"{accuracy:.1%}" for accuracy in (clean.accuracy, *kind["accuracy_by_severity"])
            )
            rows.append((name, *shares, f"{kind['error']:.1%}"))
        mean = f"mean accuracy under corruption {found['mean_corrupted_accuracy']:.1%}"
        yield f"accuracy by severity\n\n{table(rows)}\n\n{mean}"
    if "attacks" in found:
        head = ("attack", "ε in 1/255", "accuracy")
        yield table(
            [
                head,
                *(
                    (name, eps, f"{a:.1%}")
                    for name, of in found["attacks"].items()
                    for eps, a in of.items()
                ),
            ]
        )


# The kinds of damage of ImageNet-C, a panel of the figure each: fifteen curves in one cannot be
# told apart.
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}

# The size of letters, in points.
LETTERS = 8.0


# By name, points of severity or ε and accuracy.
Curves = dict[str, list[tuple[float, float]]]


def robustness_curves(content: Mapping[str, Any]) -> Figure:
    """Draw the accuracies over the severity of each damage, and over ε of each attack.

    Every curve begins at the pictures as they are.

    Args:
        content: what ``evaluation.json`` holds.
    """
    from matplotlib.figure import Figure

    clean = content["accuracy"]
    panels: dict[str, Curves] = {}
    for group, names in GROUPS.items():
        curves: Curves = {}
        for name in names:
            if name in content.get("corruptions", {}):
                accuracies = content["corruptions"][name]["accuracy_by_severity"]
                curves[name] = [(0.0, clean), *zip(map(float, SEVERITIES), accuracies, strict=True)]
        if curves:
            panels[group] = curves
    attacks: Curves = {}
    for name, by_eps in content.get("attacks", {}).items():
        moved = {float(eps): accuracy for eps, accuracy in by_eps.items()}
        attacks[name] = sorted(({0.0: clean} | moved).items())
    # Panels below one another, 4 inches wide: at 400 pixels the letters are 11 pixels high.
    rows = len(panels) + bool(attacks)
    figure = Figure((4.0, 1.9 * rows + 0.1), 200, layout="constrained")
    places = [figure.add_subplot(rows, 1, number + 1) for number in range(rows)]
    for axes, (group, curves) in zip(places, panels.items(), strict=False):
        _draw_curves(axes, curves, f"accuracy, {group}", "severity", content["chance"])
        axes.set_xticks([0, *SEVERITIES], ["none", *map(str, SEVERITIES)])
    if attacks:
        _draw_curves(places[-1], attacks, "accuracy, attacked", "ε in 1/255", content["chance"])
    return figure


def _draw_curves(axes: Axes, curves: Curves, title: str, label: str, chance: float) -> None:
    from matplotlib.ticker import PercentFormatter

    for number, (name, points) in enumerate(curves.items()):
        places = [place for place, _ in points]
        accuracies = [accuracy for _, accuracy in points]
        axes.plot(
            places,
            accuracies,
            color=COLORS[number % len(COLORS)],
            linestyle=LINES[number % len(LINES)],
            marker="o",
            markersize=3,
            label=name.replace("_", " "),
        )
    axes.axhline(chance, color="0.6", linewidth=1, linestyle="--", label="chance")
    axes.set_title(title, fontsize=LETTERS + 1, loc="left")
    axes.set_xlabel(label, fontsize=LETTERS)
    axes.tick_params(labelsize=LETTERS)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the panel, where it hides no curve.
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.05),
        fontsize=LETTERS,
        frameon=False,
        handlelength=1.6,
    )


def confusions(evaluation: Evaluation, classes: tuple[str, ...]) -> str:
    """Return the confusion matrix, or what matters most of it where there is no room for it."""
    share = ["-" if right is None else f"{right:.1%}" for right in evaluation.per_class]
    widest = max(len(str(n)) for counts in evaluation.confusion for n in counts)
    # Two spaces are between columns.
    letters = min((WIDTH - MOST_LETTERS - 10) // len(classes) - 2, MOST_LETTERS)
    if letters >= max(LEAST_LETTERS, widest):
        heads = [shown(name)[:letters] for name in classes]
        rows = [("class", *heads, "right")]
        for name, counts, right in zip(classes, evaluation.confusion, share, strict=True):
            rows.append((short(name, MOST_LETTERS), *(str(n) if n else "." for n in counts), right))
        head = "how many of a class (row) were taken for which (column), and how many rightly"
        return f"{head}\n\n{table(rows)}"
    rows = [("class", "right", "most often taken for", "times")]
    for index in sorted(range(len(classes)), key=lambda i: evaluation.per_class[i] or 0)[:LISTED]:
        others = [0 if other == index else n for other, n in enumerate(evaluation.confusion[index])]
        n = max(others)
        rows.append(
            (
                short(classes[index]),
                share[index],
                short(classes[others.index(n)]) if n else "-",
                str(n),
            )
        )
    head = f"the {len(rows) - 1} of {len(classes):,} classes that are right least often"
    return f"{head}\n\n{table(rows)}"
