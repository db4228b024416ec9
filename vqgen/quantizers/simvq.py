"""SimVQ: a frozen codebook followed by a trained linear map."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.errors import require_size
from vqgen.quantizers.common import (
    MAX_CODES,
    MAX_DIM,
    Quantizer,
    QuantizerOutput,
    gradient_estimator,
    nearest_code,
    require_weights,
    vq_loss,
)


class SimVQ(Quantizer):
    """Uses the codebook C W, with a frozen random C (K, D) and a trained W (D, D) (Zhu et al. 2024, algorithm 1).

    Training W moves all codes at once, so unused codes do not stay behind.

    Args:
        codebook_size: number of codes K.
        code_dim: dimension D of a code.
        gradient: how the decoder's gradient reaches the encoder, `straight-through` or `rotation`.
        commitment_weight: beta, on the encoder's term (VQ-VAE, eq. 3).
    """

    refused: ClassVar = {
        "revive_below": "the linear map moves all codes at once, so there is nothing to revive",
        "kmeans_iterations": "the codebook is frozen; only a linear map of it is trained",
        "decay": "the linear map is trained by gradient, not by running averages",
    }
    frozen_codebook: Tensor  # (K, D)

    def __init__(
        self,
        codebook_size: int = 512,
        code_dim: int = 8,
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        commitment_weight: float = 0.25,
    ):
        super().__init__()
        require_size("codebook_size", codebook_size, MAX_CODES)
        require_size("code_dim", code_dim, MAX_DIM)
        require_weights(commitment_weight=commitment_weight)
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.estimator = gradient_estimator(gradient, code_dim)
        self.commitment_weight = commitment_weight
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, code_dim) * code_dim**-0.5)
        self.projection = nn.Linear(code_dim, code_dim, bias=False)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Quantizes vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and the loss."""
        codebook = self.projection(self.frozen_codebook)  # (K, D)
        indices = nearest_code(z.detach().flatten(0, 1), codebook.detach()).view(z.shape[:2])
        z_q = F.embedding(indices, codebook)
        loss = vq_loss(z, z_q, self.commitment_weight)
        return QuantizerOutput(self.estimator(z, z_q), indices[..., None], loss)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        return F.embedding(codes[..., 0], self.projection(self.frozen_codebook))
