"""Code maps <-> one token sequence, and the orders in which the sequence can be written."""

from collections.abc import Callable, Sequence

from vqgen.codes.layout import CodeLayout, shown, sides
from vqgen.codes.raster import raster

__all__ = ["ORDERS", "CodeLayout", "raster", "shown", "sides"]

# Functions from the shapes (Q, *S) of the code maps to an order of their codes; `raster` defines the codes' numbers.
ORDERS: dict[str, Callable[[Sequence[tuple[int, ...]]], Sequence[int]]] = {"raster": raster}
