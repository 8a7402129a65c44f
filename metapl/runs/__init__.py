"""A run on disk: rows, checkpoints (of one process, or in parts), and the folder that one fit at a
time writes to; beside it the ranges that arguments are checked against (``fields``), and bars and
signals (``terminal``)."""
