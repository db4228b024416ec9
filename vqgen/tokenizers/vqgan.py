"""The encoder and decoder of VQGAN, which LlamaGen, latent diffusion and diffusers' VQModel also use."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqgen.errors import require, require_size
from vqgen.tokenizers.blocks import MAX_WIDTH, GroupNorm, Stack
from vqgen.tokenizers.vqmodel import VQModel


class VQGAN(VQModel):
    """Residual blocks at each resolution, and a middle with attention (VQGAN, Esser et al. 2021, appendix, table 7).

    The defaults are VQGAN's f16 network. Each further multiplier halves the side, so the stride is
    2 ** (len(multipliers) - 1).

    Args:
        channels: channels of the images, 1 (grey) or 3 (RGB).
        width: channels after the first convolution.
        multipliers: channels at each resolution, finest first, as multiples of the width.
        encoder_blocks: residual blocks at each resolution of the encoder.
        decoder_blocks: residual blocks at each resolution of the decoder.
        encoder_attention: resolutions whose blocks in the encoder are each followed by attention; 0 is the finest, -1
            the coarsest.
        decoder_attention: the same in the decoder.
        mid_attention: whether there is attention in the middle, between the last two blocks at the coarsest resolution.
        latent_channels: channels of the encoder's output and of the decoder's input.
        norm_groups: groups of each normalisation; must divide all widths.
        quantizer: the quantizer, a name with its options
    """

    encoder: Stack
    decoder: Stack

    def __init__(
        self,
        channels: int = 3,
        width: int = 128,
        multipliers: Sequence[float] = (1, 1, 2, 2, 4),
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
        encoder_attention: Sequence[int] = (-1,),
        decoder_attention: Sequence[int] = (-1,),
        mid_attention: bool = True,
        latent_channels: int = 256,
        norm_groups: int = 32,
        quantizer: dict[str, Any] | None = None,
    ):
        for name, blocks in (("encoder_blocks", encoder_blocks), ("decoder_blocks", decoder_blocks)):
            require_size(name, blocks, 1000)
        for name, size in (("width", width), ("latent_channels", latent_channels), ("norm_groups", norm_groups)):
            require_size(name, size, MAX_WIDTH)
        widths = _widths(width, multipliers, norm_groups)
        super().__init__(channels, 2 ** (len(widths) - 1), quantizer)
        levels = range(len(widths))
        attended = [_levels("encoder_attention", encoder_attention, levels)]
        attended += [_levels("decoder_attention", decoder_attention, levels)]

        def blocks_at(before: int, after: int, number: int, attention: bool) -> list[nn.Module]:
            """Residual blocks from one width to another, each with attention after it if it is asked for."""
            made: list[nn.Module] = []
            for i in range(number):
                made += [ResidualBlock(after if i else before, after, norm_groups)]
                made += [Attention(after, norm_groups)] if attention else []
            return made

        def middle(width: int) -> list[nn.Module]:
            first, last = (ResidualBlock(width, width, norm_groups) for _ in range(2))
            return [first, Attention(width, norm_groups), last] if mid_attention else [first, last]

        def end(width: int, channels: int) -> list[nn.Module]:
            return [_norm(width, norm_groups), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]

        encoder: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for i, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            if i > 0:  # one row and column of zeros, at the bottom and at the right
                encoder += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(before, before, 3, stride=2)]
            encoder += blocks_at(before, after, encoder_blocks, i in attended[0])
        self.encoder = Stack(*encoder, *middle(widths[-1]), *end(widths[-1], latent_channels))
        self.to_code = nn.Conv2d(latent_channels, self.quantizer.code_dim, 1)

        self.from_code = nn.Conv2d(self.quantizer.code_dim, latent_channels, 1)
        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1), *middle(widths[-1])]
        for i, before, after in zip(reversed(levels), [widths[-1], *reversed(widths)], reversed(widths), strict=False):
            decoder += blocks_at(before, after, decoder_blocks, i in attended[1])
            if i > 0:
                decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(after, after, 3, padding=1)]
        self.decoder = Stack(*decoder, *end(widths[0], channels))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the last convolution."""
        return self.decoder[-1].weight  # type: ignore[return-value]


class ResidualBlock(nn.Module):
    """Pre-activation residual block with two 3x3 convolutions: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, width: int, out_width: int, norm_groups: int):
        super().__init__()
        self.norm1 = _norm(width, norm_groups)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        self.norm2 = _norm(out_width, norm_groups)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Identity() if width == out_width else nn.Conv2d(width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Residual self-attention with one head over all positions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int, norm_groups: int):
        super().__init__()
        self.norm = _norm(width, norm_groups)
        self.query, self.key, self.value, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(part(h), "b c h w -> b 1 (h w) c") for part in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b 1 (h w) c -> b c h w", w=x.shape[3]))


def _norm(width: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, width, eps=1e-6)


def _widths(width: int, multipliers: Sequence[float], norm_groups: int) -> list[int]:
    """The channels at each resolution.

    Raises:
        InputError: there is no resolution, there are too many, or a width does not fit the groups.
    """
    require(0 < len(multipliers) <= 16, f"multipliers={list(multipliers)}: must be 1 to 16 numbers")
    widths = [round(width * multiplier) for multiplier in multipliers]
    fits = 0 < min(widths) <= max(widths) <= MAX_WIDTH
    require(
        fits, f"multipliers={list(multipliers)}: times width={width} must be from 1 to {MAX_WIDTH}, but are {widths}"
    )
    for each in (width, *widths):
        rest = f"norm_groups={norm_groups}: does not divide the width {each} (width={width} times the multipliers"
        require(each % norm_groups == 0, f"{rest} {list(multipliers)}); use a divisor of all widths, or other widths")
    return widths


def _levels(name: str, attention: Sequence[int], levels: range) -> set[int]:
    """The resolutions with attention, counted from the finest.

    Raises:
        InputError: there is no such resolution.
    """
    for i in attention:
        known = f"there are {len(levels)}, from 0, the finest, to {levels[-1]}; -1 is the coarsest"
        require(-len(levels) <= i <= levels[-1], f"{name}={list(attention)}: has no resolution {i}; {known}")
    return {levels[i] for i in attention}
