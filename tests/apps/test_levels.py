"""What a file holds becomes levels by what its folder holds, or is refused by name.

Every kind of number is compared with its definition, and with Pillow where Pillow is right.
"""

import dataclasses
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metapl.apps.images import METHODS, Images, Pictures
from metapl.apps.inputs import Inputs
from metapl.apps.look import choose_settings, look
from metapl.apps.settings import Fitting
from metapl.errors import MetaplError
from metapl.networks.card import Input, card_of
from metapl.pictures import (
    FileImages,
    UnreadableImage,
    find_levels,
    read_image,
    scan_unlabeled,
    verify_files,
)
from metapl.pictures.reader import read_crops

Numbers = np.ndarray[Any, Any]

UNSIGNED, SIGNED, FLOATING = 1, 2, 3


def tiff(numbers: Numbers, *, bits: int, sample: int = UNSIGNED, zero: str = "black") -> bytes:
    """Return an uncompressed grey TIFF, or one of colors where there are three of each number."""
    height, width, *colors = numbers.shape
    order, letter = ("MM", ">") if numbers.dtype.byteorder == ">" else ("II", "<")
    photometric = 2 if colors else ("white", "black").index(zero)
    content = numbers.tobytes()
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0)]
    entries += [(277, 3 if colors else 1), (278, height), (279, len(content)), (339, sample)]
    start = 8 + 2 + 12 * len(entries) + 4
    file = order.encode() + struct.pack(f"{letter}HIH", 42, 8, len(entries))
    for tag, value in entries:
        file += struct.pack(f"{letter}HHII", tag, 4, 1, start if tag == 273 else value)
    return file + struct.pack(f"{letter}I", 0) + content


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def saved(numbers: Numbers, kind: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(numbers), kind, **options)


RAMP = np.arange(700, 1500, 8).reshape(10, 10)
SIXTEEN = RAMP.astype(np.uint16)
WIDE = np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)


def ramp_of(bits: int) -> Numbers:
    return np.linspace(0, 2**bits - 1, 100).astype(np.uint16).reshape(10, 10)


def pgm(numbers: Numbers, most: int) -> bytes:
    height, width = numbers.shape
    return f"P5 {width} {height} {most}\n".encode() + numbers.astype(">u2").tobytes()


