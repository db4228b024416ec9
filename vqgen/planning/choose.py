"""Which configuration suits some images, a machine and a number of hours: rules of thumb, each with its reason."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vqgen.errors import InputError, require
from vqgen.planning.cost import Cost

GB = 1e9
SLACK = 1.15  # a real allocator's memory, as a multiple of the tensors' own
FEWEST = 50  # images that anything can be learned from
SMALL_SET, LARGE_SET = 5_000, 30_000  # images: the first is learned by heart soon, the second is not
STAGE1_SHARE = 0.5  # of the hours


class Images(NamedTuple):
    """What a plan must know of the training images.

    Attributes:
        number: how many there are.
        channels: 1 or 3.
        side: median of the originals' shorter side, in pixels.
        mirrored: whether data.flip=true.
    """

    number: int
    channels: int
    side: int
    mirrored: bool


class Machine(NamedTuple):
    """Where the run will be.

    Attributes:
        devices: number of GPUs, or 1 for the CPU.
        memory: bytes of each.
        flops: peak FLOP/s of each.
        timed: whether this is the machine that plans, where steps are timed.
        precision: train.mixed_precision.
        words: what it is.
    """

    devices: int
    memory: float
    flops: float
    timed: bool
    precision: str
    words: str


class Setting(NamedTuple):
    """A line of a configuration: its key, such as train.batch_size, its value, and why."""

    key: str
    value: Any
    why: str = ""


AGAIN = Setting("train.activation_checkpointing", True, "or the activations of one example would not fit")


@dataclass(frozen=True)
class Rung:
    """A tokenizer that has been tried.

    Attributes:
        size: side of its images, in pixels.
        codes: the number of codes of an image.
        settings: stage 1's settings.
        least: training examples, repetitions included, after which it is of use, with many images.
        enough: those after which more bring little, with many images.
        why: where it was tried.
    """

    size: int
    codes: int
    settings: tuple[Setting, ...]
    least: int
    enough: int
    why: str


@dataclass(frozen=True)
class PriorSize:
    """The size of a prior, and the learning rate that suits it."""

    width: int
    layers: int
    heads: int
    optim: tuple[Setting, ...] = ()


EPOCHS = 40  # of a large set in stage 1, as LlamaGen
LEAST_EPOCHS, MOST_EPOCHS = 200, 1000  # of a small set
MANY_CODES = 20_000  # images; with fewer, 16,384 codes would be rarely seen
PRIOR_EPOCHS_SMALL, PRIOR_EPOCHS_LARGE = 60, 300  # the second as LlamaGen
PRIOR_LEAST = 40_000  # sequences after which a prior is of use
PARAMETERS_PER_TOKEN = 4  # of a set; a larger prior learns the set by heart
# Of a GPU's peak in bf16. The first is measured on an H100 (docs/tokenizers.md), the second is assumed.
UTILISATION, PRIOR_UTILISATION = 0.1, 0.25
LEAST_STEP = 0.017  # seconds: a small network's step on an H100, most of which are launches


def _light(lr: float, batch: int, **model: Any) -> tuple[Setting, ...]:
    options = [Setting(f"model.{key}", value) for key, value in model.items()]
    return (*options, Setting("optim.lr", lr), Setting("train.batch_size", batch))


def _vqgan(*model: Setting) -> tuple[Setting, ...]:
    quantizer = {"name": "vq", "codebook_size": 16384, "code_dim": 8, "lookup": "cosine", "commitment_weight": 0.25}
    adversarial = {"name": "hinge", "weight": 0.5, "every": 1, "adaptive": False, "start": 0.05, "lead": 0}
    adversarial |= {"ramp": 0, "lr": 1e-4, "r1": 0}
    return (
        Setting("model.name", "vqgan", "the network and losses of LlamaGen's tokenizers"),
        *model,
        Setting("model.quantizer", quantizer),
        Setting("loss.perceptual", {"name": "lpips-vgg", "weight": 1, "every": 1, "start": 0}),
        Setting("loss.adversarial", adversarial),
        Setting("discriminator", {"layers": 3, "width": 64}),
        Setting("optim", {"name": "adamw", "lr": 1e-4, "beta2": 0.95, "weight_decay": 0, "warmup": 0.01}),
        Setting("train.batch_size", 128),
    )


RUNGS: Sequence[Rung] = (  # the best last
    Rung(32, 16, (Setting("train.batch_size", 64),), 60_000, 300_000, "the defaults, as in `make demo`"),
    Rung(
        32, 64,
        _light(4e-3, 32, patch_size=4, widths=[96], encoder_blocks=3, decoder_blocks=6, block="separable",
               head_width=16),
        60_000, 300_000, "as configs/stage1/cifar10.yaml",
    ),
    Rung(
        64, 64,
        _light(4e-3, 32, patch_size=8, widths=[128], encoder_blocks=2, decoder_blocks=4, block="separable"),
        60_000, 300_000, "as configs/stage1/emoji64.yaml",
    ),
    Rung(
        128, 256, _vqgan(Setting("model.multipliers", [1, 2, 2, 4])), 3_000_000, 50_000_000,
        "the network and recipe of configs/stage1/imagenet256_f8.yaml at half of its size; not tried by us",
    ),
    Rung(
        256, 256, _vqgan(), 6_000_000, 50_000_000,
        "as configs/stage1/imagenet256_f16.yaml, LlamaGen's recipe; not trained by us",
    ),
)  # fmt: skip
_ADAMW = (Setting("optim", {"name": "adamw", "lr": 1e-4, "weight_decay": 0.05, "warmup": 0.01}, "as for LlamaGen-B"),)
PRIOR_SIZES: Sequence[PriorSize] = (  # the largest last
    PriorSize(128, 4, 4),
    PriorSize(192, 6, 6, (Setting("optim.lr", 4e-3, "falls with the width"),)),
    PriorSize(256, 8, 8, (Setting("optim.lr", 3e-3, "falls with the width"),)),
    PriorSize(512, 8, 8, (Setting("optim.lr", 1.5e-3, "falls with the width"),)),
    PriorSize(768, 12, 12, _ADAMW),
    PriorSize(1024, 24, 16, _ADAMW),
)


class Stage(NamedTuple):
    """The plan of one stage.

    Attributes:
        settings: its configuration.
        cost: what a step costs.
        batch: examples of a step.
        passes: the passes of a step on each device.
        steps: number of steps.
        speed: examples a second, on all devices.
        epochs: how often it sees each image.
        memory: bytes of the busiest device.
    """

    settings: list[Setting]
    cost: Cost
    batch: int
    passes: int
    steps: int
    speed: float
    epochs: float
    memory: float

    @property
    def hours(self) -> float:
        """The hours that it trains."""
        return self.steps * self.batch / self.speed / 3600


class TooSlow(InputError):
    """The budget is too small; `hours` is what both stages would take at the least."""

    def __init__(self, hours: float):
        super().__init__(f"needs {hours:.1f} hours")
        self.hours = hours


def passes_that_fit(cost: Cost, batch: int, machine: Machine, extra: float) -> tuple[int, float] | None:
    """The fewest passes of a step with which it fits in each device's memory, and the bytes; None if none do.

    Args:
        cost: what a step costs.
        batch: examples of a step, over all devices and passes.
        machine: where it runs.
        extra: bytes that are taken besides.
    """
    for passes in (2**i for i in range(12)):
        if batch % (machine.devices * passes):
            break
        needed = extra + SLACK * cost.memory(batch // (machine.devices * passes))
        if needed <= machine.memory:
            return passes, needed
    return None


def _speed(
    cost: Cost,
    utilisation: float,
    machine: Machine,
    batch: int,
    passes: int,
    asked: float,
    timed: Callable[[], float],
) -> float:
    """Examples a second: timed, unless even the peak is less than asked; on other machines by a share of the peak."""
    peak = machine.devices * machine.flops / cost.flops
    if not machine.timed:
        return batch / max(passes * LEAST_STEP, batch / (utilisation * peak))
    return timed() if peak >= asked else peak


def tokenizer_settings(rung: Rung, images: Images, machine: Machine) -> list[Setting]:
    """Stage 1's settings for a rung, but for the length of the run."""
    upscaled = images.side < rung.size
    why = f"the originals' median shorter side is {images.side} pixels{', so they are enlarged' if upscaled else ''}"
    chosen = [Setting("data.image_size", rung.size, why)]
    if images.number < SMALL_SET:
        chosen += [Setting("data.augment", [0.9, 1], f"{images.number:,} images are few: crops make them differ")]
    if not images.mirrored:
        chosen += [Setting("data.flip", False, "true doubles the images, if their mirror images are such images, too")]
    own = [_fewer_codes(s) if images.number < MANY_CODES else s for s in rung.settings]
    return [*chosen, *own, *_precision(machine)]


