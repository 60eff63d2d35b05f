"""Images against arrays made here and against Pillow's own readings, and files that must be refused."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageCms, ImageOps

from tinydiff import images
from tinydiff.errors import DataError, UsageError
from tinydiff.images import CROPS, encode_png, fit, grid, open_image, read_settings, size_of, to_pixels, to_uint8

RNG = np.random.default_rng(0)


PHOTO = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


IMAGES = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3)))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG written by hand: `rows` hold each scan line after its filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = [header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(PHOTO), kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))
    assert np.array_equal(open_image(data), expected)
    assert size_of(data) == expected.shape[1::-1]
    if kind in ("PNG", "TIFF"):
        turned = [PHOTO, PHOTO[:, ::-1], PHOTO[::-1, ::-1], PHOTO[::-1]]
        turned += [image.transpose(1, 0, 2) for image in (turned[0], turned[3], turned[2], turned[1])]
        assert np.array_equal(open_image(data), turned[orientation - 1])


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(open_image(encoded(Image.fromarray(PHOTO), exif=exif)), PHOTO)


def test_damaged_exif_is_ignored():
    data = encoded(Image.fromarray(PHOTO), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(open_image(data), PHOTO)


def test_alpha_is_composited_on_the_background():
    alpha = np.array([[0, 128, 255]], dtype=np.uint8)
    image = np.dstack(
        [np.full((1, 3), 200, np.uint8), np.full((1, 3), 100, np.uint8), np.zeros((1, 3), np.uint8), alpha]
    )
    data = encoded(Image.fromarray(image))
    background, share = np.array([10, 20, 30]), alpha[..., None] / 255
    expected = np.rint(image[..., :3] * share + background * (1 - share))
    assert np.abs(open_image(data, "#0a141e").astype(int) - expected).max() <= 1
    assert open_image(data)[0, 0].tolist() == [255, 255, 255]
    assert open_image(data, "black")[0, 2].tolist() == [200, 100, 0]


def test_grey_with_alpha():
    data = encoded(Image.fromarray(np.array([[[40, 255], [40, 0]]], dtype=np.uint8), "LA"))
    assert open_image(data, "#ff0000")[0].tolist() == [[40, 40, 40], [255, 0, 0]]


def test_palette_with_and_without_alpha():
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    assert open_image(encoded(image))[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    transparent = open_image(encoded(image, transparency=bytes([0, 255, 128])), "#000000")[0].tolist()
    assert transparent == [[0, 0, 0], [40, 50, 60], [35, 40, 45]]


@pytest.mark.parametrize(
    ("mode", "transparency", "pixels", "expected"),
    [
        ("L", 7, [7, 8], [[255, 0, 0], [8, 8, 8]]),
        ("RGB", (1, 2, 3), [(1, 2, 3), (3, 2, 1)], [[255, 0, 0], [3, 2, 1]]),
        ("1", 0, [0, 255], [[255, 0, 0], [255, 255, 255]]),
    ],
)
def test_transparent_colour(mode, transparency, pixels, expected):
    image = Image.new(mode, (2, 1))
    image.putdata(pixels)
    assert open_image(encoded(image, transparency=transparency), "#ff0000")[0].tolist() == expected


def test_one_bit():
    image = Image.fromarray(np.array([[True, False, True]]))
    assert open_image(encoded(image))[0, :, 0].tolist() == [255, 0, 255]


def test_16_bit_grey_is_scaled_not_clipped():
    levels = [0, 128, 129, 255, 256, 257, 32768, 65406, 65407, 65535]
    rows = b"\0" + struct.pack(">10H", *levels)
    image = open_image(png(10, 1, 16, 0, rows))
    assert image[0, :, 0].tolist() == [round(level * 255 / 65535) for level in levels]
    assert np.array_equal(image[..., 0], image[..., 2])
    tinted = open_image(png(10, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 256))), "#ff0000")
    assert tinted[0, 4].tolist() == [255, 0, 0]
    assert np.array_equal(tinted[0, 5:], image[0, 5:])


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour(colour, channels):
    values = [0x1234, 0x5678, 0x9ABC, 0xFFFF][4 - channels :] if channels != 3 else [0x1234, 0x5678, 0x9ABC]
    image = open_image(png(1, 1, 16, colour, b"\0" + struct.pack(f">{channels}H", *values)))
    expected = {2: [0x12, 0x56, 0x9A], 4: [0x9A] * 3, 6: [0x12, 0x56, 0x9A]}[colour]
    assert np.abs(image[0, 0].astype(int) - expected).max() <= 1


def test_16_bit_colour_with_a_transparent_colour_opens():
    rows = b"\0" + struct.pack(">3H", 1, 2, 3)
    assert open_image(png(1, 1, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 900, 60000, 3)))).shape == (1, 1, 3)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_low_depth_grey_uses_the_whole_range(depth):
    top = (1 << depth) - 1
    image = open_image(png(2, 1, depth, 0, b"\0" + bytes([top << (8 - depth)])))
    assert image[0, :, 0].tolist() == [255, 0]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(open_image(encoded(image, "JPEG", quality=100))[4, 4].astype(int) - [255, 0, 0]).max() <= 3


def test_progressive_and_grey_jpeg():
    smooth = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95, progressive=True)
    assert np.array_equal(open_image(data)[..., 1], np.asarray(Image.open(BytesIO(data))))


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def rgb_profile(gamma: float, name: bytes = b"power", primaries: str = "RGB") -> bytes:
    """A minimal ICC 2.1 profile of pure power curves: of three with sRGB's primaries (D50-adapted), or of grey alone."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(79)
    tags = {b"desc": description + bytes(-len(description) % 4), b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    points = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    if primaries == "GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {
            f"{letter}XYZ".encode(): xyz(*points["RGB".index(of)]) for letter, of in zip("rgb", primaries, strict=True)
        }
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", offset + len(body), len(value))
        body += value
    size, space = 128 + len(table) + len(body), b"GRAY" if primaries == "GRAY" else b"RGB "
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + number(0.9642) + number(1.0) + number(0.8249) + bytes(48)
    assert len(header) == 128
    return header + table + body


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profile_is_applied(mode):
    ramp = np.repeat(np.arange(0, 256, 5, dtype=np.uint8), 3).reshape(1, -1, 3)
    image = Image.fromarray(ramp).convert(mode)
    seen = open_image(encoded(image, icc_profile=rgb_profile(1.0)))
    expected = srgb_curve(ramp / 255) * 255
    assert np.abs(seen - expected).max() <= 2.0
    assert np.abs(seen.astype(int) - ramp).max() > 60


