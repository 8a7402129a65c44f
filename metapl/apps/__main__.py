"""``python -m metapl.apps`` is the ``metapl`` command."""

from metapl.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
