"""Every setting, with its default and its meaning; `vqgen.cli` reads them."""

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, get_args

from vqgen.codes import ORDERS, sides
from vqgen.errors import InputError, require, require_choice, require_size

# The last part of the key of each setting that is a path; the programs expand `~` in these.
PATHS = {"run_dir", "init_from", "source", "val_source", "stage1", "stage2", "codes_dir", "weights", "out"}
PATHS |= {"cache_dir", "feature_weights", "perceptual_weights", "compare", "images", "reference", "image", "mask"}
ADDRESSES = {"source", "val_source", "images", "reference"}  # those of them that may also be an address
SamplePrecision = Literal["no", "bf16"]
Tune = Literal["fd", "nll"]
BestBy = Literal["likelihood", "class"]
FEATURES = "efficientnet-lite0"  # the feature network that needs no download and no training
VQGAN_SETTINGS = ["loss.perceptual.name=alex", "loss.adversarial.name=non_saturating"]


@dataclass
class DataConfig:
    """The images, and how each comes to `image_size`."""

    source: str = "digits"
    """The images: `digits` (built in); a folder, whose subfolders are the classes; tar, zip or parquet files, as in
    `train-{00000..00009}.tar`; an .npz or .npy; a folder of IDX files like MNIST's; `hf:NAME`, a data set of the
    Hugging Face Hub; or any of these at an address that begins with `https://`, `s3://` or `hf://`, which is fetched
    once into the user's cache folder."""
    val_source: str | None = None
    """Held-out images, in any of the same forms; null takes the source's own, or splits some off."""
    val_fraction: float = 0.05
    """Share of the images to hold out, chosen by a hash of the file's name, if there are no held-out images."""
    label_column: str | None = None
    """Column of the label file or table that is the class; null takes the only one, or one called label or class."""
    image_column: str | None = None
    """Column of a table that has the images; null takes the only one, or one called image or img."""
    label_key: str | None = None
    """Key of the class in the .json file beside each image, or `txt` for its .txt file; null takes label or class."""
    image_size: Any = field(default=32, metadata={"type": "int | list[int]"})  # OmegaConf has no such union
    """Size of what the model sees, in pixels: the side of a square, or [height,width]."""
    channels: int | None = None
    """1 (grey) or 3 (RGB); null takes 1 if the images are grey, else 3."""
    resize: Literal["crop", "pad"] = "crop"
    """`crop` scales the image until it covers image_size and crops the centre; `pad` shrinks large images and pads."""
    white: float | None = None
    """The value that is white in images of more than 8 bits (16 bits, floats); null finds one for the whole set."""
    background: str = "white"
    """Colour behind transparent pixels and in the padding: a name or #rrggbb."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    augment: list[float] | None = None
    """Range of the random crops that stage 1 and the GAN train on, as in [0.8,1]: the crop's sides as a share of the
    image's, which stage 2 and the evaluations see whole (with resize=crop, its centre). Crops are enlarged to
    image_size."""
    crops: int = 1
    """Versions of each training image that stage 2 encodes, one of which it takes in each epoch: 1, 5 (the image, and
    the four corners of the image at 1.1 times the size) or 10 (the five and their mirror images)."""
    max_images: int | None = None
    """Largest number of training images, and also of held-out images, for a quick try: always the same random ones,
    with at least one of each class; null takes all."""
    stream: bool = False
    """Read tar shards one after another, without an index; for data that do not fit on the disk."""
    shuffle_buffer: int = 10000
    """Encoded images that each rank keeps in memory to shuffle a stream."""
    on_error: Literal["skip", "raise"] = "skip"
    """For an image that does not load: `skip` it and name it in the run's skipped.txt, or `raise` an error."""
    cache_gb: float = 1.0
    """If the decoded data set is at most this large, each process keeps it in memory; otherwise training decodes it."""
    workers: int = 2
    """Number of processes per rank that decode images, if the data set is not in memory."""

    def __post_init__(self) -> None:
        require_size("data.workers", self.workers, 256, least=0)
        self.image_size = _checked_size("data.image_size", self.image_size)
        if self.augment is not None:
            ordered = len(self.augment) == 2 and 0 < self.augment[0] <= self.augment[1] <= 1
            require(
                ordered, f"data.augment={self.augment}: must be two shares in order, above 0 and at most 1: [0.8,1]"
            )
        if self.crops not in (1, 5, 10):
            remedy = "for the image and its mirror image use data.flip=true" if self.crops == 2 else "use 1, 5 or 10"
            raise InputError(f"data.crops={self.crops}: is no such number of crops; {remedy}")
        mixed = self.flip and self.crops == 5
        require(
            not mixed, "data.crops=5: has no mirror images, but data.flip=true; use data.crops=10 or data.flip=false"
        )
        if self.max_images is not None:
            require_size("data.max_images", self.max_images)
            fewer = "name fewer shards, or use data.stream=false"
            require(not self.stream, f"data.max_images={self.max_images}: not for a stream, which has no end; {fewer}")
        require_size("data.shuffle_buffer", self.shuffle_buffer)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the model sees, in pixels."""
        return sides(self.image_size)


def _checked_size(key: str, value: Any) -> int | list[int]:
    """An image size as a whole number, or as a list of a height and another width.

    Raises:
        InputError: it is neither.
    """
    numbers = list(value) if isinstance(value, list | tuple) else [value] * 2
    numbers = [int(n) if isinstance(n, str) and n.isdecimal() else n for n in numbers]
    whole = len(numbers) == 2 and all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers)
    require(whole, f"{key}={value}: must be a number of pixels, or two as in [height,width]")
    height, width = map(int, numbers)
    return height if height == width else [height, width]


@dataclass
class PerceptualConfig:
    """The distance between images and reconstructions in an ImageNet classifier's features."""

    name: Literal["none", "alex", "vgg", "lpips-vgg"] = "none"
    """`none`, `alex` or `vgg` (shift-tolerant LPIPS), or `lpips-vgg` (the original)."""
    weights: list[str] = field(default_factory=list)
    """Files with its weights; an empty list takes the installed ones, and for `lpips-vgg` fetches VGG16 once (528 MB).
    `lpips-vgg` takes two: [VGG16.pth,HEADS.pth]."""
    weight: float = 0.01
    """Its weight in the loss. With a much larger weight the decoder draws patterns that only the classifier takes for
    texture."""
    every: int = 16
    """N: it is computed on every N-th image of each pass, but at least on one; a larger N costs less, and gives the
    same on average."""
    start: float = 0.5
    """Share of the run after which it counts; earlier steps are cheaper."""

    def __post_init__(self) -> None:
        require(0 <= self.start <= 1, f"loss.perceptual.start={self.start}: is a share of the run, from 0 to 1")
        require(self.weight >= 0, f"loss.perceptual.weight={self.weight}: must be 0 or more")
        require_size("loss.perceptual.every", self.every)


