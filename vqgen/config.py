"""Every setting, its default and its meaning; and how the command line becomes one of these configurations.

A program takes `[CONFIG.yaml] [key=value ...]`: the dataclass holds the defaults, the file what one kind of run changes
of them, the command line what this one changes of both.
"""

import ast
import copy
import difflib
import functools
import inspect
import itertools
import os
import textwrap
import typing
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqgen.errors import InputError

C = TypeVar("C")

# What OmegaConf and PyYAML raise for text that is no YAML: PyYAML converts what has a tag, as in `!!int x`, unchecked.
YAML_ERRORS = (
    yaml.YAMLError,
    OmegaConfBaseException,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
)

VQGAN_SETTINGS = ["loss.perceptual.name=alex", "loss.adversarial.name=non_saturating"]


@dataclass
class DataConfig:
    """Which images, and how each becomes a square of `image_size` pixels."""

    source: str = "digits"
    """The images: `digits` (built in), a folder (class = subfolder), an .npz, tar shards such as
    `train-{00000..00009}.tar`, or a folder of MNIST-style IDX files."""
    val_source: str | None = None
    """Held-out images, in any of the same forms; null takes the source's own, or splits some off."""
    val_fraction: float = 0.05
    """Share split off by a hash of the file's name, where no held-out images are given."""
    image_size: int = 32
    """Side of the square the model sees, in pixels."""
    channels: int | None = None
    """1 (grey) or 3 (RGB); null takes 1 if the images are grey, else 3."""
    resize: Literal["crop", "pad"] = "crop"
    """`crop` scales the short side to image_size and crops the centre; `pad` only ever shrinks, and pads."""
    background: str = "white"
    """Colour behind transparent pixels and in the padding: a name or #rrggbb."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    on_error: Literal["skip", "raise"] = "skip"
    """An image that does not load: `skip` it and name it in the run's skipped.txt, or `raise`."""
    cache_gb: float = 1.0
    """Decode the data set once into each process's memory if it takes no more than this; else as training goes."""
    workers: int = 2
    """Processes a rank decodes images with, where the data set is not in memory."""

    def __post_init__(self) -> None:
        require_size("data.workers", self.workers, 256, least=0)


@dataclass
class PerceptualConfig:
    """The distance of images and reconstructions in an ImageNet classifier's features."""

    name: Literal["none", "alex", "vgg", "lpips-vgg"] = "none"
    """`none`, `alex` or `vgg` (shift-tolerant LPIPS), or `lpips-vgg` (the original)."""
    weights: list[str] = field(default_factory=list)
    """Files with its weights; none takes the installed ones. `lpips-vgg` needs [VGG16.pth,HEADS.pth]."""
    weight: float = 0.01
    """Its weight in the loss. Much more, and the decoder draws patterns that only the classifier takes for texture."""
    every: int = 4
    """It is computed on every so many-th image of a process's pass: fewer cost less, and are the same on average."""
    start: float = 0.5
    """Share of the run after which it counts; the steps before are cheaper."""

    def __post_init__(self) -> None:
        require(0 <= self.start <= 1, f"loss.perceptual.start={self.start}: is a share of the run, from 0 to 1")
        require(self.weight >= 0, f"loss.perceptual.weight={self.weight}: must be 0 or more")
        require_size("loss.perceptual.every", self.every)


@dataclass
class AdversarialConfig:
    """The patch discriminator's part, which makes the tokenizer a VQGAN."""

    name: Literal["none", "non_saturating", "hinge", "least_squares"] = "none"
    """`none`, `non_saturating`, `hinge` or `least_squares`."""
    weight: float = 0.3
    """Its weight in the loss; with `adaptive` a factor of that weight."""
    adaptive: bool = True
    """Weigh it so that it pulls as hard at the decoder's last layer as the other losses do (VQGAN, eq. 7)."""
    start: float = 0.75
    """Share of the run after which the decoder sees the discriminator; late, when the learning rate is low."""
    lead: float = 0.15
    """Share of the run before `start` in which the discriminator already learns."""
    ramp: float = 0.1
    """Share of the run after `start` in which the weight rises from 0."""
    lr: float = 2e-3
    """Learning rate of the discriminator until `start`; from there on it falls as the tokenizer's does."""
    lecam: float = 0.0
    """Weight of LeCam's regularisation, for few images: 0.01, for example."""
    r1: float = 1.0
    """Weight of the gradient penalty R1, tuned at 32 and 64 pixels; larger images want less. With 0 the decoder learns
    noise that fools the discriminator, not texture."""

    def __post_init__(self) -> None:
        require(0 <= self.start <= 1, f"loss.adversarial.start={self.start}: is a share of the run, from 0 to 1")
        for name in ("weight", "lead", "ramp", "lecam", "r1"):
            value = getattr(self, name)
            require(value >= 0, f"loss.adversarial.{name}={value}: must be 0 or more")
        require(self.lr > 0, f"loss.adversarial.lr={self.lr}: must be positive")


