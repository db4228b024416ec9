"""Quantizers: z (B, D, *S) in; z_q, codes and loss out. One file each."""

from typing import Any

from vqgen.config import check_options, require
from vqgen.errors import InputError
from vqgen.quantizers.common import Quantizer, QuantizerOutput
from vqgen.quantizers.ema import EMAQuantizer

__all__ = ["QUANTIZERS", "EMAQuantizer", "Quantizer", "QuantizerOutput", "build_quantizer", "quantizer_options"]

QUANTIZERS: dict[str, type[Quantizer]] = {"ema": EMAQuantizer}


def quantizer_options(name: str = "ema", **options: Any) -> dict[str, Any]:
    """The quantizer's name and all of its options, with the defaults of those that are not given.

    Raises:
        InputError: no quantizer has this name, or it does not take an option.
    """
    if name not in QUANTIZERS:
        raise InputError(f"model.quantizer.name={name}: no such quantizer; there is {', '.join(QUANTIZERS)}")
    complete = check_options(QUANTIZERS[name], options, "model.quantizer")
    for key in ("codebook_size", "code_dim"):
        require(complete.get(key, 1) > 0, f"model.quantizer.{key}={complete.get(key)}: must be at least 1")
    return {"name": name, **complete}


def build_quantizer(**options: Any) -> Quantizer:
    """The quantizer that these options name and describe; errors as in quantizer_options."""
    options = quantizer_options(**options)
    return QUANTIZERS[options.pop("name")](**options)
