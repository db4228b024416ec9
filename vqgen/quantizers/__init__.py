"""Quantizers: they take z (B, D, *S) and return z_q, codes and a loss. Each has its own file."""

from typing import Any

from vqgen.quantizers.build import BASES, build, complete
from vqgen.quantizers.common import LEARNING, Quantizer, QuantizerOutput, Replacements
from vqgen.quantizers.ema import EMAQuantizer
from vqgen.quantizers.fsq import FSQ
from vqgen.quantizers.gumbel import GumbelQuantizer
from vqgen.quantizers.ibq import IBQ
from vqgen.quantizers.lfq import LFQ
from vqgen.quantizers.residual import ResidualQuantizer
from vqgen.quantizers.simvq import SimVQ
from vqgen.quantizers.vq import VQQuantizer

__all__ = [
    "BASES",
    "FSQ",
    "IBQ",
    "LEARNING",
    "LFQ",
    "QUANTIZERS",
    "EMAQuantizer",
    "GumbelQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "Replacements",
    "ResidualQuantizer",
    "SimVQ",
    "VQQuantizer",
    "build_quantizer",
    "quantizer_options",
]

QUANTIZERS: dict[str, type[Quantizer]] = {**BASES, "gumbel": GumbelQuantizer, "residual": ResidualQuantizer}


def quantizer_options(name: str = "ema", **options: Any) -> dict[str, Any]:
    """A quantizer's name and all of its options, defaults included; raises the same errors as build.complete."""
    return complete(QUANTIZERS, name, **options)


def build_quantizer(name: str = "ema", **options: Any) -> Quantizer:
    """The quantizer with this name and these options; raises the same errors as build.build."""
    return build(QUANTIZERS, name, **options)
