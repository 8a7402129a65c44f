"""A run on disk: rows, checkpoints (of one process, or in parts), and the folder that one fit at a time writes to."""
