"""The commands of the papers' pages and studies as they stand there, on small data, few steps.

A command is read by its script's own parser as the page has it, and then runs with the words of its
rule behind it, of which the last value of a flag counts. Commands that read what another one
leaves, ``runs/...`` or ``labels/...``, run behind it. A benchmark prints the tables of its
committed rows here; the tests of the benchmarks run its miniature.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import noisy_student_imagenet
import picture_sets
import protocols
import pytest
import robustness
import tensor_parallel
import training_accuracy
import tyro
from benchmark_runs import BENCHMARKS, SCRIPTS, committed
from benchmark_runs import run as run_benchmark
from command import metapl
from test_protocol_examples import (
    WNIDS,
    write_cifar,
    write_fashion_folder,
    write_imagenet,
    write_svhn,
)
from test_robustness import save
from tiny_runs import color_folders

from metapl.distributed import Mesh
from metapl.errors import MetaplError
from metapl.networks.architectures import Architecture
from metapl.networks.tuned import Normalized
from metapl.pictures import FileImages

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAPERS = ("papers", "papers-noisy-student", "protocols")
PAGES = [*(DOCS / f"{name}.md" for name in PAPERS), *sorted((DOCS / "studies").glob("*.md"))]


# ----------------------------------------------------------------------------------------- the page

HEAD = ("of the paper", "command", "run", "result here")
HOW_FAR = ("at size", "planned at size", "in miniature")
HOW_FAR += ("on the digits", "on Fashion-MNIST", "on CIFAR-10", "on synthetic pictures")
NEVER = "never"


class Claim(NamedTuple):
    """A row of a table.

    What of the paper, the commands that make its counterpart, how far they ran, the result.
    """

    paper: str
    commands: list[str]
    run: str
    result: str


def claims_of(text: str) -> dict[str, list[Claim]]:
    """Return the claims of a page by the headings that their tables stand below."""
    claims: dict[str, list[Claim]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if not cells or tuple(cells[0]) != HEAD:
            continue
        rows = list(itertools.takewhile(lambda row: len(row) == len(HEAD), cells[2:]))
        claims[section.splitlines()[0]] = [
            Claim(row[0], spans(row[1]), row[2], row[3]) for row in rows
        ]
    return claims


def spans(cell: str) -> list[str]:
    """Return the commands of a cell, which holds nothing else but commas, or a dash."""
    assert re.fullmatch(r"–|`[^`]+`(, `[^`]+`)*", cell), (
        f"expected `command`, `command` or –, not {cell}"
    )
    found: list[str] = []
    for span in re.findall(r"`([^`]+)`", cell):
        found += turns_of(span)
    return found


def turns_of(span: str) -> list[str]:
    """Return the commands that a loop of the shell runs, or the one command.

    >>> turns_of("for b in b0 b1; do metapl $b --out runs/$b; done")
    ['metapl b0 --out runs/b0', 'metapl b1 --out runs/b1']
    """
    loop = re.fullmatch(r"for (\w+) in ([^;]+); do ([^;]+); done", span)
    if loop is None:
        return [span]
    name, values, command = loop.groups()
    return [command.replace(f"${name}", value) for value in values.split()]


def commands_of(text: str) -> list[str]:
    """Return the commands of a page.

    Of its tables, of its sh blocks, and those of its scripts in the sentences.
    """
    commands: list[str] = []
    for claims in claims_of(text).values():
        for claim in claims:
            commands += claim.commands
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        commands += [shlex.join(shlex.split(line, comments=True)) for line in lines]
    commands += re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
    return [command for command in dict.fromkeys(commands) if command]


TEXT = "\n".join(page.read_text() for page in PAGES)
CLAIMS = claims_of(TEXT)
COMMANDS = commands_of(TEXT)


def test_every_table_and_figure_of_the_papers_has_a_row() -> None:
    """Of Meta Pseudo Labels, Figures 1 and 3 are of its method; of Noisy Student, Figure 1 is."""
    for paper, tables, figures in (
        ("Meta Pseudo Labels", range(1, 6), (2, 4)),
        ("Noisy Student", range(1, 19), (2, 3, 4, 5)),
    ):
        named: dict[str, set[int]] = {"Table": set(), "Figure": set()}
        for claim in CLAIMS[paper]:
            for kind, numbers in re.findall(
                r"(Table|Figure)s? ((?:\d+(?:, | and | to )?)+)", claim.paper
            ):
                ends = [int(number) for number in re.findall(r"\d+", numbers)]
                named[kind] |= {*range(ends[0], ends[-1] + 1)} if " to " in numbers else {*ends}
        assert named["Table"] >= {*tables}, paper
        assert named["Figure"] >= {*figures}, paper


def test_every_row_says_how_far_it_was_run() -> None:
    for claim in itertools.chain.from_iterable(CLAIMS.values()):
        assert claim.run.startswith(HOW_FAR if claim.commands else NEVER), claim
        assert claim.result, claim


def test_every_row_of_both_scripts_is_in_a_table() -> None:
    for script, rows in (
        ("protocols", protocols.ROWS),
        ("noisy_student_imagenet", noisy_student_imagenet.ROWS),
    ):
        for row in rows:
            assert any(f"examples/{script}.py {row} --" in command for command in COMMANDS), row


def settings_on_the_page(paper: str) -> list[noisy_student_imagenet.Settings]:
    """Return what Noisy Student's script is asked for in the row that begins with these words."""
    (claim,) = [one for one in CLAIMS["Noisy Student"] if one.paper.startswith(paper)]
    words = [shlex.split(command) for command in claim.commands]
    script = "examples/noisy_student_imagenet.py"
    return [noisy_student_imagenet.settings_of(one[2:]) for one in words if one[1] == script]


