"""Each kind of file through each reader.

It becomes the same tensor, or is refused with the reason.
"""

import io
import os
import pickle
import socket
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from metapl.apps.digits import Digits
from metapl.errors import MetaplError
from metapl.pictures import UnreadableImage, read_image, reader, scan_unlabeled, verify_files
from metapl.pictures.reader import gray_image, read_crops
from metapl.run_folder import RunFolder

READERS: dict[str, Callable[[Path], Tensor]] = {
    "whole": read_image,
    "sized": lambda path: read_image(path, size=(2, 2)),
    "box": lambda path: read_crops(
        path, [lambda height, width: (0, 0, width, height)], size=(2, 2)
    )[0],
    "brightness": lambda path: read_image(path, colors="L"),
    "averaged": lambda path: (255 * gray_image(path, 2))[None],
}


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def plain(mode: str, color: Any, kind: str = "PNG", **how: Any) -> bytes:
    return encoded(Image.new(mode, (8, 6), color), kind, **how)


def palette(*, of: int = 0) -> Image.Image:
    image = Image.new("P", (8, 6), of)
    image.putpalette([0, 0, 255, 90, 90, 90])
    return image


def png(width: int, height: int, depth: int, data: bytes, *more: bytes, kind: int = 2) -> bytes:
    """Return a PNG that says what it likes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    texts = b"".join(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(text)) for text in more)
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + texts
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def device(path: Path) -> None:
    """Make a character device that takes everything and gives nothing, of this test's own."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")


