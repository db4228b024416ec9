"""Changes to the latent in training, for codes that suit the prior better: scaled or turned maps, replaced codes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.quantizers import Replacements
from vqgen.settings import EquivarianceConfig, PerturbConfig

ANNEALED = (0.2, 0.6)  # RobusTok anneals from epoch 40 to epoch 120 of 200


class Transform(NamedTuple):
    """Scales a map, turns it and mirrors it; the same for a latent and for its image (EQ-VAE, Kouzelis et al. 2025).

    EQ-VAE's published code scales without antialiasing, which would ask the decoder for aliased images; this does not.

    Attributes:
        height, width: size of the scaled latent, before it is turned.
        quarters: quarter turns against the clock.
        mirrored: whether left and right change sides after the turn.
    """

    height: int
    width: int
    quarters: int = 0
    mirrored: bool = False

    def __call__(self, x: Tensor, stride: int = 1) -> Tensor:
        """The transform of maps (B, C, H, W) with `stride` pixels for each position of the latent along a side."""
        size = (self.height * stride, self.width * stride)
        if x.shape[2:] != size:
            x = F.interpolate(x.float(), size=size, mode="bilinear", antialias=True)
        x = x.rot90(self.quarters, dims=(2, 3))
        return x.flip(3) if self.mirrored else x


def draw_transform(config: EquivarianceConfig, shape: Sequence[int], random: np.random.Generator) -> Transform | None:
    """A random transform of latents of a shape (height, width); None in the steps that leave the latent as it is.

    As in EQ-VAE's published code, each transform scales the latent to a whole number of positions below its own, and
    turns it by one to three quarters.
    """
    if random.random() >= config.share:
        return None
    height, (least, _) = shape[0], smallest_latent(config, shape)
    scaled = int(random.integers(least, height)) if least < height else height
    quarters = int(random.integers(1, 4)) if config.rotate else 0
    mirrored = config.flip and random.random() < 0.5
    return Transform(scaled, _beside(scaled, shape), quarters, mirrored)


def smallest_latent(config: EquivarianceConfig, shape: Sequence[int]) -> tuple[int, int]:
    """The least height, and the width beside it, that latents of a shape (height, width) are scaled to."""
    least = max(1, math.ceil(config.scale * shape[0]))
    return least, _beside(least, shape)


def _beside(scaled: int, shape: Sequence[int]) -> int:
    """The width of a latent of a shape (height, width) that is scaled to another height."""
    return max(1, round(shape[1] * scaled / shape[0]))


def draw_replacements(
    config: PerturbConfig, batch: int, shape: Sequence[int], share: float, device: torch.device
) -> Replacements | None:
    """Random replacements for codes of a batch with code maps of a shape (Q, *S); None if `images` is 0.

    They are for the first images of the batch, whose order is random anyway, so that the search for neighbours costs
    little. The number of these images is random, too, unless the share of the batch is a whole number.

    Args:
        config: the shares of images and codes, and the number of neighbours.
        batch: number of images.
        shape: shape of the code map.
        share: the spent share of the run; codes are replaced more often, and by farther ones, early in the run.
        device: the codes' device.
    """
    if config.images == 0:
        return None
    start, end = ANNEALED
    level = 1 - (1 - config.end) * min(1.0, max(0.0, (share - start) / (end - start)))
    images = int(config.images * batch + torch.rand((), device="cpu").item())  # so it waits for no device
    farthest = max(1, round(level * config.nearest))
    ranks = draw_ranks((images, *shape), level * config.codes, farthest, device=device)
    return Replacements(ranks, config.nearest)


def draw_ranks(
    shape: Sequence[int],
    share: float,
    nearest: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random ranks for `Replacements`: 0, or for a share of the codes one of 1 to `nearest`."""
    chosen = torch.rand(tuple(shape), device=device, generator=generator) < share
    return torch.where(chosen, torch.randint(1, nearest + 1, tuple(shape), device=device, generator=generator), 0)
