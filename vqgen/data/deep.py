"""Images of more than 8 bits: their values, and the black and the white level that a whole set of them has.

No file of 16 bits, of 32 bits or of floats says which value is white: cameras write 12 bits into 16, and a float
picture may end at 1, at 255 or at 65535. So the level is decided once for a set, in this way:

1. Each image has a lowest and a highest value. One pixel in 10,000, at least one, is left out if it lies far from the
   others (more than 1.5 times as high), as a hot pixel of a camera does. NaN, infinities and values beyond 1e30, which
   mark places without data, count as 0.
2. White is the smallest usual value that no image exceeds: 255, 1023, 4095, 16383 or 65535, and for floats also 1.
   Floats may exceed it by a tenth, because resizing overshoots; what is above white becomes white.
3. If the set is more than 8 times darker than that, or brighter than all usual values, its highest value is white.
4. Black is 0, and lower values become black: a float may undershoot by a tenth of white. If an image has values
   below that, the set is a signed one. Floats that lie between -1 and 1 keep that range. Otherwise black is the lowest
   value of the set and white the highest: CT scans from -1024 to 3071 keep all their tissues.

Integers and floats in one set have levels of their own. `data.white` replaces the white level.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

STRIP_PIXELS = 1 << 20
USUAL_WHITES = (255, 1023, 4095, 16383, 65535)
OVERSHOOT = 0.1  # of floats, as a share of white
FAR = 1.5
DARK = 8
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags

Kind = Literal["integer", "float"]
Box = tuple[int, int, int, int]  # left, top, right, bottom
Strip = tuple[np.ndarray, np.ndarray | None]  # values (H, W) or (H, W, 3), and opacity (H, W) from 0 to 1


@dataclass(frozen=True)
class Levels:
    """The values that become 0 and 255, and in words why these do."""

    black: float
    white: float
    reason: str = ""

    def note(self, kind: Kind) -> str:
        """The levels and why, in one line."""
        black = f"black is {self.black:g} and white" if self.black else "white is"
        of = "floats" if kind == "float" else "more than 8 bits"
        return f"{black} {self.white:g} in images of {of}, {self.reason}"


class Deep:
    """The values of one image of more than 8 bits.

    Args:
        image: the image, which need not be decoded yet.
        kind: `integer` or `float`.
        read: gives the values in a box (left, top, right, bottom) and how opaque they are.
        white: the white level if the file's format says it, as PGM and JPEG 2000 do.
        negative: whether the smallest value is white, as in some TIFF files.
    """

    def __init__(
        self,
        image: Image.Image,
        kind: Kind,
        read: Callable[[Box], Strip],
        white: float | None = None,
        negative: bool = False,
    ):
        self.image, self.kind, self.white = image, kind, white
        self._read, self._negative = read, negative

    def extremes(self) -> tuple[float, float]:
        """The lowest and the highest value, without pixels that lie far from all others."""
        parts = [_extremes(_finite(values)) for _, (values, _) in self._strips()]
        low, lowest, high, highest = (np.array(part) for part in zip(*parts, strict=True))
        white = highest.max() if highest.max() <= FAR * max(high.max(), 0) else high.max()
        black = lowest.min() if lowest.min() >= FAR * min(low.min(), 0) else low.min()
        return float(black), float(white)

    def to_8_bits(self, levels: Levels | None) -> Image.Image:
        """The image in mode L, LA, RGB or RGBA; levels may be None if the file's format says what is white."""
        if self.white is not None:
            levels = Levels(0, self.white)
        assert levels is not None
        whole: Image.Image | None = None
        for top, (values, opacity) in self._strips():
            share = (_finite(values) - levels.black) / (levels.white - levels.black)
            pixels = _to_bytes(1 - share if self._negative else share)
            strip = Image.fromarray(pixels)
            if opacity is not None:
                strip.putalpha(Image.fromarray(_to_bytes(opacity)))
            whole = whole or Image.new(strip.mode, self.image.size)
            whole.paste(strip, (0, top))
        assert whole is not None, "an image has at least one row"
        whole.info = {key: value for key, value in self.image.info.items() if key != "transparency"}
        return whole

    def _strips(self) -> Iterator[tuple[int, Strip]]:
        self.image.load()
        for box in strip_boxes(self.image):
            yield box[1], self._read(box)


