"""Crops of images: the versions of an image that a token store holds, and the random crops of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vqgen.data.images import ImageSet
from vqgen.data.stream import OrderedStream

ENLARGED = 1.1  # LlamaGen's `crop_range`: its ten-crop cuts the corners and the centre out of an image of this size


class Versions:
    """The versions of each image that a token store holds.

    The first version is the image itself, as the evaluations see it. With several places, the next four are the corners
    of the image at 1.1 times the size. The mirror image of each follows it. This is the ten-crop of LlamaGen (Sun et
    al. 2024, autoregressive/train/extract_codes_c2i.py), except that the centre is not enlarged.

    Args:
        images: the images.
        crops: 1, 5 or 10, as in `DataConfig`.
        mirror: whether to add mirror images; 10 crops have them anyway.
    """

    def __init__(self, images: ImageSet | OrderedStream, crops: int, mirror: bool):
        self.images, self.mirror = images, mirror or crops == 10
        self.larger = images.resized([round(ENLARGED * side) for side in images.size]) if crops > 1 else None

    def __len__(self) -> int:
        """Number of versions of an image."""
        return (1 if self.larger is None else 5) * (2 if self.mirror else 1)

    def read(self, i: int) -> np.ndarray | None:
        """The versions of image i, uint8 (V, C, H, W), or None if it does not load.

        Raises:
            InputError: it does not load and data.on_error=raise.
        """
        image = self.images.read(i)
        if image is None:
            return None
        versions = [image]
        if self.larger is not None:
            if (larger := self.larger.read(i)) is None:
                return None
            height, width = self.images.size
            for rows in (slice(height), slice(-height, None)):
                versions += [larger[:, rows, columns] for columns in (slice(width), slice(-width, None))]
        if self.mirror:
            versions = [version for place in versions for version in (place, place[..., ::-1])]
        return np.stack(versions)


def random_crops(x: Tensor, draws: Tensor, shares: Sequence[float]) -> Tensor:
    """A random crop of each image (B, C, H, W) in [-1, 1], enlarged to the same shape; without a host sync.

    A crop keeps the aspect, and its sides are a share of the image's, uniform in the range `shares`. So it sees no
    more than the image does: with resize=crop, the centre of the file. A crop of share 1 is the image itself. Each axis
    is resampled by a matrix of Keys' cubic weights (a = -0.5), as Pillow's BICUBIC does it.

    Args:
        x: the images.
        draws: (B, 3) uniform numbers from 0 to 1: for the share, and for the place from top to bottom and from left to
            right.
        shares: the least and the largest share, above 0 and at most 1.
    """
    least, most = shares
    share = least + (most - least) * draws[:, 0]
    rows, columns = (_cubic(share, draws[:, i], x.shape[i + 1]) for i in (1, 2))
    return torch.einsum("b i h, b c h w, b j w -> b c i j", rows, x, columns).clamp(-1, 1)


def _cubic(share: Tensor, place: Tensor, side: int) -> Tensor:
    """The weights (B, side, side) of an image's pixels for each pixel of its crop, by share (B,) and place (B,)."""
    pixels = torch.arange(side, device=share.device)
    share, place = rearrange(share, "b -> b 1"), rearrange(place, "b -> b 1")
    centre = (pixels + 0.5) * share + place * (1 - share) * side - 0.5  # (B, side)
    d = (rearrange(centre, "b i -> b i 1") - pixels).abs()
    weights = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2).where(d < 2, 0)
    return weights / weights.sum(dim=2, keepdim=True)
