"""The leaderboard in miniature: its command, its protocol, and our methods in it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "benchmarks" / "leaderboard"
MODULES = ("tasks", "run", "methods")
PERCEPTRON = "digits-perceptron"
STEPS = 3
REMOVALS = 6


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the modules of the leaderboard by name, as its commands import them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    modules = {name: importlib.import_module(name) for name in MODULES}
    yield modules
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def small(board: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the modules, with tasks of three steps and files in a folder of their own."""
    tasks = {
        name: dataclasses.replace(task, steps=STEPS) for name, task in board["tasks"].TASKS.items()
    }
    monkeypatch.setattr(board["tasks"], "REMOVALS", REMOVALS)
    for module in board.values():
        monkeypatch.setattr(module, "TASKS", tasks)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- leaderboard:begin -->\n<!-- leaderboard:end -->\nafter\n")
    places = {"TRUTH": "truth", "SCORES": "scores", "ROWS": "rows.jsonl", "PAGE": "README.md"}
    for name, file in places.items():
        monkeypatch.setattr(board["run"], name, tmp_path / file)
    monkeypatch.setattr(board["methods"], "SCORES", tmp_path / "scores")
    return board


def call(board: Any, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    board["run"].main()


def write_scores(folder: Path, task: str, seeds: int = 3, examples: int = 1000) -> None:
    folder.mkdir(exist_ok=True)
    for seed in range(seeds):
        scores = np.random.default_rng(seed).normal(size=examples)
        if seed == 1:
            np.savetxt(folder / f"{task}-{seed}.csv", scores)
        else:
            np.save(folder / f"{task}-{seed}.npy", scores.astype(np.float32))


def test_a_method_of_ones_own_is_added_by_one_command(
    small: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call(small, monkeypatch, "--retrain", "--task", PERCEPTRON)
    write_scores(tmp_path / "mine", PERCEPTRON)
    about = ("--title", "My method", "--cost", "3")
    call(small, monkeypatch, "--method", "mine", "--scores", tmp_path / "mine", *about)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "| My method | " in page
    assert page.count("| 3 |") == 1
    assert "| My method | " in capsys.readouterr().out

    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    task = small["tasks"].TASKS[PERCEPTRON]
    truth = json.loads((tmp_path / "truth" / f"{PERCEPTRON}.json").read_text())["seeds"]
    assert [*truth] == ["0", "1", "2", "100"]
    scores = [np.random.default_rng(seed).normal(size=1000) for seed in range(3)]
    correlations = {}
    for a in range(3):
        predicted = [scores[a][removed.numpy()].sum() for removed in task.removed_sets()]
        for b in range(3):
            correlations[a, b] = stats.spearmanr(predicted, truth[str(b)]["without"])[0]
    same = [correlations[a, a] for a in range(3)]
    others = [value for (a, b), value in correlations.items() if a != b]
    assert row["lds"] == pytest.approx(np.mean(same), abs=1e-3)
    assert row["lds_of_other_seeds"] == pytest.approx(np.mean(others), abs=1e-3)
    low, high = row["lds_interval"]
    assert -1 <= low < high <= 1

    # Without the ten examples of the highest scores, by a loop of PyTorch's.
    changes = []
    for seed in range(3):
        weights = torch.ones(1000)
        weights[torch.tensor(scores[seed].argsort()[-10:].copy())] = 0
        changes.append(float(by_torch(task, seed, weights) - truth[str(seed)]["loss"]))
    assert row["qld_of_seeds"] == pytest.approx(changes, abs=2e-6, rel=2e-3)


def by_torch(task: Any, seed: int, weights: Tensor) -> Tensor:
    """Return the outer loss of a training on weighted examples, by torch.optim in a loop."""
    network = task.initial(seed)
    train, outer = task.data()
    if task.rule == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), lr=task.rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=task.rate, eps=1e-6, weight_decay=0.01
        )

    def losses(inputs: Tensor, labels: Tensor) -> Tensor:
        z = network(inputs)
        if z.ndim == 3:
            of_words = torch.nn.functional.cross_entropy(
                z[:, :-1].mT, labels[:, 1:], reduction="none"
            )
            return of_words.mean(1)
        return torch.nn.functional.cross_entropy(z, labels, reduction="none")

    for step, numbers in enumerate(task.order(seed)):
        optimizer.param_groups[0]["lr"] = task.rate * (1 - step / task.steps)
        optimizer.zero_grad()
        of_batch = losses(train.inputs[numbers], train.labels[numbers])
        (weights[numbers] * of_batch).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return losses(outer.inputs, outer.labels).mean()