def test_the_row_of_1_3_million_pictures_draws_them_from_the_130_million() -> None:
    (small,) = settings_on_the_page("Table 6: 1.3 million")
    classes = 1_000
    assert small.balance
    assert small.share is not None
    assert small.share * classes * small.per_class == pytest.approx(1_300_000)
    for whole in settings_on_the_page("Table 6: the noise on unlabeled"):
        assert whole.unlabeled == small.unlabeled
        assert classes * whole.per_class == 130_000_000
        assert (whole.share, whole.networks) == (None, small.networks)
    assert small.magnitudes == (0.0,), "the standard augmentation, for teacher and student"
    assert small.ratios == (1,)


def test_the_small_student_of_study_1_differs_from_figure_2_in_teacher_and_noise_alone() -> None:
    """The finished L2 teaches, and the unlabeled pictures alone have the standard augmentation."""
    (taught,) = settings_on_the_page("study 1")
    own = noisy_student_imagenet.ROWS["b0"].settings()
    changed = {
        one.name: getattr(taught, one.name)
        for one in dataclasses.fields(own)
        if getattr(taught, one.name) != getattr(own, one.name)
    }
    assert changed.pop("teacher") in [out_of(command) for command in COMMANDS]
    assert changed.pop("unlabeled_noise") == ("standard",)
    assert {*changed} == {"root", "out", "unlabeled"}


def test_an_interval_of_figure_5_has_1_3_million_pictures_of_all_classes() -> None:
    (interval,) = settings_on_the_page("study 3")
    assert (interval.count, interval.per_class, interval.balance) == (1_300_000, None, False)


def numbers_of(text: str) -> list[str]:
    """Return the differences and the p-values of a text, as they are written.

    >>> numbers_of("+1.1 (p = 0.067), corrected 0.27; 12 seeds")
    ['+1.1', '0.067', '0.27']
    """
    return re.findall(r"(?:(?<=p = )|(?<=corrected )|(?=[+-]\d))[+-]?\d[\d.]*(?:e-\d+)?", text)


