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
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metapl.errors import MetaplError, needed_for, reason_of
from metapl.runs.files import open_plain
from metapl.words import shown

with needed_for("metapl.pictures"):
    from einops import rearrange

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

    Raises:
        OSError: there is none.
    """
    place = _tar_and_member(path)
    if place is None:
        return open_plain(path)
    tar, member = place
    start, size = _place_in_tar(tar, member)
    with open_plain(tar) as file:
        file.seek(start)
        return io.BytesIO(file.read(size))


def size_of(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of a plain file, or of a member of a tar file.

    Raises:
        OSError: there is none.
    """
    place = _tar_and_member(path)
    if place is not None:
        tar, member = place
        _, size = _place_in_tar(tar, member)
        return size
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    return status.st_size


def _tar_and_member(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return the tar file and the name in it of a path that leads into one."""
    text = os.fspath(path)
    # A folder may be called like a tar file too.
    position = text.find(f"{TAR}/")
    while position >= 0:
        end = position + len(TAR)
        if os.path.isfile(text[:end]):
            return text[:end], text[end + 1 :]
        position = text.find(f"{TAR}/", position + 1)
    return None


def _place_in_tar(tar: str, name: str) -> tuple[int, int]:
    """Return where a member of a tar file starts, and its size."""
    status = os.stat(tar)
    hashes, starts, sizes = _tar_index(tar, status.st_size, status.st_mtime_ns)
    name_hash = _name_hash(name)
    row = int(np.searchsorted(hashes, name_hash))
    if row == len(hashes) or hashes[row] != name_hash:
        raise FileNotFoundError(errno.ENOENT, "No such file in the tar file")
    return int(starts[row]), int(sizes[row])


@cache
def _tar_index(tar: str, size: int, changed: int) -> NDArray[np.int64]:
    """Return the members of a tar file of this size and time of change, read once in a process.

    They are hashes of the names in rising order, starts and sizes: 24 bytes a member, in arrays
    that forked worker processes share.
    """
    rows = []
    try:
        for name, start, length in tar_members(tar):
            rows.append((_name_hash(name), start, length))
    except MetaplError as error:
        raise OSError(errno.EIO, str(error)) from error
    index = np.array(sorted(rows), dtype=np.int64).reshape(-1, 3).T.copy()
    if not np.diff(index[0]).all():
        raise OSError(errno.EIO, f"{tar} has a name twice")
    return index


def _name_hash(name: str) -> int:
    """Return 64 bits of a hash of a name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# -------------------------------------------------------------------------- from a file to a tensor

# How the names of pictures end.
SUFFIXES = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

# Pillow tries no others. Some of its readers start programs: EPS runs Ghostscript, whatever the
# file's name ends with.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")

# A picture of more pixels is refused unread: it is a quarter of a gigabyte of RGB, and Pillow's own
# limit too.
MAX_PIXELS = 89_478_485

# A picture of more pixels is shrunk before it is converted, which takes several copies.
LARGE = 2**24

# Red, green and blue in brightness: ITU-R BT.601, as in Pillow.
LUMA = (0.299, 0.587, 0.114)

# The tag of EXIF that says which side is up, and its values for a picture that lies on a side.
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)

# The tags of TIFF that say whether 0 is white, and whether numbers have a sign, with these values.
_PHOTOMETRIC = 262
_ZERO_IS_WHITE = 0
_SAMPLE_FORMAT = 339
_SIGNED = 2

# How many numbers of a picture stand for all of them, about.
_SAMPLED = 256

# The kinds of numbers beside those from 0 to 255.
INTEGERS = "integers beyond 0 to 255"
FLOATS = "floating point"
COLORS = "colors of 16 bits"

# The greatest number of 16 bits.
MOST_OF_16_BITS = 2**16 - 1

Colors = Literal["RGB", "L"]

# Left, top, right and bottom edges in pixels, from the upper left corner of the picture.
Box = tuple[float, float, float, float]

# From the height and width of a picture to a box of it.
Crop = Callable[[int, int], Box]

# The numbers that become 0 and 255 in pictures of more than 8 bits.
Levels = tuple[float, float]


class UnreadableImage(MetaplError):
    """A file that is no usable picture.

    Args:
        path: of the file.
        reason: why; what is of this file alone stands in brackets at its end.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}.")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        """Return how it is made again, for it comes from worker processes."""
        return type(self), (self.path, self.reason)


def read_image(
    path: str | Path,
    *,
    colors: Colors = "RGB",
    size: tuple[int, int] | None = None,
    center: float = 1.0,
    levels: Levels | None = None,
) -> Tensor:
    """Read a picture as bytes, uint8 (3, H, W), or (1, H, W) of brightness.

    Whatever the file holds comes out the same way: turned as the camera noted (EXIF), palettes
    looked up, transparent parts on white, more than 8 bits scaled to 8, CMYK and others converted
    as Pillow does, without color profiles; of several frames the first.

    Args:
        path: a BMP, GIF, JPEG, PNG, PNM, TIFF or WebP file, whatever its suffix.
        colors: "RGB", or "L" for brightness.
        size: (height, width), or None for the picture's own. The largest centered box of this shape
            is resized to it, bilinearly over areas: a side that is too long loses both ends.
        center: share of the sides of that box that is used, about its center: 224/256 for ImageNet;
            needs a size.
        levels: the numbers that become 0 and 255 in grey pictures of more than 8 bits, others being
            refused, see :func:`metapl.pictures.find_levels`; None: 0 and 65,535.

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
        crop = _centered(size, center)
        return read_crops(path, [crop], size=size, colors=colors, levels=levels)[0]
    with _opened(path) as image:
        return _as_tensor(_plain(_turned(image), colors, levels))


