"""What every quantizer shares: the return shape, the straight-through estimator, the lookup."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

LOOKUP_ELEMENTS = 1 << 22  # scores held at a time: 16 MB of fp32, whatever the number of vectors


class QuantizerOutput(NamedTuple):
    """What a quantizer returns, always.

    Attributes:
        z_q: (B, D, *S) the quantized vectors, whose gradient reaches z.
        codes: (B, Q, *S) int64 indices into the codebook; never squeezed, also when Q = 1.
        loss: scalar, already weighted.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor


class Quantizer(nn.Module):
    """The interface of every quantizer: vectors to codes and back.

    Attributes:
        codebook_size: number of codes K.
        num_codebooks: codes per position Q; 1 except for residual quantizers.
        code_dim: dimension D of the vectors.
    """

    codebook_size: int
    num_codebooks: int
    code_dim: int

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantizes z of shape (B, D, *S)."""
        raise NotImplementedError

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, Q, *S) to vectors (B, D, *S)."""
        raise NotImplementedError


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """Returns z_q, bit for bit, with the gradient of the identity in z (VQ-VAE, section 3.2)."""
    return z_q.detach() + (z - z.detach())


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the Euclidean-nearest codebook row of each vector: (N, D), (K, D) -> (N,) int64.

    argmin |z - e|^2 = argmax z.e - |e|^2 / 2, so one matrix multiply does it; N is taken in chunks, so that the
    (N, K) scores never exist at once. Call it in fp32: bf16 distances confuse near codes.
    """
    bias = -0.5 * codebook.square().sum(dim=1)
    chunk = max(1, LOOKUP_ELEMENTS // codebook.shape[0])
    return torch.cat([torch.addmm(bias, part, codebook.T).argmax(dim=1) for part in z.split(chunk)])