@pytest.mark.parametrize("study", ["1", "3", "4"])
def test_the_numbers_of_a_study_are_those_that_its_command_prints(study: str) -> None:
    """The tests of the benchmarks hold that the page of results is what the command prints."""
    page = (ROOT / "benchmarks" / "results" / "noisy_student.md").read_text()
    (printed,) = [
        part
        for part in re.split(r"^\*\*", page, flags=re.MULTILINE)
        if part.startswith(f"Study {study}")
    ]
    cells = {cell.strip() for line in printed.splitlines() for cell in line.split("|")}
    (claim,) = [one for one in CLAIMS["Noisy Student"] if one.paper.startswith(f"study {study},")]
    assert "python benchmarks/noisy_student.py" in claim.commands
    found = numbers_of(claim.result)
    assert len(found) >= 3
    assert not [number for number in found if number not in cells]


# ----------------------------------------------------------------------------------------- the data

# Folders and files of data that the page names, and that no command there leaves.
DATA = (
    "fashion-mnist",
    "data",
    "pictures",
    "yfcc100m",
    "few",
    "many",
    "held_out",
    "imagenet-a",
    "imagenet-c",
    "imagenet-p",
)


def write_data(root: Path) -> None:
    """Write small files in the formats of all data that the page names."""
    for write in (write_cifar, write_svhn, write_imagenet):
        write(root / write.__name__)
        for part in (root / write.__name__).iterdir():
            (root / "data").mkdir(exist_ok=True)
            part.rename(root / "data" / part.name)
    validation = sorted((root / "data" / "val").glob("*/*.JPEG"))
    for number, picture in enumerate(validation, start=1):
        picture.rename(picture.with_name(f"ILSVRC2012_val_{number:08}.JPEG"))
    (root / "real.json").write_text(str([[0]] * len(validation)))
    colors = color_folders(root / "colors")
    for name, part in (("few", "labeled"), ("held_out", "test"), ("many", "unlabeled")):
        (colors / part).rename(root / name)
    for name in ("pictures", "yfcc100m"):
        shutil.copytree(root / "many", root / name)
    write_fashion_folder(root / "fashion-mnist")
    for number, wnid in enumerate(WNIDS):
        save(root / "imagenet-a" / wnid / f"{number}.jpg", number)
        for corruption, severity in itertools.product(
            robustness.CORRUPTIONS, robustness.SEVERITIES
        ):
            save(
                root
                / "imagenet-c"
                / corruption
                / str(severity)
                / wnid
                / "ILSVRC2012_val_00000001.JPEG",
                severity,
            )
        for perturbation, frame in itertools.product(robustness.FLIPS_OF_ALEXNET, range(2)):
            save(
                root
                / "imagenet-p"
                / perturbation
                / wnid
                / "ILSVRC2012_val_00000001"
                / f"{frame}.png",
                frame,
            )


def write_imagenet_network() -> Path:
    """Write weights of a network of ImageNet's thousand classes; the small data has three."""
    names = [*WNIDS, *(f"n{number:08}" for number in range(1_000 - len(WNIDS)))]
    architecture = Architecture(name="small_cnn", num_classes=1_000)
    state = Normalized(architecture.create(), picture_sets.MEAN, picture_sets.STD).state_dict()
    file = Path("a network of ImageNet.safetensors")
    test: Any = FileImages(["a.png"], size=(16, 16))
    picture_sets.save_weights(state, file, "small_cnn", size=16, test=test, classes=names)
    return file


class Bench:
    """A folder in which the page's commands run, each at most once, behind those that it reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: set[str] = set()

    def run(self, command: str) -> None:
        """Run a command in miniature, and before it those that it builds on."""
        if command in self.ended:
            return
        for earlier in COMMANDS:
            out = out_of(earlier)
            if (
                earlier != command
                and out is not None
                and any(is_within(word, out) for word in inputs_of(command))
            ):
                self.run(earlier)
        with contextlib.chdir(self.folder):
            run_by_rule(command)
        self.ended.add(command)


def out_of(command: str) -> str | None:
    """Return the folder that a command leaves."""
    words = shlex.split(command)
    return words[words.index("--out") + 1].rstrip("/") if "--out" in words else None


def inputs_of(command: str) -> list[str]:
    """Return the folders of a command that another one leaves."""
    words = shlex.split(command)
    behind = ["", *words]
    return [
        word
        for word, flag in zip(words, behind, strict=False)
        if word.startswith(("runs/", "labels/")) and flag != "--out"
    ]


def is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Yield a bench on which commands leave the committed results as they are."""
    folder = tmp_path_factory.mktemp("papers")
    before = committed()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cifar", "svhn"):
            patch.setattr(f"torchvision.datasets.{name}.check_integrity", lambda *given: True)
        patch.syspath_prepend(str(BENCHMARKS))
        write_data(folder)
        yield Bench(folder)
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
    assert committed() == before