def read_crops(
    path: str | Path,
    crops: Sequence[Crop],
    *,
    size: tuple[int, int],
    colors: Colors = "RGB",
    levels: Levels | None = None,
) -> list[Tensor]:
    """Read boxes of a picture, decoding it once.

    Args:
        path: of the picture, as for :func:`read_image`.
        crops: give the boxes of the upright picture.
        size: (height, width) to which each box is resized.
        colors, levels: as for :func:`read_image`.

    Returns: uint8 (3, H, W) or (1, H, W) for each crop.
    """
    if min(size) < 1:
        raise MetaplError(f"read_image got size {size}; expected sides of 1 or more")
    with _opened(path) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
        if not is_jpeg:
            # Which side is up may stand behind the pixels.
            image.load()
        width, height = image.size
        if _is_on_its_side(image):
            height, width = image.size
        boxes = [crop(height, width) for crop in crops]
        shrink = _most_shrinking(boxes, size)
        if is_jpeg:
            # It is decoded at a half, a quarter or an eighth of its size, and not below this one.
            image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        elif _is_to_be_reduced(image, shrink):
            exif = image.getexif()
            image = image.reduce(math.floor(shrink))
            # It says which side is up.
            image.getexif().update(exif)
        upright = _plain(_turned(image), colors, levels)
        return [_resized(upright, size, box, (width, height)) for box in boxes]


class Depth(NamedTuple):
    """What a file has beyond one picture of 8 bits.

    The sample of the numbers has the lowest and the highest one; there is none of 8 bits.
    """

    path: str | Path
    kind: str
    has_frames: bool
    sample: NDArray[np.float64]


def depth_of(path: str | Path) -> Depth:
    """Return what a file has beyond one picture of 8 bits; it is decoded where there is more.

    Raises:
        UnreadableImage: it is no usable picture.
    """
    with _opened(path) as image:
        # A photograph with its preview is one picture.
        has_frames = image.format != "MPO" and getattr(image, "is_animated", False)
        if _has_numbers(image):
            kind = FLOATS if image.mode == "F" else INTEGERS
            numbers = _numbers(image)
        elif image.format in ("PNG", "TIFF") and ";16" in str(getattr(image, "tile", "")):
            kind = COLORS
            numbers = np.asarray(image)[..., :3] * 257.0
        else:
            return Depth(path, "8 bits", has_frames, np.empty(0))
        # By an odd step, the sample does not go down a column.
        step = numbers.size // _SAMPLED | 1
        sample = np.append(numbers.ravel()[::step], [numbers.min(), numbers.max()])
        return Depth(path, kind, has_frames, sample)


def _is_on_its_side(image: Image) -> bool:
    """Return whether the camera lay on its side, so that height and width are exchanged."""
    try:
        return image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    except Exception:
        # A broken EXIF should not lose the picture.
        return False


def _most_shrinking(boxes: Sequence[Box], size: tuple[int, int]) -> float:
    """Return how much smaller a picture may be decoded, 1 or more.

    It has twice the resolution of the result then, so that the resampling has something to average
    over.
    """
    height, width = size
    shrinks = []
    for left, top, right, bottom in boxes:
        shrinks.append((bottom - top) / height / 2)
        shrinks.append((right - left) / width / 2)
    return max(1.0, min(shrinks))


def _is_to_be_reduced(image: Image, shrink: float) -> bool:
    """Return whether a picture that is no JPEG is shrunk before it is converted."""
    is_large = image.width * image.height > LARGE
    is_of_levels = image.mode in ("L", "LA", "RGB", "RGBA", "CMYK")
    return is_large and is_of_levels and shrink >= 2