def bound(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as there:
            there.bind(path.name)
    finally:
        os.chdir(before)


SPECIAL = {"pipe": os.mkfifo, "device": device, "socket": bound}


RED = (200, 10, 30)
SIXTEEN = Image.fromarray(np.full((6, 8), 30_000, dtype=np.uint16))
# one color: what it is, and how far off it may be
SOUND: dict[str, tuple[bytes, tuple[int, int, int], int]] = {
    **{f"a.{name}": (plain("RGB", RED, kind), RED, 0)
       for name, kind in (("png", "PNG"), ("bmp", "BMP"))},
    **{f"a.{name}": (plain("RGB", RED, kind), RED, 0)
       for name, kind in (("tif", "TIFF"), ("ppm", "PPM"))},
    **{f"a.{name}": (plain("RGB", RED, kind), RED, 6)
       for name, kind in (("jpg", "JPEG"), ("webp", "WEBP"))},
    "a.gif": (plain("RGB", RED, "GIF"), RED, 0),
    "called_otherwise.png": (plain("RGB", RED, "JPEG"), RED, 6),
    "palette.png": (encoded(palette(), "PNG"), (0, 0, 255), 0),
    "palette_in_part.png": (encoded(palette(), "PNG", transparency=bytes([102, 255])),
                            (153, 153, 255), 0),
    "nothing.png": (plain("RGBA", (255, 0, 0, 0)), (255, 255, 255), 0),
    "opaque.png": (plain("RGBA", (200, 0, 0, 255)), (200, 0, 0), 0),
    "part.png": (plain("RGBA", (0, 0, 0, 102)), (153, 153, 153), 0),
    "grey_part.png": (plain("LA", (0, 102)), (153, 153, 153), 0),
    "grey.png": (plain("L", 77), (77, 77, 77), 0),
    "white.png": (plain("1", 1), (255, 255, 255), 0),
    "transparent_color.png": (plain("RGB", (10, 20, 30), transparency=(10, 20, 30)),
                              (255, 255, 255), 0),
    "sixteen.png": (encoded(SIXTEEN, "PNG"), (117, 117, 117), 0),
    "sixteen.tif": (encoded(SIXTEEN, "TIFF"), (117, 117, 117), 0),
    "sixteen.pgm": (encoded(SIXTEEN, "PPM"), (117, 117, 117), 0),
    "sixteen_colors.png": (png(1, 1, 16, b"\0" + struct.pack(">3H", 65535, 32896, 0)),
                           (255, 128, 0), 0),
    "cmyk.jpg": (plain("CMYK", (0, 255, 255, 0), "JPEG", quality=100), (255, 0, 0), 4),
    "video.tif": (plain("YCbCr", (76, 85, 255), "TIFF"), (254, 0, 0), 4),
    "two_frames.gif": (encoded(palette(of=1), "GIF", save_all=True, append_images=[palette()]),
                       (90, 90, 90), 0),
    "camera.jpg": (plain("RGB", RED, "MPO", save_all=True,
                         append_images=[Image.new("RGB", (8, 6))]), RED, 6),
    "broken_note.jpg": (plain("RGB", RED, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff "
                                                       b"garbage"), RED, 6),
    "more_data.png": (png(4, 4, 8, bytes(10**7), kind=0), (0, 0, 0), 0),
}  # fmt: skip


@pytest.mark.parametrize("how", READERS)
def test_every_kind_of_file_is_read(how: str, tmp_path: Path) -> None:
    before = list(warnings.filters)
    for name, (content, color, off) in SOUND.items():
        (tmp_path / name).write_bytes(content)
        found = READERS[how](tmp_path / name).float()
        luma = np.dot(color, (0.299, 0.587, 0.114))
        expected = color if how in ("whole", "sized", "box") else (luma,)
        assert len(found) == len(expected), name
        off += how in ("brightness", "averaged")
        assert (found - torch.tensor(expected)[:, None, None]).abs().max() <= off, name
    assert len(verify_files(scan_unlabeled(tmp_path)).sound) == len(SOUND)
    assert list(warnings.filters) == before  # which readers change for the time of a read


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
WHOLE = {
    kind: encoded(NOISE, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
}
BROKEN: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    **{f"cut.{kind.lower()}": (content[: len(content) // 2], "")
       for kind, content in WHOLE.items()},
    "start.jpg": (WHOLE["JPEG"][:20], ""),
    "crc.png": (WHOLE["PNG"][:60] + bytes(6) + WHOLE["PNG"][66:], ""),
    "comment.png": (png(4, 4, 8, bytes(52), bytes(10**8)), "decoded"),
    "empty.png": (b"", "empty"),
    "words.jpg": (b"these are words", "not a picture"),
    "page.jpg": (b"<!DOCTYPE html><html></html>", "not a picture"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 "
                    b"10\n%%EndComments\nshowpage\n", "not a picture"),
    "zeros.png": (bytes(5000), "not a picture"),
    **{f"bomb{w}.png": (png(w, h, 8, bytes(10**5)), "pixels")
       for w, h in ((9_500, 9_500), (60_000, 60_000))},
    "line.png": (png(89_478_486, 1, 8, bytes(10**5)), "pixels"),
    "float.tif": (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "range"),
    "large.tif": (encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"), "range"),
    "negative.tif": (encoded(Image.fromarray(np.full((2, 2), -1, np.int32)), "TIFF"), "range"),
    "folder.png": (lambda path: path.mkdir(), "folder"),
    "gone.png": (lambda path: path.symlink_to("not there"), "No such file"),
    "loop.png": (lambda path: path.symlink_to(path), "symbolic"),
    "pipe.png": (os.mkfifo, "plain"),
    "socket.png": (bound, "device"),
    "device.png": (device, "plain"),
}  # fmt: skip


@contextmanager
def promptly(seconds: float = 60.0) -> Iterator[None]:
    """End this process if the block takes longer than so many seconds, for then it hangs."""
    timer = threading.Timer(seconds, lambda: os._exit(99))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.mark.parametrize("name", BROKEN)
def test_every_reader_refuses_a_file_that_is_no_picture(name: str, tmp_path: Path) -> None:
    content, word = BROKEN[name]
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    readers: list[Callable[[Path], Any]] = [*READERS.values()]
    with promptly():
        for read in readers:
            with pytest.raises(UnreadableImage, match=word or None) as caught:
                read(path)
            again = pickle.loads(pickle.dumps(caught.value))  # as it comes from a worker
            assert (again.path, "\n" in str(again)) == (path, False)
        if name != "folder.png":  # which a scan goes into
            assert [*verify_files(scan_unlabeled(tmp_path)).skipped] == [name]
        if word in ("plain", "device"):
            path.rename(tmp_path / "recipe.json")
            with pytest.raises(MetaplError, match="recipe"):
                RunFolder(tmp_path).recipe()


def test_a_picture_that_is_too_large_is_not_decoded_and_no_memory_is_no_property_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    NOISE.save(tmp_path / "a.png")
    monkeypatch.setattr(reader, "MAX_PIXELS", 1600)
    assert read_image(tmp_path / "a.png").shape == (3, 40, 40)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", Mock(side_effect=MemoryError))
    with pytest.raises(MetaplError, match="memory") as caught:
        read_image(tmp_path / "a.png")
    assert not isinstance(caught.value, UnreadableImage)
    monkeypatch.setattr(reader, "MAX_PIXELS", 1599)
    with pytest.raises(UnreadableImage, match="1,599"):
        read_image(tmp_path / "a.png")


def ramp(height: int = 20, width: int = 30) -> np.ndarray[Any, Any]:
    """Return smooth colors, so that lossy formats stay close."""
    y, x = np.mgrid[0:height, 0:width]
    return (
        np.stack([255 * y / (height - 1), 255 * x / (width - 1), 0 * x + 90], axis=2)
        .round()
        .astype(np.uint8)
    )


def off(a: Tensor, b: Tensor | np.ndarray[Any, Any] | Image.Image) -> int:
    b = b if isinstance(b, Tensor) else torch.from_numpy(np.array(b)).permute(2, 0, 1)
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


UNDO = [
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
]
UNDO += [
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_270,
]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_picture_is_turned_as_its_camera_noted(suffix: str, tmp_path: Path) -> None:
    """Also where it is shrunk while it is read."""
    upright, exif, path = Image.fromarray(ramp(96, 144)), Image.Exif(), tmp_path / f"a{suffix}"
    upright.save(tmp_path / "plain.png")
    most = 8 if suffix == ".jpg" else 0
    for orientation, undo in enumerate([None, *UNDO], start=1):
        exif[0x0112] = orientation
        stored = upright if undo is None else upright.transpose(undo)
        stored.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
        for size in (None, (10, 12)):
            assert (
                off(read_image(path, size=size), read_image(tmp_path / "plain.png", size=size))
                <= most
            )
        (crop,) = read_crops(
            path, [lambda height, width: (4, 2, width / 2 + 4, height / 2 + 2)], size=(48, 72)
        )
        assert off(crop, ramp(96, 144)[2:50, 4:76]) <= most


@pytest.mark.parametrize("shape", [(20, 30), (3, 200)])
@pytest.mark.parametrize("size", [(8, 8), (16, 4), (64, 40)])
def test_a_size_is_filled_from_the_middle(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    image = Image.fromarray(ramp(*shape))
    image.save(tmp_path / "a.png")
    for center in (1.0, 0.875):
        scale = center * min(shape[0] / size[0], shape[1] / size[1])
        left, top = (shape[1] - size[1] * scale) / 2, (shape[0] - size[0] * scale) / 2
        expected = image.resize(
            size[::-1], Image.Resampling.BILINEAR, (left, top, shape[1] - left, shape[0] - top)
        )
        assert off(read_image(tmp_path / "a.png", size=size, center=center), expected) == 0
    for wrong in ({"size": (0, 4)}, {"center": 0.0}, {"size": (4, 4), "center": 1.1}):
        with pytest.raises(MetaplError, match="expected"):
            read_image(tmp_path / "a.png", **wrong)


def test_a_large_picture_is_decoded_at_twice_the_size_that_is_needed_or_shrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked, draft = tmp_path / "a.jpg", [], "PIL.JpegImagePlugin.JpegImageFile.draft"
    Image.fromarray(ramp(401, 603)).save(path, quality=95)
    boxes = [lambda h, w: (0, 0, w / 4, h / 4), lambda h, w: (0, 0, w, h)]
    drafted = [read_image(path, size=(32, 40)), *read_crops(path, boxes, size=(32, 40))]
    monkeypatch.setattr(draft, lambda self, mode, size: asked.append(size))
    wholes = [read_image(path, size=(32, 40)), *read_crops(path, boxes, size=(32, 40))]
    assert all(off(fast, whole) <= 3 for fast, whole in zip(drafted, wholes, strict=True))
    read_image(path, size=(300, 300))
    assert asked == [(97, 64), (385, 256), (603, 401)]
    levels, exif = np.asarray(NOISE)[:6, :8].repeat(50, 0).repeat(50, 1), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels).convert("RGBA").save(tmp_path / "a.png", exif=exif)
    whole = read_image(tmp_path / "a.png", size=(16, 12)).float()
    monkeypatch.setattr(reader, "LARGE", 100)
    assert (whole - read_image(tmp_path / "a.png", size=(16, 12))).abs().mean() < 6
    assert whole.std() > 20


INK = (load_digits().images[5] * 255 / 16).round().astype("uint8")
GRAY = Image.fromarray(INK)
DIGIT = {
    **{f"{mode}.tif": GRAY.convert(mode) for mode in ("L", "RGB", "P", "CMYK")},
    "16_bits.png": Image.fromarray(INK.astype("uint16") * 257),
    "paper.png": Image.fromarray(255 - INK),
    "transparent.png": Image.merge("LA", (Image.new("L", (8, 8)), GRAY)),
    "large.png": GRAY.resize((80, 120), Image.Resampling.NEAREST),
}
"""One digit, as files of many kinds hold it."""


@pytest.mark.parametrize("name", DIGIT)
def test_a_digit_in_a_picture_of_any_kind_gives_the_same_input(name: str, tmp_path: Path) -> None:
    DIGIT[name].save(tmp_path / name)
    found = Digits().input.read(tmp_path / name)
    torch.testing.assert_close(
        found, torch.tensor(load_digits().images[5:6] / 16).float(), atol=0.003, rtol=0
    )
    # Areas are averaged.
    Image.fromarray(np.array([[0, 255, 51, 51]] * 2, np.uint8)).save(tmp_path / "x.png")
    torch.testing.assert_close(
        gray_image(tmp_path / "x.png", 2), torch.tensor([[0.5, 0.2], [0.5, 0.2]])
    )