def test_profile_of_srgb_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(open_image(encoded(Image.fromarray(PHOTO), icc_profile=profile)), PHOTO)


@pytest.mark.parametrize("name", [b"sRGB IEC61966-2.1", b"sRGB", b""])
def test_a_profile_is_read_by_its_curves_and_not_its_name(name):
    ramp = np.repeat(np.arange(0, 256, 5, dtype=np.uint8), 3).reshape(1, -1, 3)
    seen = open_image(encoded(Image.fromarray(ramp), icc_profile=rgb_profile(1.0, name)))
    assert np.abs(seen - srgb_curve(ramp / 255) * 255).max() <= 2.0


def test_a_profile_is_read_by_its_primaries_and_not_its_name():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    seen = open_image(encoded(red, icc_profile=rgb_profile(2.2, b"sRGB", "GRB")))
    assert (seen == [0, 255, 0]).all()


def test_srgb_of_another_name_changes_nothing():
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = profile.index("sRGB".encode("utf-16-be"))
    profile[at : at + 8] = "wide".encode("utf-16-be")
    assert "sRGB" not in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(bytes(profile))))
    assert np.array_equal(open_image(encoded(Image.fromarray(PHOTO), icc_profile=bytes(profile))), PHOTO)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_the_profile_of_grey_is_applied_in_all_its_bits(mode):
    wide = mode == "I;16"
    values = np.arange(0, 65536 if wide else 256, 128 if wide else 1, dtype=np.uint16 if wide else np.uint8)
    grey = Image.fromarray(values[None])
    image = Image.merge("LA", (grey, Image.new("L", grey.size, 255))) if mode == "LA" else grey
    seen = open_image(encoded(image, icc_profile=rgb_profile(1.0, b"grey", "GRAY")))
    expected = srgb_curve(values / (65535 if wide else 255)) * 255
    assert np.abs(seen - expected[None, :, None]).max() <= 1.0


def test_transparent_grey_of_a_profile_lies_on_the_background():
    grey = Image.fromarray(np.array([[0, 60, 255]], np.uint8))
    image = Image.merge("LA", (grey, Image.fromarray(np.array([[0, 255, 0]], np.uint8))))
    seen = open_image(encoded(image, icc_profile=rgb_profile(1.0, b"grey", "GRAY")), "#0000ff")
    assert (seen[0, [0, 2]] == [0, 0, 255]).all() and abs(seen[0, 1, 0] - 133) <= 1


