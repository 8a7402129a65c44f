"""Pictures by number, in memory or in files, and their batches.

Functions of the step, whatever breaks.
"""

import json
import math
import mmap
import os
import pickle
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feed_sources import same
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.data import StepBatches, StepSampler, loader
from metapl.errors import MetaplError
from metapl.pictures import (
    CIFAR_OPERATIONS,
    SVHN_OPERATIONS,
    Chain,
    EvaluationBatches,
    FileImages,
    Identity,
    LabeledBatches,
    MemoryImages,
    RandAugment,
    ResizedCrop,
    ShiftNoiseCutout,
    Sometimes,
    UnlabeledBatches,
    Weak,
    load_digits_split,
    read_image,
    replaced_files,
)
from metapl.pictures.batches import record_files
from metapl.processes import Share

COUNT, BROKEN = 12, (3, 4, 11)
SOUND = [number for number in range(COUNT) if number not in BROKEN]
INSTEAD = {3: 5, 4: 5, 11: 0}  # the next that can be read
STRONG = Chain((Weak(pad=1), RandAugment(cutout=2)))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Return paths of pictures: picture i is of level 10 i, of a size of its own.

    Three of them are cut off, and some names are odd.
    """
    odd = {1: "a b.png", 2: "ü.png", 5: "猫.png", 6: os.fsdecode(b"\xff.png"), 7: "line\nbreak.png"}
    found = [tmp_path / odd.get(number, f"{number:02}.png") for number in range(COUNT)]
    for number, path in enumerate(found):
        Image.new("RGB", (10 + number, 14), (10 * number, 10 * number, 255 - 10 * number)).save(
            path
        )
        if number in BROKEN:
            path.write_bytes(path.read_bytes()[:-30])
    return found


def batches_of_files(paths: list[Path], view: Any, crop: ResizedCrop | None) -> list[Any]:
    """Return batches of eight rows of each kind that several processes share, of readable files."""
    files = FileImages([paths[number] for number in SOUND], size=(6, 6))
    count = len(SOUND)
    labels = torch.arange(count)
    stored = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    labeled = LabeledBatches(
        files, labels, StepSampler(count, 8, seed=1), view, seed=2, crop=crop, stored=stored
    )
    sampler = StepSampler(count, 8, seed=3, stream=1)
    weak: Any = Identity() if crop is not None else Weak(pad=1)
    unlabeled = UnlabeledBatches(files, sampler, weak, view, seed=4, crop=crop)
    return [labeled, unlabeled]


PAIRED_ALWAYS = RandAugment(
    n=1, operations=("Sample Pairing",), probability=(1.0, 1.0), cutout=0, magnitude=5
)
SHARED_VIEWS: dict[str, Any] = {
    "no others": RandAugment(operations=SVHN_OPERATIONS, cutout=2),
    "moved and noisy": Chain((Weak(pad=1), ShiftNoiseCutout())),
    "Sample Pairing": RandAugment(operations=CIFAR_OPERATIONS, cutout=2),
    "in a chain": Chain((Weak(pad=1), RandAugment(n=3, cutout=2), Weak(pad=1))),
    "sometimes": Sometimes(RandAugment(n=3, cutout=2), 0.5),
    "sometimes, or another": Sometimes(
        PAIRED_ALWAYS, 0.5, otherwise=RandAugment(n=3, cutout=2, operations=CIFAR_OPERATIONS)
    ),
    "twice": Chain((PAIRED_ALWAYS, PAIRED_ALWAYS)),
}


# Crops are made before the views, which see that in the pictures that are mixed with others alone.
CROPPED = ("no others", "sometimes, or another", "twice")


@pytest.mark.parametrize(
    ("name", "crop"),
    [(name, None) for name in SHARED_VIEWS] + [(name, ResizedCrop(6)) for name in CROPPED],
    ids=[*SHARED_VIEWS, *(f"{name}, crop" for name in CROPPED)],
)
def test_a_process_makes_the_rows_of_its_share_with_the_bits_that_they_have_in_the_batch(
    name: str, crop: ResizedCrop | None, paths: list[Path]
) -> None:
    shares = 4
    for batches in batches_of_files(paths, SHARED_VIEWS[name], crop):
        for step in range(6):
            parts = [Share(batches, number, shares)[step] for number in range(shares)]
            assert all(len(t) == 2 for part in parts for t in part)
            together = tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
            assert same(together, batches[step])
            # In two halves, as where pictures are changed on the device.
            share = Share(batches, 1, shares)
            assert same(share.augment(step, share.raw()[step]), parts[1])


def test_a_process_reads_the_pictures_of_its_share_and_what_is_mixed_with_them(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Counter[str]()
    views = FileImages._views

    def counted(self: FileImages, index: int, crops: Any = ()) -> Any:
        read[str(self.path(index))] += 1
        return views(self, index, crops)

    monkeypatch.setattr(FileImages, "_views", counted)

    def files_read(view: Any, step: int) -> int:
        labeled, _ = batches_of_files(paths, view, None)
        share = Share(labeled, 1, 4)
        read.clear()
        share[step]
        return read.total()

    assert [files_read(SHARED_VIEWS["no others"], step) for step in range(5)] == [2] * 5
    assert [files_read(Identity(), step) for step in range(5)] == [2] * 5
    # Each of two pictures is mixed with another one, which may be the other of the two.
    paired = [files_read(PAIRED_ALWAYS, step) for step in range(8)]
    assert set(paired) <= {2, 3, 4}
    assert max(paired) > 2

    def of_a_user(images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        return images - images.mean(dim=0)

    assert files_read(of_a_user, 0) == 8, "it may look at the whole batch"
    (labeled, _) = batches_of_files(paths, of_a_user, None)
    assert same(Share(labeled, 1, 4)[0], tuple(t[2:4] for t in labeled[0]))


def test_a_share_can_be_sent_to_a_process_that_reads_for_it(paths: list[Path]) -> None:
    """A worker of a loader that is started anew, and not forked, gets a copy."""
    labeled, _ = batches_of_files(paths, SHARED_VIEWS["in a chain"], None)
    share = Share(labeled, 2, 4)
    assert same(pickle.loads(pickle.dumps(share))[3], share[3])


def numbers(images: Tensor) -> list[int]:
    """Return which pictures these are."""
    scaled = images * 255 if images.is_floating_point() else images
    return [round(float(x) / 10) for x in scaled[:, 0].float().mean((1, 2))]


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_file_is_replaced_by_the_next_of_its_set_or_left_out(
    cached: bool, paths: list[Path], tmp_path: Path
) -> None:
    files = FileImages(paths, size=(6, 7), log=tmp_path / "log")
    files = files.cached() if cached else files
    assert [files.path(i) for i in range(COUNT)] == paths
    for _ in range(2):  # as it is read, and as it is kept
        images, used = files.fetch(torch.arange(COUNT))
        assert images.shape == (COUNT, 3, 6, 7) == (COUNT, *files.shape)
        assert (
            used.tolist()
            == numbers(images)
            == [INSTEAD.get(number, number) for number in range(COUNT)]
        )
        images, used = files.fetch_sound(torch.arange(COUNT))
        assert used.tolist() == numbers(images) == SOUND
        images.zero_()  # what was given out can be written to
    # The rest of the folder, such as what is held out, is out of reach of a part.
    part = files.select(torch.tensor([1, 3, 11]))
    images, used = part.fetch(torch.tensor([0, 1, 2, 0]))
    assert (numbers(images), used.tolist()) == ([1, 1, 1, 1], [0, 0, 0, 0])
    assert [len(x) for x in (part, part.fetch(torch.arange(0))[0])] == [3, 0]
    found = replaced_files(tmp_path / "log")
    assert {*found} == {str(paths[number]) for number in BROKEN}
    assert all("truncated" in reason for reason in found.values())
    nothing = files.select(torch.tensor(BROKEN))
    assert nothing.fetch_sound(torch.arange(3))[0].shape == (0, 3, 6, 7)
    with pytest.raises(MetaplError, match="in a row"):
        nothing.fetch(torch.tensor([1]))
    Image.new("RGB", (9, 9), (30, 30, 225)).save(paths[3])  # it is mended
    assert files.fetch(torch.tensor([3]))[1].tolist() == [3]
    paths[3].unlink()
    assert files.fetch(torch.tensor([3]))[1].tolist() == [3 if cached else 5]


def test_pictures_in_memory_are_those_in_files(paths: list[Path]) -> None:
    files = FileImages(paths, size=(6, 6), colors="L").select(torch.tensor(SOUND))
    memory = MemoryImages(files.fetch(torch.arange(len(SOUND)))[0])
    assert files.shape == memory.shape == (1, 6, 6)
    order = torch.tensor([4, 2, 0])
    for one in (files, memory):
        images, used = one.select(order).select(torch.tensor([1, 0])).fetch(torch.tensor([0, 1, 0]))
        assert torch.equal(images, memory.data[[2, 4, 2]])
        assert used.tolist() == [0, 1, 0]
    for kind, wrong, more in (
        *(
            (MemoryImages, torch.zeros(2, 3, 4, 4), {}),
            (MemoryImages, torch.zeros(3, 4, 4, dtype=torch.uint8), {}),
        ),
        *((FileImages, [], {"size": (4, 4)}), (FileImages, ["a.png"], {"size": (0, 4)})),
    ):
        with pytest.raises(MetaplError, match="expected"):
            kind(wrong, **more)
    broken = FileImages([paths[3], paths[0]], size=(6, 6))
    with pytest.warns(UserWarning, match="left out"):  # where there is no log
        assert broken.fetch(torch.tensor([0]))[1].tolist() == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_kept_picture_is_decoded_once_by_whichever_process(
    paths: list[Path], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is broken is tried each time, as it may be whole by then, and recorded once."""
    counts, names, log = (
        np.frombuffer(mmap.mmap(-1, COUNT), dtype=np.uint8),
        [*map(str, paths)],
        tmp_path / "log",
    )

    def counted(path: str, **how: Any) -> Tensor:
        counts[names.index(path)] += 1  # by all processes together
        return read_image(path, **how)

    monkeypatch.setattr("metapl.pictures.batches.read_image", counted)
    images = FileImages(paths, size=(8, 8), log=log).cached()
    batches = UnlabeledBatches(images, StepSampler(COUNT, 4, seed=0), Weak(pad=1), None, seed=0)
    for _ in loader(batches, 0, 30, workers):
        pass
    # Two workers may be at the same picture at the same time.
    assert all(1 <= counts[number] <= max(workers, 1) for number in SOUND)
    assert all(counts[number] > workers for number in BROKEN)
    before = counts[SOUND].tolist()
    images.select(torch.tensor(SOUND)).fetch(torch.tensor([0, 1, 2]))
    list(loader(batches, 30, 36, workers))
    assert counts[SOUND].tolist() == before
    found = Counter(json.loads(line)["file"] for line in log.read_text().splitlines())
    assert found.keys() == {str(paths[number]) for number in BROKEN}
    assert max(found.values()) <= max(workers, 1)
    # Without it, every drawing decodes; so does a memory of its own, and a process that is not
    # forked.
    for other in (
        FileImages(paths, size=(8, 8)),
        images.cached(),
        pickle.loads(pickle.dumps(images)),
    ):
        at = int(counts[0])
        other.fetch(torch.tensor([0]))
        assert counts[0] == at + 1
    # A picture has 12,288 bytes.
    assert len(pickle.dumps(FileImages(paths, size=(64, 64)).cached())) < 20_000


