"""The README and the documentation.

Their code runs, their links lead somewhere, figures are those of the pages and rows, and the site
can be built.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
import torch

import metapl
from benchmarks.harness import RESULTS
from metapl.problems.doubtful import Classification, EqualWeights

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
PAGES += sorted((ROOT / "benchmarks" / "results").glob("*.md"))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
PASTED = sorted(
    page.stem for page in (ROOT / "docs").glob("*.md") if pages.FENCED.search(page.read_text())
)


@pytest.fixture
def _own_generator() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


@pytest.mark.usefixtures("_own_generator")
@pytest.mark.parametrize("name", PASTED)
def test_the_code_of_a_page_runs_and_prints_what_stands_beside_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / f"{name}.md"
    code = pages.code(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    for variable, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(variable, value)  # as torchrun with one process
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    pages.check_printed(code, capsys.readouterr().out)


def test_the_page_on_problems_has_the_method_of_its_example() -> None:
    _, _, method = pages.FENCED.findall((ROOT / "docs" / "write-a-problem.md").read_text())[
        0
    ].partition("\n\n\n")
    assert method.startswith("class PairWeights")
    assert method in (ROOT / "examples" / "your_own_method.py").read_text()


def test_the_table_of_label_methods_has_all_of_them_and_the_figures_of_their_examples() -> None:
    text = (ROOT / "docs" / "studies" / "label-methods.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if "examples/" in line
    ]
    methods = {
        re.findall(r"`(\w+)`", cells[0])[0]: cells for cells in rows if cells[0].startswith("[")
    }
    kinds = {name: getattr(metapl.problems, name) for name in metapl.problems.__all__}
    of_labels = [
        k for k, v in kinds.items() if isinstance(v, type) and issubclass(v, Classification)
    ]
    assert methods.keys() == {k for k in of_labels if not issubclass(kinds[k], EqualWeights)} - {
        "Classification"
    }
    for name, cells in methods.items():
        text = (ROOT / re.findall(r"examples/\w+\.py", cells[2])[0]).read_text()
        assert f'compare("{name}"' in text
        figures = r"([+-]\d+\.\d) ± (\d+\.\d)"
        assert re.findall(figures, " ".join(cells[3:])) == re.findall(figures, text)


NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples").glob("*.ipynb"))


def test_each_of_the_three_doors_has_a_notebook() -> None:
    assert NOTEBOOKS == ["own_loop", "pictures", "quickstart"]
    whole = (ROOT / "docs" / "index.md").read_text()
    assert all(f"`examples/{name}.ipynb`" in whole for name in NOTEBOOKS)


@pytest.mark.usefixtures("_own_generator")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_prints_what_is_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), f"{name}.ipynb, cell {number}", "exec")
            exec(code, names)
            stored = "".join(line for one in cell["outputs"] for line in one.get("text", ()))
            pages.check_alike(capsys.readouterr().out.splitlines(), stored.splitlines())
    assert sum(len(cell["outputs"]) for cell in cells if cell["cell_type"] == "code") >= 5


def anchors(page: Path) -> set[str]:
    """Return what a page's headings, and the objects that it documents, are linked to by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    documented = set(re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE))
    return documented | {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_the_reference_documents_nothing_of_the_application() -> None:
    """What users import has a name in the library; :mod:`metapl.pictures` is one, say."""
    documented: list[str] = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        documented += re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
    assert len(documented) > 100
    assert [name for name in documented if name.startswith("metapl.apps")] == []
    for name in documented:
        pages.named(name)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    references = dict(re.findall(r"^\[(\w+)\]: (\S+)$", prose, re.MULTILINE))
    assert {*re.findall(r"\]\[(\w+)\]", prose)} == references.keys()
    for target in [*re.findall(r"\]\(([^)\s]+)\)", prose), *references.values()]:
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        if other.parent == ROOT / "docs" / "notebooks":
            # The site makes these pages of the notebooks.
            other = ROOT / "examples" / f"{other.stem}.ipynb"
        assert other.is_file(), f"{target} is not there"
        if anchor:  # a class stands for its methods
            assert {anchor, anchor.rpartition(".")[0]} & anchors(other), (
                f"{target} has no such heading"
            )


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_are_there(page: Path) -> None:
    top = "|".join(("benchmarks", "docs", "examples", "metapl", "tests"))
    # Without scripts that left: they are beside their last commit, or in a row that begins with it.
    today = re.sub(
        r"`[^`\n]+`,?\s+(?:last\s+in|at)\s+commit\s+`?[0-9a-f]{7,}|^\| [0-9a-f]{8} \|.*$",
        "",
        page.read_text(),
        flags=re.MULTILINE,
    )
    for command in re.findall(r"`([^`\n]+)`", today):
        for path in re.findall(rf"(?<![\w/.])(?:{top})/[\w./-]+", command):
            assert (ROOT / path).exists(), f"{path} is not there"


def test_all_pages_are_in_the_navigation_and_code_is_in_those_that_run() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation
    run = {"README.md", *(f"docs/{name}.md" for name in PASTED)}
    assert {
        name for name, page in zip(IDS, PAGES, strict=True) if pages.FENCED.search(page.read_text())
    } == run


STUDY = ("Question", "Result", "What would change our mind", "Command")
STUDIES = [
    page
    for page in sorted((ROOT / "docs" / "studies").glob("*.md"))
    if "**Question.**" in page.read_text()
]


@pytest.mark.parametrize("page", STUDIES, ids=[page.stem for page in STUDIES])
def test_a_study_has_the_form_of_all_studies(page: Path) -> None:
    """What was asked, what came out, what would change our mind; then the command and the rows."""
    text = page.read_text()
    heads = re.findall(r"^\*\*([\w ]+)\.\*\*", text, re.MULTILINE)
    assert [head for head in heads if head in STUDY] == [*STUDY]
    assert re.search(r"benchmarks/results/\w+\.\w+|\brows\b", text.partition("**Command.**")[2])


def test_a_page_is_read_at_one_go() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert len(page.read_text().split()) <= 2_500, page


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs extra is not installed: make docs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = {
        page.relative_to(tmp_path / "site").as_posix()
        for page in (tmp_path / "site").rglob("*.html")
    }
    assert {"index.html", "tutorial/index.html", "reference/feedback/index.html"} <= site
    everything = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', everything), (
        "a page loads from elsewhere"
    )
    assert {"changelog/index.html", "notebooks/quickstart/index.html"} <= site
    assert f"metapl {metapl.__version__}" in (tmp_path / "site" / "index.html").read_text()
    assert "Source code in" in (tmp_path / "site" / "reference" / "index.html").read_text()


