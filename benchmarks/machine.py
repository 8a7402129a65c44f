"""What the benchmarks share: their arguments, what a result was measured on, and the files that it goes to."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from metapl.apps.machine.cores import available_cores


def arguments(description: str | None, result: Path, *, page: bool = False) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: where its result goes, and whether it is run in miniature; and, for one
    with tables in a ``page``, where they are put."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=result, metavar="FILE", help="the file of the result")
    parser.add_argument(
        "--miniature", action="store_true", help="everything in seconds, to see that it runs; its figures mean nothing"
    )
    if page:
        parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables of --out there; runs nothing")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; a miniature may not take the place of the committed result."""
    given = parser.parse_args()
    if given.miniature and given.out.resolve() == parser.get_default("out").resolve():
        parser.error(f"--miniature would write its figures to {given.out}; give it another file by --out FILE")
    return given


def results(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """The function's value for each tuple of arguments, in their order; one worker is this process."""
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(function, *zip(*jobs, strict=True))


def described(device: str) -> dict[str, Any]:
    """Hardware and versions, without the names of hosts or folders."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": _cpu(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'} ({platform.machine()})"


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, as far as there are any."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, *rows: dict[str, Any]) -> None:
    with file.open("a") as raw:
        raw.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    """Floats to four figures, which is more than any of them is known to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(value), indent=1, ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


def show(page: Path | None, name: str, tables: str) -> None:
    """Put tables between the marks of a name in a page; print them where there is none."""
    if page is None:
        print(tables)
    else:
        write_between_marks(page, name, tables)


def figure_of(page: Path, name: str) -> Path:
    """Where the figure of a page's tables goes: beside it; of tables that lie among the raw rows, into docs/."""
    here = Path(__file__).parent
    return (here.parent / "docs" if page.resolve().parent == here / "results" else page.parent) / name


def write_between_marks(file: Path, name: str, text: str) -> None:
    """Put a text between the marks of a name in a page: <!-- name:begin --> and <!-- name:end -->."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = file.read_text()
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SystemExit(f"{file} must contain {begin} and {end} once each, in this order")
    before, rest = page.split(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
