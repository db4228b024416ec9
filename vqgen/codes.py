"""The one abstraction between the stages: code maps <-> one token sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class CodeLayout:
    """Converts code maps of given shapes to one sequence of N tokens, and back.

    Every codebook of every map has its own range of token ids, so a token id also identifies its codebook. A map with Q
    codebooks is written position by position; the Q codes of a position stay together (RQ-VAE's order).

    Attributes:
        shapes: (Q, *S) of each map, coarse to fine.
        codebook_sizes: K of each map's codebooks.
    """

    shapes: tuple[tuple[int, ...], ...]
    codebook_sizes: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """Number of token ids: the sum of all codebooks' sizes."""
        return sum(shape[0] * size for shape, size in zip(self.shapes, self.codebook_sizes, strict=True))

    @property
    def num_tokens(self) -> int:
        """Length N of the sequence."""
        return sum(prod(shape) for shape in self.shapes)

    def flatten(self, codes: Sequence[Tensor]) -> Tensor:
        """Code maps [(B, Q, *S), ...] to tokens (B, N)."""
        tokens = [
            rearrange(c + offset, "b q ... -> b (...) q")
            for c, offset in zip(codes, self._offsets(codes[0].device), strict=True)
        ]
        return torch.cat([rearrange(t, "b s q -> b (s q)") for t in tokens], dim=1)

    def unflatten(self, tokens: Tensor) -> list[Tensor]:
        """Tokens (B, N) to code maps [(B, Q, *S), ...]."""
        parts = tokens.split([prod(shape) for shape in self.shapes], dim=1)
        codes = [
            rearrange(part, "b (s q) -> b q s", q=shape[0]).reshape(-1, *shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]
        return [c - offset for c, offset in zip(codes, self._offsets(tokens.device), strict=True)]

    def token_ranges(self) -> Tensor:
        """(N, 2) int64: the legal token ids at each position go from the first number to one below the second."""
        ones = [torch.zeros(1, *shape, dtype=torch.int64) for shape in self.shapes]
        first = self.flatten(ones)[0]
        sizes = torch.cat([torch.full((prod(s),), k) for s, k in zip(self.shapes, self.codebook_sizes, strict=True)])
        return torch.stack([first, first + sizes], dim=1)

    def _offsets(self, device: torch.device) -> list[Tensor]:
        """For each map, the first token id of each of its codebooks, in a shape that broadcasts to (B, Q, *S)."""
        offsets, start = [], 0
        for shape, size in zip(self.shapes, self.codebook_sizes, strict=True):
            offset = start + size * torch.arange(shape[0], device=device)
            offsets.append(offset.view(-1, *[1] * (len(shape) - 1)))
            start += shape[0] * size
        return offsets
