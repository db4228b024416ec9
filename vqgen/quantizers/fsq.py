"""Finite scalar quantization: each dimension is bounded and rounded by itself."""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from vqgen.config import require
from vqgen.quantizers.common import Quantizer, QuantizerOutput, straight_through


class FSQ(Quantizer):
    """Rounds dimension i to levels[i] values in [-1, 1] (Mentzer et al. 2023, appendix A.1); no codebook and no loss.

    Args:
        levels: number of values of each dimension: as many as the code has dimensions, and their product is the
            codebook's size.
    """

    _no_loss = "rounding needs no loss: it has no codebook, and nothing that could collapse"
    refused: ClassVar = {
        "codebook_size": "it is the product of model.quantizer.levels; set those",
        "code_dim": "it is the number of model.quantizer.levels; set those",
        "entropy_weight": _no_loss,
        "commitment_weight": _no_loss,
        "revive_below": "it has no codebook, so there is nothing to revive",
    }
    num_levels: Tensor  # (D,)
    basis: Tensor  # (D,) what a step in each dimension adds to the code

    def __init__(self, levels: Sequence[int] = (8, 8, 8)):
        super().__init__()
        require(bool(levels) and min(levels) > 1, f"levels={list(levels)}: must be one or more, each above 1")
        self.codebook_size = prod(levels)
        self.code_dim = len(levels)
        self.residual_scale = 1 / (min(levels) - 1)
        self.register_buffer("num_levels", torch.tensor(levels), persistent=False)
        basis = torch.tensor([prod(levels[:i]) for i in range(len(levels))])
        self.register_buffer("basis", basis, persistent=False)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and a loss of zero."""
        # tanh to (-half, half), of which an even number of levels takes [-L / 2, L / 2 - 1], an odd one all
        half = (self.num_levels - 1) * 1.001 / 2  # a little more, or the outermost values are never reached
        offset = 0.5 * (self.num_levels % 2 == 0)
        bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        rounded = straight_through(bounded, bounded.round())
        codes = ((rounded.detach().long() + self.num_levels // 2) * self.basis).sum(dim=-1, keepdim=True)
        return QuantizerOutput(rounded / (self.num_levels // 2), codes, z.new_zeros(()))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        level = codes // self.basis % self.num_levels
        return (level - self.num_levels // 2).float() / (self.num_levels // 2)
