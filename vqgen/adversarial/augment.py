"""Random changes to the images that a discriminator sees (DiffAugment, Zhao et al. 2020)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 1 / 8  # of a side, at most, in each direction
CUT = 1 / 2  # of a side


def diff_augment(x: Tensor, kinds: Sequence[str]) -> Tensor:
    """Changes each image in its own random way; differentiable, so that the generator learns through the changes.

    D sees real and generated images changed alike: with changes of real images alone, the generator would learn to draw
    them. The ranges are those of the authors' code.

    Args:
        x: images (B, C, H, W) in [-1, 1].
        kinds: the changes, in their order. `color`: brightness, saturation (which a grey image lacks) and contrast.
            `translation`: by up to an eighth of each side. `cutout`: of a rectangle with sides half as long. Zeros,
            which are mid-grey, come where nothing is left.

    Returns:
        The changed images (B, C, H, W), which may leave [-1, 1]; x itself if there are no kinds.
    """
    for kind in kinds:
        x = {"color": _color, "translation": _translation, "cutout": _cutout}[kind](x)
    return x


def _color(x: Tensor) -> Tensor:
    brightness, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def _translation(x: Tensor) -> Tensor:
    far = [int(side * SHIFT + 0.5) for side in x.shape[2:]]
    rows, columns = (
        torch.arange(side, device=x.device) + torch.randint(2 * most + 1, (len(x), 1), device=x.device)  # (B, side)
        for side, most in zip(x.shape[2:], far, strict=True)
    )
    padded = F.pad(x, [far[1], far[1], far[0], far[0]])
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _cutout(x: Tensor) -> Tensor:
    inside = []
    for side in x.shape[2:]:
        cut = int(side * CUT + 0.5)
        start = torch.randint(side + 1 - cut % 2, (len(x), 1), device=x.device) - cut // 2
        place = torch.arange(side, device=x.device) - start
        inside.append((place >= 0) & (place < cut))  # (B, side)
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
