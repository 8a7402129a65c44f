"""Reading of image files: every format becomes the same kind of tensor, or is refused.

A file may be a member of a tar file, as WebDataset has them, with the path
``many/000000.tar/cats/1.png``: it is listed, checked, cached and labeled like any other, and drawn
like one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import posixpath
import stat
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from metapl.apps.machine import open_plain
from metapl.errors import MetaplError, reason_of
from metapl.words import shown

if TYPE_CHECKING:
    from PIL.Image import Image

TAR = ".tar"


def tar_members(path: str | Path) -> Iterator[tuple[str, int, int]]:
    """Yield the plain files of a tar file: name, where the bytes begin, and how many they are.

    Names have no leading ``./`` or ``/``. Only headers are read, 20 µs a member.

    Raises:
        MetaplError: the file is no tar file, compressed, or cut.
    """
    try:
        with open_plain(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.isreg():
                    yield posixpath.normpath(entry.name).lstrip("/"), entry.offset_data, entry.size
            # tarfile takes a header that is cut, or missing, for the end, which is two blocks of
            # zeros.
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            if file.read().strip(b"\0") or size < 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise MetaplError(
            f"{shown(path)} cannot be read as a tar file: {reason_of(error)}; expected a whole, "
            "uncompressed one."
        ) from error


def open_picture(path: str | os.PathLike[str]) -> io.BufferedReader | io.BytesIO:
    """Open a file, or a member of a tar file, for reading its bytes.

    An OSError where there is none.
    """
    tar = _tar_and_member(path)
    if tar is None:
        return open_plain(path)
    start, size = _place_in_tar(*tar)
    with open_plain(tar[0]) as file:
        file.seek(start)
        return io.BytesIO(file.read(size))


def size_of(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of a plain file, or of a member of a tar file.

    Raises:
        OSError: there is none.
    """
    if (tar := _tar_and_member(path)) is not None:
        return _place_in_tar(*tar)[1]
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    return status.st_size


