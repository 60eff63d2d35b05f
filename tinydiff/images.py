"""Image files to arrays and back: safe decoding, uint8 <-> [-1, 1], resizing, grids, PNG with settings.

An image is a uint8 array (H, W, 3) in sRGB. Only this module handles what files may hold: palettes, alpha, 16 bits,
CMYK, colour profiles, EXIF orientation, many frames, more pixels than fit. It knows no model, no latents and no torch.
"""

from __future__ import annotations

import json
import math
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor
from PIL.PngImagePlugin import PngInfo

from tinydiff.errors import DataError, UsageError
from tinydiff.system import shown, unreadable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # as Pillow calls them; besides, HEIF by pillow-heif
PLUGINS = {"WEBP": "WebP"}  # modules of Pillow that are not the format in title case
KINDS = "PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF or HEIC"
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")  # brands of ISO/IEC 23008-12
MAX_PIXELS = 64 * 2**20
MAX_BYTES = 256 * 2**20
MAX_SETTINGS = 64 * 2**10
BAND = 2**20  # pixels that are converted at a time
ALIKE = 2  # levels of 255 by which a profile may differ from sRGB and be taken for it
SETTINGS = "tinydiff"
CROPS = ("center", "pad")
WHITE = "#ffffff"
ORIENTATION = 0x0112
PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH = 0x0106, 0x0142, 0x0143  # tags of TIFF 6.0
WHITE_IS_ZERO = 0
# The operations that undo EXIF orientations 2 to 8 (EXIF 2.32, section 4.6.4)
UNDO = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
TRANSPOSES = {orientation: Image.Transpose[name] for orientation, name in enumerate(UNDO, 2)}


class Room:
    """What threads share of the memory for decoded images: so many pixels at a time, however many threads there are."""

    def __init__(self, pixels: int):
        self.pixels = self.free = pixels
        self.changed, self.mine = threading.Condition(), threading.local()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image. Who has room already is given more at once, lest it wait for itself."""
        held = getattr(self.mine, "held", False)
        share = 0 if held else min(pixels, self.pixels)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= share)
            self.free -= share
        self.mine.held = True
        try:
            yield
        finally:
            self.mine.held = held
            with self.changed:
                self.free += share
                self.changed.notify_all()


ROOM = Room(MAX_PIXELS)  # the largest image alone, which takes half a gigabyte while it is decoded and resized


def open_image(source: Path | bytes, background: str = WHITE) -> np.ndarray:
    """Decode the first frame of a file of one of KINDS, or its bytes: uint8 (H, W, 3), upright, in sRGB.

    Transparency is composited on `background`. A JPEG over 64 megapixels is decoded at half its sides. Raises
    DataError with the file and the reason (not a regular file, another format, truncated, over 64 megapixels), and UsageError
    if `background` is not a colour. Threads that decode at the same time share `ROOM`.
    """
    colour = _colour(background)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is checked here, or raises as well
        try:
            image = _open(source)
            with ROOM.of(_reduced(image, source)):
                return _array(_upright(image), colour)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # Pillow's plugins raise many kinds
            if isinstance(error, OSError) and error.errno:
                raise unreadable(error, _name(source), DataError) from error
            raise DataError(f"{_name(source)}: {_reason(error)}; replace or remove the file") from error


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of what `open_image` gives, from the header, or by decoding where that fails. Raises DataError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            _reduced(image, data)
            (width, height), sources = image.size, {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
            has_exif = image.format != "PNG" or sources & image.info.keys()  # else Pillow would decode it to search it
            turned = has_exif and image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)  # Pillow gives a TIFF's size upright
        except MemoryError:
            raise
        except Exception:  # Pillow's plugins raise many kinds; open_image names the problem
            height, width = open_image(data).shape[:2]
            return width, height


def to_pixels(image: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(np.moveaxis(image, -1, -3), dtype=np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Float (..., 3, H, W) to uint8 (..., H, W, 3), clipped to [-1, 1] and rounded: the inverse of `to_pixels`."""
    levels = np.clip(np.asarray(pixels, dtype=np.float32) / 2 + np.float32(0.5), 0, 1) * 255
    return np.ascontiguousarray(np.moveaxis(np.rint(levels).astype(np.uint8), -3, -1))


