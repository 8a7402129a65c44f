"""Which pictures they were: hashes that tell one set of examples from another."""

from __future__ import annotations

import hashlib
from typing import Any

from torch.utils import _pytree as pytree

from metapl.apps.pictures.folders import Files, LabeledFiles, ask, digest
from metapl.apps.pictures.shards import size_of

WHOLE_UP_TO, WHOLE_BYTES = 5_000, 2**30
"""Files of a folder whose bytes are all read, and how many bytes; of larger folders, names and sizes are taken."""


def hashes(**parts: Any) -> dict[str, str]:
    """SHA-256 of each part, in hexadecimal: tensors, or tuples of them.

    >>> import torch
    >>> hashes(x=torch.zeros(2))["x"][:8]
    '46d4846c'
    """
    found = {}
    for name, part in parts.items():
        sha256 = hashlib.sha256()
        for tensor in pytree.tree_leaves(part):
            sha256.update(f"{tensor.dtype} {tuple(tensor.shape)}:".encode())
            sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        found[name] = sha256.hexdigest()
    return found


def hash_files(files: Files) -> str:
    """What a folder holds: SHA-256 over the names, the classes and the bytes of its files, in hexadecimal.

    Beyond ``WHOLE_UP_TO`` files or ``WHOLE_BYTES``, sizes stand for bytes, and the result begins with "names and
    sizes:". Files that cannot be read count by their names.

    Cost: one reading of every file; beyond that, one question to the file system for each.
    """
    sizes = [ask(size_of, path) for path in files.paths()]
    whole = len(sizes) <= WHOLE_UP_TO and sum(size or 0 for size in sizes) <= WHOLE_BYTES
    sha256 = hashlib.sha256()
    labels = files.labels if isinstance(files, LabeledFiles) else [None] * len(sizes)
    for name, label, path, size in zip(files.names, labels, files.paths(), sizes, strict=True):
        content = (ask(digest, path) or b"") if whole else str(size).encode()
        sha256.update(f"{name}\0{label}\0".encode("utf-8", "surrogateescape") + content)
    return sha256.hexdigest() if whole else f"names and sizes: {sha256.hexdigest()}"