def test_threads_share_the_room_for_pixels():
    room, held, most = images.Room(100), [], []

    def work(pixels):
        with room.of(pixels), room.of(pixels):  # the second is of the same thread
            held.append(min(pixels, 100))
            most.append(sum(held))
            time.sleep(0.002)
            held.remove(min(pixels, 100))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [60, 30, 10, 500, 70, 1, 100, 40] * 3))
    assert max(most) <= 100 and room.free == 100


@pytest.mark.parametrize("profile", [b"nonsense", b"", rgb_profile(1.0)[:140], lab_profile()])
def test_unusable_profile_is_ignored(profile):
    assert np.array_equal(open_image(encoded(Image.fromarray(PHOTO), icc_profile=profile)), PHOTO)


def test_profile_of_another_mode_is_ignored():
    grey = Image.fromarray(PHOTO[..., 0])
    assert np.array_equal(open_image(encoded(grey, icc_profile=rgb_profile(1.0)))[..., 0], PHOTO[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 2
    assert np.array_equal(open_image(data), PHOTO)


def test_wrong_extension_of_an_allowed_format_opens(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(PHOTO)))
    assert np.array_equal(open_image(tmp_path / "a.jpg"), PHOTO)


GREY16 = np.array([[0, 128, 129, 32768, 65535]], np.uint16)
HALF = np.array([[[255, 0, 0, 255]] * 8 + [[255, 0, 0, 0]] * 8] * 4, np.uint8)  # red, and what is not seen
ON_BLUE = np.array([[[255, 0, 0]] * 8 + [[0, 0, 255]] * 8] * 4)
SEEN = {  # what is written, how, and what is seen of it on a blue background
    "BMP": (PHOTO, "BMP", {}, PHOTO),
    "BMP of 1 bit": (np.array([[True, False]]), "BMP", {}, [[[255] * 3, [0] * 3]]),
    "GIF": (PHOTO[..., 0], "GIF", {}, np.repeat(PHOTO[..., :1], 3, -1)),
    "GIF with a transparent level": (
        np.array([[7, 8]], np.uint8),
        "GIF",
        {"transparency": 8},
        [[[7] * 3, [0, 0, 255]]],
    ),
    "TIFF": (PHOTO, "TIFF", {}, PHOTO),
    "TIFF, deflated": (PHOTO, "TIFF", {"compression": "tiff_adobe_deflate"}, PHOTO),
    "TIFF of 16 bits": (GREY16, "TIFF", {}, [[[level] * 3 for level in (0, 0, 1, 128, 255)]]),
    "TIFF with alpha": (HALF, "TIFF", {}, ON_BLUE),
    "AVIF with alpha": (HALF, "AVIF", {"quality": 100}, ON_BLUE),
}


@pytest.mark.parametrize("case", SEEN)
def test_other_kinds_are_read(case):
    array, kind, options, expected = SEEN[case]
    data = encoded(Image.fromarray(array), kind, **options)
    seen = open_image(data, "#0000ff").astype(int)
    assert np.abs(seen - np.asarray(expected)).max() <= (2 if kind == "AVIF" else 0)
    assert size_of(data) == seen.shape[1::-1]


def tiff(width: int, data: bytes, bits: int = 8, white_is_zero: bool = False, **tags: int) -> bytes:
    """A grey TIFF of one row written by hand: 32-bit entries in the order of their tags (TIFF 6.0, section 2)."""
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero), 277: 1}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    at, count = (324, 325) if 322 in entries else (273, 279)
    entries |= {count: len(data), at: 8 + 2 + 12 * (len(entries) + 2) + 4}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4) + data


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_says_which_end_is_white(bits):
    data = bytes([0, 255]) if bits == 8 else struct.pack("<2H", 0, 65535)
    assert open_image(tiff(2, data, bits))[0, :, 0].tolist() == [0, 255]
    assert open_image(tiff(2, data, bits, white_is_zero=True))[0, :, 0].tolist() == [255, 0]


def test_a_tile_larger_than_its_image_is_refused_by_its_header():
    assert open_image(tiff(1, zlib.compress(bytes(256)), _259=8, _322=16, _323=16)).tolist() == [[[0, 0, 0]]]
    bomb = tiff(1, zlib.compress(bytes(10_000)), _259=8, _322=30_000, _323=30_000)
    with pytest.raises(DataError, match="30000x30000 is over 64 megapixels"):
        open_image(bomb)
    with pytest.raises(DataError, match="30000x30000"):
        size_of(bomb)


def test_inks_of_a_tiff_are_those_of_a_jpeg():
    inks = Image.fromarray(RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8), "CMYK")
    assert np.array_equal(open_image(encoded(inks, "TIFF")), np.asarray(inks.convert("RGB")))


