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
        num_codebooks: codes per position Q.
        codebook_size: number of codes K of each codebook.
        device: where the codes are.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, device: torch.device):
        self.counts = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64, device=device)

    def update(self, codes: Tensor) -> None:
        """Counts codes (B, Q, *S)."""
        num_codebooks, codebook_size = self.counts.shape
        first = codebook_size * torch.arange(num_codebooks, device=codes.device)
        flat = (codes.flatten(2) + first[:, None]).flatten()
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat))

    def compute(self) -> dict[str, Tensor]:
        """Over all processes since the last call, the mean over the codebooks of two figures.

        They are the share of the codes that are used, and exp(entropy) of the codes' distribution.
        """
        counts = all_reduce_sum(self.counts.clone()).float()  # (Q, K)
        self.counts.zero_()
        p = counts / counts.sum(dim=1, keepdim=True)
        return {"usage": (counts > 0).float().mean(), "perplexity": torch.exp(-torch.xlogy(p, p).sum(dim=1)).mean()}