@dataclass
class LossConfig:
    """What stage 1 minimises, beside the quantizer's own loss."""

    rec: Literal["mse", "l1"] = "mse"
    """Distance between image and reconstruction: `mse` (best PSNR) or `l1` (crisper edges)."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)


@dataclass
class OptimConfig:
    """AdamW, with linear warm-up and a cosine to zero over the run's budget."""

    lr: float = 8e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and convolutions only."""
    beta1: float = 0.9
    """Adam's decay rate of the gradient's mean."""
    beta2: float = 0.99
    """Adam's decay rate of the gradient's square."""
    warmup: float = 0.1
    """Share of the budget over which the learning rate rises to its peak."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; larger ones are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)}: must be from 0 to below 1")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: must be 0 or more")
        require(self.lr > 0, f"optim.lr={self.lr}: must be positive")
        require(0 <= self.warmup < 1, f"optim.warmup={self.warmup}: is a share of the run, from 0 to below 1")
        require(self.grad_clip > 0, f"optim.grad_clip={self.grad_clip}: must be positive")


@dataclass
class TrainConfig:
    """How long, in what portions, and what is written on the way."""

    batch_size: int = 64
    """Images per step, over all processes and accumulation steps together."""
    max_steps: int | None = 4500
    """The run ends after so many steps."""
    max_seconds: float | None = None
    """The run ends after so many seconds of training (evaluation and start-up apart), if max_steps is not reached."""
    accumulation: int = 1
    """Forward and backward passes per step; more of them take less memory."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """`no`, `bf16` or `fp16`; null does what `accelerate launch` was told."""
    ema: float = 0.05
    """Width of the weight average that is evaluated and saved, as a share of the run so far; 0 turns it off."""
    log_every: int = 100
    """Steps between lines of metrics."""
    eval_every: int = 500
    """Steps between evaluations on held-out images, with a picture; also done at the end."""
    eval_images: int = 2000
    """Held-out images that an evaluation looks at, at most."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    milestone_every: int | None = 10000
    """The first checkpoint at or after each multiple of so many steps stays for good; null keeps none."""
    max_hours: float | None = None
    """Save and end after so many hours by the clock, start-up included; the same command then goes on."""
    max_bad_steps: int = 10
    """Steps in a row whose loss is not finite, and which are skipped, before the run goes back to a checkpoint."""

    def __post_init__(self) -> None:
        names = ("accumulation", "log_every", "eval_every", "eval_images", "checkpoint_every", "keep_checkpoints")
        for name in (*names, "max_bad_steps"):
            require_size(f"train.{name}", getattr(self, name))
        require_size("train.batch_size", self.batch_size, 1 << 20)
        for name in ("milestone_every", "max_hours"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}={value}: must be above 0, or null")
        # At 0.28 the average would be the plain mean of all weights so far.
        require(0 <= self.ema < 0.28, f"train.ema={self.ema}: must be at least 0 and below 0.28")


@dataclass
class TrackingConfig:
    """Where the numbers go besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` (online with an API key, else offline), `online`, `offline` or `disabled`."""
    project: str = "vqgen"
    """Name of the wandb project."""


