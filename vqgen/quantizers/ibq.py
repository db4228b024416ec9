"""Index backpropagation: the gradient passes through the choice of the code and reaches all codes."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.errors import require, require_size
from vqgen.quantizers.common import (
    MAX_CODES,
    MAX_DIM,
    Quantizer,
    QuantizerOutput,
    entropy_loss,
    nearest_code,
    require_weights,
    soft_assignment,
    vq_loss,
)


class IBQ(Quantizer):
    """Takes the nearest code, with the gradient of the mean code under softmax(-|z - e|^2) (Shi et al. 2024, sec. 3.2).

    The authors use softmax(z . e). Its argmax is never a code inside the convex hull of the others, and in our trials
    at most a third of 512 codes was used. The loss is VQ-VAE's eq. 3 on a z_q with this gradient; the authors' loss has
    one more term for the encoder.

    Args:
        codebook_size: number of codes K.
        code_dim: dimension D of a code.
        commitment_weight: beta, on the encoder's term (VQ-VAE, eq. 3).
        temperature: temperature of that softmax; with lower values the gradient reaches fewer codes.
        entropy_weight: weight of a loss that draws each vector to one code and makes all codes equally frequent.
    """

    refused: ClassVar = {
        "gradient": "index backpropagation has its own gradient; use vq for straight-through or rotation",
        "revive_below": "each step's gradient reaches all codes, so there is nothing to revive",
    }

    def __init__(
        self,
        codebook_size: int = 512,
        code_dim: int = 8,
        commitment_weight: float = 0.5,
        temperature: float = 0.5,
        entropy_weight: float = 0.1,
    ):
        super().__init__()
        require_size("codebook_size", codebook_size, MAX_CODES)
        require_size("code_dim", code_dim, MAX_DIM)
        require_weights(commitment_weight=commitment_weight, entropy_weight=entropy_weight)
        require(temperature > 0, f"temperature={temperature}: must be above 0")
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.commitment_weight = commitment_weight
        self.temperature = temperature
        self.entropy_weight = entropy_weight
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Quantizes vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and the loss."""
        indices = nearest_code(z.detach().flatten(0, 1), self.codebook.detach()).view(z.shape[:2])
        z_q = F.embedding(indices, self.codebook)
        if not torch.is_grad_enabled():  # skips the softmax, which only serves the gradient
            return QuantizerOutput(z_q, indices[..., None], vq_loss(z, z_q, self.commitment_weight))
        target = self.codebook.detach()
        soft, each, mean = soft_assignment(z.flatten(0, 1), self.codebook, self.temperature, target)
        z_q = z_q + (soft - soft.detach()).view_as(z)  # (one-hot + p - sg(p)) times the codebook
        loss = vq_loss(z, z_q, self.commitment_weight)
        if self.training and self.entropy_weight:
            loss = loss + self.entropy_weight * entropy_loss(each, mean)
        return QuantizerOutput(z_q, indices[..., None], loss)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        return F.embedding(codes[..., 0], self.codebook)