def _fewer_codes(setting: Setting) -> Setting:
    if setting.key != "model.quantizer":
        return setting
    why = f"LlamaGen has 16,384 codes, for more than {MANY_CODES:,} images"
    return setting._replace(value={**setting.value, "codebook_size": 1024}, why=why)


def examples(rung: Rung, images: Images) -> tuple[int, int]:
    """How many training examples, repetitions included, are the least, and how many are enough."""
    least = max(images.number, min(rung.least, max(LEAST_EPOCHS * images.number, RUNGS[0].least)))
    most = max(rung.enough, EPOCHS * images.number)
    return least, max(least, min(most, MOST_EPOCHS * images.number))


def prior_settings(size: PriorSize, images: Images, machine: Machine, batch: int) -> list[Setting]:
    """Stage 2's settings for a size of the prior, but for the length of the run."""
    few, many = images.number < SMALL_SET, images.number * (1 + images.mirrored) >= LARGE_SET
    noise, reason = (0.0, "these images are not learned by heart") if many else (0.25, "as for the built-in digits")
    chosen = []
    if few:
        noise, reason = 0.5, "puts off learning by heart"
        crops = versions_of(images)
        mirrored = "" if images.mirrored else "; 10 would have mirror images, too"
        why = f"{images.number:,} images are few: each has {crops} versions{mirrored}"
        chosen = [Setting("data.crops", crops, why), Setting("optim.weight_decay", 0.1, "tells the prior to forget")]
    return [
        *chosen,
        Setting("context_noise", noise, f"random codes in the context: {reason}"),
        Setting("model.hidden_size", size.width, "the largest prior that the hours train and the images suffice for"),
        Setting("model.num_hidden_layers", size.layers),
        Setting("model.num_attention_heads", size.heads),
        *size.optim,
        Setting("train.batch_size", batch),
        *_precision(machine),
    ]


