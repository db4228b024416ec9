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

from vqgen.data.formats import formats_of

if TYPE_CHECKING:
    from vqgen.data.sources.base import Source
    from vqgen.settings import DataConfig

MAX_FILE_BYTES = 1 << 30
LARGE_BYTES, LARGE_PIXELS = 1 << 26, 1 << 24  # only one image above either limit is in memory at a time
STRIP_PIXELS = 1 << 20
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


def to_square(image: Image.Image, channels: int, data: DataConfig) -> np.ndarray:
    """An opened image as uint8 (C, H, W), H = W = data.image_size."""
    mode = "L" if channels == 1 else "RGB"
    pixels = np.asarray(_resize(_as(mode, _flatten(image, data.background)), data))
    return np.ascontiguousarray(rearrange(pixels, "h w -> 1 h w" if channels == 1 else "h w c -> c h w"))


def is_coloured(image: Image.Image, background: str) -> bool:
    """Whether an opened image has any pixel that is not grey."""
    image = _flatten(image, background)
    pixels = (np.asarray(strip) for _, strip in _strips(image))
    return image.mode != "L" and any((part[..., :1] != part).any() for part in pixels)


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Converts any image to its intended look: upright, opaque, 8 bits; mode L or RGB."""
    image.load()
    with contextlib.suppress(DECODE_ERRORS):  # damaged EXIF data do not spoil the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = _opaque(image, background)
    return _as("L" if image.mode in ("1", "L") else "RGB", image)


def _as(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert() always copies


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields an image in strips, each with the y of its top, so that computing on a strip takes little memory."""
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """An image on a colour, in mode RGB."""
    opaque = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        canvas = Image.new("RGBA", strip.size, ImageColor.getrgb(background)[:3])
        opaque.paste(Image.alpha_composite(canvas, strip.convert("RGBA")).convert("RGB"), (0, top))
    return opaque


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Converts grey values of 16 bits, 32 bits or floats to an image of mode L.

    No file says which float or which 32-bit integer is white. White is the smallest usual value that no pixel exceeds,
    so that all images of a set have the same scale. If a pixel exceeds all usual values, the brightest pixel is white.
    """
    brightest = max(_finite(strip).max() for _, strip in _strips(image))
    whites = (1, 255, 65535) if image.mode[0] == "F" else (65535,)
    white = next((white for white in whites if brightest <= white), brightest)
    grey = Image.new("L", image.size)
    for top, strip in _strips(image):
        pixels = np.rint(np.clip(_finite(strip) / white, 0, 1) * 255).astype(np.uint8)
        grey.paste(Image.fromarray(pixels), (0, top))
    return grey


def _finite(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image), posinf=0, neginf=0)


def _resize(image: Image.Image, data: DataConfig) -> Image.Image:
    """Resizes an L or RGB image to a square of `data.image_size` pixels."""
    size = (data.image_size, data.image_size)
    if data.resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    image.thumbnail(size, Image.Resampling.BICUBIC, reducing_gap=None)  # does not enlarge a smaller image
    canvas = Image.new(image.mode, size, ImageColor.getcolor(data.background, image.mode))
    canvas.paste(image, ((data.image_size - image.width) // 2, (data.image_size - image.height) // 2))
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
