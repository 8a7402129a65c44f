"""Test the library on the oldest torch that is named, on one between, and on the newest.

    make versions                                             # all three
    nox -s "library(2.11)" -- tests/library/test_exact.py     # some files on one of them

Each version has an environment of its own below .nox/, which is kept: a second call installs only
what has changed. pip takes its indexes and options from where it always does, its configuration and
variables such as PIP_EXTRA_INDEX_URL and PIP_CONSTRAINT; what they forbid, such as a newer torch,
is not installed here either.
"""

import os

import nox

VERSIONS = [
    nox.param("torch==2.11.*", id="2.11"),  # the oldest, as in pyproject.toml
    nox.param("torch==2.12.*", id="2.12"),
    nox.param("torch", id="newest"),
]
LIBRARY = ("tests/library", "metapl", "--ignore=metapl/apps")  # its tests and its doctests


@nox.session(reuse_venv=True)
@nox.parametrize("torch", VERSIONS)
def library(session: nox.Session, torch: str) -> None:
    """Install one torch with its torchvision, and run the tests that make test runs."""
    # Resolved in one call: a torchvision is built for one release of torch.
    session.install(
        "--upgrade", "--constraint", "constraints.txt", torch, "torchvision", "--editable", ".[dev]"
    )
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    workers = os.environ.get("TEST_WORKERS", "2")
    options = (
        "-n",
        workers,
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "-m",
        "not long and not docs",
    )
    session.run(
        "python",
        "-m",
        "pytest",
        *options,
        *(session.posargs or LIBRARY),
        env={"OMP_NUM_THREADS": "1"},
    )
