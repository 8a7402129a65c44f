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

from metapl.apps.label_store import DIGEST_BYTES, LabelStore, LabelWriter, is_text
from metapl.apps.methods import Data, ReducedMpl
from metapl.apps.pictures.batches import FileImages
from metapl.apps.pictures.folders import Files, ask, digest, hashes, scan_labeled, scan_unlabeled
from metapl.apps.pictures.input import BATCH, Input
from metapl.apps.progress import count_bar, count_lines
from metapl.data.steps import StepBatches, loader
from metapl.errors import MetaplError, few
from metapl.execution.batch import digest as digest_of
from metapl.execution.shards import weights_of
from metapl.metrics.predictions import logits_of
from metapl.runs.terminal import progress
from metapl.training import Say
from metapl.words import shown

FOLDER = "labels"  # where a run keeps the stored labels, in its folder

# The most parts of a store, unless that would make them too large; rows of a part; and pictures
# that are compared with those that were labeled.
PARTS, FEWEST_ROWS, MOST_ROWS, COMPARED = 1000, 1024, 16_384, 1000

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
    """

    images: Tensor | FileImages | Files
    ids: Sequence[str] | range
    name: str
    input: Input
    batch_size: int = BATCH

    @property
    def steps(self) -> int:  # type: ignore[override]  # follows from the rest
        return -(-len(self.ids) // self.batch_size)

    def batch(self, step: int) -> Read:
        numbers = range(len(self.ids))[step * self.batch_size : (step + 1) * self.batch_size]
        if isinstance(self.images, Tensor):
            return self.images[numbers.start : numbers.stop], torch.tensor(numbers), [], []
        pictures, sound, digests, left_out = (
            list[Tensor](),
            list[int](),
            list[bytes](),
            list[tuple[int, str]](),
        )
        for number in numbers:
            path, name = self.images.path(number), self.ids[number]
            try:
                if not is_text(name):
                    raise MetaplError(f"{shown(path)}: its name is not UTF-8; rename it.")
                picture, content = self.input.read(path), digest(str(path))
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
    check: bool = False,
    shows: bool = False,
) -> LabelStore:
    """The store of softmax(network(x) / temperature) of every picture; one begun with the same is gone on with.

    Args:
        network: gives logits; it runs in eval mode, without gradients, in the precision of its
            weights, on the device of its first parameter. Afterwards it is in the mode that it was
            in.
        place, classes, top_k, resume: as of :class:`~metapl.apps.label_store.LabelWriter`.
        leave_out: is told of each file that is left out, with the reason, or that was labeled and
            cannot be read now.
        about: what else the store says of its labels.
        check: compare all pictures that are labeled already with what they were, not a sample.
        shows: show the progress on a terminal.
    """
    ids: Sequence[Any] = labeled.ids
    names = "".join(f"{name}\0" for name in ids)
    provenance = {
        "pictures": labeled.name,
        "examples": len(ids),
        "ids_sha256": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
        # Of each picture in a file, the store has what it was.
        "pictures_sha256": hashes(of=labeled.images)["of"]
        if isinstance(labeled.images, Tensor)
        else None,
        "weights_fingerprint": int(digest_of(weights_of(network))),
        "temperature": temperature,
        "views": f"as they are, not augmented. {labeled.input.note}",
        "batch": labeled.batch_size,
        **(about or {}),
    }
    # What a kill costs, against the number of files.
    rows_per_part = min(max(-(-len(ids) // PARTS), FEWEST_ROWS), MOST_ROWS)
    how: dict[str, Any] = {"top_k": top_k, "provenance": provenance, "rows_per_part": rows_per_part}
    with LabelWriter(place, classes, **how, resume=resume) as writer:
        done = 0
        if writer.there is not None and writer.last is not None:
            done = ids.index(writer.last) + 1
            if not isinstance(labeled.images, Tensor):
                path = labeled.images.path
                refuse_other_pictures(
                    writer.there, lambda name: path(bisect_left(ids, name)), leave_out, check=check
                )
        first, steps = (0, 0) if writer.complete else (done // labeled.batch_size, len(labeled))
        lines = count_lines("batches labeled", is_shown=shows, total=steps, done=first)
        batches_done = first
        with progress(shows, name="labels", start=first, steps=steps) as bar:
            for x, numbers, digests, left_out in loader(labeled, first, steps, num_workers):
                for number, reason in left_out:
                    if number >= done:
                        leave_out(reason)
                # Of a batch of which some are done, all are run again: a smaller batch may round
                # otherwise.
                new = numbers >= done
                if new.any():
                    logits_BC = logits_of(network, [x]).float() / temperature
                    refuse_infinite(logits_BC, [ids[number] for number in numbers.tolist()])
                    names_of = [ids[number] for number in numbers[new].tolist()]
                    writer.add(
                        names_of, logits_BC[new].softmax(dim=1), digests[-len(names_of) :] or None
                    )
                bar.update()
                batches_done += 1
                lines(batches_done)
    return LabelStore(place)


def refuse_other_pictures(
    store: LabelStore, file: Callable[[Any], str | Path | None], unread: Say, *, check: bool = False
) -> None:
    """Refuse labels of pictures that were replaced under their names: 1,000 are compared by their
    bytes, or with ``check`` all.

    ``file`` gives the file of an id, or None, which is not compared; nor is one that cannot be
    read, which ``unread`` is told of. Cost: one reading of a file; of a million of 100 KB some four
    minutes of a local disk, and no decoding.
    """
    if not store.has_digests:
        return
    compared = len(store) if check else min(len(store), COMPARED)
    rows = np.linspace(0, len(store) - 1, compared).astype(
        int
    )  # evenly over the store, in the order of the names
    others = []
    with count_bar("comparing pictures with those that were labeled", is_shown=True) as update:
        for where, some in store.taken(rows, ["id", "digest"]):
            for row in some.to_pylist():
                path = file(row["id"])
                found = None if path is None else ask(digest, str(path))
                if found is not None and found[:DIGEST_BYTES] != row["digest"]:
                    others.append(row["id"])
                elif path is not None and found is None:
                    unread(f"{shown(path)}: it was labeled before, and cannot be read now.")
            update(int(where[-1]) + 1)
    if others:
        raise MetaplError(
            f"{len(others):,} of {compared:,} pictures that {store.folder} has labels of are other "
            f"ones now: {few(others)}; put back those that were labeled, or label these (metapl "
            "label) to another folder."
        )


def refuse_infinite(logits_BC: Tensor, names: Sequence[Any]) -> None:
    finite = logits_BC.isfinite().all(dim=1).tolist()
    if bad := [name for name, fine in zip(names, finite, strict=True) if not fine]:
        raise MetaplError(
            f"the network's outputs are not finite for {few(bad)}: its training diverged (train "
            "again with a smaller learning rate), or the temperature is too small."
        )


# -------------------------------------------------------------------------------------- Reduced MPL


def stored_labels(
    teacher: nn.Module | None, config: Any, method: ReducedMpl, folder: Path, data: Data, say: Say
) -> dict[str, Tensor]:
    """The class distributions of a training's unlabeled, and perhaps its labeled, examples, float32 (n, C).

    Those by a teacher are stored in the run's folder, and gone on with if its weights are the same;
    without one, they are in the stores that the method's settings name, where pictures are called
    by their paths in the folder.
    """
    if teacher is None and "labeled" not in method.stores:
        say(
            "note: without --labeled-labels, the labels are adjusted by the student's feedback "
            "alone."
        )
    found = {}
    for part in ("unlabeled", "labeled") if teacher is not None else method.stores:
        images, ids = getattr(data, part).images, range(len(getattr(data, part).images))
        if teacher is None:
            store, root = LabelStore(method.stores[part]), config.scan(part).root
            names: Any = called(
                store, root, [images.path(number).relative_to(root).as_posix() for number in ids]
            )
        else:
            labeled, names = ToLabel(images=images, ids=ids, name=part, input=config.input), ids
            store = write_labels(teacher, labeled, folder / FOLDER / part, data.classes, say)
        rows = store.find(names)
        missing = [names[row] for row in np.flatnonzero(rows < 0)]
        place, count = store.folder, len(missing)
        if count == len(names):
            raise MetaplError(
                f"the store {place} has none of the {count:,} examples; expected their labels."
            )
        if missing:
            say(
                f"note: {place} has no labels of {count:,} pictures ({few(missing)}): even ones "
                "are taken."
            )
        found[part] = torch.full((len(names), len(store.classes)), 1 / len(store.classes))
        found[part][torch.from_numpy(rows >= 0)] = store.at(rows[rows >= 0])
    if teacher is not None:
        say(f"the teacher's labels are in {folder / FOLDER}")
    return found


def check_labels_given(config: Any, method: ReducedMpl) -> None:
    """Refuse a store that is of other classes, or of other pictures, or is damaged.

    Nothing is written.
    """
    for part, place in method.stores.items():
        if not config.places:
            raise MetaplError(
                f"--labels {place}: expected pictures in folders; {config.name} has none."
            )
        store, own = LabelStore(place), scan_labeled(config.labeled).classes
        if store.classes != own:
            expected = f"those of {config.labeled}: {few(own)}"
            raise MetaplError(f"{place} has the classes {few(store.classes)}; expected {expected}.")
        files = scan_unlabeled(getattr(config, part))
        known = dict(zip(called(store, files.root, files.names), files.paths(), strict=True))
        refuse_other_pictures(store, known.get, lambda text: None)


def called(store: LabelStore, root: Path, names: Sequence[str]) -> list[str]:
    """What a store calls files.

    Their paths in the folder that was labeled; of one that was moved, in the root.
    """
    labeled, inside = Path(str(store.provenance.get("pictures", "-"))).resolve(), Path()
    if root.resolve().is_relative_to(
        labeled
    ):  # that of a list is the folder that its files have in common
        inside = root.resolve().relative_to(labeled)
    return [(inside / name).as_posix() for name in names]
