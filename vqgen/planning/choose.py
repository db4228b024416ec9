"""Which configuration suits some images, a machine and a number of hours: rules of thumb, each with its reason."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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
        side: median of the originals' shorter side, in pixels; None if it is not known.
        mirrored: whether data.flip=true.
        crops: data.crops, if the user gives it.
    """

    number: int
    channels: int
    side: int | None
    mirrored: bool
    crops: int | None = None


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
    """The size of a prior, and the settings that suit it."""

    width: int
    layers: int
    heads: int
    settings: tuple[Setting, ...] = ()


EPOCHS = 40  # of a large set in stage 1, as LlamaGen
LEAST_EPOCHS, MOST_EPOCHS = 200, 1000  # of a small set
MANY_CODES = 20_000  # images; with fewer, 16,384 codes would be rarely seen
PRIOR_EPOCHS_SMALL, PRIOR_EPOCHS_LARGE, LARGE_PRIOR_SET = 60, 300, 100_000  # the second, as LlamaGen, from the third on
PRIOR_LEAST = 60_000  # sequences after which a prior is of use
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
        Setting("data.augment", [0.8, 1]),
        Setting("data.workers", 8),
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
_LLAMAGEN = (
    Setting("class_dropout", 0.1, "as configs/stage2/imagenet256_f16.yaml, LlamaGen-B's recipe"),
    Setting("optim.name", "adamw"),
    Setting("optim.lr", 1e-4),
    Setting("optim.weight_decay", 0.05),
    Setting("optim.warmup", 0.01),
)
PRIOR_SIZES: Sequence[PriorSize] = (  # the largest last
    PriorSize(128, 4, 4),
    PriorSize(192, 6, 6, (Setting("optim.lr", 4e-3, "falls with the width"),)),
    PriorSize(256, 8, 8, (Setting("optim.lr", 3e-3, "falls with the width"),)),
    PriorSize(512, 8, 8, (Setting("optim.lr", 1.5e-3, "falls with the width"),)),
    PriorSize(768, 12, 12, _LLAMAGEN),
    PriorSize(1024, 24, 16, _LLAMAGEN),
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


def passes_that_fit(
    cost: Cost, batch: int, machine: Machine, extra: float, evaluation: float = 0.0
) -> tuple[int, float] | None:
    """The fewest passes of a step with which it fits in each device's memory, and the bytes; None if none do.

    Args:
        cost: what a step costs.
        batch: examples of a step, over all devices and passes.
        machine: where it runs.
        extra: bytes that are taken besides.
        evaluation: bytes that an evaluation takes instead of a step's activations.
    """
    own = batch // machine.devices  # examples of each device
    for passes in (n for n in range(1, own + 1) if own % n == 0):
        needed = extra + SLACK * max(cost.memory(own // passes), cost.fixed + evaluation)
        if needed <= machine.memory:
            return passes, needed
    return None


def tokenizer_settings(rung: Rung, images: Images, machine: Machine) -> list[Setting]:
    """Stage 1's settings for a rung, but for the length of the run."""
    why = "the originals' size is not known"
    if images.side is not None:
        enlarged = ", so they are enlarged" if images.side < rung.size else ""
        why = f"the originals' median shorter side is {images.side} pixels{enlarged}"
    chosen = [Setting("data.image_size", rung.size, why)]
    if images.number < SMALL_SET:
        chosen += [Setting("data.augment", [0.9, 1], f"{images.number:,} images are few: crops make them differ")]
    if not images.mirrored:
        chosen += [Setting("data.flip", False, "true doubles the images, if their mirror images are such images, too")]
    own = [_fewer_codes(s) if images.number < MANY_CODES else s for s in rung.settings]
    own = [s for s in own if s.key not in {s.key for s in chosen}]
    return [*chosen, *own, _precision(machine)]


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
        chosen = [] if images.crops else [Setting("data.crops", crops, why)]
        chosen.append(Setting("optim.weight_decay", 0.1, "tells the prior to forget"))
    return [
        *chosen,
        Setting("context_noise", noise, f"random codes in the context: {reason}"),
        Setting("model.hidden_size", size.width, "the largest prior that the hours train and the images suffice for"),
        Setting("model.num_hidden_layers", size.layers),
        Setting("model.num_attention_heads", size.heads),
        *(s for s in size.settings if s.key not in {s.key for s in chosen}),
        Setting("train.batch_size", batch),
        _precision(machine),
    ]


def versions_of(images: Images) -> int:
    """How many versions of each image the prior sees: crops of few images, mirror images if they are asked for."""
    if images.crops or images.number < SMALL_SET:
        return images.crops or (10 if images.mirrored else 5)
    return 1 + images.mirrored


def _precision(machine: Machine) -> Setting:
    return Setting("train.mixed_precision", machine.precision, f"as planned for {machine.words}")


def as_tree(settings: Sequence[Setting]) -> dict[str, Any]:
    """Settings as nested dictionaries."""
    tree: dict[str, Any] = {}
    for key, value, _ in settings:
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        assert last not in place, f"{key} stands there twice"
        place[last] = value
    return tree


class Measures(Protocol):
    """What a plan asks of the programs."""

    def extra(self, size: int) -> float:
        """Bytes that a training process takes besides its networks, with squares of this side."""
        ...

    def tokenizer_cost(self, settings: list[Setting]) -> Cost:
        """The cost of settings of stage 1."""
        ...

    def tokenizer_speed(self, settings: list[Setting], passes: int) -> float:
        """Images a second on this machine, with so many passes a step."""
        ...

    def prior_cost(self, settings: list[Setting], stage1: list[Setting]) -> Cost:
        """The cost of settings of stage 2, after those of stage 1."""
        ...

    def prior_speed(self, settings: list[Setting], stage1: list[Setting], passes: int) -> float:
        """Sequences a second on this machine, with so many passes a step."""
        ...


def plan(images: Images, machine: Machine, hours: float, largest: int, ask: Measures) -> tuple[Rung, Stage, Stage]:
    """The best tokenizer that the hours train, together with a prior for its codes, long enough.

    Args:
        images: the images.
        machine: where the runs will be.
        hours: of training, both stages together.
        largest: largest side of the images.
        ask: measures costs and speeds.

    Raises:
        InputError: nothing fits in the memory, or the hours are too few for everything that fits.
    """
    most = min(largest, max(RUNGS[0].size, images.side or 0))
    candidates = [rung for rung in RUNGS if rung.size <= most]
    require(bool(candidates), f"largest={largest}: the smallest that can be planned is {RUNGS[0].size}")
    unfit: list[Unfit] = []
    stages: list[Stage] = []
    for rung in reversed(candidates):
        unfit, stages, is_smallest = [], [], rung is candidates[0]
        settings = tokenizer_settings(rung, images, machine)
        for stage, share in ((plan_tokenizer, STAGE1_SHARE), (plan_prior, 1 - STAGE1_SHARE)):
            if not unfit or is_smallest:  # whose error says what both stages need
                try:
                    stages.append(stage(images, machine, 3600 * hours * share, rung, settings, ask, is_smallest))
                except Unfit as error:
                    unfit.append(error)
        if not unfit:
            return rung, stages[0], stages[1]
    if too_large := [each.memory for each in unfit if each.seconds is None]:
        least = f"the smallest configuration takes {max(too_large) / GB:.1f} GB at one image a pass"
        raise InputError(f"{machine.words}: nothing fits; {least}; use a larger GPU, or the CPU")
    enough = math.ceil(100 * max(each.seconds or 0 for each in unfit) / 3600) / 100
    fewer = ", or fewer images by data.max_images=" if images.number > PRIOR_LEAST else ""
    few = f"hours={hours:g}: too few even for the smallest model on {images.number:,} images"
    raise InputError(f"{few}; give at least hours={enough:g}{fewer}")


def plan_tokenizer(
    images: Images,
    machine: Machine,
    seconds: float,
    rung: Rung,
    settings: list[Setting],
    ask: Measures,
    is_smallest: bool,
) -> Stage:
    """The plan of stage 1 with the settings of a rung.

    Raises:
        Unfit: it does not fit, or the seconds are too few.
    """
    least, enough = examples(rung, images)
    extra = ask.extra(rung.size)
    budget = Budget(machine, seconds, UTILISATION, extra, least, enough, is_smallest, STAGE1_SHARE)
    return _stage(settings, images, budget, ask.tokenizer_cost, ask.tokenizer_speed)


def plan_prior(
    images: Images,
    machine: Machine,
    seconds: float,
    rung: Rung,
    stage1: list[Setting],
    ask: Measures,
    is_smallest: bool,
) -> Stage:
    """The plan of stage 2: the largest prior that the images suffice for, and that the seconds train.

    Raises:
        Unfit: even the smallest does not fit, or the seconds are too few for it.
    """
    few, learned_from = images.number < SMALL_SET, images.number * versions_of(images) * rung.codes
    epochs = PRIOR_EPOCHS_LARGE if images.number >= LARGE_PRIOR_SET else PRIOR_EPOCHS_SMALL
    least, extra = max(PRIOR_LEAST, images.number), ask.extra(rung.size)
    for size in reversed(PRIOR_SIZES):
        parameters = 12 * size.layers * size.width**2  # of the layers, about
        if parameters > PARAMETERS_PER_TOKEN * learned_from and size is not PRIOR_SIZES[0]:
            continue
        settings = prior_settings(size, images, machine, 32 if few else 256 if size.width >= 768 else 64)
        enough = max(least, epochs * images.number)
        timed_anyway = is_smallest and size is PRIOR_SIZES[0]
        # A picture of samples: 32 guided sequences, and the decoder's copy of the weights.
        evaluation = 4 * (2 * 32 * 2 * size.layers * size.width * rung.codes + parameters)
        budget = Budget(
            machine, seconds, PRIOR_UTILISATION, extra, least, enough, timed_anyway, 1 - STAGE1_SHARE, evaluation
        )
        cost = functools.partial(ask.prior_cost, stage1=stage1)
        try:
            return _stage(settings, images, budget, cost, lambda own, passes: ask.prior_speed(own, stage1, passes))
        except Unfit as unfit:
            last = unfit
    raise last


class Budget(NamedTuple):
    """What a stage may take, and how many examples it should see.

    Attributes:
        machine: where it runs.
        seconds: how long it may train.
        utilisation: share of a GPU's peak.
        extra: bytes that its process takes besides.
        least: examples without which it is of no use.
        enough: examples after which more bring little.
        timed_anyway: also if it is too slow by its FLOPs, for the error that says how many hours it needs.
        share: of the hours of both stages.
        evaluation: bytes that an evaluation takes instead of a step's activations.
    """

    machine: Machine
    seconds: float
    utilisation: float
    extra: float
    least: int
    enough: int
    timed_anyway: bool
    share: float
    evaluation: float = 0.0


class Unfit(Exception):
    """A configuration that does not fit in the memory, or that the seconds do not train for long enough.

    Attributes:
        memory: bytes that it takes at one example a pass.
        seconds: how long both stages would train at the least; None if it does not fit.
    """

    def __init__(self, memory: float, seconds: float | None = None):
        super().__init__()
        self.memory, self.seconds = memory, seconds


def _stage(
    settings: list[Setting],
    images: Images,
    budget: Budget,
    cost_of: Callable[[list[Setting]], Cost],
    timed: Callable[[list[Setting], int], float],
) -> Stage:
    machine = budget.machine
    batch = machine.devices * math.ceil(as_tree(settings)["train"]["batch_size"] / machine.devices)
    settings = [s._replace(value=batch) if s.key == "train.batch_size" else s for s in settings]
    cost = cost_of(settings)
    fits = passes_that_fit(cost, batch, machine, budget.extra, budget.evaluation)
    if fits is None:
        settings.append(AGAIN)
        cost = cost_of(settings)
        fits = passes_that_fit(cost, batch, machine, budget.extra, budget.evaluation)
    smallest = budget.extra + SLACK * cost.memory(1)
    if fits is None:
        raise Unfit(smallest)
    passes, memory = fits
    speed = _speed(cost, batch, passes, budget, functools.partial(timed, settings, passes))
    if speed * budget.seconds < budget.least:
        raise Unfit(smallest, budget.least / speed / budget.share)
    steps = math.floor(min(speed * budget.seconds, budget.enough) / batch)
    settings += _length(steps, passes, steps * batch < 0.95 * speed * budget.seconds)
    return Stage(settings, cost, batch, passes, steps, speed, steps * batch / images.number, memory)


def _speed(cost: Cost, batch: int, passes: int, budget: Budget, timed: Callable[[], float]) -> float:
    """Examples a second: timed, unless even the peak is too slow; on other machines by a share of the peak."""
    peak = budget.machine.devices * budget.machine.flops / cost.flops
    if not budget.machine.timed:
        return batch / max(passes * LEAST_STEP, batch / (budget.utilisation * peak))
    return timed() if budget.timed_anyway or peak * budget.seconds >= budget.least else peak


def _length(steps: int, passes: int, capped: bool) -> list[Setting]:
    why = "more would bring little, with so many images" if capped else "as many as the hours allow"
    every = max(100, min(5000, steps // 10))
    found = [
        Setting("train.max_steps", steps, why),
        Setting("train.eval_every", every),
        Setting("train.checkpoint_every", every),
    ]
    return found + ([Setting("train.accumulation", passes, "passes of a step, or it would not fit")] * (passes > 1))
