"""Pictures from files: each kind becomes the same tensor or is refused with the reason; batches skip the broken."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
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
    Identity,
    LabeledBatches,
    MemoryImages,
    RandAugment,
    UnlabeledBatches,
    UnreadableImage,
    Weak,
    read_image,
    reader,
    replaced_files,
)
from metapl.apps.pictures.reader import image_size, read_crops
from metapl.data import StepSampler, loader
from metapl.errors import MetaplError


def ramp(height: int = 20, width: int = 30) -> np.ndarray[Any, Any]:
    """Smooth colors, so that lossy formats stay close."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / (height - 1), 255 * x / (width - 1), 0 * x + 90], axis=2).round().astype(np.uint8)


def chw(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def distance(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


# --- kinds of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "off"),
    [("a.png", 0), ("a.bmp", 0), ("a.tif", 0), ("a.ppm", 0), ("a.webp", 16), ("a.jpg", 16), ("a.gif", 40)],
)
def test_formats(tmp_path: Path, name: str, off: int) -> None:
    path = tmp_path / name
    Image.fromarray(ramp()).save(path)
    assert distance(read_image(path), chw(ramp())) <= off
    # What counts is what is in the file, not what it is called.
    other = path.rename(tmp_path / "misnamed.png")
    assert distance(read_image(other), chw(ramp())) <= off
    assert image_size(other) == (20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("size", [None, (10, 12)])
def test_camera_notes(tmp_path: Path, orientation: int, suffix: str, size: tuple[int, int] | None) -> None:
    upright = Image.fromarray(ramp(96, 144))
    # How the sensor held it, for it to be upright after the turn that the number stands for.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    stored.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    plain = tmp_path / "plain.png"
    upright.save(plain)
    assert distance(read_image(path, size=size), read_image(plain, size=size)) <= (8 if suffix == ".jpg" else 0)


def test_a_broken_camera_note_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(ramp()).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert distance(read_image(path, size=(10, 10)), read_image(path, size=(10, 10))) == 0
    assert read_image(path).shape == (3, 20, 30)


def test_palette(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(path)
    assert read_image(path)[:, 0].T.tolist() == [[255, 0, 0], [0, 0, 255]]
    # One of its colors may be transparent, wholly or in part.
    image.save(path, transparency=bytes([255, 102]))
    assert read_image(path)[:, 0].T.tolist() == [[255, 0, 0], [153, 153, 255]]


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (200, 0, 0, 255), [200, 0, 0]),
        ("RGBA", (0, 0, 0, 102), [153, 153, 153]),
        ("LA", (0, 102), [153, 153, 153]),
        ("LA", (77, 255), [77, 77, 77]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("1", 0, [0, 0, 0]),
    ],
)
def test_transparent_parts_are_white(tmp_path: Path, mode: str, pixel: Any, expected: list[int]) -> None:
    path = tmp_path / "a.png"
    Image.new(mode, (4, 3), pixel).save(path)
    assert read_image(path)[:, 1, 2].tolist() == expected
    assert read_image(path, size=(2, 2))[:, 0, 0].tolist() == expected


def test_a_transparent_color_of_rgb(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2), (10, 20, 30)).save(path, transparency=(10, 20, 30))
    assert read_image(path)[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 257, 30000, 65535]], dtype=np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    expected = [0, 0, 1, 117, 255]
    assert read_image(path)[0, 0].tolist() == expected
    assert read_image(path, mode="L")[0, 0].tolist() == expected


def test_sixteen_bits_of_color(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", 65535, 32896, 0)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )
    assert read_image(path)[:, 0, 0].tolist() == [255, 128, 0]


def test_cmyk_and_other_modes(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)
    assert distance(read_image(path)[:, :1, :1], torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]) <= 4
    assert read_image(path, size=(2, 2)).shape == (3, 2, 2)
    path = tmp_path / "a.tif"
    Image.new("YCbCr", (8, 8), (76, 85, 255)).save(path)
    assert distance(read_image(path)[:, :1, :1], torch.tensor([254, 0, 0], dtype=torch.uint8)[:, None, None]) <= 4


