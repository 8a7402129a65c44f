"""The tables of the documentation are those that the raw files give."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from metapl.metrics import paired_test

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
STUDENT, FINETUNED = "test_accuracy", "finetuned_test_accuracy"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import digits_tables

    yield digits_tables
    for name in (
        "digits_tables",
        "digits_study",
        "label_noise",
        "label_noise_tables",
        "noisy_student",
        "noisy_student_tables",
        "student_or_mpl",
        "suspects",
        "when",
        "when_tables",
        "figures",
        "machine",
    ):
        sys.modules.pop(name, None)


def shown(name: str) -> str:
    """What stands between the marks of a name, on whichever page."""
    (page,) = [text for path in PAGE.parent.glob("*.md") if f"<!-- {name}:begin -->" in (text := path.read_text())]
    return page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


def test_the_page_shows_the_table_of_the_raw_rows(tables: object) -> None:
    import digits_study

    assert shown("digits") == tables.block(digits_study.read())


def test_every_method_was_tuned_alike_and_the_test_set_opened_for_final_runs_alone(tables: object) -> None:
    import digits_study

    rows = digits_study.read()
    best = digits_study.chosen(rows)
    for row in rows:
        assert ("test_accuracy" in row) == row["final"]
        assert not row["final"] or row["config"] == best[row["method"]]
    for name, entry in digits_study.ENTRIES.items():
        tuning = [row for row in rows if row["method"] == name and not row["final"]]
        assert len(tuning) == (60 if entry.grid else 0)
        assert not {row["seed"] for row in tuning} & set(digits_study.FULL.seeds)
        for labels in (2, 4) if name in digits_study.AT_FOUR else (2,):
            final = [r for r in rows if r["method"] == name and r["final"] and r["labels_per_class"] == labels]
            assert sorted(row["seed"] for row in final) == list(digits_study.FULL.seeds)


def test_the_page_on_what_to_try_shows_the_tables_of_the_text_and_quotes_those_of_the_digits(tables: object) -> None:
    import text_feedback as study

    rows = study.read(study.RAW)
    assert shown("text") == study.table(rows)
    assert len({(row["encoder"], row["text"]) for row in rows}) == 1
    assert len({len(grid) for grid in study.GRIDS.values()}) == 1
    for row in rows:
        assert ("student_test" in row) == (row["part"] == "final")
        assert row["seed"] in study.SEEDS[row["part"]]
    assert len(set().union(*study.SEEDS.values())) == sum(map(len, study.SEEDS.values()))
    page = (PAGE.parent / "no-help.md").read_text()
    said, text = (
        " ".join(page.split("## On a text")[0].split()),
        " ".join(PAGE.with_name("when.md").read_text().split()),
    )
    quoted = re.findall(r"\d+\.\d points \(p = [^)]+\)", said)
    assert len(quoted) >= 6
    assert all(one in text for one in quoted)
    seen = page.split("all else the defaults of `BilevelTrainer`")[1].split("<!-- text:begin -->")[0]
    known = f"{shown('text')} 0.001 0.003"  # and the rates
    for arm in (study.NEW, "tuned"):
        none, forward = study.paired(rows, "final", arm)
        gained = study.gain(*([row["labels_right"] for row in side] for side in (forward, none)))
        known += " {} ({})".format(*gained)
        times = study.mean(forward, "seconds") / study.mean(none, "seconds")
        assert f"{times:.1f} times " in page.split("**What was not tried**")[1]
    assert all(number in known for number in re.findall(r"[+-]?\d+\.\d+", seen))
    cosines = [row["looks"]["as it is"][at][2] for row in rows if row["looks"] for at in (0, 1)]
    assert min(cosines) < 0 < 0.95 < max(cosines)
    assert all(row["looks"]["other labels in the outer batch"][0][2] > 0.9 for row in rows if row["looks"])
    for module in ("text_feedback", "text_corpus"):
        sys.modules.pop(module)


def test_the_pages_show_the_tables_of_the_classifiers_and_of_a_fresh_adam(tables: object) -> None:
    import json

    import fresh_adam
    import tables as classifiers

    assert shown("tables") == classifiers.table(classifiers.read(classifiers.RAW))
    assert shown("fresh_adam") == fresh_adam.table(json.loads(fresh_adam.RESULT.read_text()))
    for module in ("fresh_adam", "tables"):
        sys.modules.pop(module)


def prose() -> str:
    """The page without its line breaks."""
    return " ".join(PAGE.read_text().split())


def test_the_page_shows_the_table_of_throughput(tables: object) -> None:
    import json

    import throughput

    assert shown("throughput") == throughput.table(json.loads((ROOT / throughput.RESULT).read_text()))
    for name in ("throughput", "modes"):
        sys.modules.pop(name)


def test_the_differences_on_digits_that_the_page_speaks_of_are_those_of_the_rows(tables: object) -> None:
    import digits_study
    from figures import difference

    rows = digits_study.read()

    def of(labels: int, first: str, second: str, read_out: str = STUDENT, other: str | None = None) -> str:
        """By how much the first is better, in the words of the page."""
        mine = tables.column(rows, first, labels, read_out)
        points, p = difference(mine, tables.column(rows, second, labels, other or read_out))
        assert points.startswith("+")
        return f"{points[1:]} points (p = {p})"

    assert {tables.better_control(rows, labels)[0] for labels in (2, 4)} == {FINETUNED}
    control = [of(labels, "mpl", "none", other=FINETUNED) for labels in (2, 4)]
    assert f"student gains {control[0]} at 2 labels a class and {control[1]} at 4" in prose()
    students = [of(labels, "mpl", "none") for labels in (2, 4)]
    assert f"before finetuning, it gains {students[0]} and {students[1]}:" in prose()
    assert f"{of(2, 'difference', 'mpl')} between `forward` and `difference`" in prose()
    assert f"with random signs it does {of(2, 'mpl', 'random_sign')} worse" in prose()
    assert f"{of(4, 'pseudo_labels', 'mpl', FINETUNED)} better at 4" in prose()


def test_the_page_on_wrong_labels_shows_the_tables_of_the_raw_rows(tables: object) -> None:
    import label_noise
    import label_noise_tables
    import suspects

    assert shown("label_noise") == label_noise_tables.block(label_noise.RAW)
    assert shown("suspects") == suspects.table(suspects.read(suspects.RAW))


def test_the_study_of_label_noise_was_run_as_it_says(tables: object) -> None:
    import label_noise

    rows, seeds = label_noise.read(), set(label_noise.FULL.seeds)
    final: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        method, condition = row["method"], row["condition"]
        assert ("test_accuracy" in row) == row["final"]
        assert (row["seed"] in seeds) == row["final"]
        if row["final"]:
            assert row["config"] == label_noise.chosen(rows, method, condition)
            final.setdefault((method, condition), set()).add(row["seed"])
    assert final == {(name, condition): seeds for name in label_noise.ENTRIES for condition in label_noise.CONDITIONS}
    for name, entry in label_noise.ENTRIES.items():
        tuning = [row for row in rows if row["method"] == name and not row["final"]]
        assert len(tuning) == len(entry.grid) * 2 * 5
        assert len(entry.grid) in (0, 4)


def test_what_the_page_on_wrong_labels_says_is_what_the_rows_say(tables: object) -> None:
    import label_noise
    import label_noise_tables as made

    rows, text = label_noise.read(), " ".join((PAGE.parent / "label-noise.md").read_text().split())
    said = text.partition("<!-- label_noise:begin -->")[0]

    def against(first: str, second: str, condition: str, read_out: str = STUDENT) -> str:
        points, _, p = made.difference(rows, first, second, condition, read_out).partition(" (")
        return f"{points.removeprefix('+')} points (p = {p.removesuffix(')')})"

    permuted = [against("example_weights", "example_weights_permuted", name) for name in label_noise.CONDITIONS]
    for figure in permuted:
        assert figure in said, figure
    reweighted = [
        against("learning_to_reweight", "learning_to_reweight_permuted", name) for name in label_noise.CONDITIONS
    ]
    for figure in reweighted:
        assert figure in said, figure
    names = {"learning_to_reweight": "LearningToReweight", "example_weights": "ExampleWeights"}
    for method, name in {**names, "noise_transition": "NoiseTransition"}.items():
        gain = against(method, "plain", "asymmetric_40").partition(" points")[0]
        assert f"`{name}` {gain}" in said.replace(" gains", ""), name
    for method in ("label_correction", "noise_transition"):
        assert against(method, f"{method}_permuted", "asymmetric_40") in said
    cells = {
        (name, condition): paired_test(made.column(rows, name, condition, FINETUNED), made.best_plain(rows, condition))
        for name, condition in itertools.product(made.BILEVEL, label_noise.CONDITIONS)
    }
    holm: dict[tuple[str, str], float] = {}
    for left, cell in zip(range(30, 0, -1), sorted(cells, key=lambda cell: cells[cell].p), strict=True):
        holm[cell] = max([left * cells[cell].p, *holm.values()])
    first, second, third = (
        ("meta_weight_net", "symmetric_40"),
        ("example_weights", "symmetric_40"),
        ("noise_transition", "asymmetric_40"),
    )
    assert [cell for cell in cells if holm[cell] < 0.05 and cells[cell].mean > 0] == [first]
    assert f"{100 * cells[first].mean:.1f} ± 0.3 points (p = {cells[first].p:.1g}, Holm {holm[first]:.1g})" in said
    assert f"{100 * cells[second].mean:.1f} ± 0.3 there (Holm {holm[second]:.1g})" in said
    assert f"{100 * cells[third].mean:.1f} ± 0.3 at asymmetric noise (p = {cells[third].p:.1g}," in said
    assert f"Holm {holm[third]:.2g})" in said
    gain = against("meta_weight_net", "plain", "symmetric_40").partition(" ±")[0]
    assert f"Its {gain} at 40 %" in said
    for other, conditions in {
        "plain": ("symmetric_60",),
        "example_weights": ("symmetric_60",),
        "example_weights_long": ("symmetric_60",),
        "metagradient_descent_permuted": ("symmetric_40", "symmetric_60", "asymmetric_40", "imbalance_20"),
    }.items():
        for condition in conditions:
            assert against("metagradient_descent", other, condition) in said
    for first, second, condition in (
        ("example_weights", "metagradient_descent", "symmetric_20"),
        ("example_weights", "metagradient_descent", "symmetric_40"),
        ("plain", "metagradient_descent", "imbalance_20"),
    ):
        assert against(first, second, condition) in said


def test_the_page_on_stored_labels_shows_the_table_of_the_raw_file(tables: object) -> None:
    import json

    import labels

    assert shown("labels") == labels.table(json.loads(labels.RESULT.read_text()))
    sys.modules.pop("labels")


def test_the_page_on_modes_shows_the_table_of_a_step(tables: object) -> None:
    import json

    import step

    assert shown("step") == step.table(json.loads(step.RESULT.read_text()))
    sys.modules.pop("step")


def test_the_page_on_reduced_mpl_shows_the_table_of_the_raw_file(tables: object) -> None:
    import json

    import reduced

    assert shown("reduced") == reduced.table(json.loads(reduced.RESULT.read_text()))
    sys.modules.pop("reduced")


def test_the_pages_on_peers_and_endurance_show_the_tables_of_the_raw_files(tables: object) -> None:
    import json

    import endurance
    import peers

    assert shown("peers") == peers.table(json.loads(peers.RESULT.read_text()))
    assert shown("endurance") == endurance.table(json.loads(endurance.RESULT.read_text()))
    for name in ("endurance", "peers"):
        sys.modules.pop(name)


def test_the_page_on_several_processes_shows_the_tables_of_the_raw_file(tables: object) -> None:
    import json

    import scale

    assert shown("scale") == scale.table(json.loads(scale.RESULT.read_text()))
    sys.modules.pop("scale")


def test_every_table_that_is_marked_is_compared_with_its_raw_file() -> None:
    others = [
        page for page in (ROOT / "docs").rglob("*.md") if page.name != "pictures.md"
    ]  # tests/apps/test_picture_runs.py
    pages = "".join(page.read_text() for page in others)
    marked = set(re.findall(r"<!-- (\w+):begin -->", pages))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f'shown("{name}")' in tests or f"<!-- {name}:begin -->" in tests for name in marked)


def test_the_page_on_when_feedback_helps_shows_the_tables_of_the_raw_rows(tables: object) -> None:
    import when
    import when_tables

    assert shown("when") == when_tables.block(when.read())


def test_the_study_of_what_feedback_is_worth_was_run_as_it_says_and_the_pages_have_its_figures(tables: object) -> None:
    import when
    import when_tables

    rows = when.read()
    assert shown("feedback-worth") == when_tables.worth_block(rows)
    found = when_tables.places(when_tables.collected(rows))
    study = [*found.values()]
    assert [*found] == ["2 labels a class, equal frequencies", *([*found][1:])]
    assert len(study) == len(when.PLACES) == 4
    gap, p = re.search(r"other arm: (\S+) points .*p = (\S+),", when_tables.primary(study[0])).groups()  # type: ignore[union-attr]
    pages = (
        " ".join((ROOT / "README.md").read_text().split()),
        " ".join((ROOT / "docs" / "when.md").read_text().split()),
    )
    assert f"{gap} points (95 % -2.0 to -0.0, p = {p})" in pages[0]
    assert f"{gap.removeprefix('-')} points (p = {p}) *behind* it" in pages[1]

    def above(place: int, first: str, second: str) -> float:
        d = np.subtract(*(study[place][name].accuracy for name in (first, second)))
        return 100 * float(d.mean())

    others = [[above(place, "mpl", name) for name in ("uda", "fixmatch", "none")] for place in range(4)]
    two, four, two_uneven, four_uneven = ([f"{gain:.1f}" for gain in gains] for gains in others)
    assert f"MPL is {two[0]} points above UDA, {two[1]} above FixMatch and {two[2]} above the same loop" in pages[1]
    assert f"it is {two_uneven[0]}, {two_uneven[1]} and {two_uneven[2]} above them" in pages[1]
    assert f"At 4 labels it is {four[0]} and {four_uneven[0]} above UDA" in pages[1]
    assert f"FixMatch ({four[1]} and {four_uneven[1]}) or that loop ({four[2]} and {four_uneven[2]})" in pages[1]
    behind = [above(place, "none_aligned", "mpl_aligned") for place in range(4)]
    assert f"it is {min(behind):.1f} to {max(behind):.1f} points below the same loop" in pages[1]
    ahead = [above(place, "uda_aligned", "mpl") for place in range(4)]
    assert (
        f"(MPL is {ahead[0]:.1f} below), and is {min(ahead[1:]):.1f} to {max(ahead[1:]):.1f} points ahead" in pages[1]
    )
    late = [arms["late"].accuracy for arms in study]
    medians = [100 * np.median(np.subtract(arms["mpl"].accuracy, arms["late"].accuracy)) for arms in study]
    assert "the medians are {:.1f}, {:.1f}, {:.1f} and {:.1f} points".format(*medians) in pages[1]
    assert [sum(value < 0.5 for value in values) for values in late] == [0, 1, 1, 1]

    def seconds(name: str) -> float:
        return sum(arms[name].row["seconds"] for arms in study)

    more = [seconds(name) / seconds("mpl") for name in study[0] if name not in ("mpl", *when_tables.AFTER)]
    assert f"the other arms took {min(more):.1f} to {max(more):.1f} times MPL's seconds" in pages[1]
    beside = f"the push {seconds('push') / seconds('mpl'):.1f}, MPL with aligned UDA"
    assert f"{beside} {seconds('mpl_aligned') / seconds('mpl'):.2f}. That is" in pages[1]
    for arms in study:
        picked = {name: when.Rule(**arms[name].row["rule"]) for name in ("push", "fixmatch", "mpl")}
        assert (picked["push"].size, picked["fixmatch"].threshold, picked["mpl"].size) == (0.1, 0.8, 1.0)


def test_the_study_of_when_feedback_helps_was_run_as_it_says(tables: object) -> None:
    import when

    rows = when.read()
    final = {when.arm_of(row): row for row in rows if row["final"]}
    assert set(final) == set(when.ARMS)
    assert len(final) == sum(row["final"] for row in rows)
    for arm, row in final.items():
        assert when.Rule(**row["rule"]) == when.rule_of(arm, rows)
    for name, (arm, rules) in when.GRIDS.items():
        tuning = [row for row in rows if row["tuned"] == name and not row["final"]]
        assert {when.arm_of(row) for row in tuning} == {arm}
        assert sorted(str(when.Rule(**row["rule"])) for row in tuning) == sorted(map(str, rules))
    for row in rows:
        seeds = when.Size().seeds(when.arm_of(row), row["final"])
        assert tuple(row["seeds"]) == seeds
        assert row["steps_run"] == row["steps"]
        assert len(row["student"]) == len(row["finetuned"]) == len(seeds)
        assert ("teacher" in row) == row["final"]


def test_what_the_page_on_when_feedback_helps_says_is_what_the_rows_say(tables: object) -> None:
    import when
    import when_tables
    from figures import difference, points

    found = when_tables.collected(when.read())
    said = " ".join((PAGE.parent / "when.md").read_text().split()).partition("<!-- when:begin -->")[0]

    def arm(method: str, condition: str = "right", labels: int = 2, steps: int = 1500) -> when_tables.Found:
        place = (condition, labels, steps, 64, 1, 1, 0.0)
        (one,) = [found[a] for a in found if a.method == method and a.group == place and not a.of_worth]
        return one

    def of(first: when_tables.Found, second: when_tables.Found, read_out: str | None = None) -> str:
        """By how much the first is above the second, by their better read-outs or by the one that is named."""
        pair = [each.accuracy if read_out is None else each.row[read_out] for each in (first, second)]
        gain, p = difference(*pair)
        assert gain.startswith("+")
        return f"{gain[1:]} points (p = {p})"

    def share(each: when_tables.Found, name: str) -> str:
        return f"{points(each.row[name]):.1f} %"

    true, none, zero, ratio = arm("gradient"), arm("none"), arm("gradient zero"), arm("ratio")
    assert f"raises the student by {of(true, none, 'student')}, and is {of(true, none)} above the control's" in said
    four = arm("gradient", labels=4), arm("none", labels=4)
    assert f"At 4 labels a class these are {of(*four, 'student')} and {of(*four)}." in said
    assert f"the feedback is then {of(true, zero)} above it" in said
    parts = {how: arm(f"gradient {how}") for how in when.ALTERATIONS}
    assert f"the mean of h over the batch, is {of(parts['class_means'], none)} above the control" in said
    assert f"rows of other examples {of(parts['permuted'], none)}, and the signs {of(parts['sign'], none)}" in said
    assert f"without that mean is {of(none, parts['rest'])} below the control and {of(true, parts['rest'])}" in said
    assert f"With random signs it is {of(true, parts['random_sign'])} below the true feedback" in said
    assert f"negated it leaves {share(parts['negated'], 'student')} right" in said
    errors = [share(each, "frequency_error") for each in (none, zero, true)]
    assert f"{errors[0]} of the unlabeled images in the control, for {errors[1]} without feedback" in said
    assert f"and for {errors[2]} with it" in said
    balance = arm("ratio balance")
    assert (
        f"raises the student by {of(balance, none, 'student')}; feedback of that size is {of(ratio, balance)}" in said
    )
    rights = [share(each, "labels_right") for each in (balance, ratio)]
    assert f"the push leaves {rights[0]} of the teacher's labels right, the feedback {rights[1]}" in said

    fixed, alone, own, both = (arm(method, "style", 4) for method in when.WRONG)
    assert f"from {share(fixed, 'labels_right')} right to {share(alone, 'labels_right')}" in said
    assert f"its student gains {of(alone, fixed, 'student')}" in said
    altered = {how: arm(f"alone {how}", "style", 4) for how in when.ALTERATIONS_OF_WRONG}
    assert f"rows of other examples it is {of(alone, altered['permuted'])} worse" in said
    assert f"mean over the batch {of(alone, altered['class_means'])}" in said
    assert f"does as well ({of(altered['own_class_means'], alone)} better)" in said
    assert f"what these means leave is {of(alone, altered['within_class'])} worse" in said
    assert f"finetuned student, the feedback alone gains {of(alone, fixed)}" in said
    assert f"The teacher's own loss on the same labels is {of(own, alone)} better" in said
    assert f"Both together are {of(both, own)} better than that loss alone, and {of(both, fixed)}" in said

    methods = ("none", "gradient zero", "gradient", "learning_rate")
    none, zero, dying, alive = (arm(method, steps=6000) for method in methods)
    assert f"its student is {of(dying, none, 'student')} above the control's student, and {of(dying, none)}" in said
    assert f"{of(dying, zero)} above what the same rates do without feedback" in said
    assert f"it is {of(alive, none)} above the control, and {of(alive, dying)} above feedback that dies" in said

    long = [arm(method, steps=24000) for method in ("none", "gradient", "learning_rate")]
    assert f"these are {of(long[1], long[0], 'student')} and {of(long[1], long[0])}. So" in said
    assert difference(long[0].accuracy, none.accuracy)[0].startswith("-")
    assert f"after 24,000 it is {of(long[2], long[1])} above it" in said
    four = {steps: [arm(m, labels=4, steps=steps) for m in ("gradient", "none", "ratio")] for steps in (6000, 24000)}
    assert f"is {of(*four[6000][:2])} above the control's better read-out after 6,000 steps" in said
    assert f"and {of(*four[24000][:2])} after 24,000: there" in said
    dying, none, kept = four[24000]
    assert f"own loss is {of(kept, dying)} above the one that dies, and {of(kept, none)} above the control" in said

    fixed, alone, own, both = (arm(method, "asymmetric", 4) for method in when.WRONG)
    altered = {how: arm(f"alone {how}", "asymmetric", 4) for how in when.ALTERATIONS_OF_WRONG}
    assert f"student gains {of(alone, fixed, 'student')} from the feedback alone, and it is {of(alone, fixed)}" in said
    others = [of(alone, altered[how]) for how in ("permuted", "class_means")]
    assert f"Rows of other examples are {others[0]} worse and the mean over the batch {others[1]};" in said
    assert f"the means by the teacher's class are {of(altered['own_class_means'], alone)} better" in said
    assert f"Own loss and feedback together are {of(both, own)} better" in said
    fixed, alone, own, both = (arm(method, "half", 4) for method in when.WRONG)
    assert f"its labels go from {share(fixed, 'labels_right')} right to {share(alone, 'labels_right')}" in said
    assert f"the student gains {of(alone, fixed, 'student')}, but" in said
    assert f"the feedback alone is {of(alone, fixed)} above it, both together {of(both, fixed)}" in said

    def apart(method: str, outer: int = 64, K: int = 1, steps: str = "student steps") -> when_tables.Found:
        (one,) = [
            found[a]
            for a in found
            if a.method in (method, f"{method} as many {steps}")
            and a.part in ("outer", "ahead")
            and (a.outer, a.lookahead) == (outer, K)
        ]
        return one

    outer = {size: of(apart("gradient", size), apart("none", size)) for size in when.OUTER}
    assert f"With 16 labeled images in a batch the feedback is {outer[16]}" in said
    assert f"with 64 it was {of(true, arm('none'))}, with 256 it is {outer[256]}" in said
    ahead = {K: of(apart("none", K=K), apart("gradient", K=K)) for K in when.AHEAD}
    assert (
        f"the feedback is {ahead[2]} below the control at K = 2, {ahead[5]} at K = 5 and {ahead[10]} at K = 10" in said
    )
    kept = {K: [apart(m, K=K, steps="teacher steps") for m in ("gradient", "none")] for K in when.AHEAD}
    more = {K: of(*pair) for K, pair in kept.items()}
    assert f"it is {more[2]} above the control at K = 2, {more[5]} at K = 5 and {more[10]} at K = 10" in said
    assert f"at K = 5 the student is {of(arm('gradient', steps=6000), kept[5][0])} below that one" in said
    chosen, _ = when.chosen(when.read(), "gradient")
    assert (chosen.student_lr, chosen.teacher_lr, chosen.size) == (1.0, 0.06, 1.0)


def test_the_page_on_the_studies_of_noisy_student_shows_the_tables_of_the_raw_rows(tables: object) -> None:
    import noisy_student
    import noisy_student_tables

    assert shown("noisy-student-studies") == noisy_student_tables.block(noisy_student.read())


def test_the_studies_of_noisy_student_were_run_as_they_say(tables: object) -> None:
    import noisy_student

    rows = noisy_student.read()
    final = [row for row in rows if row["final"]]
    assert [row["arm"] for row in final] == [dataclasses.asdict(arm) for arm in noisy_student.ARMS]
    grid = {(row["lr"], row["dropout"]) for row in rows if not row["final"]}
    assert grid == {(lr, dropout) for lr in noisy_student.RATES for dropout in noisy_student.DROPOUTS}
    for row in rows:
        seeds = noisy_student.FULL.seeds if row["final"] else noisy_student.FULL.tuning_seeds
        assert tuple(row["seeds"]) == seeds
        if row["final"]:
            assert (row["lr"], row["dropout"]) == noisy_student.tuned(rows)
            assert len(row["test"]) == len(seeds) >= 10


def test_the_papers_figures_beside_the_studies_of_noisy_student(tables: object) -> None:
    """Each has an arm here, and each arm but those that are marked has a figure."""
    import noisy_student
    import noisy_student_tables

    for study, printed in noisy_student_tables.PAPER.items():
        arms = noisy_student.STUDIES[study]
        assert printed.keys() <= arms.keys()
        without = {name for name in arms if name not in printed}
        # Curves that are lost, supervised networks that a table leaves out, and ratios that it does not have.
        expected = {"3": {*arms}, "4": {f"supervised {width}" for width in (16, 32, 64, 128)}}
        expected["7"] = {"width 16: 7:1", "width 128: 7:1"}
        assert without == expected.get(study, set())
        for name in arms:
            other = noisy_student_tables.reference(study, name)
            assert other is None or other in arms


def test_what_the_page_on_the_studies_of_noisy_student_says_is_what_the_rows_say(tables: object) -> None:
    import noisy_student
    import noisy_student_tables
    from figures import difference

    found = noisy_student_tables.accuracies(noisy_student.read())
    verdicts = {
        (each.study, each.name): each.verdict for each in noisy_student_tables.comparisons(noisy_student.read())
    }
    said = " ".join((PAGE.parent / "noisy-student-studies.md").read_text().split()).partition("## What differs")[0]

    def of(study: str, first: str, second: str) -> tuple[str, str]:
        return difference(found[study][first], found[study][second])

    def with_p(pair: tuple[str, str]) -> str:
        return f"{pair[0]} (p = {pair[1]})"

    widths = noisy_student.WIDTHS
    best = {width: of("1", f"width {width}: best teacher", f"width {width}: same teacher") for width in widths}
    assert all(float(gain) > 0 and float(p) < 0.05 for gain, p in best.values())
    for width in (8, 128):
        assert f"{best[width][0]} at width {width} (p = {best[width][1]})" in said
    assert (
        f"over labels alone (p = {of('2', '1/1', 'supervised')[1]}) and {of('2', '1/1', '1/4')[0]} over a quarter"
        in said
    )
    assert f"(p = {of('2', '1/1', '1/4')[1]}); with a quarter or fewer no gain" in said
    assert {verdicts["2", share] for share in ("1/128", "1/64", "1/32", "1/16", "1/4")} == {"not shown"}
    fifths = [of("3", f"soft, fifth {fifth}", f"hard, fifth {fifth}") for fifth in range(1, 6)]
    assert f"soft labels are {fifths[0][0]} above hard ones (p = {fifths[0][1]}, one of five tests:" in said
    p = paired_test(*(found["3"][f"{labels}, fifth 1"] for labels in ("soft", "hard"))).p
    assert f"{5 * p:.2g} corrected); of the other fifths" in said
    assert all(float(p) > 0.05 for _, p in fifths[1:])
    larger = [of("4", f"teacher {w}, student {2 * w}", f"teacher {w}, student {w}") for w in widths[:4]]
    gains = [gain for gain, _ in larger]
    assert f"own width by {', '.join(gains[:3])} and {gains[3]}, the last with p = {larger[3][1]}" in said
    assert all(float(p) < 0.05 for _, p in larger[:3])
    beyond = [of("4", f"teacher {w}, student {2 * w}", f"supervised {2 * w}") for w in (32, 64)]
    assert f"these students are {with_p(beyond[0])} and {with_p(beyond[1])} above" in said
    for width in widths[:4]:
        assert verdicts["6", f"width {width}: pretraining only"] == "yes"
        shown_too = "not shown" if width == 8 else "yes"
        assert verdicts["6", f"width {width}: pretraining + finetuning"] == shown_too
        assert verdicts["5", f"width {width}: without balancing"] == "not shown"
    balancing = [of("5", f"width {w}: without balancing", f"width {w}: Noisy Student")[0] for w in widths[:4]]
    least, *_, most = sorted(-float(gain) for gain in balancing)
    assert f"at every width, by {least} to {most} points" in said
    whole = "of the unlabeled"
    noisy, without, neither = (
        of("noise", f"{name}, all {whole}", f"Noisy Student, all {whole}")
        for name in (
            "teacher with augmentation and dropout",
            "student without augmentation",
            "student without augmentation and dropout",
        )
    )
    assert f"{with_p(noisy)} with all unlabeled examples" in said
    assert f"the student is {without[0]}, and without dropout too {neither[0]}" in said
    assert f"(p = {without[1]} and {neither[1]})" in said
    for name in ("student without augmentation", "student without augmentation and dropout"):
        gain, p = of("noise", f"{name}, a sixteenth {whole}", f"Noisy Student, a sixteenth {whole}")
        assert float(gain) > 0
        assert float(p) > 0.05
    narrow = of("1", "width 8: same teacher", "width 8: supervised")
    assert f"the student is {narrow[0]} against labels alone (p = {narrow[1]})" in said
    assert verdicts["4", "teacher 32, student 32"] == "yes" != verdicts["4", "teacher 16, student 16"]
    ratios = [of("7", f"width {width}: 3:1", f"width {width}: 1:1") for width in (128, 16)]
    assert f"the ratio 3 is {with_p(ratios[0])}" in said
    assert f"it is {with_p(ratios[1])}" in said
    assert {verdicts["8", f"{percent} %, warm"] for percent in (10, 20, 40, 80)} == {"not shown"}


def test_noisy_student_beside_mpl_is_what_the_raw_rows_say(tables: object) -> None:
    import student_or_mpl
    from figures import difference, points

    rows, about = student_or_mpl.read(), json.loads(student_or_mpl.RAW.read_text().splitlines()[0])
    assert shown("student-or-mpl") == student_or_mpl.block(rows, about)
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in student_or_mpl.COMPARED for seed in student_or_mpl.SEEDS
    ]
    for seed in student_or_mpl.SEEDS:  # the same labels, at the same cost
        taught = [row for row in rows if row["seed"] == seed and "first_teacher_steps" in row]
        assert len(taught) == 6
        assert len({row["store_sha256"] for row in taught}) == 1
    assert all(row["operations"] == pytest.approx(rows[0]["operations"], rel=0.01) for row in rows)

    found, students = (student_or_mpl.accuracies(rows, name) for name in ("test_accuracy", "student_test_accuracy"))
    first, second, once = (found[name] for name in ("noisy_student", "mpl_filtered", "noisy_student_once"))
    steps = {row["method"]: row["steps"] for row in rows}
    gain, p = difference(first, second)
    said = " ".join((PAGE.parent / "noisy-student.md").read_text().split())
    assert f"Noisy Student delivers {points(first)} % and Meta Pseudo Labels {points(second)} %, {gain} points" in said
    assert f"over {len(first)} seeds (p = {p}), and one round of Noisy Student does better than two" in said
    assert points(once) > points(first)
    assert points(found["none_filtered"]) > points(second)
    dearer = steps["none_filtered"] / steps["mpl_filtered"]
    assert f"a step with feedback costs as much as {dearer:.1f} without, and after {steps['mpl_filtered']} of" in said
    assert f"its student reaches {points(students['mpl_filtered'])} %" in said
    teachers = sum(row["method"] == "mpl_filtered" and row["delivered"] == "teacher" for row in rows)
    assert f"in {teachers} of {len(first)} seeds it is its teacher that is delivered" in said
    assert f"without feedback, which takes {steps['none_filtered']}, reaches more too" in said