def test_floats_have_no_range():
    with pytest.raises(DataError, match="floating-point values have no known range; save it with 8 or 16 bits"):
        open_image(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_heic_is_read_where_its_library_is(monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    grey = np.repeat(np.repeat(np.arange(0, 256, 16, np.uint8)[None, :, None], 8, 0), 3, -1)
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(Image.fromarray(grey), "HEIF", quality=-1, exif=turned.tobytes())
    seen = open_image(data)
    assert seen.shape == (16, 8, 3) and np.abs(seen.astype(int) - grey.transpose(1, 0, 2)[:, ::-1]).max() <= 3
    assert size_of(data) == (8, 16)
    monkeypatch.setattr(images, "_formats", lambda: images.FORMATS)
    with pytest.raises(DataError, match="HEIC is not read without pillow-heif; pip install pillow-heif"):
        open_image(data)


def test_a_large_photograph_is_decoded_at_half_its_sides(monkeypatch):
    """The means of four pixels, which libjpeg finds without decoding all; others of that size are refused."""
    smooth = np.asarray(Image.fromarray(PHOTO).resize((120, 80), Image.Resampling.BICUBIC))
    data = encoded(Image.fromarray(smooth), "JPEG", quality=100, subsampling=0)
    whole = open_image(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 120 * 80 - 1)
    half = open_image(data)
    means = whole.astype(float).reshape(40, 2, 60, 2, 3).mean((1, 3))
    assert half.shape == (40, 60, 3) and np.abs(half - means).max() < 6 and size_of(data) == (60, 40)
    with pytest.raises(DataError, match="120x80 is over"):
        open_image(encoded(Image.fromarray(smooth)))


@pytest.mark.parametrize(("side", "height"), [(12000, 9000), (9000, 12000)])
def test_108_megapixels_are_taken_by_their_header(side, height):
    data = encoded(Image.fromarray(PHOTO), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    large = data[:place] + struct.pack(">HH", height, side) + data[place + 4 :]
    assert size_of(large) == (side // 2, height // 2)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "JPEG2000", "TGA"])
def test_other_formats_are_refused(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(PHOTO), kind))
    with pytest.raises(DataError, match=rf"a\.png: not a {images.KINDS} image; replace or remove"):
        open_image(tmp_path / "a.png")


READ = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


@pytest.mark.parametrize("kind", READ)
def test_truncated_anywhere_is_refused(kind):
    image = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    data = encoded(image, kind)
    open_image(data)
    for length in range(0, len(data) - 24, 7):
        with pytest.raises(DataError) as caught:
            open_image(data[:length])
        assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_files_open_or_are_refused(data):
    kind = data.draw(st.sampled_from(READ))
    content = bytearray(encoded(Image.fromarray(PHOTO), kind))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(content))
    except DataError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3


@pytest.mark.parametrize("side", [8193, 11000, 65500, 2**31 - 1])
def test_bomb_is_refused_by_its_header(side):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="image: .*(megapixels|bomb|dimensions|exceeds)"):
        open_image(png(side, side, 8, 2, b""))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_webp_bomb_is_refused_by_its_header():
    size = (16383 - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([0, 0, 0, 0]) + size + size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError):
        open_image(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_text_bombs_are_refused():
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    many = [chunk(b"tEXt", b"a%d\0" % n + b"x" * 1_000_000) for n in range(70)]
    for chunks in ([bomb], many):
        with pytest.raises(DataError, match="too large|memory"):
            open_image(png(1, 1, 8, 0, b"\0\0", *chunks))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match=f"{path}: not a regular file"):
            open_image(path)
    with pytest.raises(DataError, match=r"absent\.png: No such file or directory; check the path"):
        open_image(tmp_path / "absent.png")


def test_messages_stay_on_one_line(tmp_path):
    path = tmp_path / "a\n\x1b[31m.png"
    path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        open_image(path)
    assert str(caught.value).isprintable()


def test_background_must_be_a_colour():
    with pytest.raises(UsageError, match='"#zzz" is no colour'):
        open_image(encoded(Image.fromarray(PHOTO)), "#zzz")


@given(image=IMAGES)
def test_pixels_round_trip(image):
    pixels = to_pixels(image)
    assert (pixels.dtype, pixels.shape) == (np.float32, (3, *image.shape[:2]))
    assert np.array_equal(to_uint8(pixels), image)


def test_pixel_values():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels = to_pixels(levels)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.allclose(pixels[0, 0].ravel(), np.arange(256) / 127.5 - 1, atol=1e-7)
    wide = np.array([-9, -1, -0.001, 0.001, 1, 9], dtype=np.float32).reshape(1, 1, 6).repeat(3, axis=0)
    assert to_uint8(wide)[0, :, 0].tolist() == [0, 0, 127, 128, 255, 255]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (31, 33), (500, 300), (32, 32)])