class ValuesImage(Image.Image):
    """An image of values that no mode of Pillow's holds, such as floats in colour; `deep_of` reads them.

    Args:
        size: width and height.
        channels: 1 (grey), 2 (grey and opacity), 3 (RGB) or 4 (RGB and opacity).
        negative: whether the smallest value is white.
    """

    def __init__(self, size: tuple[int, int], channels: int, negative: bool = False):
        super().__init__()
        self._size, self._mode = size, ("L", "LA", "RGB", "RGBA")[channels - 1]
        self.negative = negative
        self._values: np.ndarray | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> ValuesImage:
        """An image of values (H, W) or (H, W, C).

        Raises:
            OSError: the array has another shape, or is not of numbers.
        """
        values = values[..., None] if values.ndim == 2 else values
        if values.ndim != 3 or not 1 <= values.shape[2] <= 4 or values.dtype.kind not in "biuf":
            raise OSError(f"values {values.dtype} {values.shape}; an image has 1 channel (grey) or 3 (RGB)")
        image = cls((values.shape[1], values.shape[0]), values.shape[2])
        image._values = values
        return image

    def read_values(self) -> np.ndarray:
        """The values (H, W, C), of any kind of number; opacity is a share of an integer type's maximum, or of 1."""
        assert self._values is not None, "made by of(), or by a class of its own"
        return self._values

    def load(self) -> None:
        """Does nothing; `read_values` decodes."""


def strip_boxes(image: Image.Image) -> Iterator[Box]:
    """Boxes that cut an image into strips, so that computing on one at a time takes little memory."""
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        yield 0, top, image.width, min(top + height, image.height)


def deep_of(image: Image.Image) -> Deep | None:
    """The values of an image of more than 8 bits; None for any other image. Call it before the image is decoded."""
    if isinstance(image, ValuesImage):
        return _of_values(image)
    tile = _first_tile(image)
    if image.mode[0] in "IF":
        return _of_grey(image, tile)
    if tile is None or tile.codec_name not in ("zip", "raw", "libtiff"):
        return None
    assert isinstance(image, ImageFile.ImageFile)
    rawmode = _rawmode(tile)
    if isinstance(image, TiffImageFile):
        if rawmode == "R" and 16 in image.tag_v2.get(BITS, ()):  # Pillow would read every byte as a value
            suffix = ";16L" if image.tag_v2.prefix == b"II" else ";16B"
            image.tile = [_with_rawmode(part, _rawmode(part) + suffix) for part in image.tile]
            return _of_two_halves(image)
        if rawmode == "L" and image.tag_v2.get(SAMPLE_FORMAT) == (2,):
            return Deep(image, "integer", lambda box: (np.asarray(image.crop(box)).view(np.int8), None))
    if rawmode == "LA;16B":
        # Read as four bytes per pixel: a high and a low one of grey, then of opacity.
        image.tile = [_with_rawmode(tile, "RGBA")]
        return Deep(image, "integer", lambda box: _split_opacity(np.asarray(image.crop(box)).view(">u2")))
    return _of_two_halves(image) if rawmode[:-1] in ("RGB;16", "RGBA;16", "RGBX;16") else None


def find_levels(kind: Kind, extremes: Iterable[tuple[float, float]], white: float | None = None) -> Levels:
    """The black and the white level of a set of images of one kind, as this module's docstring says.

    Args:
        kind: `integer` or `float`.
        extremes: the extremes of each image.
        white: the white level if the user has given one.
    """
    remedy = "" if white else " (data.white=)"
    lows, highs = zip(*extremes, strict=True)
    low, high = min(lows), max(highs)
    overshoot = OVERSHOOT if kind == "float" else 0.0
    usual = (1, *USUAL_WHITES) if kind == "float" else USUAL_WHITES
    top = next((value for value in usual if high <= value * (1 + overshoot)), None)
    if low < -overshoot * (white or top or high) and low < 0:
        if kind == "float" and low >= -1 - overshoot and high <= 1 + overshoot:
            return Levels(-1, white or 1, f"the usual range of floats that are below 0, too{remedy}")
        white = white or (high if high > low else low + 1)
        return Levels(low, white, f"their lowest and highest value, as some are below 0{remedy}")
    if white is not None:
        return Levels(0, white, "as data.white says")
    if top is None or (top > 1 and 0 < high * DARK < top):
        return Levels(0, high, f"their highest value{remedy}")
    return Levels(0, top, f"the smallest usual value that none exceeds{remedy}")


