"""A teacher's labels of many pictures, written to a store: in eval mode, of pictures as they are.

Reduced MPL takes them of the run's own teacher, or of a store or another run that a user gives.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels.files import DIGEST_BYTES, PAGE_ROWS
from metapl.apps.labels.store import is_text
from metapl.apps.machine.progress import counting, progress
from metapl.apps.methods import Data, ReducedMpl
from metapl.apps.pictures.batches import in_unit_range
from metapl.apps.pictures.folders import ask, digest, hashes, scan_labeled, scan_unlabeled
from metapl.apps.pictures.input import Input
from metapl.apps.pictures.store import FileImages, Images, MemoryImages
from metapl.apps.run import EndedRun
from metapl.data.feed import feed
from metapl.data.steps import StepBatches
from metapl.errors import MetaplError, few
from metapl.execution.batch import digest as digest_of
from metapl.execution.ranks import ALONE, Ranks
from metapl.metrics.predictions import logits_of
from metapl.training import Say
from metapl.training.selection import weights_of
from metapl.words import shown

# Pictures in a pass; the most parts of a store, unless that would make them too large; rows of a part, at least.
BATCH, PARTS, FEWEST_ROWS = 256, 1000, 1024

# Pictures (B, C, H, W); their numbers, int64 (B,); what their files begin with as SHA-256, uint8 (B, 16) or (B, 0);
# and the numbers of files that cannot be read, each with the reason.
Read = tuple[Tensor, Tensor, Tensor, list[tuple[int, str]]]


@dataclass(frozen=True, eq=False)
class InOrder(StepBatches[Read], ABC):
    """Pictures as they are, one batch after another from the ``first``; of several shares, those of one."""

    batch_size: int = field(default=BATCH, kw_only=True)
    first: int = field(default=0, kw_only=True)
    share: int = field(default=0, kw_only=True)
    shares: int = field(default=1, kw_only=True)

    @abstractmethod
    def pictures(self) -> int:
        """How many there are."""

    def file(self, number: int) -> Path | None:
        """Where a picture is; None where it is in no file."""
        return None

    def content(self) -> str | None:
        """SHA-256 of pictures that lie in memory; None of those in files, of which the store knows each."""
        return None

    @property
    def steps(self) -> int:  # type: ignore[override]  # follows from the rest
        """As many in every share: behind the last picture, batches are empty."""
        return -(-(-(-self.pictures() // self.batch_size) - self.first) // self.shares)

    def number(self, step: int) -> int:
        """Of a batch among those of all shares."""
        return self.first + step * self.shares + self.share

    def numbers(self, step: int) -> range:
        start = self.number(step) * self.batch_size
        return range(start, min(start + self.batch_size, self.pictures()))


@dataclass(frozen=True, eq=False)
class PictureFiles(InOrder):
    """The ``count`` pictures in the files that ``path`` gives by number."""

    input: Input
    path: Callable[[int], Path]
    count: int

    def pictures(self) -> int:
        return self.count

    def file(self, number: int) -> Path:
        return self.path(number)

    def batch(self, step: int) -> Read:
        read: list[tuple[Tensor, int, list[int]]] = []
        skipped = []
        for number in self.numbers(step):
            path = self.path(number)
            try:
                ((_, picture),) = self.input.read(path)
                read.append((picture, number, list(digest(str(path))[:DIGEST_BYTES])))
            except MetaplError as error:
                skipped.append((number, str(error)))
            except OSError as error:  # it was read a moment ago
                skipped.append((number, f"{shown(path)}: {error.strerror}."))
        pictures, used, digests = zip(*read, strict=True) if read else ((), (), ())
        x = torch.stack(pictures) if pictures else torch.empty(0, *self.input.shape)
        return x, torch.tensor(used, dtype=torch.int64), torch.tensor(digests, dtype=torch.uint8), skipped


@dataclass(frozen=True, eq=False)
class SourcePictures(InOrder):
    """The pictures of a source of batches: a tensor, uint8 or float32 in [0, 1], or images in memory or in files."""

    images: Tensor | Images

    def pictures(self) -> int:
        return len(self.images)

    def file(self, number: int) -> Path | None:
        return self.images.path(number) if isinstance(self.images, FileImages) else None

    def content(self) -> str | None:
        if isinstance(self.images, FileImages):
            return None
        parts = [self.images.data, self.images.indices] if isinstance(self.images, MemoryImages) else [self.images]
        return hashes(pictures=[part for part in parts if part is not None])["pictures"]

    def batch(self, step: int) -> Read:
        images, used = self.images, torch.tensor(self.numbers(step), dtype=torch.int64)
        digests = torch.empty(len(used), 0)
        if isinstance(images, FileImages):
            x, used = images.fetch_sound(used)
            contents = [ask(digest, str(images.path(number))) for number in used.tolist()]
            sound = [row for row, content in enumerate(contents) if content is not None]
            x, used = x[sound], used[sound]
            digests = torch.tensor([list(content[:DIGEST_BYTES]) for content in contents if content], dtype=torch.uint8)
        else:
            x = images[used] if isinstance(images, Tensor) else images.fetch(used)[0]
        return in_unit_range(x) if x.dtype == torch.uint8 else x, used, digests, []


@dataclass(frozen=True)
class Labeled:
    """What is to be labeled."""

    pictures: InOrder
    ids: Sequence[str] | range  # of each number, ascending: names of files in their folder, or the numbers themselves
    name: str  # of the folder or of the data set

    def hash(self) -> str:
        whole = hashlib.sha256()
        for name in self.ids:
            whole.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        return whole.hexdigest()


def to_label(pictures: str, given: Input, batch_size: int = BATCH) -> Labeled:
    """The pictures of a folder, or those of scikit-learn by the name ``digits``."""
    if pictures == "digits" and given.kind == "digit":
        from sklearn.datasets import load_digits

        images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 16.0
        return Labeled(SourcePictures(images, batch_size=batch_size), range(len(images)), "digits")
    folder = Path(pictures)
    if not folder.expanduser().is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise MetaplError(f"{folder} {state}; expected a folder with pictures, or for a run of digits the word digits.")
    files = scan_unlabeled(folder)
    return Labeled(PictureFiles(given, files.path, len(files), batch_size=batch_size), files.names, str(folder))


def provenance(network: nn.Module, labeled: Labeled, given: Input, *, temperature: float = 1.0) -> dict[str, Any]:
    """What a store says of its labels; what is gone on with must say the same."""
    return {
        "pictures": labeled.name,
        "examples": len(labeled.ids),
        "ids_sha256": labeled.hash(),
        "pictures_sha256": labeled.pictures.content(),
        "weights_fingerprint": int(digest_of(weights_of(network))),
        "temperature": temperature,
        "views": f"as they are, not augmented. {given.note}",
        "batch": labeled.pictures.batch_size,
    }


def rows_per_part(examples: int) -> int:
    """Rows of a part of a store of so many examples: what a kill costs, against the number of files.

    >>> rows_per_part(50_000), rows_per_part(1_281_167), rows_per_part(300_000_000)
    (1024, 1282, 16384)
    """
    return min(max(-(-examples // PARTS), FEWEST_ROWS), PAGE_ROWS)


def store_labels(
    network: nn.Module,
    labeled: Labeled,
    place: Path,
    classes: Sequence[str],
    about: Mapping[str, Any],
    say: Say,
    ranks: Ranks = ALONE,
) -> LabelStore:
    """The store of a network's labels in a run's folder; one whose provenance is ``about`` is gone on with. Of several
    processes each labels its share, and the first one writes; they get the store when it is whole."""
    part = rows_per_part(len(labeled.ids))
    with ExitStack() as stack:
        writer = None
        if ranks.first:
            begun = LabelWriter(place, classes, provenance=about, rows_per_part=part, resume=place.exists())
            writer = stack.enter_context(begun)
        write_labels(network, labeled, writer, skip=say, ranks=ranks)
    ranks.gathered(None)  # the first one has sealed it
    return LabelStore(place)


def refuse_other_pictures(
    known: Iterable[tuple[Any, bytes]],
    file: Callable[[Any], str | Path | None],
    store: Path,
    *,
    tell_progress: bool,
    unread: Callable[[str], object] = lambda path: None,
) -> None:
    """Refuse labels of pictures that were replaced under their names: ``known`` ids with the digests that they had.

    ``file`` gives the file of an id, or None, which is not compared; nor is one that cannot be read, which ``unread``
    takes. Cost: one reading of every file: for a million of 100 KB some four minutes of a local disk, and no decoding.
    """
    others, count = [], 0
    with counting("comparing pictures with those that were labeled", tell_progress) as update:
        for count, (name, content) in enumerate(known, 1):
            path = file(name)
            found = None if path is None else ask(digest, str(path))
            if found is not None and found[:DIGEST_BYTES] != content:
                others.append(name)
            elif path is not None and found is None:
                unread(str(path))
            update(count)
    if others:
        raise MetaplError(
            f"{len(others):,} of the {count:,} pictures that {store} has labels of are other ones now, by their bytes: "
            f"{few(others)}; put back those that were labeled, or label these (metapl label) to another folder."
        )


def write_labels(
    network: nn.Module,
    labeled: Labeled,
    writer: LabelWriter | None,
    *,
    ranks: Ranks = ALONE,
    temperature: float = 1.0,
    num_workers: int = 0,
    skip: Callable[[str], None] = lambda reason: None,
    unread: Callable[[str], object] = lambda path: None,
    tell_progress: bool = False,
) -> None:
    """Write softmax(network(x) / temperature) of every picture behind those that the writer has, which it compares.

    Args:
        network: gives logits; it runs in eval mode, without gradients, in the precision of its weights, on the device
            of its first parameter. Afterwards it is in the mode that it was in.
        writer: entered; of these pictures, the same network, temperature and size of a batch, if it resumes. Of several
            processes the first one has it: the labels are sent there, in the order of the pictures.
        ranks: the processes that label together, each of them its share of the batches.
        skip: takes the reason of each file that is left out.
        unread: takes the path of each file that cannot be read, and of which the writer has labels.
    """
    ids: Sequence[Any] = labeled.ids
    done, complete = 0, False
    if writer is not None:
        there = LabelStore(writer.folder) if writer.complete else writer
        refuse_other_pictures(
            there.digests(),
            lambda name: labeled.pictures.file(bisect_left(ids, name)),
            writer.folder,
            tell_progress=tell_progress,
            unread=unread,
        )
        done, complete = 0 if writer.last is None else ids.index(writer.last) + 1, writer.complete
    done, complete = ranks.gathered((done, complete))[0]
    if complete:
        return
    # A share has the same batches wherever the labels are gone on with.
    first = done // labeled.pictures.batch_size // ranks.size * ranks.size
    pictures = replace(labeled.pictures, first=first, share=ranks.rank, shares=ranks.size)
    steps = len(pictures)
    every = max(1, (first + steps) // 10)
    source = feed(pictures, name="the pictures", stop=steps, num_workers=num_workers)
    with closing(source), progress(tell_progress, name="labels", start=first, steps=first + steps) as bar:
        for step in range(first, first + steps):
            x, numbers, digests, skipped = source.next()
            reasons = [reason for number, reason in skipped if number >= done]
            labels: list[Any] = []
            if len(numbers) or not ranks.alone:  # processes that hold parts of the network run it together
                # Of a batch of which some are done, all are run again: a smaller batch may round otherwise.
                given = x if len(x) else x.new_zeros(1, *x.shape[1:])
                logits_BC = logits_of(network, [given]).float()[: len(x)]
                names = [ids[number] for number in numbers.tolist()]
                refuse_infinite(logits_BC, names)
                kept = []
                for row, (name, number) in enumerate(zip(names, numbers.tolist(), strict=True)):
                    if number >= done and isinstance(name, str) and not is_text(name):
                        reasons.append(f"{shown(name)}: its name is not UTF-8; rename it.")
                    elif number >= done:
                        kept.append(row)
                scaled_BC, names = logits_BC[kept] / temperature, [names[row] for row in kept]
                refuse_infinite(scaled_BC, names, f"divided by the temperature {temperature}: expected a greater one")
                if kept:
                    contents = [bytes(row) for row in digests[kept].tolist()] if digests.shape[1] else None
                    labels = [names, scaled_BC.softmax(dim=1).cpu(), contents]
            for found, told in _of_all(ranks, (labels, reasons)):
                for reason in told:
                    skip(reason)
                if found and writer is not None:
                    writer.add(*found)
            bar.advance([x], {}, due=(step + 1) % every == 0 or step + 1 == first + steps)


def _of_all(ranks: Ranks, own: Any) -> list[Any]:
    """What every share has, in the first process; nothing in the others."""
    if ranks.alone:
        return [own]
    every: list[Any] | None = [None] * ranks.processes if ranks.first else None
    dist.gather_object(own, every)
    return [] if every is None else every[:: ranks.copies]


DIVERGED = "its training diverged: train again with a smaller learning rate"


def refuse_infinite(logits_BC: Tensor, names: Sequence[Any], why: str = DIVERGED) -> None:
    finite = logits_BC.isfinite().all(dim=1).tolist()
    if bad := [name for name, fine in zip(names, finite, strict=True) if not fine]:
        raise MetaplError(f"the network's outputs are not finite for {few(bad)}; {why}.")


# --------------------------------------------------------------------------------------------------------- Reduced MPL

FOLDER = "labels"  # where a run keeps the stored labels, in its folder
PICTURES_OF = {"labels": "unlabeled", "labeled_labels": "labeled"}  # the folder whose pictures each store has labels of


def label_by(teacher: nn.Module, given: Input, folder: Path, data: Data, say: Say, ranks: Ranks) -> dict[str, Tensor]:
    """Store the labels of a training's examples in its folder, or go on with those of the same weights; read them."""
    stored = {}
    for name, batches in (("unlabeled", data.unlabeled), ("labeled", data.labeled)):
        labeled = Labeled(SourcePictures(batches.images), range(len(batches.images)), name)
        about = provenance(teacher, labeled, given)
        store = store_labels(teacher, labeled, folder / FOLDER / name, data.classes, about, say, ranks)
        stored[name] = rows_of(store, labeled.ids)
    say(f"the teacher's labels are in {folder / FOLDER}")
    return stored