def test_every_folder_that_a_command_reads_is_data_or_the_result_of_another() -> None:
    outs = [out for out in map(out_of, COMMANDS) if out is not None]
    assert len(outs) == len(set(outs)), "two commands leave the same folder"
    for command in COMMANDS:
        for path in inputs_of(command):
            assert any(is_within(path, out) for out in outs), f"{path} is left by no command"
        for word in shlex.split(command):
            if (
                word.endswith("/")
                and not word.startswith(("runs/", "labels/"))
                and word.rstrip("/") != out_of(command)
            ):
                assert word.split("/")[0] in DATA, f"{word} is none of the page's data"


# ---------------------------------------------------------------------------------------- the rules

PLACE = "--device cpu --num-workers 0 --log-every 1 --validate-every 2 --save-every 2"
ONE_PROCESS = "--mesh.replicate 1 --mesh.shard 1 --batch-norm-ranks None --precision float32"
PROTOCOL = (
    f"{PLACE} {ONE_PROCESS} --network small_cnn --stochastic-depth 0 --labeled-batch 4 "
    "--unlabeled-batch 6 --steps 4 --warmup 1 --wait 1 --finetune-steps 2 --finetune-batch 4 "
    "--student-lr 0.01 --teacher-lr 0.01"
)
NOISY_STUDENT = (
    f"{PLACE} {ONE_PROCESS} --stochastic-depth 0 --labeled-batch 4 --finetune-batch 4 --steps 2 "
    "--lr 5 --ratios 2 --per-class 20"
)
DIGITS = (
    "--steps 6 --hidden 4 --labeled-batch 8 --unlabeled-batch 8 --finetune-steps 4 --log-every 1 "
    "--validate-every 2 --save-every 2"
)
PICTURES = (
    "--steps 4 --network small_cnn --precision float32 --labeled-batch 4 --device cpu --log-every "
    "1 --save-every 2"
)
METAPL = {
    ("train", "digits"): DIGITS,
    ("train", "images"): f"{PICTURES} --image-size 8 --finetune-steps 2 --unlabeled-batch 4",
    (
        "noisy-student",
        "digits",
    ): "--steps 4 --hidden 4 --labeled-batch 8 --ratio 2 --threshold 0.12 --save-every 2",
    ("noisy-student", "images"): f"{PICTURES} --ratio 2 --threshold 0 --rounds 1",
    ("ablate", "digits"): "--steps 2 --rounds 1 --draws 2",
    ("label",): "",
    ("labels", "select"): "--per-class 20",
    ("evaluate",): "",
    ("predict",): "",
}


def run_by_rule(command: str) -> None:
    """Run a command by the rule of its first words; one that has no rule fails."""
    words = shlex.split(command)
    processes = 1
    if words[0] == "torchrun":
        launch = [word for word in words if word.startswith(("--nnodes=", "--nproc-per-node="))]
        for word in launch:
            processes *= int(word.partition("=")[2])
        words = ["python", *words[1 + len(launch) :]]
    if words[0] == "metapl":
        run_metapl(words[1:])
        return
    assert words[0] == "python", f"no rule for {words[0]}"
    if words[1:3] == ["-m", "pytest"]:
        collect_tests(words[3:])
        return
    script, arguments = words[1], words[2:]
    if script.startswith("benchmarks/"):
        run_rows_of_benchmark(script, arguments)
        return
    assert script in SCRIPT_RULES, f"no rule for {script}"
    SCRIPT_RULES[script](arguments, processes)


