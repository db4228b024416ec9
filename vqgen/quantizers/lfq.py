"""Lookup-free quantization: a code is the signs of its vector."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from vqgen.errors import require, require_size
from vqgen.quantizers.common import (
    MAX_CODES,
    Quantizer,
    QuantizerOutput,
    entropy,
    entropy_loss,
    require_weights,
    straight_through,
)


class LFQ(Quantizer):
    """Takes the sign of each of log2(K) dimensions as one bit of the code (MAGVIT-v2, Yu et al. 2023, section 3.1).

    Args:
        codebook_size: number of codes K, a power of two.
        spherical: whether vectors and codes are scaled to unit length first (BSQ, Zhao et al. 2024).
        commitment_weight: beta, on the encoder's term (VQ-VAE, eq. 3).
        entropy_weight: weight of a loss that draws each vector to one code and makes all codes equally frequent.
        diversity: weight (gamma) of the second aim, equal frequency, in that loss.
        entropy_temperature: temperature of the softmax over -distance^2 in that loss; the unit of distance is the size
            of a code's entries.
    """

    refused: ClassVar = {
        "code_dim": "it is log2 of the codebook_size; set that",
        "levels": "each dimension has two; set codebook_size, or use fsq",
        "revive_below": "it has no codebook, so there is nothing to revive; raise entropy_weight",
        "kmeans_iterations": "it has no codebook to initialise",
    }
    residual_scale = 0.5
    basis: Tensor  # (D,) the value of each bit

    def __init__(
        self,
        codebook_size: int = 512,
        spherical: bool = False,
        commitment_weight: float = 0.02,
        entropy_weight: float = 0.03,
        diversity: float = 1.0,
        entropy_temperature: float = 1.0,
    ):
        super().__init__()
        require_size("codebook_size", codebook_size, MAX_CODES)
        require_weights(commitment_weight=commitment_weight, entropy_weight=entropy_weight, diversity=diversity)
        require(entropy_temperature > 0, f"entropy_temperature={entropy_temperature}: must be above 0")
        code_dim = codebook_size.bit_length() - 1
        require(
            codebook_size == 2**code_dim > 1,
            f"codebook_size={codebook_size}: lfq needs a power of two; "
            f"use {2 ** max(1, code_dim)} or {2 ** (code_dim + 1)}",
        )
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.spherical = spherical
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.entropy_temperature = entropy_temperature
        self.scale = code_dim**-0.5 if spherical else 1.0
        self.register_buffer("basis", 2 ** torch.arange(code_dim - 1, -1, -1), persistent=False)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Quantizes vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and the loss."""
        z = F.normalize(z, dim=-1) if self.spherical else z
        codes = ((z > 0) * self.basis).sum(dim=-1, keepdim=True)
        z_q = self.decode(codes)
        loss = self.commitment_weight * F.mse_loss(z, z_q)
        if self.training and self.entropy_weight:
            loss = loss + self.entropy_weight * self._entropy_loss(z.flatten(0, 1))
        return QuantizerOutput(straight_through(z, z_q), codes, loss)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        return torch.where((codes & self.basis) > 0, self.scale, -self.scale)

    def _entropy_loss(self, z: Tensor) -> Tensor:
        """Mean entropy of p = softmax(-|z - code|^2 / temperature) over the codes, minus that of the mean p (eq. 5).

        p(code | z) is a product over the bits, so the bits are independent. A vector's entropy is therefore the sum of
        its bits' entropies, and the mean of p over the vectors is a matrix product: the probabilities of the first half
        of the bits times those of the second half. This is exact for any codebook and needs no (N, K) array.
        """
        logits = 4 * z / self.scale / self.entropy_temperature  # (N, D): logits of the bits being 1
        bits = torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=-1)  # (N, D, 2)
        first, second = (_products(part) for part in bits.split([self.code_dim // 2, (self.code_dim + 1) // 2], dim=1))
        mean = (first.T @ second / len(z)).flatten()  # (K,)
        return entropy_loss(entropy(bits).sum(dim=1).mean(), mean, self.diversity)


def _products(bits: Tensor) -> Tensor:
    """Probabilities (N, 2^D) of all combinations of bits, from the bits' (N, D, 2); the first bit counts most."""
    combinations = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(dim=1):
        combinations = rearrange(einsum(combinations, bit, "n c, n b -> n c b"), "n c b -> n (c b)")
    return combinations
