"""The plain GAN: a generator and a discriminator of convolutions and batch normalisation."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from vqgen.codes import shown, sides
from vqgen.errors import InputError, require_size

SETTLING_BATCH = 64
MAX_WIDTH = 1 << 14


CARD = """---
library_name: vqgen
---

# The generator of a plain GAN of vqgen

```python
from vqgen import Generator
generator = Generator.from_pretrained("..")  # the path of the folder that holds this folder, generator/
```
"""


class DCGANGenerator(nn.Module, PyTorchModelHubMixin):
    """Turns noise, and a class if there are classes, into an image (DCGAN, Radford et al. 2016, section 3).

    The noise becomes 4x4 pixels of many channels; each layer then doubles the side and halves the channels. Images that
    are no squares begin with 4 pixels along their shorter side.

    Args:
        image_size: side of the images, 8 pixels times a power of two; or height and width, of which the longer one is
            a multiple of a quarter of the shorter one.
        channels: channels of the images.
        class_names: the classes in the order of their ids; empty if there are none.
        latent_dim: dimension of the noise z.
        width: channels before the last layer, at half the side; each earlier layer has twice as many, up to 8 * width.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        class_names: Sequence[str],
        latent_dim: int = 100,
        width: int = 32,
    ):
        super().__init__()
        require_size("latent_dim", latent_dim, MAX_WIDTH)
        require_size("width", width, MAX_WIDTH)
        self.image_size, self.channels = image_size, channels
        self.class_names, self.latent_dim, self.width = list(class_names), latent_dim, width
        first, widths = _first_and_widths(image_size, width)
        widths = [*reversed(widths), channels]
        self.first = nn.ConvTranspose2d(latent_dim, widths[0], first, bias=False)
        self.norms = nn.ModuleList(ClassBatchNorm(before, len(class_names)) for before in widths[:-1])
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.apply(_initialise)

    def forward(self, z: Tensor, class_ids: Tensor) -> Tensor:
        """Maps noise (B, latent_dim) and class ids (B,), -1 for no class, to images (B, C, H, W) in [-1, 1]."""
        h = self.first(rearrange(z, "b d -> b d 1 1"))  # (B, D, 4, 4), or a longer side
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = layer(F.relu(norm(h, class_ids)))  # twice the side
        return h.tanh()

    @property
    def class_tables(self) -> list[str]:
        """Names of the tensors with a row for each class, and a last row for no class."""
        return [name for name in self.state_dict() if name.endswith((".gain.weight", ".bias.weight"))]

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """The README.md of save_pretrained, instead of huggingface_hub's, which says what is not so."""
        return ModelCard(CARD)


class ClassBatchNorm(nn.Module):
    """Batch normalisation with a gain and a bias for each class, and for no class (de Vries et al. 2017).

    With the class as a vector beside the noise, training collapsed: G ignored the noise and made one image per class,
    which was varied enough to pass for a batch.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.gain = nn.Embedding(num_classes + 1, width)
        self.bias = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.gain.weight, 1.0, 0.3)  # classes differ from the start, but less than noise does
        nn.init.normal_(self.bias.weight, 0.0, 0.3)

    def forward(self, x: Tensor, class_ids: Tensor) -> Tensor:
        """Normalises x (B, D, H, W) for class ids (B,)."""
        row = class_ids % self.gain.num_embeddings  # -1 (no class) becomes the last row
        gain, bias = (rearrange(table(row), "b d -> b d 1 1") for table in (self.gain, self.bias))
        return gain * self.norm(x) + bias


class DCGANDiscriminator(nn.Module):
    """Gives an image, and its class if there are classes, the logit of being real (DCGAN, section 3).

    It is the mirror image of the generator. The class enters by projection (Miyato and Koyama 2018, eq. 3).

    Args:
        image_size: side of the images, or height and width, as for the generator.
        channels: channels of the images.
        num_classes: number of classes.
        width: channels after the first layer; each further layer has twice as many, up to 8 * width.
    """

    class_tables = ("embedding.weight",)  # tensors with a row for each class, and a last row for no class

    def __init__(self, image_size: int | Sequence[int], channels: int, num_classes: int, width: int = 32):
        super().__init__()
        require_size("width", width, MAX_WIDTH)
        last, widths = _first_and_widths(image_size, width)
        net: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(widths):
            net += [nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(after)]
            net += [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*net)
        self.to_logit = nn.Conv2d(widths[-1], 1, last)
        # Each class adds its row to the last weights.
        self.embedding = nn.Embedding(num_classes + 1, widths[-1] * last[0] * last[1])
        self.apply(_initialise)
        nn.init.zeros_(self.embedding.weight)  # otherwise G would first learn to follow random directions

    def forward(self, x: Tensor, class_ids: Tensor) -> Tensor:
        """Maps images (B, C, H, W) in [-1, 1] and class ids (B,), -1 for no class, to logits (B,)."""
        h = self.net(x)  # (B, D, 4, 4), or a longer side
        projected = (self.embedding(class_ids % self.embedding.num_embeddings) * h.flatten(1)).sum(dim=1)
        return self.to_logit(h).flatten() + projected


@torch.no_grad()
def settle_batch_norm(generator: DCGANGenerator, z: Tensor, class_ids: Tensor) -> None:
    """Computes batch normalisation's statistics anew for the current weights, and leaves the generator in eval mode.

    An average of weights needs this, because the running statistics belong to the weights during training.

    Args:
        generator: the generator, whose statistics are replaced.
        z: noise (B, latent_dim); the statistics come from the images of this noise.
        class_ids: class ids (B,).
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    generator.train()
    for part in zip(z.split(SETTLING_BATCH), class_ids.split(SETTLING_BATCH), strict=True):
        generator(*part)
    generator.eval()
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


def load_gan(folder: Path) -> DCGANGenerator:
    """The generator of a GAN's run, of its `model/`, or of a folder with config.json and model.safetensors.

    It is in eval mode, and its weights are frozen.

    Raises:
        InputError: there is no generator in the folder, or it does not load.
    """
    places = (folder / "model" / "generator", folder / "generator")
    folder = next((place for place in places if place.is_dir()), folder)
    try:
        generator = DCGANGenerator(**json.loads((folder / "config.json").read_bytes()))
        generator.load_state_dict(load((folder / "model.safetensors").read_bytes()))
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} does not load as a generator: {' '.join(str(error).split())[:200]}") from error
    return generator.eval().requires_grad_(False)


def _first_and_widths(image_size: int | Sequence[int], width: int) -> tuple[tuple[int, int], list[int]]:
    """Height and width of the smallest map, and the numbers of channels at half the side, at a quarter, and so on."""
    least = min(sides(image_size))
    halvings = (least // 4).bit_length() - 1
    scale = 2 ** max(halvings, 1)
    first = (sides(image_size)[0] // scale, sides(image_size)[1] // scale)
    if isinstance(image_size, int) and (image_size != 4 * scale):
        raise InputError(
            f"image_size={image_size} does not suit a DCGAN, which needs 8, 16, 32, ...; use {4 * scale} or {8 * scale}"
        )
    if min(first) != 4 or any(side % scale for side in sides(image_size)):
        fits = [4 * scale if side == least else max(4, side // scale) * scale for side in sides(image_size)]
        raise InputError(
            f"image_size={shown(image_size)} does not suit a DCGAN, whose shorter side is 8, 16, 32, ... and "
            f"the longer one a multiple of {scale}; use {shown(fits)}"
        )
    return first, [width * min(2**i, 8) for i in range(halvings)]


def _initialise(module: nn.Module) -> None:
    """Weights as in DCGAN, section 4."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
