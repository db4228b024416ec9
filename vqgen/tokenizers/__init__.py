"""Tokenizers: image -> code maps -> image. One file for each architecture."""

from typing import Any

from vqgen.errors import require_choice, require_options
from vqgen.tokenizers.light import Light
from vqgen.tokenizers.vqmodel import VQModel

__all__ = ["ARCHITECTURES", "Light", "VQModel", "build_tokenizer"]

ARCHITECTURES: dict[str, type[VQModel]] = {"light": Light}


def build_tokenizer(name: str = "light", **options: Any) -> VQModel:
    """The tokenizer whose architecture has this name, with these options and new weights.

    Raises:
        InputError: no architecture has this name; it does not take an option, or not with this value.
    """
    require_choice("name", name, ARCHITECTURES, "architecture")
    require_options(ARCHITECTURES[name], name, options)
    return ARCHITECTURES[name](**options)
