"""Evaluate scores of training examples by what removing examples does, and rewrite the table.

    python benchmarks/leaderboard/run.py --method mine --scores FILE
    python benchmarks/leaderboard/run.py              # the methods that are here, once more
    python benchmarks/leaderboard/run.py --retrain    # the ground truth again, in minutes

FILE is a folder with a file for each task and seed, or one such file: ``<task>-<seed>.npy`` or
``.csv``, one number for each training example. Positive: more of the example lowers the loss, so
that without it the loss is higher. README.md has the protocol. Nothing here needs metapl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from tasks import (
    HERE,
    SEEDS,
    TASKS,
    TUNING_SEED,
    TUNING_TASK,
    Task,
    judging_losses,
    outer_losses,
    weights_by_step,
)

TRUTH = HERE / "truth"
SCORES = HERE / "scores"
ROWS = HERE / "rows.jsonl"
PAGE = HERE / "README.md"
BEGIN = "<!-- leaderboard:begin -->"
END = "<!-- leaderboard:end -->"
# How many times a bootstrap draws.
RESAMPLES = 1000

Row = dict[str, Any]


class LeaderboardError(Exception):
    """Something was given that cannot be evaluated; the message is one line."""


# ------------------------------------------------------------------------------------ ground truth


def digest(task: Task) -> str:
    """Return a number that other data, orders or removed sets do not have."""
    train, outer = task.data()
    tensors = [train.inputs, train.labels, outer.inputs, outer.labels]
    tensors += [*map(task.order, SEEDS), *task.removed_sets()]
    hashed = hashlib.blake2b(digest_size=8)
    for t in tensors:
        hashed.update(t.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def retrain(task: Task, seeds: Sequence[int]) -> None:
    """Train without each of the removed sets, and write the losses to the task's file."""
    file = TRUTH / f"{task.name}.json"
    losses_by_seed: Row = {}
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["digest"] == digest(task):
            losses_by_seed = stored["seeds"]
    for seed in seeds:
        print(f"{task.name}, seed {seed}: {len(task.removed_sets())} trainings", file=sys.stderr)
        losses = outer_losses(task, seed, task.weights_without(task.removed_sets())).mean(1)
        loss, *without = [round(number, 7) for number in losses.tolist()]
        losses_by_seed[str(seed)] = {"loss": loss, "without": without}
        truth: Row = {
            "task": task.name,
            "digest": digest(task),
            "torch": torch.__version__,
            "seeds": losses_by_seed,
        }
        TRUTH.mkdir(exist_ok=True)
        file.write_text(json.dumps(truth, indent=1) + "\n")


def changes_of(task: Task) -> np.ndarray:
    """Return how the loss changes without each removed set, by seed, (seeds, R).

    Raises: :class:`LeaderboardError` where the committed trainings are of other data.
    """
    file = TRUTH / f"{task.name}.json"
    stored = json.loads(file.read_text())
    if stored["digest"] != digest(task):
        raise LeaderboardError(
            f"{file} is of other data than {task.name} has here (another version of scikit-learn "
            "or of torch); make it again with --retrain."
        )
    rows = [stored["seeds"][str(seed)] for seed in SEEDS]
    return np.array([np.array(row["without"]) - row["loss"] for row in rows])


# ------------------------------------------------------------------------------------------ scores


def read_scores(file: Path, task: Task) -> np.ndarray:
    """Return the scores of a file, (N,).

    Raises: :class:`LeaderboardError` for other numbers.
    """
    examples = len(task.data()[0])
    try:
        if file.suffix == ".npy":
            scores = np.load(file, allow_pickle=False).astype(np.float64)
        else:
            scores = np.loadtxt(file, delimiter=",", dtype=np.float64, ndmin=1)
    except (OSError, ValueError, TypeError) as error:
        raise LeaderboardError(
            f"{file} cannot be read ({error}); expected one number for each of {examples} examples "
            "of training, as .npy or .csv."
        ) from error
    if scores.shape != (examples,) or not np.isfinite(scores).all():
        raise LeaderboardError(
            f"{file} has numbers of shape {scores.shape}, finite: {np.isfinite(scores).all()}; "
            f"expected {examples} finite numbers, one for each example of training."
        )
    return scores


