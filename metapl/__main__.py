"""The ``metapl`` command: the script of that name, ``python -m metapl``, ``torchrun -m metapl``.

Without the packages of the extra ``apps`` it is one line that names the extra, not a traceback.
"""

from __future__ import annotations

import sys

from metapl.errors import MissingPackage, needed_for


def main() -> int:
    """Run the command line; return the exit code, as :func:`metapl.apps.main.main` does."""
    try:
        with needed_for("the command"):
            from metapl.apps import main as command
    except MissingPackage as error:
        print(f"metapl: {error}", file=sys.stderr)
        return 2
    return command.main()


if __name__ == "__main__":
    raise SystemExit(main())
