"""Reading of image files: every format becomes the same kind of tensor, or is refused with the reason."""

from __future__ import annotations

import errno
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy
import torch
from einops import rearrange
from torch import Tensor

from metapl.apps.pictures.tar import open_picture, size_of
from metapl.errors import MetaplError, reason_of
from metapl.words import shown

if TYPE_CHECKING:
    from PIL.Image import Image

_KINDS = ("bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp")
SUFFIXES = tuple(f".{kind}" for kind in _KINDS)

# Pillow tries no others. Some of its readers start programs: EPS runs Ghostscript, whatever the file's name ends with.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")

MAX_PIXELS = 89_478_485  # above, a picture is refused unread: a quarter of a gigabyte of RGB, Pillow's own limit too
LARGE = 2**24  # pixels above which a picture is shrunk before it is converted, which takes several copies

LUMA = (0.299, 0.587, 0.114)  # red, green and blue in brightness: ITU-R BT.601, as in Pillow

_ORIENTATION = 0x0112  # of EXIF

Mode = Literal["RGB", "L"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edges in pixels, from the upper left corner of the picture."""

Crop = Callable[[int, int], Box]
"""From the height and width of a picture to a box of it."""


class UnreadableImage(MetaplError):
    """A file that is no usable picture; what it alone has stands in brackets at the end of the ``reason``."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{shown(path)}: {reason}.")
        self.path, self.reason = Path(path), reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.reason)


def read_image(
    path: str | Path, *, mode: Mode = "RGB", size: tuple[int, int] | None = None, center: float = 1.0
) -> Tensor:
    """Read a picture as bytes, uint8 (3, H, W), or (1, H, W) of brightness.

    Whatever the file holds comes out the same way: turned as the camera noted (EXIF), palettes looked up, transparent
    parts on white, 16 bits scaled (not clipped) to 8, CMYK and others converted as Pillow does, without color
    profiles; of several frames the first.

    Args:
        path: a BMP, GIF, JPEG, PNG, PNM, TIFF or WebP file, whatever its suffix.
        size: (height, width), or None for the picture's own. The largest centered box of this shape is resized to it,
            bilinearly over areas: a side that is too long loses both ends.
        center: share of the sides of that box that is used, about its center: 224/256 for ImageNet; needs a size.

    A JPEG of more than twice the needed size is decoded at a half, a quarter or an eighth of its size, which is several
    times as fast; values then differ from those of full decoding by a few levels.

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "red.png"
    >>> Image.new("RGB", (40, 30), "red").save(path)
    >>> read_image(path).shape, read_image(path, size=(8, 8))[:, 0, 0]
    (torch.Size([3, 30, 40]), tensor([255,   0,   0], dtype=torch.uint8))
    """
    if not 0 < center <= 1:
        raise MetaplError(f"read_image got center {center}; expected a share of the sides, above 0 and at most 1.")
    if size is not None:
        return read_crops(path, [_centered(size, center)], size=size, mode=mode)[0]
    with _opened(path) as image:
        return _as_tensor(_plain(_turned(image), mode))


def read_crops(path: str | Path, crops: Sequence[Crop], *, size: tuple[int, int], mode: Mode = "RGB") -> list[Tensor]:
    """Read boxes of a picture, decoding it once: for each crop of the upright picture, uint8 (3, H, W) or (1, H, W) of
    this size; else as :func:`read_image`."""
    if min(size) < 1:
        raise MetaplError(f"read_image got size {size}; expected sides of 1 or more")
    with _opened(path) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
        if not is_jpeg:
            image.load()  # which side is up may stand behind the pixels
        try:
            turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        except Exception:  # as in _turned
            turned = False
        width, height = image.size[::-1] if turned else image.size
        boxes = [crop(height, width) for crop in crops]
        # Twice the resolution of the result, so that the resampling has something to average over.
        shrinks = (min((bottom - top) / size[0], (right - left) / size[1]) / 2 for left, top, right, bottom in boxes)
        shrink = max(1.0, min(shrinks))
        if is_jpeg:
            image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
        elif image.width * image.height > LARGE and shrink >= 2 and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
            exif = image.getexif()
            image = image.reduce(math.floor(shrink))
            image.getexif().update(exif)  # which side is up
        upright = _plain(_turned(image), mode)
        return [_resized(upright, size, box, (width, height)) for box in boxes]


def gray_image(path: str | Path, size: int) -> Tensor:
    """Read an image as brightness, averaged over the areas of a ``size`` x ``size`` grid, to which it is stretched:
    float32 (size, size) in [0, 1]. Colors, transparency, turned cameras and errors are as of :func:`read_image`."""
    from PIL import Image

    with _opened(path) as image:
        # Floats, so that the averages are not rounded to 8 bits.
        levels = Image.fromarray(numpy.asarray(_plain(_turned(image), "L"), dtype=numpy.float32))
        grid = numpy.array(levels.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(grid / 255).clamp(0, 1)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image]:
    """The picture with its header read; whatever Pillow raises in the block says which file and why."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities in files that read well
            with open_picture(path) as file, Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(path, f"more than {MAX_PIXELS:,} pixels ({image.width}x{image.height})")
                yield image
    except MetaplError:
        raise
    except MemoryError as error:
        raise MetaplError(f"{path}: the memory does not suffice to decode it; use fewer workers.") from error
    except UnidentifiedImageError:
        reason = "not a picture of a known format" if size_of(path) else "the file is empty"
        raise UnreadableImage(path, reason) from None
    except Exception as error:  # each of Pillow's readers has exceptions of its own
        reason = reason_of(error)
        if not isinstance(error, OSError) or error.errno not in (errno.EINVAL, errno.EISDIR):
            reason = f"the picture {'is truncated' if 'truncated' in reason else 'cannot be decoded'} ({reason})"
        raise UnreadableImage(path, reason) from error  # of a pipe, a device or a folder, the system's words


def _centered(size: tuple[int, int], center: float) -> Crop:
    """A share of the largest centered box of a shape."""

    def box(height: int, width: int) -> Box:
        scale = center * min(height / size[0], width / size[1])
        left, top = (width - size[1] * scale) / 2, (height - size[0] * scale) / 2
        return left, top, width - left, height - top

    return box


def _turned(image: Image) -> Image:
    from PIL import ImageOps

    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)  # no copy of a picture that is upright
    except Exception:  # a broken EXIF orientation should not lose the picture
        return image
    return image


def _plain(image: Image, mode: Mode) -> Image:
    """The picture in 8 bits and without transparency."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        # Brightness of 16 bits is scaled down; Pillow's own conversion would clip it at 255.
        values = numpy.asarray(image)
        if image.mode == "F" or (values.size and (values.min() < 0 or values.max() > 65535)):
            kind = "floating point" if image.mode == "F" else "32 bits"
            raise ValueError(f"numbers in {kind}, whose range is unknown: save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(numpy.uint32) + 128) // 257).astype(numpy.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "P":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Image, size: tuple[int, int], part: Box, full: tuple[int, int]) -> Tensor:
    """A box of the picture at the size asked for; the box counts in the pixels of the full picture."""
    from PIL import Image

    x, y = image.width / full[0], image.height / full[1]
    left, top, right, bottom = max(part[0] * x, 0), max(part[1] * y, 0), part[2] * x, part[3] * y
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return _as_tensor(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def _as_tensor(image: Image) -> Tensor:
    levels = torch.from_numpy(numpy.atleast_3d(numpy.array(image, dtype=numpy.uint8)))
    return rearrange(levels, "h w c -> c h w").contiguous()