def scores_files(method: str) -> dict[str, dict[int, Path]]:
    """Return the files of a method's scores by task and seed; a task has all seeds, or none.

    Raises: :class:`LeaderboardError` where it has some.
    """
    files: dict[str, dict[int, Path]] = {}
    for name in TASKS:
        of_task = {}
        for seed in SEEDS:
            for suffix in (".npy", ".csv"):
                file = SCORES / method / f"{name}-{seed}{suffix}"
                if file.exists():
                    of_task[seed] = file
        if len(of_task) not in (0, len(SEEDS)):
            missing = [f"{name}-{seed}.npy" for seed in SEEDS if seed not in of_task]
            raise LeaderboardError(
                f"{method} has scores for some seeds of {name}; missing are {', '.join(missing)}, "
                "to be given in the same way."
            )
        if of_task:
            files[name] = of_task
    return files


def take_in(method: str, source: Path) -> None:
    """Copy the scores of a method into the leaderboard's folder.

    Args:
        source: a file called ``<task>-<seed>.npy`` or ``.csv``, or a folder of these.
    """
    names = {f"{task}-{seed}" for task in TASKS for seed in SEEDS}
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix in (".npy", ".csv"))
    elif source.exists():
        files = [source]
    else:
        raise LeaderboardError(f"{source} does not exist; expected a file or a folder of scores.")
    wrong = [file.name for file in files if file.stem not in names]
    if wrong or not files:
        listed = ", ".join(wrong) or "no file"
        raise LeaderboardError(
            f"{source} has {listed}; expected files such as {min(names)}.npy, <task>-<seed>, of "
            f"the tasks {', '.join(TASKS)} and the seeds {', '.join(map(str, SEEDS))}."
        )
    for file in files:
        read_scores(file, TASKS[file.stem.rpartition("-")[0]])
    folder = SCORES / method
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        for suffix in (".npy", ".csv"):
            if suffix != file.suffix:
                (folder / file.stem).with_suffix(suffix).unlink(missing_ok=True)
        if file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)


# -------------------------------------------------------------------------------------- evaluation


def rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each pair of rows; 0 where all numbers of one are equal."""
    ranks = [rankdata(values, axis=-1) for values in (first, second)]
    centered = [values - values.mean(-1, keepdims=True) for values in ranks]
    sizes = np.sqrt((centered[0] ** 2).sum(-1) * (centered[1] ** 2).sum(-1))
    products = (centered[0] * centered[1]).sum(-1)
    coefficients: np.ndarray = np.divide(
        products, sizes, out=np.zeros_like(products), where=sizes > 0
    )
    return coefficients


def interval(draws: np.ndarray) -> list[float]:
    """Return the 95 % interval of a bootstrap's draws."""
    return [float(end) for end in np.percentile(draws, [2.5, 97.5])]


def agreement(task: Task, scores: np.ndarray) -> Row:
    """Return the linear datamodeling scores of a method, with intervals over the removals.

    Args:
        scores: of each seed, (seeds, N).

    Returns: ``lds``: predictions by the scores of a seed beside the trainings of that seed, the
    mean over the seeds. ``lds_of_other_seeds``: beside the trainings of each other seed.
    """
    changes = changes_of(task)
    sets = [removed.numpy() for removed in task.removed_sets()]
    predicted = np.array([[of_seed[removed].sum() for removed in sets] for of_seed in scores])
    draws = np.random.default_rng(0).integers(len(sets), size=(RESAMPLES, len(sets)))
    row: Row = {}
    others = [(a, b) for a in range(len(SEEDS)) for b in range(len(SEEDS)) if a != b]
    same = [(a, a) for a in range(len(SEEDS))]
    for name, pairs in (("lds", same), ("lds_of_other_seeds", others)):
        values = [rank_correlations(predicted[a], changes[b]) for a, b in pairs]
        resampled = [rank_correlations(predicted[a][draws], changes[b][draws]) for a, b in pairs]
        row[name] = float(np.mean(values))
        row[f"{name}_interval"] = interval(np.mean(resampled, axis=0))
    return row


def without_highest(task: Task, scores: np.ndarray) -> Row:
    """Return the query loss difference: how the loss changes without the highest 1 % of scores.

    Its interval is over the examples that judge. It takes two trainings for each seed.

    Args:
        scores: of each seed, (seeds, N).
    """
    differences = []
    for seed, of_seed in zip(SEEDS, scores, strict=True):
        size = len(task.removed_sets()[0])
        highest = torch.tensor(np.argsort(-of_seed, kind="stable")[:size].copy())
        *_, theta = weights_by_step(task, seed, task.weights_without([highest]))
        with_all, without = judging_losses(task, seed, theta)
        differences.append((without - with_all).double().numpy())
    by_example = np.mean(differences, axis=0)
    draws = np.random.default_rng(0).integers(len(by_example), size=(RESAMPLES, len(by_example)))
    return {
        "qld": float(by_example.mean()),
        "qld_interval": interval(by_example[draws].mean(1)),
        "qld_of_seeds": [float(difference.mean()) for difference in differences],
    }