def test_the_examples_run_and_print_what_stands_beside_them(tmp_path: Path) -> None:
    assert run_alone(pages.code(ROOT / "README.md"), tmp_path)


def test_both_sides_of_the_readmes_difference_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```diff\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    lines = block.splitlines()
    with_metapl = [line[1:] for line in lines if not line.startswith("-")]
    assert "import metapl" in with_metapl
    run_alone("\n".join(with_metapl), tmp_path)
    plain = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    assert "metapl" not in plain
    (accuracy,) = re.findall(r"The plain loop prints ([\d.]+),", README)
    run_alone(re.sub(r"  # 0\.\d+$", f"  # {accuracy}", plain, flags=re.MULTILINE), tmp_path)


def run_alone(code: str, folder: Path) -> bool:
    """Run code in a process of its own, which warns of nothing, leaves nothing, prints as it says.

    It has the packages of the core alone.
    """
    block_extras = "import sys; sys.modules.update({'sklearn': None, 'torchvision': None})\n"
    command = [sys.executable, "-W", "error", "-c", block_extras + code]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    pages.check_printed(code, done.stdout)
    return list(folder.iterdir()) == []


def test_the_readme_is_a_screen_and_a_half() -> None:
    """Its words fit, and no line of its code is cut where it is narrow."""
    assert len(README.split()) <= 750
    assert len(re.findall(r"!\[[^\]]*\]\(docs/[\w.]+\)", README)) <= 3


def test_lines_of_code_are_narrow() -> None:
    """A page has a column of 88 characters for them."""
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for block in re.findall(
            r"^```(?:python|py|diff)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            assert max(map(len, block.splitlines())) <= 88, f"{page}: {block}"


def test_the_appendix_lists_all_rows_of_older_versions_and_other_pages_name_no_commit() -> None:
    whole = (ROOT / "docs" / "evidence.md").read_text()
    listed = {*re.findall(r"`([\w]+\.jsonl?)`", whole)}
    older = {
        file.name
        for file in [*RESULTS.glob("*.json"), *RESULTS.glob("*.jsonl")]
        if re.search(r'"metapl": "0\.[12]\.', file.read_text())
    }
    assert older
    assert older <= listed
    assert all((RESULTS / name).is_file() for name in listed)
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if page.name != "evidence.md":
            text = " ".join(page.read_text().split())
            assert not re.findall(
                r"(?:in|at|of) commit `?[0-9a-f]{8}|(?:of 0\.[12]\.0|metapl 0\.[12])\b", text
            ), page


@pytest.mark.parametrize("name", ["terminal", "removals"])
def test_a_figure_of_the_landing_page_is_drawn_from_what_is_committed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = pages.script(ROOT / "docs" / "figures" / f"{name}.py")
    monkeypatch.setattr(script, "FIGURE", tmp_path / "drawn.svg")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--draw"])
    script.main()
    committed = ROOT / "docs" / f"{name}.svg"
    assert (tmp_path / "drawn.svg").read_text() == committed.read_text()
    assert f"]({name}.svg)" in (ROOT / "docs" / "index.md").read_text()


def test_the_landing_page_says_what_its_figures_show() -> None:
    whole = " ".join((ROOT / "docs" / "index.md").read_text().split())
    sets = json.loads((ROOT / "docs" / "figures" / "removals.json").read_text())["sets"]
    ten, fifty = (f"{row['spearman']:.2f}" for row in sets)
    assert f"rank correlation of {ten} for sets of ten and {fifty} for sets of fifty" in whole
    above = 0
    marks = 0
    for row in sets:
        for predicted, retrained in zip(row["predicted"], row["retrained"], strict=True):
            above += retrained > predicted
            marks += 1
    assert above > 0.75 * marks
    printed = " ".join((ROOT / "docs" / "figures" / "terminal.txt").read_text().split())
    for words in (
        r"Test accuracy of the network: ([\d.]+) %",
        r"labeled digits alone: ([\d.]+) %",
    ):
        (accuracy,) = re.findall(words, printed)
        assert f"{accuracy} %" in whole


def test_a_terminal_shows_the_last_text_of_a_line() -> None:
    terminal = pages.script(ROOT / "docs" / "figures" / "terminal.py")
    assert terminal.screen("a\r\n10 %\r20 %\rdone \r\n\r\n") == ["a", "done"]
    shown = terminal.drawing(["$ a < b", "", "c"])
    assert "a &lt; b" in shown
    assert shown.count("<text ") == 2


def test_the_badges_say_what_the_project_says() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    (license_,) = re.findall(r'^license = "(.+)"', project, re.MULTILINE)
    assert f": {version}+<" in (ROOT / "docs" / "badges" / "python.svg").read_text()
    assert f": {license_}<" in (ROOT / "docs" / "badges" / "license.svg").read_text()
    assert "[tool.mypy]" in project
    assert "strict = true" in project
