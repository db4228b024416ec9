"""The tokenizer: a light convolutional VQ-VAE."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from vqgen.codes import CodeLayout
from vqgen.errors import InputError, require, require_size
from vqgen.quantizers import QuantizerOutput, build_quantizer
from vqgen.tokenizers.blocks import ResBlock, num_groups

MAX_WIDTH = 1 << 16


class VQModel(nn.Module, PyTorchModelHubMixin):
    """Image -> grid of codes -> image (VQ-VAE, van den Oord et al. 2017), images in [-1, 1].

    The cost sits at low resolution: a space-to-depth stem goes straight to 1/patch_size of the side, and each further
    width halves it again. So the stride is patch_size * 2 ** (len(widths) - 1).

    Args:
        channels: of the images, 1 (grey) or 3 (RGB).
        patch_size: side of the squares that the stem turns into vectors.
        widths: channels at each resolution, finest first.
        encoder_blocks: residual blocks at each resolution of the encoder.
        decoder_blocks: residual blocks at each resolution of the decoder.
        quantizer: which one, and beside its name what it takes
    """

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 4,
        widths: Sequence[int] = (24, 96),
        encoder_blocks: int = 1,
        decoder_blocks: int = 1,
        quantizer: dict[str, Any] | None = None,
    ):
        super().__init__()
        require(channels in (1, 3), f"model.channels={channels}: must be 1 or 3")
        require_size("model.patch_size", patch_size, 1024)
        require_size("model.encoder_blocks", encoder_blocks, 1000, least=0)
        require_size("model.decoder_blocks", decoder_blocks, 1000, least=0)
        require(
            0 < len(widths) <= 16 and 0 < min(widths) <= max(widths) <= MAX_WIDTH,
            f"model.widths={list(widths)}: must be one or more channel counts, 16 of them and {MAX_WIDTH} at most",
        )
        self.channels = channels
        self.stride = patch_size * 2 ** (len(widths) - 1)
        self.quantizer = build_quantizer(**(quantizer or {}))

        encoder: list[nn.Module] = [nn.Conv2d(channels, widths[0], patch_size, stride=patch_size)]
        for i, width in enumerate(widths):
            if i > 0:
                encoder += [nn.Conv2d(widths[i - 1], width, 2, stride=2)]
            encoder += [ResBlock(width) for _ in range(encoder_blocks)]
        encoder += [nn.GroupNorm(num_groups(widths[-1]), widths[-1]), nn.SiLU()]
        self.encoder = nn.Sequential(*encoder)
        self.to_code = nn.Conv2d(widths[-1], self.quantizer.code_dim, 1)

        self.from_code = nn.Conv2d(self.quantizer.code_dim, widths[-1], 1)
        decoder: list[nn.Module] = []
        for i, width in reversed(list(enumerate(widths))):
            decoder += [ResBlock(width) for _ in range(decoder_blocks)]
            if i > 0:
                decoder += [nn.Conv2d(width, widths[i - 1] * 4, 1), nn.PixelShuffle(2)]
        decoder += [nn.GroupNorm(num_groups(widths[0]), widths[0]), nn.SiLU()]
        decoder += [nn.Conv2d(widths[0], channels * patch_size**2, 3, padding=1), nn.PixelShuffle(patch_size)]
        self.decoder = nn.Sequential(*decoder)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that images come out of last, for VQGAN's adaptive weight."""
        return self.decoder[-2].weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> tuple[Tensor, list[QuantizerOutput]]:
        """Images (B, C, H, W) to reconstructions of the same shape, and the quantizer's output for each code map."""
        q = self.quantizer(self.to_code(self.encoder(x)))
        return self.decoder(self.from_code(q.z_q)), [q]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) to code maps [(B, Q, H / stride, W / stride)], coarse to fine."""
        return [self.quantizer(self.to_code(self.encoder(x))).codes]

    def decode(self, codes: list[Tensor]) -> Tensor:
        """Code maps, as encode returns them, to images (B, C, H, W)."""
        return self.decoder(self.from_code(self.quantizer.decode_codes(codes[0])))

    def code_layout(self, size: int) -> CodeLayout:
        """The code layout of images of size x size pixels.

        Raises:
            InputError: the size is not divisible by the model's stride.
        """
        if size % self.stride or size < self.stride:
            below = max(1, size // self.stride) * self.stride
            raise InputError(
                f"data.image_size={size} is not divisible by the model's stride {self.stride}; "
                f"use {below} or {below + self.stride}"
            )
        side = size // self.stride
        return CodeLayout(((self.quantizer.num_codebooks, side, side),), (self.quantizer.codebook_size,))


def from_uint8(images: Tensor) -> Tensor:
    """Images uint8 to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], and what lies beyond clipped, to uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


def load_tokenizer(folder: Path) -> tuple[VQModel, str]:
    """The tokenizer of a stage-1 run, or in a folder of its own, in eval mode; and the hash of its files.

    Raises:
        InputError: there is no tokenizer, or it does not load.
    """
    inside = folder / "model" if (folder / "model").is_dir() else folder
    for name in ("config.json", "model.safetensors"):
        if not (inside / name).is_file():
            raise InputError(
                f"{folder} is no tokenizer: it has no {name}; give a stage-1 run, such as stage1=runs/stage1"
            )
    content = [(inside / name).read_bytes() for name in ("config.json", "model.safetensors")]
    try:
        model = VQModel(**json.loads(content[0]))
        model.load_state_dict(load(content[1]))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{inside} does not load as a tokenizer: {' '.join(str(error).split())[:200]}") from error
    return model.eval().requires_grad_(False), hashlib.sha256(b"".join(content)).hexdigest()