@dataclass
class Stage1Config:
    """Stage 1: train the tokenizer, a VQ-VAE."""

    run_dir: str = "runs/stage1"
    """The run's folder; the same command again goes on from its newest checkpoint."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")


@dataclass
class Stage2Config:
    """Stage 2: fit the prior, an autoregressive transformer over the tokenizer's codes."""

    run_dir: str = "runs/stage2"
    """The run's folder; the same command again goes on from its newest checkpoint."""
    stage1: str = "runs/stage1"
    """The tokenizer: a stage-1 run, or a folder with a model's config.json and model.safetensors."""
    codes_dir: str | None = None
    """Where the encoded data set is kept; null puts it in the tokenizer's folder, under codes/."""
    class_dropout: float = 0.1
    """Share of the examples whose class is hidden, so that sampling can use classifier-free guidance."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3, beta2=0.95))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=128, max_steps=1000))
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        require(0 <= self.class_dropout <= 1, f"class_dropout={self.class_dropout}: is a share, from 0 to 1")


@dataclass
class GANConfig:
    """The plain GAN: noise and a class in, an image out."""

    run_dir: str = "runs/gan"
    """The run's folder; the same command again goes on from its newest checkpoint."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    loss: Literal["non_saturating", "hinge", "least_squares", "minimax"] = "non_saturating"
    """What the two minimise: `non_saturating`, `hinge`, `least_squares`, or `minimax`, the literal log(1 - D(G(z)))."""
    data: DataConfig = field(default_factory=DataConfig)
    generator: dict[str, Any] = field(default_factory=dict)
    discriminator: dict[str, Any] = field(default_factory=dict)
    disc_lr: float = 2e-4
    """Peak learning rate of the discriminator; it follows the generator's schedule."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.0, beta1=0.5, beta2=0.999, warmup=0.0)
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        require(self.disc_lr > 0, f"disc_lr={self.disc_lr}: must be positive")


@dataclass
class SampleConfig:
    """Draw images from a stage-2 run, or from a GAN's."""

    num_images: int = 64
    """How many images to draw."""
    class_ids: list[int] | None = None
    """Classes to draw, in turn; null takes all of them in turn, -1 is no class at all."""
    cfg_scale: float = 1.5
    """Classifier-free guidance: 1 is none, more is more typical of the class and less varied."""
    temperature: float = 1.0
    """Divides the logits: below 1 is safer and less varied; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 is all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 is all."""
    seed: int = 0
    """The same seed gives the same images, whatever num_images and batch_size."""
    batch_size: int = 256
    """Images drawn at a time; less takes less memory."""
    out: str | None = None
    """Folder for grid.png and samples.npz; null is RUN_DIR/samples."""

    def __post_init__(self) -> None:
        require(self.num_images > 0, f"num_images={self.num_images}: must be at least 1")
        require(self.batch_size > 0, f"batch_size={self.batch_size}: must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature}: must be 0 or more")
        require(self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all) or more")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1")
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")


@dataclass
class EvaluateConfig:
    """What both evaluations take."""

    features: str = "efficientnet-lite0"
    """Feature network: `efficientnet-lite0` (ImageNet; comes with vqgen), `inception` (the standard one, downloaded)
    or `lenet` (trained here on the reference's own classes, for digits and the like)."""
    feature_weights: str | None = None
    """File of the feature network's weights; null takes the installed, downloads or trains them."""
    cache_dir: str | None = None
    """Where features of reference sets are kept; null is vqgen/ in the user's cache folder."""
    compare: str | None = None
    """Another run, or an evaluation.json: print both evaluations side by side, and evaluate nothing."""
    data: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stage1EvaluateConfig(EvaluateConfig):
    """Measure a tokenizer on held-out images.

    What is not given of data.* and tracking.* is the run's own; of another data.source it is the held-out part too.
    """

    num_images: int | None = None
    """Held-out images to look at, at most; null is all."""
    perceptual: str = "alex"
    """Of the perceptual distance: `alex` or `vgg` (shift-tolerant LPIPS), `lpips-vgg` (the original) or `none`."""
    perceptual_weights: list[str] = field(default_factory=list)
    """Files with its weights; none takes the installed ones. `lpips-vgg` needs [VGG16.pth,HEADS.pth]."""
    batch_size: int = 128
    """Images at a time, on each process."""
    seed: int = 0
    """Seed of what is drawn for the evaluation."""
    out: str | None = None
    """Folder for evaluation.json and the pictures; null is RUN_DIR/evaluation."""

    def __post_init__(self) -> None:
        require(self.num_images is None or self.num_images > 1, f"num_images={self.num_images}: must be 2 or more")
        require(self.batch_size > 0, f"batch_size={self.batch_size}: must be at least 1")
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")