def evaluate(method: str) -> list[Row]:
    """Return a row for each task of which a method has scores."""
    rows = []
    for name, files in scores_files(method).items():
        task = TASKS[name]
        scores = np.array([read_scores(files[seed], task) for seed in SEEDS])
        measured = {**agreement(task, scores), **without_highest(task, scores)}
        rows.append({"method": method, "task": name, **rounded(measured)})
    if not rows:
        raise LeaderboardError(
            f"there are no scores of {method}; give them with --scores FILE, as README.md says."
        )
    return rows


def rounded(measured: Row) -> Row:
    """Return numbers, and lists of them, to four figures, which is more than they are known to."""
    return json.loads(json.dumps(measured), parse_float=lambda text: float(f"{float(text):.4g}"))


# ------------------------------------------------------------------------------------------- table


def about(method: str) -> Row:
    """Return what is said of a method: a title, its cost by task in plain trainings, a source."""
    file = SCORES / method / "about.json"
    return json.loads(file.read_text()) if file.exists() else {}


def cell(row: Row, name: str, form: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{form}} ({low:{form}} to {high:{form}})"


def table(rows: Sequence[Row]) -> str:
    """Return a table for each task, the best LDS first."""
    tables = []
    for name in TASKS:
        of_task = [row for row in rows if row["task"] == name]
        if not of_task:
            continue
        lines = [
            f"**{name}**",
            "",
            "| method | LDS | LDS, other seeds | QLD | cost |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in sorted(of_task, key=lambda row: -row["lds"]):
            description = about(row["method"])
            cost = description.get("cost", {}).get(name, "–")
            cells = [cell(row, "lds", ".2f"), cell(row, "lds_of_other_seeds", ".2f")]
            cells += [cell(row, "qld", ".3f"), str(cost)]
            lines.append(f"| {description.get('title', row['method'])} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def write_table(rows: Sequence[Row], page: Path) -> None:
    head, after_begin = page.read_text().split(BEGIN)
    _, tail = after_begin.split(END)
    page.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}")


def stored_rows() -> list[Row]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", help="a name for the method, that of its folder in scores/")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="its scores; see above")
    parser.add_argument("--title", help="what the table calls it")
    parser.add_argument("--cost", metavar="N", help="its cost in plain trainings, for the table")
    parser.add_argument("--retrain", action="store_true", help="make the ground truth again")
    parser.add_argument(
        "--task", choices=TASKS, action="append", help="with --retrain: of this one"
    )
    parser.add_argument("--seed", type=int, action="append", help="with --retrain: of this one")
    parser.add_argument("--table", action="store_true", help="print the table; evaluate nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for option in ("scores", "title", "cost"):
        if getattr(args, option) is not None and args.method is None:
            parser.error(f"--{option} needs the method's name, --method NAME")
    # The name is that of a folder, and of no other one than in scores/.
    if args.method is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", args.method):
        parser.error(
            f"--method {args.method!r} is no name of a folder; expected letters, digits, '_', '-' "
            "and '.'"
        )
    try:
        run(args)
    except LeaderboardError as error:
        raise SystemExit(f"error: {error}") from error


def run(args: argparse.Namespace) -> None:
    if args.table:
        print(table(stored_rows()))
        return
    if args.retrain:
        for name in args.task or TASKS:
            tuning = [TUNING_SEED] if name == TUNING_TASK else []
            retrain(TASKS[name], args.seed or (*SEEDS, *tuning))
        return
    if args.scores is not None:
        take_in(args.method, args.scores)
    methods = [args.method] if args.method else sorted(path.name for path in SCORES.iterdir())
    rows = [row for row in stored_rows() if row["method"] not in methods]
    for method in methods:
        try:
            rows += evaluate(method)
        except LeaderboardError as error:
            if args.method:
                raise
            # A method whose scores are not all there yet keeps no other from the table.
            print(f"{method} is left out: {error}", file=sys.stderr)
            continue
        if args.title or args.cost:
            description = about(method)
            if args.title:
                description["title"] = args.title
            if args.cost:
                description["cost"] = dict.fromkeys(scores_files(method), args.cost)
            (SCORES / method / "about.json").write_text(json.dumps(description, indent=1) + "\n")
    rows.sort(key=lambda row: (row["task"], row["method"]))
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(rows, PAGE)
    print(table([row for row in rows if row["method"] in methods]))


if __name__ == "__main__":
    main()