def test_brightness(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path)
    assert read_image(path, mode="L").shape == (1, 3, 4)
    assert read_image(path, mode="L").unique().tolist() == [76]


def test_first_of_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    first, second = Image.new("P", (4, 4), 0), Image.new("P", (4, 4), 1)
    for one in (first, second):
        one.putpalette([9, 9, 9, 200, 200, 200])
    first.save(path, save_all=True, append_images=[second])
    assert read_image(path).unique().tolist() == [9]
    # What some cameras and telephones write under the name of a JPEG.
    path = tmp_path / "a.jpg"
    image = Image.fromarray(ramp(200, 200))
    image.save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (200, 200))], quality=95)
    assert distance(read_image(path), chw(ramp(200, 200))) <= 12
    assert read_image(path, size=(20, 20)).shape == (3, 20, 20)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20), (3, 200)])
@pytest.mark.parametrize("size", [(8, 8), (16, 4), (64, 40)])
def test_size_is_filled_from_the_middle(tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    image = Image.fromarray(ramp(*shape))
    image.save(path)
    height, width = shape
    scale = min(height / size[0], width / size[1])
    box = ((width - size[1] * scale) / 2, (height - size[0] * scale) / 2)
    box = (*box, width - box[0], height - box[1])
    expected = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box)
    assert distance(read_image(path, size=size), chw(np.array(expected))) == 0


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_shortcut(tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(ramp(401, 603)).save(path, quality=95, exif=exif)
    drafted = read_image(path, size=(32, 40))
    boxes = [lambda h, w: (0, 0, w / 4, h / 4), lambda h, w: (0.0, 0.0, float(w), float(h))]
    crops = read_crops(path, boxes, size=(32, 40))
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    assert distance(drafted, read_image(path, size=(32, 40))) <= 3
    for one, whole in zip(crops, read_crops(path, boxes, size=(32, 40)), strict=True):
        assert distance(one, whole) <= 3


def test_draft_keeps_twice_the_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(ramp(400, 600)).save(path)
    asked = []
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda self, mode, size: asked.append(size))
    read_image(path, size=(50, 50))
    read_image(path, size=(300, 300))
    read_crops(path, [lambda h, w: (0, 0, 100, 100)], size=(50, 50))
    assert asked == [(150, 100), (600, 400), (600, 400)]


def test_crops_are_boxes_of_the_upright_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp(20, 30)).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    seen = []

    def box(height: int, width: int) -> tuple[float, float, float, float]:
        seen.append((height, width))
        return 4, 2, 14, 12

    (crop,) = read_crops(path, [box], size=(10, 10))
    assert seen == [(20, 30)]
    assert distance(crop, chw(ramp(20, 30)[2:12, 4:14])) == 0


@pytest.mark.parametrize("wrong", [{"size": (0, 4)}, {"size": (4, -1)}, {"center": 0.0}])
def test_wrong_numbers(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(MetaplError, match="expected"):
        read_image(tmp_path / "a.png", **wrong)


# --- files that are no pictures ---------------------------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims any size, and whose data are zeros without end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("pixels", [(9_500, 9_500), (60_000, 60_000), (89_478_486, 1)])
def test_bombs_are_refused_by_their_header(
    tmp_path: Path, pixels: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(*pixels))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    for read in (read_image, image_size):
        with pytest.raises(UnreadableImage, match="pixels"):
            read(path)


def test_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(ramp(20, 30)).save(path)
    monkeypatch.setattr(reader, "MAX_PIXELS", 600)
    assert read_image(path).shape == (3, 20, 30)
    monkeypatch.setattr(reader, "MAX_PIXELS", 599)
    with pytest.raises(UnreadableImage, match=r"more than the 599 pixels that are allowed \(30x20\)"):
        read_image(path)


def test_a_thread_of_a_picture_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (1_000_000, 1)).save(path)
    assert read_image(path, size=(64, 64)).shape == (3, 64, 64)


@dataclass
class Broken:
    name: str
    content: bytes
    reason: str


