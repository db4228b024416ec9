"""Which codes of an image stay, and which the prior draws anew."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from vqgen.codes import CodeLayout


def known_tokens(layout: CodeLayout, codes: Sequence[Tensor], redrawn: Tensor) -> Tensor:
    """The tokens (B, N) of code maps [(B, Q, H, W), ...], -1 where a code is to be drawn anew.

    Args:
        layout: layout of the maps.
        codes: the maps, coarse to fine.
        redrawn: (B, h, w) bool of any size. A code is drawn anew if any of its part of the image is True.
    """
    part = redrawn[:, None].float()  # (B, 1, h, w)
    masks = [
        repeat(F.adaptive_max_pool2d(part, shape[-2:]) > 0, "b 1 h w -> b q h w", q=shape[0]) for shape in layout.shapes
    ]
    return layout.flatten(codes).masked_fill(layout.in_order(masks), -1)


def below(share: float, height: int, width: int) -> Tensor:
    """(1, H, W) bool, True below the first rows, which have this share of the height."""
    rows = torch.arange(height) >= round(share * height)
    return rows[None, :, None].expand(1, height, width)


def scattered(share: float, noise: Tensor) -> Tensor:
    """(B, H, W) bool, True at this share of the places of each row of noise (B, H, W), those where it is lowest."""
    flat = noise.flatten(1)
    count = max(1, round(share * flat.shape[1]))
    return (flat <= flat.kthvalue(count, dim=1, keepdim=True).values).view_as(noise)