@dataclass
class Stage2EvaluateConfig(EvaluateConfig, SampleConfig):
    """Measure a prior and its samples, or any images against others.

    What is not given of data.* and tracking.* is the run's own.
    """

    num_images: int = 2000
    """How many images to draw; with `images`, how many of those to look at, at most."""
    num_reference: int | None = 10000
    """Training images, or images of `reference`, to compare with, at most; null is all."""
    images: str | None = None
    """Images that are there already, to measure in place of a run's samples: a folder, an .npz, or as data.source."""
    reference: str | None = None
    """What to measure `images` against, in any of the same forms."""
    out: str | None = None
    """Folder for evaluation.json and the pictures; null is RUN_DIR/evaluation, or evaluation/ with `images`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images > 1, f"num_images={self.num_images}: must be 2 or more")
        few = self.num_reference is not None and self.num_reference < 2
        require(not few, f"num_reference={self.num_reference}: must be 2 or more, or null for all")


@dataclass
class CompareConfig:
    """Train a GAN, a VQ-VAE with its prior and a VQGAN with its prior for as long, and set them side by side."""

    run_dir: str = "runs/compare"
    """Folder for the runs, comparison.md and comparison.png; the same command again goes on where it stopped."""
    seconds: float = 180.0
    """Training time of each of the three, in seconds, both stages together."""
    prior_share: float = 0.45
    """The prior's share of that time, where there is one."""
    seed: int = 0
    """Seed of the runs and of what is drawn."""
    num_images: int = 2000
    """Images to draw from each, and held-out images to look at, at most."""
    num_reference: int | None = 10000
    """Training images to compare samples with, at most; null is all."""
    features: str = "efficientnet-lite0"
    """Feature network: `efficientnet-lite0`, `inception` or `lenet`, as for the evaluations."""
    perceptual: str = "alex"
    """Of the reconstructions' perceptual distance: `alex`, `vgg` or `none`."""
    cache_dir: str | None = None
    """Where features of reference sets are kept; null is vqgen/ in the user's cache folder."""
    gan: list[str] = field(default_factory=list)
    """Further settings of stage1/train_gan.py, as in 'gan=[optim.lr=1e-4]'."""
    tokenizer: list[str] = field(default_factory=list)
    """Further settings of stage1/train.py, for both tokenizers."""
    vqgan: list[str] = field(default_factory=VQGAN_SETTINGS.copy)
    """What makes the second tokenizer a VQGAN."""
    prior: list[str] = field(default_factory=list)
    """Further settings of stage2/train.py, for both priors."""
    data: dict[str, Any] = field(default_factory=dict)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.seconds > 0, f"seconds={self.seconds}: must be positive")
        require(0 < self.prior_share < 1, f"prior_share={self.prior_share}: is a share, above 0 and below 1")
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        require(self.num_images > 1, f"num_images={self.num_images}: must be 2 or more")
        few = self.num_reference is not None and self.num_reference < 2
        require(not few, f"num_reference={self.num_reference}: must be 2 or more, or null for all")


# The plain-dict sections of a configuration, and the constructors that take them: the constructor is the schema. Where
# the section's key `name` chooses among several constructors, they are given by name.
Constructor = Callable[..., Any]
Sections = Mapping[str, Constructor | Mapping[str, Constructor]]


def load_config(cls: type[C], arguments: Sequence[str], sections: Sections) -> C:
    """Reads `[CONFIG.yaml] [key=value ...]` into a configuration of class cls.

    Raises:
        InputError: a file that is not there or not YAML, a key that does not exist, a value of the wrong type or one
            that no setting takes.
    """
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise InputError(f"{files[1]!r} is neither key=value nor the one config file, which is {files[0]!r} already")
    layers = [read_yaml(Path(name)) for name in files]
    known = {key: kind for key, kind, *_ in settings(cls, sections)}
    for argument in [a for a in arguments if "=" in a]:
        key, _, text = argument.partition("=")
        expanded = key in ("data.source", "data.val_source") and sum(a.startswith(f"{key}=") for a in arguments) > 1
        require(not expanded, f"{key} is given more than once; quote what the shell expands: '{key}=...{{0..9}}.tar'")
        try:
            layer = _plain(OmegaConf.from_dotlist([argument]))
            if known.get(key, "").startswith("str") and text not in ("null", "???"):
                layer = text  # as it is, whatever YAML would make of it
                for part in reversed(key.split(".")):
                    layer = {part: layer}
            layers.append(layer)
        except YAML_ERRORS as error:
            raise InputError(f"{argument}: {_first_line(error)}; write key=value, lists as [1,2]") from error

    config: DictConfig = OmegaConf.structured(cls)
    for layer in layers:
        for key, value in _leaves(layer):
            if key in sections or any(k.startswith(f"{key}.") for k in known):
                require(value == {}, f"{key}: is a section; set its keys, as in {key}.KEY=VALUE (see --help)")
            elif key in known:  # OmegaConf takes any list for a list of numbers, if what is in it is no value
                nested = value == {} or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
                require(not nested, f"{key}={value}: is a {known[key]}, without sections or lists in it; see --help")
            elif not _is_open(sections, key):
                raise InputError(_no_such_key(key, list(known)))
        if layer.get("train", {}).get("mixed_precision") is False:
            layer["train"]["mixed_precision"] = "no"  # a bare `no` is false in YAML
        config = _merge(config, layer)
    for name, constructor in sections.items():
        if name in config and callable(constructor):
            given = _plain(config[name])
            complete = check_options(constructor, given, name)
            config[name] = {key: complete[key] for key in given}
    return typing.cast(C, OmegaConf.to_object(config))


