"""The Inception v3 of the Frechet inception distance: TensorFlow's of 2015-12-05, which differs from torchvision's."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (sides[0] // 2, sides[1] // 2) if padding else 0
        self.conv = nn.Conv2d(channels, width, sides, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Parallel chains of ConvBN, joined along the channels.

    The layers have the same names as in the file of weights. A chain is a sequence of names. A chain that ends in a
    tuple forks there, and an empty chain returns the pooled input itself.

    Args:
        layers: the ConvBN layers by name.
        chains: for each chain, the names of its layers in order.
        pool: pools the input of the empty chain and of the chain `branch_pool`.
    """

    def __init__(self, layers: dict[str, ConvBN], chains: list[list], pool: Callable[[Tensor], Tensor]):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.chains, self.pool = chains, pool

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            y = self.pool(x) if chain in ([], ["branch_pool"]) else x
            for name in chain:
                forks = name if isinstance(name, tuple) else (name,)
                y = torch.cat([self.get_submodule(fork)(y) for fork in forks], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class InceptionV3(nn.Module):
    """Images uint8 (B, 3, H, W) to 2048 features and 1008 logits (Szegedy et al. 2015, as used by Heusel et al. 2017).

    The modules have the same names as in the file pt_inception-2015-12-05-6726825d.pth.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2, padding=False)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(128)
        self.Mixed_6c = _block_c(160)
        self.Mixed_6d = _block_c(160)
        self.Mixed_6e = _block_c(192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average_pool)
        self.Mixed_7c = _block_e(2048, lambda x: F.max_pool2d(x, 3, 1, 1))  # sic: TensorFlow's last block takes maxima
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2048) and logits (B, 1008); as in the Inception score, the logits have no bias."""
        x = (_resize_like_tensorflow(images.float(), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # TensorFlow does not count the padding


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


def _block_a(channels: int, pooled: int) -> Branches:
    layers = {
        "branch1x1": ConvBN(channels, 64, 1),
        "branch5x5_1": ConvBN(channels, 48, 1),
        "branch5x5_2": ConvBN(48, 64, 5),
        "branch3x3dbl_1": ConvBN(channels, 64, 1),
        "branch3x3dbl_2": ConvBN(64, 96, 3),
        "branch3x3dbl_3": ConvBN(96, 96, 3),
        "branch_pool": ConvBN(channels, pooled, 1),
    }
    chains = [["branch1x1"], ["branch5x5_1", "branch5x5_2"], _numbered("branch3x3dbl", 3), ["branch_pool"]]
    return Branches(layers, chains, _average_pool)


def _block_b(channels: int) -> Branches:
    layers = {
        "branch3x3": ConvBN(channels, 384, 3, stride=2, padding=False),
        "branch3x3dbl_1": ConvBN(channels, 64, 1),
        "branch3x3dbl_2": ConvBN(64, 96, 3),
        "branch3x3dbl_3": ConvBN(96, 96, 3, stride=2, padding=False),
    }
    return Branches(layers, [["branch3x3"], _numbered("branch3x3dbl", 3), []], _max_pool)


def _block_c(width: int) -> Branches:
    row, column = (1, 7), (7, 1)
    layers = {
        "branch1x1": ConvBN(768, 192, 1),
        "branch7x7_1": ConvBN(768, width, 1),
        "branch7x7_2": ConvBN(width, width, row),
        "branch7x7_3": ConvBN(width, 192, column),
        "branch7x7dbl_1": ConvBN(768, width, 1),
        "branch7x7dbl_2": ConvBN(width, width, column),
        "branch7x7dbl_3": ConvBN(width, width, row),
        "branch7x7dbl_4": ConvBN(width, width, column),
        "branch7x7dbl_5": ConvBN(width, 192, row),
        "branch_pool": ConvBN(768, 192, 1),
    }
    chains = [["branch1x1"], _numbered("branch7x7", 3), _numbered("branch7x7dbl", 5), ["branch_pool"]]
    return Branches(layers, chains, _average_pool)


def _block_d(channels: int) -> Branches:
    layers = {
        "branch3x3_1": ConvBN(channels, 192, 1),
        "branch3x3_2": ConvBN(192, 320, 3, stride=2, padding=False),
        "branch7x7x3_1": ConvBN(channels, 192, 1),
        "branch7x7x3_2": ConvBN(192, 192, (1, 7)),
        "branch7x7x3_3": ConvBN(192, 192, (7, 1)),
        "branch7x7x3_4": ConvBN(192, 192, 3, stride=2, padding=False),
    }
    return Branches(layers, [_numbered("branch3x3", 2), _numbered("branch7x7x3", 4), []], _max_pool)


def _block_e(channels: int, pool: Callable[[Tensor], Tensor]) -> Branches:
    layers = {
        "branch1x1": ConvBN(channels, 320, 1),
        "branch3x3_1": ConvBN(channels, 384, 1),
        "branch3x3_2a": ConvBN(384, 384, (1, 3)),
        "branch3x3_2b": ConvBN(384, 384, (3, 1)),
        "branch3x3dbl_1": ConvBN(channels, 448, 1),
        "branch3x3dbl_2": ConvBN(448, 384, 3),
        "branch3x3dbl_3a": ConvBN(384, 384, (1, 3)),
        "branch3x3dbl_3b": ConvBN(384, 384, (3, 1)),
        "branch_pool": ConvBN(channels, 192, 1),
    }
    chains: list[list] = [
        ["branch1x1"],
        ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
        ["branch_pool"],
    ]
    return Branches(layers, chains, pool)


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{i}" for i in range(1, count + 1)]


def _resize_like_tensorflow(x: Tensor, size: int) -> Tensor:
    """Resizes (B, C, H, W) bilinearly to (B, C, size, size) on TensorFlow 1's grid, which starts at the first pixel."""
    for _ in range(2):  # first the rows, then (transposed) the columns
        place = torch.arange(size, dtype=x.dtype, device=x.device) * (x.shape[2] / size)
        low = place.long()
        high = (low + 1).clamp_max(x.shape[2] - 1)
        x = torch.lerp(x[:, :, low], x[:, :, high], (place - low)[:, None]).transpose(2, 3)
    return x