@pytest.mark.parametrize("name", [PERCEPTRON, "digits-convolutional", "docstrings-transformer"])
def test_the_trainings_are_those_of_torch_optim(small: Any, name: str) -> None:
    task = small["tasks"].TASKS[name]
    # The first batch loses examples, so that its mean is seen to keep its size.
    weights = torch.ones(2, 1000)
    weights[1, task.order(0)[0][:5]] = 0
    losses = small["tasks"].outer_losses(task, 0, weights).mean(1)
    for row, loss in zip(weights, losses, strict=True):
        assert float(loss) == pytest.approx(float(by_torch(task, 0, row)), abs=2e-6)
    assert abs(float(losses[1] - losses[0])) > 1e-5


@pytest.mark.parametrize("name", [PERCEPTRON, "docstrings-transformer"])
def test_metapls_trainings_without_examples_are_those_of_the_leaderboard(
    small: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metapl

    caught: list[Any] = []
    original = metapl.attribute

    def attribute(*args: Any, **options: Any) -> Any:
        caught.append(original(*args, **options))
        return caught[-1]

    monkeypatch.setattr(metapl, "attribute", attribute)
    task = small["tasks"].TASKS[name]
    scores = small["methods"].by_attribute(task, 0)
    (attribution,) = caught
    assert torch.equal(scores, attribution.scores)
    sets = [task.order(0)[step][:5] for step in range(3)]
    losses = small["tasks"].outer_losses(task, 0, task.weights_without(sets)).mean(1)
    changes = (losses[1:] - losses[0]).double()
    score = attribution.validate(sets, progress=False)
    assert score.execution.startswith("in stacks")
    assert float((score.retrained - changes).abs().max()) < 2e-6


def test_influence_functions_are_the_solution_of_their_system(small: Any) -> None:
    """By a dense Gauss-Newton matrix, and a solver of its own, on a last layer alone."""
    tasks = small["tasks"]
    task = dataclasses.replace(
        tasks.TASKS[PERCEPTRON], network=lambda: torch.nn.Linear(64, 10, bias=False)
    )
    scores = small["methods"].by_influence(task, 0, damping=0.1, iterations=60)
    train, outer = task.data()
    W = small["methods"].trained_weights(task, 0)["weight"].double()

    def gradients(examples: Any) -> Tensor:
        p = (examples.inputs.double() @ W.mT).softmax(-1)
        in_outputs = p - torch.nn.functional.one_hot(examples.labels, 10)
        return torch.einsum("nc,nd->ncd", in_outputs, examples.inputs.double()).flatten(1)

    p = (train.inputs.double() @ W.mT).softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    x = train.inputs.double()
    G = torch.einsum("nab,nd,ne->adbe", H, x, x).reshape(640, 640) / len(x)
    direction = torch.linalg.solve(G + 0.1 * torch.eye(640), gradients(outer).mean(0))
    expected = gradients(train) @ direction
    assert float((scores - expected).abs().max() / expected.abs().max()) < 1e-3


def test_bm25_is_its_formula(small: Any) -> None:
    training, outer = (ids.tolist() for ids in small["tasks"].pieces_of_text())
    scores = small["methods"].by_bm25(small["tasks"].TASKS["docstrings-transformer"], 0)
    assert scores.shape == (1000,)
    having: dict[int, int] = {}
    for ids in training:
        for word in set(ids):
            having[word] = having.get(word, 0) + 1
    expected = 0.0
    for query in outer:
        for word in set(query):
            count = training[7].count(word)
            n = having.get(word, 0)
            rarity = math.log(1 + (1000 - n + 0.5) / (n + 0.5))
            # All sequences are of the same length.
            expected += rarity * count * 2.5 / (count + 1.5) / len(outer)
    assert float(scores[7]) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["trak", "random", "bm25"])
def test_a_methods_scores_are_made_by_its_command(
    small: Any, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"dimensions": 8, "models": 2} if method == "trak" else {}
    names = ["docstrings-transformer"] if method == "bm25" else [PERCEPTRON]
    monkeypatch.setattr(small["methods"], "ONLY_TASKS", {method: names})
    monkeypatch.setattr(small["methods"], "CHOSEN", {method: options})
    monkeypatch.setattr(sys, "argv", ["methods.py", method])
    small["methods"].main()
    about = json.loads((tmp_path / "scores" / method / "about.json").read_text())
    assert float(about["cost"][names[0]]) >= 0
    files = small["run"].scores_files(method)
    assert [*files] == names
    for file in files[names[0]].values():
        scores = small["run"].read_scores(file, small["tasks"].TASKS[names[0]])
        assert scores.std() > 0