@dataclass
class AdversarialConfig:
    """The patch discriminator's loss, which makes the tokenizer a VQGAN."""

    name: Literal["none", "non_saturating", "hinge", "least_squares"] = "none"
    """`none`, `non_saturating`, `hinge` or `least_squares`."""
    weight: float = 0.3
    """Its weight in the loss; with `adaptive`, a factor of the adaptive weight."""
    every: int = 4
    """N: D sees every N-th image of each pass, but at least one, and its reconstruction; a larger N costs less. Only
    these images get an adversarial gradient."""
    augment: list[Literal["color", "translation", "cutout"]] = field(default_factory=list)
    """What is changed at random in all images that D sees, so that it cannot learn a small set by heart (DiffAugment);
    its authors have `[color,translation,cutout]`."""
    adaptive: bool = True
    """Adapt the weight so that D's gradient at the decoder's last layer is as large as the others' (VQGAN, eq. 7)."""
    start: float = 0.75
    """Share of the run after which the decoder sees the discriminator; late in the run the learning rate is low."""
    lead: float = 0.15
    """Share of the run before `start` in which the discriminator already learns."""
    ramp: float = 0.1
    """Share of the run after `start` in which the weight rises from 0."""
    lr: float = 2e-3
    """Learning rate of the discriminator until `start`; after that it falls in proportion to the tokenizer's."""
    lecam: float = 0.0
    """Weight of LeCam's regularisation, which helps with few images; 0.01, for example."""
    r1: float = 1.0
    """Weight of the gradient penalty R1, tuned at 32 and 64 pixels; larger images need less. With 0 the decoder learns
    noise that fools the discriminator instead of texture."""

    def __post_init__(self) -> None:
        require(0 <= self.start <= 1, f"loss.adversarial.start={self.start}: is a share of the run, from 0 to 1")
        for name in ("weight", "lead", "ramp", "lecam", "r1"):
            value = getattr(self, name)
            require(value >= 0, f"loss.adversarial.{name}={value}: must be 0 or more")
        require(self.lr > 0, f"loss.adversarial.lr={self.lr}: must be positive")
        require_size("loss.adversarial.every", self.every)
        self.augment = [kind for kind in ("color", "translation", "cutout") if kind in self.augment]