def test_recorded_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    record_files(log, {"a.png": "empty", "ü\n.png": "cut"})
    record_files(log, {"a.png": "empty still", "b.png": "gone"})
    log.write_text(log.read_text() + '{"file": "c.p')  # a process was killed as it wrote
    record_files(log, {"d.png": "cut"})
    assert replaced_files(log) == {
        "a.png": "empty",
        "ü\n.png": "cut",
        "b.png": "gone",
        "d.png": "cut",
    }


def sources(kind: str, paths: list[Path]) -> dict[str, StepBatches[Any]]:
    """Return every kind of batches."""
    sampler, weak = StepSampler(COUNT, 7, seed=1), Weak(pad=1)
    files = FileImages(paths, size=(8, 8), log=paths[0].parent / "log")
    held = MemoryImages(
        torch.randint(0, 256, (COUNT, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator())
    )
    images: Any = {
        "files": files,
        "kept": files.cached(),
        "memory": held,
        "tensor": held.data[:, :1] / 255,
    }[kind]
    labels, distributions = torch.arange(COUNT), torch.arange(2 * COUNT).view(COUNT, 2)
    view = ShiftNoiseCutout() if kind == "tensor" else weak
    batches: dict[str, StepBatches[Any]] = {
        "labeled": LabeledBatches(images, labels, sampler, view, seed=0),
        "one view": UnlabeledBatches(images, sampler, view, None, seed=0, stored=distributions),
        "two views": UnlabeledBatches(
            images, sampler, view, view if kind == "tensor" else STRONG, seed=0
        ),
    }
    if kind != "tensor":
        batches["evaluation"] = EvaluationBatches(images, labels, 5)
    if kind in ("files", "kept"):
        crop = {"crop": ResizedCrop(8)}
        batches["crops"] = UnlabeledBatches(images, sampler, Identity(), STRONG, seed=0, **crop)
        batches["labeled crops"] = LabeledBatches(
            images, labels, sampler, Identity(), seed=0, **crop
        )
    return batches


@pytest.mark.parametrize(
    ("kind", "workers"), [("files", 0), ("files", 2), ("kept", 0), ("memory", 0), ("tensor", 0)]
)
def test_items_are_functions_of_their_position(kind: str, workers: int, paths: list[Path]) -> None:
    """By whichever process they are made, where the run stopped, and wherever views are taken."""
    for name, batches in sources(kind, paths).items():
        stop = min(5, len(batches))
        whole, state = [batches[step] for step in range(stop)], torch.get_rng_state()
        served = [
            tuple(item) for part in ((0, 2), (2, stop)) for item in loader(batches, *part, workers)
        ]
        assert torch.equal(torch.get_rng_state(), state)
        assert same(served, whole), name
        for x in pytree.tree_leaves(whole):
            assert x.dtype == torch.int64 or (
                x.dtype == torch.float32 and (kind == "tensor" or 0 <= x.min() <= x.max() <= 1)
            )
        if name != "evaluation":
            raw = batches.raw()[1]  # what crosses to a device that takes the views
            assert kind == "tensor" or raw[0].dtype == torch.uint8
            assert same(batches.augment(1, tuple(raw)), whole[1]), name
    # The bytes of both views cross once.
    assert len(sources(kind, paths)["two views"].raw()[0]) == 1


@pytest.mark.parametrize("kind", ["files", "kept"])
def test_labels_follow_the_pictures(kind: str, paths: list[Path]) -> None:
    """That replace a broken one."""
    for name, batches in sources(kind, paths).items():
        if name in ("labeled", "labeled crops"):
            batches.__dict__["view"] = Identity()
            for x, y in (batches[step] for step in range(4)):
                assert numbers(x) == y.tolist()
                assert not {*y.tolist()} & {*BROKEN}
    served = [(numbers(x), y.tolist()) for x, y in sources(kind, paths)["evaluation"]]
    assert served == [([0, 1, 2], [0, 1, 2]), ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9]), ([10], [10])]