def gray_image(path: str | Path, size: int) -> Tensor:
    """Read an image as brightness, float32 (size, size) in [0, 1].

    It is averaged over the areas of a ``size`` x ``size`` grid, to which it is stretched. Colors,
    transparency, turned cameras and errors are as of :func:`read_image`.
    """
    with needed_for("metapl.pictures"):
        from PIL import Image

    with _opened(path) as image:
        # Floats, so that the averages are not rounded to 8 bits.
        levels = Image.fromarray(np.asarray(_plain(_turned(image), "L"), dtype=np.float32))
        grid = np.array(levels.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(grid / 255).clamp(0, 1)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image]:
    """Open a picture and read its header.

    Whatever Pillow raises in the block becomes an error that says which file and why.
    """
    with needed_for("metapl.pictures"):
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
    except UnreadableImage:
        raise
    except MetaplError as error:
        raise UnreadableImage(path, str(error)) from None
    except MemoryError as error:
        raise MetaplError(
            f"{path}: the memory does not suffice to decode it; use fewer workers."
        ) from error
    except UnidentifiedImageError:
        reason = "not a picture of a known format" if size_of(path) else "the file is empty"
        raise UnreadableImage(path, reason) from None
    except Exception as error:
        # Each of Pillow's readers has exceptions of its own.
        reason = reason_of(error)
        # For a pipe, a folder or a file that is gone the reason is in the system's words.
        is_no_file = isinstance(error, OSError) and error.errno is not None
        if not is_no_file:
            fault = "is truncated" if "truncated" in reason else "cannot be decoded"
            reason = f"the picture {fault} ({reason})"
        raise UnreadableImage(path, reason) from error


def _centered(size: tuple[int, int], center: float) -> Crop:
    """Return a share of the largest centered box of a shape."""

    def box(height: int, width: int) -> Box:
        scale = center * min(height / size[0], width / size[1])
        left = (width - size[1] * scale) / 2
        top = (height - size[0] * scale) / 2
        return left, top, width - left, height - top

    return box


def _turned(image: Image) -> Image:
    """Return the picture turned as the camera noted; one that is upright is not copied."""
    with needed_for("metapl.pictures"):
        from PIL import ImageOps

    image.load()
    # A broken EXIF orientation should not lose the picture.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _plain(image: Image, colors: Colors, levels: Levels | None = None) -> Image:
    """Return the picture in 8 bits and without transparency."""
    with needed_for("metapl.pictures"):
        from PIL import Image

    if _has_numbers(image):
        image = Image.fromarray(_scaled(image, levels))
    elif levels is not None:
        raise MetaplError("8 bits, where numbers from {:,g} to {:,g} are expected".format(*levels))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "P":
        image = image.convert("RGB")
    return image if image.mode == colors else image.convert(colors)


def _has_numbers(image: Image) -> bool:
    """Return whether a picture is grey and has other numbers than 0 to 255."""
    is_signed = image.mode == "L" and _has_tag(image, _SAMPLE_FORMAT, _SIGNED)
    return is_signed or image.mode.startswith(("I", "F"))


def _numbers(image: Image) -> NDArray[np.float64]:
    """Return the numbers of a grey picture, (H, W)."""
    numbers = np.asarray(image)
    # Pillow has no modes for these two.
    is_signed = _has_tag(image, _SAMPLE_FORMAT, _SIGNED)
    if numbers.dtype == np.uint8 and is_signed:
        numbers = numbers.view(np.int8)
    if numbers.dtype == np.int32 and not is_signed:
        numbers = numbers.view(np.uint32)
    if not np.isfinite(numbers).all():
        raise MetaplError("numbers that are not finite")
    return numbers.astype(np.float64)


def _has_tag(image: Image, tag: int, value: int) -> bool:
    """Return whether a picture comes from a TIFF file with a tag of this value."""
    return getattr(image, "tag_v2", {}).get(tag) in (value, (value,))


def _scaled(image: Image, levels: Levels | None) -> NDArray[np.uint8]:
    """Return a grey picture in 8 bits; Pillow's own conversion would clip it."""
    numbers = _numbers(image)
    low, high = levels or (0, MOST_OF_16_BITS)
    is_float = image.mode == "F"
    if levels is None and (is_float or numbers.min() < low or numbers.max() > high):
        kind = FLOATS if is_float else "32 bits"
        raise MetaplError(f"numbers in {kind}, whose range is unknown: save it with 8 or 16 bits")
    scaled = ((numbers - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
    if _has_tag(image, _PHOTOMETRIC, _ZERO_IS_WHITE):
        scaled = 255 - scaled
    if "transparency" in image.info:
        scaled[numbers == image.info["transparency"]] = 255
    return scaled


def _resized(image: Image, size: tuple[int, int], box: Box, full: tuple[int, int]) -> Tensor:
    """Return a box of the picture at another size.

    Args:
        image: the picture, perhaps decoded at a smaller size.
        size: (height, width) of the result.
        box: in the pixels of the full picture.
        full: width and height of the full picture.
    """
    with needed_for("metapl.pictures"):
        from PIL import Image

    x_scale = image.width / full[0]
    y_scale = image.height / full[1]
    left, top, right, bottom = box
    scaled_box = (
        max(left * x_scale, 0),
        max(top * y_scale, 0),
        min(right * x_scale, image.width),
        min(bottom * y_scale, image.height),
    )
    height, width = size
    return _as_tensor(image.resize((width, height), Image.Resampling.BILINEAR, scaled_box))


def _as_tensor(image: Image) -> Tensor:
    """Return the levels of a picture, uint8 (C, H, W)."""
    levels = torch.from_numpy(np.atleast_3d(np.array(image, dtype=np.uint8)))
    return rearrange(levels, "h w c -> c h w").contiguous()