def test_fit_gives_the_size_asked_for(shape, crop):
    image = np.full((*shape, 3), 77, dtype=np.uint8)
    fitted = fit(image, 32, crop, "#4d4d4d")
    assert fitted.shape == (32, 32, 3)
    assert fitted.dtype == np.uint8
    assert np.all(fitted == 77)


@given(image=arrays.arrays(np.uint8, (8, 8, 3)))
def test_fit_leaves_the_exact_size_alone(image):
    for crop in CROPS:
        assert np.array_equal(fit(image, 8, crop), image)


def test_fit_keeps_the_middle_or_everything():
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = 255
    assert np.all(fit(wide, 32) == 255)
    padded = fit(wide, 48, "pad", "#0000ff")
    assert np.all(padded[:16] == [0, 0, 255])
    assert np.all(padded[32:] == [0, 0, 255])
    assert np.all(padded[16:32, 2:12] == 0)
    assert np.all(padded[16:32, 20:28] == 255)


def test_fit_averages_when_it_reduces():
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(stripes, 16).astype(int) - 127.5).max() < 4


def test_fit_refuses_another_crop():
    with pytest.raises(UsageError, match='crop is "left"; use one of center, pad'):
        fit(PHOTO, 4, "left")


def test_grid():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), dtype=np.uint8)
    sheet = grid(images)
    assert sheet.shape == (2 * 2 + 2, 3 * 3 + 2 * 2, 3)
    assert sheet[0, [0, 5, 10], 0].tolist() == [0, 1, 2]
    assert sheet[4, [0, 5, 10], 0].tolist() == [3, 4, 255]
    assert np.all(sheet[2:4] == 255)
    assert np.array_equal(grid(images[:2], columns=1, gap=0), np.concatenate([images[0], images[1]]))


SETTINGS = st.dictionaries(st.text(max_size=9), st.text(max_size=40) | st.integers() | st.floats(allow_nan=False))


@settings(deadline=None)
@given(image=IMAGES, written=SETTINGS)
def test_png_round_trip(tmp_path_factory, image, written):
    path = tmp_path_factory.getbasetemp() / "round.png"
    path.write_bytes(encode_png(image, written))
    assert np.array_equal(open_image(path), image)
    assert read_settings(path) == written


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def test_png_holds_the_settings_and_nothing_else():
    prompt = "</script>\n\x1b[31m \ud83d ü ../../x"
    data = encode_png(PHOTO, {"prompt": prompt})
    assert data == encode_png(PHOTO, {"prompt": prompt})
    chunks = chunks_of(data)
    assert [kind for kind, _ in chunks] == [b"IHDR", b"iTXt", b"IDAT", b"IEND"]
    text = chunks[1][1]
    assert text.startswith(b"tinydiff\0\0\0\0\0{")
    assert text[13:].decode().isascii()
    assert not set(b"<\n\x1b") & set(text[13:])
    assert json.loads(text[13:])["prompt"] == prompt
    assert [kind for kind, _ in chunks_of(encode_png(PHOTO, None))] == [b"IHDR", b"IDAT", b"IEND"]


def test_settings_are_capped(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(PHOTO, {"prompt": "x" * 1_000_000}))
    assert list(read_settings(tmp_path / "a.png")) == ["omitted"]
    assert (tmp_path / "a.png").stat().st_size < 1000


@pytest.mark.parametrize("text", ["[]", "{", "[" * 60_000, json.dumps({"a": "x" * 70_000})])
def test_read_settings_refuses_damaged_ones(tmp_path, text):
    (tmp_path / "a.png").write_bytes(png(1, 1, 8, 0, b"\0\0", chunk(b"iTXt", b"tinydiff\0\0\0\0\0" + text.encode())))
    with pytest.raises(DataError, match=r"a\.png: .*settings"):
        read_settings(tmp_path / "a.png")


def test_read_settings_refuses_files_without_any(tmp_path):
    (tmp_path / "plain.png").write_bytes(encode_png(PHOTO, None))
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.fromarray(PHOTO), "JPEG"))
    for name in ("plain.png", "photo.jpg"):
        with pytest.raises(DataError, match=f"{name}: holds no tinydiff settings"):
            read_settings(tmp_path / name)


def test_import_is_light():
    program = (
        "import sys, tinydiff.images; print({'torch', 'transformers', 'tokenizers', 'PIL.ImageCms'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