def rows_of(store: LabelStore, ids: Any) -> Tensor:
    """The distributions of these examples, float32 (n, C); even ones for examples that the store leaves out."""
    known = [(row, name) for row, name in enumerate(ids) if name in store]
    if not known:
        raise MetaplError(f"the store {store.folder} has none of the {len(ids):,} examples; expected their labels.")
    rows = torch.full((len(ids), len(store.classes)), 1 / len(store.classes))
    rows[[row for row, _ in known]] = store[[name for _, name in known]]
    return rows


def check_labels_given(config: Any, method: ReducedMpl) -> None:
    """Refuse a store or a run that is of other classes, or of other pictures, or is damaged; nothing is written."""
    for name, place in method.labels_from.items():
        if place is None:
            continue
        if not config.places:
            raise MetaplError(f"--{name.replace('_', '-')}: expected pictures in folders; {config.name} has none.")
        store = None if name == "teacher" else LabelStore(place)
        classes = EndedRun.load(Path(place)).classes if store is None else store.classes
        own = scan_labeled(config.labeled).classes
        if classes != own:
            raise MetaplError(
                f"the {'run' if store is None else 'store'} {place} has the classes {few(classes)}; expected those of "
                f"{config.labeled}, in this order: {few(own)}."
            )
        if store is not None:
            files = scan_unlabeled(getattr(config, PICTURES_OF[name]))
            file = dict(zip(files.names, files.paths(), strict=True)).get
            refuse_other_pictures(store.digests(), file, store.folder, tell_progress=True)


