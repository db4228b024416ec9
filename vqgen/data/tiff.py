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
WHITE_IS_ZERO, RGB, SEPARATE = 0, 2, 2  # values of a TIFF's tags


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
        width, height, bands = self._page.imagewidth, self._page.imagelength, self._page.samplesperpixel
        opacity = any(kind in (1, 2) for kind in self._page.extrasamples or ())
        if bands > 4 or (bands in (2, 4) and not opacity and self._page.photometric != RGB):
            raise OSError(f"{bands} bands; an image has 1 (grey) or 3 (RGB), and may have opacity")
        if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:  # as Pillow's own limit
            raise OSError(f"{width} x {height} pixels, too large for an image")
        self._bands = 3 if bands == 4 and not opacity else bands
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
