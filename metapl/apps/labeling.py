"""Labels of many pictures by a network, and the stored labels that Reduced MPL trains on."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metapl.apps.data import Data
from metapl.apps.inputs import BATCH
from metapl.apps.progress import count_bar, count_lines
from metapl.data.steps import StepBatches, loader
from metapl.errors import MetaplError, few
from metapl.execution.batch import digest as digest_of
from metapl.execution.shards import weights_of
from metapl.labels.store import DIGEST_BYTES, LabelStore, LabelWriter, is_text
from metapl.metrics.predictions import logits_of
from metapl.networks.card import Input
from metapl.pictures.batches import FileImages
from metapl.pictures.folders import Files, ask, digest, hashes
from metapl.runs.terminal import progress
from metapl.training import Say
from metapl.words import shown

# Where a run keeps the stored labels, in its folder.
FOLDER = "labels"

# A store has at most so many parts, unless that would make them too large; and the fewest and the
# most rows of a part.
PARTS = 1000
FEWEST_ROWS = 1024
MOST_ROWS = 16_384

# The pictures that are compared with those that were labeled.
COMPARED = 1000

# Pictures (B, C, H, W); their numbers, int64 (B,); the first bytes of the SHA-256 of their files,
# where they have any; and the numbers of files that are left out, each with the reason.
Read = tuple[Tensor, Tensor, list[bytes], list[tuple[int, str]]]


@dataclass(frozen=True, eq=False, kw_only=True)
class ToLabel(StepBatches[Read]):
    """Pictures as they are, one batch after another.

    Args:
        images: numbers in memory, or files that ``input`` reads.
        ids: of each picture, ascending: names of files in their folder, or the numbers themselves.
        name: of the folder or of the data set.
        input: what the network takes.
        batch_size: pictures in a batch.
    """

    images: Tensor | FileImages | Files
    ids: Sequence[str] | range
    name: str
    input: Input
    batch_size: int = BATCH

    @property
    def steps(self) -> int:  # type: ignore[override]  # follows from the rest
        """Return the number of batches."""
        return -(-len(self.ids) // self.batch_size)

    def batch(self, step: int) -> Read:
        """Return the pictures of a batch, without the files that cannot be read."""
        numbers = range(len(self.ids))[step * self.batch_size : (step + 1) * self.batch_size]
        if isinstance(self.images, Tensor):
            return self.images[numbers.start : numbers.stop], torch.tensor(numbers), [], []
        pictures: list[Tensor] = []
        sound: list[int] = []
        digests: list[bytes] = []
        left_out: list[tuple[int, str]] = []
        for number in numbers:
            path = self.images.path(number)
            try:
                if not is_text(self.ids[number]):
                    raise MetaplError(f"{shown(path)}: its name is not UTF-8; rename it.")
                picture = self.input.read(path)
                content = digest(str(path))
            except (MetaplError, OSError) as error:
                left_out.append((number, str(error)))
                continue
            sound.append(number)
            pictures.append(picture)
            digests.append(content[:DIGEST_BYTES])
        x = torch.stack(pictures) if sound else torch.empty(0, *self.input.shape)
        return x, torch.tensor(sound, dtype=torch.int64), digests, left_out


def write_labels(
    network: nn.Module,
    labeled: ToLabel,
    place: Path,
    classes: Sequence[str],
    leave_out: Say,
    *,
    about: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    num_workers: int = 0,
    resume: bool = True,
    shows: bool = False,
) -> LabelStore:
    """Store softmax(network(x) / temperature) of every picture, and return the store.

    A store that was begun with the same pictures and settings is gone on with.

    Args:
        network: gives logits; it runs in eval mode, without gradients, in the precision of its
            weights, on the device of its first parameter. Afterwards it is in the mode that it was
            in.
        labeled: the pictures.
        place, classes, top_k, resume: as of :class:`~metapl.labels.store.LabelWriter`.
        leave_out: is told of each file that is left out, with the reason, or that was labeled and
            cannot be read now.
        about: what else the store says of its labels.
        temperature: of the softmax.
        num_workers: processes that read pictures.
        shows: show the progress on a terminal.
    """
    images = labeled.images
    ids: Sequence[Any] = labeled.ids
    names = "".join(f"{name}\0" for name in ids)
    pictures_sha256 = None
    if isinstance(images, Tensor):
        # Of each picture in a file, the store has the digest.
        pictures_sha256 = hashes(of=images)["of"]
    writer = LabelWriter(
        place,
        classes,
        top_k=top_k,
        provenance={
            "pictures": labeled.name,
            "examples": len(ids),
            "ids_sha256": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
            "pictures_sha256": pictures_sha256,
            "weights_fingerprint": int(digest_of(weights_of(network))),
            "temperature": temperature,
            "views": f"as they are, not augmented. {labeled.input.note}",
            "batch": labeled.batch_size,
            **(about or {}),
        },
        # What a kill costs, against the number of files.
        rows_per_part=min(max(-(-len(ids) // PARTS), FEWEST_ROWS), MOST_ROWS),
        resume=resume,
    )
    with writer:
        done = 0
        if writer.there is not None and writer.last is not None:
            done = ids.index(writer.last) + 1
            if not isinstance(images, Tensor):
                # Of those in a tensor, the store's provenance has the hash.
                refuse_other_pictures(
                    writer.there, lambda name: images.path(bisect_left(ids, name)), leave_out
                )
        first_batch = 0
        batches = 0
        if not writer.complete:
            first_batch = done // labeled.batch_size
            batches = len(labeled)
        lines = count_lines("batches labeled", is_shown=shows, total=batches, done=first_batch)
        batches_done = first_batch
        with progress(shows, name="labels", start=first_batch, steps=batches) as bar:
            for batch in loader(labeled, first_batch, batches, num_workers):
                pictures, numbers, digests, left_out = batch
                for number, reason in left_out:
                    if number >= done:
                        leave_out(reason)
                # Of a batch of which some are done, all are run again: a smaller batch may round
                # otherwise.
                is_new = numbers >= done
                if is_new.any():
                    logits_BC = logits_of(network, [pictures]).float() / temperature
                    refuse_infinite(logits_BC, [ids[number] for number in numbers.tolist()])
                    new_ids = [ids[number] for number in numbers[is_new].tolist()]
                    probabilities = logits_BC[is_new].softmax(dim=1)
                    # The new ones are the last. There are no digests of pictures in a tensor.
                    new_digests = digests[-len(new_ids) :] or None
                    writer.add(new_ids, probabilities, new_digests)
                bar.update()
                batches_done += 1
                lines(batches_done)
    return LabelStore(place)


def refuse_other_pictures(
    store: LabelStore, file: Callable[[Any], str | Path | None], unread: Say
) -> None:
    """Refuse labels of pictures that were replaced under their names.

    1,000 pictures are compared by their bytes.

    Args:
        store: of the labels.
        file: return the file of an id, or None, which is not compared.
        unread: is told of a file that cannot be read, and is not compared either.

    Cost: one reading of each of these files, and no decoding.
    """
    if not store.has_digests:
        return
    compared = min(len(store), COMPARED)
    # Evenly over the store, in the order of the names.
    rows = np.linspace(0, len(store) - 1, compared).astype(int)
    others = []
    with count_bar("comparing pictures with those that were labeled", is_shown=True) as update:
        for where, table in store.taken(rows, ["id", "digest"]):
            for row in table.to_pylist():
                path = file(row["id"])
                if path is None:
                    continue
                content = ask(digest, str(path))
                if content is None:
                    unread(f"{shown(path)}: it was labeled before, and cannot be read now.")
                elif content[:DIGEST_BYTES] != row["digest"]:
                    others.append(row["id"])
            update(int(where[-1]) + 1)
    if others:
        raise MetaplError(
            f"{len(others):,} of {compared:,} pictures that {store.folder} has labels of are other "
            f"ones now: {few(others)}; put back those that were labeled, or label these (metapl "
            "label) to another folder."
        )


def refuse_infinite(logits_BC: Tensor, names: Sequence[Any]) -> None:
    """Refuse outputs that are not finite, by the names of their examples."""
    are_finite = logits_BC.isfinite().all(dim=1).tolist()
    diverged = [name for name, finite in zip(names, are_finite, strict=True) if not finite]
    if diverged:
        raise MetaplError(
            f"the network's outputs are not finite for {few(diverged)}: its training diverged "
            "(train again with a smaller learning rate), or the temperature is too small."
        )


# ------------------------------------------------------------------------ labels that are learned


def write_all_labels(
    network: nn.Module, data: Data, input: Input, folder: Path, say: Say
) -> dict[str, Tensor]:
    """Return a network's class distributions of the unlabeled and the labeled examples.

    They are stored in the folder of the run, and gone on with if the weights are the same.

    Returns: float32 (n, C) by "unlabeled" and "labeled".
    """
    labels = {}
    for part in ("unlabeled", "labeled"):
        images = getattr(data, part).images
        numbers = range(len(images))
        to_label = ToLabel(images=images, ids=numbers, name=part, input=input)
        store = write_labels(network, to_label, folder / FOLDER / part, data.classes, say)
        labels[part] = _distributions(store, numbers, say)
    say(f"the teacher's labels are in {folder / FOLDER}")
    return labels


def read_labels(store: str, images: FileImages | Files, files: Files, say: Say) -> Tensor:
    """Return the class distributions of pictures by a store, float32 (n, C).

    Args:
        store: its folder, in which pictures are called by their paths in a folder of theirs.
        images: the pictures.
        files: of the folder that they are in.
        say: is told what is missing.
    """
    opened = LabelStore(Path(store))
    paths = [images.path(n).relative_to(files.root).as_posix() for n in range(len(images))]
    return _distributions(opened, opened.ids_of_files(files.root, paths), say)


def _distributions(store: LabelStore, names: Sequence[Any], say: Say) -> Tensor:
    """Return the distributions of examples, (n, C), and even ones for those that are missing."""
    rows = store.find(names)
    missing = [names[position] for position in np.flatnonzero(rows < 0).tolist()]
    if len(missing) == len(names):
        raise MetaplError(
            f"the store {store.folder} has none of the {len(missing):,} examples; expected their "
            "labels."
        )
    if missing:
        say(
            f"note: {store.folder} has no labels of {len(missing):,} pictures ({few(missing)}): "
            "even ones are taken."
        )
    classes = len(store.classes)
    distributions = torch.full((len(names), classes), 1 / classes)
    distributions[torch.from_numpy(rows >= 0)] = store.at(rows[rows >= 0])
    return distributions