def labels_given(
    config: Any, method: ReducedMpl, data: Data, folder: Path, say: Say, ranks: Ranks
) -> dict[str, Tensor]:
    """The labels that a method's settings name; those of another run are stored in ``folder``."""
    given = {name: place for name, place in method.labels_from.items() if place is not None}
    folders, stores = {part: getattr(config, part) for part in PICTURES_OF.values()}, {}
    if "teacher" in given:
        run = EndedRun.load(Path(given["teacher"]))
        delivered = run.name("delivered")
        reads = run.cards[delivered].input
        say(f"labels are those of {run.heading(delivered)}")
        for part, pictures in folders.items():
            network, labeled = run.network(delivered).to(run.device), to_label(pictures, reads)
            about = {"run": str(run.folder.path), **provenance(network, labeled, reads)}
            place = folder / FOLDER / part
            stores[part] = store_labels(network, labeled, place, run.classes, about, say, ranks)
    else:
        stores = {PICTURES_OF[name]: LabelStore(place) for name, place in given.items()}
        if "labeled" not in stores:
            say("note: without --labeled-labels, the labels are adjusted by the student's feedback alone.")
    found = {}
    for part, store in stores.items():
        images, root = getattr(data, part).images, Path(folders[part])
        # In a store, pictures are called by their paths in the folder.
        names = [images.path(number).relative_to(root).as_posix() for number in range(len(images))]
        if missing := [name for name in names if name not in store]:
            which = f"{len(missing):,} pictures ({few(missing)})"
            say(f"note: {store.folder} has no labels of {which}: even ones are taken.")
        found[part] = rows_of(store, names)
    return found
