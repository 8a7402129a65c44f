"""Pictures that are kept in memory: the same as those in files, read once by whichever process, never a broken one."""

from __future__ import annotations

import json
import mmap
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from metapl.apps.pictures import (
    Chain,
    EvaluationBatches,
    FileImages,
    LabeledBatches,
    RandAugment,
    UnlabeledBatches,
    Weak,
    read_image,
    replaced_files,
)
from metapl.apps.pictures.store import record_files
from metapl.data import StepSampler, loader
from metapl.errors import MetaplError

COUNT, BROKEN = 12, (3, 7)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Pictures of several sizes, two of them cut off."""
    found = []
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 255, (10 + number, 14, 3), dtype=np.uint8)
        found.append(tmp_path / f"{number:02}.png")
        Image.fromarray(noise).save(found[-1])
    for number in BROKEN:
        found[number].write_bytes(found[number].read_bytes()[:-40])
    return found


class Decodings:
    """How often each file was read, by all processes together."""

    def __init__(self, patch: pytest.MonkeyPatch, paths: list[Path]) -> None:
        shared = np.frombuffer(mmap.mmap(-1, len(paths)), dtype=np.uint8)
        names = [str(path) for path in paths]

        def counted(path: str, **how: Any) -> Tensor:
            shared[names.index(path)] += 1
            return read_image(path, **how)

        patch.setattr("metapl.apps.pictures.store.read_image", counted)
        self.counts = shared


def every_batch(images: FileImages, workers: int) -> list[Tensor]:
    """Of two epochs, labelled, unlabelled and to evaluate on."""
    sampler, weak = StepSampler(COUNT, 4, seed=1), Weak(pad=1)
    labels = torch.arange(COUNT)
    strong = Chain((weak, RandAugment(cutout=2)))
    sources = (
        LabeledBatches(images, labels, sampler, weak, seed=0),
        UnlabeledBatches(images, sampler, weak, strong, seed=0),
        EvaluationBatches(images, labels, 5),
    )
    return [part for source in sources for item in loader(source, 0, min(6, len(source)), workers) for part in item]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_batches_are_those_of_the_files(paths: list[Path], tmp_path: Path, workers: int, mode: Any) -> None:
    """Broken files are replaced alike."""
    images = FileImages(paths, size=(8, 9), mode=mode, log=tmp_path / "log")
    plain, kept = every_batch(images, 0), every_batch(images.cached(), workers)
    assert len(plain) == len(kept) == 6 * 2 + 6 * 2 + 3 * 2
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_picture_is_decoded_once(
    paths: list[Path], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one worker for all, now and later; what is broken is tried each time, as it may be whole by then."""
    decodings = Decodings(monkeypatch, paths)
    images = FileImages(paths, size=(8, 8), log=tmp_path / "log").cached()
    sound = [number for number in range(COUNT) if number not in BROKEN]
    batches = UnlabeledBatches(images, StepSampler(COUNT, 4, seed=0), Weak(pad=1), None, seed=0)
    for _ in loader(batches, 0, 30, workers):
        pass
    # Two workers may be at the same picture at the same time.
    assert all(1 <= decodings.counts[number] <= max(workers, 1) for number in sound)
    assert all(decodings.counts[number] > workers for number in BROKEN)
    before = decodings.counts.copy()
    for again in (images, images.select(torch.tensor(sound)), images.select(torch.arange(COUNT)).logged(None)):
        again.fetch(torch.tensor([0, 1, 2]))
    list(loader(batches, 30, 36, 2))
    assert [int(decodings.counts[number]) for number in sound] == [int(before[number]) for number in sound]


