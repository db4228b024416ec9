"""A light convolutional architecture, the fast learner: all blocks work at low resolution."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from vqgen.errors import require, require_choice, require_size
from vqgen.tokenizers.blocks import BLOCKS, MAX_WIDTH, GroupNorm, Stack, num_groups
from vqgen.tokenizers.vqmodel import VQModel


class Light(VQModel):
    """Residual blocks after a space-to-depth stem, which divides the image's side by patch_size at once.

    Each further width halves the side again, so the stride is patch_size * 2 ** (len(widths) - 1). The decoder's last
    layer is a 3x3 convolution of `head_width` channels at full resolution: it sees across the borders of the patches,
    so no pattern of their grid need show on flat areas.

    Args:
        channels: channels of the images, 1 (grey) or 3 (RGB).
        patch_size: side in pixels of the squares that the stem turns into vectors.
        widths: channels at each resolution, finest first.
        encoder_blocks: blocks at each resolution of the encoder.
        decoder_blocks: blocks at each resolution of the decoder.
        block: `residual`, or `separable`, which costs less than half as much: better for maps of 8x8 codes and more,
            worse for maps of 4x4.
        head_width: channels at full resolution, ahead of the last layer; 0 makes the pixels of a patch at once, from
            its features and those of its neighbours.
        quantizer: the quantizer, a name with its options
    """

    encoder: Stack
    decoder: Stack

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 4,
        widths: Sequence[int] = (24, 64),
        encoder_blocks: int = 1,
        decoder_blocks: int = 2,
        block: Literal["residual", "separable"] = "residual",
        head_width: int = 8,
        quantizer: dict[str, Any] | None = None,
    ):
        require_size("patch_size", patch_size, 1024)
        require_size("encoder_blocks", encoder_blocks, 1000, least=0)
        require_size("decoder_blocks", decoder_blocks, 1000, least=0)
        require_size("head_width", head_width, MAX_WIDTH, least=0)
        require_choice("block", block, BLOCKS, "block")
        require(
            0 < len(widths) <= 16 and 0 < min(widths) <= max(widths) <= MAX_WIDTH,
            f"widths={list(widths)}: must be 1 to 16 numbers of channels, each from 1 to {MAX_WIDTH}",
        )
        super().__init__(channels, patch_size * 2 ** (len(widths) - 1), quantizer)

        encoder: list[nn.Module] = [nn.Conv2d(channels, widths[0], patch_size, stride=patch_size)]
        for i, width in enumerate(widths):
            if i > 0:
                encoder += [nn.Conv2d(widths[i - 1], width, 2, stride=2)]
            encoder += [BLOCKS[block](width) for _ in range(encoder_blocks)]
        encoder += [GroupNorm(num_groups(widths[-1]), widths[-1]), nn.SiLU()]
        self.encoder = Stack(*encoder)
        self.to_code = nn.Conv2d(widths[-1], self.quantizer.code_dim, 1)

        self.from_code = nn.Conv2d(self.quantizer.code_dim, widths[-1], 1)
        decoder: list[nn.Module] = []
        for i, width in reversed(list(enumerate(widths))):
            decoder += [BLOCKS[block](width) for _ in range(decoder_blocks)]
            if i > 0:
                decoder += [nn.Conv2d(width, widths[i - 1] * 4, 1), nn.PixelShuffle(2)]
        decoder += [GroupNorm(num_groups(widths[0]), widths[0]), nn.SiLU()]
        if head_width:
            decoder += [nn.Conv2d(widths[0], head_width * patch_size**2, 1), nn.PixelShuffle(patch_size), nn.SiLU()]
            decoder += [nn.Conv2d(head_width, channels, 3, padding=1)]
        else:
            decoder += [nn.Conv2d(widths[0], channels * patch_size**2, 3, padding=1), nn.PixelShuffle(patch_size)]
        self.decoder = Stack(*decoder)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the last convolution."""
        return [layer for layer in self.decoder if isinstance(layer, nn.Conv2d)][-1].weight  # type: ignore[return-value]
