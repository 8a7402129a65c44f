"""``python -m metapl`` is the ``metapl`` command."""

from metapl.cli import main

raise SystemExit(main())