@pytest.mark.parametrize("case", ["shape", "nan", "text", "name", "seeds", "nothing", "method"])
def test_wrong_scores_end_in_one_line(
    small: Any, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    write_scores(folder, PERCEPTRON, examples=999 if case == "shape" else 1000)
    file = folder / f"{PERCEPTRON}-1.csv"
    expected = {
        "shape": "numbers of shape .*; expected 1000 finite numbers",
        "nan": "finite: False; expected 1000",
        "text": "cannot be read",
        "name": "has scores.npy; expected files such as",
        "seeds": "for some seeds of digits-perceptron; missing are digits-perceptron-2.npy",
        "nothing": "does not exist",
        "method": "there are no scores of other",
    }[case]
    words: list[str | Path] = ["--method", "mine", "--scores", folder]
    if case == "nan":
        file.write_text("nan\n" * 1000)
    if case == "text":
        file.write_text("one\n" * 1000)
    if case == "name":
        file.rename(folder / "scores.npy")
    if case == "seeds":
        (folder / f"{PERCEPTRON}-2.npy").unlink()
    if case == "nothing":
        words[-1] = tmp_path / "elsewhere"
    if case == "method":
        words = ["--method", "other"]
    with pytest.raises(SystemExit, match=expected) as caught:
        call(small, monkeypatch, *words)
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "../mine"], "is no name of a folder"),
        (["--method", ""], "is no name of a folder"),
        (["--title", "My method"], "--title needs the method's name"),
        (["--cost", "3"], "--cost needs the method's name"),
    ],
)
def test_a_wrong_command_line_writes_nothing(
    words: list[str],
    expected: str,
    small: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_scores(tmp_path / "given", PERCEPTRON)
    if "--method" in words:
        words = [*words, "--scores", str(tmp_path / "given")]
    with pytest.raises(SystemExit):
        call(small, monkeypatch, *words)
    assert expected in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "given"]


def test_a_method_that_is_not_whole_keeps_no_other_from_the_table(
    small: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call(small, monkeypatch, "--retrain", "--task", PERCEPTRON)
    write_scores(tmp_path / "part", PERCEPTRON, seeds=1)
    write_scores(tmp_path / "mine", PERCEPTRON)
    with pytest.raises(SystemExit, match="missing are .*-1.npy, .*-2.npy, to be given in the same"):
        call(small, monkeypatch, "--method", "a", "--scores", tmp_path / "part")
    call(small, monkeypatch, "--method", "mine", "--scores", tmp_path / "mine")
    capsys.readouterr()
    call(small, monkeypatch)
    printed = capsys.readouterr()
    assert printed.err.startswith("a is left out: a has scores for some seeds")
    assert "| mine | " in printed.out
    assert "| mine | " in (tmp_path / "README.md").read_text()


def test_what_the_page_reads_of_a_task(board: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall("```python\n(.*?)```", board["run"].PAGE.read_text(), re.DOTALL)
    exec(code, {})
    expected = code.strip().rpartition("# ")[2]
    assert capsys.readouterr().out.strip() == expected


def test_ground_truth_of_other_data_is_refused(
    small: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(small, monkeypatch, "--retrain", "--task", PERCEPTRON, "--seed", "0")
    file = tmp_path / "truth" / f"{PERCEPTRON}.json"
    file.write_text(file.read_text().replace('"digest": "', '"digest": "0'))
    write_scores(tmp_path / "mine", PERCEPTRON)
    with pytest.raises(SystemExit, match="is of other data .*; make it again with --retrain"):
        call(small, monkeypatch, "--method", "mine", "--scores", tmp_path / "mine")


def test_the_committed_table_follows_from_scores_and_trainings(board: Any) -> None:
    run = board["run"]
    rows = run.stored_rows()
    assert {row["method"] for row in rows} == {path.name for path in run.SCORES.iterdir()}
    text = run.PAGE.read_text()
    assert f"{run.BEGIN}\n{run.table(rows)}\n{run.END}" in text
    for row in rows:
        task = board["tasks"].TASKS[row["task"]]
        files = run.scores_files(row["method"])[task.name]
        scores = np.array([run.read_scores(files[seed], task) for seed in board["tasks"].SEEDS])
        measured = run.rounded(run.agreement(task, scores))
        # Another machine may round a sum of scores otherwise, which moves equal ranks.
        for name in ("lds", "lds_of_other_seeds"):
            assert row[name] == pytest.approx(measured[name], abs=2e-3)


def test_the_page_says_what_the_rows_say(board: Any) -> None:
    text = " ".join((FOLDER.parents[1] / "docs" / "studies" / "removals.md").read_text().split())
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in board["tasks"].TASKS:
        for row in board["run"].stored_rows():
            if row["task"] == name:
                for column in ("lds", "lds_of_other_seeds"):
                    numbers.setdefault((row["method"], column), []).append(f"{row[column]:.2f}")
    mine = numbers["attribute", "lds"]
    assert (
        f"an LDS of {mine[0]} on a perceptron, {mine[1]} on convolutions and {mine[2]} on a small"
        in text
    )
    for method, column in (("influence", "lds"), ("attribute", "lds_of_other_seeds")):
        first, second, third = numbers[method, column]
        assert f"{first}, {second} and {third}" in text
    first, second, third = numbers["influence", "lds_of_other_seeds"]
    assert f"influence functions have {first}, {second} and {third}: **a score" in text


def test_the_leaderboard_needs_nothing_of_metapl() -> None:
    code = "import sys, run; assert 'metapl' not in sys.modules, 'metapl is loaded'"
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)
