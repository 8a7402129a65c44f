"""Networks in the form of the Hugging Face hub, which ``metapl export RUN --hub`` writes.

They live in the application (:mod:`metapl.apps.hub`).
"""

from metapl.errors import needed_for

with needed_for("metapl.integrations.hub"):
    from metapl.apps.hub import Classifier

__all__ = ["Classifier"]
