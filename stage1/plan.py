"""Look at images and a machine, and write configurations of both stages that suit them, with their reasons and costs.

python stage1/plan.py data.source=PATH [hours=2] [gpus=8 gpu_memory=80 tflops=400] [data.*=... out=DIR]
"""

import dataclasses
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch

from vqgen.cli.program import run_program
from vqgen.cli.reflect import complete_options
from vqgen.cli.sections import STAGE1_SECTIONS
from vqgen.data.describe import describe
from vqgen.data.images import ImageSet, load_images
from vqgen.errors import InputError, require, section
from vqgen.planning.choose import (
    FEWEST,
    GB,
    LEAST_STEP,
    PRIOR_UTILISATION,
    STAGE1_SHARE,
    UTILISATION,
    Images,
    Machine,
    Setting,
    Stage,
    TooSlow,
    as_tree,
    plan_prior,
    plan_tokenizer,
)
from vqgen.planning.cost import Cost, prior_cost, tokenizer_cost, without_memory
from vqgen.planning.step import PriorStep, TokenizerStep, Untrained
from vqgen.settings import DataConfig, PlanConfig, Stage1Config, Stage2Config
from vqgen.tokenizers import build_tokenizer

CONTEXT = 1.5 * GB  # CUDA's own and its libraries'
OVERHEAD = 0.15 * GB  # of a process on a CPU: its log, the pictures of an evaluation, a checkpoint that is written
UNTIMED, TIMED_SECONDS, TIMED_STEPS = 5, 4.0, 40  # steps, and seconds or steps, of a configuration that is timed


def program(stage: int) -> ModuleType:
    """The training program of a stage, whose passes are measured."""
    path = Path(__file__).resolve().parents[1] / f"stage{stage}/train.py"
    spec = importlib.util.spec_from_file_location(f"stage{stage}_train", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(config: PlanConfig) -> None:
    size, out = config.data.image_size, Path(config.out)
    require(size == DataConfig().image_size, f"data.image_size={size}: the plan chooses it; largest= bounds it")
    files = [out / "stage1.yaml", out / "stage2.yaml"]
    for file in files:
        require(not file.exists(), f"{file} is there already; delete it, or name another folder: out=")
    with section("data"):
        train_set, held_out = load_images(config.data)
    streamed = "the length of a stream is not known; plan with some of its shards, without data.stream=true"
    require(isinstance(train_set, ImageSet), f"data.stream=true: {streamed}")
    found = describe(train_set, held_out, 1)
    count, medians = len(train_set), [found.sizes[side]["median"] for side in ("width", "height") if found.sizes]
    originals = f"the originals' median is {'x'.join(map(str, medians))}" if medians else "of unknown size"
    colour = "grey" if train_set.channels == 1 else "RGB"
    print(f"images: {count:,} to train on, {len(held_out):,} held out, {colour}, {originals}")
    print(*found.short_lines()[1:], sep="\n")
    fewest = f"at least {FEWEST} are needed to learn anything; a thousand are few"
    require(count >= FEWEST, f"data.source={config.data.source}: {count} images to train on; {fewest}")
    images = Images(count, train_set.channels, min(medians, default=32), config.data.flip)
    machine = machine_of(config)
    print(f"planned for: {machine.words}")
    planned = Planned(images, machine, config, train_set)
    try:
        rung, stage1 = plan_tokenizer(
            images, machine, 3600 * config.hours * STAGE1_SHARE, config.largest,
            cost_of=planned.tokenizer_cost, timed=planned.tokenizer_speed, extra=planned.extra,
        )  # fmt: skip
        planned.stage1 = stage1.settings
        stage2 = plan_prior(
            images, machine, 3600 * config.hours * (1 - STAGE1_SHARE), rung.codes,
            cost_of=planned.prior_cost, timed=planned.prior_speed, extra=planned.extra,
        )  # fmt: skip
    except TooSlow as error:
        enough = math.ceil(100 * error.hours) / 100
        short = f"hours={config.hours:g}: too few even for the smallest model on {images.number:,} images"
        raise InputError(f"{short}; give at least hours={enough:g}, or fewer images by data.max_images=") from error
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(config.data.source).stem)[:40] or "images"
    runs = [f"runs/{name}/stage{i}" for i in (1, 2)]
    own = [
        Setting(f"data.{f.name}", value)
        for f in dataclasses.fields(DataConfig)
        if (value := getattr(config.data, f.name)) != getattr(DataConfig(), f.name)
    ]
    heads = [[Setting("run_dir", runs[0]), *own], [Setting("run_dir", runs[1]), Setting("stage1", runs[0])]]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for i, (file, head, stage) in enumerate(zip(files, heads, (stage1, stage2), strict=True), start=1):
            title = f"Stage {i}, for {count:,} images and {config.hours:g} hours of both stages on {machine.words}"
            which = [f"The tokenizer: {rung.codes} codes an image, {rung.why}."] if i == 1 else []
            file.write_text(as_yaml([f"{title}.", *which], [*head, *stage.settings]), "utf-8")
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder: out=") from error
    print(*report(stage1, stage2, rung.codes, machine), sep="\n")
    launch = f"accelerate launch{f' --num_processes {machine.devices}' if machine.devices > 1 else ''}"
    for i, file in enumerate(files, start=1):
        print(f"{'next' if i == 1 else 'then'}: {launch} stage{i}/train.py {quote(str(file))}")


