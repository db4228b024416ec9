"""Vector quantization with a codebook that is trained by gradient."""

import torch
from torch import Tensor, nn

from vqgen.distributed import all_reduce_sum
from vqgen.quantizers.codebook import CodebookQuantizer


class VQQuantizer(CodebookQuantizer):
    """A codebook that the optimizer trains with the middle term of VQ-VAE's eq. 3: |sg(z) - e|^2."""

    codebook_weight = 1.0

    def _register(self, codebook: Tensor) -> None:
        self.codebook = nn.Parameter(codebook)

    @torch.no_grad()
    def _learn(self, z: Tensor, indices: Tensor) -> None:
        count = all_reduce_sum(torch.zeros_like(self.counts).index_add_(0, indices, torch.ones_like(z[:, 0])))
        self.counts.lerp_(count, self._weight())
