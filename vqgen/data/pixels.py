"""Turns any image file into uint8 pixels of a given size: opens, decodes, flattens to 8 bits, resizes."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from vqgen.data.colour import to_srgb
from vqgen.data.deep import Kind, Levels, deep_of, find_levels
from vqgen.data.formats import formats_of
from vqgen.data.tiff import TiffImage, is_unusual_tiff
from vqgen.errors import InputError

if TYPE_CHECKING:
    from vqgen.data.sources.base import Source
    from vqgen.settings import DataConfig

MAX_FILE_BYTES = 1 << 30
LARGE_BYTES, LARGE_PIXELS = 1 << 26, 1 << 24  # only one image above either limit is in memory at a time
# A JPEG at least this many times as large as needed is decoded at 1/2, 1/4 or 1/8 of its size. With less to spare, the
# pixels of photos with much texture would differ by more than 1 on average.
SPARE = {8: 20, 4: 10, 2: 4}
ORIENTATION = 0x0112  # in EXIF data
ORIENTATION_KEYS = ("exif", "Raw profile type exif", "Raw profile type APP1", "XML:com.adobe.xmp", "xmp")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
DECODE_ERRORS = Exception  # damaged images can make Pillow raise any exception

_one_large = threading.RLock()  # held while a large image is in memory
_any_number = contextlib.nullcontext()


@contextlib.contextmanager
def opened(source: Source, row: int) -> Iterator[Image.Image]:
    """Opens an image of a source; decode it inside the context. Only one large image is open at a time.

    Raises:
        Exception: the image does not open; see `DECODE_ERRORS`.
    """
    with quiet_pillow, _alone(source.num_bytes(row) > LARGE_BYTES):
        image = source.open(row)
        with _alone(image.width * image.height > LARGE_PIXELS):
            yield image


def _alone(large: bool) -> contextlib.AbstractContextManager[object]:
    return _one_large if large else _any_number


def open_image(content: bytes, name: str = "") -> Image.Image:
    """The image in a file's bytes, not decoded yet; of a file named *.tga, its name is needed.

    Raises:
        Exception: the image does not open; see `DECODE_ERRORS`.
    """
    # Without `formats`, Pillow tries all its formats, which takes 1.5 times as long; one of them runs Ghostscript.
    try:
        image = Image.open(io.BytesIO(content), formats=formats_of(content, name))
    except UnidentifiedImageError:
        if not is_unusual_tiff(content):
            raise
        return TiffImage(content)
    # Some decoders need whole rows, and Pillow copies a row's earlier blocks whenever it adds a block. A row of 10
    # million pixels would take minutes.
    image.decodermaxblock = max(image.decodermaxblock, 8 * image.width)
    return image


def read_picture(path: str | Path, what: str) -> Image.Image:
    """The decoded image in a file; `what` names the setting that gave it.

    Raises:
        InputError: there is no such file, or no image in it.
    """
    try:
        image = open_image(Path(path).read_bytes(), str(path))
        image.load()
    except UnidentifiedImageError as error:
        raise InputError(f"{what}={path}: is no image that Pillow knows; give an image file") from error
    except DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or f"does not decode ({error})"
        raise InputError(f"{what}={path}: {reason}; give an image file") from error
    return image


def checked_size(num_bytes: int) -> int:
    """A file's size.

    Raises:
        OSError: the file is too large for an image.
    """
    if num_bytes > MAX_FILE_BYTES:
        raise OSError(f"{num_bytes / 2**30:,.1f} GiB, too large for an image")
    return num_bytes


def to_pixels(image: Image.Image, channels: int | None, data: DataConfig) -> np.ndarray:
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
    drafted = _decode_smaller(image, data)
    image.load()
    extent = drafted or image.size
    profile, orientation = image.info.get("icc_profile"), orientation_of(image)
    if image.has_transparency_data:
        image, profile = _opaque(to_srgb(image, profile), data.background), None
    if profile is None or image.mode != "CMYK":
        image = to_srgb(image, None)
    if profile is None and channels is not None:
        image = _as("L" if channels == 1 else "RGB", image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
        extent = extent[::-1] if orientation >= 5 else extent
    image = _scaled(image, extent, size, data.resize)
    if profile is not None:
        image = to_srgb(image, profile)  # of a small image, it takes almost no time
    if channels is None:
        channels = 3 if _is_coloured(image) else 1
    return _planes(_centred(_as("L" if channels == 1 else "RGB", image), size, data.background))


def crop_of(data: DataConfig, channels: int, levels: Mapping[Kind, Levels]) -> dict[str, Any]:
    """The settings that say how images came to one size; the black and the white level only if they matter."""
    crop = {"image_size": data.image_size, "channels": channels, "resize": data.resize, "background": data.background}
    return crop | {f"{kind}_levels": f"{each.black:g} {each.white:g}" for kind, each in sorted(levels.items())}


def _planes(image: Image.Image) -> np.ndarray:
    """An L or RGB image as uint8 (C, H, W)."""
    if image.mode == "L":
        return np.array(image)[None]  # np.asarray would not be writable
    # Each row as one line of red, one of green and one of blue: moving whole lines takes much less time than pixels.
    lines = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8)
    return np.ascontiguousarray(lines.reshape(image.height, 3, image.width).transpose(1, 0, 2))


def _decode_smaller(image: Image.Image, data: DataConfig) -> tuple[float, float] | None:
    """Makes a JPEG that is not decoded yet come out at 1/2, 1/4 or 1/8 of its size if it is much larger than needed.

    Returns:
        Then the width and height of what the image shows, in pixels, with a part of a pixel if the size is not
        divisible; otherwise None.
    """
    if image.format in ("JPEG", "MPO"):
        across, down = image.size
        orientation = orientation_of(image)
        height, width = data.size if orientation < 5 else data.size[::-1]
        share = (max if data.resize == "crop" else min)(width / across, height / down)
        for factor, times in SPARE.items():
            whole = across % factor == down % factor == 0
            # The last pixels would be parts of pixels, and be the first ones after a turn.
            if share * times <= 1 and (whole or orientation == 1):
                drafted = image.draft(None, (across // factor, down // factor))
                return drafted[1][2:] if drafted else None
    return None


def orientation_of(image: Image.Image) -> int:
    """The orientation in an image's EXIF data, from 1 (upright) to 8."""
    if image._exif is None and not any(key in image.info for key in ORIENTATION_KEYS) and image.format != "TIFF":
        return 1
    with contextlib.suppress(DECODE_ERRORS):  # damaged EXIF data do not spoil the pixels
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image as it will be seen."""
    return (image.height, image.width) if orientation_of(image) >= 5 else image.size


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
    image = _as("RGBA", image)
    opaque = Image.new("RGB", image.size, ImageColor.getrgb(background)[:3])
    opaque.paste(image, mask=image)
    return opaque


def _scaled(image: Image.Image, extent: tuple[float, float], size: tuple[int, int], resize: str) -> Image.Image:
    """An image cropped to a height and a width, or shrunk to fit into them; pixels of the right size do not change.

    Args:
        image: the image.
        extent: width and height of what it shows, in its pixels.
        size: height and width.
        resize: `crop` or `pad`.
    """
    (height, width), (across, down) = size, extent
    if resize == "crop":
        if max(width / across, height / down) == 1:  # whole pixels stay whole
            left, top = (image.width - width) // 2, (image.height - height) // 2
            return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))
        kept = min(across, width / height * down), min(down, across / (width / height))
        x, y = (across - kept[0]) / 2, (down - kept[1]) / 2
        return image.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + kept[0], y + kept[1]))
    if width >= across and height >= down:  # pad enlarges nothing
        return image
    aspect = across / down  # rounded as Image.thumbnail does, to the size whose aspect is nearest
    if width / height >= aspect:
        width = _rounded(height * aspect, lambda n: abs(aspect - n / height))
    else:
        height = _rounded(width / aspect, lambda n: abs(aspect - width / n) if n else 0)
    return image.resize((width, height), Image.Resampling.BICUBIC, (0, 0, across, down))


def _rounded(number: float, error: Callable[[int], float]) -> int:
    """A number rounded up or down, whichever has the smaller error; at least 1."""
    return max(1, min(math.floor(number), math.ceil(number), key=error))


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
        self._loggers, self._handler = [logging.getLogger("PIL"), logging.getLogger("tifffile")], logging.NullHandler()
        self._propagate = [True, True]

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                warnings.filters.insert(0, self._filter)  # type: ignore[attr-defined]  # it is a list
                # Setting the level instead would take longer than decoding a small image.
                self._propagate = [logger.propagate for logger in self._loggers]
                for logger in self._loggers:
                    logger.propagate = False
                    logger.addHandler(self._handler)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                with contextlib.suppress(ValueError):  # the host has replaced all filters in the meantime
                    warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
                for logger, propagate in zip(self._loggers, self._propagate, strict=True):
                    logger.removeHandler(self._handler)
                    logger.propagate = propagate


quiet_pillow = _QuietPillow()