def versions_of(images: Images) -> int:
    """How many versions of each image the prior sees: crops of few images, mirror images if they are asked for."""
    if images.number < SMALL_SET:
        return 10 if images.mirrored else 5
    return 1 + images.mirrored


def _precision(machine: Machine) -> list[Setting]:
    return [] if machine.precision == "no" else [Setting("train.mixed_precision", machine.precision, machine.words)]


def as_tree(settings: Sequence[Setting]) -> dict[str, Any]:
    """Settings as nested dictionaries."""
    tree: dict[str, Any] = {}
    for key, value, _ in settings:
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def plan_tokenizer(
    images: Images,
    machine: Machine,
    seconds: float,
    largest: int,
    *,
    cost_of: Callable[[list[Setting]], Cost],
    timed: Callable[[list[Setting], int], float],
    extra: float,
) -> tuple[Rung, Stage]:
    """The best rung whose steps fit in the memory, and which the seconds train for long enough.

    Args:
        images: the images.
        machine: where the run will be.
        seconds: how long stage 1 may train.
        largest: largest side of the images.
        cost_of: the cost of settings.
        timed: images a second of settings with so many passes a step, on this machine.
        extra: bytes that a process takes besides.

    Raises:
        InputError: no rung fits in the memory.
        TooSlow: the seconds are too few for every rung that fits.
    """
    candidates = [rung for rung in RUNGS if rung.size <= largest and rung.size <= max(32, images.side)]
    require(bool(candidates), f"largest={largest}: the smallest that can be planned is {RUNGS[0].size}")
    needed, smallest = math.inf, math.inf
    for rung in reversed(candidates):
        settings = tokenizer_settings(rung, images, machine)
        batch = as_tree(settings)["train"]["batch_size"]
        if batch % machine.devices:
            batch = machine.devices * math.ceil(batch / machine.devices)
            settings = [s._replace(value=batch) if s.key == "train.batch_size" else s for s in settings]
        cost = cost_of(settings)
        fits = passes_that_fit(cost, batch, machine, extra)
        if fits is None:
            settings.append(AGAIN)
            cost = cost_of(settings)
            fits = passes_that_fit(cost, batch, machine, extra)
        smallest = min(smallest, extra + SLACK * cost.memory(1))
        if fits is None:
            continue
        passes, memory = fits
        least, enough = examples(rung, images)
        # The smallest is timed in any case, for the error that says how many hours it needs.
        asked = 0 if rung is candidates[0] else least / seconds
        own = functools.partial(timed, settings, passes)
        speed = _speed(cost, UTILISATION, machine, batch, passes, asked, own)
        if speed * seconds < least:
            needed = least / speed
            continue
        steps = math.floor(min(speed * seconds, enough) / batch)
        settings += _length(steps, passes, steps * batch < 0.95 * speed * seconds)
        return rung, Stage(settings, cost, batch, passes, steps, speed, steps * batch / images.number, memory)
    fewest = f"the smallest configuration takes {smallest / GB:.1f} GB at one image a pass"
    require(math.isfinite(needed), f"{machine.words}: nothing fits; {fewest}; use a larger GPU, or the CPU")
    raise TooSlow(needed / STAGE1_SHARE / 3600)


