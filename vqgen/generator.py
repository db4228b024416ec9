"""Images from a trained model in a few lines: `Generator.from_pretrained(folder).sample(class_ids=["cat"])`."""

import difflib
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqgen.adversarial.dcgan import DCGANGenerator, load_gan
from vqgen.codes import sides
from vqgen.data.pixels import to_pixels
from vqgen.errors import InputError, expanded, require
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import classes_in_turn, generate_images, sample_images
from vqgen.settings import DataConfig, SampleConfig
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, load_tokenizer, to_uint8
from vqgen.yaml_file import read_yaml

logger = logging.getLogger("vqgen")

DEFAULTS = SampleConfig()
PRIOR_OPTIONS = ("temperature", "top_k", "top_p", "cfg_scale")  # settings in SampleConfig that a GAN does not use

ClassIds: TypeAlias = Sequence[int | str] | int | str | None
Images: TypeAlias = Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]


class Generator:
    """Draws images from a trained prior and its tokenizer, or from a GAN.

    Args:
        model: the prior or the GAN's generator, in eval mode.
        tokenizer: the prior's tokenizer; None for a GAN.
        data: the settings by which the training images came to one size; `reconstruct` treats its images the same way.
            None takes the defaults of `DataConfig` and the model's size.
        checkpoint: SHA-256 of the files of all models.
        tokenizer_hash: SHA-256 of the tokenizer's files.

    Attributes:
        class_names: the classes in the order of their ids; empty if there are none.
        image_size: side of the images, in pixels; or [height, width], if they are no squares.
        channels: channels of the images, 1 (grey) or 3 (RGB).
        num_parameters: number of parameters of the prior and its tokenizer, or of the GAN's generator.
    """

    def __init__(
        self,
        model: Prior | DCGANGenerator,
        tokenizer: VQModel | None = None,
        *,
        data: DataConfig | None = None,
        checkpoint: str = "",
        tokenizer_hash: str = "",
    ):
        self.model, self.tokenizer = model, tokenizer
        self.checkpoint, self.tokenizer_hash = checkpoint, tokenizer_hash
        self.class_names = model.class_names
        self.image_size: int | Sequence[int]
        if isinstance(model, DCGANGenerator):
            self.image_size, self.channels = model.image_size, model.channels
        else:
            assert tokenizer is not None, "a prior needs its tokenizer"
            finest = cast(Prior, model).layout.shapes[-1]
            height, width = (side * tokenizer.stride for side in finest[-2:])
            self.image_size, self.channels = height if height == width else [height, width], tokenizer.channels
        self._data = data
        self.num_parameters = sum(p.numel() for part in self._models() for p in part.parameters())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Generator":
        """The generator of a stage-2 run or of a GAN's run, on the CPU and in eval mode.

        Args:
            folder: the run's folder, or its `model/`.

        Raises:
            InputError: the folder has no such model, or the model does not load.
        """
        folder = expanded(folder)
        inside = folder / "model" if (folder / "model").is_dir() else folder
        gan = (inside / "generator").is_dir()
        require(
            gan or (inside / "prior").is_dir(),
            f"{folder}: no model there to sample; give the folder of a stage-2 or GAN run, or train one first",
        )
        files = sorted(
            path for path in inside.rglob("*") if path.name == "config.json" or path.suffix == ".safetensors"
        )
        checkpoint = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        data = _training_data(inside.absolute().parent / "config.yaml")
        if gan:
            return cls(load_gan(inside / "generator"), data=data, checkpoint=checkpoint)
        prior, (tokenizer, tokenizer_hash) = (
            Prior.from_pretrained(inside / "prior"),
            load_tokenizer(inside / "tokenizer"),
        )
        return cls(prior, tokenizer, data=data, checkpoint=checkpoint, tokenizer_hash=tokenizer_hash)

    @property
    def is_gan(self) -> bool:
        """Whether the model is a GAN, which draws from noise, without codes."""
        return not isinstance(self.model, Prior)

    @property
    def device(self) -> torch.device:
        """The models' device."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> "Generator":
        """Moves the models to a device, and returns this generator."""
        for model in self._models():
            model.to(device)
        return self

    def sample(
        self,
        class_ids: ClassIds = DEFAULTS.class_ids,
        num_images: int = DEFAULTS.num_images,
        *,
        seed: int = DEFAULTS.seed,
        cfg_scale: float = DEFAULTS.cfg_scale,
        temperature: float = DEFAULTS.temperature,
        top_k: int = DEFAULTS.top_k,
        top_p: float = DEFAULTS.top_p,
        batch_size: int = DEFAULTS.batch_size,
    ) -> list[Image.Image]:
        """Draws images; the same seed gives the same images, whatever num_images and batch_size.

        Args:
            class_ids: classes to cycle through; None takes all classes, -1 means no class. A text is the name of a
                class, or else an id in digits; a number is an id.
            num_images: number of images.
            seed: random seed, 0 or more.
            cfg_scale: strength of classifier-free guidance (Ho and Salimans 2022); 1 turns it off. This and the next
                three options are for priors only.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only; 0 means all tokens.
            top_p: draw from the likeliest tokens that together have this probability; 1 means all tokens.
            batch_size: images drawn at a time.

        Raises:
            InputError: the model does not know a class, or a setting is invalid for it.
        """
        settings = SampleConfig(
            num_images=num_images,
            seed=seed,
            cfg_scale=cfg_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            batch_size=batch_size,
        )
        options = self.options(settings)
        ids = classes_in_turn(num_images, self.choices(class_ids))
        parts = enumerate(ids.split(batch_size))
        return [
            picture
            for i, part in parts
            for picture in _pictures(self.draw(part.to(self.device), seed=seed, first=i * batch_size, **options))
        ]

    @torch.no_grad()
    def reconstruct(self, images: Images) -> list[Image.Image]:
        """The tokenizer's reconstructions of images, which first come to the model's size, as in training.

        An image of more than 8 bits has the white level that suits it alone, unless the run was given `data.white`.

        Args:
            images: one or a sequence of PIL images or uint8 arrays, (H, W) or (H, W, C); or an array (N, H, W, C).

        Raises:
            InputError: the model is a GAN, which has no encoder; or an argument is not an image.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InputError("a GAN reconstructs no images; give the folder of a stage-2 run")
        pictures = _as_pictures(images)
        data = self._data or DataConfig()
        if self._data is None and any(picture.size[::-1] != sides(self.image_size) for picture in pictures):
            logger.warning(
                "the model has no config.yaml beside it, so images are resized by the default data.resize=%s",
                data.resize,
            )
        data = replace(data, image_size=self.image_size)
        arrays = [to_pixels(picture, self.channels, data) for picture in pictures]
        parts = [arrays[i : i + DEFAULTS.batch_size] for i in range(0, len(arrays), DEFAULTS.batch_size)]
        return [
            picture
            for part in parts
            for picture in _pictures(
                to_uint8(
                    tokenizer.decode(tokenizer.encode(from_uint8(torch.from_numpy(np.stack(part)).to(self.device))))
                )
            )
        ]

    def draw(self, class_ids: Tensor, *, seed: int, first: int = 0, **options: float) -> Tensor:
        """Draws a seed's images from number `first` on, uint8 (B, C, H, W), for class ids (B,) on the models' device.

        The options are those of `sample_tokens`; a GAN takes none.
        """
        if isinstance(self.model, Prior):
            assert self.tokenizer is not None
            return sample_images(self.model, self.tokenizer, class_ids, seed=seed, first=first, **options)
        return generate_images(self.model, class_ids, seed=seed, first=first, **options)

    def options(self, settings: SampleConfig) -> dict[str, float]:
        """The options of `draw` that the settings ask for.

        Raises:
            InputError: the model is a GAN, and the settings change an option that only a prior uses.
        """
        options = {name: getattr(settings, name) for name in PRIOR_OPTIONS}
        if not self.is_gan:
            return options
        for name, value in options.items():
            unchanged = value == getattr(DEFAULTS, name)
            require(unchanged, f"{name}={value}: only a prior draws with that, and this model is a GAN; leave it out")
        return {}

    def choices(self, class_ids: ClassIds) -> Sequence[int]:
        """The ids of the given classes (ids or names); None means all classes of the model.

        Raises:
            InputError: the model does not know a class; the message has the nearest names.
        """
        if class_ids is None:
            return range(len(self.class_names))
        asked = [class_ids] if isinstance(class_ids, int | str | np.integer) else class_ids
        require(len(asked) > 0, "class_ids: names no class; give one or more, or leave it out for all classes")
        return [self._id_of(name) if isinstance(name, str) else self._checked_id(name) for name in asked]

    def _id_of(self, name: str) -> int:
        if name in self.class_names:
            return self.class_names.index(name)
        if re.fullmatch(r"-?\d+", name):
            return self._checked_id(int(name))
        near = difflib.get_close_matches(name, self.class_names, n=3, cutoff=0.0)
        known = f"the nearest are {', '.join(near)}" if near else "it was trained without classes"
        raise InputError(f"class_ids: {name} is not a class of this model; {known}")

    def _checked_id(self, class_id: int) -> int:
        num_classes = len(self.class_names)
        least = -1 if not (self.is_gan and num_classes) else 0  # a GAN with classes has not trained without a class
        known = f"0 to {num_classes - 1}" + (", or -1 for none" if least < 0 else "")
        known = known if num_classes else "-1 only, as it was trained without classes"
        valid = isinstance(class_id, int | np.integer) and least <= class_id < num_classes
        require(valid, f"class_ids: {class_id} is not a class of this model; it takes {known}")
        return int(class_id)

    def _models(self) -> list[torch.nn.Module]:
        return [self.model] if self.tokenizer is None else [self.model, self.tokenizer]


def _training_data(path: Path) -> DataConfig | None:
    """The settings by which images come to one size, from a run's config.yaml; None if the file has none."""
    try:
        section = read_yaml(path)["data"]
        white = section.get("white")  # runs of older versions have none
        return DataConfig(resize=section["resize"], background=section["background"], white=white)
    except (InputError, KeyError, TypeError):
        return None


def _as_pictures(images: Images) -> list[Image.Image]:
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        single = images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4))
        images = [images] if single else list(images)
    return [image if isinstance(image, Image.Image) else _picture(image) for image in images]


def _picture(array: np.ndarray) -> Image.Image:
    """Converts an array, uint8 (H, W) or (H, W, C), to a PIL image."""
    array = np.asarray(array)
    fits = array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)))
    require(fits, f"images: an array of {array.dtype} {array.shape} is not an image; give uint8 (H, W) or (H, W, C)")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _pictures(images: Tensor) -> list[Image.Image]:
    """Converts images uint8 (B, C, H, W) to PIL images."""
    return [_picture(array) for array in rearrange(images, "b c h w -> b h w c").cpu().numpy()]