def test_only_what_is_not_in_memory_is_looked_at_one_by_one(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []
    look = FileImages._try

    def watched(self: FileImages, index: int, crops: Any) -> Any:
        looked_at.append(index)
        return look(self, index, crops)

    monkeypatch.setattr(FileImages, "_try", watched)
    plain = FileImages(paths, size=(8, 9), log=tmp_path / "log")
    images = plain.cached()
    for indices, first, later in (
        ([5, 0, 5, 1], [5, 0, 5, 1], []),
        ([1, 2, 0], [2], []),
        ([3, 5, 7, 6], [3, 4, 7, 8, 6], [3, 4, 7, 8]),  # 3 and 7 are broken, and replaced by the next
        ([], [], []),
    ):
        chosen = torch.tensor(indices, dtype=torch.int64)
        for expected in (first, later):
            looked_at.clear()
            got, used = images.fetch(chosen)
            assert looked_at == expected
        assert got.shape == (len(indices), 3, 8, 9)
        assert used.tolist() == [{3: 4, 7: 8}.get(index, index) for index in indices]
        assert all(torch.equal(one, plain.fetch(used[[at]])[0][0]) for at, one in enumerate(got))
        looked_at.clear()
        got, used = images.fetch_sound(chosen)
        assert looked_at == [index for index in indices if index in BROKEN]
        assert used.tolist() == [index for index in indices if index not in BROKEN]
        assert all(torch.equal(one, plain.fetch(used[[at]])[0][0]) for at, one in enumerate(got))


def test_without_it_every_drawing_decodes(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decodings = Decodings(monkeypatch, paths)
    images = FileImages(paths, size=(8, 8))
    images.fetch(torch.tensor([0, 0, 1]))
    assert decodings.counts[:2].tolist() == [2, 1]


def test_parts_share_what_is_kept_and_know_which_picture_is_which(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decodings = Decodings(monkeypatch, paths)
    whole = FileImages(paths, size=(8, 8)).cached()
    part = whole.select(torch.tensor([10, 4, 0]))
    part.fetch(torch.tensor([0, 1]))
    images, used = whole.fetch(torch.tensor([4, 10, 0]))
    assert used.tolist() == [4, 10, 0]
    others, used = part.fetch(torch.tensor([1, 0, 2]))
    assert used.tolist() == [1, 0, 2]
    assert decodings.counts[[10, 4, 0]].tolist() == [1, 1, 1]
    for image, other, number in zip(images, others, (4, 10, 0), strict=True):
        assert torch.equal(image, read_image(paths[number], size=(8, 8)))
        assert torch.equal(image, other)
    # A set with a memory of its own leaves the first as it was.
    other = whole.select(torch.tensor([1, 2])).cached()
    other.fetch(torch.tensor([0]))
    whole.fetch(torch.tensor([1]))
    assert decodings.counts[1] == 2


def test_what_was_given_out_can_be_written_to(paths: list[Path]) -> None:
    images = FileImages(paths, size=(8, 8)).cached()
    first = images.fetch(torch.tensor([0]))[0]
    expected = first.clone()
    first.zero_()
    images.fetch(torch.tensor([0]))[0].zero_()
    images.fetch_sound(torch.tensor([0]))[0].zero_()
    assert torch.equal(images.fetch(torch.tensor([0]))[0], expected)


def test_a_broken_file_is_not_kept_and_may_be_mended(paths: list[Path], tmp_path: Path) -> None:
    images = FileImages(paths, size=(8, 8), log=tmp_path / "log").cached()
    assert images.fetch(torch.tensor([3]))[1].tolist() == [4]
    assert images.fetch_sound(torch.tensor([3, 5]))[1].tolist() == [5]
    Image.new("RGB", (9, 9), "red").save(paths[3])
    fetched, used = images.fetch(torch.tensor([3]))
    assert used.tolist() == [3]
    assert fetched[0, :, 0, 0].tolist() == [255, 0, 0]
    # What is kept stays, whatever becomes of its file.
    paths[3].unlink()
    assert images.fetch(torch.tensor([3]))[1].tolist() == [3]


def test_boxes_are_cut_from_the_files(paths: list[Path]) -> None:
    images = FileImages(paths, size=(8, 8)).cached()
    images.fetch(torch.tensor([0]))
    (box,), _ = images.fetch_crops(torch.tensor([0]), [[lambda height, width: (0, 0, 4, 4)]])
    with Image.open(paths[0]) as picture:
        expected = picture.resize((8, 8), Image.Resampling.BILINEAR, (0, 0, 4, 4))
    assert torch.equal(box[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_another_process_that_is_not_forked_reads_for_itself(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = FileImages(paths, size=(64, 64)).cached()
    expected = images.fetch(torch.arange(3))[0]
    content = pickle.dumps(images)
    assert len(content) < 20_000  # a picture has 12,288 bytes, and there are twelve
    again = pickle.loads(content)
    decodings = Decodings(monkeypatch, paths)
    for _ in range(2):
        assert torch.equal(again.fetch(torch.arange(3))[0], expected)
    assert decodings.counts[:3].tolist() == [2, 2, 2]


# ---------------------------------------------------------------------------------------------------- what is recorded


def test_a_broken_file_is_recorded_once_by_all_processes(paths: list[Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    images = FileImages(paths, size=(8, 8), log=log)
    batches = UnlabeledBatches(images, StepSampler(COUNT, COUNT, seed=0), Weak(pad=1), None, seed=0)
    for workers in (1, 2, 0):
        for _ in loader(batches, 0, 4, workers):
            pass
    images.select(torch.tensor(BROKEN[:1])).logged(log)
    images.fetch_sound(torch.arange(COUNT))
    found = Counter(json.loads(line)["file"] for line in log.read_text().splitlines())
    assert found == {str(paths[number]): 1 for number in BROKEN}
    # Another run on the same folder, or the rest of this one, adds what is new.
    again = FileImages(paths, size=(8, 8), log=log)
    paths[0].write_bytes(b"")
    again.fetch_sound(torch.arange(COUNT))
    assert len(log.read_text().splitlines()) == 3


def test_recorded_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    record_files(log, {})
    assert not log.exists()
    record_files(log, {"a.png": "empty", "ü\n.png": "cut"})
    record_files(log, {"a.png": "empty still", "b.png": "gone"})
    found = {"a.png": "empty", "ü\n.png": "cut", "b.png": "gone"}
    assert replaced_files(log) == found
    # A process was killed as it wrote.
    log.write_text(log.read_text() + '{"file": "c.p')
    assert replaced_files(log) == found
    record_files(log, {"d.png": "cut"})
    assert replaced_files(log) == {**found, "d.png": "cut"}


# ----------------------------------------------------------------------------------------------------------- the center


@pytest.mark.parametrize("center", [1.0, 0.875, 0.5])
@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (90, 60)])
@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_the_center_is_what_pillow_cuts_out(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int], center: float
) -> None:
    path = tmp_path / "a.png"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    picture.save(path)
    height, width = shape
    scale = center * min(height / size[0], width / size[1])
    tall, wide = size[0] * scale, size[1] * scale
    box = ((width - wide) / 2, (height - tall) / 2, (width + wide) / 2, (height + tall) / 2)
    expected = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box)
    found = read_image(path, size=size, center=center)
    assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert torch.equal(FileImages([path], size=size, center=center).fetch(torch.tensor([0]))[0][0], found)
    assert torch.equal(FileImages([path], size=size, center=center).cached().fetch(torch.tensor([0]))[0][0], found)


def test_whole_pixels_are_cut_out_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    values = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    found = read_image(path, size=(224, 224), center=224 / 256)
    assert torch.equal(found, torch.from_numpy(values[16:240, 16:240]).permute(2, 0, 1))


@pytest.mark.parametrize("wrong", [0.0, -1.0, 1.1, float("nan")])
def test_a_center_is_a_share(tmp_path: Path, wrong: float) -> None:
    with pytest.raises(MetaplError, match="center"):
        read_image(tmp_path / "a.png", size=(8, 8), center=wrong)