def check_options(constructor: Constructor, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns all keyword arguments of a constructor that is given these options: checked, converted, and defaults.

    Raises:
        InputError: an option that the constructor does not take, or of another type; `where` is the section's name.
    """
    schema = _as_dataclass(constructor)
    known = [f.name for f in fields(schema)]
    for key in options:
        if key not in known and (key in inspect.signature(constructor).parameters or not _takes_more(constructor)):
            raise InputError(_no_such_key(f"{where}.{key}", [f"{where}.{k}" for k in known]))
    typed = _merge(OmegaConf.structured(schema), {k: v for k, v in options.items() if k in known}, f"{where}.")
    return {**options, **_plain(typed)}


def settings(
    schema: Constructor, sections: Sections, prefix: str = "", instance: Any = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type, default, meaning) of every setting of a configuration, sections included.

    The defaults are those of the instance, as a configuration may have its own for a part of it.
    """
    meanings = _meanings(schema)
    defaults = instance or _as_dataclass(schema)()
    for f in fields(_as_dataclass(schema)):
        key, default = prefix + f.name, getattr(defaults, f.name)
        nested = f.type if is_dataclass(f.type) else sections.get(key)
        if isinstance(nested, Mapping):
            yield f"{key}.name", "str", next(iter(nested)), f"{meanings[f.name]}: {', '.join(nested)}"
            takers: dict[tuple[str, str, str, str], list[str]] = {}  # which constructors share a setting
            for name, constructor in nested.items():
                for setting in settings(constructor, sections, key + "."):
                    takers.setdefault(setting, []).append(name)
            for (inner, kind, text, meaning), names in takers.items():
                yield inner, kind, text, meaning if meaning.startswith("(") else f"({', '.join(names)}) {meaning}"
        elif nested is not None:
            own = default if is_dataclass(default) else None
            yield from settings(typing.cast(Constructor, nested), sections, key + ".", own)
        else:
            kind = f.type.__name__ if isinstance(f.type, type) and not typing.get_args(f.type) else str(f.type)
            text = "null" if default is None else str(default)
            yield key, kind.replace("None", "null").replace("typing.", ""), text, meanings.get(f.name, "")


def usage(synopsis: str, cls: type, sections: Sections) -> str:
    """The text of --help: how to call the program, and every key with its default and meaning."""
    lines = [f"usage: {synopsis}", "", (inspect.getdoc(cls) or "").strip(), ""]
    shown: dict[tuple[str, ...], str] = {}
    for key, kind, default, meaning in settings(cls, sections):
        section, _, name = key.rpartition(".")
        if section.startswith(shown.setdefault((name, kind, default, meaning), section) + "."):
            continue  # a section inside another that takes the same
        lines.append(f"  {key}={default}  ({kind})")
        lines += textwrap.wrap(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: no such file, or no YAML mapping in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file; give a .yaml, and settings as key=value")
    try:
        content = _plain(OmegaConf.load(path))
    except (*YAML_ERRORS, OSError) as error:
        raise InputError(f"{path}: not a YAML file of settings: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a YAML file of settings: expected `key: value` lines")
    return content


def _takes_more(constructor: Constructor) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values())


def _is_open(sections: Sections, key: str) -> bool:
    """Whether the innermost section that a key is in takes keys that its constructor does not name."""
    owner = max((name for name in sections if key.startswith(f"{name}.")), key=len, default=None)
    constructor = sections[owner] if owner else None
    return callable(constructor) and _takes_more(constructor)


def _merge(config: DictConfig, layer: Mapping[str, Any], prefix: str = "") -> DictConfig:
    _check_values(layer, prefix)  # OmegaConf makes a float of an integer of any length, or tries to
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(config, layer))
        _check_values(_plain(merged), prefix)
        return merged
    except OmegaConfBaseException as error:
        raise InputError(f"{prefix}{error.full_key}: {_first_line(error)}; see --help for what it takes") from error