def fit(image: np.ndarray, size: int | tuple[int, int], crop: str = "center", background: str = WHITE) -> np.ndarray:
    """Resize uint8 (H, W, 3) to `size`, (width, height) or a square's side, keeping the aspect ratio.

    "center" crops the longer side, "pad" fills the shorter one with `background`. The filter is Lanczos, antialiased.
    An image of exactly `size` is returned unchanged. Raises UsageError for another `crop`.
    """
    if crop not in CROPS:
        raise UsageError(f'crop is "{crop}"; use one of {", ".join(CROPS)}')
    wide, high = size if isinstance(size, tuple) else (size, size)
    height, width = image.shape[:2]
    if (height, width) == (high, wide):
        return image
    if crop == "center":
        scale = min(width / wide, height / high)
        left, top = (width - wide * scale) / 2, (height - high * scale) / 2
        return _resize(image, (wide, high), (left, top, left + wide * scale, top + high * scale))
    scale = min(wide / width, high / height)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = np.full((high, wide, 3), _colour(background), dtype=np.uint8)
    left, top = (wide - new_width) // 2, (high - new_height) // 2
    resized = _resize(image, (new_width, new_height), (0, 0, width, height))
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """uint8 (N, H, W, 3) to one image, row by row, with white gaps of `gap` pixels; about square without `columns`."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def encode_png(image: np.ndarray, settings: dict[str, Any] | None) -> bytes:
    """uint8 (H, W, 3) as PNG; `settings` as JSON of at most 64 KiB in iTXt, no other metadata: equal input, equal bytes."""
    chunks = PngInfo()
    if settings is not None:
        text = json.dumps(settings).replace("<", "\\u003c")  # safe to show in a terminal or a web page
        if len(text) > MAX_SETTINGS:
            text = json.dumps({"omitted": f"settings of {len(text)} bytes are over {MAX_SETTINGS}"})
        chunks.add_itxt(SETTINGS, text)
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def encode_moving(frames: np.ndarray, suffix: str, milliseconds: int = 80) -> bytes:
    """uint8 (N, H, W, 3) as a looping animation: ".webp" (lossless), ".gif" or ".apng"."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    kind = {".webp": "WEBP", ".gif": "GIF", ".apng": "PNG"}[suffix]
    file = BytesIO()
    first.save(file, kind, save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=True)
    return file.getvalue()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `encode_png` wrote. Raises DataError if the file has none."""
    try:
        with warnings.catch_warnings(), _open(path) as image:
            warnings.simplefilter("ignore")
            text = image.info[SETTINGS]
        settings = json.loads(text) if len(text) <= MAX_SETTINGS else None
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{_name(path)}: holds no tinydiff settings; give a PNG that tinydiff generated") from error
    if not isinstance(settings, dict):
        raise DataError(f"{_name(path)}: its tinydiff settings are damaged; give a PNG that tinydiff generated")
    return settings


def _open(source: Path | bytes) -> Image.Image:
    """The image, its pixels not yet decoded."""
    data = source if isinstance(source, bytes) else read_image(source)
    try:
        return Image.open(BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in HEIC and "HEIF" not in _formats():
            raise DataError(f"{_name(source)}: HEIC is not read without pillow-heif; pip install pillow-heif") from None
        raise


@lru_cache
def _formats() -> tuple[str, ...]:
    """FORMATS and what else is installed, whose plugins are loaded, and no others of Pillow's."""
    for name in FORMATS:
        import_module(f"PIL.{PLUGINS.get(name, name.title())}ImagePlugin")
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return FORMATS
    return (*FORMATS, "HEIF")


