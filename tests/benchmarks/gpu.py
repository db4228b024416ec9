"""Speed and memory of stage 1's training step on a GPU, with the losses of configs/stage1/imagenet256_*.yaml.

python tests/benchmarks/gpu.py [--tiny] [SECONDS]

It needs no data and no weights, and at most SECONDS, 150 by default: cases for which there is no time left are named.
Each row is the median of steps as the program makes them, losses, clipping, optimizers and averages included. TFLOP/s
count the step's own products, not those that activation checkpointing repeats. With --tiny it runs on the CPU too, with
small networks, whose figures mean nothing.
"""

import gc
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from step import ROOT, Step, configuration
from torch import nn

from vqgen.planning.cost import Meter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = "--tiny" in sys.argv
SHRUNK = {"data__image_size": 32, "model__width": 8, "model__norm_groups": 4, "discriminator__width": 8}
SHRUNK |= {"discriminator__layers": 2}
WARMUP, TIMED = (1, 1) if TINY else (2, 5)
PRODUCTS = ("conv", "mm", "attention", "::linear")  # parts of the names of convolutions and products; no "bilinear"
F16, F8, LIGHT = "imagenet256_f16", "imagenet256_f8", "emoji64"


def norms_in_float32(nets: Any) -> Any:
    """Normalises as torch's own group norm does under autocast."""
    for module in nets.model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = nn.GroupNorm.forward.__get__(module)
    return nets


def contiguous(nets: Any) -> Any:
    for part in (nets.model, nets.disc, nets.perceptual):
        if part is not None:
            part.to(memory_format=torch.contiguous_format)
    return nets


def compiled(nets: Any) -> Any:
    for part in (nets.model.encoder, nets.model.decoder):  # apart from the quantizer, whose first step differs
        part.compile(dynamic=False, backend="eager" if TINY else "inductor")
    return nets


# name, configuration, images a pass, changes of the settings, changes of the networks
Case = tuple[str, str, int, dict[str, Any], Callable[[Any], Any]]
BF16, TF32 = {"train__mixed_precision": "bf16"}, {"train__mixed_precision": "no"}
AGAIN = {**BF16, "train__activation_checkpointing": True}


def as_it_is(nets: Any) -> Any:
    return nets


CASES: list[Case] = [
    ("bf16, channels last", F16, 16, BF16, as_it_is),
    ("bf16, channels last", F16, 32, BF16, as_it_is),
    ("bf16, NCHW", F16, 16, BF16, contiguous),
    ("bf16, channels last, norms in float32", F16, 16, BF16, norms_in_float32),
    ("bf16, channels last, checkpointing", F16, 16, AGAIN, as_it_is),
    ("bf16, channels last, checkpointing", F16, 32, AGAIN, as_it_is),
    ("TF32, channels last", F16, 16, TF32, as_it_is),
    ("TF32, NCHW", F16, 16, TF32, contiguous),
    ("bf16, channels last", F8, 16, BF16, as_it_is),
    ("bf16, channels last, checkpointing", F8, 16, AGAIN, as_it_is),
    ("bf16, channels last, checkpointing", F8, 32, AGAIN, as_it_is),
    ("bf16, channels last", LIGHT, 256, BF16, as_it_is),
    ("TF32, channels last", LIGHT, 256, TF32, as_it_is),
    ("bf16, channels last, compiled", F16, 16, BF16, compiled),  # the last, as compiling may take what time is left
]


def step_of(case: Case) -> Step:
    _, name, batch, changes, prepare = case
    tiny = (SHRUNK if name != LIGHT else {"data__image_size": 32}) if TINY else {}
    config = configuration(ROOT / f"configs/stage1/{name}.yaml", **changes, **tiny)
    step = Step(config, 2 if TINY else batch, DEVICE, prepare)
    if prepare is contiguous:
        step.x = step.x.contiguous()
    return step


def seconds(step: Step) -> float:
    """Median seconds of a step."""
    times = []
    for i in range(WARMUP + TIMED):
        if DEVICE.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end) / 1000
        else:
            begun = time.perf_counter()
            step()
            took = time.perf_counter() - begun
        if i >= WARMUP:
            times.append(took)
    return statistics.median(times)


def flops_of(step: Step) -> int:
    """The FLOPs of a step per image."""
    with Meter() as meter:
        step.backward()
    step.update()
    return meter.flops // len(step.x)


def measure(case: Case, flops: dict[str, int]) -> str:
    """A row of the table."""
    name, config, batch, *_ = case
    gc.collect()  # Accelerate's models are in reference cycles
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = step_of(case)
        took = seconds(step)
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else float("nan")
        if config not in flops:  # the first case of each configuration repeats nothing
            flops[config] = flops_of(step)
    except torch.OutOfMemoryError:
        return f"| {config} | {name} | {batch} | out of memory | | |"
    speed = len(step.x) / took
    return f"| {config} | {name} | {batch} | {speed:.1f} | {speed * flops[config] / 1e12:.1f} | {peak:.1f} |"


def host_syncs(step: Step) -> list[str]:
    """The places of a step at which the CPU waits for the GPU."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def shares(step: Step, of: str) -> dict[str, float]:
    """The share of a step's time that each operator (if `of` is "aten::") or kernel ("") takes, largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU] if of else []
    activities += [torch.profiler.ProfilerActivity.CUDA] if DEVICE.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
    on = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, on) for event in profile.key_averages() if event.key.startswith(of)}
    total = sum(times.values())
    return {name: took / total for name, took in sorted(times.items(), key=lambda item: -item[1])}


def too_late(*_: object) -> None:
    raise TimeoutError


def main(budget: float) -> None:
    started = time.perf_counter()
    signal.signal(signal.SIGALRM, too_late)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}\n")
    step = step_of(CASES[0])
    print(f"host syncs in a step: {host_syncs(step) if DEVICE.type == 'cuda' else 'not on a CPU'}")
    operators = shares(step, "aten::")
    products = sum(share for name, share in operators.items() if any(part in name for part in PRODUCTS))
    print(f"{F16}, {CASES[0][0]}: convolutions and products {products:.0%} of the operators' time; the largest:")
    print(", ".join(f"{name[6:]} {share:.0%}" for name, share in list(operators.items())[:12]))
    if DEVICE.type == "cuda":
        print("the largest kernels:")
        print("\n".join(f"  {share:.1%} {name[:110]}" for name, share in list(shares(step, "").items())[:12]))
    del step
    print("\n| configuration | how | images a pass | images/s | TFLOP/s | peak GB |\n|---|---|---|---|---|---|")
    flops: dict[str, int] = {}
    for case in CASES:
        signal.alarm(max(1, round(budget - (time.perf_counter() - started))))
        try:
            row = measure(case, flops)
        except TimeoutError:
            row = f"| {case[1]} | {case[0]} | {case[2]} | no time left | | |"
        print(row, flush=True)
    signal.alarm(0)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    if len(words) > 1 or not all(map(str.isdecimal, words)):
        print("error: usage: python tests/benchmarks/gpu.py [--tiny] [SECONDS]", file=sys.stderr)
        sys.exit(2)
    main(float(words[0]) if words else 150)
