"""Inputs and settings that the tests of several quantizers share."""

from collections.abc import Callable

import torch
from torch import Tensor

from vqgen.quantizers import Quantizer, QuantizerOutput, build_quantizer

# Each quantizer, and each option that changes its path through the code; all have 64 codes, or 64 per level.
VARIANTS = {
    "ema": {"name": "ema", "codebook_size": 64, "code_dim": 4},
    "ema, cosine": {"name": "ema", "codebook_size": 64, "code_dim": 4, "lookup": "cosine"},
    "ema, rotation": {"name": "ema", "codebook_size": 64, "code_dim": 4, "gradient": "rotation"},
    "ema, entropy": {"name": "ema", "codebook_size": 64, "code_dim": 4, "entropy_weight": 0.1},
    "vq": {"name": "vq", "codebook_size": 64, "code_dim": 4},
    "vq, cosine": {"name": "vq", "codebook_size": 64, "code_dim": 4, "lookup": "cosine", "entropy_weight": 0.1},
    "vq, legacy beta": {"name": "vq", "codebook_size": 64, "code_dim": 4, "legacy_beta": True},
    "vq, rotation": {"name": "vq", "codebook_size": 64, "code_dim": 4, "gradient": "rotation"},
    "simvq": {"name": "simvq", "codebook_size": 64, "code_dim": 4},
    "fsq": {"name": "fsq", "levels": [4, 4, 4]},
    "fsq, odd": {"name": "fsq", "levels": [7, 3, 3]},
    "lfq": {"name": "lfq", "codebook_size": 64},
    "lfq, spherical": {"name": "lfq", "codebook_size": 64, "spherical": True},
    "ibq": {"name": "ibq", "codebook_size": 64, "code_dim": 4},
    "gumbel": {"name": "gumbel", "codebook_size": 64, "code_dim": 4},
    "residual of ema": {
        "name": "residual",
        "num_quantizers": 3,
        "base": {"name": "ema", "codebook_size": 64, "code_dim": 4},
    },
    "residual of vq": {
        "name": "residual",
        "num_quantizers": 3,
        "gradient": "rotation",
        "base": {"name": "vq", "codebook_size": 64, "code_dim": 4},
    },
    "residual of simvq": {
        "name": "residual",
        "num_quantizers": 2,
        "base": {"name": "simvq", "codebook_size": 64, "code_dim": 4},
    },
    "residual of fsq": {"name": "residual", "num_quantizers": 3, "base": {"name": "fsq", "levels": [4, 4, 4]}},
    "residual of lfq": {"name": "residual", "num_quantizers": 3, "base": {"name": "lfq", "codebook_size": 64}},
    "residual of ibq": {
        "name": "residual",
        "num_quantizers": 2,
        "base": {"name": "ibq", "codebook_size": 64, "code_dim": 4},
    },
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(variant: str, **options) -> Quantizer:
    """Builds the variant from the same random state each time."""
    torch.manual_seed(0)
    return build_quantizer(**{**VARIANTS[variant], **options})


def trained(variant: str, steps: int = 3, **options) -> Quantizer:
    """The variant after some training steps on random vectors."""
    quantizer = built(variant, **options).train()
    for step in range(steps):
        quantizer(random(16, quantizer.code_dim, 32, seed=100 + step))
    return quantizer


def seeded(quantizer: Callable[[Tensor], QuantizerOutput], z: Tensor) -> QuantizerOutput:
    """The output for z, with the same draws each time."""
    torch.manual_seed(0)
    return quantizer(z)


def as_map(vectors: Tensor, batch: int) -> Tensor:
    """Vectors (N, D) as z (B, D, N / B)."""
    return vectors.view(batch, -1, vectors.shape[1]).movedim(-1, 1)