def _reduced(image: Image.Image, source: Path | bytes) -> int:
    """Have a JPEG over MAX_PIXELS decoded at half its sides; DataError for others. Returns the pixels to make room for.

    Of a TIFF in tiles libtiff decodes each whole, however small the image is.
    """
    tags, size = getattr(image, "tag_v2", {}), image.size
    width, height = max(size, (tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)), key=math.prod)
    if width * height > MAX_PIXELS:
        image.draft(image.mode, (width // 2, height // 2))
        if image.size == size or math.prod(image.size) > MAX_PIXELS:
            raise DataError(f"{_name(source)}: {width}x{height} is over {MAX_PIXELS >> 20} megapixels; make it smaller")
    return width * height


def read_image(path: Path) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES; a FIFO or device is never opened."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{_name(path)}: not a regular file; give a {KINDS} file")
    if status.st_size > MAX_BYTES:
        raise DataError(f"{_name(path)}: {status.st_size} bytes are over {MAX_BYTES >> 20} MiB; make it smaller")
    return path.read_bytes()


def _upright(image: Image.Image) -> Image.Image:
    """`image` with its EXIF orientation applied, if that can be read; a TIFF is upright once it is loaded."""
    image.load()
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        return Image.fromarray(65535 - np.asarray(image))  # which Pillow does with 8 bits alone
    try:
        operation = TRANSPOSES.get(image.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        operation = None
    return image if operation is None else image.transpose(operation)


def _array(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 (H, W, 3) in sRGB, on a colour; band by band, since what Pillow converts takes many bytes a pixel."""
    (width, height), rows = image.size, max(1, BAND // image.width)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        band = _to_srgb(image.crop((0, top, width, min(height, top + rows))))
        if band.mode == "RGBA":
            band = Image.alpha_composite(Image.new("RGBA", band.size, (*colour, 255)), band).convert("RGB")
        pixels[top : top + rows] = np.asarray(band)
    return pixels


def _to_srgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, or RGBA if there is transparency, with its colour profile applied if possible."""
    profile = image.info.get("icc_profile") or b""
    if image.mode == "F":
        raise ValueError("its floating-point values have no known range; save it with 8 or 16 bits")
    if image.mode in ("L", "LA") or image.mode.startswith("I"):
        return _from_grey(image, profile)
    if image.mode in ("P", "1") or image.has_transparency_data:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = _apply_profile(image, profile)
    return image if image.mode in ("RGB", "RGBA") else image.convert("RGB")


def _from_grey(image: Image.Image, profile: bytes) -> Image.Image:
    """Grey of 8 or 16 bits by a table of all its levels (Pillow's own conversion of 16 bits clips)."""
    alpha = image.getchannel("A") if image.mode == "LA" else None
    values = np.asarray(image.getchannel("L") if alpha else image)
    count, mode, kind = (2**8, "L", np.uint8) if values.dtype == np.uint8 else (2**16, "I;16", np.uint16)
    levels = np.arange(count)
    table = (levels * 255 + (count - 1) // 2) // (count - 1)
    if transform := _to_srgb_from(profile, mode):
        ramp = transform.apply(Image.fromarray(levels.astype(kind)[None]))
        table = np.asarray(ramp)[0, :, 0]
    grey = Image.fromarray(table.astype(np.uint8)[np.clip(values, 0, count - 1)])
    if "transparency" in image.info:  # a level of grey
        alpha = Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * np.uint8(255))
    return Image.merge("RGBA", (grey, grey, grey, alpha)) if alpha else grey.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an ICC profile to sRGB; a profile that is damaged or does not match the mode is ignored."""
    if not (transform := _to_srgb_from(profile, "RGB" if image.mode == "RGBA" else image.mode)):
        return image
    converted = transform.apply(image.convert("RGB") if image.mode == "RGBA" else image)
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


@lru_cache(8)
def _to_srgb_from(profile: bytes, mode: str) -> Any:
    """The ImageCms transform of a profile's curves and matrix to sRGB; None if it changes nothing or cannot be used."""
    if not profile:
        return None
    from PIL import ImageCms

    flags = (
        ImageCms.Flags.NONE if mode in ("RGB", "CMYK") else ImageCms.Flags.NOOPTIMIZE
    )  # else shadows of grey are off
    try:
        source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    cube = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(18, -1, 3)
    same = mode == "RGB" and np.ptp([cube, np.asarray(transform.apply(Image.fromarray(cube)))], axis=0).max() <= ALIKE
    return None if same else transform


def _resize(image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """`box` (left, top, right, bottom) of the image, resampled to `size` (width, height)."""
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS, box))


def _colour(text: str) -> tuple[int, int, int]:
    """ "#rrggbb" or a CSS colour name to (R, G, B). Raises UsageError."""
    try:
        return ImageColor.getcolor(text, "RGB")[:3]  # type: ignore[return-value,index]
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f'"{text}" is no colour; write it as "#ffffff"') from error


def _name(source: Path | bytes) -> str:
    """`source` for a message."""
    return "image" if isinstance(source, bytes) else shown(source)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a {KINDS} image"
    return " ".join(str(error).split())[:200] or type(error).__name__
