"""Colour profiles: what a file's numbers mean as colours, converted to sRGB by LittleCMS through Pillow."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable
from typing import cast

import numpy as np
from einops import rearrange
from PIL import Image, ImageCms, features

logger = logging.getLogger("vqgen")

Conversion = Callable[[Image.Image], Image.Image]
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space: the mode of the images that it is for
STEPS = 9  # colours per channel that tell whether a profile does anything


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A decoded image as sRGB, in mode L, LA, RGB or RGBA; opacity does not change.

    Nothing changes without a profile, with one for other channels than the image has, or with one that does not open.

    Args:
        image: the image.
        profile: the ICC profile; None means sRGB.
    """
    if image.mode == "LAB" and _has_lcms():  # which Pillow does not convert by itself
        return cast(Image.Image, ImageCms.applyTransform(image, _lab_to_srgb()))
    space = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA") else "RGB"
    mode = space if not image.has_transparency_data else "LA" if image.mode in ("L", "LA") else "RGBA"
    convert = _conversion(profile, space) if profile else None
    if space == "CMYK":
        return convert(image) if convert else image.convert("RGB")
    image = image if image.mode == mode else image.convert(mode)
    if convert is None:
        return image
    if mode == space:
        return convert(image)
    converted = convert(image.convert(space))
    converted.putalpha(image.getchannel("A"))
    return converted


@functools.lru_cache(64)
def _conversion(profile: bytes, mode: str) -> Conversion | None:
    """Converts images of mode L, RGB or CMYK by a profile; None if that would change no colour, or is not possible."""
    if not _has_lcms():
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        profile_mode = MODES.get(opened.profile.xcolor_space.strip(), "")
        if profile_mode != mode and (mode, profile_mode) != ("L", "RGB"):
            return None
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE  # exact in dark tones, but slow
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, srgb, profile_mode, "RGB", flags=flags)
        if mode == "L":  # the tone curve alone, so that grey stays grey
            ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert(profile_mode)
            curve = np.asarray(ImageCms.applyTransform(ramp, transform))[0, :, 1]
            return None if _same(curve, np.arange(256)) else lambda image: image.point(curve.tolist())
        if mode == "RGB":
            values = np.linspace(0, 255, STEPS).round().astype(np.uint8)
            colours = rearrange(np.stack(np.meshgrid(values, values, values)), "c r g b -> r (g b) c")
            if _same(np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform)), colours):
                return None
    except (OSError, ImageCms.PyCMSError, ValueError):  # damaged, or a profile of another kind than of a device
        return None
    return lambda image: cast(Image.Image, ImageCms.applyTransform(image, transform))  # not in place


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _same(colours: np.ndarray, others: np.ndarray) -> bool:
    """Whether colours differ by rounding only."""
    return bool((np.abs(colours.astype(int) - others) <= 1).all())


@functools.cache
def _has_lcms() -> bool:
    if features.check("littlecms2"):
        return True
    logger.warning("this Pillow was built without LittleCMS, so the colour profiles of images are ignored")
    return False
