"""``python -m metapl``, and ``torchrun -m metapl``, are the ``metapl`` command."""

from metapl.apps.main import main

raise SystemExit(main())
