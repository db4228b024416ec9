"""Finite scalar quantization: each dimension is bounded and rounded by itself."""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from vqgen.errors import require
from vqgen.quantizers.common import MAX_CODES, Quantizer, QuantizerOutput, straight_through


class FSQ(Quantizer):
    """Rounds dimension i to levels[i] values in [-1, 1] (Mentzer et al. 2023, appendix A.1); no codebook and no loss.

    Args:
        levels: number of values in each dimension of the code; their product is the codebook's size.
    """

    _no_loss = "rounding needs no loss: there is no codebook that could collapse"
    refused: ClassVar = {
        "codebook_size": "it is the product of the levels; set levels",
        "code_dim": "it is the number of levels; set levels",
        "entropy_weight": _no_loss,
        "commitment_weight": _no_loss,
        "revive_below": "it has no codebook, so there is nothing to revive",
    }
    num_levels: Tensor  # (D,)
    basis: Tensor  # (D,) the amount that one level in each dimension adds to the code

    def __init__(self, levels: Sequence[int] = (8, 8, 8)):
        super().__init__()
        require(
            bool(levels) and min(levels) > 2,
            f"levels={list(levels)}: must be one or more, each above 2; lfq is for two levels a dimension",
        )
        self.codebook_size = prod(levels)
        fewer = "use fewer levels, or fewer dimensions"
        require(self.codebook_size <= MAX_CODES, f"levels={list(levels)}: have a product above 2^31; {fewer}")
        self.code_dim = len(levels)
        self.register_buffer("num_levels", torch.tensor(levels), persistent=False)
        basis = torch.tensor([prod(levels[:i]) for i in range(len(levels))])
        self.register_buffer("basis", basis, persistent=False)
        # Rounding leaves a residual of at most half a step, so the next quantizer's whole grid shrinks to half a step.
        self.residual_scale = 1 / (self.num_levels - 1 + self.num_levels % 2)  # (D,)

    def bound(self, z: Tensor) -> Tensor:
        """Maps vectors (..., D) by a tanh to a range slightly larger than that of the levels, so z reaches them all."""
        # An even number of levels L covers [-L / 2, L / 2 - 1] / (L / 2), an odd one all of [-1, 1]; zero stays zero.
        half = (self.num_levels - 1) * 1.001 / 2
        offset = 0.5 * (self.num_levels % 2 == 0)
        return (torch.tanh(z + torch.atanh(offset / half)) * half - offset) / (self.num_levels // 2)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Quantizes bounded vectors z (B, N, D) to z_q (B, N, D), codes (B, N, 1) and a loss of zero."""
        half = self.num_levels // 2
        steps = torch.nan_to_num(z.detach() * half).round()
        level = steps.clamp(-half, self.num_levels - 1 - half).long() + half
        codes = (level * self.basis).sum(dim=-1, keepdim=True)
        return QuantizerOutput(straight_through(z, self.decode(codes)), codes, z.new_zeros(()))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to vectors (..., D)."""
        level = codes // self.basis % self.num_levels
        return (level - self.num_levels // 2).float() / (self.num_levels // 2)
