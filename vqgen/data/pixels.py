"""Turns any image file into a square of uint8 pixels: opens, decodes, flattens to 8 bits, resizes."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange
from PIL import Image, ImageColor, ImageOps

from vqgen.data.colour import to_srgb
from vqgen.data.deep import deep_of, find_levels, strip_boxes
from vqgen.data.formats import formats_of

if TYPE_CHECKING:
    from vqgen.data.sources.base import Source
    from vqgen.settings import DataConfig

MAX_FILE_BYTES = 1 << 30
LARGE_BYTES, LARGE_PIXELS = 1 << 26, 1 << 24  # only one image above either limit is in memory at a time
SPARE = 2  # a JPEG is decoded at a size that is still at least this many times as large as needed
ORIENTATION = 0x0112  # in EXIF data
ORIENTATION_KEYS = ("exif", "Raw profile type exif", "Raw profile type APP1", "XML:com.adobe.xmp", "xmp")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
DECODE_ERRORS = Exception  # damaged images can make Pillow raise any exception

_one_large = threading.RLock()  # held while a large image is in memory


@contextlib.contextmanager
def opened(source: Source, row: int) -> Iterator[Image.Image]:
    """Opens an image of a source; decode it inside the context. Only one large image is open at a time.

    Raises:
        Exception: the image does not open; see `DECODE_ERRORS`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_pillow)
        if source.num_bytes(row) > LARGE_BYTES:
            stack.enter_context(_one_large)
        image = source.open(row)
        if image.width * image.height > LARGE_PIXELS:
            stack.enter_context(_one_large)
        yield image


def open_image(content: bytes, name: str = "") -> Image.Image:
    """The image in a file's bytes, not decoded yet; of a file named *.tga, its name is needed."""
    # Without `formats`, Pillow tries all its formats, which takes 1.5 times as long; one of them runs Ghostscript.
    image = Image.open(io.BytesIO(content), formats=formats_of(content, name))
    # Some decoders need whole rows, and Pillow copies a row's earlier blocks whenever it adds a block. A row of 10
    # million pixels would take minutes.
    image.decodermaxblock = max(image.decodermaxblock, 8 * image.width)
    return image


def checked_size(num_bytes: int) -> int:
    """A file's size.

    Raises:
        OSError: the file is too large for an image.
    """
    if num_bytes > MAX_FILE_BYTES:
        raise OSError(f"{num_bytes / 2**30:,.1f} GiB, too large for an image")
    return num_bytes


def to_square(image: Image.Image, channels: int | None, data: DataConfig) -> np.ndarray:
    """An opened image as uint8 (C, H, W); H and W are `data.size`.

    Args:
        image: the image, decoded or not. One of more than 8 bits has the white level that suits it alone; give
            `Deep.to_8_bits` if that of a set is known.
        channels: C, 1 or 3; None takes 1 if all pixels are grey, and 3 otherwise.
        data: the settings.
    """
    size = data.size
    if (deep := deep_of(image)) is not None:
        image = deep.to_8_bits(find_levels(deep.kind, [deep.extremes()], data.white))
    _decode_smaller(image, data)
    image.load()
    profile, orientation = image.info.get("icc_profile"), orientation_of(image)
    if image.has_transparency_data:
        image, profile = _opaque(to_srgb(image, profile), data.background), None
    if profile is None or image.mode != "CMYK":
        image = to_srgb(image, None)
    if profile is None and channels is not None:
        image = _as("L" if channels == 1 else "RGB", image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    image = _scaled(image, size, data.resize)
    if profile is not None:
        image = to_srgb(image, profile)  # of a small image, it takes almost no time
    if channels is None:
        channels = 3 if _is_coloured(image) else 1
    image = _centred(_as("L" if channels == 1 else "RGB", image), size, data.background)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(rearrange(pixels, "h w c -> c h w"))


def _decode_smaller(image: Image.Image, data: DataConfig) -> None:
    """Makes a JPEG that is not decoded yet come out at 1/2, 1/4 or 1/8 of its size if it is much larger than needed."""
    if image.format not in ("JPEG", "MPO"):
        return
    height, width = data.size if orientation_of(image) < 5 else data.size[::-1]
    shares = width / image.width, height / image.height
    most = 1 / (SPARE * (max(shares) if data.resize == "crop" else min(shares)))
    if factor := next((factor for factor in (8, 4, 2) if factor <= most), None):
        image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))


def orientation_of(image: Image.Image) -> int:
    """The orientation in an image's EXIF data, from 1 (upright) to 8."""
    if image._exif is None and not any(key in image.info for key in ORIENTATION_KEYS) and image.format != "TIFF":
        return 1
    with contextlib.suppress(DECODE_ERRORS):  # damaged EXIF data do not spoil the pixels
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _is_coloured(image: Image.Image) -> bool:
    """Whether any pixel of an image of mode L or RGB is not grey."""
    if image.mode == "L":
        return False
    red, green, blue = (band.tobytes() for band in image.split())
    return not red == green == blue


def _as(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert() always copies


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """An image of mode LA or RGBA on a colour, in mode RGB."""
    colour = ImageColor.getrgb(background)[:3]
    opaque = Image.new("RGB", image.size)
    for box in strip_boxes(image):
        strip = image.crop(box).convert("RGBA")
        canvas = Image.new("RGBA", strip.size, colour)
        opaque.paste(Image.alpha_composite(canvas, strip).convert("RGB"), box)
    return opaque


def _scaled(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """An image cropped to a height and a width, or shrunk to fit into them; whole pixels stay as they are."""
    height, width = size
    if resize == "pad":
        image.thumbnail((width, height), Image.Resampling.BICUBIC, reducing_gap=None)  # enlarges nothing
        return image
    if max(width / image.width, height / image.height) != 1:
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _centred(image: Image.Image, size: tuple[int, int], background: str) -> Image.Image:
    """An L or RGB image in the middle of a canvas of a height and a width."""
    height, width = size
    if image.size == (width, height):
        return image
    canvas = Image.new(image.mode, (width, height), ImageColor.getcolor(background, image.mode))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


class _QuietPillow(contextlib.AbstractContextManager[None]):
    """Drops Pillow's warnings and log lines while any thread is inside; files that Pillow cannot read raise an error.

    The host program's own filters and loggers do not change. warnings.catch_warnings() is no alternative: it restores
    all filters at its end, while other threads may still be decoding, and makes Python show old warnings again.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filter = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
        self._logger, self._handler, self._propagate = logging.getLogger("PIL"), logging.NullHandler(), True

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                warnings.filters.insert(0, self._filter)  # type: ignore[attr-defined]  # it is a list
                # Setting the level instead would take longer than decoding a small image.
                self._propagate, self._logger.propagate = self._logger.propagate, False
                self._logger.addHandler(self._handler)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                with contextlib.suppress(ValueError):  # the host has replaced all filters in the meantime
                    warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
                self._logger.removeHandler(self._handler)
                self._logger.propagate = self._propagate


_quiet_pillow = _QuietPillow()
