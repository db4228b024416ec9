"""Tokenizers: image -> code maps -> image. Each architecture has its own file."""

from typing import Any

from vqgen.errors import require_choice, require_options
from vqgen.tokenizers.light import Light
from vqgen.tokenizers.vqgan import VQGAN
from vqgen.tokenizers.vqmodel import VQModel

__all__ = ["ARCHITECTURES", "VQGAN", "Light", "VQModel", "build_tokenizer"]

ARCHITECTURES: dict[str, type[VQModel]] = {"light": Light, "vqgan": VQGAN}


def build_tokenizer(name: str = "light", **options: Any) -> VQModel:
    """A tokenizer of the architecture with this name, with these options and new weights.

    Raises:
        InputError: no architecture has this name, or the architecture does not take an option or its value.
    """
    require_choice("name", name, ARCHITECTURES, "architecture")
    require_options(ARCHITECTURES[name], name, options)
    return ARCHITECTURES[name](**options)
