"""The one abstraction between the stages: code maps <-> one token sequence."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image size, which is the side of a square or the two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def shown(size: int | Sequence[int]) -> str:
    """An image size as the command line takes it: 64 or [64,96]."""
    return str(size) if isinstance(size, int) else f"[{','.join(map(str, size))}]"


@dataclass(frozen=True)
class CodeLayout:
    """Converts code maps of given shapes to one sequence of N tokens, and back.

    Every codebook of every map has its own range of token ids, so a token id also identifies its codebook.

    Attributes:
        shapes: (Q, *S) of each map, coarse to fine.
        codebook_sizes: K of each map's codebooks.
        order: name of the order of the codes in the sequence, a key of `vqgen.codes.ORDERS`.
    """

    shapes: tuple[tuple[int, ...], ...]
    codebook_sizes: tuple[int, ...]
    order: str = "raster"

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
        return self.in_order([c + offset for c, offset in zip(codes, self._offsets(codes[0].device), strict=True)])

    def in_order(self, maps: Sequence[Tensor]) -> Tensor:
        """Values [(B, Q, *S), ...] for each code, such as masks, to (B, N) in the order of the tokens."""
        flat = torch.cat([rearrange(rearrange(m, "b q ... -> b (...) q"), "b s q -> b (s q)") for m in maps], dim=1)
        places = _places(self.order, self.shapes)
        return flat if places is None else flat[:, places.to(flat.device)]

    def unflatten(self, tokens: Tensor) -> list[Tensor]:
        """Tokens (B, N) to code maps [(B, Q, *S), ...]."""
        places = _places(self.order, self.shapes)
        if places is not None:
            tokens = tokens[:, places.argsort().to(tokens.device)]  # (B, N) in raster order
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
        sizes = (
            self.flatten([torch.full((1, *s), k) for s, k in zip(self.shapes, self.codebook_sizes, strict=True)])[0]
            - first
        )
        return torch.stack([first, first + sizes], dim=1)

    def _offsets(self, device: torch.device) -> list[Tensor]:
        """For each map, the first token id of each of its codebooks, in a shape that broadcasts to (B, Q, *S)."""
        offsets, start = [], 0
        for shape, size in zip(self.shapes, self.codebook_sizes, strict=True):
            offset = start + size * torch.arange(shape[0], device=device)
            offsets.append(offset.view(-1, *[1] * (len(shape) - 1)))
            start += shape[0] * size
        return offsets


@functools.cache
def _places(order: str, shapes: tuple[tuple[int, ...], ...]) -> Tensor | None:
    """For each place of the sequence, its code's number in raster order, (N,); None for raster order itself."""
    from vqgen.codes import ORDERS  # imported here, because vqgen.codes imports this module

    places = list(ORDERS[order](shapes))
    assert sorted(places) == list(range(len(places))), f"the order {order} does not hold each code once"
    return None if places == sorted(places) else torch.tensor(places)
