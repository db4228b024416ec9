"""Every setting, its default and its meaning; how they are read is in `vqgen.cli`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vqgen.codes import ORDERS
from vqgen.errors import require, require_choice, require_size

# The settings that are paths, by the last part of their keys: the programs expand `~` in them.
PATHS = {"run_dir", "source", "val_source", "stage1", "codes_dir", "weights", "out"}
PATHS |= {"cache_dir", "feature_weights", "perceptual_weights", "compare", "images", "reference"}
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
    """`auto` does what WANDB_MODE and WANDB_DISABLED say, else goes online with an API key and offline without;
    `online`, `offline` or `disabled`."""
    project: str | None = None
    """Name of the wandb project; null takes WANDB_PROJECT, or else vqgen."""


@dataclass
class Stage1Config:
    """Stage 1: train the tokenizer, a VQ-VAE."""

    run_dir: str = "runs/stage1"
    """The run's folder; the same command again goes on from its newest checkpoint."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """The tokenizer's architecture"""
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
    order: str = "raster"
    """The order in which the prior writes the codes: `raster`."""
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
        require_choice("order", self.order, ORDERS, "order of tokens")
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
    """Feature network: `efficientnet-lite0` (ImageNet; in vqgen[evaluation]), `inception` (the standard one,
    downloaded) or `lenet` (trained here on the reference's own classes, for digits and the like)."""
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
