"""Look at images and a machine, and write configurations of both stages that suit them, with their reasons and costs.

python stage1/plan.py data.source=PATH [hours=2] [gpus=8 gpu_memory=80 tflops=400] [data.*=... out=DIR]
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from types import ModuleType

import numpy as np
import psutil
import torch

from vqgen.cli.program import run_program
from vqgen.cli.reflect import complete_options
from vqgen.cli.sections import STAGE1_SECTIONS
from vqgen.data.describe import describe, original_sizes
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
    Rung,
    Setting,
    Stage,
    as_tree,
    plan,
)
from vqgen.planning.cost import Cost, prior_cost, tokenizer_cost, without_memory
from vqgen.planning.step import PriorStep, TokenizerStep, Untrained, with_values
from vqgen.settings import DataConfig, PlanConfig, Stage1Config, Stage2Config
from vqgen.tokenizers import build_tokenizer

CONTEXT = 1.5 * GB  # CUDA's own and its libraries'
OVERHEAD = 0.08 * GB  # of a process on a CPU: its log, the pictures of an evaluation, a checkpoint that is written
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
    alone = "is no program for several processes; start it with python, without accelerate launch"
    require(int(os.environ.get("WORLD_SIZE", 1)) == 1, f"stage1/plan.py: {alone}")
    with section("data"):
        # Nothing is decoded yet, because the size is not known.
        train_set, held_out = load_images(dataclasses.replace(config.data, cache_gb=0))
    streamed = "the length of a stream is not known; plan with some of its shards, without data.stream=true"
    require(isinstance(train_set, ImageSet), f"data.stream=true: {streamed}")
    sizes, found = original_sizes(train_set)[:, 1:], describe(train_set, held_out, 1)
    side = int(np.median(sizes.min(axis=1))) if len(sizes) else None
    count, colour = len(train_set), "grey" if train_set.channels == 1 else "RGB"
    originals = "originals of unknown size" if side is None else f"the originals' median shorter side is {side} pixels"
    print(f"images: {count:,} to train on, {len(held_out):,} held out ({found.split}), {colour}, {originals}")
    print(*dataclasses.replace(found, hints=[]).short_lines()[1:], sep="\n")
    fewest = f"at least {FEWEST} are needed to learn anything; a thousand are few"
    require(count >= FEWEST, f"data.source={config.data.source}: {count} images to train on; {fewest}")
    given = {f"data.{key}": value for key, value in vars(config.data).items() if value != getattr(DataConfig(), key)}
    images = Images(count, train_set.channels, side, config.data.flip, given.get("data.crops"))
    machine = machine_of(config)
    print(f"planned for: {machine.words}; hours={config.hours:g}, {STAGE1_SHARE:.0%} of them for stage 1")
    planned = Planned(images, machine, config.data, train_set)
    rung, stage1, stage2 = plan(images, machine, config.hours, config.largest, planned)
    for line in describe(train_set.resized(rung.size), held_out, stage1.batch).hint_lines:
        print(line)

    words = f"{Path(config.data.source).stem[:40]}-{out.name}"
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in words).strip("-")
    runs = [f"runs/{name}/stage{i}" for i in (1, 2)]
    heads = [
        [Setting("run_dir", runs[0]), *(Setting(key, value) for key, value in given.items())],
        [Setting("run_dir", runs[1]), Setting("stage1", runs[0])],
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for i, (file, head, stage) in enumerate(zip(files, heads, (stage1, stage2), strict=True), start=1):
            title = f"Stage {i}, for {count:,} images and {config.hours:g} hours of both stages on {machine.words}"
            which = [f"The tokenizer: {rung.codes} codes an image, {rung.why}."] if i == 1 else []
            chosen = [setting for setting in stage.settings if setting.key not in given]
            file.write_text(as_yaml([f"{title}.", *which], [*head, *chosen]), "utf-8")
    except OSError as error:
        raise InputError(f"out={out} cannot be written ({error.strerror}); name another folder: out=") from error
    print(*report(stage1, stage2, rung, planned, machine), sep="\n")
    launch = f"accelerate launch --num_processes {machine.devices}"
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
    mps = torch.backends.mps.is_available()
    require(not mps, "this Mac's GPU cannot be timed; describe it: gpus=1 gpu_memory= tflops=")
    free, rate = psutil.virtual_memory().available, product_rate(torch.device("cpu"), torch.float32)
    has = f"{torch.get_num_threads()} thread(s), {rate / 1e9:.0f} GFLOP/s in products and {free / GB:.1f} GB free"
    return Machine(1, free, rate, True, "no", f"this machine's CPU: {has}")


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices, which no training step exceeds."""
    side = 8192 if device.type == "cuda" else 2048
    x = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / median_seconds(lambda: torch.mm(x, x), device)