def broken_files() -> list[Broken]:
    import io

    def encoded(kind: str) -> bytes:
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        return file.getvalue()

    cut = [
        Broken(f"cut.{kind.lower()}", encoded(kind)[: len(encoded(kind)) // 2], "")
        for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
    ]
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    return [
        *cut,
        Broken("empty.png", b"", "empty"),
        Broken("words.jpg", b"these are words", "not a picture"),
        Broken("page.jpg", b"<!DOCTYPE html><html></html>", "not a picture"),
        Broken("start.jpg", encoded("JPEG")[:20], ""),
        Broken("program.jpg", eps, "not a picture"),
        Broken("zeros.png", bytes(5000), "not a picture"),
        Broken("crc.png", encoded("PNG")[:60] + b"\0\0\0\0\0\0" + encoded("PNG")[66:], ""),
    ]


@pytest.mark.parametrize("broken", broken_files(), ids=lambda one: one.name)
@pytest.mark.parametrize("size", [None, (8, 8)])
def test_no_picture(tmp_path: Path, broken: Broken, size: tuple[int, int] | None) -> None:
    path = tmp_path / broken.name
    path.write_bytes(broken.content)
    with pytest.raises(UnreadableImage, match=broken.reason or None) as caught:
        read_image(path, size=size)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: {caught.value.reason}")
    assert "\n" not in str(caught.value)


def test_numbers_of_unknown_range(tmp_path: Path) -> None:
    for name, values in {
        "float.tif": np.ones((2, 2), np.float32),
        "long.tif": np.full((2, 2), 70_000, np.int32),
        "negative.tif": np.full((2, 2), -1, np.int32),
    }.items():
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(UnreadableImage, match="range is unknown"):
            read_image(tmp_path / name)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UnreadableImage, match=r"folder\.png: it is a folder"):
        read_image(tmp_path / "folder.png")


def test_the_reason_travels_between_processes() -> None:
    error = UnreadableImage("a.png", "the file is empty")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.reason) == (str(error), error.path, error.reason)


def test_no_memory_is_no_property_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(ramp()).save(path)

    def fail(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MetaplError, match="memory") as caught:
        read_image(path)
    assert not isinstance(caught.value, UnreadableImage)
    assert str(path) in str(caught.value)


def test_warnings_of_readers_are_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("P", (4, 4))
    image.save(path, transparency=bytes([1, 2, 3]))
    before = list(warnings.filters)
    read_image(path)
    assert list(warnings.filters) == before


# --- sets -------------------------------------------------------------------------------------------------------------


