"""Every benchmark's command runs, in miniature, and leaves what its own table and picture are made from."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
STUDIES = {
    "attribution": (),
    "data_rater": (),
    "digits_study": ("--workers", "1"),
    "harmful_pictures": (),
    "hyperparameters": (),
    "label_noise": (),
    "noisy_student": (),
    "student_or_mpl": (),
    "suspects": (),
    "tables": (),
    "text_feedback": (),
    "when": (),
}
MEASUREMENTS = (
    "endurance",
    "fresh_adam",
    "long_paths",
    "modes",
    "peers",
    "reduced",
    "rival_attribution",
    "scale",
    "silent",
    "step",
    "throughput",
)
LONG = ("endurance", "peers", "reduced", "rival_attribution", "silent")


def run(name: str, *arguments: str | Path) -> str:
    """What a benchmark's command prints, in this process; endurance forks, which autograd's threads do not survive."""
    if name == "endurance":
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    printed, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.chdir(ROOT)
        importlib.import_module(name).main()
    torch.set_num_threads(threads)
    return printed.getvalue()


def miniature(name: str, out: Path) -> str:
    """What the command prints, run in miniature."""
    return run(name, "--miniature", "--out", out, *STUDIES.get(name, ()))


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark itself, for what can be asked of it without another process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module(request.param)
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(autouse=True)
def _committed_results_stay() -> Iterator[None]:
    before = {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    yield
    assert {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()} == before


def test_every_command_is_run_here() -> None:
    found = {path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert found == {*STUDIES, *MEASUREMENTS, "gpu"}


@pytest.mark.long
def test_what_a_gpu_has_to_show_runs_on_the_cpu_in_miniature(tmp_path: Path) -> None:
    """The first call leaves one part that failed and one that is missing, and the next one goes on there."""

    def command() -> str:
        options = ("--device", "cpu", "--miniature", "--minutes", "6", "--out", str(tmp_path))
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "gpu.py", *options], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout

    first = command()
    assert first.count(" ...\n") == 12
    assert first.count(" of double backward") == 3 * 2
    assert "not measured" not in first
    assert "| failed" not in first
    assert first.count(" of its passes") == 2 * (5 + 5 + 5 + 3)
    (tmp_path / "WRN-28-2-float32.json").rename(tmp_path / "kept.json")
    (tmp_path / "WRN-28-2-float32.log").write_text("what happened\n")
    again = run("gpu", "--table", tmp_path)
    assert "| WRN-28-2, float32 | failed: what happened | |" in again
    assert command().count(" ...\n") == 1


@pytest.mark.parametrize(
    "module",
    [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in MEASUREMENTS],
    indirect=True,
)
def test_a_measurement_prints_the_table_of_the_file_that_it_writes(module: ModuleType, tmp_path: Path) -> None:
    if module.__name__ == "fresh_adam":
        pytest.importorskip("transformers")
    out = tmp_path / "result.json"
    printed = miniature(module.__name__, out)
    table = module.table(json.loads(out.read_text()))
    assert printed.endswith(f"{table}\n")
    assert table.count("\n|") > 2
    if module.__name__ == "labels":
        assert "the same rows as numpy" in table
        assert json.loads(out.read_text())["phases"]["compare"]["balanced"]
    if module.__name__ == "rival_attribution":
        assert table.count("bergson | skipped: no --rival-python") == 2
    if module.__name__ == "long_paths":
        assert run("long_paths", "--miniature", "--out", out, "--again", "mlp", "4").count(" to ") == 5
    if module.__name__ == "modes":
        module.draw(json.loads(out.read_text()), tmp_path / "modes.png")
        assert (tmp_path / "modes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.parametrize("module", ["throughput"], indirect=True)
def test_two_checkouts_take_turns(module: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "against.json"
    printed = run("throughput", "--miniature", "--against", ROOT, "--turns", "2", "--rounds", "1", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(module.MINIATURE_SUBJECTS) * len(module.MODES)
    assert all(len(row[name]["seconds"]["floor"]) == 2 for row in rows for name in ("this", "other"))
    assert printed.endswith(module.table_beside({"rows": rows}) + "\n")


@pytest.mark.parametrize("module", ["attribution"], indirect=True)
def test_the_study_of_attribution_goes_on_where_it_was_stopped(module: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    miniature("attribution", out)
    before, (row,) = out.read_bytes(), module.read(out)
    assert {*row["scores"]} == {*module.METHODS}
    assert row["scores"]["attribute"]["0.01"][0] > 0.9
    miniature("attribution", out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("module", ["data_rater"], indirect=True)
def test_the_study_of_raters_goes_on_where_it_was_stopped(module: ModuleType, tmp_path: Path) -> None:
    """And every gradient is that of double backward, where double backward runs."""
    out = tmp_path / "rows.jsonl"
    miniature("data_rater", out)
    before, rows = out.read_bytes(), module.read(out)
    costs = {(row["way"], row["attention"]): row for row in rows if row["kind"] == "cost"}
    assert len(costs) == 8
    stopped = {where for where, row in costs.items() if "reason" in row}
    assert stopped == {(module.BY_HAND, "default"), (module.TORCHOPT, "default")}
    assert all(row["error"] < 0.02 for row in costs.values() if "error" in row)
    assert costs[module.FORWARD, "default"]["bytes"] < costs[module.BY_HAND, "math"]["bytes"]
    miniature("data_rater", out)
    assert out.read_bytes() == before


@pytest.mark.long
@pytest.mark.parametrize("module", ["hyperparameters"], indirect=True)
def test_the_study_of_hyperparameters_goes_on_where_it_was_stopped(module: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    miniature("hyperparameters", out)
    rows = module.read(out)
    for study in module.STUDIES:
        of_study = module.of_study(rows, study)
        assert [(row["arm"], row["final"]) for row in of_study[:2]] == [(arm, False) for arm in module.SETTINGS]
        assert [row["arm"] for row in of_study[2:]] == 2 * [module.UNTUNED, *module.SETTINGS]
        for row in of_study:
            assert ("test_loss" in row) == ("accuracy" in row) == row["final"]
        _, _, untuned, descent, searched, *_ = of_study
        # A training that is differentiated ends as one by plain PyTorch.
        assert descent["validation_loss"] == pytest.approx(untuned["validation_loss"], rel=1e-4)
        assert searched["seconds"] >= descent["seconds"]
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-3]))
    miniature("hyperparameters", out)
    assert module.read(out)[:-3] == rows[:-3]
    assert [row["arm"] for row in module.read(out)] == [row["arm"] for row in rows]


@pytest.mark.parametrize("module", ["hyperparameters"], indirect=True)
def test_the_study_of_hyperparameters_was_run_as_it_says(module: ModuleType) -> None:
    for study, seeds in module.SEEDS.items():
        rows = module.of_study(module.read(module.RAW), study)
        final = {(row["arm"], row["seed"]): row for row in rows if row["final"]}
        assert {*final} == {(arm, seed) for arm in (module.UNTUNED, *module.SETTINGS) for seed in seeds}
        for arm, settings in module.SETTINGS.items():
            tuned = len(module.TUNING_SEEDS[study])
            assert all(len(module.tuning(rows, arm, setting)) == tuned for setting in settings)
            assert {final[arm, seed]["setting"] for seed in seeds} == {module.chosen(rows, arm)}
        for seed in seeds:
            assert final["random search", seed]["seconds"] >= final["metagradients", seed]["seconds"]


@pytest.mark.parametrize(
    ("file", "mark", "module"),
    [
        ("benchmarks/results/attribution.md", "<!-- attribution:begin -->", "attribution"),
        ("benchmarks/results/rival_attribution.md", "<!-- rival_attribution:begin -->", "rival_attribution"),
        ("benchmarks/results/long_paths.md", "<!-- long_paths:begin -->", "long_paths"),
        ("benchmarks/results/harmful_pictures.md", "<!-- harmful_pictures:begin -->", "harmful_pictures"),
        ("benchmarks/results/data_rater.md", "<!-- data_rater:begin -->", "data_rater"),
        ("benchmarks/results/hyperparameters.md", "<!-- hyperparameters:begin -->", "hyperparameters"),
        ("benchmarks/results/hyperparameters.md", "<!-- schedule:begin -->", "hyperparameters"),
        ("benchmarks/results/step.md", "<!-- step:begin -->", "step"),
        ("benchmarks/results/silent.md", "<!-- silent:begin -->", "silent"),
    ],
    indirect=["module"],
)
def test_a_page_has_the_tables_of_the_rows(file: str, mark: str, module: ModuleType, tmp_path: Path) -> None:
    page, committed = tmp_path / "page.md", (ROOT / file).read_text()
    assert mark in committed
    page.write_text(committed)
    run(module.__name__, "--write", page)
    assert page.read_text() == committed, f"python benchmarks/{module.__name__}.py --write {file}"


@pytest.mark.parametrize("module", ["digits_study"], indirect=True)
def test_the_digits_study_goes_on_where_it_was_stopped_and_fills_in_the_page(
    module: ModuleType, tmp_path: Path
) -> None:
    out, page = tmp_path / "rows.jsonl", tmp_path / "results.md"
    miniature("digits_study", out)
    rows = module.read(out)
    assert len(rows) == 13 + 2 * 21
    for row in rows:
        assert ("test_accuracy" in row) == row["final"] == (row.get("selected") is False)
        assert ("validation_accuracy" in row) == (not row["final"])
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-2]))
    miniature("digits_study", out)
    assert [{**row, "seconds": 0} for row in module.read(out)] == [{**row, "seconds": 0} for row in rows]
    page.write_text("before\n<!-- digits:begin -->\n<!-- digits:end -->\nafter\n")
    run("digits_study", "--out", out, "--write", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| MPL, forward |") == 2
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", ["digits_study"], indirect=True)
def test_a_final_run_of_the_digits_study_is_blind_to_the_validation_images(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = module.Job("mpl", module.ENTRIES["mpl"].grid[0], 0, 2, final=True)
    size = module.MINIATURE
    told = module.one_run(job, size)
    task = module.drawn(0, 2, size)
    images, labels = task.validation
    others = module.dataclasses.replace(task, validation=(images.flip(0), labels.roll(1)))
    monkeypatch.setattr(module, "drawn", lambda *_: others)
    assert {**module.one_run(job, size), "seconds": 0} == {**told, "seconds": 0}


@pytest.mark.parametrize("module", ["label_noise"], indirect=True)
@pytest.mark.long
def test_the_study_of_label_noise_goes_on_where_it_was_stopped_and_fills_in_the_page(
    module: ModuleType, tmp_path: Path
) -> None:
    out, page = tmp_path / "label_noise.jsonl", tmp_path / "page.md"
    miniature("label_noise", out)
    rows = module.read(out)
    tuned = [name for name, entry in module.ENTRIES.items() if entry.grid]
    assert len(rows) == 5 * len(tuned) + 2 * 5 * len(module.ENTRIES)
    for row in rows:
        assert ("test_accuracy" in row) == ("finetuned_test_accuracy" in row) == row["final"]
        assert ("validation_accuracy" in row) == (not row["final"])
        problem = module.ENTRIES[row["method"]].problem  # reweighting remembers nothing of an example
        learned = row["method"] not in module.BASELINES and problem != "learning_to_reweight"
        assert ("auc" in row) == (row["final"] and learned)
        assert (row.get("auc_by_loss") is None) == (not row["final"] or row["condition"].startswith("imbalance"))
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-2]))
    miniature("label_noise", out)
    assert [{**row, "seconds": 0} for row in module.read(out)] == [{**row, "seconds": 0} for row in rows]
    page.write_text("before\n<!-- label_noise:begin -->\n<!-- label_noise:end -->\nafter\n")
    run("label_noise", "--out", out, "--write", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| MetaWeightNet |") == 4
    assert run("label_noise", "--out", out, "--table").strip() in text
    assert page.with_name("label_noise.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", ["label_noise"], indirect=True)
@pytest.mark.parametrize(
    "method",
    [
        "plain",
        "early_stopping",
        "meta_weight_net",
        "learning_to_reweight",
        "label_correction_permuted",
        "metagradient_descent",
    ],
)
def test_a_seed_of_the_study_of_label_noise_ends_beside_others_as_it_does_alone(
    module: ModuleType, method: str
) -> None:
    """So that the seeds of a run are independent of each other."""
    size, config = module.dataclasses.replace(module.MINIATURE, steps=30, warm=10), module.ENTRIES["plain"].grid[0]
    if method not in module.BASELINES:
        config = module.ENTRIES[module.ENTRIES[method].problem].grid[0]
    runs = []
    for seeds in ((3, 4), (4,)):
        runs.append(module.Run(module.Job(method, config, ("symmetric_40",), seeds, True), size))
        runs[-1].train()
    for both, alone in zip(runs[0].student.parameters(), runs[1].student.parameters(), strict=True):
        assert torch.allclose(both[1], alone[0], atol=1e-5)
        assert not torch.allclose(both[0], alone[0], atol=1e-3)


@pytest.mark.parametrize("module", ["label_noise"], indirect=True)
def test_the_matrices_of_several_seeds_are_the_library_s_one_for_each(module: ModuleType) -> None:
    logits, matrices = torch.randn(6, 10), torch.randn(2, 10, 10).softmax(-1)
    given = torch.arange(6)
    together = module.NoiseTransitions().inner_loss(logits, module.Signal(matrices), (None, given))
    alone = [
        module.NoiseTransition().inner_loss(z, module.Signal(matrix), (None, y))
        for z, matrix, y in zip(logits.split(3), matrices, given.split(3), strict=True)
    ]
    assert torch.allclose(together, torch.cat(alone))


@pytest.mark.parametrize("module", ["label_noise"], indirect=True)
def test_the_planted_noise_is_as_it_is_called(module: ModuleType) -> None:
    for condition in module.CONDITIONS:
        data = module.drawn(condition, 7)
        kind, percent = condition.split("_")
        if kind == "imbalance":
            counts = data.given.bincount(minlength=10).sort().values.tolist()
            assert (counts[0], counts[-1], bool(data.wrong.any())) == (5, 100, False)
        else:
            assert abs(float(data.wrong.double().mean()) - int(percent) / 100) < 0.05
        assert data.clean[1].bincount().tolist() == [10] * 10


@pytest.mark.parametrize("module", ["suspects"], indirect=True)
@pytest.mark.long
def test_the_study_of_suspects_goes_through_the_command(module: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    printed = miniature("suspects", out)
    rows = module.read(out)
    assert [(row["method"], row["listed"], row["wrong"]) for row in rows] == [
        ("example_weights", 60, 6),
        ("plain", 60, 6),
    ]
    assert printed == f"{module.table(rows)}\n"


@pytest.mark.parametrize("module", ["harmful_pictures"], indirect=True)
@pytest.mark.long
def test_the_study_of_harmful_pictures_goes_through_the_commands(module: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    printed, (row,) = miniature("harmful_pictures", out), module.read(out)
    assert row["lists"].keys() == module.LISTS.keys()
    assert row["lists"]["`metapl attribute`, score"][0] > 0.6
    assert miniature("harmful_pictures", out) == printed == f"{module.table([row])}\n"
    assert module.quality({"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.0}, {"a", "b"}) == (0.75, 1.0)


@pytest.mark.parametrize("module", ["tables"], indirect=True)
def test_the_comparison_on_tables_goes_on_where_it_was_stopped_and_fills_in_the_page(
    module: ModuleType, tmp_path: Path
) -> None:
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    printed, rows = miniature("tables", out), module.read(out)
    assert [(row["labels"], row["seed"]) for row in rows] == [(kind, seed) for seed in (0, 1) for kind in module.OWN]
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-1]))
    assert miniature("tables", out) == printed
    page.write_text("before\n<!-- tables:begin -->\n<!-- tables:end -->\nafter\n")
    run("tables", "--out", out, "--write", page)
    assert printed.strip() in page.read_text()
    assert page.read_text().endswith("\nafter\n")


@pytest.mark.parametrize("module", ["when"], indirect=True)
def test_the_study_of_when_feedback_helps_goes_on_where_it_was_stopped_and_fills_in_the_page(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "when.jsonl", tmp_path / "page.md"
    marks = [f"<!-- {name}:{end} -->\n" for name in ("when", "feedback-worth") for end in ("begin", "end")]
    page.write_text(f"before\n{''.join(marks)}after\n")

    def command(*options: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["when", "--out", str(out), *map(str, options)])
        module.main()

    command("--miniature")
    rows = module.read(out)
    assert sum(not row["final"] for row in rows) == len(module.GRIDS)
    ran = [arm for arm in module.ARMS if arm.lookahead <= module.LONGEST]
    assert [module.arm_of(row) for row in rows if row["final"]] == ran
    for row in rows:
        assert ("teacher" in row) == ("labels_right" in row) == row["final"]
        assert len(row["student"]) == len(row["finetuned"]) == len(row["seeds"]) == (2 if row["final"] else 1)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-2]))
    command("--miniature")
    assert [{**row, "seconds": 0} for row in module.read(out)] == [{**row, "seconds": 0} for row in rows]
    command("--write", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| feedback, ratio to the own loss |") == 2 * 3 + 1
    assert text.count("\n| feedback alone |") == 3
    assert text.count("| Meta Pseudo Labels |") == len(module.PLACES)
    assert text.count("Primary test (2 labels a class, equal frequencies)") == 1
    assert "Arms in the list that were not run: ahead (K = 5, 300 teacher steps): 2;" in text
    for name in ("when.png", "feedback_worth.png"):
        assert page.with_name(name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", ["when"], indirect=True)
def test_every_arm_of_that_study_has_a_control_that_saw_the_same(module: ModuleType) -> None:
    silent = {arm.group: arm for arm in module.ARMS if arm.method.split()[0] in ("none", "fixed") and not arm.of_worth}
    for arm in module.ARMS:
        where, rules = module.GRIDS[arm.tuned]
        if arm.of_worth:
            assert len(rules) == 8
            continue
        assert arm.group in silent
        assert (where.condition == "right") == (arm.condition == "right")
        assert {len(module.GRIDS[other.tuned][1]) for other in (arm, silent[arm.group])} <= {len(rules)}
        assert all(rule.alteration is None for rule in rules)
    tuning, final = zip(*module.SEEDS.values(), strict=True)
    assert not {*sum(final[:2], ())} & {*sum(tuning[:2], ()), *range(20)}


@pytest.mark.parametrize("module", ["when"], indirect=True)
def test_the_labels_that_a_teacher_learns_before_are_as_wrong_as_they_are_called(module: ModuleType) -> None:
    data = module.drawn(4, (100, 101))
    for x, y, seed in zip(*data.unlabeled, (100, 101), strict=True):
        for condition in ("asymmetric", "style"):
            pictures, given = module.wrongly_labeled(condition, x, y, seed)
            assert pictures is x
            for c in range(10):
                wrong = given[y == c] != c
                assert abs(float(wrong.double().mean()) - 0.3) < 0.01
                assert set(given[y == c][wrong].tolist()) == {(c + 1) % 10}
        pictures, given = module.wrongly_labeled("half", x, y, seed)
        assert given.bincount().tolist() == [50] * 10
        # One end of a class: its pictures are nearer to each other than those of the class are.
        kept, all_of_it = pictures[given == 3], x[y == 3]
        assert float(kept.var(0).sum()) < 0.95 * float(all_of_it.var(0).sum())


@pytest.mark.parametrize("module", ["text_feedback"], indirect=True)
def test_the_study_of_a_text_goes_on_where_it_was_stopped_and_fills_in_the_page(
    module: ModuleType, tmp_path: Path
) -> None:
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    miniature("text_feedback", out)
    rows = module.read(out)
    assert [row["part"] for row in rows] == 5 * ["look"] + 4 * ["tuning"] + 4 * ["final"]
    best = module.chosen(rows)
    for row in rows:
        assert ("student_test" in row) == (row["part"] == "final") != ("student_validation" in row)
        assert bool(row["looks"]) == (
            (row["part"], row["arm"], row["settings"]["mode"]) == ("look", module.NEW, "forward")
        )
        if (row["part"], row["arm"]) == ("final", "tuned"):
            assert module.Settings(**row["settings"]) == best[row["settings"]["mode"]]
        if row["settings"]["ratio"] is not None:
            assert row["feedback_ratio"] == pytest.approx(row["settings"]["ratio"], rel=1e-3)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-2]))
    miniature("text_feedback", out)
    assert [{**row, "seconds": 0} for row in module.read(out)] == [{**row, "seconds": 0} for row in rows]
    page.write_text("before\n<!-- text:begin -->\n<!-- text:end -->\nafter\n")
    run("text_feedback", "--out", out, "--write", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    for name in ("as it is", module.NEW, f"*test texts:* {module.NEW}", "*test texts:* tuned"):
        assert text.count(f"\n| {name} |") == 1


@pytest.mark.parametrize("module", ["text_feedback"], indirect=True)
def test_the_texts_have_equal_classes_and_do_not_name_their_packages(module: ModuleType) -> None:
    texts = module.texts
    data, _ = texts.corpus(True)
    for part, (x, y) in data.items():
        assert y.bincount().tolist() == len(texts.PACKAGES) * [texts.SPLIT[part] // 10]
        assert x.shape[1] == texts.LENGTH
        assert int(x.max()) < texts.SIZE
        assert bool((x == texts.MASK).any())
    assert texts.words_of("Like NumPy's np_sum(12)") == [
        "like",
        "[mask]",
        "'",
        "s",
        "[mask]",
        "sum",
        "(",
        "1",
        "2",
        ")",
    ]


@pytest.mark.long
@pytest.mark.parametrize("module", ["student_or_mpl"], indirect=True)
def test_noisy_student_beside_mpl_fills_in_the_page(module: ModuleType, tmp_path: Path) -> None:
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    miniature("student_or_mpl", out)
    rows = module.read(out)
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for seed in (0, 1) for method in module.COMPARED
    ]
    for seed in (0, 1):  # the same first teacher, and the same cost but for a step
        assert len({row["first_teacher"] for row in rows if row["seed"] == seed and "first_teacher" in row}) == 1
    page.write_text("before\n<!-- student-or-mpl:begin -->\n<!-- student-or-mpl:end -->\nafter\n")
    run("student_or_mpl", "--out", out, "--write", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("\n| Noisy Student |") == text.count("\n| Meta Pseudo Labels, unlabeled") == 1


@pytest.mark.parametrize("module", ["noisy_student"], indirect=True)
def test_the_studies_of_noisy_student_go_on_where_they_were_stopped_and_fill_in_the_page(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "noisy_student.jsonl", tmp_path / "page.md"
    page.write_text("before\n<!-- noisy-student-studies:begin -->\n<!-- noisy-student-studies:end -->\nafter\n")

    def command(*options: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["noisy_student", "--out", str(out), *map(str, options)])
        module.main()

    command("--miniature")
    rows = module.read(out)
    assert sum(row["final"] for row in rows) == len(module.ARMS)
    assert len(rows) - len(module.ARMS) == len(module.RATES) * len(module.DROPOUTS)
    for row in rows:
        assert ("test" in row) == row["final"] != ("validation" in row)
        assert len(row["test" if row["final"] else "validation"]) == len(row["seeds"]) == (2 if row["final"] else 1)
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-2]))
    command("--miniature")
    assert [{**row, "seconds": 0} for row in module.read(out)] == [{**row, "seconds": 0} for row in rows]
    command("--write", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    for study, arms in module.STUDIES.items():
        assert f"**{'Noise' if study == 'noise' else f'Study {study}'}" in text
        assert all(f"\n| {name} |" in text for name in arms)
    assert page.with_name("noisy_student.png").read_bytes().startswith(b"\x89PNG")


def test_a_miniature_does_not_take_the_place_of_the_committed_result() -> None:
    command = [sys.executable, str(BENCHMARKS / "digits_study.py"), "--miniature"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "give it another file by --out FILE" in done.stderr