def plan_prior(
    images: Images,
    machine: Machine,
    seconds: float,
    tokens: int,
    *,
    cost_of: Callable[[list[Setting]], Cost],
    timed: Callable[[list[Setting], int], float],
    extra: float,
) -> Stage:
    """The largest prior that the images suffice for, that fits, and which the seconds train for long enough.

    Args:
        images: the images.
        machine: where the run will be.
        seconds: how long stage 2 may train.
        tokens: codes of an image.
        cost_of: the cost of settings.
        timed: sequences a second of settings with so many passes a step, on this machine.
        extra: bytes that a process takes besides.

    Raises:
        InputError: no size fits in the memory.
        TooSlow: the seconds are too few for every size that fits.
    """
    few, needed = images.number < SMALL_SET, math.inf
    for size in reversed(PRIOR_SIZES):
        parameters = 12 * size.layers * size.width**2  # of the layers, about
        learned_from = images.number * versions_of(images) * tokens
        if parameters > PARAMETERS_PER_TOKEN * learned_from and size is not PRIOR_SIZES[0]:
            continue
        batch = 32 if few else 256 if size.width >= 768 else 64
        batch = machine.devices * math.ceil(batch / machine.devices)
        settings = prior_settings(size, images, machine, batch)
        cost = cost_of(settings)
        fits = passes_that_fit(cost, batch, machine, extra)
        if fits is None:
            settings.append(AGAIN)
            cost = cost_of(settings)
            fits = passes_that_fit(cost, batch, machine, extra)
        if fits is None:
            continue
        passes, memory = fits
        least = max(PRIOR_LEAST, images.number)
        asked = 0 if size is PRIOR_SIZES[0] else least / seconds
        own = functools.partial(timed, settings, passes)
        speed = _speed(cost, PRIOR_UTILISATION, machine, batch, passes, asked, own)
        if speed * seconds < least:
            needed = least / speed
            continue
        epochs = PRIOR_EPOCHS_SMALL if images.number < 100_000 else PRIOR_EPOCHS_LARGE
        enough = max(PRIOR_LEAST, epochs * images.number)
        steps = math.floor(min(speed * seconds, enough) / batch)
        settings += _length(steps, passes, steps * batch < 0.95 * speed * seconds)
        return Stage(settings, cost, batch, passes, steps, speed, steps * batch / images.number, memory)
    require(math.isfinite(needed), f"{machine.words}: no prior fits there; use a larger GPU, or the CPU")
    raise TooSlow(needed / (1 - STAGE1_SHARE) / 3600)


def _length(steps: int, passes: int, capped: bool) -> list[Setting]:
    why = "more would bring little, with so many images" if capped else "as many as the hours allow"
    every = max(100, min(5000, steps // 10))
    found = [
        Setting("train.max_steps", steps, why),
        Setting("train.eval_every", every),
        Setting("train.checkpoint_every", every),
    ]
    return found + ([Setting("train.accumulation", passes, "passes of a step, or it would not fit")] * (passes > 1))