def run_metapl(words: list[str]) -> None:
    rules = [name for name in METAPL if tuple(words[: len(name)]) == name]
    assert rules, f"no rule for metapl {' '.join(words[:2])}"
    more = METAPL[rules[0]].split()
    if rules[0] == ("noisy-student", "images"):
        more += ["--image-size", "8"]
    metapl(*words, *more)


@contextlib.contextmanager
def as_started_by_torchrun(processes: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if processes > 1:
            patch.setenv("WORLD_SIZE", str(processes))
        yield


def run_protocol(words: list[str], processes: int) -> None:
    """Check the page's settings, for as many processes as it starts; train small ones here."""
    assert "WORLD_SIZE" not in os.environ
    if "--sources" in words:
        assert protocols.main(words) == 0
        return
    with as_started_by_torchrun(processes):
        settings = protocols.settings_of(words)
    more = PROTOCOL.split()
    if settings.validation:
        more += ["--validation", "10"]
    if settings.labels_per_class is not None:
        more += ["--labels-per-class", "3"]
    if settings.data == "imagenet":
        more += ["--image-size", "32", "--no-channels-last"]
    if settings.seeds is not None:
        more += ["--seeds", "0-1"]
    assert protocols.main([*words, *more]) == 0


def run_noisy_student(words: list[str], processes: int) -> None:
    """Say what the page's settings would train, for as many processes; train small ones here."""
    if "--sources" in words:
        assert noisy_student_imagenet.main(words) == 0
        return
    with as_started_by_torchrun(processes):
        plan = io.StringIO()
        with contextlib.redirect_stdout(plan):
            assert noisy_student_imagenet.main([*words, "--dry-run"]) == 0
    if "--dry-run" in words:
        return
    # What comes before the first network is of the whole run.
    _, *networks = re.split(r"^(?:round \d+|teacher): ", plan.getvalue(), flags=re.MULTILINE)
    more = [*NOISY_STUDENT.split(), "--networks", *["small_cnn"] * len(networks)]
    sizes = ["24" if "FixRes" in network else "0" for network in networks]
    more += ["--finetune-sizes", *sizes]
    if words[0] == "svhn":
        more += ["--image-sizes", "32", "--validation", "10"]
    else:
        more += ["--image-sizes", "16", "--filter-network", "small_cnn", "--no-channels-last"]
    # Labels of three or ten classes are surer, or less sure, than those of a thousand.
    more += ["--threshold", "0.05"]
    if "--at-most" in words:
        more += ["--at-most", "0.99"]
    if "--count" in words:
        more += ["--count", "3"]
    if "--validation" in words:
        more += ["--validation", "12"]
    assert noisy_student_imagenet.main([*words, *more]) == 0


def run_robustness(words: list[str], processes: int) -> None:
    """Measure the runs that the page names, and in the place of a file a small network."""
    if words[0].endswith(".pth"):
        name = words.index("--network")
        words = [str(write_imagenet_network()), *words[1:name], *words[name + 2 :]]
    if "--size" in words:
        words = [*words, "--size", "24"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["robustness.py", *words])
        robustness.main()


def run_training_accuracy(words: list[str], processes: int) -> None:
    assert training_accuracy.main(words) == 0


def run_script(name: str, more: str) -> Callable[[list[str], int], None]:
    """Return the rule of a script run as a file, with more words behind those of the page."""

    def run(words: list[str], processes: int) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(sys, "argv", [name, *words, *more.split()])
            runpy.run_path(str(ROOT / name), run_name="__main__")

    return run


def run_tensor_parallel(words: list[str], processes: int) -> None:
    """Train in one process; `test_tensor_parallel.py` starts as many as the page does."""
    c = tyro.cli(tensor_parallel.Settings, args=words)
    assert c.mesh.size == processes
    tensor_parallel.train(dataclasses.replace(c, mesh=Mesh(), steps=1))


SCRIPT_RULES: dict[str, Callable[[list[str], int], None]] = {
    "examples/protocols.py": run_protocol,
    "examples/noisy_student_imagenet.py": run_noisy_student,
    "examples/robustness.py": run_robustness,
    "examples/training_accuracy.py": run_training_accuracy,
    "examples/compare_two_networks.py": run_script("examples/compare_two_networks.py", ""),
    "examples/two_moons.py": run_script("examples/two_moons.py", "--seeds 2 --steps 20"),
    "examples/set_folders.py": run_script("examples/set_folders.py", "--per-class 3"),
    "examples/darts.py": run_script("examples/darts.py", "--steps 2"),
    "examples/example_weights.py": run_script("examples/example_weights.py", "--steps 2"),
    "tests/outcomes/test_problem_outcomes.py": lambda words, processes: collect_tests(
        ["tests/outcomes/test_problem_outcomes.py"]
    ),
    "examples/tensor_parallel.py": run_tensor_parallel,
    "examples/plan.py": run_script(
        "examples/plan.py",
        "--network small_cnn --batch-norm-ranks 1 --size 32 --replicate 1 --shard 2 --labeled 4 "
        "--unlabeled 4",
    ),
}


def collect_tests(words: list[str]) -> None:
    """Collect the tests of a file, which `make test` runs."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_rows_of_benchmark(script: str, words: list[str]) -> None:
    """Print the tables of a benchmark's committed rows.

    The tests of the benchmarks hold that it runs in miniature.
    A page that the command would write is a copy.
    """
    name = Path(script).stem
    of_form = [f"{name} {word}" for word in words if f"{name} {word}" in SCRIPTS]
    assert (BENCHMARKS / f"{name}.py").exists(), f"there is no {script}"
    words = [word for word in words if f"{name} {word}" not in of_form]
    if "--write" in words:
        place = words.index("--write") + 1
        copy = Path(shutil.copy(ROOT / words[place], Path.cwd())).resolve()
        words = [*words[:place], str(copy), *words[place + 1 :]]
    # An example that ran before may have the name of a benchmark, or its folder the first place.
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        run_benchmark((of_form or [name])[0], *words, "--table")


# ---------------------------------------------------------------------------------------- the tests


def short(command: str) -> str:
    """Return a name for a command: its script or subcommand, and the folder that it leaves."""
    words = shlex.split(command)
    last = out_of(command) or " ".join(words[-2:])
    if words[0] == "metapl":
        return f"{' '.join(words[:3])}: {last}"
    return f"{next(word for word in words if word.endswith('.py'))}: {last}"


@pytest.mark.parametrize("command", COMMANDS, ids=short)
def test_a_command_of_the_page_runs_in_miniature(command: str, bench: Bench) -> None:
    bench.run(command)


def spoiled() -> list[str]:
    """Return a command of every rule, the last flag but the results' place under another name."""
    found: dict[str, str] = {}
    for command in COMMANDS:
        words = shlex.split(command)
        flags = [
            word
            for word in words
            if word.startswith("--") and not word.startswith(("--nnodes", "--nproc"))
        ]
        flags = [flag for flag in flags if flag not in ("--out", "--sources")]
        head = " ".join(
            words[:3] if words[0] == "metapl" else [word for word in words if word.endswith(".py")]
        )
        if flags:
            words[words.index(flags[-1])] = f"{flags[-1]}-that-is-gone"
            found[head] = shlex.join(words)
    return [*found.values()]


@pytest.mark.parametrize("command", spoiled(), ids=short)
def test_a_flag_that_is_gone_fails(command: str, bench: Bench) -> None:
    refused = pytest.raises((SystemExit, AssertionError, MetaplError))
    with (
        contextlib.chdir(bench.folder),
        contextlib.redirect_stderr(io.StringIO()) as said,
        refused as error,
    ):
        run_by_rule(command)
    assert "that-is-gone" in said.getvalue() + str(error.value)


def test_a_command_without_a_rule_fails() -> None:
    with pytest.raises(AssertionError, match="no rule"):
        run_by_rule("python examples/stability.py --steps 3")
    with pytest.raises(AssertionError, match="no rule"):
        run_by_rule("metapl runs")
