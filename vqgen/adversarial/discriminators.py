"""The patch discriminator, which judges which parts of an image look generated."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vqgen.codes import sides
from vqgen.errors import require, require_size


class PatchDiscriminator(nn.Module):
    """Gives a logit to each of the overlapping patches of an image (PatchGAN, Isola et al. 2017).

    Each of the layers halves the resolution and doubles the channels, up to 8 * width; two more convolutions turn the
    result into logits. With three layers a logit sees 70 pixels, with two layers 34.

    Args:
        channels: channels of the images.
        layers: number of layers that halve the resolution.
        width: channels after the first layer.
        norm: `spectral` keeps each layer's largest singular value at 1 (Miyato et al. 2018), or `none`.
        blur: whether to blur before each halving, which avoids aliasing (Zhang 2019, in StyleGAN2's order).
    """

    def __init__(
        self,
        channels: int,
        layers: int = 3,
        width: int = 32,
        norm: Literal["spectral", "none"] = "spectral",
        blur: bool = False,
    ):
        super().__init__()
        require_size("layers", layers, 16)
        require_size("width", width, 1 << 14)
        self.layers = layers
        widths = [channels, *(width * min(2**i, 8) for i in range(layers + 1)), 1]
        net: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            halved = i < layers
            if halved and blur:
                net.append(Blur())
            conv = nn.Conv2d(before, after, 4, stride=2 if halved else 1, padding=1)
            net.append(spectral_norm(conv) if norm == "spectral" else conv)
            if i < len(widths) - 2:
                net.append(nn.LeakyReLU(0.2))
        self.net = nn.Sequential(*net)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, C, H, W) in [-1, 1] to logits (B, 1, H / 2^layers - 2, W / 2^layers - 2)."""
        return self.net(x)

    def check_size(self, image_size: int | Sequence[int], why: str = "") -> None:
        """Raises InputError if images of image_size pixels, a side or height and width, are too small for a logit.

        Args:
            image_size: the size.
            why: where the size comes from if it is not that of the data, for the message; begins with a comma.
        """
        least = min(sides(image_size))
        deepest = (least // 3).bit_length() - 1  # after the layers, the side must be at least 3
        remedy = f"use {deepest} or fewer" if deepest > 0 else "the least is 6 pixels"
        require(self.layers <= deepest, f"layers={self.layers} is too deep for images of {least} pixels{why}; {remedy}")


class Blur(nn.Module):
    """Filters each channel by 1-2-1 in both directions: (B, C, H, W) to the same shape."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(line, line), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])