@dataclass
class LossConfig:
    """The losses of stage 1 besides the quantizer's own."""

    rec: Literal["mse", "l1"] = "mse"
    """Distance between image and reconstruction: `mse` (best PSNR) or `l1` (crisper edges)."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)


@dataclass
class PerturbConfig:
    """Codes replaced by near ones before the decoder sees them, so that it forgives the prior's errors (RobusTok)."""

    images: float = 0.0
    """Share of the images in which codes are replaced; 0 turns it off, RobusTok has 0.1."""
    codes: float = 1.0
    """Share of the codes of these images that are replaced."""
    nearest: int = 12
    """A code is replaced by one of so many codes, those nearest to it. RobusTok has 100 of 4,096, as large a share."""
    end: float = 0.5
    """Factor of `codes` and `nearest` at the end: from 1 after a fifth of the run, it falls to this at three fifths."""

    def __post_init__(self) -> None:
        for name in ("images", "codes", "end"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"perturb.{name}={value}: is a share, from 0 to 1")
        require_size("perturb.nearest", self.nearest)


@dataclass
class EquivarianceConfig:
    """Latents scaled and turned, of which the decoder has to make the image so transformed (EQ-VAE)."""

    share: float = 0.0
    """Share of the steps that do so; 0 turns it off, EQ-VAE has 0.5."""
    scale: float = 0.25
    """The least scale of the latent's sides, which become any whole number from there to below their own; 1 leaves
    their size."""
    rotate: bool = True
    """Turn the latent by one, two or three quarters."""
    flip: bool = False
    """Mirror the latent in half of these steps."""

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, f"equivariance.share={self.share}: is a share of the steps, from 0 to 1")
        require(0 < self.scale <= 1, f"equivariance.scale={self.scale}: is a share, above 0 and at most 1")
        idle = self.scale == 1 and not self.rotate and not self.flip
        remedy = "use equivariance.rotate=true, or equivariance.scale=0.25"
        require(not (self.share and idle), f"equivariance.share={self.share}: nothing is left to do; {remedy}")


@dataclass
class RedrawConfig:
    """Codes drawn anew by a prior, of which a frozen tokenizer's decoder learns to make the image (RobusTok)."""

    stage2: str | None = None
    """A stage-2 run whose prior draws the codes; null draws none. It needs freeze=[encoder,quantizer], with `init_from`
    the tokenizer that the prior is for."""
    keep: float = 0.7
    """Share of the codes that stay those of the image."""

    def __post_init__(self) -> None:
        require(0 <= self.keep <= 1, f"redraw.keep={self.keep}: is a share of the codes, from 0 to 1")


