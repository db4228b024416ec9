"""SimVQ: a frozen codebook, seen through a linear map that is trained."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.quantizers.common import (
    ESTIMATORS,
    Quantizer,
    QuantizerOutput,
    nearest_code,
    require_rotation_means_something,
    vq_loss,
)


class SimVQ(Quantizer):
    """The codebook is C W, with a frozen random C (K, D) and a trained W (D, D) (Zhu et al. 2024, algorithm 1).

    Training moves all codes at once, used or not, so none is left behind to die.

    Args:
        codebook_size: number of codes K.
        code_dim: dimension D of a code.
        gradient: what passes the decoder's gradient on to the encoder, `straight-through` or `rotation`.
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
        require_rotation_means_something(gradient, code_dim)
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.estimator = ESTIMATORS[gradient]
        self.commitment_weight = commitment_weight
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, code_dim) * code_dim**-0.5)
        self.projection = nn.Linear(code_dim, code_dim, bias=False)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and the loss."""
        codebook = self.projection(self.frozen_codebook)  # (K, D)
        indices = nearest_code(z.detach().flatten(0, 1), codebook.detach()).view(z.shape[:2])
        z_q = F.embedding(indices, codebook)
        loss = vq_loss(z, z_q, self.commitment_weight)
        return QuantizerOutput(self.estimator(z, z_q), indices[..., None], loss)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        return F.embedding(codes[..., 0], self.projection(self.frozen_codebook))
