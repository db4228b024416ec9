"""Vector quantization with a codebook that follows its vectors by exponential moving average."""

import torch
from torch import Tensor

from vqgen.quantizers.codebook import CodebookQuantizer
from vqgen.quantizers.common import assigned


class EMAQuantizer(CodebookQuantizer):
    """A codebook of running means of the vectors assigned to each code (VQ-VAE, appendix A.1)."""

    codebook_weight = 0.0
    sums: Tensor  # (K, D) m_k of appendix A.1

    def _register(self, codebook: Tensor) -> None:
        self.register_buffer("codebook", codebook)
        self.register_buffer("sums", torch.zeros_like(codebook))

    @torch.no_grad()
    def _learn(self, z: Tensor, indices: Tensor) -> None:
        count, total = assigned(z, indices, self.codebook_size)
        finite = torch.isfinite(total.sum(dim=1))  # otherwise one bad vector would spoil the average for good
        count, total = torch.where(finite, count, self.counts), torch.where(finite[:, None], total, self.sums)
        self.counts.lerp_(count, self._weight())
        self.sums.lerp_(total, self._weight())
        smoothed = (self.counts + 1e-5) / (1 + 1e-5 * self.codebook_size / self.counts.sum())  # Laplace
        self.codebook.copy_(self._onto_sphere(self.sums / smoothed[:, None]))

    def _place(self, codes: Tensor, dead: Tensor, vectors: Tensor, count: Tensor) -> None:
        super()._place(codes, dead, vectors, count)
        self.sums.index_copy_(0, codes, torch.where(dead[:, None], vectors * count, self.sums[codes]))