def machine_of(config: PlanConfig) -> Machine:
    """The machine that the settings describe; or this one, with what it has free."""
    if config.gpus is not None:
        assert config.gpu_memory is not None
        assert config.tflops is not None
        words = f"{config.gpus} GPU(s) of {config.gpu_memory:g} GB and {config.tflops:g} TFLOP/s in bf16"
        return Machine(config.gpus, config.gpu_memory * GB, config.tflops * 1e12, False, "bf16", words)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        words = f"one {torch.cuda.get_device_name()}, of which {free / GB:.1f} GB are free, in bf16"
        return Machine(1, free, product_rate(torch.device("cuda"), torch.bfloat16), True, "bf16", words)
    free, rate = psutil.virtual_memory().available, product_rate(torch.device("cpu"), torch.float32)
    has = f"{torch.get_num_threads()} thread(s), {rate / 1e9:.0f} GFLOP/s in products and {free / GB:.1f} GB free"
    return Machine(1, free, rate, True, "no", f"this machine's CPU: {has}")


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices, which no training step exceeds."""
    side = 8192 if device.type == "cuda" else 2048
    x = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: torch.mm(x, x), device)


class Planned:
    """What `plan_tokenizer` and `plan_prior` ask of the programs: the cost and the speed of settings.

    Attributes:
        stage1: the chosen settings of stage 1, for stage 2.
        extra: bytes that a training process takes besides its networks.
    """

    def __init__(self, images: Images, machine: Machine, config: PlanConfig, train_set: ImageSet):
        self.images, self.machine, self.train_set, self.data = images, machine, train_set, config.data
        self.device = torch.device("cuda" if torch.cuda.is_available() and machine.timed else "cpu")
        self.programs = {i: program(i) for i in (1, 2)}
        self.programs[1].PerceptualDistance = Untrained  # type: ignore[attr-defined]
        self.class_names = train_set.class_names
        self.stage1: list[Setting] = []
        on_cpu = machine.precision == "no"
        self.extra = psutil.Process().memory_info().rss + OVERHEAD if on_cpu else CONTEXT

    def stage1_config(self, settings: list[Setting]) -> Stage1Config:
        config: Stage1Config = as_dataclass(Stage1Config, as_tree(settings))
        config.data.channels = self.images.channels
        config.model = {**config.model, "channels": self.images.channels}
        config.model = complete_options(STAGE1_SECTIONS, "model", config.model)
        config.discriminator = complete_options(STAGE1_SECTIONS, "discriminator", config.discriminator)
        return config

    def stage2_config(self, settings: list[Setting]) -> Stage2Config:
        config: Stage2Config = as_dataclass(Stage2Config, as_tree(settings))
        config.data["image_size"] = as_tree(self.stage1)["data"]["image_size"]
        return config

    def tokenizer_cost(self, settings: list[Setting]) -> Cost:
        return tokenizer_cost(self.programs[1], self.stage1_config(settings))

    def prior_cost(self, settings: list[Setting]) -> Cost:
        model = self.stage1_config(self.stage1).model
        with without_memory(torch.float32):
            tokenizer = build_tokenizer(**model)
        return prior_cost(self.programs[2], self.stage2_config(settings), tokenizer, self.class_names)

    def tokenizer_speed(self, settings: list[Setting], passes: int) -> float:
        config = self.stage1_config(settings)
        batch = config.train.batch_size // passes
        step = TokenizerStep(self.programs[1], config, batch, self.device)
        seconds = median_seconds(step, self.device) / batch
        return 1 / (seconds + self.reading(config))

    def prior_speed(self, settings: list[Setting], passes: int) -> float:
        config = self.stage2_config(settings)
        batch = config.train.batch_size // passes
        tokenizer = build_tokenizer(**self.stage1_config(self.stage1).model)
        step = PriorStep(self.programs[2], config, tokenizer, self.class_names, batch, self.device)
        return batch / median_seconds(step, self.device)

    def reading(self, config: Stage1Config) -> float:
        """Seconds that reading an image takes of a training step: none if the decoded set stays in memory."""
        height, width = config.data.size
        if self.images.number * self.images.channels * height * width <= self.data.cache_gb * GB:
            return 0.0
        start = time.perf_counter()
        looked_at = np.linspace(0, self.images.number - 1, 64, dtype=int)
        self.train_set.__getitems__(looked_at)
        each = (time.perf_counter() - start) / len(looked_at)
        return each if self.device.type == "cpu" else each / max(1, self.data.workers)


def median_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Median seconds of a step."""
    times: list[float] = []
    while len(times) < UNTIMED + TIMED_STEPS and (len(times) < 2 or sum(times[1:]) < TIMED_SECONDS):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[min(UNTIMED, len(times) // 2) :])


def as_dataclass(cls: Any, values: dict[str, Any]) -> Any:
    """An object of a dataclass, whose fields may be dataclasses themselves, from nested dictionaries."""
    defaults = cls()

    def made(key: str, value: Any) -> Any:
        own = getattr(defaults, key)
        if dataclasses.is_dataclass(own):
            return dataclasses.replace(own, **{k: made_in(own, k, v) for k, v in value.items()})
        return value

    def made_in(own: Any, key: str, value: Any) -> Any:
        part = getattr(own, key)
        return dataclasses.replace(part, **value) if dataclasses.is_dataclass(part) else value

    return cls(**{key: made(key, value) for key, value in values.items()})


def as_yaml(titles: list[str], settings: list[Setting]) -> str:
    """A configuration file with a comment for each reason."""
    lines, seen = [f"# {line}" for line in (*titles, "The reasons are rules of thumb (docs/scaling.md).")], ""
    for part in dict.fromkeys(key.split(".")[0] for key, *_ in settings):
        own = [s for s in settings if s.key.split(".")[0] == part]
        for key, value, why in own:
            inside = key.removeprefix(f"{part}.")
            indent = "" if inside == key else "  "
            if indent and seen != part:
                lines.append(f"{part}:")
                seen = part
            lines += [f"{indent}# {why}"] if why else []
            lines.append(f"{indent}{inside}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def report(stage1: Stage, stage2: Stage, codes: int, machine: Machine) -> list[str]:
    """The plan's figures, a line for each stage."""
    size = as_tree(stage1.settings)["data"]["image_size"]
    k = next((s.value["codebook_size"] for s in stage1.settings if s.key == "model.quantizer"), 512)
    assumed = f"if GPUs reach {UTILISATION:.0%} of their peak in stage 1 and {PRIOR_UTILISATION:.0%} in stage 2"
    how = "timed" if machine.timed else assumed
    lines = [f"stage 1: {size}x{size} pixels to {codes} codes of {k:,}", f"stage 2: sequences of {codes} codes"]
    for i, stage in enumerate((stage1, stage2)):
        passes = f" in {stage.passes} passes" if stage.passes > 1 else ""
        flops, seconds = stage.batch * stage.cost.flops, stage.batch / stage.speed
        lines[i] += (
            f", {stage.cost.parameters / 1e6:.2f} M parameters; a step of {stage.batch}{passes} has {flops / 1e9:,.1f} "
            f"GFLOP and takes {stage.memory / GB:.1f} GB and {seconds:.3g} s; "
            f"{stage.steps:,} steps are {stage.epochs:,.1f} epochs and {stage.hours:.2f} hours"
        )
    lines.append(f"the seconds of a step: {how}")
    if machine.devices > 1 and any(stage.batch / stage.speed <= LEAST_STEP for stage in (stage1, stage2)):
        lines.append("hint: these networks are small, and one GPU trains them as fast as several")
    return lines


if __name__ == "__main__":
    run_program(
        main, PlanConfig, {}, "python stage1/plan.py data.source=PATH [hours=2] [gpus=8 gpu_memory=80 tflops=400]"
    )