def _tar_and_member(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return the tar file and the name in it of a path that leads into one."""
    text, at = os.fspath(path), -1
    while (at := text.find(f"{TAR}/", at + 1)) >= 0:
        end = at + len(TAR)
        if os.path.isfile(text[:end]):
            return text[:end], text[end + 1 :]
    return None


def _place_in_tar(tar: str, name: str) -> tuple[int, int]:
    """Where a member of a tar file starts, and its size."""
    status, wanted = os.stat(tar), _name_hash(name)
    hashes, starts, sizes = _tar_index(tar, status.st_size, status.st_mtime_ns)
    row = int(np.searchsorted(hashes, wanted))
    if row == len(hashes) or hashes[row] != wanted:
        raise FileNotFoundError(errno.ENOENT, "No such file in the tar file")
    return int(starts[row]), int(sizes[row])


@cache
def _tar_index(tar: str, size: int, changed: int) -> NDArray[np.int64]:
    """Return the members of a tar file of this size and time of change, read once in a process.

    They are hashes of the names in rising order, starts and sizes: 24 bytes a member, in arrays
    that forked worker processes share.
    """
    try:
        found = sorted(
            (_name_hash(name), start, length) for name, start, length in tar_members(tar)
        )
    except MetaplError as error:
        raise OSError(errno.EIO, str(error)) from error
    index = np.array(found, dtype=np.int64).reshape(-1, 3).T.copy()
    if not np.diff(index[0]).all():
        raise OSError(errno.EIO, f"{tar} has a name twice")
    return index


def _name_hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# -------------------------------------------------------------------------- from a file to a tensor

_KINDS = (
    "bmp",
    "gif",
    "jfif",
    "jpe",
    "jpeg",
    "jpg",
    "pbm",
    "pgm",
    "png",
    "pnm",
    "ppm",
    "tif",
    "tiff",
    "webp",
)
SUFFIXES = tuple(f".{kind}" for kind in _KINDS)

# Pillow tries no others. Some of its readers start programs: EPS runs Ghostscript, whatever the
# file's name ends with.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")

# above, a picture is refused unread: a quarter of a gigabyte of RGB, Pillow's own limit too
MAX_PIXELS = 89_478_485
# A picture of more pixels is shrunk before it is converted, which takes several copies.
LARGE = 2**24

# Red, green and blue in brightness: ITU-R BT.601, as in Pillow.
LUMA = (0.299, 0.587, 0.114)

# The number of the orientation in EXIF.
_ORIENTATION = 0x0112

Mode = Literal["RGB", "L"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edges in pixels, from the upper left corner of the picture."""

Crop = Callable[[int, int], Box]
"""From the height and width of a picture to a box of it."""


class UnreadableImage(MetaplError):
    """A file that is no usable picture.

    What it alone has stands in brackets at the end of the ``reason``.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}.")
        self.path, self.reason = Path(path), reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.reason)


def read_image(
    path: str | Path,
    *,
    mode: Mode = "RGB",
    size: tuple[int, int] | None = None,
    center: float = 1.0,
) -> Tensor:
    """Read a picture as bytes, uint8 (3, H, W), or (1, H, W) of brightness.

    Whatever the file holds comes out the same way: turned as the camera noted (EXIF), palettes
    looked up, transparent parts on white, 16 bits scaled (not clipped) to 8, CMYK and others
    converted as Pillow does, without color profiles; of several frames the first.

    Args:
        path: a BMP, GIF, JPEG, PNG, PNM, TIFF or WebP file, whatever its suffix.
        size: (height, width), or None for the picture's own. The largest centered box of this shape
            is resized to it, bilinearly over areas: a side that is too long loses both ends.
        center: share of the sides of that box that is used, about its center: 224/256 for ImageNet;
            needs a size.

    A JPEG of more than twice the needed size is decoded at a half, a quarter or an eighth of its
    size, which is several times as fast; values then differ from those of full decoding by a few
    levels.

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "red.png"
    >>> Image.new("RGB", (40, 30), "red").save(path)
    >>> read_image(path).shape, read_image(path, size=(8, 8))[:, 0, 0]
    (torch.Size([3, 30, 40]), tensor([255,   0,   0], dtype=torch.uint8))
    """
    if not 0 < center <= 1:
        raise MetaplError(
            f"read_image got center {center}; expected a share of the sides, above 0 and at most 1."
        )
    if size is not None:
        return read_crops(path, [_centered(size, center)], size=size, mode=mode)[0]
    with _opened(path) as image:
        return _as_tensor(_plain(_turned(image), mode))


def read_crops(
    path: str | Path, crops: Sequence[Crop], *, size: tuple[int, int], mode: Mode = "RGB"
) -> list[Tensor]:
    """Read boxes of a picture, decoding it once.

    For each crop of the upright picture it returns uint8 (3, H, W) or (1, H, W) of this size; else
    it is as :func:`read_image`.
    """
    if min(size) < 1:
        raise MetaplError(f"read_image got size {size}; expected sides of 1 or more")
    with _opened(path) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
        if not is_jpeg:
            # Which side is up may stand behind the pixels.
            image.load()
        try:
            turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        # A broken EXIF orientation does not lose the picture, as in _turned.
        except Exception:
            turned = False
        width, height = image.size[::-1] if turned else image.size
        boxes = [crop(height, width) for crop in crops]
        # Twice the resolution of the result, so that the resampling has something to average over.
        shrinks = (
            min((bottom - top) / size[0], (right - left) / size[1]) / 2
            for left, top, right, bottom in boxes
        )
        shrink = max(1.0, min(shrinks))
        if is_jpeg:
            image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        elif (
            image.width * image.height > LARGE
            and shrink >= 2
            and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK")
        ):
            exif = image.getexif()
            image = image.reduce(math.floor(shrink))
            # The reduced picture has lost which side is up.
            image.getexif().update(exif)
        upright = _plain(_turned(image), mode)
        return [_resized(upright, size, box, (width, height)) for box in boxes]


def gray_image(path: str | Path, size: int) -> Tensor:
    """Read an image as brightness, float32 (size, size) in [0, 1].

    It is averaged over the areas of a ``size`` x ``size`` grid, to which it is stretched. Colors,
    transparency, turned cameras and errors are as of :func:`read_image`.
    """
    from PIL import Image

    with _opened(path) as image:
        # Floats, so that the averages are not rounded to 8 bits.
        levels = Image.fromarray(np.asarray(_plain(_turned(image), "L"), dtype=np.float32))
        grid = np.array(levels.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(grid / 255).clamp(0, 1)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image]:
    """Open a picture and read its header.

    Whatever Pillow raises in the block says which file and why.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns of oddities in files that read well.
            warnings.simplefilter("ignore")
            with open_picture(path) as file, Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(
                        path, f"more than {MAX_PIXELS:,} pixels ({image.width}x{image.height})"
                    )
                yield image
    except MetaplError:
        raise
    except MemoryError as error:
        raise MetaplError(
            f"{path}: the memory does not suffice to decode it; use fewer workers."
        ) from error
    except UnidentifiedImageError:
        reason = "not a picture of a known format" if size_of(path) else "the file is empty"
        raise UnreadableImage(path, reason) from None
    # Each of Pillow's readers has exceptions of its own.
    except Exception as error:
        reason = reason_of(error)
        if not isinstance(error, OSError) or error.errno not in (errno.EINVAL, errno.EISDIR):
            reason = (
                f"the picture {'is truncated' if 'truncated' in reason else 'cannot be decoded'} "
                f"({reason})"
            )
        # For a pipe, a device or a folder the reason is in the system's words.
        raise UnreadableImage(path, reason) from error


def _centered(size: tuple[int, int], center: float) -> Crop:
    """Return a share of the largest centered box of a shape."""

    def box(height: int, width: int) -> Box:
        scale = center * min(height / size[0], width / size[1])
        left, top = (width - size[1] * scale) / 2, (height - size[0] * scale) / 2
        return left, top, width - left, height - top

    return box


def _turned(image: Image) -> Image:
    from PIL import ImageOps

    image.load()
    try:
        # In place, for it would else return a copy of a picture that is upright.
        ImageOps.exif_transpose(image, in_place=True)
    # A broken EXIF orientation does not lose the picture.
    except Exception:
        return image
    return image


def _plain(image: Image, mode: Mode) -> Image:
    """Return the picture in 8 bits and without transparency."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # Brightness of 16 bits is scaled down; Pillow's own conversion would clip it at 255.
        values = np.asarray(image)
        if image.mode == "F" or (values.size and (values.min() < 0 or values.max() > 65535)):
            kind = "floating point" if image.mode == "F" else "32 bits"
            raise ValueError(
                f"numbers in {kind}, whose range is unknown: save it with 8 or 16 bits"
            )
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "P":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Image, size: tuple[int, int], part: Box, full: tuple[int, int]) -> Tensor:
    """Return a box of the picture at the size asked for.

    The box counts in the pixels of the full picture.
    """
    from PIL import Image

    x, y = image.width / full[0], image.height / full[1]
    left, top, right, bottom = max(part[0] * x, 0), max(part[1] * y, 0), part[2] * x, part[3] * y
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return _as_tensor(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def _as_tensor(image: Image) -> Tensor:
    levels = torch.from_numpy(np.atleast_3d(np.array(image, dtype=np.uint8)))
    return rearrange(levels, "h w c -> c h w").contiguous()
