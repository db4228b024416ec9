"""vqgen: a two-stage image generator. Stage 1 turns images into discrete codes, stage 2 learns to write them.

The public names are imported when they are first used, so that `import vqgen` alone takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqgen.data.images import load_images
    from vqgen.generator import Generator
    from vqgen.priors.prior import Prior
    from vqgen.priors.sampling import sample_tokens
    from vqgen.quantizers import build_quantizer
    from vqgen.tokenizers import build_tokenizer
    from vqgen.tokenizers.vqmodel import VQModel

__version__ = "0.2.0"

__all__ = [
    "Generator",
    "Prior",
    "VQModel",
    "build_quantizer",
    "build_tokenizer",
    "load_images",
    "sample_tokens",
]

_MODULES = {
    "Generator": "vqgen.generator",
    "Prior": "vqgen.priors.prior",
    "VQModel": "vqgen.tokenizers.vqmodel",
    "build_quantizer": "vqgen.quantizers",
    "build_tokenizer": "vqgen.tokenizers",
    "load_images": "vqgen.data.images",
    "sample_tokens": "vqgen.priors.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