@dataclass
class OptimConfig:
    """AdamW, with linear warm-up and a cosine to zero over the run's budget."""

    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and convolutions only."""
    beta1: float = 0.9
    """Adam's decay rate for the mean of the gradient."""
    beta2: float = 0.99
    """Adam's decay rate for the mean of the gradient's square."""
    warmup: float = 0.1
    """Share of the budget over which the learning rate rises to its peak."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; larger gradients are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}={getattr(self, name)}: must be from 0 to below 1")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: must be 0 or more")
        require(self.lr > 0, f"optim.lr={self.lr}: must be positive")
        require(0 <= self.warmup < 1, f"optim.warmup={self.warmup}: is a share of the run, from 0 to below 1")
        require(self.grad_clip > 0, f"optim.grad_clip={self.grad_clip}: must be positive")


@dataclass
class MuonConfig(OptimConfig):
    """Muon or AdamW, with linear warm-up and a cosine to zero over the run's budget."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon`: orthogonalised steps for the weights between hidden layers, of the same size as AdamW's, which trains the
    others; or `adamw` for all."""


@dataclass
class TokenizerOptimConfig(MuonConfig):
    """Muon or AdamW, with linear warm-up and a cosine to zero over the run's budget."""

    lr: float = 1e-2
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises to its peak."""


@dataclass
class TrainConfig:
    """The length of training, the size of its steps, and what it writes on the way."""

    batch_size: int = 64
    """Images per step, over all processes and accumulation steps together."""
    max_steps: int | None = 4500
    """The run ends after this many steps; null sets no bound."""
    max_seconds: float | None = None
    """The run ends after this many seconds of training, not counting evaluation and start-up; null sets no bound."""
    accumulation: int = 1
    """Forward and backward passes per step; more passes take less memory."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """`no`, `bf16` or `fp16`; null takes the setting of `accelerate launch`."""
    ema: float = 0.05
    """Width of the weight average that is evaluated and saved, as a share of the run so far; 0 turns it off."""
    log_every: int = 100
    """Steps between lines of metrics."""
    eval_every: int = 500
    """Steps between evaluations on held-out images, with a picture; also done at the end."""
    eval_images: int = 2000
    """Largest number of held-out images in an evaluation."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end."""
    keep_checkpoints: int = 2
    """Number of the newest checkpoints that stay."""
    milestone_every: int | None = 10000
    """The first checkpoint at or after each multiple of this number of steps stays for good; null keeps none."""
    sharded_checkpoints: bool | None = None
    """Each process writes its share of a checkpoint, while training goes on; `run_dir` must then be on a disk that all
    processes see. null does so under FSDP, and from 1 GB on, if they do."""
    max_hours: float | None = None
    """Save and end after this many hours by the clock, start-up included; the same command then goes on."""
    max_bad_steps: int = 10
    """Steps whose loss is not finite are skipped; after this many in a row the run goes back to a checkpoint."""

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
class Stage1TrainConfig(TrainConfig):
    """The length of training, the size of its steps, and what it writes on the way."""

    activation_checkpointing: bool = False
    """Compute the activations inside the tokenizer's blocks again in the backward pass instead of keeping them: larger
    batches fit, and a step computes about an eighth more. The result is the same."""
    compile: bool = False
    """Compile the tokenizer with torch.compile, but not the discriminator: after some minutes steps may be faster, with
    other rounding."""