class Planned:
    """`Measures` of the programs."""

    def __init__(self, images: Images, machine: Machine, data: DataConfig, train_set: ImageSet):
        self.images, self.machine, self.train_set, self.data = images, machine, train_set, data
        self.device = torch.device("cuda" if torch.cuda.is_available() and machine.timed else "cpu")
        self.programs = {i: program(i) for i in (1, 2)}
        self.programs[1].PerceptualDistance = Untrained  # type: ignore[attr-defined]
        self.class_names = train_set.class_names
        self.own = psutil.Process().memory_info().rss  # bytes

    def extra(self, size: int) -> float:
        if not (self.machine.timed and self.device.type == "cpu"):
            return CONTEXT
        decoded = self.decoded(size)
        return self.own + OVERHEAD + (decoded if decoded <= self.data.cache_gb * 2**30 else 0)

    def decoded(self, size: int) -> int:
        """Bytes of all training images, decoded."""
        return self.images.number * self.images.channels * size**2

    def stage1_config(self, settings: list[Setting]) -> Stage1Config:
        config: Stage1Config = with_values(Stage1Config(), as_tree(settings))
        config.data.channels = self.images.channels
        config.model = {**config.model, "channels": self.images.channels}
        config.model = complete_options(STAGE1_SECTIONS, "model", config.model)
        config.discriminator = complete_options(STAGE1_SECTIONS, "discriminator", config.discriminator)
        return config

    def stage2_config(self, settings: list[Setting], stage1: list[Setting]) -> Stage2Config:
        config: Stage2Config = with_values(Stage2Config(), as_tree(settings))
        config.data["image_size"] = as_tree(stage1)["data"]["image_size"]
        return config

    def tokenizer_cost(self, settings: list[Setting]) -> Cost:
        return tokenizer_cost(self.programs[1], self.stage1_config(settings))

    def prior_cost(self, settings: list[Setting], stage1: list[Setting]) -> Cost:
        model = self.stage1_config(stage1).model
        with without_memory(torch.float32):
            tokenizer = build_tokenizer(**model)
        return prior_cost(self.programs[2], self.stage2_config(settings, stage1), tokenizer, self.class_names)

    def tokenizer_speed(self, settings: list[Setting], passes: int) -> float:
        config = self.stage1_config(settings)
        batch = config.train.batch_size // passes
        step = TokenizerStep(self.programs[1], config, batch, self.device)
        seconds = median_seconds(step, self.device) / batch
        return 1 / (seconds + self.reading(config))

    def prior_speed(self, settings: list[Setting], stage1: list[Setting], passes: int) -> float:
        config = self.stage2_config(settings, stage1)
        batch = config.train.batch_size // passes
        tokenizer = build_tokenizer(**self.stage1_config(stage1).model)
        step = PriorStep(self.programs[2], config, tokenizer, self.class_names, batch, self.device)
        return batch / median_seconds(step, self.device)

    def reading(self, config: Stage1Config) -> float:
        """Seconds that reading an image takes of a training step: none if the decoded set stays in memory."""
        size = config.data.image_size
        if self.decoded(size) <= self.data.cache_gb * 2**30:
            return 0.0
        resized, looked_at = self.train_set.resized(size), np.linspace(0, self.images.number - 1, 64, dtype=int)
        start = time.perf_counter()
        resized.__getitems__(looked_at)
        each = (time.perf_counter() - start) / len(looked_at)
        return each if self.device.type == "cpu" else each / max(1, self.data.workers)


def median_seconds(step: Callable[[], None], device: torch.device) -> float:
    """The median over steps of which the first are not counted."""
    times: list[float] = []
    while len(times) < UNTIMED + TIMED_STEPS and (len(times) < 2 or sum(times[1:]) < TIMED_SECONDS):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[min(UNTIMED, len(times) // 2) :])


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


def report(stage1: Stage, stage2: Stage, rung: Rung, planned: Planned, machine: Machine) -> list[str]:
    """The plan's figures, a line for each stage."""
    k = planned.stage1_config(stage1.settings).model["quantizer"]["codebook_size"]
    assumed = f"if GPUs reach {UTILISATION:.0%} of their peak in stage 1 and {PRIOR_UTILISATION:.0%} in stage 2"
    how = "timed" if machine.timed else assumed
    lines = [f"stage 1: {rung.size}x{rung.size} pixels to {rung.codes} codes of {k:,}"]
    lines.append(f"stage 2: sequences of {rung.codes} codes")
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
