"""``python -m metapl.apps`` is the ``metapl`` command."""

from metapl.apps.main import main

raise SystemExit(main())
