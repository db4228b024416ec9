"""The common part of all tokenizers: an encoder, a quantizer and a decoder of any architecture."""

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from vqgen.codes import CodeLayout, shown, sides
from vqgen.errors import InputError, expanded, require, require_choice, section
from vqgen.quantizers import Quantizer, QuantizerOutput, Replacements, build_quantizer, quantizer_options
from vqgen.tokenizers.blocks import Stack
from vqgen.tokenizers.latents import Transform

CARD = """---
library_name: vqgen
---

# An image tokenizer of vqgen

```python
from vqgen import VQModel
tokenizer = VQModel.from_pretrained(".")  # the path of this folder
```
"""

# The parts that `freeze` keeps, and their networks.
PARTS = {"encoder": ("encoder", "to_code"), "quantizer": ("quantizer",), "decoder": ("from_code", "decoder")}


class VQModel(nn.Module, PyTorchModelHubMixin):
    """Image -> grid of codes -> image (VQ-VAE, van den Oord et al. 2017), with images in [-1, 1].

    An architecture is a subclass whose constructor makes the four networks around the quantizer. The constructor's
    arguments include `channels` and `quantizer`; each has a default, and a value that JSON can hold.

    Args:
        channels: channels of the images, 1 (grey) or 3 (RGB).
        stride: pixels per code along each side.
        quantizer: the quantizer's name and options, as for build_quantizer.

    Attributes:
        encoder: images (B, C, H, W) -> features (B, E, H / stride, W / stride).
        to_code: features -> vectors (B, D, H / stride, W / stride), where D is the quantizer's code_dim.
        from_code: quantized vectors -> the decoder's input.
        decoder: the decoder's input -> images (B, C, H, W).
        frozen: parts that do not learn; see `freeze`.
        codes_stay: whether the encoder and the quantizer are frozen, so that all images keep their codes.
    """

    encoder: nn.Module
    to_code: nn.Module
    quantizer: Quantizer
    from_code: nn.Module
    decoder: nn.Module
    frozen: tuple[str, ...] = ()
    codes_stay = False

    def __init__(self, channels: int, stride: int, quantizer: dict[str, Any] | None):
        super().__init__()
        require(channels in (1, 3), f"channels={channels}: must be 1 or 3")
        self.channels = channels
        self.stride = stride
        with section("quantizer"):
            self.quantizer = build_quantizer(**(quantizer or {}))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer, for VQGAN's adaptive weight, and because Muon leaves it to AdamW."""
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Makes training compute the activations inside blocks a second time instead of keeping them: see `Stack`.

        Raises:
            InputError: the architecture has no `Stack`.
        """
        stacks = [module for module in self.modules() if isinstance(module, Stack)]
        require(bool(stacks), f"activation_checkpointing=true: {type(self).__name__} has no Stack of blocks; set false")
        for stack in stacks:
            stack.checkpointing = True

    def forward(
        self,
        x: Tensor,
        transform: Transform | None = None,
        replacements: Replacements | None = None,
        codes: Tensor | None = None,
    ) -> tuple[Tensor, list[QuantizerOutput]]:
        """Reconstructions of images (B, C, H, W), in the same shape, and the quantizer's output for each code map.

        Args:
            x: the images.
            transform: is applied to the encoder's vectors, so the reconstructions become those of the images so
                transformed.
            replacements: codes that the decoder sees replaced by near ones, in the first images.
            codes: (B, Q, *S) codes to decode instead of the images' own; only the decoder then has a gradient.
        """
        if codes is not None:
            z_q = self.quantizer.decode_codes(codes).detach()
            return self.decoder(self.from_code(z_q)), [QuantizerOutput(z_q, codes, z_q.new_zeros(()))]
        with torch.no_grad() if self.codes_stay else nullcontext():
            z = self.to_code(self.encoder(x))
            q = self.quantizer(z if transform is None else transform(z))
        if self.codes_stay:
            q = q._replace(loss=torch.zeros_like(q.loss))
        z_q = q.z_q if replacements is None else self.quantizer.perturbed(q, replacements)
        return self.decoder(self.from_code(z_q)), [q]

    def encode(self, x: Tensor) -> list[Tensor]:
        """The code maps [(B, Q, H / stride, W / stride)] of images (B, C, H, W), coarse to fine."""
        return [self.quantizer(self.to_code(self.encoder(x))).codes]

    def decode(self, codes: list[Tensor]) -> Tensor:
        """The images (B, C, H, W) of code maps from `encode`."""
        return self.decoder(self.from_code(self.quantizer.decode_codes(codes[0])))

    def freeze(self, parts: Collection[str]) -> None:
        """Keeps parts as they are from now on: no gradient, and no update or revival of codes in training mode either.

        With a frozen encoder the commitment term, which is the encoder's alone, has no weight.

        Args:
            parts: names in `PARTS`.

        Raises:
            InputError: there is no such part, or nothing is left that a gradient trains.
        """
        for part in parts:
            require_choice("freeze", part, PARTS, "part")
        self.frozen, self.codes_stay = tuple(parts), {"encoder", "quantizer"} <= {*parts}
        for name in (name for part in parts for name in PARTS[part]):
            getattr(self, name).requires_grad_(False)
        for module in self.quantizer.modules() if "encoder" in parts else ():
            if hasattr(module, "commitment_weight"):
                module.commitment_weight = 0.0  # type: ignore[assignment]
        some = any(parameter.requires_grad for parameter in self.parameters())
        require(some, f"freeze=[{','.join(parts)}]: leaves no weights that a gradient trains; freeze fewer parts")
        self.train(self.training)

    def train(self, mode: bool = True) -> "VQModel":
        """Sets the mode of all parts that are not frozen; those stay in eval mode."""
        super().train(mode)
        for name in (name for part in self.frozen for name in PARTS[part]):
            getattr(self, name).eval()
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The architecture's name and all options, defaults included, as for `build_tokenizer`.

        Raises:
            InputError: the architecture has no name.
        """
        from vqgen.tokenizers import ARCHITECTURES  # imported here, because vqgen.tokenizers imports this module

        name = next((name for name, architecture in ARCHITECTURES.items() if architecture is type(self)), None)
        require(name is not None, f"{type(self).__name__} cannot be saved: it has no name in tokenizers.ARCHITECTURES")
        options: Any = self._hub_mixin_config  # the constructor's arguments, defaults included
        return {**options, "name": name, "quantizer": quantizer_options(**(options["quantizer"] or {}))}

    def code_layout(self, size: int | Sequence[int]) -> CodeLayout:
        """The code layout of images of size x size pixels, or of another height and width.

        Raises:
            InputError: a side is not divisible by the model's stride; the message calls the size image_size.
        """
        if any(side % self.stride or side < self.stride for side in sides(size)):
            below = [max(1, side // self.stride) * self.stride for side in sides(size)]
            above = [fits + self.stride * (fits != side) for fits, side in zip(below, sides(size), strict=True)]
            use = " or ".join(shown(fits[0] if isinstance(size, int) else fits) for fits in (below, above))
            raise InputError(
                f"image_size={shown(size)} is not divisible by the model's stride {self.stride}; use {use}"
            )
        height, width = (side // self.stride for side in sides(size))
        return CodeLayout(((self.quantizer.num_codebooks, height, width),), (self.quantizer.codebook_size,))

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Writes model.safetensors, and config.json with the architecture's name and all options, to a folder."""
        super().save_pretrained(folder, config=self.options)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """The README.md of save_pretrained, instead of huggingface_hub's, which says what is not so."""
        return ModelCard(CARD)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VQModel":
        """The tokenizer of a stage-1 or stage-2 run, or of a model's own folder, in eval mode.

        Raises:
            InputError: there is not a tokenizer, it does not load, or its architecture is not this class.
        """
        model = load_tokenizer(Path(folder))[0].requires_grad_()
        require(isinstance(model, cls), f"{folder}: its tokenizer is not a {cls.__name__} but a {type(model).__name__}")
        return model


def from_uint8(images: Tensor) -> Tensor:
    """Converts uint8 images to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Converts images in [-1, 1] to uint8; values outside the range are clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


def load_tokenizer(folder: Path) -> tuple[VQModel, str]:
    """The tokenizer of a stage-1 or stage-2 run, or of a model's own folder; and the SHA-256 of its two files.

    The model is in eval mode, and its weights are frozen.

    Raises:
        InputError: there is not a tokenizer, or it does not load.
    """
    from vqgen.tokenizers import ARCHITECTURES, build_tokenizer  # here, because vqgen.tokenizers imports this module

    folder = expanded(folder)
    places = [folder / "model" / "tokenizer", folder / "tokenizer", folder / "model"]  # stage-2 runs come first
    inside = next((place for place in places if place.is_dir()), folder)
    for name in ("config.json", "model.safetensors"):
        if not (inside / name).is_file():
            raise InputError(f"{folder} is not a tokenizer: it has no {name}; give a stage-1 run, such as runs/stage1")
    content = [(inside / name).read_bytes() for name in ("config.json", "model.safetensors")]
    try:
        options = {"name": "light"} | json.loads(content[0])  # the first versions had only this one, without a name
        if options["name"] == "light":
            options = {"block": "residual", "head_width": 0} | options  # the only ones before these options
        if options["name"] not in list(ARCHITECTURES):
            raise InputError(
                f"its architecture {options['name']!r} is not in this version of vqgen, "
                f"which has {', '.join(ARCHITECTURES)}; use the version that made it"
            )
        model = build_tokenizer(**options)
        model.load_state_dict(load(content[1]))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{inside} does not load as a tokenizer: {' '.join(str(error).split())[:200]}") from error
    return model.eval().requires_grad_(False), hashlib.sha256(b"".join(content)).hexdigest()
