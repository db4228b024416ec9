"""Raster order: line by line, as one reads."""

from collections.abc import Sequence
from math import prod


def raster(shapes: Sequence[tuple[int, ...]]) -> Sequence[int]:
    """The number of the code that each place of the sequence holds: 0, 1, 2, ... by definition.

    Codes are counted map by map from coarse to fine, then line by line, the Q codes of a position together (RQ-VAE's
    order).
    """
    return range(sum(prod(shape) for shape in shapes))