def grey_files(folder: Path, count: int, broken: tuple[int, ...] = (), suffix: str = ".png") -> list[Path]:
    """Picture i is of level 10 i, in the colors (10 i, 10 i, 255 − 10 i)."""
    paths = [folder / f"{i:03}{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (6, 6), (10 * i, 10 * i, 255 - 10 * i)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:-20])
    return paths


def levels(images: Tensor) -> list[int]:
    scaled = images * 255 if images.is_floating_point() else images
    return [round(float(x) / 10) for x in scaled[:, 0].float().mean((1, 2))]


def test_sets_agree(tmp_path: Path) -> None:
    files = FileImages(grey_files(tmp_path, 5), size=(6, 6))
    data, used = files.fetch(torch.arange(5))
    assert used.tolist() == [0, 1, 2, 3, 4]
    memory = MemoryImages(data)
    assert files.shape == memory.shape == (3, 6, 6)
    for one in (files, memory):
        part = one.select(torch.tensor([4, 2, 0]))
        assert len(part) == 3
        images, used = part.fetch(torch.tensor([0, 1, 0]))
        assert levels(images) == [4, 2, 4]
        assert used.tolist() == [0, 1, 0]
        assert levels(part.select(torch.tensor([1])).fetch(torch.tensor([0]))[0]) == [2]
    assert files.select(torch.tensor([3])).path(0).name == "003.png"
    assert FileImages(grey_files(tmp_path, 2), size=(4, 5), mode="L").fetch(torch.tensor([1]))[0].shape == (1, 1, 4, 5)


def test_odd_names(tmp_path: Path) -> None:
    names = ["a b.png", "ü.png", "猫.png", os.fsdecode(b"\xff.png"), "line\nbreak.png"]
    paths = []
    for i, name in enumerate(names):
        path = tmp_path / name
        Image.new("RGB", (2, 2), (10 * i, 0, 0)).save(path)
        paths.append(path)
    files = FileImages(paths, size=(2, 2))
    assert [files.path(i) for i in range(5)] == paths
    assert levels(files.fetch(torch.arange(5))[0]) == [0, 1, 2, 3, 4]


def test_a_broken_file_is_replaced_by_the_next_of_its_set(tmp_path: Path) -> None:
    log = tmp_path / "left_out.jsonl"
    paths = grey_files(tmp_path, 8, broken=(2, 3, 7))
    files = FileImages(paths, size=(6, 6), log=log)
    images, used = files.fetch(torch.arange(8))
    assert used.tolist() == levels(images) == [0, 1, 4, 4, 4, 5, 6, 0]
    # The rest of the folder, such as what is held out, is out of reach.
    part = files.select(torch.tensor([1, 2, 7]))
    images, used = part.fetch(torch.tensor([0, 1, 2]))
    assert levels(images) == [1, 1, 1]
    assert used.tolist() == [0, 0, 0]
    found = replaced_files(log)
    assert set(found) == {str(paths[i]) for i in (2, 3, 7)}
    assert all("truncated" in reason for reason in found.values())
    assert replaced_files(tmp_path / "none.jsonl") == {}
    with log.open("a") as file:
        file.write('{"file": "cut o')
    assert replaced_files(log) == found


def test_without_a_log_it_warns_once(tmp_path: Path) -> None:
    files = FileImages(grey_files(tmp_path, 3, broken=(1,)), size=(6, 6))
    with pytest.warns(UserWarning, match=r"001\.png is left out"):
        files.fetch(torch.tensor([1]))
    files.fetch(torch.tensor([1]))


def test_when_nothing_can_be_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    files = FileImages(grey_files(tmp_path, 3, broken=(0, 1, 2)), size=(6, 6), log=log)
    with pytest.raises(MetaplError, match=r"3 pictures in a row cannot be read, the first being .*001\.png"):
        files.fetch(torch.tensor([1]))
    with pytest.raises(MetaplError, match="3 pictures in a row cannot be read"):
        files.cached().fetch(torch.tensor([1]))
    assert (
        files.fetch_sound(torch.arange(3))[0].shape
        == files.cached().fetch_sound(torch.arange(3))[0].shape
        == (0, 3, 6, 6)
    )
    gone = FileImages([tmp_path / f"gone{i}.png" for i in range(100)], size=(6, 6), log=log)
    with pytest.raises(MetaplError, match=r"32 pictures in a row cannot be read, the first being .*gone90\.png"):
        gone.fetch(torch.tensor([90]))


def test_broken_files_are_left_out_when_measuring(tmp_path: Path) -> None:
    files = FileImages(grey_files(tmp_path, 5, broken=(1, 3)), size=(6, 6), log=tmp_path / "log")
    for source in (files, files.cached()):
        images, used = source.fetch_sound(torch.arange(5))
        assert used.tolist() == levels(images) == [0, 2, 4]
    batches = EvaluationBatches(files, torch.arange(5), batch_size=2)
    assert len(batches) == 3
    assert [(levels(x), y.tolist()) for x, y in batches] == [([0], [0]), ([2], [2]), ([4], [4])]
    # A batch may lose all it has.
    files = FileImages(grey_files(tmp_path, 4, broken=(0, 1)), size=(6, 6), log=tmp_path / "log")
    assert [len(y) for _, y in EvaluationBatches(files, torch.arange(4), batch_size=2)] == [0, 2]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_memory_refuses(wrong: Tensor) -> None:
    with pytest.raises(MetaplError, match="expected"):
        MemoryImages(wrong)


def test_files_refuse(tmp_path: Path) -> None:
    with pytest.raises(MetaplError, match="expected"):
        FileImages([], size=(4, 4))
    with pytest.raises(MetaplError, match="expected"):
        FileImages(["a.png"], size=(0, 4))


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corner:
    """A box that depends on the example, with every other one mirrored."""

    def boxes(self, seed: int, step: int, examples: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        top = (examples + step + seed % 7) % (height // 2)
        left = examples % (width // 2)
        size = torch.tensor([height // 2, width // 2]).expand(len(examples), 2)
        return torch.cat([top[:, None], left[:, None], size], dim=1), examples % 2 == 1


Both = Callable[[Path], tuple[FileImages | MemoryImages, Tensor]]


def in_files(folder: Path) -> tuple[FileImages | MemoryImages, Tensor]:
    paths = grey_files(folder, 20, broken=(3, 11))
    return FileImages(paths, size=(8, 8), log=folder / "log"), torch.arange(20)


def in_memory(folder: Path) -> tuple[FileImages | MemoryImages, Tensor]:
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (20, 3, 8, 8), dtype=np.uint8))
    return MemoryImages(data), torch.arange(20)


def tensors(item: Any) -> list[Tensor]:
    return [item] if isinstance(item, Tensor) else list(item)


STRONG = Chain((Weak(pad=1), RandAugment(cutout=2)))


@pytest.mark.parametrize("make", [in_files, in_memory])
@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_functions_of_their_position(tmp_path: Path, make: Both, workers: int) -> None:
    images, labels = make(tmp_path)
    sampler = StepSampler(20, 7, seed=1)
    labeled = LabeledBatches(images, labels, sampler, Weak(pad=1), seed=0)
    unlabeled = UnlabeledBatches(images, sampler, Weak(pad=1), STRONG, seed=0)
    for batches in (labeled, unlabeled):
        served = list(loader(batches, 3, 7, num_workers=workers))
        for step, item in zip(range(3, 7), served, strict=True):
            again = tensors(batches[step])
            assert all(torch.equal(a, b) for a, b in zip(tensors(item), again, strict=True))
            for x in again:
                if x.is_floating_point():
                    assert x.dtype == torch.float32
                    assert x.shape == (7, 3, 8, 8)
                    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    weak, strong = tensors(unlabeled[3])
    assert not torch.equal(weak, strong)


def test_labels_follow_their_pictures(tmp_path: Path) -> None:
    images, labels = in_files(tmp_path)
    batches = LabeledBatches(images, labels, StepSampler(20, 20, seed=0), Identity(), seed=0)
    x, y = batches[0]
    assert levels(x) == y.tolist()
    assert sorted(y.tolist()) == sorted([*(set(range(20)) - {3, 11}), 4, 12])


@pytest.mark.parametrize("make", [in_files, in_memory])
def test_views_can_wait_for_the_device(tmp_path: Path, make: Both) -> None:
    images, labels = make(tmp_path)
    sampler = StepSampler(20, 7, seed=1)
    unlabeled = UnlabeledBatches(images, sampler, Weak(pad=1), STRONG, seed=0)
    labeled = LabeledBatches(images, labels, sampler, Weak(pad=1), seed=0)
    for batches in (labeled, unlabeled):
        for step, raw in enumerate(loader(batches.raw(), 2, 4), start=2):
            assert raw[0].dtype == torch.uint8
            late = tensors(batches.augment(step, tuple(raw)))
            assert all(torch.equal(a, b) for a, b in zip(late, tensors(batches[step]), strict=True))
    assert len(unlabeled.raw()[0]) == 1  # the bytes of both views cross once


def test_crops_of_files(tmp_path: Path) -> None:
    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(ramp(20 + 2 * i, 24)).save(paths[-1])
    paths[2].write_bytes(b"broken")
    images = FileImages(paths, size=(10, 12), log=tmp_path / "log")
    sampler = StepSampler(4, 4, seed=0)
    batches = UnlabeledBatches(images, sampler, Identity(), Identity(), seed=5, crop=Corner())
    weak, strong = batches[1]
    assert weak.shape == strong.shape == (4, 3, 10, 12)
    assert not torch.equal(weak, strong)
    for row, example in enumerate((4 + sampler.indices(1)).tolist()):
        if example == 4:  # example 0 in epoch 1, whose box is as large as what comes out
            corner = [
                torch.from_numpy(ramp(20, 24)).permute(2, 0, 1)[:, top : top + 10, 4:16] / 255 for top in range(10)
            ]
            assert any(torch.equal(weak[row], one) for one in corner)
    labeled = LabeledBatches(images, torch.arange(4), sampler, Identity(), seed=5, crop=Corner())
    assert all(torch.equal(a, b) for a, b in zip(labeled[1], labeled[1], strict=True))
    with pytest.raises(MetaplError, match="cropped by a view"):
        LabeledBatches(
            in_memory(tmp_path)[0], torch.arange(20), StepSampler(20, 4, seed=0), Identity(), 0, None, Corner()
        )


def test_mirrored_crops(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(ramp(20, 24)).save(path)
    images = FileImages([path, path], size=(10, 12))
    batches = LabeledBatches(images, torch.arange(2), StepSampler(2, 2, seed=0), Identity(), seed=0, crop=Corner())
    x, y = batches[0]
    plain, mirrored = x[y.tolist().index(0)], x[y.tolist().index(1)]
    assert (plain[1, :, 1:] > plain[1, :, :-1]).all()
    assert (mirrored[1, :, 1:] < mirrored[1, :, :-1]).all()


def test_batches_refuse() -> None:
    images = MemoryImages(torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    for size, labels, steps in ((5, 4, None), (4, 3, None), (4, 4, -1)):
        with pytest.raises(MetaplError, match="expected"):
            LabeledBatches(images, torch.zeros(labels), StepSampler(size, 2, 0), Identity(), 0, steps)
    with pytest.raises(MetaplError, match="expected"):
        UnlabeledBatches(images, StepSampler(5, 2, 0), Identity(), None, 0)
    for labels, size in ((3, 2), (4, 0)):
        with pytest.raises(MetaplError, match="expected"):
            EvaluationBatches(images, torch.zeros(labels), size)


def test_a_worker_that_dies_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = grey_files(tmp_path, 8)
    images = FileImages(paths, size=(6, 6))
    batches = UnlabeledBatches(images, StepSampler(8, 2, seed=0), Identity(), None, seed=0)
    original = read_image

    def deadly(path: str, **how: Any) -> Tensor:
        if path.endswith("005.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, **how)

    monkeypatch.setattr("metapl.apps.pictures.store.read_image", deadly)  # forked workers have it too
    served = iter(loader(batches.raw(), 0, 8, num_workers=2))
    # What the loader fails of depends on the moment: a signal, a lost connection, or a worker missed.
    with pytest.raises((RuntimeError, OSError, EOFError)):
        list(served)
    assert batches.raw().explain() == f"a worker died while reading {paths[5]}; remove or replace it"
    with contextlib.suppress(RuntimeError):  # the other worker may die of it too, while it is waited for
        served._shutdown_workers()


def test_other_failures_are_not_blamed_on_files(tmp_path: Path) -> None:
    images = FileImages(grey_files(tmp_path, 8), size=(6, 6))

    def fail(images: Tensor, **how: Any) -> Tensor:
        raise ValueError("a view")

    batches = UnlabeledBatches(images, StepSampler(8, 2, seed=0), fail, None, seed=0)
    served = iter(loader(batches, 0, 8, num_workers=2))
    with pytest.raises(ValueError, match="a view"):
        next(served)
    served._shutdown_workers()  # the traceback keeps the iterator alive
    assert batches.explain() is None


def test_the_log_is_plain(tmp_path: Path) -> None:
    log = tmp_path / "log"
    FileImages(grey_files(tmp_path, 3, broken=(1,)), size=(6, 6), log=log).fetch(torch.arange(3))
    (line,) = log.read_text().splitlines()
    assert set(json.loads(line)) == {"file", "reason"}
