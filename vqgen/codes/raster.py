"""Raster order: line by line, from left to right."""

from collections.abc import Sequence
from math import prod


def raster(shapes: Sequence[tuple[int, ...]]) -> Sequence[int]:
    """For each place of the sequence, the number of its code: here simply 0, 1, 2, ...

    All orders number the codes in raster order: map by map from coarse to fine, in a map line by line, with the Q codes
    of a position together (RQ-VAE's order).
    """
    return range(sum(prod(shape) for shape in shapes))
