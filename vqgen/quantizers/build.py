"""From names and options, as they stand in a configuration, to quantizers."""

from collections.abc import Mapping
from typing import Any

from vqgen.cli.reflect import check_options
from vqgen.errors import InputError, require, require_size
from vqgen.quantizers.common import Quantizer
from vqgen.quantizers.ema import EMAQuantizer
from vqgen.quantizers.fsq import FSQ
from vqgen.quantizers.ibq import IBQ
from vqgen.quantizers.lfq import LFQ
from vqgen.quantizers.simvq import SimVQ
from vqgen.quantizers.vq import VQQuantizer

# Those that can be a level of a residual quantizer.
BASES: dict[str, type[Quantizer]] = {
    "ema": EMAQuantizer,
    "vq": VQQuantizer,
    "simvq": SimVQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "ibq": IBQ,
}

MOST = {"codebook_size": 1 << 31, "code_dim": 1 << 16, "kmeans_iterations": 1000, "num_quantizers": 1000}


def complete_options(
    quantizers: Mapping[str, type[Quantizer]], where: str, name: str = "ema", **options: Any
) -> dict[str, Any]:
    """The quantizer's name and all of its options, with the defaults of those that are not given.

    Raises:
        InputError: no quantizer has this name, or it does not take an option; `where` is the options' section.
    """
    if name not in quantizers:
        raise InputError(f"{where}.name={name}: no such quantizer; there is {', '.join(quantizers)}")
    quantizer = quantizers[name]
    for key in options:
        if reason := quantizer.refused.get(key):
            raise InputError(f"{where}.{key}={options[key]}: {name} has no such option: {reason}")
    options = check_options(quantizer, options, where)
    for key, value in options.items():
        if key in MOST:
            require_size(f"{where}.{key}", value, MOST[key], least=0 if key == "kmeans_iterations" else 1)
        if key.endswith("_weight") or key == "diversity":
            require(value >= 0, f"{where}.{key}={value}: must be 0 or more")
        if key == "entropy_temperature":
            require(value > 0, f"{where}.{key}={value}: must be above 0")
    try:
        return {"name": name, **quantizer.complete(options)}
    except InputError as error:
        raise InputError(f"{where}.{error}") from None


def build(quantizers: Mapping[str, type[Quantizer]], where: str, **options: Any) -> Quantizer:
    """The quantizer that these options name and describe.

    Raises:
        InputError: as complete_options, or the options do not go together.
    """
    options = complete_options(quantizers, where, **options)
    try:
        return quantizers[options.pop("name")](**options)
    except InputError as error:
        raise InputError(f"{where}.{error}") from None