def _of_values(image: ValuesImage) -> Deep:
    values = image.read_values()
    values = values.view(np.uint8) if values.dtype == bool else values
    kind: Kind = "float" if values.dtype.kind == "f" else "integer"

    def read(box: Box) -> Strip:
        return _split_opacity(values[box[1] : box[3]])

    return Deep(image, kind, read, 255 if values.dtype == np.uint8 else None, image.negative)


def _of_grey(image: Image.Image, tile: ImageFile._Tile | None) -> Deep:
    """The values of an image of mode I;16, I or F."""
    stated = image.format == "JPEG2000" or (tile is not None and tile.codec_name in ("ppm", "ppm_plain"))
    unsigned = tile is not None and _rawmode(tile) == "I;32N"
    negative = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0

    def read(box: Box) -> Strip:
        values = np.asarray(image.crop(box))
        clear = image.info.get("transparency")
        opacity = None if clear is None else (values != clear).astype(np.float32)
        return values.view(np.uint32) if unsigned else values, opacity

    return Deep(image, "float" if image.mode == "F" else "integer", read, 65535 if stated else None, negative)


def _of_two_halves(image: ImageFile.ImageFile) -> Deep:
    """The values of a 16-bit colour image, of which Pillow keeps the high bytes: a second decoding gives the low ones.

    The second decoding is told that the two bytes of a value come in the other order.
    """
    assert image.fp is not None
    image.fp.seek(0)
    low = Image.open(io.BytesIO(image.fp.read()), formats=(str(image.format),))
    low.decodermaxblock = image.decodermaxblock
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    low.tile = [_with_rawmode(part, _rawmode(part)[:-1] + other[_rawmode(part)[-1]]) for part in image.tile]

    def read(box: Box) -> Strip:
        high_bytes, low_bytes = np.asarray(image.crop(box)), np.asarray(low.crop(box))
        values, opacity = _split_opacity(high_bytes.astype(np.uint16) << 8 | low_bytes)
        clear = image.info.get("transparency")
        return values, opacity if clear is None else (values != np.array(clear)).any(-1).astype(np.float32)

    return Deep(image, "integer", read)


def _first_tile(image: Image.Image) -> ImageFile._Tile | None:
    """What Pillow will decode first; None for an image that is decoded already."""
    return image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None


def _rawmode(tile: ImageFile._Tile) -> str:
    """Pillow's name for how the pixels lie in the file."""
    return tile.args if isinstance(tile.args, str) else str(tile.args[0]) if tile.args else ""


def _with_rawmode(tile: ImageFile._Tile, rawmode: str) -> ImageFile._Tile:
    args = rawmode if isinstance(tile.args, str) or tile.args is None else (rawmode, *tile.args[1:])
    return tile._replace(args=args)


def _split_opacity(values: np.ndarray) -> Strip:
    """Values (H, W, C) as (H, W) or (H, W, 3), and the last channel of two or four as opacity from 0 to 1."""
    full = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    opacity = values[..., -1] / full if values.shape[2] in (2, 4) else None
    return values[..., 0] if values.shape[2] < 3 else values[..., :3], opacity


def _extremes(values: np.ndarray) -> tuple[float, float, float, float]:
    """Low and lowest, high and highest value: low and high leave out 1 of 10,000 values at that end, at least one."""
    values = values.ravel()
    few = min(max(1, len(values) // 10_000), len(values) - 1)
    ordered = np.partition(values, [few, len(values) - 1 - few])
    return ordered[few], values.min(), ordered[-1 - few], values.max()


def _finite(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.where(np.abs(values) < 1e30, values, 0)  # NaN is not below anything


def _to_bytes(share: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
