"""Builds a quantizer from its name and options."""

import inspect
from collections.abc import Mapping
from typing import Any

from vqgen.errors import require_choice, require_options
from vqgen.quantizers.common import Quantizer
from vqgen.quantizers.ema import EMAQuantizer
from vqgen.quantizers.fsq import FSQ
from vqgen.quantizers.ibq import IBQ
from vqgen.quantizers.lfq import LFQ
from vqgen.quantizers.simvq import SimVQ
from vqgen.quantizers.vq import VQQuantizer

# The quantizers that can be a level of a residual quantizer.
BASES: dict[str, type[Quantizer]] = {
    "ema": EMAQuantizer,
    "vq": VQQuantizer,
    "simvq": SimVQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "ibq": IBQ,
}


def complete(quantizers: Mapping[str, type[Quantizer]], name: str = "ema", **options: Any) -> dict[str, Any]:
    """A quantizer's name and all of its options: the given ones, and the constructor's defaults for the rest.

    Raises:
        InputError: no quantizer has this name, or the quantizer does not take an option.
    """
    require_choice("name", name, quantizers, "quantizer")
    quantizer = quantizers[name]
    require_options(quantizer, name, options)
    defaults = {key: p.default for key, p in inspect.signature(quantizer).parameters.items()}
    return {"name": name, **quantizer.complete(defaults | options)}


def build(quantizers: Mapping[str, type[Quantizer]], name: str = "ema", **options: Any) -> Quantizer:
    """The quantizer with this name and these options.

    Raises:
        InputError: as in `complete`; or an option is out of its range, or two options contradict each other.
    """
    require_choice("name", name, quantizers, "quantizer")
    require_options(quantizers[name], name, options)
    return quantizers[name](**options)
