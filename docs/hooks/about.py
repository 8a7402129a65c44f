"""Add what lies beside the folder of the pages: version, changelog, notebooks: a hook of MkDocs."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("quickstart", "own_loop", "pictures")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the version that the pages are of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.copyright = f"{project['name']} {project['version']} · {config.copyright}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog and the notebooks, which lie beside the folder of the pages."""
    text = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=text))
    for name in NOTEBOOKS:
        for path, content in pages_of(name):
            files.append(File.generated(config, path, content=content))
    return files


def pages_of(name: str) -> Iterator[tuple[str, str | bytes]]:
    """Yield a notebook as a page with what its cells print, and the pictures that they show."""
    notebook = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text())
    # Its lines are longer than those of pages, and it has no headings to list beside it.
    parts = ["---\nhide: [toc]\n---"]
    pictures: list[bytes] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else fenced(source, "python"))
        for output in cell.get("outputs", ()):
            picture = output.get("data", {}).get("image/png")
            if picture is None:
                parts.append(fenced(printed(output), "text"))
                continue
            parts.append(f"![What the cell shows]({name}-{len(pictures)}.png)")
            pictures.append(base64.b64decode(picture))
    parts.append(f"This is `examples/{name}.ipynb`.")
    yield f"notebooks/{name}.md", "\n\n".join(parts)
    for number, picture in enumerate(pictures):
        yield f"notebooks/{name}-{number}.png", picture


def printed(output: dict[str, Any]) -> str:
    """Return the text of an output of a cell."""
    lines = output["text"] if "text" in output else output["data"]["text/plain"]
    return "".join(lines)


def fenced(text: str, language: str) -> str:
    """Return text as a block of code."""
    return f"```{language}\n{text.rstrip()}\n```"