def _check_values(values: Mapping[str, Any], prefix: str) -> None:
    """Refuses what no setting takes, whichever it is."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _check_values(value, f"{key}.")
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, float):
                require(abs(v) <= 1e30, f"{key}={v}: must be a finite number, of 1e30 at most")
            elif isinstance(v, int):
                require(abs(v) < 2**63, f"{key}={str(v)[:50]}: must be below 2^63")
            elif isinstance(v, str):
                require(bool(v.strip()), f"{key} is empty; give it a value, or leave it out")
                lines = any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in v)
                require(not lines, f"{key}={v!r}: holds a line break or another control character; leave it out")
                pattern = any(character in v for character in "{*?[")  # may stand for many files
                longest = len(os.fsencode(v)) if pattern else max(len(os.fsencode(part)) for part in v.split("/"))
                require(longest <= (4095 if pattern else 255), f"{key}={v[:50]}...: is too long for a name or a path")


def _no_such_key(key: str, known: Sequence[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    elsewhere = sorted((k for k in known if k.rsplit(".", 1)[-1] == last), key=lambda k: k.count("."))
    near = difflib.get_close_matches(key, known, 1, 0.9) or elsewhere or difflib.get_close_matches(key, known, 1, 0.5)
    return f"{key}: no such key; " + (f"did you mean {near[0]}?" if near else "see --help for all of them")


def _leaves(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, as section.key, and its value: {} for an empty section."""
    for key, value in layer.items():
        remedy = "in a file a section is a line of its own, and its keys are indented below it"
        require("." not in str(key), f"{prefix}{key}: no such key, as it has a dot; {remedy}")
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_dataclass(constructor: Constructor) -> type:
    """The constructor's keyword arguments (those with a default) as a dataclass, which OmegaConf can check against."""
    if is_dataclass(constructor):
        return typing.cast(type, constructor)
    members = []
    for p in inspect.signature(constructor).parameters.values():
        if p.default is not p.empty:
            value = list(p.default) if isinstance(p.default, tuple) else p.default
            kind = list[typing.get_args(p.annotation)[0]] if isinstance(p.default, tuple) else p.annotation  # type: ignore[misc]
            members.append((p.name, kind, field(default_factory=functools.partial(copy.copy, value))))
    return make_dataclass(getattr(constructor, "__name__", "Options"), members)


@functools.cache
def _meanings(schema: Constructor) -> dict[str, str]:
    """What each setting means: the string below a dataclass's field, or the line in a constructor's `Args:`."""
    meanings: dict[str, str] = {}
    if is_dataclass(schema):
        for ancestor in filter(is_dataclass, reversed(inspect.getmro(typing.cast(type, schema)))):
            body = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body[0]
            statements = typing.cast(ast.ClassDef, body).body
            for statement, following in itertools.pairwise(statements):
                if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                    name = typing.cast(ast.Name, statement.target).id
                    meanings[name] = " ".join(str(ast.literal_eval(following.value)).split())
        return meanings
    for described in reversed(inspect.getmro(schema)) if inspect.isclass(schema) else [schema]:
        arguments = inspect.cleandoc(described.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        name = ""
        for line in textwrap.dedent(arguments).splitlines():
            if not line.startswith(" "):
                name, _, line = line.partition(":")
                meanings[name] = ""
            meanings[name] = f"{meanings[name]} {line.strip()}".strip()
    return meanings


def _plain(config: Any) -> Any:
    if not OmegaConf.is_config(config):
        return config
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"  # its text begins with what went well before
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save_config(config: Any, path: Path) -> None:
    """Writes the configuration as YAML, every default included; whole or not at all."""
    beside = path.with_suffix(".tmp")
    OmegaConf.save(OmegaConf.structured(config), beside)
    beside.rename(path)


def require(condition: bool, message: str) -> None:
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_size(key: str, value: int, most: int = 2**63, least: int = 1) -> None:
    """Raises InputError for a whole number that is too small, or so large that it can only be a mistake."""
    require(value >= least, f"{key}={value}: must be at least {least}")
    require(value <= most, f"{key}={value}: must be at most {most}")
