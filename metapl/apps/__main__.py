"""``python -m metapl.apps`` is the ``metapl`` command."""

from metapl.apps.commands import main

raise SystemExit(main())
