"""The errors that a user can cause."""

from __future__ import annotations


class MetaplError(ValueError):
    """Base of every error that a user can cause: it says what was given, what was expected and how to mend it.

    It is raised before anything moved: weights, buffers, optimizer states, gradients, random number generators and
    files are as they were.
    """
