"""Building blocks of the tokenizer's encoder and decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_WIDTH = 1 << 16  # channels, of any architecture


class Stack(nn.Sequential):
    """Layers one after another, whose blocks need not keep their activations for the backward pass.

    A block is a layer with layers inside. With `checkpointing` a block in training keeps its input alone, and computes
    the rest again in the backward pass (Chen et al. 2016, section 3): less memory, more time, the same gradients.
    """

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if self.checkpointing and self.training and torch.is_grad_enabled() and any(layer.children()):
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose output has the type of its input, also under autocast, which would make it float32.

    The next convolution would round it to that type all the same, and the sums inside are in float32 in any case. With
    float32 outputs a training step at 256 pixels takes half as much memory again, and 1.16 times as long (H100, bf16).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ResBlock(nn.Module):
    """Pre-activation residual block with two 3x3 convolutions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = GroupNorm(num_groups(width), width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = GroupNorm(num_groups(width), width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)  # the block starts as the identity, so more blocks do no harm at first

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class SeparableBlock(nn.Module):
    """A depthwise 3x3 convolution, then two layers on each position, around which x goes (ConvNeXt, Liu et al. 2022).

    Blocks of Light, (B, C, H, W) -> (B, C, H, W). Differences from ConvNeXt: a kernel of 3 and not 7, twice the width
    inside and not four times, group norm: at a given time all of these learn faster.
    """

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = GroupNorm(num_groups(width), width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)  # the block starts as the identity, as ResBlock does

    def forward(self, x: Tensor) -> Tensor:
        h = self.expand(self.norm(self.depthwise(x)))
        return x + self.project(F.silu(h))


BLOCKS: dict[str, type[nn.Module]] = {"separable": SeparableBlock, "residual": ResBlock}


def num_groups(width: int) -> int:
    """The largest number of equal groups of at least 16 channels that the width divides into; at least 1."""
    return next(n for n in range(max(1, width // 16), 0, -1) if width % n == 0)