@dataclass
class Stage2TrainConfig(TrainConfig):
    """The length of training, the size of its steps, and what it writes on the way."""

    patience: int | None = None
    """The run ends after this many evaluations in a row without a lower held-out NLL, and model/ has the prior with the
    lowest; null goes on to the end, and model/ has the last one."""
    activation_checkpointing: bool = False
    """Compute the activations inside the prior's layers again in the backward pass instead of keeping them: larger
    batches fit, and a step computes about a quarter more. The result is the same."""
    compile: bool = False
    """Compile the prior with torch.compile: after some minutes steps may be faster, with other rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None:
            require_size("train.patience", self.patience)


@dataclass
class TrackingConfig:
    """Where the numbers go besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`online`, `offline`, `disabled`, or `auto`, which follows WANDB_MODE and WANDB_DISABLED; if these are not set,
    `auto` is online with an API key and offline without one."""
    project: str | None = None
    """Name of the wandb project; null takes WANDB_PROJECT, or vqgen if that is not set."""


@dataclass
class Stage1Config:
    """Stage 1: train the tokenizer, a VQ-VAE."""

    run_dir: str = "runs/stage1"
    """The run's folder; the same command again goes on from its newest checkpoint."""
    init_from: str | None = None
    """Weights to start from: a run, its `model/`, one of its `checkpoints/step_*`, or a converted model. Optimizer and
    schedule are new, and settings of `model.*` that are not given are taken from there. null starts from scratch."""
    freeze: list[str] = field(default_factory=list)
    """Parts that stay as they are in `init_from`: `encoder`, `quantizer`, `decoder`. [encoder,quantizer] trains a
    decoder alone, on the same codes."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """The tokenizer's architecture"""
    loss: LossConfig = field(default_factory=LossConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    redraw: RedrawConfig = field(default_factory=RedrawConfig)
    discriminator: dict[str, Any] = field(default_factory=dict)
    optim: TokenizerOptimConfig = field(default_factory=TokenizerOptimConfig)
    train: Stage1TrainConfig = field(default_factory=Stage1TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        self.freeze = sorted(set(self.freeze))
        parts = f"freeze=[{','.join(self.freeze)}]"
        random = bool(self.freeze) and self.init_from is None
        require(not random, f"{parts}: would keep random weights; give init_from=RUN, whose weights they keep")
        no_gradient = (
            "decoder" in self.freeze and self.loss.adversarial.name != "none" and self.loss.adversarial.adaptive
        )
        remedy = "the adaptive weight measures the decoder's gradient; use loss.adversarial.adaptive=false"
        require(not no_gradient, f"{parts}: {remedy}")
        if self.redraw.stage2 is not None:
            stay = {"encoder", "quantizer"} <= {*self.freeze}
            remedy = "a prior's codes mean something to its own tokenizer only; use freeze=[encoder,quantizer]"
            require(stay, f"redraw.stage2={self.redraw.stage2}: {remedy}, and init_from=ITS_TOKENIZER")
            alone = self.perturb.images == 0 and self.equivariance.share == 0
            require(alone, "redraw.stage2: the prior replaces the codes; use perturb.images=0 and equivariance.share=0")


@dataclass
class PreviewConfig(Stage1Config):
    """See a source of images as stage 1 would, without training; only the data settings and `out` matter."""

    out: str = "."
    """Folder for preview.png and preview.json."""


@dataclass
class PlanConfig:
    """Look at images and a machine, and write the configurations that suit them; nothing is trained."""

    out: str = "plan"
    """Folder for stage1.yaml and stage2.yaml, which must not be there yet."""
    hours: float = 1.0
    """Hours of training, both stages together. Evaluations, checkpoints, and decoding and encoding the images once come
    on top."""
    gpus: int | None = None
    """Number of GPUs of the machine that will train; null plans for this machine, some of whose steps are timed."""
    gpu_memory: float | None = None
    """GB of memory of each."""
    tflops: float | None = None
    """Peak of each in bf16, in TFLOP/s, by its data sheet: an A100 has 312, an H100 989, an RTX 4090 165."""
    largest: int = 256
    """Largest side of the images that may be planned, in pixels; all plans are of squares."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        for name in ("hours", "gpu_memory", "tflops"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value}: must be above 0")
        if self.gpus is not None:
            require_size("gpus", self.gpus, 1 << 16)
        numbers = [name for name in ("gpu_memory", "tflops") if getattr(self, name) is None]
        given = (self.gpus, self.gpu_memory, self.tflops)
        if given != (None, None, None):
            self.gpus = self.gpus or 1
            require(not numbers, f"gpus={self.gpus}: give {' and '.join(f'{name}=' for name in numbers)} of each, too")


@dataclass
class ConvertConfig:
    """Convert another project's VQGAN to a model of vqgen, or a model of vqgen to another project's."""

    from_: str | None = None
    """The project that CHECKPOINT is from: `taming`, `llamagen` or `diffusers`; OUT becomes a model of vqgen."""
    to: str | None = None
    """`diffusers`: CHECKPOINT is a stage-1 run or a model of vqgen, and OUT becomes a folder for its VQModel."""


@dataclass
class Stage2Config:
    """Stage 2: fit the prior, an autoregressive transformer over the tokenizer's codes."""

    run_dir: str = "runs/stage2"
    """The run's folder; the same command again goes on from its newest checkpoint."""
    init_from: str | None = None
    """Weights to start from: a stage-2 run, its `model/`, or one of its `checkpoints/step_*`, for codes of the same
    layout. Optimizer and schedule are new, settings of `model.*` that are not given are taken from there, and classes
    keep their weights by name. null starts from scratch."""
    stage1: str = "runs/stage1"
    """The tokenizer: a stage-1 run, or a folder with a model's config.json and model.safetensors."""
    codes_dir: str | None = None
    """Folder for the encoded data set; null takes codes/ in the tokenizer's folder."""
    order: str = "raster"
    """The order of the codes in the prior's sequence: `raster`."""
    class_dropout: float = 0.05
    """Share of the examples whose class is hidden, so that sampling can use classifier-free guidance."""
    context_noise: float = 0.25
    """Largest share of the earlier tokens that are random, so that the prior learns to go on from its own mistakes.
    Each sequence has a share of its own, and all fall to 0 over the first three quarters of the run (reAR)."""
    random_orders: float | None = None
    """Share of the sequences whose codes come in a random order at the end of the run. It is 1 in the first half and
    falls until three quarters. 0 is RAR; with 0.5, say, the prior can also draw inside an image, from the codes on all
    sides. null has the one order only."""
    label_smoothing: float = 0.0
    """Share of the target's probability that goes to all codes alike."""
    embedding_loss: float = 0.0
    """Weight of a second loss, by which the first layer's states predict the vector of the code just read, and those at
    three quarters of the depth the vector of the next (reAR). Its heads are not saved with the model."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optim: MuonConfig = field(default_factory=lambda: MuonConfig(lr=6e-3, beta2=0.95))
    train: Stage2TrainConfig = field(default_factory=lambda: Stage2TrainConfig(batch_size=64, max_steps=1400))
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        require_choice("order", self.order, ORDERS, "order of tokens")
        for name in ("class_dropout", "context_noise", "label_smoothing", "random_orders"):
            require(0 <= (getattr(self, name) or 0) <= 1, f"{name}={getattr(self, name)}: is a share, from 0 to 1")
        require(self.embedding_loss >= 0, f"embedding_loss={self.embedding_loss}: must be 0 or more")


@dataclass
class GANConfig:
    """The plain GAN: noise and a class in, an image out."""

    run_dir: str = "runs/gan"
    """The run's folder; the same command again goes on from its newest checkpoint."""
    init_from: str | None = None
    """Weights to start from: a GAN's run, its `model/`, or one of its `checkpoints/step_*`. Optimizers and schedule are
    new, settings of `generator.*` that are not given are taken from there, and classes keep their weights by name. null
    starts from scratch."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    loss: Literal["non_saturating", "hinge", "least_squares", "minimax"] = "non_saturating"
    """The loss: `non_saturating`, `hinge`, `least_squares`, or `minimax`, the literal log(1 - D(G(z)))."""
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
    """How images are drawn from a stage-2 run, or from a GAN's run."""

    num_images: int = 64
    """Number of images to draw."""
    class_ids: list[int | str] | None = None
    """Classes to cycle through, by name or id, as in [cat,3]: the name of a class means that class, other numbers are
    ids. null takes all classes, -1 means no class."""
    cfg_scale: float = 1.5
    """Classifier-free guidance: 1 turns it off; larger values give more typical and less varied images of a class."""
    temperature: float = 1.0
    """Divides the logits: values below 1 are safer and less varied; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 means all tokens."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 means all tokens."""
    min_p: float = 0.0
    """Draw from tokens that are at least this share as likely as the likeliest; 0 means all tokens."""
    cfg_power: float = 0.0
    """How late the guidance rises along the sequence, from 1 to cfg_scale (RAR's power-cosine); 0 means at once."""
    cfg_start: float = 0.0
    """Share of the tokens that are drawn before guidance begins."""
    best_of: int = 1
    """Draw so many for each image, and keep the one whose codes are likeliest without guidance."""
    precision: SamplePrecision = "no"
    """`bf16` computes the prior in bfloat16, which is faster on GPUs that have it."""
    cuda_graph: bool = False
    """On a CUDA GPU, replay the step that draws a token as a CUDA graph: three times as fast for small priors."""
    seed: int = 0
    """The same seed gives the same images, whatever num_images and batch_size are."""
    batch_size: int = 256
    """Images drawn at a time; fewer take less memory."""
    out: str | None = None
    """Folder for samples.npz and grid.png; null means RUN_DIR/samples, or RUN_DIR/samples/png with png=true."""

    def __post_init__(self) -> None:
        require(self.num_images > 0, f"num_images={self.num_images}: must be at least 1")
        require(self.batch_size > 0, f"batch_size={self.batch_size}: must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature}: must be 0 or more")
        require(self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all) or more")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p}: is a share, from 0 to 1")
        require_size("best_of", self.best_of, 1000)
        require_choice("precision", self.precision, get_args(SamplePrecision), "precision")
        require(self.cfg_power >= 0, f"cfg_power={self.cfg_power}: must be 0 (constant) or more")
        require(0 <= self.cfg_start <= 1, f"cfg_start={self.cfg_start}: is a share of the tokens, from 0 to 1")
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")


@dataclass
class SampleFilesConfig(SampleConfig):
    """Draw images from a stage-2 run, or from a GAN's run."""

    tune: Tune | None = None
    """Try scales of guidance, print the figure of each, and draw with the best instead of cfg_scale. `fd` takes the
    Frechet distance of samples from training images of the same classes; `nll` the likelihood of all held-out images'
    codes, whatever temperature, top_k, top_p and min_p are."""
    tune_images: int = 2000
    """Number of samples for each scale, with tune=fd."""
    best_by: BestBy = "likelihood"
    """What best_of looks at: the `likelihood` of the codes, or the `class`, by a linear classifier on features of the
    training images."""
    features: str = FEATURES
    """Feature network for tune=fd and best_by=class, as in the evaluation."""
    cache_dir: str | None = None
    """Folder for the features of the training images; null means vqgen/ in the user's cache folder."""
    data: dict[str, Any] = field(default_factory=dict)
    png: bool = False
    """Also write each image to OUT/CLASS/00017.png, or to OUT/00017.png without classes; OUT must hold no images."""
    toward: int | str | None = None
    """A class, by name or id, that the images turn into: its share rises from 0 in the first image to 1 in the last."""
    size: Any = field(default=None, metadata={"type": "int | list[int] | None"})
    """Side of larger images than the training's, or [height,width]. They are drawn in windows of the training's size,
    which overlap by half."""
    image: str | None = None
    """An image file to start from. It comes to the model's size as in training, and one of keep_rows, mask and vary
    says what the prior draws anew."""
    keep_rows: float | None = None
    """Share of the image's height that stays, from the top; what is below is drawn."""
    mask: str | None = None
    """An image file of the image's size: what is lighter than middle grey there is drawn. Each code is drawn from those
    before it; by a prior trained with random_orders above 0, from all that stay, too."""
    vary: float | None = None
    """Share of the image's codes, at random places, that are drawn anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("keep_rows", "mask", "vary") if getattr(self, name) is not None]
        if self.image is None:
            require(not given, f"{' and '.join(given)}: say what stays of an image; give image=FILE, too")
        else:
            require(len(given) == 1, "image: give one of keep_rows=0.5, mask=FILE and vary=0.3, to say what is drawn")
        if self.keep_rows is not None:
            rows = f"keep_rows={self.keep_rows}: is a share of the height, from 0 to below 1"
            require(0 <= self.keep_rows < 1, rows)
        if self.size is not None:
            self.size = _checked_size("size", self.size)
        require(self.size is None or self.image is None, "size: a larger image cannot start from one; leave image out")
        judged = "best_by: chooses among several images; give best_of=8, say"
        require(self.best_by != "class" or self.best_of > 1, judged)
        window = "best_of: the likelihood is that of one window, not of a larger image; use best_by=class, or a judge"
        require(self.best_of == 1 or self.size is None or self.best_by == "class", window)
        for name in ("image", "toward", "size"):
            mixed = f"tune: is for images of the training's size and of one class each; leave {name} out, or tune"
            require(self.tune is None or getattr(self, name) is None, mixed)
        measures = self.tune is not None or self.best_by == "class"
        others = self.features != FEATURES or self.cache_dir is not None or bool(self.data)
        unused = "features, cache_dir and data.*: are for tune and best_by=class; leave them out"
        require(measures or not others, unused)
        fixed = self.tune == "fd" or self.tune_images == type(self).tune_images
        require(fixed, "tune_images: is the number of samples of tune=fd; give that, or leave it out")
        require(self.tune_images > 1, f"tune_images={self.tune_images}: must be 2 or more")
        require(self.vary is None or 0 < self.vary <= 1, f"vary={self.vary}: is a share, above 0 and at most 1")


@dataclass
class EvaluateConfig:
    """The settings of both evaluations."""

    features: str = FEATURES
    """Feature network: `efficientnet-lite0` (ImageNet; in vqgen[evaluation]), `inception` (the standard one,
    downloaded) or `lenet` (trained here on the reference's own classes, for digits and similar images)."""
    feature_weights: str | None = None
    """File of the feature network's weights; null takes the installed ones, downloads them, or trains them."""
    cache_dir: str | None = None
    """Folder for the features of reference sets; null means vqgen/ in the user's cache folder."""
    tf32: bool = False
    """On a CUDA GPU, compute all networks with TF32's 10 bits, which moves a Frechet distance in its third digit. Such
    figures compare with their like only."""
    compare: str | None = None
    """Another run, or an evaluation.json: print both evaluations side by side without evaluating again."""
    data: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stage1EvaluateConfig(EvaluateConfig):
    """Measure a tokenizer on held-out images.

    Settings of data.* and tracking.* that are not given are taken from the run. With another data.source, too, the
    held-out part is measured.
    """

    num_images: int | None = None
    """Largest number of held-out images to measure; null means all."""
    perceptual: str = "alex"
    """Perceptual distance: `alex` or `vgg` (shift-tolerant LPIPS), `lpips-vgg` (the original) or `none`."""
    perceptual_weights: list[str] = field(default_factory=list)
    """Files with its weights, as in stage 1's loss.perceptual.weights; an empty list takes the published ones."""
    perturbed: float = 0.5
    """Share of the codes that are replaced by near ones for pFD."""
    batch_size: int = 128
    """Images per batch of each process."""
    seed: int = 0
    """Seed of random choices in the evaluation."""
    out: str | None = None
    """Folder for evaluation.json and the pictures; null means RUN_DIR/evaluation."""

    def __post_init__(self) -> None:
        require(self.num_images is None or self.num_images > 1, f"num_images={self.num_images}: must be 2 or more")
        require(0 <= self.perturbed <= 1, f"perturbed={self.perturbed}: is a share of the codes, from 0 to 1")
        require(self.batch_size > 0, f"batch_size={self.batch_size}: must be at least 1")
        require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")


@dataclass
class Stage2EvaluateConfig(EvaluateConfig, SampleConfig):
    """Measure a prior and its samples, or any images against others.

    Settings of data.* and tracking.* that are not given are taken from the run.
    """

    num_images: int = 2000
    """Number of images to draw; with `images`, the largest number of them to measure."""
    num_reference: int | None = 10000
    """Largest number of training images, or of images in `reference`, to compare with; null means all."""
    search: int | None = 100_000
    """Largest number of training images, counted with their mirror images and crops, that are searched for copies; 0
    leaves that search out, null searches all."""
    images: str | None = None
    """Existing images to measure instead of a run's samples, in any of the forms of data.source."""
    reference: str | None = None
    """The images to compare `images` with, in any of the same forms."""
    out: str | None = None
    """Folder for evaluation.json and the pictures; null means RUN_DIR/evaluation, or evaluation/ with `images`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_images > 1, f"num_images={self.num_images}: must be 2 or more")
        few = self.num_reference is not None and self.num_reference < 2
        require(not few, f"num_reference={self.num_reference}: must be 2 or more, or null for all")
        require(self.search is None or self.search >= 0, f"search={self.search}: must be 0 (off) or more, or null")


@dataclass
class CompareConfig:
    """Train a GAN, a VQ-VAE with a prior and a VQGAN with a prior for the same time, and compare them."""

    run_dir: str = "runs/compare"
    """Folder for the runs, comparison.md and comparison.png; the same command again goes on where it stopped."""
    seconds: float = 180.0
    """Training time of each of the three in seconds, for both stages together."""
    prior_share: float = 0.45
    """The prior's share of that time, if there is a prior."""
    seed: int = 0
    """Seed of the runs and of the samples."""
    num_images: int = 2000
    """Number of images to draw from each model; the largest number of held-out images to measure."""
    num_reference: int | None = 10000
    """Largest number of training images to compare samples with; null means all."""
    features: str = FEATURES
    """Feature network: `efficientnet-lite0`, `inception` or `lenet`, as in the evaluations."""
    perceptual: str = "alex"
    """Perceptual distance of the reconstructions: `alex`, `vgg`, `lpips-vgg` or `none`, as in the evaluations."""
    cache_dir: str | None = None
    """Folder for the features of reference sets; null means vqgen/ in the user's cache folder."""
    gan: list[str] = field(default_factory=list)
    """Further settings of stage1/train_gan.py, as in 'gan=[optim.lr=1e-4]'."""
    tokenizer: list[str] = field(default_factory=list)
    """Further settings of stage1/train.py, for both tokenizers."""
    vqgan: list[str] = field(default_factory=VQGAN_SETTINGS.copy)
    """The settings that make the second tokenizer a VQGAN."""
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
