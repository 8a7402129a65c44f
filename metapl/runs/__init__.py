"""A run on disk: rows, checkpoints, and the folder that one fit at a time writes to.

A checkpoint is of one process, or in parts. Beside these are the ranges that arguments are checked
against (``fields``), and bars and signals (``terminal``).
"""