# What is in the file, and the numbers in it, of which the least becomes 0 and the greatest 255.
DEEP: dict[str, tuple[bytes, Numbers]] = {
    "depth.png": (saved(SIXTEEN, "PNG"), SIXTEEN),
    "depth.tif": (saved(SIXTEEN, "TIFF"), SIXTEEN),
    "packed.tif": (saved(SIXTEEN, "TIFF", compression="tiff_lzw"), SIXTEEN),
    "big_endian.tif": (tiff(SIXTEEN.astype(">u2"), bits=16), SIXTEEN),
    "depth.pgm": (pgm(SIXTEEN, 65535), SIXTEEN),
    "12_bits.pgm": (pgm(SIXTEEN, 4095), SIXTEEN),
    **{f"{bits}_bits.png": (saved(ramp_of(bits), "PNG"), ramp_of(bits)) for bits in (9, 10, 12)},
    **{f"{bits}_bits.tif": (saved(ramp_of(bits), "TIFF"), ramp_of(bits)) for bits in (14, 15)},
    "signed.tif": (tiff((RAMP - 1000).astype(np.int16), bits=16, sample=SIGNED), RAMP),
    "signed_bytes.tif": (tiff((RAMP // 8 - 137).astype(np.int8), bits=8, sample=SIGNED), RAMP),
    "int32.tif": (saved((-1000 * RAMP).astype(np.int32), "TIFF"), -RAMP),
    "uint32.tif": (tiff((2_000_000 * RAMP).astype(np.uint32), bits=32), RAMP),
    "float.tif": (saved((RAMP / 1000).astype(np.float32), "TIFF"), RAMP),
    "white_zero.tif": (tiff(SIXTEEN, bits=16, zero="white"), -RAMP),
    "white_zero_float.tif": (
        tiff(RAMP.astype(np.float32), bits=32, sample=FLOATING, zero="white"),
        -RAMP,
    ),
    "wide.png": (saved(WIDE, "PNG"), WIDE),
}


@pytest.mark.parametrize("name", DEEP)
def test_numbers_of_more_than_8_bits_fill_the_levels(name: str, tmp_path: Path) -> None:
    content, numbers = DEEP[name]
    path = tmp_path / name
    path.write_bytes(content)
    files = scan_unlabeled(tmp_path)
    levels = find_levels([files])
    share = (numbers - float(numbers.min())) / (float(numbers.max()) - float(numbers.min()))
    expected = torch.from_numpy(share * 255)
    found = read_image(path, colors="L", levels=levels)
    # Numbers are 16 bits on the way where the file says its own range, as PNM does.
    assert (found[0] - expected).abs().max() <= 0.51
    assert len(found.unique()) == 100
    assert torch.equal(read_image(path, levels=levels), found.expand(3, -1, -1))
    (crop,) = read_crops(path, [lambda h, w: (0, 0, w, h)], size=(10, 10), levels=levels)
    assert torch.equal(crop[:1], found)
    images = FileImages(files.paths(), size=(10, 10), colors="L", levels=levels)
    assert torch.equal(images.fetch(torch.arange(1))[0][0], found)
    network_input = Input(channels=1, size=10, levels=levels)
    assert torch.equal(network_input.read(path), found / 255)
    assert verify_files(files, levels=levels).sound == (0,)


def rgb(levels: Numbers) -> Numbers:
    return np.stack([levels, levels // 2, 255 - levels], 2).astype(np.uint8)


EIGHT = ramp_of(8).astype(np.uint8)
COLORS = Image.fromarray(rgb(EIGHT))
PROFILE = b"no profile that anybody reads"
PLAIN: dict[str, bytes] = {
    "1_bit.png": saved(EIGHT > 99, "PNG"),
    "2_bits.png": encoded(Image.fromarray(EIGHT).quantize(4), "PNG", bits=2),
    "grey.png": saved(EIGHT, "PNG", icc_profile=PROFILE),
    "grey.jpg": saved(EIGHT, "JPEG", icc_profile=PROFILE),
    "white_zero.tif": tiff(EIGHT, bits=8, zero="white"),
    "colors.png": encoded(COLORS, "PNG"),
    "palette.png": encoded(COLORS.quantize(16), "PNG"),
    "palette.gif": encoded(COLORS.quantize(16), "GIF"),
    "cmyk.tif": encoded(COLORS.convert("CMYK"), "TIFF"),
    "cmyk.jpg": encoded(COLORS.convert("CMYK"), "JPEG"),
    "video.tif": encoded(COLORS.convert("YCbCr"), "TIFF"),
    "colors_of_12_bits.ppm": b"P6 10 10 4095\n"
    + (rgb(EIGHT).astype(float) * 4095 / 255).round().astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", PLAIN)
def test_pictures_of_8_bits_or_fewer_are_what_pillow_says(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PLAIN[name])
    assert find_levels([scan_unlabeled(tmp_path)]) is None
    with Image.open(tmp_path / name) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(read_image(tmp_path / name).permute(1, 2, 0), expected)


def folder(root: Path, **files: bytes) -> list[Any]:
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name.replace("_", ".")).write_bytes(content)
    return [scan_unlabeled(root)]


def test_the_range_is_that_of_all_pictures_that_are_learned_from(tmp_path: Path) -> None:
    few = folder(tmp_path / "few", a_png=saved(SIXTEEN, "PNG"))
    many = folder(tmp_path / "many", b_tif=saved(SIXTEEN + 500, "TIFF"), c_png=b"no picture")
    test = folder(tmp_path / "test", d_png=saved(SIXTEEN + 600, "PNG"))
    said: list[str] = []
    assert find_levels(few + many, test, said.append) == (700, 1992)
    assert said == ["pictures of more than 8 bits: 700 to 1,992 become 0 to 255"]
    # What lies outside is cut, unless it is the most: then it is another kind of picture.
    assert int(read_image(tmp_path / "test" / "d.png", levels=(700, 1992))[0, -1, -1]) == 255
    test += folder(tmp_path / "other", d_png=saved(SIXTEEN + 5000, "PNG"))
    with pytest.raises(MetaplError, match="100% of the numbers of .*other lie outside of 700 to"):
        find_levels(few + many, test)
    # A range that is wide enough has the levels of its type, also beside pictures of 8 bits.
    (tmp_path / "many" / "b.tif").write_bytes(saved(WIDE, "TIFF"))
    assert find_levels(few + many) == (0, 65_535)
    few += folder(tmp_path / "plain", e_png=saved(EIGHT, "PNG"))
    assert find_levels(few + many) is None
    # So have pictures of one number.
    flat = folder(tmp_path / "flat", a_png=saved(np.full((4, 4), 30_000, np.uint16), "PNG"))
    assert find_levels(flat) is None


def test_a_transparent_number_is_white(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(SIXTEEN, "PNG", transparency=700))
    assert read_image(tmp_path / "a.png", levels=(700, 1492))[0, 0, :3].tolist() == [255, 3, 5]


NOT_FINITE = np.where(RAMP > 1000, RAMP, np.nan).astype(np.float32)
DARK_COLORS = np.stack([SIXTEEN] * 3, 2)
REFUSED: dict[str, tuple[list[bytes], str]] = {
    "8 and 16 bits": (
        [saved(SIXTEEN, "PNG"), saved(EIGHT, "PNG")],
        "\\.png has 8 bits.* from 700 to 1,492",
    ),
    "kinds": (
        [saved(SIXTEEN, "PNG"), saved(RAMP.astype(np.float32), "TIFF")],
        r"\.png has floating",
    ),
    "dark colors": ([tiff(DARK_COLORS, bits=16)], r"\.png has colors of 16 bits.* 1,285 "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_cannot_be_compared_are_refused(name: str, tmp_path: Path) -> None:
    contents, words = REFUSED[name]
    files = folder(tmp_path / "a", **{f"{i}_png": content for i, content in enumerate(contents)})
    with pytest.raises(MetaplError, match=words):
        find_levels(files)
    with pytest.raises(MetaplError, match=words):
        find_levels(folder(tmp_path / "b", x_png=contents[0]), files)


def test_bright_colors_of_16_bits_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(np.stack([WIDE] * 3, 2), bits=16))
    assert find_levels([scan_unlabeled(tmp_path)]) is None
    assert read_image(tmp_path / "a.tif")[0, -1, -1] == 255


@pytest.mark.parametrize(
    ("content", "levels", "words"),
    [
        (saved(NOT_FINITE, "TIFF"), (700, 1492), "not finite"),
        (saved(EIGHT, "PNG"), (700, 1492), "8 bits, where numbers from 700 to 1,492"),
        (saved(RAMP.astype(np.float32), "TIFF"), None, "range is unknown"),
    ],
)
def test_a_file_whose_numbers_fit_no_levels_is_left_out_by_name(
    tmp_path: Path, content: bytes, levels: Any, words: str
) -> None:
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UnreadableImage, match=words):
        read_image(tmp_path / "a.tif", levels=levels)
    skipped = verify_files(scan_unlabeled(tmp_path), levels=levels).skipped
    assert [*skipped] == ["a.tif"]
    assert "(" not in skipped["a.tif"], "a reason that a summary would leave out"
    assert words in skipped["a.tif"]


def test_frames_and_outliers_are_said(tmp_path: Path) -> None:
    pages = [Image.fromarray(EIGHT), Image.fromarray(255 - EIGHT)]
    for kind in ("GIF", "TIFF", "WEBP", "PNG", "MPO"):
        content = encoded(pages[0].convert("RGB"), kind, save_all=True, append_images=pages[1:])
        folder(tmp_path / "frames", **{f"{kind}_{'jpg' if kind == 'MPO' else kind}": content})
    said: list[str] = []
    assert find_levels([scan_unlabeled(tmp_path / "frames")], say=said.append) is None
    (line,) = said
    # A photograph with its preview is one picture.
    assert (line.count("GIF.GIF"), line.count(".jpg"), line.count(",")) == (1, 0, 4)
    hot = np.tile(SIXTEEN, (8, 8))
    hot[3, 3] = 65535
    for i in range(4):
        folder(tmp_path / "hot", **{f"{i}_png": saved(hot, "PNG")})
    assert find_levels([scan_unlabeled(tmp_path / "hot")], say=said.append) == (0, 65_535)
    assert "numbers from 700 to 65,535 use 4 of 256 levels" in said[-2]
    # Spurious readings in each picture, which alone fill more levels than all others.
    generator = np.random.default_rng(0)
    for i in range(60):
        far = generator.integers(400, 1500, (12, 12))
        far.ravel()[generator.permutation(144)[:3]] = generator.integers(3000, 65536, 3)
        folder(tmp_path / "far", **{f"{i}_png": saved(far.astype(np.uint16), "PNG")})
    find_levels([scan_unlabeled(tmp_path / "far")], say=said.append)
    assert "nearly all numbers from 400 to" in said[-2]
    assert "of 256 levels, for some are far from the others" in said[-2]
    # As cameras of depth mark what they have not measured.
    unmeasured = np.where(np.arange(100) % 5, SIXTEEN.ravel(), 65535).reshape(10, 10)
    depth = folder(tmp_path / "depth", a_png=saved(unmeasured.astype(np.uint16), "PNG"))
    assert find_levels(depth, say=said.append) == (0, 65_535)
    assert "use 5 of 256 levels" in said[-2]
    # Sparse marks on a dark ground, and a few numbers as in maps of regions, are no faults.
    marks = np.where(np.arange(10_000) % 50, 100, np.arange(10_000) * 4).reshape(100, 100)
    regions = (np.arange(100) % 7).reshape(10, 10)
    for name, numbers in (("marks", marks), ("regions", regions)):
        files = folder(tmp_path / name, a_png=saved(numbers.astype(np.uint16), "PNG"))
        count = len(said)
        find_levels(files, say=said.append)
        assert not any("levels, for" in text for text in said[count:])


def test_a_training_keeps_the_levels_with_its_network(tmp_path: Path) -> None:
    """Pictures to learn from, to measure on and to predict are scaled alike."""
    for part in ("few", "many", "test"):
        for number in range(4):
            numbers = saved(SIXTEEN + number, "PNG", transparency=ord(part[0]))
            folder(tmp_path / part, **{f"{number}_png": numbers})
    for part in ("few", "test"):
        for number in range(4):
            place = tmp_path / part / "ab"[number % 2]
            place.mkdir(exist_ok=True)
            (tmp_path / part / f"{number}.png").rename(place / f"{number}.png")
    places = {name: str(tmp_path / part) for name, part in
              (("labeled", "few"), ("unlabeled", "many"), ("test", "test"))}  # fmt: skip
    pictures = Pictures(image_size=10, network="small_cnn", grey=True)
    given = Images(**places, pictures=pictures, fitting=Fitting(steps=2))
    said: list[str] = []
    config, _ = choose_settings(given, METHODS["supervised"], said.append)
    assert "pictures of more than 8 bits: 700 to 1,495 become 0 to 255" in said
    assert config.pictures.levels == (700, 1495)
    data = config.data(said.append, progress=False, log=None)
    card = card_of(json.loads(json.dumps(dataclasses.asdict(config.card("network")))))
    assert card == config.card("network")
    path = tmp_path / "test" / "b" / "3.png"
    expected = read_image(path, colors="L", levels=(700, 1495))
    assert len(expected.unique()) > 90
    assert torch.equal(data.test.images.fetch(torch.tensor([3]))[0][0], expected)
    assert torch.equal(255 * card.input.read(path), expected.float())
    assert "0 to 1 where the file has 700 to 1,495:" in card.input.note


def test_pictures_none_of_which_can_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(saved(NOT_FINITE, "TIFF"))
    with pytest.raises(MetaplError, match=r"a\.tif: .*not finite"):
        look([tmp_path / "a.tif"], torch.zeros(1, dtype=torch.int64), [tmp_path / "none.png"])


def test_a_list_of_pictures_is_predicted(tmp_path: Path) -> None:
    folder(tmp_path / "a", x_png=saved(EIGHT, "PNG"))
    (tmp_path / "list.txt").write_text("a/x.png\n")
    assert Inputs(Input(), [tmp_path / "list.txt"]).files == [str(tmp_path / "a" / "x.png")]


TRAINED_RANGE = (700.0, 4000.0)
OTHER_LEVELS = {
    "16 bits for a network of 8": ((700, 1500), None, "trained on pictures of 8 bits"),
    "another range": ((0, 500), TRAINED_RANGE, "100% of the numbers of "),
    "the same range": ((800, 3900), TRAINED_RANGE, ""),
    "all of 16 bits": ((0, 65_535), None, ""),
    "a dark one of 16 bits": ((700, 1500), (0.0, 65_535.0), ""),
}


@pytest.mark.parametrize("name", OTHER_LEVELS)
def test_pictures_of_another_range_are_refused_where_they_are_predicted(
    name: str, tmp_path: Path
) -> None:
    (low, high), levels, words = OTHER_LEVELS[name]
    ramp = np.linspace(low, high, 64).reshape(8, 8).astype(np.uint16)
    for number in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{number}.png")
    network_input = Input(levels=levels)
    # A folder, and its files one by one.
    for paths in ([tmp_path], sorted(tmp_path.iterdir()), [tmp_path / "1.png"]):
        if not words:
            assert len(Inputs(network_input, paths).files) in (1, 3)
            continue
        with pytest.raises(MetaplError, match=re.escape(words)) as refused:
            Inputs(network_input, paths)
        assert str(paths[0]) in str(refused.value)
