"""Building blocks of the tokenizer's encoder and decoder."""

import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Pre-activation residual block with two 3x3 convolutions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups(width), width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups(width), width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)  # the block starts as the identity, so more blocks do no harm at first

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def num_groups(width: int) -> int:
    """The largest number of equal groups of at least 16 channels that the width divides into; at least 1."""
    return next(n for n in range(max(1, width // 16), 0, -1) if width % n == 0)
