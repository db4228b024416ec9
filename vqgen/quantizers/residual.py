"""Residual quantization: each quantizer quantizes the residual of the quantizers before it."""

import functools
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vqgen.errors import require, require_size, section
from vqgen.quantizers.build import BASES, build, complete
from vqgen.quantizers.common import Quantizer, QuantizerOutput, gradient_estimator


class ResidualQuantizer(Quantizer):
    """Several quantizers whose vectors add up (RQ-VAE, Lee et al. 2022, eq. 3 and 4).

    Each level's commitment term reaches the encoder. The decoder's gradient passes all levels at once, so only the loss
    of an ibq level goes through its index.

    Args:
        base: the quantizer of each level
        num_quantizers: number of levels Q.
        gradient: how the decoder's gradient reaches the encoder, `straight-through` or `rotation`.
        dropout: share of the training images that keep only their first few levels, a random number of at least one, so
            that the first codes alone decode to an image.
    """

    scales: Tensor  # (Q, D)
    refused: ClassVar = {
        "codebook_size": "each level has its own; set base.codebook_size",
        "code_dim": "each level has it; set base.code_dim",
        "commitment_weight": "each level has its own; set base.commitment_weight",
    }

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        num_quantizers: int = 4,
        gradient: Literal["straight-through", "rotation"] = "straight-through",
        dropout: float = 0.0,
    ):
        super().__init__()
        base = base or {}
        require_size("num_quantizers", num_quantizers, 1000)
        require(0 <= dropout <= 1, f"dropout={dropout}: must be between 0 and 1")
        require(not (dropout and num_quantizers == 1), f"dropout={dropout}: one level has nothing to drop; set it to 0")
        require(
            base.get("gradient") != "rotation",
            "base.gradient=rotation: the decoder's gradient passes all levels at once; set gradient=rotation instead",
        )
        for option, unit, free in (("lookup", "cosine", "euclidean"), ("spherical", True, False)):
            require(
                base.get(option) != unit,
                f"base.{option}={unit}: drops the vectors' length, but the residual needs it; use {free}",
            )
        with section("base"):
            levels = [build(BASES, **base) for _ in range(num_quantizers)]
        self.levels = nn.ModuleList(levels)
        self.num_codebooks = num_quantizers
        self.codebook_size, self.code_dim = levels[0].codebook_size, levels[0].code_dim
        scale = torch.as_tensor(levels[0].residual_scale).expand(self.code_dim)
        self.register_buffer("scales", torch.stack([scale**i for i in range(num_quantizers)]), persistent=False)
        self.estimator = gradient_estimator(gradient, self.code_dim, getattr(levels[0], "temperature", 0.0))
        self.dropout = dropout

    @classmethod
    def complete(cls, options: dict[str, Any]) -> dict[str, Any]:
        with section("base"):
            return {**options, "base": complete(BASES, **(options["base"] or {}))}

    def bound(self, z: Tensor) -> Tensor:
        """Maps vectors (..., D) to the space of the levels' codes, once for all levels."""
        return self._levels()[0].bound(z)

    def quantize(self, z: Tensor) -> QuantizerOutput:
        """Quantizes bounded vectors z (B, N, D) to z_q (B, N, D), codes (B, N, Q) and the loss."""
        residual, z_q, codes, loss = z, torch.zeros_like(z), [], z.new_zeros(())
        kept = self._num_kept(z)  # (B, 1, 1)
        for i, (level, scale) in enumerate(zip(self._levels(), self.scales, strict=True)):
            q = level.quantize(residual / scale)
            part = q.z_q.detach() * scale
            residual = residual - part  # part is detached, so each level's commitment term reaches z
            z_q = z_q + torch.where(i < kept, part, 0.0)
            loss = loss + q.loss * scale.square().mean()  # in z's units, so that fine levels do not outweigh the others
            codes.append(q.codes)
        return QuantizerOutput(self.estimator(z, z_q), torch.cat(codes, dim=-1), loss)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., Q), or the first few of them, to vectors (..., D)."""
        parts = zip(self._levels(), self.scales, codes.split(1, dim=-1), strict=False)
        vectors = [level.decode(code) * scale for level, scale, code in parts]
        return functools.reduce(torch.add, vectors)  # the order of quantize, which gives the same bits

    def check_nearest(self, count: int) -> None:
        super().check_nearest(count)
        undone = "it would bring back levels that dropout leaves out; use dropout=0 in the quantizer"
        require(not self.dropout, f"nearest={count}: not with the quantizer's dropout={self.dropout}: {undone}")

    def neighbours(self, codes: Tensor, count: int) -> Tensor:
        """Each of the codes (N, Q), then the `count` others of its level nearest to it: (N, Q, 1 + count)."""
        levels = zip(self._levels(), codes.split(1, dim=-1), strict=True)
        return torch.cat([level.neighbours(code, count) for level, code in levels], dim=1)

    def _levels(self) -> list[Quantizer]:
        return list(self.levels)  # type: ignore[arg-type]

    def _num_kept(self, z: Tensor) -> Tensor:
        """The number of levels that each image keeps, (B, 1, 1)."""
        every = torch.full((len(z), 1, 1), self.num_codebooks, device=z.device)
        if not (self.training and self.dropout):
            return every
        some = torch.randint(1, self.num_codebooks + 1, every.shape, device=z.device)
        return torch.where(torch.rand(every.shape, device=z.device) < self.dropout, some, every)
