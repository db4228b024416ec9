"""Codes drawn by their probabilities, with the gradient of Gumbel-softmax."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.errors import require, require_size
from vqgen.quantizers.common import MAX_CODES, MAX_DIM, Quantizer, QuantizerOutput, require_weights


class GumbelQuantizer(Quantizer):
    """Takes the likeliest code under softmax(W z + b), and draws one in training (Jang et al. 2016, eq. 1 and 2).

    The forward pass has the drawn code, the backward pass the gradient of the softmax at a temperature (the paper's
    straight-through estimator). The loss is the divergence of the probabilities from equal ones, as in DALL-E's dVAE.
    The authors lower the temperature during training; here it stays. Training makes arrays of all K probabilities.

    Args:
        codebook_size: number of codes K.
        code_dim: dimension D of a code.
        temperature: temperature of the softmax that gives the gradient; with lower values it is less smooth.
        kl_weight: weight of the divergence of the codes' probabilities from equal ones, in nats.
    """

    refused: ClassVar = {
        "commitment_weight": "no vector has a distance to its code; set kl_weight",
        "lookup": "a linear map of the vector gives each code's probability",
        "gradient": "it has the gradient of Gumbel-softmax; use vq for straight-through or rotation",
        "revive_below": "any code may be drawn, so there is nothing to revive; raise kl_weight",
        "kmeans_iterations": "a code need not be near its vectors, so there is nothing to initialise",
    }

    def __init__(self, codebook_size: int = 512, code_dim: int = 8, temperature: float = 1.0, kl_weight: float = 5e-4):
        super().__init__()
        require_size("codebook_size", codebook_size, MAX_CODES)
        require_size("code_dim", code_dim, MAX_DIM)
        require_weights(kl_weight=kl_weight)
        require(temperature > 0, f"temperature={temperature}: must be above 0")
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.temperature = temperature
        self.kl_weight = kl_weight
        self.projection = nn.Linear(code_dim, codebook_size)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Quantizes vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and the loss."""
        logits = self.projection(z)  # (B, N, K)
        scores = logits - torch.empty_like(logits).exponential_().log() if self.training else logits
        indices = scores.argmax(dim=-1)
        soft = torch.softmax(scores / self.temperature, dim=-1) @ self.codebook.detach()
        z_q = F.embedding(indices, self.codebook) + (soft - soft.detach())
        log_p = F.log_softmax(logits, dim=-1)
        divergence = (log_p.exp() * log_p).sum(dim=-1).mean() + math.log(self.codebook_size)
        return QuantizerOutput(z_q, indices[..., None], self.kl_weight * divergence)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        return F.embedding(codes[..., 0], self.codebook)
