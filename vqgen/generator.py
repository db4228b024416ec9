"""Images from a trained model in a few lines: `Generator.from_pretrained(folder).sample(class_ids=["cat"])`."""

import difflib
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqgen.adversarial.dcgan import DCGANGenerator, load_gan
from vqgen.codes import shown, sides
from vqgen.data.pixels import to_pixels, upright_size
from vqgen.errors import InputError, expanded, require
from vqgen.priors.completion import below, known_tokens, scattered
from vqgen.priors.decoder import is_plain
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import ROWS, Judge, classes_in_turn, generate_images, sample_images
from vqgen.settings import DataConfig, SampleConfig, SampleFilesConfig, SamplePrecision
from vqgen.tokenizers.vqmodel import VQModel, from_uint8, load_tokenizer, to_uint8
from vqgen.training.stop import is_out_of_memory
from vqgen.yaml_file import read_yaml

logger = logging.getLogger("vqgen")

DEFAULTS = SampleConfig()
PRIOR_OPTIONS = (  # settings in SampleConfig that a GAN does not use
    "temperature", "top_k", "top_p", "min_p", "cfg_scale", "cfg_power", "cfg_start", "best_of", "precision",
    "cuda_graph",
)  # fmt: skip

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
        min_p: float = DEFAULTS.min_p,
        cfg_power: float = DEFAULTS.cfg_power,
        cfg_start: float = DEFAULTS.cfg_start,
        best_of: int = DEFAULTS.best_of,
        precision: SamplePrecision = DEFAULTS.precision,
        cuda_graph: bool = DEFAULTS.cuda_graph,
        batch_size: int = DEFAULTS.batch_size,
        toward: int | str | None = None,
        image: Image.Image | np.ndarray | None = None,
        keep_rows: float | None = None,
        mask: Image.Image | np.ndarray | None = None,
        vary: float | None = None,
        size: int | Sequence[int] | None = None,
        judge: Judge | None = None,
    ) -> list[Image.Image]:
        """Draws images; the same seed gives the same images, whatever num_images and batch_size.

        With an image they start from its codes, which one of keep_rows, mask and vary divides into those that stay and
        those that are drawn. A drawn code depends on those before it in the order; and on all that stay, if the prior
        was trained with `random_orders` above 0.

        Args:
            class_ids: classes to cycle through; None takes all classes, -1 means no class. A text is the name of a
                class, or else an id in digits; a number is an id.
            num_images: number of images.
            seed: random seed, 0 or more.
            cfg_scale: strength of classifier-free guidance (Ho and Salimans 2022); 1 turns it off. All options from
                this one to `cuda_graph` are for priors only.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only; 0 means all tokens.
            top_p: draw from the likeliest tokens that together have this probability; 1 means all tokens.
            min_p: draw from tokens that are at least this share as likely as the likeliest; 0 means all tokens.
            cfg_power: how late guidance rises along the sequence, as in `guidance`; 0 means at once.
            cfg_start: share of the tokens that are drawn before guidance begins.
            best_of: draw so many for each image, and keep the one whose codes are likeliest without guidance, or the
                best by `judge`.
            precision: `bf16` computes the prior in bfloat16.
            cuda_graph: replay the step that draws a token as a CUDA graph.
            batch_size: images drawn at a time; fewer, if memory does not suffice.
            toward: a class that the images turn into: its share rises from 0 in the first image to 1 in the last.
            image: a PIL image or uint8 array (H, W) or (H, W, C) to start from, which first comes to the model's size.
            keep_rows: share of the image's height that stays, from the top.
            mask: an image of the same size; what is lighter than middle grey there is drawn.
            vary: share of the codes, at random places, that are drawn.
            size: side of larger images than those of the training, or (height, width): drawn window by window.
            judge: scores images uint8 (B, C, H, W) of classes (B,); `best_of` keeps the one with the largest (B,).

        Raises:
            InputError: the model does not know a class, or a setting or an image is invalid for it.
        """
        settings = SampleFilesConfig(
            toward=toward,
            image=None if image is None else "image",
            keep_rows=keep_rows,
            mask=None if mask is None else "mask",
            vary=vary,
            size=size,
            best_by="likelihood" if judge is None else "class",
            num_images=num_images,
            seed=seed,
            cfg_scale=cfg_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            cfg_power=cfg_power,
            cfg_start=cfg_start,
            best_of=best_of,
            precision=precision,
            cuda_graph=cuda_graph,
            batch_size=batch_size,
        )
        options, each = self.options(settings), self.of_each(settings, image, mask)
        if judge is not None:
            options["judge"] = judge
        ids, drawn = classes_in_turn(num_images, self.choices(class_ids)).to(self.device), []
        for i in range(0, num_images, batch_size):
            part = slice(i, i + batch_size)
            here = {name: tensor[part] for name, tensor in each.items()}
            drawn += _pictures(self.draw(ids[part], seed=seed, first=i, each=here, **options))
        return drawn

    def of_each(
        self,
        settings: SampleFilesConfig,
        image: Image.Image | np.ndarray | None = None,
        mask: Image.Image | np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """What the settings ask of each image besides its class: the argument `each` of `draw`.

        Args:
            settings: the settings.
            image: the image to start from.
            mask: the mask of what is drawn.

        Raises:
            InputError: the model does not know the class, or the image or the mask does not suit it.
        """
        each: dict[str, Tensor] = {}
        count = settings.num_images
        if image is not None:
            each["known"] = self.known_tokens(
                image, count, seed=settings.seed, keep_rows=settings.keep_rows, mask=mask, vary=settings.vary
            )
        if settings.toward is not None:
            require(not self.is_gan, "toward: only a prior mixes classes, and this model is a GAN; leave it out")
            [toward] = self.choices(settings.toward)
            each["toward"] = torch.full((count,), toward, device=self.device)
            each["blend"] = torch.linspace(0, 1, count, device=self.device)
        return each

    @torch.no_grad()
    def known_tokens(
        self,
        image: Image.Image | np.ndarray,
        num_images: int,
        *,
        seed: int,
        keep_rows: float | None = None,
        mask: Image.Image | np.ndarray | None = None,
        vary: float | None = None,
    ) -> Tensor:
        """The tokens (num_images, N) of an image, -1 where they are to be drawn; see `sample`.

        Raises:
            InputError: the model is a GAN; or the image or the mask is not one, or they do not fit each other.
        """
        if self.tokenizer is None:
            raise InputError("image: a GAN starts from noise, and not from an image; give the folder of a stage-2 run")
        layout = cast(Prior, self.model).layout
        picture, size = _as_picture("image", image), sides(self.image_size)
        data = replace(self._data or DataConfig(), image_size=self.image_size)
        if upright_size(picture)[::-1] != size:
            how = f"the model's {size[0]} x {size[1]} by data.resize={data.resize}, as in training"
            logger.warning("the image of %s pixels comes to %s", _shown(picture), how)
        x = from_uint8(torch.from_numpy(to_pixels(picture, self.channels, data))[None].to(self.device))
        redrawn = below(keep_rows or 0.0, *size)
        if mask is not None:
            cover = _as_picture("mask", mask)
            sizes = f"{_shown(cover)} pixels, the image has {_shown(picture)}; give a mask of the image's size"
            require(upright_size(cover) == upright_size(picture), f"mask: has {sizes}")
            redrawn = torch.from_numpy(to_pixels(cover, 1, replace(data, background="black"))) > 127
            nothing = "mask: nothing is lighter than middle grey, so nothing is drawn; paint white what is to be drawn"
            require(bool(redrawn.any()), nothing)
        elif vary is not None:
            # A spawn key of three numbers is no image's or attempt's.
            sources = (np.random.SeedSequence(seed, spawn_key=(i, 0, 0)) for i in range(num_images))
            noise = np.stack([np.random.default_rng(source).random(layout.shapes[0][-2:]) for source in sources])
            redrawn = scattered(vary, torch.from_numpy(noise))
        require(bool(redrawn.any()), f"keep_rows={keep_rows}: keeps all {size[0]} rows; keep fewer")
        known = known_tokens(layout, self.tokenizer.encode(x), redrawn.to(self.device))
        return known.expand(num_images, -1)

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

    def draw(
        self,
        class_ids: Tensor,
        *,
        seed: int,
        first: int = 0,
        each: Mapping[str, Tensor] = MappingProxyType({}),
        **options: Any,
    ) -> Tensor:
        """Draws a seed's images from number `first` on, uint8 (B, C, H, W), for class ids (B,) on the models' device.

        A batch that does not fit in memory is drawn in halves. The options are those of `sample_images`; a GAN takes
        none.
        """
        try:
            if not isinstance(self.model, Prior):
                return generate_images(self.model, class_ids, seed=seed, first=first)
            assert self.tokenizer is not None
            return sample_images(self.model, self.tokenizer, class_ids, seed=seed, first=first, each=each, **options)
        except (RuntimeError, MemoryError) as error:
            if len(class_ids) <= ROWS or not is_out_of_memory(error):
                raise
            half = -(-len(class_ids) // 2 // ROWS) * ROWS  # halves that are padded would take more memory
        logger.warning("%d images at a time do not fit in memory; drawing %d at a time", len(class_ids), half)
        parts = (slice(0, half), slice(half, None))
        calls = (
            (class_ids[part], first + part.start, {name: tensor[part] for name, tensor in each.items()})
            for part in parts
        )
        return torch.cat([self.draw(ids, seed=seed, first=at, each=here, **options) for ids, at, here in calls])

    def options(self, settings: SampleConfig) -> dict[str, Any]:
        """The options of `draw` that the settings ask for, but the judge.

        Raises:
            InputError: the model is a GAN, and the settings change an option that only a prior uses.
        """
        options = {name: getattr(settings, name) for name in PRIOR_OPTIONS}
        if isinstance(self.model, Prior):
            if settings.cuda_graph:
                require(self.device.type == "cuda", f"cuda_graph=true: needs a GPU, and not the {self.device.type}")
                own = "cuda_graph=true: only for plain Llama, Mistral and Qwen3 priors; leave it out"
                require(is_plain(self.model.lm), own)
            grid = self._grid(getattr(settings, "size", None))
            if grid is not None:
                options["grid"] = grid
            mixed = "toward: the best for one class says nothing of two; use best_of=1"
            require(settings.best_of == 1 or getattr(settings, "toward", None) is None, mixed)
            guided = settings.cfg_scale != 1 and self._has_no_unconditional
            unknown = (
                "the prior was trained with class_dropout=0, so it knows no images without a class; use cfg_scale=1"
            )
            require(not guided, f"cfg_scale={settings.cfg_scale}: {unknown}")
            return options
        larger = "size: only a prior draws larger images, and this model is a GAN; leave it out"
        require(getattr(settings, "size", None) is None, larger)
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
        least = 0 if (self.is_gan and num_classes) or self._has_no_unconditional else -1
        known = f"0 to {num_classes - 1}" + (", or -1 for none" if least < 0 else "")
        known = known if num_classes else "-1 only, as it was trained without classes"
        valid = isinstance(class_id, int | np.integer) and least <= class_id < num_classes
        require(valid, f"class_ids: {class_id} is not a class of this model; it takes {known}")
        return int(class_id)

    def _grid(self, size: int | Sequence[int] | None) -> tuple[int, int] | None:
        """The size in codes of the coarsest map of images of this size; None if it is the model's own."""
        if size is None:
            return None
        prior = cast(Prior, self.model)
        own, asked = sides(self.image_size), sides(size)
        coarse = [side // codes for side, codes in zip(own, prior.layout.shapes[0][1:], strict=True)]
        fits = all(n >= least and n % part == 0 for n, least, part in zip(asked, own, coarse, strict=True))
        step = f"in steps of {coarse[0]}" if coarse[0] == coarse[1] else f"in steps of {coarse[0]} and {coarse[1]}"
        require(fits, f"size={shown(size)}: a prior draws images of {shown(self.image_size)} pixels and larger, {step}")
        return None if asked == own else (asked[0] // coarse[0], asked[1] // coarse[1])

    @property
    def _has_no_unconditional(self) -> bool:
        """Whether the model is a prior that has not seen images without a class."""
        return not self.is_gan and bool(self.class_names) and cast(Prior, self.model).class_dropout == 0

    def _models(self) -> list[torch.nn.Module]:
        return [self.model] if self.tokenizer is None else [self.model, self.tokenizer]


class Samples:
    """A model's samples as a set of images, drawn on request.

    Args:
        generator: the model.
        config: the settings of the samples.
        more: further options of `Generator.draw`.
    """

    def __init__(self, generator: Generator, config: SampleConfig, **more: Any):
        self.generator, self.config, self.options = generator, config, {**generator.options(config), **more}
        self.class_ids = classes_in_turn(config.num_images, generator.choices(config.class_ids)).to(generator.device)

    def __len__(self) -> int:
        return self.config.num_images

    def __getitems__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The samples of consecutive rows, uint8 (B, C, H, W), and their class ids."""
        first, class_ids = int(rows[0]), self.class_ids[rows[0] : rows[-1] + 1]
        return self.generator.draw(class_ids, seed=self.config.seed, first=first, **self.options), class_ids


def _training_data(path: Path) -> DataConfig | None:
    """The settings by which images come to one size, from a run's config.yaml; None if the file has none."""
    try:
        section = read_yaml(path)["data"]
        white = section.get("white")  # runs of older versions have none
        return DataConfig(resize=section["resize"], background=section["background"], white=white)
    except (InputError, KeyError, TypeError):
        return None


def _shown(picture: Image.Image) -> str:
    """A picture's height and width."""
    width, height = upright_size(picture)
    return f"{height} x {width}"


def _as_picture(what: str, image: Image.Image | np.ndarray) -> Image.Image:
    pictures = _as_pictures(image)
    require(len(pictures) == 1, f"{what}: {len(pictures)} images were given; give one")
    return pictures[0]


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
