"""TIFF files that Pillow does not read, such as floats in colour, through the package tifffile if it is installed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from vqgen.data.deep import ValuesImage
from vqgen.errors import need

MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = range(3)  # values of a TIFF's tag
SEPARATE = 2  # of another: each channel by itself


def is_unusual_tiff(content: bytes) -> bool:
    """Whether a file that Pillow does not open is a sound TIFF, of a kind of pixel that Pillow does not know."""
    if not content.startswith(MARKS):
        return False
    try:
        TiffImageFile(io.BytesIO(content))
    except SyntaxError as error:
        return str(error) == "unknown pixel mode"
    except Exception:  # damaged
        return False
    return False


class TiffImage(ValuesImage):
    """The first page of a TIFF file, not decoded yet.

    Raises:
        InputError: tifffile is not installed.
        OSError: the page is not an image of 1 (grey) or 3 (RGB) channels, with opacity or without, or is too large.
    """

    def __init__(self, content: bytes):
        tifffile = need("tifffile", "tiff", "a TIFF with this kind of pixels")
        self._page: Any = tifffile.TiffFile(io.BytesIO(content)).pages[0]
        page, width, height = self._page, self._page.imagewidth, self._page.imagelength
        if page.dtype is None or page.bitspersample != 8 * page.dtype.itemsize:
            raise OSError(f"values of {page.bitspersample} bits")
        opacity = any(kind in (1, 2) for kind in page.extrasamples)
        colours = page.samplesperpixel - opacity
        if page.photometric == RGB and colours == 4:  # the fourth is of no known use
            colours = 3
        if (colours, page.photometric) not in ((1, WHITE_IS_ZERO), (1, BLACK_IS_ZERO), (3, BLACK_IS_ZERO), (3, RGB)):
            raise OSError(f"{page.samplesperpixel} bands; an image has 1 (grey) or 3 (RGB), and may have opacity")
        if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:  # as Pillow's own limit
            raise OSError(f"{width} x {height} pixels, too large for an image")
        self._bands = colours + opacity
        super().__init__((width, height), self._bands, self._page.photometric == WHITE_IS_ZERO)
        self.format = "TIFF"
        if self._page.iccprofile:
            self.info["icc_profile"] = self._page.iccprofile

    def read_values(self) -> np.ndarray:
        """The values (H, W, C), decoded now."""
        values = self._page.asarray()
        if self._page.samplesperpixel > 1 and self._page.planarconfig == SEPARATE:
            values = rearrange(values, "c h w -> h w c")
        return values.reshape(self.height, self.width, -1)[..., : self._bands]
