"""A network of a run in the form of the Hugging Face hub.

The class lives in the application (:mod:`metapl.apps.hub`), whose command ``metapl export --hub``
writes what it loads. It needs huggingface_hub.
"""

from metapl.errors import needed_for

with needed_for("metapl.hub"):
    from metapl.apps.hub import Classifier

__all__ = ["Classifier"]
