"""Figures of merit of reconstructions and codes."""

import torch
from torch import Tensor

from vqgen.distributed import all_reduce_sum


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, from the mean squared error of images in [-1, 1]."""
    return 10 * torch.log10(4.0 / mse.clamp_min(1e-10))  # the peak is 2, from -1 to 1


class CodeUsage:
    """Counts codes on their device, and says how many of them are in use.

    Args:
        codebook_size: number of codes K.
        device: where the codes are.
    """

    def __init__(self, codebook_size: int, device: torch.device):
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, codes: Tensor) -> None:
        """Counts codes of any shape."""
        flat = codes.flatten()
        self.counts.index_add_(0, flat, torch.ones_like(flat))

    def compute(self) -> dict[str, Tensor]:
        """Over all processes since the last call: the share of codes used, and exp(entropy) of their distribution."""
        counts = all_reduce_sum(self.counts.clone()).float()
        self.counts.zero_()
        p = counts / counts.sum()
        return {"usage": (counts > 0).float().mean(), "perplexity": torch.exp(-torch.xlogy(p, p).sum())}