def test_crops_are_boxes_of_the_files_and_mirrored(tmp_path: Path) -> None:
    y, x = np.mgrid[0:40, 0:60]
    Image.fromarray(np.stack([6 * y, 4 * x, 0 * x], axis=2).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    images = FileImages([tmp_path / "a.png"] * 8, size=(10, 10))
    crop = ResizedCrop(10, scale=(0.2, 0.9))
    batches = LabeledBatches(
        images, torch.arange(8), StepSampler(8, 8, seed=0), Identity(), seed=0, crop=crop
    )
    whole = read_image(tmp_path / "a.png")[None].float() / 255
    shown, (labels, fetched) = batches[0], (batches.fetch(0)[1], batches.fetch(0)[0])
    boxes, flips = crop.boxes(batches._seeds()[0], 0, batches.sampler.indices(0), 40, 60)
    assert 0 < flips.sum() < 8
    assert torch.equal(shown[1], labels)
    for got, (top, left, height, width), flip in zip(
        fetched / 255, boxes.tolist(), flips.tolist(), strict=True
    ):
        part = whole[:, :, top : top + height, left : left + width]
        expected = torch.nn.functional.interpolate(part, (10, 10), mode="bilinear", antialias=True)[
            0
        ]
        assert (got - (expected.flip(2) if flip else expected)).abs().max() < 2 / 255
    memory = MemoryImages(torch.zeros(8, 3, 4, 4).byte())
    with pytest.raises(MetaplError, match="crop"):
        LabeledBatches(memory, torch.arange(8), StepSampler(8, 4, 0), Identity(), seed=0, crop=crop)


def test_views_of_one_step_and_copies_of_one_example_share_no_draws() -> None:
    # One seed throughout, and blank images, so that only the noise is left.
    view, blank, sampler = (
        ShiftNoiseCutout(0, 1.0, 0),
        torch.zeros(40, 1, 8, 8),
        StepSampler(40, 40, 0),
    )
    x, _ = LabeledBatches(blank, torch.zeros(40), sampler, view, seed=0)[3]
    weak, strong = UnlabeledBatches(blank, sampler, view, view, seed=0)[3]
    correlations = torch.corrcoef(torch.stack([x.flatten(), weak.flatten(), strong.flatten()]))
    assert (correlations - torch.eye(3)).abs().max() < 4 / math.sqrt(x.numel())
    x, y = LabeledBatches(
        torch.rand(5, 1, 8, 8), torch.arange(5), StepSampler(5, 12, seed=0), view, seed=0
    )[0]
    assert len(y.unique()) < len(y)
    assert len(x.flatten(1).unique(dim=0)) == len(x)
    plain = UnlabeledBatches(torch.rand(40, 1, 8, 8), sampler, Identity(), Identity(), seed=0)
    assert torch.equal(plain[5][0], plain[5][1])
    assert torch.equal(plain[5][0], plain.images[sampler.indices(5)])


def test_batches_end_and_refuse_what_does_not_fit() -> None:
    images, sampler = torch.rand(5, 1, 8, 8), StepSampler(5, 2, seed=0)

    def batches(steps: int | None = None, labels: int = 5, size: int = 5) -> Any:
        return LabeledBatches(
            images, torch.arange(labels), StepSampler(size, 2, seed=0), Identity(), 0, steps
        )

    assert (len(batches()), len(batches(3)), len([*batches(3)])) == (sys.maxsize, 3, 3)
    assert batches()[10**12][0].shape == (2, 1, 8, 8)
    for step in (3, -1):
        with pytest.raises(IndexError, match="step"):
            batches(3)[step]
    refused = [lambda g=g: batches(**g) for g in ({"labels": 4}, {"size": 6}, {"steps": -1})]
    held = MemoryImages(torch.zeros(5, 1, 2, 2).byte())
    refused += [
        lambda g=g: EvaluationBatches(held, torch.zeros(g[0]), g[1]) for g in ((3, 2), (5, 0))
    ]
    refused += [lambda s=s: loader(batches(3), *s) for s in ((-1, 2), (2, 1), (0, 4))]
    for make in (*refused, lambda: UnlabeledBatches(images[:4], sampler, Identity(), None, 0)):
        with pytest.raises(MetaplError, match="expected"):
            make()


def test_digits_are_disjoint_keep_their_labels_and_are_a_function_of_the_seed() -> None:
    def parts(labels: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        split = load_digits_split(labels, seed=seed)
        return [
            split.labeled,
            (split.unlabeled, split.unlabeled_truth),
            split.validation,
            split.test,
        ]

    def rows(x: Tensor) -> set[tuple[float, ...]]:
        return {tuple(row) for row in x.flatten(1).tolist()}

    data, found = load_digits(), parts(2, 0)
    pairs = zip(data.images, data.target, strict=True)
    truth = {tuple((image / 16).flatten().tolist()): int(label) for image, label in pairs}
    assert len(truth) == 1797  # no image comes twice, so an image is its own name
    assert [len(rows(x)) for x, _ in found] == [20, 1180, 197, 400]
    assert set.union(*(rows(x) for x, _ in found)) == {*truth}
    share = torch.cat([y for _, y in found]).bincount() / 1797
    for x, y in found:
        assert [truth[tuple(row)] for row in x.flatten(1).tolist()] == y.tolist()
        assert (x.shape[1:], x.dtype, y.dtype) == ((1, 8, 8), torch.float32, torch.int64)
    assert found[0][1].bincount().tolist() == [2] * 10
    assert all((y.bincount() - share * len(y)).abs().max() <= 1 for _, y in found[2:])
    for (x, _), (again, _), (drawn, _) in zip(found, parts(2, 0), parts(2, 1), strict=True):
        assert torch.equal(x, again)
        assert rows(x) != rows(drawn)
    assert rows(found[0][0]) < rows(parts(4, 0)[0][0])
    for wrong in (0, 150):
        with pytest.raises(MetaplError, match=str(wrong)):
            load_digits_split(labels_per_class=wrong, seed=0)
